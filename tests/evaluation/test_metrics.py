"""Metrics of codes and of reconstruction, against counts and formulas written out again."""

import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from multidiff import evaluation
from multidiff.tokenizer import Audio, Codes
from tests.helpers.toys import generator
from tests.helpers.walks import Steps


def codes(*ids, levels=None):
    ids_N = torch.tensor(ids, dtype=torch.int64)
    levels_N = torch.tensor(levels or [0] * len(ids), dtype=torch.int64)
    return Codes(ids_N, levels_N, torch.zeros(len(ids), 3, dtype=torch.int64))


def test_the_distribution_of_codes_is_a_count_by_level():
    drawn = generator()
    made = [
        codes(*torch.randint(8, (9,), generator=drawn).tolist(), levels=[index % 3 // 2 for index in range(9)])
        for _ in range(20)
    ]
    for level in range(2):
        counts = Counter(
            number for one in made for number, at in zip(one.ids_N.tolist(), one.levels_N.tolist(), strict=True)
            if at == level
        )  # fmt: skip
        total = sum(counts.values())
        share_V = evaluation.code_distribution(made, level, 8)
        assert share_V.tolist() == [counts[code] / total for code in range(8)]
        entropy = -sum(count / total * math.log(count / total) for count in counts.values())
        assert evaluation.codebook_entropy(share_V) == pytest.approx(entropy)
        assert evaluation.codebook_usage(share_V) == len(counts) / 8


def test_a_level_without_codes_has_no_distribution():
    share_V = evaluation.code_distribution([codes(1, 2)], 1, 4)
    assert share_V.tolist() == [0, 0, 0, 0]
    assert evaluation.codebook_entropy(share_V) == evaluation.codebook_usage(share_V) == 0
    assert evaluation.code_distribution([], 0, 4).tolist() == [0, 0, 0, 0]


def test_information_depends_on_the_codebook_of_each_code():
    assert evaluation.information(codes(0, 1, 2, levels=[0, 1, 1]), (8, 4)) == 3 + 2 + 2


def test_agreement_counts_codes_and_gives_none_for_another_size():
    one, other = [codes(1, 2, 3), codes(4, 5)], [codes(1, 0, 3), codes(4)]
    assert evaluation.code_agreement(one, other) == 2 / 5
    assert evaluation.code_agreement(one, one) == 1
    assert evaluation.code_agreement([], []) == 0


class Forgets(Steps):
    """Loads with another scale than it was saved with."""

    @classmethod
    def load(cls, folder):
        super().load(folder)
        return cls(0.5)


class OtherCodes(Steps):
    """Has the same fingerprint after loading, but gives other codes."""

    shift = 0

    def one(self, item):
        made = super().one(item)
        made.ids_N = (made.ids_N + self.shift) % 10
        return made

    @classmethod
    def load(cls, folder):
        loaded = super().load(folder)
        loaded.shift = 1
        return loaded


@pytest.mark.parametrize(("cls", "survives"), [(Steps, True), (Forgets, False), (OtherCodes, False)])
def test_a_tokenizer_that_changes_when_it_is_saved_is_found(cls, survives):
    assert evaluation.survives_saving(cls(), cls().examples()) is survives


def noise(mode, seed=0):
    shape = {"L": (32, 24), "RGB": (32, 24, 3), "RGBA": (32, 24, 4)}[mode]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_psnr_is_its_formula_and_ssim_of_equals_is_one(mode):
    one, other = noise(mode), noise(mode, 1)
    error = np.mean((np.asarray(one, np.float64) / 255 - np.asarray(other, np.float64) / 255) ** 2)
    scores = evaluation.picture_fidelity(one, other)
    assert scores["PSNR, dB"] == pytest.approx(-10 * math.log10(error), abs=1e-4)
    assert scores["SSIM"] < 0.2
    assert evaluation.picture_fidelity(one, one)["SSIM"] == pytest.approx(1)


def test_a_transparent_original_is_compared_on_white():
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert evaluation.picture_fidelity(clear, Image.new("RGB", (16, 16), "white"))["SSIM"] == pytest.approx(1)
    assert evaluation.picture_fidelity(clear, Image.new("RGB", (16, 16), "red"))["SSIM"] < 0.9


def test_texts():
    assert evaluation.text_fidelity(["a", "b", "c", ""], ["a", "B", "c", ""]) == 3 / 4


@pytest.mark.parametrize("length", [700, 900])
def test_sounds_are_aligned_to_the_restored_rate_and_the_original_length(length):
    drawn = generator()
    original = Audio(torch.rand(2, 1600, generator=drawn) - 0.5, 16_000)
    restored = Audio(torch.rand(1, length, generator=drawn) - 0.5, 8_000)
    original_T, restored_T = evaluation.align_sounds(original, restored)
    assert original_T.shape == restored_T.shape == (800,)
    kept = min(800, length)
    assert torch.equal(restored_T[:kept], restored.waveform[0, :kept])
    assert not restored_T[kept:].any()
    same_T, _ = evaluation.align_sounds(restored, restored)
    assert torch.equal(same_T, restored.waveform[0])


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match=r'pip install "masked-multidiff\[evaluate\]"'):
        evaluation.picture_fidelity(noise("L"), noise("L"))
