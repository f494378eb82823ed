"""Write the digits data folder: handwriting, captions and spoken words."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    """Write the data folder of the digits demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo/data"), help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="decides splits, moves, captions, voices and order")
    parser.add_argument("--num-samples", type=int, default=10_000, help="pictures, 20 to 10000")
    parser.add_argument(
        "--num-augmentations", type=int, default=2, help="moved copies of each picture and clip trained on"
    )
    parser.add_argument("--force", action="store_true", help="Make it again even if it is there.")
    arguments = parser.parse_args()
    # Here, not above: every process that speaks imports this file again, and needs no torch.
    from demo.digits import prepare

    try:
        settings = {
            "seed": arguments.seed,
            "num_samples": arguments.num_samples,
            "num_augmentations": arguments.num_augmentations,
            "force": arguments.force,
        }
        print(prepare(arguments.output, **settings))
    except ValueError as error:
        raise SystemExit(f"prepare_digits.py: {error}") from None


if __name__ == "__main__":
    main()
