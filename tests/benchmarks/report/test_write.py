import base64
import csv
import io
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from crossover.benchmarks import load_results
from crossover.benchmarks.report.figures import learning_figure, quality_figure
from crossover.benchmarks.report.results import load_comparison, quality
from crossover.benchmarks.report.write import write_report
from crossover.train.score import BITS_PER_BYTE
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ..fake_runs import ACCURACY, ARCHS, CONTEXT, append_cells, cell, write_comparison, write_json, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of five architectures with its report."""
    home = write_comparison(tmp_path_factory.mktemp("compare"))
    write_report(home)
    return home


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


class _Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def words(page: str) -> str:
    """The text of a page without its markup."""
    return re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S))


@pytest.mark.quick
def test_results_for_scripts_are_the_rows_of_the_tables(folder: Path) -> None:
    results = load_results(str(folder))
    for name, rows in (("quality", results.quality), ("context", results.context)):
        with (folder / f"{name}.csv").open(encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        assert [{key: "" if row[key] is None else str(row[key]) for key in table[0]} for row in rows] == table
    assert len(results) == len(results.quality) + len(results.context)
    assert all(isinstance(value, str | int | float | None) for row in results for value in row.values())


@pytest.mark.quick
def test_first_paragraphs_state_the_best_model_and_crossovers_with_uncertainty(page: str) -> None:
    lead = re.search(r'<div class="lead">\s*<p>(.*?)</p>\s*<p>(.*?)</p>', page)
    assert lead is not None
    quality, training = lead.groups()
    assert quality == (
        "Mamba trained at 512 tokens predicts held-out text best, at 2.14 bits per byte "
        "(0.19 ± 0.00 below Transformer)."
    )
    assert re.search(r"Mamba beyond \d+ \(\d+-\d+\)", training)
    assert "trains faster than Transformer" in training
    assert re.search(r"Mamba predicts held-out text best, at 2\.1\d ± 0\.01 bits per byte", page)
    assert "zlib 1.86 and xz 1.47" in page


@pytest.mark.quick
def test_page_has_no_script_and_no_outside_reference(page: str) -> None:
    elements = _Elements(page).found
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in elements}
    for tag, attributes in elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_every_picture_is_an_svg_with_a_description(page: str) -> None:
    pictures = [attributes for tag, attributes in _Elements(page).found if tag == "img"]
    assert len(pictures) == 9
    for attributes in pictures:
        assert len(attributes["alt"] or "") > 20
        head, _, content = (attributes["src"] or "").partition("base64,")
        assert head == "data:image/svg+xml;"
        assert ElementTree.fromstring(base64.b64decode(content)).tag.endswith("svg")


def test_same_files_give_the_same_bytes(folder: Path, page: str) -> None:
    write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == page


def test_out_of_memory_is_shown_and_not_left_out(page: str) -> None:
    assert "Transformer out of memory at 8,192" in page
    assert re.search(r"<td>Transformer</td><td>train</td>.*?8,192.*?out of memory", page)


def test_lengths_beyond_the_positions_of_a_model_are_shown_and_are_no_failure(tmp_path: Path) -> None:
    for arch in ("transformer", "mamba"):
        for context_len in (512, 2048):
            beyond = arch == "transformer" and context_len == 2048
            limits = {"model": {"max_positions": 1024}, "batch_size": None} if beyond else {}
            status = "beyond_positions" if beyond else "done"
            append_cells(tmp_path, cell(arch, "train", context_len, status=status, **limits))
    text = words(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Transformer was built with 1,024 positions, and is not compared beyond." in text
    assert "Crosses: Transformer beyond its positions at 2,048." in text
    assert re.search(r"Transformer\s+train\s+2,048(\s+-)+\s+beyond its positions", text)
    assert "What is missing" not in text


def test_text_of_samples_is_escaped(page: str) -> None:
    assert "&lt;b&gt;if&lt;/b&gt; name is None" in page
    assert "<b>if</b>" not in page
    assert "\x00" not in page


def test_quality_table_says_what_is_equal_and_what_is_not(page: str) -> None:
    text = words(page)
    for column in ("Parameters", "Active", "FLOPs/token", "State", "Learning rate", "Seeds"):
        assert column in text
    assert "614,606" in text  # active parameters of the mixture of experts
    assert "Verified from the files of the runs" in text


def test_provenance_names_machine_versions_backends_and_digest(page: str) -> None:
    text = words(page)
    for fact in ("AMD EPYC 9R45", "2.13.0+cpu", "selective_scan", "c0ffeec0ffee", "crossover compare", "freed memory"):
        assert fact in text


def test_markdown_has_the_same_findings_and_links_its_figures(folder: Path, page: str) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    first = re.search(r'<div class="lead">\s*<p>(.*?)</p>', page)
    assert first is not None
    assert first[1] in text.replace("\\", "")
    links = re.findall(r"\]\((figures/[^)]*)\)", text)
    assert [Path(link).suffix for link in links] == [".csv", *[".svg", ".csv"] * 9]
    assert all((folder / link).exists() for link in links)


def test_what_every_picture_shows_is_beside_it_and_in_the_page(folder: Path, page: str) -> None:
    linked = {a["download"]: a["href"] or "" for tag, a in _Elements(page).found if tag == "a"}
    pictures = {path.stem for path in (folder / "figures").glob("*.svg")}
    assert linked.keys() == {f"{name}.csv" for name in pictures | {"winner-map"}}
    for name, href in linked.items():
        text = (folder / "figures" / str(name)).read_text()
        assert base64.b64decode(href.partition("base64,")[2]).decode() == text
        assert len(text.splitlines()) > len(ARCHS)
    speeds = list(csv.DictReader((folder / "figures" / "context-train-speed.csv").open()))
    assert [row["status"] for row in speeds if row["context_len"] == "8192"].count("out_of_memory") == 2
    assert speeds[0] == {"label": "Transformer", "arch": "transformer", "context_len": "128", "status": "done"} | {
        key: str(value) for key, value in zip(("tokens_per_second", "spread_low", "spread_high"), _SPEEDS, strict=True)
    }


_SPEEDS = (40e3 / 1.256, 40e3 / 1.256 * 0.96, 40e3 / 1.256 * 1.05)


@pytest.mark.quick
def test_csv_has_every_cell_with_its_keys(folder: Path) -> None:
    with (folder / "context.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(ARCHS) * len(CONTEXT) * 3
    assert {"arch", "phase", "context_len", "batch_size", "tokens_per_second", "peak_bytes", "state_bytes", "status",
            "backend", "dtype", "repeats"} <= rows[0].keys()  # fmt: skip
    failed = [row for row in rows if row["status"] == "out_of_memory"]
    assert len(failed) == 2
    assert failed[0]["tokens_per_second"] == ""


def test_quality_csv_has_one_row_per_architecture(folder: Path) -> None:
    with (folder / "quality.csv").open() as file:
        rows = {row["arch"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(ARCHS)
    assert float(rows["mamba"]["val_bits_per_byte"]) == pytest.approx(2.135, abs=0.001)
    assert {"n_params", "n_active_params", "tokens", "flops_per_token", "status", "seeds"} <= rows["mamba"].keys()


def test_summary_lists_every_crossover(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["crossovers"]) == 6 * 5 * 4  # of quality by trained length, too
    crossing = next(
        c
        for c in summary["crossovers"]
        if (c["metric"], c["a"], c["b"]) == ("training tokens/s", "transformer", "mamba")
    )
    assert crossing["low"] < crossing["context_len"] < crossing["high"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison by a score of which more is better, with its report."""
    home = write_comparison(tmp_path_factory.mktemp("answers"), context=(128,), score=ACCURACY)
    write_report(home)
    return home


