"""Who is next: functions take turns, limits are shared, and nobody waits for what is not theirs."""

import asyncio
import collections
import signal
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from conftest import PATIENCE, Daemon, Gate, Reply, Request, Server, StartDaemon, ask, never


def functions(function: Server, *names: str, more: str = "") -> str:
    """Functions that share one server, which sees the name as the path, and one queue, `line`."""
    return "".join(f'[functions.{name}]\nurl = "{function.url}/{name}"\nqueue = "line"\n' for name in names) + more


async def submit_many(gateway: Daemon, name: str, number: int, **headers: str) -> list[str]:
    """Many calls of one function at once; their ids."""
    return await asyncio.gather(*(gateway.submit(name, b"", **headers) for _ in range(number)))


def order(function: Server) -> list[str]:
    """The names of the functions in the order in which they were called."""
    return [request.target.removeprefix("/") for request in function.requests]


async def finished(gateway: Daemon, calls: list[str]) -> collections.Counter[str]:
    """The states in which calls ended; one wait after the other, because all end about the same time."""
    states: collections.Counter[str] = collections.Counter()
    for call_id in calls:
        async with gateway.http.get(f"{gateway.url}/system/calls/{call_id}?wait=30s") as response:
            states[(await response.json())["status"]] += 1
    return states


async def called(function: Server, call_id: str) -> int:
    """Which request was that of a call, from 0, as soon as there is one."""
    await function.until(lambda: call_id in function.call_ids, f"call {call_id}")
    return function.call_ids.index(call_id)


async def stopped_by(function: Server, gate: Gate) -> None:
    """Wait until a request stands before the gate."""
    await function.until(lambda: gate.passing < 0, "the gate is reached")


# ---- turns -----------------------------------------------------------------------------------------------------


async def test_a_call_for_an_idle_function_does_not_wait_for_a_burst(daemon: StartDaemon, function: Server) -> None:
    """Behind 2,000 calls for another function in a queue that runs one at a time, it is next."""
    function.behaviour = gate = Gate()
    gateway = await daemon(functions(function, "burst", "idle"))
    await submit_many(gateway, "burst", 2000)
    await function.wait_for(1)
    call_id = await gateway.submit("idle")
    gate.open()
    assert await called(function, call_id) - 1 <= 2
    assert function.most_running == 1


@pytest.mark.unmeasured
async def test_an_idle_function_does_not_wait_once_the_burst_is_under_way(
    daemon: StartDaemon, function: Server
) -> None:
    """Each of its calls is next when it comes, whatever was served before."""
    gateway = await daemon(functions(function, "burst", "idle"))
    await submit_many(gateway, "burst", 600)
    for number in range(5):
        function.behaviour = gate = Gate(passing=20)
        await stopped_by(function, gate)
        seen = len(function.requests)
        call_id = await gateway.submit("idle")
        gate.open()
        assert await called(function, call_id) - seen <= 2, number


async def test_functions_take_turns(daemon: StartDaemon, function: Server) -> None:
    """Three bursts, one after the other, are served in step."""
    function.behaviour = gate = Gate()
    gateway = await daemon(functions(function, "a", "b", "c"))
    for name in ("a", "b", "c"):
        await submit_many(gateway, name, 50)
    gate.open()
    await function.wait_for(150)
    served: collections.Counter[str] = collections.Counter()
    for name in order(function)[:120]:
        served[name] += 1
        assert max(served.values()) - min(served[name] for name in "abc") <= 3, order(function)


async def test_the_calls_of_each_function_stay_in_order(daemon: StartDaemon, function: Server) -> None:
    """Turns are between functions; within one, first come is first served."""
    function.behaviour = gate = Gate()
    gateway = await daemon(functions(function, "a", "b"))
    calls = [await gateway.submit(name) for name in "aaabbaababbbaabb"]
    gate.open()
    await function.wait_for(len(calls))
    names = dict(zip(function.call_ids, order(function), strict=True))
    for name in "ab":
        expected = [call_id for call_id in calls if names[call_id] == name]
        assert [call_id for call_id in function.call_ids if names[call_id] == name] == expected


@pytest.mark.unmeasured
async def test_a_queue_need_not_be_fair(daemon: StartDaemon, function: Server) -> None:
    """With `fair = false` all its calls run in the order of their arrival."""
    function.behaviour = gate = Gate()
    gateway = await daemon(functions(function, "a", "b", more="[queues.line]\nfair = false"))
    calls = [await gateway.submit(name) for name in "aaaaaaaaaabbabbbbbbaba" * 10]
    gate.open()
    await function.wait_for(len(calls))
    assert function.call_ids == calls


