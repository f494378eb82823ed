"""Muon for hidden matrices and convolutions, AdamW for everything else, as one optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.optim import AdamW, Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x³ and x⁵: steepest at 0 (Jordan et al. 2024)
_STACKED = 2**24  # elements of the matrices that are orthogonalised together


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) where a group says `hidden: True`, AdamW (Loshchilov & Hutter 2019) in other groups.

    Muon steps along the momentum with its singular values set to about 1, which wants whole matrices that map hidden
    features to hidden features: not embeddings, the head, norms or biases. A convolution's weight counts as the matrix
    [first axis, all others]. Muon's step is scaled by 0.2 √max(rows, columns), the root mean square of AdamW's (Liu et
    al. 2025, arXiv 2502.16982, section 2.2), so that one learning rate and one weight decay serve both.

    Where devices share the rows of each weight (FSDP2), a device takes whole matrices for the step, a few at a time:
    it gathers its part of the matrices of a shape, orthogonalises them, and hands back the rows of the others.

    Args:
        params: parameter groups; a group may set its own `lr` and `weight_decay`.
        lr: learning rate of both.
        weight_decay: of both, decoupled: a step scales weights by 1 - lr · weight_decay.
        betas: AdamW's decay rates.
        momentum: Muon's, of Nesterov's kind.
        ns_steps: Newton-Schulz iterations of Muon's orthogonalisation; 3 are nearly as good as 5.

    Raises:
        ValueError: no group is hidden or all are, or a hidden weight is not a whole matrix.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
        ns_steps: int = 5,
    ):
        groups = [{"hidden": False, **group, "params": list(group["params"])} for group in params]
        hidden = [group for group in groups if group["hidden"]]
        others = [group for group in groups if not group["hidden"]]
        if not hidden or not others:
            raise ValueError("MuonAdamW needs parameter groups with hidden: True and groups without")
        for weight in (weight for group in hidden for weight in group["params"]):
            if weight.ndim < 2:
                raise ValueError(
                    f"Muon steps matrices, but a hidden weight has shape {list(weight.shape)} here. Strategies that "
                    "flatten weights leave no matrices: use torch.optim.AdamW with them, or strategy ddp or fsdp2."
                )
        self._hidden = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps}
        self._adamw = AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas)
        super().__init__(groups, {})
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        defaults = self._hidden if param_group.get("hidden") else self._adamw.defaults
        super().add_param_group({**defaults, "hidden": False, **param_group})
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_hidden": self._hidden, "_adamw": self._adamw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """AdamW works on this optimizer's own groups and state, which schedulers change and checkpoints hold."""
        self._adamw.param_groups = [group for group in self.param_groups if not group["hidden"]]
        self._adamw.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both.

        Args:
            closure: computes the loss and its gradients again.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["hidden"]:
                self._step_hidden(group)
        self._adamw.step()
        return loss

    @torch.no_grad()
    def _step_hidden(self, group: dict[str, Any]) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        gradients = [local_shard(weight.grad) for weight in weights]
        averages = [local_shard(self.state[weight]["momentum_buffer"]) for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, averages, group["momentum"])
        torch._foreach_mul_([local_shard(weight) for weight in weights], 1 - group["lr"] * group["weight_decay"])
        alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight, update in zip(weights, updates, strict=True):
            rows, columns = weight.shape[0], weight.shape[1:].numel()
            shape = (rows, columns) if isinstance(weight, DTensor) else (min(rows, columns), max(rows, columns))
            alike[shape].append((weight, update.flatten(1)))
        for (rows, columns), pairs in alike.items():
            devices = pairs[0][0].device_mesh.size() if isinstance(pairs[0][0], DTensor) else 1
            together = devices * max(1, _STACKED // (rows * columns))
            for first in range(0, len(pairs), together):
                part = pairs[first : first + together]
                steps = _directions([weight for weight, _ in part], [update for _, update in part], group["ns_steps"])
                for (weight, _), step in zip(part, steps, strict=True):
                    scale = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
                    local_shard(weight).sub_(step.reshape(local_shard(weight).shape), alpha=scale)


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this device holds: all of it unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def orthogonalized(matrices_NRC: Tensor, steps: int) -> Tensor:
    """Matrices with the same singular vectors and singular values of about 1, in bf16, [N, R, C] with R ≤ C.

    Every step takes a singular value σ to aσ + bσ³ + cσ⁵, starting from matrices of Frobenius norm 1: Newton-Schulz
    iteration with coefficients that grow small values fastest (Jordan et al. 2024, Muon). Matrices of one shape share
    each product.
    """
    a, b, c = _COEFFICIENTS
    x_NRC = (matrices_NRC / torch.linalg.matrix_norm(matrices_NRC, keepdim=True).clamp_min(1e-7)).bfloat16()
    for _ in range(steps):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(x_NRC, torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c), x_NRC, beta=a)
    return x_NRC


def _directions(weights: list[Tensor], updates: list[Tensor], ns_steps: int) -> list[Tensor]:
    """The orthogonalised updates of weights of one shape, or of it and its transpose where they are whole.

    Sharded matrices are stacked and change from each device having some rows of all of them to each having all
    rows of some of them, and back.
    """
    if not isinstance(sharded := weights[0], DTensor):
        wide = [update if len(update) <= len(update.T) else update.T for update in updates]
        stepped = orthogonalized(torch.stack(wide), ns_steps)
        return [step if len(update) <= len(update.T) else step.T for step, update in zip(stepped, updates, strict=True)]
    mesh, rows, columns = sharded.device_mesh, sharded.shape[0], sharded.shape[1:].numel()
    of_rows = [Shard(1) if placement.is_shard() else placement for placement in sharded.placements]
    of_matrices: list[Placement] = [Shard(0)] * mesh.ndim
    layout = {"shape": torch.Size((len(updates), rows, columns)), "stride": (rows * columns, columns, 1)}
    stacked_NRC = DTensor.from_local(torch.stack(updates), mesh, of_rows, run_check=False, **layout)
    own_NRC = stacked_NRC.redistribute(mesh, of_matrices).to_local()
    turned = rows > columns
    stepped_NRC = orthogonalized(own_NRC.mT if turned else own_NRC, ns_steps)
    stepped_NRC = stepped_NRC.mT.contiguous() if turned else stepped_NRC
    back = DTensor.from_local(stepped_NRC, mesh, of_matrices, run_check=False, **layout)
    return list(back.redistribute(mesh, of_rows).to_local())
