"""Trainings in several processes with the strategies ddp and fsdp2, for `ranks.py` and the tests beside it."""

import json

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from multidiff.data import DocumentDataModule
from multidiff.training import (
    AveragedWeights,
    Checkpoints,
    MaskedDiffusionModule,
    MuonAdamW,
    Previews,
    SaveModel,
    optimizer,
)
from multidiff.training.optimizer import local_shard
from tests.helpers.runs import WORDS

TOKENIZERS = {"text": {"plugin": "bpe"}, "shout": {"plugin": "bpe"}}
# Three layers, so that two processes take unlike numbers of matrices, and matrices of an odd number of rows.
TRANSFORMER = {"hidden_size": 20, "num_layers": 3, "num_heads": 2, "intermediate_size": 33}
STEPS, STOP = 6, 3
FSDP2, DDP = {"devices": 2, "strategy": "fsdp2"}, {"devices": 2, "strategy": "ddp"}


def write_mixed(folder):
    """Documents of both tokenizers and of one alone, in an order that leaves some batches of a process without one."""
    rows = []
    for index in range(24):
        segments = [{"text": WORDS[index % 8]}, {"shout": WORDS[index % 8].upper()}]
        kinds = (segments, segments[:1], segments[1:])
        rows.append({"split": "train", "segments": kinds[index % 3]})
    for of_first_process, of_second in ((2, 2), (1, 2), (1, 1)):  # tokenizers in a batch
        for number in (of_first_process, of_second) * 2:
            segments = [{"text": "one two"}, {"shout": "A"}][:number]
            rows.append({"split": "validation", "segments": segments})
    folder.mkdir(parents=True)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


class Watch(Callback):
    """The loss of every step over all processes, and the share of the weights that this process holds."""

    def __init__(self):
        self.losses, self.share = [], None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        loss = trainer.strategy.reduce(outputs["loss"].clone(), reduce_op="mean")
        self.losses.append(float(loss))
        weights = list(module.parameters())
        self.share = sum(local_shard(weight).numel() for weight in weights) / sum(weight.numel() for weight in weights)


def make_module(**module):
    return MaskedDiffusionModule(
        TOKENIZERS,
        TRANSFORMER,
        optimizer=lambda groups: MuonAdamW(groups, lr=0.005),
        min_lr_ratio=1.0,
        warmup_steps=1,
        **module,
    )


def make_trainer(folder, callbacks=(), **settings):
    return Trainer(
        accelerator="cpu",
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(str(folder), name="", version="log"),
        callbacks=list(callbacks),
        **settings,
    )


def run(data, folder, batch_size, checkpoint=None, previews=False, module=None, **settings):
    """Train, save checkpoints and the model; losses, the last validation and the share of the weights."""
    trained, watch = make_module(**module or {}), Watch()
    assert trained.transformer.norm.weight.is_meta  # no process holds all weights, even for a moment
    steps = 2 if "accumulate_grad_batches" in settings else 1
    every = {"every_n_train_steps": STOP, "save_top_k": -1, "filename": "{step}", "auto_insert_metric_name": False}
    callbacks = [
        watch,
        AveragedWeights(0.5),
        SaveModel(str(folder / "model")),
        Checkpoints(str(folder / "checkpoints"), **every),
        *([Previews(1)] if previews else []),
    ]
    limits = {"max_steps": STEPS, "val_check_interval": STOP * steps, "check_val_every_n_epoch": None}
    trainer = make_trainer(folder, callbacks, gradient_clip_val=0.5, **limits, **settings)
    loaded = DocumentDataModule(str(data), TOKENIZERS, batch_size=batch_size)
    trainer.fit(trained, datamodule=loaded, ckpt_path=checkpoint and str(checkpoint))
    return {"losses": watch.losses, "validation": validation(trainer), "share": watch.share}


def validation(trainer):
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("validation/")}


class Bare(LightningModule):
    """A module whose weights nobody shards."""

    def training_step(self, batch, batch_index):
        raise AssertionError("it must not start")

    def configure_optimizers(self):
        raise AssertionError("it must not start")


def refusal(data, folder, module=None, checkpoint=None, **settings):
    """The error that a training starts with."""
    try:
        loaded = DocumentDataModule(str(data), TOKENIZERS, batch_size=2)
        trainer = make_trainer(folder, max_steps=1, enable_checkpointing=False, **settings)
        trainer.fit(module or make_module(), datamodule=loaded, ckpt_path=checkpoint)
    except ValueError as error:
        return str(error)
    return None


def sharded_trainings(folder):
    """What two processes return: all trainings on the same documents, most of them the same training."""
    data = folder / "mixed"
    again = {"gradient_checkpointing": True}
    results = {
        "ddp": run(data, folder / "ddp", 2, **DDP),
        "fsdp2": run(data, folder / "fsdp2", 2, previews=True, module=again, **FSDP2),
    }
    of_ddp, of_fsdp2 = (folder / name / "checkpoints" / f"{STOP}.ckpt" for name in ("ddp", "fsdp2"))
    results |= {
        "ddp continued": run(data, folder / "ddp_continued", 2, of_ddp, **DDP),
        "fsdp2 continued": run(data, folder / "fsdp2_continued", 2, of_fsdp2, module=again, **FSDP2),
        "fsdp2 to ddp": run(data, folder / "to_ddp", 2, of_fsdp2, **DDP),
        "ddp to fsdp2": run(data, folder / "from_ddp", 2, of_ddp, **FSDP2),
    }
    optimizer._STACKED = 1  # a matrix of each process at a time: of three, the second process is left without one
    results["accumulated"] = run(data, folder / "accumulated", 1, accumulate_grad_batches=2, **FSDP2)
    refused = folder / "refused"
    results["refused"] = [
        refusal(data, refused, devices=2, strategy=ModelParallelStrategy(1, 2)),
        refusal(data, refused, Bare(), **FSDP2),
    ]
    return results
