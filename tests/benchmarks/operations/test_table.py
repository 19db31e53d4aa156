"""What the page of `crossover bench kernels` says first."""

from typing import Any

import pytest
from crossover.benchmarks.operations.contestants import BEFORE, OURS
from crossover.benchmarks.operations.profiles import KINDS
from crossover.benchmarks.operations.table import behind, line_of, markdown, page, to_text

pytestmark = pytest.mark.quick


def operation(**ratios: float) -> dict[str, Any]:
    row = {"op": "norm", "shape": "T=8", "pass": "fwd", "threads": 1, "backend": "cpu", "skipped": {"peer": "too slow"}}
    bound = {"bound": {"seconds": 1e-3, "by": "bytes"}, "times_bound": 2.5}
    return {"kind": "operation", **row, **bound, "seconds": {"ours": 2.5e-3}, "ratios": ratios}


def training(quartiles: tuple[float, float] = (1.0, 2.0), errors: Any = (), **ratios: float) -> dict[str, Any]:
    row = {"kind": "training", "arch": "mamba", "n_params": 1_000_000, "seq_len": 512, "batch_size": 8, "threads": 2}
    found = {OURS: 0.5} | {name: 0.5 * ratio for name, ratio in ratios.items()}
    return {**row, "seconds": found, "ratios": ratios, "quartiles": {BEFORE: quartiles}, "errors": dict(errors)}


def decoding(times: float, products: float = 0.125, **ratios: float) -> dict[str, Any]:
    row = {"kind": "decoding", "arch": "lstm", "n_params": 30_000_000, "threads": 1, "context_len": 64, "errors": {}}
    facts = {OURS: {"decode": "compiled"}, "floor": {"weights": 2 << 20, "state": 1 << 20}}
    ratios |= {"floor": 1 / times, "torch.mv": products}
    seconds = {OURS: 0.01} | {name: 0.01 * ratio for name, ratio in ratios.items()}
    return {**row, "seconds": seconds, "ratios": ratios, "quartiles": {}, "facts": facts, "times_floor": times}


def profile(before: dict[str, float] | None = None, **shares: float) -> dict[str, Any]:
    row = {"kind": "profile", "arch": "mamba", "n_params": 1_000_000, "seq_len": 512, "batch_size": 8, "threads": 1}
    kinds = dict.fromkeys(KINDS, 0.0)
    found = {OURS: {**kinds, **shares}} | ({} if before is None else {BEFORE: {**kinds, **before}})
    names = {"aten::mm": shares["products"], "aten::cat": shares["copies"] - 0.01, "aten::fill_": 0.01}
    return {**row, "seconds": {OURS: 0.5}, "ratios": {}, "kinds": found, "names": {OURS: names}, "errors": {}}


def test_what_is_no_product_and_takes_more_than_a_twentieth_of_a_step_is_behind() -> None:
    (said,) = behind([profile(products=0.8, copies=0.061, norms=0.05)])
    assert said.startswith(
        "profile mamba, 1 M at 512 tokens, 1 thread: 6.1 % of a step is copies, and should be 5.0 at most"
    )
    assert said.endswith("(aten::cat 5.1, aten::fill_ 1.0)")


def test_shares_stand_beside_those_of_before_and_what_has_no_kind_under_its_name() -> None:
    row = profile({"products": 0.5, "copies": 0.2}, products=0.7, copies=0.04, **{"aten::new": 0.012, "tiny": 1e-5})
    table = to_text(page([row])).split("WHAT A TRAINING STEP SPENDS ITS TIME ON")[1]
    for words in ("50.0 -> 70.0", "20.0 -> 4.0", "aten::new 1.2"):
        assert words in table
    assert "tiny" not in table
    (line,) = [line for line in to_text(page([profile(products=0.7, copies=0.04)])).split("\n") if "70.0" in line]
    assert "->" not in line


def test_every_peer_that_is_faster_and_every_goal_that_is_missed_is_behind_the_worst_first() -> None:
    rows = [
        operation(torch=0.8, compiled=1.01),
        training(HF=1.05, plain=1.2),
        decoding(6.0, HF=0.7),
        training(quartiles=(0.5, 0.9), before=0.75),
    ]
    assert behind(rows) == [
        "decoding lstm, 30 M, 1 thread: takes 6.0 times its floor, and should take 1.5",
        "decoding lstm, 30 M, 1 thread: HF takes 0.70 times as long as ours",
        "training mamba, 1 M at 512 tokens, 2 threads: ours took 0.75 times as long before",
        "norm T=8, fwd, 1 thread: torch takes 0.80 times as long as ours",
        "training mamba, 1 M at 512 tokens, 2 threads: HF takes 1.05 times as long as ours, and should take 1.1",
    ]


def test_a_token_may_take_as_long_as_its_matrix_products_call_by_call_where_they_take_longer_than_reading() -> None:
    assert behind([decoding(6.0, products=0.7)]) == []
    (said,) = behind([decoding(6.0, products=0.5)])
    assert said == "decoding lstm, 30 M, 1 thread: takes 2.0 times what torch.mv takes, and should take 1.5"


def test_what_is_level_with_before_within_its_turns_is_not_behind() -> None:
    rows = [operation(torch=1.0), training(quartiles=(0.8, 1.1), before=0.95, HF=1.1), decoding(1.5, HF=1.0)]
    assert behind(rows) == []
    assert to_text(page(rows)).startswith("BEHIND\n\n* nothing\n")


def test_the_page_says_all_in_text_and_in_markdown() -> None:
    rows = [
        {"kind": "limits", "threads": 1, "exps": 7e9, "flops": 9e10, "read": {"1024": 1e11}, "copy": {"1024": 5e10}},
        {"kind": "absent", "peers": ["mambapy"], "install": ["pip install mambapy"]},
        operation(torch=3.0),
        training(errors={"HF Mamba": "no answer within 30 s at 512 tokens"}, plain=1.5),
        training(errors={"HF Mamba": "no answer within 30 s at 512 tokens"}, plain=1.5),
        decoding(1.2, products=0.5),
    ]
    text = to_text(page(rows))
    for words in (
        "* 1 thread: 7 G exponentials a second; 90 GFLOP/s in products; GB/s read: 100 at 1 KiB;",
        "lstm        30 M       1       10 compiled 3 MiB      8.33    1.20    0.50x    -      -",
        "norm      T=8  fwd        1      2.5 cpu     3.00x        -          -    - bytes     2.5",
        "* not measured: mambapy (pip install mambapy)",
        "* norm T=8, fwd, 1 thread: peer too slow",
    ):
        assert words in text
    assert text.count("training mamba, HF Mamba: no answer within 30 s at 512 tokens") == 1
    where = dict.fromkeys(("cpu", "torch", "started", "command"), "x") | {"git_commit": "abc", "against": "def"}
    written = markdown(rows, where, 2)
    assert written.index("## Behind") < written.index("## Training steps of whole models")
    assert "before is def" in written


def test_a_row_is_a_line_as_it_is_measured() -> None:
    assert line_of(operation(torch=3.0)) == "norm T=8, fwd, 1 thread: 2.5 ms; torch 3.00x; 2.5 times its bound"
    assert line_of({**training(), "seconds": {}}).endswith("2 threads: nothing was measured")
