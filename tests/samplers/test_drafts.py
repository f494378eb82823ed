"""Going on from a draft: what stands as decided, what may change, and what is refused."""

import pytest
import torch
from diffusers import AmusedScheduler

from multidiff import AncestralSampler, Blank, Draft, Given, MaskSampler
from multidiff.processes import Cosine, Hybrid, Uniform
from multidiff.seeding import generator_for
from tests.helpers.pipelines import make
from tests.helpers.sampling import drive
from tests.helpers.toys import Frames, Grid, generator

EDIT = {"remask": "edit", "editing_threshold": 0.9}


def sure(row_N):
    """A model that is sure of code 1 everywhere."""
    return torch.tensor([[0.02, 0.98]], dtype=torch.float64).log().expand(len(row_N), 2)


def test_a_complete_draft_is_edited_for_as_many_steps_as_asked():
    seen, blank_RN, draft_RN = [], torch.full((2, 4), 2), torch.tensor([[0, 1, 1, 0], [-1, -1, -1, -1]])
    sampler = MaskSampler(unmasking="linear", **EDIT)
    sample_RN, state = drive(sampler, blank_RN, 4, sure, [generator(), generator()], seen=seen, draft_RN=draft_RN)
    assert sample_RN[0].tolist() == [1, 1, 1, 1]
    assert [where_RN[0].tolist() for where_RN, *_ in seen] == [[True] * 4] * 4  # it is read at every step
    assert [int((made_RN[1] != 2).sum()) for _, made_RN, _ in seen] == [1, 2, 3, 4]  # the other row as ever
    assert state.probs_RN[0].isnan().tolist() == [False, True, True, False]  # what stayed was never decided here


def test_a_draft_that_is_begun_keeps_what_it_decides():
    draft_RN = torch.tensor([[0, -1, -1, 0]])
    sample_RN, _ = drive(
        MaskSampler(order="random"), torch.full((1, 4), 2), None, sure, [generator()], draft_RN=draft_RN
    )
    assert sample_RN[0, [0, 3]].tolist() == [0, 0]
    edited_RN, _ = drive(MaskSampler(**EDIT), torch.full((1, 4), 2), None, sure, [generator()], draft_RN=draft_RN)
    assert edited_RN.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("process", [Uniform(Cosine()), Uniform()], ids=str)
