"""The inputs of a captured graph, and what stands for them in TorchScript."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from bnrewrite.capture.canonical import Canonical
from bnrewrite.doors.branch import Source
from bnrewrite.doors.module import Scripted
from bnrewrite.doors.plain import Untranslatable
from bnrewrite.kernels.frozen import is_small

_COMPARED = ("BoolType", "IntType", "FloatType", "StringType")


class Inputs:
    """Arguments, stored tensors and constants, by placeholder of the graph.

    Attributes:
        names: in the text of a function.
        sources: where the value comes from.
        given: the placeholders of the arguments, one for each.
        arguments: the types of these, as TorchScript writes them.
    """

    def __init__(
        self,
        scripted: torch.jit.ScriptModule,
        plain: Scripted,
        program: ExportedProgram,
        canonical: Canonical,
    ) -> None:
        graph = canonical.module.graph
        self.placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.names = {node: f"v{place}" for place, node in enumerate(self.placeholders)}
        self.sources: dict[fx.Node, Source] = {}
        self.given: list[fx.Node] = []
        _, *arguments = scripted._c._get_method("forward").schema.arguments
        self.arguments = [str(each.type.annotation_str) for each in arguments]
        self._values: dict[fx.Node, Tensor] = {}
        self._plain = plain
        owners = {each.data_ptr(): path for path, each in _unregistered(plain) if each.numel()}
        for node, spec in zip(self.placeholders, program.graph_signature.input_specs, strict=True):
            target = str(spec.target)
            if spec.kind is InputKind.USER_INPUT:
                self.sources[node] = Source(argument=len(self.given))
                self.given.append(node)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                stored: Any = {**program.constants, **program.state_dict}[target]
                self._values[node] = stored
                self.sources[node] = Source(path=tuple(target.split(".")))
            else:
                value = program.constants[target]
                if not isinstance(value, Tensor):
                    raise Untranslatable("it uses an object of a compiled class")
                path = owners.get(value.data_ptr())
                self._values[node] = value
                self.sources[node] = Source(constant=value) if path is None else Source(path=path)

    def used(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """The inputs among some nodes, in order."""
        mine = set(nodes)
        return [node for node in self.placeholders if node in mine]

    def is_small(self, norm: fx.Node) -> bool:
        """Whether the stored mean of a norm is, now, small beside its deviation."""
        mean, variance, eps = (self._value(each) for each in norm.args[3:6])
        return is_small(mean, variance, float(eps))

    def _value(self, node: Any) -> Any:
        """What is computed from stored tensors alone."""
        if not isinstance(node, fx.Node):
            return node
        if node in self._values:
            return self._values[node].detach()
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def numbers(self) -> Iterator[tuple[Source, Any]]:
        """What the module holds beside tensors and modules, and its value now.

        Raises:
            Untranslatable: something that cannot be compared.
        """
        seen: set[tuple[str, ...]] = set()
        for prefix, module in self._plain.named_modules():
            for text in getattr(module, "texts", ()):
                for (below, name), kind in text.attributes.items():
                    path = (*(prefix.split(".") if prefix else ()), *below, name)
                    value = _at(self._plain, path)
                    if path in seen or isinstance(value, Tensor) or _is_tensor(kind):
                        continue
                    seen.add(path)
                    if kind.kind() == "NoneType":
                        continue
                    if value is not None and not _is_compared(kind):
                        raise Untranslatable(
                            f"its attribute {'.'.join(path)}, a {kind.annotation_str}, may change"
                        )
                    yield Source(path=path, kind=kind), value


def _is_compared(kind: Any) -> bool:
    """Whether TorchScript compares two values of a type."""
    if kind.kind() in _COMPARED:
        return True
    inner = kind.containedTypes() if kind.kind() in ("ListType", "OptionalType") else []
    return bool(inner) and all(each.kind() in _COMPARED for each in inner)


def _is_tensor(kind: Any) -> bool:
    return "Tensor" in kind.annotation_str and kind.kind() in ("TensorType", "OptionalType")


def _at(module: Any, path: Iterable[str]) -> Any:
    for step in path:
        module = getattr(module, step)
    return module


def _unregistered(plain: Scripted) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Tensors that hang on a module without being parameters or buffers."""
    for prefix, module in plain.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield (*(prefix.split(".") if prefix else ()), name), value
