"""Vision tower and projector into one ONNX model, and from that into one with 8-bit weights.

The graph is written by hand instead of being traced: it is small, it says what it computes, and tensors go into it one
by one, so that a large tower needs its own size in memory and no more.

Shapes: B pictures, T tokens of the tower, W its width, H heads, P patches, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from llava_edge.convert import onnx_file
from llava_edge.convert.memory import release
from llava_edge.convert.projector import Projector, projector_layers
from llava_edge.convert.tower import Lazy, Tower, tower_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.convert.weights import Weights

OPSET = 20  # has LayerNormalization and Gelu
IR_VERSION = 10  # what the oldest supported ONNX Runtime reads
INPUT, OUTPUT = "pixels", "embeddings"
_LARGEST_WEIGHT = 63  # in seven bits, its sign included


class _Graph:
    """Nodes and tensors of a graph in the making."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self._count = 0
        self._names: set[str] = set()

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a tensor; one that every block shares is added once."""
        if name in self._names:
            return name
        self._names.add(name)
        self.tensors.append(numpy_helper.from_array(np.require(value, requirements="C"), name))
        return name

    def node(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        self._count += 1
        output = output or f"{kind.lower()}.{self._count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{kind}.{self._count}", **attributes))
        return output

    def linear(self, name: str, inputs: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
        """``inputs [.., in]`` times ``weight [out, in]`` plus ``bias``."""
        product = self.node("MatMul", inputs, self.constant(f"{name}.weight", weight.T))
        return self.node("Add", product, self.constant(f"{name}.bias", bias))

    def norm(self, name: str, inputs: str, tensors: dict[str, Lazy], epsilon: float) -> str:
        weight, bias = (self.constant(f"{name}.{part}", tensors.pop(f"{name}.{part}").load()) for part in PARTS)
        return self.node("LayerNormalization", inputs, weight, bias, axis=-1, epsilon=epsilon)


PARTS = ("weight", "bias")


class Described(Protocol):
    """What has to be known of a checkpoint to write its tower."""

    @property
    def tower(self) -> Tower: ...
    @property
    def projector(self) -> Projector: ...
    @property
    def feature_layers(self) -> tuple[int, ...]: ...


def write_onnx(checkpoint: Described, weights: Weights, path: Path, *, hidden: bool = False) -> None:
    """Write the float32 model: ``pixels [B, 3, S, S]`` to ``embeddings [B, P, D]``, the class token's row left out.

    ``hidden`` adds an output ``hidden.N`` for the tower's hidden states, to find where a file goes wrong.
    """
    tower, graph = checkpoint.tower, _Graph()
    tensors = dict(tower_tensors(tower, weights))
    states = [_embed(graph, tower, tensors)]
    for block in range(max(checkpoint.feature_layers)):
        states.append(_block(graph, tower, block, states[-1], tensors))
    chosen = [states[layer] for layer in checkpoint.feature_layers]
    features = graph.node("Concat", *chosen, axis=2) if len(chosen) > 1 else chosen[0]
    if tower.class_token:
        bounds = {"slice.start": 1, "slice.end": tower.patches + 1, "slice.axis": 1}
        start, end, axis = (graph.constant(name, np.array([value], np.int64)) for name, value in bounds.items())
        features = graph.node("Slice", features, start, end, axis)
    layers = list(projector_layers(checkpoint.projector, weights))
    for number, (weight, bias) in enumerate(layers):
        features = graph.linear(f"mm.{number}", features, weight.load(), bias.load())
        if number < len(layers) - 1:
            features = graph.node("Gelu", features)
    graph.node("Identity", features, output=OUTPUT)
    extra = {f"hidden.{number}": state for number, state in enumerate(states)} if hidden else {}
    for name, state in extra.items():
        graph.node("Identity", state, output=name)
    _save(graph, checkpoint, list(extra), path)


def quantize_onnx(source: Path, target: Path) -> None:
    """Weights of the matrix products in 8 bits, one scale a column; activations are quantised as they come.

    The nodes are those that ONNX Runtime's own quantiser writes, which needs three times the model's memory. Weights
    keep to seven of the bits: products of full ones overflow on x86 processors without VNNI, and what was measured here
    has to hold there too. On DINOv2-S the mean cosine falls from 0.9994 to 0.9992.
    """
    model, tensors = onnx_file.read(source)
    computed = {output for node in model.graph.node for output in node.output}
    nodes: list[Any] = []
    weights: set[str] = set()
    rounded: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] in computed:
            nodes.append(node)
            continue
        inputs, name = node.input
        weights.add(name)
        if inputs not in rounded:
            rounded[inputs] = [f"{inputs}.{part}" for part in ("int8", "scale", "zero")]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [inputs], rounded[inputs]))
        values, scale, zero = rounded[inputs]
        nodes += [
            helper.make_node("MatMulInteger", [values, name, zero, f"{name}.zero"], [f"{name}.sum"]),
            helper.make_node("Cast", [f"{name}.sum"], [f"{name}.float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [scale, f"{name}.scale"], [f"{name}.scales"]),
            helper.make_node("Mul", [f"{name}.float", f"{name}.scales"], list(node.output)),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx_file.write(model, _all_rounded(tensors, weights), target)
    release()


def _all_rounded(tensors: Iterable[Any], weights: set[str]) -> Iterator[Any]:
    for tensor in tensors:
        yield from _round(tensor) if tensor.name in weights else [tensor]


def _round(tensor: Any) -> list[Any]:
    """A weight ``[in, out]`` rounded, with its scales and zero points ``[out]``."""
    values = numpy_helper.to_array(tensor)
    scale = np.abs(values).max(axis=0) / _LARGEST_WEIGHT
    scale[scale == 0] = 1
    name = tensor.name
    zeros = np.zeros(len(scale), np.int8)
    return [
        numpy_helper.from_array(np.rint(values / scale).astype(np.int8), name),
        numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale"),
        numpy_helper.from_array(zeros, f"{name}.zero"),
    ]


def _embed(graph: _Graph, tower: Tower, tensors: dict[str, Lazy]) -> str:
    """Patches, class token and positions: hidden state 0, ``[B, T, W]``."""
    weight = graph.constant("patch.weight", tensors.pop("v.patch_embd.weight").load())
    bias = tensors.pop("v.patch_embd.bias", None)
    rest = [graph.constant("patch.bias", bias.load())] if bias else []
    size = tower.patch_size
    patches = graph.node("Conv", INPUT, weight, *rest, kernel_shape=[size, size], strides=[size, size])
    flat = graph.constant("patch.shape", np.array([0, tower.width, -1], np.int64))
    rows = graph.node("Transpose", graph.node("Reshape", patches, flat), perm=[0, 2, 1])
    if tower.class_token:
        row = graph.constant("class", tensors.pop("v.class_embd").load().reshape(1, 1, -1))
        batch = graph.node("Shape", INPUT, start=0, end=1)
        ones = graph.constant("ones", np.array([1, 1], np.int64))
        every = graph.node("Expand", row, graph.node("Concat", batch, ones, axis=0))
        rows = graph.node("Concat", every, rows, axis=1)
    state = graph.node("Add", rows, graph.constant("positions", tensors.pop("v.position_embd.weight").load()[None]))
    return graph.norm("v.pre_ln", state, tensors, tower.epsilon) if "v.pre_ln.weight" in tensors else state


def _block(graph: _Graph, tower: Tower, block: int, state: str, tensors: dict[str, Lazy]) -> str:
    name = f"v.blk.{block}"

    def load(short: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return tensors.pop(f"{name}.{short}.weight").load(), tensors.pop(f"{name}.{short}.bias").load()

    normed = graph.norm(f"{name}.ln1", state, tensors, tower.epsilon)
    mixed = _attention(graph, tower, name, normed, [load(f"attn_{letter}") for letter in "qkv"])
    state = graph.node("Add", state, graph.linear(f"{name}.attn_out", mixed, *load("attn_out")))
    normed = graph.norm(f"{name}.ln2", state, tensors, tower.epsilon)
    wide = _activate(graph, tower, graph.linear(f"{name}.ffn_up", normed, *load("ffn_up")))
    return graph.node("Add", state, graph.linear(f"{name}.ffn_down", wide, *load("ffn_down")))


def _attention(
    graph: _Graph, tower: Tower, name: str, inputs: str, qkv: list[tuple[NDArray[np.float32], NDArray[np.float32]]]
) -> str:
    """Queries, keys and values in one product; the scale of the scores is folded into the queries."""
    width = tower.width // tower.heads
    scale = np.float32(width**-0.5)
    weights, biases = [weight for weight, _ in qkv], [bias for _, bias in qkv]
    weights[0], biases[0] = weights[0] * scale, biases[0] * scale
    joined = graph.linear(f"{name}.qkv", inputs, np.concatenate(weights), np.concatenate(biases))
    apart = graph.constant("heads.apart", np.array([0, 0, 3, tower.heads, width], np.int64))
    together = graph.constant("heads.together", np.array([0, 0, tower.width], np.int64))
    parts = graph.node("Reshape", joined, apart)  # [B, T, 3, H, W/H]
    numbers = [graph.constant(f"part.{number}", np.array(number, np.int64)) for number in range(3)]
    query, key, value = (graph.node("Gather", parts, number, axis=2) for number in numbers)
    query = graph.node("Transpose", query, perm=[0, 2, 1, 3])
    key = graph.node("Transpose", key, perm=[0, 2, 3, 1])
    value = graph.node("Transpose", value, perm=[0, 2, 1, 3])
    scores = graph.node("Softmax", graph.node("MatMul", query, key), axis=-1)
    mixed = graph.node("Transpose", graph.node("MatMul", scores, value), perm=[0, 2, 1, 3])
    return graph.node("Reshape", mixed, together)


def _activate(graph: _Graph, tower: Tower, inputs: str) -> str:
    if tower.activation == "quick_gelu":
        steep = graph.node("Mul", inputs, graph.constant("quick", np.array(1.702, np.float32)))
        return graph.node("Mul", inputs, graph.node("Sigmoid", steep))
    return graph.node("Gelu", inputs, approximate="tanh" if tower.activation == "gelu_tanh" else "none")


def _save(graph: _Graph, checkpoint: Described, extra: list[str], path: Path) -> None:
    tower = checkpoint.tower
    side, tokens = tower.image_size, tower.patches + tower.class_token
    inputs = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, side, side])
    shape = ["batch", tower.patches, checkpoint.projector.width]
    outputs = [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, shape)]
    for name in extra:
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", tokens, tower.width]))
    model = helper.make_model(
        helper.make_graph(graph.nodes, "vision", [inputs], outputs),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="llava-edge",
    )
    onnx_file.write(model, (graph.tensors.pop() for _ in range(len(graph.tensors))), path)
    release()
