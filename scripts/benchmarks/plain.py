"""A training step beside that of a plain Llama-type stack on the same documents, and the layers alone."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.documents import nats_of, segment_of, vocabulary_of
from benchmarks.timing import interleaved
from multidiff.models import MaskedDiffusionTransformer, forward_flops
from multidiff.models.rotary import apply_rotary_emb, rotary, rotary_frequencies
from multidiff.models.transformer import SwiGLU, TransformerLayer
from multidiff.objectives import NoisedBatch, Noising, Objective, Task
from multidiff.seeding import generator_for
from multidiff.sequence import Example, Sequencer, SharedVocabulary


class PlainLayer(nn.Module):
    """Llama's layer, bidirectional, over rows."""

    def __init__(self, hidden: int, heads: int, key_value_heads: int, intermediate: int):
        super().__init__()
        self.head_size = hidden // heads
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, 1e-6) for _ in range(2))
        self.qkv = nn.ModuleList(
            nn.Linear(hidden, number * self.head_size, bias=False)
            for number in (heads, key_value_heads, key_value_heads)
        )
        self.head_norms = nn.ModuleList(nn.RMSNorm(self.head_size, 1e-6) for _ in range(2))
        self.output = nn.Linear(hidden, hidden, bias=False)
        self.mlp = SwiGLU(hidden, intermediate)

    def forward(self, hidden_BLD: Tensor, cos_L1E: Tensor, sin_L1E: Tensor) -> Tensor:
        normed_BLD = self.norms[0](hidden_BLD)
        query, key, value = (project(normed_BLD).unflatten(-1, (-1, self.head_size)) for project in self.qkv)
        query, key = (
            apply_rotary_emb(norm(x), cos_L1E, sin_L1E) for norm, x in zip(self.head_norms, (query, key), strict=True)
        )
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        hidden_BLD = hidden_BLD + self.output(attended.transpose(1, 2).flatten(2))
        return hidden_BLD + self.mlp(self.norms[1](hidden_BLD))


class PlainStack(nn.Module):
    """The layers of a transformer of the same sizes, with logits of every position over the whole vocabulary."""

    def __init__(self, like: MaskedDiffusionTransformer):
        super().__init__()
        sizes, layer = like.config, cast("TransformerLayer", like.layers[0])
        hidden, heads, intermediate = sizes["hidden_size"], sizes["num_heads"], layer.mlp.gate.out_features
        self.embed = nn.Embedding(sizes["vocabulary_rows"], hidden)
        self.layers = nn.ModuleList(
            PlainLayer(hidden, heads, sizes["num_key_value_heads"] or heads, intermediate) for _ in like.layers
        )
        self.norm = nn.RMSNorm(hidden, 1e-6)
        self.frequencies = rotary_frequencies(hidden // heads, sizes["rope_theta"])
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02, generator=generator_for(1))

    def forward(self, ids_BL: Tensor) -> Tensor:
        positions_L3 = torch.arange(ids_BL.shape[1])[:, None].expand(-1, 3)
        rope = rotary(positions_L3, self.frequencies, False)
        hidden_BLD = self.embed(ids_BL)
        for layer in self.layers:
            hidden_BLD = layer(hidden_BLD, *rope)
        return self.norm(hidden_BLD) @ self.embed.weight.T


