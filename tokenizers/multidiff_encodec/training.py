"""Training of a codec with Lightning: `multidiff fit --config configs/tokenizers/encodec_words.yaml`.

The package's quantizer collapses when it is trained as shipped. Here its codebooks are trained from outside
(`multidiff_encodec.codebook`), and the result is the package's own model:

- residuals are detached, and the straight-through estimator is applied once, over the sum of all levels;
- the first `continuous_steps` run without codebooks; these then start from recent latents;
- half of the items are decoded from fewer levels, drawn uniformly (SoundStream, Zeghidour et al. 2021, section III-C),
  so that levels can be dropped afterwards.

Loss: mean over window lengths of |Δ log mel| + |Δ mel| (`MelLoss`), plus commitment · Σ_levels mean (r − sg[e])².

Shape suffixes: B sounds, C channels (1), T samples, t frames, K levels, D latent width, N latents of a batch.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from multidiff.callbacks import progress
from multidiff.seeding import generator_for
from multidiff.tokenizer import Audio
from multidiff_encodec.codebook import Codebook, codebooks_of
from multidiff_encodec.folder import write_codec
from multidiff_encodec.mel import MelLoss
from multidiff_encodec.model import PRESETS, build_model
from multidiff_sound.sound import spectrogram


class EncodecTraining(LightningModule):
    """Trains a codec and, at the end, writes a folder that `EncodecTokenizer(weights=folder)` opens.

    Logged: the loss and its parts; for each level `usage`, the share of codes in use, and `perplexity`, exp of the
    entropy of their use; in TensorBoard, sounds of the validation split and their reconstructions.

    Args:
        preset: a size from `multidiff_encodec.model.PRESETS`.
        folder: where the trained codec goes.
        settings: what differs from the preset, by name of `CodecConfig`.
        learning_rate: peak of AdamW's; linear warm-up, then a cosine down to 0 at the trainer's last step.
        warmup_steps: length of the warm-up.
        weight_decay: AdamW's.
        commitment: weight of the pull of latents towards their codes.
        continuous_steps: steps before the codebooks come in.
        codebook_decay: of the codebooks' moving averages, per step.
        revive_below: a code used less than this share of the average use is moved ...
        revive_until: ... in this first share of the training, so that the rest can settle.
        fewer_levels: share of items decoded from a random number of levels.
        seed: decides initial weights, revivals and levels.
    """

    def __init__(
        self,
        preset: str,
        folder: str,
        settings: dict[str, Any] | None = None,
        learning_rate: float = 1.5e-3,
        warmup_steps: int = 100,
        weight_decay: float = 1e-3,
        commitment: float = 0.25,
        continuous_steps: int = 200,
        codebook_decay: float = 0.99,
        revive_below: float = 0.1,
        revive_until: float = 0.8,
        fewer_levels: float = 0.5,
        seed: int = 0,
    ):
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"no codec size is called {preset!r}; known: {', '.join(PRESETS)}")
        try:
            self.config = replace(PRESETS[preset], **(settings or {}))
        except TypeError as error:
            raise ValueError(f"settings of codec size {preset!r}: {error}") from None
        self.model = build_model(self.config, seed).train()
        self.mel_loss = MelLoss(self.config.sample_rate)
        self.folder = Path(folder)
        self.learning_rate, self.warmup_steps, self.weight_decay = learning_rate, warmup_steps, weight_decay
        self.commitment, self.continuous_steps, self.codebook_decay = commitment, continuous_steps, codebook_decay
        self.revive_below, self.revive_until = revive_below, revive_until
        self.fewer_levels, self.seed = fewer_levels, seed
        self._recent: deque[Tensor] = deque(maxlen=16)

    @property
    def codebooks(self) -> list[Codebook]:
        """First level first."""
        return codebooks_of(self.model.quantizer)

    def training_step(self, waveform_BCT: Tensor, batch_idx: int) -> Tensor:
        latents_BDt = self.model.encoder(waveform_BCT)
        if self.global_step < self.continuous_steps:
            self._recent.append(self._gathered(latents_BDt))
            quantized_BDt, commitment = latents_BDt, latents_BDt.new_zeros(())
        else:
            quantized_BDt, commitment = self._quantize(latents_BDt)
        restored_BCT = self.model.decoder(quantized_BDt)[..., : waveform_BCT.shape[-1]]
        mel = self.mel_loss(restored_BCT[:, 0], waveform_BCT[:, 0])
        loss = mel + self.commitment * commitment
        self.log_dict({"train/loss": loss, "train/mel": mel}, prog_bar=True)
        self.log("train/commitment", commitment)
        for level, book in enumerate(self.codebooks):
            usage, perplexity = book.usage()
            self.log_dict({f"train/perplexity_{level}": perplexity, f"train/usage_{level}": usage}, prog_bar=level == 0)
        return loss

    def validation_step(self, waveform_BCT: Tensor, batch_idx: int) -> None:
        codes_BKt = self.model.encode(waveform_BCT)[0][0]
        for levels in range(1, codes_BKt.shape[1] + 1):
            restored_BCT = self.model.decode([(codes_BKt[:, :levels], None)])[..., : waveform_BCT.shape[-1]]
            mel = self.mel_loss(restored_BCT[:, 0], waveform_BCT[:, 0])
            self.log(f"val/mel_{levels}", mel, prog_bar=True, batch_size=len(waveform_BCT), sync_dist=True)
            if batch_idx == 0 and self.trainer.is_global_zero:
                self._show(f"{levels} levels", restored_BCT[:4])
        if batch_idx == 0 and self.trainer.is_global_zero:
            self._show("original", waveform_BCT[:4])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.model.parameters(), self.learning_rate, (0.8, 0.99), weight_decay=self.weight_decay
        )

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
            return warm * (0.5 + 0.5 * math.cos(math.pi * progress(self.trainer, step)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.export(self.folder)

    def export(self, folder: Path) -> None:
        """Write the codec as it is now; `EncodecTokenizer(weights=folder)` opens it."""
        write_codec(self.model, self.config, folder)

    def _quantize(self, latents_BDt: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the levels' codes, straight through, and the commitment loss; the codebooks follow the latents."""
        generator = generator_for(self.seed, self.global_step)
        if not all(book.started_1 for book in self.codebooks):
            self._start_codebooks(torch.cat([*self._recent, self._gathered(latents_BDt)]), generator)
        # Which items get fewer levels differs between ranks, as the items do; the codebooks' updates do not.
        own = generator_for(self.seed, self.global_step, self.global_rank)
        count = len(self.codebooks)
        fewer_B = torch.rand(len(latents_BDt), generator=own) < self.fewer_levels
        levels_B = torch.where(fewer_B, torch.randint(1, count + 1, fewer_B.shape, generator=own), count)
        reviving = progress(self.trainer, self.global_step) < self.revive_until
        residual_BDt, sum_BDt = latents_BDt, torch.zeros_like(latents_BDt)
        commitment = latents_BDt.new_zeros(())
        for level, book in enumerate(self.codebooks):
            codes_ND = book.nearest(_flat(residual_BDt))
            codes_BDt = codes_ND.unflatten(0, (len(latents_BDt), -1)).transpose(1, 2)
            active_B11 = (levels_B > level).to(latents_BDt)[:, None, None]
            commitment = commitment + (active_B11 * (residual_BDt - codes_BDt).square()).mean()
            everyones_ND = self._gathered(residual_BDt)
            book.follow(everyones_ND, self.codebook_decay, self.revive_below if reviving else 0.0, generator)
            sum_BDt = sum_BDt + active_B11 * codes_BDt
            residual_BDt = residual_BDt - codes_BDt
        return latents_BDt + (sum_BDt - latents_BDt).detach(), commitment

    def _start_codebooks(self, residual_ND: Tensor, generator: torch.Generator) -> None:
        self._recent.clear()
        for book in self.codebooks:
            book.start(residual_ND, generator)
            residual_ND = residual_ND - book.nearest(residual_ND)

    def _gathered(self, latents_BDt: Tensor) -> Tensor:
        """Latents of all ranks, [N, D]: every rank makes the same update of the codebooks."""
        own_ND = _flat(latents_BDt)
        gathered = self.all_gather(own_ND)
        assert isinstance(gathered, Tensor)
        return gathered.reshape(-1, own_ND.shape[1])

    def _show(self, name: str, waveform_BCT: Tensor) -> None:
        if isinstance(self.logger, TensorBoardLogger):
            sound = Audio(waveform_BCT.flatten()[None].float().cpu().clamp(-1, 1), self.config.sample_rate)
            board = self.logger.experiment
            board.add_audio(name, sound.waveform, self.global_step, sound.sample_rate)
            board.add_image(name, np.asarray(spectrogram(sound)), self.global_step, dataformats="HW")


def _flat(latents_BDt: Tensor) -> Tensor:
    """[B·t, D], without gradient."""
    return latents_BDt.detach().transpose(1, 2).flatten(0, 1).float()
