"""What a test of any queue needs: stores to make queues on, and a bench to try them on.

Another backend joins in with one more entry in `STORES`: a class that makes queues on a folder and
can take their power away.
"""

import asyncio
import atexit
import contextlib
import dataclasses
import functools
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

import faasd_async
from faasd_async import (
    CALLBACKS,
    CallFilter,
    CallRecord,
    Changes,
    Claim,
    Config,
    Ended,
    HttpError,
    Invocation,
    Metrics,
    NatsConfig,
    NatsQueue,
    Outcome,
    Queue,
    Rate,
    SqliteQueue,
    new_id,
    pack_headers,
    parse_config,
    record_document,
)

ROOT = Path(__file__).resolve().parent.parent
REQUESTS = "faas-request"

# How long anything that is waited for may take before the test fails. Never reached when all is
# well.
PATIENCE = 30.0

ANSWER_HEADERS = ((b"Content-Type", b"text/plain"), (b"X-Twice", b"1"), (b"X-Twice", b"2"))
OK = Outcome(200, True, 0.25, ANSWER_HEADERS, b"done", 4)
BAD = Outcome(500, False, 0.5, (), b"oops", 4, b"on stderr", "function figlet answered 500")
LATE = Outcome(504, False, 300.0, error="function figlet did not answer in time", answered=False)
SINK = "http://sink.example.org/outcome"


# ---- stores: what keeps the calls while no queue is open -----------------------------------------


class Settings:
    """The configuration as the queue sees it. A test changes it as a reload does."""

    def __init__(self) -> None:
        self.set()

    def __call__(self) -> Config:
        return self.config

    def set(self, calls: Mapping[str, Any] | None = None, **queue: Any) -> None:
        """Keys of [calls], and of the default queue. What failed is kept as long as all else if that is not said."""
        calls = {"keep_failed": calls["keep"], **calls} if calls and "keep" in calls else calls
        self.config = parse_config({"calls": calls or {}, "queues": {REQUESTS: queue}})


class Store(Protocol):
    """One backend's place for calls, made on a folder: an empty one, or one with calls in it."""

    counts_age_s: float  # how old what it says of its counts may be

    def __init__(self, folder: Path, config: Callable[[], Config]) -> None: ...

    def queue(self) -> Queue:
        """A new queue on it, not yet open."""

    async def cut_power(self, queue: Queue) -> None:
        """Keep what is there at this moment, and nothing that the open queue does from now on."""


class SqliteStore:
    """A file in a folder."""

    counts_age_s = 0.0

    def __init__(self, folder: Path, config: Callable[[], Config]) -> None:
        self.path = folder / "calls.db"
        self.config = config
        self.metrics = Metrics()

    def queue(self) -> SqliteQueue:
        """A new queue on the file."""
        return SqliteQueue(self.path, self.config, self.metrics.commits.observe)

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


def as_an_older_version(path: Path) -> None:
    """Make a file what version 1 of its schema was."""
    columns = ("app", "history", "hops", "traceparent", "tracestate", "schedule", "scheduled_for")
    with contextlib.closing(sqlite3.connect(path)) as db:
        for index in ("calls_turn", "calls_well", "calls_failed"):
            db.execute(f"DROP INDEX {index}")
        db.execute("CREATE INDEX calls_completed ON calls (completed_at) WHERE completed_at IS NOT NULL")
        for column in (*columns, "concurrency_key", "turn", "failures"):
            db.execute(f"ALTER TABLE calls DROP COLUMN {column}")
        db.execute("ALTER TABLE requests DROP COLUMN method")
        for table in ("schedules", "counts", "rates"):
            db.execute(f"DROP TABLE {table}")
        db.execute("PRAGMA user_version = 1")


