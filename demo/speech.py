"""Spoken words in many voices, synthesized by eSpeak NG.

Speech here is synthetic and licence-free to use; the synthesizer itself (GPL-3) is an optional extra. A voice is an
accent plus a variant ("en-us+f3"); the variants decide the timbre. The table below was chosen by greedy
farthest-point search over the log-mel spectra of five words among 516 accent x variant pairs: the two nearest voices
differ 4 to 5 times as much as one voice from its own repetition. Whispering and robots were left out.
"""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from tqdm import tqdm

SAMPLE_RATE = 22_050  # Hz, eSpeak's own

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_WORDS = """
    able about above across after again against air almost alone along always animal answer apple arm around autumn
    baby back bad ball banana basket beach bear bed before begin behind bell below better between big bird black blue
    boat body book bottle bottom box boy branch bread break bridge bring brother brown build bus butter button buy
    camera candle car carry castle cat chair change cheese chicken child circle city clean clock close cloud coat cold
    color come copper corner cotton country cow cross cup dance dark daughter day deep desk dinner doctor dog door
    double down draw dream dress drink drive dry earth east easy egg empty engine evening every eye face fall family
    far farmer fast father feather field finger fire fish floor flower fly follow food foot forest forget fork forward
    friend fruit garden gentle girl give glass go gold good grass great green ground grow guitar hair hammer hand happy
    hard hat head hear heart heavy help high hill hold home honey horse hospital hot hour house hundred ice iron island
    jacket join juice jump keep key kind king kitchen knife ladder lady lake language large laugh leaf learn left lemon
    letter light line lion listen little long look loud love lunch machine make man many market meat memory metal
    milk minute mirror money monkey moon morning mother mountain mouth move music name narrow nature near never new
    night noise north number ocean office often old open orange other over page paint paper parent party pencil people
    picture piece place plant play please pocket point potato power pull purple push quick quiet rabbit radio rain
    reach ready red remember rice right ring river road rock roof room round run salt sand school sea season second
    shadow sharp sheep ship shirt shoe short shoulder show silver simple sing sister sit sky sleep slow small smile
    smoke snow soap soft some song sound south speak spoon spring stand star station stay stone stop story street
    strong student sugar summer sun swim table talk tall teacher thank think thunder ticket tiger time together
    tomato tomorrow tooth tower town train travel tree true turn umbrella under valley vegetable velvet very village
    violin visit voice wait walk wall warm wash watch water weather week west wheel white wide wife wild window winter
    wisdom wish woman wonder wood wool word work world write yellow yesterday young
"""
WORDS = tuple(_WORDS.split())

_VARIANTS_OF_ACCENT = {
    "en-029": "Alicia Andrea Andy AnxiousAndy Annie Gene Lee Nguyen RicishayMax aunty belinda boris david f1 f3 f5 "
    "grandma gustave ian iven kaukovalta m2 m5 michel norbert pablo paul quincy shelby steph2 victor zac",
    "en": "steph2",
    "en-gb-scotland": "Andrea Annie AnxiousAndy Andy Denis Jacky RicishayMax3 aunty caleb ed f4 ian iven2 linda m2 m8 "
    "pedro rob shelby travis",
    "en-gb-x-gbclan": "Gene2 Marco Mario antonio aunty boris f2 f3 max",
    "en-us": "Andrea Andy Annie AnxiousAndy Gene Lee Nguyen RicishayMax RicishayMax2 f1 f3 f4 grandma ian iven3 "
    "kaukovalta klatt2 linda m2 m3 marcelo miguel norbert paul shelby steph2 victor",
    "en-us-nyc": "Michael anika belinda ed iven m4 mike2 pablo quincy",
}
_CHUNK = 512  # utterances that one process speaks before a fresh one takes over


@dataclass(frozen=True)
class Utterance:
    """What is to be said, and how.

    Attributes:
        text: a word or a few.
        voice: accent and variant, e.g. "en-us+f3"; see `VOICES`.
        speed: words a minute, 80 to 450; 175 is eSpeak's normal.
        pitch: 0 to 99; 50 is normal.
    """

    text: str
    voice: str
    speed: int = 175
    pitch: int = 50


