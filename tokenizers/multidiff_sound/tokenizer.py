"""SoundTokenizer: sound as frames of residual codes, for any codec.

A sound of T samples at the codec's rate becomes ⌈T / hop⌉ frames. Each frame has one code per level (codebook), and the
frames are flattened: frame 0 level 0, frame 0 level 1, …, frame 1 level 0, … The first level carries most of the sound.
Each further level encodes what remains.

Shape suffixes: N codes of one sound, K levels, t frames, B sounds, T samples.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from multidiff.plugins.batching import map_batches
from multidiff.tokenizer import Audio, Codes, ItemError, ModalityTokenizer
from multidiff_sound.sound import read_sound, spectrogram, to_mono, write_sound

_FRAMES_AT_ONCE = (128, 2048)  # on a CPU, which has small caches, and on other devices


class SoundTokenizer(ModalityTokenizer):
    """Tokenizes sounds of any length, sample rate and number of channels. Decoded sounds are mono at the codec's rate.

    A sound is mixed down, resampled, and padded with silence at its end to whole frames. A decoded sound is therefore
    up to one frame longer than its original. A subclass provides the codec: the attributes, `ids_of` and `samples_of`.

    Attributes:
        model: the codec; it computes on the device of its parameters.
        sample_rate: the codec's sample rate, Hz.
        hop: samples per frame.
        codebook_sizes: the number of codes of each level; all are equal.
        max_seconds: the maximum length of a sound to encode.
    """

    modality = "audio"
    variable_length: ClassVar[bool] = True
    model: nn.Module
    sample_rate: int
    hop: int
    max_seconds: float = math.inf

    @abstractmethod
    def ids_of(self, waves_BT: Tensor) -> Tensor:
        """Encode mono samples of whole frames, float32 [B, t · hop], as ids [B, t, K]."""

    @abstractmethod
    def samples_of(self, ids_BtK: Tensor) -> Tensor:
        """Decode ids [B, t, K] to mono samples, float32 [B, t · hop]."""

    @torch.no_grad()
    def encode(self, items: list[Any]) -> list[Codes]:
        """Encode sounds (`Audio`).

        Raises:
            ItemError: an item is not a sound, has no samples, is too long, or has samples that are not finite.
        """
        waves = []
        for item in items:
            wave_T = to_mono(item, self.sample_rate)
            self._check_length(len(wave_T) / self.sample_rate, "a sound")
            waves.append(F.pad(wave_T, (0, -len(wave_T) % self.hop)))
        all_codes = []
        for ids_tK in self._mapped(self.ids_of, waves, samples_each=1):
            codes = self.canvas(frames=len(ids_tK))
            codes.ids_N = ids_tK.flatten()
            all_codes.append(codes)
        return all_codes

    @torch.no_grad()
    def decode(self, codes: list[Codes]) -> list[Audio]:
        """Decode sounds: mono, float32 in [-1, 1], `hop` samples per frame.

        Raises:
            ValueError: ids are outside the codebooks, or their number does not match the size.
        """
        grids = []
        for one in codes:
            blank = self.canvas(**one.size)
            if len(one) != len(blank):
                raise ValueError(f"a sound of size {one.size} has {len(blank)} codes, not {len(one)}")
            if not bool(((one.ids_N >= 0) & (one.ids_N < self.codebook_sizes[0])).all()):
                raise ValueError(f"ids of a sound must lie in [0, {self.codebook_sizes[0]})")
            grids.append(one.ids_N.reshape(-1, len(self.codebook_sizes)))
        waves = self._mapped(self.samples_of, grids, samples_each=self.hop)
        return [Audio(wave_T.clamp(-1, 1)[None], self.sample_rate) for wave_T in waves]

    def canvas(self, frames: int | None = None) -> Codes:
        """A blank sound of `frames` frames, by default about one second."""
        if frames is None:
            frames = max(1, round(self.sample_rate / self.hop))
        if type(frames) is not int or frames < 0:
            raise ValueError(f"frames must be a whole number of at least 0, got {frames!r}")
        levels = len(self.codebook_sizes)
        levels_N = torch.arange(levels).repeat(frames)
        frames_N = torch.arange(frames).repeat_interleave(levels)
        coords_N3 = torch.stack([frames_N, levels_N, torch.zeros_like(levels_N)], dim=1)
        return Codes(torch.zeros_like(levels_N), levels_N, coords_N3, {"frames": frames})

    def read(self, value: Any, folder: Path) -> Audio:
        """Read a WAV, FLAC, OGG or MP3 file."""
        if not isinstance(value, str):
            raise ItemError(f"a sound must be given as the path of its file, got {value!r}")
        path = Path(folder) / value
        sound = read_sound(path)
        self._check_length(sound.waveform.shape[1] / sound.sample_rate, f"{path}: a sound")
        return sound

    def write(self, item: Any, stem: Path) -> Path:
        """Write a 16-bit WAV file at the sound's own rate."""
        path = stem.with_name(f"{stem.name}.wav")
        write_sound(item, path)
        return path

    def preview(self, item: Any) -> Image.Image:
        """The log-mel spectrogram of a sound."""
        return spectrogram(item)

    def examples(self) -> list[Audio]:
        """A rising tone, two tones in stereo at 44.1 kHz, and a click that is shorter than a frame."""
        rate = self.sample_rate
        second_T = torch.arange(rate) / rate
        rising_T = 0.5 * torch.sin(2 * torch.pi * (100 + 500 * second_T) * second_T)
        short_T = torch.arange(13_230) / 44_100
        stereo_CT = 0.3 * torch.stack([torch.sin(2 * torch.pi * pitch * short_T) for pitch in (220.0, 330.0)])
        return [Audio(rising_T[None], rate), Audio(stereo_CT, 44_100), Audio(torch.full((1, 8), 0.5), rate)]

    def dimensions(self, codes: Codes) -> tuple[float, str]:
        """Seconds, so that bits per second compare with the bit rate of the codec."""
        return codes.size["frames"] * self.hop / self.sample_rate, "second"

    def to(self, device: torch.device | str) -> Self:
        """Move the model to `device`."""
        self.model.to(device)
        return self

    @staticmethod
    def _checked_seconds(max_seconds: Any, name: str = "max_seconds") -> float:
        if type(max_seconds) not in (int, float) or not 0 < max_seconds < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {max_seconds!r:.80}")
        return float(max_seconds)

    def _check_length(self, seconds: float, what: str) -> None:
        if seconds > self.max_seconds:
            raise ItemError(
                f"{what} of {seconds:.1f} s is longer than max_seconds, {self.max_seconds:g}. Split it, or raise "
                "max_seconds if memory allows."
            )

    def _mapped(self, function: Callable[[Tensor], Tensor], inputs: list[Tensor], samples_each: int) -> list[Tensor]:
        """Apply `function` to each input, in batches. `samples_each` is the number of samples per row of an input."""
        device = next(self.model.parameters()).device
        most = _FRAMES_AT_ONCE[device.type != "cpu"] * self.hop // samples_each
        outputs = iter(
            map_batches(function, [one for one in inputs if len(one)], lambda shape: most // shape[0], device)
        )
        return [next(outputs) if len(one) else torch.zeros(0) for one in inputs]
