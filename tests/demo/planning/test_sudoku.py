"""Sudoku against enumeration: all boards, all of their symmetries, and every way of completing a puzzle."""

import random
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.planning.sudoku import Sudoku, is_unique, solutions

# Wikipedia's example of a Sudoku, and its solution.
KNOWN = "53__7____ 6__195___ _98____6_ 8___6___3 4__8_3__1 7___2___6 _6____28_ ___419__5 ____8__79"
SOLVED = "534678912 672195348 198342567 859761423 426853791 713924856 961537284 287419635 345286179"


def board_of(rows):
    return rows.replace(" ", "\n")


def cells_of(board):
    return [int(symbol) if symbol.isdigit() else 0 for symbol in board if symbol != "\n"]


@pytest.fixture(scope="module")
def boards():
    """All 4×4 boards, by trying all rows. Columns and boxes are checked with their places written out."""
    columns = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    boxes = [(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)]
    found = []
    for rows in product(permutations((1, 2, 3, 4)), repeat=4):
        cells = sum(rows, ())
        if all(len({cells[place] for place in unit}) == 4 for unit in columns + boxes):
            found.append(list(cells))
    return found


def completing(cells, boards):
    return [board for board in boards if all(given in (0, cell) for given, cell in zip(cells, board, strict=True))]


@pytest.fixture(scope="module")
def puzzles():
    generator = random.Random(0)
    return [Sudoku(4).draw(generator) for _ in range(200)]


def test_all_boards_are_found_once(boards):
    assert len(boards) == 288
    assert sorted(solutions([0] * 16)) == sorted(boards)
    assert sorted(solutions([0] * 16, random.Random(0))) == sorted(boards)


def test_solutions_are_those_of_enumeration(boards):
    """For boards with any digits in any cells, many of which contradict themselves."""
    generator = random.Random(0)
    numbers = set()
    for _ in range(300):
        cells = [generator.choice([0, 0, 0, 1, 2, 3, 4]) for _ in range(16)]
        expected = completing(cells, boards)
        assert sorted(solutions(cells)) == sorted(expected)
        assert is_unique(cells) == (len(expected) == 1)
        numbers.add(min(len(expected), 2))
    assert numbers == {0, 1, 2}


def test_every_puzzle_has_one_solution(puzzles, boards):
    for question, answer in puzzles:
        assert completing(cells_of(question), boards) == [cells_of(answer)]


def test_no_given_of_a_puzzle_can_go_that_was_meant_to_have_fewer(boards):
    generator = random.Random(0)
    for _ in range(50):
        question, _ = Sudoku(4, min_givens=0, max_givens=0).draw(generator)
        cells = cells_of(question)
        for place, digit in enumerate(cells):
            if digit:
                assert len(completing([*cells[:place], 0, *cells[place + 1 :]], boards)) > 1


@pytest.mark.parametrize(("family", "numbers"), [(Sudoku(4, 7, 9), {7, 8, 9}), (Sudoku(9, 45, 47), {45, 46, 47})])
def test_puzzles_have_the_givens_that_were_asked_for(family, numbers):
    """Where these are many, no puzzle needs more."""
    generator = random.Random(0)
    assert {family.givens(family.draw(generator)[0]) for _ in range(60)} == numbers


def test_known_puzzle_of_81_cells():
    question, answer = board_of(KNOWN), board_of(SOLVED)
    assert list(solutions(cells_of(question))) == [cells_of(answer)]
    assert Sudoku(9).solves(question, answer)
    assert Sudoku(9).givens(question) == 30
    # Without the 5 and the 3 of its first row it has more than one.
    assert not is_unique([0, 0, *cells_of(question)[2:]])


def test_drawn_puzzles_of_81_cells_have_one_solution():
    generator = random.Random(0)
    for _ in range(5):
        question, answer = Sudoku(9).draw(generator)
        assert list(solutions(cells_of(question))) == [cells_of(answer)]
        assert Sudoku(9).solves(question, answer)


