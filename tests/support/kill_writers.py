"""The writers of llava-edge, killed at every write: ``python kill_writers.py NAME DIRECTORY``; prints the count.

In a process of its own, because it forks.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kills import in_process, kill_everywhere, kill_inside_files


def tree(directory: Path) -> dict[str, str]:
    """Every file below a directory with its content's hash."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _kill(*what: Any) -> int:
    """Between the writes, and inside the files."""
    return kill_everywhere(*what) + kill_inside_files(*what)


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


def _bundle(root: Path, act: Callable[[Path], object]) -> int:
    """``act`` writes a bundle over an older one, which is that of the floats."""
    from llava_edge.bundle import open_bundle

    output, new = root / "work" / "bundle", root / "new"
    assert in_process(lambda: act(new)) == 0
    expected = tree(new)

    def prepare() -> None:
        shutil.rmtree(output.parent, ignore_errors=True)
        shutil.copytree(root / "floats", output)
        (output / "README.md").write_text("mine")

    def check() -> None:
        bundle = open_bundle(output)
        bundle.verify()
        assert (output / "README.md").read_text() == "mine"
        visible = sorted(path.name for path in output.parent.glob("[!.]*"))
        assert visible == ["bundle"], visible

    def check_complete() -> None:
        check()
        found = tree(output)
        del found["README.md"]
        assert found == expected, (sorted(found), sorted(expected))
        left = [path.name for path in output.parent.iterdir()]
        assert left == ["bundle"], left

    return _kill(output.parent, prepare, lambda: act(output), check, check_complete)


def _floats(root: Path) -> tuple[Path, Path]:
    """A tiny checkpoint, and its bundle of floats. What a conversion imports is there when the forks come."""
    import torch

    from llava_edge.convert import convert_checkpoint
    from llava_edge.convert.tiny import FAMILIES, make

    torch.set_num_threads(1)  # a fork has none of the threads
    source, floats = root / "checkpoint", root / "floats"
    make(FAMILIES["v1.5"], source)
    convert_checkpoint(source, floats, llm_type="F16", mmproj_type="F16", vision="fp32", verify=False)
    return source, floats


def convert(root: Path) -> int:
    """A whole conversion: float files, their quantisation, the manifest and the publication."""
    from llava_edge.convert import convert_checkpoint

    source, _ = _floats(root)

    def act(output: Path) -> None:
        convert_checkpoint(source, output, llm_type="Q8_0", mmproj_type="F16", verify=False, force=True)

    return _bundle(root, act)


def quantize(root: Path) -> int:
    """A bundle of floats made smaller by llama.cpp."""
    from llava_edge.convert import quantize_bundle

    _, floats = _floats(root)

    def act(output: Path) -> None:
        quantize_bundle(floats, output, "Q8_0", mmproj_type="Q8_0", verify=False, force=True)

    return _bundle(root, act)


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

    return _kill(root, prepare, lambda: save(2), check, lambda: check((2,)))


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
    writers = {each.__name__: each for each in (pull, remove, publish, convert, quantize, checkpoint, cache)}
    writer = writers[sys.argv[1]]
    sys.stdout.write(f"{writer(Path(sys.argv[2]))}\n")
