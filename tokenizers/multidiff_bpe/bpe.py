"""The text tokenizer: byte-level BPE on Hugging Face `tokenizers`.

Text becomes UTF-8 bytes; pairs of neighbours merge into longer pieces, most frequent first, never across a word.
All 256 bytes are in the vocabulary, so there is no unknown token and no string without codes. Byte-pair encoding:
Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016); on bytes: Radford et al.,
"Language Models are Unsupervised Multitask Learners" (2019), section 2.2.

Shape suffixes: N codes of one text, 3 axes.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # how the library spells the 256 bytes as characters
FILE = "tokenizer.json"
# A preview of a whole book would be no preview.
PREVIEW_COLUMNS, PREVIEW_LINES = 40, 30


class BPETokenizer(ModalityTokenizer):
    """Strings to byte-level BPE codes and back, without loss.

    Args:
        file: a `tokenizer.json`, written by `python -m multidiff_bpe` or any other lossless byte-level BPE in Hugging
            Face's format. Without one a code is a byte, 256 in all.

    Raises:
        ValueError: the file is missing, damaged, or does not give every text back unchanged.
    """

    modality = "text"
    variable_length = True

    def __init__(self, file: str | None = None):
        self._use(_plain_bytes() if file is None else _read(Path(file)))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """The tokenizer of the most frequent pieces of `texts`; the same texts in any process give the same one.

        Args:
            vocab_size: how many codes there may be, the 256 bytes included; fewer when the texts hold no more pairs.

        Raises:
            ValueError: vocab_size < 256.
            ItemError: a text is no valid Unicode.
        """
        if vocab_size < len(BYTES):
            raise ValueError(f"vocab_size must be at least {len(BYTES)}, one for each byte, not {vocab_size}")
        tokenizer = _plain_bytes()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=BYTES, show_progress=False)
        tokenizer.train_from_iterator((_valid(text) for text in texts), trainer)
        trained = cls()
        trained._use(tokenizer)
        return trained

    def encode(self, items: list[str]) -> list[Codes]:
        # One by one: `encode_batch` starts threads, and a data loader that forks after that is warned at each batch.
        return [self._codes(self._tokenizer.encode(_valid(item), add_special_tokens=False).ids) for item in items]

    def decode(self, codes: list[Codes]) -> list[str]:
        """Codes to text. Bytes that are no valid UTF-8, which only codes that no text has can give, become U+FFFD."""
        return [self._tokenizer.decode(one.ids_N.tolist(), skip_special_tokens=False) for one in codes]

    def canvas(self, tokens: int = 32) -> Codes:
        if tokens < 0:
            raise ValueError(f"a text of {tokens} tokens does not exist; the shortest has 0")
        return self._codes([0] * tokens)

    def read(self, value: Any, folder: Path) -> str:
        return _valid(value)

    def write(self, item: str, stem: Path) -> Path:
        path = stem.with_name(stem.name + ".txt")
        _replace(path, _valid(item))
        return path

    def preview(self, item: str) -> Image.Image:
        """The words, wrapped; characters that Pillow's own font lacks show as boxes."""
        lines = [part for line in item.splitlines() for part in textwrap.wrap(line, PREVIEW_COLUMNS)]
        if len(lines) > PREVIEW_LINES:
            lines[PREVIEW_LINES - 1 :] = ["…"]
        font, margin, words = ImageFont.load_default(16), 8, "\n".join(lines)
        _, _, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((margin, margin), words, font)
        picture = Image.new("RGB", (max(64, round(right) + margin), max(32, round(bottom) + margin)), "white")
        ImageDraw.Draw(picture).multiline_text((margin, margin), words, "black", font)
        return picture

    def examples(self) -> list[str]:
        return ["", "seven", "a handwritten 7, or two", "  naïve\tΔίκη 你好 🙂\r\n\x00 e\u0301 \ufffd"]

    @property
    def fingerprint(self) -> str:
        state = json.loads(self._tokenizer.to_str())
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        decisive = [vocabulary, state["model"]["merges"], state["pre_tokenizer"]]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / FILE, self._tokenizer.to_str(pretty=True))

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(str(folder / FILE))

    def _use(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.codebook_sizes = (max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,)

    def _codes(self, ids: list[int]) -> Codes:
        ids_N = torch.tensor(ids, dtype=torch.int64)
        coords_N3 = torch.arange(len(ids))[:, None].repeat(1, 3)
        return Codes(ids_N, torch.zeros_like(ids_N), coords_N3, {"tokens": len(ids)})


def _plain_bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read(path: Path) -> Tokenizer:
    """A lossless byte-level BPE, or `ValueError` that says why it is none."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; train a tokenizer with `python -m multidiff_bpe`")
    try:
        content = path.read_text(encoding="utf-8")
        model = json.loads(content)["model"]
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exceptions
        reason = f"missing {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged or no tokenizer of Hugging Face's: {reason}") from None
    fault = None
    if model.get("type") != "BPE":
        fault = f"its model is {model.get('type')}, not BPE"
    elif model.get("unk_token") is not None:
        fault = f"it has an unknown token, {model['unk_token']!r}"
    elif missing := set(BYTES) - model["vocab"].keys():
        fault = f"its vocabulary lacks {len(missing)} of the 256 bytes"
    elif model.get("dropout"):
        fault = "its merges drop out at random"
    if fault:
        raise ValueError(f"{path} is no byte-level BPE that fits: {fault}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # What else can lose text (normalizers, prefix spaces, splits that remove, added tokens that strip) shows here.
    probe = "a  b " + "".join(map(chr, range(0x300))) + "e\u0301 \ufb01 \u212b 你 🙂 \r\n"
    for text in [probe, *(f" x {token.content} y " for token in tokenizer.get_added_tokens_decoder().values())]:
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        if back != text:
            at = next(i for i, (a, b) in enumerate(zip_longest(text, back)) if a != b)
            raise ValueError(f"{path} changes text: {text[at : at + 8]!r} came back as {back[at : at + 8]!r}")
    return tokenizer


def _valid(text: Any) -> str:
    if not isinstance(text, str):
        raise ItemError(f"text must be a string, not {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ItemError(
            f"text {text[:40]!r} holds half of a surrogate pair at character {error.start}, which no UTF-8 file can"
        ) from None
    return text


def _replace(path: Path, content: str) -> None:
    """Write beside, then rename: what lies at `path` is whole at any time."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content.encode())
    part.replace(path)
