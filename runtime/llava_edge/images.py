"""Pictures from outside into what a vision tower reads: the one preprocessing for training, export and run time.

Shapes: H height, W width in pixels, colour last and uint8 until :func:`normalize` makes ``float32 [3, H, W]``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from PIL import Image, ImageFile

from llava_edge.errors import ImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.types import ImageSpec

    ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]

FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "PPM", "HEIC with the extra 'heic'")
MAX_PIXELS = 40_000_000
# A baseline JPEG is decoded at a half, a quarter or an eighth of its size without ever holding the whole picture.
MAX_JPEG_PIXELS = 200_000_000
MAX_ASPECT = 50
# The decoders of WebP and HEIC hold the picture up to five times, and the file.
MAX_COSTLY_PIXELS = 24_000_000
MAX_COSTLY_BYTES = 48 * 1024 * 1024
MAX_FILE_BYTES = 256 * 1024 * 1024
_TARGET_PIXELS = 4_000_000

# First bytes, module and class. The class is called directly: Image.open would load every plug-in, and
# report large pictures through the warnings of the whole process.
READERS = (
    (b"\xff\xd8\xff", "PIL.JpegImagePlugin", "JpegImageFile"),
    (b"\x89PNG\r\n\x1a\n", "PIL.PngImagePlugin", "PngImageFile"),
    (b"RIFF", "PIL.WebPImagePlugin", "WebPImageFile"),
    (b"GIF8", "PIL.GifImagePlugin", "GifImageFile"),
    (b"BM", "PIL.BmpImagePlugin", "BmpImageFile"),
    (b"II*\x00", "PIL.TiffImagePlugin", "TiffImageFile"),
    (b"MM\x00*", "PIL.TiffImagePlugin", "TiffImageFile"),
    *((b"P%d" % number, "PIL.PpmImagePlugin", "PpmImageFile") for number in range(1, 7)),
)
HEIF_MODULE = "pillow_heif"
_MAGIC_BYTES = 12
# What iPhones write: brands of the HEIF container with HEVC pictures.
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_COSTLY = ("WebPImageFile", "HeifImageFile")
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
# Frames that may come in one scan, a scan's header, and markers without a length.
_JPEG_SEQUENTIAL = {0xC0, 0xC1, 0xC9}
_JPEG_SCAN = 0xDA
_JPEG_BARE = {0x00, 0x01, *range(0xD0, 0xDA)}
# Deep pictures are made flat so many pixels at a time.
_STRIP_PIXELS = 1_000_000


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
        JPEG that comes in one scan, 24 for WebP and HEIC) and an aspect of 50:1. Only the first frame of
        an animation is read.
    """
    if isinstance(source, Image.Image):
        _check_size("the picture", source.width, source.height, MAX_PIXELS)
        with _as_image_errors("the picture"):
            return _turn(_rgb(source, pad_color), _orientation(source))
    if isinstance(source, np.ndarray):
        return _rgb(_from_array(source), pad_color)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), "the picture", pad_color)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            f"a picture can't be read from {type(source).__name__}",
            hint="Give a path, bytes, a PIL.Image.Image or an array of uint8.",
        )
    path = Path(source)
    try:
        with _open_file(path) as file:
            return _decode(file, str(path), pad_color)
    except FileNotFoundError:
        raise ImageError(f"no such picture: {path}", hint="Check the path.") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None


def read(source: ImageSource, spec: ImageSpec | None, pad_color: tuple[int, int, int]) -> Image.Image:
    """Open a picture as :func:`open_image` does, and :func:`fit` it if the tower wants it whole and in one size."""
    image = open_image(source, pad_color=pad_color)
    return image if spec is None or spec.mode == "anyres" else fit(image, spec)


def kind(data: bytes) -> str:
    """The name of a picture file's format, as in ``image/jpeg``."""
    module, _ = _reader(data[:_MAGIC_BYTES], "the picture")
    return "heic" if module == HEIF_MODULE else module.removeprefix("PIL.").removesuffix("ImagePlugin").lower()


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


