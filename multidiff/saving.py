"""A model as one folder, and out of it or a Lightning checkpoint again.

    model_index.json   transformer/   vocabulary.json   tokenizers/<name>/   samplers.json   README.md

Everything is safetensors and JSON, checked before it is used: diffusers fills missing tensors with random numbers and
only warns. Class names in files are compared with what is expected; nothing is imported on their word.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from multidiff import plugins
from multidiff.samplers import MaskSampler
from multidiff.tokenizer import ModalityTokenizer
from multidiff.transformer import MaskedDiffusionTransformer
from multidiff.vocabulary import SharedVocabulary

if TYPE_CHECKING:
    from multidiff.pipeline import MultiDiffPipeline

Parts = tuple[MaskedDiffusionTransformer, SharedVocabulary, dict[str, ModalityTokenizer], dict[str, MaskSampler]]

_FILES = {
    *("model_index.json", "transformer", "vocabulary.json", "tokenizers", "samplers.json", "README.md"),
    "training.json",
}
_INDEX = {
    "_class_name": "MultiDiffPipeline",
    "transformer": ["multidiff.transformer", "MaskedDiffusionTransformer"],
}


def save(pipeline: MultiDiffPipeline, folder: Path, max_shard_size: int | str) -> None:
    """Write `pipeline` beside `folder`, then put it in its place.

    Raises:
        ValueError: a tokenizer is no installed plugin, or `folder` holds something that is no model.
    """
    for tokenizer in pipeline.tokenizers.values():
        plugins.name_of(tokenizer)
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if foreign := found - _FILES:
        raise ValueError(f"{folder} holds {min(foreign)}, which is no part of a multidiff model; choose another folder")
    if "model_index.json" in found:
        _check_index(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        beside.chmod(0o755)
        pipeline.transformer.save_pretrained(beside / "transformer", max_shard_size=max_shard_size)
        pipeline.vocabulary.save(beside)
        for name, tokenizer in pipeline.tokenizers.items():
            (beside / "tokenizers" / name).mkdir(parents=True)
            tokenizer.save(beside / "tokenizers" / name)
        settings = {name: sampler.settings for name, sampler in pipeline.samplers.items()}
        _write_json(beside / "samplers.json", settings)
        _write_json(beside / "model_index.json", {**_INDEX, "_multidiff_version": version("multidiff")})
        write_card(pipeline, beside)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            folder.rename(old / "model")
            try:
                beside.rename(folder)
            except BaseException:
                (old / "model").rename(folder)
                raise
            finally:
                shutil.rmtree(old)
        else:
            beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def load_folder(folder: Path) -> Parts:
    """The parts of a model saved by `save`; `ValueError` naming the first file that is missing or wrong."""
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: give the folder of a saved model, or a .ckpt file")
    _check_index(folder)
    vocabulary = SharedVocabulary.load(folder)
    tokenizers = {}
    for name, layout in vocabulary.tokenizers.items():
        if layout.plugin is None:
            raise ValueError(f"{folder / 'vocabulary.json'}: tokenizer {name!r} names no plugin")
        place = folder / "tokenizers" / name
        if not place.is_dir():
            raise ValueError(f"{place} is missing: the model folder is incomplete")
        tokenizers[name] = plugins.load(layout.plugin).load(place)
    SharedVocabulary.of(tokenizers).check(vocabulary, str(folder / "vocabulary.json"))
    transformer = _load_transformer(folder / "transformer")
    settings = read_json(folder / "samplers.json")
    return transformer, vocabulary, tokenizers, load_samplers(settings, vocabulary, str(folder / "samplers.json"))


def _check_index(folder: Path) -> None:
    index = read_json(folder / "model_index.json")
    for key, value in _INDEX.items():
        if index.get(key) != value:
            raise ValueError(
                f"{folder / 'model_index.json'}: {key} is {index.get(key)!r}, not {value!r}; no multidiff model"
            )


def load_checkpoint(path: Path) -> Parts:
    """The parts of a model from a Lightning checkpoint: averaged weights where training averaged them.

    Raises:
        ValueError: no checkpoint of `multidiff.training.MaskedDiffusionModule`, or a damaged one.
    """
    try:
        # Memory-mapped: optimizer states are not read.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        saved = checkpoint["multidiff"]
        recipe = saved["vocabulary"], saved["tokenizers"], saved["transformer"], saved["samplers"]
        weights = dict(checkpoint["state_dict"])
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no checkpoint of a multidiff model, or it is damaged ({reason})") from None
    layout, specs, config, settings = recipe
    vocabulary = SharedVocabulary.from_dict(layout, str(path))
    tokenizers = unpack(specs, vocabulary, str(path))
    SharedVocabulary.of(tokenizers).check(vocabulary, str(path))
    transformer = build_transformer({**config, "vocabulary_rows": vocabulary.rows}, str(path))
    prefix = "transformer."
    fill(transformer, {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, str(path))
    return transformer, vocabulary, tokenizers, load_samplers(settings, vocabulary, str(path))


def pack(tokenizers: Mapping[str, ModalityTokenizer]) -> dict[str, dict[str, Tensor]]:
    """The saved files of tokenizers, for a checkpoint that needs no other file: uint8 tensors by tokenizer and path."""
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tokenizer in tokenizers.items():
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder))
            packed[name] = {
                str(file.relative_to(folder)): torch.from_numpy(np.fromfile(file, dtype=np.uint8))
                for file in sorted(Path(folder).rglob("*"))
                if file.is_file()
            }
    return packed


def unpack(
    packed: Mapping[str, Mapping[str, Tensor]], vocabulary: SharedVocabulary, where: str
) -> dict[str, ModalityTokenizer]:
    """The tokenizers that `pack` took; `ValueError` naming `where` if they are damaged."""
    tokenizers = {}
    for name, layout in vocabulary.tokenizers.items():
        if layout.plugin is None or name not in packed:
            raise ValueError(f"{where} does not hold tokenizer {name!r}")
        with tempfile.TemporaryDirectory() as folder:
            for relative, content in packed[name].items():
                file = Path(folder, relative)
                if not file.resolve().is_relative_to(Path(folder).resolve()):
                    raise ValueError(f"{where}: tokenizer {name!r} has a file outside of its folder, {relative!r}")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content.numpy().tobytes())
            try:
                tokenizers[name] = plugins.load(layout.plugin).load(Path(folder))
            except ValueError as error:
                raise ValueError(f"{where}: tokenizer {name!r} is damaged ({error})") from None
    return tokenizers


def load_samplers(settings: Mapping[str, Any], vocabulary: SharedVocabulary, where: str) -> dict[str, MaskSampler]:
    """A sampler for each tokenizer; those that `settings` does not mention get the default one."""
    samplers = {name: MaskSampler() for name in vocabulary.tokenizers}
    for name, values in settings.items():
        vocabulary.layout(name)
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: the settings of {name!r} must be a mapping, got {values!r}")
        samplers[name] = MaskSampler.from_settings(dict(values), f"{where}, {name}")
    return samplers


def build_transformer(config: Mapping[str, Any], where: str) -> MaskedDiffusionTransformer:
    """An unfilled transformer; `ValueError` naming `where` for an unknown key or a bad value."""
    known = MaskedDiffusionTransformer._get_init_keys(MaskedDiffusionTransformer) - {"self"}
    if unknown := set(config) - known:
        raise ValueError(f"{where}: unknown transformer setting {', '.join(map(repr, sorted(unknown)))}")
    try:
        return MaskedDiffusionTransformer(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def fill(transformer: MaskedDiffusionTransformer, weights: Mapping[str, Tensor], where: str) -> None:
    """Load `weights` if their names and shapes are exactly those of the transformer; `ValueError` otherwise."""
    expected = transformer.state_dict()
    if missing := expected.keys() - weights.keys():
        raise ValueError(f"{where} lacks {len(missing)} tensors, first {min(missing)}; the file is incomplete")
    if unknown := weights.keys() - expected.keys():
        raise ValueError(f"{where} holds {len(unknown)} unknown tensors, first {min(unknown)}; it is of another model")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"{where}: {name} has shape {list(weights[name].shape)}, "
                f"but its configuration says {list(tensor.shape)}"
            )
    if len({weight.dtype for weight in weights.values()}) != 1 or not next(iter(weights.values())).is_floating_point():
        raise ValueError(f"{where} mixes number formats; it was not written by multidiff")
    nn.Module.to(transformer, next(iter(weights.values())).dtype)  # diffusers' own `to` does not take one alone
    transformer.load_state_dict(dict(weights))
    transformer.eval()


def _load_transformer(folder: Path) -> MaskedDiffusionTransformer:
    path = folder / "config.json"
    config = read_json(path)
    if config.get("_class_name") != MaskedDiffusionTransformer.__name__:
        raise ValueError(f"{path}: class {config.get('_class_name')!r} is not {MaskedDiffusionTransformer.__name__}")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    if missing := MaskedDiffusionTransformer._get_init_keys(MaskedDiffusionTransformer) - {"self"} - settings.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; the file is incomplete")
    transformer = build_transformer(settings, str(path))
    files = sorted(folder.glob("*.safetensors"))
    if indexes := sorted(folder.glob("*.safetensors.index.json")):
        names = read_json(indexes[0]).get("weight_map")
        if not isinstance(names, dict) or not all(Path(str(name)).name == name for name in names.values()):
            raise ValueError(f"{indexes[0]} is damaged: it names no files of its own folder")
        files = [folder / name for name in sorted(set(names.values()))]
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file: the model folder is incomplete")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is missing, truncated or no safetensors file ({error})") from None
    fill(transformer, weights, str(folder))
    return transformer


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `ValueError` naming the file when it is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the model folder is incomplete") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return data


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_card(pipeline: MultiDiffPipeline, folder: Path) -> None:
    """Write the model's card, `README.md`."""
    (folder / "README.md").write_text(_card(pipeline), encoding="utf-8")


def _card(pipeline: MultiDiffPipeline) -> str:
    rows = "\n".join(
        f"| `{name}` | {layout.modality} | `{layout.plugin}` | {' + '.join(map(str, layout.codebook_sizes))} |"
        for name, layout in pipeline.vocabulary.tokenizers.items()
    )
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
from multidiff import Blank, Given, MultiDiffPipeline

pipe = MultiDiffPipeline.from_pretrained("path/to/this/folder")
names = {list(pipeline.vocabulary.tokenizers)}
```

`samplers.json` holds the sampling settings that its previews used. Loading runs no code from this folder.
"""
