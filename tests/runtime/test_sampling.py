from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from llava_edge.errors import InputError, ModelError
from llava_edge.sampling import Sampler, candidates, likeliest
from llava_edge.types import SamplingParams

OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}


def logits(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    sampler = Sampler(SamplingParams())
    assert sampler.choose(np.array([0, 3, 1, 3], np.float32)) == 1


def test_a_seed_gives_the_same_choices() -> None:
    row = np.random.default_rng(0).standard_normal(500).astype(np.float32)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.choose(row) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_choices_without_a_seed_differ() -> None:
    row = np.zeros(10_000, np.float32)
    params = SamplingParams(temperature=1.0, **OFF)
    assert len({Sampler(params).choose(row) for _ in range(10)}) > 1


def test_tokens_come_as_often_as_they_are_likely() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1, **OFF))
    row = logits(0.5, 0.3, 0.2)
    counts = Counter(sampler.choose(row) for _ in range(4000))
    assert [counts[i] / 4000 for i in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    row = logits(0.8, 0.2)
    cold, hot = (candidates(row, SamplingParams(temperature=t, **OFF))[1] for t in (0.5, 2.0))
    assert cold.tolist() == pytest.approx([16 / 17, 1 / 17], rel=1e-5)
    assert hot.tolist() == pytest.approx([2 / 3, 1 / 3], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [3, 1]),
        ({"top_k": 1}, [3]),
        ({"top_k": 99}, [3, 1, 0, 2]),
        ({"top_p": 0.5}, [3]),
        ({"top_p": 0.51}, [3, 1]),
        ({"top_p": 0.0}, [3]),
        ({"min_p": 0.35}, [3, 1, 0]),
        ({"min_p": 1.0}, [3]),
        ({"top_k": 3, "top_p": 0.85, "min_p": 0.5}, [3, 1]),
        ({}, [3, 1, 0, 2]),
    ],
)
def test_filters_narrow_the_choice(options: dict[str, float], kept: list[int]) -> None:
    params = SamplingParams(temperature=1.0, **{**OFF, **options})  # type: ignore[arg-type]
    ids, probabilities = candidates(logits(0.19, 0.26, 0.05, 0.5), params)
    assert ids.tolist() == kept
    assert probabilities.sum() == pytest.approx(1)


def test_equal_logits_at_the_edge_of_top_k_keep_the_lower_ids() -> None:
    ids, _ = candidates(np.zeros(50, np.float32), SamplingParams(temperature=1.0, top_k=3, top_p=1.0, min_p=0.0))
    assert ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [1, 2, 257, 5000])
def test_a_whole_vocabulary_falls_and_equals_keep_their_order(size: int) -> None:
    chance = np.random.default_rng(size)
    spread = chance.standard_normal(size).astype(np.float32)
    tied = np.round(spread * 2).astype(np.float32)
    tied[chance.random(size) < 0.2] = -0.0
    tied[chance.random(size) < 0.2] = -np.inf
    for logits in (spread, tied, spread * np.float32(1e-42)):
        assert likeliest(logits, 0).tolist() == sorted(range(size), key=lambda place: (-logits[place], place))


def test_small_temperatures_do_not_overflow() -> None:
    row = np.array([1e4, -1e4, 9.99e3], np.float32)
    assert Sampler(SamplingParams(temperature=1e-3, seed=0, **OFF)).choose(row) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_an_error(bad: float) -> None:
    row = np.zeros(9, np.float32)
    row[4] = bad
    with pytest.raises(ModelError, match="not numbers"):
        Sampler(SamplingParams()).choose(row)


def test_masked_logits_are_never_chosen() -> None:
    row = np.full(100, -np.inf, np.float32)
    row[[3, 50]] = 0
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0))
    assert {sampler.choose(row) for _ in range(50)} == {3, 50}


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", float("nan")), ("top_p", 1.1), ("top_k", -1), ("min_p", 2), ("seed", -1)],
)
def test_options_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
