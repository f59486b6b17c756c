"""What has no form in Python or in TorchScript is told, part by part of a graph."""

from __future__ import annotations

import operator
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from door_models import LayerNorm, script
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_structure

from bnrewrite.doors.branch import Branch, install
from bnrewrite.doors.module import plain_module
from bnrewrite.doors.plain import Untranslatable
from bnrewrite.doors.statements import write_method
from bnrewrite.doors.torchscript import FunctionText

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def written(body: str) -> list[str]:
    """The text of a method with this graph, as an archive may hold it."""
    lines = "\n  ".join(body.split(";"))
    graph = torch._C.parse_ir(f"graph(%self : Tensor, %x : Tensor):\n  {lines}\n")
    arguments = [SimpleNamespace(name=n, has_default_value=lambda: False) for n in ("self", "x")]
    schema = SimpleNamespace(arguments=arguments)
    return write_method("forward", SimpleNamespace(graph=graph, schema=schema)).lines


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "%d : int = prim::Constant[value=0]();%n : int = aten::size(%x, %d);"
            "%t : Tensor = prim::NumToTensor(%n);%r : Tensor = aten::relu(%t);return (%r)",
            "it calls aten::relu on a size",
        ),
        (
            "%r : Tensor = aten::nothing(%x);return (%r)",
            "it calls aten::nothing, which has no schema",
        ),
        (
            '%s : str = prim::Constant[value="%s"]();%r : str = aten::percentFormat(%s, %x);'
            "return (%r)",
            "it calls aten::percentFormat with any number of arguments",
        ),
        (
            "%d : int = prim::Constant[value=99]();%f : bool = prim::Constant[value=0]();"
            "%n : NoneType = prim::Constant();%r : Tensor = aten::to(%x, %d, %f, %f, %n);"
            "return (%r)",
            "it names the ScalarType number 99",
        ),
        (
            '%r : Tensor = prim::GetAttr[name="a"](%x);return (%r)',
            "it uses an object of the class Tensor",
        ),
        ("%r : Tensor = prim::Anything(%x);return (%r)", "it calls prim::Anything"),
        (
            "%l : Tensor[] = prim::ListConstruct(%x);%r : Tensor[] = aten::append(%l);return (%r)",
            "it calls aten::append on a list",
        ),
    ],
)
def test_what_has_no_form_in_python(body: str, sentence: str) -> None:
    with pytest.raises(Untranslatable, match=sentence):
        written(body)


@torch.jit.script
class Box:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Boxing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        box = Box(x)
        return box.value


def test_objects_of_the_users() -> None:
    with pytest.raises(Untranslatable, match=r"it makes an object of the class .*Box"):
        plain_module(script(Boxing()))
    packed = torch.ao.nn.quantized.dynamic.Linear(2, 2)  # type: ignore[no-untyped-call]
    with pytest.raises(Untranslatable, match=r"it uses an object of the class .*PackedParams"):
        plain_module(script(packed))


def node(target: Any, *args: Any, mode: str = "call_function") -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.create_node(mode, target, (x, *args))
    graph.output(made)
    return graph


def modes(*enabled: bool) -> fx.Graph:
    graph = fx.Graph()
    graph.placeholder("x")
    for each in enabled:
        graph.call_function(torch._C._set_grad_enabled, (each,))
    graph.output(())
    return graph


@pytest.mark.parametrize(
    ("graph", "sentence"),
    [
        (node("relu", mode="call_method"), "its graph holds call_method relu"),
        (node(operator.matmul, 3), "its graph calls <built-in function matmul>"),
        (node(operator.getitem, object()), "its graph holds a value of the type object"),
        (modes(False), "its graph ends in another gradient mode than it begins in"),
        (modes(False, False), "its graph sets a gradient mode that is set already"),
    ],
)
def test_what_has_no_form_in_torchscript(graph: fx.Graph, sentence: str) -> None:
    names = {each: each.name for each in graph.nodes if each.op == "placeholder"}
    with pytest.raises(Untranslatable, match=sentence):
        FunctionText(names).write(graph.nodes)


def test_a_result_of_another_structure() -> None:
    with pytest.raises(Untranslatable, match="it returns a OrderedDict"):
        FunctionText({}).result([1], tree_structure(OrderedDict(a=1)))


def test_what_torchscript_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = script(LayerNorm(6).eval())
    with pytest.raises(Untranslatable, match="TorchScript does not take its graph: "):
        install(scripted, [Branch("def guard(x):\n    return nothing", (), ())])

    def failing(*_: Any) -> None:
        raise RuntimeError("could not export a function")

    monkeypatch.setattr(torch.jit, "save", failing)
    with pytest.raises(Untranslatable, match="TorchScript does not save it: could not export"):
        install(scripted, [])
