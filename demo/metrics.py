"""What the model makes of a demo's test split, in six directions, and how well, by judges that it has never met.

Every score stands as `{"score", "real", "reconstruction", "n"}`: the same judge's score on `n` generated items, on the
real items of the same documents, and on what the tokenizer makes of those. The last is the ceiling.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from demo.corpus import is_real, label_of, read_names
from demo.judges import CaptionJudge, ColourJudge, ImageJudge, Judge, PocketsphinxJudge, SpeechJudge
from multidiff import Blank, Given, MultiDiffPipeline
from multidiff.data.sources.folder import Record, read_metadata
from multidiff.seeding import generator_for

DIRECTIONS = {  # name: (tokenizer of what is given, tokenizer of what is made)
    "image_to_text": ("image", "text"),
    "audio_to_text": ("speech", "text"),
    "text_to_image": ("text", "image"),
    "audio_to_image": ("speech", "image"),
    "text_to_audio": ("text", "speech"),
    "image_to_audio": ("image", "speech"),
}


@dataclass(frozen=True)
class Sample:
    """One test document in one direction.

    Attributes:
        label: of the name that the document is about.
        given: the item that was given.
        made: what the model made of it.
        real: the document's own item in place of `made`.
        source: how `metadata.jsonl` names `real`.
        nfe: forward passes of the denoiser.
        judged: the label that the judge gives `made`; None where it gives none.
    """

    label: int
    given: Any
    made: Any
    real: Any
    source: str
    nfe: int
    judged: int | None


class Names(Protocol):
    """A judge: names the class of each item, -1 for none."""

    def predict(self, items: Sequence[Any]) -> Tensor: ...


def measure(
    pipeline: MultiDiffPipeline,
    folder: Path,
    *,
    num: int = 320,
    opinions: int = 60,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 160,
    progress: bool = True,
) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """Generate in all six directions from documents of the test split, and judge.

    Args:
        pipeline: a trained model with tokenizers `text`, `image`, `speech`.
        folder: the demo's data folder; its training split trains the judges.
        num: documents per direction (fewer where the split has fewer).
        opinions: how many of them pocketsphinx hears as well.
        steps, guidance: of sampling; None takes what is saved with the model.
        seed: of the judges, and of sampling: document i draws from a generator of its own.
        batch_size: documents generated at a time.
        progress: show bars.

    Returns:
        metrics by name, and the samples by direction.
    """
    _, names = read_names(folder)
    judges = fit_judges(pipeline, folder, seed=seed, progress=progress)
    records = read_metadata(folder, splits=("test",))
    chosen = {name: pairs_of(records, *pair)[:num] for name, pair in DIRECTIONS.items()}
    samples: dict[str, list[Sample]] = {}
    reconstructions: dict[str, list[Any]] = {}
    metrics: dict[str, Any] = {}
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=sum(map(len, chosen.values())), desc="generating", disable=not progress) as bar:
        for name, (given, made) in DIRECTIONS.items():
            samples[name] = []
            for start in range(0, len(chosen[name]), batch_size):
                values = chosen[name][start : start + batch_size]
                items = [pipeline.tokenizers[given].read(value, folder) for value, _ in values]
                output = pipeline(
                    [[Given(given, item), Blank(made)] for item in items],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=[generator_for(seed, start + index) for index in range(len(items))],
                )
                judged = judges[made].predict([document[1].item for document in output.documents]).tolist()
                samples[name] += [
                    Sample(
                        label=label_of(value[1] if given == "text" else value[0], names),
                        given=item,
                        made=document[1].item,
                        real=pipeline.tokenizers[made].read(value[1], folder),
                        source=value[1],
                        nfe=nfe,
                        judged=named if named >= 0 else None,
                    )
                    for value, item, document, nfe, named in zip(
                        values, items, output.documents, output.nfe, judged, strict=True
                    )
                ]
                bar.update(len(items))
    for name, (_, made) in tqdm(DIRECTIONS.items(), desc="judging", disable=not progress):
        reconstructions[name] = reconstruct(pipeline, made, [sample.real for sample in samples[name]])
        metrics[name] = accuracy(judges[made], samples[name], reconstructions[name])
    for name in tqdm(("text_to_audio", "image_to_audio"), desc="second opinion", disable=not progress):
        heard = samples[name][:opinions]
        metrics[f"{name}_pocketsphinx"] = accuracy(PocketsphinxJudge(names), heard, reconstructions[name][:opinions])
    metrics["diversity"] = {
        "image": diversity(judges["image"], samples["text_to_image"], reconstructions["text_to_image"]),
        "audio": diversity(judges["speech"], samples["text_to_audio"], reconstructions["text_to_audio"]),
    }
    metrics["nfe"] = {name: sum(sample.nfe for sample in some) / len(some) for name, some in samples.items()}
    return metrics, samples


def fit_judges(pipeline: MultiDiffPipeline, folder: Path, *, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """A judge for each tokenizer by name, trained on the real training split where it needs training."""
    _, names = read_names(folder)
    records = read_metadata(folder, splits=("train",))
    judges: dict[str, Any] = {"text": CaptionJudge(names)}
    for name in ("image", "speech"):
        values = sorted(
            {value for record in records for key, value in record.segments if key == name and is_real(value)}
        )
        reading = tqdm(values, desc=f"reading {name}", disable=not progress, leave=False)
        items = [pipeline.tokenizers[name].read(value, folder) for value in reading]
        judge = SpeechJudge if name == "speech" else ImageJudge if items[0].mode == "L" else ColourJudge
        judges[name] = judge.fit(items, [label_of(value, names) for value in values], seed=seed, progress=progress)
    return judges


def reconstruct(pipeline: MultiDiffPipeline, name: str, items: Sequence[Any], chunk: int = 160) -> list[Any]:
    """Items after a tokenizer's round trip."""
    tokenizer = pipeline.tokenizers[name]
    parts = [list(items[start : start + chunk]) for start in range(0, len(items), chunk)]
    return [item for part in parts for item in tokenizer.decode(tokenizer.encode(part))]


