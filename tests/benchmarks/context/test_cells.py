import dataclasses
import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from crossover.archs import LanguageModel, ModelConfig, available, build, configure
from crossover.benchmarks.cli import main
from crossover.benchmarks.comparison.compare import bench_context
from crossover.benchmarks.context import cells as context
from crossover.benchmarks.context.cell import Cell, read_cells
from crossover.benchmarks.context.cells import cause_of_death, cell_tasks, measure_cells, reusable_cells
from crossover.benchmarks.context.jobs import BASIC_PHASES, PHASES, ContextJob, context_jobs, default_memory_limit
from crossover.benchmarks.context.measure import Bench
from crossover.benchmarks.context.options import ContextConfig, MeasureConfig
from crossover.benchmarks.harness.folder import append_jsonl
from crossover.benchmarks.harness.processes import Child
from crossover.benchmarks.harness.progress import Progress, Schedule
from crossover.benchmarks.harness.sizes import size_arch
from crossover.train.runtime import PeakMemory, Precision

from ..scripts import Script

FP32 = Precision("fp32", "for the test")


def job(
    arch: str = "transformer", context_len: int = 32, model: dict[str, Any] | None = None, **measure: Any
) -> ContextJob:
    measure = {"tokens_per_batch": 64, "memory_limit": 3 * 2**30, **measure}
    options = {"time_box": 0.02, "min_repeats": 2, "decode_tokens": 2, **measure}
    model = configure(arch, d_model=32, n_layers=8 if arch == "jamba" else 1, **model or {}).to_dict()
    return ContextJob(
        arch=arch,
        label=arch.capitalize(),
        context_len=context_len,
        model=model,
        n_params=1,
        n_active_params=1,
        measure=MeasureConfig(**options),
        precision="fp32",
        device="cpu",
        threads=1,
        provenance={"cpu": "this one", "device": "cpu", "torch": "2.9", "git_commit": "0123456789abcdef"},
    )


def measure(jobs: list[ContextJob], folder: Path, stream: io.StringIO | None = None) -> list[Cell]:
    progress = Progress(Schedule(cell_tasks(jobs)), stream=stream or io.StringIO())
    measure_cells(jobs, folder / "context.jsonl", progress, logs=folder)
    # on a busy machine a cell is there twice
    return list({cell.key: cell for cell in read_cells(folder / "context.jsonl")}.values())


def write(folder: Path, cell: Cell) -> None:
    append_jsonl(folder / "context.jsonl", cell.to_dict())


def play(monkeypatch: pytest.MonkeyPatch, *scripts: Script) -> None:
    """Lets the workers be these scripts instead, one after the other."""
    left = list(scripts)
    monkeypatch.setattr(context, "Child", lambda work, order, log, preload: Child(left.pop(0), order, log=log))


def worker(*phases: str, end: str = "", **found: Any) -> Script:
    """A worker that says of these phases what was found, by default that they are done, and then ends like this."""
    found = found or {"status": "done", "tokens_per_second": 1.0}
    return Script("job, *_ = order", *(f"parent.send(job.cell({phase!r}, **{found}))" for phase in phases), end)


@pytest.mark.slow
def test_a_measured_cell_has_plausible_values(tmp_path: Path) -> None:
    cells = measure([job()], tmp_path)
    assert [cell.phase for cell in cells] == list(BASIC_PHASES)
    for cell in cells:
        assert (cell.status, cell.error) == ("done", None)
        assert cell.spread is not None
        assert cell.tokens_per_second is not None
        low, high = cell.spread
        assert 0 < low <= cell.tokens_per_second <= high
        assert (cell.repeats or 0) >= 2
        assert cell.peak_method
        assert cell.backend["decode"] == ["compiled"] if cell.phase == "decode" else "attention" in cell.backend
        assert (cell.dtype, cell.settings["time_box"], cell.model) == ("fp32", 0.02, job().model)
    train = cells[-1]
    n_params = build(ModelConfig.from_dict(job().model), device="meta").n_params
    assert train.peak_bytes is not None
    assert train.state_bytes is not None
    assert train.peak_bytes >= 4 * n_params  # float32
    assert train.batch_size == 2
    # keys and values of 32 tokens, float32, in one layer of width 32, and a few counters
    assert 32 * 32 * 2 * 4 <= train.state_bytes <= 32 * 32 * 2 * 4 + 1024


