"""Schedules as their users see them: the daemon has a wall clock that the test sets."""

import asyncio
import json
import os
import random
import re
import signal
import time
import tomllib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    PATIENCE,
    Daemon,
    Gate,
    Server,
    StartDaemon,
    WallClock,
    answer,
    ask,
    assert_refused,
    faasd,
    merge,
    never,
    to_toml,
)
from jetstream import NatsServer, StartHost, eventually, post
from operating import get
from provider import credential_files, running_provider

LONG = bool(os.environ.get("FAASD_ASYNC_LONG_TESTS"))
# A clock that is set, and room in a queue, are noticed at once; nothing outside of the test vouches for the clock.
BEFORE = """
from pathlib import Path
faasd_async.CLOCK_CHECK_S = 0.02
faasd_async.UNSURE_CHECK_S = 0.02
faasd_async.RETRY_STORE_S = 0.1
faasd_async.TIMESYNC = Path("no-such-file")
faasd_async.BOOT_ID = Path("boot")
"""


def unix(text: str) -> float:
    """Unix time of a time in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def begins(document: Mapping[str, Any], start: str) -> bool:
    """Whether this is the next instant of a schedule."""
    return any(at.startswith(start) for at in document["next"][:1])


class Host:
    """A machine with a clock that the test sets, and a daemon on it."""

    def __init__(self, clock: WallClock, daemon: StartDaemon, folder: Path, function: Server) -> None:
        self.gateway: Daemon
        self.before = BEFORE
        self.env: dict[str, str] = {}
        self.function = function
        self._clock = clock
        self._daemon = daemon
        self._folder = folder
        self.boot("first")

    def boot(self, name: str) -> None:
        """What tells this run of the machine from others."""
        (self._folder / "boot").write_text(name + "\n")

    def show(self, text: str, *, sure: bool = True) -> None:
        """Set the clock; `sure`: somebody vouches for it."""
        self._clock.set(round(unix(text) - time.time()), sure=sure)

    async def start(self, shown: str, **keys: Any) -> Daemon:
        """Start a daemon while the clock shows this, with one schedule, `one`."""
        self.show(shown)
        env = {**self._clock.env, **self.env}
        self.gateway = await self._daemon(self.settings(**keys), env=env, before=self.before)
        if "cron" in keys:
            await self.until(lambda document: document["next"] or document["paused"])
        return self.gateway

    def settings(self, more: str = "", **keys: Any) -> str:
        """A function, and a schedule with these keys; the tables of `more` are laid over that."""
        tables: dict[str, Any] = {"functions": {"it": {"url": self.function.url}}}
        if keys:
            tables["schedules"] = {"one": {"function": "it", **keys}}
        return to_toml(merge(tables, tomllib.loads(more)))

    async def restart(self, shown: str) -> None:
        """Stop the daemon, and start it at another time."""
        await self.gateway.terminate()
        self.show(shown)
        await self.gateway.start()

    async def reload(self, settings: str) -> None:
        """Have it read another file."""
        first_line = len(self.gateway.lines)
        self.gateway.configure(settings)
        self.gateway.signal(signal.SIGHUP)
        await self.gateway.wait_for_log("configuration reloaded", first_line)

    async def schedules(self) -> dict[str, dict[str, Any]]:
        """All schedules, by name."""
        reply = await ask(self.gateway.url, "/system/schedules")
        assert reply.status == 200, reply
        return {document["name"]: document for document in json.loads(reply.body)["schedules"]}

    async def until_schedules(
        self, condition: Callable[[dict[str, dict[str, Any]]], object]
    ) -> dict[str, dict[str, Any]]:
        """All of them, as soon as something holds for them."""
        deadline = time.monotonic() + PATIENCE
        while not condition(found := await self.schedules()):
            assert time.monotonic() < deadline, f"waited in vain: {found}\n{self.gateway.log}"
            await asyncio.sleep(0.01)
        return found

    async def document(self) -> dict[str, Any]:
        """The schedule."""
        return (await self.schedules())["one"]

    async def until(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """The schedule as soon as something holds for it. Polls: the daemon tells nobody."""
        return (await self.until_schedules(lambda found: condition(found["one"])))["one"]

    async def settled(self, number: int) -> list[tuple[str, str]]:
        """Instant and status of the runs, newest first, once there are so many and all have ended."""
        ended = ("success", "error", "cancelled", "skipped", "missed")
        document = await self.until(
            lambda document: len(document["runs"]) >= number and all(run["status"] in ended for run in document["runs"])
        )
        return [(run["scheduled_for"][:16], run["status"]) for run in document["runs"]]

    async def until_metric(self, name: str, value: float) -> None:
        """Wait until a metric of the schedule has this value: what has happened is counted once it is stored."""
        deadline = time.monotonic() + PATIENCE
        pattern = rf'^faasd_async_schedule_{name}{{schedule="one"}} (\S+)$'
        while True:
            text = (await ask(self.gateway.url, "/metrics")).body.decode()
            if [found for found in re.findall(pattern, text, re.MULTILINE) if abs(float(found) - value) < 0.01]:
                return
            assert time.monotonic() < deadline, text
            await asyncio.sleep(0.01)

    async def post(self, action: str, status: int = 200) -> dict[str, Any]:
        """Do something with the schedule."""
        reply = await ask(self.gateway.url, f"/system/schedules/one/{action}", method="POST")
        assert reply.status == status, reply
        return dict(json.loads(reply.body))


@pytest.fixture
def host(clock: WallClock, daemon: StartDaemon, tmp_path: Path, function: Server) -> Host:
    """A machine whose clock is right until the test sets it."""
    return Host(clock, daemon, tmp_path, function)


# ---- an instant ----------------------------------------------------------------------------------


async def test_a_schedule_has_its_function_called_at_its_time(host: Host) -> None:
    """With all that the file says; record, list, metrics and log say whose call it is."""
    gateway = await host.start(
        "2026-03-01T11:59:30",
        cron="0 12 * * *",
        timezone="Europe/London",
        method="PUT",
        path="/reports?kind=daily",
        headers={"X-Kind": "daily", "Content-Type": "application/json"},
        body='{"a": 1}',
    )
    document = await host.document()
    assert document["next"][:2] == ["2026-03-01T12:00:00.000000Z", "2026-03-02T12:00:00.000000Z"]
    assert document["words"] == "At 12:00 every day (Europe/London)"
    assert (document["runs"], document["missed"], document["last_success_at"]) == ([], 0, None)
    host.show("2026-03-01T12:00:05")
    (request,) = await host.function.wait_for(1)
    assert (request.method, request.target, request.body) == ("PUT", "/reports?kind=daily", b'{"a": 1}')
    sent = {name: request.headers[name] for name in ("X-Schedule", "X-Scheduled-For", "X-Kind", "Content-Type")}
    assert list(sent.values()) == ["one", "2026-03-01T12:00:00.000000Z", "daily", "application/json"]
    record = await gateway.final(request.call_id)
    assert (record["schedule"], record["scheduled_for"]) == ("one", "2026-03-01T12:00:00.000000Z")
    assert await host.settled(1) == [("2026-03-01T12:00", "success")]
    document = await host.until(lambda document: document["last_success_at"])
    assert document["runs"][0]["id"] == record["id"]
    assert document["next"][0] == "2026-03-02T12:00:00.000000Z"
    await gateway.submit("it")
    listed = json.loads((await ask(gateway.url, "/system/calls?schedule=one")).body)["calls"]
    assert [call["id"] for call in listed] == [record["id"]]
    last = datetime.fromisoformat(document["last_success_at"]).timestamp()
    await host.until_metric("last_success_seconds", last)
    await host.until_metric("missed_total", 0)
    line = await gateway.wait_for_log("schedule queued")
    assert f"schedule=one scheduled_for=2026-03-01T12:00:00.000000Z call_id={record['id']}" in line


async def test_a_schedule_that_is_new_begins_with_its_next_instant(host: Host) -> None:
    """What would have been before it was there is nobody's."""
    await host.start("2026-03-01T12:00:10", cron="* * * * *")
    host.show("2026-03-01T12:01:10")
    assert await host.settled(1) == [("2026-03-01T12:01", "success")]


