"""The reverse process against enumeration, and editing."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from multidiff.samplers import MaskSampler
from multidiff.samplers.remasking import Remasking
from tests.helpers.sampling import conditionals, drive, run
from tests.helpers.toys import generator


@pytest.mark.parametrize(
    "remask",
    [{}, {"remask": "cap", "eta": 0.3}, {"remask": "rescale", "eta": 0.5}, {"remask": "loop", "eta": 0.4}],
    ids=lambda remask: remask.get("remask", "none"),
)
@pytest.mark.parametrize("draft", [None, (1, 2, 0), (1, 1, 0)], ids=["blank", "begun", "complete"])
def test_posterior_on_a_toy_joint(remask, draft):
    """Every path of the Markov chain, enumerated, gives the distribution that is drawn from: from masks alone, or from
    the time at which there is as much noise as a draft has, or is said to have."""
    if draft == (1, 1, 0) and not remask:
        return
    steps, number, size = 6, 6000, 2
    joint = torch.rand(2, 2, 2, generator=generator(0), dtype=torch.float64) ** 3
    joint /= joint.sum()
    model = conditionals(joint)
    states = list(itertools.product(range(size + 1), repeat=3))
    share = {state: float(state == (draft or (size,) * 3)) for state in states}
    presumed = 0.4 if draft == (1, 1, 0) else 0.0
    noise = max((draft or (size,) * 3).count(size) / 3, presumed)
    start = noise if remask.get("remask") != "loop" else 1 - (1 - noise) / 0.9 * 0.45
    for k in range(steps):
        t, s = start * (1 - k / steps), start * (1 - (k + 1) / steps)

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
    more = {}
    if draft:
        draft_RN = torch.tensor([[-1 if code == size else code for code in draft]]).expand(number, 3)
        more = {"draft_RN": draft_RN, "noise_R": torch.full((number,), presumed, dtype=torch.float64)}
    drawn_RN, _ = drive(sampler, torch.full((number, 3), size), steps, model, [generator(3)] * number, **more)
    final = [state for state in states if size not in state]
    counts = [int((drawn_RN == torch.tensor(state)).all(1).sum()) for state in final]
    assert sum(counts) == number
    possible = [(count, share[state] * number) for count, state in zip(counts, final, strict=True) if share[state]]
    assert sum(count for count, _ in possible) == number
    assert chisquare(*zip(*possible, strict=True)).pvalue > 1e-3


def test_conf_remasks_the_unsure():
    probs_RN = torch.tensor([[0.9, 0.2, torch.nan, 0.5]], dtype=torch.float64)
    conf, four = Remasking("conf"), torch.tensor([4])
    assert conf.alphas(1, four, torch.ones(1)).tolist() == [[0.25, 0.5]]
    weight = np.exp([-0.9, -0.2, -0.5])
    expected = weight / weight.sum() * min(1, (1 - 0.5) / 0.25)
    ours = conf.sigma(1, four, torch.ones(1), probs_RN)[0]
    np.testing.assert_allclose(ours[[0, 1, 3]].numpy(), expected)
    assert float(ours[2]) == 0


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
