"""How much memory the largest tensors take: the loss over a large vocabulary, and loading a model."""

import argparse
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from multidiff.checkpoints.transformer import load_transformer
from multidiff.models import MaskedDiffusionTransformer
from multidiff.seeding import generator_for
from multidiff.sequence import SharedVocabulary
from multidiff.sequence.vocabulary import TokenizerLayout

_DOCUMENT = 512  # tokens
_FEW = 256  # codes of the span that the loss is compared with


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peaks of memory, in MB."""
    if not Path("/proc/self/status").exists():
        raise SystemExit("This benchmark reads /proc, which this system does not have.")
    torch.set_num_threads(arguments.threads)
    layouts = {name: TokenizerLayout(None, "line", (size,), False, name) for name, size in
               (("few", _FEW), ("many", arguments.vocabulary))}  # fmt: skip
    vocabulary = SharedVocabulary(layouts)
    model = MaskedDiffusionTransformer(vocabulary.rows, arguments.hidden, 1, num_heads=4)
    model.initialize(generator_for(0))
    ids_P = torch.arange(arguments.tokens) % _FEW + vocabulary.spans["few"][0][0]
    positions_P3 = (torch.arange(arguments.tokens) % _DOCUMENT)[:, None].expand(-1, 3)
    starts = torch.arange(0, arguments.tokens + _DOCUMENT, _DOCUMENT).clamp_max(arguments.tokens)
    targets = torch.arange(arguments.tokens) % _FEW
    peaks = {}
    for name in ("few", "few", "many"):  # the first pass allocates gradients
        with _peak() as peak:
            positions = [(torch.arange(arguments.tokens), vocabulary.spans[name][0])]
            (nats,) = model(ids_P, positions_P3, starts, positions, positions_P3, targets)
            nats.mean().backward()
        peaks[name] = peak[0]
    loss = peaks["many"] - peaks["few"]
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**20
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(1) as fresh:
        model.save_pretrained(folder)
        loading = fresh.apply(_loading, (Path(folder), vocabulary))
    logits = arguments.tokens * arguments.vocabulary * 4 / 2**20
    print("| what | MB |\n|---|---|")
    print(
        f"| logits of {arguments.tokens:,} tokens over {arguments.vocabulary:,} codes as one tensor | {logits:,.0f} |"
    )
    print(f"| their loss and its gradients, more than over {_FEW} codes | {loss:,.0f} |")
    print(f"| the weights | {size:,.0f} |\n| loading them | {loading:,.0f} |")
    return {"loss, MB": round(loss), "loading, times the weights": round(loading / size, 2)}


def _loading(folder: Path, vocabulary: SharedVocabulary) -> float:
    with _peak() as peak:
        load_transformer(folder, vocabulary)
    return peak[0]


@contextmanager
def _peak() -> Iterator[list[float]]:
    """The most memory of this process inside, beyond that before, in MB, without files that are mapped into it."""
    done, before = threading.Event(), _used()
    peak = [0.0]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _used() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], _used() - before)


def _used() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def add_parsers(commands: Any) -> None:
    """The command `memory`."""
    parser = commands.add_parser("memory", help="memory of a loss over a large vocabulary, and of loading a model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default: all cores)")
    for name, default, help_ in (
        ("tokens", 16_384, "masked tokens"),
        ("vocabulary", 150_000, "codes of the large vocabulary"),
        ("hidden", 128, "hidden size"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{help_} (default: %(default)s)")
    parser.set_defaults(run=memory)
