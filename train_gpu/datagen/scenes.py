"""Pictures as symbols: captions, and boxes as ``category: [x1, y1, x2, y2]`` from 0 to 1, for a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_edge.errors import InputError
from llava_edge.train_gpu.samples import read_captions, read_json

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """What is known of one picture."""

    image: str
    captions: tuple[str, ...]
    objects: tuple[tuple[str, Box], ...] = field(default=())

    def text(self, *, boxes: bool) -> str:
        """The symbols as the language model reads them."""
        lines = [caption.strip() for caption in self.captions]
        if boxes and self.objects:
            lines.append("")
            lines += [f"{name}: [{', '.join(f'{edge:.3f}' for edge in box)}]" for name, box in self.objects]
        return "\n".join(lines)


def read_scenes(captions: Path, boxes: Path | None, split: str) -> list[Scene]:
    """Scenes from a file of captions, or of both, with boxes from a second file.

    ``captions`` is Flickr8k's (JSON by split, or its lines), COCO's captions, or JSON lines that hold ``image``,
    ``captions`` and ``instances``. ``boxes`` is COCO's instances, or such JSON lines.
    """
    scenes = _from_lines(captions) if captions.suffix == ".jsonl" else _from_captions(captions, split)
    if boxes is not None:
        found = _boxes_of(boxes)
        missing = [scene.image for scene in scenes if scene.image not in found]
        if len(missing) == len(scenes):
            raise InputError(f"{boxes} has boxes of no picture that {captions} names, {missing[0]} among them")
        scenes = [Scene(s.image, s.captions, found.get(s.image, s.objects)) for s in scenes]
    if not scenes:
        raise InputError(f"{captions} has no captions")
    return scenes


def _from_captions(path: Path, split: str) -> list[Scene]:
    by_picture: dict[str, list[str]] = {}
    for name, _, caption in read_captions(path, split):
        by_picture.setdefault(name, []).append(caption)
    return [Scene(name, tuple(captions)) for name, captions in by_picture.items()]


def _from_lines(path: Path) -> list[Scene]:
    scenes = []
    for number, item in enumerate(read_json(path), start=1):
        try:
            scenes.append(Scene(item["image"], tuple(map(str, item["captions"])), _instances(item)))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: expected image, captions and instances: {error!r}") from None
    return scenes


def _instances(item: dict[str, Any]) -> tuple[tuple[str, Box], ...]:
    return tuple((str(i["category"]), _box(i["bbox"])) for i in item.get("instances", ()))


def _box(values: Sequence[float]) -> Box:
    left, top, right, bottom = map(float, values)
    if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
        raise ValueError(f"a box is {list(values)}; expected x1, y1, x2, y2 from 0 to 1")
    return left, top, right, bottom


def _boxes_of(path: Path) -> dict[str, tuple[tuple[str, Box], ...]]:
    if path.suffix == ".jsonl":
        return {scene.image: scene.objects for scene in _from_lines(path)}
    values = read_json(path)
    found: dict[str, list[tuple[str, Box]]] = {}
    try:
        names = {category["id"]: category["name"] for category in values["categories"]}
        images = {image["id"]: image for image in values["images"]}
        for note in values["annotations"]:
            image = images[note["image_id"]]
            wide, high = image["width"], image["height"]
            x, y, w, h = note["bbox"]  # COCO: pixels, corner and size
            box = _box([max(0.0, x / wide), max(0.0, y / high), min(1.0, (x + w) / wide), min(1.0, (y + h) / high)])
            found.setdefault(image["file_name"], []).append((names[note["category_id"]], box))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a file of COCO instances: {error!r} is missing or wrong") from None
    return {name: tuple(objects) for name, objects in found.items()}
