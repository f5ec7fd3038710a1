"""The page in a real browser: the system's Chromium."""

from __future__ import annotations

import base64
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_edge.server.page import page as document

from .conftest import EXAMPLES, Server, metric

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CAT = EXAMPLES / "cat.jpg"
DONE = ".assistant:not(.writing)"

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Any, nano_server: Server) -> Iterator[Callable[..., Any]]:
    """Open the page; it fails on errors in its console, and on requests that leave the server."""
    contexts: list[Any] = []
    problems: list[str] = []

    def seen(request: Any) -> None:
        if not request.url.startswith((nano_server.url, "data:", "blob:")):
            problems.append(f"request of {request.url[:100]}")

    def make(**options: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options}))
        opened = contexts[-1].new_page()
        opened.set_default_timeout(60_000)
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        opened.on("request", seen)
        opened.goto(nano_server.url)
        opened.wait_for_selector("#status.ready")
        return opened

    yield make
    for context in contexts:
        context.close()
    assert problems == []


def ask(page: Any, text: str) -> str:
    """Ask and wait for the whole answer."""
    before = page.locator(".assistant").count()
    page.fill("#question", text)
    page.keyboard.press("Enter")
    page.locator(DONE).nth(before).wait_for()
    return str(page.locator(f"{DONE} .text").nth(before).inner_text())


def drop(page: Any, path: Path) -> None:
    """Drop a file on the page, as a file manager does."""
    data = page.evaluate_handle(
        """(data) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.jpg", { type: "image/jpeg" }));
            return transfer;
        }""",
        base64.b64encode(path.read_bytes()).decode(),
    )
    for name in ("dragover", "drop"):
        page.dispatch_event("main", name, {"dataTransfer": data})


def test_a_picture_is_dropped_asked_about_and_asked_again(open_page: Callable[..., Any], nano: Any) -> None:
    page = open_page()
    drop(page, CAT)
    page.wait_for_selector("#attached img")
    with nano.chat() as chat:
        expected = chat.ask("What animal is in this picture?", [CAT]).text
        assert ask(page, "What animal is in this picture?") == expected
        assert ask(page, "Are you sure?") == chat.ask("Are you sure?").text
    assert re.search(r"first token \d+\.\d\d s · .* tokens", page.locator(".assistant .figures").first.inner_text())
    assert page.locator(".user img").count() == 1
    page.locator(".assistant button", has_text="Ask again").first.click()
    page.locator(DONE).first.wait_for()
    assert page.locator(".assistant").count() == 1  # what came after is a matter of the new answer
    assert page.locator(".assistant .text").inner_text() == expected


def test_a_picture_is_read_while_the_question_is_typed(open_page: Callable[..., Any], nano_server: Server) -> None:
    page = open_page()
    before = metric(nano_server, "llava_edge_prompt_tokens_total")
    with page.expect_response(lambda response: response.url.endswith("/chat/completions")) as read:
        drop(page, EXAMPLES / "coffee.jpg")
    assert read.value.status == 200
    assert metric(nano_server, "llava_edge_prompt_tokens_total") > before + 64
    cached = metric(nano_server, "llava_edge_prompt_cached_tokens_total")
    assert ask(page, "What is on the table?")
    assert metric(nano_server, "llava_edge_prompt_cached_tokens_total") > cached + 64


