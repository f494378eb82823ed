"""Conditional likelihood: of any segments of a document, given any others. Hence multiple choice.

    document = [Given("image", picture), Target("text", "a seven"), Blank("speech")]
    (found,) = log_likelihood(pipe, [document])

is a lower bound on log p(text | image) where the model knows of a sound, and nothing about it. Targets are measured
together. What is given is seen, and a blank is seen as masks. Of a `Masked` segment the unknown codes are measured,
given the known ones.

An estimate has chance in it, because masks are drawn. Candidates of a question are compared with the same masks on
canvases of the same size, so most of that chance cancels in their differences (common random numbers; Owen 2013, Monte
Carlo theory, section 8.6).

Shape suffixes: P tokens of the batch, S segments, D documents, R replicates, M target tokens, N codes of a segment.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multidiff.evaluation.likelihood import JOINT, EvaluationBatch, likelihood
from multidiff.generation import Blank, Given, Masked, MultiDiffPipeline
from multidiff.generation.pipeline import evaluating
from multidiff.generation.requests import check_nesting, make_segments
from multidiff.seeding import key_for
from multidiff.sequence import TokenBatch


class Target:
    """A segment whose likelihood is measured.

    Where length varies, the canvas has the size that is given here. Without one it has that of a blank in generation,
    or, if this does not hold it, that of the longest item which it is compared with and an EOS. All of the canvas is
    measured: the item, the EOS that ends it, and the padding EOS.

    Examples:
        >>> [Given("text", "what is it?"), Target("text", "a seven", tokens=8)]
        [Given('text', 'what is it?'), Target('text', 'a seven', tokens=8)]
    """

    def __init__(self, tokenizer: str, item: Any, **size: int):
        self.tokenizer = tokenizer
        self.item = item
        self.size = size

    def __repr__(self) -> str:
        sizes = "".join(f", {key}={value}" for key, value in self.size.items())
        return f"Target{repr(Given(self.tokenizer, self.item)).removeprefix('Given')[:-1]}{sizes})"


Measured = Given | Blank | Masked | Target


class LogLikelihood(NamedTuple):
    """The likelihood of a document's targets given the rest of it.

    Attributes:
        nats: an estimate of a lower bound on log p.
        standard_error: of the estimate, over its replicates; NaN where there is one.
        tokens: codes of the targets' content, and their EOS; padding EOS are not counted.
    """

    nats: float
    standard_error: float
    tokens: int


class Choice(NamedTuple):
    """An answer to a question of multiple choice.

    Attributes:
        best: the place of the candidate with the highest likelihood.
        candidates: the likelihood of each candidate.
        margin: log p of the best candidate minus that of the second best, in nats; infinite if there is only one.
        margin_error: standard error of the margin, which common random numbers make smaller than those of the two.
    """

    best: int
    candidates: list[LogLikelihood]
    margin: float
    margin_error: float


def log_likelihood(
    pipe: MultiDiffPipeline,
    documents: Sequence[Sequence[Measured]],
    *,
    draws: int = 16,
    replicates: int = 4,
    groups: Sequence[int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> list[LogLikelihood]:
    """The likelihood of each document's targets, given the rest of it.

    Args:
        pipe: the model.
        documents: lists of `Target`, `Given`, `Blank` and `Masked` segments.
        draws: masks drawn of each document for one replicate, each with a number of masked codes from a stratum of its
            own. With as many draws as codes, every number is met once.
        replicates: independent estimates, whose mean is returned and whose spread gives the standard error. Those of a
            model with causal attention are all the same, because its likelihood is exact, and computed once.
        groups: a number for each document. Documents of one number have the same random numbers and, where no size is
            given, canvases of one size, so that they may be compared. None gives each document its own.
        batch_size: documents of a forward pass.
        seed: of the masks.

    Raises:
        ValueError: a document without a target, an unknown tokenizer, or a canvas that does not hold its item.
    """
    if not documents:
        return []
    nats_RD, tokens_D = _replicates(pipe, documents, draws, replicates, groups, batch_size, seed)
    return [LogLikelihood(*_mean(nats_R), int(tokens)) for nats_R, tokens in zip(nats_RD.T, tokens_D, strict=True)]


def multiple_choice(
    pipe: MultiDiffPipeline,
    questions: Sequence[Sequence[Sequence[Measured]]],
    *,
    draws: int = 16,
    replicates: int = 4,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Choice]:
    """The most likely candidate of each question.

    Args:
        pipe: the model.
        questions: lists of candidates. A candidate is a document with targets, as for `log_likelihood`.
        draws, replicates, batch_size, seed: as there.

    Raises:
        ValueError: a question without candidates, and as there.
    """
    if not all(questions):
        raise ValueError(f"Question {next(n for n, one in enumerate(questions) if not one)} has no candidates.")
    documents = [candidate for question in questions for candidate in question]
    if not documents:
        return []
    groups = [number for number, question in enumerate(questions) for _ in question]
    nats_RD, tokens_D = _replicates(pipe, documents, draws, replicates, groups, batch_size, seed)
    lengths = [len(question) for question in questions]
    choices = []
    for nats_RC, tokens_C in zip(nats_RD.split(lengths, 1), tokens_D.split(lengths), strict=True):
        found = [LogLikelihood(*_mean(nats_R), int(tokens)) for nats_R, tokens in zip(nats_RC.T, tokens_C, strict=True)]
        order = sorted(range(len(found)), key=lambda place: -found[place].nats)
        margin = math.inf, math.nan
        if len(order) > 1:
            margin = _mean(nats_RC[:, order[0]] - nats_RC[:, order[1]])
        choices.append(Choice(order[0], found, *margin))
    return choices


def room(pipe: MultiDiffPipeline, tokenizer: str, lengths: Iterable[int]) -> int:
    """Units of a canvas on which items of these lengths are compared: that of a blank in generation if it holds them
    and an EOS, else that of the longest and an EOS. For a tokenizer whose length varies."""
    usual = pipe.sequencer.canvas(tokenizer, pipe.canvas(tokenizer)).size
    return max(next(iter(usual.values())), 1 + max(lengths))


def _replicates(
    pipe: MultiDiffPipeline,
    documents: Sequence[Sequence[Measured]],
    draws: int,
    replicates: int,
    groups: Sequence[int] | None,
    batch_size: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """nats_RD, each an estimate of log p, and tokens_D."""
    for name, value in (("draws", draws), ("replicates", replicates), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}.")
    check_nesting(documents)
    groups = range(len(documents)) if groups is None else groups
    if len(groups) != len(documents):
        raise ValueError(f"There are {len(groups)} groups for {len(documents)} documents. Give one for each.")
    for number, document in enumerate(documents):
        if not any(isinstance(part, Target | Masked) for part in document):
            raise ValueError(f"Document {number} has nothing to measure. Give it a Target.")
    requests = _requests(pipe, documents, groups)
    segments = make_segments(requests, pipe.sequencer, pipe.tokenizers, pipe.canvas)
    if pipe.seen is not None:
        remarks = (pipe.seen.remarks([(part.tokenizer, part.size) for part in document]) for document in segments)
        for remark in dict.fromkeys(remark for of_document in remarks for remark in of_document):
            warnings.warn(remark, UserWarning, stacklevel=3)
    nats, tokens = [], []
    with evaluating(pipe.transformer):
        for start in range(0, len(documents), batch_size):
            some = slice(start, start + batch_size)
            blank_S = torch.tensor([isinstance(part, Blank) for document in requests[some] for part in document])
            whole = pipe.sequencer.batch(segments[some])
            blank_P, number_P = whole.spread(blank_S, False), pipe.transformer.pattern.numbers(whole)
            targets = _only_targets(whole, blank_P)
            counts = [True] * targets.num_documents
            found = []
            for replicate in range(1 if pipe.transformer.pattern.is_autoregressive else replicates):
                key = key_for(seed, "replicate", replicate)
                masked = EvaluationBatch(targets, groups[some], counts, key, number_P=number_P, absent_P=blank_P)
                found.append(likelihood(pipe.transformer, pipe.vocabulary, masked, JOINT, draws, pipe.processes))
            found *= replicates // len(found)
            nats.append(torch.stack([-nats_D.cpu() for nats_D, _ in found]))
            tokens.append(found[0][1].cpu())
    return torch.cat(nats, 1), torch.cat(tokens)


def _requests(
    pipe: MultiDiffPipeline, documents: Sequence[Sequence[Measured]], groups: Sequence[int]
) -> list[list[Given | Blank | Masked]]:
    """The documents with every `Target` as a `Masked` of which nothing is known."""
    codes = {}
    parts = [part for document in documents for part in document if isinstance(part, Target)]
    for name in {part.tokenizer: None for part in parts}:
        pipe.vocabulary.layout(name)
        mine = list({id(part): part for part in parts if part.tokenizer == name}.values())
        encoded = pipe.tokenizers[name].encode([part.item for part in mine])
        codes |= {id(part): code for part, code in zip(mine, encoded, strict=True)}
    compared: dict[tuple[int, int, str], list[int]] = {}
    for group, document in zip(groups, documents, strict=True):
        for place, part in enumerate(document):
            if isinstance(part, Target):
                length = next(iter(codes[id(part)].size.values()), 0)
                compared.setdefault((group, place, part.tokenizer), []).append(length)
    requests = []
    for group, document in zip(groups, documents, strict=True):
        row = []
        for place, part in enumerate(document):
            if isinstance(part, Target):
                known_N = torch.zeros(len(codes[id(part)]), dtype=torch.bool)
                more = 0
                if pipe.vocabulary.layout(part.tokenizer).variable_length:
                    more = _more(pipe, part, codes[id(part)].size, compared[group, place, part.tokenizer])
                elif {**codes[id(part)].size, **part.size} != codes[id(part)].size:
                    raise ValueError(f"{part} has the size {codes[id(part)].size}. Leave its size out.")
                part = Masked(part.tokenizer, codes[id(part)], known_N, more)
            row.append(part)
        requests.append(row)
    return requests


def _more(pipe: MultiDiffPipeline, part: Target, size: dict[str, int], compared: Sequence[int]) -> int:
    """Units of EOS behind the item of a target."""
    ((unit, length),) = size.items()
    if not part.size:
        return room(pipe, part.tokenizer, compared) - length
    units = next(iter(pipe.sequencer.canvas(part.tokenizer, part.size).size.values()))
    if units <= length:
        raise ValueError(f"{part} has {length} {unit} and an EOS, which do not fit a canvas of {units} {unit}.")
    return units - length


def _only_targets(batch: TokenBatch, blank_P: Tensor) -> TokenBatch:
    """The same tokens, with the unknown codes of segments that are not blank as the only segments. What is given then
    counts as little as structure."""
    place_M = torch.nonzero(~batch.known_P & ~blank_P).flatten()
    kept_S, part_M = batch.segment_P[place_M].unique(return_inverse=True)
    content_M = place_M - batch.start_S[batch.segment_P[place_M]] < batch.divisor_S[batch.segment_P[place_M]]
    return replace(
        batch,
        segment_P=torch.full_like(batch.segment_P, -1).index_copy(0, place_M, part_M),
        start_S=batch.start_S[kept_S],
        length_S=torch.bincount(part_M, minlength=len(kept_S)),
        tokenizer_S=batch.tokenizer_S[kept_S],
        document_S=batch.document_S[kept_S],
        divisor_S=torch.bincount(part_M[content_M], minlength=len(kept_S)),
        labels=tuple(batch.labels[place] for place in kept_S.tolist()),
    )


def _mean(nats_R: Tensor) -> tuple[float, float]:
    """The mean of replicates, and its standard error."""
    error = float(nats_R.std()) / math.sqrt(len(nats_R)) if len(nats_R) > 1 else math.nan
    return float(nats_R.mean()), error
