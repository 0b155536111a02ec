"""The clock of a small host is set while it runs: by NTP minutes after a start without a battery, or by hand.

A preloaded library gives the daemon, and nobody else, another wall clock; its monotonic clock stays real.
"""

import asyncio
import time

import pytest
from conftest import Daemon, Gate, Server, StartDaemon, WallClock, answer, ask

pytestmark = pytest.mark.unmeasured  # nothing here but the clock is what other tests have not

HOUR = 3600
YEAR = 365 * 24 * HOUR

# What comes before the daemon's start: it cleans up all the time, and says so.
TIDY = """
import sys
faasd_async.HOUSEKEEPING_S = 0.05
prune = faasd_async.SqliteQueue.prune
async def told(self):
    number = await prune(self)
    print("pruned", number, file=sys.stderr, flush=True)
    return number
faasd_async.SqliteQueue.prune = told
"""


async def tidied(gateway: Daemon) -> None:
    """Wait until a daemon that began with TIDY has cleaned up once more, from beginning to end."""
    for _ in range(2):  # the first may have begun before
        await gateway.wait_for_log("pruned", len(gateway.lines))


def settings(function: Server, more: str = "") -> str:
    """One function, `it`, whose calls run one at a time."""
    return f'[functions.it]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 1\n{more}'


@pytest.mark.parametrize("step", [HOUR, -HOUR])
async def test_the_clock_neither_ends_nor_extends_what_runs(
    daemon: StartDaemon, function: Server, clock: WallClock, step: int
) -> None:
    """What runs is timed by the monotonic clock: what has time left ends well, what has none in timeout."""
    function.behaviour = gate = Gate()
    gateway = await daemon(
        f'[gateway]\nupstream_timeout = "1m"\n[functions.it]\nurl = "{function.url}"\n[functions.short]\n'
        f'url = "{function.url}"\nqueue = "short"\n[queues.short]\ntimeout = "1s"\n[retry]\nattempts = 1',
        env=clock.env,
    )
    patient, short = await gateway.submit("it"), await gateway.submit("short")
    sync = asyncio.create_task(ask(gateway.url, "/function/it"))
    waiting = asyncio.create_task(ask(gateway.url, f"/system/calls/{patient}?wait=25s"))
    await function.wait_for(3)
    clock.set(step)
    ended = await gateway.final(short)
    assert (ended["status"], ended["http_status"]) == ("timeout", 504)
    assert 0.9 < ended["duration_seconds"] < 20
    assert not sync.done()
    assert not waiting.done()
    gate.open()
    assert (await sync).status == 200
    assert b'"success"' in (await waiting).body
    assert 0.9 < (await gateway.final(patient))["duration_seconds"] < 20
    assert function.cancelled == 1


async def test_a_clock_that_is_set_forward_makes_delayed_calls_due(
    daemon: StartDaemon, function: Server, clock: WallClock
) -> None:
    """Those whose time has come by the new clock run, once; the others go on waiting."""
    gateway = await daemon(settings(function), env=clock.env)
    soon = await gateway.submit("it", X_Delay="30m")
    later = await gateway.submit("it", X_Delay="90m")
    assert (await gateway.record(soon))["status"] == "delayed"
    clock.set(HOUR)
    assert (await gateway.final(soon))["status"] == "success"
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
    assert (await gateway.record(later))["status"] == "delayed"
    assert function.call_ids.count(soon) == 1
    assert len(function.requests) == 2


@pytest.mark.parametrize("how", ["while it runs", "while it is down"])
async def test_a_clock_that_is_set_back_holds_nothing_up(
    daemon: StartDaemon, function: Server, sink: Server, clock: WallClock, how: str
) -> None:
    """What was due stays due, and so do retries and callbacks; what is delayed waits for its time, and runs once."""
    function.behaviour = gate = Gate(passing=1)
    sink.behaviour = answer(503)
    waits = 'min_wait = "10s"\nmax_wait = "10s"'
    more = f'[functions.flaky]\nurl = "{sink.url}"\nqueue = "other"\n[retry]\n{waits}\n[callback]\n{waits}'
    gateway = await daemon(settings(function, more), env=clock.env)
    told = await gateway.submit("it", X_Callback_Url=sink.url)
    late = await gateway.missed("it", X_Callback_Url=sink.url)
    again = await gateway.submit("flaky")
    for call_id in (told, late):
        await gateway.until(call_id, lambda record: record["callback"]["http_status"] == 503)
    await gateway.until(again, lambda record: (record["status"], record["http_status"]) == ("delayed", 503))
    queued = [await gateway.submit("it") for _ in range(3)]
    delayed = await gateway.submit("it", X_Delay="30m")
    await function.wait_for(2)
    if how == "while it is down":
        await gateway.kill()
    clock.set(-HOUR)
    if how == "while it is down":
        await gateway.start()
    sink.behaviour = answer(200)
    gate.open()
    for call_id in (*queued, again):
        assert (await gateway.final(call_id))["status"] == "success"
    for call_id in (told, late):
        assert (await gateway.final(call_id))["callback"]["status"] == "delivered"
    assert (await gateway.record(delayed))["status"] == "delayed"
    fresh = await gateway.submit("it", X_Callback_Url=sink.url)
    assert b'"success"' in (await ask(gateway.url, f"/system/calls/{fresh}?wait=25s")).body
    assert (await gateway.final(fresh))["callback"]["status"] == "delivered"
    assert delayed not in function.call_ids
    clock.set(0)
    assert (await gateway.record(delayed))["status"] == "delayed"
    clock.set(HOUR)
    assert (await gateway.final(delayed))["status"] == "success"
    killed = queued[:1] if how == "while it is down" else []
    assert sorted(function.call_ids) == sorted([told, *queued, *killed, fresh, delayed])


