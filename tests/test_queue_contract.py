"""What every queue promises to gateway and consumers, on every store there is.

The suite knows a queue by its protocol only. What one backend adds to it has a file of its own.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from queues import (
    ANSWER_HEADERS,
    BAD,
    LATE,
    OK,
    PATIENCE,
    REQUESTS,
    SINK,
    STORES,
    Bench,
    Settings,
    Store,
    invocation,
    open_bench,
    owner,
    refused,
)

from faasd_async import (
    CALLBACKS,
    CHANGES_PER_SECOND,
    MAX_FAILURES,
    BulkResult,
    CallFilter,
    Claim,
    Ended,
    HttpError,
    Invocation,
    NatsQueue,
    Outcome,
    ScheduledRun,
    ScheduleState,
    StoreError,
    discard_copy,
    pack_headers,
    parse_config,
    parse_when,
    rfc3339,
)

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
FIGLET: dict[str, Any] = {"queue": REQUESTS, "lane": "figlet.openfaas-fn"}
NO_CALLBACK = {"url": None, "status": "none", "attempts": 0, "http_status": None, "error": None}

# What a store promises in another way: the test fails on it, and the README says what holds there.
DIFFERENCES = {
    "test_a_call_that_comes_while_the_queue_closes_is_answered[NatsStore]": "a NATS server has a largest message",
    "test_calls_of_a_lane_are_handed_out_by_due_time[NatsStore]": "a stream hands out in the order of arrival",
}

# What such a test runs a thousand times others run a few times. Measured, it takes twice as long.
measured_elsewhere = pytest.mark.no_cover


@pytest.fixture(params=STORES, ids=lambda store: store.__name__)
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    """An open queue on an empty store."""
    if reason := DIFFERENCES.get(request.node.name):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    async with open_bench(Bench, request.param, tmp_path) as bench:
        yield bench


async def every_state(bench: Bench) -> None:
    """One call in each state, named after it, and one for each state of a callback."""
    for name, outcome in (("success", OK), ("error", BAD), ("timeout", LATE)):
        await bench.enqueue(name)
        await bench.run(outcome, name)
    for name in ("delivered", "failed", "sending", "pending"):
        await bench.enqueue(name, callback_url=SINK)
        await bench.run()
        if name in ("delivered", "failed"):
            await bench.deliver(OK, name)
        elif name == "sending":
            await bench.take(CALLBACKS)
    await bench.enqueue("running")
    await bench.take()
    await bench.enqueue("cancelled")
    await bench.queue.cancel("cancelled")
    await bench.enqueue("queued")


# ---- enqueue -------------------------------------------------------------------------------------


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
    names = [call.call_id for call in calls]
    assert await asyncio.gather(*map(bench.queue.enqueue, calls)) == names
    await bench.crash()
    assert await bench.claim() == names


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
    async with asyncio.timeout(PATIENCE):
        with contextlib.suppress(StoreError):
            await bench.enqueue("second")
        await asyncio.gather(first, closing)
    await bench.open()


# ---- claim ---------------------------------------------------------------------------------------


async def test_a_claim_has_all_that_came_in(bench: Bench) -> None:
    """The request byte for byte, and what is to be done with the outcome."""
    call = invocation(
        "a",
        callback_url=SINK,
        failure_url=SINK + "/bad",
        max_attempts=3,
        target="//x/%20?caf\u00e9\udcff",
        body=b"\x00\xff",
        headers=pack_headers([(b"X-A", b"\xe4"), (b"x-a", b"")]),
        traceparent=TRACEPARENT,
        tracestate="a=1",
        concurrency_key="k",
    )
    await bench.queue.enqueue(call)
    work = await bench.take()
    names = {*Claim._fields} & {*Invocation._fields}
    assert names >= {
        "function",
        "target",
        "headers",
        "body",
        "callback_url",
        "failure_url",
        "start_time",
    }
    assert {name: getattr(work, name) for name in names} == {name: getattr(call, name) for name in names}


async def test_a_claim_charges_an_attempt(bench: Bench) -> None:
    """As soon as it is handed out, not when it ends."""
    await bench.enqueue("a", max_attempts=3)
    work = await bench.take()
    record = await bench.record("a")
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
    found = [await bench.claim(7) for _ in range(3)]
    assert found == [names[:7], names[7:14], names[14:]]


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


@measured_elsewhere
async def test_a_queue_has_room_for_many_functions(bench: Bench) -> None:
    """More than the thousand consumers that a NATS server grants a stream by itself."""
    names = [f"f{number}" for number in range(1010)]
    for start in range(0, len(names), 101):
        await asyncio.gather(*(bench.enqueue(name, function=name) for name in names[start : start + 101]))
    found = await bench.claim(len(names))
    while len(found) < len(names):
        found.append((await bench.take_when_woken()).call_id)
    assert sorted(found) == sorted(names)


async def test_functions_of_two_namespaces_are_two_lanes(bench: Bench) -> None:
    """They only share a name."""
    await bench.enqueue_all("a1", "a2", namespace="one")
    await bench.enqueue_all("b1", "b2", namespace="two")
    assert [(await bench.claim(1))[0] for _ in range(4)] == ["a1", "b1", "a2", "b2"]


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


# ---- complete ------------------------------------------------------------------------------------


async def test_a_completed_call_is_final(bench: Bench) -> None:
    """The record tells what happened."""
    await bench.enqueue("a", body=b"12345")
    work = await bench.take()
    assert await bench.queue.complete(work, BAD, "error")
    record = await bench.record("a")
    expected = {
        "function": "figlet",
        "namespace": "openfaas-fn",
        "queue": REQUESTS,
        "status": "error",
        "attempts": 1,
        "max_attempts": 10,
        "http_status": 500,
        "error": BAD.error,
        "created_at": rfc3339(work.start_time // 1000 / 1e6),
        "due_at": None,
        "duration_seconds": 0.5,
        "interrupted": 0,
        "callback": NO_CALLBACK,
        "request_bytes": 5,
        "response_bytes": 4,
    }
    assert {name: record[name] for name in expected} == expected
    assert record["created_at"] <= record["started_at"] <= record["completed_at"]


async def test_a_completed_call_is_told_once(bench: Bench) -> None:
    """Whoever waits for its end hears of it."""
    own = await bench.add("a")
    await bench.run()
    assert bench.ended == [Ended(own, "a", "figlet", "success", 1, 0.25, 200, None, **FIGLET)]


async def test_a_call_is_completed_once(bench: Bench) -> None:
    """The second one to end it is told that it was too late, and changes nothing."""
    await bench.enqueue("a")
    work = await bench.run(OK, "success")
    before = await bench.record("a")
    assert not await bench.queue.complete(work, BAD, "error")
    assert (await bench.record("a"), len(bench.ended)) == (before, 1)


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
    assert (work.call_id, work.function) == ("a", "figlet")
    assert (work.queue, work.target) == (CALLBACKS, SINK)
    assert (work.body, work.headers) == (b"done", pack_headers(ANSWER_HEADERS))
    assert work.http_status == 200
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
    record = await bench.record("a")
    assert ((await bench.take(CALLBACKS)).target, record["callback"]["url"]) == (target, target)


async def test_a_success_does_not_go_to_the_failure_url(bench: Bench) -> None:
    """With no other one, nobody is told."""
    await bench.enqueue("a", failure_url=SINK)
    await bench.run()
    assert (await bench.record("a"))["callback"]["status"] == "none"


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
    record = await bench.record("a")
    callback = {
        "url": SINK,
        "status": status,
        "attempts": 1,
        "http_status": outcome.status,
        "error": outcome.error,
    }
    assert (record["status"], record["callback"]) == ("success", callback)


async def test_a_callback_is_final_once(bench: Bench) -> None:
    """The second one to end it is told that it was too late."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    work = await bench.deliver()
    assert not await bench.queue.complete(work, BAD, "failed")
    assert (await bench.record("a"))["callback"]["status"] == "delivered"


async def test_credentials_in_a_callback_url_are_used_and_not_shown(bench: Bench) -> None:
    """The document is for people, claim and record are for the sender."""
    await bench.enqueue("a", callback_url="http://user:secret@sink/")
    await bench.run()
    assert (await bench.take(CALLBACKS)).target == "http://user:secret@sink/"
    assert (await bench.queue.lookup("a")).callback.url == "http://user:secret@sink/"
    assert (await bench.record("a"))["callback"]["url"] == "http://sink/"


# ---- retry ---------------------------------------------------------------------------------------


async def test_a_charged_retry_is_the_next_attempt(bench: Bench) -> None:
    """The record shows why."""
    await bench.enqueue("a")
    assert await bench.queue.retry(await bench.take(), BAD, 0.0)
    record = await bench.record("a")
    assert (record["status"], record["attempts"]) == ("queued", 1)
    assert (record["http_status"], record["error"]) == (500, BAD.error)
    assert (await bench.take()).attempt == 2


async def test_an_uncharged_retry_never_happened(bench: Bench) -> None:
    """The attempt that a shutdown cut short is made again."""
    await bench.enqueue("a")
    assert await bench.queue.retry(await bench.take(), None, 0.0)
    assert (await bench.record("a"))["attempts"] == 0
    assert (await bench.take()).attempt == 1


