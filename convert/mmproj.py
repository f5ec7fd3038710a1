"""Vision tower and projector into an mmproj GGUF.

The file says what the model is, read correctly: every block, the layers whose features are taken, the class token
first. Where llama.cpp reads that otherwise the parity gate finds it and the manifest ranks another backend first.
The last LayerNorm is left out because the features are taken before it, and llama.cpp would apply it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import gguf

from llava_edge.convert.gguf_file import FloatType, TensorWriter
from llava_edge.convert.projector import as_two_layers, in_layer_order, projector_layers
from llava_edge.convert.tower import Lazy, tower_tensors
from llava_edge.vision.anyres import NEWLINE

if TYPE_CHECKING:
    from llava_edge.convert.checkpoint import Checkpoint
    from llava_edge.convert.weights import Weights


def write_mmproj(checkpoint: Checkpoint, weights: Weights, path: Path, float_type: FloatType = "F16") -> None:
    """Write the mmproj GGUF. Norms, biases, patch and position tables stay in float32."""
    writer = TensorWriter(path, gguf.MODEL_ARCH.MMPROJ, "clip", float_type)
    _add_keys(writer.gguf, checkpoint)
    for name, tensor in tower_tensors(checkpoint.tower, weights):
        writer.add(name, tensor, keep_float32=name in ("v.patch_embd.weight", "v.position_embd.weight"))
    _add_projector(writer, checkpoint, weights)
    if checkpoint.image_newline:
        width = checkpoint.projector.width
        weights.check_shape("image_newline", (width,))
        writer.add(NEWLINE, Lazy((width,), lambda: weights.take("image_newline")))
    writer.close()


def _add_keys(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    tower, image = checkpoint.tower, checkpoint.description.image
    writer.add_type("mmproj")
    writer.add_name(checkpoint.description.name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    # false is CLIP's quick GELU; the tanh form stands for the exact one too
    writer.add_bool("clip.use_gelu", tower.activation != "quick_gelu")
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.width)
    writer.add_vision_feed_forward_length(tower.hidden)
    writer.add_vision_projection_dim(checkpoint.projector.width)
    writer.add_vision_block_count(tower.blocks)
    writer.add_vision_head_count(tower.heads)
    writer.add_vision_attention_layernorm_eps(tower.epsilon)
    writer.add_vision_image_mean(list(image.mean))
    writer.add_vision_image_std(list(image.std))
    writer.add_array("clip.vision.feature_layer", sorted(checkpoint.feature_layers))
    if image.grid:
        writer.add_array("clip.vision.image_grid_pinpoints", [edge for pair in image.grid for edge in pair])
        writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")


def _add_projector(writer: TensorWriter, checkpoint: Checkpoint, weights: Weights) -> None:
    layers = list(projector_layers(checkpoint.projector, weights))
    (weight, bias), *rest = layers
    ordered = Lazy(weight.shape, lambda: in_layer_order(weight.load(), checkpoint.feature_layers))
    layers = [(ordered, bias), *rest] if rest else as_two_layers(ordered, bias)
    for number, layer in enumerate(layers):
        for part, tensor in zip(("weight", "bias"), layer, strict=True):
            writer.add(f"mm.{2 * number}.{part}", tensor)
