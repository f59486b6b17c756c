"""A scripted module for inference with its norms replaced, and a scripted module again.

The module is written as a Python module, exported for the inputs of an example with sizes that may
change, and goes through the same capture and passes. What comes out becomes a branch in front of
the user's own code, in the user's own graph:

    def forward(self, x):
        if <x, the mode and the numbers are as they were captured>:
            return <operators of PyTorch: batch_norm, layer_norm, ...>
        return <as the module was written>

so that no input, no mode and no checkpoint gets another result than before. The names, the tensors
and the other methods of the module are the user's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from bnrewrite.capture.aliases import outputs_of
from bnrewrite.capture.canonical import Canonical
from bnrewrite.capture.look import Look
from bnrewrite.capture.refusal import sentence
from bnrewrite.capture.writeback import drop_idle_modes
from bnrewrite.doors.branch import Branch, Source, install
from bnrewrite.doors.guard import (
    kind_conditions,
    outside_conditions,
    shape_conditions,
    size_conditions,
    size_relations,
    statistics_conditions,
)
from bnrewrite.doors.inputs import Inputs
from bnrewrite.doors.module import Scripted
from bnrewrite.doors.plain import Untranslatable
from bnrewrite.doors.program import look_at
from bnrewrite.doors.torchscript import FunctionText
from bnrewrite.doors.wrapped import any_size
from bnrewrite.kernels import frozen_batch_norm
from bnrewrite.options import Options
from bnrewrite.walks import computed_from

_READ_BY_CODE = (".requires_grad", "is_grad_enabled")


@dataclass(frozen=True)
class Captured:
    """The module for inputs of one kind.

    Attributes:
        program: as it was exported.
        look: what was found in it.
        assumed: what has to hold of its sizes for that.
    """

    program: ExportedProgram
    look: Look
    assumed: tuple[Any, ...]


def capture(
    plain: Scripted, inputs: Sequence[Any], options: Options
) -> tuple[list[Captured], str | None]:
    """The module captured for inputs like an example's, for a batch of one and for larger ones.

    Returns:
        What was captured, and why nothing was, where nothing was.
    """
    for each in plain.modules():
        for text in getattr(each, "texts", ()):
            if any(word in line for word in _READ_BY_CODE for line in text.lines):
                return [], "it asks whether gradients are recorded"
    for place, each in enumerate(inputs):
        if not isinstance(each, Tensor | bool | int | float | str | None):
            return [], f"its input {place} is a {type(each).__name__}, neither tensor nor number"
    found: list[Captured] = []
    reason: str | None = None
    for given in _examples(inputs):
        if found and _is_admitted(found[0], given):
            break
        try:
            program = _exported(plain, given)
            found.append(Captured(program, *look_at(program, options, "script")))
        except Exception as error:  # whatever the user's code, or the exporter, raises
            reason = reason or sentence(error)
    failures = [each.look.failure for each in found if each.look.failure is not None]
    if any(each.look.is_changed for each in found):
        return found, None
    return found, next(iter(failures), None if found else reason)


def converted(
    scripted: torch.jit.ScriptModule, plain: Scripted, captured: Sequence[Captured]
) -> torch.jit.ScriptModule:
    """The scripted module with a branch for each of what was captured; itself without one.

    Raises:
        Untranslatable: TorchScript has no form for one of them.
    """
    branches = [_branch(scripted, plain, each) for each in captured if each.look.is_changed]
    return install(scripted, branches) if branches else scripted


def _examples(inputs: Sequence[Any]) -> Iterator[list[Any]]:
    """The inputs as they are, and with a batch of one, or of two where it is one."""
    yield list(inputs)
    sizes = [each.shape[0] for each in inputs if isinstance(each, Tensor) and each.dim()]
    if sizes and sizes[0] == 1:
        yield [_of_batch(each, 1, lambda x: torch.cat([x, x])) for each in inputs]
    elif sizes and sizes[0]:
        yield [_of_batch(each, sizes[0], lambda x: x[:1]) for each in inputs]


def _is_admitted(captured: Captured, inputs: Sequence[Any]) -> bool:
    """Whether what was captured stands for inputs of other sizes too, as far as can be told."""
    known: dict[Any, int] = {}
    placeholders = [node for node in captured.program.graph.nodes if node.op == "placeholder"]
    for node, given in zip(placeholders[len(placeholders) - len(inputs) :], inputs, strict=True):
        if isinstance(given, Tensor):
            for size, wanted in zip(node.meta["val"].shape, given.shape, strict=True):
                if isinstance(size, int) and size != wanted:
                    return False
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    known[size.node.expr] = wanted
    relations = size_relations(captured.program, captured.assumed)
    try:
        return all(each.xreplace(known) is not sympy.false for each in relations)
    except ZeroDivisionError:
        return False


def _of_batch(given: Any, batch: int, change: Callable[[Tensor], Tensor]) -> Any:
    has_batch = isinstance(given, Tensor) and given.dim() > 0 and given.shape[0] == batch
    return change(given) if has_batch else given


def _exported(plain: Scripted, inputs: Sequence[Any]) -> ExportedProgram:
    """The module exported, with every size that can change free to change."""
    given = tuple(each.detach() if isinstance(each, Tensor) else each for each in inputs)
    sizes = tuple(
        dict.fromkeys(range(each.dim()), Dim.AUTO) if isinstance(each, Tensor) else None
        for each in given
    )
    with warnings.catch_warnings(), quiet_exporter(), any_size():
        warnings.simplefilter("ignore")
        return torch.export.export(plain, given, dynamic_shapes=sizes, strict=False)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter from logging what becomes one sentence, and from leaving hooks behind.

    Where torch 2.11 fails, its hook on the buffers of all modules stays.
    """
    hooks: dict[int, Any] = torch.nn.modules.module._global_buffer_registration_hooks
    known = list(hooks)
    names = ("torch.export", "torch._export", "torch.fx.experimental.symbolic_shapes")
    loggers = list(map(logging.getLogger, _below(names)))
    before = [each.disabled for each in loggers]
    for each in loggers:
        each.disabled = True
    try:
        yield
    finally:
        for key in [each for each in hooks if each not in known]:
            del hooks[key]
        for each, disabled in zip(loggers, before, strict=True):
            each.disabled = disabled


