"""How many of a picture's tokens, and which."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_edge
from llava_edge.budget import Pace, choose, pace_of
from llava_edge.cache import LIMIT_VARIABLE, DiskCache
from llava_edge.errors import InputError
from llava_edge.types import ImageSpec
from llava_edge.vision.tokens import METHODS, pool, reduce

PACE = Pace(0.5, 0.01)  # 576 tokens take 6.58 s, 144 take 2.26 s, 36 take 1.18 s


@pytest.mark.parametrize(("seconds", "count"), [(100, 576), (6.58, 576), (6.5, 144), (2.3, 144), (2.0, 36)])
def test_the_most_tokens_that_fit_the_budget(seconds: float, count: int) -> None:
    assert choose(PACE, {576: 576, 36: 36, 144: 144}, seconds) == count


def test_a_budget_that_can_not_be_met_says_what_can() -> None:
    with pytest.raises(
        InputError, match=r"within 1 s .* 36 tokens 1\.2 s, 144 tokens 2\.3 s, 576 tokens 6\.6 s"
    ) as error:
        choose(PACE, {576: 576, 144: 144, 36: 36}, 1.0)
    assert "from 1.2 s on" in str(error.value.hint)


def test_auto_takes_what_is_read_in_time(tiny_bundle: Path, pictures: list[Path]) -> None:
    options: dict[str, Any] = {"n_threads": 1, "n_ctx": 256}
    with llava_edge.load(tiny_bundle, image_tokens="auto", ttft_budget=60, **options) as model:
        assert model.image_tokens == 16
        assert model.chat().ask("What is it?", pictures[:1], max_tokens=2).usage.image_tokens == 16
    with pytest.raises(InputError, match="no first token within 1e-09 s"):
        llava_edge.load(tiny_bundle, ttft_budget=1e-9, **options)


def test_the_pace_is_measured_once(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(tmp_path))
    monkeypatch.delenv(LIMIT_VARIABLE)
    with llava_edge.load(tiny_bundle, n_threads=1, n_ctx=256) as model:
        first = pace_of(model)
        assert pace_of(model) == first
        assert first.encode_seconds > 0
        assert first.token_seconds > 0
        assert model.remembered is not None
        model.remembered.keep_fact(
            f"pace of {model.backend}", json.dumps({"encode_seconds": 50.0, "token_seconds": 1.0})
        )
    assert DiskCache().usage()["facts"].entries == 1
    slow = r"no first token within %s s on this machine; a picture of 4 tokens 86 s, 16 tokens 98 s"
    with pytest.raises(InputError, match=slow % 3):
        llava_edge.load(tiny_bundle, n_threads=1, n_ctx=256, image_tokens="auto", ttft_budget=3)
    with (
        caplog.at_level("WARNING"),  # nobody asked for three seconds
        llava_edge.load(tiny_bundle, n_threads=1, n_ctx=256, image_tokens="auto") as model,
    ):
        assert model.image_tokens == 4
    assert re.search(slow % 3 + "; taking the fewest", caplog.text)


@pytest.fixture
def tiled(make_bundle: Callable[..., Path], make_mmproj: Callable[..., Path]) -> Path:
    """A bundle whose pictures have up to 16 tiles."""
    half = (0.5, 0.5, 0.5)
    spec = ImageSpec(size=32, mean=half, std=half, mode="anyres", grid=((32, 32), (64, 64), (128, 128)))
    return make_bundle(mmproj=make_mmproj(newline=True), image=spec)


def test_the_largest_picture_fits_the_context(tiled: Path) -> None:
    picture = np.zeros((128, 128, 3), np.uint8)
    for n_ctx, tokens, whole in ((256, 4, 4 + 8 * 9), (512, 16, 16 + 16 * 17)):
        with llava_edge.load(tiled, n_threads=1, n_ctx=n_ctx, image_tokens="auto", ttft_budget=60) as model:
            assert model.image_tokens == tokens
            model.pages_whole = False  # a plain picture looks like a page
            assert model.chat().ask("What is it?", [picture], max_tokens=1).usage.image_tokens == whole


def test_every_tile_takes_its_time(tiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(tmp_path))
    monkeypatch.delenv(LIMIT_VARIABLE)
    with llava_edge.load(tiled, n_threads=1, n_ctx=512) as model:
        assert model.remembered is not None
        fact = {"encode_seconds": 2.0, "token_seconds": 1.0}  # of the probe, which is a picture of one tile
        model.remembered.keep_fact(f"pace of {model.backend}", json.dumps(fact))
        assert pace_of(model) == Pace(17.0, 1.0)
    with pytest.raises(InputError, match=r"a picture of 4 tokens 125 s, 16 tokens 337 s"):
        llava_edge.load(tiled, n_threads=1, n_ctx=512, image_tokens="auto", ttft_budget=3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image_tokens": 4, "ttft_budget": 1.0}, "image_tokens is 4; a budget"),
        ({"ttft_budget": 0.0}, r"ttft_budget is 0\.0"),
        ({"image_tokens": 7}, "image_tokens is 7; tiny can't pool"),
        ({"image_reduction": "best"}, "image_reduction is 'best'; expected one of pool, grid, random, diversity"),
    ],
)
def test_wrong_wishes_are_refused_in_words(tiny_bundle: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        llava_edge.load(tiny_bundle, n_threads=1, n_ctx=256, **options)
    if "image_tokens" in options and options["image_tokens"] == 7:
        assert error.value.hint == "Possible are 16, 4, 1."


def test_a_raw_pair_has_no_grid(tiny_llm: Path, tiny_mmproj: Path) -> None:
    with pytest.raises(InputError, match="image_tokens needs a bundle"):
        llava_edge.load(llm=tiny_llm, mmproj=tiny_mmproj, image_tokens="auto")


ROWS = np.random.default_rng(3).standard_normal((64, 5)).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [64, 16, 4, 1])
def test_every_method_gives_the_count_the_same_every_time(method: str, count: int) -> None:
    found = reduce(ROWS, (8, 8), count, method)
    assert found.shape == (count, 5)
    assert (found == reduce(ROWS, (8, 8), count, method)).all()
    if method != "pool":  # embeddings as they were, in their order
        places = [int(np.flatnonzero((row == ROWS).all(axis=1))[0]) for row in found]
        assert places == sorted(set(places))


def test_pooling_is_what_it_was() -> None:
    assert (reduce(ROWS, (8, 8), 16) == pool(ROWS, (8, 8), 16)).all()


def test_the_grid_takes_one_of_each_cell() -> None:
    rows = np.arange(64, dtype=np.float32)[:, None]
    places = reduce(rows, (8, 8), 16, "grid")[:, 0].astype(int)
    assert sorted({(place // 8 // 2, place % 8 // 2) for place in places}) == [
        (r, c) for r in range(4) for c in range(4)
    ]


def test_diversity_takes_one_of_each_kind() -> None:
    kinds = np.eye(4, dtype=np.float32)
    rows = np.repeat(kinds, [61, 1, 1, 1], axis=0)
    assert (reduce(rows, (8, 8), 4, "diversity") == kinds).all()


def test_a_reduction_has_embeddings_of_its_own(tiny_bundle: Path, pictures: list[Path]) -> None:
    found = {}
    for method in METHODS:
        with llava_edge.load(tiny_bundle, n_threads=1, n_ctx=256, image_tokens=4, image_reduction=method) as model:
            encoded = model.encode(model.open_picture(pictures[0])).chunks[0].embeddings
            assert encoded is not None
            found[method] = encoded.tobytes()
    assert len(set(found.values())) == len(METHODS)
