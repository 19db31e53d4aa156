"""The rows of `crossover bench kernels` as one page, in text and as Markdown: first what is behind, then everything."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..harness.format import DASH, count, format_bytes, number
from ..report.document import Block, Heading, Items, Paragraph, Table, to_markdown
from .contestants import BEFORE, OURS
from .models import FLOOR, PRODUCTS
from .profiles import KINDS, WELL_SPENT, kind_of

__all__ = ["DECODING_GOAL", "SHARE_GOAL", "TRAINING_GOAL", "behind", "line_of", "markdown", "page", "to_text"]

Row = Mapping[str, Any]

TRAINING_GOAL = 1.1
"""Times as long a peer's training step should take as ours, at least."""
DECODING_GOAL = 1.5
"""Times as long as its floor, or its matrix products call by call where that is longer, a token should take at most."""
SHARE_GOAL = 0.05
"""Share of a training step that anything but products, attention, scans and long convolutions should take at most."""

_WIDTH = 120
_OTHERS = ("torch", "compiled", "definition", "peer")
_ABOUT_ALL = (
    "Factors say how many times as long others take as ours, medians of turns. On one thread it is the CPU time of the "
    "process, on several the time on the wall. -: took no part."
)
_ABOUT_OPERATIONS = (
    "ours: the backend that is chosen by itself. torch: plain PyTorch; compiled: torch.compile of it or, where it "
    "cannot look in, of a loop over some tokens, on one thread only; definition: the reference, mostly a loop over "
    "tokens that autograd differentiates; peer: PyTorch's own module, against which ours counts the projections that "
    "it does too. bound: which of bytes, matrix products (flops) or exponentials (exps) alone would take longest at "
    "the rates above, and our time as a multiple of that. Forward reads the inputs and writes the outputs once; "
    "backward reads both and writes the gradients."
)
_ABOUT_TRAINING = (
    "A step is forward, backward, clipping and AdamW, in float32. Peers compute the same with the same weights, and "
    "have our allocator setting; in brackets the middle half of turns."
)
_ABOUT_PROFILES = (
    "Percent of a training step on one thread, by PyTorch's profiler, medians of three steps. products: linear layers, "
    "the head with its loss, experts; long conv: FFTs, their kernels and H3's shift of 64 tokens; rest: embeddings, "
    "views, autograd and Python; other: operators of no kind, by name."
)
_ABOUT_DECODING = (
    "Milliseconds of one token of one sequence after 64 others, in float32, without drawing it. decode: whether the "
    "model's modules ran, or a compiled step, which is the mean of 64 tokens. x floor: our time as a multiple of the "
    "floor, which reads as many bytes as the token must (weights, active experts, state or cache) by turns in the same "
    "run. torch.mv: the token's matrix products alone, each a call."
)


def behind(rows: Sequence[Row]) -> list[str]:
    """Where a peer is faster than ours or a goal is missed, the worst first."""
    found = [shortfall for row in rows for shortfall in _shortfalls(row)]
    return [text for _, text in sorted(found, key=lambda pair: -pair[0])]


def _shortfalls(row: Row) -> Iterator[tuple[float, str]]:
    """By which factor each is missed, and in words."""
    kind, where = row["kind"], _where(row)
    if kind == "operation":
        for name, ratio in row["ratios"].items():
            if ratio < 1:
                yield 1 / ratio, f"{where}: {name} takes {ratio:.2f} times as long as ours"
        return
    if kind not in ("training", "profile", "decoding"):
        return
    if OURS in row["errors"]:
        yield float("inf"), f"{where}: ours {row['errors'][OURS]}"
    if kind == "profile":
        yield from _large_shares(row)
        return
    goal = TRAINING_GOAL if kind == "training" else 1.0
    for name, ratio in _peers(row).items():
        if ratio < goal:
            wanted = f", and should take {goal}" if goal > 1 else ""
            yield goal / ratio, f"{where}: {name} takes {ratio:.2f} times as long as ours{wanted}"
    if BEFORE in row["quartiles"] and row["quartiles"][BEFORE][1] < 1:  # or it is within what turns differ by
        ratio = row["ratios"][BEFORE]
        yield 1 / ratio, f"{where}: ours took {ratio:.2f} times as long before"
    if row.get("times_floor") is not None:
        times, limit = row["times_floor"], "its floor"
        products = row["ratios"].get(PRODUCTS)
        if products and 1 / products < times:
            times, limit = 1 / products, f"what {PRODUCTS} takes"
        if times > DECODING_GOAL:
            yield times / DECODING_GOAL, f"{where}: takes {times:.1f} times {limit}, and should take {DECODING_GOAL}"


