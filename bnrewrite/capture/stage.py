"""The stage after: what runs a graph once it has been rewritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from bnrewrite.capture.autocast import DEVICES, autocast_off
from bnrewrite.capture.bindings import call_by_bindings
from bnrewrite.options import Stage

Run = Callable[..., Any]


def resolve(backend: str, example_inputs: Sequence[Any]) -> str:
    """The backend that "auto" stands for: Inductor on a GPU, eager on a CPU."""
    if backend != "auto":
        return backend
    devices = {each.device.type for each in example_inputs if isinstance(each, torch.Tensor)}
    return "inductor" if devices - {"cpu", "meta"} else "eager"


def stage_of(backend: str) -> Stage:
    """What the passes need to know of a backend: does it fuse, does it take any function."""
    stages: dict[str, Stage] = {"eager": "eager", "inductor": "inductor"}
    return stages.get(backend, "export")


def run_by(
    backend: str, module: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None = None
) -> Run:
    """Compile a graph by the stage after.

    Args:
        module: the graph.
        example_inputs: of the graph.
        backend: "eager", "inductor", or a name that `torch.compiler.list_backends` knows.
        mode: Inductor's, as in `torch.compile`.
    """
    if backend == "eager":
        for each in module.modules():  # the graphs that it checkpoints too
            if isinstance(each, fx.GraphModule):
                call_by_bindings(each)
        return module.forward
    if backend == "inductor":
        from torch._inductor.compile_fx import compile_fx

        for node in module.graph.find_nodes(op="placeholder"):
            node.meta.pop("val", None)  # Inductor's C++ wrapper takes it for an exported graph's
        patches = torch._inductor.list_mode_options(mode) if mode not in (None, "default") else None
        compile_graph: Any = partial(compile_fx, config_patches=patches)
    else:
        compile_graph = torch._dynamo.lookup_backend(backend)
    run: Run = compile_graph(module, list(example_inputs))
    return run


def without_autocast(compile_graph: Callable[[], Run]) -> Run:
    """Compile and run a graph whose casts are nodes, with autocast switched off."""
    if not any(torch.is_autocast_enabled(device) for device in DEVICES):
        return compile_graph()
    with autocast_off():
        run = compile_graph()

    def explicit(*args: Any) -> Any:
        with autocast_off():
            return run(*args)

    return explicit
