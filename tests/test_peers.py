"""Functions and receivers of callbacks that hang, drip, flood, break off or talk nonsense: who called is told, within
the time limit, and nobody else notices."""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Daemon, Names, Server, StartDaemon, ask, connection, deaf, parse

LONG = bool(os.environ.get("FAASD_ASYNC_LONG_TESTS"))  # the same with the sizes of the real world
MIB = 2**20
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def peer(serve: Serve) -> AsyncIterator[str]:
    """A server that does `serve` with each connection, and hangs up when that has ended."""
    tasks = set[asyncio.Task[None]]()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(task := asyncio.ensure_future(serve(reader, writer)))
        with contextlib.closing(writer):
            await asyncio.wait({task})
        tasks.discard(task)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()


def says(first: bytes, again: bytes | None = b"", pause: float = 0.0) -> Serve:
    """A peer that answers `first` and then `again` and again, with a pause between; None: it hangs up instead."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(first)
        while again is not None:
            writer.write(again)
            await writer.drain()
            await asyncio.sleep(pause if again else PATIENCE)

    return serve


def once_well(serve: Serve) -> Serve:
    """A peer that answers the first request on each connection well, before it does `serve`."""

    async def serve_both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + EMPTY)
        await serve(reader, writer)

    return serve_both


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
EMPTY = b"Content-Length: 0\r\n\r\n"
TOO_LONG_A_HEAD = "answered with headers longer than 131072 bytes"
LONG_HEADER = "answered with a header longer than 32768 bytes"
BROKEN, NO_HTTP = "broke off the connection", "did not answer in valid HTTP"
LATE = "did not answer within "  # and then the key that said for how long
UNCONNECTED, UNKNOWN = "no connection was made", "no name server answered"
UNENDED = "did not end its answer within "
QUEUE_LIMIT = "queues.faas-request.timeout (2s)"
QUEUE_LATE, CALLBACK_LATE = f"{LATE}{QUEUE_LIMIT}", f"{LATE}callback.timeout (2s)"

# What a peer does after it has read a request; the status that a sync caller sees (None: a 200 that does not look
# whole), and what the records of an async call and of a callback say.
PEERS: dict[str, tuple[Serve, int | None, str]] = {
    "hangs": (says(b""), 504, LATE),
    "drips-its-head": (says(OK + b"X-Long: ", b"x", 0.02), 504, LATE),
    "drips-its-body": (says(CHUNKED, b"1\r\nx\r\n", 0.02), None, UNENDED),
    "only-asks-for-more": (says(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01), 504, LATE),
    "hangs-up": (says(b"", None), 502, BROKEN),
    "breaks-off-in-the-head": (says(OK + b"Content-Len", None), 502, BROKEN),
    "breaks-off-in-the-body": (says(OK + b"Content-Length: 9\r\n\r\nhalf", None), None, BROKEN),
    "breaks-off-in-a-chunk": (says(CHUNKED + b"9\r\nhalf", None), None, BROKEN),
    "one-endless-header": (says(OK + b"X-Long: ", b"x" * 4096), 502, LONG_HEADER),
    "headers-without-end": (says(OK, b"X-Many: " + b"x" * 4096 + b"\r\n"), 502, TOO_LONG_A_HEAD),
    "too-many-headers": (says(OK + b"X-Many: x\r\n" * 1000 + EMPTY, None), 502, "answered with more than 128 headers"),
    "no-http": (says(b"SSH-2.0-OpenSSH_9.6\r\n", None), 502, f"{NO_HTTP}: Expected HTTP/, RTSP/ or ICE/"),
    "no-head": (says(b"just text", None), 502, f"{NO_HTTP}: Expected HTTP/, RTSP/ or ICE/"),
    "two-lengths": (
        says(OK + b"Content-Length: 2\r\nContent-Length: 5\r\n\r\nhello", None),
        502,
        f"{NO_HTTP}: Duplicate Content-Length",
    ),
    "negative-length": (
        says(OK + b"Content-Length: -2\r\n\r\nhello", None),
        502,
        f"{NO_HTTP}: Invalid character in Content-Length",
    ),
    "length-and-coding": (
        says(OK + b"Transfer-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", None),
        502,
        f"{NO_HTTP}: Content-Length can't be present with Transfer-Encoding",
    ),
    "status-of-nothing": (says(b"HTTP/1.1 000 What\r\n" + EMPTY, None), 502, "answered 000, which is no answer"),
    "switches-protocols": (
        says(b"HTTP/1.1 101 Yes\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"),
        502,
        "answered 101, which is no answer",
    ),
    "a-later-version": (says(b"HTTP/1.2 200 OK\r\n" + EMPTY, None), 502, f"{NO_HTTP}: Invalid HTTP version"),
    "bad-chunk": (
        says(CHUNKED + b"zz\r\nhello\r\n0\r\n\r\n", None),
        None,
        f"{NO_HTTP}: Invalid character in chunk size",
    ),
    "two-digit-status": (says(b"HTTP/1.1 99 What\r\n" + EMPTY, None), 502, f"{NO_HTTP}: Invalid status code"),
    "header-without-colon": (says(OK + b"What\r\n" + EMPTY, None), 502, f"{NO_HTTP}: Invalid header token"),
    "zero-byte-in-a-header": (
        says(OK + b"X-Odd: a\0b\r\n" + EMPTY, None),
        502,
        f"{NO_HTTP}: Invalid HTTP header",
    ),
    "header-in-a-header": (
        says(OK + b"X-Odd: a\rSet-Cookie: b\r\n" + EMPTY, None),
        502,
        f"{NO_HTTP}: Missing expected LF after header value",
    ),
}

# What the record says of a call whose function does that.
CALLS = {
    name: ("timeout", 504, f"function {name} {why}{QUEUE_LIMIT}")
    if why in (LATE, UNENDED)
    else ("error", 502, f"function {name} {why}")
    for name, (_, _, why) in PEERS.items()
}

SAY_NO_STATUS = {"hangs", "only-asks-for-more", "hangs-up", "no-http", "no-head", "two-digit-status"}
SAY_NO_STATUS |= {"status-of-nothing", "switches-protocols"}

# What the record says of a callback to such a receiver: the status line decides, whatever follows.
CALLBACKS = {
    name: ("success", "delivered", 200, None)
    if name not in SAY_NO_STATUS
    else ("success", "failed", None, f"the callback URL {CALLBACK_LATE if why == LATE else why}")
    for name, (_, _, why) in PEERS.items()
}

# Heads that can be read, but should not be written.
ODD: dict[str, Serve] = {
    "escape-in-a-header": says(OK + b"X-Odd: \x1b[31m\x7f\r\n" + EMPTY, None),
    "escape-in-the-reason": says(b"HTTP/1.1 200 \x1b[31m\r\n" + EMPTY, None),
    "reason-that-is-no-text": says(b"HTTP/1.1 200 \xff\xfe\r\n" + EMPTY, None),
}

LIMITS = """
[gateway]
upstream_timeout = "2s"
[queues.faas-request]
timeout = "2s"
max_inflight = 100
[retry]
attempts = 1
[callback]
timeout = "2s"
attempts = 1
max_inflight = 100
"""


@pytest.fixture
async def peers() -> AsyncIterator[dict[str, str]]:
    """The URLs of all peers."""
    async with contextlib.AsyncExitStack() as stack:
        yield {name: await stack.enter_async_context(peer(serve)) for name, (serve, *_) in PEERS.items()}


@pytest.fixture
async def gateway(daemon: StartDaemon, function: Server, peers: dict[str, str]) -> Daemon:
    """A daemon with a function for each peer, one that is well, and little patience."""
    functions = {"well": function.url, **peers}
    return await daemon(LIMITS + "".join(f'[functions.{name}]\nurl = "{url}"\n' for name, url in functions.items()))


async def at_once(names: dict[str, Any], do: Callable[[str], Awaitable[Any]]) -> dict[str, Any]:
    """What `do` gives for each name, with all of them under way at the same time."""
    return dict(zip(names, await asyncio.gather(*map(do, names)), strict=True))


async def test_a_sync_caller_of_a_bad_function_is_told_in_time(gateway: Daemon, peers: dict[str, str]) -> None:
    """502 or 504 in one line or, when the head was out already, an answer that does not look whole."""

    async def call(name: str) -> int | None:
        async with connection(gateway.url) as (reader, writer):
            writer.write(f"GET /function/{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            reply = parse(await asyncio.wait_for(reader.read(), PATIENCE))
        if reply.status == 200:
            assert not reply.body.endswith(b"0\r\n\r\n")
            assert int(reply.headers.get("Content-Length", 10**9)) > len(reply.body)
            return None
        assert reply.body.decode().startswith(f"function {name} ")
        assert reply.body.count(b"\n") == 1
        return reply.status

    calls = asyncio.create_task(at_once(peers, call))
    assert (await ask(gateway.url, "/function/well")).status == 200
    assert await calls == {name: status for name, (_, status, _) in PEERS.items()}
    await gateway.wait_for_log(f"function drips-its-body {UNENDED}gateway.upstream_timeout (2s)")


@pytest.mark.unmeasured
async def test_the_record_of_a_call_of_a_bad_function_says_why(gateway: Daemon, peers: dict[str, str]) -> None:
    """`timeout` for what came too late, `error` with 502 for everything else; others run meanwhile."""

    async def call(name: str) -> tuple[str, int, str]:
        record = await gateway.final(await gateway.submit(name))
        return record["status"], record["http_status"], record["error"]

    calls = asyncio.create_task(at_once(peers, call))
    assert (await gateway.final(await gateway.submit("well")))["status"] == "success"
    assert await calls == CALLS


@pytest.mark.unmeasured
async def test_the_record_of_a_callback_to_a_bad_receiver_says_why(
    gateway: Daemon, peers: dict[str, str], sink: Server
) -> None:
    """The call is a success, and others get their callbacks."""

    async def call(name: str) -> tuple[str, str, int | None, str | None]:
        record = await gateway.final(await gateway.submit("well", X_Callback_Url=peers[name]))
        told = record["callback"]
        return record["status"], told["status"], told["http_status"], told["error"]

    calls = asyncio.create_task(at_once(peers, call))
    await gateway.submit("well", X_Callback_Url=sink.url)
    await sink.wait_for(1)
    assert await calls == CALLBACKS


@pytest.fixture
async def used(daemon: StartDaemon, function: Server) -> AsyncIterator[tuple[Daemon, dict[str, str]]]:
    """The same, but on each connection all is well once: the next request is sent on it where it is claimed."""
    async with contextlib.AsyncExitStack() as stack:
        peers = {name: await stack.enter_async_context(peer(once_well(serve))) for name, (serve, *_) in PEERS.items()}
        toml = "".join(f'[functions.{name}]\nurl = "{url}"\n' for name, url in {"well": function.url, **peers}.items())
        yield await daemon(LIMITS + toml, before="faasd_async.PROOF_S = 0.0"), peers


@pytest.mark.unmeasured
async def test_the_same_is_said_of_a_call_on_a_connection_that_was_used(used: tuple[Daemon, dict[str, str]]) -> None:
    """Whether an attempt has a task, or needs none until something is wrong, is nobody else's business."""
    gateway, peers = used

    async def call(name: str) -> tuple[str, int, str]:
        assert (await gateway.final(await gateway.submit(name)))["status"] == "success"
        record = await gateway.final(await gateway.submit(name))
        return record["status"], record["http_status"], record["error"]

    assert await at_once(peers, call) == CALLS


