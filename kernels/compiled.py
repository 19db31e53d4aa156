"""Compiles kernels with numba for the processor at hand: each when it is first called, and once on a machine.

Machine code is kept in $NUMBA_CACHE_DIR, else in `kernels` in the user's cache folder (see files.cache_home), a file
for each kernel under the digest of all that the code depends on: another clone or environment with the same sources,
versions and processor finds it. Files can be deleted at any time. Where nothing can be written every process compiles.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, ParamSpec, cast

import llvmlite
import numba
import numpy as np
from filelock import FileLock, Timeout
from numba.core import config, types
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher, cpu_target
from numba.core.serialize import dumps

from ..files import cache_home

P = ParamSpec("P")

TARGET: tuple[str, str, str] = cast(Any, cpu_target).target_context.codegen().magic_tuple()
"""Describes what numba compiles for: system, processor, and its features as "+avx2,-avx512f,..."."""

cast(Any, cpu_target).target_context.refresh()  # before any kernel does it: what imports this and then forks pays once

Floats1 = Floats2 = Floats3 = Floats4 = Bools2 = np.ndarray
"""Annotations of a kernel's arrays: what is in them and the number of axes. Strides are free, but see `simd.load`."""

_NUMBA_TYPES = {
    "int": types.int64,
    "float": types.float32,
    "bool": types.boolean,
    **{f"Floats{n}": types.Array(types.float32, n, "A") for n in range(1, 5)},
    "Bools2": types.Array(types.boolean, 2, "A"),
}

KEPT = 16
"""Files of a kernel, the last used ones: of other versions, processors and clones."""

_PATIENCE = 60.0
"""Seconds to wait for another process that compiles the same kernel, before doing it too."""

SHARED = ("blocks.py", "chunks.py", "compiled.py", "products.py", "simd.py", "step/instruction.py")
"""Files of this folder that kernels may take code and numbers from, besides their own."""


@functools.cache
def _of_all() -> bytes:
    """What the code of every kernel depends on: our shared sources, versions, the processor, numba's settings."""
    settings = [getattr(config, name) for name in ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK")]
    versions = (sys.implementation.cache_tag, numba.__version__, llvmlite.__version__)
    sources = [(Path(__file__).parent / name).read_bytes() for name in SHARED]
    return repr((sources, versions, TARGET, settings)).encode()


class _File:
    """The machine code of one kernel on disk, in the place of numba's cache: the digest of a pickle, and the pickle.

    What was cut short or damaged counts as absent: it is compiled and written again.
    """

    def __init__(self, function: FunctionType) -> None:
        """Raises OSError if the function's source cannot be read."""
        source = Path(function.__code__.co_filename).read_bytes()
        self._kernel = f"{function.__module__}.{function.__qualname__}"
        self._digest = hashlib.sha256(b"\0".join((self._kernel.encode(), source, _of_all()))).hexdigest()[:32]

    @property
    def cache_path(self) -> str:
        """The folder, as numba calls it; it begins with ~ where there is no home."""
        return os.path.expanduser(os.environ.get("NUMBA_CACHE_DIR") or cache_home() / "kernels")

    @property
    def path(self) -> Path:
        """The file, whether or not it is there; an OSError without a home."""
        if self.cache_path.startswith("~"):
            raise FileNotFoundError(errno.ENOENT, "there is no home folder", self.cache_path)
        return Path(self.cache_path, f"{self._kernel}-{self._digest}.bin")

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        """Reads what `save_overload` wrote."""
        try:
            data = self.path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)  # it is in use
        target_context.refresh()
        return CompileResult._rebuild(target_context, *pickle.loads(data[32:]))

    def save_overload(self, sig: Any, cres: Any) -> None:
        """Writes the code, unless the disk is full or the folder read-only, and removes what was not used for long."""
        data = dumps(cres._reduce())
        with contextlib.suppress(OSError):
            path = self.path
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f"{self._kernel}-", suffix=".tmp")
            try:
                with open(descriptor, "wb") as file:
                    file.write(hashlib.sha256(data).digest() + data)
                os.replace(draft, path)
            finally:
                Path(draft).unlink(missing_ok=True)
            files = path.parent.glob(f"{glob.escape(self._kernel)}-*")
            for old in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)[KEPT:]:
                old.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lets one process at a time compile what is not there, and the others find it."""
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError, NotImplementedError, Timeout):
                if not (path := self.path).exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    held.enter_context(FileLock(path.with_name(f"{self._kernel}.lock"), timeout=_PATIENCE))
            yield


_Dispatcher = cast(Any, CPUDispatcher)


class Kernel(_Dispatcher):
    """A function that is compiled for the types it is annotated with, which releases the GIL."""

    def __init__(self, function: FunctionType) -> None:
        super().__init__(function, targetoptions={"nopython": True, "nogil": True, "error_model": "numpy"})
        arguments = [_NUMBA_TYPES[name] for name in function.__annotations__.values() if name != "None"]
        self._types = types.void(*arguments)
        with contextlib.suppress(OSError):
            self._cache = _File(function)

    @property
    def is_made(self) -> bool:
        """Whether it can be called without compiling it or reading it from the disk."""
        return not self._can_compile

    def make(self) -> CompileResult:
        """Compiles it, or reads it from the disk, unless that has been done."""
        with self._cache.locked() if isinstance(self._cache, _File) else contextlib.nullcontext(), global_compiler_lock:
            if self._can_compile:  # no other thread was first
                self.compile(self._types)
                self.disable_compile()
        (code,) = self.overloads.values()
        return code

    def _compile_for_args(self, *args: Any, **kws: Any) -> Kernel:
        """What to call instead, as numba asks where it has no code for the arguments."""
        self.make()
        return self


def kernel(function: Callable[P, None]) -> Callable[P, None]:
    """Makes a kernel of a function whose annotations are int, float, bool, or the arrays above."""
    assert isinstance(function, FunctionType)
    return cast(Any, Kernel(function))


inline = numba.njit(forceinline=True, error_model="numpy")
"""Decorates a function of vectors, which becomes part of the kernels that call it."""


class _Called(_Dispatcher):
    """A function that is compiled once for each combination of types, where numba would for each constant too."""

    def get_call_template(self, args: Any, kws: Any) -> Any:
        return super().get_call_template(tuple(types.unliteral(arg) for arg in args), kws)


def called(function: Callable[..., Any]) -> Any:
    """Decorates a function of arrays, which kernels call."""
    return _Called(function, targetoptions={"nopython": True, "error_model": "numpy"})
