"""Shards: items that cannot be read, what is tokenized together, damage and races; a fuzz of damage in small."""

import json
import logging
import os
import resource
import signal
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
import soundfile
from lightning.pytorch import Trainer

from multidiff.data import DocumentDataModule, tokenizing
from multidiff.data.shards import Shard
from multidiff.data.sources import Folder
from multidiff_bpe import BPETokenizer
from tests.fuzz import shards as shards_fuzz
from tests.fuzz import tokenizing as killed_fuzz
from tests.helpers.data import data_of, rows_of, write
from tests.helpers.runs import WORDS, write_folder


def pairs_of(folder, **options):
    return DocumentDataModule(str(folder), {"text": {"plugin": "bpe"}, "shout": {"plugin": "bpe"}}, **options)


# --- items


@pytest.fixture
def texts_in_files(monkeypatch):
    """The text tokenizer reads files."""
    monkeypatch.setattr(BPETokenizer, "read", lambda self, value, folder: (Path(folder) / value).read_text("utf-8"))


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


def test_a_start_reads_the_source_once_and_opens_no_shard(tmp_path, monkeypatch):
    write(tmp_path, *rows_of("a", "b"))
    data_of(tmp_path).prepare_data()
    calls = []
    for owner, name in ((Folder, "fingerprint"), (Folder, "read"), (Folder, "states"), (Shard, "__init__")):
        original = getattr(owner, name)

        def spied(*arguments, original=original, name=name):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, spied)
    data = data_of(tmp_path)
    data.prepare_data()
    data.setup("fit")
    assert len(data.documents("train")) == 2
    assert data.labels == ["text"]
    assert calls == ["fingerprint"]
    data.prepare_data()  # another run of the same trainer looks again
    assert calls == ["fingerprint", "fingerprint"]


def test_bad_items_raise_or_are_skipped_and_counted(tmp_path, caplog):
    lone = '{"segments": [{"text": "\\ud800"}]}'
    write_folder(tmp_path, extra=['{"segments": [{"text": 7}]}', lone, lone])
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 41: .*on_error: skip"):
        pairs_of(tmp_path).prepare_data()
    with caplog.at_level("INFO"):
        data = pairs_of(tmp_path, on_error="skip")
        data.prepare_data()
    assert "Left out 3 documents" in caplog.text
    assert "line 42" in caplog.text
    assert "line 43" in caplog.text
    assert len(data.documents("train")) == 20


def test_a_bad_item_costs_others_few_more_calls(tmp_path, monkeypatch):
    calls = []
    encode = BPETokenizer.encode
    monkeypatch.setattr(BPETokenizer, "encode", lambda self, items: calls.append(len(items)) or encode(self, items))
    rows = [json.dumps({"segments": [{"text": str(number) if number != 50 else 7}]}) for number in range(100)]
    write_folder(tmp_path, number=0, extra=rows)
    data = pairs_of(tmp_path, on_error="skip")
    assert len(data.documents("train")) == 99
    assert sum(calls) == 99  # what cannot be read is not asked for
    calls.clear()
    rows[50] = json.dumps({"segments": [{"text": "\ud800"}]})
    write_folder(tmp_path, number=0, extra=rows)
    assert len(pairs_of(tmp_path, on_error="skip").documents("train")) == 99
    assert len(calls) < 20


def test_workers_hand_over_a_batch_of_sounds_with_few_open_files(tmp_path):
    for number in range(300):
        soundfile.write(tmp_path / f"{number}.wav", np.full(40, 0.1), 8_000)
    rows = [json.dumps({"segments": [{"speech": f"{number}.wav"}]}) for number in range(300)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    data = DocumentDataModule(str(tmp_path), {"speech": {"plugin": "encodec"}}, batch_size=4, num_workers=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 150, hard))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("no open files were left, and no batch came"))
    signal.alarm(60)
    try:
        data.prepare_data()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(data.documents("train")) == 300


def test_files_of_like_size_are_tokenized_together_and_not_too_many(tmp_path, monkeypatch):
    batches = []
    encode = BPETokenizer.encode
    monkeypatch.setattr(BPETokenizer, "encode", lambda self, items: batches.append(list(items)) or encode(self, items))
    monkeypatch.setattr("multidiff.data.tokenizing._BYTES_PER_BATCH", 100)
    monkeypatch.setattr("multidiff.data.tokenizing._ITEMS_PER_BATCH", 4)
    for name, size in {"a": 70, "b": 300, "c": 40, "d": 30, "e": 90, "f": 10}.items():
        (tmp_path / name).write_bytes(bytes(size))
    rows = [json.dumps({"segments": [{"text": text}]}) for text in "abcdefxyz"]
    write_folder(tmp_path, number=0, extra=rows)
    pairs_of(tmp_path).prepare_data()
    assert batches == [["b"], ["e"], ["a"], list("cdfx"), list("yz")]