async def test_what_led_to_another_attempt_or_delivery_is_told(bench: Bench) -> None:
    """One after the other, with its number, time and reason, the last ones also after a power cut."""
    await bench.enqueue("a", callback_url=SINK)
    began = time.time()
    await bench.queue.retry(await bench.take(), BAD, 0.0)
    await bench.queue.retry(await bench.take(), None, 0.0)
    await bench.queue.retry(await bench.take(), LATE, 0.0)
    await bench.run()
    await bench.queue.retry(await bench.take(CALLBACKS), LATE, 0.0)
    await bench.crash()
    failures = (await bench.queue.lookup("a")).failures
    told = [(one.of, one.number, one.duration_s, one.http_status, one.error) for one in failures]
    assert told == [
        ("attempt", 1, BAD.duration_s, 500, BAD.error),
        ("attempt", 2, LATE.duration_s, 504, LATE.error),
        ("callback", 1, LATE.duration_s, None, LATE.error),
    ]
    assert all(began - 1 <= one.failed_at <= time.time() + 1 for one in failures)
    shown = (await bench.record("a"))["failures"][0]
    assert list(shown) == ["of", "number", "failed_at", "http_status", "error", "duration_seconds"]
    for _ in range(MAX_FAILURES):
        await bench.queue.retry(await bench.take(CALLBACKS), LATE, 0.0)
    numbers = [one.number for one in (await bench.queue.lookup("a")).failures]
    assert numbers == list(range(2, MAX_FAILURES + 2))


async def test_an_uncharged_retry_leaves_what_the_attempt_before_it_gave(bench: Bench) -> None:
    """The record goes on showing why the call is tried again."""
    await bench.enqueue("a")
    await bench.queue.retry(await bench.take(), BAD, 0.0)
    await bench.queue.retry(await bench.take(), None, 0.0)
    record = await bench.record("a")
    assert (record["attempts"], record["http_status"], record["error"]) == (1, 500, BAD.error)


async def test_a_retry_waits_for_its_time(bench: Bench) -> None:
    """Until then the call is delayed, and the record tells until when."""
    await bench.enqueue("a")
    await bench.queue.retry(await bench.take(), BAD, 3600.0)
    record = await bench.queue.lookup("a")
    assert (await bench.claim(), record.status) == ([], "delayed")
    assert record.due_at is not None
    assert 3500 < record.due_at - time.time() <= 3600


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
    record = await bench.record("a")
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
    record = await bench.record("a")
    callback = {
        "url": SINK,
        "status": "pending",
        "attempts": 1,
        "http_status": 500,
        "error": BAD.error,
    }
    assert (record["callback"], record["attempts"], await bench.claim()) == (callback, 1, [])
    work = await bench.take(CALLBACKS)
    assert (work.attempt, work.runs, work.body) == (2, 1, b"done")


async def test_an_uncharged_retry_of_a_callback_never_happened(bench: Bench) -> None:
    """The delivery that a shutdown cut short is made again."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    assert await bench.queue.retry(await bench.take(CALLBACKS), None, 0.0)
    assert (await bench.record("a"))["callback"]["attempts"] == 0
    assert (await bench.take(CALLBACKS)).attempt == 1


async def test_a_callback_that_got_no_answer_has_no_http_status(bench: Bench) -> None:
    """A connection that failed is not a 502 of the other side."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    await bench.queue.retry(await bench.take(CALLBACKS), LATE, 0.0)
    record = await bench.record("a")
    assert (record["callback"]["http_status"], record["callback"]["error"]) == (None, LATE.error)


# ---- cancel --------------------------------------------------------------------------------------


async def test_a_waiting_call_is_cancelled(bench: Bench) -> None:
    """It never runs, and its end is told."""
    own = await bench.add("a")
    assert await bench.queue.cancel("a") == 1
    assert await bench.status("a") == "cancelled"
    assert (await bench.claim(), await bench.waiting()) == ([], {})
    assert bench.ended == [Ended(own, "a", "figlet", "cancelled", 0, **FIGLET)]


async def test_a_delayed_call_is_cancelled(bench: Bench) -> None:
    """It does not have to become due first."""
    await bench.enqueue("a", due_at=time.time() + 3600)
    assert (await bench.queue.cancel("a"), await bench.status("a")) == (1, "cancelled")


async def test_a_running_call_is_cancelled_and_its_owner_told(bench: Bench) -> None:
    """So that it can end the function."""
    await bench.enqueue("a")
    work = await bench.take()
    assert await bench.queue.cancel("a") == 1
    assert (bench.stopped, await bench.status("a")) == ([work.receipt], "cancelled")


async def test_a_waiting_call_that_is_cancelled_stops_nobody(bench: Bench) -> None:
    """There is no owner yet."""
    await bench.enqueue("a")
    await bench.queue.cancel("a")
    assert bench.stopped == []


async def test_a_pending_callback_is_cancelled(bench: Bench) -> None:
    """The call stays as it ended; the callback has failed, and the record tells why."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    assert await bench.queue.cancel("a") == 1
    record = await bench.record("a")
    assert record["status"] == "success"
    assert (record["callback"]["status"], record["callback"]["error"]) == ("failed", "cancelled")
    assert (await bench.claim(queue=CALLBACKS), len(bench.ended)) == ([], 1)


async def test_a_callback_that_is_being_sent_is_cancelled_and_its_owner_told(bench: Bench) -> None:
    """What comes of the delivery does not count any more."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    work = await bench.take(CALLBACKS)
    assert await bench.queue.cancel("a") == 1
    assert bench.stopped == [work.receipt]
    assert not await bench.queue.complete(work, OK, "delivered")
    assert (await bench.record("a"))["callback"]["status"] == "failed"


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
    before = await bench.record("a"), await bench.queue.output("a")
    assert not await bench.queue.complete(work, OK, "success")
    assert (await bench.record("a"), await bench.queue.output("a")) == before
    assert (await bench.claim(queue=CALLBACKS), len(bench.ended)) == ([], 1)


async def test_a_cancelled_call_can_not_be_retried(bench: Bench) -> None:
    """It does not come back."""
    await bench.enqueue("a")
    work = await bench.take()
    await bench.queue.cancel("a")
    assert not await bench.queue.retry(work, BAD, 0.0)
    assert await bench.status("a") == "cancelled"
    assert (await bench.claim(), await bench.waiting()) == ([], {})


async def test_a_cancelled_call_stays_cancelled_across_a_power_cut(bench: Bench) -> None:
    """Also one that was running."""
    await bench.enqueue_all("a", "b")
    await bench.claim(1)
    await bench.queue.cancel("a")
    await bench.queue.cancel("b")
    await bench.crash()
    assert (await bench.status("a"), await bench.status("b")) == ("cancelled", "cancelled")
    assert await bench.claim() == []


# ---- receipts ------------------------------------------------------------------------------------


async def test_every_claim_has_a_receipt_of_its_own(bench: Bench) -> None:
    """Those of one call differ as those of two calls do, also when a power cut is between them."""
    await bench.enqueue_all("a", "b")
    receipts = [work.receipt for work in await bench.claims(2)]
    await bench.crash()
    for work in await bench.claims(2):
        receipts.append(work.receipt)
        await bench.queue.retry(work, BAD, 0.0)
    receipts += [work.receipt for work in await bench.claims(2)]
    assert len(set(receipts)) == len(receipts) == 6


async def test_an_attempt_that_never_happened_had_a_receipt_of_its_own(bench: Bench) -> None:
    """The number of the attempt comes again, the receipt does not."""
    await bench.enqueue("a")
    first = await bench.take()
    await bench.queue.retry(first, None, 0.0)
    second = await bench.take()
    assert first.attempt == second.attempt
    assert first.receipt != second.receipt


async def test_a_stop_names_the_claim_that_was_cancelled(bench: Bench) -> None:
    """After a cancel and a retry by hand the same call may run while its first run still ends."""
    await bench.enqueue("a")
    first = await bench.take()
    await bench.queue.cancel("a")
    await bench.queue.redrive("a")
    second = await bench.take()
    assert bench.stopped == [first.receipt]
    await bench.queue.cancel("a")
    assert bench.stopped == [first.receipt, second.receipt]


async def test_a_stop_names_the_delivery_that_was_cancelled(bench: Bench) -> None:
    """Not the run before it."""
    await bench.enqueue("a", callback_url=SINK)
    run = await bench.run()
    delivery = await bench.take(CALLBACKS)
    await bench.queue.cancel("a")
    assert bench.stopped == [delivery.receipt]
    assert delivery.receipt != run.receipt


async def is_void(bench: Bench, work: Claim) -> bool:
    """Whether a claim can neither be given back nor ended."""
    done = [
        await bench.queue.retry(work, None, 0.0),
        await bench.queue.retry(work, BAD, 0.0),
        await bench.queue.complete(work, OK, "delivered" if work.queue == CALLBACKS else "success"),
    ]
    return not any(done)


async def test_the_run_that_was_cancelled_can_not_end_a_later_one(bench: Bench) -> None:
    """Its outcome is refused, that of the later one is accepted."""
    await bench.enqueue("a")
    first = await bench.take()
    await bench.queue.cancel("a")
    await bench.queue.redrive("a")
    assert await is_void(bench, first)
    second = await bench.take()
    assert await is_void(bench, first)
    assert await bench.status("a") == "running"
    assert await bench.queue.complete(second, OK, "success")
    assert await bench.status("a") == "success"


