"""Models are pulled with the real client from a server that behaves like the hub, and misbehaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, Faults, fake_hub

import llava_edge
from llava_edge.errors import ModelError

REPO = "someone/Tiny-GGUF"


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def hub(server: FakeHub, tiny_llm: Path, tiny_mmproj: Path) -> FakeHub:
    """A repository with two types of the language model, a tower, and other files."""
    server.faults = Faults()
    server.requests.clear()
    server.sent.clear()
    llm = tiny_llm.read_bytes()
    server.repositories = {
        REPO: {
            "tiny-Q4_K_M.gguf": llm,
            "tiny-Q8_0.gguf": llm[:-4] + b"\0\0\0\0",
            "mmproj-tiny-f16.gguf": tiny_mmproj.read_bytes(),
            "README.md": b"A model.",
        }
    }
    return server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def settings(hub: FakeHub, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "LLAVA_EDGE_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip


@pytest.fixture
def pull(run: Any, settings: dict[str, str]) -> Callable[..., Any]:
    return lambda *args, **env: run(*args, env={**settings, **env})


def entries(home: Path) -> list[str]:
    """What lies among the models, without locks and unfinished downloads."""
    root = home / "models"
    return sorted(p.name for p in root.iterdir() if p.name not in (".locks", ".partial")) if root.is_dir() else []


def assert_complete(home: Path, hub: FakeHub) -> None:
    """The whole model is there with the content that the hub has, and nothing else."""
    assert entries(home) == ["Tiny-GGUF"]
    directory = home / "models" / "Tiny-GGUF"
    names = {"llm-Q4_K_M.gguf": "tiny-Q4_K_M.gguf", "mmproj-F16.gguf": "mmproj-tiny-f16.gguf"}
    assert sorted(p.name for p in directory.iterdir()) == sorted([*names, "llava-edge-pair.json"])
    for here, there in names.items():
        assert (directory / here).read_bytes() == hub.repositories[REPO][there]


def test_a_repository_is_pulled_listed_shown_verified_used_and_removed(pull: Any, hub: FakeHub, home: Path) -> None:
    done = pull("pull", REPO)
    assert (done.code, done.out) == (0, "Tiny-GGUF\n"), done.err
    assert "licence: apache-2.0" in done.err
    assert_complete(home, hub)
    manifest = json.loads((home / "models" / "Tiny-GGUF" / "llava-edge-pair.json").read_text())
    digests = {file["role"]: file["sha256"] for file in manifest["files"]}
    assert digests["llm"] == hashlib.sha256(hub.repositories[REPO]["tiny-Q4_K_M.gguf"]).hexdigest()
    assert manifest["source"] == REPO
    listed = {row["name"]: row for row in json.loads(pull("list", "--json").out)}
    assert listed["Tiny-GGUF"]["types"] == "Q4_K_M + F16"
    assert "someone/Tiny-GGUF" in pull("show", "Tiny-GGUF").out
    assert pull("verify", "Tiny-GGUF").out == "Tiny-GGUF: good\n"
    answer = pull("chat", "--model", "Tiny-GGUF", "-p", "Hi", "--max-tokens", "2", "--json")
    assert json.loads(answer.out)["model"] == "Tiny-GGUF", answer.err
    again = pull("pull", REPO)
    assert again.code == 0
    assert hub.sent["tiny-Q4_K_M.gguf"] == len(hub.repositories[REPO]["tiny-Q4_K_M.gguf"])
    assert pull("remove", "Tiny-GGUF", "--yes").code == 0
    assert entries(home) == []


def test_a_pulled_model_is_loaded_by_its_name_in_python(pull: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pull("pull", REPO, "--as", "mine").code == 0
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(home))
    with llava_edge.load("mine", n_threads=1) as model:
        assert model.name == "mine"


def test_a_folder_of_the_same_name_hides_no_model(
    pull: Any, hub: FakeHub, home: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is a model itself. Where one stands in a model's own folder, that is meant by a dot."""
    hub.repositories["someone/bundle"] = {path.name: path.read_bytes() for path in tiny_bundle.iterdir()}
    assert pull("pull", REPO, "--as", "pair").code == 0
    assert pull("pull", "someone/bundle").code == 0
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    for name in ("pair", "bundle", "pictures"):
        (tmp_path / name).mkdir()
    for name, called in (("pair", "pair"), ("bundle", "tiny")):
        with llava_edge.load(name, n_threads=1) as model:
            assert model.name == called
    with pytest.raises(ModelError, match="pictures is not a model"):
        llava_edge.load("pictures")
    shutil.copytree(tiny_bundle, tmp_path / "pair", dirs_exist_ok=True)
    with llava_edge.load("pair", n_threads=1) as model:
        assert model.name == "tiny"
    monkeypatch.chdir(home / "models" / "pair")
    with llava_edge.load(".", n_threads=1) as model:
        assert model.name == "pair"


