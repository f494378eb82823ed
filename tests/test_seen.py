"""What a model has seen: orders of segments, sizes of canvases, defaults, and remarks on what lies outside."""

import json
from collections import Counter

import pytest

from multidiff.seen import SeenDocuments, most_units, usual_units

VARIES = {"image": False, "text": True}


def seen(shuffled=False, slack=None, orders=None):
    orders = orders or {("text", "image"): 3, ("image", "text", "text"): 2}
    sizes = {
        "text": Counter({json.dumps({"tokens": length}): 1 for length in range(1, 21)}),
        "image": Counter({json.dumps({"height": 8, "width": 8}): 1, json.dumps({"height": 8, "width": 16}): 2}),
    }
    return SeenDocuments.of(Counter(orders), sizes, shuffled, slack or {}, VARIES)


def test_the_usual_canvas_holds_nearly_all_items_and_their_end():
    assert usual_units(Counter(range(1, 101))) == 96
    assert usual_units(Counter({3: 1})) == 4
    assert usual_units(Counter({3: 95, 900: 5})) == 4


@pytest.mark.parametrize(
    ("length", "usual", "slack", "most"), [(3, 20, None, 20), (40, 20, None, 50), (0, 1, None, 1), (3, 20, 2, 5)]
)
def test_canvases_reach_what_generation_fills_in(length, usual, slack, most):
    assert most_units(length, usual, slack) == most


def test_facts_of_a_split():
    one = seen()
    assert one.canvas == {"text": {"tokens": 20}, "image": {"height": 8, "width": 16}}
    assert one.sizes == {"text": {"tokens": (2, 25)}, "image": {"height": (8, 8), "width": (8, 16)}}
    assert one.orders == (("text", "image"), ("image", "text", "text"))
    assert seen(slack={"text": 1}).sizes["text"] == {"tokens": (2, 21)}
    assert seen(shuffled=True, orders={("text", "image"): 1, ("image", "text"): 1}).orders == (("image", "text"),)


def test_orders_are_those_of_training():
    one = seen()
    assert one.order_of(["text", "image"]) == [0, 1]
    assert one.order_of(["text", "text", "image"]) == [2, 0, 1]
    assert one.order_of(["image", "image"]) is None
    assert seen(orders={("text", "image"): 1}).order_of(["image", "text"]) == [1, 0]
    assert seen(shuffled=True, orders={("text", "image"): 1}).order_of(["image", "text"]) == [0, 1]


def test_remarks_say_what_to_do():
    one = seen(orders={("text", "image"): 1})
    assert one.remarks([("text", None), ("image", {"height": 8, "width": 12})]) == []
    (order,) = one.remarks([("image", None), ("text", {"tokens": 20})])
    assert order.endswith("order image, text. Put them in the order text, image.")
    (size,) = one.remarks([("text", {"tokens": 32})])
    assert "canvases of 2 to 25 tokens of text, not of 32" in size
    (never,) = one.remarks([("image", None), ("image", None)])
    assert never.startswith("No training document of this model held")
    assert seen(shuffled=True).remarks([("text", None), ("image", None), ("text", None)]) == []


def test_more_orders_than_can_be_kept_are_not_remarked_on():
    many = seen(orders={("text",) * length: 1 for length in range(1, 1002)})
    assert many.remarks([("image", None), ("text", None)]) == []


def test_facts_survive_json_and_damage_is_named():
    one = seen()
    plain = json.loads(json.dumps(one.to_dict()))
    assert SeenDocuments.from_dict(plain, "x") == one
    for key, value in {
        "orders": 7, "shuffled": 1, "sizes": {"text": {"tokens": [1]}}, "canvas": {"text": {"tokens": "3"}},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=r"a\.json does not say"):
            SeenDocuments.from_dict(plain | {key: value}, "a.json")
    del plain["orders"]
    with pytest.raises(ValueError, match=r"a\.json does not say"):
        SeenDocuments.from_dict(plain, "a.json")
