"""Checks of one setting's kind and range. Each raises a `ValueError` that names the setting and its value.

The parts of a sampler call these for their own settings, so a check exists once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

LARGEST = 1_000_000  # Beyond it, products of settings and log-probabilities leave the range of floats.
_LIMIT = f"at most {LARGEST:,}"


def check_known(settings: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """All keys of `settings` must be known ones. `where` is the file and key that they come from."""
    for key in settings:
        if key not in known:
            near = get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise ValueError(f"{where}: no sampler setting is called {key!r}; {hint}")


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """`value` must be one of `known`."""
    if value not in known:
        raise ValueError(f"{name} {value!r} must be one of {', '.join(known)}")


def check_number(
    name: str, value: Any, least: float | None = None, above: float | None = None, most: float | None = None
) -> None:
    """`value` must be a finite number.

    Args:
        name: the setting.
        value: its value.
        least: the least value that is allowed; None allows any.
        above: a bound that `value` must exceed; None sets none.
        most: the largest value that is allowed; None is `LARGEST`. Only settings in [0, 1] have one.
    """
    if not is_number(value):
        raise ValueError(f"{name} {value!r} must be a number, {_LIMIT}")
    if above is not None and value <= above:
        raise ValueError(f"{name} {value} must be more than {above}")
    if most is not None and not 0 <= value <= most:
        raise ValueError(f"{name} {value} must be in [0, {most}]")
    if least is not None and value < least:
        raise ValueError(f"{name} {value} must be at least {least}")


def check_whole_number(name: str, value: Any, least: int, other: str = "") -> None:
    """`value` must be a whole number of at least `least`; `other` says what else it might have been."""
    if not is_whole_number(value):
        raise ValueError(f"{name} {value!r} must be a whole number{f' or {other}' if other else ''}, {_LIMIT}")
    if value < least:
        raise ValueError(f"{name} {value} must be at least {least}")


def check_whole_numbers(name: str, value: Any) -> None:
    """`value` must be a list of whole numbers."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(map(is_whole_number, value)):
        raise ValueError(f"{name} {value!r} must be a list of whole numbers, {_LIMIT}")


def check_table(name: str, value: Any) -> None:
    """`value` must be a table of whole numbers."""
    if not isinstance(value, Mapping) or not all(map(is_whole_number, value.values())):
        raise ValueError(f"{name} {value!r} must be a table of whole numbers, {_LIMIT}")


def check_owner(
    name: str, value: Any, owner: str, owner_value: str, owner_values: Sequence[str], required: bool = True
) -> None:
    """A setting that belongs to some values of another: None everywhere else, and given there if `required`."""
    if value is not None and owner_value not in owner_values:
        raise ValueError(f"{name} {value} goes with {owner} {' or '.join(owner_values)}, not {owner_value!r}")
    if value is None and required and owner_value in owner_values:
        raise ValueError(f"{owner} {owner_value!r} needs {name}")


def refuse(first: tuple[str, Any], second: tuple[str, Any]) -> None:
    """Raises a `ValueError` for two settings, given as (name, value), that contradict each other."""
    raise ValueError(f"{first[0]} {first[1]!r} does not go with {second[0]} {second[1]!r}")


def is_number(value: Any) -> bool:
    """Whether `value` is a number that a setting may have. NaN is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_whole_number(value: Any) -> bool:
    """Whether `value` is a whole number that a setting may have."""
    return is_number(value) and isinstance(value, int)
