"""Causal and block-causal transformers: what a token knows of its document, in one pass, in parts and from a cache."""

import pytest
import torch

from multidiff.models import KeyValueCache, attention
from multidiff.models import transformer as module
from multidiff.models.sizes import shared_size
from multidiff.sequence import MASK, AttentionPattern, TokenBlocks
from multidiff.sequence.blocks import side_by_side
from tests.helpers.denoisers import PICTURE, SEQUENCER, run, segments, transformer
from tests.helpers.toys import generator

DOCUMENTS = [segments(2, 1), segments(3, 4), segments(0, 2)]
PATTERNS = {
    "causal": {"attention": "causal"},
    "blocks of 3": {"attention": "block_causal", "block_length": 3},
    "a block for each segment": {"attention": "block_causal", "block_length": "segment"},
}


@pytest.fixture(params=PATTERNS)
def model(request):
    return transformer(num_layers=3, num_key_value_heads=2, **PATTERNS[request.param]).double()


def everywhere(ids_P):
    return [(torch.arange(len(ids_P)), PICTURE)]


def logits(model, batch, ids_P, positions=None, **options):
    options = {"blocks": TokenBlocks.clean(model.pattern.numbers(batch)), **options}
    positions = everywhere(ids_P) if positions is None else positions
    (found,) = model(ids_P, batch.positions_P3, batch.document_starts, positions, batch.coords_P3, **options)
    return found


def noised(batch, share=0.5):
    masked_P = (torch.rand(len(batch.ids_P), generator=generator(1)) < share) & (batch.span_P >= 0)
    return torch.where(masked_P, MASK, batch.ids_P), masked_P


@torch.no_grad()
def test_a_token_knows_its_block_and_those_before_it(model):
    batch = SEQUENCER.batch(DOCUMENTS)
    number_P, whole = model.pattern.numbers(batch), logits(model, batch, batch.ids_P)
    for place in torch.nonzero(batch.span_P >= 0).flatten().tolist()[::9]:
        changed = batch.ids_P.clone()
        changed[place] = MASK
        differs_P = (logits(model, batch, changed) - whole).abs().amax(1)
        knows_P = (batch.document_P == batch.document_P[place]) & (number_P >= number_P[place])
        assert bool((differs_P[knows_P] > 1e-9).all())
        assert float(differs_P[~knows_P].sum()) == 0


@torch.no_grad()
def test_a_document_is_as_if_alone(model):
    batch = SEQUENCER.batch(DOCUMENTS)
    together = logits(model, batch, batch.ids_P)
    alone = [SEQUENCER.batch([document]) for document in DOCUMENTS]
    apart = torch.cat([logits(model, one, one.ids_P) for one in alone])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)
    as_many = batch.document_starts.long()[batch.document_P] + 3  # as often as a document has tokens, its fourth one
    for asked in (torch.tensor([30, 2, 31, 17, 9]), as_many):
        some = logits(model, batch, batch.ids_P, [(asked, PICTURE)])
        torch.testing.assert_close(some, together[asked], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["blocks of 3", "a block for each segment"])
def test_both_copies_side_by_side_are_every_block_with_clean_predecessors(name):
    model = transformer(num_layers=3, **PATTERNS[name]).double()
    batch = SEQUENCER.batch(DOCUMENTS)
    number_P, (ids_P, masked_P) = model.pattern.numbers(batch), noised(batch)
    copies = side_by_side(batch, number_P, masked_P)
    ids_X = torch.where(copies.blocks.noisy_P, ids_P[copies.index_X], batch.ids_P[copies.index_X])
    tables = (table[copies.index_X] for table in (batch.positions_P3, batch.coords_P3))
    positions_X3, coords_X3 = tables
    targets = torch.nonzero(masked_P).flatten()
    asked = [(copies.noisy_P[targets], PICTURE)]
    (both,) = model(ids_X, positions_X3, copies.starts, asked, coords_X3, blocks=copies.blocks)
    for number in number_P[targets].unique().tolist():
        one_by_one = logits(model, batch, torch.where(number_P < number, batch.ids_P, ids_P))
        here = number_P[targets] == number
        torch.testing.assert_close(both[here], one_by_one[targets[here]], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_cache_of_what_stands_before_is_exact(model):
    """Token by token, block by block, and in larger parts."""
    batch = SEQUENCER.batch(DOCUMENTS)
    number_P, whole = model.pattern.numbers(batch), logits(model, batch, batch.ids_P)
    last = int(number_P.max())
    for stride in (1, 2, last + 1):
        cache = KeyValueCache(len(batch.ids_P))
        for first in range(0, last + 1, stride):
            active_A = torch.nonzero((number_P >= first) & (number_P < first + stride)).flatten()
            ids_P = torch.where(number_P < first + stride, batch.ids_P, MASK)
            part = logits(model, batch, ids_P, [(active_A, PICTURE)], cache=cache, active_A=active_A)
            torch.testing.assert_close(part, whole[active_A], rtol=0, atol=1e-12)


def test_gradients_of_causal_attention_are_those_of_the_mask():
    """SDPA's causal kernel, in all layers but the last, against blocks of one code, which have a mask."""
    batch = SEQUENCER.batch([segments(2, 1), segments(1, 2)])
    place_P = AttentionPattern("causal").numbers(batch)
    gradients = []
    for options in ({"attention": "causal"}, {"attention": "block_causal", "block_length": 1}):
        model = transformer(num_layers=3, **options).double()
        found = logits(model, batch, batch.ids_P, blocks=TokenBlocks.clean(place_P))
        found.square().sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12 * float(gradients[0].abs().max()))


def test_bad_patterns():
    with pytest.raises(ValueError, match="needs a block_length of at least 1"):
        transformer(attention="block_causal", block_length=0)
    model = transformer(attention="block_causal", block_length=2)
    batch = SEQUENCER.batch(DOCUMENTS)
    with pytest.raises(ValueError, match="needs the blocks of the tokens"):
        run(model, batch, everywhere(batch.ids_P))


def test_rows_up_to_a_shared_size_change_nothing(model, monkeypatch):
    """As half precision on a CPU has them, here in fp64."""
    batch = SEQUENCER.batch([*DOCUMENTS, segments(7, 0)])

    def results():
        found = logits(model, batch, batch.ids_P, [(torch.tensor([3, 40, 21, 22, 5]), PICTURE)])
        model.zero_grad()
        found.square().sum().backward()
        return found.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])

    plain = results()
    assert shared_size(len(batch.ids_P)) > len(batch.ids_P)
    for place in (attention, module):
        monkeypatch.setattr(place, "prepares_shapes", lambda *_: True)
    for ours, theirs in zip(results(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * max(1.0, float(theirs.abs().max())))


def test_bfloat16_autocast_is_close(model):
    batch = SEQUENCER.batch(DOCUMENTS)
    model = model.float()
    plain = logits(model, batch, batch.ids_P)
    with torch.autocast("cpu", torch.bfloat16):
        half = logits(model, batch, batch.ids_P)
    assert float((half - plain).detach().norm() / plain.detach().norm()) < 0.15  # of another mask, more than 0.5