@pytest.mark.unmeasured
async def test_a_function_that_fails_does_not_take_the_turns_of_others(daemon: StartDaemon, function: Server) -> None:
    """Its retries come when they are due, between the calls of the other one."""

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return web.Response(status=500 if seen.target == "/bad" else 200)

    function.behaviour = behaviour
    gateway = await daemon(functions(function, "bad", "good", more="[functions.bad.retry]\nattempts = 1000\n"))
    await submit_many(gateway, "bad", 100)
    calls = await submit_many(gateway, "good", 100)
    assert await finished(gateway, calls) == {"success": 100}


# ---- the limit of a function -----------------------------------------------------------------------------------

LIMIT = "[functions.it]\nurl = {url!r}\nmax_inflight = {limit}\n[queues.faas-request]\nmax_inflight = 20\n"


async def sync(gateway: Daemon, name: str = "it") -> Reply:
    """A sync call."""
    return await ask(gateway.url, f"/function/{name}", method="POST")


async def test_a_sync_call_over_the_limit_is_asked_to_come_again(daemon: StartDaemon, function: Server) -> None:
    """429 with Retry-After while as many queued calls run as may run at all; then it is let in."""
    function.behaviour = gate = Gate()
    gateway = await daemon(LIMIT.format(url=function.url, limit=2))
    calls = await submit_many(gateway, "it", 5)
    await function.wait_for(2)
    reply = await sync(gateway)
    assert reply.status == 429
    assert int(reply.headers["Retry-After"]) >= 1
    assert len(reply.body.splitlines()) == 1
    gate.open()
    assert await finished(gateway, calls) == {"success": 5}
    assert (await sync(gateway)).status == 200


async def test_sync_calls_count_against_the_limit_of_queued_ones(daemon: StartDaemon, function: Server) -> None:
    """A queued call waits for them, uncharged; a call of another function in the same queue does not."""
    function.behaviour = gate = Gate(passing=0)
    other = f'[functions.other]\nurl = "{function.url}/other"\n'
    gateway = await daemon(LIMIT.format(url=function.url, limit=2) + other)
    running = [asyncio.create_task(sync(gateway)) for _ in range(2)]
    await function.wait_for(2)
    call_id = await gateway.submit("it")
    gate.passing = 1
    assert (await gateway.final(await gateway.submit("other")))["status"] == "success"
    record = await gateway.record(call_id)
    assert (order(function).count(""), record["completed_at"]) == (2, None)
    gate.open()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"]) == ("success", 1)
    assert [(await reply).status for reply in running] == [200, 200]


async def test_the_limit_holds_for_sync_calls_of_a_function_with_a_rate(daemon: StartDaemon, function: Server) -> None:
    """Others come while the queue is asked whether a call may start."""
    function.behaviour = gate = Gate()
    gateway = await daemon(LIMIT.format(url=function.url, limit='1\nrate = "100/1s"'))
    calls = asyncio.as_completed([sync(gateway) for _ in range(5)], timeout=PATIENCE)
    assert [(await next(calls)).status for _ in range(4)] == [429] * 4
    gate.open()
    assert (await next(calls)).status == 200
    assert function.most_running == 1


@pytest.mark.unmeasured
async def test_the_limit_holds_under_mixed_load(daemon: StartDaemon, function: Server) -> None:
    """The function never sees more at once than it takes, all queued calls succeed, sync ones are served or refused."""

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        await asyncio.sleep(0.005)  # a function that takes its time
        return web.Response()

    function.behaviour = behaviour
    gateway = await daemon(LIMIT.format(url=function.url, limit=3))

    async def client() -> set[int]:
        return {(await sync(gateway)).status for _ in range(40)}

    clients = [asyncio.create_task(client()) for _ in range(5)]
    calls = await submit_many(gateway, "it", 150)
    assert await finished(gateway, calls) == {"success": 150}
    statuses = set.union(*await asyncio.gather(*clients))
    assert statuses <= {200, 429}
    assert 200 in statuses
    assert function.most_running == 3


async def test_the_limit_of_a_function_holds_across_queues(daemon: StartDaemon, function: Server) -> None:
    """Its calls in two queues share it; all of them run in the end."""
    function.behaviour = gate = Gate()
    gateway = await daemon(LIMIT.format(url=function.url, limit=2) + "[queues.second]\nmax_inflight = 20\n")
    calls = await submit_many(gateway, "it", 10) + await submit_many(gateway, "it", 10, X_Queue="second")
    await function.wait_for(2)
    gate.open()
    assert await finished(gateway, calls) == {"success": 20}
    assert function.most_running == 2


