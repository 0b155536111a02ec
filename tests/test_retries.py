"""The consumer: how often, when and in which order functions are called."""

import email.utils
import itertools
import json
import time

import pytest
from aiohttp import web
from conftest import Gate, Request, Server, StartDaemon, answer, ask, never

# The rules are measured in test_policy.py, and what follows them with everything else.
pytestmark = pytest.mark.unmeasured

# Where the passing of time is itself the thing, it is this much: long enough to tell from a busy machine's delays.
UNIT = 0.5


def settings(function: Server, more: str = "") -> str:
    """One function, `it`."""
    return f'[functions.it]\nurl = "{function.url}"\n{more}\n'


def failing(function: Server, times: int, status: int = 500, **headers: str) -> None:
    """Make the function fail this often and then succeed."""
    good, bad = answer(200, b"ok"), answer(status, b"bad", **headers)

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return await (bad if len(function.requests) <= times else good)(request, seen)

    function.behaviour = behaviour


# ---- retries ---------------------------------------------------------------------------------------------------


async def test_a_passing_failure_is_tried_again(daemon: StartDaemon, function: Server) -> None:
    """These codes may go away; the function sees in X-Retry how often it was tried before."""
    statuses = [408, 429, 500, 502, 503, 504, 200]

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return web.Response(status=statuses[len(function.requests) - 1])

    function.behaviour = behaviour
    gateway = await daemon(settings(function))
    record = await gateway.final(await gateway.submit("it", b"body"))
    assert (record["status"], record["attempts"], record["http_status"]) == ("success", 7, 200)
    assert [request.headers["X-Retry"] for request in function.requests] == ["0", "1", "2", "3", "4", "5", "6"]
    assert {(request.body, request.call_id) for request in function.requests} == {(b"body", record["call_id"])}


async def test_a_refusal_is_final(daemon: StartDaemon, function: Server) -> None:
    """Asking the same again would get the same answer."""
    gateway = await daemon(settings(function))
    for status in (400, 401, 403, 404, 409, 422, 501):
        function.behaviour = answer(status)
        record = await gateway.final(await gateway.submit("it"))
        assert (record["status"], record["attempts"], record["http_status"]) == ("error", 1, status)
    assert len(function.requests) == 7


async def test_a_redirect_is_not_followed(daemon: StartDaemon, function: Server) -> None:
    """The function's answer is the function's answer."""
    function.behaviour = answer(307, Location=f"{function.url}/there")
    gateway = await daemon(settings(function))
    record = await gateway.final(await gateway.submit("it"))
    assert (record["http_status"], record["attempts"]) == (307, 1)
    assert [request.target for request in function.requests] == ["/"]


async def test_attempts_are_limited(daemon: StartDaemon, function: Server) -> None:
    """`retry.attempts` counts the first one too."""
    function.behaviour = answer(500)
    gateway = await daemon(settings(function, "[retry]\nattempts = 3"))
    record = await gateway.final(await gateway.submit("it"))
    assert (record["status"], record["attempts"], record["max_attempts"]) == ("error", 3, 3)
    assert record["http_status"] == 500
    assert len(function.requests) == 3


async def test_a_function_can_have_its_own_policy(daemon: StartDaemon, function: Server) -> None:
    """`[functions.NAME.retry]`: other codes, other attempts."""
    function.behaviour = answer(418)
    gateway = await daemon(settings(function, "[functions.it.retry]\nattempts = 2\ncodes = [418]"))
    record = await gateway.final(await gateway.submit("it"))
    assert (record["status"], record["attempts"], record["http_status"]) == ("error", 2, 418)
    function.behaviour = answer(500)
    assert (await gateway.final(await gateway.submit("it")))["attempts"] == 1


async def test_annotations_set_the_policy_as_in_openfaas(daemon: StartDaemon, function: Server) -> None:
    """`com.openfaas.retry.*`; a value that is none is the default's."""
    function.behaviour = answer(418)
    gateway = await daemon(
        settings(
            function,
            "[functions.it.annotations]\n"
            '"com.openfaas.retry.attempts" = "2"\n'
            '"com.openfaas.retry.codes" = "418,419"\n'
            '"com.openfaas.retry.min_wait" = "soon"',
        )
    )
    record = await gateway.final(await gateway.submit("it"))
    assert (record["status"], record["attempts"], record["max_attempts"]) == ("error", 2, 2)
    await gateway.wait_for_log("com.openfaas.retry.min_wait")


async def test_a_broken_connection_is_tried_again(daemon: StartDaemon, function: Server) -> None:
    """A function that breaks off counts like a 502."""

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        if len(function.requests) == 1:
            assert request.transport is not None
            request.transport.abort()
        return web.Response()

    function.behaviour = behaviour
    gateway = await daemon(settings(function))
    record = await gateway.final(await gateway.submit("it"))
    assert (record["status"], record["attempts"]) == ("success", 2)