@pytest.mark.quick
def test_memory_that_runs_out_is_a_recorded_point_and_the_other_phases_are_measured(tmp_path: Path) -> None:
    # A training batch of 2^25 tokens needs 4 GiB for the first activation alone.
    cells = measure([job(context_len=64, tokens_per_batch=2**25, memory_limit=2**29)], tmp_path)
    assert [cell.status for cell in cells] == ["done", "done", "out_of_memory"]
    assert cells[-1].tokens_per_second is None
    assert "allocate" in (cells[-1].error or "")
    assert cells[-1].batch_size == 2**25 // 64
    assert cells[-1].state_bytes == cells[0].state_bytes  # does not need the memory to be known


def test_what_lies_beyond_learned_positions_is_recorded_without_being_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2 = {"max_positions": 33}
    # decoding 2 tokens after 32 is the only phase at 32 tokens that needs 34, and at 64 tokens nothing fits
    play(monkeypatch, worker("prefill", "train"))
    jobs = [job("gpt2", 32, gpt2), job("gpt2", 64, gpt2)]
    progress = Progress(Schedule(cell_tasks(jobs)), stream=io.StringIO())
    assert measure_cells(jobs, tmp_path / "context.jsonl", progress, logs=tmp_path) == []
    cells = read_cells(tmp_path / "context.jsonl")
    assert [(cell.context_len, cell.phase, cell.status) for cell in cells] == [
        (32, "decode", "beyond_positions"), (32, "prefill", "done"), (32, "train", "done"),
        *[(64, phase, "beyond_positions") for phase in BASIC_PHASES],
    ]  # fmt: skip
    assert cells[0].error == "34 tokens are beyond its 33 positions"
    assert measure(jobs, tmp_path) == cells  # and not tried again


@pytest.mark.parametrize("n_positions", [98, 97])
def test_the_positions_that_a_length_is_said_to_need_are_those_it_needs(n_positions: int, tmp_path: Path) -> None:
    gpt2 = job("gpt2", 96, {"max_positions": n_positions}, tokens_per_batch=96, decode_tokens=2)
    statuses = [cell.status for cell in measure([gpt2], tmp_path)]
    assert statuses == ["done" if n_positions == 98 else "beyond_positions", "done", "done"]


@pytest.mark.parametrize("arch", available("seq2seq"))
def test_a_model_of_two_texts_is_refused_before_anything_is_measured(
    arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "context", "--archs", "lstm", arch, "--params", "300k", "--context", "16", "--out", str(tmp_path)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"leave {arch} out of --archs" in error
    assert not (tmp_path / "context.jsonl").exists()


def test_cells_are_not_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for phase in BASIC_PHASES:
        write(tmp_path, job().cell(phase, status="done", tokens_per_second=1.0))
    play(monkeypatch)  # a worker would be one too many
    assert len(measure([job()], tmp_path)) == 3


def test_failed_cells_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for phase in BASIC_PHASES:
        status = "failed" if phase == "train" else "out_of_memory"
        write(tmp_path, job().cell(phase, status=status))
    play(monkeypatch, worker("train", status="done", tokens_per_second=5.0))
    assert measure([job()], tmp_path)[-1].tokens_per_second == 5.0


def test_a_disturbed_cell_is_measured_once_more_by_another_process_and_then_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = worker("decode", status="done", tokens_per_second=1.0, disturbed=True).text
    again = {"status": "done", "tokens_per_second": 3.0, "disturbed": True}
    play(monkeypatch, Script(first, worker(*BASIC_PHASES[1:]).text), worker("decode", **again))
    cells = measure([job()], tmp_path)
    assert [(cell.phase, cell.tokens_per_second, cell.disturbed) for cell in cells] == [
        ("decode", 3.0, True), ("prefill", 1.0, False), ("train", 1.0, False),
    ]  # fmt: skip
    assert measure([job()], tmp_path) == cells  # a worker would be one too many


def test_a_cell_that_was_disturbed_before_a_stop_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for phase in BASIC_PHASES:
        write(tmp_path, job().cell(phase, status="done", tokens_per_second=1.0, disturbed=phase == "train"))
    play(monkeypatch, worker("train", status="done", tokens_per_second=7.0))
    assert [cell.tokens_per_second for cell in measure([job()], tmp_path)] == [1.0, 1.0, 7.0]


def test_repeats_are_measured_in_rounds_of_all_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [size_arch(arch, n_params=60_000, vocab_size=64, seq_len=16) for arch in ("transformer", "lstm")]
    options = {"precision": "fp32", "device": "cpu", "threads": 1, "provenance": job().provenance}
    jobs = context_jobs(sizes, (16, 48), measure=MeasureConfig(), phases=["decode", "train"], repeats=3, **options)
    assert len({made.name for made in jobs}) == len(jobs) == 12
    order = []

    def run(job: ContextJob, phases: list[str], progress: Progress, keep: Any, **_: object) -> None:
        order.append((job.repeat, job.context_len, job.arch))
        for phase in phases:
            lost = phase == "train" and job.arch == "transformer" and job.context_len == 48
            found = {"status": "out_of_memory"} if lost else {"status": "done", "tokens_per_second": 1.0 + job.repeat}
            keep(job.cell(phase, **found))

    monkeypatch.setattr(context, "_run_worker", run)
    cells = measure(jobs, tmp_path)
    assert order == [(r, length, arch) for r in range(3) for length in (16, 48) for arch in ("transformer", "lstm")]
    assert [cell.repeat for cell in cells if cell.status == "out_of_memory"] == [0]  # and not tried again
    assert len(cells) == 2 * 2 * 2 * 3 - 2
    assert measure(jobs, tmp_path) == cells
    assert len(order) == 12


def test_a_phase_that_takes_too_long_is_a_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, worker(end="time.sleep(60)"), worker(*BASIC_PHASES[1:]))
    cells = measure([job(timeout=0.8)], tmp_path)
    assert [cell.status for cell in cells] == ["timeout", "done", "done"]
    assert cells[0].error == "stopped after 0.8 s"


