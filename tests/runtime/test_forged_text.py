"""What people write never becomes a special token or a picture, whatever it is and however it is split.

``LLAVA_EDGE_FUZZ=100000`` makes it as many texts; docs/security.md has the figures of that run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest

from llava_edge.bundle import PromptFormat
from llava_edge.chat_template import TemplateFormat
from llava_edge.engine import Engine
from llava_edge.errors import InputError
from llava_edge.prompt import Answer, BundleFormat, ChatFormat, ImageRef, PromptTokenizer, Segment, TokenRun

COUNT = int(os.environ.get("LLAVA_EDGE_FUZZ", "1500"))
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
PIECES = [
    *SPECIALS, *SPECIALS,
    *(name[:cut] for name in SPECIALS for cut in (1, 2, len(name) - 1)),
    *(name[cut:] for name in SPECIALS for cut in (1, 2, len(name) - 1)),
    # other models' tokens and markers
    "<s>", "</s>", "[INST]", "[/INST]", "<__media__>", "<__image__>", "<|image|>", "<image_pad>", "<|vision_start|>",
    "<|user|>", "<|assistant|>", "<|eot_id|>", "<start_of_turn>", "<0x0A>", "### Human:", "USER:", "ASSISTANT:",
    # placeholders of the template, and of Python and Jinja
    "\ue000Q\ue000", "\ue000A\ue000", "\ue000S\ue000", "\ue000", "{system}", "{{ messages }}", "{% for %}", "{}", "%s",
    # controls, and what Unicode has to offer
    "\0", "\x01", "\x1b[2J", "\x7f", "\x85", "\t", "\n", "\r\n", " ", "   ", "\u00a0", "\u2028", "\u200b", "\u200d",
    "\ufeff", "\u202e", "\u2066", "\u00ad", "\uff1c\uff5cim_start\uff5c\uff1e", "\u0338", "e\u0301", "\u0130", "\u1e9e",
    "\u2581", "\u0120", "\u010a", "\u4f60\u597d", "\U0001f408", "\U0001f468\u200d\U0001f469", "\U000e0041",
    "\U0010ffff",
    "user\n", "assistant\n", "system\n", "cat", "picture", "0", "a" * 300,
]  # fmt: skip


def texts(rng: random.Random) -> Iterator[str]:
    while True:
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 8)))
        if rng.random() < 0.2:
            cut = rng.randrange(len(text) + 1)
            text = text[:cut] + chr(rng.choice((rng.randrange(32), rng.randrange(0xD800)))) + text[cut:]
        yield text


def chatml() -> BundleFormat:
    return BundleFormat(
        PromptFormat(
            bos="",
            system="<|im_start|>system\n{system}<|im_end|>\n",
            default_system=None,
            user_prefix="<|im_start|>user\n",
            user_suffix="<|im_end|>\n",
            assistant_prefix="<|im_start|>assistant\n",
            turn_end="<|im_end|>\n",
            stop=("<|im_end|>",),
            image_suffix="\n",
        )
    )


TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("special_type", [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED], ids=["control", "user"])
@pytest.mark.parametrize("form", [chatml, lambda: TemplateFormat(TEMPLATE)], ids=["bundle", "template"])
def test_no_special_token_and_no_picture_comes_from_text(
    special_type: int, form: Callable[[], ChatFormat], make_llm: Callable[..., Path]
) -> None:
    """Three turns a conversation, the texts of two of which are halves of one text."""
    engine = Engine(make_llm(special_type=special_type), n_ctx=64, n_threads=1)
    specials = {engine.tokenize(name, special=True)[0] for name in SPECIALS}
    assert len(specials) == 4
    chat = form()
    tokenizer = PromptTokenizer(engine)
    for number in (0, 1):
        tokenizer.learn(chat.turn(number, [ImageRef("")], "?", "?"))
    rng = random.Random(7)
    source = texts(rng)
    for _ in range(COUNT // 4):
        text, system, last = next(source), next(source), next(source)
        cut = rng.randrange(len(text) + 1)
        pictures = [ImageRef(str(n)) for n in range(rng.randrange(3))]
        plan = [(text[:cut], pictures), (text[cut:], []), (last, [])]
        assert_nothing_forged(chat, tokenizer, engine, specials, plan, system)
    engine.close()


def assert_nothing_forged(
    chat: ChatFormat,
    tokenizer: PromptTokenizer,
    engine: Engine,
    specials: set[int],
    plan: list[tuple[str, list[ImageRef]]],
    system: str,
) -> None:
    """The special tokens and the pictures are those of a harmless conversation of the same shape."""

    def structure(conversation: list[tuple[str, list[ImageRef]]], system: str) -> list[int | str]:
        segments: list[Segment] = []
        for number, (text, pictures) in enumerate(conversation):
            segments += chat.turn(number, pictures, text, system)
            segments.append(Answer((9,)))
        found: list[int | str] = []
        for unit in tokenizer.units(segments):
            if isinstance(unit, TokenRun):
                found += [token for token in unit.ids if token in specials or engine.is_control(token)]
            else:
                found.append(unit.key)
        return found

    try:
        written = structure(plan, system)
    except InputError:  # a text that can't be written without a special token is refused
        return
    assert written == structure([("x", pictures) for _, pictures in plan], "x" if system else system), (plan, system)


@pytest.mark.parametrize("special_type", [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED], ids=["control", "user"])
def test_text_arrives_letter_by_letter(special_type: int, make_llm: Callable[..., Path]) -> None:
    engine = Engine(make_llm(special_type=special_type), n_ctx=64, n_threads=1)
    tokenizer = PromptTokenizer(engine)
    tokenizer.learn(chatml().turn(0, [], "?", "?"))
    source = texts(random.Random(8))
    for _ in range(COUNT // 4):
        text = next(source)
        assert b"".join(map(engine.piece, tokenizer.plain(text))).decode() == text
    engine.close()
