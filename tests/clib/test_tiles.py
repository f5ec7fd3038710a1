"""Pictures in tiles (LLaVA-NeXT, LLaVA-OneVision): C makes of them what Python makes, to the last bit."""

from __future__ import annotations

import ctypes
import json

import conformance
import numpy as np
import pytest
from clib import MODEL_INVALID, OK, ROOT, ModelParams, command, load, manifest_of, said
from PIL import Image
from towers import Shape, Type, write

import llava_edge

SIDE = 56
GRID = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]  # width, height
# portrait, landscape, square, tiny, panorama, a tall strip, exactly a grid's size, odd numbers
SIZES = ((40, 70), (90, 61), (64, 64), (9, 7), (600, 31), (20, 300), (112, 56), (333, 77), (147, 148))
USER, ASSISTANT = 1, 2


def make(directory, nano, **changes):
    """A bundle of nano's language model and a small tower that looks at tiles; a question without one is marked."""
    manifest = manifest_of(nano)
    manifest["prompt"]["text_prefix"] = "No picture: "
    shape = Shape(image=SIDE, out=576, newline=changes.pop("newline", True))
    mmproj = write(directory / "mmproj.gguf", shape, Type.F32)
    for entry in manifest["files"]:
        if entry["role"] == "mmproj":
            entry.update(path=mmproj.name, bytes=mmproj.stat().st_size)
        else:
            (directory / entry["path"]).symlink_to(nano / entry["path"])
    manifest["image"] = {
        "size": SIDE, "mode": "anyres", "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "pad_color": [0, 0, 0],
        "grid": GRID, **changes,
    }  # fmt: skip
    manifest.update(
        visual_tokens={"full": 16, "grid": [4, 4], "trained": [16, 4], "default": 16},
        feature_layers=[3], probe=None, parity=None,
    )  # fmt: skip
    (directory / "llava-edge.json").write_text(json.dumps(manifest))
    return directory


def noise(size) -> np.ndarray:
    return np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def saved_by_c(library, directory, picture: np.ndarray, image_tokens: int, path) -> bytes:
    """What a saved session holds after a turn with a picture; it can be loaded again."""
    model, session, params = ctypes.c_void_p(), ctypes.c_void_p(), ModelParams()
    library.llava_edge_model_params_init(ctypes.byref(params))
    params.n_ctx, params.image_tokens = 2048, image_tokens
    load_model = library.llava_edge_model_load
    assert load_model(str(directory).encode(), ctypes.byref(params), ctypes.byref(model)) == OK, said(library)
    assert library.llava_edge_session_create(model, ctypes.byref(session)) == OK
    height, width, _ = picture.shape
    add = library.llava_edge_session_add_image_rgb
    assert add(session, picture.tobytes(), width, height, ctypes.c_size_t(0)) == OK
    for role, text in ((USER, b"What is it?"), (ASSISTANT, b"Noise.")):
        assert library.llava_edge_session_add_text(session, role, text) == OK, said(library)
    assert library.llava_edge_session_save(session, str(path).encode()) == OK
    assert library.llava_edge_session_load(session, str(path).encode()) == OK, said(library)
    library.llava_edge_session_free(session)
    library.llava_edge_model_free(model)
    return path.read_bytes()


@pytest.mark.parametrize(("max_tiles", "image_tokens"), [(0, 16), (0, 4), (1, 16), (2, 16), (3, 4)])
def test_embeddings_are_those_of_python(library, library_file, nano, tmp_path, monkeypatch, max_tiles, image_tokens):
    monkeypatch.setenv("LLAVA_EDGE_LIBRARY", str(library_file))
    bundle = make(tmp_path, nano, max_tiles=max_tiles)
    lengths = set()
    with llava_edge.load(bundle, vision_backend="native", image_tokens=image_tokens, cache=False) as model:
        for size in SIZES:
            picture = noise(size)
            (chunk,) = model.encode(model.open_picture(Image.fromarray(picture))).chunks
            lengths.add(len(chunk.embeddings))
            session = saved_by_c(library, bundle, picture, image_tokens, tmp_path / "saved.session")
            assert chunk.embeddings.tobytes() in session, f"{size}: {len(chunk.embeddings)} tokens"
    assert len(lengths) > 3


@pytest.mark.slow
def test_answers_are_those_of_python(built, library_file, environment, nano, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_EDGE_LIBRARY", str(library_file))
    bundle = make(tmp_path, nano)
    ask, settings = {"ask": "What is in this picture?", "max_tokens": 12}, {"n_ctx": 1024}
    cases = [
        {"name": str(size), "model": settings, "steps": [{**ask, "images": [[*size, 1]]}, {"ask": "And?"}]}
        for size in SIZES
    ]
    photo = {**ask, "images": ["cat.jpg", [90, 61, 2]]}
    cases.append({"name": "two, saved", "model": settings, "steps": [photo, {"save": True}, {"ask": "Why?"}]})
    cases.append({"name": "pooled", "model": {**settings, "image_tokens": 4}, "steps": [photo]})
    (tmp_path / "cases.json").write_text(json.dumps({"cases": cases}))
    runner = built / "llava_edge_conformance"
    done = command(runner, bundle, ROOT / "examples", tmp_path / "cases.json", env=environment, timeout=600)
    in_c = {line["name"]: line["found"] for line in map(json.loads, done.stdout.splitlines())}
    assert in_c == conformance.run_all(cases, bundle=bundle)


def test_a_tower_without_an_end_for_rows_is_refused(library, nano, tmp_path):
    assert load(library, make(tmp_path, nano, newline=False)) == MODEL_INVALID
    assert "v.image_newline" in said(library)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ([[56, 50]], "1 to 16 times size"),
        ([[56]], "1 to 16 times size"),
        ([[56, 1792]], "whole numbers from 1 to 896"),
        ([[56, 112]] * 129, "has 129 entries"),
        ([], "has 0 entries"),
        ([56, 112], "something else than lists"),
    ],
)
def test_a_wrong_grid_is_refused(library, nano, tmp_path, grid, words):
    assert load(library, make(tmp_path, nano, grid=grid)) == MODEL_INVALID
    assert words in said(library)