@pytest.mark.unmeasured
async def test_a_function_at_its_limit_does_not_hold_up_its_queue(daemon: StartDaemon, function: Server) -> None:
    """The slots that it may not use are used by others, however many of its calls wait in front."""
    gate = Gate()

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return await gate(request, seen) if seen.target == "/slow" else web.Response()

    function.behaviour = behaviour
    limits = "[functions.slow]\nmax_inflight = 1\n"
    gateway = await daemon(
        functions(function, "slow", "quick", more="[queues.line]\nmax_inflight = 4").replace(
            "[functions.slow]\n", limits
        )
    )
    slow = await submit_many(gateway, "slow", 100)
    quick = await submit_many(gateway, "quick", 100)
    assert await finished(gateway, quick) == {"success": 100}
    assert order(function).count("slow") == 1
    gate.open()
    assert await finished(gateway, slow) == {"success": 100}


# ---- back-pressure ---------------------------------------------------------------------------------------------


async def test_a_function_that_takes_few_at_a_time_is_given_few(daemon: StartDaemon, function: Server) -> None:
    """500 calls for a function that answers 429 above five at once: none fails, few are refused, five run at once."""
    answers: collections.Counter[int] = collections.Counter()
    most_accepted = 0

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        nonlocal most_accepted
        status = 429 if function.running > 5 else 200
        answers[status] += 1
        if status == 200:
            most_accepted = max(most_accepted, function.running)
            await asyncio.sleep(0.005)  # a function that takes its time
        return web.Response(status=status)

    function.behaviour = behaviour
    gateway = await daemon(functions(function, "it", more="[queues.line]\nmax_inflight = 64\nadaptive = true"))
    calls = await submit_many(gateway, "it", 500)
    assert await finished(gateway, calls) == {"success": 500}
    assert answers[200] == 500
    assert answers[429] < 60
    assert most_accepted == 5


@pytest.mark.unmeasured
async def test_back_pressure_of_one_function_is_not_felt_by_another(daemon: StartDaemon, function: Server) -> None:
    """An adaptive queue slows down calls of the function that said 429, and no others."""
    gate = Gate()

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return web.Response(status=429) if seen.target == "/busy" else await gate(request, seen)

    function.behaviour = behaviour
    more = "[queues.line]\nmax_inflight = 8\nadaptive = true\n[functions.busy.retry]\nattempts = 1000"
    gateway = await daemon(functions(function, "busy", "free", more=more))
    await submit_many(gateway, "busy", 50)
    gate.open()
    calls = await submit_many(gateway, "free", 200)
    assert await finished(gateway, calls) == {"success": 200}


# ---- callbacks -------------------------------------------------------------------------------------------------


@pytest.fixture
async def live() -> AsyncIterator[Server]:
    """Another receiver of callbacks."""
    server = Server()
    await server.start()
    yield server
    await server.close()


@pytest.mark.unmeasured
@pytest.mark.parametrize("slots", [2, 16])
async def test_a_receiver_that_never_answers_does_not_delay_another(
    daemon: StartDaemon, function: Server, sink: Server, live: Server, slots: int
) -> None:
    """It takes connections and keeps them; the callback to another host is delivered while it does."""
    sink.behaviour = never
    limits = f'[callback]\nmax_inflight = {slots}\ntimeout = "1h"\n'
    gateway = await daemon(functions(function, "it", more=limits))
    await submit_many(gateway, "it", 60, X_Callback_Url=sink.url)
    await sink.wait_for(1)
    other = live.url.replace("127.0.0.1", "localhost")
    for _ in range(3):
        call_id = await gateway.submit("it", X_Callback_Url=f"{other}/hook")
        assert (await gateway.final(call_id))["callback"]["status"] == "delivered"
    assert live.most_running == 1
    assert sink.running >= 1
    assert sink.cancelled == 0


# ---- rates -----------------------------------------------------------------------------------------------------


async def test_a_function_at_its_rate_waits_while_others_run(daemon: StartDaemon, function: Server) -> None:
    """Across kill -9, until a reload allows more; sync calls count, and are told when to come again."""
    gateway = await daemon(functions(function, "often", "seldom", more='rate = "1/1h"\n'))
    seldom = await submit_many(gateway, "seldom", 3)
    await function.wait_for(1)
    assert await finished(gateway, await submit_many(gateway, "often", 20)) == {"success": 20}
    await gateway.kill()
    await gateway.start()
    assert await finished(gateway, await submit_many(gateway, "often", 20)) == {"success": 20}
    assert order(function).count("seldom") == 1
    reply = await sync(gateway, "seldom")
    assert (reply.status, len(reply.body.splitlines())) == (429, 1)
    assert 3000 < int(reply.headers["Retry-After"]) <= 3600
    assert b"1/1h" in reply.body
    gateway.configure(functions(function, "often", "seldom"))
    gateway.signal(signal.SIGHUP)
    assert await finished(gateway, seldom) == {"success": 3}
    assert (await sync(gateway, "seldom")).status == 200
