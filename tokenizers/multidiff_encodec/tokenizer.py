"""EncodecTokenizer: tokenizes sound with an EnCodec model.

Shape suffixes: K levels, t frames, B sounds, T samples.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Self

from encodec.model import EncodecModel
from torch import Tensor

from multidiff_encodec.folder import inference_state, keep_codebooks, read_codec, write_codec
from multidiff_encodec.model import PRESETS
from multidiff_sound import SoundTokenizer
from multidiff_sound.folder import CONFIG, fingerprint_of, read_json

_SHIPPED = Path(__file__).parent / "weights"
_MOST_SECONDS = 120.0


class EncodecTokenizer(SoundTokenizer):
    """Tokenizes sounds of any length, sample rate and number of channels. Decoded sounds are mono at the codec's rate.

    Args:
        weights: a shipped codec for spoken words ("words-8khz" has 25 frames per second, each with one of 64 codes;
            "words-16khz" has 50, each with three of 1,024 codes), a folder that `save` or a training wrote, a folder
            with transformers' `EncodecModel`, or the file of Meta's 24 kHz checkpoint.
        codebooks: the number of levels to use, from the first; None uses all. Meta's model has 32 levels (24 kbit/s)
            and was trained for 2, 4, 8, 16 and 32 of them.
        max_seconds: the maximum length of a sound to encode. A codec processes a sound as a whole.

    Raises:
        ValueError: `max_seconds` is not a finite number above 0, or the weights are missing, damaged, of a stereo
            model, or have fewer levels; the message names the file.
    """

    model: EncodecModel

    def __init__(self, weights: str = "words-8khz", codebooks: int | None = None, max_seconds: float = _MOST_SECONDS):
        self.max_seconds = self._checked_seconds(max_seconds)
        self.model, config = read_codec(_find(weights))
        self.config = config if codebooks is None else keep_codebooks(self.model, config, codebooks)
        self.sample_rate, self.hop = self.config.sample_rate, self.config.hop
        self.codebook_sizes = (self.config.codebook_size,) * self.config.codebooks

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the configuration, and over the names, shapes and values of the weights."""
        return fingerprint_of(asdict(self.config), inference_state(self.model))

    def save(self, folder: Path) -> None:
        """Write the levels in use as the folder of a codec, with `max_seconds` in its configuration."""
        write_codec(self.model, self.config, Path(folder), settings={"max_seconds": self.max_seconds})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The tokenizer that `save` wrote into `folder`."""
        folder = Path(folder).resolve()  # an absolute path cannot be the name of a shipped codec
        seconds = read_json(folder / CONFIG).get("max_seconds", _MOST_SECONDS)  # version 0.1 wrote none
        return cls(str(folder), max_seconds=cls._checked_seconds(seconds, f"{folder / CONFIG}: max_seconds"))

    def ids_of(self, waves_BT: Tensor) -> Tensor:
        (codes_BKt, _), *_ = self.model.encode(waves_BT[:, None])
        return codes_BKt.transpose(1, 2)

    def samples_of(self, ids_BtK: Tensor) -> Tensor:
        return self.model.decode([(ids_BtK.transpose(1, 2), None)])[:, 0]


def _find(weights: str) -> Path:
    shipped = sorted(config.parent.name for config in _SHIPPED.glob("*/config.json"))
    if weights in shipped:
        return _SHIPPED / weights
    path = Path(weights)
    if path.exists():
        return path
    if weights in PRESETS:
        raise ValueError(
            f"There are no shipped weights for {weights!r}. Train them with `multidiff fit --config tokenizers/…` and "
            "give their folder, or give a checkpoint file."
        )
    raise ValueError(
        f"{weights!r} is neither a folder or file with a codec, nor a shipped codec ({', '.join(shipped)})"
    )
