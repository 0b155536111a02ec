"""Hosts that share a queue on NATS, as an outsider sees them: any gateway accepts, any host runs, everybody knows."""

import asyncio
import base64
import collections
import functools
import itertools
import json
import math
import os
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    PATIENCE,
    SECRET,
    Daemon,
    Gate,
    Reply,
    Server,
    answer,
    ask,
    assert_refused,
)
from jetstream import (
    RESERVES,
    STREAM,
    NatsServer,
    Network,
    StartHost,
    StartServer,
    ended,
    eventually,
    make_certificate,
    on_nats,
    one_function,
    post,
    submit_all,
)
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig
from nats_credentials import make_credentials
from operating import get

from faasd_async import (
    NatsCall,
    NatsConfig,
    NatsSubjects,
    key_token,
    nats_token,
    new_id,
    unpack_fields,
)

LONG = bool(os.environ.get("FAASD_ASYNC_LONG_TESTS"))  # the same with the sizes of the real world
CONFIG_ERROR = 78  # EX_CONFIG


async def queue_of(gateway: Daemon, name: str = "faas-request") -> dict[str, Any]:
    """What a gateway shows of a queue."""
    documents = await get(gateway, "/system/queues")
    rows = documents["queues"] if isinstance(documents, dict) else documents
    (row,) = (row for row in rows if row["name"] == name)
    shown: dict[str, Any] = row
    return shown


# ---- any gateway, any host -----------------------------------------------------------------------


async def test_a_call_that_one_gateway_accepts_runs_on_another_host(
    hosts: StartHost, function: Server, sink: Server
) -> None:
    """While the one has its hands full, with all that was sent: path, query, headers and the bytes of the body."""
    function.behaviour = sink.behaviour = gate = Gate()
    limits = "[queues.faas-request]\nmax_inflight = 1"
    here = await hosts(one_function(function, limits))
    await here.submit("it")
    await function.wait_for(1)
    await hosts(one_function(sink, limits))
    body = bytes(range(256)) * 10
    call_id = await here.submit("it/a%2Fb?c=%20d", body, X_Own="v")
    (request,) = await sink.wait_for(1)
    assert (request.call_id, request.target, request.body) == (call_id, "/a%2Fb?c=%20d", body)
    assert (request.headers["X-Own"], request.headers["X-Retry"]) == ("v", "0")
    gate.open()
    assert (await here.final(call_id))["status"] == "success"


async def test_a_host_leaves_calls_of_functions_that_it_does_not_know_to_others(
    hosts: StartHost, function: Server, sink: Server
) -> None:
    """As while a new one is rolled out: they end well, though it may claim some of them first."""
    retry = '[retry]\nmin_wait = "10ms"'
    knows = await hosts(one_function(function, retry))
    await hosts(one_function(sink, retry, "other"))
    assert await ended(knows, await submit_all(20, knows)) == {"success": 20}
    assert len(function.requests) == 20


async def test_a_function_that_is_back_in_the_configuration_gets_its_calls(hosts: StartHost, function: Server) -> None:
    """At once, though its host had left them to others until then."""
    retry = '[retry]\nmin_wait = "10ms"'
    gateway = await hosts(one_function(function, retry))
    await post(gateway, "/system/queues/faas-request/pause")
    call = await gateway.submit("it")
    for settings in (retry, one_function(function, retry)):
        first_line = len(gateway.lines)
        gateway.configure(settings)
        gateway.signal(signal.SIGHUP)
        await gateway.wait_for_log("configuration reloaded", first_line)
        await post(gateway, "/system/queues/faas-request/resume")
        await gateway.wait_for_log("does not exist at host")
    assert (await gateway.final(call))["status"] == "success"


async def test_calls_with_one_key_never_meet_on_two_hosts(hosts: StartHost, function: Server) -> None:
    """Whichever gateway has accepted them; all of them run."""
    one, other = [await hosts(one_function(function)) for _ in range(2)]
    calls = await submit_all(20, one, other, X_Concurrency_Key="meter-7")
    assert await ended(other, calls) == {"success": 20}
    assert (sorted(function.call_ids), function.most_running) == (sorted(calls), 1)


@pytest.mark.unmeasured
async def test_a_host_that_dies_leaves_its_keys_to_others(hosts: StartHost, function: Server, sink: Server) -> None:
    """When the lease of its call is over: that one runs again, and those that waited do."""
    lease = '[queues.faas-request]\nack_wait = "2s"'
    function.behaviour = gate = Gate()
    one = await hosts(one_function(function, lease))
    first = await one.submit("it", X_Concurrency_Key="k")
    await function.wait_for(1)
    other = await hosts(one_function(sink, lease))
    calls = [await other.submit("it", X_Concurrency_Key="k") for _ in range(3)]
    await one.kill()
    assert await ended(other, [first, *calls]) == {"success": 4}
    assert (sorted(sink.call_ids), sink.most_running) == (sorted([first, *calls]), 1)
    gate.open()


async def test_a_host_that_dies_leaves_its_callbacks_to_others(
    hosts: StartHost, function: Server, sink: Server
) -> None:
    """When the lease of the calls' queue is over, which theirs is no longer than."""
    sink.behaviour = gate = Gate()
    one = await hosts(one_function(function))
    call = await one.submit("it", X_Callback_Url=sink.url)
    await sink.wait_for(1)
    other = await hosts(one_function(function))
    await one.kill()
    await sink.wait_for(2)
    gate.open()
    assert (await other.final(call))["callback"]["status"] == "delivered"


async def test_every_host_knows_every_call(hosts: StartHost, function: Server) -> None:
    """Record, log and list are the same wherever one asks, from the 202 on."""
    function.behaviour = gate = Gate()
    one, other = [await hosts(one_function(function)) for _ in range(2)]
    calls = []
    for number in range(10):
        calls.append(await one.submit("it", b"x"))
        assert (await other.record(calls[-1]))["call_id"] == calls[-1], number
    gate.open()
    assert await ended(other, calls) == {"success": 10}
    listed = await get(other, "/system/calls?status=success&limit=100")
    assert listed == await get(one, "/system/calls?status=success&limit=100")
    assert [record["call_id"] for record in listed["calls"]] == calls[::-1]
    for gateway in (one, other):
        assert (await ask(gateway.url, f"/system/calls/{calls[0]}/log")).body == b"ok"


async def test_a_call_id_of_the_callers_own_is_known_everywhere(hosts: StartHost, function: Server) -> None:
    """Calls that share one are listed together, and stopped together."""
    one, other = [await hosts(one_function(function)) for _ in range(2)]
    for gateway in (one, other):
        assert await gateway.submit("it", X_Call_Id="batch*>./", X_Delay="1h")
    name = "batch*%3E.%2F"
    listed = await get(one, f"/system/calls?call_id={name}")
    assert [record["status"] for record in listed["calls"]] == ["delayed"] * 2
    assert (await ask(other.url, f"/async-function/{name}", method="DELETE")).status == 202
    listed = await get(one, f"/system/calls?call_id={name}")
    assert [record["status"] for record in listed["calls"]] == ["cancelled"] * 2


