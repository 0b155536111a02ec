"""Which calls are meant: one by its own id, those that share a call id, those that match filters.

And no others.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web
from conftest import (
    PATIENCE,
    Daemon,
    Finished,
    Gate,
    Reply,
    Request,
    Server,
    StartDaemon,
    WallClock,
    ask,
    assert_refused,
    connection,
    faasd,
    parse,
)
from operating import cancel, log_of, run_again


class Functions:
    """What the function server does: /fail answers 500, /wait waits for its gate, others echo."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.gates: dict[bytes, Gate] = {}  # for calls with these bodies, in place of that one

    async def __call__(self, request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        """One call."""
        if seen.target.startswith("/wait"):
            await self.gates.get(seen.body, self.gate)(request, seen)
        return web.Response(status=500 if seen.target.startswith("/fail") else 200, body=seen.body)


@pytest.fixture
def functions(function: Server) -> Functions:
    """The function server's behaviour."""
    function.behaviour = functions = Functions()
    return functions


@pytest.fixture
async def gateway(daemon: StartDaemon, function: Server, functions: Functions) -> Daemon:
    """A daemon with the functions `it`, `fail`, `wait`, and `cat` in a queue of its own."""
    urls = {"it": function.url, "fail": f"{function.url}/fail", "wait": f"{function.url}/wait"}
    tables = [f'[functions.{name}]\nurl = "{url}"' for name, url in urls.items()]
    tables += ['[functions.cat]\ncommand = ["cat"]\nqueue = "cats"', "[retry]\nattempts = 1"]
    tables += ["[queues.faas-request]\nmax_inflight = 16"]
    return await daemon("\n".join(tables))


# ---- asking --------------------------------------------------------------------------------------


async def records(gateway: Daemon, query: str = "") -> list[dict[str, Any]]:
    """The records that a query lists, oldest first."""
    reply = await ask(gateway.url, f"/system/calls?{query}")
    assert reply.status == 200, (query, reply)
    found: list[dict[str, Any]] = json.loads(reply.body)["calls"]
    return found[::-1]


async def ids(gateway: Daemon, query: str = "") -> list[str]:
    """Their own ids, oldest first."""
    return [record["id"] for record in await records(gateway, query)]


async def newest(gateway: Daemon) -> str:
    """The own id of the call that came last."""
    return (await ids(gateway, "limit=1"))[0]


async def submit(gateway: Daemon, path: str, body: bytes = b"", **headers: str) -> str:
    """Queue a call; its own id."""
    await gateway.submit(path, body, **headers)
    return await newest(gateway)


async def until_listed(gateway: Daemon, query: str, number: int) -> list[dict[str, Any]]:
    """What a query lists as soon as that many are final.

    Polls, because a call that a callback makes is known to nobody outside.
    """
    async with asyncio.timeout(PATIENCE):
        while True:
            found = await records(gateway, query)
            if sum(record["completed_at"] is not None for record in found) >= number:
                return found
            await asyncio.sleep(0.01)


async def change(gateway: Daemon, action: str, query: str) -> tuple[int, int]:
    """Cancel or retry all that match; how many did, and for how many it was done."""
    reply = await ask(gateway.url, f"/system/calls/{action}?{query}", method="POST")
    assert (reply.status, reply.headers["Content-Type"].partition(";")[0]) == (
        200,
        "application/json",
    ), reply
    found = json.loads(reply.body)
    assert sorted(found) == ["done", "matched"]
    return found["matched"], found["done"]


async def twins(gateway: Daemon, path: str = "it", **headers: str) -> tuple[str, str]:
    """Two calls with the call id `batch`, whose bodies are `one` and `two`; their own ids."""
    first = await submit(gateway, path, b"one", X_Call_Id="batch", **headers)
    return first, await submit(gateway, path, b"two", X_Call_Id="batch", **headers)


# ---- a call's own id -----------------------------------------------------------------------------


async def test_every_record_has_an_id_of_its_own(gateway: Daemon) -> None:
    """Calls that share a call id have different ones; if the caller sends none, the two are one."""
    first, second = await twins(gateway)
    plain = await gateway.submit("it")
    found = await records(gateway)
    assert [record["id"] for record in found] == [first, second, plain]
    assert [record["call_id"] for record in found] == ["batch", "batch", plain]
    assert len({first, second, plain, "batch"}) == 4


async def test_a_record_is_shown_by_its_own_id(gateway: Daemon) -> None:
    """Each as the list has it, also after a power cut; by the call id it is the newest."""
    calls = await twins(gateway)
    for call in calls:
        await gateway.final(call)
    found = await records(gateway)
    await gateway.kill()
    await gateway.start()
    assert [await gateway.record(call) for call in calls] == found
    assert await gateway.record("batch") == found[-1]


async def test_a_log_is_shown_by_the_calls_own_id(gateway: Daemon) -> None:
    """Each has its own; by the call id it is that of the newest."""
    first, second = await twins(gateway)
    for call in (first, second):
        await gateway.final(call)
    assert [await log_of(gateway, call) for call in (first, second, "batch")] == [
        b"one",
        b"two",
        b"two",
    ]


@contextlib.asynccontextmanager
async def waiting(gateway: Daemon, call: str) -> AsyncIterator[asyncio.Task[Reply]]:
    """Ask for a record with `wait`; the answer's task is given when the daemon has the request."""
    async with connection(gateway.url) as (reader, writer):
        head = [
            f"GET /system/calls/{call}?wait=1h HTTP/1.1",
            "Host: localhost",
            "Connection: close",
        ]
        writer.write("\r\n".join([*head, "", ""]).encode())
        for _ in range(2):  # it answers these after having read the request
            await records(gateway)

        async def answered() -> Reply:
            return parse(await asyncio.wait_for(reader.read(), PATIENCE))

        task = asyncio.create_task(answered())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_the_end_of_exactly_one_call_can_be_waited_for(
    gateway: Daemon, function: Server, functions: Functions
) -> None:
    """By its own id, whatever becomes of those that share its call id."""
    first = await submit(gateway, "wait", X_Call_Id="batch")
    await function.wait_for(1)
    async with waiting(gateway, first) as answered:
        second = await submit(gateway, "it", X_Call_Id="batch")
        await gateway.final(second)
        for call in (second, "batch"):  # the newest, which is final
            async with waiting(gateway, call) as others:
                assert json.loads((await others).body)["id"] == second
        assert not answered.done()
        functions.gate.open()
        record = json.loads((await answered).body)
    assert (record["id"], record["status"]) == (first, "success")


async def test_who_waits_for_a_call_id_is_not_told_of_the_end_of_an_older_call(
    gateway: Daemon, function: Server, functions: Functions
) -> None:
    """The newest call under that id is the one that is waited for."""
    functions.gates = {b"one": Gate(), b"two": Gate()}
    first, second = await twins(gateway, "wait")
    await function.wait_for(2)
    async with waiting(gateway, "batch") as answered:
        functions.gates[b"one"].open()
        await gateway.final(first)
        assert not answered.done()
        functions.gates[b"two"].open()
        record = json.loads((await answered).body)
    assert (record["id"], record["status"]) == (second, "success")


async def test_one_of_those_that_share_a_call_id_is_cancelled_by_its_own(gateway: Daemon) -> None:
    """The other one is not; by the call id, what is left is."""
    first, second = await twins(gateway, X_Delay="1h")
    assert await cancel(gateway, first) == 202
    assert [record["status"] for record in await records(gateway)] == ["cancelled", "delayed"]
    assert await cancel(gateway, first) == 409
    assert await cancel(gateway, "batch") == 202
    assert [record["status"] for record in await records(gateway)] == ["cancelled", "cancelled"]
    assert [await cancel(gateway, call) for call in (second, "batch")] == [409, 409]


async def test_one_of_those_that_run_with_the_same_call_id_is_stopped_by_its_own(
    gateway: Daemon, function: Server, functions: Functions
) -> None:
    """Its function sees the connection closed, the other one goes on."""
    first, second = await twins(gateway, "wait")
    await function.wait_for(2)
    assert await cancel(gateway, first) == 202
    await function.until(lambda: function.cancelled == 1, "the end of one call")
    functions.gate.open()
    statuses = [(await gateway.final(call))["status"] for call in (first, second)]
    assert (statuses, function.cancelled) == (["cancelled", "success"], 1)


async def test_one_of_those_that_share_a_call_id_is_run_again_by_its_own(gateway: Daemon, function: Server) -> None:
    """The other one is not touched, and the answer leads to the record."""
    first, second = await twins(gateway)
    for call in (first, second):
        await gateway.final(call)
    untouched = await gateway.record(second)
    reply = await run_again(gateway, first)
    assert reply.status == 202
    found = json.loads((await ask(gateway.url, reply.headers["Location"])).body)
    assert (found["id"], found["call_id"]) == (first, "batch")
    assert (await gateway.final(first))["status"] == "success"
    assert [request.body for request in function.requests].count(b"one") == 2
    assert await gateway.record(second) == untouched
    assert len(function.requests) == 3


async def test_fns_routes_take_a_calls_own_id(daemon: StartDaemon, function: Server, functions: Functions) -> None:
    """The call, and its log."""
    table = f'url = "{function.url}"\ntype = "async"'
    gateway = await daemon(f"[functions.one]\n{table}\n[functions.two]\n{table}")
    for name in ("one", "two"):
        reply = await ask(gateway.url, f"/r/app/{name}", "X-Call-Id: batch", method="POST", body=name.encode())
        assert reply.status == 202
    for call, name in zip(await ids(gateway), ("one", "two"), strict=True):
        await gateway.final(call)
        shown = json.loads((await ask(gateway.url, f"/v1/apps/app/calls/{call}")).body)["call"]
        assert shown["path"] == f"/{name}"
        written = json.loads((await ask(gateway.url, f"/v1/apps/app/calls/{call}/log")).body)["log"]
        assert written["log"] == name


async def test_a_call_id_that_is_anothers_own_id_does_not_hide_that_call(gateway: Daemon) -> None:
    """An own id means exactly its call on every route, even if a newer call has it as a call id."""
    first = await gateway.submit("it", b"one", X_Delay="1h")
    second = await submit(gateway, "it", b"two", X_Call_Id=first)
    await gateway.final(second)
    assert (await gateway.record(first))["request_bytes"] == 3
    assert [(await gateway.record(call))["id"] for call in (first, second)] == [first, second]
    assert await ids(gateway, f"call_id={first}") == [first, second]
    assert await log_of(gateway, first) == b""
    assert (await run_again(gateway, first)).status == 409
    assert await cancel(gateway, first) == 202
    assert [record["status"] for record in await records(gateway)] == ["cancelled", "success"]
    assert await cancel(gateway, first) == 409


# ---- chains of callbacks -------------------------------------------------------------------------

TO_CAT = "http://gateway/async-function/cat"


async def test_the_first_call_of_a_chain_stays_reachable(gateway: Daemon) -> None:
    """Its record and log by the id that its caller got, under which the whole chain is listed."""
    reply = await ask(gateway.url, "/async-function/it", f"X-Callback-Url: {TO_CAT}", method="POST", body=b"link")
    call_id = reply.headers["X-Call-Id"]
    chain = await until_listed(gateway, f"call_id={call_id}", 2)
    await gateway.final(call_id)
    assert [(record["function"], record["call_id"]) for record in chain] == [
        ("it", call_id),
        ("cat", call_id),
    ]
    for target in (
        reply.headers["Location"],
        f"/system/calls/{call_id}",
        f"/system/calls/{call_id}?wait=1h",
    ):
        shown = json.loads((await ask(gateway.url, target)).body)
        assert (shown["function"], shown["callback"]["status"]) == ("it", "delivered"), target
    assert await log_of(gateway, call_id) == b"link"
    first, second = chain
    assert first["id"] == call_id != second["id"]
    assert await gateway.record(second["id"]) == second
    assert await log_of(gateway, second["id"]) == b"link"


async def test_the_calls_of_a_chain_are_cancelled_and_run_again_one_by_one(
    gateway: Daemon, function: Server, functions: Functions
) -> None:
    """The first has finished, as its id says, although the second runs under it, with its own."""
    call_id = await gateway.submit("it", b"link", X_Callback_Url="http://gateway/async-function/wait")
    await function.wait_for(2)
    first, second = await ids(gateway, f"call_id={call_id}")
    assert (await gateway.final(first))["status"] == "success"
    assert await cancel(gateway, call_id) == 409
    assert await cancel(gateway, second) == 202
    await function.until(lambda: function.cancelled == 1, "the end of the second call")
    functions.gate.open()
    assert (await run_again(gateway, call_id)).status == 202
    again = await until_listed(gateway, f"call_id={call_id}", 3)
    assert [record["status"] for record in again] == ["success", "cancelled", "success"]
    assert [record["function"] for record in again] == ["it", "wait", "wait"]


async def test_a_chain_with_a_call_id_from_its_caller_is_told_apart_by_own_ids(
    gateway: Daemon,
) -> None:
    """By the call id it is the newest call; each has its record and its log by its own."""
    await gateway.submit("it", b"link", X_Call_Id="order-7", X_Callback_Url=TO_CAT)
    found = await until_listed(gateway, "call_id=order-7", 2)
    assert [(await gateway.record(record["id"]))["function"] for record in found] == ["it", "cat"]
    assert [await log_of(gateway, record["id"]) for record in found] == [b"link", b"link"]
    assert (await gateway.record("order-7"))["function"] == "cat"


# ---- by filters ----------------------------------------------------------------------------------


async def test_what_failed_is_run_again_and_nothing_that_shares_its_call_id(
    gateway: Daemon,
) -> None:
    """The successful call of another function under the same call id stays as it is."""
    failed = await submit(gateway, "fail", X_Call_Id="batch")
    good = await submit(gateway, "cat", X_Call_Id="batch")
    before = [await gateway.final(call) for call in (failed, good)]
    assert await change(gateway, "retry", "status=error&function=fail") == (1, 1)
    again = await gateway.final(failed)
    assert again["started_at"] > before[0]["started_at"]
    assert await gateway.record(good) == before[1]


async def test_what_is_delayed_is_cancelled_and_nothing_that_shares_its_call_id(
    gateway: Daemon, function: Server, functions: Functions
) -> None:
    """The running call of another function under the same call id goes on."""
    running = await submit(gateway, "wait", X_Call_Id="batch")
    await function.wait_for(1)
    delayed = await submit(gateway, "cat", X_Call_Id="batch", X_Delay="1h")
    assert await change(gateway, "cancel", "status=delayed&function=cat") == (1, 1)
    assert (await gateway.record(delayed))["status"] == "cancelled"
    functions.gate.open()
    assert (await gateway.final(running))["status"] == "success"
    assert function.cancelled == 0


@pytest.fixture
async def variety(gateway: Daemon, function: Server, functions: Functions, sink: Server) -> dict[str, str]:
    """Calls of all kinds by a word for each; the value is the own id."""

    async def refuse(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return web.Response(status=400 if seen.target == "/refuse" else 200)

    sink.behaviour = refuse
    calls = {
        "plain": await submit(gateway, "it"),
        "told": await submit(gateway, "it", X_Callback_Url=sink.url),
        "refused": await submit(gateway, "it", X_Callback_Url=f"{sink.url}/refuse"),
        "failed": await submit(gateway, "fail", X_Call_Id="batch"),
        "late": await gateway.missed("it"),
        "cat": await submit(gateway, "cat", X_Call_Id="batch"),
    }
    for call in calls.values():
        await gateway.final(call)
    calls["running"] = await submit(gateway, "wait", X_Call_Id="batch")
    await function.until(lambda: function.running == 1, "the call that waits")
    calls["delayed"] = await submit(gateway, "cat", X_Delay="1h", X_Callback_Url=sink.url)
    return calls


FILTERS = {
    "status=error": "failed",
    "status=error,timeout": "failed late",
    "status=error&status=timeout": "failed late",
    "status=error,timeout&status=delayed": "failed late delayed",
    "status=running": "running",
    "status=success": "plain told refused cat",
    "callback=failed": "refused",
    "callback=delivered,failed": "told refused",
    "callback=delivered&callback=failed": "told refused",
    "callback=none&function=cat": "cat delayed",
    "function=fail": "failed",
    "function=cat.openfaas-fn": "cat delayed",
    "queue=cats": "cat delayed",
    "call_id=batch": "failed cat running",
    "call_id=batch&status=error,running": "failed running",
    "function=cat&status=delayed&queue=cats&callback=none": "delayed",
    "since=1h&status=delayed": "delayed",
    "until=1h": "",
    "function=nosuch": "",
    "function=it&queue=cats": "",
}


async def test_the_list_has_what_matches_all_filters(gateway: Daemon, variety: dict[str, str]) -> None:
    """`status` and `callback` take several, repeated or with commas."""
    for query, words in FILTERS.items():
        assert await ids(gateway, query) == [variety[word] for word in words.split()], query


async def test_what_matches_is_counted(daemon: StartDaemon) -> None:
    """However many pages of a list it would be."""
    gateway = await daemon("[functions.it]\ncommand = ['true']", before="faasd_async.MAX_PAGE = 2")
    await asyncio.gather(*(gateway.submit("it", X_Delay="1h") for _ in range(5)))
    for query, number in {"": 5, "&status=delayed&function=it": 5, "&status=queued": 0}.items():
        assert json.loads((await ask(gateway.url, f"/system/calls?count=1{query}")).body) == {"count": number}
    assert_refused(await ask(gateway.url, "/system/calls?count=maybe"), 400, "count: ")


RUN_AGAIN = {
    "status=error": "failed",
    "status=error,timeout": "failed late",
    "status=success&status=error": "plain told refused failed cat",
    "callback=failed": "refused",
    "callback=failed&callback=delivered": "told refused",
    "function=fail": "failed",
    "function=cat.openfaas-fn&status=success": "cat",
    "queue=cats&status=success": "cat",
    "call_id=batch&status=success": "cat",
    "since=1h&status=timeout": "late",
    "until=1h": "",
    "function=nosuch": "",
}


@pytest.mark.unmeasured
@pytest.mark.parametrize(("query", "words"), RUN_AGAIN.items())
async def test_exactly_what_matches_is_run_again(
    gateway: Daemon, variety: dict[str, str], query: str, words: str
) -> None:
    """The same filters as the list has; every other record stays as it is."""
    meant = [variety[word] for word in words.split()]
    before = {call: await gateway.record(call) for call in variety.values()}
    assert await change(gateway, "retry", query) == (len(meant), len(meant))
    for call in meant:
        assert (await gateway.final(call))["completed_at"] > before[call]["completed_at"]
    after = {call: await gateway.record(call) for call in variety.values()}
    assert [call for call in before if before[call] != after[call]] == meant


CANCELLED = {
    "status=delayed": "delayed",
    "status=running,delayed": "running delayed",
    "function=wait": "running",
    "function=cat&status=delayed": "delayed",
    "queue=cats&status=delayed,queued": "delayed",
    "call_id=batch&status=running": "running",
    "callback=none&status=delayed&status=running": "running delayed",
    "until=1h": "",
    "callback=pending": "",
}


@pytest.mark.unmeasured
@pytest.mark.parametrize(("query", "words"), CANCELLED.items())
async def test_exactly_what_matches_is_cancelled(
    gateway: Daemon, function: Server, variety: dict[str, str], query: str, words: str
) -> None:
    """What runs is stopped; every other record stays as it is."""
    meant = [variety[word] for word in words.split()]
    before = {call: await gateway.record(call) for call in variety.values()}
    assert await change(gateway, "cancel", query) == (len(meant), len(meant))
    after = {call: await gateway.record(call) for call in variety.values()}
    assert [call for call in before if before[call] != after[call]] == meant
    assert {after[call]["status"] for call in meant} <= {"cancelled"}
    if variety["running"] in meant:
        await function.until(lambda: function.cancelled == 1, "the end of what ran")
    assert function.running == (variety["running"] not in meant)


async def test_what_can_not_be_done_is_matched_but_not_done(gateway: Daemon, variety: dict[str, str]) -> None:
    """What has finished is not cancelled; what has not, or whose request is gone, not run again."""
    assert await change(gateway, "cancel", "status=success,delayed") == (5, 1)
    assert await change(gateway, "retry", "call_id=batch") == (3, 2)
    big = await submit(gateway, "it", bytes(100_000), X_Call_Id="big")
    await gateway.final(big)
    assert (await run_again(gateway, big)).status == 410
    assert await change(gateway, "retry", "call_id=big") == (1, 0)
    assert await change(gateway, "retry", "status=running&function=wait") == (1, 0)


async def test_pending_callbacks_are_cancelled_by_filter(
    daemon: StartDaemon, function: Server, sink: Server, refused: str
) -> None:
    """Their calls stay as they ended; the callback has failed, and is not sent again."""
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"\n[callback]\nmin_wait = "1h"\nmax_wait = "1h"')
    told = await submit(gateway, "it", X_Callback_Url=sink.url)
    await gateway.final(told)
    stuck = await submit(gateway, "it", X_Callback_Url=refused)
    await gateway.until(stuck, lambda record: record["callback"]["attempts"] == 1)
    assert await ids(gateway, "callback=pending") == [stuck]
    assert await change(gateway, "cancel", "callback=pending") == (1, 1)
    record = await gateway.record(stuck)
    assert (record["status"], record["callback"]["status"]) == ("success", "failed")
    assert (await gateway.record(told))["callback"]["status"] == "delivered"


DAY = 86_400


async def test_since_and_until_take_times_and_ages(
    daemon: StartDaemon, function: Server, functions: Functions, clock: WallClock
) -> None:
    """An RFC 3339 time, Unix seconds, or how long ago: they mean when a call came."""
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"\n[calls]\nkeep = "720h"', env=clock.env)
    calls = []
    for days in (0, 2, 8):
        clock.set(days * DAY)
        calls.append(await submit(gateway, "it"))
        await gateway.final(calls[-1])
    first, second, third = calls
    between = (datetime.now(UTC).timestamp() + DAY) // 1
    moment = datetime.fromtimestamp(between, UTC)
    zone = quote(moment.isoformat())
    expected = {
        "since=24h": [third],
        "until=24h": [first, second],
        "since=7d": [second, third],
        "until=7d": [first],
        "since=9d": calls,
        "since=7d&until=24h": [second],
        "since=24h&until=7d": [],
        f"since={moment:%Y-%m-%dT%H:%M:%SZ}": [second, third],
        f"until={moment:%Y-%m-%dT%H:%M:%SZ}": [first],
        f"since={zone}": [second, third],
        f"since={between:.0f}": [second, third],
        f"until={between:.0f}": [first],
        f"since={between:.0f}&until=1h": [second],
    }
    for query, found in expected.items():
        assert await ids(gateway, query) == found, query
    number = len(function.requests)
    assert await change(gateway, "retry", "since=7d&until=24h") == (1, 1)
    assert (await gateway.final(second))["status"] == "success"
    assert len(function.requests) == number + 1


BAD = {
    "": ["at least one", "status", "function", "queue", "call_id", "callback", "since", "until"],
    "nosuch=1": ["nosuch"],
    "status=error&nosuch=1": ["nosuch"],
    "status=error&limit=10": ["limit"],
    "status=error&cursor=10": ["cursor"],
    "limit=10": ["limit"],
    "status=": ["status"],
    "status=nosuch": ["status", "nosuch"],
    "status=error,nosuch": ["status", "nosuch"],
    "status=error&status=nosuch": ["status", "nosuch"],
    "status=error,": ["status"],
    "callback=sent": ["callback", "sent"],
    "function=": ["function"],
    "queue=": ["queue"],
    "call_id=": ["call_id"],
    "function=it&function=cat": ["function"],
    "since=": ["since"],
    "since=soon": ["since", "soon"],
    "since=-1h": ["since", "-1h"],
    "until=2030-01-31": ["until", "2030-01-31"],
    "until=2030-01-31T08:00:00": ["until", "2030-01-31T08:00:00"],
}


@pytest.mark.parametrize("action", ["retry", "cancel"])
async def test_a_selection_that_is_not_clear_is_refused(gateway: Daemon, variety: dict[str, str], action: str) -> None:
    """The answer names what is wrong, and nothing is done: no filter does not mean all calls."""
    before = await records(gateway)
    for query, words in BAD.items():
        reply = await ask(gateway.url, f"/system/calls/{action}?{query}", method="POST")
        assert_refused(reply, 400, *words)
    assert_refused(await ask(gateway.url, f"/system/calls/{action}", method="POST"), 400, "at least one")
    assert await records(gateway) == before


async def test_a_list_that_is_not_clear_is_refused(gateway: Daemon) -> None:
    """In the same words; there, limit and cursor have their meaning, and no filter means all."""
    for query, words in BAD.items():
        if query and "limit" not in query and "cursor" not in query:
            assert_refused(await ask(gateway.url, f"/system/calls?{query}"), 400, *words)


async def test_calls_that_are_named_like_the_routes_can_be_run_again(gateway: Daemon) -> None:
    """A caller may choose any call id."""
    for call_id in ("retry", "cancel"):
        await gateway.submit("cat", call_id.encode(), X_Call_Id=call_id)
        first = await gateway.final(call_id)
        assert (await run_again(gateway, call_id)).status == 202
        assert (await gateway.final(call_id))["completed_at"] > first["completed_at"]
        assert await log_of(gateway, call_id) == call_id.encode()


@pytest.mark.unmeasured
async def test_thousands_of_calls_are_cancelled_at_once(gateway: Daemon, function: Server) -> None:
    """All that match and no others; and they are queued again the same way."""
    many = 2000
    kept = [
        await submit(gateway, "cat", X_Delay="1h"),
        await submit(gateway, "it", X_Delay="1h", X_Queue="cats"),
    ]
    await asyncio.gather(*(gateway.submit("it", X_Delay="1h", X_Call_Id="many") for _ in range(many)))
    kept.append(await submit(gateway, "cat", X_Delay="1h", X_Call_Id="many"))
    assert await change(gateway, "cancel", "status=delayed&function=it&queue=faas-request") == (
        many,
        many,
    )
    assert await ids(gateway, "status=delayed") == kept
    assert await change(gateway, "cancel", "function=it&status=cancelled") == (many, 0)
    assert (await ask(gateway.url, "/system/queues/faas-request/pause", method="POST")).status == 200
    assert await change(gateway, "retry", "call_id=many&status=cancelled") == (many, many)
    queues = json.loads((await ask(gateway.url, "/system/queues")).body)["queues"]
    assert {queue["name"]: queue["depth"] for queue in queues}["faas-request"] == many
    assert function.requests == []


async def until_all_failed(gateway: Daemon) -> None:
    """Return when no call is left to do.

    Polls, because the outcome is stored after the last thing that the function sees of a call.
    """
    async with asyncio.timeout(PATIENCE):
        while True:
            if not await records(gateway, "status=queued,running"):
                return
            await asyncio.sleep(0.01)


@pytest.mark.unmeasured
async def test_what_fails_again_at_once_is_run_again_once(gateway: Daemon, function: Server) -> None:
    """It would match for ever; each of those that matched in the beginning gets its one run."""
    many = 600
    await asyncio.gather(*(gateway.submit("fail") for _ in range(many)))
    await function.wait_for(many)
    await until_all_failed(gateway)
    assert await change(gateway, "retry", "status=error") == (many, many)
    await function.wait_for(2 * many)
    await until_all_failed(gateway)
    assert len(function.requests) == 2 * many


# ---- the command line ----------------------------------------------------------------------------


async def command(gateway: Daemon, *words: str, code: int = 0, stdin: bytes = b"") -> Finished:
    """Run a command against the daemon; it has to end with this code."""
    result = await faasd(*words, "--url", gateway.url, stdin=stdin)
    assert result.code == code, result
    assert "Traceback" not in result.err
    return result


async def test_calls_retry_runs_exactly_those_again_that_its_filters_mean(gateway: Daemon, function: Server) -> None:
    """And says how many; not the successful call under the same call id, which came later."""
    for _ in range(2):
        await gateway.submit("fail", X_Call_Id="batch")
    await gateway.submit("cat", X_Call_Id="batch")
    before = await until_listed(gateway, "call_id=batch", 3)
    result = await command(gateway, "calls", "retry", "--status", "error", "--function", "fail")
    await function.wait_for(4)
    after = await until_listed(gateway, "call_id=batch", 3)
    changed = [record["function"] for record, was in zip(after, before, strict=True) if record != was]
    assert changed == ["fail", "fail"]
    assert (result.out, result.err) == ("2 of 2 matching calls queued again\n", "")


async def test_calls_cancel_cancels_exactly_those_that_its_filters_mean(
    gateway: Daemon, function: Server, functions: Functions
) -> None:
    """And says how many; not the running call under the same call id."""
    await gateway.submit("wait", X_Call_Id="batch")
    await function.wait_for(1)
    for _ in range(2):
        await gateway.submit("cat", X_Call_Id="batch", X_Delay="1h")
    result = await command(gateway, "calls", "cancel", "--status", "delayed", "--function", "cat")
    found = [(record["function"], record["status"]) for record in await records(gateway)]
    assert found == [("wait", "running"), ("cat", "cancelled"), ("cat", "cancelled")]
    assert (result.out, result.err) == ("2 of 2 matching calls cancelled\n", "")
    functions.gate.open()
    assert [record["status"] for record in await until_listed(gateway, "function=wait", 1)] == ["success"]


async def test_calls_list_has_exactly_those_that_its_filters_mean(gateway: Daemon) -> None:
    """With the id of each, which the other commands take."""
    failed = await submit(gateway, "fail", X_Call_Id="batch")
    delayed = await submit(gateway, "cat", X_Call_Id="batch", X_Delay="1h")
    await gateway.final(failed)

    async def listed(*words: str) -> list[str]:
        result = await command(gateway, "calls", "list", "--json", *words)
        return [call["id"] for call in json.loads(result.out)["calls"]]

    assert await listed() == [delayed, failed]
    assert await listed("--status", "error", "--function", "fail") == [failed]
    assert await listed("--status", "delayed", "--function", "cat") == [delayed]
    assert await listed("--queue", "cats") == [delayed]
    assert await listed("--status", "error", "--queue", "cats") == []
    shown = await command(gateway, "calls", "show", failed, "--json")
    assert json.loads(shown.out) == await gateway.record(failed)


@pytest.mark.parametrize(("action", "done"), [("cancel", "cancelled"), ("retry", "queued again")])
async def test_filters_that_nothing_matches_are_no_failure(gateway: Daemon, action: str, done: str) -> None:
    """A script that runs every night has nothing to do on some."""
    result = await command(gateway, "calls", action, "--function", "it")
    assert (result.out, result.err) == (f"0 of 0 matching calls {done}\n", "")


async def test_commands_say_how_many_of_those_that_match_it_was_done_for(gateway: Daemon) -> None:
    """What has finished can't be cancelled, what has not can't be run again."""
    await gateway.final(await submit(gateway, "cat"))
    await submit(gateway, "cat", X_Delay="1h")
    result = await command(gateway, "calls", "retry", "--queue", "cats")
    assert result.out == "1 of 2 matching calls queued again\n"
    await until_listed(gateway, "status=success", 1)
    result = await command(gateway, "calls", "cancel", "--function", "cat")
    assert result.out == "1 of 2 matching calls cancelled\n"


async def test_commands_take_own_ids(gateway: Daemon) -> None:
    """And mean exactly those calls; printed when done, as ever."""
    first, second = await twins(gateway, X_Delay="1h")
    result = await command(gateway, "calls", "cancel", first)
    assert (result.out, result.err) == (f"{first}\n", "")
    assert [record["status"] for record in await records(gateway)] == ["cancelled", "delayed"]
    assert (await command(gateway, "calls", "cancel", "-", stdin=second.encode())).out == f"{second}\n"
    assert (await command(gateway, "calls", "retry", first)).out == f"{first}\n"
    await gateway.final(first)
    assert (await command(gateway, "calls", "log", first)).out == "one"
    assert [record["status"] for record in await records(gateway)] == ["success", "cancelled"]


@pytest.mark.parametrize("action", ["cancel", "retry"])
async def test_commands_want_either_ids_or_filters(gateway: Daemon, action: str) -> None:
    """Neither is no selection, and both are none that is clear: nothing is done."""
    call = await submit(gateway, "cat", X_Delay="1h")
    for words in ([], [call, "--status", "delayed"], [call, "--function", "cat"]):
        result = await command(gateway, "calls", action, *words, code=2)
        assert (result.out, result.err.count("\n"), "--status" in result.err) == ("", 1, True), result
    assert (await gateway.record(call))["status"] == "delayed"
