"""The picture tokenizer: any size and mode, codes that depend on nothing but the picture, strict about files."""

import json
import logging
import math
import os
import shutil
import struct
import warnings
import zlib
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import VQModel
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from demo.openmoji import catalogue, draw, splits
from multidiff.testing import check_tokenizer
from multidiff.tokenizer import Codes, ItemError
from multidiff.training.optimizer import MuonAdamW
from multidiff_vq import VQTokenizer
from multidiff_vq.data import BatchesBySize, PictureData
from multidiff_vq.folder import read_model, write_model
from multidiff_vq.pictures import convert, read_picture, read_size
from multidiff_vq.presets import PRESETS
from multidiff_vq.quantizers import codebook_arguments, fixed_quantizer, quantize
from multidiff_vq.resize import Resizer
from multidiff_vq.training import VQTraining
from tests.fuzz import pictures
from tests.helpers.paths import ROOT

MNIST = ROOT / "demo" / "data" / "mnist10k.npz"
CONFIG, WEIGHTS, SETTINGS = "config.json", "diffusion_pytorch_model.safetensors", "vq_tokenizer.json"
DIGITS, DIGITS_CROPPED = VQTokenizer(), VQTokenizer(resize="crop")


def arguments(channels=3, **changes):
    """Of a tiny VQModel of stride 4."""
    return {
        "in_channels": channels, "out_channels": channels, "sample_size": 16, "block_out_channels": [4, 8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
        "norm_num_groups": 2, "latent_channels": 4, "num_vq_embeddings": 16, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def rgb_folder(tmp_path_factory):
    """What plain diffusers writes; codes spread wide enough that pictures differ in them."""
    folder = tmp_path_factory.mktemp("rgb")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VQModel(**arguments())
        torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(rgb_folder, tmp_path):
    """A copy to spoil."""
    VQTokenizer(str(rgb_folder)).save(tmp_path / "broken")
    return tmp_path / "broken"


def noise(height, width, mode="RGB", seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(array).convert(mode)


def handwriting(split):
    """Digits as 32x32 pictures: the split that the shipped weights were trained with."""
    chosen = np.random.default_rng(0).permutation(10_000)[split]
    with np.load(MNIST) as data:
        return [Image.fromarray(np.pad(digit, 2)) for digit in data["x"][chosen]]


def psnr(one, other):
    error = (np.asarray(one, float) - np.asarray(other, float)) / 255
    return -10 * np.log10(max(np.mean(error**2), 1e-10))


def test_contract_grey(tmp_path):
    check_tokenizer(DIGITS, tmp_path)


def test_contract_rgb(rgb_folder, tmp_path):
    check_tokenizer(VQTokenizer(str(rgb_folder)), tmp_path)


def test_a_picture_is_as_large_as_the_channels_of_its_pixels(rgb_folder):
    for tokenizer, channels in ((VQTokenizer(), 1), (VQTokenizer(str(rgb_folder)), 3)):
        assert tokenizer.dimensions(tokenizer.canvas(height=32, width=64)) == (32 * 64 * channels, "dimension")


def test_shipped_weights_reconstruct_unseen_handwriting_with_most_of_their_codes():
    digits = handwriting(slice(9000, 9300))
    codes = DIGITS.encode(digits)
    assert {len(one) for one in codes} == {16}
    assert np.mean([psnr(*pair) for pair in zip(digits, DIGITS.decode(codes), strict=True)]) > 22
    assert len(torch.cat([one.ids_N for one in codes]).unique()) > 0.95 * DIGITS.codebook_sizes[0]


def test_shipped_weights_reconstruct_unseen_emoji_with_nearly_all_their_codes(tmp_path):
    shipped, characters = VQTokenizer("openmoji"), catalogue()
    check_tokenizer(shipped, tmp_path)
    shipped.save(tmp_path / "saved")
    assert "CC BY-SA 4.0" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    emoji = [Image.fromarray(draw(characters[name], 32)) for name in splits()["test"]]
    codes = shipped.encode(emoji)
    assert {len(one) for one in codes} == {64}
    assert np.mean([psnr(*pair) for pair in zip(emoji, shipped.decode(codes), strict=True)]) > 22.5
    assert len(torch.cat([one.ids_N for one in codes]).unique()) > 0.95 * shipped.codebook_sizes[0]


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6), st.randoms())
def test_any_size_that_fits_comes_back_and_neighbours_change_no_code(rgb_folder, sizes, random):
    tokenizer = VQTokenizer(str(rgb_folder))
    pictures = [noise(4 * rows, 4 * columns, seed=seed) for seed, (rows, columns) in enumerate(sizes)]
    codes = tokenizer.encode(pictures)
    for (rows, columns), one, picture in zip(sizes, codes, tokenizer.decode(codes), strict=True):
        assert one.size == {"height": 4 * rows, "width": 4 * columns}
        assert one.coords_N3.tolist() == [[0, row, column] for row in range(rows) for column in range(columns)]
        assert (picture.height, picture.width, picture.mode) == (4 * rows, 4 * columns, "RGB")
    order = random.sample(range(len(pictures)), len(pictures))
    for place, one in zip(order, tokenizer.encode([pictures[place] for place in order]), strict=True):
        assert torch.equal(one.ids_N, codes[place].ids_N)


def test_a_long_batch_gives_the_codes_of_each_picture_alone():
    digits = handwriting(slice(0, 40))
    together = DIGITS.encode(digits)
    for digit, codes in zip(digits, together, strict=True):
        assert torch.equal(DIGITS.encode([digit])[0].ids_N, codes.ids_N)


def test_codes_and_pictures_are_those_of_plain_diffusers(rgb_folder):
    tokenizer, model = VQTokenizer(str(rgb_folder)), VQModel.from_pretrained(rgb_folder, low_cpu_mem_usage=False)
    pictures = [noise(16, 24, seed=seed) for seed in range(3)]
    signal = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in pictures]).float() / 127.5 - 1
    with torch.no_grad():
        latents = model.eval().encode(signal).latents
        ids = model.quantize(latents)[2][2].reshape(3, -1)
        restored = ((model.decode(latents).sample + 1) * 127.5).round().clamp(0, 255)
    codes = tokenizer.encode(pictures)
    assert len(torch.cat([one.ids_N for one in codes]).unique()) > 1
    for one, expected in zip(codes, ids, strict=True):
        assert torch.equal(one.ids_N, expected)
    for picture, expected in zip(tokenizer.decode(codes), restored, strict=True):
        assert np.abs(np.asarray(picture, float) - expected.permute(1, 2, 0).numpy()).max() <= 1


