"""Times of variants that take turns."""

import time
from collections.abc import Callable, Mapping
from typing import Any


def interleaved(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least seconds of each variant over so many rounds, in which they take turns; one round more warms up."""
    best = dict.fromkeys(variants, float("inf"))
    for number in range(rounds + 1):
        for name, variant in variants.items():
            begun = time.perf_counter()
            variant()
            if number:
                best[name] = min(best[name], time.perf_counter() - begun)
    return best
