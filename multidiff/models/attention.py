"""Attention within documents that stand one after another in a flat batch.

Queries may be fewer than keys: in the last layer only the positions whose logits are read ask, and with a cache only
the tokens that are recomputed. An `AttentionPlan`, made by `plan_attention`, says once for all layers how to run it:

- on a GPU in half precision by one kernel for sequences of many lengths (`torch.nn.attention.varlen`);
- else in groups of documents of like length, each one call of `scaled_dot_product_attention`. A group of equal lengths
  is a view. In a group of different lengths keys are repeated up to the longest and masked. Groups are chosen so that
  the estimated cost is least; no tensor of all positions by all positions exists.

A document gets the same result alone, beside others and in another order, up to rounding.

Shape suffixes: P keys (tokens) of the batch, Q queries, D documents, H query heads, K key/value heads, E head size,
G documents of a group, k and q its keys and queries per document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from multidiff.models.sizes import HALF, prepares_shapes, shared_size

# Costs in units of one query by one key, chosen by the steps of small and large models on two cores.
_CALL = 3_000  # of a call, besides its arithmetic
_CALL_BY_PRODUCTS = 40_000  # and where it is made of matrix products, which are prepared again for every shape
_TOKEN = 20  # of gathering a token that is not in place
_SCORES = 2**24  # elements of a score matrix that is held at once


@dataclass(frozen=True)
class _Side:
    """Where the tokens of the groups, keys or queries, are in the flat batch.

    Attributes:
        sizes: lengths of the pieces that the batch falls into, where every group is one of them.
        pieces: the piece of each group.
        rows: else the row of every token of all groups, repeated up to the longest document of a group.
        back: where each row of the batch is among them.
        outside: rows of the batch that are in no group; None where all are.
        repeated: tokens of the groups that repeat another; None where none does.
        lengths: how many rows each group has.
    """

    sizes: list[int]
    pieces: list[int]
    rows: Tensor | None
    back: Tensor | None
    outside: Tensor | None
    repeated: Tensor | None
    lengths: list[int]

    def split(self, x: Tensor) -> list[Tensor]:
        """The tokens of each group."""
        if self.rows is None:
            parts = x.split(self.sizes)
            return [parts[piece] for piece in self.pieces]
        return list(_Gather.apply(x, self.rows, self.back, self.outside).split(self.lengths))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Inverse of `split`, where every token is in a group."""
        if self.rows is not None:
            return _Gather.apply(torch.cat(list(parts)), self.back, self.rows, self.repeated)
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part for _, part in sorted(zip(self.pieces, parts, strict=True), key=lambda pair: pair[0])])


