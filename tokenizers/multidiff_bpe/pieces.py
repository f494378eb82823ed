"""The pieces of a `tokenizer.json`, and the conversion between text and pieces.

Shape suffixes: none; codes are lists of integers here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from multidiff.tokenizer import ItemError

# Bytes that UTF-8 never uses need no piece.
UTF8 = [byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5]
# The vocabulary entry for text without a piece. U+10FFFF will never be a character, so no text contains it.
UNKNOWN = "\U0010ffff" * 8
GAPS = 10_000_000  # maximum number of unused ids in a file
PROBES = ["seven", "a handwritten 7, or two"]


class Pieces:
    """The model of a `tokenizer.json` (BPE, Unigram, WordPiece or WordLevel) without its special tokens.

    The code of a piece is its rank among the ids of the file. The special tokens of the file and its unknown token have
    no code; text that spells them is split into ordinary pieces. Tokens that the file adds at the ends of a text,
    truncation and padding are left out as well. Normalizer, pre-tokenizer and decoder are those of the file.

    Args:
        content: the content of the file.
        source: the name of the file, for errors.

    Attributes:
        tokens: the piece of each code, as the file writes it.
        file_ids: the id of each code in the file.

    Raises:
        ValueError: the content is damaged, refers to tokens that it lacks, uses dropout, or garbles text; the message
            names `source`.
    """

    def __init__(self, content: str, source: str):
        self.content, self.source = content, source
        try:
            self._open()
        except (ValueError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exceptions, and its panics are BaseExceptions
            raise ValueError(
                f"{source} is damaged or not a Hugging Face tokenizer.json ({error}). To write one, use transformers' "
                "`AutoTokenizer.from_pretrained(…).save_pretrained(FOLDER)`."
            ) from None

    def _open(self) -> None:
        whole = Tokenizer.from_str(self.content)
        ids = whole.get_vocab(with_added_tokens=True)
        if fault := _fault_of_ids(ids):
            raise ValueError(f"{self.source} cannot be used: {fault}")
        state = json.loads(whole.to_str())
        hidden = {token["content"] for token in state["added_tokens"] if token["special"]} | {_unknown(state["model"])}
        ordinary = ids.keys() - hidden
        if fault := _fault(state, ids.keys(), ordinary):
            raise ValueError(f"{self.source} cannot be used: {fault}")
        self.tokens = sorted(ordinary, key=ids.__getitem__)
        self.file_ids = [ids[token] for token in self.tokens]

        self._tokenizer = Tokenizer.from_str(json.dumps(_without(state, hidden)))
        inner = self._tokenizer.get_vocab(with_added_tokens=True)
        self._ids = [inner[token] for token in self.tokens]
        self._codes = {index: code for code, index in enumerate(self._ids)}
        self._check([token["content"] for token in state["added_tokens"] if token["content"] not in hidden])

    def split(self, text: str) -> list[int]:
        """The codes of a text. Raises an `ItemError` that names a character without a code."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        try:
            return [self._codes[index] for index in encoding.ids]
        except KeyError as error:
            start, stop = encoding.offsets[encoding.ids.index(error.args[0])]
        # A word may be unknown because of one character, or because of its length.
        for index in range(start, min(stop, start + 100)):
            if not self._codes.keys() >= set(self._tokenizer.encode(text[index], add_special_tokens=False).ids):
                start, stop = index, index + 1
                break
        raise ItemError(
            f"text {text[:40]!r} has {text[start:stop][:40]!r} at character {start}, for which {self.source} has no "
            "code. Remove it, or use a tokenizer that falls back to bytes."
        )

    def join(self, codes: list[int]) -> str:
        """The text of codes. Codes of no text may give bytes that are not valid UTF-8; these become U+FFFD."""
        return self._tokenizer.decode([self._ids[code] for code in codes], skip_special_tokens=False)

    def stable(self, text: str) -> bool:
        """Whether a text has codes, and its decoded codes have the same codes."""
        try:
            codes = self.split(text)
            return self.split(self.join(codes)) == codes
        except ItemError:
            return False

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the pieces and everything that determines how text is split and joined."""
        state = json.loads(self._tokenizer.to_str())
        model = state["model"]
        decisive: list[Any] = [
            {token: code for code, token in enumerate(self.tokens)},
            model.get("merges"),
            state["pre_tokenizer"],
        ]
        # Included only if it differs from byte-level BPE, whose digest is older than the other models.
        more = {name: value for name, value in model.items() if value and name not in ("vocab", "merges", "unk_token")}
        more["scores"] = model["vocab"] if model["type"] == "Unigram" else None
        more |= {name: state[name] for name in ("normalizer", "decoder", "added_tokens")}
        usual = {"type": "BPE", "scores": None, "normalizer": None, "added_tokens": []}
        if (more["decoder"] or {}).get("type") == "ByteLevel":
            usual["decoder"] = more["decoder"]
        if more != usual:
            decisive.append(more)
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def _check(self, added: list[str]) -> None:
        """Raise a `ValueError` if ordinary text does not survive, for instance because there is no decoder."""
        for text in PROBES:
            try:
                back = self.join(self.split(text))
            except ItemError:  # another alphabet, such as bases or notes
                continue
            if not self.stable(text):
                raise ValueError(f"{self.source} does not read what it writes: {text!r} came back as {back!r}")
        for token in added:
            back = self.join([self.tokens.index(token)])
            if "\ufffd" in back and "\ufffd" not in token:
                raise ValueError(f"{self.source}: the added token {token!r} comes back as {back!r}")


def _unknown(model: dict[str, Any]) -> str | None:
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model["unk_token"] or None


def _fault_of_ids(ids: Mapping[str, int]) -> str | None:
    names = {index: token for token, index in ids.items()}
    if len(names) < len(ids):
        token = min(token for token, index in ids.items() if names[index] != token)
        return f"the tokens {token!r} and {names[ids[token]]!r} have the same id {ids[token]}"
    if names and max(names) > len(names) + GAPS:  # the library visits every id up to the largest
        return f"the token {names[max(names)]!r} has id {max(names)}, but there are only {len(names)} tokens"
    return None


def _fault(state: dict[str, Any], tokens: Set[str], ordinary: Set[str]) -> str | None:
    """The reason why a tokenizer that the library accepts would fail later, or None."""
    model, unknown = state["model"], _unknown(state["model"])
    if not ordinary:
        return "it has no tokens, or only special tokens"
    if model.get("dropout"):
        return "it uses dropout, which makes encoding random; set dropout to null"
    if unknown is not None and unknown not in tokens:
        return f"the unknown token {unknown!r} is not in the vocabulary"
    cutters = json.dumps([state["normalizer"], state["pre_tokenizer"]])
    if model.get("byte_fallback"):
        spelled = {byte: f"<0x{byte:02X}>" for byte in UTF8}
    elif model["type"] in ("BPE", "Unigram") and '"ByteLevel"' in cutters:
        spelled = {byte: spell_byte(byte) for byte in UTF8}
    else:
        return None
    if missing := [byte for byte in UTF8 if spelled[byte] not in ordinary]:
        first = f"{spelled[missing[0]]!r} for byte 0x{missing[0]:02X}"
        return f"the vocabulary lacks {len(missing)} of the {len(UTF8)} bytes of UTF-8 text, first {first}"
    return None


def spell_byte(byte: int) -> str:
    """The character that represents a byte in byte-level pieces: itself if visible, otherwise one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte if byte in visible else 0x100 + sum(other not in visible for other in range(byte)))


def _without(state: dict[str, Any], hidden: set[str | None]) -> dict[str, Any]:
    """The tokenizer without the `hidden` tokens, and with `UNKNOWN` as its unknown token and last id."""
    model = dict(state["model"])
    if model["type"] == "Unigram":
        kept = [piece for piece in model["vocab"] if piece[0] not in hidden]
        model.update(vocab=[*kept, [UNKNOWN, 0.0]], unk_id=len(kept))
    else:
        kept = sorted(model["vocab"].keys() - hidden, key=model["vocab"].__getitem__)
        model.update(vocab={token: index for index, token in enumerate([*kept, UNKNOWN])}, unk_token=UNKNOWN)
    if "merges" in model:
        cut = len(model["continuing_subword_prefix"] or "")
        model["merges"] = [(a, b) for a, b in model["merges"] if hidden.isdisjoint((a, b, a + b[cut:]))]
    added = [token for token in state["added_tokens"] if token["content"] not in hidden]
    unused = {"post_processor": None, "truncation": None, "padding": None}
    return {**state, **unused, "model": model, "added_tokens": added}
