"""A GGUF file is checked before llama.cpp sees it, and an error names what is wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mutate
import numpy as np
import pytest

import llava_edge
from llava_edge.engine import Engine
from llava_edge.errors import ModelError, ModelFileError
from llava_edge.gguf_check import check_gguf
from llava_edge.gguf_header import TENSOR_TYPES

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"

Parts = Any
Change = Callable[[Parts], object]


def write(tmp_path: Path, original: Path, change: Change) -> Path:
    """The file with one change, everything else consistent."""
    parts = mutate.parse(original.read_bytes())
    change(parts)
    path = tmp_path / "changed.gguf"
    path.write_bytes(mutate.build(parts))
    return path


def put(key: str, kind: int, value: Any, item_kind: int = 0) -> Change:
    def change(parts: Parts) -> None:
        parts.entries = [entry for entry in parts.entries if entry.key != key.encode()]
        parts.entries.append(mutate.Entry(key.encode(), kind, value, item_kind))

    return change


def tensor(which: str, **fields: Any) -> Change:
    def change(parts: Parts) -> None:
        info = next(info for info in parts.infos if info.name == which.encode())
        for field, value in fields.items():
            setattr(info, field, value)
        if 0 < np.prod(info.shape, dtype=object) < 1 << 20:
            mutate.fill(info)

    return change


def vocabulary(token: bytes, kind: int = 1, *, at: int = 9) -> Change:
    def change(parts: Parts) -> None:
        lists = {entry.key: entry.value for entry in parts.entries}
        lists[b"tokenizer.ggml.tokens"][at] = token
        lists[b"tokenizer.ggml.token_type"][at] = kind

    return change


def test_files_that_were_rebuilt_are_the_same(tiny_llm: Path, tiny_mmproj: Path) -> None:
    for path in (tiny_llm, tiny_mmproj):
        data = path.read_bytes()
        assert mutate.build(mutate.parse(data)) == data


def test_good_files_pass(tiny_llm: Path, tiny_mmproj: Path, make_llm: Any, make_mmproj: Any) -> None:
    assert check_gguf(tiny_llm, "llm").architecture == "llama"
    assert check_gguf(tiny_mmproj, "mmproj").tensors["mm.2.bias"].shape == (64,)
    assert check_gguf(make_llm(arch="qwen2vl"), "llm").architecture == "qwen2vl"
    assert check_gguf(make_mmproj(kind="qwen2vl_merger"), "mmproj").text("clip.projector_type") == "qwen2vl_merger"


def test_types_of_tensors_are_those_of_gguf() -> None:
    for number, (name, values, size) in TENSOR_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (values, size)
        assert gguf.GGMLQuantizationType[name] == number


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        (lambda p: setattr(p, "magic", b"GGML"), "magic", "not a GGUF file"),
        (lambda p: setattr(p, "version", 9), "version", "is 9"),
        (lambda p: setattr(p, "version", 3 << 24), "version", "big-endian"),
        (lambda p: setattr(p, "count_shift", (1 << 40, 0)), "tensor count", "at most"),
        (lambda p: setattr(p, "count_shift", (0, 1 << 40)), "key count", "at most"),
        (lambda p: setattr(p, "cut", 0.5), "tensor blk.", "the file has"),
        (lambda p: p.entries.append(p.entries[0]), "general.architecture", "twice"),
        (lambda p: p.infos.append(p.infos[0]), "tensor", "twice"),
        (put("general.alignment", 4, 3), "general.alignment", "power of two"),
        (put("general.alignment", 4, 1 << 31), "general.alignment", "power of two"),
        (put("general.architecture", 8, b"clip"), "general.architecture", "a language model"),
        (put("llama.block_count", 4, 100_000), "llama.block_count", "1 to 512"),
        (put("llama.block_count", 5, 2), "llama.block_count", "int32; expected uint32"),
        (put("llama.expert_count", 4, 100_000), "llama.expert_count", "0 to 512"),
        (put("llama.expert_used_count", 4, 2), "llama.expert_used_count", "2 of 0 experts"),
        (put("llama.attention.head_count_kv", 4, 3), "llama.attention.head_count_kv", "divisor"),
        (put("llama.attention.head_count_kv", 9, [2, 1], 4), "llama.attention.head_count_kv", "one number above 0"),
        (put("llama.attention.head_count", 9, [4, 2], 4), "llama.attention.head_count", "one number above 0"),
        (put("llama.attention.key_length", 4, 8), "llama.rope.dimension_count", "16"),
        (put("llama.attention.layer_norm_rms_epsilon", 6, float("nan")), "llama.attention.layer_norm_rms", "nan"),
        (put("llama.rope.scaling.type", 8, b"nonsense"), "llama.rope.scaling.type", "nonsense"),
        (put("split.count", 2, 3), "split.count", "merge"),
        (put("tokenizer.ggml.model", 8, b"none"), "tokenizer.ggml.model", "none"),
        (put("tokenizer.ggml.tokens", 9, [b"a", b"a"], 8), "tokenizer.ggml.tokens", "twice"),
        (vocabulary(b""), "tokenizer.ggml.tokens", "empty"),
        (vocabulary(b"a\0x"), "tokenizer.ggml.tokens", "zero byte"),
        (vocabulary(b"<0", kind=6), "tokenizer.ggml.tokens", "<0x0A>"),
        (put("tokenizer.ggml.token_type", 9, [1, 1], 5), "tokenizer.ggml.token_type", "2 entries"),
        (put("tokenizer.ggml.model", 8, b"llama"), "tokenizer.ggml.tokens", "no token for the byte"),
        (tensor("output_norm.weight", kind=1), "tensor output_norm.weight", "F16; expected F32"),
        (tensor("output_norm.weight", kind=99), "tensor output_norm.weight", "99"),
        (tensor("output_norm.weight", shape=[0]), "tensor output_norm.weight", "1 or more"),
        (tensor("output_norm.weight", shape=[1 << 62, 1 << 62]), "tensor output_norm.weight", "bytes; the file has"),
        (tensor("output_norm.weight", n_dims=5), "tensor output_norm.weight", "5 dimensions"),
        (tensor("output_norm.weight", shift=32), "tensor output_norm.weight", "offset"),
        (tensor("token_embd.weight", kind=2, shape=[33, 64]), "tensor token_embd.weight", "packs 32 together"),
    ],
)
def test_what_is_wrong_with_a_language_model_is_named(
    change: Change, field: str, says: str, tiny_llm: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, tiny_llm, change)
    with pytest.raises(ModelFileError, match=says) as caught:
        Engine(path)
    assert caught.value.field.startswith(field)
    assert str(path) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        (put("general.architecture", 8, b"llama"), "general.architecture", "a vision tower"),
        (put("clip.has_vision_encoder", 7, 0), "clip.has_vision_encoder", "no vision tower"),
        (put("clip.use_gelu", 4, 1), "clip.use_gelu", "uint32; expected bool"),
        (put("clip.vision.image_size", 5, 32), "clip.vision.image_size", "int32; expected uint32"),
        (put("clip.vision.image_size", 4, 40), "tensor v.position_embd.weight", r"expected \[32, 25\]"),
        (put("clip.vision.image_size", 4, 1 << 30), "clip.vision.image_size", "0 to 4096"),
        (put("clip.vision.patch_size", 4, 0), "clip.vision.patch_size", "1 to 256"),
        (put("clip.vision.block_count", 4, 3), "tensor v.blk.2.attn_q.weight", "missing"),
        (put("clip.vision.attention.head_count", 4, 0), "clip.vision.attention.head_count", "1 to 1024"),
        (put("clip.vision.attention.head_count", 4, 3), "clip.vision.attention.head_count", "divisor"),
        (put("clip.vision.attention.head_dim", 4, 2), "clip.vision.attention.head_dim", "16"),
        (put("clip.vision.attention.layer_norm_epsilon", 6, -1.0), "clip.vision.attention.layer", "-1"),
        (put("clip.vision.feature_layer", 9, [1, 9], 5), "clip.vision.feature_layer", "0 to 2"),
        (put("clip.vision.feature_layer", 9, [1], 5), "tensor mm.0.weight", r"expected \[32, 48\]"),
        (put("clip.vision.image_mean", 9, [0.5], 6), "clip.vision.image_mean", "three"),
        (put("clip.vision.image_std", 9, [0.5, 0.0, 0.5], 6), "clip.vision.image_std", "range"),
        (put("clip.vision.image_grid_pinpoints", 9, [1 << 30, 64], 5), "clip.vision.image_grid_pinpoints", "pairs"),
        (put("clip.projector_type", 8, b""), "clip.projector_type", "missing"),
        (tensor("mm.0.weight", name=b"mm.9.weight"), "tensor mm.0.weight", "missing"),
        (tensor("mm.2.bias", shape=[32]), "tensor mm.2.bias", "32 values for a weight"),
        (tensor("v.blk.1.attn_q.weight", name=b"gone"), "tensor v.blk.1.attn_q.weight", "missing"),
        (tensor("v.patch_embd.weight", shape=[8, 8, 32, 3]), "tensor v.patch_embd.weight", "expected"),
    ],
)
def test_what_is_wrong_with_a_vision_tower_is_named(
    change: Change, field: str, says: str, tiny_mmproj: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=says) as caught:
        check_gguf(write(tmp_path, tiny_mmproj, change), "mmproj")
    assert caught.value.field.startswith(field)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "gone.gguf", "no such model file"),
        (tmp_path, "not a file"),
        (Path("a\0b"), "can't"),
    ):
        with pytest.raises(ModelError, match=says):
            check_gguf(path, "llm")


def test_a_short_file_that_claims_much_takes_no_memory(tmp_path: Path) -> None:
    """A list of 2^40 texts and a text of 2^60 bytes in a file of a hundred bytes."""
    import struct

    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    for value in (
        struct.pack("<IIQ", 9, 8, 1 << 40),
        struct.pack("<IQ", 8, 1 << 60),
        struct.pack("<IIQ", 9, 10, 1 << 22),
    ):
        (tmp_path / "short.gguf").write_bytes(head + value)
        with pytest.raises(ModelFileError, match="k "):
            check_gguf(tmp_path / "short.gguf", "llm")


def test_the_header_of_a_7b_is_read_without_its_weights(tmp_path: Path) -> None:
    """32,000 tokens and 291 tensors over a file that has holes in place of 4 GB of weights."""
    path = tmp_path / "7b.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("context_length", 4096), ("embedding_length", 4096), ("block_count", 32),
                       ("feed_forward_length", 11_008), ("attention.head_count", 32)):  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tokenizer_model("llama")
    tokens = [b"<unk>", *(b"<0x%02X>" % n for n in range(256)), *(b"word%d" % n for n in range(31_743))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, *[6] * 256, *[1] * 31_743])
    shapes = {"token_embd.weight": (32_000, 4096), "output.weight": (32_000, 4096), "output_norm.weight": (4096,)}
    for n in range(32):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{n}.{name}.weight"] = (4096, 4096)
        for name, shape in (("gate", (11_008, 4096)), ("up", (11_008, 4096)), ("down", (4096, 11_008))):
            shapes[f"blk.{n}.ffn_{name}.weight"] = shape
        shapes[f"blk.{n}.attn_norm.weight"] = shapes[f"blk.{n}.ffn_norm.weight"] = (4096,)
    size = 0
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q4_K
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = int(np.prod(shape)) // block * block_bytes
        # For quantised data the writer takes the shape of the bytes.
        raw = (*shape[:-1], shape[-1] // block * block_bytes) if len(shape) > 1 else shape
        writer.add_tensor_info(name, raw, np.dtype(np.uint8 if len(shape) > 1 else np.float32), n_bytes, kind)
        size += -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 64 + size)
    header = check_gguf(path, "llm")
    assert len(header.tensors) == 291
    assert header.size > 3_500_000_000


def test_a_changed_file_is_checked_again(tiny_llm: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_llm.read_bytes())
    check_gguf(path, "llm")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelFileError):
        check_gguf(path, "llm")


def test_a_tower_of_an_unknown_kind_that_ends_the_process_is_refused(
    make_llm: Callable[..., Path], make_mmproj: Callable[..., Path], tmp_path: Path
) -> None:
    """A Qwen2-VL tower that says it is Qwen3-VL's: libmtmd finds a tensor missing, and aborts."""
    change = put("clip.projector_type", 8, b"qwen3vl_merger")
    mmproj = write(tmp_path, make_mmproj(kind="qwen2vl_merger"), change)
    check_gguf(mmproj, "mmproj")
    with pytest.raises(ModelFileError, match="end the process"):
        llava_edge.load(llm=make_llm(arch="qwen2vl"), mmproj=mmproj)


