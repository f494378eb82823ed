"""Adversarial training of an autoencoder, against a discriminator that learns to tell restored items from real ones.

Both are trained in the same step, by one optimizer with a parameter group for each. The autoencoder is trained against
a `frozen` discriminator, and the discriminator on detached restored items. The losses are hinge losses,

    discriminator: mean relu(1 - D(x)) + mean relu(1 + D(x̂))        autoencoder: -mean D(x̂)

averaged over the discriminator's scales (Lim & Ye 2017, "Geometric GAN", arXiv:1705.02894; Esser et al. 2021, "Taming
transformers", arXiv:2012.09841). Feature matching and the balancer follow Défossez et al. 2022, "High fidelity neural
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
    """The mean over scales and layers of |f(x̂) - f(x)| / mean |f(x)|, where f are the discriminator's features.

    The features of real items get no gradient.
    """
    parts = [
        F.l1_loss(f, r.detach()) / r.detach().abs().mean().clamp_min(1e-6)
        for real_layers, restored_layers in zip(real, restored, strict=True)
        for r, f in zip(real_layers, restored_layers, strict=True)
    ]
    return torch.stack(parts).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """‖∇ reconstruction‖ / ‖∇ adversarial‖ at the weights of the decoder's last layer, at most 10⁴.

    Times this weight, the adversarial loss has a gradient as large as that of the reconstruction loss (Esser et al.
    2021, eq. 7).
    """
    one, other = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    )
    return (one / (other + 1e-6)).clamp(0, 1e4).detach()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Give the parameters of `module` no gradient inside the block."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class Balancer(nn.Module):
    """Balances losses by the norms of their gradients at the output, so that their scales do not matter.

        g = Σᵢ λᵢ / Σⱼ λⱼ · gᵢ / ⟨‖gᵢ‖⟩

    Here gᵢ is the gradient of loss i at the output, and ⟨·⟩ the moving average over the steps that use the loss.

    Args:
        weights: λ by name of the loss.
        decay: the decay of the moving averages per step.
    """

    norm_I: Tensor
    steps_I: Tensor

    def __init__(self, weights: Mapping[str, float], decay: float = 0.999):
        super().__init__()
        self.weights, self.decay = dict(weights), decay
        self.register_buffer("norm_I", torch.zeros(len(self.weights)))
        self.register_buffer("steps_I", torch.zeros(len(self.weights)))

    def forward(self, losses: Mapping[str, Tensor], output: Tensor) -> Tensor:
        """A scalar whose gradient at `output` is g. Its value has no meaning.

        Args:
            losses: scalars by name, each a function of `output`. Losses of `weights` may be missing.
            output: the restored items, [B, …].
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
            average = self.norm_I[place] / (1 - self.decay ** self.steps_I[place])  # bias correction, as in Adam
            balanced += weight / total * gradient / average.clamp_min(1e-12)
        return (output * balanced).sum()
