"""`multidiff new-tokenizer NAME`: a small complete tokenizer package to start from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> None:
    """The command; `arguments` are those behind `new-tokenizer`."""
    parser = argparse.ArgumentParser(prog="multidiff new-tokenizer", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", help="of the plugin in YAML: small letters, digits and _, e.g. melody")
    parser.add_argument("--output", type=Path, help="the folder to write (default: multidiff-NAME)")
    options = parser.parse_args(arguments)
    from multidiff.plugins.scaffold import write_package

    folder = write_package(options.name, options.output or Path(f"multidiff-{options.name}"))
    print(f"{folder}: a tokenizer that works as it stands; {folder / 'README.md'} says how to make it yours.")
    print(f"Next: pip install -e {folder} && cd {folder} && python -m pytest test_{options.name}.py")
