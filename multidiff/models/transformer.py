"""The denoiser, whole: a transformer over flat batches of interleaved documents.

Like Llama: pre-norm RMSNorm, SwiGLU, rotary positions, grouped-query attention. Unlike it:
- attention stays within a document; it is bidirectional, or causal, or works in blocks (`multidiff.sequence.blocks`);
- a token has a position on three axes; frequency j of head_dim / 2 turns with axis j mod 3, so three equal
  coordinates give Llama's rotary exactly;
- a code's coordinates within its segment are added to its embedding as Fourier features, which make every place of a
  grid a direction of its own. Rotary alone ties what stands there to its place only through attention, which takes
  several times as many examples to learn;
- no time input unless asked for: the number of masks tells the time (Ou et al. 2024, arXiv 2406.03736). Where noise is
  not seen, as with uniform tokens, how much of it there is can be added to embeddings as Fourier features too;
- the head evaluates only the positions and the span of the vocabulary that it is asked for, and the last layer only
  these positions: its keys and values are needed everywhere, its queries and what follows from them are not.

Shape suffixes: P tokens of all documents one after another, A those that are computed, Q those whose logits are read,
D hidden size, H query heads, K key/value heads, E head dimension, F frequencies (E / 2), N positions that draw from one
span, V codes of a span, 3 axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from multidiff.models.attention import AttentionPlan, Sight, attend, plan_attention
from multidiff.models.cache import KeyValueCache
from multidiff.models.norm import RMSNorm
from multidiff.models.rotary import apply_rotary_emb, fourier_features, rotary, rotary_frequencies, wave_turns
from multidiff.models.sizes import prepares_shapes, shared_size
from multidiff.sequence.blocks import AttentionPattern, TokenBlocks
from multidiff.sequence.vocabulary import Span

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits_NV, target_N, place_N) → nats_N, where place_N are the places of these rows among those of their span."""
INITIAL_STD = 0.02
_NOISE_WAVES = 8
_LOGITS = 2**25  # elements of the logits that a loss keeps for backward
_CHUNK = 2**22  # elements of a chunk, where it keeps none: larger tensors get new memory, page by page, each time
_ROWS = 256  # of a chunk at least, or the gradients of the head's weight would cost more than the products


