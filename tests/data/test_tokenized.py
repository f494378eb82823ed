"""Shards: items that cannot be read, what is tokenized together, damage and races; a fuzz of damage in small."""

import json
import logging
import os
import resource
import shutil
import signal
from pathlib import Path
from random import Random

import numpy as np
import pytest
import soundfile

from multidiff.data import DocumentDataModule, manifest, tokenized
from multidiff_bpe import BPETokenizer
from tests.fuzz import shards as shards_fuzz
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
    monkeypatch.setattr("multidiff.data.tokenized._BYTES_PER_BATCH", 100)
    monkeypatch.setattr("multidiff.data.tokenized._ITEMS_PER_BATCH", 4)
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
    assert len(list((tmp_path / ".tokenized").iterdir())) == 3


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
