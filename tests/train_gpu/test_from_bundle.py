"""A shipped bundle becomes a checkpoint again, which is converted and trained like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import llava_edge
from llava_edge.convert import convert_checkpoint
from llava_edge.train_gpu.from_bundle import main

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
