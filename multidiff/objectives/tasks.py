"""Tasks: which segments of a training document are noised, which are shown, and which are not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

Role = Literal["target", "given", "absent", "removed"]
OTHERS = "others"


@dataclass(frozen=True)
class Task:
    """A row of the task mixture: the roles of a training example's segments.

    A *target* is noised, and the loss is on it. What is *given* is clean. What is *absent* is fully noised and has no
    loss, which is what the null of classifier-free guidance is. What is *removed* is left out of the sequence, as at
    generation when it is not asked for.

    Attributes:
        roles: label -> "target", "given", "absent" or "removed". The label of a segment is its tokenizer's name unless
            the data give it another. "others" stands for every label not named; without it others are given. A task
            applies to documents that hold every label it names.
        weight: how often it is drawn, relative to the other tasks that apply.
        condition_dropout: probability that a given segment is made absent, each on its own. Classifier-free guidance
            needs some.
        noise: "independent", a time t for each target segment, or "shared", one t for all targets of a document.

    Examples:
        >>> Task({"image": "given", "text": "target", "others": "removed"}, weight=2.0).role_of("speech")
        'removed'
    """

    roles: dict[str, Role]
    weight: float = 1.0
    condition_dropout: float = 0.0
    noise: Literal["independent", "shared"] = "independent"

    @classmethod
    def of(cls, value: Task | Mapping[str, Any]) -> Task:
        """A task as it is, or from its attributes by name, as a configuration writes them.

        Raises:
            ValueError: an unknown attribute (the message names the nearest), or no roles.
        """
        if isinstance(value, Task):
            return value
        if not isinstance(value, Mapping) or "roles" not in value:
            raise ValueError(f"A task is a table with roles, such as {{'roles': {{'text': 'target'}}}}, not {value!r}.")
        known = [attribute.name for attribute in fields(cls)]
        for name in value:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(known)}."
                raise ValueError(f"A task has no attribute {name!r}. {hint}")
        return cls(**value)

    def __post_init__(self) -> None:
        if not isinstance(self.roles, Mapping):
            raise ValueError(f"The roles of a task must be a table of labels and roles, not {self.roles!r}.")
        known = get_args(Role)
        if bad := [role for role in self.roles.values() if role not in known]:
            raise ValueError(f"Task role {bad[0]!r} is none of {', '.join(known)}.")
        if "target" not in self.roles.values():
            raise ValueError(f"Task {self.roles} has no target, so it would train nothing.")
        if not isinstance(self.weight, int | float) or not 0 <= self.weight < math.inf:
            raise ValueError(f"Task {self.roles}: weight must be a number of at least 0, not {self.weight!r}.")
        if not isinstance(self.condition_dropout, int | float) or not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"Task {self.roles}: condition_dropout must be in [0, 1], not {self.condition_dropout!r}.")
        if self.noise not in ("independent", "shared"):
            raise ValueError(f"Task {self.roles}: noise must be independent or shared, not {self.noise!r}.")

    def role_of(self, label: str) -> Role:
        """The role of a segment with this label."""
        return self.roles.get(label, self.roles.get(OTHERS, "given"))

    def applies(self, labels: Sequence[str]) -> bool:
        """Whether a document of segments with these labels has all that the task names, and a target."""
        named = self.roles.keys() - {OTHERS} <= set(labels)
        return named and any(self.role_of(label) == "target" for label in labels)


def fitting_tasks(tasks: Sequence[Task], labels: Sequence[str]) -> list[Task]:
    """The tasks of a mixture that apply to a document of segments with these labels; `ValueError` if none does."""
    fitting = [task for task in tasks if task.weight and task.applies(labels)]
    if not fitting:
        raise ValueError(f"No task applies to a document of {' + '.join(labels)}. Add a row to `tasks`.")
    return fitting


def choose_task(tasks: Sequence[Task], uniform: float) -> Task:
    """One of some tasks in proportion to their weights, by a uniform number in [0, 1)."""
    rest = uniform * sum(task.weight for task in tasks)
    for task in tasks:
        rest -= task.weight
        if rest < 0:
            return task
    return tasks[-1]
