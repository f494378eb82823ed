"""`metadata.jsonl`: encodings, bad lines, labels, other layouts; a fuzz of it in small."""

import json
import os
from random import Random

import pytest

from multidiff.data import DocumentDataModule
from multidiff.data.sources.folder import file_states, read_metadata
from tests.fuzz import metadata as metadata_fuzz
from tests.helpers.data import write
from tests.helpers.runs import write_folder

GOOD = '{"segments": [{"text": "café"}]}'


def pairs_of(folder, **options):
    return DocumentDataModule(str(folder), {"text": {"plugin": "bpe"}, "shout": {"plugin": "bpe"}}, **options)


@pytest.mark.parametrize(
    ("message", "content"),
    {
        "line 1: the file is UTF-16 text; save it as UTF-8": GOOD.encode("utf-16"),
        "line 1: the line holds NUL bytes": GOOD.encode("utf-16-le"),
        "line 2: not UTF-8 text .*byte 28.*save the file as UTF-8": f"{GOOD}\n".encode() + GOOD.encode("latin-1"),
        "line 2: the line holds NUL bytes": f"{GOOD}\n\0{GOOD}".encode(),
        "line 3: nested too deeply": f"{GOOD}\n\n".encode() + b"[" * 100_000,
        "line 1: not JSON .NaN is not a number of JSON": b'{"segments": [{"text": NaN}]}',
        "line 1: not JSON .the key 'text' stands twice": b'{"segments": [{"text": "a", "text": "b"}]}',
        "line 1: not JSON .the key 'segments' stands twice": b'{"segments": [], "segments": [{"text": "b"}]}',
        "line 1: not JSON .Exceeds the limit": b'{"segments": [{"text": 1' + b"0" * 9000 + b"}]}",
        'line 1: the layout with file_name .* {"split": "train", "segments": [{"image": "1.png"}, {"text": "a"}]}': (
            b'{"file_name": "1.png", "text": "a"}'
        ),
    }.items(),
)
def test_what_is_no_document_is_named_with_its_line(tmp_path, message, content):
    write(tmp_path, content)
    message = message.replace("[", r"\[").replace("{", r"\{")
    with pytest.raises(ValueError, match=f"metadata.jsonl, {message}"):
        read_metadata(tmp_path)


def test_encodings_and_line_ends_that_are_read(tmp_path):
    plain = read_metadata(write(tmp_path, GOOD, GOOD))
    for content in (f"\ufeff{GOOD}\n{GOOD}", f"{GOOD}\r\n{GOOD}\r\n", f"{GOOD}\r{GOOD}"):
        assert read_metadata(write(tmp_path, content)) == plain
    long = json.dumps({"segments": [{"text": "x" * 2_000_000}]})
    assert len(read_metadata(write(tmp_path, long))[0].segments[0][1]) == 2_000_000


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet"])
def test_other_layouts_are_told_how_to_convert(tmp_path, name):
    (tmp_path / name).write_text("file_name,text\n1.png,a\n")
    with pytest.raises(ValueError, match=rf'metadata.jsonl does not exist, but {name} does.*"segments": \['):
        read_metadata(tmp_path)


def test_what_is_in_place_of_the_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match=r"metadata.jsonl is a pipe"):
        read_metadata(tmp_path)


def test_states_of_files_are_those_of_the_system(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("four")
    (tmp_path / "link").symlink_to("a/b.txt")
    named = ["a/b.txt", "link", "a", "no", "x" * 9000, "nul\0", "\ud800", "", 7, None, ["a/b.txt"], "a/b.txt"]
    states = file_states(tmp_path, [*named, str(tmp_path / "link")])
    status = (tmp_path / "a" / "b.txt").stat()
    assert states == dict.fromkeys(["a/b.txt", "link", str(tmp_path / "link")], (4, status.st_mtime_ns))


def test_fuzzed_metadata(tmp_path):
    state = metadata_fuzz.prepare(tmp_path, Random(1))
    outcomes = [metadata_fuzz.attempt(state, number, Random(number)) for number in range(10)]
    assert set(outcomes) == {"read", "refused"}


BAD_LINES = {
    "line 41: not JSON": "{oops",
    "line 41: expected": "[1, 2]",
    "line 41: split 'dev' is none of": '{"split": "dev", "segments": [{"text": "a"}]}',
    "line 41: no tokenizer is called 'smell'; the configuration has text, shout": '{"segments": [{"smell": "a"}]}',
    "line 41, segment 0: expected one tokenizer name": '{"segments": [{"text": "a", "shout": "b"}]}',
    "line 41: unknown key 'spilt'": '{"spilt": "train", "segments": [{"text": "a"}]}',
    "line 41: expected .*segments": '{"segments": []}',
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_bad_lines_are_named(tmp_path, message):
    write_folder(tmp_path, extra=[BAD_LINES[message]])
    with pytest.raises(ValueError, match=f"metadata.jsonl, {message}"):
        pairs_of(tmp_path).prepare_data()
    assert not list(tmp_path.glob(".tokenized/*"))


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match=r"metadata.jsonl does not exist"):
        pairs_of(tmp_path).prepare_data()
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"metadata.jsonl has no documents"):
        pairs_of(tmp_path).prepare_data()


def test_labels_are_names_unless_the_line_gives_others(tmp_path):
    lines = [
        {"segments": [{"text": "why?", "label": "question"}, {"text": "so"}, {"label": "answer", "text": "no"}]},
        {"segments": [{"text": "a"}, {"shout": "A", "label": "text"}]},
    ]
    first, second = read_metadata(write(tmp_path, *map(json.dumps, lines)))
    assert first.labels == ["question", "text", "answer"]
    assert first.segments == [("text", "why?"), ("text", "so"), ("text", "no")]
    assert second.labels == ["text", "text"]


@pytest.mark.parametrize("label", ["others", "", 7, None, ["a"], {"a": "b"}])
def test_bad_labels_are_named(tmp_path, label):
    bad = json.dumps({"segments": [{"text": "a"}, {"text": "b", "label": label}]})
    with pytest.raises(
        ValueError, match=r"metadata.jsonl, line 2, segment 1: a label must be a word other than 'others'"
    ):
        read_metadata(write(tmp_path, GOOD, bad))


@pytest.mark.parametrize("segment", ['{"label": "a"}', '{"text": "a", "shout": "b", "label": "c"}', "[]", '"a"', "{}"])
def test_a_segment_without_one_name_is_named(tmp_path, segment):
    with pytest.raises(ValueError, match="line 1, segment 0: expected one tokenizer name"):
        read_metadata(write(tmp_path, f'{{"segments": [{segment}]}}'))
