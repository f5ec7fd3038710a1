"""CHAIR: objects in captions that are not in the picture (Rohrbach et al., EMNLP 2018, arXiv 1809.02156)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from llava_edge.bench.tasks import stats
from llava_edge.bench.tasks.asking import Said
from llava_edge.bench.tasks.coco_objects import coco_objects, read_objects
from llava_edge.bench.tasks.reading import Data, identifier, listed
from llava_edge.bench.tasks.samples import Mark, Record, Sample
from llava_edge.bench.tasks.task import BaseTask, Metrics
from llava_edge.errors import InputError
from llava_edge.strict_json import Fields

QUESTION = "Please describe this image in detail."


class Chair(BaseTask):
    """Reads COCO's ``instances*.json``, ``captions*.json`` or both: an object is there if it is annotated or if a
    person's caption names it.
    """

    headline = "chair_i"
    max_tokens = 128

    def __init__(self, question: str = QUESTION, synonyms: Path | None = None) -> None:
        self._question = question
        self._objects = read_objects(synonyms) if synonyms else coco_objects()

    def read(self, data: Data) -> list[Sample]:
        """One description a picture, in order of the pictures' ids."""
        paths = [data.find(*_annotations(kind), optional=True) for kind in ("instances", "captions")]
        found = [path for path in paths if path is not None]
        if not found:
            raise InputError(f"{data.root} has neither instances*.json nor captions*.json")
        names: dict[str, str] = {}
        objects: dict[str, set[str]] = {}
        for path in found:
            root = data.object(path)
            images = root.raw().get("images")
            annotations = root.raw().get("annotations")
            if not isinstance(images, list) or not isinstance(annotations, list):
                raise InputError(f"{path} lacks the lists images and annotations of COCO's format")
            names |= dict(data.entries(path, listed(images), lambda f: (identifier(f, "id"), f.text("file_name"))))
            categories = _categories(data, path, root)
            objects |= {image: set() for image in names if image not in objects}
            pairs = data.entries(path, listed(annotations), partial(self._annotation, categories))
            for image, present in pairs:
                objects.setdefault(image, set()).update(present)
        asked = [(image, (image, names[image])) for image in sorted(objects, key=_natural) if image in names]
        folders = ("val2014", "val2017")
        return data.each(
            found[0],
            asked,
            lambda item: Sample(item[0], self._question, data.picture(item[1], *folders), sorted(objects[item[0]])),
        )

    def _annotation(self, categories: dict[str, str], fields: Fields) -> tuple[str, list[str]]:
        image = identifier(fields, "image_id")
        if fields.has("caption"):
            return image, self._objects.mentions(fields.text("caption"))
        number = identifier(fields, "category_id")
        if number not in categories:
            raise InputError(f"category_id is {number}, which no entry of categories has")
        return image, [categories[number]]

    def mark(self, sample: Sample, said: Said) -> Mark:
        """1 if every object that the text names is there."""
        mentioned = self._objects.mentions(said.text)
        wrong = [name for name in mentioned if name not in sample.expected]
        return Mark(float(not wrong), {"mentioned": mentioned, "hallucinated": wrong, "words": len(said.text.split())})

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """CHAIR per sentence and per instance, how many of the objects are named, and the length, which moves both."""
        clusters = [record.cluster for record in records]
        counts = np.array([_counts(record) for record in records], dtype=np.float64)
        return {
            "chair_s": stats.share(sum(record.score == 0 for record in records), len(records)),
            "chair_i": stats.bootstrap(clusters, counts, lambda sums: stats.ratio(sums[0], sums[1])),
            "recall": stats.bootstrap(clusters, counts, lambda sums: stats.ratio(sums[2], sums[3])),
            "words": stats.mean(clusters, [record.detail["words"] for record in records]),
        }


def _counts(record: Record) -> tuple[int, int, int, int]:
    """Mentions that are wrong, all mentions, objects that are named, objects that are there."""
    mentioned = record.detail["mentioned"]
    named = set(mentioned) & set(record.expected)
    return len(record.detail["hallucinated"]), len(mentioned), len(named), len(record.expected)


def _annotations(kind: str) -> list[str]:
    """COCO's archives hold those of the training pictures, too."""
    return [f"**/{kind}{split}.json" for split in ("*val2014*", "*val2017*", "*")]


def _categories(data: Data, path: Path, root: Fields) -> dict[str, str]:
    categories = root.raw().get("categories")
    if not isinstance(categories, list):
        return {}
    return dict(data.entries(path, listed(categories), lambda f: (identifier(f, "id"), f.text("name"))))


def _natural(image: str) -> tuple[int, str]:
    return (int(image), "") if image.isdigit() else (1 << 62, image)
