"""The text tokenizer: lossless for any string, trained reproducibly, strict about files."""

import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multidiff.testing import check_tokenizer
from multidiff.tokenizer import Codes, ItemError
from multidiff_bpe import BPETokenizer
from multidiff_bpe.__main__ import main
from multidiff_bpe.bpe import BYTES

TEXTS = ["a handwritten seven", "the digit seven", "someone says eleven", "Größe und 你好 🙂"] * 3
TRAINED = BPETokenizer.train(TEXTS, 300)
CHARACTERS = BPETokenizer.train_characters(TEXTS)


@pytest.mark.parametrize("tokenizer", [BPETokenizer(), TRAINED, CHARACTERS], ids=["bytes", "trained", "characters"])
def test_contract(tokenizer, tmp_path):
    check_tokenizer(tokenizer, tmp_path)


@settings(deadline=None)
@given(st.lists(st.text(), max_size=4))
def test_every_string_comes_back_unchanged(texts):
    for tokenizer in (BPETokenizer(), TRAINED, CHARACTERS):
        assert tokenizer.decode(tokenizer.encode(texts)) == texts


@pytest.mark.parametrize("text", ["", "seven", "Größe 你好 🙂"])
def test_a_text_is_as_large_as_its_bytes(text):
    for tokenizer in (BPETokenizer(), TRAINED, CHARACTERS):
        assert tokenizer.dimensions(tokenizer.encode([text])[0]) == (len(text.encode()), "byte")


@pytest.mark.parametrize("tokenizer", [TRAINED, CHARACTERS], ids=["trained", "characters"])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranks=st.lists(st.integers(0, 2**16), max_size=40))
def test_any_codes_are_a_text_that_can_be_seen_and_written(tmp_path, tokenizer, ranks):
    codes = tokenizer.canvas(tokens=len(ranks))
    codes.ids_N = torch.tensor(ranks, dtype=torch.int64) % tokenizer.codebook_sizes[0]
    (text,) = tokenizer.decode([codes])
    text.encode()
    assert min(tokenizer.preview(text).size) > 0
    assert tokenizer.write(text, tmp_path / "text").read_bytes().decode() == text


def test_bytes_are_utf8_and_the_preset_is_the_default():
    tokenizer = BPETokenizer(preset="bytes")
    assert tokenizer.codebook_sizes == (256,)
    assert tokenizer.fingerprint == BPETokenizer().fingerprint
    for text in ("seven", "Größe 你好 🙂"):
        assert len(tokenizer.encode([text])[0]) == len(text.encode())


def test_characters_have_a_code_each_and_others_are_spelled_in_bytes():
    characters = sorted(set("".join(TEXTS)))
    assert CHARACTERS.codebook_sizes == (256 + len(characters),)
    (known,) = CHARACTERS.encode(["Größe 你"])
    assert known.ids_N.tolist() == [256 + characters.index(character) for character in "Größe 你"]
    (mixed,) = CHARACTERS.encode(["aqé世😀"])
    assert mixed.ids_N.tolist() == [256 + characters.index("a"), *"qé世😀".encode()]
    assert CHARACTERS.decode([mixed]) == ["aqé世😀"]
    # Neither words that look like the name of a byte nor the order of the texts matter.
    assert CHARACTERS.decode(CHARACTERS.encode(["<0x41>"])) == ["<0x41>"]
    assert BPETokenizer.train_characters(reversed(TEXTS)).fingerprint == CHARACTERS.fingerprint
    assert BPETokenizer.train_characters(["abc"]).fingerprint != CHARACTERS.fingerprint


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"preset": "characters"}, "--preset characters --data PATH"),
        ({"preset": "words"}, "there is no preset 'words'; the presets are 'bytes' and 'characters'"),
        ({"preset": "bytes", "file": "tokenizer.json"}, "exclude each other"),
    ],
)
def test_a_wrong_preset_is_refused(arguments, fault):
    with pytest.raises(ValueError, match=fault):
        BPETokenizer(**arguments)


def test_saved_models_know_their_tokenizer_again():
    assert BPETokenizer().fingerprint == "2a0e625439b1a8bf28ccec0c1af0463cf10fc067a26145fda05e40211a71174f"
    assert TRAINED.fingerprint == "44313e8d5103ca857bd951d0a0cd5245debc2220576611d5157ed9f0f1614372"


@pytest.mark.parametrize("tokenizer", [BPETokenizer(), TRAINED, CHARACTERS], ids=["bytes", "trained", "characters"])
@pytest.mark.parametrize("text", ["", "seven 你🙂 " * 30_000, "7" * 200_000], ids=["empty", "long", "one word"])
def test_empty_and_huge_texts_come_back(tokenizer, text):
    (codes,) = tokenizer.encode([text])
    assert codes.size == {"tokens": len(codes)}
    assert tokenizer.decode([codes]) == [text]


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
    with pytest.raises(ItemError):
        BPETokenizer.train_characters([item])


def test_half_of_a_surrogate_pair_is_mended_as_the_error_says():
    text = "half \ud83d, whole \ud83d\ude42"
    with pytest.raises(ItemError) as caught:
        BPETokenizer().encode([text])
    assert "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')" in str(caught.value)
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert BPETokenizer().decode(BPETokenizer().encode([mended])) == [mended]
    assert mended.endswith("whole 🙂")


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


