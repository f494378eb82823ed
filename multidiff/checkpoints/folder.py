"""A model as one folder.

    model_index.json   transformer/   vocabulary.json   tokenizers/<name>/   samplers.json   processes.json
    documents.json   README.md

All files are safetensors and JSON, and each is checked before it is used. A class name in a file is compared with the
expected one; nothing is imported because a file names it.
"""

from __future__ import annotations

import os
from pathlib import Path

from multidiff import __version__, files, plugins
from multidiff.checkpoints.card import CARD, CARD_HASH, card_hash, edited_card, generate_card
from multidiff.checkpoints.parts import ModelParts, load_processes, load_samplers, load_tokenizer, sampler_settings
from multidiff.checkpoints.transformer import load_transformer
from multidiff.processes import to_settings
from multidiff.sequence.seen import SeenDocuments
from multidiff.sequence.sequencer import Sequencer
from multidiff.sequence.vocabulary import SharedVocabulary
from multidiff.tokenizer import ModalityTokenizer

_FILES = {
    *("model_index.json", "transformer", "vocabulary.json", "tokenizers", "samplers.json", "processes.json", CARD),
    *("documents.json", "training.json"),
}
_FOLDERS = {"transformer", "tokenizers"}
PATTERNS = sorted(_FILES - _FOLDERS | {f"{name}/*" for name in _FOLDERS})  # of the files that a download needs
_INDEX = {
    "_class_name": "MultiDiffPipeline",
    "transformer": ["multidiff.models", "MaskedDiffusionTransformer"],
}


def save(parts: ModelParts, folder: Path, max_shard_size: int | str = "10GB", card_folder: Path | None = None) -> None:
    """Write a model into a new folder beside `folder`, then exchange the two.

    A reader finds the earlier model or the new one, never a mixture. A card that somebody edited in `folder` is kept.

    Args:
        parts: the model.
        folder: where the model goes; an earlier model there is replaced.
        max_shard_size: the largest size of one safetensors file of the transformer.
        card_folder: a folder whose edited card is copied if `folder` has none.

    Raises:
        ValueError: a tokenizer is not an installed plugin, a sampler or process cannot be saved, `folder` contains
            files that do not belong to a model, or the model cannot be written.
    """
    for tokenizer in parts.tokenizers.values():
        plugins.name_of(tokenizer)
    settings = {name: sampler_settings(name, sampler) for name, sampler in parts.samplers.items()}
    processes = {name: to_settings(process) for name, process in parts.processes.items()}
    with files.naming(folder):
        found = {path.name for path in folder.iterdir()} if os.path.lexists(folder) else set()
    if foreign := found - _FILES:
        raise ValueError(
            f"{folder} contains {min(foreign)}, which is not part of a multidiff model. Choose another folder."
        )
    if "model_index.json" in found:
        _check_index(folder)
    generated = generate_card(parts)
    card = edited_card(folder) or (card_folder and edited_card(card_folder)) or generated
    with files.whole_folder(folder) as beside, files.naming(folder):
        parts.transformer.save_pretrained(beside / "transformer", max_shard_size=max_shard_size)
        parts.vocabulary.save(beside)
        for name, tokenizer in parts.tokenizers.items():
            (beside / "tokenizers" / name).mkdir(parents=True)
            tokenizer.save(beside / "tokenizers" / name)
        files.write_json(beside / "samplers.json", settings)
        if processes:
            files.write_json(beside / "processes.json", processes)
        if parts.seen is not None:
            files.write_json(beside / "documents.json", parts.seen.to_dict())
        index = {**_INDEX, "_multidiff_version": __version__, CARD_HASH: card_hash(generated)}
        files.write_json(beside / "model_index.json", index)
        files.write_bytes(beside / CARD, card)


def load_folder(folder: Path) -> ModelParts:
    """The model that `save` wrote into `folder`. If the folder is replaced during the read, it is read again.

    Raises:
        ValueError: a file is missing, damaged, foreign, or does not fit the others; the message names it.
    """
    while True:
        try:
            # An open descriptor keeps the folder's inode number from being reused by the one that replaces it.
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ValueError(
                f"{folder} does not exist or cannot be read ({reason}). Give the folder of a saved model, or a .ckpt "
                "file."
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


def _load_folder(folder: Path) -> ModelParts:
    _check_index(folder)
    vocabulary = SharedVocabulary.load(folder)
    tokenizers = {name: _load_tokenizer(name, vocabulary, folder) for name in vocabulary.tokenizers}
    SharedVocabulary.of(tokenizers).check(vocabulary, str(folder / "vocabulary.json"))
    transformer = load_transformer(folder / "transformer", vocabulary)
    path = folder / "processes.json"
    processes = load_processes(files.read_json(path), vocabulary, str(path)) if os.path.lexists(path) else {}
    path = folder / "samplers.json"
    samplers = load_samplers(files.read_json(path), vocabulary, processes, transformer.pattern, str(path))
    facts = folder / "documents.json"
    seen = SeenDocuments.from_dict(files.read_json(facts), str(facts)) if os.path.lexists(facts) else None
    sequencer = Sequencer(tokenizers, vocabulary)
    for name, sampler in samplers.items():
        own, trained = sampler.canvas or {}, seen.canvas.get(name, {}) if seen else {}
        try:
            sequencer.blank(name, {**trained, **own})
        except Exception as error:  # a plugin may raise anything for a size from one of these files
            place = path if own else facts if trained else folder / "tokenizers" / name
            raise ValueError(f"{place}: {files.first_line(error)}") from error
    return ModelParts(transformer, vocabulary, tokenizers, samplers, processes, seen)


def _load_tokenizer(name: str, vocabulary: SharedVocabulary, folder: Path) -> ModalityTokenizer:
    plugin, place = vocabulary.tokenizers[name].plugin, folder / "tokenizers" / name
    if plugin is None:
        raise ValueError(f"{folder / 'vocabulary.json'}: tokenizer {name!r} has no plugin")
    try:
        tokenizer_class = plugins.load(plugin)
    except ValueError as error:
        raise ValueError(f"{folder / 'vocabulary.json'}: {error}") from None
    if not place.is_dir():
        raise ValueError(f"{place} is missing. The model folder is incomplete.")
    return load_tokenizer(tokenizer_class, place)


def _check_index(folder: Path) -> None:
    index = files.read_json(folder / "model_index.json")
    for key, value in _INDEX.items():
        if index.get(key) != value:
            raise ValueError(
                f"{folder / 'model_index.json'}: {key} is {index.get(key)!r}, not {value!r}. This folder does not "
                "contain a multidiff model."
            )
