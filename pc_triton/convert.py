"""`convert` gives value nodes to the layers of a model that was written without them."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .families import Categorical, Gaussian
from .head import Head
from .nn import Linear, MultiheadAttention

CONVOLUTIONS = {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
LAYERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, _ConvNd, nn.RNNBase, nn.RNNCellBase)
"""Kinds of layers that `convert` reports if it leaves one as it is."""


def convert(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """Give a model's layers value nodes, in place, so that PC can train it.

    Its parameters, outputs and state dict stay as they are. What is converted:

    - every ``nn.Linear``, convolution, ``nn.MultiheadAttention``, and ``nn.Softmax`` over the last axis;
    - with them ``nn.Transformer`` and its layers. Their fused inference path is switched off, since it would skip
      the nodes;
    - of Hugging Face's transformers, the linear layers of GPT-2 (``Conv1D``), and the attention of every model that
      takes it from their registry. The layer of the logits stays as it is: the logits are clamped to the labels.

    A function called in a forward, such as ``F.softmax``, is no module and is not seen.

    Returns the model, and what was done by module name: ``{"0.self_attn": "MultiheadAttention ->
    pc.MultiheadAttention", ...}``. For a layer that had to be left, such as a subclass or a recurrent one, it says why.

    Raises TypeError if model is no module, ValueError if there is nothing to convert.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes an nn.Module, not {type(model).__name__}")
    changes: dict[str, str] = {}
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    if transformers and any(isinstance(module, transformers.PreTrainedModel) for module in model.modules()):
        from .huggingface import convert_transformers

        convert_transformers(model, changes)
    for name, module in list(model.named_modules()):
        change = None if name in changes else _convert(module)
        if change is not None:
            changes[name] = change
    if not any("->" in change for change in changes.values()):
        raise ValueError(
            "nothing to convert: the model has no nn.Linear, convolution, nn.MultiheadAttention or nn.Softmax(-1); put "
            "pc.Gaussian() after a layer that is to have a value node"
        )
    return model, changes


def _convert(module: Any) -> str | None:
    """Give one module its node. Returns what was done, or why nothing was; None for a module that needs no node."""
    kind = type(module)
    if hasattr(module, "node") or isinstance(module, (Head, NonDynamicallyQuantizableLinear)):
        return None  # it has a node already, or is an output, or belongs to an nn.MultiheadAttention that was left
    if kind is nn.Linear:
        module.__class__ = Linear
        module.node = Gaussian()
        return "Linear -> pc.Linear"
    if kind is nn.MultiheadAttention:
        if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
            return "left as it is: kdim, vdim, add_bias_kv and add_zero_attn have no value-node form"
        module.__class__ = MultiheadAttention
        module.node = Categorical()
        module.out_proj.__class__ = Linear
        module.out_proj.node = Gaussian()
        return "MultiheadAttention -> pc.MultiheadAttention"
    if kind is nn.Softmax and module.dim == -1:
        module.__class__ = Categorical
        module.ignore_index = -100
        return "Softmax -> pc.Categorical"
    if kind in CONVOLUTIONS:
        return add_node(module)
    if kind is nn.TransformerEncoderLayer:
        module.activation_relu_or_gelu = 0
        return "TransformerEncoderLayer: fused inference path switched off"
    if kind is nn.TransformerEncoder:
        module.use_nested_tensor = False
    if isinstance(module, nn.Softmax):
        return f"left as it is: the classes of a Categorical node lie along the last axis, dim=-1, not dim={module.dim}"
    if isinstance(module, LAYERS):
        return f"left as it is: {kind.__name__} has no value-node form; put pc.Gaussian() after it"
    return None


def add_node(module: Any) -> str:
    """Make the output of any module a Gaussian value node. Returns what was done, for `convert`."""
    module.node = Gaussian()
    module.register_forward_hook(_emit)
    return f"{type(module).__name__} -> {type(module).__name__}, pc.Gaussian"


def _emit(module: Any, args: Any, output: Tensor) -> Tensor:
    return module.node(output)
