"""Nothing that was accepted is lost by a crash, and nothing is left in between."""

import asyncio
import collections
import contextlib
import json
import random
from typing import Any

import aiohttp
from conftest import Daemon, Gate, Server, StartDaemon, answer, run

CALLS = 1000
KILLS = 20


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


async def test_a_thousand_queued_calls_survive_kill_9(daemon: StartDaemon, function: Server) -> None:
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


async def test_random_kills_under_load_lose_nothing(
    daemon: StartDaemon, function: Server, sink: Server, http: aiohttp.ClientSession
) -> None:
    """Accepted is run, with one final state and at least one callback, wherever the kill hits."""
    chance = random.Random(20)
    gateway = await daemon(
        f'[functions.it]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 16\n'
        "[retry]\nattempts = 1000\n[callback]\nattempts = 1000"
    )
    accepted: list[str] = []
    answers: collections.Counter[int] = collections.Counter()
    some_accepted = asyncio.Event()

    async def load() -> None:
        """Send calls until the daemon is gone."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            while True:
                headers = {"X-Callback-Url": sink.url}
                async with http.post(f"{gateway.url}/async-function/it", data=b"x", headers=headers) as response:
                    answers[response.status] += 1
                    accepted.append(response.headers["X-Call-Id"])
                    some_accepted.set()

    for _ in range(KILLS):
        some_accepted.clear()
        clients = [asyncio.create_task(load()) for _ in range(4)]
        # The moment of the kill is the thing here: any moment in the first fifth of a second under load.
        await asyncio.sleep(chance.uniform(0, 0.2))
        await some_accepted.wait()
        await gateway.kill()
        await asyncio.gather(*clients)
        await gateway.start()

    assert set(answers) == {202}
    assert len(set(accepted)) == len(accepted) >= KILLS
    await function.until(lambda: set(function.call_ids) >= set(accepted), "every accepted call is run")
    await sink.until(lambda: set(sink.call_ids) >= set(accepted), "every callback arrives")
    records = await final_records(gateway, accepted)
    states = collections.Counter((record["status"], record["callback"]["status"]) for record in records)
    assert states == {("success", "delivered"): len(accepted)}
    for record in records:
        assert record["attempts"] == 1 + record["interrupted"], record


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
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 1')
    await gateway.submit("it")
    await function.wait_for(1)
    body = bytes(range(256))
    call_id = await gateway.submit("it/a%2Fb?c", body, X_Own="v", X_Call_Id="trace-1")
    before = await gateway.record(call_id)
    assert before["status"] == "queued"
    await gateway.kill()
    gate.open()
    await gateway.start(same_port=True)
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
