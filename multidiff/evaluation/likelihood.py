"""Likelihood: the bound on the negative log-likelihood of documents, in nats.

Of absorbing noise it is

    -log p(x)  ≤  E_k  L/k  Σ_{i masked} -log p(x_i | x with k of its L codes masked),      k uniform in 1..L

(Ou et al. 2024, arXiv 2406.03736, eq. 3.5; Nie et al. 2025, LLaDA, arXiv 2502.09992, eq. 6). It equals the bound in
continuous time of every schedule and varies less. A draw is a k and the masked codes of a document. Of every process it
is the mean over times t in [0, 1] that `multidiff.processes.Process` describes. A draw is then a t and the noise of a
document, and one t serves all its targets, so that the bound is that of all of them together. The draws of a document
have a stratum of k or t each, and within it the documents are spread evenly.

Models whose attention has an order are measured in it. With causal attention the negative log-likelihood is exact and
takes one pass, -log p(x) = Σ_i -log p(x_i | x_<i). With attention by blocks it is at most the sum of the bounds of the
blocks, each given clean blocks before it (Arriola et al. 2025, BD3-LM, arXiv 2503.09573, eq. 5); "counts" draws a k for
each block. What comes after a target does not condition it, and padding EOS are not measured, because generation ends
at the first EOS.

Shape suffixes: P tokens of the batch, S segments, D documents, M codes with a loss; L targets of a document, B its
blocks that have any.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from multidiff.models import MaskedDiffusionTransformer
from multidiff.objectives.times import spread_uniform
from multidiff.processes import Absorbing, Interpolating, LogLinear, Process
from multidiff.seeding import generator_for, key_for, uniforms
from multidiff.sequence import MASK, Example, Sequencer, SharedVocabulary, TokenBatch
from multidiff.sequence.blocks import side_by_side

Estimator = Literal["counts", "times"]
JOINT = "joint"
_EARLIEST = 1e-4  # u, the cube root of a time


def modes(labels: Iterable[str]) -> list[str]:
    """What is measured: "LABEL/conditional", given the segments with other labels, "LABEL/unconditional", with these
    fully masked, for every label; and "joint", all segments of a document together."""
    return [f"{label}/{mode}" for label in labels for mode in ("conditional", "unconditional")] + [JOINT]


class EvaluationBatch:
    """Documents to be measured, with what decides their random numbers. Not a dataclass: Lightning casts the tensors of
    one to the precision of a model, and refuses to where it is frozen.

    Args:
        batch: their tokens, of one call of `Sequencer.batch`.
        numbers: of each document, in its split.
        counts: False for a document that only stands in; it adds nothing to the results.
        seed: of all random numbers.
        dimensions: of the item of each segment, as `ModalityTokenizer.dimensions` gives them.
        number_P: the block of each token, where the segments of the batch do not tell it.
        absent_P: bool, tokens that are masked and not measured, beside those that the mode makes absent.
    """

    def __init__(
        self,
        batch: TokenBatch,
        numbers: Sequence[int],
        counts: Sequence[bool],
        seed: int,
        dimensions: Sequence[tuple[float, str] | None] = (),
        number_P: Tensor | None = None,
        absent_P: Tensor | None = None,
    ):
        self.batch, self.numbers, self.counts, self.seed = batch, numbers, counts, seed
        self.dimensions, self.number_P = dimensions, number_P
        self.absent_P = torch.zeros_like(batch.known_P) if absent_P is None else absent_P

    @classmethod
    def of(cls, examples: Sequence[Example], *, sequencer: Sequencer, seed: int) -> EvaluationBatch:
        """The documents of a loader's batch."""
        batch = sequencer.batch([example.document for example in examples])
        numbers, counts = [example.number for example in examples], [example.counts for example in examples]
        dimensions = [
            sequencer.tokenizers[segment.tokenizer].dimensions(sequencer.codes(segment))
            for example in examples
            for segment in example.document
        ]
        return cls(batch, numbers, counts, seed, dimensions)


