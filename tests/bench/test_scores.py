"""Scores against values worked out by hand or by the published scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_edge.bench.tasks.cider import cider_d, words
from llava_edge.bench.tasks.evaluate import Answer, read_captions, score_captions, score_classes, wilson
from llava_edge.errors import InputError

REFERENCES = [
    ["a dog runs in the snow", "a black dog in snow"],
    ["two children play football", "kids play with a ball"],
]


def test_a_caption_equal_to_its_only_reference_scores_ten() -> None:
    references = [["a dog runs in the snow"], ["two children play football"], ["a boat on the sea"]]
    mean, scores = cider_d([texts[0] for texts in references], references)
    assert scores == pytest.approx([10, 10, 10])
    assert mean == pytest.approx(10)


def test_words_that_every_picture_has_weigh_nothing() -> None:
    references = [["a a a a"], ["a a a a"]]
    assert cider_d(["a a a a", "a a a a"], references)[0] == 0


def test_the_length_penalty_is_a_gaussian_of_width_six() -> None:
    # Candidate and reference share one word; only unigrams match, so the score is worked out by hand.
    references = [["dog"], ["cat"]]
    _, scores = cider_d(["dog", "cat cat cat cat"], references)
    assert scores[0] == pytest.approx(10 / 4)
    penalty = 2.718281828459045 ** (-(3**2) / (2 * 6**2))
    # Unigram: clipped weight 1 against norm 4 x 1; longer n-grams of the candidate have no partner.
    assert scores[1] == pytest.approx(10 / 4 * penalty / 4)


def test_values_of_the_published_script() -> None:
    """Made with pycocoevalcap 1.2 on the same words."""
    mean, scores = cider_d(["a dog in the snow", "children play with a football"], REFERENCES)
    assert scores == pytest.approx(PUBLISHED)
    assert mean == pytest.approx(sum(PUBLISHED) / 2)


PUBLISHED = [3.5354397240222997, 2.9471026788196037]


def test_words_are_lower_cased_without_punctuation() -> None:
    assert words("A dog's ball, and 2 cats.") == ["a", "dog's", "ball", "and", "2", "cats"]


def test_an_answer_that_names_both_classes_is_wrong() -> None:
    said = [("It is a cat.", "cat"), ("A dog", "dog"), ("a cat or a dog", "dog"), ("category", "cat")]
    score = score_classes([Answer("x", "q", text, (expected,)) for text, expected in said])
    assert score["accuracy"] == 0.5
    assert score["by_class"] == {"cat": "1/2", "dog": "1/2"}


def test_wilson_interval_of_a_textbook_case() -> None:
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(5, 5)[1] == 1.0


def test_the_interval_holds_the_mean() -> None:
    answers = [Answer("x", "q", t[0], tuple(t)) for t in REFERENCES]
    score = score_captions(answers)
    assert score["interval"][0] <= score["cider_d"] <= score["interval"][1]


def test_a_caption_file_without_its_pictures_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"dev": {"a.jpg": ["x"]}}))
    with pytest.raises(InputError, match=r"lacks 1 pictures.*a\.jpg"):
        read_captions(file, "dev", tmp_path)
    with pytest.raises(InputError, match="split 'test'"):
        read_captions(file, "test", tmp_path)
