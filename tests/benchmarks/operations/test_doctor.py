"""The doctor finds a broken backend, names it and switches it off; a verdict holds for its versions alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crossover.benchmarks.cli import main
from crossover.benchmarks.operations.doctor import checks
from crossover.kernels import dispatch, ops
from crossover.kernels.dispatch import Unsupported, record_backends, switched_off
from crossover.train.verdict import apply_verdict, identity, store_verdict

pytestmark = pytest.mark.quick

OPS = ("linear_cross_entropy", "rms_norm")


@pytest.fixture(autouse=True)
def _nothing_is_off_and_no_interpreter_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_switched_off", {})
    for name in OPS:  # plain PyTorch alone: Triton's interpreter is slow
        found = {k: f for k, f in ops.OPS[name]._implementations.items() if k not in ("cpu", "triton")}
        monkeypatch.setattr(ops.OPS[name], "_implementations", found)
        monkeypatch.setattr(ops.OPS[name], "_by_device", {"cpu": ("torch",)})


def replace(monkeypatch: pytest.MonkeyPatch, op: str, function: Callable[..., Any]) -> None:
    """Puts another function in the place of an operation's plain PyTorch backend, and leaves it no other."""
    reference = ops.OPS[op]._implementations["reference"]
    monkeypatch.setattr(ops.OPS[op], "_implementations", {"reference": reference, "torch": function})


def slightly_wrong(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return ops.OPS["rms_norm"]._implementations["reference"](x, weight, eps) * 1.0001


def test_sound_operations_pass_in_every_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "doctor.json"
    assert main(["doctor", "--ops", *OPS, "--json", str(path)]) == 0
    text, found = capsys.readouterr().out, json.loads(path.read_text())
    assert {"CPU", "GPU", "bfloat16", "versions"} == found["machine"].keys()
    assert f"torch {torch.__version__}" in text
    rows = [row for row in found["checks"] if row["backend"] == "torch"]
    assert [(row["op"], row["dtype"]) for row in rows] == [
        (op, dtype) for op in OPS for dtype in ("float32", "bfloat16", "float16")
    ]
    assert all(row["status"] == "ok" and max(row["outputs"], row["gradients"]) > 0 for row in rows)
    assert re.search(r"^rms_norm +torch +float32 +\d\.\de-\d\d +\d\.\de-\d\d +\d\.\de-\d\d +ok$", text, flags=re.M)
    assert apply_verdict() is not None
    assert switched_off() == {}


def test_a_broken_backend_is_named_switched_off_and_later_found_sound_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as broken:
        replace(broken, "rms_norm", slightly_wrong)
        assert main(["doctor", "--ops", "rms_norm"]) == 1
    text = capsys.readouterr().out
    assert "FAILED: output 0 is off by 1.0e-04, allowed 2.0e-05" in text
    assert "torch of rms_norm (float32: output 0 is off by 1.0e-04, allowed 2.0e-05)" in text
    assert switched_off() == {}  # the doctor itself changes nothing in its process

    verdict = apply_verdict()
    assert verdict is not None
    (off,) = verdict["switched_off"]
    assert (off["op"], off["backend"]) == ("rms_norm", "torch")
    with record_backends() as used:
        ops.rms_norm(torch.ones(1, 1, 4), torch.ones(4), 1e-5)
    assert used == {"rms_norm": ("reference",)}

    assert main(["doctor", "--ops", "linear_cross_entropy"]) == 0  # says nothing about other operations
    assert apply_verdict()["switched_off"] == [off]  # pyright: ignore[reportOptionalSubscript]
    assert main(["doctor", "--ops", "rms_norm"]) == 0
    assert apply_verdict()["switched_off"] == []  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ZeroDivisionError("gone\nwrong"), "failed", "ZeroDivisionError: gone"),
        (Unsupported("only on Sundays"), "not supported", "only on Sundays"),
        (RuntimeError("\"norm\" not implemented for 'Half'"), "not supported", "\"norm\" not implemented for 'Half'"),
    ],
)
def test_a_crash_is_a_failure_and_a_refusal_is_not(
    error: Exception, status: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        raise error

    replace(monkeypatch, "rms_norm", fail)
    found = [check for check in checks(["rms_norm"]) if check.backend == "torch"]
    assert {(check.status, check.reason) for check in found} == {(status, reason)}


def test_a_wrong_gradient_a_wrong_shape_and_nan_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = ops.OPS["rms_norm"]._implementations["reference"]

    def reasons(function: Callable[..., torch.Tensor]) -> set[str]:
        with monkeypatch.context() as broken:
            replace(broken, "rms_norm", function)
            return {check.reason or "" for check in checks(["rms_norm"]) if check.status == "failed"}

    def stuck(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return reference(x, weight.detach() + 0 * weight, eps)

    def short(**arguments: Any) -> torch.Tensor:
        return reference(**arguments)[:, :1]

    def nan(**arguments: Any) -> torch.Tensor:
        return reference(**arguments) * float("nan")

    assert {reason.partition(" by ")[0] for reason in reasons(stuck)} == {"gradient of weight is off"}
    assert {reason.partition(" (")[0] for reason in reasons(short)} == {"output 0 has shape"}
    assert {reason.partition(", ")[0] for reason in reasons(nan)} == {"output 0 is off by inf"}


def test_a_backend_that_cannot_run_here_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "rms_norm", ops.OPS["rms_norm"]._implementations["torch"])
    found = [check for check in checks(["rms_norm"]) if check.backend == "triton"]
    assert [(check.status, check.reason) for check in found] == [("not here", "no GPU")]


def test_a_verdict_of_other_versions_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    assert apply_verdict() is None
    store_verdict(["rms_norm"], {("rms_norm", "torch"): "broken"})
    now = identity()
    for changed in ({"torch": "2.99"}, {"kernels": "0" * 16}, {"gpu": "another"}, {"triton": None}):
        with monkeypatch.context() as other:
            other.setattr("crossover.train.verdict.identity", lambda changed=changed: now | changed)
            assert apply_verdict() is None
    assert switched_off() == {}
    assert apply_verdict() is not None
    assert switched_off() == {("rms_norm", "torch"): "broken"}


def test_an_unusable_cache_folder_means_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CROSSOVER_CACHE", str(tmp_path / "file" / "sub"))
    assert apply_verdict() is None


def test_mistakes_end_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--ops", "rms_morn"]) == 2
    assert main(["doctor", "--json", str(tmp_path / "nowhere" / "x.json")]) == 2
    text = capsys.readouterr().err
    assert "did you mean 'rms_norm'?" in text
    assert "give another --json" in text
