"""Structure-aware mutation of GGUF headers: a file is taken apart, one to four things in it are changed, and it is
written again with everything else consistent, so that the changes get past the first checks."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from typing import Any

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
LIMITS = [0, 1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 127, 255, 256, 511, 512, 513, 1023, 4096, 65535, 65536, 1 << 20,
          (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63,
          (1 << 64) - 1]  # fmt: skip
FLOATS = [0.0, -0.0, 1e-30, 1e-6, 1.0, -1.0, 1e30, float("inf"), float("-inf"), float("nan")]
ARCHITECTURES = [
    "llama", "qwen2vl", "qwen2", "qwen3", "gemma3", "phi3", "gemma", "mamba", "bert", "t5", "clip", "gpt2",
    "falcon", "rwkv7", "deepseek2", "bloom", "", "nonsense", "llama4", "mistral3", "cogvlm", "qwen3vl",
]  # fmt: skip
PROJECTORS = [
    "mlp", "ldp", "ldpv2", "resampler", "adapter", "qwen2vl_merger", "qwen2.5vl_merger", "gemma3", "idefics3",
    "pixtral", "internvl", "llama4", "phi4", "lfm2", "kimivl", "janus_pro", "cogvlm", "minicpmv4_6", "glm4v",
    "qwen3vl_merger", "ultravox", "qwen2a", "lightonocr", "dots_ocr", "", "nonsense",
]  # fmt: skip
TEXTS = [b"", b"\0", b"\xff\xfe", b"llama", b"gpt2", b"none", b"no_vocab", b"bert", b"t5", b"rwkv", b"plamo2", b"yarn",
         b"longrope", b"default", b"qwen2", b"kimi-k2", b"{{", b"{% for m in messages %}{{ m.content }}{% endfor %}",
         b"spatial_unpad", b"A" * 70_000]  # fmt: skip
EXTRA_KEYS = [
    *[(f"{{arch}}.{name}", 4) for name in (
        "expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count", "attention.key_length",
        "attention.value_length", "rope.dimension_count", "nextn_predict_layers", "vocab_size",
        "leading_dense_block_count", "attention.sliding_window", "pooling_type", "rope.scaling.original_context_length",
        "embedding_length_out", "attention.head_count_kv", "expert_feed_forward_length", "attention.key_length_swa",
        "rope.dimension_count_swa")],
    *[(f"clip.vision.{name}", 4) for name in (
        "image_min_pixels", "image_max_pixels", "spatial_merge_size", "n_wa_pattern", "window_size",
        "projector.scale_factor", "attention.head_dim", "attention.head_count_kv", "preproc_image_size",
        "preproc_min_tiles", "preproc_max_tiles")],
    *[(f"tokenizer.ggml.{name}", 4) for name in (
        "bos_token_id", "eos_token_id", "eot_token_id", "padding_token_id", "unknown_token_id", "seperator_token_id")],
    ("{arch}.rope.scaling.factor", 6), ("{arch}.rope.freq_base", 6), ("{arch}.attention.scale", 6),
    ("{arch}.rope.scaling.attn_factor", 6), ("{arch}.attention.clamp_kqv", 6), ("{arch}.final_logit_softcapping", 6),
    ("{arch}.attention.causal", 7), ("{arch}.use_parallel_residual", 7), ("tokenizer.ggml.add_eos_token", 7),
    ("tokenizer.ggml.add_space_prefix", 7), ("clip.use_silu", 7), ("clip.has_audio_encoder", 7),
    ("clip.has_gen_audio_encoder", 7), ("{arch}.rope.scaling.type", TEXT), ("clip.vision.mm_patch_merge_type", TEXT),
    ("clip.vision.projector_type", TEXT), ("split.count", 2), ("split.no", 2), ("general.alignment", 4),
    ("clip.minicpmv_version", 5),
]  # fmt: skip
EXTRA_ARRAYS = [
    "clip.vision.feature_layer", "clip.vision.image_grid_pinpoints", "clip.vision.wa_layer_indexes",
    "clip.vision.image_mean", "{arch}.rope.dimension_sections", "{arch}.attention.head_count_kv",
    "{arch}.feed_forward_length", "{arch}.expert_used_count", "tokenizer.ggml.scores", "tokenizer.ggml.token_type",
    "tokenizer.ggml.suppress_tokens",
]  # fmt: skip
EXTRA_TENSORS = [
    "v.class_embd", "v.pre_ln.weight", "v.post_ln.weight", "v.patch_embd.bias", "v.image_newline",
    "v.blk.0.attn_qkv.weight", "v.blk.0.ffn_gate.weight", "v.blk.0.attn_q_norm.weight", "v.blk.0.ls1.weight",
    "mm.1.weight", "mm.3.weight", "mm.4.weight", "output.weight", "rope_freqs.weight", "blk.0.attn_q.bias",
    "blk.0.attn_output.bias", "blk.0.attn_q_norm.weight", "blk.0.ffn_gate_inp.weight", "v.position_embd.weight",
    "token_embd_norm.weight",
]  # fmt: skip


@dataclass
class Entry:
    """A key and its value; of arrays ``kind`` and ``count`` may claim something else than ``items`` are."""

    key: bytes
    kind: int
    value: Any
    item_kind: int = 0
    count: int | None = None


@dataclass
class Info:
    """A tensor's entry; ``data`` is what stands in the file for it."""

    name: bytes
    shape: list[int]
    kind: int
    data: bytes
    n_dims: int | None = None
    shift: int = 0


