"""`multidiff plugins`: list the installed tokenizer plugins, and check each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from multidiff.cli.errors import UserError


def main(arguments: Sequence[str]) -> None:
    """Print a table of plugins.

    Args:
        arguments: the command line after `plugins`.

    Raises:
        UserError: a plugin does not work.
    """
    parser = argparse.ArgumentParser(
        prog="multidiff plugins",
        description="List the installed tokenizer plugins. Each plugin is imported to check that it works. The exit "
        "status is 1 if one does not work.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this help message and exit.")
    parser.parse_args(arguments)
    from multidiff import plugins

    rows = [("NAME", "MODALITY", "PACKAGE", "VERSION", "STATE")]
    found = plugins.survey()
    for plugin in found:
        state = " ".join((plugin.problem or "works").split())
        rows.append((plugin.name, plugin.modality or "?", plugin.package, plugin.version, state))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for *cells, state in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), state]))
    if broken := [plugin.name for plugin in found if plugin.problem]:
        raise UserError(f"These plugins do not work: {', '.join(broken)}. The table says why.")
