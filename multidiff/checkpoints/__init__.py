"""Saved models: the model folder and its card, models in Lightning checkpoints, and models on the Hugging Face hub.

Loading a model runs no code from it.
"""

from multidiff.checkpoints.folder import PATTERNS, load_folder, save
from multidiff.checkpoints.hub import fetch, is_repository, push
from multidiff.checkpoints.lightning import KEY, check_checkpoint, load_checkpoint, pack, unpack
from multidiff.checkpoints.parts import ModelParts, load_sampler, load_samplers, sampler_settings
from multidiff.checkpoints.sharded import is_sharded
from multidiff.checkpoints.transformer import FLOATS, build_transformer

__all__ = [
    "FLOATS",
    "KEY",
    "PATTERNS",
    "ModelParts",
    "build_transformer",
    "check_checkpoint",
    "fetch",
    "is_repository",
    "is_sharded",
    "load_checkpoint",
    "load_folder",
    "load_sampler",
    "load_samplers",
    "pack",
    "push",
    "sampler_settings",
    "save",
    "unpack",
]
