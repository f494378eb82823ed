"""The order of documents: a shuffle, the same for everyone, in windows; and the shares of mixed sources."""

import numpy as np
import pytest
from scipy.stats import chi2, kstest

from multidiff.data import Mixture
from multidiff.data.order import MixedOrder, ShuffledOrder, Weight

SIZES = [700, 300, 512, 1, 487]
STARTS = np.concatenate([[0], np.cumsum(SIZES)])
TOTAL = sum(SIZES)


def order(window, seed=1):
    return ShuffledOrder(STARTS, seed, window=window)


@pytest.mark.parametrize("window", [1, 64, 256, 10_000])
def test_every_document_once_an_epoch_in_any_pieces(window):
    one = order(window)
    epochs = [one.indices(epoch, 0, TOTAL) for epoch in (0, 1)]
    assert all(sorted(epoch) == list(range(TOTAL)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    pieces = [index for start in range(0, TOTAL, 33) for index in order(window).indices(1, start, start + 33)]
    assert pieces == epochs[1]
    assert order(window, seed=2).indices(0, 0, TOTAL) != epochs[0]


def test_a_window_reads_few_shards():
    places = order(256).indices(3, 0, TOTAL)
    for start in range(0, TOTAL, 256):
        shards = {int(np.searchsorted(STARTS, index, side="right")) - 1 for index in places[start : start + 256]}
        assert len(shards) <= 4  # of five; a window of 256 touches the ends of some


def test_a_small_split_is_shuffled_as_a_whole():
    """Over many epochs, the place of a document is uniform, and the distance of two is as in random permutations.
    Chi-square, each wrong once in 1,000 times."""
    one, count, number = ShuffledOrder(np.array([0, 4, 6, 10]), 7), 2000, 10
    epochs = np.array([one.indices(epoch, 0, number) for epoch in range(count)])
    table = np.array([[(epochs[:, place] == document).sum() for place in range(number)] for document in range(number)])
    statistic = ((table - count / number) ** 2 / (count / number)).sum()
    assert statistic < chi2.ppf(0.999, (number - 1) ** 2)
    place = np.argsort(epochs, 1)
    apart = place[:, 3] - place[:, 4]  # neighbours in different shards
    together = place[:, 0] - place[:, 1]  # in one shard
    for distance in (apart, together):
        share = [(distance == d).sum() for d in range(-9, 10) if d]
        expected = np.array([(10 - abs(d)) / 90 * count for d in range(-9, 10) if d])
        assert ((share - expected) ** 2 / expected).sum() < chi2.ppf(0.999, 17)


def test_windows_mix_what_they_hold():
    """In a window, the order says nothing of where a document stood, and neighbours come from different shards."""
    places = np.array(ShuffledOrder(np.arange(0, 2**14 + 1, 2**7), 3, window=2**12).indices(0, 0, 2**14))
    for start in range(0, 2**14, 2**12):
        window = places[start : start + 2**12]
        ranks = np.argsort(np.argsort(window)) / len(window)
        assert kstest(ranks[: len(window) // 8], "uniform").pvalue > 1e-3
        shards = window // 2**7
        assert (shards[1:] != shards[:-1]).mean() > 0.9


def test_sources_are_mixed_in_proportion():
    """Chi-square with 2 degrees of freedom: above 13.8 once in 1,000 times. Every source has epochs of its own."""
    orders = [ShuffledOrder(np.array([0, size]), 1, number) for number, size in enumerate((50, 200, 1000))]
    mixed = MixedOrder(orders, [Weight.of(weight, "x") for weight in (1, 2, 5)], 9)
    taken = mixed.start()
    drawn = mixed.take(taken, 4000)
    counts = np.bincount([one.source for one in drawn])
    expected = np.array([500, 1000, 2500])
    assert ((counts - expected) ** 2 / expected).sum() < 13.8
    assert taken == counts.tolist()
    for source, size in enumerate((50, 200, 1000)):
        mine = [one for one in drawn if one.source == source]
        for epoch in range(len(mine) // size):
            assert sorted(one.index for one in mine[epoch * size : (epoch + 1) * size]) == list(range(size))
            assert {one.epoch for one in mine[epoch * size : (epoch + 1) * size]} == {epoch}
    again = mixed.start()
    assert [one for number in (1, 999, 3000) for one in mixed.take(again, number)] == drawn


def test_weights_change_over_training():
    weight = Weight.of([[100, 1.0], [200, 3.0], [300, 0.0]], "x")
    assert [weight.at(seen) for seen in (0, 100, 150, 200, 250, 300, 999)] == [1, 1, 2, 3, 1.5, 0, 0]
    orders = [ShuffledOrder(np.array([0, 100]), 1, number) for number in range(2)]
    mixed = MixedOrder(orders, [Weight.of([[0, 1.0], [1000, 0.0]], "a"), Weight.of([[0, 0.0], [1000, 1.0]], "b")], 2)
    sources = [one.source for one in mixed.take(mixed.start(), 2000)]
    assert 10 < sum(sources[:250]) < 60  # an eighth of 250 are 31, with a standard deviation of 5
    assert sum(sources[1000:]) == 1000


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"c": 1}, "weights: no source is called 'c'. There are a, b"),
        ({"a": -1}, "weight of source 'a' must be a number of at least 0, or pairs"),
        (
            {"a": [[0, 1], [0, 2]]},
            "must be a number of at least 0, or pairs of documents seen and such a number, in order",
        ),
        ({"a": []}, "must be a number"),
        ({"a": "much"}, "must be a number"),
        ({"a": 0, "b": 0}, "The weights of all sources are 0 after 0 documents"),
        ({"a": [[0, 1], [50, 0]], "b": [[0, 1], [70, 0]]}, "The weights of all sources are 0 after 70 documents"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture({"a": "x", "b": "y"}, weights)
    with pytest.raises(ValueError, match="needs at least one source"):
        Mixture({})
