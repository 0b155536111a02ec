"""What a caller can ask for beside the call itself: when, by when, how often, through which queue, and once."""

import asyncio
import calendar
import itertools
import time
from datetime import UTC, datetime

import pytest
from aiohttp import web
from conftest import PATIENCE, SECRET, Daemon, Gate, Request, Server, StartDaemon, answer, ask, assert_refused
from operating import get

pytestmark = pytest.mark.unmeasured  # nothing here but time is what other tests have not

# Where the passing of time is itself the thing, it is this much: long enough to tell from a busy machine's delays.
UNIT = 0.5


def settings(function: Server, more: str = "") -> str:
    """One function, `it`, whose queue runs one call at a time."""
    return f'[functions.it]\nurl = "{function.url}"\nqueue = "line"\n{more}\n'


@pytest.fixture
async def gateway(daemon: StartDaemon, function: Server) -> Daemon:
    """A daemon with `it`."""
    return await daemon(settings(function))


def unix(value: str) -> float:
    """Unix time of a time in a record: RFC 3339 in UTC, ending in Z."""
    assert value.endswith("Z"), value
    return datetime.fromisoformat(value).timestamp()


def rfc3339(at: float) -> str:
    """A Unix time as a client would write it."""
    return datetime.fromtimestamp(at, UTC).isoformat()


# ---- not before ------------------------------------------------------------------------------------------------


async def test_a_delayed_call_runs_when_its_time_has_come(gateway: Daemon, function: Server) -> None:
    """`X-Delay`: not before, and without anybody asking for it."""
    sent = time.monotonic()
    call_id = await gateway.submit("it", b"body", X_Delay=f"{UNIT}s")
    (request,) = await function.wait_for(1)
    assert request.arrived - sent >= UNIT
    assert (request.call_id, request.body) == (call_id, b"body")
    assert (await gateway.final(call_id))["status"] == "success"


async def test_a_delay_begins_when_the_whole_request_is_there(gateway: Daemon, function: Server) -> None:
    """However long its body takes: `X-Delay` behind the `X-Start-Time` of the 202."""
    assert gateway.url.startswith("http://")
    reader, writer = await asyncio.open_connection(*gateway.url.removeprefix("http://").split(":"))
    head = f"POST /async-function/it HTTP/1.1\r\nHost: x\r\nX-Delay: {UNIT}s\r\nContent-Length: 2\r\n\r\n"
    writer.write(head.encode() + b"1")
    await asyncio.sleep(UNIT)  # that time passes is what this is about
    writer.write(b"2")
    assert (await reader.readline()).startswith(b"HTTP/1.1 202 ")
    writer.close()
    (request,) = await function.wait_for(1)
    assert time.time() >= int(request.headers["X-Start-Time"]) / 1e9 + UNIT
    assert request.body == b"12"


async def test_a_delayed_call_shows_when_it_is_due(gateway: Daemon, function: Server) -> None:
    """`delayed` until then, with a `due_at` that is the delay behind `created_at`."""
    for delay, seconds in (("1h", 3600), ("5m30s", 330), ("1.5h", 5400), ("2h45m", 9900), ("90000ms", 90)):
        record = await gateway.record(await gateway.submit("it", X_Delay=delay))
        assert (record["status"], record["attempts"], record["started_at"]) == ("delayed", 0, None)
        assert unix(record["due_at"]) - unix(record["created_at"]) == pytest.approx(seconds, abs=0.01)
    assert function.requests == []


async def test_a_call_with_a_time_runs_then(gateway: Daemon, function: Server) -> None:
    """`X-Not-Before`, as RFC 3339 and as Unix seconds: not before it."""
    for number in (1, 2):
        at = time.time() + UNIT
        await gateway.submit("it", X_Not_Before=rfc3339(at) if number == 1 else str(at))
        await function.wait_for(number)
        assert time.time() >= at