async def test_control_headers_of_a_schedule_are_heeded(host: Host, sink: Server) -> None:
    """As those of any caller: the result goes to a callback URL."""
    host.function.behaviour = answer(200, b"21 C", Content_Type="text/plain")
    await host.start("2026-03-01T12:00:30", cron="* * * * *", headers={"X-Callback-Url": f"{sink.url}/state"})
    host.show("2026-03-01T12:01:05")
    (told,) = await sink.wait_for(1)
    assert (told.target, told.body, told.headers["Content-Type"]) == ("/state", b"21 C", "text/plain")
    assert told.headers["X-Function-Name"] == "it"


# ---- what was missed -----------------------------------------------------------------------------


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("keys", "shown", "runs", "missed"),
    [
        ({}, "2026-03-04T12:30", [("2026-03-04T12:00", "success"), ("2026-03-03T12:00", "missed")], 2),
        ({}, "2026-03-04T13:30", [("2026-03-04T12:00", "missed")], 3),
        ({"catch_up": "none"}, "2026-03-04T12:30", [("2026-03-04T12:00", "missed")], 3),
        (
            {"catch_up": "all", "max_late": "2d"},
            "2026-03-04T11:00",
            [("2026-03-03T12:00", "success"), ("2026-03-02T12:00", "success")],
            0,
        ),
    ],
)
async def test_what_a_daemon_that_was_down_has_missed_is_caught_up_with(
    host: Host, keys: Mapping[str, Any], shown: str, runs: list[tuple[str, str]], missed: int
) -> None:
    """As much of it as the file says; the rest is counted, and shown."""
    await host.start("2026-03-01T12:30", cron="0 12 * * *", **keys)
    await host.restart(shown)
    assert await host.settled(len(runs)) == runs
    assert (await host.document())["missed"] == missed
    await host.until_metric("missed_total", missed)
    late = [request.headers["X-Scheduled-For"][:16] for request in host.function.requests]
    assert sorted(late) == sorted(at for at, status in runs if status == "success")


