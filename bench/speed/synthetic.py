"""Bundles of a known shape with random weights: their speed is that of the real model, their answers are noise.

Which tensor of a mixed type such as Q4_K_M has which real type is asked of llama.cpp, by quantising a narrow model
with the same number of layers. Each tensor is a few quantised random rows, repeated, so that no step needs more memory
than the largest tensor.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from llava_edge.bench.models import SYNTHETIC
from llava_edge.bench.speed.ceilings import quantized_rows
from llava_edge.bench.speed.shapes import Shape, TowerShape
from llava_edge.bundle import MANIFEST_NAME, BundleFile, Manifest, PromptFormat, Role, VisualTokens, sha256_file
from llava_edge.convert import publish
from llava_edge.convert.gguf_file import tensor_types
from llava_edge.convert.quantize import check_type, file_type, quantize
from llava_edge.errors import InputError, require_extra
from llava_edge.paths import cache_dir
from llava_edge.types import ImageSpec

if TYPE_CHECKING:
    from llava_edge.convert.projector import Projector
    from llava_edge.convert.tower import Tower

MMPROJ_TYPES = ("F16", "Q8_0")
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# What the GGUF's own template says too: nothing but the contents.
_PROMPT = PromptFormat(
    bos="<s>",
    system="",
    default_system=None,
    user_prefix="",
    user_suffix="",
    assistant_prefix="",
    turn_end="</s>",
    stop=("</s>",),
    image_suffix="",
)
_SPECIALS = (
    ("<unk>", gguf.TokenType.UNKNOWN),
    ("<s>", gguf.TokenType.CONTROL),
    ("</s>", gguf.TokenType.CONTROL),
)
_SMALLEST_VOCABULARY = len(_SPECIALS) + 256


@dataclass(frozen=True)
class _Matrix:
    """A tensor to be written: ``shape`` as in NumPy, rows first; vectors are float32."""

    name: str
    shape: tuple[int, ...]


@contextmanager
def synthetic_bundle(shape: Shape, llm_type: str, mmproj_type: str, say: Callable[[str], None]) -> Iterator[Path]:
    """A bundle's directory that is gone afterwards. It lies where caches lie, because ``/tmp`` may be memory.

    What runs that were killed left there, gigabytes each, is removed first.
    """
    root = cache_dir() / "bench"
    try:
        root.mkdir(parents=True, exist_ok=True)
        publish.remove_leftovers(root, "synthetic-*")
        folder = tempfile.mkdtemp(prefix="synthetic-", dir=root)
    except OSError as error:
        raise InputError(f"can't write {root}: {error.strerror}", hint="Set LLAVA_EDGE_HOME to a directory.") from None
    with publish.locked(Path(folder)):
        try:
            yield write_synthetic(shape, Path(folder), llm_type, mmproj_type, say)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_synthetic(
    shape: Shape, directory: Path, llm_type: str, mmproj_type: str, say: Callable[[str], None] = lambda _line: None
) -> Path:
    """Write the bundle into an empty directory; InputError before anything is written if it won't fit."""
    mmproj_type = check_type(mmproj_type, MMPROJ_TYPES)
    types = llm_types(shape, llm_type)
    tensors = {"llm": _llm(shape), "mmproj": _tower(shape)}
    planned = {
        "llm": {m.name: types[m.name] for m in tensors["llm"]},
        "mmproj": {m.name: _tower_type(m, mmproj_type) for m in tensors["mmproj"]},
    }
    _check_space(directory, sum(_bytes(m, planned[role][m.name]) for role in tensors for m in tensors[role]))
    files = []
    names: dict[Role, str] = {"llm": llm_type, "mmproj": mmproj_type}
    for role, kind in names.items():
        path = directory / f"{role}-{kind}.gguf"
        say(f"writing {path.name} of {shape.name} with random weights")
        writer = _llm_writer(path, shape, llm_type) if role == "llm" else _tower_writer(path, shape)
        _write(writer, tensors[role], planned[role])
        files.append(BundleFile(path.name, role, sha256_file(path), path.stat().st_size, kind))
    (directory / MANIFEST_NAME).write_text(_manifest(shape, tuple(files)).to_json(), encoding="utf-8")
    return directory


