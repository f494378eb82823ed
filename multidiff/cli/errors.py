"""How the `multidiff` command ends: with a sentence where we or a plugin say what is wrong, else with a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def reported() -> Iterator[None]:
    """Errors inside end the process: with 1 where the work fails, with 130 after Ctrl-C."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        report(error)
    except KeyboardInterrupt:
        print("multidiff: interrupted", file=sys.stderr)
        sys.exit(130)


def report(error: BaseException) -> NoReturn:
    """End with a sentence where multidiff, an installed plugin or Lightning says what is wrong, for every `ItemError`,
    and where the system refuses: a full disk, a folder that is not writable. With the traceback elsewhere.

    What a constructor says reaches the command line wrapped in the argument parser's own errors.
    """
    if isinstance(error, OSError):
        try:
            sys.stdout.flush()
        except OSError:  # a full disk or a closed pipe: what is left would raise again when the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # whoever read our output has left
        sys.exit(1)
    if isinstance(error, OSError) and error.strerror:
        sys.exit(f"multidiff: {f'{error.filename}: ' if error.filename else ''}{error.strerror}")
    from multidiff import plugins
    from multidiff.tokenizer import ItemError

    link: BaseException | None = error
    while link is not None:
        place = link.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        module = str(place.tb_frame.f_globals.get("__name__")) if place is not None else ""
        if isinstance(link, ItemError) or module.startswith("lightning.") or plugins.is_ours(module):
            sys.exit(f"multidiff: {link}")
        link = link.__cause__ or link.__context__
    raise error
