"""Models on the Hugging Face hub. Nothing is downloaded unless a repository is named."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multidiff.checkpoints.folder import PATTERNS, save
from multidiff.checkpoints.parts import ModelParts

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(name: str | Path) -> bool:
    """Whether `name` has the form of a repository, "user/model", and is not a local path.

    It counts as a local path if a file or folder has that name, if a folder "user" exists, or if it ends in ".ckpt".
    """
    if not isinstance(name, str) or _REPOSITORY.fullmatch(name) is None or name.endswith(".ckpt"):
        return False
    return not os.path.exists(name) and not os.path.isdir(name.partition("/")[0])


def fetch(name: str, **options: Any) -> Path:
    """Download the model in a repository, unless it is in the cache, and return its local folder.

    Args:
        name: the repository, "user/model".
        options: arguments of `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: the repository or its revision does not exist, access is denied, or the repository cannot be
            reached and is not in the cache. The message says what to do.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS, **options))
    except Exception as error:  # its own, those of two HTTP libraries, and the system's
        raise ValueError(_explain(name, error, options)) from error


def push(
    parts: ModelParts,
    name: str,
    *,
    card_folder: Path | None = None,
    commit_message: str = "Upload model",
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a model to a repository, which is created if it does not exist, and return the URL of the commit.

    Args:
        parts: the model.
        name: the repository, "user/model".
        card_folder: a folder whose edited card is uploaded in place of a generated one.
        commit_message, private, token, create_pr: arguments of `huggingface_hub`.

    Raises:
        ValueError: the model cannot be saved; see `save`.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses the upload.
    """
    from huggingface_hub import create_repo, upload_folder

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        save(parts, folder, card_folder=card_folder)
        repository = create_repo(name, private=private, token=token, exist_ok=True).repo_id
        return upload_folder(
            repo_id=repository, folder_path=folder, commit_message=commit_message, token=token, create_pr=create_pr
        )


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
