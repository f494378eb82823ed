"""The denoiser, whole: a bidirectional transformer over interleaved documents.

Like Llama: pre-norm RMSNorm, SwiGLU, rotary positions, grouped-query attention. Unlike it:
- attention is bidirectional within a document and closed between documents that share a row;
- a token has a position on three axes; frequency j of head_dim / 2 turns with axis j mod 3, so three equal
  coordinates give Llama's rotary exactly;
- a code's coordinates within its segment are added to its embedding as Fourier features, which make every place of a
  grid a direction of its own. Rotary alone ties what stands there to its place only through attention, which takes
  several times as many examples to learn;
- no time input: the number of masks tells the noise level (Ou et al. 2024, arXiv 2406.03736);
- the head evaluates only the positions and the span of the vocabulary that it is asked for.

Shape suffixes: B rows, L row length, D hidden size, H query heads, K key/value heads, E head dimension, F frequencies
(E / 2), N positions asked for, V codes of a span, A columns computed anew, S selected rows, 3 axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multidiff.sequence.vocabulary import Span

INITIAL_STD = 0.02


class MaskedDiffusionTransformer(ModelMixin, ConfigMixin):
    """Logits of masked tokens given everything else in their document.

    Args:
        vocabulary_rows: rows of the embedding, `SharedVocabulary.rows`.
        hidden_size: D.
        num_layers: number of blocks.
        num_heads: H, query heads; D / H must be even.
        num_key_value_heads: K ≤ H, shared by H / K query heads each; None means H.
        intermediate_size: width of the SwiGLU; None means 8/3 D, rounded up to a multiple of 64.
        rope_theta: base of the rotary frequencies.
        coordinate_features: add `fourier_features` of the coordinates to embeddings. Llama has none.
        norm_epsilon: of every RMSNorm.
        qk_norm: RMSNorm over each head's queries and keys.
        attention_bias: biases of the query, key and value projections.
        tie_embeddings: the head reads the embedding's weight.
        dropout: after attention and SwiGLU, in training.
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
        norm_epsilon: float = 1e-6,
        qk_norm: bool = True,
        attention_bias: bool = False,
        tie_embeddings: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        kv_heads = num_key_value_heads or num_heads
        if hidden_size % num_heads or (hidden_size // num_heads) % 2 or num_heads % kv_heads:
            raise ValueError(
                f"hidden_size {hidden_size} must be an even multiple of num_heads {num_heads}, "
                f"and num_heads a multiple of num_key_value_heads {kv_heads}"
            )
        intermediate_size = intermediate_size or -(-hidden_size * 8 // (3 * 64)) * 64
        self.head_size = hidden_size // num_heads
        self.embed = nn.Embedding(vocabulary_rows, hidden_size)
        self.layers = nn.ModuleList(
            TransformerLayer(
                Attention(hidden_size, num_heads, kv_heads, self.head_size, qk_norm, attention_bias, norm_epsilon),
                SwiGLU(hidden_size, intermediate_size),
                nn.RMSNorm(hidden_size, norm_epsilon),
                nn.RMSNorm(hidden_size, norm_epsilon),
                dropout,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, norm_epsilon)
        self.head = None if tie_embeddings else nn.Linear(hidden_size, vocabulary_rows, bias=False)
        self.gradient_checkpointing = False
        # Constants are made here, on the CPU whatever the default device, because a compiler rounds their powers in
        # another way and does not let integers wrap. A buffer would be cast along with the weights.
        self._frequencies_F = rotary_frequencies(self.head_size, rope_theta)
        self._turns_F3 = wave_turns(hidden_size // 2)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw all weights: N(0, 0.02²), and 0.02 / √(2 · layers) where a block writes to the residual stream
        (Radford et al. 2019, GPT-2, section 2.3)."""
        residual = INITIAL_STD / math.sqrt(2 * len(self.layers))
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 1:
                nn.init.ones_(weight)
            else:
                writes = name.endswith(("attention.output.weight", "mlp.down.weight"))
                nn.init.normal_(weight, std=residual if writes else INITIAL_STD, generator=generator)

    def forward(
        self,
        ids_BL: Tensor,
        positions_BL3: Tensor,
        document_BL: Tensor,
        queries: Sequence[tuple[Tensor, Span]],
        coords_BL3: Tensor | None = None,
        cache: KeyValueCache | None = None,
        active_BA: Tensor | None = None,
    ) -> list[Tensor]:
        """Logits where they are asked for.

        Args:
            ids_BL: shared ids, `<mask>` where noised.
            positions_BL3: coordinates of each token on three axes.
            document_BL: tokens attend to those with the same number in their row (padding to padding).
            queries: (index_N, (start, stop)): evaluate shared ids start ≤ id < stop at flat positions index_N of B·L.
                Spans are disjoint. One may ask for no position; it then returns an empty tensor that still is part
                of the graph, so that every rank of a distributed run uses the same parameters.
            coords_BL3: coordinates within the segment, negative at tokens outside of any; None where all are.
            cache: takes the keys and values of this pass; with `active_BA`, lends those of an earlier one.
            active_BA: the columns of each row that are computed anew; all others keep their cached keys and values.
                `queries` then count positions in B·A.

        Returns:
            One [N, stop - start] tensor for each query.
        """
        mask_B1LL = (document_BL[:, None, :, None] == document_BL[:, None, None, :]) if _closed(document_BL) else None
        if active_BA is not None:
            ids_BL, positions_BL3 = ids_BL.gather(1, active_BA), _columns(positions_BL3, active_BA)
            coords_BL3 = None if coords_BL3 is None else _columns(coords_BL3, active_BA)
            if mask_B1LL is not None:
                mask_B1LL = _columns(mask_B1LL[:, 0], active_BA)[:, None]
        cos_BL1E, sin_BL1E = rotary(positions_BL3, self._frequencies_F, self.dtype)
        hidden_BLD = self.embed(ids_BL)
        if self.config["coordinate_features"] and coords_BL3 is not None:
            hidden_BLD = hidden_BLD + INITIAL_STD * fourier_features(coords_BL3, hidden_BLD, self._turns_F3)
        for number, block in enumerate(self.layers):
            layer = None if cache is None else (cache, number, active_BA)
            arguments = (hidden_BLD, cos_BL1E, sin_BL1E, mask_B1LL, layer)
            if self.gradient_checkpointing and self.training:
                hidden_BLD = checkpoint(block, *arguments, use_reentrant=False)
            else:
                hidden_BLD = block(*arguments)
        return self._logits(self.norm(hidden_BLD), queries)

    def _logits(self, hidden_BLD: Tensor, queries: Sequence[tuple[Tensor, Span]]) -> list[Tensor]:
        weight = self.embed.weight if self.head is None else self.head.weight
        # One split serves all spans: its backward writes one gradient of the whole weight instead of one per span.
        edges = sorted({0, weight.shape[0], *(edge for _, span in queries for edge in span)})
        pieces = dict(zip(edges, weight.split([b - a for a, b in pairwise(edges)]), strict=False))
        hidden_PD = hidden_BLD.flatten(0, 1)
        logits = []
        for index_N, (start, stop) in queries:
            if pieces[start].shape[0] != stop - start:
                raise ValueError(f"spans overlap at {start}:{stop}")
            logits.append(hidden_PD.index_select(0, index_N) @ pieces[start].T)
        return logits


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
        hidden_BLD: Tensor,
        cos_BL1E: Tensor,
        sin_BL1E: Tensor,
        mask_B1LL: Tensor | None,
        layer: Layer | None = None,
    ) -> Tensor:
        attended_BLD = self.attention(self.attention_norm(hidden_BLD), cos_BL1E, sin_BL1E, mask_B1LL, layer)
        hidden_BLD = hidden_BLD + self.dropout(attended_BLD)
        return hidden_BLD + self.dropout(self.mlp(self.mlp_norm(hidden_BLD)))


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
        self.query_norm = nn.RMSNorm(head_size, epsilon) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_size, epsilon) if qk_norm else nn.Identity()

    def forward(
        self,
        hidden_BLD: Tensor,
        cos_BL1E: Tensor,
        sin_BL1E: Tensor,
        mask_B1LL: Tensor | None,
        layer: Layer | None = None,
    ) -> Tensor:
        heads = (-1, self.head_size)
        # In the precision of the weights, also under autocast: norms and rotations need it, and on a CPU attention in
        # bf16 takes three times as long as in fp32.
        exact = cos_BL1E.dtype
        query_BLHE = self.query_norm(self.query(hidden_BLD).unflatten(-1, heads).to(exact))
        key_BLKE = self.key_norm(self.key(hidden_BLD).unflatten(-1, heads).to(exact))
        value_BLKE = self.value(hidden_BLD).unflatten(-1, heads).to(exact)
        query_BLHE = apply_rotary_emb(query_BLHE, cos_BL1E, sin_BL1E)
        key_BLKE = apply_rotary_emb(key_BLKE, cos_BL1E, sin_BL1E)
        if layer is not None:
            cache, number, active_BA = layer
            key_BLKE, value_BLKE = cache.all_of(number, key_BLKE, value_BLKE, active_BA)
        with torch.autocast("cpu", enabled=False):
            attended_BHLE = F.scaled_dot_product_attention(
                query_BLHE.transpose(1, 2),
                key_BLKE.transpose(1, 2),
                value_BLKE.transpose(1, 2),
                attn_mask=mask_B1LL,
                enable_gqa=query_BLHE.shape[2] != key_BLKE.shape[2],
            )
        return self.output(attended_BHLE.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden_BLD)) * self.up(hidden_BLD))


class KeyValueCache:
    """Keys and values of an earlier pass, in which tokens stood that may since have changed: attending to them is an
    approximation wherever attention goes both ways (Wu et al. 2025, Fast-dLLM, arXiv 2505.22618, section 3.2)."""

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def all_of(
        self, number: int, key_BAKE: Tensor, value_BAKE: Tensor, active_BA: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a whole row, [B, L, K, E]: the cached ones with these in their places.

        Without `active_BA` these are whole, and kept.
        """
        if active_BA is None:
            self._layers[number:] = [(key_BAKE, value_BAKE)]
            return key_BAKE, value_BAKE
        key_BLKE, value_BLKE = self._layers[number]
        index_BAKE = active_BA[:, :, None, None].expand_as(key_BAKE)
        return key_BLKE.scatter(1, index_BAKE, key_BAKE), value_BLKE.scatter(1, index_BAKE, value_BAKE)

    def select(self, row_S: Tensor) -> KeyValueCache:
        """A cache of these rows."""
        selected = KeyValueCache()
        selected._layers = [(key_BLKE[row_S], value_BLKE[row_S]) for key_BLKE, value_BLKE in self._layers]
        return selected

    def update(self, row_S: Tensor, other: KeyValueCache, rows: int) -> None:
        """Take the rows of `other` as rows `row_S` of `rows`."""
        if not self._layers:
            self._layers = [
                (key.new_zeros(rows, *key.shape[1:]), value.new_zeros(rows, *value.shape[1:]))
                for key, value in other._layers
            ]
        for ours, theirs in zip(self._layers, other._layers, strict=True):
            for old_BLKE, new_SLKE in zip(ours, theirs, strict=True):
                old_BLKE[row_S] = new_SLKE


Layer = tuple[KeyValueCache, int, Tensor | None]  # cache, number of the block, active_BA


def rotary_frequencies(head_size: int, theta: float) -> Tensor:
    """θ^(-2j / E) for j < E / 2, float32 [F] (Su et al. 2021, arXiv 2104.09864, eq. 15)."""
    return 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.int64, device="cpu").float() / head_size)


def rotary(positions_BL3: Tensor, frequencies_F: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [B, L, 1, E]: frequency j turns with the coordinate on axis j mod 3.

    Angles are computed in fp32 (fp64 for an fp64 model): a bf16 position is wrong beyond 256.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies_F = frequencies_F.to(positions_BL3.device, exact, non_blocking=True)
    axis_F = torch.arange(len(frequencies_F), device=positions_BL3.device) % 3
    angle_BLF = positions_BL3[..., axis_F].to(exact) * frequencies_F
    angle_BL1E = torch.cat([angle_BLF, angle_BLF], dim=-1)[:, :, None]
    return angle_BL1E.cos().to(dtype), angle_BL1E.sin().to(dtype)


def wave_turns(number: int) -> Tensor:
    """frac(j²√2, j³√3, j⁴√5), j = 1, 2, …, or less by 1 where that is one half or more: float64 [F, 3], F = number."""
    # In 64-bit fixed point: integers wrap, which leaves the fraction exact however large j⁴ grows.
    number_F = torch.arange(1, number + 1, device="cpu")
    turns_F3 = torch.stack([number_F**power * _fixed_fraction_of_root(n) for power, n in ((2, 2), (3, 3), (4, 5))], -1)
    return turns_F3.double() / 2.0**64


def fourier_features(coords_BL3: Tensor, like_BLD: Tensor, turns_F3: Tensor) -> Tensor:
    """√2 · (cos, sin)(coords · ω) of D / 2 plane waves, in D's type and shape; 0 where a coordinate is negative.

    Fourier features (Rahimi & Recht 2007; for coordinates Tancik et al. 2020, arXiv 2006.10739). The wave vectors
    ω = 2π frac(j²√2, j³√3, j⁴√5), j = 1, 2, …, are spread evenly and without pattern (Weyl 1916) over the whole cube
    [0, 2π)³, so that different whole coordinates are nearly orthogonal: their cosine is about ±1/√D. Products are
    taken one by one: as a matrix product, autocast would round them.

    Args:
        turns_F3: ω / 2π of `wave_turns(D // 2)`.
    """
    exact = torch.float64 if like_BLD.dtype == torch.float64 else torch.float32
    turns_F3 = turns_F3.to(coords_BL3.device, exact, non_blocking=True)
    turns_BLF = sum(coords_BL3[..., axis, None].to(exact) * turns_F3[:, axis] for axis in range(3))
    phase_BLF = 2 * math.pi * torch.as_tensor(turns_BLF).frac()
    features_BLD = torch.cat([phase_BLF.cos(), phase_BLF.sin()], dim=-1) * math.sqrt(2)
    return features_BLD.masked_fill((coords_BL3 < 0).any(-1, keepdim=True), 0).to(like_BLD.dtype)


def _fixed_fraction_of_root(n: int) -> int:
    """frac(√n) in units of 2^-64, as a signed 64-bit integer: one of 2^63 and more stands for itself less one turn."""
    fraction = math.isqrt(n << 128) % (1 << 64)
    return fraction - (fraction >> 63 << 64)


def _columns(x_BLX: Tensor, active_BA: Tensor) -> Tensor:
    return x_BLX.gather(1, active_BA[:, :, None].expand(-1, -1, x_BLX.shape[2]))


def apply_rotary_emb(x_BLHE: Tensor, cos_BL1E: Tensor, sin_BL1E: Tensor) -> Tensor:
    """Rotate each pair (j, j + E/2) by its angle (Llama's "rotate-half" layout)."""
    first, second = x_BLHE.chunk(2, dim=-1)
    return x_BLHE * cos_BL1E + torch.cat([-second, first], dim=-1) * sin_BL1E


def _closed(document_BL: Tensor) -> bool:
    """Whether attention needs a mask. On an accelerator the answer would cost a synchronisation, and a compiled graph
    cannot branch on it, so there it is yes."""
    if document_BL.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return bool((document_BL != document_BL[:, :1]).any())
