"""Data folders of problems: disjoint splits, settings that are written down, and what is refused."""

import json
import subprocess
import sys
from itertools import combinations

import pytest

from demo.planning import corpus
from demo.planning.corpus import prepare, read_family, split_of
from demo.planning.countdown import Countdown
from demo.planning.path_star import PathStar
from demo.planning.sudoku import Sudoku
from multidiff.data.sources.folder import read_metadata
from tests.helpers.paths import ROOT

SIZES = {"train": 120, "validation": 10, "test": 10}


@pytest.mark.parametrize("family", [Sudoku(4, 5, 9), PathStar(2, 3), Countdown(3, 20)], ids=lambda family: family.name)
def test_a_folder_holds_problems_and_their_answers(family, tmp_path):
    folder = prepare(tmp_path / "data", family, train=120, held_out=10)
    records = read_metadata(folder)
    assert {split: sum(record.split == split for record in records) for split in SIZES} == SIZES
    keys = {split: set() for split in SIZES}
    for record in records:
        (name, question), (other, answer) = record.segments
        assert name == other == family.tokenizer
        assert record.labels == ["question", "answer"]
        assert family.solves(question, answer)
        keys[record.split].add(family.key(question))
    for split, other in combinations(keys, 2):
        assert not keys[split] & keys[other]
    assert len({record.segments[0][1] for record in records}) == len(records)
    assert read_family(folder) == family


def test_splits_are_shares_of_all_keys():
    assert [split_of(round(share * 2**64)) for share in (0, 0.099, 0.101, 0.199, 0.201)] == [
        *["test", "test"],
        *["validation", "validation"],
        "train",
    ]
    assert split_of(2**64 - 1) == "train"


def test_seeds_and_settings_decide_the_folder(tmp_path):
    """Another seed gives other problems, none of which was for training and is now held out."""
    same = [prepare(tmp_path / name, PathStar(2, 3), train=30, held_out=3, seed=1) for name in ("a", "b")]
    texts = [(folder / "metadata.jsonl").read_text() for folder in same]
    assert texts[0] == texts[1]
    before = (same[0] / "metadata.jsonl").stat().st_mtime_ns
    prepare(same[0], PathStar(2, 3), train=30, held_out=3, seed=1)
    assert (same[0] / "metadata.jsonl").stat().st_mtime_ns == before
    prepare(same[0], PathStar(2, 3), train=30, held_out=3, seed=2)
    assert (same[0] / "metadata.jsonl").read_text() != texts[1]


def test_what_stands_elsewhere_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metadata.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"mine holds something else. Choose a new folder or remove it"):
        prepare(tmp_path / "mine", PathStar(), train=1, held_out=1)
    assert (tmp_path / "mine" / "metadata.jsonl").read_text() == "mine"
    prepare(tmp_path / "stars", PathStar(), train=1, held_out=1)
    with pytest.raises(ValueError, match=r"stars holds problems of the family 'path-star'. Choose another folder"):
        prepare(tmp_path / "stars", Sudoku(), train=1, held_out=1)


def test_more_problems_than_there_are_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_MOST_MISSES", 300)
    with pytest.raises(ValueError, match=r"not enough problems: \d+ for train could not be found. Ask for fewer"):
        prepare(tmp_path / "data", Countdown(2, 10), train=300, held_out=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="at least 1 problem in each split, not 5 and 0"):
        prepare(tmp_path / "data", Countdown(), train=5, held_out=0)


@pytest.mark.parametrize("content", ["{}", '{"family": "chess"}', '{"family": "sudoku", "size": 4}', "[1]", "{"])
def test_a_folder_of_something_else_has_no_family(content, tmp_path):
    (tmp_path / "planning.json").write_text(content)
    with pytest.raises(ValueError, match=r"planning\.json"):
        read_family(tmp_path)


def test_the_command_line_chooses_family_and_settings(tmp_path):
    script = [sys.executable, ROOT / "scripts" / "prepare_planning.py", "sudoku", "--output", tmp_path / "data"]
    options = ["--max-givens", "12", "--train", "9", "--held-out", "2", "--seed", "3"]
    done = subprocess.run([*script, *options], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'data'}\n"
    settings = {"family": "sudoku", "size": 4, "min_givens": None, "max_givens": 12}
    assert json.loads((tmp_path / "data" / "planning.json").read_text()) == {
        **settings,
        **{"train": 9, "held_out": 2, "seed": 3},
    }
    failed = subprocess.run([*script, "--size", "5"], capture_output=True, text=True)
    assert failed.stderr == "prepare_planning.py: The size of a Sudoku must be 4 or 9, not 5.\n"
    assert failed.returncode == 1
