"""Files of samples into :class:`Sample`: LLaVA JSON, captions, tar shards, or one file with several sources.

A caption becomes a sample of stage 1: a request for a brief description, drawn by the sample's own name, and the
caption as the answer.
"""

from __future__ import annotations

import json
import logging
import random
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.train_gpu.datagen.symbols import BRIEF
from llava_edge.train_gpu.prompts import IMAGE

if TYPE_CHECKING:
    from llava_edge.train_gpu.config import DataConfig, SourceConfig

log = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class PictureRef:
    """Where a picture's bytes are: a file, or a part of a tar file when ``size_bytes`` is above 0."""

    name: str
    path: Path
    offset: int = 0
    size_bytes: int = 0


@dataclass(frozen=True)
class Sample:
    """Questions and answers, and the pictures that stand where the questions have ``<image>``."""

    id: str
    turns: tuple[tuple[str, str], ...]
    pictures: tuple[PictureRef, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A picture, by its name, the question to it, with ``<image>``, and people's captions."""

    picture: str
    question: str
    references: tuple[str, ...]


class Skipped:
    """Samples that could not be used: an error each, or counted and logged when ``allowed``."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.count = 0

    def add(self, error: LlavaEdgeError) -> None:
        """Raise the error, or count it; the first twenty are shown."""
        if not self.allowed:
            raise error
        self.count += 1
        if self.count <= 20:
            log.warning("skipped: %s", error)


def read_sources(config: DataConfig, skipped: Skipped) -> dict[str, list[Sample]]:
    """All samples of a recipe, by source."""
    if config.samples is not None:
        values = read_json(Path(config.samples))
        if not isinstance(values, dict):
            raise InputError(f"{config.samples} is not an object of samples by source")
        unknown = sorted(set(config.weights) - set(values))
        if unknown:
            raise InputError(f"data.weights names {unknown}; {config.samples} has {sorted(values)}")
        images = pictures_folder(config)
        names = list(config.weights or values)
        sources = {name: _all_llava(_list(values[name], config.samples), images, skipped) for name in names}
    else:
        sources = {name: read_source(source, skipped) for name, source in config.sources.items()}
    for name, samples in sources.items():
        if not samples:
            raise InputError(f"the source {name!r} has no samples")
    return sources


def pictures_folder(config: DataConfig) -> Path:
    """The folder that the pictures of ``data.samples`` are named in."""
    assert config.samples is not None
    return Path(config.images or Path(config.samples).parent)


def read_source(source: SourceConfig, skipped: Skipped) -> list[Sample]:
    """The samples of one source."""
    if source.format == "webdataset":
        return list(_from_shards(source.path, skipped))
    path = Path(source.path)
    images = Path(source.images) if source.images is not None else path.parent
    if source.format == "llava":
        return _all_llava(_list(read_json(path), source.path), images, skipped)
    read = {"flickr8k": _flickr8k, "coco": _coco}[source.format]
    return [
        from_caption(f"{name}#{number}", caption, PictureRef(name, images / name))
        for name, number, caption in read(path, source.split)
    ]


def read_captions(path: Path, split: str) -> Iterator[Caption]:
    """Captions of Flickr8k (JSON by split, or its lines) or of COCO, told apart by what the file holds."""
    values = read_json(path) if path.suffix == ".json" else None
    coco = isinstance(values, dict) and "annotations" in values
    return _coco(path, split) if coco else _flickr8k(path, split)


def _all_llava(items: list[Any], images: Path, skipped: Skipped) -> list[Sample]:
    samples = []
    for item in items:
        try:
            samples.append(from_llava(item, images))
        except InputError as error:
            skipped.add(error)
    return samples


def from_llava(item: Any, images: Path) -> Sample:
    """One sample in LLaVA's JSON; turns have to alternate, and pictures to be as many as their marks."""
    name = str(item.get("id", item.get("image", "?"))) if isinstance(item, dict) else "?"
    try:
        listed = item.get("image") or []
        pictures = [listed] if isinstance(listed, str) else list(listed)
        said = [(turn["from"], turn["value"]) for turn in item["conversations"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"sample {name}: not LLaVA JSON: {error!r} in {str(item)[:200]!r}") from None
    for index, (who, text) in enumerate(said):
        if who != ("human", "gpt")[index % 2] or not isinstance(text, str):
            raise InputError(f"sample {name}: turn {index} is from {who!r}; expected human and gpt in turn")
    if not said or len(said) % 2:
        raise InputError(f"sample {name}: {len(said)} turns; expected a question and an answer, once or more")
    turns = tuple((said[i][1], said[i + 1][1]) for i in range(0, len(said), 2))
    refs = tuple(PictureRef(str(p), images / str(p)) for p in pictures)
    return _checked(Sample(name, turns, refs))


def from_caption(name: str, caption: str, picture: PictureRef) -> Sample:
    """A caption as the answer to a request for a brief description, which the sample's name draws."""
    question = random.Random(name).choice(BRIEF)
    return Sample(name, ((f"{IMAGE}\n{question}", caption.strip()),), (picture,))


def _checked(sample: Sample) -> Sample:
    marks = sum(question.count(IMAGE) for question, _ in sample.turns)
    if marks != len(sample.pictures):
        raise InputError(
            f"sample {sample.id}: {len(sample.pictures)} pictures, and {marks} times {IMAGE} in its questions",
            hint="Each picture needs its mark; a sample without a picture has none.",
        )
    return sample


def read_json(path: Path) -> Any:
    """A JSON file, or the list of objects in a file of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except FileNotFoundError:
        raise InputError(f"no such file of samples: {path}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def _list(values: Any, where: str) -> list[Any]:
    if not isinstance(values, list):
        raise InputError(f"{where} does not hold a list of samples")
    return values


Caption = tuple[str, int, str]
"""The picture's file name, the caption's number among the picture's, the caption."""


def _flickr8k(path: Path, split: str) -> Iterator[Caption]:
    """``{SPLIT: {NAME: [captions]}}``, or the lines ``NAME#N<tab>caption`` of Flickr8k.token.txt."""
    if path.suffix != ".json":
        for line in _lines(path):
            name, tab, caption = line.partition("\t")
            picture, _, number = name.partition("#")
            if not tab or not number.isdigit():
                raise InputError(f"{path} has the line {line[:80]!r}; expected 'NAME#NUMBER<tab>caption'")
            yield picture, int(number), caption
        return
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get(split), dict):
        raise InputError(f"{path} has no split {split!r}; expected an object of captions by picture, by split")
    for name, captions in values[split].items():
        yield from ((name, number, caption) for number, caption in enumerate(captions))


def _coco(path: Path, split: str) -> Iterator[Caption]:
    """``captions_*.json`` of COCO: images and annotations, joined by image_id."""
    values = read_json(path)
    try:
        names = {image["id"]: image["file_name"] for image in values["images"]}
        counts: dict[str, int] = {}
        for note in values["annotations"]:
            name = names[note["image_id"]]
            counts[name] = counts.get(name, -1) + 1
            yield name, counts[name], note["caption"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a file of COCO captions: {error!r} is missing or wrong") from None


def _lines(path: Path) -> Iterable[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputError(f"no such file of captions: {path}") from None


def _from_shards(pattern: str, skipped: Skipped) -> Iterator[Sample]:
    """Tar shards in WebDataset's layout: ``KEY.jpg`` beside ``KEY.json`` (LLaVA) or ``KEY.txt`` (a caption).

    Only the headers and the texts are read here; a picture is found later by its place in the file.
    """
    place = Path(pattern)
    paths = sorted(place.parent.glob(place.name))
    if not paths:
        raise InputError(f"no tar file matches {pattern!r}")
    for path in paths:
        try:
            with tarfile.open(path, mode="r:") as tar:
                for group in _groups(tar, path):
                    try:
                        yield _from_group(group, path)
                    except InputError as error:
                        skipped.add(error)
        except tarfile.TarError as error:
            raise InputError(f"{path} is not an uncompressed tar file: {error}") from None


def _groups(tar: tarfile.TarFile, path: Path) -> Iterator[dict[str, Any]]:
    """What lies under one key, in the order of the file."""
    group: dict[str, Any] = {}
    for member in tar:
        if not member.isfile():
            continue
        name = PurePosixPath(member.name)
        key = str(name.parent / name.name.partition(".")[0])
        if group and group["key"] != key:
            yield group
            group = {}
        group["key"] = key
        suffix = name.suffix.lower()
        if suffix in PICTURE_SUFFIXES:
            group["picture"] = PictureRef(f"{path.name}:{member.name}", path, member.offset_data, member.size)
        elif suffix in (".json", ".txt"):
            file = tar.extractfile(member)
            group[suffix] = file.read().decode("utf-8", "replace") if file else ""
    if group:
        yield group


def _from_group(group: dict[str, Any], path: Path) -> Sample:
    name = f"{path.name}:{group['key']}"
    picture: PictureRef | None = group.get("picture")
    if ".json" in group:
        try:
            values = json.loads(group[".json"])
        except json.JSONDecodeError as error:
            raise InputError(f"sample {name}: its .json is broken: {error}") from None
        if isinstance(values, dict) and "conversations" in values:
            sample = from_llava({**values, "id": values.get("id", name), "image": [name] if picture else []}, Path())
            return Sample(sample.id, sample.turns, (picture,) if picture else ())
        group[".txt"] = values.get("caption", "") if isinstance(values, dict) else ""
    if picture is None or not group.get(".txt"):
        raise InputError(f"sample {name}: expected a picture beside a .json with conversations, or a caption")
    return from_caption(name, group[".txt"], picture)


def read_asked(values: Any, source: str, references: str) -> list[Asked]:
    """The pictures of ``source`` with its first question to each, and the answers that ``references`` has of them.

    ``values`` are LLaVA samples by source, as ``data.samples`` of a recipe names them.

    Raises
    ------
    InputError
        There is no such source, it has no picture with two captions, or a question without its picture.
    """
    if not isinstance(values, dict) or not {source, references} <= set(values):
        found = sorted(values) if isinstance(values, dict) else "no sources"
        raise InputError(f"the samples have {found}; expected {source!r} and {references!r}")
    said: dict[str, list[str]] = {}
    for name, _, answer in _first_turns(values[references]):
        said.setdefault(name, []).append(answer)
    questions: dict[str, str] = {}
    for name, question, _ in _first_turns(values[source]):
        questions.setdefault(name, question)
    asked = [
        Asked(name, question, tuple(said[name])) for name, question in questions.items() if len(said.get(name, ())) > 1
    ]
    if not asked:
        raise InputError(f"no picture of {source!r} has two captions or more in {references!r}")
    for one in asked:
        if one.question.count(IMAGE) != 1:
            raise InputError(f"the question {one.question!r} has no single {IMAGE}")
    return asked


def _first_turns(items: Iterable[Any]) -> Iterator[tuple[str, str, str]]:
    """Picture, first question and first answer of each sample that has one picture."""
    for item in items:
        sample = from_llava(item, Path())
        if len(sample.pictures) == 1:
            yield sample.pictures[0].name, *sample.turns[0]
