"""Every process with every schedule, against enumeration of a toy joint distribution of two tokens.

A model that knows p(x_i | z_j, j ≠ i) exactly reaches the bound: its mean over the data is the entropy. What is sampled
with it follows the distribution.
"""

import itertools
import math

import pytest
import torch

from multidiff.processes import Absorbing, Cosine, CosineSquared, Geometric, Hybrid, LogLinear, Polynomial, Uniform
from multidiff.sequence import MASK
from tests.helpers.toys import generator

SIZE = 3
JOINT = torch.tensor([[0.30, 0.02, 0.08], [0.05, 0.25, 0.01], [0.04, 0.05, 0.20]], dtype=torch.float64)
SCHEDULES = [LogLinear(), LogLinear(0.0), Cosine(), CosineSquared(), Polynomial(2.0), Polynomial(0.5), Geometric(1e-10)]
PROCESSES = [Absorbing, Uniform, Hybrid, lambda schedule: Hybrid(schedule, 0.5)]


def kernel(process, t):
    """q_t(z | x): rows over ids, columns over ids and `<mask>`."""
    clean, uniform, mask = (float(share) for share in process.shares(torch.tensor(t, dtype=torch.float64)))
    table = torch.full((SIZE, SIZE + 1), uniform / SIZE, dtype=torch.float64)
    table[:, SIZE] = mask
    table[range(SIZE), range(SIZE)] += clean
    return table


def beliefs(process, t):
    """log p(x_i | z_j) of each of both tokens i, for every z_j of the other: two tables [z_j, x_i]."""
    kernel_VX = kernel(process, t)
    first, second = kernel_VX.T @ JOINT.T, kernel_VX.T @ JOINT  # p(z_1, x_0) and p(z_0, x_1)
    return [(table / table.sum(1, keepdim=True)).log() for table in (first, second)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("make", PROCESSES)
def test_the_bound_of_a_model_that_knows_is_the_entropy(make, schedule):
    """Within 0.3 %."""
    process = make(schedule)
    values = []
    for low, high in itertools.pairwise([1e-20, 1e-12, 1e-6, 1e-3, 0.05, 1 - 1e-6]):
        for node, weight in zip(*legendre(32), strict=True):
            # In the logarithm of t near 0, where weights have a pole.
            t = low * (high / low) ** node if high < 0.1 else low + (high - low) * node
            slope = t * math.log(high / low) if high < 0.1 else high - low
            values.append(slope * weight * integrand(process, t))
    entropy = -float((JOINT * JOINT.log()).sum())
    assert sum(values) == pytest.approx(entropy, rel=3e-3)


def legendre(count):
    """Nodes and weights of Gauss's quadrature on [0, 1], as eigenvalues of Jacobi's matrix (Golub & Welsch 1969)."""
    beta = torch.tensor([k / math.sqrt(4 * k * k - 1) for k in range(1, count)], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return ((values + 1) / 2).tolist(), (vectors[0] ** 2).tolist()


def integrand(process, t):
    """Σ_x p(x) Σ_z q_t(z | x) Σ_i w D, with the process's own weight and divergence."""
    kernel_VX, tables = kernel(process, t), beliefs(process, t)
    mask_weight, code_weight = (float(w) for w in process.weights(torch.tensor(t, dtype=torch.float64)))
    place = torch.cartesian_prod(*(torch.arange(n) for n in (SIZE, SIZE, SIZE + 1, SIZE + 1)))
    x, z = place[:, :2], place[:, 2:]
    probability = JOINT[x[:, 0], x[:, 1]] * kernel_VX[x[:, 0], z[:, 0]] * kernel_VX[x[:, 1], z[:, 1]]
    total = 0.0
    for i in (0, 1):
        logits_NV = tables[i][z[:, 1 - i]] + 0.7  # logits are defined up to a constant
        times = torch.full((len(x),), t, dtype=torch.float64)
        divergence = process.divergence(logits_NV, x[:, i], z[:, i], times)
        weight = torch.where(z[:, i] == SIZE, mask_weight, code_weight)
        seen = probability > 0
        total += float((probability * weight * divergence)[seen].sum())
    return total


@pytest.mark.parametrize("make", PROCESSES)
def test_the_divergence_is_least_where_the_model_knows(make):
    """The expected w·D over x of p(x | z) has its minimum, a gradient of 0, at p(x_i | z_j, j ≠ i)."""
    process, t = make(LogLinear()), 0.4
    kernel_VX, (table, _) = kernel(process, t), beliefs(process, t)
    for own, other in itertools.product(range(SIZE + 1), repeat=2):
        if not kernel_VX[:, [own, other]].sum(0).all():
            continue  # no token is ever masked, or unmasked
        posterior_V = table[other].exp() * kernel_VX[:, own]
        if own < SIZE and isinstance(process, Absorbing):
            continue  # a token that is seen has no loss
        posterior_V /= posterior_V.sum()
        tables = (torch.arange(SIZE), torch.full((SIZE,), own), torch.full((SIZE,), t).double())

        def expected(logits_V, tables=tables, posterior_V=posterior_V):
            return (posterior_V * process.divergence(logits_V.expand(SIZE, SIZE), *tables)).sum()

        logits_V = table[other].clone().requires_grad_()
        least = expected(logits_V)
        (gradient,) = torch.autograd.grad(least, logits_V)
        torch.testing.assert_close(gradient, torch.zeros(SIZE, dtype=torch.float64), atol=1e-8, rtol=0)
        for step in (0.3, -0.3):
            assert expected(table[other] + step * torch.tensor([1.0, -1.0, 0.5])) > least.detach()


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine(), Geometric()], ids=str)
@pytest.mark.parametrize("make", PROCESSES)
@pytest.mark.parametrize(("t", "s"), [(0.9, 0.4), (1.0, 0.0), (0.31, 0.3), (0.2, 0.0)])
def test_the_posterior_is_bayes_rule(make, schedule, t, s):
    """Σ over x_0 of p(x_0 | own z_t, others) q(x_s | x_0, z_t), from the chain's own transition table."""
    process = make(schedule)
    at_t, at_s = kernel(process, t), kernel(process, s) if s else torch.eye(SIZE, SIZE + 1, dtype=torch.float64)
    step_XX = transition(process, s, t)
    torch.testing.assert_close(at_s @ step_XX, at_t, rtol=1e-9, atol=1e-12)
    assert (step_XX >= -1e-12).all()
    belief_V = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    for z in range(SIZE + 1):
        if not float(at_t[:, z].sum()):
            continue
        own_V = belief_V * at_t[:, z] / (belief_V @ at_t[:, z])
        expected_X = sum(own_V[x] * at_s[x] * step_XX[:, z] / at_t[x, z] for x in range(SIZE) if own_V[x])
        got = process.posterior(belief_V.log()[None], torch.tensor([z]), torch.tensor([SIZE]), t, s)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got[0].exp(), expected_X, rtol=1e-9, atol=1e-12)


