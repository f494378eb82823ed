"""A tokenizer of symbols on a grid: boards, mazes, Sudoku, small maps."""

from multidiff_grid.grid import GridTokenizer

__all__ = ["GridTokenizer"]
