"""The HTTP client against real servers that are odd: every byte on the wire is the test's, on both event loops."""

import asyncio
import base64
import contextlib
import os
import resource
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import aiohttp.http_parser
import pytest
import uvloop
import yarl
from aiohttp.http_exceptions import LineTooLong
from aiohttp.http_parser import HttpRequestParser, HttpResponseParser
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from conftest import PATIENCE, Server, StartDaemon, ask, deaf, namespaces, with_descriptors

import faasd_async
from faasd_async import (
    AddressInfo,
    CheckedResolver,
    FailureKind,
    Header,
    HttpClient,
    HttpError,
    HttpResponse,
    Limit,
    PeerConnection,
    RequestFailed,
    Shortage,
    TimeLimit,
    bypasses_proxy,
    client_context,
    pack_headers,
    parse_config,
    proxies_of,
)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Scenario = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Scenario:
    """Runs a scenario on an event loop of its own, of either kind; nothing may go wrong behind its back."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def scenario(work: Coroutine[Any, Any, None]) -> None:
        told: list[Any] = []
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.get_loop().set_exception_handler(lambda loop, context: told.append(context))
            runner.run(asyncio.wait_for(work, PATIENCE))
        assert told == []

    return scenario


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections are used again at once: nobody has to show first that they last."""
    monkeypatch.setattr(faasd_async, "PROOF_S", 0.0)


