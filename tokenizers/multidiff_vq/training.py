"""Training of a `VQModel` with Lightning: `multidiff fit --config configs/tokenizers/vq_digits.yaml`.

diffusers' `VQModel` learns its codebook by gradient and lets unused codes die. Here the codebook is trained from
outside, so that the result is an ordinary `VQModel`:

- the first `continuous_steps` steps run without it, so that there is something worth clustering;
- it starts as k-means centres of the latents of one batch;
- each code follows the moving average of the latents that chose it (van den Oord et al. 2017, appendix A.1);
- a code that falls out of use moves to a latent that is badly served (drawn in proportion to squared distance).

Loss: ‖x̂ − x‖² + l1·|x̂ − x| + commitment·‖z − sg[e]‖² + rate·H, all means, pixels in [-1, 1]. H is the entropy of the
codes at each place of the grid, nats per code, of assignments softened by distance (after Agustsson et al. 2017,
arXiv 1704.00648). Without it an encoder that sees the whole picture stores it anywhere, in empty corners too, and what
is to learn the codes finds no pattern in them.

Shape suffixes: B pictures, C channels, H, W pixels, h, w codes down and across, N latents of a batch on all ranks,
V codes, D latent width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vq_model import VQModel
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from multidiff.callbacks import progress
from multidiff.data.folder import read_metadata
from multidiff.data.module import ShuffledBatches
from multidiff.seeding import generator_for
from multidiff_vq.folder import write_model
from multidiff_vq.pictures import MODES, convert, read_picture, to_pixels, to_signal
from multidiff_vq.tokenizer import write_settings

_SHIFTS, _CODES = 0, 1  # what a generator is for


class VQTraining(LightningModule):
    """Trains a `VQModel` and, at the end, writes a folder that `VQTokenizer` and plain diffusers open.

    Logged under `train/` and `val/`: loss and its parts; `codebook_usage`, the share of codes in use, and
    `codebook_perplexity`, exp of the entropy of their use (V at best); on the validation pictures also PSNR (dB, mean
    over pictures) and, in TensorBoard, originals above their reconstructions.

    Args:
        model: arguments of diffusers' `VQModel`.
        folder: where the trained model goes.
        learning_rate: peak of AdamW's; linear warm-up, then a cosine down to 0 at the trainer's last step.
        warmup_steps: length of the warm-up.
        weight_decay: AdamW's.
        l1: weight of the absolute error beside the squared one; sharpens edges.
        commitment: weight of the pull of latents towards their codes.
        rate: weight of the entropy of the codes by place; more makes codes easier to model and pictures less exact.
        continuous_steps: steps before the codebook comes in.
        codebook_decay: of the codebook's moving averages, per step.
        revive_below: a code used less than this share of the average use is moved ...
        revive_until: ... in this first share of the training, so that the rest can settle.
        shift: each training picture moves by up to so many pixels each way, edges repeated.
        seed: decides revivals and shifts; the initial weights come from the trainer's `seed_everything`.
    """

    count_V: Tensor
    sum_VD: Tensor
    validation_count_V: Tensor
    picture_size_2: Tensor

    def __init__(
        self,
        model: dict[str, Any],
        folder: str,
        learning_rate: float = 3e-3,
        warmup_steps: int = 50,
        weight_decay: float = 1e-4,
        l1: float = 0.5,
        commitment: float = 0.25,
        rate: float = 0.0,
        continuous_steps: int = 100,
        codebook_decay: float = 0.99,
        revive_below: float = 0.1,
        revive_until: float = 0.8,
        shift: int = 1,
        seed: int = 0,
    ):
        super().__init__()
        self.model = VQModel(**model)
        self.codebook.requires_grad_(False)
        self.folder = Path(folder)
        self.learning_rate, self.warmup_steps, self.weight_decay = learning_rate, warmup_steps, weight_decay
        self.l1, self.commitment, self.rate, self.continuous_steps = l1, commitment, rate, continuous_steps
        self.codebook_decay, self.revive_below, self.revive_until = codebook_decay, revive_below, revive_until
        self.shift, self.seed = shift, seed
        # Moving averages: how many latents of a batch chose each code, and their sum. All 0 until the codebook starts.
        self.register_buffer("count_V", torch.zeros(self.codebook.shape[0]))
        self.register_buffer("sum_VD", torch.zeros_like(self.codebook))
        self.register_buffer("validation_count_V", torch.zeros(self.codebook.shape[0]), persistent=False)
        self.register_buffer("picture_size_2", torch.zeros(2, dtype=torch.int64))  # height, width

    @property
    def codebook(self) -> Tensor:
        """The codes, float32 [V, D]."""
        return self.model.quantize.embedding.weight

    def training_step(self, pixels_BCHW: Tensor, batch_idx: int) -> Tensor:
        self.picture_size_2.copy_(torch.tensor(pixels_BCHW.shape[2:]))
        generator = generator_for(self.seed, _SHIFTS, self.global_step, self.global_rank)
        signal_BCHW = _shifted(to_signal(pixels_BCHW), self.shift, generator)
        latents_BDhw = self.model.encode(signal_BCHW).latents
        if self.global_step < self.continuous_steps:
            quantized_BDhw, commitment = latents_BDhw, latents_BDhw.new_zeros(())
            entropy = commitment
        else:
            quantized_BDhw, commitment = self._quantize(latents_BDhw)
            entropy = _entropy_by_place(latents_BDhw, self.codebook) if self.rate else commitment.new_zeros(())
        restored_BCHW = self._restore(quantized_BDhw)
        reconstruction = F.mse_loss(restored_BCHW, signal_BCHW) + self.l1 * F.l1_loss(restored_BCHW, signal_BCHW)
        loss = reconstruction + self.commitment * commitment + self.rate * entropy
        self.log_dict({"train/loss": loss, "train/reconstruction": reconstruction}, prog_bar=True)
        self.log_dict({"train/commitment": commitment, "train/entropy": entropy})
        self._log_codebook("train", self.count_V)
        return loss

    def validation_step(self, pixels_BCHW: Tensor, batch_idx: int) -> None:
        signal_BCHW = to_signal(pixels_BCHW)
        quantized_BDhw, _, (_, _, ids) = self.model.quantize(self.model.encode(signal_BCHW).latents)
        restored_BCHW = self._restore(quantized_BDhw).clamp(-1, 1)
        error_B = (restored_BCHW - signal_BCHW).square().mean((1, 2, 3)) / 4
        psnr = (-10 * error_B.clamp_min(1e-10).log10()).mean()
        self.log("val/psnr", psnr, prog_bar=True, batch_size=len(pixels_BCHW), sync_dist=True)
        self.validation_count_V += torch.bincount(ids.flatten(), minlength=len(self.validation_count_V))
        if batch_idx == 0 and isinstance(self.logger, TensorBoardLogger) and self.trainer.is_global_zero:
            pairs_BCHW = torch.cat([signal_BCHW[:16], restored_BCHW[:16]], dim=2)  # one above the other
            strip_CHW = torch.cat(list((pairs_BCHW + 1) / 2), dim=2)
            self.logger.experiment.add_image("reconstructions", strip_CHW, self.global_step)

    def on_validation_epoch_end(self) -> None:
        self._log_codebook("val", self.trainer.strategy.reduce(self.validation_count_V, reduce_op="sum"))
        self.validation_count_V.zero_()

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self.learning_rate, (0.9, 0.99), weight_decay=self.weight_decay)

        # Not by `estimated_stepping_batches`: it opens the data before a checkpoint's place in them is restored.
        def factor(step: int) -> float:
            decay = 0.5 + 0.5 * math.cos(math.pi * progress(self.trainer, step))
            return min(1.0, (step + 1) / max(1, self.warmup_steps)) * decay

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            write_model(self.model, self.folder)
            write_settings(self.folder, *self.picture_size_2.tolist())

    def _restore(self, quantized_BDhw: Tensor) -> Tensor:
        guide = quantized_BDhw if self.model.config["norm_type"] == "spatial" else None
        return self.model.decoder(self.model.post_quant_conv(quantized_BDhw), guide)

    def _quantize(self, latents_BDhw: Tensor) -> tuple[Tensor, Tensor]:
        """Latents to codes, straight through, with the commitment loss; the codebook follows them."""
        own_ND = latents_BDhw.detach().permute(0, 2, 3, 1).flatten(0, 2).float()
        latents_ND = cast(Tensor, self.all_gather(own_ND)).reshape(
            -1, own_ND.shape[1]
        )  # every rank makes the same update
        generator = generator_for(self.seed, _CODES, self.global_step)
        if not self.count_V.any():
            self._start_codebook(latents_ND, generator)
        quantized_BDhw, _, _ = self.model.quantize(latents_BDhw)
        commitment = F.mse_loss(latents_BDhw, latents_BDhw.detach() + (quantized_BDhw - latents_BDhw).detach())
        self._follow(latents_ND, generator)
        return quantized_BDhw, commitment

    def _start_codebook(self, latents_ND: Tensor, generator: torch.Generator) -> None:
        """k-means: 10 rounds from random latents."""
        count = len(self.codebook)
        self.codebook.copy_(latents_ND[_draw(torch.ones(len(latents_ND)), count, generator)])
        for _ in range(10):
            count_V, sum_VD, distance_N = self._assign(latents_ND)
            self.codebook.copy_(sum_VD / count_V.clamp_min(1)[:, None])
            if empty := int((count_V == 0).sum()):
                self.codebook[count_V == 0] = latents_ND[_draw(distance_N.square(), empty, generator)]
        self.count_V.fill_(len(latents_ND) / count)
        self.sum_VD.copy_(self.codebook * self.count_V[:, None])

    def _follow(self, latents_ND: Tensor, generator: torch.Generator) -> None:
        """One step of the moving averages; codes out of use move to latents that are badly served."""
        count_V, sum_VD, distance_N = self._assign(latents_ND)
        self.count_V.lerp_(count_V, 1 - self.codebook_decay)
        self.sum_VD.lerp_(sum_VD, 1 - self.codebook_decay)
        self.codebook.copy_(self.sum_VD / self.count_V.clamp_min(1e-5)[:, None])
        average = len(latents_ND) / len(self.codebook)
        dead_V = self.count_V < self.revive_below * average
        if progress(self.trainer, self.global_step) < self.revive_until and dead_V.any():
            self.codebook[dead_V] = latents_ND[_draw(distance_N.square(), int(dead_V.sum()), generator)]
            self.count_V[dead_V] = average
            self.sum_VD[dead_V] = self.codebook[dead_V] * average

    def _assign(self, latents_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many latents choose each code, their sum, and how far each is from its code."""
        distance_N, ids_N = torch.cdist(latents_ND, self.codebook).min(1)
        count_V = torch.bincount(ids_N, minlength=len(self.codebook)).float()
        return count_V, torch.zeros_like(self.codebook).index_add_(0, ids_N, latents_ND), distance_N

    def _log_codebook(self, stage: str, count_V: Tensor) -> None:
        """Usage counts a code from a tenth of a use on: moving averages never reach 0."""
        share_V = count_V / count_V.sum().clamp_min(1e-9)
        perplexity = torch.special.entr(share_V).sum().exp()
        usage = (count_V > 0.1).float().mean()
        self.log_dict({f"{stage}/codebook_usage": usage, f"{stage}/codebook_perplexity": perplexity})


