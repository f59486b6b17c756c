"""Put a branch in front of the code of a scripted module.

Before:  forward(x): <the user's nodes>
After:   forward(x): if guard(x, numbers, statistics): <operators> else: <the user's nodes>
Leaves alone: the module it is given. The result is another one, with the same tensors.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnrewrite.doors.plain import Untranslatable
from bnrewrite.errors import first_line


@dataclass(frozen=True)
class Source:
    """What a function of a branch is given: one of these three.

    Attributes:
        argument: the number of an argument of `forward`; -1 for none.
        path: of a tensor or a number of the module.
        kind: TorchScript's type of what is at a path; a tensor where it is None.
        constant: a tensor that nobody owns.
    """

    argument: int = -1
    path: tuple[str, ...] = ()
    kind: Any = None
    constant: Tensor | None = None


@dataclass(frozen=True)
class Branch:
    """A graph, and when it stands for the user's code.

    Attributes:
        text: of the functions `guard` and `graph`.
        guarded: what `guard` is given.
        given: what `graph` is given.
    """

    text: str
    guarded: tuple[Source, ...]
    given: tuple[Source, ...]


def install(scripted: torch.jit.ScriptModule, branches: Sequence[Branch]) -> torch.jit.ScriptModule:
    """A module like another, with branches in front of its code, the first one asked first.

    Raises:
        Untranslatable: TorchScript does not take a branch, or cannot save the module.
    """
    try:
        functions = [torch.jit.CompilationUnit(branch.text) for branch in branches]
    except RuntimeError as error:
        raise Untranslatable(f"TorchScript does not take its graph: {first_line(error)}") from error
    result = _twin(scripted)
    graph = result._c._get_method("forward").graph
    for branch, compiled in reversed(list(zip(branches, functions, strict=True))):
        _insert(result, graph, branch, compiled)
    graph.lint()
    return result


def _insert(result: Any, graph: Any, branch: Branch, compiled: Any) -> None:
    body, users = list(graph.nodes()), next(iter(graph.outputs()))
    graph.setInsertPoint(body[0] if body else graph.return_node())
    guard = graph.insertGraph(compiled.guard.graph, _values(result, graph, branch.guarded))[0]
    decision = graph.create("prim::If", [guard], 1)
    graph.insertNode(decision)
    decision.output().setType(users.type())
    rewritten = decision.addBlock()
    graph.setInsertPoint(rewritten)
    given = _values(result, graph, branch.given, narrowed=True)
    rewritten.registerOutput(graph.insertGraph(compiled.graph.graph, given)[0])
    own = decision.addBlock()
    for node in body:
        node.moveBefore(own.returnNode())
    own.registerOutput(users)
    graph.eraseOutput(0)
    graph.registerOutput(decision.output())


def _values(
    result: Any, graph: Any, sources: Sequence[Source], *, narrowed: bool = False
) -> list[Any]:
    """What is given to a function, read at the place where the graph is written."""
    arguments = list(graph.inputs())[1:]
    owners: dict[tuple[str, ...], Any] = {(): next(iter(graph.inputs()))}
    return [_value(result, graph, each, arguments, owners, narrowed) for each in sources]


def _value(
    result: Any,
    graph: Any,
    source: Source,
    arguments: Sequence[Any],
    owners: dict[tuple[str, ...], Any],
    narrowed: bool,
) -> Any:
    if source.constant is not None:
        return graph.insertConstant(source.constant)
    if source.argument >= 0:
        value = arguments[source.argument]
        if narrowed and value.type().kind() == "OptionalType":  # the guard has looked
            return _node(graph, "prim::unchecked_cast", value, torch._C.TensorType.get())
        return value
    owner = result._c
    for depth, step in enumerate(source.path[:-1], 1):
        owner = owner.getattr(step)
        if source.path[:depth] not in owners:
            above = owners[source.path[: depth - 1]]
            owners[source.path[:depth]] = _node(graph, "prim::GetAttr", above, owner._type(), step)
    kind = torch._C.TensorType.get() if source.kind is None else source.kind
    return _node(graph, "prim::GetAttr", owners[source.path[:-1]], kind, source.path[-1])


def _node(graph: Any, kind: str, given: Any, result: Any, name: str | None = None) -> Any:
    node = graph.create(kind, [given], 1)
    if name is not None:
        node.s_("name", name)
    graph.insertNode(node)
    node.output().setType(result)
    return node.output()


def _twin(scripted: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A module with code of its own and the same tensors.

    A copy of a scripted module has its methods in common with it, what was loaded from a file not.
    """
    file = io.BytesIO()
    try:
        torch.jit.save(scripted, file)
    except RuntimeError as error:
        raise Untranslatable(f"TorchScript does not save it: {first_line(error)}") from error
    file.seek(0)
    load: Any = torch.jit.load
    result: torch.jit.ScriptModule = load(file)
    _share(scripted._c, result._c)
    return result


def _share(mine: Any, other: Any) -> None:
    """Give one module the tensors of another."""
    registries: tuple[Any, ...] = (torch._C.ParameterDict, torch._C.BufferDict)
    for registry in registries:
        for name, value in registry(mine).items():
            other.setattr(name, value)
    for name, child in torch._C.ModuleDict(mine).items():
        _share(child, other.getattr(name))
