"""Sharded trainings are those of one process: losses, validations, weights, and what is continued."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy

from multidiff import MultiDiffPipeline
from multidiff.cli import main
from multidiff.data import DocumentDataModule
from multidiff.training import Checkpoints
from multidiff.training.sharding import check_strategy
from tests.helpers.ranks import QUIET
from tests.helpers.runs import scalars
from tests.helpers.sharded import STOP, TOKENIZERS, make_module, run, validation


@pytest.fixture(scope="module")
def alone(ranks_folder):
    """The training of one process, with as many documents in a step."""
    return run(ranks_folder / "mixed", ranks_folder / "alone", 4)


def weights(folder):
    return MultiDiffPipeline.from_pretrained(folder).transformer.state_dict()


def distance(one, two):
    """How far two sets of weights are apart, relative to the first."""
    apart = sum(float((one[name] - two[name]).square().sum()) for name in one)
    return (apart / sum(float(weight.square().sum()) for weight in one.values())) ** 0.5


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(ranks_folder, of_ranks, alone, name):
    """Muon, AdamW, averaged weights, clipping, and batches of a process without one of the tokenizers."""
    for results in of_ranks:
        assert results[name]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert results[name]["validation"] == pytest.approx(alone["validation"], rel=1e-4)
    one = weights(ranks_folder / "alone" / "model")
    # Rounding in bf16, in which Muon works, differs with the size of a stack of matrices.
    assert distance(one, weights(ranks_folder / name / "model")) < 1e-3
    initial = make_module()
    initial.configure_model()
    assert distance(one, initial.transformer.state_dict()) > 0.05  # so that an untrained model would be noticed


def test_each_process_holds_its_part_of_the_weights(of_ranks):
    assert [results["ddp"]["share"] for results in of_ranks] == [1, 1]
    shares = [results["fsdp2"]["share"] for results in of_ranks]
    assert sum(shares) == pytest.approx(1)
    assert all(0.45 < share < 0.55 for share in shares)


def test_accumulated_steps_are_the_same_steps(ranks_folder, of_ranks):
    del of_ranks
    assert distance(weights(ranks_folder / "fsdp2" / "model"), weights(ranks_folder / "accumulated" / "model")) < 1e-3


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_stopped_training_goes_on_exactly(ranks_folder, of_ranks, name):
    for results in of_ranks:
        assert results[f"{name} continued"]["losses"] == results[name]["losses"][STOP:]
        assert results[f"{name} continued"]["validation"] == results[name]["validation"]
    whole, continued = (weights(ranks_folder / folder / "model") for folder in (name, f"{name}_continued"))
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


@pytest.mark.parametrize("name", ["fsdp2 to ddp", "ddp to fsdp2"])
def test_a_training_goes_on_with_the_other_strategy(of_ranks, name):
    """With the live and the averaged weights, and the states of both optimizers."""
    for results in of_ranks:
        assert results[name]["losses"] == pytest.approx(results["ddp"]["losses"][STOP:], rel=1e-4)
        assert results[name]["validation"] == pytest.approx(results["ddp"]["validation"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks:UserWarning")
def test_one_process_reads_what_two_wrote(ranks_folder, of_ranks):
    trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, callbacks=Checkpoints(str(ranks_folder / "read")))
    data = DocumentDataModule(str(ranks_folder / "mixed"), TOKENIZERS, batch_size=4)
    checkpoint = ranks_folder / "fsdp2" / "checkpoints" / "last.ckpt"
    trainer.validate(make_module(), datamodule=data, ckpt_path=str(checkpoint), verbose=False)
    assert validation(trainer) == pytest.approx(of_ranks[0]["fsdp2"]["validation"], rel=1e-5)


def test_a_sharded_checkpoint_becomes_a_model_folder(ranks_folder, of_ranks, tmp_path, capsys):
    """With the averaged weights, as the training itself saved it."""
    del of_ranks
    checkpoint = ranks_folder / "fsdp2" / "checkpoints" / "last.ckpt"
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "meta.pt",
    ]
    main(["consolidate", str(checkpoint), "--output", str(tmp_path / "model")])
    assert capsys.readouterr().out == f"Saved the model in {tmp_path / 'model'}.\n"
    saved, read = weights(tmp_path / "model"), weights(ranks_folder / "fsdp2" / "model")
    assert all(torch.equal(saved[name], read[name]) for name in saved)
    live = ranks_folder / "alone" / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit, match="1"):
        main(["consolidate", str(live), "--output", str(tmp_path / "model")])
    assert "exists already" in capsys.readouterr().err


def test_previews_are_made_by_all_and_written_by_the_first(ranks_folder, of_ranks):
    del of_ranks
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ranks_folder / "fsdp2" / "log"))
    events.Reload()
    assert {tag.split("/")[0] for tag in events.Tags()["tensors"]} == {"text", "shout"}
    assert len(scalars(ranks_folder / "fsdp2")["loss"]) == 6


def test_what_cannot_be_sharded_is_refused_by_every_process(of_ranks):
    for results in of_ranks:
        tensor_parallel, bare = results["refused"]
        assert "cannot be trained with ModelParallelStrategy. Use --trainer.strategy fsdp2" in tensor_parallel
        assert bare.startswith("Bare has no weights that can be sharded. Train it with --trainer.strategy ddp")


def test_the_first_version_of_fsdp_is_refused():
    with pytest.raises(ValueError, match=r"cannot be trained with FSDPStrategy\. Use --trainer\.strategy fsdp2"):
        check_strategy(SimpleNamespace(strategy=FSDPStrategy()))
