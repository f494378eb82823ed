"""Documents of any length, and a step's loss on them, for benchmarks without a data folder."""

import torch
from torch import Tensor

from multidiff.models import MaskedDiffusionTransformer
from multidiff.objectives import NoisedBatch
from multidiff.sequence import Segment, SharedVocabulary
from multidiff.sequence.vocabulary import TokenizerLayout


def vocabulary_of(*names: str, size: int) -> SharedVocabulary:
    """The vocabulary of tokenizers with one codebook of `size` codes each."""
    return SharedVocabulary({name: TokenizerLayout(None, "line", (size,), False, name) for name in names})


def segment_of(name: str, length: int, vocabulary: SharedVocabulary) -> Segment:
    """A known segment of `length` codes in a line."""
    place_N = torch.arange(length)
    zero_N, known_N = torch.zeros_like(place_N), torch.ones(length, dtype=torch.bool)
    ids_N = place_N % vocabulary.tokenizers[name].codebook_sizes[0]
    return Segment(name, ids_N, zero_N, place_N[:, None].expand(-1, 3), known_N, length, {"length": length}, name)


def nats_of(model: MaskedDiffusionTransformer, vocabulary: SharedVocabulary, batch: NoisedBatch) -> Tensor:
    """The cross-entropy at each position of the loss, [M]."""
    positions = batch.logit_positions(vocabulary)
    arguments = (batch.ids_P, batch.positions_P3, batch.document_starts, positions, batch.coords_P3, batch.targets_M)
    return torch.cat(model(*arguments))