async def test_the_delivery_that_was_cancelled_can_not_end_a_later_one(bench: Bench) -> None:
    """The same for callbacks."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    first = await bench.take(CALLBACKS)
    await bench.queue.cancel("a")
    assert await is_void(bench, first)
    await bench.queue.redrive("a")
    await bench.run()
    assert await is_void(bench, first)
    second = await bench.take(CALLBACKS)
    assert await is_void(bench, first)
    assert await bench.queue.complete(second, OK, "delivered")


@pytest.mark.parametrize("outcome", [BAD, None])
async def test_a_run_that_was_given_back_can_not_end_a_later_one(bench: Bench, outcome: Outcome | None) -> None:
    """Who has retried a call does not own it any more."""
    await bench.enqueue("a")
    first = await bench.take()
    await bench.queue.retry(first, outcome, 0.0)
    assert await is_void(bench, first)
    assert await bench.waiting() == {"figlet.openfaas-fn": 1}
    second = await bench.take()
    assert await is_void(bench, first)
    assert second.attempt == (2 if outcome else 1)
    assert await bench.queue.complete(second, OK, "success")


@pytest.mark.parametrize("outcome", [BAD, None])
async def test_a_delivery_that_was_given_back_can_not_end_a_later_one(bench: Bench, outcome: Outcome | None) -> None:
    """Not even before the later one begins: it is to be done still."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    first = await bench.take(CALLBACKS)
    await bench.queue.retry(first, outcome, 0.0)
    assert await is_void(bench, first)
    assert await bench.waiting(CALLBACKS) == {"sink.example.org": 1}
    second = await bench.take(CALLBACKS)
    assert await is_void(bench, first)
    assert second.attempt == (2 if outcome else 1)
    assert await bench.queue.complete(second, OK, "delivered")


@pytest.mark.parametrize("outcome", [BAD, None])
async def test_a_delivery_that_was_given_back_can_not_be_given_back_again(
    bench: Bench, outcome: Outcome | None
) -> None:
    """It would count twice, and be charged twice or never."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    first = await bench.take(CALLBACKS)
    await bench.queue.retry(first, outcome, 0.0)
    for again in (None, BAD):
        assert not await bench.queue.retry(first, again, 0.0)
    assert await bench.waiting(CALLBACKS) == {"sink.example.org": 1}
    second = await bench.take(CALLBACKS)
    for again in (None, BAD):
        assert not await bench.queue.retry(first, again, 0.0)
    assert second.attempt == (2 if outcome else 1)


async def test_a_delivery_that_a_power_cut_interrupted_can_not_end_a_later_one(
    bench: Bench,
) -> None:
    """The same for callbacks."""
    await bench.enqueue("a", callback_url=SINK)
    await bench.run()
    first = await bench.take(CALLBACKS)
    await bench.crash()
    assert await is_void(bench, first)
    second = await bench.take(CALLBACKS)
    assert await bench.queue.complete(second, OK, "delivered")


async def test_a_run_that_a_power_cut_interrupted_can_not_end_a_later_one(bench: Bench) -> None:
    """The claim of a process that died is worth nothing."""
    await bench.enqueue("a")
    first = await bench.take()
    await bench.crash()
    assert await is_void(bench, first)
    second = await bench.take()
    assert await is_void(bench, first)
    assert await bench.queue.complete(second, OK, "success")


# ---- ids of their own ----------------------------------------------------------------------------


async def test_a_record_has_an_id_of_its_own(bench: Bench) -> None:
    """Beside the call id, which is the caller's."""
    own = await bench.add("mine")
    record = await bench.queue.lookup("mine")
    assert (record.id, record.call_id) == (own, "mine")


async def test_a_call_without_a_callers_id_has_one_id(bench: Bench) -> None:
    """Its own is the call id, too."""
    own = await bench.add()
    record = await bench.queue.lookup(own)
    assert (record.id, record.call_id) == (own, own)


async def test_an_id_stays_with_its_call(bench: Bench) -> None:
    """Through runs, power cuts, a retry by hand and its callback."""
    own = await bench.add("a", callback_url=SINK)
    claims = [await bench.take()]
    await bench.crash()
    claims += [await bench.run(), await bench.deliver()]
    await bench.queue.redrive(own)
    claims += [await bench.run()]
    assert {work.id for work in claims} == {own}
    assert (await bench.queue.lookup("a")).id == own


async def test_an_own_id_finds_exactly_its_call(bench: Bench) -> None:
    """However many share the call id, and whichever is the newest."""
    ids = [await bench.add("batch", function=f"f{number}") for number in range(3)]
    found = [await bench.queue.lookup(own) for own in ids]
    assert [record.function for record in found] == ["f0", "f1", "f2"]
    assert [record.id for record in found] == ids


async def test_a_call_whose_id_others_took_over_is_found_by_it(bench: Bench) -> None:
    """Callbacks to our own functions keep the call id: the first stays within reach."""
    first = await bench.add(function="first")
    second = await bench.add(first, function="second")
    assert (await bench.queue.lookup(first)).function == "first"
    assert (await bench.queue.lookup(second)).function == "second"
    assert [record.id for record in await bench.records(call_id=first)] == [second, first]
    assert [record.id for record in await bench.records(call_id=second)] == [second]


async def test_an_own_id_gives_exactly_the_output_of_its_call(bench: Bench) -> None:
    """Also when the newest call of the same id has given something else, or nothing yet."""
    first = await bench.add("batch")
    await bench.run(BAD, "error")
    second = await bench.add("batch")
    await bench.run(OK)
    third = await bench.add("batch")
    found = [await bench.queue.output(own) for own in (first, second, third)]
    assert [output.body for output in found] == [b"oops", b"done", b""]


async def test_an_own_id_cancels_exactly_its_call(bench: Bench) -> None:
    """The others of the same call id go on."""
    first, second, third = [await bench.add("batch") for _ in range(3)]
    assert await bench.queue.cancel(second) == 1
    assert [await bench.status(own) for own in (first, third)] == ["queued", "queued"]
    assert [work.id for work in await bench.claims(3)] == [first, third]


async def test_an_id_that_others_took_over_cancels_exactly_its_call(bench: Bench) -> None:
    """The rest of the chain goes on."""
    first = await bench.add()
    second = await bench.add(first)
    assert await bench.queue.cancel(first) == 1
    assert (await bench.status(first), await bench.status(second)) == ("cancelled", "queued")


async def test_an_own_id_that_has_finished_is_not_cancelled_for_others(bench: Bench) -> None:
    """409, though another call of the same id could be."""
    first = await bench.add("batch")
    await bench.run()
    second = await bench.add("batch")
    assert await refused(bench.queue.cancel(first)) == 409
    assert await bench.status(second) == "queued"


async def test_an_own_id_runs_exactly_its_call_again(bench: Bench) -> None:
    """Not the newest of the same call id."""
    first = await bench.add("batch", body=b"first")
    await bench.run(BAD, "error")
    await bench.enqueue("batch", body=b"second")
    await bench.run()
    await bench.queue.redrive(first)
    work = await bench.take()
    assert (work.id, work.body) == (first, b"first")


async def test_an_own_id_that_has_not_finished_is_not_run_again_for_others(bench: Bench) -> None:
    """409, though the newest call of the same id could be."""
    first = await bench.add("batch", queue="waiting")
    await bench.enqueue("batch")
    await bench.run()
    assert await refused(bench.queue.redrive(first)) == 409
    assert await bench.claim() == []


# ---- calls that share an id ----------------------------------------------------------------------


async def test_a_shared_id_shows_the_newest_call(bench: Bench) -> None:
    """A call id is for tracing, not a key."""
    await bench.enqueue("batch", function="first")
    await bench.enqueue("batch", function="second")
    assert (await bench.record("batch"))["function"] == "second"


async def test_a_shared_id_gives_the_output_of_the_newest_call(bench: Bench) -> None:
    """Even if it has none, and an earlier one has."""
    await bench.enqueue("batch")
    await bench.run(BAD, "error")
    await bench.enqueue("batch")
    assert (await bench.queue.output("batch")).body == b""
    await bench.run(OK)
    assert (await bench.queue.output("batch")).body == b"done"


async def test_a_shared_id_runs_the_newest_call_again(bench: Bench) -> None:
    """However the earlier ones ended."""
    first = await bench.add("batch")
    await bench.run(BAD, "error")
    second = await bench.add("batch")
    await bench.run()
    await bench.queue.redrive("batch")
    assert [work.id for work in await bench.claims(10)] == [second]
    assert await bench.status(first) == "error"


async def test_a_shared_id_lists_all_calls(bench: Bench) -> None:
    """Newest first."""
    for function in ("first", "second"):
        await bench.enqueue("batch", function=function)
    await bench.enqueue("other")
    found = await bench.records(call_id="batch")
    assert [record.function for record in found] == ["second", "first"]


async def test_a_shared_id_cancels_all_calls_that_have_not_finished(bench: Bench) -> None:
    """That is how a batch is stopped."""
    for function in ("finished", "running", "waiting", "delivering"):
        url = SINK if function == "delivering" else None
        await bench.enqueue("batch", function=function, callback_url=url, queue=function)
    await bench.run(queue="finished")
    await bench.run(queue="delivering")
    await bench.take("running")
    assert await bench.queue.cancel("batch") == 3
    found = await bench.records(call_id="batch")
    expected = ["success", "cancelled", "cancelled", "success"]
    assert [record.status for record in found] == expected


async def test_calls_that_share_an_id_are_told_apart(bench: Bench) -> None:
    """Ending one of them leaves the others."""
    await bench.enqueue("batch")
    await bench.enqueue("batch")
    first, _ = await bench.claims(2)
    await bench.queue.complete(first, OK, "success")
    found = await bench.records(call_id="batch")
    assert [record.status for record in found] == ["running", "success"]


# ---- deadlines -----------------------------------------------------------------------------------


