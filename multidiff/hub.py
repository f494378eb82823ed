"""Models from the Hugging Face hub, fetched only where they are asked for by name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(name: str | Path) -> bool:
    """Whether `name` is no file or folder here, and written as the hub writes a repository: "user/model"."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None and not os.path.exists(name)


def fetch(name: str, patterns: list[str], **options: Any) -> Path:
    """The folder on this machine that holds the files of a repository that match `patterns`.

    Args:
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: there is no such repository, or it cannot be reached and is not cached here.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **options))
    except Exception as error:  # its own, those of two HTTP libraries, and the system's
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{name} is no folder here, and could not be fetched from the Hugging Face hub ({reason})"
        ) from error
