"""Token batches: documents one after another, without rows and without padding.

A document becomes

    <bos> <text> t t t EOS </text> <image> i i i i </image> ...

`<bos>` and the begin and end tokens are structure. Positions have three axes. A structure token stands at (p, p, p).
The codes of a segment stand at p + 1 + their own coordinates, where p is the position of its begin token. Every next
token starts at 1 + the largest coordinate used so far, on all axes.

What a segment adds depends on its tokenizer and the size of its canvas, apart from its ids and the place where it
begins. A `Layout` holds that part; `multidiff.sequence.Sequencer` keeps one for each size.

Shape suffixes: P tokens of a batch, M some of them, N codes of a segment, T = N + 2 its tokens, S segments,
D documents, 3 axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from multidiff.sequence.segments import Document
from multidiff.sequence.vocabulary import BOS


class Layout(NamedTuple):
    """What all segments of one tokenizer and one size have in common.

    Attributes:
        offset_T: int64, shared id of local id 0 at each code, and the begin and the end token.
        positions_T3: int64, positions relative to that of the begin token.
        coords_T3: int64, coordinates of the codes; -1 at structure.
        span_T: int64, index of each code's span in the vocabulary; -1 at structure.
        tokens: T.
        extent: position of the end token relative to that of the begin token.
        place: place of the tokenizer in the vocabulary.
        varies: whether the length of its items varies.
    """

    offset_T: np.ndarray
    positions_T3: np.ndarray
    coords_T3: np.ndarray
    span_T: np.ndarray
    tokens: int
    extent: int
    place: int
    varies: bool


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of all documents, one after another. All tensors are on the CPU.

    Attributes:
        ids_P: int64, shared ids; arbitrary valid ones where unknown.
        positions_P3: int64, rotary positions.
        coords_P3: int64, coordinates within the segment; -1 at structure.
        span_P: int64, index of the span that a code is drawn from (`SharedVocabulary.flat_spans`); -1 at structure.
        segment_P: int64, index of the segment within the batch; -1 at structure.
        known_P: bool, False where the model has to fill in.
        document_starts: int32 [D + 1]: document d is document_starts[d]:document_starts[d + 1].
        start_S: int64, place in P of the first code of each segment.
        length_S: int64, number of codes of each segment.
        tokenizer_S: int64, place of each segment's tokenizer in the vocabulary.
        document_S: int64, document of each segment.
        divisor_S: int64, what the nats of a segment are divided by: the codes of its content, plus one for its EOS
            where it has one.
        labels: the label of each segment.
    """

    ids_P: Tensor
    positions_P3: Tensor
    coords_P3: Tensor
    span_P: Tensor
    segment_P: Tensor
    known_P: Tensor
    document_starts: Tensor
    start_S: Tensor
    length_S: Tensor
    tokenizer_S: Tensor
    document_S: Tensor
    divisor_S: Tensor
    labels: tuple[str, ...]

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    @property
    def document_P(self) -> Tensor:
        """int64, the document of each token."""
        lengths_D = np.diff(self.document_starts.numpy())
        return torch.from_numpy(np.repeat(np.arange(len(lengths_D)), lengths_D))

    def spread(self, value_S: Tensor, elsewhere: float) -> Tensor:
        """A value per segment at each of its codes; `elsewhere` at structure."""
        return torch.where(self.segment_P < 0, elsewhere, value_S[self.segment_P.clamp_min(0)])

    def by_span(self, where_P: Tensor, spans: int) -> tuple[Tensor, list[int]]:
        """The positions of a mask ordered by the span that they draw from, int64 [M], and how many each of the
        vocabulary's `spans` has."""
        position_M = torch.nonzero(where_P).flatten()
        span_M = self.span_P[position_M]
        return position_M[torch.argsort(span_M, stable=True)], torch.bincount(span_M, minlength=spans).tolist()


def lay_out(documents: Sequence[Document], layouts: Sequence[Sequence[Layout]]) -> TokenBatch:
    """One batch of at least one document, each of at least one segment.

    Args:
        documents: in the order of the batch.
        layouts: of each document's segments.

    Raises:
        ValueError: there is no document, or one has no segment.
    """
    if not documents or not all(documents):
        raise ValueError("A batch needs at least one document, and a document at least one segment.")
    # In NumPy: these tables are too small for PyTorch's threads, which would be woken for each of them.
    segments = [segment for document in documents for segment in document]
    flat = [layout for of_document in layouts for layout in of_document]
    number_D = np.array([len(document) for document in documents])
    document_S = np.repeat(np.arange(len(documents)), number_D)
    first_D = number_D.cumsum() - number_D
    # Tokens: one of <bos> for each document, and T = N + 2 for each segment.
    tokens_S = np.array([layout.tokens for layout in flat])
    starts = np.concatenate([[0], (1 + np.add.reduceat(tokens_S, first_D)).cumsum()])
    begin_S = tokens_S.cumsum() - tokens_S + document_S + 1  # place in P of each begin token
    inside_P = np.ones(starts[-1], bool)
    inside_P[starts[:-1]] = False

    def whole(parts: list[np.ndarray], bos: int) -> np.ndarray:
        values = np.concatenate(parts)
        result = np.full((len(inside_P), *values.shape[1:]), bos, values.dtype)
        result[inside_P] = values
        return result

    span_P = whole([layout.span_T for layout in flat], -1)
    segment_P = whole([np.repeat(np.arange(len(flat)), tokens_S)], -1)
    code_P = span_P >= 0
    segment_P[~code_P] = -1
    ids_P = whole([layout.offset_T for layout in flat], BOS)
    ids_P[code_P] += np.concatenate([segment.ids_N.numpy() for segment in segments])
    known_P = np.ones(len(code_P), bool)
    known_P[code_P] = np.concatenate([segment.known_N.numpy() for segment in segments])
    # The begin token of a document's first segment stands at 1, the next one 1 behind the end token before it.
    advance_S = np.array([layout.extent + 1 for layout in flat])
    before_S = advance_S.cumsum() - advance_S
    cursor_S = 1 + before_S - before_S[first_D][document_S]
    positions_P3 = whole([layout.positions_T3 for layout in flat], 0)
    positions_P3[inside_P] += np.repeat(cursor_S, tokens_S)[:, None]
    return TokenBatch(
        ids_P=torch.from_numpy(ids_P),
        positions_P3=torch.from_numpy(positions_P3),
        coords_P3=torch.from_numpy(whole([layout.coords_T3 for layout in flat], -1)),
        span_P=torch.from_numpy(span_P),
        segment_P=torch.from_numpy(segment_P),
        known_P=torch.from_numpy(known_P),
        document_starts=torch.from_numpy(starts.astype(np.int32)),
        start_S=torch.from_numpy(begin_S + 1),
        length_S=torch.from_numpy(tokens_S - 2),
        tokenizer_S=torch.tensor([layout.place for layout in flat]),
        document_S=torch.from_numpy(document_S),
        divisor_S=torch.tensor(
            [min(s.content + layout.varies, layout.tokens - 2) for s, layout in zip(segments, flat, strict=True)]
        ),
        labels=tuple(segment.label for segment in segments),
    )