async def test_a_call_that_does_not_start_in_time_ends_in_timeout(bench: Bench) -> None:
    """By itself, without anybody asking for work."""
    await bench.enqueue("a", deadline_at=time.time() + 0.1, due_at=time.time() + 3600)
    await bench.until(lambda: bench.ended)
    record = await bench.record("a")
    assert (record["status"], record["attempts"], record["started_at"]) == ("timeout", 0, None)
    assert [(end.call_id, end.status) for end in bench.ended] == [("a", "timeout")]
    assert (await bench.claim(), await bench.waiting()) == ([], {})


async def test_a_call_whose_deadline_has_passed_already_does_not_run(bench: Bench) -> None:
    """Not even when it is claimed at the same moment."""
    accepted = bench.enqueue("a", deadline_at=time.time() - 1)
    _, found = await asyncio.gather(accepted, bench.claims(1))
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
    assert await bench.status("a") == "running"
    assert await bench.queue.complete(work, OK, "success")


async def test_a_call_that_is_tried_again_after_its_deadline_is_not_ended_by_it(
    bench: Bench,
) -> None:
    """It has started in time."""
    deadline_at = time.time() + 0.5
    await bench.enqueue("a", deadline_at=deadline_at)
    await bench.queue.retry(await bench.take(), BAD, 0.0)
    await bench.enqueue("b", deadline_at=deadline_at, due_at=deadline_at + 3600)
    await bench.until(lambda: bench.ended)
    assert (await bench.take()).attempt == 2


async def test_an_attempt_that_never_happened_does_not_save_a_call_from_its_deadline(
    bench: Bench,
) -> None:
    """It is given back when the time is over, and so has not started in time."""
    deadline_at = time.time() + 1  # a busy machine takes its time until the next line but one
    await bench.enqueue("a", deadline_at=deadline_at)
    work = await bench.take()
    await bench.enqueue("b", deadline_at=deadline_at, due_at=deadline_at + 3600)
    await bench.until(lambda: bench.ended)  # "b" tells that the deadline has passed
    await bench.queue.retry(work, None, 3600.0)
    await bench.until(lambda: len(bench.ended) == 2)
    assert await bench.status("a") == "timeout"


@pytest.mark.parametrize(("url", "failure_url"), [(SINK, None), (SINK, SINK + "/bad"), (None, SINK + "/bad")])
async def test_a_missed_deadline_is_called_back(bench: Bench, url: str | None, failure_url: str | None) -> None:
    """As any other timeout is."""
    await bench.enqueue("a", deadline_at=time.time() - 1, callback_url=url, failure_url=failure_url)
    await bench.until(lambda: CALLBACKS in bench.woken)
    work = await bench.take(CALLBACKS)
    assert (work.target, work.runs) == (failure_url or url, 0)
    assert (work.http_status, work.body) == (None, b"")


# ---- idempotency keys ----------------------------------------------------------------------------


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
    assert isinstance(second, HttpError)
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


# ---- full queues ---------------------------------------------------------------------------------


async def test_a_full_queue_refuses_calls(bench: Bench) -> None:
    """429, and the caller is told when to come again."""
    bench.config.set(max_pending=2)
    await bench.enqueue_all("a", "b")
    with pytest.raises(HttpError) as caught:
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


# ---- records -------------------------------------------------------------------------------------


async def test_an_unknown_call_has_no_record(bench: Bench) -> None:
    """404 alone, an empty list among others."""
    assert await refused(bench.queue.lookup("nobody")) == 404
    assert await bench.listed(call_id="nobody") == []


async def test_a_record_has_its_times_in_seconds(bench: Bench) -> None:
    """Unix times, None where nothing has happened yet."""
    before = time.time()
    await bench.enqueue("a", due_at=before)
    fresh = await bench.queue.lookup("a")
    assert fresh.created_at is not None
    assert before - 1 < fresh.created_at < time.time()
    assert (fresh.due_at, fresh.started_at, fresh.completed_at) == (before, None, None)
    await bench.run()
    ended = await bench.queue.lookup("a")
    assert ended.started_at is not None
    assert ended.completed_at is not None
    assert ended.created_at == fresh.created_at
    assert before < ended.started_at <= ended.completed_at < time.time()
    assert (ended.due_at, ended.duration_s) == (None, 0.25)


async def test_durations_have_whole_microseconds(bench: Bench) -> None:
    """As all times of a record, those of its failures included."""
    await bench.enqueue("a")
    await bench.queue.retry(await bench.take(), BAD._replace(duration_s=0.12345678), 0.0)
    await bench.run(OK._replace(duration_s=0.00085961800004952))
    record = await bench.record("a")
    assert record["duration_seconds"] == 0.00086
    assert [failure["duration_seconds"] for failure in record["failures"]] == [0.123457]


async def test_a_record_is_delayed_until_its_call_is_due(bench: Bench) -> None:
    """Then it is queued, though nothing was done to it."""
    due_at = time.time() + 2.0
    await bench.enqueue("a", due_at=due_at)
    record = await bench.queue.lookup("a")
    assert (record.status, record.due_at) == ("delayed", due_at)
    bench.woken.clear()
    await bench.until(lambda: REQUESTS in bench.woken)
    assert await bench.status("a") == "queued"


async def test_a_record_is_the_same_alone_and_in_a_list(bench: Bench) -> None:
    """Whichever way it is found."""
    await every_state(bench)
    found = await bench.records()
    assert len(found) == 10
    assert [await bench.queue.lookup(record.id) for record in found] == list(found)


async def test_the_document_of_a_record_is_what_people_see(bench: Bench) -> None:
    """Times in RFC 3339, nothing left out, both ids."""
    own = await bench.add("a", callback_url=SINK, app="mine", traceparent=TRACEPARENT, concurrency_key="k")
    await bench.run()
    record = await bench.queue.lookup("a")
    document = {
        "id": own,
        "call_id": "a",
        "function": "figlet",
        "namespace": "openfaas-fn",
        "queue": REQUESTS,
        "status": "success",
        "attempts": 1,
        "max_attempts": 10,
        "http_status": 200,
        "error": None,
        "created_at": rfc3339(record.created_at),
        "started_at": rfc3339(record.started_at),
        "completed_at": rfc3339(record.completed_at),
        "due_at": None,
        "duration_seconds": 0.25,
        "interrupted": 0,
        "callback": {**NO_CALLBACK, "url": SINK, "status": "pending"},
        "request_bytes": 4,
        "response_bytes": 4,
        "app": "mine",
        "traceparent": TRACEPARENT,
        "concurrency_key": "k",
    }
    assert await bench.record("a") == document


async def test_the_document_of_a_record_has_only_what_there_is(bench: Bench) -> None:
    """An app is a label of Fn's routes, and of no others; few callers trace."""
    await bench.enqueue("a")
    assert (await bench.queue.lookup("a")).app is None
    assert not {"app", "traceparent", "concurrency_key"} & {*await bench.record("a")}


async def test_a_trace_goes_on_with_the_callback_of_a_call_that_is_queued_again(bench: Bench) -> None:
    """It belongs to the call, whatever became of its request and of its first attempts."""
    await bench.enqueue("a", callback_url=SINK, traceparent=TRACEPARENT, tracestate="a=1")
    for _ in range(2):
        await bench.run(BAD, "error")
        told = await bench.deliver()
        assert (told.traceparent, told.tracestate) == (TRACEPARENT, "a=1")
        await bench.queue.redrive("a")


# ---- lists ---------------------------------------------------------------------------------------


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
    assert await bench.listed(statuses=(status,)) == [status]


async def test_records_are_filtered_by_function_and_queue(bench: Bench) -> None:
    """Filters that are given together all have to match."""
    await bench.enqueue("a", function="one")
    await bench.enqueue("b", function="one", queue="slow")
    await bench.enqueue("c", function="two", queue="slow")
    assert await bench.listed(function="one") == ["b", "a"]
    assert await bench.listed(queue="slow") == ["c", "b"]
    assert await bench.listed(queue="slow", function="one") == ["b"]
    assert await bench.listed(queue="slow", function="one", statuses=("running",)) == []


async def test_several_states_are_any_of_them(bench: Bench) -> None:
    """A call is in one state only, so nothing else would make sense."""
    await every_state(bench)
    found = await bench.listed(statuses=("error", "queued", "running"))
    assert found == ["queued", "running", "error"]
    assert await bench.listed(statuses=("error", "error")) == ["error"]
    assert await bench.listed(statuses=("delayed", "timeout")) == ["timeout"]


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [
        (("delivered",), ["delivered"]),
        (("failed",), ["failed"]),
        (("pending",), ["pending", "sending"]),
        (("delivered", "failed"), ["failed", "delivered"]),
        (("none",), ["queued", "cancelled", "running", "timeout", "error", "success"]),
    ],
)
async def test_records_are_filtered_by_their_callback(
    bench: Bench, callbacks: tuple[str, ...], expected: list[str]
) -> None:
    """One that is being sent is pending still."""
    await every_state(bench)
    assert await bench.listed(callbacks=callbacks) == expected


async def test_state_and_callback_both_have_to_match(bench: Bench) -> None:
    """Each of them with any of its values."""
    await every_state(bench)
    found = await bench.listed(statuses=("success", "error"), callbacks=("failed", "none"))
    assert found == ["failed", "error", "success"]
    assert await bench.listed(statuses=("error",), callbacks=("failed", "delivered")) == []


async def test_records_are_filtered_by_app(bench: Bench) -> None:
    """A call without one matches none."""
    await bench.enqueue("a", app="one")
    await bench.enqueue("b", app="two")
    await bench.enqueue("c")
    assert await bench.listed(app="one") == ["a"]