def test_other_modes_are_converted(rgb_folder):
    def ids(tokenizer, picture):
        return tokenizer.encode([picture])[0].ids_N.tolist()

    colour, clear = noise(32, 32), Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert ids(DIGITS, colour) == ids(DIGITS, colour.convert("L"))
    assert ids(DIGITS, clear) == ids(DIGITS, Image.new("L", (32, 32), 255))
    deep = Image.fromarray(np.asarray(noise(32, 32, "L"), dtype=np.uint16) * 257)
    assert ids(DIGITS, deep) == ids(DIGITS, noise(32, 32, "L"))
    tokenizer = VQTokenizer(str(rgb_folder))
    assert ids(tokenizer, noise(16, 16, "L")) == ids(tokenizer, noise(16, 16, "L").convert("RGB"))
    assert tokenizer.preview(clear).getpixel((0, 0)) == (255, 255, 255)


def test_default_canvas_comes_from_arguments_else_settings_else_the_model(rgb_folder, tmp_path):
    assert VQTokenizer(str(rgb_folder)).canvas().size == {"height": 16, "width": 16}
    tokenizer = VQTokenizer(str(rgb_folder), height=8, width=20)
    assert tokenizer.canvas().size == {"height": 8, "width": 20}
    assert tokenizer.canvas(width=4).size == {"height": 8, "width": 4}
    tokenizer.save(tmp_path / "saved")
    assert VQTokenizer.load(tmp_path / "saved").canvas().size == {"height": 8, "width": 20}
    assert VQTokenizer(str(tmp_path / "saved"), height=12).canvas().size == {"height": 12, "width": 20}


def test_construction_leaves_the_random_state_alone(rgb_folder):
    before = torch.get_rng_state()
    VQTokenizer(str(rgb_folder))
    assert torch.equal(before, torch.get_rng_state())


def test_fingerprint_follows_the_weights_and_not_the_canvas(broken):
    before = VQTokenizer.load(broken).fingerprint
    assert VQTokenizer(str(broken), height=8).fingerprint == before
    tensors = load_file(broken / WEIGHTS)
    tensors["encoder.conv_in.bias"][0] += 1e-6
    save_file(tensors, broken / WEIGHTS)
    assert VQTokenizer.load(broken).fingerprint != before


def test_attention_weights_of_old_diffusers_load(broken):
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    before, tensors = VQTokenizer.load(broken).fingerprint, load_file(broken / WEIGHTS)
    for new, old in names.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, broken / WEIGHTS)
    assert VQTokenizer.load(broken).fingerprint == before


def test_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (16, 8)).save(tmp_path / "photo.jpg", exif=exif)
    assert DIGITS.read("photo.jpg", tmp_path).size == (8, 16)


def test_of_moving_pictures_the_first_is_read_and_what_is_transparent_is_white(tmp_path):
    first, second = Image.new("RGBA", (32, 32), (255, 0, 0, 255)), Image.new("RGBA", (32, 32), (0, 0, 255, 255))
    first.paste((0, 0, 0, 0), (0, 0, 16, 32))
    for name in ("moving.gif", "moving.png"):
        first.save(tmp_path / name, save_all=True, append_images=[second], duration=100)
        picture = convert(DIGITS.read(name, tmp_path), "RGB")
        assert [picture.getpixel(place) for place in ((4, 4), (24, 4))] == [(255, 255, 255), (255, 0, 0)]


# Resizing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["crop", "pad", "fit"])
def test_contract_while_pictures_are_resized(resize, rgb_folder, tmp_path):
    check_tokenizer(VQTokenizer(str(rgb_folder), resize=resize), tmp_path)


def test_crop_keeps_the_middle_and_pad_keeps_all_on_white():
    wide = Image.new("L", (96, 32))
    wide.paste(128, (32, 0, 64, 32))  # the middle third
    cropped = VQTokenizer(resize="crop").prepared(wide)
    assert cropped.size == (32, 32)
    assert cropped.getextrema() == (128, 128)
    padded = np.asarray(VQTokenizer(resize="pad").prepared(wide))
    assert padded.shape == (32, 32)
    assert (padded[:10] == 255).all()
    assert (padded[-10:] == 255).all()
    assert [padded[16, column] for column in (2, 16, 29)] == [0, 128, 0]


