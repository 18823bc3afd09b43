"""Muon: steps of momentum made orthogonal, for the matrices inside a model; AdamW for everything else.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the scale of the step, with which
AdamW's learning rates and weight decay carry over, is that of arXiv 2502.16982, eq. 4. torch.optim.Muon computes in
bfloat16 alone, which processors without bfloat16 arithmetic do many times slower than this float32 form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

# The quintic of Jordan et al.: five rounds bring singular values in (0, 1] to about 0.7 .. 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon(Optimizer):
    """One optimizer with two rules, so that schedules, checkpoints and resuming know one thing.

    Args:
        matrices: parameters [rows, columns] that take Muon's steps.
        others: what AdamW takes, as parameter groups with their own `weight_decay`.
        lr: learning rate of both. weight_decay: of the matrices. momentum: Muon's, with Nesterov's look ahead.
        betas, eps: AdamW's.

    Raises ValueError where a parameter of `matrices` is not a matrix.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: list[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        matrices = list(matrices)
        for matrix in matrices:
            if matrix.ndim != 2:
                raise ValueError(f"Muon: expected matrices, got a parameter of shape {tuple(matrix.shape)}")
        self.adamw = AdamW(others, lr=lr, betas=betas, eps=eps, fused=True)
        own = {"params": matrices, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([own, *self.adamw.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own, *others = self.param_groups
        self._step_matrices([matrix for matrix in own["params"] if matrix.grad is not None], own)
        # Both live in the groups and the state of this optimizer; loading a checkpoint replaces them.
        self.adamw.param_groups, self.adamw.state = others, self.state
        self.adamw.step()
        return loss

    def _step_matrices(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Matrices of one shape take their rounds as one batch: many small products leave cores idle."""
        alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
        for matrix in matrices:
            alike.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(matrix)
        for (shape, _, _), some in alike.items():
            updates = orthogonalize(torch.stack([self._direction(matrix, group) for matrix in some]))
            for matrix, update in zip(some, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                # 0.2 is the usual root mean square of AdamW's steps.
                matrix.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])

    def _direction(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        state, grad = self.state[matrix], matrix.grad
        assert grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        return grad.lerp(momentum, group["momentum"])


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U V^T of each of `matrices` [..., m, n] = U S V^T, by Newton-Schulz rounds in float32; zeros stay zeros."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices.float() if wide else matrices.float().mT
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)).reshape(-1, *x.shape[-2:])
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    x = x if wide else x.mT
    return x.reshape(matrices.shape).to(matrices.dtype)


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Weights of the linear layers, without the output layer, which is a table of tokens."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    tables = {id(head.weight)} if isinstance(head, nn.Linear) else set()
    tables |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [layer.weight for layer in layers if layer.weight.requires_grad and id(layer.weight) not in tables]
