"""Pipelines around a small random transformer."""

import torch

from multidiff import MaskedDiffusionTransformer, MultiDiffPipeline, SharedVocabulary
from multidiff.generation.requests import make_segments
from tests.helpers.toys import generator


def make(tokenizers, samplers=None, dtype=torch.float64, processes=None, **options):
    vocabulary = SharedVocabulary.of(tokenizers)
    model = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=32, num_layers=2, num_heads=2, **options)
    model.initialize(generator())
    for weight in model.parameters():
        weight.data.mul_(3)
    if model.time is not None:
        torch.nn.init.normal_(model.time.weight, generator=generator(1))
    pipeline = MultiDiffPipeline(model.eval().to(dtype=dtype), vocabulary, tokenizers, samplers, processes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def items(documents):
    return [[part.item for part in document] for document in documents]


def batch_of(pipe, documents):
    """The tokens of requests, as the pipeline lays them out."""
    return pipe.sequencer.batch(make_segments(documents, pipe.sequencer, pipe.tokenizers, lambda name: {}))
