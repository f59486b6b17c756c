"""`explain`: what is found in a model and what would become of it, with nothing of it changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from bnrewrite.capture.backend import Compiler
from bnrewrite.capture.diagnosis import diagnose
from bnrewrite.capture.dynamo import compiled
from bnrewrite.capture.hook import KEY, Hook, own_call
from bnrewrite.capture.look import Look
from bnrewrite.capture.optimize import check_model, unwrapped
from bnrewrite.capture.stage import Run
from bnrewrite.doors.entry import Given, explain_given, is_given
from bnrewrite.options import Options
from bnrewrite.oracle import deep_copy
from bnrewrite.report.report import Report


def explain(model: Callable[..., Any] | Given, *args: Any, **kwargs: Any) -> Report:
    """What is found in one call of a model, in its current mode, and what becomes of it.

    A copy of the model runs on copies of the arguments: parameters, buffers, gradients and random
    generators stay as they are. A function runs itself. An optimised model is explained with its
    own options.

    An exported program, a scripted module or the file of one is explained as `optimize` takes it.

    Args:
        model: a module or a function, optimised or not; what else `optimize` takes.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        TypeError: the model is nothing of these.
        ValueError: a scripted module does not take the arguments; a file is not loaded.
    """
    if is_given(model):
        found = explain_given(model, args, Options(diagnose=True))
        if isinstance(found, Report):
            return found
        model = found
    check_model(model, "explain")
    hook = getattr(model, KEY, None)
    if isinstance(hook, Hook):
        watcher, dynamic = _Watcher(hook.backend, hook.options), hook.dynamic
    else:
        watcher, dynamic = _Watcher("auto", Options()), None
    before = len(torch._dynamo.utils.graph_break_reasons)
    given = tree_map_only(torch.Tensor, _copied, (args, kwargs))
    with _generators_kept(), _unchanged(unwrapped(model)) as subject:
        run = compiled(own_call(), watcher, dynamic)
        run(subject, *given[0], **given[1])
        breaks = torch._dynamo.utils.graph_break_reasons[before:]
        looks = [look for look in watcher.looks if look.graph.graph.find_nodes(op="output")]
        findings = diagnose(looks, subject)
    return Report(
        sites=[site for look in looks for site in look.sites],
        findings=findings,
        graphs=len(looks),
        graph_breaks=len({str(each.user_stack[-1:]) for each in breaks}),
        graph_texts=[(look.before, _text(look)) for look in looks],
        kept=list(dict.fromkeys(each for look in looks for each in look.kept)),
    )


class _Watcher(Compiler):
    """Looks at each graph and runs the user's own; Dynamo empties those that it then discards."""

    def __init__(self, backend: str, options: Options) -> None:
        super().__init__(backend, replace(options, diagnose=True))
        self.looks: list[Look] = []

    def __call__(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Run:
        look, _ = self.look_at(graph, example_inputs)
        self.numbering.ran(len(self.looks), len(look.sites))
        self.looks.append(look)
        if look.failure is not None:
            self.warn(look.failure)
        return graph.forward


def _text(look: Look) -> str:
    if look.canonical is not None:
        return str(look.canonical.module.graph)
    inner = [part.look for part in look.parts] + [body.look for body in look.bodies]
    return "\n".join(text for text in map(_text, inner) if text)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that the model may update in place."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@contextmanager
def _unchanged(model: Any) -> Iterator[Any]:
    """What may be called in a model's place; a module that cannot be copied is put back after."""
    if not isinstance(model, nn.Module):
        yield model
        return
    try:
        if any(isinstance(each, torch.jit.ScriptModule) for each in model.modules()):
            raise TypeError("a copy of a scripted module loses its methods")
        subject = deep_copy(model)
    except Exception:  # whatever a user's __deepcopy__ or an uncopyable attribute raises
        with _restored(model):
            yield model
    else:
        yield subject


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put back every attribute, registry and tensor value of a model."""
    values = {
        tensor: tensor.detach().clone()
        for module in model.modules()
        for tensor in (
            *module._parameters.values(),
            *module._buffers.values(),
            *vars(module).values(),
        )
        if isinstance(tensor, torch.Tensor)
    }
    attributes = [(module, _shallow(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, kept in attributes:
            module.__dict__.clear()
            module.__dict__.update(kept)
        with torch.no_grad():
            for tensor, value in values.items():
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    plain = (dict, list, set)
    return {
        name: copy.copy(value) if isinstance(value, plain) else value
        for name, value in attributes.items()
    }


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Leave the random generators of torch, Python and numpy as they were."""
    import numpy

    state, array_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        numpy.random.set_state(array_state)
