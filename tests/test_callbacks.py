"""Callbacks: what is posted where, and how hard the daemon tries."""

import asyncio
import base64
import contextlib
import gzip
import json
import os
import signal
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from conftest import (
    PATIENCE,
    Daemon,
    Names,
    Request,
    Server,
    StartDaemon,
    answer,
    ask,
    never,
    rude_server,
    run,
    to_toml,
)
from operating import cancel

CREDENTIALS = "sink-user:s%3Acret%40word"  # user `sink-user`, password `s:cret@word`
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PASSWORDS = ("s%3Acret%40word", "s:cret@word", base64.b64encode(b"sink-user:s:cret@word").decode())


@pytest.fixture
async def gateway(daemon: StartDaemon, function: Server) -> Daemon:
    """A daemon with one function, `echo`, that is called twice at most."""
    return await daemon(f'[functions.echo]\nurl = "{function.url}"\n[retry]\nattempts = 2')


# ---- what is posted --------------------------------------------------------------------------------------------


async def test_the_outcome_is_posted_to_the_callback(gateway: Daemon, function: Server, sink: Server) -> None:
    """Body and headers of the function's answer, and what the daemon knows about the call."""
    function.behaviour = answer(201, b"made it", Content_Type="text/x-outcome", X_Own="v")
    call_id = await gateway.submit("echo", b"body", X_Callback_Url=f"{sink.url}/hook?a=%2F&b")
    (request,) = await sink.wait_for(1)
    headers = request.headers
    assert (request.method, request.target, request.body) == ("POST", "/hook?a=%2F&b", b"made it")
    assert (headers["Content-Type"], headers["X-Own"]) == ("text/x-outcome", "v")
    assert (headers["X-Call-Id"], headers["X-Function-Name"]) == (call_id, "echo")
    assert (headers["X-Function-Status"], headers["X-Retry"], headers["X-Retry-Max"]) == ("201", "0", "2")
    assert float(headers["X-Duration-Seconds"]) > 0
    assert headers["X-Start-Time"] == function.requests[0].headers["X-Start-Time"]
    assert headers["User-Agent"].startswith("faasd-async/")


async def test_a_callback_tells_how_often_the_function_was_tried_again(
    gateway: Daemon, function: Server, sink: Server
) -> None:
    """X-Retry of X-Retry-Max, whatever the callback's own attempts."""

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return web.Response(status=500 if len(function.requests) == 1 else 200)

    function.behaviour = behaviour
    await gateway.submit("echo", X_Callback_Url=sink.url)
    (request,) = await sink.wait_for(1)
    assert (request.headers["X-Retry"], request.headers["X-Retry-Max"]) == ("1", "2")


async def test_a_trace_is_carried_to_the_function_and_to_the_callback(
    gateway: Daemon, function: Server, sink: Server
) -> None:
    """It is that of the call, whatever trace the function's answer belongs to; the record shows it."""
    function.behaviour = answer(body=b"x", traceparent=TRACEPARENT.replace("b7", "cc"), tracestate="theirs=1")
    call_id = await gateway.submit("echo", traceparent=TRACEPARENT, X_Callback_Url=sink.url)
    (told,) = await sink.wait_for(1)
    for request in (function.requests[0], told):
        assert request.headers.getall("traceparent") == [TRACEPARENT]
        assert "tracestate" not in request.headers
    assert (await gateway.final(call_id))["traceparent"] == TRACEPARENT


async def test_a_trace_that_is_none_is_passed_on_and_not_recorded(
    gateway: Daemon, function: Server, sink: Server
) -> None:
    """Who reads headers that make no sense begins a trace of its own, as W3C has it, and that one goes on."""
    function.behaviour = answer(body=b"x", traceparent=TRACEPARENT, tracestate="theirs=1")
    call_id = await gateway.submit("echo", traceparent="none", tracestate="a=1", X_Callback_Url=sink.url)
    (told,) = await sink.wait_for(1)
    seen = [(request.headers["traceparent"], request.headers["tracestate"]) for request in (function.requests[0], told)]
    assert seen == [("none", "a=1"), (TRACEPARENT, "theirs=1")]
    assert "traceparent" not in await gateway.final(call_id)


async def test_every_header_of_a_callback_is_there_once(gateway: Daemon, function: Server, sink: Server) -> None:
    """What the function set is not doubled by the daemon, and its repeats are not merged."""

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        response = web.Response(body=b"x", headers={"X-Duration-Seconds": "0.5", "X-Call-Id": "the-functions-own"})
        response.headers.extend([("X-Many", "1"), ("X-Many", "2")])
        return response

    function.behaviour = behaviour
    call_id = await gateway.submit("echo", X_Callback_Url=sink.url)
    (request,) = await sink.wait_for(1)
    headers = request.headers
    assert headers.getall("X-Many") == ["1", "2"]
    assert headers.getall("X-Call-Id") == [call_id]
    for name in ("X-Duration-Seconds", "Content-Type", "Content-Length", "Host", "User-Agent", "X-Function-Status"):
        assert len(headers.getall(name)) == 1, headers