async def test_records_are_filtered_by_the_time_they_came(bench: Bench) -> None:
    """From `since` on, and before `until`."""
    await bench.enqueue_all("a", "b", "c", "d")
    times = [record.created_at for record in await bench.records()][::-1]
    assert times == sorted(set(times))
    assert await bench.listed(since=times[1]) == ["d", "c", "b"]
    assert await bench.listed(until=times[2]) == ["b", "a"]
    assert await bench.listed(since=times[1], until=times[3]) == ["c", "b"]
    assert await bench.listed(since=times[1], until=times[1]) == []


async def test_the_time_that_a_record_shows_is_the_one_that_counts(bench: Bench) -> None:
    """To the last digit, though it came as nanoseconds, which a float can not hold."""
    now = time.time_ns()
    for number in range(50):
        await bench.enqueue(f"call-{number}", start_time=now + number * 1_001)
    for record in await bench.records():
        name, created_at = record.call_id, parse_when(rfc3339(record.created_at))
        assert name in await bench.listed(since=created_at)
        assert name not in await bench.listed(until=created_at)


async def test_records_from_before_all_or_after_all_are_none(bench: Bench) -> None:
    """A time may be far from any call."""
    await bench.enqueue("a")
    now = time.time()
    assert await bench.listed(since=now + 3600) == []
    assert await bench.listed(until=now - 3600) == []
    assert await bench.listed(since=now - 3600, until=now + 3600) == ["a"]
    assert await bench.listed(since=0.0) == ["a"]


async def test_a_shared_id_is_filtered_as_all_else(bench: Bench) -> None:
    """By state, function and time."""
    await bench.enqueue("batch", function="one")
    await bench.run()
    await bench.enqueue("batch", function="one")
    await bench.enqueue("batch", function="two")
    await bench.enqueue("other", function="one")
    found = await bench.records(call_id="batch", function="one", statuses=("queued", "error"))
    assert [(record.function, record.status) for record in found] == [("one", "queued")]
    (first,) = await bench.records(call_id="batch", statuses=("success",))
    assert len(await bench.records(call_id="batch", since=first.created_at)) == 3
    assert len(await bench.records(call_id="batch", until=first.created_at)) == 0


async def test_pages_show_every_record_once(bench: Bench) -> None:
    """None twice, none left out, and the last page says so."""
    names = [f"call-{number}" for number in range(10)]
    await bench.enqueue_all(*names)
    found = [page async for page in bench.pages(limit=4)]
    assert [call_id for page in found for call_id in page] == names[::-1]
    assert all(len(page) <= 4 for page in found)


async def test_calls_that_come_in_do_not_shift_the_pages(bench: Bench) -> None:
    """Who pages through the list sees it as it was at the first page."""
    names = [f"call-{number}" for number in range(9)]
    await bench.enqueue_all(*names)
    found = []
    async for page in bench.pages(limit=3):
        found += page
        await bench.enqueue_all("new", "newer")
    assert found == names[::-1]


async def test_pages_are_filtered_as_a_whole(bench: Bench) -> None:
    """A page is not cut short because of records that do not match."""
    for number in range(12):
        await bench.enqueue(f"call-{number}", function=f"f{number % 3}")
    found = [page async for page in bench.pages(function="f1", limit=2)]
    assert found[:2] == [["call-10", "call-7"], ["call-4", "call-1"]]


# ---- output --------------------------------------------------------------------------------------


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
    assert (await bench.record("a"))["response_bytes"] == 10


LONG = b"the beginning " + b"x" * 1000 + b" the end"


def is_cut(output: bytes) -> bool:
    """Whether this is LONG without its middle."""
    whole = output.startswith(b"the beginning x") and output.endswith(b"x the end")
    missing = output.removeprefix(b"the beginning ").removesuffix(b" the end").strip(b"x").decode()
    number = len(LONG) - len(output) + len(missing.encode())
    return whole and len(output) <= 300 and missing == f"\n… {number} bytes are not kept …\n"


@pytest.mark.parametrize("end", ["success", "retried", "delivered"])
async def test_of_a_long_output_beginning_and_end_are_kept(bench: Bench, end: str) -> None:
    """What went wrong stands at the end, what was tried at the beginning."""
    bench.config.set({"keep_output": 300})
    await bench.enqueue("a", callback_url=SINK if end == "delivered" else None)
    outcome = OK._replace(body=LONG, size=len(LONG), stderr=LONG)
    if end == "retried":
        await bench.queue.retry(await bench.take(), outcome, 3600)
    else:
        await bench.run(outcome)
    if end == "delivered":
        assert (await bench.queue.output("a")).body == LONG  # It is still needed.
        await bench.deliver()
    body, stderr = await bench.queue.output("a")
    assert is_cut(body)
    assert is_cut(stderr)


@pytest.mark.parametrize("end", ["delivered", "failed", "cancelled"])
async def test_a_long_output_is_cut_after_its_callback(bench: Bench, end: str) -> None:
    """The callback needs all of it, people do not."""
    bench.config.set({"keep_output": 4})
    await bench.enqueue("a", callback_url=SINK)
    await bench.run(OK._replace(body=b"0123456789", size=10, stderr=b"abcdefghij"))
    if end == "cancelled":
        await bench.queue.cancel("a")
    else:
        await bench.deliver(OK, end)
    assert await bench.queue.output("a") == (b"0123", b"abcd")


async def test_the_answer_of_a_call_is_kept_with_what_it_is(bench: Bench) -> None:
    """Its type, and no more of its headers; with a callback all of them are needed."""
    await bench.enqueue("a")
    await bench.run()
    assert await bench.queue.answer("a") == (200, ((b"Content-Type", b"text/plain"),), b"done")
    await bench.enqueue("b", callback_url=SINK)
    await bench.run()
    assert (await bench.queue.answer("b"))[1:] == (ANSWER_HEADERS, b"done")
    await bench.enqueue("c")
    await bench.run(BAD, "error")
    assert await bench.queue.answer("c") == (500, (), b"oops")
    await bench.enqueue("d")
    await bench.run(OK._replace(body=b"", size=0))
    assert (await bench.queue.answer("d")).body == b""


async def test_an_answer_that_is_not_there_is_told_why(bench: Bench) -> None:
    """409: not yet. 410: never, or not as a whole any more."""
    assert await refused(bench.queue.answer("nobody")) == 404
    await bench.enqueue("a")
    assert await refused(bench.queue.answer("a")) == 409
    await bench.queue.retry(await bench.take(), BAD, 0)
    assert await refused(bench.queue.answer("a")) == 409
    await bench.run(LATE, "timeout")
    assert await refused(bench.queue.answer("a")) == 410
    await bench.enqueue("b")
    await bench.queue.cancel("b")
    assert await refused(bench.queue.answer("b")) == 410
    bench.config.set({"keep_output": 4})
    await bench.enqueue("c")
    await bench.run(OK._replace(body=b"0123456789", size=10))
    assert await refused(bench.queue.answer("c")) == 410


async def test_the_request_of_a_call_is_shown_as_long_as_it_is_stored(bench: Bench) -> None:
    """While it waits, while it runs and after its end; not that of a long one that has succeeded."""
    expected = ("POST", "/a%2Fb?c=d", ((b"X-A", b"1"),), b"body")
    await bench.enqueue("a")
    assert await bench.queue.request("a") == expected
    work = await bench.take()
    assert await bench.queue.request("a") == expected
    await bench.queue.retry(work, BAD, 3600)
    assert await bench.queue.request("a") == expected
    await bench.queue.cancel("a")
    assert await bench.queue.request("a") == expected
    bench.config.set({"keep_output": 1})
    await bench.enqueue("b")
    await bench.run()
    assert await refused(bench.queue.request("b")) == 410
    assert await refused(bench.queue.request("nobody")) == 404


# ---- redrive -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outcome", "status"), [(OK, "success"), (BAD, "error"), (LATE, "timeout")])
async def test_a_finished_call_runs_again_with_its_request(bench: Bench, outcome: Outcome, status: str) -> None:
    """However it ended, every byte is sent again."""
    call = invocation("a", body=b"\x00\xff", max_attempts=3)
    await bench.queue.enqueue(call)
    await bench.run(outcome, status)
    await bench.queue.redrive("a")
    work = await bench.take()
    assert work.attempt == 1
    assert (work.target, work.headers, work.body) == (call.target, call.headers, call.body)


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
    """Of its earlier life nothing is left in the record but its history."""
    await bench.enqueue("a", callback_url=SINK)
    fresh = await bench.record("a")
    await bench.take()
    await bench.crash()
    await bench.run(BAD, "error")
    await bench.deliver()
    await bench.queue.redrive("a")
    again = await bench.record("a")
    (before,) = again.pop("history")
    assert {**again, "due_at": None} == {**fresh, "due_at": None}
    assert (before["status"], before["attempts"], before["interrupted"]) == ("error", 2, 1)
    assert before["callback"]["status"] == "delivered"
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


async def test_a_call_that_is_queued_again_is_known_until_it_has_ended_again(bench: Bench) -> None:
    """By the id that its caller gave it, and by its key, however long ago it ended first."""
    bench.config.set({"keep": "1s"})
    await bench.enqueue("mine", idempotency_key="key")
    await bench.run(BAD, "error")
    await bench.queue.redrive("mine")
    await asyncio.sleep(2.5)  # that time passes is what this is about
    assert await bench.status("mine") == "queued"
    assert await bench.enqueue("other", idempotency_key="key") == "mine"
    assert await bench.claim() == ["mine"]


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


async def test_a_call_whose_request_is_not_stored_any_more_can_not_be_queued_again(
    bench: Bench,
) -> None:
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


