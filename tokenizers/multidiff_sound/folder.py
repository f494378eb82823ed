"""A codec's folder: `config.json` and `model.safetensors`. Reading runs no code from the files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from multidiff import files

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a codec's JSON file; `ValueError` naming the file where there is none."""
    _check_presence(path)
    return files.read_json(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; `ValueError` naming the file where there is none, or a pickled one instead."""
    if not path.exists() and (pickled := sorted(path.parent.glob("*.bin"))):
        raise ValueError(
            f"{pickled[0]} holds pickled weights, which can run code when they are read; "
            f"save the model as {WEIGHTS} (transformers' `save_pretrained` does)"
        )
    _check_presence(path)
    return files.read_tensors(path)


def write_folder(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a codec; each file is whole or absent. `ValueError` naming the file that cannot be written."""
    # transformers opens no file that does not say its format
    files.write_bytes(folder / WEIGHTS, save(dict(tensors), metadata={"format": "pt"}))
    files.write_json(folder / CONFIG, settings)


def fingerprint_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over settings, and names, shapes and values (as float32) of tensors on the CPU."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


def _check_presence(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path} is missing; a codec's folder holds {CONFIG} and {WEIGHTS}")
