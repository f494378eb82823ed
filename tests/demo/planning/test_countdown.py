"""Countdown against a search through all equations."""

import random
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.planning.countdown import Countdown


def reachable(numbers):
    """All lists of equations that use all of these numbers, each with its last result: whole and not negative."""
    if len(numbers) == 1:
        yield [], numbers[0]
    for first in range(len(numbers)):
        for second in range(len(numbers)):
            if first == second:
                continue
            a, b = numbers[first], numbers[second]
            rest = [number for place, number in enumerate(numbers) if place not in (first, second)]
            fraction = Fraction(a, b) if b else Fraction(-1)
            for sign, result in [("+", a + b), ("-", a - b), ("*", a * b), ("/", fraction)]:
                if result >= 0 and Fraction(result).denominator == 1:
                    for equations, last in reachable([*rest, int(result)]):
                        yield [f"{a}{sign}{b}={int(result)}", *equations], last


@pytest.mark.parametrize("numbers", [[3, 5, 10], [6, 6, 6], [1, 12, 4], [8, 8, 2]])
def test_answers_are_those_of_a_search(numbers):
    """Every list of equations ends somewhere; it solves the questions for that target, and no other."""
    lists = list(reachable(numbers))
    targets = {last for _, last in lists}
    assert len(targets) >= 10
    text = ",".join(map(str, numbers))
    for equations, last in lists:
        for target in targets:
            assert Countdown(3).solves(f"{text}:{target}", ",".join(equations)) == (target == last)


def test_drawn_answers_are_right_and_within_the_rules():
    generator, family = random.Random(0), Countdown(numbers=4, largest=30)
    signs = set()
    for _ in range(100):
        question, answer = family.draw(generator)
        numbers, target = question.split(":")
        assert 10 <= int(target) <= 100
        assert all(1 <= int(number) <= 30 for number in numbers.split(","))
        assert all(1 <= int(number) <= 999 for number in re.findall(r"\d+", answer))
        assert family.solves(question, answer)
        assert (answer.split(","), int(target)) in list(reachable(list(map(int, numbers.split(",")))))
        signs |= set(re.findall(r"[-+*/]", answer))
    assert signs == set("+-*/")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "86+28=114",  # numbers are left
        "86+28=114,31-13=18",  # two numbers are left
        "86+28=114,31-13=18,114-18=97",  # false
        "86+28=114,31-13=18,114+18=132",  # another target
        "86+28=114,31-13=18,114-18=96,",
        "86+28=114,31-13=18,114-18=96,96-0=96",  # 0 is none of the numbers
        "86+28=114,86+28=114,114-18=96",  # 86 stands there once
        "28-86=-58,31-13=18,114-18=96",
        "86+28=0114,31-13=18,114-18=96",
        "86 + 28=114,31-13=18,114-18=96",
        "86+28=114;31-13=18;114-18=96",
        "\u0668\u0666+28=114,31-13=18,114-18=96",  # Arabic digits
        "86+28=114,31-13=18,114-18=" + "9" * 5000,
    ],
)
def test_wrong_answers_are_refused(answer):
    question = "86,28,13,31:96"
    assert Countdown().solves(question, "86+28=114,31-13=18,114-18=96")
    assert Countdown().solves(question, "31-13=18,28+86=114,114-18=96")
    assert not Countdown().solves(question, answer)


def test_a_fraction_is_whole():
    assert Countdown(2).solves("84,7:12", "84/7=12")
    assert not Countdown(2).solves("85,7:12", "85/7=12")
    assert not Countdown(3).solves("7,7,5:0", "7-7=0,5/0=0")


@given(st.text("0123456789+-*/=,") | st.text())
def test_any_text_is_an_answer(answer):
    assert not Countdown(5).solves("1,2,3,4,5:97", answer)


def test_the_order_of_numbers_is_no_part_of_the_key():
    family = Countdown()
    assert family.key("86,28,13,31:96") == family.key("13,28,31,86:96")
    assert len({family.key(text) for text in ("86,28,13,31:96", "86,28,13,31:95", "86,28,13,32:96")}) == 3


@pytest.mark.parametrize("settings", [{"numbers": 1}, {"largest": 9}, {"largest": 1000}])
def test_settings_that_make_no_problem_are_refused(settings):
    with pytest.raises(ValueError, match="at least 2 numbers, the largest of them 10 to 999, not"):
        Countdown(**settings)
