"""Random numbers that are derived from their purpose, so that no random state has to be saved.

`generator_for` gives a generator of PyTorch. Where many documents need a few numbers each, making generators would cost
more than the numbers: `key_for` and `uniforms` give the numbers of all documents at once, by SplitMix64 (Steele, Lea &
Flood 2014, Fast splittable pseudorandom number generators), of which number i follows from a key and i alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15  # 2⁶⁴ divided by the golden ratio
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_BLOCK = 2**40  # numbers of a key before those of its next block: more than a document has tokens


def key_for(*key: int | str) -> int:
    """A hash of `key`, for instance (seed, step, document), of 64 bits. Equal keys give equal numbers.

    A sum or product of the parts would make the streams of neighbouring steps and documents overlap.
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key_for(*key)`."""
    return torch.Generator().manual_seed(key_for(*key) >> 1)


def uniforms(keys_D: Sequence[int], counts_D: Sequence[int], block: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) of several keys, one key's after another's, float64 [sum of the counts].

    A key's numbers depend on nothing but the key, the block and their places in it.

    Args:
        keys_D: from `key_for`.
        counts_D: how many numbers each key gets.
        block: numbers of other blocks are independent.

    Examples:
        >>> one, other = key_for(0, "noise", 3), key_for(0, "noise", 4)
        >>> torch.equal(uniforms([one, other], [5, 2])[5:], uniforms([other], [2]))
        True
    """
    counts = np.asarray(counts_D, dtype=np.int64)
    first = np.cumsum(counts) - counts
    place = np.arange(int(counts.sum()), dtype=np.uint64) + np.uint64(block * _BLOCK + 1)
    key = np.asarray(keys_D, dtype=np.uint64) - first.astype(np.uint64) * np.uint64(_GAMMA)  # modulo 2⁶⁴
    z = np.repeat(key, counts) + place * np.uint64(_GAMMA)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)
