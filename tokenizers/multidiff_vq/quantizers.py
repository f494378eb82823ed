"""How latents become codes in training. Whatever the quantizer, a trained model is an ordinary `VQModel`: each has a
codebook of which it takes the nearest code.

- `vq`: learned codes (van den Oord et al. 2017, arXiv:1711.00937), kept in use by `multidiff_autoencoder.codebook`;
- `fsq`: each of D numbers rounded to one of a few levels in [-1, 1] (Mentzer et al. 2023, arXiv:2309.15505), with a
  clamp instead of tanh, so that rounding is the nearest code; the codebook is the grid of all combinations;
- `lfq`: each of D numbers rounded to -1 or 1 (Yu et al. 2023, arXiv:2310.05737), with its entropy loss; the codebook is
  the corners of a cube.

The latter two are those of `vector-quantize-pytorch`; nothing of them is learned, so no code can be lost for good.

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
    """`VQModel`'s arguments that the quantizer decides.

    Args:
        quantizer: vq, fsq or lfq.
        codes: size of the codebook, as the preset has it.
        levels: of fsq, by dimension of the latent.

    Raises:
        ValueError: levels for another quantizer, none for fsq, or a codebook that is no power of two for lfq.
    """
    if (quantizer == "fsq") != (levels is not None):
        raise ValueError(
            f"quantizer {quantizer} and levels {levels}: fsq has levels such as [8, 5, 5], the others none"
        )
    if quantizer == "fsq":
        assert levels is not None
        if not levels or min(levels) < 2:
            raise ValueError(f"levels of fsq must each be at least 2, not {list(levels)}")
        return {"num_vq_embeddings": math.prod(levels), "vq_embed_dim": len(levels)}
    if quantizer == "lfq":
        if codes < 2 or codes & (codes - 1):
            raise ValueError(f"the codebook of lfq has a power of two as its size, not {codes}")
        return {"num_vq_embeddings": codes, "vq_embed_dim": codes.bit_length() - 1}
    return {"num_vq_embeddings": codes}


def fixed_quantizer(quantizer: Quantizer, model: VQModel, levels: Sequence[int] | None) -> nn.Module | None:
    """The module that quantizes in training, its codes written into the model's codebook; None for `vq`, which learns.

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
        # Symmetric levels and a clamp: with both, and only then, rounding is the nearest code.
        fixed = FSQ(list(levels or ()), preserve_symmetry=True, bound_hard_clamp=True)
        codes_VD = fixed.get_buffer("implicit_codebook")
    else:
        fixed = LFQ(dim=codebook.shape[1], entropy_loss_weight=1.0)
        codes_VD = fixed.get_buffer("codebook")
    with torch.no_grad():
        codebook.copy_(codes_VD)
    return fixed


def quantize(fixed: Any, latents_BDhw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a fixed quantizer makes of latents: codes with a straight-through gradient [B, D, h, w], ids [B, h, w], and
    its own loss (of lfq the entropy of each choice less that of all choices, nats; else 0)."""
    quantized_BDhw, ids_Bhw, *loss = fixed(latents_BDhw)
    return quantized_BDhw, ids_Bhw.long(), loss[0] if loss else latents_BDhw.new_zeros(())
