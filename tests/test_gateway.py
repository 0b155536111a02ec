"""The gateway: what reaches the function, what comes back, and what it costs."""

import asyncio
import gzip
import json
import os
import re
import socket
import stat
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from conftest import (
    PATIENCE,
    Daemon,
    Gate,
    Reply,
    Request,
    Server,
    ServiceManager,
    StartDaemon,
    answer,
    ask,
    connection,
    free_address,
    never,
    parse,
    raw,
    rude_server,
    run,
)
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.usefixtures("function")

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]

# What a client may put behind the function's name, and what a gateway that parses it would change.
TARGETS = [
    "/",
    "/plain",
    "//double//slash//",
    "/a/../b/./c",
    "/%2e%2e/%2E%2E/secret",
    "/encoded%2Fslash%2fslash",
    "/semi;colon;a=b",
    "/broken%zz",
    "/lone%",
    "/plus+and%20space",
    "/%C3%A9%c3%a9",
    "/%41%42%7e~",
    "/%00%0d%0a",
    "/colon:80/@at/host",
    '/un"<>^`{|}safe',
    "/back\\slash",
    "/[brackets",
    "/trailing?",
    "?",
    "?q=1",
    "/?q=a+b%20c&q=%2F/&&e=;&=",
    "/?url=http://user@host:80/x?y=z",
    "/?lower=%c3%a9&upper=%C3%A9&broken=%zz%",
    "/?brackets[]=1&[",
]

BODIES = [b"", bytes(range(256)), b'{"looks": "like json"}\r\n', gzip.compress(b"not for the gateway to open")]

RECORD_KEYS = {
    *("id", "call_id", "function", "namespace", "queue", "status", "attempts", "max_attempts"),
    *("http_status", "error"),
    *("created_at", "started_at", "completed_at", "due_at", "duration_seconds", "interrupted", "callback"),
    *("request_bytes", "response_bytes"),
}


@pytest.fixture
async def gateway(daemon: StartDaemon, function: Server) -> Daemon:
    """A daemon with one function, `echo`."""
    return await daemon(f'[functions.echo]\nurl = "{function.url}"')


@dataclass(frozen=True)
class Call:
    """What the client was answered, and what the function was sent."""

    reply: Reply
    request: Request


async def both_ways(
    gateway: Daemon, function: Server, *headers: str, target: str = "", **how: Any
) -> tuple[Call, Call]:
    """The same POST to `echo` as a sync call and as an async one."""
    calls = []
    for route, status in (("function", 200), ("async-function", 202)):
        before = len(function.requests)
        reply = await ask(gateway.url, f"/{route}/echo{target}", *headers, method="POST", **how)
        assert reply.status == status, reply
        calls.append(Call(reply, (await function.wait_for(before + 1))[before]))
    return calls[0], calls[1]


# ---- what reaches the function ---------------------------------------------------------------------------------


async def test_every_method_reaches_the_function(gateway: Daemon, function: Server) -> None:
    """/function/ takes every method and hands it on."""
    for method in METHODS:
        assert (await ask(gateway.url, "/function/echo", method=method)).status == 200, method
    assert [request.method for request in function.requests] == METHODS


async def test_path_and_query_arrive_byte_for_byte(gateway: Daemon, function: Server) -> None:
    """Nothing is decoded, encoded again, normalised or dropped on the way, nor in the queue."""
    for target in TARGETS:
        calls = await both_ways(gateway, function, target=target)
        # A path is never empty on the wire, so that one byte is added to a query alone.
        expected = target if target.startswith("/") else "/" + target
        assert [call.request.target for call in calls] == [expected] * 2


async def test_a_function_without_a_path_is_called_at_the_root(gateway: Daemon, function: Server) -> None:
    """/function/NAME asks the function for `/`."""
    calls = await both_ways(gateway, function, target="")
    assert [call.request.target for call in calls] == ["/", "/"]


async def test_the_path_of_the_functions_url_comes_first(daemon: StartDaemon, function: Server) -> None:
    """A function may live below a path of its server."""
    gateway = await daemon(f'[functions.echo]\nurl = "{function.url}/base"')
    calls = await both_ways(gateway, function, target="/more?x=1")
    assert [call.request.target for call in calls] == ["/base/more?x=1"] * 2


@pytest.mark.parametrize("path", ["/base", "/base/"])
async def test_the_functions_url_is_called_as_it_is(daemon: StartDaemon, function: Server, path: str) -> None:
    """With the slash at its end, or without: many a server takes only one of them."""
    gateway = await daemon(f'[functions.echo]\nurl = "{function.url}{path}"')
    for target, expected in (("", path), ("?x=1", f"{path}?x=1"), ("/", "/base/"), ("//more", "/base//more")):
        calls = await both_ways(gateway, function, target=target)
        assert [call.request.target for call in calls] == [expected] * 2


async def test_the_body_arrives_byte_for_byte(gateway: Daemon, function: Server) -> None:
    """A body is bytes, whatever it looks like or claims to be."""
    for body in BODIES:
        for call in await both_ways(gateway, function, "Content-Encoding: gzip", body=body):
            assert (call.request.body, call.request.headers["Content-Encoding"]) == (body, "gzip")