def transition(process, s, t):
    """q(x_t | x_s): what is clean at s stays so with α_t / α_s; `<mask>` and noise arrive from everywhere."""
    shares = [
        [1.0, 0.0, 0.0] if x == 0 else [float(v) for v in process.shares(torch.tensor(x, dtype=torch.float64))]
        for x in (s, t)
    ]
    (clean_s, uniform_s, mask_s), (clean_t, uniform_t, mask_t) = shares
    kept = clean_t / clean_s
    table = torch.full((SIZE + 1, SIZE + 1), (uniform_t - kept * uniform_s) / SIZE, dtype=torch.float64)
    table[:, SIZE] = mask_t - kept * mask_s
    return table + kept * torch.eye(SIZE + 1, dtype=torch.float64)


@pytest.mark.parametrize("make", PROCESSES)
def test_sampling_follows_the_distribution(make):
    """Both tokens at once in 100 steps. Chi-square with 8 degrees of freedom: above 26.1 once in 1,000 times."""
    process, count, steps, drawn = make(Cosine(0.0)), 20_000, 100, generator()
    z = process.prior(torch.full((count, 2), SIZE), torch.rand(count, 2, generator=drawn, dtype=torch.float64))
    for step in range(steps, 0, -1):
        t, s = (step / steps) ** 2, ((step - 1) / steps) ** 2  # much of the noise leaves at the end
        tables = beliefs(process, min(t, 1 - 1e-9))
        after = []
        for i in (0, 1):
            log_X = process.posterior(
                tables[i][z[:, 1 - i]].nan_to_num(nan=math.log(1 / SIZE)), z[:, i], torch.full((count,), SIZE), t, s
            )
            after.append(torch.multinomial(log_X.exp(), 1, generator=drawn)[:, 0])
        z = torch.stack(after, 1)
    assert int(z.max()) < SIZE
    counts = torch.bincount(z[:, 0] * SIZE + z[:, 1], minlength=SIZE**2).double()
    expected = JOINT.flatten() * count
    # In a step of finite size the two tokens are drawn as if independent; 100 steps leave little of that.
    assert float(((counts - expected) ** 2 / expected).sum()) < 26.1


