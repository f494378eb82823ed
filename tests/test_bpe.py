"""The text tokenizer: lossless for any string, trained reproducibly, strict about files."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multidiff.testing import check_tokenizer
from multidiff.tokenizer import Codes, ItemError
from multidiff_bpe import BPETokenizer
from multidiff_bpe.__main__ import main
from multidiff_bpe.bpe import BYTES

TEXTS = ["a handwritten seven", "the digit seven", "someone says eleven", "Größe und 你好 🙂"] * 3
TRAINED = BPETokenizer.train(TEXTS, 300)


@pytest.mark.parametrize("tokenizer", [BPETokenizer(), TRAINED], ids=["bytes", "trained"])
def test_contract(tokenizer, tmp_path):
    check_tokenizer(tokenizer, tmp_path)


@settings(deadline=None)
@given(st.lists(st.text(), max_size=4))
def test_every_string_comes_back_unchanged(texts):
    for tokenizer in (BPETokenizer(), TRAINED):
        assert tokenizer.decode(tokenizer.encode(texts)) == texts


@settings(deadline=None)
@given(st.lists(st.integers(0, TRAINED.codebook_sizes[0] - 1), max_size=40))
def test_any_codes_are_a_text_that_can_be_seen_and_written(tmp_path_factory, ids):
    canvas = TRAINED.canvas(tokens=len(ids))
    (text,) = TRAINED.decode([Codes(torch.tensor(ids, dtype=torch.int64), canvas.levels_N, canvas.coords_N3)])
    text.encode()
    assert min(TRAINED.preview(text).size) > 0
    path = TRAINED.write(text, tmp_path_factory.getbasetemp() / "text")
    assert path.read_bytes().decode() == text


def test_bytes_that_are_no_utf8_become_the_replacement_character():
    codes = BPETokenizer().encode(["é!"])[0]
    assert len(codes) == 3
    half = Codes(codes.ids_N[1:], codes.levels_N[1:], codes.coords_N3[:2], {"tokens": 2})
    assert BPETokenizer().decode([half]) == ["\ufffd!"]


@pytest.mark.parametrize("item", ["half \ud83d of a pair", 7, None, b"bytes"])
def test_what_is_no_text_is_refused(item, tmp_path):
    with pytest.raises(ItemError, match=r"surrogate pair at character 5|must be a string"):
        BPETokenizer().encode(["fine", item])
    with pytest.raises(ItemError):
        BPETokenizer().read(item, tmp_path)
    with pytest.raises(ItemError):
        BPETokenizer.train([item], 300)


def test_training_merges_what_is_frequent_within_the_size_asked_for():
    assert BPETokenizer().codebook_sizes == (256,)
    assert TRAINED.codebook_sizes == (300,)
    assert len(TRAINED.encode(["seven"])[0]) < 5
    assert BPETokenizer.train(["ab"], 1000).codebook_sizes == (257,)
    with pytest.raises(ValueError, match="at least 256"):
        BPETokenizer.train(TEXTS, 255)


def test_training_is_the_same_in_another_process():
    code = f"from multidiff_bpe import BPETokenizer; print(BPETokenizer.train({TEXTS!r}, 300).fingerprint)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == TRAINED.fingerprint
    assert BPETokenizer.train(TEXTS, 299).fingerprint != TRAINED.fingerprint


def test_preview_of_a_long_text_stays_a_preview():
    width, height = TRAINED.preview("word " * 5000).size
    assert width < 1000
    assert height < 1000


def _saved(tmp_path):
    TRAINED.save(tmp_path)
    return json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))


def _unigram(state):
    state["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]}


def _lacks_a_byte(state):
    state["model"]["vocab"]["<not a byte>"] = state["model"]["vocab"].pop("Ċ")


def _prefix_space(state):
    state["pre_tokenizer"]["add_prefix_space"] = True


def _normalizer(state):
    state["normalizer"] = {"type": "NFC"}


def _stripping_token(state):
    flags = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False, "special": True}
    state["added_tokens"] = [{"id": 300, "content": "<end>", **flags}]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_unigram, "Unigram, not BPE"),
        (_lacks_a_byte, "lacks 1 of the 256 bytes"),
        (lambda state: state["model"].update(unk_token="!"), "unknown token"),
        (lambda state: state["model"].update(dropout=0.1), "drop out"),
        (lambda state: state["model"]["merges"].append(["no", "such pair"]), "damaged"),
        (lambda state: state.pop("model"), "damaged"),
        (_prefix_space, "changes text"),
        (_normalizer, "changes text"),
        (_stripping_token, "changes text"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, change, fault):
    state = _saved(tmp_path)
    change(state)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ValueError, match=fault) as caught:
        BPETokenizer.load(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_a_plain_added_token_is_welcome(tmp_path):
    state = _saved(tmp_path)
    _stripping_token(state)
    state["added_tokens"][0].update(lstrip=False, rstrip=False)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    tokenizer = BPETokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.codebook_sizes == (301,)
    check_tokenizer(tokenizer, tmp_path)
    (codes,) = tokenizer.encode(["one <end> two"])
    assert 300 in codes.ids_N.tolist()
    assert tokenizer.decode([codes]) == ["one <end> two"]


def test_the_bytes_have_one_id_each(tmp_path):
    vocabulary = _saved(tmp_path)["model"]["vocab"]
    assert sorted(vocabulary[byte] for byte in BYTES) == list(range(256))


@pytest.fixture
def data(tmp_path):
    lines = [
        {"split": "train", "segments": [{"text": "seven seven"}, {"image": "7.png"}, {"title": "eleven"}]},
        {"split": "test", "segments": [{"text": "unheard of"}]},
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


def test_command_trains_on_the_train_split_and_on_text_files(data, tmp_path, capsys):
    main(["--data", str(data), "--vocab-size", "260", "--output", str(tmp_path / "out")])
    assert "260 codes from 1 texts" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tokenizer.json"]
    assert BPETokenizer.load(tmp_path / "out").fingerprint == BPETokenizer.train(["seven seven"], 260).fingerprint

    (tmp_path / "book.txt").write_text("seven\neleven\n", encoding="utf-8")
    sources = ["--data", str(data), str(tmp_path / "book.txt"), "--key", "title"]
    main([*sources, "--vocab-size", "258", "--output", str(tmp_path / "out")])
    expected = BPETokenizer.train(["eleven", "seven\n", "eleven\n"], 258)
    assert BPETokenizer.load(tmp_path / "out").fingerprint == expected.fingerprint


def test_command_says_what_is_wrong_with_its_data(data, tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    number = tmp_path / "number"
    number.mkdir()
    (number / "metadata.jsonl").write_text('\n{"segments": [{"text": 7}]}', encoding="utf-8")
    for arguments, fault in [
        ([data, "--key", "speech"], "has no 'speech'; choose a --key of: image, text, title"),
        ([number], "metadata.jsonl, line 2: 'text' must be a string"),
        ([tmp_path / "latin.txt"], "latin.txt is no UTF-8 text"),
        ([tmp_path / "empty.txt"], "empty.txt: there is no text"),
        ([tmp_path / "missing.txt"], "missing.txt"),
        ([data, "--vocab-size", "12"], "at least 256"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            main(["--vocab-size", "300", "--output", str(tmp_path / "out"), "--data", *map(str, arguments)])
        assert fault in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
