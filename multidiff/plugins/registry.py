"""Finds tokenizers by the entry point `multidiff.tokenizers`, and imports one only when it is needed.

A plugin is a class that an installed distribution names in its `pyproject.toml`:

    [project.entry-points."multidiff.tokenizers"]
    midi = "my_package:MidiTokenizer"

The tokenizers that multidiff ships are found in the same way.
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
    """The state of an installed plugin.

    Attributes:
        name: the name of its entry point.
        package, version: its distribution; "?" if the entry point has none.
        modality: the modality of its class; "" if the class cannot be used or has none.
        problem: why the plugin cannot be used; None if it works.
    """

    name: str
    package: str
    version: str
    modality: str = ""
    problem: str | None = None


def names() -> set[str]:
    """The names of the installed plugins. Nothing is imported."""
    return {point.name for point in entry_points(group=GROUP)}


def is_ours(module: str) -> bool:
    """Whether a module with this name belongs to multidiff or to an installed plugin. Nothing is imported."""
    package = module.split(".")[0]
    known = {"multidiff", *(point.module.split(".")[0] for point in entry_points(group=GROUP))}
    return package in known or package.startswith("multidiff_")


def survey() -> list[Report]:
    """The state of every installed plugin. A plugin that cannot be used does not affect the others.

    The plugins are imported but not instantiated, which may need weights and arguments from a configuration.
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
    problem = f"{' and '.join(others)} has the same name. Uninstall one of them." if others else None
    return Report(point.name, package, version, getattr(cls, "modality", ""), problem)


def installed() -> dict[str, EntryPoint]:
    """The entry points by plugin name. Nothing is imported.

    Raises:
        ValueError: two distributions use the same name.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise ValueError(
                f"Two plugins are called {point.name!r}: {_origin(other)} and {_origin(point)}. Uninstall one of them."
            )
    return dict(sorted(found.items()))


def load(name: str) -> type[ModalityTokenizer]:
    """The class of the plugin `name`.

    Raises:
        ValueError: there is no such plugin (the message suggests the nearest name), or its class is not a
            `ModalityTokenizer`, or is abstract.
        ImportError: the plugin cannot be imported; the message says why.
    """
    points = installed()
    if name not in points:
        near = get_close_matches(name, points, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"The installed plugins are {', '.join(points) or 'none'}."
        raise ValueError(f"There is no tokenizer plugin {name!r}. {hint} Run `multidiff plugins` to list them.")
    return _class_of(points[name])


def _class_of(point: EntryPoint) -> type[ModalityTokenizer]:
    try:
        cls = point.load()
    except (Exception, SystemExit) as error:
        raise ImportError(f"plugin {point.name!r} ({_origin(point)}) cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, ModalityTokenizer)):
        raise ValueError(f"plugin {point.name!r} ({_origin(point)}) is not a multidiff.ModalityTokenizer")
    if lacking := sorted(cls.__abstractmethods__):
        raise ValueError(f"plugin {point.name!r} ({_origin(point)}) is abstract: it lacks {', '.join(lacking)}")
    return cls


def name_of(tokenizer: ModalityTokenizer) -> str:
    """The name of the plugin to which a tokenizer's class belongs. Raises a `ValueError` if there is none."""
    package = type(tokenizer).__module__.split(".")[0]
    # Its own package first. Other packages may export the class as well, but importing them takes time.
    for name, point in sorted(installed().items(), key=lambda pair: pair[1].module.split(".")[0] != package):
        try:
            if _class_of(point) is type(tokenizer):
                return name
        except (ImportError, ValueError):  # another plugin is broken; `multidiff plugins` reports it
            continue
    raise ValueError(
        f"{type(tokenizer).__name__} is not installed as a plugin, so a saved model could not be loaded again. "
        f"Add an entry point to the group {GROUP!r}."
    )


def build(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, ModalityTokenizer]:
    """Instantiate tokenizers from their configuration.

    Args:
        specs: for each tokenizer name, {"plugin": name of the plugin}, and in addition either {"folder": folder of a
            saved tokenizer} or the arguments of the class.

    Raises:
        ValueError: a configuration is wrong; the message names the tokenizer.
    """
    tokenizers = {}
    for name, spec in specs.items():
        arguments = dict(spec)
        try:
            cls = load(arguments.pop("plugin"))
        except KeyError:
            raise ValueError(f"tokenizer {name!r} has no plugin. Write `{name}: {{plugin: …}}`.") from None
        folder = arguments.pop("folder", None)
        if folder is not None and arguments:
            raise ValueError(
                f"tokenizer {name!r}: The folder already contains all settings. Remove {', '.join(arguments)}."
            )
        try:
            tokenizers[name] = cls.load(Path(folder)) if folder is not None else cls(**arguments)
        except TypeError as error:
            raise ValueError(f"tokenizer {name!r} (plugin {spec['plugin']!r}): {error}") from error
    return tokenizers


def _origin(point: EntryPoint) -> str:
    return f"{point.value} of {point.dist.name} {point.dist.version}" if point.dist else point.value
