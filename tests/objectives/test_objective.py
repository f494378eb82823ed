"""The objective's settings."""

import math

import pytest
import torch

from multidiff.objectives import Objective
from multidiff.processes import Absorbing, Cosine, Hybrid, LogLinear, Polynomial
from multidiff.sequence import SharedVocabulary
from tests.helpers.toys import Frames, Grid


def test_weights_of_tokenizers():
    vocabulary = SharedVocabulary.of({"a": Grid(2, 1, 8), "v": Frames((3, 3))})
    weights = Objective(loss_weights={"v": 3.0}).token_weights(vocabulary)
    assert weights.tolist() == [1.0, 3.0]
    assert weights.dtype == torch.float64


def test_weights_of_the_bound():
    vocabulary = SharedVocabulary.of({"a": Grid(2, 1, 8), "v": Frames((3, 3))})
    bound_S, tokenizer_S = torch.tensor([0.5, 8.0, 8.0, 100.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1])

    def weights(weighting):
        limit = 2.0 if "clipped" in str(weighting) or weighting == "softmin" else None
        return Objective(weighting=weighting, weight_limit=limit).weights(bound_S, tokenizer_S, vocabulary).tolist()

    assert weights("elbo") == [0.5, 8.0, 8.0, 100.0]
    assert weights("uniform") == [1.0] * 4
    assert weights("clipped") == [0.5, 2.0, 2.0, 2.0]
    assert weights("softmin") == pytest.approx([1 / (1 / 0.5 + 1 / 2), 1.6, 1.6, 1 / (1 / 100 + 1 / 2)])
    assert weights({"v": "uniform"}) == [0.5, 8.0, 1.0, 1.0]
    assert weights({"v": "clipped", "a": "uniform"}) == [1.0, 1.0, 2.0, 2.0]


def test_processes_of_tokenizers():
    objective = Objective(process=Absorbing(Cosine()), processes={"v": Absorbing(Polynomial())})
    assert objective.process_of("v") == Absorbing(Polynomial())
    assert objective.process_of("a") == Absorbing(Cosine())


@pytest.mark.parametrize("settings", [
    {"loss_weights": {"w": 1.0}}, {"processes": {"w": Absorbing()}}, {"weighting": {"w": "elbo"}},
])  # fmt: skip
def test_tokenizers_must_exist(settings):
    vocabulary = SharedVocabulary.of({"a": Grid(2, 1, 8)})
    with pytest.raises(ValueError, match="w"):
        Objective(**settings).check(vocabulary)
    Objective(loss_weights={"a": 1.0}, processes={"a": Absorbing()}, weighting={"a": "uniform"}).check(vocabulary)


def test_label_smoothing_is_of_cross_entropies():
    vocabulary = SharedVocabulary.of({"a": Grid(2, 1, 8), "v": Frames((3, 3))})
    Objective(label_smoothing=0.1).check(vocabulary)
    with pytest.raises(ValueError, match=r"label_smoothing 0.1 goes with absorbing noise, .* but 'v' has Hybrid"):
        Objective(label_smoothing=0.1, processes={"v": Hybrid()}).check(vocabulary)


def test_complementary_masks_need_masks_and_times_that_are_complements():
    vocabulary = SharedVocabulary.of({"a": Grid(2, 1, 8)})
    Objective(complementary=True).check(vocabulary)
    Objective(complementary=True, times=(0.2, 0.8), process=Absorbing(LogLinear(0.0))).check(vocabulary)
    with pytest.raises(ValueError, match=r"complementary goes with absorbing noise, .* but 'a' has Hybrid"):
        Objective(complementary=True, process=Hybrid()).check(vocabulary)
    with pytest.raises(
        ValueError, match=r"noise at both ends adds up to 1, but that of 'a' at \[0.3, 0.8\] adds up to"
    ):
        Objective(complementary=True, times=(0.3, 0.8)).check(vocabulary)


def test_bad_settings():
    with pytest.raises(ValueError, match="weighting must be elbo or uniform or clipped or softmin, not 'best'"):
        Objective(weighting="best")
    with pytest.raises(ValueError, match=r"weighting must be .*, not 'best'"):
        Objective(weighting={"a": "best"})
    with pytest.raises(ValueError, match="normalisation must be targets or masked or segments or documents, not 'all'"):
        Objective(normalisation="all")
    for weight in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="loss weight of 'a' must be a number above 0"):
            Objective(loss_weights={"a": weight})
    for limit in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="weight_limit must be a number above 0"):
            Objective(weighting="clipped", weight_limit=limit)
    with pytest.raises(ValueError, match=r"weight_limit 2.0 goes with the weighting clipped or softmin"):
        Objective(weighting={"a": "elbo"}, weight_limit=2.0)
    for smoothing in (-0.1, 1.0, math.nan, "some"):
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
            Objective(label_smoothing=smoothing)
    for times in ((0.0, 1.0), (0.5, 0.5), (0.7, 0.3), (0.1, 1.1), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="times must be a range within"):
            Objective(times=times)
