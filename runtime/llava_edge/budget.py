"""``--image-tokens auto``: as many of a picture's tokens as are read within the time that a person wants to wait."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from llava_edge.bundle import probe_picture
from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.vision.anyres import most_parts, most_tokens
from llava_edge.vision.tokens import pooled_grid

if TYPE_CHECKING:
    from llava_edge.bundle import VisualTokens
    from llava_edge.model import Model

log = logging.getLogger(__name__)

DEFAULT_SECONDS = 3.0
_TEXT_TOKENS = 32  # of a short question and what stands around it
_TRIAL_TOKENS = 64


class BudgetError(InputError):
    """No first token within the time that was asked for."""


@dataclass(frozen=True)
class Pace:
    """What a model takes on this machine: for the tower, once a picture, and for a token of the prompt."""

    encode_seconds: float
    token_seconds: float

    def first_token(self, image_tokens: int) -> float:
        """Seconds until the first token of an answer about one picture."""
        return self.encode_seconds + (image_tokens + _TEXT_TOKENS) * self.token_seconds


def largest_pictures(model: Model, tokens: VisualTokens) -> dict[int, int]:
    """The tokens of the largest picture, in tiles where the model looks at tiles, for each count that it has learnt.

    Counts with which that picture and a question don't fit the context are left out, but for the smallest.
    """
    spec, _ = model.picture_settings
    sizes = {count: count for count in sorted(tokens.trained)}
    if spec is not None and spec.mode == "anyres":
        sizes = {count: most_tokens(spec, pooled_grid(tokens.grid, count)) for count in sizes}
    room = model.engine.n_ctx - _TEXT_TOKENS
    return {count: size for count, size in sizes.items() if size < room or count == min(sizes)}


def choose(pace: Pace, sizes: Mapping[int, int], seconds: float) -> int:
    """The most tokens that are read in time; ``sizes`` tells what a picture then takes in all, see
    :func:`largest_pictures`.

    Raises
    ------
    BudgetError
        Even the fewest are too many; it says what can be had.
    """
    times = {count: pace.first_token(sizes[count]) for count in sorted(sizes)}
    for count in reversed(times):
        if times[count] <= seconds:
            return count
    listed = ", ".join(f"{count} tokens {_shown(time)} s" for count, time in times.items())
    raise BudgetError(
        f"no first token within {seconds:g} s on this machine; a picture of {listed}",
        hint=f"Give a budget from {_shown(min(times.values()) * 1.05)} s on, or a smaller model.",
    )


def _shown(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 99.5 else f"{seconds:.0f}"


def pace_of(model: Model) -> Pace:
    """How fast a model is here, with the largest of pictures: measured once, and remembered with everything else."""
    pace, (spec, _) = _pace_of_probe(model), model.picture_settings
    if spec is None or spec.mode != "anyres":
        return pace
    return replace(pace, encode_seconds=pace.encode_seconds * most_parts(spec))


def _pace_of_probe(model: Model) -> Pace:
    name = f"pace of {model.backend}"
    known = None if model.remembered is None else model.remembered.fact(name)
    try:
        if known is not None:
            found = json.loads(known)
            return Pace(float(found["encode_seconds"]), float(found["token_seconds"]))
    except (ValueError, KeyError, TypeError) as error:
        log.debug("a pace on disk is ignored: %s", error)
    pace = _measure(model)
    if model.remembered is not None:
        model.remembered.keep_fact(name, json.dumps(asdict(pace)))
    return pace


def _measure(model: Model) -> Pace:
    spec, _ = model.picture_settings
    if spec is None:
        raise LlavaEdgeError("only a bundle tells how its pictures are read")
    picture = model.open_picture(probe_picture(spec.size))
    model.open_vision()
    model.encode_anew(picture)  # the first time is slower
    began = time.perf_counter()
    model.encode_anew(picture)
    encoded = time.perf_counter()
    count = min(_TRIAL_TOKENS, model.engine.n_ctx - 1)
    model.engine.decode_tokens([number % model.engine.n_vocab for number in range(count)], logits=False)
    read = time.perf_counter()
    model.forget()
    log.info("encoding takes %.2f s here, and %d tokens %.2f s", encoded - began, count, read - encoded)
    return Pace(encoded - began, (read - encoded) / count)
