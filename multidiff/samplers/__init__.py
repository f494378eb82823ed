"""Samplers: which masked positions to decide next, how many, and with which tokens. They know no model.

`Sampler` is the protocol that the decoder uses. `MaskSampler` implements it, composed of parts; `AncestralSampler`
follows any forward process; `as_sampler` takes diffusers' schedulers and classes of your own.
"""

from multidiff.samplers.ancestral import AncestralSampler
from multidiff.samplers.collection import Samplers, as_sampler, check_fit, default_sampler
from multidiff.samplers.protocol import Sampler, SamplerOutput, SamplerState
from multidiff.samplers.sampler import MaskSampler
from multidiff.samplers.scheduler import Scheduler, SchedulerSampler
from multidiff.samplers.state import State

__all__ = [
    "AncestralSampler",
    "MaskSampler",
    "Sampler",
    "SamplerOutput",
    "SamplerState",
    "Samplers",
    "Scheduler",
    "SchedulerSampler",
    "State",
    "as_sampler",
    "check_fit",
    "default_sampler",
]
