"""A model as one folder, and out of it or a Lightning checkpoint again.

    model_index.json   transformer/   vocabulary.json   tokenizers/<name>/   samplers.json   documents.json   README.md

Everything is safetensors and JSON, checked before it is used: diffusers fills missing tensors with random numbers and
only warns. Class names in files are compared with what is expected; nothing is imported on their word.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multidiff import __version__, files, plugins
from multidiff.models.transformer import MaskedDiffusionTransformer
from multidiff.samplers import MaskSampler
from multidiff.samplers.scheduler import SchedulerSampler
from multidiff.samplers.settings import check_ids
from multidiff.sequence.seen import SeenDocuments
from multidiff.sequence.sequencer import Sequencer
from multidiff.sequence.vocabulary import SharedVocabulary
from multidiff.tokenizer import ModalityTokenizer

if TYPE_CHECKING:
    from multidiff.generation.pipeline import MultiDiffPipeline

Parts = tuple[
    MaskedDiffusionTransformer,
    SharedVocabulary,
    dict[str, ModalityTokenizer],
    dict[str, MaskSampler],
    SeenDocuments | None,
]

_FILES = {
    *("model_index.json", "transformer", "vocabulary.json", "tokenizers", "samplers.json", "README.md"),
    *("documents.json", "training.json"),
}
_FOLDERS = {"transformer", "tokenizers"}
PATTERNS = sorted(_FILES - _FOLDERS | {f"{name}/*" for name in _FOLDERS})  # what a download of a model takes
_INDEX = {
    "_class_name": "MultiDiffPipeline",
    "transformer": ["multidiff.models", "MaskedDiffusionTransformer"],
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save(pipeline: MultiDiffPipeline, folder: Path, max_shard_size: int | str) -> None:
    """Write `pipeline` beside `folder`, then put it in its place; whoever loads it finds the earlier or the new model.

    Raises:
        ValueError: a tokenizer is no installed plugin, a sampler is not a plain `MaskSampler`, `folder` contains
            something that is no model, or it cannot be written.
    """
    for tokenizer in pipeline.tokenizers.values():
        plugins.name_of(tokenizer)
    settings = {name: _settings(name, sampler) for name, sampler in pipeline.samplers.items()}
    with files.naming(folder):
        found = {path.name for path in folder.iterdir()} if os.path.lexists(folder) else set()
    if foreign := found - _FILES:
        raise ValueError(
            f"{folder} contains {min(foreign)}, which is not part of a multidiff model. Choose another folder."
        )
    if "model_index.json" in found:
        _check_index(folder)
    with files.whole_folder(folder) as beside, files.naming(folder):
        pipeline.transformer.save_pretrained(beside / "transformer", max_shard_size=max_shard_size)
        pipeline.vocabulary.save(beside)
        for name, tokenizer in pipeline.tokenizers.items():
            (beside / "tokenizers" / name).mkdir(parents=True)
            tokenizer.save(beside / "tokenizers" / name)
        files.write_json(beside / "samplers.json", settings)
        if pipeline.seen is not None:
            files.write_json(beside / "documents.json", pipeline.seen.to_dict())
        files.write_json(beside / "model_index.json", {**_INDEX, "_multidiff_version": __version__})
        write_card(pipeline, beside)


def _settings(name: str, sampler: MaskSampler) -> dict[str, Any]:
    if type(sampler) is not MaskSampler:
        kind = type(sampler.scheduler if isinstance(sampler, SchedulerSampler) else sampler).__name__
        raise ValueError(
            f"The sampler of {name!r} is of the class {kind}, which a saved model cannot hold: set "
            f"pipe.samplers[{name!r}] = MaskSampler() before saving."
        )
    return sampler.settings


def load_folder(folder: Path) -> Parts:
    """The parts of a model saved by `save`; one that is replaced meanwhile is read again.

    Raises:
        ValueError: a file is missing, damaged, foreign or does not fit the others; names it.
    """
    while True:
        try:
            # Held open, so that no folder that takes its place looks like the same one.
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ValueError(
                f"{folder} does not exist or cannot be read ({reason}): give the folder of a saved model, or a .ckpt "
                "file"
            ) from None
        try:
            parts = _load_folder(folder)
        except ValueError:
            if _is_at(opened, folder):
                raise
        else:
            if _is_at(opened, folder):
                return parts
        finally:
            os.close(opened)


def _is_at(opened: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), folder.stat())
    except FileNotFoundError:
        return False


def _load_folder(folder: Path) -> Parts:
    _check_index(folder)
    vocabulary = SharedVocabulary.load(folder)
    tokenizers = {name: _load_tokenizer(name, vocabulary, folder) for name in vocabulary.tokenizers}
    SharedVocabulary.of(tokenizers).check(vocabulary, str(folder / "vocabulary.json"))
    transformer = _load_transformer(folder / "transformer", vocabulary)
    path = folder / "samplers.json"
    samplers = load_samplers(files.read_json(path), vocabulary, str(path))
    facts = folder / "documents.json"
    seen = SeenDocuments.from_dict(files.read_json(facts), str(facts)) if os.path.lexists(facts) else None
    sequencer = Sequencer(tokenizers, vocabulary)
    for name, sampler in samplers.items():
        own, trained = sampler.config["canvas"] or {}, seen.canvas.get(name, {}) if seen else {}
        try:
            sequencer.blank(name, {**trained, **own})
        except Exception as error:  # a plugin's, for sizes that its file or one of these gives
            place = path if own else facts if trained else folder / "tokenizers" / name
            raise ValueError(f"{place}: {first_line(error)}") from error
    return transformer, vocabulary, tokenizers, samplers, seen


def _load_tokenizer(name: str, vocabulary: SharedVocabulary, folder: Path) -> ModalityTokenizer:
    plugin, place = vocabulary.tokenizers[name].plugin, folder / "tokenizers" / name
    if plugin is None:
        raise ValueError(f"{folder / 'vocabulary.json'}: tokenizer {name!r} names no plugin")
    try:
        tokenizer_class = plugins.load(plugin)
    except ValueError as error:
        raise ValueError(f"{folder / 'vocabulary.json'}: {error}") from None
    if not place.is_dir():
        raise ValueError(f"{place} is missing: the model folder is incomplete")
    return load_tokenizer(tokenizer_class, place)


def load_tokenizer(tokenizer_class: type[ModalityTokenizer], place: Path) -> ModalityTokenizer:
    """The tokenizer saved in `place`; whatever its class raises for damaged files becomes a `ValueError` naming it."""
    for root, folders, names in os.walk(place):
        for path in (Path(root, name) for name in (*folders, *names)):
            if not path.is_dir():
                files.check_file(path)  # a pipe would be waited for
    try:
        return tokenizer_class.load(place)
    except ImportError:
        raise
    except Exception as error:
        said = first_line(error)
        raise ValueError(
            said if str(place) in said else f"The tokenizer in {place} cannot be loaded: {said}"
        ) from error


def _check_index(folder: Path) -> None:
    index = files.read_json(folder / "model_index.json")
    for key, value in _INDEX.items():
        if index.get(key) != value:
            raise ValueError(
                f"{folder / 'model_index.json'}: {key} is {index.get(key)!r}, not {value!r}. This folder does not "
                "contain a multidiff model."
            )


def load_samplers(settings: Mapping[str, Any], vocabulary: SharedVocabulary, where: str) -> dict[str, MaskSampler]:
    """A sampler for each tokenizer; those that `settings` does not mention get the default one."""
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
            check_ids(samplers[name].config, size, None, ends=varies)
            scale = samplers[name].config["guidance_scale"]
            for condition in scale if isinstance(scale, Mapping) else ():
                vocabulary.layout(condition)
        except ValueError as error:
            raise ValueError(f"{where}, {name}: {error}") from None
    return samplers


def build_transformer(config: Mapping[str, Any], where: str) -> MaskedDiffusionTransformer:
    """An unfilled transformer; `ValueError` naming `where` for an unknown key or a bad value."""
    known = MaskedDiffusionTransformer._get_init_keys(MaskedDiffusionTransformer) - {"self"}
    if unknown := config.keys() - known:
        raise ValueError(f"{where}: unknown transformer setting {', '.join(sorted(map(repr, unknown)))}")
    for name, value in config.items():
        kind, fits = _KINDS[name]
        if not fits(value):
            raise ValueError(f"{where}: {name} {value!r} must be {kind}")
    try:
        return MaskedDiffusionTransformer(**config)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{where}: {first_line(error)}") from None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("vocabulary_rows", "hidden_size", "num_layers", "num_heads"), ("a whole number above 0", _whole)),
    **dict.fromkeys(
        ("num_key_value_heads", "intermediate_size"),
        ("a whole number above 0, or null", lambda value: value is None or _whole(value)),
    ),
    **dict.fromkeys(
        ("coordinate_features", "qk_norm", "attention_bias", "tie_embeddings"),
        ("true or false", lambda value: isinstance(value, bool)),
    ),
    "rope_theta": ("a number from 1 to 1e30", lambda value: _number(value, 1, 1e30)),
    "norm_epsilon": ("a number from 0 to 1", lambda value: _number(value, 0, 1)),
    "dropout": ("a number from 0 to 1", lambda value: _number(value, 0, 1)),
}


def restore_transformer(
    config: Mapping[str, Any], config_where: str, weights: Mapping[str, Any], where: str
) -> MaskedDiffusionTransformer:
    """The transformer of `config` with exactly these weights, not copies of them, for inference; what `config` asks for
    is compared with what there is before any of it is allocated.

    Raises:
        ValueError: names, shapes or number formats that do not fit; names the file.
    """
    layers = {name.split(".")[1] for name in weights if str(name).startswith("layers.")}
    if _whole(number := config.get("num_layers", 1)) and number > len(layers):
        raise ValueError(f"{config_where}: num_layers is {number}, but the weights have {len(layers)} layers")
    # Even on the meta device some tables are made, as long as `hidden_size` says.
    embedding, size = weights.get("embed.weight"), config.get("hidden_size")
    if not isinstance(embedding, Tensor) or embedding.ndim != 2:
        raise ValueError(f"{where} lacks the matrix embed.weight; the file is incomplete or damaged")
    if _whole(size) and size != embedding.shape[1]:
        raise ValueError(f"{config_where}: hidden_size is {size}, but the weights have {embedding.shape[1]}")
    with torch.device("meta"):
        transformer = build_transformer(config, config_where)
    expected = transformer.state_dict()
    if missing := expected.keys() - weights.keys():
        raise ValueError(f"{where} lacks {len(missing)} tensors, first {min(missing)}; the file is incomplete")
    if unknown := weights.keys() - expected.keys():
        first = min(map(str, unknown))
        raise ValueError(f"{where} holds {len(unknown)} unknown tensors, first {first}; it is of another model")
    for name, tensor in expected.items():
        if not isinstance(weights[name], Tensor) or weights[name].layout != torch.strided:
            raise ValueError(f"{where}: {name} is no plain tensor; the file is damaged")
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"{where}: {name} has shape {list(weights[name].shape)}, "
                f"but its configuration says {list(tensor.shape)}"
            )
    formats = {weight.dtype for weight in weights.values()}
    if len(formats) != 1 or not formats <= set(FLOATS):
        said = ", ".join(sorted(map(str, formats)))
        raise ValueError(f"{where}: All tensors must share one floating-point format. Found {said}.")
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval()


def _load_transformer(folder: Path, vocabulary: SharedVocabulary) -> MaskedDiffusionTransformer:
    path = folder / "config.json"
    config = files.read_json(path)
    if config.get("_class_name") != MaskedDiffusionTransformer.__name__:
        raise ValueError(f"{path}: class {config.get('_class_name')!r} is not {MaskedDiffusionTransformer.__name__}")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    if missing := MaskedDiffusionTransformer._get_init_keys(MaskedDiffusionTransformer) - {"self"} - settings.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; the file is incomplete")
    if settings["vocabulary_rows"] != vocabulary.rows:
        raise ValueError(f"{path}: vocabulary_rows {settings['vocabulary_rows']!r} is not {vocabulary.rows}")
    found = _weight_files(folder)
    weights: dict[str, Tensor] = {}
    for file in found:
        tensors = files.read_tensors(file)
        if twice := weights.keys() & tensors.keys():
            raise ValueError(f"{file} holds tensor {min(twice)}, which another file beside it holds as well")
        weights |= tensors
    return restore_transformer(settings, str(path), weights, str(found[0] if len(found) == 1 else folder))


def _weight_files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1 or (len(found) > 1 and not indexes):
        one, other = (path.name for path in (indexes or found)[:2])
        raise ValueError(f"{folder} contains weights of more than one model. Remove {one} or {other}.")
    if indexes:
        names = files.read_json(indexes[0]).get("weight_map")
        if not isinstance(names, dict) or not all(_is_name(name) for name in names.values()):
            raise ValueError(f"{indexes[0]} is damaged: it names no files of its own folder")
        found = [folder / name for name in sorted(set(names.values()))]
    if not found:
        raise ValueError(f"{folder} holds no .safetensors file: the model folder is incomplete")
    return found


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def write_card(pipeline: MultiDiffPipeline, folder: Path) -> None:
    """Write the model's card, `README.md`."""
    files.write_bytes(folder / "README.md", _card(pipeline).encode())