@pytest.mark.parametrize("state", ["delayed", "queued", "running"])
async def test_a_call_is_cancelled_from_another_host(hosts: StartHost, function: Server, state: str) -> None:
    """Whatever it is doing; it never runs again, and a running function's connection is closed."""
    function.behaviour = gate = Gate()
    limits = "[queues.faas-request]\nmax_inflight = 1"
    one, other = [await hosts(one_function(function, limits)) for _ in range(2)]
    if state == "queued":
        await submit_all(2, one)
        await function.wait_for(2)
    headers = {"X_Delay": "1h"} if state == "delayed" else {}
    call_id = await one.submit("it", b"", **headers)
    await one.until(call_id, lambda record: record["status"] == state)
    reply = await ask(other.url, f"/async-function/{call_id}", method="DELETE")
    assert reply.status == 202, reply
    if state == "running":
        await function.until(lambda: function.cancelled == 1, "the function's caller is gone")
    assert (await one.record(call_id))["status"] == "cancelled"
    gate.open()
    assert (await one.final(await one.submit("it")))["status"] == "success"
    assert (await ask(one.url, f"/async-function/{call_id}", method="DELETE")).status == 409
    assert function.call_ids.count(call_id) == (state == "running")


async def test_the_end_of_a_call_is_told_to_who_waits_at_another_host(hosts: StartHost, function: Server) -> None:
    """`wait=` ends with the call, not with its own time, which is longer than the test's patience."""
    function.behaviour = gate = Gate()
    one, other = [await hosts(one_function(function)) for _ in range(2)]
    call_id = await one.submit("it")
    waiting = [asyncio.create_task(ask(host.url, f"/system/calls/{call_id}?wait=1h")) for host in (one, other)]
    await function.wait_for(1)
    gate.open()
    for reply in await asyncio.wait_for(asyncio.gather(*waiting), PATIENCE):
        assert json.loads(reply.body)["status"] == "success"


@pytest.mark.unmeasured
async def test_a_pause_is_for_all_hosts_and_survives_them(
    hosts: StartHost, function: Server, server: NatsServer
) -> None:
    """Calls are accepted and wait, until some host says that the queue goes on."""
    one, other = [await hosts(one_function(function)) for _ in range(2)]
    assert (await post(one, "/system/queues/faas-request/pause")).status in (200, 202, 204)

    async def paused() -> bool:
        return bool((await queue_of(other))["paused"])

    await eventually(paused)
    calls = await submit_all(4, one, other)
    await server.restart()
    for host in (one, other):
        await host.terminate()
        await host.start()
    calls += await submit_all(2, one, other)
    assert {(await one.record(call_id))["status"] for call_id in calls} == {"queued"}
    assert function.requests == []
    assert (await post(other, "/system/queues/faas-request/resume")).status in (200, 202, 204)
    assert await ended(one, calls) == {"success": 6}


async def test_a_time_that_is_very_far_away_is_no_past(hosts: StartHost, function: Server) -> None:
    """Servers count in nanoseconds, which end in 2262: a call that is due later waits, and can be cancelled."""
    gateway = await hosts(one_function(function))
    far = "9999-12-31T23:59:59Z"
    late = await gateway.submit("it/late", X_Not_Before=far)
    await gateway.final(await gateway.submit("it/soon", X_Delay="1s"))
    assert (await gateway.record(late))["status"] == "delayed"
    assert [request.target for request in function.requests] == ["/soon"]
    assert (await ask(gateway.url, f"/async-function/{late}", method="DELETE")).status == 202
    assert (await gateway.record(late))["status"] == "cancelled"
    await post(gateway, "/system/queues/faas-request/pause")
    patient = await gateway.submit("it", X_Deadline=far)
    assert (await gateway.final(await gateway.submit("it", X_Deadline="1s")))["status"] == "timeout"
    assert (await gateway.record(patient))["status"] == "queued"


async def test_a_deadline_passes_in_a_paused_queue(hosts: StartHost, function: Server) -> None:
    """It ends in timeout and does not run."""
    gateway = await hosts(one_function(function))
    await post(gateway, "/system/queues/faas-request/pause")
    call_id = await gateway.submit("it", X_Deadline="200ms")
    assert (await gateway.final(call_id))["status"] == "timeout"
    assert function.requests == []


async def test_a_purge_is_for_what_every_gateway_accepted(hosts: StartHost, function: Server) -> None:
    """What waits is cancelled, delayed calls too; what runs goes on."""
    function.behaviour = gate = Gate()
    limits = "[queues.faas-request]\nmax_inflight = 1"
    one, other = [await hosts(one_function(function, limits)) for _ in range(2)]
    running = await submit_all(2, one, other)
    await function.wait_for(2)
    waiting = await submit_all(10, one, other) + await submit_all(4, one, other, X_Delay="1h")
    assert (await post(other, "/system/queues/faas-request/purge")).status == 200
    assert await ended(one, waiting) == {"cancelled": 14}
    gate.open()
    assert await ended(one, running) == {"success": 2}
    assert (await one.final(await one.submit("it")))["status"] == "success"
    assert len(function.requests) == 3


# ---- once ------------------------------------------------------------------------------------------------------


@pytest.mark.unmeasured
async def test_a_key_that_comes_to_two_gateways_at_once_is_one_call(hosts: StartHost, function: Server) -> None:
    """All get the same id, and the function runs once; with another body it is refused everywhere."""
    one, other = [await hosts(one_function(function)) for _ in range(2)]
    for number in range(10):
        key = f"order-{number}"
        calls = await submit_all(8, one, other, Idempotency_Key=key)
        assert len(set(calls)) == 1
        assert (await other.final(calls[0]))["status"] == "success"
        assert set(await submit_all(2, one, other, Idempotency_Key=key)) == set(calls)
        for gateway in (one, other):
            reply = await post(gateway, "/async-function/it", f"Idempotency-Key: {key}", body=SECRET)
            assert_refused(reply, 422)
    assert len(function.requests) == len(set(function.call_ids)) == 10


async def test_a_finished_call_is_run_again_from_another_host(hosts: StartHost, function: Server) -> None:
    """With its own request; of many who ask at once, at either host, one is told that it will be."""
    function.behaviour = answer(400)
    pair = [await hosts(one_function(function)) for _ in range(2)]
    calls = await submit_all(5, pair[0])
    assert await ended(pair[1], calls) == {"error": 5}
    function.behaviour = gate = Gate()
    for call_id in calls:
        asking = (post(host, f"/system/calls/{call_id}/retry") for host in pair * 4)
        replies = await asyncio.gather(*asking)
        assert sorted(reply.status for reply in replies) == [202, *[409] * 7]
    gate.open()
    for call_id in calls:
        await pair[0].until(call_id, lambda record: record["status"] == "success")
    assert collections.Counter(function.call_ids) == collections.Counter(calls * 2)
    assert {request.body for request in function.requests} == {b"x"}