def test_a_report_by_another_score_says_nothing_of_bits_per_byte(answers: Path) -> None:
    texts = [words((answers / "report.html").read_text()), (answers / "report.md").read_text()]
    texts += [figure.read_text() for figure in (answers / "figures").iterdir()]
    texts += [(answers / "quality.csv").read_text()]
    for text in texts:
        assert not re.search("bits.per.byte|held-out text|zlib|compressor", text, flags=re.I)
    assert {path.stem for path in (answers / "figures").iterdir()} >= {"quality", "learning-tokens", "learning-seconds"}
    assert not (answers / "figures" / "position.svg").exists()


def test_the_best_by_a_score_of_which_more_is_better_is_the_highest(answers: Path) -> None:
    text = (answers / "report.md").read_text()
    assert "Mamba has the highest share of right answers, at 0.79 ± 0.00 accuracy." in text
    assert "Share of right answers, of which more is better." in text
    table = text[text.index("Accuracy at equal tokens, by trained length.") :].split("\n\n")[1]
    assert [line for line in table.splitlines() if "**" in line] == ["| Mamba | **0.786 (+0.019 ± 0.000, n=2)** |"]
    rows = {row["arch"]: row for row in csv.DictReader((answers / "quality.csv").open())}
    assert float(rows["mamba"]["val_accuracy"]) == max(float(row["val_accuracy"]) for row in rows.values())
    assert float(rows["mamba"]["val_accuracy_std"]) > 0
    summary = json.loads((answers / "summary.json").read_text())
    assert summary["score"] == ACCURACY.to_dict()
    assert summary["reference_bits_per_byte"] == {}


