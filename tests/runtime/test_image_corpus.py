"""A corpus of bad and odd pictures: each gives an ImageError or the right picture, and takes little memory."""

from __future__ import annotations

import importlib.util
import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from llava_edge.errors import ImageError
from llava_edge.images import open_image

# Corners of four colours on a ground: every turn and mirroring of it looks different.
SCENE = Image.new("RGB", (48, 32), (40, 90, 160))
for box, colour in (
    ((0, 0, 16, 12), (250, 20, 20)),
    ((36, 0, 48, 12), (20, 250, 20)),
    ((0, 24, 20, 32), (20, 20, 250)),
):
    SCENE.paste(colour, box)

Build = Callable[[], bytes]


def encoded(image: Image.Image = SCENE, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def looks_right(data: bytes, expected: Image.Image = SCENE, tolerance: float = 12.0, **options: Any) -> None:
    opened = open_image(data, **options)
    assert opened.mode == "RGB"
    assert opened.size == expected.size
    difference = np.abs(np.asarray(opened, np.float32) - np.asarray(expected, np.float32)).mean()
    assert difference < tolerance, difference


# What must be refused


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *more: bytes, depth: int = 8, colour: int = 2, data: bytes = b"\0" * 4000) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"".join(more) + chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def tiff(**tags: int) -> bytes:
    names = {"width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262, "offsets": 273,
             "rows": 278, "counts": 279, "tile_width": 322, "tile_height": 323}  # fmt: skip
    values = sorted((names[name], value) for name, value in tags.items())
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values)
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + struct.pack("<I", 0) + b"\0" * 64


def webp(width: int, height: int) -> bytes:
    pixels = struct.pack("<BI", 0x2F, (width - 1) | (height - 1) << 14) + b"\0" * 40
    return b"RIFF" + struct.pack("<I", 12 + len(pixels)) + b"WEBPVP8L" + struct.pack("<I", len(pixels)) + pixels


def jpeg_of_size(width: int, height: int, **options: Any) -> bytes:
    data = bytearray(encoded(kind="JPEG", **options))
    at = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp(width: int, height: int, bits: int = 24, compression: int = 0, colours: int = 0) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 200, 0, 0, 54) + info + b"\0" * 200


def bomb_text() -> bytes:
    """A comment that unpacks to 30 MB."""
    packed = zlib.compressobj(1)
    body = b"".join(packed.compress(b"\0" * 1_000_000) for _ in range(30)) + packed.flush()
    return png(8, 8, chunk(b"zTXt", b"Comment\0\0" + body), data=b"\0" * 200)


def bomb_profile() -> bytes:
    """A colour profile that unpacks to 30 MB."""
    packed = zlib.compressobj(1)
    body = b"".join(packed.compress(b"\0" * 1_000_000) for _ in range(30)) + packed.flush()
    return png(8, 8, chunk(b"iCCP", b"p\0\0" + body), data=b"\0" * 200)


REFUSED: dict[str, Build | bytes] = {
    "png bomb": png(30_000, 30_000),
    "png of 2^31 a side": png((1 << 31) - 1, (1 << 31) - 1),
    "png strip": png(51, 1),
    "png strip, upright": png(1, 6_000_000),
    "png of no width": png(0, 8),
    "png of no height": png(8, 0),
    "png of an unknown depth": png(8, 8, depth=7),
    "png with too little data": png(64, 64, data=b"\0" * 10),
    "png with a wrong checksum": lambda: encoded()[:-20] + b"\0" * 20,
    "png whose data is no deflate": lambda: encoded().replace(b"IDATx", b"IDATy"),
    "gif bomb": lambda: b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + encoded(kind="GIF")[13:],
    "gif of no size": b"GIF89a" + bytes(7) + b"\x2c" + bytes(10),
    "gif without a picture": b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b";",
    "bmp bomb": bmp(1 << 20, 1 << 20),
    "bmp of negative width": bmp(-8, 8),
    "bmp of an unknown depth": bmp(8, 8, bits=7),
    "bmp of unknown packing": bmp(8, 8, compression=77),
    "bmp with 2^31 colours": bmp(8, 8, bits=8, colours=1 << 31),
    "tiff bomb": tiff(width=1 << 20, height=1 << 20, bits=8, compression=1, photometric=1, offsets=8, rows=1, counts=8),
    "tiff with huge tiles": tiff(width=8, height=8, bits=8, compression=8, photometric=1, tile_width=100_000,
                                 tile_height=100_000),
    "tiff without a size": tiff(bits=8, compression=1, photometric=1, offsets=8, counts=8),
    "tiff of unknown packing": tiff(width=8, height=8, bits=8, compression=9999, photometric=1, offsets=8, counts=64),
    "tiff whose data lies beyond its end": tiff(width=8, height=8, bits=8, compression=1, photometric=1,
                                                offsets=1 << 30, rows=8, counts=64),
    "webp bomb": webp(16_383, 16_383),
    "webp above its limit": webp(6_000, 5_000),
    "ppm bomb": b"P6 100000 100000 255\n" + b"\0" * 99,
    "ppm of negative size": b"P6 -8 8 255\n" + b"\0" * 99,
    "ppm whose numbers never end": b"P6 " + b"9" * 100_000,
    "ppm of no size": b"P6 0 0 255\n",
    "plain ppm that is no number": b"P3 2 2 255\n1 2 x 4",
    "jpeg bomb": lambda: jpeg_of_size(65_000, 65_000),
    "jpeg of no height": lambda: jpeg_of_size(48, 0),
    "progressive jpeg above its limit": lambda: jpeg_of_size(7_000, 7_000, progressive=True),
    "jpeg strip": lambda: jpeg_of_size(60_000, 8),
    "avif": b"\0\0\0\x20ftypavif" + bytes(60),
    "psd": b"8BPS\0\1" + bytes(60),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "pdf": b"%PDF-1.7\n",
    "zip": b"PK\3\4" + bytes(60),
    "gguf": b"GGUF\3\0\0\0" + bytes(60),
    "html named as a picture": b"<!DOCTYPE html><html></html>",
    "zeros": bytes(4096),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str) -> None:
    data = REFUSED[name]
    with pytest.raises(ImageError) as caught:
        open_image(data() if callable(data) else data)
    assert str(caught.value)
    assert "Traceback" not in str(caught.value)


