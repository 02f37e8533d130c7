"""What `convert` did to a model: a dict that prints as a table, and that a first batch completes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .distributions import Distribution, node_of
from .free_energy import FreeEnergy
from .functions import ATTENTION, FunctionCalls
from .module_node import base_layer


class Changes(dict[str, str]):
    """What was done by module name, as `convert` returns it. ``print(changes)`` shows a table.

    `convert` cannot know what a forward visits. `visit` runs one batch, and the table then says it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.visits: dict[str, str] = {}  # by module name: whether a first batch met its node
        self.nodes: Collection[Distribution] = [m for m in model.modules() if isinstance(m, Distribution)]

    def visit(self, free_energy: FreeEnergy, x: Any, y: Tensor | None = None) -> Changes:
        """Run one batch, and note which nodes the model's forward visits. Trains nothing.

        free_energy: of the converted model. x, y: as in a call of it. Functions that stand where a node could be, such
        as ``F.softmax``, are added with the module that calls them. Returns itself. Raises what a call does.
        """
        batch, functions = free_energy.batch(x, y), FunctionCalls()
        with torch.inference_mode(False), batch.calls.held(), functions:
            batch.at_prediction()
        batch.random.restore()
        output = batch.output.node
        self.nodes = {node.family for node in batch.nodes if node is not output}
        for name, module in self.model.named_modules():
            called = functions.found.get(module)
            if called and name not in self:
                self[name] = calls_a_function(called)
            family = node_of(module) if name in self else None
            if family is not None:
                missed = "the output" if output and family is output.family else "not visited"
                self.visits[name] = "visited" if family in self.nodes else missed
        return self

    @property
    def share(self) -> float:
        """The fraction of the parameters that are in layers with a value node; after a `visit`, with a free one."""
        with_node: set[nn.Parameter] = set()
        for module in self.model.modules():
            if node_of(module) in self.nodes:
                inner = module.parameters() if base_layer(module) is not None else module.parameters(recurse=False)
                with_node.update(inner)
                for part in getattr(module, "parametrizations", {}).values():
                    with_node.update(part.parameters())
        sizes = {p: p.numel() for p in self.model.parameters()}
        return sum(sizes[p] for p in with_node) / max(sum(sizes.values()), 1)

    def __str__(self) -> str:
        rows = [("module", "first batch", "change")]
        rows += [(name or "(the model)", self.visits.get(name, ""), change) for name, change in self.items()]
        name, visit, _ = (max(map(len, column)) for column in zip(*rows))
        lines = [f"{row[0]:<{name}}  {f'{row[1]:<{visit}}  ' if self.visits else ''}{row[2]}" for row in rows]
        last = f"{self.share:.1%} of the parameters are in layers with a {'free ' if self.visits else ''}value node"
        if not self.nodes:
            last += ": nothing for inference to move, and training is backpropagation"
        return "\n".join([*lines, last])


def calls_a_function(name: str) -> str:
    """What `Changes` says of a module whose forward calls this function."""
    use = "pc.Attention" if name in ATTENTION.values() else "pc.Categorical(), a module,"
    return f"left as it is: its forward calls {name}, and a function has no value node; use {use} in its place"