class MaskedDiffusionTransformer(ModelMixin, ConfigMixin):
    """Logits of masked tokens given what they attend to in their document; with causal attention, of the next code.

    Args:
        vocabulary_rows: rows of the embedding, `SharedVocabulary.rows`.
        hidden_size: D.
        num_layers: number of layers.
        num_heads: H, query heads; D / H must be even.
        num_key_value_heads: K ≤ H, shared by H / K query heads each; None means H.
        intermediate_size: width of the SwiGLU; None means 8/3 D, rounded up to a multiple of 64.
        rope_theta: base of the rotary frequencies.
        coordinate_features: add `fourier_features` of the coordinates to embeddings. Llama has none.
        time_input: add features of `noise_P` to embeddings, through a matrix that is 0 at first.
        norm_epsilon: of every RMSNorm.
        qk_norm: RMSNorm over each head's queries and keys.
        attention_bias: biases of the query, key and value projections.
        tie_embeddings: the head reads the embedding's weight.
        dropout: after attention and SwiGLU, in training.
        attention: "full", "causal" (autoregressive) or "block_causal"; see `multidiff.sequence.AttentionPattern`.
        block_length: codes in a block of "block_causal"; "segment" makes a block of each segment.

    Attributes:
        pattern: the attention pattern.

    Raises:
        ValueError: sizes or an attention pattern that do not fit.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("TransformerLayer",)

    @register_to_config
    def __init__(
        self,
        vocabulary_rows: int,
        hidden_size: int = 384,
        num_layers: int = 6,
        num_heads: int = 6,
        num_key_value_heads: int | None = None,
        intermediate_size: int | None = None,
        rope_theta: float = 10_000.0,
        coordinate_features: bool = True,
        time_input: bool = False,
        norm_epsilon: float = 1e-6,
        qk_norm: bool = True,
        attention_bias: bool = False,
        tie_embeddings: bool = True,
        dropout: float = 0.0,
        attention: str = "full",
        block_length: int | str | None = None,
    ):
        super().__init__()
        self.pattern = AttentionPattern(attention, block_length)  # pyright: ignore[reportArgumentType]
        if time_input and self.pattern.is_autoregressive:
            raise ValueError("time_input tells of noise, and a model with attention 'causal' has none. Leave it out.")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        kv_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        if kv_heads < 1 or hidden_size % num_heads or (hidden_size // num_heads) % 2 or num_heads % kv_heads:
            raise ValueError(
                f"hidden_size {hidden_size} must be an even multiple of num_heads {num_heads}, "
                f"and num_heads a multiple of num_key_value_heads {kv_heads}"
            )
        if intermediate_size is None:
            intermediate_size = -(-hidden_size * 8 // (3 * 64)) * 64
        self.head_size = hidden_size // num_heads
        self.embed = nn.Embedding(vocabulary_rows, hidden_size)
        self.time = nn.Linear(2 * _NOISE_WAVES, hidden_size, bias=False) if time_input else None
        self.layers = nn.ModuleList(
            TransformerLayer(
                Attention(hidden_size, num_heads, kv_heads, self.head_size, qk_norm, attention_bias, norm_epsilon),
                SwiGLU(hidden_size, intermediate_size),
                RMSNorm(hidden_size, norm_epsilon),
                RMSNorm(hidden_size, norm_epsilon),
                dropout,
            )
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(hidden_size, norm_epsilon)
        self.head = None if tie_embeddings else nn.Linear(hidden_size, vocabulary_rows, bias=False)
        self.gradient_checkpointing = False
        # Constants are made here, on the CPU whatever the default device, because a compiler rounds their powers in
        # another way and does not let integers wrap. A buffer would be cast along with the weights.
        self._frequencies_F = rotary_frequencies(self.head_size, rope_theta)
        self._turns_F3 = wave_turns(hidden_size // 2)

    @property
    def is_sharded(self) -> bool:
        """Whether the devices share the weights, so that all of them must run each forward pass."""
        return isinstance(self, FSDPModule)

    def shard(self, mesh: DeviceMesh) -> None:
        """Share the weights among the devices of a mesh, as FSDP2 does.

        A device gathers the weights of a layer before it computes the layer, and frees them afterwards. The embedding,
        the final norm and the head are gathered together for the whole pass. Outside of a pass every weight is a
        `DTensor`, of which each device holds some rows.

        Args:
            mesh: of one dimension.
        """
        for layer in self.layers:
            fully_shard(layer, mesh=mesh)
        # Freed after a pass that has no backward as well, so that callbacks and checkpoints never see gathered weights.
        fully_shard(self, mesh=mesh, reshard_after_forward=True)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw all weights: N(0, 0.02²), and 0.02 / √(2 · layers) where a layer writes to the residual stream
        (Radford et al. 2019, GPT-2, section 2.3). The time's are 0.

        A sharded transformer gets the same weights. Each device draws one whole matrix at a time and keeps its rows.

        Args:
            generator: of the CPU.
        """
        residual = INITIAL_STD / math.sqrt(2 * len(self.layers))
        for name, weight in self.named_parameters():
            if name.endswith("bias") or name == "time.weight":
                nn.init.zeros_(weight)
            elif weight.dim() == 1:
                nn.init.ones_(weight)
            else:
                writes = name.endswith(("attention.output.weight", "mlp.down.weight"))
                whole = torch.empty(weight.shape, dtype=weight.dtype, device=generator.device)
                nn.init.normal_(whole, std=residual if writes else INITIAL_STD, generator=generator)
                if isinstance(weight, DTensor):
                    mesh, placements = weight.device_mesh, weight.placements
                    whole = distribute_tensor(whole.to(weight.device), mesh, placements, src_data_rank=None)
                weight.copy_(whole)

    def forward(
        self,
        ids_P: Tensor,
        positions_P3: Tensor,
        document_starts: Tensor,
        logit_positions: Sequence[tuple[Tensor, Span]],
        coords_P3: Tensor | None = None,
        targets: Tensor | None = None,
        losses: Sequence[Loss] | None = None,
        noise_P: Tensor | None = None,
        cache: KeyValueCache | None = None,
        active_A: Tensor | None = None,
        blocks: TokenBlocks | None = None,
    ) -> list[Tensor]:
        """Logits where they are asked for, or a loss of targets there.

        Args:
            ids_P: shared ids of all documents, one after another; `<mask>` where noised.
            positions_P3: coordinates of each token on three axes.
            document_starts: int [D + 1], on the CPU: document d is document_starts[d]:document_starts[d + 1].
            logit_positions: (index_N, (start, stop)), on the CPU: evaluate shared ids start ≤ id < stop at the
                positions index_N, in any order and as often as they stand there. Spans are equal or disjoint. One may
                ask for no position; it then returns an empty tensor that still is part of the graph, so that every
                rank of a distributed run uses the same parameters.
            coords_P3: coordinates within the segment, negative at tokens outside of any; None where all are.
            targets: int64, ids relative to the start of the span, at all positions of `logit_positions` in their order.
                Where given, the losses of these are returned, in place of logits of which no more are held at once than
                a few million.
            losses: a loss for each of `logit_positions`; None takes the cross-entropy.
            noise_P: how much noise there is at each token, from 0 to 1; not used without `time_input`.
            cache: takes the keys and values of all tokens that are computed, in place; with `active_A`, lends those of
                others.
            active_A: int64, ascending, on the CPU: the tokens that are recomputed; all others keep their cached keys
                and values. Logits are asked for at some of these.
            blocks: of all tokens, where attention is "block_causal"; the other patterns need none.

        Returns:
            One [N, stop - start] tensor of logits, or one [N] of losses in nats, for each of `logit_positions`.

        Raises:
            ValueError: spans that overlap, no blocks where attention is "block_causal", or no noise where the
                transformer has a time input.
        """
        device, compute = ids_P.device, self._compute_dtype(ids_P.device)
        starts = document_starts.tolist()
        lengths = [b - a for a, b in pairwise(starts)]
        position_Q, order = torch.cat([index_N for index_N, _ in logit_positions]).sort()
        computed, inside_Q = lengths, position_Q
        sight = self._sight(starts[-1], blocks, active_A)
        active = None
        if active_A is not None:
            computed = _number_in_documents(active_A, document_starts)
            inside_Q = torch.searchsorted(active_A, position_Q)
            active = active_A.to(device, non_blocking=True)
            ids_P, positions_P3 = ids_P[active], positions_P3[active]
            coords_P3 = None if coords_P3 is None else coords_P3[active]
            noise_P = None if noise_P is None else noise_P[active]
        extra = extra_Q = 0  # rows that belong to no document and that nobody reads
        if prepares_shapes(device, compute):
            extra_Q = shared_size(len(position_Q)) - len(position_Q)
            if cache is None:
                extra = shared_size(len(ids_P)) - len(ids_P)
                ids_P, positions_P3 = F.pad(ids_P, (0, extra)), F.pad(positions_P3, (0, 0, 0, extra))
                coords_P3 = None if coords_P3 is None else F.pad(coords_P3, (0, 0, 0, extra))
                noise_P = None if noise_P is None else F.pad(noise_P, (0, extra))
        keys, queries, last = starts[-1] + extra, len(ids_P), len(position_Q) + extra_Q
        # FlexAttention takes no smaller heads. With a cache, queries are too few for its tiles.
        plan_of_all, flex = None, device.type == "cuda" and cache is None and self.head_size >= 16
        if len(self.layers) > 1:
            plan_of_all = plan_attention(lengths, computed, device, compute, (keys, queries), sight, flex)
        in_last = _number_in_documents(position_Q, document_starts)
        if sight is not None:
            sight = sight._replace(place_Q=position_Q)
        last_plan = plan_attention(lengths, in_last, device, compute, (keys, last), sight, flex)
        row_Q = F.pad(inside_Q, (0, extra_Q)).to(device, non_blocking=True)

        rope = rotary(positions_P3, self._frequencies_F, self.norm.weight.dtype == torch.float64)
        hidden_AD = self.embed(ids_P)
        if self.config["coordinate_features"] and coords_P3 is not None:
            hidden_AD = hidden_AD + INITIAL_STD * fourier_features(coords_P3, hidden_AD, self._turns_F3)
        if self.time is not None:
            if noise_P is None:
                raise ValueError("This transformer has a time input, so it needs noise_P.")
            hidden_AD = hidden_AD + self.time(_noise_features(noise_P).to(hidden_AD.dtype))
        for number, layer in enumerate(self.layers):
            last = number + 1 == len(self.layers)
            plan = last_plan if last else plan_of_all
            assert plan is not None
            arguments = (hidden_AD, *rope, plan, row_Q if last else None, _Kept(cache, number, active), compute)
            if self.gradient_checkpointing and self.training:
                hidden_AD = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden_AD = layer(*arguments)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        rows = [part.to(device, non_blocking=True) for part in back.split([len(i) for i, _ in logit_positions])]
        return self._read(self.norm(hidden_AD), rows, [span for _, span in logit_positions], targets, losses)

    def compile(self, dynamic: bool | None = True, **options: Any) -> None:
        """Compile the layers, once for any number of tokens. Attention between documents, and what surrounds the
        layers, change from batch to batch and are not compiled.

        Args:
            dynamic, options: of `torch.compile`.
        """
        for layer in self.layers:
            layer.compile(dynamic=dynamic, **options)

    def _sight(self, tokens: int, blocks: TokenBlocks | None, active_A: Tensor | None) -> Sight | None:
        """What the tokens that are computed see; None where that is their whole document."""
        if self.pattern.is_full:
            return None
        everywhere = torch.arange(tokens)
        if self.pattern.is_autoregressive:
            blocks = TokenBlocks.clean(everywhere)
        elif blocks is None:
            raise ValueError("attention 'block_causal' needs the blocks of the tokens, of AttentionPattern.numbers.")
        place_Q = everywhere if active_A is None else active_A
        return Sight(blocks, place_Q, self.pattern.is_autoregressive)

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        """What matrices are multiplied in."""
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.norm.weight.dtype

    def _read(
        self,
        hidden_QD: Tensor,
        rows: Sequence[Tensor],
        spans: Sequence[Span],
        targets: Tensor | None,
        losses: Sequence[Loss] | None,
    ) -> list[Tensor]:
        """The head: logits, or losses of targets, of these rows over these spans."""
        weight = self.embed.weight if self.head is None else self.head.weight
        # One split serves all spans: its backward writes one gradient of the whole weight instead of one per span.
        edges = sorted({0, weight.shape[0], *(edge for span in spans for edge in span)})
        pieces = dict(zip(edges, weight.split([b - a for a, b in pairwise(edges)]), strict=False))
        parts = [None] * len(rows) if targets is None else targets.split([len(row_N) for row_N in rows])
        of_spans = losses or [cross_entropy] * len(rows)
        shared = prepares_shapes(hidden_QD.device, self._compute_dtype(hidden_QD.device))
        results = []
        for row_N, (start, stop), target_N, loss in zip(rows, spans, parts, of_spans, strict=True):
            weight_VD = pieces[start]
            if len(weight_VD) != stop - start:
                raise ValueError(f"spans overlap at {start}:{stop}")
            number = len(row_N)
            extra = shared_size(number) - number if shared else 0
            place_N = torch.arange(number + extra, device=row_N.device).clamp_max(number - 1)  # the last one repeats
            hidden_ND = hidden_QD.index_select(0, row_N[place_N])
            if target_N is None:
                results.append((hidden_ND @ weight_VD.T)[:number])
            else:
                results.append(head_loss(hidden_ND, weight_VD, target_N[place_N], place_N, loss)[:number])
        return results


