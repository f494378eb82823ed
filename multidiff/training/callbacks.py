"""Callbacks: averaged weights, previews, the saved model folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.optim.swa_utils import get_ema_multi_avg_fn

from multidiff import files
from multidiff.seeding import generator_for
from multidiff.tokenizer import Audio

if TYPE_CHECKING:
    from multidiff.generation import MultiDiffPipeline


class AveragedWeights(WeightAveraging):
    """An exponential moving average of the weights, w ← decay · w + (1 - decay) · live weights after each step.

    The average is what is validated, previewed and saved as the model; checkpoints hold both. Until averaging starts,
    the average is the live weights, so that a short run saves what it trained. Lightning's `EMAWeightAveraging` keeps
    the initial weights until then.

    Args:
        decay: in [0, 1).
        start_step: steps before averaging starts.

    Raises:
        ValueError: a value outside of these, or a strategy that shards the weights, whose whole average does not fit.
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0):
        if not 0 <= decay < 1 or start_step < 0:
            raise ValueError(f"decay {decay} must be in [0, 1), and start_step {start_step} at least 0")
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.start_step = start_step
        self._swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"AveragedWeights keeps a copy of all weights, which {type(trainer.strategy).__name__} shards. "
                "Remove the callback, or choose strategy ddp."
            )
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._average_model is not None
        if self._latest_update_step < trainer.global_step <= self.start_step:
            self._average_model.n_averaged.zero_()  # as at the first update, which copies
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module, True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Other callbacks still see the average, in whichever order they are listed."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module, False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap(pl_module, False)  # an interrupted validation

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Outside of training the average is all that counts, and it is the checkpoint's `state_dict`."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The live weights stay until everything is saved."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self._average_model is not None:
            self._copy_average_to_current(pl_module)
            self._average_model = None  # or a later test would read the live weights of a checkpoint

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[None]:
        """The module with the averaged weights in place of the live ones."""
        self._swap(pl_module, True)
        try:
            yield
        finally:
            self._swap(pl_module, False)

    def _swap(self, pl_module: LightningModule, swapped: bool) -> None:
        if self._average_model is not None and self._swapped != swapped:
            self._swap_models(pl_module)
            self._swapped = swapped


class SaveModel(Callback):
    """Writes the model folder when training ends, and `training.json` in it. The weights are the averaged ones if
    `AveragedWeights` is among the callbacks.

    An interrupted training writes no model: its checkpoint can be used as one.

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

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Here, not at the end of training: Lightning trains nothing where a finished run is continued."""
        if trainer.interrupted or not trainer.is_global_zero:
            return
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        with ExitStack() as stack:
            for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
                if isinstance(callback, AveragedWeights):
                    stack.enter_context(callback.averaged(pl_module))
            _pipeline(trainer, pl_module).save_pretrained(self.folder)
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

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