def test_a_bundle_is_pulled_with_all_its_files(pull: Any, hub: FakeHub, home: Path, tiny_bundle: Path) -> None:
    hub.repositories["someone/bundle"] = {path.name: path.read_bytes() for path in tiny_bundle.iterdir()}
    assert pull("pull", "someone/bundle").code == 0
    assert (
        json.loads(pull("chat", "--model", "bundle", "-p", "Hi", "--max-tokens", "2", "--json").out)["text"] is not None
    )
    damaged = home / "models" / "bundle" / "mmproj.gguf"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    done = pull("verify")
    assert done.code == 1
    assert "mmproj.gguf" in done.out


def test_a_type_is_chosen_after_a_colon(pull: Any, home: Path) -> None:
    assert pull("pull", f"{REPO}:q8_0").out == "Tiny-GGUF-q8_0\n"
    done = pull("pull", f"{REPO}:Q5_K_M")
    assert done.code == 1
    assert "Q4_K_M (tiny-Q4_K_M.gguf)" in done.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["llava-9"], ["llava-9", "llava-1.5-7b"]),
        (["nano"], ["part of this package"]),
        (["someone/nothing"], ["no repository someone/nothing", "HF_TOKEN"]),
        (["../../etc"], ["is no repository"]),
        (["a/b/c"], ["is no repository"]),
        ([REPO, "--as", "../evil"], ["no name for a model"]),
        ([REPO, "--as", ".hidden"], ["no name for a model"]),
    ],
)
def test_what_can_not_be_pulled_is_said(args: list[str], says: list[str], pull: Any, home: Path) -> None:
    done = pull("pull", *args)
    assert done.code == 1
    assert all(word in done.err for word in says), done.err
    assert "Traceback" not in done.err
    assert entries(home) == []


def test_a_cut_connection_is_resumed(pull: Any, hub: FakeHub, home: Path) -> None:
    hub.faults = Faults(cut=100_000, cuts=2)
    assert pull("pull", REPO).code == 0
    assert_complete(home, hub)
    assert "bytes=65536-" in hub.ranges()


def test_the_next_process_goes_on_where_the_last_one_was(pull: Any, hub: FakeHub, home: Path) -> None:
    hub.faults = Faults(slow_seconds=0.05)
    kill_when(pull_process(pull, hub, home), lambda: hub.sent["tiny-Q4_K_M.gguf"] >= 200_000)
    assert entries(home) == []
    assert not hub.ranges()
    hub.faults = Faults()
    assert pull("pull", REPO).code == 0
    assert_complete(home, hub)
    assert hub.ranges()[0] in ("bytes=65536-", "bytes=131072-", "bytes=196608-", "bytes=262144-")


def test_a_stalled_connection_is_given_up_and_resumed(pull: Any, hub: FakeHub, home: Path) -> None:
    hub.faults = Faults(stall=64_000, stalls=1)
    assert pull("pull", REPO).code == 0
    assert_complete(home, hub)


def test_a_server_without_ranges_gives_the_right_file(pull: Any, hub: FakeHub, home: Path) -> None:
    hub.faults = Faults(cut=50_000, cuts=1, no_ranges=True)
    assert pull("pull", REPO).code == 0
    assert_complete(home, hub)


