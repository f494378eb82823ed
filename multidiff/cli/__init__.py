"""The `multidiff` command. It looks at the first argument before it imports anything heavy.

multidiff fit|validate|test --config digits                          train and evaluate with Lightning
multidiff tokenize --config digits                                   tokenize the documents of a training before it
multidiff generate --model FOLDER --given text="seven" --fill image  fill in the blank segments of a document
multidiff consolidate CHECKPOINT --output FOLDER                     write the model in a checkpoint as a folder
multidiff plugins                                                    list the installed tokenizer plugins
multidiff new-tokenizer melody                                       create a package for a new plugin
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from multidiff import __version__
from multidiff.cli.errors import UserError, reported

_TRAINING = ("fit", "validate", "test", "tokenize")
_HELP = """usage: multidiff [--help] [--version] COMMAND ...

One masked diffusion transformer for text, images, audio, and every modality that a plugin adds.

Training, with --config FILE or --config NAME for a shipped configuration such as digits:
  fit            Train a model or a tokenizer.
  validate       Compute the metrics on the validation split.
  test           Compute the metrics on the test split.
  tokenize       Tokenize the documents once, on one or several devices. fit does so too, on one device.
  consolidate    Write the model in a checkpoint, sharded or not, as a model folder.

Generation:
  generate       Fill in the blank segments of a document.
                 Presets: generate caption, generate image, generate audio.

Tokenizers:
  plugins        List the installed tokenizer plugins, and check each.
  new-tokenizer  Create a package for a new tokenizer plugin.

Run `multidiff COMMAND --help` for the options of a command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `multidiff` command.

    Exits with status 2 if the command line is wrong, 1 if the work fails, and 130 after Ctrl-C.

    Args:
        arguments: the command line without the program's name; None takes that of the process.
    """
    with reported():
        _run(list(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_HELP)
    elif command == "--version":
        print(__version__)
    elif command == "generate":
        from multidiff.cli.generate import main as generate

        generate(arguments[1:])
    elif command == "consolidate":
        from multidiff.cli.consolidate import main as consolidate

        consolidate(arguments[1:])
    elif command == "plugins":
        from multidiff.cli.plugins import main as plugins

        plugins(arguments[1:])
    elif command == "new-tokenizer":
        from multidiff.cli.new_tokenizer import main as new_tokenizer

        new_tokenizer(arguments[1:])
    elif command in _TRAINING:
        from multidiff.cli.training import main as train

        train(arguments)
    else:
        known = ", ".join([*_TRAINING, "consolidate", "generate", "plugins", "new-tokenizer"])
        raise UserError(f"There is no command {command!r}. The commands are {known}.", status=2)
