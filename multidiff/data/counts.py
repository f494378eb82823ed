"""What a split holds, counted: orders and labels of segments, and sizes of items."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple, cast

from datasets import Dataset

from multidiff.data.length import Selection
from multidiff.sequence.seen import Orders, Sizes

_ROWS_PER_READ = 10_000


class Counts(NamedTuple):
    """How often each order, size and label occurs in a split.

    Attributes:
        orders: documents by the names of their tokenizers, in order.
        sizes: items by size (JSON), by tokenizer. The size of an item that is cut, and does not end, says nothing of
            canvases and is left out.
        labels: segments by label.
    """

    orders: Orders
    sizes: Sizes
    labels: Counter[str]


def count(rows: Dataset, selection: Selection) -> Counts:
    """Count the documents of a selection of these shards."""
    orders: Orders = Counter()
    sizes: dict[str, Counter[str]] = {}
    labels: Counter[str] = Counter()
    copies = Counter(selection.rows)
    cut = {selection.rows[document] for document in selection.parts}
    columns = rows.select_columns(["names", "labels", "sizes"])
    number = 0
    for batch in columns.iter(batch_size=_ROWS_PER_READ):
        chunk = cast("dict[str, list[list[str]]]", batch)
        for names, of_labels, of_sizes in zip(chunk["names"], chunk["labels"], chunk["sizes"], strict=True):
            if copies[number]:
                orders[tuple(names)] += copies[number]
                labels.update(of_labels * copies[number])
                if number not in cut:
                    for name, size in zip(names, of_sizes, strict=True):
                        sizes.setdefault(name, Counter())[size] += 1
            number += 1
    for document, parts in selection.parts.items():
        for name, part in zip(columns[selection.rows[document]]["names"], parts, strict=True):
            if part.ends:
                sizes.setdefault(name, Counter())[part.size] += 1
    return Counts(orders, sizes, labels)
