"""What the gateway answers when something is wrong: one line that says what, and what to do."""

import asyncio
import base64
import contextlib
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from conftest import (
    PATIENCE,
    SECRET,
    Daemon,
    Gate,
    Reply,
    Request,
    Server,
    StartDaemon,
    answer,
    ask,
    connection,
    never,
    parse,
    rude_server,
    run,
)

# Sent as the body of every request that is refused, and never to be seen again.

KIB = 1024


def assert_one_line(reply: Reply, *words: str, fn: bool = False) -> None:
    """The form that every error has: a line of plain text with the words that matter and no one's body.

    On Fn's routes the line is the message in a JSON object.
    """
    text = json.loads(reply.body)["error"]["message"] if fn else reply.body.decode()
    assert reply.headers["Content-Type"].startswith("application/json" if fn else "text/plain"), reply
    assert text.strip(), "an error without a reason"
    assert len(text.splitlines()) == 1, text
    assert "Traceback" not in text
    assert SECRET.decode() not in text
    for word in words:
        assert word.lower() in text.lower(), f"{word!r} is not in {text!r}"


@pytest.fixture
async def gateway(daemon: StartDaemon, function: Server) -> Daemon:
    """A daemon with one function, `echo`, and a small limit for bodies."""
    return await daemon(f'[gateway]\nmax_payload = "64KiB"\n[functions.echo]\nurl = "{function.url}"')


async def test_a_function_whose_url_leads_back_to_the_daemon_ends(gateway: Daemon) -> None:
    """Its request is passed on some dozen times, sync and async, and the answer says why no longer."""
    urls = {name: f"{gateway.url}/{name}/{name}" for name in ("function", "async-function")}
    gateway.configure("".join(f'[functions.{name}]\nurl = "{url}"\n' for name, url in urls.items()))
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("configuration reloaded")
    reply = await ask(gateway.url, "/function/function")
    assert reply.status == 508
    assert_one_line(reply, "X-Forwarded-For", "32", "url")
    call_id = await gateway.submit("async-function")  # which all these calls share
    await gateway.wait_for_log('http_status=508 error="function async-function answered 508"')
    records = json.loads((await ask(gateway.url, f"/system/calls?call_id={call_id}")).body)["calls"]
    assert [record["status"] for record in records] == ["error"] + 31 * ["success"]


async def submit(gateway: Daemon, *headers: str) -> Reply:
    """An async call of `echo` with these headers."""
    return await ask(gateway.url, "/async-function/echo", *headers, method="POST", body=SECRET)


# ---- what does not exist ---------------------------------------------------------------------------------------


async def test_an_unknown_function_is_not_found(gateway: Daemon, function: Server) -> None:
    """404 on both routes: nothing is queued for a function that does not exist."""
    for route in ("function", "async-function"):
        for name in ("nosuch", "nosuch.openfaas-fn", "echo.elsewhere", "echo.openfaas-fn.x", "Echo", "echo ", "", "."):
            target = f"/{route}/{name}/path".replace(" ", "%20")
            reply = await ask(gateway.url, target, method="POST", body=SECRET)
            assert reply.status == 404, target
            assert_one_line(reply)
    assert function.requests == []


async def test_an_unknown_route_is_not_found(gateway: Daemon) -> None:
    """404 in one line, as for everything else."""
    for path in ("/nosuch", "/system/nosuch", "/functions/echo", "/function", "/system/calls/", "//", "/healthz/x"):
        reply = await ask(gateway.url, path)
        assert reply.status == 404, path
        assert_one_line(reply)


async def test_only_post_and_delete_make_sense_on_the_async_route(gateway: Daemon, function: Server) -> None:
    """405 tells what is allowed, and that there is nothing to get."""
    for method in ("GET", "PUT", "PATCH", "OPTIONS"):
        reply = await ask(gateway.url, "/async-function/echo", method=method)
        assert (reply.status, reply.headers["Allow"]) == (405, "POST, DELETE"), method
        assert_one_line(reply)
    reply = await ask(gateway.url, "/async-function/echo", method="HEAD")
    assert (reply.status, reply.headers["Allow"], reply.body) == (405, "POST, DELETE", b"")
    assert function.requests == []


