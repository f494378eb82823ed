"""Tables of every format, as documents."""

import gc
import io
import json
import tarfile

import datasets
import fsspec
import numpy as np
import pytest
import soundfile
from PIL import Image

from multidiff.data import DocumentDataModule, Table
from multidiff_vq import VQTokenizer
from tests.helpers.data import write_table

# The library does not close the files of tables that nobody reads to the end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TOKENIZERS = {"text": {"plugin": "bpe", "preset": "bytes"}, "image": {"plugin": "vq", "weights": "digits"}}
CAPTIONS = ["one", "two", "three", "four"]
PAIRS = [{"text": "caption"}, {"image": "image"}]


@pytest.fixture(autouse=True)
def _closed():
    yield
    gc.collect()  # what the library has left open is closed here, and not in another test


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (32, 32), dtype=np.uint8)) for _ in CAPTIONS]


@pytest.fixture
def folder(tmp_path, pictures, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    return tmp_path


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def read(source, split="train", tokenizers=TOKENIZERS, **options):
    data = DocumentDataModule(source, tokenizers, **options)
    data.prepare_data()
    documents = data.documents(split)
    return data, [documents.codes(index) for index in range(len(documents))]


def check(source, pictures, captions=CAPTIONS, split="train"):
    """The table holds these pictures and captions, in order."""
    data, found = read(source, split)
    expected = VQTokenizer("digits").encode(pictures)
    assert [data.tokenizers["text"].decode([document[0][1]])[0] for document in found] == captions
    assert [document[1][1].ids_N.tolist() for document in found] == [codes.ids_N.tolist() for codes in expected]
    return data


def rows_of(captions=CAPTIONS):
    return [{"caption": caption, "image": f"{number}.png"} for number, caption in enumerate(captions)]


def test_csv_in_several_files(folder, pictures):
    write_table(folder / "a.csv", rows_of()[:3])
    write_table(folder / "b.csv", rows_of()[3:])
    files = {"train": [str(folder / "a.csv"), str(folder / "b.csv")], "dev": str(folder / "b.csv")}
    source = Table("csv", PAIRS, files, splits={"validation": "dev"})
    data = check(source, pictures)
    assert len(data.documents("validation")) == 1
    assert data.documents("train").parts[0][0].where(1, 0) == f"csv {folder}/a.csv, split 'train', part 1, row 1"
    assert (folder / ".tokenized").is_dir()
    with pytest.raises(ValueError, match=r"has no documents in split 'test'. Name the one .* splits: \{test: …\}"):
        data.documents("test")


def test_several_workers_read_all_of_it(folder, pictures):
    """Each part as a whole: the library would divide it among the workers once more."""
    for number in range(4):
        write_table(folder / f"{number}.csv", rows_of()[number:] + rows_of()[:number])
    source = Table("csv", PAIRS, [str(folder / f"{number}.csv") for number in range(4)])
    data, found = read(source, num_workers=2)
    texts = [data.tokenizers["text"].decode([document[0][1]])[0] for document in found]
    assert texts == [caption for number in range(4) for caption in CAPTIONS[number:] + CAPTIONS[:number]]


def test_lines_of_json(folder, pictures):
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows_of())))
    check(Table("json", PAIRS, str(folder / "t.jsonl")), pictures)


@pytest.mark.parametrize("format_", ["parquet", "disk"])
def test_pictures_as_bytes(folder, pictures, format_):
    table = datasets.Dataset.from_dict(
        {"caption": CAPTIONS, "image": [{"bytes": png(p), "path": None} for p in pictures]}
    )
    table = table.cast_column("image", datasets.Image())
    if format_ == "parquet":
        table.to_parquet(folder / "t.parquet")
        source = Table("parquet", PAIRS, str(folder / "t.parquet"))
    else:
        table.save_to_disk(folder / "saved")
        source = Table(str(folder / "saved"), PAIRS)
    check(source, pictures)


def test_archives(folder, pictures):
    with tarfile.open(folder / "t.tar", "w") as archive:
        for number, (caption, picture) in enumerate(zip(CAPTIONS, pictures, strict=True)):
            for name, content in ((f"{number}.txt", caption.encode()), (f"{number}.png", png(picture))):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    check(Table("webdataset", [{"text": "txt"}, {"image": "png"}], str(folder / "t.tar")), pictures)


def test_a_folder_of_pictures_by_class(folder, pictures):
    for number, picture in enumerate(pictures):
        place = folder / "classes" / ("even" if number % 2 == 0 else "odd")
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{number}.png")
    source = Table("imagefolder", [{"text": "an {label} one"}, {"image": "image"}], data_dir=str(folder / "classes"))
    order, captions = [0, 2, 1, 3], ["an even one"] * 2 + ["an odd one"] * 2
    check(source, [pictures[number] for number in order], captions)


