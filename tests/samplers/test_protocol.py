"""A sampler is whatever has what the protocol names."""

from dataclasses import replace

import pytest
import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler

from multidiff import Blank, Given, MaskSampler
from multidiff.samplers import SamplerOutput, SchedulerSampler, State, as_sampler
from tests.helpers.pipelines import make
from tests.helpers.sampling import drive, network
from tests.helpers.toys import Frames, Grid, generator


class Leftmost:
    """The most probable token, at the first undecided position of each row. It subclasses nothing."""

    is_adaptive = False
    cache_mode = "none"
    num_inference_steps = None
    guidance_scale = 3.0
    canvas = None

    def start(self, sample_RN, levels_RN, coords_RN3, *, num_inference_steps=None, generator, **positions):
        return State.blank(sample_RN, levels_RN, (sample_RN >= 0).sum(1))

    def needs(self, state):
        column_N = torch.arange(state.undecided_RN.shape[1])
        return state.undecided_RN & (column_N == state.undecided_RN.int().argmax(1, keepdim=True))

    def step(self, model_output, timestep, sample_RN, *, where, state, generator):
        p_M, token_M = torch.softmax(model_output.double(), -1).max(-1)
        made_RN, probs_RN = sample_RN.clone(), state.probs_RN.clone()
        made_RN[where], probs_RN[where] = token_M, p_M
        return SamplerOutput(made_RN, replace(state, undecided_RN=state.undecided_RN & ~where, probs_RN=probs_RN))

    def guidance_at(self, scale, step, state):
        return torch.full(state.steps_R.shape, scale if step == 0 else 1.0, dtype=torch.float64)


def test_a_sampler_of_ones_own_runs_to_the_end():
    sampler = as_sampler(Leftmost())
    sample_RN, model = torch.tensor([[3] * 5, [3, 3, -1, -1, -1]]), network(5, 3, 0)

    def padded(row_N):
        return model(row_N.where(row_N >= 0, 3))

    made_RN, state = drive(sampler, sample_RN, None, padded, [generator()] * 2)
    assert not bool(state.undecided_RN.any())
    assert torch.equal(state.current_block_R, torch.full((2,), torch.iinfo(torch.int64).max))
    ours = MaskSampler(order="left_to_right", unmasking="linear", temperature=0.0)
    expected_RN, ours_state = drive(ours, sample_RN, 5, padded, [generator()] * 2)
    assert torch.equal(made_RN, expected_RN)
    torch.testing.assert_close(state.probs_RN, ours_state.probs_RN, equal_nan=True)


def test_the_pipeline_takes_it_and_asks_it_alone():
    tokenizers = {"note": Frames((6,)), "picture": Grid(5, 2, 2)}
    documents = [[Given("picture", [0, 1, 2, 3]), Blank("note", frames=4)], [Given("picture", [0] * 4), Blank("note")]]
    pipe = make(tokenizers, {"note": Leftmost()})
    output = pipe(documents, generator=generator(), trace=True)
    # One code a step, in order; its own scale of 3 guides at the first step, which takes a pass more.
    lengths = [len(trace) for trace in output.trace]
    assert [[decision.step for decision in trace] for trace in output.trace] == [list(range(n)) for n in lengths]
    assert output.nfe == [n + 1 for n in lengths]
    guided = MaskSampler(
        order="left_to_right",
        unmasking="linear",
        temperature=0.0,
        num_inference_steps=max(lengths),
        guidance_scale=3.0,
        guidance_schedule=[0, 1e-6],
    )
    pipe.samplers["note"] = guided
    again = pipe(documents, generator=generator())
    assert [document[1].item for document in again.documents] == [document[1].item for document in output.documents]


def test_what_is_no_sampler_is_told_what_it_lacks():
    class Half:
        is_adaptive = False
        cache_mode = "none"

        def start(self):
            pass

    for wrong, said in (
        (Half(), r"got Half\. It has no num_inference_steps, guidance_scale, canvas, needs, step, guidance_at"),
        (MaskSampler, r"got MaskSampler\. Make an instance"),
        ({}, r"got dict\. It has no is_adaptive"),
    ):
        with pytest.raises(ValueError, match=said):
            as_sampler(wrong)
    sampler = MaskSampler()
    assert as_sampler(sampler) is sampler


def test_what_samplers_say_of_themselves():
    plain = MaskSampler(guidance_scale={"text": 2.0}, num_inference_steps=7, canvas={"frames": 3})
    assert not plain.is_adaptive
    assert (plain.cache_mode, plain.num_inference_steps, plain.canvas) == ("auto", 7, {"frames": 3})
    assert plain.guidance_scale == {"text": 2.0}
    assert MaskSampler(unmasking="threshold", threshold=0.5).is_adaptive
    assert MaskSampler(cache="approximate_dual", block_length=4).cache_mode == "approximate_dual"
    for scheduler, steps in ((AmusedScheduler(9), None), (BlockRefinementScheduler(num_inference_steps=5), 5)):
        wrapped = as_sampler(scheduler)
        assert isinstance(wrapped, SchedulerSampler)
        assert not isinstance(wrapped, MaskSampler)
        assert (wrapped.num_inference_steps, wrapped.guidance_scale, wrapped.canvas) == (steps, 1.0, None)


def test_a_scheduler_takes_no_more_steps_than_a_row_has_codes():
    sample_RN, model = torch.tensor([[3] * 5, [3, 3, -1, -1, -1]]), network(5, 3, 0)

    def padded(row_N):
        return model(row_N.where(row_N >= 0, 3))

    sampler, seen = as_sampler(AmusedScheduler(mask_token_id=9)), []
    made_RN, _ = drive(sampler, sample_RN, 9, padded, [generator(1), generator(2)], seen=seen)
    assert len(seen) == 5
    assert [int(where_RN[1].sum()) for where_RN, _, _ in seen] == [2, 1, 0, 0, 0]
    alone_RN, _ = drive(
        sampler, sample_RN[1:, :2], 9, lambda row_N: model(torch.cat([row_N, torch.full((3,), 3)]))[:2], [generator(2)]
    )
    assert made_RN[1, :2].tolist() == alone_RN[0].tolist()
