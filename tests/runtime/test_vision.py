from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import llava_edge
from llava_edge import native
from llava_edge.bundle import Probe, open_bundle
from llava_edge.engine import Engine, EngineError
from llava_edge.errors import InputError, ModelError
from llava_edge.images import open_image
from llava_edge.kv_cache import KvCache
from llava_edge.prompt import ImageRef, TokenRun
from llava_edge.vision import EncodedImage, selfcheck
from llava_edge.vision.mtmd import MtmdEncoder
from llava_edge.vision.tokens import pool, pooled_counts


@pytest.fixture(scope="module")
def encoder(engine: Engine, tiny_mmproj: Path) -> Iterator[MtmdEncoder]:
    loaded = MtmdEncoder(tiny_mmproj, engine)
    yield loaded
    loaded.close()


def noise(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Pooling


def test_pooling_averages_square_cells_row_by_row() -> None:
    grid = np.arange(16, dtype=np.float32).reshape(16, 1) * [[1, 10]]
    pooled = pool(grid.astype(np.float32), (4, 4), 4)
    assert pooled[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pooled[:, 1].tolist() == [25, 45, 105, 125]
    assert pooled.dtype == np.float32


def test_pooling_to_all_tokens_changes_nothing() -> None:
    rows = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    assert pool(rows, (4, 4), 16) is rows


def test_pooling_of_a_grid_that_is_not_square() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert pool(rows, (2, 4), 2)[:, 0].tolist() == [2.5, 4.5]


def test_counts_that_can_be_pooled() -> None:
    assert pooled_counts((16, 16)) == [256, 64, 16, 4, 1]
    assert pooled_counts((24, 24)) == [576, 144, 64, 36, 16, 9, 4, 1]


def test_other_counts_are_refused_in_words() -> None:
    with pytest.raises(InputError, match="5 tokens can't be pooled from a grid of 4 x 4") as caught:
        pool(np.zeros((16, 2), np.float32), (4, 4), 5)
    assert "16, 4, 1" in str(caught.value.hint)
    with pytest.raises(InputError, match=r"shape \[15, 2\]"):
        pool(np.zeros((15, 2), np.float32), (4, 4), 4)


# libmtmd


def test_a_picture_becomes_a_row_a_patch(encoder: MtmdEncoder) -> None:
    first, second = encoder.encode([noise(1), noise(2)])
    assert first.shape == second.shape == (16, 64)
    assert first.dtype == np.float32
    assert not np.allclose(first, second)
    (again,) = encoder.encode([noise(1)])
    assert again.tobytes() == first.tobytes()


def test_a_tower_for_another_width_is_refused_with_both_numbers(
    engine: Engine, make_mmproj: Callable[..., Path]
) -> None:
    with pytest.raises(ModelError, match=r"embeddings of width 80; the language model .* reads 64"):
        MtmdEncoder(make_mmproj(width=80), engine)


def test_files_that_are_no_towers_are_refused_in_words(engine: Engine, tiny_llm: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model file"):
        MtmdEncoder(tmp_path / "missing.gguf", engine)
    with pytest.raises(ModelError, match="'llama'; this file is to be a vision tower"):
        MtmdEncoder(tiny_llm, engine)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelError, match=r"broken\.gguf: version is 0"):
        MtmdEncoder(broken, engine)


def test_a_cut_tower_is_refused(engine: Engine, tiny_mmproj: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_mmproj.read_bytes()[:-3000])
    with pytest.raises(ModelError):
        MtmdEncoder(cut, engine).encode([noise(0)])


def test_a_closed_tower_says_so(engine: Engine, tiny_mmproj: Path) -> None:
    closed = MtmdEncoder(tiny_mmproj, engine)
    closed.close()
    closed.close()
    with pytest.raises(ModelError, match="closed"):
        closed.encode([noise(0)])


# Against libmtmd's own evaluation


def reference_logits(encoder: MtmdEncoder, engine: Engine, before: str, image: Image.Image, after: str) -> Any:
    """What ``mtmd_helper_eval_chunks`` makes of a text with a picture in it, and the tokens that it saw."""
    library, llama = native.mtmd(), native.llama()
    marker = library.mtmd_default_marker()
    raw = before.encode() + marker + after.encode()
    text = library.mtmd_input_text(raw, len(raw), False, True)
    data = (ctypes.c_uint8 * (image.width * image.height * 3)).from_buffer_copy(image.tobytes())
    bitmap = library.mtmd_bitmap_init(image.width, image.height, data)
    bitmaps = (ctypes.c_void_p * 1)(bitmap)
    chunks = library.mtmd_input_chunks_init()
    assert library.mtmd_tokenize(encoder._context, chunks, ctypes.byref(text), bitmaps, 1) == 0
    engine.truncate(0)
    end = llama.llama_pos()
    done = library.mtmd_helper_eval_chunks(
        encoder._context, engine._context, chunks, 0, 0, engine.n_batch, True, ctypes.byref(end)
    )
    assert done == 0
    logits = engine.logits()
    library.mtmd_input_chunks_free(chunks)
    library.mtmd_bitmap_free(bitmap)
    return logits, end.value


@pytest.mark.parametrize(("arch", "kind"), [("llama", "mlp"), ("qwen2vl", "qwen2vl_merger")])
def test_a_picture_is_evaluated_as_libmtmd_does_it(
    arch: str, kind: str, make_llm: Callable[..., Path], make_mmproj: Callable[..., Path]
) -> None:
    engine = Engine(make_llm(arch=arch), n_threads=1)
    encoder = MtmdEncoder(make_mmproj(kind=kind), engine)
    image = noise(5, 200, 160)
    before, after = "<|im_start|>user\nA picture: ", " What is it?<|im_end|>"
    expected, end = reference_logits(encoder, engine, before, image, after)
    encoded = EncodedImage("k", encoder.encode_chunks(image))
    cache = KvCache(engine)
    units = [
        TokenRun(tuple(engine.tokenize(before, special=True))),
        ImageRef("k"),
        TokenRun(tuple(engine.tokenize(after, special=True))),
    ]
    cache.clear()
    cache.prefill(units, {"k": encoded})
    assert engine.n_past == end
    marks = [chunk for chunk in encoded.chunks if chunk.tokens]
    if not marks:
        assert cache.logits().tobytes() == expected.tobytes()
    else:  # libmtmd joins the marks with the text around them: another split
        np.testing.assert_allclose(cache.logits(), expected, atol=2e-2 * np.abs(expected).max())
    # and after going back to the picture, from the cache
    first = cache.logits()
    cache.append(50)
    prefill = cache.prefill(units, {"k": encoded})
    assert prefill.cached == len(units[0].ids) + encoded.n_tokens  # type: ignore[union-attr]
    assert cache.logits().tobytes() == first.tobytes()
    encoder.close()
    engine.close()


# The self-check


def test_the_self_check_passes_once_and_is_remembered(
    encoder: MtmdEncoder, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(tmp_path))
    bundle = open_bundle(tiny_bundle)
    cosine = selfcheck.check(encoder, bundle, "mmproj", "mtmd")
    assert cosine is not None
    assert cosine > 0.9999
    assert selfcheck.check(encoder, bundle, "mmproj", "mtmd") is None
    bundle.file("mmproj").touch()
    assert selfcheck.check(encoder, bundle, "mmproj", "mtmd") is not None


def test_a_backend_that_is_wrong_is_refused(
    make_bundle: Callable[..., Path], probe: Probe, pictures: list[Path]
) -> None:
    wrong = Probe.of((0, 1, 2), np.roll(probe.array, 1, axis=1))
    with (
        llava_edge.load(make_bundle(probe=wrong), n_threads=1) as model,
        pytest.raises(ModelError, match=r"wrong on this machine: .* cosine of"),
    ):
        model.chat().ask("What is it?", pictures[:1], max_tokens=1)


def test_a_cache_that_can_not_be_written_does_not_matter(
    encoder: MtmdEncoder, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(blocked / "below"))
    assert selfcheck.check(encoder, open_bundle(tiny_bundle), "mmproj", "mtmd") is not None


def test_a_cache_that_can_not_be_looked_into_does_not_matter(
    encoder: MtmdEncoder, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(tmp_path / ("long" * 70)))  # refused in the same way, to root too
    assert selfcheck.check(encoder, open_bundle(tiny_bundle), "mmproj", "mtmd") is not None


def test_the_probe_needs_the_right_shape(probe: Probe) -> None:
    assert selfcheck.mean_cosine(np.ones((3, 64), np.float32), probe) == 0
    assert selfcheck.mean_cosine(np.ones((16, 60), np.float32), probe) == 0
    assert selfcheck.mean_cosine(np.zeros((16, 64), np.float32), probe) == 0


def test_bundles_hand_over_pictures_of_the_exact_size(tiny_model: llava_edge.Model, pictures: list[Path]) -> None:
    picture = tiny_model.open_picture(pictures[0])
    assert picture.image.size == (32, 32)
    assert picture.name == "picture0.png"
    same = tiny_model.open_picture(open_image(pictures[0]))
    assert same.key == picture.key
    assert tiny_model.encode(same) is tiny_model.encode(picture)


def test_another_thread_can_stop_the_tower(nano: llava_edge.Model) -> None:
    picture = nano.open_picture(np.full((224, 224, 3), 90, np.uint8))
    nano.engine.stopping = True
    try:
        with pytest.raises(EngineError, match="stopped"):
            nano.encode(picture)
    finally:
        nano.engine.stopping = False
    assert not nano.is_encoded(picture)
    nano.encode(picture)
    assert nano.is_encoded(picture)
