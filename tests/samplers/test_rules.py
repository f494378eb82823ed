"""Decoding rules against independent rewrites of the papers' definitions."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from multidiff.samplers import MaskSampler
from multidiff.samplers.order import halton_ranks
from multidiff.samplers.remasking import alphas, sigma
from multidiff.samplers.token_sampling import sample_tokens
from multidiff.samplers.unmasking import entropy_bound, factor, threshold
from tests.helpers.sampling import conditionals, run
from tests.helpers.toys import generator


def network(length, size, seed):
    """A toy denoiser: logits_NV of a row depend on everything that it holds."""
    weight = torch.randn(length, size + 1, length, size, generator=generator(seed), dtype=torch.float64)

    def model(row_N):
        return sum(weight[n, int(token)] for n, token in enumerate(row_N)) * (2 / math.sqrt(length))

    return model


@pytest.mark.parametrize(("temperature", "steps", "block"), [(0.0, 9, 4), (0.0, 12, 12), (0.7, 6, 6), (1.3, 6, 4)])
def test_llada(temperature, steps, block):
    length, size = 12, 5
    model = network(length, size, 1)
    noise = generator(7)
    row = [size] * length
    blocks = [range(start, min(start + block, length)) for start in range(0, length, block)]
    for places in blocks:
        rounds = steps // len(blocks)
        transfers = [len(places) // rounds + (k < len(places) % rounds) for k in range(rounds)]
        for transfer in transfers:
            logits_NV = model(row)
            masked = [n for n in places if row[n] == size]
            confidence, guess = {}, {}
            if temperature:
                uniform = torch.rand(len(masked), 1 + size, generator=noise, dtype=torch.float64)[:, 1:]
            for i, n in enumerate(masked):
                if temperature:  # their Gumbel noise
                    guess[n] = int((logits_NV[n].exp() / (-uniform[i].log()) ** temperature).argmax())
                else:
                    guess[n] = int(logits_NV[n].argmax())
                confidence[n] = float(torch.softmax(logits_NV[n], -1)[guess[n]])
            for n in sorted(masked, key=lambda n: -confidence[n])[:transfer]:
                row[n] = guess[n]
    sampler = MaskSampler(
        unmasking="linear", block_length=block, temperature=temperature, draw="gumbel" if temperature else "inverse"
    )
    ours_RN = run(sampler, torch.full((1, length), size), steps, model, [generator(7)])
    assert ours_RN[0].tolist() == row


def test_maskgit():
    length, size, steps, tau = 11, 4, 5, 3.0
    model = network(length, size, 2)
    noise = generator(5)
    row = torch.full((length,), size)
    for k in range(steps):
        masked = torch.nonzero(row == size).flatten().tolist()
        uniform = torch.rand(len(masked), 2, generator=noise, dtype=torch.float64)
        logits_NV = model(row)
        guess, confidence = row.clone(), torch.full((length,), torch.inf, dtype=torch.float64)
        for i, n in enumerate(masked):
            p_V = torch.softmax(logits_NV[n], -1)
            guess[n] = int((p_V.cumsum(0) <= uniform[i, 0]).sum())
            confidence[n] = p_V[guess[n]].log() - tau * (1 - (k + 1) / steps) * (-uniform[i, 1].log()).log()
        keep = max(1, min(len(masked) - 1, math.floor(length * math.cos(math.pi / 2 * (k + 1) / steps))))
        keep = 0 if k + 1 == steps else keep
        row = guess.clone()
        row[confidence.argsort()[:keep]] = size
    sampler = MaskSampler(order_temperature=tau)
    assert torch.equal(run(sampler, torch.full((1, length), size), steps, model, [generator(5)])[0], row)


@pytest.mark.parametrize("rule", ["threshold", "factor", "entropy_bound", "margin"])
def test_greedy_rules_step_by_step(rule):
    length, size = 10, 4
    model = network(length, size, 3)
    row, seen = [size] * length, []
    while size in row:
        p_NV = torch.softmax(model(row), -1).numpy()
        masked = [n for n in range(length) if row[n] == size]
        best = {n: float(p_NV[n].max()) for n in masked}
        if rule == "threshold":
            chosen = [n for n in masked if best[n] >= 0.6] or [max(masked, key=lambda n: best[n])]
        elif rule == "factor":
            order = sorted(masked, key=lambda n: -best[n])
            fitting = [k for k in range(1, len(order) + 1) if (k + 1) * (1 - best[order[k - 1]]) < 1.1]
            chosen = order[: max(fitting, default=1)]
        elif rule == "entropy_bound":
            entropy = {n: float(-(p_NV[n] * np.log(p_NV[n])).sum()) for n in masked}
            order = sorted(masked, key=lambda n: entropy[n])
            chosen = order[:1]
            for k in range(2, len(order) + 1):
                if sum(entropy[n] for n in order[:k]) - max(entropy[n] for n in order[:k]) <= 0.8:
                    chosen = order[:k]
        else:
            two = {n: np.sort(p_NV[n])[-2:] for n in masked}
            chosen = sorted(masked, key=lambda n: two[n][0] - two[n][1])[:2]
        for n in chosen:
            row[n] = int(p_NV[n].argmax())
        seen.append(list(row))
    sampler = {
        "threshold": MaskSampler(unmasking="threshold", threshold=0.6, temperature=0.0),
        "factor": MaskSampler(unmasking="factor", factor=1.1, temperature=0.0),
        "entropy_bound": MaskSampler(order="entropy", unmasking="entropy_bound", entropy_bound=0.8, temperature=0.0),
        "margin": MaskSampler(order="margin", unmasking="linear", temperature=0.0),
    }[rule]
    ours = []
    run(sampler, torch.full((1, length), size), 5 if rule == "margin" else None, model, [generator()], ours)
    ours = [rows[0].tolist() for rows in ours]
    assert [rows for rows, before in zip(ours, [None, *ours], strict=False) if rows != before] == seen
    assert 1 < len(seen) < length


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=12), st.floats(0.01, 0.99))
def test_adaptive_counts(probabilities, bound):
    probs_N = torch.tensor(sorted(probabilities, reverse=True), dtype=torch.float64)
    padded_RN = torch.cat([probs_N, torch.full((2,), -1.0, dtype=torch.float64)])[None]
    assert int(threshold(padded_RN, bound)) == max(1, sum(p >= bound for p in probabilities))
    fitting = [n for n in range(1, len(probs_N) + 1) if (n + 1) * (1 - float(probs_N[n - 1])) < 3 * bound]
    assert int(factor(padded_RN, 3 * bound)) == max(fitting, default=1)
    padded_RN = torch.cat([probs_N.flip(0), torch.full((2,), torch.inf, dtype=torch.float64)])[None]
    before = [float(probs_N.flip(0)[:n].sum()) for n in range(len(probs_N))]
    assume(all(abs(total - bound) > 1e-9 for total in before))
    assert int(entropy_bound(padded_RN, bound)) == sum(total <= bound for total in before)
    empty_RN = torch.full((1, 3), -1.0, dtype=torch.float64)
    assert int(threshold(empty_RN, bound)) == int(factor(empty_RN, bound)) == 0


@pytest.mark.parametrize(
    "remask",
    [{}, {"remask": "cap", "eta": 0.3}, {"remask": "rescale", "eta": 0.5}, {"remask": "loop", "eta": 0.4}],
    ids=lambda remask: remask.get("remask", "none"),
)
def test_posterior_on_a_toy_joint(remask):
    """Every path of the Markov chain, enumerated, gives the distribution that is drawn from."""
    steps, number, size = 6, 6000, 2
    joint = torch.rand(2, 2, 2, generator=generator(0), dtype=torch.float64) ** 3
    joint /= joint.sum()
    model = conditionals(joint)
    states = list(itertools.product(range(size + 1), repeat=3))
    share = {state: float(state == (size,) * 3) for state in states}
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps

        def alpha(time):
            if remask.get("remask") != "loop":
                return 1 - time
            if time > 0.55:
                return (1 - time) / 0.45 * 0.9
            return 0.9 if time > 0.05 else 0.9 + 0.1 * (0.05 - time) / 0.05

        before, after = alpha(t), alpha(s)
        most = min(1.0, (1 - after) / before) if before else 1.0
        eta = remask.get("eta", 0.0)
        again = {"cap": min(eta, most), "rescale": eta * most, "loop": min(eta, most) * (0.05 < t <= 0.55)}
        again = again.get(remask.get("remask"), 0.0)
        decide = (after - (1 - again) * before) / (1 - before)
        following = dict.fromkeys(states, 0.0)
        for state, p in share.items():
            p_NV = torch.softmax(model(torch.tensor(state)), -1).tolist() if p else []
            for target in states if p else []:
                q = p
                for n, (now, then) in enumerate(zip(state, target, strict=True)):
                    if now == size:
                        q *= 1 - decide if then == size else decide * p_NV[n][then]
                    else:
                        q *= again if then == size else (1 - again) * (then == now)
                following[target] += q
        share = following
    assert sum(share[state] for state in states if size in state) < 1e-9
    sampler = MaskSampler(order="random", unmasking="ancestral", **remask)
    drawn_RN = run(sampler, torch.full((number, 3), size), steps, model, [generator(3)] * number)
    final = [state for state in states if size not in state]
    counts = [int((drawn_RN == torch.tensor(state)).all(1).sum()) for state in final]
    assert sum(counts) == number
    assert chisquare(counts, [share[state] * number for state in final]).pvalue > 1e-3


def test_conf_remasks_the_unsure():
    probs_RN = torch.tensor([[0.9, 0.2, torch.nan, 0.5]], dtype=torch.float64)
    one, four = torch.tensor([1]), torch.tensor([4])
    alpha_R2 = alphas(one, four, "conf", 0.55, 0.05, 0.9)
    assert alpha_R2.tolist() == [[0.25, 0.5]]
    weight = np.exp([-0.9, -0.2, -0.5])
    expected = weight / weight.sum() * min(1, (1 - 0.5) / 0.25)
    ours = sigma(alpha_R2, one, four, probs_RN, "conf", None, 0.55, 0.05)[0]
    np.testing.assert_allclose(ours[[0, 1, 3]].numpy(), expected)
    assert float(ours[2]) == 0


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (4, 4), (8, 5), (64, 64)])
def test_halton_covers_every_cell_once(height, width):
    ranks = halton_ranks(height, width)
    assert sorted(ranks.flatten().tolist()) == list(range(height * width))
    if height * width >= 16:  # spread: the first quarter of the cells is in all quarters of the grid
        early = np.argwhere(ranks < height * width // 4 + 1)
        assert np.ptp(early[:, 1]) >= width // 2
    if (height, width) == (4, 4):  # 1/2, 1/3; 1/4, 2/3; 3/4, 1/9; 1/8, 4/9
        assert [ranks[2, 1], ranks[1, 2], ranks[3, 0], ranks[0, 1]] == [0, 1, 2, 3]


def grid(height, width):
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))[None]


def decided_in_turn(sampler, coords_RN3, levels_RN=None, size=3, extent_RN3=None):
    """Which positions are decided at each step, for a model that is surest of the last position."""
    number = coords_RN3.shape[1]
    sample_RN = torch.full((1, number), size)
    levels_RN = torch.zeros_like(sample_RN) if levels_RN is None else levels_RN
    logits_NV = torch.zeros(number, size, dtype=torch.float64)
    logits_NV[:, 0] = torch.arange(number)
    state, turns = sampler.start(sample_RN, levels_RN, coords_RN3, number, extent_RN3=extent_RN3), []
    for timestep in range(state.steps - 1, -1, -1):
        where_RN = sampler.needs(state)
        output = sampler.step(
            logits_NV[where_RN[0]], timestep, sample_RN, where=where_RN, state=state, generator=[generator()]
        )
        turns.append(torch.nonzero(output.prev_sample[0] != sample_RN[0]).flatten().tolist())
        sample_RN, state = output.prev_sample, output.state
    return turns


def test_orders_by_place():
    line_RN3 = torch.arange(5)[None, :, None].expand(1, 5, 3)
    linear = {"unmasking": "linear", "temperature": 0.0}
    assert decided_in_turn(MaskSampler(order="left_to_right", **linear), line_RN3) == [[0], [1], [2], [3], [4]]
    assert decided_in_turn(MaskSampler(order="row_scan", **linear), grid(2, 2)) == [[0], [1], [2], [3]]
    ranks = torch.from_numpy(halton_ranks(3, 4)).flatten()
    assert decided_in_turn(MaskSampler(order="halton", **linear), grid(3, 4)) == [[int(n)] for n in ranks.argsort()]
    # Some cells are known, the last row among them: the others keep their turn.
    some = [1, 2, 6, 7]
    extent_RN3 = torch.tensor([1, 3, 4]).expand(1, 4, 3)
    turns = decided_in_turn(MaskSampler(order="halton", **linear), grid(3, 4)[:, some], extent_RN3=extent_RN3)
    assert [some[n] for (n,) in turns] == sorted(some, key=lambda n: int(ranks[n]))
    with pytest.raises(ValueError, match=r"order 'halton' needs codes on a grid.*order 'left_to_right'"):
        decided_in_turn(MaskSampler(order="halton"), line_RN3)
    with pytest.raises(ValueError, match=r"order 'left_to_right' needs codes in a line.*order 'row_scan'"):
        decided_in_turn(MaskSampler(order="left_to_right"), grid(2, 2))


def test_coarse_to_fine_and_blocks():
    levels_RN = torch.arange(3).repeat(2)[None]
    coords_RN3 = torch.stack([torch.arange(2).repeat_interleave(3), levels_RN[0], torch.zeros(6)], -1)[None].long()
    linear = {"unmasking": "linear", "temperature": 0.0}
    sure = decided_in_turn(MaskSampler(**linear), coords_RN3, levels_RN)
    assert sure == [[5], [4], [3], [2], [1], [0]]
    by_level = [[3], [0], [4], [1], [5], [2]]
    assert decided_in_turn(MaskSampler(level_penalty=100.0, **linear), coords_RN3, levels_RN) == by_level
    assert decided_in_turn(MaskSampler(block_length="level", **linear), coords_RN3, levels_RN) == by_level
    soft = decided_in_turn(MaskSampler(level_penalty=0.2, **linear), coords_RN3, levels_RN)
    assert soft not in (sure, by_level)
    blocks = decided_in_turn(MaskSampler(block_length=4, **linear), coords_RN3, levels_RN)
    assert blocks == [[3], [2], [1], [0], [5], [4]]
    with pytest.raises(ValueError, match="num_inference_steps 1 is less than the 2 blocks of block_length 4"):
        MaskSampler(block_length=4).start(torch.full((1, 6), 3), levels_RN, coords_RN3, 1)


def test_truncations():
    p_V = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    uniform_M = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def drawn(**truncation):
        tokens = sample_tokens(p_V.log().expand(1000, 5), uniform_M, **truncation).token_M
        return (torch.bincount(tokens, minlength=5) / 1000).tolist()

    assert drawn() == pytest.approx(p_V.tolist(), abs=2e-3)
    assert drawn(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0], abs=2e-3)
    assert drawn(top_p=0.71) == pytest.approx([0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0], abs=2e-3)
    # Entropy 1.39 nats; surprises .92, 1.20, 1.90, 2.30, 3.00: nearest are 1.20, .92, 1.90.
    assert drawn(typical_p=0.2) == pytest.approx([0, 1, 0, 0, 0], abs=2e-3)
    assert drawn(typical_p=0.65) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0], abs=2e-3)
    assert drawn(top_k=2, top_p=0.5) == pytest.approx([1, 0, 0, 0, 0], abs=2e-3)


def test_gumbel_draws_follow_the_distribution():
    p_V = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
    uniform_MV = torch.rand(20_000, 4, generator=generator(), dtype=torch.float64)
    for temperature in (1.0, 0.5):
        tokens = sample_tokens(p_V.log().expand(20_000, 4), uniform_MV, temperature=temperature).token_M
        counts = torch.bincount(tokens, minlength=4)
        expected = p_V ** (1 / temperature) / (p_V ** (1 / temperature)).sum() * 20_000
        assert counts[1] == 0
        assert chisquare(counts[[0, 2, 3]].numpy(), expected[[0, 2, 3]].numpy()).pvalue > 1e-3


def test_a_forced_place_that_is_no_number_is_a_sentence():
    with pytest.raises(ValueError, match=r"^here: forced {'x': 3} must be a table of whole numbers, place: id"):
        MaskSampler.from_settings({"forced_tokens": {"x": 3}}, "here")


def test_forbidden_forced_and_repeated_codes():
    logits_NV = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64).expand(5, 4)
    blank_RN = torch.full((1, 5), 4)

    def made(**options):
        sampler = MaskSampler(unmasking="linear", temperature=0.0, **options)
        return run(sampler, blank_RN, 5, lambda row_N: logits_NV, [generator()])[0].tolist()

    assert made() == [0] * 5
    assert made(suppress_tokens=[0, 2]) == [1] * 5
    assert made(forced_tokens={1: 3, 4: 2}) == [0, 3, 0, 0, 2]
    assert made(forced_tokens={"1": 3}) == [0, 3, 0, 0, 0]  # as JSON has it
    # log p of code 0 is -0.44, of code 1 -1.44: it takes a factor of more than 3.3 to choose another one.
    assert made(repetition_penalty=3.0) == [0] * 5
    assert sorted(made(repetition_penalty=3.5)) == [0, 0, 0, 0, 1]
    for options, message in (
        ({"suppress_tokens": [4]}, "suppress_tokens: no code is called 4; there are 0 to 3"),
        ({"suppress_tokens": [0, 1, 2, 3]}, "forbidden leaves none of the 4 codes"),
        (
            {"suppress_tokens": [1], "forced_tokens": {0: 1}},
            "forced wants code 1 at place 0, which forbidden rules out",
        ),
        ({"min_length": 2}, "min_length 2 needs codes whose length varies"),
        ({"forced_tokens": {5: 1}}, "forced_tokens: place 5 is none of the 5 codes to fill in"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**options)


@pytest.mark.parametrize(("least", "most", "stops_at"), [(None, None, 0), (3, None, 3), (None, 2, 2), (4, 4, 4)])
def test_lengths(least, most, stops_at):
    """A model that would stop at once, or never."""
    coords_RN3 = torch.arange(6)[None, :, None].expand(1, 6, 3)
    logits_NV = torch.zeros(6, 4, dtype=torch.float64)
    logits_NV[:, 3] = 5.0 if most is None or least is not None else -5.0
    sampler = MaskSampler(unmasking="linear", temperature=0.0, min_length=least, max_length=most)
    sample_RN = torch.full((1, 6), 4)
    state = sampler.start(sample_RN, torch.zeros_like(sample_RN), coords_RN3, 1, torch.full_like(sample_RN, 3))
    where_RN = sampler.needs(state)
    final_N = sampler.step(logits_NV, 0, sample_RN, where=where_RN, state=state, generator=[generator()]).prev_sample[0]
    assert int((final_N == 3).nonzero()[0]) == stops_at


def test_restrictions_that_leave_nothing_are_named():
    coords_RN3 = torch.arange(4)[None, :, None].expand(1, 4, 3)
    sample_RN = torch.full((1, 4), 4)
    for options, temperature in (
        ({"max_length": 1, "suppress_tokens": [3]}, 1.0),
        ({"forced_tokens": {0: 3}, "min_length": 1}, 0.0),
    ):
        sampler = MaskSampler(unmasking="linear", temperature=temperature, **options)
        state = sampler.start(sample_RN, torch.zeros_like(sample_RN), coords_RN3, 1, torch.full_like(sample_RN, 3))
        with pytest.raises(ValueError, match=r"nothing is left to draw at a position: change (forbidden|forced)"):
            sampler.step(
                torch.zeros(4, 4), 0, sample_RN, where=sampler.needs(state), state=state, generator=[generator()]
            )


def test_a_penalty_is_for_content_of_the_same_level():
    """Stops behind the content repeat nothing, and code 0 of level 1 is another than that of level 0."""
    logits_NV = torch.tensor([0.5, 0.0, -9.0, 1.0], dtype=torch.float64).expand(4, 4)
    sample_RN = torch.full((1, 4), 4)
    levels_RN = torch.tensor([[0, 0, 1, 1]])
    sampler = MaskSampler(order="left_to_right", unmasking="linear", temperature=0.0, repetition_penalty=5.0)
    coords_RN3 = torch.arange(4)[None, :, None].expand(1, 4, 3)
    for stop, expected in ((3, [3, 3, 3, 3]), (-1, [3, 0, 3, 0])):
        made_RN = sample_RN
        state = sampler.start(made_RN, levels_RN, coords_RN3, 4, torch.full_like(made_RN, stop))
        for timestep in range(3, -1, -1):
            where_RN = sampler.needs(state)
            output = sampler.step(
                logits_NV[where_RN[0]], timestep, made_RN, where=where_RN, state=state, generator=[generator()]
            )
            made_RN, state = output.prev_sample, output.state
        assert made_RN[0].tolist() == expected


def test_settings_survive_json():
    sampler = MaskSampler(
        forced_tokens={0: 2, 3: 1}, suppress_tokens=[5], guidance_scale={"text": 2.0}, canvas={"frames": 4}
    )
    again = MaskSampler.from_settings(json.loads(json.dumps(sampler.settings)), "x")
    assert again.settings == sampler.settings


def test_editing_replaces_what_the_model_has_come_to_doubt():
    """At first code 0 is likelier everywhere; once position 0 is decided, the model is sure that all are 1."""

    def model(row_N):
        sure = row_N[0] != 2
        p_V = torch.tensor([0.05, 0.95] if sure else [0.6, 0.4], dtype=torch.float64)
        return p_V.log().expand(4, 2)

    blank_RN, shared = torch.full((1, 4), 2), {"unmasking": "linear", "temperature": 0.0}
    assert run(MaskSampler(**shared), blank_RN, 4, model, [generator()]).tolist() == [[0, 1, 1, 1]]
    edited = MaskSampler(remask="edit", editing_threshold=0.9, **shared)
    assert run(edited, blank_RN, 4, model, [generator()]).tolist() == [[1, 1, 1, 1]]
    strict = MaskSampler(remask="edit", editing_threshold=0.99, **shared)
    assert run(strict, blank_RN, 4, model, [generator()]).tolist() == [[0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"order": "hilbert"}, "order 'hilbert' must be one of random, confidence"),
        ({"unmasking": "half"}, "count 'half' must be one of linear, cosine"),
        ({"top_p": 0}, "top_p 0"),
        ({"temperature": -1}, "temperature -1 must be at least 0"),
        ({"num_inference_steps": 0}, "num_inference_steps 0"),
        ({"order": "random", "order_temperature": 1.0}, "order 'random' does not go with order_temperature 1.0"),
        ({"unmasking": "threshold", "threshold": 0.9, "order": "margin"}, "count 'threshold' .* order 'margin'"),
        ({"unmasking": "entropy_bound", "entropy_bound": 0.1}, "count 'entropy_bound' .* order 'confidence'"),
        (
            {"unmasking": "threshold", "threshold": 0.9, "num_inference_steps": 4},
            "count 'threshold' .* num_inference_steps 4",
        ),
        ({"unmasking": "threshold"}, "count 'threshold' needs threshold"),
        ({"threshold": 0.9}, "threshold 0.9 goes with count threshold, not 'cosine'"),
        ({"eta": 0.1}, "eta 0.1 goes with remask cap or rescale or loop, not 'none'"),
        ({"remask": "cap", "eta": 0.1}, "remask 'cap' does not go with count 'cosine'"),
        ({"remask": "cap", "order": "random", "unmasking": "ancestral"}, "remask 'cap' needs eta"),
        ({"order": "random", "unmasking": "ancestral", "block_length": 4}, "count 'ancestral' .* block_length 4"),
        ({"temperature": "hot"}, "temperature 'hot' must be a number"),
        ({"temperature": math.nan}, "temperature nan must be a number"),
        ({"temperature": math.inf}, "temperature inf must be a number, at most 1,000,000"),
        ({"temperature": 1e-300}, "temperature 1e-300 must be 0, which is greedy, or at least"),
        ({"top_k": 10**400}, "must be a whole number, at most 1,000,000"),
        ({"forced_tokens": {"first": 1}}, "forced .* must be a table of whole numbers"),
        ({"guidance_scale": math.inf}, "guidance_scale inf must be a number or a table of numbers"),
        ({"guidance_scale": {"text": math.nan}}, "guidance_scale .* must be a number or a table of numbers"),
        ({"guidance_schedule": ["a", "b"], "guidance_scale": 2.0}, "guidance_schedule .* must be constant, linear"),
        ({"top_k": 2.5}, "top_k 2.5 must be a whole number"),
        ({"block_length": True}, "block_length True must be a whole number or 'level'"),
        ({"suppress_tokens": 5}, "forbidden 5 must be a list of whole numbers"),
        ({"forced_tokens": [1]}, r"forced \[1\] must be a table of whole numbers"),
        ({"canvas": 5}, "canvas 5 must be a table of whole numbers"),
        ({"guidance_scale": "x"}, "guidance_scale 'x' must be a number or a table of numbers"),
        ({"num_inference_steps": 2.5}, "num_inference_steps 2.5 must be a whole number"),
        ({"exponent": 0.5, "unmasking": "power"}, "exponent 0.5 must be at least 1"),
        (
            {"unmasking": "factor", "factor": 1.0, "guidance_scale": 2.0, "guidance_schedule": "linear"},
            "count 'factor' does not go with guidance_schedule 'linear'",
        ),
        ({"cache": "approximate_dual"}, "cache 'approximate_dual' does not go with block_length None"),
        (
            {"cache": "approximate_dual", "block_length": 4, "remask": "edit", "editing_threshold": 0.9},
            "cache .* remask 'edit'",
        ),
        ({"temperature": 0.0, "top_p": 0.9}, "temperature 0.0 does not go with top_p 0.9"),
        ({"block_length": "row"}, "block_length 'row' must be a whole number or 'level'"),
        ({"min_length": 3, "max_length": 2}, "min_length 3 is more than max_length 2"),
        ({"guidance_schedule": "linear"}, "guidance_schedule 'linear' needs guidance_scale"),
        ({"guidance_schedule": "sine", "guidance_scale": 2.0}, "guidance_schedule 'sine' must be"),
    ],
)
def test_contradictory_settings_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        MaskSampler(**options)


SAMPLERS = [
    *(
        {"order": order, "unmasking": "cosine"}
        for order in ("random", "confidence", "margin", "entropy", "left_to_right")
    ),
    {"unmasking": "arccos", "order_temperature": 2.0},
    {"unmasking": "power", "exponent": 2.0, "top_k": 3, "typical_p": 0.9},
    {"unmasking": "linear", "block_length": 3, "draw": "gumbel"},
    {"unmasking": "threshold", "threshold": 0.4},
    {"unmasking": "factor", "factor": 1.2, "block_length": 3},
    {"order": "entropy", "unmasking": "entropy_bound", "entropy_bound": 1.0},
    {"order": "random", "unmasking": "ancestral"},
    {"order": "random", "unmasking": "ancestral", "remask": "cap", "eta": 0.2},
    {"order": "random", "unmasking": "ancestral", "remask": "conf"},
    {"unmasking": "linear", "remask": "edit", "editing_threshold": 0.4},
    {"unmasking": "linear", "repetition_penalty": 2.0, "suppress_tokens": [1]},
]


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 100))
def test_every_row_is_as_if_alone(options, lengths, seed):
    sampler, width, size = MaskSampler(**options), max(lengths), 4
    model = network(9, size, seed)

    def of_row(row_N):
        padded = torch.full((9,), size)
        padded[: len(row_N)] = torch.where(row_N < 0, size, row_N)
        return model(padded)[: len(row_N)]

    def drive(sample_RN, seeds):
        number = sample_RN.shape[1]
        zeros_RN = torch.zeros_like(sample_RN)
        coords_RN3 = torch.arange(number)[None, :, None].expand(len(sample_RN), number, 3)
        own = 4 if options["unmasking"] not in ("threshold", "factor", "entropy_bound") else None
        state = sampler.start(sample_RN, zeros_RN, coords_RN3, own)
        generators = [generator(seed) for seed in seeds]
        for timestep in range(state.steps - 1, -1, -1):
            where_RN = sampler.needs(state)
            logits_MV = torch.stack([of_row(row_N) for row_N in sample_RN])[where_RN]
            output = sampler.step(logits_MV, timestep, sample_RN, where=where_RN, state=state, generator=generators)
            sample_RN, state = output.prev_sample, output.state
        return sample_RN

    blank_RN = torch.where(torch.arange(width) < torch.tensor(lengths)[:, None], size, -1)
    seeds = [seed + row for row in range(len(lengths))]
    together_RN = drive(blank_RN, seeds)
    assert torch.equal(together_RN < 0, blank_RN < 0)
    assert bool((together_RN < size).all())
    backwards_RN = drive(blank_RN.flip(0), seeds[::-1]).flip(0)
    assert torch.equal(together_RN, backwards_RN)
    for row, length in enumerate(lengths):
        alone_RN = drive(blank_RN[row : row + 1, :length], seeds[row : row + 1])
        assert torch.equal(alone_RN[0], together_RN[row, :length])
