"""Spoken words: voices kept apart, sounds that are the same each time, a folder that the codec trains on."""

import subprocess
import sys

import numpy as np
import pytest

from demo.speech import DIGITS, VOICES, WORDS, Utterance, speak
from multidiff.data.sources.folder import read_metadata
from multidiff_sound.sound import read_sound
from tests.helpers.paths import ROOT


def test_there_are_enough_voices_and_held_out_timbres_are_never_heard():
    timbres = {split: {voice.split("+")[1] for voice in voices} for split, voices in VOICES.items()}
    assert len({*VOICES["train"], *VOICES["validation"], *VOICES["test"]}) >= 90
    assert not timbres["train"] & (timbres["validation"] | timbres["test"])
    assert not timbres["validation"] & timbres["test"]
    assert len(VOICES["test"]) >= 12
    assert len(VOICES["validation"]) >= 8


def test_there_are_enough_words_and_none_is_a_digit():
    assert len(set(WORDS)) == len(WORDS) >= 260
    assert not set(WORDS) & set(DIGITS)


def test_speech_is_trimmed_levelled_and_the_same_each_time():
    utterances = [Utterance("seven", voice, 140, 40) for voices in VOICES.values() for voice in voices]
    sounds, again = (speak(utterances, processes=processes, progress=False) for processes in (1, 2))
    assert all(np.array_equal(one, other) for one, other in zip(sounds, again, strict=True))
    for sound in sounds:
        assert sound.dtype == np.float32
        assert 0.15 * 22_050 < len(sound) < 1.5 * 22_050
        assert np.abs(sound).max() == pytest.approx(0.9, abs=1e-3)
        assert abs(sound[0]) < 0.02
        assert abs(sound[-1]) < 0.02


def test_speed_makes_it_shorter():
    slow, fast = speak([Utterance("banana", VOICES["train"][0], speed) for speed in (110, 200)], progress=False)
    assert len(fast) < 0.8 * len(slow)


def test_what_cannot_be_said_is_an_error():
    with pytest.raises(ValueError, match=r"'en-us\+nobody'.*VOICES"):
        speak([Utterance("seven", "en-us+nobody")], progress=False)
    with pytest.raises(ValueError, match="says nothing"):
        speak([Utterance("", VOICES["train"][0])], progress=False)


def test_prepare_words_writes_a_data_folder(tmp_path):
    script = [sys.executable, ROOT / "scripts" / "prepare_words.py", "--output"]
    for name in ("words", "again"):
        subprocess.run([*script, tmp_path / name, "--train", "12", "--held-out", "3"], check=True, capture_output=True)
    records = read_metadata(tmp_path / "words")
    assert [record.split for record in records] == ["train"] * 12 + ["validation"] * 3 + ["test"] * 3
    for record in records:
        (text, word), (speech, path) = record.segments
        assert (text, speech) == ("text", "speech")
        assert word in WORDS + DIGITS
        assert read_sound(tmp_path / "words" / path).sample_rate == 16_000
        assert (tmp_path / "words" / path).read_bytes() == (tmp_path / "again" / path).read_bytes()