def accuracy(judge: Names, samples: Sequence[Sample], reconstructions: Sequence[Any]) -> dict[str, float]:
    """Share of items that the judge gives the document's label."""
    labels_N = torch.tensor([sample.label for sample in samples])

    def share(items: Sequence[Any]) -> float:
        return round((judge.predict(items) == labels_N).double().mean().item(), 4)

    return {
        "score": share([sample.made for sample in samples]),
        "real": share([sample.real for sample in samples]),
        "reconstruction": share(reconstructions),
        "n": len(samples),
    }


def diversity(judge: Judge, samples: Sequence[Sample], reconstructions: Sequence[Any]) -> dict[str, float]:
    """Mean pairwise distance within a class, divided by that of real items; the mean over classes.

    Distance is Euclidean between the judge's input arrays: pixels of a picture; log-mel of a sound, trimmed and
    centred in 0.96 s. Only items that the judge puts into the right class count, so that noise does not pass for
    diversity; a class with fewer than two of them has none. `real` is 1 by definition.
    """
    distinct = list({sample.source: index for index, sample in enumerate(samples)}.values())
    real = _spread(judge, [samples[i].real for i in distinct], [samples[i].label for i in distinct])
    made = _spread(judge, [sample.made for sample in samples], [sample.label for sample in samples])
    again = _spread(judge, [reconstructions[i] for i in distinct], [samples[i].label for i in distinct])
    classes = [label for label, spread in real.items() if spread > 0]

    def ratio(spread: Mapping[int, float]) -> float:
        return round(sum(spread[label] / real[label] for label in classes) / max(1, len(classes)), 4)

    return {"score": ratio(made), "real": ratio(real), "reconstruction": ratio(again), "n": len(samples)}


def bounds(test: Mapping[str, float]) -> dict[str, Any]:
    """`multidiff test`'s results ("test/text/conditional": 1.2, "test/joint": 2.3) by tokenizer, in nats per token."""
    nested: dict[str, Any] = {}
    for key, value in test.items():
        stage, *path = key.split("/")
        if stage == "test" and path:
            place = nested
            for part in path[:-1]:
                place = place.setdefault(part, {})
            place[path[-1]] = round(float(value), 4)
    return nested


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def pairs_of(records: Sequence[Record], given: str, made: str) -> list[tuple[str, str]]:
    """(given, made) values of the documents that hold both."""
    segments = [dict(record.segments) for record in records]
    return [(row[given], row[made]) for row in segments if given in row and made in row]


def _spread(judge: Judge, items: Sequence[Any], labels: Sequence[int]) -> dict[int, float]:
    """Mean pairwise distance of the items rightly named, by label; 0 where there are fewer than two."""
    labels_N = torch.tensor(labels)
    right_N = judge.predict(items) == labels_N
    flat_ND = judge.arrays(items).flatten(1)
    spread = {}
    for label in sorted(set(labels)):
        mine_MD = flat_ND[right_N & (labels_N == label)]
        spread[label] = torch.pdist(mine_MD).mean().item() if len(mine_MD) > 1 else 0.0
    return spread
