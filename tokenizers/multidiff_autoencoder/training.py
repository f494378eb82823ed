"""Base class for training an autoencoder with a codebook: optimizer, schedule, clipping and discriminator.

Shape suffixes: N latents, D width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from multidiff.training.optimizer import MuonAdamW
from multidiff.training.progress import progress


class AutoencoderTraining(LightningModule, ABC):
    """Base class for training a tokenizer. A subclass sets `self.model`, and may set `self.discriminator`.

    The tokenizer is written when the training reaches its end, also if it was resumed there. An interrupted training
    writes none.

    Args:
        folder: Folder for the trained tokenizer.
        learning_rate: Peak learning rate, after a linear warm-up. A cosine takes it to 0 at the end of the training.
        muon: Train weights of at least 8 rows and 8 columns with Muon, and the rest with AdamW; see
            `multidiff.training.MuonAdamW`. A convolution counts as a matrix [first axis, all others], and the first
            layer may be included. If false, AdamW trains everything. Muon tolerates a learning rate several times as
            large as AdamW's.
        momentum: First β of AdamW. The second is 0.99, and Muon's momentum is 0.95.
        warmup_steps: Number of steps of the warm-up.
        weight_decay: Decoupled weight decay of the autoencoder.
        commitment: Weight of the commitment loss, which pulls latents towards their codes.
        continuous_steps: Number of steps without a codebook at the start. Then the latents are worth clustering.
        codebook_decay: Decay of the codebook's moving averages per step.
        revive_below: Move codes that are used less than this fraction of the average.
        revive_until: Fraction of the training after which no code is moved any more.
        adversary: Weight of the adversarial loss; 0 trains no discriminator.
        adversary_from: Fraction of the training after which the adversarial loss is used.
        adversary_learning_rate: Constant learning rate of the discriminator, which AdamW trains.
        half_precision: Write the weights as float16 to halve their size. They are read as float32.
        seed: Random seed for everything that the trainer's `seed_everything` does not cover.
    """

    model: nn.Module
    discriminator: nn.Module | None

    def __init__(
        self,
        folder: str,
        learning_rate: float = 2e-3,
        muon: bool = False,
        momentum: float = 0.9,
        warmup_steps: int = 100,
        weight_decay: float = 1e-4,
        commitment: float = 0.25,
        continuous_steps: int = 100,
        codebook_decay: float = 0.99,
        revive_below: float = 0.1,
        revive_until: float = 0.8,
        adversary: float = 0.0,
        adversary_from: float = 0.5,
        adversary_learning_rate: float = 5e-4,
        half_precision: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if adversary < 0 or not 0 <= adversary_from <= 1:
            raise ValueError(
                f"adversary must be at least 0, and adversary_from from 0 to 1; got {adversary} and {adversary_from}"
            )
        self.discriminator = None
        self.folder = Path(folder)
        self.learning_rate, self.muon, self.momentum = learning_rate, muon, momentum
        self.warmup_steps, self.weight_decay = warmup_steps, weight_decay
        self.commitment, self.continuous_steps, self.codebook_decay = commitment, continuous_steps, codebook_decay
        self.revive_below, self.revive_until, self.seed = revive_below, revive_until, seed
        self.adversary, self.adversary_from = adversary, adversary_from
        self.adversary_learning_rate, self.half_precision = adversary_learning_rate, half_precision

    @property
    def opposed(self) -> bool:
        """Whether this step uses the discriminator."""
        return self.discriminator is not None and self.fraction_done >= self.adversary_from

    @property
    def fraction_done(self) -> float:
        """The fraction of the training that is done, from 0 to 1."""
        return progress(self.trainer, self.global_step)

    @property
    def reviving(self) -> float:
        """`revive_below` while unused codes are moved, then 0."""
        return self.revive_below if self.fraction_done < self.revive_until else 0.0

    @property
    @abstractmethod
    def started(self) -> bool:
        """Whether every codebook has been initialized from latents."""

    @abstractmethod
    def write_tokenizer(self) -> None:
        """Write the tokenizer into `self.folder`."""

    def on_fit_end(self) -> None:
        # Not on_train_end: Lightning skips that if a checkpoint is already at max_steps.
        if self.trainer.is_global_zero:
            self.write_tokenizer()
            rank_zero_info(f"Saved the tokenizer in {self.folder}.")
            if not self.started:
                rank_zero_warn(
                    f"The tokenizer in {self.folder} has an untrained codebook: the training ended before "
                    f"continuous_steps ({self.continuous_steps}). Raise max_steps."
                )

    def on_validation_start(self) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._tell_of_no_codebook()

    def on_test_start(self) -> None:
        self._tell_of_no_codebook()

    def _tell_of_no_codebook(self) -> None:
        if not self.started:
            rank_zero_info(
                f"The codebook is untrained. Its training starts after {self.continuous_steps} steps "
                "(continuous_steps). To evaluate a trained codebook, give a checkpoint with --ckpt_path."
            )

    def idle_discriminator(self) -> Tensor | float:
        """A loss of 0 that reaches all parameters of an unused discriminator, because DDP needs their gradients."""
        if self.discriminator is None or self.opposed:
            return 0.0
        return 0.0 * torch.stack([parameter.sum() for parameter in self.discriminator.parameters()]).sum()

    def gathered(self, latents_ND: Tensor) -> Tensor:
        """The detached latents of all ranks, so that every rank updates the codebooks in the same way."""
        gathered = self.all_gather(latents_ND.detach().float())
        assert isinstance(gathered, Tensor)
        return gathered.reshape(-1, latents_ND.shape[1])

    def configure_optimizers(self) -> Any:
        learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        common = {"lr": self.learning_rate, "weight_decay": self.weight_decay, "betas": (self.momentum, 0.99)}
        groups: list[dict[str, Any]] = [{"params": learned}]
        if self.muon:
            matrices = [parameter for parameter in learned if _is_matrix(parameter)]
            others = [parameter for parameter in learned if not _is_matrix(parameter)]
            groups = [{"params": matrices, "hidden": True}, {"params": others}]
        factors: list[Callable[[int], float]] = [self._factor] * len(groups)
        if self.discriminator is not None:
            opposing = list(self.discriminator.parameters())
            groups.append({"params": opposing, "lr": self.adversary_learning_rate, "weight_decay": 0.0})
            factors.append(lambda _: 1.0)
        optimizer = MuonAdamW(groups, ns_steps=3, **common) if self.muon else AdamW(groups, **common)
        schedule = LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _factor(self, step: int) -> float:
        """The factor of the learning rate: a linear warm-up times a cosine."""
        # `estimated_stepping_batches` would open the data before a checkpoint's position in them is restored.
        decay = 0.5 + 0.5 * math.cos(math.pi * progress(self.trainer, step))
        return min(1.0, (step + 1) / max(1, self.warmup_steps)) * decay

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Drop the zero gradients of an unused discriminator. With them AdamW would make its first steps too long."""
        if self.discriminator is not None and not self.opposed:
            for parameter in self.discriminator.parameters():
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of autoencoder and discriminator separately."""
        if not gradient_clip_val:
            return
        clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
        for module in (self.model, self.discriminator):
            if module is not None:
                clip(module.parameters(), gradient_clip_val)


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and min(parameter.flatten(1).shape) >= 8
