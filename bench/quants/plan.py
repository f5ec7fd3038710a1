"""What is to be made and measured, and whether there is room for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava_edge.bench.models import LLM_TYPES, Subject
from llava_edge.bench.quality.data import Data
from llava_edge.bench.quality.measure import QualitySettings
from llava_edge.bench.speed.measure import SpeedSettings
from llava_edge.convert.quantize import MMPROJ_TYPES, check_type
from llava_edge.errors import InputError

DEFAULT_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K")
# Bits a weight, rounded up; a tensor that falls back takes more, so that the greatest is assumed for the others.
_BITS = {"F32": 32.0, "F16": 16.1, "BF16": 16.1, "Q6_K": 6.9, "Q5_K_M": 6.2, "Q5_K_S": 6.2, "Q4_0": 5.2}
_MOST_BITS = 8.6


@dataclass(frozen=True)
class Variant:
    """A pair of types."""

    llm_type: str
    mmproj_type: str

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"{self.llm_type}-{self.mmproj_type}"


REFERENCE = Variant("F16", "F16")


@dataclass(frozen=True)
class QuantsSettings:
    """What to measure of which types. ``memory_limit_bytes`` is what one of the recommendations asks for."""

    types: tuple[str, ...] = DEFAULT_TYPES
    mmproj_types: tuple[str, ...] = ("Q8_0",)
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    quality: QualitySettings = field(default_factory=QualitySettings)
    memory_limit_bytes: int = 4 * 10**9

    def __post_init__(self) -> None:
        for name, choices in (("types", LLM_TYPES), ("mmproj_types", MMPROJ_TYPES)):
            given = getattr(self, name)
            if not given:
                raise InputError(f"{name} is empty; expected some of {', '.join(choices)}")
            object.__setattr__(self, name, tuple(dict.fromkeys(check_type(kind, choices) for kind in given)))

    @property
    def variants(self) -> list[Variant]:
        """All pairs, language models of one type together. The reference is measured first, asked for or not."""
        pairs = [Variant(llm, mmproj) for llm in self.types for mmproj in self.mmproj_types]
        return list(dict.fromkeys([REFERENCE, *pairs]))

    def facts(self, data: Data | None) -> dict[str, Any]:
        """The settings for the record."""
        samples = {"data": data.source, "data_sha256": data.sha256, "samples": len(data.samples)} if data else {}
        return {**asdict(self), **({} if data else {"quality": None}), **samples}


def check_space(settings: QuantsSettings, reference: Subject, data: Data | None, folder: Path, *, keep: bool) -> None:
    """Refuse to begin what would end with a full disk."""
    sizes = {file.role: file.bytes for file in reference.bundle.manifest.files}
    models = [sizes["llm"] * _share(kind) for kind in settings.types if kind != "F16"]
    needed = sum(models) if keep else max(models, default=0)
    needed += sum(sizes["mmproj"] * _share(kind) for kind in settings.mmproj_types if kind != "F16")
    if reference.bundle.directory.stat().st_dev != folder.stat().st_dev:
        needed += sum(sizes.values())  # no links across file systems
    if data is not None:
        needed += _cache_bytes(settings, reference, data)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"about {needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free",
            hint="Make room, choose another --output, or fewer types and samples.",
        )


def _share(kind: str) -> float:
    return _BITS.get(kind, _MOST_BITS) / 16


def _cache_bytes(settings: QuantsSettings, reference: Subject, data: Data) -> float:
    """Reference logits as float16 and embeddings as float32, for each tower."""
    table = next(t for t in reference.weights["llm"].tensors if t.name == "token_embd.weight")
    width, vocabulary = table.shape
    turns: Sequence[int] = [len(sample.turns) for sample in data.samples] or [0]
    tokens = sum(turns) * settings.quality.answer_tokens
    embeddings = len(data.samples) * reference.image_tokens * width * 4 * (len(settings.mmproj_types) + 1)
    return tokens * vocabulary * 2 + embeddings
