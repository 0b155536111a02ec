"""A call after its 202: seen, waited for, stopped, run again, told about, held back and forgotten."""

import asyncio
import collections
import contextlib
import json
import os
import re
import signal
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web
from conftest import (
    PATIENCE,
    PYTHON,
    SECRET,
    Daemon,
    Gate,
    Reply,
    Request,
    Server,
    StartDaemon,
    answer,
    ask,
    assert_refused,
    connection,
    faasd,
    never,
    parse,
)
from jetstream import StartHost
from operating import cancel, get, log_of, run_again

KIB = 1024


def settings(function: Server, more: str = "") -> str:
    """One function, `it`, whose queue runs one call at a time."""
    return f'[functions.it]\nurl = "{function.url}"\nqueue = "line"\n{more}\n'


def command(code: str, more: str = "") -> str:
    """One function, `it`, that is a little Python program."""
    return f"[functions.it]\ncommand = {json.dumps([*PYTHON, code])}\n{more}\n"


@pytest.fixture
async def gateway(daemon: StartDaemon, function: Server) -> Daemon:
    """A daemon with `it`, whose calls run one at a time and are tried once."""
    return await daemon(settings(function, "[retry]\nattempts = 1"))


async def listed(gateway: Daemon, query: str = "") -> list[str]:
    """The ids of all calls that a query lists, page by page."""
    found: list[str] = []
    page = await get(gateway, f"/system/calls?{query}")
    while True:
        found += [record["call_id"] for record in page["calls"]]
        if page["next_cursor"] is None:
            return found
        page = await get(gateway, f"/system/calls?{query}&cursor={quote(page['next_cursor'])}")


# ---- the list --------------------------------------------------------------------------------------------------


async def test_calls_are_listed_with_the_newest_first(gateway: Daemon) -> None:
    """In the order of their arrival, whatever has become of them."""
    calls = [await gateway.submit("it") for _ in range(5)]
    await gateway.final(calls[-1])
    assert await listed(gateway) == calls[::-1]


async def test_the_list_shows_the_same_record_as_the_call_itself(gateway: Daemon) -> None:
    """A script that reads one can read the other."""
    record = await gateway.final(await gateway.submit("it", b"body"))
    page = await get(gateway, "/system/calls")
    assert page == {"calls": [record], "next_cursor": None}


@pytest.fixture
async def variety(daemon: StartDaemon, function: Server) -> AsyncIterator[tuple[Daemon, dict[str, str]]]:
    """A daemon with one call in each state, by the state's name."""
    gate = Gate()

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        if seen.target == "/wait":
            return await gate(request, seen)
        return web.Response(status=400 if seen.target == "/fail" else 200)

    function.behaviour = behaviour
    other = f'[functions.other]\nurl = "{function.url}"\nqueue = "other-line"'
    gateway = await daemon(settings(function, other))
    calls = {
        "success": await gateway.submit("it"),
        "error": await gateway.submit("it/fail"),
        "timeout": await gateway.missed("it", queue="line"),
        "cancelled": await gateway.submit("it", X_Delay="1h"),
        "delayed": await gateway.submit("it", X_Delay="1h"),
    }
    assert await cancel(gateway, calls["cancelled"]) == 202
    for status in ("success", "error", "timeout", "cancelled"):
        assert (await gateway.final(calls[status]))["status"] == status
    calls["running"] = await gateway.submit("other/wait")
    await function.until(lambda: function.running == 1, "the call that waits")
    calls["queued"] = await gateway.submit("other")
    yield gateway, calls
    gate.open()


async def test_the_list_can_be_limited_to_a_state(variety: tuple[Daemon, dict[str, str]]) -> None:
    """`status`, in each of the seven words that a record may have there."""
    gateway, calls = variety
    found = {status: await listed(gateway, f"status={status}") for status in calls}
    assert found == {status: [call_id] for status, call_id in calls.items()}


async def test_the_list_can_be_limited_to_a_function_or_a_queue(variety: tuple[Daemon, dict[str, str]]) -> None:
    """`function`, with or without its namespace, and `queue`."""
    gateway, calls = variety
    others = [calls["queued"], calls["running"]]
    for query in ("function=other", "function=other.openfaas-fn", "queue=other-line"):
        assert await listed(gateway, query) == others, query
    for query in ("function=it", "queue=line"):
        assert sorted(await listed(gateway, query)) == sorted(set(calls.values()) - set(others)), query


async def test_filters_are_combined(variety: tuple[Daemon, dict[str, str]]) -> None:
    """A call is listed when it matches all of them; that there is none is no error."""
    gateway, calls = variety
    assert await listed(gateway, "function=other&queue=other-line&status=queued") == [calls["queued"]]
    assert await listed(gateway, "function=it&queue=other-line") == []
    assert await listed(gateway, f"call_id={calls['error']}&status=error") == [calls["error"]]
    assert await listed(gateway, f"call_id={calls['error']}&status=success") == []
    for query in ("function=nosuch", "queue=nosuch", "call_id=nosuch"):
        assert await get(gateway, f"/system/calls?{query}") == {"calls": [], "next_cursor": None}, query


async def test_calls_that_share_an_id_are_all_in_the_list(gateway: Daemon) -> None:
    """A record asked for by that id is the newest one's, the list by `call_id` has them all."""
    for body in (b"1", b"22", b"333"):
        await gateway.submit("it", body, X_Call_Id="batch")
    await gateway.submit("it", b"4444")
    page = await get(gateway, "/system/calls?call_id=batch")
    assert [record["request_bytes"] for record in page["calls"]] == [3, 2, 1]
    assert (await gateway.record("batch"))["request_bytes"] == 3


