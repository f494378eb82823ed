"""Data folders of texts, and tables."""

import csv
import json

from multidiff.data import DocumentDataModule, Mixture, Source


def write(folder, *lines):
    folder.mkdir(exist_ok=True)
    content = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    (folder / "metadata.jsonl").write_bytes(content)
    return folder


def rows_of(*values, split="train"):
    return [json.dumps({"split": split, "segments": [{"text": value}]}) for value in values]


def data_of(folder, **options):
    source = folder if isinstance(folder, Source | Mixture) else str(folder)
    return DocumentDataModule(source, {"text": {"plugin": "bpe", "preset": "bytes"}}, **options)


def write_table(path, rows):
    """A CSV file of these rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
