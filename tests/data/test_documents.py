"""Documents as a loader gets them: labels, and canvases as generation has them."""

import json
import math
from collections import Counter

import pytest

from multidiff.data.batches import DocumentKey
from multidiff.sequence.seen import most_units
from tests.helpers.data import data_of, rows_of, write


def texts_of(documents, index, epochs, label="text"):
    """The segment with this label of a document, in each epoch."""
    keys = [DocumentKey(epoch, 0, index) for epoch in range(epochs)]
    for example in documents.__getitems__(keys):
        (segment,) = (segment for segment in example.document if segment.label == label)
        yield segment


def test_labels_come_from_the_shards(tmp_path):
    rows = [
        {"segments": [{"text": "why?", "label": "question"}, {"text": "so", "label": "answer"}]},
        {"segments": [{"text": "plain"}, {"text": "why?", "label": "question"}]},
        {"split": "test", "segments": [{"text": "a", "label": "unseen"}]},
    ]
    write(tmp_path, *map(json.dumps, rows))
    for _ in range(2):  # tokenized, then read from the shards
        data = data_of(tmp_path, shuffle_segments=False)
        documents = data.documents("train")
        keys = [DocumentKey(3, 10 + index, index) for index in (1, 0)]
        examples = documents.__getitems__(keys)
        assert [[part.label for part in one.document] for one in examples] == [
            ["text", "question"],
            ["question", "answer"],
        ]
        assert [(one.epoch, one.position, one.number, one.counts) for one in examples] == [
            (3, 11, 1, True),
            (3, 10, 0, True),
        ]
        assert data.labels == ["question", "answer", "text"]
        shuffled = data_of(tmp_path).documents("train")
        for epoch in range(10):  # a label goes with its segment
            for part in shuffled[DocumentKey(epoch, 0, 0)].document:
                (item,) = data.tokenizers["text"].decode([data.sequencer.codes(part)])
                assert item == {"question": "why?", "answer": "so"}[part.label]


def test_labels_of_documents_that_are_split_or_left_out(tmp_path):
    rows = [
        {"segments": [{"text": "x" * 40, "label": "book"}]},
        {"segments": [{"text": "a", "label": "note"}]},
    ]
    write(tmp_path, *map(json.dumps, rows))
    assert data_of(tmp_path, max_seq_length=20, long_documents="skip").labels == ["note"]
    split = data_of(tmp_path, max_seq_length=20, long_documents="split")
    assert split.labels == ["book", "note"]
    documents = split.documents("train")
    labels = [documents[DocumentKey(0, 0, index)].document[0].label for index in range(len(documents))]
    assert labels == ["book"] * 3 + ["note"]


def test_half_of_the_canvases_are_the_usual_one(tmp_path):
    """Within 4 standard deviations: it fails by chance once in 16,000 times. The others are of every size up to
    `most_units` alike: chi-square with 14 degrees of freedom, above 36.1 once in 1,000 times."""
    write(tmp_path, *rows_of(*("a" * length for length in range(1, 21))))
    data = data_of(tmp_path)
    documents, usual, epochs = data.documents("train"), data.seen.canvas["text"]["tokens"], 1600
    assert usual == 20
    counts = Counter(len(segment) for segment in texts_of(documents, 3, epochs))
    assert set(counts) == set(range(5, 21))  # of four tokens: one of EOS at least
    other = 0.5 / 16  # the usual size is drawn among the others, too
    share = 0.5 + other
    assert abs(counts[20] / epochs - share) < 4 * math.sqrt(share * (1 - share) / epochs)
    rest = [counts[size] for size in range(5, 20)]
    expected = sum(rest) / 15
    assert sum((count - expected) ** 2 / expected for count in rest) < 36.1


@pytest.mark.parametrize("max_eos_padding", [None, {"text": 3}])
def test_no_canvas_is_larger_than_generation_says(tmp_path, max_eos_padding):
    lengths = (0, 1, 5, 18, 19, 20, 21, 40, 81)
    write(tmp_path, *rows_of(*("a" * length for length in lengths), *["b" * 19] * 200))
    data = data_of(tmp_path, max_eos_padding=max_eos_padding)
    documents, usual = data.documents("train"), data.seen.canvas["text"]["tokens"]
    assert usual == 20
    for index, length in enumerate(lengths):
        most = most_units(length, usual, (max_eos_padding or {}).get("text"))
        sizes = Counter(len(segment) for segment in texts_of(documents, index, 300))
        assert min(sizes) == length + 1
        assert max(sizes) == most
        if max_eos_padding or length >= usual:  # the usual one has no place of its own
            assert max(sizes.values()) < 300 * (1 / len(sizes) + 4 * math.sqrt(1 / len(sizes) / 300)) or len(sizes) == 1
        else:
            assert sizes[usual] > 120


def test_what_does_not_end_has_no_eos(tmp_path):
    """A text of 40 bytes as three parts: only the last ends, and only it gets a canvas."""
    write(tmp_path, *rows_of("x" * 40), *rows_of(*["y" * 9] * 40))
    data = data_of(tmp_path, max_seq_length=17, long_documents="split")
    documents = data.documents("train")
    assert len(documents) == 43
    for index in range(3):
        segments = list(texts_of(documents, index, 40))
        ends = [len(segment) - segment.content for segment in segments]
        eos = data.vocabulary.eos_ids("text", segments[0].levels_N)[0]
        assert all(int((segment.ids_N == eos).sum()) == end for segment, end in zip(segments, ends, strict=True))
        assert (set(ends) == {0}) == (index < 2)
        assert index < 2 or min(ends) >= 1


def test_padding_follows_from_seed_epoch_and_document(tmp_path):
    write(tmp_path, *rows_of(*("a" * length for length in range(1, 21))))
    documents = data_of(tmp_path).documents("train")
    keys = [DocumentKey(epoch, 0, 2) for epoch in range(40)]
    one = [len(example.document[0]) for example in documents.__getitems__(keys)]
    assert one == [len(documents[key._replace(position=7)].document[0]) for key in keys]
    other = data_of(tmp_path, seed=1).documents("train")
    assert one != [len(other[key].document[0]) for key in keys]
    assert len(set(one)) > 5
