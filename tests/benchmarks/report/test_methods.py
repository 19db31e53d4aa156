"""The methods of a comparison made by hand, sentence by sentence, and the papers that they cite."""

import re
from pathlib import Path

import pytest
from crossover.archs.presets import PRESETS
from crossover.benchmarks.report.document import plain
from crossover.benchmarks.report.methods import methods, references
from crossover.benchmarks.report.references import entries, papers_of
from crossover.benchmarks.report.results import budget_checks, load_comparison

from ..fake_runs import ACCURACY, append_cells, cell, write_comparison, write_json, write_run, write_winners

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[3]
BUILT_IN = [name for name, preset in PRESETS.items() if preset.make.__module__ == "crossover.archs.presets"]


def methods_of(folder: Path) -> str:
    comparison = load_comparison(folder)
    return methods(comparison, budget_checks(comparison))


def keys_of(bibtex: str) -> set[str]:
    return {*re.findall(r"^@\w+\{(\w+),$", bibtex, flags=re.MULTILINE)}


def test_every_sentence_comes_from_the_files(tmp_path: Path) -> None:
    models, training, quality, speed, machine = methods_of(write_winners(tmp_path)).strip().split("\n\n")
    assert models == (
        "We compare these sequence models: Transformer [@vaswani2017attention; @touvron2023llama] (width 128, 4 "
        "layers, 1,000,000 parameters), Mamba [@gu2024mamba] (width 256, 4 layers, 1,005,800 parameters) and LSTM "
        "[@hochreiter1997lstm; @gers2000forget] (width 192, 4 layers, 1,011,600 parameters)."
    )
    assert training == (
        "They were trained to predict the next token of stdlib of Python 3.11.7. Of 533 documents 27 were held out: "
        "9.88 MB for training and 520 kB to judge by (SHA-256 of the data: c0ffeec0ffeec0ff). A run took 600 steps of "
        "24 sequences of 100 tokens and 8 sequences of 300 tokens (by trained length), 614,400 tokens in all: 0.61 "
        "tokens per parameter. We used AdamW [@loshchilov2019adamw] with weight decay 0.1, gradients clipped at a "
        "norm of 1, a warm-up of 5 % and a cosine schedule [@loshchilov2017sgdr], in float32. Peak "
        "learning rates: 0.001 (Transformer), 0.003 (Mamba), 0.005 (LSTM). They are those of the presets, found at "
        "300,000 parameters in 150 steps of 2,048 tokens."
    )
    assert quality == (
        "3 seeds (0, 1, 2) set weights and the order of the data, which is a function of seed and step alone "
        "[@salmon2011philox]: all models read the same tokens in the same order. Quality is bits per byte of held-out "
        "text. Differences to Transformer are paired by seed, with 95 % intervals of Student's t; one counts as shown "
        "where its p-value is below 0.05 after Holm's correction over the models at a length [@holm1979simple]."
    )
    assert speed == (
        "Speed (train, decode) and memory were measured at 100 and 300 tokens of context, each model and length in a "
        "process of its own with at most 3 GiB of memory, as medians of repeats in 2 s after a warm-up. Training "
        "takes 8,100 tokens per step at every length. Prefill and decode serve 1 prompt at once."
    )
    assert machine == (
        "Machine: AMD EPYC 9R45, threads: 2 in measurements and 2 in training, PyTorch 2.13.0+cpu "
        "[@paszke2019pytorch], Python 3.11.7, Linux-6.1-x86_64. Code: crossover at commit 0123456789ab."
    )


def test_what_is_cited_has_an_entry_and_nothing_else_has(tmp_path: Path) -> None:
    text = methods_of(write_winners(tmp_path))
    bibtex = references(text)
    assert keys_of(bibtex) == {*re.findall(r"@(\w+)", text)}
    assert "presets" not in bibtex
    assert keys_of(references(methods_of(write_run(tmp_path / "one", "mamba")))) == {
        "gu2024mamba", "loshchilov2019adamw", "loshchilov2017sgdr", "salmon2011philox", "paszke2019pytorch",
    }  # fmt: skip


