"""Every supported family: converted, measured, and asked the same as transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import llava_edge
from llava_edge.bundle import open_bundle
from llava_edge.convert import convert_checkpoint, lora
from llava_edge.convert.checkpoint import Options, open_checkpoint
from llava_edge.convert.parity_table import QUESTION, TOKENS, compare, pictures
from llava_edge.convert.tiny import FAMILIES, GRID, SIDE, Family, make
from llava_edge.convert.weights import read_directory
from llava_edge.errors import InputError


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_passes_the_gate_and_answers_as_transformers_does(name: str, tmp_path: Path) -> None:
    figures = compare(name, tmp_path)
    assert figures["same"] == figures["asked"] == 5
    assert figures["onnx"]["fp32"]["cosine_min"] >= 0.9999
    assert figures["onnx"]["int8"]["cosine_mean"] >= 0.995
    assert figures["mmproj"]["F16"]["cosine_min"] >= 0.999
    assert figures["llm"]["F16"]["kl_mean"] <= 1e-3
    assert figures["llm"]["F16"]["top1_agreement"] >= 0.99
    assert figures["llm"]["F16"]["tokens"] >= 200
    assert figures["tokenizer"]["identical"] == figures["tokenizer"]["texts"]
    family = FAMILIES[name]
    assert figures["mtmd"]["F16"]["right"] == (family.tower == "siglip" or not family.class_token)
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.backends == ("onnx", "mtmd")
    assert manifest.image.mode == family.mode
    assert manifest.image.grid == (GRID if family.mode == "anyres" else ())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1.5", "v1.6-vicuna", "HF llava_onevision"])
def test_the_command_chat_answers_as_transformers_does(name: str, tmp_path: Path) -> None:
    """On pictures of five shapes. What :func:`compare` counts are the library's answers; the command's are the same."""
    assert compare(name, tmp_path)["same"] == 5
    for number, shown in enumerate(pictures()):
        path = tmp_path / f"{number}.png"
        shown.save(path)
        with llava_edge.load(tmp_path / "exact", n_threads=1, n_gpu_layers=0, vision_backend="onnx") as model:
            expected = model.chat().ask(QUESTION, [path], max_tokens=TOKENS).text
        command = [sys.executable, "-m", "llava_edge", "chat", "--model", str(tmp_path / "exact"), "--image", str(path)]
        options = ["-p", QUESTION, "--max-tokens", str(TOKENS), "--threads", "1", "--vision-backend", "onnx", "--json"]
        result = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
        assert json.loads(result.stdout)["text"] == expected != ""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(FAMILIES["v1.6-vicuna"], tmp_path_factory.mktemp("original") / "checkpoint")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(FAMILIES["LoRA merge"], tmp_path_factory.mktemp("lora") / "checkpoint")


def test_a_checkpoint_that_carries_its_own_tower_keeps_it(original: Path) -> None:
    other = load_file(original / "tower" / "model.safetensors")
    checkpoint = open_checkpoint(original)
    name = "embeddings.patch_embedding.weight"
    taken = checkpoint.open_weights().take(f"vision_tower.{name}")
    assert not np.array_equal(taken, other[f"vision_model.{name}"].numpy())
    assert checkpoint.notes[0] == "vision tower: the checkpoint's own"


def test_a_tower_elsewhere_has_to_be_named(original: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(original, tmp_path / "copy"))
    (copy / "tower").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="mm_vision_tower is 'tower'") as caught:
        open_checkpoint(copy)
    assert "--vision-tower" in str(caught.value.hint)
    assert open_checkpoint(copy, Options(vision_tower=tmp_path / "elsewhere")).tower.image_size == SIDE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["LlavaMptForCausalLM"]}, "architectures"),
        ({"mm_projector_type": "ldp"}, "mm_projector_type is 'ldp'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is 'anyres_max_9'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'"),
        ({"mm_vision_select_layer": 7}, "mm_vision_select_layer is 7"),
    ],
)
def test_an_original_checkpoint_that_is_not_supported_is_refused_by_its_field(
    change: dict[str, object], said: str, original: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(original, tmp_path / "copy"))
    fields = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(InputError, match=said) as caught:
        open_checkpoint(copy)
    assert "Supported" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio is 'pad'; expected 'anyres_max_9'"),
        ("config.json", {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is 'default'"),
        ("preprocessor_config.json", {"image_grid_pinpoints": [[56, 56]]}, "preprocessor_config.json: image_grid"),
    ],
)
def test_an_onevision_checkpoint_that_is_not_supported_is_refused_by_its_field(
    file: str, change: dict[str, object], said: str, tmp_path: Path
) -> None:
    directory = make(FAMILIES["HF llava_onevision"], tmp_path / "checkpoint")
    fields = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps({**fields, **change}))
    with pytest.raises(InputError, match=said):
        open_checkpoint(directory)


def test_what_onevision_scales_down_stands_in_the_manifest(tmp_path: Path) -> None:
    directory = make(FAMILIES["HF llava_onevision"], tmp_path / "checkpoint")
    convert_checkpoint(directory, tmp_path / "bundle", vision="none", verify=False)
    image = open_bundle(tmp_path / "bundle").manifest.image
    assert (image.mode, image.grid, image.max_tiles) == ("anyres", GRID, 2)


def test_a_deeper_projector_is_converted(tmp_path: Path) -> None:
    directory = make(Family("original", projector=3), tmp_path / "checkpoint")
    parity = convert_checkpoint(directory, tmp_path / "bundle", llm_type="F16", mmproj_type="F16")["parity"]
    assert parity["mmproj"]["F16"]["cosine_min"] >= 0.999
    assert parity["onnx"]["int8"]["cosine_mean"] >= 0.995


def test_a_merged_weight_is_the_base_plus_the_scaled_product(adapter: Path) -> None:
    name = "model.layers.1.self_attn.q_proj"
    halves = load_file(adapter / "adapter_model.safetensors")
    down, up = (halves[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    base = read_directory(adapter / "base")["language_model.layers.1.self_attn.q_proj.weight"].load()
    merged = open_checkpoint(adapter).open_weights().take("language_model.layers.1.self_attn.q_proj.weight")
    np.testing.assert_allclose(merged, base + 2.0 * (up @ down), atol=1e-6)
    assert np.abs(merged - base.numpy()).max() > 0.01


def test_an_adapter_of_peft_on_transformers_format_is_merged_as_peft_does(tmp_path: Path) -> None:
    base = make(FAMILIES["HF llava"], tmp_path / "base")
    model = get_peft_model(
        LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=6, target_modules=r".*language_model.*\.(q_proj|down_proj)"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    weights = open_checkpoint(tmp_path / "adapter").open_weights()
    for name, parameter in model.merge_and_unload().named_parameters():
        if "language_model.layers.1" in name:
            merged = weights.take(name.removeprefix("model."))
            np.testing.assert_allclose(merged, parameter.detach().numpy(), atol=1e-6)


def test_an_adapter_that_can_not_be_merged_is_refused(adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    config = json.loads((copy / lora.CONFIG).read_text())

    def write(**changes: object) -> None:
        (copy / lora.CONFIG).write_text(json.dumps({**config, **changes}))

    write(use_dora=True)
    with pytest.raises(InputError, match="use_dora is True"):
        open_checkpoint(copy)
    write(base_model_name_or_path="liuhaotian/llava-v1.5-7b")
    with pytest.raises(InputError, match="base model is not here") as caught:
        open_checkpoint(copy)
    assert "--base" in str(caught.value.hint)
    write()
    halves = load_file(copy / "adapter_model.safetensors")
    key = next(key for key in halves if key.endswith("lora_A.weight"))
    save_file({**halves, key: torch.zeros(4, 63)}, copy / "adapter_model.safetensors")
    with pytest.raises(InputError, match="the base has"):
        open_checkpoint(copy)
