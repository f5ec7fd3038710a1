from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llava_edge
from llava_edge.bundle import MANIFEST_NAME
from llava_edge.errors import InputError, ModelError


def test_a_bundle_is_loaded_from_its_directory(tiny_bundle: Path, pictures: list[Path]) -> None:
    with llava_edge.load(tiny_bundle, n_threads=1, n_ctx=256) as model:
        assert model.name == "tiny"
        assert model.image_tokens == 4
        assert model.load_seconds > 0
        assert model.chat().ask("What is it?", pictures[:1], max_tokens=3).usage.image_tokens == 4
        described = model.describe()
    assert described == {
        "model": "tiny",
        "llm": "tiny.gguf",
        "mmproj": "mmproj.gguf",
        "n_ctx": 256,
        "n_threads": 1,
        "n_gpu_layers": described["n_gpu_layers"],
        "image_tokens": 4,
        "vision_backend": "mtmd",
    }


def test_the_tower_is_loaded_with_the_first_picture(tiny_bundle: Path, pictures: list[Path]) -> None:
    with llava_edge.load(tiny_bundle, n_threads=1) as model:
        chat = model.chat()
        chat.ask("What is it?", max_tokens=1)
        assert model._encoder is None
        chat.ask("What is it?", pictures[:1], max_tokens=1)
        assert model._encoder is not None


def test_a_raw_pair_speaks_its_own_template(tiny_llm: Path, tiny_mmproj: Path, pictures: list[Path]) -> None:
    with llava_edge.load(llm=tiny_llm, mmproj=tiny_mmproj, n_threads=1) as model:
        assert model.image_tokens is None
        chat = model.chat()
        first = chat.ask("What is it?", pictures[:1], max_tokens=4)
        assert first.usage.image_tokens == 16
        second = chat.ask("Why?", max_tokens=4)
        assert second.usage.cached_tokens == first.usage.prompt_tokens + first.usage.completion_tokens - 1
        assert not model.format.marked_images  # type: ignore[attr-defined]


def test_a_raw_pair_with_marks_and_mrope(
    make_llm: Callable[..., Path], make_mmproj: Callable[..., Path], pictures: list[Path]
) -> None:
    with llava_edge.load(llm=make_llm(arch="qwen2vl"), mmproj=make_mmproj(kind="qwen2vl_merger"), n_threads=1) as model:
        chat = model.chat()
        first = chat.ask("What is it?", pictures[:1], max_tokens=4)
        second = chat.ask("Why?", pictures[1:2], max_tokens=4)
        assert second.usage.cached_tokens == first.usage.prompt_tokens + first.usage.completion_tokens - 1
        assert model.format.marked_images  # type: ignore[attr-defined]
        model.cache.clear()
        chat._turns = chat._turns[:1]
        assert chat.ask("Why?", pictures[1:2], max_tokens=4).token_ids == second.token_ids


