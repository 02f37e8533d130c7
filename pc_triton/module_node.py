"""The value node of one module that was written without one: put on its output, and what lies under it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .distributions import node_of
from .families import Gaussian
from .nn import Attention, MultiheadAttention

ADAPTED_LATER = "left as it is: its base_layer has a node already; convert after the adapters are there"
OWN_NODE = "left as it is: it has an attribute `node` of its own, where its value node would be; rename that"


def add_node(module: Any) -> str:
    """Make the output of any module a Gaussian value node. Returns what was done, for `convert`."""
    module.node = Gaussian()
    module.register_forward_hook(_emit)
    kind = type_before_parametrizations(module).__name__
    return f"{kind} -> {kind}, pc.Gaussian"


def _emit(module: Any, args: Any, output: Tensor) -> Tensor:
    return module.node(output)


def parts_of(module: nn.Module) -> set[nn.Module]:
    """The modules within this one that the node of the whole stands for, and that node."""
    if base_layer(module) is not None or isinstance(module, torch.jit.ScriptModule):
        return set(module.modules()) - {module}
    parts = set(module.out_proj.modules()) if isinstance(module, (Attention, MultiheadAttention)) else set()
    node = node_of(module)
    return parts if node is None or node is module else parts | set(node.modules())


def base_layer(module: nn.Module) -> nn.Module | None:
    """The layer that an adapter of PEFT's structure wraps; None for any other module."""
    base = getattr(module, "base_layer", None)
    adapts = hasattr(module, "adapter_layer_names") or (hasattr(module, "lora_A") and hasattr(module, "lora_B"))
    return base if isinstance(base, nn.Module) and adapts else None