def test_what_a_library_prints_in_a_worker_hurts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, Script("print('hello', flush=True)", "os.system('echo hello')", worker(*BASIC_PHASES).text))
    cells = measure([job()], tmp_path)
    assert [(cell.phase, cell.status) for cell in cells] == [(phase, "done") for phase in BASIC_PHASES]
    assert (tmp_path / "context-transformer-32.log").read_text() == "hello\nhello\n"


def test_a_worker_that_crashes_or_goes_without_a_word_fails_one_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = worker(end="os.kill(os.getpid(), signal.SIGSEGV)")
    goes = worker(end="print('good bye')")
    play(monkeypatch, crash, goes, worker("train"))
    assert [(cell.status, cell.error) for cell in measure([job()], tmp_path)] == [
        ("failed", "ended by SIGSEGV"), ("failed", "good bye (ended with code 0)"), ("done", None),
    ]  # fmt: skip


def test_a_worker_that_has_said_everything_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, worker(*BASIC_PHASES, end="time.sleep(60)"))
    assert [cell.status for cell in measure([job(timeout=1.0)], tmp_path)] == ["done"] * 3


def test_a_worker_that_fails_leaves_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, *[worker(end="sys.exit('no such thing')")] * 3)
    cells = measure([job()], tmp_path)
    assert {(cell.status, cell.error) for cell in cells} == {("failed", "no such thing (ended with code 1)")}
    log = tmp_path / "context-transformer-32.log"
    assert log.read_text().splitlines() == ["no such thing"] * 3


def test_every_job_has_its_own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, *(Script(f"print({word!r}, flush=True)", worker(*BASIC_PHASES).text) for word in ("one", "two")))
    measure([job(context_len=16), job(context_len=32)], tmp_path)
    logs = {path.name: path.read_text().strip() for path in tmp_path.glob("*.log")}
    assert logs == {"context-transformer-16.log": "one", "context-transformer-32.log": "two"}


def test_the_last_words_of_one_worker_are_not_taken_for_those_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = worker(end="os.kill(os.getpid(), signal.SIGSEGV)")
    play(monkeypatch, worker(end="sys.exit('MemoryError')"), crash, worker("train"))
    assert [cell.status for cell in measure([job()], tmp_path)] == ["out_of_memory", "failed", "done"]


