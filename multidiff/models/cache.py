"""Keys and values of earlier passes.

Shape suffixes: P tokens of all documents, A those that are computed, K key/value heads, E head dimension.
"""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Keys and values of an earlier pass, in which tokens stood that may since have changed. To attend to them is an
    approximation wherever attention goes both ways (Wu et al. 2025, Fast-dLLM, arXiv 2505.22618, section 3.2).

    Args:
        tokens: P, of all documents that it has a place for.
    """

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._layers: list[tuple[Tensor, Tensor]] = []

    def write(self, number: int, key_AKE: Tensor, value_AKE: Tensor, active_A: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keep these keys and values of layer `number`, in place; returns those of all tokens.

        Args:
            active_A: the places of the tokens; None where all are computed.
        """
        if number == len(self._layers):
            shape = (self._tokens, *key_AKE.shape[1:])
            self._layers.append((key_AKE.new_zeros(shape), value_AKE.new_zeros(shape)))
        for whole_PKE, part_AKE in zip(self._layers[number], (key_AKE, value_AKE), strict=True):
            if active_A is None:
                whole_PKE.copy_(part_AKE)
            else:
                whole_PKE.index_copy_(0, active_A, part_AKE)
        return self._layers[number]
