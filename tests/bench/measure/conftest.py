from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_edge.bundle import BundleFile, open_bundle
from llava_edge.convert.quantize import quantize

CAPTIONS = {
    "picture0.png": ["A cat is sleeping on the table.", "A small cat on a table."],
    "picture1.png": ["The dog runs in the snow.", "A dog is in the snow."],
    "picture2.png": ["It is a photo of a small animal.", "A photo of an animal."],
}


@pytest.fixture(scope="session")
def captions(pictures: list[Path]) -> Path:
    """A caption file beside the pictures."""
    file = pictures[0].parent / "captions.json"
    file.write_text(json.dumps({"dev": CAPTIONS}))
    return file


@pytest.fixture(scope="session")
def make_variant(make_bundle: Callable[..., Path], tiny_llm: Path) -> Callable[[str], Path]:
    """The tiny bundle with its language model in another type."""

    def make(kind: str) -> Path:
        path = tiny_llm.with_name(f"llm-{kind}.gguf")
        if not path.exists():
            quantize(tiny_llm, path, kind, threads=1)
        return make_bundle(path, name=f"tiny-{kind}")

    return make


@pytest.fixture(scope="session")
def f16_bundle(
    make_bundle: Callable[..., Path], tiny_llm: Path, tiny_mmproj: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny bundle as a conversion without quantisation would make it."""
    root = tmp_path_factory.mktemp("f16")
    paths = [root / "llm-F16.gguf", root / "mmproj-F16.gguf"]
    for source, path in zip((tiny_llm, tiny_mmproj), paths, strict=True):
        quantize(source, path, "F16", threads=1)
    plain = open_bundle(make_bundle(*paths)).manifest.files
    files = [BundleFile(f.path, f.role, f.sha256, f.bytes, "F16") for f in plain]
    return make_bundle(*paths, files=tuple(files))
