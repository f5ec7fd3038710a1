"""The GGUF language model tokenises, answers and formats prompts as the checkpoint does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llava_edge.bundle import PromptFormat
from llava_edge.convert.cases import QUESTIONS
from llava_edge.convert.checkpoint import open_checkpoint
from llava_edge.convert.gate import Gate
from llava_edge.convert.llm import interleave_rope, write_llm
from llava_edge.convert.prompts import jinja_source
from llava_edge.convert.reference import Prompt, Reference
from llava_edge.convert.token_ids import measure_tokenizer
from llava_edge.convert.tokenizer import load_tokenizer, pre_tokenizer_name
from llava_edge.convert.weights import Weights, read_directory
from llava_edge.engine import Engine
from llava_edge.errors import InputError


def load(directory: Path, work: Path, weights: Weights | None = None) -> Engine:
    path = work / "llm-F16.gguf"
    checkpoint = open_checkpoint(directory)
    write_llm(checkpoint, weights or checkpoint.open_weights(), load_tokenizer(directory), path)
    return Engine(path, n_ctx=256, n_threads=2, n_gpu_layers=0)


def gate_of(directory: Path) -> Gate:
    checkpoint = open_checkpoint(directory)
    return Gate(checkpoint, Reference(checkpoint, checkpoint.open_weights()), load_tokenizer(directory))


@pytest.mark.parametrize("tied", [True, False])
def test_at_f16_the_greedy_answer_is_the_references(
    tied: bool, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_checkpoint(tied=tied)
    gate = gate_of(directory)
    engine = load(directory, tmp_path)
    assert gate.measure_llm(engine, "F16") == []
    engine.close()
    parity = gate.report()["llm"]["F16"]
    assert parity["tokens"] >= 200
    assert parity["top1_agreement"] == 1
    assert parity["kl_max"] < 1e-3
    assert len({token for case in gate._cases for token in case.tokens}) > 10


def test_unpermuted_queries_are_caught_and_the_layer_is_named(checkpoint_dir: Path, tmp_path: Path) -> None:
    class Unpermuted(Weights):
        def take(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            weight = super().take(name)
            if name.endswith("layers.1.self_attn.q_proj.weight"):
                return interleave_rope(weight.copy(), 4)
            return weight

    engine = load(checkpoint_dir, tmp_path, Unpermuted(read_directory(checkpoint_dir)))
    failures = gate_of(checkpoint_dir).measure_llm(engine, "F16")
    engine.close()
    assert any("KL divergence" in words for words in failures)
    assert any("first layer of the language model that differs is 1" in words for words in failures)


@pytest.mark.parametrize("digits", [True, False])
def test_token_ids_are_those_of_transformers(
    digits: bool, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_checkpoint(digits=digits)
    engine = load(directory, tmp_path)
    parity = measure_tokenizer(engine, load_tokenizer(directory), open_checkpoint(directory), QUESTIONS)
    plain = engine.tokenize("<|im_end|>", special=False)
    end = engine.tokenize("<|im_end|>", special=True)
    assert parity.first_difference is None
    assert parity.identical == parity.texts
    assert len(plain) > 1
    assert end == [2]
    assert engine.is_end(2)
    assert engine.is_control(1)
    assert engine.bos == ""
    engine.close()


def test_a_foreign_way_of_splitting_text_is_refused() -> None:
    assert pre_tokenizer_name({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}) == "gpt-2"
    for foreign in (
        None,
        {"type": "Metaspace"},
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, {"type": "ByteLevel"}]},
    ):
        with pytest.raises(InputError, match="pre_tokenizer is"):
            pre_tokenizer_name(foreign)


def test_the_chat_template_writes_the_prompt_format() -> None:
    prompt = PromptFormat(
        bos="",
        system='<|im_start|>system\n{system} "quoted"<|im_end|>\n',
        default_system=None,
        user_prefix="<|im_start|>user\n",
        user_suffix="<|im_end|>\n",
        assistant_prefix="<|im_start|>assistant\n",
        turn_end="<|im_end|>\n",
        stop=("<|im_end|>",),
        image_suffix="\n",
    )
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        jinja_source(prompt, bos_added=False)
    )
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "{{ three }}"},
    ]
    body = (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\n{{ three }}<|im_end|>\n"
    )
    assert template.render(messages=turns, add_generation_prompt=False) == body
    assert template.render(messages=turns, add_generation_prompt=True) == body + "<|im_start|>assistant\n"
    system = [{"role": "system", "content": "Be brief."}, *turns]
    expected = f'<|im_start|>system\nBe brief. "quoted"<|im_end|>\n{body}'
    assert template.render(messages=system, add_generation_prompt=False) == expected


def test_every_head_is_interleaved_by_itself() -> None:
    rows = np.arange(12, dtype=np.float32)[:, None]
    assert interleave_rope(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_questions_that_share_a_picture_are_computed_together_as_each_alone(checkpoint_dir: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_dir)
    reference = Reference(checkpoint, checkpoint.open_weights())
    random = np.random.default_rng(5)
    start, *branches = (random.standard_normal((n, 64)).astype(np.float32) for n in (9, 4, 1, 6))
    together = reference.logits([Prompt(start, branches)], [2, 1, 6])
    alone = reference.logits([Prompt(start, [branch]) for branch in branches], [2, 1, 6])
    assert [rows.shape[0] for rows in together] == [2, 1, 6]
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
