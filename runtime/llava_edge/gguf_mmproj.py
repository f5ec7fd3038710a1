"""The preflight of an mmproj file: keys of the right type, in sane ranges, and tensors that fit them.

llama.cpp's libmtmd checks hardly any shape: a wrong one ends the process in the middle of a graph, or reads beyond a
tensor. Towers of LLaVA's kind (projector ``mlp``) and Qwen2-VL's are checked tensor by tensor; of the others, the
blocks of the tower as far as they are of the common kind, and every bias against its weight.
"""

from __future__ import annotations

from llava_edge.gguf_check import array, check_shape, integer, number
from llava_edge.gguf_header import BOOL, FLOAT32, INT32, KIND_NAMES, TEXT, Header

MAX_IMAGE_SIZE = 4096
MAX_PATCH = 256
MAX_PATCHES = 65_536
MAX_PIXELS = 1 << 26
MAX_PINPOINTS = 128
MAX_BLOCKS = 256
# Projectors whose files are checked tensor by tensor.
CHECKED_PROJECTORS = {"mlp", "qwen2vl_merger"}
# Projectors whose towers have no blocks of the common kind, or several towers.
_OTHER_TOWERS = {"gemma3nv", "deepseekocr", "deepseekocr2", "deepseek4v", "mimovl", "dots3note_v", "yasa2", "gemma4v",
                 "gemma4uv", "cogvlm", "exaone4_5", "muse-glimmer", "lfm2a", "granite4_vision"}  # fmt: skip
_TEXT_KEYS = ("projector_type", "mm_patch_merge_type", "model_variant")
_BOOL_KEYS = ("use_gelu", "use_silu", "has_vision_encoder", "has_audio_encoder", "has_gen_audio_encoder",
              "has_llava_projector")  # fmt: skip
_FLOAT_KEYS = ("layer_norm_epsilon", "swiglu_clamp")
_ARRAYS = {"image_mean": FLOAT32, "image_std": FLOAT32, "feature_layer": INT32, "image_grid_pinpoints": INT32,
           "wa_layer_indexes": INT32, "wa_pattern_mode": INT32, "spatial_offsets": INT32}  # fmt: skip
# uint32 keys with their ranges; other whole numbers lie between 0 and 2^16.
_RANGES = {
    "embedding_length": (1, 1 << 16), "feed_forward_length": (0, 1 << 18), "projection_dim": (0, 1 << 18),
    "block_count": (1, MAX_BLOCKS), "head_count": (1, 1024), "image_size": (0, MAX_IMAGE_SIZE),
    "patch_size": (1, MAX_PATCH), "image_min_pixels": (0, MAX_PIXELS), "image_max_pixels": (1, MAX_PIXELS),
    "preproc_image_size": (1, 8192), "preproc_min_tiles": (0, 64), "preproc_max_tiles": (0, 64),
    "window_size": (1, 4096), "spatial_merge_size": (1, 16), "scale_factor": (1, 16), "n_wa_pattern": (0, MAX_BLOCKS),
    "minicpmv_query_num": (1, 4096),
}  # fmt: skip
_PREFIX = "clip.vision"


def check_mmproj(header: Header) -> None:
    """Check keys and tensors of a vision tower; see :func:`llava_edge.gguf_check.check_gguf`."""
    for key in header.fields:
        if key.startswith("clip."):
            _check_key(header, key)
    vision = header.fields.get("clip.has_vision_encoder")
    if vision is None or not vision.value:
        raise header.error("clip.has_vision_encoder", "is not true: there is no vision tower in this file")
    projector = projector_of(header)
    if not projector:
        raise header.error("clip.projector_type", "is missing")
    for key in ("embedding_length", "feed_forward_length", "block_count", "projection_dim", "attention.head_count",
                "attention.layer_norm_epsilon", "image_size", "patch_size"):  # fmt: skip
        if f"{_PREFIX}.{key}" not in header.fields:
            raise header.error(f"{_PREFIX}.{key}", "is missing")
    number(header, f"{_PREFIX}.attention.layer_norm_epsilon", 0, 1)
    _check_preprocessing(header)
    _check_biases(header)
    if projector not in _OTHER_TOWERS and projector not in ("ldp", "ldpv2"):
        _check_tower(header, projector)
    if projector == "mlp":
        _check_llava(header)
    elif projector == "qwen2vl_merger":
        _check_qwen2vl(header)


def projector_of(header: Header) -> str:
    """The kind of projector, which tells libmtmd the kind of tower too; empty if it is missing."""
    return header.text("clip.projector_type") or header.text("clip.vision.projector_type")


def known_defects(header: Header) -> list[str]:
    """What llama.cpp is known to compute wrongly of this tower, in sentences for people."""
    if projector_of(header) == "mlp" and "v.class_embd" in header.tensors:
        return [
            "this vision tower is CLIP's, with a class token, and llama.cpp computes its embeddings wrongly (issue "
            "25814 there): answers about pictures will be clearly worse than the model's own"
        ]
    return []


