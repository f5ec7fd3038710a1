"""A bundle opens only when its manifest is understood and its files are there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.bundle import MANIFEST_NAME, Manifest, Probe, open_bundle, probe_picture, resolve_model
from llava_edge.errors import ModelError

Change = Callable[[dict[str, Any]], object]


def manifest_fields() -> dict[str, Any]:
    content = b"not really a model"
    return {
        "schema": 1,
        "name": "tiny",
        "family": "llava",
        "license": "Apache-2.0",
        "source": "made by a test",
        "files": [
            {
                "path": "llm-F16.gguf",
                "role": "llm",
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
                "type": "F16",
            }
        ],
        "prompt": {
            "bos": "",
            "system": "<|im_start|>system\n{system}<|im_end|>\n",
            "default_system": None,
            "user_prefix": "<|im_start|>user\n",
            "user_suffix": "<|im_end|>\n",
            "assistant_prefix": "<|im_start|>assistant\n",
            "turn_end": "<|im_end|>\n",
            "stop": ["<|im_end|>"],
            "image_suffix": "\n",
        },
        "image": {"mode": "pad", "size": 28, "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1], "pad_color": [1, 2, 3]},
        "visual_tokens": {"full": 4, "grid": [2, 2], "trained": [4, 1], "default": 1},
        "feature_layers": [1, 2],
        "backends": ["mtmd"],
        "probe": None,
        "parity": None,
    }


def write_bundle(directory: Path, fields: dict[str, Any] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "llm-F16.gguf").write_bytes(b"not really a model")
    (directory / MANIFEST_NAME).write_text(json.dumps(fields or manifest_fields()))
    return directory


def test_a_manifest_survives_writing_and_reading() -> None:
    fields = manifest_fields()
    embeddings = np.arange(12, dtype=np.float32).reshape(4, 3)
    probe = Probe.of((0, 3), embeddings)
    fields["probe"] = {"token_rows": list(probe.token_rows), "embeddings": probe.embeddings}
    fields["parity"] = {"mmproj": {"cosine_mean": 0.9999}}
    manifest = Manifest.from_json(json.dumps(fields))
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.probe is not None
    np.testing.assert_array_equal(again.probe.array, embeddings[[0, 3]])
    assert again.image.pad_color == (1, 2, 3)
    assert again.prompt.stop == ("<|im_end|>",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(extra=1), "unknown key extra"),
        (lambda m: m["prompt"].update(greeting="hi"), "unknown key prompt.greeting"),
        (lambda m: m["files"][0].update(url="x"), r"unknown key files\[0\].url"),
        (lambda m: m.pop("license"), "missing key license"),
        (lambda m: m.pop("probe"), "missing key probe"),
        (lambda m: m["image"].pop("mean"), "missing key image.mean"),
        (lambda m: m.update(schema=2), "schema is 2"),
        (lambda m: m.update(name=3), "name is 3; expected a text"),
        (lambda m: m["image"].update(size="224"), 'image.size is "224"; expected a whole number'),
        (lambda m: m["image"].update(size=0), "image.size is 0"),
        (lambda m: m["image"].update(std=[1, 1]), "image.std"),
        (lambda m: m["image"].update(mode="stretch"), "image.mode is 'stretch'"),
        (lambda m: m["visual_tokens"].update(full=True), "visual_tokens.full is true"),
        (lambda m: m["visual_tokens"].update(grid=[3, 2]), "visual_tokens.grid"),
        (lambda m: m["visual_tokens"].update(default=2), "visual_tokens.default is 2"),
        (lambda m: m["files"][0].update(path="../llm.gguf"), r"files\[0\].path"),
        (lambda m: m["files"][0].update(path="/etc/passwd"), r"files\[0\].path"),
        (lambda m: m["files"][0].update(path="a\\..\\b"), r"files\[0\].path"),
        (lambda m: m["files"][0].update(path="C:x"), r"files\[0\].path"),
        (lambda m: m["files"][0].update(path=""), r"files\[0\].path"),
        (lambda m: m["files"][0].update(sha256="00"), r"files\[0\].sha256"),
        (lambda m: m["files"][0].update(role="tower"), r"files\[0\].role"),
        (lambda m: m["files"].append(m["files"][0]), "files has two entries"),
        (lambda m: m.update(files=[]), "no entry of role llm"),
        (lambda m: m.update(backends=["cuda"]), "backends has 'cuda'"),
        (lambda m: m.update(probe={"token_rows": [0], "embeddings": "*"}), "probe.embeddings is not base64"),
        (lambda m: m.update(probe={"token_rows": [0, 1], "embeddings": "AAA="}), "probe.embeddings has 2 bytes"),
        (lambda m: m["prompt"].update(system="no slot"), "prompt.system"),
        (lambda m: m["prompt"].update(system="", default_system="Be short."), "prompt.default_system"),
    ],
)
def test_a_wrong_manifest_is_refused_by_the_name_of_its_key(change: Change, said: str, tmp_path: Path) -> None:
    fields = manifest_fields()
    change(fields)
    with pytest.raises(ModelError, match=said):
        open_bundle(write_bundle(tmp_path, fields))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": NaN}', '{"schema": 1, "schema": 1}', "[" * 100_000])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="manifest"):
        Manifest.from_json(text)


def test_files_are_found_by_role(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path))
    assert bundle.file("llm") == tmp_path / "llm-F16.gguf"
    with pytest.raises(ModelError, match="no file of role mmproj"):
        bundle.file("mmproj")


def test_a_missing_or_shortened_file_is_noticed_on_opening(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    (tmp_path / "llm-F16.gguf").write_bytes(b"short")
    with pytest.raises(ModelError, match="has 5 bytes; the manifest says 18"):
        open_bundle(tmp_path)
    (tmp_path / "llm-F16.gguf").unlink()
    with pytest.raises(ModelError, match="is missing"):
        open_bundle(tmp_path)


def test_a_changed_byte_is_noticed_by_verify(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path))
    bundle.verify()
    bundle.file("llm").write_bytes(b"not really A model")
    with pytest.raises(ModelError, match=r"llm-F16.gguf is damaged"):
        open_bundle(tmp_path).verify()


def test_models_are_found_by_directory_and_unknown_names_are_refused(tmp_path: Path) -> None:
    directory = write_bundle(tmp_path / "mine")
    assert resolve_model(directory).manifest.name == "tiny"
    assert resolve_model(str(directory)).directory == directory
    with pytest.raises(ModelError, match="no model 'giant'") as caught:
        resolve_model("giant")
    assert caught.value.hint
    with pytest.raises(ModelError, match="is not a model"):
        resolve_model(tmp_path)


def test_the_probe_picture_never_changes() -> None:
    picture = probe_picture(28)
    assert picture.mode == "RGB"
    assert picture.size == (28, 28)
    digest = hashlib.sha256(picture.tobytes()).hexdigest()
    assert digest == "64474f187aeee785fd166539a084b5b4722917b60bed09b788699b5a0d0f6111"
    assert probe_picture(1).size == (1, 1)