def test_each_item_is_tokenized_once_and_again_after_a_change(tmp_path, monkeypatch):
    encoded = []
    encode = BPETokenizer.encode
    monkeypatch.setattr(BPETokenizer, "encode", lambda self, items: encoded.extend(items) or encode(self, items))
    write_folder(tmp_path)
    (tmp_path / "one").write_text("a file that a text happens to name")
    pairs_of(tmp_path).prepare_data()
    assert sorted(encoded) == sorted(WORDS + [word.upper() for word in WORDS])  # of 40 documents
    pairs_of(tmp_path).prepare_data()
    assert len(encoded) == 16
    write_folder(tmp_path, number=36)
    pairs_of(tmp_path).prepare_data()
    assert len(encoded) == 32
    (tmp_path / "one").write_text("another content")
    pairs_of(tmp_path).prepare_data()
    assert len(encoded) == 48
    assert len(list((tmp_path / ".tokenized").iterdir())) == 2


def test_captions_of_any_length_and_script(tmp_path):
    """Texts longer than a file's name may be, in characters or only in bytes, and empty ones."""
    texts = ["七" * 102, "a" * 5000, "nul \0 inside", ""]
    rows = [json.dumps({"segments": [{"text": text}, {"shout": "A"}]}, ensure_ascii=False) for text in texts]
    write_folder(tmp_path, number=0, extra=rows)
    data = pairs_of(tmp_path)
    documents = data.documents("train")
    kept = [data.tokenizers["text"].decode([documents.codes(index)[0][1]])[0] for index in range(len(documents))]
    assert kept == texts
    (place,) = (tmp_path / ".tokenized").iterdir()
    pairs_of(tmp_path).prepare_data()
    assert list((tmp_path / ".tokenized").iterdir()) == [place]


# --- shards


def test_fuzzed_shards(tmp_path):
    state = shards_fuzz.prepare(tmp_path, Random(1))
    for number in range(10):
        outcome = shards_fuzz.attempt(state, number, Random(number))
        assert outcome.startswith("read") or outcome == "refused (folder)"  # a folder may hold anything


def flip(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def place_of(folder):
    (place,) = (folder / ".tokenized").iterdir()
    return place


def test_a_damaged_shard_is_refused_by_name_and_made_again_when_it_is_gone(tmp_path, caplog):
    write(tmp_path, *rows_of("a", "b"), *rows_of("c", split="test"))
    codes = data_of(tmp_path).documents("train").codes(1)[0][1].ids_N.tolist()
    path = place_of(tmp_path) / "train" / "00000-000.arrow"
    good = path.read_bytes()
    flip(path)
    with pytest.raises(
        ValueError, match=rf"{path} is damaged: its checksum differs\. Delete it; the next start makes it"
    ):
        data_of(tmp_path).documents("train").codes(1)
    path.unlink()
    data = data_of(tmp_path)
    data.prepare_data()
    assert f"{path} is missing. What is damaged in {place_of(tmp_path)} is made again." in caplog.text
    assert data.documents("train").codes(1)[0][1].ids_N.tolist() == codes
    assert path.read_bytes() == good
    path.write_bytes(good[:-8])  # of another size, which a start sees
    assert data_of(tmp_path).documents("train").codes(1)[0][1].ids_N.tolist() == codes


def test_only_what_is_damaged_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "_DOCUMENTS_PER_WINDOW", 3)
    encoded = spy(monkeypatch)
    texts = [f"text {number}" for number in range(10)]
    write(tmp_path, *rows_of(*texts))
    assert len(data_of(tmp_path).documents("train")) == 10
    place = place_of(tmp_path)
    assert sorted(path.name for path in place.glob("*-*.json")) == [f"00000-00{number}.json" for number in range(4)]
    encoded.clear()
    (place / "train" / "00000-002.arrow").unlink()
    data = data_of(tmp_path)
    assert texts_of(data) == texts
    assert sorted(encoded) == texts[6:9]
    encoded.clear()
    (place / "00000-001.json").write_text("{}")
    (place / "shards.json").unlink()
    assert texts_of(data_of(tmp_path)) == texts
    assert sorted(encoded) == texts[3:6]


def test_a_changed_file_costs_its_window_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "_DOCUMENTS_PER_WINDOW", 2)
    encoded = spy(monkeypatch)
    for name in "abcd":
        (tmp_path / name).write_text("of any content: the tokenizer takes the name for a text")
    write(tmp_path, *rows_of(*"abcd"))
    data_of(tmp_path).prepare_data()
    encoded.clear()
    (tmp_path / "c").write_text("another content")
    data_of(tmp_path, check_files=False).prepare_data()
    assert encoded == []
    data_of(tmp_path).prepare_data()
    assert sorted(encoded) == ["c", "d"]


def spy(monkeypatch):
    encoded, encode = [], BPETokenizer.encode
    monkeypatch.setattr(BPETokenizer, "encode", lambda self, items: encoded.extend(items) or encode(self, items))
    return encoded


def texts_of(data):
    documents = data.documents("train")
    codes = [documents.codes(index)[0][1] for index in range(len(documents))]
    return data.tokenizers["text"].decode(codes)


