"""From pictures to the embeddings that a language model reads.

Shapes: T tokens of a picture, D width of the language model's embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image


class VisionEncoder(Protocol):
    """A vision tower with its projector."""

    def encode(self, images: Sequence[Image.Image]) -> list[NDArray[np.float32]]:
        """Embeddings ``float32 [T, D]`` of RGB pictures, each encoded by itself."""
        ...

    def close(self) -> None:
        """Free the tower."""
        ...


@dataclass(frozen=True)
class ImageChunk:
    """A piece of what a picture becomes in the prompt: tokens that mark it, or embeddings.

    ``positions`` ``int32 [4, T]`` are relative to the chunk's start and only there for M-RoPE; ``n_pos`` is how far
    the next token's position moves on. Without ``causal`` the embeddings all see each other.
    """

    n_tokens: int
    n_pos: int
    tokens: tuple[int, ...] = ()
    embeddings: NDArray[np.float32] | None = field(default=None, repr=False)
    positions: NDArray[np.int32] | None = field(default=None, repr=False)
    causal: bool = True


@dataclass(frozen=True)
class EncodedImage:
    """A picture as the language model reads it. ``key`` tells its content and the way it was encoded."""

    key: str
    chunks: tuple[ImageChunk, ...]

    @classmethod
    def of(cls, key: str, embeddings: NDArray[np.float32]) -> EncodedImage:
        """A picture that is nothing but embeddings ``float32 [T, D]``."""
        count = len(embeddings)
        return cls(key, (ImageChunk(count, count, embeddings=embeddings),))

    @property
    def n_tokens(self) -> int:
        """Places that the picture takes in the context."""
        return sum(chunk.n_tokens for chunk in self.chunks)

    @property
    def marked(self) -> bool:
        """Whether tokens of the model's own mark the picture in the prompt."""
        return any(chunk.tokens for chunk in self.chunks)

    @property
    def nbytes(self) -> int:
        """Memory of the embeddings."""
        return sum(chunk.embeddings.nbytes for chunk in self.chunks if chunk.embeddings is not None)