def _below(names: Sequence[str]) -> list[str]:
    """The names of loggers, with all that hang below: each of torch's is set apart."""
    known = list(logging.Logger.manager.loggerDict)
    return [each for each in known if each.startswith(tuple(names))]


def _branch(scripted: torch.jit.ScriptModule, plain: Scripted, captured: Captured) -> Branch:
    """What was captured as functions of TorchScript."""
    canonical = captured.look.canonical
    if canonical is None:
        raise Untranslatable("parts of it can only be called as they are")
    graph = canonical.module.graph
    drop_idle_modes(graph, canonical.grad_enabled)
    inputs = Inputs(scripted, plain, captured.program, canonical)
    frozen = [node for node in graph.nodes if node.target is frozen_batch_norm]
    exact = [node for node in frozen if not inputs.is_small(node)]
    guard, guarded = _guard(inputs, captured, [node for node in frozen if node not in exact])
    body, given = _body(inputs, captured, canonical, exact, _returned(scripted))
    return Branch(f"{guard}\n\n{body}\n", tuple(guarded), tuple(given))


def _returned(scripted: torch.jit.ScriptModule) -> str:
    (result,) = scripted._c._get_method("forward").schema.returns
    return str(result.type.annotation_str)


def _guard(
    inputs: Inputs, captured: Captured, frozen: Sequence[fx.Node]
) -> tuple[str, list[Source]]:
    """The text of the function that says whether a call is like the captured one."""
    parameters: list[str] = []
    sources: list[Source] = []
    presence: list[str] = []
    kinds: list[str] = []
    values: list[str] = []
    symbols: dict[Any, str] = {}
    for place, (node, kind) in enumerate(zip(inputs.given, inputs.arguments, strict=True)):
        name, value = f"a{place}", node.meta.get("val")
        parameters.append(f"{name}: {kind}")
        sources.append(Source(argument=place))
        if not isinstance(value, Tensor):
            values.append(_equals(name, kind, value))
            continue
        if kind not in ("Tensor", "Optional[Tensor]"):
            raise Untranslatable(f"its input {place} is a {kind}")
        if kind != "Tensor":
            presence.append(f"{name} is not None")
        kinds += kind_conditions(name, value)
        values += shape_conditions(name, value, symbols)
    for place, (source, value) in enumerate(inputs.numbers()):
        parameters.append(f"m{place}: {source.kind.annotation_str}")
        sources.append(source)
        values.append(_equals(f"m{place}", source.kind.annotation_str, value))
    values += size_conditions(captured.program, captured.assumed, symbols)
    values += outside_conditions()
    statistics = set(computed_from(each for node in frozen for each in node.all_input_nodes[-2:]))
    text = FunctionText(inputs.names)
    for node in inputs.used(statistics):
        parameters.append(f"{inputs.names[node]}: Tensor")
        sources.append(inputs.sources[node])
    for each in presence:  # TorchScript knows only of such a line that the rest is a tensor
        _return_unless(text, each)
    _return_unless(text, *kinds)
    _return_unless(text, *dict.fromkeys(values))
    text.write(node for node in captured_nodes(captured) if node in statistics)
    _return_unless(text, *statistics_conditions(text, frozen))
    text.add("return True")
    return "\n".join([f"def guard({', '.join(parameters)}) -> bool:", *text.lines]), sources


