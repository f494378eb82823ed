"""The text tokenizer, built on Hugging Face's `tokenizers`: byte-level BPE, or any `tokenizer.json`.

Byte-level BPE splits text into UTF-8 bytes, and merges neighbours into longer pieces, the most frequent pairs first and
never across words. All 256 bytes are in the vocabulary, so every string has codes and there is no unknown token.
Byte-pair encoding: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016). On bytes:
Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.2. Characters that fall back to
bytes: Kudo and Richardson, "SentencePiece" (2018).

Shape suffixes: N codes of one text, 3 axes.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from multidiff import files
from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer
from multidiff_bpe.pieces import PROBES, Pieces

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # the characters by which the library writes the 256 bytes
FILE = "tokenizer.json"
# A preview shows only the beginning of a long text.
PREVIEW_COLUMNS, PREVIEW_LINES = 40, 30


class BPETokenizer(ModalityTokenizer):
    """Tokenizes strings.

    Tokenizers from `train` and `train_characters` are lossless, and so are byte-level files without a normalizer, such
    as GPT-2's and Llama 3's. Other files may change the text: Qwen's composes accents (NFC), Llama 2's replaces `▁` by
    spaces, BERT's lower-cases and changes the spacing. A character without a code, possible in a file without bytes,
    raises an `ItemError` that names it. There is never an unknown token.

    The special tokens of a file have no code, so no text contains them and no model writes them. These are the tokens
    that `added_tokens` flags as `special`, such as `<s>`, `[CLS]` and `<|im_end|>`, and the unknown token. The other
    tokens are numbered without gaps, in the order of their ids in the file. `save` keeps the file unchanged.

    Args:
        file: a `tokenizer.json` from `python -m multidiff_bpe` or from Hugging Face's libraries, with a BPE, Unigram,
            WordPiece or WordLevel model.
        preset: "bytes" uses the 256 bytes of UTF-8 in place of a file. This is also the default. The preset
            "characters" has to be trained: see `train_characters`.

    Attributes:
        file_ids: the id of each code in the file, which is its row in a pretrained embedding.

    Raises:
        ValueError: the file is missing or damaged, lacks a token that it refers to, uses dropout, or does not read what
            it writes; the message names it. Also for an unknown preset, or a preset together with a file.

    Examples:
        >>> tokenizer = BPETokenizer.train(["a seven", "a two", "a seven"], vocab_size=260)
        >>> (codes,) = tokenizer.encode(["a seven"])
        >>> codes.size, tokenizer.decode([codes])
        ({'tokens': 3}, ['a seven'])
    """

    modality = "text"
    variable_length = True

    def __init__(self, file: str | None = None, preset: str | None = None):
        if file is not None and preset is not None:
            raise ValueError(f"file {file!r} and preset {preset!r} exclude each other. Give only one.")
        if preset == "characters":
            raise ValueError(
                "The preset 'characters' has to be trained on your texts. Run `python -m multidiff_bpe --preset "
                "characters --data PATH --output FOLDER`, and give that folder in place of the preset."
            )
        if preset not in (None, "bytes"):
            raise ValueError(f"there is no preset {preset!r}; the presets are 'bytes' and 'characters'")
        self._use(_pieces(_byte_level()) if file is None else _read(Path(file)))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Train byte-level BPE. The same texts give the same tokenizer in every process.

        Args:
            texts: the training texts.
            vocab_size: the maximum number of codes, including the 256 bytes. Few texts may give fewer codes.

        Raises:
            ValueError: vocab_size is less than 256.
            ItemError: a text is not valid Unicode.
        """
        if vocab_size < len(BYTES):
            raise ValueError(f"vocab_size must be at least {len(BYTES)}, one code for each byte, got {vocab_size}")
        tokenizer = _byte_level()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=BYTES, show_progress=False)
        tokenizer.train_from_iterator((valid(text) for text in texts), trainer)
        trained = cls()
        trained._use(_pieces(tokenizer))
        return trained

    @classmethod
    def train_characters(cls, texts: Iterable[str]) -> BPETokenizer:
        """Train a character tokenizer: 256 codes for bytes, then one code for each character (code point) of `texts`.

        Every string has codes. A character of `texts` has one. Any other is spelled by the 1 to 4 bytes of its UTF-8.

        Raises:
            ItemError: a text is not valid Unicode.
        """
        characters = sorted(set().union(*map(valid, texts)))
        vocabulary = [*(f"<0x{byte:02X}>" for byte in range(256)), *characters]
        model = models.BPE(vocab={piece: code for code, piece in enumerate(vocabulary)}, merges=[], byte_fallback=True)
        tokenizer = Tokenizer(model)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        trained = cls()
        trained._use(_pieces(tokenizer))
        return trained

    def encode(self, items: list[str]) -> list[Codes]:
        # `encode_batch` starts threads, and a data loader that forks after that is warned at each batch.
        return [self._codes(self._pieces.split(valid(item))) for item in items]

    def decode(self, codes: list[Codes]) -> list[str]:
        """Decode texts. Codes of no text may give bytes that are not valid UTF-8; these become U+FFFD."""
        return [self._pieces.join(one.ids_N.tolist()) for one in codes]

    def canvas(self, tokens: int = 32) -> Codes:
        if tokens < 0:
            raise ValueError(f"a text cannot have {tokens} tokens; the smallest number is 0")
        return self._codes([0] * tokens)

    def read(self, value: Any, folder: Path) -> str:
        return valid(value)

    def write(self, item: str, stem: Path) -> Path:
        path = stem.with_name(stem.name + ".txt")
        files.write_bytes(path, valid(item).encode())
        return path

    def preview(self, item: str) -> Image.Image:
        """A picture of the text, with wrapped lines. Characters that Pillow's default font lacks appear as boxes."""
        lines = [part for line in item.splitlines() for part in textwrap.wrap(line, PREVIEW_COLUMNS)]
        if len(lines) > PREVIEW_LINES:
            lines[PREVIEW_LINES - 1 :] = ["…"]
        font, margin, words = ImageFont.load_default(16), 8, "\n".join(lines)
        _, _, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((margin, margin), words, font)
        picture = Image.new("RGB", (max(64, round(right) + margin), max(32, round(bottom) + margin)), "white")
        ImageDraw.Draw(picture).multiline_text((margin, margin), words, "black", font)
        return picture

    def examples(self) -> list[str]:
        """A few texts, among them one of the first pieces. Texts that the tokenizer changes are left out."""
        first = self._pieces.join(list(range(min(8, *self.codebook_sizes))))
        texts = ["", *PROBES, "  naïve\tΔίκη 你好 🙂\r\n\x00 e\u0301 \ufffd", first]
        return [text for text in texts if self._pieces.stable(text)]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the pieces and everything that determines how text is split and joined."""
        return self._pieces.fingerprint

    def dimensions(self, codes: Codes) -> tuple[float, str]:
        """Bytes of the text in UTF-8."""
        return len(self._pieces.join(codes.ids_N.tolist()).encode()), "byte"

    def save(self, folder: Path) -> None:
        files.write_bytes(folder / FILE, self._pieces.content.encode())

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(str(folder / FILE))

    def _use(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self.codebook_sizes = (len(pieces.tokens),)
        self.file_ids = pieces.file_ids

    def _codes(self, ids: list[int]) -> Codes:
        ids_N = torch.tensor(ids, dtype=torch.int64)
        coords_N3 = torch.arange(len(ids))[:, None].repeat(1, 3)
        return Codes(ids_N, torch.zeros_like(ids_N), coords_N3, {"tokens": len(ids)})


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pieces(tokenizer: Tokenizer) -> Pieces:
    return Pieces(tokenizer.to_str(pretty=True), "the tokenizer")


def _read(path: Path) -> Pieces:
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder. Give the {FILE} in it.")
    if not os.path.lexists(path):
        raise ValueError(f"{path} does not exist. Train a tokenizer with `python -m multidiff_bpe`.")
    return Pieces(files.read_text(path), str(path))


def valid(text: Any) -> str:
    """`text`, if it is a string that UTF-8 can represent. Raises an `ItemError` otherwise."""
    if not isinstance(text, str):
        raise ItemError(f"text must be a string, not {repr(text)[:40]}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ItemError(
            f"text {text[:40]!r} has half of a surrogate pair at character {error.start}, which UTF-8 cannot encode. "
            "Repair it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from None
    return text
