"""`multidiff fit`, `validate` and `test`: Lightning's command line, with errors and defaults of our own."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from multidiff.cli.errors import report
from multidiff.cli.precision import fastest_precision


def main(arguments: list[str]) -> None:
    """Run a training command; `arguments` begin with its name."""
    from jsonargparse import set_parsing_settings
    from lightning.fabric.plugins.environments import SLURMEnvironment
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.cli import LightningCLI
    from omegaconf import OmegaConf

    from multidiff.checkpoints.lightning import check_checkpoint
    from multidiff.cli import configuration
    from multidiff.training.checkpoints import Checkpoints

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
    OmegaConf.register_resolver("fastest_precision", fastest_precision, replace=True)
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
        report(error)