async def test_a_chunked_body_arrives_whole(gateway: Daemon, function: Server) -> None:
    """A client need not know the length in advance."""
    for route in ("function", "async-function"):
        head = f"POST /{route}/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        await raw(gateway.url, head.encode() + b"3\r\none\r\n5;ext=1\r\n-more\r\n0\r\nTrailer: dropped\r\n\r\n")
    assert [request.body for request in await function.wait_for(2)] == [b"one-more"] * 2


async def test_repeated_headers_arrive_in_order(gateway: Daemon, function: Server) -> None:
    """Repeats are neither merged nor dropped."""
    for call in await both_ways(gateway, function, "X-Many: 1", "x-many: 2", "X-Many: 1, 3"):
        assert call.request.headers.getall("X-Many") == ["1", "2", "1, 3"]


async def test_header_values_arrive_byte_for_byte(gateway: Daemon, function: Server) -> None:
    """UTF-8, what is none, and a value that is empty."""
    values = ["caf\u00e9", "", "tab\there", '"quoted\\"', "a" * 4000]
    for call in await both_ways(gateway, function, *(f"X-Value: {value}" for value in values)):
        sent = [value.encode() for value in values]
        assert [value for name, value in call.request.raw_headers if name.lower() == b"x-value"] == sent


async def test_a_header_that_is_not_utf_8_arrives_all_the_same(gateway: Daemon, function: Server) -> None:
    """Old clients write Latin-1; it is passed on byte for byte."""
    for route in ("function", "async-function"):
        head = f"POST /{route}/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n"
        reply = await raw(gateway.url, head.encode() + b"X-Name: caf\xe9\r\n\r\n")
        assert reply.status in (200, 202)
    requests = await function.wait_for(2)
    assert [dict(request.raw_headers)[b"X-Name"] for request in requests] == [b"caf\xe9"] * 2


async def test_hop_by_hop_headers_stay_behind(gateway: Daemon, function: Server) -> None:
    """What RFC 9110 7.6.1 lists, and what Connection names, was meant for us alone."""
    calls = await both_ways(
        *(gateway, function, "Connection: close, X-Private, x-other", "X-Private: 1", "X-Other: 2", "X-Public: 3"),
        *("Keep-Alive: timeout=77", "Proxy-Connection: keep-alive", "TE: trailers", "Trailer: X-T", "Upgrade: h2c"),
    )
    gone = {"X-Private", "X-Other", "Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Upgrade"}
    for call in calls:
        assert call.request.headers["X-Public"] == "3"
        assert not [name for name in gone if name in call.request.headers], call.request.headers
        assert "X-Private" not in call.request.headers.get("Connection", "")


async def test_nothing_but_the_documented_headers_is_added(gateway: Daemon, function: Server) -> None:
    """No User-Agent, Accept, Accept-Encoding or Content-Type of our own: a function may act on them."""
    framing = {"Host", "Content-Length", "Transfer-Encoding", "Connection"}
    added = {"X-Call-Id", "X-Start-Time", "X-Forwarded-For", "X-Forwarded-Host"}
    sync_call, async_call = await both_ways(gateway, function, body=b"x")
    assert {name.title() for name in sync_call.request.headers} - framing == added
    assert {name.title() for name in async_call.request.headers} - framing == added | {"X-Retry"}


async def test_a_call_gets_a_uuid_as_id(gateway: Daemon, function: Server) -> None:
    """The id in the answer is the one that the function sees."""
    for call in await both_ways(gateway, function):
        assert str(uuid.UUID(call.request.call_id)) == call.request.call_id == call.reply.headers["X-Call-Id"]


async def test_the_callers_id_is_kept(gateway: Daemon, function: Server) -> None:
    """A tracing id of the caller goes all the way through, whatever visible characters it has."""
    for call_id in ("trace-1", "!" * 256, "a/b?c=d&e#f%20\"'"):
        for call in await both_ways(gateway, function, f"X-Call-Id: {call_id}"):
            assert call.request.headers.getall("X-Call-Id") == [call_id] == call.reply.headers.getall("X-Call-Id")


async def test_the_start_time_is_in_unix_nanoseconds(gateway: Daemon, function: Server) -> None:
    """X-Start-Time is the same instant for caller and function."""
    before = time.time_ns()
    for call in await both_ways(gateway, function):
        assert before <= int(call.request.headers["X-Start-Time"]) <= time.time_ns()
        assert call.request.headers["X-Start-Time"] == call.reply.headers["X-Start-Time"]


async def test_the_clients_address_is_appended_to_the_forwarded_ones(gateway: Daemon, function: Server) -> None:
    """The function sees the whole chain."""
    for call in await both_ways(gateway, function, "X-Forwarded-For: 192.0.2.7"):
        first, last = ", ".join(call.request.headers.getall("X-Forwarded-For")).split(", ")
        assert (first, last.split(":")[0]) == ("192.0.2.7", "127.0.0.1")