def test_failed_cells_are_returned_and_results_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"decode": "out_of_memory", "prefill": "timeout", "train": "failed"}
    lines = (worker(phase, status=status, error="no such thing").text for phase, status in found.items())
    play(monkeypatch, Script(*lines))
    progress = Progress(Schedule(cell_tasks([job()])), stream=io.StringIO())
    (failed,) = measure_cells([job()], tmp_path / "context.jsonl", progress, logs=tmp_path)
    assert (failed.name, failed.reason) == ("Transformer at 32 tokens, train", "no such thing")
    assert failed.log.exists()


def test_a_failed_cell_fails_the_command_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = {"repeats": 3, "peak_bytes": 1, "peak_method": "m", "state_bytes": 1, "batch_size": 1}
    done = worker(*BASIC_PHASES[:2], status="done", tokens_per_second=1.0, spread=(1.0, 1.0), **numbers)
    play(monkeypatch, Script(done.text, worker("train", status="failed", error="no such thing").text))
    config = ContextConfig(archs=("transformer",), params=60_000, context=(32,), repeats=1, out=tmp_path, threads=1)
    assert bench_context(config, command=["crossover"]) == 1
    assert "Transformer at 32 tokens, train: failed: no such thing" in capsys.readouterr().err
    assert json.loads((tmp_path / "compare.json").read_text())["labels"] == {"transformer": "Transformer"}
    assert {cell.settings["tokens_per_batch"] for cell in read_cells(tmp_path / "context.jsonl")} == {32}


class _Impatient(Progress):
    """A user who presses Ctrl-C as soon as prefill begins."""

    def update(self, name: str, fraction: float, detail: str) -> None:
        super().update(name, fraction, detail)
        if detail == "prefill":
            raise KeyboardInterrupt


def test_ctrl_c_keeps_the_phases_that_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, worker("decode", end="time.sleep(60)"))
    progress = _Impatient(Schedule(cell_tasks([job()])), stream=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        measure_cells([job()], tmp_path / "context.jsonl", progress, logs=tmp_path)
    assert [cell.phase for cell in read_cells(tmp_path / "context.jsonl")] == ["decode"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("returncode", "last_words", "status"),
    [
        (-signal.SIGKILL, "", "failed"),
        (-signal.SIGABRT, "terminate called after throwing an instance of 'std::bad_alloc'", "out_of_memory"),
        (1, "RuntimeError: DefaultCPUAllocator: can't allocate memory", "out_of_memory"),
        (-signal.SIGSEGV, "", "failed"),
        (1, "ValueError: no", "failed"),
    ],
)
def test_causes_of_death_are_told_apart(returncode: int, last_words: str, status: str) -> None:
    assert cause_of_death(returncode, last_words)["status"] == status
    assert cause_of_death(returncode, last_words, ran_out=True)["status"] == "out_of_memory"


@pytest.mark.parametrize(("ran_out", "status"), [(True, "out_of_memory"), (False, "failed")])
def test_a_killed_worker_measured_nothing_unless_the_system_lacked_memory(
    ran_out: bool, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context.MemoryKills, "explain_one", lambda self: ran_out)
    play(monkeypatch, worker("decode", end="os.kill(os.getpid(), signal.SIGKILL)"), worker("train"))
    cells = measure([job()], tmp_path)
    assert [(cell.phase, cell.status) for cell in cells] == [("decode", "done"), ("prefill", status), ("train", "done")]


@pytest.mark.quick
def test_a_comparison_is_extended_by_a_longer_context_with_the_settings_it_has(tmp_path: Path) -> None:
    sizes = [size_arch("lstm", n_params=60_000, vocab_size=64, seq_len=16)]
    provenance = {"cpu": "c", "device": "cpu", "torch": "t", "git_commit": None}

    def jobs(*lengths: int, measure: MeasureConfig = MeasureConfig()) -> list[ContextJob]:  # noqa: B008
        path = tmp_path / "context.jsonl"
        options = {"precision": "fp32", "device": "cpu", "threads": 1, "provenance": provenance}
        made = context_jobs(sizes, lengths, measure=measure, before=read_cells(path), **options)
        reusable_cells(path, made)
        return made

    write(tmp_path, jobs(16, 40, measure=MeasureConfig(memory_limit=2**30))[0].cell("train", status="done"))
    (_, _, longer) = jobs(16, 40, 90)
    assert (longer.measure.tokens_per_batch, longer.measure.memory_limit) == (40, 2**30)
    lm, cpu = LanguageModel(ModelConfig.from_dict(longer.model)), torch.device("cpu")
    bench = Bench.of(lm, 90, longer.measure, device=cpu, precision=FP32, memory=PeakMemory(cpu))
    assert bench.train().batch_size == 1
    with pytest.raises(ValueError, match="another tokens_per_batch; give the same options"):
        jobs(16, 90, measure=MeasureConfig(tokens_per_batch=90))


def test_memory_is_limited_to_three_gib_on_the_cpu_and_to_what_is_free_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * 2**30, 80 * 2**30))
    assert default_memory_limit(torch.device("cpu")) == 3 * 2**30
    assert default_memory_limit(torch.device("cuda")) == 70 * 2**30


