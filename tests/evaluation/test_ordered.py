"""Likelihood with an order: exact with causal attention, a bound block by block otherwise; both by enumeration."""

import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch

from multidiff.evaluation import EvaluationBatch, likelihood
from multidiff.models import MaskedDiffusionTransformer
from multidiff.sequence import MASK, Example, SharedVocabulary, TokenBlocks
from multidiff.sequence.sequencer import Sequencer
from tests.helpers.toys import Frames, Grid, generator

MODULE = sys.modules["multidiff.evaluation.likelihood"]
TOKENIZERS = {"a": Grid(3, 1, 3), "v": Frames((3,))}
VOCABULARY = SharedVocabulary.of(TOKENIZERS)
SEQUENCER = Sequencer(TOKENIZERS, VOCABULARY)
MODES = ["a/conditional", "a/unconditional", "v/conditional", "v/unconditional", "joint"]


def transformer(**pattern):
    model = MaskedDiffusionTransformer(VOCABULARY.rows, hidden_size=16, num_layers=2, num_heads=2, **pattern)
    model.initialize(generator())
    for weight in model.parameters():
        weight.data.mul_(3)
    return model.eval().double()


def document(picture, note):
    """A picture of three codes, and a canvas of two: a code may be 3, which is EOS."""
    parts = [SEQUENCER.given("v", TOKENIZERS["v"].encode([[0]])[0]), SEQUENCER.given("a", TOKENIZERS["a"].canvas())]
    return [replace(part, ids_N=torch.tensor(ids)) for part, ids in zip(parts, (note, picture), strict=True)]


def measured(model, documents, mode, seed=0, draws=1, **options):
    examples = [Example(one, -1, number, number) for number, one in enumerate(documents)]
    batch = EvaluationBatch.of(examples, sequencer=SEQUENCER, seed=seed)
    nats_D, tokens_D = likelihood(model, VOCABULARY, batch, mode, draws, **options)
    assert (nats_D.dtype, tokens_D.dtype) == (torch.float64, torch.float64)
    return nats_D, tokens_D


PICTURES = list(itertools.product(range(3), repeat=3))
NOTES = list(itertools.product(range(4), repeat=2))


@pytest.mark.parametrize("mode", MODES)
def test_causal_probabilities_of_all_documents_add_up_to_one(mode):
    model = transformer(attention="causal")
    pictures, notes = PICTURES if mode[0] != "v" else [(0, 2, 1)], NOTES if mode[0] != "a" else [(1, 3)]
    documents = [document(*pair) for pair in itertools.product(pictures, notes)]
    nats_D, tokens_D = measured(model, documents, mode, draws=3)
    assert float((-nats_D).exp().sum()) == pytest.approx(1, rel=1e-12)
    assert float(nats_D.std()) > 0.1
    assert tokens_D.tolist() == [3 * (mode[0] != "v") + 2 * (mode[0] != "a")] * len(documents)


def log_prob(model, batch, ids_P, place):
    """log p(code at `place` | what attention sees of these ids), over its span alone."""
    read = place - model.pattern.is_autoregressive
    _, _, (start, stop) = VOCABULARY.flat_spans[batch.span_P[place]]
    with torch.no_grad():
        (logits_1V,) = model(
            ids_P,
            batch.positions_P3,
            batch.document_starts,
            [(torch.tensor([read]), (start, stop))],
            batch.coords_P3,
            blocks=TokenBlocks.clean(model.pattern.numbers(batch)),
        )
    return float(torch.log_softmax(logits_1V[0], -1)[batch.ids_P[place] - start])


def roles_of(mode, batch):
    names = [batch.labels[number] for number in batch.segment_P.tolist()]
    codes = [place for place, span in enumerate(batch.span_P.tolist()) if span >= 0]
    target = [place for place in codes if mode == "joint" or names[place] == mode[0]]
    return target, [place for place in codes if "unconditional" in mode and place not in target]


@pytest.mark.parametrize("mode", MODES)
def test_causal_likelihood_is_the_chain_rule(mode):
    model, one = transformer(attention="causal"), document((2, 0, 1), (1, 3))
    batch = SEQUENCER.batch([one])
    target, absent = roles_of(mode, batch)
    ids_P = batch.ids_P.clone()
    ids_P[absent] = MASK
    exact = 0.0
    for place in target:  # what stands at and behind the code does not matter
        cut_P = ids_P.clone()
        cut_P[place:] = MASK
        exact -= log_prob(model, batch, cut_P, place)
    nats_D, _ = measured(model, [document((0, 0, 0), (3, 3)), one], mode)
    assert float(nats_D[1]) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [2, "segment"])