def _open_file(path: Path) -> BinaryIO:
    """A regular file; a device or a pipe could go on for ever, or wait."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{path} is a directory, not a picture", hint="Name one picture file.")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{path} is not a regular file", hint="Copy the picture into a file first.")
    return path.open("rb")


def _reader(start: bytes, name: str) -> tuple[str, str]:
    """Module and class for a file that starts with these bytes."""
    for magic, module, reader in READERS:
        if start.startswith(magic) and (magic != b"RIFF" or start[8:12] == b"WEBP"):
            return module, reader
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS:
        if importlib.util.find_spec(HEIF_MODULE) is None:
            raise ImageError(
                f"{name} is a HEIC picture, which needs the extra 'heic'",
                hint="Run in a clone of the repository: pip install '.[heic]'. Or save the picture as JPEG.",
            )
        return HEIF_MODULE, "HeifImageFile"
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


def _decode(file: BinaryIO, name: str, pad_color: tuple[int, int, int]) -> Image.Image:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    module, reader = _reader(file.read(_MAGIC_BYTES), name)
    _check_bytes(name, size, MAX_COSTLY_BYTES if reader in _COSTLY else MAX_FILE_BYTES)
    file.seek(0)
    with _as_image_errors(name), getattr(importlib.import_module(module), reader)(file) as image:
        _check_limits(image, name, file)
        if image.format == "JPEG" and image.width * image.height > MAX_PIXELS:
            scale = (_TARGET_PIXELS / (image.width * image.height)) ** 0.5
            image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ImageError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set; half pictures are not accepted")
        image.load()
        orientation = _orientation(image)
        picture = _rgb(image, pad_color)
        image.close()  # frees its pixels before there are others
        return _turn(picture, orientation)


def _check_bytes(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ImageError(f"{name} has more than {limit:,} bytes", hint="Make it smaller first.")


def _has_several_scans(file: BinaryIO) -> bool:
    """Whether a JPEG's pixels come in several passes: it is progressive, or its components come one by one.

    True also of what isn't written as usual, so that nobody gets around the limit.
    """
    file.seek(2)
    components = 0
    while True:
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF or head[1] in _JPEG_BARE:
            return True
        if head[1] == 0xFF:  # fill
            file.seek(-3, os.SEEK_CUR)
            continue
        part = file.read(max(0, int.from_bytes(head[2:], "big") - 2))
        if head[1] in _JPEG_SEQUENTIAL:
            components = part[5] if len(part) > 5 else 0
        elif head[1] == _JPEG_SCAN:
            return not components or part[:1] != bytes([components])


def _check_limits(image: Image.Image, name: str, file: BinaryIO) -> None:
    # A JPEG of several scans keeps all its coefficients in memory, at whatever scale it is decoded.
    reducible = image.format == "JPEG" and image.width * image.height > MAX_PIXELS and not _has_several_scans(file)
    costly = image.format in ("WEBP", "HEIF")
    limit = MAX_JPEG_PIXELS if reducible else MAX_COSTLY_PIXELS if costly else MAX_PIXELS
    _check_size(name, image.width, image.height, limit)
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


def _rgb(image: Image.Image, pad_color: tuple[int, int, int]) -> Image.Image:
    """An RGB picture of its own; what is transparent shows the pad colour."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    canvas = Image.new("RGB", layer.size, pad_color)
    canvas.paste(layer, mask=layer)
    return canvas


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


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
    top = max(float(np.nan_to_num(strip, nan=0.0).max(initial=0)) for _, strip in _strips(image))
    flat = np.empty((image.height, image.width), np.uint8)
    for row, strip in _strips(image):
        if image.mode == "F":
            strip = np.nan_to_num(strip, nan=0.0) * np.float32(255 if top <= 1 else 255 / 65535 if top > 255 else 1)
        elif top > 255:
            strip = strip >> 8
        flat[row : row + len(strip)] = strip.clip(0, 255)
    return Image.fromarray(flat)


def _strips(image: Image.Image) -> Iterator[tuple[int, NDArray[Any]]]:
    """A few rows at a time, with the number of the first: NumPy's copy of a large deep picture takes much memory."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for row in range(0, image.height, rows):
        yield row, np.asarray(image.crop((0, row, image.width, min(row + rows, image.height))))
