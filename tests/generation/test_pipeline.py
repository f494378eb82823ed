"""The pipeline: any combination in and out, saved and loaded whole or not at all."""

import json
import shutil

import pytest
import torch
from diffusers import AmusedScheduler
from safetensors.torch import load_file, save_file

from multidiff import Blank, Given, Masked, MaskSampler, MultiDiffPipeline
from multidiff.sequence.seen import SeenDocuments
from multidiff.sequence.vocabulary import SharedVocabulary
from multidiff_bpe import BPETokenizer
from tests.helpers.pipelines import items, make
from tests.helpers.toys import Frames, Grid, generator


@pytest.fixture(scope="module")
def pipe():
    return make({"picture": Grid(5, 2, 3), "speech": Frames((4, 3)), "note": Frames((6,))})


DOCUMENTS = [
    [Given("note", [1, 2, 3]), Blank("picture"), Blank("speech", frames=4)],
    [Blank("picture", height=3, width=5), Blank("note", frames=9)],
    [Given("picture", [0, 1, 2, 3, 4, 0]), Given("speech", [1, 2]), Blank("note", frames=2)],
    [Blank("speech", frames=2), Given("note", [5]), Blank("speech", frames=6)],
    [Given("picture", [1] * 6), Blank("picture")],
    [Blank("note", frames=1)],
    [Given("note", [0] * 12), Blank("speech")],
]


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("count", ["linear", "cosine"])
def test_batching_changes_nothing(pipe, order, count):
    pipe.samplers = {name: MaskSampler(order=order, unmasking=count, num_inference_steps=5) for name in pipe.tokenizers}
    together = pipe(DOCUMENTS, generator=[generator(i) for i in range(7)])
    backwards = pipe(DOCUMENTS[::-1], generator=[generator(i) for i in range(7)][::-1])
    assert items(together.documents) == items(backwards.documents[::-1])
    assert together.nfe == backwards.nfe[::-1]
    for index, document in enumerate(DOCUMENTS):
        alone = pipe([document], generator=[generator(index)])
        assert items(alone.documents) == items([together.documents[index]])
        assert alone.nfe == [together.nfe[index]]


def test_guided_batching_changes_nothing(pipe):
    conditioned = [DOCUMENTS[i] for i in (0, 2, 3, 6)]
    together = pipe(conditioned, generator=[generator(i) for i in range(4)], guidance_scale=2.5)
    for index, document in enumerate(conditioned):
        alone = pipe([document], generator=[generator(index)], guidance_scale=2.5)
        assert items(alone.documents) == items([together.documents[index]])
    plain = pipe(conditioned, generator=[generator(i) for i in range(4)], guidance_scale=1.0)
    assert [2 * n for n in plain.nfe] == together.nfe
    assert items(plain.documents) != items(together.documents)


def test_given_comes_back_and_shapes_are_right(pipe):
    output = pipe(DOCUMENTS, generator=generator())
    for document, filled in zip(DOCUMENTS, output.documents, strict=True):
        for part, result in zip(document, filled, strict=True):
            assert part.tokenizer == result.tokenizer
            if isinstance(part, Given):
                assert result.item is part.item
    assert output.documents[1][0].codes.size == {"height": 3, "width": 5}
    assert len(output.documents[1][0].item) == 15
    assert len(output.documents[0][2].item) <= 8


def test_known_codes_are_kept_bit_for_bit(pipe):
    codes = pipe.tokenizers["picture"].encode([[0, 1, 2, 3, 4, 0]])[0]
    known_N = torch.tensor([True, False, True, False, False, True])
    result = pipe([[Given("note", [1]), Masked("picture", codes, known_N)]], generator=generator()).documents[0][1]
    assert torch.equal(result.codes.ids_N[known_N], codes.ids_N[known_N])
    speech = pipe.tokenizers["speech"].encode([[1, 2, 3, 0, 2, 1]])[0]
    known_N = torch.tensor([True, True, False, False, True, True])
    result = pipe([[Masked("speech", speech, known_N)]], generator=generator()).documents[0][0]
    assert torch.equal(result.codes.ids_N[:2], speech.ids_N[:2])