async def test_a_time_means_the_same_in_every_form(gateway: Daemon, function: Server) -> None:
    """With Z or an offset, with a fraction or without, or in Unix seconds."""
    at = calendar.timegm((2040, 2, 29, 22, 30, 15))
    forms = [
        "2040-02-29T22:30:15Z",
        "2040-02-29T22:30:15.000Z",
        "2040-02-29T22:30:15+00:00",
        "2040-03-01T04:00:15+05:30",
        "2040-02-29T14:30:15-08:00",
        str(at),
    ]
    for form in forms:
        record = await gateway.record(await gateway.submit("it", X_Not_Before=form))
        assert (record["status"], unix(record["due_at"])) == ("delayed", at), form


async def test_a_time_that_has_passed_is_no_delay(gateway: Daemon) -> None:
    """In both forms, however long ago; nor is a delay of nothing."""
    for form in (rfc3339(time.time() - 1), str(int(time.time()) - 1), "1970-01-01T00:00:00Z", "0"):
        assert (await gateway.final(await gateway.submit("it", X_Not_Before=form)))["status"] == "success", form
    assert (await gateway.final(await gateway.submit("it", X_Delay="0s")))["status"] == "success"


async def test_of_a_delay_and_a_time_the_later_counts(gateway: Daemon) -> None:
    """Not before either."""
    now = time.time()
    for delay, at, due in (("1h", now + 60, 3600), ("60s", now + 7200, 7200)):
        record = await gateway.record(await gateway.submit("it", X_Delay=delay, X_Not_Before=str(at)))
        assert unix(record["due_at"]) - now == pytest.approx(due, abs=PATIENCE)


async def test_a_time_at_the_end_of_the_calendar_does_no_harm(gateway: Daemon) -> None:
    """It is taken or refused; records can be read and calls run afterwards as before."""
    forms = ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00", "99999999999")
    for form in forms:
        reply = await ask(gateway.url, "/async-function/it", f"X-Not-Before: {form}", method="POST")
        assert reply.status in (202, 400), (form, reply)
        if reply.status == 202:
            assert (await ask(gateway.url, reply.headers["Location"])).status == 200, form
    assert (await ask(gateway.url, "/system/calls")).status == 200
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"


async def test_calls_run_in_the_order_of_their_times(gateway: Daemon, function: Server) -> None:
    """Not in that of their arrival; and one that is not due holds up nobody."""
    far = await gateway.submit("it", X_Delay="1h")
    third = await gateway.submit("it", X_Delay=f"{UNIT * 2}s")
    second = await gateway.submit("it", X_Delay=f"{UNIT}s")
    first = await gateway.submit("it")
    await function.wait_for(3)
    assert function.call_ids == [first, second, third]
    assert (await gateway.record(far))["status"] == "delayed"


async def test_a_delay_survives_kill_9(gateway: Daemon, function: Server) -> None:
    """Neither forgotten nor shortened nor started anew."""
    at = time.time() + 4 * UNIT
    soon = await gateway.submit("it", X_Not_Before=str(at))
    far = await gateway.submit("it", X_Delay="1h")
    before = await gateway.record(far)
    await gateway.kill()
    await gateway.start()
    assert await gateway.record(far) == before
    await function.wait_for(1)
    assert time.time() >= at
    assert function.call_ids == [soon]


async def test_a_call_that_became_due_while_the_daemon_was_down_runs_at_its_start(
    gateway: Daemon, function: Server
) -> None:
    """Late is better than never."""
    call_id = await gateway.submit("it", X_Delay=f"{UNIT}s")
    await gateway.terminate()
    await asyncio.sleep(UNIT)  # the passing of time is the thing
    assert function.requests == []
    await gateway.start()
    assert (await gateway.final(call_id))["status"] == "success"


# ---- not after -------------------------------------------------------------------------------------------------