@pytest.mark.parametrize("hosts", [["[::]"], ["0.0.0.0", "[::]"], ["[::]", "127.0.0.1"], [""]])
async def test_all_addresses_are_those_of_ipv4_too(
    daemon: StartDaemon, function: Server, systemd: ServiceManager, hosts: list[str]
) -> None:
    """[::] is both, as for systemd and Go, unless something else in the list has the port."""
    port = free_address().rpartition(":")[2]
    listen = json.dumps([f"{host}:{port}" for host in hosts])
    settings = f'[gateway]\nlisten = {listen}\n[functions.it]\nurl = "{function.url}"'
    gateway = await daemon(settings, env={"NOTIFY_SOCKET": str(systemd.path)}, start=False)
    await gateway.spawn()
    await systemd.wait_for("READY=1")
    for url in (f"http://127.0.0.1:{port}", f"http://[::1]:{port}"):
        assert (await ask(url, "/function/it")).status == 200


async def test_the_host_that_was_asked_is_forwarded(gateway: Daemon, function: Server) -> None:
    """X-Forwarded-Host is the client's Host, by which it can build links to itself."""
    for call in await both_ways(gateway, function, host="functions.example:8443"):
        assert call.request.headers["X-Forwarded-Host"] == "functions.example:8443"


async def test_the_host_in_a_target_counts_more_than_the_header(gateway: Daemon, function: Server) -> None:
    """A request as to a proxy names it in both (RFC 9112 3.2.2); so does the protection against DNS rebinding."""
    await ask(gateway.url, "http://first.example:81/function/echo/a?b", host="second.example")
    (request,) = function.requests
    assert (request.headers["X-Forwarded-Host"], request.target) == ("first.example:81", "/a?b")
    assert (await ask(gateway.url, "http://first.example/system/calls", host="localhost")).status == 421
    assert (await ask(gateway.url, "http://localhost/system/calls", host="first.example")).status == 200


async def test_only_async_calls_count_their_retries(gateway: Daemon, function: Server) -> None:
    """X-Retry is 0 on the first attempt; a sync call is never tried again, so there is nothing to count."""
    sync_call, async_call = await both_ways(gateway, function)
    assert "X-Retry" not in sync_call.request.headers
    assert async_call.request.headers["X-Retry"] == "0"


async def test_a_function_may_be_named_with_its_namespace(gateway: Daemon, function: Server) -> None:
    """NAME.openfaas-fn is how faas-cli calls it; the path behind it is untouched."""
    await ask(gateway.url, "/function/echo.openfaas-fn/a.b")
    await ask(gateway.url, "/async-function/echo.openfaas-fn/a.b", method="POST")
    assert [request.target for request in await function.wait_for(2)] == ["/a.b", "/a.b"]


async def test_a_functions_name_may_be_percent_encoded(gateway: Daemon, function: Server) -> None:
    """It means the same (RFC 3986 6.2.2.2), on each route, also when it comes again; the rest is not decoded."""
    for _ in range(2):
        assert (await ask(gateway.url, "/function/ech%6F/%61?%62")).status == 200
        for name in ("%65cho", "ech%6f%2Eopenfaas-fn"):
            assert (await ask(gateway.url, f"/async-function/{name}/%61?%62", method="POST")).status == 202
        assert (await ask(gateway.url, "/r/app/%65cho/%61?%62")).status == 200
    assert {request.target for request in await function.wait_for(8)} == {"/%61?%62"}
    assert json.loads((await ask(gateway.url, "/system/function/ech%6F")).body)["name"] == "echo"
    for name in ("%2565cho", "echo%2F", "echo%00", "%FF"):
        for route in ("function", "async-function"):
            assert (await ask(gateway.url, f"/{route}/{name}", method="POST")).status == 404


async def test_the_namespace_can_be_set(daemon: StartDaemon, function: Server) -> None:
    """`gateway.namespace` is the namespace of all functions in the file."""
    gateway = await daemon(f'[gateway]\nnamespace = "lab"\n[functions.echo]\nurl = "{function.url}"')
    assert (await ask(gateway.url, "/function/echo.lab")).status == 200
    assert (await ask(gateway.url, "/function/echo.openfaas-fn")).status == 404


async def test_curl_offering_http2_is_answered_as_usual(gateway: Daemon, function: Server) -> None:
    """`curl --http2` asks for an upgrade that may be ignored; its body must not be lost over that."""
    result = await run(
        "curl", "-sS", "--http2", "-d", "hello", "-w", " %{http_code}", f"{gateway.url}/function/echo/up"
    )
    assert (result.code, result.out) == (0, "ok 200"), result.err
    assert function.requests[0].body == b"hello"
    assert not {"Upgrade", "HTTP2-Settings"} & set(function.requests[0].headers)


async def test_curl_with_expect_100_continue_is_let_through(gateway: Daemon, function: Server, tmp_path: Path) -> None:
    """A client that waits for leave to send its body gets it."""
    upload = tmp_path / "upload"
    upload.write_bytes(bytes(range(256)) * 1000)
    result = await run(
        *("curl", "-sS", "--expect100-timeout", str(PATIENCE), "-H", "Expect: 100-continue"),
        *("--data-binary", f"@{upload}", f"{gateway.url}/function/echo"),
    )
    assert (result.code, result.out) == (0, "ok"), result.err
    assert function.requests[0].body == upload.read_bytes()


