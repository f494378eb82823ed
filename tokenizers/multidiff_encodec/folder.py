"""Reads and writes the folder of a codec, and reads codecs that transformers or Meta saved.

Every name and shape must match before anything is loaded. Reading runs no code from the files.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from encodec.model import EncodecModel
from torch import Tensor

from multidiff.files import check_finite
from multidiff_autoencoder.bounds import check_counts
from multidiff_encodec.model import PRESETS, CodecConfig, build_model, codebooks_of, mark_started
from multidiff_sound.folder import CONFIG, WEIGHTS, read_json, read_weights, write_folder

# Tensors that only the training of a codebook needs. They are not written, and are initialized if they are missing.
_STATISTICS = (".inited", ".cluster_size", ".embed_avg")

# Settings of transformers' EncodecConfig that the mono models of the encodec package fix,
_FIXED = {
    "chunk_length_s": None,
    "norm_type": "weight_norm",
    "kernel_size": 7,
    "last_kernel_size": 7,
    "residual_kernel_size": 3,
    "dilation_growth_rate": 2,
    "pad_mode": "reflect",
    "compress": 2,
    "trim_right_ratio": 1.0,
}
# and those that may differ, with the defaults of the 24 kHz model, which its files omit.
_NAMES = {
    "sample_rate": ("sampling_rate", 24_000),
    "ratios": ("upsampling_ratios", (8, 5, 4, 2)),
    "codebook_size": ("codebook_size", 1024),
    "dimension": ("hidden_size", 128),
    "encoder_filters": ("num_filters", 32),
    "decoder_filters": ("num_filters", 32),
    "residual_layers": ("num_residual_layers", 1),
    "lstm_layers": ("num_lstm_layers", 2),
    "causal": ("use_causal_conv", True),
    "convolved_skip": ("use_conv_shortcut", True),
}


def write_codec(
    model: EncodecModel,
    config: CodecConfig,
    folder: Path,
    half_precision: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a codec and settings of its tokenizer, each file as a whole."""
    tensors = inference_state(model)
    if half_precision:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    write_folder(folder, {**asdict(config), **(settings or {})}, tensors)


def inference_state(model: EncodecModel) -> dict[str, Tensor]:
    """The weights that encoding and decoding need, on the CPU, with the encodec package's names."""
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith(_STATISTICS)
    }


def read_codec(path: Path) -> tuple[EncodecModel, CodecConfig]:
    """Read a codec from a folder that `write_codec` or transformers wrote, or from Meta's 24 kHz checkpoint file.

    Raises:
        ValueError: a file is missing, truncated, of another model, or does not match its configuration; the message
            names it.
    """
    if path.is_file():
        config, file, state = PRESETS["meta-24khz"], path, _read_checkpoint(path)
        shapes = _shapes_of(config, path)
    else:
        file = path / WEIGHTS
        settings, state = read_json(path / CONFIG), read_weights(file)
        if "model_type" in settings:
            config = _config_of_transformers(settings, state, path / CONFIG)
        else:
            config = _config_of_ours(settings, path / CONFIG)
        check_counts(asdict(config), ["codebooks", "residual_layers", "lstm_layers"], len(state), path / CONFIG)
        shapes = _shapes_of(config, path / CONFIG)
        if "model_type" in settings:
            state = _renamed(state, shapes)
    _check(shapes, state, file)
    model = build_model(config)
    _load(model, state)
    return model, config


def keep_codebooks(model: EncodecModel, config: CodecConfig, count: int) -> CodecConfig:
    """Drop all levels of `model` except the first `count`. The codes of the kept levels do not change."""
    if not 1 <= count <= config.codebooks:
        raise ValueError(f"codebooks must be from 1 to {config.codebooks}, the number of these weights; got {count!r}")
    del model.quantizer.vq.layers[count:]
    model.quantizer.n_q = count
    return replace(config, codebooks=count)


