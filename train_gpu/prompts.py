"""Conversation formats: turns to token ids, with labels on the answers and on what ends them.

The text between two special tokens or pictures is tokenised in one call, as the runtime does, and never parsed for
special tokens where it comes from a sample, so no sample can forge a turn. Which tokens are labelled follows from
where their characters stand; a token that lies across the edge of an answer is an error, never a wrong label.

A SentencePiece vocabulary puts a blank in front of a text's first word. LLaVA was trained with one in front of every
such run of text; transformers has it at the very start of a prompt only, unless the tokenizer says otherwise. What the
tokenizer says is done here, as transformers and the runtime do it, and :func:`blank_before_every_run` makes a tokenizer
say what the original did.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import pre_tokenizers

from llava_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava_edge.train_gpu.samples import Sample

IGNORE = -100
IMAGE = "<image>"
_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_USER, _HUMAN = _SYSTEM.format("user"), _SYSTEM.format("human")


@dataclass(frozen=True)
class ChatText:
    """The text around the turns; ``{eos}`` is the tokenizer's.

    ``opening`` stands once, ``user`` before a question, ``user_suffix`` and ``assistant`` between it and the answer.
    ``lead`` is the blank that an answer begins with and ``stop`` what ends it: both are labelled. ``between`` parts
    two turns. ``bos`` puts the token that the tokenizer begins every text with in front. ``questions`` False leaves
    out all of a question but its picture. ``system`` and ``default_system`` are how the runtime writes the opening.
    """

    user: str
    assistant: str
    stop: str
    user_suffix: str = ""
    opening: str = ""
    lead: str = ""
    between: str = ""
    bos: bool = True
    questions: bool = True
    system: str = ""
    default_system: str | None = None


FORMATS = {
    "plain": ChatText(user="", assistant="", stop="\n", questions=False),
    "v1": ChatText(
        opening=f"{_HUMAN} ###", user=" Human: ", user_suffix=" ### ", assistant="Assistant:", lead=" ", stop=" ###",
        system="{system} ###", default_system=_HUMAN,
    ),
    "llava_v1": ChatText(
        opening=f"{_HUMAN} ", user="USER: ", user_suffix=" ", assistant="ASSISTANT:", lead=" ", stop="{eos}",
        system="{system} ", default_system=_HUMAN,
    ),
    "vicuna_v1": ChatText(
        opening=f"{_USER} ", user="USER: ", user_suffix=" ", assistant="ASSISTANT:", lead=" ", stop="{eos}",
        system="{system} ", default_system=_USER,
    ),
    "mistral_instruct": ChatText(user="[INST] ", user_suffix=" ", assistant="[/INST]", lead=" ", stop="{eos}"),
    "chatml": ChatText(
        user="<|im_start|>user\n", user_suffix="<|im_end|>\n", assistant="<|im_start|>assistant\n", stop="<|im_end|>",
        between="\n", bos=False, system="<|im_start|>system\n{system}<|im_end|>\n",
    ),
    "chatml_direct": ChatText(
        opening="<|im_start|>system\nAnswer the questions.<|im_end|>", user="<|im_start|>user\n",
        user_suffix="<|im_end|>", assistant="<|im_start|>assistant\n", stop="<|im_end|>", bos=False,
        system="<|im_start|>system\n{system}<|im_end|>", default_system="Answer the questions.",
    ),
}  # fmt: skip
"""The formats of ``data.format``, with the blanks and line breaks that the released models were trained on."""


@dataclass(frozen=True)
class Tokens:
    """Ids and labels of the same length; one ``image_token`` stands for each picture.

    ``weight`` is what the loss of the labels is multiplied by.
    """

    ids: list[int]
    labels: list[int]
    weight: float = 1.0


@dataclass(frozen=True)
class _Piece:
    """Text of one kind. ``answer`` numbers the answer that it belongs to, 0 is none."""

    text: str
    scaffold: bool
    answer: int = 0


class Renderer:
    """Writes samples in one format with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, image_token: int) -> None:
        if not tokenizer.is_fast:
            raise InputError("the tokenizer has no fast form, which tells where each token's characters stand")
        self.tokenizer = tokenizer
        # For text behind other tokens; a call for it alone would take its first word for the prompt's.
        self._inside = tokenizer
        if blank_opens(tokenizer):
            self._inside = copy.deepcopy(tokenizer)
            _set_blank(self._inside, "never")
        self.image_token = image_token
        self.text = FORMATS[name]
        self._bos = _first_token(tokenizer) if self.text.bos else []
        if "{eos}" in self.text.stop and not tokenizer.eos_token:
            raise InputError(f"the format {name} ends answers with the tokenizer's eos_token, and it has none")
        self.stop = self.text.stop.replace("{eos}", tokenizer.eos_token or "")
        self._added: dict[str, int] = dict(tokenizer.get_added_vocab())
        names = sorted(self._added, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None
        for special in re.findall(
            r"<\|\w+\|>", self.text.user + self.text.user_suffix + self.text.assistant + self.stop
        ):
            if special not in names:
                raise InputError(f"the format {name} needs the special token {special}, which the tokenizer lacks")

    def render(self, sample: Sample) -> Tokens:
        """Token ids and labels of a sample as it stands, the picture where its questions have ``<image>``."""
        for number, (_, answer) in enumerate(sample.turns, start=1):
            if not answer.strip():
                raise InputError(f"sample {sample.id}: answer {number} is empty")
        tokens = Tokens(list(self._bos), [IGNORE] * len(self._bos))
        run: list[_Piece] = []
        for piece in self._pieces(sample):
            for text in self._cut(piece):
                if isinstance(text, int):
                    self._flush(sample, run, tokens)
                    run = []
                    tokens.ids.append(text)
                    tokens.labels.append(text if piece.answer else IGNORE)
                elif text:
                    run.append(_Piece(text, piece.scaffold, piece.answer))
        self._flush(sample, run, tokens)
        return tokens

    def prompt(self, sample: Sample) -> list[int]:
        """Token ids up to the first answer, with which the model is asked."""
        tokens = self.render(sample)
        return tokens.ids[: next(i for i, label in enumerate(tokens.labels) if label != IGNORE)]

    def _pieces(self, sample: Sample) -> list[_Piece]:
        text = self.text
        pieces = [_Piece(text.opening, True)]
        for number, (question, answer) in enumerate(sample.turns, start=1):
            if not self.text.questions:
                question = IMAGE * question.count(IMAGE)
            pieces += [_Piece(text.between, True)] if number > 1 else []
            pieces += [_Piece(text.user, True), _Piece(question, False)]
            pieces += [_Piece(text.user_suffix + text.assistant, True)]
            pieces += [_Piece(text.lead + answer, False, number), _Piece(self.stop, True, number)]
        return pieces

    def _cut(self, piece: _Piece) -> list[str | int]:
        """Plain text, special tokens (of the scaffold) and pictures (of questions), in order."""
        if piece.answer and not piece.scaffold:
            return [piece.text]
        if not piece.scaffold:
            parts = piece.text.split(IMAGE)
            cut: list[str | int] = [parts[0]]
            for part in parts[1:]:
                cut += [self.image_token, part]
            return cut
        if self._special is None:
            return [piece.text]
        return [self._added.get(part, part) for part in self._special.split(piece.text)]

    def _flush(self, sample: Sample, run: list[_Piece], tokens: Tokens) -> None:
        """Tokenise adjoining plain text in one call and label what belongs to answers."""
        if not run:
            return
        text = "".join(piece.text for piece in run)
        tokenizer = self._inside if len(tokens.ids) > len(self._bos) else self.tokenizer
        coded: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        ids: list[int] = coded["input_ids"]
        answers = [piece.answer for piece in run for _ in piece.text]  # one a character
        for index, (token, (start, end)) in enumerate(zip(ids, coded["offset_mapping"], strict=True)):
            if token == self.image_token:
                raise InputError(f"sample {sample.id}: its text holds the token that stands for pictures")
            kinds = {answer > 0 for answer in answers[start:end]}
            if len(kinds) > 1:
                around = self.tokenizer.convert_ids_to_tokens(ids[max(0, index - 5) : index + 6])
                raise InputError(
                    f"sample {sample.id}: labels and tokens don't match: the token {text[start:end]!r} lies across "
                    f"the edge of an answer; the tokens around it: {around}",
                    hint="Look at the sample's text there, or leave it out with data.skip_bad.",
                )
            tokens.ids.append(token)
            labelled = kinds == {True} or (not kinds and start < len(answers) and answers[start] > 0)
            tokens.labels.append(token if labelled else IGNORE)


def _first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer itself puts before every text, if it does."""
    ids: list[int] = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def blank_opens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a blank before the very first word of a prompt, and before no other run of text."""
    split = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    return isinstance(split, pre_tokenizers.Metaspace) and split.prepend_scheme == "first"


def blank_before_every_run(tokenizer: PreTrainedTokenizerBase) -> None:
    """Change such a tokenizer to what LLaVA and the language models below it were trained with."""
    if blank_opens(tokenizer):
        _set_blank(tokenizer, "always")
        if hasattr(tokenizer, "legacy"):  # transformers makes LLaMA's anew by this, whatever tokenizer.json says
            tokenizer.legacy = True


def _set_blank(tokenizer: Any, scheme: str) -> None:
    backend = tokenizer.backend_tokenizer
    split = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split.replacement, prepend_scheme=scheme, split=split.split)
