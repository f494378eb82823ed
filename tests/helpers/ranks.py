"""What `test_ranks.py` and `test_sharded.py` run in several processes; one of them runs it in its own as well.

Each check prints nothing and returns plain values; `main` writes those of this rank as JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from multidiff.data import DocumentDataModule
from multidiff.data.batches import DocumentKey
from multidiff.objectives import Noising, Objective, Task
from multidiff.training import module as training
from tests.helpers.sharded import sharded_trainings

TOKENIZERS = {"text": {"plugin": "bpe"}, "shout": {"plugin": "bpe"}}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class KeepsGradient(training.MaskedDiffusionModule):
    def on_before_optimizer_step(self, optimizer):
        self.gradient = torch.cat([weight.grad.flatten().clone() for weight in self.parameters()])


def gradient(examples, sequencer, normalisation, accumulate=1, **trainer):
    """The gradient of an optimizer step over batches of examples."""
    objective = Objective(normalisation=normalisation, loss_weights={"text": 3.0})
    noising = Noising(sequencer, [Task({"others": "target"})], objective, seed=1)
    module = KeepsGradient(TOKENIZERS, {"hidden_size": 16, "num_layers": 1, "num_heads": 2}, objective=objective)
    batches = [noising(some) for some in examples]
    fit = Trainer(max_steps=1, accumulate_grad_batches=accumulate, precision="64-true", **QUIET, **trainer)
    fit.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module.gradient


def examples_of(folder):
    """The last eight training documents."""
    data = DocumentDataModule(str(folder), TOKENIZERS)
    documents = data.documents("train")
    keys = [DocumentKey(0, place, len(documents) - 8 + place) for place in range(8)]
    return documents.__getitems__(keys), data.sequencer


def small_training(folder, **trainer):
    """The error that ends a training on data with few documents; None where it ends well."""
    data = DocumentDataModule(str(folder), TOKENIZERS, batch_size=2)
    module = training.MaskedDiffusionModule(TOKENIZERS, {"hidden_size": 16, "num_layers": 1, "num_heads": 2})
    fit = Trainer(**{**QUIET, "max_steps": 4, "num_sanity_val_steps": 0, **trainer})
    try:
        fit.fit(module, datamodule=data)
    except ValueError as error:
        return str(error)
    return None


def continued(folder, checkpoint, batch_size=2, **trainer):
    """The places in the epoch of the documents that this process trains on when it goes on for a step."""
    data = DocumentDataModule(str(folder), TOKENIZERS, batch_size=batch_size)
    module = training.MaskedDiffusionModule(TOKENIZERS, {"hidden_size": 16, "num_layers": 1, "num_heads": 2})
    documents, places = data.documents("train"), []
    get = documents.__getitems__
    documents.__getitems__ = lambda keys: places.extend(key.position for key in keys) or get(keys)
    options = {**QUIET, "max_steps": 4, "num_sanity_val_steps": 0, "limit_val_batches": 0, **trainer}
    Trainer(**options).fit(module, datamodule=data, ckpt_path=checkpoint)
    return places


def main(folder, ranks):
    rank = int(os.environ["LOCAL_RANK"])
    ddp = {"devices": ranks, "strategy": "ddp", "use_distributed_sampler": False}
    examples, sequencer = examples_of(folder / "data")
    results = {
        normalisation: gradient([examples[4 * rank : 4 * rank + 4]], sequencer, normalisation, **ddp).tolist()
        for normalisation in ("targets", "masked")
    }
    # With throughput, which all ranks sum up, at every step.
    results["one validation document"] = small_training(
        folder / "one", limit_val_batches=1.0, log_every_n_steps=1, **ddp
    )
    results["too few documents"] = small_training(folder / "few", **ddp)
    results["other ranks"] = continued(folder / "data", str(folder / "one_rank.ckpt"), **ddp)
    results |= sharded_trainings(folder)
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