async def test_a_compressed_outcome_is_posted_as_it_is(gateway: Daemon, function: Server, sink: Server) -> None:
    """The bytes that the function gave, under the Content-Encoding that it gave."""
    packed = gzip.compress(b"a" * 1000)
    function.behaviour = answer(body=packed, Content_Encoding="gzip")
    await gateway.submit("echo", X_Callback_Url=sink.url)
    (request,) = await sink.wait_for(1)
    assert (request.body, request.headers["Content-Encoding"]) == (packed, "gzip")


async def test_hop_by_hop_headers_of_the_outcome_are_not_posted(
    gateway: Daemon, function: Server, sink: Server
) -> None:
    """They were about the function's connection."""
    function.behaviour = answer(body=b"x", Connection="close, X-Private", X_Private="1", Keep_Alive="timeout=77")
    await gateway.submit("echo", X_Callback_Url=sink.url)
    (request,) = await sink.wait_for(1)
    assert not {"X-Private", "Keep-Alive"} & set(request.headers)


async def test_a_delivered_callback_is_in_the_record(gateway: Daemon, sink: Server) -> None:
    """With its URL, its attempts and what the receiver said."""
    sink.behaviour = answer(204)
    record = await gateway.final(await gateway.submit("echo", X_Callback_Url=f"{sink.url}/hook"))
    expected = {"url": f"{sink.url}/hook", "status": "delivered", "attempts": 1, "http_status": 204, "error": None}
    assert record["callback"] == expected


async def test_an_error_is_posted_when_attempts_are_used_up(gateway: Daemon, function: Server, sink: Server) -> None:
    """One callback with the last answer, not one for each attempt."""
    function.behaviour = answer(500, b"broken")
    call_id = await gateway.submit("echo", X_Callback_Url=sink.url)
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"], record["http_status"]) == ("error", 2, 500)
    assert [(request.headers["X-Function-Status"], request.body) for request in sink.requests] == [("500", b"broken")]


async def test_a_refusal_of_the_function_is_posted_at_once(gateway: Daemon, function: Server, sink: Server) -> None:
    """A 400 is final; its body goes to the callback."""
    function.behaviour = answer(400, b"no such figure")
    await gateway.submit("echo", X_Callback_Url=sink.url)
    (request,) = await sink.wait_for(1)
    assert (request.headers["X-Function-Status"], request.body) == ("400", b"no such figure")
    assert len(function.requests) == 1


