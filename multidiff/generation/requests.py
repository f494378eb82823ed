"""Requests: the segments of a document that a pipeline fills in, and of one that it has filled in.

Shape suffix: N codes of a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from reprlib import Repr
from typing import Any

import torch
from torch import Tensor

from multidiff.sequence import Segment, Sequencer
from multidiff.tokenizer import Codes, ModalityTokenizer

_SHORT = Repr()
_SHORT.maxother = _SHORT.maxstring = 60


class Given:
    """A segment that is there.

    Examples:
        >>> Given("text", "seven")
        Given('text', 'seven')
    """

    def __init__(self, tokenizer: str, item: Any):
        self.tokenizer = tokenizer
        self.item = item

    def __repr__(self) -> str:
        return f"Given({self.tokenizer!r}, {' '.join(_SHORT.repr(self.item).split())})"


class Blank:
    """A segment to fill in. A size that is not given is that of the saved sampler settings (`canvas`), else the usual
    one of training, else the tokenizer's default.

    Where length varies, the size is room, not length: the model decides where in it the content ends.

    Examples:
        >>> [Given("text", "seven"), Blank("image", height=32, width=48)]
        [Given('text', 'seven'), Blank('image', height=32, width=48)]
    """

    def __init__(self, tokenizer: str, **size: int):
        self.tokenizer = tokenizer
        self.size = size

    def __repr__(self) -> str:
        return f"Blank({', '.join([repr(self.tokenizer), *(f'{key}={value}' for key, value in self.size.items())])})"


class Masked:
    """A segment to fill in where `known_N` is False; known codes come back as they are.

    `multidiff.generation.editing` makes them: masked passages, regions of pictures, gaps in sounds, continuations.

    Args:
        codes: as `tokenizer.encode` returns them; arbitrary valid ids where unknown.
        known_N: bool, one for each code.
        max_new_units: where length varies, units (tokens, frames) after the codes to fill in as well; the content ends
            where the model decides within them. With 0 it ends where the codes do.

    Examples:
        A text of three codes, of which the second is to be filled in:

        >>> place = torch.arange(3)
        >>> codes = Codes(torch.tensor([7, 0, 7]), 0 * place, place[:, None].expand(3, 3), {"tokens": 3})
        >>> Masked("text", codes, torch.tensor([True, False, True]))
        Masked('text', 2 of 3 codes known, max_new_units=0)
    """

    def __init__(self, tokenizer: str, codes: Codes, known_N: Tensor, max_new_units: int = 0):
        self.tokenizer = tokenizer
        self.codes = codes
        self.known_N = known_N
        self.max_new_units = max_new_units

    def __repr__(self) -> str:
        known = int(self.known_N.sum())
        return (
            f"Masked({self.tokenizer!r}, {known} of {len(self.codes)} codes known, max_new_units={self.max_new_units})"
        )


class Draft:
    """A segment that the sampler goes on with: its codes stand as if the sampler had decided them itself.

    A sampler that revises what it has decided (one with remasking or editing, or an ancestral one of a process whose
    noise is not masks alone) replaces those that the model doubts.

    Args:
        codes: as `tokenizer.encode` returns them; arbitrary valid ids where undecided.
        decided_N: bool, one for each code; the others are to be filled in. None decides all.
        noise: how much noise the sampler presumes at least, from 0 to 1, as the `noise` of the process counts it; None
            is the share of undecided codes. A complete draft needs it where the model or the sampler asks for the time:
            the more noise, the more of the draft changes.

    Examples:
        >>> place = torch.arange(3)
        >>> codes = Codes(torch.tensor([7, 0, 7]), 0 * place, place[:, None].expand(3, 3), {"tokens": 3})
        >>> Draft("text", codes, noise=0.1)
        Draft('text', 3 of 3 codes decided, noise=0.1)
    """

    def __init__(self, tokenizer: str, codes: Codes, decided_N: Tensor | None = None, noise: float | None = None):
        self.tokenizer = tokenizer
        self.codes = codes
        self.decided_N = torch.ones(len(codes), dtype=torch.bool) if decided_N is None else decided_N
        self.noise = noise

    def __repr__(self) -> str:
        decided = int(self.decided_N.sum())
        return f"Draft({self.tokenizer!r}, {decided} of {len(self.codes)} codes decided, noise={self.noise})"


@dataclass(frozen=True)
class Filled:
    """A segment of a filled document.

    Attributes:
        tokenizer: its name.
        item: what its codes decode to; for a `Given`, what was given.
        codes: its codes.
        probs_N: float64, the probability of each code when it was decided; NaN where it was known.
        given: whether it was a `Given`.
    """

    tokenizer: str
    item: Any
    codes: Codes
    probs_N: Tensor
    given: bool


Request = Given | Blank | Masked | Draft


def check_nesting(documents: Any) -> None:
    """Raise a `ValueError` unless `documents` is a sequence of sequences, with an example where a list is missing."""
    part = Request
    if isinstance(documents, part) or (isinstance(documents, Sequence) and any(isinstance(p, part) for p in documents)):
        raise ValueError(
            "the pipeline takes a list of documents, each a list of segments: for one document write "
            'pipe([[Given("text", "seven"), Blank("image")]]), with two brackets'
        )
    for number, document in enumerate(documents if isinstance(documents, Sequence) else [documents]):
        if isinstance(document, str) or not isinstance(document, Sequence):
            raise ValueError(f"document {number} must be a list of segments, not {_SHORT.repr(document)}")
    if not documents:
        raise ValueError("no documents to fill in")


def make_segments(
    documents: Sequence[Sequence[Request]],
    sequencer: Sequencer,
    tokenizers: Mapping[str, ModalityTokenizer],
    canvas: Callable[[str], Mapping[str, int]],
) -> list[list[Segment]]:
    """The documents as segments; items are tokenized, all of one tokenizer together.

    Args:
        canvas: the size of a tokenizer's blanks where the request does not give one.

    Raises:
        ValueError: an unknown tokenizer, codes that are none of its tokenizer, nothing to fill in.
    """
    given = [part for document in documents for part in document if isinstance(part, Given)]
    codes: dict[int, Codes] = {}
    for name in {part.tokenizer: None for part in given}:
        sequencer.vocabulary.layout(name)
        parts = list({id(part): part for part in given if part.tokenizer == name}.values())
        encoded = tokenizers[name].encode([part.item for part in parts])
        codes |= {id(part): code for part, code in zip(parts, encoded, strict=True)}
    made = []
    for number, document in enumerate(documents):
        segments = []
        for part in document:
            if isinstance(part, Given):
                segments.append(sequencer.given(part.tokenizer, _checked(part.tokenizer, codes[id(part)], sequencer)))
            elif isinstance(part, Blank):
                sequencer.vocabulary.layout(part.tokenizer)
                segments.append(sequencer.blank(part.tokenizer, {**canvas(part.tokenizer), **part.size}))
            elif isinstance(part, Masked):
                segments.append(_masked(part, sequencer))
            elif isinstance(part, Draft):
                _check_draft(part)
                segments.append(
                    _masked(Masked(part.tokenizer, part.codes, torch.zeros_like(part.decided_N)), sequencer)
                )
            else:
                raise ValueError(f"document {number}: expected a Given, Blank, Masked or Draft segment, got {part!r}")
        if all(bool(segment.known_N.all()) for segment in segments):
            raise ValueError(f"document {number} has nothing to fill in. Give it a Blank or a Masked segment.")
        made.append(segments)
    return made


def _check_draft(part: Draft) -> None:
    if part.decided_N.shape != part.codes.ids_N.shape or part.decided_N.dtype != torch.bool:
        raise ValueError(f"Draft({part.tokenizer!r}): decided_N must be bool, one for each of {len(part.codes)} codes")
    if part.noise is not None and not (isinstance(part.noise, int | float) and 0 <= part.noise <= 1):
        raise ValueError(f"Draft({part.tokenizer!r}): noise {part.noise!r} must be a number from 0 to 1")


def _masked(part: Masked, sequencer: Sequencer) -> Segment:
    name = part.tokenizer
    varies = sequencer.vocabulary.layout(name).variable_length
    if part.known_N.shape != part.codes.ids_N.shape or part.known_N.dtype != torch.bool:
        raise ValueError(f"Masked({name!r}): known_N must be bool, one for each of {len(part.codes)} codes")
    if part.max_new_units < 0 or (part.max_new_units and not varies):
        raise ValueError(f"Masked({name!r}): max_new_units {part.max_new_units} must be 0, or more where length varies")
    segment = sequencer.given(name, _checked(name, part.codes, sequencer), max(1, part.max_new_units))
    known_N = torch.full_like(segment.known_N, not part.max_new_units)
    known_N[: len(part.codes)] = part.known_N
    return replace(segment, known_N=known_N)


def _checked(name: str, codes: Codes, sequencer: Sequencer) -> Codes:
    """Codes as they are; `ValueError` unless they stand where those of their size do, within their codebooks."""
    canvas = sequencer.canvas(name, codes.size)
    same = torch.equal(codes.levels_N, canvas.levels_N) and torch.equal(codes.coords_N3, canvas.coords_N3)
    if not same or codes.ids_N.shape != canvas.ids_N.shape:
        raise ValueError(f"Codes of {name!r} do not lie on its canvas of size {codes.size}.")
    sequencer.vocabulary.to_shared(name, codes.ids_N, codes.levels_N)
    return codes
