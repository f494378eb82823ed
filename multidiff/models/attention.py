"""Attention within documents that stand one after another in a flat batch.

Queries may be fewer than keys: in the last layer only the positions whose logits are read ask, and with a cache only
the tokens that are recomputed. An `AttentionPlan`, made by `plan_attention`, says once for all layers how to run it:

- on a GPU in half precision by one kernel for sequences of many lengths (`torch.nn.attention.varlen`), where every
  query sees its whole document, or all that stands before it;
- on a GPU by FlexAttention where queries see blocks (`multidiff.sequence.blocks`) and nothing is cached;
- else in groups of documents of like length, each one call of `scaled_dot_product_attention`. A group of equal lengths
  is a view. In a group of different lengths keys are repeated up to the longest and masked. Groups are chosen so that
  the estimated cost is least; no tensor of all positions by all positions exists.

Where queries do not see their whole document, a group has a mask of its documents' queries by keys; keys that no query
of a document sees are left out. Causal attention of all tokens needs no mask: what is repeated comes last.

A document gets the same result alone, beside others and in another order, up to rounding.

Shape suffixes: P keys (tokens) of the batch, Q queries, D documents, H query heads, K key/value heads, E head size,
G documents of a group, k and q its keys and queries per document; I and J tiles of queries and of keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from multidiff.models.sizes import HALF, prepares_shapes, shared_size
from multidiff.sequence.blocks import TokenBlocks

# Costs in units of one query by one key, chosen by the steps of small and large models on two cores.
_CALL = 3_000  # of a call, besides its arithmetic
_CALL_BY_PRODUCTS = 40_000  # and where it is made of matrix products, which are prepared again for every shape
_TOKEN = 20  # of gathering a token that is not in place
_SCORES = 2**24  # elements of a score matrix that is held at once
_TILE = 128  # queries, or keys, that FlexAttention computes or leaves out together


class Sight(NamedTuple):
    """What queries see of their document, where that is not all of it.

    Attributes:
        blocks: of the keys.
        place_Q: int64, the key that each query belongs to, ascending; on the CPU.
        causal: whether every token is a block, and clean.
    """

    blocks: TokenBlocks
    place_Q: Tensor
    causal: bool


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
        starts: int32 [D + 1] of keys and of queries, for the kernel for many lengths; None where that is not used.
        longest: most keys, and most queries, of a document.
        documents: G of each group.
        masks: bool [G or 1, 1, q or 1, k] of each group, False where a query does not see a key, or where a key is
            repeated; None where it is True everywhere, or where the group is causal.
        keys, queries: where those of the groups are.
        causal: whether the queries are all tokens, each of which sees what stands before it.
        flex: the mask of FlexAttention; None where that is not used.
    """

    starts: tuple[Tensor, Tensor] | None
    longest: tuple[int, int]
    documents: list[int]
    masks: list[Tensor | None]
    keys: _Side
    queries: _Side
    causal: bool = False
    flex: BlockMask | None = None


