"""Errors that tell what to do."""

from __future__ import annotations

import pytest

from llava_edge.errors import MissingExtraError, require_extra


def test_a_missing_extra_names_what_is_missing_and_the_command() -> None:
    with pytest.raises(MissingExtraError, match="no_such_package") as caught:
        require_extra("train", "json", "no_such_package")
    assert "json" not in str(caught.value)
    assert "pip install '.[train]'" in str(caught.value.hint)


def test_what_is_installed_is_no_error() -> None:
    require_extra("train", "json", "pathlib")
