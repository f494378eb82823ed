"""Data folders of texts."""

import json

from multidiff.data import DocumentDataModule


def write(folder, *lines):
    folder.mkdir(exist_ok=True)
    content = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    (folder / "metadata.jsonl").write_bytes(content)
    return folder


def rows_of(*values, split="train"):
    return [json.dumps({"split": split, "segments": [{"text": value}]}) for value in values]


def data_of(folder, **options):
    return DocumentDataModule(str(folder), {"text": {"plugin": "bpe", "preset": "bytes"}}, **options)