def _noise_features(noise_P: Tensor) -> Tensor:
    """[P, 16]: cosines and sines of waves of a quarter to 32 turns from no noise to all."""
    turns = noise_P[:, None] * torch.exp2(
        torch.arange(-2, _NOISE_WAVES - 2, device=noise_P.device, dtype=noise_P.dtype)
    )
    return torch.cat([torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)], 1)


def cross_entropy(logits_NV: Tensor, target_N: Tensor, place_N: Tensor) -> Tensor:
    """-log softmax(logits) at the targets: the `Loss` where no other is given."""
    return F.cross_entropy(logits_NV, target_N, reduction="none")


def head_loss(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, place_N: Tensor, loss: Loss) -> Tensor:
    """A loss of the logits h Wᵀ, nats, fp32 (fp64 for fp64 weights), [N].

    Where logits would have more elements than are kept for backward, they are computed in chunks, and again in
    backward.
    """
    if len(target_N) * len(weight_VD) <= _LOGITS:
        return _head_loss(hidden_ND, weight_VD, target_N, place_N, loss)
    chunk = max(_ROWS, _CHUNK // len(weight_VD))
    parts = zip(hidden_ND.split(chunk), target_N.split(chunk), place_N.split(chunk), strict=True)
    nats = [
        checkpoint(_head_loss, hidden, weight_VD, target, place, loss, use_reentrant=False)
        for hidden, target, place in parts
    ]
    return torch.cat(nats)  # pyright: ignore[reportArgumentType]


def _head_loss(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, place_N: Tensor, loss: Loss) -> Tensor:
    logits_NV = hidden_ND @ weight_VD.T
    return loss(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), target_N, place_N)


