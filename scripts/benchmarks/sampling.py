"""Quality against work: a demo's model, judged, for all orders and unmasking rules."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from multidiff import Blank, Given, MaskSampler, MultiDiffPipeline
from multidiff.seeding import generator_for

ORDERS = {"text": ("random", "confidence", "margin", "entropy", "left_to_right"),
          "image": ("random", "confidence", "margin", "entropy", "row_scan", "halton"),
          "speech": ("random", "confidence", "margin", "entropy", "left_to_right")}  # fmt: skip
TASKS = {"image_to_text": ("image", "text"), "text_to_image": ("text", "image"), "text_to_audio": ("text", "speech")}
ADAPTIVE = [
    *(
        {"order": "confidence", "unmasking": "threshold", "threshold": value}
        for value in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    ),
    *({"order": "confidence", "unmasking": "factor", "factor": value} for value in (1.0, 2.0, 4.0, 8.0)),
    *(
        {"order": "entropy", "unmasking": "entropy_bound", "entropy_bound": value}
        for value in (1.0, 3.0, 8.0, 12.0, 16.0)
    ),
]


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Quality by the demo's judges against forward passes and seconds, for all orders and unmasking rules."""
    from demo.corpus import label_of, read_names
    from demo.metrics import fit_judges, pairs_of
    from multidiff.data.sources.folder import read_metadata

    pipe = MultiDiffPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    judges = fit_judges(pipe, arguments.data, seed=arguments.seed)
    _, names = read_names(arguments.data)
    records = read_metadata(arguments.data, splits=("test",))
    rows: list[dict[str, Any]] = []
    plans = [(task, options) for task, (_, made) in TASKS.items() for options in _plans(pipe, made)]
    for task, options in tqdm(plans, desc="sampling", leave=False):
        given, made = TASKS[task]
        pairs = pairs_of(records, given, made)[: arguments.num_samples]
        items = [pipe.tokenizers[given].read(value, arguments.data) for value, _ in pairs]
        labels_N = torch.tensor([label_of(value[1] if given == "text" else value[0], names) for value in pairs])
        saved = pipe.samplers[made]
        kept = {key: saved.settings[key] for key in ("temperature", "canvas", "guidance_scale")}
        pipe.samplers[made] = MaskSampler(**{**kept, **options})
        begun = time.perf_counter()
        output = pipe(
            [[Given(given, item), Blank(made)] for item in items],
            generator=[generator_for(arguments.seed, row) for row in range(len(items))],
        )
        seconds = time.perf_counter() - begun
        pipe.samplers[made] = saved
        judged = judges[made].predict([document[1].item for document in output.documents])
        rows.append(
            {
                "task": task,
                "order": options["order"],
                "unmasking": options["unmasking"],
                "rule": _rule(options),
                "adaptive": "num_inference_steps" not in options,
                "score": float((judged == labels_N).float().mean()),
                "items": len(items),
                "nfe": sum(output.nfe) / len(output.nfe),
                "seconds": seconds / len(items),
            }
        )
    _print_tables(rows)
    _plot(rows, arguments.plot)
    return {task: _ratios([row for row in rows if row["task"] == task]) for task in TASKS}


