"""The installed package: its files, its layers, and what importing it costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import llava_edge

PACKAGE = Path(llava_edge.__file__).parent
PARTS = ("convert", "bench", "train_gpu")
HEAVY = ("torch", "transformers", "onnxruntime", "llama_cpp", "huggingface_hub", "rich", "click")


def imported_names(path: Path) -> set[str]:
    """Absolute names of every module that a file imports, at the top or in a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
            names.add(node.module)
    return names


def modules(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.py") if "__pycache__" not in path.parts]


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, llava_edge; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_is_there():
    for name in llava_edge.__all__:
        assert getattr(llava_edge, name) is not None
    assert set(llava_edge.__all__) <= set(dir(llava_edge))


@pytest.mark.parametrize("part", ["", *PARTS])
def test_every_part_is_installed(part):
    assert (resources.files("llava_edge") / part / "__init__.py").is_file()


def test_types_recipes_and_licence_are_installed():
    root = resources.files("llava_edge")
    assert (root / "py.typed").is_file()
    assert [path.name for path in (root / "train_gpu" / "recipes").iterdir() if path.name.endswith(".toml")]
    assert "Apache License" in (metadata.distribution("llava-edge").read_text("licenses/LICENSE") or "")


def test_the_runtime_needs_neither_the_other_parts_nor_their_libraries():
    own = [path for path in modules(PACKAGE) if path.relative_to(PACKAGE).parts[0] not in (*PARTS, "cli")]
    forbidden = (*(f"llava_edge.{part}" for part in PARTS), "torch", "transformers", "onnx.", "click")
    for path in own:
        assert not [n for n in imported_names(path) if f"{n}.".startswith(forbidden)], path


@pytest.mark.parametrize("part", PARTS)
def test_the_other_parts_know_the_runtime_and_not_each_other(part):
    others = [p for p in PARTS if p != part and (part, p) != ("bench", "convert")]
    for path in modules(PACKAGE / part):
        assert not [n for n in imported_names(path) if n.startswith(tuple(f"llava_edge.{p}" for p in others))], path


@pytest.mark.parametrize("lock", ["test", "runtime"])
def test_the_lock_has_a_hashed_version_that_fits_every_requirement(lock):
    """Not those of the test's environment: they may be newer, and are what a person gets who installs today."""
    root = Path(__file__).resolve().parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = list(project["dependencies"])
    for extra in extras if lock == "test" else ("heic", "serve"):
        wanted += [text for text in extras[extra] if not text.startswith("llava-edge")]
    locked: dict[str, set[str]] = {}
    text = (root / ".ci" / "lock" / f"{lock}.txt").read_text(encoding="utf-8")
    for found in re.finditer(r"^([a-z0-9][\w.-]*)==(\S+)(.*(?:\n    .*)*)", text, re.MULTILINE):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", found[3]), found[1]
        locked.setdefault(found[1], set()).add(found[2])
    for text in wanted:
        requirement = Requirement(text)
        versions = locked[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(version) for version in versions), (text, versions)
