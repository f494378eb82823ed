"""Whole samplers and guidance against independent rewrites of the papers they come from."""

import math

import numpy as np
import pytest
import torch

from multidiff.samplers import MaskSampler
from multidiff.samplers.guidance import Guidance, guide
from tests.helpers.sampling import network, run
from tests.helpers.toys import generator


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


def test_guidance():
    conditional = torch.tensor([[0.0, 1.0, -torch.inf]])
    unconditional = torch.tensor([[0.5, 0.5, -torch.inf]])
    assert guide(conditional, [(unconditional, 1.0)]).tolist() == conditional.tolist()
    assert guide(conditional, [(unconditional, 3.0)]).tolist() == [[-1.0, 2.0, -torch.inf]]
    assert guide(conditional, [(unconditional, 3.0), (torch.zeros(1, 3), 2.0)]).tolist() == [[-1.0, 3.0, -torch.inf]]
    steps_R = torch.tensor([3, 1, 5])
    linear, interval = Guidance(3.0, "linear"), Guidance(3.0, [0.25, 0.5])
    assert [linear.scale_at(3.0, k, steps_R).tolist() for k in range(3)] == [[1, 3, 1], [2, 3, 1.5], [3, 3, 2]]
    assert [interval.scale_at(3.0, k, torch.tensor([4])).tolist() for k in range(4)] == [[1], [3], [3], [1]]
    assert Guidance().scale_at(3.0, 0, steps_R).tolist() == [3, 3, 3]
