"""What a pipeline may be handed as a sampler, and the samplers of all its tokenizers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import AmusedScheduler, BlockRefinementScheduler

from multidiff.processes import Absorbing, Process
from multidiff.samplers.ancestral import AncestralSampler
from multidiff.samplers.blocks import cache_for
from multidiff.samplers.protocol import Sampler
from multidiff.samplers.sampler import MaskSampler
from multidiff.samplers.scheduler import Scheduler, SchedulerSampler
from multidiff.sequence.blocks import AttentionPattern
from multidiff.sequence.vocabulary import SharedVocabulary


class Samplers(Mapping[str, Sampler]):
    """The sampler of each tokenizer of a vocabulary; `samplers["image"] = AmusedScheduler(…)` sets one.

    Args:
        vocabulary: its tokenizers.
        given: as `as_sampler` takes them; a tokenizer that is not named gets what `default_sampler` makes.
        processes: the forward process of each tokenizer; `Absorbing()` where not named.
        pattern: of the model's attention.

    Raises:
        ValueError: an unknown tokenizer, something that is no sampler, or a sampler that does not fit the tokenizer's
            process or the model's attention; also when one is set.
    """

    def __init__(
        self,
        vocabulary: SharedVocabulary,
        given: Mapping[str, Sampler | Scheduler],
        processes: Mapping[str, Process] | None = None,
        pattern: AttentionPattern = AttentionPattern(),  # noqa: B008 (frozen)
    ):
        self._vocabulary, self._processes, self._pattern = vocabulary, processes or {}, pattern
        for name in self._processes:
            vocabulary.layout(name)
        self._samplers: dict[str, Sampler] = {}
        usual = {name: default_sampler(self._processes.get(name)) for name in vocabulary.tokenizers}
        for name, sampler in {**usual, **given}.items():
            self[name] = sampler

    def __setitem__(self, name: str, sampler: Sampler | Scheduler) -> None:
        self._vocabulary.layout(name)
        made = as_sampler(sampler)
        check_fit(name, made, self._processes.get(name), self._pattern)
        self._samplers[name] = made

    def __getitem__(self, name: str) -> Sampler:
        return self._samplers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._samplers)

    def __len__(self) -> int:
        return len(self._samplers)

    def __repr__(self) -> str:
        return repr(self._samplers)


def default_sampler(process: Process | None) -> Sampler:
    """The sampler of a tokenizer for which nobody chose one."""
    return MaskSampler() if process is None or process.starts_masked else AncestralSampler(process)


def check_fit(name: str, sampler: Sampler, process: Process | None, pattern: AttentionPattern) -> None:
    """Refuse a sampler that unmasks where the process has no masks, one that follows another process, and one that does
    not fit the attention of the model.

    Raises:
        ValueError: it names the tokenizer.
    """
    process = process or Absorbing()
    if not (pattern.is_full or process.starts_masked):
        raise ValueError(
            f"A model of {pattern} begins with masks, but the process of {name!r}, {type(process).__name__}, has none."
        )
    _check_pattern(name, sampler, pattern)
    if isinstance(sampler, AncestralSampler):
        if type(process) is type(sampler.process) is Absorbing or process == sampler.process:
            return
        raise ValueError(
            f"The sampler of {name!r} follows {sampler.process}, but the model was trained with {process}. Give it the "
            f"model's: AncestralSampler(pipe.processes[{name!r}])."
        )
    if process.starts_masked or not isinstance(sampler, MaskSampler | SchedulerSampler):
        return
    raise ValueError(
        f"The sampler of {name!r} decides masked codes, but its process {type(process).__name__} masks none. Choose "
        "the ancestral sampler for it (in YAML, sampler: ancestral; in Python, AncestralSampler)."
    )


def as_sampler(sampler: Any) -> Sampler:
    """A sampler, from whatever may be handed to the pipeline.

    Args:
        sampler: an object with the attributes and methods of `Sampler`, which is returned as it is, or one of
            diffusers' schedulers.

    Raises:
        ValueError: something else; the message names what it lacks.
    """
    if isinstance(sampler, AmusedScheduler | BlockRefinementScheduler):
        return SchedulerSampler(sampler)
    missing = [name for name in vars(Sampler) if name[0] != "_" and not hasattr(sampler, name)]
    if not isinstance(sampler, type) and not missing:
        return sampler
    kind = sampler.__name__ if isinstance(sampler, type) else type(sampler).__name__
    advice = "Make an instance of this class." if isinstance(sampler, type) else f"It has no {', '.join(missing)}."
    raise ValueError(
        f"expected a MaskSampler, an AmusedScheduler or a BlockRefinementScheduler, got {kind}. {advice} "
        "Another class must have what multidiff.samplers.Sampler describes."
    )


def _check_pattern(name: str, sampler: Sampler, pattern: AttentionPattern) -> None:
    try:
        cache_for(sampler.cache_mode, pattern)
        if isinstance(sampler, MaskSampler):
            sampler.parts.check_pattern(pattern)
    except ValueError as error:
        raise ValueError(f"The sampler of {name!r}: {error}") from None
    if not pattern.is_full and "block_RN" not in inspect.signature(sampler.start).parameters:
        kind = type(sampler.scheduler if isinstance(sampler, SchedulerSampler) else sampler).__name__
        raise ValueError(
            f"The sampler of {name!r}, {kind}, does not go with a model of {pattern}, because its start takes no "
            "block_RN. Use a MaskSampler."
        )
