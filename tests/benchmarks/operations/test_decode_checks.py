from __future__ import annotations

import pytest
from crossover.archs import Decoder
from crossover.benchmarks.operations import decode_checks
from torch import Tensor


@pytest.fixture(autouse=True)
def _two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_checks, "available", lambda: ("transformer", "mamba"))


def test_the_compiled_step_is_as_near_to_float64_as_the_modules() -> None:
    assert [(check.dtype, check.status) for check in decode_checks.decode_checks()] == [
        ("float32", "ok"),
        ("bfloat16", "ok"),
    ]


def test_a_compiled_step_that_is_wrong_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Decoder.__call__

    def wrong(self: Decoder, tokens: Tensor) -> Tensor:
        return decode(self, tokens) * 1.1

    monkeypatch.setattr(Decoder, "__call__", wrong)
    for check in decode_checks.decode_checks():
        assert (check.op, check.backend, check.status) == ("decode", "cpu", "failed")
        assert "are off by" in (check.reason or "")
