"""An ONNX file is checked before ONNX Runtime sees it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from llava_edge.errors import ModelError, ModelFileError
from llava_edge.onnx_check import check_onnx


def model() -> onnx.ModelProto:
    """A linear layer, behind an ``If`` so that a graph lies in a graph."""
    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(3, 4), "weight")
    there = helper.make_tensor_value_info("there", TensorProto.FLOAT, [2, 4])
    then = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["there"])], "then", [], [there])
    other = helper.make_tensor_value_info("other", TensorProto.FLOAT, [2, 4])
    zero = helper.make_node("Constant", [], ["other"], value=numpy_helper.from_array(np.zeros((2, 4), np.float32)))
    graph = helper.make_graph(
        [helper.make_node("If", ["yes"], ["y"], then_branch=then,
                          else_branch=helper.make_graph([zero], "else", [], [other]))],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3]),
         helper.make_tensor_value_info("yes", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [weight],
    )  # fmt: skip
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(model().SerializeToString())
    return path


def test_a_good_file_passes_and_runs(path: Path) -> None:
    check_onnx(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones((2, 3), np.float32), "yes": np.array(True)})
    np.testing.assert_array_equal(y[0], [12, 15, 18, 21])


def elsewhere(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def foreign(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].domain = "evil.example"


def foreign_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import.append(helper.make_opsetid("evil.example", 1))


def larger(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[0] = 1 << 40


def texts(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].data_type = TensorProto.STRING


def no_output(proto: onnx.ModelProto) -> None:
    del proto.graph.output[:]


def old(proto: onnx.ModelProto) -> None:
    proto.ir_version = 0


def constant_elsewhere(proto: onnx.ModelProto) -> None:
    branch = next(a for a in proto.graph.node[0].attribute if a.name == "else_branch")
    constant = branch.g.node[0].attribute[0].t
    constant.data_location = TensorProto.EXTERNAL


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (elsewhere, "initializer weight keeps its data in another file"),
        (constant_elsewhere, "attribute of node Constant keeps its data in another file"),
        (foreign, "node If is of the domain 'evil.example'"),
        (foreign_opset, "opset_import is of the domain"),
        (larger, "has 48 bytes; expected"),
        (texts, "type 8"),
        (no_output, "0 outputs"),
        (old, "ir_version"),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[onnx.ModelProto], None], says: str, path: Path) -> None:
    proto = model()
    change(proto)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError, match=says):
        check_onnx(path)


@pytest.mark.parametrize("content", [b"", b"GGUF" * 10, b"\x08", b"\xff" * 40, b"PK\3\4" + b"\0" * 60])
def test_what_is_no_onnx_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ModelFileError):
        check_onnx(tmp_path / "x.onnx")
    with pytest.raises(ModelError, match="no such"):
        check_onnx(tmp_path / "gone.onnx")


def test_random_changes_are_refused_or_give_onnx_runtimes_own_error(path: Path, tmp_path: Path) -> None:
    data, rng, passed = path.read_bytes(), random.Random(1), 0
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 4))):
            broken[rng.randrange(len(data))] = rng.randrange(256)
        target = tmp_path / "broken.onnx"
        target.write_bytes(bytes(broken[: rng.randrange(len(data))]) if rng.random() < 0.2 else bytes(broken))
        try:
            check_onnx(target)
        except ModelFileError:
            continue
        passed += 1
    assert 0 < passed < 400


def test_graphs_in_graphs_are_followed_only_so_deep(path: Path) -> None:
    graph = model().graph
    for _ in range(12):
        node = helper.make_node("If", ["yes"], ["y"], then_branch=graph, else_branch=graph)
        outer = helper.make_graph([node], "outer", list(graph.input), list(graph.output))
        graph = outer if len(outer.SerializeToString()) < 4_000_000 else graph
    path.write_bytes(helper.make_model(graph, ir_version=9).SerializeToString())
    with pytest.raises(ModelFileError, match="deep"):
        check_onnx(path)
