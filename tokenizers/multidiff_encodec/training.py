"""Trains a codec with Lightning: `multidiff fit --config configs/tokenizers/encodec_words.yaml`.

The quantizer of the package collapses when it is trained as shipped, because the straight-through gradient of each
level flows into the residual of the next. Here `multidiff_autoencoder.codebook` trains its codebooks instead. The
result is still the package's own model.

- Residuals are detached, and the straight-through estimator is applied once, to the sum of all levels.
- The first `continuous_steps` steps run without codebooks. The codebooks are then initialized from recent latents.
- Half of the items are decoded from a random, smaller number of levels (SoundStream, Zeghidour et al. 2021, section
  III-C), so that levels can be dropped later.

The loss is the mean over window lengths of |Δ log mel| + |Δ mel| (`MelLoss`), plus

    commitment · mean (z - sg[Σ_levels e])²

With an adversary, the discriminator is the package's multi-scale STFT discriminator (Défossez et al. 2022, section
3.4). A balancer then sets the shares of the mel loss, the adversarial loss and feature matching in the gradient at the
output.

Shape suffixes: B sounds, C channels (1), T samples, t frames, K levels, D latent width, N latents of a batch.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from encodec.model import EncodecModel
from encodec.msstftd import MultiScaleSTFTDiscriminator
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from multidiff.seeding import generator_for
from multidiff.tokenizer import Audio
from multidiff_autoencoder.adversary import Balancer, adversarial_loss, feature_matching, frozen, hinge_loss
from multidiff_autoencoder.codebook import Codebook, usage
from multidiff_autoencoder.training import AutoencoderTraining
from multidiff_encodec.data import SoundData
from multidiff_encodec.folder import write_codec
from multidiff_encodec.mel import MelLoss
from multidiff_encodec.model import PRESETS, build_model, codebooks_of, mark_started
from multidiff_sound.sound import spectrogram


class EncodecTraining(AutoencoderTraining):
    """Trains a codec, and writes a folder for `EncodecTokenizer(weights=folder)` at the end.

    It logs the losses; for each level `usage`, the share of codes in use, and `perplexity`, the exponential of the
    entropy of their use; and for the validation and test splits, the mel loss by number of levels (`val/mel_1` and so
    on). TensorBoard also gets sounds of the validation split and their reconstructions.

    Args:
        preset: Size of the codec, from `multidiff_encodec.model.PRESETS`: words-8khz, words-16khz, 8khz, 16khz, 24khz
            or meta-24khz.
        folder: Folder for the trained codec.
        settings: Changes to the preset, by the names of `CodecConfig`.
        fewer_levels: Fraction of items that are decoded from a random number of levels.
        mel: Weight of the mel loss in the balancer. It is used only with an adversary.
        features: Weight of feature matching in the balancer.
        discriminator_filters: Channels of the discriminator.
        **common: Arguments of `multidiff_autoencoder.training.AutoencoderTraining`.

    Raises:
        ValueError: a preset or setting is unknown; the message names it.
    """

    model: EncodecModel

    def __init__(
        self,
        preset: str,
        folder: str,
        settings: dict[str, Any] | None = None,
        fewer_levels: float = 0.5,
        mel: float = 1.0,
        features: float = 3.0,
        discriminator_filters: int = 16,
        **common: Any,
    ):
        super().__init__(folder, **common)
        if preset not in PRESETS:
            raise ValueError(f"there is no codec size {preset!r}; the sizes are {', '.join(PRESETS)}")
        try:
            self.config = replace(PRESETS[preset], **(settings or {}))
        except TypeError as error:
            raise ValueError(f"settings of codec size {preset!r}: {error}") from None
        self.preset = preset
        self.model = build_model(self.config, self.seed).train()
        self.mel_loss = MelLoss(self.config.sample_rate)
        self.fewer_levels = fewer_levels
        if self.adversary:
            self.discriminator = _discriminator(discriminator_filters, self.config.sample_rate, self.seed)
            self.balancer = Balancer({"mel": mel, "adversarial": self.adversary, "features": features})
        self._recent: deque[Tensor] = deque(maxlen=16)

    @property
    def codebooks(self) -> list[Codebook]:
        """The codebooks, first level first."""
        return codebooks_of(self.model.quantizer)

    @property
    def started(self) -> bool:
        return all(book.started for book in self.codebooks)

    def setup(self, stage: str) -> None:
        """Set the data's sample rate to that of the codec."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(data, SoundData):
            data.suit(self.preset, self.config.sample_rate, self.config.hop)

    def training_step(self, waveform_BCT: Tensor, batch_idx: int) -> Tensor:
        latents_BDt = self.model.encoder(waveform_BCT)
        if self.global_step < self.continuous_steps:
            self._recent.append(self.gathered(_flat(latents_BDt)))
            quantized_BDt, commitment = latents_BDt, latents_BDt.new_zeros(())
        else:
            quantized_BDt, commitment = self._quantize(latents_BDt)
        restored_BCT = self.model.decoder(quantized_BDt)[..., : waveform_BCT.shape[-1]]
        mel = self.mel_loss(restored_BCT[:, 0], waveform_BCT[:, 0])
        loss = self.commitment * commitment + self.idle_discriminator()
        losses = {"mel": mel}
        if self.opposed:
            adversarial_losses, discriminator_loss = self._oppose(restored_BCT, waveform_BCT)
            losses |= adversarial_losses
            loss = loss + discriminator_loss
            self.log_dict(
                {"train/discriminator": discriminator_loss}
                | {f"train/{name}": value for name, value in adversarial_losses.items()}
            )
        # The balancer is used from the first step on, so that the share of the commitment loss does not change.
        loss = loss + (mel if self.discriminator is None else self.balancer(losses, restored_BCT))
        self.log("train/mel", mel, prog_bar=True)
        self.log("train/commitment", commitment)
        for level, book in enumerate(self.codebooks):
            used, perplexity = usage(book.count_V, above=0.1)
            self.log_dict({f"train/perplexity_{level}": perplexity, f"train/usage_{level}": used}, prog_bar=level == 0)
        return loss

    def validation_step(self, waveform_BCT: Tensor, batch_idx: int) -> None:
        self._evaluate("val", waveform_BCT, show=batch_idx == 0 and self.trainer.is_global_zero)

    def test_step(self, waveform_BCT: Tensor, batch_idx: int) -> None:
        self._evaluate("test", waveform_BCT)

    def _evaluate(self, stage: str, waveform_BCT: Tensor, show: bool = False) -> None:
        """Log the mel loss for each number of levels."""
        codes_BKt = self.model.encode(waveform_BCT)[0][0]
        for levels in range(1, codes_BKt.shape[1] + 1):
            restored_BCT = self.model.decode([(codes_BKt[:, :levels], None)])[..., : waveform_BCT.shape[-1]]
            mel = self.mel_loss(restored_BCT[:, 0], waveform_BCT[:, 0])
            self.log(f"{stage}/mel_{levels}", mel, prog_bar=True, batch_size=len(waveform_BCT), sync_dist=True)
            if show:
                self._show(f"{levels} levels", restored_BCT[:4])
        if show:
            self._show("original", waveform_BCT[:4])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the recent latents, from which the codebooks are initialized later."""
        checkpoint["recent_latents"] = list(self._recent)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the recent latents."""
        self._recent.extend(checkpoint["recent_latents"])

    def write_tokenizer(self) -> None:
        write_codec(self.model, self.config, self.folder, self.half_precision)

    def _quantize(self, latents_BDt: Tensor) -> tuple[Tensor, Tensor]:
        """The straight-through sum of all levels' codes, and the commitment loss. Also updates the codebooks."""
        generator = generator_for(self.seed, self.global_step)
        if not all(book.started for book in self.codebooks):
            self._recent.append(self.gathered(_flat(latents_BDt)))
            self._start_codebooks(generator)
        # Items with fewer levels differ between ranks, as the items do. The updates of the codebooks do not.
        own = generator_for(self.seed, self.global_step, self.global_rank)
        count = len(self.codebooks)
        fewer_B = torch.rand(len(latents_BDt), generator=own) < self.fewer_levels
        levels_B = torch.where(fewer_B, torch.randint(1, count + 1, fewer_B.shape, generator=own), count)
        residual_BDt, sum_BDt = latents_BDt, torch.zeros_like(latents_BDt)
        for level, book in enumerate(self.codebooks):
            codes_ND = book.nearest(_flat(residual_BDt).float())
            codes_BDt = codes_ND.unflatten(0, (len(latents_BDt), -1)).transpose(1, 2)
            active_B11 = (levels_B > level).to(latents_BDt)[:, None, None]
            book.follow(self.gathered(_flat(residual_BDt)), self.codebook_decay, self.reviving, generator)
            sum_BDt = sum_BDt + active_B11 * codes_BDt
            residual_BDt = residual_BDt - codes_BDt
        # Latents are pulled towards the sum. Pulled towards the first level, they would leave no residual.
        return latents_BDt + (sum_BDt - latents_BDt).detach(), F.mse_loss(latents_BDt, sum_BDt)

    def _start_codebooks(self, generator: torch.Generator) -> None:
        # Latents from a checkpoint are loaded before the model is on its device.
        residual_ND = torch.cat([latents_ND.to(self.device) for latents_ND in self._recent])
        for book in self.codebooks:
            book.start(residual_ND, generator, len(self._recent))
            residual_ND = residual_ND - book.nearest(residual_ND)
        mark_started(self.model.quantizer)
        self._recent.clear()

    def _oppose(self, restored_BCT: Tensor, waveform_BCT: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The autoencoder's adversarial losses by name, and the discriminator's loss."""
        assert self.discriminator is not None
        real_scores, real_features = self.discriminator(waveform_BCT)
        with frozen(self.discriminator):
            scores, features = self.discriminator(restored_BCT)
        losses = {"adversarial": adversarial_loss(scores), "features": feature_matching(real_features, features)}
        return losses, hinge_loss(real_scores, self.discriminator(restored_BCT.detach())[0])

    def _show(self, name: str, waveform_BCT: Tensor) -> None:
        if isinstance(self.logger, TensorBoardLogger):
            sound = Audio(waveform_BCT.flatten()[None].float().cpu().clamp(-1, 1), self.config.sample_rate)
            board = self.logger.experiment
            board.add_audio(name, sound.waveform, self.global_step, sound.sample_rate)
            board.add_image(name, np.asarray(spectrogram(sound)), self.global_step, dataformats="HW")


def _discriminator(filters: int, sample_rate: int, seed: int) -> nn.Module:
    """The package's discriminator, with windows as long as 2048, 1024, 512, 256 and 128 samples at 24 kHz."""
    windows = [2 ** round(math.log2(length * sample_rate / 24_000)) for length in (2048, 1024, 512, 256, 128)]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
        torch.manual_seed(seed)
        return MultiScaleSTFTDiscriminator(
            filters, n_ffts=windows, win_lengths=windows, hop_lengths=[window // 4 for window in windows]
        )


def _flat(latents_BDt: Tensor) -> Tensor:
    """The latents of all frames, [B·t, D]."""
    return latents_BDt.transpose(1, 2).flatten(0, 1)
