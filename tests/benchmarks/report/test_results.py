import json
from pathlib import Path

import pytest
from crossover.benchmarks.report.results import (
    budget_checks,
    crossovers_of,
    load_comparison,
    load_run,
    quality,
    tokens_per_step,
)
from crossover.train.score import BITS_PER_BYTE

from ..fake_runs import (
    ACCURACY,
    SETTINGS,
    append_cells,
    append_line,
    cell,
    corpus,
    write_comparison,
    write_json,
    write_run,
)

pytestmark = pytest.mark.quick


def test_of_steps_recorded_twice_the_later_record_counts(tmp_path: Path) -> None:
    home = write_run(tmp_path, "mamba")
    before = len(load_run(home).curve())
    append_line(
        home / "metrics.jsonl", '{"step": 50, "tokens": 1, "seconds": 1, "val/loss": 1, "val/bits_per_byte": 9}\n'
    )
    curve = load_run(home).curve()
    assert len(curve) == before
    assert next(point for point in curve if point["step"] == 50)["val/bits_per_byte"] == 9


def test_runs_on_different_data_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "mamba")
    write_run(tmp_path, "transformer", digest="f00d" * 16)
    with pytest.raises(ValueError, match=r"trained on different data .*c0ffeec0ffee and f00df00df00d"):
        load_comparison(tmp_path)


def test_runs_of_different_scores_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "mamba")
    write_run(tmp_path, "transformer", score=ACCURACY)
    with pytest.raises(ValueError, match=r"mamba-s0 and transformer-s0 have different .*bits_per_byte and accuracy"):
        load_comparison(tmp_path)


def test_a_run_that_does_not_name_its_score_is_compared_by_bits_per_byte(tmp_path: Path) -> None:
    old, new = write_run(tmp_path / "old", "mamba"), write_run(tmp_path / "new", "mamba", score=BITS_PER_BYTE)
    assert load_run(old).score == load_run(new).score == BITS_PER_BYTE
    assert load_run(old).quality == load_run(new).quality is not None


def test_quality_is_that_of_the_score(tmp_path: Path) -> None:
    home = write_run(tmp_path, "mamba", score=ACCURACY)
    (row,) = quality(load_comparison(tmp_path))
    assert (row["score"], row["val_accuracy"], row["val_accuracy_std"]) == ("accuracy", load_run(home).quality, None)
    assert not [key for key in row if "bits" in key]


def test_different_objectives_are_an_unequal_budget(tmp_path: Path) -> None:
    write_comparison(tmp_path, archs=["transformer", "mamba"], seeds=1, score=ACCURACY)
    (check,) = [check for check in budget_checks(load_comparison(tmp_path)) if check.name == "objective"]
    assert (check.equal, check.statement) == (True, "invented, rate 0.15")
    path = tmp_path / "mamba-s0" / "run.json"
    write_json(path, json.loads(path.read_text()) | {"objective": {"kind": "another"}})
    (check,) = [check for check in budget_checks(load_comparison(tmp_path)) if not check.equal]
    assert (check.name, check.statement) == ("objective", "another; invented, rate 0.15")


def test_cells_with_different_settings_are_not_compared(tmp_path: Path) -> None:
    append_cells(tmp_path, cell("mamba", "train", 128))
    append_cells(tmp_path, cell("mamba", "train", 512, settings={**SETTINGS, "threads": 1}))
    with pytest.raises(ValueError, match="different settings"):
        load_comparison(tmp_path)


