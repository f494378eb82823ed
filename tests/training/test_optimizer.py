"""Muon and AdamW as one optimizer."""

import copy

import pytest
import torch
from torch import nn

from multidiff.training import optimizer as optimizers
from multidiff.training.optimizer import MuonAdamW
from tests.helpers.toys import generator

TARGET = torch.randn(16, 6, generator=generator(1))


def network():
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    for weight in net.parameters():
        nn.init.normal_(weight, generator=generator(2))
    return net


def groups(net):
    return [
        {"params": [net[0].weight], "hidden": True},
        {"params": [net[1].weight]},
        {"params": [net[0].bias, net[1].bias], "weight_decay": 0.0},
    ]


def train(net, optimizers, steps):
    inputs = torch.randn(16, 6, generator=generator(3))
    for _ in range(steps):
        net.zero_grad()
        (net(inputs) - TARGET).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def alike(ours, theirs, before):
    """Whether two trainings moved a weight from `before` to the same place, up to rounding in bf16."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).norm()) < 0.02 * float((theirs - before).norm())


def test_first_muon_step_by_singular_values():
    net = network()
    before = net[0].weight.detach().clone()
    optimizer = MuonAdamW(groups(net), lr=0.1, weight_decay=0.5)
    train(net, [optimizer], 1)
    step = (before * (1 - 0.1 * 0.5) - net[0].weight.detach()) / (0.1 * 0.2 * 8**0.5)
    left, _, right = torch.linalg.svd(net[0].weight.grad, full_matrices=False)
    # Five Newton-Schulz iterations in bf16 leave singular values between 0.68 and 1.14.
    inner = left.T @ step @ right.T
    assert float(inner.diagonal().min()) > 0.6
    assert float(inner.diagonal().max()) < 1.2
    assert float((inner - inner.diagonal().diag()).abs().max()) < 0.05


def test_each_group_has_its_own_rule():
    ours, theirs = network(), network()
    optimizer = MuonAdamW(groups(ours), lr=0.02, weight_decay=0.3, momentum=0.9, ns_steps=3, betas=(0.8, 0.9))
    hidden, table, biases = groups(theirs)
    muon = torch.optim.Muon(
        hidden["params"], lr=0.02, weight_decay=0.3, momentum=0.9, ns_steps=3, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([table, biases], lr=0.02, weight_decay=0.3, betas=(0.8, 0.9))
    before = theirs[0].weight.detach().clone()
    train(ours, [optimizer], 6)
    train(theirs, [muon, adamw], 6)
    assert alike(ours[0].weight, theirs[0].weight, before)
    for a, b in list(zip(ours.parameters(), theirs.parameters(), strict=True))[1:]:
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-2)  # their gradients follow from the first weight


def test_a_saved_state_goes_on_and_schedules_hold():
    net = network()
    optimizer = MuonAdamW(groups(net), lr=0.02)
    train(net, [optimizer], 3)
    other = copy.deepcopy(net)
    again = MuonAdamW(groups(other), lr=0.5)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, again):
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: 0.5)
    train(net, [optimizer], 3)
    train(other, [again], 3)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(net.state_dict())
    train(net, [optimizer], 1)
    assert all(torch.equal(net.state_dict()[name], weight) for name, weight in before.items())


def test_copies_and_new_groups_are_stepped():
    net = network()
    optimizer = MuonAdamW(groups(net)[:2], lr=0.02)
    optimizer.add_param_group({"params": [net[0].bias], "lr": 0.01})
    other, again = copy.deepcopy((net, optimizer))
    before = copy.deepcopy(net.state_dict())
    train(net, [optimizer], 2)
    train(other, [again], 2)
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name])
        assert torch.equal(weight, before[name]) == (name == "1.bias")
    again.param_groups[2]["lr"] = 0.0
    before = other[0].bias.clone()
    train(other, [again], 1)
    assert torch.equal(before, other[0].bias)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_stepped_as_a_matrix_and_keeps_its_shape(memory_format):
    weight = torch.randn(8, 6, 3, 2, generator=generator(4))
    convolution, matrix = nn.Parameter(weight.to(memory_format=memory_format)), nn.Parameter(weight.flatten(1).clone())
    bias = nn.Parameter(torch.zeros(8))
    place, strides, before = convolution.data_ptr(), convolution.stride(), weight.flatten(1).clone()
    ours = MuonAdamW([{"params": [convolution], "hidden": True}, {"params": [bias]}], lr=0.02, ns_steps=3)
    theirs = torch.optim.Muon([matrix], lr=0.02, ns_steps=3, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        gradient = torch.randn(8, 6, 3, 2, generator=generator(5 + step))
        convolution.grad, matrix.grad, bias.grad = gradient, gradient.flatten(1).clone(), torch.zeros(8)
        ours.step()
        theirs.step()
        assert convolution.grad is gradient
        assert (convolution.data_ptr(), convolution.stride()) == (place, strides)
        if step == 1:  # from a saved state on
            saved = copy.deepcopy(ours.state_dict())
            ours = MuonAdamW([{"params": [convolution], "hidden": True}, {"params": [bias]}], ns_steps=3)
            ours.load_state_dict(saved)
    assert alike(convolution.flatten(1), matrix, before)


def test_stacked_matrices_are_orthogonalised_as_one_by_one(monkeypatch):
    shapes = [(8, 6), (6, 8), (8, 6), (5, 5), (6, 8)]
    drawn = [torch.randn(shape, generator=generator(7)) for shape in shapes]
    stepped = []
    for together in (1, 100, 2**24):
        monkeypatch.setattr(optimizers, "_STACKED", together)
        weights = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        ours = MuonAdamW([{"params": weights, "hidden": True}, {"params": [nn.Parameter(torch.zeros(1))]}], lr=1.0)
        for weight, gradient in zip(weights, drawn, strict=True):
            weight.grad = gradient
        ours.step()
        stepped.append(weights)
    for alone, some, together, gradient in zip(*stepped, drawn, strict=True):
        assert alike(some, alone, 0)
        assert alike(together, alone, 0)
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        values = torch.linalg.svdvals(left.T @ together.detach() @ right.T) / (0.2 * max(gradient.shape) ** 0.5)
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.2


@pytest.mark.parametrize("hidden", [True, False])
def test_groups_must_be_told_apart(hidden):
    net = network()
    with pytest.raises(ValueError, match="hidden: True"):
        MuonAdamW([{"params": [net[0].weight, net[1].weight], "hidden": hidden}])


def test_flattened_weights_are_refused():
    net = network()
    with pytest.raises(ValueError, match=r"Muon steps matrices, but a hidden weight has shape \[8\]"):
        MuonAdamW([{"params": [net[0].bias], "hidden": True}, {"params": [net[1].weight]}])
