"""Checkpoints of a training: whole files, one training in a folder, the last one of the state in which it ended."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from multidiff import files


class Checkpoints(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, for runs that are interrupted, continued and killed.

    - `last.ckpt` is always the state in which the training ended, at whichever of its limits, with Ctrl-C or with an
      error. Going on from it gives the run that would have been without the stop.
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
        self._goes_on = self._claimed = self._in_step = self._stopping = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        problem = None
        if trainer.is_global_zero and not self._claimed:
            try:
                self.claim(self._goes_on or (trainer.ckpt_path is not None and self._holds(trainer.ckpt_path)))
            except ValueError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):  # on every rank, or the others would wait for ever
            raise ValueError(problem)
        self._claimed = True
        # Of several processes each would stop after another step: there Ctrl-C stops at once.
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._stop_after_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._in_step = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._in_step = False
        if self._stopping and not trainer.fit_loop._should_accumulate():
            raise KeyboardInterrupt
        last = trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches
        limit = trainer.max_epochs
        if (
            trainer.should_stop
            or 0 <= trainer.max_steps <= trainer.global_step
            or (last and limit is not None and 0 <= limit <= trainer.current_epoch + 1)
        ):
            self._save_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.should_stop:
            self._save_end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.should_stop:
            self._save_end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._claimed:  # else the folder is another run's
            super().on_exception(trainer, pl_module, exception)
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _save_end(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._goes_on = state_dict["dirpath"] == self.dirpath
        super().load_state_dict(state_dict)

    def claim(self, goes_on: bool) -> None:
        """Take the folder for a run. Training does so when it starts; the command line does before data are prepared.

        Args:
            goes_on: whether the run continues the one whose checkpoints are there.
        """
        folder = Path(str(self.dirpath))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = files.lock_file(folder)
        except BlockingIOError:
            raise ValueError(
                f"another training is writing to {folder}. Wait for its end, or choose another folder."
            ) from None
        except OSError:  # some network file systems cannot lock
            self._lock = None
        files.remove_partial(folder / "*.ckpt")
        found = sorted(folder.glob("*.ckpt"))
        if found and not goes_on:
            if not self.overwrite:
                self._release()
                raise ValueError(
                    f"{folder} holds the checkpoints of another run. Continue that run with --ckpt_path {found[-1]}, "
                    "choose another folder, or remove its checkpoints with --overwrite true."
                )
            for path in found:
                path.unlink()
        self._claimed = True

    def _holds(self, path: str | Path) -> bool:
        return Path(path).resolve().parent == Path(str(self.dirpath)).resolve()

    def _release(self) -> None:
        self._claimed = False
        if self._lock is not None:
            files.unlock(self._lock)
            self._lock = None
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def _stop_after_step(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C in a step takes effect at its end, where training can be continued exactly."""
        if not self._in_step or self._stopping:
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
        with files.whole_file(Path(path)) as beside:
            torch.save(checkpoint, beside)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """The content of a checkpoint; `ValueError` naming the file where it is missing or damaged."""
        if "://" not in str(path):
            files.check_file(Path(path))
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except Exception as error:  # unpickling damaged files raises errors of a dozen types
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is damaged or is not a checkpoint of multidiff ({reason})") from None
