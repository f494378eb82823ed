"""Checkpoints of sharded trainings: a folder that every process wrote its shards into.

    meta.pt         what is no tensor of the model or the optimizer, as Lightning has it in a file
    .metadata       where each tensor is; of torch.distributed.checkpoint
    __R_0.distcp    the shards of process R

Any number of processes may read it. torch unpickles `.metadata` as it finds it, which could run code. Here nothing but
the classes that describe tensors are unpickled.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from multidiff import files

META = "meta.pt"
WEIGHTS = ("state_dict", "current_model_state")  # what is used as the model; the live ones where that is averaged
Tensors = Mapping[str, Any]  # a tree of mappings, with tensors at its leaves


def is_sharded(path: Path) -> bool:
    """Whether `path` is a checkpoint of a sharded training."""
    return os.path.isfile(path / META)  # unlike pathlib's, it never raises


def read_meta(path: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds beside tensors.

    Raises:
        ValueError: a file is missing or damaged, or holds what is not allowed; the message names it.
    """
    for name in (META, ".metadata"):
        files.check_file(path / name)
    try:
        return torch.load(path / META, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged files raises errors of a dozen types
        raise ValueError(f"{path / META} is damaged ({files.first_line(error)})") from None


def shapes(path: Path, key: str) -> dict[str, torch.Size]:
    """The shapes of the tensors that a sharded checkpoint holds under `key`, by name; empty if there are none.

    Raises:
        ValueError: `.metadata` is damaged, or holds what is not allowed.
    """
    return {name: entry.size for name, entry in _entries(path, key).items()}


def read_into(path: Path, tensors: Tensors) -> None:
    """Read tensors of a sharded checkpoint into existing ones. All processes of a training call this together.

    Args:
        path: the checkpoint.
        tensors: a tree whose names in the checkpoint are joined by dots. A `DTensor` takes its own shards.

    Raises:
        ValueError: a tensor is missing or has another shape, or a file is damaged.
    """
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(dict(tensors), storage_reader=_Reader(path), no_dist=alone)
    except (CheckpointException, RuntimeError, OSError, KeyError, AssertionError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({_reason(error)})") from None


def read_whole(path: Path, key: str) -> dict[str, Tensor]:
    """All tensors that a sharded checkpoint holds under `key`, whole and on the CPU.

    Raises:
        ValueError: there are none, or a file is damaged.
    """
    entries = _entries(path, key)
    if not entries:
        raise ValueError(f"{path} holds no {key}")
    try:
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged, or larger than the memory ({files.first_line(error)})") from None
    read_into(path, {key: tensors})
    return tensors


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A sharded checkpoint as Lightning has it in a file, with whole tensors on the CPU.

    Raises:
        ValueError: a file is missing or damaged.
    """
    checkpoint = read_meta(path)
    for key in WEIGHTS:
        if shapes(path, key):
            checkpoint[key] = read_whole(path, key)
    for number, saved in enumerate(checkpoint.get("optimizer_states", ())):
        groups = saved["param_groups"]
        places = {name: place for place, name in enumerate(name for group in groups for name in group["params"])}
        saved["state"] = {}
        for name, tensor in read_whole(path, f"optimizer_{number}").items():
            weight, _, kind = name.rpartition(".")
            saved["state"].setdefault(places[weight], {})[kind] = tensor
        for group in groups:
            group["params"] = [places[name] for name in group["params"]]
    return checkpoint


def _entries(path: Path, key: str) -> dict[str, TensorStorageMetadata]:
    found = _Reader(path).read_metadata().state_dict_metadata
    prefix = f"{key}."
    return {
        name.removeprefix(prefix): entry
        for name, entry in found.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


class _Reader(FileSystemReader):
    """Reads tensors and nothing else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        place = Path(self.path) / ".metadata"
        try:
            with place.open("rb") as file:
                metadata = _Unpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError("it holds no metadata")
            for name, entry in metadata.state_dict_metadata.items():
                if not isinstance(entry, TensorStorageMetadata):  # its bytes would be unpickled
                    raise pickle.UnpicklingError(f"{name} is no tensor")
        except Exception as error:
            raise ValueError(f"{place} is damaged ({files.first_line(error)})") from None
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        described = module == "torch.distributed.checkpoint.metadata" and name in _DESCRIPTIONS
        known = described or (module, name) in _CLASSES or (module == "torch" and name in _DTYPES)
        if not known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


_DESCRIPTIONS = {
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
    *("BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
}
_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
}
_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def _reason(error: BaseException) -> str:
    """What went wrong in the first process where something did."""
    if isinstance(error, CheckpointException):
        return next((files.first_line(inner) for inner, _ in error.failures.values()), "unknown")
    return files.first_line(error)
