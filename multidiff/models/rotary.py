"""Positions: rotary embeddings on three axes, and Fourier features of coordinates.

Shape suffixes: P tokens, D hidden size, H heads, E head dimension, F frequencies (E / 2) or waves (D / 2), 3 axes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def rotary_frequencies(head_size: int, theta: float) -> Tensor:
    """θ^(-2j / E) for j < E / 2, float32 [F] (Su et al. 2021, arXiv 2104.09864, eq. 15)."""
    return 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.int64, device="cpu").float() / head_size)


def rotary(positions_P3: Tensor, frequencies_F: Tensor, double: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [P, 1, E]: frequency j turns with the coordinate on axis j mod 3.

    They are in fp32, or in fp64 where `double`: a bf16 position is wrong beyond 256.
    """
    exact = torch.float64 if double else torch.float32
    frequencies_F = frequencies_F.to(positions_P3.device, exact, non_blocking=True)
    axis_F = torch.arange(len(frequencies_F), device=positions_P3.device) % 3
    angle_PF = positions_P3[..., axis_F].to(exact) * frequencies_F
    angle_P1E = torch.cat([angle_PF, angle_PF], dim=-1)[:, None]
    return angle_P1E.cos(), angle_P1E.sin()


def wave_turns(number: int) -> Tensor:
    """frac(j²√2, j³√3, j⁴√5), j = 1, 2, …, or less by 1 where that is one half or more: float64 [F, 3], F = number."""
    # In 64-bit fixed point: integers wrap, which leaves the fraction exact however large j⁴ grows.
    number_F = torch.arange(1, number + 1, device="cpu")
    turns_F3 = torch.stack([number_F**power * _fixed_fraction_of_root(n) for power, n in ((2, 2), (3, 3), (4, 5))], -1)
    return turns_F3.double() / 2.0**64


def fourier_features(coords_P3: Tensor, like_PD: Tensor, turns_F3: Tensor) -> Tensor:
    """√2 · (cos, sin)(coords · ω) of D / 2 plane waves, in D's type and shape; 0 where a coordinate is negative.

    Fourier features (Rahimi & Recht 2007; for coordinates Tancik et al. 2020, arXiv 2006.10739). The wave vectors
    ω = 2π frac(j²√2, j³√3, j⁴√5), j = 1, 2, …, are spread evenly and without pattern (Weyl 1916) over the whole cube
    [0, 2π)³, so that different whole coordinates are nearly orthogonal: their cosine is about ±1/√D. Products are
    taken one by one: as a matrix product, autocast would round them.

    Args:
        turns_F3: ω / 2π of `wave_turns(D // 2)`.
    """
    exact = torch.float64 if like_PD.dtype == torch.float64 else torch.float32
    turns_F3 = turns_F3.to(coords_P3.device, exact, non_blocking=True)
    turns_PF = sum(coords_P3[..., axis, None].to(exact) * turns_F3[:, axis] for axis in range(3))
    phase_PF = 2 * math.pi * torch.as_tensor(turns_PF).frac()
    features_PD = torch.cat([phase_PF.cos(), phase_PF.sin()], dim=-1) * math.sqrt(2)
    return features_PD.masked_fill((coords_P3 < 0).any(-1, keepdim=True), 0).to(like_PD.dtype)


def _fixed_fraction_of_root(n: int) -> int:
    """frac(√n) in units of 2^-64, as a signed 64-bit integer: one of 2^63 and more stands for itself less one turn."""
    fraction = math.isqrt(n << 128) % (1 << 64)
    return fraction - (fraction >> 63 << 64)


def apply_rotary_emb(x_PHE: Tensor, cos_P1E: Tensor, sin_P1E: Tensor) -> Tensor:
    """Rotate each pair (j, j + E/2) by its angle (Llama's "rotate-half" layout)."""
    if torch.compiler.is_compiling():  # a compiler finds the gradient below by itself
        return _rotate(x_PHE, cos_P1E, sin_P1E)
    return _Rotation.apply(x_PHE, cos_P1E, sin_P1E)  # pyright: ignore[reportReturnType]


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x_PHE: Tensor, cos_P1E: Tensor, sin_P1E: Tensor) -> Tensor:
        ctx.save_for_backward(cos_P1E, sin_P1E)
        return _rotate(x_PHE, cos_P1E, sin_P1E)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos_P1E, sin_P1E = ctx.saved_tensors
        return _rotate(gradients[0], cos_P1E, -sin_P1E), None, None


def _rotate(x_PHE: Tensor, cos_P1E: Tensor, sin_P1E: Tensor) -> Tensor:
    half = x_PHE.shape[-1] // 2
    y_PHE = x_PHE * cos_P1E
    y_PHE[..., :half] -= x_PHE[..., half:] * sin_P1E[..., :half]
    y_PHE[..., half:] += x_PHE[..., :half] * sin_P1E[..., half:]
    return y_PHE