def test_one_board_solves_a_puzzle(puzzles, boards):
    """Of all boards; and no board with a cell changed, nor a board of three rows."""
    texts = ["\n".join("".join(map(str, board[row : row + 4])) for row in range(0, 16, 4)) for board in boards]
    for question, answer in puzzles[:20]:
        assert [text for text in texts if Sudoku(4).solves(question, text)] == [answer]
        for place in (0, 7, 18):
            for symbol in "_1234 \n5":
                changed = answer[:place] + symbol + answer[place + 1 :]
                assert Sudoku(4).solves(question, changed) == (changed == answer)
        assert not Sudoku(4).solves(question, question)
        assert not Sudoku(4).solves(question, answer[:-5])


@given(st.text() | st.text("_123456789\n"))
def test_any_text_is_an_answer(answer):
    assert not Sudoku(9).solves(board_of(KNOWN), answer)


def symmetries(size):
    """All ways of moving cells that turn boards into boards: cell -> cell, as lists. For 4×4 cells there are 128."""
    lines = {4: [(0, 1, 2, 3), (1, 0, 2, 3), (0, 1, 3, 2), (1, 0, 3, 2)]}[size]
    lines = lines + [tuple((line + 2) % 4 for line in one) for one in lines]
    for rows, columns, transposed in product(lines, lines, (False, True)):
        cells = [(row, column) for row in rows for column in columns]
        yield [column * 4 + row if transposed else row * 4 + column for row, column in cells]


def canonical(question):
    """The least of all puzzles that are symmetric to this one, its digits renamed in the order of their first cells."""
    cells, forms = cells_of(question), []
    for places in symmetries(4):
        names = {0: 0}
        forms.append([names.setdefault(cells[place], len(names)) for place in places])
    return tuple(min(forms))


def test_moves_of_cells_are_symmetries(boards):
    moves = {tuple(places) for places in symmetries(4)}
    assert len(moves) == 128
    whole = {tuple(board) for board in boards}
    assert all(tuple(boards[7][place] for place in places) in whole for places in moves)


def test_two_boards_are_all_but_for_symmetry(boards):
    """As `docs/planning.md` says."""
    assert len({canonical("".join(map(str, board))) for board in boards}) == 2


def test_symmetric_puzzles_have_one_key(puzzles):
    generator = random.Random(0)
    moves = list(symmetries(4))
    for question, _ in puzzles[:50]:
        cells, digits = cells_of(question), [0, *generator.sample(range(1, 5), 4)]
        moved = "".join(str(digits[cells[place]] or "_") for place in generator.choice(moves))
        board = "\n".join(moved[row : row + 4] for row in range(0, 16, 4))
        assert Sudoku(4).key(board) == Sudoku(4).key(question)


def test_keys_tell_most_puzzles_apart(puzzles):
    forms = {canonical(question) for question, _ in puzzles}
    keys = {Sudoku(4).key(question) for question, _ in puzzles}
    assert 0.95 * len(forms) < len(keys) <= len(forms)
    assert all(0 <= key < 2**64 for key in keys)


def test_keys_of_81_cells_know_digits_bands_and_transposition():
    generator = random.Random(0)
    rows = KNOWN.split()
    key = Sudoku(9).key("\n".join(rows))
    digits = dict(zip("123456789", generator.sample("123456789", 9), strict=True))
    renamed = ["".join(digits.get(symbol, symbol) for symbol in row) for row in rows]
    bands = [rows[6], rows[8], rows[7], *rows[0:3], rows[4], rows[3], rows[5]]
    for same in (renamed, bands, ["".join(column) for column in zip(*bands, strict=True)]):
        assert Sudoku(9).key("\n".join(same)) == key
    swapped = [rows[3], *rows[1:3], rows[0], *rows[4:]]  # rows of two bands: not a symmetry
    other = ["_" + rows[0][1:], *rows[1:]]
    assert len({key, Sudoku(9).key("\n".join(swapped)), Sudoku(9).key("\n".join(other))}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 6}, "must be 4 or 9, not 6"),
        ({"min_givens": 12}, "not 12 to 10"),
        ({"size": 9, "max_givens": 82}, "within 0 and 81, not 26 to 82"),
    ],
)
def test_settings_that_make_no_puzzle_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sudoku(**arguments)
