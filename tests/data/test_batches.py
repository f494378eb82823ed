"""Which items each batch of an epoch holds."""

import pytest

from multidiff.data.batches import DocumentBatches, DocumentKey, ShuffledBatches


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


@pytest.mark.parametrize(("documents", "batch_size"), [(23, 3), (24, 6), (7, 1), (10, 64)])
def test_two_ranks_take_apart_each_step_of_one_that_has_both_their_batches(documents, batch_size):
    """Step by step the positions of two ranks are those of one with batches of twice the size."""
    ranks = [DocumentBatches(documents, batch_size, seed=5, rank=rank, ranks=2) for rank in range(2)]
    one = DocumentBatches(documents, 2 * ranks[0].batch_size, seed=5)
    for epoch in range(2):
        whole, halves = list(one), [list(rank) for rank in ranks]
        assert len(whole) == len(halves[0]) == len(halves[1])
        place = 0
        for both, *parts in zip(whole, *halves, strict=True):
            assert sorted(parts[0] + parts[1]) == sorted(both)
            assert not set(parts[0]) & set(parts[1])
            assert sorted(key.position for key in both) == list(range(place, place + len(both)))
            assert all(isinstance(key, DocumentKey) and key.counts and key.epoch == epoch for key in both)
            place += len(both)
        assert len({key.index for batch in whole for key in batch}) == place


def test_a_resumed_rank_goes_on_with_its_positions():
    rank = DocumentBatches(23, 3, seed=5, rank=1, ranks=2)
    iterator = iter(rank)
    head = [next(iterator) for _ in range(2)]
    other = DocumentBatches(23, 3, seed=5, rank=1, ranks=2)
    other.load_state_dict(rank.state_dict())
    assert head + list(other) == list(DocumentBatches(23, 3, seed=5, rank=1, ranks=2))


def test_fewer_documents_than_ranks_are_refused():
    with pytest.raises(ValueError, match=r"fewer items \(1\) than there are processes that train \(2\)"):
        DocumentBatches(1, 3, seed=0, rank=0, ranks=2)