@pytest.mark.parametrize("make", PROCESSES)
def test_noise_has_the_shares_of_the_process(make):
    """Chi-square over clean, each other id and `<mask>`, at most 4 degrees of freedom: above 18.5 once in 1,000."""
    process, count, drawn = make(Cosine()), 30_000, generator()
    ids_P = torch.full((count,), 11)
    span_P, spans_S2 = torch.ones(count, dtype=torch.int64), torch.tensor([[7, 10], [10, 13]])
    t_P = torch.full((count,), 0.6, dtype=torch.float64)
    made = process.corrupt(
        ids_P, span_P, spans_S2, t_P, lambda: torch.rand(count, generator=drawn, dtype=torch.float64)
    )
    local = torch.where(made.ids_P == MASK, SIZE, made.ids_P - 10)
    expected = kernel(process, 0.6)[1] * count
    counts = torch.bincount(local, minlength=SIZE + 1).double()
    there = expected > 0
    assert not counts[~there].any()
    assert float(((counts - expected) ** 2 / expected)[there].sum()) < 18.5
    mask_weight, code_weight = process.weights(t_P[:1])
    loss_P = made.ids_P == MASK if isinstance(process, Absorbing) else torch.ones_like(made.predicted_P)
    assert torch.equal(made.predicted_P, loss_P)
    weights = torch.where(made.ids_P == MASK, mask_weight, code_weight).where(loss_P, 0.0)
    torch.testing.assert_close(made.weight_P, weights)


@pytest.mark.parametrize("make", PROCESSES)
def test_structure_and_what_is_clean_are_left_alone(make):
    drawn = generator()
    ids_P, span_P = torch.tensor([2, 10, 11, 12]), torch.tensor([-1, 0, 0, 0])
    t_P = torch.tensor([1.0, 0.0, 0.9, 0.9], dtype=torch.float64)
    made = make(LogLinear()).corrupt(
        ids_P, span_P, torch.tensor([[10, 13]]), t_P, lambda: torch.rand(4, generator=drawn, dtype=torch.float64)
    )
    assert made.ids_P[:2].tolist() == [2, 10]
    assert made.predicted_P[:2].tolist() == [False, False]
    assert made.weight_P[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("make", [Uniform, Hybrid])
@pytest.mark.parametrize("t", [1e-3, 0.5, 1 - 1e-4])
def test_fp32_is_enough_for_the_divergence(make, t, schedule):
    """Against fp64, over 5,000 ids and at both ends of time, with times in fp32 too."""
    process, size = make(schedule), 5000
    logits_NV = 3 * torch.randn(6, size, generator=generator(), dtype=torch.float64)
    target_N, noised_N = torch.arange(6), torch.tensor([0, 1, 9, 77, size, size])
    times = torch.full((6,), t, dtype=torch.float64)
    exact = process.divergence(logits_NV, target_N, noised_N, times)
    assert exact.isfinite().all()
    close = process.divergence(logits_NV.float(), target_N, noised_N, times.float())
    torch.testing.assert_close(close.double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("make", PROCESSES)
def test_a_token_that_cannot_change_stays_whatever_the_model_says(make):
    """A model that is certain of another token than the one that stands there."""
    process = make(LogLinear(0.0))
    certain_MV = torch.tensor([[0.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    for t, s in ((0.7, 0.3), (0.3, 0.0)):
        p_X = process.posterior(certain_MV, torch.tensor([1]), torch.tensor([SIZE]), t, s)[0].exp()
        assert float(p_X.sum()) == pytest.approx(1)
        if isinstance(process, Absorbing):
            assert p_X.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("share", [0, 1, -0.1, "much"])
def test_a_share_outside_of_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"uniform_share .* must be between 0 and 1"):
        Hybrid(uniform_share=share)
