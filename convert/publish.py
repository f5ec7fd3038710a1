"""From a directory in the making to the output: a kill at any moment leaves the old bundle or the new one."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_edge import files
from llava_edge.bundle import MANIFEST_NAME, open_bundle
from llava_edge.errors import InputError, ModelError


def check_output(output: Path, force: bool) -> None:
    """Refuse to write over anything but an empty directory, or a bundle if ``force`` says so."""
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} does not exist", hint="Make the directory first.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST_NAME).is_file():
        raise InputError(f"{output} exists and is not a bundle", hint="Choose another name for the output.")
    if not force:
        raise InputError(f"{output} exists", hint="Use --force to replace this bundle, or choose another name.")


@contextmanager
def working_directory(output: Path) -> Iterator[Path]:
    """A directory on the output's file system that is gone afterwards, unless :func:`publish` renamed it.

    What runs that were killed left of theirs is removed; a directory that is still being written to is locked.
    """
    remove_leftovers(output.parent, f".{glob.escape(output.name)}.*.partial")
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    with locked(work):
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the directories of a name that no process holds: those of runs that were killed."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError), locked(left):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory; OSError where another process does."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def publish(work: Path, output: Path) -> None:
    """Put ``work`` in the place of ``output``. Files beside the old bundle's own, such as a README, are kept."""
    mode = 0o777 & ~_umask()
    for path in work.iterdir():
        files.sync(path)
    if not output.exists():
        work.chmod(mode)
        files.replace_directory(work, output)
        return
    _keep_other_files(output, work)
    work.chmod(mode)
    files.sync(work)
    files.replace_directory(work, output)


def _keep_other_files(output: Path, work: Path) -> None:
    try:
        replaced = {MANIFEST_NAME, *(file.path for file in open_bundle(output).manifest.files)}
    except ModelError:
        replaced = {MANIFEST_NAME} | {path.name for path in output.iterdir() if path.suffix in (".gguf", ".onnx")}
    for path in output.iterdir():
        if path.name in replaced or (work / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, work / path.name, symlinks=True)
        else:
            shutil.copy2(path, work / path.name, follow_symlinks=False)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