# ---- what comes back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_all_answers_of_its_own_say_when_and_by_whom(gateway: Daemon, function: Server, version: str) -> None:
    """Date and Server stand once in each, whole or in pieces; in what a function answers, Server is the function's."""
    call_id = await gateway.submit("echo")
    await gateway.final(call_id)
    pieces = ("/system/events", f"/system/calls/{call_id}/log?follow=1", "/system/backup")
    for target in ("/healthz", "/nosuch", "/metrics", "/ui/", "/system/functions", "/bad target", *pieces):
        async with connection(gateway.url) as (reader, writer):
            writer.write(f"GET {target} HTTP/{version}\r\nHost: localhost\r\n\r\n".encode())
            head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)).decode()
            assert re.findall("(?i)^server:.*$", head, re.MULTILINE) == ["Server: faasd-async\r"], (target, head)
            assert len(re.findall("(?i)^date:", head, re.MULTILINE)) == 1, (target, head)
    function.behaviour = answer(200, b"", Server="its own")
    assert (await ask(gateway.url, "/function/echo")).headers.getall("Server") == ["its own"]


async def test_status_and_headers_come_back_as_the_function_gave_them(gateway: Daemon, function: Server) -> None:
    """Repeated headers, above all Set-Cookie, stay separate and in order."""

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        response = web.Response(status=418, body=b"short and stout", content_type="text/x-teapot")
        response.headers.extend([("Set-Cookie", "a=1; Path=/"), ("Set-Cookie", "b=2"), ("X-Own", "v")])
        return response

    function.behaviour = behaviour
    reply = await ask(gateway.url, "/function/echo")
    assert (reply.status, reply.body) == (418, b"short and stout")
    assert reply.headers.getall("Set-Cookie") == ["a=1; Path=/", "b=2"]
    assert (reply.headers["Content-Type"], reply.headers["X-Own"]) == ("text/x-teapot", "v")


async def test_an_error_of_the_function_is_the_functions_own(gateway: Daemon, function: Server) -> None:
    """A 500 passes through with its body; the gateway has nothing to add to it."""
    function.behaviour = answer(500, b"out of cheese", Content_Type="text/x-error")
    reply = await ask(gateway.url, "/function/echo")
    assert (reply.status, reply.body, reply.headers["Content-Type"]) == (500, b"out of cheese", "text/x-error")


async def test_hop_by_hop_headers_of_the_answer_stay_behind(gateway: Daemon, function: Server) -> None:
    """The function's connection is not the client's."""
    function.behaviour = answer(body=b"x", Connection="close, X-Private", X_Private="1", Keep_Alive="timeout=77")
    reply = await ask(gateway.url, "/function/echo")
    assert reply.body == b"x"
    assert not {"X-Private", "Keep-Alive"} & set(reply.headers)


async def test_a_compressed_answer_is_not_touched(
    gateway: Daemon, function: Server, http: aiohttp.ClientSession
) -> None:
    """Content-Encoding is between client and function."""
    packed = gzip.compress(b"a" * 10_000)
    function.behaviour = answer(body=packed, Content_Encoding="gzip")
    async with http.get(f"{gateway.url}/function/echo", headers={"Accept-Encoding": "gzip"}) as response:
        assert (await response.read(), response.headers["Content-Encoding"]) == (packed, "gzip")
    assert function.requests[0].headers["Accept-Encoding"] == "gzip"


async def test_an_answer_without_a_body_has_none(gateway: Daemon, function: Server) -> None:
    """204 and 304 end with their head; a chunk after it would be taken for the next answer."""
    async with connection(gateway.url) as (reader, writer):
        for status in (204, 304, 200):
            function.behaviour = answer(status)
            writer.write(b"GET /function/echo HTTP/1.1\r\nHost: x\r\n\r\n")
            assert parse(await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)).status == status


async def test_head_has_the_length_and_no_body(gateway: Daemon, function: Server) -> None:
    """HEAD tells how long the answer to GET would be."""
    function.behaviour = answer(body=b"twelve bytes")
    reply = await ask(gateway.url, "/function/echo", method="HEAD")
    assert (reply.status, reply.headers["Content-Length"], reply.body) == (200, "12", b"")


async def test_the_duration_is_told(gateway: Daemon) -> None:
    """X-Duration-Seconds is a number of seconds."""
    reply = await ask(gateway.url, "/function/echo")
    assert 0 < float(reply.headers["X-Duration-Seconds"]) < PATIENCE


async def test_the_duration_that_the_function_measured_wins(gateway: Daemon, function: Server) -> None:
    """A watchdog knows better than the gateway how long its function ran."""
    function.behaviour = answer(X_Duration_Seconds="0.002440")
    reply = await ask(gateway.url, "/function/echo")
    assert reply.headers.getall("X-Duration-Seconds") == ["0.002440"]


async def test_a_redirect_is_the_clients_to_follow(gateway: Daemon, function: Server) -> None:
    """The gateway hands a redirect out and calls nobody else."""
    function.behaviour = answer(307, Location=f"{function.url}/elsewhere")
    reply = await ask(gateway.url, "/function/echo")
    assert (reply.status, reply.headers["Location"]) == (307, f"{function.url}/elsewhere")
    assert len(function.requests) == 1


