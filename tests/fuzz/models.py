"""Model folders, damaged: they load and generate, or a `ValueError` names one of their files.

The one thing that no file shows is that weights, finite each by itself, overflow together; generating says so.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

from multidiff import Blank, Given, MaskedDiffusionTransformer, MaskSampler, MultiDiffPipeline, SharedVocabulary
from multidiff.tokenizer import Audio
from multidiff_bpe import BPETokenizer
from multidiff_encodec import EncodecTokenizer
from multidiff_vq import VQTokenizer
from tests.fuzz.damage import damage_folder, damage_json

OVERFLOW = "the transformer's logits hold NaN or Inf"


@dataclass
class State:
    folder: Path
    model: Path


def prepare(folder: Path, random: Random) -> State:
    """A small model of three modalities."""
    tokenizers = {"text": BPETokenizer(), "image": VQTokenizer(), "speech": EncodecTokenizer()}
    vocabulary = SharedVocabulary.of(tokenizers)
    transformer = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=32, num_layers=2, num_heads=2)
    transformer.initialize(torch.Generator().manual_seed(random.randrange(2**31)))
    samplers = {
        "text": MaskSampler(canvas={"tokens": 4}, forced_tokens={0: 7}, suppress_tokens=[3]),
        "speech": MaskSampler(canvas={"frames": 2}, guidance_scale={"text": 2.0}, unmasking="threshold", threshold=0.9),
    }
    model = folder / "model"
    MultiDiffPipeline(transformer.eval(), vocabulary, tokenizers, samplers).save_pretrained(model)
    return State(folder, model)


def attempt(state: State, number: int, random: Random) -> str:
    """Damage a copy, load it and generate."""
    folder = state.folder / str(number)
    shutil.copytree(state.model, folder)
    what = damage_folder(folder, random, {".json": damage_json, ".safetensors": _damage_tensors})
    try:
        return load_and_generate(folder, folder)
    except BaseException as error:
        error.add_note(what)
        raise
    finally:
        shutil.rmtree(folder)


def load_and_generate(path: Path, named: Path) -> str:
    """What became of it: "refused" where an error names a file of `named`, "works" where a document comes out."""
    try:
        pipe = MultiDiffPipeline.from_pretrained(path)
    except ValueError as error:
        check_sentence(error, named)
        return "refused"
    pipe.set_progress_bar_config(disable=True)
    blanks = [Blank(name) for name in pipe.tokenizers]
    try:
        output = pipe([[Given("text", "seven"), *blanks]], generator=torch.Generator().manual_seed(0))
    except ValueError as error:
        if not str(error).startswith(f"{path}: {OVERFLOW}"):
            raise AssertionError(f"loaded, but: {error}") from error
        return "refused in generating"
    for part in output.documents[0][1:]:
        assert bool(part.probs_N.isfinite().all())
        assert not isinstance(part.item, Audio) or bool(part.item.waveform.isfinite().all())
    return "works"


def check_sentence(error: ValueError, named: Path) -> None:
    """Raise unless the error is a line that names the file or folder `named`, or something in it."""
    if str(named) not in str(error) or "\n" in str(error):
        raise AssertionError(f"no sentence that names the file: {error}") from error


def _damage_tensors(path: Path, random: Random) -> str:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = random.choice(sorted(tensors))
    kind = random.choice(["nan", "inf", "huge", "gone", "renamed", "more", "half", "whole", "flat", "shorter"])
    tensor = tensors[name]
    if kind in ("nan", "inf", "huge"):
        tensor.view(-1)[random.randrange(tensor.numel())] = {"nan": torch.nan, "inf": torch.inf, "huge": 3e38}[kind]
    elif kind in ("gone", "renamed"):
        del tensors[name]
        tensors |= {f"{name}_": tensor} if kind == "renamed" else {}
    elif kind == "more":
        tensors["more"] = torch.ones(3)
    else:
        forms = {"half": tensor.half(), "whole": tensor.long(), "flat": tensor.flatten()[None], "shorter": tensor[:-1]}
        tensors[name] = forms[kind].contiguous()
    save_file(tensors, path)
    return f"{name} {kind}"
