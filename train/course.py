"""How long a run trains: a number of steps, or a time. Nothing else knows which of the two it is."""

from __future__ import annotations

from dataclasses import dataclass

from .config import TrainConfig

__all__ = ["Course"]

_TICKS = 10**6
"""Parts into which schedules divide a time."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """Where a run is in its training, which is `train.steps` long or, where it is given, `train.seconds`."""

    train: TrainConfig
    step: int = 0
    """Updates made."""
    seconds: float = 0.0
    """Seconds of training that they took."""
    before: float = 0.0
    """The same before the last of them."""
    has_arrived: bool = False
    """Whether the score is as good as `train.stop_at` asks for."""

    @property
    def share(self) -> float:
        """The part that is behind; a time is overrun by less than a step."""
        return self.seconds / self.train.seconds if self.train.seconds else self.step / self.train.steps

    @property
    def is_over(self) -> bool:
        """Whether training ends here: at the last step, at the end of the one in which the time ran out, or before."""
        return self.has_arrived or self.share >= 1

    @property
    def is_beyond(self) -> bool:
        """Whether training would have ended earlier."""
        return self.before >= self.train.seconds if self.train.seconds else self.step > self.train.steps

    @property
    def ticks(self) -> tuple[int, int]:
        """Place and length in whole numbers, as schedules take them: in steps, or in millionths of the time."""
        return (int(self.share * _TICKS), _TICKS) if self.train.seconds else (self.step, self.train.steps)

    @property
    def words(self) -> str:
        """Place and length as text."""
        if self.train.seconds:
            return f"step {self.step}, {self.seconds:.0f} of {self.train.seconds:g} s"
        return f"step {self.step}/{self.train.steps}"

    def is_due(self, every: int, *, parts: int | None = None) -> bool:
        """Whether something happens now that happens each `every` steps; 0: at the end only.

        With `parts`, and where training has a time, it happens after each of so many equal parts of that instead.
        """
        if self.is_over or not every:
            return self.is_over
        if parts is None or not self.train.seconds:
            return self.step > 0 and self.step % every == 0
        part = self.train.seconds / parts
        return self.seconds // part > self.before // part

    def seconds_left(self, seconds_per_step: float) -> float:
        """Seconds of training that are still to come."""
        if self.train.seconds:
            return max(0.0, self.train.seconds - self.seconds)
        return (self.train.steps - self.step) * seconds_per_step
