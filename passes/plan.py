"""Decides what each site becomes: the last decision; everything before is device independent.

Before:  decisions with a match.
After:   each has a lowering or a refusal.
Leaves alone: the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from bnrewrite.algebra import centre
from bnrewrite.algebra.calls import shape_of

from .costs import has_fast_norm
from .native import has_native
from .rewriting import Decision, Refusal, Rewriting


@dataclass(frozen=True)
class Plan:
    """Native where PyTorch has the op and needs no copy for it, else moments and a multiply-add."""

    name: str = "plan"

    def run(self, rewriting: Rewriting) -> None:
        """Fill in lowerings and refusals."""
        for number, decision in enumerate(rewriting.decisions):
            if decision.refusal is not None:
                continue
            reason = _switched_off(rewriting, decision, number)
            if reason is not None:
                decision.refusal = Refusal(reason, decision.match.node)
            else:
                decision.lowering = _lowering(rewriting, decision)


def _switched_off(rewriting: Rewriting, decision: Decision, number: int) -> str | None:
    options = rewriting.options
    kind = decision.match.kind
    if kind in options.disable:
        return f"{kind} is switched off by disable={sorted(options.disable)}"
    if options.only is not None and kind not in options.only and number not in options.only:
        return f"site {number} ({kind}) is not in only={sorted(map(str, options.only))}"
    if 0 in shape_of(decision.match.linear.source):
        return "the tensor is empty"
    assert rewriting.reading is not None
    if options.kernels == "native" and not has_native(rewriting.reading, decision.match):
        return f'kernels="native" leaves a {kind} that PyTorch has no operator for'
    if options.strict and decision.notes:
        return f"strict=True leaves a site whose replacement is {decision.notes[0]}"
    return None


def _lowering(rewriting: Rewriting, decision: Decision) -> str:
    options, reading, found = rewriting.options, rewriting.reading, decision.match
    assert reading is not None
    native = has_native(reading, found) and options.kernels != "composite"
    looks = options.stage in ("eager", "script")  # at the statistics, when the graph is run
    if found.kind == "affine" and not looks and centre(reading, found) is not None:
        native = False  # which pass keeps the digits is decided by these two stages alone
    if options.kernels == "auto" and options.stage == "inductor":
        native = False  # Inductor fuses moments and a multiply-add; it takes native norms apart
    if options.kernels == "auto" and found.kind == "rms_norm" and has_fast_norm(reading, found):
        native = False  # it is no operation of its own on a CPU
    if options.kernels == "auto" and found.kind == "rms_norm" and options.stage == "script":
        native = native and found.linear.source.meta["val"].device.type != "cpu"  # 1.2 to 1.5 times
    return "native" if native else "composite"
