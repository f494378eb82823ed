"""The conformance suite of tokenizer plugins: one call in one test of the plugin.

    def test_contract(tmp_path):
        check_tokenizer(MidiTokenizer(), tmp_path)

It prints what it found (`pytest -s` shows it), and needs no test framework: whatever breaks the contract of
`multidiff.tokenizer.ModalityTokenizer` raises an AssertionError that says what is wrong and what is wanted. What only
the plugin can know (that text comes back unchanged, that a picture is close to its original) stays the plugin's own
test. A file that `write` calls `.txt` is taken for what `metadata.jsonl` holds in place, so `read` gets its words; of
any other file `read` gets the path.

Shape suffixes: N codes of one item, 3 axes.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer

# What may lie in a saved tokenizer: nothing here can run code when it is read.
SAVED_SUFFIXES = {".json", ".safetensors", ".txt", ".md", ".yaml"}
HUGE = 512  # units of the longest item that is tried
THREADS = 4


def check_tokenizer(tokenizer: ModalityTokenizer, folder: Path | None = None) -> None:
    """Check every promise of the contract on the tokenizer's own `examples()` and on random codes, empty and huge ones
    among them, alone and batched, from several threads, on every device here, written, read, saved and loaded.

    Prints sizes, speed and files, and that the contract is kept.

    Args:
        tokenizer: the one to check, as small as the plugin allows: it is called some dozens of times.
        folder: where the written items and saved tokenizers go; a temporary folder by default.

    Raises:
        AssertionError: the contract is broken; the message says how.
    """
    if folder is None:
        with TemporaryDirectory() as temporary:
            return check_tokenizer(tokenizer, Path(temporary))
    _check_attributes(tokenizer)
    with _untouched_random_state("examples()"):
        items = tokenizer.examples()
    _expect(isinstance(items, list) and items, "examples() must be a list of at least one item")
    _check_encode(tokenizer, items)
    codes = tokenizer.encode(items)
    _check_canvas(tokenizer, codes)
    _check_decode(tokenizer, items, codes, folder / "decoded")
    _check_extremes(tokenizer)
    _check_threads(tokenizer, items, codes)
    devices = _check_devices(tokenizer, items, codes)
    written = _check_files(tokenizer, items, folder / "items")
    _expect(_same(items, tokenizer.examples()), "write() or preview() changed an item that it was given")
    saved = _check_saving(tokenizer, items, folder / "saved")
    print(_found(tokenizer, items, codes, devices, written, saved))


def _check_attributes(tokenizer: ModalityTokenizer) -> None:
    modality, sizes = tokenizer.modality, tokenizer.codebook_sizes
    _expect(isinstance(modality, str) and modality, f"modality must be a word such as 'text', not {modality!r}")
    _expect(isinstance(sizes, tuple) and sizes, f"codebook_sizes must be a tuple of one size per level, not {sizes!r}")
    for size in sizes:
        _expect(type(size) is int and size > 0, f"codebook_sizes must be positive ints, not {size!r}")
    _expect(
        isinstance(tokenizer.variable_length, bool),
        f"variable_length must be True or False, not {tokenizer.variable_length!r}",
    )
    fingerprint = tokenizer.fingerprint
    _expect(
        isinstance(fingerprint, str) and re.fullmatch("[0-9a-f]{8,}", fingerprint),
        f"fingerprint must be a hex digest (hashlib's hexdigest()), not {fingerprint!r}",
    )
    _expect(tokenizer.fingerprint == fingerprint, "fingerprint must be the same each time it is asked for")
    _expect(tokenizer.to("cpu") is tokenizer, "to() must return the tokenizer itself")


def _check_encode(tokenizer: ModalityTokenizer, items: list[Any]) -> None:
    with _untouched_random_state("encode()"), _no_gradient("encode()"):
        codes = tokenizer.encode(items)
    _expect(isinstance(codes, list) and len(codes) == len(items), "encode() must return a list of one Codes per item")
    for one in codes:
        _check_codes(tokenizer, one, "encode()")
    _expect(_same(items, tokenizer.examples()), "encode() changed an item that it was given")
    _expect(tokenizer.encode([]) == [], "encode([]) must be []")
    with _other_random_state():
        again = tokenizer.encode(items)
    _expect(_same(codes, again), "encode() must be deterministic: two calls gave different codes for the same items")
    alone = [tokenizer.encode([item])[0] for item in items]
    _expect(_same(codes, alone), "encode() must be batch-invariant: an item alone and in a batch got different codes")
    reverse = tokenizer.encode(items[::-1])[::-1]
    _expect(_same(codes, reverse), "encode() must be batch-invariant: the order of the batch changed the codes")
    error = _error_of(lambda: tokenizer.encode([object()]))
    _expect(
        isinstance(error, ItemError),
        f"encode() must raise multidiff.tokenizer.ItemError for what is no item, not {error!r}",
    )


def _check_codes(tokenizer: ModalityTokenizer, codes: Codes, source: str) -> None:
    """`codes` is valid in itself: types, shapes, ranges, unique places."""
    _expect(isinstance(codes, Codes), f"{source} must give multidiff.Codes, not {type(codes).__name__}")
    ids_N, levels_N, coords_N3 = codes.ids_N, codes.levels_N, codes.coords_N3
    for name, tensor in (("ids_N", ids_N), ("levels_N", levels_N), ("coords_N3", coords_N3)):
        _expect(
            isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64 and tensor.device.type == "cpu",
            f"{source}: {name} must be an int64 tensor on the CPU",
        )
    count = ids_N.numel()
    _expect(
        ids_N.shape == levels_N.shape == (count,),
        f"{source}: ids_N and levels_N must both be [N], not {tuple(ids_N.shape)} and {tuple(levels_N.shape)}",
    )
    _expect(coords_N3.shape == (count, 3), f"{source}: coords_N3 must be [{count}, 3], not {tuple(coords_N3.shape)}")
    levels = len(tokenizer.codebook_sizes)
    _expect(bool(((levels_N >= 0) & (levels_N < levels)).all()), f"{source}: levels_N must lie in [0, {levels})")
    limit_N = torch.tensor(tokenizer.codebook_sizes)[levels_N]
    _expect(
        bool(((ids_N >= 0) & (ids_N < limit_N)).all()),
        f"{source}: ids_N must lie in [0, codebook_sizes[level]), sizes {tokenizer.codebook_sizes}",
    )
    _expect(bool((coords_N3 >= 0).all()), f"{source}: coords_N3 must not be negative")
    places = torch.cat([levels_N[:, None], coords_N3], dim=1)
    _expect(
        len(places.unique(dim=0)) == count,
        f"{source}: two codes of one item share a level and coordinates; the model could not tell them apart",
    )
    _expect(isinstance(codes.size, dict), f"{source}: size must be a dict, not {codes.size!r}")
    for key, value in codes.size.items():
        _expect(isinstance(key, str) and type(value) is int, f"{source}: size must map str to int, not {codes.size!r}")
    if tokenizer.variable_length:
        _expect(
            len(codes.size) == 1,
            f"{source}: size of a variable_length tokenizer must have one entry, its length; not {codes.size!r}",
        )
    else:
        _expect(count, f"{source}: an item without any code needs variable_length = True")


def _check_canvas(tokenizer: ModalityTokenizer, codes: list[Codes]) -> None:
    with _untouched_random_state("canvas()"):
        default = tokenizer.canvas()
    _check_codes(tokenizer, default, "canvas()")
    _expect(len(default), "canvas() without arguments must be a blank of some usual size, not empty")
    for one in [default, *codes]:
        canvas = tokenizer.canvas(**one.size)
        _check_codes(tokenizer, canvas, f"canvas(**{one.size})")
        _expect(_same_places(canvas, one), f"canvas(**{one.size}) must have the levels and coordinates of such an item")
        _expect(canvas.size == one.size, f"canvas(**{one.size}) says that its size is {canvas.size}")
        _expect(not canvas.ids_N.any(), f"canvas(**{one.size}): ids_N must all be 0")
    impossible = dict.fromkeys(default.size, -1)
    error = _error_of(lambda: tokenizer.canvas(**impossible))
    _expect(isinstance(error, ValueError), f"canvas(**{impossible}) must raise ValueError, not {error!r}")
    if not tokenizer.variable_length:
        return
    (unit,) = default.size
    for one in codes:
        _expect(set(one.size) == {unit}, f"size must have the key {unit!r} for every item, not {list(one.size)}")
    longest = tokenizer.canvas(**{unit: 7})
    for length in range(1, 8):
        canvas = tokenizer.canvas(**{unit: length})
        _expect(
            len(canvas) * 7 == len(longest) * length,
            f"each {unit} must add the same number of codes: canvas({unit}={length}) has {len(canvas)} codes, "
            f"canvas({unit}=7) has {len(longest)}",
        )
        _expect(
            _same_places(canvas, _prefix(longest, len(canvas), unit, length)),
            f"canvas({unit}={length}) must be a prefix of canvas({unit}=7)",
        )
    _expect(
        (longest.levels_N.view(7, -1) == 0).any(dim=1).all(),
        f"each {unit} must have a code of level 0: there a model says where an item ends",
    )


def _check_decode(tokenizer: ModalityTokenizer, items: list[Any], codes: list[Codes], folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [_random_codes(tokenizer, one.size, generator) for one in [tokenizer.canvas(), *codes]]
    kept = [Codes(one.ids_N.clone(), one.levels_N.clone(), one.coords_N3.clone(), dict(one.size)) for one in drawn]
    with _untouched_random_state("decode()"), _no_gradient("decode()"):
        decoded = tokenizer.decode(drawn)
    _expect(
        isinstance(decoded, list) and len(decoded) == len(drawn), "decode() must return a list of one item per Codes"
    )
    _expect(_same(drawn, kept), "decode() changed the codes that it was given")
    _expect(not any(tensor.requires_grad for tensor in _tensors(decoded)), "decoded items must not require a gradient")
    _expect(tokenizer.decode([]) == [], "decode([]) must be []")
    with _other_random_state():
        again = tokenizer.decode(drawn)
    _expect(_same(decoded, again), "decode() must be deterministic: two calls gave different items for the same codes")
    alone = [tokenizer.decode([one])[0] for one in drawn]
    _expect(_same(decoded, alone), "decode() must be batch-invariant: codes alone and in a batch gave different items")
    reverse = tokenizer.decode(drawn[::-1])[::-1]
    _expect(_same(decoded, reverse), "decode() must be batch-invariant: the order of the batch changed the items")

    for one in tokenizer.encode(decoded):
        _check_codes(tokenizer, one, "encode(decode(random codes))")
    for item, one, back in zip(items, codes, tokenizer.encode(tokenizer.decode(codes)), strict=True):
        _check_codes(tokenizer, back, "encode(decode(encode(item)))")
        _expect(
            _same_places(one, back) and one.size == back.size,
            f"a decoded item must have the size of its original: {one.size} became {back.size} ({_short(item)})",
        )
    if tokenizer.variable_length:
        canvas = tokenizer.canvas()
        (unit,) = canvas.size
        decoded += tokenizer.decode([_prefix(canvas, 0, unit, 0)])
    for number, item in enumerate(decoded):
        _check_preview(tokenizer, item)
        _write(tokenizer, item, folder / str(number))


def _check_extremes(tokenizer: ModalityTokenizer) -> None:
    """The shortest and a very long item; of fixed lengths one of four times every dimension, if it may have that."""
    default, generator = tokenizer.canvas().size, torch.Generator().manual_seed(1)
    sizes = [dict.fromkeys(default, HUGE), dict.fromkeys(default, 1)]
    if not tokenizer.variable_length:
        sizes = [{key: 4 * value for key, value in default.items()}]
    for size in sizes:
        try:
            drawn = _random_codes(tokenizer, size, generator)
        except ValueError:
            _expect(not tokenizer.variable_length, f"canvas(**{size}) must be possible: length varies")
            continue
        codes = tokenizer.encode(tokenizer.decode([drawn]))
        _check_codes(tokenizer, codes[0], f"encode(decode(codes of size {size}))")
        (back,) = tokenizer.encode(tokenizer.decode(codes))
        _expect(
            back.size == codes[0].size,
            f"a decoded item must have the size of its original: {codes[0].size} became {back.size}",
        )


def _check_threads(tokenizer: ModalityTokenizer, items: list[Any], codes: list[Codes]) -> None:
    """Data loaders and servers call a tokenizer from several threads at once."""
    with ThreadPoolExecutor(THREADS) as threads:
        encoded = list(threads.map(lambda item: tokenizer.encode([item])[0], items * THREADS))
        decoded = list(threads.map(lambda one: tokenizer.decode([one])[0], codes * THREADS))
    _expect(_same(codes * THREADS, encoded), "encode() must be thread-safe: calls at the same time gave other codes")
    again = tokenizer.decode(codes)
    _expect(_same(again * THREADS, decoded), "decode() must be thread-safe: calls at the same time gave other items")


def _check_devices(tokenizer: ModalityTokenizer, items: list[Any], codes: list[Codes]) -> list[str]:
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    for device in devices:
        tokenizer.to(device)
        for one, there in zip(codes, tokenizer.encode(items), strict=True):
            _check_codes(tokenizer, there, f"encode() on {device}")
            _expect(
                _same_places(one, there), f"encode() on {device} must give codes at the places that it has on the CPU"
            )
        decoded = tokenizer.decode(codes)
        far = any(tensor.device.type != "cpu" for tensor in _tensors(decoded))
        _expect(not far, f"decode() on {device} must give items on the CPU")
        tokenizer.to("cpu")
        _expect(_same(codes, tokenizer.encode(items)), f"codes must be the same as before, back from {device}")
    return ["cpu", *devices]


def _found(
    tokenizer: ModalityTokenizer,
    items: list[Any],
    codes: list[Codes],
    devices: list[str],
    written: list[Path],
    saved: list[Path],
) -> str:
    start = time.perf_counter()
    tokenizer.encode(items)
    between = time.perf_counter()
    tokenizer.decode(codes)
    rates = [sum(map(len, codes)) / max(1e-9, seconds) for seconds in (between - start, time.perf_counter() - between)]
    levels = " + ".join(f"{size:,}" for size in tokenizer.codebook_sizes)
    lengths, canvas = [len(one) for one in codes], tokenizer.canvas()
    varies = "any length" if tokenizer.variable_length else "length by size"
    files = ", ".join(f"{file.name} ({file.stat().st_size:,} bytes)" for file in saved)
    return (
        f"{type(tokenizer).__name__}: {tokenizer.modality}, {levels} codes, {varies}, fingerprint "
        f"{tokenizer.fingerprint[:12]}\n"
        f"  {len(items)} examples of {min(lengths)} to {max(lengths)} codes; a blank has {len(canvas)} {canvas.size}\n"
        f"  {rates[0]:,.0f} codes a second encoded, {rates[1]:,.0f} decoded, on {' and '.join(devices)}\n"
        f"  items are written as {', '.join(sorted({path.suffix for path in written}))}; saved: {files}\n"
        f"  keeps the contract"
    )


def _check_files(tokenizer: ModalityTokenizer, items: list[Any], folder: Path) -> list[Path]:
    codes, written = tokenizer.encode(items), []
    for number, (item, one) in enumerate(zip(items, codes, strict=True)):
        _check_preview(tokenizer, item)
        path = _write(tokenizer, item, folder / f"item.{number}")
        written.append(path)
        with _untouched_random_state("read()"):
            back = tokenizer.read(_value(path), folder)
        (again,) = tokenizer.encode([back])
        _expect(
            _same_places(one, again) and one.size == again.size,
            f"read() must bring back what write() wrote: {one.size} became {again.size} ({_short(item)})",
        )
        if path.suffix == ".txt":  # read() takes such text as it is: no file can be missing or damaged
            continue
        (folder / f"damaged{path.suffix}").write_bytes(b"\xff\xfe\x00 not what the suffix says")
        for name in (f"missing{path.suffix}", f"damaged{path.suffix}"):
            error = _error_of(lambda name=name: tokenizer.read(name, folder))
            _expect(
                isinstance(error, ItemError) and name in str(error),
                f"read() of a missing or damaged file must raise ItemError naming {name!r}, not {error!r}",
            )
    return written


def _check_preview(tokenizer: ModalityTokenizer, item: Any) -> None:
    with _untouched_random_state("preview()"):
        picture = tokenizer.preview(item)
    _expect(
        isinstance(picture, Image.Image) and min(picture.size) > 0,
        f"preview() must give a PIL image that is not empty, not {picture!r} ({_short(item)})",
    )


def _write(tokenizer: ModalityTokenizer, item: Any, stem: Path) -> Path:
    stem.parent.mkdir(parents=True, exist_ok=True)
    before = set(stem.parent.iterdir())
    with _untouched_random_state("write()"):
        path = tokenizer.write(item, stem)
    _expect(isinstance(path, Path) and path.is_file(), f"write() must return the path of the file, not {path!r}")
    _expect(
        path.parent == stem.parent and path.name == stem.name + path.suffix and path.suffix,
        f"write(item, {stem.name!r}) must write {stem.name!r} plus a suffix into the same folder, not {path}",
    )
    extra = set(stem.parent.iterdir()) - before - {path}
    _expect(not extra, f"write() left other files behind: {sorted(file.name for file in extra)}")
    return path


def _value(path: Path) -> str:
    """What `metadata.jsonl` says for a written item: the words of a text file, the path of any other."""
    return path.read_bytes().decode() if path.suffix == ".txt" else path.name


def _check_saving(tokenizer: ModalityTokenizer, items: list[Any], folder: Path) -> list[Path]:
    codes, fingerprint = tokenizer.encode(items), tokenizer.fingerprint
    saved, empty, broken = folder / "tokenizer", folder / "empty", folder / "broken"
    saved.mkdir(parents=True)
    empty.mkdir()
    tokenizer.save(saved)
    files = sorted(file for file in saved.rglob("*") if file.is_file())
    _expect(files, "save() wrote no file; load() could not tell the saved tokenizer from an empty folder")
    for file in files:
        _expect(
            file.suffix in SAVED_SUFFIXES,
            f"save() wrote {file.name!r}; use {', '.join(sorted(SAVED_SUFFIXES))}, none of which can hold a program",
        )
    loaded = type(tokenizer).load(saved)
    _expect(type(loaded) is type(tokenizer), f"load() must give a {type(tokenizer).__name__}, not {loaded!r}")
    _expect(loaded.codebook_sizes == tokenizer.codebook_sizes, "codebook_sizes must survive save() and load()")
    _expect(loaded.fingerprint == fingerprint, "fingerprint must survive save() and load(), and use")
    _expect(_same(codes, loaded.encode(items)), "a loaded tokenizer must give the codes of the one that was saved")
    error = _error_of(lambda: type(tokenizer).load(empty))
    _expect(
        isinstance(error, ValueError) and str(empty) in str(error),
        f"load() of an empty folder must raise ValueError naming the folder, not {error!r}",
    )
    for file in files:
        if file.suffix not in {".json", ".safetensors"} or file.stat().st_size < 2:
            continue
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(saved, broken)
        content, victim = file.read_bytes(), broken / file.relative_to(saved)
        for what in ("truncated", "missing"):
            victim.write_bytes(content[: len(content) // 2])
            if what == "missing":
                victim.unlink()
            error = _error_of(lambda: type(tokenizer).load(broken))
            _expect(
                isinstance(error, ValueError) and file.name in str(error),
                f"load() with {file.name} {what} must raise ValueError naming the file, not {error!r}",
            )
    return files


def _expect(kept: Any, promise: str) -> None:
    """`assert` that `python -O` leaves in."""
    if not kept:
        raise AssertionError(promise)


def _random_codes(tokenizer: ModalityTokenizer, size: dict[str, int], generator: torch.Generator) -> Codes:
    canvas = tokenizer.canvas(**size)
    limit_N = torch.tensor(tokenizer.codebook_sizes)[canvas.levels_N]
    canvas.ids_N = (torch.rand(len(canvas), generator=generator, dtype=torch.float64) * limit_N).long()
    return canvas


def _prefix(codes: Codes, count: int, unit: str, length: int) -> Codes:
    return Codes(codes.ids_N[:count], codes.levels_N[:count], codes.coords_N3[:count], {unit: length})


def _same_places(one: Codes, other: Codes) -> bool:
    return torch.equal(one.levels_N, other.levels_N) and torch.equal(one.coords_N3, other.coords_N3)


def _same(one: Any, other: Any) -> bool:
    """Equal, up to rounding in pixels and samples: kernels for another batch size add up in another order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Image.Image):
        if one.mode != other.mode or one.size != other.size:
            return False
        return int(np.abs(np.asarray(one, np.int64) - np.asarray(other, np.int64)).max(initial=0)) <= 1
    if isinstance(one, torch.Tensor | np.ndarray):
        left, right = torch.as_tensor(one), torch.as_tensor(other)
        if left.shape != right.shape or left.dtype != right.dtype:
            return False
        return torch.allclose(left, right, atol=1e-4) if left.is_floating_point() else torch.equal(left, right)
    if is_dataclass(one):
        return _same(_fields(one), _fields(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _fields(item: Any) -> dict[str, Any]:
    return asdict(item, dict_factory=dict)


def _tensors(item: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside an item."""
    if isinstance(item, torch.Tensor):
        yield item
    elif is_dataclass(item):
        yield from _tensors(_fields(item))
    elif isinstance(item, dict):
        yield from _tensors(list(item.values()))
    elif isinstance(item, list | tuple):
        for part in item:
            yield from _tensors(part)


def _error_of(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def _short(item: Any) -> str:
    text = repr(item)
    return text if len(text) <= 60 else text[:60] + "…"


@contextmanager
def _no_gradient(what: str) -> Iterator[None]:
    """Nothing is kept for a backward pass inside the block, and gradients are on again behind it."""
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        _expect(torch.is_grad_enabled(), f"{what} switched gradients off for its caller")
    _expect(not saved, f"{what} must not record gradients: put it under torch.no_grad()")


@contextmanager
def _untouched_random_state(what: str) -> Iterator[None]:
    before = _random_state()
    yield
    _expect(
        _same(before, _random_state()),
        f"{what} changed the global random state of torch, numpy or random; draw from a torch.Generator of its own",
    )


@contextmanager
def _other_random_state() -> Iterator[None]:
    """Another global random state inside the block, the caller's again behind it."""
    before = _random_state()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the legacy state is the one to disturb
    torch.manual_seed(1)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def _random_state() -> tuple[Any, Any, Any]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