async def behind_a_gate(gateway: Daemon, function: Server) -> tuple[Gate, str]:
    """A gate, and the call that waits there and so keeps the queue busy."""
    function.behaviour = gate = Gate()
    call_id = await gateway.submit("it")
    await function.wait_for(1)
    return gate, call_id


async def test_a_call_that_does_not_start_in_time_ends_in_timeout(gateway: Daemon, function: Server) -> None:
    """`X-Deadline`, a duration or a time: it ends then, while it still waits, and never runs; those without one do."""
    gate, first = await behind_a_gate(gateway, function)
    at = time.time() + 4 * UNIT
    submitted = (gateway.submit("it", X_Deadline=value) for value in (f"{4 * UNIT}s", rfc3339(at), str(at)))
    calls = await asyncio.gather(*submitted)
    last = await gateway.submit("it")
    for call_id in calls:
        record = await gateway.final(call_id)
        assert time.time() >= at
        assert (record["status"], record["attempts"], record["started_at"]) == ("timeout", 0, None)
        assert record["error"]
    gate.open()
    await gateway.final(last)
    assert function.call_ids == [first, last]


async def test_a_missed_deadline_is_told_as_a_failure(gateway: Daemon, sink: Server) -> None:
    """A callback with status 504 and no body, to the URL for failures when there is one."""
    urls = {"X_Callback_Url": f"{sink.url}/done", "X_Failure_Callback_Url": f"{sink.url}/failed"}
    for given in (urls, {"X_Callback_Url": urls["X_Callback_Url"]}):
        call_id = await gateway.missed("it", b"body", "line", **given)
        assert (await gateway.final(call_id))["callback"]["status"] == "delivered"
    told = [(request.target, request.headers["X-Function-Status"], request.body) for request in sink.requests]
    assert told == [("/failed", "504", b""), ("/done", "504", b"")]


async def test_a_call_that_started_in_time_may_take_longer(gateway: Daemon, function: Server) -> None:
    """The deadline is for the start; neither the run nor a further attempt is cut off by it."""

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        if len(function.requests) > 1:
            return web.Response()
        await asyncio.sleep(3 * UNIT)  # the passing of time is the thing
        return web.Response(status=500)

    function.behaviour = behaviour
    record = await gateway.final(await gateway.submit("it", X_Deadline=f"{2 * UNIT}s"))
    assert (record["status"], record["attempts"]) == ("success", 2)


async def test_a_deadline_passes_in_a_paused_queue_too(gateway: Daemon, function: Server) -> None:
    """Nobody has to ask the queue for work."""
    assert (await ask(gateway.url, "/system/queues/line/pause", method="POST")).status == 200
    record = await gateway.final(await gateway.submit("it", X_Deadline=f"{UNIT}s"))
    assert record["status"] == "timeout"
    assert function.requests == []


async def test_a_deadline_survives_kill_9(gateway: Daemon, function: Server) -> None:
    """It ends the call after the restart as it would have before."""
    assert (await ask(gateway.url, "/system/queues/line/pause", method="POST")).status == 200
    at = time.time() + 4 * UNIT
    call_id = await gateway.submit("it", X_Deadline=str(at))
    await gateway.kill()
    await gateway.start()
    record = await gateway.final(call_id)
    assert time.time() >= at
    assert (record["status"], record["attempts"]) == ("timeout", 0)
    assert function.requests == []


async def test_a_deadline_that_passed_while_the_daemon_was_down_is_missed(gateway: Daemon, function: Server) -> None:
    """The call is not run late; one that had started in time is run again."""
    function.behaviour = Gate()
    started = await gateway.submit("it", X_Deadline=f"{3 * UNIT}s")
    await function.wait_for(1)
    late = await gateway.submit("it", X_Deadline=f"{3 * UNIT}s")
    await gateway.kill()
    await asyncio.sleep(3 * UNIT)  # the passing of time is the thing
    function.behaviour = answer()
    await gateway.start()
    record = await gateway.final(late)
    assert (record["status"], record["attempts"]) == ("timeout", 0)
    record = await gateway.final(started)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 2, 1)
    assert function.call_ids == [started, started]


