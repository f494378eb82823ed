"""The `multidiff` command. Looks at its first word before it imports anything heavy.

multidiff fit|validate|test --config digits                          Lightning's CLI: train and evaluate
multidiff generate --model FOLDER --given text="seven" --fill image  fill in the blanks of a document
multidiff plugins                                                    tokenizer plugins installed here
multidiff new-tokenizer melody                                       a package for one of your own
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from multidiff import __version__
from multidiff.cli.errors import reported

_TRAINING = {
    "fit": "train a model or a tokenizer (Lightning CLI)",
    "validate": "loss on the validation split, in nats per token",
    "test": "loss on the test split, in nats per token",
}
_HELP = f"""usage: multidiff [--version] COMMAND ...

One masked diffusion transformer for text, images, audio and whatever a plugin brings.

training commands, all with --config FILE (or the name of a shipped one: digits) and --print_config:
  fit        {_TRAINING["fit"]}
  validate   {_TRAINING["validate"]}
  test       {_TRAINING["test"]}

generating:
  generate   fill in the blanks of a document; presets: generate caption | image | audio

tokenizers:
  plugins        list what is installed here, and whether it works
  new-tokenizer  write a small complete package for one of your own

`multidiff COMMAND --help` explains every option of a command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `multidiff` command; `arguments` default to those of the process.

    Exits with 2 where the command line is wrong, 1 where the work fails, 130 after Ctrl-C.
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
    elif command == "plugins":
        from multidiff.cli.plugins import main as plugins

        plugins()
    elif command == "new-tokenizer":
        from multidiff.cli.new_tokenizer import main as new_tokenizer

        new_tokenizer(arguments[1:])
    elif command in _TRAINING:
        from multidiff.cli.training import main as train

        train(arguments)
    else:
        known = [*_TRAINING, "generate", "plugins", "new-tokenizer"]
        print(f"multidiff: no command {command!r}; known: {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
