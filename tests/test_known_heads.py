"""Requests whose heads came before, byte by byte: what is known of a head is true of each, and of nothing else."""

import asyncio
import contextlib
import json
import re
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from conftest import PATIENCE, Daemon, Server, StartDaemon, connection

import faasd_async

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


# ---- calls that are stored without more ado: those whose heads are known --------------------------

QUEUES = '[queues.held]\nmax_pending = {most}\n[functions.echo]\nurl = "{url}"\nqueue = "held"\n'


class Client:
    """A connection on which one request follows the other's answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, request: bytes) -> None:
        """Send a request in one piece."""
        self._writer.write(request)

    def send_last(self, request: bytes) -> None:
        """Send a request, and no more."""
        self._writer.write(request)
        self._writer.write_eof()

    async def answer(self) -> tuple[int, bytes, bytes]:
        """The next answer: status, head, body."""
        async with asyncio.timeout(PATIENCE):
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            body = await self._reader.readexactly(int(length[1])) if length else b""
        return int(head.split()[1]), head, body

    async def ask(self, request: bytes) -> tuple[int, bytes, bytes]:
        """Send a request, and wait for its answer."""
        self.send(request)
        return await self.answer()

    async def ends(self) -> bool:
        """Whether nothing comes but the end."""
        return await asyncio.wait_for(self._reader.read(), PATIENCE) == b""


@contextlib.asynccontextmanager
async def client(gateway: Daemon) -> AsyncIterator[Client]:
    """A client that is connected."""
    async with connection(gateway.url) as (reader, writer):
        yield Client(reader, writer)


def queued(body: bytes = b"abc", *lines: bytes) -> bytes:
    """A request for a call, with more headers."""
    head, _, rest = post(body, route=b"async-function").partition(b"\r\n\r\n")
    return b"\r\n".join([head, *lines]) + b"\r\n\r\n" + rest


async def pause(gateway: Daemon) -> None:
    """Have the calls wait."""
    async with gateway.http.post(f"{gateway.url}/system/queues/held/pause") as response:
        assert response.status == 200


async def reload(gateway: Daemon, settings: str) -> None:
    """Give it other settings."""
    gateway.configure(settings)
    first_line = len(gateway.lines)
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("configuration reloaded", first_line)


async def test_the_same_request_is_told_each_time_what_is_wrong(daemon: StartDaemon, function: Server) -> None:
    """What follows from the head is known; whether there is room for the call is not."""
    gateway = await daemon(QUEUES.format(most=3, url=function.url))
    await pause(gateway)
    async with client(gateway) as caller:
        for body in (b"abc", b""):
            answers = [await caller.ask(queued(body)) for _ in range(5)]
            full = 3 if body else 0
            assert [status for status, _, _ in answers] == [202] * full + [429] * (5 - full)
        assert b"Retry-After" in answers[-1][1] and b"full" in answers[-1][2]
        for line in (b"X-Delay: soon", b"X-Callback-Url: nowhere", b"X-Queue: none", b"X-Max-Attempts: many"):
            for _ in range(3):
                status, _, body = await caller.ask(queued(b"abc", line))
                assert status == 400 and line.split(b":")[0] in body
        assert (await caller.ask(LAST))[0] == 200


async def test_what_a_known_head_asks_for_is_done_for_each_call(gateway: Daemon, function: Server) -> None:
    """Its controls, and the form of the answer."""
    lines = (b"X-Delay: 1h", b"X-Max-Attempts: 7", b"Accept: application/json")
    async with client(gateway) as caller:
        for _ in range(3):
            status, head, body = await caller.ask(queued(b"abc", *lines))
            call_id = json.loads(body)["call_id"]
            assert status == 202 and b"X-Call-Id: %b\r\n" % call_id.encode() in head
            record = await gateway.record(call_id)
            assert (record["status"], record["max_attempts"]) == ("delayed", 7)


async def test_a_reload_changes_what_is_known(daemon: StartDaemon, function: Server) -> None:
    """The function has another queue, then it is gone, then it is back."""
    settings = QUEUES.format(most=100, url=function.url)
    gateway = await daemon(settings)
    await pause(gateway)
    async with client(gateway) as caller:
        assert [(await caller.ask(queued()))[0] for _ in range(3)] == [202] * 3
        await reload(gateway, settings.replace("held", "other"))
        _, _, body = await caller.ask(queued(b"abc", b"Accept: application/json"))
        assert (await gateway.record(json.loads(body)["call_id"]))["queue"] == "other"
        await reload(gateway, "[functions.other]\ncommand = ['true']")
        assert [(await caller.ask(queued()))[0] for _ in range(2)] == [404] * 2
        await reload(gateway, settings)
        assert [(await caller.ask(queued()))[0] for _ in range(2)] == [202] * 2


async def test_a_reload_forbids_what_a_known_head_asks_for(daemon: StartDaemon, function: Server) -> None:
    """Its callback may not be sent any more."""
    settings = QUEUES.format(most=100, url=function.url)
    gateway = await daemon(settings)
    await pause(gateway)
    asked = queued(b"abc", b"X-Callback-Url: http://192.0.2.1/")
    async with client(gateway) as caller:
        assert [(await caller.ask(asked))[0] for _ in range(3)] == [202] * 3
        await reload(gateway, settings + "\n[callback]\ndeny = ['192.0.2.0/24']")
        answers = [await caller.ask(asked) for _ in range(2)]
        assert [status for status, _, _ in answers] == [400] * 2
        assert b"deny" in answers[0][2]


async def test_a_body_that_is_too_long_is_so_each_time(daemon: StartDaemon, function: Server) -> None:
    """One byte more than gateway.max_payload."""
    gateway = await daemon(f"[gateway]\nmax_payload = 3\n{QUEUES.format(most=100, url=function.url)}")
    async with client(gateway) as caller:
        for body, status in ((b"abc", 202), (b"abcd", 413)):
            assert [(await caller.ask(queued(body)))[0] for _ in range(3)] == [status] * 3


async def test_a_call_of_a_client_that_has_gone_is_counted(daemon: StartDaemon, function: Server) -> None:
    """It may have left before its 202; the call is stored all the same."""
    gateway = await daemon(QUEUES.format(most=100, url=function.url))
    await pause(gateway)
    for _ in range(10):
        async with client(gateway) as caller:
            assert (await caller.ask(queued()))[0] == 202
            caller.send(queued())
    counted = 'queue_worker_messages_submitted_total{queue_name="held"} 20.0'
    async with asyncio.timeout(PATIENCE):
        while True:
            async with gateway.http.get(f"{gateway.url}/metrics") as response:
                if counted in await response.text():
                    break


async def test_who_sends_no_more_gets_the_last_answer(daemon: StartDaemon, function: Server) -> None:
    """The sending side is closed right behind the request; its end follows the answer."""
    gateway = await daemon(QUEUES.format(most=100, url=function.url))
    await pause(gateway)
    async with client(gateway) as caller:
        assert (await caller.ask(queued()))[0] == 202
        caller.send_last(queued() + queued())
        assert [(await caller.answer())[0] for _ in range(2)] == [202] * 2
        assert await caller.ends()


async def test_while_the_queue_is_taken_away_the_same_request_is_refused(daemon: StartDaemon, function: Server) -> None:
    """503, and 202 again once it is back; the log tells of both."""
    gateway = await daemon(QUEUES.format(most=100, url=function.url))
    await pause(gateway)
    aside = gateway.store.with_name("aside.db")
    async with client(gateway) as caller:
        assert [(await caller.ask(queued()))[0] for _ in range(3)] == [202] * 3
        gateway.store.rename(aside)
        for _ in range(3):
            status, head, body = await caller.ask(queued())
            assert status == 503 and b"Retry-After" in head and b"can't store" in body
        aside.rename(gateway.store)
        assert [(await caller.ask(queued()))[0] for _ in range(3)] == [202] * 3
    await gateway.wait_for_log("calls are stored again: 3 requests were refused")


async def test_an_error_of_ours_is_answered_and_told(daemon: StartDaemon, function: Server) -> None:
    """500 to this request, and the next one is answered."""
    break_once = (
        "\ndef broken(*arguments, real=faasd_async.accepted_lines, times=iter(range(4))):"
        "\n    if next(times) == 2:"
        "\n        raise KeyError('a mistake')"
        "\n    return real(*arguments)"
        "\nfaasd_async.accepted_lines = broken"
    )
    gateway = await daemon(QUEUES.format(most=100, url=function.url), before=break_once)
    async with client(gateway) as caller:
        assert [(await caller.ask(queued()))[0] for _ in range(4)] == [202, 202, 500, 202]
    await gateway.wait_for_log("request failed in this program itself")
    await gateway.wait_for_log("KeyError: 'a mistake'")
    gateway.lines.remove(await gateway.wait_for_log("Traceback"))


@pytest.mark.unmeasured
@pytest.mark.parametrize("size", [0, 3, 1000])
async def test_many_on_one_connection_are_answered_in_their_order(
    daemon: StartDaemon, function: Server, size: int
) -> None:
    """In pieces of their own, without waiting for answers: each gets the id of a call with its body."""
    gateway = await daemon(QUEUES.format(most=10_000, url=function.url))
    await pause(gateway)
    bodies = [b"%d" % number * (size and 1 + size // 3) for number in range(100, 160)]
    async with client(gateway) as caller:
        for body in bodies:
            caller.send(queued(body if size else b""))
            await asyncio.sleep(0)
        ids = []
        for _ in bodies:
            status, head, _ = await caller.answer()
            assert status == 202
            ids.append(re.findall(rb"X-Call-Id: (\S+)", head)[0].decode())
    for call_id, body in zip(ids, bodies, strict=True):
        async with gateway.http.get(f"{gateway.url}/system/calls/{call_id}/request") as response:
            assert await response.read() == (body if size else b"")


class Slow:
    """An application that takes its time to store something."""

    def __init__(self) -> None:
        self.storing: asyncio.Future[str] | None = None

    async def answer(self, http: faasd_async.Exchange) -> faasd_async.Response:
        """The first time."""
        http.head.prompt = True
        return faasd_async.reply("ok")

    def store(self, http: faasd_async.Exchange) -> faasd_async.Storing:
        """From then on."""
        self.storing = asyncio.get_running_loop().create_future()
        return faasd_async.Storing(http, cast(Any, None), self.storing, cast(Any, None))

    def stored(self, storing: faasd_async.Storing) -> faasd_async.Response:
        """In the end."""
        return faasd_async.reply("stored")

    def given_up(self, http: faasd_async.Exchange) -> faasd_async.Response:
        """At the stop."""
        return faasd_async.reply("given up", 503)


async def test_what_is_stored_while_its_connection_is_closed_disturbs_nobody() -> None:
    """The task of the connection has been cancelled, and is not woken any more."""
    loop = asyncio.get_running_loop()
    errors: list[Any] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    application = Slow()
    server = faasd_async.Server(application, PATIENCE, PATIENCE)
    sock = socket.create_server(("127.0.0.1", 0))
    server.listen(sock)
    async with connection(f"http://127.0.0.1:{sock.getsockname()[1]}") as (reader, writer):
        writer.write(post(b""))
        await reader.readuntil(b"ok\n")
        writer.write(post(b""))
        async with asyncio.timeout(PATIENCE):
            while application.storing is None:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        loop.call_soon(application.storing.set_result, "id")  # Its callback waits when all is closed.
        await server.close()
        await asyncio.wait_for(reader.read(), PATIENCE)
    assert errors == []
