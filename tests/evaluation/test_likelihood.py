"""The bound on the likelihood, against its definition by enumeration on a tiny model."""

import itertools
import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from multidiff.data import DocumentDataModule
from multidiff.evaluation import BoundSums, EvaluationBatch, likelihood, modes
from multidiff.models import MaskedDiffusionTransformer
from multidiff.processes import Absorbing, Cosine, Geometric, Hybrid, LogLinear, Uniform
from multidiff.sequence import MASK, AttentionPattern, Example, SharedVocabulary
from multidiff.sequence.sequencer import Sequencer
from tests.helpers.toys import Frames, Grid, generator

MODULE = sys.modules["multidiff.evaluation.likelihood"]
TOKENIZERS = {"a": Grid(3, 1, 2), "v": Frames((3,))}
VOCABULARY = SharedVocabulary.of(TOKENIZERS)
SEQUENCER = Sequencer(TOKENIZERS, VOCABULARY)
MODES = ["a/conditional", "a/unconditional", "v/conditional", "v/unconditional", "joint"]


def transformer(vocabulary=VOCABULARY, **options):
    model = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=16, num_layers=2, num_heads=2, **options)
    model.initialize(generator())
    for weight in model.parameters():
        weight.data.mul_(3)
    if model.time is not None:
        torch.nn.init.normal_(model.time.weight, generator=generator(1))
    return model.eval().double()


def document(*parts, padding=1):
    return [SEQUENCER.given(name, TOKENIZERS[name].encode([item])[0], padding, *label) for name, item, *label in parts]


def measured(model, examples, mode, seed=0, draws=1):
    documents = EvaluationBatch.of(examples, sequencer=SEQUENCER, seed=seed)
    nats_D, tokens_D = likelihood(model, VOCABULARY, documents, mode, draws)
    assert (nats_D.dtype, tokens_D.dtype) == (torch.float64, torch.float64)
    assert nats_D.shape == tokens_D.shape == (len(examples),)
    return float(nats_D.sum()), float(tokens_D.sum())


def test_modes():
    assert modes(["a", "v"]) == MODES


def roles_of(mode, batch):
    """The target codes and the absent ones, as places in the batch."""
    label, _, kind = mode.partition("/")
    names = [batch.labels[number] for number in batch.segment_P.tolist()]
    codes = [place for place, span in enumerate(batch.span_P.tolist()) if span >= 0]
    target = [place for place in codes if mode == "joint" or names[place] == label]
    return target, [place for place in codes if kind == "unconditional" and place not in target]


@torch.no_grad()
def log_prob(model, batch, masked, place):
    """log p(code at `place` | all that is not masked), over its span alone."""
    ids_P = batch.ids_P.clone()
    ids_P[list(masked)] = MASK
    _, _, (start, stop) = VOCABULARY.flat_spans[batch.span_P[place]]
    (logits_1V,) = model(
        ids_P, batch.positions_P3, batch.document_starts, [(torch.tensor([place]), (start, stop))], batch.coords_P3
    )
    return float(torch.log_softmax(logits_1V[0], -1)[batch.ids_P[place] - start])


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_over_all_k_and_all_masks_is_the_bound_over_all_orders(monkeypatch, mode):
    """-log p of a code given those before it, summed over the codes, the mean over all orders of the targets."""
    model = transformer()
    one = document(("v", [1]), ("a", [2, 0]))  # two codes each: a note and its EOS, a picture
    batch = SEQUENCER.batch([one])
    target, absent = roles_of(mode, batch)
    known = {}
    orders = list(itertools.permutations(target))
    exact = 0.0
    for order in orders:
        for number, place in enumerate(order):
            masked = (*sorted(order[number:]), *absent)
            if (masked, place) not in known:
                known[masked, place] = log_prob(model, batch, masked, place)
            exact -= known[masked, place] / len(orders)
    length = len(target)
    mean = 0.0
    for k in range(1, length + 1):
        monkeypatch.setattr(MODULE, "spread_uniform", lambda *_, k=k: (k - 0.5) / length)
        subsets = list(itertools.combinations(range(length), k))
        for subset in subsets:
            rest = [place for place in range(length) if place not in subset]
            monkeypatch.setattr(
                torch, "randperm", lambda *_, subset=subset, rest=rest, **__: torch.tensor([*subset, *rest])
            )
            nats, tokens = measured(model, [Example(one, -1, 0, 0)], mode)
            mean += nats / len(subsets) / length
    assert mean == pytest.approx(exact, rel=1e-12)
    assert tokens == length


