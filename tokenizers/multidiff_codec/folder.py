"""Reads a codec from a folder that transformers' `save_pretrained` wrote.

transformers fills missing tensors with random numbers and only warns. Here every name and shape must match. Reading
runs no code from the folder, uses no network and does not change the global random state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from multidiff_autoencoder.bounds import MOST_SAMPLE_RATE, check_counts
from multidiff_codec.models import CODECS, Codec
from multidiff_sound.folder import CONFIG, WEIGHTS, read_json, read_weights

_COUNTS = (
    "n_codebooks",
    "num_hidden_layers",
    "num_lstm_layers",
    "num_quantizers",
    "num_residual_layers",
    "num_semantic_quantizers",
)
# Because of these settings, transformers would download or import more.
_UNTRUSTED = ("attn_implementation", "_attn_implementation", "quantization_config")


def read_codec(folder: Path) -> tuple[Codec, dict[str, Any], dict[str, Tensor]]:
    """The codec in `folder`, in float32 on the CPU, for inference; and the settings and tensors of its files.

    Raises:
        ValueError: a file is missing, damaged or pickled; the model is not one of the three, has several channels,
            rescales, or works in chunks; or the weights do not match the configuration. The message names the file.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder. Give a folder with the {CONFIG} and {WEIGHTS} of a transformers codec. Nothing "
            "is downloaded here; `hf download NAME --local-dir FOLDER` downloads a codec."
        )
    settings = read_json(folder / CONFIG)
    _check_settings(settings, folder / CONFIG)
    tensors = read_weights(folder / WEIGHTS)
    codec_class = CODECS[settings["model_type"]]
    model_class = codec_class.model_class
    trusted = {name: value for name, value in settings.items() if name not in _UNTRUSTED}
    check_counts(trusted, _COUNTS, len(tensors), folder / CONFIG)
    try:
        with torch.random.fork_rng(devices=[]), _quiet():
            config = model_class.config_class.from_dict(trusted)
            _check_size(model_class, config, tensors)
            model, report = model_class.from_pretrained(
                None, config=config, state_dict=dict(tensors), dtype=torch.float32, ignore_mismatched_sizes=True,
                output_loading_info=True,
            )  # fmt: skip
            codec = codec_class(model.eval().requires_grad_(False))
    except Exception as error:  # a wrong type or number can raise anything
        raise ValueError(
            f"{folder / CONFIG}: {model_class.__name__} cannot be built from it: {_line(error)}"
        ) from error
    _check_report(report, folder / WEIGHTS)
    _check_frames(codec, folder / CONFIG)
    return codec, settings, tensors


def _check_settings(settings: dict[str, Any], path: Path) -> None:
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in CODECS:
        raise ValueError(f"{path}: model_type must be one of {', '.join(CODECS)}, got {kind!r:.80}")
    if settings.get("audio_channels", 1) != 1:
        raise ValueError(
            f"{path} describes a codec with {settings['audio_channels']!r:.80} channels. Use a mono model; sound is "
            "mixed down to one channel."
        )
    if settings.get("normalize"):
        raise ValueError(
            f"{path} describes a codec that normalizes. Its codes come with continuous scales, which cannot be tokens. "
            "Use a codec that does not normalize."
        )
    if settings.get("chunk_length_s") is not None:
        raise ValueError(f"{path}: chunk_length_s is set, so chunks overlap. Use a model without chunks.")


def _check_size(model_class: Any, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` if the model would have more memory or parts than its file; transformers would build it."""
    if not 1 <= config.sampling_rate <= MOST_SAMPLE_RATE:
        raise ValueError(f"sampling_rate must be from 1 to {MOST_SAMPLE_RATE}, got {config.sampling_rate}")
    # EnCodec computes it from its rates and bandwidths.
    check_counts({"num_quantizers": getattr(config, "num_quantizers", 0)}, _COUNTS, len(tensors), Path(CONFIG))
    with torch.device("meta"):
        wanted = sum(tensor.numel() for tensor in model_class(config).state_dict().values())
    held = sum(tensor.numel() for tensor in tensors.values())
    if wanted > 2 * held + 1_000_000:  # some files omit statistics and masks, which are small
        raise ValueError(f"it describes a model of {wanted:,} numbers, but {WEIGHTS} beside it contains {held:,}")


def _check_report(report: dict[str, Any], path: Path) -> None:
    differences = [
        *(f"{name} is missing" for name in sorted(report["missing_keys"])),
        *(f"{name} is not expected" for name in sorted(report["unexpected_keys"])),
        *(f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in sorted(report["mismatched_keys"])),
        *map(str, report["error_msgs"]),
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"{path} does not match {CONFIG} beside it: {'; '.join(differences[:3])}{more}")


@torch.no_grad()
def _check_frames(codec: Codec, path: Path) -> None:
    """Check that the rates and strides of the configuration fit: two frames of silence must stay two frames."""
    try:
        ids_BKt = codec.encode(torch.zeros(1, 2 * codec.hop), codec.most)
        samples = codec.decode(ids_BKt).shape[-1]
    except Exception as error:
        raise ValueError(f"{path}: the model built from it does not run: {_line(error)}") from error
    if ids_BKt.shape != (1, codec.most, 2) or samples != 2 * codec.hop:
        raise ValueError(
            f"{path}: two frames of {codec.hop} samples become codes {list(ids_BKt.shape)} and {samples} samples. The "
            "ratios or the frame rate are wrong."
        )


def _line(error: Exception) -> str:
    """The message of an error on one line."""
    return f"{' '.join(str(error).split()):.200}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off transformers' progress bar and its table of differing tensors. Differences raise an error instead."""
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
