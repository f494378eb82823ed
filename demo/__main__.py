"""`python -m demo`: the whole way from data to report, by the commands that a user would type.

Every stage is a process of its own. What is finished is not done again; an interrupted training goes on from its last
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# A model of five minutes knows its most usual pictures best: guided less at first, it draws the others too.
_IMAGES = {"order_temperature": 6.0, "num_inference_steps": 12, "guidance_scale": 4.0, "guidance_schedule": "linear"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that are not finished yet, and print the report's path."""
    options = _parser().parse_args(arguments)
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    done_file = output / "done.json"
    if options.fresh:
        for name in ("log", "checkpoints", "model", "report.html", "metrics.json", "done.json"):
            place = output / name
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    stages = _stages(options)
    done: dict[str, dict[str, Any]] = json.loads(done_file.read_text(encoding="utf-8")) if done_file.is_file() else {}
    for name, stage in done.items():
        if stage["command"] != shlex.join(stages[name]):
            sys.exit(
                f"{output}: {name} was done with other options ({stage['command']}); "
                "--fresh begins anew, and another --output leaves it alone"
            )
    commands = output / "commands.txt"
    commands.write_text("".join(f"{shlex.join(command)}\n" for command in stages.values()), encoding="utf-8")
    for number, (name, command) in enumerate(stages.items(), start=1):
        if name in done:
            print(f"[{number}/{len(stages)}] {name}: done before, in {done[name]['seconds']:.0f} s")
            continue
        last = output / "checkpoints" / "last.ckpt"
        if name == "training" and last.is_file():
            command = [*command, "--ckpt_path", str(last)]
        print(f"[{number}/{len(stages)}] {name}: {shlex.join(command)}", flush=True)
        start = time.monotonic()
        code = subprocess.run(_executable(command), cwd=ROOT, check=False).returncode
        if code or (name == "training" and not (output / "model").is_dir()):
            sys.exit(f"{name} stopped; the same command goes on from here")
        done[name] = {"seconds": round(time.monotonic() - start, 1), "command": shlex.join(stages[name])}
        partial = done_file.with_suffix(".partial")
        partial.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
        partial.replace(done_file)
    print(f"\n{output / 'metrics.json'} holds the numbers.\nReport: {output / 'report.html'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m demo", description="From data to report in ten minutes.")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for all (default: runs/demo)")
    parser.add_argument("--config", default="configs/digits.yaml", help="of the model (default: configs/digits.yaml)")
    parser.add_argument("--minutes", type=float, default=4.8, help="of training (default: 4.8)")
    parser.add_argument("--pictures", type=int, default=10_000, help="in the data set (default: 10000)")
    parser.add_argument("--num", type=int, default=320, help="samples judged in each direction (default: 320)")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights, noise and sampling (default: 0)")
    parser.add_argument("--fresh", action="store_true", help="train and judge again; data stay")
    return parser


def _stages(options: argparse.Namespace) -> dict[str, list[str]]:
    """The commands, by what they do."""
    output, seed = str(options.output), str(options.seed)
    total = round(options.minutes * 60)
    data, text = f"{output}/data", f"{output}/tokenizers/text"
    model = [
        *("--config", options.config),
        *("--seed_everything", seed),
        *("--trainer.default_root_dir", output),
        *("--trainer.max_time", f"00:{total // 3600:02}:{total // 60 % 60:02}:{total % 60:02}"),
        *("--data.init_args.folder", data),
        *("--model.init_args.tokenizers.text", json.dumps({"plugin": "bpe", "folder": text})),
        *("--model.init_args.samplers.image", json.dumps(_IMAGES)),
    ]
    prepare = ["python", "scripts/prepare_digits.py", "--output", data, "--seed", seed, "--num", str(options.pictures)]
    judge = ["python", "-m", "demo.evaluate", "--output", output, "--seed", seed, "--num", str(options.num)]
    return {
        "data": prepare,
        "text tokenizer": ["python", "-m", "multidiff_bpe", "--data", data, "--vocab-size", "512", "--output", text],
        "training": ["multidiff", "fit", *model],
        "bound": ["multidiff", "test", *model, "--ckpt_path", f"{output}/checkpoints/last.ckpt"],
        "report": judge,
    }


def _executable(command: Sequence[str]) -> list[str]:
    """The command with the programs of this environment."""
    program = {"python": sys.executable, "multidiff": str(Path(sys.executable).with_name("multidiff"))}[command[0]]
    return [program, *command[1:]]


if __name__ == "__main__":
    main()
