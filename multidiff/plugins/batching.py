"""Batches for neural tokenizers: items of many shapes through a network, the same result whatever goes beside them.

Shape suffixes: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def map_batches(
    function: Callable[[Tensor], Tensor],
    inputs: Sequence[Tensor],
    rows: Callable[[torch.Size], int],
    device: torch.device,
) -> list[Tensor]:
    """`function` of each input, computed in batches of inputs of equal shape.

    A batch always has as many rows as its shape is given, filled up with zeros: kernels for another batch size add up
    in another order, and the last bit can decide between two codes.

    Args:
        function: of a batch [B, …] on `device` to outputs [B, …].
        inputs: on the CPU.
        rows: B for the shape of an input; less than 1 counts as 1.
        device: where `function` computes.

    Returns:
        outputs in the order of the inputs, on the CPU.
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(inputs):
        by_shape.setdefault(tensor.shape, []).append(index)
    outputs: dict[int, Tensor] = {}
    for shape, indices in by_shape.items():
        places = max(1, rows(shape))
        for start in range(0, len(indices), places):
            chunk = indices[start : start + places]
            filling = [torch.zeros_like(inputs[chunk[0]])] * (places - len(chunk))
            batch = torch.stack([*(inputs[index] for index in chunk), *filling])
            outputs.update(zip(chunk, function(batch.to(device)).cpu(), strict=False))
    return [outputs[index] for index in range(len(inputs))]
