"""Every operation on the CPU agrees with its definition, values and gradients, at sizes drawn at random.

`make fuzz` draws some 10,000: up to several vectors of channels and several chunks of tokens, and what lies between.
"""

import os
from typing import Any

import pytest
from crossover.kernels import ops
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ..kernels.test_ops import check_float32

MORE = int(os.environ.get("FUZZ", "1"))
IMPLEMENTATIONS = [
    (name, backend) for name, op in ops.OPS.items() for backend in op.backends if backend in ("torch", "cpu")
]
EACH = -(-100 * MORE // len(IMPLEMENTATIONS))


@pytest.mark.fuzz
@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
@settings(max_examples=EACH, phases=(Phase.explicit, Phase.generate))
@given(
    B=st.integers(1, 4),
    L=st.integers(1, 12) | st.integers(1, 150),
    E=st.integers(1, 9) | st.integers(1, 70),
    N=st.integers(2, 7) | st.integers(2, 40),
    optional=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_size_gives_what_the_definition_says(name: str, backend: str, **drawn: Any) -> None:
    # of so many, some are ill-conditioned: an LSTM that amplifies, a norm of one channel, a softmax over one key
    check_float32(name, backend, **drawn, factor=8)
