"""Helpers of the checks: `expect`, and the comparison of items and codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from multidiff.tokenizer import Codes


def expect(kept: Any, promise: str) -> None:
    """Raise an AssertionError with the message `promise` unless `kept` is true. Unlike `assert`, it works under -O."""
    if not kept:
        raise AssertionError(promise)


def error_of(call: Callable[[], object]) -> Exception | None:
    """The exception that `call` raises, or None."""
    try:
        call()
    except Exception as error:
        return error
    return None


def same_places(one: Codes, other: Codes) -> bool:
    """Whether two items have the same levels and coordinates."""
    return torch.equal(one.levels_N, other.levels_N) and torch.equal(one.coords_N3, other.coords_N3)


def same(one: Any, other: Any) -> bool:
    """Whether two items or codes are equal up to rounding in pixels and samples.

    The rounding differs between batch sizes, because their kernels sum in different orders.
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, Image.Image):
        if one.mode != other.mode or one.size != other.size:
            return False
        return int(np.abs(np.asarray(one, np.int64) - np.asarray(other, np.int64)).max(initial=0)) <= 1
    if isinstance(one, torch.Tensor | np.ndarray):
        left, right = torch.as_tensor(one), torch.as_tensor(other)
        if left.shape != right.shape or left.dtype != right.dtype:
            return False
        return torch.allclose(left, right, atol=1e-4) if left.is_floating_point() else torch.equal(left, right)
    if is_dataclass(one):
        return same(_fields(one), _fields(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def prefix(codes: Codes, count: int, unit: str, length: int) -> Codes:
    """The first `count` codes of an item, which are `length` units."""
    return Codes(codes.ids_N[:count], codes.levels_N[:count], codes.coords_N3[:count], {unit: length})


def tensors(item: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside an item."""
    if isinstance(item, torch.Tensor):
        yield item
    elif is_dataclass(item):
        yield from tensors(_fields(item))
    elif isinstance(item, dict):
        yield from tensors(list(item.values()))
    elif isinstance(item, list | tuple):
        for part in item:
            yield from tensors(part)


def _fields(item: Any) -> dict[str, Any]:
    return asdict(item, dict_factory=dict)


def short(item: Any) -> str:
    """The `repr` of an item, cut to 60 characters."""
    text = repr(item)
    return text if len(text) <= 60 else text[:60] + "…"