async def test_a_function_that_comes_up_late_is_called_then(daemon: StartDaemon, function: Server) -> None:
    """A refused connection is tried again."""
    await function.stop()
    gateway = await daemon(settings(function, "[retry]\nattempts = 1000"))
    call_id = await gateway.submit("it")
    record = await gateway.until(call_id, lambda record: record["attempts"] >= 2 and record["status"] == "delayed")
    assert record["error"]
    await function.start()
    assert (await gateway.final(call_id))["status"] == "success"


async def test_a_call_between_two_attempts_is_delayed(daemon: StartDaemon, function: Server) -> None:
    """The record says when the next attempt is due."""
    function.behaviour = answer(500)
    gateway = await daemon(settings(function, '[retry]\nmin_wait = "1h"\nmax_wait = "2h"'))
    call_id = await gateway.submit("it")
    record = await gateway.until(call_id, lambda record: record["status"] == "delayed")
    assert (record["attempts"], record["http_status"], record["completed_at"]) == (1, 500, None)
    assert record["due_at"] > record["created_at"]


async def test_a_timeout_ends_in_timeout(daemon: StartDaemon, function: Server) -> None:
    """The queue's `timeout` is for each attempt, and is retried like a 504."""
    function.behaviour = never
    gateway = await daemon(settings(function, '[retry]\nattempts = 2\n[queues.faas-request]\ntimeout = "1s"'))
    record = await gateway.final(await gateway.submit("it"))
    assert (record["status"], record["attempts"], record["http_status"]) == ("timeout", 2, 504)
    assert len(function.requests) == 2
    await function.until(lambda: function.cancelled == 2, "disconnects")


async def test_an_async_call_may_take_longer_than_a_sync_one(daemon: StartDaemon, function: Server) -> None:
    """`upstream_timeout` is for sync calls only."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function, '[gateway]\nupstream_timeout = "100ms"'))
    call_id = await gateway.submit("it")
    await function.wait_for(1)
    async with gateway.http.get(f"{gateway.url}/function/it") as response:
        assert response.status == 504
    gate.open()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"]) == ("success", 1)


async def test_retry_after_in_seconds_is_waited_for(daemon: StartDaemon, function: Server) -> None:
    """The function knows best when it is worth coming again."""
    failing(function, 1, 429, Retry_After="2")
    gateway = await daemon(settings(function))
    await gateway.final(await gateway.submit("it"))
    first, second = function.requests
    assert second.arrived - first.arrived >= 2


async def test_retry_after_as_a_date_is_waited_for(daemon: StartDaemon, function: Server) -> None:
    """The other form that HTTP has for it."""
    due = int(time.time()) + 3
    failing(function, 1, 503, Retry_After=email.utils.formatdate(due, usegmt=True))
    gateway = await daemon(settings(function))
    await gateway.final(await gateway.submit("it"))
    assert time.time() >= due


async def test_retry_after_never_shortens_the_least_wait(daemon: StartDaemon, function: Server) -> None:
    """A function that says "at once", or nonsense, is still given `min_wait`."""
    values = ["0", "-5", "soon", "", "1e9999", "Thu, 01 Jan 1970 00:00:00 GMT"]
    first: dict[str, float] = {}
    waits: dict[str, float] = {}

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        value = seen.body.decode()
        if value not in first:
            first[value] = seen.arrived
            return web.Response(status=503, headers={"Retry-After": value})
        waits[value] = seen.arrived - first[value]
        return web.Response()

    function.behaviour = behaviour
    limits = f'[retry]\nmin_wait = "{UNIT}s"\nmax_wait = "{UNIT}s"\n[queues.faas-request]\nmax_inflight = 10'
    gateway = await daemon(settings(function, limits))
    for call_id in [await gateway.submit("it", value.encode()) for value in values]:
        assert (await gateway.final(call_id))["status"] == "success"
    assert sorted(waits) == sorted(values)
    assert min(waits.values()) >= UNIT, waits


async def test_an_absurd_retry_after_does_no_harm(daemon: StartDaemon, function: Server) -> None:
    """No number or date of a function can break the record or the queue."""
    gateway = await daemon(settings(function))
    for value in ("9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT", "Fri, 31 Dec 99999 23:59:59 GMT"):
        failing(function, len(function.requests) + 1, 503, Retry_After=value)
        call_id = await gateway.submit("it")
        record = await gateway.until(call_id, lambda record: record["status"] in ("delayed", "success"))
        assert record["attempts"] >= 1
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"


async def test_the_wait_grows(daemon: StartDaemon, function: Server) -> None:
    """Exponential back-off: each wait is longer than the one before, up to the most."""
    failing(function, 3)
    gateway = await daemon(settings(function, '[retry]\nmin_wait = "200ms"\nmax_wait = "10s"\nbackoff = "exponential"'))
    await gateway.final(await gateway.submit("it"))
    times = [request.arrived for request in function.requests]
    waits = [after - before for before, after in itertools.pairwise(times)]
    for wait, least in zip(waits, (0.2, 0.4, 0.8), strict=True):
        assert wait >= least * 0.9, waits


# ---- queues ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3])
async def test_a_function_never_sees_more_calls_than_its_queue_allows(
    daemon: StartDaemon, function: Server, limit: int
) -> None:
    """`max_inflight` is used whole, and never exceeded."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function, f"[queues.faas-request]\nmax_inflight = {limit}"))
    calls = [await gateway.submit("it") for _ in range(20)]
    await function.wait_for(limit)
    gate.open()
    for call_id in calls:
        assert (await gateway.final(call_id))["status"] == "success"
    assert (function.most_running, len(function.requests)) == (limit, 20)


