"""Two processes: the same gradient as one, clear errors on each of them, nothing that waits for ever."""

import pytest
import torch

from multidiff.data import DocumentDataModule
from multidiff.objectives import Noising, Objective, Task
from tests.helpers.ranks import TOKENIZERS, continued, examples_of, gradient


@pytest.mark.filterwarnings("ignore:You defined a .validation_step.:UserWarning")
@pytest.mark.parametrize("normalisation", ["targets", "masked"])
def test_every_token_counts_the_same_in_any_layout_of_a_step(ranks_folder, of_ranks, normalisation):
    """Eight documents at once, four times two accumulated, a part of an accumulation, twice four on two ranks."""
    examples, sequencer = examples_of(ranks_folder / "data")
    once = gradient([examples], sequencer, normalisation)
    pairs = [examples[start : start + 2] for start in range(0, 8, 2)]
    layouts = {
        "accumulated": gradient(pairs, sequencer, normalisation, accumulate=4),
        "the end of an epoch": gradient([examples[:6], examples[6:]], sequencer, normalisation, accumulate=3),
        "ranks": torch.tensor(of_ranks[0][normalisation], dtype=torch.float64),
    }
    assert once.norm() > 0.1
    for name, layout in layouts.items():
        assert float((layout - once).norm() / once.norm()) < 1e-6, name
    alone = gradient([examples[:4]], sequencer, normalisation)
    assert float((alone - once).norm() / once.norm()) > 0.01  # the layouts could differ


def noised(folder, rank, ranks, batch_size):
    """What a rank's loader serves in the first two epochs: each document by itself, by its place in its epoch."""
    data = DocumentDataModule(str(folder), TOKENIZERS, batch_size=batch_size)
    data.rank = lambda: (rank, ranks)
    noising = Noising(data.sequencer, [Task({"others": "target"})], Objective(), seed=1)
    data.collate = lambda examples: [(example, noising([example])) for example in examples]
    loader = data.train_dataloader()
    served = [one for _ in range(2) for batch in loader for one in batch]
    return {(example.epoch, example.position): (example, batch) for example, batch in served}


def test_a_document_gets_the_same_noise_on_any_rank_and_in_any_batch(ranks_folder):
    alone = noised(ranks_folder / "data", 0, 1, 6)
    ranks = [noised(ranks_folder / "data", rank, 2, 3) for rank in range(2)]
    assert alone.keys() == ranks[0].keys() | ranks[1].keys()
    assert len(alone) == 48
    assert not ranks[0].keys() & ranks[1].keys()
    for key, (example, batch) in alone.items():
        other, again = (ranks[0] | ranks[1])[key]
        assert example.number == other.number
        for name in (
            "ids_P",
            "positions_P3",
            "index_M",
            "targets_M",
            "loss_weights_M",
            "bound_weights_M",
            "loss_divisor",
        ):
            assert torch.equal(getattr(batch, name), getattr(again, name)), name


def test_one_validation_document_is_enough(of_ranks):
    assert [results["one validation document"] for results in of_ranks] == [None, None]


def test_fewer_documents_than_ranks_is_an_error_on_every_rank(of_ranks):
    for results in of_ranks:
        assert "has fewer items (1) than there are processes that train (2)" in results["too few documents"]


def test_continuing_with_another_number_of_ranks_or_another_batch_size_repeats_and_loses_nothing(
    ranks_folder, of_ranks
):
    """Three steps of two documents are done."""
    assert [results["other ranks"] for results in of_ranks] == [[6, 7], [8, 9]]
    assert continued(ranks_folder / "data", str(ranks_folder / "one_rank.ckpt"), batch_size=3) == [6, 7, 8]
