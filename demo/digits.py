"""The digits demo's data folder: handwriting (MNIST), captions and spoken digits, as `demo.corpus` writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from demo.corpus import Corpus, Picture, is_current, write
from demo.speech import DIGITS

MNIST = Path(__file__).parent / "data" / "mnist10k.npz"
CLIPS = {"train": 0.2, "validation": 0.025, "test": 0.03}  # clips per picture of all splits together
NUM_AUGMENTATIONS = 2  # moved copies of a picture or clip of the training split, unless it is said


def prepare(
    output: Path,
    *,
    seed: int = 0,
    num_samples: int = 10_000,
    num_augmentations: int = NUM_AUGMENTATIONS,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Write the data folder, unless it is there already.

    The pictures are `numpy.random.default_rng(seed).permutation(10000)` of MNIST's, the first `num_samples` of them: 80
    % for training, 10 % for validation, 10 % for test.

    Args:
        output: the folder; one made with other settings is replaced.
        seed: decides everything.
        num_samples: number of pictures, 20 to 10,000; each has a document, and one more for each moved copy.
        num_augmentations: moved copies of each picture and clip of the training split; the other splits don't depend on
            it.
        force: make it again even if it is there.
        progress: show bars.

    Raises:
        ValueError: an impossible `num_samples` or `num_augmentations`, or an `output` that holds something else.
    """
    if not 20 <= num_samples <= 10_000:
        raise ValueError(f"--num-samples must be 20 to 10000, got {num_samples}")
    if num_augmentations < 0:
        raise ValueError(f"--num-augmentations must be 0 or more, got {num_augmentations}")
    stamp = {"subject": "digits", "seed": seed, "num": num_samples, "moved": num_augmentations}
    if not is_current(output, stamp) or force:
        write(corpus(num_samples, seed), output, stamp, seed=seed, moved=num_augmentations, progress=progress)
    return output


def corpus(num: int, seed: int) -> Corpus:
    """The first `num` pictures, and what is said and written of them."""
    with np.load(MNIST) as mnist:
        order = np.random.default_rng(seed).permutation(len(mnist["x"]))[:num]
        pixels, labels = np.pad(mnist["x"][order], ((0, 0), (2, 2), (2, 2))), mnist["y"][order]
    pictures: dict[str, list[Picture]] = {split: [] for split in CLIPS}
    for index, place in enumerate(order):
        pictures[split_of(num, index)].append(Picture(int(labels[index]), f"{place:05}", pixels[index]))
    return Corpus(
        names=DIGITS,
        pictures=pictures,
        clips={split: max(1, round(num * share / 10)) for split, share in CLIPS.items()},
        wordings=("{}", "the digit {}"),
        wordings_with={"image": ("a handwritten {}",), "speech": ("a spoken {}",)},
    )


def split_of(num: int, index: int) -> str:
    """The split of the `index`-th picture of the permutation."""
    return "train" if index < num * 8 // 10 else "validation" if index < num * 9 // 10 else "test"