def test_a_search_for_rates_is_told_and_cited_where_there_was_one(tmp_path: Path) -> None:
    folder = write_winners(tmp_path)
    tuning = {"rates": {}, "rounds": [38, 75], "n_trials": 60, "n_documents": 26}
    write_json(folder / "compare.json", {"config": {"seq_len": [100, 300]}, "tuning": tuning})
    text = methods_of(folder)
    assert "in 60 trials of 38 and 75 steps" in text
    assert "The search is successive halving [@jamieson2016halving], with sequences of 100 tokens." in text
    assert "of the presets" not in text


def test_a_state_that_was_carried_in_training_is_told(tmp_path: Path) -> None:
    home = write_run(tmp_path, "mamba")
    assert "went on from the state" not in methods_of(tmp_path)
    record = (home / "run.json").read_text()
    (home / "run.json").write_text(record.replace('"batch_size":', '"carry": true, "batch_size":'))
    assert "A sequence went on from the state that the one before it in the text had left" in methods_of(tmp_path)


def test_other_scores_one_seed_and_measurements_alone_are_told_as_they_are(tmp_path: Path) -> None:
    text = methods_of(write_comparison(tmp_path / "answers", archs=["mamba"], seeds=1, context=[96], score=ACCURACY))
    assert "trained by the objective invented from stdlib" in text
    assert "1 seed (0) sets weights" in text
    assert "Quality is share of right answers." in text
    assert "paired by seed" not in text
    append_cells(tmp_path, cell("mamba", "train", 128))
    alone = methods_of(tmp_path)
    assert alone.startswith(
        "We measure one sequence model: Mamba [@gu2024mamba] (1,000,000 parameters).\n\nSpeed (train)"
    )
    assert "seed" not in alone


def test_names_in_the_files_are_no_markup(tmp_path: Path) -> None:
    home = write_run(tmp_path, "mamba")
    (home / "run.json").write_text((home / "run.json").read_text().replace("stdlib of", "<b>_x_ [@holm1979simple]"))
    comparison = load_comparison(tmp_path)
    assert r"\<b\>\_x\_ \[@holm1979simple\] Python" in methods(comparison, budget_checks(comparison), quote=plain)


@pytest.mark.parametrize("arch", BUILT_IN)
def test_every_architecture_has_its_papers(arch: str) -> None:
    papers = entries(papers_of(arch))
    for entry in re.findall(r"^@.*?^\}$", papers, flags=re.MULTILINE | re.DOTALL):
        fields = dict(re.findall(r"^  (\w+) = \{(.+)\},$", entry, flags=re.MULTILINE))
        assert {"title", "author", "year"} < fields.keys()
        assert fields.keys() & {"booktitle", "journal", "institution"}
        assert entry.count("{") == entry.count("}")
        assert all(name.count(",") == 1 for name in fields["author"].split(" and "))
        arxiv = re.search(r"\d{4}\.\d{5}", entry)
        assert arxiv is None or 0 <= int(fields["year"]) - 2000 - int(arxiv[0][:2]) <= 2
    mixer = ROOT / "archs" / "mixers" / f"{arch}.py"
    source = mixer.read_text() if mixer.exists() else PRESETS[arch].make.__doc__ or ""
    cited = re.search(r"arXiv:(\d{4}\.\d{5})", source)
    assert cited is None or cited[1] in papers
    assert keys_of(papers)


def test_papers_are_of_architectures_that_exist() -> None:
    named = re.findall(r"presets = \{(.*)\}", (ROOT / "archs" / "references.bib").read_text())
    assert {name for names in named for name in names.split()} == {*BUILT_IN}
    assert papers_of("mamba-130m") == papers_of("mamba")
    assert papers_of("ema") == []