async def test_the_same_is_said_of_a_callback_on_a_connection_that_was_used(
    used: tuple[Daemon, dict[str, str]],
) -> None:
    """In its first delivery and in the next."""
    gateway, peers = used

    async def call(name: str) -> tuple[str, str, int | None, str | None]:
        record = await gateway.final(await gateway.submit("well", X_Callback_Url=peers[name]))
        assert record["callback"]["status"] == "delivered"
        record = await gateway.final(await gateway.submit("well", X_Callback_Url=peers[name]))
        told = record["callback"]
        return record["status"], told["status"], told["http_status"], told["error"]

    assert await at_once(peers, call) == CALLBACKS


async def test_a_refusal_counts_by_its_status_line(daemon: StartDaemon, function: Server) -> None:
    """Whether a callback is sent again follows from the status, however much of the head is missing or wrong."""
    async with contextlib.AsyncExitStack() as stack:
        cut = await stack.enter_async_context(peer(says(b"HTTP/1.1 404 Not Found\r\nX-Long", None)))
        wrong = await stack.enter_async_context(peer(says(b"HTTP/1.1 503 No\r\nWhat\r\n" + EMPTY, None)))
        gateway = await daemon(f'[callback]\nattempts = 2\nmin_wait = "0s"\n[functions.well]\nurl = "{function.url}"')
        for url, status, attempts in ((cut, 404, 1), (wrong, 503, 2)):
            told = (await gateway.final(await gateway.submit("well", X_Callback_Url=url)))["callback"]
            assert (told["status"], told["http_status"], told["attempts"]) == ("failed", status, attempts)