def _card(pipeline: MultiDiffPipeline) -> str:
    rows = "\n".join(
        f"| `{name}` | {layout.modality} | `{layout.plugin}` | {' + '.join(map(str, layout.codebook_sizes))} |"
        for name, layout in pipeline.vocabulary.tokenizers.items()
    )
    code, imports = _example(pipeline)
    parameters = sum(weight.numel() for weight in pipeline.transformer.parameters())
    return f"""---
library_name: multidiff
tags: [masked-diffusion, multimodal]
---

# A multidiff model

A masked diffusion transformer of {parameters:,} parameters over these tokenizers:

| name | modality | plugin | codes |
|---|---|---|---|
{rows}

```python
from multidiff import {imports}

pipe = MultiDiffPipeline.from_pretrained("path/to/this/folder")
{code}
```

`samplers.json` holds the sampling settings that its previews used. Loading runs no code from this folder.
"""


def _example(pipeline: MultiDiffPipeline) -> tuple[str, str]:
    """Code that generates with up to two of the model's tokenizers, from a text where it has one, and its imports."""
    layouts = pipeline.vocabulary.tokenizers
    names = sorted(layouts, key=lambda name: layouts[name].modality != "text")[:2]
    parts = [f'Blank("{name}")' for name in names]
    imports = "Blank, MultiDiffPipeline"
    if len(names) == 2 and layouts[names[0]].modality == "text":
        parts[0], imports = f'Given("{names[0]}", "seven")', "Blank, Given, MultiDiffPipeline"
    places = pipeline.seen.order_of(names) if pipeline.seen else None
    ordered = [parts[place] for place in places] if places else parts
    code = f"document = pipe([[{', '.join(ordered)}]]).documents[0]\nprint([part.item for part in document])"
    return code, imports


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__