def test_figures_by_another_score_name_it_and_its_direction_with_the_best_on_top(answers: Path) -> None:
    drawn = (answers / "figures" / "quality.svg").read_text()
    assert "share of right answers (more is better)" in drawn
    assert "Accuracy: Mamba 0.79, Jamba" in words((answers / "report.md").read_text())
    assert "share of right answers" in (answers / "figures" / "learning-tokens.svg").read_text()
    heights = {label: float(y) for y, label in re.findall(r'y="([\d.]+)"[^>]*>(Mamba|LSTM)</text>', drawn)}
    assert heights["Mamba"] < heights["LSTM"]  # measured from above


def test_columns_of_quality_csv_are_public(folder: Path) -> None:
    columns = (folder / "quality.csv").read_text().splitlines()[0].split(",")
    published = Path(__file__).parents[3] / "results" / "cpu-demo" / "quality.csv"
    assert columns == published.read_text().splitlines()[0].split(",")


def test_a_run_that_names_bits_per_byte_as_its_score_is_reported_as_one_that_does_not(tmp_path: Path) -> None:
    for name, score in (("named", BITS_PER_BYTE), ("unnamed", None)):
        write_report(write_comparison(tmp_path / name, archs=["mamba", "lstm"], context=(128,), score=score))
    named, unnamed = ((tmp_path / name / "report.md").read_text() for name in ("named", "unnamed"))
    named = named.replace("by the objective invented from", "to predict the next token of")
    assert named.replace("- Objective: invented, rate 0.15\n", "") == unnamed


def test_runs_alone_make_a_report(tmp_path: Path) -> None:
    write_run(tmp_path, "mamba")
    page = write_report(tmp_path).read_text()
    assert "the whole held-out text: zlib 1.86" in words(page)
    assert "Against context length" not in page


def test_measurements_alone_make_a_report(tmp_path: Path) -> None:
    for arch in ("transformer", "mamba"):
        for context_len in CONTEXT:
            append_cells(tmp_path, cell(arch, "train", context_len))
    text = words(write_report(tmp_path).read_text())
    assert "Mamba trains faster than Transformer beyond" in text
    assert "Equal budgets" not in text


def test_what_is_missing_stands_before_the_results(tmp_path: Path) -> None:
    write_comparison(tmp_path, archs=["transformer", "mamba"], seeds=1, context=(128,))
    write_run(tmp_path, "transformer", status="failed")
    info = json.loads((tmp_path / "compare.json").read_text())
    info["config"] |= {"archs": ["transformer", "mamba", "lstm"], "context": [128, 512]}
    write_json(tmp_path / "compare.json", info)
    text = words(write_report(tmp_path).read_text())
    assert text.index("What is missing") < text.index("Quality")
    assert "transformer-s0: failed (the loss is nan)" in text
    assert "lstm-s0: not run yet" in text
    assert "Mamba: not measured yet at 512 tokens" in text


