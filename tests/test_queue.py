"""The queue: what it promises to gateway and consumers, on every store there is, and what SQLite adds to it.

The contract suite knows a queue by its protocol only. Another implementation joins in with one more entry in `STORES`:
a class that makes queues on a folder and can take their power away.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from unittest import mock

import pytest
from conftest import Clock
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import faasd_async
from faasd_async import (
    CALLBACKS,
    FINAL,
    Claim,
    Config,
    Ended,
    Invocation,
    Metrics,
    Outcome,
    Queue,
    RecordQuery,
    Refused,
    SqliteFile,
    SqliteQueue,
    StoreError,
    StoreLocked,
    new_id,
    pack_headers,
    parse_config,
    rfc3339,
)

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
REQUESTS = "faas-request"

# How long anything that is waited for may take before the test fails. Never reached when all is well.
PATIENCE = 20.0

ANSWER_HEADERS = ((b"Content-Type", b"text/plain"), (b"X-Twice", b"1"), (b"X-Twice", b"2"))
OK = Outcome(200, True, 0.25, ANSWER_HEADERS, b"done", 4)
BAD = Outcome(500, False, 0.5, (), b"oops", 4, b"on stderr", "function figlet answered 500")
LATE = Outcome(504, False, 300.0, error="function figlet did not answer in time", answered=False)
SINK = "http://sink.example.org/outcome"


# ---- stores: what a test needs beside the queue itself ---------------------------------------------------------


class Settings:
    """The configuration as the queue sees it. A test changes it as a reload does."""

    def __init__(self) -> None:
        self.set()

    def __call__(self) -> Config:
        return self.config

    def set(self, calls: Mapping[str, Any] | None = None, **queue: Any) -> None:
        """Keys of [calls], and of the default queue."""
        self.config = parse_config({"calls": calls or {}, "queues": {REQUESTS: queue}})


class Store(Protocol):
    """What keeps the calls while no queue is open."""

    def queue(self) -> Queue:
        """A new queue on it, not yet open."""

    async def cut_power(self, queue: Queue) -> None:
        """Keep what is there at this moment, and nothing that the open queue does from now on."""


class SqliteStore:
    """A file in a folder."""

    def __init__(self, folder: Path, config: Callable[[], Config]) -> None:
        self.path = folder / "calls.db"
        self.config = config
        self.metrics = Metrics()

    def queue(self) -> SqliteQueue:
        """A new queue on the file."""
        return SqliteQueue(self.path, self.config, self.metrics)

    async def cut_power(self, queue: Queue) -> None:
        """Copy the file and its log while they are open."""
        copy = self._copy()
        await queue.close()
        self.path = copy

    def _copy(self) -> Path:
        folder = self.path.parent / "later"
        folder.mkdir()
        for path in self.path.parent.glob("calls.db*"):
            shutil.copy(path, folder)
        return folder / self.path.name


STORES: list[Callable[[Path, Callable[[], Config]], Store]] = [SqliteStore]


class Bench:
    """A queue on a store, with all that it tells its owner."""

    def __init__(self, store: Store, config: Settings) -> None:
        self.store = store
        self.config = config
        self.queue: Queue
        self.woken: list[str] = []
        self.stopped: list[int] = []
        self.ended: list[Ended] = []
        self._news = asyncio.Event()

    # -- lifecycle

    async def open(self) -> None:
        """Open a new queue on what is stored."""
        self.queue = self.store.queue()
        await self.queue.open(*(self._note(kind) for kind in (self.woken, self.stopped, self.ended)))

    def _note(self, notes: list[Any]) -> Callable[[Any], None]:
        def note(item: Any) -> None:
            notes.append(item)
            self._news.set()

        return note

    async def reopen(self) -> None:
        """An orderly restart."""
        await self.queue.close()
        await self.open()

    async def crash(self) -> None:
        """A restart after a power cut."""
        await self.store.cut_power(self.queue)
        await self.open()

    # -- what tests do again and again

    async def enqueue(self, call_id: str | None = None, **changes: Any) -> str:
        """Store a call; the id to answer with."""
        return await self.queue.enqueue(invocation(call_id, **changes))

    async def enqueue_all(self, *call_ids: str, **changes: Any) -> None:
        """Store calls, one after the other."""
        for call_id in call_ids:
            await self.enqueue(call_id, **changes)

    async def claim(self, limit: int = 1000, queue: str = REQUESTS, room: Mapping[str, int] | None = None) -> list[str]:
        """The call ids of what is handed out."""
        return [work.call_id for work in await self.queue.claim(queue, limit, room or {})]

    async def take(self, queue: str = REQUESTS) -> Claim:
        """The only thing that is due."""
        (work,) = await self.queue.claim(queue, 1000, {})
        return work

    async def run(self, outcome: Outcome = OK, status: str = "success", queue: str = REQUESTS) -> Claim:
        """Take the only thing that is due and make it final."""
        work = await self.take(queue)
        assert await self.queue.complete(work, outcome, status)
        return work

    async def deliver(self, outcome: Outcome = OK, status: str = "delivered") -> Claim:
        """Take the only callback that is due and make it final."""
        return await self.run(outcome, status, CALLBACKS)

    async def status(self, call_id: str) -> str:
        """The state of a call."""
        return str((await self.queue.lookup(call_id))["status"])

    async def listed(self, **query: Any) -> list[str]:
        """The call ids of the records that match."""
        found, _ = await self.queue.records(RecordQuery(**query))
        return [record["call_id"] for record in found]

    async def waiting(self, queue: str = REQUESTS) -> dict[str, int]:
        """How many calls wait, by lane."""
        stats = await self.queue.stats()
        return dict(stats[queue].waiting) if queue in stats else {}

    async def until(self, happened: Callable[[], object]) -> None:
        """Wait for something that the queue tells."""
        async with asyncio.timeout(PATIENCE):
            while not happened():
                self._news.clear()
                await self._news.wait()

    async def take_when_woken(self) -> Claim:
        """Ask when the queue says so, as a consumer does."""
        while True:
            self.woken.clear()
            if found := await self.queue.claim(REQUESTS, 1, {}):
                return found[0]
            await self.until(lambda: REQUESTS in self.woken)


def invocation(call_id: str | None = None, **changes: Any) -> Invocation:
    """A call that is due now."""
    now, own = time.time(), new_id()
    call = Invocation(
        id=own, call_id=call_id or own, function="figlet", namespace="openfaas-fn", queue=REQUESTS,
        start_time=round(now * 1e9), due_at=now, deadline_at=None, max_attempts=10, callback_url=None, failure_url=None,
        idempotency_key=None, app=None, target="/a%2Fb?c=d", headers=pack_headers([(b"X-A", b"1")]), body=b"body",
    )  # fmt: skip
    return call._replace(**changes)


async def refused(attempt: Awaitable[object]) -> int:
    """The HTTP status with which something is refused."""
    with pytest.raises(Refused) as caught:
        await attempt
    assert "\n" not in caught.value.text
    return caught.value.status


@pytest.fixture(params=STORES, ids=lambda store: store.__name__)
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    """An open queue on an empty store."""
    config = Settings()
    found = Bench(request.param(tmp_path, config), config)
    await found.open()
    yield found
    await found.queue.close()


# ---- enqueue ---------------------------------------------------------------------------------------------------


async def test_an_accepted_call_survives_a_power_cut(bench: Bench) -> None:
    """It is durable when enqueue returns."""
    await bench.enqueue("a")
    await bench.crash()
    assert await bench.claim() == ["a"]


async def test_an_accepted_call_survives_a_restart(bench: Bench) -> None:
    """An orderly one, that is."""
    await bench.enqueue("a")
    await bench.reopen()
    assert await bench.claim() == ["a"]


async def test_enqueue_answers_with_the_call_id(bench: Bench) -> None:
    """The caller's own one, or the one that the call was given."""
    call = invocation()
    assert [await bench.queue.enqueue(call), await bench.enqueue("mine")] == [call.id, "mine"]


async def test_the_same_call_twice_is_stored_once(bench: Bench) -> None:
    """Whoever did not hear the answer may ask again."""
    call = invocation("a")
    assert [await bench.queue.enqueue(call), await bench.queue.enqueue(call)] == ["a", "a"]
    assert await bench.claim() == ["a"]


async def test_the_same_call_twice_at_once_is_stored_once(bench: Bench) -> None:
    """Also when both arrive before one of them is on disk."""
    call = invocation("a")
    assert await asyncio.gather(*(bench.queue.enqueue(call) for _ in range(3))) == ["a", "a", "a"]
    assert await bench.claim() == ["a"]


async def test_a_call_that_is_stored_already_is_accepted_by_a_full_queue(bench: Bench) -> None:
    """Nothing more is queued for it."""
    bench.config.set(max_pending=1)
    call = invocation("a")
    await bench.queue.enqueue(call)
    assert await bench.queue.enqueue(call) == "a"


async def test_a_call_that_comes_twice_does_not_hide_what_ends_meanwhile(bench: Bench) -> None:
    """Both are stored at once, and both are told."""
    call = invocation("again", queue="other")
    await bench.queue.enqueue(call)
    await bench.enqueue("a")
    await asyncio.gather(bench.queue.complete(await bench.take(), OK, "success"), bench.queue.enqueue(call))
    assert [end.call_id for end in bench.ended] == ["a"]


async def test_many_calls_at_once_are_all_stored(bench: Bench) -> None:
    """None is lost among those that share a commit."""
    calls = [invocation(f"call-{number}") for number in range(700)]
    assert await asyncio.gather(*map(bench.queue.enqueue, calls)) == [call.call_id for call in calls]
    await bench.crash()
    assert await bench.claim() == [call.call_id for call in calls]


async def test_a_new_call_wakes_its_queue(bench: Bench) -> None:
    """And no other."""
    bench.woken.clear()
    await bench.enqueue("a")
    await bench.until(lambda: bench.woken)
    assert set(bench.woken) == {REQUESTS}


async def test_calls_that_wait_at_a_start_wake_their_queue(bench: Bench) -> None:
    """Nobody has to ask in order to find them."""
    await bench.enqueue("a")
    bench.woken.clear()
    await bench.reopen()
    await bench.until(lambda: REQUESTS in bench.woken)


async def test_a_closed_queue_stores_nothing(bench: Bench) -> None:
    """It says so instead of keeping the caller waiting."""
    await bench.queue.close()
    with pytest.raises(StoreError):
        await bench.enqueue("a")
    await bench.open()
    assert await bench.claim() == []


async def test_a_call_that_comes_while_the_queue_closes_is_answered(bench: Bench) -> None:
    """It is stored or refused; nobody is left waiting."""
    first = asyncio.ensure_future(bench.enqueue("first", body=bytes(30_000_000)))
    closing = asyncio.create_task(bench.queue.close())
    await asyncio.wait([closing], timeout=0)
    async with asyncio.timeout(PATIENCE / 4):
        with contextlib.suppress(StoreError):
            await bench.enqueue("second")
        await asyncio.gather(first, closing)
    await bench.open()


# ---- claim -----------------------------------------------------------------------------------------------------


async def test_a_claim_has_all_that_came_in(bench: Bench) -> None:
    """The request byte for byte, and what is to be done with the outcome."""
    call = invocation(
        "a", callback_url=SINK, failure_url=SINK + "/bad", max_attempts=3, target="//x/%20?", body=b"\x00\xff",
        headers=pack_headers([(b"X-A", b"\xe4"), (b"x-a", b"")]),
    )  # fmt: skip
    await bench.queue.enqueue(call)
    work = await bench.take()
    names = {*Claim._fields} & {*Invocation._fields}
    assert names >= {"function", "target", "headers", "body", "callback_url", "failure_url", "start_time"}
    assert {name: getattr(work, name) for name in names} == {name: getattr(call, name) for name in names}


async def test_a_claim_charges_an_attempt(bench: Bench) -> None:
    """As soon as it is handed out, not when it ends."""
    await bench.enqueue("a", max_attempts=3)
    work = await bench.take()
    record = await bench.queue.lookup("a")
    assert (work.attempt, work.runs, record["attempts"], record["status"]) == (1, 1, 1, "running")


async def test_a_claimed_call_is_not_handed_out_again(bench: Bench) -> None:
    """It has one owner."""
    await bench.enqueue("a")
    assert [await bench.claim(), await bench.claim()] == [["a"], []]


