"""Sound files, damaged: each is read and resampled, or an `ItemError` names it. None that was cut off is read short."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import soundfile

from multidiff.tokenizer import ItemError
from multidiff_sound.sound import read_sound, to_mono
from tests.fuzz.damage import damage_content

_KINDS = {
    "u8.wav": ("WAV", "PCM_U8"),
    "16.wav": ("WAV", "PCM_16"),
    "24.wav": ("WAVEX", "PCM_24"),
    "32.wav": ("WAV", "PCM_32"),
    "float.wav": ("WAV", "FLOAT"),
    "double.wav": ("RF64", "DOUBLE"),
    "w64": ("W64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "24.flac": ("FLAC", "PCM_24"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
_RATES = (8_000, 16_000, 48_000)


@dataclass
class State:
    folder: Path
    contents: dict[str, bytes]  # of a file, by its name


def prepare(folder: Path, random: Random) -> State:
    """A third of a second of each kind of sound, mono and stereo."""
    generator = np.random.default_rng(random.randrange(2**32))
    contents = {}
    for name, (container, subtype) in _KINDS.items():
        for channels in (1, 2):
            rate = random.choice(_RATES)
            samples_TC = generator.normal(0, 0.2, (rate // 3, channels)).clip(-1, 1)
            path = folder / f"{channels}.{name}"
            soundfile.write(path, samples_TC, rate, format=container, subtype=subtype)
            contents[path.name] = path.read_bytes()
    return State(folder, contents)


def attempt(state: State, number: int, random: Random) -> str:
    """Damage one of the files, read and resample it."""
    names = sorted(state.contents)
    name = names[number % len(names)]
    whole = state.contents[name]
    damaged = damage_content(whole, state.contents[random.choice(names)], random)
    path = state.folder / f"{number}.{name}"
    path.write_bytes(damaged)
    try:
        sound = read_sound(path)
    except ItemError as error:
        if str(path) not in str(error) or "\n" in str(error):
            raise AssertionError(f"no sentence that names the file: {error}") from error
        return "refused"
    finally:
        path.unlink()
    if whole.startswith(damaged):
        assert sound.waveform.shape == read_sound(state.folder / name).waveform.shape, "read short"
    waveform_T = to_mono(sound, 16_000)
    assert len(waveform_T) == -(-sound.waveform.shape[1] * 16_000 // sound.sample_rate)
    assert waveform_T.isfinite().all()
    return "read"
