"""Train a text tokenizer: `python -m multidiff_bpe --data PATH … --vocab-size N --output FOLDER`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from multidiff_bpe.bpe import BPETokenizer
from multidiff_bpe.corpus import read_texts

# The number of texts on which the printed compression is measured. A whole corpus would take as long as training.
MEASURED = 10_000


def main(arguments: list[str] | None = None) -> None:
    """Train a tokenizer on the texts that the command line names, and save it."""
    parser = argparse.ArgumentParser(
        prog="python -m multidiff_bpe",
        description="Train a lossless text tokenizer: byte-level BPE or characters. To use it, write "
        "{plugin: bpe, folder: FOLDER} in the configuration. Bytes need no training: {plugin: bpe}.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this help message and exit.")
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        required=True,
        metavar="PATH",
        help="Training texts: data folders (with a metadata.jsonl), datasets saved by Hugging Face's `save_to_disk`, "
        ".jsonl files, .parquet files, and UTF-8 text files with one text per line. Only the train split is used.",
    )
    parser.add_argument(
        "--key",
        default="text",
        help="Key of the text segments in metadata.jsonl, or name of the field or column (default: text).",
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--vocab-size", type=int, metavar="N", help="Number of BPE codes, including the 256 bytes.")
    kind.add_argument(
        "--preset",
        choices=["characters"],
        help="characters: one code for each character of the texts, and 256 codes to spell other characters in bytes.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="Folder for tokenizer.json.")
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
            raise ValueError(f"{', '.join(map(str, options.data))}: There is no text to train on.")
        tokenizer.save(options.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    codes = sum(map(len, tokenizer.encode(measured)))
    print(
        f"{options.output / 'tokenizer.json'}: {tokenizer.codebook_sizes[0]} codes from {texts:,} texts, "
        f"{sum(map(len, measured)) / max(1, codes):.2f} characters per code"
    )


if __name__ == "__main__":
    main()
