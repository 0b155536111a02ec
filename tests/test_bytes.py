"""Paths and queries that are no ASCII: what a client sends, a function gets, byte for byte."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from conftest import PATIENCE, Daemon, StartDaemon, ask, connection, raw
from test_peers import peer

import faasd_async

# The bytes of Latin-1 and of UTF-8, what is neither, and what is written in percent beside them.
TARGET = b"/caf\xe9/\xc3\xa9/\xff\x80//../%e9%25?q=\xe9&\xfe=%ff+?#\xf0"
FOUND = b'{"name": "far", "namespace": "openfaas-fn", "replicas": 1, "availableReplicas": 1}'


class Lines:
    """A server that notes the first line of each request and says `ok`, and is a provider with one function."""

    def __init__(self) -> None:
        self.seen: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        head = await reader.readuntil(b"\r\n\r\n")
        line = head.partition(b"\r\n")[0]
        body = b"ok"
        if line.startswith(b"GET /system/function/"):
            body = FOUND
        elif not line.startswith(b"GET /system/"):
            self.seen.put_nowait(line)
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()

    async def next(self) -> bytes:
        """The first line of the next request."""
        return await asyncio.wait_for(self.seen.get(), PATIENCE)


@pytest.fixture
def lines() -> Lines:
    """What a function was asked."""
    return Lines()


@pytest.fixture
async def gateway(daemon: StartDaemon, lines: Lines, tmp_path: Path) -> AsyncIterator[Daemon]:
    """A daemon with a function of each kind."""
    (tmp_path / "show.sh").write_text('printf "%s?%s" "$Http_Path" "$Http_Query"')
    async with peer(lines.serve) as url:
        yield await daemon(f"""
            [provider]
            url = "{url}"
            [functions.near]
            url = "{url}/base"
            [functions.program]
            command = ["sh", "{tmp_path}/show.sh"]
        """)


def post(route: bytes, name: bytes, target: bytes = TARGET, last: bool = True) -> bytes:
    """A request as it goes over the wire."""
    head = b"POST /%b/%b%b HTTP/1.1\r\nHost: gateway.example\r\n" % (route, name, target)
    return head + b"Connection: close\r\n" * last + b"Content-Length: 2\r\n\r\n\xff\xfe"


async def test_bytes_above_127_reach_a_function(gateway: Daemon, lines: Lines) -> None:
    """Sync and from the queue, at a URL and behind the provider."""
    for name, path in ((b"near", b"/base"), (b"far", b"/function/far.openfaas-fn")):
        for route, status in ((b"function", 200), (b"async-function", 202), (b"r/app", 200)):
            assert (await raw(gateway.url, post(route, name))).status == status
            assert await lines.next() == b"POST %b%b HTTP/1.1" % (path, TARGET), (name, route)
    absolute = post(b"function", b"near").replace(b" /", b" http://gateway.example/", 1)
    assert (await raw(gateway.url, absolute)).status == 200
    assert await lines.next() == b"POST /base%b HTTP/1.1" % TARGET


async def test_bytes_above_127_reach_a_command(gateway: Daemon) -> None:
    """As a program finds them in its environment."""
    assert (await raw(gateway.url, post(b"function", b"program"))).body == TARGET
    reply = await raw(gateway.url, post(b"async-function", b"program"))
    call_id = reply.headers["X-Call-Id"]
    assert (await gateway.final(call_id))["status"] == "success"
    assert (await ask(gateway.url, f"/system/calls/{call_id}/log")).body == TARGET


async def test_bytes_above_127_survive_a_restart(gateway: Daemon, lines: Lines) -> None:
    """A call that waits has its target on disk."""
    later = post(b"async-function", b"near").replace(b"\r\n", b"\r\nX-Delay: 1s\r\n", 1)
    assert (await raw(gateway.url, later)).status == 202
    await gateway.kill()
    await gateway.start()
    assert await lines.next() == b"POST /base%b HTTP/1.1" % TARGET


async def test_bytes_above_127_are_shown_in_percent(gateway: Daemon) -> None:
    """Where a person asks what a call asked for: JSON has no other form for them."""
    reply = await raw(gateway.url, post(b"async-function", b"program"))
    path = f"/system/calls/{reply.headers['X-Call-Id']}/request"
    shown = await ask(gateway.url, path, "Accept: application/json")
    written = "".join(chr(byte) if byte < 128 else f"%{byte:02X}" for byte in TARGET)
    assert json.loads(shown.body)["target"] == written


@pytest.mark.unmeasured
async def test_requests_with_such_targets_may_follow_each_other_in_any_pieces(gateway: Daemon, lines: Lines) -> None:
    """Together in one piece, byte by byte, and in pieces that begin in one request and end in another."""
    requests = [post(b"function", b"near", b"/%d\xe9" % number, last=number == 3) for number in range(4)]
    whole = b"".join(requests)
    for size in (len(whole), 1, *range(40, 160)):
        async with connection(gateway.url) as (reader, writer):
            for at in range(0, len(whole), size):
                writer.write(whole[at : at + size])
                await writer.drain()
                await asyncio.sleep(0)
            answers = await asyncio.wait_for(reader.read(), PATIENCE)
        assert answers.count(b"HTTP/1.1 200 OK") == 4, size
        assert [await lines.next() for _ in requests] == [b"POST /base/%d\xe9 HTTP/1.1" % n for n in range(4)]


async def test_what_comes_before_such_a_target_may_have_any_form(gateway: Daemon, lines: Lines) -> None:
    """A body in chunks, with anything in it; and none, with the next request's line cut anywhere."""
    last = post(b"function", b"near", b"/\xe9")
    chunked = b"POST /function/program HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b"7\r\n\xff\r\n\r\n\xfe\xfd\r\n0\r\nX-Last: \xe9\r\n\r\n"
    bare = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    pieces = [[chunked + last], [chunked * 3 + last]]
    pieces += [[(bare + last)[:at], (bare + last)[at:]] for at in range(len(bare), len(bare) + 20)]
    for sent in pieces:
        async with connection(gateway.url) as (reader, writer):
            for piece in sent:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            answers = await asyncio.wait_for(reader.read(), PATIENCE)
        assert answers.count(b"HTTP/1.1 200 OK") == b"".join(sent).count(b"Host"), sent
        assert await lines.next() == b"POST /base/\xe9 HTTP/1.1"


