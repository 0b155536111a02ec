"""A copy of the queue's file that is taken while the daemon works: whole, one at a time, and none is left behind."""

import asyncio
import contextlib
import re
import signal
import sqlite3
import time
from pathlib import Path

import pytest
from aiohttp import web
from conftest import (
    PATIENCE,
    PIPE,
    Daemon,
    Request,
    Server,
    StartDaemon,
    ask,
    assert_refused,
    connection,
    faasd,
    start_program,
)

SETTINGS = '[functions.upper]\ncommand = ["tr", "a-z", "A-Z"]\n[functions.later]\ncommand = ["cat"]\nqueue = "later"\n'
LARGE = bytes(1_000_000)


async def fill(gateway: Daemon, number: int) -> list[str]:
    """Calls that wait, a megabyte each: more than sockets hold, and many pieces to copy."""
    assert (await ask(gateway.url, "/system/queues/later/pause", method="POST", host="localhost")).status == 200
    return [await gateway.submit("later", LARGE) for _ in range(number)]


def files(folder: Path) -> set[str]:
    """What is there."""
    return {path.name for path in folder.iterdir()}


@pytest.fixture
async def gateway(daemon: StartDaemon) -> Daemon:
    """A daemon with the command `upper`, and `later`, whose queue can be held."""
    return await daemon(SETTINGS + "[queues.later]")


# ---- the route -------------------------------------------------------------------------------------------------


