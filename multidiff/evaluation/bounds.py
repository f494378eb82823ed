"""The bounds of many documents in every mode: nats per token, and bits per dimension of the items.

A token depends on its tokenizer. A byte of a text, a channel of a pixel and a second of a sound do not, so bits for
each of these compare models with different tokenizers:

    bits per dimension = nats / (ln 2 · dimensions).

What is bounded is the likelihood of codes. Where the tokenizer gives every item back, as byte-level BPE does, the
bound holds for the items too, because a text is at least as likely as its codes. Where the tokenizer loses something,
as codecs and VQ models do, the bound says nothing about pixels or samples. It is then not comparable with the bits per
dimension of models of pixels.

Shape suffixes: D documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multidiff.data.batches import EVALUATION, DocumentKey
from multidiff.data.documents import Documents, check_eos_padding
from multidiff.data.length import LongDocuments, select
from multidiff.data.sources import Folder
from multidiff.data.splits import Split
from multidiff.data.tokenizing import check_split, tokenize
from multidiff.evaluation.likelihood import JOINT, BoundSums, Estimator, EvaluationBatch, likelihood, modes
from multidiff.generation import MultiDiffPipeline
from multidiff.generation.pipeline import evaluating

Measure = Callable[[EvaluationBatch, str], tuple[Tensor, Tensor]]


class Estimate(NamedTuple):
    """The bound of one mode.

    Attributes:
        mode: one of `modes`.
        nats, nats_error: nats per token, and their standard error.
        unit: what a dimension of the items is called, "byte", "dimension" or "second"; None where the items have no
            such unit or several.
        bits, bits_error: bits per unit, and their standard error; NaN where there is no unit.
    """

    mode: str
    nats: float
    nats_error: float
    unit: str | None
    bits: float
    bits_error: float


class Bounds:
    """Sums over documents, from which the bound of every mode follows.

    Args:
        labels: of the segments.
        device: of the sums.
    """

    def __init__(self, labels: Iterable[str], device: torch.device | str = "cpu"):
        self._tokens = {mode: BoundSums.zero(device) for mode in modes(labels)}
        self._dimensions = {mode: BoundSums.zero(device) for mode in self._tokens}
        self._units: dict[str, set[str | None]] = {mode: set() for mode in self._tokens}

    def add(self, documents: EvaluationBatch, measure: Measure) -> None:
        """Measure documents in every mode.

        Args:
            documents: what is measured.
            measure: (documents, mode) -> nats and tokens of each document, as `likelihood` returns them.
        """
        for mode, sums in self._tokens.items():
            nats_D, tokens_D = measure(documents, mode)
            sums.add(nats_D, tokens_D)
            dimensions_D, units = _dimensions(documents, mode)
            # An empty item has nats but no dimensions. It must count, and BoundSums leaves out documents without any.
            dimensions_D = dimensions_D.clamp_min(torch.finfo(torch.float64).tiny).to(nats_D.device)
            self._dimensions[mode].add(nats_D, dimensions_D.where(tokens_D > 0, 0.0))
            self._units[mode] |= units

    def estimates(
        self, reduce: Callable[[Tensor], Tensor] = torch.clone, gather: Callable[[Any], list[Any]] = lambda one: [one]
    ) -> list[Estimate]:
        """The bounds of the modes of which something was measured.

        Args:
            reduce: adds a tensor over processes. Each calls it as often as every other, whatever its documents held.
            gather: lists an object of each process.
        """
        found, of_processes = [], gather(self._units)
        for mode, sums in self._tokens.items():
            nats, bits = (BoundSums(reduce(one.sums)).estimate() for one in (sums, self._dimensions[mode]))
            units = set().union(*(of_process[mode] for of_process in of_processes))
            unit = next(iter(units)) if len(units) == 1 else None
            if nats is not None:
                in_bits = [value / math.log(2) for value in bits] if unit and bits else [math.nan, math.nan]
                found.append(Estimate(mode, *nats, unit, *in_bits))
        return found


def bounds_table(estimates: Iterable[Estimate], draws: int, exact: bool = False) -> str:
    """The bounds as a table of Markdown, with what they are about.

    Args:
        estimates: of `Bounds.estimates`.
        draws: of each document.
        exact: whether the likelihood is exact, as with causal attention; then there are no draws.
    """
    what = "Negative log-likelihoods of codes, ± a standard error."
    if not exact:
        what = f"Upper bounds on the negative log-likelihood of codes, ± a standard error; draws a document: {draws}."
    rows = ["| mode | nats per token | bits | per |", "|---|---|---|---|"]
    for one in estimates:
        bits = f"{one.bits:.4g} ± {one.bits_error:.2g} | {one.unit}" if one.unit else "|"
        rows.append(f"| {one.mode} | {one.nats:.4f} ± {one.nats_error:.4f} | {bits} |")
    return "\n".join(
        [
            *rows,
            what,
            "Where a tokenizer loses something of its items, bits say nothing about pixels or samples.",
        ]
    )


def measure_folder(
    pipe: MultiDiffPipeline,
    folder: Path,
    split: str = "test",
    *,
    draws: int = 4,
    max_documents: int | None = None,
    max_eos_padding: Mapping[str, int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    estimator: Estimator | None = None,
    max_seq_length: int | None = None,
    long_documents: LongDocuments = "raise",
) -> tuple[list[Estimate], int]:
    """The bounds of a model on a split of a data folder, as `multidiff test` measures them with the same seed.

    Args:
        pipe: the model.
        folder: the data folder; its items are tokenized once, as for training.
        split: train, validation or test.
        draws: of each document, whose mean its nats are.
        max_documents: measure the first so many documents; None measures all.
        max_eos_padding: as in the configuration of the training; it decides the canvases. None draws them as training
            does without it.
        batch_size: documents of a forward pass.
        seed: of canvases and masks.
        estimator: as in `likelihood`.
        max_seq_length, long_documents: as in `DocumentDataModule`; give those of the training.

    Returns:
        the bounds, and the number of documents.

    Raises:
        ValueError: a folder or a split that cannot be read, or a number below 1.
    """
    for name, value in (("draws", draws), ("max_documents", max_documents), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}.")
    check_eos_padding(max_eos_padding or {}, pipe.tokenizers)
    source = Folder(folder)
    shards = tokenize(source, pipe.tokenizers, pipe.vocabulary)
    check_split(shards, split, source)
    found = Split(shards, split, source)
    selection, counts = select(found, pipe.tokenizers, max_seq_length, long_documents)
    canvas = pipe.seen.canvas if pipe.seen else {}
    usual = {name: next(iter(size.values())) for name, size in canvas.items()}
    documents = Documents([(found, selection)], pipe.sequencer, usual, max_eos_padding or {}, seed, shuffled=False)
    keys = [DocumentKey(EVALUATION, number, number) for number in range(len(documents))][:max_documents]
    bounds = Bounds(counts.labels, pipe.transformer.device)

    def measure(some: EvaluationBatch, mode: str) -> tuple[Tensor, Tensor]:
        return likelihood(pipe.transformer, pipe.vocabulary, some, mode, draws, pipe.processes, estimator)

    with evaluating(pipe.transformer):
        for start in range(0, len(keys), batch_size):
            examples = documents.__getitems__(keys[start : start + batch_size])
            bounds.add(EvaluationBatch.of(examples, sequencer=pipe.sequencer, seed=seed), measure)
    return bounds.estimates(), len(keys)


def _dimensions(documents: EvaluationBatch, mode: str) -> tuple[Tensor, set[str | None]]:
    """Dimensions of the targets of a mode in each document, float64 [D], and their units."""
    batch, label = documents.batch, mode.rpartition("/")[0]
    sizes_D, units = torch.zeros(batch.num_documents, dtype=torch.float64), set()
    of_segments = documents.dimensions or [None] * len(batch.labels)
    for name, document, found in zip(batch.labels, batch.document_S.tolist(), of_segments, strict=True):
        if mode == JOINT or name == label:
            sizes_D[document] += found[0] if found else 0.0
            units.add(found[1] if found else None)
    return sizes_D, units
