"""Paths as terminals write them, at the start of a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_edge.cli.dropped import picture_path, split_pictures, unquoted


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "my cat's photo.jpg"
    path.write_bytes(b"")
    return path


def forms(path: Path) -> list[str]:
    """The ways in which terminals write a dropped file."""
    text = str(path)
    escaped = "".join(f"\\{c}" if c in " '()&" else c for c in text)
    return [text, escaped, f'"{text}"', "'" + text.replace("'", "'\\''") + "'", path.as_uri()]


def test_a_dropped_picture_is_found_in_every_form(picture):
    for form in forms(picture):
        assert split_pictures(form) == ([picture], ""), form


def test_a_question_may_follow_the_picture(picture):
    for form in forms(picture)[1:]:
        assert split_pictures(f"{form}  what's this?") == ([picture], "what's this?"), form


def test_several_pictures_can_be_dropped_at_once(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.webp"]
    for path in paths:
        path.touch()
    assert split_pictures(" ".join(map(str, paths))) == (paths, "")


def test_a_name_alone_is_a_picture_if_the_file_exists(picture, monkeypatch):
    monkeypatch.chdir(picture.parent)
    assert split_pictures(picture.name) == ([Path(picture.name)], "")
    assert split_pictures("dog.jpg") == ([], "dog.jpg")


def test_a_missing_absolute_picture_is_still_meant_as_one():
    assert split_pictures("/nowhere/cat.jpg") == ([Path("/nowhere/cat.jpg")], "")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "What is this?",
        "what's up",
        "/help",
        "/settings temperature 0.7",
        "/nonsense",
        "/save talk.md",
        "/",
        "it's 1/2 of a cat.jpg",
        '"quoted" question',
        "'open quote",
        "~",
        "x" * 5000,
        "/" + "x" * 5000,
        "a\0b",
        "~30 people in this picture?",
        "~nobody-of-this-name/cat",
        "file://[x",
    ],
)
def test_questions_and_commands_are_no_pictures(line):
    assert split_pictures(line) == ([], line)


@pytest.mark.parametrize("word", ["~nobody-of-this-name/x.jpg", "file://[x"])
def test_what_only_begins_like_a_home_or_a_url_is_taken_literally(word):
    assert picture_path(word) == Path(word)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("talk.md", "talk.md"),
        ("'my talk.md'", "my talk.md"),
        ('"my talk.md"', "my talk.md"),
        ("my\\ talk.md", "my talk.md"),
        ("my talk.md", "my talk.md"),
        ("it's.md", "it's.md"),
    ],
)
def test_a_name_may_be_quoted_and_need_not(text, name):
    assert unquoted(text) == name


def test_home_and_file_urls_are_understood(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert picture_path("~/a.png") == Path("/home/me/a.png")
    assert picture_path("file:///tmp/a%20b.png") == Path("/tmp/a b.png")
    assert picture_path("file://localhost/tmp/%C3%A4.png") == Path("/tmp/ä.png")