async def test_a_limit_cuts_the_list_into_pages(gateway: Daemon) -> None:
    """Each page has as many calls as were asked for, and the cursors lead through all of them once."""
    calls = [await gateway.submit("it", X_Delay="1h") for _ in range(8)]
    pages, cursor = [], ""
    while cursor is not None:
        page = await get(gateway, "/system/calls?limit=3" + (f"&cursor={quote(cursor)}" if cursor else ""))
        pages.append([record["call_id"] for record in page["calls"]])
        cursor = page["next_cursor"]
    newest = calls[::-1]
    assert pages == [newest[:3], newest[3:6], newest[6:]]


async def test_a_cursor_is_stable_while_calls_come_in(daemon: StartDaemon, function: Server) -> None:
    """Nothing is listed twice or left out because there is news at the top, with a filter or without."""
    gateway = await daemon(settings(function, f'[functions.other]\nurl = "{function.url}"'))
    calls = [await gateway.submit("other" if number % 3 == 1 else "it") for number in range(20)]
    others = calls[1::3]
    for query in ("", "function=it", "queue=line"):
        expected = [call_id for call_id in calls if not query or call_id not in others]
        found, cursor = [], ""
        while cursor is not None:
            page = await get(gateway, f"/system/calls?limit=3&{query}" + (f"&cursor={quote(cursor)}" if cursor else ""))
            found += [record["call_id"] for record in page["calls"]]
            cursor = page["next_cursor"]
            calls += [await gateway.submit("it") for _ in range(2)]
        assert found == expected[::-1], query
    beyond = await get(gateway, f"/system/calls?cursor={'9' * 18}&limit=5")
    assert [record["call_id"] for record in beyond["calls"]] == calls[:-6:-1]


BAD_FILTERS = {
    "status": ["", "done", "SUCCESS", "success,done"],
    "limit": ["", "0", "-1", "1.5", "1_0", "many", "9" * 30],
    "cursor": ["nonsense", "-1", "9" * 40],
    "nosuch": ["1"],
}


async def test_a_bad_filter_is_refused(gateway: Daemon) -> None:
    """The answer names it, instead of listing what nobody asked for."""
    for name, values in BAD_FILTERS.items():
        for value in values:
            assert_refused(await ask(gateway.url, f"/system/calls?{name}={value}"), 400, name)


async def test_an_id_of_odd_characters_works_everywhere(gateway: Daemon) -> None:
    """Every visible ASCII character may be in a caller's id, those that mean something in a URL too."""
    for call_id in ("a/b", "x/log", "x/retry", "..", "?wait=1", "100%", "%2F", "a+b&c=d", "#'\";<>\\"):
        reply = await ask(gateway.url, "/async-function/it", f"X-Call-Id: {call_id}", "X-Delay: 1h", method="POST")
        assert (reply.status, reply.headers["X-Call-Id"]) == (202, call_id)
        location = reply.headers["Location"]
        assert (await get(gateway, location))["call_id"] == call_id
        assert await listed(gateway, f"call_id={quote(call_id, safe='')}") == [call_id]
        assert await log_of(gateway, call_id) == b""
        assert await cancel(gateway, call_id) == 202
        assert (await get(gateway, location))["status"] == "cancelled"
        assert (await run_again(gateway, call_id)).status == 202


# ---- waiting for the end ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def waiting(gateway: Daemon, call_id: str, wait: str = "1h") -> AsyncIterator[asyncio.Task[Reply]]:
    """Ask for a record with `wait`. The task of the answer is given when the daemon has the request."""
    async with connection(gateway.url) as (reader, writer):
        head = f"GET /system/calls/{call_id}?wait={wait} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        writer.write(head.encode())
        for _ in range(2):  # what the daemon is sent after the request, it answers after having read that
            await gateway.record(call_id)

        async def answered() -> Reply:
            return parse(await asyncio.wait_for(reader.read(), PATIENCE))

        task = asyncio.create_task(answered())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_record_can_be_waited_for(gateway: Daemon, function: Server) -> None:
    """With `wait`, the answer comes when the call has become final, and not before."""
    function.behaviour = gate = Gate()
    call_id = await gateway.submit("it")
    await function.wait_for(1)
    async with waiting(gateway, call_id) as answered:
        assert not answered.done()
        gate.open()
        reply = await answered
    assert reply.status == 200
    assert json.loads(reply.body) == await gateway.record(call_id)
    assert json.loads(reply.body)["status"] == "success"


async def test_who_waits_is_told_by_the_event(gateway: Daemon, function: Server) -> None:
    """The answer follows the end at once; a daemon that looks every now and then would take half of that longer."""
    took = []
    for number in range(7):
        function.behaviour = gate = Gate()
        call_id = await gateway.submit("it")
        await function.wait_for(number + 1)
        async with waiting(gateway, call_id) as answered:
            released = time.monotonic()
            gate.open()
            await answered
            took.append(time.monotonic() - released)
    assert statistics.median(took) < 0.25, took


async def test_everybody_who_waits_is_told(gateway: Daemon, function: Server) -> None:
    """Also when it is not the function that ends the call."""
    function.behaviour = never
    call_id = await gateway.submit("it")
    await function.wait_for(1)
    async with contextlib.AsyncExitStack() as stack:
        answers = [await stack.enter_async_context(waiting(gateway, call_id)) for _ in range(10)]
        assert await cancel(gateway, call_id) == 202
        statuses = [json.loads((await answered).body)["status"] for answered in answers]
    assert statuses == ["cancelled"] * 10


async def test_a_call_is_final_before_its_callback_is_delivered(gateway: Daemon, refused: str) -> None:
    """`wait` is for the function, not for the receiver of its outcome."""
    call_id = await gateway.submit("it", X_Delay="300ms", X_Callback_Url=refused)
    async with waiting(gateway, call_id) as answered:
        record = json.loads((await answered).body)
    assert (record["status"], record["callback"]["status"]) == ("success", "pending")


