"""A demo's data folder: named pictures, captions and spoken names, in an ordinary folder of multidiff's format.

A document is about one name and holds two or three of: a caption, a picture, a sound. Which ones, and in what order,
varies. Each picture is of one document; one of the training split is also turned, scaled, sheared and shifted a little,
`moved` times, each time for one document more. Spoken names come from a smaller pool of clips, those of the training
split also played a little faster or slower, `moved` times (Ko et al. 2015, "Audio augmentation for speech
recognition"); the voices of the validation and test splits speak nowhere in training.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine
from tqdm import tqdm

from demo.speech import SAMPLE_RATE, VOICES, Utterance, speak

KINDS = {
    ("text", "image"): 0.35,
    ("text", "speech"): 0.15,
    ("image", "speech"): 0.25,
    ("text", "image", "speech"): 0.25,
}
SPEEDS = (150, 170, 190, 210)  # words a minute
PITCHES = (32, 41, 50, 59, 68)  # of 99
WRITTEN_RATE = 16000  # Hz
VERSION = 7  # of what the demos' data modules make: one more makes all data again
_STAMP = "prepared.json"


@dataclass(frozen=True)
class Picture:
    """A picture of something that has a name.

    Attributes:
        name: index of the name.
        source: what tells it from all others of its name, without "-".
        pixels: uint8 [H, W] grey or [H, W, 3].
    """

    name: int
    source: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """What a data folder is about.

    Attributes:
        names: in the order of their labels.
        pictures: by split, in this order.
        clips: spoken names of each split, of each name.
        wordings: of captions, {} for the name.
        wordings_with: of captions beside a picture or a sound, by what else the document holds.
    """

    names: tuple[str, ...]
    pictures: Mapping[str, Sequence[Picture]]
    clips: Mapping[str, int]
    wordings: tuple[str, ...]
    wordings_with: Mapping[str, tuple[str, ...]]

    def captions(self, name: int, kind: tuple[str, ...]) -> list[str]:
        """All captions of a name in a document of this kind (its tokenizers' names)."""
        wordings = [*self.wordings, *(wording for other in kind for wording in self.wordings_with.get(other, ()))]
        return [wording.format(self.names[name]) for wording in wordings]


def is_current(output: Path, stamp: Mapping[str, Any]) -> bool:
    """Whether `output` holds a data folder that was made with these settings.

    Args:
        output: the folder.
        stamp: the settings, the subject among them.

    Raises:
        ValueError: it holds something else than a data folder of this subject.
    """
    made = output / _STAMP
    about = json.loads(made.read_text(encoding="utf-8")) if made.is_file() else None
    if about is not None and about.get("subject", stamp["subject"]) == stamp["subject"]:
        return about.items() >= {**stamp, "version": VERSION}.items()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} holds something else; name a new folder or remove it")
    return False


def write(corpus: Corpus, output: Path, stamp: Mapping[str, Any], *, seed: int, moved: int, progress: bool) -> None:
    """Write the data folder, in place of one made with other settings.

    Args:
        corpus: what to write.
        output: the folder.
        stamp: the settings that it is made with, as `is_current` has them.
        seed: decides kinds, captions, voices, moves and order.
        moved: moved copies of each picture and clip of the training split; the other splits don't depend on it.
        progress: show bars.
    """
    with replaced(output, stamp, corpus.names) as folder:
        (folder / "images").mkdir()
        (folder / "speech").mkdir()
        _fill(corpus, folder, seed, moved, progress)


@contextmanager
def replaced(output: Path, stamp: Mapping[str, Any], names: Sequence[str]) -> Iterator[Path]:
    """An empty folder that takes the place of `output` once it is filled; an interrupted run leaves nothing that could
    be taken for whole."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    about = {**stamp, "version": VERSION, "names": names}
    (partial / _STAMP).write_text(json.dumps(about) + "\n", encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)


def read_names(folder: Path) -> tuple[str, tuple[str, ...]]:
    """What a data folder of ours is about, and its names in the order of their labels.

    Raises:
        ValueError: it is none of ours, or of another version.
    """
    path = folder / _STAMP
    if not path.is_file():
        raise ValueError(f"{path} is missing: {folder} is no data folder that scripts/prepare_digits.py or "
                         "scripts/prepare_emoji.py wrote")  # fmt: skip
    about = json.loads(path.read_text(encoding="utf-8"))
    if about["version"] != VERSION:
        raise ValueError(f"{folder} was made by another version of the script that writes it; run that again")
    return about["subject"], tuple(about["names"])


def label_of(path: str, names: Sequence[str]) -> int:
    """The label that a file of the folder is about: its name starts with the word."""
    return names.index(Path(path).stem.split("-")[0])


def is_real(path: str) -> bool:
    """Whether a file of the folder is no moved copy."""
    return "-moved" not in path


def label_in(text: str, names: Sequence[str]) -> int | None:
    """The label of the name in a text; None when it holds none, or more than one."""
    named = [names.index(word) for word in re.findall(r"[a-z]+", text.lower()) if word in names]
    return named[0] if len(named) == 1 else None


def moved_a_little(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A grey picture turned by up to 14°, scaled by up to 15 %, shifted by up to 2 pixels, sheared by up to 10°; black
    comes in."""
    angle, scale, right, down, shear = random.uniform(-1, 1, 5) * (14, 0.15, 2, 2, 10)
    plane_1HW = torch.from_numpy(pixels)[None]
    return affine(plane_1HW, angle, [right, down], 1 + scale, [shear, 0.0], InterpolationMode.BILINEAR)[0].numpy()


