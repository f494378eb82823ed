"""Settings of a `MaskSampler`, checked: each by itself, and those that contradict each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from multidiff.samplers.count import ADAPTIVE, SCHEDULES
from multidiff.samplers.guidance import check_guidance
from multidiff.samplers.order import BY_MODEL, BY_PLACE
from multidiff.samplers.remask import POSTERIOR, REMASKS

CACHES = ("none", "approximate_prefix", "approximate_dual")


def check_settings(settings: dict[str, Any]) -> None:
    """Raises a ValueError that names what is out of range, or the two settings that do not go together."""
    order, count, remask = settings["order"], settings["count"], settings["remask"]
    counts = (*SCHEDULES, *ADAPTIVE, "ancestral")
    orders = (*BY_MODEL, *BY_PLACE)
    choices = {"order": orders, "count": counts, "remask": REMASKS, "draw": ("inverse", "gumbel"), "cache": CACHES}
    for name, known in choices.items():
        if settings[name] not in known:
            raise ValueError(f"{name} {settings[name]!r} must be one of {', '.join(known)}")
    _check_types(settings)
    _check_ranges(settings)
    # A setting that belongs to one value of another.
    owners = {
        "exponent": ("count", ("power",)),
        **{name: ("count", (name,)) for name in ADAPTIVE},
        "eta": ("remask", ("cap", "rescale", "loop")),
        "loop": ("remask", ("loop",)),
        "edit_threshold": ("remask", ("edit",)),
    }
    for name, (owner, values) in owners.items():
        if settings[name] is not None and settings[owner] not in values:
            raise ValueError(
                f"{name} {settings[name]} goes with {owner} {' or '.join(values)}, not {settings[owner]!r}"
            )
        if settings[name] is None and settings[owner] in values and name != "loop":
            raise ValueError(f"{owner} {settings[owner]!r} needs {name}")
    clashes = {
        ("order", "order_temperature"): order == "random" and settings["order_temperature"] > 0,
        ("count", "order"): (count in ("threshold", "factor") and order != "confidence")
        or (count == "entropy_bound" and order != "entropy")
        or (count == "ancestral" and order != "random"),
        ("count", "order_temperature"): count in ADAPTIVE and settings["order_temperature"] > 0,
        ("count", "level_penalty"): count in (*ADAPTIVE, "ancestral") and settings["level_penalty"] > 0,
        ("count", "num_inference_steps"): count in ADAPTIVE and settings["num_inference_steps"] is not None,
        ("count", "block_size"): count == "ancestral" and settings["block_size"] is not None,
        ("count", "guidance_schedule"): count in ADAPTIVE and settings["guidance_schedule"] != "constant",
        ("remask", "repetition_penalty"): remask == "edit" and settings["repetition_penalty"] != 1,
        ("remask", "count"): remask in POSTERIOR and count != "ancestral",
        ("cache", "remask"): settings["cache"] != "none" and remask != "none",
        ("cache", "block_size"): settings["cache"] != "none" and settings["block_size"] is None,
        **{
            ("temperature", name): settings["temperature"] == 0 and settings[name] != neutral
            for name, neutral in (("top_k", None), ("top_p", 1.0), ("typical_p", 1.0), ("draw", "inverse"))
        },
    }
    for (first, second), clash in clashes.items():
        if clash:
            raise ValueError(f"{first} {settings[first]!r} does not go with {second} {settings[second]!r}")
    check_guidance(settings["guidance_scale"], settings["guidance_schedule"])


def _check_types(settings: dict[str, Any]) -> None:
    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def whole_numbers(value: Any) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(map(whole, value))

    def table(value: Any, of: Callable[[Any], bool]) -> bool:
        return isinstance(value, Mapping) and all(map(of, value.values()))

    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        **dict.fromkeys(
            ("temperature", "order_temperature", "level_penalty", "exponent", *ADAPTIVE), ("a number", number)
        ),
        **dict.fromkeys(("top_p", "typical_p", "eta", "edit_threshold", "repetition_penalty"), ("a number", number)),
        **dict.fromkeys(("top_k", "min_length", "max_length", "num_inference_steps"), ("a whole number", whole)),
        "block_size": ("a whole number or 'level'", lambda value: value == "level" or whole(value)),
        "loop": (
            "three numbers",
            lambda value: isinstance(value, Sequence) and len(value) == 3 and all(map(number, value)),
        ),
        "forbidden": ("a list of whole numbers", whole_numbers),
        "forced": ("a table of whole numbers", lambda value: table(value, whole)),
        "canvas": ("a table of whole numbers", lambda value: table(value, whole)),
        "guidance_scale": ("a number or a table of numbers", lambda value: number(value) or table(value, number)),
    }
    never_null = {"temperature", "order_temperature", "level_penalty", "top_p", "typical_p", "repetition_penalty"}
    for name, (kind, fits) in kinds.items():
        absent = settings[name] is None and name not in never_null | {"guidance_scale"}
        if not absent and not fits(settings[name]):
            raise ValueError(f"{name} {settings[name]!r} must be {kind}")


def _check_ranges(settings: dict[str, Any]) -> None:
    at_least = {
        **dict.fromkeys(("temperature", "order_temperature", "level_penalty", "factor", "entropy_bound"), 0),
        **dict.fromkeys(("min_length", "max_length"), 0),
        **dict.fromkeys(("num_inference_steps", "top_k", "exponent"), 1),
    }
    for name, least in at_least.items():
        if settings[name] is not None and settings[name] < least:
            raise ValueError(f"{name} {settings[name]} must be at least {least}")
    for name in ("top_p", "typical_p", "repetition_penalty"):
        if settings[name] is not None and settings[name] <= 0:
            raise ValueError(f"{name} {settings[name]} must be more than 0")
    for name in ("top_p", "typical_p", "threshold", "eta", "edit_threshold"):
        if settings[name] is not None and not 0 <= settings[name] <= 1:
            raise ValueError(f"{name} {settings[name]} must be in [0, 1]")
    if settings["block_size"] not in (None, "level") and settings["block_size"] < 1:
        raise ValueError(f"block_size {settings['block_size']} must be at least 1")
    if settings["loop"] is not None:
        t_on, t_off, plateau = settings["loop"]
        if not (0 < t_off < t_on < 1 and 0 < plateau < 1):
            raise ValueError(
                f"loop {list(settings['loop'])} must be [t_on, t_off, α] with 0 < t_off < t_on < 1, 0 < α < 1"
            )
    least, most = settings["min_length"], settings["max_length"]
    if least is not None and most is not None and least > most:
        raise ValueError(f"min_length {least} is more than max_length {most}")


def check_ids(settings: Mapping[str, Any], size: int, number: int, *, ends: bool) -> None:
    """Raises a ValueError for ids, places and lengths that the codes to fill in do not have.

    Args:
        settings: of a `MaskSampler`.
        size: V, number of ids.
        number: of codes to fill in, in the row that has most.
        ends: whether their content may end before their room does.
    """
    forbidden, forced = set(settings["forbidden"] or ()), settings["forced"] or {}
    for name, ids in (("forbidden", forbidden), ("forced", forced.values())):
        for token in ids:
            if not 0 <= token < size:
                raise ValueError(f"{name}: no code is called {token}; there are 0 to {size - 1}")
    if len(forbidden) == size:
        raise ValueError(f"forbidden leaves none of the {size} codes to draw, which temperature and top_p choose from")
    for place, token in forced.items():
        if not 0 <= int(place) < number:
            raise ValueError(f"forced: place {place} is none of the {number} codes to fill in, 0 to {number - 1}")
        if token in forbidden:
            raise ValueError(f"forced wants code {token} at place {place}, which forbidden rules out")
    for name in ("min_length", "max_length"):
        if settings[name] is not None and not ends:
            raise ValueError(f"{name} {settings[name]} needs codes whose length varies; here canvas says it")
