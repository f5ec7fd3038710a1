"""Questions on one picture, read side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import llava_edge
from llava_edge.engine import Engine, EngineError
from llava_edge.errors import ContextFullError
from llava_edge.generate import Generation
from llava_edge.prompt import ImageRef, TokenRun, Unit
from llava_edge.sampling import Sampler
from llava_edge.side_by_side import SideBySide, exact_questions, groups
from llava_edge.types import SamplingParams
from llava_edge.vision import EncodedImage

QUESTIONS = ["What is it?", "Is there a circle in this picture?", "Why?", "What colour is the shape on the left?"]
Prompts = list[list[Unit]]
NOT_HERE = "questions read together feel each other on this machine, so they are read one by one"


@pytest.fixture(scope="module")
def wide(tiny_bundle: Path) -> Iterator[llava_edge.Model]:
    with llava_edge.load(tiny_bundle, n_threads=1, n_ctx=512, n_seq_max=4, cache=False) as model:
        if SideBySide(model).width == 1:
            pytest.skip(NOT_HERE)
        yield model


def prompts(model: llava_edge.Model, colour: str, questions: list[str]) -> tuple[Prompts, dict[str, EncodedImage]]:
    image = model.encode(model.open_picture(Image.new("RGB", (40, 30), colour)))
    turns = [model.format.turn(0, [ImageRef(image.key)], question, None) for question in questions]
    return [model.tokenizer.units(turn) for turn in turns], {image.key: image}


def answers(model: llava_edge.Model, beside: SideBySide, asked: Prompts, known: dict[str, EncodedImage]) -> list[str]:
    loops = [model.token_loop(Generation(), Sampler(SamplingParams()), 12) for _ in asked]
    beside.write(loops, beside.read(asked, known))
    return [loop.generation.text for loop in loops]


def test_every_question_gets_the_logits_and_the_answer_that_it_gets_alone(wide: llava_edge.Model) -> None:
    beside = SideBySide(wide)
    assert beside.width == 4
    for colour in ("red", "blue"):
        asked, known = prompts(wide, colour, QUESTIONS)
        assert len({len(units[-1].ids) for units in asked if isinstance(units[-1], TokenRun)}) > 1
        assert beside.fits(asked, known)
        together = beside.read(asked, known)
        texts = answers(wide, beside, asked, known)
        for units, row, text in zip(asked, together, texts, strict=True):
            wide.forget()
            alone = beside.read([units], known)[0]
            assert abs(alone - row).max() <= 1e-5 * abs(alone).max()
            assert answers(wide, beside, [units], known) == [text]


def test_it_is_what_the_usual_way_computes(wide: llava_edge.Model) -> None:
    beside = SideBySide(wide)
    asked, known = prompts(wide, "green", QUESTIONS)
    together = beside.read(asked, known)
    wide.forget()
    for units, row in zip(asked, together, strict=True):
        wide.cache.prefill(units, known)
        usual = wide.cache.logits()
        assert abs(usual - row).max() < 1e-3 * abs(usual).max()


def test_a_picture_is_evaluated_once(wide: llava_edge.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = SideBySide(wide)
    seen: list[int] = []
    evaluate = wide.engine.decode_embeddings
    monkeypatch.setattr(
        wide.engine, "decode_embeddings", lambda *args, **options: (seen.append(1), evaluate(*args, **options))
    )
    asked, known = prompts(wide, "red", QUESTIONS)
    first = answers(wide, beside, asked[:2], known)
    assert answers(wide, beside, asked, known)[:2] == first
    assert len(seen) == 1


def test_what_can_not_be_read_together_does_not_fit(wide: llava_edge.Model) -> None:
    beside = SideBySide(wide)
    red, known = prompts(wide, "red", QUESTIONS)
    blue, more = prompts(wide, "blue", QUESTIONS)
    known |= more
    assert not beside.fits([red[0], blue[0]], known)
    assert not beside.fits([*red, red[0]], known)
    assert not beside.fits([[*red[0][:-1]]], known)  # ends with the picture
    begin: list[Unit] = [TokenRun((5, 6, 7, 8)), red[0][-2]]
    room = wide.engine.n_ctx - sum(wide.cache.check_room(begin, known))
    assert room % 4 == 0
    longest = [*begin, TokenRun((5,) * (room - 1))]
    wide.cache.prefill(longest, known)  # there is room for it, and none to lengthen it
    assert not beside.fits([longest], known)
    with pytest.raises(ContextFullError):
        beside.fits([[*begin, TokenRun((5,) * room)]], known)


def test_with_one_sequence_there_is_nothing_beside(tiny_model: llava_edge.Model) -> None:
    beside = SideBySide(tiny_model)
    asked, known = prompts(tiny_model, "red", QUESTIONS)
    assert beside.width == 0
    assert not beside.fits(asked[:1], known)


def test_runs_of_several_lengths_leave_each_where_it_ends(tiny_llm: Path) -> None:
    engine = Engine(tiny_llm, n_ctx=64, n_threads=1, n_batch=64, n_seq_max=3)
    try:
        assert exact_questions(engine) == 0  # three of them are more than a batch
        engine.decode_side_by_side({0: [5, 6, 7], 1: [8], 2: [9, 10, 11, 12, 13]})
        assert [engine.position(seq) for seq in range(3)] == [3, 1, 5]
        with pytest.raises(EngineError, match="expected numbers"):
            engine.decode_side_by_side({0: [5], 1: [engine.n_vocab]})
        with pytest.raises(EngineError, match="a batch holds 64"):
            engine.decode_side_by_side({0: [5] * 40, 1: [6] * 40})
        assert [engine.position(seq) for seq in range(3)] == [3, 1, 5]
    finally:
        engine.close()


def test_long_conversations_are_evaluated_one_by_one() -> None:
    assert groups({0: 20, 1: 300, 2: 30, 3: 40}, 3) == [[0], [2, 3], [1]]


def test_nano_answers_the_same_beside_others(nano: llava_edge.Model) -> None:
    """Real weights in the types that it ships with, and a sequence that is longer than a block of attention."""
    name = nano.bundle.directory if nano.bundle else None
    with llava_edge.load(name, n_seq_max=3, n_ctx=1024, cache=False) as model:
        beside = SideBySide(model)
        asked, known = prompts(model, "red", QUESTIONS)
        if beside.width == 1:
            pytest.skip(NOT_HERE)
        apart = [answers(model, beside, [units], known)[0] for units in asked]
        assert answers(model, beside, asked[:3], known) + answers(model, beside, asked[3:], known) == apart
