from pathlib import Path

import pytest
from crossover.benchmarks.context.options import ContextConfig
from crossover.benchmarks.harness.precision import decide_precision
from crossover.train import runtime
from crossover.train.runtime import Precision

pytestmark = pytest.mark.quick


def test_auto_is_decided_once_for_a_folder_by_the_narrowest_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def choose(setting: str, _: object, *, d_model: int) -> Precision:
        asked.append(d_model)
        return Precision("bf16" if setting == "auto" else setting, f"found at {d_model}", 1.5)

    monkeypatch.setattr(runtime, "choose_precision", choose)
    config = ContextConfig(precision="auto", out=tmp_path)
    assert decide_precision(config, [128, 96]) == Precision("bf16", "found at 96", 1.5)
    assert "Precision: bf16 (found at 96)." in capsys.readouterr().out
    assert decide_precision(config, [64]) == Precision("bf16", "found at 96", 1.5)
    assert asked == [96]
    assert decide_precision(ContextConfig(out=tmp_path), [64]).name == "fp32"  # unless asked

    (tmp_path / "precision.json").write_text('{"name": 3}')
    with pytest.raises(ValueError, match=r"precision\.json: name"):
        decide_precision(config, [64])
