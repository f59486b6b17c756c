"""The Dynamo backend: a graph of the user's is captured, rewritten and handed on.

Dynamo graph -> canonical graph -> passes -> updates written back -> the stage after. Where any step
fails, or nothing was rewritten, the user's own graph goes to that same stage.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis
from torch.nn.parallel import DistributedDataParallel

from bnrewrite.capture.aliases import outputs_of, returned_inputs
from bnrewrite.capture.assembly import assemble
from bnrewrite.capture.checkpointing import restore_checkpoints
from bnrewrite.capture.inplace import restore_updates_in_place
from bnrewrite.capture.look import Look, examine
from bnrewrite.capture.numbering import Numbering, counted_on, is_numbered, numbered_on
from bnrewrite.capture.provenance import source_line
from bnrewrite.capture.rebinding import Rebinding
from bnrewrite.capture.recomputed import may_be_recomputed, unless_recomputed, users_graph
from bnrewrite.capture.refusal import sentence
from bnrewrite.capture.samples import marks_results
from bnrewrite.capture.scalars import has_captured_scalars
from bnrewrite.capture.stage import Run, resolve, run_by, stage_of, without_autocast
from bnrewrite.capture.switches import checked_options
from bnrewrite.capture.writeback import Around, Update, write_back
from bnrewrite.options import BnrewriteWarning, Options
from bnrewrite.report.site import LEFT, Kept

_UPDATED_TWICE = (
    "the buffers in it are updated again when it is run for the backward, which a compiler would "
    "not do: this graph runs in eager mode"
)
_KEYS = count()  # of graphs whose sites are numbered


class CapturedScalar(Exception):
    """A graph fails that might not, were it broken where a number is read out of a tensor."""


@dataclass
class Compiler:
    """Compiles the graphs of one model.

    Attributes:
        backend: the stage after; "auto" is Inductor on a GPU and eager on a CPU.
        options: what the passes may do; `stage` is filled in for each graph.
        mode: Inductor's mode.
        observe: called with what was found in each graph.
        warned: whether a warning has been given for this model.
        warned_of_replicas: likewise, of what DataParallel does with statistics.
        numbering: of the sites in a call; without a `begin`, as under `torch.compile`, each graph
            counts from 0.
        scalars_are_inputs: whether numbers read out of tensors were captured, where a graph break
            would do as well.
    """

    backend: str = "auto"
    options: Options = field(default_factory=Options)
    mode: str | None = None
    observe: Callable[[Look], None] | None = None
    warned: bool = False
    warned_of_replicas: bool = False
    scalars_are_inputs: bool = False
    numbering: Numbering = field(default_factory=Numbering)

    @property
    def runs_eagerly(self) -> bool:
        """Whether every graph is known to run in eager mode."""
        return self.backend == "eager" or (
            self.backend == "auto" and not torch.accelerator.is_available()
        )

    def __call__(self, users: fx.GraphModule, example_inputs: Sequence[Any]) -> Run:
        """Compile one Dynamo graph, as Dynamo asks its backends to."""
        look, backend = self.look_at(users, example_inputs)
        if self.observe is not None:
            self.observe(look)
        own = users_graph(look) if may_be_recomputed(look) else None
        run = self._compiled(look, backend, example_inputs)
        if self.options.sync_stats is not None:
            self._warn_of_statistics(look)
            run = marks_results(users, run)
        if own is not None:
            nothing = Around((), ())
            run = unless_recomputed(run, lambda: self._run("eager", own, nothing, example_inputs))
        if not is_numbered(self.options):
            return run
        key, sites = next(_KEYS), len(look.sites)

        def counted(*args: Any) -> Any:
            self.numbering.ran(key, sites)
            return run(*args)

        return counted

    def look_at(self, users: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[Look, str]:
        """What is found in a Dynamo graph, and the stage after that it is rewritten for."""
        backend = resolve(self.backend, example_inputs)
        before = self.numbering.count
        options = counted_on(replace(self.options, stage=stage_of(backend)), before)
        look = examine(users, example_inputs, options)
        twice = [body for body in look.bodies if body.updated]
        if backend != "eager" and twice:
            backend = "eager"
            look = examine(users, example_inputs, replace(options, stage="eager"))
            kept = (Kept("checkpoint", _UPDATED_TWICE, source_line(each.node)) for each in twice)
            look = replace(look, kept=(*look.kept, *kept))
        sites = tuple(numbered_on(look.sites, self.options, before))
        return replace(look, sites=sites), backend

    def _compiled(self, look: Look, backend: str, example_inputs: Sequence[Any]) -> Run:
        later = backend != "eager"
        if look.failure is not None:
            if self.scalars_are_inputs and has_captured_scalars(look.graph):
                raise CapturedScalar(look.failure)
            self.warn(look.failure)
        if look.is_changed:
            try:
                graph, around = rewritten_graph(look, later)
                if look.canonical is None:  # the casts of its parts are nodes, the rest is under it
                    return self._run(backend, graph, around, example_inputs)
                return without_autocast(lambda: self._run(backend, graph, around, example_inputs))
            except RestartAnalysis:
                raise  # how Inductor asks Dynamo for another graph
            except Exception as error:
                self.warn(f"{backend} does not take the rewritten graph: {sentence(error)}")
        return self._run(backend, *repaired_graph(look, later), example_inputs)

    def _run(
        self, backend: str, graph: fx.GraphModule, around: Around, example_inputs: Sequence[Any]
    ) -> Run:
        if backend == "eager":
            restore_checkpoints(graph)
        active: Any = DistributedDataParallel._get_active_ddp_module
        if active() is not None:
            around.fill(graph)
        return around.wrap(run_by(backend, graph, example_inputs, self.mode))

    def warn(self, reason: str) -> None:
        """Say once per model why its code runs as it was written."""
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"a part of the model runs as it was written, not rewritten: {reason}",
                BnrewriteWarning,
                stacklevel=2,
            )

    def _warn_of_statistics(self, look: Look) -> None:
        """Say which statistics are not synchronised, though that was asked for."""
        from bnrewrite.passes.synchronise import ELSEWHERE, UNSYNCHRONISED  # these import capture

        for site in look.sites:
            reason = str(site.reason)
            text = ELSEWHERE if ELSEWHERE in site.notes else None
            if site.status == LEFT and reason.startswith(UNSYNCHRONISED):
                text = reason
            elif site.status == LEFT and 0 in site.axes:  # capture took its rewriting back
                text = f"{UNSYNCHRONISED}: {reason}"
            if text is not None:
                warnings.warn(f"{site.source}: {text}", BnrewriteWarning, stacklevel=2)

    def warn_of_replicas(self, replica: Any) -> None:
        """Say once per model what DataParallel does with the statistics of a training model."""
        if self.warned_of_replicas or not replica.training:
            return
        if next(replica.buffers(), None) is not None:
            self.warned_of_replicas = True
            warnings.warn(
                "DataParallel keeps the running statistics of its first replica and discards those "
                "of the others, as it does for torch's own norms; DistributedDataParallel with "
                "optimize(model, sync_stats=True) takes statistics of all samples",
                BnrewriteWarning,
                stacklevel=3,
            )


def bnrewrite(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Run:
    """The backend of `torch.compile(model, backend="bnrewrite", options={"backend": "eager"})`.

    Args:
        graph: the user's, from Dynamo.
        example_inputs: of the graph, from Dynamo.
        options: "backend" (the stage after, Inductor by default) and the switches of `optimize`.
        mode: Inductor's mode.
    """
    switches = dict(options or {})
    backend = switches.pop("backend", "inductor")
    if switches.get("sync_stats"):
        raise ValueError("sync_stats is an option of optimize(model), which sees the batch's size")
    return Compiler(backend, checked_options(**switches), mode)(graph, example_inputs)


def rewritten_graph(look: Look, differentiated_later: bool) -> tuple[fx.GraphModule, Around]:
    """The canonical graph of a look, changed in place to the form in which Dynamo calls it."""
    if look.parts or look.bodies:
        graph, around, written = assemble(look, differentiated_later, rewritten_graph)
        left = [each for each in look.rebindings if each.output not in written]
        return (
            (graph, around) if around.inputs else repaired(graph, look, left, differentiated_later)
        )
    canonical, names, recurrent = look.canonical, look.canonical_names, look.recurrent
    assert canonical is not None
    rebound = {each.output: each.placeholder for each in look.rebindings}
    kept = {names[each] for each in rebound.values() if each in recurrent}
    updates = [
        Update(name, i, history=name in {names[each] for each in recurrent})
        for i, name in enumerate(canonical.mutated)
        if name not in kept
    ]
    returned = {i: names[each] for i, each in returned_inputs(look.graph).items()}
    users = iter(range(len(canonical.mutated), len(outputs_of(canonical.module))))
    outputs: list[int | str] = []
    for i in range(len(outputs_of(look.graph))):
        if i in rebound:
            name = names[rebound[i]]
            outputs.append(canonical.mutated.index(name) if name in kept else name)
        else:
            position = next(users)
            is_buffer = returned.get(i) in canonical.mutated
            outputs.append(returned[i] if is_buffer else position)
    if not differentiated_later:
        restore_updates_in_place(canonical.module.graph, look.graph.graph)
    around = write_back(
        canonical.module, updates, outputs, canonical.grad_enabled, differentiated_later
    )
    return canonical.module, around


def repaired_graph(look: Look, differentiated_later: bool) -> tuple[fx.GraphModule, Around]:
    """The user's graph, with buffers updated in place where they were rebound."""
    return repaired(look.graph, look, look.rebindings, differentiated_later)


def repaired(
    graph: fx.GraphModule, look: Look, rebindings: Sequence[Rebinding], differentiated_later: bool
) -> tuple[fx.GraphModule, Around]:
    """A graph with the outputs of the user's, with these buffers updated in place."""
    recurrent = look.recurrent
    mended = [each for each in rebindings if each.placeholder not in recurrent]
    if not mended:
        return graph, Around((), ())
    names = {each.output: each.placeholder for each in mended}
    outputs = [names.get(i, i) for i in range(len(outputs_of(graph)))]
    updates = [Update(each.placeholder, each.output) for each in mended]
    enabled = torch.is_grad_enabled()
    return graph, write_back(graph, updates, outputs, enabled, differentiated_later)
