"""What a model has seen: orders of segments, sizes of canvases, defaults, and remarks on what lies outside."""

import json
import warnings
from collections import Counter

import pytest
import torch
from PIL import Image

from multidiff import Blank, Given, MaskedDiffusionTransformer, MultiDiffPipeline
from multidiff.cli import main
from multidiff.data import DocumentDataModule
from multidiff.data.batches import DocumentKey
from multidiff.generation.editing import extend
from multidiff.seeding import generator_for
from multidiff.sequence.seen import SeenDocuments, most_units, usual_units
from tests.helpers.runs import config, write_config, write_folder
from tests.helpers.toys import generator

VARIES = {"image": False, "text": True}


def seen(shuffled=False, max_eos_padding=None, orders=None):
    orders = orders or {("text", "image"): 3, ("image", "text", "text"): 2}
    sizes = {
        "text": Counter({json.dumps({"tokens": length}): 1 for length in range(1, 21)}),
        "image": Counter({json.dumps({"height": 8, "width": 8}): 1, json.dumps({"height": 8, "width": 16}): 2}),
    }
    return SeenDocuments.of(Counter(orders), sizes, shuffled, max_eos_padding or {}, VARIES)


def test_the_usual_canvas_holds_nearly_all_items_and_their_end():
    assert usual_units(Counter(range(1, 101))) == 96
    assert usual_units(Counter({3: 1})) == 4
    assert usual_units(Counter({3: 95, 900: 5})) == 4


@pytest.mark.parametrize(
    ("length", "usual", "max_eos_padding", "most"),
    [(3, 20, None, 20), (40, 20, None, 50), (0, 1, None, 1), (3, 20, 2, 5)],
)
def test_canvases_reach_what_generation_fills_in(length, usual, max_eos_padding, most):
    assert most_units(length, usual, max_eos_padding) == most


def test_facts_of_a_split():
    one = seen()
    assert one.canvas == {"text": {"tokens": 20}, "image": {"height": 8, "width": 16}}
    assert one.sizes == {"text": {"tokens": (2, 25)}, "image": {"height": (8, 8), "width": (8, 16)}}
    assert one.orders == (("text", "image"), ("image", "text", "text"))
    assert seen(max_eos_padding={"text": 1}).sizes["text"] == {"tokens": (2, 21)}
    assert seen(shuffled=True, orders={("text", "image"): 1, ("image", "text"): 1}).orders == (("image", "text"),)


def test_orders_are_those_of_training():
    one = seen()
    assert one.order_of(["text", "image"]) == [0, 1]
    assert one.order_of(["text", "text", "image"]) == [2, 0, 1]
    assert one.order_of(["image", "image"]) is None
    assert seen(orders={("text", "image"): 1}).order_of(["image", "text"]) == [1, 0]
    assert seen(shuffled=True, orders={("text", "image"): 1}).order_of(["image", "text"]) == [0, 1]


def test_remarks_say_what_to_do():
    one = seen(orders={("text", "image"): 1})
    assert one.remarks([("text", {}), ("image", {"height": 8, "width": 12})]) == []
    (order,) = one.remarks([("image", {}), ("text", {"tokens": 20})])
    assert order.endswith("order image, text. Put them in the order text, image.")
    (size,) = one.remarks([("text", {"tokens": 32})])
    assert "canvases of 2 to 25 tokens of text, not of 32" in size
    (never,) = one.remarks([("image", {}), ("image", {})])
    assert never.startswith("No training document of this model held")
    assert seen(shuffled=True).remarks([("text", {}), ("image", {}), ("text", {})]) == []


def test_more_orders_than_can_be_kept_are_not_remarked_on():
    many = seen(orders={("text",) * length: 1 for length in range(1, 1002)})
    assert many.remarks([("image", {}), ("text", {})]) == []


def test_facts_survive_json_and_damage_is_named():
    one = seen()
    plain = json.loads(json.dumps(one.to_dict()))
    assert SeenDocuments.from_dict(plain, "x") == one
    for key, value in {
        "orders": 7, "shuffled": 1, "sizes": {"text": {"tokens": [1]}}, "canvas": {"text": {"tokens": "3"}},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=r"a\.json does not say"):
            SeenDocuments.from_dict(plain | {key: value}, "a.json")
    del plain["orders"]
    with pytest.raises(ValueError, match=r"a\.json does not say"):
        SeenDocuments.from_dict(plain, "a.json")


TOKENIZERS = {"text": {"plugin": "bpe"}, "image": {"plugin": "vq"}}