async def test_a_claim_returns_only_calls_of_its_queue(bench: Bench) -> None:
    """Each queue has its own consumer."""
    await bench.enqueue("a", queue="one")
    await bench.enqueue("b", queue="two")
    assert [await bench.claim(queue="two"), await bench.claim(queue="one")] == [["b"], ["a"]]


async def test_an_unknown_queue_is_empty(bench: Bench) -> None:
    """Nothing was ever put into it."""
    assert await bench.claim(queue="nowhere") == []


async def test_calls_of_a_lane_are_handed_out_by_due_time(bench: Bench) -> None:
    """Whatever the order in which they came."""
    now = time.time()
    for call_id, age in (("third", 1), ("first", 3), ("second", 2)):
        await bench.enqueue(call_id, due_at=now - age)
    assert await bench.claim() == ["first", "second", "third"]


async def test_calls_that_are_due_at_once_are_handed_out_as_they_came(bench: Bench) -> None:
    """First in, first out."""
    now, names = time.time(), [f"call-{number}" for number in range(20)]
    await bench.enqueue_all(*names, due_at=now)
    assert [await bench.claim(7), await bench.claim(7), await bench.claim(7)] == [names[:7], names[7:14], names[14:]]


async def test_lanes_take_turns(bench: Bench) -> None:
    """A burst for one function does not hold up the others."""
    await bench.enqueue_all("a1", "a2", "a3", "a4", function="a")
    await bench.enqueue_all("b1", "b2", function="b")
    await bench.enqueue_all("c1", function="c")
    found = [(await bench.claim(1))[0] for _ in range(7)]
    assert found == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


async def test_one_claim_is_shared_by_lanes(bench: Bench) -> None:
    """Many free slots do not all go to the one that came first."""
    await bench.enqueue_all(*(f"a{number}" for number in range(50)), function="a")
    await bench.enqueue_all(*(f"b{number}" for number in range(50)), function="b")
    found = Counter(call_id[0] for call_id in await bench.claim(20))
    assert min(found["a"], found["b"]) >= 5


async def test_a_lane_that_comes_after_a_burst_is_served_soon(bench: Bench) -> None:
    """It waits for one turn of the others, not for the burst."""
    await bench.enqueue_all(*(f"a{number}" for number in range(100)), function="a")
    await bench.claim(10)
    await bench.enqueue("b", function="b")
    assert "b" in [*await bench.claim(1), *await bench.claim(1)]


async def test_an_empty_lane_leaves_its_share_to_others(bench: Bench) -> None:
    """No slot stays free while something is due."""
    await bench.enqueue("b1", function="b")
    await bench.enqueue_all(*(f"a{number}" for number in range(50)), function="a")
    assert len(await bench.claim(20)) == 20


async def test_functions_of_two_namespaces_are_two_lanes(bench: Bench) -> None:
    """They only share a name."""
    await bench.enqueue_all("a1", "a2", namespace="one")
    await bench.enqueue_all("b1", "b2", namespace="two")
    assert [(await bench.claim(1))[0] for _ in range(4)] == ["a1", "b1", "a2", "b2"]


async def test_a_queue_that_is_not_fair_is_first_in_first_out(bench: Bench) -> None:
    """Across all functions."""
    bench.config.set(fair=False)
    names = ["a1", "a2", "b1", "c1", "b2", "a3"]
    for name in names:
        await bench.enqueue(name, function=name[0])
    assert [*await bench.claim(1), *await bench.claim(2), *await bench.claim(10)] == names


async def test_a_cancelled_call_does_not_change_the_order_of_a_queue_that_is_not_fair(bench: Bench) -> None:
    """What comes after it in its lane does not move up to its place."""
    bench.config.set(fair=False)
    for name in ("a1", "b1", "a2", "b2"):
        await bench.enqueue(name, function=name[0])
    await bench.queue.cancel("a1")
    assert await bench.claim() == ["b1", "a2", "b2"]


async def test_a_queue_that_becomes_fair_serves_every_lane(bench: Bench) -> None:
    """A reload may change it while calls wait."""
    bench.config.set(fair=False)
    for name in ("a1", "b1", "a2", "a3", "a4", "a5", "b2"):
        await bench.enqueue(name, function=name[0])
    await bench.claim(1)
    bench.config.set(fair=True)
    found = [(await bench.claim(1))[0] for _ in range(3)]
    assert {call_id[0] for call_id in found} == {"a", "b"}


@pytest.mark.parametrize("fair", [True, False])
async def test_no_more_than_the_limit_is_handed_out(bench: Bench, fair: bool) -> None:
    """However many lanes there are."""
    bench.config.set(fair=fair)
    for number in range(30):
        await bench.enqueue(f"call-{number}", function=f"f{number % 5}")
    assert [len(await bench.claim(7)) for _ in range(5)] == [7, 7, 7, 7, 2]


@pytest.mark.parametrize("fair", [True, False])
async def test_no_more_than_the_room_of_a_lane_is_handed_out(bench: Bench, fair: bool) -> None:
    """A function's own limit, which others do not share."""
    bench.config.set(fair=fair)
    await bench.enqueue_all("a1", "a2", "a3", function="a")
    await bench.enqueue_all("b1", "b2", "b3", function="b")
    found = await bench.claim(room={"a.openfaas-fn": 1})
    assert sorted(found) == ["a1", "b1", "b2", "b3"]


async def test_a_lane_without_room_of_its_own_has_the_common_one(bench: Bench) -> None:
    """`room[""]` is for every lane that is not named."""
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        await bench.enqueue(name, function=name[0])
    found = await bench.claim(room={"": 1, "a.openfaas-fn": 2})
    assert sorted(found) == ["a1", "a2", "b1", "c1"]


async def test_a_lane_without_any_room_is_passed_over(bench: Bench) -> None:
    """It keeps its calls, and nobody waits for it."""
    await bench.enqueue("a1", function="a")
    await bench.enqueue("b1", function="b")
    assert await bench.claim(1, room={"a.openfaas-fn": 0}) == ["b1"]


async def test_what_found_no_room_is_handed_out_later(bench: Bench) -> None:
    """As soon as it is asked for with more room."""
    await bench.enqueue_all("a1", "a2")
    await bench.claim(room={"figlet.openfaas-fn": 1})
    assert await bench.claim() == ["a2"]


async def test_a_delayed_call_is_not_handed_out_before_its_time(bench: Bench) -> None:
    """Those behind it that are due are."""
    await bench.enqueue("later", due_at=time.time() + 3600)
    await bench.enqueue("now")
    assert await bench.claim() == ["now"]


async def test_a_delayed_call_wakes_its_queue_when_its_time_has_come(bench: Bench) -> None:
    """The consumer that found nothing is told when to ask again."""
    due_at = time.time() + 0.2
    await bench.enqueue("later", due_at=due_at)
    work = await bench.take_when_woken()
    assert work.call_id == "later"
    assert time.time() >= due_at


async def test_a_delayed_call_wakes_its_queue_after_a_restart(bench: Bench) -> None:
    """Its time is stored with it."""
    due_at = time.time() + 0.3
    await bench.enqueue("later", due_at=due_at)
    await bench.reopen()
    assert (await bench.take_when_woken()).call_id == "later"
    assert time.time() >= due_at


async def test_an_earlier_call_wakes_its_queue_before_a_later_one(bench: Bench) -> None:
    """A long delay does not keep a shorter one waiting."""
    await bench.enqueue("later", due_at=time.time() + 3600)
    await bench.claim()
    await bench.enqueue("sooner", due_at=time.time() + 0.1)
    assert (await bench.take_when_woken()).call_id == "sooner"


# ---- complete --------------------------------------------------------------------------------------------------