async def test_what_can_be_got_can_be_asked_for_its_head(gateway: Daemon) -> None:
    """Allow names both methods, and both are answered."""
    for path in ("/healthz", "/system/calls", "/system/functions", "/metrics"):
        reply = await ask(gateway.url, path, method="DELETE")
        assert (reply.status, reply.headers["Allow"]) == (405, "GET, HEAD"), path
        assert_one_line(reply)
        assert (await ask(gateway.url, path, method="HEAD")).status == 200, path


async def test_no_id_is_an_unknown_call(gateway: Daemon) -> None:
    """DELETE is allowed there: a 405 whose `Allow` names it would say that it is not."""
    reply = await ask(gateway.url, "/async-function/", method="DELETE")
    assert reply.status == 404
    assert_one_line(reply, "no call with this id")


# ---- bodies ----------------------------------------------------------------------------------------------------

POST = b"POST /async-function/echo HTTP/1.1\r\nHost: x\r\n"  # to be followed by the headers that matter


async def test_a_body_of_exactly_the_limit_is_accepted(gateway: Daemon, function: Server) -> None:
    """`max_payload` is the largest body, not the first one too large."""
    reply = await ask(gateway.url, "/async-function/echo", method="POST", body=bytes(64 * KIB))
    assert reply.status == 202
    assert len((await function.wait_for(1))[0].body) == 64 * KIB


