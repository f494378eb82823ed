"""Generation by models whose attention has an order: the exact cache, the end of the work, and what is refused."""

import pytest
import torch
from diffusers import AmusedScheduler

from multidiff import Blank, Given, MaskedDiffusionTransformer, MaskSampler, MultiDiffPipeline, SharedVocabulary
from multidiff.generation.editing import extend
from multidiff.processes import Uniform
from multidiff.sequence import MASK, TokenBlocks
from tests.helpers.pipelines import batch_of, items
from tests.helpers.toys import Frames, Grid, generator

TOKENIZERS = {"picture": Grid(5, 2, 3), "speech": Frames((4, 3)), "note": Frames((6,))}
PATTERNS = {
    "causal": {"attention": "causal"},
    "blocks of 4": {"attention": "block_causal", "block_length": 4},
    "blocks of 3": {"attention": "block_causal", "block_length": 3},  # which part frames of two levels
    "segments": {"attention": "block_causal", "block_length": "segment"},
}
DOCUMENTS = [
    [Given("note", [1, 2, 5, 0, 3]), Blank("speech", frames=7), Blank("picture")],
    [Given("picture", [0, 1, 2, 3, 4, 0]), Blank("note", frames=11)],
    [Blank("picture"), Given("note", [4]), Blank("speech", frames=3), Blank("note", frames=2)],
    [Given("note", [4, 4, 4]), Blank("picture")],
]
SETTINGS = {
    "sampled": {},
    "greedy": {"temperature": 0.0, "unmasking": "linear"},
    "random order": {"order": "random", "unmasking": "linear", "top_k": 3, "top_p": 0.9},
    "adaptive": {"unmasking": "threshold", "threshold": 0.4},
    "guided": {"guidance_scale": 2.0},
    "guided at last": {"guidance_scale": {"note": 2.0, "picture": 0.5}, "guidance_schedule": [0.5, 1.0]},
}


def make(pattern, settings=None, dtype=torch.float64, **options):
    vocabulary = SharedVocabulary.of(TOKENIZERS)
    sizes = {"hidden_size": 32, "num_layers": 3, "num_heads": 2, **options}
    model = MaskedDiffusionTransformer(vocabulary.rows, **sizes, **PATTERNS[pattern])
    model.initialize(generator())
    for weight in model.parameters():
        weight.data.mul_(3)
    samplers = {name: MaskSampler(**(settings or {})) for name in TOKENIZERS}
    pipe = MultiDiffPipeline(model.eval().to(dtype=dtype), vocabulary, TOKENIZERS, samplers)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, documents, seeds=range(4), **options):
    return pipe(documents, generator=[generator(seed) for seed in seeds][: len(documents)], trace=True, **options)


