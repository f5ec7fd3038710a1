"""Load on a server: many clients with pictures and follow-ups, some of whom leave before the end.

    python -m llava_edge.bench.load --clients 8 --seconds 600 examples/*.jpg

starts ``llava-edge serve`` with the other arguments, or takes a running OpenAI-compatible server with ``--url``. The
texts are compared with those that a fresh server gives to one client at a time (with ``--url``: that server). One JSON
object goes to stdout.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_edge.bench.cancels import cancel_latencies
from llava_edge.bench.http_client import Answer, Client, quantiles, server

OPENINGS = ("Describe this picture.", "What animal is in this picture?", "What is in the background?", "What is it?")
FOLLOW_UPS = ("What colour is it?", "Is there a person in it?", "Tell me more about it.", "Are you sure?")
TIE_LOGITS = 0.05
WARM_UP_SECONDS = 60.0


@dataclass(frozen=True)
class Script:
    """A conversation: one picture and the questions about it."""

    picture: str
    questions: tuple[str, ...]


@dataclass
class Tally:
    """What happened in one run."""

    statuses: Counter[int] = field(default_factory=Counter)
    answers: list[tuple[Script, int, str]] = field(default_factory=list)
    ttft_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    left: int = 0
    health_seconds: list[float] = field(default_factory=list)
    rss_bytes: list[tuple[float, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def make_scripts(pictures: Sequence[Path], seed: int) -> list[Script]:
    """Two conversations a picture, of one to four turns."""
    chance = random.Random(seed)
    scripts = []
    for path in pictures:
        kind = {".jpg": "jpeg"}.get(path.suffix.lower(), path.suffix[1:].lower())
        url = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        for _ in range(2):
            follow = chance.sample(FOLLOW_UPS, chance.randint(0, 3))
            scripts.append(Script(url, (chance.choice(OPENINGS), *follow)))
    return scripts


def messages_of(script: Script, answers: Sequence[str]) -> list[dict[str, Any]]:
    """The conversation up to the question that comes after these answers."""
    picture = {"type": "image_url", "image_url": {"url": script.picture}}
    messages: list[dict[str, Any]] = []
    for number, text in enumerate(script.questions[: len(answers) + 1]):
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        messages.append({"role": "user", "content": parts if number else [picture, *parts]})
        if number < len(answers):
            messages.append({"role": "assistant", "content": answers[number]})
    return messages


def visit(client: Client, scripts: Sequence[Script], number: int, end: float, leave: float, tally: Tally) -> None:
    """One client after the other in the same place, until the time is over."""
    chance = random.Random(number)
    while time.monotonic() < end:
        script = chance.choice(scripts)
        answers: list[str] = []
        while len(answers) < len(script.questions) and time.monotonic() < end:
            leave_after = chance.randint(1, 8) if chance.random() < leave else None
            answer = client.ask(messages_of(script, answers), leave_after=leave_after)
            with tally.lock:
                tally.statuses[answer.status] += 1
                tally.tokens += answer.tokens if answer.complete else 0
                if answer.ttft_seconds is not None:
                    tally.ttft_seconds.append(answer.ttft_seconds)
                if answer.complete:
                    tally.answers.append((script, len(answers), answer.text))
                elif answer.status == 200:
                    tally.left += 1
            if not answer.complete:
                break
            answers.append(answer.text)


def watch(client: Client, process: int | None, end: float, tally: Tally) -> None:
    """Ask for ``/health`` twenty times a second, and note the server's memory every second."""
    began = time.monotonic()
    while time.monotonic() < end:
        started = time.perf_counter()
        client.get("/health")
        tally.health_seconds.append(time.perf_counter() - started)
        if process is not None and len(tally.health_seconds) % 20 == 0:
            tally.rss_bytes.append((time.monotonic() - began, rss_bytes(process)))
        time.sleep(0.05)