def likelihood(
    model: MaskedDiffusionTransformer,
    vocabulary: SharedVocabulary,
    documents: EvaluationBatch,
    mode: str,
    draws: int = 1,
    processes: Mapping[str, Process] | None = None,
    estimator: Estimator | None = None,
) -> tuple[Tensor, Tensor]:
    """Nats, and the tokens that they are of, of each document: float64 [D] on the model's device.

    A token is a code of the content, or the EOS that ends it; padding EOS count in the nats alone. A document of one
    label alone has no conditional bound. `BoundSums` makes the bound in nats per token of them.

    Args:
        model: the denoiser, in evaluation mode.
        vocabulary: its vocabulary.
        documents: what is measured. A document's noise does not depend on what else is in the batch.
        mode: one of `modes`.
        draws: of each document, whose mean its nats are.
        processes: of each tokenizer; absorbing where not named.
        estimator: "counts" draws the number of masks, "times" the time; None takes "counts" where all noise is
            absorbing. Causal attention needs neither.

    Raises:
        ValueError: numbers of masks for a process that has other noise.
    """
    batch, device = documents.batch, model.device
    of_names = {name: (processes or {}).get(name, Absorbing()) for name in vocabulary.tokenizers}
    other = next((name for name, process in of_names.items() if type(process) is not Absorbing), None)
    estimator = estimator or ("counts" if other is None else "times")
    if estimator == "counts" and other is not None:
        kind = type(of_names[other]).__name__
        raise ValueError(f'The estimator "counts" is for absorbing noise, but {other!r} has {kind}. Use "times".')
    target_S, absent_S = _roles(batch, mode)
    counted_S = target_S & torch.tensor(documents.counts)[batch.document_S]
    tokens_D = torch.zeros(batch.num_documents, dtype=torch.float64)
    tokens_D.index_add_(0, batch.document_S, batch.divisor_S.where(counted_S, 0).double())
    nats_D = torch.zeros(batch.num_documents, dtype=torch.float64, device=device)
    if not bool(target_S.any()) and not model.is_sharded:  # every process must run every pass of sharded weights
        return nats_D, tokens_D.to(device)
    target_P, absent_P = batch.spread(target_S, False), batch.spread(absent_S, False) | documents.absent_P
    pattern = model.pattern
    number_P = None
    if pattern.attention == "block_causal":
        number_P = pattern.numbers(batch) if documents.number_P is None else documents.number_P
    if not pattern.is_full:
        target_P &= _before_the_end(batch, number_P)
    draws = 1 if pattern.is_autoregressive else draws
    spans = [span for _, _, span in vocabulary.flat_spans]
    if estimator == "times":  # the bound is that of every schedule which begins clean and ends in nothing but noise
        of_names = {name: _without_ends(process) for name, process in of_names.items()}
    for draw in range(draws):
        if pattern.is_autoregressive:
            noised = _clean(batch, target_P)
        elif estimator == "counts" and number_P is not None:
            noised = _mask_blocks(documents, target_P, number_P, mode, draw, draws)
        elif estimator == "counts":
            noised = _mask_exactly(documents, target_P, mode, draw, draws)
        else:
            noised = _noise_at_times(documents, vocabulary, of_names, target_P, mode, draw, draws)
        index_M, sizes = batch.by_span(noised.predicted_P, len(spans))
        edges_M2 = vocabulary.span_edges[batch.span_P[index_M]]
        ids_M = noised.ids_P[index_M]
        tables = (torch.where(ids_M == MASK, edges_M2[:, 1], ids_M) - edges_M2[:, 0], noised.t_P[index_M])
        parts = zip(vocabulary.flat_spans, *(table.to(device).split(sizes) for table in tables), strict=True)
        seen = (noised.ids_P.masked_fill(absent_P, MASK), noised.noise_P.masked_fill(absent_P, 1.0).float())
        tokens = (seen[0], batch.positions_P3, batch.coords_P3, seen[1])
        starts, blocks, read_M = batch.document_starts, None, index_M - int(pattern.is_autoregressive)
        if number_P is not None:
            copies = side_by_side(batch, number_P, noised.predicted_P)
            clean = (batch.ids_P.masked_fill(absent_P, MASK), batch.positions_P3, batch.coords_P3, absent_P.float())
            tokens = tuple(copies.take(*pair) for pair in zip(clean, tokens, strict=True))
            starts, blocks, read_M = copies.starts, copies.blocks, copies.noisy_P[index_M]
        ids_X, positions_X3, coords_X3, noise_X = (table.to(device) for table in tokens)
        with torch.no_grad():
            nats = model(
                ids_X,
                positions_X3,
                starts,
                list(zip(read_M.split(sizes), spans, strict=True)),
                coords_X3,
                targets=(batch.ids_P[index_M] - edges_M2[:, 0]).to(device),
                losses=[partial(of_names[name].loss, noised_N, t_N) for (name, _, _), noised_N, t_N in parts],
                noise_P=noise_X,
                **({} if blocks is None else {"blocks": blocks}),
            )
        segment_M = batch.segment_P[index_M]
        weight_M = torch.where(counted_S[segment_M], noised.weight_P[index_M] / draws, 0.0)
        nats_D.index_add_(0, batch.document_S[segment_M].to(device), torch.cat(nats).double() * weight_M.to(device))
    return nats_D, tokens_D.to(device)


