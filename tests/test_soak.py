"""Day after day of everything at once: memory stays flat, and nothing is left behind.

FAASD_ASYNC_SOAK=1800 makes it half an hour, FAASD_ASYNC_SOAK_RATE=20 sets the calls per second. With -s, it tells
how memory and the store develop.
"""

import asyncio
import contextlib
import itertools
import os
import random
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web
from conftest import PATIENCE, SCRIPT, Daemon, Gate, Request, Server, StartDaemon

SECONDS = float(os.environ.get("FAASD_ASYNC_SOAK", 4))
RATE = float(os.environ.get("FAASD_ASYNC_SOAK_RATE", 100))
PARTS = 4  # after each of them everything comes to rest, and memory is looked at: what is under way then is no leak
MIB = 2**20
# From the first rest to the last. In a few seconds the C library's arenas still make that much of a difference: each
# thread that starts a program may open one. In an hour a leak would make more.
GROWTH = 6 * MIB
PEAK = 256 * MIB  # above what it takes while idle

# Runs the daemon in this process (the rest of the command line is the command that would do it). It
# cleans up and closes idle connections after a second, says when it is ready, and on SIGALRM gives back what memory is
# free and says how many tasks there are.
WITH_TASKS_TOLD = f"""
import asyncio, gc, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import faasd_async
faasd_async.HOUSEKEEPING_S = faasd_async.POOL_IDLE_S = 1.0
faasd_async.sd_notify = lambda state: sys.stderr.write(f"{{state}}\\n")
def tell():
    gc.collect()
    faasd_async.give_back_memory()
    sys.stderr.write(f"tasks {{len(asyncio.all_tasks())}}.\\n")
start = faasd_async.Daemon.run
async def run(self):
    asyncio.get_running_loop().add_signal_handler(signal.SIGALRM, tell)
    return await start(self)
faasd_async.Daemon.run = run
sys.exit(faasd_async.main(sys.argv[4:]))
"""

SETTINGS = """
[queues.faas-request]
max_inflight = 16
[calls]
keep = "3s"
keep_failed = "3s"
[callback]
attempts = 2
[retry]
attempts = 3
"""


def resident(daemon: Daemon, which: str = "VmRSS") -> int:
    """The memory of the daemon in bytes; with VmHWM, the most that it ever was."""
    (line,) = re.findall(rf"{which}:\s+(\d+) kB", Path(f"/proc/{daemon.pid}/status").read_text())
    return int(line) * 1024


def held(folder: str) -> list[Path]:
    """What is in a folder of /proc."""
    return list(Path(folder).iterdir())


def children(pid: int) -> int:
    """How many children a process has, zombies among them."""
    parents = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended since it was listed
            parents.append(int(stat.read_text().rpartition(")")[2].split()[1]))
    return parents.count(pid)


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    files: int
    threads: int
    children: int  # zombies among them
    tasks: int

    @classmethod
    async def by(cls, daemon: Daemon) -> "Held":
        """What the daemon holds now."""
        first_line = len(daemon.lines)
        daemon.signal(signal.SIGALRM)
        told = await daemon.wait_for_log("tasks ", first_line)
        files, threads = (len(held(f"/proc/{daemon.pid}/{kind}")) for kind in ("fd", "task"))
        return cls(files, threads, children(daemon.pid), int(told.split()[1].rstrip(".")))

    def within(self, other: "Held") -> bool:
        """Whether nothing here is more than there."""
        return all(mine <= theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))


