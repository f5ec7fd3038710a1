"""Where llava-edge keeps what it downloads and what it remembers."""

from __future__ import annotations

import os
from pathlib import Path


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether something of this name can be reached. Until Python 3.14 that of pathlib raises where a directory can't
    be looked into, or a name is too long.
    """
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file of this name can be reached; see :func:`exists`."""
    return os.path.isfile(path)  # noqa: PTH113


def cache_dir() -> Path:
    """Where llava-edge remembers what it has measured: ``LLAVA_EDGE_HOME``, else the platform's place for caches."""
    home = os.environ.get("LLAVA_EDGE_HOME")
    if home:
        return Path(home)
    import platformdirs

    return Path(platformdirs.user_cache_dir("llava-edge", appauthor=False))


def models_dir() -> Path:
    """Where pulled models lie: ``LLAVA_EDGE_HOME/models``, else in the platform's place for data."""
    home = os.environ.get("LLAVA_EDGE_HOME")
    if home:
        return Path(home) / "models"
    import platformdirs

    return Path(platformdirs.user_data_dir("llava-edge", appauthor=False)) / "models"