async def test_a_full_queue_makes_a_schedule_wait(host: Host) -> None:
    """Its instant is not lost."""
    gateway = await host.start("2026-03-01T12:00:30", cron="* * * * *", queue="small")
    await host.reload(host.settings("[queues.small]\nmax_pending = 1", cron="* * * * *", queue="small"))
    await ask(gateway.url, "/system/queues/small/pause", method="POST")
    first = await gateway.submit("it", X_Queue="small")
    host.show("2026-03-01T12:01:05")
    line = await gateway.wait_for_log("schedule waits")
    assert "queue small is full" in line
    await ask(gateway.url, "/system/queues/small/resume", method="POST")
    await gateway.final(first)
    assert await host.settled(1) == [("2026-03-01T12:01", "success")]


# ---- overlap -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        ("skip", [("2026-03-01T12:02", "skipped"), ("2026-03-01T12:01", "success")]),
        ("queue", [("2026-03-01T12:02", "success"), ("2026-03-01T12:01", "success")]),
        ("replace", [("2026-03-01T12:02", "success"), ("2026-03-01T12:01", "cancelled")]),
    ],
)
async def test_an_instant_meets_a_call_that_has_not_ended(
    host: Host, overlap: str, expected: list[tuple[str, str]]
) -> None:
    """One of the schedule itself: those of others do not matter."""
    host.function.behaviour = gate = Gate()
    gateway = await host.start("2026-03-01T12:00:30", cron="* * * * *", overlap=overlap)
    await gateway.submit("it")
    await host.function.wait_for(1)
    host.show("2026-03-01T12:01:05")
    await host.function.wait_for(2)
    host.show("2026-03-01T12:02:05")
    await host.until(lambda document: len(document["runs"]) == 2)
    gate.open()
    assert await host.settled(2) == expected


async def test_a_call_that_is_run_again_by_hand_counts(host: Host) -> None:
    """While it runs, and as what it ends in then."""
    host.function.behaviour = answer(400)
    await host.start("2026-03-01T12:00:30", cron="* * * * *")
    host.show("2026-03-01T12:01:05")
    assert await host.settled(1) == [("2026-03-01T12:01", "error")]
    await host.until(lambda document: document["runs"][0]["error"])
    host.function.behaviour = gate = Gate()
    (run,) = (await host.document())["runs"]
    await ask(host.gateway.url, f"/system/calls/{run['id']}/retry", method="POST")
    await host.function.wait_for(2)
    host.show("2026-03-01T12:02:05")
    await host.until(lambda document: len(document["runs"]) == 2)
    gate.open()
    assert await host.settled(2) == [("2026-03-01T12:02", "skipped"), ("2026-03-01T12:01", "success")]
    await host.until(lambda document: document["last_success_at"])


# ---- what people do ------------------------------------------------------------------------------


async def test_a_paused_schedule_rests_until_it_is_resumed(host: Host) -> None:
    """Also over a restart. What was not run meanwhile is not missed, and nobody catches up with it."""
    await host.start("2026-03-01T12:00:30", cron="* * * * *")
    assert await host.post("pause") == {"schedule": "one", "paused": True}
    await host.restart("2026-03-01T12:20:30")
    document = await host.until(lambda document: document["paused"])
    assert document["next"] == []
    call_id = (await host.post("run", 202))["call_id"]
    assert (await host.gateway.final(call_id))["schedule"] == "one"
    assert await host.settled(1) == [("2026-03-01T12:20", "success")]
    assert await host.post("resume") == {"schedule": "one", "paused": False}
    host.show("2026-03-01T12:21:05")
    assert await host.settled(2) == [("2026-03-01T12:21", "success"), ("2026-03-01T12:20", "success")]
    assert (await host.document())["missed"] == 0


