"""Tokenizing that is killed at any moment goes on, accepts nothing half-written, and ends in the same shards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

from multidiff.data import DocumentDataModule, tokenizing
from multidiff.data.shards import Shard
from tests.helpers.paths import ROOT

_TOKENIZERS = {"text": {"plugin": "bpe", "preset": "bytes"}}
_DOCUMENTS, _WINDOW = 400, 8


def prepare(folder: Path, random: Random) -> dict:
    """A data folder, and what its shards hold."""
    data = folder / "data"
    data.mkdir(parents=True)
    words = ["red", "blue", "fox", "dog", "runs", "七"]
    texts = [" ".join(random.choices(words, k=random.randrange(1, 9))) for _ in range(_DOCUMENTS)]
    rows = [json.dumps({"segments": [{"text": text}]}) for text in texts]
    (data / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    _run(data, folder / "codes").wait()
    return {"folder": folder, "data": data, "shards": _shards(folder / "codes")}


def attempt(state: dict, number: int, random: Random) -> str:
    """Kill the tokenizing of the folder at a random moment of its work, look at what is there, and let it end."""
    cache = state["folder"] / f"codes-{number}"
    process, written = _run(state["data"], cache), random.randrange(_DOCUMENTS // _WINDOW)
    while process.poll() is None and len(list(cache.rglob("*-*.json"))) <= written:
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.02))
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        outcome = f"killed after {len(list(cache.rglob('*-*.json')))} windows"
    else:
        outcome = "ended before"
    for window in cache.rglob("*-*.json"):  # what says that it is whole is whole
        for info in json.loads(window.read_text())["shards"].values():
            Shard(window.parent, tokenizing.ShardInfo(*info))
    assert _run(state["data"], cache).wait() == 0
    assert _shards(cache) == state["shards"], "other shards"
    assert not list(cache.rglob(".*")), "partial files are left"
    return outcome


def _run(data: Path, cache: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.fuzz.tokenizing", str(data), str(cache)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _shards(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    tokenizing._DOCUMENTS_PER_WINDOW = _WINDOW
    DocumentDataModule(sys.argv[1], _TOKENIZERS, cache=sys.argv[2]).prepare_data()
