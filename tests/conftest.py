"""Real things to test with: the daemon as a process, functions and callback sinks as HTTP servers.

Nothing here stands in for a part of the daemon. `daemon` starts `faasd_async.py serve` on a free
port with a store in the test's own folder; `function` and `sink` are real servers in the test's
event loop that note what they are sent, byte for byte, and do what the test tells them to. A test
waits for what happens ("the function has seen two requests", "this line is in the log"), never
for time.

Variables that change a run: CI (a test that is skipped has failed), FAASD_ASYNC_NO_FORK (each
process gets an interpreter of its own, see forkserver.py) and FAASD_ASYNC_STORE=nats (the daemons
of tests that do not say where their queue is have it on a NATS server, see jetstream.py).
"""

import asyncio
import contextlib
import functools
import gc
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from forkserver import Forked, ForkServer
from hypothesis import HealthCheck, settings
from multidict import CIMultiDict

from faasd_async import import_libraries

pytest_plugins = ["jetstream"]  # fixtures of the queue that hosts share

SCRIPT = Path(__file__).resolve().parent.parent / "faasd_async.py"
PROGRAM = (sys.executable, "-m", "faasd_async")
# What a command begins with that runs Python, but nothing of ours: coverage makes it twice as slow.
UNMEASURED = ("env", "-u", "COVERAGE_PROCESS_CONFIG")
PYTHON = (sys.executable, "-IS", "-c")  # for a little program: what it does not need, coverage included, stays away

# A module is compiled once. The system's certificates, 0.1 s each time, are for the world outside.
os.environ["PYTHONPATH"] = str(SCRIPT.parent)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("SSL_CERT_FILE", os.devnull)

import_libraries()  # Many tests use parts of the daemon.

# The tests that take long, marked so, run only when somebody asks for them.
LONG_TESTS = bool(os.environ.get("FAASD_ASYNC_LONG_TESTS"))