def rss_bytes(process: int) -> int:
    """Resident memory of a process and its children, from /proc."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return (int(found[1]) * 1024 if found else 0) + sum(rss_bytes(int(child)) for child in children)


def run_clients(
    client: Client, scripts: Sequence[Script], clients: int, seconds: float, leave: float, process: int | None
) -> Tally:
    """So many clients at a time for so long."""
    tally = Tally()
    end = time.monotonic() + seconds
    threads = [
        threading.Thread(target=visit, args=(client, scripts, number, end, leave, tally)) for number in range(clients)
    ]
    threads.append(threading.Thread(target=watch, args=(client, process, end, tally)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def compare(client: Client, tally: Tally) -> dict[str, Any]:
    """Every text against the one that a single client gets: the same, parted at a tie, or wrong."""
    serial: dict[tuple[Script, int], Answer] = {}
    counts: Counter[str] = Counter()
    wrong: list[dict[str, str]] = []
    for script in dict.fromkeys(script for script, _, _ in tally.answers):
        answers: list[str] = []
        for turn in range(len(script.questions)):
            reply = client.ask(messages_of(script, answers), gaps=True)
            serial[script, turn] = reply
            answers.append(reply.text)
    for script, turn, text in tally.answers:
        expected = serial[script, turn]
        kind = "same" if text == expected.text else "tie" if parted_at_tie(text, expected) else "wrong"
        counts[kind] += 1
        if kind == "wrong" and len(wrong) < 10:
            wrong.append({"question": script.questions[turn], "serial": expected.text, "under_load": text})
    return {"compared": len(tally.answers), **counts, "examples_of_wrong": wrong}


def parted_at_tie(text: str, expected: Answer) -> bool:
    """Whether the first token that differs was one of two that are nearly equally likely."""
    at = 0
    for piece, gap in expected.pieces:
        if text[at : at + len(piece)] != piece:
            return gap < TIE_LOGITS
        at += len(piece)
    return False


def summary(tally: Tally, clients: int, seconds: float) -> dict[str, Any]:
    """The figures of a run."""
    late = [rss for at, rss in tally.rss_bytes if at >= WARM_UP_SECONDS]
    return {
        "clients": clients,
        "seconds": seconds,
        "statuses": dict(tally.statuses),
        "answers": len(tally.answers),
        "left_early": tally.left,
        "answers_per_second": len(tally.answers) / seconds,
        "tokens_per_second": tally.tokens / seconds,
        "ttft_seconds": quantiles(tally.ttft_seconds),
        "health_seconds": quantiles(tally.health_seconds),
        "rss_growth_after_first_minute": (max(late[-10:]) / late[0] - 1) if len(late) > 10 else None,
        "rss_bytes_at_end": tally.rss_bytes[-1][1] if tally.rss_bytes else None,
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--url", help="a running server instead of an own one")
    parser.add_argument("--pid", type=int, help="with --url: its process, whose memory is watched")
    parser.add_argument("--ask-for", help="with --url: the name to ask for")
    parser.add_argument("--clients", default="1,8", help="runs with so many clients each, after one another")
    parser.add_argument("--seconds", default="60", help="length of every run, or of each of them: 180,600")
    parser.add_argument("--leave", type=float, default=0.1, help="share of the answers that are left early")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--cancels", type=int, default=0, help="also measure how soon a place is free")
    parser.add_argument("--seed", type=int, default=1)
    chosen, rest = parser.parse_known_args()
    scripts = make_scripts(chosen.pictures, chosen.seed)
    clients_of = [int(number) for number in chosen.clients.split(",")]
    lengths = [float(length) for length in chosen.seconds.split(",")]
    if len(lengths) not in (1, len(clients_of)):
        parser.error("--seconds takes one length, or as many as --clients has numbers")
    result: dict[str, Any] = {"runs": []}
    tallies = []
    with server(chosen.url, rest) as (url, process):
        client = Client(url, chosen.ask_for, chosen.max_tokens)
        for clients, seconds in zip(clients_of, lengths * (len(clients_of) // len(lengths)), strict=True):
            tallies.append(run_clients(client, scripts, clients, seconds, chosen.leave, chosen.pid or process))
            result["runs"].append(summary(tallies[-1], clients, seconds))
            sys.stderr.write(json.dumps(result["runs"][-1]) + "\n")
        if chosen.cancels:
            result["cancels"] = cancel_latencies(client, chosen.cancels, chosen.seed)
    with server(chosen.url, [*rest, "--parallel", "1"]) as (url, _):
        client = Client(url, chosen.ask_for, chosen.max_tokens)
        for run, tally in zip(result["runs"], tallies, strict=True):
            run["texts"] = compare(client, tally)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
