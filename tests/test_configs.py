"""Every shipped YAML parses, and trains a step on a few items."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from multidiff.cli import main
from multidiff_bpe import BPETokenizer
from multidiff_vq import VQTokenizer

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w") as file:
        for index in range(48):
            Image.fromarray(random.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / f"{index}.png")
            soundfile.write(folder / f"{index}.wav", random.uniform(-0.5, 0.5, 6000).astype(np.float32), 8000)
            segments = [{"text": f"number {index}"}, {"image": f"{index}.png"}, {"speech": f"{index}.wav"}]
            split = {0: "validation", 3: "test"}.get(index % 6, "train")
            file.write(json.dumps({"split": split, "segments": segments}) + "\n")
    return folder


def test_there_are_configs():
    assert {path.name for path in CONFIGS} >= {"digits.yaml", "emoji.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parses(path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    assert "class_path" in capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_interruption_leaves_a_checkpoint(path):
    """Ctrl-C, as the README promises: Lightning writes none unless told to."""
    callbacks = yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"]["callbacks"]
    checkpoints = [one for one in callbacks if one["class_path"] == "multidiff.checkpoints.Checkpoints"]
    assert checkpoints
    assert all(one["init_args"].get("save_on_exception", True) for one in checkpoints)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_trains_a_step(path, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    BPETokenizer.train(["number 1 2 3 4"] * 3, 270).save(tmp_path)
    arguments = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    arguments += ["--data.init_args.folder", str(data)]
    if path.parent.name == "configs":
        arguments += ["--model.init_args.tokenizers.text", json.dumps({"plugin": "bpe", "folder": str(tmp_path)})]
    main(["fit", "--config", str(path), *arguments])
    assert list(tmp_path.rglob("*.safetensors"))
    if path.parent.name == "tokenizers":
        for command, metric in (("validate", "val/"), ("test", "test/")):
            main([command, "--config", str(path), *arguments])
            assert metric in capsys.readouterr().out


def test_a_preset_alone_decides_what_is_trained(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "tokenizers" / "vq_openmoji.yaml")
    arguments = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    arguments += ["--data.init_args.folder", str(data), "--model.init_args.preset", "rgb-64"]
    main(["fit", "--config", config, *arguments])
    tokenizer = VQTokenizer("runs/vq_openmoji/tokenizer")
    assert (tokenizer.mode, tokenizer.canvas().size) == ("RGB", {"height": 64, "width": 64})
    assert len(tokenizer.encode([tokenizer.read("0.png", data)])[0]) == 64
    with pytest.raises(SystemExit, match="channels: 1, and preset 'rgb-64' has 3: leave channels out"):
        main(["fit", "--config", config, *arguments, "--data.init_args.channels", "1", "--overwrite", "true"])
