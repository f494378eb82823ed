"""Text as byte-level BPE, characters, bytes, or the pieces of any `tokenizer.json` of Hugging Face's."""

from multidiff_bpe.bpe import BPETokenizer

__all__ = ["BPETokenizer"]