def test_fit_keeps_the_shape_within_the_codes_of_the_canvas():
    fit = Resizer("fit", 32, 32, 8)  # 16 codes
    shapes = {(100, 100): (32, 32), (1600, 1000): (40, 24), (10, 20): (24, 40), (1, 90): (8, 128), (5, 3): (40, 24)}
    for (height, width), expected in shapes.items():
        assert fit.size_of(height, width) == expected
    # By definition: of all grids that nothing can be added to, the one with the nearest ratio.
    for height, width in product((1, 7, 30, 180), (2, 8, 31, 90)):
        size = fit.size_of(height, width)
        grids = [(r, c) for r, c in product(range(1, 17), repeat=2) if r * c <= 16 < min((r + 1) * c, r * (c + 1))]
        distance = {grid: abs(np.log(grid[0] / grid[1] * width / height)) for grid in grids}
        assert distance[size[0] // 8, size[1] // 8] == pytest.approx(min(distance.values()))
        assert fit.size_of(*size) == size
    # What it gives is never too long and thin to be encoded again.
    assert Resizer("fit", 256, 256, 8).size_of(100, 1) == (8 * 256, 8 * 4)
    tokenizer = VQTokenizer(resize="fit")
    half = Image.new("L", (200, 100))
    half.paste(255, (100, 0, 200, 100))
    (codes,) = tokenizer.encode([half])
    assert codes.size == {"height": 24, "width": 40}
    pixels = np.asarray(tokenizer.prepared(half))
    assert (pixels[:, :18] == 0).all()
    assert (pixels[:, -18:] == 255).all()


def test_scaling_down_does_not_alias():
    stripes = Image.fromarray(np.tile(np.uint8([0, 255]), (320, 160)))
    pixels = np.asarray(VQTokenizer(resize="crop").prepared(stripes), float)
    assert np.abs(pixels - 127.5).max() < 4


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I;16B"]


@pytest.mark.parametrize("resize", ["crop", "pad", "fit"])
def test_a_pixel_of_any_mode_fills_the_canvas(resize, rgb_folder):
    for weights in ("digits", str(rgb_folder)):
        tokenizer = VQTokenizer(weights, resize=resize)
        for codes in tokenizer.encode([Image.new(mode, (1, 1)) for mode in MODES]):
            assert codes.size == tokenizer.canvas().size


def test_what_is_transparent_is_white_before_it_is_scaled_and_16_bits_stay_dark(tmp_path):
    tokenizer = VQTokenizer(resize="crop")
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (32, 0, 64, 64))
    assert np.array_equal(np.asarray(tokenizer.prepared(clear))[:, [0, 31]], np.tile(np.uint8([255, 0]), (32, 1)))
    deep = Image.fromarray(np.full((64, 64), 0x40FF, np.uint16))
    assert tokenizer.prepared(deep).getextrema() == (0x40, 0x40)
    deep.save(tmp_path / "deep.png", transparency=0x40FF)
    assert tokenizer.prepared(tokenizer.read("deep.png", tmp_path)).getextrema() == (255, 255)


def test_resize_is_saved_and_part_of_the_fingerprint_only_where_it_decides_codes(broken, tmp_path):
    whole = VQTokenizer.load(broken)
    prints = {VQTokenizer(str(broken), resize=resize).fingerprint for resize in (None, "crop", "pad", "fit")}
    assert len(prints) == 4
    assert whole.fingerprint in prints
    crop = VQTokenizer(str(broken), resize="crop")
    assert VQTokenizer(str(broken), height=8, resize="crop").fingerprint != crop.fingerprint
    crop.save(tmp_path / "crop")
    assert VQTokenizer.load(tmp_path / "crop").resizer == crop.resizer
    assert VQTokenizer(str(tmp_path / "crop"), resize=None).fingerprint == whole.fingerprint
    (broken / SETTINGS).write_text('{"height": 16, "width": 16}')  # as version 0.1 wrote it
    assert VQTokenizer.load(broken).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"height": 16, "width": 16, "resize": "stretch"}, r"resize must be null, crop, pad, fit, got 'stretch'"),
        ({"height": 16, "width": 16, "resize": ["crop"]}, r"resize must be null"),
        ({"height": 16, "width": 16, "depth": 3}, "must contain height, width and optionally resize, .*depth"),
        ({"height": 16, "width": "16"}, "must have a height and a width .* got height 16 and width '16'"),
        ({"height": 2**40, "width": 16}, "is too large; the limit is 67,108,864 pixels"),
    ],
)
def test_settings_that_are_none_are_refused_by_file(broken, settings, words):
    (broken / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=words) as caught:
        VQTokenizer.load(broken)
    assert str(broken) in str(caught.value)


