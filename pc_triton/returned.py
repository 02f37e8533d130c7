"""What a model returned, told by autograd's graph: whose values those are, and what the model did to them last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributions import Distribution
from .errors import see
from .families import Bernoulli, Categorical

T = TypeVar("T")
LONGEST = 64
"""Operations that are looked at."""
LAYOUT = {
    *("Alias", "AsStrided", "Cat", "Clone", "Diagonal", "Expand", "Flip", "Gather", "Index", "IndexSelect", "Permute"),
    *("ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack", "T", "ToCopy", "Transpose"),
    *("Unbind", "UnsafeSplit", "UnsafeView", "Unsqueeze", "View"),
}
"""Operations after which a value is what it was: in another place or dtype, or left out."""
JOINING = {"Add", "Cat", "Div", "Mul", "Rsub", "Stack", "Sub", "Where"}
"""Operations of several inputs of which none need be a weight."""
BOUNDS = {"Clamp", "ClampMin", "ClampMax", "NanToNum"}
"""Operations that leave a probability a probability."""
PROBABILITIES = {"Sigmoid", "Hardsigmoid", "LogSigmoid", "Softmax"}
NORMS = {"NativeBatchNorm", "CudnnBatchNorm", "NativeGroupNorm"}
MOVES = (LAYOUT - {"Alias", "Cat", "Clone", "Slice", "ToCopy"}) | {"Amax", "Amin", "Max", "Mean", "Min", "Prod", "Sum"}
"""Operations after which an axis may be another one."""


SHIFTED = "y = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)"


def _name(operation: tuple[Any, int]) -> str:
    """``SigmoidBackward0`` is Sigmoid."""
    return operation[0].name().partition("Backward")[0]


def operations_before(out: Tensor) -> Iterator[tuple[Any, int]]:
    """The operation that made a tensor, and those before it, the last one first, as long as each has one input.

    Each with the number of its output. A weight is an input, also where it is frozen.
    """
    edge = out.grad_fn, out.output_nr
    for _ in range(LONGEST):
        if edge[0] is None:
            return
        yield edge
        inputs = edge[0].next_functions
        if len(inputs) != 1:
            return
        edge = inputs[0]


def made_of(out: Tensor, tensors: Sequence[tuple[T, Tensor]]) -> tuple[T, list[str], bool] | None:
    """The last of these of which ``out`` was made by operations that learn nothing; or None.

    With the names of those operations, the last one first, and whether no other of the tensors has a part in it.
    """
    of = {(tensor.grad_fn, tensor.output_nr): number for number, (_, tensor) in enumerate(tensors)}
    waiting, seen = [(out.grad_fn, out.output_nr)], set()
    names: list[str] = []
    found: list[int] = []
    while waiting:
        edge = waiting.pop(0)
        if edge in seen or edge[0] is None:
            continue
        seen.add(edge)
        if edge in of:
            found.append(of[edge])
            continue
        inputs, name = edge[0].next_functions, _name(edge)
        if not inputs or len(seen) > LONGEST or (len(inputs) > 1 and name not in JOINING):
            return None
        names.append(name)
        waiting.extend(inputs)
    return (tensors[max(found)][0], names, len(set(found)) == 1) if found else None


def last_activation(out: Tensor) -> str:
    """The name of the last operation that made ``out``, but for `LAYOUT` and `BOUNDS`; empty where there is none."""
    passed = LAYOUT | BOUNDS
    names = [name for name in map(_name, operations_before(out)) if name not in passed]
    if names[:1] == ["Exp"] and names[1:2] in (["LogSoftmax"], ["LogSigmoid"]):
        return names[1].removeprefix("Log").capitalize()
    return names[0] if names else ""


def _classes_first(logits: Tensor) -> bool:
    """Whether a convolution or a softmax over axis 1 made the logits, and no axis was moved since."""
    waiting: list[Any] = [logits.grad_fn]
    looked = 0
    while waiting and looked < LONGEST:
        operation, looked = waiting.pop(), looked + 1
        if operation is None:
            continue
        name = _name((operation, 0))
        if name.endswith("Convolution") or name.startswith("Upsample"):
            return True
        if name in ("LogSoftmax", "Softmax"):
            return operation._saved_dim in (1, 2**64 + 1 - logits.dim())  # autograd keeps it unsigned
        inputs = [function for function, _ in operation.next_functions]
        if name not in MOVES and (len(inputs) == 1 or name in JOINING or name in NORMS):
            waiting.extend(inputs)
    return False


def refuse_activation_twice(family: Distribution, mu: Tensor) -> None:
    """Raise ValueError where the model applied the activation that its clamped output takes logits for."""
    name = last_activation(mu)
    if name not in PROBABILITIES:
        return
    energy: Any = type(family)._clamped_energy
    if energy is Bernoulli._clamped_energy or (energy is Categorical._clamped_energy and name == "Softmax"):
        raise ValueError(
            f"the model ends in {name.lower()}, and {type(family).__name__} takes logits, of which it makes the "
            "probabilities itself: take that last step out of the model (nn.Identity() in its place), or give another "
            "output, such as output=pc.Gaussian() for a squared error" + see("activation-twice")
        )


def refuse_classes_first(labels: Tensor, logits: Tensor) -> None:
    """Raise ValueError where labels would fit logits of both layouts, and their classes lie along axis 1.

    There lie the channels of a convolution, and `Categorical` takes the last axis for the classes.
    """
    fits_both = labels.shape == logits.shape[:-1] == torch.Size([*logits.shape[:1], *logits.shape[2:]])
    if logits.dim() >= 3 and fits_both and _classes_first(logits):
        raise ValueError(
            f"logits {tuple(logits.shape)} come out of a convolution or a softmax over axis 1, with the classes along "
            "axis 1, and are read with the classes along the last axis: return logits.movedim(1, -1)"
            + see("classes-along-axis-1")
        )


def refuse_own_loss(returned: Any, logits: Any, y: Tensor | None) -> None:
    """Raise ValueError where a model made a loss of its own of labels in its arguments, and they are not in y.

    Or where they are, as they are, and the model shifts them: a language model predicts the token after each.
    """
    loss = returned.get("loss") if isinstance(returned, Mapping) else getattr(returned, "loss", None)
    if not isinstance(loss, Tensor):
        return
    if y is None:
        raise ValueError(
            "x holds labels, of which the model made a loss of its own, and y is not given: take them out of x and "
            "give them as y; a causal language model's one token on, " + SHIFTED + see("the-models-own-loss")
        )
    if y.is_floating_point() or y.dim() < 2 or not isinstance(logits, Tensor) or logits.shape[:-1] != y.shape:
        return
    if loss.numel() != 1:
        return  # a loss of each sample is not what Hugging Face's models make
    logits, own = logits.detach().float(), float(loss.detach())
    plain, shifted = (
        float(F.cross_entropy(a.flatten(0, -2), b.flatten()))
        for a, b in ((logits, y), (logits[..., :-1, :], y[..., 1:]))
    )
    if abs(own - shifted) < 1e-3 * abs(own) < abs(own - plain):
        shifts = f"y holds the model's own labels, which it shifts before its loss: {SHIFTED}"
        raise ValueError(shifts + see("the-models-own-loss"))


def refuse_own_tokens(model: Any, given: Any, y: Tensor | None) -> None:
    """Raise ValueError where a model that generates, of Hugging Face's, is to learn each token from itself."""
    generates, config = getattr(model, "can_generate", None), getattr(model, "config", None)
    if y is None or y.is_floating_point() or not callable(generates) or getattr(config, "is_encoder_decoder", False):
        return
    tokens = given.get("input_ids") if isinstance(given, Mapping) else given[0] if isinstance(given, tuple) else given
    if not isinstance(tokens, Tensor) or tokens.shape != y.shape or tokens.device != y.device or not generates():
        return
    same = tokens.data_ptr() == y.data_ptr()  # to compare values would wait for a GPU
    if same or (not y.is_cuda and bool(((tokens == y) | (y == -100)).all())):
        itself = f"y holds the input's own tokens, and the model predicts the token after each: {SHIFTED}"
        raise ValueError(itself + see("the-models-own-loss"))
