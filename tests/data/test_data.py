"""Data folders: bad metadata, damaged shards, long documents, what is left out; a fuzz of each in small."""

import json
import logging
import os
import shutil
from itertools import chain
from pathlib import Path
from random import Random

import pytest
from datasets import Dataset

from multidiff.data import DocumentDataModule, manifest, tokenized
from multidiff.data.folder import file_states, read_metadata
from multidiff.data.length import select
from multidiff.data.module import Documents
from multidiff.sequence.sequencer import MAX_CODES, Sequencer
from multidiff.sequence.vocabulary import SharedVocabulary
from multidiff_bpe import BPETokenizer
from tests.fuzz import metadata as metadata_fuzz
from tests.fuzz import shards as shards_fuzz
from tests.helpers.toys import Frames, Grid

GOOD = '{"segments": [{"text": "café"}]}'


def write(folder, *lines):
    folder.mkdir(exist_ok=True)
    content = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    (folder / "metadata.jsonl").write_bytes(content)
    return folder


def data_of(folder, **options):
    return DocumentDataModule(str(folder), {"text": {"plugin": "bpe", "preset": "bytes"}}, **options)


# --- metadata.jsonl


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


# --- items that cannot be read


@pytest.fixture
def texts_in_files(monkeypatch):
    """The text tokenizer reads files."""
    monkeypatch.setattr(BPETokenizer, "read", lambda self, value, folder: (Path(folder) / value).read_text("utf-8"))


def rows_of(*values, split="train"):
    return [json.dumps({"split": split, "segments": [{"text": value}]}) for value in values]