@dataclass
class Gguf:
    """A file in parts."""

    entries: list[Entry] = field(default_factory=list)
    infos: list[Info] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    count_shift: tuple[int, int] = (0, 0)
    alignment: int = 32
    cut: float | None = None
    flips: tuple[int, ...] = ()

    def copy(self) -> Gguf:
        entries = [
            Entry(e.key, e.kind, list(e.value) if e.kind == ARRAY else e.value, e.item_kind) for e in self.entries
        ]
        infos = [Info(i.name, list(i.shape), i.kind, i.data) for i in self.infos]
        return Gguf(entries, infos, self.magic, self.version)


def parse(data: bytes) -> Gguf:
    """Take a well-formed file apart."""
    at = 8

    def number(code: str) -> Any:
        nonlocal at
        at += struct.calcsize(code)
        return struct.unpack_from("<" + code, data, at - struct.calcsize(code))[0]

    def text() -> bytes:
        nonlocal at
        length = number("Q")
        at += length
        return data[at - length : at]

    n_tensors, n_entries = number("Q"), number("Q")
    out = Gguf()
    for _ in range(n_entries):
        key, kind = text(), number("I")
        if kind == ARRAY:
            item, count = number("I"), number("Q")
            values = [text() if item == TEXT else number(CODES[item]) for _ in range(count)]
            out.entries.append(Entry(key, ARRAY, values, item))
        else:
            out.entries.append(Entry(key, kind, text() if kind == TEXT else number(CODES[kind])))
    raw = [(text(), [number("Q") for _ in range(number("I"))], number("I"), number("Q")) for _ in range(n_tensors)]
    start = -(-at // 32) * 32
    ends = [*(offset for *_, offset in raw[1:]), len(data) - start]
    for (name, shape, kind, offset), end in zip(raw, ends, strict=True):
        out.infos.append(Info(name, shape, kind, data[start + offset : start + end]))
    return out


def build(parts: Gguf) -> bytes:
    """Write the parts again."""
    counts = (len(parts.infos) + parts.count_shift[0], len(parts.entries) + parts.count_shift[1])
    out = bytearray(parts.magic + struct.pack("<I", parts.version & 0xFFFFFFFF))
    out += b"".join(struct.pack("<Q", count & (1 << 64) - 1) for count in counts)
    for entry in parts.entries:
        out += _text(entry.key) + struct.pack("<I", entry.kind & 0xFFFFFFFF)
        if entry.kind == ARRAY:
            count = len(entry.value) if entry.count is None else entry.count
            out += struct.pack("<IQ", entry.item_kind & 0xFFFFFFFF, count & (1 << 64) - 1)
            out += b"".join(_scalar(entry.item_kind, value) for value in entry.value)
        else:
            out += _scalar(entry.kind, entry.value)
    offset, blobs = 0, []
    for info in parts.infos:
        n_dims = len(info.shape) if info.n_dims is None else info.n_dims
        out += _text(info.name) + struct.pack("<I", n_dims & 0xFFFFFFFF)
        out += b"".join(struct.pack("<Q", n & (1 << 64) - 1) for n in info.shape)
        out += struct.pack("<IQ", info.kind & 0xFFFFFFFF, (offset + info.shift) & (1 << 64) - 1)
        blob = info.data + b"\0" * (-len(info.data) % parts.alignment)
        blobs.append(blob)
        offset += len(blob)
    for position in parts.flips:
        out[position % len(out)] ^= 1 << (position >> 8) % 8
    out += b"\0" * (-len(out) % parts.alignment)
    whole = bytes(out) + b"".join(blobs)
    return whole if parts.cut is None else whole[: int(len(whole) * parts.cut)]


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _scalar(kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return _text(value if isinstance(value, bytes) else str(value).encode())
    code = CODES.get(kind, "I")
    if isinstance(value, bytes):
        value = len(value)
    if code in "fd":
        try:
            return struct.pack("<" + code, float(value))
        except OverflowError:
            return struct.pack("<" + code, float("inf"))
    size = struct.calcsize(code)
    whole = int(value) if value == value and abs(value) < 1e300 else 0
    return (whole & (1 << 8 * size) - 1).to_bytes(size, "little")


# ggml's types with values and bytes a block, so that data of a changed type has the right size.
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
          12: (256, 144), 14: (256, 210), 16: (256, 66), 20: (32, 18), 24: (1, 1), 26: (1, 4), 28: (1, 8),
          30: (1, 2)}  # fmt: skip


def mutate(original: Gguf, rng: random.Random) -> Gguf:
    """A copy with one to four changes."""
    parts = original.copy()
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        rng.choices(_MUTATIONS, _WEIGHTS)[0](parts, rng)
    return parts


def _change_scalar(parts: Gguf, rng: random.Random) -> None:
    entry = rng.choice(parts.entries)
    if entry.kind == ARRAY:
        _change_array(parts, rng)
    elif entry.kind == TEXT:
        entry.value = _some_text(entry, rng)
    elif entry.kind in (6, 12):
        entry.value = rng.choice([*FLOATS, rng.uniform(-10, 10)])
    else:
        entry.value = _near(entry.value, rng)


def _some_text(entry: Entry, rng: random.Random) -> bytes:
    if entry.key == b"general.architecture":
        return rng.choice(ARCHITECTURES).encode()
    if entry.key.endswith(b"projector_type"):
        return rng.choice(PROJECTORS).encode()
    value = entry.value if isinstance(entry.value, bytes) else str(entry.value).encode()
    return rng.choice([*TEXTS, value[:-1], value + b"x", value * 2, bytes(rng.randrange(256) for _ in range(8))])


def _near(value: Any, rng: random.Random) -> int:
    value = len(value) if isinstance(value, bytes) else int(value) if value == value and abs(value) < 1e30 else 0
    return rng.choice(
        [rng.choice(LIMITS), value + 1, value - 1, value * 2, value // 2, value + 32, rng.randrange(1, 200)]
    )


def _change_array(parts: Gguf, rng: random.Random) -> None:
    arrays = [entry for entry in parts.entries if entry.kind == ARRAY]
    if not arrays:
        return
    entry = rng.choice(arrays)
    what = rng.randrange(7)
    if what == 0:
        entry.count = rng.choice([*LIMITS, len(entry.value) + 1, len(entry.value) - 1])
    elif what == 1:
        entry.item_kind = rng.choice([*CODES, TEXT, ARRAY, 13, 255])
    elif what == 2:
        del entry.value[rng.randrange(len(entry.value) + 1) :]
    elif what == 3 and entry.value:
        entry.value += [rng.choice(entry.value)] * rng.choice((1, 2, 300))
    elif entry.value:
        for _ in range(rng.choice((1, 1, 5))):
            entry.value[rng.randrange(len(entry.value))] = _some_item(entry, rng)


def _some_item(entry: Entry, rng: random.Random) -> Any:
    if entry.item_kind == TEXT:
        return rng.choice([b"", rng.choice(entry.value), b"\xff", b"<0x41>", b"<0x", b" ", b"a b c", b"x" * 3000,
                           b"\xe2\x96\x81", b"<|im_end|>", b"\0"])  # fmt: skip
    if entry.item_kind in (6, 12):
        return rng.choice(FLOATS)
    return rng.choice([*LIMITS, *range(-2, 10)])


def _change_key(parts: Gguf, rng: random.Random) -> None:
    what, index = rng.randrange(5), rng.randrange(len(parts.entries))
    entry = parts.entries[index]
    if what == 0:
        del parts.entries[index]
    elif what == 1:
        parts.entries.append(entry)
    elif what == 2:
        entry.key = rng.choice(
            [b"", b"\xff", entry.key + b"x", entry.key[:-1], rng.choice(parts.entries).key, b"k" * 300]
        )
    elif what == 3:
        entry.kind = rng.choice([*CODES, TEXT, 13, 1 << 31]) if entry.kind != ARRAY else entry.kind
    else:
        other = rng.choice(parts.entries)
        if other.kind == entry.kind and other.item_kind == entry.item_kind:
            entry.value, other.value = other.value, entry.value


def _architecture(parts: Gguf) -> str:
    return next((e.value.decode("latin-1") for e in parts.entries if e.key == b"general.architecture"), "llama")


def _add_key(parts: Gguf, rng: random.Random) -> None:
    arch = _architecture(parts)
    if rng.random() < 0.3:
        key = rng.choice(EXTRA_ARRAYS).format(arch=arch).encode()
        items = [rng.choice([*range(8), *LIMITS]) for _ in range(rng.choice((0, 1, 2, 3, 4, 5, 100)))]
        parts.entries.append(Entry(key, ARRAY, items, rng.choice((4, 5, 5, 6, 7))))
        return
    name, kind = rng.choice(EXTRA_KEYS)
    value = rng.choice(TEXTS) if kind == TEXT else rng.choice(FLOATS) if kind == 6 else rng.choice(LIMITS)
    key = name.format(arch=arch).encode()
    parts.entries = [entry for entry in parts.entries if entry.key != key]
    parts.entries.append(Entry(key, kind, value))


def _change_tensor(parts: Gguf, rng: random.Random) -> None:
    if not parts.infos:
        return
    what, index = rng.randrange(9), rng.randrange(len(parts.infos))
    info = parts.infos[index]
    if what == 0:
        del parts.infos[index]
    elif what == 1:
        parts.infos.append(info)
    elif what == 2:
        info.name = rng.choice([b"", info.name + b"x", rng.choice(parts.infos).name, b"n" * 64, b"\xff"])
    elif what == 3:
        axis = rng.randrange(len(info.shape))
        info.shape[axis] = _near(info.shape[axis], rng)
    elif what == 4:
        info.n_dims = rng.choice([0, 1, 2, 3, 4, 5, 1 << 31])
    elif what == 5:
        info.shift = rng.choice([*LIMITS, -32, 32, 1])
    elif what == 6:
        info.kind = rng.choice([*range(45), 255, 1 << 31])
    else:
        _reshape(info, rng)


def _reshape(info: Info, rng: random.Random) -> None:
    """Another shape or type, with data that fits: nothing of the container is wrong then."""
    if rng.random() < 0.4:
        info.kind = rng.choice(list(BLOCKS))
    elif rng.random() < 0.5:
        rng.shuffle(info.shape)
    else:
        axis = rng.randrange(len(info.shape))
        info.shape[axis] = max(1, min(4096, _near(info.shape[axis], rng)))
    fill(info)


def fill(info: Info) -> None:
    """Give a tensor as many bytes as its shape and type say."""
    block, size = BLOCKS.get(info.kind, (1, 4))
    total = size * -(-info.shape[0] // block)
    for length in info.shape[1:]:
        total *= length
    total = min(total, 1 << 20)
    info.data = (info.data * (total // max(1, len(info.data)) + 1))[:total]


def _add_tensor(parts: Gguf, rng: random.Random) -> None:
    shape = rng.choice([[rng.choice((1, 16, 32, 64, 96))], [rng.choice((32, 64)), rng.choice((32, 64, 16))]])
    info = Info(rng.choice(EXTRA_TENSORS).encode(), shape, rng.choice((0, 0, 0, 1)), b"\x01\x02\x03\x3c" * 16)
    fill(info)
    parts.infos = [other for other in parts.infos if other.name != info.name]
    parts.infos.append(info)


def _swap_tensors(parts: Gguf, rng: random.Random) -> None:
    a, b = rng.choice(parts.infos), rng.choice(parts.infos)
    a.name, b.name = b.name, a.name


def _change_weights(parts: Gguf, rng: random.Random) -> None:
    info = rng.choice(parts.infos)
    special = struct.pack("<4f", float("nan"), float("inf"), -1e38, 0.0)
    info.data = (special * (len(info.data) // 16 + 1))[: len(info.data)]


def _change_frame(parts: Gguf, rng: random.Random) -> None:
    what = rng.randrange(6)
    if what == 0:
        parts.magic = rng.choice([b"FUGG", b"gguf", b"ggml", b"\0\0\0\0"])
    elif what == 1:
        parts.version = rng.choice([0, 1, 2, 4, 3 << 24, (1 << 32) - 1])
    elif what == 2:
        parts.count_shift = (rng.choice([-1, 1, 1 << 31, 1 << 62, -(1 << 62)]), 0)
    elif what == 3:
        parts.count_shift = (0, rng.choice([-1, 1, 1 << 31, 1 << 62, -(1 << 62)]))
    elif what == 4:
        parts.cut = rng.random()
    else:
        parts.alignment = rng.choice([8, 16, 64, 128])
        parts.entries.append(Entry(b"general.alignment", 4, rng.choice([parts.alignment, 0, 3, 1 << 31])))


def _flip_bits(parts: Gguf, rng: random.Random) -> None:
    parts.flips = tuple(rng.randrange(1 << 30) for _ in range(rng.choice((1, 1, 2, 8))))


_MUTATIONS = [_change_scalar, _change_array, _change_key, _add_key, _change_tensor, _add_tensor, _swap_tensors,
              _change_weights, _change_frame, _flip_bits]  # fmt: skip
_WEIGHTS = [6, 4, 3, 6, 6, 2, 1, 1, 1, 2]
