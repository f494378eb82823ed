"""Checkpoints, damaged: they load and generate, or a `ValueError` names the file."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

from multidiff.checkpoints.lightning import check_checkpoint
from multidiff.training.module import MaskedDiffusionModule
from tests.fuzz.damage import damage_bytes, damage_place, damage_value
from tests.fuzz.models import check_sentence, load_and_generate


@dataclass
class State:
    folder: Path
    content: dict


def prepare(folder: Path, random: Random) -> State:
    """What Lightning saves of a small model, less what is Lightning's own."""
    tokenizers = {"text": {"plugin": "bpe"}, "note": {"plugin": "bpe", "preset": "bytes"}}
    samplers = {"text": {"canvas": {"tokens": 4}, "forced_tokens": {0: 7}}, "note": {"canvas": {"tokens": 3}}}
    transformer = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}
    module = MaskedDiffusionModule(tokenizers, transformer, samplers=samplers, seed=random.randrange(2**31))
    module.configure_model()
    content = {"epoch": 1, "global_step": 7, "state_dict": module.state_dict(), "optimizer_states": [{"a": [1]}]}
    module.on_save_checkpoint(content)
    return State(folder, content)


def attempt(state: State, number: int, random: Random) -> str:
    """Damage a checkpoint, load it and generate."""
    path = state.folder / f"{number}.ckpt"
    torch.save(state.content, path)
    kind = random.choice([damage_bytes, damage_bytes, damage_place, _damage_content, _damage_content, _damage_archive])
    what = kind(path, random)
    try:
        try:
            check_checkpoint(path)
        except ValueError as error:
            check_sentence(error, path)
        return load_and_generate(path, path)
    except BaseException as error:
        error.add_note(what)
        raise
    finally:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def _damage_content(path: Path, random: Random) -> str:
    content = torch.load(path, weights_only=True)
    name = random.choice(sorted(content["state_dict"]))
    tensor = content["state_dict"][name]
    kind = random.choice(["value", "value", "weights", "nan", "sparse", "strided", "old", "list"])
    what = kind
    if kind == "value":
        part = content if random.random() < 0.2 else content["multidiff"]
        what = damage_value(part, random)
    elif kind == "weights":
        what = damage_value(content["state_dict"], random)
    elif kind == "nan":
        tensor.view(-1)[0] = random.choice([torch.nan, torch.inf, 3e38])
    elif kind == "sparse":
        content["state_dict"][name] = tensor.to_sparse()
    elif kind == "strided":
        content["state_dict"][name] = torch.zeros(()).expand(10**6, 10**6)
    torch.save([content] if kind == "list" else content, path, _use_new_zipfile_serialization=kind != "old")
    return f"{name} {what}"


def _damage_archive(path: Path, random: Random) -> str:
    """Without one of its records, or with one of another's content."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name, other = random.choices(sorted(records), k=2)
    removed = random.random() < 0.5
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in records.items():
            if each != name or not removed:
                archive.writestr(each, records[other] if each == name else content)
    return f"without {name}" if removed else f"{other} in place of {name}"
