"""One model, run step by step on given inputs, and everything that a user could see of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_any,
    tree_flatten_with_path,
    tree_map,
    tree_unflatten,
)

from .oracle import deep_copy, widened, widened_module

COMPILED_PREFIX = "_orig_mod."  # torch.compile(model) puts this before every name


@dataclass(frozen=True)
class Batch:
    """The arguments of one call: leaves by name, and the structure to put them back into."""

    leaves: dict[str, Any]
    structure: TreeSpec


@dataclass
class Observation:
    """What one step showed; values are copies without history, by name.

    Attributes:
        outputs: tensors of the result.
        plain: leaves of the result that are no tensors.
        structure: of the result.
        gradients: of inputs and parameters; None where nothing arrived.
        state: buffers, and tensors that are attributes.
        written: inputs and parameters as they are after the step.
        differentiable: names of the outputs that require a gradient.
        history: names of the state that carries autograd history.
        rebound: names of the state that is another object than before the step.
        copied: whether a copy of a module ran, which has state to look at.
        cotangents: that the backward began with, by name of the output.
        raised: the exception that ended the step.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    structure: TreeSpec | None = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)
    differentiable: set[str] = field(default_factory=set)
    history: set[str] = field(default_factory=set)
    rebound: set[str] = field(default_factory=set)
    copied: bool = True
    cotangents: dict[str, Tensor] = field(default_factory=dict)
    raised: Exception | None = None


