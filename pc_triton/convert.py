"""`convert` gives value nodes to the layers of a model that was written without them."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from .changes import Changes
from .distributions import Distribution, node_of
from .errors import see
from .families import Categorical, Gaussian
from .functions import FUNCTIONS, give_node, names_in
from .head import Head
from .module_node import ADAPTED_LATER, OWN_NODE, add_node, base_layer, parts_of
from .nn import Linear, MultiheadAttention

CONVOLUTIONS = {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
LAYERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, _ConvNd, *RECURRENT)
"""Kinds of layers that `convert` reports if it leaves one as it is."""

TRANSFORMERS = (
    nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
)  # fmt: skip
TRANSPOSED = "transposes within, so that its nodes have their samples first (batch_first=False)"

SCRIPTED = (
    "left as it is: torch.jit has its forward, where no node can be put; convert before torch.jit.script or trace"
)


def convert(model: nn.Module) -> tuple[nn.Module, Changes]:
    """Give a model's layers value nodes, in place, so that PC can train it.

    Its parameters, outputs and state dict stay as they are. What is converted:

    - every ``nn.Linear``, convolution, ``nn.MultiheadAttention``, and ``nn.Softmax`` over the last axis, also where
      ``torch.nn.utils.parametrize`` (weight_norm, spectral_norm) or another library has its hand on it;
    - with them ``nn.Transformer`` and its layers. Their fused inference path is switched off, since it would skip
      the nodes;
    - of Hugging Face's transformers, the linear layers of GPT-2 (``Conv1D``), and the attention of every model that
      takes it from their registry. The layer of the logits stays as it is: the logits are clamped to the labels;
    - ``F.scaled_dot_product_attention`` and ``F.softmax`` over the last axis, where a forward of your own calls them,
      or a method or function that it calls: a Categorical node each. What lies deeper is not seen;
    - an adapter of PEFT's structure (``base_layer``, ``lora_A``, ``lora_B``): one node, on what the whole adapter
      returns. Convert after the adapters are there.

    Where these have ``batch_first=False``, torch's default, they stay so to the rest of the model, and transpose what
    they are given and return: within them samples lie along the first axis, as value nodes need it.
    ``inplace=True`` of activations and dropout is switched off: they would overwrite what a node emits. Converting
    twice changes nothing more.

    Returns the model, and what was done by module name: ``{"0.self_attn": "MultiheadAttention ->
    pc.MultiheadAttention", ...}``. For a layer that had to be left, such as a subclass or a recurrent one, it says why.
    It is a dict that prints as a table; `Changes.visit` adds what the forward of a first batch visits.

    Raises TypeError if model is no module, ValueError if there is nothing to convert.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes an nn.Module, not {type(model).__name__}")
    changes = Changes(model)
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    if transformers and any(isinstance(module, transformers.PreTrainedModel) for module in model.modules()):
        from .huggingface import convert_transformers

        convert_transformers(model, changes)
    parts: set[nn.Module] = set()  # of modules that have one node as a whole
    for name, module in list(model.named_modules()):
        if module in parts:
            continue
        turns = isinstance(module, TRANSFORMERS) and put_samples_first(module)
        change = None if name in changes else _convert(module)
        if change is not None or turns:
            changes[name] = "; ".join([*([change] if change else []), *([TRANSPOSED] if turns else [])])
        parts |= parts_of(module)
    changes.nodes = [module for module in model.modules() if isinstance(module, Distribution)]
    if not changes.nodes:
        left = "".join(f"\n{name or '(the model)'}: {change}" for name, change in changes.items())
        raise ValueError(
            "nothing to convert: the model has no nn.Linear, convolution, nn.MultiheadAttention or nn.Softmax(-1) that "
            f"could be; put pc.Gaussian() after a layer that is to have a value node{see('nothing-to-convert')}{left}"
        )
    for name, module in model.named_modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]
            changes[name] = "inplace switched off: it would overwrite what a node before it emits"
    return model, changes


