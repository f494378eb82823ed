"""Configurations of the training commands: found by path or name, and parsed.

The parser is Lightning's, which builds on jsonargparse. Here its errors are one sentence, its help describes the
options of the configured classes, and the aliases of a YAML file (`&a`, `*a`) may expand to a limited number of values.
A configuration can still name any class and read environment variables. Run only configurations that you trust.
"""

from __future__ import annotations

import argparse
import inspect
import re
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
from multidiff.cli.errors import UserError, say

MODE = "omegaconf+"
_MOST_VALUES = 8_000  # that the aliases of a file expand to
_DEEPEST = 100  # levels of nesting
_DESCRIPTIONS = {
    "fit": "Train a model or a tokenizer.",
    "validate": "Compute the metrics on the validation split.",
    "test": "Compute the metrics on the test split.",
    "tokenize": "Tokenize the documents once, on all devices of the trainer.",
}
_DEFAULT_CLASSES = {"model": "multidiff.training.MaskedDiffusionModule", "data": "multidiff.data.DocumentDataModule"}
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def shipped() -> dict[str, Path]:
    """The paths of the configurations that multidiff ships, by name, such as "digits" and "tokenizers/vq_digits"."""
    here = Path(__file__).parent.parent
    folder = next(place for place in (here / "configs", here.parent / "configs") if place.is_dir())
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find(value: str) -> Path:
    """The file that `--config VALUE` refers to: the file with that path, or the shipped configuration with that name.

    Raises:
        ValueError: there is none; the message lists the shipped configurations.
    """
    path, known = Path(value), shipped()
    if not path.is_file():
        for name, place in known.items():
            if value.removeprefix("configs/").removesuffix(".yaml") in (name, place.stem):
                return place
        if not path.exists():
            raise ValueError(
                f"--config {value}: There is no such file, and no shipped configuration with that name. The shipped "
                f"configurations are {', '.join(known)}."
            )
    return path


def read(path: Path) -> str:
    """The text of a YAML configuration.

    Raises:
        ValueError: the file is not YAML, is not a mapping, is nested too deeply, or its aliases expand to too much.
    """
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
        raise ValueError(f"{path} must contain a mapping such as `model: …`")
    return text