def test_another_content_is_thrown_away(pull: Any, hub: FakeHub, home: Path) -> None:
    hub.faults = Faults(other_content=1)
    assert pull("pull", REPO).code == 0
    assert_complete(home, hub)
    assert pull("remove", "Tiny-GGUF", "--yes").code == 0
    hub.faults = Faults(other_content=9)
    done = pull("pull", REPO)
    assert done.code == 1
    assert "another content" in done.err
    assert entries(home) == []
    hub.faults = Faults()
    assert pull("pull", REPO).code == 0
    assert_complete(home, hub)


def test_content_that_changes_between_tries_is_never_mixed(pull: Any, hub: FakeHub, home: Path) -> None:
    hub.faults = Faults(slow_seconds=0.05)
    kill_when(pull_process(pull, hub, home), lambda: hub.sent["tiny-Q4_K_M.gguf"] >= 150_000)
    path = "tiny-Q4_K_M.gguf"
    changed = bytearray(hub.repositories[REPO][path])
    changed[-4:] = b"\0\0\x80\x3f"
    hub.repositories[REPO][path] = bytes(changed)
    hub.faults = Faults()
    assert pull("pull", REPO).code == 0
    assert_complete(home, hub)


@pytest.mark.parametrize(
    "faults", [Faults(head_size=5), Faults(head_size=1 << 40), Faults(more_bytes=1000)], ids=["small", "huge", "longer"]
)
def test_a_server_that_lies_about_sizes_is_refused(faults: Faults, pull: Any, hub: FakeHub, home: Path) -> None:
    hub.faults = faults
    done = pull("pull", REPO)
    assert done.code == 1
    assert done.err.splitlines()[-2].startswith("error: "), done.err
    assert entries(home) == []
    hub.faults = Faults()
    assert pull("pull", REPO).code == 0
    assert_complete(home, hub)


def test_too_many_requests_are_waited_for_or_said(pull: Any, hub: FakeHub, home: Path) -> None:
    hub.faults = Faults(busy=2)
    done = pull("pull", REPO)
    assert done.code == 0 or "429" in done.err
    hub.faults = Faults(busy_listing=99)
    done = pull("pull", REPO, "--as", "other")
    assert done.code == 1
    assert "429" in done.err
    assert "too many requests" in done.err


def test_a_gated_repository_says_where_to_accept(pull: Any, hub: FakeHub, home: Path) -> None:
    hub.faults = Faults(gated=True)
    done = pull("pull", REPO)
    assert done.code == 1
    assert "licence: apache-2.0 (gated" in done.err
    assert "is gated" in done.err
    assert f"{hub.url}/{REPO}" in done.err


def test_the_token_goes_to_the_hub_and_not_to_its_storage(pull: Any, hub: FakeHub, home: Path) -> None:
    with fake_hub() as storage:
        storage.repositories = hub.repositories
        hub.faults = Faults(token="hf_secret", storage=storage.url)
        assert pull("pull", REPO).code == 1
        done = pull("pull", REPO, HF_TOKEN="hf_secret")
        assert done.code == 0, done.err
        assert "hf_secret" not in done.err + done.out
        assert storage.requests
        assert all("authorization" not in headers for _, _, headers in storage.requests)
    assert_complete(home, hub)


def test_offline_says_so_and_uses_what_is_there(pull: Any, hub: FakeHub, home: Path) -> None:
    assert pull("pull", REPO).code == 0
    done = pull("pull", REPO, "--as", "other", HF_HUB_OFFLINE="1")
    assert done.code == 1
    assert "HF_HUB_OFFLINE" in done.err
    assert pull("chat", "--model", "Tiny-GGUF", "-p", "Hi", "--max-tokens", "2", HF_HUB_OFFLINE="1").code == 0