class Load:
    """Callers of every kind, at a steady rate. Each notes what it got where it did not get what it should."""

    def __init__(self, daemon: Daemon, sink: Server, refused: str) -> None:
        self.daemon, self.sink, self.refused = daemon, sink, refused
        self.chance = random.Random(1)
        self.wrong: list[str] = []
        self.calls = 0
        self.clients: set[asyncio.Task[None]] = set()
        kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (30, self.told), (10, self.big), (15, self.synchronous), (10, self.program), (10, self.retried),
            (5, self.delayed), (5, self.cancelled), (3, self.stopped), (3, self.walked_away), (3, self.unreachable),
            (3, self.redriven), (3, self.looked_at),
        ]  # fmt: skip
        self.weights, self.kinds = zip(*kinds, strict=True)

    async def run(self, seconds: float) -> None:
        """Send calls at the rate for so long, then wait for those that are under way, and hang up."""
        started = time.monotonic()
        for number in itertools.count():
            # The pace is the thing here: a call each 1/RATE of a second, whatever the daemon makes of it.
            await asyncio.sleep(max(0.0, started + number / RATE - time.monotonic()))
            if time.monotonic() - started >= seconds:
                break
            (kind,) = self.chance.choices(self.kinds, self.weights)
            client = asyncio.create_task(self.one(kind))
            self.clients.add(client)
            client.add_done_callback(self.clients.discard)
        await asyncio.gather(*self.clients)
        await self.daemon.hang_up()

    async def one(self, kind: Callable[[], Awaitable[None]]) -> None:
        """One caller."""
        self.calls += 1
        try:
            await kind()
        except Exception as exc:
            self.wrong.append(f"{kind.__name__}: {exc!r}")

    async def told(self) -> None:
        """A queued call with a callback."""
        await self.daemon.submit("it", b"x" * 200, X_Callback_Url=self.sink.url)

    async def big(self) -> None:
        """The same with a body that is not small, and so large an answer."""
        await self.daemon.submit("it", bytes(self.chance.randrange(MIB)), X_Callback_Url=self.sink.url)

    async def synchronous(self) -> None:
        """A sync call."""
        async with self.daemon.http.post(f"{self.daemon.url}/function/it", data=b"x") as response:
            assert (response.status, await response.read()) == (200, b"x")

    async def program(self) -> None:
        """A program, queued or at once, that leaves another one behind."""
        if self.chance.random() < 0.5:
            await self.daemon.submit("program", b"x")
        else:
            async with self.daemon.http.post(f"{self.daemon.url}/function/program", data=b"x") as response:
                assert (response.status, await response.read()) == (200, b"x")

    async def retried(self) -> None:
        """A call that fails at first."""
        await self.daemon.submit("it/flaky", b"x", X_Callback_Url=self.sink.url)

    async def delayed(self) -> None:
        """A call for later."""
        await self.daemon.submit("it", b"x", X_Delay="500ms")

    async def cancelled(self) -> None:
        """A call for much later that is cancelled."""
        call_id = await self.daemon.submit("it", b"x", X_Delay="1h")
        async with self.daemon.http.delete(f"{self.daemon.url}/async-function/{call_id}") as response:
            assert response.status == 202

    async def stopped(self) -> None:
        """A program that is cancelled while it runs."""
        call_id = await self.daemon.submit("endless")
        await self.daemon.until(call_id, lambda record: record["status"] == "running")
        async with self.daemon.http.delete(f"{self.daemon.url}/async-function/{call_id}") as response:
            assert response.status == 202

    async def walked_away(self) -> None:
        """A client that goes away while a program runs for it."""
        timeout = aiohttp.ClientTimeout(0.1)
        with contextlib.suppress(TimeoutError):
            await self.daemon.http.post(f"{self.daemon.url}/function/endless", timeout=timeout)

    async def unreachable(self) -> None:
        """A callback that nobody takes."""
        await self.daemon.submit("it", b"x", X_Callback_Url=self.refused)

    async def redriven(self) -> None:
        """A failed call that is run again."""
        call_id = await self.daemon.submit("it/broken", b"x")
        await self.daemon.final(call_id)
        async with self.daemon.http.post(f"{self.daemon.url}/system/calls/{call_id}/retry") as response:
            assert response.status == 202

    async def looked_at(self) -> None:
        """An operator's look at lists and figures."""
        for path in ("/system/calls?status=error", "/system/queues", "/metrics"):
            async with self.daemon.http.get(self.daemon.url + path) as response:
                assert response.status == 200


