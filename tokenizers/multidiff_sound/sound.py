"""Reads and writes sound files, at any sample rate and number of channels.

Shape suffixes: C channels, T samples.
"""

from __future__ import annotations

import io
from pathlib import Path

import soundfile
import torch
from PIL import Image
from torch import Tensor
from torchaudio.functional import melscale_fbanks

from multidiff.files import check_file, write_bytes
from multidiff.tokenizer import Audio, ItemError
from multidiff_sound.containers import DamageError, Stream, streams_of
from multidiff_sound.resampling import resample

MOST_SECONDS = 3600  # per file
_MOST_SAMPLES = 2**30  # per file, all channels together: 4 GB, an hour of stereo at up to 149 kHz
_BLOCK = 2**20  # samples per channel that are decoded at once


def read_sound(path: Path) -> Audio:
    """Read a WAV (8 to 32 bits, float), FLAC, OGG or MP3 file at its own rate. Values beyond ±1 are clipped.

    A header need not state the length: streams of WAV, FLAC and MP3 are read to their end.

    Raises:
        ItemError: the file is missing, damaged, truncated, empty, longer than `MOST_SECONDS`, or has samples that are
            NaN or infinite; the message names it.
    """
    try:
        check_file(path)
    except ValueError as error:
        raise ItemError(str(error)) from None
    try:
        with path.open("rb") as file:
            sound = _decode(streams_of(file))
    except DamageError as error:
        raise ItemError(f"{path} {error}") from None
    except soundfile.LibsndfileError as error:
        reason = error.error_string.removeprefix("Error : ").rstrip(".")
        raise ItemError(f"{path} is truncated, damaged or of an unsupported format ({reason})") from None
    except OSError as error:
        raise ItemError(f"{path} cannot be read ({error.strerror})") from None
    if sound.waveform.numel() == 0:
        raise ItemError(f"{path} has no samples. Leave it out.")
    if not sound.waveform.isfinite().all():
        raise ItemError(f"{path} has samples that are NaN or infinite. Leave it out or repair it.")
    sound.waveform.clamp_(-1, 1)
    return sound


def _decode(streams: list[Stream]) -> Audio:
    """Decode the streams one after another. Nothing is decoded before the total length is known."""
    sample_rate = channels = 0
    lengths = []
    for stream in streams:
        with _opened(stream) as file:
            if not lengths:
                sample_rate, channels = file.samplerate, file.channels
            if (file.samplerate, file.channels) != (sample_rate, channels):
                raise DamageError("changes its sample rate or channels. Split it there.")
            if file.subtype.startswith("MPEG") and file.format != "MP3":
                raise DamageError(f"is a {file.format} file that contains MP3. Save it as an MP3 file.")
            lengths.append(file.frames)
    frames = sum(lengths)
    if frames > MOST_SECONDS * sample_rate:
        raise DamageError(f"lasts {frames / sample_rate:,.0f} s, but the limit is {MOST_SECONDS:,} s. Split it.")
    if frames * channels > _MOST_SAMPLES:
        raise DamageError(
            f"has {frames * channels:,} samples in all channels, but the limit is {_MOST_SAMPLES:,}. Split it."
        )
    waveform_CT, place = torch.empty(channels, frames), 0
    for stream, length in zip(streams, lengths, strict=True):
        end = place + length
        with _opened(stream) as file:
            while place < end:
                samples_TC = file.read(min(_BLOCK, end - place), dtype="float32", always_2d=True)
                if not len(samples_TC):
                    raise DamageError(f"is truncated after {place:,} samples. Copy it again or leave it out.")
                waveform_CT[:, place : place + len(samples_TC)] = torch.from_numpy(samples_TC.T)
                place += len(samples_TC)
    return Audio(waveform_CT, sample_rate)


def _opened(stream: Stream) -> soundfile.SoundFile:
    stream.seek(0)
    return soundfile.SoundFile(stream)  # pyright: ignore[reportArgumentType]


def write_sound(sound: Audio, path: Path) -> None:
    """Write a 16-bit WAV file, as a whole or not at all. Raises a `ValueError` that names it if that fails."""
    samples_TC, file = sound.waveform.detach().cpu().clamp(-1, 1).T.numpy(), io.BytesIO()
    soundfile.write(file, samples_TC, sound.sample_rate, format="WAV", subtype="PCM_16")
    write_bytes(path, file.getvalue())


def to_mono(sound: Audio, sample_rate: int) -> Tensor:
    """The mean of the channels, resampled to `sample_rate`, float32 [T].

    Raises:
        ItemError: `sound` is not an `Audio` with floating-point samples and an integer rate, or has no samples, or
            samples that are not finite.
    """
    if not isinstance(sound, Audio) or not isinstance(sound.waveform, Tensor) or sound.waveform.ndim != 2:
        raise ItemError(f"a sound must be an Audio with waveform [channels, samples], not {sound!r:.80}")
    if not sound.waveform.is_floating_point():
        raise ItemError(
            f"the waveform of a sound must contain floating-point numbers in [-1, 1], not {sound.waveform.dtype}. "
            "Divide 16-bit samples by 32768."
        )
    if type(sound.sample_rate) is not int or sound.sample_rate < 1:
        raise ItemError(
            f"the sample rate of a sound must be a whole number of Hz above 0, not {sound.sample_rate!r:.80}"
        )
    if sound.waveform.numel() == 0:
        raise ItemError("a sound without samples cannot be tokenized. Leave it out.")
    waveform_T = sound.waveform.detach().cpu().float().mean(0)
    if not waveform_T.isfinite().all():
        raise ItemError("a sound has samples that are NaN or infinite. Leave it out or repair it.")
    return resample(waveform_T, sound.sample_rate, sample_rate)


def spectrogram(sound: Audio, height: int = 96) -> Image.Image:
    """A log-mel spectrogram, low frequencies at the bottom. Black to white is 60 dB, and 10 ms are two pixels wide."""
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
