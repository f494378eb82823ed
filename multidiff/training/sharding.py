"""The strategy `fsdp2`: weights, gradients and optimizer states shared among devices, and checkpoints of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from multidiff import files
from multidiff.checkpoints.lightning import read_file
from multidiff.checkpoints.sharded import META, WEIGHTS, is_sharded, read_into, read_meta, shapes
from multidiff.checkpoints.transformer import restore_transformer
from multidiff.models import MaskedDiffusionTransformer

_NAME = "fsdp2"
_Result = TypeVar("_Result")


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices of all nodes, `Trainer(strategy="fsdp2")`.

    It is Lightning's `ModelParallelStrategy` without tensor parallelism. A checkpoint is a folder, which appears whole
    or not at all, holds averaged weights as well, and is read without running code from it. Every process writes into
    it, so all nodes must share its file system.

    Args:
        process_group_backend: of torch.distributed; None takes NCCL on GPUs and gloo on CPUs.
        timeout: of a collective operation, after which a process that waits for another one fails.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout):
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=True,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._path: Path | None = None  # of the checkpoint that is being loaded

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        if not is_overridden("configure_model", self.lightning_module):
            raise ValueError(
                f"{type(self.lightning_module).__name__} has no weights that can be sharded. Train it with --trainer."
                "strategy ddp."
            )
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights of the module, of which this process holds its shards."""
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer by the names of weights."""
        assert self.model is not None
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return get_optimizer_state_dict(self.model, inner)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(self.broadcast(str(filepath)))
        tensors = {key: checkpoint.pop(key) for key in WEIGHTS if key in checkpoint}
        for number, state in enumerate(checkpoint.get("optimizer_states", ())):
            tensors[f"optimizer_{number}"] = state.pop("state")
        with ExitStack() as stack:
            beside = self._first(lambda: str(stack.enter_context(files.whole_folder(path))))
            try:
                save(tensors, checkpoint_id=beside)
            except CheckpointException as error:
                inner = next(iter(error.failures.values()))[0]
                raise ValueError(f"{path} cannot be written ({files.first_line(inner)})") from error

            def finish() -> None:
                with files.naming(path):
                    torch.save(checkpoint, Path(beside) / META)
                stack.close()  # renames the folder

            self._first(finish)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """A sharded checkpoint without its tensors, which are read when the module has checked that they fit; or a
        checkpoint of another strategy, which stays on the disk until its tensors are used."""
        path = Path(self.broadcast(str(checkpoint_path)))
        self._path = path if is_sharded(path) else None
        return read_meta(path) if self._path else read_file(path, mmap=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put this device's shards of the weights into `checkpoint`, where callbacks find them, and into the module."""
        assert self.lightning_module is not None
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        own = self.lightning_module_state_dict()
        for key in WEIGHTS if fitting else WEIGHTS[:1]:
            if self._path is None and key in checkpoint:
                weights = {name: _shard_like(weight, own[name]) for name, weight in checkpoint[key].items()}
            elif self._path is not None and shapes(self._path, key):
                weights = {name: torch.empty_like(weight) for name, weight in own.items()}
                read_into(self._path, {key: weights})
            else:
                continue
            checkpoint[key] = weights  # pyright: ignore[reportIndexIssue]
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        for number, (optimizer, saved) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            state: Any = get_optimizer_state_dict(self.model, optimizer)
            if self._path is not None:
                read_into(self._path, {f"optimizer_{number}": state["state"]})
            else:
                names = [name for group in state["param_groups"] for name in group["params"]]
                for place, kinds in saved["state"].items():
                    own = state["state"][names[place]]
                    own.update({kind: _shard_like(value, own[kind]) for kind, value in kinds.items()})
            groups = zip(state["param_groups"], saved["param_groups"], strict=True)
            state["param_groups"] = [{**theirs, "params": group["params"]} for group, theirs in groups]
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state)

    def _first(self, action: Callable[[], _Result]) -> _Result:
        """What `action` returns in the first process. All processes raise its error, or the others would wait."""
        result = failure = None
        if self.is_global_zero:
            try:
                result = action()
            except Exception as error:
                failure = error
        result, problem = self.broadcast((result, failure and str(failure)))
        if problem is not None:
            raise ValueError(problem) from failure
        return result  # pyright: ignore[reportReturnType]


StrategyRegistry.register(_NAME, FullyShardedStrategy, description="FSDP2 over all devices of all nodes", override=True)


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that train another way than they say.

    Raises:
        ValueError: FSDP of PyTorch's first version, which flattens weights, so that vectors would decay and Muon would
            find no matrices; or a `ModelParallelStrategy` other than `FullyShardedStrategy`, for nothing here is made
            for tensor parallelism.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy) or (
        isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FullyShardedStrategy)
    ):
        raise ValueError(
            f"The transformer cannot be trained with {type(strategy).__name__}. Use --trainer.strategy {_NAME}, which "
            "shards weights, gradients and optimizer states over all devices."
        )


def _shard_like(whole: Tensor, own: Tensor) -> Tensor:
    """This device's shard of a whole tensor, laid out as `own` is."""
    if not isinstance(own, DTensor):
        return whole.to(own.device)
    mesh, placements = own.device_mesh, own.placements
    return distribute_tensor(whole.to(own.device), mesh, placements, src_data_rank=None)


def whole_transformer(transformer: MaskedDiffusionTransformer) -> MaskedDiffusionTransformer | None:
    """The transformer with all of its weights: itself, or where it is sharded a copy on the CPU of the first process.
    Other processes get None. All of them call this together."""
    if not transformer.is_sharded:
        return transformer
    weights = get_model_state_dict(transformer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not weights:
        return None
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    return restore_transformer(config, "the transformer", weights, "the transformer")
