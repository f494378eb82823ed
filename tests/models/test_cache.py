"""Cached keys and values: what passes with them compute, and that they stay where they are."""

import pytest
import torch

from multidiff.models import KeyValueCache
from multidiff.sequence import MASK
from tests.helpers.denoisers import PICTURE, SEQUENCER, run, segments, transformer
from tests.helpers.toys import generator

DOCUMENTS = [segments(2, 1), segments(3, 4), segments(0, 2)]


def storages(cache):
    return [part.data_ptr() for layer in cache._layers for part in layer]


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 3])
def test_nothing_changed_is_the_whole_pass(layers):
    """Whatever tokens are computed again, and whatever of these is asked for."""
    batch = SEQUENCER.batch(DOCUMENTS)
    model = transformer(num_layers=layers, num_key_value_heads=2).double()
    (whole,) = run(model, batch, [(torch.arange(len(batch.ids_P)), PICTURE)])
    cache, drawn = KeyValueCache(len(batch.ids_P)), generator()
    (first,) = run(model, batch, [(torch.tensor([3, 9]), PICTURE)], cache=cache)
    torch.testing.assert_close(first, whole[[3, 9]], rtol=0, atol=1e-12)
    places = storages(cache)
    assert len(places) == 2 * layers
    rows = []
    model.layers[-1].mlp.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    for _ in range(10):
        active_A = torch.nonzero(torch.rand(len(batch.ids_P), generator=drawn) < 0.3).flatten()
        asked_N = active_A[torch.randperm(len(active_A), generator=drawn)[:5]]
        (some,) = run(model, batch, [(asked_N, PICTURE)], cache=cache, active_A=active_A)
        torch.testing.assert_close(some, whole[asked_N], rtol=0, atol=1e-12)
        assert storages(cache) == places  # written in place
    assert rows == [5] * 10


@torch.no_grad()
def test_only_the_tokens_that_are_computed_know_what_changed():
    batch = SEQUENCER.batch(DOCUMENTS)
    model, cache = transformer().double(), KeyValueCache(len(batch.ids_P))
    (whole,) = run(model, batch, [(torch.arange(len(batch.ids_P)), PICTURE)], cache=cache)
    changed = 4
    ids_P = batch.ids_P.clone()
    ids_P[changed] = MASK
    rows = (batch.positions_P3, batch.document_starts)
    other = int(batch.document_starts[1]) + 3
    asked = [(torch.tensor([2, other]), PICTURE)]
    (stale,) = model(ids_P, *rows, asked, batch.coords_P3, cache=cache, active_A=torch.tensor([2, other]))
    torch.testing.assert_close(stale, whole[[2, other]], rtol=0, atol=1e-12)
    (fresh,) = model(ids_P, *rows, asked, batch.coords_P3, cache=cache, active_A=torch.tensor([2, changed, other]))
    assert float((fresh - stale)[0].abs().max()) > 1e-6
    torch.testing.assert_close(fresh[1], stale[1], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_whole_pass_renews_everything():
    batch = SEQUENCER.batch(DOCUMENTS)
    model, cache = transformer().double(), KeyValueCache(len(batch.ids_P))
    run(model, batch, [(torch.tensor([0]), PICTURE)], cache=cache)
    places = storages(cache)
    ids_P = torch.where(batch.span_P >= 0, MASK, batch.ids_P)
    rows = (batch.positions_P3, batch.document_starts)
    everywhere = [(torch.arange(len(ids_P)), PICTURE)]
    (with_cache,) = model(ids_P, *rows, everywhere, batch.coords_P3, cache=cache)
    assert storages(cache) == places
    torch.testing.assert_close(with_cache, model(ids_P, *rows, everywhere, batch.coords_P3)[0], rtol=0, atol=1e-12)
    active_A = torch.tensor([5, 6, 20])
    (some,) = model(ids_P, *rows, [(active_A, PICTURE)], batch.coords_P3, cache=cache, active_A=active_A)
    torch.testing.assert_close(some, with_cache[active_A], rtol=0, atol=1e-12)
