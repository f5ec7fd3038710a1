"""Which program runs the vision tower: the manifest ranks them, and the self-check has the last word."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from llava_edge.errors import InputError, ModelError
from llava_edge.vision import native, selfcheck

if TYPE_CHECKING:
    from llava_edge.bundle import Bundle, Role
    from llava_edge.engine import Engine
    from llava_edge.vision import VisionEncoder

log = logging.getLogger(__name__)

Choice = Literal["auto", "onnx", "coreml", "mtmd", "native"]
CHOICES: tuple[Choice, ...] = ("auto", "onnx", "coreml", "mtmd", "native")
ROLE_OF: dict[str, Role] = {"onnx": "vision_onnx", "coreml": "vision_onnx", "mtmd": "mmproj", "native": "mmproj"}


def candidates(bundle: Bundle, choice: str) -> list[str]:
    """The backends to try, best first. An error in words if there is none."""
    if choice not in CHOICES:
        raise InputError(f"vision_backend is {choice!r}; expected one of {', '.join(CHOICES)}")
    manifest = bundle.manifest
    usable: list[str] = [name for name in manifest.backends if bundle.has(ROLE_OF[name]) and _installed(name)]
    if choice == "auto" and usable:
        return usable
    if choice != "auto" and bundle.has(ROLE_OF[choice]):
        return [choice]
    wanted = f"the vision backend {choice}" if choice != "auto" else "a vision backend of this version"
    raise ModelError(
        f"{manifest.name} has no file for {wanted}; it ranks {', '.join(manifest.backends) or 'none'}",
        hint=f"It runs with: {', '.join(usable)}." if usable else "Convert it again with --vision int8.",
    )


def _installed(name: str) -> bool:
    return name != "native" or native.find_shared_library() is not None


def open_encoder(bundle: Bundle, engine: Engine, choice: str) -> tuple[str, VisionEncoder]:
    """The first backend that loads and passes the self-check, with its name. The last one's error is raised."""
    names = candidates(bundle, choice)
    if bundle.manifest.probe is None:
        log.warning(
            "%s has no probe: nothing tells whether its vision tower is right on this machine", bundle.manifest.name
        )
    for name in names[:-1]:
        try:
            return name, _open(bundle, engine, name)
        except ModelError as error:
            log.warning("%s; taking %s instead", error, names[names.index(name) + 1])
    return names[-1], _open(bundle, engine, names[-1])


def _open(bundle: Bundle, engine: Engine, name: str) -> VisionEncoder:
    encoder = make_encoder(bundle, engine, name)
    try:
        selfcheck.check(encoder, bundle, ROLE_OF[name], name)
    except BaseException:
        encoder.close()
        raise
    return encoder


def make_encoder(bundle: Bundle, engine: Engine, name: str) -> VisionEncoder:
    """A backend by name, not yet checked."""
    path = bundle.file(ROLE_OF[name])
    if name in ("onnx", "coreml"):
        from llava_edge.vision.onnx import OnnxEncoder

        return OnnxEncoder(path, bundle.manifest.image, engine, coreml=name == "coreml")
    if name == "native":
        return native.NativeEncoder(path, engine)
    from llava_edge.vision.mtmd import MtmdEncoder

    return MtmdEncoder(path, engine)
