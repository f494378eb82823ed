"""Judges of generated items, independent of the model they judge.

Each is trained on real items, or is somebody else's recognizer; its score on real items belongs beside every score
it gives to generated ones.

Shape suffixes: B batch, N items, K classes, C channels, H, W pixels, F mel bands, T frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import pocketsphinx
import torch
import torch.nn.functional as F
import torchaudio
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from demo.corpus import label_in
from multidiff.tokenizer import Audio


class Judge(ABC):
    """A small classifier: items to arrays, arrays through a network.

    Subclasses say how an item becomes an array (`arrays`), how arrays vary in training (`augment`) and what network
    looks at them. Predictions are deterministic; the global random state is left alone.
    """

    epochs: ClassVar[int]
    peak_learning_rate: ClassVar[float] = 6e-3
    batch_size: ClassVar[int] = 64

    def __init__(self, classifier: nn.Module):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.classifier = classifier.to(self.device)

    @classmethod
    @abstractmethod
    def network(cls, classes: int) -> nn.Sequential:
        """A fresh network: arrays [B, C, H, W] to logits [B, K]."""

    @classmethod
    @abstractmethod
    def arrays(cls, items: Sequence[Any]) -> Tensor:
        """Items as float32 [N, C, H, W] in [0, 1]."""

    @staticmethod
    @abstractmethod
    def augment(arrays_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Arrays that vary as real items do, without changing class."""

    @classmethod
    def fit(cls, items: Sequence[Any], labels: Sequence[int] | Tensor, *, seed: int, progress: bool = True) -> Self:
        """Train on real items.

        Args:
            items: what `predict` takes.
            labels: a class in [0, classes) for each item.
            seed: decides initial weights, order and augmentation.
            progress: show a bar.
        """
        labels_N = torch.as_tensor(labels, dtype=torch.int64)
        if len(items) == 0 or len(items) != len(labels_N):
            raise ValueError(f"a judge needs one label for each item; got {len(items)} items, {len(labels_N)} labels")
        arrays_NCHW = cls.arrays(items)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            judge = cls(cls.network(int(labels_N.max()) + 1))
        judge._train(arrays_NCHW, labels_N, torch.Generator().manual_seed(seed), progress)
        return judge

    @torch.no_grad()
    def predict(self, items: Sequence[Any]) -> Tensor:
        """The class of each item, int64 [N]."""
        if len(items) == 0:
            return torch.empty(0, dtype=torch.int64)
        self.classifier.eval()
        chunks = (chunk.to(self.device) for chunk in self.arrays(items).split(512))
        return torch.cat([self.classifier(chunk).argmax(-1).cpu() for chunk in chunks])

    def _train(self, arrays_NCHW: Tensor, labels_N: Tensor, generator: torch.Generator, progress: bool) -> None:
        batches = [
            batch
            for _ in range(self.epochs)
            for batch in torch.randperm(len(labels_N), generator=generator).split(self.batch_size)
        ]
        optimizer = torch.optim.AdamW(self.classifier.parameters(), weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.peak_learning_rate, total_steps=len(batches) + 1, pct_start=0.2
        )
        self.classifier.train()
        for batch in tqdm(batches, desc=f"training {type(self).__name__}", disable=not progress, leave=False):
            arrays_BCHW = self.augment(arrays_NCHW[batch], generator).to(self.device)
            logits_BK = self.classifier(arrays_BCHW)
            loss = F.cross_entropy(logits_BK, labels_N[batch].to(self.device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


class ImageJudge(Judge):
    """Names the class of grey 32x32 pictures (any mode and size is converted)."""

    epochs = 5
    mode: ClassVar[str] = "L"

    @classmethod
    def network(cls, classes: int) -> nn.Sequential:
        return nn.Sequential(
            *_block(len(cls.mode), 16, kernel=5, stride=2), *_block(16, 32), nn.MaxPool2d(2),
            *_block(32, 64), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, classes),
        )  # fmt: skip

    @classmethod
    def arrays(cls, items: Sequence[Image.Image]) -> Tensor:
        """Pictures as float32 [N, C, 32, 32] in [0, 1]."""
        converted = (item.convert(cls.mode) for item in items)
        fitted = (item if item.size == (32, 32) else item.resize((32, 32)) for item in converted)
        arrays = np.stack([np.asarray(item, dtype=np.float32).reshape(32, 32, -1) for item in fitted])
        return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous() / 255

    @staticmethod
    def augment(arrays_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Turn, scale, slant and move each picture a little; what comes in is like its first pixel."""
        jitter_B23 = torch.empty(len(arrays_BCHW), 2, 3).uniform_(-0.12, 0.12, generator=generator)
        transform_B23 = torch.eye(2, 3) + jitter_B23
        grid = F.affine_grid(transform_B23, [len(arrays_BCHW), 1, 32, 32], align_corners=False)
        corner_BC11 = arrays_BCHW[:, :, :1, :1]
        return F.grid_sample(arrays_BCHW - corner_BC11, grid, align_corners=False) + corner_BC11


class ColourJudge(ImageJudge):
    """Names the class of 32x32 pictures in colour (any mode and size is converted)."""

    mode = "RGB"


class SpeechJudge(Judge):
    """Names the word in a short sound of any length, loudness, sample rate and channel count, from its log-mel picture.

    Everything is judged at 8 kHz, so that a codec of telephone bandwidth is judged on what it can carry.
    """

    epochs = 8
    sample_rate: ClassVar[int] = 8000
    frames: ClassVar[int] = 96  # at 10 ms
    bands: ClassVar[int] = 40

    @classmethod
    def network(cls, classes: int) -> nn.Sequential:
        return nn.Sequential(
            *_block(1, 16, kernel=5, stride=2), *_block(16, 32), nn.MaxPool2d(2), *_block(32, 64), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 5 * 12, 128), nn.ReLU(), nn.Linear(128, classes),
        )  # fmt: skip

    @classmethod
    def arrays(cls, items: Sequence[Audio]) -> Tensor:
        """Log-mel pictures, float32 [N, 1, 40, 96] in [0, 1]: 1 is the loudest place of the sound, 0 is 60 dB below.

        Silence at both ends is cut, the rest centred; a sound longer than 0.96 s is squeezed.
        """
        pictures: list[Tensor | None] = [None] * len(items)
        by_rate: dict[int, list[int]] = {}
        for index, item in enumerate(items):
            by_rate.setdefault(item.sample_rate, []).append(index)
        for rate, indices in by_rate.items():
            for start in range(0, len(indices), 256):
                chunk = indices[start : start + 256]
                for index, picture in zip(chunk, cls._pictures([items[i] for i in chunk], rate), strict=True):
                    pictures[index] = picture
        return torch.stack([picture for picture in pictures if picture is not None])[:, None]

    @staticmethod
    def augment(arrays_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Speak faster or slower, higher or lower, earlier or later, over noise; blank a band and a moment."""
        count, _, bands, frames = arrays_BCHW.shape
        uniform = torch.rand(count, 9, 1, generator=generator).unbind(1)
        transform_B23 = torch.zeros(count, 2, 3)
        transform_B23[:, 0, 0] = 0.8 + 0.45 * uniform[0][:, 0]
        transform_B23[:, 0, 2] = 0.3 * (uniform[1][:, 0] - 0.5)
        transform_B23[:, 1, 1] = 0.9 + 0.2 * uniform[2][:, 0]
        transform_B23[:, 1, 2] = 0.15 * (uniform[3][:, 0] - 0.5)
        grid = F.affine_grid(transform_B23, [count, 1, bands, frames], align_corners=False)
        moved_BFT = F.grid_sample(arrays_BCHW, grid, align_corners=False)[:, 0]
        floor_B11 = 0.35 * uniform[4][:, :, None]
        noise_BFT = torch.empty_like(moved_BFT).normal_(0, 0.05, generator=generator)
        noisy_BFT = torch.maximum(moved_BFT + noise_BFT * uniform[5][:, :, None], floor_B11)
        band_BF = (torch.arange(bands) / bands - uniform[6]).abs() < 0.05 * (uniform[7] > 0.5)
        moment_BT = (torch.arange(frames) / frames - uniform[8]).abs() < 0.03
        return noisy_BFT.masked_fill(band_BF[:, :, None], 0).masked_fill(moment_BT[:, None, :], 0)[:, None]

    @classmethod
    def _pictures(cls, items: list[Audio], rate: int) -> list[Tensor]:
        longest = max(max(item.waveform.shape[-1] for item in items), rate // 10)
        padded = [F.pad(item.waveform.float().mean(0), (0, longest - item.waveform.shape[-1])) for item in items]
        waveform_NT = torchaudio.functional.resample(torch.stack(padded), rate, cls.sample_rate)
        spectrogram_NFT = torch.stft(
            waveform_NT, 256, 80, 200, torch.hann_window(200), pad_mode="constant", return_complex=True
        ).abs().square()  # fmt: skip
        filters_FM = torchaudio.functional.melscale_fbanks(129, 60.0, cls.sample_rate / 2, cls.bands, cls.sample_rate)
        decibel_NFT = 10 * (filters_FM.T @ spectrogram_NFT).clamp_min(1e-8).log10()
        loudest_N11 = decibel_NFT.amax((1, 2), keepdim=True).clamp_min(-40)
        return [cls._centred(picture) for picture in ((decibel_NFT - loudest_N11) / 60 + 1).clamp(0, 1)]

    @classmethod
    def _centred(cls, picture_FT: Tensor) -> Tensor:
        loud = (picture_FT.amax(0) > 0.4).nonzero()[:, 0]
        if len(loud) == 0:
            return torch.zeros(cls.bands, cls.frames)
        heard_FT = picture_FT[:, int(loud[0]) : int(loud[-1]) + 1]
        if heard_FT.shape[1] > cls.frames:
            return F.interpolate(heard_FT[None], cls.frames, mode="linear", align_corners=False)[0]
        slack = cls.frames - heard_FT.shape[1]
        return F.pad(heard_FT, (slack // 2, slack - slack // 2))


class CaptionJudge:
    """Finds the one of `names` that a caption names, -1 where it names none or several."""

    def __init__(self, names: Sequence[str]):
        self.names = names

    def predict(self, items: Sequence[str]) -> Tensor:
        """The label of the name in each caption, int64 [N]."""
        named = [label_in(item, self.names) for item in items]
        return torch.tensor([-1 if label is None else label for label in named], dtype=torch.int64)


class PocketsphinxJudge:
    """A second opinion on spoken names: the `pocketsphinx` recognizer, its model as shipped with it.

    Its grammar is closed: it answers with one of `names`, or with nothing. Names that its dictionary lacks are
    not among its answers.
    """

    sample_rate = 16000

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._decoder = pocketsphinx.Decoder(samprate=float(self.sample_rate), lm=None, loglevel="FATAL")
        known = " | ".join(name for name in names if self._decoder.lookup_word(name))
        self._decoder.add_jsgf_string("names", f"#JSGF V1.0; grammar names; public <name> = {known};")
        self._decoder.activate_search("names")

    def predict(self, items: Sequence[Audio]) -> Tensor:
        """The label of the name in each sound, int64 [N]; -1 where none is recognized."""
        return torch.tensor([self._hear(item) for item in items], dtype=torch.int64)

    def _hear(self, item: Audio) -> int:
        # It has to hear what is no speech first: a quarter second of faint noise, for it does not know digital silence.
        quiet = item.sample_rate // 4
        waveform_T = F.pad(item.waveform.float().mean(0), (quiet, quiet))
        heard_T = torchaudio.functional.resample(waveform_T, item.sample_rate, self.sample_rate)
        heard_T = heard_T * (0.5 / heard_T.abs().amax().clamp_min(1e-4))
        heard_T = heard_T + 1e-3 * torch.randn(heard_T.shape, generator=torch.Generator().manual_seed(0))
        samples = (heard_T.clamp(-1, 1) * 32767).to(torch.int16).numpy()
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), full_utt=True)
        self._decoder.end_utt()
        heard = self._decoder.hyp()
        named = label_in(heard.hypstr, self.names) if heard else None
        return -1 if named is None else named


def _block(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
