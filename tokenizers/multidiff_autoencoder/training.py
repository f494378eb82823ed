"""What the training of every autoencoder with a codebook shares: optimizer, schedule, clipping, the adversary's turn.

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

from multidiff.training.callbacks import progress
from multidiff.training.optimizer import MuonAdamW


class AutoencoderTraining(LightningModule, ABC):
    """Base of the trainings of tokenizers; a subclass sets `self.model`, and `self.discriminator` where it has one.

    A training that has come to its end writes the tokenizer, also one that was resumed there; an interrupted one does
    not.

    Args:
        folder: where the trained tokenizer goes.
        learning_rate: peak; linear warm-up, then a cosine down to 0 at the end of the training.
        muon: Muon for weights of at least 8 rows and 8 columns (of a convolution [first axis, all others]; the first
            layer may be among them) and AdamW for the rest of the autoencoder, as `multidiff.training.MuonAdamW` has
            them; AdamW for all otherwise. Muon bears several times AdamW's learning rate.
        momentum: AdamW's first β; the second is 0.99, Muon's momentum 0.95.
        warmup_steps: length of the warm-up.
        weight_decay: of the autoencoder, decoupled.
        commitment: weight of the pull of latents towards their codes.
        continuous_steps: steps before a learned codebook comes in, so that there is something worth clustering.
        codebook_decay: of the codebook's moving averages, per step.
        revive_below: a code used less than this share of the average use is moved ...
        revive_until: ... in this first share of the training, so that the rest can settle.
        adversary: weight of the discriminator; 0 trains none.
        adversary_from: share of the training after which it sets in.
        adversary_learning_rate: AdamW's for the discriminator, constant: when it sets in, the other has come down.
        half_precision: write the weights as float16, in half the bytes; they are read as float32 all the same.
        seed: decides everything that the trainer's `seed_everything` does not.
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
            raise ValueError(f"adversary {adversary} must be 0 or more, adversary_from {adversary_from} within 0 … 1")
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
        """Whether the discriminator takes part in this step."""
        return self.discriminator is not None and self.fraction_done >= self.adversary_from

    @property
    def fraction_done(self) -> float:
        """How far the training has come, 0 to 1."""
        return progress(self.trainer, self.global_step)

    @property
    def reviving(self) -> float:
        """`revive_below` as long as codes are moved, then 0."""
        return self.revive_below if self.fraction_done < self.revive_until else 0.0

    @property
    @abstractmethod
    def started(self) -> bool:
        """Whether every codebook has been set from latents."""

    @abstractmethod
    def write_tokenizer(self) -> None:
        """Write the tokenizer into `self.folder`."""

    def on_fit_end(self) -> None:
        # Not on_train_end: Lightning leaves it out where a checkpoint is at max_steps already.
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
                f"The codebook has not been trained, for training starts it after {self.continuous_steps} steps "
                "(continuous_steps). Name a checkpoint with --ckpt_path to evaluate a trained one."
            )

    def idle_discriminator(self) -> Tensor | float:
        """0, with a gradient for each parameter of the discriminator, which DDP wants, while it does not take part."""
        if self.discriminator is None or self.opposed:
            return 0.0
        return 0.0 * torch.stack([parameter.sum() for parameter in self.discriminator.parameters()]).sum()

    def gathered(self, latents_ND: Tensor) -> Tensor:
        """Latents of all ranks, without gradient: every rank makes the same update of the codebooks."""
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
        """Of the learning rate, by warm-up and cosine."""
        # Not by `estimated_stepping_batches`: it opens the data before a checkpoint's place in them is restored.
        decay = 0.5 + 0.5 * math.cos(math.pi * progress(self.trainer, step))
        return min(1.0, (step + 1) / max(1, self.warmup_steps)) * decay

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """AdamW's moments of the discriminator begin when it sets in: zeros before make its first steps too long."""
        if self.discriminator is not None and not self.opposed:
            for parameter in self.discriminator.parameters():
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Autoencoder and discriminator each by themselves."""
        if not gradient_clip_val:
            return
        clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
        for module in (self.model, self.discriminator):
            if module is not None:
                clip(module.parameters(), gradient_clip_val)


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and min(parameter.flatten(1).shape) >= 8
