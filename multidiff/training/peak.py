"""How many operations a second matrix products on a device can reach: from a table, or else by a measurement."""

from __future__ import annotations

import re
import time
from functools import lru_cache

import torch

_TFLOPS: dict[str, tuple[float, float | None, float | None, float]] = {
    # Name of the device: fp32, TF32, bf16 and fp16 with sums in fp32; TFLOP/s, dense. None: it has no such products.
    # Datasheets often give twice as much, which only sparse matrices reach. Laptops' chips and parts of a device (MIG)
    # have other names, and are measured.
    #
    # Blackwell: NVIDIA Blackwell architecture technical brief (HGX B200, GB200 NVL72)
    r"GB200": (80, 1250, 2500, 2500),
    r"B200": (75, 1125, 2250, 2250),
    # Hopper: NVIDIA H100 and H200 datasheets
    r"(H100 80GB HBM3|H200|GH200 (120GB|480GB|144G HBM3e))": (67, 494.7, 989.4, 989.4),
    r"(H100|H200) NVL": (60, 417.5, 835.5, 835.5),
    r"H100 PCIe": (51.2, 378, 756, 756),
    # Ada: datasheets of the L4, L40, L40S and RTX 6000 Ada
    r"L4": (30.3, 60, 121, 121),
    r"L40": (90.5, 90.5, 181, 181),
    r"L40S": (91.6, 183, 362, 362),
    r"RTX 6000 Ada Generation": (91.1, 182.1, 364.2, 364.2),
    # Ampere: datasheets of the A100, A30, A10 and A40; NVIDIA Ampere GA102 architecture whitepaper (A6000)
    r"A100(-SXM4-(40|80)GB|-SXM-(64|80)GB|-PCI[Ee]-(40|80)GB| 80GB PCIe)": (19.5, 156, 312, 312),
    r"A30": (10.3, 82, 165, 165),
    r"A10": (31.2, 62.5, 125, 125),
    r"A40": (37.4, 74.8, 149.7, 149.7),
    r"RTX A6000": (38.7, 77.4, 154.8, 154.8),
    # Volta and Turing: datasheets of the V100 and T4; NVIDIA Turing architecture whitepaper (TITAN RTX)
    r"V100-SXM2-(16|32)GB": (15.7, None, None, 125),
    r"V100-PCIE-(16|32)GB": (14, None, None, 112),
    r"V100S-PCIE-32GB": (16.4, None, None, 130),
    r"T4": (8.1, None, None, 65),
    r"TITAN RTX": (16.3, None, None, 130.5),
    # GeForce: NVIDIA RTX Blackwell, Ada and Ampere GA102 architecture whitepapers. With sums in fp32, as training
    # takes them, their tensor cores reach half of what they reach with sums in fp16.
    r"GeForce RTX 5090": (104.8, 104.8, 209.5, 209.5),
    r"GeForce RTX 5080": (56.3, 56.3, 112.6, 112.6),
    r"GeForce RTX 5070 Ti": (43.9, 43.9, 87.9, 87.9),
    r"GeForce RTX 5070": (30.9, 30.9, 61.7, 61.7),
    r"GeForce RTX 4090": (82.6, 82.6, 165.2, 165.2),
    r"GeForce RTX 4080": (48.7, 48.7, 97.5, 97.5),
    r"GeForce RTX 4070 Ti": (40.1, 40.1, 80.2, 80.2),
    r"GeForce RTX 3090 Ti": (40, 40, 80, 80),
    r"GeForce RTX 3090": (35.6, 35.6, 71, 71),
    r"GeForce RTX 3080": (29.8, 29.8, 59.5, 59.5),
    r"GeForce RTX 3070": (20.3, 20.3, 40.6, 40.6),
}
_LARGEST = 8192  # rows of the measured product


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of dense matrix products, at most.

    NVIDIA's own numbers where the device is in the table; else what a product reaches here, measured once in a process.

    Args:
        device: where the products are computed.
        dtype: of their factors. fp32 stands for TF32 where `torch.set_float32_matmul_precision` allows it.
    """
    return _peak_flops(device, dtype, torch.get_float32_matmul_precision())


@lru_cache
def _peak_flops(device: torch.device, dtype: torch.dtype, fp32_precision: str) -> float:
    listed = None
    if device.type == "cuda":
        listed = listed_flops(torch.cuda.get_device_name(device), dtype, fp32_precision != "highest")
    return listed or measured_flops(device, dtype)


def listed_flops(name: str, dtype: torch.dtype, allows_tf32: bool) -> float | None:
    """Operations a second by the table; None where it lacks the device or the type.

    Args:
        name: of the device, as CUDA has it, for instance "NVIDIA H100 80GB HBM3".
        dtype: of the factors.
        allows_tf32: whether fp32 factors may be rounded to TF32, where the device can.
    """
    chip = re.sub(r"^(NVIDIA )?(Tesla )?", "", name)
    for pattern, (fp32, tf32, bf16, fp16) in _TFLOPS.items():
        if re.fullmatch(pattern, chip):
            tflops = {
                torch.float32: tf32 if allows_tf32 and tf32 else fp32,
                torch.bfloat16: bf16,
                torch.float16: fp16,
            }.get(dtype)
            return None if tflops is None else 1e12 * tflops
    return None


@torch.no_grad()
def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations a second that a matrix product reaches here, the best of several.

    Other work on the machine makes it less.

    Args:
        device, dtype: of the factors.
        seconds: what the measurement takes, about.
    """
    size = 256
    end = time.perf_counter() + seconds
    while True:
        factor = torch.ones(size, size, device=device, dtype=dtype)
        times = [_seconds(factor) for _ in range(2)]  # the first one is prepared, and is slow
        if min(times) > seconds / 20 or 2 * size > _LARGEST:
            break
        size *= 2
    best = min(times)
    while time.perf_counter() < end:
        best = min(best, _seconds(factor))
    return 2 * size**3 / best


def _seconds(factor: torch.Tensor) -> float:
    begun = time.perf_counter()
    (factor @ factor)[0, 0].item()  # reading a number waits for the device
    return time.perf_counter() - begun
