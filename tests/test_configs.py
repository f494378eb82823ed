"""Every shipped YAML parses, trains, writes a checkpoint on Ctrl-C and goes on from it; and how a YAML is found."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from lightning.pytorch import Callback
from PIL import Image

from demo.planning import corpus
from demo.planning.countdown import Countdown
from demo.planning.path_star import PathStar
from demo.planning.sudoku import Sudoku
from multidiff.cli import configuration, main
from multidiff_bpe import BPETokenizer
from multidiff_vq import VQTokenizer
from tests.helpers.paths import ROOT

CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "model")  # fragments
# Those of a family of planning problems differ in numbers alone: a masked one and a baseline stand for all.
DIFFERENT = [path for path in CONFIGS if path.stem not in {
    *("sudoku9-masked", "sudoku9-autoregressive", "sudoku4-autoregressive"),
    *("path-star-masked", "countdown-masked", "countdown-autoregressive"),
}]  # fmt: skip
TEMPLATE = ROOT / "multidiff" / "plugins" / "template" / "training.yaml"


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


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A data folder for the template, whose plugin `test_is_interrupted_and_goes_on` installs from the same place."""
    folder = tmp_path_factory.mktemp("series")
    lines = []
    for index in range(48):
        (folder / f"{index}.csv").write_text("0\n0.5\n")
        segments = [{"text": "up"}, {"series": f"{index}.csv"}]
        lines.append(json.dumps({"split": ("train", "validation")[index % 6 == 0], "segments": segments}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    info = folder / "multidiff_series-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: multidiff-series\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[multidiff.tokenizers]\nseries = multidiff_series:SeriesTokenizer\n")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Data folders of planning problems and of plain text, by the name of a configuration up to its last hyphen."""
    families = {"sudoku4": Sudoku(4), "sudoku9": Sudoku(9), "path-star": PathStar(), "countdown": Countdown()}
    place = tmp_path_factory.mktemp("problems")
    folders = {name: corpus.prepare(place / name, family, train=16, held_out=4) for name, family in families.items()}
    folders["shakespeare"] = place / "shakespeare"
    folders["shakespeare"].mkdir()
    texts = [{"split": split, "segments": [{"text": "number 1 2 3 4 " * 300}]} for split in ("train", "validation")]
    (folders["shakespeare"] / "metadata.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folders


@pytest.mark.parametrize("name", ["sudoku4", "sudoku9", "path-star", "countdown"])
def test_a_baseline_differs_only_in_attention_order_and_folder(name):
    """Equal parameters, data and steps, or solve rates could not be compared."""
    masked, baseline = (
        yaml.safe_load((ROOT / "configs" / "planning" / f"{name}-{kind}.yaml").read_text())
        for kind in ("masked", "autoregressive")
    )
    assert baseline["model"]["init_args"]["transformer"].pop("attention") == "causal"
    (tokenizer,) = baseline["model"]["init_args"]["tokenizers"]
    samplers = [config["model"]["init_args"]["samplers"][tokenizer] for config in (masked, baseline)]
    del samplers[0]["num_inference_steps"]  # an autoregressive model takes a step for each code
    orders = [sampler.pop("order") for sampler in samplers]
    assert orders == ["margin", "row_scan" if tokenizer == "grid" else "left_to_right"]
    folders = [config["trainer"].pop("default_root_dir") for config in (masked, baseline)]
    assert folders == [f"runs/{name}/masked", f"runs/{name}/autoregressive"]
    assert masked == baseline


class CtrlC(Callback):
    """After the first step."""

    def on_train_batch_end(self, *_):
        raise KeyboardInterrupt


def test_there_are_configs():
    assert {path.name for path in CONFIGS} >= {"digits.yaml", "emoji.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parses(path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    assert "class_path" in capsys.readouterr().out


def test_an_optimizer_has_its_own_defaults(capsys):
    """And not those of the module's default optimizer, which jsonargparse would carry over."""
    with pytest.raises(SystemExit):
        main(["fit", "--config", "digits", "--model.init_args.optimizer", "torch.optim.SGD", "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]["init_args"]
    assert (settings["lr"], settings["weight_decay"], settings["momentum"]) == (0.003, 0.05, 0)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(TEMPLATE), "--model.init_args.optimizer", "torch.optim.Adagrad", "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]["init_args"]
    assert (settings["lr"], settings["weight_decay"]) == (0.01, 0)


@pytest.mark.filterwarnings("ignore:The tokenizer in .* has an untrained codebook")  # after a step or two
@pytest.mark.parametrize("path", [*DIFFERENT, TEMPLATE], ids=lambda path: path.stem)
def test_is_interrupted_and_goes_on(path, data, series, written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", str(path), "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    if path == TEMPLATE:
        monkeypatch.syspath_prepend(series)
        monkeypatch.syspath_prepend(TEMPLATE.parent)
        arguments += ["--data.init_args.source", str(series)]
    elif path.stem.rpartition("-")[0] in written or path.stem in written:
        arguments += ["--data.init_args.source", str(written[path.stem.rpartition("-")[0] or path.stem])]
    else:
        key = "folder" if path.parent.name == "tokenizers" else "source"
        arguments += [f"--data.init_args.{key}", str(data)]
    if path.parent.name == "configs":
        BPETokenizer.train(["number 1 2 3 4"] * 3, 270).save(tmp_path)
        arguments += ["--model.init_args.tokenizers.text", json.dumps({"plugin": "bpe", "folder": str(tmp_path)})]
    with pytest.raises(SystemExit):
        main([*arguments, "--trainer.callbacks+", f"{__name__}.CtrlC"])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 1
    assert not list(tmp_path.rglob("*.safetensors"))
    main([*arguments, "--ckpt_path", str(checkpoint), "--trainer.max_steps", "2"])
    assert list(tmp_path.rglob("*.safetensors"))
    if path.parent.name == "tokenizers":
        for command, metric in (("validate", "val/"), ("test", "test/")):
            main([command, *arguments[1:]])
            assert metric in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The tokenizer in .* has an untrained codebook")  # after a step or two
def test_a_preset_alone_decides_what_is_trained(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "tokenizers" / "vq_openmoji.yaml")
    arguments = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    arguments += ["--data.init_args.folder", str(data), "--model.init_args.preset", "rgb-64"]
    main(["fit", "--config", config, *arguments])
    tokenizer = VQTokenizer("runs/vq_openmoji/tokenizer")
    assert (tokenizer.mode, tokenizer.canvas().size) == ("RGB", {"height": 64, "width": 64})
    assert len(tokenizer.encode([tokenizer.read("0.png", data)])[0]) == 64
    with pytest.raises(SystemExit, match=r"channels 1, but preset 'rgb-64' has 3\. Remove channels"):
        main(["fit", "--config", config, *arguments, "--data.init_args.channels", "1", "--overwrite", "true"])


@pytest.mark.parametrize(
    "value", ["tokenizers/vq_digits", "vq_digits", "vq_digits.yaml", "configs/tokenizers/vq_digits.yaml"]
)
def test_a_shipped_configuration_is_found_by_name(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("vq_digits").mkdir()
    assert configuration.find(value) == ROOT / "configs" / "tokenizers" / "vq_digits.yaml"
    Path("vq_digits.yaml").write_text("trainer: {max_steps: 1}")
    own = value == "vq_digits.yaml"
    assert configuration.find(value).read_text() == ("trainer: {max_steps: 1}" if own else CONFIGS[-2].read_text())


def laughs(kind):
    """A YAML file of a few hundred bytes that stands for 9^9 values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]" if kind == "list" else "a: &a {k: 1, l: 2}"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        nine = ", ".join([f"*{before}"] * 9)
        lines.append(f"{name}: &{name} [{nine}]" if kind == "list" else f"{name}: &{name} {{<<: [{nine}]}}")
    return "\n".join(lines)


BAD = {
    "list": (laughs("list"), "more than 8,000 values"),
    "merge": (laughs("merge"), "more than 8,000 values"),
    "text": (f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 20)}]", "more than 8,000 values"),
    "cycle": ("model: {x: &x [*x]}", r"an alias \*x inside its own anchor"),
    "deep": ("model: " + 100_000 * "[", "nested more than 100 levels deep"),
    "broken": ("trainer:\n  max_steps: [1", "not YAML: did not find expected .* at line 3"),
    "control": ("a: \x01", "not YAML: .*(special|control) characters"),
    "binary": (b"\x00\xff", "not UTF-8 text"),
    "words": ("all words", "must contain a mapping"),
    "empty": ("", "must contain a mapping"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_configuration_is_refused_by_name(name, tmp_path):
    content, message = BAD[name]
    path = tmp_path / f"{name}.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SystemExit, match=rf"^multidiff: .*{name}.yaml .*({message})") as stopped:
        main(["fit", "--config", str(path)])
    assert "\n" not in str(stopped.value)


def test_what_is_no_file_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit, match="pipe is a pipe or a device"):
        main(["fit", "--config", str(tmp_path / "pipe")])
    with pytest.raises(SystemExit, match="is a folder"):
        main(["fit", "--config", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"--config digit: There is no such file.* digits, emoji, model/1b"):
        main(["fit", "--config", "digit"])


def test_a_file_within_a_configuration_is_bounded_too(tmp_path, capsys):
    (tmp_path / "model.yaml").write_text(laughs("list"))
    (tmp_path / "a.yaml").write_text("model: model.yaml")
    for arguments in (["--model", str(tmp_path / "model.yaml")], ["--config", str(tmp_path / "a.yaml")]):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *arguments])
        assert stopped.value.code == 2
        assert "model: a YAML text has aliases that expand to more than 8,000 values" in capsys.readouterr().err


def test_a_shipped_configuration_is_said_to_be_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = ROOT / "configs" / "tokenizers" / "vq_digits.yaml"
    for value, said in (
        ("vq_digits.yaml", f"multidiff: using the shipped configuration {place}\n"),
        (str(place), ""),
    ):
        with pytest.raises(SystemExit):
            main(["fit", "--config", value, "--print_config"])
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model:", "model must be a mapping with class_path"),
        ("data: [1]", "data must be a mapping with class_path"),
        ("model: {class_path: Masked}", "model.class_path: there is no class 'Masked'"),
        ("model: {class_path: nowhere.Masked}", "model.class_path: there is no class 'nowhere.Masked' .*nowhere"),
        (
            "model: {class_path: multidiff.training.Masked}",
            "model.class_path: there is no class 'multidiff.training.Masked'",
        ),
        ("model: {class_path: json.dumps}", "model.class_path: json.dumps is not a class"),
        ("model: {class_path: 3}", "model.class_path: there is no class 3"),
    ],
)
def test_help_on_a_bad_configuration_is_a_sentence(content, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(SystemExit, match=rf"^multidiff: .*bad.yaml: {message}") as stopped:
        main(["fit", "--config", str(tmp_path / "bad.yaml"), "--help"])
    assert "\n" not in str(stopped.value)


def test_aliases_and_many_values_are_fine(tmp_path):
    many = ", ".join(map(str, range(9000)))
    (tmp_path / "a.yaml").write_text(f"a: &a [{many}]\nb: &b {{c: 1}}\nd: {{<<: *b, e: *b}}\n")
    assert configuration.read(tmp_path / "a.yaml").startswith("a: &a [0, 1")
    (tmp_path / "a.yaml").write_text(f"a: &a [{many}]\nb: *a\n")
    with pytest.raises(ValueError, match=r"a.yaml has aliases that expand to more than 8,000 values. Use fewer"):
        configuration.read(tmp_path / "a.yaml")
