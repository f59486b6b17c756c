"""Compile a function with Dynamo so that nothing of the user's is lost where Dynamo fails.

`torch.compile` raises where Dynamo or a backend fails. Here the frame at hand runs as the user
wrote it, once, with one warning; what ran before a graph break does not run again. An error of the
user's own code comes out of the user's own code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchRuntimeError
from torch._dynamo.types import ConvertFrameReturn

from bnrewrite.capture.backend import Compiler
from bnrewrite.capture.samples import mark_samples, sizes_without_meaning
from bnrewrite.errors import with_its_name

_EAGERLY = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
_AS_BEFORE = _FrameExecStrategy(_FrameAction.RUN_ONLY, _FrameAction.RUN_ONLY)  # or eagerly
PATIENCE = 3  # failures on the user's operations before a function is no longer tried


def compiled(function: Callable[..., Any], compiler: Compiler, dynamic: bool | None) -> Any:
    """`function` under Dynamo with `compiler` as its backend."""
    context: Any = torch._dynamo.optimize(compiler, dynamic=dynamic)
    if hasattr(context, "callback"):  # Dynamo is not switched off
        context.callback = Tolerant(context.callback, compiler)
    return context(function)


class Tolerant:
    """Dynamo's frame converter, with failures turned into frames that are not converted.

    Scalars that are read out of tensors (`float(self.num_batches_tracked)`) become graph inputs
    instead of graph breaks; should Dynamo fail on that, they break the graph as usual.
    """

    def __init__(self, convert: Any, compiler: Compiler) -> None:
        functools.update_wrapper(self, convert, updated=())
        self._convert = convert
        self._torchdynamo_orig_backend = convert  # how Dynamo finds the backend behind a callback
        self._compiler = compiler
        self._failures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_convert"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> ConvertFrameReturn:
        if self._compiler.options.sync_stats is not None:
            return self._synchronised(args, kwargs)
        return self._tried(args, kwargs)

    def _synchronised(self, args: Any, kwargs: Any) -> ConvertFrameReturn:
        """Convert a frame to the graph that other processes have; say where Dynamo takes no more.

        The user's code as it is calls no collective, and others may wait for it.
        """
        config: Any = torch._dynamo.config
        is_wanted = config.fail_on_recompile_limit_hit
        with sizes_without_meaning(), config.patch(fail_on_recompile_limit_hit=True):
            mark_samples(args[0])
            try:
                return self._tried(args, kwargs)
            except FailOnRecompileLimitHit:
                if is_wanted:
                    raise
        self._compiler.warn(
            "its statistics are those of this process from here on, because Dynamo compiles it no "
            f"more than torch._dynamo.config.recompile_limit, {config.recompile_limit} times"
        )
        return ConvertFrameReturn(frame_exec_strategy=_AS_BEFORE)

    def _tried(self, args: Any, kwargs: Any) -> ConvertFrameReturn:
        try:
            return self._converted(args, kwargs, scalars_are_inputs=True)
        except Exception as first:
            if _is_wanted(first):
                raise
        try:
            return self._converted(args, kwargs, scalars_are_inputs=False)
        except Exception as error:
            if _is_wanted(error):
                raise
            return self._leave(error)

    def _converted(self, args: Any, kwargs: Any, scalars_are_inputs: bool) -> ConvertFrameReturn:
        """Convert a frame; `nn` hooks that are added or removed later are noticed.

        Dynamo cuts graphs under DDP where a bucket of gradients ends, which may be inside a norm. A
        graph that runs in eager mode gives its gradients one by one, and stays whole.
        """
        self._compiler.scalars_are_inputs = scalars_are_inputs
        with torch._dynamo.config.patch(
            capture_scalar_outputs=scalars_are_inputs,
            skip_nnmodule_hook_guards=False,
            optimize_ddp=torch._dynamo.config.optimize_ddp and not self._compiler.runs_eagerly,
        ):
            converted: ConvertFrameReturn = self._convert(*args, **kwargs)
        return converted

    def _leave(self, error: Exception) -> ConvertFrameReturn:
        """Run the frame as it is: for good where Dynamo fails, once where the user's code does."""
        self._failures += 1
        passing = isinstance(error, TorchRuntimeError)
        if not passing or self._failures >= PATIENCE:
            self._compiler.warn(f"Dynamo fails on it: {with_its_name(error)}")
            return ConvertFrameReturn()
        return ConvertFrameReturn(frame_exec_strategy=_EAGERLY, apply_to_code=False)


def _is_wanted(error: Exception) -> bool:
    """Errors by which Dynamo steers itself, and those that the user has asked for."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ResumePrologueTracingError", "FailOnRecompileLimitHit", "RecompileError"})
