"""Checks of attributes, of encoding, and of canvases.

Shape suffixes: N codes of one item, 3 axes.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from multidiff.testing.comparison import error_of, expect, prefix, same, same_places
from multidiff.testing.isolation import no_gradient, other_random_state, untouched_random_state
from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer


def check_attributes(tokenizer: ModalityTokenizer) -> None:
    """Check the types and the ranges of the tokenizer's attributes."""
    modality, sizes = tokenizer.modality, tokenizer.codebook_sizes
    expect(isinstance(modality, str) and modality, f"modality must be a word such as 'text', not {modality!r}")
    expect(isinstance(sizes, tuple) and sizes, f"codebook_sizes must be a tuple of one size per level, not {sizes!r}")
    for size in sizes:
        expect(type(size) is int and size > 0, f"codebook_sizes must be positive ints, not {size!r}")
    expect(
        isinstance(tokenizer.variable_length, bool),
        f"variable_length must be True or False, not {tokenizer.variable_length!r}",
    )
    fingerprint = tokenizer.fingerprint
    expect(
        isinstance(fingerprint, str) and re.fullmatch("[0-9a-f]{8,}", fingerprint),
        f"fingerprint must be a hex digest (hashlib's hexdigest()), not {fingerprint!r}",
    )
    expect(tokenizer.fingerprint == fingerprint, "fingerprint must be the same each time it is read")
    expect(tokenizer.to("cpu") is tokenizer, "to() must return the tokenizer itself")


def check_encode(tokenizer: ModalityTokenizer, items: list[Any]) -> None:
    """Check that encoding is deterministic, batched, and leaves its items alone."""
    with untouched_random_state("encode()"), no_gradient("encode()"):
        codes = tokenizer.encode(items)
    expect(isinstance(codes, list) and len(codes) == len(items), "encode() must return a list of one Codes per item")
    for one in codes:
        check_codes(tokenizer, one, "encode()")
    expect(same(items, tokenizer.examples()), "encode() changed an item that it was given")
    expect(tokenizer.encode([]) == [], "encode([]) must be []")
    with other_random_state():
        again = tokenizer.encode(items)
    expect(same(codes, again), "encode() must be deterministic: two calls gave different codes for the same items")
    alone = [tokenizer.encode([item])[0] for item in items]
    expect(same(codes, alone), "encode() must be batch-invariant: an item alone and in a batch got different codes")
    reverse = tokenizer.encode(items[::-1])[::-1]
    expect(same(codes, reverse), "encode() must be batch-invariant: the order of the batch changed the codes")
    error = error_of(lambda: tokenizer.encode([object()]))
    expect(
        isinstance(error, ItemError),
        f"encode() must raise multidiff.tokenizer.ItemError for an object that is not an item, not {error!r}",
    )


def check_codes(tokenizer: ModalityTokenizer, codes: Codes, source: str) -> None:
    """Check types, shapes and ranges of one item's codes, and that no two codes share a place."""
    expect(isinstance(codes, Codes), f"{source} must return multidiff.Codes, not {type(codes).__name__}")
    ids_N, levels_N, coords_N3 = codes.ids_N, codes.levels_N, codes.coords_N3
    for name, tensor in (("ids_N", ids_N), ("levels_N", levels_N), ("coords_N3", coords_N3)):
        expect(
            isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64 and tensor.device.type == "cpu",
            f"{source}: {name} must be an int64 tensor on the CPU",
        )
    count = ids_N.numel()
    expect(
        ids_N.shape == levels_N.shape == (count,),
        f"{source}: ids_N and levels_N must both be [N], not {tuple(ids_N.shape)} and {tuple(levels_N.shape)}",
    )
    expect(coords_N3.shape == (count, 3), f"{source}: coords_N3 must be [{count}, 3], not {tuple(coords_N3.shape)}")
    levels = len(tokenizer.codebook_sizes)
    expect(bool(((levels_N >= 0) & (levels_N < levels)).all()), f"{source}: levels_N must lie in [0, {levels})")
    limit_N = torch.tensor(tokenizer.codebook_sizes)[levels_N]
    expect(
        bool(((ids_N >= 0) & (ids_N < limit_N)).all()),
        f"{source}: ids_N must lie in [0, codebook_sizes[level]), sizes {tokenizer.codebook_sizes}",
    )
    expect(bool((coords_N3 >= 0).all()), f"{source}: coords_N3 must not be negative")
    places = torch.cat([levels_N[:, None], coords_N3], dim=1)
    expect(
        len(places.unique(dim=0)) == count,
        f"{source}: two codes of one item share a level and coordinates; the model could not tell them apart",
    )
    expect(isinstance(codes.size, dict), f"{source}: size must be a dict, not {codes.size!r}")
    for key, value in codes.size.items():
        expect(isinstance(key, str) and type(value) is int, f"{source}: size must map str to int, not {codes.size!r}")
    if tokenizer.variable_length:
        expect(
            len(codes.size) == 1,
            f"{source}: size of a variable_length tokenizer must have one entry, its length, not {codes.size!r}",
        )
    else:
        expect(count, f"{source}: an item without codes needs variable_length = True")


def check_canvas(tokenizer: ModalityTokenizer, codes: list[Codes]) -> None:
    """Check that canvases have the levels and the coordinates of items of their size."""
    with untouched_random_state("canvas()"):
        default = tokenizer.canvas()
    check_codes(tokenizer, default, "canvas()")
    expect(len(default), "canvas() without arguments must have a usual size, not be empty")
    for one in [default, *codes]:
        canvas = tokenizer.canvas(**one.size)
        check_codes(tokenizer, canvas, f"canvas(**{one.size})")
        expect(
            same_places(canvas, one),
            f"canvas(**{one.size}) must have the levels and coordinates of an item of that size",
        )
        expect(canvas.size == one.size, f"canvas(**{one.size}) has the size {canvas.size}")
        expect(not canvas.ids_N.any(), f"canvas(**{one.size}): ids_N must all be 0")
    impossible = dict.fromkeys(default.size, -1)
    error = error_of(lambda: tokenizer.canvas(**impossible))
    expect(isinstance(error, ValueError), f"canvas(**{impossible}) must raise ValueError, not {error!r}")
    if not tokenizer.variable_length:
        return
    (unit,) = default.size
    for one in codes:
        expect(set(one.size) == {unit}, f"size must have the key {unit!r} for every item, not {list(one.size)}")
    longest = tokenizer.canvas(**{unit: 7})
    for length in range(1, 8):
        canvas = tokenizer.canvas(**{unit: length})
        expect(
            len(canvas) * 7 == len(longest) * length,
            f"each {unit} must add the same number of codes: canvas({unit}={length}) has {len(canvas)} codes, "
            f"canvas({unit}=7) has {len(longest)}",
        )
        expect(
            same_places(canvas, prefix(longest, len(canvas), unit, length)),
            f"canvas({unit}={length}) must be a prefix of canvas({unit}=7)",
        )
    expect(
        (longest.levels_N.view(7, -1) == 0).any(dim=1).all(),
        f"each {unit} must have a code of level 0, because the end of an item is marked at level 0",
    )
