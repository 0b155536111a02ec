"""What the whole daemon shows of itself, and what it tells as it happens."""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from conftest import PATIENCE, Daemon, Gate, Request, Server, StartDaemon, answer, ask, connection, to_toml
from jetstream import NatsServer, StartHost, one_function, submit_all
from queues import OK, Bench, NatsStore, Settings

SETTINGS = """
[functions.it]
url = "{url}"
queue = "line"
max_inflight = 3
[functions.other]
command = ["true"]
[functions.gone]
command = ["/no/such/program"]
[retry]
attempts = 1
"""


async def stats(gateway: Daemon) -> dict[str, Any]:
    """What /system/stats says."""
    reply = await ask(gateway.url, "/system/stats")
    assert reply.status == 200, reply
    document: dict[str, Any] = json.loads(reply.body)
    return document


async def test_stats_tell_what_became_of_all_calls(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """By state and by function, also after a restart; the hour is that of the process."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    await gateway.final(await gateway.submit("it", X_Callback_Url=sink.url))
    function.behaviour = answer(400)
    await gateway.final(await gateway.submit("it"))
    function.behaviour = gate = Gate()
    running = await gateway.submit("it")
    await function.wait_for(3)
    await gateway.submit("it", X_Delay="1h")
    await gateway.submit("other", X_Delay="1h")
    shown = await stats(gateway)
    counts = {"delayed": 2, "queued": 0, "running": 1, "success": 1, "error": 1, "timeout": 0, "cancelled": 0}
    assert shown["counts"] == counts
    assert shown["callbacks"] == {"pending": 0, "delivered": 1, "failed": 0}
    it = next(item for item in shown["functions"] if item["name"] == "it")
    assert it["counts"] == {"delayed": 1, "running": 1, "success": 1, "error": 1}
    assert (it["kind"], it["queue"], it["max_inflight"], it["inflight"]) == ("url", "line", 3, 1)
    assert (sum(it["hour"]["calls"]), sum(it["hour"]["failures"])) == (2, 1)
    line = next(item for item in shown["queues"] if item["name"] == "line")
    assert {kind: sum(minutes) for kind, minutes in line["hour"].items()} == {"accepted": 4, "ended": 2, "failed": 1}
    assert (line["depth"], line["inflight"]) == (1, 1)
    gate.open()
    await gateway.final(running)
    await gateway.terminate()
    await gateway.start()
    shown = await stats(gateway)
    assert shown["counts"] == counts | {"running": 0, "success": 2}
    assert shown["callbacks"] == {"pending": 0, "delivered": 1, "failed": 0}


async def test_stats_of_a_shared_queue_tell_what_was_called_back(
    hosts: StartHost, function: Server, sink: Server
) -> None:
    """Since the start of this host, and by it, as they say of what has ended."""
    gateway = await hosts(one_function(function))
    await gateway.final(await gateway.submit("it", X_Callback_Url=sink.url))
    sink.behaviour = answer(404)
    await gateway.final(await gateway.submit("it", X_Callback_Url=sink.url))
    await gateway.wait_for_log("callback failed")
    assert (await stats(gateway))["callbacks"] == {"pending": 0, "delivered": 1, "failed": 1}


async def test_stats_tell_how_the_host_is(daemon: StartDaemon, function: Server) -> None:
    """What is stored, what is left, what commits take, what is wrong."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    await gateway.final(await gateway.submit("it"))
    shown = await stats(gateway)
    assert shown["trouble"] is None
    assert shown["durable"] is True
    assert shown["guarantee"] == "a call is on disk before its 202"
    store = shown["store"]
    assert (store["backend"], store["place"]) == ("sqlite", str(gateway.store))
    assert store["used_bytes"] > 0
    assert store["free_bytes"] > 0
    assert 0 < shown["commit_seconds"]["p50"] <= shown["commit_seconds"]["p99"]
    assert shown["memory_bytes"] > 1_000_000
    assert shown["uptime_seconds"] > 0
    async with asyncio.timeout(PATIENCE):
        while not (warnings := (await stats(gateway))["warnings"]):  # noqa: ASYNC110 - by a thread
            await asyncio.sleep(0.01)
    assert warnings == ["functions.gone.command: there is no program /no/such/program"]
    await gateway.wait_for_log(f"WARNING {warnings[0]}")


MANY = 2_000  # functions


async def answered_while_listing(gateway: Daemon, target: str) -> tuple[int, Any]:
    """How often somebody is answered, who asks again and again, until the list begins to come; the list."""
    meanwhile = 0
    async with connection(gateway.url) as (reader, writer), connection(gateway.url) as (listed, asking):
        asking.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        begun = asyncio.create_task(listed.readline())
        while not begun.done():
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\nok\n"), PATIENCE)
            meanwhile += 1
        assert await begun == b"HTTP/1.1 200 OK\r\n"
        return meanwhile, json.loads((await listed.read()).partition(b"\r\n\r\n")[2])


@pytest.mark.unmeasured
@pytest.mark.parametrize("target", ["/system/stats", "/system/functions"])
async def test_nobody_waits_for_a_list_of_many_functions(daemon: StartDaemon, target: str) -> None:
    """Others are answered again and again while it is made, and it is whole."""
    functions = {f"f{number}": {"url": "http://127.0.0.1:9"} for number in range(MANY)}
    gateway = await daemon(to_toml({"functions": functions}), before="faasd_async.TURN_S = 0.0001")
    most = 0
    for _ in range(5):  # A busy machine may keep us from asking meanwhile.
        meanwhile, document = await answered_while_listing(gateway, target)
        rows = document["functions"] if target == "/system/stats" else document
        assert [row["name"] for row in rows] == list(functions)
        if (most := max(most, meanwhile)) >= 10:
            break
    assert most >= 10, "they waited"


# ---- what went wrong -----------------------------------------------------------------------------


async def test_what_has_failed_at_last_is_a_warning_with_its_reason(daemon: StartDaemon, function: Server) -> None:
    """Queued or not, whatever the function is; what will be tried again is none, nor is a success."""
    gateway = await daemon(
        f"""
        [functions.it]
        url = "{function.url}"
        [functions.program]
        command = ["sh", "-c", "echo so; echo 'no such host' >&2; exit 3"]
        [retry]
        attempts = 2
        """
    )
    await gateway.final(await gateway.submit("it"))
    function.behaviour = answer(503)
    for name in ("it", "program"):
        await gateway.final(await gateway.submit(name))
        assert (await ask(gateway.url, f"/function/{name}")).status >= 500
    await gateway.wait_for_log('sync call failed error="function program')  # It is the last one.
    warnings = [line.split(" WARNING ")[1] for line in gateway.lines if " WARNING " in line]
    told = [re.sub(r"(call_id|duration)=\S+ ?", "", line).rstrip() for line in warnings]
    said = 'error="function program: exit status 3: no such host"'
    assert sorted(told) == [
        'call ended function=it status=error attempts=2 http_status=503 error="function it answered 503"',
        f"call ended function=program status=error attempts=2 http_status=500 {said}",
        'sync call failed error="function it answered 503"',
        f"sync call failed {said}",
    ]


@pytest.mark.parametrize("style", ["text", "json"])
async def test_the_journal_knows_what_is_a_warning(daemon: StartDaemon, tmp_path: Path, style: str) -> None:
    """By the priority before each line (sd-daemon(3)), which it takes away."""
    gateway = await daemon(
        f'[log]\nformat = "{style}"\n[functions.it]\ncommand = ["false"]\nretry.attempts = 1',
        prefix=("sh", "-c", 'export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2); exec "$@"', "sh"),
    )
    await gateway.final(await gateway.submit("it"))
    line = await gateway.wait_for_log("call ended")
    assert line.startswith("<4>")
    assert all(re.match("<[2-7]>", line) for line in gateway.lines)


async def test_a_paused_queue_is_named_by_readyz(daemon: StartDaemon, function: Server) -> None:
    """It is ready all the same."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    assert (await ask(gateway.url, "/readyz")).body == b"ok\n"
    for name in ("line", "faas-request"):
        await ask(gateway.url, f"/system/queues/{name}/pause", method="POST")
    reply = await ask(gateway.url, "/readyz")
    assert (reply.status, reply.body) == (200, b"ok; paused: faas-request, line\n")


# ---- who may only look ---------------------------------------------------------------------------

LOOKING = (
    *("/system/calls", "/system/calls/ID", "/system/calls/ID/log", "/system/calls/ID/result"),
    *("/system/calls/ID/request", "/system/calls/ID/log?follow=1", "/system/queues", "/system/stats"),
    *("/system/schedules", "/system/functions", "/system/info", "/metrics", "/ui/", "/v1/apps/a/calls"),
)
ACTING = (
    "GET /system/backup",  # It has the requests of others in it.
    *("POST /system/calls/retry?status=error", "POST /system/calls/cancel?status=queued"),
    *("POST /system/calls/ID/retry", "POST /system/calls/ID/callback", "POST /system/queues/line/pause"),
    *("POST /system/queues/line/purge", "POST /system/schedules/x/run", "POST /system/functions"),
    *("PUT /system/functions", "DELETE /system/functions", "POST /system/scale-function/it"),
    *("POST /system/secrets", "POST /async-function/it", "DELETE /async-function/ID", "GET /function/it"),
    *("POST /function/it", "POST /r/app/it"),
)


async def test_who_may_only_look_sees_everything_and_changes_nothing(daemon: StartDaemon, function: Server) -> None:
    """On every route: 200 to look, 403 to act, 401 with another password."""
    gateway = await daemon(SETTINGS.format(url=function.url), start=False)
    for name in ("admin", "guest"):
        (gateway.folder / name).write_text(name)
    auth = {"user_file": "admin", "password_file": "admin", "view_user_file": "guest", "view_password_file": "guest"}
    login = "".join(f"{key} = {json.dumps(str(gateway.folder / name))}\n" for key, name in auth.items())
    gateway.configure(f"{SETTINGS.format(url=function.url)}\n[auth]\n{login}invoke = true")
    await gateway.start()

    def credentials(user: str, password: str) -> str:
        return "Authorization: Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    admin, guest, stranger = [credentials(*it) for it in (("admin",) * 2, ("guest",) * 2, ("guest", "admin"))]
    accepted = await ask(gateway.url, "/async-function/it", admin, method="POST")
    call_id = accepted.headers["X-Call-Id"]
    done = await ask(gateway.url, f"/system/calls/{call_id}?wait=30s", guest)
    assert json.loads(done.body)["status"] == "success"
    for line in (f"GET {path}" for path in LOOKING):
        method, target = line.replace("ID", call_id).split(" ")
        assert (await ask(gateway.url, target, guest, method=method)).status == 200, line
        assert (await ask(gateway.url, target, stranger, method=method)).status == 401, line
    assert json.loads((await ask(gateway.url, "/system/stats", guest)).body)["may_act"] is False
    assert json.loads((await ask(gateway.url, "/system/stats", admin)).body)["may_act"] is True
    for line in ACTING:
        method, target = line.replace("ID", call_id).split(" ")
        refused = await ask(gateway.url, target, guest, method=method)
        assert refused.status == 403, line
        assert b"this login may look and not act: auth.view_user_file" in refused.body
    assert len(function.requests) == 1


# ---- what was asked and answered -----------------------------------------------------------------


async def test_a_result_opens_as_what_it_is_and_can_do_nothing(daemon: StartDaemon, function: Server) -> None:
    """A page that a function has written is hostile, as far as anybody knows."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    page = b"<script>fetch('/system/queues/line/purge', {method: 'POST'})</script>"
    function.behaviour = answer(body=page, Content_Type="text/html", Set_Cookie="a=b", Location="/")
    call_id = await gateway.submit("it")
    assert (await ask(gateway.url, f"/system/calls/{call_id}/result")).status in (200, 409)
    await gateway.final(call_id)
    reply = await ask(gateway.url, f"/system/calls/{call_id}/result")
    assert (reply.status, reply.body) == (200, page)
    assert reply.headers["Content-Type"] == "text/html"
    assert reply.headers["X-Function-Status"] == "200"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'; sandbox"
    assert reply.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert not {"Set-Cookie", "Location"} & set(reply.headers)


async def test_a_request_is_shown_without_its_secrets(daemon: StartDaemon, function: Server) -> None:
    """Its body as it came in; the rest as a document."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    call_id = await gateway.submit(
        "it/a?b=c",
        b'{"x": 1}',
        Content_Type="application/json",
        Authorization="Bearer s3cret",
        X_Api_Key="s3cret",
        X_Callback_Url="http://me:s3cret@127.0.0.1:9/",
    )
    shown = f"/system/calls/{call_id}/request"
    reply = await ask(gateway.url, shown)
    assert (reply.status, reply.body) == (200, b'{"x": 1}')
    assert reply.headers["Content-Type"] == "application/json"
    assert "sandbox" in reply.headers["Content-Security-Policy"]
    reply = await ask(gateway.url, shown, "Accept: application/json")
    document = json.loads(reply.body)
    assert (document["method"], document["target"], document["body_bytes"]) == ("POST", "/a?b=c", 8)
    headers = dict(document["headers"])
    assert headers["Authorization"] == headers["X-Api-Key"] == "***"
    assert headers["Content-Type"] == "application/json"
    assert b"s3cret" not in reply.body


# ---- output --------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def followed(gateway: Daemon, call_id: str) -> AsyncIterator[aiohttp.StreamReader]:
    """What a call writes, as it comes."""
    url = f"{gateway.url}/system/calls/{call_id}/log?follow=1"
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
        yield response.content


def open_fifo(path: Path) -> int:
    """Let a program that reads this go on; closing what is returned."""
    return os.open(path, os.O_WRONLY)


async def test_what_a_program_writes_is_seen_while_it_runs(daemon: StartDaemon, tmp_path: Path) -> None:
    """Both of its outputs, in the order in which they come; then the log ends."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = 'echo one; echo two >&2; cat "$FIFO"; echo three >&2; exit 3'
    gateway = await daemon(
        f"""
        [functions.it]
        command = ["sh", "-c", {json.dumps(script)}]
        env = {{ FIFO = {json.dumps(str(fifo))} }}
        retry.attempts = 1
        """
    )
    call_id = await gateway.submit("it")
    async with followed(gateway, call_id) as log:
        assert {await log.readline(), await log.readline()} == {b"one\n", b"two\n"}
        async with followed(gateway, call_id) as late:  # It has what was written before.
            assert {await late.readline(), await late.readline()} == {b"one\n", b"two\n"}
            os.close(await asyncio.to_thread(open_fifo, fifo))
            assert await log.read() == await late.read() == b"three\n"
    record = await gateway.final(call_id)
    assert record["error"] == "function it: exit status 3: three"


async def test_what_a_server_answers_is_seen_as_it_comes(daemon: StartDaemon, function: Server) -> None:
    """From the next attempt, too, when the first one fails; a call that waits is waited for."""
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"\n')
    await ask(gateway.url, "/system/queues/faas-request/pause", method="POST")
    passed = asyncio.Event()

    async def slowly(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        retry = seen.headers["X-Retry"]
        response = web.StreamResponse(status=503 if retry == "0" else 200)
        await response.prepare(request)
        await response.write(f"begun {retry}\n".encode())
        if retry == "1":
            await passed.wait()
        await response.write(f"ended {retry}\n".encode())
        return response

    function.behaviour = slowly
    call_id = await gateway.submit("it")
    async with followed(gateway, call_id) as log:
        await ask(gateway.url, "/system/queues/faas-request/resume", method="POST")
        for line in (b"begun 0\n", b"ended 0\n", b"begun 1\n"):
            assert await log.readline() == line
        passed.set()
        assert await log.read() == b"ended 1\n"


async def test_what_a_server_answers_at_once_is_seen_attempt_by_attempt(daemon: StartDaemon, function: Server) -> None:
    """On a connection that was used, where the answer comes before there is a task."""
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"\n', before="faasd_async.PROOF_S = 0.0")
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
    await ask(gateway.url, "/system/queues/faas-request/pause", method="POST")

    async def fail_once(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        retry = seen.headers["X-Retry"]
        return web.Response(status=503 if retry == "0" else 200, text=f"attempt {retry}\n")

    function.behaviour = fail_once
    call_id = await gateway.submit("it")
    async with followed(gateway, call_id) as log:
        await ask(gateway.url, "/system/queues/faas-request/resume", method="POST")
        assert await log.read() == b"attempt 0\nattempt 1\n"


async def test_the_log_of_a_call_that_has_ended_is_what_is_stored(daemon: StartDaemon, function: Server) -> None:
    """There is nothing to follow."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    call_id = await gateway.submit("it")
    await gateway.final(call_id)
    async with followed(gateway, call_id) as log:
        assert await log.read() == b"ok"
    assert (await ask(gateway.url, "/system/calls/nobody/log?follow=1")).status == 404
    assert (await ask(gateway.url, f"/system/calls/{call_id}/log?follow=maybe")).status == 400


async def test_who_reads_slowly_does_not_hold_a_program_up(daemon: StartDaemon) -> None:
    """What was not read in time is left out, and told."""
    script = "exec >&2; head -c 20000000 /dev/zero; echo; echo done"
    gateway = await daemon(
        f"""
        [functions.it]
        command = ["sh", "-c", {json.dumps(script)}]
        """
    )
    await ask(gateway.url, "/system/queues/faas-request/pause", method="POST")
    call_id = await gateway.submit("it")
    async with followed(gateway, call_id) as log:
        await ask(gateway.url, "/system/queues/faas-request/resume", method="POST")
        record = await gateway.final(call_id)
        assert record["status"] == "success"
        written = await log.read()
    assert "… what was not read in time is left out …".encode() in written
    assert written.endswith(b"done\n")


async def test_of_a_piece_that_is_too_long_for_a_reader_the_end_is_shown(daemon: StartDaemon, tmp_path: Path) -> None:
    """It is told that the rest was left out."""
    (tmp_path / "long").write_bytes(b"x" * 50_000 + b"end\n")
    gateway = await daemon(
        f"""
        [functions.it]
        command = ["dd", "if={tmp_path}/long", "bs=60000", "status=none"]
        """,
        before="faasd_async.MAX_UNSENT_BYTES = 2000; faasd_async.RECENT_BYTES = 500",
    )
    await ask(gateway.url, "/system/queues/faas-request/pause", method="POST")
    call_id = await gateway.submit("it")
    async with followed(gateway, call_id) as log:
        await ask(gateway.url, "/system/queues/faas-request/resume", method="POST")
        written = await log.read()
    assert "… what was not read in time is left out …".encode() in written
    assert written.endswith(b"xend\n")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_log_that_can_not_be_read_to_its_end_breaks_off(
    hosts: StartHost, server: NatsServer, function: Server, version: str
) -> None:
    """Nobody waits for the rest of it, takes the next answer for that, or what there is for all of it."""
    function.behaviour = gate = Gate()
    host = await hosts(one_function(function))
    call_id = await host.submit("it")
    await function.wait_for(1)
    async with connection(host.url) as (reader, writer):
        target = f"/system/calls/{call_id}/log?follow=1"
        writer.write(f"GET {target} HTTP/{version}\r\nHost: localhost\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        await server.kill()
        gate.open()
        assert await reader.readuntil(b"ok") in (b"ok", b"2\r\nok")
        rest = asyncio.wait_for(reader.read(), PATIENCE)
        if version == "1.0":
            with pytest.raises(ConnectionResetError):
                await rest
        else:
            assert await rest == b"\r\n"


# ---- events --------------------------------------------------------------------------------------


class Events:
    """A stream of events, as a browser reads it (HTML standard 9.2.6)."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.last_id = ""

    async def fields(self) -> dict[str, str]:
        """What the next block has; a comment under "". Empty: the stream has ended."""
        found: dict[str, str] = {}
        async with asyncio.timeout(PATIENCE):
            while line := (await self.response.content.readline()).decode():
                if line == "\n":
                    break
                name, _, value = line.rstrip("\n").partition(": ")
                found[name] = value
        self.last_id = found.get("id", self.last_id)
        return found

    async def next(self) -> tuple[str, Any]:
        """Kind and document of the next event."""
        found = await self.fields()
        while found and "event" not in found:
            found = await self.fields()
        return found["event"], json.loads(found["data"])

    async def until(self, status: str) -> list[dict[str, Any]]:
        """The records that are told, up to one in this state."""
        records = []
        while True:
            kind, record = await self.next()
            assert kind == "call", record
            records.append(record)
            if record["status"] == status:
                return records


@contextlib.asynccontextmanager
async def events(gateway: Daemon, query: str = "", last_id: str | None = None) -> AsyncIterator[Events]:
    """A stream that is open, with its first event still to come."""
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    timeout = aiohttp.ClientTimeout(total=None)
    async with (
        aiohttp.ClientSession(timeout=timeout, read_bufsize=2**20) as session,
        session.get(f"{gateway.url}/system/events{query}", headers=headers) as response,
    ):
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"] == "text/event-stream"
        yield Events(response)


async def test_each_change_is_told_as_it_happens(daemon: StartDaemon, function: Server) -> None:
    """To curl as to anybody: a change is told when it has happened, not when the call has ended."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    function.behaviour = gate = Gate()
    curl = await asyncio.create_subprocess_exec(
        *("curl", "--silent", "--no-buffer", f"{gateway.url}/system/events"), stdout=asyncio.subprocess.PIPE
    )
    assert curl.stdout

    async def line(start: str) -> str:
        async with asyncio.timeout(PATIENCE):
            while curl.stdout and not (line := await curl.stdout.readline()).startswith(start.encode()):
                assert line, "the stream has ended"
        return line.decode()

    assert json.loads((await line("data: ")).removeprefix("data: ")) == {"resumed": False}
    call_id = await gateway.submit("it")
    told = [json.loads((await line("data: ")).removeprefix("data: ")) for _ in range(2)]
    assert [(item["call_id"], item["status"]) for item in told] == [(call_id, "queued"), (call_id, "running")]
    gate.open()
    ended = json.loads((await line("data: ")).removeprefix("data: "))
    assert ended == await gateway.final(call_id)
    curl.kill()
    await curl.wait()


async def test_a_stream_may_be_about_one_call_or_one_function(daemon: StartDaemon, function: Server) -> None:
    """Nothing else is told to it."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    async with events(gateway, "?call_id=mine") as one, events(gateway, "?function=other.openfaas-fn") as other:
        for stream in (one, other):
            assert await stream.next() == ("open", {"resumed": False})
        await gateway.submit("it")
        await gateway.submit("it", X_Call_Id="mine")
        await gateway.submit("other")
        assert {record["call_id"] for record in await one.until("success")} == {"mine"}
        assert {record["function"] for record in await other.until("success")} == {"other"}
    refused = await ask(gateway.url, "/system/events?status=error")
    assert (refused.status, refused.body) == (400, b"status: unknown filter; there are call_id, function\n")


async def test_a_stream_that_was_cut_begins_again_where_it_was(daemon: StartDaemon, function: Server) -> None:
    """Nothing is missed, nothing told twice; after a restart of the daemon that is not known."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    async with events(gateway) as stream:
        await stream.next()
        first = await gateway.submit("it")
        await stream.until("success")
    second = await gateway.submit("it")
    await gateway.final(second)
    async with events(gateway, last_id=stream.last_id) as again:
        assert await again.next() == ("open", {"resumed": True})
        told = [(record["call_id"], record["status"]) for record in await again.until("success")]
        assert told == [(second, status) for status in ("queued", "running", "success")]
    await gateway.terminate()
    await gateway.start()
    async with events(gateway, last_id=again.last_id) as later:
        assert await later.next() == ("open", {"resumed": False})
    assert first != second


async def test_a_stream_begins_anew_after_an_id_that_is_none(daemon: StartDaemon, function: Server) -> None:
    """Whatever stands behind the part that says which process it was."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    async with events(gateway) as stream:
        await stream.next()
    epoch = stream.last_id.partition("-")[0]
    for number in ("", "-1", "x", "\u0661", "9" * 5000):
        async with events(gateway, last_id=f"{epoch}-{number}") as again:
            assert await again.next() == ("open", {"resumed": False})


async def gap_after_many_calls(gateway: Daemon, stream: Events) -> tuple[str, object]:
    """Twenty calls are submitted: the first event that tells of none."""
    await stream.next()
    await asyncio.gather(*(gateway.submit("other", X_Delay="1h") for _ in range(20)))
    told = await stream.next()
    while told[0] == "call":
        told = await stream.next()
    return told


async def test_changes_that_are_too_many_to_be_told_leave_a_gap(daemon: StartDaemon, function: Server) -> None:
    """Who shows them has to look again."""
    gateway = await daemon(SETTINGS.format(url=function.url), before="faasd_async.CHANGES_PER_SECOND = 3")
    async with events(gateway) as stream:
        assert await gap_after_many_calls(gateway, stream) == (
            "gap",
            {"reason": "more has changed than is told: look again"},
        )


async def test_a_reader_that_is_too_slow_is_told_that_it_has_missed_something(
    daemon: StartDaemon, function: Server
) -> None:
    """What it does not read is not kept for it."""
    before = "faasd_async.CHANGES_PER_SECOND = 10**6; faasd_async.MAX_UNSENT_BYTES = 2000"
    gateway = await daemon(SETTINGS.format(url=function.url), before=before)
    async with events(gateway) as stream:
        assert await gap_after_many_calls(gateway, stream) == (
            "gap",
            {"reason": "this stream was read too slowly: look again"},
        )


async def test_a_stream_on_which_nothing_happens_is_kept_open(daemon: StartDaemon, function: Server) -> None:
    """By events that say no more than that, and after which it can be resumed."""
    gateway = await daemon(SETTINGS.format(url=function.url), before="faasd_async.PING_S = 0.05")
    async with events(gateway) as stream:
        await stream.next()
        begun_at = stream.last_id
        assert await stream.fields() == {"id": begun_at, "event": "ping", "data": "{}"}


async def test_more_than_eight_streams_are_refused(daemon: StartDaemon, function: Server) -> None:
    """With a reason and a time; when one has ended there is room again."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(7):
            await stack.enter_async_context(events(gateway))
        async with events(gateway):
            refused = await ask(gateway.url, "/system/events")
        assert refused.status == 503
        assert refused.body == b"8 streams of events are open already: close one, or poll /system/stats\n"
        assert "Retry-After" in refused.headers

        async def opens() -> bool:
            with contextlib.suppress(AssertionError):
                async with events(gateway):
                    return True
            return False

        async with asyncio.timeout(PATIENCE):
            # The daemon has still to hear that the reader has gone.
            while not await opens():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_streams_end_with_the_daemon(daemon: StartDaemon, function: Server) -> None:
    """It does not wait for them."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    async with events(gateway) as stream:
        await stream.next()
        assert await gateway.terminate() == 0
        while await stream.fields():
            pass
        assert stream.response.content.at_eof()


async def test_a_stream_tells_what_other_hosts_do(tmp_path: Path) -> None:
    """Of the queue that they share, while somebody watches."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    config = Settings()
    one = Bench(NatsStore(tmp_path / "one", config), config)
    shutil.copy(tmp_path / "one" / "nats", tmp_path / "two")
    two = Bench(NatsStore(tmp_path / "two", config), config)
    await one.open()
    await two.open()
    one.watch()
    two.watch()
    number = 0
    while not one.changes:  # It takes a moment until the other one knows that somebody watches.
        await two.enqueue(f"early-{(number := number + 1)}")
        await asyncio.sleep(0.1)
    await two.claim()
    await two.enqueue("a")
    work = await two.take()
    await two.queue.complete(work, OK, "success")
    expected = [("a", status, "none") for status in ("queued", "running", "success")]
    await one.until(lambda: [item for item in one.told() if item[0] == "a"] == expected)
    await one.queue.close()
    await two.queue.close()


async def test_the_last_state_that_is_told_is_the_last(hosts: StartHost, function: Server, sink: Server) -> None:
    """Hosts are heard one after the other: what one tells late is not shown after something newer."""
    one, two = [await hosts(one_function(function, "max_inflight = 1")) for _ in range(2)]
    last: dict[str, tuple[str, str]] = {}
    heard = asyncio.Event()

    async def listen(stream: Events) -> None:
        while True:
            kind, record = await stream.next()
            if kind == "call":
                last[record["id"]] = record["status"], record["callback"]["status"]
                heard.set()

    async with events(one) as stream:
        listening = asyncio.create_task(listen(stream))
        while not last:  # It takes a moment until the other one knows that somebody watches.
            await two.submit("it", X_Delay="1h")
            await asyncio.sleep(0.1)
        calls = []
        for _ in range(5):
            calls += await submit_all(10, one, two, X_Callback_Url=sink.url)
            given_up = await submit_all(6, one)
            for call_id in given_up:
                await ask(two.url, f"/async-function/{call_id}", method="DELETE")
            calls += given_up
        records = [await one.final(call_id) for call_id in calls]
        # Each host tells of these after all else.
        signs = [await host.submit("it", X_Delay="1h") for host in (one, two)]
        async with asyncio.timeout(PATIENCE):
            while not last.keys() >= set(signs):
                heard.clear()
                await heard.wait()
        listening.cancel()
    states = {record["id"]: (record["status"], record["callback"]["status"]) for record in records}
    assert {call_id: state for call_id, state in last.items() if call_id in states} == states