def test_a_question_is_edited_with_its_picture(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.set_input_files("#files", [CAT, EXAMPLES / "coffee.jpg"])
    page.locator("#attached img").nth(1).wait_for()
    ask(page, "What is it?")
    ask(page, "Are you sure?")
    page.locator(".user button", has_text="Edit").first.click()
    assert page.input_value("#question") == "What is it?"
    assert page.locator("#attached img").count() == 2
    page.locator("#attached button").first.click()
    page.fill("#question", "What is this?")
    page.keyboard.press("Enter")
    page.locator(".user .text", has_text="What is this?").wait_for()
    page.locator(DONE).wait_for()
    assert page.locator(".user").count() == 1
    assert page.locator(".user img").count() == 1
    assert page.locator(".user .text").inner_text() == "What is this?"


def test_a_question_that_is_not_edited_after_all_loses_nothing(open_page: Callable[..., Any]) -> None:
    page = open_page()
    drop(page, CAT)
    page.wait_for_selector("#attached img")
    ask(page, "What is it?")
    answer = ask(page, "Is it a dog?")
    for leave in ("Escape", "button"):
        page.keyboard.press("ArrowUp")
        assert page.input_value("#question") == "Is it a dog?"
        assert page.locator(".replaced").count() == 2
        if leave == "Escape":
            page.keyboard.press("Escape")
        else:
            page.click("#cancel-edit")
        assert page.input_value("#question") == ""
        assert page.locator(".replaced").count() == 0
        assert page.locator(f"{DONE} .text").last.inner_text() == answer
    page.keyboard.press("ArrowUp")
    page.reload()
    page.wait_for_selector("#status.ready")
    assert page.locator(f"{DONE} .text").last.inner_text() == answer


def test_a_question_waits_for_the_picture_that_is_being_attached(open_page: Callable[..., Any]) -> None:
    page = open_page()

    def drop_and_ask(path: Path, question: str) -> None:
        """In one task of the browser, so that the file can't have been read before."""
        page.evaluate(
            """([data, question]) => {
                document.getElementById("question").value = question;
                const dataTransfer = new DataTransfer();
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                dataTransfer.items.add(new File([bytes], "dropped.jpg", { type: "image/jpeg" }));
                document.dispatchEvent(new DragEvent("drop", { dataTransfer }));
                document.getElementById("composer").requestSubmit();
            }""",
            [base64.b64encode(path.read_bytes()).decode(), question],
        )

    drop_and_ask(CAT, "What animal is in this picture?")
    page.locator(DONE).wait_for()
    assert page.locator(".user img").count() == 1
    drop_and_ask(Path(__file__), "And this one?")
    page.locator("#alert", has_text="can't be read as a picture").wait_for()
    assert page.locator(".user").count() == 1
    assert page.input_value("#question") == "And this one?"


def test_two_tabs_go_on_with_one_conversation(open_page: Callable[..., Any]) -> None:
    first = open_page()
    second = first.context.new_page()
    second.goto(first.url)
    second.wait_for_selector("#status.ready")
    drop(first, CAT)
    first.wait_for_selector("#attached img")
    answer = ask(first, "What animal is in this picture?")
    second.locator("#conversations .pick").click()
    second.locator(f"{DONE} .text", has_text=answer).wait_for()
    answer = ask(second, "Are you sure?")
    first.locator(f"{DONE} .text", has_text=answer).last.wait_for()
    assert first.locator(DONE).count() == 2
    first.locator("#conversations .drop").click()
    second.locator(".message").first.wait_for(state="detached")
    for page in (first, second):
        page.reload()
        page.wait_for_selector("#status.ready")
        assert page.locator("#conversations .pick").count() == 0


def test_a_picture_is_pasted(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.evaluate(
        """async (data) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([bytes], "pasted.jpg", { type: "image/jpeg" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
        }""",
        base64.b64encode(CAT.read_bytes()).decode(),
    )
    page.wait_for_selector("#attached img[alt='pasted.jpg']")


def make_endless(route: Any) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 512}
    wanted = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": schema}}
    route.continue_(post_data={**route.request.post_data_json, "max_tokens": 3000, "response_format": wanted})


def test_an_answer_streams_and_is_stopped(open_page: Callable[..., Any]) -> None:
    page = open_page()

    page.route("**/v1/chat/completions", make_endless)
    page.set_input_files("#files", CAT)
    page.wait_for_selector("#attached img")
    page.fill("#question", "Count.")
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant.writing:not(.waiting) .text > *")
    page.keyboard.press("Escape")
    page.locator(DONE).first.wait_for()
    assert "stopped" in page.locator(".assistant .figures").inner_text()
    assert page.locator(".assistant .text").inner_text()
    assert page.locator("#send").is_visible()
    assert page.locator("#stop").is_hidden()
    page.unroute("**/v1/chat/completions")
    assert ask(page, "Hello!")


def test_a_conversation_that_is_deleted_while_its_answer_is_written_stays_away(open_page: Callable[..., Any]) -> None:
    page = open_page()

    page.route("**/v1/chat/completions", make_endless)
    page.fill("#question", "Count.")
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant.writing:not(.waiting) .text > *")
    page.locator("#conversations .drop").first.click()
    page.wait_for_selector("#send:visible")
    page.unroute("**/v1/chat/completions")
    assert ask(page, "Hello!")
    page.reload()
    page.locator(DONE).first.wait_for()
    assert page.locator("#conversations .pick").all_inner_texts() == ["Hello!"]


def test_a_reload_keeps_the_conversations(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.set_input_files("#files", CAT)
    page.wait_for_selector("#attached img")
    first = ask(page, "What animal is in this picture?")
    page.click("#new-chat")
    assert page.locator(".message").count() == 0
    second = ask(page, "Hello!")
    page.reload()
    page.locator(DONE).first.wait_for()
    assert page.locator(".assistant .text").inner_text() == second
    assert page.locator("#conversations .pick").all_inner_texts() == ["Hello!", "What animal is in this picture?"]
    page.locator("#conversations .pick").nth(1).click()
    assert page.locator(".assistant .text").inner_text() == first
    assert page.locator(".user img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    page.locator("#conversations .drop").nth(1).click()
    assert page.locator("#conversations .pick").all_inner_texts() == ["Hello!"]
    page.reload()
    page.wait_for_selector("#status.ready")
    assert page.locator("#conversations .pick").all_inner_texts() == ["Hello!"]


def test_html_of_people_and_models_stays_text(open_page: Callable[..., Any]) -> None:
    page = open_page()
    evil = "<img src=x onerror=\"document.title='broken in'\"><script>alert(1)</script>"
    ask(page, evil)
    assert page.locator(".user .text").inner_text() == evil
    marked = f"{evil}\n\n- **bold** `<b>code</b>`\n\n```\n<i>{evil}</i>\n```"
    page.evaluate("(text) => document.querySelector('.assistant .text').replaceChildren(...rendered(text))", marked)
    assert page.locator(".message img, .message script, .message b, .message i").count() == 0
    assert page.locator(".assistant strong").inner_text() == "bold"
    assert page.locator(".assistant li code").inner_text() == "<b>code</b>"
    assert evil in page.locator(".assistant pre").inner_text()
    assert page.title().startswith("<img")


def test_a_phone_shows_everything_without_scrolling_sideways(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)

    def sideways() -> bool:
        return bool(page.evaluate("document.documentElement.scrollWidth > 390"))

    assert not sideways()
    page.set_input_files("#files", [CAT, EXAMPLES / "coffee.jpg"])
    page.locator("#attached img").nth(1).wait_for()
    assert not sideways()
    ask(page, "What is there? " + "x" * 200)
    assert not sideways()
    assert page.locator("#sidebar").is_hidden()
    page.tap("#open-sidebar")
    page.wait_for_selector("#sidebar.open")
    page.tap("#new-chat")
    assert page.locator(".message").count() == 0
    for name in ("#choose", "#camera", "#send", "#open-settings"):
        box = page.locator(name).bounding_box()
        assert min(box["width"], box["height"]) >= 44
    assert page.get_attribute("#snapshot", "capture") == "environment"


def test_everything_can_be_reached_with_the_keyboard_and_has_a_name(open_page: Callable[..., Any]) -> None:
    page = open_page()
    ask(page, "Hello!")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select")].filter((node) =>
            !(node.ariaLabel || node.labels?.length || node.textContent.trim())).map((node) => node.outerHTML)"""
    )
    assert nameless == []
    reached = set()
    page.focus("#new-chat")
    for _ in range(20):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        page.keyboard.press("Tab")
    assert {"new-chat", "theme", "open-settings", "Copy", "Ask again", "choose", "camera", "question"} <= reached
    page.click("#theme")
    first = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != first


def test_the_focus_stays_where_it_can_be_used(open_page: Callable[..., Any]) -> None:
    page = open_page()
    focused = "document.activeElement.id || document.activeElement.className"
    page.fill("#question", "Hello!")
    page.focus("#send")
    page.keyboard.press("Enter")
    page.locator(DONE).wait_for()
    assert page.evaluate(focused) == "question"
    page.click("#new-chat")
    ask(page, "Again?")
    page.locator("#conversations .pick").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.evaluate(focused) == "pick"
    assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"
    page.set_input_files("#files", [CAT, CAT])
    page.wait_for_selector("#attached li:nth-child(2)")
    page.locator("#attached button").nth(0).click()
    assert page.evaluate("document.activeElement.closest('#attached') !== null")
    page.locator("#attached button").nth(0).click()
    assert page.evaluate(focused) == "question"


def test_numbers_go_on_over_a_blank_line(open_page: Callable[..., Any]) -> None:
    page = open_page()
    starts = "rendered('1. One\\n\\n2. Two').map((node) => node.start)"
    assert page.evaluate(starts) == [1, 2]


def test_the_number_of_image_tokens_is_chosen(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.click("#open-settings")
    assert page.locator("#image-tokens option").all_inner_texts()[1:] == ["16", "64", "256"]
    page.select_option("#image-tokens", "256")
    page.click("#settings .primary")
    page.set_input_files("#files", CAT)
    page.wait_for_selector("#attached img")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What is it?")
    assert sent.value.post_data_json["image_tokens"] == 256


def test_a_file_that_is_no_picture_is_refused_in_words(open_page: Callable[..., Any], tmp_path: Path) -> None:
    page = open_page()
    path = tmp_path / "notes.txt"
    path.write_text("no picture")
    page.set_input_files("#files", path)
    page.wait_for_selector("#alert:not([hidden])")
    assert "notes.txt" in page.locator("#alert").inner_text()


def test_the_page_needs_nothing_else(tiny_server: Server) -> None:
    with urllib.request.urlopen(tiny_server.url) as response:
        text, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    assert (text, policy) == document()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)
