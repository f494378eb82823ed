"""Sizes that batches share."""

import torch

from multidiff.models.sizes import prepares_shapes, shared_size


def test_sizes_are_few_and_at_most_an_eighth_too_large():
    sizes = [shared_size(number) for number in range(5000)]
    assert sizes == sorted(sizes)
    assert sizes[:17] == list(range(17))
    for number, size in enumerate(sizes):
        assert number <= size <= number * 9 / 8
        assert shared_size(size) == size
    for octave in range(4, 12):
        assert len({shared_size(number) for number in range(2**octave + 1, 2 ** (octave + 1) + 1)}) == 8


def test_only_half_precision_on_a_cpu_prepares_shapes():
    assert prepares_shapes(torch.device("cpu"), torch.bfloat16)
    assert not prepares_shapes(torch.device("cpu"), torch.float32)
    assert not prepares_shapes(torch.device("cuda"), torch.bfloat16)
