"""Read a saved program or a scripted module without running code of whoever wrote the file.

`torch.export.load` unpickles whatever a `.pt2` file names and evaluates expressions that are in it;
`torch.jit.load` executes methods by which classes restore themselves, and TorchScript has operators
that write files. Here the records of an archive are looked at first, through the reader that loads
them, and what could do more than describe a model is refused with a sentence.
"""

from __future__ import annotations

import os
import pickletools
import re
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch
from torch.export import ExportedProgram

from bnrewrite.doors.program_archive import ArchiveError, check_program
from bnrewrite.errors import with_its_name

__all__ = ["ArchiveError", "read"]

Path = str | os.PathLike[str]

_ZIP = b"PK\x03\x04"
_MODELS = "models/"
_CODE = "code/"
# What the unpickler of TorchScript, which is written in C++, makes of a name; all else it refuses.
_HARMLESS = re.compile(
    r"__torch__(\.\w+)* \w+|torch\._utils _rebuild_\w+|torch \w+Storage|torch device"
    r"|torch\.jit\._pickle \w+|collections OrderedDict|torch\.\w+ \w+Storage"
)
_OWN_RESTORING = re.compile(r"def\s+__setstate__\b")
_COMPILED_CLASS = re.compile(r"__torch__\s*\.\s*torch\s*\.\s*classes\b")
_FILES = re.compile(r"\b(from_file|save|load|_save_to_buffer)\b")


def read(path: Path) -> ExportedProgram | torch.jit.ScriptModule:
    """The program or the scripted module in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ArchiveError: it is damaged, is something else, or could run code when it is loaded.
    """
    with open(_checked(path), "rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            raise ArchiveError(
                f"{path} is no archive of torch.export.save or torch.jit.save, or it is damaged"
            )
        try:
            reader = torch._C.PyTorchFileReader(_again(file))
            names = list(reader.get_all_records())
        except (RuntimeError, OSError) as error:
            raise ArchiveError(f"{path} is damaged: {with_its_name(error)}") from error
        if any(name.startswith(_MODELS) for name in names):
            return _program(path, file, reader, names)
        if any(name.startswith(_CODE) for name in names):
            return _script(path, file, reader, names)
    raise ArchiveError(
        f"{path} holds no program: it may be a checkpoint; load that into its model, and give the "
        "model"
    )


def _checked(path: Path) -> Path:
    if os.path.isdir(path):
        raise ArchiveError(f"{path} is a directory; give the .pt or .pt2 file")
    return path


def _program(path: Path, file: BinaryIO, reader: Any, names: list[str]) -> ExportedProgram:
    from torch.export.pt2_archive._package import load_pt2

    check_program(path, reader, names)
    try:
        # not torch.export.load: where this fails it tries an older form, which is all pickles
        programs = load_pt2(_again(file)).exported_programs
    except Exception as error:  # any: the file is from elsewhere
        raise ArchiveError(f"{path} does not load: {with_its_name(error)}") from error
    return next(iter(programs.values()))


def _script(path: Path, file: BinaryIO, reader: Any, names: list[str]) -> torch.jit.ScriptModule:
    for name in names:
        if name.startswith(_CODE) and name.endswith(".py"):
            _check_code(path, reader.get_record(name).decode("utf-8", "replace"))
        elif name.endswith(".pkl"):
            for found in pickled_names(path, reader.get_record(name)):
                if not _HARMLESS.fullmatch(found):
                    raise ArchiveError(f"{path} asks for {found!r} when it is loaded; not loaded")
    place = None if torch.cuda.is_available() else "cpu"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            load: Any = torch.jit.load
            loaded: torch.jit.ScriptModule = load(_again(file), map_location=place)
    except RuntimeError as error:
        raise ArchiveError(f"{path} does not load: {with_its_name(error)}") from error
    return loaded


def _check_code(path: Path, code: str) -> None:
    """Refuse TorchScript that runs when it is loaded, or that reads or writes files."""
    if _OWN_RESTORING.search(code):
        raise ArchiveError(f"{path} has a class with a __setstate__ of its own, which is not run")
    if _COMPILED_CLASS.search(code):
        raise ArchiveError(f"{path} holds an object of a compiled class, which is not loaded")
    found = _FILES.search(code)
    if found is not None:
        raise ArchiveError(
            f"{path} uses the name {found.group(1)!r}, by which TorchScript reads or writes files"
        )


def pickled_names(path: Path, pickled: bytes) -> Iterator[str]:
    """The names ("module name") that a pickle looks up; it is read, not executed.

    Raises:
        ArchiveError: the pickle is damaged, or looks names up that it computes.
    """
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in ("GLOBAL", "INST"):
                yield str(argument)
            elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                raise ArchiveError(f"{path} computes the names that it asks for; not loaded")
    except ValueError as error:
        if isinstance(error, ArchiveError):
            raise
        raise ArchiveError(f"{path} is damaged: {with_its_name(error)}") from error


def _again(file: BinaryIO) -> BinaryIO:
    file.seek(0)
    return file
