"""The pipeline: any combination in and out, saved and loaded whole or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler, DDIMScheduler
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import Frames, Grid, generator

from multidiff import Blank, Given, MaskSampler, MultiDiffPipeline, Partial
from multidiff.transformer import MaskedDiffusionTransformer
from multidiff.vocabulary import MASK, SharedVocabulary
from multidiff_bpe import BPETokenizer


def make(tokenizers, samplers=None, dtype=torch.float64):
    vocabulary = SharedVocabulary.of(tokenizers)
    model = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=32, num_layers=2, num_heads=2)
    model.initialize(generator())
    for weight in model.parameters():
        weight.data.mul_(3)
    pipeline = MultiDiffPipeline(model.eval().to(dtype=dtype), vocabulary, tokenizers, samplers)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


def items(documents):
    return [[part.item for part in document] for document in documents]


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("count", ["linear", "cosine"])
def test_batching_changes_nothing(pipe, order, count):
    pipe.samplers = {name: MaskSampler(order=order, count=count, num_inference_steps=5) for name in pipe.tokenizers}
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
    result = pipe([[Given("note", [1]), Partial("picture", codes, known_N)]], generator=generator()).documents[0][1]
    assert torch.equal(result.codes.ids_N[known_N], codes.ids_N[known_N])
    speech = pipe.tokenizers["speech"].encode([[1, 2, 3, 0, 2, 1]])[0]
    known_N = torch.tensor([True, True, False, False, True, True])
    result = pipe([[Partial("speech", speech, known_N)]], generator=generator()).documents[0][0]
    assert torch.equal(result.codes.ids_N[:2], speech.ids_N[:2])


def test_a_partial_segment_does_not_end_within_what_is_known(pipe):
    codes = pipe.tokenizers["note"].encode([[1, 2, 3, 4, 5, 0]])[0]
    known_N = torch.tensor([True, False, False, False, False, True])
    for seed in range(30):
        result = pipe([[Partial("note", codes, known_N)]], generator=generator(seed)).documents[0][0]
        assert len(result.item) == 6
        assert (result.item[0], result.item[5]) == (1, 0)


def test_guidance_of_one_document_costs_another_nothing():
    pipe = make(
        {"picture": Grid(5, 2, 3), "speech": Frames((4, 3)), "note": Frames((6,))},
        {
            "picture": MaskSampler(num_inference_steps=3, guidance_scale=2.0),
            "note": MaskSampler(num_inference_steps=3),
            "speech": MaskSampler(num_inference_steps=3),
        },
    )
    documents = [
        [Given("speech", [1, 2]), Blank("picture")],
        [Given("speech", [1, 2]), Blank("note", frames=4)],
        [Given("speech", [1, 2]), Blank("picture"), Blank("note", frames=4)],
    ]
    assert pipe(documents, generator=generator()).nfe == [6, 3, 6]
    assert pipe(documents[1:2], generator=generator()).nfe == [3]


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


def test_each_condition_has_a_scale_of_its_own(pipe):
    document = [Given("note", [1, 2]), Given("speech", [1, 2]), Blank("picture")]

    def made(scale):
        return pipe([document], 1, guidance_scale=scale, generator=generator(), trace=True)

    both, note, speech, none = (
        made(scale) for scale in ({"note": 3.0, "speech": 2.0}, {"note": 3.0}, {"speech": 2.0}, 1.0)
    )
    assert both.nfe == [3]
    assert note.nfe == speech.nfe == [2]
    assert none.nfe == [1]
    assert made({"note": 1.0}).trace == none.trace
    assert len({str(output.trace) for output in (both, note, speech, none)}) == 4


def test_guidance_follows_the_definition():
    tokenizers = {"picture": Grid(5, 2, 3), "speech": Frames((4, 3)), "note": Frames((6,))}
    pipe = make(tokenizers, {"picture": MaskSampler(num_inference_steps=1)})
    document = [Given("note", [1, 2]), Given("speech", [1, 2]), Blank("picture")]
    output = pipe([document], guidance_scale={"note": 3.0, "speech": 0.5}, generator=generator(), trace=True)
    first = {}
    for hidden in ((), ("note",), ("speech",)):
        batch = pipe.sequencer.batch(pipe._segments([document]))
        segment_BL = batch.segment_BL
        names = ["note", "speech", "picture"]
        seen_BL = batch.ids_BL.clone()
        for number, name in enumerate(names):
            if name in hidden or name == "picture":
                inside_BL = segment_BL == number
                unknown_BL = ~batch.known_BL if name == "picture" else batch.known_BL
                seen_BL[inside_BL & unknown_BL] = MASK
        place_N = ((segment_BL == 2) & ~batch.known_BL).flatten().nonzero().flatten()
        span = pipe.vocabulary.spans["picture"][0]
        with torch.no_grad():
            (logits_NV,) = pipe.transformer(
                seen_BL, batch.positions_BL3, batch.document_BL, [(place_N, span)], batch.coords_BL3
            )
        first[hidden] = torch.log_softmax(logits_NV, -1)
    guided_NV = first[()] + 2.0 * (first[()] - first["note",]) - 0.5 * (first[()] - first["speech",])
    p_NV = torch.softmax(guided_NV, -1)
    assert len(output.trace[0]) == 6
    for decision in output.trace[0]:
        assert decision.p == pytest.approx(float(p_NV[decision.place, decision.token]), rel=1e-6)


def test_a_trace_tells_what_was_decided_when(pipe):
    documents = [[Given("note", [1]), Blank("picture"), Blank("speech", frames=2)], [Blank("note", frames=3)]]
    settings = {"order": "random", "count": "ancestral", "remask": "rescale", "eta": 0.8, "num_inference_steps": 9}
    samplers = {"picture": MaskSampler(**settings), "speech": MaskSampler(num_inference_steps=2)}
    pipe = make({"picture": Grid(5, 2, 3), "speech": Frames((4, 3)), "note": Frames((6,))}, samplers)
    plain = pipe(documents, generator=[generator(1), generator(2)])
    traced = pipe(documents, generator=[generator(1), generator(2)], trace=True)
    assert plain.trace is None
    assert items(plain.documents) == items(traced.documents)
    for document, trace in zip(traced.documents, traced.trace, strict=True):
        codes, steps = {}, [decision.step for decision in trace]
        assert steps == sorted(steps)
        for decision in trace:
            place = decision.segment, decision.place
            assert (decision.token == -1) == (decision.p != decision.p)
            if decision.token == -1:
                del codes[place]
            else:
                assert place not in codes
                codes[place] = decision.token
        for number in {segment for segment, _ in codes if document[segment].tokenizer == "picture"}:
            made = [codes[number, place] for place in range(len(document[number].codes))]
            assert made == document[number].codes.ids_N.tolist()
    assert any(decision.token == -1 for decision in traced.trace[0])
    assert {decision.segment for decision in traced.trace[0]} == {1, 2}


def test_logits_of_an_unchanged_document_are_not_computed_again(pipe):
    """With many more steps than codes, most ancestral steps decide nothing."""
    sampler = MaskSampler(order="random", count="ancestral", num_inference_steps=60)
    pipe = make({"note": Frames((6,))}, {"note": sampler})
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    output = pipe([[Blank("note", frames=2)]], generator=generator(), trace=True)
    steps = {decision.step for decision in output.trace[0]}
    assert output.nfe == [len(calls)]
    assert len(calls) == len(steps)
    twice = pipe([[Blank("note", frames=2)]] * 2, generator=[generator(), generator(9)])
    assert twice.nfe[0] == output.nfe[0]
    assert twice.documents[0][0].item == output.documents[0][0].item


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
        ([["note", Blank("note")]], {}, "document 0: 'note' is no Given"),
        ([[Blank("note")]], {"guidance_scale": 2.0}, "document 0 has no given segment"),
        ([[Blank("note")]], {"num_inference_steps": 0}, "at least 1"),
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
        pipe([[Partial("note", codes, torch.ones(3, dtype=torch.bool))]])
    with pytest.raises(ValueError, match="picture"):
        MultiDiffPipeline(pipe.transformer, pipe.vocabulary, {**pipe.tokenizers, "picture": Grid(4)})


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
    with pytest.raises(ValueError, match="no multidiff model"):
        loaded.save_pretrained(tmp_path / "sharded")
    with pytest.raises(ValueError, match="safetensors only"):
        loaded.save_pretrained(folder, safe_serialization=False)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"holds a.jpg, which is no part"):
        loaded.save_pretrained(tmp_path / "photos")


def test_push_to_hub_uploads_such_a_folder(saved, monkeypatch, tmp_path):
    class Card:
        def save(self, path):
            Path(path).write_text("blank")

    pipeline, folder = saved
    hub = "diffusers.utils.hub_utils"
    monkeypatch.setattr(f"{hub}.create_repo", lambda *a, **k: type("Repo", (), {"repo_id": "me/it"}))
    monkeypatch.setattr(f"{hub}.load_or_create_model_card", lambda *a, **k: Card())
    monkeypatch.setattr(f"{hub}.populate_model_card", lambda card: card)
    monkeypatch.setattr(f"{hub}.upload_folder", lambda folder_path, **k: shutil.copytree(folder_path, tmp_path / "it"))
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
    "class 'UNet' is not": lambda f: edit(f / "transformer" / "config.json", _class_name="UNet"),
    "has shape .* but its configuration says": lambda f: edit(f / "transformer" / "config.json", intermediate_size=64),
    "holds 11 unknown tensors": lambda f: edit(f / "transformer" / "config.json", num_layers=1),
    "holds no .safetensors file": lambda f: next((f / "transformer").glob("*.safetensors")).unlink(),
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
    with pytest.raises(ValueError, match=r"safetensors is missing, truncated"):
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


def test_schedulers_of_diffusers_can_be_handed_in():
    samplers = {
        "picture": AmusedScheduler(mask_token_id=999),
        "speech": BlockRefinementScheduler(block_length=4, num_inference_steps=2, threshold=0.99),
        "note": BlockRefinementScheduler(block_length=3, num_inference_steps=3, editing_threshold=0.2),
    }
    pipe = make({"picture": Grid(5, 2, 3), "speech": Frames((4, 3)), "note": Frames((6,))}, samplers)
    known = Partial("note", pipe.tokenizers["note"].encode([[1, 2, 3, 4]])[0], torch.tensor([True, False, False, True]))
    documents = [
        [Given("note", [1, 2, 3]), Blank("picture"), Blank("speech", frames=5)],
        [known, Blank("speech", frames=2)],
        [Blank("picture", height=3, width=4), Blank("note", frames=2)],
    ]
    together = pipe(documents, generator=[generator(i) for i in range(3)], trace=True)
    for index, document in enumerate(documents):
        alone = pipe([document], generator=[generator(index)])
        assert alone.nfe == together.nfe[index : index + 1]
        assert items(alone.documents) == [[part.item for part in together.documents[index]]]
    assert together.documents[1][0].codes.ids_N[[0, 3]].tolist() == [1, 4]
    # Greedy blocks of 4, two codes a step at the least, one block after the other.
    steps = [decision.step for decision in together.trace[0] if decision.segment == 2]
    places = [decision.place for decision in together.trace[0] if decision.segment == 2]
    assert max(steps) <= 5
    assert [place // 4 for place in places] == sorted(place // 4 for place in places)
    with pytest.raises(ValueError, match=r"samplers.json holds MaskSampler's settings, not a AmusedScheduler's"):
        _ = pipe.samplers["picture"].settings
    with pytest.raises(ValueError, match="DDIMScheduler decides no masked tokens"):
        make({"note": Frames((6,))}, {"note": DDIMScheduler()})


def test_amused_decides_as_many_codes_a_step_as_our_cosine():
    tokenizers = {"picture": Grid(5, 4, 4)}
    pipe = make(tokenizers, {"picture": AmusedScheduler(mask_token_id=5)})
    output = pipe([[Blank("picture")]], 5, generator=generator(), trace=True)
    numbers = torch.bincount(torch.tensor([decision.step for decision in output.trace[0]])).tolist()
    ours = make(tokenizers, {"picture": MaskSampler()})([[Blank("picture")]], 5, generator=generator(), trace=True)
    assert numbers == torch.bincount(torch.tensor([decision.step for decision in ours.trace[0]])).tolist()


def cached(cache, layers=2, **options):
    tokenizers = {"picture": Grid(5, 2, 3), "note": Frames((6,))}
    settings = {"block_size": 3, "count": "linear", "num_inference_steps": 6, "cache": cache, **options}
    vocabulary = SharedVocabulary.of(tokenizers)
    model = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=32, num_layers=layers, num_heads=2)
    model.initialize(generator())
    for weight in model.parameters():
        weight.data.mul_(3)
    pipe = MultiDiffPipeline(
        model.eval().double(), vocabulary, tokenizers, {name: MaskSampler(**settings) for name in tokenizers}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


CACHED = [
    [Given("note", [1, 2]), Blank("note", frames=8), Blank("picture")],
    [Given("picture", [0, 1, 2, 3, 4, 0]), Blank("note", frames=11)],
    [Given("note", [4, 4, 4]), Blank("picture")],
]


@pytest.mark.parametrize("cache", ["approximate_prefix", "approximate_dual"])
@pytest.mark.parametrize("count", [{}, {"count": "threshold", "threshold": 0.5, "num_inference_steps": None}])
def test_caches(cache, count):
    generators = [1, 2, 3]

    def made(cache, layers, documents=CACHED, seeds=generators, **options):
        return cached(cache, layers, guidance_scale=1.5, **count)(
            documents, generator=[generator(seed) for seed in seeds], trace=True, **options
        )

    # In a model of one block, keys and values depend on their own token only: nothing that is cached grows stale.
    exact, plain = made(cache, 1), made("none", 1)
    assert items(exact.documents) == items(plain.documents)
    assert exact.nfe == plain.nfe
    for ours, theirs in zip(exact.trace, plain.trace, strict=True):
        assert [decision[:4] for decision in ours] == [decision[:4] for decision in theirs]
        assert [decision.p for decision in ours] == pytest.approx([decision.p for decision in theirs], rel=1e-9)
    assert made(cache, 1, divergence=True).divergence == pytest.approx(0, abs=1e-12)
    # Deeper, they do; still, a document is as if alone.
    together = made(cache, 3, divergence=True)
    assert 1e-6 < together.divergence < 1
    for index, document in enumerate(CACHED):
        alone = made(cache, 3, [document], generators[index : index + 1])
        assert items(alone.documents) == [[part.item for part in together.documents[index]]]
        assert alone.nfe == together.nfe[index : index + 1]


def test_a_cached_pass_computes_a_block_only():
    widths = {}
    for cache in ("none", "approximate_prefix", "approximate_dual"):
        pipe, seen = cached(cache, num_inference_steps=9), []
        pipe.transformer.blocks[0].mlp.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].shape[1]))
        pipe([[Given("note", [1, 2]), Blank("note", frames=9)]], generator=generator())
        widths[cache] = seen
    length = widths["none"][0]
    assert widths["none"] == [length] * 9
    assert widths["approximate_dual"] == [length, 3, 3] * 3
    later = [width for start in (0, 3, 6) for width in (length, 10 - start, 10 - start)]  # 9 codes and the end
    assert widths["approximate_prefix"] == later


def test_caches_must_agree():
    pipe = cached("approximate_dual")
    pipe.samplers["picture"] = MaskSampler()
    with pytest.raises(ValueError, match=r"cache must be the same .* \(picture: none, note: approximate_dual\)"):
        pipe(CACHED[:1])


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return made


def test_no_tensor_of_batch_by_length_by_vocabulary():
    tokenizers = {"picture": Grid(700, 4, 4), "other": Grid(2000, 4, 4), "note": Frames((900,))}
    samplers = {
        "picture": MaskSampler(guidance_scale=2.0, num_inference_steps=3),
        "note": MaskSampler(order="margin", num_inference_steps=3),
    }
    pipe = make(tokenizers, samplers)
    documents = [[Given("other", [3] * 16), Blank("picture"), Blank("note", frames=12)]] * 5
    length = pipe.sequencer.batch(pipe._segments(documents)).ids_BL.shape[1]
    with _Largest() as largest:
        pipe(documents, generator=generator())
    weight = pipe.vocabulary.rows * 32
    asked = 5 * 16 * 700 * 2  # pictures, guided; notes are fewer
    assert largest.size <= max(weight, asked) + 1000
    assert max(weight, asked) < 5 * length * pipe.vocabulary.rows / 4


@pytest.mark.parametrize("cache", ["none", "approximate_dual"])
def test_guidance_of_another_document_changes_nothing(cache):
    """Other documents may be guided by other conditions, for other steps."""
    shared = {"count": "linear", "block_size": 3, "cache": cache, "guidance_schedule": "linear"}
    tokenizers = {"picture": Grid(5, 2, 3), "note": Frames((6,))}
    samplers = {
        "picture": MaskSampler(num_inference_steps=6, guidance_scale=3.0, **shared),
        "note": MaskSampler(num_inference_steps=12, guidance_scale={"picture": 4.0}, **shared),
    }
    pipe = make(tokenizers, samplers)
    documents = [
        [Given("picture", [0] * 6), Blank("note", frames=12)],
        [Given("note", [1, 2]), Blank("picture")],
        [Given("picture", [1] * 6), Blank("note", frames=4)],
        [Blank("note", frames=7)],
    ]
    together = pipe(documents, generator=[generator(i) for i in range(4)], trace=True)
    for index, document in enumerate(documents):
        alone = pipe([document], generator=[generator(index)], trace=True)
        assert alone.nfe == together.nfe[index : index + 1]
        assert [decision[:4] for decision in alone.trace[0]] == [decision[:4] for decision in together.trace[index]]
        ours, theirs = ([decision.p for decision in trace] for trace in (alone.trace[0], together.trace[index]))
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_max_length_leaves_an_infilled_span_alone():
    pipe = make({"note": Frames((6,))}, {"note": MaskSampler(max_length=2)})
    part = Partial("note", pipe.tokenizers["note"].encode([[1, 2, 3, 4]])[0], torch.tensor([True, True, False, True]))
    (document,) = pipe([[part]], generator=generator()).documents
    assert len(document[0].codes) == 4
    (document,) = pipe([[Blank("note", frames=9)]], generator=generator()).documents
    assert len(document[0].codes) <= 2
