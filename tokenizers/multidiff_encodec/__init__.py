"""Sound as codes: the `encodec` package's model as a multidiff tokenizer."""

from multidiff_encodec.tokenizer import EncodecTokenizer

__all__ = ["EncodecTokenizer"]
