"""The text tokenizer, on Hugging Face `tokenizers`: byte-level BPE of one's own, or what any `tokenizer.json` says.

Text becomes UTF-8 bytes; pairs of neighbours merge into longer pieces, most frequent first, never across a word.
All 256 bytes are in the vocabulary, so there is no unknown token and no string without codes. Byte-pair encoding:
Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016); on bytes: Radford et al.,
"Language Models are Unsupervised Multitask Learners" (2019), section 2.2. Characters that fall back to bytes:
Kudo and Richardson, "SentencePiece" (2018).

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

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # how the library spells the 256 bytes as characters
FILE = "tokenizer.json"
# A preview of a whole book would be no preview.
PREVIEW_COLUMNS, PREVIEW_LINES = 40, 30


class BPETokenizer(ModalityTokenizer):
    """Strings to codes and back.

    Without loss: what `train` and `train_characters` make, and byte-level files without a normalizer (GPT-2, Llama 3).
    Other files are taken as they are: text comes back from Qwen's with accents composed (NFC), from Llama 2's with
    spaces for `▁`, from BERT's in lower case and spaced anew. Text that a file has no codes for, which happens where it
    has neither bytes nor the character, is an `ItemError` that names the character, never an unknown token.

    Special tokens of a file (`<s>`, `[CLS]`, `<|im_end|>` …: all that `added_tokens` flags as `special`, and the
    unknown token) have no code: no text becomes one, and no model writes one. The others are numbered without gaps in
    the order of the file's ids; `file_ids` says which those are. `save` keeps the file unchanged.

    Args:
        file: a `tokenizer.json`, written by `python -m multidiff_bpe` or by Hugging Face's libraries: BPE, Unigram,
            WordPiece or WordLevel.
        preset: what to use in place of a file: "bytes", 256 codes, the bytes of UTF-8, which is also the default.
            The preset "characters" is made from texts: see `train_characters`.

    Attributes:
        file_ids: the file's id of each code: the rows of a pretrained embedding that belong to the codes.

    Raises:
        ValueError: the file is missing, damaged, lacks a token that it refers to, is random, or does not read what it
            writes; names it. An unknown preset, or one beside a file.
    """

    modality = "text"
    variable_length = True

    def __init__(self, file: str | None = None, preset: str | None = None):
        if file is not None and preset is not None:
            raise ValueError(f"file {file!r} and preset {preset!r} exclude each other; name one")
        if preset == "characters":
            raise ValueError(
                "the characters are those of your texts: `python -m multidiff_bpe --preset characters --data PATH "
                "--output FOLDER`, then name the folder in place of the preset"
            )
        if preset not in (None, "bytes"):
            raise ValueError(f"no preset is called {preset!r}; there are 'bytes' and 'characters'")
        self._use(_pieces(_byte_level()) if file is None else _read(Path(file)))

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
        tokenizer = _byte_level()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=BYTES, show_progress=False)
        tokenizer.train_from_iterator((valid(text) for text in texts), trainer)
        trained = cls()
        trained._use(_pieces(tokenizer))
        return trained

    @classmethod
    def train_characters(cls, texts: Iterable[str]) -> BPETokenizer:
        """A code for each character (code point) of `texts`, after 256 for the bytes that spell all others in UTF-8.

        Every string has codes, then: a character of the texts one, another as many as UTF-8 has bytes for it, 1 to 4.

        Raises:
            ItemError: a text is no valid Unicode.
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
        # One by one: `encode_batch` starts threads, and a data loader that forks after that is warned at each batch.
        return [self._codes(self._pieces.split(valid(item))) for item in items]

    def decode(self, codes: list[Codes]) -> list[str]:
        """Codes to text. Bytes that are no valid UTF-8, which only codes that no text has can give, become U+FFFD."""
        return [self._pieces.join(one.ids_N.tolist()) for one in codes]

    def canvas(self, tokens: int = 32) -> Codes:
        if tokens < 0:
            raise ValueError(f"a text of {tokens} tokens does not exist; the shortest has 0")
        return self._codes([0] * tokens)

    def read(self, value: Any, folder: Path) -> str:
        return valid(value)

    def write(self, item: str, stem: Path) -> Path:
        path = stem.with_name(stem.name + ".txt")
        files.write_bytes(path, valid(item).encode())
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
        """Of a few texts, the first pieces in a row one of them, those that have codes and come back with the same."""
        first = self._pieces.join(list(range(min(8, *self.codebook_sizes))))
        texts = ["", *PROBES, "  naïve\tΔίκη 你好 🙂\r\n\x00 e\u0301 \ufffd", first]
        return [text for text in texts if self._pieces.stable(text)]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the pieces and all that decides how text is cut into them and put together again."""
        return self._pieces.fingerprint

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
        raise ValueError(f"{path} is a folder; name the {FILE} in it")
    if not os.path.lexists(path):
        raise ValueError(f"{path} does not exist; train a tokenizer with `python -m multidiff_bpe`")
    return Pieces(files.read_text(path), str(path))


def valid(text: Any) -> str:
    """`text`, if it is some: a string that UTF-8 can hold; else `ItemError`."""
    if not isinstance(text, str):
        raise ItemError(f"text must be a string, not {repr(text)[:40]}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ItemError(
            f"text {text[:40]!r} holds half of a surrogate pair at character {error.start}, which no UTF-8 file can; "
            "mend it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None
    return text
