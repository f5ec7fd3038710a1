"""The tower and projector of a bundle's ONNX file, run by ONNX Runtime on the CPU, or by CoreML on a Mac.

One picture (or tile) a call: dynamic quantisation takes its scales over a whole batch, so that a picture's embeddings
would depend on its neighbours.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge.engine import EngineError
from llava_edge.errors import ModelError
from llava_edge.images import normalize

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from llava_edge.engine import Engine
    from llava_edge.types import ImageSpec

_FATAL = 4
_LOOK_SECONDS = 0.02
WATCHER = "llava-edge-stop"
_CPU, _COREML = "CPUExecutionProvider", "CoreMLExecutionProvider"


class OnnxEncoder:
    """A vision tower that belongs to a loaded language model.

    With ``coreml`` a Mac's CoreML runs what it can of it, on GPU and neural engine too, and the CPU the rest: products
    in int8 among that, so that it suits a file in fp32.

    Raises
    ------
    ModelError
        No such file, not a vision tower in ONNX, one for other pictures or another width of embeddings, or no CoreML.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: ImageSpec,
        engine: Engine,
        *,
        n_threads: int | None = None,
        coreml: bool = False,
    ) -> None:
        self.path = Path(path)
        self._spec = spec
        self._engine = engine
        self._session: Any = _open_session(self.path, n_threads or engine.n_threads, coreml)
        self._input = self._checked_input()
        (output,) = self._session.get_outputs()
        if len(output.shape) != 3:
            raise ModelError(f"{self.path} is no vision tower: its output has the shape {output.shape}, not [B, T, D]")
        width = output.shape[-1]
        if width != engine.n_embd:
            raise ModelError(
                f"{self.path} makes embeddings of width {width}; the language model reads {engine.n_embd}",
                hint="The files are of two models; get the bundle again.",
            )

    def close(self) -> None:
        """Free the tower; a second call does nothing."""
        self._session = None

    def encode(self, images: Sequence[Image.Image]) -> list[NDArray[np.float32]]:
        """Embeddings ``float32 [T, D]`` of RGB pictures of the tower's size."""
        return [self._encode(image) for image in images]

    def _encode(self, image: Image.Image) -> NDArray[np.float32]:
        if self._session is None:
            raise ModelError(f"the vision tower {self.path} is closed")
        if self._engine.stop_wanted:
            raise EngineError("the picture's evaluation was stopped")
        if image.size != (self._spec.size, self._spec.size):
            raise ModelError(f"the vision tower {self.path} takes {self._spec.size} pixels a side, not {image.size}")
        pixels = normalize(image, self._spec)[None]
        try:
            (batch,) = self._run(pixels)
        except EngineError:
            raise
        except Exception as error:  # ONNX Runtime raises a class of its own for every status
            raise ModelError(f"the vision tower {self.path} failed: {error}") from None
        if batch.ndim != 3 or batch.shape[2] != self._engine.n_embd:
            raise ModelError(f"the vision tower {self.path} gave embeddings of the shape {list(batch.shape)}")
        embeddings: NDArray[np.float32] = np.ascontiguousarray(batch[0], dtype=np.float32)
        if not np.isfinite(embeddings).all():
            raise ModelError(f"the vision tower {self.path} gave values that are not numbers")
        return embeddings

    def _run(self, pixels: NDArray[np.float32]) -> Any:
        """The model's outputs. EngineError if the evaluation is stopped: ONNX Runtime looks between two nodes."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.log_severity_level = _FATAL
        over = threading.Event()
        threading.Thread(target=self._watch, args=(options, over), name=WATCHER, daemon=True).start()
        try:
            return self._engine.worker.run(functools.partial(self._session.run, None, {self._input: pixels}, options))
        except Exception:
            if options.terminate:
                raise EngineError("the picture's evaluation was stopped") from None
            raise
        finally:
            over.set()

    def _watch(self, options: Any, over: threading.Event) -> None:
        """Pass on the wish to stop, from another thread or Ctrl-C, while the model runs."""
        while not over.wait(_LOOK_SECONDS):
            if self._engine.stop_wanted:
                options.terminate = True
                return

    def _checked_input(self) -> str:
        """The name of the one input, once its shape ``[B, 3, size, size]`` is right."""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        size = self._spec.size
        if len(inputs) != 1 or inputs[0].shape[1:] != [3, size, size] or len(outputs) != 1:
            found = [entry.shape for entry in inputs]
            raise ModelError(f"{self.path} is no vision tower for {size} pixels a side: its inputs are {found}")
        name: str = inputs[0].name
        return name


def version() -> str:
    """The version of ONNX Runtime."""
    import onnxruntime

    return str(onnxruntime.__version__)


def _open_session(path: Path, n_threads: int, coreml: bool) -> Any:
    if not path.is_file():
        raise ModelError(f"no such model file: {path}", hint="Check the path.")
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(
            f"ONNX Runtime, which runs {path.name}, can't be loaded: {error}", hint="pip install --upgrade onnxruntime"
        ) from None

    found = onnxruntime.get_available_providers()
    if coreml and _COREML not in found:
        raise ModelError(
            f"this ONNX Runtime has no CoreML, which only a Mac has; it has {', '.join(found)}",
            hint="Take the vision backend onnx.",
        )
    onnxruntime.set_default_logger_severity(_FATAL)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    # Its threads would spin on, while llama.cpp needs the cores to read the picture.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        providers: list[Any] = [(_COREML, {"ModelFormat": "MLProgram"})] if coreml else []
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=[*providers, _CPU])
    except Exception as error:  # ONNX Runtime raises a class of its own for every status
        raise ModelError(
            f"{path} can't be loaded as a vision tower: {error}", hint="The file is damaged, or of another kind."
        ) from None
