"""Pictures from outside into what a vision tower reads: the one preprocessing for training, export and run time.

Shapes: H height, W width in pixels, colour last and uint8 until :func:`normalize` makes ``float32 [3, H, W]``.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageFile

from llava_edge.errors import ImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.types import ImageSpec

    ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]

FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 40_000_000
# A baseline JPEG is decoded at a half, a quarter or an eighth of its size without ever holding the whole picture.
MAX_JPEG_PIXELS = 200_000_000
MAX_ASPECT = 50
MAX_FILE_BYTES = 256 * 1024 * 1024
_TARGET_PIXELS = 4_000_000

# First bytes, Pillow's module and class. The class is called directly: Image.open would load every plug-in, and
# report large pictures through the warnings of the whole process.
READERS = (
    (b"\xff\xd8\xff", "JpegImagePlugin", "JpegImageFile"),
    (b"\x89PNG\r\n\x1a\n", "PngImagePlugin", "PngImageFile"),
    (b"RIFF", "WebPImagePlugin", "WebPImageFile"),
    (b"GIF8", "GifImagePlugin", "GifImageFile"),
    (b"BM", "BmpImagePlugin", "BmpImageFile"),
    (b"II*\x00", "TiffImagePlugin", "TiffImageFile"),
    (b"MM\x00*", "TiffImagePlugin", "TiffImageFile"),
    *((b"P%d" % number, "PpmImagePlugin", "PpmImageFile") for number in range(1, 7)),
)
_MAGIC_BYTES = 12
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_TILE = (322, 323)


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
        JPEG that is not progressive) and an aspect of 50:1. Only the first frame of an animation is read.
    """
    if isinstance(source, Image.Image):
        _check_size("the picture", source.width, source.height, MAX_PIXELS)
        with _as_image_errors("the picture"):
            return _upright_rgb(source, pad_color)
    if isinstance(source, np.ndarray):
        return _upright_rgb(_from_array(source), pad_color)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), "the picture", pad_color)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            f"a picture can't be read from {type(source).__name__}",
            hint="Give a path, bytes, a PIL.Image.Image or an array of uint8.",
        )
    path = Path(source)
    return _decode(_read_file(path), str(path), pad_color)


def read(source: ImageSource, spec: ImageSpec | None, pad_color: tuple[int, int, int]) -> Image.Image:
    """Open a picture as :func:`open_image` does, and :func:`fit` it if the tower wants it whole and in one size."""
    image = open_image(source, pad_color=pad_color)
    return image if spec is None or spec.mode == "anyres" else fit(image, spec)


def kind(data: bytes) -> str:
    """The name of a picture file's format, as in ``image/jpeg``."""
    module, _ = _reader(data[:_MAGIC_BYTES], "the picture")
    return module.removesuffix("ImagePlugin").lower()


def content_hash(image: Image.Image) -> str:
    """SHA-256 over the size and the pixels of an RGB picture, as 64 hexadecimal digits."""
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def fit(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Bring an RGB picture to the tower's square, ``spec.size`` pixels a side, as ``spec.mode`` says.

    ``pad`` pastes it on a square of ``spec.pad_color`` first (LLaVA 1.5), ``crop`` resizes the short edge and
    takes the middle (LLaVA v1, CLIP), ``squash`` ignores the aspect, and so does ``anyres``, whose tiles
    :mod:`llava_edge.vision.anyres` makes. Resampling is bicubic.
    """
    size = spec.size
    if spec.mode == "pad":
        image = pad_to_square(image, spec.pad_color)
    elif spec.mode == "crop":
        short = min(image.size)
        width, height = (size * edge // short for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return image.crop((left, top, left + size, top + size))
    if image.size == (size, size):
        return image
    return image.resize((size, size), Image.Resampling.BICUBIC)


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Centre a picture on a square canvas of one colour (``expand2square`` of the reference).

    A long strip is made smaller first where its square would be beyond the limit of pixels.
    """
    side = max(image.size)
    if image.size == (side, side):
        return image
    if side * side > MAX_PIXELS:
        side = int(_TARGET_PIXELS**0.5)
        width, height = (max(1, round(edge * side / max(image.size))) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
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
    """The file's bytes, once its first ones are those of a picture."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{path} is a directory, not a picture", hint="Name one picture file.")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path} is not a regular file", hint="Copy the picture into a file first.")
        with path.open("rb") as file:
            start = file.read(_MAGIC_BYTES)
            _reader(start, str(path))
            data = start + file.read(MAX_FILE_BYTES)
    except FileNotFoundError:
        raise ImageError(f"no such picture: {path}", hint="Check the path.") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    return data


def _reader(start: bytes, name: str) -> tuple[str, str]:
    """Pillow's module and class for a file that starts with these bytes."""
    for magic, module, reader in READERS:
        if start.startswith(magic) and (magic != b"RIFF" or start[8:12] == b"WEBP"):
            return module, reader
    raise ImageError(f"{name} is not a picture that can be read", hint=f"Supported formats: {', '.join(FORMATS)}.")


@contextmanager
def _as_image_errors(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises on bad input into an ImageError that says why."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"{name} unpacks to too many pixels; at most {MAX_PIXELS:,} are allowed") from None
    except MemoryError:
        raise ImageError(f"{name} needs more memory than there is") from None
    except Exception as error:  # decoders of damaged files fail in every way
        raise ImageError(f"{name} is damaged: {error}", hint="Save the picture again and retry.") from None


def _decode(data: bytes, name: str, pad_color: tuple[int, int, int]) -> Image.Image:
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"{name} has more than {MAX_FILE_BYTES:,} bytes", hint="Make it smaller first.")
    module, reader = _reader(data[:_MAGIC_BYTES], name)
    with _as_image_errors(name), getattr(importlib.import_module(f"PIL.{module}"), reader)(io.BytesIO(data)) as image:
        _check_limits(image, name)
        if image.format == "JPEG" and image.width * image.height > MAX_PIXELS:
            scale = (_TARGET_PIXELS / (image.width * image.height)) ** 0.5
            image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ImageError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set; half pictures are not accepted")
        image.load()
        return _upright_rgb(image, pad_color)


def _check_limits(image: Image.Image, name: str) -> None:
    # A progressive JPEG keeps all its coefficients in memory, at whatever scale it is decoded.
    reducible = image.format == "JPEG" and not image.info.get("progressive")
    _check_size(name, image.width, image.height, MAX_JPEG_PIXELS if reducible else MAX_PIXELS)
    if image.format == "TIFF":
        width, height = (int(getattr(image, "tag_v2", {}).get(tag, 1)) for tag in _TIFF_TILE)
        if width * height > MAX_PIXELS:
            raise ImageError(f"{name} has tiles of {width} x {height} pixels; at most {MAX_PIXELS:,} are allowed")


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
    turned = _UPRIGHT.get(_orientation(image))
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, pad_color)
        image.paste(layer, mask=layer.getchannel("A"))
    else:
        image = image.convert("RGB")
    return image if turned is None else image.transpose(turned)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1 (upright) where there is none or it can't be read, as viewers do."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # the parser of damaged metadata fails in every way
        return 1


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey keeps its upper byte; plain conversion would clip everything above 255 to white.

    Fractions from 0 to 1 are scaled; other values that fit into 8 bits stay.
    """
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values, nan=0.0)
        top = values.max(initial=0)
        values = values * np.float32(255 if top <= 1 else 255 / 65535 if top > 255 else 1)
    elif values.max(initial=0) > 255:
        values = values >> 8
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
