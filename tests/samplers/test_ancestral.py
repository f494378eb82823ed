"""The ancestral sampler: what it starts from, what it ends in, and the distribution of a model that knows."""

import math

import pytest
import torch

from multidiff import AncestralSampler, Blank, Given, MaskSampler
from multidiff.processes import Absorbing, Cosine, Hybrid, Uniform
from multidiff.seeding import generator_for
from tests.helpers.pipelines import make
from tests.helpers.sampling import drive, network
from tests.helpers.toys import Frames, Grid, generator

PROCESSES = [Absorbing(Cosine()), Uniform(Cosine()), Hybrid(Cosine())]
JOINT = torch.tensor([[0.30, 0.02, 0.08], [0.05, 0.25, 0.01], [0.04, 0.05, 0.20]], dtype=torch.float64)


def belief(process, noise, other_M, axis):
    """log p(x_i | z_j) [M, 3] where a share of `noise` is noised: x_i is the code of `axis`, z_j the other."""
    t = process.schedule.inverse(torch.tensor(1 - noise, dtype=torch.float64))
    clean, uniform, mask = (float(share) for share in process.shares(t))
    kernel_VX = torch.full((3, 4), uniform / 3, dtype=torch.float64)
    kernel_VX[range(3), range(3)] += clean
    kernel_VX[:, 3] = mask
    table = (kernel_VX.T @ (JOINT.T if axis == 0 else JOINT)).clamp_min(1e-300)
    return (table / table.sum(1, keepdim=True)).log()[other_M]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_a_model_that_knows_gives_the_distribution(process):
    """Two codes in 128 steps of one code each would be exact; here both are drawn at once. Chi-square with 8 degrees of
    freedom: above 26.1 once in 1,000 times."""
    count = 6000
    sampler = AncestralSampler(process, num_inference_steps=128)
    sample_RN, levels_RN = torch.full((count, 2), 3), torch.zeros(count, 2, dtype=torch.int64)
    generators = [generator_for(5, row) for row in range(count)]
    state = sampler.start(sample_RN, levels_RN, torch.zeros(count, 2, 3, dtype=torch.int64), generator=generators)
    sample_RN = state.start_RN
    noises = []
    for timestep in range(state.steps - 1, -1, -1):
        where_RN = sampler.needs(state)
        assert where_RN.all()
        assert len(set(state.noise_R.tolist())) == 1
        noises.append(float(state.noise_R[0]))
        logits_RNV = torch.stack([belief(process, noises[-1], sample_RN[:, 1 - i], i) for i in (0, 1)], 1)
        output = sampler.step(
            logits_RNV[where_RN], timestep, sample_RN, where=where_RN, state=state, generator=generators
        )
        sample_RN, state = output.prev_sample, output.state
    assert noises == sorted(noises, reverse=True)
    assert float(state.noise_R[0]) == pytest.approx(0.0, abs=1e-12)
    assert not state.undecided_RN.any()
    assert ((state.probs_RN > 0) & (state.probs_RN <= 1)).all()
    counts = torch.bincount(sample_RN[:, 0] * 3 + sample_RN[:, 1], minlength=9).double()
    assert len(counts) == 9
    expected = JOINT.flatten() * count
    assert float(((counts - expected) ** 2 / expected).sum()) < 26.1


