"""``recipe.json``: what a run was made of, kept beside its states and its weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from llava_edge.train_gpu import checkpoint

if TYPE_CHECKING:
    from llava_edge.train_gpu.config import Recipe

log = logging.getLogger(__name__)


def warn_of_changes(directory: Path, recipe: Recipe) -> None:
    """Say which values of a resumed run's recipe are not those that it began with."""
    try:
        before = json.loads((directory / "recipe.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return
    now = json.loads(json.dumps(recipe.to_dict()))
    changed = sorted(name for name, value in now.items() if name in before and before[name] != value)
    if changed:
        log.warning("resumed with another recipe than the run began with; changed: %s", ", ".join(changed))


def write(directory: Path, recipe: Recipe, world: int) -> None:
    """``recipe.json``: the resolved recipe, the versions, and the hashes of the files of samples."""
    paths = [recipe.data.samples] if recipe.data.samples else [s.path for s in recipe.data.sources.values()]
    hashes = {}
    for path in sorted(file for pattern in paths for file in _files(pattern)):
        with path.open("rb") as file:
            hashes[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    names = ("torch", "transformers", "accelerate", "peft", "numpy")
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
    record = {**recipe.to_dict(), "versions": versions, "data_sha256": hashes, "processes": world}
    checkpoint.write_text(directory / "recipe.json", json.dumps(record, indent=2) + "\n")


def _files(pattern: str) -> list[Path]:
    path = Path(pattern)
    return [path] if path.is_file() else sorted(path.parent.glob(path.name))
