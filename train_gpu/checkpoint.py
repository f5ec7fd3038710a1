"""Training state and finished checkpoints on disk: a kill at any moment leaves the old or the new, never half of one.

A state is a folder ``step-00000120``. It is written under a temporary name, every file is brought to the disk, the
folder is renamed, and last of all the file ``last`` is replaced, which names it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_edge import files
from llava_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

MARKER = "last"
DESCRIPTION = "llava_edge.json"


def write_text(path: Path, text: str) -> None:
    """Replace a small file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    files.sync(partial)
    partial.replace(path)
    files.sync(path.parent)


def partial_state(run: Path, step: int) -> Path:
    """The folder to write the state of a step to; :func:`commit_state` gives it its name."""
    return run / f"step-{step:08d}.partial"


def begin_state(run: Path, step: int) -> None:
    """Make :func:`partial_state`, and clear away what stopped saves left."""
    run.mkdir(parents=True, exist_ok=True)
    for left in run.glob("step-*.partial"):
        shutil.rmtree(left)
    partial_state(run, step).mkdir()


def commit_state(run: Path, step: int, keep: int) -> None:
    """Make a written state the last one, and remove all but the last ``keep``."""
    partial = partial_state(run, step)
    for file in partial.rglob("*"):
        if file.is_file():
            files.sync(file)
    files.sync(partial)
    final = partial.with_suffix("")
    files.replace_directory(partial, final)  # one of this step may be there from before the run went back
    write_text(run / MARKER, final.name + "\n")
    for old in sorted(run.glob("step-????????"))[:-keep]:
        shutil.rmtree(old)


def last_state(run: Path) -> Path:
    """The folder of the last whole state."""
    try:
        state = run / (run / MARKER).read_text().strip()
    except FileNotFoundError:
        raise InputError(f"nothing to resume: {run} has no saved state", hint="Start without --resume.") from None
    files.recover_directory(state)
    if not state.is_dir():
        raise InputError(f"nothing to resume: {run / MARKER} names {state.name}, which is not there")
    return state


def load(path: Path) -> dict[str, Any]:
    """A file of tensors and plain values."""
    try:
        values: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise InputError(f"the saved state has no {path.name}: {path}") from None
    return values


def spare_other(directory: Path) -> None:
    """InputError if a checkpoint can't be written to a folder without replacing something that is none."""
    if directory.exists() and not (directory / DESCRIPTION).is_file():
        raise InputError(f"{directory} is there already, and is no checkpoint", hint="Name another folder.")


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
    save_tokenizer(partial, tokenizer)
    (partial / DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    if recipe is not None:
        (partial / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    for file in partial.iterdir():
        files.sync(file)
    files.replace_directory(partial, directory)


def save_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer with all that it is made of when it is read again."""
    if hasattr(tokenizer, "legacy"):  # where LLaMA's puts blanks; transformers forgets to write it
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    tokenizer.save_pretrained(directory)


def read_description(directory: Path) -> dict[str, Any]:
    """``llava_edge.json`` of a checkpoint."""
    path = directory / DESCRIPTION
    if not path.is_file():
        raise InputError(
            f"{directory} has no {DESCRIPTION}", hint="Name a checkpoint that llava-edge trained or prepared."
        )
    description: dict[str, Any] = json.loads(path.read_text())
    return description
