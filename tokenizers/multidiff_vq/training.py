"""Trains a `VQModel` with Lightning: `multidiff fit --config configs/tokenizers/vq_digits.yaml`.

diffusers' `VQModel` learns its codebook by gradient, and unused codes stay unused. Here a quantizer of
`multidiff_vq.quantizers` beside the model turns latents into codes. The result is an ordinary `VQModel`.

The loss is, with means over pixels in [-1, 1],

    ‖x̂ - x‖² + l1·|x̂ - x| + gradient·G + perceptual·P + commitment·‖z - sg[e]‖² + rate·H + entropy·Q - λ·adversary·D(x̂)

G, P and D are in `multidiff_vq.losses`, λ is `multidiff_autoencoder.adversary.adaptive_weight`, and Q is lfq's loss. H
is the entropy of the codes at each place of the grid, in nats per code, where distances soften the assignments (as in
Agustsson et al. 2017, arXiv:1704.00648). Without H, an encoder whose view covers the whole image may store it anywhere,
even in empty corners, and a model finds no pattern in the codes.

Shape suffixes: B pictures, C channels, H, W pixels, h, w codes down and across, N latents of a batch on all ranks,
V codes, D latent width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vq_model import VQModel
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from multidiff.seeding import generator_for
from multidiff_autoencoder.adversary import adaptive_weight, adversarial_loss, frozen, hinge_loss
from multidiff_autoencoder.codebook import Codebook, usage
from multidiff_autoencoder.training import AutoencoderTraining
from multidiff_vq.data import PictureData
from multidiff_vq.folder import write_model
from multidiff_vq.losses import PatchDiscriminator, PerceptualLoss, gradient_loss
from multidiff_vq.pictures import to_signal
from multidiff_vq.presets import PRESETS
from multidiff_vq.quantizers import Quantizer, codebook_arguments, fixed_quantizer, quantize
from multidiff_vq.resize import Resizer
from multidiff_vq.tokenizer import write_settings

_SHIFTS, _CODES = 0, 1  # purposes of a generator


class VQTraining(AutoencoderTraining):
    """Trains a `VQModel`, and writes a folder for `VQTokenizer` and diffusers at the end.

    It logs the loss and its parts under `train/`. Under `train/`, `val/` and `test/` it logs `codebook_usage`, the
    share of codes in use, and `codebook_perplexity`, the exponential of the entropy of their use, which is at most V.
    Under `val/` and `test/` it logs the PSNR in dB, averaged over images. TensorBoard also gets images of the
    validation split above their reconstructions.

    The images of `PictureData` have the preset's channels and size.

    Args:
        preset: Size of the model, from `multidiff_vq.presets`: digits-32, grey-32, rgb-32, rgb-64, rgb-128, rgb-256 or
            rgb-512.
        folder: Folder for the trained model.
        settings: Changes to the preset, by the names of the arguments of diffusers' `VQModel`.
        quantizer: Quantizer from `multidiff_vq.quantizers`: vq, fsq or lfq.
        levels: Levels of fsq. Their product is the number of codes, in place of the preset's.
        l1_weight: Weight of the absolute error, which sharpens edges.
        gradient_weight: Weight of the error of differences between neighbouring pixels, at three scales.
        perceptual_weight: Weight of the distance between features of VGG-16.
        backbone: File with the weights of VGG-16, for `perceptual_weight`.
        rate_weight: Weight of the entropy of the codes at each place. A larger weight makes codes easier to model, and
            images less exact.
        entropy_weight: Weight of lfq's own loss.
        shift: Maximum shift of each training image in pixels, in each direction. Edges are repeated.
        flip: Probability of mirroring a training image.
        **common: Arguments of `multidiff_autoencoder.training.AutoencoderTraining`.

    Raises:
        ValueError: a preset or setting is unknown, or settings contradict each other; the message names it.
    """

    model: VQModel
    count_V: Tensor
    sum_VD: Tensor
    evaluated_count_V: Tensor
    picture_size_2: Tensor

    def __init__(
        self,
        preset: str,
        folder: str,
        settings: dict[str, Any] | None = None,
        quantizer: Quantizer = "vq",
        levels: list[int] | None = None,
        l1_weight: float = 0.5,
        gradient_weight: float = 0.0,
        perceptual_weight: float = 0.0,
        backbone: str | None = None,
        rate_weight: float = 0.0,
        entropy_weight: float = 0.1,
        shift: int = 1,
        flip: float = 0.0,
        **common: Any,
    ):
        super().__init__(folder, **common)
        if preset not in PRESETS:
            raise ValueError(f"there is no size {preset!r}; the sizes are {', '.join(PRESETS)}")
        if (perceptual_weight > 0) != (backbone is not None):
            raise ValueError(f"set perceptual_weight and backbone together, got {perceptual_weight} and {backbone!r}")
        arguments = {**PRESETS[preset], **(settings or {})}
        arguments |= codebook_arguments(quantizer, arguments["num_vq_embeddings"], levels)
        try:
            self.model = VQModel(**arguments)
        except TypeError as error:
            raise ValueError(f"settings of size {preset!r}: {error}") from None
        self.model.quantize.embedding.weight.requires_grad_(False)
        self.preset = preset
        self.quantizer, self.fixed = quantizer, fixed_quantizer(quantizer, self.model, levels)
        self.l1_weight, self.gradient_weight, self.perceptual_weight = l1_weight, gradient_weight, perceptual_weight
        self.rate_weight, self.entropy_weight = rate_weight, entropy_weight
        self.backbone = PerceptualLoss(backbone) if backbone else None
        self.discriminator = PatchDiscriminator(arguments["in_channels"]) if self.adversary else None
        self.shift, self.flip = shift, flip
        # Moving averages of the number of latents per batch that choose each code, and of their sum.
        self.register_buffer("count_V", torch.zeros(len(self.model.quantize.embedding.weight)))
        self.register_buffer("sum_VD", torch.zeros_like(self.model.quantize.embedding.weight))
        self.register_buffer("evaluated_count_V", torch.zeros_like(self.count_V), persistent=False)
        self.register_buffer("picture_size_2", torch.zeros(2, dtype=torch.int64))  # height, width

    @property
    def codebook(self) -> Codebook:
        """The model's codes, with their moving averages."""
        return Codebook(self.model.quantize.embedding.weight, self.count_V, self.sum_VD)

    @property
    def started(self) -> bool:
        return self.fixed is not None or self.codebook.started

    @property
    def stride(self) -> int:
        """Pixels per code, in each direction."""
        return 2 ** (len(self.model.config["block_out_channels"]) - 1)

    def setup(self, stage: str) -> None:
        """Set the data's channels and size to those of the model."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(data, PictureData):
            config = self.model.config
            data.suit(self.preset, config["in_channels"], config["sample_size"], self.stride)

    def on_fit_start(self) -> None:
        if self.quantizer == "lfq" and self.trainer.world_size > 1:
            # vector-quantize-pytorch 1.32 omits the other devices from its mean.
            raise ValueError("quantizer lfq trains on one device only. Set trainer.devices to 1, or use fsq.")

    def training_step(self, pixels_BCHW: Tensor, batch_idx: int) -> Tensor:
        if pixels_BCHW.shape[1] != self.model.config["in_channels"]:
            raise ValueError(
                f"images have {pixels_BCHW.shape[1]} channels, but the model has {self.model.config['in_channels']}. "
                "Choose another preset."
            )
        self.picture_size_2.copy_(torch.tensor(pixels_BCHW.shape[2:]))
        generator = generator_for(self.seed, _SHIFTS, self.global_step, self.global_rank)
        signal_BCHW = _moved(to_signal(pixels_BCHW), self.shift, self.flip, generator)
        latents_BDhw = self.model.encode(signal_BCHW).latents
        quantized_BDhw, own = self._quantize(latents_BDhw)
        restored_BCHW = self._restore(quantized_BDhw)
        parts = self._likeness(restored_BCHW, signal_BCHW)
        reconstruction = parts["reconstruction"]
        parts["commitment"] = F.mse_loss(latents_BDhw, quantized_BDhw.detach())
        loss = (
            reconstruction
            + self.commitment * parts["commitment"]
            + self.entropy_weight * own
            + self.idle_discriminator()
        )
        if self.rate_weight and self.codebook.started:
            parts["entropy"] = _entropy_by_place(latents_BDhw, self.codebook.codes_VD)
            loss = loss + self.rate_weight * parts["entropy"]
        if self.opposed:
            parts |= self._oppose(reconstruction, restored_BCHW, signal_BCHW)
            loss = loss + parts["weight"] * self.adversary * parts["adversarial"] + parts["discriminator"]
        self.log_dict({"train/loss": loss, "train/reconstruction": parts.pop("reconstruction")}, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in parts.items()})
        self._log_codebook("train", self.count_V, above=0.1)
        return loss

    def validation_step(self, pixels_BCHW: Tensor, batch_idx: int) -> None:
        self._evaluate("val", pixels_BCHW, show=batch_idx == 0)

    def test_step(self, pixels_BCHW: Tensor, batch_idx: int) -> None:
        self._evaluate("test", pixels_BCHW)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluated_codebook("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluated_codebook("test")

    def write_tokenizer(self) -> None:
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(data, PictureData):
            resizer = data.resizer
        else:  # the size of other data is that of its images
            height, width = self.picture_size_2.tolist()
            resizer = Resizer(None, height, width, self.stride)
        write_model(self.model, self.folder, self.half_precision)
        write_settings(self.folder, resizer)

    def _evaluate(self, stage: str, pixels_BCHW: Tensor, show: bool = False) -> None:
        signal_BCHW = to_signal(pixels_BCHW)
        quantized_BDhw, _, (_, _, ids) = self.model.quantize(self.model.encode(signal_BCHW).latents)
        restored_BCHW = self._restore(quantized_BDhw).clamp(-1, 1)
        error_B = (restored_BCHW - signal_BCHW).square().mean((1, 2, 3)) / 4
        psnr = (-10 * error_B.clamp_min(1e-10).log10()).mean()
        self.log(f"{stage}/psnr", psnr, prog_bar=True, batch_size=len(pixels_BCHW), sync_dist=True)
        self.evaluated_count_V += torch.bincount(ids.flatten(), minlength=len(self.evaluated_count_V))
        if show and isinstance(self.logger, TensorBoardLogger) and self.trainer.is_global_zero:
            pairs_BCHW = torch.cat([signal_BCHW[:16], restored_BCHW[:16]], dim=2)  # one above the other
            strip_CHW = torch.cat(list((pairs_BCHW + 1) / 2), dim=2)
            self.logger.experiment.add_image("reconstructions", strip_CHW, self.global_step)

    def _log_evaluated_codebook(self, stage: str) -> None:
        self._log_codebook(stage, self.trainer.strategy.reduce(self.evaluated_count_V, reduce_op="sum"))
        self.evaluated_count_V.zero_()

    def _restore(self, quantized_BDhw: Tensor) -> Tensor:
        guide = quantized_BDhw if self.model.config["norm_type"] == "spatial" else None
        return self.model.decoder(self.model.post_quant_conv(quantized_BDhw), guide)

    def _quantize(self, latents_BDhw: Tensor) -> tuple[Tensor, Tensor]:
        """The straight-through codes of latents, and the quantizer's own loss. Also updates a learned codebook."""
        nothing = latents_BDhw.new_zeros(())
        if self.fixed is not None:
            quantized_BDhw, ids_Bhw, own = quantize(self.fixed, latents_BDhw)
            used_V = torch.bincount(ids_Bhw.flatten(), minlength=len(self.count_V)).float()
            self.count_V.lerp_(used_V, 1 - self.codebook_decay)
            return quantized_BDhw, own
        if self.global_step < self.continuous_steps:
            return latents_BDhw, nothing
        latents_ND = self.gathered(latents_BDhw.permute(0, 2, 3, 1).flatten(0, 2))
        generator = generator_for(self.seed, _CODES, self.global_step)
        if not self.codebook.started:
            self.codebook.start(latents_ND, generator)
        quantized_BDhw, _, _ = self.model.quantize(latents_BDhw)
        self.codebook.follow(latents_ND, self.codebook_decay, self.reviving, generator)
        return quantized_BDhw, nothing

    def _likeness(self, restored_BCHW: Tensor, signal_BCHW: Tensor) -> dict[str, Tensor]:
        """The losses that compare images, and their weighted sum as `reconstruction`."""
        absolute = F.l1_loss(restored_BCHW, signal_BCHW)
        parts = {"squared": F.mse_loss(restored_BCHW, signal_BCHW), "absolute": absolute}
        reconstruction = parts["squared"] + self.l1_weight * absolute
        if self.gradient_weight:
            parts["gradient"] = gradient_loss(restored_BCHW, signal_BCHW)
            reconstruction = reconstruction + self.gradient_weight * parts["gradient"]
        if self.backbone is not None:
            parts["perceptual"] = self.backbone(restored_BCHW, signal_BCHW)
            reconstruction = reconstruction + self.perceptual_weight * parts["perceptual"]
        return {**parts, "reconstruction": reconstruction}

    def _oppose(self, reconstruction: Tensor, restored_BCHW: Tensor, signal_BCHW: Tensor) -> dict[str, Tensor]:
        """The adversarial loss and its weight, and the discriminator's loss."""
        assert self.discriminator is not None
        with frozen(self.discriminator):
            adversarial = adversarial_loss([self.discriminator(restored_BCHW)])
        discriminator_loss = hinge_loss([self.discriminator(signal_BCHW)], [self.discriminator(restored_BCHW.detach())])
        weight = adaptive_weight(reconstruction, adversarial, self.model.decoder.conv_out.weight)
        return {"adversarial": adversarial, "discriminator": discriminator_loss, "weight": weight}

    def _log_codebook(self, stage: str, count_V: Tensor, above: float = 0.0) -> None:
        used, perplexity = usage(count_V, above)
        self.log_dict({f"{stage}/codebook_usage": used, f"{stage}/codebook_perplexity": perplexity})


def _entropy_by_place(latents_BDhw: Tensor, codebook_VD: Tensor) -> Tensor:
    """The mean over places of the entropy of the batch's codes at that place, in nats.

    A latent counts for code v with softmax(-distance² / τ), where τ is the mean squared distance to the nearest code.
    """
    latents_BND = latents_BDhw.flatten(2).transpose(1, 2).float()
    # A matrix product would be rounded under autocast, and would subtract large squares from each other.
    distance_BNV = (latents_BND[:, :, None] - codebook_VD).square().sum(-1)
    scale = distance_BNV.detach().amin(-1).mean().clamp_min(1e-6)
    share_NV = torch.softmax(-distance_BNV / scale, -1).mean(0)
    return -(share_NV * share_NV.clamp_min(1e-9).log()).sum(-1).mean()


def _moved(signal_BCHW: Tensor, most: int, flip: float, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `most` pixels in each direction, and mirror it with probability `flip`."""
    height, width = signal_BCHW.shape[2:]
    padded_BCHW = F.pad(signal_BCHW, (most,) * 4, mode="replicate")
    offsets = torch.randint(2 * most + 1, (len(signal_BCHW), 2), generator=generator).tolist()
    mirrored = (torch.rand(len(signal_BCHW), generator=generator) < flip).tolist()
    moved = [one[:, down : down + height, right : right + width]
             for one, (down, right) in zip(padded_BCHW, offsets, strict=True)]  # fmt: skip
    return torch.stack([one.flip(2) if mirror else one for one, mirror in zip(moved, mirrored, strict=True)])