def _fill(corpus: Corpus, folder: Path, seed: int, moved: int, progress: bool) -> None:
    clips = _write_clips(corpus, folder, seed, moved, progress)
    kinds = list(KINDS)
    copies = {split: 1 + moved * (split == "train") for split in corpus.pictures}
    with (
        (folder / "metadata.jsonl").open("w", encoding="utf-8") as file,
        tqdm(
            total=sum(copies[split] * len(some) for split, some in corpus.pictures.items()),
            desc="writing documents",
            disable=not progress,
        ) as bar,
    ):
        for number, (split, pictures) in enumerate(corpus.pictures.items()):
            random = np.random.default_rng([seed, 1, number])
            for copy, picture in product(range(copies[split]), pictures):
                kind = kinds[random.choice(len(kinds), p=list(KINDS.values()))]
                segments = []
                for tokenizer in (kind[place] for place in random.permutation(len(kind))):
                    if tokenizer == "text":
                        value = str(random.choice(corpus.captions(picture.name, kind)))
                    elif tokenizer == "image":
                        stem = f"{corpus.names[picture.name]}-{picture.source}{f'-moved{copy}' if copy else ''}"
                        value = f"images/{stem}.png"
                        assert not (folder / value).exists(), value
                        pixels = moved_a_little(picture.pixels, random) if copy else picture.pixels
                        Image.fromarray(pixels).save(folder / value, compress_level=1)
                    else:
                        value = str(random.choice(clips[split, picture.name]))
                    segments.append({tokenizer: value})
                file.write(json.dumps({"split": split, "segments": segments}) + "\n")
                bar.update()


def _write_clips(
    corpus: Corpus, folder: Path, seed: int, moved: int, progress: bool
) -> dict[tuple[str, int], list[str]]:
    """Speak and write every clip; file names by split and label."""
    random = np.random.default_rng([seed, 2])
    planned = [
        (split, label, utterance)
        for split, count in corpus.clips.items()
        for label, name in enumerate(corpus.names)
        for utterance in _utterances(name, VOICES[split], count, random)
    ]
    sounds = speak([utterance for *_, utterance in planned], progress=progress)
    clips: dict[tuple[str, int], list[str]] = {}
    for (split, label, said), sound in zip(planned, _resampled(sounds), strict=True):
        for copy in range(1 + moved * (split == "train")):
            value = f"speech/{said.text}-{said.voice}-{said.speed}-{said.pitch}{f'-moved{copy}' if copy else ''}.flac"
            soundfile.write(folder / value, _played(sound, random) if copy else sound, WRITTEN_RATE)
            clips.setdefault((split, label), []).append(value)
    return clips


def _played(sound: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """At 0.9 to 1.2 times its speed, and its pitch with it."""
    places = np.arange(0, len(sound) - 1, random.uniform(0.9, 1.2))
    return np.interp(places, np.arange(len(sound)), sound)


def _utterances(word: str, voices: tuple[str, ...], count: int, random: np.random.Generator) -> list[Utterance]:
    """`unmasking` ways to say a word, no two alike, every voice about as often as every other."""
    styles = list(product(SPEEDS, PITCHES))
    manners = {voice: random.permutation(len(styles)) for voice in voices}
    turns = [(round_, voice) for round_ in range(-(-count // len(voices))) for voice in random.permutation(voices)]
    return [Utterance(word, str(voice), *styles[manners[voice][round_]]) for round_, voice in turns[:count]]


def _resampled(sounds: list[np.ndarray], chunk: int = 256) -> list[np.ndarray]:
    """From `SAMPLE_RATE` to `WRITTEN_RATE`, many at a time."""
    resampled = []
    for start in range(0, len(sounds), chunk):
        some = [torch.from_numpy(sound) for sound in sounds[start : start + chunk]]
        padded = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        written = torchaudio.functional.resample(padded, SAMPLE_RATE, WRITTEN_RATE).clamp(-1, 1).numpy()
        lengths = [len(sound) * WRITTEN_RATE // SAMPLE_RATE for sound in some]
        resampled += [row[:length] for row, length in zip(written, lengths, strict=True)]
    return resampled
