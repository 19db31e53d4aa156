import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from crossover.benchmarks.cli import main

from .fake_runs import write_run

pytestmark = pytest.mark.quick


def run(*words: str) -> tuple[int, str]:
    """Runs a command in this process and returns its exit code."""
    try:
        return main(words), ""
    except SystemExit as stop:
        return (stop.code, "") if isinstance(stop.code, int) else (1, str(stop.code))


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["compare", "--help"],
        ["bench", "kernels", "--help"],
        ["train", "--help"],
        ["report", "--help"],
        ["doctor", "--help"],
    ],
)
def test_help_answers_without_loading_torch_or_matplotlib(words: list[str]) -> None:
    code = (
        "import sys; from crossover.benchmarks.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit as stop: assert stop.code == 0, stop.code\n"
        "loaded = {'torch', 'matplotlib', 'datasets', 'tensorboard', 'numpy'} & sys.modules.keys()\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: crossover" in done.stdout


def test_help_says_what_every_option_of_compare_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", "--help")[0] == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    options = (
        "--archs --params COUNT --seeds --steps --batch-size --seq-len --context --data --tokenizer --out --threads "
        "--memory-limit {None}|SIZE --fresh --time-box"
    )
    for option in options.split(" --"):
        assert option in text
    assert "3 GiB on the CPU" in text
    assert "transformer s4d mamba jamba lstm" in text


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["doctor"], "--ops --json"),
        (
            ["bench", "kernels"],
            "--ops --lengths --batch-size --channels --threads --time-box --compile-box --models --out",
        ),
    ],
)
def test_help_lists_the_options_of_the_other_measurements(
    words: list[str], options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words, "--help")[0] == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert [option for option in options.split(" --") if option not in text] == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["comprae"], "compare"),
        (["compare", "--step", "5"], "--steps"),
        (["compare", "--params", "many"], "'many' is not a whole number"),
        (["compare", "--memory-limit", "lots"], "'lots' is not a size"),
        (["compare", "--context", "512", "128"], "increasing lengths"),
        (["compare", "--archs", "manba"], "did you mean 'mamba'?"),
        (["compare", "--tune-share", "0"], "--tune-share=0.0 must be more than 0"),
        (["compare", "--tune-lr", "--optim.lr", "1e-3"], "leave --optim.lr 0.001 out"),
        (["report", "/nowhere/at/all"], "/nowhere/at/all is not a folder"),
        (["generate", "/nowhere/at/all", "def "], "/nowhere/at/all holds no model"),
        (["train", "--model.preset", "manba", "--data", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_end_with_code_2_and_what_was_meant(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, message = run(*words)
    shown = capsys.readouterr()
    text = " ".join((shown.out + shown.err + message).replace("│", " ").split())
    assert code == 2, text
    assert expected in text
    assert "Traceback" not in text


def test_report_prints_the_path_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "mamba")
    assert run("report", str(tmp_path)) == (0, "")
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


@pytest.mark.filterwarnings("always::RuntimeWarning")
def test_a_warning_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(message: Warning, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

    monkeypatch.setattr(warnings, "showwarning", show)
    log = write_run(tmp_path, "mamba") / "metrics.jsonl"
    log.write_text("3\n" + log.read_text())
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().err == f"warning: {log}: line 1 is damaged and left out\n"


def test_an_output_folder_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run("compare", "--out", str(tmp_path / "file" / "sub"))[0] == 2
    assert capsys.readouterr().err.count("\n") == 1
