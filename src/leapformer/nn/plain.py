"""Whether a module may be passed by: a fused computation reads its weights instead of calling it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module`` would do no more than ``kind.forward`` with the weights that it holds.

    Everything that wraps a module changes one of four things. Its class: parametrisations (weight norm among them),
    adapters, quantisation, subclasses. Its ``forward``: accelerate's hooks, whose weights may lie elsewhere until the
    call. Its hooks: pruning, what looks at or changes inputs, outputs and gradients. Or the hooks of all modules.
    """
    own = module.__dict__
    return (
        type(module) is kind
        and "forward" not in own
        and not own["_forward_pre_hooks"]
        and not own["_forward_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and not (
            torch_module._global_forward_pre_hooks
            or torch_module._global_forward_hooks
            or torch_module._global_backward_hooks
            or torch_module._global_backward_pre_hooks
        )
    )


def home_of(module: nn.Module) -> dict[str, Any]:
    """``dtype`` and ``device`` of what a module works with, for a tensor that is to meet it.

    Offloaded weights lie on the device "meta"; then accelerate's hook says where they will be when the module is
    called.
    """
    weight = next(iter([*module.parameters(), *module.buffers()]))
    device = weight.device
    if device.type == "meta":
        hooks = (getattr(inner, "_hf_hook", None) for inner in module.modules())
        device = next((d for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None), device)
    return {"dtype": weight.dtype, "device": device}