async def test_a_schedule_that_is_not_there_is_told(host: Host) -> None:
    """With the names of those that are; and what can be done with one."""
    gateway = await host.start("2026-03-01T12:00:30", cron="* * * * *")
    reply = await ask(gateway.url, "/system/schedules/other/run", method="POST")
    assert_refused(reply, 404, "no such schedule; there are one")
    assert (await ask(gateway.url, "/system/schedules/one/jump", method="POST")).status == 404
    assert (await ask(gateway.url, "/system/schedules/one/run")).status == 405


async def test_an_edited_expression_is_counted_from_then_on(host: Host) -> None:
    """Also when the daemon was down while it was edited; other keys change nothing."""
    gateway = await host.start("2026-03-01T12:00:30", cron="0 * * * *")
    await host.reload(host.settings(cron="* * * * *"))
    await host.until(lambda document: begins(document, "2026-03-01T12:01"))
    host.show("2026-03-01T12:01:05")
    assert await host.settled(1) == [("2026-03-01T12:01", "success")]
    await gateway.terminate()
    gateway.configure(host.settings(cron="*/10 * * * *"))
    host.show("2026-03-01T12:15:30")
    await gateway.start()
    await host.until(lambda document: begins(document, "2026-03-01T12:20"))
    await gateway.terminate()
    gateway.configure(host.settings(cron="*/10 * * * *", body="more"))
    host.show("2026-03-01T12:25:30")
    await gateway.start()
    assert await host.settled(2) == [("2026-03-01T12:20", "success"), ("2026-03-01T12:01", "success")]


async def test_a_schedule_that_is_removed_or_disabled_fires_no_more(host: Host) -> None:
    """Its calls stay, and so does what is known of it."""
    gateway = await host.start("2026-03-01T12:00:30", cron="* * * * *")
    host.show("2026-03-01T12:01:05")
    await host.settled(1)
    await host.reload(host.settings(cron="* * * * *", enabled=False))
    document = await host.until(lambda document: not document["enabled"])
    assert document["next"] == []
    host.show("2026-03-01T12:30:30")
    await host.reload(host.settings(cron="* * * * *"))
    await host.until(lambda document: document["next"])
    await host.reload(host.settings())
    assert await host.schedules() == {}
    listed = json.loads((await ask(gateway.url, "/system/calls?schedule=one")).body)["calls"]
    assert [call["scheduled_for"][:16] for call in listed] == ["2026-03-01T12:01"]
    await host.reload(host.settings(cron="* * * * *"))
    assert await host.settled(1) == [("2026-03-01T12:01", "success")]
    assert (await host.document())["missed"] == 0


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_schedule_that_comes_back_has_missed_nothing(host: Host, restarted: bool) -> None:
    """Nobody expects an instant to fire that passed while it was not there, though it is not too late for it."""
    gateway = await host.start("2026-03-01T12:00:30", cron="* * * * *")
    host.show("2026-03-01T12:01:05")
    await host.settled(1)
    other = host.settings('[schedules.other]\nfunction = "it"\ncron = "@yearly"')
    for shown, settings in (("12:01:30", other), ("12:30:30", host.settings(cron="* * * * *"))):
        if restarted:
            await gateway.terminate()
            gateway.configure(settings)
            host.show(f"2026-03-01T{shown}")
            await gateway.start()
        else:
            host.show(f"2026-03-01T{shown}")
            await host.reload(settings)
        await host.until_schedules(lambda found: all(document["next"] for document in found.values()))
    await host.until(lambda document: begins(document, "2026-03-01T12:31"))
    host.show("2026-03-01T12:31:05")
    assert await host.settled(2) == [("2026-03-01T12:31", "success"), ("2026-03-01T12:01", "success")]
    assert (await host.document())["missed"] == 0


# ---- clocks --------------------------------------------------------------------------------------


