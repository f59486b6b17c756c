"""Decides what each site becomes: the last decision; everything before is device independent.

Before:  decisions with a match.
After:   each has a lowering or a refusal.
Leaves alone: the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from bnrewrite.algebra import Match, centre
from bnrewrite.algebra.axes import product
from bnrewrite.algebra.calls import shape_of
from bnrewrite.kernels import why_no_kernels, why_no_triton

from .across import of_smallest_groups
from .cost_table import ORDER
from .costs import choice, has_fast_norm, may_generate
from .frozen import has_small_means
from .native import has_native
from .rewriting import Decision, Refusal, Rewriting
from .synchronise import UNSYNCHRONISED, batch_symbols, group_of, is_of_batch, why_not

TRAILING = ("layer_norm", "group_norm", "instance_norm", "weight_standardization")
FEWEST = 4  # elements of a group of which the operator's gradient is as good as the user's


@dataclass(frozen=True)
class Plan:
    """The lowering that was measured to be the fastest in the stage; else a fixed one."""

    name: str = "plan"

    def run(self, rewriting: Rewriting) -> None:
        """Fill in lowerings and refusals."""
        if not rewriting.decisions:
            return
        reading, grouped = rewriting.reading, group_of(rewriting) is not None
        assert reading is not None
        batch = batch_symbols(rewriting)
        for number, decision in enumerate(rewriting.decisions):
            shared = grouped and is_of_batch(reading, decision.match, batch)
            if decision.refusal is not None:
                if shared:
                    text = f"{UNSYNCHRONISED}: {decision.refusal.reason}"
                    decision.refusal = Refusal(text, decision.match.node)
                continue
            reason = _switched_off(rewriting, decision, number)
            if shared:
                reason = f"{UNSYNCHRONISED}: {reason}" if reason else None
                reason = reason or why_not(reading, decision.match, batch)
                decision.lowering = decision.otherwise = "synchronised"
            if reason is not None:
                decision.refusal = Refusal(reason, decision.match.node)
            elif decision.lowering is None:
                decision.lowering = decision.otherwise = _lowering(rewriting, decision)
                finer = of_smallest_groups(reading, decision.whole or decision.match)
                decision.whole = finer or decision.whole
                if _wants_kernel(rewriting, finer or decision.match):
                    cuda = decision.match.linear.source.meta["val"].device.type == "cuda"
                    reason = why_no_triton() if cuda else why_no_kernels()
                    if reason is None:
                        decision.lowering = "generated"
                    else:
                        decision.notes.append(f"no kernel is compiled for it: {reason}")


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
    if options.kernels == "native" and _loses_digits(rewriting, decision.match):
        return f'kernels="native" leaves {_one(kind)} of which PyTorch\'s operator may lose digits'
    if options.strict and decision.notes:
        return f"strict=True leaves a site whose replacement is {decision.notes[0]}"
    return None


def _one(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aei" else f"a {kind}"


def _lowering(rewriting: Rewriting, decision: Decision) -> str:
    options, reading, found = rewriting.options, rewriting.reading, decision.match
    assert reading is not None
    native = has_native(reading, found) and options.kernels != "composite"
    if _loses_digits(rewriting, found):
        native = False
    if options.kernels == "auto" and options.stage == "inductor":
        native = False  # Inductor fuses moments and a multiply-add; it takes native norms apart
    # the table is of the eager stage: what it says of a call is not so where calls are fused
    if options.kernels == "auto" and options.stage == "eager":
        measured = choice(reading, found, native=native, kernel=False)
        if measured is not None:
            return measured
    if options.kernels == "auto" and found.kind == "rms_norm":
        eager = options.stage == "eager"  # rms_norm is no operation of its own on a CPU
        native = native and not has_fast_norm(reading, found, eager=eager)
        if options.stage == "script":
            native = native and found.linear.source.meta["val"].device.type != "cpu"  # 1.2 to 1.5
    return "native" if native else "composite"


def _wants_kernel(rewriting: Rewriting, found: Match) -> bool:
    options = rewriting.options
    if options.stage not in ORDER or options.kernels not in ("auto", "generated"):
        return False
    if not may_generate(found):
        return False
    if options.kernels == "generated":
        return True
    assert rewriting.reading is not None
    native, stage = has_native(rewriting.reading, found), options.stage
    sizes = shape_of(found.linear.source)
    if stage == "inductor" and not all(isinstance(size, int) for size in sizes):
        return False  # it may save a tensor with a stride of one batch, and then meet another
    taken = choice(rewriting.reading, found, native=native, kernel=True, stage=stage)
    return taken == "generated"


def _loses_digits(rewriting: Rewriting, found: Match) -> bool:
    """Whether the operator computes ``x a + b`` where the user's code centres first.

    The backward of layer and group norms does: ``dx = dy a + x b + c``, and of two elements far
    from zero, next to each other, no digit may be left.

    Which of the two keeps the digits is decided by a kernel of the eager stage, when it runs, or
    by the values, where they are known.
    """
    reading = rewriting.reading
    assert reading is not None
    looks = rewriting.options.stage in ("eager", "script")  # at the statistics, when the graph runs
    count = product(axis.size for axis in found.over)
    if found.kind in TRAILING and isinstance(count, int) and count < FEWEST:
        return looks
    if found.kind != "affine" or looks:
        return False
    return centre(reading, found) is not None and not has_small_means(reading, found)