def _split_voices(seed: int = 0, validation: int = 8, test: int = 12) -> dict[str, tuple[str, ...]]:
    """Voices by split. A variant goes to one split with all its accents: held-out timbres are never heard before."""
    accents: dict[str, list[str]] = {}
    for accent, variants in _VARIANTS_OF_ACCENT.items():
        for variant in variants.split():
            accents.setdefault(variant, []).append(accent)
    order = sorted(accents)
    random.Random(seed).shuffle(order)
    voices: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for variant in order:
        split = next((s for s, n in (("test", test), ("validation", validation)) if len(voices[s]) < n), "train")
        voices[split] += [f"{accent}+{variant}" for accent in accents[variant]]
    return {split: tuple(sorted(names)) for split, names in voices.items()}


VOICES = _split_voices()


def speak(utterances: Sequence[Utterance], *, processes: int | None = None, progress: bool = True) -> list[np.ndarray]:
    """Speak each utterance: float32 mono at `SAMPLE_RATE`, peak 0.9, silence trimmed at both ends.

    eSpeak's output depends a little on what it said before. Utterances are therefore spoken in fixed runs, each in a
    fresh process: the same list gives the same sounds, however many processes share the work.

    Args:
        utterances: what to say.
        processes: how many at a time; None: one a CPU core.
        progress: show a progress bar.

    Raises:
        ImportError: espeakng-loader is missing.
        ValueError: a voice that is not in `VOICES`, or a text that gives no sound.
    """
    known = {voice for voices in VOICES.values() for voice in voices}
    for utterance in utterances:  # eSpeak NG itself speaks with another variant instead
        if utterance.voice not in known:
            raise ValueError(f"no voice is called {utterance.voice!r}; demo.speech.VOICES lists them")
    runs = [utterances[start : start + _CHUNK] for start in range(0, len(utterances), _CHUNK)]
    spoken = []
    with (
        ProcessPoolExecutor(processes or os.cpu_count(), get_context("spawn"), max_tasks_per_child=1) as pool,
        tqdm(total=len(utterances), desc="speaking", unit="word", disable=not progress) as bar,
    ):
        for run in pool.map(_speak_run, runs):
            spoken += run
            bar.update(len(run))
    return spoken


def _speak_run(utterances: Sequence[Utterance]) -> list[np.ndarray]:
    espeak = _Espeak()
    return [_trim(espeak.say(utterance)) for utterance in utterances]


class _Espeak:
    """The C library, one per process: it is full of global state."""

    _SYNCHRONOUS_WITHOUT_PLAYING = 2
    _SPEED, _PITCH = 1, 3
    _CHARS_UTF8 = 1

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise ImportError('speech needs eSpeak NG: pip install "masked-multidiff[demo]"') from None
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        rate = self._library.espeak_Initialize(self._SYNCHRONOUS_WITHOUT_PLAYING, 0, data, 0)
        assert rate == SAMPLE_RATE, rate
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # its jitter and breath are random, seeded by the clock
        self._heard: list[np.ndarray] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = callback(self._hear)  # kept: ctypes does not keep it alive
        self._library.espeak_SetSynthCallback(self._callback)

    def _hear(self, samples, count: int, events) -> int:
        if samples and count:
            self._heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, utterance: Utterance) -> np.ndarray:
        found = self._library.espeak_SetVoiceByName(utterance.voice.encode())
        assert found == 0, utterance.voice
        self._library.espeak_SetParameter(self._SPEED, utterance.speed, 0)
        self._library.espeak_SetParameter(self._PITCH, utterance.pitch, 0)
        self._heard.clear()
        text = utterance.text.encode()
        self._library.espeak_Synth(text, len(text) + 1, 0, 1, 0, self._CHARS_UTF8, None, None)
        sound = np.concatenate([np.zeros(0, np.int16), *self._heard]).astype(np.float32)
        if not sound.any():
            raise ValueError(f"eSpeak NG says nothing for {utterance}")
        return sound


def _trim(sound: np.ndarray, floor_db: float = -40.0, margin: float = 0.01, fade: float = 0.005) -> np.ndarray:
    """Peak 0.9, cut where the 10 ms level stays under `floor_db` of the peak (less a margin, s), faded (s)."""
    sound = sound / np.abs(sound).max()
    window = SAMPLE_RATE // 100
    level = np.sqrt(np.convolve(sound**2, np.full(window, 1 / window), mode="same"))
    loud = np.flatnonzero(level > 10 ** (floor_db / 20))
    pad = int(margin * SAMPLE_RATE)
    sound = 0.9 * sound[max(0, loud[0] - pad) : loud[-1] + pad]
    ramp = np.linspace(0, 1, min(int(fade * SAMPLE_RATE), len(sound) // 2), dtype=np.float32)
    sound[: len(ramp)] *= ramp
    sound[len(sound) - len(ramp) :] *= ramp[::-1]
    return sound.astype(np.float32)
