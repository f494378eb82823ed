"""Sound as codes: transformers' neural audio codecs as multidiff tokenizers."""

from multidiff_codec.tokenizer import CodecTokenizer

__all__ = ["CodecTokenizer"]
