"""Writes a package for a new tokenizer plugin: a renamed copy of the template beside this file, which works."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from multidiff.files import whole_folder
from multidiff.plugins import registry

TEMPLATE = Path(__file__).parent / "template"
_NAME = "series"  # the name of the template's plugin


def write_package(name: str, folder: Path) -> Path:
    """Write a package `multidiff_<name>` with the plugin `name` into `folder`.

    Raises:
        ValueError: the name is invalid or in use, or the folder exists or cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(
            f"{name!r} cannot be the name of a plugin. Use lower-case letters, digits and _, and start with a letter."
        )
    if name == "text":
        raise ValueError("'text' is the name of the text tokenizer in training.yaml. Choose another name.")
    if name in registry.names():
        raise ValueError(f"A plugin called {name!r} is already installed. Choose another name.")
    if folder.exists():
        raise ValueError(f"{folder} already exists. Choose another folder with --output.")
    with whole_folder(folder, replace=False) as beside:
        for file in sorted(TEMPLATE.rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                place = beside / _renamed(str(file.relative_to(TEMPLATE)), name)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(_renamed(file.read_text(encoding="utf-8"), name), encoding="utf-8")
    return folder


def _renamed(text: str, name: str) -> str:
    camel = "".join(part.capitalize() for part in name.split("_"))
    return text.replace(_NAME.capitalize(), camel).replace(_NAME, name)