def folder_of(folder, texts, order=("text", "image"), split="train"):
    """A data folder of texts beside white pictures of 32 by 48 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("L", (48, 32), "white").save(folder / "white.png")
    with (folder / "metadata.jsonl").open("a") as file:
        for text in texts:
            values = {"text": text, "image": "white.png"}
            segments = [{name: values[name]} for name in order]
            file.write(json.dumps({"split": split, "segments": segments}) + "\n")
    return folder


def pipeline_of(data):
    """An untrained model that has seen the documents of a data module."""
    transformer = MaskedDiffusionTransformer(data.vocabulary.rows, hidden_size=32, num_layers=1, num_heads=2)
    transformer.initialize(generator())
    pipe = MultiDiffPipeline(transformer.eval(), data.vocabulary, data.tokenizers, seen=data.seen)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_segments_of_training_documents_come_in_every_order(tmp_path):
    folder = folder_of(tmp_path, ["abc"] * 3)
    folder_of(tmp_path, ["abc"], split="validation")
    data = DocumentDataModule(str(folder), TOKENIZERS)

    def orders_of(documents):
        keys = [DocumentKey(epoch, 0, 0) for epoch in range(20)]
        return {tuple(part.tokenizer for part in one.document) for one in documents.__getitems__(keys)}

    for split, orders in (("train", {("text", "image"), ("image", "text")}), ("validation", {("text", "image")})):
        assert orders_of(data.documents(split)) == orders
    assert data.seen.shuffled
    kept = DocumentDataModule(str(folder), TOKENIZERS, shuffle_segments=False)
    assert orders_of(kept.documents("train")) == {("text", "image")}
    assert kept.seen.orders == (("text", "image"),)


def test_canvases_of_training_reach_the_one_of_generation(tmp_path):
    """From one more than the text to the usual canvas, which nearly all texts fit, or to a quarter more than others."""
    texts = ["a" * length for length in range(1, 21)]
    data = DocumentDataModule(str(folder_of(tmp_path, texts)), TOKENIZERS, max_seq_length=None)
    documents, usual = data.documents("train"), data.seen.canvas["text"]["tokens"]
    assert usual == 20
    for index, sizes in ((3, range(5, 21)), (19, range(21, 26))):
        keys = [DocumentKey(epoch, 0, index) for epoch in range(300)]
        parts = [part for one in documents.__getitems__(keys) for part in one.document]
        assert {len(part) for part in parts if part.tokenizer == "text"} == set(sizes)
    assert data.seen.sizes == {"text": {"tokens": (2, 25)}, "image": {"height": (32, 32), "width": (48, 48)}}


def test_items_that_are_cut_do_not_count(tmp_path):
    folder = folder_of(tmp_path, ["a" * 5] * 10 + ["a" * 100])
    cropped = DocumentDataModule(str(folder), TOKENIZERS, max_seq_length=60, long_documents="crop")
    assert cropped.seen.sizes["text"] == {"tokens": (6, 7)}
    skipped = DocumentDataModule(str(folder), TOKENIZERS, max_seq_length=60, long_documents="skip")
    assert skipped.seen.sizes["text"] == {"tokens": (6, 7)}
    whole = DocumentDataModule(str(folder), TOKENIZERS)
    assert whole.seen.sizes["text"] == {"tokens": (6, 125)}


def test_blanks_are_as_in_training_and_anything_else_is_remarked_on(tmp_path, recwarn):
    data = DocumentDataModule(str(folder_of(tmp_path / "data", ["a" * 5] * 9)), TOKENIZERS, shuffle_segments=False)
    pipe, picture = pipeline_of(data), Image.new("L", (48, 32))
    pipe.save_pretrained(tmp_path / "model")
    pipe = MultiDiffPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.seen == data.seen
    text, image = pipe([[Blank("text"), Blank("image")]], generator=generator()).documents[0]
    assert len(text.codes) <= 6
    assert image.item.size == (48, 32)
    pipe([[extend(pipe, "text", "aaa", max_new_tokens=3), Given("image", picture)]])
    assert not [warning for warning in recwarn.list if "trained" in str(warning.message)]
    with pytest.warns(UserWarning, match="Put them in the order text, image"):
        pipe([[Given("image", picture), Blank("text")]])
    with pytest.warns(UserWarning, match="canvases of 6 to 7 tokens of text, not of 32"):
        pipe([[Blank("text", tokens=32)]] * 2)
    (tmp_path / "model" / "documents.json").write_text('{"orders": 1}')
    with pytest.raises(ValueError, match=r"documents\.json does not say"):
        MultiDiffPipeline.from_pretrained(tmp_path / "model")


def test_presets_ask_in_the_order_of_training(tmp_path, capsys):
    """A caption comes before its picture here; its text is what is printed all the same."""
    data = DocumentDataModule(str(folder_of(tmp_path / "data", ["a" * 5] * 9)), TOKENIZERS, shuffle_segments=False)
    pipeline_of(data).save_pretrained(tmp_path / "model")
    file = str(tmp_path / "data" / "white.png")
    main(["generate", "caption", "--model", str(tmp_path / "model"), file])
    caption = capsys.readouterr().out.rstrip("\n").split("\t")[1]
    wanted = MultiDiffPipeline.from_pretrained(tmp_path / "model")
    wanted.set_progress_bar_config(disable=True)
    given = Given("image", wanted.tokenizers["image"].read(file, tmp_path))
    out = wanted([[Blank("text"), given]], generator=[generator_for(0, 0)])
    assert caption == " ".join(out.documents[0][0].item.split())


def test_the_command_says_what_is_beyond_training_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "filters", [])  # as outside of tests, where a warning is no error
    data = DocumentDataModule(str(folder_of(tmp_path / "data", ["a" * 5] * 9)), TOKENIZERS)
    pipeline_of(data).save_pretrained(tmp_path / "model")
    main(["generate", "--model", str(tmp_path / "model"), "--fill", "text:tokens=30"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("multidiff: ")]
    assert lines == [
        "multidiff: This model was trained on canvases of 6 to 7 tokens of text, not of 30. "
        "Expect worse results outside of that."
    ]


def test_a_training_stores_what_it_has_seen(tmp_path):
    write_folder(tmp_path / "data")
    made = config(tmp_path)
    made["trainer"]["max_steps"] = 1
    main(["fit", "--config", write_config(tmp_path, made)])
    for place in (tmp_path / "model", tmp_path / "checkpoints" / "last.ckpt"):
        seen = MultiDiffPipeline.from_pretrained(place).seen
        assert seen is not None
        assert seen.orders == (("text", "shout"),)
        assert seen.shuffled
        assert seen.sizes == {"text": {"tokens": (4, 7)}, "shout": {"tokens": (4, 5)}}
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["multidiff"]["documents"]
