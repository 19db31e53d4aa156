"""State that survives a resume."""

import json

from crossover.train.run_directory import RunState


def test_a_state_comes_back_from_its_file() -> None:
    state = RunState(step=3, tokens=70, stopwatch={"seconds": 1.5}, validation={"step": 2, "loss": 0.5}, sample="x")
    stored = json.loads(json.dumps({"step": 3, "experiment": {}, "rng": {}, **state.to_dict()}))
    assert RunState.from_dict(stored) == state


def test_a_state_of_earlier_versions_has_unknown_tokens_and_the_names_of_today() -> None:
    old = {"step": 2, "validation": {"step": 2, "loss": 0.5, "n_bytes": 9}, "sample": None, "peak_bytes": 7}
    state = RunState.from_dict(old | {"stopwatch": {"seconds": 1.0}})
    assert state.tokens is None
    assert state.validation == {"step": 2, "loss": 0.5, "bytes": 9}
    assert state.peak_bytes == 7