def _large_shares(row: Row) -> Iterator[tuple[float, str]]:
    for kind, share in row["kinds"].get(OURS, {}).items():
        if kind not in WELL_SPENT and share > SHARE_GOAL:
            of_kind = [n for n in row["names"][OURS] if (kind_of(row["arch"], n) or n) == kind]
            largest = ", ".join(f"{n} {_percent(row['names'][OURS][n])}" for n in of_kind[:3])
            said = f"{_percent(share)} % of a step is {kind}, and should be {_percent(SHARE_GOAL)} at most ({largest})"
            yield share / SHARE_GOAL, f"{_where(row)}: {said}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _where(row: Row) -> str:
    if row["kind"] == "operation":
        return f"{row['op']} {row['shape']}, {row['pass']}, {_threads(row)}"
    if row["kind"] in ("training", "profile", "decoding"):
        length = f" at {row['seq_len']:,} tokens" if "seq_len" in row else ""
        return f"{row['kind']} {row['arch']}, {count(row['n_params'])}{length}, {_threads(row)}"
    return row["kind"]


def _threads(row: Row) -> str:
    return "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"


def _peers(row: Row) -> dict[str, float]:
    """The ratios of those that are other people's models."""
    return {name: ratio for name, ratio in row["ratios"].items() if name not in (BEFORE, FLOOR, PRODUCTS)}


def line_of(row: Row) -> str:
    """A row as one line of text, as it is measured."""
    if row["kind"] == "absent":
        return f"not measured: {', '.join(row['peers'])} ({' && '.join(row['install'])})"
    if row["kind"] == "limits":
        return f"{_threads(row)}: {_limits_words(row)}"
    parts = [f"{number(1e3 * row['seconds'][OURS])} ms"] if OURS in row["seconds"] else []
    parts += [f"{name} {ratio:.2f}x" for name, ratio in row["ratios"].items() if name != FLOOR]
    parts += [f"{kind} {_percent(share)} %" for kind, share in row.get("kinds", {}).get(OURS, {}).items() if share]
    for key, what in (("times_bound", "bound"), ("times_floor", "floor")):
        if row.get(key) is not None:
            parts.append(f"{row[key]:.1f} times its {what}")
    return f"{_where(row)}: {'; '.join(parts) or 'nothing was measured'}"


def _limits_words(row: Row) -> str:
    rates = {
        name: [f"{rate / 1e9:.3g} at {format_bytes(float(n))}" for n, rate in row[name].items()] for name in _MEMORY
    }
    memory = "; ".join(f"GB/s {words}: {', '.join(rates[name])}" for name, words in _MEMORY.items())
    return f"{row['exps'] / 1e9:.3g} G exponentials a second; {row['flops'] / 1e9:.3g} GFLOP/s in products; {memory}"


_MEMORY = {"read": "read", "copy": "read and written in copies"}


def page(rows: Sequence[Row]) -> list[Block]:
    """Everything that was measured, what is behind first."""
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in _KINDS}
    blocks: list[Block] = [Heading(text="Behind"), Items(items=behind(rows) or ["nothing"])]
    blocks.append(Paragraph(text=_ABOUT_ALL))
    if kinds["limits"]:
        words = [line_of(row) for row in kinds["limits"]]
        blocks += [Heading(text="What this processor does at most"), Items(items=words)]
    if kinds["training"]:
        blocks += [Heading(text="Training steps of whole models"), Paragraph(text=_ABOUT_TRAINING)]
        blocks.append(_training_table(kinds["training"]))
    if kinds["profile"]:
        blocks += [Heading(text="What a training step spends its time on"), Paragraph(text=_ABOUT_PROFILES)]
        blocks.append(_profile_table(kinds["profile"]))
    if kinds["decoding"]:
        blocks += [Heading(text="Decoding"), Paragraph(text=_ABOUT_DECODING), _decoding_table(kinds["decoding"])]
    if kinds["operation"]:
        blocks += [Heading(text="Operations"), Paragraph(text=_ABOUT_OPERATIONS)]
        blocks.append(_operations_table(kinds["operation"]))
    if reasons := [*_absences(rows)]:
        blocks += [Heading(text="What took no part"), Items(items=reasons)]
    return blocks


_KINDS = ("limits", "training", "profile", "decoding", "operation")


def _absences(rows: Sequence[Row]) -> Iterator[str]:
    said = set[str]()
    for row in rows:
        if row["kind"] == "absent":
            yield line_of(row)
        if row["kind"] == "operation":
            yield from (f"{_where(row)}: {name} {reason}" for name, reason in row["skipped"].items())
        if why := row.get("facts", {}).get(OURS, {}).get("why"):
            yield f"{_where(row)}: the compiled step, because {why}"
        for name, error in row.get("errors", {}).items():
            text = f"{row['kind']} {row['arch']}, {name}: {error}"
            if text not in said:  # one that has left is missing in every later row
                said.add(text)
                yield text