def test_uniform_noise_starts_from_tokens_of_each_span():
    """Chi-square with 4 and 1 degrees of freedom: above 18.5 and 10.8 once in 1,000 times."""
    count = 2000
    sizes_RN = torch.tensor([[5, 2]]).expand(count, 2)
    arguments = (torch.full((count, 2), 5), torch.zeros(count, 2, dtype=torch.int64), torch.zeros(count, 2, 3).long())
    generators = [generator_for(1, row) for row in range(count)]
    start_RN = AncestralSampler(Uniform()).start(*arguments, sizes_RN=sizes_RN, generator=generators).start_RN
    for column, (size, limit) in enumerate(((5, 18.5), (2, 10.8))):
        counts = torch.bincount(start_RN[:, column]).double()
        assert len(counts) == size
        assert float(((counts - count / size) ** 2 / (count / size)).sum()) < limit
    for process in (Absorbing(), Hybrid()):
        state = AncestralSampler(process).start(*arguments, sizes_RN=sizes_RN, generator=generators)
        assert torch.equal(state.start_RN, torch.full((count, 2), 5))


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_a_row_gets_the_same_alone_and_beside_others(process):
    sample_RN, model = torch.tensor([[3] * 5, [3, 3, 3, -1, -1], [3] * 5]), network(5, 3, 0)

    def padded(row_N):
        return model(row_N.where(row_N >= 0, 3))

    sampler = AncestralSampler(process, num_inference_steps=6)
    together, _ = drive(sampler, sample_RN, None, padded, [generator(row) for row in range(3)])
    assert torch.equal(together < 0, sample_RN < 0)
    assert int(together.max()) < 3
    for row in range(3):
        alone, _ = drive(sampler, sample_RN[row : row + 1], None, padded, [generator(row)])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_tokens_may_change_until_the_end_where_noise_is_not_masks(process):
    """A model that wants one token at first and another one at the end."""
    seen = []

    def model(row_N):
        wanted = 0 if len(seen) < 20 else 1
        return torch.full((8, 2), -30.0, dtype=torch.float64).index_fill(1, torch.tensor([wanted]), 0.0)

    sampler = AncestralSampler(process, num_inference_steps=40)
    made_RN, _ = drive(sampler, torch.full((1, 8), 2), None, model, [generator()], seen=seen)
    if isinstance(process, Absorbing):
        halfway_RN = seen[19][1]
        assert torch.equal(made_RN[halfway_RN == 0], halfway_RN[halfway_RN == 0])
        assert (made_RN == 0).any()
    else:
        assert (seen[19][1] == 0).any()
    if isinstance(process, Uniform):
        assert (made_RN == 1).all()


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_temperature_zero_takes_the_most_probable_token(process):
    """Also where what is most probable changes from step to step, and tokens that are set cannot follow."""
    logits_NV = torch.tensor([[0.0, 1.0, 0.5]] * 16, dtype=torch.float64)
    sampler = AncestralSampler(process, num_inference_steps=5, temperature=0.0)
    made_RN, state = drive(sampler, torch.full((1, 16), 3), None, lambda row_N: logits_NV, [generator()])
    assert made_RN.tolist() == [[1] * 16]
    assert torch.allclose(state.probs_RN, torch.softmax(logits_NV[0], 0)[1])  # before temperature
    made_RN, state = drive(sampler, torch.full((1, 16), 3), None, network(16, 3, 1), [generator()])
    assert int(made_RN.max()) < 3
    assert state.probs_RN.isfinite().all()


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_what_a_frame_holds_is_all_eos_or_all_content(process, temperature):
    """Two levels of other sizes, whose EOS have other ids."""
    tokenizers = {"note": Frames((3, 2)), "picture": Grid(5, 2, 2)}
    sampler = AncestralSampler(process, 6, temperature)
    pipe = make(tokenizers, {"note": sampler}, processes={"note": process})
    output = pipe(
        [[Given("picture", [row % 5, 1, 2, row % 3]), Blank("note", frames=6)] for row in range(60)],
        generator=[generator_for(row) for row in range(60)],
        trace=True,
    )
    for document in output.documents:
        codes = document[1].codes
        assert len(codes) % 2 == 0
        assert (codes.ids_N < torch.tensor([3, 2])[codes.levels_N]).all()
        assert ((document[1].probs_N > 0) & (document[1].probs_N <= 1)).all()
    assert max(output.nfe) == 6
    if temperature == 1:
        assert len({len(document[1].codes) for document in output.documents}) > 2


def test_the_time_changes_what_a_model_with_time_input_says():
    """With other noise left, the same tokens get other logits, so no pass is saved."""
    tokenizers = {"picture": Grid(5, 2, 2)}
    pipe = make(tokenizers, processes={"picture": Uniform()}, time_input=True)
    output = pipe([[Blank("picture")]], num_inference_steps=9, generator=generator())
    assert output.nfe == [9]


def test_samplers_that_unmask_do_not_fit_uniform_noise():
    tokenizers = {"picture": Grid(5, 2, 2)}
    with pytest.raises(
        ValueError, match=r"sampler of 'picture' decides masked codes, but its process Uniform masks none"
    ):
        make(tokenizers, {"picture": MaskSampler()}, processes={"picture": Uniform()})
    pipe = make(tokenizers, processes={"picture": Hybrid()})
    assert isinstance(pipe.samplers["picture"], MaskSampler)
    pipe.samplers["picture"] = AncestralSampler(Hybrid())
    with pytest.raises(ValueError, match=r"sampler of 'picture' follows Uniform.* was trained with Hybrid"):
        pipe.samplers["picture"] = AncestralSampler(Uniform())
    with pytest.raises(ValueError, match="no tokenizer is called 'pictures'"):
        make(tokenizers, processes={"pictures": Hybrid()})
    absorbing = make(tokenizers)
    absorbing.samplers["picture"] = AncestralSampler(Absorbing(Cosine()))  # any schedule samples from absorbing noise


@pytest.mark.parametrize(("settings", "message"), [
    ({"num_inference_steps": 0}, "num_inference_steps 0 must be a whole number"),
    ({"temperature": -1}, "temperature -1 must be at least 0"),
    ({"temperature": 1e-9}, "temperature 1e-09 must be 0, which is greedy, or at least"),
    ({"temperature": math.nan}, "temperature nan must be a number"),
    ({"guidance_schedule": "sometimes"}, "guidance_schedule 'sometimes' must be"),
    ({"canvas": {"frames": "many"}}, "canvas .* must be a table of whole numbers"),
    ({"order": "random"}, "no sampler setting is called 'order'"),
    ({"temp": 1.0}, "did you mean 'temperature'"),
])  # fmt: skip
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=rf"samplers\.json, note: .*{message}"):
        AncestralSampler.from_settings(settings, Uniform(), "samplers.json, note")
