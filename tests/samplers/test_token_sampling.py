"""Token draws follow the distribution, truncated as defined."""

import math

import pytest
import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler
from scipy.stats import chisquare

from multidiff.samplers import MaskSampler, as_sampler, token_sampling
from multidiff.samplers.token_sampling import sample_tokens
from tests.helpers.sampling import run
from tests.helpers.toys import generator


def test_draws_follow_the_distribution_in_fp64():
    p_V = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
    uniform_M = torch.rand(20_000, generator=generator(), dtype=torch.float64)
    uniform_M[:3] = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    candidates = sample_tokens(p_V.log().expand(20_000, 4), uniform_M, temperature=1.0, top_p=1.0)
    assert candidates.token_M[:3].tolist() == [0, 2, 3]
    counts = torch.bincount(candidates.token_M, minlength=4)
    assert counts[1] == 0
    assert chisquare(counts[[0, 2, 3]].numpy(), [10_000, 6_000, 4_000]).pvalue > 1e-3
    torch.testing.assert_close(candidates.log_probs_M, p_V.log()[candidates.token_M])
    cut = sample_tokens(p_V.log().expand(20_000, 4), uniform_M, temperature=1.0, top_p=0.6)
    assert set(cut.token_M.tolist()) == {0, 2}
    cold = sample_tokens(p_V.log().expand(20_000, 4), uniform_M, temperature=0.5, top_p=1.0)
    squared = p_V**2 / (p_V**2).sum() * 20_000
    counts = torch.bincount(cold.token_M, minlength=4)
    assert chisquare(counts[[0, 2, 3]].numpy(), squared[[0, 2, 3]].numpy()).pvalue > 1e-3


def test_truncations():
    p_V = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    uniform_M = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def drawn(**truncation):
        tokens = sample_tokens(p_V.log().expand(1000, 5), uniform_M, **truncation).token_M
        return (torch.bincount(tokens, minlength=5) / 1000).tolist()

    assert drawn() == pytest.approx(p_V.tolist(), abs=2e-3)
    assert drawn(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0], abs=2e-3)
    assert drawn(top_p=0.71) == pytest.approx([0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0], abs=2e-3)
    # Entropy 1.39 nats; surprises .92, 1.20, 1.90, 2.30, 3.00: nearest are 1.20, .92, 1.90.
    assert drawn(typical_p=0.2) == pytest.approx([0, 1, 0, 0, 0], abs=2e-3)
    assert drawn(typical_p=0.65) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0], abs=2e-3)
    assert drawn(top_k=2, top_p=0.5) == pytest.approx([1, 0, 0, 0, 0], abs=2e-3)


def test_gumbel_draws_follow_the_distribution():
    p_V = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
    uniform_MV = torch.rand(20_000, 4, generator=generator(), dtype=torch.float64)
    for temperature in (1.0, 0.5):
        tokens = sample_tokens(p_V.log().expand(20_000, 4), uniform_MV, temperature=temperature).token_M
        counts = torch.bincount(tokens, minlength=4)
        expected = p_V ** (1 / temperature) / (p_V ** (1 / temperature)).sum() * 20_000
        assert counts[1] == 0
        assert chisquare(counts[[0, 2, 3]].numpy(), expected[[0, 2, 3]].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("options", [{}, {"draw": "gumbel"}, {"temperature": 0.0}, {"top_p": 0.9}, {"order": "margin"}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_named(options, bad):
    logits_NV = torch.zeros(3, 4, dtype=torch.float64)
    logits_NV[1, 2] = bad
    with pytest.raises(ValueError, match="logits hold NaN or Inf: check its weights"):
        run(MaskSampler(**options), torch.full((1, 3), 4), 1, lambda row_N: logits_NV, [generator()])


@pytest.mark.parametrize("scheduler", [AmusedScheduler(mask_token_id=4), BlockRefinementScheduler()])
def test_schedulers_get_no_such_logits(scheduler):
    logits_NV = torch.full((3, 4), math.nan)
    with pytest.raises(ValueError, match="logits hold NaN or Inf"):
        run(as_sampler(scheduler), torch.full((1, 3), 4), 1, lambda row_N: logits_NV, [generator()])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"order": "margin", "top_k": 3},
        {"order": "entropy"},
        {"draw": "gumbel"},
        {"temperature": 0.0, "remask": "edit", "editing_threshold": 0.3},
    ],
)
def test_many_logits_are_sampled_in_parts(settings, monkeypatch):
    logits_NV = torch.randn(12, 5, generator=generator(1), dtype=torch.float64)
    sizes, whole = [], token_sampling.sample_tokens

    def sized(logits_MV, *arguments):
        sizes.append(len(logits_MV))
        return whole(logits_MV, *arguments)

    def sample():
        return run(
            MaskSampler(**settings), torch.full((2, 12), 5), 4, lambda row_N: logits_NV, [generator(2), generator(3)]
        )

    monkeypatch.setattr(token_sampling, "sample_tokens", sized)
    expected = sample()
    assert max(sizes) > 4
    sizes.clear()
    monkeypatch.setattr(token_sampling, "_TOGETHER", 20)
    assert torch.equal(sample(), expected)
    assert max(sizes) == 4
