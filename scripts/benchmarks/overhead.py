"""What a step costs with Lightning, its callbacks, logging and loader, beside a bare step on batches that are ready."""

import argparse
import copy
import dataclasses
import itertools
import statistics
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from multidiff.cli import main

SECONDS: dict[str, list[float]] = {"Lightning": [], "bare": []}
_TURN = 10  # steps before the other kind has its turn
_SKIPPED = 3  # turns in which shapes are met for the first time


class Turns(Callback):
    """After every few steps of Lightning, the same number of bare ones on the same documents under other noise. Both
    kinds meet new shapes, which matrix products on a CPU are prepared for."""

    def __init__(self) -> None:
        self._copy: Any = None
        self._steps = 0
        self._last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._copy = copy.deepcopy(pl_module.transformer)
        module: Any = pl_module
        twins = dict(zip(module.transformer.parameters(), self._copy.parameters(), strict=True))
        groups = [
            {**group, "params": [twins[weight] for weight in group["params"]]} for group in module._parameter_groups()
        ]
        self._optimizer = module.optimizer(groups)
        self._vocabulary = module.vocabulary
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        kept, data.collate = data.collate, dataclasses.replace(data.collate, seed=1)
        self._batches = itertools.chain.from_iterable(iter(data.train_dataloader, None))
        data.collate = kept
        self._last = _now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        SECONDS["Lightning"].append(_now() - self._last)
        self._steps += 1
        if self._steps % _TURN == 0:
            for one in itertools.islice(self._batches, _TURN):
                one = one.to(pl_module.device)
                begun = _now()
                self._bare(trainer, one)
                SECONDS["bare"].append(_now() - begun)
        self._last = _now()

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


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """The median step of each kind, and what Lightning's takes longer."""
    main(["fit", *arguments.training, "--trainer.callbacks+", "benchmarks.overhead.Turns"])
    skipped = _SKIPPED * _TURN
    if len(SECONDS["bare"]) <= skipped:
        raise SystemExit(f"The training is too short to compare: it needs {2 * skipped + 2 * _TURN} steps or more.")
    medians = {name: statistics.median(values[skipped:]) for name, values in SECONDS.items()}
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
