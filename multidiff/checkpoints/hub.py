"""Models from the Hugging Face hub, fetched only where they are asked for by name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(name: str | Path) -> bool:
    """Whether `name` is written as the hub writes a repository, "user/model", and is no local path.

    It is one where a file or folder has that name, where there is a folder "user", and where it ends in ".ckpt".
    """
    if not isinstance(name, str) or _REPOSITORY.fullmatch(name) is None or name.endswith(".ckpt"):
        return False
    return not os.path.exists(name) and not os.path.isdir(name.partition("/")[0])


def fetch(name: str, patterns: list[str], **options: Any) -> Path:
    """The folder on this machine that holds the files of a repository that match `patterns`.

    Args:
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: the repository or the revision does not exist, needs access, or cannot be reached and is not in the
            cache; says what to do.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **options))
    except Exception as error:  # its own, those of two HTTP libraries, and the system's
        raise ValueError(_explain(name, error, options)) from error


def _explain(name: str, error: Exception, options: Mapping[str, Any]) -> str:
    from huggingface_hub import errors

    missing = f"{name} is not a local folder, and"
    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError
        return (
            f"{name} is a gated repository of the Hugging Face hub. Request access at https://huggingface.co/{name}, "
            "then run `hf auth login`."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{missing} the Hugging Face hub has no such repository, or it is private. Check the name, or run "
            "`hf auth login` for a private one."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{name} has no revision {options.get('revision')!r} on the Hugging Face hub. Give the name of a branch or "
            "tag, or a commit hash."
        )
    if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return f"{missing} it is not in the cache, and downloads are disabled. Unset HF_HUB_OFFLINE to download it."
    said = " ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    return f"{missing} it could not be downloaded from the Hugging Face hub ({said})"
