"""LoRA checkpoints: an adapter of peft, and the tensors that were trained whole, merged into the base as it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.convert.checkpoint import Checkpoint, Options
from llava_edge.convert.tower import unsupported
from llava_edge.convert.weights import Stored, plain_name, read_directory, read_file, read_json
from llava_edge.errors import InputError

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE = "non_lora_trainables.bin"
# Fields of peft that change what the merged weight is, and the only values that are understood.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}


def is_adapter(directory: Path) -> bool:
    """Whether the directory holds an adapter instead of a whole model."""
    return (directory / CONFIG).is_file()


def open_adapter(directory: Path, options: Options) -> Checkpoint:
    """The base with the adapter merged into it, in either format."""
    from llava_edge.convert import hf_format, original_format

    adapter = read_json(directory / CONFIG)
    for field, known in _PLAIN.items():
        if adapter.get(field) not in known:
            raise unsupported(f"{CONFIG}: {field}", adapter.get(field), known[0])
    base = _base(adapter, options)
    own = (directory / "config.json").is_file()
    raw = read_json((directory if own else base) / "config.json")
    has_tokenizer = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))

    def read() -> dict[str, Stored]:
        return merged(read_directory(base), directory, adapter)

    if original_format.is_original(raw):
        tokens = directory if has_tokenizer else base
        return original_format.open_original(directory, raw, options, read=read, tokenizer_directory=tokens)
    return hf_format.open_hf(base, read_json(base / "config.json"), options, read=read, name=directory.resolve().name)


def merged(base: Mapping[str, Stored], directory: Path, adapter: Mapping[str, Any]) -> dict[str, Stored]:
    """The base's tensors, those that were trained whole in their place, and every low-rank product added."""
    found = dict(base)
    if (directory / WHOLE).is_file():
        whole = read_file(directory / WHOLE)
        found.update({plain_name(_unwrapped(name)): tensor for name, tensor in whole.items()})
    rank = adapter.get("r")
    alpha = adapter.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        raise InputError(f"{directory / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; expected numbers")
    scale = alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)
    for name, (down, up) in _pairs(directory).items():
        if name not in found:
            raise InputError(f"the adapter changes {name}, which the base model lacks", hint="Is --base the right one?")
        target = found[name]
        if target.shape != (up.shape[0], down.shape[1]) or up.shape[1] != down.shape[0]:
            raise InputError(
                f"{up.file}: the adapter of {name} is for {[up.shape[0], down.shape[1]]}; the base has "
                f"{list(target.shape)}",
                hint="Is --base the right one?",
            )
        found[name] = Stored(target.file, target.name, target.shape, _sum(target, down, up, scale))
    return found


def _sum(target: Stored, down: Stored, up: Stored, scale: float) -> Callable[[], torch.Tensor]:
    return lambda: target.load().float() + scale * (up.load().float() @ down.load().float())


def _pairs(directory: Path) -> dict[str, tuple[Stored, Stored]]:
    """Matrices A ``[r, in]`` and B ``[out, r]`` by the name of the weight that they change."""
    path = next((directory / name for name in ADAPTERS if (directory / name).is_file()), None)
    if path is None:
        raise InputError(f"{directory} has neither {' nor '.join(ADAPTERS)}", hint="Get the whole checkpoint.")
    halves: dict[str, dict[str, Stored]] = {}
    for name, tensor in read_file(path).items():
        module, mark, rest = _unwrapped(name).rpartition(".lora_")
        letter = rest.split(".")[0]
        if not mark or letter not in ("A", "B"):
            raise InputError(f"{path}: the tensor {name} is no part of a plain LoRA adapter")
        halves.setdefault(plain_name(f"{module}.weight"), {})[letter] = tensor
    if lacking := [name for name, pair in halves.items() if len(pair) != 2]:
        raise InputError(f"{path} has only half an adapter for {lacking[0]}")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def _unwrapped(name: str) -> str:
    """Without what peft, and the original code's model inside it, put in front."""
    name = name.removeprefix("base_model.model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def _base(adapter: Mapping[str, Any], options: Options) -> Path:
    path = options.base or Path(str(adapter.get("base_model_name_or_path")))
    if not (path / "config.json").is_file():
        raise InputError(
            f"the adapter's base model is not here: {path}", hint="Name the base model's directory with --base."
        )
    return path
