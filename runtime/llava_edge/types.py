"""Records that the parts of llava-edge hand to each other. All are frozen and checked when they are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from llava_edge.errors import InputError

FitMode = Literal["pad", "crop", "squash", "anyres"]
FIT_MODES: tuple[FitMode, ...] = ("pad", "crop", "squash", "anyres")
MAX_TILES = 16  # a side
MAX_GRID_PIXELS = 1 << 24  # of all tiles together
MAX_GRIDS = 128


def within(value: Any, kind: type[Any], low: float, high: float) -> bool:
    """Whether it is a number of this kind and between the limits."""
    return isinstance(value, kind) and bool(low <= value <= high)


@dataclass(frozen=True)
class ImageSpec:
    """How a vision tower wants its pictures.

    ``size`` is the side in pixels; ``mean`` and ``std`` are per channel (RGB) for values from 0 to 1. ``grid`` is for
    ``anyres`` (LLaVA-NeXT): the widths and heights, in pixels, to one of which a picture is fitted and cut into tiles.
    ``max_tiles`` is LLaVA-OneVision's: what the tiles show is scaled down to about so many tiles' tokens; 0 never does.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: FitMode = "pad"
    pad_color: tuple[int, int, int] = (0, 0, 0)
    grid: tuple[tuple[int, int], ...] = ()
    max_tiles: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 4096:
            raise InputError(f"image.size is {self.size}; expected 1 to 4096 pixels")
        if self.mode not in FIT_MODES:
            raise InputError(f"image.mode is {self.mode!r}; expected one of {', '.join(FIT_MODES)}")
        if min(self.std) <= 0:
            raise InputError(f"image.std is {list(self.std)}; every value must be above 0")
        if (self.mode == "anyres") != bool(self.grid):
            raise InputError(f"image.grid has {len(self.grid)} entries; mode anyres needs some, the others none")
        if self.max_tiles < 0 or (self.max_tiles and self.mode != "anyres"):
            raise InputError(f"image.max_tiles is {self.max_tiles}; expected 1 or more with mode anyres, 0 otherwise")
        if len(self.grid) > MAX_GRIDS:
            raise InputError(f"image.grid has {len(self.grid)} entries; expected at most {MAX_GRIDS}")
        for pair in self.grid:
            if any(edge < 1 or edge % self.size or edge > MAX_TILES * self.size for edge in pair):
                raise InputError(
                    f"image.grid has {list(pair)}; expected 1 to {MAX_TILES} times image.size = {self.size}"
                )
            if pair[0] * pair[1] > MAX_GRID_PIXELS:
                raise InputError(f"image.grid has {list(pair)}; expected at most {MAX_GRID_PIXELS:,} pixels in all")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy and the same every time.

    ``top_p``, ``top_k`` and ``min_p`` narrow the choice at temperatures above 0; 1, 0 and 0 switch them off.
    ``seed`` None draws a new seed for each answer.
    """

    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0, 100), ("top_p", 0, 1), ("min_p", 0, 1)):
            value = getattr(self, name)
            if not within(value, Real, low, high):
                raise InputError(f"{name} is {value!r}; expected a number from {low} to {high}")
        if not within(self.top_k, Integral, 0, 1 << 31):
            raise InputError(f"top_k is {self.top_k!r}; expected a whole number from 0 to 2^31")
        if self.seed is not None and not within(self.seed, Integral, 0, (1 << 32) - 1):
            raise InputError(f"seed is {self.seed!r}; expected a whole number from 0 to 2^32 - 1")


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer. ``cached_tokens`` of the prompt were in the KV cache already and cost nothing."""

    prompt_tokens: int
    cached_tokens: int
    image_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """Times of one answer in seconds, speeds in tokens per second; None where there was nothing to measure.

    ``ttft_seconds`` runs from the call until the first token; encoding of pictures and prefill are inside it.
    ``load_seconds`` is the model's, paid once.
    """

    load_seconds: float
    encode_seconds: float
    prefill_seconds: float
    ttft_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None


FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer. The last one has no text but a ``reply``."""

    text: str
    reply: Reply | None = None


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    text: str
    finish_reason: FinishReason
    model: str
    usage: Usage
    timings: Timings
    token_ids: tuple[int, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The fields that ``llava-edge chat --json`` prints."""
        fields = asdict(self)
        del fields["token_ids"]
        return fields