async def behave(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
    """What the function does: an echo, but for the paths /flaky and /broken."""
    failing = seen.target == "/broken" or (seen.target == "/flaky" and seen.headers["X-Retry"] == "0")
    return web.Response(status=400 if seen.target == "/broken" else 500 if failing else 200, body=seen.body)


async def test_memory_stays_flat_and_nothing_is_left_behind(
    daemon: StartDaemon, function: Server, sink: Server, refused: str
) -> None:
    """Under a mixed load at a steady rate; afterwards no file, thread, child or task is left of it."""
    function.behaviour = behave
    programs = (
        '[functions.program]\ncommand = ["sh", "-c", "sleep 3600 & cat"]\n'
        '[functions.endless]\ncommand = ["sh", "-c", "sleep 3600; true"]\nqueue = "endless"\n'
        "[queues.endless]\nmax_inflight = 16"
    )
    gateway = await daemon(
        f'[functions.it]\nurl = "{function.url}"\n{programs}\n{SETTINGS}',
        prefix=(sys.executable, "-c", WITH_TASKS_TOLD),
    )
    await gateway.wait_for_log("READY=1")
    load = Load(gateway, sink, refused)
    await load.run(1.0)  # The first name that is looked up starts the threads for all others.
    before = await Held.by(gateway)
    print(f"start: {resident(gateway) / MIB:.1f} MiB, {before}")
    rests = list[int]()
    for part in range(PARTS):
        await load.run(SECONDS / PARTS)
        most = rests[0] + GROWTH if rests else PEAK
        rests.append(await at_rest(gateway, before, most))
        print(
            f"{(part + 1) * SECONDS / PARTS:.0f} s: {rests[-1] / MIB:.1f} MiB, {load.calls} calls, "
            f"store {gateway.store.stat().st_size / MIB:.1f} MiB"
        )
        for server in (function, sink):
            server.requests.clear()  # that is our own memory
    assert load.wrong == []


async def at_rest(gateway: Daemon, before: Held, most: int) -> int:
    """Wait until nothing is left of the load and no more memory is taken than this; how much it is.

    Connections to functions that wait for another request go after a second.
    """
    deadline = time.monotonic() + PATIENCE
    while not (after := await Held.by(gateway)).within(before) or resident(gateway) >= most:
        assert time.monotonic() < deadline, f"before: {before}, after: {after}, {resident(gateway)} of {most} bytes"
        await asyncio.sleep(0.1)
    return resident(gateway)


async def test_calls_of_a_mebibyte_each_have_their_price_and_no_more(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """64 of them in flight, answers and callbacks as large: memory for a few copies of each, and that only once."""
    gateway = await daemon(
        f'[functions.it]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 64\n'
        "[callback]\nmax_inflight = 64"
    )
    idle = resident(gateway)
    for turn in range(1, 3):
        gate = Gate()

        async def echo(request: web.BaseRequest, seen: Request, gate: Gate = gate) -> web.StreamResponse:
            await gate(request, seen)
            return web.Response(body=seen.body)

        function.behaviour = echo
        await asyncio.gather(*(gateway.submit("it", bytes(MIB), X_Callback_Url=sink.url) for _ in range(64)))
        await function.until(lambda: function.running == 64, "64 calls in flight")
        gate.open()
        await sink.wait_for(64 * turn)
        print(f"idle {idle / MIB:.0f} MiB, peak {resident(gateway, 'VmHWM') / MIB:.0f} MiB")
    assert {len(request.body) for request in (*function.requests, *sink.requests)} == {MIB}
    assert resident(gateway, "VmHWM") - idle < PEAK


COMPILED = f"""
import re, sys
sys.dont_write_bytecode = True
sys.pycache_prefix = sys.argv[1]
sys.path.insert(0, {str(SCRIPT.parent)!r})
import faasd_async
memory = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = memory()
faasd_async.give_back_memory()
print(before - memory())
"""


async def test_what_compiling_has_taken_is_given_back(tmp_path: Path) -> None:
    """Where no bytecode is kept, 20 MiB of a start would stay with the process."""
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", COMPILED, str(tmp_path)), stdout=asyncio.subprocess.PIPE
    )
    told, _ = await asyncio.wait_for(program.communicate(), PATIENCE)
    assert int(told) * 1024 > 10 * MIB
