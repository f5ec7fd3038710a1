"""The mmproj file computes in llama.cpp what the PyTorch module computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlavaForConditionalGeneration

from llava_edge.convert.checkpoint import open_checkpoint
from llava_edge.convert.llm import write_llm
from llava_edge.convert.mmproj import write_mmproj
from llava_edge.convert.parity import MMPROJ_LIMITS, VisionParity, compare_embeddings, pictures
from llava_edge.convert.reference import Reference
from llava_edge.convert.tokenizer import load_tokenizer
from llava_edge.convert.weights import Weights, read_directory
from llava_edge.engine import Engine
from llava_edge.images import normalize
from llava_edge.train_gpu.features import encode_pixels
from llava_edge.vision.mtmd import MtmdEncoder

SIZE = 56


@contextmanager
def engine_of(directory: Path, work: Path) -> Iterator[Engine]:
    path = work / "llm.gguf"
    if not path.exists():
        write_llm(open_checkpoint(directory), Weights(read_directory(directory)), load_tokenizer(directory), path)
    engine = Engine(path, n_ctx=256, n_threads=2, n_gpu_layers=0)
    try:
        yield engine
    finally:
        engine.close()


class SwappedWeights(Weights):
    """A converter that mixes up two tensors of the same shape."""

    def __init__(self, directory: Path, a: str, b: str) -> None:
        super().__init__(read_directory(directory))
        self._swap = {a: b, b: a}

    def take(self, name: str) -> NDArray[np.float32]:
        return super().take(self._swap.get(name, name))


def parity_of(directory: Path, work: Path, weights: Weights | None = None) -> VisionParity:
    checkpoint = open_checkpoint(directory)
    path = work / "mmproj.gguf"
    write_mmproj(checkpoint, weights or checkpoint.open_weights(), path)
    reference = Reference(checkpoint, checkpoint.open_weights())
    images = pictures(SIZE)
    with engine_of(directory, work) as engine:
        encoder = MtmdEncoder(path, engine)
        found = encoder.encode(images)
        encoder.close()
    return compare_embeddings(found, [reference.encode(image) for image in images])


def test_at_f16_every_token_has_a_cosine_of_at_least_0999(checkpoint_dir: Path, tmp_path: Path) -> None:
    parity = parity_of(checkpoint_dir, tmp_path)
    assert parity.tokens == 2 * 16
    assert parity.cosine_min >= 0.999
    assert parity.relative_error < 0.05
    assert parity.failures(MMPROJ_LIMITS["F16"]) == []


@pytest.mark.parametrize("layers", [(2, 1), (-1,), (0, 3)])
def test_feature_layers_in_any_order_and_number_are_right(
    layers: tuple[int, ...], make_checkpoint: object, tmp_path: Path
) -> None:
    assert callable(make_checkpoint)
    assert parity_of(make_checkpoint(feature_layers=layers), tmp_path).cosine_min >= 0.999


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("encoder.layer.0.attention.attention.query.weight", "encoder.layer.0.attention.attention.key.weight"),
        ("encoder.layer.1.attention.attention.value.weight", "encoder.layer.1.attention.output.dense.weight"),
        ("encoder.layer.0.norm1.weight", "encoder.layer.0.norm2.weight"),
        ("encoder.layer.0.layer_scale1.lambda1", "encoder.layer.0.layer_scale2.lambda1"),
    ],
)
def test_a_swapped_tensor_is_caught(a: str, b: str, checkpoint_dir: Path, tmp_path: Path) -> None:
    swapped = SwappedWeights(checkpoint_dir, f"vision_tower.{a}", f"vision_tower.{b}")
    failures = parity_of(checkpoint_dir, tmp_path, swapped).failures(MMPROJ_LIMITS["F16"])
    assert failures
    assert "cosine" in failures[0]


def test_the_reference_is_what_training_computes_and_ignores_the_class_token(checkpoint_dir: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_dir)
    reference = Reference(checkpoint, checkpoint.open_weights())
    picture = pictures(SIZE)[0]
    before = reference.encode(picture)
    pixels = torch.from_numpy(normalize(picture, checkpoint.description.image))[None]
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint_dir, dtype=torch.float32)
    with torch.inference_mode():
        features = encode_pixels(model, pixels)
        trained = model.model.multi_modal_projector(features)[0].numpy()
        reference._tower.embeddings.cls_token.add_(5)
    np.testing.assert_allclose(before, trained, rtol=0, atol=1e-6)
    np.testing.assert_allclose(reference.encode(picture), before, rtol=0, atol=1e-6)