def _check_key(header: Header, key: str) -> None:
    """The type that libmtmd asks for: it ends the process when it finds another."""
    name = key.rsplit(".", 1)[-1]
    field = header.fields[key]
    if name in _ARRAYS:
        array(header, key, _ARRAYS[name])
        return
    expected = TEXT if name in _TEXT_KEYS else BOOL if name in _BOOL_KEYS else FLOAT32 if name in _FLOAT_KEYS else None
    if expected is not None:
        if field.kind != expected:
            raise header.error(key, f"is of type {field.kind_name}; expected {KIND_NAMES[expected]}")
        return
    if key == "clip.minicpmv_version":
        if field.kind != INT32:
            raise header.error(key, f"is of type {field.kind_name}; expected int32")
        return
    if name in _RANGES or field.kind not in (TEXT, BOOL, FLOAT32):
        integer(header, key, *_RANGES.get(name, (0, 1 << 16)))


def _check_preprocessing(header: Header) -> None:
    for name, low in (("image_mean", -10.0), ("image_std", 1e-6)):
        key = f"{_PREFIX}.{name}"
        values = array(header, key, FLOAT32)
        if values is None or len(values.items) != 3 or not all(low <= value <= 10 for value in values.items):
            raise header.error(key, "is not three numbers in range")
    points = array(header, f"{_PREFIX}.image_grid_pinpoints", INT32, required=False)
    if points is not None:
        size = header.fields[f"{_PREFIX}.image_size"].value
        fits = all(size <= value <= MAX_IMAGE_SIZE for value in points.items)
        if len(points.items) > 2 * MAX_PINPOINTS or len(points.items) % 2 or not size or not fits:
            raise header.error(
                f"{_PREFIX}.image_grid_pinpoints", f"is {list(points.items)[:8]}; expected pairs of sizes"
            )
    fewest, most = (header.fields.get(f"{_PREFIX}.image_{which}_pixels") for which in ("min", "max"))
    if fewest and most and fewest.value > most.value:
        problem = f"is {fewest.value}, more than image_max_pixels, {most.value}"
        raise header.error(f"{_PREFIX}.image_min_pixels", problem)


def _check_biases(header: Header) -> None:
    """A bias has a value for each row of its weight; of a norm, both are vectors."""
    for name, bias in header.tensors.items():
        weight = header.tensors.get(name.removesuffix("bias") + "weight") if name.endswith(".bias") else None
        if weight is None or len(bias.shape) != 1:
            continue
        rows = weight.padded_shape[1] if max(weight.padded_shape[2:]) == 1 else None
        if rows is not None and bias.shape[0] not in (rows, weight.shape[0] if rows == 1 else rows):
            raise header.error(f"tensor {name}", f"has {bias.shape[0]} values for a weight of {list(weight.shape)}")