@pytest.mark.parametrize("length", [0, 1, 6, 7, 1 << 20])
def test_a_piece_of_a_body_is_parsed_once(length: int) -> None:
    """Not again and again with nothing, until all of the body has come."""
    data = b"\xff\x00\xfe/ \xe9"
    parsed: list[bytes] = []
    for piece, _ in faasd_async.AsciiTargets().pieces(data, lambda: max(0, length - sum(map(len, parsed)))):
        parsed.append(piece)
    assert b"".join(parsed) == data
    assert len(parsed) <= 2


async def test_in_routes_of_our_own_such_bytes_are_what_they_are_in_percent(gateway: Daemon) -> None:
    """No id, function or route has them: that is told as of any other."""
    for line, status in {
        b"GET /system/calls/\xe9": 404,
        b"GET /system/calls?function=\xff": 200,
        b"GET /system/calls?limit=\xc3\xa9": 400,
        b"DELETE /async-function/\xff\xfe": 404,
        b"POST /function/\xe9": 404,
        b"GET /caf\xe9": 404,
        b"GET /%bytes%/healthz": 404,
    }.items():
        reply = await raw(gateway.url, line + b" HTTP/1.1\r\nHost: gateway.example\r\nConnection: close\r\n\r\n")
        assert reply.status == status, line
        with contextlib.suppress(UnicodeDecodeError):
            assert "internal error" not in reply.body.decode()
    assert (await raw(gateway.url, post(b"r/\xff\xe9", b"near"))).status == 200


async def test_such_a_target_may_be_as_long_as_any_other(gateway: Daemon, lines: Lines) -> None:
    """32 KiB, and 414 for one byte more; a header that looks like a target is a header."""
    start = b"/function/near/"
    for extra, status in ((0, 200), (1, 414)):
        target = b"/" + b"\xe9" * (2**15 - len(start)) + b"x" * extra
        assert (await raw(gateway.url, post(b"function", b"near", target))).status == status
        if status == 200:
            assert await lines.next() == b"POST /base%b HTTP/1.1" % target
    assert (await raw(gateway.url, post(b"function", b"near", b"/" + b"\xe9" * 2**18))).status == 414
    long = post(b"function", b"near").replace(b"\r\n", b"\r\nX-Long: /%b\r\n" % (b"x" * 2**16), 1)
    assert (await raw(gateway.url, long)).status == 431
