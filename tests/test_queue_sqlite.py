"""What SQLite adds to the queue: its file, group commit, disks that fill up, cheap statements."""

import asyncio
import contextlib
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar
from unittest import mock

import pytest
from conftest import Clock
from queues import (
    BAD,
    OK,
    PATIENCE,
    REQUESTS,
    SINK,
    Bench,
    Settings,
    SqliteStore,
    as_an_older_version,
    invocation,
    open_bench,
    owner,
)

import faasd_async
from faasd_async import (
    CALLBACKS,
    BulkResult,
    CallFilter,
    HttpError,
    SqliteFile,
    SqliteQueue,
    StoreError,
    StoreLocked,
    discard_copy,
)

T = TypeVar("T")


# ---- bench ---------------------------------------------------------------------------------------


class SqliteBench(Bench):
    """A queue on a file, with a way to its connection."""

    store: SqliteStore
    queue: SqliteQueue

    def in_writer(self, step: Callable[[SqliteFile], T]) -> Awaitable[T]:
        """Run something in the writer's thread, in a transaction of the queue."""
        return self.queue._writer.steps.submit(step)

    async def pragma(self, name: str) -> Any:
        """A setting of the connection, read or set."""
        return await self.in_writer(lambda file: file.db.execute(f"PRAGMA {name}").fetchone()[0])

    def commits(self) -> float:
        """How many commits there were."""
        return self.store.metrics.registry.get_sample_value("faasd_async_commit_seconds_count") or 0.0


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[SqliteBench]:
    """An open queue on a new file."""
    async with open_bench(SqliteBench, SqliteStore, tmp_path) as bench:
        yield bench


@pytest.fixture
def clock() -> Iterator[Clock]:
    """The clock that the daemon's code looks at; it stands still unless a test moves it."""
    found = Clock(time.time())
    with mock.patch.object(faasd_async, "time", found):
        yield found


# ---- the file ------------------------------------------------------------------------------------


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
    async with owner(SqliteStore, tmp_path):
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
    sqlite: SqliteBench,
    tmp_path: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
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
    as_an_older_version(sqlite.store.path)
    await sqlite.open()
    assert dict((await sqlite.queue.overview()).counts) == {("figlet.openfaas-fn", "queued"): 1}
    await sqlite.enqueue("b", app="mine")
    assert await sqlite.claim() == ["a", "b"]
    assert await sqlite.listed(app="mine") == ["b"]
    with contextlib.closing(sqlite3.connect(tmp_path / "calls.db.schema-1")) as db:
        assert db.execute("SELECT call_id FROM calls").fetchall() == [("a",)]
        assert db.execute("PRAGMA user_version").fetchone() == (1,)


@pytest.mark.parametrize(
    ("change", "trouble"),
    [
        (
            "DROP INDEX calls_turn; ALTER TABLE calls DROP COLUMN turn",
            "not of schema 4, .* no calls.turn, calls_turn. M",
        ),
        ("DROP TABLE rates", "not of schema 4, as it says: it has no rates.name, rates.next_at. Move it away"),
        ("DROP INDEX calls_well", "not of schema 4, as it says: it has no calls_well. Move it away"),
        ("PRAGMA user_version = 3", "not of schema 3, as it says: duplicate column name: traceparent. Move it away"),
        ("PRAGMA user_version = 0", "a database of something else .with calls.app.: store.path has to be our own"),
        ("PRAGMA user_version = -1", "written by a newer version .schema -1."),
    ],
)
async def test_a_file_that_is_not_what_its_version_says_is_refused(
    sqlite: SqliteBench, change: str, trouble: str
) -> None:
    """One line says what is missing, and the file stays as it is."""
    await sqlite.enqueue("a")
    await sqlite.queue.close()
    with contextlib.closing(sqlite3.connect(sqlite.store.path)) as db:
        db.executescript(change)
    before = sqlite.store.path.read_bytes()
    with pytest.raises(StoreError, match=trouble) as caught:
        await SqliteStore(sqlite.store.path.parent, Settings()).queue().open(print, print, print)
    assert str(caught.value).startswith(f"{sqlite.store.path}: ")
    assert sqlite.store.path.read_bytes()[100:] == before[100:]


