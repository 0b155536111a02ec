"""What waits in a file moves to NATS: all of it, once, wherever the move is killed."""

import os
import signal
from pathlib import Path
from subprocess import PIPE

import pytest
from conftest import Daemon, Finished, Gate, Server, StartDaemon, answer, faasd, finish, ok, start_program
from jetstream import STREAM, NatsServer, StartHost, StartServer, ended, one_function, post, submit_all
from operating import get

RETRY = '[retry]\nattempts = 3\nmin_wait = "1h"\nmax_wait = "1h"\n'
SCHEDULE = '[schedules.nightly]\ncron = "0 3 * * *"\nfunction = "it"\n'

# At its second group of calls the move kills itself, before or after the file has forgotten them.
KILL = """
import os, signal
groups, forget = [], faasd_async.forget_moved
def forget_or_die(file, moved):
    groups.append(moved)
    last = len(groups) == 2
    if last and {early}:
        os.kill(os.getpid(), signal.SIGKILL)
    forget(file, moved)
    if last:
        os.kill(os.getpid(), signal.SIGKILL)
faasd_async.forget_moved = forget_or_die
"""


async def move(file: Path, host: Daemon) -> Finished:
    """Move what waits in a file to where a host has its queue."""
    return await faasd("move", file, "--config", host.config)


@pytest.mark.unmeasured
@pytest.mark.parametrize("early", [True, False], ids=["before the file forgets", "after it has forgotten"])
async def test_a_move_that_is_killed_and_run_again_moves_every_call_once(
    early: bool, daemon: StartDaemon, hosts: StartHost, function: Server, server: NatsServer
) -> None:
    """Also when hosts have run what came first before the second move, which leaves a queue alone that was resumed."""
    old = await daemon(one_function(function))
    await post(old, "/system/queues/faas-request/pause")
    calls = await submit_all(150, old)
    await old.terminate()
    host = await hosts(one_function(function), start=False)
    words = ("move", old.store, "--config", host.config)
    killed = await finish(await start_program(*words, before=KILL.format(early=early), stdout=PIPE, stderr=PIPE), b"")
    assert killed.code == -signal.SIGKILL
    async with server.jetstream() as jetstream:  # The server forgets what it had: only records know it.
        config = (await jetstream.stream_info(STREAM)).config
        config.duplicate_window = 0.1
        await jetstream.update_stream(config)
    await host.start()
    await post(host, "/system/queues/faas-request/resume")
    assert await ended(host, [call for call in calls if await has(host, call)]) == {"success": 128}
    again = await move(old.store, host)
    left = 150 - 128 + 64 * early
    assert again.out == f"{old.store}: moved {left} calls, 0 callbacks and 0 schedules\n", again.err
    assert await ended(host, calls) == {"success": 150}
    assert sorted(function.call_ids) == sorted(calls)
    assert (await move(old.store, host)).out == f"{old.store}: moved 0 calls, 0 callbacks and 0 schedules\n"
    assert (await get(host, "/system/queues"))["queues"][0]["paused"] is False


def paused(old: Daemon) -> str:
    """The line that tells of a pause."""
    how = "to have it go on: faasd-async queues resume faas-request"
    return f"{old.store}: paused queue faas-request on all hosts, as it is here; {how}\n"


async def has(host: Daemon, call_id: str) -> bool:
    """Whether a host has a record of a call."""
    return bool((await get(host, f"/system/calls?call_id={call_id}"))["calls"])