async def test_matching_calls_are_changed_from_another_host(hosts: StartHost, function: Server) -> None:
    """Failed ones run again, delayed ones are cancelled, by filter."""
    function.behaviour = answer(400)
    one, other = [await hosts(one_function(function)) for _ in range(2)]
    failed = await submit_all(5, one)
    assert await ended(one, failed) == {"error": 5}
    delayed = await submit_all(5, one, X_Delay="1h")
    function.behaviour = answer(200)
    again = await post(other, "/system/calls/retry?status=error")
    assert json.loads(again.body) == {"matched": 5, "done": 5}
    gone = await post(other, "/system/calls/cancel?status=delayed")
    assert json.loads(gone.body) == {"matched": 5, "done": 5}
    assert await ended(one, delayed) == {"cancelled": 5}
    for call_id in failed:
        await one.until(call_id, lambda record: record["status"] == "success")
    assert len(function.requests) == 10


# ---- who is next -------------------------------------------------------------------------------------------------


@pytest.mark.unmeasured
async def test_a_global_limit_of_one_is_kept_by_two_hosts(hosts: StartHost, function: Server) -> None:
    """The function never sees two of their calls at once, and both hosts go on."""
    limits = "[queues.faas-request]\nmax_inflight = 4\nmax_inflight_global = 1"
    one, other = [await hosts(one_function(function, limits)) for _ in range(2)]
    calls = await submit_all(20, one, other)
    assert await ended(one, calls) == {"success": 20}
    assert function.most_running == 1
    assert len(function.requests) == 20


async def test_a_slot_of_a_dead_host_is_free_again(hosts: StartHost, function: Server) -> None:
    """It would otherwise hold up the queue for ever."""
    function.behaviour = gate = Gate()
    settings = one_function(function, "[queues.faas-request]\nmax_inflight_global = 1")
    one = await hosts(settings)
    calls = await submit_all(3, one)
    await function.wait_for(1)
    other = await hosts(settings)
    await one.kill()
    gate.open()
    assert await ended(other, calls) == {"success": 3}


async def test_each_host_keeps_its_own_limit(hosts: StartHost, function: Server, sink: Server) -> None:
    """`max_inflight` is of each daemon, and may differ."""
    function.behaviour = sink.behaviour = gate = Gate()
    one = await hosts(one_function(function, "[queues.faas-request]\nmax_inflight = 1"))
    await hosts(one_function(sink, "[queues.faas-request]\nmax_inflight = 3"))
    calls = await submit_all(10, one)
    await function.wait_for(1)
    await sink.wait_for(3)
    gate.open()
    assert await ended(one, calls) == {"success": 10}
    assert (function.most_running, sink.most_running) == (1, 3)


async def test_calls_that_back_off_do_not_hold_up_their_queue(hosts: StartHost, function: Server) -> None:
    """A hundred of them wait an hour for their next attempt; another call of the same function runs."""
    function.behaviour = answer(500)
    gateway = await hosts(one_function(function, '[retry]\nmin_wait = "1h"\nmax_wait = "1h"'))
    calls = await submit_all(100, gateway)
    await function.wait_for(100)
    function.behaviour = answer(200)
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
    assert (await gateway.record(calls[0]))["status"] == "delayed"


@pytest.mark.long
async def test_a_burst_of_one_function_does_not_hold_up_another(hosts: StartHost, function: Server) -> None:
    """Its calls take turns with those of the burst, though they came later."""
    function.behaviour = gate = Gate()
    settings = "".join(
        f'[functions.{name}]\nurl = "{function.url}/{name}"\nqueue = "line"\n' for name in ("burst", "idle")
    )
    gateway = await hosts(settings)
    calls = await submit_all(10_000 if LONG else 1_000, gateway, path="burst")
    await function.wait_for(1)
    late = await submit_all(3, gateway, path="idle")
    gate.open()
    await function.until(lambda: set(function.call_ids) >= set(late), "the other function's calls")
    assert max(map(function.call_ids.index, late)) <= 12
    await post(gateway, "/system/queues/line/purge")
    assert sum((await ended(gateway, calls)).values()) == len(calls)


# ---- leases --------------------------------------------------------------------------------------


@pytest.mark.long
async def test_a_function_that_runs_longer_than_a_lease_runs_once(hosts: StartHost, function: Server) -> None:
    """Its lease is renewed, whoever else would have room for it."""
    function.behaviour = gate = Gate()
    one, other = [await hosts(one_function(function)) for _ in range(2)]
    call_id = await one.submit("it")
    await function.wait_for(1)
    await asyncio.sleep(3)  # three leases; that time passes is what this is about
    gate.open()
    record = await other.final(call_id)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)
    assert len(function.requests) == 1


async def test_the_call_of_a_dead_host_runs_on_another(hosts: StartHost, function: Server, sink: Server) -> None:
    """Its record says that it was interrupted, and nothing of it is lost."""
    function.behaviour = Gate()
    one = await hosts(one_function(function))
    call_id = await one.submit("it/path", b"body")
    await function.wait_for(1)
    other = await hosts(one_function(sink))
    await one.kill()
    record = await other.final(call_id)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 2, 1)
    (request,) = sink.requests
    assert (request.target, request.body, request.headers["X-Retry"]) == ("/path", b"body", "1")


async def test_a_host_that_stops_hands_its_calls_over_at_once(hosts: StartHost, function: Server, sink: Server) -> None:
    """Nobody waits for the end of a lease, which is longer than the test's patience; it was not an attempt."""
    function.behaviour = Gate()
    settings = '[gateway]\ndrain_timeout = "0s"\n[queues.faas-request]\nack_wait = "1h"\nmax_inflight = 2'
    one = await hosts(one_function(function, settings))
    calls = await submit_all(4, one)
    await function.wait_for(2)
    other = await hosts(one_function(sink, settings.replace("max_inflight = 2", "max_inflight = 1")))
    await sink.wait_for(2)
    assert await one.terminate() == 0
    assert await ended(other, calls) == {"success": 4}
    records = [await other.record(call_id) for call_id in calls]
    assert {(record["attempts"], record["interrupted"]) for record in records} == {(1, 0)}


async def test_who_only_accepts_leaves_nothing_behind_when_it_stops(hosts: StartHost, function: Server) -> None:
    """What comes right after a stop is not sent to the one that is gone."""
    settings = one_function(function, '[queues.faas-request]\nack_wait = "1h"')
    one, other = [await hosts(settings) for _ in range(2)]
    assert await ended(one, await submit_all(4, one, other)) == {"success": 4}
    assert await one.terminate() == 0
    assert await ended(other, await submit_all(20, other)) == {"success": 20}


