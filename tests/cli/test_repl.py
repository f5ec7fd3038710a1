"""The conversation, on a terminal of its own and on a pipe."""

from __future__ import annotations

import json
import os
import re
import time

import pytest

pexpect = pytest.importorskip("pexpect")
pytestmark = [
    pytest.mark.usefixtures("nano"),
    # A pseudo-terminal is made with fork, which Python warns of if the tests before have started threads.
    pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning"),
]
ANIMAL = "What animal is in this picture?"
PROMPT = "\r?\n?> "
# Tokens at random: the end of the answer is as unlikely as any other of many thousands.
RAMBLING = ["--temperature", "100", "--top-p", "1", "--top-k", "0", "--min-p", "0", "--max-tokens", "3000"]


class Terminal:
    """A conversation on a pseudo-terminal."""

    def __init__(self, command, environment, cwd, args):
        self.process = pexpect.spawn(
            command[0], [*command[1:], "chat", *map(str, args)],
            cwd=str(cwd), env=environment, encoding="utf-8", codec_errors="replace", timeout=60, dimensions=(50, 200),
        )  # fmt: skip
        self.process.delaybeforesend = 0.02

    def ready(self) -> str:
        """Wait for the prompt and return what came before it, without the echo of the line that was typed."""
        self.process.expect(PROMPT)
        return re.sub(r"\x1b\[[?0-9;]*[a-z]", "", self.process.before).replace("\r", "")

    def say(self, line: str) -> str:
        """Type a line and return the answer."""
        self.process.sendline(line)
        self.process.expect_exact("\r\n")
        return self.ready().strip()

    def leave(self) -> int:
        """Ctrl-D; returns the exit code."""
        self.process.sendeof()
        self.process.expect(pexpect.EOF)
        self.process.close()
        return self.process.exitstatus


@pytest.fixture
def talk(command, environment, tmp_path):
    """Start a conversation with more arguments and wait for its prompt."""
    opened = []

    def talk(*args):
        terminal = Terminal(command, environment, tmp_path, args)
        opened.append(terminal)
        terminal.greeting = terminal.ready()
        return terminal

    yield talk
    for terminal in opened:
        terminal.process.close(force=True)


def test_a_conversation_about_a_picture(talk, cat):
    terminal = talk("--image", cat)
    assert "nano, 1 picture with your first question" in terminal.greeting
    assert "cat" in terminal.say(ANIMAL).lower()
    assert terminal.say("What colour is it?")
    assert terminal.leave() == 0


def test_the_first_answer_is_that_of_the_command_line(talk, cat, run):
    terminal = talk("--image", cat)
    assert terminal.say(ANIMAL) == run("chat", "--image", cat, "-p", ANIMAL).out.strip()


def test_pictures_come_by_command_and_by_dropping(talk, run, cat, tmp_path):
    spaced = tmp_path / "my cat.jpg"
    spaced.write_bytes(cat.read_bytes())
    terminal = talk()
    for line in (f"/image {cat}", "/image my cat.jpg", '/image "my cat.jpg"', f"'{spaced}'", spaced.as_uri(),
                 str(spaced).replace(" ", "\\ ")):  # fmt: skip
        assert "added" in terminal.say(line), line
        assert terminal.say("/reset") == "The conversation is forgotten."
    terminal.say(f"/image {cat}")
    assert terminal.say(ANIMAL) == run("chat", "--image", cat, "-p", ANIMAL).out.strip()


