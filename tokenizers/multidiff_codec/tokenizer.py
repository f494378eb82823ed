"""CodecTokenizer: tokenizes sound with a checkpoint of EnCodec, DAC or Mimi.

Shape suffixes: K levels, t frames, B sounds, T samples.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from torch import Tensor

from multidiff.files import write_json
from multidiff_sound import SoundTokenizer
from multidiff_sound.folder import CONFIG, WEIGHTS, fingerprint_of, read_json, write_folder

if TYPE_CHECKING:
    from multidiff_codec.models import Codec

_SETTINGS = "codec.json"
# Entries of a configuration that do not change the model.
_NOTES = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}


class CodecTokenizer(SoundTokenizer):
    """Tokenizes sounds of any sample rate and number of channels. Decoded sounds are mono at the codec's rate.

    Args:
        weights: a folder with transformers' `EncodecModel`, `DacModel` or `MimiModel` (`config.json` and
            `model.safetensors`), mono and without rescaling. Nothing is downloaded.
        num_codebooks: the number of levels to use, from the first; None uses all. A codec is trained only for some
            numbers of levels; EnCodec at 24 kHz for 2, 4, 8, 16 and 32. Mimi's first level is semantic.
        max_seconds: the maximum length of a sound to encode. A codec processes a sound as a whole. For a minute at
            44.1 kHz, DAC needs several GB of memory.

    Raises:
        ValueError: the folder contains no such model, or a damaged or pickled one, or fewer levels; the message names
            the file.
    """

    model: Codec

    def __init__(self, weights: str, num_codebooks: int | None = None, max_seconds: float = 120.0):
        from multidiff_codec.folder import read_codec  # takes seconds, which listing the plugins should not

        folder = Path(weights)
        self.model, self._config, self._tensors = read_codec(folder)
        levels = self.model.most if num_codebooks is None else num_codebooks
        if type(levels) is not int or not self.model.fewest <= levels <= self.model.most:
            raise ValueError(
                f"num_codebooks must be from {self.model.fewest} to {self.model.most}, the number of levels in "
                f"{folder / WEIGHTS}; got {num_codebooks!r}"
            )
        self.max_seconds = self._checked_seconds(max_seconds)
        self.sample_rate, self.hop = self.model.model.config.sampling_rate, self.model.hop
        self.codebook_sizes = (self.model.model.config.codebook_size,) * levels

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the configuration, the number of levels, and names, shapes and values of the weights.

        It covers the files, not the model, because releases of transformers rename tensors and settings.
        """
        config = {name: value for name, value in self._config.items() if name not in _NOTES}
        return fingerprint_of({"config": config, "num_codebooks": len(self.codebook_sizes)}, self._tensors)

    def save(self, folder: Path) -> None:
        """Write the codec as it was read, which transformers can open, and `codec.json` with the other settings."""
        settings = {"num_codebooks": len(self.codebook_sizes), "max_seconds": self.max_seconds}
        write_folder(Path(folder), self._config, self._tensors)
        write_json(Path(folder) / _SETTINGS, settings)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The tokenizer that `save` wrote into `folder`."""
        path = Path(folder) / _SETTINGS
        if (Path(folder) / CONFIG).is_file() and not path.is_file():
            raise ValueError(
                f"{path} does not exist. To use a codec that multidiff did not save, give its folder as `weights`."
            )
        settings = read_json(path)
        if settings.keys() != {"num_codebooks", "max_seconds"}:
            raise ValueError(f"{path} must contain num_codebooks and max_seconds, not {sorted(settings)}")
        return cls(str(folder), **settings)

    def ids_of(self, waves_BT: Tensor) -> Tensor:
        return self.model.encode(waves_BT, len(self.codebook_sizes)).transpose(1, 2)

    def samples_of(self, ids_BtK: Tensor) -> Tensor:
        return self.model.decode(ids_BtK.transpose(1, 2))
