"""Yes or no: what an answer says, and what it is worth."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from llava_edge.bench.tasks import stats
from llava_edge.bench.tasks.samples import Record
from llava_edge.bench.tasks.task import Metrics


def pope_answer(text: str) -> str:
    """``no`` if the first sentence has the word no, No or not; anything else is ``yes``, as POPE's script reads it.

    An empty answer is a yes there. :func:`says_either` tells how often that rule decided alone.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def says_either(text: str) -> bool:
    """Whether an answer has a yes or a no at all."""
    return re.search(r"\b(yes|no|not)\b", text.lower()) is not None


def mme_answer(text: str) -> str:
    """``yes``, ``no`` or ``other`` by the first four characters, as MME's official calculation reads it."""
    said = text.strip().lower()
    if said in ("yes", "no"):
        return said
    start = said[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def detection_metrics(records: Sequence[Record], prefix: str = "") -> Metrics:
    """Accuracy, precision, recall, F1 and the share of yes. ``detail.said`` and ``expected`` are yes or no."""
    clusters = [record.cluster for record in records]
    rows = np.array([_outcome(record) for record in records], dtype=np.float64).reshape(-1, 4)
    statistics = {
        "f1": lambda s: stats.ratio(2 * s[0], 2 * s[0] + s[1] + s[3]),
        "precision": lambda s: stats.ratio(s[0], s[0] + s[1]),
        "recall": lambda s: stats.ratio(s[0], s[0] + s[3]),
        "yes_ratio": lambda s: stats.ratio(s[0] + s[1], math.fsum(s)),
    }
    metrics: Metrics = {f"{prefix}accuracy": stats.share_of(clusters, (rows[:, 0] + rows[:, 2]).tolist())}
    for name, statistic in statistics.items():
        metrics[prefix + name] = stats.bootstrap(clusters, rows, statistic)
    return metrics


def mean_f1(parts: Sequence[Sequence[Record]]) -> stats.Metric:
    """The mean of the parts' F1. Pictures that several parts ask about are drawn again together."""
    clusters, rows = [], []
    for number, part in enumerate(parts):
        for record in part:
            row = np.zeros((len(parts), 4))
            row[number] = _outcome(record)
            clusters.append(record.cluster)
            rows.append(row.reshape(-1))

    def mean(sums: stats.Array) -> float:
        counts = sums.reshape(-1, 4)
        return float(np.mean([stats.ratio(2 * tp, 2 * tp + fp + fn) for tp, fp, _, fn in counts]))

    return stats.bootstrap(clusters, np.array(rows, dtype=np.float64).reshape(-1, 4 * len(parts)), mean)


def _outcome(record: Record) -> tuple[bool, bool, bool, bool]:
    """True positive, false positive, true negative, false negative; yes is positive."""
    said, expected = record.detail["said"] == "yes", record.expected == "yes"
    return said and expected, said and not expected, not said and not expected, not said and expected