# ---- commits -------------------------------------------------------------------------------------


async def test_calls_that_come_at_once_share_commits(sqlite: SqliteBench) -> None:
    """One fsync for all that arrived during the last one."""
    before = sqlite.commits()
    await asyncio.gather(*(sqlite.enqueue() for _ in range(300)))
    assert 1 <= sqlite.commits() - before <= 10


async def test_calls_that_come_before_a_commit_share_it(sqlite: SqliteBench) -> None:
    """Groups of callers are not torn in two by those of them who come a moment later."""
    busy = threading.Event()
    go_on = threading.Event()

    def hold(file: SqliteFile) -> None:
        busy.set()
        go_on.wait(PATIENCE)

    before = sqlite.commits()
    early = asyncio.gather(sqlite.enqueue(), sqlite.in_writer(hold))
    await asyncio.to_thread(busy.wait, PATIENCE)
    late = asyncio.gather(*(sqlite.enqueue() for _ in range(3)))
    for _ in range(3):  # They are handed over to the writer.
        await asyncio.sleep(0)
    go_on.set()
    await early
    await late
    assert sqlite.commits() - before == 1


async def test_the_log_is_carried_over_to_the_file_in_a_pause(sqlite: SqliteBench) -> None:
    """Before SQLite would do so in a commit, which callers wait for."""
    begun = threading.Event()

    def look(statement: str) -> None:
        if "wal_checkpoint" in statement:
            begun.set()

    await sqlite.in_writer(lambda file: file.db.set_trace_callback(look))
    await asyncio.gather(*(sqlite.enqueue() for _ in range(500)))
    assert await asyncio.to_thread(begun.wait, PATIENCE)
    await sqlite.records()  # The pause is over.
    # So opened the file is read alone, without its log.
    with contextlib.closing(sqlite3.connect(f"file:{sqlite.store.path}?immutable=1", uri=True)) as db:
        assert db.execute("SELECT count(*) FROM calls").fetchone() == (500,)


async def test_reading_commits_nothing(sqlite: SqliteBench) -> None:
    """Who looks at records or finds no work does not wear out the disk."""
    await sqlite.enqueue("a", due_at=time.time() + 3600)
    before = sqlite.commits()
    await sqlite.queue.lookup("a")
    await sqlite.records()
    await sqlite.queue.stats()
    await sqlite.claim()
    assert sqlite.commits() == before


async def test_a_call_that_can_not_be_stored_does_not_take_others_down(sqlite: SqliteBench) -> None:
    """Each gets its own answer, though they share a commit."""
    calls = [invocation(f"call-{number}") for number in range(5)]
    calls[2] = calls[2]._replace(start_time=1 << 70)  # more than a column holds
    found = await asyncio.gather(*map(sqlite.queue.enqueue, calls), return_exceptions=True)
    assert isinstance(found[2], StoreError)
    stored = ["call-0", "call-1", "call-3", "call-4"]
    assert [item for item in found if isinstance(item, str)] == stored
    assert await sqlite.claim() == stored


async def test_work_that_can_not_be_ended_does_not_take_others_down(sqlite: SqliteBench) -> None:
    """Whatever is done at the same moment is done."""
    await sqlite.enqueue_all("a", "b")
    a, b = await sqlite.claims(2)
    found = await asyncio.gather(
        sqlite.queue.complete(a, OK._replace(size=1 << 70), "success"),
        sqlite.queue.complete(b, OK, "success"),
        sqlite.enqueue("c"),
        return_exceptions=True,
    )
    assert isinstance(found[0], StoreError)
    assert (found[1], found[2]) == (True, "c")
    assert [await sqlite.status(call_id) for call_id in "abc"] == ["running", "success", "queued"]


