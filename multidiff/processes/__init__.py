"""Noise schedules, and forward processes behind one protocol."""

from multidiff.processes.absorbing import Absorbing
from multidiff.processes.process import CorruptedTokens, Process
from multidiff.processes.schedules import Cosine, CosineSquared, Geometric, LogLinear, Polynomial, Schedule

__all__ = [
    "Absorbing",
    "CorruptedTokens",
    "Cosine",
    "CosineSquared",
    "Geometric",
    "LogLinear",
    "Polynomial",
    "Process",
    "Schedule",
]