class PictureData(LightningDataModule):
    """The pictures that a data folder's `metadata.jsonl` names, each once, as uint8 [B, C, H, W].

    Files are read as `VQTokenizer.read` does; pictures of another size are scaled and cropped at the centre.

    Args:
        folder: the data folder.
        name: the name under which its segments hold pictures.
        channels: 1 for grey, 3 for RGB.
        height, width: pixels.
        batch_size: pictures of a batch, on each device.
        num_workers: processes that read ahead.
        seed: decides the order, together with the epoch.

    Raises:
        ValueError: the folder names no picture for training or validation, or one cannot be read; names it.
    """

    def __init__(
        self,
        folder: str,
        name: str = "image",
        channels: int = 1,
        height: int = 32,
        width: int = 32,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        if channels not in MODES:
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), not {channels}")
        self.folder, self.name, self.mode = Path(folder), name, MODES[channels]
        self.height, self.width = height, width
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def train_dataloader(self) -> StatefulDataLoader:
        pictures = self._pictures("train")
        batches = ShuffledBatches(len(pictures), self.batch_size, self.seed, *self._rank())
        return self._loader(pictures, batches)

    def val_dataloader(self) -> StatefulDataLoader:
        pictures, (rank, ranks) = self._pictures("validation"), self._rank()
        keys = [(0, index) for index in range(rank, len(pictures), ranks)]
        batches = [keys[start : start + self.batch_size] for start in range(0, len(keys), self.batch_size)]
        return self._loader(pictures, batches)

    def _loader(self, pictures: Dataset, batches: Any) -> StatefulDataLoader:
        alone = torch.Generator()  # leaves the global one alone
        return StatefulDataLoader(pictures, batch_sampler=batches, num_workers=self.num_workers, generator=alone)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _pictures(self, split: str) -> _Pictures:
        records = read_metadata(self.folder, [split])
        values = dict.fromkeys(value for record in records for name, value in record.segments if name == self.name)
        if not values:
            raise ValueError(f"{self.folder}/metadata.jsonl: no {self.name!r} in any document of split {split}")
        return _Pictures([self.folder / value for value in values], self.mode, (self.width, self.height))


