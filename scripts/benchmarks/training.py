"""How fast training is, by size, length of documents and size of batches, as a share of what matrix products reach."""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.meter import Meter
from benchmarks.mixed import mixed_and_sorted
from benchmarks.plain import beside_plain, layers_alone
from benchmarks.synthetic import LARGEST_VOCABULARY, write_configuration
from multidiff.cli import configuration, main

_HEAD = ("size", "tokens of a document", "of a batch", "tokens/s", "documents/s", "GFLOP of a token")
_HEAD += ("model", "product", "share", "data wait", "memory")


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train each configuration on documents of each length in batches of each size, and print a row for each."""
    if arguments.vocabulary > LARGEST_VOCABULARY:
        raise SystemExit(f"--vocabulary must be at most {LARGEST_VOCABULARY:,}, got {arguments.vocabulary:,}.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    contents = {name: yaml.safe_load(configuration.read(configuration.find(name))) for name in arguments.config}
    settings = contents[arguments.config[0]]["model"]["init_args"].get("transformer", {})
    result: dict[str, Any] = {"precision": arguments.precision, "rows": []}
    print(f"{arguments.precision}; model and product in GFLOP/s, memory in GB")
    print(f"| {' | '.join(_HEAD)} |\n|{'---|' * len(_HEAD)}")
    for name in arguments.config:
        for row in _rows(name, "data" in contents[name], arguments):
            result["rows"].append(row)
            print(_formatted(row), flush=True)
    result["device"] = Meter.device_name
    length, tokens = arguments.lengths[0], arguments.batch_tokens[0]
    if arguments.plain:
        sizes = (length, max(1, tokens // length), arguments.rounds)
        result |= beside_plain(settings, arguments.vocabulary, *sizes) | layers_alone(settings, *sizes)
    if arguments.mixed:
        result |= mixed_and_sorted(settings, arguments.vocabulary, max(arguments.lengths), tokens, arguments.rounds)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "training.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        plot(result["rows"], arguments.output / "training.png")
    return result


def _rows(name: str, has_data: bool, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each length and batch; one row for a configuration with data of its own."""
    sweep = itertools.product(arguments.lengths, arguments.batch_tokens) if not has_data else [(None, None)]
    for length, tokens in sweep:
        folder = Path(tempfile.mkdtemp())
        try:
            configs = [name]
            if length and tokens:
                batch = max(1, tokens // length)
                made = write_configuration(folder, arguments.vocabulary, length, 32 * batch, batch)
                configs = [str(made), name]
            train(configs, folder, arguments.precision, arguments.rounds, arguments.options)
        finally:
            shutil.rmtree(folder)
        rounds = Meter.measured
        seconds, flops = (sum(getattr(one, name) for one in rounds) for name in ("seconds", "flops"))
        steps, documents, tokens = (
            sum(getattr(one, name) for one in rounds) for name in ("steps", "documents", "tokens")
        )
        product = sum(one.product_flops for one in rounds) / sum(one.product_seconds for one in rounds)
        yield {
            "size": name,
            "tokens of a document": length or round(tokens / documents),
            "tokens of a batch": round(tokens / steps),
            "tokens/s": round(tokens / seconds),
            "documents/s": round(documents / seconds, 2),
            "GFLOP of a token": round(flops / tokens / 1e9, 4),
            "model GFLOP/s": round(flops / seconds / 1e9, 1),
            "product GFLOP/s": round(product / 1e9, 1),
            "share": round(flops / seconds / product, 3),
            "data wait": round(sum(one.waited for one in rounds) / seconds, 4),
            "memory GB": round(Meter.peak_bytes / 1e9, 2),
        }


def train(configs: list[str], folder: Path, precision: str, rounds: int, options: list[str]) -> None:
    """Run `multidiff fit` with a `Meter`, which holds what it measured.

    Args:
        configs: paths or names, in the order in which they are given.
        folder: what the training writes to.
        precision: Lightning's.
        rounds: to measure.
        options: more options of `multidiff fit`.
    """
    meter = json.dumps({"class_path": "benchmarks.meter.Meter", "init_args": {"rounds": rounds}})
    words = ["fit", *(word for config in configs for word in ("--config", config))]
    words += ["--trainer.default_root_dir", str(folder), "--trainer.precision", precision]
    words += ["--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    warnings.filterwarnings("ignore", "LightningCLI's args parameter", UserWarning)
    with redirect_stdout(sys.stderr):  # the table stays free of what a training says
        main([*words, "--trainer.callbacks+", meter, *options])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second and the share of the peak over the length of documents, a line for each size and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    lines = dict.fromkeys((row["size"], row["tokens of a batch"]) for row in rows)
    ticks = sorted({row["tokens of a document"] for row in rows})
    for axis, key, label in ((axes[0], "tokens/s", "tokens/s"), (axes[1], "share", "share of a matrix product")):
        for size, tokens in lines:
            points = sorted(
                (row["tokens of a document"], row[key])
                for row in rows
                if (row["size"], row["tokens of a batch"]) == (size, tokens)
            )
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{size}, batches of {tokens:,}")
        axis.set(xlabel="tokens of a document", ylabel=label, ylim=(0, 1.1 * max(row[key] for row in rows)))
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _formatted(row: dict[str, Any]) -> str:
    cells = [
        row["size"],
        f"{row['tokens of a document']:,}",
        f"{row['tokens of a batch']:,}",
        f"{row['tokens/s']:,}",
        f"{row['documents/s']:,}",
        f"{row['GFLOP of a token']:.3f}",
        f"{row['model GFLOP/s']:,}",
        f"{row['product GFLOP/s']:,}",
        f"{row['share']:.2f}",
        f"{row['data wait']:.1%}",
        f"{row['memory GB']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def add_parsers(commands: Any) -> None:
    """The command `training`."""
    help_ = "tokens a second, share of the peak, memory and data wait; sweeps sizes, lengths and batches"
    parser = commands.add_parser(
        "training", help=help_, description=training.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    help_ = "sizes such as model/tiny, trained on random texts; a configuration with data is trained on these"
    add("--config", nargs="+", default=["model/tiny"], metavar="FILE|NAME", help=help_)
    add("--lengths", type=int, nargs="+", default=[512], help="tokens of each document of the random texts")
    add("--batch-tokens", type=int, nargs="+", default=[8192], help="tokens of a batch of random texts")
    add("--vocabulary", type=int, default=1024, help="codes of the random texts")
    add("--precision", default="32-true", help="Lightning's, for instance bf16-mixed")
    add("--rounds", type=int, default=10, help="rounds of about a second, or a step")
    add("--threads", type=int, help="threads of torch; all cores by default")
    help_ = "also compare a step of the first size with a plain Llama-type stack, and measure its layers alone (CPU)"
    add("--plain", action="store_true", help=help_)
    help_ = "also compare documents of 64 tokens to the longest of --lengths in mixed batches with sorted ones (CPU)"
    add("--mixed", action="store_true", help=help_)
    add("--output", type=Path, metavar="FOLDER", help="write training.json and training.png there")
    add("options", nargs="*", help="more options of `multidiff fit`, after --")
    parser.set_defaults(run=training)
