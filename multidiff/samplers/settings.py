"""Settings of a `MaskSampler`, checked: each by itself, and those that contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from multidiff.samplers.guidance import check_guidance
from multidiff.samplers.order import BY_MODEL, BY_PLACE
from multidiff.samplers.remasking import POSTERIOR, REMASKS
from multidiff.samplers.unmasking import ADAPTIVE, SCHEDULES

LARGEST = 1_000_000  # beyond it, products of settings and log-probabilities leave the range of floats
CACHES = ("none", "approximate_prefix", "approximate_dual")


def check_settings(settings: dict[str, Any]) -> None:
    """Raises a ValueError that names what is out of range, or the two settings that do not go together."""
    order, unmasking, remask = settings["order"], settings["unmasking"], settings["remask"]
    unmaskings = (*SCHEDULES, *ADAPTIVE, "ancestral")
    orders = (*BY_MODEL, *BY_PLACE)
    choices = {
        "order": orders,
        "unmasking": unmaskings,
        "remask": REMASKS,
        "draw": ("inverse", "gumbel"),
        "cache": CACHES,
    }
    for name, known in choices.items():
        if settings[name] not in known:
            raise ValueError(f"{name} {settings[name]!r} must be one of {', '.join(known)}")
    _check_types(settings)
    _check_ranges(settings)
    # A setting that belongs to one value of another.
    owners = {
        "exponent": ("unmasking", ("power",)),
        **{name: ("unmasking", (name,)) for name in ADAPTIVE},
        "eta": ("remask", ("cap", "rescale", "loop")),
        "loop": ("remask", ("loop",)),
        "editing_threshold": ("remask", ("edit",)),
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
        ("unmasking", "order"): (unmasking in ("threshold", "factor") and order != "confidence")
        or (unmasking == "entropy_bound" and order != "entropy")
        or (unmasking == "ancestral" and order != "random"),
        ("unmasking", "order_temperature"): unmasking in ADAPTIVE and settings["order_temperature"] > 0,
        ("unmasking", "level_penalty"): unmasking in (*ADAPTIVE, "ancestral") and settings["level_penalty"] > 0,
        ("unmasking", "num_inference_steps"): unmasking in ADAPTIVE and settings["num_inference_steps"] is not None,
        ("unmasking", "block_length"): unmasking == "ancestral" and settings["block_length"] is not None,
        ("unmasking", "guidance_schedule"): unmasking in ADAPTIVE and settings["guidance_schedule"] != "constant",
        ("remask", "repetition_penalty"): remask == "edit" and settings["repetition_penalty"] != 1,
        ("remask", "unmasking"): remask in POSTERIOR and unmasking != "ancestral",
        ("cache", "remask"): settings["cache"] != "none" and remask != "none",
        ("cache", "block_length"): settings["cache"] != "none" and settings["block_length"] is None,
        **{
            ("temperature", name): settings["temperature"] == 0 and settings[name] != neutral
            for name, neutral in (("top_k", None), ("top_p", 1.0), ("typical_p", 1.0), ("draw", "inverse"))
        },
    }
    for (first, second), clash in clashes.items():
        if clash:
            raise ValueError(f"{first} {settings[first]!r} does not go with {second} {settings[second]!r}")
    check_guidance(settings["guidance_scale"], settings["guidance_schedule"])


def check_scale(scale: Any) -> None:
    """Raises a ValueError unless `scale` is a finite guidance scale, or a table of them."""
    values = scale.values() if isinstance(scale, Mapping) else (scale,)
    if not all(map(_number, values)):
        raise ValueError(f"guidance_scale {scale!r} must be a number or a table of numbers, {_RANGE}")


def check_steps(steps: Any) -> None:
    """Raises a ValueError unless `steps` is a number of steps."""
    if not _whole(steps) or steps < 1:
        raise ValueError(f"num_inference_steps must be a whole number from 1 to {LARGEST:,}, got {steps!r}")


_RANGE = f"at most {LARGEST:,}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _whole(value: Any) -> bool:
    return _number(value) and isinstance(value, int)


def is_place(key: Any) -> bool:
    """Whether `key` is a place among codes; JSON has no keys but text."""
    return (key.isdecimal() and len(key) < 10) if isinstance(key, str) else _whole(key) and key >= 0


def _check_types(settings: dict[str, Any]) -> None:
    def whole_numbers(value: Any) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_whole, value))

    def table(value: Any, of: Callable[[Any], bool]) -> bool:
        return isinstance(value, Mapping) and all(map(of, value.values()))

    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        **dict.fromkeys(
            ("temperature", "order_temperature", "level_penalty", "exponent", *ADAPTIVE), ("a number", _number)
        ),
        **dict.fromkeys(
            ("top_p", "typical_p", "eta", "editing_threshold", "repetition_penalty"), ("a number", _number)
        ),
        **dict.fromkeys(("top_k", "min_length", "max_length", "num_inference_steps"), ("a whole number", _whole)),
        "block_length": ("a whole number or 'level'", lambda value: value == "level" or _whole(value)),
        "loop": (
            "three numbers",
            lambda value: isinstance(value, Sequence) and len(value) == 3 and all(map(_number, value)),
        ),
        "suppress_tokens": ("a list of whole numbers", whole_numbers),
        "forced_tokens": (
            "a table of whole numbers, place: id",
            lambda value: table(value, _whole) and all(map(is_place, value)),
        ),
        "canvas": ("a table of whole numbers", lambda value: table(value, _whole)),
    }
    never_null = {"temperature", "order_temperature", "level_penalty", "top_p", "typical_p", "repetition_penalty"}
    for name, (kind, fits) in kinds.items():
        absent = settings[name] is None and name not in never_null
        if not absent and not fits(settings[name]):
            raise ValueError(f"{name} {settings[name]!r} must be {kind}, {_RANGE}")
    check_scale(settings["guidance_scale"])


def _check_ranges(settings: dict[str, Any]) -> None:
    at_least = {
        **dict.fromkeys(("temperature", "order_temperature", "level_penalty", "factor", "entropy_bound"), 0),
        **dict.fromkeys(("min_length", "max_length"), 0),
        **dict.fromkeys(("num_inference_steps", "top_k", "exponent"), 1),
    }
    for name, least in at_least.items():
        if settings[name] is not None and settings[name] < least:
            raise ValueError(f"{name} {settings[name]} must be at least {least}")
    if 0 < settings["temperature"] < 1 / LARGEST:
        raise ValueError(f"temperature {settings['temperature']} must be 0, which is greedy, or at least {1 / LARGEST}")
    for name in ("top_p", "typical_p", "repetition_penalty"):
        if settings[name] is not None and settings[name] <= 0:
            raise ValueError(f"{name} {settings[name]} must be more than 0")
    for name in ("top_p", "typical_p", "threshold", "eta", "editing_threshold"):
        if settings[name] is not None and not 0 <= settings[name] <= 1:
            raise ValueError(f"{name} {settings[name]} must be in [0, 1]")
    if settings["block_length"] not in (None, "level") and settings["block_length"] < 1:
        raise ValueError(f"block_length {settings['block_length']} must be at least 1")
    if settings["loop"] is not None:
        t_on, t_off, plateau = settings["loop"]
        if not (0 < t_off < t_on < 1 and 0 < plateau < 1):
            raise ValueError(
                f"loop {list(settings['loop'])} must be [t_on, t_off, α] with 0 < t_off < t_on < 1, 0 < α < 1"
            )
    least, most = settings["min_length"], settings["max_length"]
    if least is not None and most is not None and least > most:
        raise ValueError(f"min_length {least} is more than max_length {most}")


def check_ids(settings: Mapping[str, Any], size: int, number: int | None, *, ends: bool) -> None:
    """Raises a ValueError for ids, places and lengths that the codes to fill in do not have.

    Args:
        settings: of a `MaskSampler`.
        size: V, number of ids.
        number: of codes to fill in, in the row that has most; None where that is not known yet.
        ends: whether their content may end before their room does.
    """
    forbidden, forced = set(settings["suppress_tokens"] or ()), settings["forced_tokens"] or {}
    for name, ids in (("suppress_tokens", forbidden), ("forced_tokens", forced.values())):
        for token in ids:
            if not 0 <= token < size:
                raise ValueError(f"{name}: no code is called {token}; there are 0 to {size - 1}")
    if len(forbidden) == size:
        raise ValueError(f"suppress_tokens leaves none of the {size} codes to draw from")
    for place, token in forced.items():
        if number is not None and not 0 <= int(place) < number:
            raise ValueError(
                f"forced_tokens: place {place} is none of the {number} codes to fill in, 0 to {number - 1}"
            )
        if token in forbidden:
            raise ValueError(f"forced_tokens wants code {token} at place {place}, which suppress_tokens rules out")
    for name in ("min_length", "max_length"):
        if settings[name] is not None and not ends:
            raise ValueError(f"{name} {settings[name]} needs codes whose length varies; here canvas says it")
