"""Which items each batch of an epoch holds."""

import numpy as np
import pytest

from multidiff.data.batches import DocumentBatches, DocumentKey, Limits, ShuffledBatches, evaluation_batches
from multidiff.data.order import MixedOrder, ShuffledOrder, Weight


def test_shuffled_batches_cover_split_and_resume():
    ranks = [ShuffledBatches(23, 3, seed=5, rank=rank, ranks=2) for rank in range(2)]
    first = [[key for batch in rank for key in batch] for rank in ranks]
    assert all(len(keys) == 9 for keys in first)
    assert len({key for keys in first for key in keys}) == 18
    assert {epoch for keys in first for epoch, _ in keys} == {0}
    second = [[key for batch in rank for key in batch] for rank in ranks]
    assert {epoch for keys in second for epoch, _ in keys} == {1}
    assert [i for _, i in first[0]] != [i for _, i in second[0]]
    one = ShuffledBatches(23, 3, seed=5)
    iterator = iter(one)
    head = [next(iterator) for _ in range(4)]
    other = ShuffledBatches(23, 3, seed=5)
    other.load_state_dict(one.state_dict())
    assert head + list(other) == list(ShuffledBatches(23, 3, seed=5))
    assert next(iter(other))[0][0] == 1
    assert len(list(ShuffledBatches(2, 64, seed=0))) == 1


def order_of(*sizes, weights=None, window=8):
    """An order of sources, each of shards of some documents."""
    orders = [
        ShuffledOrder(np.concatenate([[0], np.cumsum(shards)]), 5, number, window=window)
        for number, shards in enumerate(sizes)
    ]
    return MixedOrder(orders, weights, 5)


def batches_of(order, batch_size=None, max_tokens=None, rank=0, ranks=1):
    """Batches of documents of which number i has 1 + i % 7 tokens."""
    offsets = [0, *np.cumsum([len(one) for one in order.orders]).tolist()[:-1]]
    limits = Limits(batch_size, max_tokens, lambda keys: [1 + key.index % 7 for key in keys])
    return DocumentBatches(order, offsets, limits, rank, ranks)


def tokens(batch):
    return sum(1 + key.index % 7 for key in batch)


@pytest.mark.parametrize(("documents", "batch_size"), [(23, 3), (24, 6), (7, 1), (10, 64)])
def test_two_ranks_take_apart_each_step_of_one_that_has_both_their_batches(documents, batch_size):
    """Step by step the positions of two ranks are those of one with batches of twice the size."""
    order = order_of([documents])
    ranks = [batches_of(order, batch_size, rank=rank, ranks=2) for rank in range(2)]
    one = batches_of(order, 2 * ranks[0].limits.batch_size)
    for epoch in range(2):
        whole, halves = list(one), [list(rank) for rank in ranks]
        assert len(whole) == len(halves[0]) == len(halves[1]) == len(one)
        place = 0
        for both, *parts in zip(whole, *halves, strict=True):
            assert parts[0] + parts[1] == both
            assert [key.position for key in both] == list(range(place, place + len(both)))
            assert all(isinstance(key, DocumentKey) and key.counts and key.epoch == epoch for key in both)
            place += len(both)
        assert len({key.index for batch in whole for key in batch}) == place


