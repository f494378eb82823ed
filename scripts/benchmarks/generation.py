"""Generation by a model whose attention works in blocks, with and without its exact cache; without training."""

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import interleaved
from multidiff import MaskedDiffusionTransformer, MaskSampler
from multidiff.generation.decoder import Decoder
from multidiff.generation.runs import SegmentFacts, make_runs
from multidiff.seeding import generator_for
from multidiff.sequence import Segment, Sequencer, SharedVocabulary, TokenBatch
from multidiff.sequence.vocabulary import TokenizerLayout


def generation(arguments: argparse.Namespace) -> dict[str, Any]:
    """How many times as fast the exact cache makes it. The passes without it leave out later blocks as well."""
    torch.set_num_threads(arguments.threads)
    vocabulary = SharedVocabulary({"text": TokenizerLayout(None, "line", (1024,), False, "text")})
    pattern = {"attention": arguments.attention}
    if arguments.attention == "block_causal":
        pattern["block_length"] = arguments.block_length
    model = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=384, num_layers=6, num_heads=6, **pattern)
    model.initialize(generator_for(0))
    model.eval()
    blocks = -(-arguments.tokens // arguments.block_length)
    steps = arguments.tokens if arguments.attention == "causal" else blocks * arguments.steps
    batch = _document(vocabulary, arguments.tokens)
    made: dict[str, Tensor] = {}

    def run(cache: str) -> None:
        made[cache] = _generate(model, vocabulary, batch, MaskSampler(unmasking="linear", cache=cache), steps)

    seconds = interleaved({cache: lambda cache=cache: run(cache) for cache in ("none", "exact")}, arguments.rounds)
    if not torch.equal(made["none"], made["exact"]):
        raise SystemExit("The samples with and without the cache differ.")
    million = sum(weight.numel() for weight in model.parameters()) / 1e6
    print(f"{arguments.tokens:,} tokens in {steps:,} steps by {million:.1f} million parameters, {arguments.attention}:")
    print("| cache | tokens/s | times as fast |\n|---|---|---|")
    for cache, spent in seconds.items():
        print(f"| {cache} | {arguments.tokens / spent:,.1f} | {seconds['none'] / spent:.1f} |")
    return {"tokens": arguments.tokens, "steps": steps, "times as fast": round(seconds["none"] / seconds["exact"], 2)}


def _document(vocabulary: SharedVocabulary, length: int) -> TokenBatch:
    zero_N, place_N = torch.zeros(length, dtype=torch.int64), torch.arange(length)
    unknown_N, coords_N3 = torch.zeros(length, dtype=torch.bool), place_N[:, None].expand(-1, 3)
    segment = Segment("text", zero_N, zero_N, coords_N3, unknown_N, length, {"length": length}, "text")
    return Sequencer({}, vocabulary).batch([[segment]])


@torch.no_grad()
def _generate(
    model: MaskedDiffusionTransformer, vocabulary: SharedVocabulary, batch: TokenBatch, sampler: MaskSampler, steps: int
) -> Tensor:
    facts, generators = (
        SegmentFacts(torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)),
        [generator_for(0)],
    )
    runs = make_runs(batch, facts, vocabulary, {"text": sampler}, generators, steps, pattern=model.pattern)
    decoder = Decoder(model, vocabulary, batch, runs, {}, generators)
    for step in range(decoder.steps):
        decoder.step(step)
    return decoder.ids_P


def add_parsers(commands: Any) -> None:
    """The command `generation`."""
    help_ = "the exact cache of models whose attention has an order"
    parser = commands.add_parser("generation", help=help_, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--attention", choices=("block_causal", "causal"), default="block_causal", help="of the model")
    parser.add_argument("--tokens", type=int, default=1024, help="codes to generate")
    parser.add_argument("--block-length", type=int, default=16, help="codes in a block of block_causal attention")
    parser.add_argument("--steps", type=int, default=4, help="steps for each block of block_causal attention")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--rounds", type=int, default=1, help="rounds in which both take turns; the best counts")
    parser.set_defaults(run=generation)
