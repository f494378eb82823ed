"""Grids of symbols, one code for each cell.

Shape suffixes: N cells of one grid, row by row, 3 axes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image, ImageDraw, ImageFont

from multidiff import files
from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer

FILE = "grid.json"
PREVIEW_CELL = 20  # pixels


class GridTokenizer(ModalityTokenizer):
    r"""Tokenizes grids: texts whose lines are the rows, each symbol a cell. All rows are equally long.

    The code of a cell is the place of its symbol among `symbols`. A cell stands at (0, row, column), as a patch of a
    picture does. A grid has no EOS: its size is known beforehand.

    Args:
        symbols: the characters that a cell may hold, each once. In YAML, digits alone become a number: put another
            symbol first.

    Raises:
        ValueError: there are no symbols, one stands twice, or one would break a line.

    Examples:
        >>> tokenizer = GridTokenizer(symbols="_1234")
        >>> (codes,) = tokenizer.encode(["1_\n_2\n3_"])
        >>> codes.ids_N.tolist(), codes.size, codes.coords_N3[3].tolist()
        ([1, 0, 0, 2, 3, 0], {'rows': 3, 'columns': 2}, [0, 1, 1])
        >>> tokenizer.decode([codes])
        ['1_\n_2\n3_']
    """

    modality = "grid"
    variable_length = False

    def __init__(self, symbols: str):
        if isinstance(symbols, int | float):
            raise ValueError(
                f"symbols must be a text, not the number {symbols!r}. A configuration takes digits for a number, even "
                "in quotes. Put a symbol first that is not part of a number, such as _."
            )
        if not isinstance(symbols, str) or not symbols:
            raise ValueError(f"symbols must be a text of at least one character, not {symbols!r}")
        if len(set(symbols)) < len(symbols):
            twice = next(symbol for symbol in symbols if symbols.count(symbol) > 1)
            raise ValueError(f"symbols {symbols!r} contain {twice!r} twice. Give each symbol once.")
        if broken := [symbol for symbol in symbols if symbol.splitlines() != [symbol]]:
            raise ValueError(f"symbols {symbols!r} contain {broken[0]!r}, which breaks a line. Remove it.")
        if any("\ud800" <= symbol <= "\udfff" for symbol in symbols):
            raise ValueError(f"symbols {symbols!r} contain half of a surrogate pair, which is no character. Remove it.")
        self.symbols = symbols
        self.codebook_sizes = (len(symbols),)

    def encode(self, items: list[str]) -> list[Codes]:
        return [self._encode(item) for item in items]

    def decode(self, codes: list[Codes]) -> list[str]:
        return [self._decode(one) for one in codes]

    def canvas(self, rows: int = 9, columns: int = 9) -> Codes:
        if min(rows, columns) < 1:
            raise ValueError(f"a grid cannot have {rows} rows and {columns} columns; the smallest has 1 of each")
        row_N, column_N = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
        zero_N = torch.zeros_like(row_N)
        coords_N3 = torch.stack([zero_N, row_N, column_N], dim=1)
        return Codes(zero_N, zero_N.clone(), coords_N3, {"rows": rows, "columns": columns})

    def read(self, value: Any, folder: Path) -> str:
        """The grid itself, as its text."""
        self._rows(value)
        return value

    def write(self, item: str, stem: Path) -> Path:
        self._rows(item)
        path = stem.with_name(stem.name + ".txt")
        files.write_bytes(path, item.encode())
        return path

    def preview(self, item: str) -> Image.Image:
        """A picture of the grid. Symbols that Pillow's default font lacks appear as boxes."""
        rows, font = self._rows(item), ImageFont.load_default(14)
        width, height = (PREVIEW_CELL * number + 1 for number in (len(rows[0]), len(rows)))
        picture = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(picture)
        for y in range(0, height, PREVIEW_CELL):
            draw.line([0, y, width, y], "lightgrey")
        for x in range(0, width, PREVIEW_CELL):
            draw.line([x, 0, x, height], "lightgrey")
        for row, symbols in enumerate(rows):
            for column, symbol in enumerate(symbols):
                middle = ((column + 0.5) * PREVIEW_CELL, (row + 0.5) * PREVIEW_CELL)
                draw.text(middle, symbol, "black", font, anchor="mm")
        return picture

    def examples(self) -> list[str]:
        """A grid of one cell, and one that holds all symbols in turn."""
        columns = min(len(self.symbols), 7)
        rows = [[self.symbols[(3 * row + column) % len(self.symbols)] for column in range(columns)] for row in range(5)]
        return [self.symbols[0], "\n".join(map("".join, rows))]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the symbols in their order."""
        return hashlib.sha256(f"grid {self.symbols}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        files.write_json(folder / FILE, {"symbols": self.symbols})

    @classmethod
    def load(cls, folder: Path) -> Self:
        content = files.read_json(folder / FILE)
        try:
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / FILE} does not describe a grid tokenizer: {error}") from None

    def _encode(self, item: Any) -> Codes:
        rows = self._rows(item)
        codes = self.canvas(len(rows), len(rows[0]))
        codes.ids_N = torch.tensor([self.symbols.index(symbol) for row in rows for symbol in row])
        return codes

    def _decode(self, codes: Codes) -> str:
        text, columns = "".join(self.symbols[code] for code in codes.ids_N.tolist()), codes.size["columns"]
        return "\n".join(text[start : start + columns] for start in range(0, len(text), columns))

    def _rows(self, item: Any) -> list[str]:
        """The rows of a grid. Raises an `ItemError` for anything else."""
        if not isinstance(item, str):
            raise ItemError(f"a grid must be a string, not {repr(item)[:40]}")
        rows = item.split("\n")
        if not rows[0] or len(set(map(len, rows))) > 1:
            raise ItemError(f"the rows of the grid {item[:40]!r} must be equally long, and not empty")
        if unknown := set(item) - {"\n", *self.symbols}:
            raise ItemError(f"the grid {item[:40]!r} contains {min(unknown)!r}, which is not one of {self.symbols!r}")
        return rows
