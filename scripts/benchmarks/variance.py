"""How much the gradient of a step varies with the times and masks that are drawn, at equal computation.

Every variant takes the same number of documents through the model. Two copies of a document are *complementary* where
one has time t and the other 1 - t, and each masks what the other leaves. Together they mask every code once (Li et al.
2025, LaViDa, arXiv 2505.16839). Every segment has a time of its own. The loss is the sum over masked codes divided by
the number of all codes, with the weight 1/t of the bound ("elbo") or none ("uniform").

The variance E |g - E g|² of a step has a part that comes from times and masks, and a part from the choice of documents.
Two steps with the same documents, g and g', tell the first: E |g - g'|² / 2.

Shape suffixes: P tokens of the batch, S segments, M masked codes, R steps, K pairs of steps, W weights of the model.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multidiff import MultiDiffPipeline
from multidiff.data.batches import DocumentKey
from multidiff.data.documents import Documents
from multidiff.data.length import select
from multidiff.data.sources import Folder
from multidiff.data.splits import Split
from multidiff.data.tokenizing import tokenize
from multidiff.objectives.times import SMALLEST, draw_time
from multidiff.seeding import generator_for
from multidiff.sequence import MASK, Document, TokenBatch

# Name -> how times are drawn, and copies of a document.
VARIANTS = {
    "independent times": ("independent", 1),
    "stratified times": ("stratified", 1),
    "two copies, stratified times": ("stratified", 2),
    "two copies, complementary masks": ("complementary", 2),
}
_SEED = 0


def variance(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the variances of each variant, as multiples of those with independent times."""
    torch.set_num_threads(arguments.threads)
    pipe = MultiDiffPipeline.from_pretrained(arguments.model)
    if not pipe.transformer.pattern.is_full or pipe.transformer.config["time_input"]:
        raise SystemExit("variance compares draws of masks for a model with full attention and without time_input.")
    if arguments.pairs < 2 or arguments.batch < 2:
        raise SystemExit("variance needs --pairs and --batch of at least 2.")
    documents = _documents(pipe, arguments.data)
    columns = [f"{weighting}, {part}" for weighting in ("elbo", "uniform") for part in ("all", "times and masks")]
    print(f"| variant | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    result: dict[str, Any] = {}
    first: list[tuple[float, float]] = []
    for name, (times, copies) in VARIANTS.items():
        found: list[tuple[float, float]] = []
        for weighting in ("elbo", "uniform"):
            gradient_RW = torch.empty(2 * arguments.pairs, pipe.transformer.num_parameters())
            for step, gradient_W in enumerate(gradient_RW):
                some = _drawn(documents, arguments.batch, step // 2, copies)
                gradient_W.copy_(_gradient(pipe, some, times, step, weighting))
            found += _variances(gradient_RW)
        first = first or found
        cells = []
        for (value, error), (base, base_error) in zip(found, first, strict=True):
            ratio = value / base
            cells.append(f"{ratio:.2f} ± {ratio * math.hypot(error / value, base_error / base):.2f}")
        print(f"| {name} | {' | '.join(['1'] * len(cells) if first is found else cells)} |", flush=True)
        result[name] = {column: float(f"{value:.4g}") for column, (value, _) in zip(columns, found, strict=True)}
    return result


def _documents(pipe: MultiDiffPipeline, folder: Path) -> Documents:
    source = Folder(folder)
    split = Split(tokenize(source, pipe.tokenizers, pipe.vocabulary), "train", source)
    selection, _ = select(split, pipe.tokenizers, None, "raise")
    canvas = pipe.seen.canvas if pipe.seen else {}
    usual = {name: next(iter(size.values())) for name, size in canvas.items()}
    return Documents([(split, selection)], pipe.sequencer, usual, {}, _SEED, shuffled=True)


def _drawn(documents: Documents, number: int, step: int, copies: int) -> list[Document]:
    """`number` documents, copies beside each other; fewer of them with more copies, and a different set each step."""
    generator = generator_for(_SEED, "documents", step)
    chosen = torch.randperm(len(documents), generator=generator)[: number // copies].tolist()
    examples = documents.__getitems__([DocumentKey(0, place, index) for place, index in enumerate(chosen)])
    return [example.document for example in examples for _ in range(copies)]


def _gradient(pipe: MultiDiffPipeline, documents: Sequence[Document], times: str, step: int, weighting: str) -> Tensor:
    """The gradient of the loss, [W]."""
    batch = pipe.sequencer.batch(documents)
    t_S, masked_P = _noise(batch, times, step)
    index_M, sizes = batch.by_span(masked_P, len(pipe.vocabulary.flat_spans))
    spans = [span for _, _, span in pipe.vocabulary.flat_spans]
    nats = pipe.transformer(
        torch.where(masked_P, MASK, batch.ids_P),
        batch.positions_P3,
        batch.document_starts,
        list(zip(index_M.split(sizes), spans, strict=True)),
        batch.coords_P3,
        targets=batch.ids_P[index_M] - pipe.vocabulary.span_edges[batch.span_P[index_M], 0],
    )
    weight_M = (1 / t_S[batch.segment_P[index_M]]).float() if weighting == "elbo" else torch.ones(len(index_M))
    pipe.transformer.zero_grad()
    ((torch.cat(nats) * weight_M).sum() / int((batch.span_P >= 0).sum())).backward()
    return torch.cat([weight.grad.flatten() for weight in pipe.transformer.parameters() if weight.grad is not None])


def _noise(batch: TokenBatch, times: str, step: int) -> tuple[Tensor, Tensor]:
    """A time of each segment, and which codes are masked."""
    generator = generator_for(_SEED, "noise", step)
    uniform_P = torch.rand(len(batch.ids_P), generator=generator, dtype=torch.float64)
    if times == "independent":
        t_S = SMALLEST + (1 - SMALLEST) * torch.rand(len(batch.labels), generator=generator, dtype=torch.float64)
    else:  # as `Noising` draws them: a place in the epoch for each document, an axis for each of its segments
        offset, axes, t = int(torch.randint(2**20, (), generator=generator)), [0] * batch.num_documents, []
        for document in batch.document_S.tolist():
            place = document // 2 if times == "complementary" else document
            t.append(draw_time(_SEED, 0, offset + place, axes[document]))
            axes[document] += 1
        t_S = torch.tensor(t, dtype=torch.float64)
    if times == "complementary":
        second_S = batch.document_S % 2 == 1
        first_S = torch.nonzero(~second_S).flatten()
        t_S[second_S] = (1 - t_S[first_S]).clamp_min(SMALLEST)
        second_P = batch.document_P % 2 == 1
        uniform_P[second_P] = 1 - uniform_P[~second_P]
    return t_S, (uniform_P < batch.spread(t_S, 0.0)) & (batch.span_P >= 0)


def _variances(gradient_RW: Tensor) -> list[tuple[float, float]]:
    """The variance summed over the weights, and the part of times and masks, each with its standard error. Every two
    gradients are of the same documents."""
    pairs, mean_W = len(gradient_RW) // 2, gradient_RW.mean(0)
    all_K, part_K = [], []
    for one_W, other_W in zip(gradient_RW[::2], gradient_RW[1::2], strict=True):
        all_K.append(sum((gradient_W - mean_W).double().square().sum() / 2 for gradient_W in (one_W, other_W)))
        part_K.append((one_W - other_W).double().square().sum() / 2)
    values = torch.tensor(all_K) * 2 * pairs / (2 * pairs - 1), torch.tensor(part_K)
    return [(float(value_K.mean()), float(value_K.std()) / math.sqrt(pairs)) for value_K in values]


def add_parsers(commands: Any) -> None:
    """The command `variance`."""
    parser = commands.add_parser("variance", help="variance of the gradient by how times and masks are drawn")
    parser.add_argument("--model", default="runs/demo/model", help="saved model (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"), help="its data (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default: all cores)")
    parser.add_argument("--batch", type=int, default=16, help="documents of a step (default: %(default)s)")
    help_ = "pairs of steps with the same documents, of each variant (default: %(default)s)"
    parser.add_argument("--pairs", type=int, default=128, help=help_)
    parser.set_defaults(run=variance)
