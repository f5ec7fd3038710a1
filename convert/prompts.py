"""Conversation formats: those of the original LLaVA by name, and those that a checkpoint's chat template writes.

Whitespace matters: models answer visibly worse with other blanks than they were trained with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.bundle import PromptFormat
from llava_edge.convert.tokenizer import SpaceRule, load_tokenizer, space_rule
from llava_edge.convert.weights import read_json
from llava_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASSISTANT_LINE = "The assistant gives helpful, detailed, and polite answers to the"
_VISION_LINE = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# Private-use characters: no template looks for them.
_IMAGE, _QUESTION, _SECOND, _ANSWER, _SYSTEM = (f"\ue000{letter}\ue000" for letter in "IQ2AS")


def _roles(bos: str, eos: str, person: str) -> PromptFormat:
    """LLaVA's dialogue; the system text calls the person by another name in ``llava_v1``, the roles stay."""
    article = f"A chat between a curious {person} and an artificial intelligence assistant. "
    return PromptFormat(
        bos=bos,
        system="{system} ",
        default_system=f"{article}{_ASSISTANT_LINE} {person}'s questions.",
        user_prefix="USER: ",
        user_suffix=" ",
        assistant_prefix="ASSISTANT:",
        turn_end=eos,
        stop=(eos,),
        image_suffix="\n",
    )


def _instruct(bos: str, eos: str) -> PromptFormat:
    return PromptFormat(bos, "", None, "[INST] ", " ", "[/INST]", eos, (eos,), "\n")


def _chatml(bos: str, eos: str, default: str | None, line_end: str) -> PromptFormat:
    return PromptFormat(
        bos=bos,
        system=f"<|im_start|>system\n{{system}}<|im_end|>{line_end}",
        default_system=default,
        user_prefix="<|im_start|>user\n",
        user_suffix=f"<|im_end|>{line_end}",
        assistant_prefix="<|im_start|>assistant\n",
        turn_end=f"<|im_end|>{line_end}",
        stop=("<|im_end|>",),
        image_suffix="\n",
    )


def _llama3(bos: str, eos: str) -> PromptFormat:
    def role(name: str) -> str:
        return f"<|start_header_id|>{name}<|end_header_id|>\n\n"

    end = "<|eot_id|>"
    system = f"{role('system')}{{system}}{end}"
    return PromptFormat(bos, system, _VISION_LINE, role("user"), end, role("assistant"), end, (end,), "\n")


NAMED: dict[str, Callable[[str, str], PromptFormat]] = {
    "vicuna_v1": lambda bos, eos: _roles(bos, eos, "user"),
    "llava_v1": lambda bos, eos: _roles(bos, eos, "human"),
    "mistral_instruct": _instruct,
    "chatml": lambda bos, eos: _chatml("", eos, "You are a helpful assistant.", "\n"),
    "chatml_direct": lambda bos, eos: _chatml(bos, eos, "Answer the questions.", ""),
    "llama-3": _llama3,
    "plain": lambda bos, eos: PromptFormat(bos, "", None, "", "", "", "\n", ("\n",), ""),
}


def find_prompt(
    directory: Path, name: str | None, *, otherwise: str | None = None, split_calls: bool = False
) -> tuple[PromptFormat, str]:
    """The conversation format of a checkpoint, and a sentence that says where it comes from.

    ``name`` is one of ``NAMED`` and wins; then comes the checkpoint's chat template, then ``otherwise``.
    ``split_calls`` is the original code, which has formats of its own.
    """
    tokenizer = load_tokenizer(directory)
    if name is not None and name not in NAMED:
        raise InputError(f"the prompt format is {name!r}; expected one of {', '.join(NAMED)}")
    # The original code writes its own formats; a template beside it is that of the language model alone.
    template = None if split_calls else chat_template(directory)
    if name is None and template is not None:
        try:
            return from_template(template, tokenizer), "conversation format: the checkpoint's chat template"
        except InputError as error:
            if otherwise is None:
                raise InputError(
                    f"{directory}: {error}", hint=f"Name a format with --prompt: {', '.join(NAMED)}."
                ) from None
    chosen = name or otherwise
    if chosen is None:
        raise InputError(
            f"{directory} has neither a llava_edge.json nor a chat template, so its conversation format is unknown",
            hint=f"Name it with --prompt: {', '.join(NAMED)}.",
        )
    rule = space_rule(tokenizer)
    return _with_opening(NAMED[chosen](*_ends(tokenizer)), tokenizer, rule), f"conversation format: {chosen}"


def chat_template(directory: Path) -> str | None:
    """The Jinja source in a checkpoint's directory, from any of the files where it may stand."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            found = read_json(directory / name).get("chat_template")
            if isinstance(found, str):
                return found
    return None


def from_template(template: str, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Take a chat template apart into the pieces of a format. InputError if it is no plain sequence of turns."""
    from llava_edge.chat_template import render

    bos, eos = _ends(tokenizer)

    def text(*messages: tuple[str, str], answer: bool = False) -> str:
        listed = [{"role": role, "content": _content(content)} for role, content in messages]
        return render(template, listed, bos_token=bos, eos_token=eos, add_generation_prompt=answer)

    first = ("user", _IMAGE + _QUESTION)
    asked = text(first, answer=True)
    opening, image_suffix, _ = _cut(asked, "<image>", _QUESTION)
    user_suffix = text(first).partition(_QUESTION)[2]
    assistant_prefix = _without(asked.partition(_QUESTION)[2], user_suffix)
    turn_end = text(first, ("assistant", _ANSWER)).partition(_ANSWER)[2]
    between, _, _ = _cut(text(first, ("assistant", _ANSWER), ("user", _SECOND)).partition(_ANSWER)[2], _SECOND)
    user_prefix, text_prefix = _divided(_without(between, turn_end), opening)
    begin, system, default = _opening(text, first, opening, user_prefix, bos)
    stop = {eos} | ({turn_end.strip()} if turn_end.strip() in tokenizer.all_special_tokens else set())
    prompt = PromptFormat(
        begin, system, default, user_prefix, user_suffix, assistant_prefix, turn_end, tuple(sorted(stop)),
        image_suffix, text_prefix,
    )  # fmt: skip
    shown = prompt.system.replace("{system}", default) if default else ""
    again = prompt.bos + shown + user_prefix + "<image>" + image_suffix + _QUESTION + user_suffix + assistant_prefix
    if again.removeprefix(bos) != asked.removeprefix(bos):
        raise InputError("the chat template is no plain sequence of turns")
    return _with_opening(prompt, tokenizer, space_rule(tokenizer), given=bool(bos) and asked.startswith(bos))