def _return_unless(text: FunctionText, *conditions: str) -> None:
    """All conditions are computed: a branch for each would take longer."""
    if conditions:
        text.add(f"if not ({' & '.join(f'({each})' for each in conditions)}):")
        text.add("    return False")


def _equals(name: str, kind: str, value: Any) -> str:
    if value is None:
        return f"{name} is None"
    known = f"{name} is not None and " if kind.startswith("Optional") else ""
    return f"{known}{name} == {FunctionText({}).value(value)}"


def _body(
    inputs: Inputs,
    captured: Captured,
    canonical: Canonical,
    exact: Sequence[fx.Node],
    returned: str,
) -> tuple[str, list[Source]]:
    """The text of the function that computes what was captured."""
    text = FunctionText(inputs.names, exact)
    text.write(canonical.module.graph.nodes)
    values = outputs_of(canonical.module)
    count = len(canonical.mutated)
    updated = {node.name: node for node in inputs.placeholders}
    for name, value in zip(canonical.mutated, values, strict=False):
        if not inputs.sources[updated[name]].path:
            raise Untranslatable("it updates an input in place")
        text.add("with torch.no_grad():")
        text.add(f"    {text.value(updated[name])}.copy_({text.value(value)})")
    spec = captured.program.call_spec.out_spec
    assert spec is not None, "a program has the structure of its results"
    old: Any = captured.program.graph.output_node().args[0]
    users = iter(values[count:])
    kept = old[len(old) - spec.num_leaves :]
    results = [next(users) if isinstance(each, fx.Node) else each for each in kept]
    text.add(f"return {text.result(results, spec)}")
    used = [node for node in inputs.placeholders if node.users or node.name in canonical.mutated]
    parameters = ", ".join(f"{inputs.names[node]}: Tensor" for node in used)
    head = f"def graph({parameters}) -> {returned}:"
    return "\n".join([head, *text.lines]), [inputs.sources[node] for node in used]


def captured_nodes(captured: Captured) -> Iterable[fx.Node]:
    """The nodes of what was captured, in order."""
    assert captured.look.canonical is not None
    return captured.look.canonical.module.graph.nodes
