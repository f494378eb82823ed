"""Generators that are derived from their purpose, so that no random state has to be saved."""

from __future__ import annotations

import hashlib

import torch


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`, for instance (seed, step, document). Equal keys give equal numbers.

    A sum or product of the parts would make the streams of neighbouring steps and documents overlap.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
