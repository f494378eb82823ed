"""Frames: codes that are all EOS or all content, whatever decides them."""

import itertools

import pytest
import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler
from scipy.stats import chisquare

from multidiff import Blank, Given, Masked, MaskSampler
from multidiff.samplers import as_sampler, token_sampling
from tests.helpers import sampling
from tests.helpers.pipelines import make
from tests.helpers.toys import Frames, Grid, generator

SIZES = (2, 3, 2)
ANCESTRAL = {"order": "random", "unmasking": "ancestral", "num_inference_steps": 9}
SAMPLERS = [
    *({"order": order} for order in ("random", "confidence", "margin", "entropy", "left_to_right")),
    {"unmasking": "linear", "num_inference_steps": 1},
    {"unmasking": "linear", "num_inference_steps": 5, "temperature": 0.0},
    {"unmasking": "arccos", "order_temperature": 2.0, "num_inference_steps": 4, "guidance_scale": 3.0},
    {"unmasking": "power", "exponent": 2.0, "top_p": 0.8, "num_inference_steps": 3},
    {"unmasking": "linear", "draw": "gumbel", "num_inference_steps": 3},
    {"unmasking": "linear", "block_length": "level", "num_inference_steps": 6},
    {
        "unmasking": "linear",
        "block_length": 7,
        "cache": "approximate_dual",
        "level_penalty": 1.0,
        "num_inference_steps": 45,
    },
    {"unmasking": "linear", "block_length": 10, "cache": "approximate_prefix", "num_inference_steps": 30},
    {"unmasking": "threshold", "threshold": 0.3},
    {"unmasking": "factor", "factor": 3.0},
    {"order": "entropy", "unmasking": "entropy_bound", "entropy_bound": 9.0},
    ANCESTRAL,
    *({**ANCESTRAL, "remask": remask, "eta": 0.4} for remask in ("cap", "rescale", "loop")),
    {**ANCESTRAL, "remask": "conf"},
    {"remask": "edit", "editing_threshold": 0.3, "num_inference_steps": 9},
    {"suppress_tokens": [1], "min_length": 2, "max_length": 30, "repetition_penalty": 1.5, "num_inference_steps": 4},
    AmusedScheduler(mask_token_id=999),
    BlockRefinementScheduler(block_length=8, num_inference_steps=3, threshold=0.4),
    BlockRefinementScheduler(block_length=8, num_inference_steps=4, editing_threshold=0.25),
]


def frames_of(segment):
    """How many codes of each frame are EOS, and how many are decided."""
    eos_N = segment.known_N & (segment.ids_N == torch.tensor(SIZES)[segment.levels_N])
    return eos_N.view(-1, len(SIZES)).sum(1), segment.known_N.view(-1, len(SIZES)).sum(1)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: str(sampler)[:90].split("{\n")[0])
def test_no_frame_is_eos_in_part(sampler):
    """At any step, with a model that knows nothing; each of its levels would be EOS or not by itself."""
    sampler = MaskSampler(**sampler) if isinstance(sampler, dict) else sampler
    pipe = make({"speech": Frames(SIZES), "picture": Grid(5, 2, 3)}, {"speech": sampler})
    codes = pipe.tokenizers["speech"].encode([[0, 0, 0, 1, 1, 1, 0, 2, 1, 1, 2, 0]])[0]
    known_N = torch.tensor([True] * 4 + [False] * 4 + [True] * 4)
    documents = [
        [Given("picture", [0, 1, 2, 3, 4, 0]), Blank("speech", frames=40)],
        [Given("picture", [1] * 6), Blank("speech", frames=40), Blank("speech", frames=30)],
        [Given("picture", [2] * 6), Masked("speech", codes, known_N, max_new_units=40), Blank("speech", frames=50)],
    ]
    seen = []

    def look(pipe, step, timestep, state):
        for segment in itertools.chain(*state["documents"]):
            if segment.tokenizer == "speech":
                eos_F, known_F = frames_of(segment)
                assert bool(((eos_F == 0) | (eos_F == known_F)).all())
                seen.append((eos_F == len(SIZES)).tolist())

    output = pipe(documents, generator=[generator(i) for i in range(3)], callback_on_step_end=look)
    last = list(itertools.chain(*seen[-5:]))
    assert len(last) == 40 + 40 + 30 + 44 + 50
    assert 0 < sum(last) < len(last)  # both are there
    part = output.documents[2][1]
    assert part.codes.ids_N[:12][known_N].tolist() == codes.ids_N[known_N].tolist()
    for document in output.documents:
        for part in document[1:]:
            assert bool((part.codes.ids_N < torch.tensor(SIZES)[part.codes.levels_N]).all())


def test_documents_beside_it_change_nothing():
    """Not even where a document has nothing that could be EOS."""
    pipe = make({"speech": Frames(SIZES)}, {"speech": MaskSampler(order="random", num_inference_steps=2)})
    codes = pipe.tokenizers["speech"].encode([[0, 0, 0, 1, 1, 1]])[0]
    documents = [[Masked("speech", codes, torch.arange(6) % 3 == 0)], [Blank("speech", frames=9)]]
    together = pipe(documents, generator=[generator(1), generator(2)])
    for index, document in enumerate(documents):
        (alone,) = pipe([document], generator=[generator(index + 1)]).documents
        assert alone[0].item == together.documents[index][0].item