async def test_a_clock_that_is_set_back_fires_nothing_twice(host: Host) -> None:
    """By a few minutes: what was fired is over. By a year: it had been wrong."""
    await host.start("2026-03-01T12:00:30", cron="* * * * *")
    host.show("2026-03-01T12:01:05")
    assert await host.settled(1) == [("2026-03-01T12:01", "success")]
    host.show("2026-03-01T11:55:30")
    host.show("2026-03-01T12:01:10")
    host.show("2026-03-01T12:02:05")
    assert await host.settled(2) == [("2026-03-01T12:02", "success"), ("2026-03-01T12:01", "success")]
    host.show("2027-03-01T12:00:30")
    runs = await host.settled(4)
    assert runs[:2] == [("2027-03-01T12:00", "success"), ("2027-03-01T11:59", "missed")]
    host.show("2026-03-01T12:05:30")
    await host.until(lambda document: begins(document, "2026-03-01T12:06"))
    host.show("2026-03-01T12:06:05")
    assert ("2026-03-01T12:06", "success") in await host.settled(6)
    fired = [request.headers["X-Scheduled-For"][:16] for request in host.function.requests]
    assert fired == ["2026-03-01T12:01", "2026-03-01T12:02", "2027-03-01T12:00", "2026-03-01T12:05", "2026-03-01T12:06"]


async def test_nothing_fires_before_the_clock_is_right(host: Host) -> None:
    """A machine without a battery begins in another year, and a schedule of its night would run at noon."""
    await host.start("2026-03-01T12:30:30", cron="0 * * * *")
    await host.gateway.terminate()
    host.gateway.before = BEFORE + "faasd_async.UNSURE_S = 1e9\n"  # It has just started.
    host.show("2026-03-01T12:59:58", sure=False)
    await host.gateway.start()
    host.show("2026-03-01T13:00:02", sure=False)
    host.show("2026-03-01T13:20:02", sure=False)
    assert (await host.document())["runs"] == []
    assert (await host.post("run", 202))["schedule"] == "one"
    await host.settled(1)
    host.show("2026-03-05T08:10:00")
    assert ("2026-03-05T08:00", "success") in await host.settled(3)
    assert len(host.function.requests) == 2
    assert "not synchronised" not in host.gateway.log


async def test_a_clock_that_nobody_vouches_for_is_taken_after_two_minutes(host: Host) -> None:
    """With a warning: there are machines without a network."""
    host.show("2026-03-01T12:00:30", sure=False)
    host.gateway = await host._daemon(host.settings(cron="* * * * *"), env=host._clock.env, before=BEFORE)
    await host.gateway.wait_for_log("the clock is not synchronised")
    await host.until(lambda document: document["next"])
    host.show("2026-03-01T12:01:05", sure=False)
    assert await host.settled(1) == [("2026-03-01T12:01", "success")]


@pytest.mark.parametrize("told_by", ["the kernel", "what is gone from /run"])
async def test_reboot_fires_once_after_each_start_of_the_machine(host: Host, tmp_path: Path, told_by: str) -> None:
    """Not after each start of the daemon, and not after one that was before the schedule begun."""
    (tmp_path / "run").mkdir()
    short, long = (f"{BEFORE}faasd_async.uptime_s = lambda: {uptime_s}\n" for uptime_s in (10.0, 1e6))

    def reboot(name: str) -> None:
        if told_by == "the kernel":
            host.boot(name)
        else:
            for path in (tmp_path / "run").iterdir():
                path.unlink()

    host.before = short
    if told_by != "the kernel":
        (tmp_path / "boot").unlink()
        host.env = {"RUNTIME_DIRECTORY": str(tmp_path / "run")}
    await host.start("2026-03-01T12:00:30", cron=["@reboot", "0 0 1 1 *"])
    reboot("of another host, which joins this one")
    host.gateway.before = long
    await host.restart("2026-03-01T12:01:30")
    await host.until(lambda document: document["next"])
    host.gateway.before = short
    reboot("second")
    await host.restart("2026-03-01T12:02:30")
    assert await host.settled(1) == [("2026-03-01T12:02", "success")]
    await host.restart("2026-03-01T12:03:30")
    reboot("third")
    await host.restart("2026-03-01T12:04:30")
    assert await host.settled(2) == [("2026-03-01T12:04", "success"), ("2026-03-01T12:02", "success")]
    assert len(host.function.requests) == 2


# ---- crashes -------------------------------------------------------------------------------------