def beside_plain(transformer: dict[str, Any], vocabulary: int, length: int, batch: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of both, in turns, and how many times as fast this project's step is; on the CPU, in fp32.

    Args:
        transformer: settings of `MaskedDiffusionTransformer`.
        vocabulary: codes of two tokenizers together.
        length: codes of a document, half of each tokenizer.
        batch: documents of a batch.
        rounds: of which the best counts.
    """
    shared = vocabulary_of("a", "b", size=vocabulary // 2)
    model = MaskedDiffusionTransformer(shared.rows, **transformer)
    model.initialize(generator_for(0))
    plain = PlainStack(model)
    optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-4) for network in (model, plain)]
    batches = _batches(shared, batch, length // 2, rounds + 1)
    rows = [_as_rows(one, shared, batch) for one in batches]
    turn = {"multidiff": 0, "plain": 0}

    def ours() -> None:
        one = batches[turn["multidiff"] % len(batches)]
        turn["multidiff"] += 1
        ((nats_of(model, shared, one) * one.loss_weights_M).sum() / one.loss_divisor).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    def theirs() -> None:
        ids_BL, target_P, weight_P, divisor = rows[turn["plain"] % len(rows)]
        turn["plain"] += 1
        nats_P = F.cross_entropy(plain(ids_BL).flatten(0, 1), target_P, ignore_index=-100, reduction="none")
        ((nats_P * weight_P).sum() / divisor).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    seconds = interleaved({"plain": theirs, "multidiff": ours}, rounds)
    tokens = batch * length
    print("\n| stack | tokens/s | times as fast |\n|---|---|---|")
    for name, spent in seconds.items():
        print(f"| {name} | {tokens / spent:,.0f} | {seconds['plain'] / spent:.2f} |")
    return {"times as fast as the plain stack": round(seconds["plain"] / seconds["multidiff"], 3)}


def layers_alone(transformer: dict[str, Any], length: int, batch: int, rounds: int) -> dict[str, Any]:
    """What the layers reach forward and backward, all positions asked for, beside a matrix product; on the CPU.

    Args:
        transformer, length, batch, rounds: as in `beside_plain`.
    """
    model = MaskedDiffusionTransformer(64, **transformer)
    model.initialize(generator_for(0))
    tokens = batch * length
    starts = torch.arange(batch + 1) * length
    ids_P, everywhere = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)
    positions_P3 = (everywhere % length)[:, None].expand(-1, 3)
    asked = [(everywhere, (0, 64))]
    result: dict[str, Any] = {}
    print("\n| precision | GFLOP/s of matrix products | of the layers | share |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):

        def layers(dtype: torch.dtype = dtype) -> None:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                (logits,) = model(ids_P, positions_P3, starts, asked, positions_P3)
            logits.backward(torch.ones_like(logits))
            model.zero_grad()

        factor = torch.ones(2048, 2048, dtype=dtype)
        seconds = interleaved({"layers": layers, "product": lambda factor=factor: factor @ factor}, rounds)
        peak = 2 * 2048**3 / seconds["product"]
        reached = 3 * forward_flops(model, starts, asked) / seconds["layers"]
        name = str(dtype).removeprefix("torch.")
        print(f"| {name} | {peak / 1e9:,.0f} | {reached / 1e9:,.0f} | {reached / peak:.2f} |")
        result[f"share of the peak by the layers alone, {name}"] = round(reached / peak, 3)
    return result


def _as_rows(batch: NoisedBatch, vocabulary: SharedVocabulary, size: int) -> tuple[Tensor, ...]:
    """Ids in rows, and targets, weights and the divisor of the loss, without <bos> and the tokens around segments: as
    many positions as there are codes."""
    code_P = batch.coords_P3[:, 0] >= 0
    start_M = torch.repeat_interleave(vocabulary.span_edges[:, 0], torch.tensor(batch.sizes))
    target_P = torch.full_like(batch.ids_P, -100).index_copy(0, batch.index_M, batch.targets_M + start_M)
    weight_P = torch.zeros(len(batch.ids_P)).index_copy(0, batch.index_M, batch.loss_weights_M)
    return batch.ids_P[code_P].view(size, -1), target_P[code_P], weight_P[code_P], batch.loss_divisor


def _batches(vocabulary: SharedVocabulary, size: int, length: int, number: int) -> list[NoisedBatch]:
    noising = Noising(Sequencer({}, vocabulary), [Task({"others": "target"})], Objective(weighting="uniform"), 0)
    document = [segment_of(name, length, vocabulary) for name in vocabulary.tokenizers]
    return [noising([Example(document, 0, step * size + i, i) for i in range(size)]) for step in range(number)]
