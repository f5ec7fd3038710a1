"""A loaded model: language model, vision tower and conversation format."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from llava_edge import images
from llava_edge.budget import DEFAULT_SECONDS, BudgetError, choose, largest_pictures, pace_of
from llava_edge.bundle import Bundle
from llava_edge.cache import DiskCache
from llava_edge.engine import Engine
from llava_edge.errors import InputError, ModelError
from llava_edge.generate import TokenLoop
from llava_edge.kv_cache import KvCache
from llava_edge.parts import Parts, find_parts, preflight
from llava_edge.prompt import BundleFormat, ChatFormat, ImageRef, PromptTokenizer
from llava_edge.remembered import Remembered
from llava_edge.vision import EncodedImage
from llava_edge.vision.tokens import METHODS, pooled_grid, reduce
from llava_edge.written import is_written

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from llava_edge.ahead import Ahead
    from llava_edge.bundle import VisualTokens
    from llava_edge.chat_template import TemplateFormat
    from llava_edge.generate import Chooser, Generation
    from llava_edge.images import ImageSource
    from llava_edge.session import ChatSession
    from llava_edge.types import ImageSpec
    from llava_edge.vision import VisionEncoder
    from llava_edge.vision.anyres import Layout
    from llava_edge.vision.mtmd import MtmdEncoder

log = logging.getLogger(__name__)

# Embeddings of so many pictures, up to this size, are kept although no conversation holds them any more.
ENCODED_PICTURES = 16
ENCODED_BYTES = 256 * 1024 * 1024


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    llm: str | os.PathLike[str] | None = None,
    mmproj: str | os.PathLike[str] | None = None,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int | None = None,
    image_tokens: int | Literal["auto"] | None = None,
    ttft_budget: float | None = None,
    image_reduction: str = "pool",
    vision_backend: str = "auto",
    n_seq_max: int = 1,
    kv_type: str = "f16",
    flash_attention: bool | None = None,
    cache: bool = True,
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
        Tokens of a picture (of each tile, where pictures are tiled), for bundles; None is the manifest's default.
        ``"auto"`` is the most that the model has learnt and this machine reads within ``ttft_budget``; pictures that
        look like a page of text keep as many as fit.
    ttft_budget
        Seconds until the first token of an answer about a picture, for ``"auto"``; None is 3.
    image_reduction
        How a picture's tokens become fewer: ``"pool"``, which models are trained for, ``"grid"``, ``"random"`` or
        ``"diversity"``.
    vision_backend
        What runs the vision tower: ``"onnx"``, ``"mtmd"``, ``"native"`` (libllava_edge, if it is installed), or
        ``"auto"`` for the first in the manifest's order that passes the self-check.
    n_seq_max
        Conversations that the KV cache holds side by side, each with a context of its own; a chat uses the first.
    kv_type
        What the KV cache holds: ``"f16"``, or ``"q8_0"`` in half the memory, which changes answers a little.
    flash_attention
        Whether attention is computed in one pass; None leaves it to llama.cpp.
    cache
        Keep embeddings of pictures and the KV cache up to a picture on disk, so that another process that asks about
        the same picture needs neither encoding nor prefill of it. ``llava-edge cache info`` tells where and how much.
    verbose
        Log at level DEBUG what llama.cpp says (logger ``llava_edge.native``).

    Raises
    ------
    ModelError
        No such model, a damaged file, or parts that don't belong together.
    """
    started = time.perf_counter()
    _check_numbers(n_ctx=n_ctx, n_threads=n_threads, n_seq_max=n_seq_max)
    _check_picture_options(image_tokens, ttft_budget)
    fixed = None if isinstance(image_tokens, str) else image_tokens
    auto = image_tokens == "auto" or ttft_budget is not None
    if verbose:
        logging.getLogger("llava_edge").setLevel(logging.DEBUG)
    parts = find_parts(model, llm, mmproj, fixed, vision_backend)
    if parts.bundle is None and (image_tokens is not None or auto):
        raise InputError("image_tokens needs a bundle, whose manifest tells the grid of the picture's tokens")
    preflight(parts)
    engine = Engine(
        parts.llm,
        n_ctx=n_ctx,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
        n_seq_max=n_seq_max,
        kv_type=kv_type,
        flash_attention=flash_attention,
    )
    made: Model | None = None
    try:
        engine.warm_up()
        made = Model(engine, parts, started, DiskCache() if cache else None, image_reduction)
        if auto:
            made.choose_image_tokens(ttft_budget)
        return made
    except BaseException:
        (made or engine).close()
        raise


