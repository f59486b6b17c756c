"""Run an ONNX file on torch tensors.

Inputs and outputs are bound to the tensors' own memory: on a GPU nothing goes through numpy or the
host. One session may be called from several threads at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path
from torch.utils.dlpack import from_dlpack

from .providers import Device, Place, missing_library, place_for, preload, why_absent
from .refusal import SessionError, in_a_line

# onnxruntime's names of element types, torch's dtypes, and onnx's numbers
_TYPES: dict[str, tuple[torch.dtype, int]] = {
    "tensor(float)": (torch.float32, 1),
    "tensor(uint8)": (torch.uint8, 2),
    "tensor(int8)": (torch.int8, 3),
    "tensor(uint16)": (torch.uint16, 4),
    "tensor(int16)": (torch.int16, 5),
    "tensor(int32)": (torch.int32, 6),
    "tensor(int64)": (torch.int64, 7),
    "tensor(bool)": (torch.bool, 9),
    "tensor(float16)": (torch.float16, 10),
    "tensor(double)": (torch.float64, 11),
    "tensor(uint32)": (torch.uint32, 12),
    "tensor(uint64)": (torch.uint64, 13),
    "tensor(bfloat16)": (torch.bfloat16, 16),
}


@dataclass(frozen=True)
class Port:
    """An input or output of a file.

    Attributes:
        name: its name.
        dtype: of its elements.
        shape: sizes; a name or None where a size is dynamic.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{sizes}]"


