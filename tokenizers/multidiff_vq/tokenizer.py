"""VQTokenizer: pictures to the codes of a `VQModel`'s one codebook and back.

A picture of H×W pixels becomes (H/stride)·(W/stride) codes, row by row: the code of row r and column c stands for the
patch of stride×stride pixels there, as seen with its surroundings.

Shape suffixes: N codes of one picture, B pictures, C channels, H, W pixels, h, w codes down and across, D latent width.
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
_PIXELS_AT_ONCE = (64 * 32 * 32, 1024 * 32 * 32)  # on a CPU, whose caches are small, and elsewhere


class VQTokenizer(ModalityTokenizer):
    """Pictures of any height and width, grey or RGB as the model is.

    Pictures of another mode are converted: colour to grey by ITU-R 601 luma, grey to RGB by repetition, 16 bits to 8;
    what is transparent shows white behind it. Pictures of another size are resized first where `resize` says how.

    Args:
        weights: a preset that comes with the package ("digits": grey, 16 codes for 32×32 pixels; "openmoji": RGB, 64
            codes), or a folder with any `VQModel` of diffusers, or one that `save` wrote.
        height, width: pixels of `canvas()` without arguments; by default what the folder says: our own settings, else
            the model's `sample_size`.
        resize: what happens to a picture that is encoded (`multidiff_vq.resize.Resizer` has the details):

            - `None`: its height and width must fit the stride; it gets a code for each stride×stride pixels;
            - "crop": it is scaled to cover the default canvas, and the middle is kept;
            - "pad": it is scaled to fit inside the default canvas, in the middle, on white;
            - "fit": it keeps its shape, at most as many codes as the default canvas has;
            - "saved", the default: as the folder says, which for a trained tokenizer is as it was trained; `None` where
              it says nothing.

    Raises:
        ValueError: a bad folder, size or resize; names it.
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
        self._card = read_bytes(card) if card.exists() else None  # says whose the weights are
        config = self.model.config
        if config["in_channels"] not in MODES or config["out_channels"] != config["in_channels"]:
            raise ValueError(
                f"{folder}: pictures have 1 channel (grey) or 3 (RGB); this model takes {config['in_channels']} "
                f"and gives {config['out_channels']}"
            )
        if len(config["up_block_types"]) != len(config["down_block_types"]):
            raise ValueError(f"{folder}: the decoder must scale up as often as the encoder scales down")
        self.mode = MODES[config["in_channels"]]
        self.stride = 2 ** (len(config["block_out_channels"]) - 1)
        self.codebook_sizes = (int(config["num_vq_embeddings"]),)
        usual = {"height": config["sample_size"], "width": config["sample_size"], "resize": None}
        if (folder / SETTINGS).exists():
            usual = read_settings(folder)
        self.height = usual["height"] if height is None else height
        self.width = usual["width"] if width is None else width
        if problem := misfit(self.height, self.width, self.stride):
            raise ValueError(f"{folder}: the default canvas {problem}; pass height and width")
        self.resizer = Resizer(usual["resize"] if resize == "saved" else resize, self.height, self.width, self.stride)

    @torch.no_grad()
    def encode(self, items: list[Any]) -> list[Codes]:
        """Pictures (`PIL.Image`) to codes.

        Raises:
            ItemError: no picture, one whose size does not fit the stride, or one that cannot be resized.
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
        """Codes to pictures, `L` or `RGB`.

        Raises:
            ValueError: ids outside the codebook, or not as many as the size asks for.
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
        """A blank picture; sizes in pixels, the tokenizer's own by default."""
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
        """The picture in a file, of any format that Pillow reads without another program, at its own size.

        Raises:
            ItemError: no picture that `encode` takes; names the file.
        """
        if not isinstance(value, str):
            raise ItemError(f"a picture is named by the path of its file, not by {value!r}")
        path = Path(folder) / value
        picture = read_picture(path)
        with naming_picture(path):
            self.resizer.size_of(picture.height, picture.width)
        return picture

    def prepared(self, item: Any) -> Image.Image:
        """The picture that is encoded: grey or RGB, and resized.

        Raises:
            ItemError: as `encode` has it.
        """
        return self.resizer(convert(item, self.mode))

    def write(self, item: Any, stem: Path) -> Path:
        """Write the picture in the tokenizer's mode and its own size, a PNG."""
        path = stem.with_name(stem.name + ".png")
        write_picture(convert(item, self.mode), path)
        return path

    def preview(self, item: Any) -> Image.Image:
        """The picture in the tokenizer's mode and its own size."""
        return convert(item, self.mode)

    def examples(self) -> list[Image.Image]:
        """Black, a ring, and a slope that is twice as wide as a usual picture."""
        blank = Image.new(self.mode, (self.width, self.height))
        ring = blank.copy()
        box = (self.width // 4, self.height // 4, 3 * self.width // 4, 3 * self.height // 4)
        ImageDraw.Draw(ring).ellipse(box, outline="white", width=max(1, self.width // 16))
        slope = Image.linear_gradient("L").rotate(90).resize((2 * self.width, self.height)).convert(self.mode)
        return [blank, ring, slope]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the model's configuration, names, shapes and values of its weights, and how it resizes."""
        config = {name: value for name, value in self.model.config.items() if not name.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        if self.resizer.resize is not None:
            # A code stands for the same patch whatever is resized, but a file gets other codes: shards made with one
            # resize are not those of another, and a model that has seen whole pictures has not seen their middles.
            # Without resizing the canvas decides no code.
            digest.update(json.dumps(asdict(self.resizer), sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write a folder that plain diffusers opens too, with our settings and the weights' card beside the model."""
        write_model(self.model, folder)
        write_settings(folder, self.resizer)
        if self._card is not None:
            write_bytes(folder / CARD, self._card)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The tokenizer that `save` wrote into `folder`. A folder without our settings goes to the constructor."""
        read_settings(Path(folder))
        return cls(str(Path(folder).resolve()))  # absolute: never taken for a preset

    def to(self, device: torch.device | str) -> Self:
        """Move the model to `device`."""
        torch.nn.Module.to(self.model, device)  # diffusers' own wrapper has lost its types
        return self

    def ids_of(self, pixels_BCHW: Tensor) -> Tensor:
        """Codes [B, h, w] of a batch of pixels, uint8, on the model's device."""
        latents_BDhw = self.model.encode(to_signal(pixels_BCHW)).latents
        _, _, (_, _, ids) = self.model.quantize(latents_BDhw)
        return ids.reshape(len(pixels_BCHW), *latents_BDhw.shape[2:])

    def pixels_of(self, ids_Bhw: Tensor) -> Tensor:
        """Pixels [B, C, H, W], uint8, of a batch of codes on the model's device."""
        # Not VQModel.decode: whether it looks codes up depends on a flag in the model's configuration.
        quantized_BDhw = self.model.quantize.embedding(ids_Bhw).permute(0, 3, 1, 2).contiguous()
        guide = quantized_BDhw if self.model.config["norm_type"] == "spatial" else None
        return from_signal(self.model.decoder(self.model.post_quant_conv(quantized_BDhw), guide))

    def _mapped(self, function: Callable[[Tensor], Tensor], inputs: list[Tensor], pixels_each: int) -> list[Tensor]:
        """`function` of each input in batches; an entry of its last two dimensions stands for `pixels_each`."""
        device = next(self.model.parameters()).device
        most = _PIXELS_AT_ONCE[device.type != "cpu"] // pixels_each
        return map_batches(function, inputs, lambda shape: most // (shape[-2] * shape[-1]), device)


@lru_cache(maxsize=64)
def _places(rows: int, columns: int) -> Tensor:
    """(0, row, column) of each code, row by row."""
    return torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), torch.arange(rows), torch.arange(columns))


def read_settings(folder: Path) -> dict[str, Any]:
    """Our own settings in a saved folder: "height" and "width", pixels of the default canvas, and "resize".

    Raises:
        ValueError: they are missing, damaged or hold something else; names the file.
    """
    path = folder / SETTINGS
    settings = {"resize": None, **read_json(path)}  # version 0.1 wrote no "resize"
    if settings.keys() != {"height", "width", "resize"}:
        raise ValueError(f"{path} must hold height and width, and may hold resize; found {', '.join(settings):.200}")
    if settings["resize"] not in (None, *RESIZES):
        raise ValueError(f"{path}: resize must be null, {', '.join(RESIZES)}, not {settings['resize']!r:.80}")
    return settings


def write_settings(folder: Path, resizer: Resizer) -> None:
    """Write what `read_settings` reads."""
    settings = {"height": resizer.height, "width": resizer.width, "resize": resizer.resize}
    write_json(folder / SETTINGS, settings)