class _Gather(torch.autograd.Function):
    """Rows of a tensor by index. `index_select` would add gradients up row by row; here each row has at most one
    gradient that is not zero: `back` says where it is, and `zero` which rows have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, back: Tensor, zero: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, zero)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        back, zero = ctx.saved_tensors
        gradient = gradients[0].index_select(0, back)
        return gradient if zero is None else gradient.index_fill_(0, zero, 0), None, None, None


@dataclass  # not frozen: the compiler would look into it, and compile again for every number of groups
class AttentionPlan:
    """How the queries of a batch attend to the keys of their documents.

    Attributes:
        starts: int32 [D + 1] of keys and of queries, for the kernel for many lengths; None where groups are used.
        longest: most keys, and most queries, of a document.
        documents: G of each group.
        masks: bool [G, 1, 1, k] of each group, False where a key is repeated; None where none is.
        keys, queries: where those of the groups are.
    """

    starts: tuple[Tensor, Tensor] | None
    longest: tuple[int, int]
    documents: list[int]
    masks: list[Tensor | None]
    keys: _Side
    queries: _Side


@torch.compiler.disable()
def plan_attention(
    keys: Sequence[int],
    queries: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    rows: tuple[int, int] | None = None,
) -> AttentionPlan:
    """The plan for documents of these numbers of keys and of queries.

    Args:
        keys, queries: of each document, in the order of the batch. A document may have no query.
        device, dtype: of the tensors that attend; nothing waits for the device.
        rows: of keys and of queries; those behind the last document belong to none, and what they get means nothing.
            None where there are no such rows.
    """
    half = dtype in HALF
    variable = device.type == "cuda" and half
    call = _CALL_BY_PRODUCTS if half else _CALL
    key_starts, query_starts = _starts(keys), _starts(queries)
    key_rows, query_rows = rows or (sum(keys), sum(queries))
    groups = [] if variable else _group(tuple(zip(keys, queries, strict=True)), call)
    shared = prepares_shapes(device, dtype)
    key_side, masks = _side(groups, key_starts, key_rows, shared, device)
    query_side, _ = _side(groups, query_starts, query_rows, shared, device)
    return AttentionPlan(
        (_sent(key_starts, device), _sent(query_starts, device)) if variable else None,
        (max(keys, default=0), max(queries, default=0)),
        [shared_size(len(group)) if shared else len(group) for group in groups],
        [None if mask is None else _sent(mask[:, None, None], device) for mask in masks],
        key_side,
        query_side,
    )


@torch.compiler.disable()  # its groups are others for every batch; compiled layers run up to here and on from here
def attend(query_QHE: Tensor, key_PKE: Tensor, value_PKE: Tensor, plan: AttentionPlan) -> Tensor:
    """softmax(q·k / √E) v of every query over the keys of its document, [Q, H, E].

    The kernel for many lengths, and the matrix products that half precision takes on a CPU, round probabilities to
    that precision; sums are in fp32.
    """
    if not len(query_QHE):  # keys and values stay part of the graph
        return query_QHE + (key_PKE[:0].sum() + value_PKE[:0].sum())
    if plan.starts is not None:
        repeats = query_QHE.shape[1] // key_PKE.shape[1]
        key_PHE, value_PHE = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (key_PKE, value_PKE))
        (key_starts, query_starts), (most_keys, most_queries) = plan.starts, plan.longest
        return cast(
            "Tensor",
            varlen_attn(query_QHE, key_PHE, value_PHE, query_starts, key_starts, most_queries, most_keys),
        )
    parts = zip(
        plan.queries.split(query_QHE),
        plan.keys.split(key_PKE),
        plan.keys.split(value_PKE),
        plan.documents,
        plan.masks,
        strict=True,
    )
    return plan.queries.join([_attend_group(*part) for part in parts])


def _attend_group(query_NHE: Tensor, key_NKE: Tensor, value_NKE: Tensor, documents: int, mask: Tensor | None) -> Tensor:
    query_GHqE, key_GKkE, value_GKkE = (
        x.unflatten(0, (documents, -1)).transpose(1, 2) for x in (query_NHE, key_NKE, value_NKE)
    )
    half = query_GHqE.dtype in HALF and query_GHqE.device.type == "cpu"
    if half and query_GHqE.shape[:-1].numel() * key_GKkE.shape[-2] <= _SCORES:
        answer_GHqE = _by_products(query_GHqE, key_GKkE, value_GKkE, mask)
    else:
        answer_GHqE = F.scaled_dot_product_attention(
            query_GHqE, key_GKkE, value_GKkE, attn_mask=mask, enable_gqa=query_GHqE.shape[1] != key_GKkE.shape[1]
        )
    return answer_GHqE.transpose(1, 2).flatten(0, 1)


def _by_products(query_GHqE: Tensor, key_GKkE: Tensor, value_GKkE: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by two matrix products: in half precision on a CPU two to four times as fast as the fused kernel."""
    groups, heads, number, size = query_GHqE.shape
    grouped = (groups, key_GKkE.shape[1], -1, size)  # the query heads of a key head, one below the other
    scores = (query_GHqE.reshape(grouped) * size**-0.5) @ key_GKkE.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    # PyTorch's softmax in half precision is several times as slow as that in fp32 where 32 does not divide its length.
    odd = scores.shape[-1] % 32 > 0
    probabilities = torch.softmax(scores, -1, torch.float32 if odd else None).to(scores.dtype)
    return (probabilities @ value_GKkE).reshape(groups, heads, number, size)


def _starts(lengths: Sequence[int]) -> Tensor:
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    return starts


