"""The preflight of a GGUF file: what llama.cpp would assert, or trust, is checked before it sees the file.

llama.cpp answers a wrong shape of a tensor with an error, but ends the whole process over hyper-parameters,
vocabularies and vision towers that don't fit together. Those are checked here, against the sources of the pinned
version (``llama-model.cpp``, ``llama-vocab.cpp``, ``tools/mtmd/clip.cpp``).
"""

from __future__ import annotations

import functools
import math
import re
import stat
from pathlib import Path
from typing import Any, Literal

from llava_edge.errors import ModelError
from llava_edge.gguf_header import ARRAY, FLOAT32, INT32, KIND_NAMES, TEXT, UINT16, UINT32, Array, Header, read_header

GgufKind = Literal["llm", "mmproj"]

# Architectures whose files were mutated by the hundred thousand without harm; see ``tests/fuzz``.
CHECKED_ARCHITECTURES = {"llama", "qwen2", "qwen2vl"}
MAX_LAYERS = 512
MAX_WIDTH = 1 << 20
MAX_EXPERTS = 512
# Vocabularies of decoders: SentencePiece and byte-level BPE.
TOKENIZERS = ("llama", "gpt2", "gemma4")
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
# Architectures whose graph demands that heads, keys, values and rotation have one width.
_ONE_HEAD_WIDTH = {
    "llama", "llama4", "qwen2", "qwen2vl", "qwen2moe", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "mistral3",
    "granite", "olmo2", "internlm2", "smollm3", "ernie4_5", "cogvlm", "starcoder2", "baichuan", "falcon", "exaone4",
    "hunyuan_vl", "paddleocr", "deci", "nemotron", "orion", "xverse",
}  # fmt: skip
_BYTE_TOKEN = re.compile(rb"<0x[0-9A-Fa-f]{2}>\Z")
_BYTE_TYPE = 6


