"""Write a data folder of OpenMoji's pictures and their names, a tenth of them held out.

`multidiff fit --config configs/tokenizers/vq_openmoji.yaml` trains a tokenizer of pictures on it. Pictures are drawn on
white; those to train on also turned, scaled, sheared and shifted, every other one with its colour channels exchanged.
OpenMoji: CC BY-SA 4.0.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.openmoji import prepare


def main() -> None:
    """Write the data folder of the picture tokenizer `openmoji`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/openmoji"), help="the folder (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="pixels a side (default: %(default)s)")
    parser.add_argument(
        "--num-augmentations", type=int, default=12, help="moved drawings of each to train on (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides what is held out, and moves (default: 0)")
    parser.add_argument("--force", action="store_true", help="Make it again even if it is there.")
    options = vars(parser.parse_args())
    try:
        print(prepare(**options))
    except (ValueError, ImportError) as error:
        raise SystemExit(f"prepare_openmoji.py: {error}") from None


if __name__ == "__main__":
    main()
