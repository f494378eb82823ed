"""Batching for neural tokenizers. The result of an item does not depend on the other items.

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
    """Apply `function` to each input, in batches of inputs of equal shape.

    All batches of one shape have the same number of rows, and missing rows are filled with zeros. Kernels for different
    batch sizes sum in different orders, and the last bit of a sum can decide between two codes.

    Args:
        function: maps a batch [B, …] on `device` to outputs [B, …].
        inputs: tensors on the CPU, each without a batch dimension.
        rows: maps the shape of an input to B; less than 1 counts as 1.
        device: where `function` computes.

    Returns:
        the outputs in the order of the inputs, on the CPU.
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
