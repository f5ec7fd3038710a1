"""What a run tells: JSON lines, TensorBoard where it is installed, a line for the person, a curve at the end."""

from __future__ import annotations

import importlib.util
import json
import logging
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from llava_edge.errors import LlavaEdgeError
from llava_edge.train_gpu import checkpoint

log = logging.getLogger(__name__)

LOG, CURVE, ANSWERS = "log.jsonl", "curve.png", "answers.jsonl"


class TrainingError(LlavaEdgeError):
    """The loss went wrong: the samples of the step are in a file."""


class Journal:
    """The records of a run in ``log.jsonl``. After a resume it goes on behind the step that was resumed."""

    def __init__(self, directory: Path, step: int) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for name in (LOG, ANSWERS):
            _keep_until(directory / name, step)
        self._board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any], steps: int) -> None:
        """Keep one record and show it."""
        _append(self.directory / LOG, record)
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, record["step"])
        log.info("%s", _line(record, steps))

    def answers(self, step: int, answers: list[dict[str, str]]) -> None:
        """Keep what the model said to the fixed questions at a step."""
        for answer in answers:
            _append(self.directory / ANSWERS, {"step": step, **answer})
            log.info("step %d, %s: %r", step, answer["id"], answer["answer"])
        if self._board is not None:
            text = "\n\n".join(f"{a['question']}\n\n> {a['answer']}" for a in answers)
            self._board.add_text("answers", text, step)

    def close(self) -> None:
        """Draw the curve, and finish what TensorBoard reads."""
        if self._board is not None:
            self._board.close()
        path = self.directory / LOG
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if records and importlib.util.find_spec("matplotlib") is not None:
            draw_curve(records, self.directory / CURVE)


class LossGuard:
    """Stops a run whose loss is no number, or jumps; the names of the step's samples are kept in a file.

    ``recent`` is part of the saved state: a resumed run stops where the whole one would have. Of several processes one
    ``writes`` the file.
    """

    def __init__(self, directory: Path, factor: float, *, writes: bool = True) -> None:
        self.directory = directory
        self.factor = factor
        self.writes = writes
        self.recent: deque[float] = deque(maxlen=50)

    def check(self, step: int, loss: float, norm: float, names: tuple[str, ...]) -> None:
        """Raise :class:`TrainingError` if the loss or the gradient is not what training goes on with."""
        usual = statistics.median(self.recent) if len(self.recent) == self.recent.maxlen else None
        finite = abs(loss) < float("inf") and abs(norm) < float("inf")
        if not finite:
            what = f"the loss is {loss} and the gradient's norm {norm}"
        elif self.factor and usual is not None and loss > self.factor * usual:
            what = f"the loss jumped to {loss:.4g}; the median of the last 50 steps is {usual:.4g}"
        else:
            self.recent.append(loss)
            return
        path = self.directory / f"bad-step-{step:08d}.json"
        if self.writes:
            self.directory.mkdir(parents=True, exist_ok=True)
            record = {"step": step, "loss": str(loss), "grad_norm": str(norm), "samples": list(names)}
            checkpoint.write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        raise TrainingError(
            f"{what} at step {step}; its {len(names)} samples are named in {path}",
            hint="Look at these samples, lower optim.lr, or set optim.spike_factor; then go on with --resume.",
        )


def draw_curve(records: list[dict[str, Any]], path: Path) -> None:
    """Loss and learning rate over the steps, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [record["step"] for record in records]
    axes.plot(steps, [record["loss"] for record in records], color="tab:blue")
    axes.set(xlabel="step", ylabel="loss")
    rates = axes.twinx()
    rates.plot(steps, [record["lr"] for record in records], color="tab:gray", linewidth=1)
    rates.set_ylabel("learning rate")
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of later steps, which will be run again, and one that a kill cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break
    checkpoint.write_text(path, "".join(f"{line}\n" for line in kept))


def _line(record: dict[str, Any], steps: int) -> str:
    parts = [f"step {record['step']} of {steps}", f"loss {record['loss']:.4f}", f"lr {record['lr']:.3g}"]
    if "score" in record:
        parts.append(f"score of the draws {record['score']:.3f}")
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record["mfu"] is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    parts.append(f"{_duration(record['eta_seconds'])} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
