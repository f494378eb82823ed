"""The shared vocabulary, segments and documents, and their layout as token batches."""

from multidiff.sequence.sequencer import Document, Segment, Sequencer, TokenBatch
from multidiff.sequence.vocabulary import SharedVocabulary

__all__ = ["Document", "Segment", "Sequencer", "SharedVocabulary", "TokenBatch"]
