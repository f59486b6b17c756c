"""The Dynamo backend: a graph of the user's is captured, rewritten and handed on.

Dynamo graph -> canonical graph -> passes -> updates written back -> the stage after. Where any step
fails, or nothing was rewritten, the user's own graph goes to that same stage.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bnrewrite.capture.aliases import is_updated, outputs_of, returned_inputs
from bnrewrite.capture.canonical import Canonical, canonicalise
from bnrewrite.capture.rebinding import Rebinding, find_rebindings
from bnrewrite.capture.stage import Run, resolve, run_by, stage_of, without_autocast
from bnrewrite.capture.writeback import Update, write_back
from bnrewrite.options import BnrewriteWarning, Options

if TYPE_CHECKING:
    from bnrewrite.report import Site


@dataclass(frozen=True)
class Look:
    """What a graph was found to be; None of a canonical graph where capture failed."""

    graph: fx.GraphModule
    canonical: Canonical | None
    before: str
    sites: tuple[Site, ...]
    rebindings: tuple[Rebinding, ...]
    failure: str | None


@dataclass
class Compiler:
    """Compiles the graphs of one model.

    Attributes:
        backend: the stage after; "auto" is Inductor on a GPU and eager on a CPU.
        options: what the passes may do; `stage` is filled in for each graph.
        mode: Inductor's mode.
        observe: called with what was found in each graph.
        warned: whether a warning has been given for this model.
    """

    backend: str = "auto"
    options: Options = field(default_factory=Options)
    mode: str | None = None
    observe: Callable[[Look], None] | None = None
    warned: bool = False

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Run:
        """Compile one Dynamo graph, as Dynamo asks its backends to."""
        backend = resolve(self.backend, example_inputs)
        options = replace(self.options, stage=stage_of(backend))
        look = examine(graph_module, example_inputs, options)
        if self.observe is not None:
            self.observe(look)
        if look.failure is not None:
            self.warn(look.failure)
        elif _is_worth_running(look):
            try:
                run = run_by(backend, _rewritten(look), example_inputs, self.mode)
                return without_autocast(run)
            except torch._dynamo.exc.RestartAnalysis:
                raise
            except Exception as error:
                self.warn(f"{backend} does not take the rewritten graph: {_sentence(error)}")
        return run_by(backend, _repaired(look), example_inputs, self.mode)

    def warn(self, reason: str) -> None:
        """Say once per model why its code runs as it was written."""
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"a part of the model runs as it was written, not rewritten: {reason}",
                BnrewriteWarning,
                stacklevel=2,
            )


def bnrewrite(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Run:
    """The backend of `torch.compile(model, backend="bnrewrite", options={"backend": "eager"})`.

    Args:
        options: "backend" (the stage after, Inductor by default) and the switches of `optimize`.
        mode: Inductor's mode.
    """
    from bnrewrite.capture.switches import checked_options

    settings = dict(options or {})
    backend = settings.pop("backend", "inductor")
    compiler = Compiler(backend=backend, options=checked_options(**settings), mode=mode)
    return compiler(graph_module, example_inputs)


def examine(graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Look:
    """Capture a Dynamo graph and rewrite the captured copy; the graph itself stays as it is."""
    from bnrewrite.passes import rewrite

    rebindings = find_rebindings(graph_module)
    before = ""
    try:
        canonical = canonicalise(graph_module, example_inputs, rebindings)
        before = str(canonical.module.graph)
        sites = tuple(rewrite(canonical, options))
    except Exception as error:
        return Look(graph_module, None, before, (), rebindings, _sentence(error))
    return Look(graph_module, canonical, before, sites, rebindings, None)


def _is_worth_running(look: Look) -> bool:
    """Whether the canonical graph does what the user's own does not do as well."""
    if any(site.status == "rewritten" for site in look.sites):
        return True
    return bool(_leaking(look) & _statistics(look))


def _rewritten(look: Look) -> fx.GraphModule:
    """The canonical graph, in the form in which Dynamo calls it."""
    canonical = look.canonical
    assert canonical is not None
    names = _canonical_names(look)
    kept = _kept_rebindings(look)
    updates = []
    for i, name in enumerate(canonical.mutated):
        history = name in {names[leak] for leak in _leaking(look) - _statistics(look)}
        if name not in {names[rebinding.placeholder] for rebinding in kept}:
            updates.append(Update(name, i, history))
    outputs: list[int | str] = []
    rebound = {rebinding.output: rebinding for rebinding in look.rebindings}
    returned = returned_inputs(look.graph)
    users = iter(range(len(canonical.mutated), len(outputs_of(canonical.module))))
    for i in range(len(outputs_of(look.graph))):
        if i not in rebound:
            position = next(users)
            name = names.get(returned.get(i, ""), "")
            outputs.append(name if name in canonical.mutated else position)
        elif rebound[i] in kept:
            outputs.append(canonical.mutated.index(names[rebound[i].placeholder]))
        else:
            outputs.append(names[rebound[i].placeholder])
    write_back(canonical.module, updates, outputs, canonical.grad_enabled)
    return canonical.module


def _repaired(look: Look) -> fx.GraphModule:
    """The user's graph, with buffers updated in place where they were rebound."""
    kept = _kept_rebindings(look)
    repaired = [rebinding for rebinding in look.rebindings if rebinding not in kept]
    if not repaired:
        return look.graph
    names = {rebinding.output: rebinding.placeholder for rebinding in repaired}
    outputs = [names.get(i, i) for i in range(len(outputs_of(look.graph)))]
    updates = [Update(rebinding.placeholder, rebinding.output) for rebinding in repaired]
    write_back(look.graph, updates, outputs, torch.is_grad_enabled())
    return look.graph


def _kept_rebindings(look: Look) -> tuple[Rebinding, ...]:
    """Rebindings whose history may be wanted: not known to be a statistic (a recurrent state)."""
    statistics = _statistics(look)
    return tuple(
        rebinding
        for rebinding in look.rebindings
        if rebinding.history and rebinding.placeholder not in statistics
    )


def _leaking(look: Look) -> set[str]:
    """Inputs of the user's graph whose new value carries autograd history."""
    updated = {
        node.name
        for node in look.graph.graph.nodes
        if node.op == "placeholder"
        and is_updated(node.meta.get("example_value"))
        and node.meta["example_value"].requires_grad
    }
    return updated | {rebinding.placeholder for rebinding in look.rebindings if rebinding.history}


def _statistics(look: Look) -> set[str]:
    """Inputs of the user's graph that a norm was proved to keep its running statistics in."""
    if look.canonical is None:
        return set()
    paths = {path for site in look.sites for path in site.state}
    proved = {each.name for each in look.canonical.inputs if each.path in paths}
    return {old for old, new in _canonical_names(look).items() if new in proved}


def _canonical_names(look: Look) -> dict[str, str]:
    """The canonical placeholder of each placeholder of the user's graph."""
    assert look.canonical is not None
    old = [node.name for node in look.graph.graph.nodes if node.op == "placeholder"]
    return dict(zip(old, (each.name for each in look.canonical.inputs), strict=True))


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
