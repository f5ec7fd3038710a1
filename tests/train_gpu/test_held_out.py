"""What is kept out of nano's training stays out of it."""

from __future__ import annotations

from pathlib import Path
from random import Random

from llava_edge.train_gpu.datagen import nano


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