async def test_a_call_moves_with_all_that_it_was_asked_to_be(
    daemon: StartDaemon, hosts: StartHost, function: Server, sink: Server
) -> None:
    """Ids, attempts left, times, deadlines, callbacks, keys, method, path, body; and the pause of its queue."""
    function.behaviour = answer(500)
    settings = RETRY + one_function(function) + SCHEDULE
    old = await daemon(settings)
    await post(old, "/system/schedules/nightly/pause")
    tried = await old.submit("it", b"tried", X_Callback_Url=sink.url, X_Call_Id="mine")
    record = await old.until(tried, lambda record: record["status"] == "delayed")
    await post(old, "/system/queues/faas-request/pause")
    delayed = await old.submit("it", b"later", X_Delay="1h", X_Deadline="2h", X_Concurrency_Key="key")
    once = await old.submit("it/a%2Fb?c=d", b"once", Idempotency_Key="order-1")
    late = await old.submit("it", X_Deadline="1s")
    due = {call: (await old.record(call))["due_at"] for call in (tried, delayed)}
    await old.terminate()
    host = await hosts(settings, start=False)
    assert (await move(old.store, host)).out == f"{old.store}: moved 4 calls, 0 callbacks and 1 schedule\n{paused(old)}"
    await host.start()
    moved = await host.record("mine")
    assert (moved["id"], moved["max_attempts"], moved["status"]) == (record["id"], 2, "delayed")
    assert {call: (await host.record(call))["due_at"] for call in due} == due
    assert (await host.record(delayed))["concurrency_key"] == "key"
    assert moved["callback"]["url"] == record["callback"]["url"]
    assert await host.submit("it/a%2Fb?c=d", b"once", Idempotency_Key="order-1") == once
    assert (await host.final(late))["status"] == "timeout"
    assert (await get(host, "/system/schedules"))["schedules"][0]["paused"]
    assert [request.body for request in function.requests] == [b"tried"]
    function.behaviour = ok
    await post(host, "/system/queues/faas-request/resume")
    assert (await host.final(once))["status"] == "success"
    assert (function.requests[-1].target, function.requests[-1].body) == ("/a%2Fb?c=d", b"once")


async def test_a_callback_that_is_pending_moves_and_is_sent_once(
    daemon: StartDaemon, hosts: StartHost, function: Server, sink: Server
) -> None:
    """One that was being sent, one that is to be tried again, with its answer, key and id, also after a killed move.

    It is killed when all is stored and the file has forgotten nothing.
    """
    function.behaviour = answer(200, b"x" * 100_000)  # more than is kept of an answer without a callback
    settings = one_function(function) + '[callback]\nmin_wait = "1h"\nmax_wait = "1h"\n'
    old = await daemon(settings)
    sink.behaviour = answer(503)
    later = await old.submit("it", X_Callback_Url=sink.url)
    record = await old.until(later, lambda record: record["callback"]["http_status"] == 503)
    sink.behaviour = Gate()
    headers = {"X_Callback_Url": sink.url, "X_Call_Id": "mine", "Idempotency_Key": "order-1"}
    await old.submit("it", b"once", **headers)
    await sink.wait_for(2)
    await old.kill()
    sink.behaviour = ok
    host = await hosts(settings, start=False)
    words = ("move", old.store, "--config", host.config)
    script = KILL.format(early=True).replace("len(groups) == 2", "groups[-1]")
    killed = await finish(await start_program(*words, before=script, stdout=PIPE, stderr=PIPE), b"")
    assert killed.code == -signal.SIGKILL
    await host.start()
    delivered = await host.until("mine", lambda record: record["callback"]["status"] == "delivered")
    again = await move(old.store, host)
    assert again.out == f"{old.store}: moved 0 calls, 2 callbacks and 0 schedules\n", again.err
    assert (delivered["status"], delivered["attempts"], delivered["callback"]["attempts"]) == ("success", 1, 2)
    assert (sink.requests[-1].body, sink.requests[-1].headers["X-Call-Id"]) == (b"x" * 100_000, "mine")
    assert await host.submit("it", b"once", Idempotency_Key="order-1") == "mine"
    waits = await host.record(later)
    del waits["callback"]["url"], record["callback"]["url"]
    assert waits == record
    assert (len(sink.requests), len(function.requests)) == (3, 2)