def add_onnx(shape: Shape, directory: Path, kind: str) -> None:
    """Add the tower as ONNX, random as well, and rank it first; MissingExtraError without what conversions need."""
    require_extra("convert", "torch", "transformers", "onnx")
    import torch
    import transformers

    from llava_edge.convert.projector import Projector
    from llava_edge.convert.tower import tower_from_config
    from llava_edge.convert.vision_onnx import quantize_onnx, write_onnx
    from llava_edge.convert.weights import Stored, Weights, plain_name

    tower = shape.tower
    if not tower.class_token:
        raise InputError(f"{shape.name} has no synthetic ONNX tower; only shapes with CLIP's have")
    config = transformers.CLIPVisionConfig(
        hidden_size=tower.width, intermediate_size=tower.feed_forward, num_hidden_layers=tower.blocks,
        num_attention_heads=tower.heads, image_size=tower.image_size, patch_size=tower.patch_size,
    )  # fmt: skip
    with torch.device("meta"):
        parameters = transformers.CLIPVisionModel(config).named_parameters()
    sizes = {plain_name(f"vision_tower.{name}"): tuple(found.shape) for name, found in parameters}
    for number, columns in enumerate((tower.width, shape.width)):
        sizes |= {f"projector.{number}.weight": (shape.width, columns), f"projector.{number}.bias": (shape.width,)}

    def random(size: tuple[int, ...]) -> Callable[[], Any]:
        return lambda: torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.02

    stored = {name: Stored(directory, name, size, random(size)) for name, size in sizes.items()}
    described = _Described(tower_from_config(config), Projector(2, tower.width, shape.width), (tower.feature_layer,))
    floats, path = directory / "vision-fp32.onnx", directory / f"vision-{kind}.onnx"
    write_onnx(described, Weights(stored), floats)
    if kind != "fp32":
        quantize_onnx(floats, path)
        floats.unlink()
    manifest = Manifest.from_json((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
    file = BundleFile(path.name, "vision_onnx", sha256_file(path), path.stat().st_size, kind)
    manifest = replace(manifest, files=(*manifest.files, file), backends=("onnx", "mtmd"))
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


@dataclass(frozen=True)
class _Described:
    tower: Tower
    projector: Projector
    feature_layers: tuple[int, ...]


def llm_types(shape: Shape, type_name: str) -> dict[str, str]:
    """The real type of each of the language model's tensors, as llama.cpp chooses it."""
    narrow = _narrow(shape)
    with tempfile.TemporaryDirectory(prefix="llava-edge-bench-") as folder:
        source, target = Path(folder) / "narrow-F16.gguf", Path(folder) / "narrow.gguf"
        matrices = _llm(narrow)
        _write(_llm_writer(source, narrow, "F16"), matrices, {m.name: "F16" for m in matrices})
        path = source if type_name == "F16" else target
        if type_name != "F16":
            quantize(source, target, type_name)
        return {name: kind for name, (kind, _) in tensor_types(path).items()}


def _narrow(shape: Shape) -> Shape:
    """As many layers, and rows that K-quants fit or don't fit as in the real shape."""
    ratio = shape.heads // shape.kv_heads
    head = 256 if shape.width % 256 == 0 else 32
    rows = ratio * head  # width of the heads together, and here of everything else
    return replace(
        shape,
        width=rows,
        heads=ratio,
        kv_heads=1,
        feed_forward=256 if shape.feed_forward % 256 == 0 else 96,
        vocabulary=_SMALLEST_VOCABULARY,
    )


def _llm(shape: Shape) -> list[_Matrix]:
    width, kv = shape.width, shape.head_width * shape.kv_heads
    found = [_Matrix("token_embd.weight", (shape.vocabulary, width)), _Matrix("output_norm.weight", (width,))]
    if not shape.tied:
        found.append(_Matrix("output.weight", (shape.vocabulary, width)))
    block = {
        "attn_norm": (width,),
        "attn_q": (width, width),
        "attn_k": (kv, width),
        "attn_v": (kv, width),
        "attn_output": (width, width),
        "ffn_norm": (width,),
        "ffn_gate": (shape.feed_forward, width),
        "ffn_up": (shape.feed_forward, width),
        "ffn_down": (width, shape.feed_forward),
    }
    return found + [
        _Matrix(f"blk.{n}.{name}.weight", size) for n in range(shape.layers) for name, size in block.items()
    ]


def _tower(shape: Shape) -> list[_Matrix]:
    tower = shape.tower
    width, hidden = tower.width, tower.feed_forward
    found = [_Matrix("v.patch_embd.weight", (width, 3, tower.patch_size, tower.patch_size))]
    found.append(_Matrix("v.position_embd.weight", (tower.side**2 + tower.class_token, width)))
    if tower.class_token:
        found += [_Matrix("v.class_embd", (width,)), *_pair("v.pre_ln", (width,))]
    for n in range(tower.blocks):
        for name in ("ln1", "ln2"):
            found += _pair(f"v.blk.{n}.{name}", (width,))
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            found += _pair(f"v.blk.{n}.{name}", (width, width))
        found += [*_pair(f"v.blk.{n}.ffn_up", (hidden, width)), *_pair(f"v.blk.{n}.ffn_down", (width, hidden))]
    return [*found, *_pair("mm.0", (shape.width, width)), *_pair("mm.2", (shape.width, shape.width))]


def _pair(name: str, shape: tuple[int, ...]) -> list[_Matrix]:
    return [_Matrix(f"{name}.weight", shape), _Matrix(f"{name}.bias", shape[:1])]


def _tower_type(matrix: _Matrix, type_name: str) -> str:
    """Patch and position tables stay float32, as in converted towers."""
    return type_name if len(matrix.shape) == 2 and "_embd" not in matrix.name else "F32"


def _llm_writer(path: Path, shape: Shape, type_name: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"{shape.name}, random weights")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(file_type(type_name))
    _add_vocabulary(writer, shape.vocabulary)
    return writer


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A SentencePiece vocabulary of bytes, filled up with words that nobody writes."""
    names = [name for name, _ in _SPECIALS] + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [int(kind) for _, kind in _SPECIALS] + [int(gguf.TokenType.BYTE)] * 256
    names += [f"\N{LOWER ONE EIGHTH BLOCK}word{number}" for number in range(size - len(names))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * len(names))
    writer.add_token_types(kinds + [int(gguf.TokenType.NORMAL)] * (len(names) - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")


def _tower_writer(path: Path, shape: Shape) -> gguf.GGUFWriter:
    tower = shape.tower
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_name(f"{shape.name}, random weights")
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.use_gelu", not tower.class_token)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.width)
    writer.add_vision_feed_forward_length(tower.feed_forward)
    writer.add_vision_projection_dim(shape.width)
    writer.add_vision_block_count(tower.blocks)
    writer.add_vision_head_count(tower.heads)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_image_mean(_MEAN)
    writer.add_vision_image_std(_STD)
    writer.add_array("clip.vision.feature_layer", [tower.feature_layer])
    return writer


def _write(writer: gguf.GGUFWriter, matrices: list[_Matrix], types: dict[str, str]) -> None:
    """Header first, then one tensor after the other."""
    for matrix in matrices:
        kind = _kind(matrix, types)
        size = gguf.quant_shape_to_byte_shape(matrix.shape, gguf.GGMLQuantizationType[kind])
        raw: Any = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(matrix.name, size, np.dtype(np.uint8), int(np.prod(size)), raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for matrix in matrices:
        writer.write_tensor_data(_data(matrix, _kind(matrix, types)))
    writer.close()


def _kind(matrix: _Matrix, types: dict[str, str]) -> str:
    return "F32" if len(matrix.shape) == 1 else types[matrix.name]


def _data(matrix: _Matrix, kind: str) -> np.ndarray[Any, Any]:
    if len(matrix.shape) == 1:
        return np.full(matrix.shape, 0.0 if matrix.name.endswith("bias") else 1.0, np.float32)
    return quantized_rows(kind, int(np.prod(matrix.shape[:-1])), matrix.shape[-1])


def _bytes(matrix: _Matrix, kind: str) -> int:
    kind = "F32" if len(matrix.shape) == 1 else kind
    return int(np.prod(gguf.quant_shape_to_byte_shape(matrix.shape, gguf.GGMLQuantizationType[kind])))


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise InputError(
            f"{needed / 1e9:.1f} GB are needed in {directory}, {free / 1e9:.1f} GB are free",
            hint="Make room, or set LLAVA_EDGE_HOME to a directory on another disk.",
        )


def _manifest(shape: Shape, files: tuple[BundleFile, ...]) -> Manifest:
    tower: TowerShape = shape.tower
    return Manifest(
        name=f"synthetic {shape.name}",
        family=SYNTHETIC,
        license="none",
        source=f"random weights in the shape of {shape.name}{'; ' if shape.note else ''}{shape.note}",
        files=files,
        prompt=_PROMPT,
        image=ImageSpec(tower.image_size, _MEAN, _STD, "pad", (122, 116, 104)),
        visual_tokens=VisualTokens(tower.side**2, (tower.side, tower.side), (shape.image_tokens,), shape.image_tokens),
        feature_layers=(tower.feature_layer,),
        backends=("mtmd",),
    )
