"""Documents that are longer than a model should take: refused, left out, cropped or split."""

import json
from itertools import chain

import pytest

from multidiff.data.batches import DocumentKey
from multidiff.data.documents import Documents
from multidiff.data.length import select
from multidiff.data.shards import Counts, Kind, Row, ShardFolder, write_shard
from multidiff.data.splits import Split
from multidiff.sequence import SharedVocabulary
from multidiff.sequence.sequencer import Sequencer
from tests.helpers.data import data_of, rows_of, write
from tests.helpers.toys import Frames, Grid

TOKENIZERS = {"picture": Grid(5, 2, 3), "speech": Frames((4, 3)), "note": Frames((6,))}
SEQUENCER = Sequencer(TOKENIZERS, SharedVocabulary.of(TOKENIZERS))


class Listed:
    """A source, as far as messages need one."""

    name = "d/metadata.jsonl"

    def where(self, part, line):
        return f"{self.name}, line {line}"


@pytest.fixture
def documents_of(tmp_path):
    def make(*rows, most=None, long="raise", split="train"):
        """Documents of rows of (name, item), as shards hold them, three in a shard."""
        counts, infos = Counts(), []
        for first in range(0, len(rows), 3):
            some = []
            for line, row in enumerate(rows[first : first + 3], start=first + 1):
                codes = [TOKENIZERS[name].encode([item])[0] for name, item in row]
                kinds = [
                    Kind(name, name, json.dumps(one.size), len(one)) for (name, _), one in zip(row, codes, strict=True)
                ]
                counts.add(kinds)
                some.append(Row(line, kinds, [one.ids_N.int().numpy() for one in codes]))
            infos.append(write_shard(tmp_path, f"{split}-{first}.arrow", 0, some))
        found = Split(ShardFolder(tmp_path, {split: infos}, {split: counts}), split, Listed())
        selection, _ = select(found, TOKENIZERS, most, long)
        return Documents([(found, selection)], SEQUENCER, usual={}, max_eos_padding={}, seed=0, shuffled=False)

    return make


def document(documents, index, epoch=0):
    return documents[DocumentKey(epoch, 0, index)].document


def items(documents, index):
    return [(name, TOKENIZERS[name].decode([codes])[0]) for name, codes in documents.codes(index)]


def notes(*counts):
    return [("note", [index % 6 for index in range(count)]) for count in counts]


PICTURE = ("picture", [1] * 6)
SPEECH = ("speech", [index % 4 if index % 2 == 0 else index % 3 for index in range(40)])  # 20 frames of 2 codes


def test_length_counts_structure_and_codes(tmp_path):
    """The recorded length is that of the batch that the sequencer makes, less its EOS."""
    write(tmp_path, *rows_of("abc", ""))
    data = data_of(tmp_path)
    for index, length in ((0, 1 + 2 + 3), (1, 1 + 2)):
        (segment,) = document(data.documents("train"), index)
        assert data.sequencer.batch([[segment]]).ids_P.numel() - (len(segment) - segment.content) == length
        ((split, _),) = data.documents("train").parts
        assert split.shard(0).length_D[index] == length


def test_a_long_document_is_refused_by_file_and_line(tmp_path):
    write(tmp_path, *rows_of("short", "x" * 20, "x" * 30))
    data = data_of(tmp_path, max_seq_length=20)
    with pytest.raises(
        ValueError,
        match=rf"{tmp_path}/metadata.jsonl, line 2: the document has 23 tokens, more than max_seq_length 20",
    ):
        data.documents("train")
    (place,) = (tmp_path / ".tokenized").iterdir()
    assert len(data_of(tmp_path, max_seq_length=None).documents("train")) == 3
    assert len(data_of(tmp_path, max_seq_length=23, long_documents="skip").documents("train")) == 2
    assert list((tmp_path / ".tokenized").iterdir()) == [place]  # the limit is none of their business


