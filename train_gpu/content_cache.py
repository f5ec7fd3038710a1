"""Cached vision features, found by what the picture and the tower are made of.

A cache lives in a folder named by the hash of the tower's weights, its configuration and the preprocessing, so that
features of another tower are never taken. Inside, rows are found by the SHA-256 of the picture's file.

Shapes: P patches, D width of the concatenated feature layers; where the tower's last blocks are trained, the positions
and the width of the hidden states that enter them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava_edge.errors import InputError
from llava_edge.train_gpu.pictures import PixelPictures, read_bytes, stack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.train_gpu.samples import PictureRef, Skipped
    from llava_edge.types import ImageSpec

log = logging.getLogger(__name__)


def tower_key(tower: torch.nn.Module, config: Any, spec: ImageSpec, bf16: bool, blocks: int = 0) -> str:
    """A hash of all that a picture's row depends on beside the picture; ``blocks`` is how many are left to be run."""
    digest = hashlib.sha256()
    described = {
        "bf16": bf16,
        "blocks": blocks,
        "layers": config.vision_feature_layer,
        "select": config.vision_feature_select_strategy,
        "class_token": getattr(config, "vision_class_token", True),
        "image": asdict(spec),
        "tower": config.vision_config.to_dict(),
    }
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


class ContentCache:
    """Features ``float16 [P, D]`` in one growing file.

    A row counts once its line in ``rows.jsonl`` is written, which happens after the row itself is on the disk: a kill
    at any moment leaves whole rows.
    """

    def __init__(self, directory: Path, shape: tuple[int, int]) -> None:
        self.directory = directory
        self.shape = shape
        self.rows: dict[str, int] = {}
        self._hashes: dict[str, str] = {}
        directory.mkdir(parents=True, exist_ok=True)
        self.reopen()

    def find(self, picture: PictureRef) -> NDArray[np.float16]:
        """Features of a picture; InputError if they are not there."""
        row = self.rows.get(self._content(picture))
        if row is None:
            raise InputError(f"the features of the picture {picture.name} are not in the cache {self.directory}")
        return np.asarray(self._array[row])

    def fill(
        self,
        pictures: Iterable[PictureRef],
        encode: Callable[[torch.Tensor], torch.Tensor],
        spec: ImageSpec,
        skipped: Skipped,
        batch_size: int = 16,
    ) -> None:
        """Encode what is missing. Pictures that can't be read are errors, or left out where that is allowed."""
        missing: dict[str, PictureRef] = {}
        for picture in dict.fromkeys(pictures):
            try:
                content = self._content(picture)
            except InputError:
                if not skipped.allowed:
                    raise
                continue
            if content not in self.rows:
                missing[content] = picture
        if missing:
            self._encode(missing, encode, PixelPictures(spec), skipped, batch_size)
        partial = self._files.with_suffix(".partial")
        partial.write_text(json.dumps(self._hashes))
        partial.replace(self._files)
        self.reopen()

    def _encode(
        self,
        missing: dict[str, PictureRef],
        encode: Callable[[torch.Tensor], torch.Tensor],
        pixels: PixelPictures,
        skipped: Skipped,
        batch_size: int,
    ) -> None:
        keys = list(missing)
        began, told = time.monotonic(), time.monotonic()
        for start in range(0, len(keys), batch_size):
            contents, arrays = [], []
            for key in keys[start : start + batch_size]:
                try:
                    arrays.append(pixels.load(missing[key]))
                    contents.append(key)
                except InputError:
                    if not skipped.allowed:
                        raise
            if arrays:
                features = encode(stack(arrays)).float().clamp(-6e4, 6e4).cpu().numpy().astype(np.float16)
                self._append(contents, features)
            done = min(start + batch_size, len(keys))
            if time.monotonic() - told > 10 or done == len(keys):
                told = time.monotonic()
                rate = done / (told - began)
                log.info("features: %d of %d pictures, %.1f a second", done, len(keys), rate)

    def _append(self, contents: Sequence[str], features: NDArray[np.float16]) -> None:
        if features.shape[1:] != self.shape:
            raise InputError(f"the tower gives features of shape {list(features.shape[1:])}; expected {self.shape}")
        row_bytes = int(np.prod(self.shape)) * 2
        with self._data.open("r+b") as file:
            file.truncate(len(self.rows) * row_bytes)
            file.seek(0, os.SEEK_END)
            file.write(features.tobytes())
            file.flush()
            os.fsync(file.fileno())
        with self._index.open("a") as lines:
            for content in contents:
                self.rows[content] = len(self.rows)
                lines.write(json.dumps({"content": content}) + "\n")
            lines.flush()
            os.fsync(lines.fileno())

    def reopen(self) -> None:
        """Read again what is there, for processes that another one has written for."""
        self._data = self.directory / "features.f16"
        self._index = self.directory / "rows.jsonl"
        self._files = self.directory / "files.json"
        if not self._data.exists():
            self._data.touch()
        self.rows = {}
        whole = []
        for line in self._index.read_text().splitlines() if self._index.exists() else []:
            try:
                self.rows[json.loads(line)["content"]] = len(self.rows)
                whole.append(line)
            except (json.JSONDecodeError, KeyError):
                break  # the line that a kill cut off
        if self._index.exists() and "".join(f"{line}\n" for line in whole) != self._index.read_text():
            self._index.write_text("".join(f"{line}\n" for line in whole))
        try:
            self._hashes = json.loads(self._files.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            self._hashes = {}
        shape = (len(self.rows), *self.shape)
        self._array = np.memmap(self._data, np.float16, "r", shape=shape) if self.rows else np.zeros(shape, np.float16)

    def _content(self, picture: PictureRef) -> str:
        """SHA-256 of a picture's file; known ones are told by path, size and time of change."""
        try:
            status = picture.path.stat()
            key = f"{picture.path}:{picture.offset}:{picture.size_bytes}:{status.st_size}:{status.st_mtime_ns}"
            if key not in self._hashes:
                data = read_bytes(picture)
                data = data if isinstance(data, bytes) else data.read_bytes()
                self._hashes[key] = hashlib.sha256(data).hexdigest()
        except OSError as error:
            raise InputError(f"training picture {picture.name}: {error.strerror or error}") from None
        return self._hashes[key]
