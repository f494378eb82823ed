"""How far a training has come."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer


def progress(trainer: Trainer, step: int) -> float:
    """How far a training is on its way, 0 to 1, by whichever of the trainer's limits it is nearest to.

    With `max_time` the learning rate follows the clock, so that a slower machine anneals fully as well.
    """
    parts = [0.0]
    if trainer.max_steps > 0:
        parts.append(step / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(trainer.num_training_batches):
        # Lightning steps at the end of every epoch, however few batches are accumulated.
        steps = trainer.max_epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        parts.append(step / max(1.0, steps))
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None:
            elapsed = callback.time_elapsed()
            # Every rank by the first one's clock: replicas that differ in learning rate drift apart.
            parts.append(trainer.strategy.broadcast(elapsed / max(1e-9, elapsed + left)))
    return min(1.0, max(parts))
