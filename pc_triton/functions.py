"""Functions in the place of a value node, such as ``F.softmax``: who calls them, and in inference the node there.

A function is no module, so a torch function mode stands in its way. It knows the module whose forward makes the call,
and where `convert` gave that module a node, the call is the node's.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from .distributions import Distribution, node_of
from .families import Categorical
from .nn import attend, logit_bias

ATTENTION = {F.scaled_dot_product_attention: "scaled_dot_product_attention"}
FUNCTIONS: dict[Any, str] = ATTENTION | dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), "softmax")
"""Functions that would hold a Categorical value node if they were modules."""

Plain = Callable[[], Tensor]


class FunctionCalls(TorchFunctionMode):
    """Within it `found` gathers the modules without a node whose forward calls one of `FUNCTIONS`, and its name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[nn.Module, str] = {}
        self.within: list[nn.Module] = []  # the modules whose forward is under way, in this thread
        self.thread = threading.get_ident()

    def __enter__(self) -> Any:
        self.hooks = [
            torch_module.register_module_forward_pre_hook(self._begins),
            torch_module.register_module_forward_hook(self._ends, always_call=True),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def _begins(self, module: nn.Module, *_: Any) -> None:
        if threading.get_ident() == self.thread:
            self.within.append(module)

    def _ends(self, *_: Any) -> None:
        if threading.get_ident() == self.thread:
            self.within.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FUNCTIONS and self.within:
            return self.call(self.within[-1], func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def call(self, module: nn.Module, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a function gives that the forward of ``module`` calls."""
        if node_of(module) is None:
            self.found[module] = FUNCTIONS[func]
        return func(*args, **kwargs)


class FunctionNodes(FunctionCalls):
    """Within it, a pass over S samples, the functions called by modules of `give_node` have their node.

    Others stay as they are, and so does a softmax over another axis than the last, of what has no S samples, or within
    torch.no_grad().
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples

    def call(self, module: nn.Module, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        node = node_of(module) if getattr(module, "has_function_node", None) is True else None
        if node is None or not torch.is_grad_enabled():  # no state could move there
            return func(*args, **kwargs)
        value = _attention if func in ATTENTION else _softmax
        out = value(node, self.samples, *args, **kwargs)
        return func(*args, **kwargs) if out is None else out


def give_node(module: Any) -> None:
    """Have the functions that this module's forward calls be Categorical nodes in inference."""
    module.node, module.has_function_node = Categorical(), True


def names_in(function: Any) -> frozenset[str]:
    """What the code of a function names beyond its own variables."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return frozenset() if code is None else frozenset(code.co_names)


def _softmax(node: Distribution, samples: int, input: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """``F.softmax``, ``torch.softmax`` or ``Tensor.softmax``; None where it is no node."""
    dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), input.dtype)
    last = isinstance(dim, int) and dim in (-1, input.dim() - 1)
    if not last or input.dim() < 2 or input.shape[0] % samples or isinstance(input, nn.Parameter):
        return None
    mu = input.to(dtype)
    return node(mu.masked_fill(mu == -torch.inf, -torch.inf))  # no gradient is to come from there


def _attention(
    node: Distribution,
    samples: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``F.scaled_dot_product_attention``; None where it is no node."""
    heads = query.dim() == 4
    if query.dim() not in (3, 4) or key.dim() != query.dim() or query.shape[0] % samples:
        return None
    if is_causal and query.shape[-2] != key.shape[-2]:  # torch counts both from the first
        shape = query.shape[-2], key.shape[-2]
        attn_mask, is_causal = torch.ones(shape, dtype=torch.bool, device=query.device).tril(), False
    if not heads:
        query, key, value = (t[:, None] for t in (query, key, value))
        attn_mask = attn_mask[:, None] if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = ~attn_mask  # True where a query sees a key, and here where it does not
    bias = logit_bias(query.dtype, attn_mask)
    out, _ = attend(node, query, key, value, is_causal, None, bias, dropout_p, scale=scale)
    return out if heads else out[:, 0]
