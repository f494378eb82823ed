"""Bounds in nats per token and in bits per dimension of the items."""

import json
import math

import pytest
import torch

from multidiff import MaskSampler
from multidiff.evaluation import Bounds, EvaluationBatch, measure_folder, modes
from multidiff.sequence import Example, Sequencer, SharedVocabulary
from multidiff_bpe import BPETokenizer
from tests.helpers.pipelines import make
from tests.helpers.toys import Frames, Grid


class Sized(Grid):
    """A grid of four pixels a cell."""

    def dimensions(self, codes):
        return 4 * len(codes), "pixel"


class Counted(Frames):
    """Frames of half a second each."""

    def dimensions(self, codes):
        return codes.size["frames"] / 2, "second"


TOKENIZERS = {"picture": Sized(3, 1, 2), "sound": Counted((3,)), "note": Frames((4,))}
VOCABULARY = SharedVocabulary.of(TOKENIZERS)
SEQUENCER = Sequencer(TOKENIZERS, VOCABULARY)


def batch_of(*documents):
    examples = [
        Example([SEQUENCER.given(name, TOKENIZERS[name].encode([item])[0]) for name, item in one], -1, number, number)
        for number, one in enumerate(documents)
    ]
    return EvaluationBatch.of(examples, sequencer=SEQUENCER, seed=0)


def measure(documents, mode):
    """Ten nats for each token of the label, and what the documents have of them."""
    batch, (label, _, _) = documents.batch, mode.rpartition("/")
    mine_S = torch.tensor([mode == "joint" or other == label for other in batch.labels])
    tokens_D = torch.zeros(batch.num_documents, dtype=torch.float64)
    tokens_D.index_add_(0, batch.document_S, batch.divisor_S.where(mine_S, 0).double())
    return 10 * tokens_D, tokens_D


def estimates(*documents):
    bounds = Bounds(TOKENIZERS)
    for one in documents:
        bounds.add(batch_of(*one), measure)
    return {one.mode: one for one in bounds.estimates()}


def test_bits_are_nats_by_dimensions():
    found = estimates(
        [[("picture", [0, 1]), ("sound", [1, 2, 0])], [("sound", [1])]],
        [[("picture", [2, 2]), ("sound", [])]],
    )
    assert found.keys() == set(modes(["picture", "sound"])) | {"joint"}
    assert all(one.nats == pytest.approx(10) for one in found.values())
    # Two pictures of two codes and eight pixels; sounds of 3, 1 and 0 frames, and an EOS each.
    assert found["picture/conditional"].unit == "pixel"
    assert found["picture/conditional"].bits == pytest.approx(40 / 16 / math.log(2))
    assert found["picture/conditional"].bits_error == pytest.approx(0, abs=1e-6)
    assert found["sound/conditional"].unit == "second"
    assert found["sound/conditional"].bits == pytest.approx(10 * 7 / 2 / math.log(2))
    pairs = ((40, 1.5), (20, 0.5), (10, 0))  # nats and seconds, 35 nats a second
    squares = sum((nats - 35 * seconds) ** 2 for nats, seconds in pairs)
    assert found["sound/conditional"].bits_error == pytest.approx(math.sqrt(3 / 2 * squares) / 2 / math.log(2))
    # Pixels and seconds do not add up.
    assert found["joint"].unit is None
    assert math.isnan(found["joint"].bits)


def test_no_unit_where_an_item_has_none():
    found = estimates([[("note", [1, 2])], [("picture", [0, 1])]])
    assert found["note/unconditional"].unit is None
    assert found["picture/unconditional"].unit == "pixel"
    assert found["joint"].unit is None
    assert estimates([[("picture", [0, 1])]])["joint"].unit == "pixel"


def test_bounds_reduce_as_often_whatever_they_hold():
    calls = []

    def reduce(sums):
        calls.append(len(sums))
        return 2 * sums

    bounds = Bounds(TOKENIZERS)
    assert bounds.estimates(reduce) == []
    assert calls == [6] * 14
    bounds.add(batch_of([("note", [1, 2])], [("note", [1])]), measure)
    one, other = bounds.estimates(reduce), bounds.estimates()
    assert len(calls) == 28
    assert [(a.mode, a.nats) for a in one] == [(a.mode, a.nats) for a in other]


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"split": split, "segments": [{"text": text}, {"shout": text.upper()}]}
        for split in ("train", "test")
        for text in ("a", "bcd", "näh", "", "ghijk")
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def test_a_folder_of_texts_has_bits_per_byte(folder):
    pipe = make({"text": BPETokenizer(), "shout": BPETokenizer()}, {"text": MaskSampler(canvas={"tokens": 6})})
    found, documents = measure_folder(pipe, folder, draws=2)
    assert documents == 5
    found = {one.mode: one for one in found}
    assert found.keys() == set(modes(["text", "shout"]))
    # 13 bytes, and 13 codes with an EOS each of five texts.
    for mode in ("text/conditional", "shout/unconditional", "joint"):
        assert found[mode].unit == "byte"
        assert found[mode].bits * 13 * math.log(2) == pytest.approx(found[mode].nats * 18)
        assert 0 < found[mode].nats_error < found[mode].nats
    few, documents = measure_folder(pipe, folder, draws=2, max_documents=2, batch_size=1)
    assert documents == 2
    assert few[0].nats != found["text/conditional"].nats
    with pytest.raises(ValueError, match="draws must be at least 1, not 0"):
        measure_folder(pipe, folder, draws=0)


def test_a_folder_is_measured_the_same_in_any_batches(folder):
    pipe = make({"text": BPETokenizer(), "shout": BPETokenizer()})
    one, other = (measure_folder(pipe, folder, max_eos_padding={"text": 2}, batch_size=size)[0] for size in (2, 64))
    for a, b in zip(one, other, strict=True):
        assert a.mode == b.mode
        assert a.nats == pytest.approx(b.nats, rel=1e-12)
        assert a.nats_error == pytest.approx(b.nats_error, rel=1e-9)
