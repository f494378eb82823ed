"""How the `multidiff` command ends when something is wrong. Only this module prints errors and exits.

It prints a sentence if multidiff, a plugin, Lightning or the operating system says what is wrong. Any other error is a
bug, and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class UserError(Exception):
    """A mistake that a command found itself.

    Args:
        message: a sentence that says what is wrong and what to do.
        status: the exit status: 2 if the command line is wrong, 1 if the work fails.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


@contextmanager
def reported() -> Iterator[None]:
    """Turn errors inside the block into a message and an exit status.

    The status is 2 if the command line is wrong, 1 if the work fails, and 130 after Ctrl-C.
    """
    try:
        yield
    except UserError as error:
        say(str(error))
        sys.exit(error.status)
    except (ValueError, ImportError, OSError) as error:
        _report(error)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)


def say(message: str) -> None:
    """Print a line of multidiff's own to standard error."""
    print(f"multidiff: {message}", file=sys.stderr)


def _report(error: BaseException) -> NoReturn:
    """Exit with a sentence, or raise the error again if it is a bug.

    An `ItemError`, an error that multidiff, an installed plugin or Lightning raised, and a refusal of the operating
    system are sentences. The argument parser wraps the errors of constructors in its own, so the causes count as well.
    """
    if isinstance(error, OSError):
        try:
            sys.stdout.flush()
        except OSError:  # a full disk or a closed pipe; the rest of the output would raise again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # the reader of our output has ended
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