class Connection:
    """The peer's end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.loop = asyncio.get_running_loop()
        self.received = b""

    async def read(self, size: int = 2**16) -> bytes:
        """What comes next; nothing: the client has closed it."""
        with contextlib.suppress(ConnectionError):
            return await self.loop.sock_recv(self.sock, size)
        return b""

    async def request(self) -> bytes:
        """A request without a streamed body, as it was sent."""
        while b"\r\n\r\n" not in self.received:
            data = await self.read()
            assert data, self.received
            self.received += data
        head, _, rest = self.received.partition(b"\r\n\r\n")
        length = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")]
        while len(rest) < sum(length):
            rest += await self.read()
        self.received = rest[sum(length) :]
        return head + b"\r\n\r\n" + rest[: sum(length)]

    async def send(self, data: bytes) -> None:
        """Send a piece of an answer."""
        await self.loop.sock_sendall(self.sock, data)

    async def answer(self, data: bytes) -> bytes:
        """Read a request and answer it."""
        request = await self.request()
        await self.send(data)
        return request

    async def ended(self) -> None:
        """Wait until the client has closed it."""
        while await self.read():
            pass

    def close(self, reset: bool = False) -> None:
        """Close it, with a FIN or with a RST."""
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class Peer:
    """A listening socket, and a client of its own."""

    def __init__(self, address: str = "127.0.0.1", **options: Any) -> None:
        self.listener = socket.create_server((address, 0))
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        self.url = yarl.URL(f"http://{address}:{self.port}")
        self.client = HttpClient(**options)
        self.connections: list[Connection] = []

    async def __aenter__(self) -> "Peer":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.client.close()
        for connection in self.connections:
            connection.close()
        self.listener.close()

    async def accept(self) -> Connection:
        """The next connection."""
        sock, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        sock.setblocking(False)
        self.connections.append(Connection(sock))
        return self.connections[-1]

    def ask(self, method: str = "POST", body: Any = b"x", headers: Iterable[Header] = (), **more: Any) -> Any:
        """A task that sends a request; its result is status and body."""
        return asyncio.ensure_future(fetch(self.client, method, self.url, body, headers, **more))


async def fetch(
    client: HttpClient, method: str, url: yarl.URL, body: Any = b"", headers: Iterable[Header] = (), **more: Any
) -> tuple[int, bytes]:
    """Status and body of an answer."""
    async with await client.request(method, url, pack_headers(headers), body, **more) as response:
        return response.status, (await response.read(2**20, whole=True))[0]


async def failure(work: Any) -> tuple[FailureKind, str]:
    """Why a request failed."""
    with pytest.raises(RequestFailed) as caught:
        await work
    return caught.value.kind, caught.value.text


# ---- what is sent --------------------------------------------------------------------------------

HEAD = b"HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n"
SENT: dict[str, tuple[str, str, list[Header], bytes, dict[str, Any], bytes]] = {
    "POST": (
        "POST",
        "/a//b/../c?d=%20&e",
        [],
        b"xy",
        {},
        b"POST /a//b/../c?d=%20&e " + HEAD + b"Content-Length: 2\r\n",
    ),
    "GET": ("GET", "/", [(b"X-A", b"1"), (b"x-a", b"2")], b"", {}, b"GET / " + HEAD + b"X-A: 1\r\nx-a: 2\r\n"),
    "DELETE": ("DELETE", "", [], b"", {}, b"DELETE / " + HEAD + b"Content-Length: 0\r\n"),
    "empty query": ("GET", "/?", [], b"", {}, b"GET /? " + HEAD),
    "bytes": ("GET", "/\udcff?\udcfe", [(b"X", b"\xe4")], b"", {}, b"GET /\xff?\xfe " + HEAD + b"X: \xe4\r\n"),
    "injection": ("GET", "/", [(b"X", b"a\r\nY: b\0\tc")], b"", {}, b"GET / " + HEAD + b"X: a  Y: b \tc\r\n"),
    "framing": ("POST", "/", [(b"content-length", b"9")], b"x", {}, b"POST / " + HEAD + b"Content-Length: 1\r\n"),
    "no reuse": ("GET", "/", [], b"", {"keepalive": False}, b"GET / " + HEAD + b"Connection: close\r\n"),
}


@pytest.mark.parametrize("name", SENT)
def test_a_request_is_sent_as_it_is(run: Scenario, name: str) -> None:
    """Target, headers and body byte for byte, nothing added but Host and what frames the body."""
    method, target, headers, body, options, expected = SENT[name]

    async def scenario() -> None:
        async with Peer() as peer:
            request = peer.client.request(method, peer.url, pack_headers(headers), body, target=target, **options)
            asking = asyncio.ensure_future(request)
            connection = await peer.accept()
            head = expected.replace(b"PORT", b"%d" % peer.port)
            assert await connection.answer(OK) == head + b"\r\n" + body
            async with await asking as response:
                assert response.status == 200

    run(scenario())


@pytest.mark.parametrize(
    ("written", "meant"),
    [("us%2565r:p:w", b"us%65r:p:w"), ("user", b"user:"), (":token", b":token"), ("%C3%A9:%FF", b"\xc3\xa9:\xff")],
)
def test_the_credentials_of_a_url_win(run: Scenario, written: str, meant: bytes) -> None:
    """They are sent as basic authentication, in place of what the caller has sent."""

    async def scenario() -> None:
        async with Peer() as peer:
            peer.url = yarl.URL(f"http://{written}@127.0.0.1:{peer.port}", encoded=True)
            asking = peer.ask("GET", b"", [(b"authorization", b"Bearer x")])
            request = await (await peer.accept()).answer(OK)
            assert await asking == (200, b"ok")
            sent = [line for line in request.split(b"\r\n") if line.lower().startswith(b"authorization")]
            assert sent == [b"Authorization: Basic " + base64.b64encode(meant)]

    run(scenario())


async def pieces(*parts: bytes | Exception) -> AsyncIterator[bytes]:
    """A body that comes in pieces, and may fail."""
    for part in parts:
        if isinstance(part, Exception):
            raise part
        yield part


@pytest.mark.parametrize("length", [None, b"5"])
def test_a_body_is_streamed(run: Scenario, length: bytes | None) -> None:
    """In chunks, or in the length that the headers say."""

    async def scenario() -> None:
        async with Peer() as peer:
            headers = [(b"Content-Length", length)] if length else []
            asking = peer.ask(body=pieces(b"ab", b"", b"cde"), headers=headers)
            connection = await peer.accept()
            expected = b"\r\n\r\nabcde" if length else b"\r\n\r\n2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n"
            received = b""
            while expected not in received:
                received += await connection.read()
            assert (b"Transfer-Encoding: chunked" in received) == (length is None)
            await connection.send(OK)
            assert await asking == (200, b"ok")

    run(scenario())


def test_a_body_is_sent_at_the_pace_of_the_peer(run: Scenario) -> None:
    """What it does not take is not fetched."""
    fetched = 0

    async def flood() -> AsyncIterator[bytes]:
        nonlocal fetched
        while fetched < 100:
            fetched += 1
            yield bytes(2**20)

    async def scenario() -> None:
        async with Peer() as peer:
            asking = peer.ask(body=flood())
            connection = await peer.accept()
            received = len(await connection.read())
            before = -1
            while before != fetched:  # until it stands still
                before = fetched
                await asyncio.sleep(0.1)
            assert fetched < 50
            while received < 100 * 2**20:
                received += len(await connection.read(2**22))
            await connection.send(OK)
            assert await asking == (200, b"ok")

    run(scenario())


def test_an_answer_is_taken_at_the_pace_of_the_reader(run: Scenario) -> None:
    """What nobody reads stays with the peer; nothing is lost on the way."""
    size = 64 * 2**20

    async def scenario() -> None:
        async with Peer() as peer:
            asking = asyncio.ensure_future(peer.client.request("GET", peer.url, b"", b""))
            connection = await peer.accept()
            await connection.answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            response: HttpResponse = await asking
            sent = 0
            blocked = 0
            while blocked < 20:  # until it stands still
                try:
                    sent += connection.sock.send(bytes(2**20))
                    blocked = 0
                except BlockingIOError:
                    blocked += 1
                    await asyncio.sleep(0.01)
            assert sent < size / 2
            rest = asyncio.ensure_future(connection.send(bytes(size - sent)))
            async with response:
                assert (await response.read(10, whole=False)) == (bytes(10), size)
            await rest

    run(scenario())


def test_what_the_body_raises_ends_the_request(run: Scenario) -> None:
    """It reaches the caller, and the peer sees that the request is not whole."""

    async def scenario() -> None:
        async with Peer() as peer:
            asking = peer.ask(body=pieces(b"half", HttpError(408, "no body")))
            connection = await peer.accept()
            with pytest.raises(HttpError) as caught:
                await asking
            assert caught.value.status == 408
            received = b""
            while data := await connection.read():
                received += data
            assert not received.endswith(b"0\r\n\r\n")

    run(scenario())


# ---- what comes back -----------------------------------------------------------------------------

ANSWERS: dict[str, tuple[str, bytes, int, bytes]] = {
    "with a length": ("POST", OK, 200, b"ok"),
    "in chunks": (
        "POST",
        b"HTTP/1.1 201 X\r\nTransfer-Encoding: chunked\r\n\r\n1;a=b\r\no\r\n1\r\nk\r\n0\r\n\r\n",
        201,
        b"ok",
    ),
    "with trailers": (
        "POST",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n2\r\nok\r\n0\r\nX: y\r\n\r\n",
        200,
        b"ok",
    ),
    "after interim answers": (
        "POST",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 E\r\nLink: x\r\n\r\n" + OK,
        200,
        b"ok",
    ),
    "without a reason": ("POST", b"HTTP/1.1 404\r\nContent-Length: 0\r\n\r\n", 404, b""),
    "with bare line feeds": ("POST", b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", 200, b"ok"),
    "with a body of blank lines": ("POST", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\r\n\r\n", 200, b"\r\n\r\n"),
    "to HEAD": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 200, b""),
    "204 with a length": ("POST", b"HTTP/1.1 204 No\r\nContent-Length: 0\r\n\r\n", 204, b""),
    "304 with a length": ("GET", b"HTTP/1.1 304 Not\r\nContent-Length: 5\r\n\r\n", 304, b""),
    "in HTTP/1.0, kept": (
        "POST",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
        200,
        b"ok",
    ),
    "compressed": ("GET", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nok", 200, b"ok"),
}
LAST_ANSWERS: dict[str, tuple[bytes, int, bytes]] = {  # after these the connection is closed
    "until the end": (b"HTTP/1.1 200 OK\r\n\r\nok", 200, b"ok"),
    "in HTTP/1.0": (b"HTTP/1.0 200 OK\r\n\r\nok", 200, b"ok"),
    "with Connection: close": (b"HTTP/1.1 500 No\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", 500, b"ok"),
    # What follows is wrong, but the answer is there.
    "with something behind it": (OK + b"more", 200, b"ok"),
    "with bare line feeds and more": (b"HTTP/1.1 200 OK\nContent-Length: 3\n\n\r\n\r\nabc", 200, b"\r\n\r"),
    "with another behind it": (b"HTTP/1.1 100 Go\r\n\r\n" + OK + b"HTTP/1.1 5", 200, b"ok"),
    "204 with a body": (b"HTTP/1.1 204 No\r\nContent-Length: 2\r\n\r\nok", 204, b""),
    "with its length twice": (
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nX: 1\r\nContent-Length:2\r\n\r\nok",
        200,
        b"ok",
    ),
    "with its length twice, after an interim answer": (
        b"HTTP/1.1 103 E\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
        200,
        b"ok",
    ),
    "with a body that looks like that": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 38\r\n\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n.",
        200,
        b"Content-Length: 2\r\nContent-Length: 2\r\n",
    ),
    "with its length in a list, and other ends of lines": (
        b"HTTP/1.1 200 OK\nX: y\r\nContent-Length: 2, 2\n\nokContent-Length: 2\r\n\r\n",
        200,
        b"ok",
    ),
    "with its length in a list": (b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok", 200, b"ok"),
    "with a length before chunks": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        200,
        b"ok",
    ),
    "with lengths around chunks": (
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: Chunked\r\nContent-Length: 3\r\n\r\n"
        b"2\r\nok\r\n0\r\n\r\n",
        200,
        b"ok",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "byte by byte"])
def test_an_answer_is_understood(run: Scenario, name: str, split: bool) -> None:
    """Whatever its form, however it is cut; the connection is free for the next request, which gets its own."""
    method, data, status, body = ANSWERS[name]

    async def scenario() -> None:
        async with Peer() as peer:
            asking = peer.ask(method, b"")
            connection = await peer.accept()
            await connection.request()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in [data[at : at + 1] for at in range(len(data))] if split else [data]:
                await connection.send(piece)
                await asyncio.sleep(0)
            assert await asking == (status, body)

    run(scenario())


@pytest.mark.parametrize("name", LAST_ANSWERS)
def test_an_answer_that_ends_with_its_connection_is_understood(run: Scenario, name: str) -> None:
    """And the connection is not used again."""
    data, status, body = LAST_ANSWERS[name]

    async def scenario() -> None:
        async with Peer() as peer:
            asking = peer.ask()
            connection = await peer.accept()
            await connection.answer(data)
            if b"Length" not in data:
                connection.close()
            assert await asking == (status, body)
            if b"Length" in data:
                await connection.ended()

    run(scenario())


@pytest.mark.parametrize("first", ["", "HTTP/1.1 103 E\r\nLink: x\r\n\r\n"], ids=["at once", "after an interim one"])
@pytest.mark.parametrize(
    ("lengths", "body"),
    [
        ("content-length:2\r\nX: y\r\nContent-Length: 2", "ok"),
        ("Content-Length: 2, 2", "ok"),
        ("Content-Length: 2\r\nTransfer-Encoding: chunked", "2\r\nok\r\n0\r\n\r\n"),
        ("Transfer-Encoding: chunked\r\nContent-Length: 2", "2\r\nok\r\n0\r\n\r\n"),
    ],
    ids=["again", "in a list", "before chunks", "after chunks"],
)
def test_a_length_may_be_told_twice_in_any_pieces(run: Scenario, first: str, lengths: str, body: str) -> None:
    """Wherever the first of two ends, and byte by byte (RFC 9110 8.6, RFC 9112 6.3)."""
    data = f"{first}HTTP/1.1 200 OK\r\n{lengths}\r\nZ: z\r\n\r\n{body}".encode()
    cuts = [[data[:end], data[end:]] for end in range(1, len(data), 5)]

    async def scenario() -> None:
        async with Peer() as peer:
            for pieces in (*cuts, [bytes([byte]) for byte in data]):
                asking = peer.ask(keepalive=False)
                connection = await peer.accept()
                await connection.request()
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for piece in pieces:
                    await connection.send(piece)
                    await asyncio.sleep(0.001)
                assert await asking == (200, b"ok")

    run(scenario())


def test_an_answer_may_come_before_the_request_is_whole(run: Scenario) -> None:
    """A peer that refuses a body need not read it; who called has the answer, and the connection is closed."""
    endless = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"the beginning"
        await endless.wait()

    async def scenario() -> None:
        async with Peer() as peer:
            asking = peer.ask(body=body())
            connection = await peer.accept()
            while b"the beginning" not in connection.received:
                connection.received += await connection.read()
            await connection.send(b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno")
            assert await asking == (413, b"no")
            await connection.ended()

    run(scenario())


def test_an_answer_wins_over_the_reset_that_follows_it(run: Scenario) -> None:
    """Who refuses a body may close without having read it: who still sends that finds a broken connection."""

    async def scenario() -> None:
        async with Peer() as peer:
            accepting = asyncio.ensure_future(peer.accept())

            async def body() -> AsyncIterator[bytes]:
                yield b"the beginning"
                connection = await accepting
                await connection.loop.sock_recv(connection.sock, 1)
                # From here on the client's side does nothing until it sends.
                connection.sock.send(b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno")
                connection.close()
                yield b"x" * 2**20

            assert await peer.ask(body=body()) == (413, b"no")

    run(scenario())


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BROKEN = (FailureKind.BROKEN, "broke off the connection")
LONG_HEADER = (FailureKind.INVALID, "answered with a header longer than 32768 bytes")
LONG_HEAD = (FailureKind.INVALID, "answered with headers longer than 131072 bytes")


def no_http(reason: str) -> tuple[FailureKind, str]:
    """What is told of an answer that the parser refuses for a reason."""
    return FailureKind.INVALID, f"did not answer in valid HTTP: {reason}"


BAD: dict[str, tuple[bytes, tuple[FailureKind, str]]] = {
    "nothing": (b"", BROKEN),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-", BROKEN),
    "half a body": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", BROKEN),
    "half a chunk": (CHUNKED + b"9\r\nhalf", BROKEN),
    "no last chunk": (CHUNKED + b"2\r\nok\r\n", BROKEN),
    "only interim answers": (b"HTTP/1.1 100 Continue\r\n\r\n", BROKEN),
    "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n", no_http("Expected HTTP/, RTSP/ or ICE/")),
    "a bad chunk": (CHUNKED + b"zz\r\n", no_http("Invalid character in chunk size")),
    "no header": (b"HTTP/1.1 200 OK\r\nX y\r\n\r\n", no_http("Invalid header token")),
    "two lengths": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 5\r\n\r\n",
        no_http("Duplicate Content-Length"),
    ),
    "a long header": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**16, LONG_HEADER),
    "many headers": (
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000,
        (FailureKind.INVALID, "answered with more than 128 headers"),
    ),
    "a long head": (b"HTTP/1.1 200 OK\r\n" + (b"X: " + b"x" * 30_000 + b"\r\n") * 20, LONG_HEAD),
    "interim answers without end": (b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, LONG_HEAD),
    "another protocol from here on": (
        b"HTTP/1.1 101 Yes\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        (FailureKind.INVALID, "answered 101, which is no answer"),
    ),
    "an alert of TLS": (
        b"\x15\x03\x01\x00\x02\x02\x46",
        (FailureKind.INVALID, "speaks TLS: its URL begins with https://"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_answer_is_told(run: Scenario, name: str) -> None:
    """Each has its reason, and the connection is closed."""
    data, expected = BAD[name]

    async def scenario() -> None:
        async with Peer() as peer:
            asking = peer.ask()
            connection = await peer.accept()
            await connection.request()
            with contextlib.suppress(ConnectionError):
                await connection.send(data)
            if expected == BROKEN:
                connection.close()
            assert await failure(asking) == expected
            if expected != BROKEN:
                await connection.ended()

    run(scenario())


def test_a_reset_is_told(run: Scenario) -> None:
    """It is not the same as a connection that was closed; nor is it the end of an answer without length."""

    async def scenario() -> None:
        async with Peer() as peer:
            asking = peer.ask()
            connection = await peer.accept()
            await connection.request()
            connection.close(reset=True)
            assert await failure(asking) == (FailureKind.BROKEN, "reset the connection")
            request = asyncio.ensure_future(peer.client.request("GET", peer.url, b"", b""))
            connection = await peer.accept()
            await connection.answer(b"HTTP/1.1 200 OK\r\n\r\nhalf")
            async with await request as response:
                assert await response.read_chunk() == b"half"
                connection.close(reset=True)
                assert await failure(response.read_chunk()) == (FailureKind.BROKEN, "reset the connection")

    run(scenario())


def test_an_answer_that_cannot_be_held_is_given_up_at_once(run: Scenario) -> None:
    """However much of it is still to come."""

    async def scenario() -> None:
        async with Peer() as peer:
            asking = peer.ask()
            connection = await peer.accept()
            await connection.answer(b"HTTP/1.1 200 OK\r\n\r\n")
            sending = asyncio.ensure_future(connection.send(bytes(2**21)))
            assert await failure(asking) == (FailureKind.TOO_LONG, f"answered more than {2**20} bytes")
            await asyncio.wait({sending})
            sending.exception()

    run(scenario())


def test_an_answer_that_is_told_to_be_too_long_is_not_waited_for(run: Scenario) -> None:
    """It may come slowly, or break off: it would be asked for again."""

    async def scenario() -> None:
        async with Peer() as peer:
            asking = peer.ask()
            connection = await peer.accept()
            await connection.answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nx" % (2**20 + 1))
            assert await failure(asking) == (FailureKind.TOO_LONG, f"answered more than {2**20} bytes")
            await connection.ended()

    run(scenario())


def test_the_rest_of_an_answer_is_waited_for_only_briefly(run: Scenario, trusting: None) -> None:
    """Where the status line decides: a short rest frees the connection, an endless one costs it."""

    async def scenario() -> None:
        async with Peer() as peer:

            async def deliver() -> int:
                async with await peer.client.request("POST", peer.url, b"", b"x") as response:
                    await response.discard()
                    return response.status

            delivering = asyncio.ensure_future(deliver())
            connection = await peer.accept()
            await connection.answer(OK[:-2])
            await connection.send(OK[-2:])
            assert await delivering == 200
            delivering = asyncio.ensure_future(deliver())
            await connection.answer(OK[:-1])
            assert await delivering == 200
            await connection.ended()

    run(scenario())


# ---- connections that are kept -------------------------------------------------------------------


async def first(peer: Peer, data: bytes = OK) -> Connection:
    """A connection that has been used once."""
    asking = peer.ask()
    connection = await peer.accept()
    await connection.answer(data)
    await asking
    return connection


async def again(peer: Peer, connection: Connection) -> None:
    """It carries one more request, and its answer."""
    asking = peer.ask()
    await connection.answer(OK)
    assert await asking == (200, b"ok")


async def tried(peer: Peer) -> tuple[Connection, Any]:
    """A connection that carries a second request after a while, and the task that waits for its answer."""
    connection = await first(peer)
    let_time_pass(peer)
    asking = peer.ask()
    await connection.request()
    return connection, asking


def test_a_connection_is_used_again(run: Scenario, trusting: None) -> None:
    """Ten requests, one connection."""

    async def scenario() -> None:
        async with Peer() as peer:
            connection = await first(peer)
            for method in ("HEAD", "GET", "HEAD", "POST"):
                asking = peer.ask(method, b"")
                await connection.answer(OK[:-2] if method == "HEAD" else OK)
                assert await asking == (200, b"" if method == "HEAD" else b"ok")
            assert len(peer.connections) == 1

    run(scenario())


def test_each_answer_has_its_own_body(run: Scenario, trusting: None) -> None:
    """Also where its head came before: in one piece with that, behind it, or of another length."""
    head, longer = OK[:-2], OK[:-2].replace(b"Length: 2", b"Length: 3")
    answers = [
        (head, b"ab"),
        (head, b"\n\r"),
        (longer, b"abc"),
        (head, b"cd"),
        (b"\r\n\r\n" + head, b"ef"),
        (head, b"gh"),
    ]

    async def scenario() -> None:
        async with Peer() as peer:
            connection = await first(peer)
            for start, body in answers:
                for cut in (len(start), len(start) + 1, len(start + body)):
                    asking = peer.ask()
                    await connection.answer((start + body)[:cut])
                    await asyncio.sleep(0.001)
                    await connection.send((start + body)[cut:])
                    assert await asking == (200, body)
            assert len(peer.connections) == 1

    run(scenario())


def test_a_streamed_body_leaves_no_connection_behind(run: Scenario, trusting: None) -> None:
    """It takes a new one, since it can't be sent again: that is told to be the only request there, and closed."""

    async def scenario() -> None:
        async with Peer() as peer:
            headers = [(b"Content-Length", b"1")]
            for body in (b"x", pieces(b"y"), pieces(b"z"), b"x"):
                asking = peer.ask(body=body, headers=headers)
                if body == b"x" and peer.connections:
                    connection = peer.connections[0]
                else:
                    connection = await peer.accept()
                request = await connection.answer(OK)
                assert await asking == (200, b"ok")
                assert (b"\r\nConnection: close\r\n" in request) == (body != b"x")
                if body != b"x":
                    await connection.ended()

    run(scenario())


