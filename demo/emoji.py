"""The emoji demo's data folder: OpenMoji in colour, captions and spoken names, as `demo.corpus` writes them.

There is one picture of each emoji: each document has a turned, scaled, sheared and shifted one of its own, and the test
split has others than the training split; its voices were never heard in training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from demo.corpus import Corpus, Picture, is_current, write
from demo.openmoji import catalogue, draw

_NAMES = """
    airplane ambulance anchor balloon banana bell bicycle bread broccoli bus butterfly cactus camel camera
    candle carrot castle cherries coconut cookie crab crown cupcake dolphin donkey dragon drum eagle egg
    elephant envelope flamingo fountain fox ghost giraffe gorilla grapes guitar hamburger hammer hedgehog
    helicopter koala ladder lemon leopard lion lipstick lobster magnet mango microscope monkey mountain mouse
    mushroom octopus owl panda parrot pencil penguin pineapple pizza poodle popcorn pretzel rabbit raccoon
    rainbow robot rocket sailboat scissors snowman spider star sunflower sushi taco taxi telescope tiger tomato
    toothbrush tractor train trophy trumpet tulip turtle umbrella unicorn violin volcano waffle watermelon wolf
    zebra
"""
NAMES = tuple(_NAMES.split())
SIZE = 32  # pixels a side
# Of how far the tokenizer's own pictures were moved: codes of four pixels change with the least of it, and each way has
# to be learned in minutes.
_MOVED = 1 / 3


def prepare(output: Path, *, pictures: int, seed: int = 0, force: bool = False, progress: bool = True) -> Path:
    """Write the data folder, unless it is there already.

    Args:
        output: the folder; one made with other settings is replaced.
        pictures: of each emoji to train on, 1 to 1,000; there are an eighth as many for validation, a sixth for test.
        seed: decides everything.
        force: make it again even if it is there.
        progress: show bars.

    Raises:
        ValueError: an impossible `pictures`, or an `output` that holds something else.
        ImportError: the pictures, their names or the voices are not installed.
    """
    if not 1 <= pictures <= 1000:
        raise ValueError(f"--pictures must be 1 to 1000, got {pictures}")
    stamp = {"subject": "emoji", "seed": seed, "pictures": pictures}
    if not is_current(output, stamp) or force:
        write(corpus(pictures, seed), output, stamp, seed=seed, moved=0, progress=progress)
    return output


def corpus(pictures: int, seed: int) -> Corpus:
    """Pictures of each emoji, and what is said and written of them."""
    characters = catalogue()
    counts = {"train": pictures, "validation": -(-pictures // 8), "test": -(-pictures // 6)}
    drawn: dict[str, list[Picture]] = {}
    for number, (split, count) in enumerate(counts.items()):
        random = np.random.default_rng([seed, 3, number])
        drawn[split] = [
            Picture(label, f"{split}{copy:03}", draw(characters[name], SIZE, random, _MOVED))
            for copy in range(count)
            for label, name in enumerate(NAMES)
        ]
    return Corpus(
        names=NAMES,
        pictures=drawn,
        clips={split: -(-count * 5 // 8) for split, count in counts.items()},
        wordings=("{}", "the {}"),
        wordings_with={"image": ("picture of {}",), "speech": ("say {}",)},
    )
