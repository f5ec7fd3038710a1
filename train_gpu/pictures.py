"""Pictures of samples into what the model reads: pixels, or features that were cached.

Shapes: N pictures, P patches, D width of the concatenated feature layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from llava_edge.errors import ImageError, InputError
from llava_edge.images import fit, normalize, open_image

if TYPE_CHECKING:
    from llava_edge.train_gpu.content_cache import ContentCache
    from llava_edge.train_gpu.features import FeatureCache
    from llava_edge.train_gpu.samples import PictureRef
    from llava_edge.types import ImageSpec


class Pictures(Protocol):
    """What a batch takes its pictures from."""

    are_features: bool

    def load(self, picture: PictureRef) -> np.ndarray:
        """One picture: ``[3, H, W]`` pixels or ``[P, D]`` features. InputError says why it can't be had."""
        ...

    def blank(self) -> np.ndarray:
        """Zeros of the same shape and type."""
        ...


def read_bytes(picture: PictureRef) -> bytes | Path:
    """The bytes of a picture in a tar file, or the path of one that is a file."""
    if not picture.size_bytes:
        return picture.path
    with picture.path.open("rb") as file:
        file.seek(picture.offset)
        return file.read(picture.size_bytes)


class PixelPictures:
    """Pictures that go through the vision tower at every step."""

    are_features = False

    def __init__(self, spec: ImageSpec) -> None:
        self.spec = spec

    def load(self, picture: PictureRef) -> np.ndarray:
        """``float32 [3, H, W]``, fitted and normalised."""
        try:
            opened = open_image(read_bytes(picture), pad_color=self.spec.pad_color)
        except ImageError as error:
            raise InputError(f"training picture {picture.name}: {error}", hint=error.hint) from None
        except OSError as error:
            raise InputError(f"training picture {picture.name}: {error}") from None
        return normalize(fit(opened, self.spec), self.spec)

    def blank(self) -> np.ndarray:
        """See :class:`Pictures`."""
        return np.zeros((3, self.spec.size, self.spec.size), np.float32)


class CachedPictures:
    """Features from a cache, by name or by content."""

    are_features = True

    def __init__(self, cache: FeatureCache | ContentCache) -> None:
        self.cache = cache

    def load(self, picture: PictureRef) -> np.ndarray:
        """``float16 [P, D]``."""
        return self.cache.find(picture)

    def blank(self) -> np.ndarray:
        """See :class:`Pictures`."""
        return np.zeros(self.cache.shape, np.float16)


def stack(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """Pictures of one batch, ``[N, …]``."""
    return torch.from_numpy(np.stack(arrays))
