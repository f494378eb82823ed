"""Noise schedules, and forward processes behind one protocol."""

from multidiff.processes.absorbing import Absorbing
from multidiff.processes.hybrid import Hybrid
from multidiff.processes.interpolating import Interpolating
from multidiff.processes.process import CorruptedTokens, Process
from multidiff.processes.schedules import Cosine, CosineSquared, Geometric, LogLinear, Polynomial, Schedule
from multidiff.processes.storage import from_settings, to_settings
from multidiff.processes.uniform import Uniform

__all__ = [
    "Absorbing",
    "CorruptedTokens",
    "Cosine",
    "CosineSquared",
    "Geometric",
    "Hybrid",
    "Interpolating",
    "LogLinear",
    "Polynomial",
    "Process",
    "Schedule",
    "Uniform",
    "from_settings",
    "to_settings",
]
