"""The sounds of a data folder, in batches of equal length, for training a codec.

Shape suffixes: B sounds, T samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from multidiff.data import BatchedData, ShuffledBatches
from multidiff.seeding import generator_for
from multidiff_autoencoder.data import paths_of
from multidiff_sound.sound import read_sound, to_mono


class SoundData(BatchedData):
    """The sounds in a data folder's `metadata.jsonl`, once per epoch, as float32 [B, 1, T].

    For training, a longer sound is cut at a random place, a shorter one is put at a random place in silence, and the
    volume is reduced at random. Validation takes the middle and keeps the volume.

    Args:
        folder: Data folder.
        sample_rate: Sample rate in Hz. The default is that of the trained codec.
        samples: T, the number of samples of each sound. A multiple of the codec's hop.
        name: Key of the sounds in `metadata.jsonl`.
        batch_size: Number of sounds per batch and device.
        quieter: Maximum reduction of the volume, in dB.
        num_workers: Number of processes that read ahead.
        seed: Random seed for order, cuts and volume.

    Raises:
        ValueError: the folder has no sounds for training or validation, a sound cannot be read, or the sample rate or
            length does not fit the codec; the message names it.
    """

    def __init__(
        self,
        folder: str,
        sample_rate: int | None = None,
        samples: int = 16_000,
        name: str = "speech",
        batch_size: int = 16,
        quieter: float = 6.0,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.folder, self._name, self.sample_rate, self.samples = Path(folder), name, sample_rate, samples
        self._rate = sample_rate
        self.batch_size, self.quieter, self.num_workers, self.seed = batch_size, quieter, num_workers, seed

    def suit(self, preset: str, sample_rate: int, hop: int) -> None:
        """Adopt the sample rate of the trained codec, unless the data's configuration sets one.

        Args:
            preset: the name of the codec, for errors.
            sample_rate: the codec's sample rate, Hz.
            hop: samples per frame.

        Raises:
            ValueError: the data's configuration sets another rate, or a length that is not whole frames.
        """
        if self.sample_rate not in (None, sample_rate):
            raise ValueError(
                f"SoundData has sample_rate {self.sample_rate}, but preset {preset!r} has {sample_rate}. Remove "
                "sample_rate, or choose another preset."
            )
        if self.samples < 1 or self.samples % hop:
            raise ValueError(f"SoundData has samples {self.samples}, but preset {preset!r} needs a multiple of {hop}")
        self._rate = sample_rate

    def train_dataloader(self) -> StatefulDataLoader:
        sounds = _Cuts(
            paths_of(self.folder, self._name, "train"), self._known_rate(), self.samples, self.quieter, self.seed
        )
        batches = ShuffledBatches(len(sounds), self.batch_size, self.seed, *self.rank())
        return self._loader(sounds, batches)

    def val_dataloader(self) -> StatefulDataLoader:
        return self._evaluation("validation")

    def test_dataloader(self) -> StatefulDataLoader:
        return self._evaluation("test")

    def _evaluation(self, split: str) -> StatefulDataLoader:
        sounds, (rank, ranks) = (
            _Middles(paths_of(self.folder, self._name, split), self._known_rate(), self.samples),
            self.rank(),
        )
        # A rank without batches would make the others wait.
        keys = [(0, index) for index in range(rank, len(sounds), ranks)] or [(0, 0)]
        batches = [keys[start : start + 64] for start in range(0, len(keys), 64)]
        return self._loader(sounds, batches)

    def _loader(self, sounds: Dataset, batches: Any) -> StatefulDataLoader:
        alone = torch.Generator()  # instead of the global one
        return StatefulDataLoader(sounds, batch_sampler=batches, num_workers=self.num_workers, generator=alone)

    def _known_rate(self) -> int:
        if self._rate is None:
            raise ValueError("Pass SoundData together with EncodecTraining, or set sample_rate.")
        return self._rate


class _Middles(Dataset[Tensor]):
    """The middle of each sound, padded with silence. Sounds are cached at the codec's rate."""

    def __init__(self, paths: list[Path], sample_rate: int, samples: int):
        self.paths, self.sample_rate, self.samples = paths, sample_rate, samples
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return self._cut(key[1], 0.5)

    def _cut(self, index: int, where: float) -> Tensor:
        if index not in self._kept:
            self._kept[index] = to_mono(read_sound(self.paths[index]), self.sample_rate)
        waveform_T = self._kept[index]
        spare = self.samples - len(waveform_T)
        before = int(where * abs(spare))
        if spare < 0:
            return waveform_T[None, before : before + self.samples]
        return F.pad(waveform_T[None], (before, spare - before))


class _Cuts(_Middles):
    """A random cut of each sound at a random volume. Seed, epoch and index determine both."""

    def __init__(self, paths: list[Path], sample_rate: int, samples: int, quieter: float, seed: int):
        super().__init__(paths, sample_rate, samples)
        self.quieter, self.seed = quieter, seed

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        where, loudness = torch.rand(2, generator=generator_for(self.seed, *key)).tolist()
        return self._cut(key[1], where) * 10 ** (-self.quieter * loudness / 20)
