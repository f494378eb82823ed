"""Code that the audio tokenizers share: sound files, the folder of a codec, and sound as frames of codes. No plugin."""

from multidiff_sound.tokenizer import SoundTokenizer

__all__ = ["SoundTokenizer"]
