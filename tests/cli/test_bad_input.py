"""Bad input: one clear line on stderr, exit code 1, no traceback."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

QUESTION = ("-p", "What is this?", "--max-tokens", "4")


def assert_one_error(result, *words):
    lines = result.err.splitlines()
    assert result.code == 1, result
    assert result.out == ""
    assert lines[0].startswith("error: "), result.err
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), result.err
    for word in words:
        assert word in result.err


def huge_png(path: Path, side: int = 30_000) -> Path:
    """A valid header of a picture of ``side`` x ``side`` pixels, in a file of a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    row = b"\0" + b"\0" * (3 * side)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.usefixtures("nano")
class TestPictures:
    def ask(self, run, path):
        return run("chat", "--image", path, *QUESTION)

    def test_no_such_file(self, run):
        assert_one_error(self.ask(run, "gone.jpg"), "no such picture", "gone.jpg")

    def test_a_text_named_jpg(self, run, tmp_path):
        (tmp_path / "text.jpg").write_text("I am not a picture.")
        assert_one_error(self.ask(run, "text.jpg"), "text.jpg", "not a picture", "JPEG")

    def test_a_truncated_jpeg(self, run, tmp_path, cat):
        whole = cat.read_bytes()
        (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
        assert_one_error(self.ask(run, "half.jpg"), "half.jpg", "damaged", "truncated")

    def test_an_empty_file(self, run, tmp_path):
        (tmp_path / "empty.jpg").touch()
        assert_one_error(self.ask(run, "empty.jpg"), "empty.jpg")

    def test_a_directory(self, run, tmp_path):
        assert_one_error(self.ask(run, tmp_path), "is a directory")

    def test_a_bomb_of_30000_by_30000(self, run, tmp_path):
        assert_one_error(self.ask(run, huge_png(tmp_path / "bomb.png")), "bomb.png", "30000 x 30000", "40,000,000")

    def test_a_name_that_would_steer_the_terminal(self, run):
        result = self.ask(run, "\x1b[31mred\n.jpg")
        assert_one_error(result, "no such picture")
        assert "\x1b" not in result.err

    def test_one_pixel_works(self, run, tmp_path):
        Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
        result = self.ask(run, "dot.png")
        assert result.code == 0
        assert result.out.strip()


class TestModels:
    def test_an_unknown_name(self, run):
        assert_one_error(run("chat", "--model", "nanoo", *QUESTION), "nanoo", "nano")

    def test_a_name_that_no_file_can_have(self, run):
        assert_one_error(run("chat", "--model", "x" * 300, *QUESTION), "can't open the model", "too long")

    def test_a_directory_without_manifest(self, run, tmp_path):
        assert_one_error(run("chat", "--model", tmp_path, *QUESTION), "llava-edge.json")

    def test_a_gguf_in_place_of_a_bundle(self, run, tmp_path):
        (tmp_path / "llm.gguf").write_bytes(b"GGUF")
        assert_one_error(run("chat", "--model", "llm.gguf", *QUESTION), "llm.gguf", "--mmproj")

    def test_missing_gguf_files(self, run):
        assert_one_error(run("chat", "--llm", "a.gguf", "--mmproj", "b.gguf", *QUESTION), "a.gguf")

    def test_a_text_in_place_of_a_gguf(self, run, tmp_path, nano):
        (tmp_path / "text.gguf").write_text("no model")
        llm = next(nano.glob("llm-*.gguf"))
        assert_one_error(run("chat", "--llm", "text.gguf", "--mmproj", "text.gguf", *QUESTION), "text.gguf")
        assert_one_error(
            run("chat", "--llm", llm, "--mmproj", "text.gguf", "--image", _dot(tmp_path), *QUESTION), "text.gguf"
        )

    def test_a_language_model_in_place_of_the_mmproj(self, run, nano, tmp_path):
        llm = next(nano.glob("llm-*.gguf"))
        result = run("chat", "--llm", llm, "--mmproj", llm, "--image", _dot(tmp_path), *QUESTION)
        assert_one_error(result, llm.name)


@pytest.mark.usefixtures("nano")
class TestQuestions:
    def test_longer_than_the_context_says_both_numbers(self, run):
        result = run("chat", "--n-ctx", "256", "-p", "cat " * 1000)
        assert_one_error(result, "256")
        assert any(int(word.replace(",", "")) > 1000 for word in result.err.split() if word[:1].isdigit()), result.err

    def test_nothing_on_standard_input(self, run):
        assert_one_error(run("chat", "-p", "-"), "standard input", "empty")

    def test_bytes_that_are_no_text(self, run):
        assert_one_error(run("chat", "-p", "-", stdin=b"caf\xe9?"), "UTF-8")
        assert_one_error(run("chat", "-p", b"caf\xe9?"), "not valid text")

    def test_an_endless_input_is_refused(self, run):
        assert_one_error(run("chat", "-p", "-", stdin=b"x" * (17 * 1024 * 1024)), "standard input")


def _dot(directory: Path) -> Path:
    path = directory / "dot.png"
    Image.new("RGB", (1, 1), "red").save(path)
    return path