async def test_a_clock_that_is_set_back_deletes_no_fresh_record(
    daemon: StartDaemon, function: Server, clock: WallClock
) -> None:
    """Records from the future are kept, old ones go."""
    clock.set(-3 * HOUR)
    gateway = await daemon(settings(function), env=clock.env)
    old = await gateway.submit("it")
    await gateway.final(old)
    await gateway.terminate()
    clock.set(0)  # nobody sees it: a clock that is set forward while it runs takes the records with it
    await gateway.start()
    fresh = await gateway.submit("it")
    await gateway.final(fresh)
    await gateway.terminate()
    clock.set(-HOUR)
    gateway.configure(settings(function, '[calls]\nkeep = "30m"'))
    await gateway.start()
    await gateway.forgotten(old)
    assert (await gateway.record(fresh))["status"] == "success"


async def test_a_clock_that_is_set_forward_forgets_nothing(
    daemon: StartDaemon, function: Server, clock: WallClock
) -> None:
    """Minutes after a start without a battery: no record goes, no key, and no time to start that somebody gave."""
    clock.set(-YEAR)
    gateway = await daemon(settings(function, '[calls]\nkeep = "30m"'), env=clock.env, before=TIDY)
    done = await gateway.submit("it", b"body", Idempotency_Key="key")
    before = await gateway.final(done)
    function.behaviour = gate = Gate()
    running = await gateway.submit("it")
    await function.wait_for(2)
    lasting = await gateway.submit("it", X_Deadline="1h")
    dated = await gateway.submit("it", X_Deadline=str(int(time.time()) + HOUR))  # of somebody who knows the time
    clock.set(0)
    await tidied(gateway)
    assert (await gateway.record(done))["status"] == before["status"] == "success"
    assert await gateway.submit("it", b"body", Idempotency_Key="key") == done
    assert [(await gateway.record(call_id))["status"] for call_id in (lasting, dated)] == ["queued"] * 2
    gate.open()
    for call_id in (running, lasting, dated):
        assert (await gateway.final(call_id))["status"] == "success"
    assert function.call_ids == [done, running, lasting, dated]
    await gateway.terminate()
    await gateway.start()
    await tidied(gateway)
    for call_id in (done, running, lasting, dated):
        assert (await gateway.record(call_id))["status"] == "success"


async def test_a_clock_that_is_set_back_and_forth_forgets_nothing(
    daemon: StartDaemon, function: Server, clock: WallClock
) -> None:
    """What ended by the clock that was wrong is as young as it is."""
    gateway = await daemon(settings(function, '[calls]\nkeep = "30m"'), env=clock.env, before=TIDY)
    calls = []
    for offset in (0, -HOUR, 0, -2 * HOUR, HOUR):
        clock.set(offset)
        await tidied(gateway)
        calls.append(await gateway.submit("it"))
        await gateway.final(calls[-1])
    await tidied(gateway)
    for call_id in calls:
        assert (await gateway.record(call_id))["status"] == "success"


async def test_a_clock_that_is_set_forward_takes_nothing_from_a_deadline_that_has_run_already(
    daemon: StartDaemon, function: Server, clock: WallClock
) -> None:
    """Of 100 s some have passed, and then the clock is set forward by more than is left, and less than there was."""
    gateway = await daemon(settings(function), env=clock.env, before=TIDY)
    function.behaviour = gate = Gate()
    await gateway.submit("it")
    await function.wait_for(1)
    call_id = await gateway.submit("it", X_Deadline="100s")
    clock.set(50)  # such a small step is as good as time that has passed
    await tidied(gateway)
    clock.set(120)
    await tidied(gateway)
    assert (await gateway.record(call_id))["status"] == "queued"
    gate.open()
    assert (await gateway.final(call_id))["status"] == "success"