@pytest.mark.unmeasured
async def test_no_instant_is_lost_or_doubled_by_a_crash(host: Host) -> None:
    """The daemon is killed around each instant, some milliseconds earlier or later."""
    rng = random.Random(1)
    kills = 200 if LONG else 12
    patient = "[retry]\nmax_interruptions = 1000"  # A call may be what runs at each of them.
    await host.start("2026-03-01T12:00:30", more=patient, cron="* * * * *", overlap="queue", catch_up="all")
    minutes = [f"2026-03-01T{12 + minute // 60:02}:{minute % 60:02}" for minute in range(1, kills + 2)]
    for minute in minutes[:-1]:
        host.show(f"{minute}:30")
        await asyncio.sleep(rng.random() * 0.05)
        await host.gateway.kill()
        await host.gateway.start()
    host.show(f"{minutes[-1]}:30")
    await host.until(lambda document: document["runs"] and document["runs"][0]["scheduled_for"].startswith(minutes[-1]))
    listed = json.loads((await ask(host.gateway.url, "/system/calls?schedule=one&limit=1000")).body)["calls"]
    assert sorted(call["scheduled_for"][:16] for call in listed) == minutes
    for call in listed:
        assert (await host.gateway.final(call["id"]))["status"] == "success"
    fired = {request.headers["X-Scheduled-For"][:16] for request in host.function.requests}
    assert sorted(fired) == minutes
    assert (await host.document())["missed"] == 0


# ---- several hosts -------------------------------------------------------------------------------


@pytest.mark.parametrize("jitter", ["0s", "3s"])
async def test_daemons_on_one_nats_fire_each_instant_once(
    hosts: StartHost, server: NatsServer, function: Server, clock: WallClock, jitter: str
) -> None:
    """Whichever of them comes first, also while one is dead, or all are and the server too; what is paused at one rests
    at all."""
    begun = unix("2026-03-01T12:00:30")
    one = {"function": "it", "cron": "* * * * *", "overlap": "queue", "catch_up": "all", "jitter": jitter}
    both = {"one": one, "other": {**one, "cron": "9 * * * *"}}
    settings = to_toml({"functions": {"it": {"url": function.url}}, "schedules": both})
    clock.set(round(begun - time.time()))
    gateways = []
    for name in ("left", "right"):  # Each is late by something else.
        gateway = await hosts(settings, env=clock.env, start=False)
        gateway.before = f"{BEFORE}faasd_async.socket.gethostname = lambda: {name!r}\n"
        await gateway.start()
        gateways.append(gateway)

    async def begun_at(gateway: Daemon) -> list[str]:
        following: list[str] = (await get(gateway, "/system/schedules"))["schedules"][0]["next"]
        return following

    async def until_fired(minute: int) -> None:
        at = f"2026-03-01T12:{minute:02}"
        await function.until(lambda: any(one.headers["X-Scheduled-For"][:16] == at for one in function.requests), at)

    left, right = gateways
    await eventually(lambda: begun_at(right))
    for minute in range(1, 6):
        clock.set(round(begun + 60 * minute - time.time()))
        await until_fired(minute)
    await left.kill()
    clock.set(round(begun + 60 * 6 - time.time()))
    await until_fired(6)
    await left.start()
    clock.set(round(begun + 60 * 7 - time.time()))
    await until_fired(7)
    await post(left, "/system/schedules/one/pause")
    await left.terminate()
    clock.set(round(begun + 60 * 9 - time.time()))
    await until_fired(9)  # the other one
    await left.start()
    await post(left, "/system/schedules/one/resume")
    await left.kill()
    clock.set(round(begun + 60 * 10 - time.time()))
    await until_fired(10)
    await right.kill()
    await server.kill()
    clock.set(round(begun + 60 * 13 - time.time()))
    await server.start()
    await asyncio.gather(left.start(), right.start())
    await until_fired(13)
    expected = [f"2026-03-01T12:{minute:02}" for minute in (1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13)]
    await function.until(lambda: len({one.headers["X-Scheduled-For"] for one in function.requests}) > 11, "all of them")
    records = (await get(right, "/system/calls?schedule=one"))["calls"]
    assert sorted(record["scheduled_for"][:16] for record in records) == expected
    # What the daemon that was killed had begun may run once more, as any call.
    ours = [request for request in function.requests if request.headers["X-Schedule"] == "one"]
    assert sorted({request.headers["X-Scheduled-For"][:16] for request in ours}) == expected
    assert len({request.call_id for request in ours}) == len(expected)


# ---- functions that ask for it themselves --------------------------------------------------------