def test_k_is_uniform_and_so_are_the_masks_of_k():
    """k is spread evenly; for the masks chi-square with 5 degrees of freedom: above 20.5 once in 1,000 times."""
    count = 4000
    batch = SEQUENCER.batch([document(("v", [1]), ("a", [2, 0]))] * count)
    documents = EvaluationBatch(batch, range(count), [True] * count, seed=3)
    noised = MODULE._mask_exactly(documents, batch.span_P >= 0, "joint", 0, 1)
    masked_DL, weight_DL = (table[batch.span_P >= 0].view(count, 4) for table in (noised.predicted_P, noised.weight_P))
    k_D = masked_DL.sum(1)
    assert torch.equal(weight_DL, (4 / k_D.double())[:, None].expand(-1, 4))
    assert float((torch.bincount(k_D, minlength=5)[1:] - count / 4).abs().max()) <= 3  # spread, not by chance
    pairs = torch.bincount((masked_DL[k_D == 2] * torch.tensor([1, 2, 4, 8])).sum(1), minlength=16)
    cells = pairs[[3, 5, 6, 9, 10, 12]].double()
    assert cells.sum() == pairs.sum()
    expected = cells.sum() / 6
    assert float(((cells - expected) ** 2 / expected).sum()) < 20.5


def test_a_model_that_knows_measures_the_joint():
    """Two copied segments of eight equal bits: the joint is log 2, each given the other 0, each alone log 2."""
    tokenizers = {"a": Grid(2, 1, 8), "b": Grid(2, 1, 8)}
    vocabulary = SharedVocabulary.of(tokenizers)
    sequencer = Sequencer(tokenizers, vocabulary)
    count = 3000

    class Knowing:
        device = torch.device("cpu")
        pattern = AttentionPattern()

        def __call__(self, ids_P, positions_P3, starts, positions, coords_P3, **_):
            blind_D = (ids_P == MASK).view(count, -1).sum(1) == 16  # half and half where all is masked, else certain
            width = len(ids_P) // count
            return [torch.where(blind_D[index_N // width], math.log(2), 0.0) for index_N, _ in positions]

    codes = [tokenizers["a"].encode([[bit] * 8])[0] for bit in (0, 1)]
    examples = [
        Example([sequencer.given(name, codes[number % 2]) for name in "ab"], -1, number, number)
        for number in range(count)
    ]
    documents = EvaluationBatch.of(examples, sequencer=sequencer, seed=0)
    for mode, each in (("joint", math.log(2)), ("a/conditional", 0.0), ("b/unconditional", math.log(2))):
        nats_D, tokens_D = likelihood(Knowing(), vocabulary, documents, mode)
        assert tokens_D.tolist() == [16 if mode == "joint" else 8] * count
        # Only k = L has any loss, of weight 1, and k is spread evenly over the documents.
        assert float(nats_D.mean()) == pytest.approx(each, abs=0.01)


LABELLED = [
    document(("v", [1, 2], "question"), ("a", [2, 0]), ("v", [0], "answer")),
    document(("v", []), padding=4),
    document(("a", [0, 1]), ("v", [2, 2, 1])),
    document(("v", [0, 0], "answer"), ("v", [1], "answer"), ("v", [1], "question"), padding=2),
    document(("a", [1, 1])),
]
ALL_MODES = modes(["a", "v", "question", "answer"])


def test_a_document_counts_the_same_in_any_batch():
    model = transformer()
    examples = [Example(one, -1, number, number) for number, one in enumerate(LABELLED)]
    for mode in ALL_MODES:
        alone = [measured(model, [example], mode) for example in examples]
        for some in (examples, examples[::-1], examples[1:4]):
            nats, tokens = measured(model, some, mode)
            assert nats == pytest.approx(sum(alone[example.number][0] for example in some), rel=1e-12, abs=1e-12)
            assert tokens == sum(alone[example.number][1] for example in some)
        stands_in = [example._replace(counts=example.number != 2) for example in examples]
        nats, tokens = measured(model, stands_in, mode)
        assert nats == pytest.approx(sum(nats for nats, _ in alone) - alone[2][0], rel=1e-12, abs=1e-12)
        assert tokens == sum(tokens for _, tokens in alone) - alone[2][1]


def test_tokens_are_codes_and_one_end_of_what_is_measured():
    model = transformer()
    examples = [Example(one, -1, number, number) for number, one in enumerate(LABELLED)]
    tokens = {mode: [measured(model, [example], mode)[1] for example in examples] for mode in ALL_MODES}
    assert tokens["joint"] == [7, 1, 6, 7, 2]
    assert tokens["answer/unconditional"] == [2, 0, 0, 5, 0]
    assert tokens["answer/conditional"] == [2, 0, 0, 5, 0]
    assert tokens["v/unconditional"] == [0, 1, 4, 0, 0]
    assert tokens["v/conditional"] == [0, 0, 4, 0, 0]  # given nothing is not conditional
    assert tokens["a/conditional"] == [2, 0, 2, 0, 0]
    assert tokens["a/unconditional"] == [2, 0, 2, 0, 2]


def test_draws_of_a_document_have_a_stratum_each_and_their_mean_is_taken():
    model, draws = transformer(), 6
    one = document(("a", [2, 0]), ("v", [1, 1]), padding=2)  # 2 pixels and 4 notes, of which 2 are EOS
    documents = EvaluationBatch.of([Example(one, -1, 3, 3)], sequencer=SEQUENCER, seed=0)
    batch = documents.batch
    expected, counts = 0.0, []
    for draw in range(draws):
        noised = MODULE._mask_exactly(documents, batch.span_P >= 0, "joint", draw, draws)
        masked = torch.nonzero(noised.predicted_P).flatten().tolist()
        counts.append(len(masked))
        expected -= (
            float(noised.weight_P[masked[0]]) * sum(log_prob(model, batch, masked, place) for place in masked) / draws
        )
    assert counts == [1, 2, 3, 4, 5, 6]
    nats, tokens = measured(model, [Example(one, -1, 3, 3)], "joint", draws=draws)
    assert nats == pytest.approx(expected, rel=1e-12)
    assert tokens == 5


PROCESSES = [Absorbing(), Absorbing(Cosine()), Uniform(), Hybrid(uniform_share=0.3)]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("time_input", [False, True])
def test_the_bound_over_times_is_its_definition(process, time_input):
    """∫ Σ_z q_t(z | x) Σ_i a(z_i) / q_t(z_i | x_i) (KL + IS) dt by enumeration of two codes, within 4 standard errors:
    it fails by chance once in 16,000 times."""
    model = transformer(time_input=time_input)
    for weight in model.parameters():
        weight.data.mul_(1.5)
    one = document(("a", [2, 0]))
    exact = by_enumeration(model, process, SEQUENCER.batch([one]))
    count = 3000
    examples = [Example(one, -1, number, number) for number in range(count)]
    documents = EvaluationBatch.of(examples, sequencer=SEQUENCER, seed=1)
    processes = dict.fromkeys(TOKENIZERS, process)
    nats_D, tokens_D = likelihood(model, VOCABULARY, documents, "joint", 2, processes, "times")
    assert tokens_D.tolist() == [2] * count
    error = float(nats_D.std()) / math.sqrt(count)  # too large, for times are spread evenly
    assert abs(float(nats_D.mean()) - exact) < 4 * error
    assert error < 0.05 * exact


@torch.no_grad()
def by_enumeration(model, process, batch):
    """The bound of a document of two codes, with three ids each, from the chain's marginals alone."""
    places = torch.nonzero(batch.span_P >= 0).flatten()
    _, _, (start, stop) = VOCABULARY.flat_spans[int(batch.span_P[places[0]])]
    size, x = stop - start, (batch.ids_P[places] - start).tolist()
    ids = [*range(start, stop), MASK]
    process = replace(process, schedule=LogLinear(0.0))  # whose ends are all data and all noise
    # Midpoints, dense towards 0, where the hybrid process has a pole that cancels.
    edges = torch.linspace(0, 1, 81, dtype=torch.float64) ** 4
    total, tiny = 0.0, 1e-6
    for low, high in itertools.pairwise(edges.tolist()):
        t = torch.tensor((low + high) / 2, dtype=torch.float64)
        q_X, later_X = (noise(process, at, size) for at in (t, t + tiny * t))
        alpha, later = (float(process.shares(at).clean) for at in (t, t + tiny * t))
        rate_X = (later_X - q_X) / (tiny * t) - (later - alpha) / (tiny * t) / alpha * q_X
        for z in itertools.product(range(size + 1), repeat=2):
            chance = math.prod(float(q_X[z_i]) + alpha * (z_i == x_i) for z_i, x_i in zip(z, x, strict=True))
            if not chance:
                continue
            ids_P = batch.ids_P.clone()
            ids_P[places] = torch.tensor([ids[z_i] for z_i in z])
            noise_P = torch.zeros(len(ids_P)).index_fill(0, places, float(process.noise(t)))
            (logits_NV,) = model(
                ids_P, batch.positions_P3, batch.document_starts, [(places, (start, stop))], batch.coords_P3,
                noise_P=noise_P,
            )  # fmt: skip
            p_NV = torch.softmax(logits_NV, 1)
            for i in (0, 1):
                true_X, model_X = q_X.clone(), q_X.clone()
                true_X[x[i]] += alpha
                model_X[:size] += alpha * p_NV[i]
                there = true_X > 0
                kl = float((true_X[there] * (true_X[there] / model_X[there]).log()).sum())
                ratio = float(true_X[z[i]] / model_X[z[i]])
                total += (high - low) * chance * float(rate_X[z[i]] / true_X[z[i]]) * (kl + ratio - math.log(ratio) - 1)
    return total


def noise(process, t, size):
    """What is not clean of q_t: u/V of each id, and m."""
    shares = process.shares(t)
    return torch.tensor([*[float(shares.uniform) / size] * size, float(shares.mask)], dtype=torch.float64)


@pytest.mark.parametrize("make", [Absorbing, Uniform, Hybrid])
def test_what_a_schedule_leaves_at_its_ends_is_no_part_of_the_bound(make):
    """Otherwise noise that a schedule never reaches, or never leaves, would make the bound too low."""
    documents = EvaluationBatch.of(
        [Example(document(("a", [2, 0])), -1, n, n) for n in range(9)], sequencer=SEQUENCER, seed=0
    )
    nats = [
        likelihood(
            transformer(), VOCABULARY, documents, "joint", 2, dict.fromkeys(TOKENIZERS, make(schedule)), "times"
        )[0]
        for schedule in (LogLinear(0.0), LogLinear(0.09), Geometric(0.1, 20.0), Cosine())
    ]
    assert all(torch.equal(one, nats[0]) for one in nats)


def test_both_estimators_agree_on_absorbing_noise():
    """Within 4 standard errors of their difference."""
    model, count = transformer(), 1500
    examples = [Example(document(("v", [1, 2]), ("a", [2, 0])), -1, number, number) for number in range(count)]
    documents = EvaluationBatch.of(examples, sequencer=SEQUENCER, seed=2)
    for mode in MODES:
        counts_D, times_D = (
            likelihood(model, VOCABULARY, documents, mode, 1, None, kind)[0] for kind in ("counts", "times")
        )
        error = math.sqrt((counts_D.var() + times_D.var()) / count)
        assert abs(float(counts_D.mean() - times_D.mean())) < 4 * error


def test_counts_are_for_absorbing_noise_alone():
    documents = EvaluationBatch.of([Example(document(("a", [2, 0])), -1, 0, 0)], sequencer=SEQUENCER, seed=0)
    with pytest.raises(ValueError, match=r'"counts" is for absorbing noise, but \'v\' has Uniform. Use "times"'):
        likelihood(transformer(), VOCABULARY, documents, "joint", 1, {"v": Uniform()}, "counts")


def test_the_noise_of_times_does_not_depend_on_the_batch():
    model, processes = transformer(), {"a": Uniform(), "v": Hybrid()}
    examples = [Example(one, -1, number, number) for number, one in enumerate(LABELLED)]

    def nats(some, mode):
        documents = EvaluationBatch.of(some, sequencer=SEQUENCER, seed=0)
        return likelihood(model, VOCABULARY, documents, mode, 3, processes, "times")[0]

    for mode in ALL_MODES:
        alone = torch.cat([nats([example], mode) for example in examples])
        torch.testing.assert_close(nats(examples[::-1], mode).flip(0), alone, rtol=1e-9, atol=1e-12)


def test_the_standard_error_covers_the_bound():
    """Of 400 samples of 100 documents, 95 % lie within 1.96 standard errors: outside of 92 to 98 % by chance less than
    once in 100 times."""
    drawn, hits = generator(), 0
    for _ in range(400):
        tokens_D = torch.randint(1, 9, (100,), generator=drawn).double()
        nats_D = tokens_D * 2 + torch.randn(100, generator=drawn, dtype=torch.float64) * tokens_D.sqrt()
        parts = [BoundSums.zero(), BoundSums.zero()]
        parts[0].add(nats_D[:30], tokens_D[:30])
        parts[1].add(torch.cat([nats_D[30:], torch.tensor([9.0])]), torch.cat([tokens_D[30:], torch.zeros(1)]))
        bound, error = BoundSums(parts[0].sums + parts[1].sums).estimate()
        assert bound == pytest.approx(float(nats_D.sum() / tokens_D.sum()), rel=1e-12)
        hits += abs(bound - 2) < 1.96 * error
    assert 0.92 < hits / 400 < 0.98


def test_few_documents_have_no_standard_error():
    sums = BoundSums.zero()
    assert sums.estimate() is None
    sums.add(torch.tensor([0.0, 4.0]), torch.tensor([0.0, 2.0]))
    bound, error = sums.estimate()
    assert bound == 2.0
    assert math.isnan(error)


def test_what_is_absent_does_not_matter_and_what_is_given_does():
    model = transformer()
    one, other = (document(("v", [1, 2]), ("a", codes)) for codes in ([2, 0], [0, 1]))
    values = {
        mode: [measured(model, [Example(some, -1, 0, 0)], mode)[0] for some in (one, other)]
        for mode in ("v/unconditional", "v/conditional")
    }
    assert values["v/unconditional"][0] == values["v/unconditional"][1]
    assert abs(values["v/conditional"][0] - values["v/conditional"][1]) > 1e-6


def test_every_number_of_ranks_measures_the_same(tmp_path):
    """Five documents on two ranks: one stands in, and counts for nothing."""
    texts = ["a", "bcd", "ef", "", "ghij"]
    rows = [{"split": "validation", "segments": [{"text": text}, {"shout": text.upper()}]} for text in texts]
    rows.append({"segments": [{"text": "x"}, {"shout": "X"}]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizers = {name: {"plugin": "bpe", "preset": "bytes"} for name in ("text", "shout")}
    served = {}
    for ranks in (1, 2, 3):
        served[ranks] = []
        for rank in range(ranks):
            data = DocumentDataModule(str(tmp_path), tokenizers, batch_size=2)
            data.rank = lambda place=(rank, ranks): place
            data.collate_evaluation = lambda examples, data=data: EvaluationBatch.of(
                examples, sequencer=data.sequencer, seed=0
            )
            batches = list(data.val_dataloader())
            assert len(batches) == {1: 3, 2: 2, 3: 1}[ranks]  # as many for every rank
            served[ranks] += batches
    model = transformer(data.vocabulary)
    for mode in ("joint", "text/conditional"):
        sums = [
            sum(torch.stack(likelihood(model, data.vocabulary, batch, mode)).sum(1) for batch in batches)
            for batches in served.values()
        ]
        assert float(sums[0][1]) == 15 * (1 + (mode == "joint"))
        for other in sums[1:]:
            torch.testing.assert_close(other, sums[0], rtol=1e-12, atol=0)