async def test_what_nats_does_not_take_stays_and_is_told(
    daemon: StartDaemon, hosts: StartHost, function: Server, nats_server: StartServer
) -> None:
    """A body over the server's max_payload, a queue that is full: the old daemon has it as before."""
    small = await nats_server({"max_payload": 4000})
    old = await daemon(one_function(function))
    await post(old, "/system/queues/faas-request/pause")
    large = await old.submit("it", b"x" * 5000)
    moving = await old.submit("it", b"x")
    await old.terminate()
    host = await hosts(one_function(function), small.url, start=False)
    result = await move(old.store, host)
    assert result.code == 1
    assert result.out.splitlines() == [
        f"{old.store}: moved 1 call, 0 callbacks and 0 schedules",
        paused(old).rstrip(),
        f"{old.store}: left 1 call, {large} first: the NATS server takes no messages over 2976 bytes",
    ]
    await old.start()
    assert (await old.record(large))["status"] == "queued"
    assert not await has(old, moving)


async def test_a_move_that_can_not_be_says_why_in_one_line(
    daemon: StartDaemon, hosts: StartHost, function: Server, server: NatsServer, tmp_path: Path
) -> None:
    """The daemon is running, there is no such file, it is none of a queue or a pipe, no server, no NATS."""
    old = await daemon(one_function(function))
    host = await hosts(one_function(function), start=False)
    text = tmp_path / "text"
    text.write_text("no database, but not short of bytes")

    async def refusal(file: Path, where: Daemon = host) -> tuple[int, str]:
        result = await move(file, where)
        assert (result.out, result.err.count("\n")) == ("", 1), result
        return result.code, result.err

    assert await refusal(old.store) == (
        75,
        f"faasd-async: {old.store} is in use by another process: one daemon per file\n",
    )
    await old.terminate()
    assert await refusal(tmp_path / "none") == (1, f"faasd-async: {tmp_path / 'none'}: No such file or directory\n")
    assert await refusal(text) == (1, f"faasd-async: {text}: this is no queue's file\n")
    os.mkfifo(tmp_path / "pipe")  # It is not waited for.
    assert await refusal(tmp_path / "pipe") == (1, f"faasd-async: {tmp_path / 'pipe'}: this is no queue's file\n")
    assert (await refusal(old.store, old))[0] == 78
    await server.kill()
    code, line = await refusal(old.store)
    assert code == 1 and str(server.port) in line and "0 calls moved so far, run it again" in line
    assert text.exists()


@pytest.mark.parametrize("log", [False, True], ids=["after a stop", "with the log of a killed daemon"])
async def test_a_damaged_file_is_refused_and_stays_as_it_is(
    log: bool, daemon: StartDaemon, hosts: StartHost, function: Server
) -> None:
    """In its first page, in those behind, or as a daemon has marked it: nothing is moved, nothing is set aside."""
    old = await daemon(one_function(function))
    await post(old, "/system/queues/faas-request/pause")
    await submit_all(8, old)
    await old.terminate()
    if log:
        await old.start()
        await old.submit("it")
        await old.kill()
    host = await hosts(one_function(function))
    whole = old.store.read_bytes()
    mark = old.store.with_name(f"{old.store.name}-damaged")
    for damage in ("pages", "mark") if log else ("first page", "pages", "mark"):
        content = bytearray(whole)
        if damage == "first page":
            content[100:4000] = b"\xff" * 3900
        elif damage == "pages":
            content[8192:] = b"\xff" * (len(content) - 8192)
        else:
            mark.touch()
        old.store.write_bytes(content)
        before = contents(old.store.parent)
        result = await move(old.store, host)
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1), result
        assert result.err.startswith(f"faasd-async: {old.store}: this is a damaged file (")
        assert contents(old.store.parent) == before
    mark.unlink()
    old.store.write_bytes(whole)
    assert (await move(old.store, host)).out.startswith(f"{old.store}: moved {8 + log} calls, ")


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder, by name, but for SQLite's own index of its log."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".db-shm"}
