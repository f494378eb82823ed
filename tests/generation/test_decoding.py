"""The decoding loop: guidance, caches, traces, and what a document costs, whatever stands beside it."""

import shutil
from itertools import chain

import pytest
import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler, DDIMScheduler
from torch._inductor import config

from multidiff import Blank, Given, Masked, MaskSampler, MultiDiffPipeline
from multidiff.generation.decoder import Decoder
from multidiff.models.transformer import MaskedDiffusionTransformer
from multidiff.sequence.vocabulary import MASK, SharedVocabulary
from tests.helpers.far import FAR, FarDevice, send
from tests.helpers.largest import Largest
from tests.helpers.pipelines import batch_of, items, make
from tests.helpers.toys import Frames, Grid, generator


@pytest.fixture(scope="module")
def pipe():
    return make({"picture": Grid(5, 2, 3), "speech": Frames((4, 3)), "note": Frames((6,))})


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
        batch = batch_of(pipe, [document])
        names = ["note", "speech", "picture"]
        seen_P = batch.ids_P.clone()
        for number, name in enumerate(names):
            if name in hidden or name == "picture":
                inside_P = batch.segment_P == number
                unknown_P = ~batch.known_P if name == "picture" else batch.known_P
                seen_P[inside_P & unknown_P] = MASK
        place_N = ((batch.segment_P == 2) & ~batch.known_P).nonzero().flatten()
        span = pipe.vocabulary.spans["picture"][0]
        with torch.no_grad():
            (logits_NV,) = pipe.transformer(
                seen_P, batch.positions_P3, batch.document_starts, [(place_N, span)], batch.coords_P3
            )
        first[hidden] = torch.log_softmax(logits_NV, -1)
    guided_NV = first[()] + 2.0 * (first[()] - first["note",]) - 0.5 * (first[()] - first["speech",])
    p_NV = torch.softmax(guided_NV, -1)
    assert len(output.trace[0]) == 6
    for decision in output.trace[0]:
        assert decision.p == pytest.approx(float(p_NV[decision.place, decision.token]), rel=1e-6)


def test_a_trace_tells_what_was_decided_when(pipe):
    documents = [[Given("note", [1]), Blank("picture"), Blank("speech", frames=2)], [Blank("note", frames=3)]]
    settings = {"order": "random", "unmasking": "ancestral", "remask": "rescale", "eta": 0.8, "num_inference_steps": 9}
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
    sampler = MaskSampler(order="random", unmasking="ancestral", num_inference_steps=60)
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


def test_schedulers_of_diffusers_can_be_handed_in():
    samplers = {
        "picture": AmusedScheduler(mask_token_id=999),
        "speech": BlockRefinementScheduler(block_length=4, num_inference_steps=2, threshold=0.99),
        "note": BlockRefinementScheduler(block_length=3, num_inference_steps=3, editing_threshold=0.2),
    }
    pipe = make({"picture": Grid(5, 2, 3), "speech": Frames((4, 3)), "note": Frames((6,))}, samplers)
    known = Masked("note", pipe.tokenizers["note"].encode([[1, 2, 3, 4]])[0], torch.tensor([True, False, False, True]))
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
    with pytest.raises(ValueError, match="BlockRefinementScheduler, got DDIMScheduler"):
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
    settings = {"block_length": 3, "unmasking": "linear", "num_inference_steps": 6, "cache": cache, **options}
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
@pytest.mark.parametrize("count", [{}, {"unmasking": "threshold", "threshold": 0.5, "num_inference_steps": None}])
def test_caches(cache, count):
    generators = [1, 2, 3]

    def made(cache, layers, documents=CACHED, seeds=generators, **options):
        return cached(cache, layers, guidance_scale=1.5, **count)(
            documents, generator=[generator(seed) for seed in seeds], trace=True, **options
        )

    # In a model of one layer, keys and values depend on their own token only: nothing that is cached grows stale.
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
        pipe.transformer.layers[0].mlp.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(len(x[0])))
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


def test_no_tensor_of_batch_by_length_by_vocabulary():
    tokenizers = {"picture": Grid(700, 4, 4), "other": Grid(2000, 4, 4), "note": Frames((900,))}
    samplers = {
        "picture": MaskSampler(guidance_scale=2.0, num_inference_steps=3),
        "note": MaskSampler(order="margin", num_inference_steps=3),
    }
    pipe = make(tokenizers, samplers)
    documents = [[Given("other", [3] * 16), Blank("picture"), Blank("note", frames=12)]] * 5
    length = len(batch_of(pipe, documents).ids_P)
    with Largest() as largest:
        pipe(documents, generator=generator())
    weight = pipe.vocabulary.rows * 32
    asked = 5 * 16 * 700 * 2  # pictures, guided; notes are fewer
    assert largest.size <= max(weight, asked) + 1000
    assert max(weight, asked) < length * pipe.vocabulary.rows / 4


