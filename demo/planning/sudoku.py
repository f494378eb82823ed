"""Sudoku of 4×4 or 9×9 cells: puzzles with one solution, and what counts as one.

A board is its rows, one a line, with "_" for an empty cell. Inside of this module it is a list of its cells, row by
row, with 0 for an empty one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from math import isqrt
from typing import ClassVar

from multidiff.seeding import key_for

GIVENS = {4: (4, 10), 9: (26, 50)}  # the default range, by size
Cells = list[int]


@dataclass(frozen=True)
class Sudoku:
    """Fill in a board so that every row, column and box holds each digit once.

    Attributes:
        size: cells of a side, 4 or 9.
        min_givens, max_givens: a puzzle's number of givens is drawn between these. The puzzle has more where none can
            go without a second solution. None is 4 and 10 for 4×4 cells, and 26 and 50 for 9×9.

    Raises:
        ValueError: another size, or a range that is empty or outside of the board.
    """

    name: ClassVar[str] = "sudoku"
    tokenizer: ClassVar[str] = "grid"

    size: int = 4
    min_givens: int | None = None
    max_givens: int | None = None

    def __post_init__(self) -> None:
        if self.size not in GIVENS:
            raise ValueError(f"The size of a Sudoku must be {' or '.join(map(str, GIVENS))}, not {self.size}.")
        least, most = self._range
        if not 0 <= least <= most <= self.size**2:
            raise ValueError(f"The givens must be a range within 0 and {self.size**2}, not {least} to {most}.")

    def draw(self, generator: random.Random) -> tuple[str, str]:
        """A puzzle with one solution, and the solution.

        A random board is emptied in random order, cell by cell, as long as there is one solution and more givens than
        were drawn.
        """
        (solution,) = islice(solutions([0] * self.size**2, generator), 1)
        cells, left = list(solution), len(solution)
        wanted = generator.randint(*self._range)
        for cell in generator.sample(range(left), left):
            if left == wanted:
                break
            digit, cells[cell] = cells[cell], 0
            if is_unique(cells):
                left -= 1
            else:
                cells[cell] = digit
        return _write(cells), _write(solution)

    def key(self, question: str) -> int:
        """A hash, the same for all puzzles that are symmetric to this one.

        A symmetry renames the digits, exchanges rows within a band or whole bands, does the same with columns, or
        exchanges rows with columns. Cells have colours, at first whether they are given. The next colour of a cell is a
        hash of its own, of those in its box, of those of its digit, and of those in its row and in its column, these
        two in either order (colour refinement, Weisfeiler & Leman 1968). The key is a hash of all colours after two
        rounds. It may be the same for puzzles that are not symmetric, too.
        """
        cells = _read(question, self.size)
        assert cells is not None
        colours = [int(digit > 0) for digit in cells]
        for _ in range(2):
            of_digit = [sorted(c for c, d in zip(colours, cells, strict=True) if d == digit) for digit in range(10)]
            of_unit = [sorted(colours[cell] for cell in unit) for unit in _units(self.size)]
            colours = [
                key_for(repr((colour, of_digit[digit], sorted([of_unit[row], of_unit[column]]), of_unit[box])))
                for colour, digit, (row, column, box) in zip(colours, cells, _units_of(self.size), strict=True)
            ]
        return key_for("sudoku", *sorted(colours))

    def givens(self, question: str) -> int:
        """The number of givens."""
        return sum(symbol.isdigit() for symbol in question)

    def solves(self, question: str, answer: str) -> bool:
        """Whether a board keeps the givens and has each digit once in every row, column and box."""
        cells, givens = _read(answer, self.size), _read(question, self.size)
        if cells is None or givens is None:
            return False
        if any(given not in (0, cell) for given, cell in zip(givens, cells, strict=True)):
            return False
        whole = set(range(1, self.size + 1))
        return all({cells[cell] for cell in unit} == whole for unit in _units(self.size))

    @property
    def _range(self) -> tuple[int, int]:
        least, most = GIVENS[self.size]
        return (
            least if self.min_givens is None else self.min_givens,
            most if self.max_givens is None else self.max_givens,
        )


def solutions(cells: Sequence[int], generator: random.Random | None = None) -> Iterator[Cells]:
    """All boards that complete this one; the cell with the fewest candidates is tried first.

    Args:
        cells: may contradict itself, and then has none.
        generator: of a random order of candidates; None tries small digits first.
    """
    size = isqrt(len(cells))
    units, units_of = _units(size), _units_of(size)
    used = [0] * len(units)  # bit d: the unit has the digit d
    for cell, digit in enumerate(cells):
        if digit:
            if any(used[unit] >> digit & 1 for unit in units_of[cell]):
                return
            for unit in units_of[cell]:
                used[unit] |= 1 << digit
    board, empty = list(cells), [cell for cell, digit in enumerate(cells) if not digit]
    everything = (1 << size + 1) - 2

    def search() -> Iterator[Cells]:
        if not empty:
            yield list(board)
            return
        fewest, place, free = size + 1, 0, 0
        for number, cell in enumerate(empty):
            row, column, box = units_of[cell]
            candidates = everything & ~(used[row] | used[column] | used[box])
            count = candidates.bit_count()
            if count < fewest:
                fewest, place, free = count, number, candidates
                if count < 2:
                    break
        if not free:
            return
        cell = empty[place]
        empty[place] = empty[-1]
        empty.pop()
        digits = [digit for digit in range(1, size + 1) if free >> digit & 1]
        if generator is not None:
            generator.shuffle(digits)
        for digit in digits:
            board[cell] = digit
            for unit in units_of[cell]:
                used[unit] ^= 1 << digit
            yield from search()
            for unit in units_of[cell]:
                used[unit] ^= 1 << digit
        empty.append(cell)
        empty[place], empty[-1] = empty[-1], empty[place]

    yield from search()


def is_unique(cells: Sequence[int]) -> bool:
    """Whether exactly one board completes this one."""
    return len(list(islice(solutions(cells), 2))) == 1


@lru_cache
def _units(size: int) -> list[list[int]]:
    """The cells of every row, column and box."""
    side, line = isqrt(size), range(size)
    rows = [[row * size + column for column in line] for row in line]
    columns = [list(column) for column in zip(*rows, strict=True)]
    boxes = [
        [(top + row) * size + left + column for row in range(side) for column in range(side)]
        for top in range(0, size, side)
        for left in range(0, size, side)
    ]
    return rows + columns + boxes


@lru_cache
def _units_of(size: int) -> list[list[int]]:
    """The row, the column and the box of every cell, as places in `_units`."""
    return [[number for number, unit in enumerate(_units(size)) if cell in unit] for cell in range(size**2)]


def _read(board: str, size: int) -> Cells | None:
    """The cells of a board; None if the text is none of this size."""
    rows = board.split("\n")
    digits = "_" + "".join(map(str, range(1, size + 1)))
    if len(rows) != size or any(len(row) != size or set(row) - set(digits) for row in rows):
        return None
    return [digits.index(symbol) for row in rows for symbol in row]


def _write(cells: Sequence[int]) -> str:
    size = isqrt(len(cells))
    symbols = "".join(str(digit or "_") for digit in cells)
    return "\n".join(symbols[start : start + size] for start in range(0, size**2, size))