@pytest.mark.parametrize("resize", ["crop", "pad", "fit"])
def test_a_picture_that_is_a_line_is_refused(resize, tmp_path):
    Image.new("L", (1, 20_000)).save(tmp_path / "line.png")
    with pytest.raises(ItemError, match=r"line\.png: .*height 20000 and width 1 .*too long and thin.*100 times"):
        VQTokenizer(resize=resize).read("line.png", tmp_path)
    with pytest.raises(ItemError, match="without pixels"):
        VQTokenizer(resize=resize).encode([Image.new("L", (0, 3))])
    with pytest.raises(ValueError, match="resize must be null, crop, pad, fit, got 'stretch'"):
        VQTokenizer(resize="stretch")


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (Image.new("L", (30, 33)), "height 33 and width 30.*stride of 8.*height 32 or 40 and width 24 or 32"),
        (Image.new("L", (30, 33)), r"stride of 8. Let the tokenizer resize it with `image: {plugin: vq, .*crop}`"),
        (Image.new("L", (8, 3)), "height 3 and width 8.*height 8 and width 8"),
        (Image.new("L", (0, 0)), "height 0 and width 0"),
        (Image.new("F", (32, 32)), "mode 'F'"),
        ("seven", "expected a PIL.Image, not str: 'seven'"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(picture, words):
    with pytest.raises(ItemError, match=words):
        DIGITS.encode([Image.new("L", (32, 32)), picture])


def test_files_that_are_no_pictures_are_refused_by_name(tmp_path):
    noise(64, 64).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:5000])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    for name in ("cut.png", "text.jpg", "empty.png", "missing.png"):
        with pytest.raises(ItemError, match=name):
            DIGITS.read(name, tmp_path)
    with pytest.raises(ItemError, match="path of its file, got 7"):
        DIGITS.read(7, tmp_path)


def test_a_file_whose_picture_cannot_be_encoded_is_named_when_it_is_read(tmp_path):
    Image.new("L", (30, 33)).save(tmp_path / "odd.png")
    with pytest.raises(ItemError, match=r"odd\.png: an image of height 33 and width 30 .*resize: crop"):
        DIGITS.read("odd.png", tmp_path)
    Image.new("F", (32, 32)).save(tmp_path / "float.tif")
    with pytest.raises(ItemError, match=r"float\.tif: an image of mode 'F' has no defined range"):
        DIGITS.read("float.tif", tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    for name in (".", "pipe.png", "x" * 300, "a\0b"):
        with pytest.raises(ItemError, match=r"is a folder|is a pipe|cannot be read"):
            DIGITS.read(name, tmp_path)


def test_postscript_is_not_run(tmp_path):
    Image.new("L", (32, 32)).save(tmp_path / "page.eps")
    with pytest.raises(ItemError, match=r"page\.eps is not a readable image"):
        DIGITS.read("page.eps", tmp_path)


def test_damaged_files_are_encoded_or_named(tmp_path):
    state = pictures.prepare(tmp_path, Random(0))
    for name in state.contents:
        DIGITS_CROPPED.encode([DIGITS_CROPPED.read(name, tmp_path)])
    outcomes = [pictures.attempt(state, number, Random(number)) for number in range(15)]
    assert set(outcomes) == {"encoded", "refused"}


@pytest.mark.parametrize("size", [(10_000, 8_000), (30_000, 30_000)])
def test_a_small_file_of_a_huge_picture_is_not_unpacked(size, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "bomb.png")
    content = bytearray((tmp_path / "bomb.png").read_bytes())
    content[16:24] = struct.pack(">II", *size)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(ItemError, match=r"bomb.png has .* 67,108,864\. Scale it down"):
        DIGITS.read("bomb.png", tmp_path)


def test_codes_that_are_no_picture_are_refused():
    canvas = DIGITS.canvas()
    with pytest.raises(ValueError, match="has 16 codes, not 3"):
        DIGITS.decode([Codes(canvas.ids_N[:3], canvas.levels_N[:3], canvas.coords_N3[:3], canvas.size)])
    canvas.ids_N[0] = DIGITS.codebook_sizes[0]
    with pytest.raises(ValueError, match=r"must lie in \[0, "):
        DIGITS.decode([canvas])
    with pytest.raises(ValueError, match=r"a canvas of height 12 .*height 8 or 16 and width 32"):
        DIGITS.canvas(height=12)


def test_weights_must_be_a_preset_or_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"'digit' is neither a folder .* nor a preset .*digits"):
        VQTokenizer("digit")
    with pytest.raises(ValueError, match=f"{tmp_path}/{CONFIG} is missing"):
        VQTokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"default canvas of height 30 .*Set height and width"):
        VQTokenizer(height=30)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"_class_name": "AutoencoderKL"}, "describes a AutoencoderKL, not a VQModel"),
        ({"_class_name": "VQModel", "flavour": 1}, "VQModel has no setting flavour"),
        ({"_class_name": "VQModel", "block_out_channels": "x"}, "VQModel cannot be built from it"),
        ({"_class_name": "VQModel", **arguments(num_vq_embeddings=8)}, r"embedding.weight is \[16, 4\], not \[8, 4\]"),
        (
            {"_class_name": "VQModel", **arguments(layers_per_block=10**9)},
            r"layers_per_block is 1,000,000,000, which does not fit",
        ),
        (
            {"_class_name": "VQModel", **arguments(block_out_channels=[4] * 10**6)},
            "the length of block_out_channels is",
        ),
        ({"_class_name": "VQModel", **arguments(num_vq_embeddings=10**12)}, r"not \[1000000000000, 4\]"),
        ({"_class_name": "VQModel", **arguments(latent_channels=10**30)}, "VQModel cannot be built from it"),
        ([], "must contain a JSON object, not list"),
    ],
)
def test_foreign_configurations_are_refused(broken, content, words):
    (broken / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as caught:
        VQTokenizer.load(broken)
    assert str(broken) in str(caught.value)


def test_weights_in_half_precision_are_half_as_large_and_read_as_float32(tmp_path):
    model = VQModel(**arguments(3))
    write_model(model, tmp_path / "whole")
    write_model(model, tmp_path / "half", half_precision=True)
    whole, half = ((tmp_path / name / WEIGHTS).stat().st_size for name in ("whole", "half"))
    assert half < 0.7 * whole  # names take their part of so small a file
    read = read_model(tmp_path / "half").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(read[name], tensor.half().float()), name


def test_models_of_other_than_pictures_are_refused(tmp_path):
    write_model(VQModel(**arguments(2)), tmp_path / "two")
    with pytest.raises(ValueError, match="it has 2 input and 2 output channels"):
        VQTokenizer(str(tmp_path / "two"))
    write_model(VQModel(**arguments(up_block_types=["UpDecoderBlock2D"] * 2)), tmp_path / "flat")
    with pytest.raises(ValueError, match="as many up blocks as"):
        VQTokenizer(str(tmp_path / "flat"))


def test_weights_that_do_not_match_are_refused_by_name(broken):
    tensors = load_file(broken / WEIGHTS)
    bias = tensors.pop("encoder.conv_in.bias")
    save_file({**tensors, "stranger": bias}, broken / WEIGHTS)
    with pytest.raises(ValueError, match=f"{WEIGHTS}.*encoder.conv_in.bias is missing; stranger is not expected"):
        VQTokenizer.load(broken)


def test_weights_that_are_not_finite_are_refused(broken):
    tensors = load_file(broken / WEIGHTS)
    tensors["encoder.conv_in.bias"][0] = math.nan
    save_file(tensors, broken / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: tensor encoder\.conv_in\.bias contains NaN"):
        VQTokenizer.load(broken)


@pytest.mark.parametrize("place", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, SETTINGS])
def test_a_pipe_or_folder_in_place_of_a_file_is_refused(broken, name, place):
    (broken / name).unlink()
    place(broken / name)
    with pytest.raises(ValueError, match=f"{name} is a (folder|pipe)"):
        VQTokenizer.load(broken)


def test_damaged_folders_are_refused_by_file(broken, tmp_path):
    for name in (CONFIG, WEIGHTS, SETTINGS):
        for spoil in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:30])):
            shutil.copytree(broken, tmp_path / "spoiled", dirs_exist_ok=True)
            spoil(tmp_path / "spoiled" / name)
            with pytest.raises(ValueError, match=name):
                VQTokenizer.load(tmp_path / "spoiled")
    (broken / SETTINGS).write_text('{"height": 16}')
    with pytest.raises(ValueError, match=f"{SETTINGS} must contain height, width"):
        VQTokenizer.load(broken)


