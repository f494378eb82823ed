"""`python -m demo [digits|emoji]`: the whole way from data to report, by the commands that a user would type.

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
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# A model of five minutes knows its most usual pictures best: guided less at first, it draws the others too.
_IMAGES = {"order_temperature": 6.0, "num_inference_steps": 12, "guidance_scale": 4.0, "guidance_schedule": "linear"}


class _Subject(NamedTuple):
    """What a demo is about: where it goes, minutes of training, pictures and the option that says how many, size of
    the text vocabulary, and what its command line says of the model beyond `configs/SUBJECT.yaml`."""

    output: Path
    minutes: float
    pictures: int
    option: str
    vocab_size: int
    model: tuple[str, ...] = ()


_SUBJECTS = {
    "digits": _Subject(
        Path("runs/demo"), 4.8, 10_000, "--num-samples", 512, ("--model.init_args.samplers.image", json.dumps(_IMAGES))
    ),
    "emoji": _Subject(Path("runs/emoji"), 20, 64, "--pictures", 1024),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that are not finished yet, and print the report's path."""
    options = _parser().parse_args(arguments)
    output: Path = options.output or _SUBJECTS[options.subject].output
    output.mkdir(parents=True, exist_ok=True)
    done_file = output / "done.json"
    if options.fresh:
        for name in ("log", "checkpoints", "model", "report.html", "metrics.json", "done.json"):
            place = output / name
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    stages = _stages(options, output)
    done: dict[str, dict[str, Any]] = json.loads(done_file.read_text(encoding="utf-8")) if done_file.is_file() else {}
    for name, stage in done.items():
        if stage["command"] != shlex.join(stages[name]):
            sys.exit(
                f"{output}: {name} was done with other options ({stage['command']}); "
                "--fresh begins again, and another --output leaves it alone"
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
    parser = argparse.ArgumentParser(prog="python -m demo", description="From data to report.")
    parser.add_argument(
        "subject",
        nargs="?",
        choices=tuple(_SUBJECTS),
        default="digits",
        help="handwritten digits in ten minutes (default), or emoji in colour in half an hour",
    )
    parser.add_argument("--output", type=Path, help="folder for all (default: runs/demo, of emoji runs/emoji)")
    parser.add_argument("--config", help="of the model (default: configs/SUBJECT.yaml)")
    parser.add_argument("--minutes", type=float, help="of training (default: 4.8, of emoji 20)")
    parser.add_argument("--pictures", type=int, help="in the data set (default: 10000; of each emoji 64)")
    parser.add_argument("--num-samples", type=int, default=320, help="samples judged in each direction (default: 320)")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights, noise and sampling (default: 0)")
    parser.add_argument("--fresh", action="store_true", help="train and judge again; data stay")
    return parser


def _stages(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The commands, by what they do."""
    subject, output, seed = _SUBJECTS[options.subject], str(folder), str(options.seed)
    total = round((subject.minutes if options.minutes is None else options.minutes) * 60)
    pictures = str(subject.pictures if options.pictures is None else options.pictures)
    data, text = f"{output}/data", f"{output}/tokenizers/text"
    model = [
        *("--config", options.config or f"configs/{options.subject}.yaml"),
        *("--seed_everything", seed),
        *("--trainer.default_root_dir", output),
        *("--trainer.max_time", f"00:{total // 3600:02}:{total // 60 % 60:02}:{total % 60:02}"),
        *("--data.init_args.source", data),
        *("--model.init_args.tokenizers.text", json.dumps({"plugin": "bpe", "folder": text})),
        *subject.model,
    ]
    prepare = ["python", f"scripts/prepare_{options.subject}.py", "--output", data, "--seed", seed]
    tokenize = ["python", "-m", "multidiff_bpe", "--data", data, "--vocab-size", str(subject.vocab_size)]
    judge = [
        "python",
        "-m",
        "demo.evaluate",
        "--output",
        output,
        "--seed",
        seed,
        "--num-samples",
        str(options.num_samples),
    ]
    return {
        "data": [*prepare, subject.option, pictures],
        "text tokenizer": [*tokenize, "--output", text],
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
