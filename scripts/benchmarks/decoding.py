"""The speed of decoding beside LLaDA's reference sampling loop, on a model without training."""

import argparse
from typing import Any

import torch

from benchmarks.timing import interleaved
from multidiff import MaskedDiffusionTransformer, MaskSampler
from multidiff.generation.decoder import Decoder
from multidiff.generation.runs import SegmentFacts, make_runs
from multidiff.seeding import generator_for
from multidiff.sequence import MASK, Segment, Sequencer, SharedVocabulary, TokenBatch
from multidiff.sequence.vocabulary import TokenizerLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    """How many times as fast this project's loop is, at the same number of forward passes and in the same precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"given": arguments.vocabulary - arguments.span - 8, "target": arguments.span}
    layouts = {name: TokenizerLayout(None, "line", (size,), False, name) for name, size in sizes.items()}
    vocabulary = SharedVocabulary(layouts)
    model = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=384, num_layers=6, num_heads=6)
    model.initialize(generator_for(0))
    model.eval().to(device, DTYPES[arguments.dtype])
    result: dict[str, Any] = {"vocabulary": vocabulary.rows, "span": arguments.span, "device": device}
    result["precision"] = arguments.dtype
    print("| to fill in | batch | loop | passes | tokens/s | times as fast |\n|---|---|---|---|---|---|")
    plain: dict[str, Any] = {"unmasking": "linear", "order": "confidence"}
    blocks = {"block_length": arguments.block_length, "cache": "approximate_dual"}
    cases = [(256, 64, plain, "ours"), (1024, 256, {**plain, **blocks}, "ours, blocks and dual cache")]
    for target, steps, settings, name in cases:
        for size in arguments.batch:
            batch = _documents(vocabulary, size, 256, target)
            seconds = interleaved(
                {
                    "LLaDA's loop": lambda batch=batch, steps=steps: _reference(model, vocabulary, batch, steps),
                    name: lambda batch=batch, steps=steps, settings=settings: _ours(
                        model, vocabulary, batch, MaskSampler(**settings), steps
                    ),
                },
                arguments.rounds,
            )
            seconds["LLaDA's loop"] *= steps  # its steps cost the same, so one of them is timed in each round
            for loop, spent in seconds.items():
                ratio = seconds["LLaDA's loop"] / spent
                print(
                    f"| {target} | {size} | {loop} | {steps} | {size * target / spent:,.0f} | {ratio:.1f} |", flush=True
                )
            result[f"{target} tokens, batch {size}"] = round(seconds["LLaDA's loop"] / seconds[name], 2)
    return result


def _documents(vocabulary: SharedVocabulary, size: int, known: int, target: int) -> TokenBatch:
    """Documents of `known` given codes and `target` ones to fill in."""
    document = []
    for name, length in (("given", known), ("target", target)):
        zero_N, place_N = torch.zeros(length, dtype=torch.int64), torch.arange(length)
        known_N = torch.full((length,), name == "given")
        coords_N3 = place_N[:, None].expand(-1, 3)
        document.append(Segment(name, zero_N, zero_N, coords_N3, known_N, length, {"length": length}, name))
    return Sequencer({}, vocabulary).batch([document] * size)


@torch.no_grad()
def _ours(
    model: MaskedDiffusionTransformer, vocabulary: SharedVocabulary, batch: TokenBatch, sampler: MaskSampler, steps: int
) -> None:
    ones_S = torch.ones_like(batch.document_S)
    generators = [generator_for(0, document) for document in range(batch.num_documents)]
    samplers = {"target": sampler, "given": sampler}
    runs = make_runs(batch, SegmentFacts(0 * ones_S, ones_S), vocabulary, samplers, generators, steps)
    decoder = Decoder(model, vocabulary, batch, runs, {}, generators)
    for step in range(decoder.steps):
        decoder.step(step)
    _wait()


@torch.no_grad()
def _reference(model: MaskedDiffusionTransformer, vocabulary: SharedVocabulary, batch: TokenBatch, steps: int) -> None:
    """A step of LLaDA's reference sampling loop (Nie et al. 2025, generate.py): logits of every position over the whole
    vocabulary, Gumbel noise over all of them in fp64, softmax, top-k."""
    device, documents = model.device, batch.num_documents
    ids_P = torch.where(batch.known_P, batch.ids_P, MASK).to(device)
    known_P = batch.known_P.to(device)
    positions_P3, coords_P3 = batch.positions_P3.to(device), batch.coords_P3.to(device)
    everywhere = torch.arange(len(ids_P))
    generator = torch.Generator(device=device).manual_seed(0)
    number = int((~batch.known_P).sum()) // documents // steps
    positions = [(everywhere, (0, vocabulary.rows))]
    (logits_PV,) = model(ids_P, positions_P3, batch.document_starts, positions, coords_P3)
    # One document after another: the noise of all at once would not fit in memory.
    for row, logits_LV in enumerate(logits_PV.view(documents, -1, vocabulary.rows)):
        at = slice(row * len(logits_LV), (row + 1) * len(logits_LV))
        noise_LV = torch.rand(logits_LV.shape, dtype=torch.float64, generator=generator, device=device)
        token_L = logits_LV.double().exp_().div_(noise_LV.log_().neg_()).argmax(-1)
        p_L = torch.softmax(logits_LV, -1).gather(-1, token_L[:, None])[:, 0]
        open_L = (ids_P[at] == MASK) & ~known_P[at]
        place_N = p_L.masked_fill(~open_L, -torch.inf).topk(number).indices
        ids_P[at][place_N] = token_L[place_N]
    _wait()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def add_parsers(commands: Any) -> None:
    """The command `decoding`."""
    help_ = "tokens a second beside LLaDA's reference sampling loop"
    parser = commands.add_parser("decoding", help=help_, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=65_536, help="ids of all tokenizers together")
    parser.add_argument("--span", type=int, default=8_192, help="ids of the tokenizer to fill in")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="documents at a time")
    parser.add_argument("--block-length", type=int, default=64, help="block_length of the run with caches")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="precision of both loops")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which the loops take turns; the best counts")
    parser.set_defaults(run=decoding)