# What hypothesis tries is the same each time, and may take as long as the machine needs to make it up.
settings.register_profile(
    "house", derandomize=not LONG_TESTS, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")

# How long anything that is waited for may take before the test fails. Never reached when all is
# well, so it is long enough for a busy machine, and no test depends on its value.
PATIENCE = 30.0

FORK = not os.environ.get("FAASD_ASYNC_NO_FORK")  # or each process gets an interpreter of its own
LONGEST_LINE = 2**20  # of a log
SYSTEMD = ("NOTIFY_SOCKET", "JOURNAL_STREAM")  # meant for pytest, if it has these variables

# Added to every test's own settings, which win: a free port, and waits that suit a test.
DEFAULTS: dict[str, Any] = {
    "gateway": {"listen": "127.0.0.1:0", "hosts": ["gateway.example"]},
    "retry": {"min_wait": "50ms", "max_wait": "200ms"},
    "callback": {"min_wait": "50ms", "max_wait": "200ms", "attempts": 1000},  # ten would be over in a second
}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` in it, table by table."""
    both = dict(base)
    for key, value in over.items():
        both[key] = merge(both.get(key, {}), value) if isinstance(value, Mapping) else value
    return both


def to_toml(tables: Mapping[str, Any], name: str = "") -> str:
    """Nested dicts as TOML. A JSON string, number, boolean or list is a TOML one too."""
    values, inner = [], []
    for key, value in tables.items():
        if isinstance(value, dict):
            header = f"{name}.{json.dumps(key)}".removeprefix(".")
            inner.append(f"[{header}]\n{to_toml(value, header)}")
        else:
            values.append(f"{json.dumps(key)} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(values + inner)


# ---- processes -----------------------------------------------------------------------------------

Process = asyncio.subprocess.Process | Forked
PIPE, DEVNULL = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL


def pytest_configure(config: pytest.Config) -> None:
    """Tell of our markers."""
    text = "own_interpreter: the daemons of the test are started as they are installed, not forked"
    config.addinivalue_line("markers", text)
    config.addinivalue_line("markers", "long: it runs with FAASD_ASYNC_LONG_TESTS=1 only")
    config.addinivalue_line("markers", "no_cover: what pytest's own process does is not measured")
    config.addinivalue_line("markers", "unmeasured: nor is what the test starts, which others run as well")
    config.addinivalue_line("markers", "measured: what gets an interpreter of its own is measured, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long, unless it is asked for; begin with the longest of the rest, or they would be run alone
    in the end.

    The code that a test of a daemon is about runs in the daemon, where it is measured; to measure the
    test too makes it twice as slow.
    """
    left_out = [] if LONG_TESTS else [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.path.name != "test_readme.py")
    for item in items:
        if {"daemon", "hosts"} & {*getattr(item, "fixturenames", ())} or item.get_closest_marker("unmeasured"):
            item.add_marker(pytest.mark.no_cover)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Spare each collection of garbage what stays: the modules, and thousands of tests."""
    gc.collect()
    gc.freeze()


interpreters_are_measured = False  # for that they would take twice as long to start


@pytest.fixture(autouse=True)
def measure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have coverage look at what the test starts as it is marked: that costs a daemon a third of its time."""
    if request.node.get_closest_marker("unmeasured"):
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    if request.node.get_closest_marker("measured"):
        monkeypatch.setattr(sys.modules[__name__], "interpreters_are_measured", True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a test that was skipped has failed, with the reason why it was skipped."""
    report = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"CI must not skip it: {report.longreprtext}"
    return report


fork_servers: dict[tuple[str, tuple[str, ...], bool], ForkServer] = {}  # of this process, by what they are made with


def fork_server(library: str = "", prefix: tuple[str, ...] = ()) -> ForkServer:
    """The one that starts programs with this library preloaded, and was itself started by this prefix.

    Those of tests that are not measured have another one.
    """
    made_with = library, prefix, "COVERAGE_PROCESS_CONFIG" in os.environ
    if made_with not in fork_servers:
        fork_servers[made_with] = ForkServer(library, prefix)
    return fork_servers[made_with]


def pytest_sessionfinish() -> None:
    """End the fork servers, before what they cover is counted, and let go of ports."""
    for server in fork_servers.values():
        server.close()
    for port in addresses:
        port.close()


async def start_program(
    *arguments: str | Path,
    before: str = "",
    fork: bool = True,
    prefix: Sequence[str] = (),
    server_prefix: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> Process:
    """Start the program; the rest is as for `asyncio.create_subprocess_exec`.

    `before` is Python that comes first, with the program imported as `faasd_async`. It is forked
    where that makes no difference. It gets an interpreter of its own if something execs it, if its
    environment is another one from the start, or if `fork` is false. `server_prefix` may as well
    exec the fork server: what it does is the same for all that come from there.
    """
    words = [str(argument) for argument in arguments]
    streams: dict[str, Any] = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
    common = {"env": env or os.environ, "cwd": cwd or Path.cwd(), "limit": LONGEST_LINE, **streams}
    if FORK and fork and not prefix and not pass_fds:
        server = fork_server(common["env"].get("LD_PRELOAD", ""), server_prefix)
        if server.can_start(common["env"]):
            return await server.start(*words, before=before, **common)
    if not interpreters_are_measured:
        common["env"] = {name: value for name, value in common["env"].items() if name != "COVERAGE_PROCESS_CONFIG"}
    if before:
        script = f"import sys, faasd_async\n{before}\nsys.exit(faasd_async.main(sys.argv[1:]))"
        program: tuple[str, ...] = (sys.executable, "-c", script)
    else:
        program = PROGRAM
    return await asyncio.create_subprocess_exec(*server_prefix, *prefix, *program, *words, pass_fds=pass_fds, **common)


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str


async def finish(process: Process, stdin: bytes) -> Finished:
    """Feed a process, all three of whose streams are pipes, and wait for its end."""
    try:
        out, err = await asyncio.wait_for(process.communicate(stdin), PATIENCE)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Finished(process.returncode, out.decode(), err.decode())


async def run(*command: str | Path, stdin: bytes = b"") -> Finished:
    """Run a command to its end. One that is not installed is an error, not a reason to skip."""
    process = await asyncio.create_subprocess_exec(*map(str, command), stdin=PIPE, stdout=PIPE, stderr=PIPE)
    return await finish(process, stdin)


async def faasd(
    *arguments: str | Path,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Finished:
    """Run `faasd-async` with these arguments to its end; `env` comes on top of our own."""
    process = await start_program(
        *arguments, env={**os.environ, **(env or {})}, cwd=cwd, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    return await finish(process, stdin)


# ---- ports ---------------------------------------------------------------------------------------


class Port:
    """A port of 127.0.0.1 that nobody else gets while its owner is down, not even by chance.

    It is bound as long as this is open: a server can listen on it all the same, since both say SO_REUSEADDR.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        while True:
            self.number = random.randrange(10_000, 32_000)  # below those that Linux gives to clients
            with contextlib.suppress(OSError):
                self._socket.bind(("127.0.0.1", self.number))
                break
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    def close(self) -> None:
        """Others may have it."""
        self._socket.close()


addresses: list[Port] = []  # of daemons, held until all tests are over


def free_address() -> str:
    """An address to listen on, for a daemon that cannot tell which port it got, or gets the same one again."""
    addresses.append(Port())
    return f"127.0.0.1:{addresses[-1].number}"


# ---- the daemon ----------------------------------------------------------------------------------


class Daemon:
    """`faasd_async.py serve` with its log, on settings and a store that outlive the process."""

    def __init__(
        self,
        folder: Path,
        settings: str,
        *,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.config = folder / "config.toml"
        self.store = folder / "calls.db"
        self.env = dict(env or {})  # what the process gets beside our own environment
        self.prefix = prefix  # a command that execs it, e.g. a shell that sets something up first
        self.server_prefix: tuple[str, ...] = ()  # one that may as well exec the server from which it is forked
        self.arguments: list[str] = []  # more of them for `serve`
        self.before = ""  # Python that comes first, with `faasd_async` imported
        self.fork = True  # False: it gets an interpreter of its own
        self.pass_fds: Sequence[int] = ()  # open files that it inherits under the same numbers
        self.lines: list[str] = []  # the log of all processes so far
        self.url = ""  # of the first listener; changes with every start unless the settings have a port
        self.process: Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._log_ended = False
        self._news = asyncio.Condition()  # notified for every line, and when the log ends
        self._session: aiohttp.ClientSession | None = None
        self.configure(settings)

    def configure(self, settings: str) -> None:
        """Write the configuration file; a running daemon does not read it before SIGHUP."""
        ours = merge(DEFAULTS, {"store": {"path": str(self.store)}})
        self.settings = merge(ours, tomllib.loads(settings))
        self.config.write_text(to_toml(self.settings))

    @property
    def pid(self) -> int:
        """Process id of the running daemon."""
        assert self.process is not None, "the daemon is not running"
        assert self.process.returncode is None, f"the daemon ended by itself:\n{self.log}"
        return self.process.pid

    @property
    def log(self) -> str:
        """All that was logged so far."""
        return "\n".join(self.lines)

    async def start(self) -> None:
        """Start on what the last process left behind; return once it listens."""
        assert self.process is None, "the daemon runs already"
        first_line = len(self.lines)
        await self.spawn()
        line = await self.wait_for_log("listening on ", first_line)
        if port := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            self.url = port.group()

    async def spawn(self) -> None:
        """Start the process without waiting for it to listen."""
        env = {name: value for name, value in os.environ.items() if name not in SYSTEMD} | self.env
        self.process = await start_program(
            "serve",
            "--config",
            self.config,
            *self.arguments,
            before=self.before,
            fork=self.fork,
            prefix=self.prefix,
            server_prefix=self.server_prefix,
            env=env,
            cwd=self.folder,
            pass_fds=self.pass_fds,
            stdin=DEVNULL,
            stderr=PIPE,
        )
        self._log_ended = False
        self._reader = asyncio.create_task(self._read_log(self.process))

    async def _read_log(self, process: Process) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            async with self._news:
                self.lines.append(line.decode().rstrip("\n"))
                self._news.notify_all()
        async with self._news:
            self._log_ended = True
            self._news.notify_all()

    async def wait_for_log(self, text: str, first_line: int = 0) -> str:
        """The first log line from `first_line` on that contains `text`, as soon as there is one."""

        def found() -> str | None:
            return next((line for line in self.lines[first_line:] if text in line), None)

        async with self._news:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait_for(lambda: found() or self._log_ended), PATIENCE)
        line = found()
        assert line is not None, f"no {text!r} in the log:\n{self.log}"
        return line

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the daemon."""
        os.kill(self.pid, number)

    async def ended(self) -> int:
        """Wait until the process is gone and its log is read to the end; its exit code."""
        assert self.process is not None and self._reader is not None
        code = await asyncio.wait_for(self.process.wait(), PATIENCE)
        await asyncio.wait_for(self._reader, PATIENCE)
        self.process = None
        return code

    async def kill(self) -> None:
        """SIGKILL, as a power cut or the kernel's OOM killer would do it."""
        self.signal(signal.SIGKILL)
        await self.ended()

    async def terminate(self) -> int:
        """SIGTERM, as systemd does it; the exit code."""
        self.signal(signal.SIGTERM)
        return await self.ended()

    async def close(self) -> None:
        """End of the test: what still runs must stop well, and none may have logged a traceback."""
        await self.hang_up()
        try:
            if self.process is not None:
                assert await self.terminate() == 0, f"the daemon did not stop well:\n{self.log}"
        finally:
            if self.process is not None and self.process.returncode is None:
                await self.kill()
        assert "Traceback" not in self.log, f"a traceback in the log:\n{self.log}"

    async def hang_up(self) -> None:
        """Close the connections of our own to it; there are others when it is asked again."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def http(self) -> aiohttp.ClientSession:
        """A client for what this class itself has to ask."""
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE))
        return self._session

    async def record(self, call_id: str) -> dict[str, Any]:
        """The record of a call."""
        async with self.http.get(f"{self.url}/system/calls/{call_id}") as response:
            assert response.status == 200, await response.text()
            record: dict[str, Any] = await response.json()
            return record

    async def forgotten(self, call_id: str) -> None:
        """Wait until there is no record of a call."""
        async with asyncio.timeout(PATIENCE):
            while (await ask(self.url, f"/system/calls/{call_id}")).status != 404:
                pass

    async def until(self, call_id: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The record of a call as soon as `condition` holds for it.

        Polls, because the record can change after the last thing that a function or sink sees of
        the call: the outcome is stored when their answer has come back.
        """
        deadline = time.monotonic() + PATIENCE
        while not condition(record := await self.record(call_id)):
            assert time.monotonic() < deadline, f"waited in vain; the record is {record}, the log\n{self.log}"
            await asyncio.sleep(0.01)
        return record

    async def final(self, call_id: str) -> dict[str, Any]:
        """The record of a call when it is final and nothing is left to do for its callback."""
        return await self.until(
            call_id,
            lambda record: record["completed_at"] is not None and record["callback"]["status"] != "pending",
        )

    async def submit(self, path: str, body: bytes = b"", **headers: str) -> str:
        """POST to /async-function/`path`; the 202's call id. `X_Delay="1s"` is X-Delay."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.http.post(f"{self.url}/async-function/{path}", data=body, headers=named) as response:
            assert response.status == 202, await response.text()
            return response.headers["X-Call-Id"]

    async def missed(self, path: str, body: bytes = b"", queue: str = "faas-request", **headers: str) -> str:
        """A call that has ended in timeout without a run: its queue is held until its deadline has passed."""
        held = f"{self.url}/system/queues/{queue}"
        async with self.http.post(f"{held}/pause") as response:
            assert response.status == 200, await response.text()
        call_id = await self.submit(path, body, **headers, X_Deadline="100ms")
        record = await self.until(call_id, lambda record: record["completed_at"] is not None)
        assert (record["status"], record["attempts"]) == ("timeout", 0)
        async with self.http.post(f"{held}/resume") as response:
            assert response.status == 200, await response.text()
        return call_id


class StartDaemon(Protocol):
    """What the `daemon` fixture gives."""

    async def __call__(
        self,
        settings: str,
        *,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        before: str = "",
        start: bool = True,
    ) -> Daemon: ...


@pytest.fixture
async def daemon(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[StartDaemon]:
    """Start a daemon: `await daemon('''TOML''')`. All are stopped and looked over in the end."""
    fork = request.node.get_closest_marker("own_interpreter") is None
    async with contextlib.AsyncExitStack() as all_daemons:

        async def start_daemon(
            settings: str,
            *,
            env: Mapping[str, str] | None = None,
            prefix: Sequence[str] = (),
            before: str = "",
            start: bool = True,
        ) -> Daemon:
            one = Daemon(tmp_path, settings, env=env, prefix=prefix)
            one.before, one.fork = before, fork
            all_daemons.push_async_callback(one.close)
            if start:
                await one.start()
            return one

        yield start_daemon


@functools.cache
def namespaces(*kinds: str) -> tuple[str, ...]:
    """A prefix that gives a process namespaces of its own (unshare(1)), in which it may do as root may."""
    users = () if os.geteuid() == 0 else ("--map-root-user",)
    prefix = ("unshare", *users, *(f"--{kind}" for kind in kinds))
    if subprocess.run([*prefix, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("namespaces need root, or a kernel that lets users have them")
    return prefix


def entering(pid: int) -> str:
    """For `before`: it goes where a process has its mounts, as nsenter(1) has a command do."""
    new_mounts, new_users = 0x20000, 0x10000000  # setns(2)
    return f"""
import ctypes, os
folder, process = os.getcwd(), os.pidfd_open({pid})
if ctypes.CDLL(None, use_errno=True).setns(process, {new_mounts if os.geteuid() == 0 else new_mounts | new_users}):
    raise OSError(ctypes.get_errno(), "setns")
os.close(process)
os.chdir(folder)
"""


def with_file(source: Path, target: str) -> str:
    """For `before`: it has mounts of its own, with one file in place of another; that takes root."""
    new_mounts, recursive_private, bind = 0x20000, 0x4000 | 1 << 18, 0x1000  # unshare(2), mount(2)
    return f"""
import ctypes, os
kernel = ctypes.CDLL(None, use_errno=True)
if (
    kernel.unshare({new_mounts})
    or kernel.mount(b"none", b"/", None, {recursive_private}, None)
    or kernel.mount({os.fsencode(source)!r}, {os.fsencode(target)!r}, None, {bind}, None)
):
    raise OSError(ctypes.get_errno(), "mount")
"""


Preloaded = Callable[[str], str]


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Preloaded:
    """Make a library from a C file, for LD_PRELOAD: it stands between a daemon and the kernel."""
    folder = tmp_path_factory.mktemp("preloaded")

    @functools.cache  # one library, one fork server
    def build(source: str) -> str:
        library = folder / Path(source).with_suffix(".so")
        options = ("-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
        subprocess.run(["gcc", *options, "-o", library, Path(__file__).with_name(source)], check=True)
        return str(library)

    return build


class WallClock:
    """The wall clock of daemons that were started with this `env`; their monotonic clock stays real."""

    def __init__(self, library: str, control: Path) -> None:
        self.env = {"LD_PRELOAD": library, "WALL_CLOCK": str(control)}
        self._control = control
        self.set(0)

    def set(self, offset_s: int, *, sure: bool = True) -> None:
        """So far from the true time; `sure`: somebody vouches for it."""
        new = self._control.with_suffix(".new")
        new.write_text(f"{offset_s:+d}{'' if sure else '?'}\n")
        new.replace(self._control)


@pytest.fixture
def clock(tmp_path: Path, preloaded: Preloaded) -> WallClock:
    """A clock that is right until the test sets it."""
    return WallClock(preloaded("wall_clock.c"), tmp_path / "clock")


class Faults:
    """What is wrong with the disk of a daemon that was started with this `env`."""

    def __init__(self, library: str, control: Path) -> None:
        self.env = {"LD_PRELOAD": library, "DISK_FAULT": str(control)}
        self._control = control

    @contextlib.contextmanager
    def __call__(self, what: str, error: int) -> Iterator[None]:
        """While this lasts, `what` (of rws: read, write, sync) fails, or hangs if `error` is 0."""
        self._control.write_text(f"{what} {error}")
        try:
            yield
        finally:
            self._control.unlink()


@pytest.fixture
def faults(tmp_path: Path, preloaded: Preloaded) -> Faults:
    """A disk that does as it is told."""
    return Faults(preloaded("faulty_disk.c"), tmp_path / "fault")


# ---- systemd -------------------------------------------------------------------------------------


WATCHDOG_S = 0.4


class ServiceManager:
    """The receiving end of sd_notify(3): a real datagram socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)
        self.told: list[str] = []  # every line of every datagram so far

    async def wait_for(self, start: str, times: int = 1) -> str:
        """The last of so many lines that start like this."""
        async with asyncio.timeout(PATIENCE):
            while len(found := [line for line in self.told if line.startswith(start)]) < times:
                data = await asyncio.get_running_loop().sock_recv(self.socket, 2**16)
                self.told.extend(data.decode().splitlines())
        return found[-1]

    def watchdog(self) -> dict[str, str]:
        """The environment of a daemon that is watched."""
        return {"NOTIFY_SOCKET": str(self.path), "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}

    async def bite(self, gateway: Daemon) -> None:
        """Wait like systemd until WATCHDOG_USEC has passed without a word; do what it does then."""
        for _ in range(20):
            try:
                async with asyncio.timeout(2 * WATCHDOG_S):
                    await self.wait_for("WATCHDOG=1", times=self.told.count("WATCHDOG=1") + 1)
            except TimeoutError:
                break
        else:
            pytest.fail("the watchdog goes on being fed")
        gateway.signal(signal.SIGABRT)
        assert await gateway.ended() == -signal.SIGABRT


def open_files(pid: int) -> set[int]:
    """The descriptors of a process."""
    return {int(file.name) for file in Path(f"/proc/{pid}/fd").iterdir()}


@contextlib.contextmanager
def deaf() -> Iterator[int]:
    """A port of this machine whose kernel does not even take connections: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@contextlib.contextmanager
def with_descriptors(daemon: Daemon, most: int) -> Iterator[None]:
    """Meanwhile the daemon may have only so many."""
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        if daemon.process is not None:
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)


@pytest.fixture
async def systemd(tmp_path: Path) -> AsyncIterator[ServiceManager]:
    """A service manager that listens."""
    manager = ServiceManager(tmp_path / "notify.sock")
    yield manager
    manager.socket.close()


# ---- functions and callback sinks ----------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request as it was sent: nothing decoded, normalised or merged."""

    method: str
    target: str
    raw_headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    arrived: float  # monotonic

    @property
    def headers(self) -> CIMultiDict[str]:
        """The headers with names that compare without case; `getall()` has the repeats in order."""
        return CIMultiDict((name.decode(), value.decode("latin-1")) for name, value in self.raw_headers)

    @property
    def call_id(self) -> str:
        """The call id that came with it."""
        return self.headers["X-Call-Id"]


Behaviour = Callable[[web.BaseRequest, Request], Awaitable[web.StreamResponse]]


async def ok(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
    """What a server does unless told otherwise."""
    return web.Response(text="ok")


def answer(status: int = 200, body: bytes = b"", **headers: str) -> Behaviour:
    """A behaviour: always this answer; `Retry_After="1"` is the header Retry-After."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers=named)

    return behaviour


async def never(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
    """A behaviour: no answer at all."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


class Gate:
    """A behaviour: so many requests pass at once, the others wait until the gate is opened."""

    def __init__(self, passing: int = 0) -> None:
        self.passing = passing
        self._opened = asyncio.Event()

    def open(self) -> None:
        """Let everybody through, from now on."""
        self._opened.set()

    async def __call__(self, request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        """Answer `ok` in the end."""
        self.passing -= 1
        if self.passing < 0:
            await self._opened.wait()
        return await ok(request, seen)


class Server:
    """A real HTTP server in the test's event loop: a function, or the receiver of callbacks."""

    def __init__(self) -> None:
        self.requests: list[Request] = []  # in order of arrival, each complete with its body
        self.behaviour: Behaviour = ok
        self.reads_body = True  # False: the behaviour reads it, piece by piece
        self.running = 0  # requests that wait for their answer now
        self.most_running = 0  # the most there ever were at once
        self.cancelled = 0  # requests whose client went away before the answer
        self.port = 0
        self._place: Port | None = None  # which it keeps when it is stopped
        self._news = asyncio.Condition()  # notified for each arrival and each end of a request
        self._runner: web.ServerRunner | None = None

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def call_ids(self) -> list[str]:
        """The call ids of all requests, in order of arrival."""
        return [request.call_id for request in self.requests]

    async def start(self) -> None:
        """Listen, on the same port as before when it was stopped."""
        server = web.Server(self._handle, auto_decompress=False, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.01)  # 0 would wait for ever
        await self._runner.setup()
        self._place = self._place or Port()
        self.port = self._place.number
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        """Close all connections; from now on new ones are refused."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def close(self) -> None:
        """End of the test."""
        await self.stop()
        if self._place is not None:
            self._place.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        arrived = time.monotonic()
        body = await request.read() if self.reads_body else b""
        seen = Request(request.method, request.raw_path, request.raw_headers, body, arrived)
        await self._note(+1, seen)
        try:
            return await self.behaviour(request, seen)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            await self._note(-1)

    async def _note(self, started: int, seen: Request | None = None) -> None:
        self.running += started
        self.most_running = max(self.most_running, self.running)
        if seen is not None:
            self.requests.append(seen)
        async with self._news:
            self._news.notify_all()

    async def until(self, condition: Callable[[], bool], what: str = "condition") -> None:
        """Wait until `condition`, which is about this server's attributes, holds; for longer while requests come."""
        deadline = time.monotonic() + 10 * PATIENCE
        async with self._news:
            with contextlib.suppress(TimeoutError):
                while not condition() and time.monotonic() < deadline:
                    await asyncio.wait_for(self._news.wait(), PATIENCE)
        assert condition(), f"{what} not met with {len(self.requests)} requests"

    async def wait_for(self, number: int) -> list[Request]:
        """The requests as soon as there are at least `number` of them."""
        await self.until(lambda: len(self.requests) >= number, f"{number} requests")
        return self.requests


@pytest.fixture
async def function() -> AsyncIterator[Server]:
    """A function behind HTTP."""
    server = Server()
    await server.start()
    yield server
    await server.close()


@pytest.fixture
async def sink() -> AsyncIterator[Server]:
    """A receiver of callbacks."""
    server = Server()
    await server.start()
    yield server
    await server.close()


@pytest.fixture
def refused() -> Iterator[str]:
    """A URL whose port nobody listens on, and nobody else can take meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextlib.asynccontextmanager
async def rude_server(data: bytes) -> AsyncIterator[str]:
    """A server that answers each request with `data` and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


# ---- clients -------------------------------------------------------------------------------------


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that keeps its hands off: no decompression, no cookies."""
    async with aiohttp.ClientSession(
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(PATIENCE),
    ) as session:
        yield session


@dataclass(frozen=True)
class Reply:
    """An HTTP answer as it came over the wire."""

    status: int
    headers: CIMultiDict[str]
    body: bytes


def parse(data: bytes) -> Reply:
    """Split the one answer of a connection that was closed after it; chunks stay as they are."""
    if not data:
        raise ConnectionError("the connection was closed without an answer")
    head, _, body = data.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    fields = (line.partition(":") for line in rest)
    return Reply(int(first.split()[1]), CIMultiDict((name, value.strip()) for name, _, value in fields), body)


async def raw(url: str, data: bytes) -> Reply:
    """Send exactly `data`, which must ask for the connection to be closed; the answer."""
    async with connection(url) as (reader, writer):
        writer.write(data)
        return parse(await asyncio.wait_for(reader.read(), PATIENCE))


@contextlib.asynccontextmanager
async def connection(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A TCP connection to the server of `url`, for tests that care when which bytes are sent."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def ask(
    url: str,
    target: str,
    *headers: str,
    method: str = "GET",
    body: bytes = b"",
    host: str = "gateway.example",
) -> Reply:
    """A request with exactly this target and these lines (and Host, framing, Connection)."""
    length = [f"Content-Length: {len(body)}"] if body or method == "POST" else []
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *headers, *length]
    if not any(line.lower().startswith("connection:") for line in headers):
        lines.append("Connection: close")
    return await raw(url, "\r\n".join([*lines, "", ""]).encode() + body)


class Clock:
    """The time module with a time of our choice."""

    def __init__(self, now: float) -> None:
        self.now = now

    def time(self) -> float:
        """Seconds since 1970."""
        return self.now

    def time_ns(self) -> int:
        """The same in nanoseconds."""
        return round(self.now * 1e9)

    def clock_gettime(self, kind: int) -> float:
        """The time since boot goes on as well: it is time that passes, and no clock that is set."""
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


SECRET = b"s3cret-body-of-the-caller"  # no answer and no log may repeat it


def assert_refused(reply: Reply, status: int, *words: str, limit: int = 80) -> None:
    """An error in the form that all have: a line of plain text with these words, long ones cut."""
    text = reply.body.decode()
    assert reply.status == status, reply
    assert reply.headers["Content-Type"].startswith("text/plain"), reply
    assert len(text.splitlines()) == 1, text
    assert SECRET.decode() not in text
    for word in words:
        assert word[:limit].lower() in text.lower(), f"{word!r} is not in {text!r}"


# ---- names ---------------------------------------------------------------------------------------


class Names(asyncio.DatagramProtocol):
    """A DNS server, which the daemon with this `before` asks for names that are not in /etc/hosts.

    The daemon gets a mount namespace of its own, and port 53 is a privileged one: both need root.
    """

    def __init__(self, folder: Path) -> None:
        self.address = "127.53.{}.{}".format(*divmod(os.getpid() % 65_000, 254))  # others run at the same time
        self.found: dict[str, list[str]] = {}  # IPv4 and IPv6 addresses by name; no entry: no answer, ever
        self.asked: list[str] = []
        (folder / "resolv.conf").write_text(f"nameserver {self.address}\n")
        self.before = with_file(folder / "resolv.conf", "/etc/resolv.conf")

    def connection_made(self, transport: Any) -> None:
        """Keep what answers are sent through."""
        self._transport = transport

    def datagram_received(self, data: bytes, sender: Any) -> None:
        """Answer a query (RFC 1035 4.1) for the addresses of one kind."""
        labels, at = [], 12
        while length := data[at]:
            labels.append(data[at + 1 : at + 1 + length].decode())
            at += 1 + length
        name, question = ".".join(labels), data[12 : at + 5]
        self.asked.append(name)
        if name in self.found:
            family = {1: socket.AF_INET, 28: socket.AF_INET6}[int.from_bytes(question[-4:-2])]
            found = [socket.inet_pton(family, one) for one in self.found[name] if (":" in one) == (family != 2)]
            records = [b"\xc0\x0c" + question[-4:] + bytes(4) + len(one).to_bytes(2) + one for one in found]
            head = data[:2] + b"\x84\x00\0\x01" + len(found).to_bytes(2) + bytes(4)
            self._transport.sendto(head + question + b"".join(records), sender)


@pytest.fixture
async def names(tmp_path: Path) -> AsyncIterator[Names]:
    """A DNS server that answers as the test says."""
    if os.geteuid() != 0:
        pytest.skip("a name server on port 53 and a mount namespace need root")
    loop, server = asyncio.get_running_loop(), Names(tmp_path)
    transport, _ = await loop.create_datagram_endpoint(lambda: server, local_addr=(server.address, 53))
    yield server
    transport.close()
