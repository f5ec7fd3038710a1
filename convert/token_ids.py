"""Are the token ids of llama.cpp and of the runtime's prompts those of the reference?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_edge.convert.cases import prompt_ids
from llava_edge.convert.checkpoint import DESCRIPTION_NAME
from llava_edge.convert.parity import TokenizerParity
from llava_edge.convert.tokenizer import space_rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from llava_edge.convert.checkpoint import Checkpoint
    from llava_edge.engine import Engine

TEXTS = (
    "What animal is in this picture?",
    "  two  spaces,   three\tand a tab \n\n and lines\r\n",
    "In 1984, 3.14159 x 20,000 = 62831.8; 100% of  42 — №7, ½, ٣, Ⅻ.",
    "I'll say it's they've, we'd, DON'T and “quotes” …",
    "Größe, naïve café, señor, Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย",
    "你好,世界。日本語のテキスト、한국어",
    "👩‍👩‍👧‍👦 🐈‍⬛ 🇨🇭 e\u0301 a\u0308 \u200b \u00a0\u3000end",
    "def f(x):\n\treturn x**2 if x != 0 else None  # code\n<b>html</b> & {json: [1, 2]}",
    "https://example.org/a_b-c?d=e%20f&g=#h user@example.org C:\\path",
    "aAAaAaaaaaaaaaaaaaaaaaaaaa!!!!!!!! ???? ----- ______ ~~~ \x07\x7f",
    "",
    " ",
    "\n",
)


def measure_tokenizer(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, questions: Sequence[str]
) -> TokenizerParity:
    """Compare ids on varied texts, and those of whole prompts with a picture in them."""
    rule = space_rule(tokenizer)
    rows = [(text, engine.tokenize(rule.apply(text), special=False), _ids(tokenizer, text)) for text in TEXTS]
    for question in questions:
        sides = zip(
            prompt_ids(engine, checkpoint.description.prompt, question),
            reference_prompt(tokenizer, checkpoint, question),
            strict=True,
        )
        rows += [(question, found, expected) for found, expected in sides]
    different = [f"{text!r} gives {found}, expected {ids}" for text, found, ids in rows if found != ids]
    return TokenizerParity(len(rows), len(rows) - len(different), different[0] if different else None)


def reference_prompt(
    tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, question: str
) -> tuple[list[int], list[int]]:
    """The same ids by the reference's way: one call with a marker in the text, or a call for each side of it."""
    prompt = checkpoint.description.prompt
    rule = space_rule(tokenizer)
    system = prompt.system.replace("{system}", prompt.default_system) if prompt.default_system else ""
    # The blank that opens a prompt is the tokenizer's own when the text stands at the start of a call.
    begin = prompt.bos.removesuffix(" ") if rule.opening else prompt.bos
    first = (begin, system + prompt.user_prefix)
    opened = begin != prompt.bos or (rule.opening and _trained_here(checkpoint) and _begins_plain(tokenizer, first[1]))
    rest = prompt.image_suffix + question + prompt.user_suffix + prompt.assistant_prefix
    marker = _marker(tokenizer)
    if checkpoint.split_calls or marker is None:
        return _ids(tokenizer, begin) + _ids(tokenizer, first[1]), _ids(tokenizer, rest)
    if opened:
        ids = _ids(tokenizer, begin) + _ids(tokenizer, first[1] + marker + rest)
    else:
        ids = _ids(tokenizer, begin + first[1] + marker + rest)
    at = ids.index(tokenizer.convert_tokens_to_ids(marker))
    return ids[:at], ids[at + 1 :]


def _trained_here(checkpoint: Checkpoint) -> bool:
    """Then prompts were written as transformers reads them, whatever the description says of the first blank."""
    return (checkpoint.directory / DESCRIPTION_NAME).is_file()


def _begins_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return bool(text) and not text.startswith(tuple(tokenizer.get_added_vocab()))


def _marker(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token that stands for the picture, if there is one besides those that end or begin a text."""
    return "<image>" if "<image>" in tokenizer.get_added_vocab() else None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
