"""Vocabulary and sequence: ids, canvases, positions, packing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multidiff.sequence.sequencer import Sequencer
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


def segments(document, max_eos_padding=1):
    return [SEQUENCER.given(name, TOKENIZERS[name].encode([item])[0], max_eos_padding) for name, item in document]


def test_layout():
    assert (PAD, MASK, BOS) == (0, 1, 2)
    assert VOCABULARY.span_names == {"picture": (9, 14), "speech.0": (14, 19), "speech.1": (19, 23), "note": (23, 30)}
    assert VOCABULARY.rows == 64
    ids = [*VOCABULARY.begin_ids.values(), *VOCABULARY.end_ids.values(), PAD, MASK, BOS]
    assert sorted(ids) == list(range(9))


@given(documents, st.integers(1, 4))
def test_codes_return_unchanged(document, max_eos_padding):
    for (name, item), segment in zip(document, segments(document, max_eos_padding), strict=True):
        codes = SEQUENCER.codes(segment)
        assert TOKENIZERS[name].decode([codes]) == [item]
        assert codes.size == TOKENIZERS[name].encode([item])[0].size
        shared_N = VOCABULARY.to_shared(name, segment.ids_N, segment.levels_N)
        assert torch.equal(VOCABULARY.to_local(name, shared_N, segment.levels_N), segment.ids_N)
        for level, (start, stop) in enumerate(VOCABULARY.spans[name]):
            inside_N = shared_N[segment.levels_N == level]
            assert bool(((inside_N >= start) & (inside_N < stop)).all())


@settings(max_examples=50)
@given(st.lists(documents, min_size=1, max_size=6), st.one_of(st.none(), st.integers(1, 60)))
def test_a_packed_batch_holds_every_document_once(many, row_length):
    batch = SEQUENCER.batch([segments(document) for document in many], row_length)
    for index, document in enumerate(many):
        alone = SEQUENCER.batch([segments(document)])
        where_BL = batch.document_BL == index
        assert int(where_BL.any(1).sum()) == 1
        assert torch.equal(batch.ids_BL[where_BL], alone.ids_BL[0])
        assert torch.equal(batch.positions_BL3[where_BL], alone.positions_BL3[0])
        assert torch.equal(batch.coords_BL3[where_BL], alone.coords_BL3[0])
        assert torch.equal(batch.span_BL[where_BL], alone.span_BL[0])
    padding_BL = batch.document_BL < 0
    assert bool((batch.ids_BL[padding_BL] == PAD).all())
    assert bool((batch.ids_BL[~padding_BL] != PAD).all())
    assert torch.equal(batch.segment_BL < 0, batch.span_BL < 0)
    assert torch.equal((batch.coords_BL3 < 0).all(-1), batch.span_BL < 0)
    assert batch.num_documents == len(many)


def test_positions():
    batch = SEQUENCER.batch([segments([("note", [0, 1]), ("picture", [0] * 6), ("speech", [1, 2])])])
    positions = batch.positions_BL3[0].tolist()
    # <bos> 0, <note> 1, two notes and a stop 2-4, </note> 5, <picture> 6, pixels from 7, its largest coordinate 2 ...
    assert positions[:6] == [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 2, 2], [4, 2, 2], [5, 5, 5]]
    picture = positions[6:14]
    assert picture[0] == [6, 6, 6]
    assert picture[1:7] == [[7, 7 + row, 7 + column] for row in range(2) for column in range(3)]
    assert picture[7] == [10, 10, 10]
    assert batch.coords_BL3[0, 6:14].tolist() == [
        [-1] * 3,
        *([0, row, column] for row in range(2) for column in range(3)),
        [-1] * 3,
    ]
    assert positions[14:] == [[11] * 3, [12, 12, 12], [12, 13, 12], [13, 12, 12], [13, 13, 12], [14] * 3]


def test_ends_cut_at_level_zero():
    segment = SEQUENCER.given("speech", TOKENIZERS["speech"].encode([[1, 1, 2, 2, 3, 0]])[0], max_eos_padding=2)
    segment.ids_N[1] = 3  # a stop on level 1 of the first frame says nothing
    segment.ids_N[4] = 4  # the third frame's level 0 ends
    codes = SEQUENCER.codes(segment)
    assert codes.ids_N.tolist() == [1, 0, 2, 2]
    assert codes.size == {"frames": 2}


def test_units():
    given = segments([("speech", [1, 1, 2, 2]), ("note", [0]), ("picture", [0] * 6), ("speech", [])], max_eos_padding=2)
    assert [SEQUENCER.unit(segment) for segment in given] == [2, 1, 1, 2]


def test_divisor_counts_codes_and_one_end():
    batch = SEQUENCER.batch([segments([("speech", [1, 1, 2, 2]), ("picture", [0] * 6)], max_eos_padding=3)])
    assert batch.divisor_S.tolist() == [5, 6]


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
    with pytest.raises(ValueError, match="at least one segment"):
        SEQUENCER.batch([[]])


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