def _opening(
    text: Callable[..., str], first: tuple[str, str], opening: str, user_prefix: str, bos: str
) -> tuple[str, str, str | None]:
    """What begins a conversation, the system message's place, and the one that stands there by itself."""
    begin = bos if bos and opening.startswith(bos) else ""
    alone = opening.removeprefix(begin).removesuffix(user_prefix)
    try:
        told = text(("system", _SYSTEM), first, answer=True).partition("<image>")[0]
    except InputError:  # a template may refuse system messages
        told = ""
    if _SYSTEM not in told:
        return begin + alone, "", None
    before, _, after = told.removeprefix(begin).removesuffix(user_prefix).partition(_SYSTEM)
    if not alone:
        return begin, f"{before}{{system}}{after}", None
    if not (alone.startswith(before) and alone.endswith(after)):
        raise InputError("the chat template writes its own system message in another form")
    return begin, f"{before}{{system}}{after}", alone[len(before) : len(alone) - len(after)]


def _divided(prefix: str, opening: str) -> tuple[str, str]:
    """What begins every turn, and the blanks that come after it where no picture does (LLaVA-OneVision's)."""
    for end in range(len(prefix), 0, -1):
        if opening.endswith(prefix[:end]) and not prefix[end:].strip():
            return prefix[:end], prefix[end:]
    if prefix:
        raise InputError("the chat template begins a turn in two ways")
    return "", ""


def _content(text: str) -> list[dict[str, Any]] | str:
    parts: list[dict[str, Any]] = [{"type": "image"}] if text.startswith(_IMAGE) else []
    return [*parts, {"type": "text", "text": text.removeprefix(_IMAGE)}]


def _cut(text: str, *marks: str) -> tuple[str, str, str]:
    """Text before the first mark, between the marks, and after the last."""
    if any(text.count(mark) != 1 for mark in marks):
        raise InputError("the chat template does not show the picture and the question once each")
    before, _, rest = text.partition(marks[0])
    between, _, after = rest.partition(marks[-1]) if len(marks) > 1 else ("", "", rest)
    return before, between, after


def _without(text: str, start: str) -> str:
    if not text.startswith(start):
        raise InputError("the chat template ends a turn in two ways")
    return text[len(start) :]


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    return tokenizer.bos_token or "", tokenizer.eos_token or ""


def _with_opening(
    prompt: PromptFormat, tokenizer: PreTrainedTokenizerBase, rule: SpaceRule, *, given: bool = False
) -> PromptFormat:
    """Begin with the token that the tokenizer puts in front, and with the blank before the very first word.

    ``given`` says that the format writes the token itself; text after it is then not the first.
    """
    begin = prompt.bos
    if rule.adds_bos and not begin.startswith(tokenizer.bos_token or ""):
        begin = (tokenizer.bos_token or "") + begin
    elif not rule.adds_bos and not given:
        begin = begin.removeprefix(tokenizer.bos_token or "")
    if rule.opening and not given and begin in ("", tokenizer.bos_token):
        begin += " "
    fields = {name: getattr(prompt, name) for name in PromptFormat.__dataclass_fields__}
    return PromptFormat(**{**fields, "bos": begin})


def jinja_source(prompt: PromptFormat, *, bos_added: bool) -> str:
    """The format as a Jinja template, for programs that read only the GGUF.

    ``bos_added`` leaves the first token to the program, which puts it in front of every prompt.
    """
    before, _, after = prompt.system.partition("{system}")
    system = f"{_literal(before)} + message['content'] + {_literal(after)}"
    text = _literal(prompt.text_prefix)  # the programs' markers of pictures are <__media__> and <__media_RANDOM__>
    opening = f"('' if '<__media' in message['content'] else {text}) + " if prompt.text_prefix else ""
    user = f"{_literal(prompt.user_prefix)} + {opening}message['content'] + {_literal(prompt.user_suffix)}"
    assistant = f"{_literal(prompt.assistant_prefix)} + message['content'] + {_literal(prompt.turn_end)}"
    start = f"{{{{ {_literal(prompt.bos)} }}}}" if prompt.bos and not bos_added else ""
    if prompt.default_system is not None:
        default = _literal(prompt.system.replace("{system}", prompt.default_system))
        start += f"{{% if messages[0]['role'] != 'system' %}}{{{{ {default} }}}}{{% endif %}}"
    return (
        f"{start}{{% for message in messages %}}"
        f"{{% if message['role'] == 'system' %}}{{{{ {system} }}}}"
        f"{{% elif message['role'] == 'user' %}}{{{{ {user} }}}}"
        f"{{% else %}}{{{{ {assistant} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {_literal(prompt.assistant_prefix)} }}}}{{% endif %}}"
    )


def _literal(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
