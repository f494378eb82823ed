"""Write a data folder of spoken words: the ten digits and several hundred other words, in many voices.

The codecs `words-8khz` and `words-16khz` are trained on such (`multidiff fit --config
configs/tokenizers/encodec_words.yaml`, and `encodec_words_16khz.yaml` with `--train 12000`). Voices of the
validation and test splits are never heard in training, and are the same as those of the digits data.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path

import soundfile
import torch
import torchaudio
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.speech import DIGITS, SAMPLE_RATE, VOICES, WORDS, Utterance, speak

FILE_RATE = 16_000  # Hz
DIGIT_SHARE = 0.35


def main() -> None:
    """Write the data folder of the codecs of spoken words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the data folder to write")
    parser.add_argument("--train", type=int, default=6000, help="clips to train on (default %(default)s)")
    parser.add_argument("--held-out", type=int, default=600, help="clips for each other split (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides words, voices, speeds, pitches")
    parser.add_argument("--processes", type=int, help="synthesizers at a time (default: one a CPU core)")
    arguments = parser.parse_args()

    generator = random.Random(arguments.seed)
    sizes = {"train": arguments.train, "validation": arguments.held_out, "test": arguments.held_out}
    plan = [(split, _utterance(split, generator)) for split, size in sizes.items() for _ in range(size)]
    sounds = speak([utterance for _, utterance in plan], processes=arguments.processes)

    (arguments.output / "speech").mkdir(parents=True, exist_ok=True)
    lines = []
    for index, ((split, utterance), sound) in enumerate(zip(tqdm(plan, desc="writing"), sounds, strict=True)):
        name = f"speech/{index:05d}-{utterance.text}.flac"
        resampled = torchaudio.functional.resample(torch.from_numpy(sound), SAMPLE_RATE, FILE_RATE)
        soundfile.write(arguments.output / name, resampled.clamp(-1, 1).numpy(), FILE_RATE)
        lines.append(json.dumps({"split": split, "segments": [{"text": utterance.text}, {"speech": name}]}))
    beside = arguments.output / "metadata.jsonl.part"
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(beside, arguments.output / "metadata.jsonl")
    print(f"{len(lines)} clips in {arguments.output}")


def _utterance(split: str, generator: random.Random) -> Utterance:
    words = DIGITS if generator.random() < DIGIT_SHARE else WORDS
    return Utterance(
        text=generator.choice(words),
        voice=generator.choice(VOICES[split]),
        speed=generator.randint(110, 165),
        pitch=generator.randint(25, 75),
    )


if __name__ == "__main__":
    main()
