"""What a chat completion request asks for, checked field by field."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from llava_edge.errors import InputError
from llava_edge.server.errors import ApiError
from llava_edge.types import SamplingParams

DEFAULT_MAX_TOKENS = 256
MAX_IMAGES = 16
MAX_MESSAGES = 1024
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
DETAILS = ("auto", "low", "high")

# Fields of the protocol that change nothing here.
_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
# Fields that are understood only with the value that means "off".
_OFF: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}
_KNOWN = frozenset(
    {
        *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p"),
        *("seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "response_format", "image_tokens"),
    }
)


@dataclass(frozen=True)
class ImageInput:
    """A picture as it stands in a message: a data URI or an address, and how closely to look."""

    url: str
    detail: str = "auto"


@dataclass(frozen=True)
class Turn:
    """A question with its pictures, and the answer if it was given."""

    question: str
    images: tuple[ImageInput, ...] = ()
    answer: str | None = None


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion request. ``top_logprobs`` None is without them; ``schema`` is what the answer must match.

    ``max_tokens`` 0 asks for no answer: the conversation is read up to its last picture, for a question to come.
    """

    system: str | None
    turns: tuple[Turn, ...]
    model: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    schema: dict[str, Any] | None = None
    image_tokens: int | None = None


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_not_a_number)
    except UnicodeDecodeError:
        raise ApiError(400, "The body is not UTF-8.", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:
        where = f": line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"The body is not valid JSON{where}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The body is {_kind(value)}; expected an object.", code="invalid_json")
    return value


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """Read a request. ApiError names the field that is wrong, and what was expected."""
    for name in body:
        if name not in _KNOWN and name not in _IGNORED and name not in _OFF:
            raise _bad(_short(name), "is not known to this server", code="unknown_parameter")
    for name, values in _OFF.items():
        if body.get(name) not in values:
            raise _bad(name, "is not supported by this server", code="unsupported_parameter")
    system, turns = _conversation(body)
    max_tokens = _max_tokens(body)
    if not (max_tokens or any(turn.images for turn in turns)):
        raise _bad("max_tokens", "is 0, which reads pictures ahead; there are none in the messages")
    stream = _boolean(body, "stream")
    return ChatRequest(
        system=system,
        turns=turns,
        model=_text(body, "model"),
        sampling=_sampling(body),
        max_tokens=max_tokens,
        stop=_stops(body),
        stream=stream,
        include_usage=stream and _include_usage(body),
        top_logprobs=_logprobs(body),
        schema=_schema(body),
        image_tokens=_integer(body, "image_tokens", 1, 1 << 16),
    )


# Messages


def _conversation(body: dict[str, Any]) -> tuple[str | None, tuple[Turn, ...]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", "has to be a list with at least one message")
    if len(messages) > MAX_MESSAGES:
        raise _bad("messages", f"has {len(messages)} messages; at most {MAX_MESSAGES} are allowed")
    system: list[str] = []
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _bad(where, f"is {_kind(message)}; expected an object")
        role = message.get("role")
        text, images = _content(message, where)
        if images and role != "user":
            raise _bad(f"{where}.content", "has a picture; only messages of the user may")
        if role in ("system", "developer"):
            if turns:
                raise _bad(where, "is a system message after others; it has to come first")
            system.append(text)
        elif role == "user":
            _add_question(turns, text, images)
        elif role == "assistant":
            _add_answer(turns, text, message, where)
        else:
            raise _bad(f"{where}.role", "has to be system, developer, user or assistant")
    if not turns or turns[-1].answer is not None:
        raise _bad("messages", "has to end with a message of the user")
    if sum(len(turn.images) for turn in turns) > MAX_IMAGES:
        raise _bad("messages", f"has more than {MAX_IMAGES} pictures")
    if not (turns[-1].question.strip() or turns[-1].images):
        raise _bad("messages", "ends with an empty question")
    return "\n".join(system) if system else None, tuple(turns)


def _add_question(turns: list[Turn], text: str, images: tuple[ImageInput, ...]) -> None:
    """Messages of the user in a row are one question."""
    if turns and turns[-1].answer is None:
        last = turns.pop()
        text, images = f"{last.question}\n{text}" if last.question else text, (*last.images, *images)
    turns.append(Turn(text, images))


def _add_answer(turns: list[Turn], text: str, message: dict[str, Any], where: str) -> None:
    if message.get("tool_calls"):
        raise _bad(f"{where}.tool_calls", "is not supported by this server", code="unsupported_parameter")
    if not turns or turns[-1].answer is not None:
        raise _bad(where, "is an answer without a question before it")
    last = turns.pop()
    turns.append(Turn(last.question, last.images, text))


def _content(message: dict[str, Any], where: str) -> tuple[str, tuple[ImageInput, ...]]:
    content = message.get("content")
    if isinstance(content, str):
        return _checked(content, f"{where}.content"), ()
    if content is None and message.get("role") == "assistant":
        return "", ()
    if not isinstance(content, list):
        raise _bad(f"{where}.content", f"is {_kind(content)}; expected a text or a list of parts")
    texts: list[str] = []
    images: list[ImageInput] = []
    for number, part in enumerate(content):
        place = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(_checked(part["text"], f"{place}.text"))
        elif kind == "image_url":
            images.append(_image(part.get("image_url"), f"{place}.image_url"))
        else:
            raise _bad(place, 'has to be {"type": "text", "text": …} or {"type": "image_url", "image_url": …}')
    return "\n".join(texts), tuple(images)


def _image(value: Any, where: str) -> ImageInput:
    url = value.get("url") if isinstance(value, dict) else value
    detail = value.get("detail") if isinstance(value, dict) else None
    if not isinstance(url, str) or not url:
        raise _bad(f"{where}.url", "has to be a text")
    if detail not in (None, *DETAILS):
        raise _bad(f"{where}.detail", f"has to be one of {', '.join(DETAILS)}")
    return ImageInput(url, detail or "auto")


# Options


def _sampling(body: dict[str, Any]) -> SamplingParams:
    default = SamplingParams()
    values = {
        "temperature": _number(body, "temperature", 0, 100),
        "top_p": _number(body, "top_p", 0, 1),
        "min_p": _number(body, "min_p", 0, 1),
        "top_k": _integer(body, "top_k", 0, 1 << 31),
        "seed": _integer(body, "seed", -(1 << 63), (1 << 64) - 1),
    }
    if values["seed"] is not None:
        values["seed"] = int(values["seed"]) % (1 << 32)
    try:
        return SamplingParams(
            **{name: getattr(default, name) if value is None else value for name, value in values.items()}  # type: ignore[arg-type]
        )
    except InputError as error:
        raise ApiError(400, f"{error}.") from None


def _max_tokens(body: dict[str, Any]) -> int:
    newer = _integer(body, "max_completion_tokens", 0, 1 << 31)
    older = _integer(body, "max_tokens", 0, 1 << 31)
    return next((value for value in (newer, older) if value is not None), DEFAULT_MAX_TOKENS)


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(text, str) and 0 < len(text) <= 256 for text in stops):
        raise _bad("stop", "has to be a text or a list of texts of 1 to 256 characters")
    if len(stops) > MAX_STOPS:
        raise _bad("stop", f"has {len(stops)} texts; at most {MAX_STOPS} are allowed")
    return tuple(_checked(text, "stop") for text in stops)


def _include_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _bad("stream_options", f"is {_kind(options)}; expected an object")
    return _boolean(options, "include_usage")


def _logprobs(body: dict[str, Any]) -> int | None:
    wanted = _boolean(body, "logprobs")
    top = _integer(body, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise _bad("top_logprobs", "needs logprobs: true")
    return (top or 0) if wanted else None


def _schema(body: dict[str, Any]) -> dict[str, Any] | None:
    value = body.get("response_format")
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = value.get("json_schema") if kind == "json_schema" else None
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise _bad("response_format", 'has to be of type text, json_object, or json_schema with {"schema": {…}}')
    return schema


def _number(body: dict[str, Any], name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # NaN is not in between either
        raise _bad(name, f"has to be a number from {low} to {high}")
    return float(value)


def _integer(body: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _bad(name, f"has to be a whole number from {low} to {high}")
    return value


def _boolean(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _bad(name, "has to be true or false")
    return bool(value)


def _text(body: dict[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise _bad(name, f"is {_kind(value)}; expected a text")
    return value


def _checked(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _bad(where, "is not valid Unicode: it has half of a surrogate pair") from None
    return text


def _bad(param: str, problem: str, *, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"'{param}' {problem}.", param=param, code=code)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(name: str) -> str:
    return ascii(name[:64])[1:-1]


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
