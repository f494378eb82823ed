"""The denoiser: the transformer, what it costs, attention over documents, key/value caches."""

from multidiff.models.cache import KeyValueCache
from multidiff.models.flops import forward_flops
from multidiff.models.transformer import MaskedDiffusionTransformer

__all__ = ["KeyValueCache", "MaskedDiffusionTransformer", "forward_flops"]
