"""What every queue promises of limits: keys of which one call runs at a time, and rates of starts.

As in the contract suite, a queue is known by its protocol only.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from queues import BAD, OK, REQUESTS, STORES, Bench, NatsStore, Settings, Store, invocation, open_bench, owner, refused

from faasd_async import CallFilter, Claim, Ended, NatsQueue, Rate, rate


@pytest.fixture(params=STORES, ids=lambda store: store.__name__)
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    """An open queue on an empty store."""
    async with open_bench(Bench, request.param, tmp_path) as bench:
        yield bench


# ---- keys ----------------------------------------------------------------------------------------


async def take_all(bench: Bench) -> list[Claim]:
    """All that may be claimed now."""
    return list(await bench.claims(1000))


async def test_calls_with_one_key_are_claimed_one_at_a_time(bench: Bench) -> None:
    """In the order in which they are due; the next one wakes its queue."""
    await bench.enqueue_all("a", "b", "c", concurrency_key="k")
    for name in ("a", "b", "c"):
        work = await bench.take_when_woken()
        assert (work.call_id, work.concurrency_key) == (name, "k")
        assert await bench.claim() == []
        assert await bench.queue.complete(work, OK, "success")
    assert await bench.claim() == []


async def test_who_waits_for_a_key_holds_nobody_up(bench: Bench) -> None:
    """Neither other keys, nor calls without one; nor does it take a place in a claim."""
    await bench.enqueue_all("a", "waits", "waits too", concurrency_key="k")
    await bench.enqueue("b", concurrency_key="K")
    await bench.enqueue("c")
    assert [await bench.claim(1), await bench.claim(1), await bench.claim(1)] == [["a"], ["b"], ["c"]]
    assert await bench.claim() == []


async def test_a_key_belongs_to_one_function(bench: Bench) -> None:
    """Whose calls share it in all queues."""
    await bench.enqueue("a", concurrency_key="k")
    await bench.enqueue("b", concurrency_key="k", function="other")
    await bench.enqueue("c", concurrency_key="k", namespace="elsewhere")
    await bench.enqueue("d", concurrency_key="k", queue="slow")
    (work, *_) = await take_all(bench)
    assert (work.call_id, await bench.claim(), await bench.claim(queue="slow")) == ("a", [], [])
    assert await bench.queue.complete(work, OK, "success")
    await bench.until(lambda: "slow" in bench.woken)
    assert await bench.claim(queue="slow") == ["d"]


@pytest.mark.parametrize("end", ["completed", "tried again", "returned", "cancelled", "completed too late"])
async def test_a_key_is_free_when_an_attempt_has_ended(bench: Bench, end: str) -> None:
    """However it has ended; one that was cancelled runs until its owner says that it does not any more."""
    await bench.enqueue_all("a", "b", concurrency_key="k")
    work = await bench.take_when_woken()
    if end == "completed":
        assert await bench.queue.complete(work, OK, "success")
    elif end == "tried again":
        assert await bench.queue.retry(work, BAD, 3600.0)
    elif end == "returned":
        assert await bench.queue.retry(work, None, 3600.0)
    else:
        await bench.queue.cancel("a")
        assert await bench.claim() == []
        late = bench.queue.complete(work, OK, "success") if end == "completed too late" else None
        assert not await (late or bench.queue.retry(work, None, 0.0))
    assert (await bench.take_when_woken()).call_id == "b"


async def test_a_call_that_is_due_later_leaves_its_key_to_others(bench: Bench) -> None:
    """Also when it came first."""
    await bench.enqueue("later", concurrency_key="k", due_at=time.time() + 3600)
    await bench.enqueue("now", concurrency_key="k")
    assert await bench.claim() == ["now"]


async def test_a_call_that_becomes_due_while_its_key_is_taken_waits(bench: Bench) -> None:
    """And is next."""
    await bench.enqueue("a", concurrency_key="k")
    work = await bench.take_when_woken()
    await bench.enqueue("b", concurrency_key="k", due_at=time.time() + 0.2)
    bench.woken.clear()
    await asyncio.sleep(0.3)
    assert await bench.claim() == []
    assert await bench.queue.complete(work, OK, "success")
    assert (await bench.take_when_woken()).call_id == "b"


async def test_who_waits_for_a_key_is_seen_and_counted(bench: Bench) -> None:
    """It is a queued call as any other."""
    await bench.enqueue_all("a", "b", "c", concurrency_key="k")
    await take_all(bench)
    assert await bench.claim() == []
    assert {name: await bench.status(name) for name in "abc"} == {"a": "running", "b": "queued", "c": "queued"}
    assert await bench.listed(statuses=("queued",)) == ["c", "b"]
    assert await bench.waiting() == {"figlet.openfaas-fn": 2}
    assert (await bench.queue.stats())[REQUESTS].oldest_at <= time.time()


async def test_who_waits_for_a_key_can_be_cancelled_and_purged(bench: Bench) -> None:
    """The key goes to those that are left."""
    await bench.enqueue_all("a", "b", "c", concurrency_key="k")
    work = await bench.take_when_woken()
    assert await bench.claim() == []
    assert await bench.queue.cancel("b") == 1
    assert await bench.queue.complete(work, OK, "success")
    assert (await bench.take_when_woken()).call_id == "c"
    await bench.enqueue_all("d", "e", concurrency_key="k")
    assert await bench.claim() == []
    assert await bench.queue.purge(REQUESTS) == 2
    assert await bench.waiting() == {}


async def test_a_deadline_counts_for_who_waits_for_a_key(bench: Bench) -> None:
    """It has not started in time."""
    await bench.enqueue("a", concurrency_key="k")
    work = await bench.take_when_woken()
    await bench.enqueue("b", concurrency_key="k", deadline_at=time.time() + 0.3)
    await bench.enqueue("c", concurrency_key="k")
    assert await bench.claim() == []
    await bench.until(lambda: bench.ended)
    (ended,) = bench.ended
    assert isinstance(ended, Ended)
    assert (ended.call_id, ended.status) == ("b", "timeout")
    assert await bench.queue.complete(work, OK, "success")
    assert (await bench.take_when_woken()).call_id == "c"


async def test_a_call_that_is_queued_again_keeps_its_key(bench: Bench) -> None:
    """And waits for it."""
    await bench.enqueue("a", concurrency_key="k")
    await bench.run()
    await bench.enqueue("b", concurrency_key="k")
    work = await bench.take_when_woken()
    await bench.queue.redrive("a")
    assert await bench.claim() == []
    assert await bench.queue.complete(work, OK, "success")
    again = await bench.take_when_woken()
    assert (again.call_id, again.concurrency_key) == ("a", "k")


async def test_a_call_that_was_cancelled_runs_again_with_its_key_only_once_it_has_stopped(bench: Bench) -> None:
    """Until then its function may still work on what the key stands for."""
    await bench.enqueue("a", concurrency_key="k")
    work = await bench.take_when_woken()
    assert await bench.queue.cancel("a") == 1
    assert await refused(bench.queue.redrive("a")) == 409
    assert (await bench.queue.redrive_matching(CallFilter(statuses=("cancelled",)))).done == 0
    assert not await bench.queue.complete(work, OK, "success")  # It has stopped.
    await bench.queue.redrive("a")
    assert (await bench.take_when_woken()).call_id == "a"


async def test_a_power_cut_frees_a_key(bench: Bench) -> None:
    """What was interrupted goes behind those that waited; still one at a time."""
    await bench.enqueue_all("a", "b", concurrency_key="k")
    await bench.take_when_woken()
    assert await bench.claim() == []
    await bench.crash()
    for name in ("b", "a"):
        work = await bench.take_when_woken()
        assert (work.call_id, await bench.claim()) == (name, [])
        assert await bench.queue.complete(work, OK, "success")


@pytest.mark.parametrize("make_store", STORES)
async def test_a_killed_process_frees_its_keys(make_store: type[Store], tmp_path: Path) -> None:
    """SIGKILL between claim and end: those that waited go on, one at a time."""
    bench = Bench(make_store(tmp_path, Settings()), Settings())
    await bench.open()
    await bench.enqueue_all("a", "b", concurrency_key="k")
    await bench.queue.close()
    async with owner(make_store, tmp_path) as claimed:
        assert claimed == "a"
    await bench.open()
    for name in ("b", "a"):
        work = await bench.take_when_woken()
        assert (work.call_id, await bench.claim()) == (name, [])
        assert await bench.queue.complete(work, OK, "success")
    await bench.queue.close()


async def test_queues_on_one_stream_share_keys(tmp_path: Path) -> None:
    """Whoever frees a key has the other one look."""
    one, other = [Bench(NatsStore(tmp_path, Settings()), Settings()) for _ in range(2)]
    for bench in (one, other):
        await bench.open()
    await one.enqueue_all("a", "b", concurrency_key="k")
    work = await one.take_when_woken()
    assert await other.claim() == []
    other.woken.clear()
    assert await one.queue.complete(work, OK, "success")
    assert (await other.take_when_woken()).call_id == "b"
    for bench in (one, other):
        await bench.queue.close()


async def test_a_key_whose_call_is_gone_is_passed_on_at_a_start(tmp_path: Path) -> None:
    """Somebody has deleted it with the server's own tools."""
    store = NatsStore(tmp_path, Settings())
    bench = Bench(store, Settings())
    await bench.open()
    await bench.enqueue_all("a", "b", "c", concurrency_key="k")
    work = await bench.take_when_woken()
    assert await bench.claim() == []
    queue = bench.queue
    assert isinstance(queue, NatsQueue)
    for root in ("call", "work"):
        await queue._link.api(f"STREAM.PURGE.{store.name}", {"filter": f"{store.name}.{root}.>"})
    assert not await queue.complete(work, OK, "success")
    await bench.reopen()
    for name in ("b", "c"):
        work = await bench.take_when_woken()
        assert work.call_id == name
        assert await bench.queue.complete(work, OK, "success")
    await bench.queue.close()


