"""Two processes: the same gradient as one, clear errors on each of them, nothing that waits for ever."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Trainer

from multidiff.data import DocumentDataModule
from multidiff.objectives import Noising, Objective, Task
from multidiff.training import module as training
from tests.helpers.paths import ROOT
from tests.helpers.ranks import QUIET, TOKENIZERS, continued, examples_of, gradient
from tests.helpers.runs import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_folder(folder / "data", number=40)
    with (folder / "data" / "metadata.jsonl").open("a") as file:  # documents of unlike length weigh most
        for index in range(4):
            segments = [{"text": "one two three " * 5 * index}, {"shout": "A"}]
            file.write(json.dumps({"split": "train", "segments": segments}) + "\n")
    rows = [json.dumps({"segments": [{"text": f"number {index}"}]}) for index in range(8)]
    for name, train in (("one", 8), ("few", 1)):
        (folder / name).mkdir()
        lines = [*rows[:train], json.dumps({"split": "validation", "segments": [{"text": "six"}]})]
        (folder / name / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def of_ranks(folder):
    """What each of two processes returned."""
    data = DocumentDataModule(str(folder / "data"), TOKENIZERS, batch_size=2)
    module = training.MaskedDiffusionModule(TOKENIZERS, {"hidden_size": 16, "num_layers": 1, "num_heads": 2})
    trainer = Trainer(**QUIET, max_steps=3, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "one_rank.ckpt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.ranks", str(folder), "2"],
            cwd=ROOT,
            env={**os.environ, **common, "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.filterwarnings("ignore:You defined a .validation_step.:UserWarning")
@pytest.mark.parametrize("normalisation", ["targets", "masked"])
def test_every_token_counts_the_same_in_any_layout_of_a_step(folder, of_ranks, normalisation):
    """Eight documents at once, four times two accumulated, a part of an accumulation, twice four on two ranks."""
    examples, sequencer = examples_of(folder / "data")
    once = gradient([examples], sequencer, normalisation)
    pairs = [examples[start : start + 2] for start in range(0, 8, 2)]
    layouts = {
        "accumulated": gradient(pairs, sequencer, normalisation, accumulate=4),
        "the end of an epoch": gradient([examples[:6], examples[6:]], sequencer, normalisation, accumulate=3),
        "ranks": torch.tensor(of_ranks[0][normalisation], dtype=torch.float64),
    }
    assert once.norm() > 0.1
    for name, layout in layouts.items():
        assert float((layout - once).norm() / once.norm()) < 1e-6, name
    alone = gradient([examples[:4]], sequencer, normalisation)
    assert float((alone - once).norm() / once.norm()) > 0.01  # the layouts could differ


def noised(folder, rank, ranks, batch_size):
    """What a rank's loader serves in the first two epochs: each document by itself, by its place in its epoch."""
    data = DocumentDataModule(str(folder), TOKENIZERS, batch_size=batch_size)
    data.rank = lambda: (rank, ranks)
    noising = Noising(data.sequencer, [Task({"others": "target"})], Objective(), seed=1)
    data.collate = lambda examples: [(example, noising([example])) for example in examples]
    loader = data.train_dataloader()
    served = [one for _ in range(2) for batch in loader for one in batch]
    return {(example.epoch, example.position): (example, batch) for example, batch in served}


def test_a_document_gets_the_same_noise_on_any_rank_and_in_any_batch(folder):
    alone = noised(folder / "data", 0, 1, 6)
    ranks = [noised(folder / "data", rank, 2, 3) for rank in range(2)]
    assert alone.keys() == ranks[0].keys() | ranks[1].keys()
    assert len(alone) == 48
    assert not ranks[0].keys() & ranks[1].keys()
    for key, (example, batch) in alone.items():
        other, again = (ranks[0] | ranks[1])[key]
        assert example.number == other.number
        for name in (
            "ids_P",
            "positions_P3",
            "index_M",
            "targets_M",
            "loss_weights_M",
            "bound_weights_M",
            "loss_divisor",
        ):
            assert torch.equal(getattr(batch, name), getattr(again, name)), name


def test_one_validation_document_is_enough(of_ranks):
    assert [results["one validation document"] for results in of_ranks] == [None, None]


def test_fewer_documents_than_ranks_is_an_error_on_every_rank(of_ranks):
    for results in of_ranks:
        assert "has fewer items (1) than there are processes that train (2)" in results["too few documents"]


def test_continuing_with_another_number_of_ranks_or_another_batch_size_repeats_and_loses_nothing(folder, of_ranks):
    """Three steps of two documents are done."""
    assert [results["other ranks"] for results in of_ranks] == [[6, 7], [8, 9]]
    assert continued(folder / "data", str(folder / "one_rank.ckpt"), batch_size=3) == [6, 7, 8]


def test_groups_of_parameters_are_the_same_when_weights_are_sharded(of_ranks):
    for results in of_ranks:
        same, weight_decay, refused = results["groups"]
        assert same
        assert weight_decay == [None, None, 0.0]
        assert "Muon steps whole matrices" in refused
