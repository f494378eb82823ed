"""Two processes, started once for all tests of several."""

import json
import os
import socket
import subprocess
import sys

import pytest
from lightning.pytorch import Trainer

from multidiff.data import DocumentDataModule
from multidiff.training import module as training
from tests.helpers.paths import ROOT
from tests.helpers.ranks import QUIET, TOKENIZERS
from tests.helpers.runs import write_folder
from tests.helpers.sharded import write_mixed


@pytest.fixture(scope="session")
def ranks_folder(tmp_path_factory):
    """What the processes read, and where they write."""
    folder = tmp_path_factory.mktemp("ranks")
    write_folder(folder / "data", number=40)
    write_mixed(folder / "mixed")
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


@pytest.fixture(scope="session")
def of_ranks(ranks_folder):
    """What each of two processes returned, which take part in all that is tested with several."""
    folder = ranks_folder
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
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
