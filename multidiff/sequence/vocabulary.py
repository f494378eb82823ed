"""One vocabulary for all tokenizers: special tokens, then one contiguous span per tokenizer and level.

    <pad> <mask> <bos> | <text> </text> <image> </image> … | text | image | speech.0 | speech.1 | … padding to 64

`<pad>` and `<mask>` are inputs only. `<bos>` and each tokenizer's begin and end are structure: never noised, never
predicted. A tokenizer of variable length has one more code in each of its spans, its *EOS*, after its own codes:
it is predicted like them, and says where the content ends.

Shape suffix: N codes.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multidiff import files, plugins
from multidiff.tokenizer import ModalityTokenizer

PAD, MASK, BOS = 0, 1, 2
_ROWS = 64

Span = tuple[int, int]


@dataclass(frozen=True)
class TokenizerLayout:
    """What the vocabulary keeps of a tokenizer: all that decides which id means what."""

    plugin: str | None
    modality: str
    codebook_sizes: tuple[int, ...]
    variable_length: bool
    fingerprint: str


class SharedVocabulary:
    """Maps (tokenizer, level, local id) to shared ids and back.

    Args:
        tokenizers: layouts by tokenizer name; the order fixes the ids.

    Examples:
        A text tokenizer of 256 codes and an EOS, and pictures of 64 codes. Seven special tokens come first:

        >>> text = TokenizerLayout("bpe", "text", (256,), variable_length=True, fingerprint="0a")
        >>> image = TokenizerLayout("vq", "image", (64,), variable_length=False, fingerprint="0b")
        >>> vocabulary = SharedVocabulary({"text": text, "image": image})
        >>> vocabulary.span_names
        {'text': (7, 264), 'image': (264, 328)}
        >>> vocabulary.to_shared("image", torch.tensor([0, 63]), levels_N=torch.tensor([0, 0])).tolist()
        [264, 327]
    """

    def __init__(self, tokenizers: Mapping[str, TokenizerLayout]):
        if not tokenizers:
            raise ValueError("a vocabulary needs at least one tokenizer")
        for name in tokenizers:  # a name is a folder in a saved model, and a word on the command line
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or name in ("others", "label"):
                raise ValueError(
                    f"a tokenizer cannot be called {name!r}: letters, digits, - and _, and not others or label"
                )
        self.tokenizers = dict(tokenizers)
        self.begin_ids = {name: BOS + 1 + 2 * index for index, name in enumerate(self.tokenizers)}
        self.end_ids = {name: begin + 1 for name, begin in self.begin_ids.items()}
        self.spans: dict[str, tuple[Span, ...]] = {}
        start = BOS + 1 + 2 * len(self.tokenizers)
        for name, layout in self.tokenizers.items():
            spans = []
            for codes in layout.codebook_sizes:
                stop = start + codes + layout.variable_length
                spans.append((start, stop))
                start = stop
            self.spans[name] = tuple(spans)
        self.size = start
        self.rows = -(-start // _ROWS) * _ROWS

    @classmethod
    def of(cls, tokenizers: Mapping[str, ModalityTokenizer]) -> SharedVocabulary:
        """The vocabulary of live tokenizers. One whose class is no installed plugin may train, but not be saved."""
        layouts = {}
        for name, tokenizer in tokenizers.items():
            try:
                plugin = plugins.name_of(tokenizer)
            except ValueError:
                plugin = None
            layouts[name] = TokenizerLayout(
                plugin,
                tokenizer.modality,
                tuple(tokenizer.codebook_sizes),
                tokenizer.variable_length,
                tokenizer.fingerprint,
            )
        return cls(layouts)

    @cached_property
    def flat_spans(self) -> tuple[tuple[str, int, Span], ...]:
        """(tokenizer, level, span) of every span, in order of their ids. The place in it is the *span index*."""
        return tuple((name, level, span) for name, spans in self.spans.items() for level, span in enumerate(spans))

    @cached_property
    def span_edges(self) -> Tensor:
        """int64 [spans, 2]: the first shared id of every span and the one behind its last, in the order of
        `flat_spans`."""
        return torch.tensor([span for _, _, span in self.flat_spans])

    @cached_property
    def first_span(self) -> dict[str, int]:
        """Span index of each tokenizer's level 0."""
        first, index = {}, 0
        for name, spans in self.spans.items():
            first[name] = index
            index += len(spans)
        return first

    @property
    def span_names(self) -> dict[str, Span]:
        """Spans by the names people read: "text", "speech.0", "speech.1"."""
        return {
            name if len(self.spans[name]) == 1 else f"{name}.{level}": span for name, level, span in self.flat_spans
        }

    def layout(self, name: str) -> TokenizerLayout:
        """Layout of tokenizer `name`; `ValueError` that lists the known names, and the nearest, otherwise."""
        if name not in self.tokenizers:
            near = get_close_matches(str(name), self.tokenizers, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"no tokenizer is called {name!r}; this vocabulary has {', '.join(self.tokenizers)}{hint}")
        return self.tokenizers[name]

    def to_shared(self, name: str, local_N: Tensor, levels_N: Tensor) -> Tensor:
        """Shared ids of local ones; a level's EOS is its codebook's size.

        Raises:
            ValueError: an id outside its level's span.
        """
        starts_K, sizes_K = self._tables(name, local_N.device)
        if local_N.numel() and bool(((local_N < 0) | (local_N >= sizes_K[levels_N])).any()):
            raise ValueError(f"{name}: an id lies outside its codebook of {self.tokenizers[name].codebook_sizes}")
        return local_N + starts_K[levels_N]

    def to_local(self, name: str, shared_N: Tensor, levels_N: Tensor) -> Tensor:
        """Inverse of `to_shared`. Raises `ValueError` for an id of another span."""
        starts_K, sizes_K = self._tables(name, shared_N.device)
        local_N = shared_N - starts_K[levels_N]
        if local_N.numel() and bool(((local_N < 0) | (local_N >= sizes_K[levels_N])).any()):
            raise ValueError(f"a shared id lies outside the span of {name}")
        return local_N

    def eos_ids(self, name: str, levels_N: Tensor) -> Tensor:
        """Local id of the EOS at each of the given levels. `ValueError` for a tokenizer of fixed length."""
        if not self.tokenizers[name].variable_length:
            raise ValueError(f"{name} has a fixed length and no EOS")
        return torch.tensor(self.tokenizers[name].codebook_sizes, device=levels_N.device)[levels_N]

    def _tables(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        spans_K2 = torch.tensor(self.spans[name], device=device)
        return spans_K2[:, 0], spans_K2[:, 1] - spans_K2[:, 0]

    @property
    def fingerprint(self) -> str:
        """sha256 of the layout."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def check(self, other: SharedVocabulary, where: str) -> None:
        """Raises `ValueError` unless `other`, found at `where`, gives every id the same meaning.

        Two layouts of equal size are not enough: the message names what differs.
        """
        if list(self.tokenizers) != list(other.tokenizers):
            raise ValueError(
                f"{where} was made for tokenizers {', '.join(other.tokenizers)} in this order, "
                f"but here they are {', '.join(self.tokenizers)}"
            )
        for name, layout in self.tokenizers.items():
            theirs = asdict(other.tokenizers[name])
            for key, value in asdict(layout).items():
                if value != theirs[key]:
                    raise ValueError(
                        f"{where}: tokenizer {name!r} had {key} {_short(theirs[key])}, here it has {_short(value)}; "
                        f"use the tokenizer that the weights were trained with"
                    )

    def to_dict(self) -> dict[str, Any]:
        """The layout as plain values, for JSON and checkpoints."""
        layouts = {name: asdict(layout) for name, layout in self.tokenizers.items()}
        for layout in layouts.values():
            layout["codebook_sizes"] = list(layout["codebook_sizes"])
        spans = {name: list(span) for name, span in self.span_names.items()}
        return {"order": list(layouts), "tokenizers": layouts, "spans": spans}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> SharedVocabulary:
        """Inverse of `to_dict`. Raises `ValueError` naming `where` when the layout is damaged."""
        try:
            layouts = {name: _layout(data["tokenizers"][name]) for name in data["order"]}
            vocabulary = cls(layouts)
            spans = {key: tuple(span) for key, span in data["spans"].items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{where} is no vocabulary written by multidiff ({error})") from None
        if spans != vocabulary.span_names:
            raise ValueError(f"{where}: its spans do not follow from its tokenizers; the file was edited or is damaged")
        return vocabulary

    def save(self, folder: Path) -> None:
        """Write `vocabulary.json`."""
        files.write_json(folder / "vocabulary.json", self.to_dict())

    @classmethod
    def load(cls, folder: Path) -> SharedVocabulary:
        """Read `vocabulary.json`; `ValueError` when it is missing or damaged."""
        path = folder / "vocabulary.json"
        return cls.from_dict(files.read_json(path), str(path))


def _layout(entry: Mapping[str, Any]) -> TokenizerLayout:
    layout = TokenizerLayout(**{**entry, "codebook_sizes": tuple(entry["codebook_sizes"])})
    right = (
        isinstance(layout.plugin, str | None)
        and isinstance(layout.modality, str)
        and isinstance(layout.fingerprint, str)
        and isinstance(layout.variable_length, bool)
        and len(layout.codebook_sizes) > 0
        and all(type(size) is int and size > 0 for size in layout.codebook_sizes)
    )
    if not right:
        raise ValueError(f"{_short(entry)} describes no tokenizer")
    return layout


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 20 else reprlib.repr(value)
