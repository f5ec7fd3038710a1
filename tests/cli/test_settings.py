"""What /settings accepts."""

from __future__ import annotations

import pytest

from llava_edge.cli.repl import Settings
from llava_edge.errors import InputError
from llava_edge.types import SamplingParams

START = Settings(SamplingParams())


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.7", 0.7),
        ("top-p", "0.5", 0.5),
        ("top_k", "7", 7),
        ("seed", "3", 3),
        ("seed", "none", None),
        ("max-tokens", "12", 12),
        ("stats", "on", True),
    ],
)
def test_a_setting_is_changed_and_the_others_stay(name, text, value):
    key = name.replace("-", "_")
    assert START.changed(name, text).values() == {**START.values(), key: value}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("temprature", "1", "did you mean temperature"),
        ("temperature", "warm", "expected a number"),
        ("temperature", "nan", "from 0 to"),
        ("temperature", "", "expected a number"),
        ("top-p", "2", "from 0 to 1"),
        ("top-k", "1.5", "expected a whole number"),
        ("max-tokens", "0", "expected 1 or more"),
        ("stats", "perhaps", "expected on or off"),
    ],
)
def test_a_wrong_setting_says_what_is_expected(name, text, words):
    with pytest.raises(InputError, match=words):
        START.changed(name, text)