@pytest.mark.unmeasured
async def test_a_backup_that_is_taken_while_calls_come_is_a_store_of_its_own(daemon: StartDaemon) -> None:
    """What was accepted before is in it, and runs where a daemon starts with it; the daemon goes on meanwhile."""
    gateway = await daemon(SETTINGS + "[queues.later]", start=False)
    left = gateway.store.with_name("calls.db.copy")
    left.write_text("of a daemon that was killed meanwhile")
    await gateway.start()
    assert not left.exists()
    done = await gateway.submit("upper", b"hello")
    await gateway.final(done)
    waiting = await fill(gateway, 8)
    copy = gateway.folder / "backups" / "copy.db"
    copy.parent.mkdir()
    saving = asyncio.create_task(faasd("backup", copy, "--url", gateway.url))
    others = [await gateway.submit("upper", b"more")]
    while not saving.done():
        others.append(await gateway.submit("upper", b"more"))
    result = await saving
    assert (result.code, result.err) == (0, "")
    assert re.fullmatch(rf"{copy}: [\d.]+ MiB\n", result.out)
    assert (copy.stat().st_mode & 0o777, files(copy.parent)) == (0o600, {"copy.db"})
    await gateway.wait_for_log("backup sent")
    assert not left.exists()
    assert [(await gateway.final(call_id))["status"] for call_id in others] == ["success"] * len(others)
    await gateway.terminate()
    with contextlib.closing(sqlite3.connect(f"file:{copy}?mode=ro", uri=True)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    copy.replace(gateway.store)
    await gateway.start()
    assert (await ask(gateway.url, f"/system/calls/{done}/log", host="localhost")).body == b"HELLO"
    assert (await gateway.record(waiting[0]))["status"] == "queued"
    await ask(gateway.url, "/system/queues/later/resume", method="POST", host="localhost")
    assert [(await gateway.final(call_id))["status"] for call_id in waiting] == ["success"] * 8


async def test_one_backup_is_made_at_a_time_and_ends_with_its_client(gateway: Daemon) -> None:
    """Who comes meanwhile is told, and can have one when the other client has it, or has gone."""
    await fill(gateway, 16)
    get = b"GET /system/backup HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with connection(gateway.url) as (reader, writer):
        writer.write(get)
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        assert_refused(await ask(gateway.url, "/system/backup", host="localhost"), 409, "another backup is being made")
        head = await ask(gateway.url, "/system/backup", method="HEAD", host="localhost")
        assert (head.status, head.body) == (200, b"")
        writer.transport.abort()
    deadline = time.monotonic() + PATIENCE
    while (reply := await ask(gateway.url, "/system/backup", host="localhost")).status == 409:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert int(reply.headers["Content-Length"]) == len(reply.body)
    assert reply.headers["Content-Disposition"] == 'attachment; filename="faasd-async.db"'
    assert (await ask(gateway.url, "/system/backup", host="localhost")).status == 200, "at once, when it is sent"


async def test_a_page_from_elsewhere_has_no_backup_made(gateway: Daemon) -> None:
    """A link or a picture would do, and a copy takes room and time."""
    reply = await ask(gateway.url, "/system/backup", "Sec-Fetch-Site: cross-site", host="localhost")
    assert_refused(reply, 403, "a web page of another site may not do this")
    reply = await ask(gateway.url, "/system/backup", "Sec-Fetch-Site: none", host="localhost")
    assert reply.body.startswith(b"SQLite format 3\0"), "the address typed into a browser"


# ---- the command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["itself", "its WAL", "a link to it", "another name of it"])
async def test_a_backup_does_not_replace_what_it_copies(gateway: Daemon, tmp_path: Path, name: str) -> None:
    """The daemon would go on with a file that nobody finds again."""
    target = {"itself": gateway.store, "its WAL": gateway.store.with_name(f"{gateway.store.name}-wal")}.get(name)
    if target is None:
        target = tmp_path / "other"
        (target.symlink_to if name == "a link to it" else target.hardlink_to)(gateway.store)
    inode = target.stat().st_ino
    result = await faasd("backup", "--force", target, "--url", gateway.url)
    assert (result.code, "is the queue's own file" in result.err) == (1, True), result
    assert target.stat().st_ino == inode
    await gateway.final(await gateway.submit("upper"))


async def test_a_backup_replaces_nothing_unless_it_is_told_to(gateway: Daemon, tmp_path: Path) -> None:
    """A file that is there, another kind of file, a folder that is not there: one line each, and nothing is left."""

    async def refusal(*words: str | Path) -> str:
        result = await faasd("backup", *words, "--url", gateway.url)
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1), result
        return result.err

    folder = tmp_path / "backups"
    folder.mkdir()
    there = folder / "there"
    there.write_text("somebody's")
    there.chmod(0o644)
    link = folder / "link"
    link.symlink_to(there)
    assert "there is there already: --force replaces it" in await refusal(there)
    assert "link is there already" in await refusal(link)
    assert there.read_text() == "somebody's"
    assert "is no file: name one, or - for standard output" in await refusal("/dev/null", "--force")
    assert "No such file or directory" in await refusal(folder / "none" / "copy")
    assert "Not a directory" in await refusal(there / "copy")
    assert (await faasd("backup", "--force", link, "--url", gateway.url)).code == 0
    assert (link.is_symlink(), there.read_bytes()[:15], there.stat().st_mode & 0o777) == (
        True,
        b"SQLite format 3",
        0o600,
    )
    assert files(folder) == {"there", "link"}
    process = await start_program("backup", "-", "--url", gateway.url, stdout=PIPE)
    assert (await process.communicate())[0].startswith(b"SQLite format 3\0")
    assert process.returncode == 0


async def test_a_backup_that_is_cut_short_leaves_no_file(function: Server, tmp_path: Path) -> None:
    """Neither what the daemon breaks off, nor what somebody stops."""

    async def half(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "20"})
        await response.prepare(request)
        await response.write(b"ten bytes.")
        await (asyncio.Event().wait() if len(function.requests) > 1 else asyncio.sleep(0))
        assert request.transport
        request.transport.close()
        return response

    function.behaviour = half
    result = await faasd("backup", tmp_path / "copy", "--url", function.url)
    assert (result.code, result.out) == (69, "")
    assert "its answer broke off" in result.err
    assert files(tmp_path) == set()
    process = await start_program("backup", tmp_path / "copy", "--url", function.url, stdout=PIPE)
    deadline = time.monotonic() + PATIENCE
    while not files(tmp_path):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 130
    assert files(tmp_path) == set()
