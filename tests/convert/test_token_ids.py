"""Token ids are those of transformers, on a thousand lines of everything that people type."""

from __future__ import annotations

import json
import random
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import sentencepiece

from llava_edge.convert.cases import prompt_ids
from llava_edge.convert.checkpoint import Checkpoint, Options, open_checkpoint
from llava_edge.convert.llm import write_llm
from llava_edge.convert.prompts import NAMED, find_prompt, from_template, jinja_source
from llava_edge.convert.tiny import FAMILIES, Family, make
from llava_edge.convert.tiny_tokenizers import CORPUS, ONEVISION, VICUNA, Llm
from llava_edge.convert.token_ids import TEXTS, reference_prompt
from llava_edge.convert.tokenizer import load_tokenizer, space_rule
from llava_edge.engine import Engine
from llava_edge.errors import InputError
from llava_edge.prompt import BundleFormat, ImageRef

ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz", "ABCXYZ", "0123456789", " ", "  ", "\t", ".,;:!?", "'\"`", "()[]{}<>", "+-*/=%&|^~",
    "äöüßéèñçøåœ", "αβγδεζηθ", "абвгдежзи", "אבגדה", "ابتثج", "कखगघ", "กขคง", "你好世界日本語",
    "ひらがなカタカナ", "한국어",
    "🐈🐕🚀👩‍👩‍👧‍👦🇨🇭👍🏽", "\u0301\u0308\u0327", "\u00a0\u2003\u3000\u200b\u200d\ufeff",
    "\x01\x07\x1b\x7f\x85", "½²³Ⅻ№™",
    "\n", "\r\n", "▁", "é", "ﬁ", "\U0001f9ff\U00020000",
)  # fmt: skip
CODE = Path(json.__file__).read_text() + Path(textwrap.__file__).read_text()


def corpus() -> list[str]:
    """1,200 lines: code, words of many scripts, emoji, blanks and control characters, always the same."""
    choose = random.Random(7)
    lines = [*TEXTS, *CORPUS, *[line for line in CODE.splitlines() if line][:500]]
    while len(lines) < 1200:
        runs = ["".join(choose.choices(choose.choice(ALPHABETS), k=choose.randint(1, 6))) for _ in range(12)]
        lines.append("".join(runs))
    return lines


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Llm], Checkpoint]:
    made: dict[Llm, Checkpoint] = {}

    def checkpoint(llm: Llm) -> Checkpoint:
        if llm not in made:
            made[llm] = open_checkpoint(make(Family(llm=llm), tmp_path_factory.mktemp("checkpoint") / "c"))
        return made[llm]

    return checkpoint


def load(checkpoint: Checkpoint, work: Path) -> Engine:
    path = work / "llm.gguf"
    write_llm(checkpoint, checkpoint.open_weights(), load_tokenizer(checkpoint.tokenizer_directory), path)
    return Engine(path, n_ctx=64, n_gpu_layers=0)