async def test_a_queue_says_whether_a_claim_would_find_nothing(sqlite: SqliteBench) -> None:
    """Also while what was stored is on its way, and after a claim of which nothing was stored."""
    queue = sqlite.queue
    assert queue.nothing_waits(REQUESTS)
    storing = asyncio.ensure_future(queue.enqueue(invocation("a")))
    assert not queue.nothing_waits(REQUESTS)
    await storing
    db = queue._file.db
    db.execute("CREATE TEMP TRIGGER late AFTER INSERT ON counts BEGIN SELECT RAISE(ABORT, 'too late'); END")
    with pytest.raises(StoreError, match="too late"):
        await sqlite.claim()
    db.execute("DROP TRIGGER late")
    assert not queue.nothing_waits(REQUESTS)
    assert await sqlite.claim() == ["a"]
    assert queue.nothing_waits(REQUESTS)


async def test_a_bulk_is_done_in_few_commits(sqlite: SqliteBench) -> None:
    """One for each batch: neither one for each call, nor one that all the others wait for."""
    await asyncio.gather(*(sqlite.enqueue() for _ in range(2000)))
    before = sqlite.commits()
    await sqlite.queue.cancel_matching(CallFilter(statuses=("queued",)))
    assert 2 <= sqlite.commits() - before <= 40
    before = sqlite.commits()
    await sqlite.queue.redrive_matching(CallFilter(statuses=("cancelled",)))
    assert 2 <= sqlite.commits() - before <= 40


# ---- full disks ----------------------------------------------------------------------------------


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


async def test_a_full_disk_is_told_also_after_a_wait(sqlite: SqliteBench) -> None:
    """That a call became due meanwhile does not mean that another one could be stored."""
    await sqlite.enqueue("later", due_at=time.time() + 0.5)
    await fill_disk(sqlite)
    with pytest.raises(StoreError):
        await sqlite.enqueue("big", body=bytes(100_000))
    sqlite.woken.clear()
    await sqlite.until(lambda: REQUESTS in sqlite.woken)
    assert "full" in (await sqlite.queue.failing() or "")


async def test_a_full_disk_leaves_what_was_stored(sqlite: SqliteBench) -> None:
    """Counts, order and limits are as they were before the call that found no place."""
    sqlite.config.set(max_pending=3)
    await sqlite.enqueue_all("a", "b")
    before = await sqlite.queue.stats(), await sqlite.records()
    await fill_disk(sqlite)
    for _ in range(3):
        with pytest.raises(StoreError):
            await sqlite.enqueue("big", function="other", body=bytes(100_000))
    assert (await sqlite.queue.stats(), await sqlite.records()) == before
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


# ---- space ---------------------------------------------------------------------------------------


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


# ---- time ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("restart", [False, True])
async def test_what_follows_on_something_waits_for_no_clock_that_was_set_back(
    sqlite: SqliteBench, clock: Clock, restart: bool
) -> None:
    """Calls that were queued again, outcomes that are sent again, what is tried again after a long time."""

    async def add(name: str, **changes: Any) -> None:
        await sqlite.enqueue(name, start_time=clock.time_ns(), due_at=clock.now, **changes)

    clock.now = math.ceil(clock.now)  # Times of ends are stored in microseconds.
    await add("again")
    await sqlite.run(BAD, "error")
    await add("told", callback_url=SINK)
    await sqlite.run()
    await sqlite.deliver()
    await add("tried", callback_url=SINK)
    await sqlite.run()
    telling = await sqlite.take(CALLBACKS)
    await add("long")
    running = await sqlite.take()
    clock.now += 7200
    assert await sqlite.queue.retry(running, BAD, 10.0)
    assert await sqlite.queue.retry(telling, BAD, 10.0)
    await sqlite.queue.redrive("again")
    await sqlite.queue.resend("told")
    clock.now -= 3600
    if restart:
        await sqlite.reopen()
    assert sorted(await sqlite.claim()) == ["again", "long"]
    assert sorted(await sqlite.claim(queue=CALLBACKS)) == ["told", "tried"]