async def test_many_keys_are_claimed_at_once(bench: Bench) -> None:
    """A key is nothing that there are few of."""
    await asyncio.gather(*(bench.enqueue(str(number), concurrency_key=f"k{number % 100}") for number in range(200)))
    first = await take_all(bench)
    assert sorted(work.concurrency_key or "" for work in first) == sorted(f"k{number}" for number in range(100))
    await asyncio.gather(*(bench.queue.complete(work, OK, "success") for work in first))
    second: list[Claim] = []
    while len(second) < 100:
        second.append(await bench.take_when_woken())
    assert {work.call_id for work in (*first, *second)} == {str(number) for number in range(200)}


# ---- rates ---------------------------------------------------------------------------------------

LANE = "figlet.openfaas-fn"
SLOW = {LANE: rate("1/1h")}


async def starts(bench: Bench, number: int, rates: Mapping[str, Rate]) -> list[float]:
    """When so many calls have started, claimed by one who asks for all there is whenever the queue says so."""
    found: list[float] = []
    while True:
        bench.woken.clear()
        claims = await bench.claims(rates=rates)
        found += [(await bench.queue.lookup(work.id)).started_at or 0.0 for work in claims]
        if len(found) >= number:
            return found
        await bench.until(lambda: REQUESTS in bench.woken)