class _Pictures(Dataset[Tensor]):
    def __init__(self, paths: list[Path], mode: str, size: tuple[int, int]):
        self.paths, self.mode, self.size = paths, mode, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        _, index = key  # the epoch makes no difference here
        return to_pixels(ImageOps.fit(convert(read_picture(self.paths[index]), self.mode), self.size))


def _draw(weight_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices in proportion to weight, with replacement; drawn on the CPU, alike on every kind of device."""
    return torch.multinomial(weight_N.cpu() + 1e-12, count, replacement=True, generator=generator)


def _entropy_by_place(latents_BDhw: Tensor, codebook_VD: Tensor) -> Tensor:
    """Mean over places of the entropy, nats, of the batch's codes there. A latent counts for code v with
    softmax(-distance² / τ), τ the mean squared distance to the nearest code."""
    latents_BND = latents_BDhw.flatten(2).transpose(1, 2).float()
    # Difference by difference: a matrix product would be rounded under autocast, and differences of large squares too.
    distance_BNV = (latents_BND[:, :, None] - codebook_VD).square().sum(-1)
    scale = distance_BNV.detach().amin(-1).mean().clamp_min(1e-6)
    share_NV = torch.softmax(-distance_BNV / scale, -1).mean(0)
    return -(share_NV * share_NV.clamp_min(1e-9).log()).sum(-1).mean()


def _shifted(signal_BCHW: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to `most` pixels each way, its edge repeated."""
    height, width = signal_BCHW.shape[2:]
    padded_BCHW = F.pad(signal_BCHW, (most,) * 4, mode="replicate")
    offsets = torch.randint(2 * most + 1, (len(signal_BCHW), 2), generator=generator).tolist()
    moved = [one[:, down : down + height, right : right + width]
             for one, (down, right) in zip(padded_BCHW, offsets, strict=True)]  # fmt: skip
    return torch.stack(moved)