def test_a_bad_picture_is_one_line_and_the_conversation_goes_on(talk, cat, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    terminal = talk()
    for line, words in {
        "/image gone.jpg": "no such picture: gone.jpg",
        "/nowhere/gone.jpg": "no such picture: /nowhere/gone.jpg",
        "/image text.jpg": "text.jpg is not a picture",
        f"/image {tmp_path}": "is a directory",
        "/image": "/image needs a file",
    }.items():
        shown = terminal.say(line).splitlines()
        assert shown[0].startswith("error: "), shown
        assert words in shown[0]
        assert len(shown) <= 2
    assert "added cat.jpg" in terminal.say(f"/image {cat}")
    assert terminal.say(ANIMAL)


def test_an_unknown_command_gets_a_suggestion(talk):
    terminal = talk()
    assert "no such command: /rest; did you mean /reset?" in terminal.say("/rest")
    assert "/help lists them" in terminal.say("/xyzzy")
    for command in ("/image", "/reset", "/save", "/settings", "/quit"):
        assert command in terminal.say("/help")


def test_settings_are_shown_and_changed(talk):
    terminal = talk("--seed", "5")
    shown = terminal.say("/settings")
    assert "temperature: 0.0" in shown
    assert "seed: 5" in shown
    assert terminal.say("/settings temperature 0.7") == "temperature: 0.7"
    assert terminal.say("/settings max-tokens 3") == "max-tokens: 3"
    assert "temperature: 0.7" in terminal.say("/settings")
    assert "did you mean temperature?" in terminal.say("/settings temprature 1")
    assert "cut after 3 tokens" in terminal.say("Tell me about the sea.")


def test_a_conversation_is_saved_and_only_its_own_file_replaced(talk, cat, tmp_path):
    (tmp_path / "old.md").write_text("mine")
    terminal = talk("--image", cat, "--system", "Be brief.")
    answer = terminal.say(ANIMAL)
    assert "saved" in terminal.say("/save talk.json")
    assert "saved" in terminal.say("/save talk.json")
    assert "saved" in terminal.say("/save talk.md")
    assert "exists" in terminal.say("/save old.md")
    assert "format is not known" in terminal.say("/save talk.docx")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["model"] == "nano"
    assert saved["system"] == "Be brief."
    assert [turn["role"] for turn in saved["turns"]] == ["user", "assistant"]
    assert saved["turns"][0]["images"] == ["cat.jpg"]
    assert " ".join(saved["turns"][1]["text"].split()) == " ".join(answer.split())
    assert "What animal" in (tmp_path / "talk.md").read_text()
    assert (tmp_path / "old.md").read_text() == "mine"


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(talk):
    terminal = talk(*RAMBLING)
    terminal.process.sendline("Go on and on.")
    terminal.process.expect_exact("\r\n")
    time.sleep(1.0)
    terminal.process.sendintr()
    terminal.process.expect_exact("(stopped)")
    terminal.ready()
    terminal.say("/settings temperature 0")
    terminal.say("/settings max-tokens 4")
    assert terminal.say("Hello?")
    assert terminal.leave() == 0


def test_ctrl_c_at_the_prompt_drops_the_line(talk):
    terminal = talk()
    terminal.process.send("half a quest")
    time.sleep(0.2)
    terminal.process.sendintr()
    terminal.ready()
    assert "temperature: 0.0" in terminal.say("/settings")
    assert terminal.leave() == 0


def test_lines_are_remembered_for_the_next_conversation(talk):
    first = talk()
    first.say("/settings seed 41")
    assert first.leave() == 0
    second = talk()
    second.process.send("\x1b[A")
    second.process.expect_exact("/settings seed 41")


def test_quit_leaves(talk):
    terminal = talk()
    terminal.process.sendline("/quit")
    terminal.process.expect(pexpect.EOF)
    terminal.process.close()
    assert terminal.process.exitstatus == 0


def test_a_piped_conversation_writes_answers_to_stdout_and_the_rest_to_stderr(run, cat):
    lines = f"/image {cat}\n{ANIMAL}\n/nonsense\nIs it\\\n asleep?\n"
    result = run("chat", stdin=lines)
    assert result.code == 1
    assert len(result.out.splitlines()) >= 2
    assert "added cat.jpg" in result.err
    assert "no such command: /nonsense" in result.err
    assert "> " not in result.out


def test_a_piped_line_that_is_no_text_is_refused_alone(run):
    result = run("chat", "--max-tokens", "2", "--quiet", stdin=b"/settings seed 1\r\ncaf\xe9?\n/settings seed 2\nWhy?")
    assert "seed: 1" in result.err
    assert "error: the line is not valid text" in result.err
    assert "seed: 2" in result.err
    assert result.out.strip()
    assert result.code == 1
    assert run("chat", stdin="/settings seed 1\n").code == 0


def test_odd_names_cost_their_line_only(run, cat, tmp_path):
    long = "x" * 300
    lines = ["~30 people?", "/image ~nobody-of-this-name/x.jpg", f"/image {long}.jpg", f"/save {long}.md",
             "file://[x", f"/image {cat}", ANIMAL, "/save 'my talk.md'"]  # fmt: skip
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(name, "wb") as file:  # noqa: PTH123
        file.write(cat.read_bytes())
    result = run("chat", "--image", name, "--max-tokens", "2", stdin="\n".join(lines) + "\n")
    assert result.code == 1
    assert "no such picture: ~nobody-of-this-name/x.jpg" in result.err
    assert result.err.count("File name too long") == 2
    assert "- picture: cat.jpg" in (tmp_path / "my talk.md").read_text(encoding="utf-8")
    assert "- picture: caf\\udce9.jpg" in (tmp_path / "my talk.md").read_text(encoding="utf-8")


def test_a_second_turn_costs_its_own_tokens_only(run, cat):
    result = run("chat", "--no-cache", "--stats", "--image", cat, stdin=f"{ANIMAL}\nWhat colour is it?\n")
    turns = [[int(number) for number in found] for found in re.findall(r"prefill (\d+) of (\d+) tokens", result.err)]
    assert len(turns) == 2
    # Of the first turn more or less was read while it was typed.
    assert turns[1][0] < 40 < turns[0][1] < turns[1][1]
    # The first turn's line may be without an encode too, where it was over before the question came.
    assert "encode" not in [line for line in result.err.splitlines() if "prefill" in line][1]
