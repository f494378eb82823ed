import pytest
from multidiff_melody import MelodyTokenizer

from multidiff.testing import check_tokenizer
from multidiff.tokenizer import ItemError


def test_contract(tmp_path):
    check_tokenizer(MelodyTokenizer(longest=8), tmp_path)


def test_melodies_come_back_unchanged():
    tokenizer = MelodyTokenizer()
    assert tokenizer.decode(tokenizer.encode(tokenizer.examples())) == tokenizer.examples()


@pytest.mark.parametrize("item", [[(128, 1)], [(60, 0)], [(60, 17)], [(60, 1, 2), (62, 1, 2)], "c d e"])
def test_what_is_no_melody_is_refused(item):
    with pytest.raises(ItemError, match=r"melody|pitches"):
        MelodyTokenizer().encode([item])
