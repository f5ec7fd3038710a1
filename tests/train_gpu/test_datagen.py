"""Instructions from symbols: what is asked, what is accepted, and that a bad server loses and doubles nothing."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llava_edge.cli import cli
from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.train_gpu.config import SourceConfig
from llava_edge.train_gpu.datagen.balance import PhraseTagger, balance
from llava_edge.train_gpu.datagen.chat import chat, talks, usable
from llava_edge.train_gpu.datagen.check import Rejected, accept
from llava_edge.train_gpu.datagen.generate import Budget, Statistics, generate
from llava_edge.train_gpu.datagen.llm import Endpoint, LocalLlm
from llava_edge.train_gpu.datagen.scenes import Scene, read_scenes
from llava_edge.train_gpu.datagen.tasks import TASKS, messages
from llava_edge.train_gpu.samples import Skipped, read_source

DOG = Scene("dog.jpg", ("A brown dog runs through snow.", "A dog is running."), (("dog", (0.1, 0.2, 0.5, 0.9)),))
TALK = "Question:\nWhat is the dog doing?\n===\nAnswer:\nThe dog is running through snow.\n==="


class Server:
    """A real HTTP server that speaks the API, and fails as it is told to."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answered: Counter[str] = Counter()
        self.fail: Callable[[int], str] = lambda number: ""
        self.reply: Callable[[str], str] = lambda asked: TALK
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append({**body, "key": self.headers.get("Authorization")})
                    how = outer.fail(len(outer.requests))
                asked = body["messages"][-1]["content"]
                text = {"role": "assistant", "content": outer.reply(asked)}
                answer = {
                    "choices": [{"message": text, "finish_reason": "stop"}],
                    "usage": {"total_tokens": 100},
                }
                data = json.dumps(answer).encode()
                if how == "drop":
                    self.connection.close()
                    return
                if how == "half":
                    data = data[:20]
                self.send_response(int(how) if how.isdigit() else 200)
                if how == "429":
                    self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                if not how:
                    with outer.lock:
                        outer.answered[asked] += 1

            def log_message(self, *arguments: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def endpoint(server: Server, retries: int = 8) -> Endpoint:
    return Endpoint(
        server.url, model="m", api_key="k", temperature=0, seed=0, retries=retries, timeout_seconds=20,
        sleep=lambda seconds: None,
    )  # fmt: skip


def scenes(count: int) -> list[Scene]:
    return [Scene(f"{i}.jpg", (f"A brown dog number{i} runs through snow.",)) for i in range(count)]


def test_symbols_are_captions_and_boxes() -> None:
    assert DOG.text(boxes=False) == "A brown dog runs through snow.\nA dog is running."
    assert DOG.text(boxes=True).endswith("\n\ndog: [0.100, 0.200, 0.500, 0.900]")
    asked = messages("reasoning", DOG)
    assert [role for role, _ in asked] == ["system", "user", "assistant", "user"]
    assert asked[-1][1] == DOG.text(boxes=True)
    assert messages("conversation", DOG)[-1][1] == DOG.text(boxes=False)


@pytest.mark.parametrize("kind", list(TASKS))
def test_the_worked_examples_pass_their_own_check(kind: Any) -> None:
    for scene, answer in TASKS[kind].examples:
        assert accept(kind, scene, answer, cut_off=False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("The dog runs.", "not in the form"),
        (TALK + "\nThank you!", "not in the form"),
        (TALK.replace("running through snow", "in the caption"), "speaks of its sources"),
        (TALK.replace("The dog is running through snow.", "It is not clear."), "no certain answer"),
        ("Question:\nWhere is the tower?\n===\nAnswer:\nIt stands in Paris.\n===", "can't be answered"),
        ("Question:\nIs there a cat?\n===\nAnswer:\nYes, there is a cat beside the dog.\n===", "affirms what"),
        (f"{TALK}\n{TALK}", "same question twice"),
        (TALK.replace("The dog is running", "The dog is 13 and running"), "a number that the symbols"),
        (TALK + TALK.replace("What", "And what"), "same answer twice"),
        ("Question:\n\n===\nAnswer:\nThe dog runs.\n===", "is empty"),
    ],
)
def test_what_can_not_be_trained_on_is_rejected_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        accept("conversation", DOG, text, cut_off=False)
    with pytest.raises(Rejected, match="cut off"):
        accept("conversation", DOG, text, cut_off=True)


def test_accepted_texts_become_turns() -> None:
    assert accept("conversation", DOG, TALK, cut_off=False) == [
        ("What is the dog doing?", "The dog is running through snow.")
    ]
    ((question, answer),) = accept("detail", DOG, "A brown dog runs through deep snow.", cut_off=False)
    assert answer.startswith("A brown dog")
    assert question.endswith((".", "?"))