class _Kept(NamedTuple):
    """Where a layer keeps its keys and values: the cache, the layer's number, the tokens that are computed."""

    cache: KeyValueCache | None
    number: int
    active_A: Tensor | None


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(
        self, attention: Attention, mlp: SwiGLU, attention_norm: nn.Module, mlp_norm: nn.Module, dropout: float
    ):
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden_AD: Tensor,
        cos_A1E: Tensor,
        sin_A1E: Tensor,
        plan: AttentionPlan,
        row_Q: Tensor | None,
        kept: _Kept,
        compute: torch.dtype,
    ) -> Tensor:
        """The layer at rows `row_Q` of what is computed; None is all of them."""
        attended_QD = self.attention(self.attention_norm(hidden_AD), cos_A1E, sin_A1E, plan, row_Q, kept, compute)
        hidden_QD = hidden_AD if row_Q is None else hidden_AD.index_select(0, row_Q)
        hidden_QD = hidden_QD + self.dropout(attended_QD)
        return hidden_QD + self.dropout(self.mlp(self.mlp_norm(hidden_QD)))


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) with rotary positions."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        key_value_heads: int,
        head_size: int,
        qk_norm: bool,
        bias: bool,
        epsilon: float,
    ):
        super().__init__()
        self.head_size = head_size
        self.query = nn.Linear(hidden_size, num_heads * head_size, bias=bias)
        self.key = nn.Linear(hidden_size, key_value_heads * head_size, bias=bias)
        self.value = nn.Linear(hidden_size, key_value_heads * head_size, bias=bias)
        self.output = nn.Linear(num_heads * head_size, hidden_size, bias=False)
        self.query_norm = RMSNorm(head_size, epsilon) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(head_size, epsilon) if qk_norm else nn.Identity()

    def forward(
        self,
        hidden_AD: Tensor,
        cos_A1E: Tensor,
        sin_A1E: Tensor,
        plan: AttentionPlan,
        row_Q: Tensor | None,
        kept: _Kept,
        compute: torch.dtype,
    ) -> Tensor:
        heads = (-1, self.head_size)
        # Norms are computed in the precision of the weights and rotations in that of the angles, also under autocast.
        stored, exact = self.output.weight.dtype, cos_A1E.dtype
        key_AKE = self.key_norm(self.key(hidden_AD).unflatten(-1, heads).to(stored))
        key_AKE = apply_rotary_emb(key_AKE.to(exact), cos_A1E, sin_A1E).to(compute)
        value_AKE = self.value(hidden_AD).unflatten(-1, heads)
        if row_Q is not None:
            hidden_AD, cos_A1E, sin_A1E = (x.index_select(0, row_Q) for x in (hidden_AD, cos_A1E, sin_A1E))
        query_QHE = self.query_norm(self.query(hidden_AD).unflatten(-1, heads).to(stored))
        query_QHE = apply_rotary_emb(query_QHE.to(exact), cos_A1E, sin_A1E).to(compute)
        if kept.cache is not None:
            key_AKE, value_AKE = kept.cache.write(kept.number, key_AKE, value_AKE, kept.active_A)
        return self.output(attend(query_QHE, key_AKE, value_AKE, plan).flatten(1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_AD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden_AD)) * self.up(hidden_AD))


def _number_in_documents(index_Q: Tensor, document_starts: Tensor) -> list[int]:
    """How many of the ascending positions each document has."""
    return torch.searchsorted(index_Q, document_starts.to(index_Q.dtype)).diff().tolist()
