"""The queue against a model: a list of rows, to which the same is done."""

import asyncio
import contextlib
import tempfile
from collections import Counter, defaultdict
from collections.abc import Awaitable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from conftest import Clock
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from queues import (
    BAD,
    LATE,
    OK,
    REQUESTS,
    Bench,
    Settings,
    SqliteStore,
    invocation,
    refused,
)

import faasd_async
from faasd_async import (
    CALLBACKS,
    FINAL,
    BulkResult,
    CallFilter,
    Claim,
    HttpError,
    Invocation,
    parse_config,
)

T = TypeVar("T")


# ---- the model -----------------------------------------------------------------------------------


@dataclass
class Row:
    """A call as the model has it."""

    number: int  # in the order of acceptance
    call: Invocation
    due_at: float
    status: str = "queued"
    work: str | None = None  # what is to be done: in which queue, CALLBACKS or nothing
    deadline_at: float | None = None  # None while it runs, and once an attempt was charged
    kept_deadline_at: float | None = None  # the same while it runs, in case it never happened
    owner: Claim | None = None
    attempts: int = 0
    interrupted: int = 0
    completed_at: float = 0.0
    callback_status: str = "none"
    callback_attempts: int = 0
    has_request: bool = True

    @property
    def keep_s(self) -> float:
        """How long it is kept after its end."""
        failed = self.status in ("error", "timeout") or self.callback_status == "failed"
        return KEEP_FAILED_S if failed else KEEP_S

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

    def state(self, now: float) -> str:
        """Its status as people see it."""
        return "delayed" if self.status == "queued" and self.due_at > now else self.status

    def shown(self, now: float) -> tuple[object, ...]:
        """What the record has to tell."""
        call = self.call
        return (
            *(call.id, call.call_id, call.function, call.queue),
            *(self.state(now), self.attempts, self.interrupted),
            *(self.callback_status, self.callback_attempts),
        )

    def matches(self, wanted: CallFilter, now: float) -> bool:
        """Whether it is among what a list with this filter shows."""
        call, created_at = self.call, self.call.start_time // 1000 / 1e6
        return all(
            (
                not wanted.statuses or self.state(now) in wanted.statuses,
                not wanted.callbacks or self.callback_status in wanted.callbacks,
                wanted.function in (None, call.function),
                wanted.queue in (None, call.queue),
                wanted.call_id in (None, call.call_id, call.id),
                wanted.app in (None, call.app),
                wanted.since is None or wanted.since <= created_at,
                wanted.until is None or created_at < wanted.until,
            )
        )


# ---- what may happen -----------------------------------------------------------------------------

START_AT = 1_700_000_000.0
CHAIN = "chain"  # the newest call's own id, as a callback that runs another function has it
QUEUES = (REQUESTS, "plain")  # fair, and not
FUNCTIONS = ("a", "b", "c")
CALLS = st.fixed_dictionaries({
    "function": st.sampled_from(FUNCTIONS),
    "queue": st.sampled_from(QUEUES),
    "delay": st.sampled_from([0, 0, 0, 5, 60]),
    "deadline": st.sampled_from([None, None, None, 30]),
    "call_id": st.sampled_from([None, None, "batch-1", "batch-2", CHAIN]),
    "callback_url": st.sampled_from([None, "http://sink-1/", "http://sink-2/"]),
    "failure_url": st.sampled_from([None, None, "http://sink-2/bad"]),
    "idempotency_key": st.sampled_from([None, None, None, "key-1", "key-2"]),
    "concurrency_key": st.sampled_from([None, None, "key-1", "key-2"]),
    "app": st.sampled_from([None, None, "mine"]),
    "body": st.sampled_from([b"", b"a", b"long" * 20]),
})  # fmt: skip
STATES = ["delayed", "queued", "running", *FINAL]
CALLBACK_STATES = ["none", "pending", "delivered", "failed"]


def seldom(values: st.SearchStrategy[Any], else_: object = None) -> st.SearchStrategy[Any]:
    """One condition of a filter: most filters do without."""
    return st.integers(0, 5).flatmap(lambda number: st.just(else_) if number else values)


