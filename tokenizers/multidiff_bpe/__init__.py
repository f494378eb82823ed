"""A text tokenizer: byte-level BPE, characters, bytes, or any `tokenizer.json` of Hugging Face's libraries."""

from multidiff_bpe.bpe import BPETokenizer

__all__ = ["BPETokenizer"]