async def test_when_the_time_is_over_the_record_is_shown_as_it_stands(gateway: Daemon, function: Server) -> None:
    """A client's patience is no error."""
    function.behaviour = never
    call_id = await gateway.submit("it")
    await function.wait_for(1)
    asked = time.monotonic()
    record = await get(gateway, f"/system/calls/{call_id}?wait=300ms")
    assert time.monotonic() - asked >= 0.3
    assert (record["status"], record["completed_at"]) == ("running", None)


async def test_a_call_that_ended_while_the_machine_slept_is_shown_as_it_ended(
    gateway: Daemon, function: Server
) -> None:
    """Its end and that of the time to wait are both there when it wakes up."""
    gate = Gate()
    function.behaviour = gate
    call_id = await gateway.submit("it")
    await function.wait_for(1)
    async with waiting(gateway, call_id, "300ms") as answered:
        gateway.signal(signal.SIGSTOP)
        gate.open()
        await asyncio.sleep(1)  # asleep for longer than that
        gateway.signal(signal.SIGCONT)
        record = json.loads((await answered).body)
    assert record["status"] == "success"


async def test_a_final_record_is_not_waited_for(gateway: Daemon) -> None:
    """There is nothing to wait for."""
    record = await gateway.final(await gateway.submit("it"))
    assert await get(gateway, f"/system/calls/{record['call_id']}?wait=1h") == record


async def test_a_bad_wait_is_refused(gateway: Daemon) -> None:
    """The answer names the parameter, the value and the form."""
    call_id = await gateway.submit("it", X_Delay="1h")
    for value in ("30", "-1s", "soon", "1e9s"):
        assert_refused(await ask(gateway.url, f"/system/calls/{call_id}?wait={value}"), 400, "wait", value, "duration")
    assert_refused(await ask(gateway.url, f"/system/calls/{call_id}?wait="), 400, "wait", "duration")


async def test_an_unknown_call_is_not_found(gateway: Daemon) -> None:
    """404 for whatever is asked about it; with `wait`, at once."""
    for target in ("nosuch", "nosuch?wait=1h", "nosuch/log"):
        assert_refused(await ask(gateway.url, f"/system/calls/{target}"), 404)
    assert_refused(await run_again(gateway, "nosuch"), 404)
    assert_refused(await ask(gateway.url, "/async-function/nosuch", method="DELETE"), 404)


async def test_who_waits_does_not_hold_up_a_stop(gateway: Daemon) -> None:
    """The record is shown as it stands, and the daemon ends."""
    call_id = await gateway.submit("it", X_Delay="1h")
    async with waiting(gateway, call_id) as answered:
        gateway.signal(signal.SIGTERM)
        assert json.loads((await answered).body)["status"] == "delayed"
        assert await gateway.ended() == 0


# ---- the log ---------------------------------------------------------------------------------------------------


async def test_the_log_is_what_the_function_answered(gateway: Daemon, function: Server) -> None:
    """Byte for byte, for a call that failed as well as for one that did not."""
    for status in (200, 400):
        function.behaviour = answer(status, bytes(range(256)))
        call_id = await gateway.submit("it")
        await gateway.final(call_id)
        assert await log_of(gateway, call_id) == bytes(range(256)), status


async def test_the_log_of_a_command_has_its_stderr_too(daemon: StartDaemon) -> None:
    """What it wrote to either, whether it succeeded or not."""
    gateway = await daemon(
        command("import sys; print('out'); print('err', file=sys.stderr); sys.exit(len(sys.stdin.read()))")
        + "[retry]\nattempts = 1"
    )
    for body, status in ((b"", "success"), (b"1", "error")):
        call_id = await gateway.submit("it", body)
        assert (await gateway.final(call_id))["status"] == status
        assert sorted((await log_of(gateway, call_id)).splitlines()) == [b"err", b"out"]


async def test_the_stderr_that_a_command_answers_with_is_shown_once(daemon: StartDaemon) -> None:
    """It is the answer of one that fails and writes nothing else."""
    script = "import sys; sys.stdin.read(); print('err', file=sys.stderr); sys.exit(1)"
    gateway = await daemon(command(script) + "[retry]\nattempts = 1")
    call_id = await gateway.submit("it")
    assert (await gateway.final(call_id))["status"] == "error"
    assert await log_of(gateway, call_id) == b"err\n"
    log = f"/system/calls/{call_id}/log"
    assert (await ask(gateway.url, f"{log}?follow=1")).body.count(b"err") == 1
    assert (await ask(gateway.url, f"{log}?stream=stderr")).body == b"err\n"
    assert (await ask(gateway.url, f"/system/calls/{call_id}/result")).body == b"err\n"


async def test_the_log_shows_the_last_attempt(daemon: StartDaemon, function: Server) -> None:
    """Also while the next one is waited for."""
    function.behaviour = answer(500, b"not yet")
    gateway = await daemon(settings(function, '[retry]\nmin_wait = "1h"\nmax_wait = "1h"'))
    call_id = await gateway.submit("it")
    await gateway.until(call_id, lambda record: record["attempts"] == 1 and record["status"] == "delayed")
    assert await log_of(gateway, call_id) == b"not yet"


def assert_shortened(kept: bytes, whole: bytes) -> None:
    """That these are the beginning and the end of something, in one KiB; all of it if that is shorter."""
    if len(whole) <= KIB:
        assert kept == whole
        return
    assert len(kept) <= KIB
    assert kept.startswith(whole[:470])
    assert kept.endswith(whole[-470:])
    assert b" bytes are not kept " in kept


async def test_of_a_long_answer_beginning_and_end_are_kept(daemon: StartDaemon, function: Server) -> None:
    """`keep_output` bytes of it; the record tells how long it was."""
    gateway = await daemon(settings(function, '[calls]\nkeep_output = "1KiB"'))
    for size in (KIB, KIB + 1, 100 * KIB):
        body = os.urandom(size)
        function.behaviour = answer(body=body)
        record = await gateway.final(await gateway.submit("it"))
        assert record["response_bytes"] == size
        assert_shortened(await log_of(gateway, record["call_id"]), body)


