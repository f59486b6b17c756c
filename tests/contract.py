"""The contract, checked: the optimised model beside the user's own, both against float64.

    error(optimised) <= 3 error(user's code) + ulp(dtype) * largest value

for outputs, gradients of inputs and parameters under a random cotangent, and every buffer, over
three steps in training mode and one in eval mode. The yardstick is the user's own code in float64,
where a `.float()` must widen too; no tolerance is typed in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bnrewrite.oracle import Jitter, Widen, widened_module

SLACK = 3.0
JITTERS = 2  # runs of the user's code whose roundings fall another way

Call = Callable[..., Any]
Optimise = Callable[[nn.Module], Call]
Trace = dict[str, Tensor]
Batch = Tensor | tuple[Any, ...]  # what a model is called with: its one input, or all arguments


def contract_violations(
    original: nn.Module,
    optimise: Optimise,
    batches: Sequence[Batch],
) -> list[str]:
    """Runs both side by side; the last batch goes through in eval mode, the others in training.

    Args:
        original: the user's model; not touched, copies of it run.
        optimise: turns a copy of it into what is called in its place.
        batches: the inputs of each step, floating point ones of the dtype under test.

    Returns:
        One sentence per promise broken; empty where the contract holds.
    """
    mine = copy.deepcopy(original)
    before = {name: (id(buffer), buffer.dtype) for name, buffer in mine.named_buffers()}
    optimised = trace(mine, optimise(mine), batches, repair=False)
    plain = copy.deepcopy(original)
    user = trace(plain, plain, batches)
    exact = exact_trace(original, batches)
    slip = user_errors(original, batches, user, exact)
    violations = [
        sentence
        for name in exact
        if (sentence := violation(name, optimised.get(name), user[name], exact[name], slip[name]))
    ]
    violations += [f"{name}: the user's code has no such value" for name in optimised.keys() - user]
    for name, buffer in mine.named_buffers():
        identity, dtype = before[name]
        if id(buffer) != identity:
            violations.append(f"buffer {name} is another tensor object than before")
        if buffer.dtype != dtype:
            violations.append(f"buffer {name} became {buffer.dtype}, was {dtype}")
        if buffer.grad_fn is not None or buffer.requires_grad:
            violations.append(f"buffer {name} carries autograd history")
    return violations


def trace(
    model: nn.Module,
    call: Call,
    batches: Sequence[Batch],
    repair: bool = True,
) -> Trace:
    """Every number that a user could see, by name, over the steps.

    Args:
        model: the module whose parameters and buffers are read.
        call: what is called with the inputs.
        batches: the inputs of each step.
        repair: detach what the code leaks into its state after each step, as an author must
            before the second backward; the optimised model gets no such help.
    """
    seen: Trace = {}
    source = torch.Generator().manual_seed(29)
    for step, batch in enumerate(batches):
        last = step == len(batches) - 1
        model.train(not last)
        where = "eval" if last else f"step {step}"
        inputs = [
            each.clone().requires_grad_() if _is_floating(each) else each
            for each in (batch if isinstance(batch, tuple) else (batch,))
        ]
        torch.manual_seed(step)  # what a model draws is the same for all who run it
        outputs = [leaf for leaf in tree_leaves(call(*inputs)) if isinstance(leaf, Tensor)]
        differentiable = [leaf for leaf in outputs if leaf.requires_grad]
        cotangents = [cotangent(leaf, source) for leaf in differentiable]
        leaves = {f"gradient of input {at}": x for at, x in enumerate(inputs) if _is_floating(x)}
        leaves |= {f"gradient of {name}": each for name, each in model.named_parameters()}
        for leaf in leaves.values():
            leaf.grad = None
        if differentiable:
            torch.autograd.backward(differentiable, cotangents)
        for at, leaf in enumerate(outputs):
            seen[f"{where}: output {at}"] = leaf.detach().clone()
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                seen[f"{where}: {name}"] = leaf.grad.detach().clone()
        for name, value in state(model):
            seen[f"{where}: {name}"] = value.detach().clone()
        if repair:
            forget_history(model)
    return seen


def cotangent(output: Tensor, source: torch.Generator) -> Tensor:
    """Random sixteenths: the same numbers in every floating point dtype."""
    return torch.randint(-32, 33, output.shape, generator=source).to(output.dtype) / 16


def exact_trace(original: nn.Module, batches: Sequence[Batch]) -> Trace:
    """The trace of the user's own code in float64, whatever dtypes it names."""
    model = widened_module(original)
    with Widen(drawn=torch.float32):
        return trace(model, model, _cast(batches, torch.float64))


def user_errors(
    original: nn.Module, batches: Sequence[Batch], user: Trace, exact: Trace
) -> dict[str, float]:
    """The user's own error; the largest where its roundings fall another way (see ``Jitter``)."""
    runs = [user]
    for seed in range(JITTERS):
        model = copy.deepcopy(original)
        with Jitter(seed):
            runs.append(trace(model, model, batches))
    return {name: max(error(run[name], exact[name]) for run in runs) for name in exact}


def error(value: Tensor, exact: Tensor) -> float:
    """The largest absolute error among the finite values; inf where the value alone is not."""
    finite = exact.isfinite()
    apart = (value.double() - exact.double()).abs()[finite]
    return float(apart.nan_to_num(nan=torch.inf).max()) if apart.numel() else 0.0


def violation(
    name: str, value: Tensor | None, user: Tensor, exact: Tensor, slip: float
) -> str | None:
    """A sentence where one value breaks the contract."""
    if value is None:
        return f"{name}: missing"
    if value.shape != user.shape or value.dtype != user.dtype:
        found, wanted = (f"{t.dtype} {tuple(t.shape)}" for t in (value, user))
        return f"{name}: {found}, the user's code gives {wanted}"
    if not user.is_floating_point():
        return None if torch.equal(value, user) else f"{name}: {value}, should be {user}"
    odd = ~exact.isfinite()
    if not torch.equal(value.double()[odd].nan_to_num(7.0), exact[odd].nan_to_num(7.0)):
        return f"{name}: is not NaN or inf where the user's code is"
    largest = float(exact[~odd].abs().max()) if (~odd).any() else 0.0
    limit = SLACK * slip + torch.finfo(user.dtype).eps * largest
    found_error = error(value, exact)
    if found_error <= limit:
        return None
    return f"{name}: error {found_error:.2e}, the limit is {limit:.2e} (user's {slip:.2e})"


def state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, and tensors that are plain attributes of a module."""
    for name, buffer in model.named_buffers():
        yield f"buffer {name}", buffer
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"attribute {path}.{name}".replace(" .", " "), value


def forget_history(model: nn.Module) -> None:
    """Cuts the autograd history that hand-written code left in its state."""
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._buffers, vars(module))
        for place in places:
            for name, value in place.items():
                if isinstance(value, Tensor) and value.requires_grad:
                    place[name] = value.detach()


def _cast(batches: Sequence[Batch], dtype: torch.dtype) -> list[Any]:
    cast: list[Any] = tree_map(lambda x: x.to(dtype) if _is_floating(x) else x, list(batches))
    return cast


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def check_threads(model: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> None:
    """Assert that gradients of x are those of one call after the other where four threads call."""

    def step(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad((model(x) ** 3).sum(), x)[0]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(step, inputs))
    torch.testing.assert_close(together, [step(x) for x in inputs], rtol=0, atol=0)