def test_any_failure_to_read_is_the_items_own(tmp_path, texts_in_files):
    (tmp_path / "good").write_text("good")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    write(tmp_path, *rows_of("good", "x" * 5000, "nul\0", "latin", "."))
    data = data_of(tmp_path, on_error="skip")
    assert len(data.documents("train")) == 1
    (place,) = (tmp_path / ".tokenized").iterdir()
    skipped = json.loads((place / "skipped.json").read_text())
    assert [line.split(": ")[0] for line in skipped] == [f"{tmp_path}/metadata.jsonl, line {n}" for n in (2, 3, 4, 5)]
    assert f'"{"x" * 99}… cannot be read (File name too long)' in skipped[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_the_same_sentence(tmp_path, texts_in_files, workers):
    write(tmp_path, *rows_of("absent"))
    with pytest.raises(ValueError, match="line 1") as error:
        data_of(tmp_path, num_workers=workers).prepare_data()
    assert str(error.value) == (
        f'{tmp_path}/metadata.jsonl, line 1: "absent" cannot be read (No such file or directory). '
        "Or set on_error: skip to leave such documents out."
    )


def test_much_left_out_is_a_warning_and_everything_an_error(tmp_path, caplog):
    write(tmp_path, *rows_of(*"abcdefghi", 1), *rows_of("a", 2, split="validation"), *rows_of(3, split="test"))
    data = data_of(tmp_path, on_error="skip")
    data.prepare_data()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2  # a tenth of the training split is not much
    assert warnings[0].startswith("WARNING: 50% of split 'validation' is left out, 1 of 2 documents; see ")
    with pytest.raises(ValueError, match=r"All 1 documents of split 'test' were left out .*skipped.json"):
        data.documents("test")
    write(tmp_path, *rows_of("a", split="test"))
    with pytest.raises(ValueError, match=r'has no documents in split \'train\'\. Set "split": "train" on'):
        data_of(tmp_path).documents("train")


def test_a_start_parses_and_verifies_once(tmp_path, monkeypatch):
    write(tmp_path, *rows_of("a", "b"))
    data_of(tmp_path).prepare_data()
    calls = []
    for module, name in ((tokenized, "parse_metadata"), (tokenized, "file_states"), (manifest, "verify")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, original=original, name=name: calls.append(name) or original(*args)
        )
    data = data_of(tmp_path)
    data.prepare_data()
    data.setup("fit")
    data.documents("train")
    assert calls == ["parse_metadata", "file_states", "verify"]
    data.prepare_data()  # another run of the same trainer looks again
    assert len(calls) == 6


# --- shards


def test_fuzzed_shards(tmp_path):
    state = shards_fuzz.prepare(tmp_path, Random(1))
    for number in range(10):
        assert shards_fuzz.attempt(state, number, Random(number)).startswith("read")


def flip(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def test_damaged_shards_are_made_again_and_say_why(tmp_path, caplog):
    write(tmp_path, *rows_of("a", "b"))
    before = data_of(tmp_path).documents("train")
    (place,) = (tmp_path / ".tokenized").iterdir()
    path = place / "train" / "part-00000" / "data-00000-of-00001.arrow"
    mapped = before.codes(1)[0][1].ids_N.tolist()
    flip(path)
    data_of(tmp_path).prepare_data()
    assert f"{path} is damaged: its checksum differs. The shards in {place} are only a cache" in caplog.text
    assert data_of(tmp_path).documents("train").codes(1)[0][1].ids_N.tolist() == mapped
    assert list((tmp_path / ".tokenized").iterdir()) == [place]


def test_shards_that_another_run_reads_outlive_their_replacement(tmp_path):
    write(tmp_path, *rows_of("a", "b"))
    data = data_of(tmp_path)
    before = data.documents("train")
    (place,) = (tmp_path / ".tokenized").iterdir()
    flip(place / "skipped.json", 0)
    data_of(tmp_path).prepare_data()
    assert data.tokenizers["text"].decode([before.codes(index)[0][1] for index in (0, 1)]) == ["a", "b"]


@pytest.mark.parametrize("damaged", [False, True])
def test_two_runs_at_once_make_the_same_shards(tmp_path, monkeypatch, damaged):
    """The second run starts and ends while the first one tokenizes."""
    write(tmp_path, *rows_of("a", "b"))
    if damaged:
        data_of(tmp_path).prepare_data()
        (place,) = (tmp_path / ".tokenized").iterdir()
        flip(place / "manifest.json")
    tokenize, runs = tokenized._tokenize, []

    def slow(*arguments):
        runs.append(len(runs))
        if len(runs) == 1:
            data_of(tmp_path).prepare_data()
        return tokenize(*arguments)

    monkeypatch.setattr(tokenized, "_tokenize", slow)
    assert len(data_of(tmp_path).documents("train")) == 2
    assert len(data_of(tmp_path).documents("train")) == 2
    assert runs == [0, 1]
    assert len(list((tmp_path / ".tokenized").iterdir())) == 1


def test_damaged_shards_that_cannot_be_made_again_name_the_folder(tmp_path, monkeypatch):
    write(tmp_path, *rows_of("a", "b"))
    data_of(tmp_path).prepare_data()
    (place,) = (tmp_path / ".tokenized").iterdir()
    (place / "manifest.json").unlink()
    monkeypatch.setattr(
        BPETokenizer, "read", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(ValueError, match=rf"line 1: .*Permission denied.*{place} are damaged .*delete that folder"):
        data_of(tmp_path).prepare_data()


def test_a_manifest_is_read_again_where_another_run_replaces_the_folder(tmp_path, monkeypatch):
    """One that is read while another process exchanges the folder belongs to neither."""
    write(tmp_path, *rows_of("a", "b"))
    data_of(tmp_path).prepare_data()
    (place,) = (tmp_path / ".tokenized").iterdir()
    good = shutil.copytree(place, tmp_path / "good")
    flip(place / "train" / "part-00000" / "state.json")
    check = manifest.read

    def read_and_replace(folder):
        content = check(folder)
        if good.exists():
            shutil.rmtree(place)
            good.rename(place)
            raise ValueError("what a mixture of two folders looks like")
        return content

    monkeypatch.setattr(manifest, "read", read_and_replace)
    assert manifest.verify(place)["counts"]["train"] == {"kept": 2, "left_out": 0}


def test_what_killed_runs_left_is_removed_whatever_they_made(tmp_path):
    write(tmp_path, *rows_of("a", "b"))
    cache = tmp_path / ".tokenized"
    for name in (f".{'a' * 24}.x1y2.partial", ".others.x1y2.partial", ".other.files"):
        (cache / name).mkdir(parents=True)
    data_of(tmp_path).prepare_data()
    assert sorted(path.name for path in cache.iterdir() if path.name[0] == ".") == [
        ".other.files",
        ".others.x1y2.partial",
    ]


def test_an_unwritable_cache_is_named(tmp_path):
    write(tmp_path, *rows_of("a", "b"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path}/file/.* cannot be written"):
        data_of(tmp_path, cache=str(tmp_path / "file")).prepare_data()


# --- long documents

TOKENIZERS = {"picture": Grid(5, 2, 3), "speech": Frames((4, 3)), "note": Frames((6,))}
SEQUENCER = Sequencer(TOKENIZERS, SharedVocabulary.of(TOKENIZERS))


def documents_of(*rows, most=None, long="raise", split="train"):
    """Documents of rows of (name, item), as shards hold them."""
    listing = []
    for line, row in enumerate(rows, start=1):
        codes = [TOKENIZERS[name].encode([item])[0] for name, item in row]
        ids, sizes = [one.ids_N.tolist() for one in codes], [json.dumps(one.size) for one in codes]
        length = 1 + sum(2 + len(one) for one in ids)
        listing.append({"line": line, "length": length, "names": [n for n, _ in row], "ids": ids, "sizes": sizes})
    dataset = Dataset.from_list(listing)
    selection = select(dataset, split, TOKENIZERS, most, long, Path("d/metadata.jsonl"))
    return Documents(dataset, selection, SEQUENCER, usual={}, max_eos_padding={}, seed=0, shuffled=False)


def items(documents, index):
    return [(name, TOKENIZERS[name].decode([codes])[0]) for name, codes in documents.codes(index)]


def notes(*counts):
    return [("note", [index % 6 for index in range(count)]) for count in counts]


PICTURE = ("picture", [1] * 6)
SPEECH = ("speech", [index % 4 if index % 2 == 0 else index % 3 for index in range(40)])  # 20 frames of 2 codes


def test_length_counts_structure_and_codes(tmp_path):
    """The recorded length is that of the row that the sequencer makes, less its stops."""
    write(tmp_path, *rows_of("abc", ""))
    data = data_of(tmp_path, row_length=None)
    for index, length in ((0, 1 + 2 + 3), (1, 1 + 2)):
        (segment,) = data.documents("train")[0, index]
        assert data.sequencer.batch([[segment]]).ids_BL.shape[1] - (len(segment) - segment.content) == length
        assert data.documents("train").rows[index]["length"] == length


def test_a_long_document_is_refused_by_file_and_line(tmp_path):
    write(tmp_path, *rows_of("short", "x" * 20, "x" * 30))
    data = data_of(tmp_path, max_seq_length=20)
    with pytest.raises(
        ValueError,
        match=rf"{tmp_path}/metadata.jsonl, line 2: the document has 23 tokens, more than max_seq_length 20",
    ):
        data.documents("train")
    (place,) = (tmp_path / ".tokenized").iterdir()
    assert len(data_of(tmp_path, max_seq_length=None).documents("train")) == 3
    assert len(data_of(tmp_path, max_seq_length=23, long_documents="skip").documents("train")) == 2
    assert list((tmp_path / ".tokenized").iterdir()) == [place]  # the limit is none of their business


def test_long_documents_are_skipped_counted_and_listed(caplog):
    rows = [notes(20), notes(3), notes(30)]
    with caplog.at_level("INFO"):
        documents = documents_of(*rows, most=10, long="skip")
    assert [items(documents, index) for index in range(len(documents))] == [notes(3)]
    assert "than max_seq_length 10 are left out: 2 of 3 in split 'train', d/metadata.jsonl, lines 1, 3." in caplog.text
    assert "WARNING: 67% of split 'train' is left out" in caplog.text
    with pytest.raises(ValueError, match=r"d/metadata.jsonl: all 2 documents .* \(lines 1, 2\)"):
        documents_of(notes(20), notes(30), most=10, long="skip")


def test_cropped_documents_fit_and_lose_the_ends_of_their_longest_segments():
    # 23 tokens, 9 of them <bos> and structure: 14 for codes, of which the picture takes 6, a note 2.
    row = [*notes(2), PICTURE, SPEECH, *notes(50)]
    documents = documents_of(notes(5), row, most=23, long="crop")
    assert items(documents, 0) == notes(5)
    note, picture, speech, long_note = items(documents, 1)
    assert [note, picture] == [*notes(2), PICTURE]
    assert speech == ("speech", SPEECH[1][:2])  # one of 20 frames: whole, all its levels
    assert long_note == notes(4)[0]
    for epoch in range(3):
        segments = documents[epoch, 1]
        assert [len(segment) - segment.content for segment in segments][1:] == [0, 0, 0]  # no stop where none belongs
        assert len(segments[0]) > segments[0].content
        batch = SEQUENCER.batch([segments])
        assert batch.ids_BL.shape[1] <= 23 + len(segments[0]) - segments[0].content


@pytest.mark.parametrize("most", range(17, 60))
def test_crops_are_as_long_as_fits(most):
    (row,) = (documents_of([PICTURE, SPEECH, *notes(15)], most=most, long="crop")[0, 0],)
    lengths = {segment.tokenizer: segment.content for segment in row}
    total = 7 + sum(lengths.values())
    assert min(most, 7 + 6 + 40 + 15) - 1 <= total <= most or total == 68
    assert lengths["speech"] % 2 == 0
    assert lengths["note"] == 15 or lengths["speech"] - lengths["note"] in (-1, 0, 1)


def test_split_keeps_all_codes_in_order():
    rows = [notes(5), [SPEECH], notes(50), notes(17)]
    documents = documents_of(*rows, most=20, long="split")
    assert documents.selection.rows == [0, 1, 1, 1, 2, 2, 2, 3]
    pieces = [items(documents, index)[0][1] for index in range(len(documents))]
    assert pieces[0] == notes(5)[0][1]
    assert list(chain(*pieces[1:4])) == SPEECH[1]
    assert [len(piece) for piece in pieces] == [5, 12, 14, 14, 16, 17, 17, 17]
    assert list(chain(*pieces[4:7])) == notes(50)[0][1]
    stops = [len(segment) - segment.content for (segment,) in (documents[0, index] for index in range(8))]
    assert [bool(stop) for stop in stops] == [True, False, False, True, False, False, True, True]


@pytest.mark.parametrize(
    ("long", "row", "message"),
    [
        ("crop", [PICTURE, PICTURE], "segments of fixed length leave too little room"),
        ("crop", [PICTURE, *notes(9)], "segments of fixed length leave too little room"),
        ("split", [*notes(50), *notes(1)], "Only a document of one segment of varying length can be split"),
        ("split", [PICTURE, PICTURE], "Only a document of one segment of varying length can be split"),
    ],
)
def test_what_cannot_be_cropped_or_split_is_refused(long, row, message):
    with pytest.raises(ValueError, match=f"d/metadata.jsonl, line 2: the document has .* tokens.*{message}"):
        documents_of(notes(1), row, most=11, long=long)


def test_bad_limits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_seq_length 0 must be at least 1"):
        data_of(tmp_path, max_seq_length=0)
    with pytest.raises(ValueError, match="long_documents 'cut' is none of raise, skip, crop, split"):
        data_of(tmp_path, long_documents="cut")


# --- canvases


@pytest.mark.parametrize(
    ("name", "size"),
    [("speech", {"frames": 10**8}), ("note", {"frames": 10**30}), ("picture", {"height": 10**5, "width": 10**5})],
)
def test_a_canvas_too_large_is_refused_before_it_is_made(monkeypatch, name, size):
    made = []
    for kind in (Grid, Frames):
        canvas = kind.canvas
        monkeypatch.setattr(
            kind, "canvas", lambda self, canvas=canvas, **size: made.append(size) or canvas(self, **size)
        )
    sequencer = Sequencer(TOKENIZERS, SharedVocabulary.of(TOKENIZERS))
    with pytest.raises(ValueError, match=f"canvas of {name} of size .* codes, more than the 1,048,576"):
        sequencer.blank(name, size)
    assert made == [{}]


def test_the_largest_canvas_is_made():
    assert len(SEQUENCER.canvas("speech", {"frames": MAX_CODES // 2})) == MAX_CODES
    with pytest.raises(ValueError, match="canvas of speech"):
        SEQUENCER.canvas("speech", {"frames": MAX_CODES // 2 + 1})
    with pytest.raises(ValueError, match="canvas of picture of size"):
        SEQUENCER.canvas("picture", {"height": "many"})
