"""A trace of some training steps by PyTorch's profiler, in which every operation has its name and its layer."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from .layers import layers_of

__all__ = ["Trace"]

_WAIT, _WARM_UP, _ACTIVE = 1, 1, 3
"""Steps of a process that are passed over (the first pays for compilation), that fill the profiler, and that stay."""


class Trace:
    """Records steps of this process into a folder, as trace-step-N.json.gz, N being the first; does nothing if off."""

    def __init__(
        self, folder: Path, model: nn.Module, *, is_on: bool, done: int = 0, say: Callable[[str], None] = print
    ) -> None:
        """Begins before the first step, `done` steps having been made earlier; `say` is told where the trace is."""
        self._folder, self._layers, self._done, self._say = folder, layers_of(model), done, say
        self._hooks = contextlib.ExitStack()
        self._profiler: profile | None = None
        if is_on:
            on_cuda = next(model.parameters()).device.type == "cuda"
            self._profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else ())],
                schedule=schedule(wait=_WAIT, warmup=_WARM_UP, active=_ACTIVE, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self._profiler.start()

    def step(self) -> None:
        """Says that a step is over."""
        if self._profiler is None:
            return
        self._profiler.step()
        if self._profiler.step_num == _WAIT + _WARM_UP:
            self._name_layers()
        if self._profiler.step_num == _WAIT + _WARM_UP + _ACTIVE:
            self.stop()

    def stop(self) -> None:
        """Ends what is not over yet; the trace has fewer steps then."""
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            self._hooks.close()
            profiler.stop()
            if profiler.step_num <= _WAIT + _WARM_UP:
                self._say(f"no trace: no step came after the first {_WAIT + _WARM_UP} of this start")

    def _name_layers(self) -> None:
        """Marks the forward pass of each layer, from now on."""
        for name, layer in self._layers.items():
            mark = record_function(name)
            for hook in (
                layer.register_forward_pre_hook(lambda *_, mark=mark: mark.__enter__() and None),
                layer.register_forward_hook(lambda *_, mark=mark: mark.__exit__(None, None, None)),
            ):
                self._hooks.callback(hook.remove)

    def _write(self, profiler: Any) -> None:
        first = self._done + _WAIT + _WARM_UP + 1
        if profiler.step_num <= _WAIT + _WARM_UP:
            return
        path = self._folder / f"trace-step-{first:08d}.json.gz"
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            profiler.export_chrome_trace(str(draft))
            trace = json.loads(draft.read_bytes())
            for private in ("host_name", "traceName"):
                trace.pop(private, None)
            for event in trace["traceEvents"]:
                if (number := str(event.get("name")).removeprefix("ProfilerStep#")).isdecimal():
                    event["name"] = f"step {self._done + int(number) + 1}"
            draft.write_bytes(gzip.compress(json.dumps(trace).encode()))
            draft.replace(path)
        except (OSError, RuntimeError, ValueError) as error:
            warnings.warn(f"no trace in {path} ({error})", RuntimeWarning, stacklevel=2)
            return
        finally:
            draft.unlink(missing_ok=True)
        self._say(f"trace of training from step {first}: {path}    https://ui.perfetto.dev opens it")