def test_no_server_at_all(pull: Any, home: Path) -> None:
    done = pull("pull", REPO, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.code == 1
    assert "error: " in done.err
    assert "Traceback" not in done.err


def test_a_model_that_does_not_fit_the_memory_is_refused_before_the_download(
    pull: Any, hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing says that the file is huge."""
    from llava_edge import hub as client
    from llava_edge import pull as pulling
    from llava_edge.errors import ModelError

    files = (client.RemoteFile("big-Q4_K_M.gguf", 1 << 50, "0" * 64), client.RemoteFile("big-Q2_K.gguf", 10, "1" * 64),
             client.RemoteFile("mmproj-f16.gguf", 10, "2" * 64))  # fmt: skip
    repository = client.Repository("a/b", "c" * 40, "mit", False, files)
    wanted = pulling.Plan("big", repository, (("llm", files[0]), ("mmproj", files[2])), False)
    with pytest.raises(ModelError, match=r"needs about [\d.]+ GiB of memory") as caught:
        pulling.check_room(wanted)
    assert "Q2_K of the same repository would fit" in (caught.value.hint or "")
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(home))
    monkeypatch.setattr("llava_edge.memory.total_bytes", lambda: None)
    with pytest.raises(ModelError, match="more on the disk"):
        pulling.check_room(wanted)


def test_a_file_that_is_no_model_never_arrives(pull: Any, hub: FakeHub, home: Path) -> None:
    hub.repositories[REPO]["mmproj-tiny-f16.gguf"] = b"GGUF" + bytes(500)
    done = pull("pull", REPO)
    assert done.code == 1
    assert "version is 0" in done.err
    assert json.loads(pull("list", "--json").out) == [
        r for r in json.loads(pull("list", "--json").out) if r["name"] == "nano"
    ]


def test_a_clip_tower_is_pulled_with_a_warning(pull: Any, hub: FakeHub, home: Path, tiny_mmproj: Path) -> None:
    import mutate

    parts = mutate.parse(tiny_mmproj.read_bytes())
    parts.infos.append(mutate.Info(b"v.class_embd", [32], 0, bytes(128)))
    table = next(info for info in parts.infos if info.name == b"v.position_embd.weight")
    table.shape = [32, 17]
    mutate.fill(table)
    hub.repositories[REPO]["mmproj-tiny-f16.gguf"] = mutate.build(parts)
    done = pull("pull", REPO)
    assert done.code == 0, done.err
    assert "warning: Tiny-GGUF" in done.err
    assert "class token" in done.err
    answer = pull("chat", "--model", "Tiny-GGUF", "-p", "Hi", "--max-tokens", "2")
    assert answer.code == 0
    assert "class token" in answer.err


# Two processes, and kills


def pull_process(pull: Any, hub: FakeHub, home: Path, **env: str) -> subprocess.Popen[bytes]:
    import sys

    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "LLAVA_EDGE_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DOWNLOAD_TIMEOUT": "1", **env}  # fmt: skip
    command = [sys.executable, "-m", "llava_edge", "pull", REPO]
    return subprocess.Popen(command, env={**os.environ, **settings}, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def kill_when(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.01)
    process.kill()
    process.communicate()


def test_two_processes_do_not_collide(pull: Any, hub: FakeHub, home: Path) -> None:
    hub.faults = Faults(slow_seconds=0.02)
    processes = [pull_process(pull, hub, home) for _ in range(2)]
    for process in processes:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
    assert_complete(home, hub)
    assert hub.sent["tiny-Q4_K_M.gguf"] == len(hub.repositories[REPO]["tiny-Q4_K_M.gguf"])


def test_ctrl_c_leaves_no_mess(pull: Any, hub: FakeHub, home: Path) -> None:
    hub.faults = Faults(slow_seconds=0.05)
    process = pull_process(pull, hub, home)
    while process.poll() is None and not hub.sent:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert b"Traceback" not in error
    assert entries(home) == []
    hub.faults = Faults()
    assert pull("pull", REPO).code == 0
    assert_complete(home, hub)


def test_killed_anywhere_the_next_pull_completes(pull: Any, hub: FakeHub, home: Path) -> None:
    """After so many bytes of the download; the boundaries of every write are in tests/test_kills.py."""
    rng = random.Random(0)
    hub.faults = Faults(slow_seconds=0.01)
    for _ in range(3):
        limit = sum(hub.sent.values()) + rng.randrange(1, 120_000)
        kill_when(pull_process(pull, hub, home), lambda limit=limit: sum(hub.sent.values()) >= limit)
        assert [name for name in entries(home) if not name.startswith(".")] in ([], ["Tiny-GGUF"])
    hub.faults = Faults()
    assert pull("pull", REPO).code == 0
    assert_complete(home, hub)
