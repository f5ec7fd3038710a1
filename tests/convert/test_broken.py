"""Files that are broken on purpose, each caught by the gate, which says where they part from the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llava_edge.convert import cases, parity
from llava_edge.convert.checkpoint import Checkpoint, open_checkpoint
from llava_edge.convert.gate import Gate
from llava_edge.convert.llm import write_llm
from llava_edge.convert.mmproj import write_mmproj
from llava_edge.convert.reference import Reference
from llava_edge.convert.tiny import FAMILIES, make
from llava_edge.convert.tokenizer import load_tokenizer
from llava_edge.convert.vision_onnx import write_onnx
from llava_edge.convert.weights import Weights, read_directory
from llava_edge.engine import Engine

Array = NDArray[np.float32]


class Broken(Weights):
    """A converter that mixes up tensors or changes them."""

    def __init__(
        self,
        directory: Path,
        swap: tuple[str, str] = ("", ""),
        change: tuple[str, Callable[[Array], Array]] | None = None,
    ) -> None:
        super().__init__(read_directory(directory))
        self._swap = {swap[0]: swap[1], swap[1]: swap[0]}
        self._change = change

    def take(self, name: str) -> Array:
        tensor = super().take(self._swap.get(name, name))
        if self._change and name == self._change[0]:
            return self._change[1](tensor)
        return tensor


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(FAMILIES["HF llava"], tmp_path_factory.mktemp("clip") / "checkpoint")


@pytest.fixture(scope="module")
def checkpoint(directory: Path) -> Checkpoint:
    return open_checkpoint(directory)


@pytest.fixture(scope="module")
def gate(checkpoint: Checkpoint, directory: Path) -> Gate:
    return Gate(checkpoint, Reference(checkpoint, checkpoint.open_weights()), load_tokenizer(directory))


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = tmp_path_factory.mktemp("llm") / "llm-F16.gguf"
    write_llm(checkpoint, checkpoint.open_weights(), load_tokenizer(directory), path)
    loaded = Engine(path, n_ctx=1024, n_gpu_layers=0)
    yield loaded
    loaded.close()


def vision_failures(
    gate: Gate, engine: Engine, checkpoint: Checkpoint, weights: Callable[[], Weights], work: Path
) -> tuple[list[str], list[str]]:
    """What the gate says of an mmproj and of an ONNX file that were written from these."""
    write_mmproj(checkpoint, weights(), work / "mmproj-F16.gguf")
    write_onnx(checkpoint, weights(), work / "vision-fp32.onnx")

    def deepen() -> Path:
        write_onnx(checkpoint, weights(), work / "hidden.onnx", hidden=True)
        return work / "hidden.onnx"

    return (
        gate.measure_mmproj(work / "mmproj-F16.gguf", "F16"),
        gate.measure_onnx(work / "vision-fp32.onnx", "fp32", engine, deepen),
    )


def test_the_limits_of_floats_are_those_that_were_promised() -> None:
    assert parity.LLM_LIMITS["F16"] == parity.LLM_LIMITS["F32"] == parity.LlmLimits(0.001, 0.99, 0.05)
    assert parity.ONNX_LIMITS["fp32"] == parity.VisionLimits(0.9999, 0.9999)
    assert parity.ONNX_LIMITS["int8"].cosine_mean == 0.995
    assert parity.MMPROJ_LIMITS["F16"] == parity.VisionLimits(0.999, 0.999)
    assert (cases.POSITIONS, len(parity.pictures(56))) == (200, 2)


def test_whole_files_pass(gate: Gate, engine: Engine, checkpoint: Checkpoint, directory: Path, tmp_path: Path) -> None:
    assert vision_failures(gate, engine, checkpoint, checkpoint.open_weights, tmp_path) == ([], [])
    assert gate.measure_llm(engine, "F16") == []


BLOCK = "vision_tower.encoder.layers"


@pytest.mark.parametrize(
    ("swap", "where"),
    [
        ((f"{BLOCK}.0.self_attn.q_proj.weight", f"{BLOCK}.0.self_attn.v_proj.weight"), "block 0"),
        ((f"{BLOCK}.1.self_attn.v_proj.weight", f"{BLOCK}.1.self_attn.out_proj.weight"), "block 1"),
        ((f"{BLOCK}.0.layer_norm1.weight", f"{BLOCK}.0.layer_norm2.weight"), "block 0"),
        (("projector.0.weight", "projector.1.weight"), "all blocks of the tower agree"),
    ],
)
def test_a_swapped_tensor_of_the_tower_is_caught_and_placed(
    swap: tuple[str, str],
    where: str,
    gate: Gate,
    engine: Engine,
    checkpoint: Checkpoint,
    directory: Path,
    tmp_path: Path,
) -> None:
    for failures in vision_failures(gate, engine, checkpoint, lambda: Broken(directory, swap), tmp_path):
        assert "cosine" in failures[0]
        assert where in failures[-1]


def test_one_layer_too_few_is_caught(
    gate: Gate, engine: Engine, checkpoint: Checkpoint, directory: Path, tmp_path: Path
) -> None:
    short = replace(checkpoint, feature_layers=tuple(layer - 1 for layer in checkpoint.feature_layers))
    for failures in vision_failures(gate, engine, short, checkpoint.open_weights, tmp_path):
        assert "cosine" in failures[0]


def test_a_misplaced_class_token_is_caught(
    gate: Gate, engine: Engine, checkpoint: Checkpoint, directory: Path, tmp_path: Path
) -> None:
    table = "vision_tower.embeddings.position_embedding.weight"

    def misplaced() -> Weights:
        return Broken(directory, change=(table, lambda rows: np.roll(rows, -1, axis=0)))

    for failures in vision_failures(gate, engine, checkpoint, misplaced, tmp_path):
        assert "cosine" in failures[0]
        assert "patches and positions" in failures[-1]


@pytest.mark.parametrize("number", [0, 2])
def test_a_swapped_tensor_of_the_language_model_is_caught_and_placed(
    number: int, gate: Gate, checkpoint: Checkpoint, directory: Path, tmp_path: Path
) -> None:
    layer = f"language_model.layers.{number}"
    weights = Broken(directory, (f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"))
    failures = llm_failures(gate, checkpoint, weights, directory, tmp_path)
    assert "KL divergence" in failures[0]
    assert f"first layer of the language model that differs is {number}" in failures[-1]


def test_a_language_model_of_one_layer_too_few_is_caught(
    gate: Gate, checkpoint: Checkpoint, directory: Path, tmp_path: Path
) -> None:
    text = copy.copy(checkpoint.text_config)
    text.num_hidden_layers -= 1
    short = replace(checkpoint, text_config=text)
    failures = llm_failures(gate, short, checkpoint.open_weights(), directory, tmp_path)
    assert "KL divergence" in failures[0]
    assert failures[-1] == "llama.cpp has no layer 2"


def llm_failures(gate: Gate, checkpoint: Checkpoint, weights: Weights, directory: Path, work: Path) -> list[str]:
    path = work / "llm-F16.gguf"
    write_llm(checkpoint, weights, load_tokenizer(directory), path)
    with_answers = gate.open_engine(path)
    try:
        return gate.measure_llm(with_answers, "F16")
    finally:
        with_answers.close()
