"""Noise schedules, and forward processes behind one protocol."""

from multidiff.processes.absorbing import Absorbing
from multidiff.processes.process import CorruptedTokens, Process
from multidiff.processes.schedules import Cosine, LogLinear, Schedule

__all__ = ["Absorbing", "CorruptedTokens", "Cosine", "LogLinear", "Process", "Schedule"]
