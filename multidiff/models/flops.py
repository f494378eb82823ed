"""Floating-point operations of the transformer, as its layout makes them: a multiplication and an addition count two.

The layers see every token, apart from the last one, of which only keys and values do. Its queries, its SwiGLU and the
head see the positions whose logits are read. Attention costs what each query sees of its own document.

Counted are matrix products. Norms, rotations and softmax are not, as is usual where use of a device is reported
(Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B). Neither is padding of the kernels.

Shape suffixes: P tokens of all documents, Q positions whose logits are read, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multidiff.models.transformer import MaskedDiffusionTransformer
from multidiff.sequence.blocks import AttentionPattern, TokenBlocks
from multidiff.sequence.vocabulary import Span


def forward_flops(
    transformer: MaskedDiffusionTransformer,
    document_starts: Tensor,
    logit_positions: Sequence[tuple[Tensor, Span]],
    blocks: TokenBlocks | None = None,
) -> int:
    """Operations of a forward pass with these arguments; a training step takes three times as many.

    With L layers, hidden size D, query heads of H numbers together and key heads of K, a SwiGLU of I numbers, P tokens,
    Q positions whose logits are read, of which N draw from a span of V ids, and S pairs of a query and a key that it
    sees, S_Q of them with the queries of the last layer:

        2 P ((L - 1) (2 D H + 2 D K + 3 D I) + 2 D K)  +  2 Q (2 D H + 3 D I)       weights of the layers
        + 4 H ((L - 1) S + S_Q)                                                     attention
        + Σ 2 N D V  over the spans                                                 the head

    A time input adds 32 P D. The backward pass takes twice as many, two products for each one. What it repeats to save
    memory is not counted.

    Args:
        transformer: only its sizes are read, so that it may be sharded, or on the meta device.
        document_starts, logit_positions, blocks: as `MaskedDiffusionTransformer.forward` takes them.
    """
    layer: Any = transformer.layers[0]
    hidden, heads = layer.attention.query.in_features, layer.attention.query.out_features
    attention, keys_and_values = 2 * hidden * heads, 2 * hidden * layer.attention.key.out_features
    mlp = 3 * hidden * layer.mlp.gate.out_features
    whole, tokens = len(transformer.layers) - 1, int(document_starts[-1])
    position_Q = torch.cat([index_N for index_N, _ in logit_positions])
    everywhere = torch.arange(tokens)
    in_whole = pairs_seen(transformer.pattern, document_starts, everywhere, blocks) if whole else 0
    in_last = pairs_seen(transformer.pattern, document_starts, position_Q, blocks)
    flops = 2 * tokens * (whole * (attention + keys_and_values + mlp) + keys_and_values)
    flops += 2 * len(position_Q) * (attention + mlp) + 4 * heads * (whole * in_whole + in_last)
    if transformer.time is not None:
        flops += 2 * tokens * hidden * transformer.time.in_features
    return flops + sum(2 * len(index_N) * hidden * (stop - start) for index_N, (start, stop) in logit_positions)


def pairs_seen(
    pattern: AttentionPattern, document_starts: Tensor, position_Q: Tensor, blocks: TokenBlocks | None = None
) -> int:
    """How many keys these queries see, together.

    Args:
        pattern: of the attention.
        document_starts: int [D + 1].
        position_Q: int64, the queries, in any order.
        blocks: of all tokens, where the attention is "block_causal".
    """
    length_D = document_starts.long().diff()
    if pattern.is_full:
        document_Q = torch.searchsorted(document_starts.long(), position_Q, right=True) - 1
        return int(length_D[document_Q].sum())
    document_P = torch.repeat_interleave(length_D)
    if pattern.is_autoregressive:
        place_P = torch.arange(len(document_P)) - document_starts.long()[document_P]
        return int((place_P[position_Q] + 1).sum())
    assert blocks is not None  # the transformer refuses a call without them
    # A query sees the clean keys of earlier blocks, and the keys of its own block and copy.
    numbers = int(blocks.number_P.max()) + 1 if len(document_P) else 1
    block_P = document_P * numbers + blocks.number_P
    copy_P = 2 * block_P + blocks.noisy_P
    copies = torch.bincount(copy_P, minlength=2 * numbers * len(length_D))
    clean = copies[::2].view(-1, numbers)
    earlier = (clean.cumsum(1) - clean).flatten()
    return int((earlier[block_P[position_Q]] + copies[copy_P[position_Q]]).sum())
