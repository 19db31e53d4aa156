import json
import subprocess
import threading
import warnings
from pathlib import Path

import pytest
import torch
from crossover.files import read_json_lines
from crossover.train import record
from crossover.train.board import Board
from crossover.train.record import MetricsLog, provenance
from crossover.train.score import BITS_PER_BYTE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

pytestmark = pytest.mark.quick


def training(step: int) -> dict[str, float]:
    return {"step": step, "tokens": step * 8, "train/loss": 1 / step, "perf/tokens_per_second": 10.0 * step}


def board(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory / "tb"))
    events.Reload()
    return events


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(directory).Scalars(tag)]


def test_a_line_is_in_the_file_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2):
        log.append(training(step))
        assert read_json_lines(tmp_path / "metrics.jsonl")[-1] == training(step)
    log.close()


def test_tensorboard_shows_the_recorded_values_under_the_same_tags(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.append(training(1))
    log.append(training(4))
    log.append({"step": 4, "tokens": 32, "val/bits_per_byte": 2.5})
    log.append({"step": 4, "sample": "def f():\n    pass"})
    log.close()
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (4, 0.25)]
    assert scalars(tmp_path, "val/bits_per_byte") == [(4, 2.5)]
    recorded = {tag for tag in board(tmp_path).Tags()["scalars"] if not tag.startswith("vs_")}
    assert recorded == {"train/loss", "perf/tokens_per_second", "val/bits_per_byte"}
    assert "custom_scalars__config__" in board(tmp_path).Tags()["tensors"]
    (text,) = board(tmp_path).Tensors("sample/text_summary")
    assert b"def f():\n        pass" in text.tensor_proto.string_val[0]


def test_options_and_metrics_are_on_the_page_of_hyperparameters_of_the_run_itself(tmp_path: Path) -> None:
    used = {"arch": "mamba", "optim.lr": 1e-3, "optim.betas": [0.9, 0.95], "train.steps": 7}
    options = used | {"x": None, "model.set": [], "name": "", "out": "y", "train.threads": 2}
    home = tmp_path / "tb/mamba-s0"
    log = MetricsLog(tmp_path, board=home, options=options)
    log.append({"step": 7, "tokens": 32, "val/bits_per_byte": 2.5})
    log.finish({"tokens_per_second": 50.0, "train_seconds": 2.0, "train_flops": None})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl", "tb"]
    assert [path.is_file() for path in home.iterdir()] == [True]  # no run inside the run
    events = EventAccumulator(str(home)).Reload()
    found = events.SummaryMetadata

    def content(tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(found(f"_hparams_/{tag}").plugin_data.content)

    values = content("session_start_info").session_start_info.hparams
    shown = {key: value.string_value or value.number_value for key, value in values.items()}
    assert shown == {"arch": "mamba", "optim.lr": 1e-3, "optim.betas": "[0.9, 0.95]", "train.steps": 7.0}
    page = content("experiment").experiment
    assert {info.name for info in page.hparam_infos if info.differs} == {"arch", "optim.lr"}  # which are shown unasked
    metrics = {info.name.tag for info in page.metric_infos}
    assert {"val/bits_per_byte", "train/loss", "perf/mean_tokens_per_second"} <= metrics
    final = {tag: events.Scalars(tag)[-1] for tag in events.Tags()["scalars"] if tag.startswith("perf/")}
    assert {tag: (event.step, event.value) for tag, event in final.items()} == {
        "perf/mean_tokens_per_second": (7, 50.0), "perf/train_seconds": (7, 2.0),
    }  # fmt: skip
    assert content("session_end_info").HasField("session_end_info")


def test_loss_and_score_are_read_at_equal_budgets_also_after_a_resume(tmp_path: Path) -> None:
    def spent(step: int) -> dict[str, float]:
        return {"step": step, "tokens": step * 4000, "seconds": step * 2.2}

    log = MetricsLog(tmp_path, flops_per_token=1e6)
    for step in (1, 2, 3):
        log.append(spent(step) | {"train/loss": 1 / step, "train/lr": 0.1})
    log.append(spent(2) | {"val/bits_per_byte": 2.5})
    log.close()
    log = MetricsLog(tmp_path, first_step=2, flops_per_token=1e6)
    log.append(spent(4) | {"train/loss": 0.25})
    log.close()
    losses = (1.0, 0.5, 0.25)
    for budget, steps in {"tokens": (4000, 8000, 16000), "gflops": (4, 8, 16), "seconds": (2, 4, 9)}.items():
        assert scalars(tmp_path, f"vs_{budget}/train_loss") == list(zip(steps, losses, strict=True))
        assert scalars(tmp_path, f"vs_{budget}/val_bits_per_byte") == [(steps[1], 2.5)]
    assert len([tag for tag in board(tmp_path).Tags()["scalars"] if tag.startswith("vs_")]) == 6


def test_resuming_drops_what_was_recorded_beyond_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.append(training(step))
    log.close()
    log = MetricsLog(tmp_path, first_step=2)
    log.append(training(3) | {"train/loss": 9.0})
    log.close()
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_a_new_run_in_an_old_directory_starts_an_empty_record(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.append(training(5))
    log.close()
    MetricsLog(tmp_path).close()
    assert read_json_lines(tmp_path / "metrics.jsonl") == []


def test_a_failure_of_tensorboard_warns_once_and_the_record_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tb").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="no more TensorBoard events"):
        log = MetricsLog(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.append(training(1))
        log.append(training(2))
        log.close()
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_disk_that_fills_up_ends_tensorboard_only_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    full, original, n_threads = Path("/dev/full"), Path.open, threading.active_count()
    log = MetricsLog(tmp_path)
    log._board._writer = RecordWriter(full.open("wb"))
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        log.append(training(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.append(training(2))
        log.close()
    monkeypatch.setattr(Path, "open", lambda path, mode: original(full if "tfevents" in path.name else path, mode))
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        Board(tmp_path / "tb", BITS_PER_BYTE, {}).close()
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 2
    assert threading.active_count() == n_threads
    assert capfd.readouterr() == ("", "")


def test_numbers_that_json_lacks_are_never_recorded(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        log.append({"step": 1, "train/loss": float("nan")})
    log.close()


def test_code_that_no_commit_has_is_told_from_results_that_none_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_dirty() -> bool | None:
        return provenance(torch.device("cpu"), ["crossover"])["git_dirty"]

    monkeypatch.setattr(record, "__file__", str(tmp_path / "train" / "record.py"))
    (tmp_path / "train").mkdir()
    (tmp_path / "results").mkdir()
    assert is_dirty() is None
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "results" / "result.json").touch()
    assert is_dirty() is False
    (tmp_path / "new.py").touch()
    assert is_dirty() is True


def test_provenance_names_code_command_versions_and_machine_but_not_the_host() -> None:
    import platform

    found = provenance(torch.device("cpu"), ["crossover", "train", "--name", "two words"])
    assert found["command"] == "crossover train --name 'two words'"
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert {"git_commit", "git_dirty", "python", "platform", "cpu", "device", "started"} <= set(found)
    assert platform.node() not in json.dumps({**found, "platform": ""})
