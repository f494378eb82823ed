"""Countdown: reach a target with some numbers (Gandhi et al. 2024, arXiv 2404.03683; Ye et al. 2024, arXiv 2410.14157).

The question gives the numbers and the target: "86,28,13,31:96". The answer is a list of equations, each of which takes
two numbers that are left and puts its result in their place, until the target alone is left:
"86+28=114,31-13=18,114-18=96". Every number is used once. Any such list is right.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import ClassVar

from multidiff.seeding import key_for

TARGETS = (10, 100)
LARGEST_RESULT = 999
_NUMBER = "(0|[1-9][0-9]{0,8})"
_EQUATION = re.compile(f"{_NUMBER}([-+*/]){_NUMBER}={_NUMBER}", re.ASCII)


@dataclass(frozen=True)
class Countdown:
    """Find equations that make a target of numbers.

    Attributes:
        numbers: how many numbers there are, at least 2.
        largest: the largest of them, 10 to 999; the smallest is 1.

    Raises:
        ValueError: a number outside of these.
    """

    name: ClassVar[str] = "countdown"
    tokenizer: ClassVar[str] = "text"

    numbers: int = 4
    largest: int = 99

    def __post_init__(self) -> None:
        if self.numbers < 2 or not 10 <= self.largest <= LARGEST_RESULT:
            raise ValueError(
                f"There must be at least 2 numbers, the largest of them 10 to {LARGEST_RESULT}, not {self.numbers} "
                f"numbers up to {self.largest}."
            )

    def draw(self, generator: random.Random) -> tuple[str, str]:
        """Random numbers, combined at random until the result is a target, 10 to 100. Results are 1 to 999."""
        while True:
            numbers = [generator.randint(1, self.largest) for _ in range(self.numbers)]
            left, equations = list(numbers), []
            while len(left) > 1:
                a, b = sorted(generator.sample(range(len(left)), 2), key=left.__getitem__, reverse=True)
                high, low = left[a], left[b]
                results = {"+": high + low, "-": high - low, "*": high * low, "/": high // low if not high % low else 0}
                # One sign is always possible: of unequal numbers minus, of equal ones the fraction bar.
                sign = generator.choice([sign for sign, result in results.items() if 1 <= result <= LARGEST_RESULT])
                left = [number for place, number in enumerate(left) if place not in (a, b)] + [results[sign]]
                equations.append(f"{high}{sign}{low}={results[sign]}")
            if TARGETS[0] <= left[0] <= TARGETS[1]:
                return f"{','.join(map(str, numbers))}:{left[0]}", ",".join(equations)

    def key(self, question: str) -> int:
        """A hash, the same for all questions with these numbers, in whatever order, and this target."""
        numbers, _, target = question.partition(":")
        return key_for(self.name, *sorted(map(int, numbers.split(","))), int(target))

    def givens(self, question: str) -> None:
        """None: a question gives nothing of its answer."""

    def solves(self, question: str, answer: str) -> bool:
        """Whether an answer is a list of true equations that uses every number once and ends at the target.

        Differences may not be negative, and quotients must be whole.
        """
        numbers, _, target = question.partition(":")
        left = [int(number) for number in numbers.split(",")]
        for equation in answer.split(","):
            if not (match := _EQUATION.fullmatch(equation)):
                return False
            a, b, result = int(match[1]), int(match[3]), int(match[4])
            is_true = {"+": a + b == result, "-": a - b == result, "*": a * b == result, "/": b and b * result == a}
            if not is_true[match[2]]:
                return False
            for number in (a, b):
                if number not in left:
                    return False
                left.remove(number)
            left.append(result)
        return left == [int(target)]
