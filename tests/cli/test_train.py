"""``llava-edge train`` as a person meets it: errors in words, progress on stderr, the result on stdout."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava_edge import cli
from llava_edge.train_gpu import checkpoint

RECIPE = """
stage = "align"
output = "{root}/out"
log_every = 1
[model]
llm = "{root}/llm"
vision_tower = "{root}/tower"
[data]
format = "mistral_instruct"
[data.sources.one]
path = "{root}/samples.json"
[optim]
steps = 3
batch_size = 2
lr = 1e-3
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    CLIPVisionModel(vision).save_pretrained(root / "tower")
    (root / "tower" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5,0.5,0.5], "image_std": [0.5,0.5,0.5]}'
    )
    text = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(text).save_pretrained(root / "llm")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "red": 2, "what": 3, "blue": 4}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken("</s>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(root / "llm")
    Image.new("RGB", (16, 16), (200, 0, 0)).save(root / "red.png")
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]
    samples = [{"id": str(i), "image": "red.png", "conversations": turns} for i in range(4)]
    (root / "samples.json").write_text(json.dumps(samples))
    (root / "recipe.toml").write_text(RECIPE.format(root=root))
    return root


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process, which has loaded PyTorch already: exit code, stdout, stderr."""

    def run_here(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.run(arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return run_here


def test_the_result_is_on_stdout_and_progress_on_stderr(run: Any, here: Cli, work: Path) -> None:
    result = run("train", str(work / "recipe.toml"), "--set", f"output={work}/first")
    assert result.code == 0
    assert result.out == f"{work}/first\n"
    assert "step 3 of 3, loss" in result.err
    again = here("train", str(work / "recipe.toml"), "--set", f"output={work}/first", "--resume", "--json")
    assert json.loads(again[1]) | {"output": f"{work}/first", "step": 3} == json.loads(again[1])
    log = (work / "first.run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-recipe"], ["no such recipe: no-such-recipe", "v1.5-align"]),
        (["RECIPE", "--set", "optim.lr=0"], ["optim.lr is 0", "above 0"]),
        (["RECIPE", "--set", "data.sources.one.path=nowhere.json"], ["no such file of samples: nowhere.json"]),
        (["RECIPE", "--set", "scale.sharding=fsdp2"], ["there is one", "torchrun"]),
        (["RECIPE", "--set", "output=OUT", "--resume"], ["nothing to resume", "without --resume"]),
        (["v1-finetune"], ["init llava-v1-7b-align is not a checkpoint", "stage align"]),
    ],
)
def test_what_is_wrong_is_said_in_words(here: Cli, work: Path, arguments: list[str], words: list[str]) -> None:
    given = [a.replace("RECIPE", str(work / "recipe.toml")).replace("OUT", str(work / "never")) for a in arguments]
    code, _, err = here("train", *given)
    assert code == 1
    assert err.splitlines()[-1].startswith(("error:", "hint:"))
    assert all(word in err for word in words), err
    assert "Traceback" not in err


def test_bad_samples_stop_the_run_or_are_counted(here: Cli, work: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = json.loads((work / "samples.json").read_text())
    samples += [{**samples[0], "id": "lost", "image": "lost.png"}, {"id": "odd", "conversations": []}]
    (work / "bad.json").write_text(json.dumps(samples))
    command = ["train", str(work / "recipe.toml"), "--set", f"data.sources.one.path={work}/bad.json"]
    code, _, err = here(*command, "--set", f"output={work}/bad")
    assert (code, "error: sample odd: 0 turns" in err) == (1, True)
    code, _, err = here(*command, "--set", f"output={work}/bad", "--skip-bad")
    assert code == 0
    assert "skipped: sample odd" in caplog.text
    assert "training picture lost.png: no such picture" in caplog.text


def test_sigterm_saves_and_exits_with_its_own_code(here: Cli, work: Path) -> None:
    directory = work / "stopped.run"

    def stop() -> None:
        while not (directory / "log.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    command = ["train", str(work / "recipe.toml"), "--set", f"output={work}/stopped", "--set", "optim.steps=100000"]
    with pytest.raises(SystemExit) as stopped:
        here(*command)
    thread.join()
    assert stopped.value.code == 143
    assert int(checkpoint.last_state(directory).name.removeprefix("step-")) >= 1