FILTERS = st.builds(
    CallFilter,
    statuses=seldom(st.lists(st.sampled_from(STATES), min_size=1, max_size=4).map(tuple), ()),
    callbacks=seldom(st.lists(st.sampled_from(CALLBACK_STATES), max_size=3).map(tuple), ()),
    function=seldom(st.sampled_from(FUNCTIONS)),
    queue=seldom(st.sampled_from(QUEUES)),
    call_id=seldom(st.just("batch-1")),
    app=seldom(st.just("mine")),
    schedule=st.none(),
    since=seldom(st.sampled_from([START_AT + 5, START_AT + 100])),
    until=seldom(st.sampled_from([START_AT + 60, START_AT + 200])),
)
ROOMS = st.dictionaries(
    st.sampled_from(["", "a.openfaas-fn", "b.openfaas-fn", "sink-1", "sink-2"]),
    st.integers(0, 2),
    max_size=3,
)
KEEP_S, KEEP_FAILED_S, KEEP_OUTPUT, MAX_PENDING = 100.0, 150.0, 64, 10
# A few calls make many steps of what is done in steps.
BATCH = 3
SMALL: dict[str, Any] = {"BATCH": BATCH, "SCAN_WINDOW": 5, "BULK_PERIOD_S": 0.0}
PICK = st.integers(0, 99)


# ---- the machine ---------------------------------------------------------------------------------


