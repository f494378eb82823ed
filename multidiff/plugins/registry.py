"""Finds tokenizers by entry point `multidiff.tokenizers`; imports one only when it is asked for.

A plugin is a class that some installed distribution names:

    [project.entry-points."multidiff.tokenizers"]
    midi = "my_package:MidiTokenizer"

First-party tokenizers come through the same door.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from multidiff.tokenizer import ModalityTokenizer

GROUP = "multidiff.tokenizers"


@dataclass(frozen=True)
class Report:
    """What is known of an installed plugin.

    Attributes:
        name: of its entry point.
        package, version: of its distribution; "?" where an entry point has none.
        modality: of its class; "" where that cannot be used or does not say.
        problem: why it cannot be used; None where it can.
    """

    name: str
    package: str
    version: str
    modality: str = ""
    problem: str | None = None


def names() -> set[str]:
    """Plugin names in use, nothing imported."""
    return {point.name for point in entry_points(group=GROUP)}


def is_ours(module: str) -> bool:
    """Whether a module of this name belongs to multidiff or to an installed plugin; nothing is imported."""
    package = module.split(".")[0]
    known = {"multidiff", *(point.module.split(".")[0] for point in entry_points(group=GROUP))}
    return package in known or package.startswith("multidiff_")


def survey() -> list[Report]:
    """Every installed plugin, each imported by itself: one that cannot be used is reported and stops no other.

    None is built: that can take seconds, weights and arguments that only a configuration knows.
    """
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    return [_report(point, [other for other in points if other.name == point.name]) for point in points]


def _report(point: EntryPoint, claims: list[EntryPoint]) -> Report:
    package, version = (point.dist.name, point.dist.version) if point.dist else ("?", "?")
    others = [_origin(other) for other in claims if other.value != point.value]
    try:
        cls = _class_of(point)
    except (ImportError, ValueError) as error:
        return Report(point.name, package, version, problem=str(error))
    problem = f"{' and '.join(others)} has the same name; uninstall one of them" if others else None
    return Report(point.name, package, version, getattr(cls, "modality", ""), problem)


def installed() -> dict[str, EntryPoint]:
    """Entry points by plugin name, nothing imported.

    Raises:
        ValueError: two distributions claim one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise ValueError(
                f"two plugins are called {point.name!r}: {_origin(other)} and {_origin(point)}; uninstall one of them"
            )
    return dict(sorted(found.items()))


def load(name: str) -> type[ModalityTokenizer]:
    """The class of plugin `name`.

    Raises:
        ValueError: no such plugin (the message names the nearest), or it is no `ModalityTokenizer`, or an abstract one.
        ImportError: the plugin does not import; the message says which and why.
    """
    points = installed()
    if name not in points:
        near = get_close_matches(name, points, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"installed: {', '.join(points) or 'none'}"
        raise ValueError(f"no tokenizer plugin is called {name!r}; {hint} (`multidiff plugins` lists them)")
    return _class_of(points[name])


def _class_of(point: EntryPoint) -> type[ModalityTokenizer]:
    try:
        cls = point.load()
    except (Exception, SystemExit) as error:
        raise ImportError(f"plugin {point.name!r} ({_origin(point)}) does not import: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, ModalityTokenizer)):
        raise ValueError(f"plugin {point.name!r} ({_origin(point)}) is not a multidiff.ModalityTokenizer")
    if lacking := sorted(cls.__abstractmethods__):
        raise ValueError(f"plugin {point.name!r} ({_origin(point)}) is abstract: it does not have {', '.join(lacking)}")
    return cls


def name_of(tokenizer: ModalityTokenizer) -> str:
    """The plugin name under which `tokenizer`'s class is installed; `ValueError` when it has none."""
    package = type(tokenizer).__module__.split(".")[0]
    # Those of its own package first: another package may export the class as well, but takes time to import.
    for name, point in sorted(installed().items(), key=lambda pair: pair[1].module.split(".")[0] != package):
        try:
            if _class_of(point) is type(tokenizer):
                return name
        except (ImportError, ValueError):  # of another plugin; `multidiff plugins` reports it
            continue
    raise ValueError(
        f"{type(tokenizer).__name__} is not installed as a plugin, so a saved model could not be loaded again; "
        f"give it an entry point in group {GROUP!r}"
    )


def build(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, ModalityTokenizer]:
    """Tokenizers from their configuration.

    Args:
        specs: name -> {"plugin": entry-point name, and either "folder": a saved tokenizer, or the arguments of the
            class}. The name is the tokenizer's key everywhere.
    """
    tokenizers = {}
    for name, spec in specs.items():
        arguments = dict(spec)
        try:
            cls = load(arguments.pop("plugin"))
        except KeyError:
            raise ValueError(f"tokenizer {name!r} names no plugin: write `{name}: {{plugin: …}}`") from None
        folder = arguments.pop("folder", None)
        if folder is not None and arguments:
            raise ValueError(f"tokenizer {name!r}: `folder` holds all its settings; remove {', '.join(arguments)}")
        try:
            tokenizers[name] = cls.load(Path(folder)) if folder is not None else cls(**arguments)
        except TypeError as error:
            raise ValueError(f"tokenizer {name!r} (plugin {spec['plugin']!r}): {error}") from error
    return tokenizers


def _origin(point: EntryPoint) -> str:
    return f"{point.value} of {point.dist.name} {point.dist.version}" if point.dist else point.value