def test_a_peer_has_to_show_that_it_keeps_connections(run: Scenario) -> None:
    """Until one of them has lasted for a while, each request has its own: small servers close without saying so."""

    async def scenario() -> None:
        async with Peer() as peer:
            connections = [await first(peer) for _ in range(3)]
            await connections[2].ended()  # two are enough to find out
            let_time_pass(peer)
            for _ in range(3):
                await again(peer, connections[0])
            assert len(peer.connections) == 3

    run(scenario())


def let_time_pass(peer: Peer) -> None:
    """As if all connections that are idle had been so for long enough to be tried."""
    (met,) = peer.client._pool._peers.values()
    for connection in met.idle:
        connection.idle_since -= faasd_async.PROOF_S


def test_one_connection_is_tried_at_a_time(run: Scenario) -> None:
    """Whoever would be next has a connection of its own, until there is an answer on that one."""

    async def scenario() -> None:
        async with Peer() as peer:
            connections = [await first(peer) for _ in range(2)]
            let_time_pass(peer)
            trying = peer.ask()
            await connections[0].request()
            await first(peer)
            await connections[0].send(OK)
            assert await trying == (200, b"ok")
            assert len(peer.connections) == 3

    run(scenario())


@pytest.mark.parametrize("gives_up", [False, True])
def test_a_peer_that_closes_all_the_same_has_to_show_it_anew(run: Scenario, gives_up: bool) -> None:
    """After an answer, or while a second request waits for one: a connection has to last for longer now."""

    async def scenario() -> None:
        async with Peer() as peer:
            connection, asking = await tried(peer)
            if gives_up:
                asking.cancel()
                await connection.ended()
            else:
                connection.close()
                assert await failure(asking) == BROKEN
            await first(peer)
            let_time_pass(peer)
            await first(peer)
            assert len(peer.connections) == 3

    run(scenario())


@pytest.mark.parametrize("idle", [False, True], ids=["with the next request", "while it is idle"])
def test_a_number_of_answers_after_which_a_peer_closes_is_learned(run: Scenario, idle: bool) -> None:
    """One connection tells it: others are used so often at once, and no more."""

    async def scenario() -> None:
        async with Peer() as peer:
            connection = await first(peer)
            let_time_pass(peer)
            for _ in range(2):
                await again(peer, connection)
            if idle:
                connection.close()
            else:
                asking = peer.ask()
                await connection.request()
                connection.close()
                assert await failure(asking) == BROKEN
            for number in range(2, 6):
                connection = await first(peer)
                assert len(peer.connections) == number
                for _ in range(2):
                    await again(peer, connection)

    run(scenario())


