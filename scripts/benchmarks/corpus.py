"""A large corpus: the time and memory of tokenizing it, of starting a training on its shards, and of its batches."""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from multidiff.data import DocumentDataModule
from multidiff.data.sources import Folder

_TOKENIZERS = {"text": {"plugin": "bpe", "preset": "bytes"}}
_WORDS = ("the", "a", "one", "two", "red", "blue", "fox", "dog", "sees", "draws", "names", "seven", "picture", "and")
_STEPS = ("tokenize", "start")


def add_parsers(commands: Any) -> None:
    """Add `corpus` to the commands."""
    parser = commands.add_parser("corpus", help="Tokenize a synthetic corpus, and start on its shards.")
    parser.add_argument("--documents", type=int, default=1_000_000, help="Number of documents (default: 1,000,000).")
    parser.add_argument("--workers", type=int, default=0, help="Processes that read files (default: 0).")
    parser.add_argument("--folder", type=Path, help="Where to keep the corpus (default: a temporary folder).")
    parser.add_argument("--step", choices=_STEPS, help=argparse.SUPPRESS)  # what a process of its own measures
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure each step in a process of its own, print a table, and return the numbers."""
    if arguments.step:
        return {"tokenize": _tokenize, "start": _start}[arguments.step](arguments.folder, arguments.workers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        _write(folder, arguments.documents)
        found: dict[str, Any] = {"documents": arguments.documents}
        for step in _STEPS:
            command = [sys.executable, sys.argv[0], "corpus", "--step", step, "--folder", str(folder)]
            command += ["--workers", str(arguments.workers)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[step] = json.loads(output.splitlines()[-1])
    print(f"{arguments.documents:,} documents")
    for step in _STEPS:
        for name, value in found[step].items():
            print(f"{step:10}{name:46}{value:>12,.1f}")
    return found


def _tokenize(folder: Path, workers: int) -> dict[str, float]:
    data = DocumentDataModule(str(folder), _TOKENIZERS, num_workers=workers)
    before = _peak()
    started = time.perf_counter()
    data.prepare_data()
    seconds = time.perf_counter() - started
    parts = Folder(folder).parts()
    return {"seconds": seconds, "peak memory above the start, MB": _peak() - before, "parts": float(parts)}


def _start(folder: Path, workers: int) -> dict[str, float]:
    data = DocumentDataModule(str(folder), _TOKENIZERS, num_workers=workers)
    before = _peak()
    started = time.perf_counter()
    data.prepare_data()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    documents = sum(len(batch) for batch in islice(batches, 3000))
    return {
        "seconds to the first batch": seconds,
        "documents a second after it": documents / (time.perf_counter() - started),
        "peak memory above the start, MB": _peak() - before,
    }


def _write(folder: Path, documents: int) -> None:
    """A data folder of short texts; kept if it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "metadata.jsonl").exists():
        return
    drawn = random.Random(0)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(documents):
            text = " ".join(drawn.choices(_WORDS, k=drawn.randrange(3, 20)))
            file.write(json.dumps({"segments": [{"text": text}]}) + "\n")


def _peak() -> float:
    """The most memory that this process has taken, in MB; mapped files that others could share count as well."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
