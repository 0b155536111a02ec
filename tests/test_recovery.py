"""Back to work after anything: poison calls, places that are not there yet, a strange start, and help by hand."""

import asyncio
import contextlib
import gzip
import json
import os
import re
import select
import signal
import socket
import sqlite3
import stat
import time
import zlib
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import pytest
from aiohttp import web
from conftest import (
    PATIENCE,
    PIPE,
    SECRET,
    Daemon,
    Finished,
    Gate,
    Names,
    Reply,
    Request,
    Server,
    ServiceManager,
    StartDaemon,
    answer,
    ask,
    assert_refused,
    faasd,
    finish,
    free_address,
    namespaces,
    never,
    start_program,
)
from queues import as_an_older_version

KIB = 1024
CAT = '[functions.cat]\ncommand = ["sh", "-c", "echo told >&2; cat"]\n'


def settings(function: Server, more: str = "") -> str:
    """One function, `it`, whose calls run one at a time."""
    return f'[functions.it]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 1\n{more}\n'


async def post(gateway: Daemon, target: str, *headers: str) -> Reply:
    """A POST without a body."""
    return await ask(gateway.url, target, *headers, method="POST")


async def listed(gateway: Daemon) -> list[dict[str, Any]]:
    """The newest records."""
    calls: list[dict[str, Any]] = json.loads((await ask(gateway.url, "/system/calls")).body)["calls"]
    return calls


# ---- calls that take the daemon down -----------------------------------------------------------------------------


def poison(gateway: Daemon) -> Any:
    """A behaviour: what is sent to /pill kills the daemon, everything else does well."""

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        if seen.target == "/pill":
            gateway.signal(signal.SIGKILL)
            return await never(request, seen)
        return web.Response(text="ok")

    return behaviour


async def live_and_die(gateway: Daemon, times: int) -> None:
    """Let the daemon die of its work so often; start it again each time, the last time for good."""
    for life in range(times):
        assert await gateway.ended() == -signal.SIGKILL
        await (gateway.spawn() if life < times - 1 else gateway.start())


async def submit_together(gateway: Daemon, callback_url: str, *paths: str) -> list[str]:
    """Calls of the default queue that all wait before the first of them runs; their ids."""
    assert (await post(gateway, "/system/queues/faas-request/pause")).status == 200
    calls = [await gateway.submit(path, X_Callback_Url=callback_url) for path in paths]
    assert (await post(gateway, "/system/queues/faas-request/resume")).status == 200
    return calls


