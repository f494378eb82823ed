"""Blocks: which positions are finished before others start, and what a cache keeps of the rest.

Shape suffixes: R rows, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from multidiff.samplers.checks import check_choice, check_whole_number, refuse
from multidiff.sequence.blocks import AttentionPattern

APPROXIMATE = ("approximate_prefix", "approximate_dual")
CACHES = ("auto", "none", "exact", *APPROXIMATE)


@dataclass(frozen=True)
class Blocks:
    """Decoding in blocks, with a cache of keys and values or without (Wu et al. 2025, Fast-dLLM, arXiv 2505.22618).

    Args:
        block_length: decode in blocks of `block_length` codes. Each block is finished before the next one starts.
            "level" makes a block of each residual level, and None one block of all codes; where the model's attention
            has blocks, None takes these.
        cache: "none" recomputes every position at each step. The approximate ones recompute every position at the
            first step of a block. "approximate_dual" then recomputes only the block itself, "approximate_prefix" the
            block and all that follows it. "exact" keeps what stands in finished blocks of a model whose attention has
            an order, which changes no sample. "auto" is "exact" where that is possible, else "none".

    Raises:
        ValueError: a setting that is out of range, or an approximate cache without blocks.
    """

    block_length: int | Literal["level"] | None = None
    cache: str = "auto"

    def __post_init__(self) -> None:
        check_choice("cache", self.cache, CACHES)
        if self.block_length not in (None, "level"):
            check_whole_number("block_length", self.block_length, least=1, other="'level'")
        if self.cache in APPROXIMATE and self.block_length is None:
            refuse(("cache", self.cache), ("block_length", None))

    def check_pattern(self, pattern: AttentionPattern) -> None:
        """Refuse blocks that are not those of a model's attention.

        Raises:
            ValueError: it names both.
        """
        if not pattern.is_full and self.block_length not in (None, pattern.length):
            raise ValueError(f"block_length {self.block_length!r} does not go with a model of {pattern}. Leave it out.")

    def numbers(self, undecided_RN: Tensor, levels_RN: Tensor) -> Tensor:
        """block_RN, int64: number of the block of each position, -1 at padding."""
        if self.block_length is None:
            block_RN = torch.zeros_like(levels_RN)
        elif self.block_length == "level":
            block_RN = levels_RN
        else:
            column_N = torch.arange(levels_RN.shape[1], device=levels_RN.device)
            block_RN = column_N.expand_as(levels_RN) // self.block_length
        return block_RN.masked_fill(~undecided_RN, -1)


def cache_for(mode: str, pattern: AttentionPattern) -> str:
    """The cache of a run, "auto" resolved.

    Raises:
        ValueError: a cache that does not fit the model's attention.
    """
    if mode == "auto":
        return "none" if pattern.is_full else "exact"
    if mode != "none" and pattern.is_full == (mode == "exact"):
        known = ("auto", "none", *(APPROXIMATE if pattern.is_full else ("exact",)))
        raise ValueError(f"cache {mode!r} does not go with a model of {pattern}. It takes {', '.join(known)}.")
    return mode