def test_tokens_a_picture_can_be_chosen(
    tiny_bundle: Path, pictures: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with llava_edge.load(tiny_bundle, n_threads=1, image_tokens=16) as model:
        assert model.chat().ask("What is it?", pictures[:1], max_tokens=1).usage.image_tokens == 16
    assert "has not learnt" not in caplog.text
    with caplog.at_level(logging.WARNING), llava_edge.load(tiny_bundle, n_threads=1, image_tokens=1) as model:
        assert model.chat().ask("What is it?", pictures[:1], max_tokens=1).usage.image_tokens == 1
    assert "has not learnt to read 1 tokens a picture, only 16, 4" in caplog.text
    with pytest.raises(InputError, match="image_tokens is 5"):
        llava_edge.load(tiny_bundle, image_tokens=5)


def test_a_bundle_without_a_probe_says_so(
    make_bundle: Callable[..., Path], pictures: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), llava_edge.load(make_bundle(), n_threads=1) as model:
        model.chat().ask("What is it?", pictures[:1], max_tokens=1)
    assert "has no probe" in caplog.text


def test_a_tower_with_another_grid_than_the_manifest_is_refused(
    make_bundle: Callable[..., Path], make_mmproj: Callable[..., Path], pictures: list[Path]
) -> None:
    bundle = make_bundle(mmproj=make_mmproj(image_size=48))
    with (
        llava_edge.load(bundle, n_threads=1) as model,
        pytest.raises(ModelError, match="36 tokens a picture; the manifest says 16"),
    ):
        model.chat().ask("What is it?", pictures[:1])


def test_wrong_parts_are_refused_in_words(
    tiny_llm: Path, tiny_mmproj: Path, make_mmproj: Callable[..., Path], make_llm: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"can't open the model 'xxx.*: File name too long"):
        llava_edge.load("x" * 300)
    with pytest.raises(ModelError, match="no model 'nanoo'"):
        llava_edge.load("nanoo")
    with pytest.raises(ModelError, match="no such model file"):
        llava_edge.load(llm=tmp_path / "no.gguf", mmproj=tiny_mmproj)
    with pytest.raises(ModelError, match="no such model file"):
        llava_edge.load(llm=tiny_llm, mmproj=tmp_path / "no.gguf")
    with pytest.raises(InputError, match="llm without mmproj"):
        llava_edge.load(llm=tiny_llm)
    with pytest.raises(InputError, match="mmproj without llm"):
        llava_edge.load(mmproj=tiny_mmproj)
    with pytest.raises(InputError, match="not both"):
        llava_edge.load("nano", llm=tiny_llm, mmproj=tiny_mmproj)
    with pytest.raises(InputError, match="image_tokens needs a bundle"):
        llava_edge.load(llm=tiny_llm, mmproj=tiny_mmproj, image_tokens=4)
    with pytest.raises(InputError, match="n_ctx is 0"):
        llava_edge.load(llm=tiny_llm, mmproj=tiny_mmproj, n_ctx=0)
    with pytest.raises(ModelError, match="no chat template"):
        llava_edge.load(llm=make_llm(template=None), mmproj=tiny_mmproj)


def test_a_pair_of_different_widths_is_refused_with_both_numbers(
    tiny_llm: Path, make_mmproj: Callable[..., Path], pictures: list[Path]
) -> None:
    with (
        llava_edge.load(llm=tiny_llm, mmproj=make_mmproj(width=80), n_threads=1) as model,
        pytest.raises(ModelError, match=r"width 80; the language model .* reads 64"),
    ):
        model.chat().ask("What is it?", pictures[:1])


def test_a_system_message_needs_a_place(make_bundle: Callable[..., Path], tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / MANIFEST_NAME).read_text())
    manifest["prompt"]["system"] = ""
    bare = make_bundle()
    files = json.loads((bare / MANIFEST_NAME).read_text())["files"]
    (bare / MANIFEST_NAME).write_text(json.dumps({**manifest, "files": files}))
    with llava_edge.load(bare, n_threads=1) as model, pytest.raises(InputError, match="no place for a system message"):
        model.chat("Be kind.")


def test_a_closed_model_says_so(tiny_bundle: Path) -> None:
    model = llava_edge.load(tiny_bundle, n_threads=1)
    chat = model.chat()
    model.close()
    model.close()
    with pytest.raises(llava_edge.LlavaEdgeError, match="closed"):
        chat.ask("Why?")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, llava_edge, llava_edge.errors\n"
        "heavy = ['torch', 'transformers', 'onnxruntime', 'llama_cpp', 'numpy', 'PIL', 'gguf', 'jinja2']\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "llava_edge.load, llava_edge.ChatSession, llava_edge.open_image\n"
        "print([name for name in heavy[:4] if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"


def test_public_names_are_there() -> None:
    for name in llava_edge.__all__:
        assert getattr(llava_edge, name) is not None
    assert set(llava_edge.__all__) <= set(dir(llava_edge))
    with pytest.raises(AttributeError, match="nothing"):
        llava_edge.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_nano_calls_the_cat_a_cat_and_reads_it_once(nano: llava_edge.Model) -> None:
    cat = Path(__file__).parents[2] / "examples" / "cat.jpg"
    chat = nano.chat()
    first = chat.ask("What animal is in this picture?", [cat], max_tokens=32)
    second = chat.ask("What colour is it?", max_tokens=32)
    assert "cat" in first.text.lower()
    evaluated = second.usage.prompt_tokens - second.usage.cached_tokens
    assert evaluated <= 0.2 * first.usage.prompt_tokens
    again = nano.chat().ask("What animal is in this picture?", [cat], max_tokens=32)
    assert again.token_ids == first.token_ids
    picture = nano.open_picture(cat)
    assert nano.encode(picture) is nano.encode(picture)