# ---- how often, and where --------------------------------------------------------------------------------------


async def test_a_caller_may_ask_for_fewer_or_more_attempts(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """`X-Max-Attempts` replaces the policy's number; the callback tells it."""
    function.behaviour = answer(500)
    gateway = await daemon(settings(function, "[functions.it.retry]\nattempts = 2"))
    for asked, number in (({"X_Max_Attempts": "1"}, 1), ({"X_Max_Attempts": "3"}, 3), ({}, 2)):
        call_id = await gateway.submit("it", b"", X_Callback_Url=sink.url, **asked)
        record = await gateway.final(call_id)
        assert (record["status"], record["attempts"], record["max_attempts"]) == ("error", number, number)
        assert function.call_ids.count(call_id) == number
        told = sink.requests[-1].headers
        assert (told["X-Retry"], told["X-Retry-Max"]) == (str(number - 1), str(number))


async def test_the_number_of_attempts_survives_kill_9(daemon: StartDaemon, function: Server) -> None:
    """Those that were made count, those that were asked for are still due."""
    function.behaviour = answer(500)
    waits = f'[functions.it.retry]\nattempts = 10\nmin_wait = "{2 * UNIT}s"\nmax_wait = "{2 * UNIT}s"'
    gateway = await daemon(settings(function, waits))
    call_id = await gateway.submit("it", X_Max_Attempts="2")
    await gateway.until(call_id, lambda record: record["attempts"] == 1 and record["status"] == "delayed")
    await gateway.kill()
    await gateway.start()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"], record["max_attempts"]) == ("error", 2, 2)


async def test_a_caller_may_choose_the_queue(daemon: StartDaemon, function: Server) -> None:
    """`X-Queue` instead of the function's: the call is shown there, and runs beside a busy one in the other."""
    gateway = await daemon(settings(function, "[queues.express]\nmax_inflight = 1"))
    gate, first = await behind_a_gate(gateway, function)
    function.behaviour = answer()
    waits = await gateway.submit("it")
    record = await gateway.final(await gateway.submit("it", X_Queue="express"))
    assert (record["status"], record["queue"]) == ("success", "express")
    assert (await gateway.record(waits))["status"] == "queued"
    gate.open()
    assert (await gateway.final(waits))["queue"] == "line"
    assert (await gateway.final(first))["queue"] == "line"


async def test_the_chosen_queue_survives_kill_9(daemon: StartDaemon, function: Server) -> None:
    """With its limit: two calls in a queue that runs one at a time never meet."""
    gateway = await daemon(
        f'[functions.it]\nurl = "{function.url}"\n[queues.express]\nmax_inflight = 1\n[queues.other]\nmax_inflight = 1'
    )
    assert (await ask(gateway.url, "/system/queues/express/pause", method="POST")).status == 200
    calls = [await gateway.submit("it", X_Queue="express") for _ in range(10)]
    await gateway.kill()
    await gateway.start()
    assert (await ask(gateway.url, "/system/queues/express/resume", method="POST")).status == 200
    records = [await gateway.final(call_id) for call_id in calls]
    assert {(record["status"], record["queue"]) for record in records} == {("success", "express")}
    assert (function.call_ids, function.most_running) == (calls, 1)


# ---- one at a time ---------------------------------------------------------------------------------------------


async def test_calls_with_one_key_never_meet(daemon: StartDaemon, function: Server) -> None:
    """In the order in which they came, also after kill -9; others run beside them, and the record has the key."""
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 8')
    function.behaviour = Gate()
    calls = [await gateway.submit("it", X_Concurrency_Key="meter-7") for _ in range(5)]
    others = [await gateway.submit("it", X_Concurrency_Key=f"meter-{number}") for number in range(3)]
    await function.wait_for(4)
    assert sorted(function.call_ids) == sorted([calls[0], *others])
    assert (await gateway.record(calls[1]))["concurrency_key"] == "meter-7"
    assert function.requests[0].headers["X-Concurrency-Key"] == "meter-7"
    await gateway.kill()
    function.requests.clear()
    function.behaviour = answer()
    await gateway.start()
    records = [await gateway.final(call_id) for call_id in (*calls, *others)]
    assert {record["status"] for record in records} == {"success"}
    assert [call_id for call_id in function.call_ids if call_id in calls] == [*calls[1:], calls[0]]
    started = sorted((record["started_at"], record["completed_at"]) for record in records[:5])
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(started))