def check_gguf(path: Path, kind: GgufKind) -> Header:
    """Check a file for what it is to be used as, and return its header without its long lists.

    Takes milliseconds: the header is read, the weights are not. A file that has not changed is not read again.

    Raises
    ------
    ModelFileError
        The file is malformed, or of the other kind; ``field`` and the message name the key or the tensor.
    ModelError
        No such file, or it can't be read.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ModelError(f"no such model file: {path}", hint="Check the path.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path} is not a file", hint="Name one GGUF file.")
    return _check(path, kind, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=8)
def _check(path: Path, kind: GgufKind, *_unchanged: int) -> Header:
    header = read_header(path)
    architecture = header.architecture
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,63}", architecture):
        raise header.error("general.architecture", f"is {architecture[:80]!r}; expected a model's name")
    if (architecture == "clip") != (kind == "mmproj"):
        wanted = "a vision tower (clip)" if kind == "mmproj" else "a language model"
        raise header.error("general.architecture", f"is {architecture!r}; this file is to be {wanted}")
    if not header.tensors:
        raise header.error("tensor count", "is 0; a model has tensors")
    _check_types_of_weights(header)
    if kind == "mmproj":
        from llava_edge.gguf_mmproj import check_mmproj

        check_mmproj(header)
    else:
        _check_llm(header)
    return header.without_long_lists()


def integer(header: Header, key: str, low: int, high: int, *, required: bool = True) -> int | None:
    """A uint32 of the header within its range; None if it is missing and may be."""
    value = _scalar(header, key, UINT32, required)
    if value is not None and not low <= value <= high:
        raise header.error(key, f"is {value}; expected {low} to {high}")
    return None if value is None else int(value)


def number(header: Header, key: str, low: float, high: float, *, required: bool = True) -> float | None:
    """A finite float32 of the header within its range."""
    value = _scalar(header, key, FLOAT32, required)
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise header.error(key, f"is {value}; expected {low} to {high}")
    return None if value is None else float(value)


def array(header: Header, key: str, kind: int, *, required: bool = True) -> Array | None:
    """A list of the header whose items have this type."""
    field = header.fields.get(key)
    if field is None:
        if required:
            raise header.error(key, "is missing")
        return None
    if field.kind != ARRAY or field.value.kind != kind:
        raise header.error(key, f"is of type {field.kind_name}; expected a list of {KIND_NAMES[kind]}")
    found: Array = field.value
    return found


def check_shape(header: Header, name: str, *shape: int, required: bool = True) -> bool:
    """Whether a tensor is there; ModelFileError if its shape (row's length first) is another."""
    tensor = header.tensors.get(name)
    if tensor is None:
        if required:
            raise header.error(f"tensor {name}", "is missing")
        return False
    expected = (*shape, 1, 1, 1, 1)[:4]
    if tensor.padded_shape != expected:
        raise header.error(f"tensor {name}", f"has the shape {list(tensor.shape)}; expected {list(shape)}")
    return True


def _scalar(header: Header, key: str, kind: int, required: bool) -> Any:
    field = header.fields.get(key)
    if field is None:
        if required:
            raise header.error(key, "is missing")
        return None
    if field.kind != kind:
        raise header.error(key, f"is of type {field.kind_name}; expected {KIND_NAMES[kind]}")
    return field.value


def _check_types_of_weights(header: Header) -> None:
    """Norms and biases are added and multiplied value by value, which llama.cpp does with float32 only."""
    for tensor in header.tensors.values():
        if max(tensor.padded_shape[1:]) == 1 and tensor.type != "F32":
            raise header.error(f"tensor {tensor.name}", f"is a vector of type {tensor.type}; expected F32")


def _check_llm(header: Header) -> None:
    arch = header.architecture
    splits = _scalar(header, "split.count", UINT16, required=False)
    if splits is not None and splits > 1:
        raise header.error("split.count", f"is {splits}; merge the parts first (llama-gguf-split --merge)")
    layers = integer(header, f"{arch}.block_count", 1, MAX_LAYERS) or 0
    width = integer(header, f"{arch}.embedding_length", 1, MAX_WIDTH) or 0
    integer(header, f"{arch}.context_length", 1, 1 << 27)
    integer(header, f"{arch}.nextn_predict_layers", 0, layers - 1, required=False)
    _per_layer(header, f"{arch}.feed_forward_length", layers, 0, MAX_WIDTH)
    heads = _per_layer(header, f"{arch}.attention.head_count", layers, 0, 4096)
    kv_heads = _per_layer(header, f"{arch}.attention.head_count_kv", layers, 0, 4096) or heads
    for layer, (n_head, n_kv) in enumerate(zip(heads, kv_heads, strict=False)):
        if n_head and (n_kv > n_head or (n_kv and n_head % n_kv)):
            problem = f"is {n_kv} in layer {layer}; expected a divisor of the {n_head} heads"
            raise header.error(f"{arch}.attention.head_count_kv", problem)
    if arch in CHECKED_ARCHITECTURES:
        _check_one_for_all(header, arch, width, heads, kv_heads)
    _check_experts(header, arch, layers)
    _check_rope(header, arch, width, heads[0] if heads else 0)
    for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon"):
        number(header, f"{arch}.attention.{key}", 0, 1, required=False)
    _check_vocabulary(header)


def _per_layer(header: Header, key: str, layers: int, low: int, high: int) -> list[int]:
    """One number for all layers, or a list with one for each; empty if the key is missing."""
    field = header.fields.get(key)
    if field is None:
        return []
    if field.kind != ARRAY:
        return [integer(header, key, low, high) or 0] * layers
    if field.value.kind not in (UINT32, INT32) or len(field.value.items) != layers:
        raise header.error(key, f"is a list of {len(field.value.items)}; expected {layers} whole numbers")
    if not all(low <= value <= high for value in field.value.items):
        raise header.error(key, f"holds a value outside of {low} to {high}")
    return list(field.value.items)


def _check_one_for_all(header: Header, arch: str, width: int, heads: list[int], kv_heads: list[int]) -> None:
    """llama.cpp takes the first layer's heads for all of these models' layers, and its cache each layer's own."""
    for key, counts in (("head_count", heads), ("head_count_kv", kv_heads)):
        if len(set(counts)) != 1 or not counts[0]:
            raise header.error(
                f"{arch}.attention.{key}", f"is {counts[:8]}; expected one number above 0 for all layers"
            )
    per_head = integer(header, f"{arch}.attention.key_length", 1, 8192, required=False) or width // heads[0]
    if arch != "llama" and per_head * heads[0] != width:
        problem = f"is {per_head} for {heads[0]} heads; expected the width, {width}, of all together"
        raise header.error(f"{arch}.attention.key_length", problem)


def _check_experts(header: Header, arch: str, layers: int) -> None:
    experts = integer(header, f"{arch}.expert_count", 0, MAX_EXPERTS, required=False) or 0
    used_key = f"{arch}.expert_used_count"
    used = max(_per_layer(header, used_key, layers, 0, MAX_EXPERTS), default=0)
    if used > experts or (experts and not used):
        raise header.error(used_key, f"is {used} of {experts} experts")
    groups_key, group_used_key = f"{arch}.expert_group_count", f"{arch}.expert_group_used_count"
    groups = integer(header, groups_key, 0, MAX_EXPERTS, required=False) or 0
    group_used = integer(header, group_used_key, 0, MAX_EXPERTS, required=False) or 0
    if groups and (groups >= experts or (groups > 1 and experts % groups)):
        raise header.error(groups_key, f"is {groups} for {experts} experts")
    if groups > 1 and not 0 < group_used < groups:
        raise header.error(group_used_key, f"is {group_used} of {groups} groups")


def _check_rope(header: Header, arch: str, width: int, heads: int) -> None:
    number(header, f"{arch}.rope.freq_base", 1e-3, 1e15, required=False)
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        number(header, f"{arch}.{key}", 0, 1e6, required=False)
    scaling = f"{arch}.rope.scaling.type"
    if scaling in header.fields and header.text(scaling) not in ROPE_SCALINGS:
        raise header.error(scaling, f"is {header.text(scaling)!r}; expected one of {', '.join(ROPE_SCALINGS)}")
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    given = [integer(header, f"{arch}.{key}", 1, 8192, required=False) for key in keys]
    if not heads:
        return
    per_head = width // heads
    key_width, value_width, rotated = given[0] or per_head, given[1] or per_head, given[2]
    sections = array(header, f"{arch}.rope.dimension_sections", INT32, required=False)
    if sections is not None:
        sizes = list(sections.items)
        if len(sizes) != 4 or min(sizes) < 0 or not any(sizes[:3]) or sum(sizes) > key_width:
            problem = f"is {sizes[:8]}; expected 4 sizes that fit a head of {key_width}"
            raise header.error(f"{arch}.rope.dimension_sections", problem)
    rotated = key_width if rotated is None else rotated
    if rotated > key_width or rotated % 2:
        problem = f"is {rotated}; expected an even number up to the width of a head's key, {key_width}"
        raise header.error(f"{arch}.rope.dimension_count", problem)
    if arch in _ONE_HEAD_WIDTH and not key_width == value_width == rotated:
        problem = f"is {key_width}, value_length {value_width}, rope.dimension_count {rotated}; expected the same"
        raise header.error(f"{arch}.attention.key_length", problem)


def _check_vocabulary(header: Header) -> None:
    key = "tokenizer.ggml.model"
    tokenizer = header.text(key)
    if tokenizer not in TOKENIZERS:
        raise header.error(key, f"is {tokenizer[:40]!r}; expected one of {', '.join(TOKENIZERS)}")
    tokens_key = "tokenizer.ggml.tokens"
    listed = array(header, tokens_key, TEXT)
    assert listed is not None
    tokens: list[bytes] = list(listed.items)
    if not tokens:
        raise header.error(tokens_key, "is empty")
    if len(set(tokens)) != len(tokens):
        raise header.error(tokens_key, "holds a token twice")
    if not all(tokens):
        raise header.error(tokens_key, f"holds an empty text at {tokens.index(b'')}")
    if any(b"\0" in token for token in tokens):  # llama.cpp reads up to it, so that two tokens could be one
        raise header.error(tokens_key, "holds a text with a zero byte")
    types = _of_each_token(header, "tokenizer.ggml.token_type", (INT32,), len(tokens))
    _of_each_token(header, "tokenizer.ggml.scores", (FLOAT32, INT32), len(tokens))
    if _BYTE_TYPE in types:
        for token, kind in zip(tokens, types, strict=True):
            if kind == _BYTE_TYPE and not _BYTE_TOKEN.match(token):
                raise header.error(tokens_key, f"marks {token[:40]!r} as a byte; expected the form <0x0A>")
    if tokenizer == "llama":
        known = set(tokens)
        lacking = [n for n in range(256) if b"<0x%02X>" % n not in known and bytes([n]) not in known]
        if lacking:
            raise header.error(tokens_key, f"has no token for the byte {lacking[0]}")
    if tokenizer in ("gpt2", "gemma4") and "tokenizer.ggml.merges" in header.fields:
        array(header, "tokenizer.ggml.merges", TEXT)


def _of_each_token(header: Header, key: str, kinds: tuple[int, ...], count: int) -> tuple[Any, ...]:
    field = header.fields.get(key)
    if field is None:
        return ()
    if field.kind != ARRAY or field.value.kind not in kinds:
        raise header.error(key, f"is of type {field.kind_name}; expected a list of {KIND_NAMES[kinds[0]]}")
    if len(field.value.items) != count:
        raise header.error(key, f"has {len(field.value.items)} entries for {count} tokens")
    return tuple(field.value.items)
