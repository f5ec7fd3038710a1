"""A bundle: a directory with everything that is needed to run a model, described by its manifest.

The manifest is strict. Unknown or missing keys, wrong types and paths that leave the directory are errors that name
the key, so a bundle that opens is one that this version understands.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import os
import re
import stat
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from llava_edge.errors import InputError, ModelError
from llava_edge.paths import is_file, models_dir
from llava_edge.registry import known_models
from llava_edge.strict_json import Fields, parse_object
from llava_edge.types import ImageSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

MANIFEST_NAME = "llava-edge.json"
SCHEMA = 1
MAX_MANIFEST_BYTES = 16 * 1024 * 1024

Role = Literal["llm", "mmproj", "vision_onnx"]
Backend = Literal["onnx", "mtmd", "native"]
ROLES: tuple[Role, ...] = get_args(Role)
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class BundleFile:
    """One file of a bundle. ``path`` is relative to the bundle, with ``/``; ``type`` is its precision (``Q4_K_M``)."""

    path: str
    role: Role
    sha256: str
    bytes: int
    type: str

    def __post_init__(self) -> None:
        if not all(_SAFE_NAME.match(part) for part in self.path.split("/")):
            raise InputError(f"path is {self.path!r}; expected a relative path of plain names inside the bundle")
        if self.role not in ROLES:
            raise InputError(f"role is {self.role!r}; expected one of {', '.join(ROLES)}")
        if not _SHA256.match(self.sha256):
            raise InputError(f"sha256 is {self.sha256!r}; expected 64 lower-case hexadecimal digits")
        if self.bytes < 0:
            raise InputError(f"bytes is {self.bytes}; expected 0 or more")


@dataclass(frozen=True)
class PromptFormat:
    """The text around a conversation's turns. Special tokens in these strings are parsed, in user text never.

    ``system`` holds ``{system}`` and is left out when there is no system text; ``turn_end`` follows a finished
    answer before the next turn; ``image_suffix`` follows each picture, and
    ``text_prefix`` begins the question of a turn that shows none.
    """

    bos: str
    system: str
    default_system: str | None
    user_prefix: str
    user_suffix: str
    assistant_prefix: str
    turn_end: str
    stop: tuple[str, ...]
    image_suffix: str
    text_prefix: str = ""

    def __post_init__(self) -> None:
        if self.system and self.system.count("{system}") != 1:
            raise InputError(f"system is {self.system!r}; expected exactly one {{system}} in it, or an empty text")
        if self.default_system and not self.system:
            raise InputError(f"default_system is {self.default_system!r}, and system has no place for it")
        if not all(self.stop):
            raise InputError("stop holds an empty text")


@dataclass(frozen=True)
class VisualTokens:
    """How many tokens a picture takes, with ``anyres`` each tile. ``grid`` is rows and columns of the ``full`` count.

    ``trained`` are the counts (after grid pooling) that the model has learnt; ``default`` is used unless asked.
    """

    full: int
    grid: tuple[int, int]
    trained: tuple[int, ...]
    default: int

    def __post_init__(self) -> None:
        if self.grid[0] * self.grid[1] != self.full or min(self.grid) < 1:
            raise InputError(f"grid is {list(self.grid)}; expected rows x columns = full = {self.full}")
        if self.default not in self.trained:
            raise InputError(f"default is {self.default}; expected one of trained = {list(self.trained)}")
        if not all(1 <= count <= self.full for count in self.trained):
            raise InputError(f"trained is {list(self.trained)}; expected counts from 1 to full = {self.full}")


@dataclass(frozen=True)
class Probe:
    """Rows ``token_rows`` of the embeddings that the reference gives for :func:`probe_picture`.

    ``embeddings`` is base64 of little-endian float16 ``[rows, d]``, before any reduction of tokens.
    """

    token_rows: tuple[int, ...]
    embeddings: str

    def __post_init__(self) -> None:
        try:
            size = len(base64.b64decode(self.embeddings, validate=True))
        except ValueError:
            raise InputError("embeddings is not base64") from None
        if not self.token_rows or min(self.token_rows) < 0:
            raise InputError(f"token_rows is {list(self.token_rows)}; expected row numbers from 0 on")
        if size == 0 or size % (2 * len(self.token_rows)):
            raise InputError(f"embeddings has {size} bytes; expected {len(self.token_rows)} rows of float16")

    @classmethod
    def of(cls, token_rows: tuple[int, ...], embeddings: NDArray[np.float32]) -> Probe:
        """Make one from the reference's embeddings ``[n_tokens, d]`` of the whole picture."""
        rows = embeddings[list(token_rows)].astype("<f2")
        return cls(token_rows, base64.b64encode(rows.tobytes()).decode("ascii"))

    @property
    def array(self) -> NDArray[np.float32]:
        """``float32 [rows, d]``."""
        import numpy as np

        flat = np.frombuffer(base64.b64decode(self.embeddings), dtype="<f2")
        return flat.reshape(len(self.token_rows), -1).astype(np.float32)


