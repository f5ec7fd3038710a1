from __future__ import annotations

import itertools
import random

import pytest

from llava_edge.generate import TextStream


def streamed(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    shown = []
    for piece in pieces:
        shown.append(stream.push(piece))
        if stream.stopped:
            return shown, True
    return [*shown, stream.flush()], False


def test_characters_are_shown_whole() -> None:
    shown, _ = streamed([b"a", b"\xf0\x9f", b"\x99", b"\x82b", b"\xc3", b"\xbc"])
    assert shown == ["a", "", "", "🙂b", "", "ü", ""]


def test_a_character_that_is_cut_off_is_left_out() -> None:
    assert "".join(streamed([b"ab", b"\xf0\x9f"])[0]) == "ab"


def test_bytes_that_are_no_text_are_marked() -> None:
    assert "".join(streamed([b"a\xffb"])[0]) == "a\ufffdb"


def test_a_stop_text_ends_the_answer_and_is_not_shown() -> None:
    assert streamed([b"yes", b" ##", b"#", b" no"], ("###",)) == (["yes", " ", ""], True)
    assert streamed([b"one END two"], ("END", "one END")) == ([""], True)


def test_what_only_looks_like_a_stop_text_is_shown_in_the_end() -> None:
    shown, stopped = streamed([b"a#", b"#", b"b##"], ("###",))
    assert shown == ["a", "", "##b", "##"]
    assert not stopped


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_do_not_matter(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices(["a", "b", "ab", "é", "🙂", " "], k=40))
    stop = ("abab", "b🙂", "éé")
    data = text.encode()
    edges = sorted({0, len(data), *rng.choices(range(len(data)), k=15)})
    shown, stopped = streamed([data[a:b] for a, b in itertools.pairwise(edges)], stop)
    ends = [text.find(s) for s in stop if s in text]
    assert stopped == bool(ends)
    if len(ends) < 2:
        assert "".join(shown) == text[: min(ends, default=len(text))]
