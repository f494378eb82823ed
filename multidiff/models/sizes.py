"""Sizes that many batches share.

In half precision on a CPU, oneDNN prepares a matrix product for every shape that it has not met yet. For a small model
this takes a third of a training step. Batches of documents hardly ever have the same number of tokens, so sizes are
rounded up to eight per octave: at most an eighth is computed in vain, and shapes come again.
"""

from __future__ import annotations

import torch

HALF = (torch.float16, torch.bfloat16)


def prepares_shapes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrix products of this type are prepared for each shape."""
    return device.type == "cpu" and dtype in HALF


def shared_size(number: int) -> int:
    """The next of the sizes 1, 2, …, 16, 18, 20, …, 32, 36, …: eight per octave.

    Examples:
        >>> [shared_size(number) for number in (0, 7, 17, 100, 1_753)]
        [0, 7, 18, 104, 1792]
    """
    step = 1 << max(0, (number - 1).bit_length() - 4)
    return -(-number // step) * step
