"""What a step costs with Lightning, its callbacks, logging and loader, beside a bare step on batches that are ready.

Bare steps come after Lightning's on the same batches. In bf16 on a CPU that spares them the preparation of matrix
products for new shapes, which then counts as overhead.
"""

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from multidiff.cli import main

SECONDS: dict[str, list[float]] = {"Lightning": [], "bare": []}
_TURN = 10  # steps before the other kind has its turn


class Turns(Callback):
    """After every few steps of Lightning, the same number of bare ones on the same batches."""

    def __init__(self) -> None:
        self._batches: list[Any] = []
        self._copy: Any = None
        self._last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._copy = copy.deepcopy(pl_module.transformer)
        module: Any = pl_module
        # The same groups, by name, of the copy's weights.
        groups: list[dict[str, Any]] = [
            {"params": [], "hidden": True}, {"params": [], "hidden": False}, {"params": [], "hidden": False}
        ]  # fmt: skip
        for name, weight in self._copy.named_parameters():
            groups[module._group_of[f"transformer.{name}"]]["params"].append(weight)
        self._optimizer = module.optimizer(groups)
        self._vocabulary = module.vocabulary
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches.append(batch)
        now = time.perf_counter()
        SECONDS["Lightning"].append(now - self._last)
        if len(self._batches) == _TURN:
            for one in self._batches:
                begun = time.perf_counter()
                self._bare(trainer, one)
                SECONDS["bare"].append(time.perf_counter() - begun)
            self._batches.clear()
        self._last = time.perf_counter()

    def _bare(self, trainer: Trainer, batch: Any) -> None:
        with trainer.precision_plugin.train_step_context():
            nats = self._copy(
                batch.ids_P,
                batch.positions_P3,
                batch.document_starts,
                batch.logit_positions(self._vocabulary),
                batch.coords_P3,
                batch.targets_M,
            )
            loss = (torch.cat(nats) * batch.loss_weights_M).sum() / batch.loss_divisor
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._copy.parameters(), 1.0)
        self._optimizer.step()


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """The median step of each kind, and what Lightning's takes longer."""
    main(["fit", *arguments.training, "--trainer.callbacks+", "benchmarks.overhead.Turns"])
    medians = {name: statistics.median(values[_TURN:]) for name, values in SECONDS.items()}
    print("\n| step | ms | more |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {1000 * value:.1f} | {value / medians['bare'] - 1:.1%} |")
    more = medians["Lightning"] / medians["bare"] - 1
    return {"overhead of Lightning": round(more, 3), "steps": len(SECONDS["bare"])}


def add_parsers(commands: Any) -> None:
    """The command `overhead`."""
    parser = commands.add_parser("overhead", help="a step with Lightning beside a bare one")
    parser.add_argument("training", nargs="*", help="what follows `multidiff fit`, after --")
    parser.set_defaults(run=overhead)
