"""What the sound tokenizers share: sounds in files, a codec's folder, sound as frames of codes. No plugin in itself."""

from multidiff_sound.tokenizer import SoundTokenizer

__all__ = ["SoundTokenizer"]
