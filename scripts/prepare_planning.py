"""Write a data folder of planning problems: Sudoku, paths through stars, or Countdown.

    python scripts/prepare_planning.py sudoku --size 4 --output runs/sudoku4/data

Every problem is a document of a question and an answer. `configs/planning/` trains on them, and `scripts/evaluate.py
planning` measures how many a model solves. A held-out problem is not a problem to train on in other words, whatever the
seed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.planning.corpus import FAMILIES, prepare
from demo.planning.countdown import Countdown
from demo.planning.path_star import PathStar
from demo.planning.sudoku import Sudoku


def main() -> None:
    """Write the data folder that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output", type=Path, required=True, help="Folder to write.")
    shared.add_argument("--train", type=int, default=50_000, help="Problems to train on (default: %(default)s).")
    help_ = "Problems of the validation split and of the test split, each (default: %(default)s)."
    shared.add_argument("--held-out", type=int, default=1000, help=help_)
    shared.add_argument("--seed", type=int, default=0, help="Random seed (default: %(default)s).")
    commands = parser.add_subparsers(required=True, metavar="FAMILY", dest="family")

    sudoku = commands.add_parser(Sudoku.name, parents=[shared], help="Sudoku with one solution.")
    sudoku.add_argument("--size", type=int, default=4, help="Cells of a side, 4 or 9 (default: %(default)s).")
    sudoku.add_argument("--min-givens", type=int, help="Least number of givens (default: 4, or 26 for 9×9 cells).")
    sudoku.add_argument("--max-givens", type=int, help="Greatest number of givens (default: 10, or 50).")

    star = commands.add_parser(PathStar.name, parents=[shared], help="Paths through stars.")
    star.add_argument("--degree", type=int, default=5, help="Arms of a star (default: %(default)s).")
    star.add_argument("--length", type=int, default=5, help="Nodes of a path (default: %(default)s).")

    countdown = commands.add_parser(Countdown.name, parents=[shared], help="Equations that make a target of numbers.")
    countdown.add_argument("--numbers", type=int, default=4, help="How many numbers there are (default: %(default)s).")
    countdown.add_argument("--largest", type=int, default=99, help="The largest number (default: %(default)s).")

    options = vars(parser.parse_args())
    family = FAMILIES[options.pop("family")]
    folder = {key: options.pop(key) for key in ("output", "train", "held_out", "seed")}
    try:
        print(prepare(family=family(**options), **folder))
    except ValueError as error:
        raise SystemExit(f"prepare_planning.py: {error}") from None


if __name__ == "__main__":
    main()