class QueueMachine(RuleBasedStateMachine):
    """Does to a queue and to a list of rows whatever comes to mind.

    The two are compared after each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock(START_AT)
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(mock.patch.multiple(faasd_async, time=self.clock, **SMALL))
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.runner = self.stack.enter_context(asyncio.Runner(loop_factory=asyncio.new_event_loop))
        self.rows: list[Row] = []
        # What consumers have in hand, cancelled work included.
        self.held: list[tuple[Claim, Row]] = []
        self.paused: set[str] = set()
        self.accepted = 0
        self.ended: list[tuple[str, str, str, int]] = []
        self.stopped: list[Hashable] = []

    @initialize()
    def start(self) -> None:
        """An open queue on an empty store."""
        config = Settings()
        queues = {
            REQUESTS: {"max_pending": MAX_PENDING},
            "plain": {"max_pending": MAX_PENDING, "fair": False},
        }
        calls = {"keep": f"{KEEP_S}s", "keep_failed": f"{KEEP_FAILED_S}s", "keep_output": KEEP_OUTPUT}
        config.config = parse_config({"calls": calls, "queues": queues})
        self.bench = Bench(SqliteStore(self.folder, config), config)
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
        """Time passes, so that no two steps happen at once. Calls that miss their deadline end."""
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
        self.ended.append((row.call.id, row.call.call_id, status, row.attempts))
        if status != "cancelled" and row.target is not None:
            row.work, row.due_at, row.callback_status = CALLBACKS, self.clock.now, "pending"

    # -- rules

    @rule(drawn=st.lists(CALLS, min_size=1, max_size=5))
    def enqueue(self, drawn: list[dict[str, Any]]) -> None:
        """Calls come in, all at once."""
        self.tick()
        calls = [self.drawn_call(**fields) for fields in drawn]
        expected = [self.accept(call) for call in calls]

        async def act() -> list[Any]:
            accepted = map(self.bench.queue.enqueue, calls)
            return await asyncio.gather(*accepted, return_exceptions=True)

        found = [item.status if isinstance(item, HttpError) else item for item in self.run(act())]
        assert found == expected

    def drawn_call(self, call_id: str | None, delay: float, deadline: float | None, **fields: Any) -> Invocation:
        """A call that comes in now."""
        now = self.clock.now
        if call_id == CHAIN:
            call_id = self.rows[-1].call.id if self.rows else None
        return invocation(
            call_id,
            start_time=round(now * 1e9),
            due_at=now + delay,
            deadline_at=None if deadline is None else now + deadline,
            **fields,
        )

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
        waiting = [row for row in self.rows if row.work is not None and row.owner is None]
        found = [row for row in waiting if row.due_at <= self.clock.now and self.has_turn(row)]
        return sorted(found, key=lambda row: (row.due_at, row.number))

    def has_turn(self, row: Row) -> bool:
        """Whether it is the next with its key, and none that was cancelled runs still."""
        if row.call.concurrency_key is None or row.work == CALLBACKS:
            return True
        same = [other for other in self.rows if other.call[2:4] == row.call[2:4]]
        same = [other for other in same if other.call.concurrency_key == row.call.concurrency_key]
        for work, held in self.held:
            now = next((other for other in same if other.call.id == work.id), None)
            stopping = now is held and held.status == "cancelled"
            if work.queue != CALLBACKS and now is not None and (now.owner is work or stopping):
                return False
        waiting = [other for other in same if other.status == "queued"]
        return row is min(waiting, key=lambda other: (other.due_at, other.number))

    def waiting(self, queue: str) -> list[Row]:
        """What waits in a queue, due or not."""
        return [row for row in self.rows if row.work == queue and row.owner is None]

    @precondition(lambda self: self.due())
    @rule(pick=PICK, limit=st.integers(1, 6), room=ROOMS)
    def claim(self, pick: int, limit: int, room: dict[str, int]) -> None:
        """A consumer gets all that it may have, in order; from a paused queue nothing."""
        self.tick()
        waiting = self.due()
        queue = waiting[pick % len(waiting)].work or ""
        if queue in self.paused:
            assert not self.run(self.bench.claims(limit, queue, room))
            self.run(self.bench.queue.pause(queue, False))
            self.paused.remove(queue)
        due: dict[str, list[Row]] = defaultdict(list)
        for row in waiting:
            if row.work == queue:
                due[row.lane].append(row)
        free = {lane: min(len(rows), room.get(lane, room.get("", limit))) for lane, rows in due.items()}
        assert not self.bench.queue.nothing_waits(queue)
        found = self.run(self.bench.claims(limit, queue, room))
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
            assert work.target == row.target
            assert (work.attempt, work.runs) == (row.callback_attempts, row.attempts)
        else:
            row.attempts, row.status = row.attempts + 1, "running"
            row.kept_deadline_at, row.deadline_at = row.deadline_at, None
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
            row.deadline_at = None if charged else row.kept_deadline_at
        self.tick()  # That may have passed meanwhile.

    def pick_id(self, pick: int) -> tuple[str, list[Row]]:
        """An id of any call there is or of none, shared or not; with it the calls that it means."""
        ids = [row.call.call_id for row in self.rows] + [row.call.id for row in self.rows]
        call_id = [*dict.fromkeys(ids), "nobody"][pick % (len({*ids}) + 1)]
        own = [row for row in self.rows if row.call.id == call_id]
        return call_id, own or [row for row in self.rows if row.call.call_id == call_id]

    @precondition(lambda self: self.rows)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        """All calls that an id means and that have something to do are stopped."""
        self.tick()
        call_id, known = self.pick_id(pick)
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
                self.stopped.append(row.owner.receipt)
            if row.work == CALLBACKS:
                row.callback_status, row.work, row.owner = "failed", None, None
            else:
                self.finish(row, "cancelled")

    @precondition(lambda self: any(row.work is None for row in self.rows))
    @rule(pick=PICK)
    def redrive(self, pick: int) -> None:
        """A finished call is queued again by hand."""
        self.tick()
        call_id, known = self.pick_id(pick)
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
        self.queued_again(known[-1])

    def queued_again(self, old: Row) -> None:
        """It is as new."""
        again = Row(old.number, old.call, self.clock.now, work=old.call.queue)
        self.rows[self.rows.index(old)] = again

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
        done = [row for row in self.rows if row.status in FINAL and row.work is None]
        return [row for row in done if row.completed_at < self.clock.now - row.keep_s]

    @precondition(lambda self: self.past_their_time())
    @rule()
    def prune(self) -> None:
        """Old records go."""
        gone = self.past_their_time()
        steps = [self.run(self.bench.queue.prune()) for _ in range(0, len(gone), BATCH)]
        assert sum(steps) == len(gone)
        self.rows = [row for row in self.rows if row not in gone]

    @precondition(lambda self: self.rows)
    @rule(orderly=st.booleans())
    def restart(self, orderly: bool) -> None:
        """The process ends, in order or not, and the next one takes over."""
        now = self.tick()
        self.run(self.bench.reopen() if orderly else self.bench.crash())
        together: Counter[str] = Counter()
        for row in self.rows:
            if row.owner is not None and row.work is not None:
                row.owner = None
                row.due_at = now  # behind all that waited
                if row.work != CALLBACKS:
                    row.status, row.interrupted = "queued", row.interrupted + 1
                    row.due_at += min(60, together[row.work] * (2 ** min(row.interrupted - 1, 6) - 1))
                    together[row.work] += 1
        self.held.clear()

    # -- invariants

    @invariant()
    def every_record_agrees(self) -> None:
        """Each accepted call is there once, in the state that the model has for it."""
        shown = [
            (
                *(record.id, record.call_id, record.function, record.queue),
                *(record.status, record.attempts, record.interrupted),
                *(record.callback.status, record.callback.attempts),
            )
            for record in self.run(self.bench.records())
        ]
        assert shown == [row.shown(self.clock.now) for row in reversed(self.rows)]

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
    def every_state_is_counted(self) -> None:
        """By lane, and callbacks by theirs."""
        expected: Counter[tuple[str, str]] = Counter()
        for row in self.rows:
            expected[f"{row.call.function}.{row.call.namespace}", row.state(self.clock.now)] += 1
            if row.callback_status != "none":
                expected[CALLBACKS, row.callback_status] += 1
        overview = self.run(self.bench.queue.overview())
        assert {place: number for place, number in overview.counts.items() if number} == expected

    @invariant()
    def every_end_was_told(self) -> None:
        """Each end once, and each owner whose work was cancelled."""
        ended = self.bench.ended
        told = [(end.id, end.call_id, end.status, end.attempts) for end in ended]
        assert Counter(told) == Counter(self.ended)
        assert Counter(self.bench.stopped) == Counter(self.stopped)


class BulkMachine(QueueMachine):
    """Does the same, and lists, cancels and redrives all calls that match a filter."""

    def matching(self, wanted: CallFilter) -> list[Row]:
        """What a filter means."""
        return [row for row in self.rows if row.matches(wanted, self.clock.now)]

    @precondition(lambda self: len(self.rows) > 3)
    @rule(wanted=FILTERS)
    def cancel_matching(self, wanted: CallFilter) -> None:
        """All that match are stopped, as far as they have something to do."""
        self.tick()
        matching = self.matching(wanted)
        active = [row for row in matching if row.work is not None]
        expected = BulkResult(len(matching), len(active))
        assert self.run(self.bench.queue.cancel_matching(wanted)) == expected
        self.cancelled(active)

    @precondition(lambda self: any(row.work is None for row in self.rows))
    @rule(wanted=FILTERS)
    def redrive_matching(self, wanted: CallFilter) -> None:
        """All that match are queued again, as far as they have ended and their request is there."""
        self.tick()
        matching = self.matching(wanted)
        ended = [row for row in matching if row.work is None and row.has_request]
        expected = BulkResult(len(matching), len(ended))
        assert self.run(self.bench.queue.redrive_matching(wanted)) == expected
        for row in ended:
            self.queued_again(row)

    @precondition(lambda self: self.rows)
    @rule(wanted=FILTERS, limit=st.integers(1, 4))
    def page_through(self, wanted: CallFilter, limit: int) -> None:
        """All that matches is shown once, newest first, in full pages."""
        self.tick()

        async def act() -> list[list[str]]:
            return [page async for page in self.bench.pages(limit, **wanted._asdict())]

        found = self.run(act())
        names = [row.call.call_id for row in self.matching(wanted)]
        assert [name for page in found for name in page] == names[::-1]
        assert all(len(page) == limit for page in found[:-1])
        assert len(found[-1]) <= limit


MODEL = settings(
    max_examples=20,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # with Phase.shrink a failure takes minutes, and then has as few steps as possible
)
TestQueueAgainstModel = QueueMachine.TestCase
TestQueueAgainstModel.settings = MODEL
TestBulkAgainstModel = BulkMachine.TestCase
TestBulkAgainstModel.settings = MODEL