def test_a_peer_that_was_started_anew_is_trusted_again(run: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as a connection has lasted beyond the answer after which one had ended."""
    monkeypatch.setattr(faasd_async, "PROOF_GROWTH", 1e-6)

    async def scenario() -> None:
        async with Peer() as peer:
            connection, asking = await tried(peer)
            connection.close(reset=True)
            assert await failure(asking) == (FailureKind.BROKEN, "reset the connection")
            connection = await first(peer)
            for _ in range(4):
                await again(peer, connection)
            assert len(peer.connections) == 2

    run(scenario())


NOT_AGAIN: dict[str, bytes] = {
    "that was to be closed": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    "of HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "with a second answer": OK + b"HTTP/1.1 408 Late\r\nContent-Length: 0\r\n\r\n",
    "with bytes that are none": OK + b"what",
}


@pytest.mark.parametrize("name", NOT_AGAIN)
def test_a_connection_is_not_used_again(run: Scenario, trusting: None, name: str) -> None:
    """Where the next answer could not come, or would be another's."""

    async def scenario() -> None:
        async with Peer() as peer:
            asking = peer.ask()
            connection = await peer.accept()
            await connection.answer(NOT_AGAIN[name])
            with contextlib.suppress(RequestFailed):  # of the bytes that are none
                assert await asking == (200, b"ok")
            await connection.ended()
            await first(peer)
            assert len(peer.connections) == 2

    run(scenario())


def test_a_function_may_have_a_connection_for_each_call(run: Scenario, trusting: None) -> None:
    """With `keepalive = false`."""

    async def scenario() -> None:
        async with Peer() as peer:
            for _ in range(3):
                asking = peer.ask(keepalive=False)
                connection = await peer.accept()
                assert b"\r\nConnection: close\r\n" in await connection.answer(OK)
                assert await asking == (200, b"ok")
                await connection.ended()

    run(scenario())


def test_an_idle_connection_is_closed_in_time(run: Scenario, trusting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the peer would do so."""

    async def scenario() -> None:
        async with Peer() as peer:
            await (await first(peer)).ended()
            assert [met.idle for met in peer.client._pool._peers.values()] == [deque()]

    monkeypatch.setattr(faasd_async, "POOL_IDLE_S", 0.1)
    run(scenario())


def test_what_comes_to_an_idle_connection_closes_it(run: Scenario, trusting: None) -> None:
    """Servers tell idle clients "408 Request Timeout"."""

    async def scenario() -> None:
        async with Peer() as peer:
            connection = await first(peer)
            await connection.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
            await connection.ended()
            await first(peer)
            assert len(peer.connections) == 2

    run(scenario())


def test_a_connection_that_the_peer_has_just_closed_is_not_used(run: Scenario, trusting: None) -> None:
    """The kernel knows before the event loop does."""

    async def scenario() -> None:
        async with Peer() as peer:
            connection = await first(peer)
            connection.close()
            second = await first(peer)
            assert len(peer.connections) == 2
            second.close(reset=True)
            await first(peer)
            assert len(peer.connections) == 3

    run(scenario())


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch, trusting: None) -> Callable[[Callable[[], None]], None]:
    """Has something happen once, after the client has looked at an idle connection and before it uses that."""
    todo: list[Callable[[], None]] = []
    take = faasd_async.Peer.take

    def take_late(idle_at: faasd_async.Peer) -> PeerConnection | None:
        connection = take(idle_at)
        if connection is not None and todo:
            todo.pop()()
        return connection

    monkeypatch.setattr(faasd_async.Peer, "take", take_late)
    return todo.append


Race = Callable[[Callable[[], None]], None]


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
def test_a_request_that_the_peer_cannot_have_seen_is_sent_again(run: Scenario, race: Race, reset: bool) -> None:
    """A POST too: the connection was closed before the peer's kernel had taken a byte of it."""

    async def scenario() -> None:
        async with Peer() as peer:
            connection = await first(peer)
            race(lambda: connection.close(reset))
            asking = peer.ask()
            assert (await (await peer.accept()).answer(OK)).endswith(b"\r\n\r\nx")
            assert await asking == (200, b"ok")

    run(scenario())


def test_a_request_that_met_a_farewell_is_sent_again(run: Scenario, race: Race) -> None:
    """A "408 Request Timeout" to the idle connection is no answer to it."""
    farewell = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

    async def scenario() -> None:
        async with Peer() as peer:
            connection = await first(peer)

            def leave() -> None:
                connection.sock.send(farewell)
                connection.close()

            race(leave)
            asking = peer.ask()
            await (await peer.accept()).answer(OK)
            assert await asking == (200, b"ok")

    run(scenario())


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_a_kept_connection_that_ends_with_the_next_request_is_no_success(
    run: Scenario, trusting: None, method: str, reset: bool
) -> None:
    """The peer may have done what was asked: only who called knows whether to ask again."""

    async def scenario() -> None:
        async with Peer() as peer:
            connection = await first(peer)
            asking = peer.ask(method)
            await connection.request()
            connection.close(reset)
            kind, _ = await failure(asking)
            assert kind is FailureKind.BROKEN
            assert len(peer.connections) == 1
            await first(peer)  # on a new one

    run(scenario())


def test_a_408_of_the_function_is_its_answer(run: Scenario, trusting: None) -> None:
    """It has read the request."""

    async def scenario() -> None:
        async with Peer() as peer:
            connection = await first(peer)
            asking = peer.ask()
            await connection.answer(b"HTTP/1.1 408 Late\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            assert await asking == (408, b"")

    run(scenario())


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_what_may_be_done_twice_is_sent_again(run: Scenario, trusting: None, method: str) -> None:
    """Once, by its method, where a connection that was used again ends without a byte of an answer."""

    async def scenario() -> None:
        async with Peer() as peer:
            connection = await first(peer)
            asking = peer.ask(method)
            await connection.request()
            connection.close()
            second = await peer.accept()
            await second.request()
            second.close()
            assert await failure(asking) == BROKEN

    run(scenario())


def test_an_answer_that_has_begun_is_not_asked_for_again(run: Scenario, trusting: None) -> None:
    """Whatever the method."""

    async def scenario() -> None:
        async with Peer() as peer:
            connection = await first(peer)
            asking = peer.ask("GET", b"")
            await connection.answer(b"HTTP/1.1 2")
            connection.close()
            assert await failure(asking) == BROKEN
            assert len(peer.connections) == 1

    run(scenario())


def test_a_streamed_body_gets_a_connection_that_nobody_has_closed(run: Scenario, trusting: None) -> None:
    """It could not be sent again."""

    async def scenario() -> None:
        async with Peer() as peer:
            await first(peer)
            asking = peer.ask(body=pieces(b"x"), headers=[(b"Content-Length", b"1")])
            await (await peer.accept()).answer(OK)
            assert await asking == (200, b"ok")

    run(scenario())


def test_a_request_that_is_cancelled_takes_its_connection_along(run: Scenario, trusting: None) -> None:
    """The peer sees that nobody waits any more."""

    async def scenario() -> None:
        async with Peer() as peer:
            connection = await first(peer)
            asking = peer.ask()
            await connection.request()
            asking.cancel()
            await connection.ended()
            await first(peer)

    run(scenario())


# ---- connections that are not made ---------------------------------------------------------------


def addresses(*ports: tuple[str, int]) -> CheckedResolver:
    """A name with these addresses."""
    infos: list[AddressInfo] = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in ports]

    class Resolver:
        async def resolve(self, host: str, port: int) -> list[AddressInfo]:
            return infos

    return cast(CheckedResolver, Resolver())


def test_a_name_that_has_moved_is_noticed_however_often_it_is_called(run: Scenario, trusting: None) -> None:
    """A connection that is never idle would be kept for as long as the old server lives."""

    async def scenario() -> None:
        async with Peer() as old, Peer() as new:
            old.client = HttpClient(resolver=addresses(("127.0.0.1", old.port)))
            old.url = yarl.URL("http://moved.example")
            connection = await first(old)
            await again(old, connection)
            old.client._resolver = addresses(("127.0.0.1", new.port))
            (met,) = old.client._pool._peers.values()
            met.idle[0].opened_at -= faasd_async.POOL_AGE_S
            await again(old, connection)
            await connection.ended()
            asking = old.ask()
            await (await new.accept()).answer(OK)
            assert await asking == (200, b"ok")

    run(scenario())


def test_a_refusal_is_told(run: Scenario, refused: str) -> None:
    """In the system's words."""

    async def scenario() -> None:
        client = HttpClient()
        expected = (FailureKind.UNREACHABLE, "can't be reached: Connection refused")
        assert await failure(fetch(client, "GET", yarl.URL(refused))) == expected
        await client.close()

    run(scenario())


@pytest.mark.parametrize("host", ["no-such-name.invalid", "300.1.2.3", "1.2.3.4.5"])
def test_a_name_without_an_address_is_told(run: Scenario, host: str) -> None:
    """And so is what looks like an address and is none."""

    async def scenario() -> None:
        client = HttpClient()
        kind, text = await failure(fetch(client, "GET", yarl.URL(f"http://{host}/", encoded=True)))
        assert kind is FailureKind.UNREACHABLE
        assert text.startswith(f"can't be reached: {host}")
        assert host[0] == "n" or text.endswith(" is no address")
        await client.close()

    run(scenario())


def test_all_addresses_of_a_name_are_tried(run: Scenario, refused: str) -> None:
    """Also where the first is refused, or never answered."""
    port = yarl.URL(refused).port or 0

    async def scenario() -> None:
        with deaf() as unheard:
            async with Peer() as peer:
                known = [("127.0.0.1", number) for number in (port, unheard, peer.port)]
                peer.client = HttpClient(resolver=addresses(*known))
                peer.url = yarl.URL("http://three.example")
                await first(peer)

    run(scenario())


def test_this_machine_is_found_before_it_has_an_address() -> None:
    """At boot there may be one of IPv6 for a while, and none of IPv4 but the loopback's."""
    program = "import asyncio, faasd_async as f; client = f.CheckedResolver(lambda host, address: True)"
    program += "; print(asyncio.run(client.resolve('localhost', 80)))"
    alone = 'ip link set lo up && ip -6 address add fd00::1/64 dev lo && exec "$@"'
    command = (*namespaces("net"), "sh", "-c", alone, "sh", sys.executable, "-c", program)
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(faasd_async.__file__).parent)
    assert "'127.0.0.1'" in found.stdout, found.stderr


def test_an_address_that_may_not_be_called_is_not_connected_to(run: Scenario) -> None:
    """What is checked is what would be connected to, whatever the name says."""

    async def scenario() -> None:
        async with Peer() as peer:
            client = HttpClient(resolver=CheckedResolver(lambda host, address: not address.startswith("127.")))
            for host in ("localhost", "127.0.0.1"):
                url = peer.url.with_host(host)
                kind, text = await failure(fetch(client, "GET", url))
                assert (kind, text) == (FailureKind.FORBIDDEN, f"to {host} at 127.0.0.1 are not allowed")
            await client.close()

    run(scenario())


def highest_descriptor() -> int:
    """The highest one that this process has open."""
    return max(int(item.name) for item in Path("/proc/self/fd").iterdir())


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Meanwhile this process can open nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = highest_descriptor() + 1
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


def test_our_own_shortage_is_no_failure_of_the_peer(run: Scenario) -> None:
    """No descriptor is left here: that passes."""

    async def scenario() -> None:
        async with Peer() as peer:
            with no_descriptor_left():
                for url in (peer.url, peer.url.with_host("localhost")):
                    with pytest.raises(Shortage):
                        await fetch(peer.client, "POST", url, b"x")
            await first(peer)

    run(scenario())


ONE_PORT = """
import asyncio, socket, faasd_async as f, yarl
from pathlib import Path
async def main():
    client = f.HttpClient()
    for host in ("127.0.0.1", "::1"):
        with socket.create_server((host, 81), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            first = socket.create_connection(server.getsockname()[:2])
            await told(client, host, 81)
            first.close()
    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
    await told(client, "::1", 81)
    await client.close()
async def told(client, host, port):
    try:
        await client.request("GET", yarl.URL.build(scheme="http", host=host, port=port), b"", b"")
    except f.HttpError as exc:
        print(type(exc).__name__)
    except f.RequestFailed as exc:
        print(exc)
asyncio.run(main())
"""


def test_that_no_port_is_left_is_a_shortage_of_ours() -> None:
    """Whoever has no address to come from is told the same by the kernel, but that does not pass."""
    alone = "ip link set lo up && echo 50000 50000 >/proc/sys/net/ipv4/ip_local_port_range"
    command = (*namespaces("net"), "sh", "-c", f'{alone} && exec "$@"', "sh", sys.executable, "-c", ONE_PORT)
    told = subprocess.run(command, capture_output=True, text=True, cwd=Path(faasd_async.__file__).parent)
    expected = ["Shortage", "Shortage", "can't be reached: Cannot assign requested address"]
    assert told.stdout.splitlines() == expected, told.stderr


def test_a_unix_socket_is_called(run: Scenario, trusting: None, tmp_path: Path) -> None:
    """As often as one likes."""

    async def scenario() -> None:
        async with Peer(unix_path=str(tmp_path / "socket")) as peer:
            peer.listener.close()
            peer.listener = socket.socket(socket.AF_UNIX)
            peer.listener.bind(str(tmp_path / "socket"))
            peer.listener.listen()
            peer.listener.setblocking(False)
            peer.url = yarl.URL("http://localhost/")
            connection = await first(peer)
            asking = peer.ask()
            assert b"\r\nHost: localhost\r\n" in await connection.answer(OK)
            assert await asking == (200, b"ok")

    run(scenario())


# ---- TLS -----------------------------------------------------------------------------------------


class Pki:
    """Certificates in a folder, made with openssl: NAME.pem and the one key, and ca.pem."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = str(folder / "key.pem")
        self._openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem")
        self._openssl(*("req", "-x509", "-new", "-key", "key.pem", "-subj", "/CN=ca", "-days", "9", "-out", "ca.pem"))
        own = ("-addext", "subjectAltName=DNS:localhost", "-days", "9", "-out", "self-signed.pem")
        self._openssl("req", "-x509", "-new", "-key", "key.pem", "-subj", "/CN=localhost", *own)
        for name, host, days in (
            ("good", "localhost", "9"),
            ("other", "other.example", "9"),
            ("expired", "localhost", "-1"),
        ):
            (folder / "extensions").write_text(f"subjectAltName=DNS:{host}")
            self._openssl("req", "-new", "-key", "key.pem", "-subj", f"/CN={host}", "-out", "request.pem")
            signed = ("-CA", "ca.pem", "-CAkey", "key.pem", "-CAcreateserial", "-extfile", "extensions", "-days", days)
            self._openssl("x509", "-req", "-in", "request.pem", *signed, "-out", f"{name}.pem")

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(("openssl", *arguments), cwd=self.folder, check=True, capture_output=True)

    def server(self, name: str, *, wants_client: bool = False) -> ssl.SSLContext:
        """A server with this certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / f"{name}.pem", self.key)
        if wants_client:
            context.load_verify_locations(self.folder / "ca.pem")
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """The certificates of this module."""
    return Pki(tmp_path_factory.mktemp("pki"))


