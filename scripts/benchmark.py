"""Measure speed and quality. Every command prints a table and ends with one line of JSON.

Machines are noisy: variants take turns within one run, and what is reported are ratios of their times.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import corpus, decoding, generation, memory, overhead, sampling, training, variance


def main() -> None:
    """Run the command that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (training, decoding, generation, sampling, overhead, variance, memory, corpus):
        module.add_parsers(commands)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `sampling` judges with what is in demo/
    print(json.dumps(arguments.run(arguments)))


if __name__ == "__main__":
    main()
