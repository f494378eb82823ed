"""Stars and the paths through them."""

import random
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.planning.path_star import NODES, PathStar


def neighbours(question):
    edges, _, ends = question.partition("/")
    return [tuple(edge) for edge in edges.split(",")], ends


@pytest.mark.parametrize(("degree", "length"), [(2, 2), (5, 5), (2, 31), (61, 2)])
def test_the_graph_is_a_star(degree, length):
    question, answer = PathStar(degree, length).draw(random.Random(0))
    edges, (start, goal) = neighbours(question)
    assert len(set(edges)) == len(edges) == degree * (length - 1)
    entered = Counter(b for _, b in edges)
    left = Counter(a for a, _ in edges)
    assert set(entered.values()) == {1}  # a tree
    assert start not in entered
    assert left[start] == degree
    assert all(number == 1 for node, number in left.items() if node != start)
    assert goal in entered
    assert goal not in left
    assert len(answer) == length


def test_one_text_solves_a_question():
    """Of all texts of up to four of its nodes."""
    family, generator = PathStar(2, 3), random.Random(0)
    for _ in range(10):
        question, answer = family.draw(generator)
        nodes = sorted({node for edge in neighbours(question)[0] for node in edge})
        texts = ["".join(text) for length in range(5) for text in product(nodes, repeat=length)]
        assert len(texts) == 1 + 5 + 25 + 125 + 625
        assert [text for text in texts if family.solves(question, text)] == [answer]


@given(st.text())
def test_any_text_is_an_answer(answer):
    assert PathStar().solves("ab,bc,ad,de/ac", answer) == (answer == "abc")


def test_every_arm_is_asked_for_wherever_its_edges_stand():
    family, generator = PathStar(3, 3), random.Random(0)
    first, goals = Counter(), Counter()
    for _ in range(600):
        question, answer = family.draw(generator)
        edges, _ = neighbours(question)
        first[edges.index((answer[0], answer[1]))] += 1
        goals[answer[-1]] += 1
    assert set(first) == set(range(6))
    assert min(first.values()) > 60  # of 100 expected
    assert set(goals) == set(NODES)


def test_the_order_of_edges_is_no_part_of_the_key():
    family = PathStar(2, 3)
    keys = {family.key(question) for question in ("ab,bc,ad,de/ac", "de,ab,ad,bc/ac")}
    assert len(keys) == 1
    assert family.key("ab,bc,ad,de/ae") not in keys
    assert family.key("ab,bf,ad,de/af") not in keys


@pytest.mark.parametrize(("degree", "length"), [(1, 5), (5, 1), (2, 32), (31, 3)])
def test_stars_that_do_not_exist_are_refused(degree, length):
    with pytest.raises(ValueError, match=r"must be at least 2|has 6[35] nodes, but there are only 62 names"):
        PathStar(degree, length)
