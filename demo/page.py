"""A demo's report: samples of its model in every direction, how they come about, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from demo.metrics import DIRECTIONS, Sample
from demo.report import Card, Report, Shown, loss_panels, read_scalars
from demo.strip import watch
from multidiff import Blank, Given, MultiDiffPipeline

_GALLERIES = {  # direction: title, note, samples of each name, samples at most
    "text_to_image": (
        "Pictures from words",
        "Each picture is new; below it the caption that it was made from.",
        4,
        100,
    ),
    "text_to_audio": (
        "Speech from words",
        "Each word is spoken again. Below it the caption that it was made from.",
        1,
        20,
    ),
    "image_to_text": ("Captions of unseen pictures", "A picture, and the caption that was written for it.", 1, 100),
    "audio_to_text": ("Captions of unheard voices", "A spoken word, and the caption that was written for it.", 1, 20),
    "audio_to_image": ("Pictures from speech", "A spoken word, and the picture that was made of it.", 1, 20),
    "image_to_audio": ("Speech from pictures", "A picture, and the word that was spoken for it.", 1, 20),
}
_INTRODUCTIONS = {
    "digits": "Handwritten digits, their captions and the spoken word: one masked diffusion transformer, trained from "
    "scratch, fills in whichever is missing. All that was given here comes from the test split: handwriting and voices "
    "that it never met in training.",
    "emoji": "Emoji in colour (OpenMoji, CC BY-SA 4.0), their names and the spoken name: one masked diffusion "
    "transformer, trained from scratch, fills in whichever is missing. All that was given here comes from the test "
    "split: voices that it never met in training, and pictures that are turned, scaled and shifted as none was there. "
    "The picture tokenizer has seen most of these emoji.",
}


def write_report(
    path: Path,
    pipeline: MultiDiffPipeline,
    metrics: Mapping[str, Any],
    samples: Mapping[str, Sequence[Sample]],
    *,
    subject: str,
    names: Sequence[str],
    logs: Path,
    commands: Sequence[str],
    settings: Mapping[str, Any],
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
) -> Path:
    """Write the page.

    Args:
        path: of the HTML file.
        pipeline: the trained model; the denoising strips are made with it here.
        metrics, samples: as `demo.metrics.measure` returns them; further metrics are shown as well.
        subject, names: what the demo is about, as `demo.corpus.read_names` returns them.
        logs: where TensorBoard's event files of the training lie, at any depth.
        commands, settings: what reproduces the page.
        steps, guidance, seed: of the denoising strips.
    """
    report = Report(
        "One model, three modalities",
        f"{_INTRODUCTIONS[subject]} Samples are the first of each name, not the best.",
    )
    previews = {name: tokenizer.preview for name, tokenizer in pipeline.tokenizers.items()}
    for name, (title, note, each, most) in _GALLERIES.items():
        cards = _cards(samples[name], names, *DIRECTIONS[name], previews, each)[:most]
        report.gallery(title, note, cards, cell=12 if "speech" in DIRECTIONS[name] else 5.6)
    strips = []
    for name, title in (
        ("text_to_image", "A picture"),
        ("text_to_audio", "A sound, drawn as its spectrogram: time runs to the right"),
        ("image_to_text", "A caption"),
    ):
        given, made = DIRECTIONS[name]
        item = samples[name][seed % len(samples[name])].given
        options: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed}
        strips.append(watch(pipeline, title, Given(given, item), Blank(made), **options))
    note = "Grey is undecided; the percentage is what is decided. ∎ marks where the model ends a text."
    report.strips("Filled in step by step", note, strips)
    report.curves(
        "Training",
        "Loss in nats per token, by training step. Training panels are weighted estimates at random times; "
        "validation panels are bounds: with the other segments given, with them absent, and jointly.",
        loss_panels(read_scalars(logs)),
    )
    report.scores(
        "Scores",
        "Test split. Share of items in which the judge finds the right name: of generated ones, of the real ones, and "
        "of real ones after the tokenizer's round trip, which is the ceiling. Diversity is the mean distance between "
        "items of a name, divided by that of real ones.",
        metrics,
    )
    report.commands("Reproduce it", "The commands in order, and the settings that made this page.", commands, settings)
    return report.write(path)


def _cards(
    samples: Sequence[Sample], names: Sequence[str], given: str, made: str, previews: Mapping[str, Any], each: int
) -> list[Card]:
    """The first `each` samples of every name, one row of names after the other."""
    by_label = [[sample for sample in samples if sample.label == label][:each] for label in range(len(names))]
    return [_card(sample, names, given, made, previews) for turn in zip_longest(*by_label) for sample in turn if sample]


def _card(sample: Sample, names: Sequence[str], given: str, made: str, previews: Mapping[str, Any]) -> Card:
    right = sample.judged == sample.label
    if made == "text":
        verdict = "" if right else f" (it is: {names[sample.label]})"
        return Card([Shown(sample.given, previews[given])], sample.made + verdict, right)
    verdict = "" if right else f" (judged: {names[sample.judged] if sample.judged is not None else 'nothing'})"
    if given == "text":
        return Card([Shown(sample.made, previews[made])], sample.given + verdict, right)
    shown = [Shown(sample.given, previews[given]), Shown(sample.made, previews[made])]
    return Card(shown, names[sample.label] + verdict, right)