class BoundSums:
    """Sums over documents, from which the bound follows with its standard error.

    The bound is the ratio r = Σ n / Σ t of nats and tokens of D documents. Its standard error is that of a ratio
    (Cochran 1977, Sampling Techniques, section 6.4), √(D / (D - 1) Σ (n - r t)²) / Σ t: what other documents of the
    same kind, and other masks, would change.

    Attributes:
        sums: float64 [6]: documents, n, t, n², n t, t². Those of several processes may be added.
    """

    def __init__(self, sums: Tensor):
        self.sums = sums

    @classmethod
    def zero(cls, device: torch.device | str = "cpu") -> BoundSums:
        return cls(torch.zeros(6, dtype=torch.float64, device=device))

    def add(self, nats_D: Tensor, tokens_D: Tensor) -> None:
        """Count documents; those without tokens do not."""
        nats_D = nats_D.where(tokens_D > 0, 0.0)
        parts = ((tokens_D > 0).double(), nats_D, tokens_D, nats_D**2, nats_D * tokens_D, tokens_D**2)
        self.sums += torch.stack([part.sum() for part in parts])

    def estimate(self) -> tuple[float, float] | None:
        """The bound in nats per token and its standard error, which one document does not have (NaN); None where
        nothing was measured."""
        documents, nats, tokens, nats_2, product, tokens_2 = self.sums.tolist()
        if not tokens:
            return None
        bound = nats / tokens
        if documents < 2:
            return bound, math.nan
        squares = max(0.0, nats_2 - 2 * bound * product + bound**2 * tokens_2)
        return bound, math.sqrt(documents / (documents - 1) * squares) / tokens


def _roles(batch: TokenBatch, mode: str) -> tuple[Tensor, Tensor]:
    """bool target_S and absent_S."""
    if mode == JOINT:
        return torch.ones_like(batch.document_S, dtype=torch.bool), torch.zeros_like(batch.document_S, dtype=torch.bool)
    label, _, kind = mode.rpartition("/")
    mine_S = torch.tensor([other == label for other in batch.labels])
    if kind == "unconditional":
        return mine_S, ~mine_S
    mixed_D = torch.zeros(batch.num_documents, dtype=torch.bool)
    mixed_D[batch.document_S[~mine_S]] = True
    return mine_S & mixed_D[batch.document_S], torch.zeros_like(mine_S)


class _Noised(NamedTuple):
    """Documents under noise: ids, where the loss is and its weight, times, and how much noise there is."""

    ids_P: Tensor
    predicted_P: Tensor
    weight_P: Tensor
    t_P: Tensor
    noise_P: Tensor


def _mask_exactly(documents: EvaluationBatch, target_P: Tensor, mode: str, draw: int, draws: int) -> _Noised:
    """Mask k of the L target codes of each document, with the weight L/k."""
    batch = documents.batch
    masked_P, weight_P = torch.zeros_like(target_P), torch.zeros(len(target_P), dtype=torch.float64)
    edges = batch.document_starts.tolist()
    for document, number in enumerate(documents.numbers):
        place_L = torch.nonzero(target_P[edges[document] : edges[document + 1]]).flatten() + edges[document]
        length = len(place_L)
        if not length:
            continue
        generator = generator_for(documents.seed, "likelihood", mode, number, draw)
        k = 1 + int(_stratum(documents.seed, number, draw, draws) * length)
        masked_P[place_L[torch.randperm(length, generator=generator)[:k]]] = True
        weight_P[place_L] = length / k
    noise_P = torch.where(target_P, 1 / weight_P, 0.0)
    return _Noised(torch.where(masked_P, MASK, batch.ids_P), masked_P, weight_P, noise_P, noise_P)


def _before_the_end(batch: TokenBatch, number_P: Tensor | None) -> Tensor:
    """bool: the codes of each segment up to its first EOS, or up to the end of the block that holds it. A sampler that
    decides in order ends there, so the rest of a canvas is no part of what it draws."""
    code_M = torch.nonzero(batch.segment_P >= 0).flatten()
    segment_M = batch.segment_P[code_M]
    rank_M = torch.arange(len(code_M)) - torch.searchsorted(segment_M, segment_M)
    inside_M = rank_M < batch.divisor_S[segment_M]
    if number_P is not None:
        last_S = torch.full_like(batch.length_S, -1)
        last_S.scatter_reduce_(0, segment_M[inside_M], number_P[code_M][inside_M], "amax")
        inside_M = number_P[code_M] <= last_S[segment_M]
    return torch.zeros_like(batch.known_P).index_fill(0, code_M[inside_M], True)


