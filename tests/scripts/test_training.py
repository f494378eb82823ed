"""`scripts/benchmark.py training`: its data, its rounds, and what it writes."""

import argparse
import itertools
import json
import sys
from importlib import import_module

import pytest
import torch
import yaml
from PIL import Image

from multidiff.data import DocumentDataModule
from multidiff.models import MaskedDiffusionTransformer
from tests.helpers.paths import ROOT

FRAGMENT = {
    "model": {
        "class_path": "multidiff.training.MaskedDiffusionModule",
        "init_args": {"transformer": {"hidden_size": 16, "num_layers": 2, "num_heads": 2}},
    }
}


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """`benchmarks` can be imported, as it is where the script runs."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_random_texts_are_as_long_as_they_should_be(tmp_path):
    path = import_module("benchmarks.synthetic").write_configuration(
        tmp_path, vocabulary=300, length=20, documents=6, batch=3
    )
    settings = yaml.safe_load(path.read_text())
    tokenizers = settings["model"]["init_args"]["tokenizers"]
    data = DocumentDataModule(**{**settings["data"]["init_args"], "tokenizers": tokenizers})
    documents = data.documents("train")
    data.collate = list
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [3, 3]
    laid_out = data.sequencer.batch([example.document for batch in batches for example in batch])
    assert laid_out.document_starts.diff().tolist() == [20] * 6
    assert len(documents) == 6
    assert data.vocabulary.spans["text"][0][1] - data.vocabulary.spans["text"][0][0] == 300 + 1  # an EOS
    contents = {tuple(laid_out.ids_P[20 * place : 20 * place + 20].tolist()) for place in range(6)}
    assert len(contents) == 6


def test_a_row_for_each_length_and_batch(tmp_path, monkeypatch, capsys):
    training, meter = import_module("benchmarks.training"), import_module("benchmarks.meter")
    monkeypatch.setattr(meter, "_ROUND", 0.001)
    monkeypatch.setattr(meter, "_SKIPPED", 1)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(FRAGMENT))
    parser = argparse.ArgumentParser()
    training.add_parsers(parser.add_subparsers())
    name, output = str(tmp_path / "toy.yaml"), tmp_path / "out"
    words = ["training", "--config", name, "--lengths", "16", "48", "--batch-tokens", "96", "--vocabulary", "300"]
    arguments = parser.parse_args([*words, "--rounds", "2", "--output", str(output), "--", "--trainer.accelerator=cpu"])
    result = arguments.run(arguments)
    assert json.loads((output / "training.json").read_text()) == result
    with Image.open(output / "training.png") as picture:
        assert picture.size[0] > 500
    assert result["device"] == f"cpu, {torch.get_num_threads()} threads"
    assert [row["tokens of a document"] for row in result["rows"]] == [16, 48]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {name} ")]
    for row, line in zip(result["rows"], table, strict=True):
        assert row["tokens of a batch"] == 96
        assert row["documents/s"] * row["tokens of a document"] == pytest.approx(row["tokens/s"], rel=0.05)
        assert f"{row['tokens/s']:,}" in line
        assert 0 < row["data wait"] < 1
        assert row["memory GB"] > 0.1  # the libraries alone
    assert result["rows"][1]["GFLOP of a token"] >= result["rows"][0]["GFLOP of a token"] > 0
    assert all(one.steps == 1 and one.tokens == 96 for one in meter.Meter.measured)
    assert len(meter.Meter.measured) == 2


def test_waits_are_those_for_training_batches(monkeypatch):
    meter = import_module("benchmarks.meter")
    clock = itertools.count()
    monkeypatch.setattr(meter.time, "perf_counter", lambda: float(next(clock)))
    waits = meter.Waits()
    for action in ("[_TrainingEpochLoop].train_dataloader_next", "run_training_batch", "[_EvaluationLoop].val_next"):
        for _ in range(2):
            with waits.profile(action):
                next(clock)
    assert waits.seconds == 2 * 2


def test_batches_hold_no_more_tokens_and_every_document_once():
    mixed = import_module("benchmarks.mixed")
    lengths = mixed.draw_lengths(4096, longest=512)
    assert sum(lengths[:-1]) < 4096 <= sum(lengths)
    assert 64 <= min(lengths) < max(lengths) <= 512
    for order in (range(len(lengths)), sorted(range(len(lengths)), key=lengths.__getitem__)):
        batches = mixed.divide(order, lengths, 600)
        assert [document for batch in batches for document in batch] == list(order)
        assert all(sum(lengths[document] for document in batch) <= 600 for batch in batches)
        pairs = itertools.pairwise(batches)
        assert all(sum(lengths[i] for i in one) + lengths[other[0]] > 600 for one, other in pairs)
    assert mixed.divide([0], [700], 600) == [[0]]


def test_the_plain_stack_has_the_same_layers():
    """As many parameters as the transformer, whose norms of queries and keys are grouped in the same way."""
    plain = import_module("benchmarks.plain")
    model = MaskedDiffusionTransformer(64, hidden_size=32, num_layers=2, num_heads=4, num_key_value_heads=2)
    stack = plain.PlainStack(model)
    assert sum(w.numel() for w in stack.parameters()) == sum(w.numel() for w in model.parameters())
    assert stack(torch.arange(12).view(2, 6)).shape == (2, 6, 64)
