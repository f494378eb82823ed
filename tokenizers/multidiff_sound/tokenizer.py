"""SoundTokenizer: sound as frames of residual codes, whatever codec makes them.

A sound of T samples at the codec's rate becomes ⌈T / hop⌉ frames of one code per level (codebook), flattened frame by
frame: frame 0 level 0, frame 0 level 1, …, frame 1 level 0, … The first level says most; each next one what the levels
before it left out.

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

_FRAMES_AT_ONCE = (128, 2048)  # on a CPU, whose caches are small, and elsewhere


class SoundTokenizer(ModalityTokenizer):
    """Sounds of any length, sample rate and channel count; they come back mono at the codec's rate.

    Sound is mixed down, resampled and, at its end, padded with silence to whole frames. What is decoded is therefore
    up to a frame longer than what was encoded. A subclass brings the codec: the attributes, `ids_of` and `samples_of`.

    Attributes:
        model: computes both; where its parameters are, there it computes.
        sample_rate: of the codec, Hz.
        hop: samples a frame.
        codebook_sizes: the same size for each level.
        max_seconds: of a sound to encode.
    """

    modality = "audio"
    variable_length: ClassVar[bool] = True
    model: nn.Module
    sample_rate: int
    hop: int
    max_seconds: float = math.inf

    @abstractmethod
    def ids_of(self, waves_BT: Tensor) -> Tensor:
        """Samples of whole frames, mono, float32 [B, t · hop], to ids [B, t, K]."""

    @abstractmethod
    def samples_of(self, ids_BtK: Tensor) -> Tensor:
        """Ids [B, t, K] to samples, mono, float32 [B, t · hop]."""

    @torch.no_grad()
    def encode(self, items: list[Any]) -> list[Codes]:
        """Sounds (`Audio`) to codes.

        Raises:
            ItemError: no sound, one without samples, one too long, or with samples that are no finite numbers.
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
        """Codes to sounds, mono float32 in [-1, 1], `hop` samples a frame; no frames give a sound of no samples.

        Raises:
            ValueError: ids outside the codebooks, or not as many as the size asks for.
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
        """A blank sound of `frames` (about a second of them by default)."""
        if frames is None:
            frames = max(1, round(self.sample_rate / self.hop))
        if type(frames) is not int or frames < 0:
            raise ValueError(f"a sound has a whole number of frames, 0 or more, not {frames!r}")
        levels = len(self.codebook_sizes)
        levels_N = torch.arange(levels).repeat(frames)
        frames_N = torch.arange(frames).repeat_interleave(levels)
        coords_N3 = torch.stack([frames_N, levels_N, torch.zeros_like(levels_N)], dim=1)
        return Codes(torch.zeros_like(levels_N), levels_N, coords_N3, {"frames": frames})

    def read(self, value: Any, folder: Path) -> Audio:
        """The sound in a file: WAV, FLAC, OGG or MP3."""
        if not isinstance(value, str):
            raise ItemError(f"a sound is named by the path of its file, not by {value!r}")
        path = Path(folder) / value
        sound = read_sound(path)
        self._check_length(sound.waveform.shape[1] / sound.sample_rate, f"{path}: a sound")
        return sound

    def write(self, item: Any, stem: Path) -> Path:
        """Write a 16-bit WAV at the sound's own rate."""
        path = stem.with_name(f"{stem.name}.wav")
        write_sound(item, path)
        return path

    def preview(self, item: Any) -> Image.Image:
        """Its log-mel spectrogram."""
        return spectrogram(item)

    def examples(self) -> list[Audio]:
        """A rising tone; two tones in stereo at 44.1 kHz; a click shorter than a frame."""
        rate = self.sample_rate
        second_T = torch.arange(rate) / rate
        rising_T = 0.5 * torch.sin(2 * torch.pi * (100 + 500 * second_T) * second_T)
        short_T = torch.arange(13_230) / 44_100
        stereo_CT = 0.3 * torch.stack([torch.sin(2 * torch.pi * pitch * short_T) for pitch in (220.0, 330.0)])
        return [Audio(rising_T[None], rate), Audio(stereo_CT, 44_100), Audio(torch.full((1, 8), 0.5), rate)]

    def to(self, device: torch.device | str) -> Self:
        """Move the model to `device`."""
        self.model.to(device)
        return self

    @staticmethod
    def _checked_seconds(max_seconds: Any, name: str = "max_seconds") -> float:
        if type(max_seconds) not in (int, float) or not 0 < max_seconds < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, not {max_seconds!r:.80}")
        return float(max_seconds)

    def _check_length(self, seconds: float, what: str) -> None:
        if seconds > self.max_seconds:
            raise ItemError(
                f"{what} of {seconds:.1f} s is longer than max_seconds, {self.max_seconds:g}; cut it, or raise "
                "max_seconds if memory allows"
            )

    def _mapped(self, function: Callable[[Tensor], Tensor], inputs: list[Tensor], samples_each: int) -> list[Tensor]:
        """`function` of each input in batches; an entry of its first dimension stands for `samples_each`."""
        device = next(self.model.parameters()).device
        most = _FRAMES_AT_ONCE[device.type != "cpu"] * self.hop // samples_each
        outputs = iter(
            map_batches(function, [one for one in inputs if len(one)], lambda shape: most // shape[0], device)
        )
        return [next(outputs) if len(one) else torch.zeros(0) for one in inputs]
