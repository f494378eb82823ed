"""VQTokenizer: tokenizes images with the codebook of a `VQModel`.

An image of H×W pixels becomes (H/stride)·(W/stride) codes, row by row. The code in row r and column c describes the
patch of stride×stride pixels at that place, in the context of its surroundings.

Shape suffixes: N codes of one image, B images, C channels, H, W pixels, h, w codes down and across, D latent width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from multidiff.files import read_bytes, read_json, write_bytes, write_json
from multidiff.plugins.batching import map_batches
from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer
from multidiff_vq.folder import read_model, write_model
from multidiff_vq.pictures import (
    MODES,
    convert,
    from_pixels,
    from_signal,
    naming_picture,
    read_picture,
    to_pixels,
    to_signal,
    write_picture,
)
from multidiff_vq.resize import RESIZES, Resize, Resizer, misfit

SETTINGS = "vq_tokenizer.json"
CARD = "README.md"
_PRESETS = Path(__file__).parent / "weights"
_PIXELS_AT_ONCE = (64 * 32 * 32, 1024 * 32 * 32)  # on a CPU, which has small caches, and on other devices


class VQTokenizer(ModalityTokenizer):
    """Tokenizes images of any height and width, in greyscale or RGB like its model.

    Images of another mode are converted: colour to greyscale by ITU-R 601 luma, greyscale to RGB by repetition, 16 bits
    to 8. Transparent parts become white. `resize` determines how images of another size are resized.

    Args:
        weights: a shipped preset ("digits": greyscale, 16 codes for 32×32 pixels; "openmoji": RGB, 64 codes), a folder
            with any `VQModel` of diffusers, or a folder that `save` wrote.
        height, width: the size of `canvas()` without arguments, in pixels. The default is in the folder's settings;
            without settings, it is the model's `sample_size`.
        resize: how an image is resized before it is encoded; see `multidiff_vq.resize.Resizer`:

            - `None`: it is not resized, and its height and width must be multiples of the stride;
            - "crop": it is scaled to cover the default canvas, and its middle is kept;
            - "pad": it is scaled to fit into the default canvas, and centred on white;
            - "fit": it keeps its aspect ratio, with at most as many codes as the default canvas;
            - "saved", the default: as the folder's settings say, which for a trained tokenizer is as it was trained.
              Without settings, this is `None`.

    Raises:
        ValueError: the folder, the size or `resize` is invalid; the message names it.
    """

    modality = "image"
    variable_length: ClassVar[bool] = False

    def __init__(
        self,
        weights: str = "digits",
        height: int | None = None,
        width: int | None = None,
        resize: Resize | Literal["saved"] | None = "saved",
    ):
        presets = sorted(preset.name for preset in _PRESETS.iterdir() if preset.is_dir())
        folder = _PRESETS / weights if weights in presets else Path(weights)
        if not folder.is_dir():
            raise ValueError(f"{weights!r} is neither a folder with a VQModel nor a preset ({', '.join(presets)})")
        self.model = read_model(folder)
        card = folder / CARD
        self._card = read_bytes(card) if card.exists() else None  # states the origin and licence of the weights
        config = self.model.config
        if config["in_channels"] not in MODES or config["out_channels"] != config["in_channels"]:
            raise ValueError(
                f"{folder}: the model must have 1 channel (greyscale) or 3 (RGB), but it has {config['in_channels']} "
                f"input and {config['out_channels']} output channels"
            )
        if len(config["up_block_types"]) != len(config["down_block_types"]):
            raise ValueError(f"{folder}: the decoder must have as many up blocks as the encoder has down blocks")
        self.mode = MODES[config["in_channels"]]
        self.stride = 2 ** (len(config["block_out_channels"]) - 1)
        self.codebook_sizes = (int(config["num_vq_embeddings"]),)
        usual = {"height": config["sample_size"], "width": config["sample_size"], "resize": None}
        if (folder / SETTINGS).exists():
            usual = read_settings(folder)
        self.height = usual["height"] if height is None else height
        self.width = usual["width"] if width is None else width
        if problem := misfit(self.height, self.width, self.stride):
            raise ValueError(f"{folder}: the default canvas {problem} Set height and width.")
        self.resizer = Resizer(usual["resize"] if resize == "saved" else resize, self.height, self.width, self.stride)

    @torch.no_grad()
    def encode(self, items: list[Any]) -> list[Codes]:
        """Encode images (`PIL.Image`).

        Raises:
            ItemError: an item is not an image, its size does not fit the stride, or it cannot be resized.
        """
        pictures = [to_pixels(self.prepared(item)) for item in items]
        all_codes = []
        for pixels_CHW, ids_hw in zip(pictures, self._mapped(self.ids_of, pictures, 1), strict=True):
            codes = self.canvas(height=pixels_CHW.shape[1], width=pixels_CHW.shape[2])
            codes.ids_N = ids_hw.reshape(-1)
            all_codes.append(codes)
        return all_codes

    @torch.no_grad()
    def decode(self, codes: list[Codes]) -> list[Image.Image]:
        """Decode images of mode `L` or `RGB`.

        Raises:
            ValueError: ids are outside the codebook, or their number does not match the size.
        """
        grids = []
        for one in codes:
            blank = self.canvas(**one.size)
            if len(one) != len(blank):
                raise ValueError(f"a picture of size {one.size} has {len(blank)} codes, not {len(one)}")
            if not bool(((one.ids_N >= 0) & (one.ids_N < self.codebook_sizes[0])).all()):
                raise ValueError(f"ids of a picture must lie in [0, {self.codebook_sizes[0]})")
            grids.append(one.ids_N.reshape(blank.size["height"] // self.stride, -1))
        return [from_pixels(pixels_CHW) for pixels_CHW in self._mapped(self.pixels_of, grids, self.stride**2)]

    def canvas(self, height: int | None = None, width: int | None = None) -> Codes:
        """A blank image of this size in pixels, by default the tokenizer's size."""
        size = {
            "height": self.height if height is None else height,
            "width": self.width if width is None else width,
        }
        if problem := misfit(size["height"], size["width"], self.stride):
            raise ValueError(f"a canvas {problem}")
        coords_N3 = _places(size["height"] // self.stride, size["width"] // self.stride).clone()
        ids_N = torch.zeros(len(coords_N3), dtype=torch.int64)
        return Codes(ids_N, torch.zeros_like(ids_N), coords_N3, size)

    def read(self, value: Any, folder: Path) -> Image.Image:
        """Read an image file at its own size, in any format that Pillow reads without another program.

        Raises:
            ItemError: the file is not an image that `encode` accepts; the message names it.
        """
        if not isinstance(value, str):
            raise ItemError(f"an image must be given as the path of its file, got {value!r}")
        path = Path(folder) / value
        picture = read_picture(path)
        with naming_picture(path):
            self.resizer.size_of(picture.height, picture.width)
        return picture

    def prepared(self, item: Any) -> Image.Image:
        """The image as it is encoded: converted to the tokenizer's mode, and resized.

        Raises:
            ItemError: as in `encode`.
        """
        return self.resizer(convert(item, self.mode))

    def write(self, item: Any, stem: Path) -> Path:
        """Write a PNG file in the tokenizer's mode, at the image's own size."""
        path = stem.with_name(stem.name + ".png")
        write_picture(convert(item, self.mode), path)
        return path

    def preview(self, item: Any) -> Image.Image:
        """The image in the tokenizer's mode, at its own size."""
        return convert(item, self.mode)

    def examples(self) -> list[Image.Image]:
        """A black image, a ring, and a gradient that is twice as wide as the default canvas."""
        blank = Image.new(self.mode, (self.width, self.height))
        ring = blank.copy()
        box = (self.width // 4, self.height // 4, 3 * self.width // 4, 3 * self.height // 4)
        ImageDraw.Draw(ring).ellipse(box, outline="white", width=max(1, self.width // 16))
        slope = Image.linear_gradient("L").rotate(90).resize((2 * self.width, self.height)).convert(self.mode)
        return [blank, ring, slope]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the configuration, the names, shapes and values of the weights, and the resizing."""
        config = {name: value for name, value in self.model.config.items() if not name.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        if self.resizer.resize is not None:
            # Resizing does not change the meaning of a code, but it changes the codes of a file. Shards made with one
            # `resize` do not fit another, and a model that was trained on whole images has not seen their middles.
            # Without resizing, the canvas has no influence on codes.
            digest.update(json.dumps(asdict(self.resizer), sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def dimensions(self, codes: Codes) -> tuple[float, str]:
        """Pixels times channels."""
        return codes.size["height"] * codes.size["width"] * self.model.config["in_channels"], "dimension"

    def save(self, folder: Path) -> None:
        """Write a folder that diffusers can open, with the tokenizer's settings and the card of the weights."""
        write_model(self.model, folder)
        write_settings(folder, self.resizer)
        if self._card is not None:
            write_bytes(folder / CARD, self._card)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The tokenizer that `save` wrote into `folder`. Pass a folder without settings to the constructor instead."""
        read_settings(Path(folder))
        return cls(str(Path(folder).resolve()))  # an absolute path cannot be the name of a preset

    def to(self, device: torch.device | str) -> Self:
        """Move the model to `device`."""
        torch.nn.Module.to(self.model, device)  # diffusers' wrapper has no types
        return self

    def ids_of(self, pixels_BCHW: Tensor) -> Tensor:
        """Encode a batch of uint8 pixels on the model's device as ids [B, h, w]."""
        latents_BDhw = self.model.encode(to_signal(pixels_BCHW)).latents
        _, _, (_, _, ids) = self.model.quantize(latents_BDhw)
        return ids.reshape(len(pixels_BCHW), *latents_BDhw.shape[2:])

    def pixels_of(self, ids_Bhw: Tensor) -> Tensor:
        """Decode a batch of ids on the model's device to uint8 pixels [B, C, H, W]."""
        # `VQModel.decode` would look up codes only if a flag in the model's configuration is set.
        quantized_BDhw = self.model.quantize.embedding(ids_Bhw).permute(0, 3, 1, 2).contiguous()
        guide = quantized_BDhw if self.model.config["norm_type"] == "spatial" else None
        return from_signal(self.model.decoder(self.model.post_quant_conv(quantized_BDhw), guide))

    def _mapped(self, function: Callable[[Tensor], Tensor], inputs: list[Tensor], pixels_each: int) -> list[Tensor]:
        """Apply `function` to each input, in batches. `pixels_each` is the number of pixels per entry of an input."""
        device = next(self.model.parameters()).device
        most = _PIXELS_AT_ONCE[device.type != "cpu"] // pixels_each
        return map_batches(function, inputs, lambda shape: most // (shape[-2] * shape[-1]), device)


@lru_cache(maxsize=64)
def _places(rows: int, columns: int) -> Tensor:
    """The coordinates (0, row, column) of each code, row by row."""
    return torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), torch.arange(rows), torch.arange(columns))


def read_settings(folder: Path) -> dict[str, Any]:
    """The tokenizer's settings in a saved folder: "height" and "width" of the default canvas in pixels, and "resize".

    Raises:
        ValueError: the settings are missing, damaged or invalid; the message names the file.
    """
    path = folder / SETTINGS
    settings = {"resize": None, **read_json(path)}  # version 0.1 wrote no "resize"
    if settings.keys() != {"height", "width", "resize"}:
        raise ValueError(f"{path} must contain height, width and optionally resize, got {', '.join(settings):.200}")
    if settings["resize"] not in (None, *RESIZES):
        raise ValueError(f"{path}: resize must be null, {', '.join(RESIZES)}, got {settings['resize']!r:.80}")
    return settings


def write_settings(folder: Path, resizer: Resizer) -> None:
    """Write the settings that `read_settings` reads."""
    settings = {"height": resizer.height, "width": resizer.width, "resize": resizer.resize}
    write_json(folder / SETTINGS, settings)
