"""Rotary positions on three axes, and Fourier features of coordinates."""

import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from multidiff.models.rotary import apply_rotary_emb, fourier_features, rotary, rotary_frequencies, wave_turns
from tests.helpers.toys import generator


def test_equal_axes_are_llamas_rotary():
    config = LlamaConfig(hidden_size=96, num_attention_heads=4, max_position_embeddings=2048)
    positions_P = torch.randint(0, 2000, (34,), generator=generator())
    query_PHE = torch.randn(34, 4, 24, generator=generator())
    cos, sin = LlamaRotaryEmbedding(config)(query_PHE, positions_P[None])
    theirs, _ = apply_rotary_pos_emb(query_PHE.transpose(0, 1)[None], query_PHE.transpose(0, 1)[None], cos, sin)
    positions_P3 = positions_P[:, None].expand(-1, 3)
    ours = apply_rotary_emb(query_PHE, *rotary(positions_P3, rotary_frequencies(24, 10_000.0), double=False))
    assert torch.equal(ours.transpose(0, 1)[None], theirs)


def test_frequencies_turn_with_their_axis():
    """Frequency j turns with axis j mod 3, by coordinate · θ^(-2j / E), in fp64 where that is asked for."""
    positions_P3 = torch.tensor([[3, 70_001, 5], [0, 0, 9]])
    cos_P1E, sin_P1E = rotary(positions_P3, rotary_frequencies(10, 100.0), double=True)
    for place, position in enumerate(positions_P3.tolist()):
        for j in range(5):
            angle = position[j % 3] * float(torch.tensor(100.0, dtype=torch.float64) ** (-2 * j / 10))
            for half in (j, j + 5):
                # The frequencies are in fp32, as Llama's are.
                assert math.isclose(float(cos_P1E[place, 0, half]), math.cos(angle), abs_tol=1e-7 * max(1, angle))
                assert math.isclose(float(sin_P1E[place, 0, half]), math.sin(angle), abs_tol=1e-7 * max(1, angle))


def test_fourier_features_are_plane_waves():
    coords_N3 = torch.cartesian_prod(torch.arange(9), torch.arange(8), torch.tensor([0, 1, 999]))
    features_ND = fourier_features(coords_N3, torch.empty(len(coords_N3), 256), wave_turns(128))
    for wave in (1, 2, 57, 128):
        turns_3 = [float(wave**power * Decimal(n).sqrt() % 1) for power, n in ((2, 2), (3, 3), (4, 5))]
        angle_N = 2 * np.pi * coords_N3.numpy() @ np.array(turns_3)
        np.testing.assert_allclose(features_ND[:, wave - 1], np.sqrt(2) * np.cos(angle_N), atol=1e-3)
        np.testing.assert_allclose(features_ND[:, 127 + wave], np.sqrt(2) * np.sin(angle_N), atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):  # what is trained is what is sampled with
        assert torch.equal(fourier_features(coords_N3, torch.empty(len(coords_N3), 256), wave_turns(128)), features_ND)
    outside_13 = torch.tensor([[-1, -1, -1]])
    assert not fourier_features(outside_13, torch.empty(1, 8), wave_turns(4)).any()


def test_wave_vectors_are_exact():
    """Against whole numbers of any size, in units of 2^-64 turns."""
    turns_F3 = wave_turns(5000)
    assert turns_F3.dtype == torch.float64
    for wave in (1, 2, 3, 57, 1448, 1449, 4999, 5000):
        for axis, (power, n) in enumerate(((2, 2), (3, 3), (4, 5))):
            fraction = wave**power * math.isqrt(n << 128) % (1 << 64)
            nearest = fraction - (1 << 64) * (fraction >= 1 << 63)
            assert turns_F3[wave - 1, axis] == nearest / 2**64
            assert abs(float(turns_F3[wave - 1, axis])) <= 0.5


@pytest.mark.parametrize(
    ("axes", "width"),
    [((1, 32, 32), 256), ((500, 2, 1), 256), ((9, 8, 7), 256), ((1, 24, 24), 8192)],
)
def test_fourier_features_tell_places_apart(axes, width):
    coords_N3 = torch.cartesian_prod(*(torch.arange(size) for size in axes))
    features_ND = fourier_features(coords_N3, torch.empty(len(coords_N3), width), wave_turns(width // 2))
    cosine_NN = features_ND @ features_ND.T / width
    torch.testing.assert_close(cosine_NN.diagonal(), torch.ones(len(coords_N3)), atol=1e-4, rtol=0)
    others_NN = cosine_NN - torch.eye(len(coords_N3))
    assert float(others_NN.abs().max()) < 0.5
    assert float(others_NN.square().mean().sqrt()) < 1.2 / math.sqrt(width)