@functools.cache
def nats_server() -> str:
    """The URL of a real server, which lives as long as this process."""
    folder = tempfile.mkdtemp(prefix="nats-")
    program = Path(sys.executable).with_name("nats-server")
    log = Path(folder) / "log"
    command = (program, "-js", "-sd", folder, "-a", "127.0.0.1", "-p", "-1", "-l", log)
    process = subprocess.Popen(command)

    def end() -> None:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        text = log.read_text() if log.exists() else ""
        if "Server is ready" in text:
            port = re.findall(r"Listening for client connections on 127\.0\.0\.1:(\d+)", text)[0]
            return f"nats://127.0.0.1:{port}"
        time.sleep(0.02)
    raise TimeoutError(f"nats-server is not ready: {text}")


class NatsStore:
    """A stream of its own on a server; the folder says where."""

    counts_age_s = 1.2  # it is asked once a second

    def __init__(self, folder: Path, config: Callable[[], Config]) -> None:
        place = folder / "nats"
        if not place.exists():
            place.write_text(f"{nats_server()} t{new_id()[-12:]}")
        self.url, self.name = place.read_text().split()
        self.config = config
        self.metrics = Metrics()
        # A queue waits this long for what it has just stored, or is woken: tests are not, but look at once.
        faasd_async.NATS_LATE_S = 2.0

    def queue(self) -> NatsQueue:
        """A new queue on the stream."""
        nats = NatsConfig(servers=(self.url,), stream=self.name, prefix=self.name)

        def settings() -> Config:
            return dataclasses.replace(self.config(), nats=nats)

        return NatsQueue(settings, self.metrics)

    async def cut_power(self, queue: Queue) -> None:
        """Cut the connection: the server sees a daemon go that has said nothing."""
        assert isinstance(queue, NatsQueue)
        client = queue._link._client
        assert client
        client.options["allow_reconnect"] = False
        writer = getattr(client._transport, "_io_writer")  # noqa: B009 - not every transport has one
        writer.transport.abort()
        await queue.close()


STORES: list[type[Store]] = [SqliteStore, NatsStore]


# ---- bench: an open queue in a test's hands ------------------------------------------------------

B = TypeVar("B", bound="Bench")


class Bench:
    """A queue on a store, with all that it tells its owner."""

    def __init__(self, store: Store, config: Settings) -> None:
        self.store = store
        self.config = config
        self.queue: Queue
        self.woken: list[str] = []
        self.stopped: list[Hashable] = []
        self.ended: list[Ended] = []
        self.changes: list[Changes] = []
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

    def watch(self) -> None:
        """Have changes told from now on."""
        self.queue.watch(self._note(self.changes))

    def told(self) -> list[tuple[str, str, str]]:
        """The changes so far: call id, state, state of the callback; the same twice in a row is once."""
        records = [record for changes in self.changes for record in changes.records]
        told = [(record.call_id, record.status, record.callback.status) for record in records]
        return [item for number, item in enumerate(told) if told[number - 1 : number] != [item]]

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

    async def add(self, call_id: str | None = None, **changes: Any) -> str:
        """Store a call; the id that it shares with no other."""
        call = invocation(call_id, **changes)
        await self.queue.enqueue(call)
        return call.id

    async def enqueue_all(self, *call_ids: str, **changes: Any) -> None:
        """Store calls, one after the other."""
        for call_id in call_ids:
            await self.enqueue(call_id, **changes)

    async def claims(
        self,
        limit: int = 1000,
        queue: str = REQUESTS,
        room: Mapping[str, int] | None = None,
        rates: Mapping[str, Rate] | None = None,
    ) -> Sequence[Claim]:
        """What is handed out."""
        return await self.queue.claim(queue, limit, room or {}, rates or {})

    async def claim(self, limit: int = 1000, queue: str = REQUESTS, room: Mapping[str, int] | None = None) -> list[str]:
        """The call ids of what is handed out."""
        return [work.call_id for work in await self.claims(limit, queue, room)]

    async def take(self, queue: str = REQUESTS) -> Claim:
        """The only thing that is due."""
        (work,) = await self.claims(queue=queue)
        return work

    async def run(self, outcome: Outcome = OK, status: str = "success", queue: str = REQUESTS) -> Claim:
        """Take the only thing that is due and make it final."""
        work = await self.take(queue)
        assert await self.queue.complete(work, outcome, status)
        return work

    async def deliver(self, outcome: Outcome = OK, status: str = "delivered") -> Claim:
        """Take the only callback that is due and make it final."""
        return await self.run(outcome, status, CALLBACKS)

    async def record(self, call_id: str) -> dict[str, Any]:
        """The record of a call as people see it."""
        return record_document(await self.queue.lookup(call_id))

    async def status(self, call_id: str) -> str:
        """The state of a call."""
        return (await self.queue.lookup(call_id)).status

    async def records(self, **filters: Any) -> Sequence[CallRecord]:
        """The newest thousand of the records that match."""
        page = await self.queue.list_records(CallFilter(**filters), 1000)
        return page.records

    async def listed(self, **filters: Any) -> list[str]:
        """The call ids of the records that match."""
        return [record.call_id for record in await self.records(**filters)]

    async def pages(self, limit: int, **filters: Any) -> AsyncIterator[list[str]]:
        """The call ids of the records that match, one page after the other."""
        cursor = None
        while True:
            page = await self.queue.list_records(CallFilter(**filters), limit, cursor)
            yield [record.call_id for record in page.records]
            cursor = page.next_cursor
            if cursor is None:
                return

    async def waiting(self, queue: str = REQUESTS) -> dict[str, int]:
        """How many calls wait, by lane."""
        await asyncio.sleep(self.store.counts_age_s)
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
            if found := await self.claims(1):
                return found[0]
            await self.until(lambda: REQUESTS in self.woken)