def _check_tower(header: Header, projector: str) -> None:
    """Blocks of a transformer: E the width, F that of the feed-forward layer."""
    width = integer(header, f"{_PREFIX}.embedding_length", 1, 1 << 16) or 0
    heads = integer(header, f"{_PREFIX}.attention.head_count", 1, 1024) or 1
    if f"{_PREFIX}.attention.head_dim" not in header.fields and width % heads:
        raise header.error(f"{_PREFIX}.attention.head_count", f"is {heads}; expected a divisor of the width {width}")
    deep = projector in CHECKED_PROJECTORS
    if deep:
        for key, same in (("attention.head_dim", width // heads), ("attention.head_count_kv", heads)):
            integer(header, f"{_PREFIX}.{key}", same, same, required=False)
    for number_ in range(header.fields[f"{_PREFIX}.block_count"].value):
        block = f"v.blk.{number_}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            _check_square(header, f"{block}.{name}", width, required=deep)
        for name in ("ln1", "ln2"):
            _check_norm(header, f"{block}.{name}", width, required=deep)
        _check_feed_forward(header, block, width)


def _check_square(header: Header, name: str, width: int, *, required: bool) -> None:
    """A linear layer of the attention, ``width`` to ``width`` where it is demanded."""
    tensor = header.tensors.get(f"{name}.weight")
    if required or (tensor is not None and tensor.shape[0] != width and not name.endswith("attn_out")):
        check_shape(header, f"{name}.weight", width, width)
    if required:
        check_shape(header, f"{name}.bias", width, required=False)


def _check_norm(header: Header, name: str, width: int, *, required: bool = False) -> None:
    check_shape(header, f"{name}.weight", width, required=required)
    check_shape(header, f"{name}.bias", width, required=False)


def _check_feed_forward(header: Header, block: str, width: int) -> None:
    """``ffn_up`` leads out of the width and ``ffn_down`` back; in old files their names are swapped."""
    up, down = (header.tensors.get(f"{block}.ffn_{name}.weight") for name in ("up", "down"))
    if up is None or down is None:
        raise header.error(f"tensor {block}.ffn_up.weight", "or its ffn_down.weight is missing")
    if down.shape[0] == width and up.shape[0] != width:
        up, down = down, up
    hidden = up.padded_shape[1]
    check_shape(header, up.name, width, hidden)
    check_shape(header, down.name, hidden, width)
    check_shape(header, f"{block}.ffn_gate.weight", width, hidden, required=False)


def _check_llava(header: Header) -> None:
    """Embeddings of patches and positions, the layers that are read, and the projector."""
    width, patch, size, blocks = (
        header.fields[f"{_PREFIX}.{key}"].value
        for key in ("embedding_length", "patch_size", "image_size", "block_count")
    )
    patches = (size // patch) ** 2
    if not 1 <= patches <= MAX_PATCHES:
        raise header.error(f"{_PREFIX}.image_size", f"is {size} with patches of {patch}; at most {MAX_PATCHES} fit")
    _check_patches(header, width, patch, "v.patch_embd.weight")
    check_shape(header, "v.patch_embd.bias", width, required=False)
    classes = int(check_shape(header, "v.class_embd", width, required=False))
    check_shape(header, "v.position_embd.weight", width, patches + classes)
    for name in ("v.pre_ln", "v.post_ln"):
        _check_norm(header, name, width)
    layers = array(header, f"{_PREFIX}.feature_layer", INT32, required=False)
    read = set(layers.items) if layers else set()
    if not all(0 <= layer <= blocks for layer in read):
        raise header.error(f"{_PREFIX}.feature_layer", f"is {sorted(read)[:8]}; expected layers from 0 to {blocks}")
    _check_mlp(header, width * max(1, len(read)))


def _check_mlp(header: Header, width: int) -> None:
    names = [name for name in header.tensors if name.startswith("mm.") and name.endswith(".weight")]
    first = header.tensors.get("mm.0.weight")
    if first is None:
        raise header.error("tensor mm.0.weight", f"is missing; the projector has {', '.join(names) or 'no tensors'}")
    hidden = first.padded_shape[1]
    check_shape(header, "mm.0.weight", width, hidden)
    check_shape(header, "mm.0.bias", hidden)
    if "mm.3.weight" in header.tensors:  # with norms between the layers
        out = header.tensors["mm.3.weight"].padded_shape[1]
        check_shape(header, "mm.3.weight", hidden, out)
        for name, length in (("mm.1.weight", hidden), ("mm.1.bias", hidden), ("mm.3.bias", out),
                             ("mm.4.weight", out), ("mm.4.bias", out)):  # fmt: skip
            check_shape(header, name, length)
        return
    second = header.tensors.get("mm.2.weight")
    out = second.padded_shape[1] if second is not None else hidden
    check_shape(header, "mm.2.weight", hidden, out)
    check_shape(header, "mm.2.bias", out)


def _check_qwen2vl(header: Header) -> None:
    width, patch, heads = (
        header.fields[f"{_PREFIX}.{key}"].value for key in ("embedding_length", "patch_size", "attention.head_count")
    )
    for key, demanded in (("spatial_merge_size", 2), ("n_wa_pattern", 0)):
        integer(header, f"{_PREFIX}.{key}", demanded, demanded, required=False)
    if width % (4 * heads):
        raise header.error(
            f"{_PREFIX}.attention.head_count", f"is {heads}; the width of a head must be a multiple of 4"
        )
    for name in ("v.patch_embd.weight", "v.patch_embd.weight.1"):
        _check_patches(header, width, patch, name)
    for name in ("v.patch_embd.bias", "v.class_embd"):
        if name in header.tensors:
            raise header.error(f"tensor {name}", "has no place in a tower of Qwen2-VL's kind")
    for name in ("v.pre_ln", "v.post_ln"):
        _check_norm(header, name, width)
    hidden = header.tensors["mm.0.weight"].padded_shape[1] if "mm.0.weight" in header.tensors else 0
    check_shape(header, "mm.0.weight", 4 * width, hidden)
    check_shape(header, "mm.0.bias", hidden)
    out = header.tensors["mm.2.weight"].padded_shape[1] if "mm.2.weight" in header.tensors else 0
    check_shape(header, "mm.2.weight", hidden, out)
    check_shape(header, "mm.2.bias", out)
    for block in range(header.fields[f"{_PREFIX}.block_count"].value):
        for name in ("attn_q", "attn_k", "attn_v"):
            check_shape(header, f"v.blk.{block}.{name}.bias", width)


def _check_patches(header: Header, width: int, patch: int, name: str) -> None:
    check_shape(header, name, patch, patch, 3, width)
    if header.tensors[name].type not in ("F32", "F16"):
        raise header.error(f"tensor {name}", f"is of type {header.tensors[name].type}; expected F32 or F16")
