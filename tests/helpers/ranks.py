"""What `test_ranks.py` runs in several processes; one of them runs it in its own as well.

Each check prints nothing and returns plain values; `main` writes those of this rank as JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.distributed.fsdp import FullyShardedDataParallel

from multidiff.data import DocumentDataModule
from multidiff.objectives.diffusion import TARGET, Objective, _mask, draw_times
from multidiff.seeding import generator_for
from multidiff.training import module as training
from multidiff.training.optimizer import MuonAdamW

TOKENIZERS = {"text": {"plugin": "bpe"}, "shout": {"plugin": "bpe"}}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class ByDocument(training.MaskedDiffusionModule):
    """Noise that follows from what a document holds, so that it is the same in any batch; keeps the gradient."""

    def on_before_optimizer_step(self, optimizer):
        self.gradient = torch.cat([weight.grad.flatten().clone() for weight in self.parameters()])


def roles(batch, tasks, vocabulary, generator):
    return torch.full_like(batch.document_S, TARGET), torch.arange(len(batch.document_S))


def corrupt(batch, role_S, t_S, schedule, generator):
    uniform_BL = torch.ones(batch.ids_BL.shape)
    for row, inside in enumerate(batch.document_BL >= 0):
        ids = batch.ids_BL[row, inside].tolist()
        uniform_BL[row, inside] = torch.rand(len(ids), generator=generator_for(*ids))
    return _mask(batch, role_S, (uniform_BL < 0.5) & (batch.segment_BL >= 0), torch.ones(len(role_S)))


def gradient(documents, sequencer, normalisation, accumulate=1, **trainer):
    """The gradient of an optimizer step over batches of documents."""
    torch.manual_seed(0)
    training.draw_roles, training.draw_times, training.corrupt = roles, draw_times, corrupt
    objective = Objective(weighting="none", normalisation=normalisation, loss_weights={"text": 3.0})
    module = ByDocument(TOKENIZERS, {"hidden_size": 16, "num_layers": 1, "num_heads": 2}, objective=objective)
    # A row for each document, as long as its longest: what stands beside a document makes no difference.
    batches = [sequencer.batch(some) for some in documents]
    fit = Trainer(max_steps=1, accumulate_grad_batches=accumulate, precision="64-true", **QUIET, **trainer)
    fit.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module.gradient


def documents_of(folder):
    data = DocumentDataModule(str(folder), TOKENIZERS, row_length=None)
    documents = data.documents("train")
    return [documents[0, index] for index in range(len(documents) - 8, len(documents))], data.sequencer


def small_training(folder, checkpoint=None, batch_size=2, **trainer):
    """The error that ends a training on data with few documents; None where it ends well."""
    data = DocumentDataModule(str(folder), TOKENIZERS, batch_size=batch_size, row_length=40)
    module = training.MaskedDiffusionModule(TOKENIZERS, {"hidden_size": 16, "num_layers": 1, "num_heads": 2})
    fit = Trainer(**{**QUIET, "max_steps": 4, "num_sanity_val_steps": 0, **trainer})
    try:
        fit.fit(module, datamodule=data, ckpt_path=checkpoint)
    except ValueError as error:
        return str(error)
    return None


def sharded_groups():
    """Sizes of the parameter groups under FSDP, which leaves pieces of flattened weights, and Muon's refusal."""
    module = training.MaskedDiffusionModule(TOKENIZERS, {"hidden_size": 16, "num_layers": 1, "num_heads": 2})
    names = {id(weight): name for name, weight in module.named_parameters()}
    whole = [[names[id(weight)] for weight in group["params"]] for group in module._parameter_groups()]
    module.transformer = FullyShardedDataParallel(
        module.transformer, use_orig_params=True, device_id=torch.device("cpu")
    )
    names = {id(weight): name.replace("_fsdp_wrapped_module.", "") for name, weight in module.named_parameters()}
    groups = module._parameter_groups()
    sharded = [[names[id(weight)] for weight in group["params"]] for group in groups]
    try:
        MuonAdamW(groups)
        refused = None
    except ValueError as error:
        refused = str(error)
    return [whole == sharded, [group.get("weight_decay") for group in groups], refused]


def main(folder, ranks):
    rank = int(os.environ["LOCAL_RANK"])
    ddp = {"devices": ranks, "strategy": "ddp", "use_distributed_sampler": False}
    documents, sequencer = documents_of(folder / "data")
    results = {
        normalisation: gradient([documents[4 * rank : 4 * rank + 4]], sequencer, normalisation, **ddp).tolist()
        for normalisation in ("targets", "masked")
    }
    results["one validation document"] = small_training(folder / "one", limit_val_batches=1.0, **ddp)
    results["too few documents"] = small_training(folder / "few", **ddp)
    results["other ranks"] = small_training(folder / "data", checkpoint=str(folder / "one_rank.ckpt"), **ddp)
    results["groups"] = sharded_groups()
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
