"""The conversation format of a raw GGUF pair: the Jinja template in the language model's file.

The template comes from outside. It is rendered with placeholders in a sandbox under limits, and what people write
never passes through it: the placeholders are replaced by segments afterwards.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llava_edge.errors import InputError, ModelError
from llava_edge.prompt import ImageRef, Scaffold, Segment, UserText

MAX_TEMPLATE = 256 * 1024
MAX_OUTPUT = 1024 * 1024
MAX_STEPS = 100_000

# Private-use characters: no template looks for them.
_QUESTION, _ANSWER, _SYSTEM = "\ue000Q\ue000", "\ue000A\ue000", "\ue000S\ue000"
_PLACEHOLDERS = re.compile(f"({_QUESTION}|{_SYSTEM})")
# Methods of texts that make a long text of a number.
_GROWING = {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"}


class TemplateFormat:
    """The format of a Jinja chat template.

    Parameters
    ----------
    template
        Its source.
    bos, eos
        Texts of the tokens that begin and end a text; ``bos`` is empty if the model wants none.
    marked_images
        Whether the model's own tokens mark a picture; otherwise a line break follows each, as in LLaVA.

    Raises
    ------
    ModelError
        The template is missing, broken or over its limits.
    """

    stop: Sequence[str] = ()

    def __init__(self, template: str | None, *, bos: str = "", eos: str = "", marked_images: bool = False) -> None:
        if not template:
            raise ModelError(
                "the language model's file has no chat template",
                hint="Use a bundle, or a GGUF of an instruction model.",
            )
        if len(template) > MAX_TEMPLATE:
            raise ModelError(f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE} are allowed")
        self.marked_images = marked_images
        self._bos = bos
        self._variables = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True}
        self._sandbox = _Sandbox()
        try:
            self._template = self._sandbox.from_string(template)
        except (TemplateError, RecursionError) as error:
            raise ModelError(f"the chat template is broken: {error}") from None
        # Some templates only take a list of typed parts as content, and some take the blanks off it.
        self._typed = False
        self._typed = not self._shows(_QUESTION)
        self._strips = not self._shows(f"   {_QUESTION}   ")

    def turn(self, number: int, images: Sequence[ImageRef], question: str, system: str | None) -> list[Segment]:
        """See :meth:`llava_edge.prompt.ChatFormat.turn`."""
        text = self._render(self._messages(number, system))
        if number:
            _, _, text = text.rpartition(_ANSWER)
        elif self._bos and not text.startswith(self._bos):
            text = self._bos + text
        return self._segments(text, images, question, system or "")

    def _segments(self, text: str, images: Sequence[ImageRef], question: str, system: str) -> list[Segment]:
        """Replace the placeholders. Pictures stand before the question."""
        shown: list[Segment] = []
        for image in images:
            shown += [image] if self.marked_images else [image, Scaffold("\n")]
        values: dict[str, list[Segment]] = {
            _QUESTION: [*shown, self._user_text(question)],
            _SYSTEM: [self._user_text(system)],
        }
        if text.count(_QUESTION) != 1 or text.count(_SYSTEM) > 1:
            raise ModelError("the chat template does not show the question exactly once")
        segments: list[Segment] = []
        for part in filter(None, _PLACEHOLDERS.split(text)):
            segments += values[part] if part in values else [Scaffold(part)]
        return segments

    def _user_text(self, text: str) -> UserText:
        return UserText(text.strip() if self._strips else text)

    def _messages(self, number: int, system: str | None, question: str = _QUESTION) -> list[dict[str, Any]]:
        messages = [self._message("system", _SYSTEM)] if system else []
        for _ in range(number):
            messages += [self._message("user", "?"), self._message("assistant", _ANSWER)]
        return [*messages, self._message("user", question)]

    def _message(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if self._typed else text}

    def _shows(self, question: str) -> bool:
        try:
            return question in self._render(self._messages(0, None, question))
        except ModelError:
            return False

    def _render(self, messages: list[dict[str, Any]]) -> str:
        self._sandbox.steps = 0
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(messages=messages, **self._variables):
                length += len(piece)
                if length > MAX_OUTPUT:
                    raise ModelError(f"the chat template wrote more than {MAX_OUTPUT} characters")
                pieces.append(piece)
        except _Refused as error:
            raise InputError(f"the model's chat template says: {error}") from None
        except ModelError:
            raise
        except Exception as error:  # a template may fail in every way that an expression can
            raise ModelError(f"the chat template failed: {type(error).__name__}: {error}") from None
        return "".join(pieces)


def render(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """What a chat template from outside writes, in the sandbox. InputError if it fails."""
    try:
        return str(_Sandbox().from_string(template).render(messages=messages, **variables))
    except Exception as error:  # a template may fail in every way that an expression can
        raise InputError(f"the chat template failed: {type(error).__name__}: {error}") from None


class _Refused(Exception):
    """The template called ``raise_exception``."""


class _Generation(Extension):
    """``{% generation %}``, with which transformers marks what an assistant wrote; here its content is all."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the tags, in their place."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with a budget for loops and no way to multiply texts."""

    intercepted_binops = frozenset({"*", "**", "%", "<<"})

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.steps = 0
        self.globals["range"] = self._range
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda pattern: dt.datetime.now().strftime(pattern)
        self.filters["tojson"] = _as_json
        for name in ("center", "format", "indent", "wordwrap"):
            del self.filters[name]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in _GROWING) and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = all(isinstance(value, (int, float)) for value in (left, right))
        if operator == "%" and isinstance(left, int) and numbers:
            return left % right
        if not numbers or operator != "*" or max(abs(left), abs(right)) > 1 << 31:
            raise SecurityError(f"{operator} is only allowed with small numbers")
        return left * right

    def _range(self, *arguments: int) -> range:
        steps = range(*arguments)
        self.steps += len(steps)
        if self.steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} steps")
        return steps


def _refuse(message: str) -> None:
    raise _Refused(message)


def _as_json(value: Any, indent: int | None = None) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)
