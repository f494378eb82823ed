"""`multidiff plugins`: the tokenizers that are installed here, and whether each works."""

from __future__ import annotations

import sys


def main() -> None:
    """Print a table; exits with 1 where a plugin has a problem."""
    from multidiff import plugins

    rows = [("NAME", "MODALITY", "PACKAGE", "VERSION", "STATE")]
    found = plugins.survey()
    for plugin in found:
        state = " ".join((plugin.problem or "works").split())
        rows.append((plugin.name, plugin.modality or "?", plugin.package, plugin.version, state))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for *cells, state in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), state]))
    if any(plugin.problem for plugin in found):
        sys.exit(1)
