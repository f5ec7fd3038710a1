"""Questions about pictures with known answers, and plain texts, that a model's quality is measured on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_edge.errors import InputError

CAPTION_QUESTION = "Write a short caption for this picture."
_ROLES = ("human", "gpt")
_SHORT = 3  # words


@dataclass(frozen=True)
class Sample:
    """A conversation about a picture. ``references`` are all known answers to its first question."""

    name: str
    picture: Path | None
    turns: tuple[tuple[str, str], ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class Data:
    """Samples, or a text; ``sha256`` is that of everything that was read."""

    samples: tuple[Sample, ...]
    text: str | None
    sha256: str
    source: str

    @property
    def captions(self) -> bool:
        """Whether every picture has several captions, so that answers can be scored against them."""
        return len(self.samples) > 1 and all(len(sample.references) > 1 for sample in self.samples)

    @property
    def short(self) -> bool:
        """Whether every answer is so short that only the right words are right."""
        answers = [reference for sample in self.samples for reference in sample.references]
        return bool(answers) and all(len(answer.split()) <= _SHORT for answer in answers)


def read_data(file: Path, images: Path | None, *, split: str = "dev", limit: int | None = None) -> Data:
    """Read samples in LLaVA's JSON, or captions ``{SPLIT: {NAME: [captions]}}``; ``.txt`` is a plain text.

    Raises
    ------
    InputError
        Another format, a picture that isn't there, nothing to measure.
    """
    try:
        content = file.read_bytes()
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"no such file: {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {file}: {error}") from None
    if file.suffix == ".txt":
        return Data((), text, hashlib.sha256(content).hexdigest(), file.name)
    folder = images or file.parent
    try:
        samples = _samples(json.loads(text), folder, split)[:limit]
    except (ValueError, InputError) as error:
        raise InputError(
            f"{file}: {error}", hint="Expected samples in LLaVA's JSON, or {SPLIT: {NAME: [captions]}}."
        ) from None
    if not samples:
        raise InputError(f"{file} has no samples")
    return Data(tuple(samples), None, _hash(samples), file.name)


def _samples(root: Any, folder: Path, split: str) -> list[Sample]:
    if isinstance(root, list):
        return [_llava(entry, number, folder) for number, entry in enumerate(root)]
    if isinstance(root, dict) and isinstance(root.get(split), dict):
        return [_captions(name, texts, folder) for name, texts in sorted(root[split].items())]
    found = ", ".join(map(str, root)) if isinstance(root, dict) else type(root).__name__
    raise InputError(f"no samples and no split {split!r} in it, only {found[:80]}")


def _captions(name: str, texts: Any, folder: Path) -> Sample:
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"the captions of {name!r} are not a list of texts")
    references = tuple(text.strip() for text in texts)
    return Sample(name, _picture(folder, name, name), ((CAPTION_QUESTION, references[0]),), references)


def _llava(entry: Any, number: int, folder: Path) -> Sample:
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise InputError(f"entry {number} has no list 'conversations'")
    name = str(entry.get("id", number))
    said = []
    for place, turn in enumerate(entry["conversations"]):
        wanted = _ROLES[place % 2]
        if not isinstance(turn, dict) or turn.get("from") != wanted or not isinstance(turn.get("value"), str):
            raise InputError(f"sample {name}: turn {place} is not a text from {wanted!r}")
        said.append(turn["value"].replace("<image>", "").strip())
    turns = tuple(zip(said[::2], said[1::2], strict=False))
    if not turns or not all(question and answer for question, answer in turns):
        raise InputError(f"sample {name} has an empty question or answer")
    image = entry.get("image")
    if image is not None and not isinstance(image, str):
        raise InputError(f"sample {name}: image is not a text")
    return Sample(name, _picture(folder, image, name) if image else None, turns, (turns[0][1],))


def _picture(folder: Path, file: str, name: str) -> Path:
    path = folder / file
    if not path.is_file():
        raise InputError(f"the picture of sample {name} is missing: {path}")
    return path


def _hash(samples: list[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.name, sample.turns, sample.references]).encode())
        if sample.picture is not None:
            digest.update(hashlib.sha256(sample.picture.read_bytes()).digest())
    return digest.hexdigest()