def drive(sampler, p_NV, steps, number, seed=0, frames=1, seen=None):
    """`number` rows of `frames` frames whose codes have these probabilities whatever else stands there; id 2 is EOS.

    Returns the tokens and their probabilities.
    """
    levels = len(p_NV) // frames
    sample_RN = torch.full((number, len(p_NV)), p_NV.shape[1])
    level_N, unit_N = torch.arange(len(p_NV)) % levels, torch.arange(len(p_NV)) // levels
    logits_NV = p_NV.log()
    sample_RN, state = sampling.drive(
        sampler,
        sample_RN,
        steps,
        lambda row_N: logits_NV,
        [generator(seed)] * number,
        levels_RN=level_N.expand_as(sample_RN),
        coords_RN3=torch.stack([unit_N, level_N, torch.zeros_like(unit_N)], -1).expand(number, -1, 3),
        eos_RN=torch.full_like(sample_RN, 2),
        frame_RN=torch.arange(number)[:, None] * frames + unit_N,
        seen=seen,
    )
    return sample_RN, state.probs_RN


def same(drawn_RN, expected):
    """chi-square: whether rows are drawn from {tokens: probability}."""
    counts = dict.fromkeys(expected, 0)
    for row in drawn_RN.tolist():
        counts[tuple(row)] += 1  # a KeyError is a row that cannot be
    total = len(drawn_RN)
    likely = [tokens for tokens, p in expected.items() if p * total >= 5]
    observed = [counts[tokens] for tokens in likely]
    wanted = [expected[tokens] * total for tokens in likely]
    rest = total - sum(observed), total - sum(wanted)
    if rest[1] > 1e-6 * total:
        observed, wanted = [*observed, rest[0]], [*wanted, rest[1]]
    return chisquare(observed, wanted, sum_check=False).pvalue


# Of a joint distribution without contradictions: EOS with 0.3, else the levels are independent of each other.
CONTENT = torch.tensor([[0.8, 0.2], [0.35, 0.65], [0.5, 0.5]], dtype=torch.float64)
CONSISTENT = torch.cat([0.7 * CONTENT, torch.full((3, 1), 0.3, dtype=torch.float64)], 1)
JOINT = {
    **{
        tokens: 0.7 * float(torch.stack([CONTENT[level, token] for level, token in enumerate(tokens)]).prod())
        for tokens in itertools.product((0, 1), repeat=3)
    },
    (2, 2, 2): 0.3,
}
EXACT = {
    "amused": lambda: as_sampler(AmusedScheduler(mask_token_id=3)),  # in one step; its order follows what it has drawn
    **{
        f"{options}": lambda options=options: MaskSampler(**options)
        for options in (
            {"order": "random", "unmasking": "linear"},
            {"order": "random", "unmasking": "linear", "draw": "gumbel"},
            {"order": "random", "unmasking": "linear", "block_length": "level"},
            {"order": "random", "unmasking": "ancestral"},
            {"order": "random", "unmasking": "ancestral", "remask": "rescale", "eta": 0.5},
        )
    },
}


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [(name, steps) for name in EXACT for steps in ([1] if name == "amused" else [3] if "block" in name else [1, 2, 3])],
)
def test_frames_are_drawn_from_the_joint_distribution(sampler, steps):
    """However many are decided at once: the marginals are all that a model of masked codes knows, and are enough."""
    drawn_RN, _ = drive(EXACT[sampler](), CONSISTENT, steps, 4000)
    assert same(drawn_RN, JOINT) > 1e-3


@pytest.mark.parametrize("draw", ["inverse", "gumbel"])
@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.9}, {"typical_p": 0.99}, {}])
def test_what_follows_is_truncated_without_eos(draw, options):
    """With EOS in the set, the first of these would keep token 0 and EOS alone."""
    p_NV = torch.tensor([[0.5, 0.5, 0.0], [0.3, 0.2, 0.5]], dtype=torch.float64).clamp_min(1e-300)
    for more, steps in (({"block_length": "level"}, 2), ({}, 1)):
        sampler = MaskSampler(order="random", unmasking="linear", draw=draw, **options, **more)
        drawn_RN, _ = drive(sampler, p_NV, steps, 20_000, seed=steps)
        assert bool((drawn_RN < 2).all())
        assert float((drawn_RN[:, 1] == 0).double().mean()) == pytest.approx(0.6, abs=0.015)


def test_the_joint_distribution_is_told_from_others():
    drawn_RN, _ = drive(MaskSampler(order="random", unmasking="linear"), CONSISTENT, 1, 4000)
    other = {tokens: 0.6 / 0.7 * p if 2 not in tokens else 0.4 for tokens, p in JOINT.items()}
    assert same(drawn_RN, other) < 1e-6


# A model that contradicts itself: each level has another probability of EOS.
TORN = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.3, 0.6], [0.3, 0.3, 0.4]], dtype=torch.float64)


