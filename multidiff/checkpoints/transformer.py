"""Restores a transformer, and checks it first.

diffusers fills missing tensors with random numbers and only warns. Here names, shapes and number formats must match
exactly, and the configuration is compared with the weights before any memory is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multidiff import files
from multidiff.models.transformer import MaskedDiffusionTransformer
from multidiff.sequence.vocabulary import SharedVocabulary

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def build_transformer(config: Mapping[str, Any], where: str) -> MaskedDiffusionTransformer:
    """A transformer whose weights are not initialized.

    Args:
        config: the arguments of `MaskedDiffusionTransformer`.
        where: the file or configuration key that error messages name.

    Raises:
        ValueError: an unknown key or an invalid value.
    """
    known = MaskedDiffusionTransformer._get_init_keys(MaskedDiffusionTransformer) - {"self"}
    if unknown := config.keys() - known:
        raise ValueError(f"{where}: unknown transformer setting {', '.join(sorted(map(repr, unknown)))}")
    for name, value in config.items():
        kind, fits = KINDS[name]
        if not fits(value):
            raise ValueError(f"{where}: {name} must be {kind}, got {value!r}")
    try:
        return MaskedDiffusionTransformer(**config)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{where}: {files.first_line(error)}") from None


def load_transformer(folder: Path, vocabulary: SharedVocabulary) -> MaskedDiffusionTransformer:
    """The transformer of a model folder, from its `config.json` and safetensors files.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the others or the vocabulary.
    """
    path = folder / "config.json"
    config = files.read_json(path)
    if config.get("_class_name") != MaskedDiffusionTransformer.__name__:
        raise ValueError(
            f"{path}: _class_name must be {MaskedDiffusionTransformer.__name__!r}, got {config.get('_class_name')!r}"
        )
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    if missing := MaskedDiffusionTransformer._get_init_keys(MaskedDiffusionTransformer) - {"self"} - settings.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}. The file is incomplete.")
    if settings["vocabulary_rows"] != vocabulary.rows:
        raise ValueError(
            f"{path}: vocabulary_rows is {settings['vocabulary_rows']!r}, but the vocabulary has {vocabulary.rows} rows"
        )
    found = _weight_files(folder)
    weights: dict[str, Tensor] = {}
    for file in found:
        tensors = files.read_tensors(file)
        if twice := weights.keys() & tensors.keys():
            raise ValueError(f"{file} contains tensor {min(twice)}, which another file in the folder contains as well")
        weights |= tensors
    return restore_transformer(settings, str(path), weights, str(found[0] if len(found) == 1 else folder))


def restore_transformer(
    config: Mapping[str, Any], config_where: str, weights: Mapping[str, Any], where: str
) -> MaskedDiffusionTransformer:
    """The transformer of `config` with exactly these weights, in evaluation mode. It shares their memory.

    Args:
        config: the arguments of `MaskedDiffusionTransformer`.
        config_where: the file that error messages about the configuration name.
        weights: all tensors of its state dict.
        where: the file that error messages about the weights name.

    Raises:
        ValueError: names, shapes or number formats do not fit.
    """
    layers = {name.split(".")[1] for name in weights if str(name).startswith("layers.")}
    if _whole(number := config.get("num_layers", 1)) and number > len(layers):
        raise ValueError(f"{config_where}: num_layers is {number}, but the weights have {len(layers)} layers")
    # Even on the meta device the rotary tables are allocated, and `hidden_size` gives their length.
    embedding, size = weights.get("embed.weight"), config.get("hidden_size")
    if not isinstance(embedding, Tensor) or embedding.ndim != 2:
        raise ValueError(f"{where} lacks the matrix embed.weight. The file is incomplete or damaged.")
    if _whole(size) and size != embedding.shape[1]:
        raise ValueError(f"{config_where}: hidden_size is {size}, but the weights have {embedding.shape[1]}")
    with torch.device("meta"):
        transformer = build_transformer(config, config_where)
    expected = transformer.state_dict()
    if missing := expected.keys() - weights.keys():
        raise ValueError(f"{where} lacks {len(missing)} tensors, first {min(missing)}. The file is incomplete.")
    if unknown := weights.keys() - expected.keys():
        first = min(map(str, unknown))
        raise ValueError(
            f"{where} contains {len(unknown)} unknown tensors, first {first}. It belongs to another model."
        )
    for name, tensor in expected.items():
        if not isinstance(weights[name], Tensor) or weights[name].layout != torch.strided:
            raise ValueError(f"{where}: {name} is not a dense tensor. The file is damaged.")
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"{where}: {name} has shape {list(weights[name].shape)}, "
                f"but its configuration requires {list(tensor.shape)}"
            )
    formats = {weight.dtype for weight in weights.values()}
    if len(formats) != 1 or not formats <= set(FLOATS):
        said = ", ".join(sorted(map(str, formats)))
        raise ValueError(f"{where}: All tensors must share one floating-point format. Found {said}.")
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval()


def _weight_files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1 or (len(found) > 1 and not indexes):
        one, other = (path.name for path in (indexes or found)[:2])
        raise ValueError(f"{folder} contains weights of more than one model. Remove {one} or {other}.")
    if indexes:
        names = files.read_json(indexes[0]).get("weight_map")
        if not isinstance(names, dict) or not all(_is_name(name) for name in names.values()):
            raise ValueError(f"{indexes[0]} is damaged: its weight_map must name files of the same folder")
        found = [folder / name for name in sorted(set(names.values()))]
    if not found:
        raise ValueError(f"{folder} contains no .safetensors file. The model folder is incomplete.")
    return found


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


# What each setting of the transformer must be, in words and as a check.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("vocabulary_rows", "hidden_size", "num_layers", "num_heads"), ("a whole number above 0", _whole)),
    **dict.fromkeys(
        ("num_key_value_heads", "intermediate_size"),
        ("a whole number above 0, or null", lambda value: value is None or _whole(value)),
    ),
    **dict.fromkeys(
        ("coordinate_features", "time_input", "qk_norm", "attention_bias", "tie_embeddings"),
        ("true or false", lambda value: isinstance(value, bool)),
    ),
    "attention": ("full, causal or block_causal", lambda value: isinstance(value, str)),
    "block_length": (
        "a whole number above 0, 'segment' or null",
        lambda value: value is None or value == "segment" or _whole(value),
    ),
    "rope_theta": ("a number from 1 to 1e30", lambda value: _number(value, 1, 1e30)),
    "norm_epsilon": ("a number from 0 to 1", lambda value: _number(value, 0, 1)),
    "dropout": ("a number from 0 to 1", lambda value: _number(value, 0, 1)),
}
