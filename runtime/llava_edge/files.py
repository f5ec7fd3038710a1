"""Writing so that a kill at any moment leaves the old or the new state."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS


def sync(path: Path) -> None:
    """Have a file, or a directory's entries, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_directory(new: Path, target: Path) -> None:
    """Put the directory ``new`` in the place of ``target``, which may exist, in one step.

    Both lie on one file system. Where the system can't exchange two directories, ``target`` is missing for a moment,
    and a kill just then leaves it under its name with ``.old``, from where :func:`recover_directory` takes it back.
    """
    if not target.exists():
        new.rename(target)
    elif _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)
    else:
        old = target.with_name(f"{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


def recover_directory(target: Path) -> None:
    """Take back what a kill in :func:`replace_directory` left under another name."""
    old = target.with_name(f"{target.name}.old")
    if not target.exists() and old.is_dir():
        old.rename(target)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two directories; False if the system or the file system can't."""
    library = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            return bool(library.renamex_np(os.fsencode(a), os.fsencode(b), ctypes.c_uint(_EXCHANGE)) == 0)
        exchange = library.renameat2
        return bool(exchange(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_EXCHANGE)) == 0)
    except AttributeError:
        return False