@pytest.mark.parametrize("limited", [LANE, ""], ids=["lane", "queue"])
async def test_starts_are_spread_over_the_time_of_a_rate(bench: Bench, limited: str) -> None:
    """The queue says when the next may start; what is late may catch up a little."""
    await bench.enqueue_all(*"abcdef")
    limit = rate("10/2s")
    begun = time.time()
    waited = [at - begun for at in await starts(bench, 6, {limited: limit})]
    catch_up_s = limit.period_s / 10
    assert all(at > number * limit.interval_s - catch_up_s - 0.01 for number, at in enumerate(waited)), waited
    assert await bench.claims() == []


async def test_a_lane_at_its_rate_holds_nobody_up(bench: Bench) -> None:
    """Others of its queue are claimed, before and behind it."""
    await bench.enqueue_all("a", "b")
    await bench.enqueue_all("c", "d", function="other")
    found = [work.call_id for work in await bench.claims(rates=SLOW)]
    assert sorted(found) == ["a", "c", "d"]
    await bench.enqueue("e", function="other")
    assert [work.call_id for work in await bench.claims(1, rates=SLOW)] == ["e"]
    assert await bench.waiting() == {LANE: 1}


async def test_a_queue_at_its_rate_leaves_others_alone(bench: Bench) -> None:
    """Its own calls take turns at it."""
    rates = {"": rate("1/1h")}
    await bench.enqueue_all("a", "b")
    await bench.enqueue("c", queue="slow")
    assert [work.call_id for work in await bench.claims(rates=rates)] == ["a"]
    assert await bench.claims(rates=rates) == []
    assert [work.call_id for work in await bench.claims(queue="slow", rates=rates)] == ["c"]


