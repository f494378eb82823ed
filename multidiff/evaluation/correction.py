"""Correction: whether a sampler finds and mends wrong codes among those that stand as decided.

Shape suffix: N codes of a segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from multidiff.generation import Draft, Given, MultiDiffPipeline
from multidiff.seeding import generator_for
from multidiff.tokenizer import Codes


@dataclass(frozen=True)
class Share:
    """A share of codes.

    Attributes:
        count, of: numbers of codes.
        standard_error: over documents, which are independent of each other, while their codes are not.
    """

    count: int
    of: int
    standard_error: float

    @classmethod
    def over(cls, counts: Sequence[int], sizes: Sequence[int]) -> Share:
        """The share Σ counts / Σ sizes, with a count and a size for each document."""
        count, of = sum(counts), sum(sizes)
        if not of:
            return cls(0, 0, math.nan)
        deviations = (one - count / of * size for one, size in zip(counts, sizes, strict=True))
        return cls(count, of, math.sqrt(sum(deviation**2 for deviation in deviations)) / of)

    @property
    def value(self) -> float:
        """The share itself; NaN of nothing."""
        return self.count / self.of if self.of else math.nan

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.standard_error:.3f}" if self.of else "none"


@dataclass(frozen=True)
class Correction:
    """What became of drafts with wrong codes.

    Attributes:
        repaired: of the wrong codes, those that became the right ones.
        changed: of the wrong codes, those that became any other ones.
        spoiled: of the codes that were decided rightly, those that became others.
        nfe: forward passes of a document, on average.
    """

    repaired: Share
    changed: Share
    spoiled: Share
    nfe: float


def measure_correction(
    pipe: MultiDiffPipeline,
    documents: Sequence[Sequence[Given]],
    name: str,
    *,
    wrong: float = 0.1,
    decided: float = 1.0,
    noise: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Correction:
    """Plant wrong codes in documents, let the sampler of `name` go on from there, and count what it mends.

    In the first segment of `name` of each document, a share `decided` of the codes stands as decided, and of these a
    share `wrong`, at least one, is replaced by another code of the same level, all equally probable. The other segments
    are given. Which codes these are depends on the seed and on the document alone, so that samplers and models meet the
    same drafts.

    A wrong code is "repaired" only if the original one comes back. Where other codes say the same, as neighbours in a
    codebook of pictures do, that counts too little.

    Args:
        pipe: the model and the sampler.
        documents: lists of `Given`, each with a segment of `name`.
        name: the tokenizer.
        wrong: the share of wrong codes among those decided, in (0, 1].
        decided: the share of codes that stand as decided, in (0, 1]; at least one.
        noise: how much noise the sampler presumes at least, as `Draft` has it.
        seed: of the drafts and the samples.
        batch_size: documents of a forward pass.

    Raises:
        ValueError: a share out of range, a document without a segment of `name`, or a sampler that cannot go on.
    """
    for key, value in (("wrong", wrong), ("decided", decided)):
        if not 0 < value <= 1:
            raise ValueError(f"{key} must be a share above 0 and at most 1, not {value}.")
    if not documents:
        raise ValueError(f"There are no documents in which to plant wrong codes of {name!r}.")
    layout = pipe.vocabulary.layout(name)
    counts, nfe = [], 0
    for start in range(0, len(documents), batch_size):
        some = documents[start : start + batch_size]
        requests, planted = [], []
        for number, document in enumerate(some, start):
            places = [place for place, part in enumerate(document) if part.tokenizer == name]
            if not places:
                raise ValueError(f"Document {number} has no segment of {name!r} in which to plant wrong codes.")
            (codes,) = pipe.tokenizers[name].encode([document[places[0]].item])
            generator = generator_for(seed, "correction/draft", number)
            ids_N, decided_N, wrong_N = _plant(codes, layout.codebook_sizes, wrong, decided, generator)
            draft = Draft(name, replace(codes, ids_N=ids_N), decided_N, noise)
            requests.append([draft if place == places[0] else part for place, part in enumerate(document)])
            planted.append((places[0], codes, draft, wrong_N))
        generators = [generator_for(seed, "correction/sample", number) for number in range(start, start + len(some))]
        output = pipe(requests, generator=generators)
        nfe += sum(output.nfe)
        for filled, (place, codes, draft, wrong_N) in zip(output.documents, planted, strict=True):
            made_N, right_N = filled[place].codes.ids_N, draft.decided_N & ~wrong_N
            counts.append(
                (
                    int((made_N == codes.ids_N)[wrong_N].sum()),
                    int((made_N != draft.codes.ids_N)[wrong_N].sum()),
                    int(wrong_N.sum()),
                    int((made_N != codes.ids_N)[right_N].sum()),
                    int(right_N.sum()),
                )
            )
    repaired, changed, wrongs, spoiled, rights = zip(*counts, strict=True)
    return Correction(
        Share.over(repaired, wrongs), Share.over(changed, wrongs), Share.over(spoiled, rights), nfe / len(documents)
    )


def _plant(
    codes: Codes, sizes: Sequence[int], wrong: float, decided: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """ids_N with wrong codes, and bool, where codes are decided and where they are wrong."""
    number = max(1, round(decided * len(codes)))
    places = torch.randperm(len(codes), generator=generator)[:number]
    decided_N, wrong_N = torch.zeros(2, len(codes), dtype=torch.bool)
    decided_N[places] = True
    wrong_N[places[: max(1, round(wrong * number))]] = True
    size_N = torch.tensor(sizes)[codes.levels_N]
    further_N = 1 + (torch.rand(len(codes), generator=generator, dtype=torch.float64) * (size_N - 1)).long()
    return torch.where(wrong_N, (codes.ids_N + further_N) % size_N, codes.ids_N), decided_N, wrong_N