def _plans(pipe: MultiDiffPipeline, made: str) -> list[dict[str, Any]]:
    number = len(pipe.sequencer.blank(made, pipe.canvas(made)))
    steps = sorted({max(1, number // parts) for parts in (8, 4, 2, 1)})
    scheduled = [
        {"order": order, "unmasking": rule, "num_inference_steps": number_of}
        for order in ORDERS[made]
        for rule in ("linear", "cosine", "arccos")
        for number_of in steps
        if number_of < number or rule == "linear"  # with a step for each code all schedules are one
    ]
    return scheduled + ADAPTIVE


def _rule(options: dict[str, Any]) -> str:
    value = options.get("num_inference_steps", options.get(options["unmasking"]))
    return f"{options['unmasking']} {value}"


def _print_tables(rows: list[dict[str, Any]]) -> None:
    """Right answers by order and schedule, in as many forward passes as it says; then what adaptive rules take."""
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task and not row["adaptive"]]
        columns = sorted({(row["nfe"], row["unmasking"]) for row in mine}, key=lambda column: (-column[0], column[1]))
        print(f"\n| {task} | {' | '.join(f'{rule}, {nfe:.0f} passes' for nfe, rule in columns)} |")
        print("|---" * (1 + len(columns)) + "|")
        for order in dict.fromkeys(row["order"] for row in mine):
            scores = {(row["nfe"], row["unmasking"]): row["score"] for row in mine if row["order"] == order}
            cells = [f"{scores[column]:.3f}" if column in scores else "" for column in columns]
            print(f"| {order} | {' | '.join(cells)} |")
    adaptive = [row for row in rows if row["adaptive"]]
    print(f"\n| rule | {' | '.join(TASKS)} |\n{'|---' * (1 + len(TASKS))}|")
    for rule in dict.fromkeys(row["rule"] for row in adaptive):
        cells = [f"{row['score']:.3f} in {row['nfe']:.1f} passes" for row in adaptive if row["rule"] == rule]
        print(f"| {rule} | {' | '.join(cells)} |")
    print()


def _ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By order: the cheapest adaptive rule that is as good as one code a step in that order, within one standard error
    of the difference, and what it saves."""
    ratios: dict[str, Any] = {}
    for order in ("confidence", "entropy"):
        mine = [row for row in rows if row["order"] == order]
        one = max((row for row in mine if not row["adaptive"]), key=lambda row: row["nfe"])

        def as_good(row: dict[str, Any], one: dict[str, Any] = one) -> bool:
            error = (sum(score * (1 - score) for score in (row["score"], one["score"])) / row["items"]) ** 0.5
            return row["adaptive"] and row["score"] >= one["score"] - error

        ratios[order] = {"one_per_step": round(one["score"], 3)}
        for best in sorted(filter(as_good, mine), key=lambda row: row["nfe"])[:1]:
            ratios[order] |= {
                "rule": best["rule"],
                "score": round(best["score"], 3),
                "passes": round(best["nfe"] / one["nfe"], 3),
                "seconds": round(best["seconds"] / one["seconds"], 3),
            }
    return ratios


def _plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(TASKS), figsize=(4 * len(TASKS), 7), sharey="col", layout="constrained")
    for column, task in enumerate(TASKS):
        mine = [row for row in rows if row["task"] == task]
        for line, (key, label) in enumerate((("nfe", "forward passes"), ("seconds", "seconds each"))):
            axis = axes[line][column]
            for order in dict.fromkeys(row["order"] for row in mine):
                some = [row for row in mine if row["order"] == order and not row["adaptive"]]
                axis.scatter([row[key] for row in some], [row["score"] for row in some], s=14, label=order)
            some = [row for row in mine if row["adaptive"]]
            axis.scatter(
                [row[key] for row in some], [row["score"] for row in some], s=40, marker="*", c="k", label="adaptive"
            )
            axis.set(xlabel=label, title=task.replace("_", " ") if not line else "")
        axes[0][column].legend(fontsize=7)
        axes[0][column].set_ylabel("right name")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def add_parsers(commands: Any) -> None:
    """The command `sampling`."""
    help_ = "quality against work, for all orders and unmasking rules"
    parser = commands.add_parser("sampling", help=help_, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"), help="a model of a demo")
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"), help="its data folder")
    parser.add_argument("--num-samples", type=int, default=200, help="test documents of a task")
    parser.add_argument("--seed", type=int, default=0, help="random seed of judges and draws")
    parser.add_argument("--plot", type=Path, default=Path("docs/assets/sampling.png"), help="where the plot goes")
    parser.set_defaults(run=sampling)
