"""The judges learn from real items, do not depend on loudness and the like, and leave the global random state alone."""

import numpy as np
import pytest
import torch
import torchaudio
from PIL import Image

from demo.corpus import label_in
from demo.digits import MNIST
from demo.judges import ColourJudge, ImageJudge, PocketsphinxJudge, SpeechJudge
from demo.speech import DIGITS, SAMPLE_RATE, VOICES, Utterance, speak
from multidiff.tokenizer import Audio


@pytest.fixture(scope="module")
def pictures():
    with np.load(MNIST) as mnist:
        order = np.random.default_rng(0).permutation(10_000)[:1800]
        padded, labels = np.pad(mnist["x"][order], ((0, 0), (2, 2), (2, 2))), mnist["y"][order]
    return [Image.fromarray(picture) for picture in padded], torch.from_numpy(labels).long()


@pytest.fixture(scope="module")
def words():
    def said(split, count):
        voices = VOICES[split]
        utterances = [Utterance(DIGITS[i % 10], voices[i // 10 % len(voices)]) for i in range(count)]
        sounds = speak(utterances, progress=False)
        return [Audio(torch.from_numpy(sound)[None], SAMPLE_RATE) for sound in sounds]

    return said("train", 320), said("test", 100), torch.arange(100) % 10


@pytest.fixture(scope="module")
def speech_judge(words):
    return SpeechJudge.fit(words[0], torch.arange(320) % 10, seed=0, progress=False)


def share(predicted, labels):
    return (predicted == labels).float().mean().item()


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("seven", 7),
        ("A Handwritten ZERO.", 0),
        ("an eight", 8),
        ("", None),
        ("a picture", None),
        ("seven or eight", None),
        ("seven seven", None),
        ("sevenish", None),
        ("7", None),
    ],
)
def test_a_text_names_one_name_or_none(text, label):
    assert label_in(text, DIGITS) == label


def test_image_judge_learns_handwriting(pictures):
    items, labels = pictures
    state = torch.get_rng_state()
    judge = ImageJudge.fit(items[:1500], labels[:1500], seed=0, progress=False)
    assert share(judge.predict(items[1500:]), labels[1500:]) > 0.9
    assert torch.equal(state, torch.get_rng_state())


def test_image_judge_is_deterministic_and_converts(pictures):
    items, labels = pictures
    first, second = (ImageJudge.fit(items[:200], labels[:200], seed=3, progress=False) for _ in range(2))
    assert all(map(torch.equal, first.classifier.parameters(), second.classifier.parameters()))
    large = [item.convert("RGB").resize((64, 64), Image.Resampling.NEAREST) for item in items[:5]]
    assert first.predict(large).shape == (5,)
    assert first.predict([]).shape == (0,)


def test_a_judge_of_colours_tells_what_a_grey_one_cannot():
    random = np.random.default_rng(0)
    noisy = random.integers(0, 60, (240, 32, 32, 3), dtype=np.uint8)
    noisy[::2, ..., 0] += 100  # red and blue are alike in grey, but for 0.114 and 0.299 of the luma
    noisy[1::2, ..., 2] += 100
    noisy[1::2, ..., 1] += 31
    items, labels = [Image.fromarray(pixels) for pixels in noisy], torch.arange(240) % 2
    judge = ColourJudge.fit(items[:200], labels[:200], seed=0, progress=False)
    assert judge.arrays(items[:2]).shape == (2, 3, 32, 32)
    assert share(judge.predict(items[200:]), labels[200:]) == 1
    grey = ImageJudge.fit(items[:200], labels[:200], seed=0, progress=False)
    assert share(grey.predict(items[200:]), labels[200:]) < 0.8


def test_pocketsphinx_leaves_out_names_that_it_does_not_know(words):
    assert share(PocketsphinxJudge([*DIGITS, "zzyzx"]).predict(words[1][:20]), words[2][:20]) > 0.2


def test_speech_judge_learns_unheard_voices(speech_judge, words):
    _, heard, labels = words
    assert share(speech_judge.predict(heard), labels) > 0.6


def test_speech_judge_ignores_loudness_silence_and_channels(speech_judge, words):
    heard = words[1][:40]
    expected = speech_judge.predict(heard)
    quiet = [Audio(sound.waveform * 0.1, sound.sample_rate) for sound in heard]
    padded = [Audio(torch.nn.functional.pad(sound.waveform, (2205, 6615)), sound.sample_rate) for sound in heard]
    stereo = [Audio(sound.waveform.repeat(2, 1), sound.sample_rate) for sound in heard]
    slower = [Audio(torchaudio.functional.resample(sound.waveform, 22050, 16000), 16000) for sound in heard]
    for other in (quiet, padded, stereo, slower):
        assert share(speech_judge.predict(other), expected) >= 0.9


@pytest.mark.parametrize("samples", [0, 1, 40_000])
def test_judges_of_sound_take_silence_of_any_length(speech_judge, samples):
    silence = Audio(torch.zeros(1, samples), 8000)
    assert 0 <= speech_judge.predict([silence]).item() < 10
    assert -1 <= PocketsphinxJudge(DIGITS).predict([silence]).item() < 10


def test_pocketsphinx_hears_digits(words):
    _, heard, labels = words
    judge = PocketsphinxJudge(DIGITS)
    assert share(judge.predict(heard[:50]), labels[:50]) > 0.4
    assert torch.equal(judge.predict(heard[:5]), PocketsphinxJudge(DIGITS).predict(heard[:5]))


def test_a_judge_needs_a_label_for_each_item(pictures):
    with pytest.raises(ValueError, match="3 items, 2 labels"):
        ImageJudge.fit(pictures[0][:3], [0, 1], seed=0)
    with pytest.raises(ValueError, match="0 items"):
        ImageJudge.fit([], [], seed=0)
