"""Samplers: which masked positions to decide next, how many, and with which tokens. They know no model."""

from multidiff.samplers.sampler import MaskSampler, SamplerOutput, State
from multidiff.samplers.scheduler import as_sampler

__all__ = ["MaskSampler", "SamplerOutput", "State", "as_sampler"]
