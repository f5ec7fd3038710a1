"""ONNX files that are written and read weight by weight are what the onnx package reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from llava_edge.convert import onnx_file
from llava_edge.errors import ModelError
from llava_edge.onnx_check import check_onnx


def parts() -> tuple[Any, list[Any]]:
    """``y = x W + b`` without its weights, and those."""
    rng = np.random.default_rng(1)
    tensors = [
        numpy_helper.from_array(rng.standard_normal((40, 300)).astype(np.float32), "W"),
        numpy_helper.from_array(rng.standard_normal(300).astype(np.float32), "b"),
    ]
    nodes = [helper.make_node("MatMul", ["x", "W"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w]) for n, w in (("x", 40), ("y", 300)))
    graph = helper.make_graph(nodes, "line", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tensors


def test_a_written_file_is_read_by_everybody(tmp_path: Path) -> None:
    model, tensors = parts()
    path = tmp_path / "line.onnx"
    onnx_file.write(model, iter(tensors), path)
    check_onnx(path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    model.graph.initializer.extend(tensors)
    assert onnx.load(path) == model
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    weight, bias = map(numpy_helper.to_array, tensors)
    x = np.ones((2, 40), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ours", [False, True])
def test_a_file_is_read_weight_by_weight(tmp_path: Path, ours: bool) -> None:
    model, tensors = parts()
    path = tmp_path / "line.onnx"
    if ours:
        onnx_file.write(model, iter(tensors), path)
    else:
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        whole.graph.initializer.extend(tensors)
        onnx.save_model(whole, path)
    found, weights = onnx_file.read(path)
    assert found == model
    assert list(weights) == tensors


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "_LARGEST_GRAPH", 10_000)
    model, tensors = parts()
    with pytest.raises(ModelError, match="larger than an ONNX file can be"):
        onnx_file.write(model, iter(tensors), tmp_path / "line.onnx")
