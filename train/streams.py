"""Standard output and error of a command, which never end its work: a reader that goes away, a full disk, a terminal
that is closed, one that knows no Unicode. Importing it is cheap.
"""

import codecs
import contextlib
import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

__all__ = ["lasting_streams", "one_line_warnings"]

_PLAIN = {
    "\u2013": "-", "\u2014": "-", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "...",
    "\u2190": "<-", "\u2192": "->", "\u00b1": "+-", "\u00b7": ".", "\u00d7": "x", "\u2020": "+", "\u2022": "*",
    "\u2500": "-", "\u2501": "-", "\u2550": "-", "\u2574": "-", "\u2576": "-", "\u2578": "-", "\u257a": "-",
    "\u2502": "|", "\u2503": "|", "\u2551": "|", "\u2264": "<=", "\u2265": ">=",
}  # fmt: skip


def lasting_streams() -> None:
    """Gives a command streams to which it can always print.

    Where nothing more can be written to standard output, one warning says so on standard error, and what is printed
    from then on is lost. Characters that a stream's encoding lacks are written with others. What stands in for the
    streams (in tests, in notebooks) is left alone.
    """
    closed = _open_closed()
    codecs.register_error("crossover.plain", _plain)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream: Any = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        if stream is not None:
            stream.flush()
        made = io.TextIOWrapper(
            io.BufferedWriter(_Lasting(descriptor)),
            encoding=getattr(stream, "encoding", "utf-8"),
            errors="crossover.plain",
            line_buffering=name == "stderr" or getattr(stream, "line_buffering", False),
            write_through=getattr(stream, "write_through", False),
        )
        setattr(sys, name, made)
        setattr(sys, f"__{name}__", made)
    if 1 in closed:
        _warn("it is closed")


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Shows warnings without the source line, which tells a user nothing."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _open_closed() -> list[int]:
    """Opens those of the three standard descriptors that are closed, or the next file would take their place."""
    closed = []
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            closed.append(descriptor)
            _to_nowhere(descriptor)
    return closed


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == descriptor:
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _warn(reason: str) -> None:
    print(f"warning: standard output is given up ({reason}); the work goes on", file=sys.stderr)


class _Lasting(io.FileIO):
    """A descriptor that is written to as long as it can be."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            _to_nowhere(self.fileno())
            if self.fileno() == 1:
                _warn("nobody reads it" if error.errno == errno.EPIPE else error.strerror or str(error))
            return len(data)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters by plain ones, and those of no likeness by their number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found), error.end