@torch.compiler.disable()
def plan_attention(
    keys: Sequence[int],
    queries: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    rows: tuple[int, int] | None = None,
    sight: Sight | None = None,
    flex: bool = False,
) -> AttentionPlan:
    """The plan for documents of these numbers of keys and of queries.

    Args:
        keys, queries: of each document, in the order of the batch. A document may have no query.
        device, dtype: of the tensors that attend; nothing waits for the device.
        rows: of keys and of queries; those after the last document belong to none, and what they get means nothing.
            None where there are no such rows.
        sight: what queries see of their documents; None is all.
        flex: use FlexAttention where queries do not see all, and not all that stands before them.
    """
    half = dtype in HALF
    causal = sight is not None and sight.causal and torch.equal(sight.place_Q, torch.arange(sum(keys)))
    masked = sight is not None and not causal
    flex = flex and masked and any(queries)
    variable = device.type == "cuda" and half and not masked
    call = _CALL_BY_PRODUCTS if half else _CALL
    key_starts, query_starts = _starts(keys), _starts(queries)
    key_rows, query_rows = rows or (sum(keys), sum(queries))
    seen = keys if sight is None or not masked else _numbers_seen(sight, key_starts, query_starts)
    groups = [] if variable or flex else _group(tuple(zip(seen, queries, strict=True)), call)
    shared = prepares_shapes(device, dtype)
    if masked and not shared:
        groups = _views(groups, ((key_starts.tolist(), seen), (query_starts.tolist(), queries)), call)
    key_side, key_places, masks = _side(groups, key_starts, seen, key_rows, shared, device)
    query_side, query_places, _ = _side(groups, query_starts, queries, query_rows, shared, device)
    if sight is not None:
        if masked:
            masks = [_mask(sight, *tables) for tables in zip(query_places, key_places, masks, strict=True)]
        else:
            masks = [None] * len(groups)
    return AttentionPlan(
        (_sent(key_starts, device), _sent(query_starts, device)) if variable else None,
        (max(keys, default=0), max(queries, default=0)),
        [shared_size(len(group)) if shared else len(group) for group in groups],
        [None if mask is None else _sent(mask[:, None], device) for mask in masks],
        key_side,
        query_side,
        causal,
        flex_mask(sight, key_starts, query_starts, device) if flex and sight is not None else None,
    )


@torch.compiler.disable()  # its groups are others for every batch; compiled layers run up to here and on from here
def attend(query_QHE: Tensor, key_PKE: Tensor, value_PKE: Tensor, plan: AttentionPlan) -> Tensor:
    """softmax(q·k / √E) v of every query over the keys of its document, [Q, H, E].

    The kernel for many lengths, and the matrix products that half precision takes on a CPU, round probabilities to
    that precision; sums are in fp32.
    """
    if not len(query_QHE):  # keys and values stay part of the graph
        return query_QHE + (key_PKE[:0].sum() + value_PKE[:0].sum())
    if plan.flex is not None:
        query, key, value = (x.transpose(0, 1)[None] for x in (query_QHE, key_PKE, value_PKE))
        run = _compiled_flex() if query_QHE.is_cuda else flex_attention
        repeats = query_QHE.shape[1] != key_PKE.shape[1]
        return run(query, key, value, block_mask=plan.flex, enable_gqa=repeats)[0].transpose(0, 1)
    if plan.starts is not None:
        repeats = query_QHE.shape[1] // key_PKE.shape[1]
        key_PHE, value_PHE = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (key_PKE, value_PKE))
        (key_starts, query_starts), (most_keys, most_queries) = plan.starts, plan.longest
        return cast(
            "Tensor",
            varlen_attn(
                query_QHE,
                key_PHE,
                value_PHE,
                query_starts,
                key_starts,
                most_queries,
                most_keys,
                window_size=(-1, 0) if plan.causal else (-1, -1),
            ),
        )
    parts = zip(
        plan.queries.split(query_QHE),
        plan.keys.split(key_PKE),
        plan.keys.split(value_PKE),
        plan.documents,
        plan.masks,
        strict=True,
    )
    return plan.queries.join([_attend_group(*part, plan.causal) for part in parts])


def _attend_group(
    query_NHE: Tensor, key_NKE: Tensor, value_NKE: Tensor, documents: int, mask: Tensor | None, causal: bool
) -> Tensor:
    query_GHqE, key_GKkE, value_GKkE = (
        x.unflatten(0, (documents, -1)).transpose(1, 2) for x in (query_NHE, key_NKE, value_NKE)
    )
    half = query_GHqE.dtype in HALF and query_GHqE.device.type == "cpu"
    if half and query_GHqE.shape[:-1].numel() * key_GKkE.shape[-2] <= _SCORES:
        if causal:
            mask = torch.ones(query_GHqE.shape[2], key_GKkE.shape[2], dtype=torch.bool).tril()
        answer_GHqE = _by_products(query_GHqE, key_GKkE, value_GKkE, mask)
    else:
        repeats = query_GHqE.shape[1] != key_GKkE.shape[1]
        answer_GHqE = F.scaled_dot_product_attention(
            query_GHqE, key_GKkE, value_GKkE, attn_mask=mask, is_causal=causal, enable_gqa=repeats
        )
    return answer_GHqE.transpose(1, 2).flatten(0, 1)


