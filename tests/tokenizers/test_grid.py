import pytest

from multidiff.testing import check_tokenizer
from multidiff.tokenizer import ItemError
from multidiff_grid import GridTokenizer


@pytest.mark.parametrize("symbols", ["#", "_123456789", "# \u00e9\U0001f642"])
def test_contract(symbols, tmp_path):
    check_tokenizer(GridTokenizer(symbols), tmp_path)


def test_cells_stand_where_patches_of_pictures_do():
    tokenizer = GridTokenizer(symbols="ba")
    (codes,) = tokenizer.encode(["aab\nbab"])
    assert codes.ids_N.tolist() == [1, 1, 0, 0, 1, 0]
    assert codes.coords_N3.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    assert tokenizer.decode([codes]) == ["aab\nbab"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (3, "must be a string"),
        ("", "equally long, and not empty"),
        ("a\n", "equally long"),
        ("ab\na", "equally long"),
        ("ac", "contains 'c', which is not one of 'ab'"),
        ("a\u2028b", r"contains '\\u2028'"),
    ],
)
def test_what_is_no_grid_is_refused(item, message, tmp_path):
    tokenizer = GridTokenizer("ab")
    for refuses in (lambda: tokenizer.encode([item]), lambda: tokenizer.read(item, tmp_path)):
        with pytest.raises(ItemError, match=message):
            refuses()


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ("", "at least one character"),
        (None, "at least one character, not None"),
        (0.1234, "must be a text, not the number 0.1234"),
        ("aba", "contain 'a' twice"),
        ("a\nb", r"'\\n', which breaks a line"),
        ("a\ud800", "half of a surrogate pair"),
    ],
)
def test_symbols_that_are_none_are_refused(symbols, message):
    with pytest.raises(ValueError, match=message):
        GridTokenizer(symbols)


def test_the_order_of_symbols_is_part_of_the_fingerprint():
    assert len({GridTokenizer(symbols).fingerprint for symbols in ("ab", "ba", "abc")}) == 3


def test_a_preview_shows_each_cell():
    blank, marked = (GridTokenizer(" #").preview(item) for item in ("  \n  ", "  \n #"))
    assert blank.size == (41, 41)
    assert blank.crop((0, 0, 41, 20)).tobytes() == marked.crop((0, 0, 41, 20)).tobytes()
    assert blank.crop((21, 21, 40, 40)).tobytes() != marked.crop((21, 21, 40, 40)).tobytes()
