"""Norms tuned for a rounded language model: nothing else changes, it says more of what the exact one says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llava_edge.bundle import resolve_model
from llava_edge.convert import convert_checkpoint
from llava_edge.errors import InputError
from llava_edge.train_gpu.config import Recipe
from llava_edge.train_gpu.loop import train
from llava_edge.train_gpu.model import divergences

RECIPE = """
stage = "norms"
init = "{root}/base"
rounded = "{root}/rounded"
output = "{output}"
log_every = 1
save_every = 20
[data]
samples = "{root}/samples.json"
features = "{root}/features"
image_tokens = [16, 4]
image_token_weights = [0.5, 0.5]
packing = true
[optim]
steps = 40
lr = 2e-2
batch_size = 8
"""


@pytest.fixture(scope="module")
def rounded(workspace: Path) -> Path:
    return converted(workspace / "base", workspace / "rounded")


def converted(checkpoint: Path, output: Path, norms: Path | None = None, llm_type: str = "Q4_0") -> Path:
    convert_checkpoint(checkpoint, output, llm_type=llm_type, vision="none", norms=norms, verify=False)
    return output


def tensors(bundle: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(resolve_model(bundle).file("llm")).tensors}


@pytest.mark.usefixtures("rounded")
def test_tuned_norms_bring_a_rounded_model_nearer_and_change_nothing_else(
    make: Callable[..., Recipe], workspace: Path, tmp_path: Path
) -> None:
    output = train(make("tuned"))
    lines = (tmp_path / "tuned.run" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert 0 < np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])

    before, after = (load_file(folder / "model.safetensors") for folder in (workspace / "base", output))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name for name in before if "language_model" in name and name.endswith("norm.weight")}
    assert norms
    assert {name for name in changed if "language_model" in name} == norms

    plain, tuned = tensors(workspace / "rounded"), tensors(converted(workspace / "base", tmp_path / "bundle", output))
    assert plain.keys() == tuned.keys()
    assert {name for name in plain if plain[name].tobytes() != tuned[name].tobytes()} == {
        name for name in plain if name.endswith("norm.weight")
    }
    (last,) = (name for name in norms if "layers" not in name)
    np.testing.assert_array_equal(tuned["output_norm.weight"], after[last].numpy())


@pytest.mark.usefixtures("rounded")
def test_norms_are_tuned_on_samples_without_a_picture_too(
    make: Callable[..., Recipe], talks: Path, workspace: Path, tmp_path: Path
) -> None:
    output = train(make("talks", "optim.steps=30", f"data.samples={talks}", "data.weights={chat = 1.0}"))
    lines = (tmp_path / "talks.run" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert 0 < np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    before, after = (load_file(folder / "model.safetensors") for folder in (workspace / "base", output))
    changed = {name for name in before if "language_model" in name and not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "language_model" in name and name.endswith("norm.weight")}
    train(make("mixed", "optim.steps=4", f"data.samples={talks}", "data.weights={colours = 0.5, chat = 0.5}"))


@pytest.mark.usefixtures("rounded")
def test_a_run_that_was_resumed_ends_with_the_same_norms(make: Callable[..., Recipe], tmp_path: Path) -> None:
    whole = train(make("whole", "optim.steps=6", "save_every=3"))
    (tmp_path / "whole").rename(tmp_path / "first")
    (tmp_path / "whole.run" / "last").write_text("step-00000003")
    again = train(make("whole", "optim.steps=6", "save_every=3"), resume=True)
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "first", again))
    assert whole == again
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_divergences_are_those_of_the_definition() -> None:
    taught, said = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    p, q = taught.softmax(-1), said.softmax(-1)
    torch.testing.assert_close(divergences(taught, said), (p * (p / q).log()).sum(-1))
    assert divergences(taught, taught).abs().max() < 1e-6


def test_what_does_not_fit_is_refused(
    make: Callable[..., Recipe], rounded: Path, workspace: Path, tmp_path: Path
) -> None:
    for change, says in (
        ("lora.rank=4", "stage norms trains the norms of init only"),
        ('stage="align"', "stage norms and rounded"),
        ('scale.sharding="fsdp2"', "two language models"),
    ):
        with pytest.raises(InputError, match=says):
            make("refused", change, "lora.alpha=8")
    with pytest.raises(InputError, match="nano has a language model of another shape"):
        train(make("other", 'rounded="nano"'))
    with pytest.raises(InputError, match="norms are tuned for rounded matrices; F16 has none"):
        converted(workspace / "base", tmp_path / "f16", workspace / "base", "F16")
    with pytest.raises(InputError, match="no such checkpoint"):
        converted(workspace / "base", tmp_path / "gone", tmp_path / "gone")
    assert rounded.is_dir()
    assert not (tmp_path / "gone").exists()
