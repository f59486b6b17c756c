"""Write a model beside its place first, and move it there when it is whole.

An interrupted or refused export leaves what stood there before, and nothing half-written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from .refusal import ExportError

# bytes of weights up to which a file holds them itself; a protobuf ends at 2 GiB
LARGEST_FILE = 1 << 30


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder beside, which is moved to `path` if all goes well.

    Raises:
        ExportError: the folder is not there or cannot be written to, or `path` is no file.
    """
    try:
        _check_place(path)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ExportError(f"{path.parent} cannot be written to: {error.strerror}") from error
    try:
        yield folder / path.name
        _move(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder {path.parent} to write {path.name} into")
    if path.exists() and not path.is_file():  # a device would be gone
        raise ExportError(f"{path} is no file; give the name of one, or a new name")


def save(model: ir.Model, path: Path) -> None:
    """Write a model, its weights into a file beside it where they are large.

    Raises:
        ExportError: the disk is full, or the like.
    """
    size = sum(
        each.const_value.nbytes
        for each in model.graph.initializers.values()
        if each.const_value is not None
    )
    beside = data_path(path).name if size > LARGEST_FILE else None
    try:
        ir.save(model, path, external_data=beside)
    except OSError as error:
        raise ExportError(f"{path.name} cannot be written: {error.strerror}") from error


def data_path(path: Path) -> Path:
    """Where the weights of a large model are."""
    return path.with_name(path.name + ".data")


def _move(folder: Path, path: Path) -> None:
    """Weights first: a model is there only when all of it is."""
    data = data_path(folder / path.name)
    if data.exists():
        os.replace(data, data_path(path))
    os.replace(folder / path.name, path)
