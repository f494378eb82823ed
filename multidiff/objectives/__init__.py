"""What is trained: tasks, the objective, and noised batches."""

from multidiff.objectives.noising import NoisedBatch, Noising
from multidiff.objectives.objective import Objective
from multidiff.objectives.tasks import Task

__all__ = ["NoisedBatch", "Noising", "Objective", "Task"]
