"""Files from elsewhere: what would run code is refused with a sentence, before it is loaded."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from door_models import LayerNorm, images, save, script
from torch import Tensor, nn
from torch.export import Dim

import bnrewrite
from bnrewrite.doors import ArchiveError
from bnrewrite.doors.program_archive import _check_expression

pytestmark = [
    pytest.mark.usefixtures("repeatable"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "users.pt2"
    exported = torch.export.export(
        LayerNorm(6), (torch.randn(3, 6),), dynamic_shapes=({0: Dim("rows")},)
    )
    torch.export.save(exported, path)
    return path


def altered(path: Path, to: Path, changes: dict[str, Callable[[bytes], bytes] | bytes]) -> Path:
    """A copy of an archive with some records changed or added, by the end of their names."""
    left = dict(changes)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            record = old.read(name)
            for end in [each for each in left if name.endswith(each)]:
                change = left.pop(end)
                record = change if isinstance(change, bytes) else change(record)
            new.writestr(name, record)
        for name, added in left.items():
            assert isinstance(added, bytes), f"there is no record {name}"
            new.writestr(f"{root}/{name}", added)
    return to


def in_model(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def changed(record: bytes) -> bytes:
        model = json.loads(record)
        change(model)
        return json.dumps(model).encode()

    return changed


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def first_node(model: Any) -> Any:
    return model["graph_module"]["graph"]["nodes"][0]


def set_target(model: Any) -> None:
    first_node(model)["target"] = "torch.hub.load_state_dict_from_url"


def set_file_operator(model: Any) -> None:
    first_node(model)["target"] = "torch.ops.aten.from_file.default"


def set_size(model: Any) -> None:
    tensors = model["graph_module"]["graph"]["tensor_values"]
    size = next(each for value in tensors.values() for each in value["sizes"] if "as_expr" in each)
    size["as_expr"]["expr_str"] = "__import__('os').mkdir('x')"


def set_name(model: Any) -> None:
    given = model["graph_module"]["graph"]["inputs"][0]["as_tensor"]
    given["name"] = "x=__import__('os')"


def set_structure(model: Any) -> None:
    call = model["graph_module"]["module_call_graph"][0]["signature"]
    context = {"default_factory_module": "os", "default_factory_name": "getcwd"}
    leaf = {"type": "collections.defaultdict", "context": json.dumps(context), "children_spec": []}
    call["in_spec"] = json.dumps([1, leaf])


def set_keys(model: Any) -> None:
    call = model["graph_module"]["module_call_graph"][0]["signature"]
    leaf = {"type": "builtins.dict", "context": '["x\'] or print(1)"]', "children_spec": []}
    call["in_spec"] = json.dumps([1, leaf])


HOSTILE_MODELS = [
    (set_keys, "takes or returns a dictionary with the keys"),
    (
        set_target,
        "calls 'torch.hub.load_state_dict_from_url', which is not allowed in a file from elsewhere",
    ),
    (set_file_operator, r"calls 'torch\.ops\.aten\.from_file\.default', which is not allowed"),
    (set_size, "which is more than arithmetic"),
    (set_name, r"uses \"x=__import__\('os'\)\" as a name"),
    (set_structure, "takes or returns a 'collections.defaultdict', a class that is not imported"),
]


@pytest.mark.parametrize(("change", "sentence"), HOSTILE_MODELS)
def test_a_hostile_program_is_refused(
    program: Path, tmp_path: Path, change: Callable[[Any], None], sentence: str
) -> None:
    path = altered(program, tmp_path / "hostile.pt2", {"models/model.json": in_model(change)})
    for door in (bnrewrite.optimize, bnrewrite.explain):
        with pytest.raises(ArchiveError, match=sentence):
            door(path)


@pytest.mark.parametrize("record", ["data/sample_inputs/model.pt", "data/weights/model.pt"])
def test_a_hostile_pickle_is_refused(program: Path, tmp_path: Path, record: str) -> None:
    bomb = saved((Bomb(tmp_path / "exploded"),))
    path = altered(program, tmp_path / "hostile.pt2", {record: bomb})
    with pytest.raises(
        ArchiveError, match=r": the pickle .* asks for posix\.mkdir; it is not loaded"
    ):
        bnrewrite.optimize(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        ({"path_name": "opaque_obj_0", "use_pickle": True}, "an object that is no tensor"),
        ({"path_name": "tensor_0", "use_pickle": True}, r"asks for posix\.mkdir"),
        ({"path_name": "../weights/x", "use_pickle": False}, "keeps 'c' in a record with the name"),
    ],
)
def test_a_hostile_constant_is_refused(
    program: Path, tmp_path: Path, payload: dict[str, Any], sentence: str
) -> None:
    records: dict[str, Any] = {
        "data/constants/model_constants_config.json": json.dumps(
            {"config": {"c": payload}}
        ).encode(),
        "data/constants/tensor_0": saved(Bomb(tmp_path / "exploded")),
        "data/constants/opaque_obj_0": pickle.dumps(Bomb(tmp_path / "exploded")),
    }
    path = altered(program, tmp_path / "hostile.pt2", records)
    with pytest.raises(ArchiveError, match=sentence):
        bnrewrite.optimize(path)
    assert not (tmp_path / "exploded").exists()


def test_machine_code_and_several_programs_are_refused(program: Path, tmp_path: Path) -> None:
    path = altered(program, tmp_path / "a.pt2", {"data/aotinductor/model/model.so": b"\x7fELF"})
    with pytest.raises(ArchiveError, match="holds machine code, which is not loaded"):
        bnrewrite.optimize(path)
    path = altered(program, tmp_path / "b.pt2", {"models/other.json": b"{}"})
    with pytest.raises(ArchiveError, match="holds 2 programs; give a file with one"):
        bnrewrite.optimize(path)


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s0', positive=True, integer=True)",
        "2*s0 + FloorDiv(s1, 4) - Mod(s0, 2)",
        "Max(1, s0 - 2)**2 >= 3",
        "IntTrueDiv(s0, 3)",
        "PowByNatural(s0, 2)",
    ],
)
def test_expressions_of_sizes_are_taken(text: str) -> None:
    _check_expression("users.pt2", text)


@pytest.mark.parametrize(
    "text",
    [
        "().__class__",
        "[c for c in 'x']",
        "Lambda(x, x)(3)",
        "9**9**9",
        "s0**1000",
        "1 << 99999999",
        "'a text'",
        "eval('1')",
        "(lambda: 1)()",
        "s0.is_zero",
        "s0; s1",
    ],
)
def test_other_expressions_are_not(text: str) -> None:
    sentences = (
        "has the size .*, which is more than arithmetic|has the size .*, which is no expression"
    )
    with pytest.raises(ArchiveError, match=sentences):
        _check_expression("users.pt2", text)


class Files(nn.Module):
    def forward(self, x: Tensor, path: str) -> Tensor:
        return x + torch.from_file(path, True, 4)


class Restoring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value

    @torch.jit.export
    def __getstate__(self) -> tuple[int, bool]:  # pyright: ignore
        return self.value, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]) -> None:
        self.value, self.training = state


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Files(), "uses the name 'from_file', by which TorchScript reads or writes files"),
        (Restoring(), "has a class with a __setstate__ of its own, which is not run"),
    ],
)
def test_a_hostile_script_is_refused(model: nn.Module, tmp_path: Path, sentence: str) -> None:
    path = save(script(model), tmp_path / "hostile.pt")
    with pytest.raises(ArchiveError, match=sentence):
        bnrewrite.optimize(path, example_inputs=(torch.zeros(4),))


def test_an_object_of_a_compiled_class_is_refused(tmp_path: Path) -> None:
    def with_class(code: bytes) -> bytes:
        return code + b"\n  thing : __torch__.torch.classes.profiling.SourceRef\n"

    users = save(script(LayerNorm(6)), tmp_path / "users.pt")
    path = altered(users, tmp_path / "hostile.pt", {"code/__torch__/door_models.py": with_class})
    with pytest.raises(ArchiveError, match="holds an object of a compiled class, which is not"):
        bnrewrite.optimize(path, example_inputs=(torch.zeros(2, 6),))


def test_a_pickle_in_a_script_is_read_and_not_executed(tmp_path: Path) -> None:
    users = save(script(LayerNorm(6)), tmp_path / "users.pt")
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"), protocol=2)
    for record in ("data.pkl", "constants.pkl"):
        path = altered(users, tmp_path / "hostile.pt", {record: bomb})
        with pytest.raises(
            ArchiveError, match="asks for 'posix mkdir' when it is loaded; not loaded"
        ):
            bnrewrite.optimize(path, example_inputs=(torch.zeros(2, 6),))
    computed = pickle.dumps(Bomb(tmp_path / "exploded"), protocol=4)
    path = altered(users, tmp_path / "hostile.pt", {"data.pkl": computed})
    with pytest.raises(ArchiveError, match="computes the names that it asks for"):
        bnrewrite.optimize(path, example_inputs=(torch.zeros(2, 6),))
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_is_not_unpickled(tmp_path: Path) -> None:
    torch.save({"model": Bomb(tmp_path / "exploded")}, tmp_path / "model.pt")
    with pytest.raises(ArchiveError, match="it may be a checkpoint"):
        bnrewrite.optimize(tmp_path / "model.pt")
    assert not (tmp_path / "exploded").exists()


def test_damaged_files(program: Path, tmp_path: Path) -> None:
    whole = program.read_bytes()
    for name, content, sentence in (
        ("half.pt2", whole[: len(whole) // 2], r"half\.pt2 is damaged"),
        (
            "text.pt",
            b"a text",
            r"is no archive of torch\.export\.save or torch\.jit\.save, or it is",
        ),
        ("empty.pt", b"", r"empty\.pt is no archive"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ArchiveError, match=sentence):
            bnrewrite.optimize(path)
    path = altered(program, tmp_path / "a.pt2", {"models/model.json": b"{"})
    with pytest.raises(ArchiveError, match="is damaged:"):
        bnrewrite.optimize(path)
    path = altered(program, tmp_path / "c.pt2", {"models/model.json": b"[" * 200_000})
    with pytest.raises(ArchiveError, match="is nested too deeply"):
        bnrewrite.optimize(path)
    config = "data/weights/model_weights_config.json"
    path = altered(program, tmp_path / "d.pt2", {config: b'{"config": 3}'})
    with pytest.raises(ArchiveError, match="is damaged: a list of tensors is none"):
        bnrewrite.optimize(path)
    path = altered(program, tmp_path / "b.pt2", {"models/model.json": b"{}"})
    with pytest.raises(ArchiveError, match="does not load:"):
        bnrewrite.optimize(path)
    with pytest.raises(ArchiveError, match=r"is a directory; give the \.pt or \.pt2 file"):
        bnrewrite.optimize(tmp_path)
    with pytest.raises(FileNotFoundError):
        bnrewrite.optimize(tmp_path / "nowhere.pt2")


def test_the_users_own_files_load(program: Path, tmp_path: Path) -> None:
    result = bnrewrite.optimize(program)
    torch.testing.assert_close(
        result.module()(torch.ones(5, 6)), torch.export.load(program).module()(torch.ones(5, 6))
    )
    path = save(script(LayerNorm(8).eval()), tmp_path / "users.pt")
    assert "aten::layer_norm" in str(bnrewrite.optimize(str(path), example_inputs=images()).graph)
