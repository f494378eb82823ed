"""A training goes on at the document where it stopped, whatever reads ahead."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from multidiff.data import Mixture
from tests.helpers.data import data_of, rows_of, write


class Records(LightningModule):
    """Notes the places of the documents that it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch):
        self.seen.append([(example.epoch, example.number) for example in batch])
        return self.weight.sum()

    def validation_step(self, batch):
        raise AssertionError

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Stops(Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def train(source, steps, checkpoint=None, save=None, limit=1.0, **options):
    module, data = Records(), data_of(source, **options)
    callbacks = [Stops(*save)] if save else []
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        limit_train_batches=limit,
        callbacks=callbacks,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module.seen


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("loader")
    for name, number in (("a", 23), ("b", 11)):
        write(made / name, *rows_of(*("x" * (1 + index % 7) for index in range(number))))
    return made


@pytest.mark.parametrize("mixed", [False, True], ids=["one source", "mixture"])
@pytest.mark.parametrize(
    "limits", [{"batch_size": 4}, {"batch_size": None, "max_tokens": 40}], ids=["documents", "tokens"]
)
@pytest.mark.parametrize("limit", [1.0, 3], ids=["whole epochs", "limited epochs"])
def test_a_checkpoint_of_any_step_goes_on_exactly(folders, tmp_path, mixed, limits, limit):
    source = Mixture({"a": str(folders / "a"), "b": str(folders / "b")}) if mixed else folders / "a"
    limits = {**limits, "max_eos_padding": {"text": 1}}
    whole = train(source, 14, limit=limit, **limits)
    assert len(whole) == 14
    for step, (before, after) in ((2, (0, 0)), (3, (0, 2)), (7, (2, 0)), (10, (1, 2))):
        head = train(source, step + 1, save=(step, tmp_path / "c.ckpt"), limit=limit, num_workers=before, **limits)
        assert head == whole[: step + 1]
        rest = train(source, 14, checkpoint=tmp_path / "c.ckpt", limit=limit, num_workers=after, **limits)
        assert rest == whole[step:], f"step {step}"


def test_a_checkpoint_of_other_data_is_refused(folders, tmp_path):
    train(folders / "a", 2, save=(1, tmp_path / "c.ckpt"))
    with pytest.raises(ValueError, match="was trained on 23 documents, but the data now have 11 documents"):
        train(folders / "b", 3, checkpoint=tmp_path / "c.ckpt")
