"""Clients that are slow, many, broken or malicious: they get what they deserve, and everybody else gets an answer."""

import asyncio
import contextlib
import os
import re
import resource
import socket
import struct
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import PATIENCE, Daemon, Gate, Reply, Server, StartDaemon, ask, connection, open_files, parse

LONG = bool(os.environ.get("FAASD_ASYNC_LONG_TESTS"))  # the same with the sizes of the real world
MIB = 2**20


@pytest.fixture
async def gateway(daemon: StartDaemon, function: Server) -> Daemon:
    """A daemon with one function, `echo`."""
    return await daemon(f'[functions.echo]\nurl = "{function.url}"')


def memory(daemon: Daemon, name: str) -> int:
    """VmRSS (now) or VmHWM (the most there ever was) of the daemon, in bytes."""
    (line,) = re.findall(rf"{name}:\s+(\d+) kB", Path(f"/proc/{daemon.pid}/status").read_text())
    return int(line) * 1024


async def until_files(daemon: Daemon, number: int) -> None:
    """Wait until the daemon has no more than so many descriptors."""
    async with asyncio.timeout(PATIENCE):
        while len(open_files(daemon.pid)) > number:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def everything(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection is closed, in whatever way."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := await asyncio.wait_for(reader.read(2**16), PATIENCE):
            received += piece
    return received


def replies(data: bytes) -> list[Reply]:
    """The answers on one connection, each with its length told."""
    found = []
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        reply = parse(head + end)
        length = 0 if reply.status == 100 else int(reply.headers["Content-Length"])
        found.append(Reply(reply.status, reply.headers, rest[:length]))
        data = rest[length:]
    return found


# ---- slow ------------------------------------------------------------------------------------------------------

SLOW = 2000


@pytest.mark.unmeasured
async def test_thousands_that_drip_their_headers_do_not_keep_others_from_being_served(
    daemon: StartDaemon, function: Server
) -> None:
    """However often a byte comes: after `read_timeout` the connection is closed, and nothing is left of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, SLOW * 2), max(hard, SLOW * 2)))
    gateway = await daemon(f'[gateway]\nread_timeout = "3s"\n[functions.echo]\nurl = "{function.url}"')
    before = len(open_files(gateway.pid))
    address = ("127.0.0.1", urlsplit(gateway.url).port)
    head = b"POST /async-function/echo HTTP/1.1\r\nX-Slow: "
    clients = [socket.create_connection(address) for _ in range(SLOW)]
    try:
        for client in clients:
            client.sendall(head)
        open_at_once = len(open_files(gateway.pid)) - before
        dripping, served = set(clients), 0
        while dripping:
            for client in list(dripping):
                try:
                    client.send(b"x")
                except OSError:
                    dripping.discard(client)
            assert (await ask(gateway.url, "/function/echo", "X-Quick: yes")).status == 200
            served += 1
        assert open_at_once > SLOW // 2
        assert served > 5
        assert {request.headers.get("X-Quick") for request in function.requests} == {"yes"}
        await until_files(gateway, before + 4)  # with those of kept connections
    finally:
        for client in clients:
            client.close()


BODIES = {
    "half of its length": b"Content-Length: 10\r\n\r\nhalf",
    "nothing of its length": b"Content-Length: 10\r\n\r\n",
    "half a chunk": b"Transfer-Encoding: chunked\r\n\r\na\r\nhalf",
    "half a chunk's length": b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n1",
    "no last chunk": b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    "no end after the last chunk": b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n",
    "an endless trailer": b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\nX-T: ",
}


@pytest.mark.parametrize("end", ["waits", "drips", "closes", "resets"])
async def test_a_call_whose_body_never_ends_is_not_queued(daemon: StartDaemon, function: Server, end: str) -> None:
    """Whatever is missing and however the client goes on: 408 or a closed connection, and no call."""
    gateway = await daemon(f'[gateway]\nread_timeout = "500ms"\n[functions.echo]\nurl = "{function.url}"')
    before = len(open_files(gateway.pid))

    async def client(body: bytes) -> int | None:
        async with connection(gateway.url) as (reader, writer):
            writer.write(b"POST /async-function/echo HTTP/1.1\r\nHost: x\r\n" + body)
            await writer.drain()
            if end == "closes":
                return None
            if end == "resets":
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return None
            dripping = asyncio.create_task(drip(writer) if end == "drips" else asyncio.sleep(0))
            first_line = await asyncio.wait_for(reader.readline(), PATIENCE)
            dripping.cancel()
            return int(first_line.split()[1]) if first_line else None

    async def drip(writer: asyncio.StreamWriter) -> None:
        for _ in range(5):  # so few that not even a length of 10 is reached
            writer.write(b"1")
            await asyncio.sleep(0.05)

    statuses = await asyncio.gather(*map(client, BODIES.values()))
    assert {None, 400, 408} >= set(statuses)
    if end == "waits":
        assert dict(zip(BODIES, statuses, strict=True)) == dict.fromkeys(BODIES, 408)
    await until_files(gateway, before + 1)
    assert (await ask(gateway.url, "/system/calls")).body == b'{"calls": [], "next_cursor": null}\n'
    assert function.requests == []


@pytest.mark.parametrize("answer", ["whole", "endless"])
async def test_a_client_that_takes_nothing_is_cut_off(daemon: StartDaemon, answer: str) -> None:
    """After `write_timeout`, whether its answer lies here or comes in; and so is the function that still sends."""
    cut = asyncio.Event()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(2**16))
                await writer.drain()
        cut.set()

    async with await asyncio.start_server(endless, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        gateway = await daemon(f"""
            [gateway]
            write_timeout = "500ms"
            [functions.endless]
            url = "http://127.0.0.1:{port}"
            [functions.whole]
            command = ["head", "-c", "12MB", "/dev/zero"]
        """)
        await ask(gateway.url, "/healthz")  # With the first client the event loop opens a file.
        before = len(open_files(gateway.pid))
        with socket.create_connection(("127.0.0.1", urlsplit(gateway.url).port)) as client:
            client.sendall(b"GET /function/%b HTTP/1.1\r\nHost: x\r\n\r\n" % answer.encode())
            assert await asyncio.to_thread(client.recv, 1) == b"H"
            await until_files(gateway, before)
            if answer == "endless":
                await asyncio.wait_for(cut.wait(), PATIENCE)


# ---- two calls out of one --------------------------------------------------------------------------------------

GET = b"GET /function/echo HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /function/echo/one HTTP/1.1\r\nHost: x\r\n"
SMUGGLED = b"GET /function/echo/two HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LENGTH = b"Content-Length: 5\r\n"

# Requests whose end two parties could see in two places, each followed by what would be the second request.
AMBIGUOUS = {
    "length and chunks": POST + b"Content-Length: 6\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "chunks and length": POST + CHUNKED + b"Content-Length: 6\r\n\r\n0\r\n\r\n",
    "two lengths": POST + LENGTH + b"Content-Length: 0\r\n\r\nhello",
    "the same length twice": POST + LENGTH + LENGTH + b"\r\nhello",
    "a list of lengths": POST + b"Content-Length: 5, 5\r\n\r\nhello",
    "a length with a sign": POST + b"Content-Length: +5\r\n\r\nhello",
    "a negative length": POST + b"Content-Length: -5\r\n\r\nhello",
    "a length in hex": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "a length with an underscore": POST + b"Content-Length: 0_5\r\n\r\nhello",
    "an empty length": POST + b"Content-Length: \r\n\r\n",
    "a length beyond all numbers": POST + b"Content-Length: 99999999999999999999999\r\n\r\nhello",
    "space before the colon of the length": POST + b"Content-Length : 5\r\n\r\nhello",
    "space before the colon of the coding": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "an unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "the coding that is none": POST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunks before the last coding": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "the coding twice": POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n",
    "the coding twice in a list": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "a vertical tab before the coding": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "the coding in quotes": POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "a negative chunk": POST + CHUNKED + b"\r\n-1\r\n\r\n",
    "a chunk's length with 0x": POST + CHUNKED + b"\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "a chunk's length with a sign": POST + CHUNKED + b"\r\n+5\r\nhello\r\n0\r\n\r\n",
    "a chunk's length that is no number": POST + CHUNKED + b"\r\nzz\r\nhello\r\n0\r\n\r\n",
    "a chunk's length beyond all numbers": POST + CHUNKED + b"\r\nfffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "a chunk longer than its length": POST + CHUNKED + b"\r\n5\r\nhelloworld\r\n0\r\n\r\n",
    "space after a chunk's length": POST + CHUNKED + b"\r\n5 \r\nhello\r\n0\r\n\r\n",
    "chunks that end in a bare line feed": POST + CHUNKED + b"\r\n5\nhello\n0\n\n",
    "an extension that ends in a bare line feed": POST + CHUNKED + b"\r\n5;a\nhello\r\n0\r\n\r\n",
    "a length in the trailer": POST + CHUNKED + b"\r\n0\r\nContent-Length : 5\r\n\r\n",
    "a folded header": POST + b"X-A: b\r\n c\r\n\r\n",
    "a coding in a folded header": POST + b"X-A: b\r\n Transfer-Encoding: chunked\r\n\r\n",
    "a first header that is folded": POST.replace(b"Host", b" Host") + b"\r\n",
    "bare line feeds": POST.replace(b"\r\n", b"\n") + b"Content-Length: 0\n\n",
    "a bare carriage return": POST + b"X-A: b\rContent-Length: 5\r\n\r\n",
    "a zero byte": POST + b"X-A: b\0c\r\n\r\n",
    "a header without a colon": POST + b"What\r\n\r\n",
    "a header without a name": POST + b": x\r\n\r\n",
    "a header's name with a space": POST + b"X A: x\r\n\r\n",
    "a target with a space": POST.replace(b"one", b"one two") + b"\r\n",
    "no version": b"POST /function/echo/one\r\n",
    "a version that does not exist": POST.replace(b"1.1", b"1.2") + b"\r\n",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


async def test_a_request_that_could_be_read_in_two_ways_is_refused(gateway: Daemon, function: Server) -> None:
    """400 and the end of the connection. Behind a proxy that reads it the other way, it would be a second call."""
    wrong = {}
    for route in (b"function", b"async-function"):
        for name, request in AMBIGUOUS.items():
            async with connection(gateway.url) as (reader, writer):
                writer.write(request.replace(b"/function/", b"/" + route + b"/", 1) + SMUGGLED)
                found = replies(await everything(reader))
            if [reply.status for reply in found] != [400]:
                wrong[route, name] = found
            assert all(reply.body.count(b"\n") == 1 for reply in found), name
    assert wrong == {}
    await gateway.terminate()  # what was queued would have run by then
    assert [request.target for request in function.requests if request.target != "/one"] == []
    assert [request.body for request in function.requests if request.body] == []


NOT_HERE = {
    "a coding that is not ours": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "chunks in HTTP/1.0": (
        POST.replace(b"1.1", b"1.0") + b"Connection: keep-alive\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
        400,
    ),
    "an unknown method": (POST.replace(b"POST", b"BREW") + b"Content-Length: 0\r\n\r\n", 501),
    "a tunnel": (POST.replace(b"POST", b"CONNECT") + b"Content-Length: 0\r\n\r\n", 501),
    "another version": (POST.replace(b"1.1", b"2.0") + b"Content-Length: 0\r\n\r\n", 505),
    "a version before headers": (POST.replace(b"1.1", b"0.9") + b"Content-Length: 0\r\n\r\n", 505),
}


async def test_what_gateways_do_not_do_is_refused(gateway: Daemon, function: Server) -> None:
    """RFC 9112 6.1, and tunnels: refused in one line, and nothing of it reaches a function."""
    for name, (request, status) in NOT_HERE.items():
        async with connection(gateway.url) as (reader, writer):
            writer.write(request)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        assert parse(head).status == status, name
        assert parse(head).headers["Connection"] == "close", name
        assert head.startswith(b"HTTP/1.0" if b"HTTP/1.0" in request else b"HTTP/1.1"), name
    assert function.requests == []


SLIPS = {
    "bare line feeds": (b"GET /healthz HTTP/1.1\nHost: localhost\n\n", "Expected CRLF after version"),
    "no colon": (b"GET /healthz HTTP/1.1\r\nWhat\r\n\r\n", "Invalid header token"),
    "a space": (b"GET /function/a b HTTP/1.1\r\n\r\n", "Expected HTTP/"),
    "a folded header": (b"GET /healthz HTTP/1.1\r\nX: secret\r\n secret\r\n\r\n", "Unexpected whitespace"),
    "a method in small letters": (b"get /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", "in capitals"),
    "a bad chunk": (POST + CHUNKED + b"\r\nzz\r\n", "Invalid character in chunk size"),
}


@pytest.mark.parametrize("name", SLIPS)
async def test_who_writes_a_request_by_hand_is_told_what_is_wrong_with_it(gateway: Daemon, name: str) -> None:
    """In the one line that says that it is no valid request, which repeats nothing of what was sent."""
    request, reason = SLIPS[name]
    async with connection(gateway.url) as (reader, writer):
        writer.write(request)
        (reply,) = replies(await everything(reader))
    assert reason in reply.body.decode()
    assert reply.body.count(b"\n") == 1
    assert b"secret" not in reply.body


CLEAR = {
    "plain": (POST + b"Content-Length: 0\r\n\r\n", 0),
    "a blank line before": (b"\r\n\r\n" + POST + b"Content-Length: 0\r\n\r\n", 0),
    "chunks": (POST + CHUNKED + b"\r\n5\r\nhello\r\n0\r\n\r\n", 5),
    "chunks in capitals": (POST + b"TRANSFER-ENCODING: CHUNKED\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 5),
    "a chunk's extension": (POST + CHUNKED + b'\r\n5;a="\r"\r\nhello\r\n0\r\n\r\n'.replace(b'\r"\r\n', b'b"\r\n'), 5),
    "a wish for a websocket": (POST + b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n", 0),
    "an unknown expectation": (POST + b"Expect: wonders\r\nContent-Length: 0\r\n\r\n", 0),
    "a request in a body": (POST + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED, len(SMUGGLED)),
    "a length that Connection names": (POST + b"Connection: content-length\r\n" + LENGTH + b"\r\nhello", 5),
}


async def test_requests_that_follow_each_other_stay_apart(gateway: Daemon, function: Server) -> None:
    """What is a body here is a body there, and each call reaches the function with exactly one framing."""
    for name, (request, length) in CLEAR.items():
        for route in (b"function", b"async-function"):
            function.requests.clear()
            async with connection(gateway.url) as (reader, writer):
                writer.write(request.replace(b"/function/", b"/" + route + b"/", 1) + SMUGGLED)
                found = replies(await everything(reader))
            assert [reply.status for reply in found] == [200 if route == b"function" else 202, 200], (name, found)
            calls = sorted((seen.target, len(seen.body)) for seen in await function.wait_for(2))
            assert calls == [("/one", length), ("/two", 0)], name
            for seen in function.requests:
                framing = [key for key in seen.headers if key.lower() in ("content-length", "transfer-encoding")]
                assert len(framing) == (seen.method == "POST"), (name, seen.headers)


async def test_requests_by_the_hundred_are_answered_in_their_order(gateway: Daemon, function: Server) -> None:
    """All in one piece; and that after many whose bodies came behind their heads, which count no longer."""
    requests = [POST.replace(b"/one", b"/%d" % number) + LENGTH + b"\r\nhello" for number in range(130)]
    async with connection(gateway.url) as (reader, writer):

        async def answered() -> int:
            reply = parse(await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE))
            await reader.readexactly(int(reply.headers.get("Content-Length", 0)))
            return reply.status

        for request in requests[:30]:
            writer.write(request.removesuffix(b"\r\nhello") + b"Expect: 100-continue\r\n\r\n")
            assert await answered() == 100
            writer.write(b"hello")
            assert await answered() == 200
        writer.write(b"".join(requests[30:]))
        assert [await answered() for _ in requests[30:]] == [200] * 100
    assert [seen.target for seen in function.requests] == [f"/{number}" for number in range(130)]
    assert {seen.body for seen in function.requests} == {b"hello"}


@pytest.mark.parametrize("ahead", [14, 15, 16, 31, 32])
async def test_a_body_behind_many_requests_is_read(gateway: Daemon, function: Server, ahead: int) -> None:
    """However many requests stand before it: it may come when these are answered."""
    async with connection(gateway.url) as (reader, writer):
        writer.write((GET + b"\r\n") * ahead + POST + LENGTH + b"\r\n")
        for _ in range(ahead):
            await asyncio.wait_for(reader.readuntil(b"HTTP/1.1 200 "), PATIENCE)
        writer.write(b"hello")
        await asyncio.wait_for(reader.readuntil(b"HTTP/1.1 200 "), PATIENCE)
    assert function.requests[-1].body == b"hello"


@pytest.mark.unmeasured
@pytest.mark.parametrize("first", [GET + b"\r\n", POST + LENGTH + b"\r\nhello"], ids=["GET", "POST"])
@pytest.mark.parametrize("ahead", [14, 16, 20, 31, 40])
async def test_a_body_that_looks_like_a_request_stays_one(
    gateway: Daemon, function: Server, first: bytes, ahead: int
) -> None:
    """Also behind so many requests that its head waits to be parsed: it is not changed, and nothing of it is run."""
    body = b"GET /function/echo/\xff HTTP/1.1\r\nHost: x\r\n\r\n"
    function.behaviour = gate = Gate()
    async with connection(gateway.url) as (reader, writer):
        writer.write(first * ahead + POST + b"Content-Length: %d\r\n\r\n" % len(body))
        await function.wait_for(1)
        writer.write(body + GET + b"Connection: close\r\n\r\n")
        gate.open()
        answers = await everything(reader)
    assert re.findall(rb"HTTP/1\.1 (\d+)", answers) == [b"200"] * (ahead + 2)
    assert [seen.body for seen in function.requests[ahead:]] == [body, b""]


# ---- too much --------------------------------------------------------------------------------------------------

BOMBS = {
    "a thousand headers": GET + b"X-Many: x\r\n" * 1000 + b"\r\n",
    "a thousand headers without names": GET + b": x\r\n" * 1000 + b"\r\n",
    "a megabyte of a header": GET + b"X-Long: " + bytes(MIB).replace(b"\0", b"x") + b"\r\n\r\n",
    "a megabyte of a header's name": GET + bytes(MIB).replace(b"\0", b"x") + b": x\r\n\r\n",
    "a megabyte of a path": b"GET /function/echo/" + bytes(MIB).replace(b"\0", b"x") + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a megabyte of a method": bytes(MIB).replace(b"\0", b"X") + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a megabyte of blank lines": b"\r\n" * (MIB // 2),
    "a megabyte of trailers": POST + CHUNKED + b"\r\n0\r\n" + b"X-Many: x\r\n" * (MIB // 11) + b"\r\n",
}


async def test_a_bomb_of_headers_is_refused_and_not_kept(daemon: StartDaemon, function: Server) -> None:
    """Twenty of each at once: a line for each that can be told, and nothing of them stays in memory."""
    gateway = await daemon(f'[gateway]\nread_timeout = "1s"\n[functions.echo]\nurl = "{function.url}"')

    async def client(bomb: bytes) -> int | None:
        async with connection(gateway.url) as (reader, writer):
            receiving = asyncio.create_task(everything(reader))
            with contextlib.suppress(ConnectionError):
                writer.write(bomb)
                await writer.drain()
            found = await receiving
            return parse(found).status if found else None

    assert (await ask(gateway.url, "/function/echo")).status == 200
    before = memory(gateway, "VmRSS")
    for name, bomb in BOMBS.items():
        assert {400, 414, 431, None} >= set(await asyncio.gather(*[client(bomb) for _ in range(20)])), name
    assert memory(gateway, "VmRSS") - before < 32 * MIB
    assert len(function.requests) == 1
    assert (await ask(gateway.url, "/function/echo")).status == 200


STRANGERS = 100_000 if LONG else 5_000


@pytest.mark.unmeasured
async def test_names_of_no_functions_leave_nothing_behind(gateway: Daemon) -> None:
    """Somebody who tries all names makes neither the memory nor the metrics grow."""

    async def metrics() -> bytes:
        body = (await ask(gateway.url, "/metrics")).body
        return b"\n".join(sorted(line.rpartition(b" ")[0] for line in body.splitlines()))

    async def client(first: int, last: int) -> None:
        async with connection(gateway.url) as (reader, writer):
            for start in range(first, last, 100):
                names = range(start, min(start + 100, last))
                for name in names:
                    route = b"async-function" if name % 2 else b"function"
                    writer.write(
                        b"POST /%s/stranger-%d HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" % (route, name)
                    )
                for _ in names:
                    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
                    assert parse(head).status == 404
                    await reader.readexactly(int(parse(head).headers["Content-Length"]))

    await client(0, 1000)
    names, before = await metrics(), memory(gateway, "VmRSS")
    await asyncio.gather(*[client(start, start + STRANGERS // 4) for start in range(0, STRANGERS, STRANGERS // 4)])
    growth = memory(gateway, "VmRSS") - before
    print(f"{STRANGERS} names: memory grew by {growth >> 10} KiB")
    assert growth < 4 * MIB
    assert await metrics() == names
