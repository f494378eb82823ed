"""Tasks: roles of labels, which tasks apply, and how often each is drawn."""

import math

import pytest

from multidiff.objectives import Task
from multidiff.objectives.tasks import choose_task, fitting_tasks


def test_roles_of_labels():
    task = Task({"question": "given", "answer": "target", "others": "removed"})
    assert [task.role_of(label) for label in ("question", "answer", "image")] == ["given", "target", "removed"]
    assert Task({"answer": "target"}).role_of("image") == "given"
    assert Task({"others": "target", "image": "absent"}).role_of("image") == "absent"


@pytest.mark.parametrize(
    ("roles", "labels", "applies"),
    [
        ({"a": "target"}, ["a"], True),
        ({"a": "target"}, ["b", "a", "a"], True),
        ({"a": "target"}, ["b"], False),
        ({"a": "target", "b": "removed"}, ["a"], False),  # it names b
        ({"a": "given", "others": "target"}, ["a", "b"], True),
        ({"a": "given", "others": "target"}, ["a"], False),  # nothing would be a target
        ({"others": "target"}, ["a"], True),
    ],
)
def test_a_task_applies_where_all_that_it_names_is(roles, labels, applies):
    assert Task(roles).applies(labels) == applies


def test_tasks_are_drawn_in_proportion_to_their_weights():
    one, other, never = Task({"a": "target"}, weight=3), Task({"others": "target"}), Task({"b": "target"}, weight=9)
    none = Task({"a": "target"}, weight=0)
    drawn = [choose_task(fitting_tasks([one, never, none, other], ["a"]), (i + 0.5) / 400) for i in range(400)]
    assert drawn == [one] * 300 + [other] * 100
    assert choose_task([one, other], 0.0) is one
    assert choose_task([one, other], math.nextafter(1, 0)) is other
    with pytest.raises(ValueError, match=r"No task applies to a document of b \+ c. Add a row to `tasks`"):
        fitting_tasks([one], ["b", "c"])
    with pytest.raises(ValueError, match="No task applies to a document of a"):
        fitting_tasks([none], ["a"])


def test_a_task_from_its_attributes():
    task = Task({"a": "target"}, condition_dropout=0.5)
    assert Task.of({"roles": {"a": "target"}, "condition_dropout": 0.5}) == Task.of(task)
    assert Task.of(task) is task
    with pytest.raises(ValueError, match=r"A task has no attribute 'wieght'. Did you mean 'weight'\?"):
        Task.of({"roles": {"a": "target"}, "wieght": 2})
    with pytest.raises(ValueError, match=r"A task has no attribute 'q'\. It has roles, weight"):
        Task.of({"roles": {"a": "target"}, "q": 2})
    for value in (None, "a", {"a": "target"}):
        with pytest.raises(ValueError, match="A task is a table with roles"):
            Task.of(value)


def test_bad_tasks():
    with pytest.raises(ValueError, match="has no target"):
        Task({"a": "given"})
    with pytest.raises(ValueError, match="'noised' is none of target, given, absent, removed"):
        Task({"a": "noised"})
    with pytest.raises(ValueError, match="must be a table of labels and roles"):
        Task(["a"])
    for dropout in (2, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"condition_dropout must be in \[0, 1\]"):
            Task({"a": "target"}, condition_dropout=dropout)
    for weight in (math.nan, -1, math.inf, "much"):
        with pytest.raises(ValueError, match="weight must be a number of at least 0"):
            Task({"a": "target"}, weight=weight)
    with pytest.raises(ValueError, match="noise must be independent or shared, not 'both'"):
        Task({"a": "target"}, noise="both")
