"""One interface for the neural audio codecs of transformers.

EnCodec: Défossez et al. 2022, "High Fidelity Neural Audio Compression" (arXiv:2210.13438). DAC: Kumar et al. 2023,
"High-Fidelity Audio Compression with Improved RVQGAN" (arXiv:2306.06546). Mimi: Défossez et al. 2024, "Moshi: a
speech-text foundation model for real-time dialogue" (arXiv:2410.00037).

Shape suffixes: B sounds, T samples, t frames, K levels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DacModel, EncodecModel, MimiModel
from transformers.models.mimi.modeling_mimi import MimiEuclideanCodebook


class Codec(nn.Module, ABC):
    """A mono codec.

    Args:
        model: an instance of `model_class`, in evaluation mode.

    Attributes:
        hop: samples per frame.
        fewest, most: the smallest and largest number of levels that can be used.
    """

    model_class: ClassVar[Any]
    hop: int
    most: int
    fewest: int = 1

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    @abstractmethod
    def encode(self, waves_BT: Tensor, levels: int) -> Tensor:
        """Encode samples of whole frames as the ids of the first `levels` levels, [B, K, t]."""

    @abstractmethod
    def decode(self, ids_BKt: Tensor) -> Tensor:
        """Decode the ids of the first K levels to samples [B, t · hop]."""


class Encodec(Codec):
    """EnCodec. Any number of levels works here; transformers' `encode` takes only those of the trained bandwidths."""

    model_class = EncodecModel

    def __init__(self, model: EncodecModel):
        super().__init__(model)
        self.hop = math.prod(model.config.upsampling_ratios)
        self.most = len(model.quantizer.layers)

    def encode(self, waves_BT: Tensor, levels: int) -> Tensor:
        latents_BDt = self.model.encoder(waves_BT[:, None])
        return self.model.quantizer.encode(latents_BDt).transpose(0, 1)[:, :levels]

    def decode(self, ids_BKt: Tensor) -> Tensor:
        return self.model.decode(ids_BKt[None], [None], return_dict=True).audio_values[:, 0]


class Dac(Codec):
    """DAC. With odd strides its decoder gives up to a frame less than t · hop samples, and silence is appended."""

    model_class = DacModel

    def __init__(self, model: DacModel):
        super().__init__(model)
        self.hop = math.prod(model.config.downsampling_ratios)
        self.most = len(model.quantizer.quantizers)

    def encode(self, waves_BT: Tensor, levels: int) -> Tensor:
        return self.model.encode(waves_BT[:, None], levels, return_dict=True).audio_codes

    def decode(self, ids_BKt: Tensor) -> Tensor:
        waves_BT = self.model.decode(audio_codes=ids_BKt, return_dict=True).audio_values
        return F.pad(waves_BT, (0, max(0, ids_BKt.shape[-1] * self.hop - waves_BT.shape[-1])))


class Mimi(Codec):
    """Mimi. Its semantic levels come first and are always used."""

    model_class = MimiModel

    def __init__(self, model: MimiModel):
        super().__init__(model)
        self.hop = math.prod(model.config.upsampling_ratios or ()) * model.config.latent_stride
        self.fewest, self.most = model.config.num_semantic_quantizers, model.config.num_quantizers

    def encode(self, waves_BT: Tensor, levels: int) -> Tensor:
        encoded = self.model.encode(waves_BT[:, None], num_quantizers=levels, use_streaming=False, return_dict=True)
        return encoded.audio_codes

    def decode(self, ids_BKt: Tensor) -> Tensor:
        return self.model.decode(ids_BKt, return_dict=True).audio_values[:, 0]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Also drop the codebooks that transformers caches on the device of their first use."""
        for module in self.modules():
            if isinstance(module, MimiEuclideanCodebook):
                module._embed = None
        return super()._apply(fn, recurse)


CODECS: dict[str, type[Codec]] = {"encodec": Encodec, "dac": Dac, "mimi": Mimi}