async def test_a_clock_that_was_set_back_hides_no_call(sqlite: SqliteBench) -> None:
    """Calls are listed in the order in which they came, and filtered by the time that they have."""
    day_s = 86_400
    now_s = round(time.time())
    for name, age_s in (("a", 3), ("b", 1), ("c", 4), ("d", 2)):
        await sqlite.enqueue(name, start_time=(now_s - age_s * day_s) * 10**9)
    assert await sqlite.listed(since=now_s - 2 * day_s) == ["d", "b"]
    assert await sqlite.listed(until=now_s - 2 * day_s) == ["c", "a"]
    pages = [page async for page in sqlite.pages(1, since=now_s - 3 * day_s)]
    assert [name for page in pages for name in page] == ["d", "b", "a"]


# ---- statements ----------------------------------------------------------------------------------


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
    await sqlite.records(call_id="a")
    await sqlite.records(statuses=("success",))
    await sqlite.records(statuses=("success", "error"), callbacks=("failed", "pending"))
    await sqlite.records(function="figlet", queue=REQUESTS, app="mine")
    await sqlite.records(since=1.0, until=2.0)
    await queue.redrive_matching(CallFilter(call_id="a"))
    await queue.cancel_matching(CallFilter(statuses=("queued", "delayed")))
    await queue.redrive_matching(CallFilter(statuses=("cancelled",), callbacks=("none",)))
    await queue.stats()
    await queue.overview()
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


async def test_figures_of_many_lanes_take_few_statements(sqlite: SqliteBench) -> None:
    """Whoever wants something stored waits for them."""
    for number in range(300):
        await sqlite.enqueue(function=f"f{number}", due_at=1000.0 + number if number % 3 else time.time() + 3600)
    statements: list[str] = []
    await sqlite.in_writer(lambda file: file.db.set_trace_callback(statements.append))
    overview = await sqlite.queue.overview()
    await sqlite.in_writer(lambda file: file.db.set_trace_callback(None))
    assert len(statements) < 20
    assert overview.queues[REQUESTS].oldest_at == 1001.0
    assert sum(overview.queues[REQUESTS].waiting.values()) == 300
    for number in range(300):
        lane = f"f{number}.openfaas-fn"
        assert (overview.counts[lane, "queued"], overview.counts[lane, "delayed"]) == ((1, 0) if number % 3 else (0, 1))


# ---- order, and long histories -------------------------------------------------------------------


async def test_a_queue_that_is_not_fair_is_first_in_first_out(sqlite: SqliteBench) -> None:
    """Across all functions."""
    sqlite.config.set(fair=False)
    names = ["a1", "a2", "b1", "c1", "b2", "a3"]
    for name in names:
        await sqlite.enqueue(name, function=name[0])
    assert [*await sqlite.claim(1), *await sqlite.claim(2), *await sqlite.claim(10)] == names


async def test_a_cancelled_call_does_not_change_the_order_of_a_queue_that_is_not_fair(
    sqlite: SqliteBench,
) -> None:
    """What comes after it in its lane does not move up to its place."""
    sqlite.config.set(fair=False)
    for name in ("a1", "b1", "a2", "b2"):
        await sqlite.enqueue(name, function=name[0])
    await sqlite.queue.cancel("a1")
    assert await sqlite.claim() == ["b1", "a2", "b2"]


async def few_among_many(sqlite: SqliteBench) -> None:
    """Fifty calls, five of them of another function."""
    for number in range(50):
        function = "rare" if number in (0, 1, 3, 20, 21) else "other"
        await sqlite.enqueue(f"call-{number}", function=function)


