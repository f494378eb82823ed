"""How many planning problems a model solves, by the order in which it decides its answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path

from tqdm import tqdm

from demo.planning.corpus import read_family
from multidiff import Blank, Given, MaskSampler, MultiDiffPipeline
from multidiff.data import read_metadata
from multidiff.data.sources import SPLITS
from multidiff.seeding import generator_for

_LONGEST = 1000  # answers among which the one with most codes is looked for


@dataclass(frozen=True)
class SolveRate:
    """A share of problems that were solved.

    Attributes:
        solved, problems: how many.
    """

    solved: int
    problems: int

    @property
    def rate(self) -> float:
        return self.solved / self.problems

    @property
    def standard_error(self) -> float:
        """√(p (1 - p) / n) of a share p of n independent problems."""
        return math.sqrt(self.rate * (1 - self.rate) / self.problems)

    def __str__(self) -> str:
        return f"{self.rate:.3f} ± {self.standard_error:.3f}"


def read_problems(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """The questions and answers of each split."""
    problems: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for record in read_metadata(folder):
        (_, question), (_, answer) = record.segments
        problems[record.split].append((question, answer))
    return problems


def answer_all(
    pipeline: MultiDiffPipeline,
    name: str,
    questions: Sequence[str],
    size: dict[str, int],
    order: str,
    seed: int,
    batch: int,
) -> list[str]:
    """The model's answers, each code the most probable one at its place, one code a step.

    Args:
        pipeline: the model. Its sampler of `name` is replaced.
        name: the tokenizer of questions and answers.
        questions: one for each document.
        size: of the canvases of answers.
        order: of decoding, see `multidiff.MaskSampler`.
        seed: of a random order; a question has the same order in every batch.
        batch: documents that are answered at a time.
    """
    steps = len(pipeline.tokenizers[name].canvas(**size))
    pipeline.samplers[name] = MaskSampler(order=order, unmasking="linear", temperature=0.0, num_inference_steps=steps)
    answers = []
    for start in tqdm(range(0, len(questions), batch), desc=order, leave=False, disable=None):
        numbers = range(start, min(start + batch, len(questions)))
        documents = [[Given(name, questions[number]), Blank(name, **size)] for number in numbers]
        generators = [generator_for(seed, "planning", number) for number in numbers]
        answers += [document[1].item for document in pipeline(documents, generator=generators).documents]
    return answers


def measure(
    pipeline: MultiDiffPipeline, folder: Path, orders: Sequence[str] | None, num_samples: int, seed: int, batch: int
) -> dict[str, dict[str, SolveRate]]:
    """The solve rates on the test split of a data folder: by order, and of each by the number of givens, after "all".

    Canvases of answers are as large as the largest answer of the training split, and its EOS.

    Args:
        pipeline: a model that was trained on problems of the folder's family.
        folder: `demo.planning.corpus.prepare` wrote it.
        orders: of decoding; None is confidence, margin, left_to_right (row_scan on a grid) and random, and only the
            third of these for an autoregressive model, which has no other.
        num_samples: problems, the first ones of the split.
        seed, batch: see `answer_all`.

    Raises:
        ValueError: the folder holds something else, or the model has no tokenizer for its problems.
    """
    family = read_family(folder)
    name = family.tokenizer
    if name not in pipeline.tokenizers:
        raise ValueError(
            f"The model has no tokenizer {name!r}, which the questions in {folder} need. It has "
            f"{', '.join(pipeline.tokenizers)}."
        )
    problems = read_problems(folder)
    tokenizer = pipeline.tokenizers[name]
    # To tokenize the longest texts is enough, and takes no time where there are many problems.
    longest = nlargest(_LONGEST, (answer for _, answer in problems["train"]), key=len)
    size = dict(max(tokenizer.encode(longest), key=len).size)
    if tokenizer.variable_length:
        size = {unit: number + 1 for unit, number in size.items()}
    questions = [question for question, _ in problems["test"][:num_samples]]
    givens = [family.givens(question) for question in questions]
    pipeline.set_progress_bar_config(disable=True)
    rates: dict[str, dict[str, SolveRate]] = {}
    reading = "left_to_right" if bool(tokenizer.canvas().coords_N3[:, 0].any()) else "row_scan"
    is_causal = pipeline.transformer.pattern.is_autoregressive
    if is_causal and orders and list(orders) != [reading]:
        raise ValueError(f"An autoregressive model decides its answers in the order {reading}. Leave --orders out.")
    for order in orders or ([reading] if is_causal else ["confidence", "margin", reading, "random"]):
        answers = answer_all(pipeline, name, questions, size, order, seed, batch)
        solved = [family.solves(*pair) for pair in zip(questions, answers, strict=True)]
        rates[order] = {"all": SolveRate(sum(solved), len(solved))}
        for number in sorted({number for number in givens if number is not None}):
            of_number = [one for one, other in zip(solved, givens, strict=True) if other == number]
            rates[order][str(number)] = SolveRate(sum(of_number), len(of_number))
    return rates
