"""A checkpoint is converted faithfully or refused by the name of the field."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava_edge.convert import convert_checkpoint
from llava_edge.convert.checkpoint import open_checkpoint
from llava_edge.convert.projector import projector_layers
from llava_edge.convert.tiny import FAMILIES, make
from llava_edge.convert.weights import Weights, plain_name, read_directory
from llava_edge.errors import InputError

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def editable(checkpoint_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "copy"))


def edit(path: Path, change: Change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda c: c.update(model_type="llava_next_video"), "model_type is 'llava_next_video'"),
        (lambda c: c["text_config"].update(model_type="phi3"), "text_config.model_type is 'phi3'"),
        (lambda c: c["vision_config"].update(model_type="vit"), "vision_config.model_type is 'vit'"),
        (lambda c: c.update(vision_feature_select_strategy="full"), "vision_feature_select_strategy"),
        (lambda c: c.update(projector_hidden_act="relu"), "projector_hidden_act is 'relu'"),
        (lambda c: c.update(vision_feature_layer=[1, 9]), "vision_feature_layer"),
        (lambda c: c.update(vision_feature_layer=[1, 1]), "vision_feature_layer"),
        (lambda c: c.update(image_seq_length=17), "image_seq_length is 17; expected 16"),
        (lambda c: c["vision_config"].update(hidden_act="relu"), "vision_config.hidden_act is 'relu'"),
        (lambda c: c["vision_config"].update(use_swiglu_ffn=True), "vision_config.use_swiglu_ffn"),
        (lambda c: c["vision_config"].update(image_size=112), "image_seq_length is 16; expected 64"),
        (lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}), "quantization_config is"),
        (lambda c: c["vision_config"].update(image_size="large"), "transformers refuses .*config.json"),
        (lambda c: c["vision_config"].update(image_size=[56, 56]), r"vision_config.image_size is \[56, 56\]"),
        (lambda c: c["text_config"].update(attention_bias=True), "text_config.attention_bias"),
        (
            lambda c: c["text_config"].update(
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0}
            ),
            "text_config.rope_parameters.rope_type is 'dynamic'",
        ),
    ],
)
def test_an_unsupported_config_is_refused_by_its_field(change: Change, field: str, editable: Path) -> None:
    edit(editable / "config.json", change)
    with pytest.raises(InputError, match=field) as caught:
        open_checkpoint(editable)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("prompt"), "missing key prompt"),
        (lambda d: d["image"].update(size=28), "vision_config.image_size is 56; expected 28"),
        (lambda d: d["visual_tokens"].update(grid=[2, 8]), "visual_tokens.grid"),
        (lambda d: d.update(author="me"), "unknown key author"),
    ],
)
def test_a_wrong_description_is_refused(change: Change, said: str, editable: Path) -> None:
    edit(editable / "llava_edge.json", change)
    with pytest.raises(InputError, match=said):
        open_checkpoint(editable)


@pytest.mark.parametrize("name", ["config.json", "llava_edge.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(name: str, editable: Path, tmp_path: Path) -> None:
    (editable / name).unlink()
    with pytest.raises(InputError, match=r"config.json|llava_edge.json|model.safetensors|tokenizer"):
        convert_checkpoint(editable, tmp_path / "bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_tensors_are_found_under_the_names_of_every_release() -> None:
    expected = "language_model.layers.0.mlp.up_proj.weight"
    for name in ("language_model.model.layers.0", "model.language_model.layers.0"):
        assert plain_name(f"{name}.mlp.up_proj.weight") == expected
    assert plain_name("language_model.lm_head.weight") == plain_name("lm_head.weight") == "lm_head.weight"
    assert plain_name("model.vision_tower.x") == "vision_tower.x"


def test_a_checkpoint_in_two_files_reads_like_one(editable: Path) -> None:
    whole = {name: Weights(read_directory(editable)).take(name) for name in Weights(read_directory(editable)).names("")}
    tensors = load_file(editable / "model.safetensors")
    half = sorted(tensors)[: len(tensors) // 2]
    save_file({n: t for n, t in tensors.items() if n in half}, editable / "a.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in half}, editable / "b.safetensors")
    (editable / "model.safetensors").unlink()
    index = {name: "a.safetensors" if name in half else "b.safetensors" for name in tensors}
    (editable / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    split = Weights(read_directory(editable))
    assert split.names("") == sorted(whole)
    for name, tensor in whole.items():
        np.testing.assert_array_equal(split.take(name), tensor)


def test_a_projector_without_an_activation_is_the_one_matrix_that_it_is(tmp_path: Path) -> None:
    directory = make(FAMILIES["HF llava"], tmp_path / "linear")
    edit(directory / "config.json", lambda c: c.update(projector_hidden_act="linear"))
    checkpoint = open_checkpoint(directory)
    assert checkpoint.projector.depth == 1
    ((weight, bias),) = projector_layers(checkpoint.projector, checkpoint.open_weights())
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    features = torch.randn(5, checkpoint.projector.features)
    with torch.no_grad():
        expected = model.model.multi_modal_projector(features).numpy()
    np.testing.assert_allclose(features.numpy() @ weight.load().T + bias.load(), expected, rtol=1e-4, atol=1e-4)

    change_tensors(directory, lambda t: [t.pop(name) for name in list(t) if "linear_2.weight" in name])
    with pytest.raises(InputError, match=r"no tensor projector\.1\.weight"):
        open_checkpoint(directory).open_weights()


def change_tensors(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_a_surplus_and_a_broken_tensor_are_refused(editable: Path, tmp_path: Path) -> None:
    tower = "vision_tower.encoder.layer.1.mlp.fc1.bias"
    name = next(n for n in load_file(editable / "model.safetensors") if n.endswith(tower))
    kept = load_file(editable / "model.safetensors")[name]

    change_tensors(editable, lambda t: t.pop(name))
    with pytest.raises(InputError, match=f"no tensor {tower}"):
        convert_checkpoint(editable, tmp_path / "bundle")

    change_tensors(editable, lambda t: t.update({name: kept * np.float32("nan")}))
    with pytest.raises(InputError, match=f"{tower} holds values that are not finite"):
        convert_checkpoint(editable, tmp_path / "bundle")

    change_tensors(editable, lambda t: t.update({name: kept, name.replace("fc1", "fc9"): kept}))
    with pytest.raises(InputError, match="1 tensors that don't fit"):
        convert_checkpoint(editable, tmp_path / "bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_tensors_of_another_shape_are_refused(editable: Path, tmp_path: Path) -> None:
    edit(editable / "config.json", lambda c: c["text_config"].update(intermediate_size=192))
    with pytest.raises(InputError, match=r"model.safetensors: the tensor .*mlp.gate_proj.weight has the shape"):
        convert_checkpoint(editable, tmp_path / "bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_a_damaged_tensor_file_is_an_error_in_words(editable: Path, tmp_path: Path) -> None:
    (editable / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match=r"can't read .*model.safetensors"):
        convert_checkpoint(editable, tmp_path / "bundle")


# Files of several shards, pickles, and what may be wrong with them


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make(FAMILIES["v1.5"], tmp_path / "sharded")


def refused(directory: Path, tmp_path: Path, said: str) -> None:
    """The conversion fails with these words and leaves nothing."""
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(InputError, match=said) as caught:
        convert_checkpoint(directory, tmp_path / "bundle", verify=False)
    assert caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_truncated_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused(sharded, tmp_path, r"can't read .*model-00002-of-00002\.safetensors")


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").unlink()
    refused(sharded, tmp_path, r"model-00001-of-00002\.safetensors is missing")


def test_a_shard_that_lacks_what_the_index_lists_is_named(sharded: Path, tmp_path: Path) -> None:
    shard = sharded / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shard)
    refused(sharded, tmp_path, rf"model-00001-of-00002\.safetensors lacks 1 tensors .* first {re.escape(name)}")


def test_values_that_are_no_numbers_are_named_by_file_and_tensor(sharded: Path, tmp_path: Path) -> None:
    shard = sharded / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    tensors[name][0, 0] = np.inf
    save_file(tensors, shard)
    refused(sharded, tmp_path, rf"00001-of-00002\.safetensors: the tensor {re.escape(name)} holds values that are not")


def test_a_wrong_shape_is_named_by_file_and_tensor(sharded: Path, tmp_path: Path) -> None:
    edit(sharded / "config.json", lambda c: c.update(vocab_size=c["vocab_size"] + 8))
    refused(
        sharded, tmp_path, r"safetensors: the tensor model\.embed_tokens\.weight has the shape .* config\.json says"
    )


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    directory = make(FAMILIES["v1 linear"], tmp_path / "pickled")
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(ran),)

    torch.save({"model.embed_tokens.weight": Evil()}, directory / "pytorch_model-00001-of-00002.bin")
    refused(directory, tmp_path, r"can't read .*pytorch_model-00001-of-00002\.bin")
    assert not ran.exists()


def test_values_beyond_float16_are_refused_with_another_type(sharded: Path, tmp_path: Path) -> None:
    shard = sharded / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    tensors[name][0, 0] = 1e6
    save_file(tensors, shard)
    refused(sharded, tmp_path, r"beyond the range of float16")
    report = convert_checkpoint(sharded, tmp_path / "bundle", llm_type="BF16", vision="none", verify=False)
    assert report["files"][0]["tensors"]["BF16"] == 3 * 7 + 2


def test_a_full_disk_is_said_and_leaves_nothing(sharded: Path, tmp_path: Path) -> None:
    """The limit of a file's size stands for the disk's: both stop the writing half-way."""
    code = (
        "import resource, signal, sys; from pathlib import Path; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from llava_edge.cli import main; main()"
    )
    output = tmp_path / "bundle"
    command = [sys.executable, "-c", code, "convert", str(sharded), "-o", str(output), "--no-verify"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "can't write" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sharded"]