# ---- cancel and redrive of all that matches ------------------------------------------------------


async def mixed_up(bench: Bench, number: int) -> None:
    """Many calls of two functions that take turns, all with the same call id."""
    calls = [invocation("batch", function=name) for name in ("mine", "other") * number]
    await asyncio.gather(*map(bench.queue.enqueue, calls))


async def states(bench: Bench, **filters: Any) -> Counter[str]:
    """How many of the calls that match are in which state."""
    found: Counter[str] = Counter()
    cursor = None
    while True:
        page = await bench.queue.list_records(CallFilter(**filters), 1000, cursor)
        found.update(record.status for record in page.records)
        cursor = page.next_cursor
        if cursor is None:
            return found


async def test_what_matches_is_cancelled_and_nothing_else(bench: Bench) -> None:
    """Not what shares an id with it, nor what has its state or its function only."""
    await bench.enqueue("batch", function="cat")
    running = await bench.take()
    later = time.time() + 3600
    match = await bench.add("batch", function="cat", due_at=later)
    others = [
        await bench.add("batch", function="dog", due_at=later),
        await bench.add("other", function="dog", due_at=later),
    ]
    filters = CallFilter(statuses=("delayed",), function="cat")
    assert await bench.queue.cancel_matching(filters) == BulkResult(1, 1)
    assert await bench.status(match) == "cancelled"
    assert [await bench.status(own) for own in others] == ["delayed", "delayed"]
    assert (await bench.status(running.id), bench.stopped) == ("running", [])
    assert bench.ended == [Ended(match, "batch", "cat", "cancelled", 0, queue=REQUESTS, lane="cat.openfaas-fn")]
    assert await bench.queue.complete(running, OK, "success")


async def test_what_matches_is_queued_again_and_nothing_else(bench: Bench) -> None:
    """A later call that shares the id and has succeeded does not run once more."""
    match = await bench.add("batch", function="fail", body=b"failed")
    await bench.run(BAD, "error")
    other = await bench.add("batch", function="fine")
    await bench.run(OK)
    newest = await bench.add("batch", function="fail")
    await bench.run(OK)
    filters = CallFilter(statuses=("error",), function="fail")
    assert await bench.queue.redrive_matching(filters) == BulkResult(1, 1)
    assert [await bench.status(own) for own in (other, newest)] == ["success", "success"]
    work = await bench.take()
    assert (work.id, work.attempt, work.body) == (match, 1, b"failed")


async def test_a_bulk_cancel_tells_for_how_many_it_could_be_done(bench: Bench) -> None:
    """All that match are counted, also those that had finished."""
    await every_state(bench)
    assert await bench.queue.cancel_matching(CallFilter()) == BulkResult(10, 4)
    assert await states(bench) == {"success": 5, "error": 1, "timeout": 1, "cancelled": 3}
    assert await bench.listed(callbacks=("pending",)) == []
    assert await bench.claim(queue=CALLBACKS) == []
    assert await bench.queue.cancel_matching(CallFilter()) == BulkResult(10, 0)


async def test_a_bulk_redrive_tells_for_how_many_it_could_be_done(bench: Bench) -> None:
    """Not for what has something to do yet, nor for what has no request any more."""
    await every_state(bench)
    bench.config.set({"keep_output": 10})
    await bench.enqueue("long", body=bytes(11), queue="other")
    await bench.run(queue="other")
    assert await bench.queue.redrive_matching(CallFilter()) == BulkResult(11, 6)
    assert await bench.listed(statuses=("success",)) == ["long", "pending", "sending"]
    again = ["success", "error", "timeout", "delivered", "failed", "cancelled"]
    assert sorted(await bench.claim()) == sorted([*again, "queued"])


async def test_a_bulk_that_matches_nothing_does_nothing(bench: Bench) -> None:
    """And is no error."""
    await bench.enqueue("a")
    filters = CallFilter(call_id="nobody")
    assert await bench.queue.cancel_matching(filters) == BulkResult(0, 0)
    assert await bench.queue.redrive_matching(filters) == BulkResult(0, 0)
    assert await bench.claim() == ["a"]


async def test_what_was_given_back_is_there_though_another_call_is_cancelled(bench: Bench) -> None:
    """They are of one function, and only one of them is to go."""
    await bench.enqueue_all("a", "b")
    (_, given_back) = await bench.claims(2)
    assert await bench.queue.retry(given_back, None, 0.0)
    await bench.queue.cancel("a")
    assert await bench.claim() == ["b"]


async def test_a_bulk_cancel_stops_the_owners_of_what_runs(bench: Bench) -> None:
    """Each by the receipt of its claim; what they give does not count any more."""
    await bench.enqueue_all("a", "b", callback_url=SINK)
    await bench.enqueue("c", function="other")
    work = await bench.claims(3)
    a, b, c = sorted(work, key=lambda item: item.call_id)
    await bench.queue.complete(a, OK, "success")
    delivery = await bench.take(CALLBACKS)
    assert await bench.queue.cancel_matching(CallFilter(function="figlet")) == BulkResult(2, 2)
    assert Counter(bench.stopped) == Counter([b.receipt, delivery.receipt])
    assert not await bench.queue.complete(b, OK, "success")
    assert not await bench.queue.complete(delivery, OK, "delivered")
    assert await bench.queue.complete(c, OK, "success")
    assert await bench.claim(queue=CALLBACKS) == []


async def test_pending_callbacks_are_cancelled_by_their_state(bench: Bench) -> None:
    """Of the calls that they belong to, nothing changes."""
    await every_state(bench)
    assert await bench.queue.cancel_matching(CallFilter(callbacks=("pending",))) == BulkResult(2, 2)
    assert sorted(await bench.listed(callbacks=("failed",))) == ["failed", "pending", "sending"]
    assert await states(bench, callbacks=("failed",)) == {"success": 3}
    assert await bench.listed(statuses=("queued", "running")) == ["queued", "running"]


async def test_calls_with_a_failed_callback_run_again_by_its_state(bench: Bench) -> None:
    """And are called back again."""
    await every_state(bench)
    assert await bench.queue.redrive_matching(CallFilter(callbacks=("failed",))) == BulkResult(1, 1)
    assert (await bench.record("failed"))["callback"]["status"] == "none"
    assert sorted(await bench.claim()) == ["failed", "queued"]


async def test_a_bulk_takes_only_what_came_in_its_time(bench: Bench) -> None:
    """Filters are the same as those of the list."""
    await bench.enqueue_all("a", "b", "c")
    times = [record.created_at for record in await bench.records()][::-1]
    filters = CallFilter(since=times[1], until=times[2])
    assert await bench.queue.cancel_matching(filters) == BulkResult(1, 1)
    assert await bench.listed(statuses=("cancelled",)) == ["b"]
    assert await bench.queue.redrive_matching(filters) == BulkResult(1, 1)
    assert sorted(await bench.claim()) == ["a", "b", "c"]


@measured_elsewhere
async def test_many_calls_are_cancelled_exactly(bench: Bench) -> None:
    """More than one batch of them; those between them keep their place."""
    await mixed_up(bench, 550)
    filters = CallFilter(function="mine")
    assert await bench.queue.cancel_matching(filters) == BulkResult(550, 550)
    assert await states(bench, function="mine") == {"cancelled": 550}
    assert await states(bench, function="other") == {"queued": 550}
    assert Counter(end.function for end in bench.ended) == {"mine": 550}
    assert await bench.waiting() == {"other.openfaas-fn": 550}


@measured_elsewhere
async def test_many_calls_are_queued_again_exactly(bench: Bench) -> None:
    """More than one batch of them; those between them stay as they ended."""
    await mixed_up(bench, 550)
    await bench.queue.purge(REQUESTS)
    filters = CallFilter(statuses=("cancelled",), function="mine")
    assert await bench.queue.redrive_matching(filters) == BulkResult(550, 550)
    assert await states(bench, function="mine") == {"queued": 550}
    assert await states(bench, function="other") == {"cancelled": 550}
    work = await bench.claims(5000)
    assert len({item.id for item in work}) == len(work) == 550


@measured_elsewhere
async def test_a_bulk_ends_though_what_it_did_matches_still(bench: Bench) -> None:
    """Every call is taken once."""
    await mixed_up(bench, 300)
    filters = CallFilter(call_id="batch", statuses=("queued", "cancelled"))
    async with asyncio.timeout(PATIENCE):
        assert await bench.queue.cancel_matching(filters) == BulkResult(600, 600)
        assert await bench.queue.redrive_matching(filters) == BulkResult(600, 600)
    assert len(await bench.claim(5000)) == 600


@measured_elsewhere
async def test_others_are_served_while_a_bulk_goes_on(bench: Bench) -> None:
    """Who has one call does not wait for the end of many."""
    await mixed_up(bench, 1000)
    bulk = asyncio.ensure_future(bench.queue.cancel_matching(CallFilter(call_id="batch")))
    await bench.enqueue("a", queue="other")
    assert await bench.claim(queue="other") == ["a"]
    assert not bulk.done()
    assert await bulk == BulkResult(2000, 2000)


async def test_a_bulk_redrive_wakes_its_queues(bench: Bench) -> None:
    """All of them."""
    for queue in ("one", "two"):
        await bench.enqueue(queue, queue=queue)
        await bench.queue.cancel(queue)
    bench.woken.clear()
    await bench.queue.redrive_matching(CallFilter(statuses=("cancelled",)))
    await bench.until(lambda: {"one", "two"} <= {*bench.woken})


