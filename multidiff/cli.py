"""The `multidiff` command. Looks at its first word before it imports anything heavy.

multidiff fit|validate|test --config digits                          Lightning's CLI: train and evaluate
multidiff generate --model FOLDER --given text="seven" --fill image  fill in the blanks of a document
multidiff plugins                                                    tokenizer plugins installed here
multidiff new-tokenizer melody                                       a package for one of your own
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from multidiff import __version__

_PRECISION = "MULTIDIFF_FASTEST_PRECISION"
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
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, ImportError, OSError) as error:
        stop(error)
    except KeyboardInterrupt:
        print("multidiff: interrupted", file=sys.stderr)
        sys.exit(130)


def _run(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_HELP)
    elif command == "--version":
        print(__version__)
    elif command == "generate":
        from multidiff.generate import main as generate

        generate(arguments[1:])
    elif command == "plugins":
        _print_plugins()
    elif command == "new-tokenizer":
        from multidiff.new_tokenizer import main as new_tokenizer

        new_tokenizer(arguments[1:])
    elif command in _TRAINING:
        _train(arguments)
    else:
        known = [*_TRAINING, "generate", "plugins", "new-tokenizer"]
        print(f"multidiff: no command {command!r}; known: {', '.join(known)}", file=sys.stderr)
        sys.exit(2)


def _train(arguments: list[str]) -> None:
    from jsonargparse import set_parsing_settings
    from lightning.fabric.plugins.environments import SLURMEnvironment
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.cli import LightningCLI
    from omegaconf import OmegaConf

    from multidiff import configuration
    from multidiff.checkpoints import Checkpoints
    from multidiff.lightning_checkpoint import check_checkpoint

    command = arguments[0]

    class CLI(LightningCLI):
        def init_parser(self, **kwargs: Any) -> configuration.Parser:
            return configuration.make_parser(**kwargs)

        def _parse_ckpt_path(self) -> None:
            """Configuration and command line win over the hyper-parameters that a checkpoint carries."""

        def add_arguments_to_parser(self, parser: Any) -> None:
            help_ = "Remove the checkpoints of an earlier run from the folder that this one writes to."
            if command == "fit":
                parser.add_argument("--overwrite", type=bool, default=False, help=help_)

        def before_instantiate_classes(self) -> None:
            if path := self._get(self.config, "ckpt_path"):
                check_checkpoint(path)
            if command == "fit":  # taken out, so that a run of the saved configuration removes nothing unasked
                self._overwrite = self.config[command].pop("overwrite")

        def before_fit(self) -> None:
            for callback in self.trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
                if isinstance(callback, Checkpoints):
                    callback.overwrite |= self._overwrite
                    known_later = self._get(self.config, "ckpt_path") is not None or SLURMEnvironment.detect()
                    if self.trainer.is_global_zero and not known_later and not self.trainer.fast_dev_run:  # pyright: ignore
                        callback.claim(continues=False)

    # Lightning's own, at every start.
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    warnings.filterwarnings("ignore", "Precision bf16-mixed is not supported by the model summary", UserWarning)
    # Relative interpolation and overrides of an interpolated value work only with both of these.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    OmegaConf.register_resolver("fastest_precision", _fastest_precision, replace=True)
    try:
        CLI(
            args=None if arguments == sys.argv[1:] else arguments,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            # The data module gives every rank its own documents; a second split by Lightning would lose some.
            trainer_defaults={"use_distributed_sampler": False},
            parser_kwargs={
                "prog": "multidiff",
                "parser_mode": configuration.MODE,
                command: configuration.describe(command, arguments),
            },
        )
    except MisconfigurationException as error:
        stop(error)


def stop(error: BaseException) -> NoReturn:
    """End with a sentence where multidiff, an installed plugin or Lightning says what is wrong, for every `ItemError`,
    and where the system refuses: a full disk, a folder that is not writable. With the traceback elsewhere.

    What a constructor says reaches the command line wrapped in the argument parser's own errors.
    """
    if isinstance(error, OSError):
        try:
            sys.stdout.flush()
        except OSError:  # a full disk or a closed pipe: what is left would raise again when the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # whoever read our output has left
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


def _fastest_precision() -> str:
    """What `${fastest_precision:}` in a config stands for: "bf16-mixed" where matrix products are faster in bf16 than
    in fp32, else "32-true". Many CPUs only emulate bf16. The processes that a run starts take its answer."""
    if _PRECISION not in os.environ:
        os.environ[_PRECISION] = _measured_precision()
    return os.environ[_PRECISION]


def _measured_precision() -> str:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def seconds(dtype: torch.dtype) -> float:
        factor = torch.ones(512, 512, dtype=dtype, device=device)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            (factor @ factor)[0, 0].item()
            times.append(time.perf_counter() - start)
        return min(times)

    return "bf16-mixed" if seconds(torch.bfloat16) < seconds(torch.float32) else "32-true"


def _print_plugins() -> None:
    from multidiff import plugins

    rows = [("NAME", "MODALITY", "PACKAGE", "VERSION", "STATE")]
    found = plugins.survey()
    for plugin in found:
        state = " ".join((plugin.problem or "works").split())
        rows.append((plugin.name, plugin.modality or "?", plugin.package, plugin.version, state))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for *cells, state in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), state]))
    if any(plugin.problem for plugin in found):
        sys.exit(1)
