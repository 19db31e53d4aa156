"""Runs a module as `python -m` does, and asks it to stop when the process that started it has ended.

    python -m crossover.benchmarks.harness.attached MODULE ...

Standard input must be a pipe to which nothing is written: it ends with the process at its other end, and the module
then gets SIGTERM, as if that process had stopped it.
"""

import os
import runpy
import signal
import sys
import threading

__all__ = ["main"]


def main() -> None:
    """Runs the module that the first argument names, with the others as its own."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _stop_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