def _check_numbers(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; expected 1 or more")


def _check_picture_options(image_tokens: int | Literal["auto"] | None, ttft_budget: float | None) -> None:
    if not isinstance(image_tokens, str):
        _check_numbers(image_tokens=image_tokens)
    if ttft_budget is not None and (image_tokens not in (None, "auto") or ttft_budget <= 0):
        what = f"ttft_budget is {ttft_budget}" if ttft_budget <= 0 else f"image_tokens is {image_tokens}"
        raise InputError(f"{what}; a budget is above 0 and chooses image_tokens itself")
    if isinstance(image_tokens, str) and image_tokens != "auto":
        raise InputError(f"image_tokens is {image_tokens!r}; expected a number or 'auto'")


@dataclass(frozen=True)
class Picture:
    """A picture that was opened and brought to the tower's size. ``key`` is the hash of its content.

    A picture that is looked at in tiles has them in ``tiles``, and ``layout`` tells how they lie.
    """

    name: str
    key: str
    image: Image.Image = field(repr=False)
    tiles: tuple[Image.Image, ...] = field(default=(), repr=False)
    layout: Layout | None = None

    @functools.cached_property
    def is_written(self) -> bool:
        """Whether it looks like a page of text."""
        return is_written(self.image)


def arrange(name: str, image: Image.Image, spec: ImageSpec | None) -> Picture:
    """A picture that :func:`images.read` gave, with its tiles where the tower looks at tiles."""
    key = images.content_hash(image)
    if spec is None or spec.mode != "anyres":
        return Picture(name, key, image)
    from llava_edge.vision import anyres

    (whole, *tiles), layout = anyres.split(image, spec)
    return Picture(name, key, whole, tuple(tiles), layout)


class Model:
    """A model in memory; made by :func:`load`. The vision tower is loaded when the first picture comes.

    All chats of a model share one KV cache: each finds its own beginning there, or evaluates it again.
    """

    def __init__(
        self, engine: Engine, parts: Parts, started: float, disk: DiskCache | None = None, reduction: str = "pool"
    ) -> None:
        self.name = parts.name
        self.image_tokens = parts.image_tokens
        self.pages_whole = False  # whether pictures of text keep their tokens
        if reduction not in METHODS:
            raise InputError(f"image_reduction is {reduction!r}; expected one of {', '.join(METHODS)}")
        self.image_reduction = reduction
        self.engine = engine
        self.cache = KvCache(engine)
        self.answering: Generation | None = None
        self.turnstile = threading.Lock()  # held by who looks whether the model answers, and then makes it work
        self.ahead: Ahead | None = None
        self._parts = parts
        self.vision_backend: str | None = None
        self._encoder: VisionEncoder | None = None
        self._newline: NDArray[np.float32] | None = None
        self._encoded: OrderedDict[str, EncodedImage] = OrderedDict()
        self.remembered = Remembered(disk, engine, parts.contents) if disk is not None and disk.limit else None
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
        self.stop_ahead()
        if self.remembered is not None:
            self.remembered.close()
        if self._encoder is not None:
            self._encoder.close()
        self.engine.close()
        self._encoded.clear()

    @property
    def bundle(self) -> Bundle | None:
        """The bundle that this model was loaded from; None for a raw pair of files."""
        return self._parts.bundle

    def chat(self, system: str | None = None) -> ChatSession:
        """Begin a conversation.

        ``system`` is its system message; None is the model's own, if it has one, and ``""`` is none.
        """
        from llava_edge.session import ChatSession

        return ChatSession(self, system)

    def token_loop(
        self, generation: Generation, sampler: Chooser, max_tokens: int, stop: Sequence[str] = ()
    ) -> TokenLoop:
        """The loop of an answer, with what ends one in this model."""
        return TokenLoop(
            generation,
            sampler,
            self.engine,
            max_tokens=max_tokens,
            stop_tokens=self.stop_tokens,
            stop_texts=(*self.stop_texts, *stop),
            strip_blank=self.engine.spm,
        )

    def describe(self) -> dict[str, Any]:
        """What this model is made of and how it runs, for people."""
        return {
            "model": self.name,
            "llm": self._parts.llm.name,
            "mmproj": self._parts.mmproj.name if self._parts.mmproj else None,
            "vision_backend": self.vision_backend,
            "n_ctx": self.engine.n_ctx,
            "n_threads": self.engine.n_threads,
            "n_gpu_layers": self.engine.n_gpu_layers,
            "image_tokens": self.image_tokens,
        }

    @property
    def picture_settings(self) -> tuple[ImageSpec | None, tuple[int, int, int]]:
        """What pictures are fitted to, None for a raw pair, and what shows through where they are transparent."""
        if self._parts.bundle is None:
            return None, (255, 255, 255)
        spec = self._parts.bundle.manifest.image
        return spec, spec.pad_color

    @property
    def visual_tokens(self) -> VisualTokens | None:
        """What the manifest says of a picture's tokens; None for a raw pair."""
        return None if self._parts.bundle is None else self._parts.bundle.manifest.visual_tokens

    def open_picture(self, source: ImageSource, number: int = 1) -> Picture:
        """Read a picture under limits and bring it to the tower's size; ImageError says what is wrong with it."""
        name = Path(source).name if isinstance(source, (str, os.PathLike)) else f"image {number}"
        spec, pad_color = self.picture_settings
        return arrange(name, images.read(source, spec, pad_color), spec)

    def open_vision(self) -> str:
        """Load the vision tower now instead of with the first picture; the name of the backend that runs it."""
        bundle = self._parts.bundle
        if bundle is not None:
            self._load_encoder(bundle)
        else:
            self._load_raw_encoder()
        assert self.vision_backend is not None
        return self.vision_backend

    def encode(self, picture: Picture, image_tokens: int | None = None) -> EncodedImage:
        """The picture as the language model reads it. A picture is encoded once.

        ``image_tokens`` is the number of its tokens, if it is not the model's ``image_tokens``; bundles only.
        """
        key = self.encoded_key(picture, image_tokens)
        encoded = self._encoded.get(key)
        if encoded is None:
            encoded = self._find_or_encode(picture, key, self._count(picture, image_tokens))
            self._encoded[key] = encoded
            while len(self._encoded) > 1 and (
                len(self._encoded) > ENCODED_PICTURES or sum(e.nbytes for e in self._encoded.values()) > ENCODED_BYTES
            ):
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(key)
        if self._template is not None:
            self._template.marked_images = encoded.marked
        return encoded

    def encode_anew(self, picture: Picture) -> EncodedImage:
        """The same, by the tower, whatever is known of the picture."""
        return self._encode(picture, picture.key, self.image_tokens)

    def choose_image_tokens(self, seconds: float | None = None) -> None:
        """Take the most tokens a picture that the model has learnt and this machine reads in time.

        Without a budget that time is 3 seconds, and the fewest where even they take longer.
        A picture that looks like a page of text keeps more, up to three quarters of the context, whatever that takes.
        """
        tokens = self.visual_tokens
        if tokens is None:
            raise InputError("image_tokens needs a bundle, whose manifest tells the grid of the picture's tokens")
        sizes = largest_pictures(self, tokens)
        try:
            self.image_tokens = choose(pace_of(self), sizes, DEFAULT_SECONDS if seconds is None else seconds)
        except BudgetError as error:
            if seconds is not None:
                raise
            log.warning("%s; taking the fewest", error)
            self.image_tokens = min(sizes)
        self.pages_whole = True
        self.forget()

    def is_encoded(self, picture: Picture, image_tokens: int | None = None) -> bool:
        """Whether :meth:`encode` would find the embeddings in memory."""
        return self.encoded_key(picture, image_tokens) in self._encoded

    def encoded_key(self, picture: Picture, image_tokens: int | None = None) -> str:
        """The key of what :meth:`encode` gives."""
        count = self._count(picture, image_tokens)
        return picture.key if count == self.image_tokens else f"{picture.key}-{count}"

    def _count(self, picture: Picture, asked: int | None) -> int | None:
        """How many tokens a picture gets: as many as are asked for, or the model's; None for a raw pair."""
        tokens = self.visual_tokens
        if asked is not None or not self.pages_whole or tokens is None or not picture.is_written:
            return asked or self.image_tokens
        room = self.engine.n_ctx * 3 // 4 // (1 + len(picture.tiles))
        return max((count for count in tokens.trained if count <= room), default=min(tokens.trained))

    def stop_ahead(self) -> None:
        """Stop what a chat reads ahead."""
        if self.ahead is not None:
            self.ahead.cancel()
            self.ahead = None

    def forget(self) -> None:
        """Empty the KV cache and drop all embeddings: the next question is answered as if it were the first."""
        self.stop_ahead()
        self.cache.clear()
        self._encoded.clear()

    def _find_or_encode(self, picture: Picture, key: str, image_tokens: int | None) -> EncodedImage:
        """From the cache on disk if it is there."""
        if self.remembered is None:
            return self._encode(picture, key, image_tokens)
        spec, _ = self.picture_settings
        about = functools.partial(self.remembered.picture_key, picture.key, spec, image_tokens)
        found = self.remembered.picture(key, about(self.backend, self.image_reduction))
        if found is None:
            found = self._encode(picture, key, image_tokens)
            self.remembered.keep_picture(about(self.backend, self.image_reduction), found)
        return found

    @property
    def backend(self) -> str:
        """The vision backend that runs, or the one that is going to be tried first."""
        if self.vision_backend is not None or self._parts.bundle is None:
            return self.vision_backend or "mtmd"
        from llava_edge.vision.backends import candidates

        return candidates(self._parts.bundle, self._parts.vision_backend)[0]

    def _encode(self, picture: Picture, key: str, image_tokens: int | None) -> EncodedImage:
        bundle = self._parts.bundle
        if bundle is None or image_tokens is None:
            return self._encode_raw(picture, key)
        encoder = self._load_encoder(bundle)
        tokens = bundle.manifest.visual_tokens
        parts = encoder.encode([picture.image, *picture.tiles])
        if any(len(part) != tokens.full for part in parts):
            raise ModelError(
                f"the vision tower gives {len(parts[0])} tokens a picture; the manifest says {tokens.full}"
            )
        pooled = [reduce(part, tokens.grid, image_tokens, self.image_reduction) for part in parts]
        if picture.layout is None:
            return EncodedImage.of(key, pooled[0])
        if self.image_reduction not in ("pool", "grid"):
            raise InputError(f"image_reduction {self.image_reduction} leaves no rows, which tiled pictures need")
        from llava_edge.vision import anyres

        if self._newline is None:
            self._newline = anyres.read_newline(bundle.file("mmproj"), self.engine.n_embd)
        cells = pooled_grid(tokens.grid, image_tokens)
        return EncodedImage.of(key, anyres.assemble(pooled, cells, picture.layout, self._newline))

    def _encode_raw(self, picture: Picture, key: str) -> EncodedImage:
        """A picture of a raw pair, with everything that libmtmd puts around it."""
        return EncodedImage(key, self._load_raw_encoder().encode_chunks(picture.image))

    def _load_raw_encoder(self) -> MtmdEncoder:
        from llava_edge.vision.mtmd import MtmdEncoder

        if self._encoder is None:
            assert self._parts.mmproj is not None
            self._encoder = MtmdEncoder(self._parts.mmproj, self.engine)
            self.vision_backend = "mtmd"
        assert isinstance(self._encoder, MtmdEncoder)
        return self._encoder

    def _load_encoder(self, bundle: Bundle) -> VisionEncoder:
        _ = self.engine.model_pointer  # a closed model says so, whatever of the tower was loaded
        if self._encoder is None:
            from llava_edge.vision.backends import open_encoder

            self.vision_backend, self._encoder = open_encoder(bundle, self.engine, self._parts.vision_backend)
        return self._encoder

    def _make_format(self) -> ChatFormat:
        if self._parts.bundle is not None:
            return BundleFormat(self._parts.bundle.manifest.prompt)
        from llava_edge.chat_template import TemplateFormat

        self._template = TemplateFormat(self.engine.chat_template, bos=self.engine.bos, eos=self.engine.eos)
        return self._template
