"""Tokens and lengths that a user rules out or demands."""

import pytest
import torch

from multidiff.samplers import MaskSampler
from tests.helpers.sampling import drive, run
from tests.helpers.toys import generator


def test_forbidden_forced_and_repeated_codes():
    logits_NV = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64).expand(5, 4)
    blank_RN = torch.full((1, 5), 4)

    def made(**options):
        sampler = MaskSampler(unmasking="linear", temperature=0.0, **options)
        return run(sampler, blank_RN, 5, lambda row_N: logits_NV, [generator()])[0].tolist()

    assert made() == [0] * 5
    assert made(suppress_tokens=[0, 2]) == [1] * 5
    assert made(forced_tokens={1: 3, 4: 2}) == [0, 3, 0, 0, 2]
    assert made(forced_tokens={"1": 3}) == [0, 3, 0, 0, 0]  # as JSON has it
    # log p of code 0 is -0.44, of code 1 -1.44: it takes a factor of more than 3.3 to choose another one.
    assert made(repetition_penalty=3.0) == [0] * 5
    assert sorted(made(repetition_penalty=3.5)) == [0, 0, 0, 0, 1]
    for options, message in (
        ({"suppress_tokens": [4]}, "suppress_tokens: no code is called 4; there are 0 to 3"),
        ({"suppress_tokens": [0, 1, 2, 3]}, "suppress_tokens leaves none of the 4 codes"),
        (
            {"suppress_tokens": [1], "forced_tokens": {0: 1}},
            "forced_tokens wants code 1 at place 0, which suppress_tokens rules out",
        ),
        ({"min_length": 2}, "min_length 2 needs codes whose length varies"),
        ({"forced_tokens": {5: 1}}, "forced_tokens: place 5 is none of the 5 codes to fill in"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**options)


@pytest.mark.parametrize(("least", "most", "ends_at"), [(None, None, 0), (3, None, 3), (None, 2, 2), (4, 4, 4)])
def test_lengths(least, most, ends_at):
    """A model that would end at once, or never."""
    logits_NV = torch.zeros(6, 4, dtype=torch.float64)
    logits_NV[:, 3] = 5.0 if most is None or least is not None else -5.0
    sampler = MaskSampler(unmasking="linear", temperature=0.0, min_length=least, max_length=most)
    sample_RN = torch.full((1, 6), 4)
    eos_RN = torch.full_like(sample_RN, 3)
    final_RN, _ = drive(sampler, sample_RN, 1, lambda row_N: logits_NV, [generator()], eos_RN=eos_RN)
    assert int((final_RN[0] == 3).nonzero()[0]) == ends_at


def test_restrictions_that_leave_nothing_are_named():
    sample_RN, logits_NV = torch.full((1, 4), 4), torch.zeros(4, 4)
    eos_RN = torch.full_like(sample_RN, 3)
    for options, temperature, said in (
        ({"max_length": 1, "suppress_tokens": [3]}, 1.0, r"suppress_tokens \[3\], max_length 1"),
        ({"forced_tokens": {0: 3}, "min_length": 1}, 0.0, "forced_tokens {0: 3}, min_length 1"),
    ):
        sampler = MaskSampler(unmasking="linear", temperature=temperature, **options)
        with pytest.raises(ValueError, match=rf"nothing is left to draw at a position: change {said}"):
            drive(sampler, sample_RN, 1, lambda row_N: logits_NV, [generator()], eos_RN=eos_RN)


def test_a_penalty_is_for_content_of_the_same_level():
    """EOS behind the content repeats nothing, and code 0 of level 1 is another than that of level 0."""
    logits_NV = torch.tensor([0.5, 0.0, -9.0, 1.0], dtype=torch.float64).expand(4, 4)
    sample_RN, levels_RN = torch.full((1, 4), 4), torch.tensor([[0, 0, 1, 1]])
    sampler = MaskSampler(order="left_to_right", unmasking="linear", temperature=0.0, repetition_penalty=5.0)
    for eos, expected in ((3, [3, 3, 3, 3]), (-1, [3, 0, 3, 0])):
        more = {"levels_RN": levels_RN, "eos_RN": torch.full_like(sample_RN, eos)}
        made_RN, _ = drive(sampler, sample_RN, 4, lambda row_N: logits_NV, [generator()], **more)
        assert made_RN[0].tolist() == expected
