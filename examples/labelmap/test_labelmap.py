import numpy as np
import pytest
from multidiff_labelmap import LabelMapTokenizer

from multidiff.testing import check_tokenizer
from multidiff.tokenizer import ItemError


def test_contract(tmp_path):
    check_tokenizer(LabelMapTokenizer(classes=5, cell=2), tmp_path)


def test_a_cell_takes_the_class_of_most_of_its_pixels():
    tokenizer = LabelMapTokenizer(classes=4, cell=2)
    item = np.array([[1, 1, 3, 0], [1, 2, 0, 3]], np.uint8)
    (codes,) = tokenizer.encode([item])
    assert codes.ids_N.tolist() == [1, 0]
    assert tokenizer.decode([codes])[0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    "item",
    [np.full((4, 4), 9, np.uint8), np.zeros((3, 4), np.uint8), np.zeros((4, 4)), np.zeros((0, 4), np.uint8), "x"],
)
def test_what_is_no_class_map_is_refused(item):
    with pytest.raises(ItemError, match=r"class map|is none of the"):
        LabelMapTokenizer(classes=4, cell=2).encode([item])