def same(one, other):
    assert items(one.documents) == items(other.documents)
    assert one.nfe == other.nfe
    for ours, theirs in zip(one.trace, other.trace, strict=True):
        assert [decision[:4] for decision in ours] == [decision[:4] for decision in theirs]
        assert [decision.p for decision in ours] == pytest.approx([decision.p for decision in theirs], rel=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", SETTINGS)
def test_samples_with_the_exact_cache_are_those_without(pattern, name):
    plain = drawn(make(pattern, {**SETTINGS[name], "cache": "none"}), DOCUMENTS)
    cached = drawn(make(pattern, {**SETTINGS[name], "cache": "exact"}), DOCUMENTS, divergence=True)
    same(cached, plain)
    assert cached.divergence == pytest.approx(0, abs=1e-12)
    same(drawn(make(pattern, SETTINGS[name]), DOCUMENTS), plain)  # the default
    for number, document in enumerate(DOCUMENTS):
        alone = drawn(make(pattern, SETTINGS[name]), [document], [number])
        assert items(alone.documents) == items(plain.documents)[number : number + 1]
        assert alone.nfe == plain.nfe[number : number + 1]


def test_a_time_input_tells_of_each_block():
    """Decided blocks are clean, and of a block that is being decided the share of undecided positions is noise."""
    settings = {"unmasking": "linear", "guidance_scale": 2.0}
    pipe, seen = make("blocks of 3", {**settings, "cache": "none"}, time_input=True), []
    document = [Given("note", [1, 2]), Blank("picture")]  # <bos>, 5 tokens of the note, <picture>, 6 codes, the end
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, options: seen.append(options["noise_P"].view(2, -1).tolist()), with_kwargs=True
    )
    plain = drawn(pipe, [document])
    same(drawn(make("blocks of 3", settings, time_input=True), [document]), plain)
    null = [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    for step, (condition, hidden) in enumerate(seen):
        block, done = divmod(step, 3)
        codes = [0.0] * 3 * block + [(3 - done) / 3] * 3 + [0.0] * block  # the end is in the last block
        assert condition == pytest.approx([0.0] * 7 + codes)
        assert hidden == pytest.approx([*null, 0.0, *codes])
    assert len(seen) == 6
    with pytest.raises(ValueError, match="time_input tells of noise, and a model with attention 'causal' has none"):
        make("causal", time_input=True)


@pytest.mark.parametrize("pattern", ["causal", "blocks of 4"])
def test_sampling_is_greedy_decoding_written_out(pattern):
    """One code at a time, from left to right, each by a whole pass over all that stands before it."""
    pipe = make(pattern, {"temperature": 0.0, "order": "left_to_right", "unmasking": "linear"})
    document = [Given("note", [1, 2]), Blank("note", frames=9)]
    batch = batch_of(pipe, [document])
    model, causal = pipe.transformer, pattern == "causal"
    number_P, ids_P = model.pattern.numbers(batch), torch.where(batch.known_P, batch.ids_P, MASK)
    tokens = []
    for place in torch.nonzero(~batch.known_P).flatten().tolist():
        seen = place if causal else int((number_P <= number_P[place]).sum())
        (logits_1V,) = model(
            ids_P[:seen],
            batch.positions_P3[:seen],
            torch.tensor([0, seen]),
            [(torch.tensor([place - causal]), pipe.vocabulary.spans["note"][0])],
            batch.coords_P3[:seen],
            blocks=TokenBlocks.clean(number_P[:seen]),
        )
        tokens.append(int(logits_1V.argmax()))
        ids_P[place] = pipe.vocabulary.spans["note"][0][0] + tokens[-1]
    length = tokens.index(6) if 6 in tokens else len(tokens)
    output = pipe([document], generator=generator())
    assert output.documents[0][1].item == tokens[:length]
    steps = length + 1 if causal else 4 * (length // 4 + 1)  # the block that an EOS is in is finished
    assert output.nfe == [min(9, steps)]


def widths(pipe, documents, layer=0):
    seen = []
    hook = pipe.transformer.layers[layer].mlp.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    drawn(pipe, documents)
    hook.remove()
    return seen


def test_a_cached_pass_computes_what_is_new():
    document = [Given("note", [1, 2]), Blank("picture")]  # <bos>, 5 tokens of the note, <picture>, 6 codes, the end
    settings = {"unmasking": "linear", "num_inference_steps": 6}
    assert widths(make("causal", settings), [document]) == [7, 1, 1, 1, 1, 1]
    assert widths(make("causal", {**settings, "cache": "none"}), [document]) == [7, 8, 9, 10, 11, 12]
    # Blocks: <bos> and the note; <picture> and 4 codes; 2 codes and the end.
    assert widths(make("blocks of 4", settings), [document]) == [11, 5, 5, 5, 8, 3]
    assert widths(make("blocks of 4", {**settings, "cache": "none"}), [document]) == [11, 11, 11, 11, 14, 14]
    assert widths(make("segments", settings), [document]) == [14, 8, 8, 8, 8, 8]


def note_that_ends(pattern, place, **settings):
    """A pipeline whose notes have an EOS at this place, and not before."""
    forced = dict.fromkeys(range(place), 1)
    samplers = {"note": MaskSampler(forced_tokens={**forced, place: 6}, **settings)}
    pipe = make(pattern)
    pipe.samplers = {**dict(pipe.samplers), **samplers}
    return pipe


@pytest.mark.parametrize("cache", ["exact", "none"])
def test_an_eos_ends_the_work(cache):
    """What stands behind it takes no pass, and later segments see it as EOS."""
    short = drawn(note_that_ends("causal", 3, cache=cache), [[Blank("note", frames=1000)]])
    assert short.documents[0][0].item == [1, 1, 1]
    assert short.nfe == [4]
    blocks = note_that_ends("blocks of 4", 5, cache=cache)
    assert drawn(blocks, [[Blank("note", frames=1000)]]).nfe == [8]
    two = drawn(
        note_that_ends("blocks of 4", 5, cache=cache), [[Blank("note", frames=1000)], [Blank("note", frames=6)]]
    )
    assert two.nfe == [8, 6]
    pipe = note_that_ends("causal", 3, cache=cache)
    pipe.samplers["picture"] = MaskSampler(cache=cache)
    seen = []
    pipe(
        [[Blank("note", frames=50), Blank("picture")]],
        generator=generator(),
        callback_on_step_end=lambda _, step, timestep, state: seen.append(state["documents"][0]),
    )
    assert len(seen) == 4 + 6
    assert seen[3][0].known_N.all()
    assert (seen[3][0].ids_N[3:] == 6).all()
    assert not seen[3][1].known_N.any()


def test_frames_of_several_levels_end_together():
    pipe = make("blocks of 3", {"order": "random", "unmasking": "linear"})
    ended = 0
    for seed in range(30):
        (segment,) = drawn(pipe, [[Blank("speech", frames=12)]], [seed]).documents[0]
        whole = segment.codes
        assert len(whole) == 2 * whole.size["frames"]
        ended += whole.size["frames"] < 12
    assert ended > 10
    # Every frame that was decided is content or EOS as a whole.
    trace = drawn(pipe, [[Blank("speech", frames=12)]], [3]).trace[0]
    token = {decision.place: decision.token for decision in trace}
    eos = [token[place] == (4, 3)[place % 2] for place in range(24)]
    assert all(a == b for a, b in zip(eos[::2], eos[1::2], strict=True))


def test_segments_wait_for_those_before_them():
    trace = drawn(make("blocks of 4"), DOCUMENTS).trace
    for decisions in trace:
        order = [(decision.segment, decision.place // 4) for decision in decisions if decision.p != 1.0]
        assert order == sorted(order)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_masked_passage_goes_on_from_what_is_known(pattern):
    pipe = make(pattern)
    document = [extend(pipe, "note", [1, 2, 3], max_new_frames=6)]
    made = drawn(pipe, [document])
    assert made.documents[0][0].item[:3] == [1, 2, 3]
    same(made, drawn(make(pattern, {"cache": "none"}), [document]))


def test_half_precision_samples():
    pipe = make("blocks of 4", dtype=torch.bfloat16)
    made = drawn(pipe, DOCUMENTS)
    assert [len(document) for document in made.documents] == [len(document) for document in DOCUMENTS]


@pytest.mark.parametrize(
    ("pattern", "settings", "message"),
    [
        (None, {"cache": "exact"}, "'picture': cache 'exact' does not go with a model of full attention"),
        (
            "causal",
            {"cache": "approximate_dual", "block_length": 1},
            "cache 'approximate_dual' does not go with a model",
        ),
        ("blocks of 4", {"block_length": 8}, "block_length 8 does not go with a model of block_causal attention with"),
        ("blocks of 4", {"block_length": "level"}, "block_length 'level' does not go"),
        ("segments", {"block_length": 4}, "block_length 4 does not go"),
        ("causal", {"block_length": 2}, "block_length 2 does not go with a model of causal attention"),
        ("causal", {"order": "random", "unmasking": "ancestral"}, "unmasking 'ancestral' does not go"),
        ("blocks of 4", {"remask": "edit", "editing_threshold": 0.5}, "remask 'edit' does not go"),
    ],
)
def test_samplers_that_do_not_fit_are_refused(monkeypatch, pattern, settings, message):
    if pattern is None:
        monkeypatch.setitem(PATTERNS, None, {})
    pipe = make(pattern)
    with pytest.raises(ValueError, match=message):
        pipe.samplers["picture"] = MaskSampler(**settings)
    with pytest.raises(ValueError, match="does not go"):
        make(pattern, settings)


def test_schedulers_of_diffusers_know_no_blocks():
    pipe = make("blocks of 4")
    with pytest.raises(ValueError, match=r"sampler of 'picture', AmusedScheduler, .* takes no block_RN"):
        pipe.samplers["picture"] = AmusedScheduler(mask_token_id=5)
    pipe.samplers["picture"] = MaskSampler(block_length=4)
    with pytest.raises(ValueError, match="num_inference_steps 1 is less than the 2 blocks of the model's attention"):
        drawn(pipe, [[Blank("picture")]], num_inference_steps=1)


def test_processes_without_masks_know_no_blocks():
    vocabulary = SharedVocabulary.of(TOKENIZERS)
    model = make("blocks of 4").transformer
    with pytest.raises(ValueError, match=r"begins with masks, but the process of 'note', Uniform, has none"):
        MultiDiffPipeline(model, vocabulary, TOKENIZERS, processes={"note": Uniform()})
