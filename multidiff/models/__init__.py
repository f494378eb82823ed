"""The denoiser."""

from multidiff.models.transformer import MaskedDiffusionTransformer

__all__ = ["MaskedDiffusionTransformer"]