def test_a_timeout_is_called_a_timeout(tmp_path: Path) -> None:
    for arch in ("transformer", "mamba"):
        for context_len in (128, 512):
            slow = arch == "transformer" and context_len == 512
            append_cells(tmp_path, cell(arch, "train", context_len, status="timeout" if slow else "done"))
    text = words(write_report(tmp_path).read_text())
    assert "from 512 tokens on, where Transformer was stopped after 300 s" in text
    assert "no longer runs" not in text


def test_a_difference_within_the_noise_is_not_claimed(tmp_path: Path) -> None:
    for arch, speed in (("transformer", 100.0), ("mamba", 101.0)):
        for context_len in CONTEXT:
            rates = {"tokens_per_second": speed, "spread": (0.95 * speed, 1.05 * speed)}
            append_cells(tmp_path, cell(arch, "train", context_len, status="done", **rates))
    text = words(write_report(tmp_path).read_text())
    assert "Mamba is within the noise at every length measured" in text
    assert "trains faster" not in text


def test_report_says_on_which_text_the_learning_rates_were_chosen(page: str) -> None:
    assert "same held-out split that is reported here" in words(page)


def test_report_says_how_many_tokens_a_training_step_takes(page: str) -> None:
    assert "Training takes 8,192 tokens per step at every length." in words(page)


def test_unequal_budgets_are_stated_loudly(tmp_path: Path) -> None:
    write_run(tmp_path, "transformer")
    write_run(tmp_path, "mamba", n_params=2_000_000)
    page = write_report(tmp_path).read_text()
    assert "unequal budgets" in words(page).splitlines()[0] + words(page)
    assert re.search(r'<li class="warn">Parameters: NOT EQUAL', page)


def test_an_architecture_unknown_to_the_report_is_shown_all_the_same(tmp_path: Path) -> None:
    home = write_run(tmp_path, "mamba")
    home.rename(tmp_path / "retnet-s0")
    path = tmp_path / "retnet-s0" / "run.json"
    write_json(path, json.loads(path.read_text()) | {"arch": "retnet", "label": "RetNet"})
    assert "RetNet" in words(write_report(tmp_path).read_text())


def test_report_says_where_the_final_validation_reads_more_than_those_on_the_way(tmp_path: Path) -> None:
    said = "The last point of a run reads more of the held-out text than those before it."
    assert said not in words(write_report(write_run(tmp_path, "mamba", eval_tokens=262_144)).read_text())
    assert said in words(write_report(write_run(tmp_path, "mamba", eval_tokens=65_536)).read_text())


NASTY = "<script>alert(1)</script> ![x](javascript:x) `x` *b* | y\r\n# z\n- w &lt; \x1b[31m \u202e $\\frac{$ ~~s~~ __"