async def test_a_timeout_is_posted_as_504_without_a_body(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """There was no answer to pass on, but the caller is told."""
    function.behaviour = never
    gateway = await daemon(
        f'[functions.echo]\nurl = "{function.url}"\n[retry]\nattempts = 1\n[queues.faas-request]\ntimeout = "100ms"'
    )
    call_id = await gateway.submit("echo", X_Callback_Url=sink.url)
    (request,) = await sink.wait_for(1)
    assert (request.headers["X-Function-Status"], request.body, request.call_id) == ("504", b"", call_id)
    assert (await gateway.final(call_id))["status"] == "timeout"


async def test_a_dead_function_is_posted_as_502_without_a_body(daemon: StartDaemon, refused: str, sink: Server) -> None:
    """The same for one that cannot be reached."""
    gateway = await daemon(f'[functions.down]\nurl = "{refused}"\n[retry]\nattempts = 2')
    call_id = await gateway.submit("down", X_Callback_Url=sink.url)
    (request,) = await sink.wait_for(1)
    assert (request.headers["X-Function-Status"], request.body, request.call_id) == ("502", b"", call_id)
    assert (await gateway.final(call_id))["status"] == "error"


async def test_a_bare_socket_receives_a_callback(gateway: Daemon, function: Server) -> None:
    """As a person would try it with `nc -l`: the request is text, and a few lines answer it."""
    function.behaviour = answer(body=b"hello from the function\n")
    received = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.set_result(await reader.readuntil(b"hello from the function\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        call_id = await gateway.submit("echo", X_Callback_Url=f"http://127.0.0.1:{port}/hook")
        text = await asyncio.wait_for(received, PATIENCE)
        assert text.startswith(b"POST /hook HTTP/1.1\r\n")
        assert f"\r\nX-Call-Id: {call_id}\r\n".encode() in text
        assert (await gateway.final(call_id))["callback"]["status"] == "delivered"


# ---- trying again ----------------------------------------------------------------------------------------------


async def test_a_callback_is_tried_again_without_running_the_function_again(
    gateway: Daemon, function: Server, sink: Server
) -> None:
    """The receiver is not well for a moment, in every way that HTTP has for it."""
    statuses = [408, 429, 500, 502, 503, 504, 200]

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return web.Response(status=statuses[len(sink.requests) - 1])

    sink.behaviour = behaviour
    record = await gateway.final(await gateway.submit("echo", X_Callback_Url=sink.url))
    assert len({(request.body, request.call_id, request.headers["X-Start-Time"]) for request in sink.requests}) == 1
    assert (record["callback"]["status"], record["callback"]["attempts"]) == ("delivered", len(statuses))
    assert (record["status"], record["attempts"], len(function.requests)) == ("success", 1, 1)


async def test_a_callback_waits_for_a_receiver_that_is_down(gateway: Daemon, function: Server, sink: Server) -> None:
    """A refused connection is tried again, too."""
    await sink.stop()
    call_id = await gateway.submit("echo", X_Callback_Url=sink.url)
    record = await gateway.until(call_id, lambda record: record["callback"]["attempts"] >= 2)
    assert (record["status"], record["callback"]["status"]) == ("success", "pending")
    assert record["callback"]["error"]
    await sink.start()
    (request,) = await sink.wait_for(1)
    assert (request.call_id, request.body) == (call_id, b"ok")
    assert (await gateway.final(call_id))["callback"]["status"] == "delivered"
    assert len(function.requests) == 1


async def test_the_log_tells_no_answer_of_a_receiver_that_gave_none(daemon: StartDaemon, refused: str) -> None:
    """The line of a failed callback has the status of an answer, as the record, or none."""
    gateway = await daemon('[functions.true]\ncommand = ["true"]\n[callback]\nattempts = 1')
    record = await gateway.final(await gateway.submit("true", X_Callback_Url=refused))
    assert (record["callback"]["status"], record["callback"]["http_status"]) == ("failed", None)
    line = await gateway.wait_for_log("callback failed")
    assert "Connection refused" in line
    assert "http_status" not in line


async def test_a_receiver_that_does_not_answer_is_given_up_for_now(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """`callback.timeout` ends an attempt, and the next one follows."""

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return await never(request, seen) if len(sink.requests) == 1 else web.Response()

    sink.behaviour = behaviour
    gateway = await daemon(f'[functions.echo]\nurl = "{function.url}"\n[callback]\ntimeout = "200ms"')
    record = await gateway.final(await gateway.submit("echo", X_Callback_Url=sink.url))
    assert (record["callback"]["status"], record["callback"]["attempts"]) == ("delivered", 2)
    assert len(function.requests) == 1


async def test_the_attempts_of_a_callback_are_limited(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """After `callback.attempts` it has failed; the call itself is still a success."""
    sink.behaviour = answer(500)
    gateway = await daemon(f'[functions.echo]\nurl = "{function.url}"\n[callback]\nattempts = 3')
    record = await gateway.final(await gateway.submit("echo", X_Callback_Url=sink.url))
    assert len(sink.requests) == 3
    assert (record["status"], record["callback"]["status"]) == ("success", "failed")
    assert (record["callback"]["attempts"], record["callback"]["http_status"]) == (3, 500)


async def test_a_refusal_of_the_receiver_is_final(gateway: Daemon, sink: Server) -> None:
    """A receiver that does not want it will not want it later."""
    for status in (400, 401, 404, 410, 422):
        sink.behaviour = answer(status)
        record = await gateway.final(await gateway.submit("echo", X_Callback_Url=sink.url))
        assert (record["callback"]["status"], record["callback"]["attempts"]) == ("failed", 1)
        assert record["callback"]["http_status"] == status
    assert len(sink.requests) == 5


async def test_a_redirect_is_a_failure(gateway: Daemon, sink: Server) -> None:
    """Following it would drop the body, so it is not followed."""
    for status in (301, 302, 303, 307, 308):
        sink.behaviour = answer(status, Location=f"{sink.url}/there")
        record = await gateway.final(await gateway.submit("echo", X_Callback_Url=f"{sink.url}/here"))
        assert record["callback"]["status"] == "failed", status
    assert {request.target for request in sink.requests} == {"/here"}


async def test_a_pending_callback_survives_kill_9(gateway: Daemon, function: Server, sink: Server) -> None:
    """It is delivered by the next process, and the function is not run again for it."""
    function.behaviour = answer(body=b"the only run")
    await sink.stop()
    call_id = await gateway.submit("echo", X_Callback_Url=sink.url)
    await gateway.until(call_id, lambda record: record["callback"]["attempts"] >= 1)
    await gateway.kill()
    await sink.start()
    await gateway.start()
    (request,) = await sink.wait_for(1)
    assert (request.call_id, request.body, request.headers["X-Function-Status"]) == (call_id, b"the only run", "200")
    record = await gateway.final(call_id)
    assert (record["callback"]["status"], record["status"], record["attempts"]) == ("delivered", "success", 1)
    assert len(function.requests) == 1


async def test_a_callback_that_was_cut_off_by_kill_9_is_sent_again(
    gateway: Daemon, function: Server, sink: Server
) -> None:
    """At least once: the receiver had it, but the daemon never heard so."""
    sink.behaviour = never
    call_id = await gateway.submit("echo", X_Callback_Url=sink.url)
    await sink.wait_for(1)
    await gateway.kill()
    sink.behaviour = answer()
    await gateway.start()
    requests = await sink.wait_for(2)
    assert [request.call_id for request in requests] == [call_id, call_id]
    assert (await gateway.final(call_id))["callback"]["status"] == "delivered"
    assert len(function.requests) == 1


async def test_a_pending_callback_survives_a_clean_stop(gateway: Daemon, function: Server, sink: Server) -> None:
    """SIGTERM does not wait for a receiver that is down, nor forget it."""
    await sink.stop()
    call_id = await gateway.submit("echo", X_Callback_Url=sink.url)
    await gateway.until(call_id, lambda record: record["callback"]["attempts"] >= 1)
    assert await gateway.terminate() == 0
    await sink.start()
    await gateway.start()
    assert (await sink.wait_for(1))[0].call_id == call_id
    assert (await gateway.final(call_id))["callback"]["status"] == "delivered"
    assert len(function.requests) == 1


async def test_a_dead_receiver_does_not_hold_up_other_callbacks(
    daemon: StartDaemon, function: Server, refused: str, sink: Server
) -> None:
    """Many calls wait for a receiver that is down; one for another receiver is delivered meanwhile."""
    gateway = await daemon(f'[functions.echo]\nurl = "{function.url}"\n[callback]\nattempts = 1000\nmax_inflight = 2')
    for _ in range(50):
        await gateway.submit("echo", X_Callback_Url=refused)
    call_id = await gateway.submit("echo", X_Callback_Url=sink.url)
    assert (await sink.wait_for(1))[0].call_id == call_id


async def test_of_hosts_that_have_failed_the_oldest_are_forgotten(
    daemon: StartDaemon, function: Server, refused: str, sink: Server
) -> None:
    """The last callback to one may be cancelled: nothing would tell that it works again, and no memory is for ever."""
    settings = f'[functions.echo]\nurl = "{function.url}"\n[callback]\nmin_wait = "1h"\nmax_wait = "1h"'
    gateway = await daemon(settings, before="faasd_async.MAX_FAILING = 1")
    await sink.stop()
    for url in (sink.url, refused):
        call_id = await gateway.submit("echo", X_Callback_Url=url)
        await gateway.until(call_id, lambda record: record["callback"]["attempts"] > 0)
        assert await cancel(gateway, call_id) == 202
    await sink.start()
    sink.behaviour = never
    for _ in range(4):
        await gateway.submit("echo", X_Callback_Url=sink.url)
    await sink.until(lambda: sink.running == 4, "as many deliveries as to any host")


STATUS_LINE_ONLY = b"HTTP/1.1 200 OK\r\nX-Long: "
NO_BODY_YET = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"


@pytest.mark.parametrize("said", [STATUS_LINE_ONLY, NO_BODY_YET])
async def test_a_stop_does_not_undo_what_a_status_line_has_said(
    daemon: StartDaemon, function: Server, said: bytes
) -> None:
    """A callback that was answered with 2xx is delivered, though the rest of the answer is waited for."""
    deliveries = 0
    answered = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal deliveries
        await reader.readuntil(b"\r\n\r\n")
        deliveries += 1
        writer.write(said)
        await writer.drain()
        answered.set()
        await reader.read()  # until the daemon hangs up
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as receiver:
        url = f"http://127.0.0.1:{receiver.sockets[0].getsockname()[1]}"
        settings = f'[functions.echo]\nurl = "{function.url}"\n[gateway]\ndrain_timeout = "0s"'
        gateway = await daemon(settings, before=f"faasd_async.DISCARD_S = {PATIENCE}")
        call_id = await gateway.submit("echo", X_Callback_Url=url)
        await answered.wait()
        for _ in range(3):  # then it has read what was there before
            assert (await ask(gateway.url, "/healthz")).status == 200
        await gateway.terminate()
        await gateway.start()
        callback = (await gateway.final(call_id))["callback"]
        assert (callback["status"], callback["attempts"], deliveries) == ("delivered", 1, 1)


async def test_a_callback_url_that_is_none_is_given_up(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """Whoever has stored it: the call ends in its own way, the callback fails, and the record says why."""
    gateway = await daemon(f'[functions.echo]\nurl = "{function.url}"\n[callback]\nattempts = 1')
    call_id = await gateway.submit("echo", X_Delay="1h", X_Callback_Url=sink.url)
    await gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.store)) as store, store:
        store.execute("UPDATE calls SET callback_url = 'http://[2:]/', due_at = 0")
    await gateway.start()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"]) == ("success", 1)
    assert record["callback"]["status"] == "failed"
    assert record["callback"]["error"] == "the callback URL can't be reached: it is no valid URL"


# ---- where it is posted ----------------------------------------------------------------------------------------


async def test_the_gateways_names_mean_this_daemon(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """A callback may be another function, sync or async; no name is looked up for it."""
    function.behaviour = answer(body=b"first result")
    gateway = await daemon(f'[functions.first]\nurl = "{function.url}"\n[functions.second]\nurl = "{sink.url}"')
    names = ("gateway", "gateway.openfaas", "gateway.openfaas.svc.cluster.local", "gateway:8080", "Gateway.")
    urls = [f"http://{name}/{route}/second/path?q=%2F" for name in names for route in ("function", "async-function")]
    calls = [await gateway.submit("first", X_Callback_Url=url) for url in urls]
    requests = await sink.wait_for(len(calls))
    assert sorted(request.call_id for request in requests) == sorted(calls)
    assert {(request.target, request.body) for request in requests} == {("/path?q=%2F", b"first result")}


async def test_a_callback_to_this_daemon_is_delivered(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """Its record shows what the other function answered."""
    sink.behaviour = answer(201)
    gateway = await daemon(f'[functions.first]\nurl = "{function.url}"\n[functions.second]\nurl = "{sink.url}"')
    record = await gateway.final(await gateway.submit("first", X_Callback_Url="http://gateway:8080/function/second"))
    assert (record["callback"]["status"], record["callback"]["http_status"]) == ("delivered", 201)


@pytest.mark.parametrize("lists", ['deny = ["127.0.0.0/8", "::1/128"]', 'allow = ["hooks.example"]'])
async def test_a_callback_to_this_daemon_needs_no_leave(
    daemon: StartDaemon, function: Server, sink: Server, lists: str
) -> None:
    """What `callback.allow` and `callback.deny` say is about others, wherever this daemon listens."""
    functions = f'[functions.first]\nurl = "{function.url}"\n[functions.second]\nurl = "{sink.url}"\n'
    gateway = await daemon(f"{functions}[callback]\nattempts = 1\n{lists}")
    record = await gateway.final(await gateway.submit("first", X_Callback_Url="http://gateway:8080/function/second"))
    assert (record["callback"]["status"], record["callback"]["error"]) == ("delivered", None)


OTHER_ROUTES = (
    *("", "/", "/system/queues/faas-request/pause", "/function", "/metrics", "/ui/"),
    *("/%66unction/second", "//function/second", "/system/functions?/function/second"),
)


async def test_a_callback_to_this_daemon_is_for_functions_only(daemon: StartDaemon, function: Server) -> None:
    """Who may call functions, through a proxy that passes on nothing else perhaps, operates nothing by a callback."""
    gateway = await daemon(f'[functions.first]\nurl = "{function.url}"')
    for path in OTHER_ROUTES:
        headers = (f"X-Callback-Url: http://gateway:8080{path}",)
        reply = await ask(gateway.url, "/async-function/first", *headers, method="POST")
        assert (reply.status, reply.body.startswith(b"X-Callback-Url:")) == (400, True), path
    dots = "http://gateway/function/../system/queues/faas-request/pause"
    record = await gateway.final(await gateway.submit("first", X_Callback_Url=dots))
    assert record["callback"]["http_status"] == 404  # from the function of that name
    assert (await ask(gateway.url, "/readyz")).body == b"ok\n"


async def test_a_host_that_begins_to_mean_this_daemon_is_for_functions_only(
    daemon: StartDaemon, function: Server
) -> None:
    """The rule counts for calls, too, that were accepted when the host was another."""
    functions = f'[functions.first]\nurl = "{function.url}"\n'
    gateway = await daemon(functions)
    url = "http://edge.example/system/queues/faas-request/pause"
    call_id = await gateway.submit("first", X_Callback_Url=url, X_Delay="2s")
    gateway.configure(f'{functions}[callback]\ngateway_hosts = ["edge.example"]')
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("configuration reloaded")
    callback = (await gateway.final(call_id))["callback"]
    assert (callback["status"], callback["error"]) == ("failed", "callbacks to this daemon are for functions only")
    assert (await ask(gateway.url, "/readyz")).body == b"ok\n"


async def test_the_gateways_names_can_be_set(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """`callback.gateway_hosts` replaces the default."""
    gateway = await daemon(
        f'[functions.first]\nurl = "{function.url}"\n[functions.second]\nurl = "{sink.url}"\n'
        '[callback]\ngateway_hosts = ["edge.example"]'
    )
    await gateway.submit("first", X_Callback_Url="http://edge.example/function/second/x")
    assert (await sink.wait_for(1))[0].target == "/x"


async def test_credentials_in_the_url_are_used(gateway: Daemon, sink: Server) -> None:
    """They are sent as basic authentication, percent-decoded, and are no part of the target."""
    url = sink.url.replace("://", f"://{CREDENTIALS}@")
    await gateway.submit("echo", X_Callback_Url=f"{url}/hook")
    (request,) = await sink.wait_for(1)
    assert request.headers.getall("Authorization") == [f"Basic {PASSWORDS[2]}"]
    assert request.target == "/hook"


async def test_credentials_in_the_url_are_shown_nowhere(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """Not in the record, not in the log, whether the callback is delivered or fails."""
    gateway = await daemon(
        f'[functions.echo]\nurl = "{function.url}"\n[callback]\nattempts = 2\n'
        '[log]\nlevel = "debug"\nwrite_debug = true'
    )
    url = sink.url.replace("://", f"://{CREDENTIALS}@")
    delivered = await gateway.final(await gateway.submit("echo", X_Callback_Url=f"{url}/hook"))
    sink.behaviour = answer(500)
    failed = await gateway.final(await gateway.submit("echo", X_Callback_Url=f"{url}/hook"))
    await sink.stop()
    unreached = await gateway.final(await gateway.submit("echo", X_Callback_Url=f"{url}/hook"))
    shown = f"{delivered}{failed}{unreached}{gateway.log}"
    assert sink.url.removeprefix("http://") in delivered["callback"]["url"]
    assert not [password for password in PASSWORDS if password in shown]


async def test_callbacks_can_be_limited_to_a_list(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """With `callback.allow`, every other host is refused when the call is sent."""
    gateway = await daemon(f'[functions.echo]\nurl = "{function.url}"\n[callback]\nallow = ["127.0.0.0/8"]')
    call_id = await gateway.submit("echo", X_Callback_Url=sink.url)
    assert (await gateway.final(call_id))["callback"]["status"] == "delivered"
    result = await run(
        *("curl", "-sS", "-d", "x", "-H", "X-Callback-Url: http://192.0.2.1/", "-w", " %{http_code}"),
        f"{gateway.url}/async-function/echo",
    )
    assert result.out.endswith(" 400"), result


async def test_a_denied_address_is_not_reached_through_a_name(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """What counts is the address that would be connected to, whatever name leads there."""
    gateway = await daemon(f'[functions.echo]\nurl = "{function.url}"\n[callback]\ndeny = ["127.0.0.0/8", "::1/128"]')
    call_id = await gateway.submit("echo", X_Callback_Url=f"http://localhost:{sink.port}/")
    record = await gateway.final(call_id)
    assert record["callback"]["status"] == "failed"
    assert sink.requests == []


@contextlib.asynccontextmanager
async def forbidden(host: str, port: int) -> AsyncIterator[list[object]]:
    """A listener that nobody must connect to; who did."""
    callers: list[object] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append(writer.get_extra_info("peername"))
        writer.close()

    async with await asyncio.start_server(serve, host, port):
        yield callers


GUARDED = '[callback]\ndeny = ["127.0.0.2/32"]\nmin_wait = "10ms"\n'


async def test_a_name_that_points_elsewhere_by_the_time_of_delivery_is_not_followed(
    daemon: StartDaemon, function: Server, sink: Server, names: Names
) -> None:
    """DNS rebinding: allowed when the call was accepted, even when it was first delivered, and denied after that."""

    async def rebind(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        names.found["rebind.example"] = ["127.0.0.2"]
        return web.Response(status=503, headers={"Connection": "close"})

    names.found["rebind.example"] = ["127.0.0.1"]
    sink.behaviour = rebind
    async with forbidden("127.0.0.2", sink.port) as callers:
        gateway = await daemon(f'{GUARDED}[functions.echo]\nurl = "{function.url}"', before=names.before)
        record = await gateway.final(await gateway.submit("echo", X_Callback_Url=f"http://rebind.example:{sink.port}/"))
        assert callers == []
    assert len(sink.requests) == 1
    assert (record["callback"]["status"], record["callback"]["attempts"]) == ("failed", 2)
    assert record["callback"]["error"] == "callbacks to rebind.example at 127.0.0.2 are not allowed"


async def test_of_the_addresses_of_a_name_the_denied_ones_are_left_out(
    daemon: StartDaemon, function: Server, sink: Server, names: Names
) -> None:
    """In whatever order they come, and also when nobody listens at the one that is allowed."""
    names.found = {f"{one}.example": [f"127.0.0.{last}" for last in one] for one in ("12", "21", "23", "32")}
    async with forbidden("127.0.0.2", sink.port) as callers:
        gateway = await daemon(f'{GUARDED}attempts = 1\n[functions.echo]\nurl = "{function.url}"', before=names.before)
        for name in names.found:
            url = f"http://{name}:{sink.port}/"
            told = (await gateway.final(await gateway.submit("echo", X_Callback_Url=url)))["callback"]
            assert told["status"] == ("delivered" if "1" in name else "failed"), name
        assert callers == []
    assert len(sink.requests) == 2


async def test_a_name_for_a_link_local_address_is_not_followed(
    daemon: StartDaemon, function: Server, names: Names
) -> None:
    """Nobody has to deny the cloud's metadata, whatever name and form its address has."""
    gateway = await daemon(f'[functions.echo]\nurl = "{function.url}"', before=names.before)
    for address in ("169.254.169.254", "fe80::1", "::ffff:169.254.169.254"):
        names.found["metadata.example"] = [address]
        record = await gateway.final(await gateway.submit("echo", X_Callback_Url="http://metadata.example/latest/"))
        assert record["callback"]["status"] == "failed"
        assert "not allowed" in record["callback"]["error"], record


LOOPBACK = [
    "127.0.0.1", "127.0.0.1.", "127.1", "2130706433", "0x7f000001", "0x7f.1", "017700000001", "0177.0.0.1", "0",
    "0.0.0.0", "localhost", "LocalHost", "localhost.", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[::127.0.0.1]", "[::1%25lo]",
]  # fmt: skip


async def test_a_denied_address_is_denied_however_it_is_written(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """The forms that inet_aton and resolvers take for this machine: refused at once, or not connected to."""
    deny = '["127.0.0.0/8", "::1"]'
    gateway = await daemon(f'[functions.echo]\nurl = "{function.url}"\n[callback]\nattempts = 1\ndeny = {deny}')
    for host in LOOPBACK:
        headers = {"X-Callback-Url": f"http://{host}:{sink.port}/"}
        async with gateway.http.post(f"{gateway.url}/async-function/echo", headers=headers) as response:
            if response.status != 400:
                record = await gateway.final(response.headers["X-Call-Id"])
                assert record["callback"]["status"] == "failed", host
    assert sink.requests == []


async def test_a_denied_host_is_not_called_through_a_proxy(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """Which would know what is meant, however it is written: all is refused at once."""
    toml = f'[functions.echo]\nurl = "{function.url}"\n[callback]\ndeny = ["10.0.0.0/8", "evil.example"]'
    gateway = await daemon(toml, env={"http_proxy": sink.url})
    evil = ("evil.example.", "EVIL.example", "evil%2eexample")
    hosts = ("0xa.1", "167772161", "012.0.0.1", "10.1.2.3.", "[::ffff:10.0.0.1]", "0251.0376.0251.0376", *evil)
    for host in hosts:
        headers = {"X-Callback-Url": f"http://{host}/"}
        async with gateway.http.post(f"{gateway.url}/async-function/echo", headers=headers) as response:
            assert response.status == 400, host
    assert sink.requests == []


async def test_a_name_whose_address_stays_unknown_has_to_be_allowed_itself(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """A proxy would look it up: that networks are allowed says nothing of it."""
    toml = f'[functions.echo]\nurl = "{function.url}"\n[callback]\nattempts = 1\nallow = ["10.0.0.0/8", "near.example"]'
    gateway = await daemon(toml, env={"http_proxy": sink.url})
    records = {
        host: await gateway.final(await gateway.submit("echo", X_Callback_Url=f"http://{host}/"))
        for host in ("far.example", "near.example", "10.1.2.3")
    }
    told = {host: (record["callback"]["status"], record["callback"]["error"]) for host, record in records.items()}
    reason = "callbacks to far.example through a proxy are not allowed"
    delivered = ("delivered", None)
    assert told == {"far.example": ("failed", reason), "near.example": delivered, "10.1.2.3": delivered}


async def test_a_name_in_idna_is_compared_as_it_is_written(
    daemon: StartDaemon, function: Server, sink: Server, tmp_path: Path
) -> None:
    """In `callback.allow`, and in the file of headers."""
    (tmp_path / "headers.toml").write_text('["xn--bcher-kva.example"]\nX-Key = "k"\n')
    toml = f'[functions.echo]\nurl = "{function.url}"\n[callback]\nallow = ["xn--bcher-kva.example"]\n'
    gateway = await daemon(
        f'{toml}headers_file = "{tmp_path}/headers.toml"', env={"http_proxy": sink.url, "no_proxy": ""}
    )
    record = await gateway.final(await gateway.submit("echo", X_Callback_Url="http://xn--bcher-kva.example/"))
    assert record["callback"]["status"] == "delivered", record
    (request,) = await sink.wait_for(1)
    assert (request.headers["Host"], request.headers["X-Key"]) == ("xn--bcher-kva.example", "k")


async def test_what_is_denied_later_is_not_delivered_to(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """The lists count as they stand when a callback is sent: one that was accepted before is not sent any more."""
    sink.behaviour = answer(503)
    gateway = await daemon(f'[functions.echo]\nurl = "{function.url}"\n[callback]\nattempts = 100000')
    call_id = await gateway.submit("echo", X_Callback_Url=sink.url)
    await sink.wait_for(2)
    gateway.configure(to_toml({**gateway.settings, "callback": {"deny": ["127.0.0.1"]}}))
    gateway.signal(signal.SIGHUP)
    record = await gateway.final(call_id)
    assert record["callback"]["error"] == "callbacks to 127.0.0.1 are not allowed"


async def test_a_connection_to_what_is_denied_later_is_not_used(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """Receivers keep their connections open; where one of them leads is checked when it is made."""
    toml = f'[functions.echo]\nurl = "{function.url}"\n[callback]\nattempts = 1'
    gateway = await daemon(toml, before="faasd_async.PROOF_S = 0.0")  # A connection is used again at once.
    url = f"http://localhost:{sink.port}/"
    for _ in range(3):
        record = await gateway.final(await gateway.submit("echo", X_Callback_Url=url))
        assert record["callback"]["status"] == "delivered"
    gateway.configure(to_toml({**gateway.settings, "callback": {"deny": ["127.0.0.0/8", "::1/128"]}}))
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("configuration reloaded")
    record = await gateway.final(await gateway.submit("echo", X_Callback_Url=url))
    assert record["callback"]["status"] == "failed"
    assert len(sink.requests) == 3


async def test_openssl_finds_the_signature_right(
    daemon: StartDaemon, function: Server, sink: Server, tmp_path: Path
) -> None:
    """Standard Webhooks, computed by somebody else over the bytes that arrived."""
    key, body = os.urandom(32), os.urandom(1000)
    (tmp_path / "secret").write_text(f"whsec_{base64.b64encode(key).decode()}\n")
    function.behaviour = answer(body=body)
    gateway = await daemon(
        f'[functions.echo]\nurl = "{function.url}"\n[callback]\nsigning_secret_file = "{tmp_path}/secret"'
    )
    await gateway.submit("echo", X_Callback_Url=sink.url)
    (request,) = await sink.wait_for(1)
    assert request.body == body
    webhook_id = request.headers["webhook-id"]
    for _ in range(2):  # receivers drop what has the id of something else
        await gateway.submit("echo", X_Callback_Url=sink.url, X_Call_Id="batch")
    assert len({request.headers["webhook-id"] for request in await sink.wait_for(3)}) == 3
    signed = f"{webhook_id}.{request.headers['webhook-timestamp']}.".encode() + request.body
    command = ("openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", f"hexkey:{key.hex()}")
    result = await run(*command, stdin=signed)
    assert result.code == 0, result.err
    signature = base64.b64encode(bytes.fromhex(result.out.split()[-1])).decode()
    assert request.headers.getall("webhook-signature") == [f"v1,{signature}"]


async def test_a_receiver_gets_the_headers_that_the_file_has_for_it(
    daemon: StartDaemon, function: Server, sink: Server, tmp_path: Path
) -> None:
    """And no other receiver does. They are read anew on reload, and shown nowhere."""
    other = Server()
    await other.start()
    file = tmp_path / "headers.toml"
    address = sink.url.removeprefix("http://")
    more = 'Content-Type = "text/x-mine"\nX-Call-Id = "forged"'
    file.write_text(
        f'[127.0.0.9]\nAuthorization = "not for them"\n["{address}"]\nAuthorization = "Bearer t0ken"\n{more}\n'
    )
    function.behaviour = answer(200, b"21", Authorization="Basic x", Content_Type="text/plain", X_Own="1")
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"\n[callback]\nheaders_file = "{file}"')
    call_id = await gateway.submit("it", X_Callback_Url=f"{sink.url}/state")
    (told,) = await sink.wait_for(1)
    sent = {name: told.headers.getall(name) for name in ("Authorization", "Content-Type", "X-Call-Id", "X-Own")}
    assert list(sent.values()) == [["Bearer t0ken"], ["text/x-mine"], [call_id], ["1"]]
    await gateway.submit("it", X_Callback_Url=other.url)
    (told,) = await other.wait_for(1)
    assert "Authorization" not in told.headers
    assert told.headers["Content-Type"] == "text/plain"
    file.write_text(f'["{address}"]\nAuthorization = "Bearer an0ther"\n')
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("configuration reloaded")
    again = await gateway.submit("it", X_Callback_Url=sink.url)
    assert (await sink.wait_for(2))[1].headers.getall("Authorization") == ["Bearer an0ther"]
    record = json.dumps([await gateway.final(one) for one in (call_id, again)])
    for text in (gateway.log, record):
        assert "t0ken" not in text
        assert "an0ther" not in text
    await other.close()


async def test_headers_for_a_receiver_are_sent_as_they_stand_in_the_file(
    daemon: StartDaemon, function: Server, tmp_path: Path
) -> None:
    """In UTF-8, whatever characters they have."""
    (tmp_path / "headers.toml").write_text('["127.0.0.1"]\nX-Key = "ü €"\n', "utf-8")
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 Thanks\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as receiver:
        toml = f'[functions.echo]\nurl = "{function.url}"\n[callback]\nattempts = 1\n'
        gateway = await daemon(f'{toml}headers_file = "{tmp_path}/headers.toml"')
        url = f"http://127.0.0.1:{receiver.sockets[0].getsockname()[1]}/"
        record = await gateway.final(await gateway.submit("echo", X_Callback_Url=url))
    assert record["callback"]["status"] == "delivered", record
    assert "\r\nX-Key: ü €\r\n".encode() in heads[0]


async def test_what_would_steer_a_request_does_not_reach_the_receiver(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """A function may give back all headers that it was sent."""
    names = "Host Expect Authorization Cookie Via Origin Sec-Fetch-Site Range If-Match If-None-Match If-Modified-Since"
    names += " If-Unmodified-Since If-Range X-HTTP-Method-Override X-HTTP-Method X-Method-Override X-Callback-Hops"
    names += " X-Callback-Url X-Failure-Callback-Url Idempotency-Key X-Delay X-Not-Before X-Deadline X-Max-Attempts"
    names += " X-Queue X-Concurrency-Key"
    function.behaviour = answer(200, b"", ETag="it", **dict.fromkeys(names.split(), "steers"))
    gateway = await daemon(f'[functions.f]\nurl = "{function.url}"')
    await gateway.submit("f", X_Callback_Url=sink.url)
    (told,) = await sink.wait_for(1)
    assert told.headers["ETag"] == "it"
    assert "steers" not in told.headers.values()


async def test_how_the_function_ended_its_answer_does_not_reach_the_receiver(daemon: StartDaemon, sink: Server) -> None:
    """Not with spaces before the colon either, which some servers write: nor does the name keep them."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding : chunked\r\nConnection : X-Hop\r\nX-Hop: 1\r\nX-End: 2\r\n\r\n"
    async with rude_server(head + b"5\r\nwhole\r\n0\r\n\r\n") as url:
        gateway = await daemon(f'[functions.f]\nurl = "{url}"')
        reply = await ask(gateway.url, "/function/f")
        assert reply.body == b"whole"
        assert not {"Transfer-Encoding ", "Connection ", "X-Hop"} & set(reply.headers)
        await gateway.submit("f", X_Callback_Url=sink.url)
        (told,) = await sink.wait_for(1)
    assert (told.body, told.headers["X-End"], told.headers.get("X-Hop")) == (b"whole", "2", None)
