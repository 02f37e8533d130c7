"""What a model returned, told by autograd's graph: whose values those are, and what the model did to them last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from .distributions import Distribution
from .families import Bernoulli, Categorical

T = TypeVar("T")
LONGEST = 64
"""Operations that are looked at."""
LAYOUT = {
    *(
        "Alias",
        "AsStrided",
        "Clone",
        "Diagonal",
        "Expand",
        "Permute",
        "ReshapeAlias",
        "T",
        "ToCopy",
        "Transpose",
        "UnsafeView",
    ),
    *("View", "Squeeze", "Unsqueeze", "Flip", "Gather", "Index", "IndexSelect", "Select", "Slice", "Split"),
    *("SplitWithSizes", "Unbind", "UnsafeSplit"),
}
"""Operations after which a value is what it was: in another place or dtype, or left out."""
PROBABILITIES = {"Sigmoid", "Hardsigmoid", "LogSigmoid", "Softmax"}


def name_of(operation: Any) -> str:
    """``SigmoidBackward0`` is Sigmoid."""
    return operation.name().partition("Backward")[0]


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


def made_of(out: Tensor, tensors: Sequence[tuple[T, Tensor]]) -> tuple[T, list[str]] | None:
    """Of which of these ``out`` was made by operations of one input, and their names, the last one first; or None."""
    of = {(tensor.grad_fn, tensor.output_nr): owner for owner, tensor in tensors}
    names: list[str] = []
    for edge in operations_before(out):
        if edge in of:
            return of[edge], names
        names.append(name_of(edge[0]))
    return None


def last_activation(out: Tensor) -> str:
    """The name of the last operation that made ``out``, but for those of `LAYOUT`; empty where there is none."""
    names = (name_of(operation) for operation, _ in operations_before(out))
    return next((name for name in names if name not in LAYOUT), "")


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
            "output, such as output=pc.Gaussian() for a squared error"
        )
