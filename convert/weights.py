"""Tensors of a checkpoint by one set of names, read from disk one at a time as float32.

Formats and releases write different names; here they are always ``language_model.`` (``embed_tokens``, ``layers.N``,
``norm``), ``lm_head.``, ``vision_tower.``, ``projector.N.`` and ``image_newline``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")

# Old beginnings of names, and the one that stands here for them; the first that fits is taken.
_PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "language_model."),
    ("vision_tower.vision_tower.", "vision_tower."),
    ("multi_modal_projector.linear_1.", "projector.0."),
    ("multi_modal_projector.linear_2.", "projector.1."),
    ("layers.", "language_model.layers."),
    ("embed_tokens.", "language_model.embed_tokens."),
    ("norm.", "language_model.norm."),
)
_MM_PROJECTOR = re.compile(r"mm_projector\.(?:(\d+)\.)?(weight|bias)\Z")


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: where it is, its shape, and how to read it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]


class Weights:
    """The tensors of a checkpoint. Every one has to be taken, or left out on purpose."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = dict(stored)
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self, prefix: str) -> list[str]:
        """The names that start with ``prefix``."""
        return sorted(name for name in self._stored if name.startswith(prefix))

    def stored(self, name: str) -> Stored:
        """Where a tensor is. InputError if the checkpoint lacks it."""
        try:
            return self._stored[name]
        except KeyError:
            raise InputError(
                f"the checkpoint has no tensor {name}",
                hint="A file of it is missing, or its config.json is of another.",
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self.stored(name).shape

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """InputError, by file and tensor, if the shape is not what the configuration says."""
        found = self.stored(name)
        if found.shape != expected:
            raise InputError(
                f"{found.file}: the tensor {found.name} has the shape {list(found.shape)}; "
                f"config.json says {list(expected)}",
                hint="config.json and the weights are of two models.",
            )

    def take(self, name: str) -> NDArray[np.float32]:
        """A tensor in float32. InputError if it is missing, can't be read or holds values that are not finite."""
        import torch

        found = self.stored(name)
        self._taken.add(name)
        try:
            tensor = found.load().to(torch.float32)
        except Exception as error:  # the readers of damaged files fail in every way
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{found.file}: can't read the tensor {found.name}: {error}", hint="Get the file again."
            ) from None
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{found.file}: the tensor {found.name} holds values that are not finite", hint="The training diverged."
            )
        array: NDArray[np.float32] = tensor.contiguous().numpy()
        return array

    def leave(self, *names: str) -> None:
        """Say that these are left out on purpose."""
        self._taken.update(names)

    def require_all_used(self) -> None:
        """InputError if a tensor was neither written nor left out on purpose: the file would be another model."""
        left = sorted(set(self._stored) - self._taken)
        if left:
            raise InputError(f"the checkpoint has {len(left)} tensors that don't fit its config.json, first {left[0]}")


def plain_name(name: str) -> str:
    """One name for a tensor, whichever format or release of transformers wrote it."""
    name = name.removeprefix("model.")
    for old, new in _PREFIXES:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if found := _MM_PROJECTOR.match(name):
        # nn.Sequential counts the activations between the linear layers
        return f"projector.{int(found[1] or 0) // 2}.{found[2]}"
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def read_directory(directory: Path) -> dict[str, Stored]:
    """All tensors of a directory under their names here, from safetensors or ``.bin`` files, one or several."""
    found: dict[str, Stored] = {}
    for path, expected in tensor_files(directory):
        tensors = read_file(path)
        if lost := sorted(set(expected) - set(tensors)):
            raise InputError(
                f"{path} lacks {len(lost)} tensors that the index lists, first {lost[0]}", hint="Get the file again."
            )
        found.update({plain_name(name): tensor for name, tensor in tensors.items()})
    return found


def tensor_files(directory: Path) -> list[tuple[Path, Sequence[str]]]:
    """The files with a checkpoint's tensors, and the names that the index says are in each."""
    for name in INDEXES:
        if (directory / name).is_file():
            return _indexed(directory / name)
    for name in SINGLES:
        if (directory / name).is_file():
            return [(directory / name, ())]
    raise InputError(
        f"{directory} has no {SINGLES[0]}",
        hint=f"Expected one of {', '.join((*SINGLES, *INDEXES))} beside config.json.",
    )


def _indexed(index: Path) -> list[tuple[Path, Sequence[str]]]:
    where = read_json(index).get("weight_map")
    files = sorted(set(where.values())) if isinstance(where, dict) and where else []
    if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
        raise InputError(f"{index} names no files of its own directory in weight_map")
    assert isinstance(where, dict)
    return [(index.parent / file, [name for name, of in where.items() if of == file]) for file in files]


def read_file(path: Path) -> dict[str, Stored]:
    """The tensors of one file by their own names. Nothing of it is kept in memory, and no code in it is run."""
    if not path.is_file():
        raise InputError(f"{path} is missing", hint="Get the whole checkpoint.")
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except Exception as error:  # the readers of damaged files fail in every way
        raise InputError(f"can't read {path}: {error}", hint="The file is damaged; get it again.") from None


def _read_safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import safe_open

    file: Any = safe_open(path, framework="pt")
    names = file.keys()
    return {name: Stored(path, name, tuple(file.get_slice(name).get_shape()), _getter(file, name)) for name in names}


def _getter(file: Any, name: str) -> Callable[[], torch.Tensor]:
    return lambda: file.get_tensor(name)


def _read_pickle(path: Path) -> dict[str, Stored]:
    import zipfile

    import torch

    # Only files in torch's zip format can be mapped; the older ones have to be read as a whole.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError("it holds no dictionary of tensors")
    return {name: Stored(path, name, tuple(value.shape), _constant(value)) for name, value in state.items()}


def _constant(value: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. InputError says what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path.parent} is not a checkpoint: it has no {path.name}",
            hint="Name the directory that holds config.json and the weights.",
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"can't read {path}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value
