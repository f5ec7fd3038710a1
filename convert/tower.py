"""The vision towers in one form: CLIP, SigLIP and DINOv2 differ in names and in what they leave out.

Everything is written from this form: mmproj and ONNX alike. Names are those of an mmproj GGUF.

Shapes: P patches, W width of the tower, H width of its feed-forward layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llava_edge.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PretrainedConfig

    from llava_edge.convert.weights import Weights

Family = Literal["clip", "siglip", "dinov2"]
Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]

MODEL_TYPES: dict[str, Family] = {
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
    "dinov2": "dinov2",
}
_ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_LAYERS = {
    "ln1": "layer_norm1",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_DINOV2_LAYERS = {
    "ln1": "norm1",
    "attn_q": "attention.attention.query",
    "attn_k": "attention.attention.key",
    "attn_v": "attention.attention.value",
    "attn_out": "attention.output.dense",
    "ln2": "norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
# The output of these layers is multiplied by a learnt vector.
_SCALED = {"attn_out": "layer_scale1.lambda1", "ffn_down": "layer_scale2.lambda1"}
_UNUSED = (
    "post_layernorm.weight",
    "post_layernorm.bias",
    "embeddings.position_ids",
    "embeddings.mask_token",
    "layernorm.weight",
    "layernorm.bias",
)


@dataclass(frozen=True)
class Tower:
    """A vision transformer. ``class_token`` says whether it runs with one; its row is never handed on."""

    family: Family
    config: PretrainedConfig
    width: int
    hidden: int
    heads: int
    blocks: int
    image_size: int
    patch_size: int
    epsilon: float
    activation: Activation
    class_token: bool

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return self.side**2


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read when it is written."""

    shape: tuple[int, ...]
    load: Callable[[], NDArray[np.float32]]


def tower_from_config(config: PretrainedConfig, *, class_token: bool | None = None) -> Tower:
    """The form of a tower, or InputError by the field that can't be converted.

    ``class_token`` False means that a tower which has one runs without it, as training with llava-edge does.
    """
    family = MODEL_TYPES.get(config.model_type)
    if family is None:
        raise unsupported("vision_config.model_type", config.model_type, *MODEL_TYPES)
    for field in ("image_size", "patch_size"):
        if not isinstance(getattr(config, field), int):
            raise unsupported(f"vision_config.{field}", getattr(config, field), "one whole number")
    if config.hidden_act not in _ACTIVATIONS:
        raise unsupported("vision_config.hidden_act", config.hidden_act, *_ACTIVATIONS)
    wanted = {"num_channels": 3}
    if family == "dinov2":
        wanted |= {"use_swiglu_ffn": False, "qkv_bias": True}
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise unsupported(f"vision_config.{field}", getattr(config, field), value)
    if class_token is False and family == "clip":
        raise unsupported("vision_class_token", class_token, True)
    hidden = int(config.hidden_size * config.mlp_ratio) if family == "dinov2" else config.intermediate_size
    return Tower(
        family=family,
        config=config,
        width=config.hidden_size,
        hidden=hidden,
        heads=config.num_attention_heads,
        blocks=config.num_hidden_layers,
        image_size=config.image_size,
        patch_size=config.patch_size,
        epsilon=config.layer_norm_eps,
        activation=_ACTIVATIONS[config.hidden_act],
        class_token=family != "siglip" and class_token is not False,
    )


def tower_tensors(tower: Tower, weights: Weights) -> Iterator[tuple[str, Lazy]]:
    """Every tensor of the tower: patches, positions, blocks. What the features don't need is left out."""
    yield from _embeddings(tower, weights)
    for block in range(tower.blocks):
        yield from _block(tower, weights, block)
    left = [f"vision_tower.{name}" for name in _UNUSED]
    weights.leave(*left, *weights.names("vision_tower.head."))


def _embeddings(tower: Tower, weights: Weights) -> Iterator[tuple[str, Lazy]]:
    name = "vision_tower.embeddings"
    dinov2 = tower.family == "dinov2"
    patch = f"{name}.patch_embeddings.projection" if dinov2 else f"{name}.patch_embedding"
    positions = f"{name}.position_embeddings" if dinov2 else f"{name}.position_embedding.weight"
    token = f"{name}.cls_token" if dinov2 else f"{name}.class_embedding"
    size, width = tower.patch_size, tower.width
    yield "v.patch_embd.weight", _lazy(weights, f"{patch}.weight", (width, 3, size, size))
    if tower.family != "clip":
        yield "v.patch_embd.bias", _lazy(weights, f"{patch}.bias", (width,))
    rows = tower.patches + (tower.family != "siglip")
    table = _lazy(weights, positions, (1, rows, width) if dinov2 else (rows, width))
    skipped = int(tower.family != "siglip" and not tower.class_token)
    yield (
        "v.position_embd.weight",
        Lazy((rows - skipped, width), lambda: table.load().reshape(rows, width)[skipped:]),
    )
    if tower.class_token:
        row = _lazy(weights, token, (1, 1, width) if dinov2 else (width,))
        yield "v.class_embd", Lazy((width,), lambda: row.load().reshape(width))
    else:
        weights.leave(token)
    if tower.family == "clip":
        for part in ("weight", "bias"):
            yield f"v.pre_ln.{part}", _lazy(weights, f"vision_tower.pre_layrnorm.{part}", (width,))


def _block(tower: Tower, weights: Weights, block: int) -> Iterator[tuple[str, Lazy]]:
    dinov2 = tower.family == "dinov2"
    prefix = f"vision_tower.encoder.layer.{block}" if dinov2 else f"vision_tower.encoder.layers.{block}"
    for short, name in (_DINOV2_LAYERS if dinov2 else _LAYERS).items():
        rows = tower.hidden if short == "ffn_up" else tower.width
        columns = tower.hidden if short == "ffn_down" else tower.width
        weight_shape = (rows,) if short.startswith("ln") else (rows, columns)
        weight = _lazy(weights, f"{prefix}.{name}.weight", weight_shape)
        bias = _lazy(weights, f"{prefix}.{name}.bias", (rows,))
        if dinov2 and short in _SCALED:
            scale = _lazy(weights, f"{prefix}.{_SCALED[short]}", (rows,))
            weight, bias = _scaled(weight, scale), _scaled(bias, scale)
        yield f"v.blk.{block}.{short}.weight", weight
        yield f"v.blk.{block}.{short}.bias", bias


def _lazy(weights: Weights, name: str, shape: tuple[int, ...]) -> Lazy:
    weights.check_shape(name, shape)
    return Lazy(shape, lambda: weights.take(name))


def _scaled(tensor: Lazy, scale: Lazy) -> Lazy:
    """LayerScale folded into the layer before it: it multiplies the rows."""
    return Lazy(tensor.shape, lambda: (tensor.load().T * scale.load()).T)


def unsupported(field: str, value: object, *supported: Any) -> InputError:
    """The error for a field of the configuration with which the files would come out wrong."""
    expected = " or ".join(repr(choice) for choice in supported)
    return InputError(f"can't convert this checkpoint: {field} is {value!r}; expected {expected}", hint=SUPPORTED)


SUPPORTED = (
    "Supported: `llava`, `llava_next` and `llava_onevision` of transformers and the original LLaVA format; towers "
    "CLIP, SigLIP and DINOv2; language models LLaMA (Vicuna, LLaMA-3, SmolLM), Mistral and Qwen2; linear and MLP "
    "projectors."
)
