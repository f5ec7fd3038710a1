"""A model of a benchmark: a bundle, what a record says of it, and what is refused."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from llava_edge.bench.record import ModelFile, Row
from llava_edge.bench.speed.workload import Weights, read_weights
from llava_edge.bundle import Bundle, resolve_model, sha256_file
from llava_edge.convert.quantize import LLM_TYPES as convert_types
from llava_edge.errors import InputError
from llava_edge.parts import pulled_pair
from llava_edge.vision.backends import candidates
from llava_edge.vision.tokens import pooled_counts, pooled_grid

# Worth measuring besides what a conversion offers.
LLM_TYPES = tuple(dict.fromkeys((*convert_types, "Q3_K_L", "Q2_K")))
SYNTHETIC = "synthetic"  # the family of bundles with random weights


@dataclass(frozen=True)
class Subject:
    """A bundle under test, with the number of visual tokens that it is asked for and what reads the pictures."""

    bundle: Bundle
    label: str
    image_tokens: int
    vision_backend: str = "auto"

    @property
    def picture_tokens(self) -> int:
        """The most tokens that a picture takes: with anyres every tile has ``image_tokens``, and rows have an end."""
        image, grid = self.bundle.manifest.image, self.bundle.manifest.visual_tokens.grid
        if image.mode != "anyres":
            return self.image_tokens
        rows, columns = pooled_grid(grid, self.image_tokens)
        tiles = [(width // image.size, height // image.size) for width, height in image.grid]
        most = max(down * rows * (across * columns + 1) for across, down in tiles)
        if image.max_tiles:  # the runtime tolerates 1.1 a side before it scales down; each row has an end
            room = int(1.21 * image.max_tiles * rows * columns)
            most = min(most, room + max(down for _, down in tiles) * rows)
        return self.image_tokens + most

    @property
    def synthetic(self) -> bool:
        """Whether its weights are random: then only its speed means something."""
        return self.bundle.manifest.family == SYNTHETIC

    @cached_property
    def weights(self) -> dict[str, Weights]:
        """What its GGUF files hold, by role."""
        files = [file for file in self.bundle.manifest.files if file.path.endswith(".gguf")]
        return {file.role: read_weights(self.bundle.directory / file.path) for file in files}

    def row(self) -> Row:
        """The record's row, without figures yet. Hashes are taken of the files as they are."""
        manifest = self.bundle.manifest
        files = []
        for file in manifest.files:
            path = self.bundle.directory / file.path
            types = self.weights[file.role].types if file.role in self.weights else {}
            files.append(ModelFile(file.role, file.path, file.type, path.stat().st_size, sha256_file(path), types))
        notes = (f"{manifest.source}; answers and quality mean nothing",) if self.synthetic else ()
        size, tokens = manifest.image.size, self.image_tokens
        return Row(self.label, manifest.name, manifest.family, size, tokens, tuple(files), {}, notes)


def open_subjects(names: list[str], image_tokens: int | None = None, vision_backend: str = "auto") -> list[Subject]:
    """Open bundles by name or directory. Bundles of the same name are labelled by their directories."""
    subjects = [open_subject(name, image_tokens, vision_backend) for name in names]
    labels = [subject.label for subject in subjects]
    if len(set(labels)) == len(labels):
        return subjects
    return [replace(s, label=os.fspath(Path(name))) for s, name in zip(subjects, names, strict=True)]


def open_subject(
    name: str | os.PathLike[str], image_tokens: int | None = None, vision_backend: str = "auto"
) -> Subject:
    """Open one bundle; InputError if it can't give that many visual tokens, or is no bundle but a pair of files."""
    if pulled_pair(name) is not None:
        raise InputError(
            f"{os.fspath(name)} is a pair of GGUF files without a manifest; bench measures bundles",
            hint="`llava-edge chat --stats` shows its speed, `llava-edge eval` its answers.",
        )
    bundle = resolve_model(name)
    candidates(bundle, vision_backend)
    tokens = bundle.manifest.visual_tokens
    count = tokens.default if image_tokens is None else image_tokens
    if count not in pooled_counts(tokens.grid):
        raise InputError(
            f"image_tokens is {count}; {bundle.manifest.name} can't pool its grid to that",
            hint=f"Possible are {', '.join(map(str, pooled_counts(tokens.grid)))}.",
        )
    types = "/".join(file.type for file in bundle.manifest.files)
    return Subject(bundle, f"{bundle.manifest.name} {types}", count, vision_backend)
