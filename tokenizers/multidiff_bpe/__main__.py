"""Train a text tokenizer: `python -m multidiff_bpe --data PATH … --vocab-size N --output FOLDER`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from multidiff_bpe.bpe import BPETokenizer
from multidiff_bpe.corpus import read_texts

# Texts that the printed rate is measured on: all of a large corpus would take as long as training.
MEASURED = 10_000


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m multidiff_bpe",
        description="Train a text tokenizer that loses nothing, byte-level BPE or characters; use it as "
        "`{plugin: bpe, folder: OUTPUT}`. Bytes need no training: `{plugin: bpe}`.",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        required=True,
        metavar="PATH",
        help="data folders (with a metadata.jsonl) and datasets saved by Hugging Face's `save_to_disk`, of which the "
        "train split is used; .jsonl and .parquet files; any other file is UTF-8 text, each line a text",
    )
    parser.add_argument(
        "--key",
        default="text",
        help="name of the text segments in metadata.jsonl, of the field or column elsewhere (default: text)",
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--vocab-size", type=int, metavar="N", help="number of codes of BPE, the 256 bytes included")
    kind.add_argument(
        "--preset",
        choices=["characters"],
        help="characters: one code for each character of the texts; others are spelled in bytes, 256 further codes",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where tokenizer.json goes")
    options = parser.parse_args(arguments)
    texts = characters = 0
    measured: list[str] = []

    def corpus() -> Iterator[str]:
        nonlocal texts, characters
        for path in options.data:
            for text in read_texts(path, options.key):
                texts += 1
                characters += len(text)
                if len(measured) < MEASURED:
                    measured.append(text)
                yield text

    try:
        if options.preset:
            tokenizer = BPETokenizer.train_characters(corpus())
        else:
            tokenizer = BPETokenizer.train(corpus(), options.vocab_size)
        if not characters:
            raise ValueError(f"{', '.join(map(str, options.data))}: there is no text to train on")
        tokenizer.save(options.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    codes = sum(map(len, tokenizer.encode(measured)))
    print(
        f"{options.output / 'tokenizer.json'}: {tokenizer.codebook_sizes[0]} codes from {texts:,} texts, "
        f"{sum(map(len, measured)) / max(1, codes):.2f} characters a code"
    )


if __name__ == "__main__":
    main()