# ---- what is not understood ------------------------------------------------------------------------------------

# By header: words of the form that is expected, and values that do not have it.
BAD: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "X-Delay": (("duration",), ["", "soon", "10", "-1s", "1.5d", "1h30", "1s 2s", "1e3s", "NaN", "s", "9999999999h"]),
    "X-Not-Before": (
        ("RFC 3339", "Unix seconds"),
        ["", "tomorrow", "10m", "-1", "1e9", "nan", "2030-13-01T00:00:00Z", "2030-01-31", "2030-01-31T08:00:00",
         "2030-01-31T25:00:00Z", "9" * 400],
    ),
    "X-Deadline": (("duration", "RFC 3339"), ["", "never", "-1h", "2030-01-31T08:00:00", "1h later", "inf"]),
    "X-Max-Attempts": (("whole number",), ["", "0", "-1", "many", "1.5", "1_0", "0x10", "9" * 40]),
    "X-Queue": (("faas-request", "line"), ["", "nosuch", "LINE", "line,faas-request", "@callbacks"]),
    "X-Failure-Callback-Url": (("http",), ["", "/relative", "example.org", "ftp://example.org", "http://"]),
    "Idempotency-Key": (("ASCII",), ["", "caf\u00e9", "x" * 257]),
    "X-Concurrency-Key": (("ASCII",), ["", "two words", "caf\u00e9", "x" * 257]),
}  # fmt: skip


async def test_a_control_that_is_not_understood_is_refused(gateway: Daemon, function: Server) -> None:
    """400 in one line that names the header, the value and the form expected; nothing is queued."""
    for name, (form, values) in BAD.items():
        for value in values:
            reply = await ask(gateway.url, "/async-function/it", f"{name}: {value}", method="POST", body=SECRET)
            assert_refused(reply, 400, name, *form, value if value.isascii() else "", limit=40)
    assert (await get(gateway, "/system/calls"))["calls"] == []
    assert function.requests == []


# ---- once ------------------------------------------------------------------------------------------------------


async def test_the_same_key_is_the_same_call(gateway: Daemon, function: Server) -> None:
    """While it waits and when it has ended: 202 with its id and place, and the function is called once."""
    function.behaviour = gate = Gate()
    first = await gateway.submit("it", b"body", Idempotency_Key="order-1")
    replies = [await ask(gateway.url, "/async-function/it", "Idempotency-Key: order-1", method="POST", body=b"body")]
    gate.open()
    await gateway.final(first)
    replies.append(
        await ask(gateway.url, "/async-function/it", "Idempotency-Key: order-1", method="POST", body=b"body")
    )
    found = {(reply.status, reply.headers["X-Call-Id"], reply.headers["Location"]) for reply in replies}
    assert found == {(202, first, f"/system/calls/{first}")}
    await gateway.final(await gateway.submit("it", b"another call"))
    assert [request.body for request in function.requests] == [b"body", b"another call"]


async def test_the_first_of_many_with_one_key_wins(gateway: Daemon, function: Server) -> None:
    """Also when they come all at once; each has brought a call id, and all get that of the winner."""
    calls = await asyncio.gather(
        *(gateway.submit("it", b"body", Idempotency_Key="order-1", X_Call_Id=f"client-{n}") for n in range(50))
    )
    assert len(set(calls)) == 1
    await gateway.final(calls[0])
    await gateway.final(await gateway.submit("it"))
    assert len(function.requests) == 2


