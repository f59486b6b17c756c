"""Two ways to run the user's own code that show its rounding errors.

``Widen`` runs it in float64 whatever dtypes it names: the exact result. ``Jitter`` runs it in its
own dtypes and moves every intermediate value by one unit in the last place or not at all: how far
the result then moves is what the code leaves to luck.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_leaves, tree_map

WIDER: dict[torch.dtype, torch.dtype] = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}

# Results without a rounding of their own (or, _to_copy, with one that is no matter of luck).
EXACT = """
    abs alias amax amin argmax argmin cat clamp clamp_max clamp_min clone constant_pad_nd copy
    detach embedding empty_like fill flip full_like gather index index_put index_select lift_fresh
    masked_fill masked_scatter max max_pool2d_with_indices maximum min minimum neg new_empty
    new_full new_ones new_zeros ones_like relu repeat _reshape_copy roll scatter select_backward
    select_scatter sign slice_backward slice_scatter sort stack threshold_backward _to_copy topk
    tril triu where zero zeros_like
"""
EXACT_NAMES = frozenset(EXACT.split())


def widened_module(module: nn.Module) -> nn.Module:
    """A deep copy of a module in float64: parameters, buffers, and tensors that are attributes.

    Tied parameters and shared buffers stay so.
    """
    wide = deep_copy(module)
    known: dict[int, tuple[Tensor, Tensor]] = {}  # keeps the key alive: ids are used again

    def widen(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = (tensor, widened(tensor))
        return known[id(tensor)][1]

    wide._apply(widen)  # type: ignore[no-untyped-call]
    for each in wide.modules():
        for name, value in vars(each).items():
            if isinstance(value, Tensor):
                vars(each)[name] = widen(value)
    return wide


def deep_copy(module: nn.Module) -> nn.Module:
    """``copy.deepcopy``, also where a buffer carries autograd history, which it refuses.

    The copy of such a buffer carries none.
    """
    memo: dict[int, Any] = {}
    for each in module.modules():
        for value in (*vars(each).values(), *each._buffers.values()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(module, memo)
    for each in copied.modules():
        if isinstance(each, torch.jit.ScriptModule):
            _cut_parameters(each)
    return copied


def _cut_parameters(module: torch.jit.ScriptModule) -> None:
    """A copied scripted module has parameters with a history: clones of those that it was from."""
    parameters: Any = torch._C.ParameterDict(module._c)
    for name, value in list(parameters.items()):
        if not value.is_leaf:
            leaf = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
            module._c.setattr(name, leaf)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float64 (complex128); integers and booleans as they are."""
    return tensor.to(WIDER.get(tensor.dtype, tensor.dtype))


class Widen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operator in float64.

    A dtype that the code asks for is widened, so ``.float()`` does not narrow; a narrow tensor
    that comes from elsewhere (a constant, the closure of a function) is widened where it is used;
    arithmetic of integers that gives floats is done in float64. Random numbers are drawn in the
    dtype of the user's run and widened then: another dtype would draw others.

    Args:
        drawn: the floating dtype in which the user's code draws random numbers, where the operator
            does not say (``rand_like``, ``bernoulli_``).
    """

    def __init__(self, drawn: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn = drawn

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if _is_random(func, args, named):
            return self._draw(func, args, named)
        if func is torch.ops.aten.view.dtype or _is_view(func):
            return func(*args, **named)
        args, named = _widened_arguments(func, args, named)
        result = func(*args, **named)
        if func._schema.is_mutable or not tree_any(_is_narrow, result):
            return result
        if tree_any(lambda value: isinstance(value, Tensor), (args, named)):  # of integers
            args, named = tree_map(_integer_to_float64, args), tree_map(_integer_to_float64, named)
            result = func(*args, **named)
        return tree_map(_widened_leaf, result)

    def _draw(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A random operator in the dtype of the user's run."""

        def narrow(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dtype == torch.float64:
                return value.to(self.drawn)
            return value

        if func is torch.ops.aten.native_dropout.default:  # x itself must not be narrowed
            tensor, rate, training = args
            _, mask = func(torch.ones_like(tensor, dtype=self.drawn), rate, training)
            return tensor * mask * (1 / (1 - rate) if training and rate < 1 else 1), mask
        if func._schema.is_mutable:
            target = args[0]
            drawn = func(narrow(target).clone(), *tree_map(narrow, args[1:]), **named)
            return target.copy_(drawn)
        return tree_map(_widened_leaf, func(*tree_map(narrow, args), **tree_map(narrow, named)))


class Jitter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Moves each floating-point result up or down by one unit in the last place, or leaves it.

    Args:
        seed: of the generator that decides, which is no one else's.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **dict(kwargs or {}))
        if _is_random(func, args, kwargs or {}) or _is_view(func):
            return result
        if func._schema.name.split("::")[-1].rstrip("_") in EXACT_NAMES:
            return result
        if not tree_any(_is_rounded, (args, kwargs)):
            return result  # made from nothing but constants: every run has the same
        for leaf in tree_leaves(result):
            if _is_rounded(leaf) and leaf.layout == torch.strided:
                self._move(leaf)
        return result

    def _move(self, value: Tensor) -> None:
        """Times 1 - u or its inverse, where 2u is the ulp of 1: rounds to a neighbour or to itself.

        In place: below autograd nothing is recorded and strides stay.
        """
        real = torch.view_as_real(value) if value.is_complex() else value
        factor = 1 - torch.finfo(real.dtype).eps / 2
        way = torch.randint(
            3, real.shape, generator=self._generator(real.device), device=real.device
        )
        moved = torch.where(way == 0, real * factor, torch.where(way == 1, real / factor, real))
        real.copy_(moved)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


def _widened_arguments(
    func: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Dtypes and tensors in float64, but for the tensors that the operator writes to."""
    schema = func._schema.arguments
    written = {each.name for each in schema if each.alias_info is not None}

    def widen(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return WIDER.get(value, value)
        return _widened_leaf(value)

    positional = tuple(
        value if argument.name in written else tree_map(widen, value)
        for value, argument in zip(args, schema, strict=False)
    )
    return positional, {
        name: value if name in written else tree_map(widen, value) for name, value in named.items()
    }


def _is_random(func: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers; attention does so with dropout alone."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = dict(zip((each.name for each in func._schema.arguments), args, strict=False))
    defaults = {each.name: each.default_value for each in func._schema.arguments}
    return bool({**defaults, **given, **named}.get("dropout_p", 1.0))


def _is_view(func: Any) -> bool:
    """Whether results share storage with arguments without writing to them."""
    return any(
        each.alias_info is not None and not each.alias_info.is_write
        for each in func._schema.returns
    )


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in WIDER


def _is_rounded(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _widened_leaf(value: Any) -> Any:
    return widened(value) if isinstance(value, Tensor) else value


def _integer_to_float64(value: Any) -> Any:
    if isinstance(value, Tensor) and not _is_rounded(value):
        return value.to(torch.float64)
    return value
