"""Wrong codes are planted as documented, and what a sampler makes of them is counted."""

import math

import pytest
import torch

from multidiff import Given, MaskSampler
from multidiff.evaluation import Share, measure_correction
from multidiff.samplers import SamplerOutput, State
from tests.helpers.pipelines import make
from tests.helpers.toys import Frames, Grid

TOKENIZERS = {"picture": Grid(5, 2, 5), "speech": Frames((4, 3))}


class Writer:
    """Writes one code everywhere in a single step, or changes nothing but what is masked if that is None."""

    is_adaptive = False
    cache_mode = "none"
    num_inference_steps = 1
    guidance_scale = 1.0
    canvas = None

    def __init__(self, code):
        self.code, self.drafts, self.noises = code, [], []

    def start(self, sample_RN, levels_RN, coords_RN3, *, draft_RN=None, noise_R=None, generator, **positions):
        self.drafts += draft_RN.tolist()
        self.noises += noise_R.tolist()
        return State.blank(sample_RN, levels_RN, torch.ones(len(sample_RN), dtype=torch.int64), draft_RN=draft_RN)

    def needs(self, state):
        return state.block_RN >= 0

    def step(self, model_output, timestep, sample_RN, *, where, state, generator):
        made_RN = sample_RN.where(sample_RN != state.mask_token_id, 0)
        if self.code is not None:
            made_RN = torch.full_like(made_RN, self.code).where(where, made_RN)
        return SamplerOutput(made_RN, state)

    def guidance_at(self, scale, step, state):
        return torch.ones(state.steps_R.shape, dtype=torch.float64)


def measured(code, item, number=4, **options):
    writer = Writer(code)
    pipe = make(TOKENIZERS, {"picture": writer})
    documents = [[Given("speech", [0, 1]), Given("picture", item)]] * number
    return measure_correction(pipe, documents, "picture", batch_size=3, **options), writer


def test_codes_are_planted_as_documented():
    _, writer = measured(None, [2] * 10, number=200, wrong=0.3, noise=0.4)
    wrong = [sorted(code for code in draft if code != 2) for draft in writer.drafts]
    assert {len(codes) for codes in wrong} == {3}
    assert {code for codes in wrong for code in codes} == {0, 1, 3, 4}
    counts = torch.tensor([code for codes in wrong for code in codes]).bincount(minlength=5)[[0, 1, 3, 4]].double()
    assert float(((counts - 150) ** 2 / 150).sum()) < 16.3  # chi-square, 3 degrees of freedom, once in 1,000 times
    assert set(writer.noises) == {0.4}
    places = {tuple(code == 2 for code in draft) for draft in writer.drafts}
    assert len(places) > 60
    _, again = measured(None, [2] * 10, number=5, wrong=0.3)
    assert again.drafts == writer.drafts[:5]  # whatever comes after
    _, begun = measured(None, [2] * 10, decided=0.5, wrong=0.2)
    assert {sum(code >= 0 for code in draft) for draft in begun.drafts} == {5}
    assert {sum(code >= 0 and code != 2 for code in draft) for draft in begun.drafts} == {1}


@pytest.mark.parametrize(
    ("code", "item", "repaired", "changed", "spoiled"),
    [(None, 2, 0, 0, 0), (2, 2, 1, 1, 0), (1, 2, 0, None, 1)],
    ids=["nothing", "all right", "all wrong"],
)
def test_what_becomes_of_them_is_counted(code, item, repaired, changed, spoiled):
    found, writer = measured(code, [item] * 10, wrong=0.2)
    assert (found.repaired.count, found.repaired.of) == (repaired * 8, 8)
    assert (found.spoiled.count, found.spoiled.of) == (spoiled * 32, 32)
    stayed = sum(sum(one not in (item, code) for one in draft) for draft in writer.drafts)
    assert found.changed.count == (stayed if changed is None else changed * 8)
    assert found.nfe == 1


def test_an_error_over_documents():
    counts, sizes = [3, 1, 0, 2], [4, 4, 4, 4]
    share = Share.over(counts, sizes)
    values = torch.tensor(counts).double() / 4
    assert share.value == pytest.approx(float(values.mean()))
    assert share.standard_error == pytest.approx(float(values.std(correction=0)) / math.sqrt(4))
    assert str(Share.over([0, 0], [0, 0])) == "none"


def test_bad_values_are_refused():
    pipe = make(TOKENIZERS, {"picture": MaskSampler(remask="edit", editing_threshold=0.9)})
    documents = [[Given("picture", [0] * 10)]]
    for options, message in (
        ({"wrong": 0.0}, "wrong must be a share above 0 and at most 1, not 0.0"),
        ({"decided": 1.5}, "decided must be a share above 0 and at most 1, not 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_correction(pipe, documents, "picture", **options)
    with pytest.raises(ValueError, match="Document 0 has no segment of 'speech'"):
        measure_correction(pipe, documents, "speech")
    with pytest.raises(ValueError, match="no documents"):
        measure_correction(pipe, [], "picture")
    with pytest.raises(ValueError, match="'sound'"):
        measure_correction(pipe, documents, "sound")
