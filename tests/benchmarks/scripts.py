"""Scripts in the place of what a child process is to do."""

from typing import Any


class Script:
    """Given to a `Child` as its work, runs these lines there, which see `order` and `parent`."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines
        self.text = "\n".join(("import os, signal, sys, time", *lines))

    def __reduce__(self) -> tuple[Any, ...]:
        # pickled as a call, so that the child needs none of the tests' modules
        return eval, (f"lambda order, parent: exec({self.text!r}, {{'order': order, 'parent': parent}})",)

    def __call__(self, *_: object) -> None:
        raise AssertionError("runs in a child only")
