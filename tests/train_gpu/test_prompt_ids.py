"""Training sees the token ids that the runtime and transformers make of the same conversation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_edge.bundle import prompt_from_fields
from llava_edge.convert.checkpoint import Checkpoint, open_checkpoint
from llava_edge.convert.llm import write_llm
from llava_edge.convert.tiny import Family, make
from llava_edge.convert.tiny_tokenizers import write_tokenizer
from llava_edge.convert.token_ids import measure_tokenizer, reference_prompt
from llava_edge.convert.tokenizer import load_tokenizer, space_rule
from llava_edge.engine import Engine
from llava_edge.prompt import Answer, BundleFormat, ImageRef, PromptTokenizer, TokenRun
from llava_edge.strict_json import Fields
from llava_edge.train_gpu import build, checkpoint
from llava_edge.train_gpu.config import DataConfig, ModelConfig
from llava_edge.train_gpu.prompts import FORMATS, IGNORE, Renderer, blank_before_every_run
from llava_edge.train_gpu.samples import PictureRef, Sample

TURNS = (("<image>\nWhat animal is in this picture?", "A brown dog."), ("Two cats?", "It runs."))
SAMPLE = Sample("s", TURNS, (PictureRef("0.png", Path("0.png")),))
SCHEMES = ("first", "always")


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A checkpoint whose tokenizer puts blanks before the first word of a prompt, or of every run of text."""

    def opened(scheme: str) -> Checkpoint:
        directory = make(Family(), tmp_path_factory.mktemp("checkpoint") / scheme)
        if scheme == "always":
            tokenizer = AutoTokenizer.from_pretrained(directory)
            blank_before_every_run(tokenizer)
            checkpoint.save_tokenizer(directory, tokenizer)
        return open_checkpoint(directory)

    made = {scheme: opened(scheme) for scheme in SCHEMES}
    return lambda scheme: made[scheme]


def engine_of(opened: Checkpoint, path: Path) -> Engine:
    write_llm(opened, opened.open_weights(), load_tokenizer(opened.tokenizer_directory), path)
    return Engine(path, n_ctx=64, n_gpu_layers=0)


def answers(labels: Sequence[int], stop: int) -> list[tuple[int, ...]]:
    """The labelled tokens, answer by answer, without what ends them."""
    found: list[list[int]] = [[]]
    for label in labels:
        if label == stop:
            found.append([])
        elif label != IGNORE:
            found[-1].append(label)
    return [tuple(answer) for answer in found if answer]


@pytest.mark.parametrize("name", ["vicuna_v1", "llava_v1", "mistral_instruct"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_turns_with_a_picture_get_the_ids_of_the_runtime_and_of_transformers(
    checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path, scheme: str, name: str
) -> None:
    opened = checkpoint_of(scheme)
    tokenizer = load_tokenizer(opened.directory)
    rule = space_rule(tokenizer)
    assert (rule.prefix, rule.opening) == (scheme == "always", scheme == "first")
    image = tokenizer.convert_tokens_to_ids("<image>")
    rendered = Renderer(tokenizer, name, image).render(SAMPLE)

    described = Fields(build._prompt(tokenizer, name), "prompt")
    chat = BundleFormat(described.build(prompt_from_fields))
    first, second = answers(rendered.labels, tokenizer.eos_token_id)
    segments = [
        *chat.turn(0, [ImageRef("0")], TURNS[0][0].removeprefix("<image>\n"), None), Answer(first),
        *chat.turn(1, [], TURNS[1][0], None), Answer(second),
    ]  # fmt: skip
    engine = engine_of(opened, tmp_path / "llm.gguf")
    units = PromptTokenizer(engine).units(segments)
    engine.close()
    found = [token for unit in units for token in (unit.ids if isinstance(unit, TokenRun) else (image,))]
    assert rendered.ids == [*found, tokenizer.eos_token_id]
    text = FORMATS[name]
    written = text.opening + "".join(
        f"{text.user}{question}{text.user_suffix}{text.assistant} {answer}</s>" for question, answer in TURNS
    )
    assert tokenizer(written).input_ids == rendered.ids


def test_the_gate_sees_a_description_without_the_blank_that_opens_a_prompt(
    checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    opened = checkpoint_of("first")
    tokenizer = load_tokenizer(opened.directory)
    path = opened.directory / checkpoint.DESCRIPTION
    path.write_text("{}")
    try:
        engine = engine_of(opened, tmp_path / "llm.gguf")
        assert measure_tokenizer(engine, tokenizer, opened, ["What?"]).first_difference is None
        prompt = dataclasses.replace(opened.description.prompt, bos="<s>")
        wrong = dataclasses.replace(opened, description=dataclasses.replace(opened.description, prompt=prompt))
        assert reference_prompt(tokenizer, wrong, "What?") == reference_prompt(tokenizer, opened, "What?")
        assert measure_tokenizer(engine, tokenizer, wrong, ["What?"]).first_difference is not None
        engine.close()
    finally:
        path.unlink()


def test_a_model_that_is_put_together_has_the_blanks_of_the_original(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    size = write_tokenizer("vicuna", tmp_path / "llm")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "llm")
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1, image_size=28,
            patch_size=14,
        )
    ).save_pretrained(tmp_path / "tower")  # fmt: skip
    colours = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(colours))
    parts = ModelConfig(llm=str(tmp_path / "llm"), vision_tower=str(tmp_path / "tower"))
    init = tmp_path / "init"
    build.assemble_into(init, parts, DataConfig(samples="-", format="vicuna_v1"), 0)

    model, tokenizer = build.load_model(str(init)), build.load_tokenizer(str(init))
    description = checkpoint.read_description(init)
    checkpoint.save_checkpoint(tmp_path / "trained", model, tokenizer, description)  # as a run does at its end
    image = model.config.image_token_id
    spm = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "llm" / "tokenizer.model"))
    before, after = (
        f"{description['prompt']['default_system']} USER: ",
        "\nWhat animal is in this picture? ASSISTANT: A brown dog.",
    )
    original = [
        tokenizer.bos_token_id, *spm.encode(before), image, *spm.encode(after), tokenizer.eos_token_id,
        *spm.encode("USER: Two cats? ASSISTANT: It runs."), tokenizer.eos_token_id,
    ]  # fmt: skip
    for directory in (init, tmp_path / "trained"):
        read = AutoTokenizer.from_pretrained(directory)
        assert Renderer(read, "vicuna_v1", image).render(SAMPLE).ids == original
        text = f"{before}<image>{after}</s>USER: Two cats? ASSISTANT: It runs.</s>"
        assert read(text).input_ids == original
