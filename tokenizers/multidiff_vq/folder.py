"""A `VQModel` of diffusers in a folder: `config.json`, `diffusion_pytorch_model.safetensors`.

Every name and shape is compared before anything is loaded: diffusers itself fills a missing tensor with random numbers
and only warns. Reading runs no code from the folder and leaves the global random state alone.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"

# Attention weights as diffusers wrote them before 0.18.
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def read_model(folder: Path) -> VQModel:
    """The model in `folder`, float32, for inference, on the CPU.

    Raises:
        ValueError: a missing, truncated or foreign file, or weights that do not match the configuration; names it.
    """
    config = read_json(folder / CONFIG)
    if config.get("_class_name") != "VQModel":
        raise ValueError(f"{folder / CONFIG} describes a {config.get('_class_name', 'model without a class name')}, "
                         "not a VQModel")  # fmt: skip
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := arguments.keys() - inspect.signature(VQModel.__init__).parameters.keys():
        raise ValueError(f"{folder / CONFIG}: VQModel knows no {', '.join(sorted(unknown))}")
    try:
        with torch.device("meta"):  # neither time nor random numbers for weights that the file replaces
            model = VQModel(**arguments)
    except Exception as error:  # whatever a wrong type or number runs into
        raise ValueError(f"{folder / CONFIG}: VQModel cannot be built from it: {error}") from error
    model.load_state_dict(_read_weights(folder / WEIGHTS, model.state_dict()), assign=True)
    return model.eval().requires_grad_(False)


def write_model(model: VQModel, folder: Path, half_precision: bool = False) -> None:
    """Write `model` as diffusers does, in half precision if wanted; each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / (WEIGHTS + ".partial")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if half_precision:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    beside.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file would hide it from other users
    beside.replace(folder / WEIGHTS)
    write_json(json.loads(model.to_json_string()), folder / CONFIG)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError naming the file where there is none."""
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder: expected one with {CONFIG} and {WEIGHTS}")
    if not path.is_file():
        raise ValueError(f"{path} is missing: a VQModel's folder holds {CONFIG} and {WEIGHTS}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or not all of it is there ({error}); copy the folder again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a JSON object belongs")
    return content


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file, whole or not at all."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


def _read_weights(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: weights are read from safetensors in one file only")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not safetensors, or not all of it is there ({error}); copy it again") from None
    tensors = {_new_name(name): tensor for name, tensor in tensors.items()}
    differences = [
        *(f"{name} is missing" for name in wanted if name not in tensors),
        *(f"{name} is not expected" for name in tensors if name not in wanted),
        *(
            f"{name} is {list(tensors[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ),
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"{path} does not match {CONFIG} beside it: {'; '.join(differences[:3])}{more}")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _new_name(name: str) -> str:
    if ".attentions." in name:
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
    return name
