"""What a saved program may hold, so that loading it runs nothing but PyTorch's own code.

Looked at are: the pickles (tensors and containers of tensors alone), the operators that the graph
names, the expressions for sizes (which sympy would evaluate as Python), the structures of inputs
and outputs (which may name any class to import), and every name that becomes text of a function.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
from typing import Any

import torch

Path = str | os.PathLike[str]

_MODELS, _WEIGHTS, _CONSTANTS = "models/", "data/weights/", "data/constants/"
_SAMPLES, _COMPILED = "data/sample_inputs/", "data/aotinductor/"
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|prim|quantized_decomposed|torchvision)\.(?P<name>\w+)(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|map_impl|scan|associative_scan|while_loop"
    r"|wrap_with_set_grad_enabled|wrap_with_autocast|invoke_subgraph|tag_activation_checkpoint)"
    r"|_operator\.\w+|math\.\w+|torch\.sym_\w+|torch\._C\._set_grad_enabled"
    r"|torch\.amp\.autocast_mode\._(enter|exit)_autocast"
)
_FILES = ("from_file", "save", "load")
_NAME = re.compile(r"[\w.:+\-]*")
_FREE = ("metadata", "as_string", "as_strings", "custom")  # shown, or written as a literal
_STRUCTURES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_KEY = re.compile(r"[\w .:/\-]*")
_FUNCTIONS = frozenset(
    (
        *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Max", "Min", "And", "Or", "Not"),
        *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "LessThan", "GreaterThan"),
        *("StrictLessThan", "StrictGreaterThan", "FloorDiv", "CleanDiv", "CeilDiv", "Mod", "Where"),
        *("PythonMod", "ModularIndexing", "IntTrueDiv", "FloatTrueDiv", "CeilToInt", "FloorToInt"),
        *("TruncToInt", "TruncToFloat", "RoundToInt", "RoundDecimal", "ToFloat", "Identity"),
        *("IsNonOverlappingAndDenseIndicator",),
    )
)
_POWERS = ("Pow", "PowByNatural")
_LARGEST_POWER = 64
_SYNTAX = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Call, ast.Name),
    *(ast.Constant, ast.keyword, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
    *(ast.Pow, ast.unaryop, ast.cmpop, ast.boolop, ast.expr_context),
)


class ArchiveError(ValueError):
    """A file that is not loaded; the message is a sentence for the user."""


def check_program(path: Path, reader: Any, names: list[str]) -> None:
    """Refuse a saved program that could run code when it is loaded or called.

    Raises:
        ArchiveError: with what was found.
    """
    models = [name for name in names if name.startswith(_MODELS)]
    if len(models) != 1:
        raise ArchiveError(f"{path} holds {len(models)} programs; give a file with one")
    if any(name.startswith(_COMPILED) for name in names):
        raise ArchiveError(f"{path} holds machine code, which is not loaded")
    for name in names:
        if name.startswith((_WEIGHTS, _CONSTANTS)) and name.endswith("_config.json"):
            _check_payloads(path, reader, name)
        elif name.startswith((_WEIGHTS, _CONSTANTS, _SAMPLES)) and name.endswith(".pt"):
            _check_pickle(path, name, reader.get_record(name))
    _check_model(path, _json(path, reader.get_record(models[0])), "")


def _check_payloads(path: Path, reader: Any, name: str) -> None:
    folder = name.rpartition("/")[0]
    config = _json(path, reader.get_record(name))
    for key, each in _items(path, config.get("config")):
        file = each.get("path_name")
        if not isinstance(file, str) or not re.fullmatch(r"\w+(\.\w+)?", file):
            raise ArchiveError(f"{path} keeps {key!r} in a record with the name {file!r}")
        if file.startswith(("custom_obj", "opaque_obj")):
            raise ArchiveError(f"{path} holds {key!r}, an object that is no tensor; not loaded")
        if each.get("use_pickle"):
            _check_pickle(path, key, reader.get_record(f"{folder}/{file}"))
        _check_name(path, key)


def _check_pickle(path: Path, name: str, pickled: bytes) -> None:
    """Load a pickle by the rules under which it can only hold tensors and containers of them."""
    if not pickled:
        return
    try:
        torch.load(io.BytesIO(pickled), weights_only=True, map_location="cpu")
    except Exception as error:  # any: what it holds is from elsewhere
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for {asked.group(1)}" if asked else "is no plain pickle of tensors"
        raise ArchiveError(f"{path}: the pickle {name} {what}; it is not loaded") from None


def _check_model(path: Path, value: Any, key: str) -> None:
    """Go through the description of a program; `key` is where the value stands."""
    if isinstance(value, dict):
        for name, each in value.items():
            _check_name(path, name)
            if name not in _FREE:
                _check_model(path, each, name)
    elif isinstance(value, list):
        for each in value:
            _check_model(path, each, key)
    elif isinstance(value, str):
        if key == "expr_str":
            _check_expression(path, value)
        elif key in ("target", "as_operator"):
            _check_operator(path, value)
        elif key in ("in_spec", "out_spec"):
            if value:
                _check_structure(path, _json(path, value.encode()))
        else:
            _check_name(path, value)


def _check_operator(path: Path, target: str) -> None:
    found = _OPERATORS.fullmatch(target)
    if found is None or found.group("name") in _FILES:
        raise ArchiveError(
            f"{path} calls {target!r}, which is not allowed in a file from elsewhere"
        )


def _check_name(path: Path, name: str) -> None:
    """Names of values and modules become text of a function."""
    if not _NAME.fullmatch(name):
        raise ArchiveError(f"{path} uses {name!r} as a name")


def _check_structure(path: Path, spec: Any) -> None:
    """The structure of inputs or outputs: of containers that Python has itself."""
    if isinstance(spec, list) and len(spec) == 2:
        spec = spec[1]
    if not isinstance(spec, dict) or spec.get("type") not in _STRUCTURES:
        kind = spec.get("type") if isinstance(spec, dict) else spec
        raise ArchiveError(f"{path} takes or returns a {kind!r}, a class that is not imported")
    context = _json(path, (spec.get("context") or "null").encode())
    keys = [] if context is None else context
    if not isinstance(keys, list) or not all(
        isinstance(each, int) or (isinstance(each, str) and _KEY.fullmatch(each)) for each in keys
    ):
        raise ArchiveError(f"{path} takes or returns a dictionary with the keys {context!r}")
    for child in spec.get("children_spec") or ():
        _check_structure(path, child)


def _check_expression(path: Path, text: str) -> None:
    """An expression of sizes: sums, products and known functions of symbols and numbers."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        raise ArchiveError(f"{path} has the size {text[:60]!r}, which is no expression") from None
    for node in ast.walk(tree):
        if not _is_plain(node):
            raise ArchiveError(f"{path} has the size {text[:60]!r}, which is more than arithmetic")


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in _POWERS:
            return len(node.args) == 2 and _is_small(node.args[1])
        return name in _FUNCTIONS
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _is_small(node.right)
    if isinstance(node, ast.Constant):
        is_symbol = isinstance(node.value, str) and re.fullmatch(r"[a-z]+\d*", node.value)
        return isinstance(node.value, int | float) or bool(is_symbol)
    if isinstance(node, ast.Name):
        return not node.id.startswith("_")
    return isinstance(node, _SYNTAX)


def _is_small(power: ast.AST) -> bool:
    """Whether an exponent can be computed in no time."""
    number = power.operand if isinstance(power, ast.UnaryOp) else power
    value = number.value if isinstance(number, ast.Constant) else None
    return isinstance(value, int) and abs(value) <= _LARGEST_POWER


def _json(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ArchiveError(f"{path} is damaged: {error}") from error
    except RecursionError:
        raise ArchiveError(f"{path} is nested too deeply") from None


def _items(path: Path, value: Any) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values()):
        raise ArchiveError(f"{path} is damaged: a list of tensors is none")
    return list(value.items())