class Session:
    """An ONNX file, ready to run.

    Args:
        path: the file.
        device: "cpu", "cuda", "cuda:1", "tensorrt" or a `torch.device`; None takes a GPU where
            there is one.

    Attributes:
        inputs: the file's inputs, in order.
        outputs: its outputs, in order.
        device: where outputs are.

    Raises:
        FileNotFoundError: there is no such file.
        SessionError: the file cannot be read, or the device or a library of it is not there.
    """

    def __init__(self, path: str | PathLike[str], device: Device = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        self._place = place_for(device)
        preload(self._place)
        self._session = opened(self.path, self._place)
        self.device = self._place.device
        self.inputs = tuple(_port(each) for each in self._session.get_inputs())
        self.outputs = tuple(_port(each) for each in self._session.get_outputs())

    @property
    def providers(self) -> list[str]:
        """The execution providers in use, the first one first."""
        found: list[str] = self._session.get_providers()
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """Run the file; lists, tuples and dictionaries of tensors are taken apart in order.

        Args:
            args: the first inputs, in order; None stands for no input.
            kwargs: further inputs by name, nested ones as in the model's call.

        Returns:
            The output, or a tuple of all where there are several.

        Raises:
            TypeError: an input is missing, unknown, given twice, or no tensor.
            ValueError: an input has another dtype or shape than the file's.
            SessionError: onnxruntime stops.
        """
        given = self._named(args, kwargs)
        results = tuple(self.run(given).values())
        return results[0] if len(results) == 1 else results

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the file on inputs by name; outputs by name."""
        ports = {port.name: port for port in self.inputs}
        for name in inputs:
            if name not in ports:
                raise TypeError(f"there is no input {name!r}; the file has {_listed(self.inputs)}")
        for name, port in ports.items():
            if name not in inputs:
                raise TypeError(f"the input {port} is missing")
            _check(port, inputs[name])
        binding = self._session.io_binding()
        held = [self._bind(binding, ports[name], value) for name, value in inputs.items()]
        for port in self.outputs:
            binding.bind_output(port.name, self.device.type, self._place.index)
        try:
            if self.device.type != "cpu":
                torch.cuda.current_stream(self.device).synchronize()
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise SessionError(f"onnxruntime stops at {self.path.name}: {in_a_line(error)}") from (
                error
            )
        del held  # until here: the binding knows addresses alone
        results = zip(self.outputs, binding.get_outputs(), strict=True)
        return {port.name: _tensor(port, value) for port, value in results}

    def _bind(self, binding: Any, port: Port, value: Tensor) -> Tensor:
        """Give onnxruntime a tensor's address; the tensor must live until the run is over."""
        tensor = value.detach().to(self.device).contiguous()
        if not tensor.numel():  # has no address; any will do, and this one is kept
            tensor = torch.empty(1, dtype=tensor.dtype, device=tensor.device)
        binding.bind_input(
            port.name,
            self.device.type,
            self._place.index,
            next(number for dtype, number in _TYPES.values() if dtype == port.dtype),
            list(value.shape),
            tensor.data_ptr(),
        )
        return tensor

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Inputs by name: positional ones in the order of the file, nested ones by their path."""
        leaves, _ = tree_flatten_with_path(list(args))
        values = [value for _, value in leaves if value is not None]
        if len(values) > len(self.inputs):
            raise TypeError(
                f"{len(values)} inputs are given, the file has {len(self.inputs)}: "
                f"{_listed(self.inputs)}"
            )
        given = {port.name: value for port, value in zip(self.inputs, values, strict=False)}
        for path, value in tree_flatten_with_path(dict(kwargs))[0]:
            if value is None:
                continue
            name = "_".join(_word(key) for key in path)
            if name in given:
                raise TypeError(f"the input {name!r} is given twice")
            given[name] = value
        return given


def opened(path: Path, place: Place, options: Any = None) -> Any:
    """Onnxruntime's session of a file, on exactly the provider that is asked for.

    Raises:
        SessionError: with what is missing.
    """
    if options is None:
        options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=place.providers()
        )
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise SessionError(_why_unopened(path, place, error)) from error
    if place.provider not in session.get_providers():
        raise SessionError(why_absent(place))
    return session


def _why_unopened(path: Path, place: Place, error: Exception) -> str:
    line = in_a_line(error)
    if missing_library(place) is not None:
        return why_absent(place)
    if "NOT_IMPLEMENTED" in line or "NotImplemented" in type(error).__name__:
        return f"{place.provider} has no kernel for an operation of {path.name}: {line}"
    if "External data" in line or "external data" in line or "GetFileLength" in line:
        return f"the weights beside {path.name} cannot be read: {line}"
    return f"{path} is no ONNX file that onnxruntime {onnxruntime.__version__} can read: {line}"


def ports_of(values: Iterable[ir.Value]) -> tuple[Port, ...]:
    """Inputs or outputs of a model that was not loaded."""
    dtypes = {number: dtype for dtype, number in _TYPES.values()}
    found = []
    for value in values:
        assert value.name is not None
        assert value.dtype is not None
        assert value.shape is not None
        sizes = (size if isinstance(size, int) else size.value for size in value.shape)
        found.append(Port(value.name, dtypes[int(value.dtype)], tuple(sizes)))
    return tuple(found)


def _port(value: Any) -> Port:
    if value.type not in _TYPES:
        raise SessionError(f"{value.name} is a {value.type}; sessions take and give tensors")
    return Port(value.name, _TYPES[value.type][0], tuple(value.shape))


def _check(port: Port, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"the input {port} is given a {type(value).__name__}, not a tensor")
    if value.dtype != port.dtype:
        raise ValueError(
            f"the input {port} is given {value.dtype}: convert it with .to({port.dtype})"
        )
    if value.dim() != len(port.shape):
        raise ValueError(
            f"the input {port} is given {value.dim()} dimensions, {tuple(value.shape)}; "
            f"the file has {len(port.shape)}"
        )
    for i, (size, wanted) in enumerate(zip(value.shape, port.shape, strict=True)):
        if isinstance(wanted, int) and size != wanted:
            raise ValueError(
                f"the input {port} is given size {size} in dimension {i}, where the file has "
                f"{wanted}; export with dynamic_shapes to have it vary"
            )


def _tensor(port: Port, value: Any) -> Tensor:
    """An output as a torch tensor, in the same memory."""
    found: Tensor = from_dlpack(value._ortvalue.to_dlpack())
    return found.view(torch.bool) if port.dtype == torch.bool else found


def _listed(ports: tuple[Port, ...]) -> str:
    return "; ".join(map(str, ports))


def _word(key: Any) -> str:
    """What a step into a nested argument is called."""
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)
