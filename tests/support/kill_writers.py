"""The writers of llava-edge, killed at every write: ``python kill_writers.py NAME DIRECTORY``; prints the count.

In a process of its own, because it forks.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

from kills import kill_everywhere


def tree(directory: Path) -> dict[str, str]:
    """Every file below a directory with its content's hash."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pull(root: Path) -> int:
    """A pull from the server at HF_ENDPOINT."""
    import huggingface_hub.file_download  # noqa: F401 (once, before the forks)

    from llava_edge import pull as pulling
    from llava_edge import store

    name = "Tiny-GGUF"

    def check() -> None:
        found = store.find(name)
        assert found is None or store.verify(found) == []
        visible = [path.name for path in store.models_dir().glob("[!.]*")]
        assert visible in ([], [name]), visible

    def check_complete() -> None:
        found = store.find(name)
        assert found is not None
        assert store.verify(found) == []
        hidden = sorted(path.name for path in store.models_dir().iterdir())
        assert hidden == [".locks", ".partial", name], hidden
        assert not list((store.models_dir() / ".partial").iterdir())

    os.environ["LLAVA_EDGE_HOME"] = str(root)
    return kill_everywhere(
        root,
        lambda: shutil.rmtree(root, ignore_errors=True),
        lambda: pulling.pull(pulling.plan("someone/Tiny-GGUF")),
        check,
        check_complete,
    )


def remove(root: Path) -> int:
    """Deleting a pulled model: it is whole, or gone."""
    from llava_edge import store
    from llava_edge.bundle import BundleFile

    os.environ["LLAVA_EDGE_HOME"] = str(root)
    directory = root / "models" / "tiny"

    def prepare() -> None:
        shutil.rmtree(root, ignore_errors=True)
        directory.mkdir(parents=True)
        files = []
        for role in ("llm", "mmproj"):
            (directory / f"{role}.gguf").write_bytes(role.encode())
            digest = hashlib.sha256(role.encode()).hexdigest()
            files.append(BundleFile(f"{role}.gguf", role, digest, len(role), "F16"))  # type: ignore[arg-type]
        pair = store.Pair("tiny", "a/b", "c", "none", tuple(files))
        (directory / store.PAIR_NAME).write_text(pair.to_json())

    def check() -> None:
        found = store.find("tiny")
        assert found is None or store.verify(found) == []

    def act() -> None:
        if store.find("tiny"):
            store.remove("tiny")

    return kill_everywhere(root, prepare, act, check, lambda: None if store.find("tiny") is None else sys.exit(1))


def publish(root: Path) -> int:
    """What convert and its quantisation write: a new bundle in the place of an old one with a README beside it."""
    from llava_edge.convert.publish import publish as publish_directory
    from llava_edge.convert.publish import working_directory

    output = root / "bundle"
    states = {version: {f"{name}.gguf": version * 1000 for name in ("llm", "mmproj")} for version in ("old", "new")}

    def write(directory: Path, version: str) -> None:
        for name, text in states[version].items():
            (directory / name).write_text(text)
        (directory / "llava-edge.json").write_text(version)

    def prepare() -> None:
        shutil.rmtree(root, ignore_errors=True)
        output.mkdir(parents=True)
        write(output, "old")
        (output / "README.md").write_text("mine")

    def act() -> None:
        with working_directory(output) as work:
            write(work, "new")
            publish_directory(work, output)

    def check() -> None:
        version = (output / "llava-edge.json").read_text()
        assert all((output / name).read_text() == text for name, text in states[version].items()), version
        assert (output / "README.md").read_text() == "mine"

    def check_complete() -> None:
        check()
        assert (output / "llava-edge.json").read_text() == "new"

    return kill_everywhere(root, prepare, act, check, check_complete)


def checkpoint(root: Path) -> int:
    """The state of a training run, and a finished checkpoint in the place of an old one."""
    import torch

    from llava_edge.train_gpu import checkpoint as writing

    torch.set_num_threads(1)

    class Saved:
        """Writes what a model or a tokenizer would write."""

        def __init__(self, version: int, name: str) -> None:
            self.version, self.name = version, name

        def save_pretrained(self, directory: Path) -> None:
            directory.mkdir(parents=True, exist_ok=True)
            torch.save(torch.full((50,), self.version), directory / self.name)

    def save(version: int) -> None:
        writing.begin_state(root / "run", version)
        torch.save(
            {"weights": torch.full((100,), version), "step": version},
            writing.partial_state(root / "run", version) / "state.pt",
        )
        writing.commit_state(root / "run", version, keep=2)
        model, tokenizer = Saved(version, "model.pt"), Saved(version, "tokenizer.pt")
        writing.save_checkpoint(root / "out", model, tokenizer, {"version": version})  # type: ignore[arg-type]

    def prepare() -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        save(1)

    def check(versions: tuple[int, ...] = (1, 2)) -> None:
        state = torch.load(writing.last_state(root / "run") / "state.pt")
        assert state["step"] in versions
        assert (state["weights"] == state["step"]).all()
        version = writing.read_description(root / "out")["version"]
        assert version in versions
        for name in ("model.pt", "tokenizer.pt"):
            assert (torch.load(root / "out" / name) == version).all()

    return kill_everywhere(root, prepare, lambda: save(2), check, lambda: check((2,)))


def cache(root: Path) -> int:
    """Entries of the cache on disk, one in the place of another, and one that pushes others out."""
    from llava_edge.cache import DiskCache, key_of

    disk = DiskCache(root / "computed", limit=10_000)
    old, new = key_of(number=1), key_of(number=2)

    def prepare() -> None:
        shutil.rmtree(root, ignore_errors=True)
        disk.put("prefixes", old, [b"old" * 1000])
        disk.put("embeddings", old, [b"old" * 1000])
        os.utime(disk.root / "prefixes" / old, (1, 1))

    def act() -> None:
        disk.put("prefixes", new, [b"new" * 2000])
        disk.put("embeddings", old, [b"old" * 1000])

    def check() -> None:
        for kind, key, good in (("prefixes", old, b"old"), ("embeddings", old, b"old"), ("prefixes", new, b"new")):
            found = disk.get(kind, key)  # type: ignore[arg-type]
            assert found is None or bytes(found) == good * (2000 if key == new else 1000)

    def check_complete() -> None:
        check()
        assert disk.has("embeddings", old)
        assert sum(found.n_bytes for found in disk.usage().values()) <= disk.limit

    return kill_everywhere(root, prepare, act, check, check_complete)


if __name__ == "__main__":
    writers = {"pull": pull, "remove": remove, "publish": publish, "checkpoint": checkpoint, "cache": cache}
    writer = writers[sys.argv[1]]
    sys.stdout.write(f"{writer(Path(sys.argv[2]))}\n")
