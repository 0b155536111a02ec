"""Whatever the disk does, nothing that was accepted is lost, and the user is told: full, read only, slow, broken."""

import asyncio
import errno
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from conftest import (
    PATIENCE,
    Daemon,
    Faults,
    Gate,
    Reply,
    Request,
    Server,
    ServiceManager,
    StartDaemon,
    answer,
    ask,
    assert_refused,
    entering,
    namespaces,
    ok,
    run,
)
from operating import cancel

CALM = {"/healthz": 200, "/readyz": 200}
UNABLE = {"/healthz": 200, "/readyz": 503}  # a restart would not help
PAGE = 4096


def settings(function: Server, more: str = "") -> str:
    """One function, `it`, whose calls run one at a time."""
    return f'[functions.it]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 1\n{more}'


async def submit(gateway: Daemon, body: bytes = b"") -> Reply:
    """An async call of `it`."""
    return await ask(gateway.url, "/async-function/it", method="POST", body=body)


async def health(gateway: Daemon) -> dict[str, int]:
    """What is told to who asks after our health."""
    return {path: (await ask(gateway.url, path)).status for path in CALM}


async def assert_unable(gateway: Daemon, function: Server, reason: str, alive: int = 200) -> None:
    """The disk takes nothing: new calls are refused with the reason, what needs no disk goes on."""
    reply = await submit(gateway)
    assert reply.status == 503, reply
    assert re.search(reason, reply.body.decode())
    assert int(reply.headers["Retry-After"]) >= 1
    assert len(reply.body.splitlines()) == 1
    assert await health(gateway) == UNABLE | {"/healthz": alive}
    assert re.search(reason, (await ask(gateway.url, "/readyz")).body.decode())
    assert (await ask(gateway.url, "/function/it/sync")).status == 200


async def assert_well(gateway: Daemon, accepted: list[str], function: Server) -> None:
    """All is as if nothing had been: the accepted calls, and no others, run once, and new ones are taken."""
    assert await health(gateway) == CALM
    accepted = [*accepted, await gateway.submit("it")]
    for call_id in accepted:
        assert (await gateway.final(call_id))["status"] == "success"
    assert sorted(request.call_id for request in function.requests if request.target != "/sync") == sorted(accepted)


@pytest.fixture
def gate(function: Server) -> Gate:
    """Holds the async calls of the function; sync calls go to /sync and pass."""
    found = Gate()

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return await (ok if seen.target == "/sync" else found)(request, seen)

    function.behaviour = behaviour
    return found


async def submit_three(gateway: Daemon, function: Server) -> list[str]:
    """Three calls: one that runs, two that wait for it."""
    accepted = [await gateway.submit("it") for _ in range(3)]
    await function.wait_for(1)
    return accepted


# ---- a real file system: full, read only -----------------------------------------------------------------------


