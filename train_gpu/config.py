"""A recipe: what a run trains on, how, and for how long. TOML in, unknown keys refused, saved beside the weights."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from llava_edge.errors import InputError

Stage = Literal["align", "finetune"]


@dataclass(frozen=True)
class DataConfig:
    """``samples`` is LLaVA JSON by source; ``weights`` says how often a source is drawn, by its name.

    ``branches`` is the most samples of one picture that share a reading of it. ``image_tokens`` and their
    ``image_token_weights`` are the counts that the pooled grid is drawn from, one a batch (arXiv 2405.17430).
    """

    samples: str
    features: str
    weights: dict[str, float]
    branches: int = 3
    image_tokens: tuple[int, ...] = (256, 64, 16)
    image_token_weights: tuple[float, ...] = (0.1, 0.6, 0.3)

    def __post_init__(self) -> None:
        if len(self.image_tokens) != len(self.image_token_weights):
            raise InputError("data.image_tokens and data.image_token_weights differ in length")
        if self.branches < 1:
            raise InputError(f"data.branches is {self.branches}; expected at least 1")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on all linear layers of the LLM; ``rank`` 0 leaves the LLM frozen."""

    rank: int = 0
    alpha: int = 0
    dropout: float = 0.0


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a cosine schedule. The run ends after ``steps``, or earlier when ``max_minutes`` are over.

    The schedule follows whichever of the two is further on, so a run that time cuts short still ends annealed.
    """

    steps: int
    lr: float
    projector_lr: float | None = None
    batch_size: int = 16
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "batch_size"):
            if getattr(self, name) <= 0:
                raise InputError(f"optim.{name} is {getattr(self, name)}; expected a number above 0")


@dataclass(frozen=True)
class Recipe:
    """One stage of training, from the checkpoint ``init`` to the checkpoint ``output``."""

    stage: Stage
    init: str
    output: str
    data: DataConfig
    optim: OptimConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    seed: int = 0
    log_every: int = 10
    save_every: int = 100

    def __post_init__(self) -> None:
        if self.stage not in ("align", "finetune"):
            raise InputError(f"stage is {self.stage!r}; expected align or finetune")
        if self.stage == "align" and self.lora.rank:
            raise InputError("stage align trains the projector only; set lora.rank to 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are saved beside the weights."""
        return asdict(self)


_SECTIONS: dict[str, Any] = {"data": DataConfig, "optim": OptimConfig, "lora": LoraConfig}


def _make(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where or 'the recipe'} is not a table")
    known = {f.name for f in fields(kind)}
    for key in values:
        if key not in known:
            raise InputError(f"unknown key {where}{key}", hint=f"Known keys: {', '.join(sorted(known))}.")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise InputError(f"{where or 'the recipe'}: {error}") from None


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a TOML recipe; ``overrides`` are ``section.key=value`` with TOML values."""
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"no such recipe: {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    for override in overrides:
        _override(values, override)
    for name, kind in _SECTIONS.items():
        if name in values:
            values[name] = _make(kind, values[name], f"{name}.")
    recipe: Recipe = _make(Recipe, values, "")
    return recipe


def _override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign:
        raise InputError(f"--set {override!r} has no '='; expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {override!r}: {section} is not a section")
    values[last] = value