@contextlib.contextmanager
def tls_server(
    context: ssl.SSLContext, first: Callable[[ssl.SSLSocket], object] = lambda sock: None
) -> Iterator[yarl.URL]:
    """A server, in threads, that does something `first`, then answers OK, for every request on a connection."""

    def serve(sock: socket.socket) -> None:
        wrapped = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        with contextlib.suppress(OSError), wrapped:
            try:
                wrapped.do_handshake()
            except ssl.SSLError:  # The alert has been sent: a reset must not overtake it.
                while os.read(wrapped.fileno(), 2**16):
                    pass
            received = b""
            while data := wrapped.recv(2**16):
                received += data
                if received.endswith(b"\r\n\r\nx"):
                    first(wrapped)
                    wrapped.sendall(OK)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=accept)]
        threads[0].start()
        yield yarl.URL(f"https://localhost:{listener.getsockname()[1]}")
        listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


CERTIFICATES = {
    "good": None,
    "expired": "its certificate is not accepted: certificate has expired",
    "other": "its certificate is not accepted: Hostname mismatch, certificate is not valid for 'localhost'",
    "self-signed": "its certificate is not accepted: self-signed certificate",
}


@pytest.mark.parametrize("name", CERTIFICATES)
def test_a_certificate_is_verified(run: Scenario, trusting: None, pki: Pki, name: str) -> None:
    """Against the CAs that are given; the reason says what is wrong with it."""
    trusted = client_context(str(pki.folder / "ca.pem"))
    reason = CERTIFICATES[name]

    async def scenario() -> None:
        client = HttpClient()
        for _ in range(3):
            asking = fetch(client, "POST", url, b"x", tls=trusted)
            if reason is None:
                assert await asking == (200, b"ok")
            else:
                kind, text = await failure(asking)
                assert (kind, text) == (FailureKind.UNREACHABLE, f"can't be reached: {reason}")
        await client.close()

    with tls_server(pki.server(name)) as url:
        run(scenario())


def test_a_private_ca_is_not_trusted_by_default(run: Scenario, pki: Pki) -> None:
    """The system's are."""

    async def scenario() -> None:
        client = HttpClient()
        kind, text = await failure(fetch(client, "POST", url, b"x"))
        assert kind is FailureKind.UNREACHABLE
        assert text.startswith("can't be reached: its certificate is not accepted: ")
        await client.close()

    with tls_server(pki.server("good")) as url:
        run(scenario())


def test_a_peer_without_tls_is_told(run: Scenario) -> None:
    """The URL says https, and there is none."""

    async def scenario() -> None:
        client = HttpClient()
        async with Peer() as peer:
            asking = asyncio.ensure_future(fetch(client, "POST", peer.url.with_scheme("https"), b"x"))
            connection = await peer.accept()
            await connection.read()
            await connection.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            assert await failure(asking) == (FailureKind.UNREACHABLE, "can't be reached: it does not speak TLS")
        await client.close()

    run(scenario())


def test_a_client_certificate_is_shown(run: Scenario, pki: Pki) -> None:
    """To peers that ask for one; who has none is told that."""
    known = client_context(str(pki.folder / "ca.pem"))
    known.load_cert_chain(pki.folder / "good.pem", pki.key)
    unknown = client_context(str(pki.folder / "ca.pem"))

    async def scenario() -> None:
        client = HttpClient()
        assert await fetch(client, "POST", url, b"x", tls=known) == (200, b"ok")
        kind, text = await failure(fetch(client, "POST", url, b"x", tls=unknown))
        assert kind in (FailureKind.BROKEN, FailureKind.UNREACHABLE)
        assert "certificate required" in text
        await client.close()

    with tls_server(pki.server("good", wants_client=True)) as url:
        run(scenario())


