"""What `pip install .` gives other people, and what stands beside it."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from kv_compression.sharing import model_card

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the project, made without a network."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("project")
    for name in ("kv_compression", "tests", "benchmarks", "results"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, copy)
    shutil.copy(ROOT / "LICENSE", copy)
    program = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", program], cwd=copy, check=True, capture_output=True)
    return next(copy.glob("*.whl"))


def test_the_wheel_holds_the_package_its_license_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        metadata = email.message_from_bytes(file.read(next(name for name in names if name.endswith("/METADATA"))))
    about = [name for name in names if ".dist-info/" in name]
    assert {*names} - {*about} == {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "kv_compression").rglob("*.py")
    }
    assert any(name.endswith("/LICENSE") for name in about)
    assert (metadata["Name"], metadata["License-Expression"]) == ("kv-compression", "Apache-2.0")
    assert metadata["Requires-Python"] == ">=3.11"
    required = [name for name in metadata.get_all("Requires-Dist") if "extra ==" not in name]
    assert required == PROJECT["dependencies"]
    assert {*metadata.get_all("Provides-Extra")} == {"embedded", "phrases", "reports", "scores", "sweep"}


def test_the_wheel_is_imported_from_anywhere(wheel, tmp_path):
    program = "import kv_compression; print(kv_compression.__file__)"
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(wheel)), done.stderr


def test_the_scripts_and_the_package_ask_for_the_same():
    needed = re.search(r'^needed="(.*)"', (ROOT / "environment.sh").read_text(), re.MULTILINE)[1]
    assert needed.split() == PROJECT["dependencies"]


def third_party(module: str, seen: set[str]) -> set[str]:
    """What a module of the package imports from elsewhere when it is imported, by way of others of the package too."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if module in seen or not path.is_file():  # a package, or a name in a module
        return set()
    seen.add(module)
    found = set()
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            first = name.partition(".")[0]
            found |= third_party(name, seen) if first == "kv_compression" else {first}
    return found - {*sys.stdlib_module_names}


def test_the_public_surface_needs_no_optional_package():
    dependencies = {re.split("[>=]", name)[0] for name in PROJECT["dependencies"]}
    assert third_party("kv_compression.api", set()) <= dependencies
    assert third_party("kv_compression.training.run", set()) <= dependencies
    assert "matplotlib" in third_party("kv_compression.reporting.drawing", set()) - dependencies  # that this finds any


def test_the_paper_and_the_software_are_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "type"} <= {*citation}
    assert (citation["license"], PROJECT["license"]) == ("Apache-2.0", "Apache-2.0")
    paper = citation["preferred-citation"]
    assert (paper["title"], paper["url"]) == (model_card.PAPER, model_card.ADDRESS)
    assert [author["family-names"] for author in paper["authors"]] == ["Ren", "Jia", "Zhu"]
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
