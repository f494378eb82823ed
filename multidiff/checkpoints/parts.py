"""The parts of a model, and how its tokenizers and samplers are restored from what was saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multidiff import files
from multidiff.models.transformer import MaskedDiffusionTransformer
from multidiff.samplers import MaskSampler, Sampler
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
        seen: what the training documents were like; None if that is unknown.
    """

    transformer: MaskedDiffusionTransformer
    vocabulary: SharedVocabulary
    tokenizers: Mapping[str, ModalityTokenizer]
    samplers: Mapping[str, Sampler]
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


def load_samplers(settings: Mapping[str, Any], vocabulary: SharedVocabulary, where: str) -> dict[str, MaskSampler]:
    """One sampler for each tokenizer of the vocabulary.

    Args:
        settings: sampler settings by tokenizer name; a tokenizer without settings gets the default sampler.
        vocabulary: bounds the codes and names that the settings may mention.
        where: the file or configuration key that error messages name.

    Raises:
        ValueError: an unknown tokenizer or setting, or a value that does not fit.
    """
    samplers = {name: MaskSampler() for name in vocabulary.tokenizers}
    for name, values in settings.items():
        try:
            varies = vocabulary.layout(name).variable_length
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: the settings of {name!r} must be a mapping, got {values!r}")
        samplers[name] = MaskSampler.from_settings(dict(values), f"{where}, {name}")
        try:
            size = max(stop - start for start, stop in vocabulary.spans[name])
            samplers[name].parts.rules.check_codes(size, None, varies=varies)
            scale = samplers[name].guidance_scale
            for condition in scale if isinstance(scale, Mapping) else ():
                vocabulary.layout(condition)
        except ValueError as error:
            raise ValueError(f"{where}, {name}: {error}") from None
    return samplers
