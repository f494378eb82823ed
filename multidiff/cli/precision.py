"""`${fastest_precision:}` in configurations: the precision in which this machine multiplies matrices fastest."""

from __future__ import annotations

import os
import time

_PRECISION = "MULTIDIFF_FASTEST_PRECISION"


def fastest_precision() -> str:
    """The value of `${fastest_precision:}` in a configuration, for Lightning's `precision`.

    It is "bf16-mixed" if matrix products are faster in bf16 than in fp32, and "32-true" otherwise. Many CPUs only
    emulate bf16. The answer is kept in an environment variable, so that the processes of one run agree.
    """
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
