"""`scripts/benchmark.py variance`: what its variants draw, and how variance is estimated."""

import importlib.util

import pytest
import torch

from tests.helpers.denoisers import SEQUENCER, segments
from tests.helpers.paths import ROOT
from tests.helpers.toys import generator


@pytest.fixture(scope="module")
def variance():
    spec = importlib.util.spec_from_file_location("variance", ROOT / "scripts" / "benchmarks" / "variance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_complementary_copies_mask_every_code_once(variance):
    documents = [segments(frames, pictures) for frames, pictures in ((3, 1), (3, 1), (1, 2), (1, 2))]
    batch = SEQUENCER.batch(documents)
    shares = []
    for step in range(50):
        t_S, masked_P = variance._noise(batch, "complementary", step)
        masked, code = (values_P.split(batch.document_starts.diff().tolist()) for values_P in (masked_P, batch.span_P))
        for first in (0, 2):
            assert torch.equal(masked[first] ^ masked[first + 1], code[first] >= 0)
        t_of = t_S.split([2, 2, 3, 3])
        assert torch.allclose(t_of[0] + t_of[1], torch.ones(2, dtype=torch.float64), atol=2e-3)
        shares.append(float(masked_P.sum() / (batch.span_P >= 0).sum()))
    assert shares == [0.5] * 50


@pytest.mark.parametrize("times", ["independent", "stratified"])
def test_a_code_is_masked_with_the_probability_of_its_time(variance, times):
    batch = SEQUENCER.batch([segments(40, 0)] * 8)
    t, share = [], []
    for step in range(20):
        t_S, masked_P = variance._noise(batch, times, step)
        t.append(t_S)
        share.append(torch.stack([masked_P[batch.segment_P == segment].double().mean() for segment in range(8)]))
    t, share = torch.cat(t), torch.cat(share)
    assert float((t.mean() - 0.5).abs()) < 0.1
    # 82 codes each: a standard deviation of 0.055 at most, 160 times.
    assert float((share - t).abs().max()) < 5 * 0.055
    assert float((share - t).mean().abs()) < 4 * 0.055 / 160**0.5


def test_variance_is_that_of_all_weights_and_has_two_parts(variance):
    """In each of 50 dimensions variance 3 of documents, which two steps share, and 1 of times and masks."""
    draw = generator()
    shared_KW = 3**0.5 * torch.randn(2000, 50, generator=draw)
    gradient_RW = 7 + shared_KW.repeat_interleave(2, 0) + torch.randn(4000, 50, generator=draw)
    (both, both_error), (part, part_error) = variance._variances(gradient_RW)
    assert abs(both - 200) < 4 * both_error
    assert abs(part - 50) < 4 * part_error
    assert both_error < 2
    assert part_error < 0.5