def test_a_folder_of_sounds_with_columns(folder):
    place = folder / "sounds"
    place.mkdir()
    for number in range(2):
        soundfile.write(place / f"{number}.wav", np.full(1600, 0.1), 8000)
    rows = [{"file_name": f"{number}.wav", "words": word} for number, word in enumerate(("a", "b"))]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Table("audiofolder", [{"speech": "audio"}, {"text": "words", "label": "answer"}], data_dir=str(place))
    tokenizers = {"speech": {"plugin": "encodec", "weights": "words-8khz"}, "text": TOKENIZERS["text"]}
    data, found = read(source, tokenizers=tokenizers)
    assert [[name for name, _ in document] for document in found] == [["speech", "text"]] * 2
    assert set(data.labels) == {"speech", "answer"}


def test_a_chat(folder):
    turns = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a seven"}]
    (folder / "t.jsonl").write_text(json.dumps({"messages": turns}))
    source = Table("json", [{"text": "messages", "chat": True}], str(folder / "t.jsonl"))
    data, (document,) = read(source)
    assert [data.tokenizers["text"].decode([codes])[0] for _, codes in document] == ["what is it?", "a seven"]
    assert data.labels == ["user", "assistant"]


def test_files_elsewhere(folder, pictures):
    """An address that fsspec knows, of the table and of the pictures in it."""
    memory = fsspec.filesystem("memory")
    for number, picture in enumerate(pictures):
        memory.pipe(f"/pictures/{number}.png", png(picture))
    images = [{"bytes": None, "path": f"memory://pictures/{number}.png"} for number in range(len(pictures))]
    rows = "\n".join(
        json.dumps({"caption": caption, "image": image}) for caption, image in zip(CAPTIONS, images, strict=True)
    )
    memory.pipe("/t.jsonl", rows.encode())
    source = Table("json", PAIRS, "memory://t.jsonl", cache=str(folder / "codes"))
    check(source, pictures)
    with pytest.raises(ValueError, match=r"say where codes are kept. Set cache of the source to a folder"):
        read(Table("json", PAIRS, "memory://t.jsonl"))
    memory.rm("/pictures/1.png")
    source = Table("json", PAIRS, "memory://t.jsonl", cache=str(folder / "others"))
    with pytest.raises(ValueError, match=r"part 0, row 2: memory://pictures/1.png cannot be read"):
        read(source)


def test_a_change_is_noticed(folder, pictures):
    write_table(folder / "a.csv", rows_of())
    source = Table("csv", PAIRS, str(folder / "a.csv"))
    check(source, pictures)
    pictures[0].save(folder / "1.png")
    changed = [pictures[0], pictures[0], *pictures[2:]]
    check(source, changed)
    write_table(folder / "a.csv", rows_of([*CAPTIONS[:3], "five"]))
    check(source, changed, [*CAPTIONS[:3], "five"])


def test_what_cannot_be_read_is_named(folder):
    write_table(folder / "a.csv", rows_of())
    write_table(folder / "b.csv", [{"other": "five", "image": "0.png"}])
    one, two = str(folder / "a.csv"), str(folder / "b.csv")
    for source, message in (
        (
            Table("csv", [{"text": "captoin"}], one),
            r"part 0 has no column 'captoin', .* Its columns are caption, image",
        ),
        (Table("csv", PAIRS, [one, two]), r"part 1 has no column 'caption', .* Its columns are other, image"),
        (Table("csv", [{"words": "caption"}], one), r"the template names the tokenizer 'words'; the configuration has"),
        (
            Table("csv", PAIRS, str(folder / "none.csv"), cache=str(folder)),
            r"csv .*none.csv cannot be read: Unable to find",
        ),
        (Table("csv", PAIRS, one, splits={"train": "dev"}), r"has no split 'dev'. Its splits are train"),
    ):
        with pytest.raises(ValueError, match=message):
            read(source)
    with pytest.raises(ValueError, match=r"data_files: 'trian' is none of .* as in splits: \{validation: trian\}"):
        Table("csv", PAIRS, {"trian": one})
    with pytest.raises(ValueError, match=r"splits: 'dev' is none of train, validation, test"):
        Table("csv", PAIRS, one, splits={"dev": "train"})
    write_table(folder / "a.csv", [*rows_of(), {"caption": "five", "image": "9.png"}])
    with pytest.raises(ValueError, match=r"part 0, row 5: .*9.png.* on_error: skip"):
        read(Table("csv", PAIRS, one))
    _, found = read(Table("csv", PAIRS, one), on_error="skip")
    assert len(found) == 4
