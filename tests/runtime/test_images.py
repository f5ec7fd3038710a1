from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_edge.errors import ImageError
from llava_edge.images import content_hash, fit, normalize, open_image, pad_to_square
from llava_edge.types import ImageSpec


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def spec(mode: Any, size: int = 16) -> ImageSpec:
    return ImageSpec(size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), mode, (1, 2, 3))


def png_header(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says it is so large, with hardly any data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_a_path_bytes_an_array_and_a_picture_give_the_same(tmp_path: Path) -> None:
    picture = noise(7, 5)
    path = tmp_path / "noise.png"
    picture.save(path)
    sources = [path, str(path), path.read_bytes(), np.asarray(picture), picture]
    hashes = {content_hash(open_image(source)) for source in sources}
    assert hashes == {content_hash(picture)}


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_are_read_exactly(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = noise(9, 6)
    assert open_image(encoded(picture, kind, **options)).tobytes() == picture.tobytes()


def test_jpeg_and_gif_are_read() -> None:
    grey = Image.new("RGB", (20, 10), (100, 100, 100))
    assert open_image(encoded(grey, "JPEG")).getpixel((5, 5)) == (100, 100, 100)
    assert open_image(encoded(grey.convert("P"), "GIF")).size == (20, 10)


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
        red, _, blue = open_image(data).getpixel((4, 4))  # type: ignore[misc]
        assert red > 200, kind
        assert blue < 50, kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (30, 20))
    upright.paste((255, 0, 0), (0, 0, 10, 10))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert open_image(encoded(stored, exif=exif)).tobytes() == upright.tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_matter() -> None:
    data = encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert open_image(data).size == (8, 8)


def test_transparent_pixels_show_the_pad_colour() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    opened = open_image(encoded(clear), pad_color=(10, 20, 30))
    assert opened.getpixel((0, 0)) == (255, 0, 0)
    assert opened.getpixel((3, 3)) == (10, 20, 30)


def test_a_palette_may_have_a_transparent_colour() -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 200, 0, 0])
    picture.putpixel((0, 0), 0)
    opened = open_image(encoded(picture, transparency=0), pad_color=(10, 20, 30))
    assert opened.getpixel((0, 0)) == (10, 20, 30)
    assert opened.getpixel((3, 3)) == (200, 0, 0)


def test_grey_with_alpha() -> None:
    opened = open_image(encoded(Image.new("LA", (3, 3), (80, 255))))
    assert opened.getpixel((1, 1)) == (80, 80, 80)


def test_cmyk_becomes_rgb() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = open_image(data).getpixel((8, 8))  # type: ignore[misc]
    assert red > 230
    assert green < 40
    assert blue < 40


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_byte(kind: str) -> None:
    values = np.array([[0, 0x00FF, 0x1234], [0x8000, 0xFF00, 0xFFFF]], np.uint16)
    opened = np.asarray(open_image(encoded(Image.fromarray(values), kind)))
    assert opened[..., 0].tolist() == [[0, 0, 0x12], [0x80, 0xFF, 0xFF]]


def test_fractions_are_scaled() -> None:
    values = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)
    opened = np.asarray(open_image(encoded(Image.fromarray(values), "TIFF")))
    assert opened[0, :, 0].tolist() == [0, 127, 255, 0]


