"""What is trained: tasks, the weighting of the loss, the loss itself."""

from multidiff.objectives.diffusion import Objective, Task

__all__ = ["Objective", "Task"]
