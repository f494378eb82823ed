"""Checks of decoding: any codes, items of extreme sizes, several threads at once, and other devices.

Shape suffixes: N codes of one item, 3 axes.
"""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from multidiff.testing.comparison import expect, prefix, same, same_places, short, tensors
from multidiff.testing.encoding import check_codes
from multidiff.testing.isolation import no_gradient, other_random_state, untouched_random_state
from multidiff.testing.storage import check_preview, write
from multidiff.tokenizer import Codes, ModalityTokenizer

HUGE = 512  # units of the longest item that is tried
THREADS = 4


def check_decode(tokenizer: ModalityTokenizer, items: list[Any], codes: list[Codes], folder: Path) -> None:
    """Check that any codes decode to valid items, the same alone, in any batch and each time."""
    generator = torch.Generator().manual_seed(0)
    drawn = [random_codes(tokenizer, one.size, generator) for one in [tokenizer.canvas(), *codes]]
    kept = [Codes(one.ids_N.clone(), one.levels_N.clone(), one.coords_N3.clone(), dict(one.size)) for one in drawn]
    with untouched_random_state("decode()"), no_gradient("decode()"):
        decoded = tokenizer.decode(drawn)
    expect(
        isinstance(decoded, list) and len(decoded) == len(drawn), "decode() must return a list of one item per Codes"
    )
    expect(same(drawn, kept), "decode() changed the codes that it was given")
    expect(not any(tensor.requires_grad for tensor in tensors(decoded)), "decoded items must not require a gradient")
    expect(tokenizer.decode([]) == [], "decode([]) must be []")
    _check_dimensions(tokenizer, [*drawn, *codes])
    with other_random_state():
        again = tokenizer.decode(drawn)
    expect(same(decoded, again), "decode() must be deterministic: two calls gave different items for the same codes")
    alone = [tokenizer.decode([one])[0] for one in drawn]
    expect(same(decoded, alone), "decode() must be batch-invariant: codes alone and in a batch gave different items")
    reverse = tokenizer.decode(drawn[::-1])[::-1]
    expect(same(decoded, reverse), "decode() must be batch-invariant: the order of the batch changed the items")

    for one in tokenizer.encode(decoded):
        check_codes(tokenizer, one, "encode(decode(random codes))")
    for item, one, back in zip(items, codes, tokenizer.encode(tokenizer.decode(codes)), strict=True):
        check_codes(tokenizer, back, "encode(decode(encode(item)))")
        expect(
            same_places(one, back) and one.size == back.size,
            f"a decoded item must have the size of its original: {one.size} became {back.size} ({short(item)})",
        )
    if tokenizer.variable_length:
        canvas = tokenizer.canvas()
        (unit,) = canvas.size
        decoded += tokenizer.decode([prefix(canvas, 0, unit, 0)])
    for number, item in enumerate(decoded):
        check_preview(tokenizer, item)
        write(tokenizer, item, folder / str(number))


def _check_dimensions(tokenizer: ModalityTokenizer, codes: list[Codes]) -> None:
    """Check that the size of items is a number of at least 0 in one unit, or that no item has one."""
    units = set()
    for one in codes:
        found = tokenizer.dimensions(one)
        right = found is None or (
            isinstance(found, tuple)
            and len(found) == 2
            and isinstance(found[0], int | float)
            and 0 <= found[0] < math.inf
            and isinstance(found[1], str)
            and re.fullmatch("[a-z]+", found[1]) is not None
        )
        expect(right, f"dimensions() must be None or a number of at least 0 and a word such as 'byte', not {found!r}")
        units.add(found and found[1])
    expect(len(units) == 1, f"dimensions() must have the same unit for all codes, not {sorted(map(str, units))}")


def check_extremes(tokenizer: ModalityTokenizer) -> None:
    """The shortest item and a very long one. For fixed lengths, an item of four times the default size, if possible."""
    default, generator = tokenizer.canvas().size, torch.Generator().manual_seed(1)
    sizes = [dict.fromkeys(default, HUGE), dict.fromkeys(default, 1)]
    if not tokenizer.variable_length:
        sizes = [{key: 4 * value for key, value in default.items()}]
    for size in sizes:
        try:
            drawn = random_codes(tokenizer, size, generator)
        except ValueError:
            expect(not tokenizer.variable_length, f"canvas(**{size}) must be possible, because variable_length is True")
            continue
        codes = tokenizer.encode(tokenizer.decode([drawn]))
        check_codes(tokenizer, codes[0], f"encode(decode(codes of size {size}))")
        (back,) = tokenizer.encode(tokenizer.decode(codes))
        expect(
            back.size == codes[0].size,
            f"a decoded item must have the size of its original: {codes[0].size} became {back.size}",
        )


def check_threads(tokenizer: ModalityTokenizer, items: list[Any], codes: list[Codes]) -> None:
    """Data loaders and servers call a tokenizer from several threads at the same time."""
    with ThreadPoolExecutor(THREADS) as threads:
        encoded = list(threads.map(lambda item: tokenizer.encode([item])[0], items * THREADS))
        decoded = list(threads.map(lambda one: tokenizer.decode([one])[0], codes * THREADS))
    expect(same(codes * THREADS, encoded), "encode() must be thread-safe: concurrent calls gave different codes")
    again = tokenizer.decode(codes)
    expect(same(again * THREADS, decoded), "decode() must be thread-safe: concurrent calls gave different items")


def check_devices(tokenizer: ModalityTokenizer, items: list[Any], codes: list[Codes]) -> list[str]:
    """Check that codes and items stay on the CPU, wherever the tokenizer computes. Returns the devices tried."""
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    for device in devices:
        tokenizer.to(device)
        for one, there in zip(codes, tokenizer.encode(items), strict=True):
            check_codes(tokenizer, there, f"encode() on {device}")
            expect(
                same_places(one, there), f"encode() on {device} must give the same levels and coordinates as on the CPU"
            )
        decoded = tokenizer.decode(codes)
        far = any(tensor.device.type != "cpu" for tensor in tensors(decoded))
        expect(not far, f"decode() on {device} must return items on the CPU")
        tokenizer.to("cpu")
        expect(
            same(codes, tokenizer.encode(items)), f"codes must be the same as before after a move to {device} and back"
        )
    return ["cpu", *devices]


def random_codes(tokenizer: ModalityTokenizer, size: dict[str, int], generator: torch.Generator) -> Codes:
    """Draw a canvas of the given size full of random codes."""
    canvas = tokenizer.canvas(**size)
    limit_N = torch.tensor(tokenizer.codebook_sizes)[canvas.levels_N]
    canvas.ids_N = (torch.rand(len(canvas), generator=generator, dtype=torch.float64) * limit_N).long()
    return canvas