@pytest.mark.long
async def test_the_late_outcome_of_a_frozen_host_is_refused(hosts: StartHost, function: Server, sink: Server) -> None:
    """The one that took over ends the call; what the frozen one finds later changes nothing, and nobody is told."""
    receiver = Server()
    await receiver.start()
    function.behaviour = gate = Gate()
    one = await hosts(one_function(function))
    call_id = await one.submit("it", X_Callback_Url=receiver.url)
    await function.wait_for(1)
    sink.behaviour = answer(200, b"from the other")
    other = await hosts(one_function(sink))
    one.signal(signal.SIGSTOP)
    before = await other.final(call_id)
    assert (before["status"], before["interrupted"]) == ("success", 1)
    gate.open()
    one.signal(signal.SIGCONT)
    assert (await one.final(await one.submit("it")))["status"] == "success"
    assert await one.record(call_id) == await other.record(call_id) == before
    assert (await ask(one.url, f"/system/calls/{call_id}/log")).body == b"from the other"
    assert [request.body for request in receiver.requests] == [b"from the other"]
    await receiver.close()


async def test_the_callback_of_a_dead_host_is_sent_by_another(hosts: StartHost, function: Server, sink: Server) -> None:
    """The function does not run again for it."""
    sink.behaviour = answer(503)
    one = await hosts(one_function(function))
    call_id = await one.submit("it", X_Callback_Url=sink.url)
    await sink.wait_for(1)
    await one.kill()
    other = await hosts(one_function(function))
    sink.behaviour = answer(200)
    record = await other.final(call_id)
    assert (record["status"], record["callback"]["status"]) == ("success", "delivered")
    assert len(function.requests) == 1


# ---- what the server must grant ------------------------------------------------------------------


async def refusal(gateway: Daemon) -> str:
    """Why a daemon does not start: it has said so in its last line, and ended with EX_CONFIG."""
    await gateway.spawn()
    assert await gateway.ended() == CONFIG_ERROR, gateway.log
    return gateway.lines[-1]


