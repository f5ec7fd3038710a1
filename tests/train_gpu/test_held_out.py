"""What is kept out of nano's training stays out of it."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import matplotlib as mpl
import pytest
from PIL import Image

from llava_edge.train_gpu import prepare_nano
from llava_edge.train_gpu.datagen import nano, signs


def test_a_tenth_of_each_category_is_asked_and_never_trained_on(tmp_path: Path) -> None:
    for folder, count in (("car_side", 20), ("wild_cat", 30), ("anchor", 9)):
        (tmp_path / "caltech101-train" / folder).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "caltech101-train" / folder / f"image_{number:04d}.jpg").touch()
    asked = nano.held_out_caltech(tmp_path)
    assert [category for _, category, _ in asked] == ["car_side"] * 2 + ["wild_cat"] * 3
    assert {tuple(names) for _, category, names in asked if category == "wild_cat"} == {("wild cat", "cat", "wildcat")}
    trained = {sample["image"] for sample in nano._caltech(tmp_path, Random(1))}
    assert len(trained) == 54
    assert trained.isdisjoint(name for name, _, _ in asked)


def draw_photos(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (240, 230), (40 * number, 90, 200)).save(folder / f"{number}.png")


def test_drawn_pictures_are_parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("anchor", "ant", "axe", "cactus", "crab", "crown", "koala", "snail", "dog", "dog-face", "poodle")
    package = tmp_path / "package"
    package.mkdir()
    icons = {name: {"body": f'<circle cx="16" cy="16" r="{n + 4}"/>'} for n, name in enumerate(names)}
    (package / "icons.json").write_text(json.dumps({"prefix": "ours", "icons": icons, "width": 32}))
    (package / "metadata.json").write_text(json.dumps({"categories": {"Objects": list(names)}}))
    draw_photos(tmp_path / "root" / "flickr8k-train")
    monkeypatch.setattr(prepare_nano, "SCENES", 4)
    monkeypatch.setattr(prepare_nano, "HELD_OUT_SCENES", 3)
    monkeypatch.setattr(prepare_nano, "GROUNDS", 3)
    prepare_nano.draw_pictures([package], tmp_path / "root", tmp_path / "out", 1)

    trained = {path.name for path in (tmp_path / "root" / "icons").glob("*.jpg")}
    asked = {question["image"] for question in json.loads((tmp_path / "out" / "icons" / "questions.json").read_text())}
    assert len(trained) == prepare_nano.EACH * (len(names) - len(asked))
    assert len(asked) == 2  # of the three drawings of a dog
    assert trained.isdisjoint(asked)
    scenes = [[path.read_bytes() for path in sorted(folder.glob("*.jpg"))] for folder in
              (tmp_path / "root" / "scenes", tmp_path / "out" / "scenes")]  # fmt: skip
    assert [len(pictures) for pictures in scenes] == [4, 3]
    assert not set(scenes[0]) & set(scenes[1])


def test_words_that_are_kept_out_are_written_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fonts = []
    for number, name in enumerate(("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "cmr10", "STIXGeneral")):
        source = Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
        fonts.append(tmp_path / f"font{number}-latin-400-normal.woff")
        fonts[-1].write_bytes(source.read_bytes())
    draw_photos(tmp_path / "root" / "flickr8k-train")
    monkeypatch.setattr(prepare_nano, "SIGNS", 200)
    monkeypatch.setattr(prepare_nano, "HELD_OUT_SIGNS", 30)
    monkeypatch.setattr(prepare_nano, "GROUNDS", 3)
    prepare_nano.draw_signs(sorted(signs.SIGN_WORDS), fonts, tmp_path / "root", tmp_path / "out", 1)

    folders = (tmp_path / "root" / "signs", tmp_path / "out" / "signs", tmp_path / "out" / "signs-new")
    asked = [json.loads((folder / "questions.json").read_text()) for folder in folders]
    trained, known, new = ({question["answer"] for question in questions} for questions in asked)
    assert new.isdisjoint(trained | known)
    assert {question["kind"] for question in asked[2]} == {"new word"}
    assert known & trained
