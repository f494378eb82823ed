"""`multidiff fit`, `validate`, `test` and `tokenize`: Lightning's command line with multidiff's errors and defaults."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from multidiff.cli.errors import UserError
from multidiff.cli.precision import fastest_precision

_TOKENIZING = {
    "precision": "32-true",  # codes must not depend on the precision of a training
    "callbacks": None,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "max_time": None,
    "fast_dev_run": False,
}


def main(arguments: list[str]) -> None:
    """Run a training command.

    Args:
        arguments: the command line, from "fit", "validate", "test" or "tokenize" on.

    Raises:
        UserError: the command line or the configuration is wrong.
    """
    from jsonargparse import Namespace, set_parsing_settings
    from lightning.fabric.plugins.environments import SLURMEnvironment
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
    from omegaconf import OmegaConf

    from multidiff.checkpoints.lightning import check_checkpoint
    from multidiff.cli import configuration
    from multidiff.data import DocumentDataModule
    from multidiff.training.checkpoints import Checkpoints

    command = arguments[0]

    class TokenizingTrainer(Trainer):
        def tokenize(self, model: LightningModule | None = None, datamodule: Any = None) -> None:
            """Tokenize the documents of the data module."""
            if not isinstance(datamodule, DocumentDataModule):
                raise ValueError(
                    f"data is a {type(datamodule).__name__}, which has nothing to tokenize. Give the configuration of "
                    "a model of documents."
                )
            datamodule.tokenize(self)

    class CLI(LightningCLI):
        def init_parser(self, **kwargs: Any) -> configuration.Parser:
            return configuration.make_parser(**kwargs)

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {**LightningCLI.subcommands(), "tokenize": {"model", "datamodule"}}

        def _parse_ckpt_path(self) -> None:
            """Ignore the hyper-parameters in a checkpoint; the configuration and the command line decide."""

        def add_arguments_to_parser(self, parser: Any) -> None:
            if command == "fit":
                help_ = "Remove the checkpoints of an earlier run from the folder that this run writes to."
                parser.add_argument("--overwrite", type=bool, default=False, help=help_)

        def before_instantiate_classes(self) -> None:
            if path := self._get(self.config, "ckpt_path"):
                check_checkpoint(path)
            if command == "tokenize":  # of the configuration of a training, the data and the devices
                # A model is required, but this one need not be built.
                self.config[command].model = Namespace(class_path="lightning.pytorch.LightningModule")
                self.config[command].trainer.update(Namespace(**_TOKENIZING))
                if self.config[command].trainer.strategy == "fsdp2":  # tokenizers have no weights to share
                    self.config[command].trainer.strategy = "ddp"
            if command == "fit":  # not saved with the configuration, so that a later run of it removes nothing
                self._overwrite = self.config[command].pop("overwrite")

        def before_fit(self) -> None:
            for callback in self.trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
                if isinstance(callback, Checkpoints):
                    callback.overwrite |= self._overwrite
                    known_later = self._get(self.config, "ckpt_path") is not None or SLURMEnvironment.detect()
                    if self.trainer.is_global_zero and not known_later and not self.trainer.fast_dev_run:  # pyright: ignore
                        callback.claim(continues=False)

    # Lightning itself causes these at every start.
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    warnings.filterwarnings("ignore", "Precision bf16-mixed is not supported by the model summary", UserWarning)
    # Without this setting, relative interpolation and overrides of interpolated values fail.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    OmegaConf.register_resolver("fastest_precision", fastest_precision, replace=True)
    try:
        CLI(
            args=None if arguments == sys.argv[1:] else arguments,
            trainer_class=TokenizingTrainer,
            save_config_callback=None if command == "tokenize" else SaveConfigCallback,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            # The data module already gives every rank its own documents. Lightning's sampler would drop some of them.
            trainer_defaults={"use_distributed_sampler": False},
            parser_kwargs={
                "prog": "multidiff",
                "parser_mode": configuration.MODE,
                command: configuration.describe(command, arguments),
            },
        )
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
