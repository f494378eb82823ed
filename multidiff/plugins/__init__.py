"""Tokenizer plugins: the registry of entry points, batching for neural tokenizers, and a template for new plugins."""

from multidiff.plugins.batching import map_batches
from multidiff.plugins.registry import GROUP, Report, build, is_ours, load, name_of, names, survey

__all__ = ["GROUP", "Report", "build", "is_ours", "load", "map_batches", "name_of", "names", "survey"]
