"""Named sizes of `VQModel`s to train. A preset has arguments of diffusers' `VQModel`, which `settings` can change.

Layers with many pixels have few channels, because convolutions at full resolution take most of the time. With s stages
the stride is 2^(s-1), and an image of H×W pixels has (H/stride)·(W/stride) codes.
"""

from __future__ import annotations

from typing import Any


def _size(pixels: int, channels: int, widths: list[int], codes: int, latent: int, groups: int) -> dict[str, Any]:
    return {
        "in_channels": channels,
        "out_channels": channels,
        "sample_size": pixels,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": 1,
        "norm_num_groups": groups,
        "mid_block_add_attention": False,
        "latent_channels": latent,
        "num_vq_embeddings": codes,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "digits-32": _size(32, 1, [4, 8, 32, 64], 64, 8, 2),  # 4×4 codes
    "grey-32": _size(32, 1, [16, 32, 64, 64], 256, 8, 8),  # 4×4 codes
    "rgb-32": _size(32, 3, [16, 32, 64], 512, 8, 8),  # 8×8 codes
    "rgb-64": _size(64, 3, [16, 32, 64, 128], 1024, 8, 8),  # 8×8
    "rgb-128": _size(128, 3, [32, 64, 128, 128], 1024, 8, 16),  # 16×16
    "rgb-256": _size(256, 3, [32, 64, 128, 128, 256], 4096, 8, 32),  # 16×16
    "rgb-512": _size(512, 3, [32, 64, 128, 128, 256], 4096, 8, 32),  # 32×32
}