def _convert(module: Any) -> str | None:
    """Give one module its node. Returns what was done, or why nothing was; None for a module that needs no node."""
    if isinstance(module, torch.jit.ScriptModule):
        return SCRIPTED
    kind = type_before_parametrizations(module)
    if isinstance(module, (Head, NonDynamicallyQuantizableLinear)):
        return None  # an output, or it belongs to an nn.MultiheadAttention that was left
    if node_of(module) is not None:
        return "has its node already"
    if isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
        return f"{kind.__name__}: fused inference path switched off"
    base = base_layer(module)
    if not isinstance(module if base is None else base, LAYERS):
        return _convert_function(module)
    if hasattr(module, "node"):
        return OWN_NODE
    if isinstance(module, LazyModuleMixin):
        return "left as it is: it has no parameters yet; run one batch through the model, then convert"
    if base is not None:
        return _convert_adapter(module, base)
    own_class = kind is type(module) and "forward" not in vars(module)  # nobody else replaced it or its forward
    if kind is nn.Linear and own_class:
        module.__class__ = Linear
        module.node = Gaussian()
        return "Linear -> pc.Linear"
    if kind is nn.Linear or kind in CONVOLUTIONS:
        return add_node(module)
    if kind is nn.MultiheadAttention:
        return _convert_attention(module, own_class)
    if kind is nn.Softmax and module.dim == -1 and own_class:
        module.__class__ = Categorical
        module.ignore_index = -100
        return "Softmax -> pc.Categorical"
    if isinstance(module, nn.Softmax):
        return f"left as it is: the classes of a Categorical node lie along the last axis, dim=-1, not dim={module.dim}"
    if isinstance(module, RECURRENT):
        return (
            f"left as it is: {kind.__name__} has no value-node form; make self.node = pc.Gaussian(), and call it on "
            "the tensor that the forward takes from its output, samples along the first axis (batch_first=True)"
        )
    return f"left as it is: {kind.__name__} has no value-node form; put pc.Gaussian() after it"


def _convert_attention(module: Any, own_class: bool) -> str:
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return "left as it is: kdim, vdim, add_bias_kv and add_zero_attn have no value-node form"
    out_proj: Any = module.out_proj
    if not own_class:
        return (
            "left as it is: its class or its forward was replaced (as by torch.nn.utils.parametrize); undo that, "
            "convert, and do it again"
        )
    if type_before_parametrizations(out_proj) is not NonDynamicallyQuantizableLinear or "forward" in vars(out_proj):
        return f"left as it is: its out_proj was replaced, by a {type(out_proj).__name__}"
    module.__class__ = MultiheadAttention
    module.node = Categorical()
    if is_parametrized(out_proj):
        add_node(out_proj)
    else:
        out_proj.__class__ = Linear
        out_proj.node = Gaussian()
    turns = put_samples_first(module)
    return f"MultiheadAttention -> pc.MultiheadAttention{f'; {TRANSPOSED}' if turns else ''}"


def put_samples_first(module: Any) -> bool:
    """Have a module that takes ``[time, samples, ...]`` compute with samples first. Returns whether it is one.

    Attention is told so, and the module transposes its sequences and its output.
    """
    attentions = [part for part in module.modules() if isinstance(part, nn.MultiheadAttention) and not part.batch_first]
    for attention in attentions:
        attention.batch_first = True
    if attentions:
        if isinstance(module, nn.Transformer):
            module.batch_first = True
        module.time_first = True
        module.register_forward_pre_hook(_transpose_sequences, with_kwargs=True)
        module.register_forward_hook(_transpose_output)
    return len(attentions) > 0


SEQUENCES = ("src", "tgt", "memory", "query", "key", "value")


def _transpose_sequences(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    alone = (nn.TransformerEncoder, nn.TransformerEncoderLayer)  # the others take two sequences, attention three
    count = 3 if isinstance(module, nn.MultiheadAttention) else 1 if isinstance(module, alone) else 2
    given = [*args[:count], *(kwargs[name] for name in SEQUENCES if name in kwargs)]
    turned = {id(t): _transposed(t) for t in given}  # attention knows self-attention by one tensor being the other
    args = (*(turned[id(t)] for t in args[:count]), *args[count:])
    return args, {name: turned[id(t)] if name in SEQUENCES else t for name, t in kwargs.items()}


def _transpose_output(module: Any, args: Any, output: Any) -> Any:
    return (_transposed(output[0]), *output[1:]) if isinstance(output, tuple) else _transposed(output)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(0, 1) if t.dim() == 3 else t  # without samples there is nothing to transpose


def _convert_adapter(module: Any, base: nn.Module) -> str:
    """The layer and what the adapter adds to it are one prediction."""
    if node_of(base) is not None:
        return ADAPTED_LATER
    if not isinstance(base, (nn.Linear, _ConvNd)):
        return f"left as it is: an adapter of {type(base).__name__} has no value-node form"
    return add_node(module)


def _convert_function(module: Any) -> str | None:
    called = _function_called(module)
    if called is None:
        return None
    if hasattr(module, "node"):
        return OWN_NODE
    give_node(module)
    return f"{called} in {type(module).__name__} -> pc.Categorical"


def _function_called(module: Any) -> str | None:
    """The function in the place of a Categorical node that the user's forward calls, or a function that it calls."""
    kind = type(module)
    forward = inspect.unwrap(kind.forward)
    if kind.__module__.split(".")[0] in ("torch", "pc_triton") or not inspect.isfunction(forward):
        return None
    called = [getattr(kind, name, None) or forward.__globals__.get(name) for name in names_in(forward)]
    names = names_in(forward).union(*(names_in(function) for function in called if inspect.isfunction(function)))
    found = (name for name in dict.fromkeys(FUNCTIONS.values()) if name in names)
    return next((name for name in found if not hasattr(module, name)), None)  # else it is a module of its own
