"""A prompt is a list of segments, and becomes runs of tokens with pictures between them.

Scaffold is the text around the turns, in which the names of special tokens are parsed. User text never yields a
special token, and pictures are no text at all, so nothing that a person writes can forge a turn or a picture.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from llava_edge.errors import InputError

if TYPE_CHECKING:
    from llava_edge.bundle import PromptFormat


# Names that turns, pictures and ends have in vocabularies that don't mark them as control tokens. Other tokens that are
# made of their names, such as runs of blanks and HTML's tags, are text.
_MARKER = re.compile(
    r"<[|\uff5c].*[|\uff5c]>|</?s>|\[/?[A-Z_]+\]"
    r"|<[^>]*(image|img|vision|video|audio|media|turn|user|assistant|system|eo[st]|bos|pad|unk)[^>]*>",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Scaffold:
    """Text of the conversation's format, special tokens included."""

    text: str


@dataclass(frozen=True)
class UserText:
    """Text from outside. It is taken by the letter."""

    text: str


@dataclass(frozen=True)
class ImageRef:
    """A picture, by the key of its content."""

    key: str


@dataclass(frozen=True)
class Answer:
    """An answer of the model, by the tokens that it chose: tokenising its text again could give others."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class TokenRun:
    """Tokens that are evaluated together."""

    ids: tuple[int, ...]


Segment: TypeAlias = Scaffold | UserText | ImageRef | Answer
Unit: TypeAlias = TokenRun | ImageRef


def up_to_pictures(units: Sequence[Unit]) -> Sequence[Unit]:
    """The units up to the last picture, which don't depend on what is asked about it."""
    return units[: max((number for number, unit in enumerate(units, 1) if isinstance(unit, ImageRef)), default=0)]


class Vocabulary(Protocol):
    """What a prompt needs to know of the language model; :class:`llava_edge.engine.Engine` has it."""

    def tokenize(self, text: str, *, special: bool) -> list[int]: ...
    def token_text(self, token: int) -> str: ...
    def is_control(self, token: int) -> bool: ...
    def is_user_defined(self, token: int) -> bool: ...
    def strips_right(self, token: int) -> bool: ...


class ChatFormat(Protocol):
    """How a conversation is written for a model."""

    @property
    def stop(self) -> Sequence[str]:
        """Texts or special tokens that end an answer, besides those that the vocabulary knows."""
        ...

    def turn(self, number: int, images: Sequence[ImageRef], question: str, system: str | None) -> list[Segment]:
        """What stands between the answer before (nothing, for turn 0) and the answer to this question.

        ``system`` is the conversation's system message and the same in every turn.
        """
        ...


class BundleFormat:
    """The format that a bundle's manifest describes."""

    def __init__(self, prompt: PromptFormat) -> None:
        self._prompt = prompt
        self.stop = prompt.stop

    def turn(self, number: int, images: Sequence[ImageRef], question: str, system: str | None) -> list[Segment]:
        """See :meth:`ChatFormat.turn`."""
        prompt = self._prompt
        segments: list[Segment] = [Scaffold(prompt.turn_end)] if number else self._opening(system)
        segments.append(Scaffold(prompt.user_prefix))
        for image in images:
            segments += [image, Scaffold(prompt.image_suffix)]
        if not images and prompt.text_prefix:
            segments.append(Scaffold(prompt.text_prefix))
        segments += [UserText(question), Scaffold(prompt.user_suffix), Scaffold(prompt.assistant_prefix)]
        return segments

    def _opening(self, system: str | None) -> list[Segment]:
        segments: list[Segment] = [Scaffold(self._prompt.bos)]
        text = self._prompt.default_system if system is None else system
        if text and self._prompt.system:
            before, after = self._prompt.system.split("{system}")
            segments += [Scaffold(before), UserText(text), Scaffold(after)]
        elif text:
            raise InputError("this model's conversation format has no place for a system message")
        return segments


# Names of special tokens that are cut out of one text, each within what the last cut left.
MAX_CUTS = 256


