"""The LightningModule: glue between tokenizers, diffusion, transformer and trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from multidiff import plugins
from multidiff.checkpoints import KEY, build_transformer, load_samplers, pack
from multidiff.data import DocumentDataModule
from multidiff.evaluation.bounds import Bounds, bounds_table
from multidiff.evaluation.likelihood import EvaluationBatch, likelihood
from multidiff.objectives import NoisedBatch, Noising, Objective, Task
from multidiff.objectives.tasks import OTHERS
from multidiff.processes import to_settings
from multidiff.seeding import generator_for
from multidiff.sequence import SeenDocuments, SharedVocabulary
from multidiff.training.optimizer import local_shard
from multidiff.training.progress import progress
from multidiff.training.sharding import FullyShardedStrategy, check_strategy
from multidiff.training.throughput import Throughput


class MaskedDiffusionModule(LightningModule):
    """Trains one transformer over the documents of any set of tokenizers, and measures it in nats per token.

    Args:
        tokenizers: name -> {plugin: entry-point name, and its arguments or `folder: saved tokenizer`}; the order
            fixes the vocabulary.
        transformer: arguments of `MaskedDiffusionTransformer`, all but `vocabulary_rows`.
        tasks: the task mixture; null trains every segment of every document with a time each.
        objective: schedule, forward process, weighting, normalisation and loss weights of the training loss.
        optimizer: called with three parameter groups: the layers' matrices (marked `hidden: True`), the embedding and
            the head, and vectors, which get no weight decay. None is `torch.optim.AdamW`.
        warmup_steps: steps of linear warm-up.
        min_lr_ratio: fraction of the learning rate that the cosine ends at, when the first of the trainer's limits
            (`max_steps`, `max_epochs`, `max_time`) is reached.
        samplers: sampling settings by tokenizer name, used by previews and saved with the model.
        likelihood_draws: masks drawn of each document where the bound is measured; more leave less chance in it.
        gradient_checkpointing: compute the activations of each layer again in the backward pass instead of keeping
            them, which takes a fraction of the memory and about a third more computation.
        compile_layers: compile the layers with `torch.compile`, on a GPU.
        seed: of weights and noise.

    The transformer is built without memory. `configure_model` gives it weights; Lightning calls it in `fit`, `validate`
    and `test`. Call it yourself to use the transformer without a trainer.
    """

    def __init__(
        self,
        tokenizers: dict[str, dict[str, Any]],
        transformer: dict[str, Any] | None = None,
        tasks: list[Task] | None = None,
        objective: Objective = Objective(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable | None = None,
        warmup_steps: int = 100,
        min_lr_ratio: float = 0.05,
        samplers: dict[str, dict[str, Any]] | None = None,
        likelihood_draws: int = 1,
        gradient_checkpointing: bool = False,
        compile_layers: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if likelihood_draws < 1:
            raise ValueError(f"likelihood_draws must be at least 1, not {likelihood_draws}.")
        built = plugins.build(tokenizers)
        self.vocabulary = SharedVocabulary.of(built)
        objective.check(self.vocabulary)
        self.processes = objective.processes_of(self.vocabulary)
        config = {**(transformer or {}), "vocabulary_rows": self.vocabulary.rows}
        with torch.device("meta"):
            self.transformer = build_transformer(config, "model.transformer")
        # Defaults as well: a later version's may differ. Plain values: a checkpoint must load with weights_only=True.
        settings = {key: value for key, value in self.transformer.config.items() if not key.startswith("_")}
        del settings["vocabulary_rows"]
        self.recipe = {
            "tokenizers": pack(built),
            "transformer": settings,
            "samplers": samplers or {},
            "processes": {name: to_settings(process) for name, process in self.processes.items()},
        }
        pattern = self.transformer.pattern
        objective.check_pattern(pattern, self.vocabulary)
        self.samplers = load_samplers(samplers or {}, self.vocabulary, self.processes, pattern, "model.samplers")
        self.tasks = [Task.of(task) for task in tasks or [{"roles": {OTHERS: "target"}}]]
        self._labels = list(self.vocabulary.tokenizers)
        self._labels += dict.fromkeys(
            label for task in self.tasks for label in task.roles if label not in (OTHERS, *self._labels)
        )
        self.objective, self.optimizer = objective, optimizer or torch.optim.AdamW
        self.warmup_steps, self.min_lr_ratio, self.seed = warmup_steps, min_lr_ratio, seed
        self.likelihood_draws = likelihood_draws
        self.gradient_checkpointing, self.compile_layers = gradient_checkpointing, compile_layers
        self.seen: SeenDocuments | None = None
        self._divisors: list[Tensor] = []  # what the losses of this optimizer step are divided by, batch by batch

    def configure_model(self) -> None:
        """Give the transformer its initial weights: all of them, or those of this device where the strategy shards."""
        if not self._is_empty:
            return
        device, strategy = torch.device("cpu"), None if self._trainer is None else self.trainer.strategy
        if self.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if self.compile_layers:
            if strategy is not None and strategy.root_device.type == "cpu":  # torch 2.11 writes C++ with errors
                raise ValueError("compile_layers needs a GPU. torch.compile fails in the backward pass on a CPU.")
            self.transformer.compile()
        if isinstance(strategy, FullyShardedStrategy):
            self.transformer.shard(strategy.device_mesh["data_parallel"])
            device = strategy.root_device
        self.transformer.to_empty(device=device)
        self.transformer.initialize(generator_for(self.seed, "weights"))
        # Only now, or a checkpoint in another precision than fp32 would be read through fp32.
        self.to(torch.get_default_dtype())

    @property
    def _is_empty(self) -> bool:
        return self.transformer.norm.weight.is_meta

    def cpu(self) -> Self:
        """Lightning moves a module to the CPU when it stops, also after an error before there are weights to move."""
        return self if self._is_empty else super().cpu()

    def forward(self, batch: NoisedBatch) -> tuple[Tensor, Tensor]:
        """Divergence of each position of the loss, nats, [M], and what is trained in its place: the smoothed
        cross-entropy with label smoothing, else the same."""
        nats = self.transformer(
            batch.ids_P,
            batch.positions_P3,
            batch.document_starts,
            batch.logit_positions(self.vocabulary),
            batch.coords_P3,
            batch.targets_M,
            batch.losses(self.vocabulary, self.objective),
            batch.noise_P,
            blocks=batch.blocks,
        )
        nats_M = torch.cat(nats)
        return nats_M.unbind(1) if self.objective.label_smoothing else (nats_M, nats_M)  # pyright: ignore

    def training_step(self, batch: NoisedBatch, batch_index: int) -> Tensor:
        nats_M, trained_M = self(batch)
        total = (trained_M * batch.loss_weights_M).sum()
        tiny = torch.finfo(batch.loss_divisor.dtype).tiny
        self.log("loss", (total / batch.loss_divisor.clamp_min(tiny)).detach(), prog_bar=True, batch_size=1)
        # DDP takes the mean of the ranks' gradients, so the mean of their divisors divides the sum of their losses.
        divisor = self.trainer.strategy.reduce(batch.loss_divisor.clone(), reduce_op="mean")  # pyright: ignore
        if self.trainer.accumulate_grad_batches == 1:
            loss = total / divisor.clamp_min(tiny)
        else:
            # The divisors of later batches are not known yet. `on_after_backward` scales the gradient once they are.
            self._divisors.append(divisor)
            loss = total / self._divisors[0].clamp_min(1)
        interval = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if interval and (self.trainer.global_step + 1) % interval == 0:
            self._log_bound(nats_M.detach() * batch.bound_weights_M, batch)
        return loss

    def _log_bound(self, nats_M: Tensor, batch: NoisedBatch) -> None:
        nats_T = nats_M.new_zeros(len(batch.tokens)).index_add_(0, batch.tokenizer_M, nats_M)
        for place, (name, tokens) in enumerate(zip(self.vocabulary.tokenizers, batch.tokens, strict=True)):
            if tokens:
                self.log(f"train/{name}", nats_T[place] / tokens, prog_bar=True, batch_size=1)

    def on_train_start(self) -> None:
        self._divisors.clear()
        if self.trainer.strategy.handles_gradient_accumulation and self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                f"{type(self.trainer.strategy).__name__} accumulates gradients by itself, so that tokens of different "
                "batches would not count the same. Set accumulate_grad_batches to 1 and a larger batch_size."
            )

    def on_after_backward(self) -> None:
        """Normalise over the optimizer step: all ranks and all accumulated batches, of which Lightning takes the mean
        of their losses."""
        if not self._divisors or self.trainer.fit_loop._should_accumulate():
            return
        counted = torch.stack(self._divisors).sum()
        counted = counted.clamp_min(torch.finfo(counted.dtype).tiny)
        scale = self._divisors[0].clamp_min(1) * self.trainer.accumulate_grad_batches / counted
        for weight in self.parameters():
            if weight.grad is not None:
                local_shard(weight.grad).mul_(scale.to(weight.grad.dtype))
        self._divisors.clear()

    def on_validation_epoch_start(self) -> None:
        self._bounds = Bounds(self._labels, self.device)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: EvaluationBatch, batch_index: int) -> None:
        """Adds to the bounds of each label, conditional and unconditional, and to the joint one.

        They are logged in nats per token and, where tokenizers know the dimensions of their items, in bits for each.
        """
        measure = partial(
            likelihood, self.transformer, self.vocabulary, draws=self.likelihood_draws, processes=self.processes
        )
        self._bounds.add(batch, measure)

    def test_step(self, batch: EvaluationBatch, batch_index: int) -> None:
        self.validation_step(batch, batch_index)

    def on_validation_epoch_end(self) -> None:
        self._log_bounds("validation")

    def on_test_epoch_end(self) -> None:
        self._log_bounds("test")

    def _log_bounds(self, stage: str) -> None:
        values = {f"likelihood_draws/{stage}": float(self.likelihood_draws)}
        estimates = self._bounds.estimates(
            partial(self.trainer.strategy.reduce, reduce_op="sum"),  # pyright: ignore[reportArgumentType]
            _gather,
        )
        for one in estimates:
            values[f"{stage}/{one.mode}"] = one.nats
            values[f"standard_error/{stage}/{one.mode}"] = one.nats_error
            if one.unit:
                values[f"bits_per_{one.unit}/{stage}/{one.mode}"] = one.bits
                values[f"standard_error/bits_per_{one.unit}/{stage}/{one.mode}"] = one.bits_error
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.print(bounds_table(estimates, self.likelihood_draws, self.transformer.pattern.is_autoregressive))
        for name, value in values.items():
            self.log(name, value, prog_bar=name == f"{stage}/joint", rank_zero_only=True)

    def configure_callbacks(self) -> list[Throughput]:
        known: list[Any] = self.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        return [] if any(isinstance(callback, Throughput) for callback in known) else [Throughput()]

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The layers' matrices, other matrices, and vectors. A sharded weight keeps its name and its whole shape."""
        weights: list[list[nn.Parameter]] = [[], [], []]
        for name, weight in self.named_parameters():
            if not weight.requires_grad:
                continue
            weights[2 if weight.dim() < 2 else int(not name.startswith("transformer.layers."))].append(weight)
        hidden, others, vectors = weights
        return [
            {"params": hidden, "hidden": True},
            {"params": others, "hidden": False},
            {"params": vectors, "hidden": False, "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self._parameter_groups())

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
            cosine = 0.5 * (1 + math.cos(math.pi * progress(self.trainer, step)))
            return warm * (self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        documents = None if self.seen is None else self.seen.to_dict()
        checkpoint[KEY] = {**self.recipe, "vocabulary": self.vocabulary.to_dict(), "documents": documents}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if KEY not in checkpoint:
            raise ValueError(
                "the checkpoint (--ckpt_path) is of another kind of model. Give one that a training of "
                "MaskedDiffusionModule wrote."
            )
        saved = checkpoint[KEY]
        self.vocabulary.check(SharedVocabulary.from_dict(saved["vocabulary"], "the checkpoint"), "the checkpoint")
        for name, process in self.recipe["processes"].items():
            if saved["processes"].get(name) != process:
                raise ValueError(
                    f"The checkpoint was trained with other noise of {name!r}: {saved['processes'].get(name)}. The "
                    f"configuration has {process}. Set model.init_args.objective alike."
                )
        for key, value in self.recipe["transformer"].items():
            if saved["transformer"].get(key) != value:
                raise ValueError(
                    f"the checkpoint's transformer has {key} {saved['transformer'].get(key)}, the configuration "
                    f"{value}: set model.init_args.transformer.{key} alike"
                )

    def setup(self, stage: str) -> None:
        check_strategy(self.trainer)
        if any(isinstance(callback, EMAWeightAveraging) for callback in self.trainer.callbacks):  # pyright: ignore
            raise ValueError(
                "Lightning's EMAWeightAveraging saves initial weights when a run ends before averaging starts. "
                "Use multidiff.training.AveragedWeights, with start_step in place of update_starting_at_step."
            )
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "vocabulary"):
            self.vocabulary.check(data.vocabulary, "the data module (data.init_args.tokenizers)")
        if isinstance(data, DocumentDataModule):
            self._labels = list(dict.fromkeys([*self._labels, *data.labels]))
            data.collate = Noising(data.sequencer, self.tasks, self.objective, self.seed, self.transformer.pattern)
            data.copies = (1 + self.objective.complementary) * (
                1 + (self.transformer.pattern.attention == "block_causal")
            )
            data.collate_evaluation = partial(EvaluationBatch.of, sequencer=data.sequencer, seed=self.seed)
            if stage == "fit":
                self.seen = data.seen
                self._check_labels(data.labels)

    def _check_labels(self, labels: Sequence[str]) -> None:
        for label in self._labels[len(self.vocabulary.tokenizers) :]:
            if label not in labels:
                raise ValueError(
                    f"A task names the label {label!r}, but no training document has a segment with it. There are "
                    f"{', '.join(labels)}."
                )


def _gather(value: Any) -> list[Any]:
    """The values of all processes."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
