"""Sound files of every kind are read to their end or refused by name; any rate becomes any other."""

import os
import struct
import subprocess
import sys
import time
from random import Random

import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import resample as ideally_resampled

from multidiff.tokenizer import Audio, ItemError
from multidiff_encodec.data import SoundData
from multidiff_sound import containers, flac
from multidiff_sound.folder import read_weights
from multidiff_sound.resampling import resample
from multidiff_sound.sound import read_sound, to_mono, write_sound
from tests.fuzz import sounds

RATE = 16_000


def noise(samples, seed=0):
    return np.random.default_rng(seed).normal(0, 0.2, samples).clip(-1, 1).astype(np.float32)


def written(path, container, subtype, samples, rate=RATE, **settings):
    with soundfile.SoundFile(path, "w", rate, 1, format=container, subtype=subtype, **settings) as file:
        file.write(samples)
    return path.read_bytes()


def length(path, content):
    path.write_bytes(content)
    return read_sound(path).waveform.shape[1]


def tones(rate, samples, hertz):
    """Sum of sinusoids of these frequencies, sampled at `rate`."""
    time_T = np.arange(samples) / rate
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, len(hertz))
    return sum(np.sin(2 * np.pi * pitch * time_T + phase) for pitch, phase in zip(hertz, phases, strict=True))


def decibel(error_T, signal_T):
    return 10 * np.log10(np.mean(error_T**2) / np.mean(signal_T**2))


RATES = [
    (16_001, 16_000), (44_099, 16_000), (191_999, 8_000), (7_999, 48_000), (16_000, 44_099), (999_983, 16_000),
    (101, 16_003),
    *((source, target) for source in (8_000, 22_050, 44_100, 48_000, 192_000) for target in (8_000, 16_000, 24_000)
      if source != target),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), RATES)
