"""Metrics of reconstruction: how close an item is that was encoded and decoded to its original.

The metrics of pictures and sounds come from torchmetrics, in the extra `evaluate`. Nothing is downloaded here.

Shape suffixes: C channels, H rows, W columns, T samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from multidiff.tokenizer import Audio

# torchvision's networks that LPIPS can use, and the files of their weights.
BACKBONES: dict[Literal["alex", "vgg", "squeeze"], str] = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def text_fidelity(originals: Sequence[str], restored: Sequence[str]) -> float:
    """The share of texts that come back unchanged, from 0 to 1."""
    return sum(one == other for one, other in zip(originals, restored, strict=True)) / max(1, len(originals))


def picture_fidelity(original: Image.Image, restored: Image.Image) -> dict[str, float]:
    """PSNR in dB, SSIM, and LPIPS if the weights of one of its networks are in torch's hub folder.

    The original is put on white where it is transparent, and converted to the mode of the restored picture.

    Returns:
        "PSNR, dB" and "SSIM" (higher is better), "LPIPS, <network>" (lower is better; Zhang et al. 2018).

    Raises:
        ImportError: torchmetrics is missing.
    """
    with _extra():
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    from torchvision.transforms.functional import pil_to_tensor

    if original.has_transparency_data:
        original = Image.alpha_composite(Image.new("RGBA", original.size, "white"), original.convert("RGBA"))
    one_1CHW, other_1CHW = (
        pil_to_tensor(picture.convert(restored.mode)).float()[None] / 255 for picture in (original, restored)
    )
    scores: dict[str, float] = {}
    if found := _backbone(Path(torch.hub.get_dir()) / "checkpoints"):
        network, measure = found
        pair = (picture.expand(1, 3, -1, -1) for picture in (other_1CHW, one_1CHW))
        scores[f"LPIPS, {network}"] = float(measure(*pair))
    scores["PSNR, dB"] = float(peak_signal_noise_ratio(other_1CHW, one_1CHW, data_range=1.0))
    similarity: Any = structural_similarity_index_measure(other_1CHW, one_1CHW, data_range=1.0)
    return {**scores, "SSIM": float(similarity)}


def align_sounds(original: Audio, restored: Audio) -> tuple[Tensor, Tensor]:
    """Two sounds as one channel each, at the restored sound's sample rate and with the original's length.

    Returns:
        original_T and restored_T, float32.
    """
    from torchaudio.functional import resample

    original_T = resample(original.waveform.mean(0), original.sample_rate, restored.sample_rate)
    restored_T = restored.waveform.mean(0)[: len(original_T)]
    return original_T, torch.nn.functional.pad(restored_T, (0, len(original_T) - len(restored_T)))


def speech_fidelity(original_T: Tensor, restored_T: Tensor, sample_rate: int) -> dict[str, float]:
    """Intelligibility and quality of restored speech, as far as the packages for them are installed.

    Args:
        original_T, restored_T: two aligned sounds.
        sample_rate: in Hz.

    Returns:
        "STOI" if pystoi is installed, and "PESQ" if pesq is installed and the rate is 8 or 16 kHz. Higher is better.

    Raises:
        ImportError: torchmetrics is missing.
    """
    scores: dict[str, float] = {}
    if find_spec("pystoi"):
        with _extra():
            from torchmetrics.functional.audio.stoi import short_time_objective_intelligibility
        scores["STOI"] = float(short_time_objective_intelligibility(restored_T, original_T, sample_rate))
    if find_spec("pesq") and sample_rate in (8_000, 16_000):
        with _extra():
            from torchmetrics.functional.audio.pesq import perceptual_evaluation_speech_quality
        mode = "nb" if sample_rate == 8_000 else "wb"
        scores["PESQ"] = float(perceptual_evaluation_speech_quality(restored_T, original_T, sample_rate, mode))
    return scores


@cache
def _backbone(checkpoints: Path) -> tuple[str, Any] | None:
    """LPIPS with the first network whose weights torchvision has already downloaded."""
    with _extra():
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    for network, file in BACKBONES.items():
        if (checkpoints / file).is_file():
            return network, LearnedPerceptualImagePatchSimilarity(network, normalize=True)
    return None


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError('These metrics need torchmetrics: pip install "masked-multidiff[evaluate]"') from error
