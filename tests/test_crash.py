"""Nothing that was accepted is lost by a crash, and nothing is left in between."""

import asyncio
import collections
import contextlib
import json
import os
import random
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from conftest import PATIENCE, Daemon, Gate, Request, Server, StartDaemon, answer, free_address, run

pytestmark = pytest.mark.unmeasured  # what it does with calls is measured where it is not killed all the time

CALLS = 400
KILLS = int(os.environ.get("FAASD_ASYNC_KILLS", 12))  # 200 for the long form
DELAY_S = 0.2


async def submit_many(daemon: Daemon, number: int, **headers: str) -> list[str]:
    """The ids of so many accepted calls of the function `it`, eight sent at a time."""
    limit = asyncio.Semaphore(8)

    async def one() -> str:
        async with limit:
            return await daemon.submit("it", b"x", **headers)

    return list(await asyncio.gather(*(one() for _ in range(number))))


async def final_records(daemon: Daemon, calls: list[str]) -> list[dict[str, Any]]:
    """The final records of many calls."""
    limit = asyncio.Semaphore(8)

    async def one(call_id: str) -> dict[str, Any]:
        async with limit:
            return await daemon.final(call_id)

    return list(await asyncio.gather(*map(one, calls)))


async def test_hundreds_of_queued_calls_survive_kill_9(daemon: StartDaemon, function: Server) -> None:
    """Killed in the middle of them and started again, the daemon runs every one."""
    function.behaviour = gate = Gate(passing=CALLS // 4)
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"')
    calls = await submit_many(gateway, CALLS)
    assert len(set(calls)) == CALLS
    await function.until(lambda: gate.passing < 0, "the gate is reached")
    await gateway.kill()
    gate.open()
    await gateway.start()
    await function.until(lambda: set(function.call_ids) >= set(calls), "every call is run")
    records = await final_records(gateway, calls)
    assert collections.Counter(record["status"] for record in records) == {"success": CALLS}
    # Only what ran, or had run without its end being stored yet, at the time of the kill may have run twice.
    repeated = [call_id for call_id, times in collections.Counter(function.call_ids).items() if times > 1]
    assert len(repeated) <= 8


def is_done(record: dict[str, Any]) -> bool:
    """Whether nothing is left to do for a call."""
    return record["completed_at"] is not None and record["callback"]["status"] != "pending"


@dataclass
class Story:
    """What was seen of one call from outside."""

    path: str = ""
    accepted: bool = False
    runs: int = 0
    answer: int | None = None  # of the function, once it is one that ends the call
    callbacks: int = 0
    final: tuple[str, str] | None = None  # status and time of the record when it was final first
    cancelled: int | None = None  # in the life of which process that was promised
    redriven: bool = False  # it may have been


class Witness:
    """Function, receiver of callbacks and clients in one, who remember and compare. `wrong` is what must not be."""

    def __init__(self, daemon: Daemon, sink: Server) -> None:
        self.daemon, self.sink, self.chance = daemon, sink, random.Random(20)
        self.stories: collections.defaultdict[str, Story] = collections.defaultdict(Story)
        self.wrong: list[str] = []
        self.life = 0  # how often the daemon was started again
        self.some_accepted = asyncio.Event()

    async def function(self, request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        """Answers by path and after a moment: /flaky fails twice, /broken until it is redriven, /slow never answers."""
        story, retry = self.stories[seen.call_id], int(seen.headers["X-Retry"])
        story.path, story.runs = seen.target, story.runs + 1
        if (story.callbacks or story.final) and not story.redriven:
            self.wrong.append(f"{seen.call_id} ran again after its outcome was stored: {story}")
        if story.cancelled is not None and story.cancelled < self.life:
            self.wrong.append(f"{seen.call_id} ran after it was cancelled: {story}")
        if seen.target == "/delayed" and time.time() < int(seen.headers["X-Start-Time"]) / 1e9 + DELAY_S:
            self.wrong.append(f"{seen.call_id} ran too early: {story}")
        if seen.target == "/slow":
            await asyncio.Event().wait()
        await asyncio.sleep(self.chance.uniform(0, 0.01))  # time for a kill to hit in
        if seen.target == "/flaky" and retry < 2:
            return web.Response(status=500)
        story.answer = 400 if seen.target == "/broken" and not story.redriven else 200
        return web.Response(status=story.answer)

    async def callback(self, request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        """Takes callbacks, most of them at once."""
        story = self.stories[seen.call_id]
        if story.answer is None or story.answer != int(seen.headers["X-Function-Status"]):
            self.wrong.append(f"{seen.call_id} was told of before it ended: {story}")
        if self.chance.random() < 0.1:
            return web.Response(status=503)
        story.callbacks += 1
        return web.Response()

    async def send(self, path: str, **headers: str) -> tuple[str, Story]:
        """A call that was accepted."""
        call_id = await self.daemon.submit(f"it{path}", b"x", **headers)
        story = self.stories[call_id]
        story.path, story.accepted = path, True
        self.some_accepted.set()
        return call_id, story

    async def cancel(self, call_id: str, story: Story) -> None:
        """Have a call cancelled that does not end by itself."""
        async with self.daemon.http.delete(f"{self.daemon.url}/async-function/{call_id}") as response:
            assert response.status == 202 or not story.accepted  # those may end by themselves
            story.cancelled = self.life

    async def client(self) -> None:
        """Does this and that until the daemon is gone."""
        back = {"X_Callback_Url": self.sink.url}
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            while True:
                path = self.chance.choice(["/plain", "/plain", "/flaky", "/delayed", "/later", "/slow", "/broken"])
                if path == "/later":
                    await self.cancel(*await self.send(path, X_Delay="1h", **back))
                elif path == "/slow":
                    slow = await self.send(path, X_Queue="slow", **back)
                    await asyncio.sleep(self.chance.uniform(0, 0.02))  # queued or running, or the daemon is dead
                    await self.cancel(*slow)
                elif path == "/broken":
                    call_id, story = await self.send(path)
                    url = f"{self.daemon.url}/system/calls/{call_id}"
                    async with self.daemon.http.get(f"{url}?wait=30s") as response:
                        assert (await response.json())["status"] in ("error", "queued", "delayed", "running")
                    story.redriven = True
                    async with self.daemon.http.post(f"{url}/retry") as response:
                        assert response.status in (202, 409)
                else:
                    await self.send(path, **back, **({"X_Delay": f"{DELAY_S}s"} if path == "/delayed" else {}))

    async def records(self) -> dict[str, dict[str, Any]]:
        """All records that there are; what was final has to be so still, and the same."""
        found, cursor = dict[str, dict[str, Any]](), ""
        while cursor is not None:
            url = f"{self.daemon.url}/system/calls?limit=1000" + (cursor and f"&cursor={cursor}")
            async with self.daemon.http.get(url) as response:
                page = await response.json()
            found, cursor = found | {record["call_id"]: record for record in page["calls"]}, page["next_cursor"]
        for call_id, record in found.items():
            story, now = self.stories[call_id], (record["status"], record["completed_at"])
            if story.final and not story.redriven and story.final != now:
                self.wrong.append(f"{call_id} was final: {story}, and is {record}")
            if record["completed_at"]:
                story.final = now
            if record["status"] == "cancelled" and story.cancelled is None:  # of which the answer did not come
                story.cancelled = self.life
        return found


# By path: the states in which a call may end.
TOLD, CANCELLED = ("/plain", "/flaky", "/delayed"), ("/later", "/slow")
ENDS = {path: {("success", "delivered")} for path in TOLD} | {path: {("cancelled", "none")} for path in CANCELLED}
ENDS["/broken"] = {("error", "none"), ("success", "none")}


async def test_random_kills_under_a_mixed_load_break_no_promise(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """Wherever the kill hits: each accepted call ends in one state and stays there, is told of only once it has ended,
    and does not run again once its outcome is stored; with retries, delays, cancels, redrives and pruning."""
    gateway = await daemon(
        f'[functions.it]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 16\n[queues.slow]\n'
        'max_inflight = 4\n[retry]\nattempts = 1000\nmax_interruptions = 1000\nmax_wait = "50ms"\n'
        '[callback]\nattempts = 1000\n[calls]\nkeep = "1s"\nkeep_failed = "1s"'
    )
    witness = Witness(gateway, sink)
    function.behaviour, sink.behaviour, stories = witness.function, witness.callback, witness.stories
    for _ in range(KILLS):
        witness.some_accepted.clear()
        clients = [asyncio.create_task(witness.client()) for _ in range(6)]
        # The moment of the kill is the thing here: any moment in the first fifth of a second under load.
        await asyncio.sleep(witness.chance.uniform(0, 0.2))
        await witness.some_accepted.wait()
        await gateway.kill()
        await asyncio.gather(*clients)
        witness.life += 1
        await gateway.start()  # which also prunes
        for call_id, found in (await witness.records()).items():
            if found["completed_at"] is None and stories[call_id].path in ("", *CANCELLED):
                await witness.cancel(call_id, stories[call_id])

    deadline = time.monotonic() + 10 * PATIENCE  # what was interrupted together comes back further apart each time
    while not all(map(is_done, (await witness.records()).values())):
        assert time.monotonic() < deadline, gateway.log
        await asyncio.sleep(0.05)
    records, accepted = await witness.records(), {key: story for key, story in stories.items() if story.accepted}
    for call_id, story in accepted.items():
        if (record := records.get(call_id)) is not None:
            assert (record["status"], record["callback"]["status"]) in ENDS[story.path], (record, story)
            assert story.runs <= record["attempts"] or story.redriven, (record, story)
            if story.path == "/plain":
                assert record["attempts"] == 1 + record["interrupted"], record
        else:  # its record was pruned, after the end
            assert story.cancelled is not None if story.path in CANCELLED else story.answer, story
        assert bool(story.callbacks) == (story.path in TOLD), story
    assert witness.wrong == []
    pruned, again = len(accepted.keys() - records.keys()), sum(story.runs > 1 for story in accepted.values())
    print(f"{KILLS} kills, {len(accepted)} calls accepted, {pruned} pruned, {again} run more than once")
    assert min(collections.Counter(story.path for story in accepted.values()).values()) >= KILLS // 4
    assert pruned


async def test_a_call_that_ran_when_the_daemon_died_says_so(daemon: StartDaemon, function: Server) -> None:
    """It is run again, and its record shows the interruption."""
    function.behaviour = gate = Gate()
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"')
    call_id = await gateway.submit("it", b"body")
    await function.wait_for(1)
    await gateway.kill()
    gate.open()
    await gateway.start()
    record = await gateway.final(call_id)
    assert (record["status"], record["interrupted"], record["attempts"]) == ("success", 1, 2)
    assert [(request.call_id, request.body) for request in function.requests] == [(call_id, b"body")] * 2
    assert [request.headers["X-Retry"] for request in function.requests] == ["0", "1"]


async def test_an_interrupted_last_attempt_does_not_leave_the_call_hanging(
    daemon: StartDaemon, function: Server
) -> None:
    """A call with no attempts left ends in a final state, too."""
    function.behaviour = gate = Gate()
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"\n[retry]\nattempts = 1')
    call_id = await gateway.submit("it")
    await function.wait_for(1)
    await gateway.kill()
    gate.open()
    await gateway.start()
    record = await gateway.final(call_id)
    assert record["status"] in ("success", "error")
    assert record["interrupted"] == 1


async def test_what_a_call_was_sent_with_survives_kill_9(daemon: StartDaemon, function: Server) -> None:
    """Path, query, headers and body are on disk, and so is the time at which it was accepted."""
    function.behaviour = gate = Gate()
    kept = f'[gateway]\nlisten = "{free_address()}"'
    one_slot = "[queues.faas-request]\nmax_inflight = 1"
    gateway = await daemon(f'{kept}\n[functions.it]\nurl = "{function.url}"\n{one_slot}')
    await gateway.submit("it")
    await function.wait_for(1)
    body = bytes(range(256))
    call_id = await gateway.submit("it/a%2Fb?c", body, X_Own="v", X_Call_Id="trace-1")
    before = await gateway.record(call_id)
    assert before["status"] == "queued"
    await gateway.kill()
    gate.open()
    await gateway.start()
    after = await gateway.final(call_id)
    assert (after["status"], after["created_at"], after["request_bytes"]) == ("success", before["created_at"], 256)
    (request,) = (request for request in function.requests if request.call_id == "trace-1")
    assert (request.target, request.headers["X-Own"], request.body) == ("/a%2Fb?c", "v", body)


async def test_final_records_survive_kill_9(daemon: StartDaemon, function: Server) -> None:
    """A call that is done stays done, and is known."""
    function.behaviour = answer(201, b"done")
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"')
    call_id = await gateway.submit("it")
    before = await gateway.final(call_id)
    await gateway.kill()
    await gateway.start()
    assert await gateway.record(call_id) == before
    assert len(function.requests) == 1


async def test_the_wait_before_a_retry_survives_kill_9(daemon: StartDaemon, function: Server) -> None:
    """A delayed call is neither forgotten nor hurried by a restart."""
    function.behaviour = answer(500)
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"\n[retry]\nmin_wait = "1h"\nmax_wait = "2h"')
    call_id = await gateway.submit("it")
    before = await gateway.until(call_id, lambda record: record["status"] == "delayed")
    await gateway.kill()
    await gateway.start()
    assert await gateway.record(call_id) == before
    assert len(function.requests) == 1


async def test_what_is_due_at_the_start_waits_until_the_daemon_is_ready(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """A start that takes its time, here over many listeners, does not begin with attempts that cannot succeed."""
    addresses = [f"127.0.0.{number}:0" for number in range(1, 60)]
    gateway = await daemon(
        f"[gateway]\nlisten = {json.dumps(addresses)}\n"
        f'[functions.it]\nurl = "{function.url}"\n[functions.other]\nurl = "{sink.url}"\n'
        "[callback]\nattempts = 100"
    )
    await sink.stop()
    calls = await submit_many(gateway, 10, X_Callback_Url="http://gateway/function/other")
    for call_id in calls:
        await gateway.until(call_id, lambda record: record["callback"]["attempts"] >= 1)
    await gateway.kill()
    await sink.start()
    await gateway.start()
    records = await final_records(gateway, calls)
    assert {record["callback"]["status"] for record in records} == {"delivered"}
    assert "failed in this program" not in gateway.log


async def test_a_second_process_on_the_same_store_gives_up(daemon: StartDaemon, function: Server) -> None:
    """One process owns a file; the second says so in one line, and the first is not disturbed."""
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"')
    second = Daemon(gateway.folder, gateway.config.read_text())
    await second.spawn()
    assert await second.ended() not in (0, None)
    assert len(second.lines) == 1, second.log
    assert str(gateway.store) in second.log
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"


async def test_a_store_that_is_no_database_is_moved_aside_and_kept(daemon: StartDaemon, function: Server) -> None:
    """The daemon starts with an empty queue and says loudly where the broken file is."""
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"', start=False)
    broken = b"This is no database." * 1000
    gateway.store.write_bytes(broken)
    await gateway.start()
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
    kept = [path for path in gateway.folder.iterdir() if path.is_file() and path.read_bytes() == broken]
    assert len(kept) == 1
    await gateway.wait_for_log(kept[0].name)


async def test_a_store_that_cannot_be_opened_is_one_clear_line(daemon: StartDaemon) -> None:
    """A path that is a folder: exit with a reason, not with a traceback."""
    gateway = await daemon("", start=False)
    gateway.store.mkdir()
    await gateway.spawn()
    assert await gateway.ended() != 0
    assert str(gateway.store) in gateway.log
    assert (await run("test", "-d", gateway.store)).code == 0
