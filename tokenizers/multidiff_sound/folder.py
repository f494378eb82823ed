"""A codec's folder: `config.json` and `model.safetensors`. Reading runs no code from the files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a codec's JSON file; `ValueError` naming the file where there is none."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} does not exist; a codec's folder holds {CONFIG} and {WEIGHTS}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no JSON ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is no codec's configuration: expected a JSON object")
    return settings


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; `ValueError` naming the file where there is none, or a pickled one instead."""
    if not path.is_file():
        if pickled := sorted(path.parent.glob("*.bin")):
            raise ValueError(
                f"{pickled[0]} holds pickled weights, which can run code when they are read; "
                f"save the model as {WEIGHTS} (transformers' `save_pretrained` does)"
            )
        raise ValueError(f"{path} does not exist; a codec's folder holds {CONFIG} and {WEIGHTS}")
    try:
        return load(path.read_bytes())  # load_file would leave tensors in the file, to change when it does
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from None


def write_folder(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a codec; each file is whole or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    # save_file would keep it from other users; transformers opens no file that does not say its format
    _write(folder / WEIGHTS, save(dict(tensors), metadata={"format": "pt"}))
    write_json(folder / CONFIG, settings)


def write_json(path: Path, settings: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    _write(path, (json.dumps(settings, indent=2) + "\n").encode())


def fingerprint_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over settings, and names, shapes and values (as float32) of tensors on the CPU."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f"{path.name}.part")
    beside.write_bytes(content)
    os.replace(beside, path)
