"""Plain texts as a data folder."""

import json
import subprocess
import sys

from tests.helpers.paths import ROOT


def prepare(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "prepare_text.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_end_of_each_text_is_for_validation(tmp_path):
    texts = ["ab\n\n" * 50_000, "ü" * 10]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    done = prepare(tmp_path / "0.txt", tmp_path / "1.txt", "--output", tmp_path / "data", "--validation", 0.2)
    assert done.returncode == 0, done.stderr
    lines = [
        json.loads(line) for line in (tmp_path / "data" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    parts = {"train": "", "validation": ""}
    for line in lines:
        ((tokenizer, text),) = line["segments"][0].items()
        assert tokenizer == "text"
        assert len(text) <= 2**17
        parts[line["split"]] += text
    assert parts["train"] == texts[0][:160_000] + texts[1][:8]
    assert parts["validation"] == texts[0][160_000:] + texts[1][8:]


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    for arguments, message in (
        ((tmp_path / "none.txt",), "none.txt cannot be read as UTF-8"),
        ((tmp_path / "latin.txt",), "latin.txt cannot be read as UTF-8"),
        ((tmp_path / "latin.txt", "--validation", 1), "--validation must be between 0 and 1, not 1.0"),
    ):
        done = prepare(*arguments, "--output", tmp_path / "data")
        assert done.returncode == 1
        assert message in done.stderr
        assert not (tmp_path / "data").exists()