def test_a_model_of_another_kind_is_tried_once(
    make_llm: Callable[..., Path], tiny_mmproj: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(tmp_path))
    llm = make_llm(arch="mistral3")
    for _ in range(2):
        with llava_edge.load(llm=llm, mmproj=tiny_mmproj, n_threads=1) as model:
            assert model.chat().ask("Hi", max_tokens=2).text is not None
        assert len(list((tmp_path / "trials").iterdir())) == 1


@pytest.mark.parametrize("kind", ["llama", "qwen2vl", "mlp", "qwen2vl_merger"])
def test_mutated_files_are_refused_or_load(
    kind: str, make_llm: Callable[..., Path], make_mmproj: Callable[..., Path], tmp_path: Path
) -> None:
    """A short run of ``tests/fuzz/run.py``; docs/security.md has the figures of the long one."""
    tower = kind in ("mlp", "qwen2vl_merger")
    llm = make_llm(arch="llama" if tower else kind)
    more = ["--mmproj", str(make_mmproj(kind=kind))] if tower else []
    command = [
        sys.executable,
        str(FUZZ / "run.py"),
        "--llm",
        str(llm),
        "--count",
        "700",
        "--keep",
        str(tmp_path),
        *more,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert not result["failures"], result
    assert result["loaded"] > 50
    assert result["refused"] > 200


def test_random_bytes_never_confuse_the_preflight(tiny_mmproj: Path, tmp_path: Path) -> None:
    data, rng = tiny_mmproj.read_bytes(), random.Random(0)
    for number in range(300):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 3, 30))):
            broken[rng.randrange(4000)] = rng.randrange(256)
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(bytes(broken[: rng.randrange(len(data))]) if rng.random() < 0.3 else bytes(broken))
        try:
            check_gguf(path, "mmproj")
        except ModelFileError as error:
            assert error.field  # noqa: PT017