def _training_table(rows: Sequence[Row]) -> Table:
    has_before = any(BEFORE in row["seconds"] or BEFORE in row["errors"] for row in rows)
    columns = [
        "model",
        "parameters",
        "tokens",
        "batch",
        "threads",
        "ours, ms",
        *[BEFORE] * has_before,
        "peer",
        "factor",
        "",
    ]
    lines: list[list[str]] = []
    for row in rows:
        first = [
            row["arch"],
            count(row["n_params"]),
            f"{row['seq_len']:,}",
            str(row["batch_size"]),
            str(row["threads"]),
        ]
        first += [_milliseconds(row), *[_factor(row, BEFORE)] * has_before]
        for name in _peers(row) or [DASH]:
            lines.append([*first, name, _factor(row, name), _middle(row, name)])
    return Table(columns=columns, rows=lines)


def _profile_table(rows: Sequence[Row]) -> Table:
    lines: list[list[str]] = []
    for row in rows:
        now, before = (row["kinds"].get(name, {}) for name in (OURS, BEFORE))

        def cell(kind: str, now: Row = now, before: Row = before) -> str:
            found = [_percent(of[kind]) for of in (before, now) if kind in of]
            return " -> ".join(found) or DASH

        others = [f"{kind} {cell(kind)}" for kind in now if kind not in KINDS and round(now[kind], 3)]
        first = [row["arch"], count(row["n_params"]), f"{row['seq_len']:,}", *map(cell, KINDS)]
        lines.append([*first, ", ".join(others) or DASH])
    return Table(columns=("model", "parameters", "tokens", *KINDS, "other"), rows=lines)


def _decoding_table(rows: Sequence[Row]) -> Table:
    has_before = any(BEFORE in row["seconds"] or BEFORE in row["errors"] for row in rows)
    columns = ["model", "parameters", "threads", "ours, ms", "decode", *[BEFORE] * has_before]
    columns += ["bytes", "floor, ms", "x floor", PRODUCTS, "peer", "factor"]
    lines: list[list[str]] = []
    for row in rows:
        floor = row["facts"].get(FLOOR)
        read = DASH if floor is None else format_bytes(floor["weights"] + floor["state"])
        times = DASH if row["times_floor"] is None else f"{row['times_floor']:.2f}"
        first = [row["arch"], count(row["n_params"]), str(row["threads"]), _milliseconds(row)]
        first += [row["facts"].get(OURS, {}).get("decode", DASH), *[_factor(row, BEFORE)] * has_before]
        first += [read, _milliseconds(row, FLOOR), times, _factor(row, PRODUCTS)]
        for name in _peers(row) or [DASH]:
            lines.append([*first, name, _factor(row, name)])
    return Table(columns=columns, rows=lines)


def _operations_table(rows: Sequence[Row]) -> Table:
    columns = ("operation", "size", "pass", "threads", "ours, ms", "backend", *_OTHERS, "bound", "x bound")
    lines: list[list[str]] = []
    for row in rows:
        bound = [DASH, DASH] if row["bound"] is None else [row["bound"]["by"], f"{row['times_bound']:.1f}"]
        first = [row["op"], row["shape"], row["pass"], str(row["threads"]), _milliseconds(row), row["backend"]]
        lines.append([*first, *[_factor(row, name) for name in _OTHERS], *bound])
    return Table(columns=columns, rows=lines)


def _milliseconds(row: Row, name: str = OURS) -> str:
    return number(1e3 * row["seconds"][name]) if name in row["seconds"] else DASH


def _factor(row: Row, name: str) -> str:
    return f"{row['ratios'][name]:.2f}x" if name in row["ratios"] else DASH


def _middle(row: Row, name: str) -> str:
    if name not in row["quartiles"]:
        return "one turn" if name in row["ratios"] else ""
    low, high = row["quartiles"][name]
    return f"[{low:.2f} to {high:.2f}]"


def markdown(rows: Sequence[Row], where: Row, threads: int) -> str:
    """The page as Markdown, with the machine and the command below its title."""
    commit = f", commit {where['git_commit'][:12]}" if where["git_commit"] else ""
    against = f", before is {where['against']}" if where.get("against") else ""
    subtitle = f"{where['cpu']}, {threads} threads, torch {where['torch']}{commit}{against}, {where['started']}: "
    return to_markdown("Operations and models on the CPU", subtitle + where["command"], page(rows), "figures")


def to_text(blocks: Sequence[Block]) -> str:
    """The page for a terminal."""
    return "\n\n".join(_block_text(block) for block in blocks)


def _block_text(block: Block) -> str:
    match block:
        case Heading(text=text):
            return text.upper()
        case Paragraph(text=text):
            return textwrap.fill(text, _WIDTH)
        case Items(items=items):
            return "\n".join(textwrap.fill(item, _WIDTH, initial_indent="* ", subsequent_indent="  ") for item in items)
        case Table():
            return "\n".join(_table_lines(block))
        case _:
            raise AssertionError(f"no text for {type(block).__name__}")


def _table_lines(table: Table) -> Iterator[str]:
    lines = [list(table.columns), *map(list, table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = {i for i in range(1, len(widths)) if all(row[i][:1] in "-0123456789" for row in table.rows)}
    for line in lines:
        cells = (c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        yield " ".join(cells).rstrip()
