"""Likelihood under models whose attention has an order.

With causal attention the negative log-likelihood is exact and takes one pass,

    -log p(x)  =  Σ_i -log p(x_i | x_<i).

With attention by blocks each block b has its bound, given clean blocks before it (Arriola et al. 2025, BD3-LM,
arXiv 2503.09573, eq. 5), here with an exact count k of masked codes among its L,

    -log p(x)  ≤  Σ_b  E_k  L/k  Σ_{i of b masked} -log p(x_i | b with k of its codes masked, blocks before it).

The order of the segments counts: what is given behind a target does not condition it.

Shape suffixes: P tokens of the batch, S segments, M codes whose cross-entropies are read, L targets of a document,
B its blocks that have any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multidiff.models import MaskedDiffusionTransformer
from multidiff.objectives.times import spread_uniform
from multidiff.seeding import generator_for
from multidiff.sequence import MASK, SharedVocabulary, TokenBatch
from multidiff.sequence.blocks import side_by_side


@torch.no_grad()
def ordered_nats(
    model: MaskedDiffusionTransformer,
    vocabulary: SharedVocabulary,
    batch: TokenBatch,
    target_S: Tensor,
    absent_S: Tensor,
    numbers: Sequence[int],
    key: tuple[Any, ...],
    stratum: tuple[int, int],
    number_P: Tensor,
) -> tuple[Tensor, Tensor]:
    """Codes of the targets, index_M, and the weighted cross-entropy of each, float64 on the model's device.

    Their sum is the negative log-likelihood of the targets, or a draw of the bound over the number of draws.

    Args:
        model: with causal attention, or attention by blocks; in evaluation mode.
        vocabulary: its vocabulary.
        batch: what is measured.
        target_S, absent_S: bool, the segments that are measured, and those that are masked.
        numbers: of each document, in its split.
        key: what the random numbers follow from, beside the number of the document and the draw: a seed and words.
        stratum: the draw, and how many there are. Causal attention needs none.
        number_P: the block of each token.
    """
    clean_P = torch.where(batch.spread(absent_S, False), MASK, batch.ids_P)
    target_P = batch.spread(target_S, False)
    if model.pattern.is_autoregressive:
        index_M, sizes = batch.by_span(target_P, len(vocabulary.flat_spans))
        weight_M = torch.ones(len(index_M), dtype=torch.float64)
        ids_P, starts, blocks, read_M = clean_P, batch.document_starts, None, index_M - 1
        positions_P3, coords_P3 = batch.positions_P3, batch.coords_P3
    else:
        masked_P, weight_P = _mask_blocks(batch, number_P, target_P, numbers, key, stratum)
        index_M, sizes = batch.by_span(masked_P, len(vocabulary.flat_spans))
        weight_M, copies = weight_P[index_M], side_by_side(batch, number_P, masked_P)
        ids_P = copies.ids(clean_P, torch.where(masked_P, MASK, clean_P))
        positions_P3, coords_P3 = batch.positions_P3[copies.index_X], batch.coords_P3[copies.index_X]
        starts, blocks, read_M = copies.starts, copies.blocks, copies.noisy_P[index_M]
    device = model.device
    nats = model(
        ids_P.to(device),
        positions_P3.to(device),
        starts,
        list(zip(read_M.split(sizes), (span for _, _, span in vocabulary.flat_spans), strict=True)),
        coords_P3.to(device),
        targets=(batch.ids_P[index_M] - vocabulary.span_edges[batch.span_P[index_M], 0]).to(device),
        blocks=blocks,
    )
    return index_M, torch.cat(nats).double() * weight_M.to(device)


def _mask_blocks(
    batch: TokenBatch,
    number_P: Tensor,
    target_P: Tensor,
    numbers: Sequence[int],
    key: tuple[Any, ...],
    stratum: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Mask k of the L target codes of each block. Returns masked_P, and L/k over the number of draws at each of these.

    The draws of a block have a stratum of k each, and within it the blocks of a document are spread evenly.
    """
    (seed, *words), (draw, draws) = key, stratum
    masked_P, weight_P = torch.zeros_like(target_P), torch.zeros(len(target_P), dtype=torch.float64)
    edges = batch.document_starts.tolist()
    for document, number in enumerate(numbers):
        place_L = torch.nonzero(target_P[edges[document] : edges[document + 1]]).flatten() + edges[document]
        generator = generator_for(seed, "likelihood", *words, number, draw)
        block_L, size_B = torch.unique_consecutive(number_P[place_L], return_inverse=True, return_counts=True)[1:]
        size_B = size_B.double()
        place_B = torch.arange(len(size_B), dtype=torch.float64)
        spread_B = (spread_uniform(seed, -1, number, 0) + place_B * (math.sqrt(5) - 1) / 2) % 1.0
        count_B = 1 + ((draw + spread_B) / draws * size_B).floor()
        order_L = torch.argsort(torch.rand(len(place_L), generator=generator, dtype=torch.float64))
        order_L = order_L[torch.argsort(block_L[order_L], stable=True)]  # by block, at random within it
        rank_L = torch.arange(len(place_L)) - (size_B.cumsum(0) - size_B)[block_L]  # order_L is as block_L is
        chosen_L = order_L[rank_L < count_B[block_L]]
        masked_P[place_L[chosen_L]] = True
        weight_P[place_L[chosen_L]] = (size_B / count_B / draws)[block_L[chosen_L]]
    return masked_P, weight_P
