"""The LightningModule: glue between tokenizers, diffusion, transformer and trainer."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from multidiff import plugins
from multidiff.checkpoints import KEY, build_transformer, load_samplers, pack
from multidiff.data import DocumentDataModule
from multidiff.objectives.diffusion import (
    ABSENT,
    GIVEN,
    TARGET,
    Objective,
    Task,
    corrupt,
    corrupt_exactly,
    draw_roles,
    draw_times,
    queries,
    weighted_nats,
)
from multidiff.seeding import generator_for
from multidiff.sequence.seen import SeenDocuments
from multidiff.sequence.sequencer import TokenBatch
from multidiff.sequence.vocabulary import SharedVocabulary
from multidiff.training.callbacks import progress

_WRAPPERS = re.compile(r"_(fsdp_wrapped_module|checkpoint_wrapped_module|orig_mod)\.")


class MaskedDiffusionModule(LightningModule):
    """Trains one transformer over the documents of any set of tokenizers, and measures it in nats per token.

    Args:
        tokenizers: name -> {plugin: entry-point name, and its arguments or `folder: saved tokenizer`}; the order
            fixes the vocabulary.
        transformer: arguments of `MaskedDiffusionTransformer`, all but `vocabulary_rows`.
        tasks: the task mixture; null trains every segment of every document with one noise level each.
        objective: schedule, weighting, normalisation and loss_weights per tokenizer of the training loss.
        optimizer: called with three parameter groups: the blocks' matrices (marked `hidden: True`), the embedding and
            the head, and vectors, which get no weight decay.
        warmup_steps: steps of linear warm-up.
        min_lr_ratio: fraction of the learning rate that the cosine ends at, when the first of the trainer's limits
            (`max_steps`, `max_epochs`, `max_time`) is reached.
        samplers: sampling settings by tokenizer name, used by previews and saved with the model.
        seed: of weights and noise.
    """

    def __init__(
        self,
        tokenizers: dict[str, dict[str, Any]],
        transformer: dict[str, Any] | None = None,
        tasks: list[Task] | None = None,
        objective: Objective = Objective(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 100,
        min_lr_ratio: float = 0.05,
        samplers: dict[str, dict[str, Any]] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        built = plugins.build(tokenizers)
        self.vocabulary = SharedVocabulary.of(built)
        config = {**(transformer or {}), "vocabulary_rows": self.vocabulary.rows}
        self.transformer = build_transformer(config, "model.transformer")
        self.transformer.initialize(generator_for(seed))
        # Defaults as well: a later version's may differ. Plain values: a checkpoint must load with weights_only=True.
        settings = {key: value for key, value in self.transformer.config.items() if not key.startswith("_")}
        del settings["vocabulary_rows"]
        self.recipe = {"tokenizers": pack(built), "transformer": settings, "samplers": samplers or {}}
        self.samplers = load_samplers(samplers or {}, self.vocabulary, "model.samplers")
        self.tasks = [Task.of(task) for task in tasks or [{"roles": {"others": "target"}}]]
        for name in ({name for task in self.tasks for name in task.roles} - {"others"}) | objective.loss_weights.keys():
            self.vocabulary.layout(name)
        self.objective, self.optimizer = objective, optimizer
        self.warmup_steps, self.min_lr_ratio, self.seed = warmup_steps, min_lr_ratio, seed
        self.seen: SeenDocuments | None = None
        self._counts: list[Tensor] = []  # what the losses of this optimizer step are divided by, batch by batch
        self._group_of = {
            name: 2 if weight.dim() < 2 else int(not name.startswith("transformer.layers."))
            for name, weight in self.named_parameters()
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedDiffusionModule:
        """Weight averaging copies the module. A configured optimizer holds what the command line made, live tokenizers
        and data among it: copies share it, and the files of the tokenizers."""
        for shared in (self.optimizer, self.recipe):
            memo[id(shared)] = shared
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def forward(self, batch: TokenBatch, ids_BL: Tensor, asked: Any) -> list[Tensor]:
        return self.transformer(ids_BL, batch.positions_BL3, batch.document_BL, asked, batch.coords_BL3)

    def training_step(self, batch: TokenBatch, batch_index: int) -> Tensor:
        generator = generator_for(self.seed, self.current_epoch, batch_index, self.global_rank)
        role_S, group_S = draw_roles(batch, self.tasks, self.vocabulary, generator)
        t_S = draw_times(role_S, group_S, generator)
        noise = corrupt(batch, role_S, t_S, self.objective.schedule, generator)
        asked = queries(noise.predicted_BL, batch.span_BL, self.vocabulary)
        logits = self(batch, noise.ids_BL, asked)
        total, count = self.objective(logits, asked, batch, noise, self.vocabulary)
        self.log("loss", (total / count.clamp_min(torch.finfo().tiny)).detach(), prog_bar=True, batch_size=1)
        # DDP takes the mean of the ranks' gradients, so the mean of their counts divides the sum of their losses.
        self._counts.append(self.trainer.strategy.reduce(count.clone(), reduce_op="mean"))  # pyright: ignore
        # The counts of later batches are not known yet. `on_after_backward` scales the gradient once they are.
        loss = total / self._counts[0].clamp_min(1)
        bound_S = weighted_nats(logits, asked, batch, noise).detach()
        for name, value in self._per_tokenizer(batch, bound_S, (role_S == TARGET).to(bound_S.device)).items():
            self.log(f"train/{name}", value[0] / value[1].clamp_min(1), prog_bar=True, batch_size=1)
        return loss

    def on_train_start(self) -> None:
        self._counts.clear()
        if self.trainer.strategy.handles_gradient_accumulation and self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                f"{type(self.trainer.strategy).__name__} accumulates gradients by itself, so that tokens of different "
                "batches would not count the same. Set accumulate_grad_batches to 1 and a larger batch_size."
            )

    def on_after_backward(self) -> None:
        """Normalise over the optimizer step: all ranks and all accumulated batches, of which Lightning takes the mean
        of their losses."""
        if self.trainer.fit_loop._should_accumulate():
            return
        counted = torch.stack(self._counts).sum().clamp_min(torch.finfo().tiny)
        scale = self._counts[0].clamp_min(1) * self.trainer.accumulate_grad_batches / counted
        for weight in self.parameters():
            if weight.grad is not None:
                weight.grad.mul_(scale.to(weight.grad.dtype))
        self._counts.clear()

    def _per_tokenizer(self, batch: TokenBatch, nats_S: Tensor, where_S: Tensor) -> dict[str, Tensor]:
        """[nats, tokens] of each tokenizer over the segments of `where_S`."""
        return {
            name: torch.stack([nats_S[where].sum(), batch.divisor_S[where].sum().float()])
            for place, name in enumerate(self.vocabulary.tokenizers)
            if bool((where := where_S & (batch.tokenizer_S == place)).any())
        }

    def on_validation_epoch_start(self) -> None:
        self._sums: dict[str, Tensor] = {}

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: TokenBatch, batch_index: int) -> None:
        """Adds to the bound of each tokenizer, conditional and unconditional, and to the joint one."""
        tokenizers = range(len(self.vocabulary.tokenizers))
        document_S = batch.document_S
        for index, other in ((index, other) for index in tokenizers for other in (GIVEN, ABSENT)):
            mine_S = batch.tokenizer_S == index
            holds_D = torch.zeros(batch.num_documents, dtype=torch.bool, device=self.device)
            mixed_D = holds_D.clone()
            holds_D[document_S[mine_S]] = True
            mixed_D[document_S[~mine_S]] = True
            # A document of this tokenizer alone has no others to be given.
            counts_D = holds_D & mixed_D if other == GIVEN else holds_D
            role_S = torch.where(mine_S & counts_D[document_S], TARGET, torch.where(mine_S, ABSENT, other))
            mode = "conditional" if other == GIVEN else "unconditional"
            self._evaluate(batch, role_S, (batch_index, index, other), mode)
        self._evaluate(batch, torch.full_like(document_S, TARGET), (batch_index, -1, TARGET), "joint")

    def test_step(self, batch: TokenBatch, batch_index: int) -> None:
        self.validation_step(batch, batch_index)

    def _evaluate(self, batch: TokenBatch, role_S: Tensor, key: tuple[int, ...], mode: str) -> None:
        if not bool((role_S == TARGET).any()):
            return
        noise = corrupt_exactly(batch, role_S, batch.document_S, generator_for(self.seed, *key, self.global_rank))
        asked = queries(noise.predicted_BL, batch.span_BL, self.vocabulary)
        nats_S = weighted_nats(self(batch, noise.ids_BL, asked), asked, batch, noise)
        counted_S = (role_S == TARGET) & (batch.divisor_S > 0)  # not what stands in for documents of other ranks
        if not bool(counted_S.any()):
            return
        sums = self._per_tokenizer(batch, nats_S, counted_S)
        if mode == "joint":
            sums = {"joint": torch.stack(list(sums.values())).sum(0)}
        for name, value in sums.items():
            label = "joint" if mode == "joint" else f"{name}/{mode}"
            self._sums[label] = self._sums.get(label, torch.zeros_like(value)) + value

    def on_validation_epoch_end(self) -> None:
        self._log_bounds("validation")

    def on_test_epoch_end(self) -> None:
        self._log_bounds("test")

    def _log_bounds(self, stage: str) -> None:
        labels = [
            f"{name}/{mode}" for name in self.vocabulary.tokenizers for mode in ("conditional", "unconditional")
        ] + ["joint"]
        for label in labels:  # the same on every rank, whatever its documents held
            value = self._sums.get(label, torch.zeros(2, device=self.device))
            nats, tokens = self.trainer.strategy.reduce(value, reduce_op="sum")
            if tokens:
                self.log(f"{stage}/{label}", nats / tokens, prog_bar=label == "joint", rank_zero_only=True)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The blocks' matrices, other matrices, and vectors; by name, for a strategy may have sharded the weights."""
        weights: list[list[nn.Parameter]] = [[], [], []]
        for name, weight in self.named_parameters():
            plain = _WRAPPERS.sub("", name)
            if not weight.requires_grad:
                continue
            if plain not in self._group_of:
                raise ValueError(
                    f"{type(self.trainer.strategy).__name__} merges weights into {name}, so that matrices and vectors "
                    "cannot be told apart. Set use_orig_params: true on the strategy."
                )
            weights[self._group_of[plain]].append(weight)
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
            cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress(self.trainer, step))).item())
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
        for key, value in self.recipe["transformer"].items():
            if saved["transformer"].get(key) != value:
                raise ValueError(
                    f"the checkpoint's transformer has {key} {saved['transformer'].get(key)}, the configuration "
                    f"{value}: set model.init_args.transformer.{key} alike"
                )

    def setup(self, stage: str) -> None:
        if any(isinstance(callback, EMAWeightAveraging) for callback in self.trainer.callbacks):  # pyright: ignore
            raise ValueError(
                "Lightning's EMAWeightAveraging saves initial weights when a run ends before averaging starts. "
                "Use multidiff.training.AveragedWeights, with start_step in place of update_starting_at_step."
            )
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "vocabulary"):
            self.vocabulary.check(data.vocabulary, "the data module (data.init_args.tokenizers)")
        if stage == "fit" and isinstance(data, DocumentDataModule):
            self.seen = data.seen