async def test_a_completed_call_is_final(bench: Bench) -> None:
    """The record tells what happened."""
    await bench.enqueue("a", body=b"12345")
    work = await bench.take()
    assert await bench.queue.complete(work, BAD, "error")
    record = await bench.queue.lookup("a")
    expected = {
        "status": "error", "attempts": 1, "http_status": 500, "error": BAD.error, "duration_seconds": 0.5,
        "interrupted": 0, "request_bytes": 5, "response_bytes": 4, "due_at": None, "max_attempts": 10,
        "function": "figlet", "namespace": "openfaas-fn", "queue": REQUESTS,
        "created_at": rfc3339(work.start_time / 1e9),
        "callback": {"url": None, "status": "none", "attempts": 0, "http_status": None, "error": None},
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert record["created_at"] <= record["started_at"] <= record["completed_at"]


async def test_a_completed_call_is_told_once(bench: Bench) -> None:
    """Whoever waits for its end hears of it."""
    await bench.enqueue("a")
    await bench.run()
    assert bench.ended == [Ended("a", "figlet", "success", 1, 0.25, 200, None)]


async def test_a_call_is_completed_once(bench: Bench) -> None:
    """The second one to end it is told that it was too late, and changes nothing."""
    await bench.enqueue("a")
    work = await bench.run(OK, "success")
    before = await bench.queue.lookup("a")
    assert not await bench.queue.complete(work, BAD, "error")
    assert (await bench.queue.lookup("a"), len(bench.ended)) == (before, 1)


async def test_two_ends_of_one_call_at_once_are_one(bench: Bench) -> None:
    """Also when both share a commit."""
    await bench.enqueue("a")
    work = await bench.take()
    ends = [bench.queue.complete(work, OK, "success") for _ in range(3)]
    assert sorted(await asyncio.gather(*ends)) == [False, False, True]


async def test_a_completed_call_stays_final_across_a_power_cut(bench: Bench) -> None:
    """It does not run again."""
    await bench.enqueue("a")
    await bench.run()
    await bench.crash()
    assert (await bench.claim(), await bench.status("a")) == ([], "success")


async def test_a_call_without_a_callback_url_leaves_nothing_to_do(bench: Bench) -> None:
    """Nobody asked to be told."""
    await bench.enqueue("a")
    await bench.run()
    assert await bench.claim(queue=CALLBACKS) == []


async def test_an_outcome_becomes_a_callback(bench: Bench) -> None:
    """With all that the sender needs."""
    await bench.enqueue("a", callback_url=SINK, max_attempts=7)
    start_time = (await bench.run()).start_time
    work = await bench.take(CALLBACKS)
    assert (work.call_id, work.function, work.queue, work.target) == ("a", "figlet", CALLBACKS, SINK)
    assert (work.body, work.headers, work.http_status) == (b"done", pack_headers(ANSWER_HEADERS), 200)
    assert (work.duration_s, work.start_time, work.max_attempts) == (0.25, start_time, 7)
    assert (work.attempt, work.runs) == (1, 1)


async def test_a_callback_wakes_its_queue(bench: Bench) -> None:
    """The sender hears of it at once."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    await bench.until(lambda: CALLBACKS in bench.woken)


async def test_a_callback_without_an_answer_has_no_body(bench: Bench) -> None:
    """A timeout has nothing to pass on but its status."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run(LATE, "timeout")
    work = await bench.take(CALLBACKS)
    assert (work.body, work.headers, work.http_status) == (b"", b"", 504)


async def test_a_callback_has_the_whole_answer(bench: Bench) -> None:
    """Only what is kept for people is cut."""
    bench.config.set({"keep_output": 4})
    await bench.enqueue("a", callback_url=SINK)
    await bench.run(OK._replace(body=b"0123456789", size=10))
    assert (await bench.take(CALLBACKS)).body == b"0123456789"


async def test_a_callback_is_stored_together_with_the_outcome(bench: Bench) -> None:
    """A power cut right after the end of a call does not lose it."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    await bench.crash()
    assert (await bench.claim(), await bench.claim(queue=CALLBACKS)) == ([], ["a"])


@pytest.mark.parametrize(
    ("outcome", "status", "target"),
    [(OK, "success", SINK), (BAD, "error", SINK + "/bad"), (LATE, "timeout", SINK + "/bad")],
)
async def test_failures_go_to_their_own_url(bench: Bench, outcome: Outcome, status: str, target: str) -> None:
    """Where there is one, instead of the other; the record shows which."""
    await bench.enqueue("a", callback_url=SINK, failure_url=SINK + "/bad")
    await bench.run(outcome, status)
    record = await bench.queue.lookup("a")
    assert ((await bench.take(CALLBACKS)).target, record["callback"]["url"]) == (target, target)


async def test_a_success_does_not_go_to_the_failure_url(bench: Bench) -> None:
    """With no other one, nobody is told."""
    await bench.enqueue("a", failure_url=SINK)
    await bench.run()
    assert (await bench.queue.lookup("a"))["callback"]["status"] == "none"


async def test_callbacks_to_two_hosts_take_turns(bench: Bench) -> None:
    """Many for one host do not hold up the others."""
    for call_id, host in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b")):
        await bench.enqueue(call_id, callback_url=f"http://{host}/")
        await bench.run()
    assert [(await bench.claim(1, CALLBACKS))[0] for _ in range(4)] == ["a1", "b1", "a2", "a3"]


@pytest.mark.parametrize(("outcome", "status"), [(OK, "delivered"), (BAD, "failed")])
async def test_a_callback_becomes_final(bench: Bench, outcome: Outcome, status: str) -> None:
    """The record tells what became of it; the call's own state stays."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    await bench.deliver(outcome, status)
    record = await bench.queue.lookup("a")
    callback = {"url": SINK, "status": status, "attempts": 1, "http_status": outcome.status, "error": outcome.error}
    assert (record["status"], record["callback"]) == ("success", callback)


async def test_a_callback_is_final_once(bench: Bench) -> None:
    """The second one to end it is told that it was too late."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    work = await bench.deliver()
    assert not await bench.queue.complete(work, BAD, "failed")
    assert (await bench.queue.lookup("a"))["callback"]["status"] == "delivered"


async def test_credentials_in_a_callback_url_are_used_and_not_shown(bench: Bench) -> None:
    """The record is for people, the claim for the sender."""
    await bench.enqueue("a", callback_url="http://user:secret@sink/")
    await bench.run()
    record = await bench.queue.lookup("a")
    assert ((await bench.take(CALLBACKS)).target, record["callback"]["url"]) == (
        "http://user:secret@sink/",
        "http://sink/",
    )


# ---- retry -----------------------------------------------------------------------------------------------------


async def test_a_charged_retry_is_the_next_attempt(bench: Bench) -> None:
    """The record shows why."""
    await bench.enqueue("a")
    assert await bench.queue.retry(await bench.take(), BAD, 0.0)
    record = await bench.queue.lookup("a")
    assert (record["status"], record["attempts"], record["http_status"], record["error"]) == (
        "queued",
        1,
        500,
        BAD.error,
    )
    assert (await bench.take()).attempt == 2


async def test_an_uncharged_retry_never_happened(bench: Bench) -> None:
    """The attempt that a shutdown cut short is made again."""
    await bench.enqueue("a")
    assert await bench.queue.retry(await bench.take(), None, 0.0)
    assert (await bench.queue.lookup("a"))["attempts"] == 0
    assert (await bench.take()).attempt == 1


async def test_an_uncharged_retry_leaves_what_the_attempt_before_it_gave(bench: Bench) -> None:
    """The record goes on showing why the call is tried again."""
    await bench.enqueue("a")
    await bench.queue.retry(await bench.take(), BAD, 0.0)
    await bench.queue.retry(await bench.take(), None, 0.0)
    record = await bench.queue.lookup("a")
    assert (record["attempts"], record["http_status"], record["error"]) == (1, 500, BAD.error)


async def test_a_retry_waits_for_its_time(bench: Bench) -> None:
    """Until then the call is delayed, and the record tells until when."""
    await bench.enqueue("a")
    await bench.queue.retry(await bench.take(), BAD, 3600.0)
    record = await bench.queue.lookup("a")
    assert (await bench.claim(), record["status"]) == ([], "delayed")
    assert (rfc3339(time.time() + 3500) or "") < record["due_at"] < (rfc3339(time.time() + 3601) or "")


async def test_a_retry_wakes_its_queue_when_its_time_has_come(bench: Bench) -> None:
    """As any delayed call does."""
    await bench.enqueue("a")
    await bench.queue.retry(await bench.take(), BAD, 0.1)
    assert (await bench.take_when_woken()).attempt == 2


async def test_a_retry_is_durable(bench: Bench) -> None:
    """Attempts are not given back by a power cut."""
    await bench.enqueue("a")
    await bench.queue.retry(await bench.take(), BAD, 0.0)
    await bench.crash()
    record = await bench.queue.lookup("a")
    assert ((await bench.take()).attempt, record["interrupted"]) == (2, 0)


async def test_a_retried_call_is_not_final(bench: Bench) -> None:
    """Nobody is told of an end."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.queue.retry(await bench.take(), BAD, 0.0)
    assert (bench.ended, await bench.claim(queue=CALLBACKS)) == ([], [])


async def test_a_charged_retry_of_a_callback_is_the_next_delivery(bench: Bench) -> None:
    """The function does not run again."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    assert await bench.queue.retry(await bench.take(CALLBACKS), BAD, 0.0)
    record = await bench.queue.lookup("a")
    callback = {"url": SINK, "status": "pending", "attempts": 1, "http_status": 500, "error": BAD.error}
    assert (record["callback"], record["attempts"], await bench.claim()) == (callback, 1, [])
    work = await bench.take(CALLBACKS)
    assert (work.attempt, work.runs, work.body) == (2, 1, b"done")


async def test_an_uncharged_retry_of_a_callback_never_happened(bench: Bench) -> None:
    """The delivery that a shutdown cut short is made again."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    assert await bench.queue.retry(await bench.take(CALLBACKS), None, 0.0)
    assert (await bench.queue.lookup("a"))["callback"]["attempts"] == 0
    assert (await bench.take(CALLBACKS)).attempt == 1


async def test_a_callback_that_got_no_answer_has_no_http_status(bench: Bench) -> None:
    """A connection that failed is not a 502 of the other side."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    await bench.queue.retry(await bench.take(CALLBACKS), LATE, 0.0)
    record = await bench.queue.lookup("a")
    assert (record["callback"]["http_status"], record["callback"]["error"]) == (None, LATE.error)


# ---- cancel ----------------------------------------------------------------------------------------------------


async def test_a_waiting_call_is_cancelled(bench: Bench) -> None:
    """It never runs, and its end is told."""
    await bench.enqueue("a")
    assert await bench.queue.cancel("a") == 1
    assert (await bench.claim(), await bench.status("a"), await bench.waiting()) == ([], "cancelled", {})
    assert bench.ended == [Ended("a", "figlet", "cancelled", 0)]


async def test_a_delayed_call_is_cancelled(bench: Bench) -> None:
    """It does not have to become due first."""
    await bench.enqueue("a", due_at=time.time() + 3600)
    assert (await bench.queue.cancel("a"), await bench.status("a")) == (1, "cancelled")


async def test_a_running_call_is_cancelled_and_its_owner_told(bench: Bench) -> None:
    """So that it can end the function."""
    await bench.enqueue("a")
    work = await bench.take()
    assert await bench.queue.cancel("a") == 1
    assert (bench.stopped, await bench.status("a")) == ([work.token], "cancelled")


async def test_a_waiting_call_that_is_cancelled_stops_nobody(bench: Bench) -> None:
    """There is no owner yet."""
    await bench.enqueue("a")
    await bench.queue.cancel("a")
    assert bench.stopped == []


async def test_a_pending_callback_is_cancelled(bench: Bench) -> None:
    """The call stays as it ended; the callback has failed."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    assert await bench.queue.cancel("a") == 1
    record = await bench.queue.lookup("a")
    assert (record["status"], record["callback"]["status"], await bench.claim(queue=CALLBACKS)) == (
        "success",
        "failed",
        [],
    )
    assert len(bench.ended) == 1


async def test_a_callback_that_is_being_sent_is_cancelled_and_its_owner_told(bench: Bench) -> None:
    """What comes of the delivery does not count any more."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    work = await bench.take(CALLBACKS)
    assert await bench.queue.cancel("a") == 1
    assert bench.stopped == [work.token]
    assert not await bench.queue.complete(work, OK, "delivered")
    assert (await bench.queue.lookup("a"))["callback"]["status"] == "failed"


async def test_an_unknown_call_can_not_be_cancelled(bench: Bench) -> None:
    """404."""
    assert await refused(bench.queue.cancel("nobody")) == 404


async def test_a_finished_call_can_not_be_cancelled(bench: Bench) -> None:
    """409, and its record stays."""
    await bench.enqueue("a")
    await bench.run()
    assert (await refused(bench.queue.cancel("a")), await bench.status("a")) == (409, "success")


async def test_a_cancelled_call_can_not_be_cancelled_again(bench: Bench) -> None:
    """It has finished."""
    await bench.enqueue("a")
    await bench.queue.cancel("a")
    assert await refused(bench.queue.cancel("a")) == 409


async def test_a_cancelled_call_can_not_be_completed(bench: Bench) -> None:
    """Its owner is told, and neither record nor output changes; nobody is called back."""
    await bench.enqueue("a", callback_url=SINK)
    work = await bench.take()
    await bench.queue.cancel("a")
    before = await bench.queue.lookup("a"), await bench.queue.output("a")
    assert not await bench.queue.complete(work, OK, "success")
    assert (await bench.queue.lookup("a"), await bench.queue.output("a")) == before
    assert (await bench.claim(queue=CALLBACKS), len(bench.ended)) == ([], 1)


async def test_a_cancelled_call_can_not_be_retried(bench: Bench) -> None:
    """It does not come back."""
    await bench.enqueue("a")
    work = await bench.take()
    await bench.queue.cancel("a")
    assert not await bench.queue.retry(work, BAD, 0.0)
    assert (await bench.claim(), await bench.status("a"), await bench.waiting()) == ([], "cancelled", {})


async def test_the_run_that_was_cancelled_can_not_end_a_later_one(bench: Bench) -> None:
    """After a cancel and a retry by hand the same call may run again, with another owner."""
    await bench.enqueue("a")
    old = await bench.take()
    await bench.queue.cancel("a")
    await bench.queue.redrive("a")
    new = await bench.take()
    assert not await bench.queue.complete(old, BAD, "error")
    assert (await bench.status("a"), await bench.queue.complete(new, OK, "success")) == ("running", True)


async def test_the_delivery_that_was_cancelled_can_not_end_a_later_one(bench: Bench) -> None:
    """The same for callbacks."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    old = await bench.take(CALLBACKS)
    await bench.queue.cancel("a")
    await bench.queue.redrive("a")
    await bench.run()
    new = await bench.take(CALLBACKS)
    assert not await bench.queue.complete(old, BAD, "failed")
    assert await bench.queue.complete(new, OK, "delivered")


async def test_a_cancelled_call_stays_cancelled_across_a_power_cut(bench: Bench) -> None:
    """Also one that was running."""
    await bench.enqueue_all("a", "b")
    await bench.claim(1)
    await bench.queue.cancel("a")
    await bench.queue.cancel("b")
    await bench.crash()
    assert (await bench.claim(), await bench.status("a"), await bench.status("b")) == ([], "cancelled", "cancelled")


# ---- calls that share an id ------------------------------------------------------------------------------------


async def test_a_shared_id_shows_the_newest_call(bench: Bench) -> None:
    """A call id is for tracing, not a key."""
    await bench.enqueue("batch", function="first")
    await bench.enqueue("batch", function="second")
    assert (await bench.queue.lookup("batch"))["function"] == "second"


async def test_a_shared_id_lists_all_calls(bench: Bench) -> None:
    """Newest first."""
    for function in ("first", "second"):
        await bench.enqueue("batch", function=function)
    await bench.enqueue("other")
    found, _ = await bench.queue.records(RecordQuery(call_id="batch"))
    assert [record["function"] for record in found] == ["second", "first"]


async def test_a_shared_id_cancels_all_calls_that_have_not_finished(bench: Bench) -> None:
    """That is how a batch is stopped."""
    for function in ("finished", "running", "waiting", "delivering"):
        url = SINK if function == "delivering" else None
        await bench.enqueue("batch", function=function, callback_url=url, queue=function)
    await bench.run(queue="finished")
    await bench.run(queue="delivering")
    await bench.take("running")
    assert await bench.queue.cancel("batch") == 3
    found, _ = await bench.queue.records(RecordQuery(call_id="batch"))
    assert [record["status"] for record in found] == ["success", "cancelled", "cancelled", "success"]


async def test_calls_that_share_an_id_are_told_apart(bench: Bench) -> None:
    """Ending one of them leaves the others."""
    await bench.enqueue("batch")
    await bench.enqueue("batch")
    first, _ = await bench.queue.claim(REQUESTS, 2, {})
    await bench.queue.complete(first, OK, "success")
    found, _ = await bench.queue.records(RecordQuery(call_id="batch"))
    assert [record["status"] for record in found] == ["running", "success"]


# ---- deadlines -------------------------------------------------------------------------------------------------


async def test_a_call_that_does_not_start_in_time_ends_in_timeout(bench: Bench) -> None:
    """By itself, without anybody asking for work."""
    await bench.enqueue("a", deadline_at=time.time() + 0.1, due_at=time.time() + 3600)
    await bench.until(lambda: bench.ended)
    record = await bench.queue.lookup("a")
    assert (record["status"], record["attempts"], record["started_at"]) == ("timeout", 0, None)
    assert [(end.call_id, end.status) for end in bench.ended] == [("a", "timeout")]
    assert (await bench.claim(), await bench.waiting()) == ([], {})


async def test_a_call_whose_deadline_has_passed_already_does_not_run(bench: Bench) -> None:
    """Not even when it is claimed at the same moment."""
    accepted = bench.enqueue("a", deadline_at=time.time() - 1)
    _, found = await asyncio.gather(accepted, bench.queue.claim(REQUESTS, 1, {}))
    assert [*found, *await bench.claim()] == []
    await bench.until(lambda: bench.ended)
    assert await bench.status("a") == "timeout"


async def test_a_deadline_that_passes_while_nobody_runs_counts(bench: Bench) -> None:
    """The clock goes on while the daemon is down."""
    deadline_at = time.time() + 0.05
    await bench.enqueue("a", deadline_at=deadline_at)
    await bench.queue.close()
    await asyncio.sleep(deadline_at - time.time())  # nobody is there to tell
    await bench.open()
    assert await bench.claim() == []
    await bench.until(lambda: bench.ended)


async def test_a_call_that_has_started_is_not_ended_by_its_deadline(bench: Bench) -> None:
    """The limit of a run is the queue's timeout."""
    deadline_at = time.time() + 0.5
    await bench.enqueue("a", deadline_at=deadline_at)
    work = await bench.take()
    await bench.enqueue("b", deadline_at=deadline_at, due_at=deadline_at + 3600)
    await bench.until(lambda: bench.ended)  # "b" tells that the deadline has passed
    assert (await bench.status("a"), await bench.queue.complete(work, OK, "success")) == ("running", True)


async def test_a_call_that_is_tried_again_after_its_deadline_is_not_ended_by_it(bench: Bench) -> None:
    """It has started in time."""
    deadline_at = time.time() + 0.5
    await bench.enqueue("a", deadline_at=deadline_at)
    await bench.queue.retry(await bench.take(), BAD, 0.0)
    await bench.enqueue("b", deadline_at=deadline_at, due_at=deadline_at + 3600)
    await bench.until(lambda: bench.ended)
    assert (await bench.take()).attempt == 2


@pytest.mark.parametrize(("url", "failure_url"), [(SINK, None), (SINK, SINK + "/bad"), (None, SINK + "/bad")])
async def test_a_missed_deadline_is_called_back(bench: Bench, url: str | None, failure_url: str | None) -> None:
    """As any other timeout is."""
    await bench.enqueue("a", deadline_at=time.time() - 1, callback_url=url, failure_url=failure_url)
    await bench.until(lambda: CALLBACKS in bench.woken)
    work = await bench.take(CALLBACKS)
    assert (work.target, work.runs, work.http_status, work.body) == (failure_url or url, 0, None, b"")


# ---- idempotency keys ------------------------------------------------------------------------------------------


async def test_a_key_that_comes_again_gets_the_first_id(bench: Bench) -> None:
    """And nothing is queued."""
    await bench.enqueue("first", idempotency_key="key")
    assert await bench.enqueue("second", idempotency_key="key") == "first"
    assert await bench.claim() == ["first"]


async def test_a_key_that_comes_again_gets_the_id_that_was_made_for_it(bench: Bench) -> None:
    """Where the caller had none of its own."""
    first = await bench.enqueue(idempotency_key="key")
    assert await bench.enqueue(idempotency_key="key") == first


async def test_a_key_that_comes_again_at_once_gets_the_first_id(bench: Bench) -> None:
    """Also when neither is on disk yet."""
    calls = [bench.enqueue(f"call-{number}", idempotency_key="key") for number in range(5)]
    assert await asyncio.gather(*calls) == ["call-0"] * 5
    assert await bench.claim() == ["call-0"]


async def test_a_key_with_another_body_is_refused(bench: Bench) -> None:
    """422: one of the two would be lost otherwise."""
    await bench.enqueue("first", idempotency_key="key", body=b"one")
    assert await refused(bench.enqueue("second", idempotency_key="key", body=b"two")) == 422
    assert await bench.claim() == ["first"]


async def test_a_key_with_another_body_at_once_is_refused(bench: Bench) -> None:
    """Also when neither is on disk yet."""
    calls = [bench.enqueue(f"call-{number}", idempotency_key="key", body=b"%d" % number) for number in range(2)]
    first, second = await asyncio.gather(*calls, return_exceptions=True)
    assert first == "call-0"
    assert isinstance(second, Refused)
    assert second.status == 422


async def test_a_key_is_remembered_across_a_power_cut(bench: Bench) -> None:
    """That is when callers ask again."""
    await bench.enqueue("first", idempotency_key="key")
    await bench.crash()
    assert await bench.enqueue("second", idempotency_key="key") == "first"


async def test_a_key_is_remembered_after_the_end_of_its_call(bench: Bench) -> None:
    """For as long as the record is kept."""
    await bench.enqueue("first", idempotency_key="key")
    await bench.run()
    assert await bench.enqueue("second", idempotency_key="key") == "first"
    assert await bench.claim() == []


async def test_a_key_belongs_to_one_function(bench: Bench) -> None:
    """The same one for another function, or in another namespace, is another key."""
    await bench.enqueue("a", idempotency_key="key")
    await bench.enqueue("b", idempotency_key="key", function="other")
    await bench.enqueue("c", idempotency_key="key", namespace="other")
    assert sorted(await bench.claim()) == ["a", "b", "c"]


async def test_a_key_that_comes_again_is_accepted_by_a_full_queue(bench: Bench) -> None:
    """Nothing more is queued for it."""
    bench.config.set(max_pending=1)
    await bench.enqueue("first", idempotency_key="key")
    assert await bench.enqueue("second", idempotency_key="key") == "first"


async def test_a_key_may_be_used_again_when_its_record_is_gone(bench: Bench) -> None:
    """The retention time is over."""
    await bench.enqueue("first", idempotency_key="key")
    await bench.run()
    bench.config.set({"keep": "1ns"})
    await bench.queue.prune()
    assert await bench.enqueue("second", idempotency_key="key", body=b"other") == "second"


# ---- full queues -----------------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_calls(bench: Bench) -> None:
    """429, and the caller is told when to come again."""
    bench.config.set(max_pending=2)
    await bench.enqueue_all("a", "b")
    with pytest.raises(Refused) as caught:
        await bench.enqueue("c")
    assert (caught.value.status, caught.value.headers["Retry-After"].isdecimal()) == (429, True)
    assert await bench.claim() == ["a", "b"]


async def test_a_queue_is_filled_to_its_limit_by_calls_that_come_at_once(bench: Bench) -> None:
    """Not one more, not one less."""
    bench.config.set(max_pending=3)
    found = await asyncio.gather(*(bench.enqueue(f"call-{n}") for n in range(10)), return_exceptions=True)
    assert [isinstance(item, str) for item in found] == [True] * 3 + [False] * 7
    assert len(await bench.claim()) == 3


async def test_calls_that_run_do_not_fill_a_queue(bench: Bench) -> None:
    """max_pending counts what waits."""
    bench.config.set(max_pending=1)
    await bench.enqueue("a", callback_url=SINK)
    work = await bench.take()
    await bench.enqueue("b")
    await bench.queue.complete(work, OK, "success")
    assert await refused(bench.enqueue("c")) == 429


async def test_delayed_calls_fill_a_queue(bench: Bench) -> None:
    """They wait, too."""
    bench.config.set(max_pending=1)
    await bench.enqueue("a", due_at=time.time() + 3600)
    assert await refused(bench.enqueue("b")) == 429


async def test_a_full_queue_does_not_fill_others(bench: Bench) -> None:
    """Each has its own limit."""
    bench.config.set(max_pending=1)
    await bench.enqueue("a")
    assert await bench.enqueue("b", queue="other") == "b"


async def test_a_full_queue_takes_back_what_has_to_be_tried_again(bench: Bench) -> None:
    """An accepted call is never refused later."""
    bench.config.set(max_pending=1)
    await bench.enqueue("a")
    work = await bench.take()
    await bench.enqueue("b")
    assert await bench.queue.retry(work, BAD, 0.0)
    assert sorted(await bench.claim()) == ["a", "b"]


async def test_a_full_queue_stays_full_across_a_restart(bench: Bench) -> None:
    """The count comes from what is stored."""
    bench.config.set(max_pending=2)
    await bench.enqueue_all("a", "b")
    await bench.crash()
    assert await refused(bench.enqueue("c")) == 429


# ---- records ---------------------------------------------------------------------------------------------------


async def test_records_come_newest_first(bench: Bench) -> None:
    """Whatever has happened to them since."""
    await bench.enqueue_all("a", "b", "c")
    await bench.claim(1)
    assert await bench.listed() == ["c", "b", "a"]


@pytest.mark.parametrize("status", ["delayed", "queued", "running", "success", "error", "timeout", "cancelled"])
async def test_records_are_filtered_by_status(bench: Bench, status: str) -> None:
    """A call is in exactly one state."""
    for final, outcome in (("success", OK), ("error", BAD), ("timeout", LATE)):
        await bench.enqueue(final)
        await bench.run(outcome, final)
    await bench.enqueue("running")
    await bench.take()
    await bench.enqueue("cancelled")
    await bench.queue.cancel("cancelled")
    await bench.enqueue("delayed", due_at=time.time() + 3600)
    await bench.enqueue("queued")
    assert await bench.listed(status=status) == [status]


async def test_records_are_filtered_by_function_and_queue(bench: Bench) -> None:
    """Filters that are given together all have to match."""
    await bench.enqueue("a", function="one")
    await bench.enqueue("b", function="one", queue="slow")
    await bench.enqueue("c", function="two", queue="slow")
    assert await bench.listed(function="one") == ["b", "a"]
    assert await bench.listed(queue="slow") == ["c", "b"]
    assert await bench.listed(queue="slow", function="one") == ["b"]
    assert await bench.listed(queue="slow", function="one", status="running") == []


async def test_an_unknown_call_has_no_record(bench: Bench) -> None:
    """404 alone, an empty list among others."""
    assert await refused(bench.queue.lookup("nobody")) == 404
    assert await bench.listed(call_id="nobody") == []


async def test_a_call_is_found_by_its_own_id(bench: Bench) -> None:
    """The one that it was given, where the caller had none."""
    call_id = await bench.enqueue()
    assert (await bench.queue.lookup(call_id))["call_id"] == call_id


async def pages(queue: Queue, query: RecordQuery) -> AsyncIterator[list[str]]:
    """One page after the other, by the cursor."""
    while True:
        found, cursor = await queue.records(query)
        yield [record["call_id"] for record in found]
        if cursor is None:
            return
        query = query._replace(cursor=cursor)


async def test_pages_show_every_record_once(bench: Bench) -> None:
    """None twice, none left out, and the last page says so."""
    names = [f"call-{number}" for number in range(10)]
    await bench.enqueue_all(*names)
    found = [page async for page in pages(bench.queue, RecordQuery(limit=4))]
    assert [call_id for page in found for call_id in page] == names[::-1]
    assert all(len(page) <= 4 for page in found)


async def test_calls_that_come_in_do_not_shift_the_pages(bench: Bench) -> None:
    """Who pages through the list sees it as it was at the first page."""
    names = [f"call-{number}" for number in range(9)]
    await bench.enqueue_all(*names)
    found = []
    async for page in pages(bench.queue, RecordQuery(limit=3)):
        found += page
        await bench.enqueue_all("new", "newer")
    assert found == names[::-1]


async def test_pages_are_filtered_as_a_whole(bench: Bench) -> None:
    """A page is not cut short because of records that do not match."""
    for number in range(12):
        await bench.enqueue(f"call-{number}", function=f"f{number % 3}")
    found = [page async for page in pages(bench.queue, RecordQuery(function="f1", limit=2))]
    assert found[:2] == [["call-10", "call-7"], ["call-4", "call-1"]]


async def test_a_rare_match_is_found_however_far_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long history is read in steps, which nobody sees from outside."""
    monkeypatch.setattr(faasd_async, "SCAN_WINDOW", 7)
    for number in range(50):
        await bench.enqueue(f"call-{number}", function="rare" if number in (0, 3, 20, 21) else "other")
    found = [page async for page in pages(bench.queue, RecordQuery(function="rare", limit=2))]
    assert [call_id for page in found for call_id in page] == ["call-21", "call-20", "call-3", "call-0"]
    assert found[0] == ["call-21", "call-20"]


# ---- output ----------------------------------------------------------------------------------------------------


async def test_the_output_of_a_call_is_kept(bench: Bench) -> None:
    """Body and stderr."""
    await bench.enqueue("a")
    await bench.run(BAD, "error")
    assert await bench.queue.output("a") == (b"oops", b"on stderr")


async def test_the_output_of_a_failed_attempt_is_kept(bench: Bench) -> None:
    """While the next one is waited for."""
    await bench.enqueue("a")
    await bench.queue.retry(await bench.take(), BAD, 3600.0)
    assert await bench.queue.output("a") == (b"oops", b"on stderr")


async def test_the_output_is_that_of_the_last_attempt(bench: Bench) -> None:
    """Not of an earlier one."""
    await bench.enqueue("a")
    await bench.queue.retry(await bench.take(), BAD, 0.0)
    await bench.run()
    assert await bench.queue.output("a") == (b"done", b"")


async def test_the_last_attempt_that_wrote_nothing_leaves_no_output(bench: Bench) -> None:
    """What an earlier one wrote would mislead."""
    await bench.enqueue("a")
    await bench.queue.retry(await bench.take(), BAD, 0.0)
    await bench.run(OK._replace(body=b"", size=0))
    assert await bench.queue.output("a") == (b"", b"")


async def test_a_call_that_has_not_run_has_no_output(bench: Bench) -> None:
    """Which is not an error."""
    await bench.enqueue("a")
    assert await bench.queue.output("a") == (b"", b"")


async def test_an_unknown_call_has_no_output(bench: Bench) -> None:
    """404."""
    assert await refused(bench.queue.output("nobody")) == 404


async def test_a_long_output_is_cut(bench: Bench) -> None:
    """calls.keep_output each for body and stderr; the record has the true size."""
    bench.config.set({"keep_output": 4})
    await bench.enqueue("a")
    await bench.run(OK._replace(body=b"0123456789", size=10, stderr=b"abcdefghij"))
    assert await bench.queue.output("a") == (b"0123", b"abcd")
    assert (await bench.queue.lookup("a"))["response_bytes"] == 10


@pytest.mark.parametrize("end", ["delivered", "failed", "cancelled"])
async def test_a_long_output_is_cut_after_its_callback(bench: Bench, end: str) -> None:
    """The callback needs all of it, people do not."""
    bench.config.set({"keep_output": 4})
    await bench.enqueue("a", callback_url=SINK)
    await bench.run(OK._replace(body=b"0123456789", size=10))
    if end == "cancelled":
        await bench.queue.cancel("a")
    else:
        await bench.deliver(OK, end)
    assert (await bench.queue.output("a"))[0] == b"0123"


# ---- redrive ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outcome", "status"), [(OK, "success"), (BAD, "error"), (LATE, "timeout")])
async def test_a_finished_call_runs_again_with_its_request(bench: Bench, outcome: Outcome, status: str) -> None:
    """However it ended, every byte is sent again."""
    call = invocation("a", body=b"\x00\xff", max_attempts=3)
    await bench.queue.enqueue(call)
    await bench.run(outcome, status)
    await bench.queue.redrive("a")
    work = await bench.take()
    assert (work.attempt, work.target, work.headers, work.body) == (1, call.target, call.headers, call.body)


async def test_a_cancelled_call_runs_again(bench: Bench) -> None:
    """A cancel is not the end of it if somebody thinks better of it."""
    await bench.enqueue("a")
    await bench.queue.cancel("a")
    await bench.queue.redrive("a")
    assert (await bench.run()).attempt == 1


async def test_a_call_that_missed_its_deadline_runs_again(bench: Bench) -> None:
    """Who queues it by hand wants it to run."""
    await bench.enqueue("a", deadline_at=time.time() - 1)
    await bench.until(lambda: bench.ended)
    await bench.queue.redrive("a")
    assert await bench.claim() == ["a"]


async def test_a_call_that_is_queued_again_is_as_new(bench: Bench) -> None:
    """Nothing of its earlier life is left in the record."""
    await bench.enqueue("a", callback_url=SINK)
    fresh = await bench.queue.lookup("a")
    await bench.take()
    await bench.crash()
    await bench.run(BAD, "error")
    await bench.deliver()
    await bench.queue.redrive("a")
    again = await bench.queue.lookup("a")
    assert {**again, "due_at": None} == {**fresh, "due_at": None}
    assert await bench.queue.output("a") == (b"", b"")


async def test_a_call_that_is_queued_again_is_called_back_again(bench: Bench) -> None:
    """With what it gives this time."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run(BAD, "error")
    await bench.deliver()
    await bench.queue.redrive("a")
    await bench.run(OK)
    work = await bench.take(CALLBACKS)
    assert (work.attempt, work.runs, work.http_status, work.body) == (1, 1, 200, b"done")


async def test_a_call_that_is_queued_again_wakes_its_queue(bench: Bench) -> None:
    """It runs at once."""
    await bench.enqueue("a")
    await bench.run()
    bench.woken.clear()
    await bench.queue.redrive("a")
    await bench.until(lambda: REQUESTS in bench.woken)


async def test_a_call_that_is_queued_again_stays_so_across_a_power_cut(bench: Bench) -> None:
    """202 means on disk here, too."""
    await bench.enqueue("a")
    await bench.run()
    await bench.queue.redrive("a")
    await bench.crash()
    assert await bench.claim() == ["a"]


async def test_an_unknown_call_can_not_be_queued_again(bench: Bench) -> None:
    """404."""
    assert await refused(bench.queue.redrive("nobody")) == 404


@pytest.mark.parametrize("state", ["queued", "delayed", "running", "pending", "sending"])
async def test_a_call_that_has_not_finished_can_not_be_queued_again(bench: Bench, state: str) -> None:
    """409; its callback is part of it."""
    later = {"due_at": time.time() + 3600} if state == "delayed" else {}
    await bench.enqueue("a", callback_url=SINK, **later)
    if state == "running":
        await bench.take()
    elif state in ("pending", "sending"):
        await bench.run()
        await (bench.take(CALLBACKS) if state == "sending" else bench.queue.stats())
    assert await refused(bench.queue.redrive("a")) == 409


async def test_a_call_whose_request_is_not_stored_any_more_can_not_be_queued_again(bench: Bench) -> None:
    """410: a long request is dropped after it has succeeded."""
    bench.config.set({"keep_output": 100})
    await bench.enqueue("a", body=bytes(101))
    await bench.run()
    assert (await refused(bench.queue.redrive("a")), await bench.status("a")) == (410, "success")


async def test_the_request_of_a_failed_call_is_stored_whatever_its_length(bench: Bench) -> None:
    """It is the one that people want to run again."""
    bench.config.set({"keep_output": 100})
    await bench.enqueue("a", body=bytes(101))
    await bench.run(BAD, "error")
    await bench.queue.redrive("a")
    assert (await bench.take()).body == bytes(101)


# ---- pause, purge, stats ---------------------------------------------------------------------------------------


async def test_a_paused_queue_hands_out_nothing(bench: Bench) -> None:
    """It goes on accepting calls."""
    await bench.enqueue("a")
    await bench.queue.pause(REQUESTS, True)
    await bench.enqueue("b")
    assert (await bench.claim(), await bench.waiting()) == ([], {"figlet.openfaas-fn": 2})


async def test_a_resumed_queue_goes_on_where_it_stood(bench: Bench) -> None:
    """Its consumer is woken."""
    await bench.enqueue_all("a", "b")
    await bench.queue.pause(REQUESTS, True)
    await bench.claim()
    bench.woken.clear()
    await bench.queue.pause(REQUESTS, False)
    await bench.until(lambda: REQUESTS in bench.woken)
    assert await bench.claim() == ["a", "b"]


async def test_a_paused_queue_stays_paused_across_a_power_cut(bench: Bench) -> None:
    """Until somebody resumes it."""
    await bench.enqueue("a")
    await bench.queue.pause(REQUESTS, True)
    await bench.crash()
    assert (await bench.claim(), (await bench.queue.stats())[REQUESTS].paused) == ([], True)


async def test_a_resumed_queue_stays_resumed_across_a_power_cut(bench: Bench) -> None:
    """The later word counts."""
    await bench.enqueue("a")
    await bench.queue.pause(REQUESTS, True)
    await bench.queue.pause(REQUESTS, False)
    await bench.crash()
    assert await bench.claim() == ["a"]


async def test_pausing_one_queue_leaves_the_others(bench: Bench) -> None:
    """Callbacks included."""
    await bench.enqueue("a", callback_url=SINK)
    work = await bench.take()
    await bench.enqueue("b", queue="other")
    await bench.queue.pause(REQUESTS, True)
    await bench.queue.complete(work, OK, "success")
    assert (await bench.claim(queue="other"), await bench.claim(queue=CALLBACKS)) == (["b"], ["a"])


async def test_purging_a_queue_cancels_what_waits(bench: Bench) -> None:
    """Delayed calls as well; what runs goes on, and other queues keep theirs."""
    await bench.enqueue("running")
    work = await bench.take()
    await bench.enqueue("delayed", due_at=time.time() + 3600)
    await bench.enqueue_all(*(f"call-{number}" for number in range(10)), function="other")
    await bench.enqueue("elsewhere", queue="other")
    assert await bench.queue.purge(REQUESTS) == 11
    assert len(await bench.listed(status="cancelled")) == 11
    assert (await bench.claim(), await bench.waiting(), bench.stopped) == ([], {}, [])
    assert (await bench.queue.complete(work, OK, "success"), await bench.claim(queue="other")) == (True, ["elsewhere"])


async def test_purging_a_long_queue_cancels_all_of_it(bench: Bench) -> None:
    """In however many steps; every call's end is told."""
    await asyncio.gather(*(bench.enqueue() for _ in range(1200)))
    assert await bench.queue.purge(REQUESTS) == 1200
    assert (await bench.claim(), len(bench.ended)) == ([], 1200)


async def test_purging_an_empty_queue_does_nothing(bench: Bench) -> None:
    """Not even for a queue that nobody knows."""
    assert (await bench.queue.purge(REQUESTS), await bench.queue.purge("nowhere")) == (0, 0)


async def test_stats_count_what_waits_by_lane(bench: Bench) -> None:
    """Delayed calls as well, those that run not."""
    await bench.enqueue("a")
    await bench.take()
    await bench.enqueue("b", function="one")
    await bench.enqueue("c", function="one", due_at=time.time() + 3600)
    await bench.enqueue("d", function="two", queue="slow")
    assert await bench.waiting() == {"one.openfaas-fn": 2}
    assert await bench.waiting("slow") == {"two.openfaas-fn": 1}


async def test_stats_tell_the_oldest_due_time(bench: Bench) -> None:
    """Of all lanes of the queue."""
    oldest_at = time.time() - 100
    await bench.enqueue("a", function="one", due_at=oldest_at + 50)
    await bench.enqueue("b", function="two", due_at=oldest_at)
    await bench.enqueue("c", function="two", due_at=oldest_at + 70)
    assert (await bench.queue.stats())[REQUESTS].oldest_at == oldest_at


async def test_stats_count_callbacks(bench: Bench) -> None:
    """By the host that they go to, without the credentials in the URL."""
    await bench.enqueue("a", callback_url="http://user:secret@sink:8080/a")
    await bench.run()
    assert await bench.waiting(CALLBACKS) == {"sink:8080": 1}


async def test_stats_are_the_same_after_a_power_cut(bench: Bench) -> None:
    """They come from what is stored."""
    await bench.enqueue("a", function="one")
    await bench.enqueue("b", function="two", due_at=time.time() + 3600)
    await bench.queue.pause("slow", True)
    before = await bench.queue.stats()
    await bench.crash()
    after = await bench.queue.stats()
    assert before[REQUESTS] == after[REQUESTS]
    assert before["slow"].paused and after["slow"].paused


# ---- prune -----------------------------------------------------------------------------------------------------


async def every_state(bench: Bench) -> None:
    """One call in each state, named after it, and one for each state of a callback."""
    for name, outcome in (("success", OK), ("error", BAD), ("timeout", LATE)):
        await bench.enqueue(name)
        await bench.run(outcome, name)
    for name in ("delivered", "sending", "pending"):
        await bench.enqueue(name, callback_url=SINK)
        await bench.run()
        if name == "delivered":
            await bench.deliver()
        elif name == "sending":
            await bench.take(CALLBACKS)
    await bench.enqueue("running")
    await bench.take()
    await bench.enqueue("cancelled")
    await bench.queue.cancel("cancelled")
    await bench.enqueue("queued")


async def test_prune_keeps_what_is_not_past_its_time(bench: Bench) -> None:
    """Records are kept for calls.keep."""
    await every_state(bench)
    assert await bench.queue.prune() == 0
    assert len(await bench.listed()) == 9


async def test_prune_removes_finished_calls_only(bench: Bench) -> None:
    """What still has something to do stays, callbacks included."""
    await every_state(bench)
    bench.config.set({"keep": "1ns"})
    assert await bench.queue.prune() == 5
    assert await bench.listed() == ["queued", "running", "pending", "sending"]


async def test_prune_removes_request_and_output_as_well(bench: Bench) -> None:
    """Nothing of the call is left."""
    await bench.enqueue("a")
    await bench.run(BAD, "error")
    bench.config.set({"keep": "1ns"})
    await bench.queue.prune()
    found = [await refused(method("a")) for method in (bench.queue.lookup, bench.queue.output, bench.queue.redrive)]
    assert found == [404, 404, 404]


async def test_prune_comes_to_an_end(bench: Bench) -> None:
    """One small batch at a time, until nothing is left."""
    await asyncio.gather(*(bench.enqueue() for _ in range(1200)))
    await bench.queue.purge(REQUESTS)
    bench.config.set({"keep": "1ns"})
    steps = []
    while number := await bench.queue.prune():
        steps.append(number)
    assert (sum(steps), await bench.listed()) == (1200, [])
    assert len(steps) > 1


async def test_what_was_pruned_stays_away_after_a_power_cut(bench: Bench) -> None:
    """And what comes later has nothing of it."""
    await bench.enqueue("a", idempotency_key="key")
    await bench.run(BAD, "error")
    bench.config.set({"keep": "1ns"})
    await bench.queue.prune()
    await bench.crash()
    await bench.enqueue("b")
    assert (await bench.listed(), await bench.queue.output("b")) == (["b"], (b"", b""))


# ---- what is left by a process that died -----------------------------------------------------------------------


async def test_an_interrupted_call_is_queued_again(bench: Bench) -> None:
    """The interruption is counted, and the attempt stays charged."""
    await bench.enqueue("a")
    await bench.take()
    await bench.crash()
    record = await bench.queue.lookup("a")
    assert (record["status"], record["attempts"], record["interrupted"]) == ("queued", 1, 1)
    assert (await bench.take()).attempt == 2


async def test_an_interrupted_call_goes_before_those_that_waited(bench: Bench) -> None:
    """It was first, and has lost enough time already."""
    await bench.enqueue_all("a", "b", "c")
    await bench.claim(1)
    await bench.crash()
    assert await bench.claim() == ["a", "b", "c"]


async def test_every_interruption_is_counted(bench: Bench) -> None:
    """A function that takes the machine down with it can be found."""
    await bench.enqueue("a")
    for _ in range(3):
        await bench.take()
        await bench.crash()
    record = await bench.queue.lookup("a")
    assert (record["attempts"], record["interrupted"]) == (3, 3)


async def test_a_call_that_was_interrupted_in_its_last_attempt_runs_again(bench: Bench) -> None:
    """Never silently lost: at least once means that it may be one attempt more."""
    await bench.enqueue("a", max_attempts=1)
    await bench.take()
    await bench.crash()
    assert await bench.claim() == ["a"]


async def test_an_interrupted_callback_is_sent_again(bench: Bench) -> None:
    """The delivery stays charged; the call itself does not run again."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    await bench.take(CALLBACKS)
    await bench.crash()
    record = await bench.queue.lookup("a")
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)
    assert (record["callback"]["status"], record["callback"]["attempts"]) == ("pending", 1)
    assert await bench.claim() == []
    work = await bench.take(CALLBACKS)
    assert (work.attempt, work.body, work.target) == (2, b"done", SINK)


async def test_what_waited_is_not_interrupted(bench: Bench) -> None:
    """Delayed calls keep their time, due ones their place."""
    await bench.enqueue("delayed", due_at=time.time() + 3600)
    await bench.enqueue_all("a", "b")
    before = await bench.queue.records(RecordQuery())
    await bench.crash()
    assert (await bench.queue.records(RecordQuery()), await bench.claim()) == (before, ["a", "b"])


async def test_claims_that_are_left_at_an_orderly_end_are_interrupted_too(bench: Bench) -> None:
    """No claim is ever lost."""
    await bench.enqueue("a")
    await bench.take()
    await bench.reopen()
    assert (await bench.take()).attempt == 2


async def test_a_start_after_an_orderly_end_interrupts_nothing(bench: Bench) -> None:
    """What was given back before does not count."""
    await bench.enqueue("a")
    await bench.queue.retry(await bench.take(), None, 0.0)
    await bench.reopen()
    record = await bench.queue.lookup("a")
    assert (record["attempts"], record["interrupted"]) == (0, 0)


async def claim_and_wait_to_be_killed(store: Store) -> None:
    """What the process does that is killed: claim all there is, and never end it."""
    bench = Bench(store, Settings())
    await bench.open()
    print(*await bench.claim(), *await bench.claim(queue=CALLBACKS), flush=True)
    sys.stdin.read()


@contextlib.asynccontextmanager
async def owner(store: int, folder: Path) -> AsyncIterator[str]:
    """Another process that has a store open and all its work claimed; it is killed in the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, str(store), str(folder), env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    try:
        async with asyncio.timeout(PATIENCE):
            yield (await process.stdout.readline()).decode().strip()
    finally:
        process.kill()
        process.stdin.close()
        await process.wait()


@pytest.mark.parametrize("store", range(len(STORES)))
async def test_a_killed_process_leaves_its_work_to_the_next(store: int, tmp_path: Path) -> None:
    """SIGKILL between claim and end: calls and callbacks are there again, and the record tells."""
    bench = Bench(STORES[store](tmp_path, Settings()), Settings())
    await bench.open()
    await bench.enqueue("ended", callback_url=SINK)
    await bench.run()
    await bench.enqueue("interrupted")
    await bench.queue.close()
    async with owner(store, tmp_path) as claimed:
        assert claimed == "interrupted ended"
    await bench.open()
    record = await bench.queue.lookup("interrupted")
    assert (record["status"], record["attempts"], record["interrupted"]) == ("queued", 1, 1)
    assert (await bench.claim(), await bench.claim(queue=CALLBACKS)) == (["interrupted"], ["ended"])
    await bench.queue.close()


# ---- health ----------------------------------------------------------------------------------------------------


async def test_a_queue_that_works_says_so(bench: Bench) -> None:
    """Nothing is wrong."""
    assert (bench.queue.stalled(), await bench.queue.failing()) == (None, None)


# ---- SQLite ----------------------------------------------------------------------------------------------------


class SqliteBench(Bench):
    """A queue on a file, with a way to its connection."""

    store: SqliteStore
    queue: SqliteQueue

    def in_writer(self, step: Callable[[SqliteFile], T]) -> Awaitable[T]:
        """Run something in the writer's thread, in a transaction of the queue."""
        return self.queue.submit(step)

    async def pragma(self, name: str) -> Any:
        """A setting of the connection, read or set."""
        return await self.in_writer(lambda file: file.db.execute(f"PRAGMA {name}").fetchone()[0])

    def commits(self) -> float:
        """How many commits there were."""
        return self.store.metrics.registry.get_sample_value("faasd_async_commit_seconds_count") or 0.0


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[SqliteBench]:
    """An open queue on a new file."""
    config = Settings()
    found = SqliteBench(SqliteStore(tmp_path, config), config)
    await found.open()
    yield found
    await found.queue.close()


@pytest.fixture
def clock() -> Iterator[Clock]:
    """The clock that the daemon's code looks at; it stands still unless a test moves it."""
    found = Clock(time.time())
    with mock.patch.object(faasd_async, "time", found):
        yield found


@pytest.mark.parametrize(("name", "value"), [("journal_mode", "wal"), ("synchronous", 2), ("auto_vacuum", 2)])
async def test_commits_are_synced(sqlite: SqliteBench, name: str, value: object) -> None:
    """WAL with synchronous=FULL: a commit that returned is on disk."""
    assert await sqlite.pragma(name) == value


async def test_the_folder_of_the_file_is_made(tmp_path: Path) -> None:
    """A first start needs no preparation."""
    bench = Bench(SqliteStore(tmp_path / "a" / "b", Settings()), Settings())
    await bench.open()
    await bench.queue.close()
    assert (tmp_path / "a" / "b" / "calls.db").is_file()


async def test_a_file_that_can_not_be_made_is_an_error(tmp_path: Path) -> None:
    """The error names the path."""
    (tmp_path / "file").write_text("")
    bench = Bench(SqliteStore(tmp_path / "file", Settings()), Settings())
    with pytest.raises(StoreError, match=r"file/calls\.db"):
        await bench.open()


async def test_a_file_is_opened_once(sqlite: SqliteBench) -> None:
    """A second queue on it would hand out the same work."""
    with pytest.raises(StoreLocked, match=r"calls\.db is in use"):
        await sqlite.store.queue().open(print, print, print)


async def test_a_file_that_another_process_has_open_is_left_alone(tmp_path: Path) -> None:
    """One process per file."""
    async with owner(STORES.index(SqliteStore), tmp_path):
        with pytest.raises(StoreLocked):
            await SqliteStore(tmp_path, Settings()).queue().open(print, print, print)


def names_in(folder: Path) -> list[str]:
    """The files in a folder."""
    return sorted(path.name for path in folder.iterdir())


async def test_a_closed_file_is_whole(sqlite: SqliteBench, tmp_path: Path) -> None:
    """Nothing is left in a log beside it: it can be copied."""
    await sqlite.enqueue("a")
    await sqlite.queue.close()
    assert names_in(tmp_path) == ["calls.db"]
    await sqlite.open()


def damage_all(path: Path) -> None:
    """Not a database at all."""
    path.write_bytes(b"garbage" * 1000)


def damage_pages(path: Path) -> None:
    """A database whose first page is whole."""
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


@pytest.mark.parametrize("damage", [damage_all, damage_pages])
async def test_a_damaged_file_is_set_aside(
    sqlite: SqliteBench, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """It is kept as it is for somebody to look at, the log says so, and the queue starts empty."""
    await sqlite.enqueue_all("a", "b")
    await sqlite.queue.close()
    damage(sqlite.store.path)
    content = sqlite.store.path.read_bytes()
    await sqlite.open()
    (kept,) = [name for name in names_in(tmp_path) if "corrupt" in name]
    assert (tmp_path / kept).read_bytes()[100:] == content[100:]  # the header has a counter of openings
    assert [kept in record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [True]
    await sqlite.enqueue("c")
    assert await sqlite.claim() == ["c"]


async def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    """It stays as it is; an older program would spoil it."""
    path = tmp_path / "calls.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 1000")
    content = path.read_bytes()
    with pytest.raises(StoreError, match="newer version"):
        await SqliteStore(tmp_path, Settings()).queue().open(print, print, print)
    assert path.read_bytes()[100:] == content[100:]
    assert names_in(tmp_path) == ["calls.db"]


async def test_a_file_of_an_older_version_is_migrated(sqlite: SqliteBench, tmp_path: Path) -> None:
    """Its calls go on, and the file as it was is kept beside it."""
    await sqlite.enqueue("a")
    await sqlite.queue.close()
    with contextlib.closing(sqlite3.connect(sqlite.store.path)) as db:
        db.executescript("ALTER TABLE calls DROP COLUMN app; PRAGMA user_version = 1;")
    await sqlite.open()
    await sqlite.enqueue("b", app="mine")
    assert await sqlite.claim() == ["a", "b"]
    assert await sqlite.listed(app="mine") == ["b"]
    with contextlib.closing(sqlite3.connect(tmp_path / "calls.db.schema-1")) as db:
        assert db.execute("SELECT call_id FROM calls").fetchall() == [("a",)]
        assert db.execute("PRAGMA user_version").fetchone() == (1,)


async def test_calls_that_come_at_once_share_commits(sqlite: SqliteBench) -> None:
    """One fsync for all that arrived during the last one."""
    before = sqlite.commits()
    await asyncio.gather(*(sqlite.enqueue() for _ in range(300)))
    assert 1 <= sqlite.commits() - before <= 10


async def test_reading_commits_nothing(sqlite: SqliteBench) -> None:
    """Who looks at records or finds no work does not wear out the disk."""
    await sqlite.enqueue("a", due_at=time.time() + 3600)
    before = sqlite.commits()
    await sqlite.queue.lookup("a")
    await sqlite.queue.records(RecordQuery())
    await sqlite.queue.stats()
    await sqlite.claim()
    assert sqlite.commits() == before


async def test_a_call_that_can_not_be_stored_does_not_take_others_down(sqlite: SqliteBench) -> None:
    """Each gets its own answer, though they share a commit."""
    calls = [invocation(f"call-{number}") for number in range(5)]
    calls[2] = calls[2]._replace(start_time=1 << 70)  # more than a column holds
    found = await asyncio.gather(*map(sqlite.queue.enqueue, calls), return_exceptions=True)
    assert isinstance(found[2], StoreError)
    assert [item for item in found if isinstance(item, str)] == ["call-0", "call-1", "call-3", "call-4"]
    assert await sqlite.claim() == ["call-0", "call-1", "call-3", "call-4"]


async def test_work_that_can_not_be_ended_does_not_take_others_down(sqlite: SqliteBench) -> None:
    """Whatever is done at the same moment is done."""
    await sqlite.enqueue_all("a", "b")
    a, b = await sqlite.queue.claim(REQUESTS, 2, {})
    found = await asyncio.gather(
        sqlite.queue.complete(a, OK._replace(size=1 << 70), "success"), sqlite.queue.complete(b, OK, "success"),
        sqlite.enqueue("c"), return_exceptions=True,
    )  # fmt: skip
    assert isinstance(found[0], StoreError)
    assert (found[1], found[2]) == (True, "c")
    assert [await sqlite.status(call_id) for call_id in "abc"] == ["running", "success", "queued"]


async def fill_disk(sqlite: SqliteBench) -> None:
    """Forbid the file to grow."""
    await sqlite.pragma(f"max_page_count = {await sqlite.pragma('page_count')}")


async def test_a_full_disk_is_an_error(sqlite: SqliteBench) -> None:
    """The caller hears of it, and so does who asks after our health."""
    await fill_disk(sqlite)
    with pytest.raises(StoreError, match="full"):
        await sqlite.enqueue("big", body=bytes(100_000))
    assert "full" in (await sqlite.queue.failing() or "")


async def test_a_disk_with_room_for_little_takes_little(sqlite: SqliteBench) -> None:
    """A call that was too large does not mean that nothing can be stored."""
    await sqlite.pragma(f"max_page_count = {await sqlite.pragma('page_count') + 5}")
    with pytest.raises(StoreError, match="full"):
        await sqlite.enqueue("big", body=bytes(100_000))
    assert await sqlite.queue.failing() is None
    await sqlite.enqueue("small")
    assert await sqlite.claim() == ["small"]


async def test_a_full_disk_leaves_what_was_stored(sqlite: SqliteBench) -> None:
    """Counts, order and limits are as they were before the call that found no place."""
    sqlite.config.set(max_pending=3)
    await sqlite.enqueue_all("a", "b")
    before = await sqlite.queue.stats(), await sqlite.queue.records(RecordQuery())
    await fill_disk(sqlite)
    for _ in range(3):
        with pytest.raises(StoreError):
            await sqlite.enqueue("big", function="other", body=bytes(100_000))
    assert (await sqlite.queue.stats(), await sqlite.queue.records(RecordQuery())) == before
    assert await sqlite.claim() == ["a", "b"]


async def test_a_disk_that_has_room_again_is_used_again(sqlite: SqliteBench) -> None:
    """Nothing has to be restarted."""
    await fill_disk(sqlite)
    with pytest.raises(StoreError):
        await sqlite.enqueue("big", body=bytes(100_000))
    await sqlite.pragma("max_page_count = 1000000")
    await sqlite.enqueue("big", body=bytes(100_000))
    assert (await sqlite.claim(), await sqlite.queue.failing()) == (["big"], None)


async def test_a_full_disk_does_not_stop_what_needs_no_room(sqlite: SqliteBench) -> None:
    """Calls that are stored are run and ended."""
    await sqlite.enqueue("a")
    await fill_disk(sqlite)
    big = asyncio.ensure_future(sqlite.enqueue("big", body=bytes(100_000)))
    work = await sqlite.take()
    assert await sqlite.queue.complete(work, OK._replace(body=b""), "success")
    with pytest.raises(StoreError):
        await big


async def test_what_was_pruned_gives_its_space_back(sqlite: SqliteBench) -> None:
    """The file of a burst shrinks when its records are gone."""
    await asyncio.gather(*(sqlite.enqueue(body=bytes(20_000)) for _ in range(150)))
    await sqlite.queue.purge(REQUESTS)
    peak = await sqlite.pragma("page_count")
    sqlite.config.set({"keep": "1ns"})
    while await sqlite.queue.prune():
        pass
    assert await sqlite.pragma("page_count") < peak / 4


async def test_a_file_does_not_grow_when_as_much_is_pruned_as_comes_in(sqlite: SqliteBench) -> None:
    """Space that is free is used before more is taken."""
    sizes = []
    sqlite.config.set({"keep": "1ns"})
    for _ in range(8):
        await asyncio.gather(*(sqlite.enqueue(body=bytes(20_000)) for _ in range(50)))
        await sqlite.queue.purge(REQUESTS)
        sizes.append(await sqlite.pragma("page_count"))
        while await sqlite.queue.prune():
            pass
    assert max(sizes) <= sizes[0] * 1.25


async def test_records_are_kept_to_the_second(sqlite: SqliteBench, clock: Clock) -> None:
    """A call that ended calls.keep ago goes, one that ended a moment later stays."""
    sqlite.config.set({"keep": "1h"})
    for call_id in ("first", "second"):
        await sqlite.enqueue(call_id, due_at=clock.now)
        await sqlite.run()
        clock.now += 10
    clock.now += 3600 - 15
    assert (await sqlite.queue.prune(), await sqlite.listed()) == (1, ["second"])


async def test_none_of_many_calls_that_missed_their_deadline_runs(sqlite: SqliteBench, clock: Clock) -> None:
    """However many they are, all of them end in timeout."""
    deadline_at = clock.now + 60
    names = [f"call-{number}" for number in range(1300)]
    await asyncio.gather(*(sqlite.enqueue(name, deadline_at=deadline_at, due_at=clock.now) for name in names))
    clock.now += 61
    assert await sqlite.claim(5000) == []
    await sqlite.until(lambda: len(sqlite.ended) == len(names))
    assert {end.status for end in sqlite.ended} == {"timeout"}


async def test_a_clock_that_was_set_forward_makes_calls_due(sqlite: SqliteBench, clock: Clock) -> None:
    """Times are those of the wall clock."""
    await sqlite.enqueue("later", due_at=clock.now + 3600)
    assert await sqlite.claim() == []
    clock.now += 3601
    assert await sqlite.claim() == ["later"]


async def use_everything(sqlite: SqliteBench) -> None:
    """Have every statement that the queue has in use run once."""
    queue = sqlite.queue
    await sqlite.enqueue("a", callback_url=SINK, idempotency_key="key")
    await sqlite.enqueue("again", idempotency_key="key")
    work = await sqlite.take()
    await queue.retry(work, BAD, 0.0)
    await sqlite.run()
    await queue.retry(await sqlite.take(CALLBACKS), BAD, 0.0)
    await sqlite.deliver()
    await queue.redrive("a")
    await queue.cancel("a")
    await sqlite.enqueue("late", deadline_at=time.time() - 1)
    await sqlite.until(lambda: [end for end in sqlite.ended if end.status == "timeout"])
    await sqlite.enqueue_all("b", "c")
    await sqlite.claim(1)
    await queue.purge(REQUESTS)
    await queue.lookup("a")
    await queue.output("a")
    await queue.records(RecordQuery(call_id="a"))
    await queue.records(RecordQuery(status="success"))
    await queue.stats()
    sqlite.config.set({"keep": "1ns"})
    await queue.prune()


async def test_no_statement_reads_all_calls(sqlite: SqliteBench) -> None:
    """However long the backlog and the history are, an index finds what is needed."""
    statements: set[str] = set()
    await sqlite.in_writer(lambda file: file.db.set_trace_callback(statements.add))
    await use_everything(sqlite)
    await sqlite.in_writer(lambda file: file.db.set_trace_callback(None))
    await sqlite.queue.close()
    scans = {}
    with contextlib.closing(sqlite3.connect(sqlite.store.path)) as db:
        for statement in statements:
            if statement.split()[0] in ("SELECT", "UPDATE", "DELETE"):
                plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}")]
                if any(line.startswith(("SCAN calls", "SCAN c ")) or line == "SCAN c" for line in plan):
                    scans[statement] = plan
    assert len(statements) > 30
    assert scans == {}
    await sqlite.open()


# ---- the queue against a model ---------------------------------------------------------------------------------


@dataclass
class Row:
    """A call as the model has it."""

    number: int  # in the order of acceptance
    call: Invocation
    due_at: float
    status: str = "queued"
    work: str | None = None  # what is to be done: in which queue, CALLBACKS or nothing
    deadline_at: float | None = None  # None once it has started
    owner: Claim | None = None
    attempts: int = 0
    interrupted: int = 0
    completed_at: float = 0.0
    callback_status: str = "none"
    callback_attempts: int = 0
    has_request: bool = True

    @property
    def target(self) -> str | None:
        """Where the outcome is told."""
        failed = self.status in ("error", "timeout")
        return self.call.failure_url if failed and self.call.failure_url else self.call.callback_url

    @property
    def lane(self) -> str:
        """Whose turn it is when this one is handed out."""
        if self.work == CALLBACKS:
            return (self.target or "").split("/")[2]
        return f"{self.call.function}.{self.call.namespace}"

    def shown(self, now: float) -> tuple[object, ...]:
        """What the record has to tell."""
        status = "delayed" if self.status == "queued" and self.due_at > now else self.status
        callback = self.callback_status, self.callback_attempts
        return (
            self.call.call_id,
            self.call.function,
            self.call.queue,
            status,
            self.attempts,
            self.interrupted,
            *callback,
        )


QUEUES = (REQUESTS, "plain")  # fair, and not
CALLS = st.fixed_dictionaries({
    "function": st.sampled_from(["a", "b", "c"]),
    "queue": st.sampled_from(QUEUES),
    "delay": st.sampled_from([0, 0, 0, 5, 60]),
    "deadline": st.sampled_from([None, None, None, 30]),
    "call_id": st.sampled_from([None, None, "batch-1", "batch-2"]),
    "callback_url": st.sampled_from([None, "http://sink-1/", "http://sink-2/"]),
    "failure_url": st.sampled_from([None, None, "http://sink-2/bad"]),
    "idempotency_key": st.sampled_from([None, None, None, "key-1", "key-2"]),
    "body": st.sampled_from([b"", b"a", b"long" * 20]),
})  # fmt: skip
ROOMS = st.dictionaries(
    st.sampled_from(["", "a.openfaas-fn", "b.openfaas-fn", "sink-1", "sink-2"]), st.integers(0, 2), max_size=3
)
KEEP_S, KEEP_OUTPUT, MAX_PENDING = 100.0, 64, 10
PICK = st.integers(0, 99)


class QueueMachine(RuleBasedStateMachine):
    """Does to a queue and to a list of rows whatever comes to mind, and compares them after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock(1_700_000_000.0)
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(mock.patch.object(faasd_async, "time", self.clock))
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.runner = self.stack.enter_context(asyncio.Runner(loop_factory=asyncio.new_event_loop))
        self.rows: list[Row] = []
        self.held: list[tuple[Claim, Row]] = []  # what consumers have in hand, cancelled work included
        self.paused: set[str] = set()
        self.accepted = 0
        self.ended: list[tuple[str, str, int]] = []
        self.stopped: list[int] = []

    @initialize()
    def start(self) -> None:
        """An open queue on an empty store."""
        config = Settings()
        config.config = parse_config({
            "calls": {"keep": f"{KEEP_S}s", "keep_output": KEEP_OUTPUT},
            "queues": {"plain": {"fair": False, "max_pending": MAX_PENDING}, REQUESTS: {"max_pending": MAX_PENDING}},
        })  # fmt: skip
        self.bench = Bench(STORES[0](self.folder, config), config)
        self.run(self.bench.open())

    def teardown(self) -> None:
        """Close all that is open."""
        if hasattr(self, "bench"):
            self.run(self.bench.queue.close())
        self.stack.close()

    def run(self, action: Awaitable[T]) -> T:
        """Do something to the queue, a moment later than the last thing."""

        async def act() -> T:
            return await action

        return self.runner.run(act())

    def tick(self, seconds: float = 0.001) -> float:
        """Time passes, so that no two steps happen at once. Calls that miss their deadline by it end."""
        self.clock.now = round(self.clock.now + seconds, 3)
        late = [row for row in self.rows if row.deadline_at is not None and row.deadline_at <= self.clock.now]
        for row in late:
            self.finish(row, "timeout")
        if late:
            self.run(self.bench.claim(queue="nowhere"))
            self.run(self.bench.until(lambda: len(self.bench.ended) >= len(self.ended)))
        return self.clock.now

    def finish(self, row: Row, status: str) -> None:
        """A call becomes final, and its outcome is to be told."""
        row.status, row.owner, row.work, row.completed_at = status, None, None, self.clock.now
        row.deadline_at = None
        self.ended.append((row.call.call_id, status, row.attempts))
        if status != "cancelled" and row.target is not None:
            row.work, row.due_at, row.callback_status = CALLBACKS, self.clock.now, "pending"

    # -- rules

    @rule(drawn=st.lists(CALLS, min_size=1, max_size=5))
    def enqueue(self, drawn: list[dict[str, Any]]) -> None:
        """Calls come in, all at once."""
        now, calls, expected = self.tick(), [], []
        for fields in drawn:
            details = dict(fields)
            due_at, deadline = now + details.pop("delay"), details.pop("deadline")
            details["deadline_at"] = None if deadline is None else now + deadline
            start_time = round(self.clock.now * 1e9)
            calls.append(invocation(details.pop("call_id"), due_at=due_at, start_time=start_time, **details))
            expected.append(self.accept(calls[-1]))

        async def act() -> list[Any]:
            return await asyncio.gather(*map(self.bench.queue.enqueue, calls), return_exceptions=True)

        found = [item.status if isinstance(item, Refused) else item for item in self.run(act())]
        assert found == expected

    def accept(self, call: Invocation) -> str | int:
        """The id to answer with, or the status of the refusal."""
        mine = (call.function, call.idempotency_key)
        for row in self.rows:
            if call.idempotency_key and (row.call.function, row.call.idempotency_key) == mine:
                return row.call.call_id if row.call.body == call.body else 422
        if len(self.waiting(call.queue)) >= MAX_PENDING:
            return 429
        self.accepted += 1
        self.rows.append(Row(self.accepted, call, call.due_at, work=call.queue, deadline_at=call.deadline_at))
        return call.call_id

    def due(self) -> list[Row]:
        """What a consumer may ask for, first in, first out."""
        found = [
            row for row in self.rows if row.work is not None and row.owner is None and row.due_at <= self.clock.now
        ]
        return sorted(found, key=lambda row: (row.due_at, row.number))

    def waiting(self, queue: str) -> list[Row]:
        """What waits in a queue, due or not."""
        return [row for row in self.rows if row.work == queue and row.owner is None]

    @precondition(lambda self: self.due())
    @rule(pick=PICK, limit=st.integers(1, 6), room=ROOMS)
    def claim(self, pick: int, limit: int, room: dict[str, int]) -> None:
        """A consumer asks for work: all that it may have is handed out, in order; of a paused queue nothing."""
        self.tick()
        waiting = self.due()
        queue = waiting[pick % len(waiting)].work or ""
        if queue in self.paused:
            assert not self.run(self.bench.queue.claim(queue, limit, room))
            self.run(self.bench.queue.pause(queue, False))
            self.paused.remove(queue)
        due: dict[str, list[Row]] = defaultdict(list)
        for row in waiting:
            if row.work == queue:
                due[row.lane].append(row)
        free = {lane: min(len(rows), room.get(lane, room.get("", limit))) for lane, rows in due.items()}
        found = self.run(self.bench.queue.claim(queue, limit, room))
        assert len(found) == min(limit, sum(free.values()))
        for lane, number in Counter(work.lane for work in found).items():
            assert number <= free[lane]
        times = []
        for work in found:
            row = due[work.lane].pop(0)
            times.append(row.due_at)
            self.take(row, work)
        assert queue != "plain" or room or times == sorted(times)

    def take(self, row: Row, work: Claim) -> None:
        """The consumer owns it now."""
        if row.work == CALLBACKS:
            row.callback_attempts += 1
            assert (work.target, work.attempt, work.runs) == (row.target, row.callback_attempts, row.attempts)
        else:
            row.attempts, row.status, row.deadline_at = row.attempts + 1, "running", None
            assert (work.attempt, work.body) == (row.attempts, row.call.body)
        assert (work.call_id, work.start_time) == (row.call.call_id, row.call.start_time)
        row.owner = work
        self.held.append((work, row))

    @precondition(lambda self: self.held)
    @rule(pick=PICK, status=st.sampled_from(["success", "error", "timeout"]))
    def complete(self, pick: int, status: str) -> None:
        """A consumer ends what it holds, cancelled work included."""
        work, row = self.held.pop(pick % len(self.held))
        self.tick()
        mine = row.owner is work
        outcome = {"success": OK, "error": BAD, "timeout": LATE}[status]
        if work.queue == CALLBACKS:
            status = "delivered" if status == "success" else "failed"
        assert self.run(self.bench.queue.complete(work, outcome, status)) is mine
        if not mine:
            return
        if work.queue == CALLBACKS:
            row.callback_status, row.work, row.owner = status, None, None
            return
        self.finish(row, status)
        row.has_request = status != "success" or len(row.call.body) <= KEEP_OUTPUT

    @precondition(lambda self: self.held)
    @rule(pick=PICK, charged=st.booleans(), delay=st.sampled_from([0.0, 7.0]))
    def retry(self, pick: int, charged: bool, delay: float) -> None:
        """A consumer gives back what it holds, cancelled work included."""
        work, row = self.held.pop(pick % len(self.held))
        now, mine = self.tick(), row.owner is work
        assert self.run(self.bench.queue.retry(work, BAD if charged else None, delay)) is mine
        if not mine:
            return
        row.owner, row.due_at = None, now + delay
        if work.queue == CALLBACKS:
            row.callback_attempts -= not charged
        else:
            row.status, row.attempts = "queued", row.attempts - (not charged)

    def pick_id(self, pick: int) -> str:
        """A call id: of any call there is, or of none."""
        ids = [*dict.fromkeys(row.call.call_id for row in self.rows), "nobody"]
        return ids[pick % len(ids)]

    @precondition(lambda self: self.rows)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        """All calls of an id that have something to do are stopped."""
        self.tick()
        call_id = self.pick_id(pick)
        known = [row for row in self.rows if row.call.call_id == call_id]
        active = [row for row in known if row.work is not None]
        if not active:
            assert self.run(refused(self.bench.queue.cancel(call_id))) == (409 if known else 404)
            return
        assert self.run(self.bench.queue.cancel(call_id)) == len(active)
        self.cancelled(active)

    def cancelled(self, rows: Sequence[Row]) -> None:
        """Nothing is left to do for them."""
        for row in rows:
            if row.owner is not None:
                self.stopped.append(row.owner.token)
            if row.work == CALLBACKS:
                row.callback_status, row.work, row.owner = "failed", None, None
            else:
                self.finish(row, "cancelled")

    @precondition(lambda self: any(row.work is None for row in self.rows))
    @rule(pick=PICK)
    def redrive(self, pick: int) -> None:
        """A finished call is queued again by hand."""
        now, call_id = self.tick(), self.pick_id(pick)
        known = [row for row in self.rows if row.call.call_id == call_id]
        refusal = 0
        if not known:
            refusal = 404
        elif known[-1].work is not None:
            refusal = 409
        elif not known[-1].has_request:
            refusal = 410
        if refusal:
            assert self.run(refused(self.bench.queue.redrive(call_id))) == refusal
            return
        self.run(self.bench.queue.redrive(call_id))
        old = known[-1]
        self.rows[self.rows.index(old)] = Row(old.number, old.call, now, work=old.call.queue)

    @precondition(lambda self: self.rows and not self.paused)
    @rule(queue=st.sampled_from(QUEUES))
    def pause(self, queue: str) -> None:
        """An operator pauses a queue; it is resumed when somebody wants something of it."""
        self.tick()
        self.run(self.bench.queue.pause(queue, True))
        self.paused.add(queue)

    @precondition(lambda self: any(len(self.waiting(queue)) > 3 for queue in QUEUES))
    @rule()
    def purge(self) -> None:
        """An operator empties the longer queue."""
        self.tick()
        rows = max((self.waiting(queue) for queue in QUEUES), key=len)
        assert self.run(self.bench.queue.purge(rows[0].call.queue)) == len(rows)
        self.cancelled(rows)

    @precondition(lambda self: self.rows)
    @rule(seconds=st.sampled_from([1, 6, 60]))
    def advance(self, seconds: int) -> None:
        """Time passes."""
        self.tick(seconds)

    def past_their_time(self) -> list[Row]:
        """The calls whose records may go."""
        until = self.clock.now - KEEP_S
        return [row for row in self.rows if row.status in FINAL and row.work is None and row.completed_at < until]

    @precondition(lambda self: self.past_their_time())
    @rule()
    def prune(self) -> None:
        """Old records go."""
        gone = self.past_their_time()
        assert self.run(self.bench.queue.prune()) == len(gone)
        self.rows = [row for row in self.rows if row not in gone]

    @precondition(lambda self: self.rows)
    @rule(orderly=st.booleans())
    def restart(self, orderly: bool) -> None:
        """The process ends, in order or not, and the next one takes over."""
        now = self.tick()
        self.run(self.bench.reopen() if orderly else self.bench.crash())
        for _, row in self.held:
            if row.owner is not None:
                row.owner, row.due_at = None, min(now, row.call.start_time / 1e9)  # before all that waited
                if row.work != CALLBACKS:
                    row.status, row.interrupted = "queued", row.interrupted + 1
        self.held.clear()

    # -- invariants

    @invariant()
    def every_record_agrees(self) -> None:
        """Each accepted call is there once, in the state that the model has for it."""
        found, _ = self.run(self.bench.queue.records(RecordQuery(limit=1000)))
        shown = [
            (
                record["call_id"], record["function"], record["queue"], record["status"], record["attempts"],
                record["interrupted"], record["callback"]["status"], record["callback"]["attempts"],
            )
            for record in found
        ]  # fmt: skip
        expected = [row.shown(self.clock.now) for row in sorted(self.rows, key=lambda row: -row.number)]
        assert shown == expected

    @invariant()
    def every_count_agrees(self) -> None:
        """What waits is counted, lane by lane."""
        stats = self.run(self.bench.queue.stats())
        counted = {name: dict(item.waiting) for name, item in stats.items() if item.waiting}
        expected: dict[str, Counter[str]] = defaultdict(Counter)
        for row in self.rows:
            if row.work is not None and row.owner is None:
                expected[row.work][row.lane] += 1
        assert counted == expected
        assert {name for name, item in stats.items() if item.paused} == self.paused

    @invariant()
    def every_end_was_told(self) -> None:
        """Each end once, and each owner whose work was cancelled."""
        assert Counter((end.call_id, end.status, end.attempts) for end in self.bench.ended) == Counter(self.ended)
        assert Counter(self.bench.stopped) == Counter(self.stopped)


TestQueueAgainstModel = QueueMachine.TestCase
TestQueueAgainstModel.settings = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # with Phase.shrink a failure takes minutes, and then has as few steps as possible
)


if __name__ == "__main__":
    signal.alarm(round(PATIENCE))  # never outlive the test
    asyncio.run(claim_and_wait_to_be_killed(STORES[int(sys.argv[1])](Path(sys.argv[2]), Settings())))