async def test_of_a_long_stderr_beginning_and_end_are_kept(daemon: StartDaemon) -> None:
    """The limit is for each of the two outputs."""
    code = "import sys; sys.stdout.write('o' * 5000); sys.stderr.write('e' * 5000)"
    gateway = await daemon(command(code, '[calls]\nkeep_output = "1KiB"'))
    call_id = await gateway.submit("it")
    await gateway.final(call_id)
    out, err = (await log_of(gateway, call_id)).split(b"o\ne")
    assert_shortened(out + b"o", b"o" * 5000)
    assert_shortened(b"e" + err, b"e" * 5000)


async def test_a_callback_gets_all_of_what_is_kept_in_part(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """The answer is whole until it has been delivered, and cut then."""
    body = os.urandom(10 * KIB)
    function.behaviour = answer(body=body)
    gateway = await daemon(settings(function, '[calls]\nkeep_output = "1KiB"'))
    call_id = await gateway.submit("it", X_Callback_Url=sink.url)
    assert (await gateway.final(call_id))["callback"]["status"] == "delivered"
    assert sink.requests[0].body == body
    assert_shortened(await log_of(gateway, call_id), body)


async def test_the_answer_for_a_callback_that_was_cancelled_is_cut(
    daemon: StartDaemon, function: Server, refused: str
) -> None:
    """Nobody needs the rest of it any more."""
    body = os.urandom(10 * KIB)
    function.behaviour = answer(body=body)
    gateway = await daemon(settings(function, '[calls]\nkeep_output = "1KiB"'))
    call_id = await gateway.submit("it", X_Callback_Url=refused)
    await gateway.until(call_id, lambda record: record["callback"]["status"] == "pending")
    assert await cancel(gateway, call_id) == 202
    assert_shortened(await log_of(gateway, call_id), body)


# ---- stopping --------------------------------------------------------------------------------------------------


WAITING = """
[retry]
min_wait = "1h"
max_wait = "1h"
[queues.wide]
max_inflight = 16
[functions.it]
url = "{url}"
queue = "line"
[functions.narrow]
url = "{url}"
queue = "wide"
max_inflight = 1
[functions.keyed]
url = "{url}"
queue = "wide"
[functions.seldom]
url = "{url}"
queue = "wide"
rate = "1/1h"
[functions.fails]
command = ["false"]
"""
REASONS = {
    "it": "room in queue line, which runs 1 of 1",
    "narrow": "function narrow, which runs 1 of 1",
    "keyed": "its turn among calls with the key k",
    "seldom": "its turn, at a rate of 1/1h",
}


@pytest.mark.parametrize("store", ["sqlite", "nats"])
async def test_a_call_that_waits_says_why(daemon: StartDaemon, hosts: StartHost, function: Server, store: str) -> None:
    """A limit, a key, a rate, its time, a pause; one that runs or has ended says nothing."""
    function.behaviour = gate = Gate()
    gateway = await (daemon if store == "sqlite" else hosts)(WAITING.format(url=function.url))
    for number, (name, reason) in enumerate(REASONS.items(), 1):
        headers = {"X_Concurrency_Key": "k"} if name == "keyed" else {}
        first = await gateway.submit(name, b"", **headers)
        await function.wait_for(number)
        second = await gateway.submit(name, b"", **headers)
        assert (await gateway.record(second))["waits_for"] == reason
        assert "waits_for" not in await gateway.record(first)
    failed = await gateway.submit("fails")
    delayed = await gateway.until(failed, lambda record: record["status"] == "delayed")
    assert delayed["waits_for"] == "its next attempt"
    assert (await gateway.record(await gateway.submit("it", X_Delay="1h")))["waits_for"] == "its time"
    await ask(gateway.url, "/system/queues/wide/pause", method="POST")
    assert (await gateway.record(second))["waits_for"] == "queue wide, which is paused"
    shown = await faasd("calls", "show", second, "--url", gateway.url)
    assert "waits for   queue wide, which is paused\n" in shown.out
    gate.open()
    assert "waits_for" not in await gateway.final(first)


async def test_a_queued_call_can_be_cancelled(gateway: Daemon, function: Server) -> None:
    """It never runs, those around it do."""
    function.behaviour = gate = Gate()
    first, second, third = [await gateway.submit("it") for _ in range(3)]
    await function.wait_for(1)
    assert await cancel(gateway, second) == 202
    record = await gateway.record(second)
    assert (record["status"], record["attempts"], record["started_at"]) == ("cancelled", 0, None)
    assert record["completed_at"] is not None
    gate.open()
    assert (await gateway.final(third))["status"] == "success"
    assert function.call_ids == [first, third]


async def test_a_delayed_call_can_be_cancelled(gateway: Daemon, function: Server) -> None:
    """Its time comes, and nothing happens."""
    cancelled = await gateway.submit("it", X_Delay="700ms")
    assert await cancel(gateway, cancelled) == 202
    assert (await gateway.record(cancelled))["status"] == "cancelled"
    later = await gateway.submit("it", X_Delay="700ms")  # due after the first one would have been
    assert (await gateway.final(later))["status"] == "success"
    assert function.call_ids == [later]


async def test_a_call_that_waits_for_its_next_attempt_can_be_cancelled(daemon: StartDaemon, function: Server) -> None:
    """It is not tried again."""
    function.behaviour = answer(500)
    gateway = await daemon(settings(function, '[retry]\nmin_wait = "700ms"\nmax_wait = "700ms"'))
    call_id = await gateway.submit("it")
    await gateway.until(call_id, lambda record: record["attempts"] == 1 and record["status"] == "delayed")
    assert await cancel(gateway, call_id) == 202
    record = await gateway.record(call_id)
    assert (record["status"], record["attempts"]) == ("cancelled", 1)
    later = await gateway.submit("it", X_Delay="700ms")
    await function.wait_for(2)
    assert function.call_ids == [call_id, later]


async def test_a_running_call_can_be_cancelled(gateway: Daemon, function: Server) -> None:
    """The function sees its connection closed, and the next call gets the slot."""
    function.behaviour = Gate(passing=0)
    call_id = await gateway.submit("it")
    await function.wait_for(1)
    function.behaviour = answer()
    assert await cancel(gateway, call_id) == 202
    await function.until(lambda: function.cancelled == 1, "the closed connection")
    record = await gateway.record(call_id)
    assert (record["status"], record["attempts"]) == ("cancelled", 1)
    after = await gateway.submit("it")
    assert (await gateway.final(after))["status"] == "success"
    assert function.call_ids == [call_id, after]


async def test_a_running_command_is_killed_with_its_children(daemon: StartDaemon, tmp_path: Path) -> None:
    """No process of its group outlives the cancelled call."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = f"exec 3>'{fifo}'; (sleep 60; sleep 60) & echo started >&3; wait"
    gateway = await daemon(f"[functions.it]\ncommand = {json.dumps(['sh', '-c', script])}")
    held, loop = asyncio.StreamReader(), asyncio.get_running_loop()
    file = os.fdopen(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
    ours = os.open(fifo, os.O_WRONLY)  # before the command has it open, the FIFO would be at its end
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(held), file)
    try:
        call_id = await gateway.submit("it")
        assert await asyncio.wait_for(held.readline(), PATIENCE) == b"started\n"
    finally:
        os.close(ours)
    assert await cancel(gateway, call_id) == 202
    # Its end comes when the last process that holds the other side open is dead.
    assert await asyncio.wait_for(held.read(), PATIENCE) == b""
    transport.close()
    assert (await gateway.record(call_id))["status"] == "cancelled"


@pytest.fixture
async def patient(daemon: StartDaemon, function: Server) -> Daemon:
    """A daemon that tries callbacks again soon, and for a long time."""
    return await daemon(settings(function, '[callback]\nattempts = 1000\nmin_wait = "50ms"\nmax_wait = "50ms"'))


async def test_a_pending_callback_can_be_cancelled(patient: Daemon, sink: Server) -> None:
    """It is not sent again; the call itself has succeeded, and stays so."""
    sink.behaviour = answer(503)
    cancelled = await patient.submit("it", X_Callback_Url=sink.url)
    await patient.until(cancelled, lambda record: record["callback"]["attempts"] >= 1)
    assert await cancel(patient, cancelled) == 202
    record = await patient.record(cancelled)
    assert (record["status"], record["callback"]["status"]) == ("success", "failed")
    seen = len(sink.requests)
    later = await patient.submit("it", X_Callback_Url=sink.url)
    await sink.until(lambda: sink.call_ids.count(later) >= 3, "the callback of the later call")
    # One delivery may have been under way when the call was cancelled; no other has begun since.
    assert sink.call_ids[seen + 1 :].count(cancelled) == 0


async def test_a_callback_that_is_being_sent_can_be_cancelled(patient: Daemon, sink: Server) -> None:
    """Its receiver sees the connection closed."""
    sink.behaviour = never
    call_id = await patient.submit("it", X_Callback_Url=sink.url)
    await sink.wait_for(1)
    assert await cancel(patient, call_id) == 202
    await sink.until(lambda: sink.cancelled == 1, "the closed connection")
    record = await patient.record(call_id)
    assert (record["status"], record["callback"]["status"]) == ("success", "failed")


async def test_a_cancelled_call_stays_so_after_a_restart(gateway: Daemon, function: Server) -> None:
    """The 202 of a cancellation is as durable as that of a call."""
    function.behaviour = never
    running = await gateway.submit("it")
    await function.wait_for(1)
    queued, delayed = await gateway.submit("it"), await gateway.submit("it", X_Delay="200ms")
    assert [await cancel(gateway, call_id) for call_id in (delayed, queued, running)] == [202] * 3
    await gateway.kill()
    function.behaviour = answer()
    await gateway.start()
    assert await listed(gateway, "status=cancelled") == [delayed, queued, running]
    later = await gateway.submit("it", X_Delay="200ms")
    await gateway.final(later)
    assert function.call_ids == [running, later]


async def test_a_finished_call_cannot_be_cancelled(gateway: Daemon, function: Server) -> None:
    """409, and the record is what it was, however the call ended."""
    calls = [await gateway.submit("it"), await gateway.submit("it", X_Delay="1h")]
    await gateway.final(calls[0])
    assert await cancel(gateway, calls[1]) == 202
    function.behaviour = answer(500)
    calls.append(await gateway.submit("it"))
    before = [await gateway.final(call_id) for call_id in calls]
    assert [record["status"] for record in before] == ["success", "cancelled", "error"]
    for call_id in calls:
        assert_refused(await ask(gateway.url, f"/async-function/{call_id}", method="DELETE"), 409)
    assert [await gateway.record(call_id) for call_id in calls] == before


async def test_all_calls_that_share_an_id_are_cancelled_together(gateway: Daemon, function: Server) -> None:
    """Running, queued and delayed ones, not those that have finished."""
    await gateway.submit("it", X_Call_Id="batch")
    await gateway.final("batch")
    function.behaviour = never
    await gateway.submit("it", X_Call_Id="batch")
    await function.wait_for(2)
    await gateway.submit("it", X_Call_Id="batch")
    await gateway.submit("it", X_Call_Id="batch", X_Delay="1h")
    other = await gateway.submit("it", X_Delay="1h")
    assert await cancel(gateway, "batch") == 202
    page = await get(gateway, "/system/calls?call_id=batch")
    assert [record["status"] for record in page["calls"]] == ["cancelled"] * 3 + ["success"]
    assert (await gateway.record(other))["status"] == "delayed"
    await function.until(lambda: function.cancelled == 1, "the closed connection")
    assert await cancel(gateway, "batch") == 409


async def test_of_many_cancellations_one_wins(gateway: Daemon) -> None:
    """The others find that the call has finished."""
    call_id = await gateway.submit("it", X_Delay="1h")
    statuses = await asyncio.gather(*(cancel(gateway, call_id) for _ in range(10)))
    assert sorted(statuses) == [202] + [409] * 9


async def ended(gateway: Daemon) -> dict[str, int]:
    """How many calls have reached which final state, as the metrics count them."""
    text = (await ask(gateway.url, "/metrics")).body.decode()
    found = re.findall(r'^faasd_async_calls_total\{status="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return {status: int(float(number)) for status, number in found}


@pytest.mark.unmeasured
async def test_a_cancellation_that_races_with_the_end_has_one_winner(gateway: Daemon, function: Server) -> None:
    """A call that was cancelled with a 202 never succeeds, and each call ends once."""
    won: collections.Counter[str] = collections.Counter()
    for number in range(100):
        function.behaviour = gate = Gate()
        call_id = await gateway.submit("it")
        await function.wait_for(number + 1)
        async with connection(gateway.url) as (reader, writer):
            request = f"DELETE /async-function/{call_id} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
            if number % 3 == 0:  # first the one, first the other, and the other with a head start
                writer.write(request)
                gate.open()
            else:
                gate.open()
                if number % 3 == 2:
                    await gateway.record(call_id)
                writer.write(request)
            status = parse(await asyncio.wait_for(reader.read(), PATIENCE)).status
        expected = {202: "cancelled", 409: "success"}[status]
        assert (await gateway.final(call_id))["status"] == expected
        won[expected] += 1
    assert collections.Counter(await ended(gateway)) == won
    assert {status: len(await listed(gateway, f"status={status}")) for status in won} == won


# ---- again -----------------------------------------------------------------------------------------------------


async def test_a_failed_call_is_run_again_with_its_own_request(gateway: Daemon, function: Server) -> None:
    """Method, path, query, headers and body reach the function byte for byte as they did at first."""
    function.behaviour = answer(500)
    target, body = "/async-function/it/a%2Fb//../c?x=%20&y&x=", bytes(range(256))
    headers = ("X-Many: 1", "X-Many: 2", "Content-Type: application/x-own", "Authorization: Bearer token")
    call_id = (await ask(gateway.url, target, *headers, method="POST", body=body)).headers["X-Call-Id"]
    assert (await gateway.final(call_id))["status"] == "error"
    function.behaviour = answer()
    assert (await run_again(gateway, call_id)).status == 202
    assert (await gateway.final(call_id))["status"] == "success"
    first, second = function.requests
    assert (second.method, second.target, second.body) == ("POST", "/a%2Fb//../c?x=%20&y&x=", body)
    ours = (b"x-start-time", b"x-retry")
    kept = [[item for item in seen.raw_headers if item[0].lower() not in ours] for seen in (first, second)]
    assert kept[0] == kept[1]
    assert (b"X-Many", b"2") in second.raw_headers


async def test_running_again_is_accepted_like_a_call(gateway: Daemon, function: Server) -> None:
    """202, with the place of the record, which is open again."""
    function.behaviour = answer(500)
    call_id = await gateway.submit("it")
    await gateway.final(call_id)
    function.behaviour = gate = Gate()
    reply = await run_again(gateway, call_id)
    assert (reply.status, reply.headers["Location"]) == (202, f"/system/calls/{call_id}")
    await function.wait_for(2)
    record = await get(gateway, reply.headers["Location"])
    assert (record["call_id"], record["status"], record["completed_at"]) == (call_id, "running", None)
    gate.open()
    await gateway.final(call_id)


async def test_a_call_that_is_run_again_has_all_its_attempts(daemon: StartDaemon, function: Server) -> None:
    """Those it used up before do not count."""
    function.behaviour = answer(500)
    gateway = await daemon(settings(function, "[retry]\nattempts = 2"))
    call_id = await gateway.submit("it")
    assert (await gateway.final(call_id))["status"] == "error"

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return web.Response(status=500 if len(function.requests) == 3 else 200)

    function.behaviour = behaviour
    assert (await run_again(gateway, call_id)).status == 202
    record = await gateway.final(call_id)
    assert (record["status"], record["max_attempts"], len(function.requests)) == ("success", 2, 4)


async def test_every_finished_call_can_be_run_again(gateway: Daemon, function: Server) -> None:
    """Whatever its end was; what kept it from running the first time does not do so again."""
    calls = {
        "success": await gateway.submit("it", b"1"),
        "timeout": await gateway.missed("it", b"2", queue="line"),
        "cancelled": await gateway.submit("it", b"3", X_Delay="1h"),
    }
    await cancel(gateway, calls["cancelled"])
    for status, call_id in calls.items():
        assert (await gateway.final(call_id))["status"] == status
    for status, call_id in calls.items():
        assert (await run_again(gateway, call_id)).status == 202, status
        assert (await gateway.final(call_id))["status"] == "success", status
    assert [request.body for request in function.requests] == [b"1", b"1", b"2", b"3"]


async def test_the_outcome_of_a_call_that_is_run_again_is_told_again(
    gateway: Daemon, function: Server, sink: Server
) -> None:
    """To the same receiver, with what came out this time."""
    function.behaviour = answer(500, b"broken")
    call_id = await gateway.submit("it", X_Callback_Url=sink.url)
    await gateway.final(call_id)
    function.behaviour = answer(200, b"repaired")
    assert (await run_again(gateway, call_id)).status == 202
    record = await gateway.final(call_id)
    assert (record["callback"]["status"], record["callback"]["attempts"]) == ("delivered", 1)
    told = [(request.call_id, request.headers["X-Function-Status"], request.body) for request in sink.requests]
    assert told == [(call_id, "500", b"broken"), (call_id, "200", b"repaired")]


async def test_a_failed_call_keeps_its_request_across_a_restart(gateway: Daemon, function: Server) -> None:
    """However large it is."""
    function.behaviour = answer(500)
    body = os.urandom(500 * KIB)
    call_id = await gateway.submit("it", body)
    assert (await gateway.final(call_id))["status"] == "error"
    await gateway.kill()
    function.behaviour = answer()
    await gateway.start()
    assert (await run_again(gateway, call_id)).status == 202
    assert (await gateway.final(call_id))["status"] == "success"
    assert [request.body == body for request in function.requests] == [True, True]


async def test_a_run_again_that_was_accepted_survives_kill_9(gateway: Daemon, function: Server) -> None:
    """Its 202 means on disk, too."""
    function.behaviour = answer(500)
    call_id = await gateway.submit("it")
    await gateway.final(call_id)
    function.behaviour = never
    assert (await run_again(gateway, call_id)).status == 202
    await gateway.kill()
    function.behaviour = answer()
    await gateway.start()
    assert (await gateway.final(call_id))["status"] == "success"


async def test_a_call_that_has_not_finished_cannot_be_run_again(gateway: Daemon, function: Server) -> None:
    """409 while it runs, is queued or delayed; it runs once."""
    function.behaviour = gate = Gate()
    running = await gateway.submit("it")
    await function.wait_for(1)
    calls = [running, await gateway.submit("it"), await gateway.submit("it", X_Delay="300ms")]
    for call_id in calls:
        assert_refused(await run_again(gateway, call_id), 409)
    gate.open()
    for call_id in calls:
        assert (await gateway.final(call_id))["status"] == "success"
    assert function.call_ids == calls


async def test_a_call_is_run_again_once_however_many_ask(gateway: Daemon, function: Server) -> None:
    """One gets the 202; for the others it has not finished."""
    function.behaviour = answer(500)
    call_id = await gateway.submit("it")
    await gateway.final(call_id)
    function.behaviour = gate = Gate()
    replies = await asyncio.gather(*(run_again(gateway, call_id) for _ in range(10)))
    assert sorted(reply.status for reply in replies) == [202] + [409] * 9
    gate.open()
    await gateway.final(call_id)
    assert len(function.requests) == 2


async def test_a_large_request_is_not_kept_after_success(gateway: Daemon, function: Server) -> None:
    """410: there is nothing left to send."""
    call_id = await gateway.submit("it", SECRET * 10_000)
    assert (await gateway.final(call_id))["status"] == "success"
    assert_refused(await run_again(gateway, call_id), 410)
    assert len(function.requests) == 1


# ---- where failures are told -----------------------------------------------------------------------------------


async def test_a_failure_is_told_to_the_url_for_failures(gateway: Daemon, function: Server, sink: Server) -> None:
    """And a success to the other one; each call has one callback."""
    urls = {"X_Callback_Url": f"{sink.url}/done", "X_Failure_Callback_Url": f"{sink.url}/failed"}
    good = await gateway.submit("it", b"", **urls)
    assert (await gateway.final(good))["callback"]["url"] == f"{sink.url}/done"
    function.behaviour = answer(500, b"why")
    bad = await gateway.submit("it", b"", **urls)
    assert (await gateway.final(bad))["callback"]["url"] == f"{sink.url}/failed"
    assert [(request.call_id, request.target) for request in sink.requests] == [(good, "/done"), (bad, "/failed")]
    assert (sink.requests[1].headers["X-Function-Status"], sink.requests[1].body) == ("500", b"why")


async def test_a_timeout_is_told_to_the_url_for_failures(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """It is a failure as well."""
    function.behaviour = never
    gateway = await daemon(settings(function, '[retry]\nattempts = 1\n[queues.line]\ntimeout = "100ms"'))
    urls = {"X_Callback_Url": f"{sink.url}/done", "X_Failure_Callback_Url": f"{sink.url}/failed"}
    await gateway.final(await gateway.submit("it", b"", **urls))
    told = [(request.target, request.headers["X-Function-Status"]) for request in sink.requests]
    assert told == [("/failed", "504")]


async def test_failures_alone_can_be_told(gateway: Daemon, function: Server, sink: Server) -> None:
    """Without a URL for the rest a success is told to nobody: its answer may have any length."""
    for body in (b"short", bytes(16 * 1024 * KIB + 1)):
        function.behaviour = answer(200, body)
        record = await gateway.final(await gateway.submit("it", X_Failure_Callback_Url=sink.url))
        assert (record["status"], record["callback"]["status"]) == ("success", "none")
    function.behaviour = answer(400)
    bad = await gateway.submit("it", X_Failure_Callback_Url=sink.url)
    assert (await gateway.final(bad))["callback"]["status"] == "delivered"
    assert sink.call_ids == [bad]


# ---- queues ----------------------------------------------------------------------------------------------------


async def row(gateway: Daemon, name: str) -> dict[str, Any]:
    """What is shown of one queue."""
    found: dict[str, Any]
    (found,) = [item for item in (await get(gateway, "/system/queues"))["queues"] if item["name"] == name]
    return found


async def act(gateway: Daemon, queue: str, action: str) -> int:
    """Pause, resume or purge a queue; the status of the answer."""
    return (await ask(gateway.url, f"/system/queues/{queue}/{action}", method="POST")).status


async def test_every_queue_is_shown_with_its_limits(daemon: StartDaemon, function: Server) -> None:
    """The default one, those with settings, and those that a function only names."""
    gateway = await daemon(settings(function, "[queues.wide]\nmax_inflight = 7\nmax_pending = 70"))
    shown = [await row(gateway, name) for name in ("faas-request", "line", "wide")]
    assert [item["max_inflight"] for item in shown] == [4, 1, 7]
    assert [item["max_pending"] for item in shown] == [100_000, 100_000, 70]
    assert [(item["depth"], item["inflight"], item["paused"]) for item in shown] == [(0, 0, False)] * 3


async def test_a_queue_shows_what_waits_and_what_runs(gateway: Daemon, function: Server) -> None:
    """Depth, calls in flight, and how long the oldest has waited; all of it back to nothing when they have run."""
    function.behaviour = gate = Gate()
    calls = [await gateway.submit("it") for _ in range(3)]
    await function.wait_for(1)
    shown = await row(gateway, "line")
    assert (shown["depth"], shown["inflight"]) == (2, 1)
    assert 0 < shown["oldest_seconds"] < PATIENCE
    gate.open()
    for call_id in calls:
        await gateway.final(call_id)
    shown = await row(gateway, "line")
    assert (shown["depth"], shown["inflight"], shown["oldest_seconds"]) == (0, 0, 0)


async def test_a_paused_queue_accepts_calls_and_runs_none(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """Other queues go on; when it is resumed, the calls run in their order."""
    gateway = await daemon(settings(function, f'[functions.other]\nurl = "{sink.url}"'))
    assert await act(gateway, "line", "pause") == 200
    calls = [await gateway.submit("it") for _ in range(3)]
    assert (await gateway.final(await gateway.submit("other")))["status"] == "success"
    shown = await row(gateway, "line")
    assert (shown["paused"], shown["depth"], shown["inflight"]) == (True, 3, 0)
    assert [(await gateway.record(call_id))["status"] for call_id in calls] == ["queued"] * 3
    assert function.requests == []
    assert await act(gateway, "line", "resume") == 200
    await function.wait_for(3)
    assert function.call_ids == calls
    assert (await row(gateway, "line"))["paused"] is False


async def test_a_call_that_runs_is_not_paused(gateway: Daemon, function: Server) -> None:
    """It ends as it would have; the one behind it waits."""
    function.behaviour = gate = Gate()
    running, waits = await gateway.submit("it"), await gateway.submit("it")
    await function.wait_for(1)
    assert await act(gateway, "line", "pause") == 200
    gate.open()
    assert (await gateway.final(running))["status"] == "success"
    assert (await gateway.record(waits))["status"] == "queued"
    await act(gateway, "line", "resume")
    assert (await gateway.final(waits))["status"] == "success"


async def test_a_pause_survives_a_restart(gateway: Daemon, function: Server) -> None:
    """And so does its end, whether the daemon was killed or stopped."""
    assert await act(gateway, "line", "pause") == 200
    call_id = await gateway.submit("it")
    await gateway.kill()
    await gateway.start()
    assert (await row(gateway, "line"))["paused"] is True
    assert (await gateway.record(call_id))["status"] == "queued"
    await gateway.terminate()
    await gateway.start()
    assert (await row(gateway, "line"))["paused"] is True
    assert function.requests == []
    assert await act(gateway, "line", "resume") == 200
    assert (await gateway.final(call_id))["status"] == "success"
    await gateway.kill()
    await gateway.start()
    assert (await row(gateway, "line"))["paused"] is False


async def test_a_purge_cancels_what_waits(daemon: StartDaemon, function: Server) -> None:
    """Queued and delayed calls of the queue, however many; not the running one, and none of another queue."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function, f'[functions.other]\nurl = "{function.url}"'))
    running, other = await gateway.submit("it"), await gateway.submit("other", X_Delay="1h")
    await function.wait_for(1)
    waits = await asyncio.gather(*(gateway.submit("it", X_Delay="0s" if n % 2 else "1h") for n in range(700)))
    assert await act(gateway, "line", "purge") == 200
    assert sorted(await listed(gateway, "status=cancelled&limit=500")) == sorted(waits)
    assert (await row(gateway, "line"))["depth"] == 0
    assert (await gateway.record(other))["status"] == "delayed"
    gate.open()
    assert (await gateway.final(running))["status"] == "success"
    after = await gateway.submit("it")
    await gateway.final(after)
    assert function.call_ids == [running, after]


async def test_what_is_no_queue_is_not_found(gateway: Daemon) -> None:
    """404 for each of the three."""
    for action in ("pause", "resume", "purge"):
        assert_refused(await ask(gateway.url, f"/system/queues/nosuch/{action}", method="POST"), 404)


# ---- forgetting ------------------------------------------------------------------------------------------------


async def test_a_final_record_is_forgotten_after_its_time(daemon: StartDaemon, function: Server, refused: str) -> None:
    """`calls.keep`, with its log; not a call that is queued or delayed or has a callback pending, however old."""
    gateway = await daemon(settings(function, '[calls]\nkeep = "1s"\n[callback]\nmin_wait = "1h"\nmax_wait = "1h"'))
    old = await gateway.submit("it")
    pending = await gateway.submit("it", X_Callback_Url=refused)
    await gateway.until(pending, lambda record: record["callback"]["attempts"] == 1)
    await act(gateway, "line", "pause")
    queued, delayed = await gateway.submit("it"), await gateway.submit("it", X_Delay="1h")
    await gateway.terminate()
    await asyncio.sleep(1.1)  # the passing of time is the thing
    await gateway.start()
    await gateway.forgotten(old)
    assert await listed(gateway) == [delayed, queued, pending]
    assert_refused(await ask(gateway.url, f"/system/calls/{old}/log"), 404)
    assert_refused(await run_again(gateway, old), 404)
    assert await cancel(gateway, old) == 404
