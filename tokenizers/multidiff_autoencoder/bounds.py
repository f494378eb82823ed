"""Checks for absurd numbers in a configuration, before a model is built from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

MOST_SAMPLE_RATE = 384_000  # Hz; no converter is faster


def check_counts(settings: Mapping[str, Any], counts: Collection[str], tensors: int, path: Path) -> None:
    """Check that a model has no more parts than its weights have tensors.

    Every layer and every codebook has at least one tensor, so a configuration that matches its weights passes. The time
    to build a model that passes is bounded by the size of its weights.

    Args:
        settings: the model's configuration.
        counts: the settings that count layers, codebooks or other parts. Each entry of a list is a part as well.
        tensors: the number of tensors of the weights.
        path: the configuration file, for errors.

    Raises:
        ValueError: a setting is larger than the number of tensors.
    """
    for name, value in settings.items():
        parts = value if name in counts else len(value) if isinstance(value, list | tuple) else 0
        if isinstance(parts, int | float) and not parts <= tensors:
            what = "" if name in counts else "the length of "
            raise ValueError(
                f"{path}: {what}{name} is {parts:,}, which does not fit the weights beside it: they have {tensors:,} "
                "tensors"
            )
