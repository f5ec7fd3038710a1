"""Scores against values worked out by hand or by the published scripts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llava_edge.bench.tasks import stats
from llava_edge.bench.tasks.cider import cider_d
from llava_edge.bench.tasks.ngrams import bleu4, bleu_counts, rouge_l, words
from llava_edge.bench.tasks.stats import mcnemar, wilson

REFERENCES = [
    ["a dog runs in the snow", "a black dog in snow"],
    ["two children play football", "kids play with a ball"],
]
CAPTIONS = ["a dog in the snow", "children play with a football"]


class TestCider:
    def test_a_caption_equal_to_its_only_reference_scores_ten(self) -> None:
        references = [["a dog runs in the snow"], ["two children play football"], ["a boat on the sea"]]
        mean, scores = cider_d([texts[0] for texts in references], references)
        assert scores == pytest.approx([10, 10, 10])
        assert mean == pytest.approx(10)

    def test_words_that_every_picture_has_weigh_nothing(self) -> None:
        references = [["a a a a"], ["a a a a"]]
        assert cider_d(["a a a a", "a a a a"], references)[0] == 0

    def test_the_length_penalty_is_a_gaussian_of_width_six(self) -> None:
        # Candidate and reference share one word; only unigrams match, so the score is worked out by hand.
        references = [["dog"], ["cat"]]
        _, scores = cider_d(["dog", "cat cat cat cat"], references)
        assert scores[0] == pytest.approx(10 / 4)
        penalty = math.exp(-(3**2) / (2 * 6**2))
        # Unigram: clipped weight 1 against norm 4 x 1; longer n-grams of the candidate have no partner.
        assert scores[1] == pytest.approx(10 / 4 * penalty / 4)

    def test_values_of_the_published_script(self) -> None:
        """Made with pycocoevalcap 1.2 on the same words."""
        _, scores = cider_d(CAPTIONS, REFERENCES)
        assert scores == pytest.approx([3.5354397240222997, 2.9471026788196037])

    def test_an_empty_caption_scores_nothing(self) -> None:
        assert cider_d(["", "kids play with a ball"], REFERENCES)[1][0] == 0


class TestBleuAndRouge:
    """The long values were made with pycocoevalcap 1.2 on the same words."""

    HORSE = (
        "a man rides a brown horse on the beach",
        ["a man rides a brown horse on a beach", "the man is riding a horse"],
    )
    DOGS = ("two dogs", ["two dogs play in the grass near a tree", "a pair of dogs"])

    def corpus(self, *pairs: tuple[str, list[str]]) -> float:
        return bleu4(np.sum([bleu_counts(*pair) for pair in pairs], axis=0).tolist())

    def test_bleu_of_the_published_script(self) -> None:
        assert self.corpus(*zip(CAPTIONS, REFERENCES, strict=True)) == pytest.approx(9.240738949809269e-05)
        assert self.corpus(self.HORSE, self.DOGS) == pytest.approx(0.6504238021220484)

    def test_rouge_of_the_published_script(self) -> None:
        assert [rouge_l(*pair) for pair in (self.HORSE, self.DOGS)] == pytest.approx(
            [0.8888888888888888, 0.3609467455621302]
        )
        assert rouge_l(CAPTIONS[1], REFERENCES[1]) == pytest.approx(0.6802973977695167)

    def test_a_copy_is_perfect_and_nothing_is_worth_nothing(self) -> None:
        text = "a man on a brown horse"
        assert self.corpus((text, [text])) == pytest.approx(1)
        assert rouge_l(text, [text]) == 1
        assert self.corpus(("", [text])) == pytest.approx(0)
        assert rouge_l("", [text]) == 0

    def test_the_closest_reference_gives_the_length_and_the_shorter_of_two(self) -> None:
        assert bleu_counts("a b c", ["a b", "a b c d"])[-2:] == [3, 2]

    def test_matches_are_clipped_to_the_reference(self) -> None:
        assert bleu_counts("the the the", ["the cat", "the the dog"])[:2] == [2, 1]

    def test_words_are_lower_cased_without_punctuation(self) -> None:
        assert words("A dog's ball, and 2 cats.") == ["a", "dog's", "ball", "and", "2", "cats"]


class TestIntervals:
    def test_wilson_interval_of_a_textbook_case(self) -> None:
        low, high = wilson(81, 263)
        assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
        assert wilson(5, 5)[1] == 1.0

    def test_the_bootstrap_is_near_the_normal_interval_and_the_same_every_time(self) -> None:
        values = np.random.default_rng(3).normal(5, 2, 400)
        names = [str(number) for number in range(400)]
        metric = stats.mean(names, values.tolist())
        assert metric == stats.mean(names, values.tolist())
        half = 1.96 * values.std() / 20
        assert metric.value == pytest.approx(values.mean())
        assert metric.low == pytest.approx(values.mean() - half, abs=half / 5)
        assert metric.high == pytest.approx(values.mean() + half, abs=half / 5)

    def test_questions_on_one_picture_are_no_independent_evidence(self) -> None:
        values = [float(n % 2) for n in range(40) for _ in range(10)]
        alone = stats.mean([str(n) for n in range(400)], values)
        together = stats.mean([str(n // 10) for n in range(400)], values)
        assert alone.low is not None
        assert together.low is not None
        assert together.low < alone.low

    def test_without_samples_there_is_no_value(self) -> None:
        assert stats.mean([], []) == stats.Metric(None)
        assert stats.share(0, 0) == stats.Metric(None)

    def test_mcnemar_is_the_coin_toss_that_it_should_be(self) -> None:
        assert mcnemar(0, 0) == 1
        assert mcnemar(5, 5) == 1
        assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
        assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
        assert mcnemar(400, 600) == pytest.approx(mcnemar(600, 400))
        assert mcnemar(400, 600) < 1e-9
