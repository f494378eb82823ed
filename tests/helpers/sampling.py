"""A sampler driven by a function in place of a model."""

import math

import torch

from tests.helpers.toys import generator


def drive(sampler, sample_RN, steps, model, generators, *, levels_RN=None, coords_RN3=None, seen=None, **more):
    """Run a sampler to its end.

    Args:
        model: gives logits_NV of one row of ids.
        seen: a list that gets (where_RN, sample_RN, state) of each step: what it asked for, and what it made of it.
        more: other arguments of `sampler.start`.

    Returns:
        sample_RN and the state after the last step.
    """
    levels_RN = torch.zeros_like(sample_RN) if levels_RN is None else levels_RN
    if coords_RN3 is None:
        coords_RN3 = torch.arange(sample_RN.shape[1])[:, None].expand(*sample_RN.shape, 3)
    state = sampler.start(sample_RN, levels_RN, coords_RN3, num_inference_steps=steps, generator=generators, **more)
    sample_RN = state.start_RN
    for timestep in range(state.steps - 1, -1, -1):
        where_RN = sampler.needs(state)
        logits_MV = torch.stack([model(row_N) for row_N in sample_RN])[where_RN]
        output = sampler.step(logits_MV, timestep, sample_RN, where=where_RN, state=state, generator=generators)
        sample_RN, state = output.prev_sample, output.state
        if seen is not None:
            seen.append((where_RN, sample_RN, state))
    return sample_RN, state


def run(sampler, sample_RN, steps, model, generators, seen=None):
    """The sample that `drive` makes; `seen` gets the sample after each step."""
    steps_seen = []
    sample_RN, _ = drive(sampler, sample_RN, steps, model, generators, seen=steps_seen)
    if seen is not None:
        seen += [made_RN for _, made_RN, _ in steps_seen]
    return sample_RN


def conditionals(joint):
    """The model that knows `joint` over N symbols of V values: logits of each masked one given the others."""
    size = joint.dim()
    value = joint.shape[0]

    def model(row_N):
        rest = tuple(slice(None) if int(i) == value else int(i) for i in row_N)
        masked = [n for n in range(size) if int(row_N[n]) == value]
        logits_NV = torch.zeros(size, value, dtype=torch.float64)
        for axis, n in enumerate(masked):
            logits_NV[n] = joint[rest].movedim(axis, 0).reshape(value, -1).sum(1).log()
        return logits_NV

    return model


def network(length, size, seed):
    """A toy denoiser: logits_NV of a row depend on everything that it holds."""
    weight = torch.randn(length, size + 1, length, size, generator=generator(seed), dtype=torch.float64)

    def model(row_N):
        return sum(weight[n, int(token)] for n, token in enumerate(row_N)) * (2 / math.sqrt(length))

    return model