def test_one_pixel_is_a_picture() -> None:
    opened = open_image(encoded(Image.new("RGB", (1, 1), (7, 8, 9))))
    for mode in ("pad", "crop", "squash"):
        assert fit(opened, spec(mode)).getpixel((8, 8)) == (7, 8, 9)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"just some text, named .jpg", "is not a picture"),
        (b"", "is not a picture"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "is not a picture"),
        (encoded(noise(64, 64), "JPEG")[:1500], "damaged"),
        (encoded(noise(64, 64))[:1500], "damaged"),
        (encoded(noise(64, 64), "WEBP")[:500], "damaged"),
        (encoded(noise(64, 64), "BMP")[:500], "damaged"),
        (encoded(noise(64, 64), "TIFF")[:500], "damaged"),
        (encoded(noise(64, 64), "GIF")[:500], "damaged"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "damaged"),
        (png_header(30_000, 30_000), "30000 x 30000 = 900,000,000 pixels; at most 40,000,000"),
        (png_header(5_100, 100), "5100 x 100 pixels; an aspect of at most 50:1"),
        (png_header(0, 5), "damaged|empty"),
        (np.zeros((4, 4), np.float32), "float32"),
        (np.zeros((4, 4, 2), np.uint8), r"\[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (17, "can't be read from int"),
    ],
)
def test_bad_pictures_are_refused_in_words(source: Any, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        open_image(source)


def test_bad_paths_are_refused_in_words(tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    for path, says in (
        (tmp_path / "missing.jpg", "no such picture"),
        (tmp_path, "is a directory"),
        (text, r"text.jpg is not a picture"),
        (Path("/dev/null"), "not a regular file"),
        ("x" * 5000, "can't read"),
        ("nul\0byte", "can't read"),
    ):
        with pytest.raises(ImageError, match=says):
            open_image(path)


def test_a_picture_object_that_is_truncated_is_refused() -> None:
    lazy = Image.open(io.BytesIO(encoded(noise(64, 64), "JPEG")[:1500]))
    with pytest.raises(ImageError, match="damaged"):
        open_image(lazy)


def test_a_tiff_with_huge_tiles_is_refused() -> None:
    # width, length, bits, compression (deflate), photometric, tile width and length, tile offsets and byte counts
    values = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 322: 100_000, 323: 100_000, 324: 8, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + struct.pack("<I", 0)
    with pytest.raises(ImageError, match="tiles of 100000 x 100000 pixels"):
        open_image(data)


@pytest.mark.slow
def test_a_large_jpeg_is_decoded_smaller() -> None:
    data = encoded(Image.new("RGB", (14_000, 14_000), (9, 99, 199)), "JPEG")
    opened = open_image(data)
    assert 2000 <= opened.width <= 7000
    progressive = encoded(Image.new("RGB", (7_000, 7_000)), "JPEG", progressive=True)
    with pytest.raises(ImageError, match="49,000,000 pixels"):
        open_image(progressive)


def segments(jpeg: bytes) -> tuple[dict[int, bytes], bytes]:
    """Segments of a grey JPEG of one scan by marker, and the scan's data."""
    found, at = {}, 2
    while True:
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        found[marker] = jpeg[at : at + 2 + length] + (found.get(marker, b"") if marker == 0xC4 else b"")
        at += 2 + length
        if marker == 0xDA:
            return found, jpeg[at:-2]


def one_by_one(width: int, height: int, before_frame: bytes = b"") -> bytes:
    """A JPEG, not progressive, whose three components (all the same) come in a scan each."""
    found, data = segments(encoded(Image.new("L", (16, 16), 100), "JPEG"))
    frame = struct.pack(">HHBHHB", 0xFFC0, 17, 8, height, width, 3) + bytes(
        value for number in (1, 2, 3) for value in (number, 0x11, 0)
    )
    scans = b"".join(b"\xff\xda" + bytes((0, 8, 1, number, 0, 0, 63, 0)) + data for number in (1, 2, 3))
    return b"\xff\xd8" + before_frame + found[0xDB] + frame + found[0xC4] + scans + b"\xff\xd9"


def test_a_jpeg_of_several_scans_has_a_tighter_limit() -> None:
    """Its coefficients are kept whole, at whatever scale it is decoded."""
    assert open_image(one_by_one(16, 16)).size == (16, 16)
    with pytest.raises(ImageError, match="49,000,000 pixels"):
        open_image(one_by_one(7_000, 7_000))
    fill_and_comment = b"\xff\xff\xff\xfe" + struct.pack(">H", 6) + b"text"
    assert open_image(one_by_one(16, 16, fill_and_comment)).size == (16, 16)


def test_refusing_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """A PNG that would unpack to 2.7 GB, and a lossless WebP of 16383 x 16383 pixels."""
    code = (
        "import resource, sys\n"
        "from llava_edge import ImageError, open_image\n"
        "open_image(sys.argv[2])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    open_image(sys.argv[1])\nexcept ImageError as error:\n    print(error)\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "sys.exit(grown / (1024 if sys.platform == 'linux' else 1024**2) > 20)\n"
    )
    pixels = struct.pack("<BI", 0x2F, 16382 | 16382 << 14) + b"\0" * 40
    webp = b"RIFF" + struct.pack("<I", 12 + len(pixels)) + b"WEBPVP8L" + struct.pack("<I", len(pixels)) + pixels
    for kind, bomb in (("PNG", png_header(30_000, 30_000, b"\0" * 4_000_000)), ("WEBP", webp)):
        paths = [tmp_path / f"bomb.{kind}", tmp_path / f"small.{kind}"]
        for path, data in zip(paths, (bomb, encoded(noise(4, 4), kind)), strict=True):
            path.write_bytes(data)
        command = [sys.executable, "-c", code, *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "pixels" in done.stdout


def test_pictures_are_opened_in_several_threads() -> None:
    data = encoded(noise(50, 50), "JPEG")
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.extend(content_hash(open_image(data)) for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert len(set(found)) == 1


def test_pad_centres_on_the_colour() -> None:
    padded = pad_to_square(Image.new("RGB", (4, 2), "white"), (1, 2, 3))
    assert padded.size == (4, 4)
    rows = np.asarray(padded)
    assert (rows[0] == (1, 2, 3)).all()
    assert (rows[1:3] == 255).all()
    assert (rows[3] == (1, 2, 3)).all()


def test_a_long_strip_is_padded_without_a_huge_canvas() -> None:
    strip = Image.new("RGB", (20_000, 500), (200, 100, 50))
    padded = pad_to_square(strip, (0, 0, 0))
    assert padded.width == padded.height <= 6400
    small = fit(strip, spec("pad"))
    assert small.getpixel((8, 8)) != (1, 2, 3)
    assert small.getpixel((8, 2)) == (1, 2, 3)


def test_crop_takes_the_middle_of_the_short_edge() -> None:
    picture = Image.new("RGB", (48, 16), "black")
    picture.paste("white", (16, 0, 32, 16))
    assert (np.asarray(fit(picture, spec("crop")))[:, 2:-2] > 250).all()


def test_exact_size_is_not_touched() -> None:
    picture = noise(16, 16)
    for mode in ("pad", "crop", "squash"):
        assert fit(picture, spec(mode)).tobytes() == picture.tobytes()


def test_normalise_has_channels_first() -> None:
    pixels = normalize(Image.new("RGB", (2, 3), (255, 0, 51)), spec("pad"))
    assert pixels.shape == (3, 3, 2)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[:, 0, 0], [0.5 / 0.2, -0.4 / 0.3, (0.2 - 0.3) / 0.4], rtol=1e-6)