async def test_cookies_of_one_caller_do_not_reach_the_next(gateway: Daemon, function: Server) -> None:
    """The gateway keeps no cookies."""
    function.behaviour = answer(Set_Cookie="session=alice")
    await ask(gateway.url, "/function/echo")
    await ask(gateway.url, "/function/echo")
    assert ["Cookie" in request.headers for request in function.requests] == [False, False]


# ---- streaming -------------------------------------------------------------------------------------------------


async def test_server_sent_events_arrive_one_by_one(
    gateway: Daemon, function: Server, http: aiohttp.ClientSession
) -> None:
    """The function sends its second event only when the client has read the first."""
    first_was_read = asyncio.Event()

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await first_was_read.wait()
        await response.write(b"data: 2\n\n")
        return response

    function.behaviour = behaviour
    async with http.get(f"{gateway.url}/function/echo") as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert await response.content.readexactly(9) == b"data: 1\n\n"
        first_was_read.set()
        assert await response.content.read() == b"data: 2\n\n"


async def test_the_head_of_an_answer_does_not_wait_for_its_body(
    gateway: Daemon, function: Server, http: aiohttp.ClientSession
) -> None:
    """A client sees status and headers while the function still thinks about its first byte."""
    head_was_read = asyncio.Event()

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await head_was_read.wait()
        await response.write(b"at last")
        return response

    function.behaviour = behaviour
    async with http.get(f"{gateway.url}/function/echo") as response:
        head_was_read.set()
        assert await response.read() == b"at last"


async def test_a_request_body_is_streamed_to_the_function(
    gateway: Daemon, function: Server, http: aiohttp.ClientSession
) -> None:
    """The function reads the first part before the client has sent the second."""
    first_has_arrived = asyncio.Event()
    parts = []

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        parts.append(await request.content.readexactly(5))
        first_has_arrived.set()
        parts.append(await request.content.read())
        return web.Response()

    async def upload() -> AsyncIterator[bytes]:
        yield b"first"
        await first_has_arrived.wait()
        yield b"second"

    function.reads_body = False
    function.behaviour = behaviour
    async with http.post(f"{gateway.url}/function/echo", data=upload()) as response:
        assert response.status == 200
    assert parts == [b"first", b"second"]


BIG = 256 * 2**20
PIECE = bytes(2**16)


