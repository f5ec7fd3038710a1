"""Pictures by address: a real site, a site that nobody may reach, and a name server whose answers change."""

from __future__ import annotations

import http.server
import ipaddress
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from llava_edge.errors import ImageError
from llava_edge.server.fetch import MAX_BYTES, fetch_now, is_public

from .conftest import Server

FRONT, SECRET, SECRET_6 = "127.0.0.1", "127.0.0.2", "::1"


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("0.1.2.3", "224.0.0.1", "255.255.255.255", "192.0.2.1", "192.0.0.9", "192.88.99.1", "198.18.0.1"),
        *("240.0.0.1", "::1", "::", "::127.0.0.1", "::1.1.1.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"),
        *("::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::101:101", "100::1"),
        *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "2002:7f00:1::", "2002:101:101::", "3fff::1"),
        *("4000::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1"),
    ],
)
def test_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1"]
)
def test_public_addresses_are(address: str) -> None:
    assert is_public(address)


@dataclass
class Sites:
    """The allowed site at FRONT, and one at SECRET and SECRET_6 with the same port, which counts who comes."""

    port: int
    targets: list[tuple[int, str | None]] = field(default_factory=list)
    visits: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{FRONT}:{self.port}"

    def redirect(self, target: str | None, status: int = 302) -> str:
        """The address of a page at FRONT that leads there."""
        self.targets.append((status, target))
        return f"{self.url}/to/{len(self.targets) - 1}"