async def test_a_body_with_too_great_a_length_is_refused_unread(gateway: Daemon, function: Server) -> None:
    """The answer comes although not one byte of the body was sent."""
    async with connection(gateway.url) as (reader, writer):
        writer.write(POST + f"Content-Length: {64 * KIB + 1}\r\n\r\n".encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        length = int(parse(head).headers["Content-Length"])
        reply = parse(head + await asyncio.wait_for(reader.readexactly(length), PATIENCE))
    assert reply.status == 413
    assert_one_line(reply)
    assert function.requests == []


async def test_a_chunked_body_is_refused_as_soon_as_it_is_too_long(gateway: Daemon, function: Server) -> None:
    """The answer comes while the client still has chunks to send."""
    async with connection(gateway.url) as (reader, writer):
        writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        writer.write(b"10001\r\n" + bytes(0x10001) + b"\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        length = int(parse(head).headers["Content-Length"])
        reply = parse(head + await asyncio.wait_for(reader.readexactly(length), PATIENCE))
    assert reply.status == 413
    assert_one_line(reply)
    assert function.requests == []


@pytest.mark.parametrize("hosts", ["", "Host: x\r\nHost: y\r\n"])
async def test_a_request_without_its_one_host_is_told_so(gateway: Daemon, hosts: str) -> None:
    """Who writes requests by hand forgets it first."""
    async with connection(gateway.url) as (reader, writer):
        writer.write(f"GET /healthz HTTP/1.1\r\n{hosts}\r\n".encode())
        reply = parse(await asyncio.wait_for(reader.read(), PATIENCE))
    assert reply.status == 400
    assert_one_line(reply)
    assert b"Host header" in reply.body


async def test_a_client_that_waits_for_leave_is_refused_before_it_sends(gateway: Daemon) -> None:
    """`Expect: 100-continue` with too great a length gets no 100 but the 413."""
    async with connection(gateway.url) as (reader, writer):
        writer.write(POST + f"Content-Length: {64 * KIB + 1}\r\nExpect: 100-continue\r\n\r\n".encode())
        first_line = await asyncio.wait_for(reader.readline(), PATIENCE)
    assert first_line.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "line", [f"POST /async-function/it {64 * KIB + 1}", "POST /async-function/gone 40", "GET /healthz 40"]
)
async def test_a_client_that_was_not_told_to_send_its_body_is_cut_off(gateway: Daemon, line: str) -> None:
    """It may send its next request instead of the body, which must not be taken for that body."""
    method, target, length = line.split()
    request = f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\nExpect: 100-continue\r\n\r\n"
    async with connection(gateway.url) as (reader, writer):
        writer.write(request.encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        assert parse(head).headers["Connection"] == "close"
        await reader.readexactly(int(parse(head).headers["Content-Length"]))
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""


async def test_curl_sees_the_413_of_an_upload_that_is_too_large(gateway: Daemon, tmp_path: Path) -> None:
    """A real client, in the middle of sending, gets the answer and not a broken pipe."""
    upload = tmp_path / "upload"
    upload.write_bytes(bytes(8 * KIB * KIB))
    result = await run(
        *("curl", "-sS", "-o", tmp_path / "answer", "-w", "%{http_code}", "-H", "Expect:"),
        *("--data-binary", f"@{upload}", f"{gateway.url}/async-function/echo"),
    )
    assert (result.code, result.out) == (0, "413"), result.err
    assert len((tmp_path / "answer").read_text().splitlines()) == 1


async def test_a_refused_body_is_not_kept_in_memory(gateway: Daemon) -> None:
    """However much a client sends with no length told, only the limit is ever read."""
    async with connection(gateway.url) as (reader, writer):
        writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        before = resident_bytes(gateway)
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                writer.write(b"100000\r\n" + bytes(2**20) + b"\r\n")
                await writer.drain()
        assert (await asyncio.wait_for(reader.readline(), PATIENCE)).startswith(b"HTTP/1.1 413 ")
        assert resident_bytes(gateway) - before < 16 * 2**20


def resident_bytes(daemon: Daemon) -> int:
    """The daemon's resident memory."""
    pages = int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


async def test_a_body_that_does_not_come_is_not_waited_for(daemon: StartDaemon, function: Server) -> None:
    """A client that stops in the middle gets its answer after `read_timeout`, and nothing is run."""
    gateway = await daemon(f'[gateway]\nread_timeout = "200ms"\n[functions.echo]\nurl = "{function.url}"')
    for route in ("function", "async-function"):
        async with connection(gateway.url) as (reader, writer):
            writer.write(f"POST /{route}/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf".encode())
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
            body = await asyncio.wait_for(reader.readexactly(int(parse(head).headers["Content-Length"])), PATIENCE)
        assert parse(head).status == 408
        assert_one_line(parse(head + body))
    assert function.requests == []


async def test_a_client_that_never_asks_is_hung_up_on(daemon: StartDaemon) -> None:
    """Connections on which nothing, or half a head, comes do not stay open for ever."""
    gateway = await daemon('[gateway]\nread_timeout = "200ms"')
    for start in (b"", b"GET /healthz HTTP/1.1\r\nHost:"):
        async with connection(gateway.url) as (reader, writer):
            writer.write(start)
            received = await asyncio.wait_for(reader.read(), PATIENCE)
        assert not received.startswith(b"HTTP/1.1 2")


async def test_a_sync_body_has_no_limit(gateway: Daemon, function: Server) -> None:
    """`max_payload` is for what has to be stored."""
    reply = await ask(gateway.url, "/function/echo", method="POST", body=bytes(512 * KIB))
    assert (reply.status, len(function.requests[0].body)) == (200, 512 * KIB)


# ---- headers ---------------------------------------------------------------------------------------------------


BAD_URLS = [
    "not-a-url",
    "/relative",
    "//host/no-scheme",
    "ftp://127.0.0.1/",
    "file:///etc/passwd",
    "http://",
    "http:///no-host",
    "http:127.0.0.1",
    "http://:80/",
    "http://[::1/",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:port/",
    "http://two words/",
    "http://no..label/",
    "http://.no-label/",
    f"http://{'long-label' * 7}.example/",
]


async def test_a_callback_url_that_is_none_is_refused(gateway: Daemon, function: Server) -> None:
    """An outcome that can never be delivered is not promised."""
    for url in BAD_URLS:
        reply = await submit(gateway, f"X-Callback-Url: {url}")
        assert reply.status == 400, url
        assert_one_line(reply, "X-Callback-Url")
    assert function.requests == []


async def test_the_password_in_a_bad_callback_url_is_not_echoed(gateway: Daemon) -> None:
    """An error may quote the URL, but not its credentials."""
    for before in ("ftp://", "", "//", "http:/", "http://[::1]\\"):
        for after in ("", "/", "?", "#"):
            reply = await submit(gateway, f"X-Callback-Url: {before}user:hunter2{after}@127.0.0.1/")
            assert reply.status == 400
            assert_one_line(reply, "X-Callback-Url")
            assert b"hunter2" not in reply.body


LINK_LOCAL = [
    "http://169.254.169.254/latest/meta-data/",
    "http://169.254.0.1:8080/",
    "http://[fe80::1]/",
    "http://[::ffff:169.254.169.254]/",
]


async def test_a_link_local_callback_is_refused(gateway: Daemon) -> None:
    """The address of the cloud's metadata is not for callers to reach through us."""
    for url in LINK_LOCAL:
        reply = await submit(gateway, f"X-Callback-Url: {url}")
        assert reply.status == 400, url
        assert_one_line(reply, "X-Callback-Url")


async def test_a_bad_call_id_is_refused(gateway: Daemon, function: Server) -> None:
    """1 to 256 visible ASCII characters, which are safe in a log, a path and a header."""
    for route in ("function", "async-function"):
        for call_id in ("", "two words", "a\tb", "x" * 257, "caf\u00e9"):
            reply = await ask(gateway.url, f"/{route}/echo", f"X-Call-Id: {call_id}", method="POST", body=SECRET)
            assert reply.status == 400, call_id
            assert_one_line(reply, "X-Call-Id")
    assert function.requests == []


BAD_CONTROLS = [
    "X-Delay: soon",
    "X-Delay: 10",
    "X-Delay: -1s",
    "X-Not-Before: tomorrow",
    "X-Not-Before: 2026-13-01T00:00:00Z",
    "X-Deadline: never",
    "X-Max-Attempts: 0",
    "X-Max-Attempts: many",
    "X-Max-Attempts: 1.5",
    "X-Queue: nosuch",
]


async def test_a_bad_control_header_is_refused(gateway: Daemon, function: Server) -> None:
    """The answer names the header; a call that is not understood is not run."""
    for header in BAD_CONTROLS:
        reply = await submit(gateway, header)
        assert reply.status == 400, header
        assert_one_line(reply, header.partition(":")[0])
    assert function.requests == []


@pytest.mark.parametrize(
    ("header", "limit"),
    [
        ("X-Delay: 10000d", "3650d"),
        ("X-Deadline: 10000d", "3650d"),
        ("X-Max-Attempts: 10000000000", "1000000000"),
        ("X-Callback-Url: http://127.0.0.1/" + "a" * 4096, "4096"),
        ("Idempotency-Key: " + "a" * 257, "256"),
        ("X-Concurrency-Key: " + "a" * 257, "256"),
    ],
)
async def test_a_control_beyond_a_limit_is_told_the_limit(gateway: Daemon, header: str, limit: str) -> None:
    """So that nobody has to find it by trying."""
    reply = await submit(gateway, header)
    assert reply.status == 400
    assert limit in reply.body.decode().rpartition(": ")[2]


async def test_a_control_that_says_two_things_is_refused(gateway: Daemon, function: Server) -> None:
    """Neither is taken for what the caller meant; one that is repeated as it was is no harm."""
    for name, first, second in (
        ("X-Delay", "1h", "2h"),
        ("X-Max-Attempts", "1", "2"),
        ("X-Callback-Url", "http://127.0.0.1:1/a", "http://127.0.0.1:1/b"),
        ("Idempotency-Key", "one", "two"),
        ("X-Call-Id", "one", "two"),
    ):
        reply = await submit(gateway, f"{name}: {first}", f"{name.lower()}: {second}")
        assert reply.status == 400, name
        assert_one_line(reply, name)
    reply = await ask(gateway.url, "/function/echo", "X-Call-Id: one", "X-Call-Id: two")
    assert reply.status == 400
    assert function.requests == []
    assert (await submit(gateway, "X-Delay: 1h", "X-Delay: 1h")).status == 202


# ---- what is not HTTP ------------------------------------------------------------------------------------------


NOT_HTTP = {
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS handshake\r\n\r\n",
    "nonsense": b"NONSENSE\r\n\r\n",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "length and chunks": POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\na",
    "long header": b"GET /function/echo HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 2**17 + b"\r\n\r\n",
    "long path": b"GET /function/echo/" + b"x" * 2**17 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "control character in the path": b"GET /function/echo/\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
}


async def test_what_is_not_http_is_refused(gateway: Daemon, function: Server) -> None:
    """400 (or 431, 414), in one line, and no traceback in the log."""
    for name, data in NOT_HTTP.items():
        received = b""
        async with connection(gateway.url) as (reader, writer):
            writer.write(data)
            with contextlib.suppress(ConnectionError):
                while piece := await asyncio.wait_for(reader.read(2**16), PATIENCE):
                    received += piece
        reply = parse(received)
        assert reply.status in (400, 414, 431), name
        assert_one_line(reply)
    assert function.requests == []


# ---- a queue that cannot take more -----------------------------------------------------------------------------


async def test_a_full_queue_asks_to_come_again(daemon: StartDaemon, function: Server) -> None:
    """429 with Retry-After when `max_pending` calls wait; once they have run, there is room again."""
    function.behaviour = gate = Gate()
    gateway = await daemon(
        f'[functions.echo]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 1\nmax_pending = 3'
    )
    accepted = [await gateway.submit("echo")]
    await function.wait_for(1)
    while (reply := await submit(gateway)).status == 202:
        accepted.append(reply.headers["X-Call-Id"])
        assert len(accepted) <= 4
    assert len(accepted) >= 3
    assert reply.status == 429
    assert int(reply.headers["Retry-After"]) >= 1
    assert_one_line(reply)
    gate.open()
    for call_id in accepted:
        assert (await gateway.final(call_id))["status"] == "success"
    assert (await submit(gateway)).status == 202


async def test_a_full_queue_is_not_the_matter_of_another(daemon: StartDaemon, function: Server) -> None:
    """Each queue has its own `max_pending`, and sync calls need none."""
    release = asyncio.Event()

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        if seen.target == "/wait":
            await release.wait()
        return web.Response()

    function.behaviour = behaviour
    gateway = await daemon(
        f'[functions.echo]\nurl = "{function.url}"\nqueue = "small"\n'
        f'[functions.other]\nurl = "{function.url}"\n'
        "[queues.small]\nmax_inflight = 1\nmax_pending = 1"
    )
    while (await ask(gateway.url, "/async-function/echo/wait", method="POST")).status == 202:
        pass
    assert (await ask(gateway.url, "/function/echo")).status == 200
    assert (await gateway.final(await gateway.submit("other")))["status"] == "success"
    release.set()


@contextlib.contextmanager
def no_room_on_disk(daemon: Daemon) -> Iterator[None]:
    """While this lasts, the kernel refuses every byte that the daemon wants to write to a file."""
    before = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, before)


async def test_a_call_that_cannot_be_stored_is_not_accepted(gateway: Daemon, function: Server) -> None:
    """503 with Retry-After, never a 202; and the daemon is well again as soon as there is room."""
    with no_room_on_disk(gateway):
        reply = await submit(gateway)
        assert reply.status == 503
        assert int(reply.headers["Retry-After"]) >= 1
        assert_one_line(reply)
        assert (await ask(gateway.url, "/function/echo")).status == 200
    assert (await gateway.final(await gateway.submit("echo")))["status"] == "success"
    assert len(function.requests) == 2


async def test_an_outcome_that_cannot_be_stored_yet_is_not_lost(gateway: Daemon, function: Server) -> None:
    """A call that ends while the disk is full is final once there is room."""
    function.behaviour = gate = Gate()
    call_id = await gateway.submit("echo")
    await function.wait_for(1)
    with no_room_on_disk(gateway):
        gate.open()
        await function.until(lambda: function.running == 0, "the function's answer")
        assert (await submit(gateway)).status == 503
        assert (await gateway.record(call_id))["status"] == "running"
    assert (await gateway.final(call_id))["status"] == "success"


# ---- functions that fail ---------------------------------------------------------------------------------------


async def test_a_function_that_refuses_the_connection_is_a_bad_gateway(daemon: StartDaemon, refused: str) -> None:
    """502, and the reason."""
    gateway = await daemon(f'[functions.down]\nurl = "{refused}"')
    reply = await ask(gateway.url, "/function/down", method="POST", body=SECRET)
    assert reply.status == 502
    assert_one_line(reply, "down")


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200", b"SSH-2.0-OpenSSH\r\n"], ids=["nothing", "half", "not http"])
async def test_a_function_that_breaks_off_is_a_bad_gateway(daemon: StartDaemon, data: bytes) -> None:
    """502 as long as nothing of an answer has been passed on."""
    async with rude_server(data) as url:
        gateway = await daemon(f'[functions.rude]\nurl = "{url}"')
        reply = await ask(gateway.url, "/function/rude", method="POST", body=SECRET)
    assert reply.status == 502
    assert_one_line(reply, "rude")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "POST"])
