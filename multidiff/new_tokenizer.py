"""`multidiff new-tokenizer NAME`: a small complete tokenizer package to start from.

It is `multidiff/template`, a working plugin, with its name replaced.
"""

from __future__ import annotations

import argparse
import keyword
import re
from collections.abc import Sequence
from pathlib import Path

TEMPLATE = Path(__file__).parent / "template"
_NAME = "series"  # the template's own


def main(arguments: Sequence[str]) -> None:
    """The command; `arguments` are those behind `new-tokenizer`."""
    parser = argparse.ArgumentParser(prog="multidiff new-tokenizer", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", help="of the plugin in YAML: small letters, digits and _, e.g. melody")
    parser.add_argument("--output", type=Path, help="the folder to write (default: multidiff-NAME)")
    options = parser.parse_args(arguments)
    folder = write_package(options.name, options.output or Path(f"multidiff-{options.name}"))
    print(f"{folder}: a tokenizer that works as it stands; {folder / 'README.md'} says how to make it yours.")
    print(f"Next: pip install -e {folder} && cd {folder} && python -m pytest test_{options.name}.py")


def write_package(name: str, folder: Path) -> Path:
    """Write a package `multidiff_<name>` with the plugin `name` into `folder`.

    Raises:
        ValueError: a name that cannot be one or is taken, or a folder that exists or cannot be written.
    """
    from multidiff import plugins
    from multidiff.files import whole_folder

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"{name!r} cannot be a plugin's name: use small letters, digits and _, a letter first")
    if name == "text":
        raise ValueError("training.yaml calls the text beside it 'text'; choose another name")
    if name in plugins.names():
        raise ValueError(f"a plugin called {name!r} is installed already; choose another name")
    if folder.exists():
        raise ValueError(f"{folder} exists; name another folder with --output")
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
