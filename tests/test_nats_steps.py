"""Steps of a call's life on NATS that meet, or are done again: none of them takes what another one needs."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from jetstream import NatsServer, Network, eventually
from queues import BAD, OK, PATIENCE, REQUESTS, SINK, Bench, NatsStore, invocation, open_bench, queue_of, refused

import faasd_async
from faasd_async import (
    CALLBACKS,
    KEY_ABANDONED_S,
    KIB,
    SILENT_S,
    Claim,
    Delivery,
    NatsConfig,
    NatsLink,
    Parts,
    StoreError,
    body_digest,
    end_late_call,
    key_note,
    nats_call,
    new_id,
    uuid7,
)


@pytest.fixture
async def bench(tmp_path: Path, server: NatsServer) -> AsyncIterator[Bench]:
    """A queue on an empty stream."""
    (tmp_path / "nats").write_text(f"{server.url} t{new_id()[-12:]}")
    async with open_bench(Bench, NatsStore, tmp_path) as bench:
        yield bench


@pytest.mark.parametrize("queue", [REQUESTS, CALLBACKS])
async def test_a_retry_whose_answer_got_lost_is_done_again(queue: str, bench: Bench) -> None:
    """It was stored, which whoever asks once more is told; else the call would wait for its lease to run out."""
    await bench.enqueue("a", callback_url=SINK)
    if queue == CALLBACKS:
        await bench.run()
    for attempt in (1, 2):
        work = await bench.take(queue)
        held = queue_of(bench)._parts.claims.holdings.held[work.id]
        assert await bench.queue.retry(work, BAD, 0.0)
        queue_of(bench)._parts.claims.holdings.hold(held)  # as it is until the answer has come
        assert await bench.queue.retry(work, BAD, 0.0)
        failures = (await bench.record("a"))["failures"]
        assert [failure["number"] for failure in failures] == list(range(1, attempt + 1))
    await bench.run(queue=queue, status="delivered" if queue == CALLBACKS else "success")


async def test_a_call_that_runs_keeps_its_message_when_that_comes_again_after_its_deadline(bench: Bench) -> None:
    """It has started in time. If its daemon dies, it runs again."""
    deadline_at = time.time() + 1.0
    await bench.enqueue("a", deadline_at=deadline_at)
    work = await bench.take()
    await asyncio.sleep(deadline_at + 0.1 - time.time())  # that time passes is what this is about
    parts = queue_of(bench)._parts
    held = parts.claims.holdings.held[work.id]
    await parts.lanes.give_back(parts.lanes.queues[REQUESTS].lanes[held.lane], held.delivery)
    assert await bench.claim() == []
    assert await bench.status("a") == "running"
    await bench.crash()
    again = await bench.take_when_woken()
    assert (again.call_id, again.attempt) == ("a", 2)
    assert await bench.queue.complete(again, OK, "success")


async def test_a_call_that_starts_while_its_deadline_passes_keeps_its_message(
    bench: Bench, server: NatsServer, network: Network, tmp_path: Path
) -> None:
    """One daemon is about to end it when another one claims it, in time. If that one dies, it runs again."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "nats").write_text((tmp_path / "nats").read_text().replace(server.url, network.url))
    own_id = await bench.add("a", deadline_at=time.time() + 3600)
    async with open_bench(Bench, NatsStore, folder) as other:
        queue = queue_of(other)
        parts = queue._parts
        tells = Delivery(f"any.{own_id}-deadline", "nobody", b"", 1, again=False, pending=0)
        network.hold(lambda message: ".call." in message.subject)
        late = asyncio.create_task(
            end_late_call(queue._calls, parts.claims._ends, parts.operator._messages, parts.operator, tells)
        )
        await network.until(lambda: network.held, "the end of the call")
        assert (await bench.take_when_woken()).id == own_id
        await network.heal()
        await late
        assert await bench.status("a") == "running"
        await other.queue.close()
        await bench.crash()
        assert (await bench.take_when_woken()).attempt == 2


