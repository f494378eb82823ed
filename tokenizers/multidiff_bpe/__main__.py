"""Train a text tokenizer: `python -m multidiff_bpe --data FOLDER --vocab-size N --output FOLDER`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from multidiff.data.folder import read_metadata
from multidiff_bpe.bpe import BPETokenizer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m multidiff_bpe",
        description="Train a byte-level BPE tokenizer; use it as `{plugin: bpe, folder: OUTPUT}`.",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        required=True,
        metavar="PATH",
        help="data folders (with a metadata.jsonl; its train split is used) or UTF-8 text files",
    )
    parser.add_argument("--key", default="text", help="name of the text segments in metadata.jsonl (default: text)")
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="number of codes, the 256 bytes included"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where tokenizer.json goes")
    options = parser.parse_args(arguments)
    try:
        texts = [text for path in options.data for text in read_texts(path, options.key)]
        if not any(texts):
            raise ValueError(f"{', '.join(map(str, options.data))}: there is no text to train on")
        tokenizer = BPETokenizer.train(texts, options.vocab_size)
        tokenizer.save(options.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    characters = sum(map(len, texts))
    codes = sum(map(len, tokenizer.encode(texts)))
    print(
        f"{options.output / 'tokenizer.json'}: {tokenizer.codebook_sizes[0]} codes from {len(texts):,} texts, "
        f"{characters / max(1, codes):.2f} characters a code"
    )


def read_texts(path: Path, key: str) -> Iterator[str]:
    """The texts at `path`: a data folder's `key` segments of the train split, or the lines of a text file.

    Raises:
        ValueError: there is no text; names the file.
    """
    if path.is_dir():
        names = set()
        for record in read_metadata(path, ["train"]):
            for name, value in record.segments:
                names.add(name)
                if name == key:
                    if not isinstance(value, str):
                        raise ValueError(f"{path / 'metadata.jsonl'}, line {record.line}: {key!r} must be a string")
                    yield value
        if key not in names:
            raise ValueError(f"the train split of {path} has no {key!r}; choose a --key of: {', '.join(sorted(names))}")
        return
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}") from None


if __name__ == "__main__":
    main()