@contextlib.contextmanager
def tls_peer(context: ssl.SSLContext) -> Iterator[tuple[yarl.URL, Callable[[], ssl.SSLSocket]]]:
    """Its URL, and what gives the next connection as soon as something of a request has come; that may wait."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)

        def accept() -> ssl.SSLSocket:
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = context.wrap_socket(sock, server_side=True)
            assert connection.recv(1)
            return connection

        yield yarl.URL(f"https://localhost:{listener.getsockname()[1]}/"), accept


def test_an_answer_over_tls_wins_over_the_reset_that_follows_it(run: Scenario, pki: Pki) -> None:
    """What came in before the connection broke is decrypted all the same."""
    trusted = client_context(str(pki.folder / "ca.pem"))

    async def scenario() -> None:
        accepting = asyncio.create_task(asyncio.to_thread(accept))

        async def body() -> AsyncIterator[bytes]:
            yield b"the beginning"
            connection = await accepting
            # From here on the client's side does nothing until it sends.
            connection.sendall(b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno")
            connection.close()
            for _ in range(64):
                yield b"x" * 2**14

        assert await fetch(HttpClient(), "POST", url, body(), tls=trusted) == (413, b"no")

    with tls_peer(pki.server("good")) as (url, accept):
        run(scenario())


def test_a_farewell_in_tls_ends_an_answer_and_its_connection(run: Scenario, pki: Pki, trusting: None) -> None:
    """Also where the peer leaves the connection below it open."""
    trusted = client_context(str(pki.folder / "ca.pem"))

    def serve(data: bytes) -> None:
        with accept() as connection:
            connection.sendall(data)
            with contextlib.suppress(OSError):
                connection.unwrap()

    async def scenario() -> None:
        client = HttpClient()
        for data in (OK, b"HTTP/1.1 200 OK\r\n\r\nok"):
            serving = asyncio.create_task(asyncio.to_thread(serve, data))
            assert await fetch(client, "POST", url, b"x", tls=trusted) == (200, b"ok")
            await serving
        await client.close()

    with tls_peer(pki.server("good")) as (url, accept):
        run(scenario())


def test_what_is_not_encrypted_is_no_answer_over_tls(run: Scenario, pki: Pki) -> None:
    """Not behind something that is wrong either: anybody on the way can send it, and break the connection so."""
    trusted = client_context(str(pki.folder / "ca.pem"))

    def serve() -> None:
        with socket.socket(fileno=accept().detach()) as plain, contextlib.suppress(OSError):
            plain.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
            for _ in range(2_000):
                plain.sendall(OK)

    async def scenario() -> None:
        client = HttpClient()
        serving = asyncio.create_task(asyncio.to_thread(serve))
        reason = "broke off the connection: decryption failed or bad record mac"
        assert await failure(fetch(client, "POST", url, b"x", tls=trusted)) == (FailureKind.BROKEN, reason)
        await serving
        await client.close()

    with tls_peer(pki.server("good")) as (url, accept):
        run(scenario())


def test_a_name_with_a_dot_at_its_end_is_the_same_in_a_certificate(run: Scenario, pki: Pki) -> None:
    """It says to resolvers that nothing is left out, and to nobody else (RFC 6066 3)."""
    trusted = client_context(str(pki.folder / "ca.pem"))

    async def scenario() -> None:
        client = HttpClient(resolver=addresses(("127.0.0.1", url.port or 0)))
        assert await fetch(client, "POST", yarl.URL("https://localhost.:1/"), b"x", tls=trusted) == (200, b"ok")
        await client.close()

    with tls_server(pki.server("good")) as url:
        run(scenario())


# ---- proxies -------------------------------------------------------------------------------------


def test_a_proxy_is_asked_for_what_is_elsewhere(run: Scenario) -> None:
    """In the absolute form, with the credentials of its URL; but not for this machine, nor for NO_PROXY."""

    async def scenario() -> None:
        async with Peer() as proxy:
            environment = {"http_proxy": f"http://us:pw@127.0.0.1:{proxy.port}", "no_proxy": "near.example,10.0.0.0/8"}
            proxy.client = HttpClient(environment=environment)
            proxy.url = yarl.URL("http://far.example:81/a?b")
            asking = proxy.ask()
            request = await (await proxy.accept()).answer(OK)
            assert await asking == (200, b"ok")
            assert request.startswith(b"POST http://far.example:81/a?b HTTP/1.1\r\nHost: far.example:81\r\n")
            assert b"\r\nProxy-Authorization: Basic " + base64.b64encode(b"us:pw") + b"\r\n" in request
            async with Peer(environment=environment) as near:
                for host in ("127.0.0.1", "localhost"):
                    near.url = near.url.with_host(host)
                    await first(near)
                direct = HttpClient(environment=environment, resolver=addresses(("127.0.0.1", near.port)))
                for host in ("near.example", "a.near.example", "10.1.2.3"):
                    asked = asyncio.ensure_future(fetch(direct, "POST", yarl.URL(f"http://{host}"), b"x"))
                    await (await near.accept()).answer(OK)
                    assert await asked == (200, b"ok")
                await direct.close()

    run(scenario())


def test_a_tunnel_is_asked_for_what_is_secret(run: Scenario, pki: Pki) -> None:
    """CONNECT, and TLS with the peer itself behind that; a proxy that refuses is told."""
    trusted = client_context(str(pki.folder / "ca.pem"))

    async def forward(one: socket.socket, other: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(one, 2**16):
                await loop.sock_sendall(other, data)
            other.shutdown(socket.SHUT_WR)

    async def scenario() -> None:
        async with Peer() as proxy:
            proxy.client = HttpClient(environment={"https_proxy": f"127.0.0.1:{proxy.port}"})
            proxy.url = yarl.URL("https://other.example:444/")
            asking = proxy.ask(tls=trusted)
            connection = await proxy.accept()
            first, *headers = (await connection.request()).split(b"\r\n")
            assert first == b"CONNECT other.example:444 HTTP/1.1"
            # Without the second, some proxies refuse; without the third, some close after a 200.
            assert headers[0] == b"Host: other.example:444"
            assert headers[1].startswith(b"User-Agent: faasd-async/")
            assert headers[2] == b"Proxy-Connection: keep-alive"
            await connection.send(b"HTTP/1.1 200 Connected\r\n\r\n")
            with socket.create_connection(("127.0.0.1", url.port or 0)) as behind:
                behind.setblocking(False)
                both = asyncio.gather(forward(behind, connection.sock), forward(connection.sock, behind))
                assert await asking == (200, b"ok")
                await proxy.client.close()
                await both
            asking = proxy.ask(tls=trusted)
            await (await proxy.accept()).answer(b"HTTP/1.1 407 Who\r\n\r\n")
            assert await failure(asking) == (FailureKind.UNREACHABLE, "can't be reached: the proxy answered 407")

    with tls_server(pki.server("other")) as url:
        run(scenario())


NO_TUNNEL = "can't be reached: the proxy "
TUNNELS: dict[str, tuple[bytes, str]] = {
    "an explanation follows": (b"HTTP/1.1 407 Who\r\nContent-Length: 20\r\n\r\n<p>", f"{NO_TUNNEL}answered 407"),
    "the head does not end": (b"HTTP/1.1 502 Bad Gateway\r\n", f"{NO_TUNNEL}answered 502"),
    "after an interim answer": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 403 No\r\n\r\n", f"{NO_TUNNEL}answered 403"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n", f"{NO_TUNNEL}did not answer in valid HTTP"),
}


@pytest.mark.parametrize("name", TUNNELS)
def test_a_proxy_that_opens_no_tunnel_is_told_at_once(run: Scenario, pki: Pki, name: str) -> None:
    """Most say why in a body, and keep the connection open for another try: nobody waits for more."""
    said, reason = TUNNELS[name]

    async def scenario() -> None:
        async with Peer() as proxy:
            proxy.client = HttpClient(environment={"https_proxy": f"127.0.0.1:{proxy.port}"})
            proxy.url = yarl.URL("https://other.example/")
            asking = proxy.ask()
            await (await proxy.accept()).answer(said)
            assert await failure(asking) == (FailureKind.UNREACHABLE, reason)

    run(scenario())


def test_what_a_proxy_says_for_itself_is_no_answer_of_the_peer(run: Scenario) -> None:
    """Whoever asked has no credentials to give: those are in the daemon's environment."""

    async def scenario() -> None:
        async with Peer() as proxy:
            proxy.client = HttpClient(environment={"http_proxy": f"127.0.0.1:{proxy.port}"})
            proxy.url = yarl.URL("http://other.example/")
            asking = proxy.ask()
            await (await proxy.accept()).answer(b"HTTP/1.1 407 Who\r\nContent-Length: 3\r\n\r\n<p>")
            assert await failure(asking) == (FailureKind.UNREACHABLE, f"{NO_TUNNEL}answered 407")

    run(scenario())


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 Connec", b"HTTP/1.1 200 Connected\r\n"], ids=[0, 1, 2])
def test_a_proxy_that_breaks_off_is_told(run: Scenario, said: bytes, reset: bool) -> None:
    """Nothing is wrong with who was to be reached: it did not see anything."""

    async def scenario() -> None:
        async with Peer() as proxy:
            proxy.client = HttpClient(environment={"https_proxy": f"127.0.0.1:{proxy.port}"})
            proxy.url = yarl.URL("https://other.example/")
            asking = proxy.ask()
            connection = await proxy.accept()
            await connection.answer(said)
            connection.close(reset)
            reason = f"{NO_TUNNEL}did not answer"
            if reset:
                reason = f"can't be reached through the proxy 127.0.0.1:{proxy.port}: Connection reset by peer"
            assert await failure(asking) == (FailureKind.UNREACHABLE, reason)

    run(scenario())


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\nVia: x\n\n",
        b"HTTP/1.0 200\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    ],
    ids=["bare lines", "a length that means nothing", "an interim answer first"],
)
def test_a_tunnel_begins_behind_the_head_of_a_2xx(run: Scenario, said: bytes) -> None:
    """However that is written (RFC 9110 9.3.6), and whether it comes in one piece or byte by byte."""

    async def scenario() -> None:
        async with Peer() as proxy:
            proxy.client = HttpClient(environment={"https_proxy": f"127.0.0.1:{proxy.port}"})
            proxy.url = yarl.URL("https://other.example/")
            for pieces in ([said], [bytes([byte]) for byte in said]):
                asking = proxy.ask()
                connection = await proxy.accept()
                await connection.request()
                for piece in pieces:
                    await connection.send(piece)
                assert (await connection.read()).startswith(b"\x16\x03")  # the beginning of TLS
                connection.close()
                await failure(asking)

    run(scenario())


def test_a_proxy_that_cannot_be_reached_is_told(run: Scenario) -> None:
    """By its name, without its credentials: nothing is wrong with who was to be reached."""

    async def scenario() -> None:
        async with Peer() as proxy:
            proxy.listener.close()
            proxy.client = HttpClient(environment={"all_proxy": f"http://us:pw@127.0.0.1:{proxy.port}"})
            for url in ("http://far.example/", "https://far.example/"):
                proxy.url = yarl.URL(url)
                reason = f"can't be reached through the proxy 127.0.0.1:{proxy.port}: Connection refused"
                assert await failure(proxy.ask()) == (FailureKind.UNREACHABLE, reason)

    run(scenario())


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_hangs_is_named(run: Scenario, scheme: str) -> None:
    """Nobody can tell whether the peer hangs behind it, but where to look first."""

    async def scenario() -> None:
        async with Peer() as proxy:
            proxy.client = HttpClient(environment={"all_proxy": f"http://us:pw@127.0.0.1:{proxy.port}"})
            proxy.url = yarl.URL(f"{scheme}://far.example/")
            with pytest.raises(RequestFailed) as caught, TimeLimit(Limit(0.2, "callback.timeout")):
                await proxy.ask()
            reason = f"did not answer within callback.timeout (0.2s) through the proxy 127.0.0.1:{proxy.port}"
            assert (caught.value.kind, caught.value.text) == (FailureKind.TIMEOUT, reason)

    run(scenario())


def test_a_proxy_that_is_no_url_is_ignored() -> None:
    """The environment is not the daemon's own."""
    assert proxies_of({"http_proxy": "http://", "https_proxy": "", "ALL_PROXY": "proxy:3128"}) == {
        "http": yarl.URL("http://proxy:3128"),
        "https": yarl.URL("http://proxy:3128"),
    }


