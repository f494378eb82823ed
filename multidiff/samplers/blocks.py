"""Blocks: which positions are finished before others start, and what a cache keeps of the rest.

Shape suffixes: R rows, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from multidiff.samplers.checks import check_choice, check_whole_number, refuse

CACHES = ("none", "approximate_prefix", "approximate_dual")


@dataclass(frozen=True)
class Blocks:
    """Decoding in blocks, with a cache of keys and values or without (Wu et al. 2025, Fast-dLLM, arXiv 2505.22618).

    Args:
        block_length: decode in blocks of `block_length` codes. Each block is finished before the next one starts.
            "level" makes a block of each residual level, and None one block of all codes.
        cache: "none" recomputes every position at each step. The others recompute every position at the first step of
            a block. "approximate_dual" then recomputes only the block itself, "approximate_prefix" the block and all
            that follows it.

    Raises:
        ValueError: a setting that is out of range, or a cache without blocks.
    """

    block_length: int | Literal["level"] | None = None
    cache: str = "none"

    def __post_init__(self) -> None:
        check_choice("cache", self.cache, CACHES)
        if self.block_length not in (None, "level"):
            check_whole_number("block_length", self.block_length, least=1, other="'level'")
        if self.cache != "none" and self.block_length is None:
            refuse(("cache", self.cache), ("block_length", None))

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
