"""What a training gets done in a second, in its progress bar and its logs."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.fabric.utilities.throughput import Throughput as Rates
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype

from multidiff.models import forward_flops
from multidiff.training.peak import peak_flops


class Throughput(Callback):
    """Logs what the training did in a second since it logged last, at every `log_every_n_steps`-th step.

    - `tokens/s` and `documents/s`: of all devices together. A token is what the transformer reads, `<bos>` and the
      tokens around segments among them, and both copies where block diffusion trains on two.
    - `TFLOP/s`: the operations of the model, three times those of `multidiff.models.forward_flops`, of all devices
      together, in 10¹² a second. What gradient checkpointing repeats is not counted.
    - `MFU`: these operations as a share of what matrix products of the training's precision reach on its devices
      (model FLOPs utilization; Chowdhery et al. 2022, PaLM, arXiv 2204.02311, section 4.1). On an NVIDIA GPU that is in
      the table of `multidiff.training.peak`, the share is of NVIDIA's number; elsewhere of a product that is measured
      when training starts.

    Validation does not count, loading and checkpoints do. The device is waited for only at steps that are logged.
    `MaskedDiffusionModule` adds this callback to its trainer. List it yourself to set `peak_tflops`.

    Args:
        peak_tflops: what matrix products reach on one device, in 10¹² operations a second; None takes it from the table
            or measures it.
    """

    def __init__(self, peak_tflops: float | None = None):
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"peak_tflops must be more than 0, or null to find it out, got {peak_tflops}")
        self.peak_tflops = peak_tflops
        self._rates = Rates()
        self._begun = self._paused = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.peak_tflops is None:
            dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
            peak = peak_flops(trainer.strategy.root_device, dtype)
        else:
            peak = 1e12 * self.peak_tflops
        (peak,) = _sums(trainer, peak)
        # Lightning's own monitor waits for the device at every step, and takes all batches to be alike.
        self._rates = Rates(available_flops=peak, window_size=2)  # pyright: ignore[reportArgumentType]
        self._counts = [0, 0, 0, 0]  # batches, documents, tokens, operations
        self._flops_before = 0.0
        self._begun = _now(trainer)
        self._rates.update(time=0.0, batches=0, samples=0, lengths=0, flops=0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        positions = batch.logit_positions(pl_module.vocabulary)
        flops = 3 * forward_flops(pl_module.transformer, batch.document_starts, positions, batch.blocks)
        of_batch = (1, batch.num_documents, int(batch.document_starts[-1]), flops)
        self._counts = [sum(pair) for pair in zip(self._counts, of_batch, strict=True)]
        interval = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if not interval or trainer.global_step % interval or trainer.fit_loop._should_accumulate():
            return
        batches, documents, tokens, flops = _sums(trainer, *self._counts)
        self._rates.update(
            time=_now(trainer) - self._begun,
            batches=int(batches),
            samples=int(documents),
            lengths=int(tokens),
            flops=int(flops - self._flops_before),
        )
        self._flops_before = flops
        # The sums are over all ranks, so that "device" stands for all devices.
        found = self._rates.compute()
        values = {
            "tokens/s": found["device/items_per_sec"],
            "documents/s": found["device/samples_per_sec"],
            "TFLOP/s": found["device/flops_per_sec"] / 1e12,
            "MFU": found["device/mfu"],
        }
        for name, value in values.items():
            pl_module.log(name, value, prog_bar=True, batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = _now(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun += _now(trainer) - self._paused


def _now(trainer: Trainer) -> float:
    """Seconds, when the device has done all that it was given."""
    device = trainer.strategy.root_device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _sums(trainer: Trainer, *values: float) -> list[float]:
    """Sums over all ranks."""
    if trainer.world_size == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    return trainer.strategy.reduce(sums, reduce_op="sum").tolist()  # pyright: ignore
