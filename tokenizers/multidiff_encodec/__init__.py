"""An audio tokenizer for the EnCodec model of the `encodec` package."""

from multidiff_encodec.tokenizer import EncodecTokenizer

__all__ = ["EncodecTokenizer"]
