"""The clock of a small host is set while it runs: by NTP minutes after a start without a battery, or by hand.

A preloaded library gives the daemon, and nobody else, another wall clock; its monotonic clock stays real.
"""

import asyncio
from pathlib import Path

import pytest
from conftest import PATIENCE, Gate, Server, StartDaemon, answer, ask, preloaded

HOUR = 3600


class WallClock:
    """The wall clock of a daemon that was started with this `env`."""

    def __init__(self, library: Path, control: Path) -> None:
        self.env = {"LD_PRELOAD": str(library), "WALL_CLOCK": str(control)}
        self._control = control
        self.set(0)

    def set(self, offset_s: int) -> None:
        """So far from the true time."""
        new = self._control.with_suffix(".new")
        new.write_text(f"{offset_s:+d}\n")
        new.replace(self._control)


@pytest.fixture
async def clock(tmp_path: Path) -> WallClock:
    """A clock that is right until the test sets it."""
    return WallClock(await preloaded("wall_clock.c", tmp_path), tmp_path / "clock")


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
    gateway = await daemon(settings(function, '[calls]\nkeep = "30m"'), env=clock.env)
    old = await gateway.submit("it")
    await gateway.final(old)
    await gateway.terminate()
    clock.set(0)  # nobody sees it: a clock that is set forward while it runs takes the records with it
    await gateway.start()
    fresh = await gateway.submit("it")
    await gateway.final(fresh)
    await gateway.terminate()
    clock.set(-HOUR)
    await gateway.start()
    async with asyncio.timeout(PATIENCE):
        while (await ask(gateway.url, f"/system/calls/{old}")).status != 404:  # noqa: ASYNC110 — as a client does it
            await asyncio.sleep(0.01)
    assert (await gateway.record(fresh))["status"] == "success"
