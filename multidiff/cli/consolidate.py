"""`multidiff consolidate CHECKPOINT --output MODEL`: write the model in a checkpoint as a model folder."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from multidiff.cli.errors import UserError


def main(arguments: Sequence[str]) -> None:
    """Write the model folder and print where it is.

    Args:
        arguments: the command line after `consolidate`.

    Raises:
        UserError: `--output` exists.
    """
    parser = argparse.ArgumentParser(
        prog="multidiff consolidate",
        description="Write the model in a checkpoint as a model folder. The shards of a sharded training (--trainer."
        "strategy fsdp2) are put together, which takes as much memory as the weights. Averaged weights are used if the "
        "training averaged them.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this help message and exit.")
    help_ = "Checkpoint of a training: a .ckpt file, or the folder of a sharded training."
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help=help_)
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="Model folder to create.")
    help_ = "Largest size of one file of weights (default: 10GB)."
    parser.add_argument("--max-shard-size", metavar="SIZE", default="10GB", help=help_)
    options = parser.parse_args(arguments)
    if os.path.lexists(options.output):
        raise UserError(f"{options.output} exists already. Choose another --output, or remove it.")
    from multidiff.checkpoints import load_checkpoint, save

    save(load_checkpoint(options.checkpoint), options.output, options.max_shard_size)
    print(f"Saved the model in {options.output}.")
