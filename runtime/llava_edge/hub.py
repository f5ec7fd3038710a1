"""Downloads from a Hugging Face hub, through huggingface_hub: what is there, and its files, checked.

The library's own download starts over after an interruption (since 1.x it deletes what it has), so its ``http_get``,
which can resume, is called on a file that is named by its content's digest. That way an interrupted download goes on
in the next process, and never with another content. Every file is compared with the digest that the hub's listing
gives: SHA-256 of large files, git's SHA-1 of small ones.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llava_edge.errors import InputError, LlavaEdgeError, ModelError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_SHA1 = re.compile(r"[0-9a-f]{40}\Z")

_CHUNK_BYTES = 64 * 1024

Progress = Callable[[int], None]


class DownloadError(LlavaEdgeError):
    """The hub can't be reached, refuses, or sends something else than it announced."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. ``digest`` is SHA-256 (64 digits) or git's SHA-1 (40 digits) of a small file."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    name: str
    commit: str
    license: str
    gated: bool
    files: tuple[RemoteFile, ...]


def list_repository(name: str, revision: str | None = None) -> Repository:
    """What a repository holds, with sizes and digests.

    ``HF_ENDPOINT``, ``HF_TOKEN`` (or the token of ``hf auth login``) and ``HF_HUB_OFFLINE`` are respected.

    Raises
    ------
    InputError
        The name is not ``owner/name``.
    DownloadError
        The hub can't be reached, or says no; the hint has what to do.
    """
    if not _REPO.match(name):
        raise InputError(f"{name!r} is no repository", hint="Expected owner/name, as in the address of its page.")
    from huggingface_hub import HfApi

    with _as_download_errors(name):
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    return Repository(name, info.sha or "", _license(info), bool(info.gated), tuple(_files(info)))


def download(repository: Repository, file: RemoteFile, directory: Path, progress: Progress | None = None) -> Path:
    """Download a file to ``directory``, named by its digest, or find it complete there; resumes what was begun.

    A content that is not the announced one is deleted, and downloaded once more.
    """
    directory.mkdir(parents=True, exist_ok=True)
    complete = directory / file.digest
    if complete.is_file() and _digest(complete, file) == file.digest:
        if progress is not None:
            progress(file.size)
        return complete
    partial = directory / f"{file.digest}.partial"
    for attempt in (1, 2):
        _fetch(repository, file, partial, progress)
        if _digest(partial, file) == file.digest:
            partial.replace(complete)
            return complete
        partial.unlink()
        if progress is not None:
            progress(-file.size)
        if attempt == 2:
            break
    raise DownloadError(
        f"{repository.name}: {file.path} arrived twice with another content than the hub's listing says",
        hint="A proxy or mirror may change it. Try another network, or HF_ENDPOINT.",
    )


def _fetch(repository: Repository, file: RemoteFile, partial: Path, progress: Progress | None) -> None:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars("huggingface_hub.http_get")
    # What is less than a chunk is lost when the connection breaks, and the library's chunk is 10 MB.
    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
    have = partial.stat().st_size if partial.exists() else 0
    if have > file.size:
        partial.unlink()
        have = 0
    if progress is not None:
        progress(have)
    if have == file.size:
        return
    with _as_download_errors(repository.name), _CountingFile(partial, progress) as target:
        url = hf_hub_url(repository.name, file.path, revision=repository.commit)
        metadata = get_hf_file_metadata(url)
        if metadata.size is not None and metadata.size != file.size:
            raise DownloadError(
                f"{repository.name}: the server says {file.path} has {metadata.size} bytes; its listing {file.size}",
                hint="Try again later; it may just have changed.",
            )
        headers = build_hf_headers()
        if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)  # the token is for the hub, not for its storage
        http_get(metadata.location, target, resume_size=have, headers=headers, expected_size=file.size)
        os.fsync(target.fileno())


class _CountingFile(io.FileIO):
    """A file that is appended to and tells how much."""

    def __init__(self, path: Path, progress: Progress | None) -> None:
        super().__init__(path, "ab")
        self._progress = progress

    def write(self, data: Any) -> int:
        written = super().write(data) or 0
        if self._progress is not None:
            self._progress(written)
        return written


def _digest(path: Path, file: RemoteFile) -> str:
    git = len(file.digest) == 40
    digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False) if git else hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _files(info: ModelInfo) -> Iterator[RemoteFile]:
    for sibling in info.siblings or []:
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        size = sibling.lfs.size if sibling.lfs else sibling.size
        if digest and size is not None and size >= 0 and (_SHA256.match(digest) or _SHA1.match(digest)):
            yield RemoteFile(sibling.rfilename, size, digest)


def _license(info: ModelInfo) -> str:
    card = info.card_data
    for key in ("license_name", "license"):
        value = getattr(card, key, None) if card is not None else None
        if isinstance(value, str) and value != "other":
            return value
    tags = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    return tags[0] if tags else "not stated"


@contextmanager
def _as_download_errors(name: str) -> Iterator[None]:
    """The library's errors, in words and with a next step."""
    from huggingface_hub import errors

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        yield
    except LlavaEdgeError:
        raise
    except errors.GatedRepoError:
        raise DownloadError(
            f"{name} is gated: its licence has to be accepted first",
            hint=f"Accept it at {hub}/{name}, then set HF_TOKEN or run `hf auth login`.",
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise DownloadError(
            f"{hub} has no repository {name}, or it is private",
            hint="Check the name; for a private one set HF_TOKEN or run `hf auth login`.",
        ) from None
    except errors.OfflineModeIsEnabled:
        raise DownloadError(
            f"{name} can't be downloaded: HF_HUB_OFFLINE is set", hint="Unset it, or use a model that is there."
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "nothing"
        busy = status == 429
        raise DownloadError(
            f"{hub} answers {status} for {name}" + (": too many requests" if busy else ""),
            hint="Wait a few minutes" + (", or set HF_TOKEN, which has a higher limit." if busy else " and try again."),
        ) from None
    except Exception as error:  # the HTTP library's own, a broken connection, no room on the disk
        if isinstance(error, OSError) and error.errno == 28:
            raise ModelError("the disk is full", hint="Free some space; the download goes on where it was.") from None
        said = str(error).strip().splitlines()
        raise DownloadError(
            f"the download of {name} failed: {said[0] if said else type(error).__name__}",
            hint="Try again: it goes on where it was.",
        ) from None