def _measure(text: str) -> type | None:
    """Count the values that the aliases in `text` expand to, without expanding them.

    Returns:
        the type of the first YAML event: a mapping, a sequence, a scalar; None if `text` is empty.

    Raises:
        ValueError: too many values, too much nesting, or an alias inside its own anchor.
        yaml.YAMLError: `text` is not YAML.
    """
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = [(None, 0)]  # anchors and sizes of the enclosing collections
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
                raise ValueError(f"is nested more than {_DEEPEST} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            add(*open_.pop())
        elif isinstance(event, yaml.ScalarEvent):
            add(event.anchor, 1 + len(event.value) // 100)  # an alias may repeat a long text as well
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_):
                raise ValueError(f"has an alias *{event.anchor} inside its own anchor")
            size = sizes.get(event.anchor, 1)
            added += size
            if added > _MOST_VALUES:
                raise ValueError(
                    f"has aliases that expand to more than {_MOST_VALUES:,} values. Use fewer aliases, or smaller "
                    f"values than that of &{event.anchor}."
                )
            add(None, size)
    return root


class Parser(LightningArgumentParser):
    """Lightning's parser. Its errors are a sentence with a hint, not a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # an enclosing parser reports it
            super().error(message, ex)
        raise UserError(explain(getattr(ex, "subcommand_parser", None) or self, message), status=2) from ex

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().parse_args(*args, **kwargs)
        except (OmegaConfBaseException, yaml.YAMLError) as error:  # of an interpolation `${…}`
            self.error(str(error).splitlines()[0], error)


class ConfigFile(ActionConfigFile):
    """`--config`: a file, or the name of a shipped configuration."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = find(values)
        read(path)
        if not Path(values).is_file():
            rank_zero_only(say)(f"using the shipped configuration {path}")
        super().__call__(parser, cfg, str(path), option_string)


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of the epilog."""


def make_parser(**kwargs: Any) -> Parser:
    """A parser with `--config`, for one training command or for all of them."""
    _bound_loader()
    parser = Parser(formatter_class=_Help, **kwargs)
    help_ = "YAML file, or the name of a shipped configuration, for instance digits."
    parser.add_argument("-c", "--config", action=ConfigFile, metavar="FILE|NAME", help=help_)
    return parser


def describe(command: str, arguments: Sequence[str]) -> dict[str, str]:
    """Usage, description and epilog of the parser of `command`.

    If `arguments` ask for help, the epilog describes the options of the model and the data. If they also name a
    configuration, these are the options of its classes.
    """
    settings = {
        "usage": f"multidiff {command} --config FILE|NAME [--KEY VALUE ...]",
        "description": f"{_DESCRIPTIONS[command]} Every key of the configuration is an option as well.",
    }
    if {"-h", "--help"} & set(arguments):
        settings["epilog"] = "\n".join(_help_on_classes(command, arguments))
    return settings


def explain(parser: ArgumentParser, message: str) -> str:
    """An error message of jsonargparse as one sentence with a hint, without its lists of types and values."""
    text = " ".join(line.strip() for line in message.splitlines() if line.strip() and not _NOISE.fullmatch(line))
    text = text.replace(": - ", ": ").replace(" - ", "; ")
    text = re.sub(r"Parser key \"([^\"]+)\":|Problem with given class_path '([^']+)':", r"\1\2:", text).rstrip(".")
    text = text.replace("Expected a typing.Literal[", "expected one of [").replace(". Got value: ", ", got ")
    text = re.sub(r"Expected an? <class '([\w.]+)'>", r"expected \1", text)
    if re.search(r"required: \S*\.model$", text):
        known = ", ".join(shipped())
        return f"A configuration is required: --config FILE or --config NAME. The shipped configurations are {known}."
    near: list[str] = []
    if found := re.search(r"unrecognized arguments: (--[\w.]+)", text):
        near = get_close_matches(found[1], parser._option_string_actions, n=1)
    elif found := re.search(r"(?:([\w.]+): Option|does not accept option) '([\w.]+)'", text):
        known = _parameters(found[1]) if found[1] else [action.dest for action in parser._actions]
        near = get_close_matches(found[2], known, n=1)
    hint = f". Did you mean {near[0]}?" if near else "."
    command = parser.prog.replace(" [options]", "")
    classes = re.match(r"([\w.]+): ([\w.]+): ", text)
    if classes and _parameters(classes[2]):
        return f"{text}{hint} Run `{command} --{classes[1]}.help {classes[2]}` for the options."
    return f"{text}{hint} Run `{command} --help` for the options."


_NOISE = re.compile(
    r" *(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value( type)?: .*"
    r"|- Expected a <class 'NoneType'>) *"
)


def _parameters(class_path: str) -> list[str]:
    """The names of a class's parameters; empty if there is no such class."""
    try:
        return list(inspect.signature(_class(class_path)).parameters)
    except ValueError:
        return []


def _class(path: Any) -> type:
    """The class with an import path such as "multidiff.data.DocumentDataModule".

    Raises:
        ValueError: there is none.
    """
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"there is no class {path!r} ({error})") from None
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
        parser = Parser(add_help=False, usage=argparse.SUPPRESS, description=f"Options of {class_path}:")
        parser.add_class_arguments(_class(class_path), f"{key}.init_args", fail_untyped=False)
        yield parser.format_help()
    names = "\n".join(f"  {name:32}{path}" for name, path in shipped().items())
    yield f"""Options of other classes:
  --model.help CLASS, --data.help CLASS, --trainer.callbacks.help CLASS and so on, for instance
  multidiff {command} --model.help multidiff_vq.training.VQTraining

Shipped configurations, for --config NAME (add --help for the options, or --print_config for the values):
{names}"""


@cache
def _bound_loader() -> None:
    """Apply the limits of `read` to whatever else jsonargparse loads: the files that options and other files name."""
    ArgumentParser(parser_mode=MODE).parse_string("{}")  # jsonargparse creates the loader of a mode at its first use
    load: Callable[[str], Any] = get_loader(MODE)

    def load_bounded(text: str) -> Any:
        try:
            _measure(text)
        except yaml.YAMLError:
            pass  # `load` reports it
        except ValueError as error:
            raise ValueError(f"a YAML text {error}") from None
        return load(text)

    set_loader(MODE, load_bounded, (yaml.YAMLError,))
