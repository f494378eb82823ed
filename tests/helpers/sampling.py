"""A sampler driven by tables of probabilities in place of a model."""

import torch


def run(sampler, sample_RN, steps, model, generators, seen=None):
    """Drive a sampler: `model(row ids)` gives logits_NV of one row."""
    zeros_RN = torch.zeros_like(sample_RN)
    state = sampler.start(sample_RN, zeros_RN, zeros_RN[..., None].expand(-1, -1, 3), steps)
    for timestep in range(state.steps - 1, -1, -1):
        where_RN = sampler.needs(state)
        logits_RNV = torch.stack([model(row_N) for row_N in sample_RN])
        output = sampler.step(
            logits_RNV[where_RN], timestep, sample_RN, where=where_RN, state=state, generator=generators
        )
        sample_RN, state = output.prev_sample, output.state
        if seen is not None:
            seen.append(sample_RN.clone())
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