def _clean(batch: TokenBatch, target_P: Tensor) -> _Noised:
    """No noise: every target is predicted, and counts once."""
    zero_P = torch.zeros(len(target_P), dtype=torch.float64)
    return _Noised(batch.ids_P, target_P, zero_P + 1, zero_P, zero_P)


def _mask_blocks(
    documents: EvaluationBatch, target_P: Tensor, number_P: Tensor, mode: str, draw: int, draws: int
) -> _Noised:
    """Mask k of the L target codes of each block, with the weight L/k. The k of a document are spread evenly."""
    batch, seed = documents.batch, documents.seed
    masked_P, weight_P = torch.zeros_like(target_P), torch.zeros(len(target_P), dtype=torch.float64)
    edges = batch.document_starts.tolist()
    for document, number in enumerate(documents.numbers):
        place_L = torch.nonzero(target_P[edges[document] : edges[document + 1]]).flatten() + edges[document]
        generator = generator_for(seed, "likelihood", mode, number, draw)
        block_L, size_B = torch.unique_consecutive(number_P[place_L], return_inverse=True, return_counts=True)[1:]
        place_B = torch.arange(len(size_B), dtype=torch.float64)
        spread_B = (spread_uniform(seed, -1, number, 0) + place_B * (math.sqrt(5) - 1) / 2) % 1.0
        count_B = 1 + ((draw + spread_B) / draws * size_B).floor()
        order_L = torch.argsort(torch.rand(len(place_L), generator=generator, dtype=torch.float64))
        order_L = order_L[torch.argsort(block_L[order_L], stable=True)]  # by block, at random within it
        rank_L = torch.arange(len(place_L)) - (size_B.cumsum(0) - size_B)[block_L]
        masked_P[place_L[order_L[rank_L < count_B[block_L]]]] = True
        weight_P[place_L] = (size_B / count_B)[block_L]
    noise_P = torch.where(target_P, 1 / weight_P, 0.0)
    return _Noised(torch.where(masked_P, MASK, batch.ids_P), masked_P, weight_P, noise_P, noise_P)


def _noise_at_times(
    documents: EvaluationBatch,
    vocabulary: SharedVocabulary,
    processes: Mapping[str, Process],
    target_P: Tensor,
    mode: str,
    draw: int,
    draws: int,
) -> _Noised:
    """Noise the target codes of each document at a time t = u³ of its own, with u uniform.

    Weights grow like 1/t, while tokens are noised with probability t, or √t in the hybrid process: uniform times would
    give a mean of infinite variance. Weights are multiplied by dt/du.
    """
    batch, seed = documents.batch, documents.seed
    u_D = torch.tensor([_stratum(seed, number, draw, draws) for number in documents.numbers], dtype=torch.float64)
    u_P = u_D.clamp_min(_EARLIEST)[batch.document_P]
    t_P = torch.where(target_P, u_P**3, 0.0)
    keys = [key_for(seed, "likelihood", mode, number, draw) for number in documents.numbers]
    lengths, streams = batch.document_starts.diff().tolist(), itertools.count()
    noised = _Noised(batch.ids_P, torch.zeros_like(target_P), torch.zeros_like(t_P), t_P, torch.zeros_like(t_P))
    tokenizer_P = batch.spread(batch.tokenizer_S, -1)
    for place, name in enumerate(vocabulary.tokenizers):
        own_P = t_P.where(tokenizer_P == place, 0.0)
        made = processes[name].corrupt(
            noised.ids_P, batch.span_P, vocabulary.span_edges, own_P, lambda: uniforms(keys, lengths, next(streams))
        )
        noised = noised._replace(
            ids_P=made.ids_P,
            predicted_P=noised.predicted_P | made.predicted_P,
            weight_P=noised.weight_P + made.weight_P * 3 * u_P**2,
            noise_P=torch.where(own_P > 0, processes[name].noise(own_P), noised.noise_P),
        )
    return noised


def _without_ends(process: Process) -> Process:
    return replace(process, schedule=LogLinear(0.0)) if isinstance(process, Interpolating) else process


def _stratum(seed: int, number: int, draw: int, draws: int) -> float:
    """A number in [0, 1) of the draw's stratum."""
    return (draw + spread_uniform(seed, -1, number, 0)) / draws
