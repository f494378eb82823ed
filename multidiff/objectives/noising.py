"""Training examples: documents with roles, noised, laid out, and with the places and weights of the loss.

All of it happens on the CPU, where data are loaded. A training step on an accelerator gets tensors that are ready and
waits for nothing.

Shape suffixes: P tokens of the batch, S segments, M positions of the loss ordered by span, T tokenizers, 3 axes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from multidiff.objectives.objective import Objective
from multidiff.objectives.tasks import Task, choose_task, fitting_tasks
from multidiff.objectives.times import draw_time
from multidiff.seeding import key_for, uniforms
from multidiff.sequence import Example, Segment, Sequencer, TokenBatch
from multidiff.sequence.vocabulary import SharedVocabulary, Span


class NoisedBatch:
    """What a training step needs of a batch. Not a dataclass: Lightning casts the numbers in one to the precision of a
    model, and the weights of the loss are not to be rounded to it.

    Attributes:
        ids_P, positions_P3, coords_P3: as in `TokenBatch`, with noised ids.
        document_starts: as in `TokenBatch`; stays on the CPU.
        index_M: int64, positions of the loss in P; stays on the CPU.
        sizes: how many of them draw from each span of the vocabulary.
        targets_M: int64, clean local ids within the span.
        loss_weights_M: float32, weight of each cross-entropy in the loss.
        bound_weights_M: float32, its weight w(t) in the bound.
        tokenizer_M: int64, place of the tokenizer.
        tokens: what each tokenizer's nats are divided by.
        loss_divisor: float32, what the loss is divided by.
        num_documents: documents of the batch.
    """

    _SENT = (
        *("ids_P", "positions_P3", "coords_P3", "targets_M"),
        *("loss_weights_M", "bound_weights_M", "tokenizer_M", "loss_divisor"),
    )

    def __init__(
        self,
        ids_P: Tensor,
        positions_P3: Tensor,
        coords_P3: Tensor,
        document_starts: Tensor,
        index_M: Tensor,
        sizes: Sequence[int],
        targets_M: Tensor,
        loss_weights_M: Tensor,
        bound_weights_M: Tensor,
        tokenizer_M: Tensor,
        tokens: Sequence[int],
        loss_divisor: Tensor,
        num_documents: int,
    ):
        self.ids_P, self.positions_P3, self.coords_P3 = ids_P, positions_P3, coords_P3
        self.document_starts, self.num_documents = document_starts, num_documents
        self.index_M, self.sizes, self.targets_M = index_M, tuple(sizes), targets_M
        self.loss_weights_M, self.bound_weights_M, self.tokenizer_M = loss_weights_M, bound_weights_M, tokenizer_M
        self.tokens, self.loss_divisor = tuple(tokens), loss_divisor

    def to(self, device: torch.device | str) -> NoisedBatch:
        """The same batch for a model on `device`, which nothing waits for. The tables that attention is planned with
        stay on the CPU."""
        away = torch.device(device).type != "cpu"
        return self._map(lambda tensor: tensor.to(device, non_blocking=away))

    def pin_memory(self) -> NoisedBatch:
        """The same batch in page-locked memory, from which copies to a GPU do not wait."""
        return self._map(Tensor.pin_memory)

    def logit_positions(self, vocabulary: SharedVocabulary) -> list[tuple[Tensor, Span]]:
        """(index_N, span) for every span of the vocabulary, as the transformer takes them."""
        parts = self.index_M.split(list(self.sizes))
        return [(index_N, span) for index_N, (_, _, span) in zip(parts, vocabulary.flat_spans, strict=True)]

    def _map(self, function: Callable[[Tensor], Tensor]) -> NoisedBatch:
        mapped = copy.copy(self)
        mapped.__dict__.update({name: function(getattr(self, name)) for name in self._SENT})
        return mapped


@dataclass(frozen=True)
class Noising:
    """Makes a `NoisedBatch` of documents; a loader's collate function.

    Every random number of a document follows from (seed, epoch, document), so it does not depend on what else is in
    the batch, or on which process draws it.

    Attributes:
        sequencer: lays documents out.
        tasks: the task mixture.
        objective: the forward process and the weights of the loss.
        seed: of the training.
    """

    sequencer: Sequencer
    tasks: Sequence[Task]
    objective: Objective
    seed: int
    _fitting: dict[tuple[str, ...], list[Task]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, examples: Sequence[Example]) -> NoisedBatch:
        """The batch of these documents, the shortest first: documents of like length attend together.

        Raises:
            ValueError: no task applies to a document.
        """
        drawn = sorted(self._draw(examples), key=lambda one: one.length)
        batch = self.sequencer.batch([one.segments for one in drawn])
        target_S = torch.tensor([role == "target" for one in drawn for role in one.roles])
        absent_S = torch.tensor([role == "absent" for one in drawn for role in one.roles])
        t_S = torch.tensor([t for one in drawn for t in one.times], dtype=torch.float64)
        keys, lengths, blocks = [one.key for one in drawn], [one.length for one in drawn], itertools.count(1)

        def uniform() -> Tensor:
            return uniforms(keys, lengths, next(blocks))

        target_P, absent_P = batch.spread(target_S, False), batch.spread(absent_S, False)
        ids_P, predicted_P, bound_weight_S = batch.ids_P, torch.zeros_like(target_P), torch.zeros_like(t_S)
        names = list(self.sequencer.vocabulary.tokenizers)
        for process in dict.fromkeys(self.objective.process_of(name) for name in names):
            places = [place for place, name in enumerate(names) if self.objective.process_of(name) == process]
            mine_S = torch.isin(batch.tokenizer_S, torch.tensor(places))
            corrupted = process.corrupt(ids_P, batch.span_P, batch.spread(t_S.where(mine_S, 0.0), 0.0), uniform)
            prior_P = process.prior(ids_P, batch.span_P, uniform)
            ids_P = torch.where(absent_P & batch.spread(mine_S, False), prior_P, corrupted.ids_P)
            predicted_P = predicted_P | corrupted.predicted_P
            weighed_S = mine_S & target_S
            bound_weight_S = torch.where(weighed_S, process.weight(t_S.where(weighed_S, 1.0)), bound_weight_S)
        return self._assemble(batch, ids_P, predicted_P & target_P, target_P, target_S, bound_weight_S)

    def _draw(self, examples: Sequence[Example]) -> Iterator[_Drawn]:
        """The roles and times of each document."""
        keys = [key_for(self.seed, "noise", example.epoch, example.number) for example in examples]
        counts = [1 + len(example.document) for example in examples]
        numbers = uniforms(keys, counts).split(counts)
        for example, key, (choice, *dropped) in zip(examples, keys, (part.tolist() for part in numbers), strict=True):
            labels = tuple(segment.label for segment in example.document)
            if labels not in self._fitting:
                self._fitting[labels] = fitting_tasks(self.tasks, labels)
            task = choose_task(self._fitting[labels], choice)
            segments, roles, times = [], [], []
            targets = 0
            for segment, number in zip(example.document, dropped, strict=True):
                role = task.role_of(segment.label)
                if role == "removed":
                    continue
                if role == "given" and number < task.condition_dropout:
                    role = "absent"
                t = 0.0
                if role == "target":
                    t = draw_time(self.seed, example.epoch, example.position, targets, self.objective.times)
                    targets += task.noise == "independent"
                segments.append(segment)
                roles.append(role)
                times.append(t)
            yield _Drawn(segments, roles, times, key, 1 + sum(len(segment) + 2 for segment in segments))

    def _assemble(
        self,
        batch: TokenBatch,
        ids_P: Tensor,
        predicted_P: Tensor,
        target_P: Tensor,
        target_S: Tensor,
        bound_weight_S: Tensor,
    ) -> NoisedBatch:
        vocabulary, objective = self.sequencer.vocabulary, self.objective
        index_M, sizes = batch.by_span(predicted_P, len(vocabulary.flat_spans))
        segment_M = batch.segment_P[index_M]
        weights_T = objective.token_weights(vocabulary)
        tokenizer_M = batch.tokenizer_S[segment_M]
        bound_M = bound_weight_S[segment_M]
        loss_weight_S = weights_T[batch.tokenizer_S] * objective.weights(bound_weight_S, batch.tokenizer_S, vocabulary)
        counted_P = predicted_P if objective.normalisation == "masked" else target_P
        counted_S = torch.bincount(batch.segment_P[counted_P], minlength=len(target_S))
        weighed_S = counted_S * weights_T[batch.tokenizer_S]
        divisor = weighed_S.sum()
        if objective.normalisation == "segments":
            loss_weight_S = loss_weight_S / counted_S.clamp_min(1)
            divisor = weights_T[batch.tokenizer_S[counted_S > 0]].sum()
        elif objective.normalisation == "documents":
            weighed_D = torch.zeros(batch.num_documents, dtype=torch.float64).index_add_(0, batch.document_S, weighed_S)
            loss_weight_S = loss_weight_S / weighed_D.where(weighed_D > 0, 1.0)[batch.document_S]
            divisor = (weighed_D > 0).sum()
        tokens_T = torch.zeros(len(weights_T), dtype=torch.int64)
        tokens_T.index_add_(0, batch.tokenizer_S[target_S], batch.divisor_S[target_S])
        return NoisedBatch(
            ids_P=ids_P,
            positions_P3=batch.positions_P3,
            coords_P3=batch.coords_P3,
            document_starts=batch.document_starts,
            index_M=index_M,
            sizes=sizes,
            targets_M=batch.ids_P[index_M] - vocabulary.span_starts[batch.span_P[index_M]],
            loss_weights_M=loss_weight_S[segment_M].float(),
            bound_weights_M=bound_M.float(),
            tokenizer_M=tokenizer_M,
            tokens=tokens_T.tolist(),
            loss_divisor=divisor.float(),
            num_documents=batch.num_documents,
        )


class _Drawn(NamedTuple):
    segments: list[Segment]
    roles: list[str]
    times: list[float]
    key: int
    length: int  # tokens
