"""A codec in a folder that transformers' `save_pretrained` wrote.

transformers fills missing tensors with random numbers and only warns: here every name and shape is compared. Reading
runs no code from the folder, uses no network and leaves the global random state alone.
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
# On their word transformers would fetch or import more.
_UNTRUSTED = ("attn_implementation", "_attn_implementation", "quantization_config")


def read_codec(folder: Path) -> tuple[Codec, dict[str, Any], dict[str, Tensor]]:
    """The codec in `folder`, float32, for inference, on the CPU; and the settings and tensors of its files.

    Raises:
        ValueError: a missing, damaged or pickled file, a model that is none of the three, of several channels, with
            scales or in chunks, or weights that do not match the configuration; names the file.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder: give one with {CONFIG} and {WEIGHTS} of a transformers codec; nothing is "
            "downloaded from here (`hf download NAME --local-dir FOLDER` does)"
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
    except Exception as error:  # whatever a wrong type or number runs into
        raise ValueError(
            f"{folder / CONFIG}: {model_class.__name__} cannot be built from it: {_line(error)}"
        ) from error
    _check_report(report, folder / WEIGHTS)
    _check_frames(codec, folder / CONFIG)
    return codec, settings, tensors


def _check_settings(settings: dict[str, Any], path: Path) -> None:
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in CODECS:
        raise ValueError(f"{path} describes a {kind!r:.80} model; those that are read here are {', '.join(CODECS)}")
    if settings.get("audio_channels", 1) != 1:
        raise ValueError(
            f"{path} describes a codec of {settings['audio_channels']!r:.80} channels; sound is mixed down to one, so "
            "use a mono model"
        )
    if settings.get("normalize"):
        raise ValueError(
            f"{path} describes a codec that normalizes: its codes come with continuous scales, which fit no "
            "vocabulary; use one that does not"
        )
    if settings.get("chunk_length_s") is not None:
        raise ValueError(f"{path}: chunk_length_s makes codes of overlapping chunks; use a model that has none")


def _check_size(model_class: Any, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a model that is built in more memory or parts than its file is for; transformers would go ahead."""
    if not 1 <= config.sampling_rate <= MOST_SAMPLE_RATE:
        raise ValueError(f"sampling_rate is {config.sampling_rate}; it must lie in 1 … {MOST_SAMPLE_RATE}")
    # EnCodec's follows from its rates and bandwidths.
    check_counts({"num_quantizers": getattr(config, "num_quantizers", 0)}, _COUNTS, len(tensors), Path(CONFIG))
    with torch.device("meta"):
        wanted = sum(tensor.numel() for tensor in model_class(config).state_dict().values())
    held = sum(tensor.numel() for tensor in tensors.values())
    if wanted > 2 * held + 1_000_000:  # statistics and masks that some files leave out are a small part
        raise ValueError(f"it describes a model of {wanted:,} numbers, and {WEIGHTS} beside it holds {held:,}")


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
    """Two frames of silence stay two frames: what the configuration says of rates and strides fits together."""
    try:
        ids_BKt = codec.encode(torch.zeros(1, 2 * codec.hop), codec.most)
        samples = codec.decode(ids_BKt).shape[-1]
    except Exception as error:
        raise ValueError(f"{path}: the model built from it does not run: {_line(error)}") from error
    if ids_BKt.shape != (1, codec.most, 2) or samples != 2 * codec.hop:
        raise ValueError(
            f"{path}: two frames of {codec.hop} samples become codes {list(ids_BKt.shape)} and {samples} samples; its "
            "ratios or frame rate are wrong"
        )


def _line(error: Exception) -> str:
    """What an error says, on one line."""
    return f"{' '.join(str(error).split()):.200}"


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no table of differing tensors: what is wrong is raised."""
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