def test_jobs_are_made_from_sizes_lengths_and_settings() -> None:
    sizes = [size_arch(arch, n_params=60_000, vocab_size=64, seq_len=16) for arch in ("transformer", "mamba")]
    provenance = {"cpu": "c", "device": "cpu", "torch": "t", "git_commit": None, "command": "crossover compare"}
    measure = MeasureConfig()
    jobs = context_jobs(
        sizes, (16, 64), measure=measure, precision="bf16", device="auto", threads=3, provenance=provenance
    )
    assert [(job.arch, job.context_len) for job in jobs] == [
        ("transformer", 16), ("mamba", 16), ("transformer", 64), ("mamba", 64)
    ]  # fmt: skip
    for found in jobs:
        assert ModelConfig.from_dict(found.model) in [size.config for size in sizes]
        assert found.measure == dataclasses.replace(measure, tokens_per_batch=64, memory_limit=3 * 2**30)
        assert found.precision == "bf16"
        assert (found.threads, found.device != "auto", "command" in found.provenance) == (3, True, False)
        assert json.loads(json.dumps(found.settings)) == found.settings


@pytest.mark.quick
def test_measurements_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path, job(time_box=9.0).cell("train", status="done"))
    with pytest.raises(ValueError, match="another time_box; give the same options, another --out, or --fresh"):
        reusable_cells(tmp_path / "context.jsonl", [job()])


def test_measurements_of_another_model_are_not_reused(tmp_path: Path) -> None:
    other = {**job().model, "d_model": 64}
    write(tmp_path, dataclasses.replace(job(), model=other).cell("train", status="done"))
    with pytest.raises(ValueError, match="another model"):
        reusable_cells(tmp_path / "context.jsonl", [job()])


@pytest.mark.parametrize("key", ["cpu", "torch"])
def test_measurements_of_another_machine_or_torch_are_not_mixed(key: str, tmp_path: Path) -> None:
    other = dataclasses.replace(job(), provenance={**job().provenance, key: "another"})
    write(tmp_path, other.cell("train", status="done"))
    with pytest.raises(ValueError, match=rf"another {key}; give the same options, another --out, or --fresh"):
        reusable_cells(tmp_path / "context.jsonl", [job()])


def test_measurements_of_another_commit_are_kept_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(job(), provenance={**job().provenance, "git_commit": "feedbeef" * 5})
    for phase in BASIC_PHASES:
        write(tmp_path, other.cell(phase, status="done", tokens_per_second=1.0))
    play(monkeypatch)
    stream = io.StringIO()
    assert len(measure([job()], tmp_path, stream)) == 3
    assert "another commit (feedbeeffeed)" in stream.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["s4d", "mamba", "jamba", "lstm"])
def test_every_architecture_can_be_measured_in_every_phase(arch: str, tmp_path: Path) -> None:
    everything = dataclasses.replace(job(arch, context_len=17, max_batch=3), phases=PHASES)
    cells = {cell.phase: cell for cell in measure([everything], tmp_path)}
    assert [(phase, cell.status, cell.error) for phase, cell in cells.items()] == [(p, "done", None) for p in PHASES]
    assert cells["decode_many"].batch_size == 2
    assert cells["decode_many"].state_bytes == cells["decode"].state_bytes
    for cell in cells.values():
        assert cell.seconds is not None
        assert cell.seconds > 0
        assert cell.cpu_seconds is not None
        assert 0 < cell.cpu_seconds < 60
