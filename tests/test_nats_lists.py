"""What lists cost on NATS, where much is stored; calls of an earlier version, and those that were given back."""

import asyncio
import functools
import itertools
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from jetstream import Network, eventually
from queues import BAD, REQUESTS, SINK, Bench, NatsStore, invocation, open_bench, queue_of, refused

import faasd_async
from faasd_async import (
    MANY_GIVEN_BACK,
    CallFilter,
    Delivery,
    NatsCall,
    NatsLane,
    Parts,
    id_number,
    new_id,
    pack_call,
    stream_config,
    uuid7,
)

HOUR_MS = 3_600_000


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A queue on an empty stream."""
    async with open_bench(Bench, NatsStore, tmp_path) as bench:
        yield bench


@pytest.fixture
async def counted(tmp_path: Path, network: Network) -> AsyncIterator[Bench]:
    """The same behind a network that counts."""
    (tmp_path / "nats").write_text(f"{network.url} t{new_id()[-12:]}")
    async with open_bench(Bench, NatsStore, tmp_path) as bench:
        yield bench


def own_id(at_ms: int) -> str:
    """The id of a call of this time."""
    return uuid7(at_ms, random.getrandbits(12), random.getrandbits(62))


def finished(name: str, function: str = "figlet", status: str = "success") -> NatsCall:
    """A call that has ended."""
    at = int(name.replace("-", "")[:12], 16) / 1000
    call = invocation(id=name, call_id=name, function=function, start_time=round(at * 1e9), due_at=at)
    kept = {key: value for key, value in call._asdict().items() if key in NatsCall._fields}
    return NatsCall(**kept, request_bytes=4, status=status, attempts=1, completed_at=time.time())


def waiting(name: str) -> NatsCall:
    """A call that nobody has claimed."""
    return finished(name)._replace(status="queued", due_at=time.time(), attempts=0, completed_at=None)


async def fill(bench: Bench, calls: Sequence[NatsCall], root: str = "call") -> None:
    """Store records, or messages that wait, as they are, without asking whether each was stored."""
    queue = queue_of(bench)
    for number, call in enumerate(calls, 1):
        place = queue._subjects.place(root, call.queue, call.lane, call.id)
        subject = queue._subjects.record(call) if root == "call" else place
        if number == len(calls):  # One answer is enough.
            await queue._link.publish(subject, pack_call(call, Parts()))
        else:
            queue._link.send(subject, pack_call(call, Parts()))


async def all_pages(bench: Bench, limit: int, **filters: Any) -> list[str]:
    """The ids of all that match, page after page."""
    return [name async for page in bench.pages(limit, **filters) for name in page]


# ---- what lists cost -----------------------------------------------------------------------------


async def test_a_page_costs_what_is_on_it_and_not_what_there_is(counted: Bench, network: Network) -> None:
    """Whatever the calls' times are: many at once, long ago, one now and then, the clock of a host ahead.

    What servers send for a page is counted: it never is the names of all calls, let alone the calls.
    """
    now = round(time.time() * 1000)
    times = [now + 5 * 60_000, *(now - 2 * HOUR_MS - number // 2 for number in range(3000))]
    times += [now - number * HOUR_MS // 7 for number in range(1000)]
    times += [now - 40 * HOUR_MS] * 1200  # of one moment: more than a server sends at once
    calls = [finished(own_id(at), "rare" if number % 500 == 0 else "figlet") for number, at in enumerate(times)]
    await fill(counted, calls)
    queue = queue_of(counted)
    await queue._parts.consumers.ensure("work", REQUESTS, "rare.openfaas-fn")
    newest = sorted((call.id for call in calls), reverse=True)
    rare = sorted((call.id for call in calls if call.function == "rare"), reverse=True)

    async def cost(expected: Sequence[str], limit: int, cursor: str | None = None, **filters: Any) -> list[int]:
        network.arrived.clear()
        page = await counted.queue.list_records(CallFilter(**filters), limit, cursor)
        assert [record.id for record in page.records] == list(expected[:limit])
        return list(network.arrived)

    for sizes in (
        await cost(newest, 100),
        await cost(newest, 10),
        await cost(newest[2500:], 100, str(id_number(newest[2499]))),
        await cost(rare, 100, function="rare"),
        await cost([], 100, function="nobody"),
        await cost([], 100, statuses=("queued", "running")),
        await cost(newest, 100, statuses=("success",)),
    ):
        assert 0 < len(sizes) < 600
        assert max(sizes) < 20_000
        assert sum(sizes) < 250_000  # The names alone would be 600,000.
    assert await all_pages(counted, 400) == newest
    assert await all_pages(counted, 7, function="rare") == rare


async def test_what_is_done_to_all_that_match_finds_it_in_parts(counted: Bench, network: Network) -> None:
    """Calls that wait, of days: those of a queue are cancelled, others and what runs stay, and all are read once."""
    await counted.enqueue("runs")
    await counted.take()
    now = round(time.time() * 1000)
    calls = [finished(own_id(now - number * HOUR_MS // 16), status="queued") for number in range(2000)]
    calls = [call._replace(completed_at=None, attempts=0) for call in calls]
    calls[::10] = [call._replace(queue="line") for call in calls[::10]]
    await fill(counted, calls, "work")
    network.arrived.clear()
    assert await counted.listed(statuses=("running",)) == ["runs"]
    assert 0 < len(network.arrived) < 100
    assert await counted.queue.purge("line") == 200
    assert max(network.arrived) < 20_000
    left = [call.id for call in calls if call.queue != "line"]
    assert await all_pages(counted, 1000, statuses=("queued", "delayed")) == sorted(left, reverse=True)
    result = await counted.queue.redrive_matching(CallFilter(statuses=("cancelled",)))
    assert (result.matched, result.done) == (200, 0)  # There is no request to be stored again.


async def test_calls_of_a_host_whose_clock_was_far_ahead_are_listed_and_purged(bench: Bench) -> None:
    """By days, months or years; among others, and more than are looked at all at once."""
    now = round(time.time() * 1000)
    ahead = [2 * 24 * HOUR_MS, 70 * 24 * HOUR_MS, 9 * 365 * 24 * HOUR_MS]
    ids = sorted((own_id(now + by + number) for by in [0, *ahead] for number in range(100)), reverse=True)
    await queue_of(bench)._parts.consumers.ensure("work", REQUESTS, "figlet.openfaas-fn")
    await fill(bench, [waiting(name) for name in ids], "work")
    assert await all_pages(bench, 70) == ids
    assert await all_pages(bench, 70, function="figlet", statuses=("queued",)) == ids
    assert await bench.queue.purge(REQUESTS) == len(ids)


# ---- calls of an earlier version -----------------------------------------------------------------


async def make_older(bench: Bench) -> None:
    """Have the queue do as an earlier version did, on a stream as that one made it."""
    queue = queue_of(bench)
    queue._subjects.begin("z")  # Every id comes before this.
    config = stream_config(queue._settings().nats)
    config["subjects"] = [name for name in config["subjects"] if ".timed." not in name]
    config["metadata"] = {}
    await queue._link.api(f"STREAM.UPDATE.{config['name']}", config)


async def test_calls_of_an_earlier_version_are_shown_and_run(bench: Bench) -> None:
    """Their messages have other subjects; calls that come later do not."""
    await make_older(bench)
    await bench.enqueue_all("done", "failed", "tried")
    for outcome, status in ((None, "success"), (BAD, "error")):
        (work,) = await bench.claims(1)
        await bench.queue.complete(work, outcome or BAD._replace(status=200), status)
    (work,) = await bench.claims(1)
    await bench.queue.retry(work, BAD, 3600.0)
    await bench.enqueue("told", callback_url=SINK)
    await bench.run()
    await bench.enqueue("later", due_at=time.time() + 3600)
    await bench.enqueue_all("first", "second")
    await bench.enqueue("elsewhere", queue="other", function="other")
    old = ["elsewhere", "second", "first", "later", "told", "tried", "failed", "done"]
    assert await bench.listed() == old
    await bench.reopen()
    queue = queue_of(bench)
    assert queue._subjects.since not in ("", "z")
    await bench.enqueue("new")
    assert await bench.listed() == ["new", *old]
    assert await all_pages(bench, 2) == ["new", *old]
    assert await bench.listed(function="other") == ["elsewhere"]
    assert await bench.listed(statuses=("success", "error")) == ["told", "failed", "done"]
    assert await bench.listed(statuses=("queued",)) == ["new", "elsewhere", "second", "first"]
    assert {(await bench.take_when_woken()).call_id for _ in range(3)} == {"first", "second", "new"}
    assert (await bench.deliver()).call_id == "told"
    await bench.queue.redrive("failed")
    assert await bench.queue.cancel("later") == 1
    assert (await bench.run()).call_id == "failed"
    assert [await bench.status(name) for name in old] == [
        *("queued", "running", "running", "cancelled", "success", "delayed", "success", "success")
    ]
    assert await bench.queue.purge("other") == 1
    assert await bench.queue.purge(REQUESTS) == 1
    assert await bench.listed(statuses=("cancelled",)) == ["elsewhere", "later", "tried"]


async def test_hosts_that_find_an_older_stream_at_once_agree_since_when_it_is_new(bench: Bench) -> None:
    """One changes it, the others come in later."""
    await make_older(bench)
    await bench.queue.close()
    others = [Bench(bench.store, bench.config) for _ in range(3)]
    await asyncio.gather(*(other.open() for other in others))

    async def all_are_in() -> bool:
        return all(queue_of(other)._subjects.since for other in others)

    await eventually(all_are_in)
    (since,) = {queue_of(other)._subjects.since for other in others}
    assert since != "z"
    for other in others:
        await other.queue.close()


async def test_a_call_that_waits_is_not_stored_twice_though_its_server_does_not_know_its_id_any_more(
    bench: Bench,
) -> None:
    """A move that was killed comes back with it, perhaps after more than the two minutes of a server's memory."""
    call = invocation("first")
    kept = {key: value for key, value in call._asdict().items() if key in NatsCall._fields}
    await fill(bench, [NatsCall(**kept, request_bytes=4)], "work")
    assert await bench.queue.enqueue(call) == "first"
    await bench.until(lambda: REQUESTS in bench.woken)
    assert await bench.claim() == ["first"]
    assert await bench.claim() == []


