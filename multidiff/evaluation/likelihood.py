"""Likelihood: the bound on the negative log-likelihood of documents, in nats.

    -log p(x)  ≤  E_k  L/k  Σ_{i masked} -log p(x_i | x with k of its L codes masked),      k uniform in 1..L

(Ou et al. 2024, arXiv 2406.03736, eq. 3.5; Nie et al. 2025, LLaDA, arXiv 2502.09992, eq. 6). It equals the bound in
continuous time of the log-linear schedule and varies less. Every value below is one draw of k and of the masked codes
for each document, with k spread evenly over the documents.

Shape suffixes: P tokens of the batch, S segments, D documents, M masked codes.
"""

from __future__ import annotations

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
    """

    def __init__(self, batch: TokenBatch, numbers: Sequence[int], counts: Sequence[bool], seed: int):
        self.batch, self.numbers, self.counts, self.seed = batch, numbers, counts, seed

    @classmethod
    def of(cls, examples: Sequence[Example], *, sequencer: Sequencer, seed: int) -> EvaluationBatch:
        """The documents of a loader's batch."""
        batch = sequencer.batch([example.document for example in examples])
        return cls(batch, [example.number for example in examples], [example.counts for example in examples], seed)


def likelihood(
    model: MaskedDiffusionTransformer, vocabulary: SharedVocabulary, documents: EvaluationBatch, mode: str
) -> tuple[Tensor, Tensor]:
    """Nats, and the tokens that they are of, both summed over the documents: float64 on the model's device.

    Their quotient is the bound in nats per token. A token is a code of the content, or the EOS that ends it; padding
    EOS count in the nats alone. A document of one label alone has no conditional bound.

    Args:
        model: the denoiser, in evaluation mode.
        vocabulary: its vocabulary.
        documents: what is measured. A document's masks do not depend on what else is in the batch.
        mode: one of `modes`.
    """
    batch = documents.batch
    target_S, absent_S = _roles(batch, mode)
    counted_S = target_S & torch.tensor(documents.counts)[batch.document_S]
    tokens = batch.divisor_S[counted_S].sum().to(model.device, torch.float64)
    if not bool(target_S.any()):
        return torch.zeros_like(tokens), tokens
    masked_P, weight_D = _mask_exactly(documents, batch.spread(target_S, False), mode)
    ids_P = torch.where(masked_P | batch.spread(absent_S, False), MASK, batch.ids_P)
    index_M, sizes = batch.by_span(masked_P, len(vocabulary.flat_spans))
    spans = [span for _, _, span in vocabulary.flat_spans]
    device = model.device
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
    weight_M = torch.where(counted_S[segment_M], weight_D[batch.document_S[segment_M]], 0.0)
    return (torch.cat(nats).double() * weight_M.to(device)).sum(), tokens


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


def _mask_exactly(documents: EvaluationBatch, target_P: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Mask k of the L target codes of each document. Returns masked_P, and L/k of each document."""
    batch = documents.batch
    masked_P, weight_D = torch.zeros_like(target_P), torch.zeros(batch.num_documents, dtype=torch.float64)
    edges = batch.document_starts.tolist()
    for document, number in enumerate(documents.numbers):
        place_L = torch.nonzero(target_P[edges[document] : edges[document + 1]]).flatten() + edges[document]
        length = len(place_L)
        if not length:
            continue
        generator = generator_for(documents.seed, "likelihood", mode, number)
        k = 1 + int(spread_uniform(documents.seed, -1, number, 0) * length)
        masked_P[place_L[torch.randperm(length, generator=generator)[:k]]] = True
        weight_D[document] = length / k
    return masked_P, weight_D
