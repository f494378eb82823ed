"""What the training documents of a model were like: the orders of their segments, and the sizes of their canvases.

A model answers well only what resembles its training. One that has always seen a text before a picture reads a picture
before a text badly, and one that has seen canvases of 18 to 21 tokens fills 32 badly, both without a sign of it. So
these facts are kept with the model: they make the defaults of generation, and a request outside of them is remarked on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MOST_ORDERS = 1000
_SHARE = 0.95  # of the items fit the usual canvas

Orders = Counter[tuple[str, ...]]
Sizes = Mapping[str, Counter[str]]


@dataclass(frozen=True)
class SeenDocuments:
    """Facts of a training split.

    Attributes:
        orders: tokenizer names of documents, in order, the most frequent first; in the order of the vocabulary where
            training shuffled them. Empty where there are more than a thousand.
        shuffled: whether training shuffled the segments of a document.
        sizes: name -> entry of the size -> the least and the greatest that a canvas had.
        canvas: name -> size of a blank: where length varies, one that holds 95 % of the items and their end; else the
            most frequent size.
    """

    orders: tuple[tuple[str, ...], ...]
    shuffled: bool
    sizes: dict[str, dict[str, tuple[int, int]]]
    canvas: dict[str, dict[str, int]]

    @classmethod
    def of(
        cls,
        orders: Orders,
        sizes: Sizes,
        shuffled: bool,
        max_eos_padding: Mapping[str, int],
        varies: Mapping[str, bool],
    ) -> SeenDocuments:
        """The facts, from counts.

        Args:
            orders: how many documents had these names, in this order.
            sizes: name -> how many items had this size, as JSON.
            shuffled: as above.
            max_eos_padding: name -> most units behind an item; not named: see `most_units`.
            varies: name -> whether its length varies.
        """
        if shuffled:
            places = {name: place for place, name in enumerate(varies)}
            merged: Orders = Counter()
            for order, number in orders.items():
                merged[tuple(sorted(order, key=places.__getitem__))] += number
            orders = merged
        ranges, canvas = {}, {}
        for name, counts in sizes.items():
            found = [(json.loads(size), number) for size, number in counts.items()]
            if not varies[name]:
                canvas[name] = max(found, key=lambda pair: pair[1])[0]
                ranges[name] = {
                    key: (min(size[key] for size, _ in found), max(size[key] for size, _ in found))
                    for key in canvas[name]
                }
                continue
            ((unit, _),) = found[0][0].items()
            lengths = Counter({size[unit]: number for size, number in found})
            usual = usual_units(lengths)
            canvas[name] = {unit: usual}
            longest = max(
                most_units(length, usual, max_eos_padding.get(name)) for length in (max(lengths), min(lengths))
            )
            ranges[name] = {unit: (min(lengths) + 1, longest)}
        kept = tuple(order for order, _ in orders.most_common()) if len(orders) <= _MOST_ORDERS else ()
        return cls(kept, shuffled, ranges, canvas)

    def order_of(self, names: Sequence[str]) -> list[int] | None:
        """How to order segments of these names as training documents had them: the places of `names`, or None where no
        training document held all of them."""
        if self._has(names):
            return list(range(len(names)))
        for order in self.orders:
            left = list(range(len(names)))
            places = []
            for name in order:
                place = next((place for place in left if names[place] == name), None)
                if place is not None:
                    left.remove(place)
                    places.append(place)
            if not left:
                return places
        return None

    def remarks(self, segments: Sequence[tuple[str, Mapping[str, int]]]) -> list[str]:
        """What a document asks for beyond training: sentences, none where all is well.

        Args:
            segments: names in order, each with the size of its canvas.
        """
        remarks = []
        names = [name for name, _ in segments]
        if self.orders and not self._has(names):
            places = self.order_of(names)
            if places is None:
                remarks.append(f"No training document of this model held the segments {', '.join(names)} together.")
            else:
                remarks.append(
                    f"This model was not trained on segments in the order {', '.join(names)}. "
                    f"Put them in the order {', '.join(names[place] for place in places)}."
                )
        for name, size in segments:
            for key, value in size.items():
                least, most = self.sizes.get(name, {}).get(key, (value, value))
                if not least <= value <= most:
                    remarks.append(
                        f"This model was trained on canvases of {least} to {most} {key} of {name}, not of {value}. "
                        "Expect worse results outside of that."
                    )
        return remarks

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return {
            "orders": [list(order) for order in self.orders],
            "shuffled": self.shuffled,
            "sizes": {name: {key: list(ends) for key, ends in size.items()} for name, size in self.sizes.items()},
            "canvas": self.canvas,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> SeenDocuments:
        """Inverse of `to_dict`; `ValueError` naming `where` if it is damaged."""
        try:
            orders = tuple(tuple(map(_name, order)) for order in data["orders"])
            sizes = {
                _name(name): {_name(key): (_number(least), _number(most)) for key, (least, most) in size.items()}
                for name, size in data["sizes"].items()
            }
            canvas = {
                _name(name): {_name(key): _number(value) for key, value in size.items()}
                for name, size in data["canvas"].items()
            }
            if not isinstance(data["shuffled"], bool):
                raise TypeError("shuffled is neither true nor false")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where} does not say what the training documents were like ({error})") from None
        return cls(orders, data["shuffled"], sizes, canvas)

    def _has(self, names: Sequence[str]) -> bool:
        """Whether segments of these names stood in this order in a training document, perhaps with others between."""
        if self.shuffled:
            return any(not Counter(names) - Counter(order) for order in self.orders)
        for order in self.orders:
            rest = iter(order)
            if all(name in rest for name in names):
                return True
        return False


def usual_units(lengths: Counter[int]) -> int:
    """The smallest canvas that holds 95 % of items of these lengths, and the unit that ends them."""
    wanted, total = _SHARE * lengths.total(), 0
    for length in sorted(lengths):
        total += lengths[length]
        if total >= wanted:
            return length + 1
    raise AssertionError("no lengths")


def most_units(length: int, usual: int, max_eos_padding: int | None) -> int:
    """The largest canvas for an item of `length` units in training; the smallest has one unit more than the item.

    By default it reaches up to the usual canvas, which generation fills in, and to a quarter of the item at least.
    """
    return length + max_eos_padding if max_eos_padding is not None else max(usual, length + max(1, -(-length // 4)))


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a name")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a whole number")
    return value
