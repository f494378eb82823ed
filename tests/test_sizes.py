"""`configs/model/`: fragments beside any configuration, and the numbers that they and the size guide give."""

import re

import pytest
import torch
import yaml

from multidiff.checkpoints import build_transformer
from multidiff.cli import main
from multidiff.models import forward_flops
from tests.helpers.paths import ROOT

SIZES = ("tiny", "small", "base", "1b", "8b")
ROWS, LENGTH, TOKENS = 32_768, 2_048, 16_384  # vocabulary, tokens of a document, tokens on a GPU: as the guide has them


def fragment(name):
    return yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.fixture(params=SIZES)
def size(request):
    """Name, text of the fragment, settings, and the transformer without memory for its weights."""
    settings = fragment(request.param)["model"]["init_args"]
    with torch.device("meta"):
        transformer = build_transformer({**settings["transformer"], "vocabulary_rows": ROWS}, "fragment")
    text = (ROOT / "configs" / "model" / f"{request.param}.yaml").read_text(encoding="utf-8")
    return request.param, text, settings, transformer


def facts(settings, transformer):
    """What the guide says of a size; memory by its own formulas, in GB."""
    hidden, layers = transformer.config["hidden_size"], transformer.config["num_layers"]
    of_layers = sum(weight.numel() for weight in transformer.layers.parameters())
    others = sum(weight.numel() for weight in transformer.parameters()) - of_layers
    muon = settings["optimizer"]["class_path"] == "multidiff.training.MuonAdamW"
    positions = [(torch.arange(LENGTH // 2), (0, ROWS))]
    return {
        "layers": of_layers,
        "row": others // ROWS,
        "all": of_layers + others,
        "gflop": 3 * forward_flops(transformer, torch.tensor([0, LENGTH]), positions) / LENGTH / 1e9,
        "states": ((12 if muon else 16) * of_layers + 16 * others) / 1e9,
        "activations": 76 * hidden * layers * TOKENS / 1e9,
        "checkpointed": (4 * layers + 76) * hidden * TOKENS / 1e9,
    }


def test_every_size_is_listed():
    assert {path.stem for path in (ROOT / "configs" / "model").iterdir()} == set(SIZES)


def test_a_fragment_says_what_its_model_takes(size):
    _, text, settings, transformer = size
    known = facts(settings, transformer)
    numbers = re.search(r"parameters  ([\d,]+) in the layers, and ([\d,]+) for each row", text)
    assert [int(number.replace(",", "")) for number in numbers.groups()] == [known["layers"], known["row"]]
    (gflop,) = re.search(r"operations  ([\d.]+) GFLOP", text).groups()
    (states,) = re.search(r"memory      ([\d.]+) GB", text).groups()
    (activations,) = re.search(r"([\d.]+) GB for the activations", text).groups()
    for said, name in ((gflop, "gflop"), (states, "states"), (activations, "activations")):
        assert float(said) == pytest.approx(known[name], rel=0.02), name
    for pattern, value in (
        (r"([\d.]+) GB with gradient", known["checkpointed"]),
        (r"([\d.]+) GB on each of 8", known["states"] / 8),
    ):
        for said in re.findall(pattern, text):
            assert float(said) == pytest.approx(value, rel=0.02), pattern


def test_the_guide_says_what_a_size_is(size):
    name, _, settings, transformer = size
    known, config = facts(settings, transformer), transformer.config
    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `model/{name}` \|(.*)\|$", guide, re.M)
    shape, heads, mlp, layers, whole, gflop, states, activations, checkpointed = (
        cell.strip().replace(",", "") for cell in row.split("|")
    )
    assert shape == f"{config['hidden_size']} × {config['num_layers']}"
    keys = config["num_key_value_heads"]
    assert heads == f"{config['num_heads']}" + (f" / {keys}" if keys else "")
    assert int(mlp) == transformer.layers[0].mlp.gate.out_features
    units = {"M": 1e6, "B": 1e9}
    for cell, name in ((layers, "layers"), (whole, "all")):
        number, unit = cell.split()
        assert float(number) * units[unit] == pytest.approx(known[name], rel=0.02)
    for cell, name in (
        (gflop, "gflop"),
        (states, "states"),
        (activations, "activations"),
        (checkpointed, "checkpointed"),
    ):
        assert float(cell) == pytest.approx(known[name], rel=0.03), name


def test_the_layers_of_8b_are_those_of_llama_3_8b():
    """8,030,261,248 parameters (arXiv 2407.21783, table 3), of which the embedding and the head have 128,256 rows each,
    and the last norm a vector. Norms of queries and keys are ours."""
    with torch.device("meta"):
        settings = fragment("8b")["model"]["init_args"]["transformer"]
        transformer = build_transformer({**settings, "vocabulary_rows": 64, "qk_norm": False}, "fragment")
    of_layers = sum(weight.numel() for weight in transformer.layers.parameters())
    assert of_layers == 8_030_261_248 - 2 * 128_256 * 4_096 - 4_096


@pytest.mark.parametrize("name", SIZES)
def test_stands_beside_a_configuration_with_data(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "shakespeare", "--config", f"model/{name}", "--print_config"])
    assert stopped.value.code == 0
    made, own = yaml.safe_load(capsys.readouterr().out), fragment(name)["model"]["init_args"]
    settings = made["model"]["init_args"]
    assert settings["transformer"] == own["transformer"]
    assert settings["tokenizers"] == {"text": {"plugin": "bpe", "folder": "runs/shakespeare/tokenizers/text"}}
    assert made["data"]["init_args"]["tokenizers"] == settings["tokenizers"]
    assert settings["warmup_steps"] == own["warmup_steps"]
    assert settings["optimizer"]["class_path"] == own["optimizer"]["class_path"]
    for key, value in own["optimizer"]["init_args"].items():
        assert settings["optimizer"]["init_args"][key] == value
    assert made["trainer"]["max_time"] == "00:00:20:00"