async def test_other_keys_are_other_calls(gateway: Daemon, function: Server) -> None:
    """Keys are compared exactly; no key is no key."""
    keys: list[dict[str, str]] = [
        {},
        {},
        {"Idempotency_Key": "a"},
        {"Idempotency_Key": "A"},
        {"Idempotency_Key": '"a"'},
    ]
    calls = [await gateway.submit("it", b"body", **key) for key in keys]
    assert len(set(calls)) == len(keys)
    for call_id in calls:
        assert (await gateway.final(call_id))["status"] == "success"


async def test_a_key_with_another_body_is_refused(gateway: Daemon, function: Server) -> None:
    """422 in one line that names the header: one of the two was a mistake."""
    first = await gateway.submit("it", b"body", Idempotency_Key="order-1")
    for body in (SECRET, b"", b"body\n"):
        reply = await ask(gateway.url, "/async-function/it", "Idempotency-Key: order-1", method="POST", body=body)
        assert_refused(reply, 422, "Idempotency-Key")
    await gateway.final(first)
    assert [request.body for request in function.requests] == [b"body"]


async def test_a_key_belongs_to_one_function(daemon: StartDaemon, function: Server) -> None:
    """The same key for another function is another call, with whatever body."""
    gateway = await daemon(settings(function, f'[functions.other]\nurl = "{function.url}/other"'))
    calls = [
        await gateway.submit("it", b"body", Idempotency_Key="order-1"),
        await gateway.submit("other", b"other body", Idempotency_Key="order-1"),
    ]
    assert len(set(calls)) == 2
    for call_id in calls:
        assert (await gateway.final(call_id))["status"] == "success"
    assert await gateway.submit("it.openfaas-fn", b"body", Idempotency_Key="order-1") == calls[0]


async def test_a_key_of_a_call_that_failed_is_still_taken(gateway: Daemon, function: Server) -> None:
    """Its record tells what became of it; nothing is queued."""
    function.behaviour = answer(400)
    call_id = await gateway.submit("it", Idempotency_Key="order-1")
    assert (await gateway.final(call_id))["status"] == "error"
    assert await gateway.submit("it", Idempotency_Key="order-1") == call_id
    assert (await gateway.record(call_id))["status"] == "error"


async def test_a_key_survives_kill_9(gateway: Daemon, function: Server) -> None:
    """For a call that has ended and for one that waits."""
    ended = await gateway.submit("it", b"body", Idempotency_Key="order-1")
    await gateway.final(ended)
    waits = await gateway.submit("it", b"body", Idempotency_Key="order-2", X_Delay="1h")
    await gateway.kill()
    await gateway.start()
    assert await gateway.submit("it", b"body", Idempotency_Key="order-1") == ended
    assert await gateway.submit("it", b"body", Idempotency_Key="order-2") == waits
    reply = await ask(gateway.url, "/async-function/it", "Idempotency-Key: order-1", method="POST", body=SECRET)
    assert_refused(reply, 422, "Idempotency-Key")
    assert len(function.requests) == 1


async def test_a_key_can_be_used_again_when_its_record_is_gone(daemon: StartDaemon, function: Server) -> None:
    """The retention time is the memory for keys, too."""
    gateway = await daemon(settings(function, '[calls]\nkeep = "1s"'))
    first = await gateway.submit("it", b"body", Idempotency_Key="order-1")
    await gateway.final(first)
    await gateway.terminate()
    await asyncio.sleep(1.1)  # the passing of time is the thing
    await gateway.start()
    await gateway.forgotten(first)
    second = await gateway.submit("it", b"another body", Idempotency_Key="order-1")
    assert second != first
    assert (await gateway.final(second))["status"] == "success"
    assert len(function.requests) == 2
