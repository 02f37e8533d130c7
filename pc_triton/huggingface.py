"""Value nodes for Hugging Face's transformers: attention with a Categorical node over the keys, and `convert`'s part.

Importing this module adds that attention to transformers' registry, under the name `ATTENTION`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from .context import awaits_pass, outside_graphs, pass_here
from .distributions import node_of
from .families import Categorical
from .functions import names_in
from .module_node import ADAPTED_LATER, OWN_NODE, add_node, base_layer, parts_of
from .nn import attend, logit_bias

ATTENTION = "pc_triton"


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' ``"sdpa"``, with the value node that `convert` gave the module.

    query ``[B, heads, N, D]``; key, value ``[B, kv heads, K, D]``. attention_mask ``[B, 1, N, K]``: bool, True where a
    query sees a key, or floats that are added to the logits. options: those of transformers. Returns the output
    ``[B, N, heads, D]``, and the weights ``[B, heads, N, K]`` if they had to be made, else None.
    """
    if not awaits_pass(getattr(module, "node", None)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return outside_graphs(partial(_emit, **options), module, query, key, value, attention_mask)


def _emit(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    if pass_here() is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **options
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = is_causal and attention_mask is None and query.shape[2] > 1
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = ~attention_mask
    bias = logit_bias(query.dtype, position_bias, attention_mask)
    out, weights = attend(module.node, query, key, value, causal, None, bias, dropout, scale=scaling)
    return out.transpose(1, 2), weights


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def convert_transformers(model: nn.Module, changes: dict[str, str]) -> None:
    """Give their nodes to the layers that only transformers' models have. What was done is added to ``changes``."""
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in models:
        if part._supports_sdpa:
            part.set_attn_implementation(ATTENTION)
    heads = [part.get_output_embeddings() for part in models]
    parts: set[nn.Module] = set()
    for name, module in list(model.named_modules()):
        if module in parts:
            continue
        if any(module is head for head in heads):
            changes[name] = "left as it is: its logits are the output, clamped to the labels"
        elif node_of(module) is None:
            change = _convert(module)
            if change is not None:
                changes[name] = change
        parts |= parts_of(module)


def _convert(module: nn.Module) -> str | None:
    """As `convert` does with torch's layers, with one of transformers'; None for any other."""
    base = base_layer(module)
    if type(module if base is None else base) is Conv1D:
        if base is not None and node_of(base) is not None:
            return ADAPTED_LATER
        return OWN_NODE if hasattr(module, "node") else add_node(module)
    return _convert_attention(module) if _uses_the_registry(module) else None


def _convert_attention(module: Any) -> str:
    kind = type(module).__name__
    if module.config._attn_implementation != ATTENTION:
        return f"left as it is: {kind} has no form in scaled_dot_product_attention"
    if hasattr(module, "node"):
        return OWN_NODE
    module.node = Categorical()
    return f"{kind} -> {kind}, pc.Categorical over the keys"


def _uses_the_registry(module: nn.Module) -> bool:
    """Whether the module looks up its attention function in transformers' registry."""
    return "ALL_ATTENTION_FUNCTIONS" in names_in(type(module).forward)
