"""ONNX Runtime as a vision backend, and the choice between backends."""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import llava_edge
from llava_edge.bundle import MANIFEST_NAME, BundleFile, Probe, open_bundle, probe_picture
from llava_edge.engine import Engine, EngineError
from llava_edge.errors import InputError, LlavaEdgeError, ModelError
from llava_edge.images import normalize
from llava_edge.types import ImageSpec
from llava_edge.vision.onnx import WATCHER, OnnxEncoder

SPEC = ImageSpec(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), mode="pad", pad_color=(9, 9, 9))
KERNEL = np.random.default_rng(3).standard_normal((64, 3, 8, 8)).astype(np.float32) * 0.1


def write_tower(
    path: Path,
    *,
    width: int = 64,
    size: int = 32,
    scale: float = 1.0,
    steps: int = 0,
    shape: list[Any] | None = None,
) -> Path:
    """Patches of 8 pixels, each times one matrix; ``steps`` large products of nothing make it slow.

    ``shape`` instead: the sum of all, in so many dimensions.
    """
    nodes = [
        helper.make_node("Conv", ["pixels", "kernel"], ["patches"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Reshape", ["patches", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["rows", "widen"], ["step.0"]),
        *(helper.make_node("MatMul", [f"step.{n}", "slow"], [f"step.{n + 1}"]) for n in range(steps)),
        helper.make_node("MatMul", [f"step.{steps}", "narrow"], ["nothing"]),
        helper.make_node("Add", ["rows", "nothing"], ["embeddings"]),
    ]
    if shape is not None:
        nodes = [
            helper.make_node("ReduceSum", ["pixels"], ["sum"], keepdims=0),
            helper.make_node("Reshape", ["sum", "shape"], ["embeddings"]),
        ]
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, size, size])]
    full = ["batch", (size // 8) ** 2, width] if shape is None else shape
    outputs = [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, full)]
    tensors = [
        numpy_helper.from_array(KERNEL[:width] * scale, "kernel"),
        numpy_helper.from_array(np.zeros((width, 2048 if steps else 1), np.float32), "widen"),
        numpy_helper.from_array(np.zeros((2048 if steps else 1, width), np.float32), "narrow"),
        numpy_helper.from_array(np.array([0, width, -1] if shape is None else [1] * len(shape), np.int64), "shape"),
    ]
    if steps:
        tensors.append(numpy_helper.from_array(np.eye(2048, dtype=np.float32), "slow"))
    graph = helper.make_graph(nodes, "tower", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def expected(image: Image.Image) -> np.ndarray[Any, Any]:
    patches = normalize(image, SPEC).reshape(3, 4, 8, 4, 8).transpose(1, 3, 0, 2, 4).reshape(16, -1)
    found: np.ndarray[Any, Any] = patches @ KERNEL.reshape(64, -1).T
    return found


@pytest.fixture
def with_onnx(make_bundle: Callable[..., Path], probe: Probe) -> Callable[..., Path]:
    """A bundle with a third file, whose ONNX tower is right by the probe unless ``probe`` is the mmproj's."""

    def make(*, of_mtmd: bool = False, backends: tuple[str, ...] = ("onnx", "mtmd")) -> Path:
        rows = (0, 5, 15)
        own = Probe.of(rows, expected(probe_picture(32)).astype(np.float32))
        directory = make_bundle(probe=probe if of_mtmd else own, image=SPEC, backends=backends)
        path = write_tower(directory / "vision-fp32.onnx")
        data = path.read_bytes()
        manifest = open_bundle(directory).manifest
        file = BundleFile(path.name, "vision_onnx", hashlib.sha256(data).hexdigest(), len(data), "fp32")
        (directory / MANIFEST_NAME).write_text(replace(manifest, files=(*manifest.files, file)).to_json())
        return directory

    return make


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_a_picture_becomes_what_the_graph_computes_whatever_its_neighbours(engine: Engine, tmp_path: Path) -> None:
    encoder = OnnxEncoder(write_tower(tmp_path / "tower.onnx"), SPEC, engine)
    first, second = encoder.encode([noise(1), noise(2)])
    np.testing.assert_allclose(first, expected(noise(1)), atol=1e-4)
    np.testing.assert_allclose(second, expected(noise(2)), atol=1e-4)
    (alone,) = encoder.encode([noise(2)])
    assert alone.tobytes() == second.tobytes()
    assert alone.dtype == np.float32
    encoder.close()
    encoder.close()
    with pytest.raises(ModelError, match="closed"):
        encoder.encode([noise(0)])


def test_files_that_do_not_fit_are_refused_in_words(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model file"):
        OnnxEncoder(tmp_path / "missing.onnx", SPEC, engine)
    with pytest.raises(ModelError, match="embeddings of width 48; the language model reads 64"):
        OnnxEncoder(write_tower(tmp_path / "narrow.onnx", width=48), SPEC, engine)
    with pytest.raises(ModelError, match="no vision tower for 32 pixels a side"):
        OnnxEncoder(write_tower(tmp_path / "large.onnx", size=64), SPEC, engine)
    for shape in ([], [1], ["batch", 64]):
        scalar = write_tower(tmp_path / "scalar.onnx", shape=shape)
        with pytest.raises(ModelError, match=r"no vision tower: its output has the shape|can't be loaded"):
            OnnxEncoder(scalar, SPEC, engine)
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x0a" + b"\xff" * 100)
    with pytest.raises(ModelError, match="can't be loaded as a vision tower"):
        OnnxEncoder(tmp_path / "broken.onnx", SPEC, engine)
    encoder = OnnxEncoder(write_tower(tmp_path / "right.onnx"), SPEC, engine)
    with pytest.raises(ModelError, match="takes 32 pixels a side"):
        encoder.encode([noise(0).resize((40, 40))])
    infinite = OnnxEncoder(write_tower(tmp_path / "infinite.onnx", scale=float("inf")), SPEC, engine)
    with pytest.raises(ModelError, match="values that are not numbers"):
        infinite.encode([noise(0)])


def test_a_picture_is_stopped_in_the_middle(engine: Engine, tmp_path: Path) -> None:
    encoder = OnnxEncoder(write_tower(tmp_path / "slow.onnx", steps=200), SPEC, engine, n_threads=1)

    def stop() -> None:
        while not any(thread.name == WATCHER for thread in threading.enumerate()):
            time.sleep(0.001)
        engine.stopping = True

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        # Before the picture the wish is not there yet, and after it nobody looks: only the run itself can end this way.
        with pytest.raises(EngineError, match="the picture's evaluation was stopped"):
            encoder.encode([noise(1)])
    finally:
        thread.join()
        engine.stopping = False
    (rows,) = encoder.encode([noise(1)])
    np.testing.assert_allclose(rows, expected(noise(1)), atol=1e-4)
    encoder.close()


def test_the_manifests_order_is_followed(with_onnx: Callable[..., Path], pictures: list[Path]) -> None:
    with llava_edge.load(with_onnx(), n_threads=1, n_ctx=512) as model:
        assert model.vision_backend is None
        model.chat().ask("What is it?", pictures[:1], max_tokens=1)
        assert model.vision_backend == "onnx"
    with llava_edge.load(with_onnx(of_mtmd=True, backends=("mtmd", "onnx")), n_threads=1, n_ctx=512) as model:
        model.chat().ask("What is it?", pictures[:1], max_tokens=1)
        assert model.vision_backend == "mtmd"


@pytest.mark.parametrize("loaded", [False, True])
def test_a_picture_for_a_closed_model_is_refused(
    with_onnx: Callable[..., Path], pictures: list[Path], loaded: bool
) -> None:
    with llava_edge.load(with_onnx(), n_threads=1, n_ctx=512) as model:
        chat = model.chat()
        if loaded:
            model.open_vision()
    said: list[str] = []

    def ask() -> None:
        try:
            chat.ask("What is it?", pictures[:1], max_tokens=1)
        except LlavaEdgeError as error:
            said.append(str(error))

    asker = threading.Thread(target=ask, daemon=True)  # it would wait for ever for a thread that has ended
    asker.start()
    asker.join(30)
    assert said == ["the model is closed"]


def test_a_backend_that_is_wrong_gives_way_to_the_next_with_a_warning(
    with_onnx: Callable[..., Path], pictures: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    directory = with_onnx(of_mtmd=True)
    with caplog.at_level(logging.WARNING), llava_edge.load(directory, n_threads=1, n_ctx=512) as model:
        model.chat().ask("What is it?", pictures[:1], max_tokens=1)
        assert model.vision_backend == "mtmd"
    assert "the vision backend onnx is wrong on this machine" in caplog.text
    assert "taking mtmd instead" in caplog.text
    with llava_edge.load(directory, n_threads=1, n_ctx=512, vision_backend="onnx") as model:
        with pytest.raises(ModelError, match="onnx is wrong") as caught:
            model.chat().ask("What is it?", pictures[:1], max_tokens=1)
        assert "onnxruntime" in str(caught.value.hint)


def test_a_machine_without_onnx_runtime_takes_the_next_backend(
    with_onnx: Callable[..., Path],
    pictures: list[Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # the import fails, as where no wheel fits
    directory = with_onnx(of_mtmd=True)
    with caplog.at_level(logging.WARNING), llava_edge.load(directory, n_threads=1, n_ctx=512) as model:
        model.chat().ask("What is it?", pictures[:1], max_tokens=1)
        assert model.vision_backend == "mtmd"
    assert "ONNX Runtime, which runs vision-fp32.onnx, can't be loaded" in caplog.text
    with llava_edge.load(directory, n_threads=1, n_ctx=512, vision_backend="onnx") as model:
        with pytest.raises(ModelError, match="can't be loaded") as caught:
            model.chat().ask("What is it?", pictures[:1], max_tokens=1)
        assert caught.value.hint == "pip install --upgrade onnxruntime"


def test_a_backend_without_a_file_is_refused_when_the_model_is_loaded(tiny_bundle: Path) -> None:
    with pytest.raises(ModelError, match="no file for the vision backend onnx") as caught:
        llava_edge.load(tiny_bundle, vision_backend="onnx")
    assert caught.value.hint == "It runs with: mtmd."
    with pytest.raises(InputError, match="vision_backend is 'cuda'; expected one of auto, onnx, coreml"):
        llava_edge.load(tiny_bundle, vision_backend="cuda")


def test_coreml_passes_the_same_self_check_or_says_that_this_is_no_mac(with_onnx: Callable[..., Path]) -> None:
    import onnxruntime

    is_mac = "CoreMLExecutionProvider" in onnxruntime.get_available_providers()
    refused = "coreml is wrong on this machine" if is_mac else "only a Mac has"
    with (
        llava_edge.load(with_onnx(of_mtmd=True), n_threads=1, n_ctx=512, vision_backend="coreml") as wrong,
        pytest.raises(ModelError, match=refused),
    ):
        wrong.open_vision()
    if is_mac:
        with llava_edge.load(with_onnx(), n_threads=1, n_ctx=512, vision_backend="coreml") as model:
            model.open_vision()
            assert model.vision_backend == "coreml"


def test_a_raw_pair_runs_only_with_mtmd(tiny_llm: Path, tiny_mmproj: Path) -> None:
    with pytest.raises(InputError, match="a raw pair of GGUF files runs only with mtmd"):
        llava_edge.load(llm=tiny_llm, mmproj=tiny_mmproj, vision_backend="onnx")
