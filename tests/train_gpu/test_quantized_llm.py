from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import LlavaForConditionalGeneration

from llava_edge.convert import convert_checkpoint
from llava_edge.train_gpu import quantized_llm
from llava_edge.train_gpu.prepare_nano import DESCRIPTION

TINY = {
    **DESCRIPTION,
    "image": {"mode": "pad", "size": 56, "mean": [0.5] * 3, "std": [0.5] * 3, "pad_color": [0, 0, 0]},
    "visual_tokens": {"full": 16, "grid": [4, 4], "trained": [16], "default": 16},
}


@pytest.fixture
def checkpoint(workspace: Path, tmp_path: Path) -> Path:
    directory = shutil.copytree(workspace / "base", tmp_path / "checkpoint")
    (directory / "llava_edge.json").write_text(json.dumps(TINY))
    return directory


def quantize(checkpoint: Path, output: Path) -> Path:
    convert_checkpoint(checkpoint, output, llm_type="Q8_0", verify=False)
    return output / "llm-Q8_0.gguf"


def llm_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    return dict(model.model.language_model.state_dict())


def test_the_checkpoint_takes_the_values_that_the_quantised_file_holds(checkpoint: Path, tmp_path: Path) -> None:
    first = quantize(checkpoint, tmp_path / "first")
    result = CliRunner().invoke(
        quantized_llm.main, [str(checkpoint), str(first), "-o", str(tmp_path / "back")], catch_exceptions=False
    )
    assert result.exit_code == 0
    before, after = llm_weights(checkpoint), llm_weights(tmp_path / "back")
    moved = [float((after[name] - tensor).norm() / tensor.norm()) for name, tensor in before.items()]
    assert 0 < max(moved) < 0.02

    again = quantize(tmp_path / "back", tmp_path / "second")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(first).tensors}
    for tensor in gguf.GGUFReader(again).tensors:
        np.testing.assert_array_equal(tensor.data, tensors[tensor.name], err_msg=tensor.name)