@dataclass(frozen=True)
class Manifest:
    """What ``llava-edge.json`` says. ``probe`` and ``parity`` are None where nothing was measured."""

    name: str
    family: str
    license: str
    source: str
    files: tuple[BundleFile, ...]
    prompt: PromptFormat
    image: ImageSpec
    visual_tokens: VisualTokens
    feature_layers: tuple[int, ...]
    backends: tuple[Backend, ...]
    probe: Probe | None = None
    parity: dict[str, Any] | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise InputError(f"schema is {self.schema}; this version of llava-edge reads {SCHEMA}")
        if unknown := [backend for backend in self.backends if backend not in BACKENDS]:
            raise InputError(f"backends has {unknown[0]!r}; expected some of {', '.join(BACKENDS)}")
        for label, values in (("role", [f.role for f in self.files]), ("path", [f.path for f in self.files])):
            if len(set(values)) != len(values):
                raise InputError(f"files has two entries with the same {label}")
        if "llm" not in [file.role for file in self.files]:
            raise InputError("files has no entry of role llm")

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse a manifest; raises ModelError that names the key."""
        try:
            return _manifest(parse_object(text))
        except InputError as error:
            raise ModelError(f"manifest: {error}", hint="The bundle is damaged, or made by another version.") from None

    def to_json(self) -> str:
        """The text of ``llava-edge.json``."""
        fields = {"schema": self.schema, **asdict(self)}
        for optional in ("grid", "max_tiles"):
            if not fields["image"][optional]:
                del fields["image"][optional]
        if not self.prompt.text_prefix:
            del fields["prompt"]["text_prefix"]
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def _manifest(root: Fields) -> Manifest:
    schema = root.integer("schema")
    if schema != SCHEMA:
        raise InputError(f"schema is {schema}; this version of llava-edge reads {SCHEMA}")
    files = tuple(entry.build(_file) for entry in root.objects("files"))
    return root.build(
        lambda f: Manifest(
            name=f.text("name"),
            family=f.text("family"),
            license=f.text("license"),
            source=f.text("source"),
            files=files,
            prompt=f.object("prompt").build(prompt_from_fields),
            image=f.object("image").build(image_from_fields),
            visual_tokens=f.object("visual_tokens").build(visual_tokens_from_fields),
            feature_layers=f.integers("feature_layers"),
            backends=cast("tuple[Backend, ...]", f.texts("backends")),
            probe=None if f.is_null("probe") else f.object("probe").build(_probe),
            parity=None if f.is_null("parity") else f.object("parity").raw(),
            schema=schema,
        )
    )


def _file(f: Fields) -> BundleFile:
    role = cast("Role", f.text("role"))
    return BundleFile(f.text("path"), role, f.text("sha256"), f.integer("bytes"), f.text("type"))


def prompt_from_fields(f: Fields) -> PromptFormat:
    """Read a :class:`PromptFormat` from a parsed JSON object."""
    return PromptFormat(
        bos=f.text("bos"),
        system=f.text("system"),
        default_system=None if f.is_null("default_system") else f.text("default_system"),
        user_prefix=f.text("user_prefix"),
        user_suffix=f.text("user_suffix"),
        assistant_prefix=f.text("assistant_prefix"),
        turn_end=f.text("turn_end"),
        stop=f.texts("stop"),
        image_suffix=f.text("image_suffix"),
        text_prefix=f.text("text_prefix") if f.has("text_prefix") else "",
    )


def image_from_fields(f: Fields) -> ImageSpec:
    """Read an :class:`ImageSpec` from a parsed JSON object."""
    mode: Any = f.text("mode")
    red, green, blue = f.integers("pad_color", 3)
    return ImageSpec(
        size=f.integer("size"),
        mean=cast("tuple[float, float, float]", f.numbers("mean", 3)),
        std=cast("tuple[float, float, float]", f.numbers("std", 3)),
        mode=mode,
        pad_color=(red, green, blue),
        grid=f.pairs("grid") if f.has("grid") else (),
        max_tiles=f.integer("max_tiles") if f.has("max_tiles") else 0,
    )


def visual_tokens_from_fields(f: Fields) -> VisualTokens:
    """Read :class:`VisualTokens` from a parsed JSON object."""
    rows, columns = f.integers("grid", 2)
    return VisualTokens(f.integer("full"), (rows, columns), f.integers("trained"), f.integer("default"))


def _probe(f: Fields) -> Probe:
    return Probe(f.integers("token_rows"), f.text("embeddings"))


@dataclass(frozen=True)
class Bundle:
    """A directory and its manifest. The files were there, of the right size, when it was opened."""

    directory: Path
    manifest: Manifest

    def has(self, role: Role) -> bool:
        """Whether the bundle has a file with this role."""
        return any(file.role == role for file in self.manifest.files)

    def file(self, role: Role) -> Path:
        """The path of the file with this role; ModelError if the bundle has none."""
        for file in self.manifest.files:
            if file.role == role:
                return self.directory / file.path
        raise ModelError(f"the bundle {self.directory} has no file of role {role}")

    def verify(self) -> None:
        """Compare every file's SHA-256 with the manifest's; ModelError names the first that differs."""
        for file in self.manifest.files:
            found = sha256_file(self.directory / file.path)
            if found != file.sha256:
                raise ModelError(
                    f"{self.directory / file.path} is damaged: its SHA-256 is {found}, the manifest says {file.sha256}",
                    hint="Get the bundle again.",
                )


def open_bundle(directory: str | os.PathLike[str]) -> Bundle:
    """Read the manifest and check that every file is there with its size; content is left to ``Bundle.verify``."""
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ModelError(f"{path} has more than {MAX_MANIFEST_BYTES} bytes: it is not a manifest")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(
            f"{directory} is not a model: it has no {MANIFEST_NAME}", hint="Make one with `llava-edge convert`."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"can't read {path}: {error}") from None
    try:
        manifest = Manifest.from_json(text)
    except ModelError as error:
        raise ModelError(f"{path}: {error}", hint=error.hint) from None
    for file in manifest.files:
        _check_size(directory / file.path, file.bytes)
    return Bundle(directory, manifest)


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}") from None
    if size is None:
        raise ModelError(f"{path} is missing although the manifest lists it", hint="Get the bundle again.")
    if size != expected:
        raise ModelError(f"{path} has {size} bytes; the manifest says {expected}", hint="Get the bundle again.")


def embedded_models() -> dict[str, Path]:
    """The models that came with the package, by name."""
    root = resources.files("llava_edge").joinpath("models")
    if not root.is_dir():
        return {}
    found = sorted(root.iterdir(), key=lambda entry: entry.name)
    return {e.name: Path(str(e)) for e in found if e.is_dir() and e.joinpath(MANIFEST_NAME).is_file()}


def resolve_model(name_or_dir: str | os.PathLike[str]) -> Bundle:
    """Open a bundle by its directory, or by the name of an embedded or a pulled model.

    A directory without a manifest gives way to a model of that name.
    """
    directory = Path(name_or_dir)
    if is_file(directory / MANIFEST_NAME):
        return open_bundle(directory)
    models = embedded_models()
    name = os.fspath(name_or_dir)
    if name in models:
        return open_bundle(models[name])
    if _SAFE_NAME.match(name) and is_file(models_dir() / name / MANIFEST_NAME):
        return open_bundle(models_dir() / name)
    try:
        if stat.S_ISDIR(directory.stat().st_mode):
            return open_bundle(directory)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of a name that no file can have
        pass
    except OSError as error:
        raise ModelError(f"can't open the model {name!r}: {error.strerror}") from None
    known = ", ".join(models) or "none"
    near = difflib.get_close_matches(name, models, n=1)
    if near:
        hint = f"Did you mean {near[0]}?"
    elif "/" in name or name in known_models():
        hint = f"Pull it first: llava-edge pull {name}"
    else:
        hint = "Give one of these names, or a directory made by `llava-edge convert`."
    raise ModelError(f"no model {name!r}; models that came with this package: {known}", hint=hint)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}") from None


def probe_picture(size: int) -> Image.Image:
    """The picture of the self-check, ``size`` pixels a side, from integers only so that every language agrees.

    Two ramps and a tilted pattern of squares: neighbouring patches differ, and so do rows, columns and colours.
    """
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:size, 0:size].astype(np.int64)
    red = (x * 255) // max(1, size - 1)
    green = (y * 255) // max(1, size - 1)
    blue = ((((3 * x + y) // 19) * 83 + ((3 * y - x + 3 * size) // 23) * 47) * 29) % 256
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))
