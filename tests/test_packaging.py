"""What is installed is what is in the tree."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import bnrewrite
import bnrewrite.passes

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_package_list_is_the_tree() -> None:
    library = {
        ".".join(folder.relative_to(ROOT).parts)
        for folder in [ROOT / "bnrewrite", *(ROOT / "bnrewrite").rglob("*/")]
        if any(folder.glob("*.py"))
    }
    library |= {
        ".".join(("bnrewrite", *folder.relative_to(ROOT).parts))
        for folder in [ROOT / "passes", *(ROOT / "passes").rglob("*/")]
        if any(folder.glob("*.py"))
    }
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(library)


def test_every_package_has_an_init() -> None:
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        assert (ROOT.joinpath(*package.split(".")) / "__init__.py").is_file(), package


def test_passes_is_a_symlink_to_the_top() -> None:
    link = ROOT / "bnrewrite" / "passes"
    assert link.is_symlink()
    assert str(link.readlink()) == "../passes"


def test_passes_is_not_importable_under_another_name() -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True
    )
    assert outcome.returncode != 0
    assert "bnrewrite.passes" in outcome.stderr


def test_types_are_shipped() -> None:
    assert (ROOT / "bnrewrite" / "py.typed").is_file()
    assert PROJECT["tool"]["setuptools"]["package-data"]["bnrewrite"] == ["py.typed"]


def test_what_is_not_python_is_shipped() -> None:
    """Headers of kernels, without which nothing can be imported; tables of costs."""
    shipped = PROJECT["tool"]["setuptools"]["package-data"]
    others = [path for path in (ROOT / "bnrewrite").rglob("*") if path.suffix in (".h", ".cpp")]
    tables = [
        ROOT / "bnrewrite" / "passes" / path.name for path in (ROOT / "passes").glob("*.json")
    ]
    assert others
    assert tables
    for path in (*others, *tables):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert any(path.match(pattern) for pattern in shipped[package])


def test_backend_is_found_by_its_name() -> None:
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="bnrewrite")
    assert callable(entry.load())


def test_installed_metadata_is_the_project() -> None:
    assert importlib.metadata.version("bnrewrite") == PROJECT["project"]["version"]
    assert importlib.metadata.metadata("bnrewrite")["Requires-Python"] == ">=3.11"


@pytest.mark.parametrize(
    ("system", "machine", "wanted"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("win32", "ARM64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
    ],
)
def test_one_onnxruntime_per_platform(system: str, machine: str, wanted: str) -> None:
    environment = {"sys_platform": system, "platform_machine": machine}
    requirements = map(Requirement, PROJECT["project"]["dependencies"])
    chosen = [
        requirement.name
        for requirement in requirements
        if requirement.name.startswith("onnxruntime")
        and (requirement.marker is None or requirement.marker.evaluate(environment))
    ]
    assert chosen == [wanted]


def test_constraints_pin_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {
        _normal(Requirement(line.partition("#")[0]).name)
        for line in lines
        if line.partition("#")[0].strip()
    }
    project = PROJECT["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {_normal(Requirement(text).name) for text in required} <= pinned


def test_public_names() -> None:
    names = {"optimize", "explain", "verify", "Report", "Site", "Verification"}
    assert names <= set(bnrewrite.__all__)
    for name in names:
        assert hasattr(bnrewrite, name)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