def test_long_files_are_read_in_parts(tmp_path, monkeypatch):
    """Parts begin at whole lines, and lines keep their numbers."""
    monkeypatch.setattr("multidiff.data.sources.folder._LINES_PER_PART", 3)
    texts = [f"text {number}" for number in range(10)]
    lines = [line for row in rows_of(*texts) for line in (row, "")]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    data = data_of(tmp_path)
    (source,) = data.sources
    assert source.parts() == 7
    assert texts_of(data) == texts
    assert [record.line for part in range(7) for record in source.read(part)] == list(range(1, 20, 2))
    assert len(data.shards[0].shards["train"]) == 7
    documents = data.documents("train")
    assert documents.parts[0][0].where(4, 0) == f"{tmp_path}/metadata.jsonl, line 13"


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "_DOCUMENTS_PER_WINDOW", 2)
    texts = [f"text {number}" for number in range(9)]
    write(tmp_path, *rows_of(*texts))
    encode, calls = BPETokenizer.encode, []

    def stop(self, items):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(items)
        return encode(self, items)

    monkeypatch.setattr(BPETokenizer, "encode", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        data_of(tmp_path).prepare_data()
    assert not (place_of(tmp_path) / "shards.json").exists()
    calls.clear()
    monkeypatch.setattr(BPETokenizer, "encode", lambda self, items: calls.append(items) or encode(self, items))
    assert texts_of(data_of(tmp_path)) == texts
    assert calls == [texts[6:8], texts[8:]]


def test_two_runs_at_once_make_the_same_shards(tmp_path, monkeypatch):
    """The second run starts and ends while the first one tokenizes."""
    write(tmp_path, *rows_of("a", "b"))
    encode, runs = BPETokenizer.encode, []

    def slow(self, items):
        runs.append(len(runs))
        if len(runs) == 1:
            trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
            tokenizing.tokenize(*data.sources, data.tokenizers, data.vocabulary, trainer=trainer)
        return encode(self, items)

    monkeypatch.setattr(BPETokenizer, "encode", slow)
    data = data_of(tmp_path)
    assert texts_of(data) == ["a", "b"]
    assert len(data_of(tmp_path).documents("train")) == 2
    assert runs == [0, 1]


def test_shards_that_another_run_reads_outlive_their_replacement(tmp_path):
    write(tmp_path, *rows_of("a", "b"))
    data = data_of(tmp_path)
    data.documents("train").codes(0)  # opens the shard
    (place_of(tmp_path) / "train" / "00000-000.arrow").unlink()
    data_of(tmp_path).prepare_data()
    assert texts_of(data) == ["a", "b"]


def test_what_killed_runs_left_is_removed(tmp_path):
    write(tmp_path, *rows_of("a", "b"))
    data_of(tmp_path).prepare_data()
    place = place_of(tmp_path)
    left = [place / ".shards.json.x1y2.partial", place / "train" / ".00000-000.arrow.x1y2.partial"]
    for path in left:
        path.write_bytes(b"half")
    (place / "shards.json").unlink()
    data_of(tmp_path).prepare_data()
    assert not any(path.exists() for path in left)


def test_an_unwritable_cache_is_named(tmp_path):
    write(tmp_path, *rows_of("a", "b"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path}/file/.* cannot be written"):
        data_of(tmp_path, cache=str(tmp_path / "file")).prepare_data()


# --- faults


def test_a_worker_that_dies_or_hangs_is_named_with_what_it_was_reading(tmp_path, monkeypatch):
    def read(self, value, folder):
        if value == "deadly":
            os._exit(1)
        if value == "endless":
            time.sleep(60)
        return value

    monkeypatch.setattr(BPETokenizer, "read", read)
    for number, (value, options) in enumerate((("deadly", {}), ("endless", {"timeout": 1.0}))):
        folder = write(tmp_path / str(number), *rows_of("a", value))
        with pytest.raises(ValueError, match=rf"{folder}/metadata.jsonl: a worker died .* line 2: \"{value}\" \("):
            data_of(folder, num_workers=1, **options).prepare_data()
        assert not list(folder.rglob("shards.json"))
        monkeypatch.setattr(BPETokenizer, "read", lambda self, value, folder: value)
        assert texts_of(data_of(folder)) == ["a", value]
        monkeypatch.setattr(BPETokenizer, "read", read)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path):
    write(tmp_path, *rows_of(*(f"a text of some length, number {number}" for number in range(300))))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails then, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ValueError, match=rf"{tmp_path}/.tokenized/.*/train/00000-000.arrow cannot be written"):
            data_of(tmp_path).prepare_data()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not [path for path in place_of(tmp_path).rglob("*") if path.is_file()]
    assert len(data_of(tmp_path).documents("train")) == 300


def test_tokenizing_survives_being_killed(tmp_path):
    state = killed_fuzz.prepare(tmp_path, Random(1))
    assert killed_fuzz.attempt(state, 0, Random(0)).startswith("killed")
