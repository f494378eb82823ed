"""Sound in files and out of them, at any sample rate and channel count.

Shape suffixes: C channels, T samples.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor
from torchaudio.functional import melscale_fbanks
from torchaudio.transforms import Resample

from multidiff.tokenizer import Audio, ItemError

MOST_SECONDS = 3600  # of a file


def read_sound(path: Path) -> Audio:
    """A WAV (8 to 32 bits, float), FLAC, OGG or MP3 file at its own rate; floats beyond ±1 are clipped.

    Raises:
        ItemError: the file is missing, damaged, cut off, or longer than `MOST_SECONDS`; names it.
    """
    if not path.is_file():
        raise ItemError(f"{path} does not exist")
    try:
        with soundfile.SoundFile(path) as file:
            frames, sample_rate = file.frames, file.samplerate
            if frames > MOST_SECONDS * sample_rate:
                raise ItemError(
                    f"{path} lasts {frames / sample_rate:,.0f} s, and at most {MOST_SECONDS:,} s are read; cut it up"
                )
            samples_TC = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ItemError(f"{path} is no readable sound file ({error}); WAV, FLAC, OGG and MP3 are") from None
    if len(samples_TC) < frames or _is_cut(path):
        raise ItemError(f"{path} is cut off after {len(samples_TC):,} samples; copy it again or leave it out")
    return Audio(torch.from_numpy(np.ascontiguousarray(samples_TC.T)).clamp(-1, 1), sample_rate)


def _is_cut(path: Path) -> bool:
    """Whether a WAV file is shorter than it says; libsndfile takes what is there. Streams say 0 or the largest size."""
    with path.open("rb") as file:
        head = file.read(12)
    size = int.from_bytes(head[4:8], "little")
    is_wave = head[:4] == b"RIFF" and head[8:] == b"WAVE"
    return is_wave and size not in (0, 2**32 - 1) and path.stat().st_size < size


def write_sound(sound: Audio, path: Path) -> None:
    """16-bit WAV, written beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    samples_TC = sound.waveform.detach().cpu().clamp(-1, 1).T.numpy()
    soundfile.write(beside, samples_TC, sound.sample_rate, format="WAV", subtype="PCM_16")
    os.replace(beside, path)


def to_mono(sound: Audio, sample_rate: int) -> Tensor:
    """Samples at `sample_rate`, channels averaged, float32 [T].

    Raises:
        ItemError: no `Audio`, no samples, or a sample that is no finite number.
    """
    if not isinstance(sound, Audio) or sound.waveform.ndim != 2 or sound.sample_rate <= 0:
        raise ItemError(f"a sound is an Audio with waveform [channels, samples] and a rate in Hz, not {sound!r:.80}")
    if sound.waveform.numel() == 0:
        raise ItemError("a sound of no samples cannot be tokenized; leave it out")
    waveform_CT = sound.waveform.detach().cpu().float()
    if not waveform_CT.isfinite().all():
        raise ItemError("a sound holds samples that are not finite (NaN or infinite); leave it out or repair it")
    return _resampler(sound.sample_rate, sample_rate)(waveform_CT.mean(0))


def spectrogram(sound: Audio, height: int = 96) -> Image.Image:
    """Log-mel picture, 60 dB from black to white, low sounds below, 10 ms a column of two pixels."""
    waveform_T = to_mono(sound, sound.sample_rate) if sound.waveform.numel() else torch.zeros(1)
    hop = max(1, sound.sample_rate // 100)
    size = 4 * hop
    padded_T = torch.nn.functional.pad(waveform_T, (size // 2, size // 2))
    spectrum_FT = torch.stft(padded_T, size, hop, window=torch.hann_window(size), center=False, return_complex=True)
    bands = 48
    filters_FM = melscale_fbanks(size // 2 + 1, 40.0, sound.sample_rate / 2, bands, sound.sample_rate, norm="slaney")
    mel_MT = filters_FM.T @ spectrum_FT.abs().square()
    decibel_MT = 10 * torch.log10(mel_MT.clamp_min(1e-10))
    grey_MT = ((decibel_MT - decibel_MT.max()) / 60 + 1).clamp(0, 1).flip(0)
    picture = Image.fromarray((grey_MT * 255).to(torch.uint8).numpy())
    return picture.resize((2 * grey_MT.shape[1], height), Image.Resampling.BILINEAR)


@lru_cache(maxsize=32)
def _resampler(source: int, target: int) -> Resample:
    """Kept, because its filter takes longer to compute than a word to resample."""
    return Resample(source, target)
