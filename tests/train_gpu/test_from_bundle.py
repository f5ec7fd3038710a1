"""A shipped bundle becomes a checkpoint again, which is converted and trained like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import llava_edge
from llava_edge.convert import convert_checkpoint
from llava_edge.errors import InputError
from llava_edge.train_gpu.from_bundle import leave_grid, main, undo_rounding

CAT = Path(__file__).parents[2] / "examples" / "cat.jpg"
QUESTION = "What animal is in this picture?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("nano") / "checkpoint"
    result = CliRunner().invoke(main, ["nano", "-o", str(output)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return output


def test_nano_turned_back_and_converted_again_says_the_same(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "bundle", llm_type="F16", mmproj_type="F16", vision="none")
    answers = []
    for name in ("nano", str(tmp_path / "bundle")):
        with llava_edge.load(name) as model, model.chat() as chat:
            answers.append(chat.ask(QUESTION, images=[CAT], temperature=0, max_tokens=16).text)
    assert answers[0] == answers[1]
    assert "cat" in answers[0]


def language_model(width: int, seed: int, kv_heads: int = 4) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=96, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def matrices(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.model.language_model.state_dict().items() if name.endswith("_proj.weight")}


def as_q5_0(matrix: torch.Tensor) -> torch.Tensor:
    packed = gguf.quants.quantize(matrix.numpy(), gguf.GGMLQuantizationType.Q5_0)
    return torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q5_0))


@torch.no_grad()
def test_rounding_is_undone_where_the_base_of_lora_is_known() -> None:
    base, trained = language_model(128, seed=0), language_model(128, seed=0)
    random = torch.Generator().manual_seed(1)
    for matrix in matrices(trained).values():
        rows, columns = matrix.shape
        change = torch.randn(rows, 4, generator=random) @ torch.randn(4, columns, generator=random)
        matrix += 0.01 * change / 4**0.5
    wanted = {name: t.clone() for name, t in matrices(trained).items()}
    for matrix in matrices(trained).values():
        matrix.copy_(as_q5_0(matrix))
    rounded = {name: float((t - wanted[name]).norm()) for name, t in matrices(trained).items()}

    assert 4 <= undo_rounding(trained, base, rank=8) <= 8
    left = {name: float((t - wanted[name]).norm()) for name, t in matrices(trained).items()}
    assert max(left[name] / rounded[name] for name in left) < 0.5


@pytest.mark.parametrize("heads", [4, 2])
def test_off_the_grid_a_model_computes_what_it_did_and_keeps_a_small_change(heads: int) -> None:
    model = language_model(128, seed=0, kv_heads=heads)
    for matrix in matrices(model).values():
        matrix.copy_(as_q5_0(matrix))
    tokens = torch.arange(90)[None]
    with torch.no_grad():
        before = model.model.language_model(input_ids=tokens).last_hidden_state
    assert max(kept_of_a_change(matrix) for matrix in matrices(model).values()) < 0.1

    leave_grid(model.model.language_model, 0.25)

    with torch.no_grad():
        after = model.model.language_model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert min(kept_of_a_change(matrix) for matrix in matrices(model).values()) > 0.5


def kept_of_a_change(matrix: torch.Tensor) -> float:
    """How much of a change by a fifth of the grid's steps is there after rounding, where 0 is none and 1 all of it."""
    rows, columns = matrix.shape
    signs = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).sign()
    blocks = matrix.reshape(rows, -1, 32)
    step = (blocks.abs().amax(-1, keepdim=True) / 16).expand_as(blocks).reshape(rows, columns)
    change = 0.2 * step * signs
    moved = as_q5_0(matrix + change) - as_q5_0(matrix)
    return float((moved * change).sum() / change.square().sum())


def test_off_grid_by_command(tmp_path: Path, checkpoint: Path) -> None:
    result = CliRunner().invoke(main, ["nano", "-o", str(tmp_path / "off"), "--off-grid", "0.25"])
    assert result.exit_code == 0, result.output
    on, off = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "off"))
    moved = {name for name in on if not torch.equal(on[name], off[name])}
    assert any(name.endswith("down_proj.weight") for name in moved)
    assert all(".layers." in name and "language_model" in name for name in moved)


def test_another_base_is_refused() -> None:
    with pytest.raises(InputError, match="another shape"):
        undo_rounding(language_model(128, seed=0), language_model(64, seed=0), rank=16)
    with pytest.raises(InputError, match="leaves no rounding to measure"):
        undo_rounding(language_model(32, seed=0), language_model(32, seed=1), rank=48)


def test_a_bundle_of_another_make_is_refused(
    make_bundle: Callable[..., Path], make_mmproj: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = make_bundle(mmproj=make_mmproj(kind="qwen2vl_merger"))
    result = CliRunner().invoke(main, [str(bundle), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "another projector than an MLP of two layers" in result.output
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["no-such-model", "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "no-such-model" in result.output