async def test_a_head_that_is_odd_does_not_get_the_daemon_into_trouble(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """It is passed on without what is not allowed in it, to callers and in callbacks."""
    async with contextlib.AsyncExitStack() as stack:
        odd = {name: await stack.enter_async_context(peer(serve)) for name, serve in ODD.items()}
        functions = "".join(f'[functions.{name}]\nurl = "{url}"\n' for name, url in odd.items())
        gateway = await daemon(f'{LIMITS}{functions}[functions.well]\nurl = "{function.url}"')
        for name in ODD:
            reply = await ask(gateway.url, f"/function/{name}")
            assert (reply.status, reply.headers.get("X-Odd", " [31m").strip()) == (200, "[31m"), name
            record = await gateway.final(await gateway.submit(name, X_Callback_Url=sink.url))
            assert (record["status"], record["callback"]["status"]) == ("success", "delivered"), name
            told = (await gateway.final(await gateway.submit("well", X_Callback_Url=odd[name])))["callback"]
            assert told["status"] == "delivered", name
    assert len(sink.requests) == len(ODD)


async def test_an_answer_without_content_has_no_length(daemon: StartDaemon) -> None:
    """Who called would wait for a body that does not come."""
    async with peer(says(b"HTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\nhello")) as url:
        gateway = await daemon(f'[functions.f]\nurl = "{url}"')
        reply = await ask(gateway.url, "/function/f")
    assert (reply.status, reply.body, "Content-Length" in reply.headers) == (204, b"", False)


def looked_after(*ports: str) -> bool:
    """Whether the kernel will soon look after the connections from these ports or to them.

    /proc/net/tcp has local and remote address, then the timer that runs (02: of keep-alive) and its ticks.
    """
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    open_ones = [line for line in lines if line[3] == "01"]
    timers = [
        [line[5] for line in open_ones if line[place].endswith(f":{int(port):04X}")]
        for port, place in zip(ports, (1, 2), strict=True)
    ]
    ticks = 20 * os.sysconf("SC_CLK_TCK")
    return all(found and all(t[:2] == "02" and int(t[3:], 16) < ticks for t in found) for found in timers)


async def test_silent_connections_are_looked_after(daemon: StartDaemon) -> None:
    """The client's and the function's while it thinks: hosts lose their power, and routers their memory."""
    thought = asyncio.Event()

    async def think(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await thought.wait()
        writer.write(OK + EMPTY)
        await writer.drain()

    async with peer(think) as url:
        gateway = await daemon(f'[functions.thinks]\nurl = "{url}"')
        async with connection(gateway.url) as (reader, writer):
            writer.write(b"GET /function/thinks HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            async with asyncio.timeout(PATIENCE):
                while not looked_after(gateway.url.rpartition(":")[2], url.rpartition(":")[2]):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            thought.set()
            assert parse(await asyncio.wait_for(reader.read(), PATIENCE)).status == 200


async def test_a_connection_that_is_never_made_is_not_waited_for(daemon: StartDaemon, function: Server) -> None:
    """A host behind a firewall that drops everything: the time limits hold from the first packet on."""
    with deaf() as port:
        url = f"http://127.0.0.1:{port}"
        gateway = await daemon(f'{LIMITS}[functions.deaf]\nurl = "{url}"\n[functions.well]\nurl = "{function.url}"')
        assert (await ask(gateway.url, "/function/deaf")).status == 504
        record = await gateway.final(await gateway.submit("deaf"))
        assert (record["status"], record["error"]) == ("timeout", f"function deaf {QUEUE_LATE}: {UNCONNECTED}")
        told = (await gateway.final(await gateway.submit("well", X_Callback_Url=url)))["callback"]
        assert (told["status"], told["error"]) == ("failed", f"the callback URL {CALLBACK_LATE}: {UNCONNECTED}")


async def test_names_that_nobody_answers_for_hold_up_nothing_else(
    daemon: StartDaemon, function: Server, sink: Server, names: Names
) -> None:
    """A DNS server that is silent: only what has to ask it waits, and not beyond its own time limit."""
    port = function.port
    gateway = await daemon(
        f'[functions.lost]\nurl = "http://lost.example:{port}"\n[functions.local]\nurl = "http://localhost:{port}"\n'
        f'[functions.well]\nurl = "{function.url}"\n[callback]\nattempts = 1\ntimeout = "2s"\n'
        '[gateway]\nupstream_timeout = "2s"\n[queues.faas-request]\ntimeout = "2s"\n[retry]\nattempts = 1',
        before=names.before,
    )
    lost = [await gateway.submit("well", X_Callback_Url=f"http://lost{number}.example/") for number in range(12)]
    lost_sync = asyncio.create_task(ask(gateway.url, "/function/lost"))
    lost_async = await gateway.submit("lost")
    while len(set(names.asked)) < 4:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for name in ("well", "local"):
        assert (await ask(gateway.url, f"/function/{name}")).status == 200
        for url in (sink.url, sink.url.replace("127.0.0.1", "localhost")):
            record = await gateway.final(await gateway.submit(name, X_Callback_Url=url))
            assert (record["status"], record["callback"]["status"]) == ("success", "delivered")
    assert (await lost_sync).status == 504
    assert (await gateway.final(lost_async))["error"] == f"function lost {QUEUE_LATE}: {UNKNOWN}"
    told = [(await gateway.final(call_id))["callback"] for call_id in lost]
    assert {(one["status"], one["error"]) for one in told} == {
        ("failed", f"the callback URL {CALLBACK_LATE}: {UNKNOWN}")
    }
    assert await gateway.terminate() == 0  # It waits for none of them.


async def test_a_name_that_does_not_exist_is_told(daemon: StartDaemon, function: Server, names: Names) -> None:
    """502 in one line, and an error in the records."""
    names.found = {"lost.example": []}
    gateway = await daemon(
        f'[functions.lost]\nurl = "http://lost.example"\n[functions.well]\nurl = "{function.url}"\n'
        "[callback]\nattempts = 1\n[retry]\nattempts = 1",
        before=names.before,
    )
    reply = await ask(gateway.url, "/function/lost")
    assert (reply.status, reply.body.count(b"\n")) == (502, 1)
    assert reply.body.startswith(b"function lost can't be reached: ")
    record = await gateway.final(await gateway.submit("lost"))
    assert (record["status"], record["http_status"]) == ("error", 502)
    told = (await gateway.final(await gateway.submit("well", X_Callback_Url="http://lost.example/")))["callback"]
    assert told["status"] == "failed"
    assert told["error"].startswith("the callback URL can't be reached: ")


# ---- too much --------------------------------------------------------------------------------------------------


def peak_memory(daemon: Daemon) -> int:
    """The most memory that the daemon ever had resident, in bytes."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{daemon.pid}/status").read_text())
    return int(line) * 1024


FLOOD = 10 * 2**30 if LONG else 128 * MIB


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Ten gibibytes, as fast as they are taken."""
    piece = bytes(MIB)
    await reader.readuntil(b"\r\n\r\n")
    writer.write(OK + f"Content-Length: {FLOOD}\r\n\r\n".encode())
    for _ in range(FLOOD // MIB):
        writer.write(piece)
        await writer.drain()


@pytest.mark.unmeasured
@pytest.mark.parametrize("way", ["sync", "async", "async with callback", "callback"])
async def test_a_flood_is_not_kept_in_memory(daemon: StartDaemon, function: Server, sink: Server, way: str) -> None:
    """It is streamed, or counted, or refused where it would have to be held; memory stays flat."""
    async with peer(flood) as url:
        gateway = await daemon(
            f'[functions.flood]\nurl = "{url}"\n[functions.well]\nurl = "{function.url}"\n[retry]\nattempts = 1\n'
            '[queues.faas-request]\ntimeout = "600s"\n[callback]\ntimeout = "600s"\nattempts = 1\n'
            '[gateway]\nupstream_timeout = "600s"'
        )
        await ask(gateway.url, "/function/well")
        before = peak_memory(gateway)
        if way == "sync":
            received = 0
            async with connection(gateway.url) as (reader, writer):
                writer.write(b"GET /function/flood HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                while piece := await asyncio.wait_for(reader.read(MIB), PATIENCE):
                    received += len(piece)
            assert received > FLOOD
        elif way == "callback":
            told = (await finished(gateway, await gateway.submit("well", X_Callback_Url=url)))["callback"]
            assert told["status"] == "delivered"
        elif way == "async":
            record = await finished(gateway, await gateway.submit("flood"))
            assert (record["status"], record["response_bytes"]) == ("success", FLOOD)
        else:
            record = await finished(gateway, await gateway.submit("flood", X_Callback_Url=sink.url))
            assert (record["status"], record["error"]) == ("error", "function flood answered more than 16777216 bytes")
            assert (await sink.wait_for(1))[0].body == b""
        growth = peak_memory(gateway) - before
        print(f"{way}: memory grew by {growth >> 10} KiB")
        assert growth < (64 if way == "async with callback" else 24) * MIB


async def finished(gateway: Daemon, call_id: str) -> dict[str, Any]:
    """As `Daemon.final`, however long that takes."""
    while True:
        with contextlib.suppress(AssertionError):
            return await gateway.final(call_id)


# ---- connections that are kept ---------------------------------------------------------------------------------


async def test_a_connection_that_was_closed_meanwhile_is_not_used(daemon: StartDaemon) -> None:
    """A server that hangs up after each answer, without saying so, is called on a new connection each time."""
    async with peer(says(OK + EMPTY, None)) as url:
        gateway = await daemon(f'[functions.curt]\nurl = "{url}"')
        assert {(await ask(gateway.url, "/function/curt")).status for _ in range(50)} == {200}


@pytest.mark.parametrize("late", [False, True], ids=["with the answer", "later"])
async def test_an_answer_that_nobody_asked_for_is_nobodys_answer(daemon: StartDaemon, late: bool) -> None:
    """Servers tell idle clients "408 Request Timeout"; the next caller must not get to see that."""
    stray = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 5\r\n\r\nstray"
    caller_has_it = asyncio.Event()
    stray_was_sent = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while tag := (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1]:
            writer.write(OK + f"Content-Length: {len(tag)}\r\n\r\n".encode() + tag + (b"" if late else stray))
            await caller_has_it.wait()
            writer.write(stray if late else b"")
            await writer.drain()
            stray_was_sent.set()

    async with peer(serve) as url:
        gateway = await daemon(f'[functions.chatty]\nurl = "{url}"')
        for number in range(10):
            caller_has_it.clear()
            stray_was_sent.clear()
            reply = await ask(gateway.url, f"/function/chatty/{number}")
            assert (reply.status, reply.body) == (200, f"/{number}".encode())
            caller_has_it.set()
            await asyncio.wait_for(stray_was_sent.wait(), PATIENCE)
            for _ in range(3):  # who has answered something else since then has read it
                await ask(gateway.url, "/healthz")
