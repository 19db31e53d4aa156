import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from crossover.archs import ModelConfig, build, configure
from crossover.options import count
from crossover.train.command_line import parse
from crossover.train.config import DataConfig, ModelSpec, ObjectiveSpec, OptimConfig, RunConfig, TrainConfig
from crossover.train.objectives import open_objective


def run_of(*argv: str) -> RunConfig:
    return parse(argv, "crossover train")


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Returns what a rejected command line prints, on one line."""
    with pytest.raises(SystemExit) as stop:
        run_of(*argv)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return " ".join(word for word in printed.split() if word != "│")


@pytest.mark.parametrize(
    ("text", "number"),
    [("500", 500), ("500k", 500_000), ("1M", 10**6), ("1.3B", 1_300_000_000), ("5e5", 500_000), ("1_000", 1000)],
)
def test_counts_are_read_as_people_write_them(text: str, number: int) -> None:
    assert count(text) == number


@pytest.mark.parametrize("text", ["", "k", "abc", "1.5", "nan", "inf", "1MM", "0x10", "1e-3"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a whole number"):
        count(text)


def test_defaults_are_valid_and_need_no_option() -> None:
    assert run_of() == RunConfig()
    assert RunConfig().directory == Path("runs/mamba-s0")


def test_short_spellings_mean_the_long_ones() -> None:
    short = run_of("--params", "200k", "--data", "text.txt", "--tokenizer", "bpe:512")
    long = run_of("--model.n-params", "2e5", "--data.source", "text.txt", "--data.tokenizer", "bpe:512")
    assert short == long
    assert (short.model.n_params, short.data.source, short.data.tokenizer) == (200_000, "text.txt", "bpe:512")


def test_underscores_and_hyphens_are_the_same() -> None:
    assert run_of("--train.seq_len", "64") == run_of("--train.seq-len", "64")


def test_options_override_the_run_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'seed = 3\n[model]\npreset = "lstm"\nn_params = "1M"\n[optim]\nlr = 1e-3\nbetas = [0.8, 0.99]\n'
        "[train]\nsteps = 500\nbatch_size = 4\n"
    )
    run = run_of(str(file), "--train.steps", "7")
    assert run == RunConfig(
        name="mine",
        seed=3,
        model=ModelSpec(preset="lstm", n_params=1_000_000),
        optim=OptimConfig(lr=1e-3, betas=(0.8, 0.99)),
        train=TrainConfig(steps=7, batch_size=4),
    )


def test_a_run_file_is_the_first_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text("seed = 3\n")
    assert "mine.toml" in error_of(capsys, "--train.steps", "7", str(tmp_path / "mine.toml"))


def test_a_tokenizer_file_is_not_taken_for_the_run_file(tmp_path: Path) -> None:
    assert run_of("--tokenizer", str(tmp_path / "odd.toml")).name == ""


def test_a_model_table_gives_the_whole_model(tmp_path: Path) -> None:
    file = tmp_path / "hybrid.toml"
    file.write_text(
        '[model]\nd_model = 32\nn_layers = 2\npattern = ["mamba+moe", "attention+mlp"]\n'
        "[model.mixer.attention]\nn_heads = 2\n[model.ffn.moe]\nn_experts = 4\ntop_k = 1\n"
    )
    expected = ModelConfig(
        d_model=32,
        n_layers=2,
        vocab_size=300,
        pattern=("mamba+moe", "attention+mlp"),
        mixer={"attention": {"n_heads": 2}},
        ffn={"moe": {"n_experts": 4, "top_k": 1}},
    )
    run = run_of(str(file))
    assert run.model.preset == "custom"
    assert run.model.configure(300) == expected
    wider = run_of(str(file), "--model.d-model", "64", "--model.set", "mixer.attention.n_heads=4")
    assert wider.model.configure(300) == dataclasses.replace(expected, d_model=64, mixer={"attention": {"n_heads": 4}})


@pytest.mark.quick
@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "configs").glob("*.toml")), ids=lambda f: f.stem)
def test_the_run_files_of_the_repository_describe_runs(file: Path) -> None:
    run = run_of(str(file))
    assert run.name == file.stem
    n_params = build(run.model.configure(256), device="meta").n_params
    assert n_params == pytest.approx(1_000_000, rel=0.2)
    assert f"crossover train configs/{file.name}" in file.read_text()


@pytest.mark.parametrize(("key", "named"), [("patern", "pattern"), ("mixer.mamba.d_stat", "d_state")])
def test_an_unknown_key_of_a_model_is_named_with_the_nearest_one(key: str, named: str) -> None:
    spec = ModelSpec(preset="custom", d_model=16, n_layers=1, set=('pattern=["mamba"]', f"{key}=4"))
    with pytest.raises(ValueError, match=rf"{key}.*{named}"):
        spec.configure(256)


def test_options_of_a_preset_reach_its_layers() -> None:
    spec = ModelSpec(preset="transformer", d_model=64, n_layers=1, set=("n_heads=2", "window=8"))
    assert spec.configure(300) == configure("transformer", vocab_size=300, d_model=64, n_layers=1, n_heads=2, window=8)


def test_option_values_are_toml_and_bare_words_are_strings() -> None:
    spec = ModelSpec(set=("a=1", "b=[1, 2]", "c.d=true", "e=word", 'f="x=y"', "a=2"))
    assert spec.all_options() == {"a": 2, "b": [1, 2], "c": {"d": True}, "e": "word", "f": "x=y"}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--optim.lrr", "1"], "--optim.lr"),
        (["--model.preset-name", "x"], "--model.preset"),
        (["--params", "many"], "'many' is not a whole number"),
        (["--train.steps", "1.5"], "'1.5' is not a whole number"),
        (["--optim.schedule", "cosin"], "'wsd'"),
        (["--optim.lr", "nan"], "optim.lr=nan must be a finite number"),
        (["--optim.lr", "-1"], "optim.lr=-1.0 must be more than 0"),
        (["--optim.clip", "inf"], "optim.clip=inf must be a finite number"),
        (["--train.steps", "0"], "train.steps=0 must be at least 1"),
        (["--train.keep-checkpoints", "1"], "at least 2"),
        (["--train.batch-size", "8", "--train.grad-accumulation", "3"], "not divisible"),
        (["--train.device", "gpu 1"], "train.device must be"),
        (["--data.val-fraction", "1"], "data.val_fraction=1.0 must be less than 1"),
        (["--model.set", "vocab_size=5"], "comes from the tokenizer"),
        (["--model.set", "d_model"], "key=value"),
        (["--model.set", "d_model=5"], "--model.d-model"),
        (["--model.set", "a=1", "--model.set", "a.b=1"], "contradicts"),
        (["--model.preset", "custom"], "needs a pattern"),
        (["--name", "a/b"], "one folder"),
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        (["missing.toml"], "cannot read the run file missing.toml"),
    ],
)
def test_a_mistake_is_answered_in_words(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in error_of(capsys, *options)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[train]\nstepz = 3", "unknown key train.stepz; did you mean 'steps'?"),
        ("[train]\nsteps = 'many'", "'many' is not a whole number"),
        ("[optim]\nschedule = 'cosin'", "'wsd'"),
        ("[optim]\nlr = -1.0", "optim.lr=-1.0 must be more than 0"),
        ("steps == 3", "is not valid TOML"),
        ("[train.steps]\nx = 1", "train.steps={'x': 1} must be a whole number"),
        ("train = 3", "train=3 must be a table"),
        ("[train]\nsteps = 3.5", "train.steps=3.5 must be a whole number"),
        ("[train]\nsteps = true", "train.steps=True must be a whole number"),
        ("[optim]\nbetas = [0.9]", "optim.betas=[0.9] must be a list of 2 entries"),
        ("[data]\nsource = 3", "data.source=3 must be text"),
        ("[model]\npattern = ['mamba']\nn_params = 5", "leave one of the two out"),
    ],
)
def test_a_run_file_is_checked_like_the_command_line(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(content)
    message = error_of(capsys, str(file))
    assert expected in message


@pytest.mark.parametrize(
    "run",
    [
        RunConfig(),
        RunConfig(
            name="x",
            out=Path("elsewhere"),
            model=ModelSpec(preset="custom", set=('pattern=["mamba"]',)),
            objective=ObjectiveSpec(kind="pairs", set=("source=a",), options={"target": "b"}),
            data=DataConfig(cache=Path("cache")),
            optim=OptimConfig(lr=1e-3, betas=(0.5, 0.6)),
        ),
    ],
)
def test_a_configuration_survives_json(run: RunConfig) -> None:
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_an_unknown_key_in_json_is_named_with_its_path() -> None:
    values = RunConfig().to_dict()
    values["train"]["step"] = 3
    with pytest.raises(ValueError, match=r"unknown key train\.step; did you mean 'steps'\?"):
        RunConfig.from_dict(values)


def test_help_explains_every_option_and_imports_no_torch() -> None:
    program = (
        "import sys; from crossover.train.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: print('torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.rstrip().endswith("False")
    for section in (DataConfig, OptimConfig, TrainConfig):
        for field in dataclasses.fields(section):
            assert field.name.replace("_", "-") in printed
    assert "--params" in printed


def test_an_objective_and_its_options_come_from_the_file_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[objective]\nkind = "pairs"\nsource = "question"\n')
    run = run_of(str(file), "--objective.set", "target=answer")
    assert run.objective.kind == "pairs"
    assert run.objective.all_options() == {"source": "question", "target": "answer"}
    assert run_of("--objective", "pairs").objective == ObjectiveSpec(kind="pairs")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--objective", "pears"], "unknown objective 'pears'; did you mean 'pairs'?"),
        (["--objective.set", "packin=reset"], "unknown key objective.packin; did you mean 'packing'?"),
        (["--objective.set", "packing=both"], "objective.packing='both' must be one of 'concat', 'reset'"),
    ],
)
def test_an_objective_that_there_is_not_is_named_with_the_nearest(options: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        open_objective(run_of(*options))


def test_the_configuration_of_an_earlier_version_is_read() -> None:
    old = RunConfig().to_dict()
    del old["objective"]
    old["data"] |= {"rows": "documents", "packing": "reset"}
    assert RunConfig.from_dict(old).objective == ObjectiveSpec(options={"packing": "reset"})
    old["data"] |= {"rows": "pairs", "packing": "concat"}
    assert RunConfig.from_dict(old).objective == ObjectiveSpec(kind="pairs")


def test_help_shows_the_values_of_the_run_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text("[train]\nsteps = 12345\n")
    with pytest.raises(SystemExit):
        run_of(str(tmp_path / "mine.toml"), "--help")
    assert "12345" in capsys.readouterr().out
