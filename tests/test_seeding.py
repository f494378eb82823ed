"""Random numbers by key: SplitMix64's published values, and statistics of many keys."""

import math

import torch

from multidiff.seeding import generator_for, key_for, uniforms


def test_uniforms_are_splitmix64s():
    """The first outputs for the seed 1234567, as in the tests of Vigna's reference implementation and of Java's."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert uniforms([1234567], [4]).tolist() == [(value >> 11) * 2.0**-53 for value in published]


def test_a_key_has_its_numbers_whatever_stands_beside_it():
    keys, counts = [key_for(0, "a", number) for number in range(5)], [3, 0, 7, 1, 4]
    for block in (0, 1, 5):
        together = uniforms(keys, counts, block).split(counts)
        for key, count, part in zip(keys, counts, together, strict=True):
            assert torch.equal(part, uniforms([key], [count], block))
            assert torch.equal(part, uniforms([key], [count + 9], block)[:count])
    assert uniforms([], []).shape == (0,)


def test_keys_and_blocks_are_uniform_and_independent():
    """Mean, variance and correlations within 4.5 standard deviations: it fails by chance once in 15,000 times."""
    count = 20_000
    keys = [key_for(7, "document", number) for number in range(count)]
    first, second = (uniforms(keys, [3] * count, block).view(count, 3) for block in (0, 1))
    columns = torch.cat([first, second], 1).T - 0.5
    assert columns.abs().max() <= 0.5
    assert (columns.mean(1).abs() < 4.5 * math.sqrt(1 / 12 / count)).all()
    assert ((columns.square().mean(1) - 1 / 12).abs() < 4.5 * math.sqrt(1 / 180 / count)).all()
    correlations = 12 * (columns @ columns.T / count - torch.diag(columns.square().mean(1)))
    assert (correlations.abs() < 4.5 / math.sqrt(count)).all()
    neighbours = 12 * (columns[:, 1:] * columns[:, :-1]).mean(1)
    assert (neighbours.abs() < 4.5 / math.sqrt(count)).all()


def test_generators_follow_their_keys():
    draws = {float(torch.rand((), generator=generator_for(*key))) for key in [(0, 1), (1, 0), (0, "1"), (0, 1, 0)]}
    assert len(draws) == 4
    assert torch.equal(torch.rand(3, generator=generator_for(0, "x")), torch.rand(3, generator=generator_for(0, "x")))