def _side(
    groups: Sequence[Sequence[int]], starts: Tensor, rows: int, shared: bool, device: torch.device
) -> tuple[_Side, list[Tensor | None]]:
    """Where the groups' tokens are, and [G, k] of each group, False where a token is repeated; None where none is.

    Args:
        groups: the documents of each.
        starts: of the documents.
        rows: of the batch, of which those behind the last document are in no group.
        shared: whether documents are repeated up to a number, and tokens up to a length, that other batches have too.
    """
    edges = starts.tolist()
    places, masks, real, ranges = [], [], [], []
    for members in groups:
        first, last, count = members[0], members[-1], len(members)
        lengths = [edges[i + 1] - edges[i] for i in members]
        longest, most = max(lengths), count
        if shared:
            longest, most = shared_size(longest), shared_size(count)
        equal = min(lengths) == longest
        in_place = equal and most == count == last - first + 1 and rows == edges[-1]
        ranges.append((edges[first], edges[last + 1]) if in_place else None)
        members = [*members, *[last] * (most - count)]
        first_G = torch.tensor([edges[i] for i in members])[:, None]
        length_G = torch.tensor([edges[i + 1] - edges[i] for i in members])[:, None]
        place_k = torch.arange(longest)
        mask_Gk = place_k < length_G
        places.append((first_G + place_k.minimum(length_G - 1)).flatten())
        masks.append(None if equal else mask_Gk)
        real.append((mask_Gk & (torch.arange(most) < count)[:, None]).flatten())
    lengths = [len(place) for place in places]
    if all(ranges):
        pieces = sorted({0, rows, *(edge for pair in ranges if pair for edge in pair)})
        sizes = [b - a for a, b in pairwise(pieces)]
        return _Side(sizes, [pieces.index(pair[0]) for pair in ranges if pair], None, None, None, None, lengths), masks
    row_N, real_N = torch.cat(places), torch.cat(real)
    back = torch.full((rows,), -1)
    back[row_N[real_N]] = torch.nonzero(real_N).flatten()
    outside, repeated = torch.nonzero(back < 0).flatten(), torch.nonzero(~real_N).flatten()
    side = _Side(
        [],
        [],
        _sent(row_N, device),
        _sent(back.clamp_min(0), device),
        _sent(outside, device) if len(outside) else None,
        _sent(repeated, device) if len(repeated) else None,
        lengths,
    )
    return side, masks


@lru_cache(maxsize=256)
def _group(sizes: tuple[tuple[int, int], ...], call: int) -> tuple[tuple[int, ...], ...]:
    """Documents with queries in groups of least estimated cost. Neighbours in order of their keys share one, so that
    dynamic programming finds the best division."""
    members = sorted((i for i, (_, queries) in enumerate(sizes) if queries), key=lambda i: (sizes[i], i))
    # Equal documents never part: of each kind there is one step.
    kinds: list[list[int]] = []
    for i in members:
        if kinds and sizes[kinds[-1][0]] == sizes[i]:
            kinds[-1].append(i)
        else:
            kinds.append([i])
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(kinds) + 1):
        best.append(min(_costs(kinds, sizes, best, stop, call)))
    groups: list[tuple[int, ...]] = []
    stop = len(kinds)
    while stop:
        start = best[stop][1]
        groups.append(tuple(sorted(i for kind in kinds[start:stop] for i in kind)))
        stop = start
    return tuple(sorted(groups))


def _costs(
    kinds: Sequence[Sequence[int]],
    sizes: Sequence[tuple[int, int]],
    best: Sequence[tuple[float, int]],
    stop: int,
    call: int,
) -> Iterator[tuple[float, int]]:
    """Cost of the best division of the kinds before `stop` whose last group begins at each start, and that start."""
    documents = needed = keys = queries = 0
    for start in range(stop - 1, -1, -1):
        of_key, of_query = sizes[kinds[start][0]]
        documents += len(kinds[start])
        keys, queries = max(keys, of_key), max(queries, of_query)
        work = documents * keys * queries
        moved = _TOKEN * documents * (keys + queries) if stop - start > 1 else 0
        yield best[start][0] + call + work + moved, start
        needed += len(kinds[start]) * of_key * of_query
        if work > 4 * (needed + call):
            return  # shorter documents only add to what is wasted


def _sent(table: Tensor, device: torch.device) -> Tensor:
    return table.to(device, non_blocking=True)
