"""The files in a data folder that an autoencoder is trained on."""

from __future__ import annotations

from pathlib import Path

from multidiff.data.sources.folder import read_metadata


def paths_of(folder: Path, name: str, split: str) -> list[Path]:
    """The files of all segments `name` in a split, without duplicates.

    Raises:
        ValueError: there is none, or a segment is not a path; the message names `metadata.jsonl` and the line.
    """
    metadata = folder / "metadata.jsonl"
    paths: dict[Path, None] = {}
    for record in read_metadata(folder, [split]):
        for key, value in record.segments:
            if key != name:
                continue
            if not isinstance(value, str):
                raise ValueError(
                    f"{metadata}, line {record.line}: {name!r} must be the path of a file, not {value!r:.80}"
                )
            paths[folder / value] = None
    if not paths:
        raise ValueError(
            f"{metadata} has no {name!r} segment in split {split!r}. Set `name` to the key that your file uses."
        )
    return list(paths)