def test_long_documents_are_skipped_counted_and_listed(documents_of, caplog):
    rows = [notes(20), notes(3), notes(30)]
    with caplog.at_level("INFO"):
        documents = documents_of(*rows, most=10, long="skip")
    assert [items(documents, index) for index in range(len(documents))] == [notes(3)]
    assert (
        "than max_seq_length 10 are left out: 2 of 3 in split 'train', "
        "d/metadata.jsonl, line 1, d/metadata.jsonl, line 3." in caplog.text
    )
    assert "WARNING: 67% of split 'train' is left out" in caplog.text
    with pytest.raises(ValueError, match=r"d/metadata.jsonl: all 2 documents .*, line 1, d/metadata.jsonl, line 2\)"):
        documents_of(notes(20), notes(30), most=10, long="skip")


def test_cropped_documents_fit_and_lose_the_ends_of_their_longest_segments(documents_of):
    # 23 tokens, 9 of them <bos> and structure: 14 for codes, of which the picture takes 6, a note 2.
    row = [*notes(2), PICTURE, SPEECH, *notes(50)]
    documents = documents_of(notes(5), row, most=23, long="crop")
    assert items(documents, 0) == notes(5)
    note, picture, speech, long_note = items(documents, 1)
    assert [note, picture] == [*notes(2), PICTURE]
    assert speech == ("speech", SPEECH[1][:2])  # one of 20 frames: whole, all its levels
    assert long_note == notes(4)[0]
    for epoch in range(3):
        segments = document(documents, 1, epoch)
        assert [len(segment) - segment.content for segment in segments][1:] == [0, 0, 0]  # no EOS where none belongs
        assert len(segments[0]) > segments[0].content
        batch = SEQUENCER.batch([segments])
        assert batch.ids_P.numel() <= 23 + len(segments[0]) - segments[0].content


@pytest.mark.parametrize("most", range(17, 60))
def test_crops_are_as_long_as_fits(documents_of, most):
    (row,) = (document(documents_of([PICTURE, SPEECH, *notes(15)], most=most, long="crop"), 0),)
    lengths = {segment.tokenizer: segment.content for segment in row}
    total = 7 + sum(lengths.values())
    assert min(most, 7 + 6 + 40 + 15) - 1 <= total <= most or total == 68
    assert lengths["speech"] % 2 == 0
    assert lengths["note"] == 15 or lengths["speech"] - lengths["note"] in (-1, 0, 1)


def test_split_keeps_all_codes_in_order(documents_of):
    rows = [notes(5), [SPEECH], notes(50), notes(17)]
    documents = documents_of(*rows, most=20, long="split")
    ((_, selection),) = documents.parts
    places = [selection.place(index) for index in range(8)]
    assert [3 * place.shard + place.row for place in places] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert [place.piece for place in places] == [0, 0, 1, 2, 0, 1, 2, 0]
    pieces = [items(documents, index)[0][1] for index in range(len(documents))]
    assert pieces[0] == notes(5)[0][1]
    assert list(chain(*pieces[1:4])) == SPEECH[1]
    assert [len(piece) for piece in pieces] == [5, 12, 14, 14, 16, 17, 17, 17]
    assert list(chain(*pieces[4:7])) == notes(50)[0][1]
    ends = [len(segment) - segment.content for (segment,) in (document(documents, index) for index in range(8))]
    assert [bool(end) for end in ends] == [True, False, False, True, False, False, True, True]


@pytest.mark.parametrize(
    ("long", "row", "message"),
    [
        ("crop", [PICTURE, PICTURE], "segments of fixed length leave too little room"),
        ("crop", [PICTURE, *notes(9)], "segments of fixed length leave too little room"),
        ("split", [*notes(50), *notes(1)], "Only a document of one segment of varying length can be split"),
        ("split", [PICTURE, PICTURE], "Only a document of one segment of varying length can be split"),
    ],
)
def test_what_cannot_be_cropped_or_split_is_refused(documents_of, long, row, message):
    with pytest.raises(ValueError, match=f"d/metadata.jsonl, line 2: the document has .* tokens.*{message}"):
        documents_of(notes(1), row, most=11, long=long)


def test_bad_limits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_seq_length 0 must be at least 1"):
        data_of(tmp_path, max_seq_length=0)
    with pytest.raises(ValueError, match="long_documents 'cut' is none of raise, skip, crop, split"):
        data_of(tmp_path, long_documents="cut")