async def test_a_limit_of_all_daemons_is_that_of_the_only_one(daemon: StartDaemon, function: Server) -> None:
    """`max_inflight_global` counts where nobody shares the queue, too, and is what is shown."""
    function.behaviour = gate = Gate()
    limits = "[queues.faas-request]\nmax_inflight = 4\nmax_inflight_global = 2"
    gateway = await daemon(settings(function, limits))
    calls = [await gateway.submit("it") for _ in range(20)]
    await function.wait_for(2)
    queues = json.loads((await ask(gateway.url, "/system/queues")).body)["queues"]
    assert [(queue["inflight"], queue["max_inflight"]) for queue in queues[:1]] == [(2, 2)]
    gate.open()
    for call_id in calls:
        assert (await gateway.final(call_id))["status"] == "success"
    assert (function.most_running, len(function.requests)) == (2, 20)


async def test_four_at_once_by_default(daemon: StartDaemon, function: Server) -> None:
    """The default queue's `max_inflight`."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function))
    calls = [await gateway.submit("it") for _ in range(10)]
    await function.wait_for(4)
    gate.open()
    for call_id in calls:
        await gateway.final(call_id)
    assert function.most_running == 4


async def test_a_queue_that_is_only_named_runs_one_at_a_time(daemon: StartDaemon, function: Server) -> None:
    """It exists by its name; nothing runs beside anything in it."""
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"\nqueue = "slow-queue"')
    calls = [await gateway.submit("it") for _ in range(10)]
    records = [await gateway.final(call_id) for call_id in calls]
    assert {record["queue"] for record in records} == {"slow-queue"}
    assert function.most_running == 1


async def test_the_annotation_of_openfaas_names_the_queue(daemon: StartDaemon, function: Server) -> None:
    """`com.openfaas.queue`, as in a stack.yml."""
    gateway = await daemon(settings(function, '[functions.it.annotations]\n"com.openfaas.queue" = "slow-queue"'))
    assert (await gateway.final(await gateway.submit("it")))["queue"] == "slow-queue"


async def test_calls_run_in_the_order_in_which_they_came(daemon: StartDaemon, function: Server) -> None:
    """With one at a time, first come is first served."""
    gateway = await daemon(settings(function, "[queues.faas-request]\nmax_inflight = 1"))
    calls = [await gateway.submit("it") for _ in range(100)]
    await function.wait_for(100)
    assert function.call_ids == calls


async def test_a_stuck_queue_does_not_hold_up_another(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """A function that hangs fills its own queue only."""
    function.behaviour = gate = Gate()
    gateway = await daemon(
        f'[functions.stuck]\nurl = "{function.url}"\nqueue = "a"\n[functions.it]\nurl = "{sink.url}"\nqueue = "b"'
    )
    stuck = [await gateway.submit("stuck") for _ in range(20)]
    await function.wait_for(1)
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
    gate.open()
    for call_id in stuck:
        await gateway.final(call_id)


async def test_a_call_that_waits_for_its_retry_holds_no_slot(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """Back-off is waited out in the queue, not in a slot."""
    function.behaviour = answer(500)
    gateway = await daemon(
        f'[functions.bad]\nurl = "{function.url}"\n[functions.it]\nurl = "{sink.url}"\n'
        '[retry]\nmin_wait = "1h"\nmax_wait = "2h"\n[queues.faas-request]\nmax_inflight = 1'
    )
    bad = await gateway.submit("bad")
    await gateway.until(bad, lambda record: record["status"] == "delayed")
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
