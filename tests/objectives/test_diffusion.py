"""Schedules, the forward process and the bound, against exact values."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multidiff.objectives.diffusion import (
    ABSENT,
    GIVEN,
    TARGET,
    Objective,
    Task,
    corrupt,
    corrupt_exactly,
    draw_roles,
    draw_times,
    queries,
    weighted_nats,
)
from multidiff.processes.schedules import Cosine, LogLinear
from multidiff.sequence.sequencer import Sequencer
from multidiff.sequence.vocabulary import MASK, SharedVocabulary
from tests.helpers.toys import Frames, Grid, generator

TOKENIZERS = {"a": Grid(2, 1, 8), "b": Grid(2, 1, 8), "v": Frames((3, 3))}
VOCABULARY = SharedVocabulary.of(TOKENIZERS)
SEQUENCER = Sequencer(TOKENIZERS, VOCABULARY)


def batch_of(documents, row_length=None):
    return SEQUENCER.batch(
        [[SEQUENCER.given(name, TOKENIZERS[name].encode([item])[0]) for name, item in d] for d in documents], row_length
    )


def copies(number):
    """Documents of two segments of eight equal bits: one bit in all, so the joint NLL is log 2."""
    return batch_of([[("a", [i % 2] * 8), ("b", [i % 2] * 8)] for i in range(number)])


def knowing_logits(batch, noise, asked):
    """The exact conditionals of `copies`: half and half if everything is masked, else certain."""
    known_D = torch.full((batch.num_documents,), -1)
    clean_BL = (batch.span_BL >= 0) & (noise.ids_BL != MASK)
    starts_BL = torch.tensor([span[0] for _, _, span in VOCABULARY.flat_spans])[batch.span_BL.clamp_min(0)]
    bit_BL = batch.ids_BL - starts_BL
    known_D[batch.document_BL[clean_BL]] = bit_BL[clean_BL]
    logits = []
    for index_N, (start, stop) in asked:
        known_N = known_D[batch.document_BL.flatten()[index_N]]
        certain_NV = torch.full((len(index_N), stop - start), -40.0)
        certain_NV[known_N == 0, 0] = 0.0
        certain_NV[known_N == 1, 1] = 0.0
        logits.append(torch.where(known_N[:, None] < 0, torch.zeros(stop - start), certain_NV))
    return logits


@pytest.mark.parametrize("schedule", [LogLinear(), LogLinear(0.0), Cosine(), Cosine(0.1)])
def test_schedules_are_consistent(schedule):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.derivative(t), slope)
    torch.testing.assert_close(schedule.inverse(alpha), t)
    assert bool((slope < 0).all())
    torch.testing.assert_close(schedule.weight(t), -slope / (1 - alpha))
    assert float(schedule.alpha(torch.tensor(0.0))) == 1.0


def test_log_linear_weight_is_exactly_one_over_t():
    t = torch.tensor([1e-3, 0.3, 1.0], dtype=torch.float64)
    assert torch.equal(LogLinear().weight(t), 1 / t)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([TARGET, GIVEN, ABSENT]), min_size=3, max_size=3), st.integers(0, 10**6), st.booleans())
def test_corrupt_touches_targets_and_absent_only(roles, seed, exactly):
    batch = batch_of([[("a", [0, 1] * 4), ("v", [1, 2, 0, 1]), ("b", [1] * 8)]])
    role_S = torch.tensor(roles)
    if exactly:
        noise = corrupt_exactly(batch, role_S, torch.arange(3), generator(seed))
    else:
        t_S = draw_times(role_S, torch.arange(3), generator(seed))
        noise = corrupt(batch, role_S, t_S, LogLinear(), generator(seed))
    role_BL = torch.where(batch.segment_BL < 0, -1, role_S[batch.segment_BL])
    masked_BL = noise.ids_BL == MASK
    assert torch.equal(noise.ids_BL[~masked_BL], batch.ids_BL[~masked_BL])
    assert not bool(masked_BL[(role_BL == -1) | (role_BL == GIVEN)].any())
    assert bool(masked_BL[role_BL == ABSENT].all())
    assert torch.equal(noise.predicted_BL, masked_BL & (role_BL == TARGET))
    assert torch.equal(noise.target_BL, role_BL == TARGET)
    assert bool((noise.weight_S[role_S != TARGET] == 0).all())


def test_levels_are_stratified_over_target_groups():
    role_S = torch.tensor([TARGET] * 64 + [GIVEN] * 10 + [ABSENT] * 10)
    t_S = draw_times(role_S, torch.arange(84), generator())
    assert bool((t_S[64:74] == 0).all())
    assert bool((t_S[74:] == 1).all())
    strata = ((t_S[:64] - 1e-3) / (1 - 1e-3) * 64).long()
    assert sorted(strata.tolist()) == list(range(64))
    assert strata.tolist() != list(range(64))
    shared_S = draw_times(torch.full((6,), TARGET), torch.tensor([0, 0, 2, 2, 4, 4]), generator())
    assert bool((shared_S[::2] == shared_S[1::2]).all())
    assert shared_S.unique().numel() == 3


def test_masking_rate_follows_the_schedule():
    batch = copies(2000)
    t_S = torch.full((4000,), 0.3, dtype=torch.float64)
    noise = corrupt(batch, torch.full((4000,), TARGET), t_S, LogLinear(), generator())
    rate = noise.predicted_BL.sum() / noise.target_BL.sum()
    expected = (1 - 1e-3) * 0.3
    assert abs(float(rate) - expected) < 4 * math.sqrt(expected * (1 - expected) / 32_000)


@pytest.mark.parametrize(("shared", "exactly"), [(True, False), (True, True), (False, False), (False, True)])
def test_shared_noise_bounds_the_joint_and_independent_noise_does_not(shared, exactly):
    """Two copied segments of n = 8: the joint NLL is log 2; independent levels give 2 log 2 / (n + 1) = 0.154."""
    batch = copies(6000)
    role_S = torch.full((12_000,), TARGET)
    group_S = batch.document_S if shared else torch.arange(12_000)
    if exactly:
        noise = corrupt_exactly(batch, role_S, group_S, generator(1))
    else:
        t_S = draw_times(role_S, group_S, generator(1), smallest=1e-6)
        noise = corrupt(batch, role_S, t_S, LogLinear(0.0), generator(2))
    asked = queries(noise.predicted_BL, batch.span_BL, VOCABULARY)
    nats_S = weighted_nats(knowing_logits(batch, noise, asked), asked, batch, noise)
    nats_D = torch.zeros(6000).index_add(0, batch.document_S, nats_S)
    expected = math.log(2) if shared else 2 * math.log(2) / 9
    if shared and exactly:
        # Only k = L = 16 of 16 has any loss, of weight 1: the mean is log 2, exact up to strata.
        assert abs(float(nats_D.mean()) - expected) < 0.02
    assert abs(float(nats_D.mean()) - expected) < 4 * float(nats_D.std()) / math.sqrt(6000)


def test_the_exact_estimator_equals_the_sum_over_all_orders():
    """E over k and masks of (L/k) Σ_masked -log p(x_i | rest), by enumeration, against -log p(x) of a random joint."""
    joint = torch.rand(2, 2, 2, generator=generator(3), dtype=torch.float64)
    joint /= joint.sum()
    for x in itertools.product(range(2), repeat=3):
        total = 0.0
        for k in (1, 2, 3):
            subsets = list(itertools.combinations(range(3), k))
            for masked in subsets:
                for i in masked:
                    rest = tuple(slice(None) if j in masked else x[j] for j in range(3))
                    table = joint[rest]
                    axis = masked.index(i)
                    marginal = table.movedim(axis, 0).reshape(2, -1).sum(1)
                    total += -float((marginal[x[i]] / marginal.sum()).log()) * (3 / k) / 3 / len(subsets)
        assert math.isclose(total, -math.log(float(joint[x])), rel_tol=1e-9)
    # The code draws k uniformly and a uniform subset of that size.
    batch = batch_of([[("v", [0, 1])]] * 8000)
    noise = corrupt_exactly(batch, torch.full((8000,), TARGET), torch.arange(8000), generator(4))
    counts_B = noise.predicted_BL.sum(1)
    assert torch.equal(noise.weight_S, (4 / counts_B).float())
    shares = torch.bincount(counts_B, minlength=5)[1:] / 8000
    assert float((shares - 0.25).abs().max()) < 0.02
    position = noise.predicted_BL[counts_B == 1].float().mean(0)[batch.segment_BL[0] >= 0]
    assert float((position - 0.25).abs().max()) < 0.05


@pytest.mark.parametrize("loss_weights", [{}, {"a": 5.0}])
@pytest.mark.parametrize("normalisation", ["targets", "masked"])
def test_loss_of_knowing_and_of_uniform_models(normalisation, loss_weights):
    batch = batch_of([[("v", [1, 2, 0, 1]), ("a", [0, 1] * 4)]] * 40)
    role_S = torch.full((80,), TARGET)
    noise = corrupt(batch, role_S, draw_times(role_S, torch.arange(80), generator()), LogLinear(), generator())
    asked = queries(noise.predicted_BL, batch.span_BL, VOCABULARY)
    objective = Objective(weighting="none", normalisation=normalisation, loss_weights=loss_weights)

    def loss(logits):
        total, count = objective(logits, asked, batch, noise, VOCABULARY)
        return float(total / count)

    knowing = []
    for index_N, (start, stop) in asked:
        one_hot_NV = torch.nn.functional.one_hot(batch.ids_BL.flatten()[index_N] - start, stop - start)
        knowing.append(one_hot_NV * 100.0)
    assert loss(knowing) < 1e-6
    uniform = [torch.zeros(len(index_N), stop - start) for index_N, (start, stop) in asked]
    count_of = torch.bincount(batch.span_BL[noise.predicted_BL], minlength=len(VOCABULARY.flat_spans))
    target_of = torch.bincount(batch.span_BL[noise.target_BL], minlength=len(VOCABULARY.flat_spans))
    nats = divisor = 0.0
    for place, (name, _, (start, stop)) in enumerate(VOCABULARY.flat_spans):
        each = loss_weights.get(name, 1.0)
        nats += each * int(count_of[place]) * math.log(stop - start)
        divisor += each * int((count_of if normalisation == "masked" else target_of)[place])
    assert math.isclose(loss(uniform), nats / divisor, rel_tol=1e-5)


def test_tasks_give_roles():
    batch = batch_of([[("a", [0] * 8), ("b", [0] * 8)], [("a", [0] * 8)], [("v", [0, 0]), ("a", [0] * 8)]] * 200)
    tasks = [
        Task({"b": "target", "others": "given"}, weight=3),
        Task({"others": "target"}, noise="shared"),
        Task({"v": "target"}, condition_dropout=0.5),
    ]
    role_S, group_S = draw_roles(batch, tasks, VOCABULARY, generator())
    rows = {}
    for document, tokenizer, role, group in zip(
        batch.document_S.tolist(), batch.tokenizer_S.tolist(), role_S.tolist(), group_S.tolist(), strict=True
    ):
        rows.setdefault(document, []).append((tokenizer, role, group))
    kinds = [[tuple(role for _, role, _ in rows[d]) for d in range(kind, 600, 3)] for kind in range(3)]
    assert set(kinds[0]) == {(GIVEN, TARGET), (TARGET, TARGET)}
    assert abs(kinds[0].count((GIVEN, TARGET)) / 200 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 200)
    assert set(kinds[1]) == {(TARGET,)}
    assert set(kinds[2]) == {(TARGET, GIVEN), (TARGET, ABSENT), (TARGET, TARGET)}
    for row in rows.values():
        if len(row) == 2 and row[0][1] == row[1][1] == TARGET:
            assert row[0][2] == row[1][2]


def test_bad_tasks():
    with pytest.raises(ValueError, match="has no target"):
        Task({"a": "given"})
    with pytest.raises(ValueError, match="'noised' is none of"):
        Task({"a": "noised"})
    with pytest.raises(ValueError, match="condition_dropout in"):
        Task({"a": "target"}, condition_dropout=2)
    with pytest.raises(ValueError, match="weight ≥ 0"):
        Task({"a": "target"}, weight=math.nan)
    with pytest.raises(ValueError, match="must be a table of tokenizer names and roles"):
        Task(["a"])
    assert Task.of({"roles": {"a": "target"}, "condition_dropout": 0.5}) == Task.of(
        Task({"a": "target"}, condition_dropout=0.5)
    )
    with pytest.raises(ValueError, match="a task has no attribute 'wieght'; did you mean 'weight'"):
        Task.of({"roles": {"a": "target"}, "wieght": 2})
    for value in (None, "a", {"a": "target"}):
        with pytest.raises(ValueError, match="a task is a table with roles"):
            Task.of(value)
    with pytest.raises(ValueError, match="weighting is elbo or none"):
        Objective(weighting="best")
    with pytest.raises(ValueError, match="loss_weights of 'a' must be a number above 0"):
        Objective(loss_weights={"a": 0.0})
    with pytest.raises(ValueError, match=r"no task applies to a document of a; add a row"):
        draw_roles(batch_of([[("a", [0] * 8)]]), [Task({"b": "target"})], VOCABULARY, generator())
