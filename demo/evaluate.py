"""`python -m demo.evaluate`: judge the trained model of a demo and write `metrics.json` and `report.html`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from demo.corpus import read_names
from demo.metrics import bounds, measure, write_metrics
from demo.page import write_report
from demo.report import read_scalars
from multidiff import MultiDiffPipeline


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge a trained model of a demo and write its report."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of a training (runs/demo)")
    parser.add_argument("--data", type=Path, help="data folder (default: `data` in the output folder)")
    parser.add_argument("--num-samples", type=int, default=320, help="samples judged in each direction (default: 320)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (default: as saved with the model)")
    parser.add_argument("--seed", type=int, default=0, help="of judges and sampling (default: 0)")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    output: Path = options.output
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = MultiDiffPipeline.from_pretrained(output / "model", device=device)
    sampling = {"guidance": options.guidance, "seed": options.seed}
    data = options.data or output / "data"
    subject, names = read_names(data)
    metrics, samples = measure(pipeline, data, num=options.num_samples, **sampling)
    training = json.loads((output / "model" / "training.json").read_text(encoding="utf-8"))
    scalars = read_scalars(output / "log")
    metrics["bound_nats_per_token"] = bounds({tag: points[-1][1] for tag, points in scalars.items()})
    metrics["train_seconds"] = training["seconds"]
    metrics["parameters"] = sum(weight.numel() for weight in pipeline.transformer.parameters())
    metrics["samples_seen"] = training["samples_seen"]
    commands = output / "commands.txt"
    write_report(
        output / "report.html",
        pipeline,
        metrics,
        samples,
        subject=subject,
        names=names,
        logs=output / "log",
        commands=commands.read_text(encoding="utf-8").splitlines() if commands.is_file() else [],
        settings={
            "transformer": {key: value for key, value in pipeline.transformer.config.items() if key[0] != "_"},
            "samplers": {
                name: {key: value for key, value in sampler.settings.items() if value is not None}
                for name, sampler in pipeline.samplers.items()
            },
            "training": training,
        },
        **sampling,
    )
    done = output / "done.json"
    stages = json.loads(done.read_text(encoding="utf-8")).values() if done.is_file() else ()
    before = sum(stage["seconds"] for stage in stages)
    metrics["total_seconds"] = round(before + time.monotonic() - start, 1)
    write_metrics(output / "metrics.json", metrics)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
