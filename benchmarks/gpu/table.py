"""The findings of `benchmarks.gpu` as lines on a terminal and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..harness.format import number
from ..report.document import Block, Heading, Items, Paragraph, Table, to_markdown

__all__ = ["line_of", "markdown"]

_COLUMNS = (
    "operation",
    "size",
    "pass",
    "backend",
    "ms",
    "TB/s",
    "TFLOP/s",
    "% of floor",
    "floor is",
    "predicted, ms",
    "launch, ms",
    "others: ms (times ours)",
)
_MEANING = (
    "ms: median on the GPU with the caches emptied before, launches made ahead; launch: what the CPU takes for them. "
    "% of floor: the time that the bytes, matrix products or exponentials would take at the rates measured in this "
    "run, whichever is longest (floor is), over ours; 100 is perfect. Forward reads the inputs and writes the outputs; "
    "backward reads both and writes the gradients; more than that is no part of a floor. predicted: before anything "
    "was measured, for an H200. others: torch is our plain PyTorch backend; the factor says how many times longer they "
    "take."
)


def line_of(row: Mapping[str, Any]) -> str:
    """A row as one line of text."""
    kind = row["kind"]
    if kind == "machine":
        return "; ".join(f"{name} {value}" for name, value in row.items() if name not in ("kind", "provenance"))
    if kind == "limits":
        return _limits_line(row)
    if kind == "check":
        return " ".join(filter(None, ("check", row["op"], row["shape"], row["backend"], row["dtype"], _verdict(row))))
    cells = _cells(row)
    named = [f"{name} {cell}" for name, cell in zip(_COLUMNS[4:-1], cells[4:-1], strict=True) if cell != "-"]
    return " | ".join(filter(None, (" ".join(cells[:4]), "; ".join(named), cells[-1])))


def _verdict(row: Mapping[str, Any]) -> str:
    status = "FAILED" if row["status"] == "failed" else row["status"]
    return f"{status}: {row['reason']}" if row.get("reason") else status


def _limits_line(row: Mapping[str, Any]) -> str:
    if row["status"] != "ok":
        return f"limits {_verdict(row)}"
    named = (("copies", "bytes", "TB/s"), ("multiplies", "flops", "TFLOP/s"), ("takes", "exps", "T exponentials/s"))
    return ", ".join(f"{verb} {row[key] / 1e12:.2f} {unit}" for verb, key, unit in named if row[key] is not None)


def _cells(row: Mapping[str, Any]) -> list[str]:
    head = [row["op"], row["shape"], row.get("pass", "-"), row.get("backend", "-")]
    if row["status"] != "ok":
        return [*head, *"-" * 7, _verdict(row)]
    predicted = row["predicted_ms"]
    return [
        *head,
        number(row["ms"]),
        number(row["tb_per_second"]),
        number(row["tflop_per_second"]) if row["flops"] else "-",
        "-" if row["percent_of_floor"] is None else f"{row['percent_of_floor']:.0f}",
        row["floor_is"] or "-",
        "-" if predicted is None else " to ".join(map(number, predicted)),
        number(row["launch_ms"]),
        ", ".join(
            f"{who} {number(peer['ms'])} ({peer['ratio']:.2f}x)" for who, peer in row["peers"].items() if "ms" in peer
        ),
    ]


def markdown(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any], seconds: float) -> str:
    """The page: the machine, the table, the checks, and what took no part."""
    timed = [row for row in rows if row["kind"] == "time"]
    blocks: list[Block] = [
        Items(items=[line_of(row) for row in rows if row["kind"] in ("machine", "limits")]),
        Paragraph(text=_MEANING),
        Table(columns=_COLUMNS, rows=[_cells(row) for row in timed if row["status"] != "left out"]),
    ]
    if left := [f"{row['op']}, {row['shape']}: {row['reason']}" for row in timed if row["status"] == "left out"]:
        blocks += [Heading(text="What was left out"), Items(items=left)]
    blocks += [Heading(text="Checks"), *_checks([row for row in rows if row["kind"] == "check"])]
    absent: dict[str, None] = {}  # once where equal, in order
    for row in timed:
        for who, peer in row.get("peers", {}).items():
            if "absent" in peer:
                absent.setdefault(f"{row['op']}, {who}: {peer['absent']}")
    if absent:
        blocks += [Heading(text="Who took no part"), Items(items=list(absent))]
    command = where["command"]
    commit = f", commit {where['git_commit'][:12]}" if where.get("git_commit") else ""
    return to_markdown("Kernels on the GPU", f"{command}: {seconds:.0f} seconds{commit}", blocks, "figures")


def _checks(checks: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Counts the checks by status and lists every one that did not end well."""
    counts: dict[str, int] = {}
    for check in checks:
        counts[check["status"]] = counts.get(check["status"], 0) + 1
    summary = ", ".join(f"{n} {status}" for status, n in counts.items()) or "none"
    meaning = (
        "An operation in a precision against its float64 definition, with poisoned memory and repeats that agree in "
        "every bit; and at the sizes that are timed, with a size here, against plain PyTorch."
    )
    bad = [line_of(check).removeprefix("check ") for check in checks if check["status"] != "ok"]
    return [Paragraph(text=f"{summary}. {meaning}"), *([Items(items=bad)] if bad else [])]
