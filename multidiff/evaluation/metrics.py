"""Metrics of a tokenizer's codes: what they cost, how much of the codebooks they use, and whether they are stable.

Shape suffixes: N codes of one item, M codes of all items, V codes of one codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from multidiff.tokenizer import Codes, ModalityTokenizer


def information(codes: Codes, codebook_sizes: Sequence[int]) -> float:
    """The most information that an item's codes can carry, Σ_n log2 V(level of n), in bits.

    Args:
        codes: the codes of one item.
        codebook_sizes: V of each level.
    """
    return float(torch.tensor(codebook_sizes, dtype=torch.float64)[codes.levels_N].log2().sum())


def code_distribution(codes: Sequence[Codes], level: int, size: int) -> Tensor:
    """How often each code of a level occurs.

    Args:
        codes: the codes of any number of items.
        level: the residual level.
        size: the number of codes in its codebook.

    Returns:
        float64 [V] that sums to 1; all zeros if no code has this level.
    """
    ids_M = torch.cat([torch.empty(0, dtype=torch.int64), *(one.ids_N[one.levels_N == level] for one in codes)])
    return torch.bincount(ids_M, minlength=size).double() / max(1, len(ids_M))


def codebook_usage(share_V: Tensor) -> float:
    """The share of a codebook's codes that occur at all, from 0 to 1. A collapsed codebook has a low one."""
    return float((share_V > 0).double().mean())


def codebook_entropy(share_V: Tensor) -> float:
    """The entropy of the codes of one level, -Σ_v p_v ln p_v, in nats. Its maximum is ln V."""
    return float(torch.special.entr(share_V).sum())


def code_agreement(codes: Sequence[Codes], again: Sequence[Codes]) -> float:
    """The share of codes that two encodings of the same items have in common.

    Decode `codes` and encode the result to get `again`. An item whose number of codes changed counts as all different.

    Returns:
        a number from 0 to 1.
    """
    same = sum(int((a.ids_N == b.ids_N).sum()) for a, b in zip(codes, again, strict=True) if len(a) == len(b))
    return same / max(1, sum(map(len, codes)))


def survives_saving(tokenizer: ModalityTokenizer, items: list[Any]) -> bool:
    """Whether a saved and loaded tokenizer has the same fingerprint and gives the same codes for `items`."""
    with TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        loaded = type(tokenizer).load(Path(folder))
    pairs = zip(loaded.encode(items), tokenizer.encode(items), strict=True)
    return loaded.fingerprint == tokenizer.fingerprint and all(torch.equal(a.ids_N, b.ids_N) for a, b in pairs)
