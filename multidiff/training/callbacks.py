"""Callbacks: averaged weights, previews, the saved model folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from multidiff import checkpoints, files
from multidiff.seeding import generator_for
from multidiff.tokenizer import Audio
from multidiff.training.optimizer import local_shard
from multidiff.training.sharding import whole_transformer

if TYPE_CHECKING:
    from multidiff.generation import MultiDiffPipeline


class AveragedWeights(Callback):
    """An exponential moving average of the weights, w ← decay · w + (1 - decay) · live weights after each step.

    The average is what is validated, previewed and saved as the model; checkpoints hold both, the average as
    `state_dict` and the live weights as `current_model_state`. Until averaging starts, the average is the live weights,
    so that a short run saves what it trained. Lightning's `EMAWeightAveraging` keeps the initial weights until then. A
    device that holds a part of the weights averages this part.

    Args:
        decay: in [0, 1).
        start_step: steps before averaging starts.

    Raises:
        ValueError: a value outside of these, or DeepSpeed, which keeps the weights where no callback sees them.
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0):
        if not 0 <= decay < 1 or start_step < 0:
            raise ValueError(f"decay {decay} must be in [0, 1), and start_step {start_step} at least 0")
        self.decay, self.start_step = decay, start_step
        self._average: dict[str, Tensor] = {}  # by name; empty outside of training
        self._latest_step = 0  # at which it was updated
        self._swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "AveragedWeights cannot average weights that DeepSpeed holds. Remove the callback, or choose strategy "
                "ddp or fsdp2."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, weight in pl_module.named_parameters():  # those of a checkpoint may still be on another device
            self._average[name] = self._average.get(name, weight).detach().to(weight, copy=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step <= self._latest_step:  # a batch that was accumulated
            return
        self._latest_step = trainer.global_step
        average, live = self._pairs(pl_module)
        with torch.no_grad():
            if trainer.global_step <= max(1, self.start_step):
                torch._foreach_copy_(average, live)
            else:
                torch._foreach_lerp_(average, live, 1 - self.decay)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module, True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not at the end of the epoch: until here other callbacks see the average, in whichever order they are
        listed."""
        self._swap(pl_module, False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap(pl_module, False)  # an interrupted validation

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average:
            checkpoint["current_model_state"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = checkpoint["state_dict"] | self._average

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Outside of training the average is all that counts, and it is the checkpoint's `state_dict`."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if "current_model_state" not in checkpoint:
            rank_zero_warn("The checkpoint was written without AveragedWeights. The average begins with its weights.")
        self._average = {name: checkpoint["state_dict"][name].clone() for name, _ in pl_module.named_parameters()}
        pl_module.load_state_dict(checkpoint.get("current_model_state", checkpoint["state_dict"]))

    def state_dict(self) -> dict[str, Any]:
        return {"latest_step": self._latest_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest_step = state_dict["latest_step"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The module keeps the average. The live weights stay until everything is saved."""
        if stage == "fit":
            self._swap(pl_module, True)
            self._average, self._latest_step, self._swapped = (
                {},
                0,
                False,
            )  # or a later test would read the live weights of a checkpoint

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[None]:
        """The module with the averaged weights in place of the live ones."""
        self._swap(pl_module, True)
        try:
            yield
        finally:
            self._swap(pl_module, False)

    def _swap(self, pl_module: LightningModule, swapped: bool) -> None:
        if self._average and self._swapped != swapped:
            with torch.no_grad():
                for average, live in zip(*self._pairs(pl_module), strict=True):
                    kept = average.clone()
                    average.copy_(live)
                    live.copy_(kept)
            self._swapped = swapped

    def _pairs(self, pl_module: LightningModule) -> tuple[list[Tensor], list[Tensor]]:
        """What this device holds of the averaged and the live weights."""
        weights = dict(pl_module.named_parameters())
        return [local_shard(self._average[name]) for name in weights], [
            local_shard(weight.detach()) for weight in weights.values()
        ]


class SaveModel(Callback):
    """Writes the model folder when training ends, and `training.json` in it. The weights are the averaged ones if
    `AveragedWeights` is among the callbacks.

    An interrupted training writes no model: its checkpoint can be used as one. Where devices share the weights, the
    first process gathers them in the memory of its CPU.

    Args:
        folder: as `MultiDiffPipeline.from_pretrained` takes it.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.samples_seen = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.samples_seen += batch.num_documents * trainer.world_size

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Here, not at the end of training: Lightning trains nothing where a finished run is continued."""
        if trainer.interrupted or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        with ExitStack() as stack:
            for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
                if isinstance(callback, AveragedWeights):
                    stack.enter_context(callback.averaged(pl_module))
            whole = whole_transformer(pl_module.transformer)
            if not trainer.is_global_zero or whole is None:
                return
            parts = replace(_pipeline(trainer, pl_module).parts, transformer=whole)
            checkpoints.save(parts, self.folder)
        timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # pyright: ignore[reportAttributeAccessIssue]
        record = {
            "steps": trainer.global_step,
            "samples_seen": self.samples_seen,
            "seconds": round(timers[0].time_elapsed(), 1) if timers else None,
        }
        files.write_json(self.folder / "training.json", record)
        rank_zero_info(f"Saved the model in {self.folder}.")

    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self.samples_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples_seen = state_dict["samples_seen"]


class Previews(Callback):
    """Samples to TensorBoard after each validation: for every tokenizer, what the model makes of documents of the
    validation split with that tokenizer's segments blanked out.

    Args:
        num_samples: documents per tokenizer.
        every_n_validations: how often.
    """

    def __init__(self, num_samples: int = 8, every_n_validations: int = 1):
        self.num_samples, self.every_n_validations = num_samples, every_n_validations
        self._validations = 0

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """In the first process; in all of them where they share the weights, for each pass needs all, and a step of
        the same samples takes the same passes everywhere."""
        if not trainer.is_global_zero and not pl_module.transformer.is_sharded:
            return
        if trainer.sanity_checking or not isinstance(trainer.logger, TensorBoardLogger):
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        pipeline = _pipeline(trainer, pl_module)
        pipeline.set_progress_bar_config(disable=True)
        for name in pipeline.tokenizers:
            self._log(trainer, pipeline, name)

    def _log(self, trainer: Trainer, pipeline: MultiDiffPipeline, name: str) -> None:
        from multidiff.generation import Blank, Masked

        documents = trainer.datamodule.documents("validation")  # pyright: ignore[reportAttributeAccessIssue]
        blanked = []
        for index in range(len(documents)):
            codes = documents.codes(index)
            names = [other for other, _ in codes]
            if names.count(name) == 1 and len(names) > 1:
                # The codes themselves: decoding and encoding again would give others.
                blanked.append(
                    [
                        Blank(other) if other == name else Masked(other, code, torch.ones(len(code), dtype=torch.bool))
                        for other, code in codes
                    ]
                )
            if len(blanked) == self.num_samples:
                break
        if not blanked:
            return
        generators = [generator_for(0, "previews", index) for index in range(len(blanked))]
        output = pipeline(blanked, generator=generators)
        if not trainer.is_global_zero:
            return
        writer, step = trainer.logger.experiment, trainer.global_step  # pyright: ignore
        for index, document in enumerate(output.documents):
            for place, part in enumerate(document):
                made = part.tokenizer == name
                tag = f"{name}/{index}/{'made' if made else f'given {part.tokenizer} {place}'}"
                _show(writer, tag, part.item, pipeline.tokenizers[part.tokenizer], step)


def _show(writer: Any, tag: str, item: Any, tokenizer: Any, step: int) -> None:
    if isinstance(item, str):
        writer.add_text(tag, item, step)
        return
    writer.add_image(tag, np.asarray(tokenizer.preview(item).convert("RGB")), step, dataformats="HWC")
    if isinstance(item, Audio) and item.waveform.numel():
        writer.add_audio(f"{tag} sound", item.waveform.mean(0, keepdim=True), step, sample_rate=item.sample_rate)


def _pipeline(trainer: Trainer, pl_module: Any) -> MultiDiffPipeline:
    from multidiff.generation import MultiDiffPipeline

    tokenizers: Mapping[str, Any] = trainer.datamodule.tokenizers  # pyright: ignore[reportAttributeAccessIssue]
    return MultiDiffPipeline.from_module(pl_module, tokenizers)