@pytest.mark.parametrize("cache", ["none", "approximate_dual"])
def test_guidance_of_another_document_changes_nothing(cache):
    """Other documents may be guided by other conditions, for other steps."""
    shared = {"unmasking": "linear", "block_length": 3, "cache": cache, "guidance_schedule": "linear"}
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
    part = Masked("note", pipe.tokenizers["note"].encode([[1, 2, 3, 4]])[0], torch.tensor([True, True, False, True]))
    (document,) = pipe([[part]], generator=generator()).documents
    assert len(document[0].codes) == 4
    (document,) = pipe([[Blank("note", frames=9)]], generator=generator()).documents
    assert len(document[0].codes) <= 2


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({"num_inference_steps": 4}, 1),
        ({"num_inference_steps": 4, "guidance_scale": 2.0, "order": "margin", "draw": "gumbel"}, 1),
        ({"order": "confidence", "unmasking": "threshold", "threshold": 0.3}, 1),
        ({"order": "entropy", "unmasking": "entropy_bound", "entropy_bound": 0.5, "guidance_scale": {"note": 1.5}}, 1),
        ({"order": "random", "unmasking": "ancestral", "remask": "rescale", "eta": 0.5, "num_inference_steps": 5}, 1),
        ({"remask": "edit", "editing_threshold": 0.3, "num_inference_steps": 4}, 1),
        ({"block_length": 3, "cache": "approximate_dual", "num_inference_steps": 4, "guidance_scale": 2.0}, 1),
        ({"block_length": "level", "level_penalty": 1.0, "repetition_penalty": 1.5, "num_inference_steps": 4}, 1),
        (
            {
                "order": "left_to_right",
                "suppress_tokens": [1],
                "min_length": 1,
                "max_length": 3,
                "forced_tokens": {0: 2},
            },
            2,
        ),
    ],
)
def test_a_step_waits_for_the_device_once(settings, reads, monkeypatch):
    tokenizers = {"speech": Frames((4, 3)), "note": Frames((6,))}
    documents = [
        [Given("note", [1, 2]), Blank("speech", frames=3)],
        [Given("note", [1]), Masked("speech", tokenizers["speech"].canvas(3), torch.arange(6) < 2, max_new_units=2)],
    ]
    near = make(tokenizers, {"speech": MaskSampler(**settings)})
    expected = near(documents, generator=[generator(1), generator(2)], trace=True)
    far = make(tokenizers, {"speech": MaskSampler(**settings)})
    waits = []
    step = Decoder.step

    def counted(decoder, number):
        device.waits.clear()
        step(decoder, number)
        waits.append(list(device.waits))

    monkeypatch.setattr(Decoder, "step", counted)
    with FarDevice() as device:
        send(far.transformer)
        output = far(documents, generator=[generator(1), generator(2)], trace=True)
    assert far.transformer.device == FAR
    assert items(output.documents) == items(expected.documents)
    for ours, theirs in zip(chain(*output.trace), chain(*expected.trace), strict=True):
        assert ours[:-1] == theirs[:-1]
        assert ours.p == pytest.approx(theirs.p, nan_ok=True)
    assert len(waits) >= 3
    assert waits == [["aten._to_copy.default", "aten._local_scalar_dense.default"][:reads]] * len(waits)


def test_what_reads_the_device_is_counted():
    with FarDevice() as device:
        table = torch.tensor([1.0, 0.0, 2.0]).to(FAR)
        assert device.waits == ["aten._to_copy.default"]
        for wait in (lambda: bool(table.any()), lambda: table.nonzero(), lambda: table[table > 0], table.cpu):
            device.waits.clear()
            wait()
            assert device.waits
        device.waits.clear()
        torch.tensor([1]).to(FAR, non_blocking=True)
        assert torch.equal((table[torch.arange(2, device=FAR)] + 1).cpu(), torch.tensor([2.0, 1.0]))
        assert device.waits == ["aten._to_copy.default"]


@pytest.mark.parametrize("settings", [{}, {"block_length": 9, "cache": "approximate_dual"}])
def test_compiled_once_for_any_number_of_tokens(settings):
    torch._dynamo.reset()
    pipe = make({"picture": Grid(5, 6, 6), "note": Frames((6,))}, {"picture": MaskSampler(**settings)})
    documents = [[Given("note", [1, 2]), Blank("picture")], [Given("note", [1, 2, 0]), Blank("picture")]]
    generators = [generator(1), generator(2)]
    expected = pipe(documents, 12, generator=generators)
    compiled, after = [], []
    pipe.transformer.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    for _ in range(2):
        output = pipe(
            documents,
            12,
            generator=[generator(1), generator(2)],
            callback_on_step_end=lambda *_: after.append(len(compiled)),
        )
        assert items(output.documents) == items(expected.documents)
    # The parts of each layer before and after attention, and again where a single position is open.
    assert 2 * len(pipe.transformer.layers) <= after[0] <= 4 * len(pipe.transformer.layers)
    assert after[11] <= 2 * after[0]
    assert after[12:] == [after[11]] * 12


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # in torch's own import
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="there is no C++ compiler")
def test_the_default_compiler_samples_the_same():
    """With generated code, for one number of open codes and then for any."""
    torch._dynamo.reset()
    pipe = make({"picture": Grid(5, 6, 6), "note": Frames((6,))})
    del pipe.transformer.layers[1:]  # compilers take their time
    documents = [[Given("note", [1, 2]), Blank("picture")], [Given("note", [1, 2, 0]), Blank("picture")]]
    expected = pipe(documents, 12, generator=[generator(1), generator(2)], trace=True)
    pipe.transformer.compile()
    with config.patch({"cpp.vec_isa_ok": True}):  # else it compiles programs for seconds to see what the CPU can do
        output = pipe(documents, 12, generator=[generator(1), generator(2)], trace=True)
    assert items(output.documents) == items(expected.documents)
    for ours, theirs in zip(chain(*output.trace), chain(*expected.trace), strict=True):
        assert ours[:-1] == theirs[:-1]
        assert ours.p == pytest.approx(theirs.p, rel=1e-9)
