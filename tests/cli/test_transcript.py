"""A conversation as a file."""

from __future__ import annotations

import json

import pytest

from llava_edge.cli import transcript
from llava_edge.errors import InputError

RECORD = {"model": "nano", "system": None, "settings": {"temperature": 0.0}}
TURNS = [("user", "What is this?", ("cat.jpg",)), ("assistant", "A cat 🐈.", ())]


def test_json_has_the_settings_and_every_turn(tmp_path):
    path = tmp_path / "talk.json"
    transcript.save(path, RECORD, TURNS)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        **RECORD,
        "turns": [
            {"role": "user", "text": "What is this?", "images": ["cat.jpg"]},
            {"role": "assistant", "text": "A cat 🐈.", "images": []},
        ],
    }


def test_markdown_reads_as_a_conversation(tmp_path):
    path = tmp_path / "talk.md"
    transcript.save(path, {**RECORD, "system": "Be brief."}, TURNS)
    assert path.read_text(encoding="utf-8") == (
        "# Conversation with nano\n\nSystem: Be brief.\n\n"
        "## You\n\n- picture: cat.jpg\n\nWhat is this?\n\n## Answer\n\nA cat 🐈.\n"
    )


def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=r"talk\.docx") as error:
        transcript.save(tmp_path / "talk.docx", RECORD, TURNS)
    assert ".md" in error.value.hint
    assert ".json" in error.value.hint


def test_a_folder_that_does_not_exist_is_an_error_in_words(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        transcript.save(tmp_path / "no" / "talk.md", RECORD, TURNS)


def test_a_name_that_is_no_text_is_written_all_the_same(tmp_path):
    turns = [("user", "What is this?", ("caf\udce9.jpg",))]
    transcript.save(tmp_path / "talk.md", RECORD, turns)
    assert "- picture: caf\\udce9.jpg" in (tmp_path / "talk.md").read_text(encoding="utf-8")
    transcript.save(tmp_path / "talk.json", RECORD, turns)
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert saved["turns"][0]["images"] == ["caf\udce9.jpg"]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_an_error_in_words(tmp_path, name):
    with pytest.raises(InputError, match="can't write"):
        transcript.save(tmp_path / f"{name}.md", RECORD, TURNS)


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "talk.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        transcript.save(path, {"model": object()}, TURNS)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
