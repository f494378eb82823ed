"""Likelihood: the bound on the negative log-likelihood of documents, in nats.

    -log p(x)  ≤  E_k  L/k  Σ_{i masked} -log p(x_i | x with k of its L codes masked),      k uniform in 1..L

(Ou et al. 2024, arXiv 2406.03736, eq. 3.5; Nie et al. 2025, LLaDA, arXiv 2502.09992, eq. 6). It equals the bound in
continuous time of every schedule and varies less. A draw is a k and the masked codes of a document. The draws of
a document have a stratum of k each, and within it the documents are spread evenly.

Shape suffixes: P tokens of the batch, S segments, D documents, M masked codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from multidiff.models import MaskedDiffusionTransformer
from multidiff.objectives.times import spread_uniform
from multidiff.seeding import generator_for
from multidiff.sequence import MASK, Example, Sequencer, SharedVocabulary, TokenBatch

JOINT = "joint"


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
    """

    def __init__(
        self,
        batch: TokenBatch,
        numbers: Sequence[int],
        counts: Sequence[bool],
        seed: int,
        dimensions: Sequence[tuple[float, str] | None] = (),
    ):
        self.batch, self.numbers, self.counts, self.seed = batch, numbers, counts, seed
        self.dimensions = dimensions

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
) -> tuple[Tensor, Tensor]:
    """Nats, and the tokens that they are of, of each document: float64 [D] on the model's device.

    A token is a code of the content, or the EOS that ends it; padding EOS count in the nats alone. A document of one
    label alone has no conditional bound. `BoundSums` makes the bound in nats per token of them.

    Args:
        model: the denoiser, in evaluation mode.
        vocabulary: its vocabulary.
        documents: what is measured. A document's masks do not depend on what else is in the batch.
        mode: one of `modes`.
        draws: of each document, whose mean its nats are.
    """
    batch, device = documents.batch, model.device
    target_S, absent_S = _roles(batch, mode)
    counted_S = target_S & torch.tensor(documents.counts)[batch.document_S]
    tokens_D = torch.zeros(batch.num_documents, dtype=torch.float64)
    tokens_D.index_add_(0, batch.document_S, batch.divisor_S.where(counted_S, 0).double())
    nats_D = torch.zeros(batch.num_documents, dtype=torch.float64, device=device)
    if not bool(target_S.any()):
        return nats_D, tokens_D.to(device)
    spans = [span for _, _, span in vocabulary.flat_spans]
    for draw in range(draws):
        masked_P, weight_D = _mask_exactly(documents, batch.spread(target_S, False), mode, draw, draws)
        ids_P = torch.where(masked_P | batch.spread(absent_S, False), MASK, batch.ids_P)
        index_M, sizes = batch.by_span(masked_P, len(spans))
        with torch.no_grad():
            nats = model(
                ids_P.to(device),
                batch.positions_P3.to(device),
                batch.document_starts,
                list(zip(index_M.split(sizes), spans, strict=True)),
                batch.coords_P3.to(device),
                targets=(batch.ids_P[index_M] - vocabulary.span_starts[batch.span_P[index_M]]).to(device),
            )
        segment_M = batch.segment_P[index_M]
        document_M = batch.document_S[segment_M]
        weight_M = torch.where(counted_S[segment_M], weight_D[document_M] / draws, 0.0)
        nats_D.index_add_(0, document_M.to(device), torch.cat(nats).double() * weight_M.to(device))
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


def _mask_exactly(
    documents: EvaluationBatch, target_P: Tensor, mode: str, draw: int, draws: int
) -> tuple[Tensor, Tensor]:
    """Mask k of the L target codes of each document. Returns masked_P, and L/k of each document."""
    batch = documents.batch
    masked_P, weight_D = torch.zeros_like(target_P), torch.zeros(batch.num_documents, dtype=torch.float64)
    edges = batch.document_starts.tolist()
    for document, number in enumerate(documents.numbers):
        place_L = torch.nonzero(target_P[edges[document] : edges[document + 1]]).flatten() + edges[document]
        length = len(place_L)
        if not length:
            continue
        generator = generator_for(documents.seed, "likelihood", mode, number, draw)
        stratum = (draw + spread_uniform(documents.seed, -1, number, 0)) / draws
        k = 1 + int(stratum * length)
        masked_P[place_L[torch.randperm(length, generator=generator)[:k]]] = True
        weight_D[document] = length / k
    return masked_P, weight_D
