"""The folder of a codec: `config.json` and `model.safetensors`. Reading runs no code from the files."""

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
    """The object in a codec's JSON file. Raises a `ValueError` that names the file if it is missing or damaged."""
    _check_presence(path)
    return files.read_json(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises a `ValueError` if it is missing, damaged, or pickled instead."""
    if not path.exists() and (pickled := sorted(path.parent.glob("*.bin"))):
        raise ValueError(
            f"{pickled[0]} contains pickled weights, which can run code when they are read. Save the model as "
            f"{WEIGHTS}, for instance with transformers' `save_pretrained`."
        )
    _check_presence(path)
    return files.read_tensors(path)


def write_folder(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a codec, each file as a whole. Raises a `ValueError` that names a file which cannot be written."""
    # transformers refuses a file that does not state its format.
    files.write_bytes(folder / WEIGHTS, save(dict(tensors), metadata={"format": "pt"}))
    files.write_json(folder / CONFIG, settings)


def fingerprint_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over settings, and over the names, shapes and values (as float32) of tensors on the CPU."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


def _check_presence(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path} is missing. The folder of a codec contains {CONFIG} and {WEIGHTS}.")
