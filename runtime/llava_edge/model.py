"""A loaded model: language model, vision tower and conversation format."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llava_edge import images, store
from llava_edge.bundle import Bundle, embedded_models, resolve_model
from llava_edge.engine import Engine
from llava_edge.errors import InputError, ModelError
from llava_edge.gguf_check import check_gguf
from llava_edge.gguf_mmproj import known_defects
from llava_edge.kv_cache import KvCache
from llava_edge.onnx_check import check_onnx
from llava_edge.prompt import BundleFormat, ChatFormat, ImageRef, PromptTokenizer
from llava_edge.trial import require_trial
from llava_edge.vision import EncodedImage
from llava_edge.vision.tokens import pool, pooled_counts

if TYPE_CHECKING:
    from PIL import Image

    from llava_edge.chat_template import TemplateFormat
    from llava_edge.generate import Generation
    from llava_edge.images import ImageSource
    from llava_edge.session import ChatSession
    from llava_edge.vision.mtmd import MtmdEncoder

log = logging.getLogger(__name__)

DEFAULT_MODEL = "nano"
# Embeddings of pictures that no conversation holds any more are kept up to this size.
ENCODED_BYTES = 256 * 1024 * 1024


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    llm: str | os.PathLike[str] | None = None,
    mmproj: str | os.PathLike[str] | None = None,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int | None = None,
    image_tokens: int | None = None,
    verbose: bool = False,
) -> Model:
    """Load a model.

    Parameters
    ----------
    model
        The name of a model that came with the package (``"nano"``, which is the default) or was pulled, or a bundle's
        directory.
    llm, mmproj
        Instead: any pair of GGUF files that llama.cpp can run, used with the language model's own chat template.
    n_ctx
        Length of the context in tokens; None is the model's own, at most 4096.
    n_threads
        CPU threads; None is one a physical core.
    n_gpu_layers
        Layers of the language model on the GPU, -1 is all; None is all where llama.cpp was built for a GPU.
    image_tokens
        Tokens of a picture, for bundles; None is the manifest's default.
    verbose
        Log at level DEBUG what llama.cpp says (logger ``llava_edge.native``).

    Raises
    ------
    ModelError
        No such model, a damaged file, or parts that don't belong together.
    """
    started = time.perf_counter()
    for name, value in (("n_ctx", n_ctx), ("n_threads", n_threads), ("image_tokens", image_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; expected 1 or more")
    if verbose:
        logging.getLogger("llava_edge").setLevel(logging.DEBUG)
    if llm or mmproj:
        parts = _raw_pair(model, llm, mmproj)
    else:
        parts = _pulled_pair(model or DEFAULT_MODEL) or _bundle_parts(model or DEFAULT_MODEL, image_tokens)
    if parts.bundle is None and image_tokens is not None:
        raise InputError("image_tokens needs a bundle, whose manifest tells the grid of the picture's tokens")
    _preflight(parts)
    engine = Engine(parts.llm, n_ctx=n_ctx, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
    try:
        return Model(engine, parts, started)
    except BaseException:
        engine.close()
        raise


@dataclass(frozen=True)
class Parts:
    """The files of a model, and the bundle if it is one."""

    name: str
    llm: Path
    mmproj: Path
    bundle: Bundle | None = None
    image_tokens: int | None = None


@dataclass(frozen=True)
class Picture:
    """A picture that was opened and brought to the tower's size. ``key`` is the hash of its content."""

    name: str
    key: str
    image: Image.Image = field(repr=False)


