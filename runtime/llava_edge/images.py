"""Pictures from outside into what a vision tower reads: the one preprocessing for training, export and run time.

Shapes: H height, W width in pixels, colour last and uint8 until :func:`normalize` makes ``float32 [3, H, W]``.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from llava_edge.errors import ImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.types import ImageSpec

    ImageSource = Union[str, os.PathLike[str], bytes, Image.Image, NDArray[Any]]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 40_000_000
# A JPEG is decoded at a half, a quarter or an eighth of its size without ever holding the whole picture.
MAX_JPEG_PIXELS = 200_000_000
MAX_ASPECT = 50
MAX_FILE_BYTES = 256 * 1024 * 1024
_TARGET_PIXELS = 4_000_000


def open_image(source: ImageSource, *, pad_color: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Open a picture under limits and return it as RGB, upright.

    Parameters
    ----------
    source
        A path, the bytes of a file, a ``PIL.Image.Image``, or an array ``uint8 [H, W]``, ``[H, W, 3]`` or
        ``[H, W, 4]``.
    pad_color
        What shows through transparent pixels, as RGB from 0 to 255.

    Raises
    ------
    ImageError
        No such file, not a picture of a supported format, damaged, or outside the limits: 40 megapixels (200 for
        JPEG) and an aspect of 50:1. Only the first frame of an animation is read.
    """
    if isinstance(source, Image.Image):
        _check_size("the picture", source.width, source.height, MAX_PIXELS)
        return _upright_rgb(source, pad_color)
    if isinstance(source, np.ndarray):
        return _upright_rgb(_from_array(source), pad_color)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(bytes(source)), "the picture", pad_color)
    path = Path(source)
    return _decode(io.BytesIO(_read_file(path)), str(path), pad_color)


def content_hash(image: Image.Image) -> str:
    """SHA-256 over the size and the pixels of an RGB picture, as 64 hexadecimal digits."""
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def fit(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Bring an RGB picture to the tower's square, ``spec.size`` pixels a side, as ``spec.mode`` says.

    ``pad`` pastes it on a square of ``spec.pad_color`` first (LLaVA 1.5), ``crop`` resizes the short edge and
    takes the middle (LLaVA v1, CLIP), ``squash`` ignores the aspect. Resampling is bicubic.
    """
    size = spec.size
    if spec.mode == "pad":
        image = pad_to_square(image, spec.pad_color)
    elif spec.mode == "crop":
        scale = size / min(image.size)
        width, height = (max(size, int(edge * scale)) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return image.crop((left, top, left + size, top + size))
    if image.size == (size, size):
        return image
    return image.resize((size, size), Image.Resampling.BICUBIC)


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Centre a picture on a square canvas of one colour (``expand2square`` of the reference)."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    canvas = Image.new("RGB", (side, side), color)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def normalize(image: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    """RGB picture to ``float32 [3, H, W]``: scaled to 0…1, then minus ``spec.mean``, over ``spec.std``."""
    mean = np.array(spec.mean, dtype=np.float32)
    std = np.array(spec.std, dtype=np.float32)
    pixels = np.asarray(image, dtype=np.float32)
    pixels = np.divide(np.divide(pixels, np.float32(255)) - mean, std)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)


def _read_file(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{path} is a directory, not a picture", hint="Name one picture file.")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path} is not a regular file", hint="Copy the picture into a file first.")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(f"{path} has {status.st_size} bytes; a picture may have {MAX_FILE_BYTES}")
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"no such picture: {path}", hint="Check the path.") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def _as_image_errors(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises on bad input into an ImageError that says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"{name} unpacks to too many pixels; at most {MAX_PIXELS:,} are allowed") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not a picture that can be read", hint=f"Supported formats: {', '.join(FORMATS)}."
        ) from None
    except MemoryError:
        raise ImageError(f"{name} needs more memory than there is") from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError) as error:
        raise ImageError(f"{name} is damaged: {error}", hint="Save the picture again and retry.") from None


def _decode(file: io.BytesIO, name: str, pad_color: tuple[int, int, int]) -> Image.Image:
    with _as_image_errors(name):
        with Image.open(file, formats=FORMATS) as image:
            jpeg = image.format == "JPEG"
            _check_size(name, image.width, image.height, MAX_JPEG_PIXELS if jpeg else MAX_PIXELS)
            if jpeg and image.width * image.height > MAX_PIXELS:
                scale = (_TARGET_PIXELS / (image.width * image.height)) ** 0.5
                image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
            if ImageFile.LOAD_TRUNCATED_IMAGES:
                raise ImageError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set; half pictures are not accepted")
            image.load()
            return _upright_rgb(image, pad_color)


def _check_size(name: str, width: int, height: int, limit: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} is empty: {width} x {height} pixels")
    if width * height > limit:
        raise ImageError(
            f"{name} has {width} x {height} = {width * height:,} pixels; at most {limit:,} are allowed",
            hint="Make it smaller first.",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name} is {width} x {height} pixels; an aspect of at most {MAX_ASPECT}:1 is allowed",
            hint="Crop it first.",
        )


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"an array of type {array.dtype} and shape {list(array.shape)} is not a picture; "
            "expected uint8 and [H, W], [H, W, 3] or [H, W, 4]"
        )
    _check_size("the array", array.shape[1], array.shape[0], MAX_PIXELS)
    return Image.fromarray(array)


def _upright_rgb(image: Image.Image, pad_color: tuple[int, int, int]) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or upright.mode in ("I", "F"):
        upright = _to_eight_bits(upright)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (*pad_color, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return upright.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey keeps its upper byte; plain conversion would clip everything above 255 to white."""
    values = np.asarray(image, dtype=np.float64)
    top = 65535.0 if values.max(initial=0) > 255 else 255.0
    return Image.fromarray(np.clip(values * (255.0 / top), 0, 255).astype(np.uint8))
