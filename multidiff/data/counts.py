"""What a split holds, counted: orders of segments and sizes of items."""

from __future__ import annotations

from collections import Counter
from typing import cast

from datasets import Dataset

from multidiff.data.length import Selection
from multidiff.sequence.seen import Orders, Sizes

_ROWS_PER_READ = 10_000


def count(rows: Dataset, selection: Selection) -> tuple[Orders, Sizes]:
    """How many documents have which tokenizers in which order, and how many items which size, by tokenizer.

    Args:
        rows: the shards of a split.
        selection: its documents. The size of an item that is cut, and does not end, says nothing of canvases.
    """
    orders: Orders = Counter()
    sizes: dict[str, Counter[str]] = {}
    times = Counter(selection.rows)
    cut = {selection.rows[document] for document in selection.parts}
    columns = rows.select_columns(["names", "sizes"])
    number = 0
    for batch in columns.iter(batch_size=_ROWS_PER_READ):
        chunk = cast("dict[str, list[list[str]]]", batch)
        for names, of_row in zip(chunk["names"], chunk["sizes"], strict=True):
            orders[tuple(names)] += times[number]
            if times[number] and number not in cut:
                for name, size in zip(names, of_row, strict=True):
                    sizes.setdefault(name, Counter())[size] += 1
            number += 1
    for document, parts in selection.parts.items():
        for name, part in zip(columns[selection.rows[document]]["names"], parts, strict=True):
            if part.ends:
                sizes.setdefault(name, Counter())[part.size] += 1
    return +orders, sizes  # without those of documents that are left out