class PromptTokenizer:
    """Turns segments into runs of tokens and pictures.

    Between special tokens and pictures, adjoining scaffold and user text is joined and tokenised in one call: a
    SentencePiece vocabulary would otherwise put a blank in front of each, and give other ids than the reference.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._parsed: dict[str, list[str | int]] = {}
        self._structural: dict[int, bool] = {}

    def learn(self, scaffold: Iterable[Segment]) -> None:
        """Make the special tokens of a format known, so that they are kept out of all user text."""
        for segment in scaffold:
            if isinstance(segment, Scaffold):
                self._parts(segment)

    def units(self, segments: Iterable[Segment]) -> list[Unit]:
        """Runs of tokens with pictures between them. Each token of an answer is a run, as it was when it was made."""
        units: list[Unit] = []
        parts: list[str | int] = []
        for segment in segments:
            if isinstance(segment, (Scaffold, UserText)):
                parts += self._parts(segment)
                continue
            units += self._run(parts)
            parts = []
            units += [TokenRun((t,)) for t in segment.ids] if isinstance(segment, Answer) else [segment]
        return units + self._run(parts)

    def stop_tokens(self, stop: Iterable[str]) -> tuple[set[int], list[str]]:
        """Divide what ends an answer into special tokens and texts."""
        ids: set[int] = set()
        texts: list[str] = []
        for text in stop:
            parts = self._parts(Scaffold(text))
            if len(parts) == 1 and isinstance(parts[0], int):
                ids.add(parts[0])
            else:
                texts.append(text)
        return ids, texts

    def plain(self, text: str) -> list[int]:
        """Tokens of text that is taken by the letter: none of them is a special token."""
        return self._plain(text, 0)

    def _plain(self, text: str, cut: int) -> list[int]:
        if not text:
            return []
        try:
            ids = self._vocabulary.tokenize(text, special=False)
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode: character {error.start + 1} is half a pair") from None
        forged = next((token for token in ids if self._is_structural(token)), None)
        if forged is None:
            return ids
        # The vocabulary makes a special token of its name even in plain text: cut the name in two.
        name = self._vocabulary.token_text(forged)
        cuts = [found.start() + 1 for found in re.finditer(re.escape(name), text)] if len(name) > 1 else []
        if not cuts or cut == MAX_CUTS:
            raise InputError(f"the text can't be written without the special token {name!r}")
        edges = [0, *cuts, len(text)]
        return [token for a, b in itertools.pairwise(edges) for token in self._plain(text[a:b], cut + 1)]

    def _run(self, parts: Iterable[str | int]) -> list[Unit]:
        """One run of special tokens and the joined text between them, or nothing."""
        ids: list[int] = []
        text, strip = "", False
        for part in parts:
            if isinstance(part, str):
                text += part.lstrip() if strip and not text else part
                continue
            ids += [*self.plain(text), part]
            text, strip = "", self._vocabulary.strips_right(part)
        ids += self.plain(text)
        return [TokenRun(tuple(ids))] if ids else []

    def _parts(self, segment: Scaffold | UserText) -> list[str | int]:
        """Plain text and special tokens of a segment, in order."""
        if isinstance(segment, UserText):
            return [segment.text]
        if segment.text not in self._parsed:
            self._parsed[segment.text] = self._parse(segment.text)
        return self._parsed[segment.text]

    def _parse(self, scaffold: str) -> list[str | int]:
        names: dict[str, int] = {}
        for token in self._vocabulary.tokenize(scaffold, special=True):
            name = self._vocabulary.token_text(token)
            special = self._vocabulary.is_control(token) or self._vocabulary.is_user_defined(token)
            # Blanks that are tokens of their own are text, which a person may write too.
            if special and name.strip() and name in scaffold:
                names[name] = token
                self._structural[token] = True
        if not names:
            return [scaffold] if scaffold else []
        longest_first = sorted(names, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", scaffold)
        return [names.get(piece, piece) for piece in pieces if piece]

    def _is_structural(self, token: int) -> bool:
        known = self._structural.get(token)
        if known is None:
            known = self._structural[token] = self._vocabulary.is_control(token) or self._is_marker(token)
        return known

    def _is_marker(self, token: int) -> bool:
        """Whether a token that the vocabulary makes of its name in any text marks turns or pictures."""
        return self._vocabulary.is_user_defined(token) and bool(_MARKER.fullmatch(self._vocabulary.token_text(token)))
