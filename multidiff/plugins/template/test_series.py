import pytest
from multidiff_series import SeriesTokenizer

from multidiff.testing import check_tokenizer
from multidiff.tokenizer import ItemError


def test_contract(tmp_path):
    check_tokenizer(SeriesTokenizer(), tmp_path)


def test_numbers_come_back_rounded():
    tokenizer = SeriesTokenizer(steps=3)
    assert tokenizer.decode(tokenizer.encode([[-1.0, 0.2, 0.9]])) == [[-1.0, 0.0, 1.0]]


@pytest.mark.parametrize("item", [[2.0], [float("nan")], ["a"], 7])
def test_what_is_no_signal_is_refused(item):
    with pytest.raises(ItemError, match=r"list of numbers|numbers must be from"):
        SeriesTokenizer().encode([item])