# What is odd, but a picture


def cmyk() -> Image.Image:
    return SCENE.convert("CMYK")


def clear(mode: str) -> Image.Image:
    picture = SCENE.convert("RGBA")
    picture.putpixel((47, 31), (1, 2, 3, 0))
    return picture.convert(mode)


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.asarray(SCENE.convert("L"), np.uint16) * 257)


def grey() -> Image.Image:
    return SCENE.convert("L").convert("RGB")


def black_and_white() -> Image.Image:
    return SCENE.convert("1")


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", SCENE.size, "white")] * 3}
RIGHT: dict[str, tuple[Build, Callable[[], Image.Image]]] = {
    "cmyk jpeg": (lambda: encoded(cmyk(), "JPEG", quality=95), lambda: SCENE),
    "cmyk tiff": (lambda: encoded(cmyk(), "TIFF"), lambda: SCENE),
    "grey jpeg": (lambda: encoded(SCENE.convert("L"), "JPEG", quality=95), grey),
    "16-bit png": (lambda: encoded(sixteen_bits()), grey),
    "16-bit tiff": (lambda: encoded(sixteen_bits(), "TIFF"), grey),
    "16-bit pgm": (lambda: encoded(sixteen_bits(), "PPM"), grey),
    "1-bit png": (lambda: encoded(black_and_white()), lambda: black_and_white().convert("RGB")),
    "1-bit pbm": (lambda: encoded(black_and_white(), "PPM"), lambda: black_and_white().convert("RGB")),
    "1-bit bmp": (lambda: encoded(black_and_white(), "BMP"), lambda: black_and_white().convert("RGB")),
    "palette png of 2 bits": (lambda: encoded(SCENE.quantize(4), bits=2), lambda: SCENE),
    "palette with alpha": (lambda: encoded(SCENE.quantize(16), transparency=b"\xff" * 16), lambda: SCENE),
    "rgba png": (lambda: encoded(clear("RGBA")), lambda: SCENE),
    "grey with alpha": (lambda: encoded(clear("LA")), grey),
    "rgba webp": (lambda: encoded(clear("RGBA"), "WEBP", lossless=True), lambda: SCENE),
    "rgba tiff": (lambda: encoded(clear("RGBA"), "TIFF"), lambda: SCENE),
    "rgb png with a clear colour": (lambda: encoded(transparency=(1, 2, 3)), lambda: SCENE),
    "ycbcr tiff": (lambda: encoded(SCENE.convert("YCbCr"), "TIFF"), lambda: SCENE),
    "deflated tiff": (lambda: encoded(kind="TIFF", compression="tiff_deflate"), lambda: SCENE),
    "lzw tiff of several pages": (lambda: encoded(kind="TIFF", compression="tiff_lzw", **FRAMES), lambda: SCENE),
    "big-endian tiff": (lambda: encoded(kind="TIFF", big_tiff=False), lambda: SCENE),
    "animated gif": (lambda: encoded(kind="GIF", **FRAMES), lambda: SCENE),
    "animated webp": (lambda: encoded(kind="WEBP", lossless=True, **FRAMES), lambda: SCENE),
    "animated png": (lambda: encoded(**FRAMES), lambda: SCENE),
    "progressive jpeg": (lambda: encoded(kind="JPEG", quality=95, progressive=True), lambda: SCENE),
    "jpeg with a profile": (lambda: encoded(kind="JPEG", quality=95, icc_profile=PROFILE), lambda: SCENE),
    "png with a profile": (lambda: encoded(icc_profile=PROFILE), lambda: SCENE),
    "png with a damaged profile": (lambda: encoded(icc_profile=b"not a profile" * 9), lambda: SCENE),
    "jpeg with a damaged profile": (lambda: encoded(kind="JPEG", quality=95, icc_profile=b"x" * 70_000), lambda: SCENE),
    "jpeg with bytes after its end": (lambda: encoded(kind="JPEG", quality=95) + b"PK\3\4" * 999, lambda: SCENE),
    "png with bytes after its end": (lambda: encoded() + b"<?php ?>" * 999, lambda: SCENE),
    "png of the longest aspect": (
        lambda: encoded(Image.new("RGB", (50, 1), "red")), lambda: Image.new("RGB", (50, 1), "red")),
    "one pixel": (lambda: encoded(Image.new("RGB", (1, 1), "red")), lambda: Image.new("RGB", (1, 1), "red")),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_is_read_right(name: str) -> None:
    build, expected = RIGHT[name]
    looks_right(build(), expected(), pad_color=(40, 90, 160))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied(kind: str, orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = SCENE.transpose(Image.Transpose(undo[orientation])) if orientation in undo else SCENE
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    looks_right(encoded(stored, kind, exif=exif, **options))


@pytest.mark.parametrize("suffix", ["jpg", "png", "txt", "heic", "exe"])
def test_the_name_does_not_matter(suffix: str, tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP"):
        path = tmp_path / f"{kind}.{suffix}"
        path.write_bytes(encoded(kind=kind))
        assert open_image(path).size == SCENE.size


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("noisy", [False, True])
def test_cut_anywhere_it_is_refused_or_right(kind: str, noisy: bool) -> None:
    """Every structure of the file is cut somewhere."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels) if noisy else SCENE
    data = encoded(picture, kind)
    whole = np.asarray(open_image(data), np.float32)
    refused = 0
    for length in sorted({*range(0, min(len(data), 400), 7), *range(0, len(data), max(1, len(data) // 60))}):
        try:
            opened = np.asarray(open_image(data[:length]), np.float32)
        except ImageError:
            refused += 1
            continue
        assert np.abs(opened - whole).mean() < 1, length
    assert refused > 50


def test_packed_comments_and_profiles_are_not_unpacked_without_limit() -> None:
    for build in (bomb_text, bomb_profile):
        try:
            assert open_image(build()).size == (8, 8)
        except ImageError as error:
            assert str(error)  # noqa: PT017


# HEIC

needs_heic = pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is None, reason="needs the extra 'heic'")


def heic(**options: Any) -> bytes:
    import pillow_heif

    pillow_heif.register_heif_opener()
    return encoded(SCENE.resize((192, 128), Image.Resampling.NEAREST), "HEIF", quality=90, **options)


@needs_heic
@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_is_read_as_its_container_says(orientation: int) -> None:
    """The container has its own turn, which the decoder applies; EXIF's, which repeats it, must not be added."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    looks_right(heic(exif=exif), SCENE.resize((192, 128), Image.Resampling.NEAREST))


@needs_heic
def test_damaged_heic_is_refused() -> None:
    data = heic()
    for length in range(12, len(data) - 200, len(data) // 20):
        with pytest.raises(ImageError):
            open_image(data[:length])


@needs_heic
def test_the_size_of_a_heic_is_checked_first() -> None:
    data = heic()
    size = struct.pack(">II", 192, 128)
    assert size in data
    with pytest.raises(ImageError):
        open_image(data.replace(size, struct.pack(">II", 60_000, 60_000)))


def test_heic_without_its_extra_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pillow_heif" else find(name))
    with pytest.raises(ImageError, match="HEIC") as caught:
        open_image(b"\0\0\0\x18ftypheic" + bytes(60))
    assert "pip install '.[heic]'" in (caught.value.hint or "")


# Memory

LARGE = {
    "rgba.png": (8000, 5000, "RGBA", {"compress_level": 1}),
    "deep.tif": (8000, 5000, "I;16", {}),
    "progressive.jpg": (8000, 5000, "RGB", {"progressive": True, "subsampling": 0}),
    "large.webp": (6000, 4000, "RGBA", {"lossless": True, "quality": 0, "method": 0}),
}
MAX_PEAK_MIB = 600


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_largest_pictures_fit_into_600_mb(name: str, tmp_path: Path) -> None:
    """At the limits of size, turned by EXIF where the format has it, read by a fresh process and made square."""
    width, height, mode, options = LARGE[name]
    path = tmp_path / name
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = {} if name.endswith("tif") else {"exif": exif}
    Image.new(mode, (width, height), 100 if mode in ("P", "I;16", "F") else None).save(path, **options, **turned)
    code = (
        "import re, resource, sys\n"
        "from pathlib import Path\n"
        "from llava_edge.images import fit, open_image\n"
        "from llava_edge.types import ImageSpec\n"
        "fit(open_image(sys.argv[1]), ImageSpec(336, (0.5,) * 3, (0.5,) * 3))\n"
        # Linux counts into ru_maxrss what the parent had when it made the process.
        "status = Path('/proc/self/status')\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', status.read_text()) if status.exists() else None\n"
        "print(int(peak[1]) / 1024 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < MAX_PEAK_MIB
