"""Blocks in which a tokenizer must leave the random state and autograd alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from multidiff.testing.comparison import expect, same


@contextmanager
def no_gradient(what: str) -> Iterator[None]:
    """Check that the block records nothing for a backward pass, and leaves gradients enabled."""
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        expect(torch.is_grad_enabled(), f"{what} switched gradients off for its caller")
    expect(not saved, f"{what} must not record gradients: put it under torch.no_grad()")


@contextmanager
def untouched_random_state(what: str) -> Iterator[None]:
    """Check that the block leaves the global random state of torch, numpy and random as it was."""
    before = _random_state()
    yield
    expect(
        same(before, _random_state()),
        f"{what} changed the global random state of torch, numpy or random; draw from a separate torch.Generator",
    )


@contextmanager
def other_random_state() -> Iterator[None]:
    """Use another global random state inside the block, then restore the caller's."""
    before = _random_state()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the legacy state is the one to disturb
    torch.manual_seed(1)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def _random_state() -> tuple[Any, Any, Any]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
