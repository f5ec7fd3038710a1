"""Judged runs, against a real HTTP server and a real local model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llava_edge.bench.tasks.judge import HttpJudge, JudgeError, LocalJudge
from llava_edge.bench.tasks.report import markdown_table
from llava_edge.bench.tasks.review import read_rules, read_scores, review_run, rule
from llava_edge.bench.tasks.run import open_run
from llava_edge.errors import InputError


class Server:
    """Speaks OpenAI's chat protocol. ``reply`` makes (status, text) of the request's last message."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.location = ""
        self.reply: Callable[[str], tuple[int, str]] = lambda text: (200, "8 7\nBoth are fine.")
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append({"path": self.path, **body})
                server.headers.append(dict(self.headers))
                status, text = server.reply(body["messages"][-1]["content"])
                message = {"choices": [{"message": {"role": "assistant", "content": text}}]}
                data = json.dumps(message if status == 200 else {"error": text}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if server.location:
                    self.send_header("Location", server.location)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("LLAVA_EDGE_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    running = Server()
    yield running
    running.close()


@pytest.fixture
def answered(files, tmp_path, evaluate_tiny) -> Path:
    """A run of LLaVA-Bench (COCO): two pictures with a question of each category."""
    data = tmp_path / "bench"
    questions, answers, contexts = [], [], []
    for n in range(2):
        name = f"{n:012d}.jpg"
        files.picture(data / "val2014" / f"COCO_val2014_{name}", n)
        contexts.append({"id": str(n), "image": name, "captions": [f"a scene {n}", "a dog"],
                         "instances": [{"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}]})  # fmt: skip
        for m, category in enumerate(("conv", "detail", "complex")):
            number = 3 * n + m
            questions.append({"question_id": number, "image": name, "text": f"What {m}?", "category": category})
            answers.append({"question_id": number, "text": f"reference {number}", "category": category})
    files.jsonl(data / "llava_bench_coco_questions.jsonl", questions)
    files.jsonl(data / "llava_bench_coco_gpt4_answers.jsonl", answers)
    files.jsonl(data / "coco2014_val_caps_boxes_80.jsonl", contexts)
    return evaluate_tiny("llava-bench", data, "answers").folder


def review(folder: Path, judge: Any, **options: Any) -> dict[str, Any]:
    options = {"rules": {}, "overwrite": False, **options}
    return review_run(open_run(folder), judge, step=lambda count: None, **options)


class TestLlavaBench:
    def test_the_judge_sees_what_the_protocol_says(self, answered, server):
        review(answered, HttpJudge(server.url, "gpt-4"))
        request = server.requests[0]
        record = open_run(answered).records[0]
        assert request["path"] == "/v1/chat/completions"
        assert request["temperature"] == 0.2
        assert [message["role"] for message in request["messages"]] == ["system", "user"]
        text = request["messages"][1]["content"]
        parts = ["[Context]\na scene 0\na dog\n\ndog: [0.1, 0.2, 0.3, 0.4]", "[Question]\nWhat 0?",
                 "[Assistant 1]\nreference 0\n\n[End of Assistant 1]", f"[Assistant 2]\n{record.answer}\n\n[End",
                 "[System]\n"]  # fmt: skip
        places = [text.index(part) for part in parts]
        assert places == sorted(places)

    def test_relative_scores_leave_out_what_can_t_be_read_and_count_it(self, answered, server):
        replies = {"What 0?": "8 6\nfine", "What 1?": "I like them both.", "What 2?": "10, 5\nwell"}
        server.reply = lambda text: (200, next(replies[key] for key in replies if key in text))
        judged = review(answered, HttpJudge(server.url, "gpt-4"))
        values = {name: metric["value"] for name, metric in judged["metrics"].items()}
        assert values["conv/relative_score"] == pytest.approx(75)
        assert values["complex/relative_score"] == pytest.approx(50)
        assert values["relative_score"] == pytest.approx(100 * 22 / 36)
        assert "detail/relative_score" not in values
        assert judged["unreadable"] == 2
        assert judged == json.loads((answered / "judged.json").read_text())
        assert f"| relative_score | {values['relative_score']:.1f} (" in markdown_table([open_run(answered)])

    def test_a_review_that_broke_off_goes_on(self, answered, server):
        count = iter(range(100))
        server.reply = lambda text: (200, "8 7") if next(count) < 4 else (400, "no more")
        with pytest.raises(JudgeError, match="answered 400"):
            review(answered, HttpJudge(server.url, "gpt-4"))
        path = answered / "reviews.jsonl"
        path.write_bytes(path.read_bytes()[:-9])  # and the last line was torn
        server.reply = lambda text: (200, "8 7")
        judged = review(answered, HttpJudge(server.url, "gpt-4"))
        assert judged["asked"] == 6
        assert len(server.requests) == 5 + 3
        with pytest.raises(InputError, match="judgements of gpt-4, not of other"):
            review(answered, HttpJudge(server.url, "other"))
        assert review(answered, HttpJudge(server.url, "other"), overwrite=True)["judge"] == "other"

    def test_judgements_by_other_rules_are_not_taken_for_these(self, answered, server):
        server.reply = lambda text: (200, "8 7")
        assert review(answered, HttpJudge(server.url, "gpt-4"))["rules_sha256"] is None
        rules = dict.fromkeys(("conv", "detail", "complex"), "Say two numbers.")
        for changed in ({"rules": rules}, {"max_tokens": 7}):
            with pytest.raises(InputError, match="by other rules or of another length"):
                review(answered, HttpJudge(server.url, "gpt-4"), **changed)
        assert review(answered, HttpJudge(server.url, "gpt-4"), rules=rules, overwrite=True)["rules_sha256"]
        (answered / "summary.json").unlink()
        with pytest.raises(InputError, match="is not finished"):
            review(answered, HttpJudge(server.url, "gpt-4"), rules=rules)

    @pytest.mark.parametrize(
        ("text", "scores"),
        [("8 9", [8, 9]), ("7, 8.5\nwhy", [7, 8.5]), ("8/10 9/10", None), ("8 9 10", None), ("", None),
         ("0 11", None), ("Score: 8 9", None), ("nan 3", None)],
    )  # fmt: skip
    def test_scores_stand_alone_on_the_first_line(self, text, scores):
        assert read_scores(text) == scores

    def test_rules_are_by_category_and_may_be_the_published_ones(self, files, tmp_path):
        published = {"conv": {"role": "Assistant", "prompt": "C"}, "llava_bench_conv": {"prompt": "W"}}
        rules = read_rules(files.json(tmp_path / "rule.json", published))
        assert (rule("conv", True, rules), rule("conv", False, rules)) == ("C", "W")
        with pytest.raises(InputError, match="has none for detail"):
            rule("detail", True, rules)
        own = {rule(category, boxes, {}) for category in ("conv", "detail", "complex") for boxes in (True, False)}
        assert len(own) == 6

    def test_a_model_on_this_machine_judges_and_may_be_unreadable(self, answered, tiny_bundle):
        import llava_edge

        with llava_edge.load(tiny_bundle, n_threads=1, n_ctx=2048) as model:
            judge = LocalJudge(model)
            assert judge.ask("", "Hi", temperature=0.2, max_tokens=8) == judge.ask(
                "", "Hi", temperature=0.2, max_tokens=8
            )
            judged = review(answered, judge, max_tokens=8)
        assert judged["judge"] == "tiny"
        assert judged["unreadable"] == 6  # random weights
        assert judged["metrics"]["relative_score"]["value"] is None


class TestHttpJudge:
    def test_a_busy_server_is_asked_again_after_the_time_that_it_names(self, server):
        waits: list[float] = []
        replies = iter([(429, "slow down"), (503, "starting"), (200, "9 9")])
        server.reply = lambda text: next(replies)
        judge = HttpJudge(server.url, "m", wait=waits.append)
        assert judge.ask("s", "t", temperature=0, max_tokens=4) == "9 9"
        assert waits == [2, 4]

    def test_it_gives_up_and_says_what_the_server_said(self, server):
        server.reply = lambda text: (503, "out of memory")
        with pytest.raises(JudgeError, match=r"answered 503: .*out of memory.*\(3 tries\)"):
            HttpJudge(server.url, "m", tries=3, wait=lambda s: None).ask("s", "t", temperature=0, max_tokens=4)
        assert len(server.requests) == 3

    def test_a_wrong_key_is_not_tried_again(self, server, monkeypatch):
        monkeypatch.setenv("LLAVA_EDGE_JUDGE_KEY", "secret")
        server.reply = lambda text: (401, "who are you")
        with pytest.raises(JudgeError) as error:
            HttpJudge(server.url, "m").ask("s", "t", temperature=0, max_tokens=4)
        assert "LLAVA_EDGE_JUDGE_KEY" in error.value.hint
        assert "secret" not in str(error.value)
        assert server.headers[0]["Authorization"] == "Bearer secret"

    def test_a_key_that_can_t_be_one_is_not_printed(self, server, monkeypatch):
        monkeypatch.setenv("LLAVA_EDGE_JUDGE_KEY", "sec\rret")
        with pytest.raises(InputError, match="LLAVA_EDGE_JUDGE_KEY has characters that no key can have") as error:
            HttpJudge(server.url, "m").ask("s", "t", temperature=0, max_tokens=4)
        assert "ret" not in str(error.value)
        monkeypatch.setenv("LLAVA_EDGE_JUDGE_KEY", "secret\r\n")
        HttpJudge(server.url, "m").ask("s", "t", temperature=0, max_tokens=4)
        assert server.headers[0]["Authorization"] == "Bearer secret"

    def test_a_judge_that_says_nothing_is_unreadable(self, server):
        server.reply = lambda text: (200, None)
        assert HttpJudge(server.url, "m").ask("s", "t", temperature=0, max_tokens=4) == ""

    def test_a_redirect_is_not_followed_with_the_key(self, server, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        server.location = f"{server.url}/elsewhere"
        server.reply = lambda text: (302, "moved")
        with pytest.raises(JudgeError, match="answered 302"):
            HttpJudge(server.url, "m").ask("s", "t", temperature=0, max_tokens=4)
        assert len(server.requests) == 1

    def test_nobody_there(self):
        with pytest.raises(JudgeError, match="can't be asked"):
            HttpJudge("http://127.0.0.1:9/v1", "m", tries=1).ask("s", "t", temperature=0, max_tokens=4)
        with pytest.raises(InputError, match="expected http"):
            HttpJudge("file:///etc/passwd", "m")


class TestScienceQaEnsembles:
    """Whoever is right: the judge (J), the model (M); what a second look says (S)."""

    def test_complement_and_second_look(self, files, tmp_path, evaluate_tiny, server):
        problem = {"choices": ["a", "b"], "answer": 0, "hint": "", "image": None, "subject": "natural science",
                   "grade": "grade3"}  # fmt: skip
        names = ("agree", "judge-fails", "second-right", "second-fails")
        problems = {name: {**problem, "question": f"{name}?"} for name in names}
        files.json(tmp_path / "sqa" / "problems.json", problems)
        files.json(tmp_path / "sqa" / "pid_splits.json", {"test": list(names)})
        folder = evaluate_tiny("scienceqa", tmp_path / "sqa", "sqa-run").folder
        path = folder / "samples.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        letters = {"agree": "A", "judge-fails": "A", "second-right": "B", "second-fails": "A"}
        for row in rows:
            row["answer"] = row["detail"]["letter"] = letters[row["id"]]
            row["score"] = float(row["answer"] == "A")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def reply(text: str) -> tuple[int, str]:
            second = "Two answers were given" in text
            if "agree?" in text or "second-right?" in text:
                return 200, "The answer is A."
            if "judge-fails?" in text:
                return 200, "The answer is B." if second else "There is no picture."
            return 200, "I can't decide." if second else "The answer is B."

        server.reply = reply
        judged = review(folder, HttpJudge(server.url, "gpt-4"))
        values = {name: metric["value"] for name, metric in judged["metrics"].items()}
        assert values == {"model": 3 / 4, "judge": 2 / 4, "complement": 3 / 4, "second_look": 3 / 4}
        assert judged["unreadable"] == 1
        assert len(server.requests) == 4 + 3  # where they agree there is no second look
        assert "option's letter" not in server.requests[0]["messages"][1]["content"]

    def test_other_tasks_need_no_judge(self, evaluate_tiny, pope_data, server):
        with pytest.raises(InputError, match="a run of pope needs no judge"):
            review(evaluate_tiny("pope", pope_data, limit=1).folder, HttpJudge(server.url, "m"))