def restricted(order):
    """{tokens: probability} where the first of `order` is free, and the others follow."""
    whole = {}
    for tokens in [*itertools.product((0, 1), repeat=3), (2, 2, 2)]:
        p = float(TORN[order[0], tokens[order[0]]])
        for level in order[1:]:
            p *= float(TORN[level, tokens[level]] / TORN[level, :2].sum()) if 2 not in tokens else 1.0
        whole[tokens] = p
    return whole


def test_the_first_that_is_decided_is_free():
    for draw in ("inverse", "gumbel"):
        sampler = MaskSampler(order="random", unmasking="linear", draw=draw)
        # At once: level 0.
        drawn_RN, probs_RN = drive(sampler, TORN, 1, 4000)
        assert same(drawn_RN, restricted((0, 1, 2))) > 1e-3
        for row, tokens in enumerate(drawn_RN[:200].tolist()):
            assert float(probs_RN[row].prod()) == pytest.approx(restricted((0, 1, 2))[tuple(tokens)])
        # One by one: any, as often as the others.
        drawn_RN, probs_RN = drive(sampler, TORN, 3, 4000, seed=1)
        tables = [restricted(order) for order in itertools.permutations(range(3))]
        assert same(drawn_RN, {tokens: sum(table[tokens] for table in tables) / 6 for tokens in tables[0]}) > 1e-3
    greedy_RN, _ = drive(MaskSampler(unmasking="linear", temperature=0.0), TORN, 1, 1)
    assert greedy_RN.tolist() == [[0, 1, 0]]


def test_frames_of_one_row_do_not_touch_each_other():
    p_NV = torch.tensor([[0.0, 0.0, 1.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0], [0.1, 0.1, 0.8]], dtype=torch.float64)
    drawn_RN, _ = drive(MaskSampler(order="random", unmasking="linear"), p_NV.clamp_min(1e-300), 1, 50, frames=2)
    assert bool((drawn_RN[:, :2] == 2).all())
    assert bool((drawn_RN[:, 2:] < 2).all())


@pytest.mark.parametrize(
    ("options", "eos"),
    [
        ({"forced_tokens": {1: 0}}, False),
        ({"forced_tokens": {2: 2}}, True),
        ({"forced_tokens": {0: 2}}, True),
        ({"suppress_tokens": [2]}, False),
        ({"suppress_tokens": [0, 1]}, True),
        ({"min_length": 1}, False),
        ({"max_length": 0}, True),
    ],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_ruled_out_of_one_code_is_ruled_out_of_its_frame(options, eos, steps):
    drawn_RN, _ = drive(MaskSampler(order="random", unmasking="linear", **options), TORN, steps, 200)
    assert bool(((drawn_RN == 2) == eos).all())
    for place, token in options.get("forced_tokens", {}).items():
        assert bool((drawn_RN[:, place] == token).all())


@pytest.mark.parametrize("options", [{"forced_tokens": {0: 1, 1: 2}}, {"forced_tokens": {2: 2}, "min_length": 1}])
def test_a_frame_that_can_be_nothing_is_refused(options):
    with pytest.raises(
        ValueError,
        match="nothing is left to draw in a frame, whose codes must all be EOS or all content: change forced",
    ):
        drive(MaskSampler(order="random", unmasking="linear", **options), TORN, 3, 2)


def test_editing_turns_no_content_into_eos():
    """Once anything is decided, the model is sure that all is EOS."""
    sampler = MaskSampler(order="random", unmasking="linear", remask="edit", editing_threshold=0.5)
    drawn_RN, _ = drive(sampler, TORN, 3, 500)
    assert bool(((drawn_RN == 2).sum(1) % 3 == 0).all())
    assert 20 < int((drawn_RN[:, 0] == 2).sum()) < 480


@pytest.mark.parametrize("order", ["left_to_right", "random"])
def test_part_of_a_frame_is_asked_for(order):
    """Two codes of a frame in one step, the third in the next, which sees what the first two are."""
    seen, number = [], 4000
    drawn_RN, _ = drive(MaskSampler(order=order, unmasking="linear"), CONSISTENT, 2, number, seen=seen)
    assert [where_RN.sum(1).unique().tolist() for where_RN, _, _ in seen] == [[2], [1]]
    assert same(drawn_RN, JOINT) > 1e-3
    if order == "left_to_right":
        drawn_RN, _ = drive(MaskSampler(order=order, unmasking="linear"), TORN, 2, number)
        assert same(drawn_RN, restricted((0, 1, 2))) > 1e-3


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"draw": "gumbel"}])
def test_frames_are_the_same_where_logits_are_sampled_in_parts(options, monkeypatch):
    expected = drive(MaskSampler(**options), CONSISTENT, 3, 50)
    monkeypatch.setattr(token_sampling, "_TOGETHER", 3 * CONSISTENT.shape[1])
    assert all(
        torch.equal(made, wanted)
        for made, wanted in zip(drive(MaskSampler(**options), CONSISTENT, 3, 50), expected, strict=True)
    )
