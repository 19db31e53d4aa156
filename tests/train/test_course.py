import random

import pytest
from crossover.train.config import TrainConfig
from crossover.train.course import Course

pytestmark = pytest.mark.quick


def courses(train: TrainConfig, durations: list[float]) -> list[Course]:
    """Where a run is after each of its steps, up to its end."""
    found = [Course(train=train)]
    for seconds in durations:
        last = found[-1]
        if last.is_over:
            break
        found.append(Course(train=train, step=last.step + 1, seconds=last.seconds + seconds, before=last.seconds))
    return found


def test_a_time_ends_within_the_step_in_which_it_runs_out_and_each_part_of_it_is_noticed_once() -> None:
    draw = random.Random(0)
    for scale in (0.3, 0.9, 2.5, 40.0):
        durations = [draw.uniform(0.1, 1.0) * scale for _ in range(1000)]
        found = courses(TrainConfig(seconds=10.0, steps=3), durations)
        assert found[-1].before < 10.0 <= found[-1].seconds
        assert not any(course.is_beyond for course in found)
        ends = [course.seconds for course in found if course.is_due(1, parts=5)]
        passed = [min(course.seconds for course in found if course.seconds >= time) for time in (2, 4, 6, 8)]
        assert ends == sorted({*passed, found[-1].seconds})
        assert [course for course in found if course.is_due(0, parts=5)] == found[-1:]


def test_without_a_time_steps_decide() -> None:
    found = courses(TrainConfig(steps=7), [100.0] * 20)
    assert len(found) == 1 + 7
    assert [course.step for course in found if course.is_due(3, parts=5)] == [3, 6, 7]
    assert found[2].ticks == (2, 7)
    assert (found[2].words, found[2].seconds_left(3.0)) == ("step 2/7", 15.0)
