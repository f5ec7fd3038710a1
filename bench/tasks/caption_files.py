"""Files of captions in the formats in which they are published."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from llava_edge.bench.tasks.reading import Data, identifier, listed
from llava_edge.errors import InputError
from llava_edge.strict_json import Fields

Captions = dict[str, tuple[Path, tuple[str, ...]]]
"""Name of a picture -> its path and its captions."""

_NAMES = ("*captions*.json", "dataset_*.json", "captions.txt", "Flickr8k.token.txt", "*.token*")
_FORMATS = (
    "COCO (images, annotations), Karpathy's splits (images with sentences), {SPLIT: {NAME: [captions]}}, "
    "or lines NAME#0<tab>caption or NAME,caption"
)


def read_captions(data: Data, file: Path | None, split: str) -> Captions:
    """Captions by picture; the format is told by the content."""
    path = file or data.require(*_NAMES)
    pairs = _from_json(data, path, split) if path.suffix == ".json" else _from_lines(data, path, split)
    texts: dict[str, list[str]] = {}
    for name, caption in pairs:
        texts.setdefault(name, []).append(caption)
    folders = (split, "Images", "Flicker8k_Dataset", "val2014", "val2017", "train2014", "train2017")
    found = data.each(path, [(name, name) for name in texts], lambda name: (name, data.picture(name, *folders)))
    return {name: (picture, tuple(texts[name])) for name, picture in found}


def _from_json(data: Data, path: Path, split: str) -> list[tuple[str, str]]:
    root = data.object(path).raw()
    if isinstance(root.get("annotations"), list) and isinstance(root.get("images"), list):
        return _coco(data, path, root)
    if isinstance(root.get("images"), list):
        groups = data.entries(path, listed(root["images"]), lambda entry: _karpathy(entry, split))
        return [pair for group in groups for pair in group]
    if isinstance(root.get(split), dict):
        values = [(name, (name, value)) for name, value in root[split].items()]
        return [pair for group in data.each(path, values, _named_texts) for pair in group]
    raise InputError(f"{path} has no captions that can be read for the split {split!r}; expected {_FORMATS}")


def _named_texts(item: tuple[str, Any]) -> list[tuple[str, str]]:
    name, texts = item
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise InputError("expected a list of captions")
    return [(name, text) for text in texts]


def _coco(data: Data, path: Path, root: dict[str, Any]) -> list[tuple[str, str]]:
    names = dict(
        data.entries(path, listed(root["images"]), lambda entry: (identifier(entry, "id"), entry.text("file_name")))
    )

    def caption(entry: Fields) -> tuple[str, str]:
        image = identifier(entry, "image_id")
        if image not in names:
            raise InputError(f"image_id is {image}, which no entry of images has")
        return names[image], entry.text("caption")

    return data.entries(path, listed(root["annotations"]), caption)


def _karpathy(entry: Fields, split: str) -> list[tuple[str, str]]:
    if entry.text("split") not in (split, {"dev": "val"}.get(split)):
        return []
    return [(entry.text("filename"), sentence.text("raw")) for sentence in entry.objects("sentences")]


def _from_lines(data: Data, path: Path, split: str) -> list[tuple[str, str]]:
    """Flickr8k's own file, or the table that is passed around; a list of names beside it makes a split of it."""
    text = data.text(path)
    if text.startswith("image,caption"):
        rows = list(csv.reader(io.StringIO(text)))[1:]
        pairs = data.each(path, list(enumerate(rows, 2)), _row)
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        pairs = data.each(path, lines, _token_line)
    listing = data.find(f"*{split}Images.txt", f"*.{split}.txt", optional=True)
    if listing is None:
        return pairs
    wanted = set(data.text(listing).split())
    return [(name, caption) for name, caption in pairs if name in wanted]


def _row(row: list[str]) -> tuple[str, str]:
    if len(row) != 2:
        raise InputError(f"has {len(row)} columns; expected the picture's name and a caption")
    return row[0], row[1]


def _token_line(line: str) -> tuple[str, str]:
    name, tab, caption = line.partition("\t")
    name, hash_sign, _ = name.rpartition("#")
    if not (tab and hash_sign):
        raise InputError("expected NAME#NUMBER, a tab and a caption")
    return name, caption