# ---- what many lanes cost ------------------------------------------------------------------------


async def make_lanes(bench: Bench, number: int) -> None:
    """Have so many functions known, whose calls may come at any time."""
    consumers = queue_of(bench)._parts.consumers
    names = [f"f{one}.openfaas-fn" for one in range(number)]
    await asyncio.gather(*(consumers.ensure("work", REQUESTS, name) for name in names))
    await bench.claims()


async def steps_of(work: Callable[[], Awaitable[object]]) -> int:
    """How many functions are called meanwhile, our own and those of libraries.

    The least of a few times, as a round of the queue's own may fall into one.
    """
    steps = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal steps
        steps += event == "call"

    tries = []
    before = sys.getprofile()
    for _ in range(5):
        steps = 0
        sys.setprofile(count)
        try:
            await work()
        finally:
            sys.setprofile(before)
        tries.append(steps)
    return min(tries)


@pytest.mark.parametrize("room", [1000, 0])
async def test_a_claim_costs_what_it_claims_however_many_lanes_there_are(bench: Bench, room: int) -> None:
    """There is one for each call that ends."""
    await make_lanes(bench, 200)
    assert await steps_of(functools.partial(bench.claims, room)) < 100


async def test_a_call_that_a_full_queue_refuses_costs_one_question(
    counted: Bench, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is stored already: however many lanes there are, they are not counted for it."""
    monkeypatch.setattr(faasd_async, "POLL_S", 3600)
    await make_lanes(counted, 200)
    counted.config.set(max_pending=2)
    await counted.enqueue_all("a", "b")
    assert await refused(counted.enqueue()) == 429
    answers = []

    async def refuse() -> None:
        network.arrived.clear()
        assert await refused(counted.enqueue()) == 429
        answers.append(len(network.arrived))

    assert await steps_of(refuse) < 600
    assert min(answers) == 1


async def test_a_full_queue_has_room_for_as_many_as_were_claimed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, though servers are asked only once a while how many wait."""
    monkeypatch.setattr(faasd_async, "POLL_S", 3600)
    bench.config.set(max_pending=3)
    await bench.enqueue_all("a", "b", "c")
    assert await refused(bench.enqueue()) == 429
    assert await bench.claim(2) == ["a", "b"]
    await bench.enqueue_all("d", "e")
    assert await refused(bench.enqueue()) == 429


# ---- what is given back --------------------------------------------------------------------------


async def test_a_call_that_was_given_back_runs_though_its_server_forgets_that(
    counted: Bench, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came while there was no room for it; nothing has failed, and its lease is not waited for."""
    monkeypatch.setattr(faasd_async, "POLL_S", 0.2)
    assert await counted.claim() == []
    network.weaken(1)
    await counted.enqueue("first")
    await counted.until(lambda: REQUESTS in counted.woken)
    assert await counted.claim(room={"": 0}) == []
    await network.until(lambda: any(message.data == b"-NAK" for message in network.changes), "a NAK")
    assert (await counted.take_when_woken()).call_id == "first"
    assert await counted.claim() == []


def test_what_others_have_by_now_is_not_remembered_for_ever() -> None:
    """Of what is given back while much more waits, nothing tells who gets it."""
    lane = NatsLane(REQUESTS, "figlet", "consumer")
    for seq in range(3 * MANY_GIVEN_BACK):
        lane.given_back.add(seq)
        lane.given_back.add(seq)
    assert lane.waiting == MANY_GIVEN_BACK
    assert lane.first_seq == 2 * MANY_GIVEN_BACK


def test_what_comes_after_the_server_has_counted_is_not_among_the_counted() -> None:
    """Or a message that was given back would seem to be with somebody, and its loss would not be noticed."""
    lane = NatsLane(REQUESTS, "figlet", "consumer")
    lane.given_back.add(1)
    lane.arrive(Delivery(subject="work.2", reply="", data=b"", seq=2, again=False, pending=0))
    counted = {"num_pending": 1, "num_ack_pending": 1, "num_waiting": 1, "delivered": {"stream_seq": 1}}
    lane.count(counted)
    assert lane.given_back.waiting == {1}
    lane.count(counted | {"delivered": {"stream_seq": 2}})  # One is not acked, and that is here.
    assert lane.given_back.waiting == set()


async def test_a_look_at_many_lanes_lets_others_have_their_turns(bench: Bench) -> None:
    """However many there are: each takes a while to be counted."""
    parts = queue_of(bench)._parts
    names = [f"f{number}.openfaas-fn" for number in range(200)]
    await asyncio.gather(*(parts.consumers.ensure("work", REQUESTS, name) for name in names))
    lanes = [parts.lanes.queues[REQUESTS].lanes[name] for name in names]
    for lane in lanes:
        lane.pending = -1  # until it is counted
    left = [len(lanes)]  # of them, in each turn

    async def take_turns() -> None:
        while left[-1]:
            left.append(sum(lane.pending < 0 for lane in lanes))
            await asyncio.sleep(0)

    await asyncio.gather(parts.consumers.poll(), take_turns())
    assert max(before - after for before, after in itertools.pairwise(left)) < 100
