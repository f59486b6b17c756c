"""Run a Dynamo graph node by node, as it is traced into its canonical form."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from bnrewrite.capture.autocast import ENTER, EXIT, autocast_kept, enter_autocast, exit_autocast

# Dynamo's `tensor.data = value`, before torch 2.14 and from then on
_ASSIGNMENTS = (torch.Tensor.set_, getattr(torch.ops.aten, "shallow_copy_data_", None))
_DATA = vars(torch._C)["_autograd"]._get_data_attr  # Dynamo's `tensor.data`


class Interpreted(torch.nn.Module):
    """Runs a Dynamo graph node by node, so that each ATen node inherits its node's metadata.

    Tensor constants of the graph are buffers here, and so become the leading placeholders.

    Args:
        graph_module: the graph.
        constants: its tensor constants.
        detached: updates in place of which what is written must be detached.

    Attributes:
        reached: the node that is run now; None before the first and after the last.
    """

    reached: fx.Node | None = None

    def __init__(
        self,
        graph_module: fx.GraphModule,
        constants: dict[str, torch.Tensor],
        detached: Set[fx.Node],
    ) -> None:
        super().__init__()
        for i, constant in enumerate(constants.values()):
            self.register_buffer(f"constant_{i}", constant)
        self.interpreter = (_Interpreter(graph_module, self, list(constants), detached),)

    def forward(self, *args: Any) -> Any:
        with autocast_kept():
            results = self.interpreter[0].run(*args)
        self.reached = None
        return results


class _Interpreter(fx.Interpreter):
    def __init__(
        self,
        graph_module: fx.GraphModule,
        owner: Interpreted,
        constants: list[str],
        detached: Set[fx.Node],
    ) -> None:
        super().__init__(graph_module)
        self.owner = owner
        self.constants = constants
        self.detached = detached
        self.outer: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        self.owner.reached = n
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n in self.detached:
            updated = {"out": kwargs["out"]} if "out" in kwargs else {}
            rest = args if updated else args[1:]
            rest, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (rest, kwargs))
            args, kwargs = (*args[: len(args) - len(rest)], *rest), {**kwargs, **updated}
        return args, kwargs

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A node's value; four kinds of node mean something else to a trace than to a call."""
        if target in _ASSIGNMENTS and len(args) == 2:
            return args[0].copy_(args[1])
        if target is _DATA:
            return args[0].detach()  # an attribute, of which a trace sees nothing
        if getattr(target, "__name__", "") == "_lower_version_count_by_1":
            return args[0]
        value = super().call_function(target, args, kwargs)
        if target is ENTER:  # a trace only writes these two down
            self.outer.append(enter_autocast(*args))
        elif target is EXIT:
            exit_autocast(self.outer.pop())
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.constants:
            return getattr(self.owner, f"constant_{self.constants.index(target)}")
        return super().get_attr(target, args, kwargs)
