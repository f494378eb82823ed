"""Numbers of a configuration that no model can have: refused before a model is built from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

MOST_SAMPLE_RATE = 384_000  # Hz; no converter is faster


def check_counts(settings: Mapping[str, Any], counts: Collection[str], tensors: int, path: Path) -> None:
    """Raise a `ValueError` where a model would have more parts than its weights have tensors.

    Each layer and each codebook has a tensor of its own, so this refuses no model whose weights are there. What is left
    is built in a time that the file of the weights is in proportion to.

    Args:
        settings: a model's configuration.
        counts: which of the settings count layers, codebooks or other parts; in lists every entry is a part.
        tensors: how many the weights have.
        path: the configuration's, for the error.
    """
    for name, value in settings.items():
        parts = value if name in counts else len(value) if isinstance(value, list | tuple) else 0
        if isinstance(parts, int | float) and not parts <= tensors:
            what = "" if name in counts else "the length of "
            raise ValueError(
                f"{path}: {what}{name} is {parts:,}, more than the weights beside it can be for: they have {tensors:,} "
                "tensors"
            )
