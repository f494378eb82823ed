"""A document with blanks in, the same document filled in out.

    pipe = MultiDiffPipeline.from_pretrained("runs/demo/model")
    out = pipe([[Given("text", "seven"), Blank("image"), Blank("speech")]], generator=torch.Generator().manual_seed(0))
    out.documents[0][1].item.save("seven.png")

Any combination of modalities may be given and blank. Every tokenizer's blanks are filled by a sampler of its own, all
in the same forward passes.

Shape suffixes: P tokens of the batch, N codes of a segment.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from multidiff import checkpoints, files
from multidiff.checkpoints import ModelParts
from multidiff.generation.decoder import Decoder
from multidiff.generation.requests import Draft, Filled, Given, Masked, Request, check_nesting, make_segments
from multidiff.generation.runs import Decision, SegmentFacts, make_runs
from multidiff.models import MaskedDiffusionTransformer
from multidiff.processes import Process
from multidiff.samplers import Sampler, Samplers, Scheduler
from multidiff.samplers.guidance import check_scale
from multidiff.samplers.token_sampling import NotFiniteError
from multidiff.samplers.unmasking import check_steps
from multidiff.sequence import MASK, SeenDocuments, Segment, Sequencer, SharedVocabulary, TokenBatch
from multidiff.tokenizer import ModalityTokenizer


@dataclass
class MultiDiffOutput(BaseOutput):
    """What the pipeline returns.

    Attributes:
        documents: the documents, filled in.
        nfe: forward passes of the denoiser that each document took; a step counts 1 more for each guiding condition.
        trace: what was decided when, document by document; None where it was not asked for.
        divergence: mean total variation between the distributions with and without an approximate cache; None where
            it was not asked for.
    """

    documents: list[list[Filled]]
    nfe: list[int]
    trace: list[list[Decision]] | None = None
    divergence: float | None = None


class TrainedModule(Protocol):
    """What `MultiDiffPipeline.from_module` reads from a training module."""

    transformer: MaskedDiffusionTransformer
    vocabulary: SharedVocabulary
    samplers: dict[str, Sampler]
    processes: dict[str, Process]
    seen: SeenDocuments | None
    recipe: dict[str, Any]

    @property
    def device(self) -> torch.device: ...


class MultiDiffPipeline(DiffusionPipeline):
    """Fills in documents.

    Args:
        transformer: the denoiser.
        vocabulary: the layout that it was trained with.
        tokenizers: live tokenizers by name, matching the vocabulary.
        samplers: a sampler, or a scheduler of diffusers, for each tokenizer; where there is none, `MaskSampler()`, or
            an `AncestralSampler` if the tokenizer's process masks nothing.
        processes: the forward process of each tokenizer; absorbing where not named.
        seen: what the training documents were like. It gives blanks their default size, and documents that ask for
            something else raise a warning.
    """

    def __init__(
        self,
        transformer: MaskedDiffusionTransformer,
        vocabulary: SharedVocabulary,
        tokenizers: Mapping[str, ModalityTokenizer],
        samplers: Mapping[str, Sampler | Scheduler] | None = None,
        processes: Mapping[str, Process] | None = None,
        seen: SeenDocuments | None = None,
    ):
        super().__init__()
        vocabulary.check(SharedVocabulary.of(tokenizers), "the set of tokenizers")
        if transformer.config["vocabulary_rows"] != vocabulary.rows:
            raise ValueError(
                f"the transformer has {transformer.config['vocabulary_rows']} rows, its vocabulary {vocabulary.rows}"
            )
        self.register_modules(transformer=transformer)
        self.transformer: MaskedDiffusionTransformer = transformer
        self.vocabulary = vocabulary
        self.tokenizers = dict(tokenizers)
        self.processes = dict(processes or {})
        self._samplers = Samplers(vocabulary, samplers or {}, self.processes, transformer.pattern)
        self.seen = seen
        self.source: Path | None = None  # the folder or file that it was read from
        self._card_folder: Path | None = None  # where somebody may have edited its card
        self.sequencer = Sequencer(tokenizers, vocabulary)

    @classmethod
    def from_module(cls, module: TrainedModule, tokenizers: Mapping[str, ModalityTokenizer] | None = None) -> Self:
        """A pipeline around the transformer of a training module: further training changes it as well.

        Args:
            module: its weights, vocabulary and sampling settings are used.
            tokenizers: live tokenizers by name; None makes a copy of those that the module was built with.
        """
        if tokenizers is None:
            packed = module.recipe["tokenizers"]
            tokenizers = checkpoints.unpack(packed, module.vocabulary, type(module).__name__)
            for tokenizer in tokenizers.values():
                tokenizer.to(module.device)
        return cls(module.transformer, module.vocabulary, tokenizers, module.samplers, module.processes, module.seen)

    @property
    def parts(self) -> ModelParts:
        """What a saved model consists of."""
        return ModelParts(self.transformer, self.vocabulary, self.tokenizers, self.samplers, self.processes, self.seen)

    @property
    def samplers(self) -> Samplers:
        """The sampler of each tokenizer; assign to change one, `pipe.samplers["image"] = AmusedScheduler(…)`, or all.

        Raises:
            ValueError: on assignment, an unknown tokenizer or something that is no sampler.
        """
        return self._samplers

    @samplers.setter
    def samplers(self, samplers: Mapping[str, Sampler | Scheduler]) -> None:
        self._samplers = Samplers(self.vocabulary, samplers, self.processes, self.transformer.pattern)

    @property
    def components(self) -> dict[str, Any]:
        """What diffusers moves and lists: the transformer; it knows no other kind of part that is here."""
        return {"transformer": self.transformer}

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the transformer, and the tokenizers to its device."""
        super().to(*args, **kwargs)
        for tokenizer in self.tokenizers.values():
            tokenizer.to(self.transformer.device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        documents: Sequence[Sequence[Request]],
        num_inference_steps: int | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        null_masks_partly_known: bool = False,
        callback_on_step_end: Callable[[MultiDiffPipeline, int, int, dict[str, Any]], Any] | None = None,
        trace: bool = False,
        divergence: bool = False,
    ) -> MultiDiffOutput:
        """Fill in the blanks of a batch of documents, without dropout.

        Args:
            documents: lists of `Given`, `Blank`, `Masked` and `Draft` segments, at least one of them with something
                unknown.
            num_inference_steps: steps for every tokenizer whose sampler does not find their number itself; None takes
                each sampler's own.
            guidance_scale: classifier-free guidance for every tokenizer, 1 is none; None takes each sampler's own.
                The null is the document with its given segments masked; with {tokenizer: scale}, one null for each,
                with that tokenizer's masked. A document without any is not guided by a saved scale, and refused with
                one that is asked for here.
            generator: one per document, for samples that do not depend on the batch; or one for all; None draws a
                fresh seed. torch's global generator is never touched. A document takes the same random numbers alone
                and in any batch, so its sample is the same up to the rounding of the forward pass: practically always
                in fp32 and fp64; in bf16, kernels for another batch size may round a probability to the other side of
                a decision.
            null_masks_partly_known: whether the null also masks what is known inside of `Masked` segments, so that
                guidance also strengthens what follows from that.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"documents": …})` after every step, with
                the documents as lists of `multidiff.sequence.Segment`, `known_N` True where decided.
            trace: also return what was decided when.
            divergence: also measure how far an approximate cache leads away, at the cost of what the cache saves.

        Raises:
            ValueError: an unknown tokenizer, a size that does not fit, nothing to fill in, guidance where a document
                gives no condition, more steps than there are codes to fill in, a number of generators other than that
                of documents.
        """
        if num_inference_steps is not None:
            check_steps(num_inference_steps)
        if guidance_scale is not None:
            check_scale(guidance_scale)
        check_nesting(documents)
        generators = _generators(generator, len(documents))
        segments = make_segments(documents, self.sequencer, self.tokenizers, self.canvas)
        self._remark(segments)
        batch = self.sequencer.batch(segments)
        runs = make_runs(
            batch,
            self._facts(documents, segments, batch),
            self.vocabulary,
            self.samplers,
            generators,
            num_inference_steps,
            guidance_scale,
            self.transformer.pattern,
        )
        required = guidance_scale is not None
        nulls = {
            key: self._null(key, batch, segments, required, null_masks_partly_known)
            for key in sorted({key for run in runs for key, scale in run.scales.items() if scale != 1})
        }
        decoder = Decoder(self.transformer, self.vocabulary, batch, runs, nulls, generators, trace, divergence)
        with evaluating(self.transformer), self.progress_bar(total=decoder.steps) as bar:  # pyright: ignore
            for step in range(decoder.steps):
                try:
                    decoder.step(step)
                except NotFiniteError as error:
                    raise NotFiniteError(f"{self.source}: {error}" if self.source else str(error)) from None
                if callback_on_step_end is not None:
                    current = self._current(batch, segments, decoder.ids_P)
                    callback_on_step_end(self, step, decoder.steps - 1 - step, {"documents": current})
                bar.update()
                if decoder.done(step + 1):
                    break
        current = self._current(batch, segments, decoder.ids_P)
        filled = self._decode(documents, current, _by_segment(decoder.probs_P, batch))
        return MultiDiffOutput(filled, decoder.nfe, decoder.history, decoder.divergence)

    def canvas(self, name: str) -> dict[str, int]:
        """The size of a blank where nothing says otherwise."""
        trained = self.seen.canvas.get(name, {}) if self.seen else {}
        return {**trained, **(self.samplers[name].canvas or {})}

    def _facts(
        self, documents: Sequence[Sequence[Request]], segments: Sequence[Sequence[Segment]], batch: TokenBatch
    ) -> SegmentFacts:
        parts = [part for document in documents for part in document]
        inside = [len(part.codes) if isinstance(part, Masked | Draft) else 0 for part in parts]
        units = [self.sequencer.unit(segment) for document in segments for segment in document]
        noise = [float(part.noise or 0) if isinstance(part, Draft) else 0.0 for part in parts]
        draft_P = torch.zeros_like(batch.known_P)
        for start, part in zip(batch.start_S.tolist(), parts, strict=True):
            if isinstance(part, Draft):
                draft_P[start : start + len(part.codes)] = part.decided_N
        return SegmentFacts(
            torch.tensor(inside), torch.tensor(units), draft_P, torch.tensor(noise, dtype=torch.float64)
        )

    def _remark(self, documents: Sequence[Sequence[Segment]]) -> None:
        """Warn of what lies outside of what the model was trained on."""
        if self.seen is None:
            return
        said: dict[str, None] = {}
        for document in documents:
            said |= dict.fromkeys(self.seen.remarks([(part.tokenizer, self._size_seen(part)) for part in document]))
        for remark in said:
            warnings.warn(remark, UserWarning, stacklevel=4)

    def _size_seen(self, part: Segment) -> Mapping[str, int]:
        """The size of a segment as far as the model notices it. Where attention has an order, it does not see the room
        behind what it writes."""
        varies = self.vocabulary.tokenizers[part.tokenizer].variable_length
        unseen = varies and not self.transformer.pattern.is_full and not bool(part.known_N.all())
        return {} if unseen else part.size

    def _null(
        self, key: str, batch: TokenBatch, documents: Sequence[Sequence[Segment]], required: bool, masks_partly: bool
    ) -> Tensor:
        """null_P: the known codes, of one tokenizer or of all (""), that a null does not see."""
        if key:
            self.vocabulary.layout(key)
        hides = [
            [
                key in ("", segment.tokenizer)
                and bool(segment.known_N.any() if masks_partly else segment.known_N.all())
                for segment in document
            ]
            for document in documents
        ]
        if required and not all(map(any, hides)):
            number = next(number for number, row in enumerate(hides) if not any(row))
            raise ValueError(
                f"guidance_scale other than 1 needs a condition, but document {number} has no given "
                f"{f'{key!r} ' if key else ''}segment. Set guidance_scale=1."
            )
        return batch.spread(torch.tensor([hidden for row in hides for hidden in row]), False) & batch.known_P

    def _current(self, batch: TokenBatch, segments: Sequence[Sequence[Segment]], ids_P: Tensor) -> list[list[Segment]]:
        """The documents as they stand; undecided positions hold local id 0 and are not known."""
        parts = _by_segment(ids_P, batch)
        current, number = [], 0
        for document in segments:
            row = []
            for segment in document:
                shared_N = parts[number]
                decided_N = shared_N != MASK
                first_N = self.vocabulary.to_shared(
                    segment.tokenizer, torch.zeros_like(segment.levels_N), segment.levels_N
                )
                ids_N = self.vocabulary.to_local(
                    segment.tokenizer, torch.where(decided_N, shared_N, first_N), segment.levels_N
                )
                row.append(replace(segment, ids_N=ids_N, known_N=decided_N))
                number += 1
            current.append(row)
        return current

    def _decode(
        self,
        documents: Sequence[Sequence[Request]],
        filled: Sequence[Sequence[Segment]],
        probs: Sequence[Tensor],
    ) -> list[list[Filled]]:
        codes = [[self.sequencer.codes(segment) for segment in document] for document in filled]
        made = [
            (row, column)
            for row, document in enumerate(documents)
            for column, part in enumerate(document)
            if not isinstance(part, Given)
        ]
        items: dict[tuple[int, int], Any] = {}
        for name, tokenizer in self.tokenizers.items():
            places = [(row, column) for row, column in made if documents[row][column].tokenizer == name]
            decoded = tokenizer.decode([codes[row][column] for row, column in places]) if places else []
            items |= dict(zip(places, decoded, strict=True))
        parts, probs_of = [], iter(probs)
        for row, document in enumerate(documents):
            parts.append([])
            for column, part in enumerate(document):
                item = part.item if isinstance(part, Given) else items[row, column]
                code = codes[row][column]
                given = isinstance(part, Given)
                parts[-1].append(Filled(part.tokenizer, item, code, next(probs_of)[: len(code)], given))
        return parts

    def save_pretrained(
        self,
        save_directory: str | Path,
        max_shard_size: int | str = "10GB",
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> None:
        """Write the model as one folder: `model_index.json`, `transformer/`, `vocabulary.json`, `tokenizers/<name>/`,
        `samplers.json` and a card. It appears whole or not at all. `push_to_hub(repo_id)` uploads such a folder.

        A card (`README.md`) that you edited in that folder, or in the folder that the model came from, is kept.

        Args:
            save_directory: the folder; an earlier model there is replaced.
            max_shard_size: of the transformer's safetensors files.
            safe_serialization, variant: diffusers' arguments; only plain safetensors are written.
        """
        if not safe_serialization or variant is not None:
            raise ValueError("multidiff writes plain safetensors only: leave safe_serialization and variant alone")
        checkpoints.save(self.parts, Path(save_directory), max_shard_size, self._card_folder)
        self._card_folder = Path(save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload model",
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the model to the Hugging Face hub, and return the URL of the commit.

        If you edited the card (`README.md`) in the folder that the model was last loaded from or saved to, that card
        is uploaded. Otherwise a generated card is.

        Args:
            repo_id: the repository, "user/model". It is created if it does not exist.
            commit_message, private, token, create_pr: as in diffusers.
        """
        return checkpoints.push(
            self.parts,
            repo_id,
            card_folder=self._card_folder,
            commit_message=commit_message,
            private=private,
            token=token,
            create_pr=create_pr,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        variant: None = None,
        use_safetensors: bool | None = None,
        **unknown: Any,
    ) -> Self:
        """A pipeline from a saved folder, a Lightning checkpoint (`.ckpt`; its averaged weights where it has them), or
        a repository of the Hugging Face hub: "user/model", where no file or folder has that name.

        Runs no code from any of them.

        Args:
            device: where the transformer and the tokenizers run.
            dtype: the transformer's number format, torch.float32, bfloat16, float16 or float64; None keeps the saved
                one.
            torch_dtype: diffusers' earlier name of `dtype`.
            cache_dir, revision, token, local_files_only, force_download: of a download, as in diffusers.
            variant, use_safetensors: diffusers' arguments; there are no variants, and only safetensors.

        Raises:
            ValueError: a file is missing, truncated, foreign or does not fit the others; the message names it. An
                option that has no meaning here, or a repository that cannot be fetched.
        """
        if unknown:
            raise ValueError(
                f"from_pretrained takes no {min(unknown)}; it takes device, dtype, and cache_dir, revision, token, "
                "local_files_only and force_download for a download"
            )
        if variant is not None or use_safetensors is False:
            raise ValueError("multidiff reads plain safetensors only: leave variant and use_safetensors alone")
        if None not in (dtype, torch_dtype) and dtype != torch_dtype:
            raise ValueError(
                f"torch_dtype {torch_dtype} and dtype {dtype} are two names of one thing: give dtype alone"
            )
        dtype = dtype or torch_dtype
        if dtype is not None and dtype not in checkpoints.FLOATS:
            raise ValueError(f"dtype {dtype!r} must be {', '.join(map(str, checkpoints.FLOATS))}")
        path = Path(pretrained_model_name_or_path)
        if checkpoints.is_repository(pretrained_model_name_or_path):
            path = checkpoints.fetch(
                str(pretrained_model_name_or_path),
                cache_dir=cache_dir,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        # A file of any kind; unlike pathlib's these never raise.
        is_checkpoint = checkpoints.is_sharded(path) or (os.path.exists(path) and not os.path.isdir(path))
        parts = checkpoints.load_checkpoint(path) if is_checkpoint else checkpoints.load_folder(path)
        nn.Module.to(parts.transformer, dtype=dtype)  # diffusers' own `to` warns of modules kept in float32: none
        pipeline = cls(
            parts.transformer, parts.vocabulary, parts.tokenizers, parts.samplers, parts.processes, parts.seen
        )
        pipeline.source = path
        pipeline._card_folder = None if is_checkpoint else path
        try:
            return pipeline.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device} cannot be used ({files.first_line(error)})") from error


@contextmanager
def evaluating(transformer: MaskedDiffusionTransformer) -> Iterator[None]:
    """Dropout is off inside; a training that goes on has each module in the mode that it was in."""
    modes = {module: module.training for module in transformer.modules()}
    transformer.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _by_segment(values_P: Tensor, batch: TokenBatch) -> list[Tensor]:
    """Values of the tokens of each segment."""
    return list(values_P[batch.segment_P >= 0].split(batch.length_S.tolist()))


def _generators(generator: torch.Generator | Sequence[torch.Generator] | None, documents: int) -> list[torch.Generator]:
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    generators = [generator] * documents if isinstance(generator, torch.Generator) else generator
    if not isinstance(generators, Sequence) or not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(
            f"generator must be a torch.Generator or a list of them, not {generator!r}. For a seed, write "
            "torch.Generator().manual_seed(0)."
        )
    if any(one.device.type != "cpu" for one in generators):
        raise ValueError("The generators must be on the CPU, where decoding keeps its tables: torch.Generator().")
    if len(generators) != documents:
        raise ValueError(f"{len(generators)} generators for {documents} documents: give one for each, or one for all")
    return list(generators)
