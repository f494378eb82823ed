"""The shared vocabulary, segments and documents, and their layout as token batches."""

from multidiff.sequence.batch import TokenBatch
from multidiff.sequence.blocks import AttentionPattern, TokenBlocks
from multidiff.sequence.seen import SeenDocuments
from multidiff.sequence.segments import Document, Example, Segment
from multidiff.sequence.sequencer import MAX_CODES, Sequencer
from multidiff.sequence.vocabulary import MASK, SharedVocabulary

__all__ = [
    "MASK",
    "MAX_CODES",
    "AttentionPattern",
    "Document",
    "Example",
    "SeenDocuments",
    "Segment",
    "Sequencer",
    "SharedVocabulary",
    "TokenBatch",
    "TokenBlocks",
]