def test_the_bound_by_blocks_is_the_mean_over_all_orders_of_each_block(monkeypatch, mode, length):
    model, one = transformer(attention="block_causal", block_length=length), document((2, 0, 1), (1, 3))
    batch = SEQUENCER.batch([one])
    number_P = model.pattern.numbers(batch)
    target, absent = roles_of(mode, batch)
    clean_P = batch.ids_P.clone()
    clean_P[absent] = MASK
    exact = mean = 0.0
    for block in sorted({int(number_P[place]) for place in target}):
        places = [place for place in target if int(number_P[place]) == block]
        orders = list(itertools.permutations(places))
        for order in orders:
            for number, place in enumerate(order):
                ids_P = torch.where(number_P > block, MASK, clean_P)  # blocks behind are not seen
                ids_P[list(order[number:])] = MASK
                exact -= log_prob(model, batch, ids_P, place) / len(orders)
        size = len(places)
        for k in range(1, size + 1):
            subsets = list(itertools.combinations(places, k))
            for subset in subsets:

                def mask(*_, subset=subset, size=size):
                    masked_P = torch.zeros_like(batch.known_P)
                    masked_P[list(subset)] = True
                    noised_P = torch.where(masked_P, MASK, batch.ids_P)
                    return MODULE._Noised(
                        noised_P, masked_P, masked_P.double() * size / len(subset), *[0.0 * number_P] * 2
                    )

                monkeypatch.setattr(MODULE, "_mask_blocks", mask)
                mean += float(measured(model, [one], mode)[0]) / len(subsets) / size
    assert mean == pytest.approx(exact, rel=1e-12)


def test_every_block_has_a_uniform_number_of_masks_and_any_of_them():
    """Of 3 codes in the last block k is spread evenly, and so are the masks; chi-square of 2 degrees of freedom is
    above 13.8 once in 1,000 times."""
    count = 3000
    batch = SEQUENCER.batch([document((2, 0, 1), (1, 3))] * count)
    number_P = transformer(attention="block_causal", block_length="segment").pattern.numbers(batch)
    documents = EvaluationBatch(batch, range(count), [True] * count, seed=3)
    for draw in range(2):
        noised = MODULE._mask_blocks(documents, batch.span_P >= 0, number_P, "joint", draw, 2)
        masked_P, weight_P = noised.predicted_P, noised.weight_P
        assert torch.equal(noised.ids_P == MASK, masked_P)
        torch.testing.assert_close(noised.noise_P, torch.where(batch.span_P >= 0, 1 / weight_P, 0.0))
        for block, size in ((0, 2), (1, 3)):
            inside_P = (batch.span_P >= 0) & (number_P == block)
            masked_DL = masked_P[inside_P].view(count, size)
            k_D = masked_DL.sum(1)
            low, high = draw * size / 2, (draw + 1) * size / 2  # k - 1 is the floor of a uniform number between
            for k in range(1, size + 1):
                share = max(0.0, min(high, k) - max(low, k - 1)) / (high - low)
                assert abs(int((k_D == k).sum()) / count - share) < 0.01
            weight_DL = weight_P[inside_P].view(count, size)
            assert torch.equal(weight_DL, (size / k_D[:, None].double()).expand(-1, size))
            counts = masked_DL[k_D == 1].sum(0).double()
            if len(counts) and float(counts.sum()):
                assert float((counts - counts.mean()).square().sum() / counts.mean()) < 13.8


def test_draws_agree_and_a_document_counts_the_same_in_any_batch():
    model = transformer(attention="block_causal", block_length=2)
    documents = [document((2, 0, 1), (1, 3)), document((1, 1, 1), (3, 3)), document((0, 2, 0), (0, 1))]
    nats_D, _ = measured(model, documents, "joint", draws=20)
    alone, _ = measured(model, documents[:1], "joint", draws=20)
    assert float(alone) == pytest.approx(float(nats_D[0]), rel=1e-9)
    other, _ = measured(model, documents[:1], "joint", seed=1, draws=20)
    assert float(other) == pytest.approx(float(alone), rel=0.3)
    assert math.isfinite(float(other))


def test_times_and_counts_bound_the_same():
    """Within 4 standard errors of independent documents."""
    model, count = transformer(attention="block_causal", block_length=2), 400
    documents = [document((2, 0, 1), (1, 3))] * count
    counts, _ = measured(model, documents, "joint", draws=4)
    times, _ = measured(model, documents, "joint", draws=4, estimator="times")
    error = math.sqrt((float(counts.var()) + float(times.var())) / count)
    assert abs(float(counts.mean() - times.mean())) < 4 * error
    assert error < 0.05 * float(counts.mean())