async def test_annotations_of_a_function_make_a_schedule(host: Host) -> None:
    """Those of cron-connector, in the file: a semicolon stands between several, the time zone is ours."""
    annotated = {"topic": "cron-function", "schedule": "0 12 * * *; 30 12 * * *", "timezone": "Europe/Paris"}
    functions = {"it": annotated, "other": {**annotated, "topic": "orders"}, "wrong": {**annotated, "schedule": "soon"}}
    tables = {name: {"url": host.function.url, "annotations": given} for name, given in functions.items()}
    gateway = await host.start("2026-03-01T10:59:30", more=to_toml({"functions": tables}))
    await gateway.wait_for_log("function wrong.openfaas-fn: its annotations make no schedule: expected five fields")
    (document,) = (await host.until_schedules(lambda found: all(one["next"] for one in found.values()))).values()
    assert (document["name"], document["cron"]) == ("it.openfaas-fn", ["0 12 * * *", "30 12 * * *"])
    assert document["next"][:2] == ["2026-03-01T11:00:00.000000Z", "2026-03-01T11:30:00.000000Z"]
    host.show("2026-03-01T11:00:05")
    (request,) = await host.function.wait_for(1)
    assert (request.method, request.body, request.headers["X-Schedule"]) == ("POST", b"", "it.openfaas-fn")
    assert (await gateway.final(request.call_id))["function"] == "it"


async def test_annotations_of_the_providers_functions_make_schedules(host: Host, tmp_path: Path) -> None:
    """Of all its namespaces. What is deployed or removed through the gateway is noticed soon, the rest by and by."""
    annotations = {"topic": "cron-function", "schedule": "* * * * *"}
    async with running_provider() as provider:
        provider.deploy("env", annotations=annotations)
        provider.deploy("env", namespace="other", annotations=annotations)
        provider.deploy("it", annotations=annotations)  # The one in the file wins.
        provider.deploy("quiet")
        files = credential_files(tmp_path, "provider", provider.user, provider.password)
        host.before = BEFORE + "faasd_async.PROVIDED_LEAST_S = 0.01\n"
        settings = f'[provider]\nurl = "{provider.url}"\n{files}'
        gateway = await host.start("2026-03-01T12:00:30", more=settings)
        names = {"env.openfaas-fn", "env.other"}
        await host.until_schedules(lambda found: found.keys() == names and all(one["next"] for one in found.values()))
        host.show("2026-03-01T12:01:05")
        found = await host.until_schedules(lambda found: all(one["last_success_at"] for one in found.values()))
        assert {one["runs"][0]["scheduled_for"][:16] for one in found.values()} == {"2026-03-01T12:01"}
        called = {key: len(one.requests) for key, one in provider.functions.items()}
        assert {key for key, number in called.items() if number} == {("openfaas-fn", "env"), ("other", "env")}
        document = {"service": "fresh", "image": "x", "annotations": annotations}
        deployed = await ask(gateway.url, "/system/functions", method="POST", body=json.dumps(document).encode())
        assert deployed.status == 202
        await host.until_schedules(lambda found: "fresh.openfaas-fn" in found)


async def test_a_provider_that_does_not_answer_holds_no_other_schedule_up(host: Host, tmp_path: Path) -> None:
    """However many of its functions are due at the same time."""
    annotations = {"topic": "cron-function", "schedule": "* * * * *"}
    async with running_provider() as provider:
        names = [f"slow-{number}" for number in range(40)]
        for name in names:
            provider.deploy(name, annotations=annotations)
        files = credential_files(tmp_path, "provider", provider.user, provider.password)
        host.before = BEFORE + "faasd_async.PROVIDER_S = 1e6\n"
        settings = f'[gateway]\ndrain_timeout = "1s"\n[provider]\nurl = "{provider.url}"\n{files}'
        await host.start("2026-03-01T12:00:30", more=settings, cron="* * * * *")
        await host.until_schedules(lambda found: len(found) == 41 and all(one["next"] for one in found.values()))
        provider.server.behaviour = never
        host.show("2026-03-01T12:01:05")
        await host.function.wait_for(1)
        await host.until(lambda document: document["runs"])
        host.show("2026-03-01T12:02:05")
        assert await host.settled(2) == [("2026-03-01T12:02", "success"), ("2026-03-01T12:01", "success")]
        found = await host.schedules()
        assert [one["name"] for one in found.values() if one["runs"]] == ["one"]


# ---- from a shell --------------------------------------------------------------------------------


