"""The projector: one or several linear layers with GELU between them, from the tower's features to the LLM's width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llava_edge.convert.tower import Lazy
from llava_edge.convert.weights import Stored, Weights
from llava_edge.errors import InputError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Projector:
    """``depth`` linear layers; the first reads ``features``, the last gives ``width``."""

    depth: int
    features: int
    width: int


def projector_layers(projector: Projector, weights: Weights) -> Iterator[tuple[Lazy, Lazy]]:
    """Weight ``[out, in]`` and bias ``[out]`` of every layer; a layer without a bias gets zeros."""
    columns = projector.features
    for number in range(projector.depth):
        name = f"projector.{number}"
        rows = projector.width if number == projector.depth - 1 else weights.shape(f"{name}.weight")[0]
        yield _layer(weights, name, rows, columns)
        columns = rows


def _layer(weights: Weights, name: str, rows: int, columns: int) -> tuple[Lazy, Lazy]:
    weights.check_shape(f"{name}.weight", (rows, columns))
    weight = Lazy((rows, columns), lambda: weights.take(f"{name}.weight"))
    if f"{name}.bias" not in weights:
        return weight, Lazy((rows,), lambda: np.zeros(rows, np.float32))
    weights.check_shape(f"{name}.bias", (rows,))
    return weight, Lazy((rows,), lambda: weights.take(f"{name}.bias"))


def joined_projector(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Two layers without an activation between them as the one that they are: W = W2 W1, b = W2 b1 + b2."""
    weights = Weights(stored)
    first, second = (weights.stored(f"projector.{number}.weight") for number in (0, 1))
    if second.shape[1:] != first.shape[:1]:
        raise InputError(
            f"{second.file}: the tensor {second.name} has the shape {list(second.shape)}, which doesn't fit behind "
            f"{first.name} with {list(first.shape)}",
            hint="config.json and the weights are of two models.",
        )

    def matrix() -> torch.Tensor:
        return second.load().float() @ first.load().float()

    joined = {name: tensor for name, tensor in stored.items() if not name.startswith("projector.")}
    joined["projector.0.weight"] = Stored(second.file, second.name, (second.shape[0], first.shape[1]), matrix)
    if any(f"projector.{number}.bias" in weights for number in (0, 1)):
        inner, outer = (weights.stored(f"projector.{number}.bias") for number in (0, 1))

        def bias() -> torch.Tensor:
            return second.load().float() @ inner.load().float() + outer.load().float()

        joined["projector.0.bias"] = Stored(outer.file, outer.name, outer.shape, bias)
    return joined


def as_two_layers(weight: Lazy, bias: Lazy) -> list[tuple[Lazy, Lazy]]:
    """One linear layer as two with GELU between: gelu(x) - gelu(-x) = x, for GELU's exact form and for tanh's.

    llama.cpp's graph always applies the activation and needs the second layer.
    """
    rows, columns = weight.shape

    def twice(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([tensor, -tensor])

    def difference() -> NDArray[np.float32]:
        unit = np.eye(rows, dtype=np.float32)
        return np.concatenate([unit, -unit], axis=1)

    first = Lazy((2 * rows, columns), lambda: twice(weight.load())), Lazy((2 * rows,), lambda: twice(bias.load()))
    second = Lazy((rows, 2 * rows), difference), Lazy((rows,), lambda: np.zeros(rows, np.float32))
    return [first, second]


def in_layer_order(weight: NDArray[np.float32], layers: tuple[int, ...]) -> NDArray[np.float32]:
    """Reorder the inputs ``[out, layers x D]``: llama.cpp concatenates features by layer, whatever the config says."""
    parts = np.split(weight, len(layers), axis=1)
    return np.concatenate([part for _, part in sorted(zip(layers, parts, strict=True), key=lambda p: p[0])], axis=1)
