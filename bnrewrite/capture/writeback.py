"""Put the new values of buffers back where they belong, at the end of a graph.

Before:  return (new_running_mean, y)
After:   copy_(running_mean, new_running_mean), without gradients; return (y,)

What a backward needs of an updated buffer is a copy that is taken first, never the live buffer: two
forwards before a backward, or a `load_state_dict` between them, stay as legal as they were when the
buffer was rebound. A stage that differentiates the graph itself may recompute anything from its
inputs: there the copy is taken before the graph is called, and the update is made after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bnrewrite.capture.aliases import outputs_of
from bnrewrite.capture.lifetime import outlives, reaches
from bnrewrite.gradients import GRAD_MODE, differentiable_nodes

Run = Callable[..., Any]


@dataclass(frozen=True)
class Update:
    """A placeholder that gets a new value.

    Attributes:
        placeholder: its name.
        value: position of the new value among the outputs.
        history: keep the autograd history of the new value; otherwise it is dropped.
    """

    placeholder: str
    value: int
    history: bool = False


@dataclass(frozen=True)
class Around:
    """Updates that are made around a graph instead of in it.

    Attributes:
        inputs: positions of the inputs that are updated; the graph gets copies of them. Their new
            values are the last outputs of the graph.
        returned: which output is which of these inputs itself.
    """

    inputs: tuple[int, ...]
    returned: tuple[tuple[int, int], ...]

    def fill(self, module: fx.GraphModule) -> None:
        """Put the new values in the place of results that are none; DDP's optimizer takes no None.

        They are replaced behind the call.
        """
        if self.returned:
            *_, output = module.graph.nodes
            results = outputs_of(module)
            new = dict(zip(self.inputs, results[-len(self.inputs) :], strict=True))
            for place, position in self.returned:
                results[place] = new[position]
            output.args = (tuple(results),)
            module.recompile()

    def wrap(self, run: Run) -> Run:
        """The call with its updates."""
        if not self.inputs:
            return run
        count = len(self.inputs)

        def updating(*args: Any) -> list[Any]:
            given, live = list(args), [args[i] for i in self.inputs]
            for i in self.inputs:
                given[i] = args[i].clone()
            results = list(run(*given))
            new = results[-count:]
            del results[-count:]
            with torch.no_grad():
                for buffer, value in zip(live, new, strict=True):
                    buffer.copy_(value)
            for output, i in self.returned:
                results[output] = args[i]
            return results

        return updating


def write_back(
    module: fx.GraphModule,
    updates: Sequence[Update],
    outputs: Sequence[int | str],
    grad_enabled: bool,
    differentiated_later: bool,
) -> Around:
    """Replace the outputs of a graph by updates of its inputs and the outputs of the user's code.

    Args:
        module: changed in place.
        updates: where the new values go.
        outputs: what is returned instead: the position of an old output, or a placeholder's name.
        grad_enabled: the gradient mode in which the graph is called.
        differentiated_later: whether the stage after traces a backward of its own.

    Returns:
        The updates that are left to be made around the graph.
    """
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    named = {node.name: node for node in placeholders}
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(outputs_of(module)),)
    differentiable = differentiable_nodes(graph, grad_enabled)
    outside = [
        update
        for update in updates
        if differentiated_later
        and not update.history
        and reaches(named[update.placeholder], differentiable)
    ]
    inside = [update for update in updates if update not in outside]
    for update in inside:
        if outlives(named[update.placeholder], differentiable):
            _read_a_copy(graph, named[update.placeholder], placeholders[-1])
    values = outputs_of(module)  # some may be reads of an updated placeholder
    with graph.inserting_before(output):
        for update in sorted(inside, key=lambda each: not each.history):
            _copy(graph, named[update.placeholder], values[update.value])
    _without_gradients(graph, sum(not update.history for update in inside), grad_enabled, output)
    drop_idle_modes(graph, grad_enabled)
    moved = [update.placeholder for update in outside]
    results = [
        values[each] if isinstance(each, int) else (None if each in moved else named[each])
        for each in outputs
    ]
    output.args = ((*results, *(values[update.value] for update in outside)),)
    module.recompile()
    position = {node.name: i for i, node in enumerate(placeholders)}
    return Around(
        inputs=tuple(position[name] for name in moved),
        returned=tuple((i, position[each]) for i, each in enumerate(outputs) if each in moved),
    )


def _read_a_copy(graph: fx.Graph, placeholder: fx.Node, last: fx.Node) -> None:
    """Let every read of a placeholder see a copy of its value at the start."""
    users = list(placeholder.users)
    with graph.inserting_after(last):
        copy = graph.call_function(torch.ops.aten.clone.default, (placeholder,))
    copy.meta = dict(placeholder.meta)
    for user in users:
        user.replace_input_with(placeholder, copy)


def _copy(graph: fx.Graph, placeholder: fx.Node, value: fx.Node) -> None:
    node = graph.call_function(torch.ops.aten.copy_.default, (placeholder, value))
    node.meta["val"] = placeholder.meta.get("val")


def _without_gradients(graph: fx.Graph, count: int, grad_enabled: bool, output: fx.Node) -> None:
    """Switch gradients off around the last `count` nodes."""
    if not count or not grad_enabled:
        return
    first = output
    for _ in range(count):
        first = first.prev
    with graph.inserting_before(first):
        graph.call_function(GRAD_MODE, (False,))
    with graph.inserting_before(output):
        graph.call_function(GRAD_MODE, (True,))


def drop_idle_modes(graph: fx.Graph, grad_enabled: bool) -> None:
    """Drop gradient modes that are set for nothing, as a removed update leaves them behind."""
    modes = [node for node in graph.nodes if node.target is GRAD_MODE]
    for node in modes:
        if node.next.target is GRAD_MODE:
            graph.erase_node(node)
            continue
        if bool(node.args[0]) == grad_enabled:
            graph.erase_node(node)
        else:
            grad_enabled = bool(node.args[0])