async def test_a_call_that_takes_the_daemon_down_ends_in_error_and_the_others_run(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """Five times, as `max_interruptions` is by default; then its record and its callback say so."""
    gateway = await daemon(settings(function))
    function.behaviour = poison(gateway)
    pill, *others = await submit_together(gateway, sink.url, "it/pill", "it", "it", "it")
    await live_and_die(gateway, 5)
    record = await gateway.final(pill)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("error", 5, 5)
    assert "interrupt" in record["error"]
    assert record["callback"]["status"] == "delivered"
    (told,) = [request for request in sink.requests if request.call_id == pill]
    assert (told.headers["X-Function-Status"][0], told.body) == ("5", b"")
    assert function.call_ids == [pill, *others, *[pill] * 4]
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"


@pytest.mark.unmeasured
@pytest.mark.parametrize("paths", [["it/pill", "it", "it", "it"], ["it", "it", "it", "it/pill"]])
async def test_a_poison_call_takes_nobody_with_it(
    daemon: StartDaemon, function: Server, sink: Server, paths: list[str]
) -> None:
    """Those that ran beside it, and died with it more than once, come to run without it in the end, and do well."""
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"')

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        if seen.target == "/pill":
            await asyncio.sleep(0.1)  # so that the others are there
            gateway.signal(signal.SIGKILL)
        await asyncio.sleep(0.3)  # longer than the pill takes
        return web.Response()

    function.behaviour = behaviour
    calls = await submit_together(gateway, sink.url, *paths)
    await live_and_die(gateway, 5)
    for call_id, path in zip(calls, paths, strict=True):
        record = await gateway.final(call_id)
        assert record["status"] == ("error" if path == "it/pill" else "success"), record
        assert record["interrupted"] >= 2


async def test_what_a_poison_call_has_come_to_is_told_where_failures_are(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """Whoever waits for it, and the URL for failures, hear of the end that comes with a start."""
    gateway = await daemon(settings(function, "[retry]\nmax_interruptions = 1"))
    function.behaviour = poison(gateway)
    done, failed = f"{sink.url}/done", f"{sink.url}/failed"
    pill = await gateway.submit("it/pill", X_Callback_Url=done, X_Failure_Callback_Url=failed)
    await live_and_die(gateway, 1)
    reply = await ask(gateway.url, f"/system/calls/{pill}?wait=25s")
    assert json.loads(reply.body)["status"] == "error"
    await gateway.final(pill)
    assert [request.target for request in sink.requests] == ["/failed"]
    assert len(function.requests) == 1


async def test_the_callback_of_a_poison_call_has_nothing_of_an_earlier_attempt(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """What the function answered before it took the daemon down is not the outcome."""
    gateway = await daemon(settings(function, "[retry]\nmax_interruptions = 1"))

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        if len(function.requests) > 1:
            gateway.signal(signal.SIGKILL)
        return web.Response(status=503, body=b"not now", headers={"X-Own": "v"})

    function.behaviour = behaviour
    call_id = await gateway.submit("it", X_Callback_Url=sink.url)
    await live_and_die(gateway, 1)
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"], record["http_status"]) == ("error", 2, None)
    (told,) = sink.requests
    assert (told.headers["X-Function-Status"], told.body, told.headers.get("X-Own")) == ("504", b"", None)
    assert (await resend(gateway, call_id)).status == 202
    await gateway.final(call_id)
    assert [request.body for request in sink.requests] == [b"", b""]


async def test_how_many_interruptions_are_enough_is_a_matter_of_policy(daemon: StartDaemon, function: Server) -> None:
    """`max_interruptions` of [retry], and of functions.NAME.retry for one of them; whatever attempts are left."""
    function.behaviour = gate = Gate()
    gateway = await daemon(
        f'[functions.it]\nurl = "{function.url}"\n[functions.once]\nurl = "{function.url}"\n'
        "[functions.once.retry]\nmax_interruptions = 1\n[retry]\nmax_interruptions = 2\nattempts = 1"
    )
    twice, once = await gateway.submit("it"), await gateway.submit("once")
    await function.wait_for(2)
    await gateway.kill()
    await gateway.start()
    record = await gateway.final(once)
    assert (record["status"], record["interrupted"]) == ("error", 1)
    await function.wait_for(3)
    await gateway.kill()
    gate.open()
    await gateway.start()
    record = await gateway.final(twice)
    assert (record["status"], record["interrupted"]) == ("error", 2)
    assert sorted(function.call_ids) == sorted([twice, twice, once])


async def test_an_interruption_that_is_no_habit_is_forgiven(daemon: StartDaemon, function: Server) -> None:
    """One fewer than it takes, and the call runs to its end."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function, "[retry]\nmax_interruptions = 2"))
    call_id = await gateway.submit("it")
    await function.wait_for(1)
    await gateway.kill()
    gate.open()
    await gateway.start()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 2, 1)


@pytest.mark.parametrize("fair", ["true", "false"])
async def test_an_interrupted_call_goes_behind_those_that_were_due(
    daemon: StartDaemon, function: Server, fair: str
) -> None:
    """But before those that become due after the restart, which it has waited for longer than they have."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function, f"fair = {fair}"))
    first = await gateway.submit("it")
    await function.wait_for(1)
    others = [await gateway.submit("it") for _ in range(3)]
    assert (await post(gateway, "/system/queues/faas-request/pause")).status == 200
    await gateway.kill()
    await gateway.start()
    last = await gateway.submit("it")
    record = await gateway.record(first)
    assert (record["status"], record["interrupted"]) == ("queued", 1)
    gate.open()
    assert (await post(gateway, "/system/queues/faas-request/resume")).status == 200
    await gateway.final(last)
    assert function.call_ids == [first, *others, first, last]


async def test_a_clean_stop_interrupts_nobody(daemon: StartDaemon, function: Server) -> None:
    """However often, and with a call that never gets the time to end."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function, '[retry]\nmax_interruptions = 1\n[gateway]\ndrain_timeout = "0s"'))
    call_id = await gateway.submit("it")
    for runs in (1, 2, 3):
        await function.wait_for(runs)
        assert await gateway.terminate() == 0
        await gateway.start()
    gate.open()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)


async def test_a_poison_call_can_be_given_another_chance(daemon: StartDaemon, function: Server) -> None:
    """By hand, once the function is mended: its interruptions are counted from nothing, and not forgotten."""
    gateway = await daemon(settings(function, "[retry]\nmax_interruptions = 2"))
    function.behaviour = poison(gateway)
    pill = await gateway.submit("it/pill")
    await live_and_die(gateway, 2)
    assert (await gateway.final(pill))["status"] == "error"
    assert (await post(gateway, f"/system/calls/{pill}/retry")).status == 202
    await live_and_die(gateway, 2)
    assert (await gateway.final(pill))["status"] == "error"
    function.behaviour = answer()
    record = await again(gateway, pill)
    assert (record["status"], record["interrupted"]) == ("success", 0)
    assert [run["interrupted"] for run in record["history"]] == [2, 2]


async def test_a_callback_that_takes_the_daemon_down_comes_to_an_end(daemon: StartDaemon, function: Server) -> None:
    """It fails when its deliveries are used up, and the function's outcome stays what it was."""
    gateway = await daemon(settings(function, "[callback]\nattempts = 3\n[retry]\nmax_interruptions = 3"))
    function.behaviour = poison(gateway)
    call_id = await gateway.submit("it", X_Callback_Url=f"{function.url}/pill")
    await live_and_die(gateway, 3)
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)
    assert (record["callback"]["status"], record["callback"]["attempts"]) == ("failed", 3)
    assert "interrupt" in record["callback"]["error"]
    assert [request.target for request in function.requests] == ["/", *["/pill"] * 3]


# ---- addresses that are not there yet ----------------------------------------------------------------------------


async def refuses_for_now(gateway: Daemon, address: str) -> None:
    """Start the daemon, which has to end with 75 (EX_TEMPFAIL) and one line that names the address."""
    await gateway.spawn()
    assert await gateway.ended() == 75, gateway.log
    (line,) = gateway.lines
    assert address in line
    gateway.lines.clear()


@pytest.mark.parametrize("listen", ["192.0.2.7:8080", "[2001:db8::7]:8080", "not-yet-known.invalid:8080"])
async def test_an_address_that_is_not_there_yet_is_worth_another_try(daemon: StartDaemon, listen: str) -> None:
    """As at boot, before a bridge or a name is there: not 78, after which systemd would give up."""
    gateway = await daemon(f'[gateway]\nlisten = "{listen}"', start=False)
    await refuses_for_now(gateway, listen)
    checked = await faasd("check", "--config", gateway.config)
    assert (checked.code, checked.err) == (0, "")


async def test_a_port_that_is_still_in_use_is_worth_another_try(daemon: StartDaemon) -> None:
    """Also where it is one of several addresses; once it is free, the daemon starts."""
    address = free_address()
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        gateway = await daemon(f'[gateway]\nlisten = ["127.0.0.1:0", "{address}"]', start=False)
        await refuses_for_now(gateway, address)
    await gateway.start()
    await gateway.wait_for_log(f"listening on http://{address}")


async def test_a_folder_of_a_socket_that_is_not_there_yet_is_worth_another_try(
    daemon: StartDaemon, tmp_path: Path
) -> None:
    """As before the service that makes it; once it is there, the daemon starts."""
    folder = tmp_path / "later"
    gateway = await daemon(f'[gateway]\nlisten = "unix:{folder}/socket"', start=False)
    await refuses_for_now(gateway, f"{folder}/socket")
    folder.mkdir()
    await gateway.start()


async def test_a_name_that_is_known_later_is_listened_on_then(daemon: StartDaemon, names: Names) -> None:
    """A name server without an answer for it is a reason to try again, and no more."""
    address = f"later.example:{free_address().rpartition(':')[2]}"
    gateway = await daemon(f'[gateway]\nlisten = "{address}"', before=names.before, start=False)
    names.found["later.example"] = []
    await refuses_for_now(gateway, address)
    names.found["later.example"] = ["127.0.0.1"]
    await gateway.start()
    assert "later.example" in names.asked


async def test_an_address_that_is_none_is_a_mistake_in_the_file(daemon: StartDaemon, tmp_path: Path) -> None:
    """78, because no restart would mend it."""
    for listen in ("127.0.0.1:99999", "127.0.0.1:port", "127.0.0.1", f"unix:{tmp_path}/{'x' * 200}"):
        gateway = await daemon(f'[gateway]\nlisten = "{listen}"', start=False)
        await gateway.spawn()
        assert await gateway.ended() == 78, (listen, gateway.log)
        assert len(gateway.lines) == 1, gateway.log


# ---- many calls at once ------------------------------------------------------------------------------------------


async def with_many_calls(gateway: Daemon, number: int) -> None:
    """Start the daemon on so many delayed calls of `it`, which share the call id `many`."""
    await gateway.start()
    await gateway.submit("it", b"x" * 200, X_Delay="1h", X_Call_Id="many")
    assert await gateway.terminate() == 0
    with contextlib.closing(sqlite3.connect(gateway.store)) as db, db:
        for table in ("calls", "requests"):
            names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            copied = ["seq + n" if name == "seq" else "id || n" if name == "id" else name for name in names]
            db.execute(
                f"WITH RECURSIVE counted(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counted WHERE n < {number - 1}) "
                f"INSERT INTO {table} SELECT {', '.join(copied)} FROM {table}, counted"
            )
    await gateway.start()


# How to be rid of many calls, and what the answer is then.
WAYS = {
    "purge": ("POST", "/system/queues/faas-request/purge"),
    "by filter": ("POST", "/system/calls/cancel?function=it"),
    "by call id": ("DELETE", "/async-function/many"),
}


@pytest.mark.unmeasured
@pytest.mark.parametrize("way", WAYS)
async def test_nobody_waits_while_many_calls_are_cancelled(daemon: StartDaemon, function: Server, way: str) -> None:
    """Others are accepted, run and looked up between the batches."""
    gateway = await daemon(settings(function, f'[functions.other]\nurl = "{function.url}"\nqueue = "b"'), start=False)
    await with_many_calls(gateway, 20_000)
    method, target = WAYS[way]
    cancelling = asyncio.create_task(ask(gateway.url, target, method=method))
    done = 0
    while not cancelling.done():
        assert (await gateway.final(await gateway.submit("other")))["status"] == "success"
        done += 1
    assert (await cancelling).status in (200, 202)
    assert done >= 10
    row = json.loads((await ask(gateway.url, "/system/calls?status=delayed")).body)
    assert row == {"calls": [], "next_cursor": None}
    assert [request.call_id for request in function.requests if request.call_id == "many"] == []


# In a mount namespace of its own everything but the test's folder is read-only, the working directory too.
READ_ONLY = """
mount --make-rprivate / && mount --bind "$0" "$0" || exit
for place in / /tmp /var/tmp /usr/tmp; do mount -o remount,bind,ro "$place" 2>/dev/null; done
unset TMPDIR SQLITE_TMPDIR COVERAGE_PROCESS_CONFIG
cd /
for place in / /tmp /var/tmp; do ! touch "$place/x" 2>/dev/null || exit; done
exec "$@"
"""


@pytest.mark.parametrize(
    ("way", "told"), [("purge", {"cancelled": 100_000}), pytest.param("by call id", {}, marks=pytest.mark.long)]
)
async def test_a_hundred_thousand_calls_are_cancelled_without_room_for_temporary_files(
    daemon: StartDaemon, function: Server, tmp_path: Path, way: str, told: dict[str, int]
) -> None:
    """The root, and every place where SQLite would put such a file, is read-only, as in a locked-down container."""
    prefix = [*namespaces("mount"), "sh", "-c", READ_ONLY, str(tmp_path)]
    gateway = await daemon(settings(function), prefix=prefix, start=False)
    await with_many_calls(gateway, 100_000)
    method, target = WAYS[way]
    longer = aiohttp.ClientTimeout(5 * PATIENCE)  # done at a pace that lets others in, it takes a while
    async with gateway.http.request(method, f"{gateway.url}{target}", timeout=longer) as response:
        assert response.status in (200, 202), await response.text()
        answered = json.loads(await response.read() or b"{}")
    assert {name: answered[name] for name in told} == told
    assert json.loads((await ask(gateway.url, "/system/calls?status=delayed")).body)["calls"] == []
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
    assert (await ask(gateway.url, "/readyz")).status == 200


# ---- whose the file is -------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    """The permissions of a file."""
    return stat.S_IMODE(path.stat().st_mode)


def modes(folder: Path, start: str = "calls.db") -> dict[str, str]:
    """The permissions of the store's files."""
    return {path.name: oct(mode(path)) for path in folder.iterdir() if path.name.startswith(start)}


UMASK = "import os; os.umask({:#o})"  # what comes before the daemon's start


@pytest.mark.parametrize("umask", [0, 0o022, 0o777], ids=oct)
async def test_nobody_else_reads_the_store(daemon: StartDaemon, function: Server, tmp_path: Path, umask: int) -> None:
    """Its files are 0600 and the folders made for them 0700, whatever the umask; folders that were there stay."""
    there_before = mode(tmp_path)
    folder = tmp_path / "new" / "state"
    gateway = await daemon(settings(function), before=UMASK.format(umask), start=False)
    gateway.configure(settings(function, f'[store]\npath = "{folder}/calls.db"'))
    gateway.config.chmod(0o644)
    await gateway.start()
    await gateway.final(await gateway.submit("it", SECRET))
    found = modes(folder)
    assert {"calls.db", "calls.db-wal"} <= set(found)
    assert set(found.values()) == {"0o600"}, found
    for path, expected in ((folder, 0o700), (folder.parent, 0o700), (tmp_path, there_before)):
        assert mode(path) == expected, path


async def test_what_is_no_file_is_not_taken_for_the_store(daemon: StartDaemon, tmp_path: Path) -> None:
    """Of /dev/null, root would make something that nobody else can use."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    pipe.chmod(0o666)
    gateway = await daemon("", start=False)
    gateway.configure(f'[store]\npath = "{pipe}"')
    await gateway.spawn()
    assert await gateway.ended() == 1
    assert f"{pipe} is a device, a pipe or a socket, and no file" in gateway.log
    assert mode(pipe) == 0o666


@pytest.mark.unmeasured
@pytest.mark.parametrize("left", ["by a clean stop", "by a crash", "damaged", "by an older version"])
async def test_a_store_that_others_could_read_is_closed_to_them(
    daemon: StartDaemon, function: Server, left: str
) -> None:
    """With its WAL, and what is kept of it: set aside when it is damaged, copied before it is changed."""
    gateway = await daemon(settings(function), before=UMASK.format(0))
    call_id = await gateway.submit("it", SECRET)
    await gateway.final(call_id)
    await (gateway.kill() if left == "by a crash" else gateway.terminate())
    if left == "damaged":
        gateway.store.write_bytes(b"This is no database." * 1000)
    if left == "by an older version":
        as_an_older_version(gateway.store)
    for path in gateway.folder.glob("calls.db*"):
        path.chmod(0o644)
    await gateway.start()
    await gateway.final(await gateway.submit("it", SECRET))
    found = modes(gateway.folder)
    assert len(found) > 1
    assert set(found.values()) == {"0o600"}, found
    assert (await ask(gateway.url, f"/system/calls/{call_id}")).status == (404 if left == "damaged" else 200)


# ---- standard streams --------------------------------------------------------------------------------------------

STREAMS = ["0<&-", "1>&-", "2>&-", "0<&- 1>&-", "0<&- 1>&- 2>&-", "1>/dev/full 2>&1"]


def with_streams(redirect: str) -> tuple[str, ...]:
    """A prefix: a shell that closes or redirects what the program gets."""
    return ("sh", "-c", f'exec "$@" {redirect}', "sh")


def standard_streams(pid: int) -> list[str]:
    """What a process has open as its input, output and place for errors."""
    return [str(Path(f"/proc/{pid}/fd/{number}").readlink()) for number in (0, 1, 2)]


@pytest.mark.measured
@pytest.mark.parametrize("redirect", STREAMS)
async def test_the_daemon_works_with_any_standard_streams(
    daemon: StartDaemon, systemd: ServiceManager, redirect: str
) -> None:
    """Closed, full, or something else than expected: programs run, and no stream is mistaken for another file."""
    address = free_address()
    gateway = await daemon(
        f'{CAT}[gateway]\nlisten = "{address}"',
        prefix=with_streams(redirect),
        env={"NOTIFY_SOCKET": str(systemd.path)},
        start=False,
    )
    gateway.url = f"http://{address}"
    await gateway.spawn()
    await systemd.wait_for("READY=1")
    reply = await ask(gateway.url, "/function/cat", method="POST", body=b"sync")
    assert (reply.status, reply.body) == (200, b"sync")
    call_id = await gateway.submit("cat", b"queued")
    assert (await gateway.final(call_id))["status"] == "success"
    assert (await ask(gateway.url, f"/system/calls/{call_id}/log")).body == b"queued\ntold\n"
    streams = standard_streams(gateway.pid)
    assert not [name for name in streams if re.search(r"socket|anon_inode|calls\.db", name)], streams


async def test_the_daemon_goes_on_when_the_reader_of_its_log_has_gone(
    daemon: StartDaemon, systemd: ServiceManager, tmp_path: Path
) -> None:
    """As `faasd-async serve 2>&1 | head`: what it would have written is lost, and nothing else."""
    address, log = free_address(), tmp_path / "log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    gateway = await daemon(
        f'{CAT}[gateway]\nlisten = "{address}"\n[log]\nlevel = "debug"',
        prefix=with_streams(f"2>{log}"),
        env={"NOTIFY_SOCKET": str(systemd.path)},
        start=False,
    )
    gateway.url = f"http://{address}"
    await gateway.spawn()
    await systemd.wait_for("READY=1")
    assert await asyncio.to_thread(select.select, [reader], [], [], PATIENCE) == ([reader], [], [])  # the log is there
    os.close(reader)
    for _ in range(3):
        assert (await gateway.final(await gateway.submit("cat", b"x")))["status"] == "success"


async def client(gateway: Daemon, redirect: str, *words: str, stdin: bytes = b"") -> Finished:
    """The command line, started with redirected streams."""
    words = (*words, "--url", gateway.url)
    process = await start_program(*words, prefix=with_streams(redirect), stdin=PIPE, stdout=PIPE, stderr=PIPE)
    result = await finish(process, stdin)
    assert "Traceback" not in result.err, result
    return result


async def test_the_client_works_with_any_standard_streams(daemon: StartDaemon) -> None:
    """Without an input there is no body; without an output or a place for errors the exit code tells."""
    gateway = await daemon('[functions.cat]\ncommand = ["cat"]')
    assert await client(gateway, "0<&-", "invoke", "cat") == Finished(0, "", "")
    assert await client(gateway, "0<&-", "invoke", "cat", "--data", "given") == Finished(0, "given", "")
    assert await client(gateway, "2>&-", "invoke", "cat", "--data", "given") == Finished(0, "given", "")
    assert await client(gateway, "2>&-", "calls", "show", "nosuch") == Finished(1, "", "")
    assert await client(gateway, "0<&- 1>&- 2>&-", "calls", "show", "nosuch") == Finished(1, "", "")
    assert (await client(gateway, "0<&- 2>&-", "calls", "list")).out == "no calls\n"
    for redirect in ("1>&-", "0<&- 1>&- 2>&-", "1>/dev/full"):
        assert (await client(gateway, redirect, "calls", "list")).code in (0, 1), redirect
    assert (await client(gateway, "0<&-", "calls", "cancel", "-")).code in (0, 1)


async def test_the_client_reads_from_a_socket(daemon: StartDaemon) -> None:
    """Which is what Node's spawn and inetd give a program as its standard input."""
    gateway = await daemon('[functions.cat]\ncommand = ["cat"]')
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"hello")
        ours.shutdown(socket.SHUT_WR)
        process = await start_program(
            *("invoke", "cat", "--url", gateway.url), fork=False, stdin=theirs.fileno(), stdout=PIPE, stderr=PIPE
        )
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert (process.returncode, out, err) == (0, b"hello", b"")


# ---- small things that people send -------------------------------------------------------------------------------


async def test_a_file_with_a_byte_order_mark_is_read(daemon: StartDaemon, function: Server) -> None:
    """As Notepad writes it: by `check`, by `serve`, and by the client."""
    gateway = await daemon(settings(function), start=False)
    gateway.config.write_bytes(b"\xef\xbb\xbf" + gateway.config.read_bytes().replace(b"\n", b"\r\n"))
    checked = await faasd("check", "--config", gateway.config)
    assert (checked.code, checked.err) == (0, "")
    await gateway.start()
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"


async def test_a_time_may_be_in_lower_case(daemon: StartDaemon, function: Server) -> None:
    """RFC 3339 5.6 allows `t` and `z`: in X-Not-Before, X-Deadline and a filter, with the same meaning."""
    gateway = await daemon(settings(function))
    for value in (
        "2040-01-31t08:00:00z",
        "2040-01-31T08:00:00z",
        "2040-01-31t09:30:00.0+01:30",
        "2040-01-31 08:00:00Z",
    ):
        call_id = await gateway.submit("it", X_Not_Before=value, X_Deadline="2040-02-01t00:00:00z")
        due_at = (await gateway.record(call_id))["due_at"]
        assert datetime.fromisoformat(due_at) == datetime.fromisoformat("2040-01-31T08:00:00Z"), value
    found = json.loads((await ask(gateway.url, "/system/calls?since=2020-01-01t00:00:00z")).body)
    assert len(found["calls"]) == 4


async def test_a_filter_takes_the_time_that_date_prints(daemon: StartDaemon, function: Server) -> None:
    """`?since=$(date -Iseconds)` has a plus in it, which is a space in a query."""
    gateway = await daemon(settings(function))
    await gateway.submit("it")
    for since, number in (
        ("2020-01-01T00:00:00+00:00", 1),
        ("2020-01-01T00:00:00%2B00:00", 1),
        ("2020-01-01T00:00:00-03:30", 1),
        ("2020-01-01%2000:00:00.5+02:00", 1),
        ("2120-01-01T00:00:00+02:00", 0),
    ):
        reply = await ask(gateway.url, f"/system/calls?since={since}")
        assert (reply.status, len(json.loads(reply.body)["calls"])) == (200, number), since
    for since in ("2020-01-01T00:00:00", "2020-01-01+02:00", "2020-01-01+02:00:00"):
        assert (await ask(gateway.url, f"/system/calls?since={since}")).status == 400, since


async def test_a_duration_may_have_days(daemon: StartDaemon, function: Server) -> None:
    """In a header, a filter and the file: `1d12h` is 36 hours."""
    gateway = await daemon(settings(function, '[calls]\nkeep = "7d"'))
    record = await gateway.record(await gateway.submit("it", X_Delay="1d12h", X_Deadline="2d"))
    created_at, due_at = (datetime.fromisoformat(record[name]) for name in ("created_at", "due_at"))
    assert round((due_at - created_at).total_seconds() / 60) == 36 * 60
    assert len(json.loads((await ask(gateway.url, "/system/calls?since=1d")).body)["calls"]) == 1


def rfc3339(at: float) -> str:
    """A time as callers write it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


async def test_a_deadline_that_can_not_be_met_is_refused(daemon: StartDaemon, function: Server) -> None:
    """In the past, or before the call is to run: 400, and nothing is queued."""
    gateway = await daemon(f'{settings(function)}[functions.fn]\nurl = "{function.url}"\ntype = "async"')
    now = time.time()
    hopeless = [
        ["X-Deadline: 1000000000"],
        ["X-Deadline: 1970-01-01T00:00:00Z"],
        [f"X-Deadline: {rfc3339(now - 5)}"],
        [f"X-Deadline: {int(now) - 5}"],
        ["X-Deadline: 30m", "X-Delay: 1h"],
        ["X-Deadline: 1h", f"X-Not-Before: {rfc3339(now + 7200)}"],
        [f"X-Deadline: {rfc3339(now + 3600)}", "X-Delay: 1d", f"X-Not-Before: {int(now) + 60}"],
    ]
    for headers in hopeless:
        reply = await post(gateway, "/async-function/it", *headers)
        assert reply.status == 400, (headers, reply)
        assert_refused(reply, 400, "X-Deadline")
        reply = await post(gateway, "/r/app/fn", *headers)
        assert (reply.status, b"X-Deadline" in reply.body) == (400, True), reply
    assert await listed(gateway) == []
    assert function.requests == []
    call_id = await gateway.submit("it", X_Deadline="1h", X_Delay="100ms")
    assert (await gateway.final(call_id))["status"] == "success"


async def test_a_deadline_that_is_a_small_number_is_so_many_seconds_away(daemon: StartDaemon, function: Server) -> None:
    """Nobody means a time in 1970."""
    gateway = await daemon(settings(function))
    assert (await gateway.final(await gateway.submit("it", X_Deadline="3600")))["status"] == "success"
    assert (await post(gateway, "/system/queues/faas-request/pause")).status == 200
    lasting = await gateway.submit("it", X_Deadline="3600")
    assert (await gateway.final(await gateway.submit("it", X_Deadline="0.2")))["status"] == "timeout"
    assert (await gateway.record(lasting))["status"] == "queued"


async def test_what_is_too_long_is_told_so(daemon: StartDaemon, function: Server) -> None:
    """414 for a request line, 431 for headers, in a line of text; and not that it is no HTTP."""
    gateway = await daemon(settings(function))
    long = "a" * 40_000
    for route in ("/function/it", "/async-function/it", "/system/calls"):
        for method in ("GET", "POST"):
            reply = await ask(gateway.url, f"{route}?{long}", method=method)
            assert_refused(reply, 414, "long")
            reply = await ask(gateway.url, route, f"Cookie: {long}", method=method)
            assert_refused(reply, 431, "long")
            reply = await ask(gateway.url, route, f"X-{long}: 1", method=method)
            assert_refused(reply, 431, "long")
            reply = await ask(gateway.url, route, *(f"X-{number}: 1" for number in range(1000)), method=method)
            assert_refused(reply, 431, "more than 128 headers")
    assert (await listed(gateway), function.requests) == ([], [])
    fits = "a" * 30_000
    assert (await ask(gateway.url, f"/healthz?{fits}")).status == 200
    assert (await ask(gateway.url, "/healthz", f"Cookie: {fits}")).status == 200
    assert_refused(await ask(gateway.url, "/function/it", "no header"), 400)


async def read_log(gateway: Daemon, call_id: str) -> bytes:
    """The log of a call, as a client that knows Content-Encoding shows it."""
    reply = await ask(gateway.url, f"/system/calls/{call_id}/log")
    assert reply.status == 200, reply
    return gzip.decompress(reply.body) if reply.headers.get("Content-Encoding") == "gzip" else reply.body


async def test_the_log_of_a_compressed_answer_can_be_read(daemon: StartDaemon, function: Server) -> None:
    """Whoever asked for gzip had a reason, and people who look into the log want text."""
    gateway = await daemon(settings(function))
    for coding, packed in {"deflate": zlib.compress(b"hello " * 9), "gzip": gzip.compress(b"hello " * 9)}.items():
        function.behaviour = answer(body=packed, Content_Encoding=coding)
        call_id = await gateway.submit("it", Accept_Encoding=coding)
        await gateway.final(call_id)
        assert await read_log(gateway, call_id) == b"hello " * 9
    shown = await faasd("calls", "log", call_id, "--url", gateway.url)
    assert (shown.code, shown.out) == (0, "hello " * 9)


async def test_a_log_that_says_gzip_and_is_not_is_shown_as_it_is(daemon: StartDaemon, function: Server) -> None:
    """Or as far as it can be read, where only its beginning is kept; never an error."""
    gateway = await daemon(settings(function, '[calls]\nkeep_output = "4KiB"'))
    for body in (b"plain", b"\x1f\x8bplain", b"x^", b"x^2"):
        function.behaviour = answer(body=body, Content_Encoding="gzip")
        call_id = await gateway.submit("it")
        await gateway.final(call_id)
        reply = await ask(gateway.url, f"/system/calls/{call_id}/log")
        assert (reply.status, reply.body) == (200, body)
    function.behaviour = answer(body=gzip.compress(os.urandom(16 * KIB)), Content_Encoding="gzip")
    call_id = await gateway.submit("it")
    await gateway.final(call_id)
    assert (await ask(gateway.url, f"/system/calls/{call_id}/log")).status == 200


# ---- where the client looks --------------------------------------------------------------------------------------


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("host", "loopback"), [("", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1"), ("[::]", "[::1]")]
)
async def test_the_client_finds_the_daemon_however_its_address_is_written(
    daemon: StartDaemon, systemd: ServiceManager, host: str, loopback: str
) -> None:
    """All addresses of the machine in the file, and an address with or without a scheme on the command line."""
    port = free_address().rpartition(":")[2]
    gateway = await daemon(
        f'[gateway]\nlisten = "{host}:{port}"', env={"NOTIFY_SOCKET": str(systemd.path)}, start=False
    )
    await gateway.spawn()
    await systemd.wait_for("READY=1")
    forms = ["{}:{}", "//{}:{}", "http://{}:{}", "http://{}:{}/"]
    urls = [form.format(place, port) for form in forms for place in {loopback, host or "localhost"} - {"[::]"}]
    for words in (["--config", str(gateway.config)], *(["--url", url] for url in urls)):
        result = await faasd("queues", "list", *words)
        assert (result.code, result.err) == (0, ""), (words, result)
        assert "faas-request" in result.out


async def test_an_address_without_a_daemon_is_shown_as_it_was_given(refused: str) -> None:
    """In one line, with the port that was meant."""
    port = urlsplit(refused).port
    for url in (f"127.0.0.1:{port}", f"//127.0.0.1:{port}", f"localhost:{port}", refused):
        result = await faasd("queues", "list", "--url", url)
        assert (result.code, result.out, result.err.count("\n")) == (69, "", 1), result
        assert f":{port} " in result.err


# ---- callbacks by hand -------------------------------------------------------------------------------------------


async def resend(gateway: Daemon, call_id: str) -> Reply:
    """Ask for a call's callback to be sent again."""
    return await post(gateway, f"/system/calls/{quote(call_id, safe='')}/callback")


async def again(gateway: Daemon, call_id: str) -> dict[str, Any]:
    """Run a finished call once more; its record when it has ended."""
    reply = await post(gateway, f"/system/calls/{quote(call_id, safe='')}/retry")
    assert reply.status == 202, reply
    return await gateway.final(call_id)


async def test_another_outcome_has_another_webhook_id(
    daemon: StartDaemon, function: Server, sink: Server, tmp_path: Path
) -> None:
    """And another delivery of the same one has the same: receivers drop what they have seen (Standard Webhooks)."""
    (tmp_path / "secret").write_text("s3cret")
    sink.behaviour = answer(503)
    gateway = await daemon(settings(function, f'[callback]\nsigning_secret_file = "{tmp_path}/secret"'))
    call_id = await gateway.submit("it", X_Callback_Url=sink.url)
    await sink.wait_for(2)
    await gateway.kill()  # what is left of a process that died is another delivery too
    sink.behaviour = answer(200)
    await gateway.start()
    await gateway.final(call_id)
    assert (await resend(gateway, call_id)).status == 202
    await gateway.final(call_id)
    first = [request.headers["webhook-id"] for request in sink.requests]
    assert len(first) >= 4
    assert len(set(first)) == 1
    second_and_third = []
    for _ in range(2):
        await again(gateway, call_id)
        second_and_third.append(sink.requests[-1].headers["webhook-id"])
    assert len({*first, *second_and_third}) == 3
    assert (await resend(gateway, call_id)).status == 202
    await gateway.final(call_id)
    assert sink.requests[-1].headers["webhook-id"] == second_and_third[-1]


@pytest.mark.parametrize(("status", "first"), [(200, "delivered"), (200, "failed"), (500, "delivered")])
async def test_a_callback_is_sent_again_without_running_the_function(
    daemon: StartDaemon, function: Server, sink: Server, status: int, first: str
) -> None:
    """202, and then what was sent before, byte for byte; whether it was lost on the way or behind the receiver."""
    function.behaviour = answer(status, bytes(range(256)), X_Own="v", Content_Type="application/x-own")
    sink.behaviour = answer(200 if first == "delivered" else 400)
    gateway = await daemon(settings(function, "[retry]\nattempts = 1"))
    call_id = await gateway.submit("it", X_Callback_Url=f"{sink.url}/path?q=1")
    before = await gateway.final(call_id)
    assert before["callback"]["status"] == first
    sink.behaviour = answer(200)
    reply = await resend(gateway, call_id)
    assert reply.status == 202, reply
    after = await gateway.final(call_id)
    assert after["callback"]["status"] == "delivered"
    assert (after["callback"]["http_status"], after["callback"]["error"]) == (200, None)
    told = ("status", "attempts", "http_status", "error", "started_at", "completed_at", "duration_seconds")
    assert [after[name] for name in told] == [before[name] for name in told]
    assert not after.get("history")
    sent, sent_again = sink.requests
    assert (sent.target, sent.body, sent.raw_headers) == (sent_again.target, sent_again.body, sent_again.raw_headers)
    assert sent.headers["X-Own"] == "v"
    assert len(function.requests) == 1


async def test_a_callback_that_is_sent_again_has_all_its_deliveries(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """It is tried as often as the first time, across restarts, and may fail again."""
    sink.behaviour = answer(503)
    gateway = await daemon(settings(function, "[callback]\nattempts = 3"))
    call_id = await gateway.submit("it", X_Callback_Url=sink.url)
    record = await gateway.final(call_id)
    assert (record["callback"]["status"], len(sink.requests)) == ("failed", 3)
    assert (await resend(gateway, call_id)).status == 202
    assert (await gateway.final(call_id))["callback"]["status"] == "failed"
    assert len(sink.requests) == 6
    sink.behaviour = never
    assert (await resend(gateway, call_id)).status == 202
    await sink.wait_for(7)
    await gateway.kill()
    sink.behaviour = answer(200)
    await gateway.start()
    record = await gateway.final(call_id)
    assert (record["status"], record["callback"]["status"]) == ("success", "delivered")
    assert (record["interrupted"], len(function.requests), len(sink.requests)) == (0, 1, 8)


async def test_a_callback_that_was_cancelled_can_be_sent_after_all(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """Who stopped it by mistake, or waits for the receiver to be mended, loses nothing."""
    sink.behaviour = answer(503)
    gateway = await daemon(settings(function, '[callback]\nmin_wait = "1h"\nmax_wait = "1h"'))
    call_id = await gateway.submit("it", X_Callback_Url=sink.url)
    await gateway.until(call_id, lambda record: record["callback"]["http_status"] == 503)
    assert (await ask(gateway.url, f"/async-function/{call_id}", method="DELETE")).status == 202
    sink.behaviour = answer(200)
    assert (await resend(gateway, call_id)).status == 202
    assert (await gateway.final(call_id))["callback"]["status"] == "delivered"
    assert [request.body for request in sink.requests] == [b"ok"] * 2


async def test_an_outcome_without_an_answer_can_be_told_again(daemon: StartDaemon, refused: str, sink: Server) -> None:
    """There was nothing but the status, and that is still known."""
    gateway = await daemon(f'[functions.it]\nurl = "{refused}"\n[retry]\nattempts = 1')
    call_id = await gateway.submit("it", X_Callback_Url=sink.url)
    await gateway.final(call_id)
    assert (await resend(gateway, call_id)).status == 202
    await gateway.final(call_id)
    assert [(request.headers["X-Function-Status"], request.body) for request in sink.requests] == [("502", b"")] * 2


async def test_what_has_no_callback_to_send_is_told_so(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """409 when there is none, none yet, or one on its way; 404 for a call that is not known."""
    sink.behaviour = function_gate = Gate()
    gateway = await daemon(f'{settings(function)}[functions.wait]\nurl = "{sink.url}"\nqueue = "b"')
    without = await gateway.submit("it")
    await gateway.final(without)
    assert_refused(await resend(gateway, without), 409, "callback")
    runs = await gateway.submit("wait", X_Callback_Url=function.url)
    await sink.wait_for(1)
    waits = await gateway.submit("it", X_Delay="1h", X_Callback_Url=function.url)
    on_its_way = await gateway.submit("it", X_Callback_Url=sink.url)
    await sink.wait_for(2)
    for call_id in (runs, waits, on_its_way):
        assert_refused(await resend(gateway, call_id), 409)
    only_failures = await gateway.submit("it", X_Failure_Callback_Url=sink.url)
    await gateway.final(only_failures)
    assert_refused(await resend(gateway, only_failures), 409, "callback")
    assert_refused(await resend(gateway, "nosuch"), 404)
    function_gate.open()
    for call_id in (runs, on_its_way):
        assert (await gateway.final(call_id))["callback"]["status"] == "delivered"


async def test_an_answer_that_is_not_whole_any_more_is_not_sent(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """410, once it was cut to `keep_output`; one that fits is kept whole, with its headers."""
    gateway = await daemon(settings(function, '[calls]\nkeep_output = "1KiB"'))
    for size, status in ((KIB, 202), (KIB + 1, 410), (0, 202)):
        function.behaviour = answer(200, b"x" * size, X_Own="v")
        call_id = await gateway.submit("it", X_Callback_Url=sink.url)
        await gateway.final(call_id)
        sent = len(sink.requests)
        reply = await resend(gateway, call_id)
        assert reply.status == status, (size, reply)
        if status == 410:
            assert_refused(reply, 410, "stored")
        record = await gateway.final(call_id)
        assert record["callback"]["status"] == "delivered"
        assert len(sink.requests) == sent + (status == 202)
        assert (sink.requests[-1].body, sink.requests[-1].headers["X-Own"]) == (b"x" * size, "v")


async def test_a_callback_is_sent_again_by_operators_only(
    daemon: StartDaemon, function: Server, sink: Server, tmp_path: Path
) -> None:
    """With credentials where there are some, and never for a page from elsewhere."""
    for name in ("user", "password"):
        (tmp_path / name).write_text(name)
    gateway = await daemon(
        settings(function, f'[auth]\nuser_file = "{tmp_path}/user"\npassword_file = "{tmp_path}/password"')
    )
    login = "Authorization: Basic dXNlcjpwYXNzd29yZA=="
    call_id = await gateway.submit("it", X_Callback_Url=sink.url)
    await sink.wait_for(1)
    target = f"/system/calls/{call_id}/callback"
    assert (await post(gateway, target)).status == 401
    assert (await post(gateway, target, login, "Sec-Fetch-Site: cross-site")).status == 403
    reply = await ask(gateway.url, f"/system/calls/{call_id}?wait=25s", login)
    assert json.loads(reply.body)["status"] == "success"
    async with asyncio.timeout(PATIENCE):
        while (reply := await post(gateway, target, login)).status == 409:  # noqa: ASYNC110 — until that is stored
            await asyncio.sleep(0.01)
    assert reply.status == 202
    await sink.wait_for(2)


async def test_calls_resend_is_the_same_at_a_shell(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """Ids as arguments or from standard input; printed when done, and told on standard error when not."""
    gateway = await daemon(settings(function))
    calls = [await gateway.submit("it", X_Callback_Url=sink.url, X_Call_Id=name) for name in ("a/b", "c")]
    for call_id in calls:
        await gateway.final(quote(call_id, safe=""))
    done = await faasd("calls", "resend", "a/b", "--url", gateway.url)
    assert (done.code, done.out, done.err) == (0, "a/b\n", "")
    await sink.wait_for(3)
    await gateway.final("a%2Fb")
    result = await faasd("calls", "resend", "-", "--url", gateway.url, stdin=b"a/b c nosuch\n")
    assert (result.code, result.out) == (1, "a/b\nc\n")
    assert result.err.startswith("nosuch: ")
    await sink.wait_for(5)
    assert sorted(sink.call_ids) == ["a/b"] * 3 + ["c"] * 2
    assert len(function.requests) == 2
    assert (await faasd("calls", "resend", "--url", gateway.url)).code in (1, 2)
    assert "resend" in (await faasd("calls", "--help")).out


# ---- what happened before ----------------------------------------------------------------------------------------

HISTORY_KEYS = {
    *("status", "attempts", "http_status", "error", "started_at", "completed_at", "duration_seconds"),
    *("interrupted", "callback"),
}


def as_history(record: dict[str, Any]) -> dict[str, Any]:
    """What stays of an outcome once the call is run again."""
    told = {name: record["callback"][name] for name in ("status", "attempts", "http_status", "error")}
    duration_s = record["duration_seconds"]
    nanoseconds = duration_s if duration_s is None else round(duration_s * 1e9)
    return {**{name: record[name] for name in HISTORY_KEYS}, "callback": told, "duration_seconds": nanoseconds}


async def test_a_retry_by_hand_keeps_what_happened_before(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """`history` in the record, oldest first, with each outcome and its callback; also after a crash."""
    gateway = await daemon(settings(function, "[retry]\nattempts = 2"))
    function.behaviour = answer(500)
    sink.behaviour = answer(400)
    call_id = await gateway.submit("it", b"body", X_Callback_Url=sink.url.replace("//", "//user:s3cret@"))
    records = [await gateway.final(call_id)]
    assert not records[0].get("history")
    function.behaviour = answer(404)
    sink.behaviour = answer(200)
    records.append(await again(gateway, call_id))
    function.behaviour = answer(200)
    records.append(await again(gateway, call_id))
    await gateway.kill()
    await gateway.start()
    last = await gateway.record(call_id)
    assert last == records[-1]
    assert (last["status"], last["attempts"]) == ("success", 1)
    assert [set(run) for run in last["history"]] == [HISTORY_KEYS] * 2
    assert [as_history(run) for run in last["history"]] == [as_history(record) for record in records[:2]]
    assert [run["status"] for run in last["history"]] == ["error", "error"]
    assert [(run["attempts"], run["http_status"]) for run in last["history"]] == [(2, 500), (1, 404)]
    assert [run["callback"]["status"] for run in last["history"]] == ["failed", "delivered"]
    assert "s3cret" not in json.dumps(last)
    shown = await faasd("calls", "show", call_id, "--json", "--url", gateway.url)
    assert json.loads(shown.out)["history"] == last["history"]


@pytest.mark.parametrize("end", ["success", "timeout", "cancelled", "interrupted"])
async def test_every_kind_of_end_stays_in_the_history(daemon: StartDaemon, function: Server, end: str) -> None:
    """Also those of calls that never ran, and of one that took the daemon down."""
    gateway = await daemon(settings(function, "[retry]\nmax_interruptions = 1"))
    if end == "timeout":
        call_id = await gateway.missed("it")
    elif end == "cancelled":
        call_id = await gateway.submit("it", X_Delay="1h")
        assert (await ask(gateway.url, f"/async-function/{call_id}", method="DELETE")).status == 202
    elif end == "interrupted":
        function.behaviour = poison(gateway)
        call_id = await gateway.submit("it/pill")
        await live_and_die(gateway, 1)
    else:
        call_id = await gateway.submit("it")
    before = await gateway.final(call_id)
    assert before["status"] == ("error" if end == "interrupted" else end)
    function.behaviour = answer(200)
    record = await again(gateway, call_id)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)
    assert [as_history(run) for run in record["history"]] == [as_history(before)]


async def test_a_retry_by_filter_keeps_the_history_too(daemon: StartDaemon, function: Server) -> None:
    """Each call its own, while it waits to run again as well."""
    function.behaviour = answer(404)
    gateway = await daemon(settings(function))
    calls = [await gateway.submit("it") for _ in range(3)]
    before = {call_id: await gateway.final(call_id) for call_id in calls}
    assert (await post(gateway, "/system/queues/faas-request/pause")).status == 200
    assert json.loads((await post(gateway, "/system/calls/retry?status=error")).body) == {"matched": 3, "done": 3}
    for call_id in calls:
        record = await gateway.record(call_id)
        assert record["status"] == "queued"
        assert [run["completed_at"] for run in record["history"]] == [before[call_id]["completed_at"]]
