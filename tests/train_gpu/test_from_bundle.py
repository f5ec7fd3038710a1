"""A shipped bundle becomes a checkpoint again, which is converted and trained like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from click.testing import CliRunner
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import llava_edge
from llava_edge.convert import convert_checkpoint
from llava_edge.errors import InputError
from llava_edge.train_gpu.from_bundle import main, undo_rounding

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


def language_model(width: int, seed: int) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=96, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4
    )
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def matrices(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.model.language_model.state_dict().items() if name.endswith("_proj.weight")}


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
        packed = gguf.quants.quantize(matrix.numpy(), gguf.GGMLQuantizationType.Q5_0)
        matrix.copy_(torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q5_0)))
    rounded = {name: float((t - wanted[name]).norm()) for name, t in matrices(trained).items()}

    assert 4 <= undo_rounding(trained, base, rank=8) <= 8
    left = {name: float((t - wanted[name]).norm()) for name, t in matrices(trained).items()}
    assert max(left[name] / rounded[name] for name in left) < 0.5


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
