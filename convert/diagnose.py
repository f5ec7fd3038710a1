"""Where a file and the reference part: the first layer whose output differs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge.convert.observe import GgmlTensor, Observer, rows_of
from llava_edge.engine import Engine

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from llava_edge.convert.reference import Reference

# A layer's output is off when its error is so large a share of the reference's size; float16 weights give a tenth.
_OFF = 0.05


def tower(found: Sequence[torch.Tensor], reference: Reference, images: Sequence[Image.Image]) -> list[str]:
    """Compare hidden states ``[B, T, W]`` of the tower, from the input of the first block on."""
    for number, states in enumerate(found):
        for index, image in enumerate(images):
            expected = reference.hidden_states(image)[number].numpy()
            error = _error(np.asarray(states[index]), expected[-states.shape[1] :])
            if error > _OFF:
                where = f"block {number - 1}" if number else "patches and positions"
                return [f"the first part of the tower that differs is {where} (relative error {error:.3f})"]
    return ["all blocks of the tower agree: the projector or the choice of features differs"]


def onnx_states(path: Path, pixels: Sequence[NDArray[np.float32]]) -> list[Any]:
    """The hidden states of an ONNX model that was written with them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()][1:]
    found: list[Any] = session.run(names, {session.get_inputs()[0].name: np.stack(pixels)})
    return found


def language_model(path: Path, rows: NDArray[np.float32], reference: Reference) -> list[str]:
    """Compare the output of every layer on one prompt ``[T, D]``."""
    expected = reference.layer_outputs(rows)
    outputs: dict[int, NDArray[np.float32]] = {}

    def keep(tensor: GgmlTensor) -> None:
        outputs[int(tensor.name.removeprefix(b"l_out-"))] = rows_of(tensor)

    with Observer(lambda tensor: tensor.name.startswith(b"l_out-"), keep) as observer:
        engine = Engine(path, n_ctx=len(rows) + 8, n_gpu_layers=0, n_batch=len(rows) + 8, observer=observer.callback)
        try:
            engine.decode_embeddings(rows, logits=True)
        finally:
            engine.close()
    for number, wanted in enumerate(expected):
        values = outputs.get(number)
        if values is None:
            return [f"llama.cpp has no layer {number}"]
        # llama.cpp computes only the rows of the last layer that lead to an output.
        error = _error(values, wanted[-len(values) :])
        if error > _OFF:
            return [f"the first layer of the language model that differs is {number} (relative error {error:.3f})"]
    return ["all layers of the language model agree: the last norm or the output matrix differs"]


def _error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))
