"""What `multidiff fit` and its kin read: configurations by path or name, and the parser that they go through.

The parser is Lightning's, which is jsonargparse's, with errors of a sentence, help on the options of multidiff's own
classes, and a bound on what the aliases of a YAML file (`&a`, `*a`) expand to. All the same a configuration can name
any class and read environment variables: run only those that you trust.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from multidiff import files

MODE = "omegaconf+"
_MOST_VALUES = 8_000  # that aliases stand for
_DEEPEST = 100
_DEFAULT_CLASSES = {"model": "multidiff.training.MaskedDiffusionModule", "data": "multidiff.data.DocumentDataModule"}
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def shipped() -> dict[str, Path]:
    """The configurations that come with multidiff, by name: "digits", "tokenizers/vq_digits" …"""
    here = Path(__file__).parent.parent
    folder = next(place for place in (here / "configs", here.parent / "configs") if place.is_dir())
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find(value: str) -> Path:
    """The file that `--config VALUE` means: one of that path, else a shipped one of that name or path.

    Raises:
        ValueError: there is none; names those that are shipped.
    """
    path, known = Path(value), shipped()
    if not path.is_file():
        for name, place in known.items():
            if value.removeprefix("configs/").removesuffix(".yaml") in (name, place.stem):
                return place
        if not path.exists():
            raise ValueError(
                f"--config {value}: there is no such file, and no shipped configuration of that name; those are "
                f"{', '.join(known)}"
            )
    return path


def read(path: Path) -> str:
    """The text of a YAML file that holds a mapping, and whose aliases add little; `ValueError` naming it else."""
    text = files.read_text(path)
    try:
        root = _measure(text)
    except yaml.MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path} is not YAML: {error.problem}{line}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if root is not yaml.MappingStartEvent:
        raise ValueError(f"{path} holds no configuration: expected a mapping, such as `model: …`")
    return text


def _measure(text: str) -> type | None:
    """Count the values that the aliases in `text` stand for, without expanding them; returns the first event's type.

    Raises:
        ValueError: aliases for too many values, too deep, or an alias within what it stands for.
        yaml.YAMLError: no YAML.
    """
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = [(None, 0)]  # anchors and sizes of the collections around
    root, added = None, 0

    def add(anchor: str | None, size: int) -> None:
        name, before = open_[-1]
        open_[-1] = (name, before + size)
        if anchor is not None:
            sizes[anchor] = size

    for event in yaml.parse(text, Loader=_YAML):
        if root is None and isinstance(event, yaml.NodeEvent):
            root = type(event)
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, 1))
            if len(open_) > _DEEPEST:
                raise ValueError(f"is nested more than {_DEEPEST} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            add(*open_.pop())
        elif isinstance(event, yaml.ScalarEvent):
            add(event.anchor, 1 + len(event.value) // 100)  # an alias may repeat a long text, too
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_):
                raise ValueError(f"has an alias *{event.anchor} within what it stands for")
            size = sizes.get(event.anchor, 1)
            added += size
            if added > _MOST_VALUES:
                raise ValueError(
                    f"has aliases that stand for more than {_MOST_VALUES:,} values. Use fewer aliases, or let "
                    f"*{event.anchor} and the others stand for less."
                )
            add(None, size)
    return root


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are a sentence and a hint in place of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # within another parser, which reports it
            super().error(message, ex)
        print(f"multidiff: {explain(getattr(ex, 'subcommand_parser', None) or self, message)}", file=sys.stderr)
        self.exit(2)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().parse_args(*args, **kwargs)
        except (OmegaConfBaseException, yaml.YAMLError) as error:  # what `${…}` names is not there, or is too much
            self.error(str(error).splitlines()[0], error)


class ConfigFile(ActionConfigFile):
    """`--config`: a file, or the name of a shipped configuration."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = find(values)
        read(path)
        if not Path(values).is_file():
            _say(f"multidiff: using the shipped configuration {path}")
        super().__call__(parser, cfg, str(path), option_string)


@rank_zero_only
def _say(line: str) -> None:
    print(line, file=sys.stderr)


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the line breaks of the epilog as they are."""


def make_parser(**kwargs: Any) -> Parser:
    """The parser of a training command, or the one around them, with `--config`."""
    _bound_loader()
    parser = Parser(formatter_class=_Help, **kwargs)
    help_ = "YAML file, or the name of a shipped configuration, e.g. digits"
    parser.add_argument("-c", "--config", action=ConfigFile, metavar="FILE|NAME", help=help_)
    return parser


def describe(command: str, arguments: Sequence[str]) -> dict[str, str]:
    """How the parser of `command` introduces itself, as arguments of `make_parser`; with the options of model and data
    where `arguments` ask for help, those of a configuration's classes where they name one."""
    settings = {"usage": f"multidiff {command} --config FILE|NAME [--KEY VALUE ...]"}
    if {"-h", "--help"} & set(arguments):
        settings["epilog"] = "\n".join(_help_on_classes(command, arguments))
    return settings


