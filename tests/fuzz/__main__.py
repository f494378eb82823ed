"""Run a fuzzer in a process that may die or hang, and count the outcomes."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

_START_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("fuzzer", help="a module of tests/fuzz")
    parser.add_argument("--count", type=int, default=500, help="cases (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one (default: 0)")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds a case may take (default: 10)")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, outcome, fault in _outcomes(options, Path(folder)):
            counts[outcome] += 1
            if fault:
                failed += 1
                print(f"--- case {number}: {outcome}\n{fault}", flush=True)
    for outcome, count in counts.most_common():
        print(f"{count:6}  {outcome}")
    sys.exit(1 if failed else 0)


def _outcomes(options: argparse.Namespace, folder: Path) -> Iterator[tuple[int, str, str]]:
    """Number, outcome and, where it is a fault, its description, of each case."""
    context = multiprocessing.get_context("fork")  # of a process that has imported nothing and has no threads
    number, end = options.first, options.first + options.count
    while number < end:
        ours, theirs = context.Pipe()
        place = folder / str(number)
        place.mkdir()
        process = context.Process(target=_run, args=(options.fuzzer, options.seed, place, number, end, theirs))
        process.start()
        theirs.close()
        try:
            _wait_for_start(ours, options.fuzzer)
            while number < end:
                if not ours.poll(options.limit):
                    yield number, "hang", f"no end after {options.limit:g} s"
                    break
                outcome, fault = ours.recv()
                yield number, outcome, fault
                number += 1
        except EOFError:
            process.join()
            yield number, "death", f"Python ended with exit code {process.exitcode}"
        finally:
            process.kill()
            process.join()
        number += 1  # behind the case that hung or killed Python


def _wait_for_start(connection: Connection, fuzzer: str) -> None:
    try:
        if connection.poll(_START_SECONDS):
            connection.recv()
            return
    except EOFError:
        pass
    raise SystemExit(f"{fuzzer}: `prepare` failed or took longer than {_START_SECONDS} s")


def _run(fuzzer: str, seed: int, folder: Path, number: int, end: int, connection: Connection) -> None:
    module = import_module(f"{__package__}.{fuzzer}")
    state = module.prepare(folder, Random(seed))
    connection.send("ready")
    for each in range(number, end):
        try:
            connection.send((module.attempt(state, each, Random(f"{seed}/{each}")), ""))
        except Exception as error:
            connection.send((f"crash ({type(error).__name__})", traceback.format_exc()))


if __name__ == "__main__":
    main()