NO_PROXY = [
    (" .near.example ,10.0.0.0/8", "near.example a.near.example 10.1.2.3", "far.example notnear.example 11.1.2.3"),
    ("*.near.example", "a.near.example", "far.example"),
    ("NEAR.example. other.example", "near.EXAMPLE near.example. other.example", "far.example"),
    ("near.example:81,10.0.0.1:81", "near.example:81 10.0.0.1:81", "near.example near.example:82 10.0.0.1"),
    ("[2001:db8::1],2001:db8:1::/48,::8", "[2001:db8::1]:81 [2001:db8:1::5] [::8]", "[2001:db8:2::5]"),
    ("*", "near.example 10.0.0.1", ""),
    ("", "localhost 127.0.0.1:81 [::1]", "near.example"),
    ("", "127.1 2130706433 0x7f.1 0.0.0.0 [::] [::ffff:127.0.0.1] a.localhost LOCALHOST.", "localhost.example"),
    ("10.0.0.0/8", "0xa.1 167772161 [::ffff:10.1.2.3]", "11.0.0.1"),
]  # fmt: skip


def test_no_proxy_has_the_forms_that_curl_and_others_read() -> None:
    """Names with all below them, networks, ports, brackets; commas or spaces between them."""
    for listed, direct, proxied in NO_PROXY:
        for hosts, bypassed in ((direct, True), (proxied, False)):
            for url in (yarl.URL(f"http://{host}") for host in hosts.split()):
                environment = {"NO_PROXY": listed}
                assert bypasses_proxy(url.raw_host or "", url.port or 0, environment) is bypassed, (listed, url)


def test_addresses_of_this_machine_are_reached_without_a_proxy() -> None:
    """Those of its networks are its own, too; their neighbours are not."""
    program = "import faasd_async as f; print(*(f.bypasses_proxy(host, 80, {}) for host in "
    program += "('10.99.0.1', '10.99.0.2', 'fd00::1', 'fd00::2')))"
    alone = "ip link set lo up && ip address add 10.99.0.1/24 dev lo && ip -6 address add fd00::1/64 dev lo"
    command = (*namespaces("net"), "sh", "-c", f'{alone} && exec "$@"', "sh", sys.executable, "-c", program)
    told = subprocess.run(command, capture_output=True, text=True, cwd=Path(faasd_async.__file__).parent)
    assert told.stdout.split() == ["True", "False", "True", "False"], told.stderr


def test_the_zone_of_an_address_is_for_this_machine_alone(run: Scenario) -> None:
    """It is looked up without the escape that it has in URLs (RFC 6874), and not sent to the peer."""
    asked: list[str] = []

    class Resolver(CheckedResolver):
        async def resolve(self, host: str, port: int) -> list[AddressInfo]:
            asked.append(host)
            return list(await super().resolve("127.0.0.1", port))

    async def scenario() -> None:
        async with Peer(resolver=Resolver(lambda host, address: True)) as peer:
            for zone in ("%25eth0", "%eth0"):
                peer.url = yarl.URL(f"http://[fe80::1{zone}]:{peer.port}/", encoded=True)
                asking = peer.ask()
                connection = await peer.accept()
                assert b"\r\nHost: [fe80::1]:%d\r\n" % peer.port in await connection.answer(OK)
                connection.close()
                assert await asking == (200, b"ok")

    run(scenario())
    assert asked == ["fe80::1%eth0"] * 2


async def test_a_proxy_that_speaks_another_protocol_is_told(daemon: StartDaemon) -> None:
    """One line at the start says that it is not used, without its credentials."""
    gateway = await daemon("", env={"ALL_PROXY": "socks5://us:s3cret@127.0.0.1:9"})
    await gateway.wait_for_log("ALL_PROXY is ignored")
    assert "s3cret" not in gateway.log


# ---- time ----------------------------------------------------------------------------------------


def test_a_limit_is_named(run: Scenario) -> None:
    """Which one it was, and how long it is."""

    async def scenario() -> None:
        async with Peer() as peer:
            asking = peer.ask()
            await peer.accept()

            async def limited() -> None:
                with TimeLimit(Limit(0.05, "callback.timeout")):
                    await asking

            assert await failure(limited()) == (FailureKind.TIMEOUT, "did not answer within callback.timeout (0.05s)")

    run(scenario())


class Deaf(CheckedResolver):
    """It never knows an address."""

    async def resolve(self, host: str, port: int) -> list[AddressInfo]:
        never: asyncio.Future[list[AddressInfo]] = asyncio.get_running_loop().create_future()
        return await never


@pytest.mark.parametrize(
    ("url", "resolver", "missing"),
    [
        ("http://far.example", Deaf(lambda host, address: True), "no name server answered"),
        ("http://127.0.0.1:{full}", None, "no connection was made"),
        ("https://127.0.0.1:{open}", None, "the TLS handshake did not end"),
    ],
)
def test_what_had_yet_to_come_is_told(run: Scenario, url: str, resolver: CheckedResolver | None, missing: str) -> None:
    """The peer may not have seen anything of the request: its own log will not say why it took so long."""

    async def scenario() -> None:
        with deaf() as full, socket.create_server(("127.0.0.1", 0)) as still_open:
            ports = {"full": full, "open": still_open.getsockname()[1]}
            http = HttpClient(resolver=resolver)
            with pytest.raises(RequestFailed) as caught, TimeLimit(Limit(0.1, "callback.timeout")):
                await fetch(http, "POST", yarl.URL(url.format(**ports)), b"x")
            assert caught.value.text == f"did not answer within callback.timeout (0.1s): {missing}"
            await http.close()

    run(scenario())


def test_input_that_is_there_wins_over_a_timer_that_was_late(run: Scenario) -> None:
    """A machine that slept wakes up with the answer and the end of the time limit both there."""

    async def scenario() -> None:
        async with Peer() as peer:

            async def limited() -> tuple[int, bytes]:
                with TimeLimit(Limit(0.3)):
                    return cast(tuple[int, bytes], await peer.ask())

            asking = asyncio.ensure_future(limited())
            connection = await peer.accept()
            await connection.request()
            connection.sock.send(OK)
            time.sleep(0.6)  # noqa: ASYNC251 (as a machine that sleeps)
            assert await asking == (200, b"ok")

    run(scenario())


