"""Other people's mixers, ffns, presets and objectives: modules named by `--import`, and installed plug-ins.

A module registers what it brings when it is imported (`register_mixer`, `register_ffn` and `register_preset` of
crossover.archs, `register_objective` of crossover.train). An installed package does the same for every command by an
entry point of the group `crossover.plugins`: a module, or a function without arguments, which is called.

Only a command line and installed packages name modules. A run folder records which ones it was made with, so that what
opens it can say what is missing; nothing is ever imported because a file says so.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from ..files import read_json
from ..options import shown

__all__ = ["GROUP", "HELP", "explaining", "imported", "load", "record", "registered", "take", "words"]

GROUP = "crossover.plugins"

HELP = (
    "--import MODULE, as often as needed, first imports a module that registers mixers, ffns, presets or objectives of "
    "your own; as with python -m, it is found in the current directory too."
)

_imported: list[str] = []
_plugins: dict[tuple[str, str], str] = {}


def take(command_line: Sequence[str]) -> list[str]:
    """Loads installed plug-ins and the modules of every --import, and returns the other words.

    Raises:
        ValueError: naming the module, or the plug-in and its package, that cannot be loaded, or a word that is not
            text.
    """
    modules, others, given = [], [], iter(command_line)
    if foreign := next(filter(_has_foreign_bytes, command_line), None):
        raise ValueError(
            f"{shown(foreign)} is not text in the encoding of this locale: use a UTF-8 one, such as LC_ALL=C.UTF-8"
        )
    for word in given:
        option, equals, value = word.partition("=")
        if option != "--import":
            others.append(word)
        else:
            modules.append(value if equals else next(given, ""))
    load(modules)
    return others


def _has_foreign_bytes(word: str) -> bool:
    """Whether a word holds bytes that are no text, which could stand in no file that is written."""
    return any("\udc80" <= character <= "\udcff" for character in word)


def load(modules: Sequence[str] = ()) -> None:
    """Loads installed plug-ins and some modules, each once.

    Raises:
        ValueError: as in `take`.
    """
    for point in entry_points(group=GROUP):
        if (point.name, point.value) not in _plugins:
            package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
            try:
                plugin = point.load()
                if not isinstance(plugin, ModuleType):
                    plugin()
            except (Exception, SystemExit) as error:
                raise ValueError(
                    f"the plug-in {point.name} of the installed package {package} cannot be loaded ({_said(error)}): "
                    f"repair or uninstall it; python -c 'import {point.module}' may tell more"
                ) from error
            _plugins[point.name, point.value] = package
    for module in modules:
        if module not in _imported:
            _import(module)
            _imported.append(module)


def _import(module: str) -> None:
    if module.endswith(".py") or not all(part.isidentifier() for part in module.split(".")):
        stem = Path(module).stem
        example = stem if stem.isidentifier() else "my_mixer"
        raise ValueError(f"--import {module!r} is not the name of a module, such as {example}")
    here = os.getcwd()
    if here not in map(os.path.abspath, sys.path):
        sys.path.insert(0, here)
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:
        packages = [".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 2)]
        if isinstance(error, ModuleNotFoundError) and error.name in packages:
            raise ValueError(f"--import {module}: no such module in {here} or among those installed") from None
        raise ValueError(
            f"--import {module} failed ({_said(error)}): python -c 'import {module}' shows where"
        ) from error


def _said(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    return ": ".join(filter(None, (type(error).__name__, str(error).strip().partition("\n")[0])))


def imported() -> list[str]:
    """The modules that this process was told to import."""
    return [*_imported]


def words() -> list[str]:
    """The words by which a child command imports them too."""
    return [word for module in _imported for word in ("--import", module)]


def record() -> dict[str, Any]:
    """What run.json says: modules imported, and packages whose plug-ins were loaded."""
    return {"imports": imported(), "plugins": sorted(set(_plugins.values()))}


def registered(what: str) -> list[str]:
    """Names of the presets or objectives that these modules brought; asking loads nothing."""
    if not (_imported or _plugins):
        return []
    from ..archs import registry

    return registry.registered(what)


@contextlib.contextmanager
def explaining(*folders: Path, otherwise: str = "") -> Iterator[None]:
    """Adds to the message about an unknown name what the maker of a folder had imported and this process has not.

    Args:
        folders: of the run, or of the comparison; the first that says anything counts.
        otherwise: added where none does.
    """
    from ..archs.registry import UnknownName

    try:
        yield
    except UnknownName as error:
        raise UnknownName(f"{error}{_missing(folders) or otherwise}") from None


def _missing(folders: Sequence[Path]) -> str:
    names = ("run.json", "compare.json", "*/run.json")
    path = next((path for folder in folders for name in names for path in sorted(folder.glob(name))), None)
    if path is None:
        return ""
    found: Any = None
    with contextlib.suppress(ValueError, OSError):  # whoever opens that file will say so
        found = read_json(path).get("provenance")
    found = found if isinstance(found, Mapping) else {}
    imports = [name for name in _texts(found.get("imports"), r"[\w.]+") if name not in _imported]
    packages = [name for name in _texts(found.get("plugins"), r"[\w. +-]+") if name not in _plugins.values()]
    if not imports and not packages:
        return ""
    remedies = [f"--import {name}" for name in imports] + [f"{name} installed" for name in packages]
    return f"; {path} was made with {' and '.join(remedies)}: do the same if you trust that code"


def _texts(value: Any, form: str) -> list[str]:
    texts = value if isinstance(value, list) else []
    return [text for text in texts if isinstance(text, str) and re.fullmatch(form, text, flags=re.ASCII)]
