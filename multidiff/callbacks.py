"""Callbacks: previews, the saved model folder, throughput; and how far a training has come."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from multidiff.seeding import generator_for
from multidiff.tokenizer import Audio

if TYPE_CHECKING:
    from multidiff.pipeline import MultiDiffPipeline


def progress(trainer: Trainer, step: int) -> float:
    """How far a training is on its way, 0 to 1, by whichever of the trainer's limits it is nearest to.

    With `max_time` the learning rate follows the clock, so that a slower machine anneals fully as well.
    """
    parts = [0.0]
    if trainer.max_steps > 0:
        parts.append(step / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and np.isfinite(trainer.num_training_batches):
        steps = trainer.max_epochs * trainer.num_training_batches / trainer.accumulate_grad_batches
        parts.append(step / max(1.0, steps))
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None:
            elapsed = callback.time_elapsed()
            # Every rank by the first one's clock: replicas that differ in learning rate drift apart.
            parts.append(trainer.strategy.broadcast(elapsed / max(1e-9, elapsed + left)))
    return min(1.0, max(parts))


class SaveModel(Callback):
    """Writes the model folder, averaged weights and all, when training ends; and `training.json` beside its card.

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
        if trainer.interrupted:
            return
        if isinstance(trainer.checkpoint_callback, ModelCheckpoint) and trainer.checkpoint_callback.save_last:
            # The end of a training lies between two periodic checkpoints: `last` is to be the model that is saved.
            trainer.save_checkpoint(Path(str(trainer.checkpoint_callback.dirpath)) / "last.ckpt")
        if not trainer.is_global_zero:
            return
        _pipeline(trainer, pl_module).save_pretrained(self.folder)
        timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # pyright: ignore[reportAttributeAccessIssue]
        record = {
            "steps": trainer.global_step,
            "samples_seen": self.samples_seen,
            "seconds": round(timers[0].time_elapsed(), 1) if timers else None,
        }
        partial = self.folder / "training.json.partial"
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.folder / "training.json")
        rank_zero_info(f"Saved the model in {self.folder}.")

    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self.samples_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples_seen = state_dict["samples_seen"]


class Previews(Callback):
    """Samples to TensorBoard after each validation: for every tokenizer, what the model makes of documents of the
    validation split with that tokenizer's segments blanked out.

    Put it before a weight-averaging callback in the list, so that it sees the averaged weights.

    Args:
        num: documents per tokenizer.
        every_n_validations: how often.
    """

    def __init__(self, num: int = 8, every_n_validations: int = 1):
        self.num, self.every_n_validations = num, every_n_validations
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
        training = pl_module.training
        pl_module.eval()
        for name in pipeline.tokenizers:
            self._log(trainer, pipeline, name)
        pl_module.train(training)

    def _log(self, trainer: Trainer, pipeline: MultiDiffPipeline, name: str) -> None:
        from multidiff.pipeline import Blank, Partial

        documents = trainer.datamodule.documents("validation")  # pyright: ignore[reportAttributeAccessIssue]
        blanked = []
        for index in range(len(documents)):
            codes = documents.codes(index)
            names = [other for other, _ in codes]
            if names.count(name) == 1 and len(names) > 1:
                # The codes themselves: decoding and encoding again would give others.
                blanked.append(
                    [
                        Blank(other) if other == name else Partial(other, code, torch.ones(len(code), dtype=torch.bool))
                        for other, code in codes
                    ]
                )
            if len(blanked) == self.num:
                break
        if not blanked:
            return
        generators = [generator_for(0, index) for index in range(len(blanked))]
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
    from multidiff.pipeline import MultiDiffPipeline

    tokenizers: Mapping[str, Any] = trainer.datamodule.tokenizers  # pyright: ignore[reportAttributeAccessIssue]
    return MultiDiffPipeline(pl_module.transformer, pl_module.vocabulary, tokenizers, pl_module.samplers)
