"""Requests whose heads came before, byte by byte: what is known of a head is true of each, and of nothing else."""

import asyncio
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import PATIENCE, Daemon, Server, StartDaemon, connection

BODIES = (b"", b"a", b"\xff\xfe", "Größe".encode(), b"\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n\r\n" * 9)


@pytest.fixture
async def gateway(daemon: StartDaemon, function: Server) -> Daemon:
    """A daemon with a function."""
    return await daemon(f'[functions.echo]\nurl = "{function.url}"')


def post(body: bytes, end: bytes = b"\r\n", route: bytes = b"function") -> bytes:
    """A request whose head depends on nothing but the length of its body."""
    lines = (b"POST /%b/echo/?q HTTP/1.1" % route, b"Host: gateway.example", b"Content-Length: %d" % len(body))
    return end.join([*lines, b"", b""]) + body


LAST = b"GET /healthz HTTP/1.1\r\nHost: gateway.example\r\nConnection: close\r\n\r\n"


async def send(gateway: Daemon, *pieces: bytes) -> list[bytes]:
    """Send these one after the other, each when the one before may have been read; the status of each answer."""
    async with connection(gateway.url) as (reader, writer):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.write(LAST)
        answers = await asyncio.wait_for(reader.read(), PATIENCE)
    return re.findall(rb"HTTP/1\.1 (\d+)", answers)


async def test_each_request_has_its_own_body_however_it_is_cut(gateway: Daemon, function: Server) -> None:
    """In one piece, head and body apart, several in one piece, and pieces that begin in one and end in another."""
    for body in BODIES:
        same = [body, body[::-1], body.swapcase()]
        requests = [post(each) for each in same]
        head = len(requests[0]) - len(body)
        whole = b"".join(requests)
        apart = [part for each in requests for part in (each[:head], each[head:]) if part]
        for pieces in (requests, apart, [whole], [whole[: head + 1], whole[head + 1 :]], [*requests, whole, *requests]):
            function.requests.clear()
            answers = await send(gateway, *pieces)
            assert [request.body for request in function.requests] == same * (b"".join(pieces).count(whole) or 1)
            assert set(answers) == {b"200"}, (body, pieces)


async def test_a_request_within_a_header_is_no_request(gateway: Daemon, function: Server) -> None:
    """What is known begins where a request begins, and nowhere else."""
    outer = b"POST /function/echo HTTP/1.1\r\nX-Inner: "
    inner = post(b"abc")
    for before in ([inner + outer], [inner[:-3], inner[-3:] + outer], [inner[:-3], inner[-3:], outer]):
        function.requests.clear()
        assert await send(gateway, inner, *before, inner, inner) == [b"200"] * 5
        shown = [request.headers.get("X-Inner") for request in function.requests]
        assert shown == [None, None, "POST /function/echo/?q HTTP/1.1", None]


async def calls_from(gateway: Daemon, sender: str) -> bytes:
    """Queue two calls from an address; the answers."""
    parts = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, local_addr=(sender, 0))
    writer.write(post(b"a", route=b"async-function"))
    await reader.readuntil(b"\r\n\r\n")
    writer.write(post(b"b", route=b"async-function") + LAST)
    answers = await asyncio.wait_for(reader.read(), PATIENCE)
    writer.close()
    return answers


async def test_a_function_is_told_who_has_sent_the_same_bytes(gateway: Daemon, function: Server) -> None:
    """Each call has an id of its own, and the address of its sender."""
    senders = ["127.0.0.1", "127.0.0.2", "127.0.0.1"]
    for sender in senders:
        assert b" 202 Accepted" in await calls_from(gateway, sender)
    seen = [request.headers["X-Forwarded-For"] for request in await function.wait_for(6)]
    assert sorted(seen) == sorted(senders * 2)
    assert len(set(function.call_ids)) == 6


async def test_what_a_unix_socket_may_do_the_network_may_not(daemon: StartDaemon, tmp_path: Path) -> None:
    """The guard against pages of other sites looks at each connection."""
    path = tmp_path / "gateway.sock"
    started = await daemon(f'[gateway]\nlisten = ["127.0.0.1:0", "unix:{path}"]')
    await started.wait_for_log("listening on unix:")
    asked = b"GET /system/queues HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n"
    reader, writer = await asyncio.open_unix_connection(path)
    for _ in range(2):
        writer.write(asked)
        assert b" 200 OK" in await reader.readuntil(b"\r\n\r\n")
    writer.close()
    async with connection(started.url) as (reader, writer):
        for _ in range(2):
            writer.write(asked)
            assert b" 421 " in await reader.readuntil(b"\r\n\r\n")


async def test_a_thousand_heads_are_known_or_not_and_answered_all_the_same(gateway: Daemon, function: Server) -> None:
    """More than are remembered, on one connection, with one that comes again and again."""
    requests = []
    for number in range(150):
        requests += [post(b"x" * number), post(b"again")]
    answers = await send(gateway, *requests)
    assert len(answers) == len(requests) + 1
    assert [len(request.body) for request in function.requests[::2]] == list(range(150))