# Training ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """24 pictures for training and 8 for validation, some of another size; one is named twice."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number in range(32):
        name = f"{number}.png"
        noise(4, 4, seed=number).resize((16, 16 + number % 3)).save(folder / name)
        segments = [{"image": name}, {"text": "noise"}]
        lines.append(json.dumps({"split": "train" if number < 24 else "validation", "segments": segments}))
    (folder / "metadata.jsonl").write_text("\n".join([*lines, lines[0]]))
    return folder


def fit(data_folder, folder, resume=None, **settings):
    seed_everything(0, verbose=False)
    module = VQTraining("rgb-32", str(folder / "tokenizer"), arguments(), **{**HASTY, **settings})
    data = PictureData(str(data_folder), channels=3, height=16, width=16, batch_size=8)
    trainer = Trainer(
        accelerator="cpu", max_epochs=4, max_steps=-1, limit_train_batches=3, logger=TensorBoardLogger(folder, "log"),
        callbacks=[ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)],
        log_every_n_steps=1, gradient_clip_val=1.0, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    assert trainer.global_step == 12
    return module


LIGHTNING = "lightning.pytorch.utilities.rank_zero"  # the logger of what is printed
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}
HASTY = {"continuous_steps": 2, "learning_rate": 1e-2, "warmup_steps": 1}
QUANTIZERS = {
    "vq": {},
    "fsq": {"quantizer": "fsq", "levels": [4, 3, 2]},
    "lfq": {"quantizer": "lfq"},
    "muon": {"muon": True},
    "opposed": {"adversary": 0.5, "gradient_weight": 0.5, "rate_weight": 0.01, "flip": 0.5},
}


