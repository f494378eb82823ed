"""`${fastest_precision:}` in configurations: what this machine multiplies matrices fastest in."""

from __future__ import annotations

import os
import time

_PRECISION = "MULTIDIFF_FASTEST_PRECISION"


def fastest_precision() -> str:
    """What `${fastest_precision:}` in a config stands for: "bf16-mixed" where matrix products are faster in bf16 than
    in fp32, else "32-true". Many CPUs only emulate bf16. The processes that a run starts take its answer."""
    if _PRECISION not in os.environ:
        os.environ[_PRECISION] = _measured_precision()
    return os.environ[_PRECISION]


def _measured_precision() -> str:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def seconds(dtype: torch.dtype) -> float:
        factor = torch.ones(512, 512, dtype=dtype, device=device)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            (factor @ factor)[0, 0].item()
            times.append(time.perf_counter() - start)
        return min(times)

    return "bf16-mixed" if seconds(torch.bfloat16) < seconds(torch.float32) else "32-true"