def test_a_partial_segment_does_not_end_within_what_is_known(pipe):
    codes = pipe.tokenizers["note"].encode([[1, 2, 3, 4, 5, 0]])[0]
    known_N = torch.tensor([True, False, False, False, False, True])
    for seed in range(30):
        result = pipe([[Masked("note", codes, known_N)]], generator=generator(seed)).documents[0][0]
        assert len(result.item) == 6
        assert (result.item[0], result.item[5]) == (1, 0)


def test_steps_nfe_and_callback(pipe):
    seen = []

    def callback(pipeline, step, timestep, values):
        assert pipeline is pipe
        seen.append((step, timestep, int(values["documents"][0][1].known_N.sum())))

    output = pipe(
        [[Given("note", [1]), Blank("picture")]],
        num_inference_steps=3,
        generator=generator(),
        callback_on_step_end=callback,
    )
    assert [(step, timestep) for step, timestep, _ in seen] == [(0, 2), (1, 1), (2, 0)]
    assert [known for _, _, known in seen][-1] == 6
    assert output.nfe == [3]
    # More saved steps than codes: a code a step, and no forward pass for nothing.
    saved = make({"note": Frames((6,))}, {"note": MaskSampler(num_inference_steps=50)})
    assert saved([[Blank("note", frames=2)]], generator=generator()).nfe == [2]