def _by_products(query_GHqE: Tensor, key_GKkE: Tensor, value_GKkE: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by two matrix products: in half precision on a CPU two to four times as fast as the fused kernel."""
    groups, heads, number, size = query_GHqE.shape
    grouped = (groups, key_GKkE.shape[1], -1, size)  # the query heads of a key head, one below the other
    scores = (query_GHqE.reshape(grouped) * size**-0.5) @ key_GKkE.transpose(-1, -2)
    if mask is not None:
        if mask.shape[-2] > 1:  # of each query: the same for all query heads of a key head
            mask = mask.repeat(*[1] * (mask.dim() - 2), heads // key_GKkE.shape[1], 1)
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
    groups: Sequence[Sequence[int]],
    starts: Tensor,
    lengths: Sequence[int],
    rows: int,
    shared: bool,
    device: torch.device,
) -> tuple[_Side, list[Tensor], list[Tensor | None]]:
    """Where the groups' tokens are, the row [G, k] of each token of each group, and [G, 1, k] of each group, False
    where a token is repeated; None where none is.

    Args:
        groups: the documents of each.
        starts: of the documents.
        lengths: how many of its first tokens each document has in its group.
        rows: of the batch, of which those behind the last document are in no group.
        shared: whether documents are repeated up to a number, and tokens up to a length, that other batches have too.
    """
    edges = starts.tolist()
    places, masks, real, ranges = [], [], [], []
    for members in groups:
        last, count = members[-1], len(members)
        longest, most = max(lengths[i] for i in members), count
        if shared:
            longest, most = shared_size(longest), shared_size(count)
        equal = min(lengths[i] for i in members) == longest
        in_place = _follow(members, edges, lengths) and longest == lengths[last] and most == count and rows == edges[-1]
        ranges.append((edges[members[0]], edges[last] + longest) if in_place else None)
        members = [*members, *[last] * (most - count)]
        first_G = torch.tensor([edges[i] for i in members])[:, None]
        length_G = torch.tensor([lengths[i] for i in members])[:, None]
        place_k = torch.arange(longest)
        mask_Gk = place_k < length_G
        places.append(first_G + place_k.minimum(length_G - 1))
        masks.append(None if equal else mask_Gk[:, None])
        real.append((mask_Gk & (torch.arange(most) < count)[:, None]).flatten())
    sizes = [place_Gk.numel() for place_Gk in places]
    if all(ranges):
        pieces = sorted({0, rows, *(edge for pair in ranges if pair for edge in pair)})
        parts = [b - a for a, b in pairwise(pieces)]
        side = _Side(parts, [pieces.index(pair[0]) for pair in ranges if pair], None, None, None, None, sizes)
        return side, places, masks
    row_N, real_N = torch.cat([place_Gk.flatten() for place_Gk in places]), torch.cat(real)
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
        sizes,
    )
    return side, places, masks


def _follow(members: Sequence[int], edges: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether documents are of equal length and follow each other."""
    return all(lengths[a] == lengths[b] and edges[b] == edges[a] + lengths[a] for a, b in pairwise(members))


def _views(
    groups: Sequence[tuple[int, ...]], sides: Sequence[tuple[Sequence[int], Sequence[int]]], call: int
) -> Sequence[tuple[int, ...]]:
    """The groups, those whose documents are scattered divided into single ones, where that costs less than to gather
    all tokens. With a cache, few queries see many keys, and gathering these would be most of the work.

    Args:
        groups: the documents of each.
        sides: starts and lengths of the documents, of keys and of queries.
        call: cost of a call.
    """
    scattered = [group for group in groups if not all(_follow(group, *side) for side in sides)]
    moved = _TOKEN * sum(len(group) * max(lengths[i] for i in group) for group in groups for _, lengths in sides)
    if call * sum(len(group) - 1 for group in scattered) >= moved:
        return groups
    return sorted(part for group in groups for part in ([(i,) for i in group] if group in scattered else [group]))


def _numbers_seen(sight: Sight, key_starts: Tensor, query_starts: Tensor) -> list[int]:
    """How many keys of each document there are up to the last one that a query of it sees."""
    blocks, starts = sight.blocks, key_starts.long()
    if bool(blocks.noisy_P.any()):  # a noisy copy comes after the clean one
        return starts.diff().tolist()
    # Numbers grow through a document, so that they are sorted where documents are apart.
    documents, apart = len(starts) - 1, int(blocks.number_P.max()) + 2 if len(blocks.number_P) else 1
    document_P = torch.repeat_interleave(starts.diff())
    document_Q = torch.repeat_interleave(query_starts.long().diff())
    last_D = torch.full((documents,), -1)
    last_D = last_D.scatter_reduce(0, document_Q, blocks.number_P[sight.place_Q], "amax")
    sorted_P = document_P * apart + blocks.number_P[: len(document_P)]
    return (torch.searchsorted(sorted_P, torch.arange(documents) * apart + last_D, right=True) - starts[:-1]).tolist()


def _mask(sight: Sight, query_Gq: Tensor, key_Gk: Tensor, real_G1k: Tensor | None) -> Tensor | None:
    """bool [G or 1, q, k]: which keys the queries of a group see; None where they see all."""
    asking, asked = sight.blocks.at(sight.place_Q[query_Gq]), sight.blocks.at(key_Gk)
    mask_Gqk = _sees(
        asking.number_P[..., None], asking.noisy_P[..., None], asked.number_P[:, None], asked.noisy_P[:, None]
    )
    if real_G1k is not None:
        mask_Gqk = mask_Gqk & real_G1k
    if bool(mask_Gqk.all()):
        return None
    return mask_Gqk[:1] if bool((mask_Gqk == mask_Gqk[:1]).all()) else mask_Gqk


def _sees(query_number: Tensor, query_noisy: Tensor, key_number: Tensor, key_noisy: Tensor) -> Tensor:
    """The rule of `multidiff.sequence.blocks`."""
    same = (query_number == key_number) & (query_noisy == key_noisy)
    return same | ((key_number < query_number) & ~key_noisy)


def flex_mask(sight: Sight, key_starts: Tensor, query_starts: Tensor, device: torch.device) -> BlockMask:
    """The mask for FlexAttention. Tiles are left out where the documents and numbers of blocks in them tell that no
    query sees a key; in others each pair is looked at."""
    number_P, noisy_P = sight.blocks
    document_P = torch.repeat_interleave(key_starts.long().diff())
    document_Q = torch.repeat_interleave(query_starts.long().diff())
    number_Q, noisy_Q = sight.blocks.at(sight.place_Q)
    apart = int(number_P.max()) + 1
    lowest_J = _tiles(document_P * apart + number_P, torch.amin)
    highest_I = _tiles(document_Q * apart + number_Q, torch.amax)
    near_IJ = (lowest_J <= highest_I[:, None]) & (
        _tiles(document_P, torch.amax) >= _tiles(document_Q, torch.amin)[:, None]
    )
    of_query = _sent(torch.stack([document_Q, number_Q, noisy_Q.long()]), device)
    of_key = _sent(torch.stack([document_P, number_P, noisy_P.long()]), device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        noisy = of_key[2, key] > 0
        sees = _sees(of_query[1, query], of_query[2, query] > 0, of_key[1, key], noisy)
        return (of_query[0, query] == of_key[0, key]) & sees

    return BlockMask.from_kv_blocks(
        _sent(near_IJ.sum(1, dtype=torch.int32)[None, None], device),
        _sent(near_IJ.int().argsort(dim=1, descending=True, stable=True).int()[None, None], device),
        BLOCK_SIZE=_TILE,
        mask_mod=visible,
        seq_lengths=(len(document_Q), len(document_P)),
    )


def _tiles(value_N: Tensor, reduce: Any) -> Tensor:
    """A value of each tile, from those of its tokens."""
    behind = value_N[-1:].expand(-len(value_N) % _TILE)
    return reduce(torch.cat([value_N, behind]).view(-1, _TILE), 1)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


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