@pytest.mark.parametrize("llm", get_args(Llm))
def test_a_thousand_lines_get_the_same_ids(
    llm: Llm, checkpoint_of: Callable[[Llm], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(llm)
    tokenizer = load_tokenizer(checkpoint.tokenizer_directory)
    rule = space_rule(tokenizer)
    engine = load(checkpoint, tmp_path)
    lines = corpus()
    assert len(lines) >= 1000
    different = [
        (line, found, expected)
        for line in lines
        if (found := engine.tokenize(rule.apply(line), special=False))
        != (expected := tokenizer(line, add_special_tokens=False).input_ids)
    ]
    engine.close()
    assert different[:3] == []


def test_a_checkpoint_with_only_a_sentencepiece_model_gets_its_ids(tmp_path: Path) -> None:
    directory = make(FAMILIES["v1.5"], tmp_path / "checkpoint")
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    engine = load(open_checkpoint(directory), tmp_path)
    # SentencePiece's own ids; "\u2581" in a text is a blank to it
    lines = corpus()
    assert [engine.tokenize(line, special=False) for line in lines] == [model.encode(line) for line in lines]
    engine.close()


@pytest.mark.parametrize("llm", get_args(Llm))
def test_a_whole_prompt_gets_the_ids_of_transformers(
    llm: Llm, checkpoint_of: Callable[[Llm], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(llm)
    tokenizer = load_tokenizer(checkpoint.tokenizer_directory)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    starts = bool(tokenizer.bos_token) and rendered.startswith(tokenizer.bos_token)
    ids = tokenizer(rendered, add_special_tokens=not starts).input_ids
    at = ids.index(tokenizer.convert_tokens_to_ids("<image>"))
    engine = load(checkpoint, tmp_path)
    assert prompt_ids(engine, checkpoint.description.prompt, "What is it?") == (ids[:at], ids[at + 1 :])
    engine.close()
    assert reference_prompt(tokenizer, checkpoint, "What is it?") == (ids[:at], ids[at + 1 :])


# Conversation formats


def test_the_formats_of_the_original_write_its_exact_text() -> None:
    vicuna = NAMED["vicuna_v1"]("<s>", "</s>")
    assert vicuna.default_system is not None
    system = vicuna.system.replace("{system}", vicuna.default_system)
    asked = system + vicuna.user_prefix + "<image>" + vicuna.image_suffix + "Q" + vicuna.user_suffix
    assert asked + vicuna.assistant_prefix == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nQ ASSISTANT:"
    )
    assert vicuna.turn_end + vicuna.user_prefix == "</s>USER: "
    llava = NAMED["llava_v1"]("<s>", "</s>")
    assert "curious human" in str(llava.default_system)
    assert str(llava.default_system).endswith("the human's questions.")
    assert (llava.user_prefix, llava.assistant_prefix) == ("USER: ", "ASSISTANT:")
    mistral = NAMED["mistral_instruct"]("<s>", "</s>")
    parts = (mistral.user_prefix, mistral.image_suffix, mistral.user_suffix, mistral.assistant_prefix)
    assert parts == ("[INST] ", "\n", " ", "[/INST]")
    direct = NAMED["chatml_direct"]("<s>", "<|im_end|>")
    assert direct.system == "<|im_start|>system\n{system}<|im_end|>"
    assert direct.user_suffix + direct.assistant_prefix == "<|im_end|><|im_start|>assistant\n"
    plain = NAMED["plain"]("<s>", "</s>")
    assert plain.user_prefix + plain.image_suffix + plain.user_suffix + plain.assistant_prefix == ""


def test_a_template_is_taken_apart_and_written_again(checkpoint_of: Callable[[Llm], Checkpoint]) -> None:
    prompt = checkpoint_of("smollm").description.prompt
    assert prompt.user_prefix == "<|im_start|>user\n"
    assert prompt.image_suffix == "\n"
    assert prompt.turn_end == "<|im_end|>\n"
    assert prompt.system == "<|im_start|>system\n{system}<|im_end|>\n"
    assert prompt.stop == ("<|im_end|>",)
    mistral = checkpoint_of("mistral").description.prompt
    assert (mistral.bos, mistral.system, mistral.turn_end) == ("<s>", "", "</s>")
    tokenizer = load_tokenizer(checkpoint_of("smollm").directory)
    again = from_template(jinja_source(prompt, bos_added=False).replace("message['content']", TYPED), tokenizer)
    assert again == prompt


def test_a_template_that_sorts_its_parts_is_taken_apart(checkpoint_of: Callable[[Llm], Checkpoint]) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
        "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    prompt = from_template(template, load_tokenizer(checkpoint_of("vicuna").directory))
    assert (prompt.user_prefix, prompt.image_suffix, prompt.user_suffix) == ("USER: ", "\n", " ")
    assert (prompt.assistant_prefix, prompt.turn_end, prompt.stop) == ("ASSISTANT:", " ", ("</s>",))
    assert (prompt.bos, prompt.system, prompt.default_system) == ("<s> ", "{system} ", None)


def test_a_template_that_shows_texts_alone_in_another_way_is_taken_apart(
    checkpoint_of: Callable[[Llm], Checkpoint],
) -> None:
    tokenizer = load_tokenizer(checkpoint_of("smollm").directory)
    prompt = from_template(ONEVISION, tokenizer)
    assert (prompt.user_prefix, prompt.image_suffix, prompt.text_prefix) == ("<|im_start|>user ", "\n", "\n")
    assert (prompt.assistant_prefix, prompt.turn_end) == ("<|im_start|>assistant\n", "<|im_end|>")
    written = "".join(
        segment.text for segment in BundleFormat(prompt).turn(1, [], "Why?", None) if not isinstance(segment, ImageRef)
    )
    assert written == "<|im_end|><|im_start|>user \nWhy?<|im_end|><|im_start|>assistant\n"
    with pytest.raises(InputError, match="begins a turn in two ways"):
        from_template(ONEVISION.replace("'\n' + c['text']", "'text: ' + c['text']"), tokenizer)


TYPED = "(message['content'] | map(attribute='text', default='<image>\n') | join)"


def test_a_format_that_can_not_be_told_has_to_be_named(
    checkpoint_of: Callable[[Llm], Checkpoint], tmp_path: Path
) -> None:
    directory = make(Family(), tmp_path / "c")
    (directory / "chat_template.jinja").write_text("{{ messages | length }}")
    with pytest.raises(InputError, match="does not show the picture") as caught:
        open_checkpoint(directory)
    assert "--prompt" in str(caught.value.hint)
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="conversation format is unknown"):
        open_checkpoint(directory)
    named = open_checkpoint(directory, Options(prompt="vicuna_v1"))
    assert named.description.prompt.user_prefix == "USER: "
    assert named.notes == ("conversation format: vicuna_v1",)
    with pytest.raises(InputError, match="expected one of vicuna_v1"):
        find_prompt(directory, "vicuna")
    (directory / "chat_template.jinja").write_text(VICUNA.replace("USER: ", "{{ 1/0 }}"))
    with pytest.raises(InputError, match="ZeroDivisionError"):
        open_checkpoint(directory)