def first_batch(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Batch:
    """The arguments as given."""
    paths, structure = tree_flatten_with_path((tuple(args), dict(kwargs)))
    return Batch({f"input{keystr(path[1:])}": leaf for path, leaf in paths}, structure)


def further_batch(batch: Batch, generator: torch.Generator) -> Batch:
    """Fresh floating inputs: each value times a random factor between 1/2 and 1.

    Signs, zeros, NaN, inf and a range around zero survive: the code stays in its domain.
    """

    def fresh(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        factor = 0.5 + 0.5 * torch.rand(leaf.shape, generator=generator, dtype=torch.float32)
        return leaf.detach() * factor.to(leaf.device, leaf.real.dtype)

    return Batch({name: fresh(leaf) for name, leaf in batch.leaves.items()}, batch.structure)


def cotangents_of(outputs: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """A random cotangent for each floating output, in its shape and dtype.

    Random, because under ``y.sum()`` the input gradient of a norm is zero whatever the code does.
    """

    def drawn(output: Tensor) -> Tensor:
        wide = torch.complex128 if output.is_complex() else torch.float64
        cotangent = torch.randn(output.shape, generator=generator, dtype=wide)
        return cotangent.to(output.device, output.dtype)

    return {
        name: drawn(output)
        for name, output in outputs.items()
        if output.is_floating_point() or output.is_complex()
    }


class Trial:
    """Runs a copy of a model; buffers are carried from step to step, weights are not trained.

    What the user's code leaks into its state (autograd history) is cut after each step, as an
    author must before the second backward.

    Args:
        call: a module, of which a copy runs, or a function, which runs itself.
        wide: run a float64 copy on float64 inputs.
        modes: make the contexts around every step, forward and backward.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        *,
        wide: bool = False,
        modes: Sequence[Callable[[], Any]] = (),
    ):
        self.wide = wide
        self.modes = modes
        self.module: nn.Module | None = None
        if isinstance(call, nn.Module):
            call = self.module = widened_module(call) if wide else deep_copy(call)
        self.call = call

    def step(self, batch: Batch, cotangents: Mapping[str, Tensor] | None, seed: int) -> Observation:
        """Forward, backward, and a look at everything.

        Args:
            batch: the inputs as the user's code gets them.
            cotangents: by name of the output; without any they are drawn from the seed.
            seed: of the model's own random numbers, the same for every model.

        Returns:
            What was seen; ``raised`` where the code raised, then with what was seen until then.
        """
        seen = Observation(copied=self.module is not None)
        leaves = self._leaves(batch)
        # clones: the code may write to its inputs, which leaves do not allow
        passed = {n: x.clone() if isinstance(x, Tensor) else x for n, x in leaves.items()}
        args, kwargs = tree_unflatten(list(passed.values()), batch.structure)
        before = {name: id(value) for name, value in self._state()}
        for parameter in self._parameters().values():
            parameter.grad = None
        with ExitStack() as stack:
            stack.enter_context(own_randomness(seed))
            for mode in self.modes:
                stack.enter_context(mode())
            try:
                result = self.call(*args, **kwargs)
                live = self._look_at_result(result, seen)
                source = torch.Generator().manual_seed(seed)
                seen.cotangents = dict(cotangents or cotangents_of(seen.outputs, source))
                self._backward(live, seen.cotangents)
            except Exception as error:  # compared with what the other model raises, and shown
                seen.raised = error
                return seen
        for name, leaf in leaves.items():
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                seen.gradients[f"gradient of {name}"] = _copied(leaf.grad)
        for name, parameter in self._parameters().items():
            if parameter.requires_grad:
                seen.gradients[f"gradient of {name}"] = _copied(parameter.grad)
        for name, value in self._state():
            seen.state[name] = value.detach().clone()
            if value.requires_grad:
                seen.history.add(name)
            if id(value) != before.get(name):
                seen.rebound.add(name)
        self._look_at_written(passed, seen)
        if self.module is not None and seen.history:
            cut_history(self.module)
        return seen

    def _leaves(self, batch: Batch) -> dict[str, Any]:
        """Leaf copies of the inputs that collect gradients; a tensor given twice is one leaf."""
        known: dict[int, Tensor] = {}

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in known:
                copied = value.detach().clone()
                copied = widened(copied) if self.wide else copied
                if (copied.is_floating_point() or copied.is_complex()) and torch.is_grad_enabled():
                    copied.requires_grad_()
                known[id(value)] = copied
            return known[id(value)]

        return {name: leaf(value) for name, value in batch.leaves.items()}

    def _look_at_result(self, result: Any, seen: Observation) -> dict[str, Tensor]:
        paths, seen.structure = tree_flatten_with_path(result)
        live: dict[str, Tensor] = {}
        for path, leaf in paths:
            name = f"output{keystr(path)}"
            if not isinstance(leaf, Tensor):
                seen.plain[name] = leaf
                continue
            seen.outputs[name] = leaf.detach().clone()
            if leaf.requires_grad:
                seen.differentiable.add(name)
                live[name] = leaf
        return live

    def _backward(self, live: Mapping[str, Tensor], cotangents: Mapping[str, Tensor]) -> None:
        """Backward in this thread: a mode holds in the thread that entered it only."""
        pairs = [
            (output, cotangents[name].to(output.dtype))
            for name, output in live.items()
            if name in cotangents and cotangents[name].shape == output.shape
        ]
        if pairs:
            outputs, gradients = zip(*pairs, strict=True)
            with torch.autograd.set_multithreading_enabled(False):
                torch.autograd.backward(outputs, gradients)

    def _look_at_written(self, passed: Mapping[str, Any], seen: Observation) -> None:
        for name, value in passed.items():
            if isinstance(value, Tensor):
                seen.written[f"{name} afterwards"] = value.detach()
        for name, parameter in self._parameters().items():
            seen.written[f"{name} afterwards"] = parameter.detach()

    def _parameters(self) -> dict[str, nn.Parameter]:
        if self.module is None:
            return {}
        return {plain_name(name): each for name, each in self.module.named_parameters()}

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        if self.module is None:
            return
        for name, buffer in self.module.named_buffers():
            yield f"buffer {plain_name(name)}", buffer
        for path, module in self.module.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    yield f"attribute {plain_name(f'{path}.{name}'.lstrip('.'))}", value


def plain_name(name: str) -> str:
    """A qualified name without what ``torch.compile(model)`` puts before it."""
    return name.replace(COMPILED_PREFIX, "")


def cut_history(module: nn.Module) -> None:
    """Detaches the buffers and attributes of all submodules; containers of tensors too."""
    for each in module.modules():
        for place in (each._buffers, vars(each)):
            for name, value in list(place.items()):
                if name in ("_parameters", "_buffers", "_modules"):
                    continue
                leaves = isinstance(value, Tensor) or type(value) in (list, tuple, dict)
                if leaves and tree_any(_has_history, value):
                    place[name] = tree_map(_without_history, value)


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Inside, torch's and Python's random numbers start at a seed; afterwards nothing was drawn."""
    before = random.getstate()
    devices = range(torch.cuda.device_count()) if _cuda_in_use() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(before)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _has_history(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _without_history(value: Any) -> Any:
    return value.detach() if _has_history(value) else value
