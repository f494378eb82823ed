"""The emoji folder: OpenMoji in colour, no picture and no voice of one split in another; OpenMoji for a tokenizer."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from demo import openmoji
from demo.corpus import label_in, label_of, read_names
from demo.emoji import NAMES, prepare
from demo.openmoji import catalogue, draw
from multidiff.data.sources.folder import read_metadata
from tests.helpers.paths import ROOT

SCRIPTS = ROOT / "scripts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("emoji") / "data", pictures=1, progress=False)


def test_a_document_is_about_one_of_a_hundred_names(folder):
    assert len(set(NAMES)) == len(NAMES) == 100
    assert read_names(folder) == ("emoji", NAMES)
    records = read_metadata(folder)
    assert len(records) == 100 * 3
    for record in records:
        labels = {
            label_in(value, NAMES) if name == "text" else label_of(value, NAMES) for name, value in record.segments
        }
        assert len(labels) == 1
        assert None not in labels


def test_pictures_are_in_colour_and_each_is_its_own(folder):
    values = [value for record in read_metadata(folder) for name, value in record.segments if name == "image"]
    assert len(set(values)) == len(values) == len(list((folder / "images").iterdir()))
    seen, colours = set(), 0
    for value in values:
        picture = Image.open(folder / value)
        assert (picture.mode, picture.size) == ("RGB", (32, 32))
        seen.add(picture.tobytes())
        pixels = np.asarray(picture).astype(int)
        colours += (pixels.max(2) - pixels.min(2)).max() > 60
    assert len(seen) == len(values)
    assert colours > 0.7 * len(values)  # a ghost and a few others are white


def test_a_moved_drawing_is_the_same_picture_elsewhere():
    plain, other = draw("🚀", 32), draw("🚀", 32, np.random.default_rng(0))
    assert not np.array_equal(plain, other)
    ink = [(255 - pixels.astype(int)).sum() for pixels in (plain, other)]
    assert 0.6 < ink[1] / ink[0] < 1.5
    with pytest.raises(ValueError, match="no picture of ' '"):
        draw(" ", 32)


def test_made_once_unless_changed(folder, tmp_path):
    before = (folder / "metadata.jsonl").stat()
    prepare(folder, pictures=1, progress=False)
    assert (folder / "metadata.jsonl").stat() == before
    with pytest.raises(ValueError, match="--pictures must be 1 to 1000, got 0"):
        prepare(tmp_path / "data", pictures=0)


def test_all_of_openmoji_with_a_tenth_held_out(tmp_path):
    folder = openmoji.prepare(tmp_path / "data", size=8, num_augmentations=1, progress=False)
    by_split = {}
    for record in read_metadata(folder):
        values = dict(record.segments)
        by_split.setdefault(record.split, {}).setdefault(values["text"], []).append(values["image"])
        assert (folder / values["image"]).is_file()
    names = set(catalogue())
    assert len(names) > 1300
    assert set.union(*map(set, by_split.values())) == names
    assert sum(map(len, by_split.values())) == len(names)
    assert len(by_split["test"]) == len(names) // 10
    assert {len(values) for values in by_split["train"].values()} == {2}
    assert {len(values) for values in by_split["test"].values()} == {1}
    with pytest.raises(ValueError, match="holds something else"):
        prepare(folder, pictures=1)


def test_script_ends_with_the_message_alone(tmp_path):
    command = [sys.executable, str(SCRIPTS / "prepare_openmoji.py"), "--output", str(tmp_path / "data"), "--size", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        == "prepare_openmoji.py: --size must be 1 or more and --num-augmentations 0 or more, got 0 and 12"
    )
