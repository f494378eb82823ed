"""Damaged `metadata.jsonl`: it is read, or an error names the file and the line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

from multidiff.data.sources.folder import SPLITS, file_states, read_metadata

_VALUES = [
    *("null", "true", "-1", "1e999", "NaN", "-Infinity", "1" + "0" * 5000, '""', "[]", "{}", '"\\ud800"', '"\\u0000"'),
    *('"x.png"', '"../metadata.jsonl"', '"/dev/zero"', '"."', f'"{"a" * 5000}"', '"é"', "[" * 5000, '{"a":' * 5000),
    *('{"a": 1, "a": 2}', '{"image": "x.png", "text": "y"}', '[{"text": "a"}]', "'single'", "// comment"),
]


def prepare(folder: Path, random: Random) -> dict:
    """An empty folder and the lines of a good file."""
    folder.mkdir(exist_ok=True)
    (folder / "x.png").write_bytes(b"x")
    lines = []
    for number in range(12):
        segments = [{"text": random.choice(["a fox", "café", "七", "x.png"])}, {"image": "x.png"}][number % 2 :]
        lines.append(json.dumps({"split": random.choice(SPLITS), "segments": segments}, ensure_ascii=number % 3 == 0))
    return {"folder": folder, "lines": lines}


def attempt(state: dict, number: int, random: Random) -> str:
    """Damage one of the lines, or the file, and read it."""
    path = state["folder"] / "metadata.jsonl"
    path.write_bytes(_damaged(state["lines"], random))
    try:
        records = read_metadata(state["folder"])
    except ValueError as error:
        message = str(error)
        if not re.match(re.escape(str(path)) + r"(, line \d+| holds no document)", message) or "\n" in message:
            raise AssertionError(f"no sentence that names file and line: {message[:500]}") from error
        message.encode("utf-8", "backslashreplace")
        return "refused"
    assert all(record.split in SPLITS and record.segments and record.line > 0 for record in records)
    assert all(isinstance(name, str) for record in records for name, _ in record.segments)
    states = file_states(state["folder"], (value for record in records for _, value in record.segments))
    assert states.get("x.png", (1, 0))[0] == 1
    return "read"


def _damaged(lines: list[str], random: Random) -> bytes:
    lines = list(lines)
    number = random.randrange(len(lines))
    line = lines[number]
    start, end = sorted(random.choices(range(len(line) + 1), k=2))
    kind = random.randrange(8)
    if kind == 0:
        lines[number] = line[:start] + line[end:]
    elif kind == 1:
        lines[number] = line[:start] + random.choice(_VALUES) + line[start:]
    elif kind == 2:
        place = random.choice([match.span() for match in re.finditer(r'"[^"]*"|\[.*\]|\{[^{}]*\}', line)])
        lines[number] = line[: place[0]] + random.choice(_VALUES) + line[place[1] :]
    elif kind == 3:
        lines[number] = random.choice(_VALUES)
    elif kind == 4:
        row = json.loads(line)
        key = random.choice(["split", "segments", "file_name", "spilt", "image_file_name", "\ud800"])
        row[key] = random.choice(["x.png", 1, None, [], ["a"], {"a": 1}, [[]], "a" * 10_000, [{"\ud800": "a"}]])
        if random.random() < 0.5:
            row.pop(random.choice(list(row)))
        lines[number] = json.dumps(row)
    content = "\n".join(lines)
    if kind == 5:
        return content.encode(random.choice(["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]))
    if kind == 6:
        return content.replace("七", "ü").encode("latin-1")
    raw = bytearray(content.encode())
    if kind == 7:
        for _ in range(random.choice([1, 1, 5])):
            place = random.randrange(len(raw))
            raw[place : place + random.randrange(2)] = random.choice(
                [b"\0", b"\xff", b"\r", b"\n", random.randbytes(3)]
            )
    return bytes(raw)
