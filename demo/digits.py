"""The demo's data folder: handwritten digits, captions and spoken words, in an ordinary folder of multidiff's format.

A document is about one digit and holds two or three of: a caption, a picture, a sound. Which ones, and in what order,
varies. Pictures are real handwriting (MNIST), each of one document; one of the training split is also turned, scaled,
sheared and shifted a little, `moved` times, each time for one document more. Spoken words come from a smaller pool of
clips, those of the training split also played a little faster or slower, `moved` times (Ko et al. 2015, "Audio
augmentation for speech recognition"); the voices of the validation and test splits speak nowhere in training.
"""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine
from tqdm import tqdm

from demo.speech import DIGITS, SAMPLE_RATE, VOICES, Utterance, speak

MNIST = Path(__file__).parent / "data" / "mnist10k.npz"
VERSION = 5  # of what this file makes: one more makes everybody's data anew

KINDS = {
    ("text", "image"): 0.35,
    ("text", "speech"): 0.15,
    ("image", "speech"): 0.25,
    ("text", "image", "speech"): 0.25,
}
WORDINGS = ("{}", "the digit {}")
WORDINGS_WITH = {"image": ("a handwritten {}",), "speech": ("a spoken {}",)}
SPEEDS = (150, 170, 190, 210)  # words a minute
PITCHES = (32, 41, 50, 59, 68)  # of 99
CLIPS = {"train": 0.2, "validation": 0.025, "test": 0.03}  # clips per picture of all splits together
MOVED = 2  # moved copies of a picture or clip of the training split, unless it is said
WRITTEN_RATE = 16000  # Hz


def prepare(
    output: Path,
    *,
    seed: int = 0,
    num: int = 10_000,
    moved: int = MOVED,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Write the data folder, unless it is there already.

    The pictures are `numpy.random.default_rng(seed).permutation(10000)` of MNIST's, the first `num` of them: 80 % for
    training, 10 % for validation, 10 % for test. An interrupted run leaves nothing that could be taken for whole.

    Args:
        output: the folder; one made with other settings is replaced.
        seed: decides everything.
        num: number of pictures, 20 to 10,000; each has a document, and one more for each moved copy.
        moved: moved copies of each picture and clip of the training split; the other splits don't depend on it.
        force: make it anew even if it is there.
        progress: show bars.

    Raises:
        ValueError: an impossible `num` or `moved`, or an `output` that holds something else.
    """
    if not 20 <= num <= 10_000:
        raise ValueError(f"--num must be 20 to 10000, got {num}")
    if moved < 0:
        raise ValueError(f"--moved must be 0 or more, got {moved}")
    stamp = {"seed": seed, "num": num, "moved": moved, "version": VERSION}
    made = output / "prepared.json"
    if made.is_file():
        if not force and json.loads(made.read_text(encoding="utf-8")) == stamp:
            return output
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} holds something else; name a new folder or remove it")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    (partial / "speech").mkdir()
    _fill(partial, seed, num, moved, progress)
    (partial / "prepared.json").write_text(json.dumps(stamp) + "\n", encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)
    return output


def digit_of(path: str) -> int:
    """The digit that a file of the folder is about: its name starts with the word."""
    return DIGITS.index(Path(path).stem.split("-")[0])


def is_real(path: str) -> bool:
    """Whether a file of the folder is no moved copy."""
    return "-moved" not in path


def split_of(num: int, index: int) -> str:
    """The split of the `index`-th picture of the permutation."""
    return "train" if index < num * 8 // 10 else "validation" if index < num * 9 // 10 else "test"


def captions(digit: int, kind: tuple[str, ...]) -> list[str]:
    """All captions of a digit in a document of this kind (its tokenizers' names)."""
    wordings = [*WORDINGS, *(wording for name in kind for wording in WORDINGS_WITH.get(name, ()))]
    return [wording.format(DIGITS[digit]) for wording in wordings]


def _fill(folder: Path, seed: int, num: int, moved: int, progress: bool) -> None:
    with np.load(MNIST) as mnist:
        order = np.random.default_rng(seed).permutation(len(mnist["x"]))[:num]
        pictures, labels = np.pad(mnist["x"][order], ((0, 0), (2, 2), (2, 2))), mnist["y"][order]
    clips = _write_clips(folder, seed, num, moved, progress)
    kinds = list(KINDS)
    total = num + moved * (num * 8 // 10)
    with (
        (folder / "metadata.jsonl").open("w", encoding="utf-8") as file,
        tqdm(total=total, desc="writing documents", disable=not progress) as bar,
    ):
        for number, split in enumerate(CLIPS):
            random = np.random.default_rng([seed, 1, number])
            indices = [index for index in range(num) if split_of(num, index) == split]
            for copy, index in product(range(1 + moved * (split == "train")), indices):
                digit, kind = int(labels[index]), kinds[random.choice(len(kinds), p=list(KINDS.values()))]
                segments = []
                for name in (kind[place] for place in random.permutation(len(kind))):
                    if name == "text":
                        value = str(random.choice(captions(digit, kind)))
                    elif name == "image":
                        value = f"images/{DIGITS[digit]}-{order[index]:05}{f'-moved{copy}' if copy else ''}.png"
                        picture = _moved(pictures[index], random) if copy else pictures[index]
                        Image.fromarray(picture).save(folder / value, compress_level=1)
                    else:
                        value = str(random.choice(clips[split, digit]))
                    segments.append({name: value})
                file.write(json.dumps({"split": split, "segments": segments}) + "\n")
                bar.update()


def _moved(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Turned by up to 14°, scaled by up to 15 %, shifted by up to 2 pixels, sheared by up to 10°."""
    angle, scale, right, down, shear = random.uniform(-1, 1, 5) * (14, 0.15, 2, 2, 10)
    pixels = torch.from_numpy(picture)[None]
    return affine(pixels, angle, [right, down], 1 + scale, [shear, 0.0], InterpolationMode.BILINEAR)[0].numpy()


def _write_clips(folder: Path, seed: int, num: int, moved: int, progress: bool) -> dict[tuple[str, int], list[str]]:
    """Speak and write every clip; file names by split and digit."""
    random = np.random.default_rng([seed, 2])
    planned = [
        (split, digit, utterance)
        for split, share in CLIPS.items()
        for digit in range(10)
        for utterance in _utterances(DIGITS[digit], VOICES[split], max(1, round(num * share / 10)), random)
    ]
    sounds = speak([utterance for *_, utterance in planned], progress=progress)
    clips: dict[tuple[str, int], list[str]] = {}
    for (split, digit, said), sound in zip(planned, _resampled(sounds), strict=True):
        for copy in range(1 + moved * (split == "train")):
            value = f"speech/{said.text}-{said.voice}-{said.speed}-{said.pitch}{f'-moved{copy}' if copy else ''}.flac"
            soundfile.write(folder / value, _played(sound, random) if copy else sound, WRITTEN_RATE)
            clips.setdefault((split, digit), []).append(value)
    return clips


def _played(sound: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """At 0.9 to 1.2 times its speed, and its pitch with it."""
    places = np.arange(0, len(sound) - 1, random.uniform(0.9, 1.2))
    return np.interp(places, np.arange(len(sound)), sound)


def _utterances(word: str, voices: tuple[str, ...], count: int, random: np.random.Generator) -> list[Utterance]:
    """`count` ways to say a word, no two alike, every voice about as often as every other."""
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
