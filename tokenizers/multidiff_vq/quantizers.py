"""Quantizers for training. With each of them the trained model is an ordinary `VQModel`, which picks the nearest code.

- `vq` learns its codes (van den Oord et al. 2017, arXiv:1711.00937), and `multidiff_autoencoder.codebook` keeps them in
  use.
- `fsq` rounds each of D numbers to one of a few levels in [-1, 1] (Mentzer et al. 2023, arXiv:2309.15505). A clamp in
  place of tanh makes rounding equal to the nearest code. The codebook is the grid of all combinations.
- `lfq` rounds each of D numbers to -1 or 1 (Yu et al. 2023, arXiv:2310.05737) and has an entropy loss. The codebook is
  the corners of a cube.

`fsq` and `lfq` are those of `vector-quantize-pytorch`. Their codes are not learned, so none can be lost for good.

Shape suffixes: B pictures, h, w codes down and across, N latents of a batch on all ranks, V codes, D latent width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn

Quantizer = Literal["vq", "fsq", "lfq"]


def codebook_arguments(quantizer: Quantizer, codes: int, levels: Sequence[int] | None) -> dict[str, int]:
    """The arguments of `VQModel` that depend on the quantizer.

    Args:
        quantizer: vq, fsq or lfq.
        codes: the size of the preset's codebook.
        levels: the number of fsq's levels for each dimension of the latent.

    Raises:
        ValueError: fsq has no levels, another quantizer has some, or lfq's codebook size is not a power of two.
    """
    if (quantizer == "fsq") != (levels is not None):
        raise ValueError(
            f"quantizer {quantizer} with levels {levels}: fsq needs levels such as [8, 5, 5], and the others have none"
        )
    if quantizer == "fsq":
        assert levels is not None
        if not levels or min(levels) < 2:
            raise ValueError(f"levels of fsq must each be at least 2, got {list(levels)}")
        return {"num_vq_embeddings": math.prod(levels), "vq_embed_dim": len(levels)}
    if quantizer == "lfq":
        if codes < 2 or codes & (codes - 1):
            raise ValueError(f"the codebook size of lfq must be a power of two, got {codes}")
        return {"num_vq_embeddings": codes, "vq_embed_dim": codes.bit_length() - 1}
    return {"num_vq_embeddings": codes}


def fixed_quantizer(quantizer: Quantizer, model: VQModel, levels: Sequence[int] | None) -> nn.Module | None:
    """The module that quantizes in training, or None for `vq`. Its codes are written into the model's codebook.

    Raises:
        ValueError: vector-quantize-pytorch is not installed.
    """
    if quantizer == "vq":
        return None
    try:
        from vector_quantize_pytorch import FSQ, LFQ
    except ImportError:
        raise ValueError(
            f"quantizer {quantizer} needs vector-quantize-pytorch: pip install 'masked-multidiff[quantizers]'"
        ) from None
    codebook = model.quantize.embedding.weight
    if quantizer == "fsq":
        # Only symmetric levels together with a clamp make rounding equal to the nearest code.
        fixed = FSQ(list(levels or ()), preserve_symmetry=True, bound_hard_clamp=True)
        codes_VD = fixed.get_buffer("implicit_codebook")
    else:
        fixed = LFQ(dim=codebook.shape[1], entropy_loss_weight=1.0)
        codes_VD = fixed.get_buffer("codebook")
    with torch.no_grad():
        codebook.copy_(codes_VD)
    return fixed


def quantize(fixed: Any, latents_BDhw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize latents with a fixed quantizer.

    Returns:
        codes with a straight-through gradient [B, D, h, w]; ids [B, h, w]; the quantizer's own loss. For lfq the loss
        is the mean entropy of a choice minus the entropy of the mean choice, in nats. For fsq it is 0.
    """
    quantized_BDhw, ids_Bhw, *loss = fixed(latents_BDhw)
    return quantized_BDhw, ids_Bhw.long(), loss[0] if loss else latents_BDhw.new_zeros(())
