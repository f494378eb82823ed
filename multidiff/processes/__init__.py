"""Noise schedules and forward processes."""

from multidiff.processes.schedules import Cosine, LogLinear, Schedule

__all__ = ["Cosine", "LogLinear", "Schedule"]
