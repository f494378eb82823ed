"""`multidiff new-tokenizer NAME`: create a package for a new tokenizer plugin."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> None:
    """Write the package and print what to do next.

    Args:
        arguments: the command line after `new-tokenizer`.
    """
    parser = argparse.ArgumentParser(
        prog="multidiff new-tokenizer",
        description="Create a package for a new tokenizer plugin. It is small and complete, and its tests pass.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this help message and exit.")
    help_ = "Name of the plugin: lower-case letters, digits and _, for instance melody."
    parser.add_argument("name", metavar="NAME", help=help_)
    help_ = "Folder to create (default: multidiff-NAME)."
    parser.add_argument("--output", metavar="FOLDER", type=Path, help=help_)
    options = parser.parse_args(arguments)
    from multidiff.plugins.scaffold import write_package

    folder = write_package(options.name, options.output or Path(f"multidiff-{options.name}"))
    print(f"Created {folder}, a tokenizer package that works. {folder / 'README.md'} explains how to change it.")
    print(f"Next: pip install -e {folder} && cd {folder} && python -m pytest test_{options.name}.py")