def test_what_comes_in_the_round_of_the_loop_in_which_a_limit_ends_is_in_time(run: Scenario) -> None:
    """Both are due when a loop that was held up for a moment goes on."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        coming = loop.create_future()

        async def limited() -> object:
            with TimeLimit(Limit(0.02)):
                return await coming

        asking = asyncio.ensure_future(limited())
        loop.call_later(0.01, coming.set_result, "there")
        await asyncio.sleep(0)
        time.sleep(0.05)  # noqa: ASYNC251 (as a loop that is held up)
        assert await asking == "there"

    run(scenario())


# ---- what is private to aiohttp ------------------------------------------------------------------


class Listener(asyncio.Protocol):
    """What the parser's streams want of a protocol."""

    connected = True
    _reading_paused = False

    def __init__(self) -> None:
        self.told: list[str] = []

    def pause_reading(self) -> None:
        """Note that."""
        self._reading_paused = True
        self.told.append("pause")

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Note that."""
        if self._reading_paused:
            self.told.append("resume")
        self._reading_paused = False


PARSERS = {"C": HttpResponseParser, "Python": aiohttp.http_parser.HttpResponseParserPy}


@pytest.mark.parametrize("kind", PARSERS)
def test_the_parser_is_what_it_was(run: Scenario, kind: str) -> None:
    """`HttpResponseParser`, in C and where there is no wheel: arguments, and what `feed_data` and `feed_eof` give."""

    async def scenario() -> None:
        listener = Listener()
        parser = PARSERS[kind](
            cast(Any, listener),
            asyncio.get_running_loop(),
            1024,
            max_line_size=100,
            max_field_size=100,
            response_with_body=True,
            read_until_eof=True,
            auto_decompress=False,
        )
        messages, upgraded, tail = parser.feed_data(b"HTTP/1.1 200 Fine\r\nX-A: b\r\n\r\n")
        ((message, body),) = messages
        assert (upgraded, tail) == (False, b"")
        assert (message.code, message.reason, message.raw_headers) == (200, "Fine", ((b"X-A", b"b"),))
        assert message.should_close
        assert isinstance(body, StreamReader)
        parser.feed_data(bytes(4096))
        assert listener.told == ["pause"]
        assert (body.is_eof(), body.exception(), await body.readany()) == (False, None, bytes(4096))
        assert listener.told == ["pause", "resume"]
        parser.feed_eof()
        assert (body.is_eof(), body.read_nowait(), body.total_bytes) == (True, b"", 4096)

    run(scenario())


REQUEST_PARSERS = {"C": HttpRequestParser, "Python": aiohttp.http_parser.HttpRequestParserPy}


@pytest.mark.parametrize("kind", REQUEST_PARSERS)
def test_the_parser_of_requests_is_what_it_was(run: Scenario, kind: str) -> None:
    """`HttpRequestParser`: it keeps what is behind so many requests, or behind one that would leave HTTP."""

    async def scenario() -> None:
        parser = REQUEST_PARSERS[kind](
            cast(Any, Listener()),
            asyncio.get_running_loop(),
            1024,
            max_line_size=100,
            max_field_size=100,
            auto_decompress=False,
            max_msg_queue_size=2,
        )
        one = b"GET /a?b HTTP/1.1\r\nHost: x\r\nX-A: b\r\n\r\n"
        messages, _, _ = parser.feed_data(one * 3)
        assert len(messages) == 2
        (message, body) = messages[0]
        assert (message.method, message.path, tuple(message.version)) == ("GET", "/a?b", (1, 1))
        assert (message.raw_headers, message.headers["x-a"]) == (((b"Host", b"x"), (b"X-A", b"b")), "b")
        assert (message.should_close, body is EMPTY_PAYLOAD) == (False, True)
        parser.message_consumed()
        parser.message_consumed()
        assert len(parser.feed_data(b"")[0]) == 1
        parser.message_consumed()
        leaving = one.replace(b"X-A: b", b"Connection: upgrade\r\nUpgrade: websocket")
        messages, upgraded, tail = parser.feed_data(leaving + one)
        assert (len(messages), upgraded, tail) == (1, True, one)
        parser.message_consumed()
        parser.set_upgraded(False)
        assert [len(found) for found in parser.feed_data(tail)[:1]] == [1]
        with pytest.raises(LineTooLong) as found:
            parser.feed_data(b"GET /" + b"x" * 200 + b" HTTP/1.1\r\n")
        assert found.value.args[1] == 100

    run(scenario())


def test_the_parser_is_the_one_in_c() -> None:
    """The other one is several times slower."""
    assert HttpResponseParser.__module__ == HttpRequestParser.__module__ == "aiohttp._http_parser"


def test_a_stream_is_what_it_was(run: Scenario) -> None:
    """`StreamReader`: an error that is set reaches who reads; `EMPTY_PAYLOAD` is at its end from the beginning."""

    async def scenario() -> None:
        stream = StreamReader(cast(Any, Listener()), 1024, loop=asyncio.get_running_loop())
        reading = asyncio.ensure_future(stream.readany())
        await asyncio.sleep(0)
        stream.set_exception(RequestFailed(FailureKind.BROKEN, "broke"))
        assert await failure(reading) == (FailureKind.BROKEN, "broke")
        assert await failure(stream.readany()) == (FailureKind.BROKEN, "broke")
        assert (EMPTY_PAYLOAD.is_eof(), EMPTY_PAYLOAD.read_nowait(), await EMPTY_PAYLOAD.readany()) == (True, b"", b"")

    run(scenario())


def test_linux_tells_what_a_peer_has_taken(run: Scenario) -> None:
    """`tcp_info`: the state, and a count that grows by what was acknowledged."""

    async def scenario() -> None:
        async with Peer() as peer:
            with socket.create_connection(("127.0.0.1", peer.port)) as sock:
                connection = await peer.accept()
                before = faasd_async.tcp_info(sock)
                assert (before.state, before.acked > 0, before.sent) == (faasd_async.ESTABLISHED, True, 0)
                sock.sendall(b"12345")
                assert await connection.read() == b"12345"
                await connection.send(b"x")  # with that the kernel says what it has taken
                assert faasd_async.tcp_info(sock) == (faasd_async.ESTABLISHED, before.acked + 5, 1)
                connection.close()
                assert faasd_async.tcp_info(sock).state != faasd_async.ESTABLISHED

    run(scenario())


async def test_a_head_goes_out_with_its_body(daemon: StartDaemon) -> None:
    """`StreamResponse._send_headers_immediately`: off where a small answer has come as a whole, on where it has not."""
    held = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1]
        writer.write(OK if path == b"/whole" else OK[:-1])
        await held.wait()
        writer.write(b"" if path == b"/whole" else OK[-1:])
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    gateway = await daemon(f'[functions.f]\nurl = "http://127.0.0.1:{server.sockets[0].getsockname()[1]}"')
    for path, first_piece in (("whole", b"ok"), ("half", b"o")):
        with socket.create_connection(("127.0.0.1", yarl.URL(gateway.url).port or 0)) as client:
            client.setblocking(False)
            connection = Connection(client)
            await connection.send(f"GET /function/f/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            received = await connection.read()
            if path == "half":
                while not received.endswith(first_piece):
                    received += await connection.read()
                held.set()
                received += await connection.read()
            assert received.endswith(b"\r\n\r\nok")
    server.close()


# ---- as the daemon has it ------------------------------------------------------------------------


async def test_the_credentials_in_a_functions_url_are_used_and_not_shown(
    daemon: StartDaemon, function: Server, refused: str
) -> None:
    """They are for the function alone: no caller, record or log line has them."""
    known, lost = (url.replace("http://", "http://user:s3cret@") for url in (function.url, refused))
    gateway = await daemon(
        f'[functions.known]\nurl = "{known}"\n[functions.lost]\nurl = "{lost}"\n[retry]\nattempts = 1'
    )
    assert (await ask(gateway.url, "/function/known", "Authorization: Bearer x")).status == 200
    expected = "Basic " + base64.b64encode(b"user:s3cret").decode()
    assert function.requests[0].headers.getall("Authorization") == [expected]
    reply = await ask(gateway.url, "/function/lost")
    record = await gateway.final(await gateway.submit("lost"))
    assert "s3cret" not in reply.body.decode() + str(record) + gateway.log


def http_tls(pki: Pki, **files: str) -> ssl.SSLContext:
    """How a function is called whose table has these files."""
    function = {"url": "https://localhost", "tls_ca_file": str(pki.folder / "ca.pem"), **files}
    context = parse_config({"functions": {"f": function}}).functions["f"].tls
    assert context
    return context


def test_the_protocol_is_named_in_tls(run: Scenario, pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some servers break off with clients that don't (ALPN), with the system's CAs and with others."""
    monkeypatch.setenv("SSL_CERT_FILE", str(pki.folder / "ca.pem"))
    named: list[str | None] = []
    context = pki.server("good")
    context.set_alpn_protocols(["h2", "http/1.1"])

    async def scenario() -> None:
        with tls_server(context, lambda sock: named.append(sock.selected_alpn_protocol())) as url:
            for tls in (None, http_tls(pki)):
                client = HttpClient()
                assert await fetch(client, "POST", url, b"x", tls=tls) == (200, b"ok")
                await client.close()
        assert named == ["http/1.1", "http/1.1"]

    run(scenario())


def test_a_server_may_ask_for_a_certificate_when_it_has_the_request(run: Scenario, pki: Pki) -> None:
    """As Apache does where only some paths need one (RFC 8446 4.6.2)."""
    context = pki.server("good", wants_client=True)
    context.post_handshake_auth = True
    shown: list[object] = []

    def ask_for_certificate(sock: ssl.SSLSocket) -> None:
        shown.append(sock.getpeercert())
        sock.verify_client_post_handshake()
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        sock.settimeout(0.05)
        while not sock.getpeercert():
            with contextlib.suppress(TimeoutError):
                sock.recv(1)
        sock.settimeout(None)
        shown.append(sock.getpeercert())

    async def scenario() -> None:
        client = HttpClient()
        tls = http_tls(pki, tls_cert_file=str(pki.folder / "other.pem"), tls_key_file=pki.key)
        with tls_server(context, ask_for_certificate) as url:
            assert await fetch(client, "POST", url, b"x", tls=tls) == (200, b"ok")
            await client.close()
        assert [bool(certificate) for certificate in shown] == [False, True]

    run(scenario())


def test_the_systems_cas_are_not_taken_for_none_in_a_shortage(
    run: Scenario, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL says nothing of a file that it could not open."""
    monkeypatch.setenv("SSL_CERT_FILE", str(pki.folder / "ca.pem"))

    async def scenario() -> None:
        with tls_server(pki.server("good")) as url:
            client = HttpClient()
            with no_descriptor_left(), pytest.raises(Shortage):
                await fetch(client, "POST", url, b"x")
            assert (await fetch(client, "POST", url, b"x"))[0] == 200
            await client.close()

    run(scenario())


async def test_the_files_for_tls_are_read_with_the_configuration(daemon: StartDaemon, pki: Pki, tmp_path: Path) -> None:
    """What was checked is what is used, whatever becomes of the file before the first call."""
    ca = tmp_path / "ca.pem"
    ca.write_bytes((pki.folder / "ca.pem").read_bytes())
    with tls_server(pki.server("good")) as url:
        gateway = await daemon(f'[functions.f]\nurl = "{url}"\ntls_ca_file = "{ca}"')
        ca.unlink()
        assert (await ask(gateway.url, "/function/f", method="POST", body=b"x")).status == 200


async def test_a_ca_is_taken_over_on_reload(daemon: StartDaemon, pki: Pki) -> None:
    """`callback.tls_ca_file`: before that, nobody is trusted whom the system does not trust."""
    base = '[functions.f]\ncommand = ["cat"]\n[callback]\nattempts = 1\n'
    with tls_server(pki.server("good")) as url:
        gateway = await daemon(base)
        for status in ("failed", "delivered"):
            record = await gateway.final(await gateway.submit("f", b"x", X_Callback_Url=str(url)))
            assert record["callback"]["status"] == status, record
            line = len(gateway.log.splitlines())
            gateway.configure(f'{base}tls_ca_file = "{pki.folder}/ca.pem"')
            gateway.signal(signal.SIGHUP)
            await gateway.wait_for_log("configuration reloaded", line)
        await gateway.terminate()


async def test_a_call_waits_for_a_descriptor_and_is_not_charged(daemon: StartDaemon, function: Server) -> None:
    """The shortage is ours."""
    settings = f'[functions.f]\nurl = "{function.url}"\n[retry]\nattempts = 1'
    gateway = await daemon(settings, before="faasd_async.RETRY_STORE_S = 0.3")
    await gateway.final(await gateway.submit("f"))  # over a connection that stays open
    with with_descriptors(gateway, 3):
        call_id = await gateway.submit("f")
        await gateway.wait_for_log("no descriptors")
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"]) == ("success", 1)
    assert len(function.requests) == 2


def thread_names(pid: int) -> set[str]:
    """Those of a process's threads."""
    names = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # It has ended meanwhile.
            names.add((thread / "comm").read_text().strip())
    return names


async def test_libuv_looks_no_name_up(daemon: StartDaemon, function: Server) -> None:
    """Its threads may all be busy with names that nobody answers for, and it aborts where it can start none."""
    urls = "".join(
        f"[functions.{host[0]}]\nurl = 'http://{host}:{function.port}'\n" for host in ("127.0.0.1", "localhost")
    )
    gateway = await daemon(urls)
    for name in "1l":
        assert (await ask(gateway.url, f"/function/{name}")).status == 200
    assert "libuv-worker" not in thread_names(gateway.pid)
