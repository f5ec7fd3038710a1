"""Checkpoints as the releases of transformers wrote them, and as people keep them, give the same files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_edge.bundle import open_bundle
from llava_edge.convert import convert_checkpoint
from llava_edge.convert.checkpoint import Options, open_checkpoint
from llava_edge.convert.tiny import FAMILIES, make
from llava_edge.convert.weights import read_directory
from llava_edge.errors import InputError

NAMES = ("HF llava", "HF llava_next", "HF llava_onevision")
Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            made[name] = make(FAMILIES[name], tmp_path_factory.mktemp("release") / "checkpoint")
        return made[name]

    return checkpoint


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def as_transformers_4(directory: Path) -> None:
    """Names of tensors, fields and files as 4.45 wrote them."""
    tensors = load_file(directory / "model.safetensors")
    renamed = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): t for name, t in tensors.items()}
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})

    def config(fields: dict[str, Any]) -> None:
        fields["torch_dtype"], fields["transformers_version"] = fields.pop("dtype"), "4.45.0"
        fields.pop("image_seq_length", None)  # came later
        text = fields["text_config"]
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope["rope_theta"]
        text["rope_scaling"] = None
        if rope["rope_type"] != "default":
            text["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
        text["_name_or_path"], text["torch_dtype"] = "lmsys/vicuna-7b-v1.5", "float16"
        text.pop("layer_types", None)
        fields["ignore_index"], fields["use_image_newline_parameter"] = -100, True

    rewrite(directory / "config.json", config)
    processor = {"processor_class": "LlavaProcessor", "rescale_factor": 1 / 255, "do_convert_rgb": True}
    rewrite(directory / "preprocessor_config.json", lambda fields: fields.update(processor, do_rescale=True))
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (directory / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))


def as_transformers_5(directory: Path) -> None:
    """Tensors under the names of the modules, and the picture's preparation inside the processor's file."""
    tensors = load_file(directory / "model.safetensors")

    def name_of(name: str) -> str:
        if name.startswith("language_model.lm_head."):
            return name.removeprefix("language_model.")
        return "model." + name.replace("language_model.model.", "language_model.")

    renamed = {name_of(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    pictures = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").unlink()
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": pictures}))


def hashes(bundle: Path) -> dict[str, str]:
    return {file.role: file.sha256 for file in open_bundle(bundle).manifest.files}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("as_release", [as_transformers_4, as_transformers_5])
def test_every_release_gives_the_same_files(
    as_release: Callable[[Path], None], name: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    original = checkpoints(name)
    other = Path(shutil.copytree(original, tmp_path / "checkpoint"))
    as_release(other)
    for source, target in ((original, "a"), (other, "b")):
        convert_checkpoint(source, tmp_path / target, llm_type="F16", mmproj_type="F16", vision="fp32", verify=False)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    first, second = (open_bundle(tmp_path / target).manifest for target in "ab")
    assert (first.prompt, first.image, first.probe) == (second.prompt, second.image, second.probe)


@pytest.mark.parametrize("name", NAMES)
def test_shards_in_bfloat16_pass_the_gate(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(checkpoints(name), tmp_path / "checkpoint"))
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {key: files[number % 2] for number, key in enumerate(sorted(tensors))}
    for file in files:
        save_file({key: tensor for key, tensor in tensors.items() if where[key] == file}, directory / file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    rewrite(directory / "config.json", lambda fields: fields.update(dtype="bfloat16"))
    parity = convert_checkpoint(directory, tmp_path / "bundle", llm_type="F16", mmproj_type="F16")["parity"]
    assert parity["mmproj"]["F16"]["cosine_min"] >= 0.999
    assert parity["llm"]["F16"]["kl_mean"] <= 1e-3


def test_tied_embeddings_are_known_by_either_field(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Releases before 4.46 wrote the field into text_config only, and some files keep the head all the same."""
    directory = Path(shutil.copytree(checkpoints("HF llava_onevision"), tmp_path / "checkpoint"))
    rewrite(directory / "config.json", lambda fields: fields.pop("tie_word_embeddings"))
    assert open_checkpoint(directory).tied
    tensors = load_file(directory / "model.safetensors")
    table = tensors["language_model.model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": table.clone()}, directory / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(directory, tmp_path / "bundle", verify=False)


def test_a_head_of_its_own_is_not_thrown_away(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """A checkpoint whose fields call the embeddings tied although its head is another."""
    directory = Path(shutil.copytree(checkpoints("HF llava_onevision"), tmp_path / "checkpoint"))
    tensors = load_file(directory / "model.safetensors")
    head = tensors["language_model.model.embed_tokens.weight"] + torch.ones(1)
    save_file({**tensors, "lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tie_word_embeddings is True, and lm_head\.weight is another"):
        convert_checkpoint(directory, tmp_path / "bundle", verify=False)


def test_a_missing_preparation_or_template_is_named_with_the_next_step(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(checkpoints("HF llava"), tmp_path / "checkpoint"))
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="conversation format is unknown") as caught:
        open_checkpoint(directory)
    assert "--prompt" in str(caught.value.hint)
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json"):
        open_checkpoint(directory, Options(prompt="vicuna_v1"))


def test_tokens_that_were_added_keep_their_numbers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """LLaVA 1.5 in transformers' format adds a picture's and a pad token, and fills the table up to a multiple."""
    import transformers

    directory = Path(shutil.copytree(checkpoints("HF llava"), tmp_path / "checkpoint"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<pad>"], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(directory)
    tensors = read_directory(directory)
    assert len(tokenizer) < tensors["language_model.embed_tokens.weight"].shape[0]
    parity = convert_checkpoint(directory, tmp_path / "bundle", llm_type="F16", vision="none")["parity"]
    assert parity["tokenizer"]["identical"] == parity["tokenizer"]["texts"]


def test_what_is_not_in_the_file_is_not_checked(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """``image_seq_length`` came with 4.46; its default is that of one size only."""
    directory = Path(shutil.copytree(checkpoints("HF llava"), tmp_path / "checkpoint"))
    rewrite(directory / "config.json", lambda fields: fields.pop("image_seq_length"))
    assert open_checkpoint(directory).tower.patches == 16
    assert np.prod(open_checkpoint(directory).description.visual_tokens.grid) == 16
