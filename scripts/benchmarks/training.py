"""How fast a training step is: beside a plain Llama-type stack, as a share of what matrix products reach, and for
documents of many lengths. All times are of variants that take turns in one run, the best of several rounds."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import interleaved
from multidiff.models import MaskedDiffusionTransformer
from multidiff.models.rotary import apply_rotary_emb, rotary, rotary_frequencies
from multidiff.models.transformer import SwiGLU
from multidiff.objectives import NoisedBatch, Noising, Objective, Task
from multidiff.seeding import generator_for
from multidiff.sequence import Example, Segment, Sequencer, SharedVocabulary
from multidiff.sequence.vocabulary import TokenizerLayout

HIDDEN, LAYERS, HEADS = 384, 6, 6


class PlainLayer(nn.Module):
    """Llama's layer, bidirectional, over rows."""

    def __init__(self, hidden: int, heads: int, intermediate: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, 1e-6) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(3))
        self.head_norms = nn.ModuleList(nn.RMSNorm(hidden // heads, 1e-6) for _ in range(2))
        self.output = nn.Linear(hidden, hidden, bias=False)
        self.mlp = SwiGLU(hidden, intermediate)

    def forward(self, hidden_BLD: Tensor, cos_L1E: Tensor, sin_L1E: Tensor) -> Tensor:
        normed_BLD = self.norms[0](hidden_BLD)
        query, key, value = (project(normed_BLD).unflatten(-1, (self.heads, -1)) for project in self.qkv)
        query, key = (
            apply_rotary_emb(norm(x), cos_L1E, sin_L1E) for norm, x in zip(self.head_norms, (query, key), strict=True)
        )
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value)
        hidden_BLD = hidden_BLD + self.output(attended.transpose(1, 2).flatten(2))
        return hidden_BLD + self.mlp(self.norms[1](hidden_BLD))


class PlainStack(nn.Module):
    """The same layers, with logits of every position over the whole vocabulary."""

    def __init__(self, vocabulary: int, hidden: int, layers: int, heads: int):
        super().__init__()
        intermediate = -(-hidden * 8 // (3 * 64)) * 64
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(PlainLayer(hidden, heads, intermediate) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, 1e-6)
        self.frequencies = rotary_frequencies(hidden // heads, 10_000.0)

    def forward(self, ids_BL: Tensor) -> Tensor:
        positions_L3 = torch.arange(ids_BL.shape[1])[:, None].expand(-1, 3)
        rope = rotary(positions_L3, self.frequencies, False)
        hidden_BLD = self.embed(ids_BL)
        for layer in self.layers:
            hidden_BLD = layer(hidden_BLD, *rope)
        return self.norm(hidden_BLD) @ self.embed.weight.T


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of a training step, and shares of the peak."""
    torch.set_num_threads(arguments.threads)
    span = arguments.vocabulary // 2 - 8
    vocabulary = SharedVocabulary({name: TokenizerLayout(None, "line", (span,), False, name) for name in ("a", "b")})
    model = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=HEADS)
    model.initialize(generator_for(0))
    plain = PlainStack(vocabulary.rows, HIDDEN, LAYERS, HEADS)
    for weight in plain.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.02, generator=generator_for(1))
    optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-4) for network in (model, plain)]
    batches = _batches(vocabulary, arguments.batch, arguments.length, arguments.rounds + 1)
    turn = {"ours": 0, "plain": 0}

    def ours() -> None:
        batch = batches[turn["ours"] % len(batches)]
        turn["ours"] += 1
        nats = torch.cat(_nats(model, vocabulary, batch))
        ((nats * batch.loss_weights_M).sum() / batch.loss_divisor).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    rows = [_as_rows(batch, vocabulary, arguments.batch) for batch in batches]

    def theirs() -> None:
        ids_BL, target_P, weight_P, divisor = rows[turn["plain"] % len(rows)]
        turn["plain"] += 1
        logits_BLV = plain(ids_BL)
        nats_P = F.cross_entropy(logits_BLV.flatten(0, 1), target_P, ignore_index=-100, reduction="none")
        ((nats_P * weight_P).sum() / divisor).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    seconds = interleaved({"ours": ours, "plain": theirs}, arguments.rounds)
    tokens = arguments.batch * 2 * arguments.length
    print("| stack | tokens/s | times as fast |\n|---|---|---|")
    for name, ratio in (("plain", 1.0), ("ours", seconds["plain"] / seconds["ours"])):
        print(f"| {name} | {tokens / seconds[name]:,.0f} | {ratio:.2f} |")
    result: dict[str, Any] = {"times as fast as the plain stack": round(seconds["plain"] / seconds["ours"], 3)}
    print("\n| precision | GFLOP/s of matrix products | of the layers | share |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        peak, reached = _peak_and_layers(arguments, dtype)
        print(f"| {str(dtype).removeprefix('torch.')} | {peak:,.0f} | {reached:,.0f} | {reached / peak:.2f} |")
        result[f"share of the peak, {str(dtype).removeprefix('torch.')}"] = round(reached / peak, 3)
    return result


def lengths(arguments: argparse.Namespace) -> dict[str, Any]:
    """What documents of many lengths cost together, beside one by one."""
    torch.set_num_threads(arguments.threads)
    vocabulary = SharedVocabulary({"a": TokenizerLayout(None, "line", (arguments.vocabulary,), False, "a")})
    model = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=HEADS)
    model.initialize(generator_for(0))
    sizes = [64, 64, 96, 128, 128, 200, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    noising = Noising(Sequencer({}, vocabulary), [Task({"a": "target"})], Objective(), 0)
    examples = [Example([_segment("a", size - 3, vocabulary)], 0, i, i) for i, size in enumerate(sizes)]
    together, alone = noising(examples), [noising([example]) for example in examples]

    def step(batches: Sequence[NoisedBatch]) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                (torch.cat(_nats(model, vocabulary, batch)) * batch.loss_weights_M).sum().backward()
            model.zero_grad()

        return run

    seconds = interleaved({"together": step([together]), "one by one": step(alone)}, arguments.rounds)
    ratio = seconds["together"] / seconds["one by one"]
    print(f"{len(sizes)} documents of {min(sizes)} to {max(sizes)} tokens, {sum(sizes):,} in all:")
    print("| batch | tokens/s | cost |\n|---|---|---|")
    for name in seconds:
        print(f"| {name} | {sum(sizes) / seconds[name]:,.0f} | {seconds[name] / seconds['one by one']:.2f} |")
    return {"cost of a mixed batch": round(ratio, 3)}


def _nats(model: MaskedDiffusionTransformer, vocabulary: SharedVocabulary, batch: NoisedBatch) -> list[Tensor]:
    positions = batch.logit_positions(vocabulary)
    arguments = (batch.ids_P, batch.positions_P3, batch.document_starts, positions, batch.coords_P3, batch.targets_M)
    return model(*arguments)


def _segment(name: str, length: int, vocabulary: SharedVocabulary) -> Segment:
    place_N = torch.arange(length)
    zero_N, known_N = torch.zeros_like(place_N), torch.ones(length, dtype=torch.bool)
    ids_N = place_N % vocabulary.tokenizers[name].codebook_sizes[0]
    return Segment(name, ids_N, zero_N, place_N[:, None].expand(-1, 3), known_N, length, {"length": length}, name)


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
    document = [_segment(name, length, vocabulary) for name in vocabulary.tokenizers]
    return [noising([Example(document, 0, step * size + i, i) for i in range(size)]) for step in range(number)]


def _peak_and_layers(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[float, float]:
    """GFLOP/s of a large matrix product, and of the layers forward and backward, all positions asked for."""
    model = MaskedDiffusionTransformer(64, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=HEADS)
    model.initialize(generator_for(0))
    length, tokens = 2 * arguments.length, arguments.batch * 2 * arguments.length
    starts = torch.arange(arguments.batch + 1) * length
    ids_P, everywhere = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)
    positions_P3 = (everywhere % length)[:, None].expand(-1, 3)

    def layers() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            (logits,) = model(ids_P, positions_P3, starts, [(everywhere, (0, 64))], positions_P3)
        logits.backward(torch.ones_like(logits))
        model.zero_grad()

    factor = torch.randn(2048, 2048, generator=generator_for(0)).to(dtype)
    seconds = interleaved({"layers": layers, "product": lambda: factor @ factor}, arguments.rounds)
    weights = sum(weight.numel() for weight in model.layers.parameters() if weight.dim() > 1)
    flops = 3 * (2 * tokens * weights + 4 * tokens * length * HIDDEN * LAYERS)
    return 2 * 2048**3 / seconds["product"] / 1e9, flops / seconds["layers"] / 1e9


def add_parsers(commands: Any) -> None:
    """The commands `training` and `lengths`."""
    for run, help_, rounds in (
        (training, "training steps beside a plain Llama-type stack, and shares of the peak", 10),
        (lengths, "documents of many lengths together, beside one by one", 3),
    ):
        parser = commands.add_parser(run.__name__, help=help_)
        parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default: all cores)")
        parser.add_argument(
            "--rounds", type=int, default=rounds, help="rounds, of which the best counts (default: %(default)s)"
        )
        parser.add_argument(
            "--vocabulary", type=int, default=16_384, help="size of the vocabulary (default: %(default)s)"
        )
        if run is training:
            parser.add_argument("--batch", type=int, default=4, help="documents of a batch (default: %(default)s)")
            parser.add_argument(
                "--length", type=int, default=256, help="codes of each of two segments (default: %(default)s)"
            )
        parser.set_defaults(run=run)
