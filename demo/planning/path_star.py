"""Paths through stars: find the one arm that leads to the goal (Bachmann & Nagarajan 2024, arXiv 2403.06963).

A star has some arms, which share the node that they start at. The question lists the edges in random order, each from
the start outwards, and then the start and the goal: "ab,bc,ad,de/ac". The answer lists the nodes from start to goal:
"abc". The goal is the end of an arm. Whoever writes from left to right has to choose the arm first, which takes looking
ahead. Whoever may begin at the goal only follows edges back.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from multidiff.seeding import key_for

NODES = string.ascii_letters + string.digits


@dataclass(frozen=True)
class PathStar:
    """Write down the path from the start of a star to a goal.

    Attributes:
        degree: arms of a star, at least 2.
        length: nodes of a path, its start and its goal among them, at least 2.

    Raises:
        ValueError: a number that is too small, or more nodes than there are names for them.
    """

    name: ClassVar[str] = "path-star"
    tokenizer: ClassVar[str] = "text"

    degree: int = 5
    length: int = 5

    def __post_init__(self) -> None:
        if self.degree < 2 or self.length < 2:
            raise ValueError(f"Degree and length must be at least 2, not {self.degree} and {self.length}.")
        if self._nodes > len(NODES):
            raise ValueError(
                f"A star of {self.degree} arms and paths of {self.length} nodes has {self._nodes} nodes, but there are "
                f"only {len(NODES)} names. Choose a smaller degree or length."
            )

    def draw(self, generator: random.Random) -> tuple[str, str]:
        """A star whose nodes have random names, with a random arm as its answer."""
        start, *others = generator.sample(NODES, self._nodes)
        arms = [[start, *others[first :: self.degree]] for first in range(self.degree)]
        edges = [a + b for arm in arms for a, b in pairwise(arm)]
        generator.shuffle(edges)
        path = generator.choice(arms)
        return f"{','.join(edges)}/{start}{path[-1]}", "".join(path)

    def key(self, question: str) -> int:
        """A hash, the same for all questions with these edges and this goal, in whatever order."""
        edges, _, ends = question.partition("/")
        return key_for(self.name, *sorted(edges.split(",")), ends)

    def givens(self, question: str) -> None:
        """None: every question gives the same of its answer, start and goal."""

    def solves(self, question: str, answer: str) -> bool:
        """Whether an answer goes from the start to the goal along the edges."""
        edges, _, ends = question.partition("/")
        steps = {a + b for a, b in pairwise(answer)}
        return bool(answer) and answer[0] + answer[-1] == ends and steps <= set(edges.split(","))

    @property
    def _nodes(self) -> int:
        return 1 + self.degree * (self.length - 1)
