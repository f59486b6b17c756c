"""A scripted module as an ordinary `nn.Module` that computes the same.

Names, parameters and buffers are those of the scripted module, the very tensors; every method is a
Python function whose text is written from the method's graph. Control flow stays control flow, so
that both modes (`self.training`) and every size are there, and `optimize` takes it like a model of
the user's.
"""

from __future__ import annotations

import ast
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from bnrewrite.doors.plain import NAMES, Untranslatable
from bnrewrite.doors.statements import Text, checked_name, write_method


def plain_module(scripted: torch.jit.ScriptModule, *, for_export: bool = False) -> Scripted:
    """A module of the same structure, with the same tensors, that Python runs.

    For an export it raises where it would bind an attribute to a new tensor.

    Raises:
        Untranslatable: the module calls something that has no form in Python.
    """
    root = _Building(set(scripted.state_dict()), for_export).module(scripted._c, "")
    for name, each in root.named_modules():
        each.training = _mode(scripted._c, name)
    return root


class Scripted(nn.Module):
    """A module that was written from TorchScript; its class is made for it alone.

    It is copied as any module; pickle asks for its class by name, and so it is saved by its
    `state_dict`.
    """

    texts: ClassVar[tuple[Text, ...]] = ()


class _Building:
    def __init__(self, saved: set[str], for_export: bool) -> None:
        self.for_export = for_export
        self.saved = saved  # keys of the state_dict: other buffers are not persistent
        self.kinds: dict[str, type[Scripted]] = {}
        self.parameters: dict[int, tuple[torch.Tensor, nn.Parameter]] = {}  # by id of the tensor

    def module(self, scripted: Any, prefix: str) -> Scripted:
        if scripted._get_forward_hooks() or scripted._get_forward_pre_hooks():
            raise Untranslatable(f"{prefix.rstrip('.') or 'the module'}: it has hooks")
        module = self._kind(scripted, prefix)()
        parameters: Any = torch._C.ParameterDict(scripted)
        buffers: Any = torch._C.BufferDict(scripted)
        for name, value in parameters.items():
            module.register_parameter(checked_name(name), self._parameter(value))
        for name, value in buffers.items():
            module.register_buffer(
                checked_name(name), value, persistent=f"{prefix}{name}" in self.saved
            )
        for name, child in torch._C.ModuleDict(scripted).items():
            module.add_module(name, self.module(child, f"{prefix}{name}."))
        for text in module.texts:
            for path, name in text.attributes:
                _set_plain(module, scripted, path, name)
        return module

    def _parameter(self, value: torch.Tensor) -> nn.Parameter:
        """A tensor as the parameter that it was; that of a loaded module is only a tensor."""
        if isinstance(value, nn.Parameter):
            return value
        known = self.parameters.get(id(value))
        if known is None:
            known = value, nn.Parameter(value.detach(), requires_grad=value.requires_grad)
            self.parameters[id(value)] = known
        return known[1]

    def _kind(self, scripted: Any, prefix: str) -> type[Scripted]:
        """The class for a type of TorchScript's; instances of one type share their methods."""
        name = str(scripted._type().qualified_name())
        if name not in self.kinds:
            members: dict[str, Any] = {}
            texts: list[Text] = []
            for method in scripted._method_names():
                if not method.startswith("__"):
                    text = self._text(scripted, method, prefix)
                    if text is not None:
                        texts.append(text)
                        members[method] = compiled(text)
            title = "".join(c for c in name.rpartition(".")[2] if c.isalnum() or c == "_")
            members["texts"] = tuple(texts)
            self.kinds[name] = type(title or "Scripted", (Scripted,), members)
        return self.kinds[name]

    def _text(self, scripted: Any, method: str, prefix: str) -> Text | None:
        try:
            return write_method(method, scripted._get_method(method), for_export=self.for_export)
        except Untranslatable as refusal:
            if method != "forward":
                return None  # who calls it is told that it is missing
            raise Untranslatable(f"{prefix.rstrip('.') or 'the module'}: {refusal}") from None


def compiled(text: Text) -> types.FunctionType:
    """The function, with the user's lines; a frame of it names the user's file."""
    tree = ast.parse("\n".join(text.lines))
    places = text.places
    for node in ast.walk(tree):
        line = getattr(node, "lineno", None)
        if line is not None:
            place = places[line - 1]
            node.lineno = node.end_lineno = 1 if place is None else place[1]  # type: ignore[attr-defined]
            node.col_offset = node.end_col_offset = 0  # type: ignore[attr-defined]
    files = Counter(place[0] for place in places if place is not None)
    file = files.most_common(1)[0][0] if files else "<torchscript>"
    scope = {**NAMES, **text.constants}
    exec(compile(tree, file, "exec"), scope)  # the text is ours; see statements.py
    function: types.FunctionType = scope[text.name]
    return function


def _set_plain(module: nn.Module, scripted: Any, path: tuple[str, ...], name: str) -> None:
    """Set an attribute that is neither registered nor a module: a number, a list, a tensor."""
    for step in path:
        following = module._modules[step]
        assert following is not None
        module, scripted = following, scripted.getattr(step)
    if name != "training" and not any(name in each for each in _registries(module)):
        value = scripted.getattr(name)
        if isinstance(value, torch.ScriptObject):
            raise Untranslatable(f"its attribute {name} is an object of a compiled class")
        setattr(module, name, value)


def _registries(module: nn.Module) -> Iterator[dict[str, Any]]:
    yield from (module._parameters, module._buffers, module._modules)


def _mode(scripted: Any, path: str) -> bool:
    for step in path.split(".") if path else ():
        scripted = scripted.getattr(step)
    return bool(scripted.getattr("training")) if scripted.hasattr("training") else False
