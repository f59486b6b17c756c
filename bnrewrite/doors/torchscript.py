"""A canonical graph as the text of a TorchScript function.

    %batch_norm = torch.ops.aten.batch_norm.default(%conv, %w, %b, %m, %v, ...)
    n4 = torch.ops.aten.batch_norm(n0, n1, n2, n3, ...)

Names are counted, so that nothing of the text comes from elsewhere.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import TreeSpec

from bnrewrite.doors.plain import Untranslatable
from bnrewrite.gradients import GRAD_MODE
from bnrewrite.kernels import frozen_batch_norm

SIGNS: dict[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/",
    operator.floordiv: "//", operator.mod: "%", operator.pow: "**", operator.eq: "==",
    operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
}  # fmt: skip
_CALLS: dict[Any, str] = {
    torch.sym_max: "max", torch.sym_min: "min", torch.sym_float: "float", torch.sym_int: "int",
    math.floor: "math.floor", math.ceil: "math.ceil", abs: "abs",
}  # fmt: skip


class FunctionText:
    """The text of a function in the making.

    Args:
        names: what stands for the inputs, by placeholder.
        exact: nodes of `frozen_batch_norm` whose mean is subtracted first, because it is large.
    """

    def __init__(self, names: Mapping[fx.Node, str], exact: Iterable[fx.Node] = ()) -> None:
        self.lines: list[str] = []
        self.names = dict(names)
        self.exact = frozenset(exact)
        self._depth = 1

    def write(self, nodes: Iterable[fx.Node]) -> None:
        """Add nodes, in their order.

        Raises:
            Untranslatable: TorchScript has no form for one of them.
        """
        for node in nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op != "call_function":
                raise Untranslatable(f"its graph holds {node.op} {node.target}")
            if node.target is GRAD_MODE:
                self._mode(bool(node.args[0]))
            else:
                text = self._call(node)
                self.names[node] = f"n{len(self.names)}"
                self.add(f"{self.names[node]} = {text}")
        if self._depth != 1:
            raise Untranslatable("its graph ends in another gradient mode than it begins in")

    def add(self, line: str) -> None:
        """Add a line."""
        self.lines.append("    " * self._depth + line)

    def value(self, value: Any, kind: str = "") -> str:
        """The text of an argument; `kind` is its type in the schema, where there is one."""
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, list | tuple):
            if not value:
                inner = kind.removeprefix("Optional[").removeprefix("List[").rstrip("]") or "int"
                return f"torch.jit.annotate(List[{inner}], [])"
            return f"[{', '.join(self.value(each) for each in value)}]"
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if value is None or isinstance(value, bool | int | float | str):
            return repr(value)
        if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
            return str(value)
        raise Untranslatable(f"its graph holds a value of the type {type(value).__name__}")

    def vector(self, statistic: Any) -> str:
        """The text of a stored statistic as a vector."""
        text = self.value(statistic)
        return text if statistic.meta["val"].dim() == 1 else f"{text}.reshape([-1])"

    def result(self, values: Sequence[Any], spec: TreeSpec) -> str:
        """The text of what is returned, in the structure of the user's."""
        mine = iter(values)
        return self._structured(spec, mine)

    def _structured(self, spec: TreeSpec, values: Any) -> str:
        if spec.is_leaf():
            return self.value(next(values))
        inner = [self._structured(each, values) for each in spec.children()]
        if spec.type is tuple:
            return f"({''.join(f'{each}, ' for each in inner)})"
        if spec.type is list:
            return f"[{', '.join(inner)}]"
        if spec.type is dict:
            pairs = zip(map(self.value, spec.context), inner, strict=True)
            return f"{{{', '.join(f'{key}: {value}' for key, value in pairs)}}}"
        raise Untranslatable(f"it returns a {spec.type.__name__}")

    def _mode(self, enabled: bool) -> None:
        if enabled != (self._depth == 2):
            raise Untranslatable("its graph sets a gradient mode that is set already")
        if enabled:
            self._depth = 1
        else:
            self.add("with torch.no_grad():")
            self._depth = 2
            self.add("pass")

    def _call(self, node: fx.Node) -> str:
        target, args = node.target, node.args
        if target is frozen_batch_norm:
            return self._frozen(node)
        if target is operator.getitem:
            return f"{self.value(args[0])}[{self.value(args[1])}]"
        if target in SIGNS and len(args) == 2:
            return f"{self.value(args[0])} {SIGNS[target]} {self.value(args[1])}"
        if target is operator.neg:
            return f"-{self.value(args[0])}"
        if target in _CALLS:
            return f"{_CALLS[target]}({', '.join(map(self.value, args))})"
        if target is torch.ops.aten.sym_size.int:
            return f"{self.value(args[0])}.size({self.value(args[1])})"
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            raise Untranslatable(f"its graph calls {target}")
        kinds = {each.name: str(each.type) for each in target._schema.arguments}
        texts = [self.value(each, kind) for each, kind in zip(args, kinds.values(), strict=False)]
        texts += [f"{key}={self.value(each, kinds[key])}" for key, each in node.kwargs.items()]
        return f"torch.ops.aten.{target._opname}({', '.join(texts)})"

    def _frozen(self, node: fx.Node) -> str:
        """A norm with stored statistics; the guard has looked at these."""
        x, weight, bias, mean, variance, eps = node.args
        texts = [self.value(each) for each in (x, weight, bias, mean, variance)]
        flat = [*texts[:3], self.vector(mean), self.vector(variance)]
        if node not in self.exact:
            return f"torch.ops.aten.batch_norm({', '.join(flat)}, False, 0.0, {eps!r}, True)"
        shape = [-1, *[1] * (x.meta["val"].dim() - 2)]  # type: ignore[union-attr]
        scale = f"torch.rsqrt({flat[4]} + {eps!r})"
        if weight is not None:
            scale = f"({scale} * {texts[1]})"
        text = f"({texts[0]} - {flat[3]}.reshape({shape})) * {scale}.reshape({shape})"
        return text if bias is None else f"{text} + {texts[2]}.reshape({shape})"