def queue_of(bench: Bench) -> NatsQueue:
    """The queue of a bench on NATS, as the one that it is."""
    assert isinstance(bench.queue, NatsQueue)
    return bench.queue


@contextlib.asynccontextmanager
async def open_bench(make_bench: type[B], make_store: type[Store], folder: Path) -> AsyncIterator[B]:
    """An open queue on the store of a folder."""
    config = Settings()
    bench = make_bench(make_store(folder, config), config)
    await bench.open()
    yield bench
    await bench.queue.close()


def invocation(call_id: str | None = None, **changes: Any) -> Invocation:
    """A call that is due now."""
    now, own = time.time(), new_id()
    call = Invocation(
        id=own,
        call_id=call_id or own,
        function="figlet",
        namespace="openfaas-fn",
        queue=REQUESTS,
        start_time=round(now * 1e9),
        due_at=now,
        deadline_at=None,
        max_attempts=10,
        callback_url=None,
        failure_url=None,
        idempotency_key=None,
        app=None,
        target="/a%2Fb?c=d",
        headers=pack_headers([(b"X-A", b"1")]),
        body=b"body",
    )
    return call._replace(**changes)


async def refused(attempt: Awaitable[object]) -> int:
    """The HTTP status with which something is refused."""
    with pytest.raises(HttpError) as caught:
        await attempt
    assert "\n" not in caught.value.text
    return caught.value.status


# ---- a process that owns a store, and is killed --------------------------------------------------


async def claim_and_wait_to_be_killed(store: Store) -> None:
    """What that process does: claim all there is, and never end it."""
    bench = Bench(store, Settings())
    await bench.open()
    print(*await bench.claim(), *await bench.claim(queue=CALLBACKS), flush=True)
    sys.stdin.read()


@contextlib.asynccontextmanager
async def owner(make_store: type[Store], folder: Path) -> AsyncIterator[str]:
    """Another process that has the store of a folder open and all its work claimed.

    Gives the call ids of that work. The process is killed in the end, so what it would measure is lost.
    """
    environment = {name: value for name, value in os.environ.items() if name != "COVERAGE_PROCESS_CONFIG"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, str(STORES.index(make_store)), str(folder)),
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    try:
        async with asyncio.timeout(PATIENCE):
            yield (await process.stdout.readline()).decode().strip()
    finally:
        process.kill()
        process.stdin.close()
        await process.wait()


if __name__ == "__main__":
    signal.alarm(round(PATIENCE))  # never outlive the test
    faasd_async.import_libraries()
    number, folder = sys.argv[1:]
    asyncio.run(claim_and_wait_to_be_killed(STORES[int(number)](Path(folder), Settings())))
