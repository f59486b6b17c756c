"""What autograd may keep of the values of a graph."""

from __future__ import annotations

import operator
from collections.abc import Set
from typing import Any

import torch
from torch import fx

from bnrewrite.gradients import GRAD_MODE
from bnrewrite.kernels import KERNELS, never_kept, norm, norm_with_updates
from bnrewrite.walks import reached


def outlives(node: fx.Node, differentiable: Set[fx.Node]) -> bool:
    """Whether a value, or a view of it, may be saved for a backward or returned."""
    return any(
        user.op == "output"
        or (user in differentiable and _is_kept(node, user))
        or (may_alias(user) and outlives(user, differentiable))
        for user in node.users
    )


def _is_kept(node: fx.Node, user: fx.Node) -> bool:
    """Whether a backward may ask for a value as it was: kernels copy what takes no gradient."""
    if user.target not in (norm, norm_with_updates):
        return True
    text, x, *tensors = user.args
    without = never_kept(str(text))
    return x is node or any(each is node and i not in without for i, each in enumerate(tensors))


def reaches(node: fx.Node, differentiable: Set[fx.Node]) -> bool:
    """Whether a value that autograd records, or one that is returned as it is, is computed from it.

    In a graph with updates in place, which have no users, every value may be.
    """
    graph = node.graph
    if any(each.op == "call_method" or not _has_schema(each) for each in graph.nodes):
        return bool(differentiable)
    if not differentiable.isdisjoint(reached([*node.users], lambda each: each.users)):
        return True
    return any(user.op == "output" for user in node.users)


def may_alias(node: fx.Node) -> bool:
    """Whether a node's value may share the memory of its input."""
    if node.target in KERNELS:
        return False
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None:
        return True  # a method or function of a graph that is not canonical
    return any(returned.alias_info is not None for returned in schema.returns)


def _has_schema(node: fx.Node) -> bool:
    """Whether a node is one of those that a canonical graph is made of."""
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return True
    return node.target in {*KERNELS, GRAD_MODE, operator.getitem}
