"""A model out of a Lightning checkpoint, which holds all that it takes: weights, settings, the files of its tokenizers.

Written by `multidiff.training.MaskedDiffusionModule`. Reading needs no Lightning and runs no code from the file.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multidiff import files, plugins
from multidiff.checkpoints.folder import Parts, first_line, load_samplers, load_tokenizer, restore_transformer
from multidiff.sequence.seen import SeenDocuments
from multidiff.sequence.vocabulary import SharedVocabulary
from multidiff.tokenizer import ModalityTokenizer

KEY = "multidiff"  # of what the module adds to a checkpoint


def load_checkpoint(path: Path) -> Parts:
    """The parts of a model from a Lightning checkpoint: averaged weights where training averaged them.

    Raises:
        ValueError: no checkpoint of `multidiff.training.MaskedDiffusionModule`, or a damaged one.
    """
    files.check_file(path)
    try:
        # Memory-mapped: optimizer states are not read.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        saved = checkpoint[KEY]
        recipe = [dict(saved[part]) for part in ("vocabulary", "tokenizers", "transformer", "samplers")]
        documents = saved["documents"]
        weights = dict(checkpoint["state_dict"])
    except Exception as error:
        raise ValueError(
            f"{path} is damaged, or is not a checkpoint of a multidiff model ({first_line(error)})"
        ) from None
    layout, packed, config, settings = recipe
    vocabulary = SharedVocabulary.from_dict(layout, str(path))
    tokenizers = unpack(packed, vocabulary, str(path))
    SharedVocabulary.of(tokenizers).check(vocabulary, str(path))
    prefix = "transformer."
    weights = {str(name)[len(prefix) :]: weight for name, weight in weights.items() if str(name).startswith(prefix)}
    transformer = restore_transformer({**config, "vocabulary_rows": vocabulary.rows}, str(path), weights, str(path))
    files.check_finite(transformer.state_dict(), str(path))
    # The file is mapped, and what it holds changes with it.
    transformer.load_state_dict(
        {name: weight.clone() for name, weight in transformer.state_dict().items()}, assign=True
    )
    seen = None if documents is None else SeenDocuments.from_dict(documents, str(path))
    return transformer, vocabulary, tokenizers, load_samplers(settings, vocabulary, str(path)), seen


def check_checkpoint(path: str | Path) -> None:
    """Raise a `ValueError` unless a training can go on from `path`, as `--ckpt_path` gives it, for all that can be told
    without reading its tensors. Lightning's own words ("last", "best" …) and addresses pass."""
    if str(path) in ("last", "best", "hpc") or str(path).startswith("registry") or "://" in str(path):
        return
    path = Path(path)
    if (path / "meta.pt").is_file():  # Lightning's checkpoint of a sharded model is a folder
        return
    if path.is_dir():
        if (path / "model_index.json").exists():
            raise ValueError(
                f"{path} is a saved model, which holds no state of a training; give --ckpt_path a .ckpt file"
            )
        inside = [file for file in (*path.glob("*.ckpt"), *path.glob("*/*.ckpt")) if file.is_file()]
        inside.sort(key=lambda file: file.stat().st_mtime)
        hint = f"a file, for instance {inside[-1]}" if inside else "a .ckpt file; there is none in it"
        raise ValueError(f"{path} is a folder; give --ckpt_path {hint}")
    files.check_file(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated, damaged or no checkpoint; give --ckpt_path an earlier one")


def pack(tokenizers: Mapping[str, ModalityTokenizer]) -> dict[str, dict[str, Tensor]]:
    """The saved files of tokenizers, for a checkpoint that needs no other file: uint8 tensors by tokenizer and path."""
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tokenizer in tokenizers.items():
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder))
            packed[name] = {
                str(file.relative_to(folder)): torch.from_numpy(np.fromfile(file, dtype=np.uint8))
                for file in sorted(Path(folder).rglob("*"))
                if file.is_file()
            }
    return packed


def unpack(packed: Mapping[str, Any], vocabulary: SharedVocabulary, where: str) -> dict[str, ModalityTokenizer]:
    """The tokenizers that `pack` took; `ValueError` naming `where` if they are damaged."""
    tokenizers = {}
    for name, layout in vocabulary.tokenizers.items():
        if layout.plugin is None or name not in packed:
            raise ValueError(f"{where} does not hold tokenizer {name!r}")
        try:
            tokenizer_class = plugins.load(layout.plugin)
            with tempfile.TemporaryDirectory() as folder:
                _write(packed[name], Path(folder).resolve())
                tokenizers[name] = load_tokenizer(tokenizer_class, Path(folder))
        except ImportError:
            raise
        except Exception as error:
            raise ValueError(f"{where}: its tokenizer {name!r} cannot be read ({first_line(error)})") from error
    return tokenizers


def _write(packed: Mapping[str, Tensor], folder: Path) -> None:
    for relative, content in packed.items():
        file = (folder / relative).resolve()
        if not file.is_relative_to(folder):
            raise ValueError(f"{relative!r} lies outside of its folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.numpy().tobytes())
