"""Text as byte-level BPE: no unknown token, every string comes back unchanged."""

from multidiff_bpe.bpe import BPETokenizer

__all__ = ["BPETokenizer"]
