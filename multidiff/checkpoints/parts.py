"""The parts of a model, and how its tokenizers and samplers are restored from what was saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multidiff import files
from multidiff.models.transformer import MaskedDiffusionTransformer
from multidiff.processes import Absorbing, Process, from_settings
from multidiff.samplers import (
    AncestralSampler,
    MaskSampler,
    Sampler,
    SchedulerSampler,
    check_fit,
    default_sampler,
)
from multidiff.sequence.blocks import AttentionPattern
from multidiff.sequence.seen import SeenDocuments
from multidiff.sequence.vocabulary import SharedVocabulary
from multidiff.tokenizer import ModalityTokenizer


@dataclass(frozen=True, eq=False)
class ModelParts:
    """What a model consists of.

    Attributes:
        transformer: the denoiser.
        vocabulary: the layout of ids that the transformer was trained with.
        tokenizers: the tokenizers by name; they match the vocabulary.
        samplers: the sampler of each tokenizer.
        processes: the forward process of each tokenizer; absorbing where not named.
        seen: what the training documents were like; None if that is unknown.
    """

    transformer: MaskedDiffusionTransformer
    vocabulary: SharedVocabulary
    tokenizers: Mapping[str, ModalityTokenizer]
    samplers: Mapping[str, Sampler]
    processes: Mapping[str, Process] = field(default_factory=dict)
    seen: SeenDocuments | None = None


def load_tokenizer(tokenizer_class: type[ModalityTokenizer], folder: Path) -> ModalityTokenizer:
    """The tokenizer that was saved in `folder`.

    Raises:
        ValueError: the class raised any error but an `ImportError`; the message names the folder.
        ImportError: a package that the class needs is missing.
    """
    for root, folders, names in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *names)):
            if not path.is_dir():
                files.check_file(path)  # reading a pipe would block
    try:
        return tokenizer_class.load(folder)
    except ImportError:
        raise
    except Exception as error:
        said = files.first_line(error)
        raise ValueError(
            said if str(folder) in said else f"The tokenizer in {folder} cannot be loaded: {said}"
        ) from error


def load_processes(settings: Any, vocabulary: SharedVocabulary, where: str) -> dict[str, Process]:
    """The forward process of each tokenizer.

    Args:
        settings: of `multidiff.processes.to_settings`, by tokenizer name.
        vocabulary: bounds the names.
        where: the file that error messages name.

    Raises:
        ValueError: an unknown tokenizer, process or setting, or a bad value.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where}: the processes must be a mapping, got {settings!r}")
    processes = {}
    for name, values in settings.items():
        try:
            vocabulary.layout(name)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        processes[name] = from_settings(values, f"{where}, {name}")
    return processes


def load_samplers(
    settings: Mapping[str, Any],
    vocabulary: SharedVocabulary,
    processes: Mapping[str, Process],
    pattern: AttentionPattern,
    where: str,
) -> dict[str, Sampler]:
    """One sampler for each tokenizer of the vocabulary.

    Args:
        settings: sampler settings by tokenizer name; the key `sampler` chooses "mask" or "ancestral". A tokenizer
            without settings gets the default sampler of its process.
        vocabulary: bounds the codes and names that the settings may mention.
        processes: of each tokenizer; absorbing where not named.
        pattern: of the model's attention.
        where: the file or configuration key that error messages name.

    Raises:
        ValueError: an unknown tokenizer or setting, a value that does not fit, or a sampler that does not fit the
            process or the attention.
    """
    samplers = {name: default_sampler(processes.get(name)) for name in vocabulary.tokenizers}
    for name, values in settings.items():
        try:
            varies = vocabulary.layout(name).variable_length
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: the settings of {name!r} must be a mapping, got {values!r}")
        sampler = load_sampler(values, processes.get(name), f"{where}, {name}")
        try:
            if isinstance(sampler, MaskSampler):
                size = max(stop - start for start, stop in vocabulary.spans[name])
                sampler.parts.rules.check_codes(size, None, varies=varies)
            scale = sampler.guidance_scale
            for condition in scale if isinstance(scale, Mapping) else ():
                vocabulary.layout(condition)
            check_fit(name, sampler, processes.get(name), pattern)
        except ValueError as error:
            raise ValueError(f"{where}, {name}: {error}") from None
        samplers[name] = sampler
    return samplers


def load_sampler(values: Mapping[str, Any], process: Process | None, where: str) -> Sampler:
    """A sampler from settings, among which `sampler` says which; without it, the one that the process takes by
    default."""
    settings, process = dict(values), process or Absorbing()
    default = "ancestral" if isinstance(default_sampler(process), AncestralSampler) else "mask"
    kind = settings.pop("sampler", default)
    if kind == "ancestral":
        chosen = "" if "sampler" in values else f" (the ancestral sampler, which {type(process).__name__} noise needs)"
        return AncestralSampler.from_settings(settings, process, where + chosen)
    if kind == "mask":
        return MaskSampler.from_settings(settings, where)
    raise ValueError(f"{where}: sampler {kind!r} must be mask or ancestral")


def sampler_settings(name: str, sampler: Sampler) -> dict[str, Any]:
    """The settings from which `load_sampler` restores the sampler.

    Raises:
        ValueError: a sampler that cannot be saved.
    """
    if type(sampler) is MaskSampler:
        return {"sampler": "mask", **sampler.settings}
    if type(sampler) is AncestralSampler:
        return {"sampler": "ancestral", **sampler.settings}
    kind = type(sampler.scheduler if isinstance(sampler, SchedulerSampler) else sampler).__name__
    raise ValueError(
        f"The sampler of {name!r} has the class {kind}, which cannot be saved with a model. Set "
        f"pipe.samplers[{name!r}] = MaskSampler() before saving."
    )