@pytest.mark.parametrize("name", ["compare.json", "mamba-s0/run.json", "mamba-s0/result.json", "context.jsonl"])
def test_a_file_of_a_newer_version_is_refused_in_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    path = write_comparison(tmp_path, archs=["mamba"], seeds=1, context=(128,)) / name
    first, *rest = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    for known in (None, 1):
        values = {key: value for key, value in json.loads(first).items() if key != "format"}
        path.write_text("\n".join([json.dumps(values | ({"format": known} if known else {})), *rest]) + "\n")
        load_comparison(tmp_path)
    path.write_text("\n".join([json.dumps(json.loads(first) | {"format": 7}), *rest]) + "\n")
    with pytest.raises(ValueError, match="has format 7, newer than the 1 that is read here: update") as refused:
        load_comparison(tmp_path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_a_folder_without_results_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.json"):
        load_comparison(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        load_comparison(tmp_path / "missing")


def test_a_later_cell_replaces_an_earlier_one(tmp_path: Path) -> None:
    append_cells(tmp_path, cell("mamba", "train", 128, status="failed"), cell("mamba", "train", 128, status="done"))
    assert [c.status for c in load_comparison(tmp_path).cells] == ["done"]


def test_quality_is_the_mean_over_finished_seeds(tmp_path: Path) -> None:
    write_run(tmp_path, "mamba", seed=0)
    write_run(tmp_path, "mamba", seed=1)
    write_run(tmp_path, "mamba", seed=2, status="failed")
    scores = [load_run(tmp_path / f"mamba-s{seed}").result["val_bits_per_byte"] for seed in (0, 1)]
    (row,) = quality(load_comparison(tmp_path))
    assert row["val_bits_per_byte"] == pytest.approx(sum(scores) / 2)
    assert row["val_bits_per_byte_std"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert (row["n_seeds"], row["status"]) == (2, "done, failed")


def test_an_architecture_whose_runs_all_failed_keeps_its_row(tmp_path: Path) -> None:
    write_run(tmp_path, "mamba", status="out_of_memory")
    (row,) = quality(load_comparison(tmp_path))
    assert (row["val_bits_per_byte"], row["n_seeds"], row["status"]) == (None, 0, "out_of_memory")


def test_equal_budgets_are_recognized(tmp_path: Path) -> None:
    checks = budget_checks(load_comparison(write_comparison(tmp_path)))
    assert all(check.equal for check in checks), [check for check in checks if not check.equal]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"n_params": 1_030_000}, "parameters"),
        ({"steps": 300}, "tokens"),
        ({"steps": 300}, "steps"),
        ({"seq_len": 256}, "data and its order"),
        ({"eval_tokens": 4096}, "held-out text"),
    ],
)
def test_an_unequal_budget_is_found(tmp_path: Path, change: dict[str, int], name: str) -> None:
    write_comparison(tmp_path, archs=["transformer", "mamba"], seeds=1)
    write_run(tmp_path, "mamba", **change)  # pyright: ignore[reportArgumentType]
    unequal = {check.name for check in budget_checks(load_comparison(tmp_path)) if not check.equal}
    assert name in unequal


def test_models_that_did_not_train_in_turns_at_equal_seconds_are_named(tmp_path: Path) -> None:
    write_comparison(tmp_path, archs=["transformer", "mamba", "lstm"], seeds=2)
    info = json.loads((tmp_path / "compare.json").read_text())
    write_json(tmp_path / "compare.json", info | {"config": info["config"] | {"equal": "seconds"}})
    together = {seed: [f"{arch}-s{seed}" for arch in ("transformer", "mamba", "lstm")] for seed in range(2)}
    turns = {name: [names] for names in together.values() for name in names}

    def checks() -> dict[str, tuple[bool, str]]:
        for name, stretches in turns.items():
            path = tmp_path / name / "run.json"
            found = [{"from_step": 0, "in_turns_with": names} for names in stretches]
            write_json(path, json.loads(path.read_text()) | {"stretches": found})
            result = json.loads((tmp_path / name / "result.json").read_text())
            write_json(tmp_path / name / "result.json", result | {"train_seconds": 60.0})
        return {c.name: (c.equal, c.statement) for c in budget_checks(load_comparison(tmp_path))}

    found = checks()
    assert found["turns"][0]
    assert found["training seconds"] == (True, "60 to 60")
    assert "tokens" not in found
    turns["mamba-s0"] = turns["lstm-s0"] = [together[0], together[0][1:]]  # went on when the first was done
    turns["lstm-s1"] = [["lstm-s1"]]  # later, when the others were done
    equal, statement = checks()["turns"]
    assert not equal
    assert statement.startswith("lstm-s1 did not train in turns with all others")