@pytest.mark.parametrize("limits", [{"batch_size": 3}, {"max_tokens": 12}, {"max_tokens": 15, "batch_size": 4}])
@pytest.mark.parametrize("weights", [None, [1, [[0, 3], [40, 0.5]]]], ids=["one", "mixed"])
def test_a_resumed_training_goes_on_whatever_its_processes(limits, weights):
    """Two processes, then one, then three: every document of an epoch once, in the order of one process."""
    sources = [[9, 11, 3, 17]] if weights is None else [[9, 11, 3], [6, 8]]
    mixed = None if weights is None else [Weight.of(weight, "x") for weight in weights]
    seen, state = [], None
    for ranks, steps in ((2, 2), (1, 1), (3, 1), (1, 40)):
        processes = [
            batches_of(order_of(*sources, weights=mixed), **limits, rank=rank, ranks=ranks) for rank in range(ranks)
        ]
        iterators = []
        for process in processes:
            if state:
                process.load_state_dict(state)
            iterators.append(iter(process))
        for _ in range(steps):
            parts = [next(iterator, None) for iterator in iterators]
            if parts[0] is None:
                break
            seen += [key for part in parts for key in part]
        state = processes[0].state_dict()
        assert all(process.state_dict() == state for process in processes)
    taken = order_of(*sources, weights=mixed)
    expected = taken.take(taken.start(), len(seen))
    offsets = [0, sum(sources[0])]
    assert [(key.epoch, key.index) for key in seen] == [
        (one.epoch, offsets[one.source] + one.index) for one in expected
    ]
    assert [key.position for key in seen] == list(range(len(seen)))
    assert len(seen) > sum(map(sum, sources)) - 12
    resumed = batches_of(order_of(*sources, weights=mixed), **limits)
    resumed.load_state_dict(state)
    assert next(iter(resumed))[0].position == 0  # the next epoch


def test_a_token_budget_is_used_and_never_exceeded():
    order = order_of([40, 30, 33], [50], weights=[Weight.of(1, "a"), Weight.of(2, "b")])
    processes = [
        batches_of(order_of([40, 30, 33], [50], weights=order.weights), max_tokens=25, rank=rank, ranks=2)
        for rank in (0, 1)
    ]
    for _ in range(3):
        parts = [list(process) for process in processes]
        assert len(parts[0]) == len(parts[1]) > 0
        sizes = [tokens(batch) for batches in parts for batch in batches]
        assert max(sizes) <= 25
        assert min(sizes) > 25 - 7  # a batch ends where the next document does not fit
    with pytest.raises(TypeError):
        len(processes[0])
    with pytest.raises(ValueError, match="A document has 7 tokens with its EOS padding, more than the max_tokens 6"):
        list(batches_of(order_of([40]), max_tokens=6))


def test_a_small_epoch_is_a_step():
    for ranks in (1, 2, 3):
        processes = [batches_of(order_of([4]), max_tokens=100, rank=rank, ranks=ranks) for rank in range(ranks)]
        for epoch in range(3):
            steps = [list(process) for process in processes]
            assert [len(batches) for batches in steps] == [1] * ranks
            keys = [key for ((*batch,),) in steps for key in batch]
            assert len({key.index for key in keys}) == len(keys) == 4 // ranks * ranks
            assert {key.epoch for key in keys} == {epoch}


def test_fewer_documents_than_ranks_are_refused():
    with pytest.raises(ValueError, match=r"fewer items \(1\) than there are processes that train \(2\)"):
        batches_of(order_of([1]), 3, rank=0, ranks=2)


def test_other_data_are_refused():
    state = batches_of(order_of([5], [7]), 1).state_dict()
    with pytest.raises(ValueError, match=r"was trained on 5 \+ 7 documents, but the data now have 5 documents"):
        batches_of(order_of([5]), 1).load_state_dict(state)


@pytest.mark.parametrize("limits", [{"batch_size": 3}, {"max_tokens": 12}])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_takes_each_document_once_in_as_many_batches(limits, ranks):
    bounds = Limits(
        limits.get("batch_size"), limits.get("max_tokens"), lambda keys: [1 + key.index % 7 for key in keys]
    )
    processes = [evaluation_batches(20, bounds, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in processes}) == 1
    keys = [key for batches in processes for batch in batches for key in batch]
    assert sorted(key.index for key in keys if key.counts) == list(range(20))
    assert all(batch for batches in processes for batch in batches)
    if "max_tokens" in limits:
        assert max(tokens(batch) for batches in processes for batch in batches) <= 12