def nasty(value: object) -> object:
    """The same JSON value with something bad in every text but the names of things that are looked up."""
    if isinstance(value, dict):
        fixed = {"arch", "phase", "status", "digest", "score", "started", "config", "settings", "precision"}
        return {key: entry if key in fixed else nasty(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [nasty(entry) for entry in value]
    return f"{value} {NASTY}" if isinstance(value, str) else value


def test_what_files_of_others_say_is_text_and_never_markup(tmp_path: Path) -> None:
    write_comparison(tmp_path, archs=["transformer", "mamba"], seeds=1, context=[96])
    write_run(tmp_path, "lstm", status="failed")
    for file in (tmp_path / "compare.json", *tmp_path.glob("*/run.json"), *tmp_path.glob("*/result.json")):
        file.write_text(json.dumps(nasty(json.loads(file.read_text()))))
    cells = [json.dumps(nasty(json.loads(line))) for line in (tmp_path / "context.jsonl").read_text().splitlines()]
    (tmp_path / "context.jsonl").write_text("\n".join(cells) + "\n")
    write_report(tmp_path)

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "script" not in {tag for tag, _ in _Elements(page).found}
    assert all((a["href"] or "").startswith("data:text/csv") for tag, a in _Elements(page).found if tag == "a")
    assert "&lt;script&gt;" in page
    pictures = [file.read_text(encoding="utf-8") for file in (tmp_path / "figures").glob("*.svg")]
    tags = {element.tag for picture in pictures for element in ElementTree.fromstring(picture).iter()}
    assert not {tag for tag in tags if tag.endswith(("script", "}a"))}
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "\\<script\\>" in text
    assert not {"\x1b", "\u202e"} & {*page, *text, *"".join(pictures)}
    lines = [re.sub(r"\\[^\w\s]", "", line) for line in text.splitlines() if not line.startswith("    ")]
    for line in lines:
        assert not re.search(r"[<`$~&]", line), line
        assert not re.search(r"\]\((?!figures/[\w-]+\.(?:svg|csv)\))", line), line
        assert not re.match(r"#+ z|- w", line), line
    rows = [line.count("|") for line in lines if line.startswith("|")]
    assert len({*rows}) <= 6  # kinds of tables


@pytest.mark.parametrize("values", [(2.03, 2.031), (1.4, 2.4), (60.0, 90.0)])
def test_names_of_compressors_stand_apart_and_within_the_picture(values: tuple[float, float], tmp_path: Path) -> None:
    write_run(tmp_path, "mamba", seq_len=32)
    info = json.loads((tmp_path / "mamba-s0/run.json").read_text())
    info["corpus"]["reference_bits_per_byte"] = dict(zip(("xz", "zlib"), values, strict=True))
    (tmp_path / "mamba-s0/run.json").write_text(json.dumps(info))
    comparison = load_comparison(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = (quality_figure(comparison, quality(comparison)), learning_figure(comparison, "tokens"))
    for figure in figures:
        picture = figure.light.decode()
        labels = re.findall(r'x="([\d.-]+)" y="([\d.-]+)"[^>]*>((?:xz|zlib) [\d.]+)<', picture)
        x, y = ([float(label[i]) for label in labels] for i in (0, 1))
        if figure.name == "learning-tokens" and values[0] > 50:
            assert labels == []  # far beyond what was learned
            continue
        assert len(labels) == 2
        assert abs(x[0] - x[1]) > 45 or abs(y[0] - y[1]) > 8
        assert all(0 <= place <= 360 for place in (*x, *y))


def test_figures_are_images_in_tensorboard_where_runs_are_once_for_all_reports(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    write_report(tmp_path)
    assert not (tmp_path / "tb").exists()
    (tmp_path / "tb").mkdir()
    for _ in range(2):
        write_report(tmp_path)
    events = EventAccumulator(str(tmp_path / "tb" / "report")).Reload()
    assert set(events.Tags()["images"]) == {f"report/{path.stem}" for path in (tmp_path / "figures").glob("*.svg")}
    (image,) = events.Images("report/learning-tokens")
    with Image.open(io.BytesIO(image.encoded_image_string)) as picture:
        assert (image.width, image.height) == picture.size == (750, 525)
        assert picture.getpixel((0, 0)) == (255, 255, 255, 255)


def test_a_task_is_reported_with_its_accuracy_at_longer_lengths_and_without_documents(tmp_path: Path) -> None:
    for arch, right in (("transformer", 0.75), ("lstm", 0.25)):
        home = write_run(tmp_path, arch, seq_len=64, score=ACCURACY)
        info, result = (json.loads((home / name).read_text()) for name in ("run.json", "result.json"))
        info["corpus"] |= {"name": "mqar", "made": "rows that are made (pairs 8)", "n_documents": 0, "train_bytes": 0}
        tested = [
            {"context_len": length, "accuracy": right / (length / 64), "floor": 0.125, "status": "done"}
            for length in (64, 128)
        ]
        beyond = {"context_len": 256, "accuracy": None, "floor": 0.126, "status": "beyond_positions"}
        write_json(home / "run.json", info)
        write_json(home / "result.json", result | {"accuracy_by_length": [*tested, beyond]})
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| Transformer | 64", "| LSTM | 64", "| Without"))]
    assert sorted(rows) == [
        "| LSTM | 64 | 0.250 | 0.125 | beyond its positions |",
        "| Transformer | 64 | 0.750 | 0.375 | beyond its positions |",
        "| Without recall |  | 0.125 | 0.125 | 0.126 |",
    ]
    assert "- Data: mqar alone, rows that are made (pairs 8)." in text
    assert "trained on mqar ·" in text
    assert "They were trained on the task mqar: rows that are made (pairs 8)" in (tmp_path / "methods.md").read_text()
    assert "0 documents" not in text
