"""Vocabulary and sequencer: ids, canvases, and codes to segments and back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multidiff.sequence.sequencer import MAX_CODES, Sequencer
from multidiff.sequence.vocabulary import BOS, MASK, PAD, SharedVocabulary
from tests.helpers.toys import Frames, Grid

TOKENIZERS = {"picture": Grid(5, 2, 3), "speech": Frames((4, 3)), "note": Frames((6,))}
VOCABULARY = SharedVocabulary.of(TOKENIZERS)
SEQUENCER = Sequencer(TOKENIZERS, VOCABULARY)

pictures = st.lists(st.integers(0, 4), min_size=6, max_size=6).map(lambda item: ("picture", item))
speech = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=6).map(
    lambda frames: ("speech", [code for frame in frames for code in frame])
)
notes = st.lists(st.integers(0, 5), max_size=7).map(lambda item: ("note", item))
documents = st.lists(st.one_of(pictures, speech, notes), min_size=1, max_size=5)


def segments(document, padding=1):
    return [SEQUENCER.given(name, TOKENIZERS[name].encode([item])[0], padding) for name, item in document]


def test_layout():
    assert (PAD, MASK, BOS) == (0, 1, 2)
    assert VOCABULARY.span_names == {"picture": (9, 14), "speech.0": (14, 19), "speech.1": (19, 23), "note": (23, 30)}
    assert VOCABULARY.rows == 64
    ids = [*VOCABULARY.begin_ids.values(), *VOCABULARY.end_ids.values(), PAD, MASK, BOS]
    assert sorted(ids) == list(range(9))


@given(documents, st.integers(1, 4))
def test_codes_return_unchanged(document, padding):
    for (name, item), segment in zip(document, segments(document, padding), strict=True):
        codes = SEQUENCER.codes(segment)
        assert TOKENIZERS[name].decode([codes]) == [item]
        assert codes.size == TOKENIZERS[name].encode([item])[0].size
        shared_N = VOCABULARY.to_shared(name, segment.ids_N, segment.levels_N)
        assert torch.equal(VOCABULARY.to_local(name, shared_N, segment.levels_N), segment.ids_N)
        for level, (start, stop) in enumerate(VOCABULARY.spans[name]):
            inside_N = shared_N[segment.levels_N == level]
            assert bool(((inside_N >= start) & (inside_N < stop)).all())


def test_ends_cut_at_level_zero():
    segment = SEQUENCER.given("speech", TOKENIZERS["speech"].encode([[1, 1, 2, 2, 3, 0]])[0], padding=2)
    segment.ids_N[1] = 3  # an EOS on level 1 of the first frame says nothing
    segment.ids_N[4] = 4  # the third frame's level 0 ends
    codes = SEQUENCER.codes(segment)
    assert codes.ids_N.tolist() == [1, 0, 2, 2]
    assert codes.size == {"frames": 2}


def test_units():
    given = segments([("speech", [1, 1, 2, 2]), ("note", [0]), ("picture", [0] * 6), ("speech", [])], padding=2)
    assert [SEQUENCER.unit(segment) for segment in given] == [2, 1, 1, 2]


def test_bad_input():
    with pytest.raises(ValueError, match="no tokenizer is called 'sound'"):
        SEQUENCER.blank("sound", {})
    with pytest.raises(ValueError, match="no room"):
        SEQUENCER.blank("speech", {"frames": 0})
    with pytest.raises(
        ValueError, match=r"canvas of speech of size .*height is not part of its size, which has frames"
    ):
        SEQUENCER.blank("speech", {"height": 3})
    with pytest.raises(ValueError, match="outside its codebook"):
        VOCABULARY.to_shared("note", torch.tensor([7]), torch.tensor([0]))
    with pytest.raises(ValueError, match="outside the span of note"):
        VOCABULARY.to_local("note", torch.tensor([10]), torch.tensor([0]))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"foo": 10**7}, "foo is not part of its size, which has height, width"),
        ({"height": 2, "frames": 3}, "frames is not part of its size"),
        ({"height": -3}, "height must be a whole number of at least 0, got -3"),
        ({"height": 2.0}, "height must be a whole number of at least 0, got 2.0"),
        ({"height": True}, "height must be a whole number of at least 0, got True"),
        ({"height": 10**7}, "it has 30,000,000 codes, more than"),
    ],
)
def test_a_size_that_cannot_be_is_refused_before_a_tokenizer_sees_it(size, message):
    sequencer = Sequencer({"picture": Grid(5, 2, 3)}, SharedVocabulary.of({"picture": Grid(5, 2, 3)}))
    sequencer.canvas("picture", {"height": np.int64(3)})
    with pytest.raises(ValueError, match=rf"canvas of picture of size .*{message}"):
        sequencer.canvas("picture", size)


@pytest.mark.parametrize(
    ("name", "size"),
    [("speech", {"frames": 10**8}), ("note", {"frames": 10**30}), ("picture", {"height": 10**5, "width": 10**5})],
)
def test_a_canvas_too_large_is_refused_before_it_is_made(monkeypatch, name, size):
    made = []
    for kind in (Grid, Frames):
        canvas = kind.canvas
        monkeypatch.setattr(
            kind, "canvas", lambda self, canvas=canvas, **size: made.append(size) or canvas(self, **size)
        )
    sequencer = Sequencer(TOKENIZERS, SharedVocabulary.of(TOKENIZERS))
    with pytest.raises(ValueError, match=f"canvas of {name} of size .* codes, more than the 1,048,576"):
        sequencer.blank(name, size)
    assert made == [{}]


def test_the_largest_canvas_is_made():
    assert len(SEQUENCER.canvas("speech", {"frames": MAX_CODES // 2})) == MAX_CODES
    with pytest.raises(ValueError, match="canvas of speech"):
        SEQUENCER.canvas("speech", {"frames": MAX_CODES // 2 + 1})
    with pytest.raises(ValueError, match="canvas of picture of size"):
        SEQUENCER.canvas("picture", {"height": "many"})


def test_vocabulary_names_the_difference():
    other = SharedVocabulary.of({**TOKENIZERS, "picture": Grid(4, 2, 3)})
    with pytest.raises(ValueError, match=r"weights.*'picture' had codebook_sizes \(4,\), here it has \(5,\)"):
        VOCABULARY.check(other, "weights")
    swapped = SharedVocabulary.of(dict(reversed(TOKENIZERS.items())))
    with pytest.raises(ValueError, match="in this order"):
        VOCABULARY.check(swapped, "weights")


def test_vocabulary_survives_its_file(tmp_path):
    VOCABULARY.save(tmp_path)
    loaded = SharedVocabulary.load(tmp_path)
    VOCABULARY.check(loaded, "file")
    assert loaded.fingerprint == VOCABULARY.fingerprint
    path = tmp_path / "vocabulary.json"
    path.write_text(path.read_text().replace("14", "15"))
    with pytest.raises(ValueError, match=r"vocabulary.json.*do not follow"):
        SharedVocabulary.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"vocabulary.json is damaged"):
        SharedVocabulary.load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"vocabulary.json is missing"):
        SharedVocabulary.load(tmp_path)
