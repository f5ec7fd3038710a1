"""What is to be made and measured, and whether there is room for it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.bench.models import LLM_TYPES, Subject
from llava_edge.bench.quality.data import Data
from llava_edge.bench.quality.measure import QualitySettings
from llava_edge.bench.speed.measure import SpeedSettings
from llava_edge.bundle import Backend, Bundle, Manifest, Role
from llava_edge.convert.parity import mtmd_defect
from llava_edge.convert.quantize import MMPROJ_TYPES, check_type
from llava_edge.errors import InputError
from llava_edge.quant_types import VISION_TYPES
from llava_edge.vision.backends import ROLE_OF

if TYPE_CHECKING:
    from llava_edge.convert.checkpoint import Checkpoint

DEFAULT_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K")
ONNX_TYPES = tuple(kind for kind in VISION_TYPES if kind != "none")
MADE = ("parts", "bundles", "cache")  # folders of files that can be made again
# Bits a weight of 16, rounded up; a tensor that falls back takes more, so that the greatest is assumed for the others.
_BITS = {"F32": 32.0, "F16": 16.1, "BF16": 16.1, "Q6_K": 6.9, "Q5_K_M": 6.2, "Q5_K_S": 6.2, "Q4_0": 5.2, "int8": 4.3}
_MOST_BITS = 8.6


@dataclass(frozen=True)
class Tower:
    """A file that pictures are read with, ``mmproj`` or ``vision_onnx``, in a type."""

    role: Role
    type: str

    @property
    def backend(self) -> Backend:
        """What runs it."""
        return "mtmd" if self.role == "mmproj" else "onnx"


@dataclass(frozen=True)
class Variant:
    """A type of the language model, and a vision tower."""

    llm_type: str
    tower: Tower

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.llm_type}-{self.tower.type}"

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.llm_type} / {self.tower.type}"


@dataclass(frozen=True)
class QuantsSettings:
    """What to measure of which types. ``memory_limit_bytes`` is what one of the recommendations asks for.

    Towers of no type at all are those that the bundle's backends suggest.
    """

    types: tuple[str, ...] = DEFAULT_TYPES
    mmproj_types: tuple[str, ...] = ()
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    quality: QualitySettings = field(default_factory=QualitySettings)
    memory_limit_bytes: int = 4 * 10**9
    vision_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = (("types", LLM_TYPES), ("mmproj_types", MMPROJ_TYPES), ("vision_types", ONNX_TYPES))
        for name, choices in known:
            given = getattr(self, name)
            if not given and name == "types":
                raise InputError(f"{name} is empty; expected some of {', '.join(choices)}")
            object.__setattr__(self, name, tuple(dict.fromkeys(check_type(kind, choices) for kind in given)))

    def facts(self, data: Data | None) -> dict[str, Any]:
        """The settings for the record."""
        samples = {"data": data.source, "data_sha256": data.sha256, "samples": len(data.samples)} if data else {}
        return {**asdict(self), "speed": self.speed.facts, **({} if data else {"quality": None}), **samples}


def reference_tower(manifest: Manifest) -> Tower:
    """The tower without quantisation that the reference reads pictures with: that of its best backend."""
    types = {file.role: file.type for file in manifest.files}
    role = next(ROLE_OF[name] for name in manifest.backends if name in ROLE_OF)
    return Tower(role, types[role])


def towers(settings: QuantsSettings, bundle: Bundle) -> list[Tower]:
    """The towers that are asked for, or where none are, those that the bundle's backends suggest and that are right.

    Raises
    ------
    InputError
        A tower that the bundle has no file for, that no backend of the bundle runs, or that llama.cpp reads wrongly.
    """
    manifest = bundle.manifest
    defect = mtmd_defect(bundle) if bundle.has("mmproj") else None
    run = {ROLE_OF[name] for name in manifest.backends if name in ROLE_OF}
    asked: list[tuple[Role, Sequence[str]]] = [
        ("vision_onnx", settings.vision_types),
        ("mmproj", settings.mmproj_types),
    ]
    if not any(kinds for _, kinds in asked):
        asked = [("vision_onnx", ONNX_TYPES), ("mmproj", () if defect and "vision_onnx" in run else ("Q8_0",))]
        asked = [(role, kinds) for role, kinds in asked if role in run]
    for role, kinds in asked:
        if kinds and role not in run:
            raise InputError(
                f"{manifest.name} runs with {', '.join(manifest.backends)}: another {role} would change nothing",
                hint="Leave --mmproj-types away." if role == "mmproj" else "Convert the checkpoint with --vision fp32.",
            )
        if kinds and role == "mmproj" and defect:
            raise InputError(
                f"{manifest.name} can't be measured with its mmproj: {defect}",
                hint="Leave --mmproj-types away." if "vision_onnx" in run else "Convert with --vision fp32.",
            )
    return [Tower(role, kind) for role, kinds in asked for kind in kinds]


def variants(settings: QuantsSettings, bundle: Bundle) -> list[Variant]:
    """Every type with every tower, language models of one type together; the reference first, asked for or not."""
    pairs = [Variant(llm, tower) for llm in settings.types for tower in towers(settings, bundle)]
    return list(dict.fromkeys([Variant("F16", reference_tower(bundle.manifest)), *pairs]))


def check_space(
    settings: QuantsSettings,
    todo: Sequence[Variant],
    reference: Subject,
    data: Data | None,
    folder: Path,
    *,
    keep: bool,
) -> None:
    """Refuse to begin what would end with a full disk. What a stopped run has made in ``folder`` is room as well.

    ``todo`` are the variants that are to be measured yet: without ``keep`` nothing is left of the others. For several
    passes all of them are there together.
    """
    sizes = {file.role: file.bytes for file in reference.bundle.manifest.files}
    types = settings.types if keep else {variant.llm_type for variant in todo}
    models = [sizes["llm"] * _share(kind) for kind in types if kind != "F16"]
    together = keep or settings.speed.passes > 1
    needed = sum(models) if together else max(models, default=0)
    wanted = towers(settings, reference.bundle)
    needed += sum(sizes[tower.role] * _share(tower.type) for tower in wanted if tower.type not in ("F16", "fp32"))
    if reference.bundle.directory.stat().st_dev != folder.stat().st_dev:  # no links: each bundle has a copy
        kept = [{"llm": variant.llm_type, variant.tower.role: variant.tower.type} for variant in todo]
        copied = [sum(f.bytes for f in reference.bundle.manifest.files if each.get(f.role) == f.type) for each in kept]
        needed += sum(copied) if together else max(copied, default=0) * len(wanted)
    if data is not None:
        needed += _cache_bytes(settings, reference, data)
    check_room(needed - _made_bytes(folder, reference.bundle), folder)


def conversion_bytes(settings: QuantsSettings, checkpoint: Checkpoint) -> float:
    """What a checkpoint's conversion to floats takes, and the types that are made of it and are there together.

    A tower is written twice and once as float32, but is small beside the language model.
    """
    weights = checkpoint.open_weights()
    elements = sum(math.prod(weights.shape(name)) for name in weights.names(""))
    shares = [_share(kind) for kind in settings.types if kind != "F16"]
    return elements * 2 * (1 + (sum(shares) if settings.speed.passes > 1 else max(shares, default=0)))


def check_room(needed: float, folder: Path) -> None:
    """InputError where a folder's file system has less than so many bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"about {needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free",
            hint="Make room, choose another --output, or fewer types and samples.",
        )


def _made_bytes(folder: Path, reference: Bundle) -> int:
    """Bytes of the files that a run leaves on the way; a link to a file of the reference takes none."""
    states = [path.stat() for name in MADE for path in (folder / name).rglob("*") if path.is_file()]
    sizes = {(state.st_dev, state.st_ino): state.st_size for state in states}
    for file in reference.manifest.files:
        state = (reference.directory / file.path).stat()
        sizes.pop((state.st_dev, state.st_ino), None)
    return sum(sizes.values())


def _share(kind: str) -> float:
    return _BITS.get(kind, _MOST_BITS) / 16


def _cache_bytes(settings: QuantsSettings, reference: Subject, data: Data) -> float:
    """Reference logits as float16 and embeddings as float32, for each tower."""
    table = next(t for t in reference.weights["llm"].tensors if t.name == "token_embd.weight")
    width, vocabulary = table.shape
    turns: Sequence[int] = [len(sample.turns) for sample in data.samples] or [0]
    tokens = sum(turns) * settings.quality.answer_tokens
    embeddings = len(data.samples) * reference.image_tokens * width * 4 * (len(towers(settings, reference.bundle)) + 1)
    return tokens * vocabulary * 2 + embeddings
