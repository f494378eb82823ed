"""Templates: which columns of a table become which segments of a document.

[{text: caption}, {image: image}]                       one segment for each row of the list
[{speech: audio, optional: true}, {text: transcript}]   left out where the column is empty
[{image: images}, {text: question, label: question}]    a list in a column becomes several segments
[{text: captions, wordings: true}, {image: image}]      a list of wordings makes a document of each
[{text: [short, long], wordings: true}, {image: image}]   so do several columns
[{text: messages, chat: true}]                          turns of a chat; their roles become labels
[{text: "a photo of a {label}"}, {image: image}]        a text with columns in it
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SETTINGS = ("label", "optional", "wordings", "chat")
_ROLES = ("role", "from")
_CONTENTS = ("content", "value")


@dataclass(frozen=True)
class Slot:
    """One row of a template.

    Attributes:
        name: of the tokenizer.
        columns: where its items are; more than one if they are wordings of the same.
        text: what surrounds columns in a text; None where the column itself is the item.
        label: what tasks call the segment.
        optional: whether it is left out where its column is empty.
        wordings: whether several items make a document each.
        chat: whether the column holds turns, whose roles are labels.
    """

    name: str
    columns: tuple[str, ...]
    text: str | None
    label: str
    optional: bool
    wordings: bool
    chat: bool

    @classmethod
    def of(cls, row: Any, number: int) -> Slot:
        """A slot from a row of YAML.

        Raises:
            ValueError: the row is none; names its number, from 0.
        """
        where = f"template, row {number}"
        named = {key: value for key, value in row.items() if key not in _SETTINGS} if isinstance(row, Mapping) else {}
        if len(named) != 1:
            raise ValueError(
                f"{where}: expected one tokenizer name and its column, such as {{text: caption}}, got {row!r}"
            )
        ((name, column),) = named.items()
        columns = [column] if isinstance(column, str) else column
        if not isinstance(columns, Sequence) or not columns or not all(isinstance(one, str) for one in columns):
            raise ValueError(f"{where}: the column of {name!r} must be a name or a list of names, not {column!r}")
        for key in ("optional", "wordings", "chat"):
            if not isinstance(row.get(key, False), bool):
                raise ValueError(f"{where}: {key} must be true or false, not {row[key]!r}")
        chat, wordings, label = row.get("chat", False), row.get("wordings", False), row.get("label", name)
        if len(columns) > 1 and not wordings:
            raise ValueError(
                f"{where}: several columns are wordings of the same. Set wordings: true, or give each a row."
            )
        if chat and (wordings or "label" in row):
            raise ValueError(
                f"{where}: a chat has no wordings, and its roles are its labels. Leave out wordings and label."
            )
        if not isinstance(label, str) or not label or label == "others":
            raise ValueError(f"{where}: a label must be a word other than 'others', got {label!r}")
        text = None
        if any("{" in column for column in columns):
            text = columns[0]
            if len(columns) > 1 or wordings or chat:
                raise ValueError(f"{where}: a text with columns in it stands alone, without wordings or chat.")
            try:
                fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
            except ValueError as error:
                raise ValueError(f"{where}: {text!r} is no text with columns in braces ({error}).") from None
            if any(spec or conversion for _, _, spec, conversion in fields):
                raise ValueError(f"{where}: {text!r} formats a column. Only names of columns may stand in braces.")
            columns = [str(key) for _, key, _, _ in fields]
            if not columns or not all(columns):
                raise ValueError(
                    f"{where}: {text!r} names no column. Write columns in braces, as in 'a photo of a {{label}}'."
                )
        return cls(name, tuple(columns), text, label, row.get("optional", False), wordings, chat)

    def segments(self, row: Mapping[str, Any]) -> list[list[tuple[str, Any, str]]]:
        """Each wording of the segments that a row has for this slot: (tokenizer name, value, label).

        Raises:
            ValueError: the row lacks what is not optional.
        """
        values = [row.get(column) for column in self.columns]
        missing = [column for column, value in zip(self.columns, values, strict=True) if _is_empty(value)]
        if self.text is not None:
            if missing:
                return self._absent(missing)
            named = dict(zip(self.columns, values, strict=True))
            return [[(self.name, self.text.format_map(named), self.label)]]
        found = [
            one for value in values if not _is_empty(value) for one in (value if isinstance(value, list) else [value])
        ]
        found = [one for one in found if not _is_empty(one)]
        if not found:
            return self._absent(missing or list(self.columns))
        if self.wordings:
            return [[(self.name, one, self.label)] for one in found]
        if self.chat:
            return [[(self.name, content, role) for role, content in map(_turn, found)]]
        return [[(self.name, one, self.label) for one in found]]

    def _absent(self, columns: Sequence[str]) -> list[list[tuple[str, Any, str]]]:
        if self.optional:
            return [[]]
        raise ValueError(
            f"column {', '.join(map(repr, columns))} is empty. Fill it, or set optional: true for {self.name!r} in the "
            "template."
        )


@dataclass(frozen=True)
class Template:
    """How a row becomes documents.

    Attributes:
        slots: in the order of the segments.
    """

    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, rows: Any) -> Template:
        """A template from YAML.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
            raise ValueError(
                f"A template is a list of rows such as [{{text: caption}}, {{image: image}}], not {rows!r}."
            )
        return cls(tuple(Slot.of(row, number) for number, row in enumerate(rows)))

    def check(self, columns: Collection[str], tokenizers: Collection[str], where: str) -> None:
        """Refuse a template that names a column or a tokenizer that does not exist.

        Raises:
            ValueError: it lists the columns or tokenizers that there are.
        """
        for slot in self.slots:
            if slot.name not in tokenizers:
                raise ValueError(
                    f"{where}: the template names the tokenizer {slot.name!r}; the configuration has "
                    f"{', '.join(tokenizers)}"
                )
            for column in slot.columns:
                if column not in columns and not slot.optional:
                    raise ValueError(
                        f"{where} has no column {column!r}, which the template names. Its columns are "
                        f"{', '.join(columns)}."
                    )

    def documents(self, row: Mapping[str, Any]) -> list[list[tuple[str, Any, str]]]:
        """The documents of a row, one for each choice of wordings: (tokenizer name, value, label) of each segment.

        Raises:
            ValueError: the row lacks a column, or has nothing for any slot.
        """
        choices = itertools.product(*(slot.segments(row) for slot in self.slots))
        documents = [[segment for segments in choice for segment in segments] for choice in choices]
        if not all(documents):
            raise ValueError("all columns of the template are empty")
        return documents


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, list) and not value)


def _turn(message: Any) -> tuple[str, Any]:
    """Role and content of a turn."""
    if isinstance(message, Mapping):
        role = next((message[key] for key in _ROLES if isinstance(message.get(key), str)), None)
        content = next((message[key] for key in _CONTENTS if message.get(key) is not None), None)
        if role and role != "others" and content is not None:
            return role, content
    raise ValueError(f"a turn of a chat must have a role and a content, got {message!r:.100}")
