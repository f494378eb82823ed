"""What a pipeline may be handed as a sampler, and the samplers of all its tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import AmusedScheduler, BlockRefinementScheduler

from multidiff.samplers.protocol import Sampler
from multidiff.samplers.sampler import MaskSampler
from multidiff.samplers.scheduler import Scheduler, SchedulerSampler
from multidiff.sequence.vocabulary import SharedVocabulary


class Samplers(Mapping[str, Sampler]):
    """The sampler of each tokenizer of a vocabulary; `samplers["image"] = AmusedScheduler(…)` sets one.

    Args:
        vocabulary: its tokenizers.
        given: as `as_sampler` takes them; a tokenizer that is not named gets `MaskSampler()`.

    Raises:
        ValueError: an unknown tokenizer, or something that is no sampler; also when one is set.
    """

    def __init__(self, vocabulary: SharedVocabulary, given: Mapping[str, Sampler | Scheduler]):
        self._vocabulary = vocabulary
        self._samplers: dict[str, Sampler] = {name: MaskSampler() for name in vocabulary.tokenizers}
        for name, sampler in given.items():
            self[name] = sampler

    def __setitem__(self, name: str, sampler: Sampler | Scheduler) -> None:
        self._vocabulary.layout(name)
        self._samplers[name] = as_sampler(sampler)

    def __getitem__(self, name: str) -> Sampler:
        return self._samplers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._samplers)

    def __len__(self) -> int:
        return len(self._samplers)

    def __repr__(self) -> str:
        return repr(self._samplers)


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
