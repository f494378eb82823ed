"""Losses between an image and its reconstruction, and a discriminator that tells the two apart.

Shape suffixes: B pictures, C channels, H, W pixels or features down and across.
"""

from __future__ import annotations

import math
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

_SCALES = 3
_LAYERS = (3, 8, 15, 22)  # relu1_2, relu2_2, relu3_3, relu4_3 of VGG-16
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, on which the backbone was trained


def gradient_loss(restored_BCHW: Tensor, signal_BCHW: Tensor) -> Tensor:
    """The mean over scales 1, ½ and ¼ of |Δ∂/∂x| + |Δ∂/∂y|, where derivatives are differences of neighbouring pixels.

    It keeps edges in place (Mathieu et al. 2016, arXiv:1511.05440, eq. 6, at several scales).
    """
    parts = []
    error_BCHW = restored_BCHW - signal_BCHW
    for scale in range(_SCALES):
        if min(error_BCHW.shape[2:]) < 2:
            break
        across, down = error_BCHW.diff(dim=3).abs().mean(), error_BCHW.diff(dim=2).abs().mean()
        parts.append(across + down)
        if scale + 1 < _SCALES:
            error_BCHW = F.avg_pool2d(error_BCHW, 2)
    return torch.stack(parts).mean() if parts else error_BCHW.sum() * 0


class PerceptualLoss(nn.Module):
    """The mean over four layers of VGG-16 of |f(x̂)/‖f(x̂)‖ - f(x)/‖f(x)‖|².

    The features at each place are normalised over channels. This is LPIPS (Zhang et al. 2018, arXiv:1801.03924, eq. 1)
    without its learned weights. Greyscale is repeated to RGB.

    Args:
        backbone: a file with torchvision's VGG-16 weights: `.safetensors`, or the `.pth` file that torchvision
            publishes. Nothing is downloaded.

    Raises:
        ValueError: the file is missing, or contains something else; the message names it.
    """

    mean_C11: Tensor
    deviation_C11: Tensor

    def __init__(self, backbone: str):
        super().__init__()
        with torch.device("meta"):
            layers = list(make_layers(cfgs["D"], batch_norm=False))[: _LAYERS[-1] + 1]
        self.features = nn.ModuleList(layers)
        tensors = _read_backbone(Path(backbone), self.features.state_dict())
        for name, tensor in tensors.items():  # as buffers that checkpoints omit, because the file has them
            place, kind = name.split(".")
            delattr(layers[int(place)], kind)
            layers[int(place)].register_buffer(kind, tensor, persistent=False)
        self.register_buffer("mean_C11", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation_C11", torch.tensor(_DEVIATION)[:, None, None], persistent=False)

    def forward(self, restored_BCHW: Tensor, signal_BCHW: Tensor) -> Tensor:
        both_BCHW = torch.cat([restored_BCHW, signal_BCHW]).expand(-1, 3, -1, -1)
        features_BCHW = ((both_BCHW + 1) / 2 - self.mean_C11) / self.deviation_C11
        parts = []
        for place, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d) and min(features_BCHW.shape[2:]) < 2:
                break
            features_BCHW = layer(features_BCHW)
            if place in _LAYERS:
                restored, signal = F.normalize(features_BCHW, dim=1, eps=1e-6).chunk(2)
                parts.append((restored - signal).square().sum(1).mean())
        return torch.stack(parts).mean()


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv:1611.07004): convolutions that score patches of an image.

    Args:
        channels: the channels of the images.
        width: the channels of the first layer. Each further layer doubles them, up to four times the width.
        layers: the number of layers that halve the image. With 1, 2 or 3 a score depends on 16, 34 or 70 pixels in
            each direction.
    """

    def __init__(self, channels: int, width: int = 32, layers: int = 2):
        super().__init__()
        widths = [width * min(2**layer, 4) for layer in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for layer, (narrow, wide) in enumerate(pairwise(widths), 1):
            stride = 2 if layer < layers else 1
            convolution = nn.Conv2d(narrow, wide, 4, stride, 1, bias=False)
            modules += [convolution, nn.GroupNorm(math.gcd(8, wide), wide), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, signal_BCHW: Tensor) -> Tensor:
        """Scores [B, 1, H', W'], which are high for patches that look real."""
        return self.layers(signal_BCHW)


def _read_backbone(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist. The perceptual loss needs a file with torchvision's VGG-16 weights.")
    try:
        tensors: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # also for code that the file would run
        raise ValueError(f"{path} contains more than tensors, and is not loaded") from error
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    found: dict[str, Tensor] = {}
    for name, tensor in wanted.items():
        loaded = tensors.get(f"features.{name}") if isinstance(tensors, dict) else None
        if not isinstance(loaded, Tensor) or loaded.shape != tensor.shape:
            shape = list(tensor.shape)
            raise ValueError(f"{path} is not torchvision's VGG-16: it lacks features.{name} of shape {shape}")
        found[name] = loaded.float()
    return found
