"""Models of a few thousand parameters, built in well under a second, and pictures to show them."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from PIL import Image

import llava_edge
from llava_edge.bundle import (
    MANIFEST_NAME,
    BundleFile,
    Manifest,
    Probe,
    PromptFormat,
    VisualTokens,
    probe_picture,
)
from llava_edge.engine import Engine
from llava_edge.types import ImageSpec
from llava_edge.vision.mtmd import MtmdEncoder

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
CORPUS = (
    "What is in this picture? What colour is it? A cat is sleeping on the table. The dog runs in the snow. "
    "user assistant system It is a photo of a small animal with the colour of the image. You are a helpful model. "
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IMAGE = ImageSpec(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), mode="pad", pad_color=(9, 9, 9))
GRID = (4, 4)


@functools.cache
def byte_names() -> dict[int, str]:
    """The printable characters that byte-level BPE writes bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


@functools.cache
def vocabulary(merges: int = 160) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE vocabulary learnt from CORPUS; the special tokens come first."""
    names = byte_names()
    words = [[names[b] for b in f" {word}".encode()] for word in CORPUS.split()]
    tokens, learnt = [*SPECIALS, *names.values()], []
    for _ in range(merges):
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        if not pairs:
            break
        left, right = max(sorted(pairs), key=lambda pair: pairs[pair])
        learnt.append(f"{left} {right}")
        if left + right not in tokens:
            tokens.append(left + right)
        words = [_merged(word, left, right) for word in words]
    return tokens, learnt


def _merged(word: list[str], left: str, right: str) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and out[-1] == left and piece == right:
            out[-1] = left + right
        else:
            out.append(piece)
    return out


def write_llm(
    path: Path,
    *,
    arch: str = "llama",
    width: int = 64,
    template: str | None = CHATML,
    special_type: int = gguf.TokenType.CONTROL,
    context: int = 2048,
    layers: int = 2,
) -> Path:
    """A language model with random weights; ``arch`` is llama or qwen2vl (which has M-RoPE)."""
    random = np.random.default_rng(7)
    heads, kv_heads, hidden = 4, 2, 96
    writer = gguf.GGUFWriter(path, arch)
    tokens, merges = vocabulary()
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if arch == "qwen2vl":
        writer.add_rope_dimension_sections([2, 3, 3, 0])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds = [special_type] * len(SPECIALS) + [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIALS))
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)

    def add(name: str, *shape: int, scale: float = 0.3) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * scale).astype(np.float32))

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(width, np.float32))

    add("token_embd.weight", len(tokens), width, scale=1.0)
    ones("output_norm.weight")
    kv_width = width // heads * kv_heads
    for n in range(layers):
        ones(f"blk.{n}.attn_norm.weight")
        ones(f"blk.{n}.ffn_norm.weight")
        for name, rows in (("attn_q", width), ("attn_k", kv_width), ("attn_v", kv_width)):
            add(f"blk.{n}.{name}.weight", rows, width)
            if arch == "qwen2vl":
                add(f"blk.{n}.{name}.bias", rows)
        add(f"blk.{n}.attn_output.weight", width, width)
        for name, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
            add(f"blk.{n}.ffn_{name}.weight", *shape)
    return _finish(writer, path)


def write_mmproj(
    path: Path, *, width: int = 64, kind: str = "mlp", image_size: int = 32, newline: bool = False
) -> Path:
    """A vision tower without class token, 4 x 4 patches, and its projector; ``kind`` mlp or qwen2vl_merger."""
    random = np.random.default_rng(11)
    tower, hidden, blocks, patch = 32, 64, 2, 8
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(kind)
    writer.add_bool("clip.use_gelu", True)
    writer.add_vision_image_size(image_size)
    writer.add_vision_patch_size(patch)
    writer.add_vision_embedding_length(tower)
    writer.add_vision_feed_forward_length(hidden)
    writer.add_vision_projection_dim(width)
    writer.add_vision_block_count(blocks)
    writer.add_vision_head_count(2)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean(IMAGE.mean)
    writer.add_vision_image_std(IMAGE.std)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    def add(name: str, *shape: int, scale: float = 0.3) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * scale).astype(np.float32))

    def linear(name: str, rows: int, columns: int) -> None:
        add(f"{name}.weight", rows, columns, scale=0.2)
        add(f"{name}.bias", rows, scale=0.1)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(tower, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(tower, np.float32))

    add("v.patch_embd.weight", tower, 3, patch, patch)
    if kind == "mlp":
        writer.add_array("clip.vision.feature_layer", [1, 2])
        add("v.patch_embd.bias", tower)
        add("v.position_embd.weight", (image_size // patch) ** 2, tower)
        linear("mm.0", 48, 2 * tower)
        linear("mm.2", width, 48)
        if newline:
            add("v.image_newline", width)
    else:
        add("v.patch_embd.weight.1", tower, 3, patch, patch)
        norm("v.post_ln")
        linear("mm.0", 4 * tower, 4 * tower)
        linear("mm.2", width, 4 * tower)
    for n in range(blocks):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            linear(f"v.blk.{n}.{name}", tower, tower)
        norm(f"v.blk.{n}.ln1")
        norm(f"v.blk.{n}.ln2")
        linear(f"v.blk.{n}.ffn_up", hidden, tower)
        linear(f"v.blk.{n}.ffn_down", tower, hidden)
    return _finish(writer, path)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_bundle(directory: Path, llm: Path, mmproj: Path, **changes: Any) -> Path:
    """A bundle of two files with a probe; ``changes`` replace fields of the manifest."""
    directory.mkdir(parents=True)
    files = []
    for role, source, kind in (("llm", llm, "F32"), ("mmproj", mmproj, "F32")):
        data = source.read_bytes()
        (directory / source.name).write_bytes(data)
        files.append(BundleFile(source.name, role, hashlib.sha256(data).hexdigest(), len(data), kind))  # type: ignore[arg-type]
    fields: dict[str, Any] = {
        "name": "tiny",
        "family": "llava",
        "license": "none",
        "source": "random weights",
        "files": tuple(files),
        "prompt": PromptFormat(
            bos="",
            system="<|im_start|>system\n{system}<|im_end|>\n",
            default_system=None,
            user_prefix="<|im_start|>user\n",
            user_suffix="<|im_end|>\n",
            assistant_prefix="<|im_start|>assistant\n",
            turn_end="<|im_end|>\n",
            stop=("<|im_end|>",),
            image_suffix="\n",
        ),
        "image": IMAGE,
        "visual_tokens": VisualTokens(full=16, grid=GRID, trained=(16, 4), default=4),
        "feature_layers": (1, 2),
        "backends": ("mtmd",),
        "probe": None,
    }
    (directory / MANIFEST_NAME).write_text(Manifest(**{**fields, **changes}).to_json())
    return directory


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches of the tests are not the person's, and what one test has computed is no other's."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_EDGE_HOME", str(home))
        patch.setenv("LLAVA_EDGE_CACHE_MB", "0")
        yield home


@pytest.fixture(scope="session")
def make_llm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """:func:`write_llm` into a new directory."""
    return lambda **options: write_llm(tmp_path_factory.mktemp("llm") / "tiny.gguf", **options)


@pytest.fixture(scope="session")
def make_mmproj(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """:func:`write_mmproj` into a new directory."""
    return lambda **options: write_mmproj(tmp_path_factory.mktemp("mmproj") / "mmproj.gguf", **options)


@pytest.fixture(scope="session")
def tiny_llm(make_llm: Callable[..., Path]) -> Path:
    return make_llm()


@pytest.fixture(scope="session")
def tiny_mmproj(make_mmproj: Callable[..., Path]) -> Path:
    return make_mmproj()


@pytest.fixture(scope="session")
def engine(tiny_llm: Path) -> Iterator[Engine]:
    """A tiny language model whose cache any test may clear."""
    loaded = Engine(tiny_llm, n_ctx=512, n_threads=1, n_batch=64)
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path, tiny_mmproj: Path) -> Callable[..., Path]:
    """:func:`write_bundle` of the tiny files into a new directory."""

    def make(llm: Path = tiny_llm, mmproj: Path = tiny_mmproj, **changes: Any) -> Path:
        return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny", llm, mmproj, **changes)

    return make


@pytest.fixture(scope="session")
def probe(engine: Engine, tiny_mmproj: Path) -> Probe:
    """What the tiny tower makes of the probe picture."""
    encoder = MtmdEncoder(tiny_mmproj, engine)
    (embeddings,) = encoder.encode([probe_picture(IMAGE.size)])
    encoder.close()
    return Probe.of((0, 5, 15), embeddings)


@pytest.fixture(scope="session")
def tiny_bundle(make_bundle: Callable[..., Path], probe: Probe) -> Path:
    return make_bundle(probe=probe)


@pytest.fixture(scope="session")
def tiny_model(tiny_bundle: Path) -> Iterator[llava_edge.Model]:
    """A tiny LLaVA with a context of 512 tokens."""
    with llava_edge.load(tiny_bundle, n_threads=1, n_ctx=512) as model:
        yield model


@pytest.fixture(scope="session")
def not_root() -> Callable[[], AbstractContextManager[None]]:
    """Takes root's right to open and delete everything away for a while; others do not have it."""

    @contextmanager
    def without() -> Iterator[None]:
        root = os.geteuid() == 0
        if root:
            try:
                os.seteuid(65534)
            except OSError as error:
                pytest.skip(f"no other user to be: {error}")
        try:
            yield
        finally:
            if root:
                os.seteuid(0)

    return without


@pytest.fixture(scope="session")
def nano() -> Iterator[llava_edge.Model]:
    """The embedded model, where it is there."""
    if not resources.files("llava_edge").joinpath("models", "nano", MANIFEST_NAME).is_file():
        pytest.skip("the embedded model nano is not there")
    with llava_edge.load("nano") as model:
        yield model


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three photos' worth of noise."""
    root = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, shape in enumerate(((40, 60, 3), (64, 32, 3), (32, 32, 3))):
        pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        paths.append(root / f"picture{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths
