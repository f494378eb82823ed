"""Plot a number that several trainings logged over their steps, or over the seconds that they took.

python scripts/plot_curves.py masked=runs/shakespeare causal=runs/shakespeare-causal --output curves.png
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main() -> None:
    """Draw the plot that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_ = "What the plot calls a training, and its folder (trainer.default_root_dir)."
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help=help_)
    parser.add_argument("--metric", default="validation/joint", help="Name of the number (default: validation/joint).")
    parser.add_argument(
        "--over", choices=("steps", "seconds"), default="steps", help="Horizontal axis (default: steps)."
    )
    parser.add_argument("--label", help="What the vertical axis says (default: the metric).")
    parser.add_argument("--output", type=Path, required=True, help="Picture to write, for instance curves.png.")
    arguments = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for run in arguments.runs:
        name, _, folder = run.partition("=")
        try:
            x, y = _curve(Path(folder), arguments.metric, arguments.over)
        except ValueError as error:
            sys.exit(f"plot_curves.py: {error}")
        axes.plot(x, y, marker=".", label=name)
    axes.set(xlabel=arguments.over, ylabel=arguments.label or arguments.metric)
    axes.grid(alpha=0.3)
    axes.legend()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=120)
    print(arguments.output)


def _curve(folder: Path, metric: str, over: str) -> tuple[list[float], list[float]]:
    """The steps or seconds, and the values, that a training logged."""
    log = folder / "log"
    if not log.is_dir():
        raise ValueError(f"{folder} holds no log of a training. Give its trainer.default_root_dir.")
    events = EventAccumulator(str(log), size_guidance={"scalars": 0}).Reload()
    known = events.Tags()["scalars"]
    if metric not in known:
        raise ValueError(f"{log} has no {metric!r}. It has {', '.join(sorted(known))}.")
    scalars = events.Scalars(metric)
    begin = min(events.Scalars(tag)[0].wall_time for tag in known)
    x = [float(one.step) if over == "steps" else one.wall_time - begin for one in scalars]
    return x, [one.value for one in scalars]


if __name__ == "__main__":
    main()