async def test_a_queue_that_is_resumed_while_pauses_are_stored_again_is_in_nobodys_way(
    tmp_path: Path, network: Network
) -> None:
    """Another daemon may resume it at any moment."""
    (tmp_path / "nats").write_text(f"{network.url} t{new_id()[-12:]}")
    async with open_bench(Bench, NatsStore, tmp_path) as bench:
        parts = queue_of(bench)._parts
        for name in ("one", "other"):
            parts.lanes.pause(name, True)
        network.hold(lambda message: ".queue." in message.subject)
        storing = asyncio.create_task(parts.peers.restore_pauses())
        await network.until(lambda: network.held, "a pause that is stored")
        for name in ("one", "other"):
            parts.lanes.pause(name, False)
        await network.heal()
        await storing


async def test_a_call_that_has_started_in_time_leaves_nothing_that_waits_for_its_deadline(bench: Bench) -> None:
    """That may be years ahead. If the attempt never happened, the deadline counts again."""
    queue = queue_of(bench)
    await bench.enqueue("a", deadline_at=time.time() + 3600)
    (deadline,) = await queue._calls.subjects(queue._subjects.every("later"))
    work = await bench.take()
    assert await queue._calls.subjects(queue._subjects.every("later")) == []
    assert await bench.queue.retry(work, None, 0.0)
    assert await queue._calls.subjects(queue._subjects.every("later")) == [deadline]
    assert await bench.queue.complete(await bench.take_when_woken(), OK, "success")
    assert await queue._calls.subjects(queue._subjects.every("later")) == []


