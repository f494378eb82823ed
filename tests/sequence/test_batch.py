"""Flat batches, against a layout written out again token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multidiff.sequence import SharedVocabulary
from multidiff.sequence.sequencer import Sequencer
from multidiff.sequence.vocabulary import BOS, PAD
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


def tokens_of(document):
    """(id, position, coordinates, span, segment within the document, known) of each token of a list of segments."""
    nowhere = (-1, -1, -1)
    tokens = [(BOS, (0, 0, 0), nowhere, -1, -1, True)]
    free = 1  # 1 + the largest coordinate so far
    for number, segment in enumerate(document):
        name = segment.tokenizer
        begin = free
        tokens.append((VOCABULARY.begin_ids[name], (begin,) * 3, nowhere, -1, -1, True))
        free = begin + 1
        for local, level, coords, known in zip(
            segment.ids_N.tolist(), segment.levels_N.tolist(), segment.coords_N3.tolist(), segment.known_N.tolist(),
            strict=True,
        ):  # fmt: skip
            position = tuple(begin + 1 + x for x in coords)
            span = [(n, k) for n, k, _ in VOCABULARY.flat_spans].index((name, level))
            tokens.append((VOCABULARY.spans[name][level][0] + local, position, tuple(coords), span, number, known))
            free = max(free, 1 + max(position))
        tokens.append((VOCABULARY.end_ids[name], (free,) * 3, nowhere, -1, -1, True))
        free += 1
    return tokens


@settings(max_examples=50, deadline=None)
@given(st.lists(documents, min_size=1, max_size=6), st.integers(0, 3))
def test_a_batch_is_its_documents_one_after_another(many, padding):
    laid = [segments(document, padding) for document in many]
    batch = SEQUENCER.batch(laid)
    rows = [tokens_of(document) for document in laid]
    edges = [0]
    for row in rows:
        edges.append(edges[-1] + len(row))
    flat = [token for row in rows for token in row]
    ids, positions, coords, spans, places, known = (list(column) for column in zip(*flat, strict=True))
    assert batch.document_starts.tolist() == edges
    assert batch.document_starts.dtype == torch.int32
    assert batch.num_documents == len(many)
    assert batch.ids_P.tolist() == ids
    assert batch.positions_P3.tolist() == list(map(list, positions))
    assert batch.coords_P3.tolist() == list(map(list, coords))
    assert batch.span_P.tolist() == spans
    assert batch.known_P.tolist() == known
    assert batch.document_P.tolist() == [number for number, row in enumerate(rows) for _ in row]
    first = [sum(map(len, laid[:number])) for number in range(len(laid))]  # of each document among the segments
    segment = [
        first[d] + place if place >= 0 else -1 for d, place in zip(batch.document_P.tolist(), places, strict=True)
    ]
    assert batch.segment_P.tolist() == segment
    parts = [part for document in laid for part in document]
    assert batch.length_S.tolist() == [len(part) for part in parts]
    assert [list(TOKENIZERS)[place] for place in batch.tokenizer_S] == [part.tokenizer for part in parts]
    assert batch.document_S.tolist() == [number for number, document in enumerate(laid) for _ in document]
    for start, length, number in zip(batch.start_S, batch.length_S, range(len(parts)), strict=True):
        assert segment[start : start + length] == [number] * int(length)
        assert segment[start - 1] == segment[start + length] == -1
    assert PAD not in ids


def test_positions():
    batch = SEQUENCER.batch([segments([("note", [0, 1]), ("picture", [0] * 6), ("speech", [1, 2])])])
    positions = batch.positions_P3.tolist()
    # <bos> 0, <note> 1, two notes and an EOS 2-4, </note> 5, <picture> 6, pixels from 7, its largest coordinate 2 ...
    assert positions[:6] == [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 2, 2], [4, 2, 2], [5, 5, 5]]
    picture = positions[6:14]
    assert picture[0] == [6, 6, 6]
    assert picture[1:7] == [[7, 7 + row, 7 + column] for row in range(2) for column in range(3)]
    assert picture[7] == [10, 10, 10]
    assert batch.coords_P3[6:14].tolist() == [
        [-1] * 3,
        *([0, row, column] for row in range(2) for column in range(3)),
        [-1] * 3,
    ]
    assert positions[14:] == [[11] * 3, [12, 12, 12], [12, 13, 12], [13, 12, 12], [13, 13, 12], [14] * 3]


def test_divisor_counts_codes_and_one_end():
    document = segments([("speech", [1, 1, 2, 2]), ("picture", [0] * 6), ("note", [])], padding=3)
    assert SEQUENCER.batch([document]).divisor_S.tolist() == [5, 6, 1]


def test_labels_are_those_of_the_segments():
    codes = TOKENIZERS["note"].encode([[1]])[0]
    question, answer = SEQUENCER.given("note", codes, label="question"), SEQUENCER.given("note", codes)
    assert SEQUENCER.batch([[question], [answer, question]]).labels == ("question", "note", "question")


def test_values_of_segments_spread_over_their_codes():
    document = segments([("note", [3]), ("speech", []), ("note", [])])
    batch = SEQUENCER.batch([document, document[:1]])
    spread = batch.spread(torch.tensor([0.5, 1.5, 2.5, 3.5]), -7.0).tolist()
    gap = [-7.0]
    assert spread == [*gap * 2, 0.5, 0.5, *gap * 2, 1.5, 1.5, *gap * 2, 2.5, *gap * 3, 3.5, 3.5, *gap]


def test_sizes_of_one_length_do_not_share_their_layout():
    """Six codes as two rows or as three: positions and the place of what follows differ."""
    flat, tall = ([SEQUENCER.blank("picture", {"height": h, "width": w})] for h, w in ((2, 3), (3, 2)))
    batch = SEQUENCER.batch([flat, tall])
    assert batch.coords_P3[2:8].tolist() == [[0, row, column] for row in range(2) for column in range(3)]
    assert batch.coords_P3[11:17].tolist() == [[0, row, column] for row in range(3) for column in range(2)]
    assert batch.known_P.tolist() == [True, True, *[False] * 6, True] * 2


def test_layouts_are_made_again_once_there_are_too_many(monkeypatch):
    monkeypatch.setattr("multidiff.sequence.sequencer._MOST_KEPT", 2)
    sequencer = Sequencer(TOKENIZERS, VOCABULARY)
    for count in (*range(6), 3):
        document = segments([("note", [1] * count)])
        assert sequencer.batch([document]).ids_P.tolist() == [token[0] for token in tokens_of(document)]
    assert len(sequencer._layouts) <= 2
    assert len(sequencer._canvases) <= 2


@pytest.mark.parametrize("bad", [[], [[]], [segments([("note", [1])]), []]])
def test_a_batch_of_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="at least one document, and a document at least one segment"):
        SEQUENCER.batch(bad)
