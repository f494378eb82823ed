"""What documents of mixed length cost, beside the same documents sorted by length, and one by one."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.documents import nats_of, segment_of, vocabulary_of
from benchmarks.timing import interleaved
from multidiff.models import MaskedDiffusionTransformer
from multidiff.objectives import NoisedBatch, Noising, Objective, Task
from multidiff.seeding import generator_for
from multidiff.sequence import Example, Sequencer

_STRUCTURE = 3  # tokens of a document besides its codes
_SHORTEST = 64


def mixed_and_sorted(
    transformer: dict[str, Any], vocabulary: int, longest: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """The cost of a token in mixed batches, as a multiple of that in sorted ones; on the CPU, in fp32.

    Lengths are drawn log-uniformly. A step is a forward and a backward pass, in all variants over the same documents.

    Args:
        transformer: settings of `MaskedDiffusionTransformer`.
        vocabulary: codes of the tokenizer.
        longest: most tokens of a document; the shortest has 64.
        tokens: of a batch, at most.
        rounds: of which the best counts.
    """
    shared = vocabulary_of("a", size=vocabulary)
    model = MaskedDiffusionTransformer(shared.rows, **transformer)
    model.initialize(generator_for(0))
    noising = Noising(Sequencer({}, shared), [Task({"a": "target"})], Objective(weighting="uniform"), 0)
    lengths = draw_lengths(4 * tokens, longest)
    examples = [Example([segment_of("a", n - _STRUCTURE, shared)], 0, i, i) for i, n in enumerate(lengths)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = {
        "sorted": [noising([examples[i] for i in some]) for some in divide(order, lengths, tokens)],
        "mixed": [noising([examples[i] for i in some]) for some in divide(range(len(lengths)), lengths, tokens)],
        "one by one": [noising([example]) for example in examples],
    }

    def step(some: Sequence[NoisedBatch]) -> Callable[[], None]:
        def run() -> None:
            for batch in some:
                (nats_of(model, shared, batch) * batch.loss_weights_M).sum().backward()
                model.zero_grad()

        return run

    seconds = interleaved({name: step(some) for name, some in batches.items()}, rounds)
    print(f"\n{len(lengths)} documents of {min(lengths)} to {max(lengths):,} tokens, {sum(lengths):,} in all:")
    print("| batches | tokens/s | cost |\n|---|---|---|")
    for name, spent in seconds.items():
        print(f"| {name} | {sum(lengths) / spent:,.0f} | {spent / seconds['sorted']:.2f} |")
    return {
        "cost of mixed batches beside sorted ones": round(seconds["mixed"] / seconds["sorted"], 3),
        "cost of mixed batches beside documents one by one": round(seconds["mixed"] / seconds["one by one"], 3),
    }


def draw_lengths(tokens: int, longest: int) -> list[int]:
    """Lengths from 64 to the longest, equally likely in every octave, which together have at least this many tokens."""
    generator, lengths = generator_for(0, "lengths"), []
    low, high = math.log(_SHORTEST), math.log(longest)
    while sum(lengths) < tokens:
        lengths.append(round(math.exp(low + (high - low) * float(torch.rand((), generator=generator)))))
    return lengths


def divide(order: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Documents in this order, in batches of no more tokens, or of one document."""
    batches, room = [], 0
    for document in order:
        if not batches or lengths[document] > room:
            batches.append([])
            room = tokens
        batches[-1].append(document)
        room -= lengths[document]
    return batches
