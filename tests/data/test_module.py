"""The data module: documents as they were written, and bad settings."""

import pytest
import torch

from multidiff.data import DocumentDataModule
from multidiff.data.batches import DocumentKey
from tests.helpers.runs import WORDS, write_folder


def data_of(folder, **options):
    return DocumentDataModule(str(folder), {"text": {"plugin": "bpe"}, "shout": {"plugin": "bpe"}}, **options)


def test_documents_hold_what_was_written(tmp_path):
    data = data_of(write_folder(tmp_path), max_eos_padding={"text": 2})
    documents = data.documents("validation")
    for index in range(len(documents)):
        segments = documents[DocumentKey(0, 0, index)].document
        items = [data.tokenizers[s.tokenizer].decode([data.sequencer.codes(s)])[0] for s in segments]
        assert sorted(items, key=str.isupper) == [WORDS[(4 * index + 2) % 8], WORDS[(4 * index + 2) % 8].upper()]
        again = documents[DocumentKey(0, 0, index)].document
        assert all(torch.equal(a.ids_N, b.ids_N) for a, b in zip(segments, again, strict=True))
    sizes = {
        len(segment)
        for epoch in range(20)
        for segment in documents[DocumentKey(epoch, 0, 0)].document
        if segment.tokenizer == "text"
    }
    assert sizes == {4, 5}


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_eos_padding nose"):
        data_of(tmp_path, max_eos_padding={"nose": 1})
    with pytest.raises(ValueError, match="max_eos_padding image: its length never varies"):
        DocumentDataModule(str(tmp_path), {"image": {"plugin": "vq"}}, max_eos_padding={"image": 3})
    with pytest.raises(ValueError, match="batch_size 0"):
        data_of(tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="Did you mean 'bpe'"):
        DocumentDataModule(str(tmp_path), {"text": {"plugin": "bp"}})
    with pytest.raises(ValueError, match="has no plugin"):
        DocumentDataModule(str(tmp_path), {"text": {}})