async def pieces() -> AsyncIterator[bytes]:
    """A quarter of a gibibyte that is never in memory at once."""
    for _ in range(BIG // len(PIECE)):
        yield PIECE


def peak_memory(daemon: Daemon) -> int:
    """The most memory that the daemon ever had resident, in bytes."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{daemon.pid}/status").read_text())
    return int(line) * 1024


async def test_a_big_upload_passes_in_constant_memory(
    gateway: Daemon, function: Server, http: aiohttp.ClientSession
) -> None:
    """A sync body has no limit, because it is never kept."""
    received = 0

    async def count(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        nonlocal received
        while piece := await request.content.readany():
            received += len(piece)
        return web.Response()

    await ask(gateway.url, "/function/echo")
    before = peak_memory(gateway)
    function.reads_body = False
    function.behaviour = count
    async with http.post(f"{gateway.url}/function/echo", data=pieces()) as response:
        assert response.status == 200
    assert received == BIG
    assert peak_memory(gateway) - before < 20 * 2**20


async def test_a_big_answer_passes_in_constant_memory_to_a_slow_client(
    gateway: Daemon, function: Server, http: aiohttp.ClientSession
) -> None:
    """A client that reads slower than the function writes slows the function down, and fills no buffer."""

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        async for piece in pieces():
            await response.write(piece)
        return response

    await ask(gateway.url, "/function/echo")
    before = peak_memory(gateway)
    function.behaviour = behaviour
    received = 0
    async with http.get(f"{gateway.url}/function/echo") as response:
        async for piece in response.content.iter_chunked(2**20):
            received += len(piece)
    assert received == BIG
    assert peak_memory(gateway) - before < 20 * 2**20


async def test_a_client_that_goes_away_cancels_its_call(gateway: Daemon, function: Server) -> None:
    """Nobody waits for the answer any more, so the function need not go on."""
    function.behaviour = never
    async with connection(gateway.url) as (_, writer):
        writer.write(b"GET /function/echo HTTP/1.1\r\nHost: x\r\n\r\n")
        await function.wait_for(1)
    await function.until(lambda: function.cancelled == 1, "disconnect")


async def test_a_client_that_goes_away_in_the_middle_of_the_answer_cancels_its_call(
    gateway: Daemon, function: Server
) -> None:
    """The same when a part of the answer is out already."""

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begin")
        await asyncio.Event().wait()
        return response

    function.behaviour = behaviour
    async with connection(gateway.url) as (reader, writer):
        writer.write(b"GET /function/echo HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"begin"), PATIENCE)
    await function.until(lambda: function.cancelled == 1, "disconnect")


async def test_a_slow_function_does_not_hold_up_another(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """What one function does is nothing to the callers of the next."""
    function.behaviour = gate = Gate()
    gateway = await daemon(f'[functions.slow]\nurl = "{function.url}"\n[functions.quick]\nurl = "{sink.url}"')
    slow = [asyncio.create_task(ask(gateway.url, "/function/slow")) for _ in range(50)]
    await function.wait_for(50)
    assert (await ask(gateway.url, "/function/quick")).status == 200
    gate.open()
    assert {reply.status for reply in await asyncio.gather(*slow)} == {200}


async def test_an_answer_that_ends_with_its_connection_is_whole(daemon: StartDaemon) -> None:
    """Small servers of HTTP/1.0 tell no length; theirs are functions, too."""
    async with rude_server(b"HTTP/1.0 200 OK\r\nX-Own: v\r\n\r\nthe whole") as url:
        gateway = await daemon(f'[functions.old]\nurl = "{url}"')
        result = await run("curl", "-sS", f"{gateway.url}/function/old")
        assert (result.code, result.out) == (0, "the whole"), result.err
        record = await gateway.final(await gateway.submit("old"))
        assert (record["status"], record["response_bytes"]) == ("success", 9)


async def test_a_client_of_http_1_0_gets_no_chunks(gateway: Daemon, function: Server) -> None:
    """It would take their lengths for the body."""

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one,")
        await response.write(b"two")
        return response

    function.behaviour = behaviour
    reply = await raw(gateway.url, b"GET /function/echo HTTP/1.0\r\n\r\n")
    assert (reply.status, reply.body) == (200, b"one,two")


async def test_a_function_may_answer_before_it_has_read_the_body(
    gateway: Daemon, function: Server, tmp_path: Path
) -> None:
    """A refusal in the middle of an upload is the answer, not a broken connection."""
    function.reads_body = False
    function.behaviour = answer(413, b"too much", Connection="close")
    upload = tmp_path / "upload"
    upload.write_bytes(bytes(32 * 2**20))
    result = await run(
        *("curl", "-sS", "-w", " %{http_code}", "-H", "Expect:", "--data-binary", f"@{upload}"),
        f"{gateway.url}/function/echo",
    )
    assert (result.code, result.out) == (0, "too much 413"), result.err


# ---- the 202 and the record ------------------------------------------------------------------------------------


async def test_an_accepted_call_is_answered_202_with_its_id_and_place(gateway: Daemon) -> None:
    """Exactly what the contract names, beside what HTTP itself asks for, and no body."""
    reply = await ask(gateway.url, "/async-function/echo", method="POST", body=b"x")
    assert (reply.status, reply.body) == (202, b"")
    names = {name.title() for name in reply.headers} - {"Date", "Server", "Connection"}
    assert names == {"X-Call-Id", "X-Start-Time", "Location", "Content-Length"}
    assert reply.headers["Location"] == f"/system/calls/{reply.headers['X-Call-Id']}"


async def test_a_client_that_wants_json_gets_the_id_in_the_body(gateway: Daemon) -> None:
    """`Accept: application/json` is for clients that do not look at headers."""
    reply = await ask(gateway.url, "/async-function/echo", "Accept: application/json", method="POST")
    assert reply.status == 202
    assert reply.headers["Content-Type"].startswith("application/json")
    assert json.loads(reply.body) == {"call_id": reply.headers["X-Call-Id"]}


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        (["APPLICATION/JSON"], True),
        (["application/json; q=0.5"], True),
        (["text/html, application/json;charset=utf-8"], True),
        (["text/html", "application/json"], True),
        (["application/json;q=0"], False),
        (["text/plain, application/json ; q=0.000"], False),
        (["application/jsonl, x-application/json"], False),
    ],
)
async def test_a_wish_for_json_is_read_as_http_says(gateway: Daemon, accept: list[str], wanted: bool) -> None:
    """Its case does not count, a weight of 0 rules it out, and it may stand among others (RFC 9110 12.5.1)."""
    headers = [f"Accept: {value}" for value in accept]
    reply = await ask(gateway.url, "/async-function/echo", *headers, method="POST")
    assert (reply.status, reply.body != b"") == (202, wanted)
    record = await ask(gateway.url, f"{reply.headers['Location']}/request", *headers)
    assert record.headers.get("Content-Type", "").startswith("application/json") == wanted


async def test_curls_accept_header_asks_for_no_body(gateway: Daemon) -> None:
    """`Accept: */*` is no wish for JSON."""
    reply = await ask(gateway.url, "/async-function/echo", "Accept: */*", method="POST")
    assert (reply.status, reply.body) == (202, b"")


async def test_the_location_of_a_call_leads_to_its_record(gateway: Daemon, http: aiohttp.ClientSession) -> None:
    """Whatever characters the caller's id has, Location can be followed as it is."""
    for call_id in ("trace-1", "a/b", "a?b=c&d", "a#b", "100%", "%41", '"<>\\^`{|}', "..", "a;b:@!$'()*+,="):
        reply = await ask(gateway.url, "/async-function/echo", f"X-Call-Id: {call_id}", method="POST")
        record = await ask(gateway.url, reply.headers["Location"])
        assert record.status == 200, (call_id, reply.headers["Location"])
        assert json.loads(record.body)["call_id"] == call_id
        result = await run("curl", "-sS", "--fail", "--path-as-is", gateway.url + reply.headers["Location"])
        assert (result.code, json.loads(result.out)["call_id"]) == (0, call_id), result.err


async def test_the_record_of_a_finished_call(gateway: Daemon, function: Server) -> None:
    """Status, attempts, sizes and times of a call that went well."""
    function.behaviour = answer(201, b"made it")
    call_id = await gateway.submit("echo.openfaas-fn/path", b"four")
    record = await gateway.final(call_id)
    assert set(record) - {"app"} == RECORD_KEYS  # app: the label that calls by Fn's route have
    assert (record["call_id"], record["function"], record["namespace"]) == (call_id, "echo", "openfaas-fn")
    assert (record["queue"], record["status"]) == ("faas-request", "success")
    assert (record["attempts"], record["max_attempts"], record["interrupted"]) == (1, 10, 0)
    assert (record["http_status"], record["error"]) == (201, None)
    assert (record["request_bytes"], record["response_bytes"]) == (4, 7)
    assert set(record["callback"]) == {"url", "status", "attempts", "http_status", "error"}
    assert record["callback"]["status"] == "none"


async def test_times_in_a_record_are_rfc_3339_in_utc(gateway: Daemon) -> None:
    """They end in Z and are in the order in which things happened."""
    record = await gateway.final(await gateway.submit("echo"))
    times = [record[name] for name in ("created_at", "started_at", "completed_at")]
    for text in times:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", text)
    assert times == sorted(times)
    assert 0 < record["duration_seconds"] < PATIENCE


async def test_the_record_of_a_running_call(gateway: Daemon, function: Server) -> None:
    """A call that runs says so, and has no end yet."""
    function.behaviour = gate = Gate()
    call_id = await gateway.submit("echo")
    await function.wait_for(1)
    record = await gateway.record(call_id)
    assert (record["status"], record["attempts"], record["http_status"]) == ("running", 1, None)
    assert record["started_at"] is not None
    assert record["completed_at"] is None
    gate.open()
    assert (await gateway.final(call_id))["status"] == "success"


async def test_the_record_of_a_queued_call(daemon: StartDaemon, function: Server) -> None:
    """A call that waits for its turn has not started."""
    function.behaviour = gate = Gate()
    gateway = await daemon(
        f'[functions.echo]\nurl = "{function.url}"\nqueue = "narrow"\n[queues.narrow]\nmax_inflight = 1'
    )
    await gateway.submit("echo")
    await function.wait_for(1)
    call_id = await gateway.submit("echo")
    record = await gateway.record(call_id)
    assert (record["status"], record["queue"], record["attempts"]) == ("queued", "narrow", 0)
    assert (record["started_at"], record["completed_at"], record["duration_seconds"]) == (None, None, None)
    gate.open()
    assert (await gateway.final(call_id))["status"] == "success"


async def test_an_unknown_call_has_no_record(gateway: Daemon) -> None:
    """404, in one line."""
    reply = await ask(gateway.url, f"/system/calls/{uuid.uuid4()}")
    assert (reply.status, len(reply.body.splitlines())) == (404, 1)


# ---- operating it ----------------------------------------------------------------------------------------------


async def test_a_healthy_daemon_says_so(gateway: Daemon) -> None:
    """Both probes answer 200."""
    assert [(await ask(gateway.url, path)).status for path in ("/healthz", "/readyz")] == [200, 200]


async def metrics(gateway: Daemon) -> dict[tuple[str, str], float]:
    """The samples by name and labels, the labels written as `a=1 b=2` in order of their names."""
    reply = await ask(gateway.url, "/metrics")
    assert reply.status == 200
    samples = {}
    for family in text_string_to_metric_families(reply.body.decode()):
        for sample in family.samples:
            labels = " ".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[sample.name, labels] = sample.value
    return samples


async def test_the_metrics_count_what_is_done(gateway: Daemon, sink: Server) -> None:
    """Under OpenFaaS's names, after one sync call and one async call with a callback."""
    await ask(gateway.url, "/function/echo")
    await gateway.final(await gateway.submit("echo", X_Callback_Url=sink.url))
    found = await metrics(gateway)
    assert found["gateway_function_invocation_total", "code=200 function_name=echo.openfaas-fn"] == 2
    assert found["gateway_function_invocation_started", "function_name=echo.openfaas-fn"] == 2
    assert found["gateway_functions_seconds_count", "code=200 function_name=echo.openfaas-fn"] == 2
    assert found["gateway_service_count", "function_name=echo.openfaas-fn"] == 1
    assert found["queue_worker_messages_submitted_total", "queue_name=faas-request"] == 1
    assert found["queue_worker_messages_processed_total", "queue_name=faas-request"] == 1
    assert found["faasd_async_calls_total", "status=success"] == 1
    assert found["faasd_async_callbacks_total", "status=delivered"] == 1
    assert found["faasd_async_retries_total", ""] == 0
    assert found["faasd_async_commit_seconds_count", ""] >= 1


async def test_an_idle_daemon_commits_three_times_for_a_call_with_its_callback(gateway: Daemon, sink: Server) -> None:
    """What follows at once shares a commit: the call and its claim, its outcome and the callback's claim."""
    for number in range(3):
        assert (await metrics(gateway))["faasd_async_commit_seconds_count", ""] == 3 * number
        call_id = await gateway.submit("echo", X_Callback_Url=sink.url)
        await sink.wait_for(number + 1)  # To ask for the record sooner may tear apart what belongs together.
        await gateway.final(call_id)


async def test_calls_go_on_while_metrics_are_written(daemon: StartDaemon, function: Server, tmp_path: Path) -> None:
    """Those of many functions take long."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    before = f"""
def slow(*figures, scraped=faasd_async.scraped):
    open({str(fifo)!r}).read()
    return scraped(*figures)
faasd_async.scraped = slow
"""
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"\n', before=before)
    scrape = asyncio.create_task(ask(gateway.url, "/metrics"))
    writer = await asyncio.to_thread(os.open, fifo, os.O_WRONLY)  # once it is read
    try:
        assert (await ask(gateway.url, "/function/it")).status == 200
    finally:
        os.close(writer)
    assert b"gateway_function_invocation_total" in (await scrape).body


async def test_the_metrics_show_what_waits(gateway: Daemon, function: Server) -> None:
    """Six calls, of which four may run at once."""
    function.behaviour = gate = Gate()
    calls = [await gateway.submit("echo") for _ in range(6)]
    await function.wait_for(4)
    found = await metrics(gateway)
    labels = "function_name=echo.openfaas-fn queue_name=faas-request"
    assert found["queue_worker_pending_messages", labels] == 2
    assert found["queue_worker_function_invocation_inflight", labels] == 4
    assert 0 <= found["faasd_async_oldest_seconds", "queue=faas-request"] < PATIENCE
    gate.open()
    for call_id in calls:
        await gateway.final(call_id)


async def test_unknown_functions_never_become_label_values(gateway: Daemon) -> None:
    """Or a stranger with a list of names could fill the memory of daemon and Prometheus."""
    for target in ("/function/stranger", "/function/echo.stranger", "/async-function/stranger"):
        assert (await ask(gateway.url, target, method="POST")).status == 404
    assert b"stranger" not in (await ask(gateway.url, "/metrics")).body


async def test_it_listens_on_several_addresses_and_on_a_unix_socket(
    daemon: StartDaemon, function: Server, tmp_path: Path
) -> None:
    """`listen` takes a list; `unix:` is a socket file, which curl can talk to."""
    path = tmp_path / "gateway.sock"
    gateway = await daemon(
        f'[gateway]\nlisten = ["127.0.0.1:0", "127.0.0.2:0", "unix:{path}"]\n[functions.echo]\nurl = "{function.url}"'
    )
    await gateway.wait_for_log(str(path))
    other = re.search(r"http://127\.0\.0\.2:\d+", await gateway.wait_for_log("http://127.0.0.2:"))
    assert other is not None
    assert (await ask(gateway.url, "/healthz")).status == 200
    assert (await ask(other.group(), "/healthz")).status == 200
    result = await run("curl", "-sS", "-d", "hi", "--unix-socket", path, "http://localhost/function/echo")
    assert (result.code, result.out) == (0, "ok"), result.err


async def test_a_socket_file_left_by_a_dead_daemon_is_replaced(daemon: StartDaemon, tmp_path: Path) -> None:
    """After kill -9 the daemon starts again on the same unix socket, with the mode that it is to have."""
    path = tmp_path / "gateway.sock"
    gateway = await daemon(f'[gateway]\nlisten = "unix:{path}"')
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    await gateway.kill()
    gateway.configure(f'[gateway]\nlisten = "unix:{path}"\nsocket_mode = "0600"')
    await gateway.start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    settings = f'[gateway]\nlisten = "unix:{path}"\n[store]\npath = "{tmp_path}/other.db"'
    other = await daemon(settings, start=False)
    await other.spawn()
    assert await other.ended() == 75  # It is not taken away from the one that lives.
    assert f"{path}: Address already in use" in other.log
    result = await run(
        "curl", "-sS", "-w", "%{http_code}", "-o", "/dev/null", "--unix-socket", path, "http://x/healthz"
    )
    assert (result.code, result.out) == (0, "200"), result.err
    await gateway.terminate()
    assert not path.exists()


async def test_a_stop_removes_no_socket_file_of_another_process(daemon: StartDaemon, tmp_path: Path) -> None:
    """Which has taken the place of ours."""
    path = tmp_path / "gateway.sock"
    gateway = await daemon(f'[gateway]\nlisten = "unix:{path}"')
    path.unlink()
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(str(path))
        await gateway.terminate()
    assert path.is_socket()


async def test_the_command_line_can_set_the_listener(daemon: StartDaemon, tmp_path: Path) -> None:
    """`--listen` wins over the file."""
    gateway = await daemon('[gateway]\nlisten = "192.0.2.1:1"', start=False)
    gateway.arguments = ["--listen", "127.0.0.1:0"]
    await gateway.start()
    assert urlsplit(gateway.url).hostname == "127.0.0.1"