def test_resampled_tones_are_those_sampled_at_the_other_rate(source, target):
    lower = min(source, target)
    # At each end, the filter reaches beyond the sound for 110 samples of the lower rate.
    samples = 1_200 * source // lower
    passed = np.linspace(0.003, 0.95, 48) * lower / 2
    result_T = resample(torch.from_numpy(tones(source, samples, passed)).float(), source, target).numpy()
    assert len(result_T) == -(-samples * target // source)
    wanted_T = tones(target, len(result_T), passed)
    middle = slice(150 * target // lower, -150 * target // lower)
    assert decibel((result_T - wanted_T)[middle], wanted_T[middle]) < -80
    if source > 1.01 * target:  # what the other rate cannot hold is removed
        removed = np.linspace(1.001, min(4.0, 0.999 * source / target), 48) * lower / 2
        alias_T = resample(torch.from_numpy(tones(source, samples, removed)).float(), source, target).numpy()
        assert decibel(alias_T[middle], wanted_T[middle]) < -80


def test_resampled_noise_is_that_of_a_fourier_transform():
    source, target, seconds = 16_001, 16_000, 1
    spectrum_F = np.fft.rfft(np.random.default_rng(0).normal(size=source * seconds))
    spectrum_F[int(0.95 * target / 2) :] = 0
    noise_T = np.fft.irfft(spectrum_F, source * seconds)
    wanted_T = ideally_resampled(noise_T, target * seconds)
    result_T = resample(torch.from_numpy(noise_T).float(), source, target).numpy()
    middle = slice(200, -200)
    assert decibel((result_T - wanted_T)[middle], wanted_T[middle]) < -80


@pytest.mark.parametrize(("source", "target"), [(44_099, 16_000), (16_000, 44_099)])
def test_chunks_leave_no_trace(monkeypatch, source, target):
    sound_T = torch.from_numpy(noise(30_000))
    whole = resample(sound_T, source, target)
    assert torch.equal(whole, resample(sound_T, source, target))
    monkeypatch.setattr("multidiff_sound.resampling._CHUNK", 2**18)
    torch.testing.assert_close(resample(sound_T, source, target), whole, atol=1e-6, rtol=0)


def test_no_rate_takes_much_memory():
    script = """
import resource, torch
from multidiff.tokenizer import Audio
from multidiff_sound.sound import to_mono
torch.set_num_threads(1)
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + 500 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
cases = [(16_001, 16_000, 16_001), (1, 8_000, 5), (8_000, 1, 30_000), (10**7, 8_000, 30_000), (10**7, 1, 30_000)]
for source, target, samples in cases:
    result_T = to_mono(Audio(torch.full((2, samples), 0.5), source), target)
    assert len(result_T) == -(-samples * target // source)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_mp3_without_a_count_of_frames_is_read_to_its_end(tmp_path, mode, rate):
    second_T, path = noise(rate), tmp_path / "a.mp3"
    for samples_T in (np.r_[0 * second_T, second_T], np.r_[second_T, 0 * second_T]):
        counted = written(path, "MP3", "MPEG_LAYER_III", samples_T, rate, bitrate_mode=mode, compression_level=0.3)
        assert length(path, counted) == 2 * rate  # LAME's header says how much of the last frame is meant
        plain = counted[containers._Frame.parse(counted).length :]
        frames = length(path, plain) + 529  # the delay of a decoder, left out by mpg123
        assert 2 * rate <= frames <= 2 * rate + 4 * 1_152
        assert frames % 576 == 0
        content = read_sound(path).waveform[0]
        assert content[: rate // 2].std() == pytest.approx(samples_T[: rate // 2].std(), abs=0.05)
        assert content[rate + rate // 4 :][: rate // 2].std() == pytest.approx(samples_T[-rate // 2 :].std(), abs=0.05)
        tag = b"ID3\x03\x00\x00\x00\x00\x02\x00" + bytes(256)
        for around in (tag + plain, plain + b"TAG" + bytes(125), tag + plain + bytes(1_000), plain + tag):
            assert length(path, around) + 529 == frames
        assert length(path, counted + plain) + 529 >= 4 * rate  # joined: more than the first frame says
        for cut in (plain[:-1], plain[:-200], counted[:-1], counted[: len(counted) // 2]):
            with pytest.raises(ItemError, match=r"a\.mp3 is truncated"):
                length(path, cut)
        half = len(plain) // 2
        for gap in (bytes(500), bytes(2**20)):
            with pytest.raises(ItemError, match=r"a\.mp3 is damaged"):
                length(path, plain[:half] + gap + plain[half:])
        other = written(path, "MP3", "MPEG_LAYER_III", second_T, 11_025)
        with pytest.raises(ItemError, match=r"a\.mp3 is damaged, or changes its format"):
            length(path, plain + other)


def test_mp3_that_lost_its_last_frames_is_cut_off_where_it_says_how_many_there_are(tmp_path):
    content = written(tmp_path / "a.mp3", "MP3", "MPEG_LAYER_III", noise(RATE))
    place, places = 0, []
    while place < len(content):
        places.append(place)
        place += containers._Frame.parse(content[place:]).length
    with pytest.raises(ItemError, match=r"a\.mp3 is truncated after \d+ of \d+ frames"):
        length(tmp_path / "a.mp3", content[: places[-1]])
    # mp3splt counts the first frame among those that it announces.
    xing = content.index(b"Info" if b"Info" in content[:200] else b"Xing")
    assert int.from_bytes(content[xing + 8 : xing + 12], "big") == len(places) - 1
    assert int.from_bytes(content[xing + 12 : xing + 16], "big") == len(content)
    counted = content[: xing + 8] + len(places).to_bytes(4, "big") + content[xing + 12 :]
    assert length(tmp_path / "a.mp3", counted) >= RATE
    with pytest.raises(ItemError, match=r"a\.mp3 is truncated"):
        length(tmp_path / "a.mp3", counted[: places[-1]])


@pytest.mark.parametrize(("subtype", "rate"), [("VORBIS", 16_000), ("OPUS", 48_000)])
def test_ogg_is_whole_or_refused(tmp_path, subtype, rate):
    path = tmp_path / "a.ogg"
    content = written(path, "OGG", subtype, noise(3 * rate), rate)
    assert length(path, content) == 3 * rate
    assert length(path, content + b"TAG" + bytes(125)) == 3 * rate
    pages = [place for place in range(len(content)) if content.startswith(b"OggS", place)]
    for cut in (len(content) - 1, len(content) // 2, *pages[1:]):
        with pytest.raises(ItemError, match=r"a\.ogg is truncated"):
            length(path, content[:cut])
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    without = content[: pages[-2]] + content[pages[-1] :]
    for damaged in (bytes(flipped), without, content[: pages[2]] + b"garbage" + content[pages[2] :]):
        with pytest.raises(ItemError, match=r"a\.ogg is damaged"):
            length(path, damaged)


def test_chained_ogg_is_read_through_all_its_links(tmp_path):
    path = tmp_path / "a.ogg"
    first, second = (written(path, "OGG", "VORBIS", noise(RATE, seed)) for seed in range(2))
    alone = []
    for link in (first, second):
        path.write_bytes(link)
        alone.append(read_sound(path).waveform)
    path.write_bytes(first + second)
    assert torch.equal(read_sound(path).waveform, torch.cat(alone, 1))
    path.write_bytes(first + written(path, "OGG", "VORBIS", noise(8_000), 8_000))
    with pytest.raises(ItemError, match=r"a\.ogg changes its sample rate"):
        read_sound(path)
    with pytest.raises(ItemError, match=r"a\.ogg is truncated"):
        length(path, first + second[:-1])
    flipped = bytearray(second)
    flipped[0] ^= 1
    for between, rest in (
        (bytes(10), second),
        (b"TAG" + bytes(125), second),
        (bytes(2**20 - 1), second),
        (b"", flipped),
    ):
        with pytest.raises(ItemError, match=r"a\.ogg is damaged"):
            length(path, first + between + bytes(rest))


def test_limits_hold_for_all_links_of_a_file_together(tmp_path, monkeypatch):
    link = written(tmp_path / "a.ogg", "OGG", "VORBIS", noise(RATE))
    (tmp_path / "a.ogg").write_bytes(3 * link)
    monkeypatch.setattr("multidiff_sound.sound.MOST_SECONDS", 2)
    with pytest.raises(ItemError, match=r"a\.ogg lasts 3 s, but the limit is 2 s"):
        read_sound(tmp_path / "a.ogg")
    monkeypatch.setattr("multidiff_sound.sound.MOST_SECONDS", 3)
    assert read_sound(tmp_path / "a.ogg").waveform.shape == (1, 3 * RATE)
    monkeypatch.setattr("multidiff_sound.sound._MOST_SAMPLES", 3 * RATE - 1)
    with pytest.raises(ItemError, match=r"a\.ogg has 48,000 samples in all channels"):
        read_sound(tmp_path / "a.ogg")


def test_blocks_leave_no_trace(tmp_path, monkeypatch):
    samples_TC = np.stack([noise(1_000), noise(1_000, 1)], 1)
    soundfile.write(tmp_path / "a.wav", samples_TC, RATE, subtype="FLOAT")
    monkeypatch.setattr("multidiff_sound.sound._BLOCK", 300)
    assert np.array_equal(read_sound(tmp_path / "a.wav").waveform.numpy(), samples_TC.T)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize(
    ("whole", "samples"),
    [
        (2**32 - 1, 2**32 - 1), (0, 0), (36, 0), (2**32 - 1, 0),  # ffmpeg; several; Python's wave; GStreamer
        (0x7FFFF024, 0x7FFFF000), (0x7FFFFF24, 0x7FFFFF00), (0x80000023, 0x7FFFFFFF),  # sox; arecord; lame
    ],
)  # fmt: skip
def test_streamed_wave_files_are_read_to_their_end(tmp_path, subtype, whole, samples):
    content = written(tmp_path / "a.wav", "WAV", subtype, noise(1_000))
    known = read_sound(tmp_path / "a.wav").waveform
    data = content.find(b"data")
    streamed = content[:4] + struct.pack("<I", whole) + content[8 : data + 4] + struct.pack("<I", samples)
    (tmp_path / "b.wav").write_bytes(streamed + content[data + 8 :])
    assert torch.equal(read_sound(tmp_path / "b.wav").waveform, known)


def test_a_wave_file_whose_size_32_bits_do_not_hold_is_refused(tmp_path):
    content = written(tmp_path / "a.wav", "WAV", "PCM_16", noise(1_000))
    with (tmp_path / "a.wav").open("r+b") as file:
        file.truncate(2**32 + len(content))  # takes no space
    with pytest.raises(ItemError, match=r"a\.wav has 4 GiB of samples or more"):
        read_sound(tmp_path / "a.wav")


def test_zeros_in_place_of_a_chunk_are_refused(tmp_path):
    content = written(tmp_path / "a.wav", "WAV", "PCM_16", noise(1_000))
    with pytest.raises(ItemError, match=r"a\.wav is damaged: a chunk of zeros begins at byte 12"):
        length(tmp_path / "a.wav", content[:12] + bytes(10_000))


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "RF64", "W64", "AIFF"])
def test_cut_wave_files_are_refused(tmp_path, container):
    path = tmp_path / "a.sound"
    content = written(path, container, "PCM_16", noise(1_000))
    assert length(path, content) == 1_000
    for cut in (1, 2, 500, len(content) - 20):
        with pytest.raises(ItemError, match=r"a\.sound is truncated"):
            length(path, content[:-cut])


def test_rf64_of_unknown_size_is_read_to_its_end(tmp_path):
    content = bytearray(written(tmp_path / "a.wav", "RF64", "PCM_16", noise(1_000)))
    for sizes in (bytes(16), b"\xff" * 16):
        content[20:36] = sizes
        assert length(tmp_path / "a.wav", bytes(content)) == 1_000


@pytest.mark.parametrize("samples", [1_000, 4_096, 40_000, 200_000])  # the last: more frames than a byte numbers
def test_streamed_flac_is_read_to_its_end(tmp_path, samples):
    content = bytearray(written(tmp_path / "a.flac", "FLAC", "PCM_16", noise(samples), compression_level=0))
    assert int.from_bytes(content[8:10], "big") == 1_152
    known = read_sound(tmp_path / "a.flac").waveform
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    ape = b"APETAGEX" + struct.pack("<5I", 2_000, 32 + 8, 0, 0, 0) + bytes(4)
    for tags in (b"", b"TAG" + bytes(125), bytes(8) + ape + b"TAG" + bytes(125)):
        assert length(tmp_path / "a.flac", bytes(content) + tags) == samples
    assert torch.equal(read_sound(tmp_path / "a.flac").waveform, known)
    for cut in (1, 100, len(content) // 2):
        with pytest.raises(ItemError, match=r"a\.flac is truncated"):
            length(tmp_path / "a.flac", bytes(content[:-cut]))


def test_all_remainders_of_flac_at_once_are_those_of_long_division():
    content = bytes(np.random.default_rng(0).integers(0, 256, 5_000, dtype=np.uint8))
    remainders = flac._remainders(content)
    for place in (0, 1, 904, 4_990, 4_999):  # exponents before and beyond the period
        register = 0
        for byte in content[place:]:
            for bit in f"{byte:08b}":
                register = register << 1 | int(bit)
                register ^= 0x18005 if register >> 16 else 0
        assert remainders[place] == register


def test_a_cut_streamed_flac_full_of_false_marks_is_refused_quickly(tmp_path):
    content = bytearray(written(tmp_path / "a.flac", "FLAC", "PCM_16", noise(1_000)))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    before = time.process_time()
    with pytest.raises(ItemError, match=r"a\.flac is truncated"):
        length(tmp_path / "a.flac", bytes(content[:100]) + b"\xff\xf8" * 50_000)
    assert time.process_time() - before < 5  # one checksum after the other takes hours


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_samples_that_are_not_finite_are_refused(tmp_path, value, subtype):
    samples_T = noise(100)
    samples_T[50] = value
    soundfile.write(tmp_path / "a.wav", samples_T, RATE, subtype=subtype)
    with pytest.raises(ItemError, match=r"a\.wav has samples that are NaN or infinite"):
        read_sound(tmp_path / "a.wav")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "device.wav").symlink_to("/dev/zero")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("seven")
    soundfile.write(tmp_path / "silent.wav", np.zeros(0), RATE)
    written(tmp_path / "a.au", "AU", "PCM_16", noise(100))
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x1cftypM4A " + bytes(100))
    with pytest.raises(ItemError, match=r"a\.m4a is not a WAV, .* Convert it, for instance with `ffmpeg"):
        read_sound(tmp_path / "a.m4a")
    for name in ("pipe.wav", "folder.wav", "device.wav", "empty.wav", "text.wav", "silent.wav", "a.au", "none.wav"):
        with pytest.raises(ItemError, match=name):
            read_sound(tmp_path / name)


def test_a_header_that_promises_much_is_refused_before_memory_is_taken(tmp_path):
    content = bytearray(written(tmp_path / "a.flac", "FLAC", "PCM_16", noise(1_000)))
    content[21:26] = (int.from_bytes(content[21:26], "big") | (2**36 - 1)).to_bytes(5, "big")
    with pytest.raises(ItemError, match=r"a\.flac lasts .* the limit is 3,600 s"):
        length(tmp_path / "a.flac", bytes(content))
    soundfile.write(tmp_path / "b.flac", np.zeros((30, 8)), 655_350)
    content = bytearray((tmp_path / "b.flac").read_bytes())
    content[22:26] = (2**30).to_bytes(4, "big")
    with pytest.raises(ItemError, match=r"b\.flac has 8,589,934,592 samples in all channels"):
        length(tmp_path / "b.flac", bytes(content))


def test_sounds_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file"):
        write_sound(Audio(torch.zeros(1, 8), RATE), tmp_path / "file" / "a.wav")


def test_training_names_the_sound_that_it_cannot_read(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"split": "train", "segments": [{"speech": "a.ogg"}]}')
    content = written(tmp_path / "a.ogg", "OGG", "VORBIS", noise(RATE))
    (tmp_path / "a.ogg").write_bytes(content[:-1])
    with pytest.raises(ItemError, match=r"a\.ogg is truncated"):
        next(iter(SoundData(str(tmp_path), RATE, 320, batch_size=1).train_dataloader()))


def test_weights_that_are_not_finite_are_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.tensor([1.0, torch.nan])}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor a contains NaN"):
        read_weights(tmp_path / "model.safetensors")


def test_damaged_sounds_are_read_or_named(tmp_path):
    state = sounds.prepare(tmp_path, Random(0))
    outcomes = [sounds.attempt(state, number, Random(number)) for number in range(52)]
    assert set(outcomes) == {"read", "refused"}


@pytest.mark.parametrize(
    ("waveform", "rate", "words"),
    [
        (torch.zeros(1, 8), 8_000.0, r"whole number of Hz above 0, not 8000\.0"),
        (torch.zeros(1, 8), 0, "whole number of Hz above 0"),
        (torch.zeros(1, 8, dtype=torch.int16), 8_000, "floating-point numbers .* not torch.int16"),
        (np.zeros((1, 8)), 8_000, "must be an Audio"),
    ],
)
def test_what_is_no_sound_is_refused(waveform, rate, words):
    with pytest.raises(ItemError, match=words):
        to_mono(Audio(waveform, rate), RATE)


def test_resampling_says_what_it_takes():
    for samples in (torch.zeros(2, 8), torch.zeros(0), torch.zeros(8).double(), torch.zeros(8, device="meta")):
        with pytest.raises(ValueError, match="resample expects float32 samples"):
            resample(samples, 8_000, 16_000)
    with pytest.raises(ValueError, match="at least 1 Hz"):
        resample(torch.zeros(8), 0, 16_000)
