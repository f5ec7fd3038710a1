"""Training state and finished checkpoints on disk. Everything is written to a temporary name and renamed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_edge import files
from llava_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

STATE = "state.pt"
DESCRIPTION = "llava_edge.json"


def save_state(directory: Path, state: dict[str, Any]) -> None:
    """Replace the training state of a run: a kill at any moment leaves the old or the new one."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{STATE}.partial"
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / STATE)
    files.sync(directory)


def load_state(directory: Path) -> dict[str, Any]:
    """The state that :func:`save_state` wrote."""
    path = directory / STATE
    if not path.is_file():
        raise InputError(f"nothing to resume: {path} does not exist", hint="Start without --resume.")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def save_checkpoint(
    directory: Path,
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    description: dict[str, Any],
    recipe: dict[str, Any] | None = None,
) -> None:
    """Write a whole checkpoint in Hugging Face format, with what convert needs to know in ``llava_edge.json``."""
    files.recover_directory(directory)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    if recipe is not None:
        (partial / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    for path in partial.iterdir():
        files.sync(path)
    files.replace_directory(partial, directory)


def read_description(directory: Path) -> dict[str, Any]:
    """``llava_edge.json`` of a checkpoint."""
    path = directory / DESCRIPTION
    if not path.is_file():
        raise InputError(f"{directory} has no {DESCRIPTION}", hint="Make the starting checkpoint with `prepare`.")
    description: dict[str, Any] = json.loads(path.read_text())
    return description
