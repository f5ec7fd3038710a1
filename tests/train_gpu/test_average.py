"""The mean of two checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from llava_edge.train_gpu.average import main


@pytest.fixture
def other(workspace: Path, tmp_path: Path) -> Path:
    """The workspace's checkpoint with other weights."""
    folder = tmp_path / "other"
    folder.mkdir()
    for path in (workspace / "base").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    moved = {name: value + 1 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_mean_lies_between(workspace: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "mean"
    result = CliRunner().invoke(main, [str(workspace / "base"), str(other), "--share", "0.25", "-o", str(out)])
    assert result.exit_code == 0, result.output
    before, after = load_file(workspace / "base" / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value + 0.25, msg=name)
    description = "llava_edge.json"
    assert json.loads((out / description).read_text()) == json.loads((other / description).read_text())


def test_another_shape_is_an_error(workspace: Path, other: Path, tmp_path: Path) -> None:
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["intermediate_size"] //= 2
    (other / "config.json").write_text(json.dumps(config))
    half = {name: value[: len(value) // 2] if "gate_proj" in name or "up_proj" in name else
            value[:, : value.shape[1] // 2] if "down_proj" in name else value
            for name, value in load_file(other / "model.safetensors").items()}  # fmt: skip
    save_file({name: value.contiguous() for name, value in half.items()}, other / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    result = CliRunner().invoke(main, [str(workspace / "base"), str(other), "-o", str(tmp_path / "mean")])
    assert result.exit_code == 1
    assert "other shapes" in result.output
    assert not (tmp_path / "mean").exists()