# Lightning 2.6 warns of itself, of few workers, and of a checkpoint from another folder.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*", "ignore:.*num_workers.*", "ignore:.*dirpath has changed.*")
@pytest.mark.parametrize("settings", QUANTIZERS.values(), ids=QUANTIZERS)
def test_training_uses_the_codebook_resumes_exactly_and_exports(settings, data_folder, tmp_path, caplog):
    caplog.set_level(logging.ERROR, logger=LIGHTNING)
    module = fit(data_folder, tmp_path / "whole", **settings)
    events = EventAccumulator(str(next((tmp_path / "whole").glob("log/version_*"))))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/reconstruction")]
    assert losses[-1] < losses[0]
    learned = "quantizer" not in settings  # grids and cubes are filled as a longer training goes on
    assert events.Scalars("val/codebook_usage")[-1].value > (0.5 if learned else 0)
    assert events.Scalars("val/codebook_perplexity")[-1].value > (4 if learned else 1)
    assert events.Images("reconstructions")
    if "adversary" in settings:
        assert [event.step for event in events.Scalars("train/discriminator")] == list(range(6, 12))  # the second half
        assert events.Scalars("train/weight")[-1].value > 0

    resumed = fit(data_folder, tmp_path / "resumed", tmp_path / "whole" / "step=8.ckpt", **settings)
    for one, other in zip(module.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)

    tokenizer = VQTokenizer(str(tmp_path / "whole" / "tokenizer"))
    assert tokenizer.canvas().size == {"height": 16, "width": 16}
    assert tokenizer.resizer.resize == "crop"
    assert tokenizer.codebook_sizes == (24 if "levels" in settings else 16,)
    plain = VQModel.from_pretrained(tmp_path / "whole" / "tokenizer", low_cpu_mem_usage=False)
    signal = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(plain.eval()(signal).sample, module.model.eval()(signal).sample)


