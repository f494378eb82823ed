"""A model from a Lightning checkpoint, a file or the folder of a sharded training.

`multidiff.training.MaskedDiffusionModule` writes the weights, all settings and the files of the tokenizers into it, so
nothing else is needed. Reading it needs no Lightning and runs no code from it.
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
from multidiff.checkpoints.parts import ModelParts, load_processes, load_samplers, load_tokenizer
from multidiff.checkpoints.sharded import is_sharded, read_meta, read_whole
from multidiff.checkpoints.transformer import restore_transformer
from multidiff.sequence.seen import SeenDocuments
from multidiff.sequence.vocabulary import SharedVocabulary
from multidiff.tokenizer import ModalityTokenizer

KEY = "multidiff"  # the training module's own entry in a checkpoint


def load_checkpoint(path: Path) -> ModelParts:
    """The model in a Lightning checkpoint, with averaged weights if training averaged them.

    Args:
        path: a file, or the folder of a sharded training, whose weights are put together.

    Raises:
        ValueError: a file is damaged, or is not a checkpoint of `multidiff.training.MaskedDiffusionModule`.
    """
    sharded = is_sharded(path)
    if sharded:
        checkpoint = {**read_meta(path), "state_dict": read_whole(path, "state_dict")}
    else:
        checkpoint = read_file(path, mmap=True)
    try:
        saved = checkpoint[KEY]
        recipe = [dict(saved[part]) for part in ("vocabulary", "tokenizers", "transformer", "samplers")]
        documents, noise = saved["documents"], saved["processes"]
        weights = dict(checkpoint["state_dict"])
    except Exception as error:
        raise ValueError(_unlike(path, error)) from None
    layout, packed, config, settings = recipe
    vocabulary = SharedVocabulary.from_dict(layout, str(path))
    tokenizers = unpack(packed, vocabulary, str(path))
    SharedVocabulary.of(tokenizers).check(vocabulary, str(path))
    prefix = "transformer."
    weights = {str(name)[len(prefix) :]: weight for name, weight in weights.items() if str(name).startswith(prefix)}
    transformer = restore_transformer({**config, "vocabulary_rows": vocabulary.rows}, str(path), weights, str(path))
    files.check_finite(transformer.state_dict(), str(path))
    if not sharded:  # the tensors are still views of the mapped file, and would change with it
        transformer.load_state_dict(
            {name: weight.clone() for name, weight in transformer.state_dict().items()}, assign=True
        )
    seen = None if documents is None else SeenDocuments.from_dict(documents, str(path))
    processes = load_processes(noise, vocabulary, str(path))
    samplers = load_samplers(settings, vocabulary, processes, transformer.pattern, str(path))
    return ModelParts(transformer, vocabulary, tokenizers, samplers, processes, seen)


def read_file(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU.

    Args:
        mmap: leave the tensors on the disk until they are used. They change with the file.

    Raises:
        ValueError: the file is missing or damaged; the message names it.
    """
    files.check_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # unpickling damaged files raises errors of a dozen types
        raise ValueError(_unlike(path, error)) from None


def check_checkpoint(path: str | Path) -> None:
    """Check that training can resume from `path`, the value of `--ckpt_path`. No tensor is read.

    Lightning's own words ("last", "best", "hpc", "registry…") and URLs pass.

    Raises:
        ValueError: the path is missing, or is not a checkpoint.
    """
    if str(path) in ("last", "best", "hpc") or str(path).startswith("registry") or "://" in str(path):
        return
    path = Path(path)
    if is_sharded(path):
        files.check_file(path / ".metadata")
        return
    if path.is_dir():
        if (path / "model_index.json").exists():
            raise ValueError(
                f"{path} is a saved model, which contains no training state. Give --ckpt_path a .ckpt file."
            )
        inside = [file for file in (*path.glob("*.ckpt"), *path.glob("*/*.ckpt")) if file.is_file()]
        inside.sort(key=lambda file: file.stat().st_mtime)
        if inside:
            raise ValueError(f"{path} is a folder. Give --ckpt_path a file, for instance {inside[-1]}.")
        raise ValueError(f"{path} is a folder without .ckpt files. Give --ckpt_path a .ckpt file.")
    files.check_file(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated, damaged, or not a checkpoint. Give --ckpt_path an earlier checkpoint.")


def pack(tokenizers: Mapping[str, ModalityTokenizer]) -> dict[str, dict[str, Tensor]]:
    """The saved files of tokenizers as uint8 tensors, by tokenizer name and relative path."""
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
    """The tokenizers that `pack` packed.

    Raises:
        ValueError: they are damaged; the message names `where`.
        ImportError: a plugin needs a package that is missing.
    """
    tokenizers = {}
    for name, layout in vocabulary.tokenizers.items():
        if layout.plugin is None or name not in packed:
            raise ValueError(f"{where} does not contain tokenizer {name!r}")
        try:
            tokenizer_class = plugins.load(layout.plugin)
            with tempfile.TemporaryDirectory() as folder:
                _write(packed[name], Path(folder).resolve())
                tokenizers[name] = load_tokenizer(tokenizer_class, Path(folder))
        except ImportError:
            raise
        except Exception as error:
            raise ValueError(f"{where}: tokenizer {name!r} cannot be read ({files.first_line(error)})") from error
    return tokenizers


def _unlike(path: Path, error: BaseException) -> str:
    return f"{path} is damaged, or is not a checkpoint of a multidiff model ({files.first_line(error)})"


def _write(packed: Mapping[str, Tensor], folder: Path) -> None:
    for relative, content in packed.items():
        file = (folder / relative).resolve()
        if not file.is_relative_to(folder):
            raise ValueError(f"{relative!r} is outside of its folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.numpy().tobytes())
