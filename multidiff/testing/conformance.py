"""The suite: all checks in order, and a summary of what they found."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from multidiff.testing.comparison import expect, same
from multidiff.testing.decoding import check_decode, check_devices, check_extremes, check_threads
from multidiff.testing.encoding import check_attributes, check_canvas, check_encode
from multidiff.testing.isolation import untouched_random_state
from multidiff.testing.storage import check_files, check_saving
from multidiff.tokenizer import Codes, ModalityTokenizer


def check_tokenizer(tokenizer: ModalityTokenizer, folder: Path | None = None) -> None:
    """Check that a tokenizer keeps every promise of `ModalityTokenizer`, and print a summary.

    The suite encodes the tokenizer's own `examples()` and decodes random codes, including empty and very long ones. It
    does so one by one, in batches, from several threads, and on every device of this machine. It also writes and reads
    items, and saves and loads the tokenizer.

    Args:
        tokenizer: the tokenizer to check. Choose a small one, because the suite calls it dozens of times.
        folder: where items and saved tokenizers are written. The default is a temporary folder.

    Raises:
        AssertionError: the tokenizer breaks the contract; the message says how.
    """
    if folder is None:
        with TemporaryDirectory() as temporary:
            return check_tokenizer(tokenizer, Path(temporary))
    check_attributes(tokenizer)
    with untouched_random_state("examples()"):
        items = tokenizer.examples()
    expect(isinstance(items, list) and items, "examples() must be a list of at least one item")
    check_encode(tokenizer, items)
    codes = tokenizer.encode(items)
    check_canvas(tokenizer, codes)
    check_decode(tokenizer, items, codes, folder / "decoded")
    check_extremes(tokenizer)
    check_threads(tokenizer, items, codes)
    devices = check_devices(tokenizer, items, codes)
    written = check_files(tokenizer, items, folder / "items")
    expect(same(items, tokenizer.examples()), "write() or preview() changed an item that it was given")
    saved = check_saving(tokenizer, items, folder / "saved")
    print(_summary(tokenizer, items, codes, devices, written, saved))


def _summary(
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
    varies = "variable length" if tokenizer.variable_length else "fixed length"
    files = ", ".join(f"{file.name} ({file.stat().st_size:,} bytes)" for file in saved)
    return (
        f"{type(tokenizer).__name__}: {tokenizer.modality}, {levels} codes, {varies}, fingerprint "
        f"{tokenizer.fingerprint[:12]}\n"
        f"  {len(items)} examples with {min(lengths)} to {max(lengths)} codes; the default canvas has {len(canvas)} "
        f"{canvas.size}\n"
        f"  encodes {rates[0]:,.0f} and decodes {rates[1]:,.0f} codes per second; works on {' and '.join(devices)}\n"
        f"  items are written as {', '.join(sorted({path.suffix for path in written}))}; saved: {files}\n"
        f"  keeps the contract"
    )
