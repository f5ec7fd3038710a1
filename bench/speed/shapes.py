"""Shapes of released models, for knowing their speed before a download."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from llava_edge.errors import InputError


@dataclass(frozen=True)
class TowerShape:
    """A ViT. ``feature_layer`` is the index of the hidden state that is read; later blocks are not run."""

    image_size: int
    patch_size: int
    width: int
    blocks: int
    heads: int
    feed_forward: int
    feature_layer: int
    class_token: bool = True

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class Shape:
    """A LLaVA: a LLaMA-type language model, a tower, and a projector of two layers between them."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    context: int
    tower: TowerShape
    image_tokens: int
    tied: bool = False
    note: str = ""

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


CLIP_L_336 = TowerShape(336, 14, 1024, 24, 16, 4096, 23)
DINOV2_S_224 = TowerShape(224, 14, 384, 12, 6, 1536, 11, class_token=False)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llava-1.5-7b", 32, 4096, 32, 32, 11008, 32000, 4096, CLIP_L_336, 576),
        Shape("llava-1.5-13b", 40, 5120, 40, 40, 13824, 32000, 4096, CLIP_L_336, 576),
        Shape(
            "llava-1.6-mistral-7b", 32, 4096, 32, 8, 14336, 32000, 32768, CLIP_L_336, 576,
            note="a picture is read as one tile of 576 tokens; the released model reads up to five",
        ),
        Shape(
            "mobilevlm-1.7b", 24, 2048, 16, 16, 5632, 32000, 2048, CLIP_L_336, 144,
            note="the projector is two linear layers and pooling to 144 tokens, not the released model's convolutions",
        ),
        Shape(
            "mobilevlm-3b", 32, 2560, 32, 32, 6912, 32000, 2048, CLIP_L_336, 144,
            note="the projector is two linear layers and pooling to 144 tokens, not the released model's convolutions",
        ),
        Shape("nano", 30, 576, 9, 3, 1536, 49152, 2048, DINOV2_S_224, 64, tied=True),
    )
}  # fmt: skip


def find_shape(name: str) -> Shape:
    """A shape by its name; InputError lists them."""
    if name in SHAPES:
        return SHAPES[name]
    near = difflib.get_close_matches(name, SHAPES, n=1)
    known = ", ".join(SHAPES)
    raise InputError(f"no shape {name!r}; known are {known}", hint=f"Did you mean {near[0]}?" if near else None)
