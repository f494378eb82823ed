"""The images of a data folder, in batches of one size each, for training a `VQModel`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from multidiff.data import BatchedData, EpochBatches, ShuffledBatches
from multidiff.tokenizer import ItemError
from multidiff_autoencoder.data import paths_of
from multidiff_vq.pictures import MODES, convert, naming_picture, read_picture, read_size, to_pixels
from multidiff_vq.resize import Resize, Resizer, misfit


class PictureData(BatchedData):
    """The images in a data folder's `metadata.jsonl`, without duplicates, as uint8 [B, C, H, W].

    Files are read and resized as in `VQTokenizer`, so that the trained tokenizer accepts the same files.

    Args:
        folder: Data folder.
        name: Key of the images in `metadata.jsonl`.
        channels: 1 for greyscale, 3 for RGB. The default is that of the trained model.
        height, width: Size in pixels. The default is the model's `sample_size`.
        batch_size: Number of images per batch and device.
        num_workers: Number of processes that read ahead.
        seed: Random seed for the order.
        resize: How an image of another size is resized, as in `VQTokenizer`: "crop", "pad" or "fit", where each batch
            has images of one size. With null an image of another size is an error.

    Raises:
        ValueError: the folder has no images for training or validation, an image cannot be read, or the size does not
            fit the model; the message names it.
    """

    def __init__(
        self,
        folder: str,
        name: str = "image",
        channels: int | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        resize: Resize | None = "crop",
    ):
        super().__init__()
        if channels not in (None, *MODES):
            raise ValueError(f"channels must be 1 (greyscale) or 3 (RGB), got {channels}")
        self.folder, self._name, self.channels = Path(folder), name, channels
        self.height, self.width = height, width
        self.resize: Resize | None = resize
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._suited: tuple[str, Resizer] | None = None
        if channels is not None and height is not None and width is not None:
            self._suited = MODES[channels], Resizer(resize, height, width, 1)

    def suit(self, preset: str, channels: int, side: int, stride: int) -> None:
        """Adopt the channels and size of the trained model, unless the data's configuration sets them.

        Args:
            preset: the name of the model, for errors.
            channels: the model's channels.
            side: the longer side of the model's images, in pixels.
            stride: pixels per code, in each direction.

        Raises:
            ValueError: the data's configuration does not fit the model.
        """
        if self.channels not in (None, channels):
            raise ValueError(
                f"PictureData has channels {self.channels}, but preset {preset!r} has {channels}. Remove channels, or "
                "choose another preset."
            )
        height = side if self.height is None else self.height
        width = side if self.width is None else self.width
        if max(height, width) != side:
            raise ValueError(
                f"PictureData has height {height} and width {width}, but preset {preset!r} needs a longer side of "
                f"{side} pixels. Remove height and width, or set sample_size in the model's settings."
            )
        if problem := misfit(height, width, stride):
            raise ValueError(f"preset {preset!r}: an image {problem}")
        self._suited = MODES[channels], Resizer(self.resize, height, width, stride)

    @property
    def resizer(self) -> Resizer:
        """Resizes the images."""
        return self._suit[1]

    @property
    def _suit(self) -> tuple[str, Resizer]:
        if self._suited is None:
            raise ValueError("Pass PictureData together with VQTraining, or set channels, height and width.")
        return self._suited

    def train_dataloader(self) -> StatefulDataLoader:
        pictures, rank = self._pictures("train"), self.rank()
        if self.resize == "fit":
            batches = BatchesBySize(pictures.by_size(), self.batch_size, self.seed, *rank)
        else:
            batches = ShuffledBatches(len(pictures), self.batch_size, self.seed, *rank)
        return self._loader(pictures, batches)

    def val_dataloader(self) -> StatefulDataLoader:
        return self._evaluation("validation")

    def test_dataloader(self) -> StatefulDataLoader:
        return self._evaluation("test")

    def _evaluation(self, split: str) -> StatefulDataLoader:
        pictures, (rank, ranks) = self._pictures(split), self.rank()
        groups = pictures.by_size() if self.resize == "fit" else [list(range(len(pictures)))]
        mine = [[(0, index) for index in group[rank::ranks]] for group in groups]
        size = self.batch_size
        batches = [keys[start : start + size] for keys in mine for start in range(0, len(keys), size)] or [[(0, 0)]]
        return self._loader(pictures, batches)

    def _loader(self, pictures: Dataset, batches: Any) -> StatefulDataLoader:
        alone = torch.Generator()  # instead of the global one
        return StatefulDataLoader(pictures, batch_sampler=batches, num_workers=self.num_workers, generator=alone)

    def _pictures(self, split: str) -> _Pictures:
        return _Pictures(paths_of(self.folder, self._name, split), *self._suit)


class _Pictures(Dataset[Tensor]):
    def __init__(self, paths: list[Path], mode: str, resizer: Resizer):
        self.paths, self.mode, self.resizer = paths, mode, resizer

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        path = self.paths[key[1]]  # the same in every epoch
        picture = read_picture(path)
        with naming_picture(path):
            resized = self.resizer(convert(picture, self.mode))
            if self.resizer.resize is None and (resized.height, resized.width) != (
                self.resizer.height,
                self.resizer.width,
            ):
                raise ItemError(
                    f"the image has height {resized.height} and width {resized.width}, but training needs "
                    f"{self.resizer.height} and {self.resizer.width}. Set resize: crop (or pad, or fit) in the data's "
                    "init_args."
                )
        return to_pixels(resized)

    def by_size(self) -> list[list[int]]:
        """The indices of the images, grouped by their size after resizing."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, path in enumerate(self.paths):
            height, width = read_size(path)
            with naming_picture(path):
                groups.setdefault(self.resizer.size_of(height, width), []).append(index)
        return list(groups.values())


class BatchesBySize(EpochBatches):
    """(epoch, index) of each batch, like `ShuffledBatches`, but each batch is from one group, the same on all ranks.

    Every epoch has every image. The last batch of a group may be smaller. If a group cannot be divided evenly, the last
    ranks repeat some of its images.
    """

    def __init__(self, groups: list[list[int]], batch_size: int, seed: int, rank: int, ranks: int):
        super().__init__(sum(map(len, groups)), seed, rank, ranks)
        self.groups, self.batch_size = groups, batch_size

    def __len__(self) -> int:
        return sum(-(-self._share(group) // self.batch_size) for group in self.groups)

    def indices(self, generator: torch.Generator) -> list[list[int]]:
        batches = []
        for group in self.groups:
            order, each = torch.randperm(len(group), generator=generator).tolist(), self._share(group)
            mine = [group[order[place % len(group)]] for place in range(self.rank * each, (self.rank + 1) * each)]
            batches += [mine[start : start + self.batch_size] for start in range(0, each, self.batch_size)]
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]

    def _share(self, group: list[int]) -> int:
        """The number of images of a group that each rank gets."""
        return -(-len(group) // self.ranks)