def test_global_random_state_is_left_alone(pipe):
    state = torch.random.get_rng_state()
    first = pipe([[Blank("picture")]] * 4)
    second = pipe([[Blank("picture")]] * 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert items(first.documents) != items(second.documents)


def test_bad_requests(pipe):
    cases = [
        ([], {}, "no documents"),
        ([[Given("note", [1])]], {}, "document 0 has nothing to fill in"),
        ([[Blank("nose")]], {}, "no tokenizer is called 'nose'; this vocabulary has picture, speech, note"),
        ([[Given("nose", 1), Blank("note")]], {}, "no tokenizer is called 'nose'"),
        ([[Blank("picture", frames=3)]], {}, "canvas of picture"),
        ([["note", Blank("note")]], {}, "document 0: expected a Given, Blank, Masked or Draft segment, got 'note'"),
        ([[Blank("note")]], {"guidance_scale": 2.0}, "document 0 has no given segment"),
        (
            [[Blank("note")]],
            {"num_inference_steps": 0},
            "num_inference_steps 0 must be a whole number",
        ),
        ([[Blank("note")]], {"num_inference_steps": 4}, "num_inference_steps 4 is more than the 3 codes"),
        ([[Given("note", [1]), Blank("note")]], {"guidance_scale": {"picture": 2.0}}, "no given 'picture' segment"),
        ([[Given("note", [1]), Blank("note")]], {"guidance_scale": {"nose": 2.0}}, "no tokenizer is called 'nose'"),
        ([[Blank("note")]], {"generator": [generator(), generator()]}, "2 generators for 1 documents"),
    ]
    for documents, options, message in cases:
        with pytest.raises(ValueError, match=message):
            pipe(documents, **options)
    codes = pipe.tokenizers["note"].encode([[1, 2]])[0]
    with pytest.raises(ValueError, match="one for each of 2 codes"):
        pipe([[Masked("note", codes, torch.ones(3, dtype=torch.bool))]])
    with pytest.raises(ValueError, match="picture"):
        MultiDiffPipeline(pipe.transformer, pipe.vocabulary, {**pipe.tokenizers, "picture": Grid(4)})


def test_a_missing_bracket_is_said(pipe):
    for documents in ([Given("note", [1]), Blank("picture")], Blank("note")):
        with pytest.raises(ValueError, match=r"for one document write pipe\(\[\[Given"):
            pipe(documents)
    for documents in (["note"], [5], "note", 5):
        with pytest.raises(ValueError, match="document 0 must be a list of segments"):
            pipe(documents)


def test_segments_say_what_they_are(pipe):
    codes = pipe.tokenizers["note"].encode([[1, 2]])[0]
    assert repr(Given("text", "seven")) == "Given('text', 'seven')"
    assert repr(Blank("picture", height=3, width=5)) == "Blank('picture', height=3, width=5)"
    assert repr(Masked("note", codes, torch.tensor([True, False]), 4)) == (
        "Masked('note', 1 of 2 codes known, max_new_units=4)"
    )
    for item in ("a" * 10_000, torch.zeros(100, 100), [1] * 10_000):
        assert len(repr(Given("x", item))) < 90
        assert "\n" not in repr(Given("x", item))


def test_samplers_are_set_by_name(pipe):
    pipe.samplers["picture"] = AmusedScheduler(mask_token_id=9)
    pipe.samplers["note"] = MaskSampler(top_k=3)
    assert pipe([[Blank("picture"), Blank("note")]], generator=generator()).documents
    with pytest.raises(ValueError, match=r"no tokenizer is called 'pictrue'; .*\(did you mean 'picture'\?\)"):
        pipe.samplers["pictrue"] = MaskSampler()
    with pytest.raises(
        ValueError, match="expected a MaskSampler, an AmusedScheduler or a BlockRefinementScheduler, got dict"
    ):
        pipe.samplers["note"] = {"top_k": 3}
    with pytest.raises(ValueError, match="no tokenizer is called 'nose'"):
        pipe.samplers = {"nose": MaskSampler()}
    assert pipe.samplers["note"].settings["top_k"] == 3
    pipe.samplers = {"note": MaskSampler(top_k=4)}
    assert [pipe.samplers[name].settings["top_k"] for name in pipe.tokenizers] == [None, None, 4]


def test_what_was_not_seen_in_training_is_remarked_on_in_given_segments_too():
    tokenizers = {"speech": Frames((4, 3)), "picture": Grid(5, 2, 3)}
    pipe = make(tokenizers)
    sizes = {"speech": {"frames": (2, 4)}, "picture": {"height": (2, 2), "width": (3, 3)}}
    pipe.seen = SeenDocuments((("speech", "picture"),), False, sizes, {})
    pipe([[Given("speech", [1, 2] * 3), Blank("picture")]], generator=generator())
    with pytest.warns(UserWarning, match="canvases of 2 to 4 frames of speech, not of 5"):
        pipe([[Given("speech", [1, 2] * 4), Blank("picture")]], generator=generator())


def test_every_module_keeps_its_mode(pipe):
    pipe = make({"note": Frames((6,))})
    pipe.transformer.train()
    pipe.transformer.layers[0].eval()
    modes = [module.training for module in pipe.transformer.modules()]
    inside = []
    pipe([[Blank("note")]], callback_on_step_end=lambda *_: inside.append(pipe.transformer.layers[1].training))
    assert [module.training for module in pipe.transformer.modules()] == modes
    assert len(set(modes)) == 2
    assert not any(inside)


@pytest.fixture
def saved(tmp_path):
    pipeline = make(
        {"text": BPETokenizer(), "other": BPETokenizer()}, {"text": MaskSampler(canvas={"tokens": 6})}, torch.float32
    )
    pipeline.save_pretrained(tmp_path / "model")
    return pipeline, tmp_path / "model"


def test_save_and_load(saved, tmp_path):
    pipeline, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "model_index.json", "samplers.json", "tokenizers", "transformer", "vocabulary.json",
    ]  # fmt: skip
    loaded = MultiDiffPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    documents = [[Given("other", "ab"), Blank("text")], [Blank("text"), Blank("other", tokens=3)]]
    one, two = (p(documents, generator=[generator(0), generator(1)]) for p in (pipeline, loaded))
    assert items(one.documents) == items(two.documents)
    assert loaded.samplers["text"].settings == pipeline.samplers["text"].settings
    loaded.save_pretrained(folder)  # replaces it
    assert [path for path in tmp_path.iterdir() if path.name != "model"] == []
    loaded.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded" / "transformer").glob("*.safetensors"))) > 1
    three = MultiDiffPipeline.from_pretrained(tmp_path / "sharded")
    three.set_progress_bar_config(disable=True)
    assert items(three(documents, generator=[generator(0), generator(1)]).documents) == items(one.documents)
    with pytest.raises(ValueError, match="cannot be called 'others'"):
        SharedVocabulary.of({"others": BPETokenizer()})
    with pytest.raises(ValueError, match="cannot be called"):
        SharedVocabulary.of({"../evil": BPETokenizer()})
    edit(tmp_path / "sharded" / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(ValueError, match="does not contain a multidiff model"):
        loaded.save_pretrained(tmp_path / "sharded")
    with pytest.raises(ValueError, match="safetensors only"):
        loaded.save_pretrained(folder, safe_serialization=False)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"contains a.jpg, which is not part of a multidiff model"):
        loaded.save_pretrained(tmp_path / "photos")


