"""Reads and writes diffusers' `VQModel` in a folder: `config.json` and `diffusion_pytorch_model.safetensors`.

Every name and shape must match before anything is loaded. diffusers itself fills a missing tensor with random numbers
and only warns. Reading runs no code from the folder and does not change the global random state.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor

from multidiff.files import read_json, read_tensors, write_bytes, write_json
from multidiff_autoencoder.bounds import check_counts

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vq_model import VQModel

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"

# Names of attention weights in diffusers before 0.18.
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def read_model(folder: Path) -> VQModel:
    """The model in `folder`, in float32 on the CPU, for inference.

    Raises:
        ValueError: a file is missing, truncated or foreign, or the weights do not match the configuration; the message
            names the file.
    """
    from diffusers.models.autoencoders.vq_model import VQModel  # takes seconds, which listing the plugins should not

    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a folder with {CONFIG} and {WEIGHTS}")
    path = folder / CONFIG
    config = read_json(path)
    if config.get("_class_name") != "VQModel":
        raise ValueError(f"{path} describes a {config.get('_class_name', 'model without a class name')!s:.80}, "
                         "not a VQModel")  # fmt: skip
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := arguments.keys() - inspect.signature(VQModel.__init__).parameters.keys():
        raise ValueError(f"{path}: VQModel has no setting {', '.join(sorted(unknown)):.200}")
    tensors = {_new_name(name): tensor.float() for name, tensor in read_tensors(folder / WEIGHTS).items()}
    check_counts(arguments, ["layers_per_block"], len(tensors), path)
    try:
        with torch.device("meta"):  # spend no time or random numbers on weights that the file replaces
            model = VQModel(**arguments)
    except Exception as error:  # a wrong type or number can raise anything
        raise ValueError(f"{path}: VQModel cannot be built from it: {' '.join(str(error).split()):.200}") from error
    _check_shapes(tensors, model.state_dict(), folder / WEIGHTS)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def write_model(model: VQModel, folder: Path, half_precision: bool = False) -> None:
    """Write `model` as diffusers does, each file as a whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if half_precision:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    # `save_file` would make the file unreadable for other users.
    write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG, json.loads(model.to_json_string()))


def _check_shapes(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
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


def _new_name(name: str) -> str:
    if ".attentions." in name:
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
    return name