EDIT = f"name another, or change it: nats stream edit {STREAM}"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"retention": "limits"}, '"workqueue": name another stream, as no server changes that'),
        ({"max_msgs": 12_345}, f"-1: {EDIT} --max-msgs=-1"),
        ({"max_bytes": 123_456}, f"-1: {EDIT} --max-bytes=-1"),
        ({"max_age": 3600 * 10**9}, f"0: {EDIT} --max-age=-1"),
        ({"max_msgs_per_subject": 5}, f"-1: {EDIT} --max-msgs-per-subject=-1"),
        ({"no_ack": True}, f"false: {EDIT} --ack"),
        ({"persist_mode": "async"}, "none: name another stream, as no server changes that"),
        ({"consumer_limits": {"max_ack_pending": 3}}, f"none: {EDIT} --interactive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_a_stream_that_would_not_keep_the_promise_is_refused(
    hosts: StartHost, server: NatsServer, change: dict[str, Any], wanted: str
) -> None:
    """In one line that says whose value is which, and how it is changed; the stream stays as its owner made it."""
    first = await hosts("")
    assert await first.terminate() == 0
    async with server.client() as client:

        async def api(verb: str, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
            request = json.dumps(config).encode() if config else b""
            reply = await client.request(f"$JS.API.STREAM.{verb}.{STREAM}", request, timeout=PATIENCE)
            answer: dict[str, Any] = json.loads(reply.data)
            assert "error" not in answer, answer
            return answer

        made = (await api("INFO"))["config"]
        await api("DELETE")
        theirs = (await api("CREATE", made | change))["config"]
        line = await refusal(await hosts("", start=False))
        ((name, value),) = change.items()
        told = f"nats.stream: stream {STREAM} on the server has {name} = {json.dumps(value)}"
        assert line.endswith(f"{told}, the queue needs {wanted}"), line
        assert (await api("INFO"))["config"] == theirs


async def consumer_api(client: Client, verb: str, name: str, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A request about a consumer, as an administrator's tool makes it; its configuration."""
    request = json.dumps({"stream_name": STREAM, "config": config}).encode() if config else b""
    reply = await client.request(f"$JS.API.CONSUMER.{verb}.{STREAM}.{name}", request, timeout=PATIENCE)
    answer: dict[str, Any] = json.loads(reply.data)
    assert "error" not in answer, answer
    shown: dict[str, Any] = answer.get("config", {})
    return shown


LANE = "work+faas-request+it=2Eopenfaas-fn"  # the consumer of the function `it`


async def test_a_consumer_that_would_keep_calls_back_is_refused(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """At the start by an exit, later by 503, with whose value is which; it stays as its owner has made it."""
    gateway = await hosts(one_function(function))
    await gateway.final(await gateway.submit("it"))
    told = f"consumer {LANE} of stream {STREAM} on the server has"
    how = f"have it made anew, nothing is lost: nats consumer rm {STREAM} {LANE}"
    async with server.client() as client:
        made = await consumer_api(client, "INFO", LANE)
        assert await gateway.terminate() == 0
        await consumer_api(client, "DELETE", LANE)
        theirs = await consumer_api(client, "DURABLE.CREATE", LANE, made | {"max_deliver": 3})
        line = await refusal(gateway)
        assert line.endswith(f"nats.stream: {told} max_deliver = 3, the queue needs -1: {how}")
        assert await consumer_api(client, "INFO", LANE) == theirs
        await consumer_api(client, "DELETE", LANE)
        await gateway.start()
        await gateway.final(await gateway.submit("it"))
        other = LANE.replace("it", "new")
        strange = made | {"name": other, "durable_name": other, "max_batch": 1}
        strange["filter_subject"] = made["filter_subject"].replace("it", "new")
        await consumer_api(client, "DURABLE.CREATE", other, strange)
        gateway.configure(on_nats(one_function(function, name="new"), server.url))
        gateway.signal(signal.SIGHUP)
        await gateway.wait_for_log("configuration reloaded")
        reply = await post(gateway, "/async-function/new")
        assert_refused(reply, 503, "max_batch = 1, the queue needs none", limit=2000)


async def test_a_lease_that_is_configured_anew_is_that_of_the_calls_there_are(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """After a restart and after a reload: nobody takes a call over before its time, nor long after it."""
    gateway = await hosts(one_function(function))
    await gateway.final(await gateway.submit("it", X_Delay="1ms"))

    def lease(text: str) -> str:
        return on_nats(one_function(function, f'[queues.faas-request]\nack_wait = "{text}"'), server.url)

    assert await gateway.terminate() == 0
    gateway.configure(lease("70s"))
    await gateway.start()
    async with server.client() as client:
        assert (await consumer_api(client, "INFO", LANE))["ack_wait"] == 70 * 10**9
        gateway.configure(lease("5s"))
        gateway.signal(signal.SIGHUP)
        await gateway.wait_for_log(f"consumer {LANE} had ack_wait 70s: it is 5s now")
        assert (await consumer_api(client, "INFO", LANE))["ack_wait"] == 5 * 10**9


async def test_other_replicas_and_a_consumer_that_is_in_the_way_are_named(hosts: StartHost, server: NatsServer) -> None:
    """With the key or the command that mends it, which then does."""
    first = await hosts("")
    assert await first.terminate() == 0
    line = await refusal(await hosts("[nats]\nreplicas = 3", start=False))
    how = f"set nats.replicas = 1, or change the stream: nats stream edit {STREAM} --replicas=3"
    told = f"nats.replicas: stream {STREAM} on the server has num_replicas = 1, the configuration says 3"
    assert line.endswith(f"{told}: {how}"), line
    name = "work+@deadlines+all"
    theirs = ConsumerConfig(ack_policy=AckPolicy.EXPLICIT, filter_subject="faas.work.@deadlines.>")
    async with server.jetstream() as jetstream:
        await jetstream.delete_consumer(STREAM, name)
        await jetstream.add_consumer(STREAM, theirs, durable_name="theirs")
        await first.start()
        told = await first.wait_for_log(f"consumer {name} of stream {STREAM} can't be made (")
        assert f"see who is in its place: nats consumer ls {STREAM}" in told
        await jetstream.delete_consumer(STREAM, "theirs")
    await eventually(functools.partial(is_ready, first))


def framed(head: object) -> bytes:
    """Bytes that begin like a message of ours."""
    text = json.dumps(head).encode()
    return len(text).to_bytes(4, "big") + text


ODD: dict[str, Any] = dict.fromkeys(("function", "namespace", "queue", "target", "call_id"), "it")
ODD |= {"id": new_id(), **dict.fromkeys(("start_time", "due_at", "max_attempts", "request_bytes"), 1)}
STRAYS = (
    b"",
    b"\x00\xff\xfe not ours",
    b"[" * 5000,
    b"[]",
    b"null",
    b'{"id": 1}',
    json.dumps(dict.fromkeys(("queue", "paused", "id", "after", "lane", "owner", "digest", "call_id"), (1,))).encode(),
    json.dumps(dict.fromkeys(("next_at", "runs", "boots"), "x")).encode(),
    framed(None),
    framed({"record": 0, "parts": [], "call": {}}),
    framed({"record": 0, "parts": [], "call": dict.fromkeys(NatsCall._fields[:10], "x")}),
    framed({"record": 0, "parts": [], "call": ODD | {"deadline_at": "x"}}),
    framed({"record": 0, "parts": [], "call": ODD | {"history": 1}}),
    framed({"record": 0, "parts": [], "call": ODD | {"history": [1]}}),
    framed({"record": 0, "parts": [], "call": ODD | {"failures": [[1]]}}),
    framed({"record": 0, "parts": [], "call": ODD | {"queue": "\ud800"}}),
    framed({"record": 0, "parts": [], "call": ODD | {"concurrency_key": "\ud800"}}),
    *(
        framed({"record": 0, "parts": [], "call": ODD | {name: number}})
        for name in ("start_time", "due_at", "completed_at")
        for number in (10**40, -(10**12), math.nan)
    ),
)
BUSY = """
[queues.shared]
max_inflight_global = 1
[functions.one]
url = "{url}"
queue = "shared"
[functions.rated]
url = "{url}"
rate = "100/1s"
[schedules.nightly]
cron = "0 3 * * *"
function = "it"
"""


async def publish_strays(jetstream: JetStreamContext, places: Sequence[str]) -> None:
    """All of them, one on top of the other, on each of these subjects."""
    await asyncio.gather(*(jetstream.publish(place, stray) for place in places for stray in STRAYS))


async def test_a_message_that_is_none_of_ours_holds_nothing_up(
    hosts: StartHost, server: NatsServer, function: Server, sink: Server
) -> None:
    """Whatever subject it is on, on top of what stands there or alone, at work and at a start."""
    settings = one_function(function, BUSY.format(url=function.url))
    first, second = [await hosts(settings) for _ in range(2)]
    calls: list[str] = []

    async def use(gateway: Daemon, *more: str) -> None:
        calls.append(await gateway.submit("it", b"x", X_Callback_Url=sink.url, X_Call_Id="mine", Idempotency_Key="k"))
        calls.append(await gateway.submit("it", X_Delay="50ms", X_Deadline="1h"))
        calls.extend([await gateway.submit("it", X_Concurrency_Key="key") for _ in range(2)])
        calls.extend([await gateway.submit(name) for name in ("one", "one", "rated")])
        for call in calls:
            assert (await gateway.final(call))["status"] == "success", gateway.log
        assert len((await get(gateway, "/system/calls?limit=1000"))["calls"]) >= len(set(calls))
        for path in ("/system/stats", "/system/queues", "/system/schedules", "/system/calls/mine", "/readyz"):
            assert (await ask(gateway.url, path)).status == 200, path
        for action in ("pause", "resume"):
            assert (await post(gateway, f"/system/schedules/nightly/{action}")).status == 200
            assert (await post(gateway, f"/system/queues/shared/{action}")).status == 200

    await use(first)
    subjects = NatsSubjects(NatsConfig())
    keys = {"namespace": "openfaas-fn", "concurrency_key": "key", "idempotency_key": "k"}
    keyed = unpack_fields(ODD | keys)
    own = new_id()
    places = [
        *(subjects.place(root, queue, lane, own) for root in ("work", "later")
          for queue, lane in (("faas-request", "it.openfaas-fn"), ("@callbacks", "host"), ("@deadlines", "all"))),
        *(f"faas.{root}.faas-request.{nats_token('it.openfaas-fn')}.x" for root in ("work", "later")),
        *(subjects.record_at("faas-request", nats_token("it.openfaas-fn"), name) for name in (own, calls[1])),
        *(f"faas.{root}.{rest}" for root in ("work", "later", "call") for rest in ("x", "x.y", "x.y.z.a.b.c")),
        *(subjects.key(keyed), subjects.call_id("mine", own), subjects.call_id("mine", "x")),
        *(subjects.slot("shared", 0), subjects.slot("shared", "x")),
        subjects.slot("@rate", nats_token("rated.openfaas-fn")),
        *(subjects.key_holder(key_token(keyed)), subjects.key_line(key_token(keyed), own)),
        *(subjects.pause("shared"), subjects.pause("x"), subjects.schedule("nightly")),
    ]  # fmt: skip
    async with server.jetstream() as jetstream:
        await publish_strays(jetstream, places)
        for place, stray in itertools.product((subjects.news, subjects.taken_over), STRAYS):
            await jetstream._nc.publish(place, stray)
        await use(second)
        await use(first)
        await publish_strays(jetstream, places)
    for host in (first, second):
        assert await host.terminate() == 0
    await server.restart()
    for host in (first, second):
        await host.start()
        await use(host)
    assert "failed in this program itself" not in first.log + second.log
    assert "is none of ours" in first.log + second.log
    assert (first.log + second.log).count(f"on {STREAM} is no call") == len(STRAYS)
    assert b"faasd_async_messages_set_aside_total 0.0" not in (await ask(first.url, "/metrics")).body


async def test_a_server_without_jetstream_is_refused(nats_server: StartServer, hosts: StartHost) -> None:
    """In one line that says what is missing."""
    server = await nats_server({"jetstream": {"enabled": False}})
    line = await refusal(await hosts("", server.url, start=False))
    assert "JetStream" in line


async def test_a_server_that_is_too_old_is_refused(network: Network, hosts: StartHost) -> None:
    """Before anything is made on it; the line has its version and the one that is needed."""
    network.version = "2.10.29"
    line = await refusal(await hosts("", network.url, start=False))
    assert "2.10.29" in line
    assert "2.12" in line


async def test_more_replicas_than_servers_are_refused(hosts: StartHost) -> None:
    """One server can't hold three."""
    gateway = await hosts("[nats]\nreplicas = 3", start=False)
    await gateway.spawn()
    assert await gateway.ended() not in (0, None)
    assert "replicas" in gateway.lines[-1]


async def test_a_stream_is_made_as_the_settings_say(hosts: StartHost, server: NatsServer, function: Server) -> None:
    """Names of stream and subjects are the owner's choice; other daemons on the server are not disturbed."""
    settings = '[nats]\nstream = "mine"\nprefix = "my"'
    gateway = await hosts(one_function(function, settings))
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
    async with server.jetstream() as jetstream:
        (stream,) = await jetstream.streams_info()
    assert stream.config.name == "mine"
    assert all(subject.startswith("my.") or subject == STREAM for subject in stream.config.subjects or ())


async def test_a_host_takes_the_first_server_that_is_there(
    nats_server: StartServer, hosts: StartHost, function: Server
) -> None:
    """Of those in `servers`; others of them may be away."""
    away, server = await nats_server(start=False), await nats_server()
    gateway = await hosts(one_function(function), away.url, server.url)
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"


async def test_a_file_with_credentials_lets_a_host_in(
    nats_server: StartServer, hosts: StartHost, function: Server, tmp_path: Path
) -> None:
    """A JWT that an operator's account has signed, and its seed; what is no such file is refused in one line."""
    settings, text = make_credentials()
    server = await nats_server(settings)
    path = tmp_path / "host.creds"
    path.write_text(text)
    keys = one_function(function, f'[nats]\ncreds_file = "{path}"')
    gateway = await hosts(keys, server.url)
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
    assert text.splitlines()[5] not in gateway.log
    path.write_text("no credentials")
    line = await refusal(await hosts(keys, server.url, start=False))
    assert "nats.creds_file" in line
    assert str(path) in line


async def test_a_login_that_is_refused_is_told_with_the_key_to_look_at(
    nats_server: StartServer, hosts: StartHost, function: Server, tmp_path: Path
) -> None:
    """In one line of the log, by server, and in /readyz; not what is in the files. Once more after it was right."""
    settings, _ = make_credentials()
    names = {"user": "host", "password": "s3cret", "token": "t0ken", "creds": make_credentials()[1]}
    for name, text in names.items():
        (tmp_path / name).write_text(text)
    right = {"authorization": {"user": "host", "password": "right"}}
    login = f'user_file = "{tmp_path}/user"\npassword_file = "{tmp_path}/password"'
    ways = {
        "nats.user_file and nats.password_file": (login, right),
        "nats.token_file": (f'token_file = "{tmp_path}/token"', {"authorization": {"token": "right"}}),
        "nats.creds_file": (f'creds_file = "{tmp_path}/creds"', settings),
        "nats.user_file and nats.password_file, nats.token_file or nats.creds_file: none is set": ("", right),
    }
    for key, (keys, granted) in ways.items():
        server = await nats_server(granted)
        gateway = await hosts(one_function(function, f"[nats]\n{keys}\npublish_timeout = '500ms'"), server.url)
        line = f"127.0.0.1:{server.port} refuses our login (Authorization Violation): look at {key}"
        await eventually(functools.partial(has_told, gateway, line, 1))  # The first try may take too long.
        reply = await ask(gateway.url, "/readyz")
        assert (reply.status, reply.body) == (503, f"the queue can't store: NATS is away: {line}\n".encode())
        for secret in ("s3cret", "t0ken", "right", names["creds"].splitlines()[1]):
            assert secret not in gateway.log
        if key != next(iter(ways)):
            await gateway.terminate()
            await server.kill()
            continue
        for password in ("s3cret", "right"):
            await server.kill()
            server.configure({"authorization": {"user": "host", "password": password}})
            await server.start()
            if password == "s3cret":
                await eventually(functools.partial(is_ready, gateway))
        await eventually(functools.partial(has_told, gateway, line, 2))


async def test_tls_that_fails_is_told_with_the_key_to_look_at(
    nats_server: StartServer, hosts: StartHost, function: Server, tmp_path: Path
) -> None:
    """No certificate of ours, another CA, another name; a file that is not there is a fault of the configuration."""
    root, other = [await make_certificate(tmp_path, name) for name in ("root", "other")]
    of_server, of_host = [await make_certificate(tmp_path, name, root) for name in ("server", "host")]
    files = {"cert_file": str(of_server.certificate), "key_file": str(of_server.key)}
    server = await nats_server(start=False)
    tls = {**files, "ca_file": str(root.certificate), "verify": True}
    server.configure({"listen": f"0.0.0.0:{server.port}", "tls": tls})
    await server.start()
    ours = f'tls_cert_file = "{of_host.certificate}"\ntls_key_file = "{of_host.key}"'
    ways = {
        "certificate required): look at nats.tls_cert_file and nats.tls_key_file": ("127.0.0.1", root, ""),
        "certificate): look at nats.tls_ca_file": ("127.0.0.1", other, ours),
        "look at nats.servers: the server's certificate is for other names": ("127.0.0.2", root, ours),
    }
    for told, (address, ca, keys) in ways.items():
        nats = f'[nats]\ntls_ca_file = "{ca.certificate}"\n{keys}\npublish_timeout = "500ms"'
        gateway = await hosts(one_function(function, nats), f"tls://{address}:{server.port}")
        told_lines = [line for line in gateway.lines if " ERROR NATS: no TLS" in line]
        line = told_lines[0].partition(" ERROR NATS: ")[2]
        assert len(told_lines) == 2 and told_lines[1].endswith(f" ERROR NATS: {line}: trying again"), told_lines
        assert line.startswith(f"no TLS with {address}:{server.port} (") and line.endswith(told), line
        assert line.encode() in (await ask(gateway.url, "/readyz")).body
    line = await refusal(await hosts(f'[nats]\ntls_ca_file = "{tmp_path}/none"', server.url, start=False))
    assert line.endswith(f"config.toml: nats.tls_ca_file: {tmp_path}/none: No such file or directory"), line


async def is_ready(gateway: Daemon) -> bool:
    """Whether it says that it can accept calls."""
    return (await ask(gateway.url, "/readyz")).status == 200


async def has_told(gateway: Daemon, line: str, times: int) -> bool:
    """Whether a line of the log has come so often."""
    return sum(told.endswith(f" ERROR NATS: {line}") for told in gateway.log.splitlines()) == times


async def test_a_password_a_token_or_a_certificate_lets_a_host_in(
    nats_server: StartServer, hosts: StartHost, function: Server, tmp_path: Path
) -> None:
    """Each as its own key in [nats], from a file."""
    root = await make_certificate(tmp_path, "root")
    of_server, of_host = [await make_certificate(tmp_path, name, root) for name in ("server", "host")]
    for name, text in {"user": "host\n", "password": "s3cret\n", "token": "t0ken\n"}.items():
        (tmp_path / name).write_text(text)
    files = {"cert_file": str(of_server.certificate), "key_file": str(of_server.key)}
    ways: dict[str, dict[str, Any]] = {
        f'user_file = "{tmp_path}/user"\npassword_file = "{tmp_path}/password"': {
            "authorization": {"user": "host", "password": "s3cret"}
        },
        f'token_file = "{tmp_path}/token"': {"authorization": {"token": "t0ken"}},
        f'tls_ca_file = "{root.certificate}"\ntls_cert_file = "{of_host.certificate}"\n'
        f'tls_key_file = "{of_host.key}"': {"tls": {**files, "ca_file": str(root.certificate), "verify": True}},
    }
    for keys, settings in ways.items():
        server = await nats_server(settings)
        url = server.url.replace("nats:", "tls:") if "tls" in settings else server.url
        gateway = await hosts(one_function(function, f"[nats]\n{keys}"), url)
        assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
        assert "s3cret" not in gateway.log
        assert "t0ken" not in gateway.log
        assert await gateway.terminate() == 0


async def test_a_password_that_is_wrong_is_named_as_the_reason(
    nats_server: StartServer, hosts: StartHost, function: Server, tmp_path: Path
) -> None:
    """At the start, whichever server is asked; the daemon goes on, because the server may be what is wrong."""
    users = {"authorization": {"user": "host", "password": "right"}}
    urls = [(await nats_server(users)).url for _ in range(3)]
    for name, text in (("user", "host"), ("password", "wrong")):
        (tmp_path / name).write_text(text)
    keys = f'[nats]\nuser_file = "{tmp_path}/user"\npassword_file = "{tmp_path}/password"'
    gateway = await hosts(one_function(function, keys), *urls)
    told = [line for line in gateway.lines if "ERROR NATS: 127" in line]
    assert all("refuses our login (Authorization Violation)" in line for line in told)
    (last,) = (line for line in told if line.endswith(": trying again"))
    assert sum(url.removeprefix("nats://") in last for url in urls) == 1
    assert len(told) == len({line[28:] for line in told}) <= 1 + len(urls), told


async def test_what_the_server_promises_about_a_power_cut_is_said(hosts: StartHost) -> None:
    """A server that syncs now and then can lose what it acknowledged: in the log, and where the ready look."""
    gateway = await hosts("")
    await gateway.wait_for_log("sync")
    reply = await ask(gateway.url, "/readyz")
    assert reply.status == 200
    assert b"sync" in reply.body
    stats = await get(gateway, "/system/stats")
    assert (stats["durable"], stats["guarantee"]) == (False, reply.body.decode().strip())


async def test_a_host_may_require_a_server_that_syncs(hosts: StartHost) -> None:
    """It does not start on one that does not, or does not say."""
    line = await refusal(await hosts("[nats]\nrequire_sync = true", start=False))
    assert "require_sync" in line


async def test_a_server_that_always_syncs_is_taken_at_its_word(
    nats_server: StartServer, hosts: StartHost, tmp_path: Path
) -> None:
    """It tells that to the system account, from which ours imports it, as the README has it."""
    asked = "$SYS.REQ.SERVER.PING.JSZ"
    for name in ("user", "password"):
        (tmp_path / name).write_text(name)
    ours = {"jetstream": "enabled", "users": [{"user": "user", "password": "password"}]}
    ours |= {"imports": [{"service": {"account": "SYS", "subject": asked}}]}
    accounts = {"SYS": {"exports": [{"service": asked}]}, "FAAS": ours}
    server = await nats_server(
        {"accounts": accounts, "system_account": "SYS", "jetstream": {"sync_interval": "always"}}
    )
    login = f'user_file = "{tmp_path}/user"\npassword_file = "{tmp_path}/password"'
    gateway = await hosts(f"[nats]\nrequire_sync = true\n{login}", server.url)
    assert (await ask(gateway.url, "/readyz")).body == b"ok\n"
    assert (await get(gateway, "/system/stats"))["durable"] is True
    await gateway.wait_for_log("sync_interval is always")


# ---- sizes ---------------------------------------------------------------------------------------


async def test_a_body_that_the_server_would_not_take_is_too_large(
    nats_server: StartServer, hosts: StartHost, function: Server
) -> None:
    """413 when the call is accepted; one that just fits with what goes with it arrives whole."""
    server = await nats_server({"max_payload": 100_000})
    gateway = await hosts(one_function(function), server.url)
    assert_refused(await post(gateway, "/async-function/it", body=SECRET * 10_000), 413)
    body = os.urandom(95_000)
    assert (await gateway.final(await gateway.submit("it", body)))["status"] == "success"
    assert [request.body for request in function.requests] == [body]


async def test_a_large_answer_does_not_keep_a_call_from_its_end(
    nats_server: StartServer, hosts: StartHost, function: Server, sink: Server
) -> None:
    """What is kept of the output is cut to what the server takes, and the call is a success all the same."""
    server = await nats_server({"max_payload": 50_000})
    function.behaviour = answer(200, os.urandom(60_000))
    gateway = await hosts(one_function(function), server.url)
    record = await gateway.final(await gateway.submit("it"))
    assert (record["status"], record["response_bytes"]) == ("success", 60_000)


async def test_a_consumer_that_somebody_else_has_made_is_left_alone(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """To look on, for instance: what runs goes on, a start succeeds, and so does what follows a server's restart."""
    gateway = await hosts(one_function(function))
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
    watcher = ConsumerConfig(durable_name="watcher", filter_subject="faas.call.>", ack_policy=AckPolicy.EXPLICIT)
    async with server.jetstream() as jetstream:
        await jetstream.add_consumer(STREAM, watcher)
    await gateway.kill()
    await gateway.start()
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
    await server.kill()
    await server.start()
    await gateway.wait_for_log("NATS is back")
    assert (await gateway.final(await gateway.submit("it", X_Delay="100ms")))["status"] == "success"
    assert "failed in this program itself" not in gateway.log
    async with server.jetstream() as jetstream:
        assert (await jetstream.consumer_info(STREAM, "watcher")).name == "watcher"


# ---- OpenFaaS's own messages ---------------------------------------------------------------------


async def test_the_messages_of_an_openfaas_gateway_are_taken_over(
    hosts: StartHost, server: NatsServer, function: Server, sink: Server
) -> None:
    """Method, path, query, headers, body and callback are what its gateway wrote; nonsense among them is set aside."""
    gateway = await hosts(one_function(function))
    message = {
        "Header": {"X-Call-Id": ["theirs"], "X-Own": ["a", "b"], "X-Start-Time": ["1700000000000000000"]},
        "Host": "gateway.example",
        "Body": base64.b64encode(bytes(range(256))).decode(),
        "Method": "POST",
        "Path": "/a/b",
        "QueryString": "c=d",
        "Function": "it",
        "QueueName": "faas-request",
        "Annotations": {"com.openfaas.retry.attempts": "1"},
        "CallbackUrl": {
            "Scheme": "http",
            "Opaque": "",
            "User": None,
            "Host": f"127.0.0.1:{sink.port}",
            "Path": "/back",
        },
    }
    async with server.client() as client:
        for data in (b"no JSON", b'{"Function": 5}', b"[]", json.dumps(message).encode()):
            await client.publish("faas-request", data)
        await client.flush()
    (request,) = await function.wait_for(1)
    assert (request.method, request.target, request.body) == ("POST", "/a/b?c=d", bytes(range(256)))
    assert (request.call_id, request.headers.getall("X-Own")) == ("theirs", ["a", "b"])
    (callback,) = await sink.wait_for(1)
    assert (callback.target, callback.call_id) == ("/back", "theirs")
    assert (await gateway.final("theirs"))["status"] == "success"
    assert "no JSON" not in gateway.log
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"


async def test_what_a_message_has_in_a_path_or_a_header_stays_there(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """A line break begins no header of the function's request, a blank ends no path; UTF-8 stays what it is."""
    gateway = await hosts(one_function(function))
    paths = ["/a b/\u00fc?#%2F", "/a HTTP/1.1\r\nX-Evil: 1\r\nX-B: "]
    headers = [{"X-Own": ["\u00fc\u20ac"], "X-Empty": [""]}, {}, {"X-A": ["b\r\nX-Evil: 1"]}, {"X-A\r\nX-Evil": ["1"]}]
    calls = [{"Function": "it", "Path": path, "QueryString": f"q={path}", "Header": headers[0]} for path in paths]
    calls += [{"Function": "it", "Header": one} for one in headers[2:]]
    async with server.client() as client:
        for call in calls:
            await client.request(STREAM, json.dumps(call).encode(), timeout=PATIENCE)
    await gateway.final(await gateway.submit("it/last"))
    seen = await function.wait_for(3)
    targets = ["/a%20b/%C3%BC%3F%23%2F?q=/a%20b/%C3%BC?#%2F", "/last"]
    assert [one.target for one in seen if "HTTP" not in one.target] == targets
    assert not any("X-Evil" in one.headers for one in seen)
    (own,) = {value for one in seen for name, value in one.raw_headers if name.lower() == b"x-own"}
    assert own.decode() == "\u00fc\u20ac"
    assert gateway.log.count("set aside") == 2


async def test_messages_that_are_no_calls_are_set_aside_told_and_counted(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """Among OpenFaaS's messages, and on the subjects of our own; what is behind them runs."""
    gateway = await hosts(one_function(function))
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
    async with server.client() as client:
        for data in (b"no JSON", b'{"Function": 5}', b'{"Function": "it", "Body": "*"}'):
            await client.publish(STREAM, data)
        await client.jetstream(timeout=PATIENCE).publish("faas.work.faas-request.it=2Eopenfaas-fn.x", b"no call")
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"

    def reasons() -> list[str]:
        return re.findall(r"(?:is no call|is none of ours): set aside: (.*)", gateway.log)

    async def told() -> bool:
        metrics = (await ask(gateway.url, "/metrics")).body
        return b"\nfaasd_async_messages_set_aside_total 4.0\n" in metrics and len(reasons()) == 4

    await eventually(told)
    assert sorted(reasons()) == [
        "it is not JSON",
        "it is not JSON as OpenFaaS's gateway writes it",
        "its Body is not base64",
        "its Function is no name of one",
    ]
    assert "no JSON" not in gateway.log
    assert (await server_messages(server)) == 2 + len(RESERVES)


async def server_messages(server: NatsServer) -> int:
    """How many messages the stream has."""
    async with server.jetstream() as jetstream:
        return (await jetstream.stream_info(STREAM)).state.messages


# ---- retention -----------------------------------------------------------------------------------


@pytest.mark.long
async def test_a_final_record_is_forgotten_after_its_time_everywhere(
    hosts: StartHost, function: Server, server: NatsServer
) -> None:
    """It is shown nowhere, its key can be used again, and the server deletes what it has."""
    settings = one_function(function, '[calls]\nkeep = "1s"')
    one, other = [await hosts(settings) for _ in range(2)]
    call_id = await one.submit("it", Idempotency_Key="k")
    await function.wait_for(1)

    async def forgotten() -> bool:
        replies = [await ask(host.url, f"/system/calls/{call_id}") for host in (one, other)]
        return {reply.status for reply in replies} == {404}

    await eventually(forgotten)
    async with server.jetstream() as jetstream:
        subjects = (await jetstream.stream_info(STREAM, subjects_filter=">")).state.subjects or {}
        assert [subjects.pop(reserve) for reserve in RESERVES]
        for subject in subjects:  # The server deletes the record later, as a fence around what may be left of its call.
            message = await jetstream.get_last_msg(STREAM, subject)
            assert re.fullmatch(r"\d+s", (message.headers or {})["Nats-TTL"]), subject
    assert (await get(other, "/system/calls"))["calls"] == []

    async def key_is_free() -> bool:
        return await other.submit("it", Idempotency_Key="k") != call_id

    await eventually(key_is_free)
    await function.wait_for(2)


async def test_a_queue_that_is_full_says_so_at_every_gateway(hosts: StartHost, function: Server) -> None:
    """429 with a time to come again; counts may be a second old."""
    settings = one_function(function, "[queues.faas-request]\nmax_pending = 5")
    one, other = [await hosts(settings) for _ in range(2)]
    await post(one, "/system/queues/faas-request/pause")
    for gateway in (one, other):

        async def refused(gateway: Daemon = gateway) -> Reply | None:
            reply = await post(gateway, "/async-function/it", "X-Delay: 1h")
            return reply if reply.status != 202 else None

        reply = await eventually(refused)
        assert_refused(reply, 429)
        assert int(reply.headers["Retry-After"]) > 0


# ---- all of it at once ---------------------------------------------------------------------------


@pytest.mark.unmeasured
async def test_a_mixed_load_over_three_hosts_runs_everything_once(
    hosts: StartHost, function: Server, sink: Server
) -> None:
    """Plain calls, delayed ones, such with a callback and such that fail first: each ends well, and is told of once."""
    failing = collections.Counter[str]()

    async def behave(request: Any, seen: Any) -> Any:
        failing[seen.call_id] += 1
        first = seen.target == "/flaky" and failing[seen.call_id] == 1
        return await answer(500 if first else 200)(request, seen)

    function.behaviour = behave
    three = [await hosts(one_function(function, "[queues.faas-request]\nmax_inflight = 8")) for _ in range(3)]
    plain = await submit_all(60, *three)
    delayed = await submit_all(30, *three, X_Delay="100ms")
    told = await submit_all(30, *three, X_Callback_Url=sink.url)
    flaky = await submit_all(30, *three, path="it/flaky")
    assert await ended(three[0], plain + delayed + told + flaky) == {"success": 150}
    assert collections.Counter(sink.call_ids) == collections.Counter(told)
    assert collections.Counter(function.call_ids) == collections.Counter(plain + delayed + told + flaky * 2)