def _handler(sites: Sites) -> type[http.server.BaseHTTPRequestHandler]:
    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = self.server.server_address[0]
            sites.visits.append(str(address))
            sites.hosts.append(self.headers["Host"])
            kind, _, rest = self.path[1:].partition("/")
            if address != FRONT:
                self.answer(b"secret")
            elif kind == "to":
                status, target = sites.targets[int(rest)]
                self.send_response(status)
                if target is not None:
                    self.wfile.write(b"".join(self._headers_buffer))  # type: ignore[attr-defined]
                    self._headers_buffer = [f"Location: {target}\r\n".encode()]
                self.end_headers()
            elif kind == "large":
                self.answer(*[bytes(1 << 20)] * (MAX_BYTES // (1 << 20) + 2))
            elif kind == "picture":
                self.answer(b"picture")
            else:
                self.send_error(404)

        def answer(self, *parts: bytes) -> None:
            self.send_response(200)
            self.send_header("Refresh", f"0; url=http://{SECRET}:{sites.port}/")
            self.end_headers()
            try:
                for part in parts:
                    self.wfile.write(part)
            except OSError:
                self.close_connection = True

        def log_message(self, *args: Any) -> None:
            pass

    return Pages


class _Six(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


@pytest.fixture
def sites() -> Iterator[Sites]:
    """Both sites. Where a system lacks one of the addresses (macOS has one of IPv4), nobody listens there."""
    made = Sites(0)
    handler = _handler(made)
    servers: list[http.server.ThreadingHTTPServer] = []
    for kind, address in ((http.server.ThreadingHTTPServer, FRONT), (http.server.ThreadingHTTPServer, SECRET),
                          (_Six, SECRET_6)):  # fmt: skip
        try:
            servers.append(kind((address, made.port), handler))
        except OSError:
            assert servers, "the loopback address is not there"
            assert address == SECRET_6 or sys.platform != "linux"
        made.port = servers[0].server_port
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    for server in servers:
        server.shutdown()
        server.server_close()


def front_or_public(address: str) -> bool:
    """The shipped rule, and the one site of the tests."""
    return address == FRONT or is_public(address)


def refused(url: str, sites: Sites, says: str, allowed: Callable[[str], bool] = front_or_public) -> None:
    """An error with these words, and nobody came to the secret site."""
    with pytest.raises(ImageError, match=says):
        fetch_now(url, allowed)
    assert set(sites.visits) <= {FRONT}


def test_the_secret_site_can_be_reached_by_one_that_is_allowed_to(sites: Sites) -> None:
    """Or the other tests would show nothing."""
    assert fetch_now(f"http://[{SECRET_6}]:{sites.port}/", lambda address: True) == b"secret"
    assert fetch_now(sites.redirect(f"http://[{SECRET_6}]:{sites.port}/"), lambda address: True) == b"secret"
    assert sites.visits == [SECRET_6, FRONT, SECRET_6]


def test_a_picture_is_fetched_after_a_redirect(sites: Sites) -> None:
    assert fetch_now(f"{sites.url}/picture", front_or_public) == b"picture"
    for status in (301, 302, 303, 307, 308):
        assert fetch_now(sites.redirect("/picture", status), front_or_public) == b"picture"
    assert fetch_now(sites.redirect(f"//{FRONT}:{sites.port}/picture"), front_or_public) == b"picture"
    assert set(sites.visits) == {FRONT}


def spellings(n: int) -> list[str]:
    """Ways to write 127.0.0.n, by itself and inside addresses of IPv6."""
    inner = f"7f00:{n:x}"
    return [
        *(f"127.0.0.{n}", f"127.{n}", f"127.0.{n}", f"127.0.0.{n}.", f"0177.0.0.{n}", f"127.0.0.0x{n:x}"),
        *(f"{0x7F000000 + n}", f"0x7f00000{n:x}", f"0x7f.0.0.{n}", f"0X7F.{n}", f"0177.0.0.0{n:o}", f"0177.{n}"),
        *(f"{0x7F000000 + n:#o}".replace("o", ""), f"0x000000007f00000{n:x}", f"127.0.0.{n + 256}"),
        *(f"[::ffff:127.0.0.{n}]", f"[::ffff:{inner}]", f"[0:0:0:0:0:ffff:{inner}]", f"[::127.0.0.{n}]"),
        *(f"[::FFFF:{inner}%25lo]", f"[::ffff:0:{inner}]", f"[64:ff9b::{inner}]", f"[64:ff9b::127.0.0.{n}]"),
        *(f"[64:ff9b:1::{inner}]", f"[2002:{inner}::]", f"[2002:{inner}::1]", f"[2001:0:{inner}::1]"),
        f"[2001:0:4136:e378:8000:63bf:80ff:{0xFFFF ^ n:x}]",  # Teredo has the address with its bits turned
    ]


ELSEWHERE = [
    *("localhost", "LOCALHOST", "localhost.", "0", "0.0.0.0", "0x0", "00", "[::]", "[::1]", "[0:0:0:0:0:0:0:1]"),
    *("[::1%25lo]", "[::1%lo]", "[::1%251]", "[fe80::1]", "[fe80::1%25lo]", "[fec0::1]", "[fc00::1]", "[ff02::1]"),
    *("10.0.0.1", "192.168.1.1", "172.31.255.255", "100.64.0.1", "169.254.169.254", "0xa9fea9fe", "2852039166"),
    *("[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "[fd00:ec2::254]", "255.255.255.255", "224.0.0.1"),
]
NOT_REACHED = r"private network|is not known|is not valid|have to be written"


@pytest.mark.parametrize("host", [*spellings(1), *ELSEWHERE])
def test_no_spelling_leads_to_this_machine_or_its_network(host: str, sites: Sites) -> None:
    with pytest.raises(ImageError, match=NOT_REACHED):
        fetch_now(f"http://{host}:{sites.port}/picture", is_public)
    assert sites.visits == []


@pytest.mark.parametrize("host", [*spellings(2), *(host for host in ELSEWHERE if host.lower()[:9] != "localhost")])
def test_no_redirect_leads_there_either(host: str, sites: Sites) -> None:
    refused(sites.redirect(f"http://{host}:{sites.port}/"), sites, NOT_REACHED)
    assert sites.visits == [FRONT]


WRONG_URLS = {
    "begin with http": [
        *("file:///etc/passwd", "file://localhost/etc/passwd", "FILE:///etc/passwd", "file:/etc/passwd"),
        *("data:image/png;base64,AAAA", "data:,x", "gopher://{secret}/_GET%20/", "ftp://{secret}/", "dict://{secret}/"),
        *("ldap://{secret}/", "jar:http://{secret}!/x", "javascript:alert(1)", "ws://{secret}/", "unix:/run/x.sock"),
        *("http:", "http:/", "http://", "http:///{secret}/", "http://:80/", "netdoc:///etc/passwd", "http+unix://x/"),
    ],
    "name or password": [
        *("http://user:word@{secret}/", "http://user@{secret}/", "http://@{secret}/", "http://:@{secret}/"),
        *("http://{front}@{secret}/", "http://{secret}@{front}/", "http://a@b@{secret}/", "http://{front}%40@{secret}/"),
        "https://user:word@{secret}/",
    ],
    NOT_REACHED: [
        *("http://{secret}/", "http://{secret}", "HTTP://{secret}/", "http://{secret}?x", "http://{secret}#@{front}/"),
        *("http://{secret}/#{front}", "http://{secret}?@{front}/", "http://{secret}/@{front}/", "https://{secret}/"),
        *("http://[::1]:{port}/", "http://[::1]:{port}#@{front}/", "http://[::1", "http://::1]/", "http://[/", "http://]/"),
        *("http://[127.0.0.2]:{port}/", "http://[v1.x]/", "http://[]/"),
    ],
    r"have to be written|is not valid|private network|is not known|name or password|port 0|begin with http": [
        *("http://127.0.0.2:{port}\t/", "http://127.0.0.2\n:{port}/", "http://127.0.0.2:{port}/ x", " http://{secret}/"),
        *("http://{front}/\r\nHost: x", "http://127.0.0.2\x00.example/"),
        *("http://\uff11\uff12\uff17.0.0.2/", "http://127\u30020\u30020\u30022/"),
        *("http://\u24dbocalhost/", "http://{front}\\@{secret}/", "http://{secret}\\.{front}/", "http://127.0.0.2:0/"),
        *("http://127.0.0.2:65536/", "http://127.0.0.2:-1/", "http://127.0.0.2:x/", "http://127.0.0.2:{port}x/"),
        *("http://127.0.0.2:\uff18\uff10/", "http://127.0.0.2%00/", "http://%31%32%37.0.0.2/", "http://127.0.0.2%2f/"),
        *("http://[::ffff:127.0.0.2]:{port}@/x", "http://..../", "http://./", "http://-/", "http://" + "a" * 300 + "/"),
        "http://" + "a." * 200 + "/",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("says", "url"), [(says, url) for says, urls in WRONG_URLS.items() for url in urls])
@pytest.mark.parametrize("redirected", [False, True], ids=["asked", "redirected"])
def test_what_is_no_address_of_a_picture(says: str, url: str, redirected: bool, sites: Sites) -> None:
    names = {"{secret}": f"{SECRET}:{sites.port}", "{front}": f"{FRONT}:{sites.port}", "{port}": str(sites.port)}
    for name, value in names.items():
        url = url.replace(name, value)
    if redirected and ({"\r", "\n", "\x00"} & set(url) or url.startswith(" ")):
        pytest.skip("no header can hold it")
    if redirected and (not url.isascii() or url[:8] in ("http:", "http:/", "http://", "http:///")):
        says = r".*"  # a header has other characters, and these mean the page itself there: nothing may come of it
    refused(sites.redirect(url) if redirected else url, sites, says)


@pytest.mark.parametrize(
    ("path", "says"), [("/missing", "status 404"), ("/large", "more than"), ("/to/0", "redirects more than")]
)
def test_what_can_not_be_fetched(path: str, says: str, sites: Sites) -> None:
    sites.redirect("/to/0")
    refused(sites.url + path, sites, says)


@pytest.mark.parametrize("target", [None, ""])
def test_a_redirect_to_nowhere(target: str | None, sites: Sites) -> None:
    refused(sites.redirect(target), sites, "redirects more than")


# Names


class Names(socketserver.UDPServer):
    """A name server. A name has a list of answers, one for each question; the last one stays."""

    def __init__(self) -> None:
        super().__init__((FRONT, 0), _Answer)
        self.known: dict[str, list[list[str]]] = {}
        self.asked: list[str] = []

    def lookup(self, host: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
        """What ``socket.getaddrinfo`` does, of this server, for both families in one question (type ANY)."""
        query = struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0)
        query += b"".join(bytes([len(part)]) + part.encode() for part in host.split(".")) + struct.pack(
            ">BHH", 0, 255, 1
        )
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(5)
            asking.sendto(query, self.server_address)
            data = asking.recv(4096)
        assert data.startswith(query[:2])
        found, at = [], len(query)
        for _ in range(struct.unpack(">H", data[6:8])[0]):
            size = struct.unpack(">H", data[at + 10 : at + 12])[0]
            address = str(ipaddress.ip_address(data[at + 12 : at + 12 + size]))
            family = socket.AF_INET6 if size == 16 else socket.AF_INET
            found.append((family, socket.SOCK_STREAM, 6, "", (address, port)))
            at += 12 + size
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return found


class _Answer(socketserver.BaseRequestHandler):
    server: Names

    def handle(self) -> None:
        data, asking = self.request
        parts, at = [], 12
        while data[at]:
            parts.append(data[at + 1 : at + 1 + data[at]].decode())
            at += 1 + data[at]
        name = ".".join(parts)
        self.server.asked.append(name)
        answers = self.server.known.get(name, [[]])
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        reply = data[:2] + struct.pack(">HHHHH", 0x8180, 1, len(addresses), 0, 0) + data[12 : at + 5]
        for text in addresses:
            packed = ipaddress.ip_address(text).packed
            kind = 28 if len(packed) == 16 else 1
            reply += struct.pack(">HHHIH", 0xC00C, kind, 1, 0, len(packed)) + packed
        asking.sendto(reply, self.client_address)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    """The names below ``.test`` are those of a local name server, as if the system were set up to ask it."""
    resolver, system = Names(), socket.getaddrinfo
    threading.Thread(target=resolver.serve_forever, args=(0.02,), daemon=True).start()

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        return resolver.lookup(host, port) if str(host).endswith(".test") else system(host, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield resolver
    resolver.shutdown()
    resolver.server_close()


def test_a_name_is_asked_for_once_and_the_address_that_was_checked_is_the_one_that_is_asked(
    names: Names, sites: Sites
) -> None:
    """DNS rebinding: a name with a good address for the check and another one for the connection."""
    names.known["photos.test"] = [[FRONT], [SECRET]]
    assert fetch_now(f"http://photos.test:{sites.port}/picture", front_or_public) == b"picture"
    assert names.asked == ["photos.test"]
    assert sites.visits == [FRONT]
    assert sites.hosts == [f"photos.test:{sites.port}"]
    refused(f"http://photos.test:{sites.port}/picture", sites, "private network")


def test_a_name_that_changes_between_two_requests_is_checked_again(names: Names, sites: Sites) -> None:
    names.known["photos.test"] = [[FRONT], [SECRET]]
    target = sites.redirect(f"http://photos.test:{sites.port}/")
    refused(target.replace(FRONT, "photos.test"), sites, "private network")
    assert names.asked == ["photos.test"] * 2
    assert sites.visits == [FRONT]


@pytest.mark.parametrize(
    "addresses",
    [
        *([SECRET], [SECRET_6], ["::ffff:127.0.0.2"], ["64:ff9b::7f00:2"], ["2002:7f00:2::"], ["fe80::1"], ["fec0::1"]),
        *([FRONT, SECRET], [SECRET, FRONT], [FRONT, SECRET_6], [FRONT, "1.1.1.1", "169.254.169.254"], ["0.0.0.0"]),
    ],
    ids=",".join,
)
def test_every_address_of_a_name_has_to_be_allowed(addresses: list[str], names: Names, sites: Sites) -> None:
    names.known["photos.test"] = [addresses]
    refused(f"http://photos.test:{sites.port}/picture", sites, "private network")
    refused(sites.redirect(f"http://photos.test:{sites.port}/picture"), sites, "private network")


def test_an_address_that_does_not_answer_gives_way_to_the_next(names: Names, sites: Sites) -> None:
    silent = "127.0.0.9"
    names.known["photos.test"] = [[silent, FRONT]]
    names.known["gone.test"] = [[silent, silent]]

    def allowed(address: str) -> bool:
        return address in (silent, FRONT)

    assert fetch_now(f"http://photos.test:{sites.port}/picture", allowed) == b"picture"
    refused(f"http://gone.test:{sites.port}/picture", sites, "can't be reached: ConnectionRefusedError", allowed)


def test_a_name_without_an_address(names: Names, sites: Sites) -> None:
    refused(f"http://nothing.test:{sites.port}/picture", sites, "is not known")


# The server


def test_private_addresses_are_refused_under_any_name(
    serve: Callable[..., Server], tiny_bundle: Path, sites: Sites
) -> None:
    server = serve("--model", tiny_bundle, "--threads", 1, "--parallel", 1, "--allow-image-urls")
    places = [*("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "[::1]", "0")]
    for url in (*(f"http://{host}:{sites.port}/picture" for host in places), "file:///etc/passwd"):
        part = {"type": "image_url", "image_url": {"url": url}}
        with pytest.raises(openai.BadRequestError, match=r"private network|is not known|data URI|http"):
            server.client().chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": [part]}],  # type: ignore[list-item]
                max_tokens=1,
            )
    assert sites.visits == []