async def test_another_attempt_is_another_start(bench: Bench) -> None:
    """A function that is tried again is called again."""
    await bench.enqueue("a")
    (work,) = await bench.claims(rates=SLOW)
    assert await bench.queue.retry(work, BAD, 0.0)
    assert await bench.claims(rates=SLOW) == []
    assert await bench.claim() == ["a"]


@pytest.mark.parametrize("end", ["restart", "crash"])
async def test_a_start_is_remembered(bench: Bench, end: str) -> None:
    """Who comes next begins with no burst."""
    rates = {LANE: rate("2/1h"), "": rate("1/1h")}
    await bench.enqueue_all("a", "b")
    assert [work.call_id for work in await bench.claims(rates=rates)] == ["a"]
    await (bench.reopen() if end == "restart" else bench.crash())
    assert await bench.claims(rates=rates) == []
    assert await bench.claims(rates=SLOW) == []
    assert sorted(await bench.claim()) == ["a", "b"]


async def test_a_rate_that_is_another_one_counts_at_once(bench: Bench) -> None:
    """After a reload, whatever has been waited for before."""
    await bench.enqueue_all(*"abc")
    for rates in (SLOW, {LANE: rate("1/30m")}, {}):
        assert len(await bench.claims(1, rates=rates)) == 1
        assert await bench.claims(rates=SLOW) == []


async def test_a_call_that_was_never_queued_is_a_start_too(bench: Bench) -> None:
    """It is counted with the others, or told when there may be one."""
    limit = SLOW[LANE]
    assert await bench.queue.start(LANE, limit) == 0.0
    assert 3500 < await bench.queue.start(LANE, limit) <= 3600
    await bench.enqueue("a")
    assert await bench.claims(rates=SLOW) == []
    assert await bench.queue.start("other.openfaas-fn", limit) == 0.0


async def test_calls_that_wait_for_their_rate_are_claimed_once_each(bench: Bench) -> None:
    """None is lost, none is there twice, in their order."""
    calls = [invocation(str(number)) for number in range(40)]
    await asyncio.gather(*(bench.queue.enqueue(call) for call in calls))
    found: list[str] = []
    while len(found) < 40:
        bench.woken.clear()
        claims = await bench.claims(3, rates={LANE: rate("200/1s"), "": rate("190/1s")})
        found += [work.call_id for work in claims]
        if not claims:
            await bench.until(lambda: REQUESTS in bench.woken)
    assert sorted(found, key=int) == [str(number) for number in range(40)]


async def test_queues_on_one_stream_share_a_rate(tmp_path: Path) -> None:
    """Both together start no more; what one has not used after all, the other can."""
    one, other = [Bench(NatsStore(tmp_path, Settings()), Settings()) for _ in range(2)]
    for bench in (one, other):
        await bench.open()
    await one.enqueue_all("a", "b")
    assert [len(await bench.claims(rates=SLOW)) for bench in (one, other)] == [1, 0]
    assert await other.queue.start(LANE, SLOW[LANE]) > 0
    for bench in (one, other):
        await bench.queue.close()