class Model:
    """A model in memory; made by :func:`load`. The vision tower is loaded when the first picture comes.

    All chats of a model share one KV cache: each finds its own beginning there, or evaluates it again.
    """

    def __init__(self, engine: Engine, parts: Parts, started: float) -> None:
        self.name = parts.name
        self.image_tokens = parts.image_tokens
        self.engine = engine
        self.cache = KvCache(engine)
        self.answering: Generation | None = None
        self._parts = parts
        self._encoder: MtmdEncoder | None = None
        self._encoded: OrderedDict[str, EncodedImage] = OrderedDict()
        self.tokenizer = PromptTokenizer(engine)
        self._template: TemplateFormat | None = None
        self.format = self._make_format()
        for number in (0, 1):
            self.tokenizer.learn(self.format.turn(number, [ImageRef("")], "?", None))
        tokens, texts = self.tokenizer.stop_tokens(self.format.stop)
        self.stop_tokens, self.stop_texts = frozenset(tokens), tuple(texts)
        self.load_seconds = time.perf_counter() - started

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<llava_edge.Model {self.name}>"

    def close(self) -> None:
        """Free the memory; chats of this model can't be used any more."""
        if self._encoder is not None:
            self._encoder.close()
        self.engine.close()
        self._encoded.clear()

    def chat(self, system: str | None = None) -> ChatSession:
        """Begin a conversation.

        ``system`` is its system message; None is the model's own, if it has one, and ``""`` is none.
        """
        from llava_edge.session import ChatSession

        return ChatSession(self, system)

    def describe(self) -> dict[str, Any]:
        """What this model is made of and how it runs, for people."""
        return {
            "model": self.name,
            "llm": self._parts.llm.name,
            "mmproj": self._parts.mmproj.name,
            "n_ctx": self.engine.n_ctx,
            "n_threads": self.engine.n_threads,
            "n_gpu_layers": self.engine.n_gpu_layers,
            "image_tokens": self.image_tokens,
        }

    def open_picture(self, source: ImageSource, number: int = 1) -> Picture:
        """Read a picture under limits and bring it to the tower's size; ImageError says what is wrong with it."""
        name = Path(source).name if isinstance(source, (str, os.PathLike)) else f"image {number}"
        if self._parts.bundle is None:
            image = images.open_image(source)
        else:
            spec = self._parts.bundle.manifest.image
            image = images.fit(images.open_image(source, pad_color=spec.pad_color), spec)
        return Picture(name, images.content_hash(image), image)

    def encode(self, picture: Picture) -> EncodedImage:
        """The picture as the language model reads it. A picture is encoded once."""
        encoded = self._encoded.get(picture.key)
        if encoded is None:
            encoded = self._encode(picture)
            self._encoded[picture.key] = encoded
            while len(self._encoded) > 1 and sum(e.nbytes for e in self._encoded.values()) > ENCODED_BYTES:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(picture.key)
        return encoded

    def _encode(self, picture: Picture) -> EncodedImage:
        encoder = self._load_encoder()
        if self._parts.bundle is None or self.image_tokens is None:
            encoded = EncodedImage(picture.key, encoder.encode_chunks(picture.image))
            if self._template is not None:
                self._template.marked_images = encoded.marked
            return encoded
        tokens = self._parts.bundle.manifest.visual_tokens
        (embeddings,) = encoder.encode([picture.image])
        if len(embeddings) != tokens.full:
            raise ModelError(
                f"the vision tower gives {len(embeddings)} tokens a picture; the manifest says {tokens.full}"
            )
        return EncodedImage.of(picture.key, pool(embeddings, tokens.grid, self.image_tokens))

    def _load_encoder(self) -> MtmdEncoder:
        if self._encoder is None:
            from llava_edge.vision.mtmd import MtmdEncoder

            encoder = MtmdEncoder(self._parts.mmproj, self.engine)
            try:
                self._check(encoder)
            except BaseException:
                encoder.close()
                raise
            self._encoder = encoder
        return self._encoder

    def _check(self, encoder: MtmdEncoder) -> None:
        bundle = self._parts.bundle
        if bundle is None:
            return
        if bundle.manifest.probe is None:
            log.warning("%s has no probe: nothing tells whether its vision tower is right on this machine", self.name)
            return
        from llava_edge.vision import selfcheck

        selfcheck.check(encoder, bundle, "mmproj", "mtmd")

    def _make_format(self) -> ChatFormat:
        if self._parts.bundle is not None:
            return BundleFormat(self._parts.bundle.manifest.prompt)
        from llava_edge.chat_template import TemplateFormat

        self._template = TemplateFormat(self.engine.chat_template, bos=self.engine.bos, eos=self.engine.eos)
        return self._template


def _raw_pair(
    model: str | os.PathLike[str] | None,
    llm: str | os.PathLike[str] | None,
    mmproj: str | os.PathLike[str] | None,
) -> Parts:
    if model is not None:
        raise InputError("give a model's name, or llm and mmproj, not both")
    if not (llm and mmproj):
        have, lack = ("llm", "mmproj") if llm else ("mmproj", "llm")
        raise InputError(f"{have} without {lack}: a raw pair needs both", hint=f"Give {lack} too.")
    return Parts(Path(llm).stem, Path(llm), Path(mmproj))


def _pulled_pair(model: str | os.PathLike[str]) -> Parts | None:
    """The files of a raw pair that was pulled, by its name or directory; None if it is something else."""
    directory = Path(model)
    if (directory / store.PAIR_NAME).is_file():
        pulled: store.Pulled | None = store.open_pulled(directory)
    elif directory.is_dir() or os.fspath(model) in embedded_models():
        return None
    else:
        pulled = store.find(os.fspath(model))
    if pulled is None or pulled.pair is None:
        return None
    return Parts(pulled.name, pulled.directory / pulled.pair.file("llm"), pulled.directory / pulled.pair.file("mmproj"))


def _preflight(parts: Parts) -> None:
    """Check the files before llama.cpp sees them, and say what it is known to compute wrongly."""
    llm, mmproj = check_gguf(parts.llm, "llm"), check_gguf(parts.mmproj, "mmproj")
    for defect in known_defects(mmproj):
        log.warning("%s: %s", parts.name, defect)
    require_trial(llm, mmproj)


def _bundle_parts(model: str | os.PathLike[str], image_tokens: int | None) -> Parts:
    bundle = resolve_model(model)
    manifest = bundle.manifest
    if "mtmd" not in manifest.backends:
        raise ModelError(f"{manifest.name} runs on {', '.join(manifest.backends)}; this version has only mtmd")
    if any(file.role == "vision_onnx" for file in manifest.files):
        check_onnx(bundle.file("vision_onnx"))
    tokens = manifest.visual_tokens
    count = tokens.default if image_tokens is None else image_tokens
    if count not in pooled_counts(tokens.grid):
        raise InputError(
            f"image_tokens is {count}; {manifest.name} can't pool its grid to that",
            hint=f"Possible are {', '.join(map(str, pooled_counts(tokens.grid)))}.",
        )
    if count not in tokens.trained:
        trained = ", ".join(map(str, tokens.trained))
        log.warning("%s has not learnt to read %d tokens a picture, only %s", manifest.name, count, trained)
    return Parts(manifest.name, bundle.file("llm"), bundle.file("mmproj"), bundle, count)
