"""Pulling a model: choose its files, see that they fit, download, check, and put them in place with a manifest."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llava_edge import hub, memory, store
from llava_edge.bundle import MANIFEST_NAME, BundleFile, Manifest, Role, embedded_models
from llava_edge.errors import InputError, LlavaEdgeError, ModelError
from llava_edge.files import replace_directory, sync
from llava_edge.gguf_check import check_gguf
from llava_edge.gguf_mmproj import known_defects
from llava_edge.hub import RemoteFile, Repository
from llava_edge.onnx_check import check_onnx
from llava_edge.paths import models_dir
from llava_edge.registry import known_models

Say = Callable[[str], None]

# Types in the order in which they are taken when none is asked for.
LLM_PREFERENCE = ("Q4_K_M", "Q4_K", "Q4_K_S", "Q5_K_M", "Q5_K", "Q4_0", "Q8_0", "F16", "BF16", "F32")
MMPROJ_PREFERENCE = ("F16", "Q8_0", "BF16", "F32")
_TYPE = re.compile(
    r"(?<![A-Za-z0-9])(I?Q[1-8]_[A-Z0-9]+(?:_[A-Z]+)?|BF16|F16|F32|FP16|FP32)(?![A-Za-z0-9])", re.IGNORECASE
)
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf\Z")
_ROOM = 64 * 1024 * 1024


@dataclass(frozen=True)
class Plan:
    """What will be downloaded. ``files`` has roles for a raw pair, and paths inside of a bundle otherwise."""

    name: str
    repository: Repository
    files: tuple[tuple[str, RemoteFile], ...]
    is_bundle: bool

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for _, file in self.files)


def plan(wanted: str, *, name: str | None = None, mmproj: str | None = None) -> Plan:
    """Find out what ``NAME_OR_REPO[:TYPE]`` means, and what it would download; asks the hub.

    Raises
    ------
    InputError
        No such name, or the repository has no such type; the message lists what there is.
    DownloadError
        The hub can't be reached, or refuses.
    """
    base, _, kind = wanted.partition(":")
    known = known_models().get(base)
    if base in embedded_models():
        raise InputError(f"{base} is part of this package: nothing has to be pulled", hint=f"chat --model {base}")
    if known is None and "/" not in base:
        raise InputError(
            f"no model {base!r} is known; known are {', '.join(known_models())}",
            hint="Or name a repository of the hub: owner/name.",
        )
    repository = hub.list_repository(known.repo if known is not None and known.repo else base)
    label = store.check_name(name or base.rpartition("/")[2] + (f"-{kind}" if kind else ""))
    if any(file.path == MANIFEST_NAME for file in repository.files):
        return Plan(label, repository, tuple((file.path, file) for file in repository.files if _in_bundle(file)), True)
    return Plan(label, repository, _pair(repository, kind, mmproj), False)


def check_room(wanted: Plan) -> None:
    """Refuse what fits neither the memory nor the disk; the message says what would fit."""
    total, needed = memory.total_bytes(), memory.needed_bytes(wanted.n_bytes)
    if total is not None and needed > total:
        raise ModelError(
            f"{wanted.name} needs about {_gib(needed)} of memory; this machine has {_gib(total)}",
            hint=f"{_what_fits(wanted, total)} --force pulls it anyway.",
        )
    root = models_dir()
    root.mkdir(parents=True, exist_ok=True)
    missing = sum(max(0, file.size - _have(wanted, file)) for _, file in wanted.files) + _ROOM
    free = shutil.disk_usage(root).free
    if missing > free:
        raise ModelError(
            f"{wanted.name} needs {_gib(missing)} more on the disk; {root} has {_gib(free)} left",
            hint="`llava-edge remove` deletes a model; LLAVA_EDGE_HOME names another place.",
        )


def pull(wanted: Plan, *, progress: hub.Progress | None = None, say: Say | None = None) -> store.Pulled:
    """Download, check and publish. After an interruption the next call goes on; half a model is never seen.

    Raises
    ------
    DownloadError
        The hub can't be reached, refuses, or sends other contents than its listing says.
    ModelFileError
        A file is no well-formed model.
    """
    say = say or (lambda _line: None)
    with _lock(wanted.name, say):
        present = store.find(wanted.name)
        if present is not None:
            if _same(present, wanted):
                _forget(wanted)
                return present
            raise ModelError(
                f"there is another model {wanted.name}, from {present.source}",
                hint=f"Remove it first (`llava-edge remove {wanted.name}`), or give this one a name with --as.",
            )
        parts = _partial(wanted)
        arrived = [(label, hub.download(wanted.repository, file, parts, progress)) for label, file in wanted.files]
        work = models_dir() / f".{wanted.name}.arriving"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        if wanted.is_bundle:
            _lay_out_bundle(wanted, arrived, work)
        else:
            _lay_out_pair(wanted, arrived, work, say)
        for path in work.iterdir():
            sync(path)
        sync(work)
        final = models_dir() / wanted.name
        replace_directory(work, final)
        _forget(wanted)
        return store.open_pulled(final)


def _pair(repository: Repository, kind: str, mmproj: str | None) -> tuple[tuple[str, RemoteFile], ...]:
    ggufs = [file for file in repository.files if file.path.endswith(".gguf")]
    towers = [file for file in ggufs if "mmproj" in file.path.lower()]
    llms = [file for file in ggufs if "mmproj" not in file.path.lower() and not _SPLIT.search(file.path)]
    if not towers or not llms:
        has = ", ".join(file.path for file in ggufs[:8]) or "no GGUF file"
        raise InputError(
            f"{repository.name} has not both a language model and an mmproj file; it has {has}",
            hint="A repository with both has 'GGUF' in its name, as a rule.",
        )
    return (
        ("llm", _choose(repository, llms, kind, LLM_PREFERENCE)),
        ("mmproj", _choose(repository, towers, mmproj or "", MMPROJ_PREFERENCE)),
    )


def _choose(repository: Repository, files: list[RemoteFile], kind: str, preference: Sequence[str]) -> RemoteFile:
    """The file of a type (or of a path, where types don't tell files apart)."""
    for file in files:
        if kind and kind == file.path:
            return file
    by_type: dict[str, list[RemoteFile]] = {}
    for file in files:
        by_type.setdefault(type_of(file.path), []).append(file)
    if kind:
        found = by_type.get(_canonical(kind), [])
    else:
        found = next((by_type[name] for name in preference if name in by_type), files if len(files) == 1 else [])
    if len(found) == 1:
        return found[0]
    problem = f"has {len(found)} files" if found else "has no file"
    listed = ", ".join(f"{type_of(file.path)} ({file.path})" for file in files[:12])
    raise InputError(
        f"{repository.name} {problem} of type {kind or 'one of ' + ', '.join(preference)}; it has {listed}",
        hint="Name one of these types or paths after a colon.",
    )


def type_of(path: str) -> str:
    """The precision that a file's name tells, in llama.cpp's spelling; ``unknown`` if it tells none."""
    found = _TYPE.findall(Path(path).stem)
    return _canonical(found[-1]) if found else "unknown"


def _canonical(kind: str) -> str:
    return kind.upper().replace("FP", "F")


def _in_bundle(file: RemoteFile) -> bool:
    return file.path == MANIFEST_NAME or file.path.endswith((".gguf", ".onnx", "README.md"))


def _lay_out_pair(wanted: Plan, arrived: list[tuple[str, Path]], work: Path, say: Say) -> None:
    entries = []
    warnings: list[str] = []
    for (role, path), (_, file) in zip(arrived, wanted.files, strict=True):
        kind = type_of(file.path)
        target = work / f"{role}-{kind}.gguf"
        _place(path, target)
        header = check_gguf(target, "mmproj" if role == "mmproj" else "llm")
        warnings += known_defects(header) if role == "mmproj" else []
        entries.append(BundleFile(target.name, _role(role), file.digest, file.size, kind))
    for warning in warnings:
        say(f"warning: {wanted.name}: {warning}")
    repository = wanted.repository
    pair = store.Pair(
        wanted.name, repository.name, repository.commit, repository.license, tuple(entries), tuple(warnings)
    )
    (work / store.PAIR_NAME).write_text(pair.to_json(), encoding="utf-8")


def _lay_out_bundle(wanted: Plan, arrived: list[tuple[str, Path]], work: Path) -> None:
    paths = dict(arrived)
    manifest = Manifest.from_json(paths[MANIFEST_NAME].read_text(encoding="utf-8"))
    digests = {path: file.digest for path, file in wanted.files}
    for entry in manifest.files:
        if digests.get(entry.path) != entry.sha256:
            raise ModelError(f"{wanted.repository.name}: {entry.path} is not the file that its manifest describes")
        target = work / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        _place(paths[entry.path], target)
        if entry.role == "vision_onnx":
            check_onnx(target)
        else:
            check_gguf(target, "mmproj" if entry.role == "mmproj" else "llm")
    for extra in (MANIFEST_NAME, "README.md"):
        if extra in paths:
            shutil.copyfile(paths[extra], work / extra)


def _role(role: str) -> Role:
    return "mmproj" if role == "mmproj" else "llm"


def _same(present: store.Pulled, wanted: Plan) -> bool:
    digests = {file.digest for _, file in wanted.files}
    return all(file.sha256 in digests for file in present.files)


def _forget(wanted: Plan) -> None:
    """Delete what was kept of the download for the case of an interruption."""
    for _, file in wanted.files:
        (_partial(wanted) / file.digest).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        _partial(wanted).rmdir()


def _partial(wanted: Plan) -> Path:
    """Where a download is kept until it is complete: each model's apart, because the lock is one of a name."""
    return models_dir() / ".partial" / wanted.name


def _place(path: Path, target: Path) -> None:
    """Lay a downloaded file out. The download stays until all is in place, where the file system has links."""
    try:
        os.link(path, target)
    except OSError:
        path.rename(target)


def _have(wanted: Plan, file: RemoteFile) -> int:
    parts = _partial(wanted)
    for path in (parts / file.digest, parts / f"{file.digest}.partial"):
        if path.exists():
            return path.stat().st_size
    return 0


def _what_fits(wanted: Plan, total: int) -> str:
    llms = [
        file for file in wanted.repository.files if file.path.endswith(".gguf") and "mmproj" not in file.path.lower()
    ]
    tower = sum(file.size for role, file in wanted.files if role == "mmproj")
    fitting = [type_of(f.path) for f in llms if memory.needed_bytes(f.size + tower) <= total]
    if fitting:
        return f"{', '.join(sorted(set(fitting)))} of the same repository would fit."
    models = [model.name for model in known_models().values() if model.memory_gib * memory.GIB <= total]
    return f"Known models that would fit: {', '.join(models)}."


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / memory.GIB:.1f} GiB"


@contextmanager
def _lock(name: str, say: Say) -> Iterator[None]:
    """One process at a time pulls a model; another one waits, and then finds it."""
    from filelock import FileLock, Timeout

    path = models_dir() / ".locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is pulling {name}; waiting for it")
        lock.acquire()
    except OSError as error:
        raise LlavaEdgeError(f"can't write in {models_dir()}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()