def test_the_reverse_process_undoes_the_noise_of_a_draft(process):
    """Drafts are tokens of a known distribution, noised as the process does it, some more, some less. Every step is
    exact for one token. Chi-square with 2 degrees of freedom: above 13.8 once in 1,000 times."""
    count, p_V = 8000, torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64)
    noise_R = torch.tensor([0.3, 0.8], dtype=torch.float64).repeat(count // 2)
    token_R = torch.multinomial(p_V, count, replacement=True, generator=generator(1))
    uniform_R = torch.randint(3, (count,), generator=generator(2))
    draft_R = torch.where(torch.rand(count, generator=generator(3), dtype=torch.float64) < noise_R, uniform_R, token_R)
    sampler = AncestralSampler(process)
    arguments = (torch.full((count, 1), 3), 3, lambda row_N: p_V.log()[None])
    generators = [generator_for(4, row) for row in range(count)]
    seen = []
    sample_RN, state = drive(sampler, *arguments, generators, seen=seen, draft_RN=draft_R[:, None], noise_R=noise_R)
    counts, expected = torch.bincount(sample_RN[:, 0]).double(), p_V * count
    assert float(((counts - expected) ** 2 / expected).sum()) < 13.8
    unchanged = (
        float((sample_RN[:, 0] == draft_R)[::2].double().mean()),
        float((sample_RN[:, 0] == draft_R)[1::2].double().mean()),
    )
    assert unchanged[0] > unchanged[1] + 0.1
    first_R = seen[0][2].noise_R
    assert (first_R < noise_R).all()
    assert (state.noise_R < 1e-12).all()


@pytest.mark.parametrize(
    "sampler",
    [AncestralSampler(Uniform()), MaskSampler(order="random", unmasking="ancestral", remask="cap", eta=0.3)],
    ids=["ancestral", "cap"],
)
def test_a_complete_draft_without_noise_is_refused_where_it_would_stay(sampler):
    draft_RN = torch.tensor([[0, 1, 0, 0]])
    with pytest.raises(ValueError, match="changes nothing of a complete draft without noise"):
        drive(sampler, torch.full((1, 4), 2), 5, sure, [generator()], draft_RN=draft_RN)


def test_an_adaptive_run_of_a_draft_ends_as_if_alone():
    """A row whose codes are all decided is done, even while another one is not."""
    sampler = MaskSampler(unmasking="threshold", threshold=0.99, remask="edit", editing_threshold=0.9)
    blank_RN, draft_RN = torch.full((2, 4), 2), torch.tensor([[0, -1, 0, 0], [-1, -1, -1, -1]])
    seen = []
    together_RN, _ = drive(sampler, blank_RN, None, sure, [generator(), generator(1)], seen=seen, draft_RN=draft_RN)
    alone_RN, _ = drive(sampler, blank_RN[:1], None, sure, [generator()], draft_RN=draft_RN[:1])
    assert torch.equal(together_RN[0], alone_RN[0])
    assert [bool(where_RN[0].any()) for where_RN, *_ in seen] == [True, False, False, False]


@pytest.mark.parametrize("sampler", [MaskSampler(**EDIT), AncestralSampler(Hybrid())], ids=["edit", "ancestral"])
def test_models_see_the_noise_that_is_presumed(sampler):
    noises = []

    class Spy(type(sampler)):
        def step(self, *arguments, state, **more):
            noises.append(float(state.noise_R[0]))
            return super().step(*arguments, state=state, **more)

    sampler.__class__ = Spy
    draft_RN, noise_R = torch.tensor([[0, 1, 0, 0]]), torch.tensor([0.3], dtype=torch.float64)
    drive(sampler, torch.full((1, 4), 2), 3, sure, [generator()], draft_RN=draft_RN, noise_R=noise_R)
    steady = isinstance(sampler, MaskSampler)  # editing has no time of its own
    assert noises == pytest.approx([0.3, 0.3, 0.3] if steady else [0.3, 0.2, 0.1], abs=1e-3)


TOKENIZERS = {"picture": Grid(5, 2, 3), "speech": Frames((4, 3))}


def codes_of(pipe, name, item):
    return pipe.tokenizers[name].encode([item])[0]


def test_the_pipeline_goes_on_from_a_draft():
    pipe = make(
        TOKENIZERS,
        {name: MaskSampler(num_inference_steps=6, remask="edit", editing_threshold=0.3) for name in TOKENIZERS},
    )
    item = [1, 0, 2, 1, 3, 2, 0, 0]  # 4 frames of 2 levels
    codes = codes_of(pipe, "speech", item)
    decided_N = torch.tensor([True, True, False, False, True, True, True, True])
    document = [Given("picture", [0, 1, 2, 3, 4, 0]), Draft("speech", codes, decided_N)]
    output = pipe([document], generator=generator(), trace=True)
    (filled,) = output.documents[0][1:]
    made = filled.codes.ids_N.tolist()
    assert len(made) == 8  # a draft ends where it ends
    changed = {decision.place for decision in output.trace[0]}
    assert {2, 3} <= changed
    assert all(made[place] == item[place] for place in range(8) if place not in changed)
    assert filled.probs_N.isnan().tolist() == [place not in changed for place in range(8)]
    assert len(changed) > 2  # the random model doubts something
    alone = pipe([document], generator=[generator()]).documents[0][1].codes.ids_N
    beside = pipe(
        [document, [Blank("picture"), Draft("speech", codes, noise=0.5)]], generator=[generator(), generator(1)]
    )
    assert torch.equal(alone, beside.documents[0][1].codes.ids_N)


def test_what_cannot_go_on_from_a_draft_says_so():
    pipe = make(TOKENIZERS)
    codes = codes_of(pipe, "picture", [0, 1, 2, 3, 4, 0])

    def refused(message, sampler=None, draft=None):
        if sampler is not None:
            pipe.samplers["picture"] = sampler
        with pytest.raises(ValueError, match=message):
            pipe([[draft or Draft("picture", codes)]])

    refused("remask 'none' changes nothing of a draft that is complete")
    refused("remask 'conf' does not go with a draft", MaskSampler(order="random", unmasking="ancestral", remask="conf"))
    refused(
        "unmasking 'threshold' stops once all is decided", MaskSampler(unmasking="threshold", threshold=0.9, **EDIT)
    )
    refused("goes on from no Draft. Use a MaskSampler", AmusedScheduler(mask_token_id=0))
    refused(
        "decided_N must be bool, one for each of 6 codes",
        draft=Draft("picture", codes, torch.ones(5, dtype=torch.bool)),
    )
    refused("noise 1.5 must be a number from 0 to 1", draft=Draft("picture", codes, noise=1.5))
    ordered = make(TOKENIZERS, attention="causal")
    with pytest.raises(ValueError, match=r"revises nothing, so it takes no Draft of 'picture'"):
        ordered([[Draft("picture", codes, torch.tensor([True] * 5 + [False]))]])
