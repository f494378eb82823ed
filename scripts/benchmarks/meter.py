"""Measures a training in rounds of about a second, between which matrix products take their turn.

Other work on the machine slows both down alike, as the best of many short products and a long step would not be."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.profilers import Profiler

from multidiff.models import forward_flops

_ROUND = 1.0  # seconds of a round, at least
_SKIPPED = 2  # rounds in which shapes and memory are met for the first time
_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Round:
    """What some steps did.

    Attributes:
        seconds: what they took.
        waited: seconds of these in which the training waited for its loader.
        steps, documents, tokens, flops: how many.
        product_seconds, product_flops: what matrix products took right after, and did.
    """

    seconds: float = 0.0
    waited: float = 0.0
    steps: int = 0
    documents: int = 0
    tokens: int = 0
    flops: int = 0
    product_seconds: float = 0.0
    product_flops: int = 0


class Waits(Profiler):
    """`seconds`: how long the training waited for its loader."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._begun = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._begun = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self.seconds += time.perf_counter() - self._begun

    def summary(self) -> str:
        return f"waited {self.seconds:.1f} s for the loader"


class Meter(Callback):
    """Ends the training after so many rounds. The device is waited for between rounds only.

    Args:
        rounds: to measure, besides those that warm up.

    Attributes:
        measured: the rounds of the last training in this process.
        peak_bytes: the most memory that it took: of the GPU, or else of the process.
        device_name: where it ran.
    """

    measured: Sequence[Round] = ()
    peak_bytes: int = 0
    device_name: str = ""

    def __init__(self, rounds: int):
        self._left = rounds + _SKIPPED
        self._waits = Waits()
        self._rounds: list[Round] = []
        self._round, self._begun, self._waited = Round(), 0.0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.profiler = self._waits  # pyright: ignore[reportAttributeAccessIssue]
        self._device = trainer.strategy.root_device
        if self._device.type == "cuda":
            Meter.device_name = torch.cuda.get_device_name(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        Meter.device_name = f"{self._device.type}, {torch.get_num_threads()} threads"
        if _REFERENCES.exists():
            _REFERENCES.write_text("5")  # forget the peak of this process

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        size = 2048 if self._device.type == "cpu" else 8192
        dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
        self._factor = torch.ones(size, size, device=self._device, dtype=dtype)
        self._begun = self._now()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        one = self._round
        one.steps += 1
        one.documents += batch.num_documents
        one.tokens += int(batch.document_starts[-1])
        positions = batch.logit_positions(pl_module.vocabulary)
        one.flops += 3 * forward_flops(pl_module.transformer, batch.document_starts, positions, batch.blocks)
        if time.perf_counter() - self._begun < _ROUND:
            return
        one.seconds, one.waited = self._now() - self._begun, self._waits.seconds - self._waited
        self._multiply(one)
        self._rounds.append(one)
        if len(self._rounds) == self._left:
            Meter.measured, Meter.peak_bytes = self._rounds[_SKIPPED:], _peak_bytes(self._device)
            trainer.should_stop = True
        self._round, self._begun, self._waited = Round(), self._now(), self._waits.seconds

    def _multiply(self, one: Round) -> None:
        """Matrix products for a quarter of the time of the round."""
        begun = self._now()
        while one.product_seconds < one.seconds / 4:
            torch.mm(self._factor, self._factor)
            one.product_seconds = self._now() - begun
            one.product_flops += 2 * len(self._factor) ** 3

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
