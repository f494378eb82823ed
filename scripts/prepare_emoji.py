"""Write the emoji data folder: pictures of OpenMoji in colour, captions and spoken names."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    """Write the data folder of the emoji demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/emoji/data"), help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="decides moves, captions, voices and order")
    parser.add_argument("--pictures", type=int, default=64, help="of each emoji to train on, each moved its own way")
    parser.add_argument("--force", action="store_true", help="Make it again even if it is there.")
    arguments = parser.parse_args()
    # Here, not above: every process that speaks imports this file again, and needs no torch.
    from demo.emoji import prepare

    try:
        settings = {"seed": arguments.seed, "pictures": arguments.pictures, "force": arguments.force}
        print(prepare(arguments.output, **settings))
    except (ValueError, ImportError) as error:
        raise SystemExit(f"prepare_emoji.py: {error}") from None


if __name__ == "__main__":
    main()