def run(data_folder, folder, command="fit", resume=None, callbacks=(), steps=3, data=None, **settings):
    """A training of a few steps, with what it finds to log."""
    module = VQTraining("rgb-32", str(folder / "tokenizer"), arguments(), **{**HASTY, **settings})
    last = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1, save_on_exception=True)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, callbacks=[last, *callbacks], enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    data = PictureData(str(data_folder), batch_size=8, **data or {})
    getattr(trainer, command)(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_training_that_is_resumed_at_its_end_writes_the_same_tokenizer_again(data_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger=LIGHTNING)
    run(data_folder, tmp_path)
    first = contents(tmp_path / "tokenizer")
    shutil.rmtree(tmp_path / "tokenizer")
    trainer = run(data_folder, tmp_path, resume=tmp_path / "last.ckpt")
    assert trainer.global_step == 3
    assert contents(tmp_path / "tokenizer") == first
    assert f"Saved the tokenizer in {tmp_path / 'tokenizer'}." in caplog.text


class Interrupt(Callback):
    """Ctrl-C in the second step."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 1:
            raise KeyboardInterrupt


def test_an_interrupted_training_leaves_a_checkpoint_and_no_tokenizer(data_folder, tmp_path):
    with pytest.raises(SystemExit):
        run(data_folder, tmp_path, callbacks=[Interrupt()])
    assert not (tmp_path / "tokenizer").exists()
    assert list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(("quantizer", "warned"), [("vq", True), ("fsq", False), ("lfq", False)])
def test_a_training_that_ends_before_its_codebook_starts_warns(quantizer, warned, data_folder, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        levels = [4, 4] if quantizer == "fsq" else None
        run(data_folder, tmp_path, steps=1, quantizer=quantizer, levels=levels, continuous_steps=2)
    told = [str(one.message) for one in caught if "untrained codebook" in str(one.message)]
    assert len(told) == warned
    if warned:
        place = tmp_path / "tokenizer"
        assert told[0].startswith(f"The tokenizer in {place} has an untrained codebook")
        assert "Raise max_steps." in told[0]
        assert "ckpt_path" not in told[0]


@pytest.mark.parametrize("resize", ["crop", "pad", "fit"])
def test_a_trained_tokenizer_encodes_the_pictures_that_it_was_trained_on_as_it_saw_them(resize, tmp_path):
    sizes, lines = [(40, 21), (16, 16), (90, 12), (40, 22)], []
    for number, (height, width) in enumerate(8 * sizes):
        noise(height, width, seed=number).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"split": "train", "segments": [{"image": f"{number}.png"}]}))
    lines.append(lines[0].replace("train", "validation"))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    seen = []

    class See(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.append(batch)

    trainer = run(tmp_path, tmp_path, callbacks=[See()], steps=4, data={"resize": resize})
    tokenizer = VQTokenizer(str(tmp_path / "tokenizer"))
    assert tokenizer.resizer == Resizer(resize, 16, 16, 4) == trainer.datamodule.resizer
    pictures = [tokenizer.read(f"{number}.png", tmp_path) for number in range(32)]
    assert len(tokenizer.encode(pictures)) == 32
    expected = sorted(tokenizer.prepared(picture).tobytes() for picture in pictures)
    found = sorted(pixels_CHW.permute(1, 2, 0).numpy().tobytes() for pixels_BCHW in seen for pixels_CHW in pixels_BCHW)
    assert found == expected  # each picture once, in an epoch of four steps


def test_batches_by_size_are_of_one_group_on_all_ranks_and_resume():
    groups, ranks = [[0, 1, 2, 3, 4], list(range(5, 26)), [26]], 2
    both = [BatchesBySize(groups, 4, seed=0, rank=rank, ranks=ranks) for rank in range(ranks)]
    epochs = [[list(batches) for batches in both] for _ in range(2)]
    for epoch, (one, other) in enumerate(epochs):
        assert len(one) == len(other) == len(both[0]) == 1 + 3 + 1
        for mine, theirs in zip(one, other, strict=True):
            assert len(mine) == len(theirs) <= 4
            assert {number for number, _ in [*mine, *theirs]} == {epoch}
            assert sum({index for _, index in [*mine, *theirs]} <= set(group) for group in groups) == 1
        indices = [index for batch in [*one, *other] for _, index in batch]
        assert set(indices) == set(range(27))
        assert len(indices) == 6 + 22 + 2
    assert [[index for _, index in batch] for batch in epochs[0][0]] != [
        [index for _, index in batch] for batch in epochs[1][0]
    ]
    with pytest.raises(ValueError, match=r"fewer items \(3\) than there are processes that train \(4\)"):
        BatchesBySize([[0, 1], [2]], 4, seed=0, rank=0, ranks=4)
    alone = [next(iter(BatchesBySize([[0], [1], [2]], 4, seed=0, rank=rank, ranks=3))) for rank in range(3)]
    assert alone[0] == alone[1] == alone[2]  # a picture of a rare shape is trained, on every rank
    started, resumed = (BatchesBySize(groups, 4, 0, 0, ranks) for _ in range(2))
    running = iter(started)
    head = [next(running), next(running)]
    resumed.load_state_dict(started.state_dict())
    assert head + list(resumed) == epochs[0][0]
    assert list(resumed) == epochs[1][0]


def test_a_preset_alone_decides_size_and_channels(data_folder, tmp_path):
    def data(settings=None, preset="rgb-64", **changes):
        module, pictures = VQTraining(preset, "unused", settings), PictureData(str(data_folder), **changes)
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, fast_dev_run=1, **QUIET).validate(
            module, datamodule=pictures, verbose=False
        )
        return next(iter(pictures.train_dataloader())).shape[1:]

    assert data() == (3, 64, 64)
    assert data(preset="grey-32") == (1, 32, 32)
    assert data({"sample_size": 16}, "rgb-32") == (3, 16, 16)
    assert data(height=32) == (3, 32, 64)
    for changes, words in {
        ("channels", 1): "channels 1, but preset 'rgb-64' has 3",
        ("height", 32, "width", 32): "height 32 and width 32, but preset 'rgb-64' .* 64 pixels",
        ("height", 20): "preset 'rgb-64': an image of height 20 .*stride of 8.* height 16 or 24",
        ("width", 0): "whole numbers of at least 8 pixels, got height 64 and width 0",
    }.items():
        with pytest.raises(ValueError, match=words):
            data(**dict(zip(changes[::2], changes[1::2], strict=True)))


def test_a_picture_of_another_size_is_refused_by_name_where_nothing_is_resized(data_folder):
    data = PictureData(str(data_folder), channels=3, height=16, width=16, resize=None)
    with pytest.raises(ItemError, match=r"\d+\.png: the image has height 1\d and width 16.*Set resize: crop"):
        list(data.train_dataloader())


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_trained_tokenizer_is_evaluated_on_a_split(command, data_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger=LIGHTNING)
    shutil.copytree(data_folder, tmp_path / "data")
    lines = (data_folder / "metadata.jsonl").read_text().replace('"validation"', f'"{command.replace("ate", "ation")}"')
    (tmp_path / "data" / "metadata.jsonl").write_text(lines)
    if command == "test":
        with pytest.raises(ValueError, match="no documents in split validation"):
            run(tmp_path / "data", tmp_path, "validate")
    run(data_folder, tmp_path)
    metrics = run(tmp_path / "data", tmp_path, command, resume=tmp_path / "last.ckpt").callback_metrics
    stage = {"validate": "val", "test": "test"}[command]
    tokenizer = VQTokenizer(str(tmp_path / "tokenizer"))
    pictures = [tokenizer.prepared(tokenizer.read(f"{number}.png", data_folder)) for number in range(24, 32)]
    codes = tokenizer.encode(pictures)
    expected = np.mean([psnr(*pair) for pair in zip(pictures, tokenizer.decode(codes), strict=True)])
    assert float(metrics[f"{stage}/psnr"]) == pytest.approx(expected, abs=0.05)  # the tokenizer rounds to 8 bits
    used = len(torch.cat([one.ids_N for one in codes]).unique())
    assert float(metrics[f"{stage}/codebook_usage"]) == pytest.approx(used / 16)
    assert "codebook has not been trained" not in caplog.text
    run(tmp_path / "data", tmp_path, command)
    assert "The codebook is untrained" in caplog.text


def test_autoencoder_and_discriminator_are_clipped_each_as_a_whole(tmp_path):
    module = VQTraining("rgb-32", str(tmp_path), arguments(), muon=True, adversary=0.5)
    optimizer = MuonAdamW([{"params": [weight], "hidden": weight.ndim > 1} for weight in module.parameters()])
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    module.configure_gradient_clipping(optimizer, 1.0, "norm")
    for part in (module.model, module.discriminator):
        norms = [weight.grad.norm() for weight in part.parameters()]
        assert float(torch.stack(norms).norm()) == pytest.approx(1.0, abs=1e-4)
    module.configure_gradient_clipping(optimizer, 1e-6, "value")
    assert all(float(weight.grad.abs().max()) <= 1e-6 for weight in module.parameters())


@pytest.mark.parametrize(("name", "codes", "levels"), [("fsq", 0, [8, 5, 2, 3]), ("lfq", 32, None)])
def test_a_fixed_quantizer_takes_the_nearest_code_of_the_model(name, codes, levels):
    changes = codebook_arguments(name, codes, levels)
    model = VQModel(**arguments(**changes))
    fixed = fixed_quantizer(name, model, levels).train()
    width = changes["vq_embed_dim"]
    latents_BDhw = 2 * torch.randn(8, width, 6, 6, generator=torch.Generator().manual_seed(0))
    quantized_BDhw, ids_Bhw, _ = quantize(fixed, latents_BDhw)
    by_model_BDhw, _, (_, _, by_model) = model.quantize(latents_BDhw)
    assert torch.equal(by_model.reshape(ids_Bhw.shape), ids_Bhw)
    torch.testing.assert_close(quantized_BDhw, by_model_BDhw)


def test_the_entropy_of_lfq_is_that_of_each_choice_less_that_of_all():
    model = VQModel(**arguments(**codebook_arguments("lfq", 8, None)))
    fixed = fixed_quantizer("lfq", model, None).train()
    latents_BDhw = 0.02 * torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    _, _, loss = quantize(fixed, latents_BDhw)
    latents_ND = latents_BDhw.permute(0, 2, 3, 1).reshape(-1, 3)
    corners_VD = torch.tensor(list(product([-1.0, 1.0], repeat=3)))
    # Of latents z and corners c: softmax of 2·100·z·c, the package's inverse temperature.
    share_NV = torch.softmax(200 * latents_ND @ corners_VD.T, -1)
    expected = torch.special.entr(share_NV).sum(-1).mean() - torch.special.entr(share_NV.mean(0)).sum()
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-3)  # the package's logarithm stops at 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "rgb-33"}, "there is no size 'rgb-33'; the sizes are digits-32"),
        ({"settings": {"depth": 3}}, "settings of size 'rgb-32': .*'depth'"),
        ({"quantizer": "fsq"}, "fsq needs levels such as"),
        ({"quantizer": "lfq", "levels": [8, 8]}, "fsq needs levels such as"),
        ({"quantizer": "fsq", "levels": [8, 1]}, "must each be at least 2"),
        ({"quantizer": "lfq", "settings": {"num_vq_embeddings": 1000}}, "must be a power of two, got 1000"),
        ({"perceptual_weight": 1.0}, "set perceptual_weight and backbone together"),
        ({"perceptual_weight": 1.0, "backbone": "vgg.pth"}, "vgg.pth does not exist"),
        ({"adversary": -1.0}, "adversary must be at least 0, .* got -1.0"),
    ],
)
def test_settings_of_a_training_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        VQTraining(**{"preset": "rgb-32", "folder": "unused", **changes})


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_have_16_to_1024_codes_of_a_picture(name):
    with torch.device("meta"):
        model = VQModel(**PRESETS[name])
    pixels = PRESETS[name]["sample_size"]
    signal = torch.zeros(1, PRESETS[name]["in_channels"], pixels, pixels, device="meta")
    codes = model.encode(signal).latents.shape[2:].numel()
    assert 32 <= pixels <= 512
    assert 16 <= codes <= 1024


def test_training_data_errors_name_the_folder_or_the_file(data_folder, tmp_path):
    with pytest.raises(ValueError, match=r"metadata\.jsonl has no 'photo' segment in split 'train'\. Set `name`"):
        PictureData(str(data_folder), name="photo").train_dataloader()
    with pytest.raises(ValueError, match=r"channels must be 1 .* or 3"):
        PictureData(str(data_folder), channels=2)
    (tmp_path / "metadata.jsonl").write_text('{"segments": [{"image": "lost.png"}]}')
    with pytest.raises(ItemError, match=r"lost\.png"):
        next(iter(PictureData(str(tmp_path), channels=1, height=32, width=32).train_dataloader()))
    (tmp_path / "metadata.jsonl").write_text('{"segments": [{"image": "a.png"}]}\n{"segments": [{"image": 7}]}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: 'image' must be the path of a file, not 7"):
        PictureData(str(tmp_path), channels=1, height=32, width=32).train_dataloader()
    with pytest.raises(ValueError, match="Pass PictureData together with VQTraining"):
        PictureData(str(data_folder)).train_dataloader()


def test_the_size_of_a_file_is_that_of_the_picture_in_it(tmp_path):
    orientation = Image.Exif()
    orientation[ExifTags.Base.Orientation] = 6
    turned = set()
    for name, (format, mode, options) in pictures._kinds().items():
        original = pictures._picture(mode, Random(0))
        (tmp_path / name).write_bytes(pictures._written(original, format, {**options, "exif": orientation}))
        picture, size = read_picture(tmp_path / name), read_size(tmp_path / name)
        assert size == (picture.height, picture.width), name
        if format == "TIFF":
            assert np.array_equal(np.asarray(picture), np.rot90(np.asarray(original), -1)), name
        turned |= {format} if size == (37, 29) else set()
    assert turned == {"JPEG", "PNG", "TIFF", "WEBP"}


@pytest.mark.parametrize(("most", "kind"), [(65_535, b"P5"), (1_023, b"P5"), (1_023, b"P2")])
def test_grey_pictures_of_more_than_8_bits_keep_their_shades(most, kind, tmp_path):
    shades = np.linspace(0, most, 16).astype(np.uint16)
    content = shades.astype(">u2").tobytes() if kind == b"P5" else b" ".join(b"%d" % shade for shade in shades)
    (tmp_path / "a.pgm").write_bytes(b"%s\n4 4\n%d\n" % (kind, most) + content)
    wanted = np.round(shades / most * 65_535).astype(int) >> 8
    for picture in (read_picture(tmp_path / "a.pgm"), Image.open(tmp_path / "a.pgm")):
        assert np.array_equal(np.asarray(convert(picture, "L")).flatten(), wanted)
