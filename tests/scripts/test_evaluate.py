"""`scripts/evaluate.py`: numbers of pictures, sounds, texts and of what only a plugin knows; likelihood."""

import importlib.util
import json
import math

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torchvision.models import squeezenet1_1

from multidiff.evaluation import modes
from multidiff_bpe import BPETokenizer
from multidiff_encodec import EncodecTokenizer
from multidiff_vq import VQTokenizer
from tests.helpers.paths import ROOT
from tests.helpers.pipelines import make

SCRIPT = ROOT / "scripts" / "evaluate.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("evaluate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def folder(tmp_path):
    random, lines = np.random.default_rng(0), []
    for number in range(6):
        Image.fromarray(random.integers(0, 256, (32, 32), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        soundfile.write(tmp_path / f"{number}.wav", random.uniform(-0.5, 0.5, 8_000), 8_000)
        parts = [{"image": f"{number}.png"}, {"speech": f"{number}.wav"}, {"text": "seven" * (number + 1)}]
        lines.append(json.dumps({"split": "test", "segments": parts}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def evaluate(main, monkeypatch, capsys, folder, name, tokenizer, *options):
    command = ["evaluate.py", "tokenizer", "--data", str(folder), "--name", name, "--tokenizer", json.dumps(tokenizer)]
    monkeypatch.setattr("sys.argv", [*command, *options])
    main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_pictures(main, monkeypatch, capsys, folder):
    found = evaluate(main, monkeypatch, capsys, folder, "image", {"plugin": "vq", "weights": "digits"})
    assert found["items"] == 6
    assert found["codes an item"] == 16
    assert found["bits an item"] == 16 * 6
    assert found["saved and loaded, gives the same codes"]
    assert 0 < found["codes that come back, decoded and encoded"] <= 1
    assert 0 < found["level 0: codes in use, of 64"] <= 1
    assert 0 < found["level 0: entropy, nats of 4.16"] <= math.log(64)
    assert found["as fast as the bare model, encoded"] > 0
    assert found["as fast as the bare model, decoded"] > 0
    # Noise is nothing that a codec of digits could keep.
    assert 3 < found["PSNR, dB"] < 12
    assert found["SSIM"] < 0.3


def test_lpips_where_its_backbone_is_on_this_machine(main, monkeypatch, capsys, folder):
    monkeypatch.setenv("TORCH_HOME", str(folder / "nothing"))
    assert not any(
        key.startswith("LPIPS") for key in evaluate(main, monkeypatch, capsys, folder, "image", {"plugin": "vq"})
    )
    monkeypatch.setenv("TORCH_HOME", str(folder))
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(squeezenet1_1().state_dict(), folder / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    assert evaluate(main, monkeypatch, capsys, folder, "image", {"plugin": "vq"})["LPIPS, squeeze"] > 0


def test_sounds(main, monkeypatch, capsys, folder):
    found = evaluate(main, monkeypatch, capsys, folder, "speech", {"plugin": "encodec", "weights": "words-8khz"})
    assert found["codes an item"] == 25
    assert found["mel distance"] > 0.1


def test_a_judge_says_what_is_kept(main, monkeypatch, capsys, tmp_path):
    random, lines = np.random.default_rng(0), []
    for number in range(520):
        shade = (number % 2) * 200
        pixels = random.integers(shade, shade + 50, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        parts = [{"image": f"{number}.png"}, {"text": ("dark", "bright")[number % 2]}]
        lines.append(json.dumps({"split": "train" if number < 500 else "test", "segments": parts}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = evaluate(main, monkeypatch, capsys, tmp_path, "image", {"plugin": "vq"}, "--judge", "text")
    assert found["classes, of 20 items"] == 2
    assert found["class found in originals"] == 1
    assert 0 <= found["class found after the tokenizer"] <= 1
    assert found["the latter, share of the former"] == found["class found after the tokenizer"]
    with pytest.raises(SystemExit, match="--judge image: only pictures and sounds have a classifier"):
        evaluate(main, monkeypatch, capsys, tmp_path, "text", {"plugin": "bpe"}, "--judge", "image")


def test_texts(main, monkeypatch, capsys, folder):
    found = evaluate(main, monkeypatch, capsys, folder, "text", {"plugin": "bpe"})
    assert found["texts that come back unchanged"] == 1
    assert found["characters an item"] == found["codes an item"] == 5 * 3.5
    # Of five letters two are the same.
    assert found["level 0: entropy, nats of 5.55"] == pytest.approx(math.log(5) - 0.4 * math.log(2))
    assert found["level 0: codes in use, of 256"] == 4 / 256


def test_likelihood(main, monkeypatch, capsys, folder):
    tokenizers = {"text": BPETokenizer(), "image": VQTokenizer(), "speech": EncodecTokenizer("words-8khz")}
    make(tokenizers, dtype=torch.float32).save_pretrained(folder / "model")
    command = ["evaluate.py", "likelihood", "--data", str(folder), "--model", str(folder / "model"), "--draws", "2"]
    monkeypatch.setattr("sys.argv", command)
    main()
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert "6 documents of split 'test'" in printed
    assert "± a standard error; draws a document: 2." in printed
    assert "bits say nothing about pixels or samples" in printed
    assert (found["documents"], found["draws"]) == (6, 2)
    for mode in modes(["image", "speech", "text"]):
        assert f"| {mode} | {found[mode]['nats per token']:.4f} ±" in printed
        assert 0 < found[mode]["standard error"] < found[mode]["nats per token"]
    nats, bits = found["image/conditional"]["nats per token"], found["image/conditional"]["bits per dimension"]
    assert bits == pytest.approx(nats * 16 / 32 / 32 / math.log(2))
    assert "bits per second" in found["speech/unconditional"]
    assert "bits per byte" in found["text/unconditional"]
    assert not any(key.startswith("bits") for key in found["joint"])
    monkeypatch.setattr("sys.argv", [*command, "--split", "validation"])
    with pytest.raises(SystemExit, match="no documents in split 'validation'"):
        main()


def test_correction(main, monkeypatch, capsys, folder):
    make({"text": BPETokenizer(), "image": VQTokenizer()}, dtype=torch.float32).save_pretrained(folder / "model")
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in records:
        record["segments"] = [part for part in record["segments"] if "speech" not in part]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    kept = '{"remask": "edit", "editing_threshold": 1.0, "num_inference_steps": 2}'
    noised = '{"order": "random", "unmasking": "ancestral", "remask": "rescale", "eta": 1.0, "num_inference_steps": 3}'
    command = ["evaluate.py", "correction", "--data", str(folder), "--model", str(folder / "model"), "--name", "image"]
    monkeypatch.setattr("sys.argv", [*command, "--noise", "0.5", "--samplers", kept, noised])
    main()
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert f"| `{kept}` | 0.000 ± 0.000 | 0.000 ± 0.000 | 0.000 ± 0.000 | 1.0 |" in printed
    assert found[kept]["repaired"] == {"count": 0, "of": 6 * 2, "standard_error": 0.0}  # 2 of 16 codes each
    assert found[noised]["spoiled"]["count"] > 0
    monkeypatch.setattr("sys.argv", [*command, "--samplers", '{"remask": "all"}'])
    with pytest.raises(SystemExit, match=r'--samplers \{"remask": "all"\}: remask'):
        main()


def test_what_is_not_there_is_named(main, monkeypatch, capsys, folder):
    with pytest.raises(SystemExit, match=r"no document in split 'test' has a segment 'sound'"):
        evaluate(main, monkeypatch, capsys, folder, "sound", {"plugin": "bpe"})