async def test_a_rare_match_is_found_however_far_back(sqlite: SqliteBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long history is read in steps, which nobody sees from outside."""
    monkeypatch.setattr(faasd_async, "SCAN_WINDOW", 7)
    await few_among_many(sqlite)
    found = [page async for page in sqlite.pages(function="rare", limit=3)]
    assert found[:2] == [["call-21", "call-20", "call-3"], ["call-1", "call-0"]]
    assert found[2:] in ([], [[]])


async def test_a_bulk_reaches_a_rare_match_however_far_back(
    sqlite: SqliteBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes through the history in the same steps."""
    monkeypatch.setattr(faasd_async, "SCAN_WINDOW", 7)
    await few_among_many(sqlite)
    filters = CallFilter(function="rare")
    assert await sqlite.queue.cancel_matching(filters) == BulkResult(5, 5)
    assert await sqlite.queue.redrive_matching(filters) == BulkResult(5, 5)
    assert len(await sqlite.claim()) == 50


# ---- copies --------------------------------------------------------------------------------------


async def begin_copy(
    sqlite: SqliteBench, step: Callable[[SqliteFile], object]
) -> tuple[asyncio.Future[IO[bytes]], Awaitable[object]]:
    """Have a copy made of some pieces. The step is a transaction between two of them.

    The transaction before the copy fails: it would take the step in.
    """
    await sqlite.enqueue("a", body=bytes(3_000_000))
    busy = threading.Event()
    go_on = threading.Event()

    def hold(file: SqliteFile) -> None:
        busy.set()
        go_on.wait(PATIENCE)
        raise sqlite3.OperationalError("held")

    held = sqlite.in_writer(hold)
    await asyncio.to_thread(busy.wait, PATIENCE)
    making = sqlite.queue._writer.copy()
    begun = threading.Event()

    def stop_between(file: SqliteFile) -> None:
        begun.set()
        step(file)

    between = sqlite.in_writer(stop_between)
    for _ in range(3):  # Both are handed over to the writer, which begins with the copy.
        await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(StoreError, match="held"):
        await held
    await asyncio.to_thread(begun.wait, PATIENCE)
    return making, between


async def copied_bytes(sqlite: SqliteBench) -> int:
    """How large a copy is."""
    copy = await sqlite.queue.storage.copy()
    size = copy.seek(0, os.SEEK_END)
    discard_copy(copy)
    return size


async def test_a_copy_that_nobody_waits_for_is_given_up(sqlite: SqliteBench, tmp_path: Path) -> None:
    """Its room is free again, the queue goes on, and the next copy is whole."""
    let_go = threading.Event()
    making, between = await begin_copy(sqlite, lambda file: let_go.wait(PATIENCE))
    assert (tmp_path / "calls.db.copy").stat().st_size < 3_000_000
    making.cancel()
    let_go.set()
    await between
    await sqlite.enqueue("b")
    assert await copied_bytes(sqlite) > 3_000_000
    assert not (tmp_path / "calls.db.copy").exists()
    assert sorted(await sqlite.claim()) == ["a", "b"]


async def test_a_copy_ends_with_the_daemon(sqlite: SqliteBench) -> None:
    """Which does not wait for it."""
    let_go = threading.Event()
    making, _ = await begin_copy(sqlite, lambda file: let_go.wait(PATIENCE))
    closing = asyncio.create_task(sqlite.queue.close())
    await asyncio.sleep(0)  # It has begun.
    let_go.set()
    await closing
    with pytest.raises(HttpError, match="the daemon stops") as caught:
        await making
    assert caught.value.status == 503
    await sqlite.open()


async def test_a_copy_ends_when_nothing_can_be_stored(sqlite: SqliteBench) -> None:
    """SQLite begins anew after each transaction that is rolled back, and might never come to an end."""

    def fail(file: SqliteFile) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    making, between = await begin_copy(sqlite, fail)
    with pytest.raises(StoreError):
        await between
    with pytest.raises(HttpError, match="the queue can't store: disk I/O error"):
        await making
    assert await copied_bytes(sqlite) > 3_000_000
