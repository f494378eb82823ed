"""An audio tokenizer for the neural codecs of transformers."""

from multidiff_codec.tokenizer import CodecTokenizer

__all__ = ["CodecTokenizer"]
