"""Data folders of planning problems: what a family of problems is, and how its problems are split and written."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from pathlib import Path
from typing import ClassVar, Protocol

from tqdm import tqdm

from demo.planning.countdown import Countdown
from demo.planning.path_star import PathStar
from demo.planning.sudoku import Sudoku
from multidiff import files

STAMP = "planning.json"
HELD_OUT = 0.1  # of all problems belong to the validation split, and as many to the test split
_MOST_MISSES = 10_000  # problems in a row that no split needs


class Family(Protocol):
    """A family of problems: it draws them, and verifies answers.

    Attributes:
        name: what it is called in `planning.json` and on the command line.
        tokenizer: the key of the segments in `metadata.jsonl`.
    """

    name: ClassVar[str]
    tokenizer: ClassVar[str]

    def draw(self, generator: random.Random) -> tuple[str, str]:
        """A question and a right answer."""
        ...

    def key(self, question: str) -> int:
        """A number of 64 bits that is the same for questions that are the same in other words. It decides the split."""
        ...

    def givens(self, question: str) -> int | None:
        """How much of the answer a question gives, by which results are told apart; None where all give the same."""
        ...

    def solves(self, question: str, answer: str) -> bool:
        """Whether an answer is right. Any text is an answer."""
        ...


FAMILIES: dict[str, type[Sudoku] | type[PathStar] | type[Countdown]] = {
    family.name: family for family in (Sudoku, PathStar, Countdown)
}


def prepare(output: Path, family: Family, *, train: int, held_out: int, seed: int = 0) -> Path:
    """Write a data folder of problems, unless it is there already.

    No question stands twice in it. Whether a question is for training, for validation or for the test follows from its
    `key` alone. So no question of one split is a question of another in other words, whatever the seeds.

    Args:
        output: the folder; one of the same family with other settings is replaced.
        family: the problems.
        train: problems to train on.
        held_out: problems of the validation split and of the test split, each.
        seed: of the generator that draws the problems.

    Raises:
        ValueError: a number of problems below 1, fewer problems than asked for, or an `output` that holds something
            else.
    """
    if train < 1 or held_out < 1:
        raise ValueError(f"There must be at least 1 problem in each split, not {train} and {held_out}.")
    stamp = {"family": family.name, **vars(family), "train": train, "held_out": held_out, "seed": seed}
    if (output / STAMP).is_file():
        made = files.read_json(output / STAMP)
        if made == stamp:
            return output
        if made.get("family") != family.name:
            raise ValueError(f"{output} holds problems of the family {made.get('family')!r}. Choose another folder.")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} holds something else. Choose a new folder or remove it.")
    lines = _documents(family, {"train": train, "validation": held_out, "test": held_out}, random.Random(seed))
    with files.whole_folder(output) as folder:
        (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        files.write_json(folder / STAMP, stamp)
    return output


def read_family(folder: Path) -> Family:
    """The family of the problems in a data folder.

    Raises:
        ValueError: `prepare` did not write the folder; the message names the file.
    """
    settings = files.read_json(folder / STAMP)
    try:
        family = FAMILIES[settings["family"]]
        return family(**{field.name: settings[field.name] for field in fields(family)})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / STAMP} does not describe planning problems ({error})") from None


def split_of(key: int) -> str:
    """The split of a problem with this key."""
    share = key / 2**64
    return "test" if share < HELD_OUT else "validation" if share < 2 * HELD_OUT else "train"


def _documents(family: Family, sizes: dict[str, int], generator: random.Random) -> list[str]:
    """The lines of `metadata.jsonl`, in the order in which they were drawn."""
    lines, left, drawn, misses = [], dict(sizes), set(), 0
    bar = tqdm(total=sum(sizes.values()), desc="drawing problems", leave=False, disable=None)
    while any(left.values()):
        question, answer = family.draw(generator)
        split = split_of(family.key(question))
        if question in drawn or not left[split]:
            misses += 1
            if misses == _MOST_MISSES:
                wanted = ", ".join(f"{number} for {split}" for split, number in left.items() if number)
                raise ValueError(f"There are not enough problems: {wanted} could not be found. Ask for fewer.")
            continue
        drawn.add(question)
        left[split], misses = left[split] - 1, 0
        segments = [{family.tokenizer: question, "label": "question"}, {family.tokenizer: answer, "label": "answer"}]
        lines.append(json.dumps({"split": split, "segments": segments}))
        bar.update()
    bar.close()
    return lines
