"""Blocks: which tokens of a document attend to which.

One rule serves every pattern. A token has a block, whose number grows through its document, and stands in the clean or
in the noisy copy of it. A query attends to a key of its document if

    both stand in the same copy and block, or the key is clean and in an earlier block.

- "full": one block, no clean copy. Everything attends to everything.
- "causal": every token is a block, all of them clean. A token attends to itself and to what stands before it.
- "block_causal": blocks of `block_length` codes, or a block for each segment. In training, both copies of a document
  stand side by side, so that every noisy block sees clean predecessors (Arriola et al. 2025, BD3-LM, arXiv 2503.09573,
  section 3.3). In generation there is one copy: earlier blocks are decided, and later ones are not seen.

Code i of a segment is in block i // block_length of it; numbers continue through the document. The begin token belongs
to the first block of its segment, the end token to the last one, and `<bos>` to the first block of the document.

Shape suffixes: P tokens of a batch, X tokens of both copies, S segments, U segments of which each is one block,
D documents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from multidiff.sequence.batch import TokenBatch

Attention = Literal["full", "causal", "block_causal"]
SEGMENT = "segment"


class TokenBlocks(NamedTuple):
    """The block and the copy of tokens; on the CPU.

    Attributes:
        number_P: int64, number of the block in the document, from 0.
        noisy_P: bool, True in the noisy copy.
    """

    number_P: Tensor
    noisy_P: Tensor

    @classmethod
    def clean(cls, number_P: Tensor) -> TokenBlocks:
        """The blocks of documents of which there is one copy."""
        return cls(number_P, torch.zeros_like(number_P, dtype=torch.bool))

    def at(self, index: Tensor) -> TokenBlocks:
        """Those of some tokens."""
        return TokenBlocks(self.number_P[index], self.noisy_P[index])


@dataclass(frozen=True)
class AttentionPattern:
    """The attention pattern of a model.

    Attributes:
        attention: "full", "causal" or "block_causal".
        block_length: codes in a block of "block_causal"; "segment" makes a block of each segment.

    Raises:
        ValueError: an unknown pattern, or a block length that does not fit it.
    """

    attention: Attention = "full"
    block_length: int | Literal["segment"] | None = None

    def __post_init__(self) -> None:
        known, length = get_args(Attention), self.block_length
        if self.attention not in known:
            raise ValueError(f"attention must be {', '.join(known[:-1])} or {known[-1]}, not {self.attention!r}.")
        if self.attention != "block_causal":
            if length is not None:
                raise ValueError(f"block_length {length!r} goes with attention 'block_causal', not {self.attention!r}.")
        elif length != SEGMENT and not _is_length(length):
            raise ValueError(
                f"attention 'block_causal' needs a block_length of at least 1, or 'segment', not {length!r}."
            )

    def __str__(self) -> str:
        """As in "a model of causal attention"."""
        blocks = "" if self.block_length is None else f" with block_length {self.block_length}"
        return f"{self.attention} attention{blocks}"

    @property
    def length(self) -> int | Literal["segment"] | None:
        """Codes of a block: 1 of causal attention; None of full attention."""
        return 1 if self.attention == "causal" else self.block_length

    @property
    def is_full(self) -> bool:
        """Whether every token attends to its whole document."""
        return self.attention == "full"

    @property
    def is_autoregressive(self) -> bool:
        """Whether the logits of a code are read at the token before it."""
        return self.attention == "causal"

    def numbers(self, batch: TokenBatch) -> Tensor:
        """number_P, int64: the block of each token in its document, from 0."""
        place_P = torch.arange(len(batch.ids_P)) - batch.document_starts[:-1].long()[batch.document_P]
        if self.attention == "causal":
            return place_P
        number_P = torch.zeros_like(place_P)
        if self.attention == "full":
            return number_P
        first_S, count_S = self._of_segments(batch)
        code_P = batch.segment_P >= 0
        segment_M = batch.segment_P[code_P]
        place_M = torch.nonzero(code_P).flatten() - batch.start_S[segment_M]
        number_P[code_P] = first_S[segment_M] + self._block(place_M)
        number_P[batch.start_S - 1] = first_S
        number_P[batch.start_S + batch.length_S] = first_S + count_S - 1
        return number_P

    def split(self, batch: TokenBatch) -> tuple[TokenBatch, Tensor]:
        """The batch with a segment for each block, and the segment that each of these is of, source_U.

        The tokens stay the same. A block of "block_causal" has a time of its own, as a segment has in full attention.
        """
        _, count_S = self._of_segments(batch)
        source_U = torch.repeat_interleave(count_S)
        block_U = torch.arange(len(source_U)) - (count_S.cumsum(0) - count_S)[source_U]
        length = self.block_length if isinstance(self.block_length, int) else int(batch.length_S.max())
        begin_U = block_U * length
        segment_P, code_P = batch.segment_P.clone(), batch.segment_P >= 0
        segment_M = batch.segment_P[code_P]
        place_M = torch.nonzero(code_P).flatten() - batch.start_S[segment_M]
        segment_P[code_P] = (count_S.cumsum(0) - count_S)[segment_M] + self._block(place_M)

        def left(number_S: Tensor) -> Tensor:
            return (number_S[source_U] - begin_U).clamp(0, length)

        parts = replace(
            batch,
            segment_P=segment_P,
            start_S=batch.start_S[source_U] + begin_U,
            length_S=left(batch.length_S),
            tokenizer_S=batch.tokenizer_S[source_U],
            document_S=batch.document_S[source_U],
            divisor_S=left(batch.divisor_S),
            labels=tuple(batch.labels[source] for source in source_U.tolist()),
        )
        return parts, source_U

    def _of_segments(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """The number of the first block of each segment, and how many blocks it has, at least one."""
        count_S = self._block(batch.length_S - 1).clamp_min(0) + 1
        before_S = count_S.cumsum(0) - count_S
        first_D = torch.searchsorted(batch.document_S, torch.arange(batch.num_documents))
        return before_S - before_S[first_D][batch.document_S], count_S

    def _block(self, place: Tensor) -> Tensor:
        return place // self.block_length if isinstance(self.block_length, int) else torch.zeros_like(place)


class Copies(NamedTuple):
    """The clean and the noisy copy of every document, one after the other.

    Attributes:
        index_X: int64, the token of the batch that each token is a copy of.
        blocks: of X.
        starts: int32 [D + 1]: document d is starts[d]:starts[d + 1].
        noisy_P: int64, place in X of the noisy copy of each token of the batch; -1 where it has none.
    """

    index_X: Tensor
    blocks: TokenBlocks
    starts: Tensor
    noisy_P: Tensor

    def take(self, clean_P: Tensor, noisy_P: Tensor) -> Tensor:
        """Values of X, from those of the tokens of the batch in either copy."""
        noisy_X = self.blocks.noisy_P.view(-1, *[1] * (clean_P.dim() - 1))
        return torch.where(noisy_X, noisy_P[self.index_X], clean_P[self.index_X])


def side_by_side(batch: TokenBatch, number_P: Tensor, target_P: Tensor) -> Copies:
    """Both copies of each document, as far as they are of use: of the noisy copy the blocks that hold a target, and of
    the clean one the blocks before the last of these.

    Args:
        batch: the documents.
        number_P: of `AttentionPattern.numbers`.
        target_P: bool, the codes that are predicted.
    """
    document_P, blocks = batch.document_P, int(number_P.max()) + 1
    place_P = document_P * blocks + number_P
    held = torch.zeros(batch.num_documents * blocks, dtype=torch.bool)
    held[place_P[target_P]] = True
    last_D = torch.full((batch.num_documents,), -1)
    last_D = last_D.scatter_reduce(0, document_P[target_P], number_P[target_P], "amax")
    last_D = last_D.where(last_D >= 0, blocks)  # a document without a target is kept whole
    clean, noisy = (torch.nonzero(part_P).flatten() for part_P in (number_P < last_D[document_P], held[place_P]))
    both = torch.cat([clean, noisy])
    order = torch.argsort(document_P[both], stable=True)
    index_X, noisy_X = both[order], order >= len(clean)
    starts = torch.zeros(batch.num_documents + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(document_P[index_X], minlength=batch.num_documents).cumsum(0)
    back_P = torch.full_like(number_P, -1)
    back_P[index_X[noisy_X]] = torch.nonzero(noisy_X).flatten()
    return Copies(index_X, TokenBlocks(number_P[index_X], noisy_X), starts, back_P)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
