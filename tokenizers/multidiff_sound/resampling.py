"""Resamples from any rate to any other in bounded memory.

The filter is a sinc in a Kaiser window. Up to 95 % of half the lower rate, the error is 80 dB below the signal. Above
half the lower rate, frequencies are attenuated by as much.

torchaudio resamples rates with a simple ratio, such as 44,100 : 16,000 = 441 : 160. It keeps a row of weights for each
of the 160 positions that an output can have between two inputs. At 16,001 : 16,000 there would be 16,000 rows, each
16,000 long. For such ratios this module interpolates the weights. At position p in [0, 1) between two inputs, an output
is Σ_k x_k h(k − p). As a function of p, h(k − p) is nearly a polynomial, so that

    Σ_k x_k h(k − p) ≈ Σ_m l_m(p) Σ_k x_k h(k − p_m)

with the Lagrange polynomials l_m of a few Chebyshev nodes p_m.

Shape suffixes: T input samples, N outputs of a chunk, K weights, M nodes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.transforms import Resample

_PASSED = 0.95  # end of the pass band, as a fraction of half the lower rate
_CUTOFF = (1 + _PASSED) / 2
_DECIBEL = 85.0
# Kaiser's formulas for a transition from _PASSED to 1. Half the length of the filter is in samples of the lower rate.
_HALF = (_DECIBEL - 7.95) / (2.285 * math.pi * (1 - _PASSED)) / 2
_BETA = 0.1102 * (_DECIBEL - 8.7)
_NODES = 10
_CHUNK = 2**22  # numbers of a matrix
_MOST_WEIGHTS = 2**20
_MOST_STEPS = 16  # inputs per output in one stage


def resample(waveform_T: Tensor, source: int, target: int) -> Tensor:
    """Resample T samples at `source` Hz to ⌈T · target / source⌉ samples at `target` Hz.

    Args:
        waveform_T: float32 [T] on the CPU, finite, T at least 1.
        source, target: sample rates, whole numbers of Hz, at least 1.

    Returns:
        float32 [⌈T · target / source⌉] on the CPU.

    Raises:
        ValueError: the waveform has another shape, dtype or device, or no samples, or a rate is below 1.
    """
    if (
        waveform_T.ndim != 1
        or len(waveform_T) == 0
        or waveform_T.dtype != torch.float32
        or waveform_T.device.type != "cpu"
    ):
        raise ValueError(
            "resample expects float32 samples [T] on the CPU, T at least 1, got "
            f"{waveform_T.dtype} {list(waveform_T.shape)} on {waveform_T.device}"
        )
    if min(source, target) < 1:
        raise ValueError(f"sample rates must be at least 1 Hz, got {source} and {target}")
    divisor = math.gcd(source, target)
    source, target = source // divisor, target // divisor
    if target * (source + 2 * _HALF * max(1, source / target)) <= _MOST_WEIGHTS:
        return _simple(source, target)(waveform_T)
    outputs = -(-len(waveform_T) * target // source)
    while source > _MOST_STEPS * target:  # in stages, because the length of the filter grows with the ratio
        waveform_T = _interpolate(waveform_T, 8, 1)
        target *= 8
    return _interpolate(waveform_T, source, target)[:outputs]


@lru_cache(maxsize=32)
def _simple(source: int, target: int) -> Resample:
    """Cached, because computing the filter takes longer than resampling a word."""
    zero_crossings = round(_HALF * _CUTOFF)
    return Resample(source, target, "sinc_interp_kaiser", zero_crossings, _CUTOFF, _BETA)


def _interpolate(waveform_T: Tensor, source: int, target: int) -> Tensor:
    weights_KM, powers_MM = _filter(source, target)
    taps = len(weights_KM)
    outputs = -(-len(waveform_T) * target // source)
    windows_TK = F.pad(waveform_T, (taps // 2 - 1, taps // 2)).unfold(0, taps, 1)
    result_T = torch.empty(outputs)
    rows = max(1, _CHUNK // taps)
    for start in range(0, outputs, rows):
        steps_N = torch.arange(start, start + rows) * source  # the last chunk is padded, for the same kernels
        places_N, parts_N = (steps_N // target).clamp(max=len(waveform_T) - 1), steps_N % target / target
        nodes_NM = windows_TK[places_N] @ weights_KM
        lagrange_NM = (2 * parts_N.double() - 1)[:, None] ** torch.arange(_NODES) @ powers_MM
        result_T[start : start + rows] = (nodes_NM * lagrange_NM).sum(1)[: outputs - start].float()
    return result_T


@lru_cache(maxsize=32)
def _filter(source: int, target: int) -> tuple[Tensor, Tensor]:
    """Weights at the nodes, float32 [K, M], and the coefficients of the Lagrange polynomials, float64 [M, M]."""
    lower = min(1.0, target / source)  # the lower rate, relative to that of the inputs
    half = _HALF / lower
    points_M = torch.cos(math.pi * (torch.arange(_NODES, dtype=torch.float64) + 0.5) / _NODES)  # in [-1, 1]
    reach = math.ceil(half)
    distances_KM = torch.arange(1 - reach, reach + 1)[:, None] - (points_M + 1) / 2
    window_KM = torch.special.i0(_BETA * (1 - (distances_KM / half) ** 2).clamp(min=0).sqrt())
    window_KM = torch.where(distances_KM.abs() <= half, window_KM, 0) / torch.special.i0(torch.tensor(_BETA).double())
    cutoff = lower * _CUTOFF
    weights_KM = cutoff * torch.sinc(cutoff * distances_KM) * window_KM
    powers_MM = torch.linalg.inv(torch.linalg.vander(points_M))
    return weights_KM.float(), powers_MM