def test_another_schedule_is_an_unequal_budget_but_another_learning_rate_is_not(tmp_path: Path) -> None:
    write_comparison(tmp_path, archs=["transformer", "mamba"], seeds=1)
    path = tmp_path / "mamba-s0" / "run.json"
    info = json.loads(path.read_text())
    info["config"]["optim"]["schedule"] = "wsd"
    write_json(path, info)
    unequal = [check for check in budget_checks(load_comparison(tmp_path)) if not check.equal]
    assert [check.name for check in unequal] == ["optimizer and schedule"]
    assert "schedule" in unequal[0].statement


def test_out_of_memory_cells_decide_crossovers(tmp_path: Path) -> None:
    comparison = load_comparison(write_comparison(tmp_path, archs=["mamba", "lstm"], seeds=1))
    found = {(c.metric, c.a, c.b): c for c in crossovers_of(comparison)}
    assert found["training tokens/s", "lstm", "mamba"].verdict == "always"
    memory = found["peak training memory", "lstm", "mamba"]
    assert (memory.verdict, memory.context_len, memory.out_of_memory) == ("beyond", 8192, "lstm")


def test_a_failed_cell_says_nothing_about_speed(tmp_path: Path) -> None:
    append_cells(tmp_path, cell("mamba", "train", 128, status="failed"), cell("lstm", "train", 128, status="done"))
    speeds = [c for c in crossovers_of(load_comparison(tmp_path)) if c.metric == "training tokens/s"]
    assert speeds == []


def test_a_length_beyond_the_positions_of_a_model_says_nothing_about_it(tmp_path: Path) -> None:
    append_cells(tmp_path, *[cell(arch, "train", 128) for arch in ("transformer", "mamba")])
    append_cells(tmp_path, cell("transformer", "train", 512, status="beyond_positions"), cell("mamba", "train", 512))
    found = {(c.metric, c.a, c.b): c for c in crossovers_of(load_comparison(tmp_path))}
    crossing = found["training tokens/s", "mamba", "transformer"]
    assert crossing.verdict == "always"  # by the one length of both
    assert (crossing.context_len, crossing.out_of_memory) == (None, None)


def test_a_model_stopped_for_time_is_not_said_to_have_run_out_of_memory(tmp_path: Path) -> None:
    for arch, speed in (("lstm", 9.0), ("mamba", 5.0)):
        append_cells(tmp_path, cell(arch, "train", 128, tokens_per_second=speed, spread=(speed, speed)))
    append_cells(tmp_path, cell("lstm", "train", 512, status="timeout"))
    append_cells(tmp_path, cell("mamba", "train", 512, tokens_per_second=5.0, spread=(5.0, 5.0)))
    found = {(c.metric, c.a, c.b): c for c in crossovers_of(load_comparison(tmp_path))}
    crossing = found["training tokens/s", "lstm", "mamba"]
    assert (crossing.verdict, crossing.context_len) == ("beyond", 512)
    assert (crossing.out_of_memory, crossing.stopped_after) == (None, 300.0)


def test_labels_come_from_the_comparison_else_from_runs_and_cells_else_the_name_stands(tmp_path: Path) -> None:
    append_cells(tmp_path, cell("s4d", "train", 128, label="S4D of a cell"))
    assert load_comparison(tmp_path).label("s4d") == "S4D of a cell"
    assert load_comparison(tmp_path).label("retnet") == "retnet"
    write_run(tmp_path, "mamba")
    assert load_comparison(tmp_path).label("mamba") == "Mamba"
    write_json(tmp_path / "compare.json", {"labels": {"s4d": "S4D of the comparison"}})
    assert load_comparison(tmp_path).label("s4d") == "S4D of the comparison"


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ((64, 16), "8,192 tokens per step at every length"),
        ((16, 16), "2,048 to 8,192 tokens per step, depending on the length"),
    ],
)
def test_tokens_per_step_are_those_of_the_cells(batches: tuple[int, int], said: str, tmp_path: Path) -> None:
    for context_len, batch_size in zip((128, 512), batches, strict=True):
        append_cells(tmp_path, cell("mamba", "train", context_len, batch_size=batch_size))
    assert tokens_per_step(load_comparison(tmp_path)) == said