def test_push_to_hub_uploads_such_a_folder(saved, monkeypatch, tmp_path):
    pipeline, folder = saved
    monkeypatch.setattr("huggingface_hub.create_repo", lambda *a, **k: type("Repo", (), {"repo_id": "me/it"}))
    monkeypatch.setattr(
        "huggingface_hub.upload_folder", lambda folder_path, **k: shutil.copytree(folder_path, tmp_path / "it")
    )
    pipeline.push_to_hub("me/it")
    assert {path.name for path in (tmp_path / "it").iterdir()} == {path.name for path in folder.iterdir()}
    assert (tmp_path / "it" / "README.md").read_text() == (folder / "README.md").read_text()


def test_a_tokenizer_that_is_no_plugin_cannot_be_saved(pipe, tmp_path):
    with pytest.raises(ValueError, match="not installed as a plugin"):
        pipe.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop(path, key):
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


DAMAGE = {
    "model_index.json is missing": lambda f: (f / "model_index.json").unlink(),
    "model_index.json: _class_name is 'os.system'": lambda f: edit(f / "model_index.json", _class_name="os.system"),
    "model_index.json: transformer is": lambda f: edit(f / "model_index.json", transformer=["os", "system"]),
    "vocabulary.json is missing": lambda f: (f / "vocabulary.json").unlink(),
    "samplers.json is damaged": lambda f: (f / "samplers.json").write_text("{"),
    "no sampler setting is called 'tempo'": lambda f: edit(f / "samplers.json", text={"tempo": 1}),
    "text is missing": lambda f: shutil.rmtree(f / "tokenizers" / "text"),
    "config.json is missing": lambda f: (f / "transformer" / "config.json").unlink(),
    "config.json lacks rope_theta": lambda f: drop(f / "transformer" / "config.json", "rope_theta"),
    "unknown transformer setting 'wings'": lambda f: edit(f / "transformer" / "config.json", wings=2),
    "_class_name must be .*, got 'UNet'": lambda f: edit(f / "transformer" / "config.json", _class_name="UNet"),
    "has shape .* but its configuration requires": lambda f: edit(
        f / "transformer" / "config.json", intermediate_size=64
    ),
    "contains 11 unknown tensors": lambda f: edit(f / "transformer" / "config.json", num_layers=1),
    "contains no .safetensors file": lambda f: next((f / "transformer").glob("*.safetensors")).unlink(),
}


def test_damaged_folders_are_refused(saved, tmp_path):
    _, folder = saved
    for number, (message, damage) in enumerate(DAMAGE.items()):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        damage(copy)
        with pytest.raises(ValueError, match=message):
            MultiDiffPipeline.from_pretrained(copy)
    with pytest.raises(ValueError, match="does not exist"):
        MultiDiffPipeline.from_pretrained(tmp_path / "nowhere")


def test_damaged_weights_are_refused(saved):
    _, folder = saved
    (path,) = (folder / "transformer").glob("*.safetensors")
    weights = {name: weight.clone() for name, weight in load_file(path).items()}  # not the mapped file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"safetensors is truncated"):
        MultiDiffPipeline.from_pretrained(folder)
    save_file({k: v for k, v in weights.items() if k != "norm.weight"}, path)
    with pytest.raises(ValueError, match=r"lacks 1 tensors, first norm.weight"):
        MultiDiffPipeline.from_pretrained(folder)
    save_file({**weights, "extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 unknown tensors, first extra"):
        MultiDiffPipeline.from_pretrained(folder)


def test_another_tokenizer_in_the_folder_is_refused(saved):
    _, folder = saved
    BPETokenizer.train(["seven seven seven"], 260).save(folder / "tokenizers" / "text")
    with pytest.raises(ValueError, match=r"vocabulary.json: tokenizer 'text' had codebook_sizes \(256,\), here it has"):
        MultiDiffPipeline.from_pretrained(folder)
