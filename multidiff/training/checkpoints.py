"""Checkpoints of a training: whole files, one training in a folder, the last one of the state in which it ended."""

from __future__ import annotations

import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info

from multidiff import files
from multidiff.checkpoints.lightning import read_file
from multidiff.checkpoints.sharded import is_sharded, read_checkpoint


class Checkpoints(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, for runs that are interrupted, continued and killed.

    - `last.ckpt` is the state in which the training ended: at one of its limits, by early stopping, or with Ctrl-C,
      which takes effect at the end of a step. Going on from it gives the run that would have been without the stop.
      After an error, a single process saves what it trained until then. Of several processes none does, for the others
      may wait where they cannot save; the first one ends those that it has started.
    - A file is whole or absent (`WholeFiles`), also after `kill -9` and on a full disk.
    - The folder holds one run. A new run refuses a folder that holds another one's checkpoints, unless it continues
      one of these or `overwrite` is set; and no run starts while another one is writing there.

    Args:
        dirpath: the folder.
        overwrite: remove the checkpoints of an earlier run when a new one starts.
        save_last: keep `last.ckpt`.
        save_on_exception: also save when an error or Ctrl-C ends the training.
        **kwargs: as `ModelCheckpoint` has them.

    Raises:
        ValueError: `dirpath` holds another run, or one is running there.
    """

    def __init__(
        self,
        dirpath: str,
        overwrite: bool = False,
        save_last: bool = True,
        save_on_exception: bool = True,
        **kwargs: Any,
    ):
        super().__init__(
            dirpath=dirpath,
            save_last=save_last,
            save_on_exception=save_on_exception,
            enable_version_counter=False,
            **kwargs,
        )
        self.overwrite = overwrite
        self._lock: int | None = None
        self._handler: Any = None
        self._loader: Any = None
        self._forget()

    def _forget(self) -> None:
        """As before a run."""
        self._continues = self._claimed = self._postponed = self._torn = False
        self._stopping = self._leaving = False
        self._ended_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step  # it came from a checkpoint, or nothing has happened yet
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]  # which writes nothing
            return
        problem = None
        if trainer.is_global_zero:
            continues = self._continues or (trainer.ckpt_path is not None and self._holds(trainer.ckpt_path))
            try:
                if not self._claimed:
                    self.claim(continues)
                if self.overwrite and not continues:
                    for path in Path(str(self.dirpath)).glob("*.ckpt"):
                        files.remove(path)
            except (ValueError, OSError) as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):  # on every rank, or the others would wait for ever
            raise ValueError(problem)
        self._claimed = True
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, lambda *_: self._interrupt(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():  # what is accumulated is in no checkpoint
            self._postponed |= trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop |= self._postponed
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        loader = trainer.fit_loop._combined_loader
        self._loader = None if loader is None else loader._state_dicts()
        stopping = self._stopping
        if trainer.world_size > 1:  # all of them after the same step
            stopping = trainer.strategy.reduce_boolean_decision(stopping, all=False)
        if stopping:
            self._save_end(trainer)
            self._leaving = True  # at the next hook, when Lightning has logged this step
            return
        last = trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches
        limit = trainer.max_epochs
        if (
            self._stops(trainer)
            or 0 <= trainer.max_steps <= trainer.global_step
            or (last and limit is not None and 0 <= limit <= trainer.current_epoch + 1)
        ):
            self._save_end(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._leave()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()
        super().on_train_epoch_end(trainer, pl_module)
        if self._stops(trainer):
            self._save_end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._stops(trainer):
            self._save_end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            if self._claimed and self._should_save_on_exception(trainer) and self._is_whole(trainer):
                if trainer.validating:
                    self._begin_validation_again(trainer)
                self._torn = True
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
                rank_zero_info(f"Saved {self.last_model_path} after {type(exception).__name__}.")
        finally:
            self._release()
            if isinstance(launcher := trainer.strategy.launcher, _SubprocessScriptLauncher):
                launcher.kill(signal.SIGKILL)  # Lightning's handler of other signals waits for the end of a step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct what Lightning saves in the middle of a step: the loader has handed out a batch that was not trained
        on, and the loop counts a step more when it goes on."""
        if self._torn and not trainer.validating:
            loops = checkpoint["loops"]["fit_loop"]
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
            if self._loader is not None:
                loops["state_dict"]["combined_loader"] = self._loader

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            self._save_end(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._continues = state_dict["dirpath"] == self.dirpath
        super().load_state_dict(state_dict)

    def claim(self, continues: bool) -> None:
        """Take the folder for a run. Training does so when it starts; the command line does before data are prepared.

        Args:
            continues: whether the run continues the one whose checkpoints are there.
        """
        folder = Path(str(self.dirpath))
        if "://" in str(self.dirpath):  # storage without locks
            self._claimed = True
            return
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = files.lock_file(folder)
        except BlockingIOError:
            raise ValueError(
                f"another training is writing to {folder}. Wait for its end, or choose another folder."
            ) from None
        files.remove_partial(folder / "*.ckpt")
        found = sorted(folder.glob("*.ckpt"), key=lambda path: (path.name == "last.ckpt", path.stat().st_mtime))
        if found and not continues and not self.overwrite:
            self._release()
            raise ValueError(
                f"{folder} holds the checkpoints of another run. Continue that run with --ckpt_path {found[-1]}, "
                "choose another folder, or remove its checkpoints with --overwrite true."
            )
        self._claimed = True

    def _leave(self) -> None:
        if self._leaving:
            raise KeyboardInterrupt

    def _stops(self, trainer: Trainer) -> bool:
        return trainer.should_stop and trainer.fit_loop._can_stop_early

    def _save_end(self, trainer: Trainer) -> None:
        """Save `last.ckpt`. A validation that follows may still save what it finds best."""
        if self._ended_at != trainer.global_step and not self._should_skip_saving_checkpoint(trainer):
            before = self._last_global_step_saved
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved, self._ended_at = before, trainer.global_step

    def _should_save_on_exception(self, trainer: Trainer) -> bool:
        return self._ended_at != trainer.global_step and super()._should_save_on_exception(trainer)

    def _begin_validation_again(self, trainer: Trainer) -> None:
        """Count as Lightning does in an interrupted validation, but with no batch done, for their sums are lost."""
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        total: Any = progress.total
        total.processed = total.completed
        total.ready = total.started = total.completed + 1
        progress.current.reset()

    def _is_whole(self, trainer: Trainer) -> bool:
        """Whether the state can be saved by this process alone, and no step is half done."""
        step = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        return trainer.world_size == 1 and step.ready == step.completed

    def _holds(self, path: str | Path) -> bool:
        return Path(path).resolve().parent == Path(str(self.dirpath)).resolve()

    def _release(self) -> None:
        files.unlock(self._lock)
        self._lock = None
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None
        self._forget()

    def _interrupt(self, trainer: Trainer) -> None:
        """Ctrl-C takes effect at the end of a step, where training can be continued exactly; in validation at once."""
        if trainer.validating or self._stopping:
            raise KeyboardInterrupt
        self._stopping = True
        rank_zero_info("Stopping after this step. Press Ctrl-C again to stop at once.")


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it to the disk and renames it; reads no pickled code.

    Lightning's own writes to the folder for temporary files and moves the result. Where that is on another file
    system, moving means copying, and a kill in between leaves half a checkpoint in place of a whole one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        with files.whole_file(path) as beside, files.naming(path):
            try:
                torch.save(checkpoint, beside)
            except RuntimeError as error:  # as torch says that a disk is full
                free = shutil.disk_usage(path.parent).free
                raise ValueError(f"{path} cannot be written; {free:,} bytes are free on its disk") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """The content of a checkpoint, of a sharded training as well.

        Raises:
            ValueError: it is missing or damaged; the message names it.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(Path(path)) if is_sharded(Path(path)) else read_file(Path(path))
