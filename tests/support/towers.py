"""mmproj files of small towers with random weights, of each kind that the C library computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

Type = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Shape:
    """A tower and its projector; ``layers`` are the hidden states that are read."""

    width: int = 64
    hidden: int = 128
    heads: int = 4
    blocks: int = 3
    image: int = 56
    patch: int = 14
    out: int = 96
    class_token: bool = False
    quick_gelu: bool = False
    pre_norm: bool = False
    layers: tuple[int, ...] = (3,)
    projector: int = 2
    newline: bool = False


KINDS = {
    "CLIP with an MLP (1.5)": Shape(class_token=True, quick_gelu=True, pre_norm=True, layers=(2,)),
    "CLIP with a linear layer (v1)": Shape(class_token=True, quick_gelu=True, pre_norm=True, layers=(2,), projector=1),
    "DINOv2 with two layers": Shape(layers=(2, 3)),
    "SigLIP": Shape(image=48, patch=16, layers=(3,)),
    "a deeper projector": Shape(projector=3),
}


def write(path: Path, shape: Shape, kind: Type) -> Path:
    """The file, its matrices of this type; the same weights for every type."""
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.use_gelu", not shape.quick_gelu)
    writer.add_vision_image_size(shape.image)
    writer.add_vision_patch_size(shape.patch)
    writer.add_vision_embedding_length(shape.width)
    writer.add_vision_feed_forward_length(shape.hidden)
    writer.add_vision_projection_dim(shape.out)
    writer.add_vision_block_count(shape.blocks)
    writer.add_vision_head_count(shape.heads)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_image_mean([0.48, 0.46, 0.41])
    writer.add_vision_image_std([0.27, 0.26, 0.28])
    writer.add_array("clip.vision.feature_layer", list(shape.layers))

    def table(name: str, *size: int, scale: float = 0.1, shift: float = 0.0) -> None:
        writer.add_tensor(name, (shift + random.standard_normal(size) * scale).astype(np.float32))

    def put(name: str, values: np.ndarray) -> None:
        writer.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)

    def matrix(name: str, rows: int, columns: int) -> None:
        put(f"{name}.weight", random.standard_normal((rows, columns)) / columns**0.5)
        table(f"{name}.bias", rows)

    def norm(name: str) -> None:
        table(f"{name}.weight", shape.width, shift=1.0)
        table(f"{name}.bias", shape.width)

    table("v.patch_embd.weight", shape.width, 3, shape.patch, shape.patch, scale=0.05)
    table("v.class_embd" if shape.class_token else "v.patch_embd.bias", shape.width, scale=0.5)
    patches = (shape.image // shape.patch) ** 2
    table("v.position_embd.weight", patches + int(shape.class_token), shape.width, scale=0.3)
    if shape.pre_norm:
        norm("v.pre_ln")
    for number in range(shape.blocks):
        block = f"v.blk.{number}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            matrix(f"{block}.{name}", shape.width, shape.width)
        norm(f"{block}.ln1")
        norm(f"{block}.ln2")
        matrix(f"{block}.ffn_up", shape.hidden, shape.width)
        matrix(f"{block}.ffn_down", shape.width, shape.hidden)
    _write_projector(shape, matrix, put, table, random)
    if shape.newline:
        table("v.image_newline", shape.out, scale=0.3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_projector(shape: Shape, matrix, put, table, random) -> None:
    read = shape.width * len(shape.layers)
    if shape.projector == 1:  # exact through gelu(x) - gelu(-x) = x
        first = random.standard_normal((shape.out, read)) / read**0.5
        put("mm.0.weight", np.concatenate([first, -first]))
        table("mm.0.bias", 2 * shape.out, scale=0.0)
        put("mm.2.weight", np.concatenate([np.eye(shape.out), -np.eye(shape.out)], axis=1))
        table("mm.2.bias", shape.out)
        return
    for number in range(shape.projector):
        matrix(f"mm.{2 * number}", shape.out, read)
        read = shape.out
