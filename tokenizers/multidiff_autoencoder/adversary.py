"""An adversary for an autoencoder: a discriminator that learns to tell restored items from real ones.

Both are trained in the same step, by one optimizer with a group of parameters each: the autoencoder against a
discriminator that `frozen` holds still, the discriminator on restored items without gradient. Losses are hinges:

    discriminator: mean relu(1 - D(x)) + mean relu(1 + D(x̂))        autoencoder: -mean D(x̂)

averaged over the discriminator's scales (Lim & Ye 2017, "Geometric GAN", arXiv:1705.02894; Esser et al. 2021, "Taming
transformers", arXiv:2012.09841). Feature matching and balancer are those of Défossez et al. 2022, "High fidelity neural
audio compression", arXiv:2210.13438, section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def hinge_loss(real: Sequence[Tensor], restored: Sequence[Tensor]) -> Tensor:
    """The discriminator's loss, from its scores of real and of restored items at each of its scales."""
    parts = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, restored, strict=True)]
    return torch.stack(parts).mean()


def adversarial_loss(restored: Sequence[Tensor]) -> Tensor:
    """The autoencoder's loss, from the discriminator's scores of restored items at each of its scales."""
    return torch.stack([-scores.mean() for scores in restored]).mean()


def feature_matching(real: Sequence[Sequence[Tensor]], restored: Sequence[Sequence[Tensor]]) -> Tensor:
    """Mean over scales and layers of |f(x̂) - f(x)| / mean |f(x)|, f the discriminator's features; no gradient goes to
    those of real items."""
    parts = [
        F.l1_loss(f, r.detach()) / r.detach().abs().mean().clamp_min(1e-6)
        for real_layers, restored_layers in zip(real, restored, strict=True)
        for r, f in zip(real_layers, restored_layers, strict=True)
    ]
    return torch.stack(parts).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """‖∇ reconstruction‖ / ‖∇ adversarial‖ at the weights of the decoder's last layer, at most 10⁴: with it both pull
    equally hard (Esser et al. 2021, eq. 7)."""
    one, other = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    )
    return (one / (other + 1e-6)).clamp(0, 1e4).detach()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within, what runs through `module` sends no gradient to its parameters."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class Balancer(nn.Module):
    """Weighs losses by the size of their gradients at the output: a weight says a loss' share, whatever its scale.

        g = Σᵢ λᵢ / Σⱼ λⱼ · gᵢ / ⟨‖gᵢ‖⟩

    gᵢ: gradient of loss i at the output, ⟨·⟩: moving average over the steps in which the loss took part.

    Args:
        weights: λ by name of the loss.
        decay: of the moving averages, per step.
    """

    norm_I: Tensor
    steps_I: Tensor

    def __init__(self, weights: Mapping[str, float], decay: float = 0.999):
        super().__init__()
        self.weights, self.decay = dict(weights), decay
        self.register_buffer("norm_I", torch.zeros(len(self.weights)))
        self.register_buffer("steps_I", torch.zeros(len(self.weights)))

    def forward(self, losses: Mapping[str, Tensor], output: Tensor) -> Tensor:
        """A scalar whose gradient at `output` is g: it is to be differentiated; its value says nothing.

        Args:
            losses: scalars by name, some or all of `weights`, each a function of `output`.
            output: what the autoencoder restored, [B, …].
        """
        total = sum(self.weights[name] for name in losses)
        balanced = torch.zeros_like(output)
        for place, (name, weight) in enumerate(self.weights.items()):
            if name not in losses:
                continue
            (gradient,) = torch.autograd.grad(losses[name], output, retain_graph=True)
            norm = gradient.flatten(1).norm(dim=1).mean()
            self.steps_I[place] += 1
            self.norm_I[place].lerp_(norm, 1 - self.decay)
            average = self.norm_I[place] / (1 - self.decay ** self.steps_I[place])  # as Adam corrects its start
            balanced += weight / total * gradient / average.clamp_min(1e-12)
        return (output * balanced).sum()