async def test_what_a_bulk_did_stays_done_across_a_power_cut(bench: Bench) -> None:
    """It is durable when its numbers are told."""
    await bench.enqueue_all("a", "b")
    await bench.enqueue("c", function="other")
    await bench.queue.cancel_matching(CallFilter(function="figlet"))
    await bench.crash()
    assert await bench.listed(statuses=("cancelled",)) == ["b", "a"]
    await bench.queue.redrive_matching(CallFilter(call_id="a"))
    await bench.crash()
    assert sorted(await bench.claim()) == ["a", "c"]


# ---- pause, purge, stats -------------------------------------------------------------------------


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
    assert len(await bench.listed(statuses=("cancelled",))) == 11
    assert (await bench.claim(), await bench.waiting(), bench.stopped) == ([], {}, [])
    assert await bench.queue.complete(work, OK, "success")
    assert await bench.claim(queue="other") == ["elsewhere"]


async def test_purging_a_long_queue_cancels_all_of_it(bench: Bench) -> None:
    """In however many steps; every call's end is told."""
    await asyncio.gather(*(bench.enqueue() for _ in range(600)))
    assert await bench.queue.purge(REQUESTS) == 600
    assert (await bench.claim(), len(bench.ended)) == ([], 600)


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
    """Of all lanes of the queue, once what a server has sent is here: on its way it is neither there nor waiting."""
    oldest_at = time.time() - 100
    await bench.enqueue("a", function="one", due_at=oldest_at + 50)
    await bench.enqueue("b", function="two", due_at=oldest_at)
    await bench.enqueue("c", function="two", due_at=oldest_at + 70)
    async with asyncio.timeout(PATIENCE):
        while (await bench.queue.stats())[REQUESTS].oldest_at != oldest_at:  # noqa: ASYNC110 - on NATS nothing tells
            await asyncio.sleep(0.01)


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


async def test_every_state_is_counted(bench: Bench) -> None:
    """By function; callbacks by theirs. Ends are told where they are not counted."""
    await every_state(bench)
    await bench.enqueue("delayed", due_at=time.time() + 3600, function="cat")
    await asyncio.sleep(bench.store.counts_age_s)
    overview = await bench.queue.overview()
    counts = Counter(overview.counts)
    if not overview.complete:
        counts += Counter((end.lane, end.status) for end in bench.ended)
        counts += Counter({(CALLBACKS, "delivered"): 1, (CALLBACKS, "failed"): 1})
    figlet = {"success": 5, "error": 1, "timeout": 1, "running": 1, "cancelled": 1, "queued": 1}
    expected = {("figlet.openfaas-fn", status): number for status, number in figlet.items()}
    expected |= {("cat.openfaas-fn", "delayed"): 1}
    expected |= {(CALLBACKS, "pending"): 2, (CALLBACKS, "delivered"): 1, (CALLBACKS, "failed"): 1}
    assert {place: number for place, number in counts.items() if number} == expected


async def test_a_call_that_waits_for_its_key_is_queued_and_counted_so(bench: Bench) -> None:
    """Like each that is due: only what waits for its time is delayed; also after a power cut, until it is cancelled."""
    for call_id in ("first", "second", "third"):
        await bench.enqueue(call_id, concurrency_key="k")
    await bench.enqueue("later", due_at=time.time() + 3600, concurrency_key="k")
    lane = "figlet.openfaas-fn"
    assert len(await bench.claims()) == 1

    async def counts() -> dict[str, int]:
        await asyncio.sleep(bench.store.counts_age_s)
        counted = (await bench.queue.overview()).counts
        return {status: counted.get((lane, status), 0) for status in ("queued", "running", "delayed")}

    assert await counts() == {"queued": 2, "running": 1, "delayed": 1}
    assert (await bench.queue.stats())[REQUESTS].waiting == {lane: 3}
    assert (await bench.record("third"))["status"] == "queued"
    assert (await bench.queue.request("third")).target == (await bench.queue.request("first")).target
    await bench.crash()
    assert await counts() == {"queued": 3, "running": 0, "delayed": 1}
    assert await bench.queue.cancel("third") == 1
    assert len((await bench.queue.list_records(CallFilter(statuses=("queued",)))).records) == 2
    assert await counts() == {"queued": 2, "running": 0, "delayed": 1}


async def test_what_is_stored_takes_room(bench: Bench) -> None:
    """As the overview tells, which has the figures of each queue, too."""
    await bench.enqueue("a", body=bytes(500_000))
    await asyncio.sleep(bench.store.counts_age_s)
    overview = await bench.queue.overview()
    assert overview.store.used_bytes > 500_000
    assert overview.queues[REQUESTS].depth == 1
    assert (await bench.queue.storage.figures())[0] == overview.store[0]
    assert (await bench.queue.storage.figures()).used_bytes > 500_000


async def test_a_copy_has_all_that_was_stored_or_is_refused(bench: Bench, tmp_path: Path) -> None:
    """Where there is a file, with what came while it was made; where there is none, the line says what to do."""
    for call_id in ("a", "b", "c"):
        await bench.enqueue(call_id, body=bytes(900_000))
    if isinstance(bench.queue, NatsQueue):
        with pytest.raises(HttpError, match="nats stream backup") as caught:
            await bench.queue.storage.copy()
        assert caught.value.status == 501
        return
    making = asyncio.create_task(bench.queue.storage.copy())
    while not making.done():
        last = await bench.enqueue()
    copy = await making
    copy.seek(0)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "calls.db").write_bytes(copy.read())
    discard_copy(copy)
    other = Bench(type(bench.store)(tmp_path / "copy", bench.config), bench.config)
    await other.open()
    assert await other.status("a") == "queued"
    assert {"a", "b", "c"} <= {*await other.claim()} <= {*await bench.listed()}
    await other.queue.close()
    assert await bench.status(last) == "queued"


# ---- watch ---------------------------------------------------------------------------------------


async def test_each_change_of_a_call_is_told(bench: Bench) -> None:
    """From its acceptance to the end of its callback, in order, each as its record shows it."""
    bench.watch()
    expected: list[tuple[str, str, str]] = []

    async def then(status: str, callback: str = "none") -> None:
        expected.append(("a", status, callback))
        await bench.until(lambda: bench.told() == expected)

    await bench.enqueue("a", callback_url=SINK)
    await then("queued")
    work = await bench.take()
    await then("running")
    await bench.queue.retry(work, BAD, 3600)
    await then("delayed")
    await bench.queue.cancel("a")
    await then("cancelled")
    await bench.queue.redrive("a")
    await then("queued")
    await bench.take()
    await then("running")
    await bench.queue.cancel("a")
    await then("cancelled")
    await bench.queue.redrive("a")
    await then("queued")
    work = await bench.take()
    await then("running")
    await bench.queue.complete(work, OK, "success")
    await then("success", "pending")
    await bench.deliver()
    await then("success", "delivered")
    await bench.queue.resend("a")
    await then("success", "pending")
    await bench.deliver(BAD, "failed")
    await then("success", "failed")
    assert bench.changes[-1].records[-1] == (await bench.queue.lookup("a"))._replace(history=())


async def test_a_deadline_that_passes_is_told(bench: Bench) -> None:
    """Nobody has asked for anything then."""
    bench.watch()
    await bench.enqueue("a", deadline_at=time.time() + 0.1)
    await bench.until(lambda: ("a", "timeout", "none") in bench.told())


async def test_what_is_done_to_many_is_told_of_each(bench: Bench) -> None:
    """Calls of a queue that is emptied, and those that match a filter."""
    await bench.enqueue_all("a", "b")
    bench.watch()
    await bench.queue.purge(REQUESTS)
    await bench.until(lambda: {item[:2] for item in bench.told()} >= {("a", "cancelled"), ("b", "cancelled")})
    bench.changes.clear()
    await bench.queue.redrive_matching(CallFilter(statuses=("cancelled",)))
    await bench.until(lambda: {item[:2] for item in bench.told()} >= {("a", "queued"), ("b", "queued")})


async def test_changes_that_are_too_many_are_counted(bench: Bench) -> None:
    """Those that are told, and those that are not, are all there are."""
    bench.watch()
    begun = time.monotonic()
    await asyncio.gather(*(bench.enqueue() for _ in range(2000)))
    number = 2000
    await bench.until(lambda: sum(len(item.records) + item.missed for item in bench.changes) >= number)
    told = sum(len(item.records) for item in bench.changes)
    assert 0 < told <= CHANGES_PER_SECOND * (1 + time.monotonic() - begun)
    assert sum(item.missed for item in bench.changes) == number - told


async def test_nothing_is_told_to_who_does_not_watch_any_more(bench: Bench) -> None:
    """What comes meanwhile is not told later either."""
    bench.watch()
    bench.queue.watch(None)
    await bench.add("a")
    await asyncio.sleep(0.2)  # for which changes may be collected
    bench.watch()
    await bench.enqueue("b")
    await bench.until(bench.told)
    assert bench.told() == [("b", "queued", "none")]


# ---- prune ---------------------------------------------------------------------------------------


async def test_prune_keeps_what_is_not_past_its_time(bench: Bench) -> None:
    """Records are kept for calls.keep."""
    await every_state(bench)
    assert await bench.queue.prune() == 0
    assert len(await bench.listed()) == 10


async def test_prune_removes_finished_calls_only(bench: Bench) -> None:
    """What still has something to do stays, callbacks included."""
    await every_state(bench)
    bench.config.set({"keep": "1ns"})
    assert await bench.queue.prune() == 6
    assert await bench.listed() == ["queued", "running", "pending", "sending"]


