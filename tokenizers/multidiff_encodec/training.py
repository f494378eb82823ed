"""Training of a codec with Lightning: `multidiff fit --config configs/tokenizers/encodec_words.yaml`.

The package's quantizer collapses when it is trained as shipped: each level's straight-through gradient runs into the
next one's residual. Here its codebooks are trained from outside (`multidiff_autoencoder.codebook`), and the result is
the package's own model:

- residuals are detached, and the straight-through estimator is applied once, over the sum of all levels;
- the first `continuous_steps` run without codebooks; these then start from recent latents;
- half of the items are decoded from fewer levels, drawn uniformly (SoundStream, Zeghidour et al. 2021, section III-C),
  so that levels can be dropped afterwards.

Loss: mean over window lengths of |Δ log mel| + |Δ mel| (`MelLoss`), plus commitment · mean (z - sg[Σ_levels e])². With
an adversary, the package's multi-scale STFT discriminator (Défossez et al. 2022, section 3.4), a balancer gives the mel
loss, the adversarial loss and feature matching their shares of the gradient at the output.

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
    """Trains a codec and, at the end, writes a folder that `EncodecTokenizer(weights=folder)` opens.

    Logged: the losses; for each level `usage`, the share of codes in use, and `perplexity`, exp of the
    entropy of their use; of the validation and test split the mel loss by number of levels (`val/mel_1` …); in
    TensorBoard, sounds of the validation split and their reconstructions.

    Args:
        preset: a size from `multidiff_encodec.model.PRESETS`: words-8khz, words-16khz, 8khz, 16khz, 24khz,
            meta-24khz.
        folder: where the trained codec goes.
        settings: what differs from the preset, by name of `CodecConfig`.
        fewer_levels: share of items decoded from a random number of levels.
        mel: weight of the mel loss where a balancer weighs it against the adversary.
        features: weight of feature matching, likewise.
        discriminator_filters: channels of the discriminator.
        **common: as `multidiff_autoencoder.training.AutoencoderTraining` has them.

    Raises:
        ValueError: an unknown preset or setting; names it.
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
            raise ValueError(f"no codec size is called {preset!r}; known: {', '.join(PRESETS)}")
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
        """First level first."""
        return codebooks_of(self.model.quantizer)

    @property
    def started(self) -> bool:
        return all(book.started for book in self.codebooks)

    def setup(self, stage: str) -> None:
        """Tell the data what the codec takes."""
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
        # From the first step on, though there is nothing to balance yet: the commitment keeps its share.
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
        """Log the mel loss of each number of levels."""
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
        """The latents that the codebooks are to start from, as long as they have not."""
        checkpoint["recent_latents"] = list(self._recent)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        self._recent.extend(checkpoint["recent_latents"])

    def write_tokenizer(self) -> None:
        write_codec(self.model, self.config, self.folder, self.half_precision)

    def _quantize(self, latents_BDt: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the levels' codes, straight through, and the commitment loss; the codebooks follow the latents."""
        generator = generator_for(self.seed, self.global_step)
        if not all(book.started for book in self.codebooks):
            self._recent.append(self.gathered(_flat(latents_BDt)))
            self._start_codebooks(generator)
        # Which items get fewer levels differs between ranks, as the items do; the codebooks' updates do not.
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
        # To the sum, not to each level: pulled to the first, latents would leave nothing for the others to say.
        return latents_BDt + (sum_BDt - latents_BDt).detach(), F.mse_loss(latents_BDt, sum_BDt)

    def _start_codebooks(self, generator: torch.Generator) -> None:
        # A checkpoint is read before the model is on its device.
        residual_ND = torch.cat([latents_ND.to(self.device) for latents_ND in self._recent])
        for book in self.codebooks:
            book.start(residual_ND, generator, len(self._recent))
            residual_ND = residual_ND - book.nearest(residual_ND)
        mark_started(self.model.quantizer)
        self._recent.clear()

    def _oppose(self, restored_BCT: Tensor, waveform_BCT: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The autoencoder's losses by name, and the discriminator's."""
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
    """The package's, with windows of 2048, 1024, 512, 256 and 128 samples at 24 kHz, as long in time at other rates."""
    windows = [2 ** round(math.log2(length * sample_rate / 24_000)) for length in (2048, 1024, 512, 256, 128)]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
        torch.manual_seed(seed)
        return MultiScaleSTFTDiscriminator(
            filters, n_ffts=windows, win_lengths=windows, hop_lengths=[window // 4 for window in windows]
        )


def _flat(latents_BDt: Tensor) -> Tensor:
    """[B·t, D]"""
    return latents_BDt.transpose(1, 2).flatten(0, 1)