async def test_a_call_that_breaks_off_is_not_made_again(daemon: StartDaemon, function: Server, method: str) -> None:
    """Whatever the method promises: the function may have begun to do what it does."""

    async def hang_up(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    function.behaviour = hang_up
    gateway = await daemon(f'[functions.rude]\nurl = "{function.url}"')
    assert (await ask(gateway.url, "/function/rude", method=method)).status == 502
    assert [request.method for request in function.requests] == [method]


async def test_an_answer_that_breaks_off_does_not_look_whole(daemon: StartDaemon, http: aiohttp.ClientSession) -> None:
    """When the head is out already, the client must at least notice that something is missing."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with rude_server(head + b"4\r\nhalf\r\n") as url:
        gateway = await daemon(f'[functions.rude]\nurl = "{url}"')
        async with http.get(f"{gateway.url}/function/rude") as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()


async def test_an_answer_that_breaks_off_does_not_look_whole_in_http_1_0(daemon: StartDaemon) -> None:
    """Where the end of an answer is that of its connection, that has to be a reset."""
    half = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"
    async with rude_server(half) as url, rude_server(half + b"0\r\n\r\n") as well:
        gateway = await daemon(f'[functions.cut]\nurl = "{url}"\n[functions.well]\nurl = "{well}"')
        async with connection(gateway.url) as (reader, writer):
            writer.write(b"GET /function/well HTTP/1.0\r\n\r\n")
            assert (await reader.read()).endswith(b"\r\n\r\nhalf")
        async with connection(gateway.url) as (reader, writer):
            writer.write(b"GET /function/cut HTTP/1.0\r\n\r\n")
            with pytest.raises(ConnectionResetError):
                await reader.read()


async def test_a_function_that_takes_too_long_is_a_gateway_timeout(daemon: StartDaemon, function: Server) -> None:
    """504 after `upstream_timeout`, and the function's connection is closed."""
    function.behaviour = never
    gateway = await daemon(f'[gateway]\nupstream_timeout = "1s"\n[functions.slow]\nurl = "{function.url}"')
    reply = await ask(gateway.url, "/function/slow", method="POST", body=SECRET)
    assert reply.status == 504
    assert_one_line(reply, "slow")
    await function.until(lambda: function.cancelled == 1, "disconnect")


async def test_a_function_is_not_blamed_for_a_client_that_does_not_read(daemon: StartDaemon, function: Server) -> None:
    """Its answer is cut at `upstream_timeout` all the same, and the log says who was waited for."""
    function.behaviour = answer(body=b"x" * (64 * 1024 * KIB))
    gateway = await daemon(f'[gateway]\nupstream_timeout = "1s"\n[functions.it]\nurl = "{function.url}"')
    async with connection(gateway.url) as (_, writer):
        writer.write(b"GET /function/it HTTP/1.1\r\nHost: x\r\n\r\n")
        reason = "function it did not end its answer within gateway.upstream_timeout (1s): its client has not taken"
        async with asyncio.timeout(PATIENCE):
            while reason not in gateway.log:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("status", [502, 504])
async def test_the_gateways_own_errors_carry_the_call_id(
    daemon: StartDaemon, function: Server, refused: str, status: int
) -> None:
    """Whoever looks for the call in a log needs its id most when it failed."""
    function.behaviour = never
    url = refused if status == 502 else function.url
    gateway = await daemon(f'[gateway]\nupstream_timeout = "100ms"\n[functions.bad]\nurl = "{url}"')
    reply = await ask(gateway.url, "/function/bad", "X-Call-Id: trace-7")
    assert (reply.status, reply.headers["X-Call-Id"]) == (status, "trace-7")


async def test_an_async_call_of_a_dead_function_is_an_error_in_its_record(daemon: StartDaemon, refused: str) -> None:
    """The attempts are made, then the record says why none of them worked."""
    gateway = await daemon(f'[functions.down]\nurl = "{refused}"\n[retry]\nattempts = 2')
    record = await gateway.final(await gateway.submit("down"))
    assert (record["status"], record["attempts"], record["http_status"]) == ("error", 2, 502)
    assert record["error"]


# ---- credentials -----------------------------------------------------------------------------------------------

GUARDED = ["/system/calls/x", "/system/functions", "/v1/apps/a/calls", "/metrics", "/ui/"]
INVOKING = ["/function/echo", "/async-function/echo", "/r/app/echo"]
OPEN = ["/healthz", "/readyz"]


def basic(user: str, password: str) -> str:
    """The header line of HTTP basic authentication."""
    return "Authorization: Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


async def guarded(daemon: StartDaemon, function: Server, folder: Path, more: str = "") -> Daemon:
    """A daemon that asks for user `admin` and password `pass:word`, from files as faasd writes them."""
    (folder / "user").write_text("admin\n")
    (folder / "password").write_text("pass:word\n")
    return await daemon(
        f'[auth]\nuser_file = "{folder}/user"\npassword_file = "{folder}/password"\n{more}\n'
        f'[functions.echo]\nurl = "{function.url}"'
    )


async def test_without_credentials_the_operators_routes_are_closed(
    daemon: StartDaemon, function: Server, tmp_path: Path
) -> None:
    """401 with the realm that clients of OpenFaaS know."""
    gateway = await guarded(daemon, function, tmp_path)
    for path in GUARDED:
        reply = await ask(gateway.url, path)
        assert (reply.status, reply.headers.get("WWW-Authenticate")) == (401, 'Basic realm="Restricted"'), path
        assert_one_line(reply, fn=path.startswith(("/v1/", "/r/")))


WRONG = [
    basic("admin", "wrong"),
    basic("admin", ""),
    basic("", "pass:word"),
    basic("admin", "pass:word\n"),
    basic("admin", "pass"),
    basic("\u00e4dmin", "p\u00e4ss"),
    "Authorization: Basic",
    "Authorization: Basic !!!",
    "Authorization: Basic " + base64.b64encode(b"\xff\xfe:\xff").decode(),
    "Authorization: Basic " + base64.b64encode(b"no-colon").decode(),
    "Authorization: Basic caf\u00e9",
    "Authorization: Bearer " + base64.b64encode(b"admin:pass:word").decode(),
]


async def test_wrong_credentials_are_no_credentials(daemon: StartDaemon, function: Server, tmp_path: Path) -> None:
    """401 for whatever is not exactly right, malformed headers too."""
    gateway = await guarded(daemon, function, tmp_path)
    for header in WRONG:
        reply = await ask(gateway.url, "/metrics", header)
        assert (reply.status, reply.headers.get("WWW-Authenticate")) == (401, 'Basic realm="Restricted"'), header


async def test_the_right_credentials_open_the_operators_routes(
    daemon: StartDaemon, function: Server, tmp_path: Path
) -> None:
    """The newline at the end of a secret's file is not part of the secret; curl's -u works."""
    gateway = await guarded(daemon, function, tmp_path)
    assert (await ask(gateway.url, "/metrics", basic("admin", "pass:word"))).status == 200
    result = await run("curl", "-sS", "-f", "-u", "admin:pass:word", f"{gateway.url}/metrics")
    assert result.code == 0, result.err


async def test_calling_functions_needs_no_credentials(daemon: StartDaemon, function: Server, tmp_path: Path) -> None:
    """As in OpenFaaS: only the operator's routes are guarded."""
    gateway = await guarded(daemon, function, tmp_path)
    assert [(await ask(gateway.url, path)).status for path in OPEN] == [200, 200]
    assert (await ask(gateway.url, "/function/echo")).status == 200
    assert (await ask(gateway.url, "/async-function/echo", method="POST")).status == 202


async def test_calling_functions_can_be_guarded_too(daemon: StartDaemon, function: Server, tmp_path: Path) -> None:
    """With `auth.invoke = true`."""
    gateway = await guarded(daemon, function, tmp_path, "invoke = true")
    for path in INVOKING:
        reply = await ask(gateway.url, path, method="POST", body=SECRET)
        assert (reply.status, reply.headers.get("WWW-Authenticate")) == (401, 'Basic realm="Restricted"'), path
        assert_one_line(reply, fn=path.startswith(("/v1/", "/r/")))
    assert function.requests == []


async def test_a_guarded_function_can_be_called_with_credentials(
    daemon: StartDaemon, function: Server, tmp_path: Path
) -> None:
    """Sync and async."""
    gateway = await guarded(daemon, function, tmp_path, "invoke = true")
    credentials = basic("admin", "pass:word")
    assert (await ask(gateway.url, "/function/echo", credentials)).status == 200
    assert (await ask(gateway.url, "/async-function/echo", credentials, method="POST")).status == 202
    assert (await ask(gateway.url, "/healthz")).status == 200