async def test_a_shell_does_all_that_there_is_to_do_with_schedules(host: Host) -> None:
    """List, next, run, pause, resume; and calls by schedule."""
    gateway = await host.start("2026-03-01T12:00:30", cron="30 7 * * 1-5", timezone="Europe/Berlin")

    async def command(*words: str, code: int = 0) -> str:
        done = await faasd(*words, "--url", gateway.url, env={"TZ": "UTC", "COLUMNS": "200"})
        assert done.code == code, done
        return done.out + done.err

    head, row = (await command("schedules")).splitlines()
    assert head.split() == ["SCHEDULE", "FUNCTION", "NEXT", "MISSED", "LAST", "RUN;", "WHEN"]
    assert row.split()[:5] == ["one", "it", "2026-03-02", "06:30", "0"]
    assert row.endswith("At 07:30 on Monday through Friday (Europe/Berlin)")
    call_id = (await command("schedules", "run", "one")).strip()
    await gateway.final(call_id)
    await host.settled(1)
    (row,) = (
        line for line in (await command("calls", "--schedule", "one", "--long")).splitlines() if "success" in line
    )
    assert row.startswith(call_id)
    assert re.search(r"(?m)^schedule +one, of 2026-03-01 12:00:", await command("calls", "show", call_id))
    assert await command("schedules", "pause", "one") == "one: paused\n"
    assert "paused" in (await command("schedules", "list")).splitlines()[1]
    assert json.loads(await command("schedules", "resume", "one", "--json")) == {"schedule": "one", "paused": False}
    lines = (await command("schedules", "next", "one", "--count", "2")).splitlines()
    assert lines[0] == "At 07:30 on Monday through Friday (Europe/Berlin)"
    assert [line.split()[2:4] for line in lines[1:]] == [["07:30", zone] for zone in [lines[1].split()[3]] * 2]
    reason = await command("schedules", "next", "on", code=1)
    assert "no schedule on (did you mean one?)" in reason


async def test_the_names_of_schedules_can_be_seen_as_a_whole(daemon: StartDaemon) -> None:
    """A narrow terminal, or a pipe, cuts them; `run` and `pause` need them, so `--long` does not."""
    name = "a-report-of-each-room-for-the-house"
    gateway = await daemon(
        '[functions.it]\ncommand = ["true"]\n'
        f'[schedules.{name}]\nfunction = "it"\ncron = "30 7 * * 1-5"\ntimezone = "Europe/Berlin"\n'
    )
    for words in (("schedules",), ("schedules", "list")):
        short = await faasd(*words, "--url", gateway.url, env={"COLUMNS": "60"})
        assert name not in short.out
        long = await faasd(*words, "--long", "--url", gateway.url, env={"COLUMNS": "60"})
        assert long.out.splitlines()[1].startswith(f"{name}  it  ")
        assert long.out.endswith("  At 07:30 on Monday through Friday (Europe/Berlin)\n")


async def test_the_meaning_of_an_expression_is_told_without_a_daemon() -> None:
    """Before it is in any file, by the clocks of any zone."""
    done = await faasd("schedules", "next", "--count", "3", "0 0 29 2 *; 0 12 29 2 *", "--timezone", "Asia/Tokyo")
    words, *lines = done.out.splitlines()
    assert words == "At 00:00 on February 29; At 12:00 on February 29 (Asia/Tokyo)"
    shown = [line.split()[1:4] for line in lines]
    assert len(shown) == 3
    assert all(day.endswith("-02-29") and at in ("00:00", "12:00") and zone == "JST" for day, at, zone in shown)
    done = await faasd("schedules", "next", "@daily", "--json")
    assert len(json.loads(done.out)["next"]) == 10
    for wrong in ("0 0 31 2 *", "@never", "* * * *"):
        done = await faasd("schedules", "next", wrong)
        assert (done.code, done.err.count("\n"), done.out) == (1, 1, "")
    done = await faasd("schedules", "next", "@daily", "--timezone", "Mars")
    assert done.code == 2
    assert "expected a time zone" in done.err


async def test_check_explains_schedules(tmp_path: Path) -> None:
    """In words, with the next three instants; what is wrong ends in 78, a line each."""
    file = tmp_path / "config.toml"
    functions = '[functions.it]\ncommand = ["true"]\n'
    file.write_text(f'{functions}[schedules.one]\nfunction = "it"\ncron = ["@yearly", "@reboot"]\n')
    done = await faasd("check", file)
    assert done.code == 0
    ok, explained = done.out.splitlines()
    assert ok.endswith("1 function, 1 queue, 1 schedule")
    name, _, told = explained.partition(": ")
    parts = told.split("; ")
    assert name == "schedules.one"
    assert parts[:2] == ["At 00:00 on January 1", "once after each start of this machine (UTC)"]
    assert len(parts) == 5
    assert all(part.endswith("-01-01 00:00 UTC") for part in parts[2:])
    wrong = 'function = "its"\ncron = "0 0 30 2 *"\ntimezone = "Mars"\n'
    file.write_text(f"{functions}[schedules.one]\n{wrong}")
    done = await faasd("check", file)
    assert done.code == 78
    assert [line.split(": ")[1] for line in done.err.splitlines()] == [
        f"schedules.one.{key}" for key in ("cron", "timezone", "function")
    ]
