"""The denoiser: the transformer, attention over documents, key/value caches."""

from multidiff.models.cache import KeyValueCache
from multidiff.models.transformer import MaskedDiffusionTransformer

__all__ = ["KeyValueCache", "MaskedDiffusionTransformer"]