async def test_prune_keeps_failures_longer(bench: Bench) -> None:
    """What ended in error or timeout, and what could not be told to a callback URL."""
    await every_state(bench)
    bench.config.set({"keep": "1ns", "keep_failed": "1h"})
    await bench.queue.prune()
    left = ["queued", "running", "pending", "sending", "failed", "timeout", "error"]
    assert await bench.listed() == left
    bench.config.set({"keep": "1ns", "keep_failed": "1ns"})
    await bench.queue.prune()
    assert await bench.listed() == left[:4]


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
    await asyncio.gather(*(bench.enqueue() for _ in range(600)))
    await bench.queue.purge(REQUESTS)
    bench.config.set({"keep": "1ns"})
    steps = []
    while number := await bench.queue.prune():
        steps.append(number)
    assert (sum(steps), await bench.listed()) == (600, [])
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


# ---- what is left by a process that died ---------------------------------------------------------


async def test_an_interrupted_call_is_queued_again(bench: Bench) -> None:
    """The interruption is counted, and the attempt stays charged."""
    await bench.enqueue("a")
    await bench.take()
    await bench.crash()
    record = await bench.record("a")
    assert (record["status"], record["attempts"], record["interrupted"]) == ("queued", 1, 1)
    assert (await bench.take()).attempt == 2


async def test_an_interrupted_call_goes_behind_those_that_waited(bench: Bench) -> None:
    """It may be what took the process down, and they have done nothing."""
    await bench.enqueue_all("a", "b", "c")
    await bench.claim(1)
    await bench.crash()
    await bench.enqueue("d")
    assert await bench.claim() == ["b", "c", "a", "d"]


async def test_every_interruption_is_counted(bench: Bench) -> None:
    """A function that takes the machine down with it can be found."""
    await bench.enqueue("a")
    for _ in range(3):
        await bench.take()
        await bench.crash()
    record = await bench.record("a")
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
    record = await bench.record("a")
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)
    assert (record["callback"]["status"], record["callback"]["attempts"]) == ("pending", 1)
    assert await bench.claim() == []
    work = await bench.take(CALLBACKS)
    assert (work.attempt, work.body, work.target) == (2, b"done", SINK)


async def test_an_answer_is_cut_also_when_its_last_delivery_is_interrupted(bench: Bench) -> None:
    """As at any other end of a callback: nobody needs all of it any more."""
    once = {"callback": {"attempts": 1}, "retry": {"max_interruptions": 1}}
    bench.config.config = parse_config({**once, "calls": {"keep_output": 1000}})
    await bench.enqueue("a", callback_url=SINK)
    await bench.run(Outcome(200, True, 0.1, body=b"x" * 5000, size=5000))
    await bench.take(CALLBACKS)
    assert (await bench.queue.answer("a")).body == b"x" * 5000
    await bench.crash()
    assert (await bench.record("a"))["callback"]["status"] == "failed"
    assert await refused(bench.queue.answer("a")) == 410


async def test_what_waited_is_not_interrupted(bench: Bench) -> None:
    """Delayed calls keep their time, due ones their place."""
    await bench.enqueue("delayed", due_at=time.time() + 3600)
    await bench.enqueue_all("a", "b")
    before = await bench.records()
    await bench.crash()
    assert (await bench.records(), await bench.claim()) == (before, ["a", "b"])


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
    record = await bench.record("a")
    assert (record["attempts"], record["interrupted"]) == (0, 0)


@pytest.mark.parametrize("make_store", STORES)
async def test_a_killed_process_leaves_its_work_to_the_next(make_store: type[Store], tmp_path: Path) -> None:
    """SIGKILL between claim and end: calls and callbacks are there again, and the record tells."""
    bench = Bench(make_store(tmp_path, Settings()), Settings())
    await bench.open()
    await bench.enqueue("ended", callback_url=SINK)
    await bench.run()
    await bench.enqueue("interrupted")
    await bench.queue.close()
    async with owner(make_store, tmp_path) as claimed:
        assert claimed == "interrupted ended"
    await bench.open()
    record = await bench.record("interrupted")
    assert (record["status"], record["attempts"], record["interrupted"]) == ("queued", 1, 1)
    assert (await bench.claim(), await bench.claim(queue=CALLBACKS)) == (["interrupted"], ["ended"])
    await bench.queue.close()


# ---- health --------------------------------------------------------------------------------------


async def test_a_queue_that_works_says_so(bench: Bench) -> None:
    """Nothing is wrong."""
    assert (bench.queue.stalled(), await bench.queue.failing()) == (None, None)


# ---- schedules -----------------------------------------------------------------------------------

NOON = (time.time() + 43_200) // 86_400 * 86_400 + 43_200  # The next one: ids of calls are of about now.
FIRED = ScheduleState(
    name="nightly",
    definition="0 12 * * * UTC",
    last_at=NOON,
    begun_at=NOON - 86_400,
    boots=("boot",),
    missed=3,
    last_success_at=NOON - 86_400,
    runs=(
        ScheduledRun(NOON, "id", "queued"),
        ScheduledRun(NOON - 60, None, "missed", error="7 instants"),
        ScheduledRun(NOON - 86_400, "other", "success", NOON - 86_399, 1.0),
    ),
)


def scheduled(at: float = NOON, **changes: Any) -> Invocation:
    """The call of an instant, which has the same id whoever makes it."""
    own = f"{round(at * 1000):012x}"
    own_id = f"{own[:8]}-{own[8:]}-7000-8000-000000000000"
    return invocation(schedule="nightly", scheduled_for=at, **changes)._replace(id=own_id, call_id=own_id)


async def test_a_schedule_begins_with_nothing(bench: Bench) -> None:
    """It can be written with the revision 0."""
    assert await bench.queue.schedules.state("nightly") == ScheduleState("nightly")
    assert await bench.queue.schedules.states() == {}


async def test_a_schedule_and_its_call_are_stored_together(bench: Bench) -> None:
    """Both are there after a power cut, and all that was written of the schedule."""
    revision = await bench.queue.schedules.save(FIRED, [scheduled()])
    assert revision > 0
    await bench.crash()
    assert await bench.queue.schedules.state("nightly") == FIRED._replace(revision=revision)
    assert await bench.queue.schedules.states() == {"nightly": FIRED._replace(revision=revision)}
    assert await bench.claim() == [scheduled().id]


async def test_who_writes_a_schedule_second_has_done_nothing(bench: Bench) -> None:
    """The first one's revision counts; the other one reads again."""
    first = await bench.queue.schedules.save(FIRED, [scheduled()])
    assert await bench.queue.schedules.save(FIRED._replace(last_at=NOON + 1), [scheduled()]) == 0
    assert await bench.queue.schedules.state("nightly") == FIRED._replace(revision=first)
    second = await bench.queue.schedules.save(FIRED._replace(revision=first, paused=True), [])
    assert second > first
    assert await bench.queue.schedules.save(FIRED._replace(revision=first), []) == 0
    assert (await bench.queue.schedules.state("nightly")).paused
    assert await bench.claim() == [scheduled().id]


async def test_daemons_that_fire_an_instant_at_once_enqueue_it_once(bench: Bench) -> None:
    """One of them is the first."""
    saves = [bench.queue.schedules.save(FIRED, [scheduled()]) for _ in range(5)]
    revisions = await asyncio.gather(*saves)
    assert sorted(map(bool, revisions)) == [False, False, False, False, True]
    assert await bench.claim() == [scheduled().id]


async def test_an_instant_that_has_run_does_not_run_again(bench: Bench) -> None:
    """A daemon that died before it had settled the instant stores the same call once more."""
    await bench.queue.enqueue(scheduled())
    await bench.run()
    assert await bench.queue.schedules.save(FIRED, [scheduled()])
    assert await bench.claim() == []
    assert await bench.status(scheduled().id) == "success"


async def test_a_full_queue_refuses_the_calls_of_a_schedule(bench: Bench) -> None:
    """The instant is not settled then."""
    bench.config.set(max_pending=1)
    await bench.enqueue("a")
    assert await refused(bench.queue.schedules.save(FIRED, [scheduled()])) == 429
    assert await bench.queue.schedules.state("nightly") == ScheduleState("nightly")
    assert await bench.claim() == ["a"]


async def test_a_call_has_its_method_and_its_schedule(bench: Bench) -> None:
    """Also once it was queued again after its end."""
    await bench.queue.schedules.save(FIRED, [scheduled(method="PUT"), scheduled(NOON + 1)])
    await bench.enqueue("a")
    claims = {work.call_id: work for work in await bench.claims(10)}
    assert {work.method for work in claims.values()} == {"PUT", "POST"}
    work = claims[scheduled().id]
    assert work.method == "PUT"
    await bench.queue.complete(work, BAD, "error")
    await bench.queue.redrive(work.id)
    assert (await bench.take()).method == "PUT"
    record = await bench.record(work.id)
    assert (record["schedule"], record["scheduled_for"]) == ("nightly", rfc3339(NOON))
    assert {"schedule", "scheduled_for"} & set(await bench.record("a")) == set()
    assert sorted(await bench.listed(schedule="nightly")) == sorted([scheduled().id, scheduled(NOON + 1).id])
    assert await bench.listed(schedule="other") == []


async def test_schedules_have_any_name(bench: Bench) -> None:
    """That of a function with its namespace, for instance."""
    for name in ("report.openfaas-fn", "Nightly_1", "nightly"):
        assert await bench.queue.schedules.save(ScheduleState(name), [])
    assert set(await bench.queue.schedules.states()) == {"report.openfaas-fn", "Nightly_1", "nightly"}
