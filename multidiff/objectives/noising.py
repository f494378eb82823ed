"""Training examples: documents with roles, noised, laid out, and with the places and weights of the loss.

A model with causal attention gets clean tokens, and its loss is at the token before each target. One whose attention
works in blocks gets the clean and the noisy copy of each document, and its loss is in the noisy one
(`multidiff.sequence.blocks`). Each block has a time of its own, as a segment has otherwise, and counts as a segment
where the loss is normalised by segments.

All of it happens on the CPU, where data are loaded. A training step on an accelerator gets tensors that are ready and
waits for nothing.

Shape suffixes: P tokens of the batch, S segments, M positions of the loss ordered by span, T tokenizers, 3 axes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from multidiff.objectives.objective import Objective
from multidiff.objectives.tasks import Task, choose_task, fitting_tasks
from multidiff.objectives.times import draw_time, times_of_blocks
from multidiff.seeding import key_for, uniforms
from multidiff.sequence import AttentionPattern, Example, Segment, Sequencer, TokenBatch, TokenBlocks
from multidiff.sequence.blocks import side_by_side
from multidiff.sequence.vocabulary import MASK, SharedVocabulary, Span


class NoisedBatch:
    """What a training step needs of a batch. Not a dataclass: Lightning casts the numbers in one to the precision of a
    model, and the weights of the loss are not to be rounded to it.

    Attributes:
        ids_P, positions_P3, coords_P3: as in `TokenBatch`, with noised ids; of both copies of a document where
            attention works in blocks.
        noise_P: float32, how much noise there is at each token: 0 where it is clean, 1 where it is absent.
        document_starts: as in `TokenBatch`; stays on the CPU.
        index_M: int64, positions of the loss in P; stays on the CPU.
        sizes: how many of them draw from each span of the vocabulary.
        targets_M: int64, clean local ids within the span.
        noised_M: int64, noised local ids; the size of the span stands for `<mask>`.
        t_M: float32, times.
        loss_weights_M: float32, weight of each divergence in the loss.
        bound_weights_M: float32, its weight in the bound.
        tokenizer_M: int64, place of the tokenizer.
        tokens: what each tokenizer's nats are divided by.
        loss_divisor: float32, what the loss is divided by.
        num_documents: documents of the batch; complementary twins count once.
        blocks: of the tokens, where attention works in blocks; stays on the CPU. None elsewhere.
    """

    _SENT = (
        *("ids_P", "positions_P3", "coords_P3", "noise_P", "targets_M", "noised_M", "t_M"),
        *("loss_weights_M", "bound_weights_M", "tokenizer_M", "loss_divisor"),
    )

    def __init__(
        self,
        ids_P: Tensor,
        positions_P3: Tensor,
        coords_P3: Tensor,
        noise_P: Tensor,
        document_starts: Tensor,
        index_M: Tensor,
        sizes: Sequence[int],
        targets_M: Tensor,
        noised_M: Tensor,
        t_M: Tensor,
        loss_weights_M: Tensor,
        bound_weights_M: Tensor,
        tokenizer_M: Tensor,
        tokens: Sequence[int],
        loss_divisor: Tensor,
        num_documents: int,
        blocks: TokenBlocks | None = None,
    ):
        self.blocks = blocks
        self.ids_P, self.positions_P3, self.coords_P3, self.noise_P = ids_P, positions_P3, coords_P3, noise_P
        self.document_starts, self.num_documents = document_starts, num_documents
        self.index_M, self.sizes = index_M, tuple(sizes)
        self.targets_M, self.noised_M, self.t_M = targets_M, noised_M, t_M
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

    def losses(
        self, vocabulary: SharedVocabulary, objective: Objective
    ) -> list[Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """The divergence of every span's process, as the transformer takes it; with label smoothing a second column,
        the smoothed cross-entropy."""
        tables = zip(self.noised_M.split(list(self.sizes)), self.t_M.split(list(self.sizes)), strict=True)
        losses = [
            partial(objective.process_of(name).loss, noised_N, t_N)
            for (name, _, _), (noised_N, t_N) in zip(vocabulary.flat_spans, tables, strict=True)
        ]
        if objective.label_smoothing:
            return [partial(_with_smoothed, loss, objective.label_smoothing) for loss in losses]
        return losses

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
        pattern: of the model's attention.
    """

    sequencer: Sequencer
    tasks: Sequence[Task]
    objective: Objective
    seed: int
    pattern: AttentionPattern = AttentionPattern()  # noqa: RUF009 (frozen)
    _fitting: dict[tuple[str, ...], list[Task]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, examples: Sequence[Example]) -> NoisedBatch:
        """The batch of these documents, the shortest first: documents of like length attend together.

        Raises:
            ValueError: no task applies to a document.
        """
        drawn = list(self._draw(examples))
        if self.objective.complementary:
            drawn = [twin for one in drawn for twin in (one, one._replace(twin=True))]
        drawn.sort(key=lambda one: one.length)
        batch = self.sequencer.batch([one.segments for one in drawn])
        target_S = torch.tensor([role == "target" for one in drawn for role in one.roles])
        absent_S = torch.tensor([role == "absent" for one in drawn for role in one.roles])
        t_S = torch.tensor([t for one in drawn for t in one.times], dtype=torch.float64)
        number_P = None
        if self.pattern.attention == "block_causal":
            number_P, (batch, source_S) = self.pattern.numbers(batch), self.pattern.split(batch)
            target_S, absent_S, t_S = target_S[source_S], absent_S[source_S], t_S[source_S]
            alone_D = torch.tensor([one.independent for one in drawn])
            spread_S = times_of_blocks(t_S, source_S, self.objective.times)
            t_S = torch.where(alone_D[batch.document_S] & target_S, spread_S, t_S)
        keys, lengths, streams = [one.key for one in drawn], [one.length for one in drawn], itertools.count(1)
        twin_D = torch.tensor([one.twin for one in drawn])
        twin_S, twin_P = twin_D[batch.document_S], twin_D[batch.document_P]

        def uniform() -> Tensor:
            numbers_P = uniforms(keys, lengths, next(streams))
            return torch.where(twin_P, 1 - numbers_P, numbers_P)

        target_P, absent_P = batch.spread(target_S, False), batch.spread(absent_S, False)
        ids_P = torch.where(absent_P, MASK, batch.ids_P)
        predicted_P, noise_P = torch.zeros_like(target_P), absent_P.double()
        weight_P = torch.zeros_like(noise_P)
        if self.pattern.is_autoregressive:
            weight_P, t_P = torch.ones_like(weight_P), torch.zeros_like(weight_P)
            return self._assemble(batch, ids_P, target_P, weight_P, noise_P, t_P, target_P, target_S, None)
        vocabulary = self.sequencer.vocabulary
        names = list(vocabulary.tokenizers)
        for process in dict.fromkeys(map(self.objective.process_of, names)):
            places = [place for place, name in enumerate(names) if self.objective.process_of(name) == process]
            mine_S = torch.isin(batch.tokenizer_S, torch.tensor(places))
            if self.objective.complementary:
                opposite_S = process.time(1 - process.noise(t_S)).clamp(*self.objective.times)
                t_S = torch.where(mine_S & twin_S & target_S, opposite_S, t_S)
            own_P = batch.spread(t_S.where(mine_S, 0.0), 0.0)
            noise_P = torch.where(own_P > 0, process.noise(own_P), noise_P)
            made = process.corrupt(ids_P, batch.span_P, vocabulary.span_edges, own_P, uniform)
            ids_P, predicted_P, weight_P = made.ids_P, predicted_P | made.predicted_P, weight_P + made.weight_P
        t_P = batch.spread(t_S, 0.0)
        return self._assemble(batch, ids_P, predicted_P, weight_P, noise_P, t_P, target_P, target_S, number_P)

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
            length = 1 + sum(len(segment) + 2 for segment in segments)
            yield _Drawn(segments, roles, times, key, length, task.noise == "independent")

    def _assemble(
        self,
        batch: TokenBatch,
        ids_P: Tensor,
        predicted_P: Tensor,
        weight_P: Tensor,
        noise_P: Tensor,
        t_P: Tensor,
        target_P: Tensor,
        target_S: Tensor,
        number_P: Tensor | None,
    ) -> NoisedBatch:
        vocabulary, objective = self.sequencer.vocabulary, self.objective
        index_M, sizes = batch.by_span(predicted_P, len(vocabulary.flat_spans))
        segment_M = batch.segment_P[index_M]
        weights_T = objective.token_weights(vocabulary)
        tokenizer_M = batch.tokenizer_S[segment_M]
        bound_M = weight_P[index_M]
        loss_weight_S = weights_T[batch.tokenizer_S]
        counted_P = predicted_P if objective.normalisation == "masked" else target_P
        counted_S = torch.bincount(batch.segment_P[counted_P], minlength=len(target_S))
        weighed_S = counted_S * loss_weight_S
        divisor = weighed_S.sum()
        if objective.normalisation == "segments":
            divisor = loss_weight_S[counted_S > 0].sum()
            loss_weight_S = loss_weight_S / counted_S.clamp_min(1)
        elif objective.normalisation == "documents":
            weighed_D = torch.zeros(batch.num_documents, dtype=torch.float64).index_add_(0, batch.document_S, weighed_S)
            loss_weight_S = loss_weight_S / weighed_D.where(weighed_D > 0, 1.0)[batch.document_S]
            divisor = (weighed_D > 0).sum()
        loss_weight_M = loss_weight_S[segment_M] * objective.weights(bound_M, tokenizer_M, vocabulary)
        tokens_T = torch.zeros(len(weights_T), dtype=torch.int64)
        tokens_T.index_add_(0, batch.tokenizer_S[target_S], batch.divisor_S[target_S])
        edges_M2 = vocabulary.span_edges[batch.span_P[index_M]]
        noised_M = ids_P[index_M]
        read_M, starts, blocks = index_M, batch.document_starts, None
        positions_P3, coords_P3 = batch.positions_P3, batch.coords_P3
        if self.pattern.is_autoregressive:
            read_M = index_M - 1  # every code has a token before it, at least that which begins its segment
        elif number_P is not None:
            copies = side_by_side(batch, number_P, predicted_P)
            ids_P = copies.take(torch.where(target_P, batch.ids_P, ids_P), ids_P)
            noise_P = copies.take(noise_P.masked_fill(target_P, 0.0), noise_P)
            positions_P3, coords_P3 = positions_P3[copies.index_X], coords_P3[copies.index_X]
            read_M, starts, blocks = copies.noisy_P[index_M], copies.starts, copies.blocks
        return NoisedBatch(
            ids_P=ids_P,
            positions_P3=positions_P3,
            coords_P3=coords_P3,
            noise_P=noise_P.float(),
            document_starts=starts,
            index_M=read_M,
            sizes=sizes,
            targets_M=batch.ids_P[index_M] - edges_M2[:, 0],
            noised_M=torch.where(noised_M == MASK, edges_M2[:, 1], noised_M) - edges_M2[:, 0],
            t_M=t_P[index_M].float(),
            loss_weights_M=loss_weight_M.float(),
            bound_weights_M=bound_M.float(),
            tokenizer_M=tokenizer_M,
            tokens=tokens_T.tolist(),
            loss_divisor=divisor.float(),
            num_documents=batch.num_documents // (2 if objective.complementary else 1),
            blocks=blocks,
        )


def _with_smoothed(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    smoothing: float,
    logits_NV: Tensor,
    target_N: Tensor,
    place_N: Tensor,
) -> Tensor:
    smoothed_N = torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none", label_smoothing=smoothing)
    return torch.stack([loss(logits_NV, target_N, place_N), smoothed_N], 1)


class _Drawn(NamedTuple):
    segments: list[Segment]
    roles: list[str]
    times: list[float]
    key: int
    length: int  # tokens
    independent: bool  # whether blocks have times of their own
    twin: bool = False  # whether it has the noise that the other one lacks