class Disk:
    """A small file system that only those see who `enter` it: it lives in a mount namespace of its own.

    A command does so with that as its prefix, a daemon with `before`.
    """

    def __init__(self, folder: Path, pid: int) -> None:
        users = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
        self.enter = ("nsenter", "--target", str(pid), "--mount", *users)
        self.before = entering(pid)
        self.folder = folder
        self.settings = f'[store]\npath = "{folder}/calls.db"'
        self._ballast = Path(f"/proc/{pid}/root{folder}/ballast")

    def fill(self) -> None:
        """Leave no room for a single byte."""
        with self._ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(PAGE))

    async def allow_writing(self, allowed: bool) -> None:
        """Mount it anew, the way that a user may in a namespace that is theirs."""
        mode = "remount,bind,rw" if allowed else "remount,bind,ro"
        found = await run(*self.enter, "mount", "-o", mode, self.folder)
        assert found.code == 0, found.err

    async def spoil(self, how: str) -> None:
        """Let nothing be written."""
        await self.allow_writing(False) if how == "read only" else self.fill()

    async def mend(self, how: str) -> None:
        """Let writing work again."""
        await self.allow_writing(True) if how == "read only" else self._ballast.unlink()


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[Disk]:
    """Four MiB, of which nothing is left when the test ends."""
    folder = tmp_path / "disk"
    folder.mkdir()
    script = f"mount -t tmpfs -o size=4M tmpfs '{folder}' && echo mounted && exec cat"
    holder = await asyncio.create_subprocess_exec(
        *(*namespaces("mount"), "sh", "-c", script),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    stdout, stdin = holder.stdout, holder.stdin
    assert stdout and stdin
    assert await asyncio.wait_for(stdout.readline(), PATIENCE) == b"mounted\n"
    yield Disk(folder, holder.pid)
    stdin.close()
    await asyncio.wait_for(holder.wait(), PATIENCE)


async def test_a_full_disk_refuses_calls_and_loses_none(
    daemon: StartDaemon, disk: Disk, function: Server, gate: Gate
) -> None:
    """503 and not ready while there is no room, everything else works; then all goes on with no restart."""
    gateway = await daemon(settings(function, disk.settings), before=disk.before)
    accepted = await submit_three(gateway, function)
    await disk.spoil("full")
    await assert_unable(gateway, function, "full")
    gate.open()
    await function.until(lambda: function.running == 0, "the end of the first call")
    await gateway.wait_for_log(f"the outcome of call {accepted[0]} can't be stored yet")
    assert [(await gateway.record(call_id))["status"] for call_id in accepted] == ["running", "queued", "queued"]
    await assert_unable(gateway, function, "full")
    await disk.mend("full")
    await assert_well(gateway, accepted, function)


SOON = '[calls]\nkeep = "1s"\nkeep_failed = "1s"'  # what has ended is forgotten
HOUSEKEEPING = "faasd_async.HOUSEKEEPING_S = 0.1"


async def submit_until_full(gateway: Daemon) -> list[str]:
    """As many calls as there is room for: large ones, then small ones."""
    accepted: list[str] = []
    for size in (16 * PAGE, 0):  # Where there is no room for the one, there may be for the other.
        refused = 0
        while refused < 3:  # The first time, the log gives back what it has no use for.
            reply = await submit(gateway, bytes(size))
            refused = 0 if reply.status == 202 else refused + 1
            accepted += [reply.headers["X-Call-Id"]] if reply.status == 202 else []
    assert_refused(reply, 503, "the disk is full", "is kept for calls that are stored")
    ready = await ask(gateway.url, "/readyz")
    assert (ready.status, b"the disk is full" in ready.body) == (503, True)
    return accepted


async def until_emptied(gateway: Daemon) -> None:
    """New calls are taken again, large ones too."""
    async with asyncio.timeout(PATIENCE):
        while (await submit(gateway, bytes(16 * PAGE))).status == 503:  # noqa: ASYNC110 — nothing tells
            await asyncio.sleep(0.05)
    assert (await ask(gateway.url, "/readyz")).status == 200
    assert not [line for line in gateway.lines if "can't be stored" in line]


@pytest.mark.unmeasured
@pytest.mark.parametrize("killed", [False, True])
async def test_a_disk_that_the_queue_has_filled_gets_empty_by_itself(
    daemon: StartDaemon, disk: Disk, function: Server, gate: Gate, killed: bool
) -> None:
    """What is stored is cancelled, ends and is forgotten in room that is kept for it; then new calls are taken."""
    gateway = await daemon(settings(function, f"{disk.settings}\n{SOON}"), before=f"{disk.before}\n{HOUSEKEEPING}")
    accepted = await submit_until_full(gateway)
    assert len(accepted) > 10
    await gateway.wait_for_log("new ones are refused")
    assert len([line for line in gateway.lines if "new ones are refused" in line]) == 1
    if killed:
        await gateway.kill()
        await gateway.start()
        assert (await submit(gateway)).status == 503
    assert await cancel(gateway, accepted.pop()) == 202
    gate.open()
    await until_emptied(gateway)
    await function.until(lambda: {request.call_id for request in function.requests} >= set(accepted), "all other calls")


async def test_answers_that_fill_a_disk_wait_for_room(
    daemon: StartDaemon, disk: Disk, function: Server, sink: Server
) -> None:
    """They have to be called back whole, so they are not stored until others are; to cancel works meanwhile."""
    receiver = Gate()
    sink.behaviour = receiver
    function.behaviour = answer(200, bytes(64 * PAGE))
    more = f"{disk.settings}\n{SOON}"
    gateway = await daemon(settings(function, more), before=f"{disk.before}\n{HOUSEKEEPING}")
    queue = "/system/queues/faas-request"
    assert (await ask(gateway.url, f"{queue}/pause", method="POST")).status == 200
    accepted = [await gateway.submit("it", X_Callback_Url=sink.url) for _ in range(25)]
    assert (await ask(gateway.url, f"{queue}/resume", method="POST")).status == 200
    await gateway.wait_for_log("can't be stored yet: the disk is full: what is left of it is kept")
    assert await cancel(gateway, accepted.pop()) == 202
    receiver.open()
    await sink.until(lambda: {request.call_id for request in sink.requests} >= set(accepted), "all other answers")
    assert {len(request.body) for request in sink.requests if request.call_id in accepted} == {64 * PAGE}


async def test_what_is_read_from_a_full_disk_makes_nothing_ready(
    daemon: StartDaemon, disk: Disk, function: Server, gate: Gate
) -> None:
    """Not even for a moment: who looks on meanwhile needs no room."""
    gateway = await daemon(settings(function, disk.settings), before=disk.before)
    accepted = await submit_three(gateway, function)
    await disk.spoil("full")
    for path in ("/system/calls", "/system/queues", f"/system/calls/{accepted[0]}"):
        assert (await submit(gateway)).status == 503
        assert (await ask(gateway.url, path)).status == 200
        assert (await ask(gateway.url, "/readyz")).status == 503, path
    await disk.mend("full")
    gate.open()
    await assert_well(gateway, accepted, function)


async def test_a_copy_that_would_fill_the_disk_is_not_made(daemon: StartDaemon, disk: Disk, function: Server) -> None:
    """The answer says what there is and what it takes, and calls go on."""
    gateway = await daemon(settings(function, disk.settings), before=disk.before)
    reply = await ask(gateway.url, "/system/backup", host="localhost")
    assert_refused(reply, 503, "it takes", "64.0 MiB of", "have to be left")
    await assert_well(gateway, [], function)


@pytest.mark.parametrize("how", ["full", "read only"])
async def test_a_disk_that_takes_nothing_at_the_start_is_one_clear_line(
    daemon: StartDaemon, disk: Disk, function: Server, gate: Gate, how: str
) -> None:
    """The daemon exits with a reason instead of half working; the calls it has are there when the disk is well."""
    gateway = await daemon(settings(function, disk.settings), before=disk.before)
    accepted = await submit_three(gateway, function)
    await gateway.kill()
    gate.open()
    await disk.spoil(how)
    logged = len(gateway.lines)
    await gateway.spawn()
    assert await gateway.ended() == 1
    (line,) = gateway.lines[logged:]
    assert f"{disk.folder}/calls.db" in line
    assert {"full": "full", "read only": "read-only"}[how] in line
    await disk.mend(how)
    await gateway.start()
    for call_id in accepted:
        assert (await gateway.final(call_id))["status"] == "success"


# ---- a disk that hangs or fails --------------------------------------------------------------------------------


async def test_a_slow_disk_holds_up_only_what_is_stored(
    daemon: StartDaemon, faults: Faults, function: Server, gate: Gate
) -> None:
    """Sync calls are answered while a sync of the disk takes seconds; async calls wait for it, and are not lost."""
    gateway = await daemon(settings(function), env=faults.env, before="faasd_async.STALLED_S = 5.0")
    accepted = await submit_three(gateway, function)
    with faults("s", 0):
        waiting = [asyncio.create_task(gateway.submit("it")) for _ in range(3)]
        for _ in range(20):
            assert (await ask(gateway.url, "/function/it/sync")).status == 200
        gate.open()
        await function.until(lambda: function.running == 0, "the end of the first call")
        assert (await ask(gateway.url, "/healthz")).status == 200
        reply = await until_status(gateway, "/healthz", 503)  # it hangs for so long that somebody should be told
        assert b"the disk has not answered for" in reply.body
        assert (await ask(gateway.url, "/function/it/sync")).status == 200
        assert not any(task.done() for task in waiting), "a 202 before the call was on disk"
    await assert_well(gateway, accepted + await asyncio.gather(*waiting), function)


async def until_status(gateway: Daemon, path: str, status: int) -> Reply:
    """Ask again and again until the answer has this status."""
    async with asyncio.timeout(PATIENCE):
        while (reply := await ask(gateway.url, path)).status != status:  # noqa: ASYNC110 — that is what clients can do
            await asyncio.sleep(0.02)
    return reply


@pytest.mark.parametrize(
    ("what", "error", "reason"),
    [
        ("ws", errno.EIO, "disk I/O error"),
        ("s", errno.EIO, "disk I/O error"),
        ("rws", errno.EIO, "disk I/O error|malformed"),  # the latter from SQLite, where it can't read the schema
        ("ws", errno.EDQUOT, "disk I/O error|full"),  # a quota
        ("ws", errno.EROFS, "disk I/O error"),  # as ext4 treats open files when it falls back to read only
    ],
)
async def test_a_disk_with_errors_refuses_calls_and_loses_none(
    daemon: StartDaemon, faults: Faults, function: Server, gate: Gate, what: str, error: int, reason: str
) -> None:
    """503 and not ready while writing or reading fails, everything else works; then all goes on with no restart."""
    gateway = await daemon(settings(function), env=faults.env)
    accepted = await submit_three(gateway, function)
    with faults(what, error):
        await assert_unable(gateway, function, reason)
    gate.open()
    await assert_well(gateway, accepted, function)


# ---- a file that is damaged, a file that shrinks ---------------------------------------------------------------


async def test_a_file_that_is_damaged_while_it_is_used_is_set_aside_by_a_restart(
    daemon: StartDaemon, function: Server, systemd: ServiceManager
) -> None:
    """What hits on the damage is refused with the reason, and from then on every call; functions go on working. Only a
    restart helps, so the daemon asks for one: it is not healthy, and starves the watchdog."""
    function.behaviour = answer(200, bytes(8000))
    gateway = await daemon(settings(function, '[gateway]\ndrain_timeout = "0s"'), env=systemd.watchdog())
    old = [await gateway.submit("it") for _ in range(80)]
    await gateway.final(old[-1])
    await gateway.terminate()  # all is in the file then, and not in the log beside it
    await gateway.start()
    pages = gateway.store.stat().st_size // PAGE
    with gateway.store.open("r+b") as file:  # a third of it, in the middle, which a start does not look at
        file.seek(pages // 3 * PAGE)
        file.write(os.urandom(pages // 3 * PAGE))
    for call_id in old:  # until one of them is hit
        if (await ask(gateway.url, f"/system/calls/{call_id}/log")).status != 200:
            break
    await assert_unable(gateway, function, "damaged", alive=503)
    assert not aside(gateway)
    await systemd.bite(gateway)
    await gateway.start()
    await gateway.wait_for_log("is damaged")
    (kept,) = aside(gateway)
    assert kept.stat().st_size > pages // 2 * PAGE
    assert await health(gateway) == CALM
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
    assert await gateway.terminate() == 0
    await gateway.start()
    assert aside(gateway) == [kept]


@pytest.mark.unmeasured
async def test_a_file_that_is_taken_away_while_it_is_used_stores_nothing(daemon: StartDaemon, function: Server) -> None:
    """What went into it would be gone with the daemon, so nobody gets a 202; put back, it goes on by itself."""
    gateway = await daemon(settings(function))
    first = await gateway.submit("it")
    await gateway.final(first)
    elsewhere = gateway.store.with_name("elsewhere.db")
    gateway.store.rename(elsewhere)
    for _ in range(2):
        reply = await ask(gateway.url, "/async-function/it", method="POST")
        assert reply.status == 503
        assert b"was removed or replaced" in reply.body
        gateway.store.write_bytes(b"")  # Another one in its place is no better.
    ready = await ask(gateway.url, "/readyz")
    assert (ready.status, b"was removed or replaced" in ready.body) == (503, True)
    assert (await ask(gateway.url, "/function/it", method="POST")).status == 200
    elsewhere.replace(gateway.store)
    second = await gateway.submit("it")
    assert (await gateway.final(second))["status"] == "success"
    await gateway.kill()
    await gateway.start()
    assert [(await gateway.record(call))["status"] for call in (first, second)] == ["success"] * 2


async def test_a_wal_that_is_taken_away_while_it_is_used_stores_nothing(daemon: StartDaemon, function: Server) -> None:
    """What was accepted before is in the file after a restart."""
    gateway = await daemon(settings(function))
    first = await gateway.submit("it")
    await gateway.final(first)
    wal = gateway.store.with_name(f"{gateway.store.name}-wal")
    wal.unlink()
    for _ in range(2):
        reply = await ask(gateway.url, "/async-function/it", method="POST")
        assert reply.status == 503
        assert b"-wal was removed or replaced" in reply.body
        wal.write_bytes(b"")
    assert await gateway.terminate() == 0
    await gateway.start()
    assert (await gateway.record(first))["status"] == "success"
    await gateway.final(await gateway.submit("it"))


def aside(gateway: Daemon) -> list[Path]:
    """The damaged files that were kept."""
    found = gateway.folder.glob("*.corrupt-*")
    return [path for path in found if not path.name.endswith(("-wal", "-damaged"))]


async def test_the_file_of_a_burst_shrinks(daemon: StartDaemon, function: Server) -> None:
    """When the records are past their time, the space goes back to the file system, however large the bodies were."""
    function.behaviour = answer(400)  # of a call that failed the request is kept
    gateway = await daemon(settings(function))
    burst = [await gateway.submit("it", bytes(500_000)) for _ in range(20)]
    for call_id in burst:
        await gateway.final(call_id)
    await gateway.terminate()
    full = gateway.store.stat().st_size
    assert full > 20 * 500_000
    gateway.configure(settings(function, '[calls]\nkeep = "1ms"\nkeep_failed = "1ms"'))
    await gateway.start()
    for call_id in burst:
        await until_status(gateway, f"/system/calls/{call_id}", 404)
    for _ in range(20):  # the queue takes turns between requests and the steps that give room back
        await ask(gateway.url, f"/system/calls/{burst[0]}")
    await gateway.terminate()
    assert gateway.store.stat().st_size < full / 20