def explain(parser: ArgumentParser, message: str) -> str:
    """What an error of jsonargparse says, without its lists of types and values, and what to do."""
    text = " ".join(line.strip() for line in message.splitlines() if line.strip() and not _NOISE.fullmatch(line))
    text = text.replace(": - ", ": ").replace(" - ", "; ")
    text = re.sub(r"Parser key \"([^\"]+)\":|Problem with given class_path '([^']+)':", r"\1\2:", text).rstrip(".")
    text = text.replace("Expected a typing.Literal[", "expected one of [").replace(". Got value: ", ", got ")
    text = re.sub(r"Expected an? <class '([\w.]+)'>", r"expected \1", text)
    if re.search(r"required: \S*\.model$", text):
        return f"a configuration is needed, --config FILE or NAME; shipped are {', '.join(shipped())}"
    near: list[str] = []
    if found := re.search(r"unrecognized arguments: (--[\w.]+)", text):
        near = get_close_matches(found[1], parser._option_string_actions, n=1)
    elif found := re.search(r"(?:([\w.]+): Option|does not accept option) '([\w.]+)'", text):
        known = _parameters(found[1]) if found[1] else [action.dest for action in parser._actions]
        near = get_close_matches(found[2], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    command = parser.prog.replace(" [options]", "")
    classes = re.match(r"([\w.]+): ([\w.]+): ", text)
    if classes and _parameters(classes[2]):
        return f"{text}{hint} `{command} --{classes[1]}.help {classes[2]}` explains the options."
    return f"{text}{hint} `{command} --help` explains the options."


_NOISE = re.compile(
    r" *(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value( type)?: .*"
    r"|- Expected a <class 'NoneType'>) *"
)


def _parameters(class_path: str) -> list[str]:
    """Names of what a class takes; none where there is no such class."""
    try:
        return list(inspect.signature(_class(class_path)).parameters)
    except ValueError:
        return []


def _class(path: Any) -> type:
    """The class of this path, such as multidiff.data.DocumentDataModule; `ValueError` where there is none."""
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no class is called {path!r} ({error})") from None
    if not isinstance(found, type):
        raise ValueError(f"{path} is not a class")
    return found


def _help_on_classes(command: str, arguments: Sequence[str]) -> Iterator[str]:
    classes = dict(_DEFAULT_CLASSES)
    for option, value in pairwise(word for argument in arguments for word in argument.split("=", 1)):
        if option in ("-c", "--config"):
            path = find(value)
            content = yaml.load(read(path), Loader=_YAML)
            for key in classes.keys() & content.keys():
                if not isinstance(content[key], dict | str):
                    raise ValueError(f"{path}: {key} must be a mapping with class_path and init_args")
                if isinstance(content[key], dict) and "class_path" in content[key]:
                    classes[key] = content[key]["class_path"]
                    try:
                        _class(classes[key])
                    except ValueError as error:
                        raise ValueError(f"{path}: {key}.class_path: {error}") from None
    for key, class_path in classes.items():
        parser = Parser(add_help=False, usage=argparse.SUPPRESS, description=f"{class_path}, its options:")
        parser.add_class_arguments(_class(class_path), f"{key}.init_args", fail_untyped=False)
        yield parser.format_help()
    names = "\n".join(f"  {name:32}{path}" for name, path in shipped().items())
    yield f"""options of other classes:
  multidiff {command} --model.help CLASS, --data.help CLASS, --trainer.callbacks.help CLASS, and so on, for instance
  multidiff {command} --model.help multidiff_vq.training.VQTraining
shipped configurations, also for --config NAME --help and --config NAME --print_config:
{names}"""


@cache
def _bound_loader() -> None:
    """Bound what jsonargparse loads in other places than `--config`: files that other files and options name."""
    ArgumentParser(parser_mode=MODE).parse_string("{}")  # jsonargparse makes a mode's loader at its first use
    load: Callable[[str], Any] = get_loader(MODE)

    def load_bounded(text: str) -> Any:
        try:
            _measure(text)
        except yaml.YAMLError:
            pass  # `load` says so
        except ValueError as error:
            raise ValueError(f"a configuration {error}") from None
        return load(text)

    set_loader(MODE, load_bounded, (yaml.YAMLError,))
