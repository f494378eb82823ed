"""Muon for hidden matrices and convolutions, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) where a group says `hidden: True`, AdamW (Loshchilov & Hutter 2019) in other groups.

    Muon steps along the momentum with its singular values set to about 1, which wants whole matrices that map hidden
    features to hidden features: not embeddings, the head, norms or biases, and no weights sharded over devices. A
    convolution's weight counts as the matrix [first axis, all others]. Muon's step is scaled by
    0.2 √max(rows, columns), the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that
    one learning rate and one weight decay serve both.

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
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        ns_steps: int = 5,
    ):
        groups = [{"hidden": False, **group, "params": list(group["params"])} for group in params]
        hidden = [group for group in groups if group["hidden"]]
        others = [group for group in groups if not group["hidden"]]
        if not hidden or not others:
            raise ValueError("MuonAdamW needs parameter groups with hidden: True and groups without")
        for weight in (weight for group in hidden for weight in group["params"]):
            if weight.ndim < 2 or isinstance(weight, DTensor):
                raise ValueError(
                    f"Muon steps whole matrices, but a hidden weight has shape {list(weight.shape)} here. Strategies "
                    "that shard weights leave no whole ones: use torch.optim.AdamW with them, or strategy ddp."
                )
        with _as_matrices(hidden):
            self._muon = Muon(
                hidden,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                ns_steps=ns_steps,
                adjust_lr_fn="match_rms_adamw",
            )
        self._adamw = AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas)
        super().__init__(groups, {})
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        part = self._muon if param_group.get("hidden") else self._adamw
        super().add_param_group({**part.defaults, "hidden": False, **param_group})
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_muon": self._muon, "_adamw": self._adamw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Both halves work on this optimizer's own groups and state, which schedulers change and checkpoints hold."""
        self._muon.param_groups = [group for group in self.param_groups if group["hidden"]]
        self._adamw.param_groups = [group for group in self.param_groups if not group["hidden"]]
        self._muon.state = self._adamw.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both.

        Args:
            closure: computes the loss and its gradients again.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with _as_matrices(self._muon.param_groups):
            self._muon.step()
        self._adamw.step()
        return loss


@contextmanager
def _as_matrices(groups: list[dict[str, Any]]) -> Generator[None]:
    """Weights of more than two axes and their gradients as [first axis, all others]: PyTorch's Muon takes no others."""
    kept: list[tuple[Tensor, Tensor, Tensor | None]] = []
    try:
        for group in groups:
            for tensor in group["params"]:
                if tensor.ndim > 2:
                    data, gradient = tensor.data, tensor.grad
                    kept.append((tensor, data, gradient))
                    tensor.grad, tensor.data = None, data.flatten(1)
                    tensor.grad = None if gradient is None else gradient.flatten(1)
        yield
    finally:
        for tensor, data, gradient in kept:
            if not data.is_contiguous():  # channels last, say: what was stepped is a copy
                data.copy_(tensor.data.view(data.shape))
            tensor.grad, tensor.data = None, data
            tensor.grad = gradient
