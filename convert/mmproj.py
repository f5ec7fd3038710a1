"""Vision tower and projector into an mmproj GGUF that llama.cpp's mtmd runs exactly.

The tower has no class token here: its row of the position table and the token are left out, and the graph in
llama.cpp then numbers patches from 0 (see ``tools/mtmd/models/llava.cpp`` there). LayerScale folds into the layers
before it. The last LayerNorm is left out because the features are taken before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np

from llava_edge.convert.gguf_file import FloatType, TensorWriter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.convert.checkpoint import Checkpoint, Weights

_LAYERS = {
    "norm1": "ln1",
    "attention.attention.query": "attn_q",
    "attention.attention.key": "attn_k",
    "attention.attention.value": "attn_v",
    "attention.output.dense": "attn_out",
    "norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_SCALED_BY = {"attention.output.dense": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"}
_UNUSED = ("cls_token", "mask_token")


def write_mmproj(checkpoint: Checkpoint, weights: Weights, path: Path, float_type: FloatType = "F16") -> None:
    """Write the mmproj GGUF. Norms, biases, patch and position tables stay in float32."""
    writer = TensorWriter(path, gguf.MODEL_ARCH.MMPROJ, "clip", float_type)
    _add_keys(writer.gguf, checkpoint)
    _add_embeddings(writer, weights)
    for block in range(checkpoint.config.vision_config.num_hidden_layers):
        _add_block(writer, weights, block)
    _add_projector(writer, checkpoint, weights)
    weights.leave(*(f"vision_tower.embeddings.{name}" for name in _UNUSED), *weights.names("vision_tower.layernorm."))
    writer.close()


def _add_keys(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    vision, image = checkpoint.config.vision_config, checkpoint.description.image
    writer.add_type("mmproj")
    writer.add_name(checkpoint.description.name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.use_gelu", True)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(int(vision.hidden_size * vision.mlp_ratio))
    writer.add_vision_projection_dim(checkpoint.config.text_config.hidden_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(list(image.mean))
    writer.add_vision_image_std(list(image.std))
    writer.add_array("clip.vision.feature_layer", sorted(checkpoint.feature_layers))


def _add_embeddings(writer: TensorWriter, weights: Weights) -> None:
    patch = "vision_tower.embeddings.patch_embeddings.projection"
    writer.add("v.patch_embd.weight", weights.take(f"{patch}.weight"), keep_float32=True)
    writer.add("v.patch_embd.bias", weights.take(f"{patch}.bias"))
    positions = weights.take("vision_tower.embeddings.position_embeddings")[0]  # [1 + P, D]
    writer.add("v.position_embd.weight", positions[1:], keep_float32=True)


def _add_block(writer: TensorWriter, weights: Weights, block: int) -> None:
    prefix = f"vision_tower.encoder.layer.{block}"
    for name, short in _LAYERS.items():
        weight, bias = weights.take(f"{prefix}.{name}.weight"), weights.take(f"{prefix}.{name}.bias")
        if name in _SCALED_BY:
            scale = weights.take(f"{prefix}.{_SCALED_BY[name]}")
            weight, bias = weight * scale[:, None], bias * scale
        writer.add(f"v.blk.{block}.{short}.weight", weight)
        writer.add(f"v.blk.{block}.{short}.bias", bias)


def _add_projector(writer: TensorWriter, checkpoint: Checkpoint, weights: Weights) -> None:
    for number, name in ((0, "linear_1"), (2, "linear_2")):
        weight = weights.take(f"multi_modal_projector.{name}.weight")
        if number == 0:
            weight = in_layer_order(weight, checkpoint.feature_layers)
        bias_name = f"multi_modal_projector.{name}.bias"
        bias = weights.take(bias_name) if bias_name in weights else np.zeros(len(weight), np.float32)
        writer.add(f"mm.{number}.weight", weight)
        writer.add(f"mm.{number}.bias", bias)


def in_layer_order(weight: NDArray[np.float32], layers: tuple[int, ...]) -> NDArray[np.float32]:
    """Reorder the inputs ``[out, layers x D]``: llama.cpp concatenates features by layer, whatever the config says."""
    parts = np.split(weight, len(layers), axis=1)
    return np.concatenate([part for _, part in sorted(zip(layers, parts, strict=True), key=lambda p: p[0])], axis=1)
