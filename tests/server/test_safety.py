"""Who may ask, what may be asked, and what never leaves."""

from __future__ import annotations

import http.client
import io
import json
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from PIL import Image

from llava_edge.errors import ImageError, InputError, LlavaEdgeError, ModelError
from llava_edge.server.errors import as_api_error
from llava_edge.server.guard import Access, is_loopback, origins, read_keys

from .conftest import Server, data_uri, question

KEYS = ("first-key-0123456789", "second-key-0123456789")


def send(
    server: Server, path: str = "/v1/models", method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, data


@pytest.fixture(scope="session")
def locked(serve: Callable[..., Server], tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server with keys, one page that may use it, and small bodies."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"# people\n{KEYS[0]}\n\n{KEYS[1]}\n")
    return serve(
        *("--model", tiny_bundle, "--threads", 1, "--parallel", 1, "--api-key-file", path, "--max-body", 1),
        *("--cors-origin", "https://good.example", "--host", "127.0.0.1"),
    )


def test_a_key_is_needed(locked: Server) -> None:
    for key in KEYS:
        assert locked.client(api_key=key).models.list().data
    for key in ("wrong-key-0123456789", KEYS[0][:-1], KEYS[0] + "x"):
        with pytest.raises(openai.AuthenticationError, match="key is wrong"):
            locked.client(api_key=key).models.list()
    status, headers, body = send(locked)
    assert status == 401
    assert headers["www-authenticate"] == "Bearer"
    assert json.loads(body)["error"]["type"] == "authentication_error"
    assert send(locked, "/metrics")[0] == 401
    assert send(locked, "/health")[0] == 200
    assert send(locked, "/ready")[0] == 200


def test_pages_of_other_sites_are_kept_out(locked: Server, tiny_server: Server) -> None:
    assert send(tiny_server, Origin="https://evil.example")[0] == 403
    assert send(tiny_server, Origin="null")[0] == 403
    assert send(tiny_server, Origin=f"http://127.0.0.1:{tiny_server.port}")[0] == 200
    status, headers, _ = send(tiny_server, "/v1/chat/completions", "OPTIONS", Origin="https://evil.example")
    assert status == 403
    assert not [name for name in headers if name.startswith("access-control")]


def test_a_page_that_was_allowed_gets_cors(locked: Server) -> None:
    status, headers, _ = send(
        locked,
        "/v1/chat/completions",
        "OPTIONS",
        Origin="https://good.example",
        Access_Control_Request_Method="POST",
        Access_Control_Request_Headers="authorization,content-type",
    )
    assert status == 200
    assert headers["access-control-allow-origin"] == "https://good.example"
    _, headers, _ = send(locked, Origin="https://good.example", Authorization=f"Bearer {KEYS[0]}")
    assert headers["access-control-allow-origin"] == "https://good.example"
    assert "access-control-allow-origin" not in send(locked, Origin="https://evil.example")[1]


def test_another_name_for_this_machine_is_refused(tiny_server: Server) -> None:
    for host in ("evil.example", f"evil.example:{tiny_server.port}", "127.0.0.1.evil.example", ""):
        assert send(tiny_server, Host=host)[0] in (400, 403)
    for host in ("localhost", f"localhost:{tiny_server.port}", f"[::1]:{tiny_server.port}"):
        assert send(tiny_server, Host=host)[0] == 200


def test_a_form_of_another_site_is_no_request(tiny_server: Server) -> None:
    body = json.dumps({"messages": [question("Hello")]}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _, answer = send(tiny_server, "/v1/chat/completions", "POST", body, Content_Type=kind)
        assert status == 415
        assert b"application/json" in answer


def test_a_large_body_is_refused_before_it_is_read(locked: Server) -> None:
    headers = {"Content_Type": "application/json", "Authorization": f"Bearer {KEYS[0]}"}
    status, _, body = send(locked, "/v1/chat/completions", "POST", b"{}", Content_Length="99999999", **headers)
    assert status == 413
    assert b"1,048,576 bytes" in body
    with pytest.raises((openai.APIStatusError, openai.APIConnectionError)) as caught:
        locked.client(api_key=KEYS[0]).chat.completions.create(
            model="tiny", messages=[question("x" * (1 << 20))], max_tokens=1
        )
    assert getattr(caught.value, "status_code", 413) == 413


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"seed":' + b"9" * 10_000 + b"}",
        b'{"temperature": NaN, "messages": []}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_a_body_that_is_no_request_gets_a_400(tiny_server: Server, body: bytes) -> None:
    status, _, answer = send(tiny_server, "/v1/chat/completions", "POST", body, Content_Type="application/json")
    assert status == 400
    assert json.loads(answer)["error"]["message"]


def test_pictures_beyond_the_limits_are_refused_and_the_server_goes_on(tiny_server: Server, tmp_path: Path) -> None:
    """A bomb, a strip, a cut file and one that claims to be huge."""
    client = tiny_server.client()
    huge = io.BytesIO()
    Image.new("1", (8000, 8000)).save(huge, "PNG")
    strip = io.BytesIO()
    Image.new("RGB", (5000, 10)).save(strip, "PNG")
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    for data, says in (
        (huge.getvalue(), "at most 40,000,000"),
        (strip.getvalue(), "50:1"),
        (whole.getvalue()[:-200], "damaged"),
    ):
        path = tmp_path / "picture.png"
        path.write_bytes(data)
        with pytest.raises(openai.BadRequestError, match=says) as caught:
            client.chat.completions.create(model="tiny", messages=[question("What?", path)], max_tokens=1)
        assert caught.value.code == "invalid_image"
    path.write_bytes(whole.getvalue())
    assert client.chat.completions.create(model="tiny", messages=[question("What?", path)], max_tokens=1).choices


def test_the_log_holds_nothing_that_people_wrote(tiny_server: Server, pictures: list[Path]) -> None:
    client = tiny_server.client()
    client.chat.completions.create(model="tiny", messages=[question("my secret diary", pictures[0])], max_tokens=4)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=[question("secret two")], max_tokens=4, stop=[""])
    send(tiny_server, "/secret/path?secret=1")
    assert "status 200" in tiny_server.log
    assert "secret" not in tiny_server.log
    assert data_uri(pictures[0])[30:60] not in tiny_server.log


def test_other_machines_need_a_key_which_is_made(serve: Callable[..., Server], tiny_bundle: Path) -> None:
    server = serve("--model", tiny_bundle, "--threads", 1, "--parallel", 1, "--host", "0.0.0.0")
    assert "warning: other machines can reach 0.0.0.0" in server.log
    assert server.key
    assert server.key in server.log
    assert send(server)[0] == 401
    assert send(server, Authorization=f"Bearer {server.key}", Host="laptop.lan:8080")[0] == 200


@pytest.mark.parametrize(
    ("text", "says"), [("", "no API key"), ("# nothing\n", "no API key"), ("short\n", "at least 16 characters")]
)
def test_a_key_file_without_good_keys_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read_keys(path)
    with pytest.raises(InputError, match="No such file"):
        read_keys(tmp_path / "missing")


def test_origins_and_hosts() -> None:
    assert origins(["https://a.example", "*"]) == ("https://a.example", "*")
    for wrong in ("a.example", "https://a.example/", "ftp://a.example"):
        with pytest.raises(InputError, match="is not an origin"):
            origins([wrong])
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"))
    assert Access(loopback=False).allows_host("anything")


@pytest.mark.parametrize(
    ("error", "status"),
    [(ImageError("not a picture"), 400), (InputError("no such option"), 400), (ModelError("a damaged tower"), 500)],
)
def test_a_failure_of_the_server_is_not_blamed_on_the_request(error: LlavaEdgeError, status: int) -> None:
    assert as_api_error(error).status == status
