"""Miniatures of the whole demos: the same commands on a few pictures and a few seconds of training."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from demo.__main__ import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    main(["--output", str(folder), "--pictures", "120", "--minutes", "0.05", "--num-samples", "4"])
    return folder


def test_emoji_end_in_the_same_report_in_colour(tmp_path):
    main(["emoji", "--output", str(tmp_path), "--pictures", "1", "--minutes", "0.03", "--num-samples", "2"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["text_to_image"]["n"] == 2
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "OpenMoji" in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB"), int) for one in pictures]
    assert max(np.ptp(one, axis=2).max() for one in shown) > 60  # colour, where grey has none


def test_report_and_metrics(demo, capsys):
    metrics = json.loads((demo / "metrics.json").read_text())
    for direction in (
        "image_to_text", "audio_to_text", "text_to_image", "audio_to_image", "text_to_audio", "image_to_audio",
    ):  # fmt: skip
        assert set(metrics[direction]) == {"score", "real", "reconstruction", "n"}
        assert 0 <= metrics[direction]["score"] <= 1
        assert metrics[direction]["n"] >= 1
    assert set(metrics["diversity"]) == {"image", "audio"}
    assert set(metrics["bound_nats_per_token"]) == {"text", "image", "speech", "joint"}
    for key in ("train_seconds", "total_seconds", "parameters", "samples_seen"):
        assert metrics[key] > 0
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert "<audio" in page
    assert "<img" in page
    assert "multidiff fit" in page
    for reference in ('src="http', 'href="http', "url(http"):
        assert reference not in page


def test_finished_stages_are_not_done_again(demo, capfd):
    before = (demo / "metrics.json").stat().st_mtime_ns
    main(["--output", str(demo), "--pictures", "120", "--minutes", "0.05", "--num-samples", "4"])
    assert (demo / "metrics.json").stat().st_mtime_ns == before
    assert capfd.readouterr().out.count("done before") == 5


def test_other_options_do_not_pass_for_what_was_done(demo):
    before = (demo / "commands.txt").read_text()
    with pytest.raises(SystemExit, match="data was done with other options"):
        main(["--output", str(demo), "--pictures", "120", "--minutes", "0.05", "--num-samples", "4", "--seed", "1"])
    assert (demo / "commands.txt").read_text() == before