def test_the_bytes_have_one_id_each(tmp_path):
    TRAINED.save(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
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


def _trained_on(tmp_path, *arguments):
    main([*map(str, arguments), "--output", str(tmp_path / "out")])
    return BPETokenizer.load(tmp_path / "out").fingerprint


def test_command_trains_on_the_train_split_and_on_text_files(data, tmp_path, capsys):
    fingerprint = _trained_on(tmp_path, "--data", data, "--vocab-size", 260)
    assert "260 codes from 1 texts" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tokenizer.json"]
    assert fingerprint == BPETokenizer.train(["seven seven"], 260).fingerprint

    (tmp_path / "book.txt").write_text("seven\neleven\n", encoding="utf-8")
    fingerprint = _trained_on(tmp_path, "--data", data, tmp_path / "book.txt", "--key", "title", "--vocab-size", 258)
    assert fingerprint == BPETokenizer.train(["eleven", "seven\n", "eleven\n"], 258).fingerprint


WORDS = ["seven seven", "Größe 你好", "", "eleven\nseven"]


def test_command_trains_on_json_lines_parquet_and_saved_datasets(tmp_path, capsys):
    rows = [{"words": text, "id": index} for index, text in enumerate(WORDS)]
    lines = [json.dumps(row, ensure_ascii=index > 1) for index, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "rows [1].parquet")
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "splits")
    expected = BPETokenizer.train(WORDS, 262).fingerprint
    for source in ("rows.jsonl", "rows [1].parquet", "one", "splits", "splits/train"):
        assert _trained_on(tmp_path, "--data", tmp_path / source, "--key", "words", "--vocab-size", 262) == expected
        assert "262 codes from 4 texts" in capsys.readouterr().out


def test_command_trains_characters(data, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("Größe\n", encoding="utf-8")
    fingerprint = _trained_on(tmp_path, "--data", data, tmp_path / "words.txt", "--preset", "characters")
    assert fingerprint == BPETokenizer.train_characters(["seven seven", "Größe\n"]).fingerprint
    assert "1.00 characters per code" in capsys.readouterr().out
    for wrong, fault in (
        (["--vocab-size", "300", "--preset", "characters"], "not allowed with"),
        ([], "one of the arguments --vocab-size --preset is required"),
        (["--preset", "bytes"], "invalid choice: 'bytes'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            _trained_on(tmp_path, "--data", data, *wrong)
        assert fault in capsys.readouterr().err


def test_command_says_what_is_wrong_with_its_data(data, tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    number = tmp_path / "number"
    number.mkdir()
    (tmp_path / "folder").mkdir()
    for name, content in {
        "half.jsonl": '{"text": "\\ud83d"}',
        "word.jsonl": '{"text": "seven"}\n"seven"',
        "title.jsonl": '{"title": "seven"}',
        "none.jsonl": '{"text": "seven"}\n{"text": null}',
        "cut.jsonl": '{"text": "seven"}\n{"text": "sev',
        "cut.parquet": "PAR1",
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    rows = Dataset.from_dict({"text": ["seven", None], "title": [1, 2]})
    rows.to_parquet(tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "zeros.parquet").write_bytes(content[:4] + bytes(60) + content[64:])
    rows.save_to_disk(tmp_path / "rows")
    rows.save_to_disk(tmp_path / "damaged")
    next((tmp_path / "damaged").glob("*.arrow")).write_bytes(b"no Arrow")
    DatasetDict(test=rows).save_to_disk(tmp_path / "test")
    (number / "metadata.jsonl").write_text('\n{"segments": [{"text": 7}]}', encoding="utf-8")
    for arguments, fault in [
        ([data, "--key", "speech"], "has no 'speech'. Choose a --key from image, text, title"),
        ([number], "metadata.jsonl, line 2: 'text' must be a string"),
        ([tmp_path / "latin.txt"], "latin.txt is not UTF-8 text"),
        ([tmp_path / "empty.txt"], "empty.txt: There is no text"),
        ([tmp_path / "missing.txt"], "missing.txt"),
        ([tmp_path / "missing.parquet"], "missing.parquet"),
        ([tmp_path / "folder"], "folder is neither a data folder (it has no metadata.jsonl) nor a dataset saved by"),
        ([tmp_path / "half.jsonl"], "half.jsonl, line 1: text '\\ud83d' has half of a surrogate pair"),
        ([tmp_path / "word.jsonl"], 'word.jsonl, line 2: expected an object, {"text": "…"}'),
        ([tmp_path / "title.jsonl"], "title.jsonl, line 1 has no 'text'. Choose a --key from title"),
        ([tmp_path / "none.jsonl"], "none.jsonl, line 2: 'text' must be a string, not None"),
        ([tmp_path / "cut.jsonl"], "cut.jsonl, line 2: not JSON"),
        ([tmp_path / "cut.parquet"], "cut.parquet is damaged or not a Parquet file"),
        ([tmp_path / "zeros.parquet"], "zeros.parquet is damaged"),
        ([tmp_path / "rows.parquet"], "rows.parquet, row 1: 'text' must be a string, not None"),
        ([tmp_path / "rows.parquet", "--key", "words"], "rows.parquet has no 'words'. Choose a --key from text, title"),
        ([tmp_path / "rows.parquet", "--key", "title"], "rows.parquet, row 0: 'title' must be a string, not 1"),
        ([tmp_path / "rows"], "rows, row 1: 'text' must be a string, not None"),
        ([tmp_path / "rows", "--key", "words"], "rows has no 'words'. Choose a --key from text, title"),
        ([tmp_path / "damaged"], "damaged is damaged"),
        ([tmp_path / "test"], "test has no train split. Give the folder of one of its splits"),
        ([data, "--vocab-size", "12"], "at least 256"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            main(["--vocab-size", "300", "--output", str(tmp_path / "out"), "--data", *map(str, arguments)])
        assert fault in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