def _shapes_of(config: CodecConfig, path: Path) -> dict[str, torch.Size]:
    """The shapes of the model's weights, without allocating memory for them."""
    try:
        with torch.device("meta"):
            return _shapes(build_model(config))
    except Exception as error:  # a number that is too large can raise anything
        raise ValueError(
            f"{path}: EncodecModel cannot be built from it: {' '.join(str(error).split()):.200}"
        ) from error


def _load(model: EncodecModel, state: Mapping[str, Tensor]) -> None:
    kept = {name: state[name].float() for name in _shapes(model)}
    model.load_state_dict(kept, strict=False)
    mark_started(model.quantizer)
    for book in codebooks_of(model.quantizer):
        book.count_V.fill_(1.0)
        book.sum_VD.copy_(book.codes_VD)


def _check(wanted: Mapping[str, torch.Size], state: Mapping[str, Tensor], file: Path) -> None:
    found = {name: tensor.shape for name, tensor in state.items() if not name.endswith(_STATISTICS)}
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected:
        examples = [f"no {name}" for name in missing[:2]] + [f"{name} unexpected" for name in unexpected[:2]]
        raise ValueError(
            f"{file} does not match its configuration: {len(missing)} tensors missing, {len(unexpected)} unexpected "
            f"({'; '.join(examples)})"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(f"{file}: {name} has shape {list(found[name])}, but the configuration needs {list(shape)}")


def _shapes(model: EncodecModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith(_STATISTICS)}


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a PyTorch checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} must contain tensors by name, like Meta's EnCodec 24 kHz checkpoint")
    check_finite(state, str(path))
    if "encoder.model.0.conv.norm.weight" in state:
        raise ValueError(f"{path} is the 48 kHz stereo EnCodec. {_RESCALES}")
    return state


_RESCALES = "Its codes come with continuous scales, which cannot be tokens. Use a mono model such as the 24 kHz one."


def _config_of_ours(settings: dict[str, Any], path: Path) -> CodecConfig:
    known = {field.name for field in fields(CodecConfig)}
    settings = {name: value for name, value in settings.items() if name != "max_seconds"}  # of the tokenizer
    if known != settings.keys():
        raise ValueError(
            f"{path} is not the configuration of a codec: missing {sorted(known - settings.keys())}, "
            f"unknown {sorted(settings.keys() - known)}"
        )
    try:
        return CodecConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _config_of_transformers(settings: dict[str, Any], state: dict[str, Tensor], path: Path) -> CodecConfig:
    if settings["model_type"] != "encodec":
        raise ValueError(f"{path}: model_type must be 'encodec', got {settings['model_type']!r:.80}")
    if settings.get("normalize") or settings.get("audio_channels", 1) != 1:
        raise ValueError(f"{path} describes an EnCodec such as the 48 kHz stereo one. {_RESCALES}")
    for name, value in _FIXED.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{path}: {name} must be {value!r}, as in the encodec package, got {settings[name]!r:.80}")
    values = {ours: settings.get(theirs, default) for ours, (theirs, default) in _NAMES.items()}
    codebooks = sum(name.startswith("quantizer.layers.") and name.endswith(".codebook.embed") for name in state)
    try:
        return CodecConfig(codebooks=codebooks, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _renamed(state: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of transformers' `EncodecModel`, with either kind of weight norm, with the encodec package's names."""
    ours = {_transformers_name(name): name for name in wanted}
    renamed = {}
    for name, tensor in state.items():
        older = name.replace("parametrizations.weight.original0", "weight_g")
        older = older.replace("parametrizations.weight.original1", "weight_v")
        renamed[ours.get(older, older)] = tensor
    return renamed


def _transformers_name(name: str) -> str:
    """The name in transformers' `EncodecModel` of a tensor of the encodec package's model."""
    for ours, theirs in (
        ("quantizer.vq.layers.", "quantizer.layers."),
        ("._codebook.", ".codebook."),
        ("coder.model.", "coder.layers."),
        (".convtr.convtr.", ".conv."),
        (".conv.conv.", ".conv."),
    ):
        name = name.replace(ours, theirs)
    return name