def test_a_server_that_fails_half_of_its_requests_loses_and_doubles_nothing(server: Server, tmp_path: Path) -> None:
    ways = ["500", "drop", "429", "half"]
    tried: Counter[str] = Counter()

    def every_other(number: int) -> str:
        """Of each scene, so that none meets failures only, whatever the threads' order."""
        asked = server.requests[-1]["messages"][-1]["content"]
        tried[asked] += 1
        return ways[number % len(ways)] if tried[asked] % 2 else ""

    server.fail = every_other
    output = tmp_path / "out.json"
    statistics = generate("conversation", scenes(40), endpoint(server), output, concurrency=6)
    samples = json.loads(output.read_text())
    assert [sample["image"] for sample in samples] == [f"{i}.jpg" for i in range(40)]
    assert set(server.answered.values()) == {1}
    assert len(server.requests) == 80
    assert (statistics.accepted, statistics.failed, statistics.left) == (40, 0, 0)
    assert statistics.tokens == 4000
    assert not (tmp_path / "out.json.run.jsonl").exists()
    assert len(read_source(SourceConfig(str(output)), Skipped(False))) == 40


def test_what_failed_for_good_is_asked_again_on_resume(server: Server, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    server.fail = lambda number: "503" if number > 5 else ""
    first = generate("conversation", scenes(12), endpoint(server, retries=1), output, concurrency=1)
    assert (first.accepted, first.failed) == (5, 7)
    assert len(json.loads(output.read_text())) == 5
    server.fail = lambda number: ""
    with pytest.raises(InputError, match="run that was stopped"):
        generate("conversation", scenes(12), endpoint(server), output)
    with pytest.raises(InputError, match="other settings"):
        generate("detail", scenes(12), endpoint(server), output, resume=True)
    with (tmp_path / "out.json.run.jsonl").open("a") as file:
        file.write('{"image": "5.j')  # a kill in the middle of a line
    second = generate("conversation", scenes(12), endpoint(server), output, resume=True)
    assert (second.accepted, second.failed) == (12, 0)
    assert [s["image"] for s in json.loads(output.read_text())] == [f"{i}.jpg" for i in range(12)]
    assert set(server.answered.values()) == {1}


def test_rejects_are_kept_with_the_reason_and_counted(server: Server, tmp_path: Path) -> None:
    server.reply = lambda asked: "I don't want to." if "number3" in asked else TALK
    output = tmp_path / "out.json"
    statistics = generate("conversation", scenes(5), endpoint(server), output)
    assert statistics.reasons == {"not in the form that was asked for": 1}
    (reject,) = [json.loads(line) for line in (tmp_path / "out.json.rejects.jsonl").read_text().splitlines()]
    assert (reject["image"], reject["text"]) == ("3.jpg", "I don't want to.")
    assert len(json.loads(output.read_text())) == 4


def test_whoever_is_told_decides_whether_the_finished_pictures_are_counted(server: Server, tmp_path: Path) -> None:
    heard: list[Callable[[], Statistics]] = []
    generate("conversation", scenes(5), endpoint(server), tmp_path / "out.json", told=heard.append)
    assert [progress().accepted for progress in heard] == [5] * 5  # counted now


def test_a_budget_is_kept_and_the_rest_can_be_had_later(server: Server, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    first = generate("conversation", scenes(20), endpoint(server), output, max_tokens=50, max_tokens_total=1500)
    assert 0 < first.tokens <= 1500
    assert first.stopped == "the budget of tokens is spent"
    assert first.accepted + first.left == 20
    second = generate("conversation", scenes(20), endpoint(server), output, max_tokens=50, resume=True)
    assert (second.accepted, second.tokens, len(server.requests)) == (20, 2000, 20)


def test_reservations_count_until_they_are_settled() -> None:
    budget = Budget(100, 0)
    assert budget.reserve(60)
    assert not budget.reserve(60)
    budget.settle(60, 30)
    assert budget.reserve(60)


def test_a_refusal_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    server.fail = lambda number: "401"
    statistics = generate("conversation", scenes(1), endpoint(server), tmp_path / "out.json")
    assert len(server.requests) == 1
    assert "refuses: status 401" in statistics.errors["0.jpg"]
    assert server.requests[0]["key"] == "Bearer k"


def test_captions_and_boxes_of_coco_are_joined(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg", "width": 200, "height": 100}]
    captions = {"images": images, "annotations": [{"image_id": 1, "caption": "A dog."}]}
    boxes = {
        "images": images,
        "annotations": [{"image_id": 1, "category_id": 18, "bbox": [20, 10, 100, 95]}],
        "categories": [{"id": 18, "name": "dog"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(captions))
    (tmp_path / "b.json").write_text(json.dumps(boxes))
    (scene,) = read_scenes(tmp_path / "c.json", tmp_path / "b.json", "train")
    assert scene == Scene("a.jpg", ("A dog.",), (("dog", (0.1, 0.1, 0.6, 1.0)),))
    line = {"image": "a.jpg", "captions": ["A dog."], "instances": [{"category": "dog", "bbox": [0.1, 0.1, 0.6, 1.0]}]}
    (tmp_path / "both.jsonl").write_text(json.dumps(line) + "\n")
    assert read_scenes(tmp_path / "both.jsonl", None, "train") == [scene]
    line["instances"] = [{"category": "dog", "bbox": [20, 10, 100, 95]}]
    (tmp_path / "both.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=r"line 1.*from 0 to 1"):
        read_scenes(tmp_path / "both.jsonl", None, "train")


def test_a_local_model_writes_and_keeps_the_instructions_in_its_cache(tiny_llm: Path, tmp_path: Path) -> None:
    llm = LocalLlm(tiny_llm, temperature=0, seed=0)
    try:
        first = llm.complete(messages("conversation", DOG), 8)
        again = llm.complete(messages("conversation", DOG), 8)
        assert first == again
        assert first.cut_off
        statistics = generate("conversation", [DOG, *scenes(2)], llm, tmp_path / "out.json", max_tokens=8)
        assert statistics.rejected == 3
        assert statistics.tokens > 3 * 8
    finally:
        llm.close()


def test_the_command_line_reports_and_resumes(server: Server, tmp_path: Path) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"dev": {f"{i}.jpg": [f"A dog number{i} runs in snow."] for i in range(6)}}))
    output = tmp_path / "out.json"
    command = [
        "datagen", "conversation", "--captions", str(captions), "--split", "dev", "--llm", server.url,
        "-o", str(output), "--limit", "4", "--retries", "0", "--json", "--concurrency", "1",
    ]  # fmt: skip
    server.fail = lambda number: "500" if number == 2 else ""
    failed = CliRunner().invoke(cli, command)
    assert isinstance(failed.exception, LlavaEdgeError)
    assert "1 of 4 pictures failed; 1.jpg" in str(failed.exception)
    done = CliRunner().invoke(cli, [*command, "--resume"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["accepted"] == 4


def test_talks_differ_and_some_go_on() -> None:
    made = talks(700, seed=5)
    assert made == talks(700, seed=5)
    assert made[:50] == talks(50, seed=5)
    assert made[:50] != talks(50, seed=6)
    first = [talk.questions[0] for talk in made]
    assert len(set(first)) == 700
    assert 40 < sum(len(talk.questions) == 2 for talk in made) < 100
    for text in (question for talk in made for question in talk.questions):
        assert text == " ".join(text.split())
        assert not set("{}|<>") & set(text)
        assert "picture" not in text
    with pytest.raises(InputError, match=r"--count 9999 is more than the \d+ prompts"):
        talks(9999, seed=0)


TIP = "Boil the water. Add the tea"


@pytest.mark.parametrize(
    ("text", "cut_off", "kept"),
    [
        (" Paris. ", False, "Paris."),
        (TIP, False, TIP),
        (TIP, True, "Boil the water."),
        ('She said "Go!" and w', True, 'She said "Go!"'),
        ("1. Boil the water!\n2. Add", True, "1. Boil the water!"),
        ("3 plus 4 is 7. That", True, "3 plus 4 is 7."),
        ("Yes. No. Yes, I do.", False, "Yes. No. Yes, I do."),
    ],
)
def test_answers_end_with_a_full_sentence(text: str, cut_off: bool, kept: str) -> None:
    assert usable(text, cut_off=cut_off) == kept


@pytest.mark.parametrize(
    ("text", "cut_off", "reason"),
    [
        ("", False, "empty"),
        ("An apple, a pear, a", True, "cut off"),
        ("Sure! Here is a list of everything:\n1. Ap", True, "cut off"),
        ("1. Apples\n2. Pe", True, "cut off"),
        ("I like it. It is good. I like it.", False, "repeats"),
        ("1. Wash it\n2. Dry it\n3. Wash it", False, "repeats"),
        ("A river of life and a river of rain flows, a river of life and a river of rain.", False, "repeats"),
        ("I can't see the picture.", False, "speaks of pictures"),
        ("As an AI, I have no opinion.", False, "speaks of pictures or of itself"),
    ],
)
def test_answers_that_teach_nothing_good_are_rejected(text: str, cut_off: bool, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        usable(text, cut_off=cut_off)


def test_a_talk_goes_on_from_the_answer_and_ends_before_a_bad_one(server: Server, tmp_path: Path) -> None:
    asked = talks(120, 3)
    going_on = {talk.questions[1] for talk in asked if len(talk.questions) > 1}
    output = tmp_path / "chat.json"
    server.reply = lambda question: f"You say: {question}"
    statistics = chat(120, endpoint(server), output, seed=3)
    samples = read_source(SourceConfig(str(output)), Skipped(False))
    assert [(s.id, s.pictures) for s in samples] == [(f"chat#{i}", ()) for i in range(120)]
    assert [s.turns for s in samples] == [tuple((q, f"You say: {q}") for q in talk.questions) for talk in asked]
    assert statistics.questions == 120 + sum(len(talk.questions) - 1 for talk in asked)
    second = next(r["messages"] for r in server.requests if len(r["messages"]) == 3)
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[1]["content"] == f"You say: {second[0]['content']}"

    server.reply = lambda question: "So. So." if question in going_on else f"You say: {question}"
    assert chat(120, endpoint(server), output, seed=3).questions == 120
    samples = read_source(SourceConfig(str(output)), Skipped(False))
    assert [s.turns[0][0] for s in samples] == [talk.questions[0] for talk in asked]


def test_talks_keep_to_a_budget(server: Server, tmp_path: Path) -> None:
    server.reply = lambda question: f"You say: {question}"
    output = tmp_path / "chat.json"
    first = chat(30, endpoint(server), output, max_tokens=50, max_tokens_total=1000)
    assert 0 < first.tokens <= 1000
    assert first.left == 30 - first.accepted > 0
    with pytest.raises(InputError, match="other settings"):
        chat(31, endpoint(server), output, resume=True)
    assert chat(30, endpoint(server), output, max_tokens=50, resume=True).accepted == 30


def test_a_local_model_talks_and_a_stopped_run_goes_on(tiny_llm: Path, tmp_path: Path) -> None:
    output = tmp_path / "chat.json"
    command = ["datagen", "chat", "--llm", str(tiny_llm), "-o", str(output), "--count", "12", "--max-tokens", "24"]
    stopped = CliRunner().invoke(cli, [*command, "--max-tokens-total", "400"])
    assert stopped.exit_code == 0, stopped.output
    assert "talks are left for --resume" in stopped.stderr
    done = CliRunner().invoke(cli, [*command, "--resume", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["talks"], told["left"], told["failed"]) == (12, 0, 0)
    assert told["accepted"] == len(json.loads(output.read_text())) == 12 - told["rejected"]
    rejects = [json.loads(line) for line in (tmp_path / "chat.json.rejects.jsonl").read_text().splitlines()]
    assert sum(told["reasons"].values()) == len(rejects) == told["rejected"]
    assert not (tmp_path / "chat.json.run.jsonl").exists()


def test_noun_phrases_are_found_by_a_real_tagger() -> None:
    phrases = PhraseTagger()
    assert phrases("A brown dog is running through the snowy field .") == ["brown dog", "snowy field"]
    assert phrases("Two men in red jackets climb a rock wall.") == ["two men", "red jackets", "rock wall"]
    assert phrases("") == []


def test_rare_phrases_are_dropped_and_common_ones_thinned() -> None:
    captions = ["dog"] * 50 + ["cat"] * 4 + ["yak"] * 2 + ["dog cat"] * 1
    chosen = balance(captions, str.split, min_count=3, max_per_phrase=10, seed=1)
    kept = Counter(captions[number] for number in chosen.kept)
    assert kept["yak"] == 0
    assert kept["cat"] + kept["dog cat"] >= 5
    assert 9 <= kept["dog"] <= 10
    assert (chosen.phrases, chosen.used) == (3, 2)
    assert balance(captions, str.split, min_count=3, max_per_phrase=10, seed=1) == chosen


def test_filtered_captions_are_samples_of_stage_one(tmp_path: Path) -> None:
    captions = tmp_path / "captions.json"
    texts = {f"{i}.jpg": ["A brown dog runs.", "A yak."] if i == 0 else ["A brown dog runs."] for i in range(8)}
    captions.write_text(json.dumps({"train": texts}))
    output = tmp_path / "stage1.json"
    result = CliRunner().invoke(
        cli, ["datagen", "filter-captions", str(captions), "-o", str(output), "--max-per-phrase", "5", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kept"] == 5
    samples = read_source(SourceConfig(str(output)), Skipped(False))
    assert {answer for sample in samples for _, answer in sample.turns} == {"A brown dog runs."}