def test_references_come_from_the_corpus(tmp_path: Path) -> None:
    found = load_comparison(write_comparison(tmp_path, seeds=1)).corpus
    assert found is not None
    assert found["reference_bits_per_byte"] == corpus()["reference_bits_per_byte"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("run.json", {}, r"run\.json: arch is missing"),
        ("run.json", {"seed": "0"}, r"run\.json: seed='0' must be a whole number"),
        ("run.json", {"n_params": 0}, r"run\.json: n_params=0 must be at least 1"),
        ("run.json", {"corpus": {"digest": 7}}, r"run\.json: corpus\.name is missing"),
        ("run.json", {"score": {"name": "x"}}, r"run\.json: score\.unit, score\.words are missing"),
        ("run.json", {"config": [1]}, r"run\.json: config=\[1\] must be a table"),
        ("run.json", {"model": "x"}, r"run\.json: model='x' must be a table"),
        ("run.json", {"model": None}, r"run\.json: model is missing"),
        ("result.json", {"val_bits_per_byte": "x"}, r"result\.json: val_bits_per_byte='x' must be a number"),
        ("result.json", {"train_seconds": None}, r"result\.json: train_seconds is missing"),
        ("result.json", {"position_bits_per_byte": [{"start": 0}]}, r"position_bits_per_byte: stop is missing"),
        (
            "result.json",
            {"position_bits_per_byte": [{"start": 0, "stop": 1, "bits_per_byte": "x"}]},
            r"='x' must be a num",
        ),
        ("metrics.jsonl", {"step": 3, "val/bits_per_byte": "x"}, r"metrics\.jsonl, record \d+: tokens is missing"),
        ("metrics.jsonl", {"train/loss": 1}, r"metrics\.jsonl, record \d+: step is missing"),
        ("../context.jsonl", {"another": 1}, r"context\.jsonl, measurement 4: .* are missing"),
        ("../context.jsonl", {"context_len": 1.5}, r"context\.jsonl, measurement 4: context_len=1\.5 must be a whole"),
        ("../compare.json", {"config": 3}, r"compare\.json: config=3 must be a table"),
        ("../compare.json", {"failures": {"a": 1}}, r"compare\.json: failures\.a=1 must be text"),
    ],
)
def test_what_reports_read_is_checked_where_it_is_read(
    tmp_path: Path, name: str, change: dict[str, object], message: str
) -> None:
    path = write_comparison(tmp_path, archs=["mamba"], seeds=1, context=(128,)) / "mamba-s0" / name
    if path.suffix == ".jsonl":
        first = json.loads(path.read_text().split("\n")[0]) if "context_len" in change else {}
        append_line(path, json.dumps(first | change) + "\n")
    else:
        write_json(path, json.loads(path.read_text()) | change if change else {})
    with pytest.raises(ValueError, match=message) as refused:
        load_comparison(tmp_path)
    assert "\n" not in str(refused.value)


def test_what_a_file_may_leave_out_is_not_missed(tmp_path: Path) -> None:
    home = write_run(tmp_path, "mamba")
    info, result = (json.loads((home / name).read_text()) for name in ("run.json", "result.json"))
    info["config"]["optim"] = {}
    write_json(home / "run.json", {key: value for key, value in info.items() if key != "state_bytes"})
    write_json(home / "result.json", result | {"status": None})
    (row,) = quality(load_comparison(tmp_path))
    assert (row["state_bytes"], row["lr"], row["status"]) == (None, None, "unfinished")


def test_a_report_is_made_of_the_lines_of_a_log_that_are_whole(tmp_path: Path) -> None:
    home = write_run(tmp_path, "mamba")
    whole = load_run(home).metrics
    lines = (home / "metrics.jsonl").read_bytes().split(b"\n")
    (home / "metrics.jsonl").write_bytes(b"\n".join([*lines[:3], b"\0\0", b"7", b'{"st', *lines[3:]]))
    with pytest.warns(RuntimeWarning, match=r"metrics\.jsonl: 3 lines are \(the first is line 4\) damaged"):
        assert load_comparison(tmp_path).runs[0].metrics == whole