async def test_a_connection_that_is_made_anew_is_missed_when_it_is_lost(
    server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The first one was closed because something else failed, as at a start while the stream has no leader."""
    link = NatsLink(NatsConfig(servers=(server.url,)))

    async def back() -> None:
        """Nothing is to be done."""

    with caplog.at_level(logging.WARNING, "faasd_async"):
        await link.open(back)
        await link.close()
        assert "NATS is away" not in caplog.text
        await link.open(back)
        await server.kill()

        async def told() -> bool:
            return "NATS is away" in caplog.text

        await eventually(told)
    await link.close()


async def test_what_could_not_be_asked_is_no_answer_that_servers_owe(server: NatsServer) -> None:
    """Nobody is told that they hang."""
    link = NatsLink(NatsConfig(servers=(server.url,)))

    async def back() -> None:
        """Nothing is to be done."""

    await link.open(back)
    with pytest.raises(StoreError, match="no message of this size"):
        link.request("somewhere", bytes(link.max_payload + KIB + 1))
    await asyncio.sleep(SILENT_S + 0.1)  # that time passes is what this is about
    assert link.silent is None
    await link.close()


# ---- keys whose call was never stored ------------------------------------------------------------


async def died_after_its_note(bench: Bench, age_s: float, **changes: Any) -> str:
    """Leave the note of a key behind, as a daemon does that dies before it has stored the call; the call's id."""
    own_id = uuid7(round(1000 * (time.time() - age_s)), 1, 1)
    call = nats_call(invocation(id=own_id, call_id="first", **changes), 0.0)
    queue = queue_of(bench)
    await queue._link.publish(queue._subjects.key(call), key_note(call, body_digest(Parts(body=b"body"))))
    return own_id


async def test_a_key_whose_call_was_never_stored_gives_the_next_one_its_place(bench: Bench) -> None:
    """At once, and only once: nobody has heard of the call, or who has asks for it."""
    own_id = await died_after_its_note(bench, 0.0, idempotency_key="k")
    assert [await bench.enqueue("second", idempotency_key="k") for _ in range(2)] == ["first", "first"]
    assert [work.id for work in await bench.claims()] == [own_id]


async def test_a_key_whose_call_was_never_stored_is_free_for_another_body(bench: Bench) -> None:
    """Once nobody can be about to store that call any more: its caller was not told that it is accepted."""
    await died_after_its_note(bench, 1.0, idempotency_key="fresh")
    assert await refused(bench.enqueue("second", idempotency_key="fresh", body=b"other")) == 422
    await died_after_its_note(bench, KEY_ABANDONED_S, idempotency_key="k")
    calls = [bench.enqueue(name, idempotency_key="k", body=b"other") for name in ("second", "third")]
    (name,) = set(await asyncio.gather(*calls))
    assert await bench.enqueue(idempotency_key="k", body=b"other") == name
    assert await refused(bench.enqueue(idempotency_key="k")) == 422
    assert await bench.claim() == [name]


# ---- receivers that are not called back any more -------------------------------------------------


async def receivers(bench: Bench) -> set[str]:
    """The consumers for callbacks that the server has, and the lanes that the queue knows."""
    queue = queue_of(bench)
    answer = await queue._link.api(f"CONSUMER.NAMES.{queue._link.stream}")
    names = {name for name in answer["consumers"] or () if CALLBACKS in name}
    return names | {*queue._parts.lanes.queues[CALLBACKS].lanes}


@pytest.fixture
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receivers are forgotten at once."""
    monkeypatch.setattr(faasd_async, "IDLE_RECEIVER_S", 0.1)
    monkeypatch.setattr(faasd_async, "POLL_S", 0.1)


@pytest.mark.usefixtures("short_memory")
async def test_the_lane_of_a_receiver_goes_once_it_is_not_called_back_any_more(bench: Bench) -> None:
    """On all hosts; not while a callback waits, is sent, or is to be tried again; and it comes again."""
    other = Bench(bench.store, bench.config)
    await other.open()
    for queue in (REQUESTS, CALLBACKS):
        assert await other.claims(0, queue) == []  # It has no room.
    for name in ("one", "two"):
        await bench.enqueue(name, callback_url="http://one.example.org/")
        await bench.until(lambda: REQUESTS in bench.woken)
        await bench.run()
        work = await take_callback(bench)
        assert await bench.queue.retry(work, BAD, 1.0)
        await asyncio.sleep(0.5)
        assert await receivers(bench)
        work = await take_callback(bench)
        await asyncio.sleep(0.5)
        assert await bench.queue.complete(work, OK, "delivered")

        async def is_forgotten() -> bool:
            return not await receivers(bench) and not await receivers(other)

        await eventually(is_forgotten)
    await other.queue.close()


async def take_callback(bench: Bench) -> Claim:
    """The only callback, as soon as it is due."""

    async def claim() -> Claim | None:
        return next(iter(await bench.claims(1, CALLBACKS)), None)

    return await eventually(claim)


@pytest.mark.usefixtures("short_memory")
async def test_callbacks_to_receivers_that_are_forgotten_all_the_time_are_sent_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two hosts that forget them between any two steps. What was on its way to a host just then comes again."""
    bench.config.set(ack_wait="5s")
    monkeypatch.setattr(faasd_async, "IDLE_RECEIVER_S", 0.001)
    monkeypatch.setattr(faasd_async, "POLL_S", 0.02)
    other = Bench(bench.store, bench.config)
    await other.open()
    names = [f"{number}" for number in range(200)]
    sent: list[str] = []

    async def end(one: Bench, work: Claim, status: str) -> bool:
        while True:
            with contextlib.suppress(StoreError):  # A server fails to make what it still deletes.
                return await one.queue.complete(work, OK, status)
            await asyncio.sleep(0.01)

    async def run(one: Bench, share: Sequence[str]) -> None:
        for name in share:
            await one.enqueue(name, callback_url=f"http://host{int(name) % 3}.example.org/")
        while len(sent) < len(names):
            for work in await one.claims(3):
                await end(one, work, "success")  # False on a machine that is slower than a lease: it is claimed again.
            ended = [work.call_id for work in await one.claims(3, CALLBACKS) if await end(one, work, "delivered")]
            sent.extend(ended)
            if ended:  # A busy machine takes its time for all of them.
                patience.reschedule(asyncio.get_running_loop().time() + PATIENCE)
            await asyncio.sleep(0.005)

    async with asyncio.timeout(PATIENCE) as patience:
        await asyncio.gather(run(bench, names[::2]), run(other, names[1::2]))
    assert sorted(sent) == sorted(names)
    await other.queue.close()


@pytest.mark.parametrize("crash", [False, True])
async def test_a_callback_is_sent_that_was_stored_just_when_its_lane_was_retired(bench: Bench, crash: bool) -> None:
    """By a host that had not heard of that yet, and may have died before it has."""
    queue = queue_of(bench)
    await bench.enqueue("first", callback_url=SINK)
    await bench.until(lambda: REQUESTS in bench.woken)
    await bench.run()
    for name in await receivers(bench):
        if "+" in name:
            await queue._link.api(f"CONSUMER.DELETE.{queue._link.stream}.{name}")
    if crash:
        await bench.crash()
    assert (await take_callback(bench)).call_id == "first"
