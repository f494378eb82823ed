"""The objective's settings."""

import math

import pytest
import torch

from multidiff.objectives import Objective
from multidiff.sequence import SharedVocabulary
from tests.helpers.toys import Frames, Grid


def test_weights_of_tokenizers():
    vocabulary = SharedVocabulary.of({"a": Grid(2, 1, 8), "v": Frames((3, 3))})
    weights = Objective(loss_weights={"v": 3.0}).weights(vocabulary)
    assert weights.tolist() == [1.0, 3.0]
    assert weights.dtype == torch.float64


def test_bad_settings():
    with pytest.raises(ValueError, match="weighting must be elbo or none, not 'best'"):
        Objective(weighting="best")
    with pytest.raises(ValueError, match="normalisation must be targets or masked, not 'all'"):
        Objective(normalisation="all")
    for weight in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="loss weight of 'a' must be a number above 0"):
            Objective(loss_weights={"a": weight})
