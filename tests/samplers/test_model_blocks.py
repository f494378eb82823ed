"""Blocks of a model's attention: they are finished in order, and an EOS ends the work."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multidiff.samplers import MaskSampler
from tests.helpers.sampling import drive, network
from tests.helpers.toys import generator

EOS, MASKED = 3, 4


def start(sizes, sampler=None, steps=None, **more):
    """The table of one row, and its state before the first step."""
    block_1N = torch.repeat_interleave(torch.tensor(sizes))[None] * 2 + 5  # as in a document, numbers may be any
    sample_1N = torch.full_like(block_1N, MASKED)
    coords_1N3 = torch.arange(len(block_1N[0]))[None, :, None].expand(-1, -1, 3)
    levels_1N = torch.zeros_like(sample_1N)
    arguments = {"block_RN": block_1N, "num_inference_steps": steps, "generator": [generator()], **more}
    return sample_1N, block_1N, (sampler or MaskSampler()).start(sample_1N, levels_1N, coords_1N3, **arguments)


@pytest.mark.parametrize(
    ("sizes", "settings_", "steps", "expected"),
    [
        ([4, 40, 1], {}, None, 4 + 16 + 1),
        ([1] * 30, {}, None, 30),
        ([4, 40, 1], {"num_inference_steps": 9}, None, 9),
        ([4, 40, 1], {"num_inference_steps": 9}, 12, 12),
        ([4, 4], {}, 100, 8),
        ([4, 40, 1], {"unmasking": "threshold", "threshold": 0.9}, None, 45),
    ],
)
def test_every_block_has_sixteen_steps_where_nothing_says(sizes, settings_, steps, expected):
    assert start(sizes, MaskSampler(**settings_), steps)[2].steps == expected


def test_fewer_steps_than_blocks_are_refused():
    with pytest.raises(ValueError, match="num_inference_steps 2 is less than the 3 blocks of the model's attention"):
        start([2, 2, 2], steps=2)


SETTINGS = [{}, {"order": "random", "unmasking": "linear"}, {"unmasking": "threshold", "threshold": 0.4}]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from(SETTINGS), st.integers(0, 99), st.booleans()
)
def test_blocks_are_finished_in_order_and_an_eos_ends_the_work(sizes, options, seed, varies):
    length, seen = sum(sizes), []
    sample_1N, block_1N, _ = start(sizes)
    eos = {"eos_RN": torch.full_like(sample_1N, EOS)} if varies else {}
    made_1N, state = drive(
        MaskSampler(**options),
        sample_1N,
        None,
        network(length, MASKED, seed),
        [generator(seed)],
        seen=seen,
        block_RN=block_1N,
        **eos,
    )
    assert bool(((made_1N >= 0) & (made_1N < MASKED)).all())
    assert not state.undecided_RN.any()
    before_1N, ended = sample_1N, False
    for where_1N, after_1N, _ in seen:
        open_1N = before_1N == MASKED
        asked = block_1N[where_1N].unique().tolist()
        assert not asked or asked == [int(block_1N[open_1N].min())]
        changed_1N = before_1N != after_1N
        here_1N = block_1N == (asked[0] if asked else -1)
        assert bool((changed_1N & here_1N <= where_1N).all())
        ended = varies and bool((after_1N[here_1N] == EOS).any())
        beyond_1N = changed_1N & ~here_1N
        # All of later blocks at once, as soon as an EOS is decided.
        assert torch.equal(beyond_1N, open_1N & (block_1N > asked[0]) & ended if asked else beyond_1N & False)
        assert bool((after_1N[beyond_1N] == EOS).all())
        before_1N = after_1N


def test_a_frame_that_is_content_stays_content_behind_an_eos():
    """Two frames of two levels, in blocks of three codes. The second frame is content at its first level when the first
    frame turns out to be EOS: its other level, in the next block, is still drawn, and is no EOS."""
    sampler = MaskSampler(forced_tokens={2: 1}, order="confidence", unmasking="linear")
    levels_1N = torch.tensor([[0, 1, 0, 1, 0, 1]])
    frame_1N = torch.tensor([[0, 0, 1, 1, 2, 2]])
    block_1N = torch.tensor([[0, 0, 0, 1, 1, 1]])
    sample_1N = torch.full_like(block_1N, MASKED)

    def model(row_N):
        logits_NV = torch.zeros(6, MASKED, dtype=torch.float64)
        logits_NV[:, EOS] = 20.0
        return logits_NV

    made_1N, _ = drive(
        sampler,
        sample_1N,
        None,
        model,
        [generator()],
        levels_RN=levels_1N,
        eos_RN=torch.full_like(sample_1N, EOS),
        frame_RN=frame_1N,
        block_RN=block_1N,
    )
    assert made_1N[0, :2].tolist() == [EOS, EOS]
    assert int(made_1N[0, 2]) == 1
    assert int(made_1N[0, 3]) != EOS
    assert made_1N[0, 4:].tolist() == [EOS, EOS]
