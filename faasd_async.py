"""faasd-async: run functions in the background on one small machine.

One process hosts an OpenFaaS-compatible gateway, a durable queue, its consumers and a callback sender:

    client ──HTTP──► gateway ──Invocation──► queue ──Claim──► consumer ──HTTP/exec──► function
                        │                      ▲                  │
                        └─ /function/…         └─────Outcome──────┘──Outcome───► X-Callback-Url
                           straight through

The promise
    A 202 leaves only after the invocation is committed and synced to disk. An accepted call ends in exactly one
    final state; a crash in the middle of an attempt leads to another attempt, which the record shows
    (`interrupted`). A call's outcome and its pending callback are committed together before the callback is sent.

Sections use only what stands above them. Plain frozen data crosses them. Who owns which task:
    Daemon      one task per side job (housekeeping, watchdog); one that fails stops the daemon, as a dispatcher does
    Consumer    its dispatcher, and one task per claimed call or callback; `stop()` awaits all of them
    aiohttp     one task per HTTP request; `runner.cleanup()` awaits them
    Writer      one thread, the only one that touches SQLite once it is open; `close()` joins it

Units: `*_s` seconds as float, `*_at` Unix time in seconds, `*_bytes` sizes, `start_time` Unix time in nanoseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import difflib
import email.utils
import functools
import hashlib
import heapq
import hmac
import http.client
import ipaddress
import json
import logging
import os
import queue as queues
import random
import re
import signal
import socket
import sqlite3
import ssl
import sys
import threading
import time
import tomllib
import weakref
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import aiohttp
import prometheus_client
import yarl
from aiohttp import web
from aiohttp.client_proto import ResponseHandler
from multidict import CIMultiDict

try:
    import uvloop
except ImportError:  # no wheel for this platform (armv7l): asyncio's own loop does the job
    uvloop = None  # type: ignore[assignment]

# --- Constants ------------------------------------------------------------------------------------------------------

VERSION = "0.1.0"
USER_AGENT = f"faasd-async/{VERSION}"
DEFAULT_QUEUE = "faas-request"
CALLBACKS = "@callbacks"  # the callback sender's own queue; no queue in the file can have this name

KIB, MIB = 1024, 1024 * 1024
MAX_HEADER_BYTES = 32 * KIB  # one line or field of a request; nginx allows four of 8 KiB
MAX_RESPONSE_BYTES = 16 * MIB  # what an answer that has to be held (callback, command) may weigh
SMALL_BODY_BYTES = 64 * KIB  # a sync body up to this size is read before the function is called, above it is streamed
MAX_RETRY_AFTER_S = 86_400.0  # a function may ask for patience, not for eternity
RETRY_STORE_S = 5  # after a failed commit, for clients (Retry-After) and for ourselves; also while the provider is away
LATER = {"Retry-After": str(RETRY_STORE_S)}
HANG_UP = {"Connection": "close"}
PROVIDER_S = 10.0  # what a look-up at the provider may take
SCALE_POLL_S = 0.1  # between looks whether the provider has started a function
MAX_SEEN = 10_000  # functions, and names of none, that are remembered from look-ups
POOL_IDLE_S = 4.0  # below the 5 s after which uvicorn and Node close an idle connection
GROUP_COMMIT_MAX = 512  # operations that share one fsync
BATCH = 500  # rows that one pruning or purging step takes before others get their turn
SCAN_WINDOW = 20_000  # rows that one step of a list request reads
STALLED_S = 10.0  # a commit that takes longer means that the disk hangs
HOUSEKEEPING_S = 60.0
CLOCK_CHECK_S = 30.0  # the longest sleep towards a wall-clock time: notices a clock that was set
END_OF_TIME = 253_402_300_799.0  # 9999-12-31T23:59:59Z: what Python and RFC 3339 can write
TIME_FORM = "an RFC 3339 time with its zone, such as 2030-01-31T08:00:00Z, or Unix seconds"

# RFC 9110 7.6.1, with the ones that RFC 9110 11.7 and 6.6.2 bind to one connection.
HOP_BY_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization"}
HOP_BY_HOP |= {b"te", b"trailer", b"transfer-encoding", b"upgrade"}
CONTENT_LENGTH = frozenset((b"content-length",))
COMPUTED = frozenset(b"expect host x-call-id x-start-time x-forwarded-for x-retry".split())
FINAL = ("success", "error", "timeout", "cancelled")
STATUSES = ("delayed", "queued", "running", *FINAL)
DAMAGED = "the file is damaged: a restart sets it aside and begins with an empty queue"
UNKNOWN = "no call with this id, or its record was pruned after calls.keep"
NO_ANSWER = (aiohttp.ClientError, OSError)  # what a call raises that gave no answer, TimeoutError among them

# One system call for many ids: it gives the GIL away, and the writer's thread takes it.
NOISE = (block[at : at + 20] for block in iter(lambda: os.urandom(2560).hex(), "") for at in range(0, 5120, 20))

log = logging.getLogger("faasd_async")
T = TypeVar("T")
Tell = Callable[[T], None]
Headers = tuple[tuple[bytes, bytes], ...]
Reply = web.StreamResponse
Reader = asyncio.StreamReader | aiohttp.StreamReader
Entry = tuple[Callable[..., Any], tuple[Any, ...], asyncio.Future[Any]]  # a step, its arguments, and who waits

# --- Errors ---------------------------------------------------------------------------------------------------------
# A function's 500 or timeout is an Outcome, not an exception.


class ConfigError(Exception):
    """The configuration can't be used. `problems` has one line for each thing that is wrong. Exit code 78."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problem.replace("\n", "\\n") for problem in problems)
        super().__init__("\n".join(self.problems))


class StoreError(Exception):
    """The queue could not store or read: disk full, file damaged, thread gone. Nothing of the operation happened."""


class StoreLocked(StoreError):
    """Another process holds the file. Exit code 75."""


class Refused(Exception):
    """A request that gets another answer than success: HTTP status, one line of text, extra headers."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, dict(headers or {})


class ProviderAway(Refused):
    """The provider can't be asked or reached. What waits for it goes on waiting."""


# --- Configuration --------------------------------------------------------------------------------------------------
# A table is a dataclass; a key is a field whose metadata says how its TOML value is read. The same parsers read
# the control headers, so "10m" means the same in the file and in X-Delay.

_PART = r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)"
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_UNIT_BYTES = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": KIB, "MiB": MIB, "GiB": KIB * MIB}
_ADDRESS = re.compile(r"unix:/.+|[^/]*:([0-5]?[0-9]{1,4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])")
_NAME = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?")


def need(value: T, fits: object) -> T:
    """The value, if it fits. Raises ValueError."""
    if not fits:
        raise ValueError
    return value


def expect(form: str, read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A parser from `read`, which raises for what it can't take: the error then names the form that was expected."""

    def parse(value: Any) -> Any:
        try:
            return read(value)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"expected {form}") from None

    return parse


def _seconds(value: str) -> float:
    """A Go duration (https://pkg.go.dev/time#ParseDuration) of at most ten years, never negative."""
    need(value, value == "0" or re.fullmatch(f"(?:{_PART})+", value))
    total = sum(float(number) * _UNIT_S[unit] for number, unit in re.findall(_PART, value))
    return need(total, total <= 10 * 365 * 86_400)


def _bytes(value: Any) -> int:
    match = re.fullmatch(r"(\d{1,15}) ?([KMG]i?B|B|)", str(value) if type(value) is int else value)
    return int(need(match, match)[1]) * _UNIT_BYTES[match[2]]  # type: ignore[index]


def _url(value: str) -> yarl.URL:
    found = yarl.URL(value, encoded=True)
    return need(found, found.scheme in ("http", "https") and found.host and found.explicit_port != 0)


def _each(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda value: tuple(read(item) for item in need(value, isinstance(value, list | tuple)))


def one_of(*choices: str) -> Callable[[Any], Any]:
    """One of a few words."""
    return expect("one of " + ", ".join(map(json.dumps, choices)), lambda value: need(value, value in choices))


text = expect("a string", lambda value: need(value, isinstance(value, str) and value))
boolean = expect("true or false", lambda value: need(value, isinstance(value, bool)))
_whole: Callable[[str], int] = lambda value: int(need(value, re.fullmatch("[0-9]{1,18}", value)))  # noqa: E731
count = expect("a whole number from 1", lambda value: need(value, type(value) is int and 1 <= value <= 10**9))
number = expect("a whole number from 1", lambda value: count(_whole(value)))  # as text
duration = expect('a duration such as "10s", "5m30s" or "1h"', _seconds)
positive = expect('a duration above zero, such as "10s"', lambda value: need(_seconds(value), _seconds(value) > 0))
size = expect('a size such as "64KiB", "1MB" or a number of bytes', _bytes)
command = expect('a program and its arguments, such as ["tr", "a-z", "A-Z"]', lambda v: need(_each(text)(v), v))
http_codes = expect("a list of codes from 400 to 599", lambda v: frozenset(need(x, x in range(400, 600)) for x in v))
url = expect('a URL such as "http://127.0.0.1:9001"', lambda value: need(_url(value), "?" not in value).with_user(None))
callback_host = expect(  # of the URL, as it stands there: not decoded from IDNA
    "an absolute http:// or https:// URL, in ASCII and with no spaces",
    lambda v: (_url(need(v, re.fullmatch(r"[!-~]{1,4096}", v))).raw_host or "").encode("idna").decode().lower(),
)
addresses = expect(
    'one or more of "HOST:PORT" and "unix:/path"',
    lambda v: need(_each(lambda x: need(x, _ADDRESS.fullmatch(x)))([v] if type(v) is str else v), v),
)
patterns = expect(
    'a list of host names, "*.example.org", addresses and networks',
    _each(lambda value: need(value, "/" not in value or ipaddress.ip_network(value, strict=False)).lower()),
)
visible = expect("1 to 256 visible ASCII characters", lambda value: need(value, re.fullmatch("[!-~]{1,256}", value)))
CALL_ID = {"X-Call-Id": visible}
table = expect("a table", lambda value: need(value, isinstance(value, dict)))
string_table = expect("a table of strings", lambda value: {name: need(x, type(x) is str) for name, x in value.items()})


def _secret(path: str) -> bytes:
    """What a file holds, without the newline at its end: the value of a key that names a secret's file."""
    try:
        content = Path(os.path.expandvars(text(path))).read_bytes().rstrip(b"\r\n")
    except OSError as exc:
        raise ValueError(f"{path}: {exc.strerror}") from None
    if not content:
        raise ValueError(f"{path} is empty")
    return content


def _signing_secret(path: str) -> bytes:
    secret = _secret(path)
    try:
        webhook_signature(secret, "", 0, b"")
    except ValueError:
        raise ValueError(f"{path}: after whsec_ expected base64") from None
    return secret


def key(parse: Callable[[Any], Any], default: Any = None) -> Any:
    """A configuration key: how its TOML value is read, and its default as TOML would write it (None: no value)."""
    return field(default_factory=lambda: None if default is None else parse(default), metadata={"parse": parse})


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:  # [gateway]: where to listen and what a request may take
    listen: tuple[str, ...] = key(addresses, "127.0.0.1:8080")
    read_timeout: float = key(positive, "60s")
    write_timeout: float = key(positive, "60s")
    upstream_timeout: float = key(positive, "65s")
    max_payload: int = key(size, "1MiB")
    namespace: str = key(text, "openfaas-fn")
    drain_timeout: float = key(duration, "20s")


@dataclass(frozen=True, kw_only=True)
class AuthConfig:  # [auth]: the user and the password, out of their files; without them nobody is asked
    user_file: bytes | None = key(_secret)
    password_file: bytes | None = key(_secret)
    invoke: bool = key(boolean, False)

    @functools.cached_property
    def login(self: Login) -> str | None:  # as an Authorization header has it
        user, password = ((found or b"").decode("latin-1") for found in (self.user_file, self.password_file))
        return aiohttp.encode_basic_auth(user, password, "latin-1") if user else None


@dataclass(frozen=True, kw_only=True)
class ProviderConfig:  # [provider]: faasd, where functions that are not in the file are looked up and called
    url: yarl.URL | None = key(url)
    user_file: bytes | None = key(_secret)
    password_file: bytes | None = key(_secret)
    cache: float = key(duration, "1s")
    scale_from_zero: bool = key(boolean, True)
    scale_timeout: float = key(positive, "60s")
    login = AuthConfig.login


@dataclass(frozen=True, kw_only=True)
class StoreConfig:  # [store]: where the queue lives
    backend: str = key(one_of("sqlite"), "sqlite")
    path: str | None = key(text)


@dataclass(frozen=True, kw_only=True)
class QueueConfig:  # [queues.NAME]: concurrency, the time limit of a call, how much may wait, and who is next
    max_inflight: int = key(count, 1)
    timeout: float = key(positive, "5m")
    max_pending: int = key(count, 100_000)
    fair: bool = key(boolean, True)
    adaptive: bool = key(boolean, False)
    ack_wait: float = key(positive, "60s")  # leases: of no effect on the embedded queue, whose process owns its claims


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:  # [retry] and [functions.NAME.retry]: the defaults are those that OpenFaaS Pro documents
    attempts: int = key(count, 10)
    codes: frozenset[int] = key(http_codes, [408, 429, 500, 502, 503, 504])
    min_wait: float = key(duration, "10s")
    max_wait: float = key(duration, "120s")
    backoff: str = key(one_of("exponential", "full", "equal"), "exponential")


@dataclass(frozen=True, kw_only=True)
class CallbackConfig:  # [callback]: how outcomes are delivered, and where to
    timeout: float = key(positive, "30s")
    attempts: int = key(count, 10)
    min_wait: float = key(duration, "5s")
    max_wait: float = key(duration, "1h")
    max_inflight: int = key(count, 16)
    allow: tuple[str, ...] = key(patterns, [])
    deny: tuple[str, ...] = key(patterns, [])
    gateway_hosts: Sequence[str] = key(patterns, ["gateway", "gateway.openfaas", "gateway.openfaas.svc.cluster.local"])
    signing_secret_file: bytes | None = key(_signing_secret)
    tls_ca_file: str | None = key(text)
    # Not keys, but as in RetryPolicy: any other answer than these and 2xx is final.
    codes: frozenset[int] = frozenset((408, 429, *range(500, 600)))
    backoff: str = "exponential"


@dataclass(frozen=True, kw_only=True)
class CallsConfig:  # [calls]: how long a final record is kept, and how much of its output
    keep: float = key(positive, "24h")
    keep_output: int = key(size, "64KiB")


@dataclass(frozen=True, kw_only=True)
class LogConfig:  # [log]: what goes to standard error
    level: str = key(one_of("debug", "info", "warning", "error"), "info")
    format: str = key(one_of("text", "json"), "text")
    write_debug: bool = key(boolean, False)


@dataclass(frozen=True, kw_only=True)
class Function:  # [functions.NAME]: an HTTP server (`url`) or a program that is started for each request (`command`)
    name: str
    namespace: str
    url: yarl.URL | None = key(url)
    command: tuple[str, ...] | None = key(command)
    exec_timeout: float | None = key(positive)
    queue: str = key(text)
    type: str = key(one_of("sync", "async"), "sync")
    max_inflight: int | None = key(count)
    annotations: Mapping[str, str] = key(string_table, {})
    labels: Mapping[str, str] = key(string_table, {})
    env: Mapping[str, str] = key(string_table, {})
    retry: RetryPolicy = key(table, {})  # as it stands in the file until `read_function` has laid it over the others
    replicas: int | None = None  # that the provider has of it; None: it is not the provider's
    key = functools.cached_property(lambda self: f"{self.name}.{self.namespace}")


@dataclass(frozen=True, kw_only=True)
class Config:  # the whole file, checked; immutable: a reload makes a new one
    gateway: GatewayConfig = GatewayConfig()
    auth: AuthConfig = AuthConfig()
    provider: ProviderConfig = ProviderConfig()
    store: StoreConfig = StoreConfig()
    retry: RetryPolicy = RetryPolicy()
    callback: CallbackConfig = CallbackConfig()
    calls: CallsConfig = CallsConfig()
    log: LogConfig = LogConfig()
    queues: Mapping[str, QueueConfig] = key(table, {})
    functions: Mapping[str, Function] = key(table, {})
    limits = functools.cached_property(lambda c: {f.key: n for f in c.functions.values() if (n := f.max_inflight)})

    def queue(self, name: str) -> QueueConfig:
        """The settings of a queue; one that is only named somewhere has the defaults."""
        return self.queues.get(name) or QueueConfig()


Login = AuthConfig | ProviderConfig
Settings = Callable[[], Config]  # as they stand now: a reload changes them
Policy = RetryPolicy | CallbackConfig  # when what failed is tried again
# What is wrong with a table whose keys are right by themselves.
CONFLICTS: tuple[tuple[Any, Callable[[Any], object], str], ...] = (
    (Login, lambda t: bool(t.user_file) != bool(t.password_file), "user_file needs password_file"),
    (Login, lambda t: b":" in (t.user_file or b""), "a user's name has no colon (RFC 7617)"),
    (AuthConfig, lambda t: t.invoke and t.user_file is None, "invoke needs user_file and password_file"),
    (Policy, lambda t: t.min_wait > t.max_wait, "min_wait is longer than max_wait"),
    (Function, lambda t: (t.url is None) == (t.command is None), "set either url or command"),
    (Function, lambda t: t.url and (t.exec_timeout or t.env), "exec_timeout and env are for a command"),
)
ANNOTATIONS: Mapping[str, Callable[[str], Any]] = {
    "queue": expect("a queue's name", lambda value: need(value, _NAME.fullmatch(value))),
    "retry.codes": lambda value: http_codes([_whole(code.strip()) for code in value.split(",")]),
    **dict.fromkeys(("max_inflight", "retry.attempts"), number),
    **dict.fromkeys(("retry.min_wait", "retry.max_wait"), duration),
}
warn_once = functools.cache(log.warning)  # of what is looked at again and again


def read_table(base: Any, raw: Any, where: str, problems: list[str]) -> Any:
    """`base` with a table of the file laid over it (and with the tables in that over its own). `where` is the table's
    name; what is wrong goes to `problems`, a line for each thing."""
    if not isinstance(raw, dict):
        problems.append(f"{where}: expected a table")
        return base
    known = {f.name: f.metadata.get("parse") for f in fields(base) if f.metadata or is_dataclass(f.default)}
    values, found = dict[str, Any](), len(problems)
    for name, value in raw.items():
        place = f"{where}.{name}" if where else name
        try:
            if name not in known:
                hint = "".join(f" (did you mean {close}?)" for close in difflib.get_close_matches(name, known, 1))
                raise ValueError(f"unknown {'key' if where else 'table'}{hint}")
            parse = known[name]
            values[name] = parse(value) if parse else read_table(getattr(base, name), value, place, problems)
        except ValueError as exc:
            problems.append(f"{place}: {exc}")
    made = replace(base, **values)
    if len(problems) == found:
        problems += [f"{where}: {text}" for cls, wrong, text in CONFLICTS if isinstance(made, cls) and wrong(made)]
    return made


def annotated(function: Function, retry: RetryPolicy) -> Function:
    """The function with its annotations laid over `retry` and under its own keys; invalid ones give one warning."""
    values: dict[str, Any] = {"queue": DEFAULT_QUEUE}
    for name, read in ANNOTATIONS.items():
        try:
            if (value := function.annotations.get(f"com.openfaas.{name}")) is not None:
                values[name] = read(value)
        except ValueError as exc:
            warn_once(f"functions.{function.name}: annotation com.openfaas.{name} = {value!r} ignored: {exc}")
    waits = {name[6:]: values.pop(name) for name in list(values) if name.startswith("retry.")}
    keys = {name: getattr(function, name) or value for name, value in values.items()}
    return replace(function, retry=replace(retry, **waits), **keys)


def read_function(name: str, raw: Any, config: Config, problems: list[str]) -> Function:
    """A function from its table. Its retry policy lies over that of its annotations, which lies over [retry]."""
    where = f"functions.{name}"
    given: Function = read_table(Function(name=name, namespace=config.gateway.namespace), raw, where, problems)
    function = annotated(given, config.retry)
    return replace(function, retry=read_table(function.retry, given.retry, f"{where}.retry", problems))


def parse_config(raw: Mapping[str, Any]) -> Config:
    """The configuration in a parsed TOML file. Raises ConfigError with every problem, each naming its key."""
    problems: list[str] = []
    config: Config = read_table(Config(), raw, "", problems)  # its queues and functions as they stand in the file
    functions = {name: read_function(name, keys, config, problems) for name, keys in config.functions.items()}
    # A queue that a function only names exists, with the defaults.
    queues = {**{f.queue: QueueConfig() for f in functions.values()}, DEFAULT_QUEUE: QueueConfig(max_inflight=4)}
    for name, keys in config.queues.items():
        queues[name] = read_table(queues.get(name, QueueConfig()), keys, f"queues.{name}", problems)
    names = {f"functions.{f.name}.queue": f.queue for f in functions.values()}
    names |= {f"queues.{name}": name for name in config.queues} | {f"functions.{name}": name for name in functions}
    rule = "a name has letters, digits, dashes and underscores, and no dot"
    problems += [f"{where}: {rule}" for where, name in names.items() if not _NAME.fullmatch(name)]
    if problems:
        raise ConfigError(problems)
    return replace(config, queues=queues, functions=functions)


def load_config(path: str | None) -> Config:
    """Read and check a TOML file (None: all defaults). Raises ConfigError; each line starts with the file's name."""
    try:
        return parse_config({} if path is None else tomllib.loads(Path(path).read_text("utf-8")))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, ConfigError) as exc:
        reason = getattr(exc, "strerror", f"not valid TOML: {exc}")
        raise ConfigError([f"{path}: {problem}" for problem in getattr(exc, "problems", [reason])]) from None


def store_path(config: Config) -> Path:
    """Where the queue's file is: the key, else systemd's state directory, else the user's."""
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    state = os.environ.get("STATE_DIRECTORY", "").split(":")[0] or f"{home}/faasd-async"
    return Path(os.path.expandvars(config.store.path or f"{state}/faasd-async.db")).expanduser()


# --- Domain data ----------------------------------------------------------------------------------------------------
# named tuples, because they are made thousands of times a second and go straight into SQL


class Invocation(NamedTuple):
    """An async call as the gateway accepted it. `id` is unique; `call_id` is the caller's, calls may share it."""

    id: str
    call_id: str
    function: str
    namespace: str
    queue: str
    start_time: int
    due_at: float
    deadline_at: float | None
    max_attempts: int
    callback_url: str | None
    failure_url: str | None
    idempotency_key: str | None
    app: str | None  # Fn's app, a label
    target: str  # what followed the function's name: path and query, as sent
    headers: bytes
    body: bytes


class Claim(NamedTuple):
    """Work handed to a consumer, which owns it until it completes, retries or dies: a call of `queue`, or in the queue
    CALLBACKS the outcome of one. Calls of a lane are FIFO, lanes take turns."""

    token: int  # the queue's own handle
    fence: int  # tells this claim from others of the same call
    id: str  # unique, where the call id may not be
    call_id: str
    function: str
    queue: str
    lane: str  # of a call its function's key; of a callback its host, so that a dead one doesn't hold up the others
    attempt: int  # number of this run, or of this delivery
    runs: int  # how often the function has run, this attempt included
    max_attempts: int
    start_time: int
    callback_url: str | None
    failure_url: str | None
    http_status: int | None  # what the function answered last
    duration_s: float | None
    target: str  # path and query for the function, or the callback's URL
    headers: bytes  # of the request, or of the function's answer
    body: bytes


class Outcome(NamedTuple):
    """What one attempt gave: an answer, or the HTTP status that stands for its absence (502, 504) and the reason."""

    status: int
    ok: bool
    duration_s: float
    headers: Headers = ()
    body: bytes = b""
    size: int = 0  # of the whole body, also where only its beginning is kept
    stderr: bytes = b""
    error: str | None = None
    answered: bool = True

    def header(self, name: bytes) -> str | None:
        """The first value of a response header, by its lower-case name."""
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == name), None)


class Verdict(NamedTuple):
    """What follows from an outcome: a final status, or (`delay_s`) another attempt after that time."""

    status: str
    delay_s: float | None = None


class Ended(NamedTuple):
    """A call that reached its final state, as the log tells it."""

    call_id: str
    function: str
    status: str
    attempts: int
    duration: float | None = None
    http_status: int | None = None
    error: str | None = None


class QueueStats(NamedTuple):
    """One queue as it stands: calls waiting (delayed ones too) by lane, and the due time of the oldest."""

    waiting: Mapping[str, int]
    oldest_at: float  # infinity: nothing waits
    paused: bool


def new_id() -> str:
    """A UUIDv7 (RFC 9562 5.7): ordered by time, so that an index of them only ever grows at its end."""
    stamp, noise = f"{time.time_ns() // 1_000_000:012x}", next(NOISE)
    return f"{stamp[:8]}-{stamp[8:]}-7{noise[:3]}-{'89ab'[int(noise[3], 16) & 3]}{noise[4:7]}-{noise[7:19]}"


def pack_headers(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Header lines as one blob, as they would stand on the wire."""
    return b"".join([name + b": " + value + b"\n" for name, value in headers])


def unpack_headers(blob: bytes | None) -> Headers:
    """The inverse of `pack_headers`."""
    return tuple(re.findall(rb"([^:]*): (.*)\n", blob or b""))


def rfc3339(at: float | None) -> str | None:
    """A Unix time as RFC 3339 in UTC, with microseconds and Z."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds")[:-6] + "Z"


# --- Policy: pure rules ---------------------------------------------------------------------------------------------


def backoff_s(policy: Policy, attempt: int, rng: random.Random) -> float:
    """Seconds to wait after the failed `attempt` (from 1): min_wait doubled each time, at most max_wait. "full" and
    "equal" jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/."""
    wait = min(policy.max_wait, policy.min_wait * 2.0 ** min(attempt - 1, 60))
    if policy.backoff == "full":
        return rng.uniform(0, wait)
    return rng.uniform(wait / 2, wait) if policy.backoff == "equal" else wait


def retry_after_s(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for, in either form of RFC 9110 10.2.3; None where it says nothing."""
    value = value or ""
    if re.fullmatch(r"\s*[0-9]{1,12}\s*", value):
        return min(float(value), MAX_RETRY_AFTER_S)
    with contextlib.suppress(ValueError, OverflowError):
        at = email.utils.parsedate_to_datetime(value).replace(tzinfo=UTC).timestamp()  # RFC 9110 5.6.7: always in GMT
        return min(max(0.0, at - now), MAX_RETRY_AFTER_S)
    return None


def decide(outcome: Outcome, attempt: int, most: int, policy: Policy, now: float, rng: random.Random) -> Verdict:
    """What follows from the outcome of attempt number `attempt`. A failure whose status is one of `policy.codes`, or
    which OpenFaaS's own parts answered, is tried again until `most` attempts are used up; a refused connection counts
    as 502, a timeout as 504. Retry-After on 429 and 503 replaces the wait, never below min_wait."""
    if outcome.ok:
        return Verdict("success")
    internal = outcome.header(b"x-openfaas-internal") is not None  # not the function's answer, but OpenFaaS's own
    if not (internal or outcome.status in policy.codes) or attempt >= most:
        return Verdict("timeout" if outcome.status == 504 and not outcome.answered else "error")
    asked = retry_after_s(outcome.header(b"retry-after"), now) if outcome.status in (429, 503) else None
    return Verdict("queued", backoff_s(policy, attempt, rng) if asked is None else max(asked, policy.min_wait))


def callback_target(status: str, callback_url: str | None, failure_url: str | None) -> str | None:
    """Where an outcome is told: failures go to X-Failure-Callback-Url when there is one."""
    return failure_url if failure_url and status in ("error", "timeout") else callback_url


def parse_when(value: str) -> float:
    """Unix time from RFC 3339 (with an offset or Z) or Unix seconds."""
    with contextlib.suppress(ValueError, OverflowError):
        if re.fullmatch(r"[0-9]{1,11}(\.[0-9]*)?", value):
            return min(float(value), END_OF_TIME)
        if (moment := datetime.fromisoformat(value)).tzinfo is not None:
            return min(moment.timestamp(), END_OF_TIME)
    raise ValueError(f"expected {TIME_FORM}")


def show_url(value: str | None) -> str | None:
    """A URL without the credentials it may carry."""
    return None if value is None else re.sub(r"^(\w+://)[^/?#]*@", r"\1", value)


def _listed(names: Iterable[str], listed: Sequence[str]) -> bool:
    for name, pattern in ((name, pattern) for name in names for pattern in listed):
        if name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:])):
            return True
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(name) in ipaddress.ip_network(pattern, strict=False):
                return True
    return False


@functools.lru_cache(1024)
def callback_allowed(host: str, address: str | None, config: CallbackConfig) -> bool:
    """Whether a callback may go to this host, at this address once that is known: a list of networks can't deny a name
    before. With `allow`, nothing else; link-local addresses (cloud metadata) only if `allow` has the address."""
    names, literal = [host.lower().rstrip(".")], None
    with contextlib.suppress(ValueError):
        literal = ipaddress.ip_address((address or host).partition("%")[0])
        literal = getattr(literal, "ipv4_mapped", None) or literal
        names.append(str(literal))
    if _listed(names, config.deny):
        return False
    if literal is not None and literal.is_link_local:
        return _listed(names[1:], config.allow)
    undecided = literal is None and any(re.search(r"/|:|^[0-9.]+$", pattern) for pattern in config.allow)
    return not config.allow or undecided or _listed(names, config.allow)


def via(target: str) -> str:
    """A Via header (RFC 9110 7.6.3) for what goes to the provider. For a function without replicas faasd calls port
    8080 of its own host, with this path: that is how a gateway there recognizes its own request."""
    return f"1.1 faasd-async-{zlib.crc32(target.lstrip('/').encode('utf-8', 'surrogateescape')):08x}"


def split_target(target: str) -> tuple[str, str]:
    """The first segment of what follows the route, and the rest (path and query) byte for byte."""
    first = re.split("[/?]", target, maxsplit=1)[0]
    return first, target[len(first) :]


def forward_headers(headers: Iterable[tuple[bytes, bytes]], drop: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    """The end-to-end headers: neither hop-by-hop, nor named by Connection, nor one of `drop`."""
    kept, named = [], frozenset[bytes]()
    for item in headers:
        name = item[0].lower()
        if name == b"connection":
            named |= {part.strip().lower() for part in item[1].split(b",")}
        elif name not in drop and name not in HOP_BY_HOP:
            kept.append(item)
    return [item for item in kept if item[0].lower() not in named] if named else kept


# --- Logging, metrics, sd_notify ------------------------------------------------------------------------------------


class LogFormatter(logging.Formatter):
    """Text or JSON lines. In text, what goes to the journal has a priority such as "<6>" and leaves the time to it."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self._json, status = style == "json", os.fstat(2)
        self._journal = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"

    def format(self, record: logging.LogRecord) -> str:
        given: dict[str, Any] = getattr(record, "fields", {})
        message = record.getMessage() + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")
        if self._json:
            line = {"time": rfc3339(record.created), "level": record.levelname.lower(), "message": message, **given}
            return json.dumps(line, ensure_ascii=False, default=str)
        shown = [f"{name}={self._quoted(value)}" for name, value in given.items() if value is not None]
        priority = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}[record.levelname]
        head = f"<{priority}>" if self._journal else f"{rfc3339(record.created)} "
        return head + " ".join([record.levelname, message, *shown])

    def _quoted(self, value: object) -> str:
        shown = f"{value:.6f}" if isinstance(value, float) else str(value)
        return shown if re.fullmatch(r"[^\s\"=]+", shown) else json.dumps(shown)


def setup_logging(config: LogConfig) -> None:
    """Send the log to standard error in the configured form. Called again on reload."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(config.format))
    log.handlers, log.propagate = [handler], False
    # https://docs.python.org/3/howto/logging.html#optimization: nobody reads these
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    log.setLevel(config.level.upper())


def log_with(level: int, message: str, **fields: Any) -> None:
    """A log line with fields; those that are None are left out."""
    if log.isEnabledFor(level):
        log.log(level, message, extra={"fields": fields})


def log_bodies(config: LogConfig, call_id: str, **bodies: bytes) -> None:
    """With `write_debug`: bodies in the log, escaped and cut at 4 KiB."""
    if config.write_debug:
        shown = {name: repr(body[: 4 * KIB])[2:-1] for name, body in bodies.items()}
        log_with(logging.INFO, "bodies", call_id=call_id, **shown)


class Metrics:
    """Counters and gauges under OpenFaaS's names, so that its dashboards work. Labels are names of known functions."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
        counter, gauge, histogram = prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram

        def metric(kind: Any, name: str, what: str, *labels: str, **more: Any) -> Any:
            made = kind(name, what, labels, registry=registry, **more)
            # Looking a label up costs more than counting: keep what was looked up.
            return functools.cache(made.labels) if labels else made

        by_code, by_lane = ("function_name", "code"), ("queue_name", "function_name")
        calls_s = (0.005, 0.025, 0.1, 0.5, 1, 5, 10, 60, 300, 3600)
        commits_s = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
        # A gauge, because the library would append _total to a counter's name and OpenFaaS has none there.
        self.started = metric(gauge, "gateway_function_invocation_started", "Function calls started.", "function_name")
        self.ended = metric(counter, "gateway_function_invocation", "Function calls that ended.", *by_code)
        self.seconds = metric(histogram, "gateway_functions_seconds", "What calls took.", *by_code, buckets=calls_s)
        self.running = metric(gauge, "queue_worker_function_invocation_inflight", "Attempts running.", *by_lane)
        self.submitted = metric(counter, "queue_worker_messages_submitted", "Calls accepted.", "queue_name")
        self.processed = metric(counter, "queue_worker_messages_processed", "Attempts that ended.", "queue_name")
        self.retries = metric(counter, "faasd_async_retries", "Attempts that led to another.")
        self.calls = metric(counter, "faasd_async_calls", "Calls that reached a final state.", "status")
        self.callbacks = metric(counter, "faasd_async_callbacks", "Callbacks that reached a final state.", "status")
        self.commits = metric(histogram, "faasd_async_commit_seconds", "What durable commits took.", buckets=commits_s)
        self.invocations = Counter[str]()  # as `started`, for OpenFaaS's REST API

    @contextlib.contextmanager
    def counted(self, function: str) -> Iterator[list[int]]:
        """Count a function call that runs in this block, which puts the status into the list."""
        self.started(function).inc()
        self.invocations[function] += 1
        started, status = time.perf_counter(), [499]  # 499: nginx's code for a caller that went away
        try:
            yield status
        finally:
            self.ended(function, status[-1]).inc()
            self.seconds(function, status[-1]).observe(time.perf_counter() - started)


def sd_notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); does nothing where no one listens."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
            except OSError as exc:
                log.warning("systemd could not be notified: %s", exc)


# --- Queue protocol -------------------------------------------------------------------------------------------------


class RecordQuery(NamedTuple):
    """Which records to list: those that match all that is given, older than the `cursor`."""

    status: str | None = None
    function: str | None = None
    queue: str | None = None
    call_id: str | None = None
    app: str | None = None
    limit: int = 100
    cursor: int | None = None


class Queue(Protocol):
    """The seam. What a method did is durable when it returns; it raises StoreError when nothing was done.

    A call is queued, claimed (running) and completed, or retried and so queued again. A completed call whose outcome
    has to be told becomes work of the queue CALLBACKS, in the same commit. No claim is ever lost: it is completed,
    retried, or its process ends and the next `open` queues it again, `interrupted` counted and the attempt charged.
    """

    async def open(self, wake: Tell[str], stop: Tell[int], final: Tell[Ended]) -> None:
        """Recover what a dead process left. On the event loop, `wake(queue)` tells that a queue may have due work that
        the last claim did not return, `stop(token)` that claimed work was cancelled, `final` of a call's end."""

    async def close(self) -> None:
        """Finish what was begun; afterwards another process can open the queue."""

    def enqueue(self, call: Invocation) -> Awaitable[str]:
        """Store a call and return the call id to answer with: its own, or that of the call which took the same
        idempotency key first. Idempotent on `call.id`. Raises Refused: 429 the queue is full, 422 a reused key."""

    def claim(self, queue: str, limit: int, room: Mapping[str, int]) -> Awaitable[Sequence[Claim]]:
        """Up to `limit` due items, charged with an attempt, at most `room[lane]` of a lane (`room[""]` of one without
        an entry). When it returns fewer, `wake` tells when to ask again, but not when `room` is the reason."""

    def complete(self, work: Claim, outcome: Outcome, status: str) -> Awaitable[bool]:
        """Make the call (or its callback: "delivered", "failed") final. False, and nothing done: it was cancelled."""

    def retry(self, work: Claim, outcome: Outcome | None, delay_s: float) -> Awaitable[bool]:
        """Queue it again, due in `delay_s`. With `outcome` the attempt stays charged and the record shows why; without,
        the attempt never happened. False as for `complete`."""

    def lookup(self, call_id: str) -> Awaitable[dict[str, Any]]:
        """The newest record with this id. This and what follows raises Refused(404) for an unknown one."""

    def records(self, query: RecordQuery) -> Awaitable[tuple[list[dict[str, Any]], int | None]]:
        """Records, newest first; with them the cursor for more, if there may be."""

    def output(self, call_id: str) -> Awaitable[tuple[bytes, bytes]]:
        """Body and stderr of the newest call's last attempt."""

    def cancel(self, call_id: str) -> Awaitable[int]:
        """Cancel all calls and pending callbacks with this id that are not final; how many. None: Refused(409)."""

    def redrive(self, call_id: str) -> Awaitable[None]:
        """Queue a final call again with its stored request, as if new. Raises Refused: 409, 410."""

    def purge(self, queue: str) -> Awaitable[int]:
        """Cancel all waiting calls of a queue; how many."""

    def pause(self, queue: str, paused: bool) -> Awaitable[None]:
        """Hand out no more work of a queue, or do again. Survives a restart."""

    def stats(self) -> Awaitable[dict[str, QueueStats]]:
        """All queues that have waiting calls or are paused."""

    def prune(self) -> Awaitable[int]:
        """Delete one small batch of records past their time and give room back; how many. 0: there was little to do."""

    def stalled(self) -> str | None:
        """Why the queue does not answer, or needs a restart; or None. Never blocks."""

    async def failing(self) -> str | None:
        """Why nothing can be stored, or None. When the last attempt to store something failed, it makes another."""


# --- SQLite queue ---------------------------------------------------------------------------------------------------
# Lanes (who is next) · SqliteFile (connection, recovery) · steps (each a part of a transaction) ·
# SqliteQueue (the seam, and the writer's thread with its group commit)


class Lanes:
    """Which lane of one queue is served next, in O(log lanes) whatever the backlog. A lane waits in `later` until the
    first of its calls is due, and then gets its turn in `ready` (fair) or is served from there (not fair). Calls are
    on disk; a lane's time here is a lower bound: whoever finds nothing due puts the lane back with the true one."""

    def __init__(self) -> None:
        self.waiting: Counter[str] = Counter()
        self.total = 0
        self.later: list[tuple[float, str]] = []
        self.ready: OrderedDict[str, None] = OrderedDict()
        self._due: dict[str, float] = {}  # lane: its time in `later`; an entry there that differs is stale

    def add(self, lane: str, due_at: float, number: int = 1) -> None:
        """Count calls in, the first of them due at `due_at`."""
        self.waiting[lane] += number
        self.total += number
        self.put(lane, due_at)

    def put(self, lane: str, due_at: float) -> None:
        """Line a lane up, unless it stands further ahead already."""
        if lane not in self.ready and due_at < self._due.get(lane, float("inf")):
            self._due[lane] = due_at
            heapq.heappush(self.later, (due_at, lane))

    def remove(self, lane: str, number: int) -> int:
        """Count calls out; how many are left."""
        self.total -= number
        left = self.waiting[lane] = self.waiting[lane] - number
        if left <= 0:
            del self.waiting[lane]
            self._due.pop(lane, None)
            self.ready.pop(lane, None)
        return left

    def next(self, now: float, fair: bool) -> str | None:
        """Take the next lane with a due call out of the line."""
        while self.ready and not fair:  # a reload: line up anew
            self.put(self.ready.popitem()[0], 0.0)
        while self.next_at() <= now:
            due_at, lane = heapq.heappop(self.later)
            if self._due.get(lane) == due_at:
                del self._due[lane]
                if not fair:
                    return lane
                self.ready[lane] = None
        return self.ready.popitem(last=False)[0] if self.ready else None

    def next_at(self) -> float:
        """When the first of the lanes in `later` becomes due, or earlier."""
        return self.later[0][0] if self.later else float("inf")


SCHEMA_VERSION = 2
MIGRATIONS = {1: "ALTER TABLE calls ADD COLUMN app TEXT;"}  # from this version to the next
SCHEMA = """
CREATE TABLE calls (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,      -- a UUIDv7, so this index only grows at its end
    call_id TEXT,                 -- the caller's own X-Call-Id; NULL: the id is the call id
    function TEXT NOT NULL, namespace TEXT NOT NULL, queue TEXT NOT NULL,
    status TEXT NOT NULL,         -- queued, running or final; "delayed" is a queued call that is not due
    work TEXT, lane TEXT,         -- what is to be done: in which queue (or '@callbacks') and lane; NULL: nothing
    due_at REAL,                  -- when; NULL while claimed
    claims INTEGER NOT NULL DEFAULT 0,  -- how often it was handed out: a claim from before can't end it
    attempts INTEGER NOT NULL DEFAULT 0, max_attempts INTEGER NOT NULL, interrupted INTEGER NOT NULL DEFAULT 0,
    start_time INTEGER NOT NULL,  -- nanoseconds: X-Start-Time
    deadline_at REAL,             -- NULL once an attempt was charged
    started_at REAL, completed_at REAL, duration REAL, http_status INTEGER, error TEXT,
    request_bytes INTEGER NOT NULL, response_bytes INTEGER,
    callback_url TEXT, failure_url TEXT,
    callback_status TEXT NOT NULL DEFAULT 'none', callback_attempts INTEGER NOT NULL DEFAULT 0,
    callback_http_status INTEGER, callback_error TEXT,
    idempotency_key TEXT, digest BLOB, app TEXT
);
CREATE INDEX calls_work ON calls (work, lane, due_at) WHERE work IS NOT NULL;
CREATE INDEX calls_call_id ON calls (call_id) WHERE call_id IS NOT NULL;
CREATE INDEX calls_completed ON calls (completed_at) WHERE completed_at IS NOT NULL;
CREATE INDEX calls_deadline ON calls (deadline_at) WHERE deadline_at IS NOT NULL;
CREATE UNIQUE INDEX calls_key ON calls (function, namespace, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE TABLE requests (seq INTEGER PRIMARY KEY, target TEXT NOT NULL, headers BLOB NOT NULL, body BLOB NOT NULL);
CREATE TABLE outputs (seq INTEGER PRIMARY KEY, headers BLOB, body BLOB NOT NULL, stderr BLOB NOT NULL);
CREATE TABLE queues (name TEXT PRIMARY KEY, paused INTEGER NOT NULL);
"""
BY_ID = "FROM calls WHERE id = :id OR call_id = :id ORDER BY seq DESC"
CANCELLED = "SELECT seq, coalesce(call_id, id), function, attempts, status, work, lane, due_at"


class SqliteFile:
    """The connection, and what is derived from the file in memory. Once open, used by the writer's thread only. The
    steps below change both inside a transaction; when that fails, the next one begins with a `rebuild`."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings, self.suspect, self.damaged = path, settings, False, False
        self.news: list[tuple[str, Any]] = []  # what to tell whom (see Queue.open) after the commit

    def open(self) -> None:
        """Open or create the file, recover what a dead process left. Raises StoreError, StoreLocked."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._connect()
            except sqlite3.DatabaseError as exc:
                if isinstance(exc, sqlite3.OperationalError):
                    raise
                self._set_aside(exc)
                self._connect()
        except (OSError, sqlite3.Error) as exc:
            if "locked" in str(exc):
                raise StoreLocked(f"{self.path} is in use by another process: one daemon per file") from exc
            hint = "" if os.access(self.path.parent, os.W_OK) else " (no right to write there, or read-only)"
            raise StoreError(f"{self.path}: {exc}{hint}") from exc

    def _connect(self) -> None:
        self.db = db = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            # One process per file, the lock held as long as it lives; also keeps the WAL index out of shared memory.
            for pragma in ("locking_mode = EXCLUSIVE", "auto_vacuum = INCREMENTAL", "journal_mode = WAL",
                "synchronous = FULL", "wal_autocheckpoint = 4000", "journal_size_limit = 67108864"):  # fmt: skip
                db.execute(f"PRAGMA {pragma}")
            for name, wanted in (("journal_mode", "wal"), ("synchronous", 2)):
                if (found := db.execute(f"PRAGMA {name}").fetchone()[0]) != wanted:
                    raise StoreError(f"{self.path}: {name} is {found}, not {wanted}: no durable commits here")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise StoreError(f"{self.path}: written by a newer version (schema {version}): update this program")
            steps = [MIGRATIONS[old] for old in range(version, SCHEMA_VERSION)] if version else [SCHEMA]
            if version and steps:
                copy = self.path.with_name(f"{self.path.name}.schema-{version}")
                copy.unlink(missing_ok=True)
                db.execute("VACUUM INTO ?", (str(copy),))
                log.warning("%s: schema %d becomes %d; the old file is %s", self.path, version, SCHEMA_VERSION, copy)
            if steps:
                db.executescript(f"BEGIN IMMEDIATE; {''.join(steps)} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
            # What was claimed is interrupted, and goes first.
            sql = """UPDATE calls SET due_at = min(?, start_time / 1e9), status = iif(status = 'running', 'queued',
                status), interrupted = interrupted + (work <> ?), deadline_at = NULL
                WHERE work IS NOT NULL AND due_at IS NULL"""
            if number := db.execute(sql, (time.time(), CALLBACKS)).rowcount:
                log.warning("%d interrupted attempts of the previous process are queued again", number)
            self.rebuild()
        except BaseException:
            db.close()
            raise

    def _set_aside(self, exc: sqlite3.Error) -> None:
        """Keep a damaged file under another name, for somebody to look at."""
        aside = f"{self.path.name}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}"
        for suffix in ("", "-wal", "-shm", "-damaged"):
            with contextlib.suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).rename(self.path.with_name(aside + suffix))
        log.error("%s is damaged (%s): kept as %s, starting with an empty queue", self.path, exc, aside)

    def rebuild(self) -> None:
        """Derive what is in memory from the file. What waits for a time that is only ahead because the clock was set
        back has been due before: calls that nobody delayed, attempts and callbacks that follow what has been."""
        mark = self.path.with_name(f"{self.path.name}-damaged")  # for the next start, which may not notice
        if self.suspect:
            found = str(self.db.execute("PRAGMA integrity_check(1)").fetchone()[0])
            if found != "ok" and "unable to get" not in found:  # that is a disk which can't be read for now
                mark.touch()
        self.damaged = mark.exists()
        if self.damaged:
            raise sqlite3.DatabaseError(DAMAGED)
        sql = """UPDATE calls SET due_at = :now WHERE work IS NOT NULL AND due_at > :now
            AND (due_at <= start_time / 1e9 OR started_at > :now OR completed_at > :now)"""
        self.db.execute(sql, {"now": time.time()})
        self.lanes: defaultdict[str, Lanes] = defaultdict(Lanes)  # by queue
        self.wake_at: dict[str, float] = {}  # when to tell of a queue's due work, if no claim has taken it before
        self.paused = {name for (name,) in self.db.execute("SELECT name FROM queues WHERE paused")}
        sql = "SELECT work, lane, min(due_at), count(due_at) n FROM calls WHERE work NOT NULL GROUP BY 1, 2 HAVING n"
        for row in self.db.execute(sql).fetchall():
            self.add(*row)
        self.seq: int = self.db.execute("SELECT coalesce(max(seq), 0) FROM calls").fetchone()[0]
        self.find_deadline()
        self.stale = self.suspect = False

    def add(self, work: str, lane: str, due_at: float, number: int = 1) -> None:
        """Count calls that wait, and have their queue told when they are due."""
        self.lanes[work].add(lane, due_at, number)
        self.wake_at[work] = min(due_at, self.wake_at.get(work, due_at))

    def head(self, work: str, lane: str) -> float:
        """When the first waiting call of a lane is due."""
        sql = "SELECT min(due_at) FROM calls WHERE work = ? AND lane = ? AND due_at IS NOT NULL"
        return float(self.db.execute(sql, (work, lane)).fetchone()[0])

    def find_deadline(self) -> None:
        """Look up the earliest deadline."""
        sql = """SELECT coalesce(min(deadline_at), 9e999) FROM calls
            WHERE deadline_at IS NOT NULL AND due_at IS NOT NULL"""
        self.deadline_at: float = self.db.execute(sql).fetchone()[0]

    def save_output(self, seq: int, outcome: Outcome, whole: bool) -> None:
        """Keep what an attempt gave: `whole` with its headers for the callback, else its beginning for people."""
        keep = None if whole else self.settings().calls.keep_output
        if whole or outcome.body or outcome.stderr:
            row = (seq, pack_headers(outcome.headers) if whole else None, outcome.body[:keep], outcome.stderr[:keep])
            self.db.execute("INSERT OR REPLACE INTO outputs (seq, headers, body, stderr) VALUES (?, ?, ?, ?)", row)
        else:
            self.db.execute("DELETE FROM outputs WHERE seq = ?", (seq,))

    def cut_output(self, seq: int) -> None:
        """Once the callback needs an answer no more, its beginning will do."""
        sql = "UPDATE outputs SET headers = NULL, body = substr(body, 1, :n) WHERE seq = :seq AND length(body) > :n"
        self.db.execute(sql, {"n": self.settings().calls.keep_output, "seq": seq})


def sql_enqueue(file: SqliteFile, call: Invocation) -> str | Refused:
    """Store a call; the call id to answer with, or a refusal."""
    db, queue, digest = file.db, call.queue, None
    if call.idempotency_key is not None:
        digest = hashlib.blake2b(call.body, digest_size=16).digest()
        sql = """SELECT coalesce(call_id, id), digest FROM calls
            WHERE function = ? AND namespace = ? AND idempotency_key = ?"""
        if taken := db.execute(sql, (call.function, call.namespace, call.idempotency_key)).fetchone():
            same = taken[1] == digest
            return str(taken[0]) if same else Refused(422, "Idempotency-Key: this key came before with another body")
    full = file.lanes[queue].total >= file.settings().queue(queue).max_pending
    if full and not db.execute("SELECT 1 FROM calls WHERE id = ?", (call.id,)).fetchone():
        return Refused(429, f"queue {queue} is full, try again later", LATER)
    own, lane = call.call_id if call.call_id != call.id else None, f"{call.function}.{call.namespace}"
    row = (file.seq + 1, call.id, own, call.function, call.namespace, queue, queue, lane, call.due_at,
        call.max_attempts, call.start_time, call.deadline_at, len(call.body), call.callback_url, call.failure_url,
        call.idempotency_key, digest, call.app)  # fmt: skip
    sql = """INSERT INTO calls (seq, id, call_id, function, namespace, queue, status, work, lane, due_at,
        max_attempts, start_time, deadline_at, request_bytes, callback_url, failure_url, idempotency_key, digest, app)
        VALUES (?, ?, ?, ?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING"""
    if db.execute(sql, row).rowcount:  # else it is stored already
        file.seq += 1
        sql = "INSERT INTO requests (seq, target, headers, body) VALUES (?, ?, ?, ?)"
        db.execute(sql, (file.seq, call.target, call.headers, call.body))
        file.add(queue, lane, call.due_at)
        if call.deadline_at is not None and call.deadline_at < file.deadline_at:
            file.find_deadline()
    return call.call_id


def sql_claim(file: SqliteFile, work: str, limit: int, room: Mapping[str, int]) -> list[Claim]:
    """Hand out due work of one queue, and have it told when more becomes due."""
    now = time.time()
    if file.deadline_at <= now:
        sql_expire(file)
        if file.deadline_at <= now:
            file.wake_at[work] = now  # there are more of them: others first
            return []
    lanes, claims, left, held = file.lanes[work], list[Claim](), dict(room), []
    fair = work == CALLBACKS or file.settings().queue(work).fair
    rest = "target, headers, body FROM calls LEFT JOIN requests"
    if work == CALLBACKS:
        rest = """iif(failure_url IS NULL OR status = 'success', callback_url, failure_url), coalesce(headers, x''),
            coalesce(body, x'') FROM calls LEFT JOIN outputs"""
    select = f"""SELECT seq, claims + 1, id, coalesce(call_id, id), function, work, lane,
        iif(work = queue, attempts, callback_attempts) + 1, attempts + (work = queue), max_attempts, start_time,
        callback_url, failure_url, http_status, duration, {rest} USING (seq)
        WHERE work = ? AND lane = ? AND due_at <= ? ORDER BY due_at, seq LIMIT ?"""
    mark = """UPDATE calls SET due_at = NULL, claims = claims + 1,
        attempts = attempts + (work = queue), callback_attempts = callback_attempts + (work <> queue),
        status = iif(work = queue, 'running', status), started_at = iif(work = queue, ?, started_at) WHERE seq = ?"""
    while work not in file.paused and len(claims) < limit and (lane := lanes.next(now, fair)) is not None:
        share = max(1, (limit - len(claims)) // (len(lanes.ready) + 1))
        until = now if fair else min(now, lanes.next_at())  # then it is another lane's turn
        free = left.get(lane, room.get("", limit + 1))  # more than there can be: no limit
        found = file.db.execute(select, (work, lane, until, min(share, free))).fetchall() if free > 0 else []
        file.db.executemany(mark, [(now, row[0]) for row in found])
        claims += [Claim(*row) for row in found]
        left[lane] = free - len(found)
        if (waiting := lanes.remove(lane, len(found))) and left[lane] <= 0:
            held.append(lane)
        elif waiting:
            lanes.put(lane, now if fair and len(found) == share else file.head(work, lane))
    next_at = lanes.next_at()
    file.wake_at[work] = next_at if next_at > now else float("inf")
    for lane in held:
        lanes.put(lane, file.head(work, lane))
    return claims


def finish(file: SqliteFile, ended: Ended, target: str | None, size: int | None, was: tuple[int, int, str]) -> bool:
    """Make a call final that `was` this claim (seq, claims, status), and have its outcome told to `target`."""
    now = time.time()
    host = target and urlsplit(target).netloc.rpartition("@")[2]  # callbacks to one host share a lane
    follow = ("pending", CALLBACKS, host, now) if host else ("none", None, None, None)
    row = (ended.status, ended.http_status, ended.error, now, ended.duration, size, *follow, *was)
    sql = """UPDATE calls SET status = ?, http_status = ?, error = ?, completed_at = ?, duration = ?,
        response_bytes = ?, callback_status = ?, work = ?, lane = ?, due_at = ?, deadline_at = NULL
        WHERE seq = ? AND claims = ? AND status = ?"""
    if file.db.execute(sql, row).rowcount == 0:
        return False
    if host:
        file.add(CALLBACKS, host, now)
    file.news.append(("final", ended))
    return True


def sql_complete(file: SqliteFile, work: Claim, outcome: Outcome, status: str) -> bool:
    """Make a call or its callback final."""
    if work.queue == CALLBACKS:
        row = (status, outcome.status if outcome.answered else None, outcome.error, work.token, work.fence)
        sql = """UPDATE calls SET callback_status = ?, callback_http_status = ?, callback_error = ?, work = NULL,
            lane = NULL, due_at = NULL WHERE seq = ? AND work = '@callbacks' AND claims = ?"""
        if file.db.execute(sql, row).rowcount == 0:
            return False
        file.cut_output(work.token)
        return True
    ended = Ended(work.call_id, work.function, status, work.attempt, outcome.duration_s, outcome.status, outcome.error)
    target = callback_target(status, work.callback_url, work.failure_url)
    if not finish(file, ended, target, outcome.size, (work.token, work.fence, "running")):
        return False
    file.save_output(work.token, outcome, whole=target is not None)
    if status == "success" and len(work.body) > file.settings().calls.keep_output:
        file.db.execute("DELETE FROM requests WHERE seq = ?", (work.token,))
    return True


def sql_retry(file: SqliteFile, work: Claim, outcome: Outcome | None, delay_s: float) -> bool:
    due_at, callback = time.time() + delay_s, work.queue == CALLBACKS
    code = outcome.status if outcome is not None and (outcome.answered or not callback) else None
    row = {**work._asdict(), "due": due_at, "free": outcome is None, "code": code, "error": outcome and outcome.error}
    sql = """UPDATE calls SET status = iif(status = 'running', 'queued', status), due_at = :due,
        deadline_at = iif(:free, deadline_at, NULL), {0}attempts = {0}attempts - :free,
        {0}http_status = iif(:free, {0}http_status, :code), {0}error = iif(:free, {0}error, :error)
        WHERE seq = :token AND work = :queue AND claims = :fence AND due_at IS NULL"""
    if file.db.execute(sql.format("callback_" if callback else ""), row).rowcount == 0:
        return False
    file.add(work.queue, work.lane, due_at)
    if outcome is None:
        file.find_deadline()
    elif not callback:
        file.save_output(work.token, outcome, whole=False)
    return True


def sql_records(file: SqliteFile, query: RecordQuery) -> tuple[list[dict[str, Any]], int | None]:
    """One window of records as the API shows them, newest first; with them the cursor for the next window."""
    before = query.cursor if query.cursor is not None else file.seq + 1
    floor = before - SCAN_WINDOW if query.call_id is None else 0
    inner = "(id = :call_id OR call_id = :call_id) AND" if query.call_id is not None else ""
    wanted = [name for name in ("status", "function", "queue", "app") if getattr(query, name) is not None]
    outer = " AND ".join(f"{name} = :{name}" for name in wanted) or "true"
    sql = f"""SELECT * FROM (SELECT coalesce(call_id, id) AS call_id, function, namespace, queue,
        iif(status = 'queued' AND due_at > :now, 'delayed', status) AS status, attempts, max_attempts,
        http_status, error, start_time / 1e9 AS created_at, started_at, completed_at,
        iif(status = 'queued', due_at, NULL) AS due_at, duration AS duration_seconds, interrupted,
        iif(failure_url IS NOT NULL AND status IN ('error', 'timeout'), failure_url, callback_url) AS callback_url,
        callback_status, callback_attempts, callback_http_status, callback_error, request_bytes, response_bytes, app,
        seq FROM calls WHERE {inner} seq < :before AND seq >= :floor) WHERE {outer} ORDER BY seq DESC LIMIT :limit"""
    cursor = file.db.execute(sql, {**query._asdict(), "before": before, "floor": floor, "now": time.time()})
    names = [column[0] for column in cursor.description]
    found: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in cursor]
    after = found[-1]["seq"] if len(found) == query.limit else floor
    for item in found:
        del item["seq"]
        if item["app"] is None:
            del item["app"]
        item |= {name: rfc3339(item[name]) for name in ("created_at", "started_at", "completed_at", "due_at")}
        told = {name: item.pop(f"callback_{name}") for name in ("url", "status", "attempts", "http_status", "error")}
        item["callback"] = told | {"url": show_url(told["url"])}
    return found, after if after > 1 else None


def sql_lookup(file: SqliteFile, call_id: str) -> dict[str, Any] | Refused:
    found, _ = sql_records(file, RecordQuery(call_id=call_id, limit=1))
    return found[0] if found else Refused(404, UNKNOWN)


def sql_output(file: SqliteFile, call_id: str) -> tuple[bytes, bytes] | Refused:
    sql = f"SELECT body, stderr FROM (SELECT seq {BY_ID} LIMIT 1) LEFT JOIN outputs USING (seq)"
    found = file.db.execute(sql, {"id": call_id}).fetchone()
    return (found[0] or b"", found[1] or b"") if found else Refused(404, UNKNOWN)


def sql_cancel(file: SqliteFile, call_id: str) -> int | Refused:
    rows = file.db.execute(f"{CANCELLED} {BY_ID}", {"id": call_id}).fetchall()
    if not rows:
        return Refused(404, UNKNOWN)
    return cancel_rows(file, [row for row in rows if row[5]]) or Refused(409, "the call has finished already")


def sql_purge(file: SqliteFile, queue: str) -> int:
    sql = f"{CANCELLED} FROM calls WHERE work = ? AND due_at IS NOT NULL LIMIT {BATCH}"
    return cancel_rows(file, file.db.execute(sql, (queue,)).fetchall())


def cancel_rows(file: SqliteFile, rows: list[tuple[Any, ...]]) -> int:
    """Take away what is to be done; claimed work is stopped after the commit."""
    end = "work = NULL, lane = NULL, due_at = NULL, deadline_at = NULL WHERE seq = ?"
    for seq, call_id, function, attempts, status, work, lane, due_at in rows:
        if status in FINAL:  # only its callback was left
            file.db.execute(f"UPDATE calls SET callback_status = 'failed', callback_error = 'cancelled', {end}", (seq,))
            file.cut_output(seq)
        else:
            file.db.execute(f"UPDATE calls SET status = 'cancelled', completed_at = ?, {end}", (time.time(), seq))
            file.news.append(("final", Ended(call_id, function, "cancelled", attempts)))
        if due_at is None:
            file.news.append(("stop", seq))
        else:
            file.lanes[work].remove(lane, 1)
    return len(rows)


def sql_redrive(file: SqliteFile, call_id: str) -> Refused | None:
    sql = f"SELECT seq, function || '.' || namespace, queue, work, status {BY_ID} LIMIT 1"
    if (row := file.db.execute(sql, {"id": call_id}).fetchone()) is None:
        return Refused(404, UNKNOWN)
    seq, lane, queue, work, status = row
    if status not in FINAL or work is not None:
        return Refused(409, "the call, or its callback, has not finished yet")
    if file.db.execute("SELECT 1 FROM requests WHERE seq = ?", (seq,)).fetchone() is None:
        return Refused(410, "the request of this call is not stored any more")
    file.db.execute("DELETE FROM outputs WHERE seq = ?", (seq,))
    sql = """UPDATE calls SET status = 'queued', work = queue, lane = ?, due_at = ?, attempts = 0, interrupted = 0,
        http_status = NULL, error = NULL, started_at = NULL, completed_at = NULL, duration = NULL,
        response_bytes = NULL, callback_status = 'none', callback_attempts = 0, callback_http_status = NULL,
        callback_error = NULL WHERE seq = ?"""
    file.db.execute(sql, (lane, time.time(), seq))
    file.add(queue, lane, time.time())
    return None


def sql_expire(file: SqliteFile) -> None:
    """End the calls whose deadline has passed before they started: an attempt that is charged takes it away."""
    sql = f"""UPDATE calls SET deadline_at = NULL WHERE seq IN (SELECT seq FROM calls WHERE deadline_at <= ?
        AND deadline_at IS NOT NULL AND due_at IS NOT NULL ORDER BY deadline_at LIMIT {BATCH})
        RETURNING seq, claims, coalesce(call_id, id), function, work, lane, callback_url, failure_url"""
    for seq, claims, call_id, function, work, lane, *urls in file.db.execute(sql, (time.time(),)).fetchall():
        file.lanes[work].remove(lane, 1)
        ended = Ended(call_id, function, "timeout", 0, error="not started before its X-Deadline")
        finish(file, ended, callback_target("timeout", *urls), None, (seq, claims, "queued"))
    file.find_deadline()


def sql_stats(file: SqliteFile) -> dict[str, QueueStats]:
    found = {}
    for work in {*file.lanes, *file.paused}:
        waiting = dict(file.lanes[work].waiting)
        oldest = min((file.head(work, lane) for lane in waiting), default=float("inf"))
        found[work] = QueueStats(waiting, oldest, work in file.paused)
    return found


def sql_pause(file: SqliteFile, queue: str, paused: bool) -> None:
    file.db.execute("INSERT OR REPLACE INTO queues (name, paused) VALUES (?, ?)", (queue, paused))
    (file.paused.add if paused else file.paused.discard)(queue)
    file.wake_at[queue] = 0.0


def sql_probe(file: SqliteFile) -> None:
    """Take room for something new, and give it back."""
    file.db.execute("CREATE TABLE room (id)")
    file.db.execute("DROP TABLE room")


def sql_prune(file: SqliteFile) -> int:
    """Delete one batch of final records past their time and give free pages back. 1: there are more of those."""
    sql = f"""DELETE FROM calls WHERE seq IN (SELECT seq FROM calls WHERE completed_at < ? AND work IS NULL
        AND completed_at IS NOT NULL ORDER BY completed_at LIMIT {BATCH}) RETURNING seq"""
    gone = file.db.execute(sql, (time.time() - file.settings().calls.keep,)).fetchall()
    file.db.executemany("DELETE FROM requests WHERE seq = ?", gone)
    file.db.executemany("DELETE FROM outputs WHERE seq = ?", gone)
    (free,) = file.db.execute("PRAGMA freelist_count").fetchone()
    for _ in range(min(free, 2 * BATCH)):
        file.db.execute("PRAGMA incremental_vacuum(1)")  # more than one page at a time Python's module does not do
    return len(gone) or int((free - file.db.execute("PRAGMA freelist_count").fetchone()[0]) / (2 * BATCH))


def in_transaction(*steps: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Methods that have the writer run one of these steps in its next transaction."""
    return [lambda queue, *arguments, step=step: queue.submit(step, *arguments) for step in steps]


class SqliteQueue:
    """The embedded queue. One thread owns the connection; all that arrives during one fsync shares the next (group
    commit). Between transactions it waits for the time at which a call becomes due or its deadline passes."""

    def __init__(self, path: Path, settings: Settings, metrics: Metrics) -> None:
        self._file = SqliteFile(path, settings)
        self._observe = metrics.commits.observe
        self._outbox: list[Entry] = []  # submitted since the loop's last round
        self._inbox: queues.SimpleQueue[list[Entry]] = queues.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._closing = False
        self._busy_since = float("inf")  # monotonic; since when the current transaction runs
        self._seen_at = 0.0  # the wall clock after the last wait
        self._expire_after = 0.0  # when calls that missed their deadline are ended at the earliest
        self._failure: str | None = None  # why the last transaction failed; None after one that did not

    async def open(self, wake: Tell[str], stop: Tell[int], final: Tell[Ended]) -> None:
        self._loop = asyncio.get_running_loop()
        self._told: dict[str, Tell[Any]] = {"wake": wake, "stop": stop, "final": final}
        self._nobody: asyncio.Future[None] = self._loop.create_future()  # waits for what the writer does by itself
        self._nobody.cancel()
        self._file.open()  # nothing else runs yet
        self._thread.start()

    async def close(self) -> None:
        self._hand_over()
        self._closing = True  # nothing is handed over after this
        self._inbox.put([])  # the writer may wait for something
        await asyncio.to_thread(self._thread.join)

    enqueue, claim, complete, retry = in_transaction(sql_enqueue, sql_claim, sql_complete, sql_retry)
    lookup, output, cancel, redrive = in_transaction(sql_lookup, sql_output, sql_cancel, sql_redrive)
    pause, stats, prune = in_transaction(sql_pause, sql_stats, sql_prune)

    async def records(self, query: RecordQuery) -> tuple[list[dict[str, Any]], int | None]:
        found: list[dict[str, Any]] = []
        while True:  # in windows, so that a rare match in a large file doesn't keep the writer
            more, cursor = await self.submit(sql_records, query._replace(limit=query.limit - len(found)))
            found += more
            if cursor is None or len(found) >= query.limit:
                return found, cursor
            query = query._replace(cursor=cursor)

    async def purge(self, queue: str) -> int:
        total = 0
        while number := await self.submit(sql_purge, queue):
            total += number
        return total

    async def failing(self) -> str | None:
        if self._failure is not None:
            with contextlib.suppress(StoreError):
                await self.submit(sql_probe)
        return self._failure and f"the queue can't store: {self._failure}"

    def stalled(self) -> str | None:
        if self._file.damaged:
            return DAMAGED
        spent = time.monotonic() - self._busy_since
        return f"the disk has not answered for {spent:.0f} s" if spent >= STALLED_S else None

    def submit(self, step: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Run a step in the next transaction; the future is set once that is on disk."""
        future = self._loop.create_future()
        if self._closing or not self._thread.is_alive():
            future.set_exception(StoreError("the queue is closed"))
            return future
        if not self._outbox:  # hand over once per round of the loop: fewer and larger transactions
            self._loop.call_soon(self._hand_over)
        self._outbox.append((step, arguments, future))
        return future

    def _hand_over(self) -> None:
        self._inbox.put(self._outbox)
        self._outbox = []

    def _run(self) -> None:
        while not self._closing or self._inbox.qsize():
            batch = self._next_batch()
            self._busy_since = time.monotonic()
            self._commit(batch)
            self._busy_since = float("inf")
        self._file.db.close()

    def _next_batch(self) -> list[Entry]:
        """What was submitted, or what the time has come for."""
        file, batch = self._file, list[Entry]()
        expire_at = max(file.deadline_at, self._expire_after)
        wait = min([expire_at, *file.wake_at.values()]) - time.time()
        with contextlib.suppress(queues.Empty):  # waits are short enough to notice a clock that was set
            batch = self._inbox.get(timeout=min(max(0.0, wait), CLOCK_CHECK_S))
            while len(batch) < GROUP_COMMIT_MAX and self._inbox.qsize():
                batch += self._inbox.get()
        before, self._seen_at = self._seen_at, time.time()
        file.stale |= self._seen_at < before - 1.0  # the clock was set back
        if expire_at <= self._seen_at:
            batch.append((sql_expire, (), self._nobody))
        return batch

    def _commit(self, batch: list[Entry]) -> None:
        """One transaction. When it fails, its parts are tried alone, so that none takes the others down."""
        file, started, changes = self._file, time.perf_counter(), self._file.db.total_changes
        try:
            file.db.execute("BEGIN IMMEDIATE")
            if file.stale:
                file.rebuild()
            results = [(future, step(file, *arguments)) for step, arguments, future in batch]
            file.db.execute("COMMIT")
        except Exception as exc:
            self._failed(batch, exc)
            return
        if batch:  # else it was only time to wake a queue
            self._failure = None
        if file.db.total_changes != changes:
            self._observe(time.perf_counter() - started)
        self._tell(results)

    def _failed(self, batch: list[Entry], exc: Exception) -> None:
        with contextlib.suppress(sqlite3.Error):  # then the next BEGIN fails, which leads here again
            self._file.db.rollback()
        self._file.stale, self._file.news = True, []
        self._file.suspect |= getattr(exc, "sqlite_errorcode", 0) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
        disk = isinstance(exc, sqlite3.OperationalError)  # what fails for one fails for all that do the same
        parts: dict[Any, list[Entry]] = {}
        for step, arguments, future in batch:
            parts.setdefault(step if disk else future, []).append((step, arguments, future))
        if len(parts) > 1:
            for part in parts.values():
                self._commit(part)
            return
        if any(step is sql_expire for step, _, _ in batch):
            self._expire_after = time.time() + RETRY_STORE_S
        self._failure = str(exc) if isinstance(exc, sqlite3.Error) else f"{type(exc).__name__}: {exc}"
        self._tell([(future, StoreError(self._failure)) for _, _, future in batch])

    def _tell(self, results: list[tuple[asyncio.Future[Any], Any]]) -> None:
        """Tell first who waits for work, then who asked."""
        file, now = self._file, time.time()
        for name in [name for name, at in file.wake_at.items() if at <= now]:
            del file.wake_at[name]
            file.news.append(("wake", name))
        self._loop.call_soon_threadsafe(self._settle, file.news, results)
        file.news = []

    def _settle(self, news: list[tuple[str, Any]], results: list[tuple[asyncio.Future[Any], Any]]) -> None:
        for kind, what in news:
            self._told[kind](what)
        for future, answer in results:
            if not future.done():
                (future.set_exception if isinstance(answer, Exception) else future.set_result)(answer)


# --- Functions (HTTP, command) and callbacks ------------------------------------------------------------------------


class Ask(NamedTuple):
    """What a function is asked: `rest` is the path and query that followed its name, as sent."""

    method: str
    rest: str
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes | AsyncIterator[bytes]


class Wire(ResponseHandler):
    """A connection to a function or receiver. One that has sent what nobody asked for (servers tell idle clients "408
    Request Timeout") is not used again: the next caller would take that for its answer."""

    def is_connected(self) -> bool:  # asked by the pool
        return super().is_connected() and not self.should_close


def client_session(connector: Callable[..., aiohttp.BaseConnector], **options: Any) -> aiohttp.ClientSession:
    """A client that passes things on as they are: no cookies, no decompression, no headers or limits of its own."""
    pool: Any = connector(**{"limit": 0, "keepalive_timeout": POOL_IDLE_S, **options})
    pool._factory = functools.partial(Wire, loop=pool._loop)
    session = aiohttp.ClientSession(
        connector=pool, auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(), max_line_size=MAX_HEADER_BYTES,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"), max_field_size=MAX_HEADER_BYTES,
    )  # fmt: skip
    session._retry_connection = False  # or a GET that is broken off would make two calls of the function
    return session


def failure(exc: BaseException, who: str, started: float = 0.0, function: Function | None = None) -> Outcome:
    """The outcome of a call that gave no answer: 502 or 504 and one line. `started` is a time.perf_counter(). Raises
    ProviderAway where a function's provider could not be reached."""
    spent, status = time.perf_counter() - started, 502
    if isinstance(exc, aiohttp.ClientConnectorError):
        number = getattr(exc.os_error, "errno", None)
        reason = f"can't be reached: {os.strerror(number) if number and number > 0 else exc.os_error}"
        if function and function.replicas is not None:
            raise ProviderAway(503, f"the provider {reason}", LATER)
    elif isinstance(exc, TimeoutError):
        reason, status = "did not answer in time", 504
    elif isinstance(exc, aiohttp.ClientResponseError):
        reason = "did not answer in valid HTTP"
    elif isinstance(exc, aiohttp.ClientError | ConnectionError):
        reason = "broke off the connection"
    else:
        reason = str(getattr(exc, "strerror", None) or exc)
    return Outcome(status, False, spent, error=f"{who} {reason}", answered=False)


async def read_capped(content: Reader, keep: int, whole: bool = False) -> tuple[bytes, int]:
    """Read to the end: the first `keep` bytes, and the whole size. With `whole`, a byte too many raises OSError."""
    parts, length = [], 0
    while chunk := await content.read(256 * KIB):
        if length < keep:
            parts.append(chunk[: keep - length])
        length += len(chunk)
        if whole and length > keep:
            raise OSError(f"answered more than {keep} bytes")
    return parts[0] if len(parts) == 1 else b"".join(parts), length


class Slots:
    """Calls in flight by function, sync and queued, against max_inflight and what `adaptive` queues learn from 429s."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._running = settings, Counter[str]()
        self.provided: dict[str, int | None] = {}  # max_inflight of the provider's functions
        self._resting: dict[str, float] = {}  # functions that get no calls until then (monotonic)
        self._learned: dict[str, tuple[float, float]] = {}  # calls it takes at once; when it last took less (monotonic)
        self._freed = asyncio.Event()
        self.freed: Callable[[], object] = lambda: None  # told when a function that was full has room again

    def room(self, adaptive: bool) -> dict[str, int]:
        """How many more calls the functions that have a limit can take; "": those that have none."""
        limits = {name: limit for name, limit in self.provided.items() if limit is not None}
        limits |= self._settings().limits
        limits |= {name: 0 for name, until in self._resting.items() if until > time.monotonic()}
        for name, (learned, _) in self._learned.items() if adaptive else ():
            limits[name] = min(limits.get(name, 1 << 30), int(learned))
        room = {name: max(0, limit - self._running[name]) for name, limit in limits.items()}
        return {**room, "": 1} if adaptive else room

    def learn(self, name: str, status: int, started: float) -> None:
        """Additive increase, multiplicative decrease (Chiu and Jain, 1989): a call more for each answer until the first
        429, then for 4 rounds of answers. A 429 halves the number, once for all that `started` (monotonic) before."""
        limit, lowered_at = self._learned.get(name, (1.0, 0.0))
        if status != 429:
            self._learned[name] = limit + (0.25 / limit if lowered_at else 1.0), lowered_at
        elif started > lowered_at:
            self._learned[name] = max(1.0, limit / 2), time.monotonic()
        self.freed()

    def rest(self, name: str) -> None:
        """Give a function no calls for RETRY_STORE_S."""
        self._resting[name] = time.monotonic() + RETRY_STORE_S
        asyncio.get_running_loop().call_later(RETRY_STORE_S + 0.01, self.freed)

    def full(self, name: str) -> bool:
        limit = self._settings().limits.get(name) or self.provided.get(name)
        return limit is not None and self._running[name] >= limit

    async def wait(self, name: str) -> None:
        """Wait until a function has room: a sync call may have taken what a claim was promised."""
        while self.full(name):
            self._freed.clear()
            await self._freed.wait()

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Take a slot while a call runs."""
        self._running[name] += 1
        try:
            yield
        finally:
            was_full = self.full(name)
            self._running[name] -= 1
            if was_full:
                self._freed.set()
                self.freed()


class Functions:
    """Finds functions, in the configuration and then at the provider; wakes and calls them."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self.slots = settings, Slots(settings)
        self.changes = 0  # made at the provider: what was looked up before is looked up again
        # What the provider said last, by key: after which change, until when that is fresh (monotonic), the function.
        # It is kept for longer, so that calls can be queued while the provider is away.
        self._seen: dict[str, tuple[int, float, Function | None]] = {}
        self._asking: dict[str, asyncio.Task[Any]] = {}  # look-ups and scale-ups under way, for others to join

    async def open(self, stack: contextlib.AsyncExitStack) -> None:
        self._session = await stack.enter_async_context(client_session(aiohttp.TCPConnector))
        # faasd closes connections that idle; a call that finds one closed may not be sent twice. So none is kept.
        self._fresh = await stack.enter_async_context(client_session(aiohttp.TCPConnector, keepalive_timeout=0))

    def known(self, name: str) -> Function | None:
        """The function NAME[.NAMESPACE] as the configuration has it, or as the provider had it last."""
        config, (name, _, namespace) = self._settings(), name.partition(".")
        own = config.functions.get(name) if namespace in ("", config.gateway.namespace) else None
        return own or self._seen.get(f"{name}.{namespace or config.gateway.namespace}", (0, 0.0, None))[2]

    async def find(self, name: str, stale: bool = False) -> Function | None:
        """The same as it is now; with `stale`, as it was known if the provider is away. Raises ProviderAway."""
        config, function = self._settings(), self.known(name)
        if config.provider.url is None or (function and function.replicas is None):
            return function
        key = name if "." in name else f"{name}.{config.gateway.namespace}"
        change, fresh_until, _ = self._seen.get(key, (0, 0.0, None))
        if change == self.changes and time.monotonic() < fresh_until:
            return function
        if not all(map(_NAME.fullmatch, key.split(".", 1))):
            return None
        try:
            function = await self._join(f"{key} {self.changes}", self._look_up, key)
        except ProviderAway:
            if not (stale and function):
                raise
        return function

    def all(self) -> Iterator[Function]:
        """Those of the configuration, and those of the provider that were looked up."""
        yield from self._settings().functions.values()
        yield from (function for *_, function in self._seen.values() if function)

    async def _join(self, name: str, work: Callable[[T], Coroutine[Any, Any, Any]], what: T) -> Any:
        """Do something once for all who want it at the same time."""
        if name not in self._asking:
            self._asking[name] = asyncio.create_task(work(what), name=name)
            self._asking[name].add_done_callback(lambda task: self._asking.pop(name) and task.exception())
        return await asyncio.shield(self._asking[name])

    async def _look_up(self, key: str) -> Function | None:
        (name, _, namespace), function = key.partition("."), None
        changes, config = self.changes, self._settings()
        answer = await self.ask("GET", f"/system/function/{name}?namespace={namespace}")
        if answer.status not in (200, 400, 404):
            raise ProviderAway(503, f"the provider answered {answer.status} to a look-up of {key}", LATER)
        if answer.status == 200:
            try:
                found = json.loads(answer.body)
                labels, annotations = (string_table(found.get(key) or {}) for key in ("labels", "annotations"))
            except (ValueError, AttributeError):
                raise ProviderAway(503, f"what the provider answered to a look-up of {key} is none", LATER) from None
            function = annotated(Function(
                name=name, namespace=namespace, url=yarl.URL(f"{config.provider.url}").joinpath("function", key),
                labels=labels, annotations=annotations, replicas=found.get("availableReplicas", 0),
            ), config.retry)  # fmt: skip
        self._seen[key] = changes, time.monotonic() + config.provider.cache, function
        self.slots.provided[key] = function.max_inflight if function else None
        if len(self._seen) > MAX_SEEN:
            oldest = next(iter(self._seen))
            del self._seen[oldest], self.slots.provided[oldest]
        return function

    def provider(self) -> Function:
        """The provider itself, as if it were one of its functions; but it has no namespace, and gets our login."""
        return Function(name="provider", namespace="", url=self._settings().provider.url, replicas=1)

    async def ask(self, method: str, target: str, body: bytes = b"", limit: float = PROVIDER_S) -> Outcome:
        """A request to the provider's REST API. Raises ProviderAway where there is no answer."""
        ask = Ask(method, target, [(b"Content-Type", b"application/json")], body)
        answer = await self.call(self.provider(), ask, limit, MAX_RESPONSE_BYTES)
        if not answer.answered:
            raise ProviderAway(503, answer.error or "", LATER)
        return answer

    async def awake(self, function: Function) -> None:
        """Have the provider start a function that has no replicas, and wait until it has. Raises Refused(503)."""
        if function.replicas == 0:
            await self._join(f"wake {function.key}", self._wake, function)

    async def _wake(self, function: Function) -> None:
        config, name = self._settings().provider, function.name
        if not config.scale_from_zero:
            raise Refused(503, f"function {name} has no replicas, and provider.scale_from_zero is off")
        document = json.dumps({"serviceName": name, "namespace": function.namespace, "replicas": 1}).encode()
        try:
            async with asyncio.timeout(config.scale_timeout):
                await self.ask("POST", f"/system/scale-function/{name}", document)
                while (found := await self._look_up(function.key)) and not found.replicas:  # noqa: ASYNC110
                    await asyncio.sleep(SCALE_POLL_S)
        except TimeoutError:
            raise Refused(503, f"function {name} has no replicas after provider.scale_timeout", LATER) from None

    def request(self, function: Function, ask: Ask) -> Any:
        """The HTTP call itself, an async context manager. The target reaches the function byte for byte."""
        assert function.url
        # The query stands in the path, because yarl would drop an empty one.
        target = function.url.with_path(function.url.raw_path.rstrip("/") + ask.rest, encoded=True)
        headers, session = as_multidict(ask.headers), self._session
        if function.replicas is not None:
            session, config = self._fresh, self._settings()
            if not function.namespace and (login := config.provider.login or config.auth.login):
                headers["Authorization"] = login
            headers.add("Via", via(ask.rest))
        return session.request(ask.method, target, headers=headers, data=ask.body or None, allow_redirects=False)

    async def call(self, function: Function, ask: Ask, timeout_s: float, keep: int, whole: bool = True) -> Outcome:
        """Call a function and read its answer: the first `keep` bytes; with `whole`, a longer answer is a failure.
        Never raises for what the function does; raises ProviderAway."""
        started, who = time.perf_counter(), f"function {function.name}" if function.namespace else "the provider"
        try:
            if function.command:
                return await run_command(function, ask, timeout_s, max(keep, MAX_RESPONSE_BYTES))
            async with asyncio.timeout(timeout_s), self.request(function, ask) as answer:
                kept, length = await read_capped(answer.content, keep, whole)
        except NO_ANSWER as exc:
            return failure(exc, who, started, function)
        status, given = answer.status, forward_headers(answer.raw_headers, frozenset((b"content-length",)))
        self.changes += "X-Openfaas-Internal" in answer.headers  # the function may have no replicas any more
        # faasd answers 301 for a path that is not clean, and does not run the function.
        ok, spent = 200 <= status < 400 and (status != 301 or function.replicas is None), time.perf_counter() - started
        error = None if ok else f"{who} answered {status}"
        return Outcome(status, ok, spent, tuple(given), kept, length, error=error)


def as_multidict(headers: Iterable[tuple[bytes, bytes]]) -> CIMultiDict[str]:
    """Header fields as aiohttp takes them. It would lose bytes that are not UTF-8: they are taken for Latin-1. And it
    would lose repeats of a name in another case: all get the case of the first."""
    found, names = CIMultiDict[str](), dict[bytes, str]()
    for name, value in headers:
        shown = names.setdefault(name.lower(), name.decode("latin-1"))
        value = re.sub(rb"[\0-\x08\n-\x1f\x7f]", b" ", value)
        try:
            found.add(shown, value.decode())
        except UnicodeDecodeError:
            found.add(shown, value.decode("latin-1"))
    return found


async def run_command(function: Function, ask: Ask, timeout_s: float, keep: int) -> Outcome:
    """Start a command for one request, like the classic watchdog. Its process group never outlives the call. Raises
    OSError when it can't be started, writes more than `keep` bytes or takes too long (TimeoutError)."""
    started, pipe = time.perf_counter(), asyncio.subprocess.PIPE
    try:
        environment = command_environment(function, ask)
        starting = asyncio.ensure_future(asyncio.create_subprocess_exec(
            *(function.command or ()), stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, env=environment
        ))  # fmt: skip
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        starting.add_done_callback(lambda done: done.exception() or kill_group(done.result().pid))  # type: ignore[func-returns-value]
        raise
    except (OSError, ValueError) as exc:
        raise OSError(f"can't be started: {getattr(exc, 'strerror', None) or exc}") from exc
    try:
        async with asyncio.timeout(min(timeout_s, function.exec_timeout or timeout_s)), asyncio.TaskGroup() as group:
            assert process.stdin and process.stdout and process.stderr
            feeding = group.create_task(feed(process.stdin, ask.body))
            out = group.create_task(read_capped(process.stdout, keep, whole=True))
            err = group.create_task(read_capped(process.stderr, 64 * KIB))
            code = await process.wait()
            kill_group(process.pid)  # what it left behind; that also ends the pipes
            feeding.cancel()
    except ExceptionGroup as group_exc:
        raise group_exc.exceptions[0] from None  # too much output, or the caller's body could not be read
    finally:
        kill_group(process.pid)
        await process.wait()
    (stdout, _), (stderr, _), spent = out.result(), err.result(), time.perf_counter() - started
    body, kind, error = stdout, b"application/octet-stream", None
    if code != 0:
        body = stdout or stderr
        error = f"function {function.name}: " + (f"exit status {code}" if code > 0 else f"killed by signal {-code}")
    with contextlib.suppress(UnicodeDecodeError):
        body.decode()
        kind = b"text/plain; charset=utf-8"
    headers = ((b"Content-Type", kind),)
    return Outcome(500 if error else 200, error is None, spent, headers, body, len(body), stderr, error)


def command_environment(function: Function, ask: Ask) -> dict[str, str]:
    """The variables of a command: ours without systemd's, the classic watchdog's Http_*, then those of `env`."""
    path, _, query = ask.rest.partition("?")
    found: dict[str, str] = {}
    for raw_name, raw_value in ask.headers:
        name = "Http_" + raw_name.decode("latin-1").title().replace("-", "_")
        found[name] = f"{found[name]}, {os.fsdecode(raw_value)}" if name in found else os.fsdecode(raw_value)
    found.pop("Http_Proxy", None)  # many programs would obey it (httpoxy, CVE-2016-5385)
    found |= {"Http_Method": ask.method, "Http_Path": path or "/", "Http_Query": query}
    length = str(len(ask.body)) if isinstance(ask.body, bytes) else found.get("Http_Content_Length", "-1")
    found["Http_ContentLength"] = found["Http_Content_Length"] = length
    systemd = re.compile(r"NOTIFY_SOCKET|WATCHDOG_\w+|LISTEN_\w+|\w+_DIRECTORY|JOURNAL_STREAM|INVOCATION_ID|UV_\w+")
    own = {name: value for name, value in os.environ.items() if not systemd.fullmatch(name)}
    return {**own, **found, **function.env}


def kill_group(pid: int) -> None:
    """Kill a command with everything it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


async def feed(stdin: asyncio.StreamWriter, body: bytes | AsyncIterator[bytes]) -> None:
    """Write a body to a command, which may stop reading whenever it likes."""
    closed = BrokenPipeError, ConnectionResetError, RuntimeError  # uvloop's, of a pipe that is closed already
    with contextlib.closing(stdin), contextlib.suppress(*closed):
        if isinstance(body, bytes):
            stdin.write(body)
        else:
            async for chunk in body:
                stdin.write(chunk)
                await stdin.drain()
        await stdin.drain()


class Invoker:
    """Runs claimed invocations: what the consumer of an ordinary queue does with its work."""

    def __init__(self, settings: Settings, functions: Functions, metrics: Metrics) -> None:
        self._settings, self._functions, self._metrics = settings, functions, metrics
        self._rng = random.Random()

    def room(self, queue: str, running: Iterable[str]) -> tuple[int, Mapping[str, int]]:
        """How many may run at once and, where the lanes `running` do, how many more of each that has a limit."""
        config = self._settings().queue(queue)
        return config.max_inflight, self._functions.slots.room(config.adaptive)

    async def execute(self, claim: Claim) -> Outcome | None:
        """One attempt. None: there was none, the provider is away; it will be asked again for this function later."""
        config, functions, slots, name = self._settings(), self._functions, self._functions.slots, claim.lane
        queue, whole = config.queue(claim.queue), bool(claim.callback_url or claim.failure_url)
        keep = max(MAX_RESPONSE_BYTES, config.gateway.max_payload) if whole else config.calls.keep_output
        headers = [*unpack_headers(claim.headers), (b"X-Retry", b"%d" % (claim.attempt - 1))]
        try:
            if (function := await functions.find(name)) is None:
                raise Refused(404, f"function {claim.function} does not exist any more")
            await functions.awake(function)
            await slots.wait(name)
            running = self._metrics.running(claim.queue, name).track_inprogress()
            with slots.hold(name), self._metrics.counted(name) as status, running:
                ask, started = Ask("POST", claim.target, headers, claim.body), time.monotonic()
                outcome = await functions.call(function, ask, queue.timeout, keep, whole)
                status.append(outcome.status)
        except ProviderAway as exc:
            log_with(logging.WARNING, "call waits", call_id=claim.call_id, function=claim.function, error=exc.text)
            slots.rest(name)
            return None
        except Refused as exc:  # it is gone, or can't be woken
            return Outcome(exc.status, False, 0.0, error=exc.text, answered=False)
        if queue.adaptive:
            slots.learn(name, outcome.status, started)
        log_bodies(config.log, claim.call_id, request=claim.body, response=outcome.body, stderr=outcome.stderr)
        return outcome

    def verdict(self, claim: Claim, outcome: Outcome) -> Verdict:
        """What follows from the attempt."""
        function = self._functions.known(claim.lane)
        policy = function.retry if function else self._settings().retry
        return decide(outcome, claim.attempt, claim.max_attempts, policy, time.time(), self._rng)

    def ended(self, claim: Claim, outcome: Outcome, verdict: Verdict) -> None:
        """Count and log what was stored; of a call's end the queue itself tells."""
        self._metrics.processed(claim.queue).inc()
        if verdict.delay_s is not None:
            self._metrics.retries.inc()
            log_with(
                logging.INFO, "call will be tried again", call_id=claim.call_id, function=claim.function,
                attempts=claim.attempt, http_status=outcome.status, error=outcome.error, delay=verdict.delay_s,
            )  # fmt: skip


class CallbackSender:
    """Delivers outcomes: what the consumer of the queue CALLBACKS does with its work."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics, self._rng = settings, metrics, random.Random()
        self._failing: set[str] = set()  # hosts whose last delivery failed: they get few slots
        self.own_address = ""  # "http://HOST:PORT" or "unix:/path" of this daemon, known once it listens

    async def open(self, stack: contextlib.AsyncExitStack) -> None:
        """Raises ConfigError when callback.tls_ca_file can't be used."""
        cafile = self._settings().callback.tls_ca_file
        try:
            context: Any = ssl.create_default_context(cafile=cafile) if cafile else True
        except OSError as exc:
            raise ConfigError([f"callback.tls_ca_file: {cafile}: {exc.strerror or exc}"]) from exc
        session = client_session(aiohttp.TCPConnector, resolver=self, ssl=context, use_dns_cache=False)
        self._session = self._own_session = await stack.enter_async_context(session)
        if self.own_address.startswith("unix:"):
            session = client_session(aiohttp.UnixConnector, path=self.own_address[5:])
            self._own_session = await stack.enter_async_context(session)

    async def resolve(self, host: str, *given: Any, **more: Any) -> list[aiohttp.abc.ResolveResult]:
        """As the session's resolver, check the address that a connection will use: the name may point elsewhere now."""
        found = await aiohttp.ThreadedResolver().resolve(host, *given, **more)
        allowed = [item for item in found if callback_allowed(host, item["host"], self._settings().callback)]
        if not allowed:
            raise Refused(403, f"callbacks to {host} at {found[0]['host']} are not allowed")
        return allowed

    def room(self, queue: str, running: Iterable[str]) -> tuple[int, Mapping[str, int]]:
        """One host gets at most three quarters of the slots, one that fails an eighth: others always have some."""
        lanes, most = Counter(running), self._settings().callback.max_inflight
        share = max(1, most - max(1, most // 4))
        caps = {**dict.fromkeys(lanes, share), **dict.fromkeys(self._failing, max(1, most // 8))}
        return most, {"": share, **{host: max(0, cap - lanes[host]) for host, cap in caps.items()}}

    def _request(self, claim: Claim) -> Any:
        """The POST, to this daemon itself where the host is one of its names. Raises Refused."""
        target, config = yarl.URL(claim.target, encoded=True), self._settings()
        headers = as_multidict(unpack_headers(claim.headers))
        headers.update({
            "User-Agent": USER_AGENT, "X-Call-Id": claim.call_id, "X-Function-Name": claim.function,
            "X-Function-Status": str(claim.http_status or 504),  # a call that did not start before its deadline
            "X-Duration-Seconds": f"{claim.duration_s or 0:.6f}", "X-Start-Time": str(claim.start_time),
            "X-Retry": str(max(0, claim.runs - 1)), "X-Retry-Max": str(claim.max_attempts),
        })  # fmt: skip
        if secret := config.callback.signing_secret_file:
            headers.update(webhook_signature(secret, claim.id, int(time.time()), claim.body))
        session, host = self._session, (target.host or "").lower()
        if host in config.callback.gateway_hosts:
            session, own = self._own_session, yarl.URL(self.own_address.replace("unix:", "http://localhost"))
            target = target.with_scheme("http").with_host(own.host or "").with_port(own.port)
            if config.auth.login and config.auth.invoke:
                target = target.with_user(None)
                headers["Authorization"] = config.auth.login
        elif not callback_allowed(host, None, config.callback):
            raise Refused(403, f"callbacks to {host} are not allowed")
        return session.post(target, data=claim.body, headers=headers, allow_redirects=False)

    async def execute(self, claim: Claim) -> Outcome:
        """One claim. Success is a 2xx."""
        config, started, who = self._settings(), time.perf_counter(), "the callback URL"
        log_bodies(config.log, claim.call_id, callback=claim.body)
        try:
            async with asyncio.timeout(config.callback.timeout), self._request(claim) as answer:
                await read_capped(answer.content, 0)
            ok, spent = 200 <= answer.status < 300, time.perf_counter() - started
            error = None if ok else f"{who} answered {answer.status}"
            outcome = Outcome(answer.status, ok, spent, answer.raw_headers, error=error)
        except NO_ANSWER as exc:
            outcome = failure(exc, who, started)
        except Refused as exc:
            outcome = Outcome(exc.status, False, 0.0, error=exc.text, answered=False)
        (self._failing.discard if outcome.answered else self._failing.add)(claim.lane)
        return outcome

    def verdict(self, claim: Claim, outcome: Outcome) -> Verdict:
        """What follows from the claim."""
        policy = self._settings().callback
        verdict = decide(outcome, claim.attempt, policy.attempts, policy, time.time(), self._rng)
        return Verdict("delivered" if outcome.ok else "failed") if verdict.delay_s is None else verdict

    def ended(self, claim: Claim, outcome: Outcome, verdict: Verdict) -> None:
        """Count and log what was stored."""
        level, what = logging.INFO, "callback will be tried again"
        if verdict.delay_s is None:
            level, what = logging.DEBUG if outcome.ok else logging.WARNING, f"callback {verdict.status}"
            self._failing.discard(claim.lane)
            self._metrics.callbacks(verdict.status).inc()
        log_with(
            level, what, call_id=claim.call_id, function=claim.function, callback=show_url(claim.target),
            attempts=claim.attempt, http_status=outcome.status, error=outcome.error, delay=verdict.delay_s,
        )  # fmt: skip


def webhook_signature(secret: bytes, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of https://www.standardwebhooks.com: HMAC-SHA256 over id, time and body."""
    raw = base64.b64decode(secret[6:]) if secret.startswith(b"whsec_") else secret
    signed = hmac.digest(raw, f"{message_id}.{timestamp}.".encode() + body, "sha256")
    signature = "v1," + base64.b64encode(signed).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}


# --- Consumer -------------------------------------------------------------------------------------------------------


class Consumer:
    """Claims the work of one queue and runs it, at most `limit` at once. A slot is taken before work is claimed."""

    def __init__(self, name: str, queue: Queue, job: Invoker | CallbackSender) -> None:
        self.name, self._queue, self._job = name, queue, job
        self._wake = asyncio.Event()
        self.wake = self._wake.set  # there may be something to claim
        self.running: dict[int, tuple[str, asyncio.Task[None]]] = {}  # by token: lane and task of attempts that run
        self._tasks: set[asyncio.Task[None]] = set()  # these, and those whose attempt has ended and waits to be stored
        self._stopping = asyncio.get_running_loop().create_future()  # done once we stop
        self.dispatcher = asyncio.create_task(self._dispatch(), name=f"dispatcher of {name}")
        self.wake()

    def cancel(self, token: int) -> None:
        """End an attempt whose call was cancelled. The queue stores nothing of it: the claim is not ours any more."""
        if token in self.running:
            # Not at once: a task that is cancelled before its first step would not run at all, nor free its slot.
            asyncio.get_running_loop().call_soon(self.running[token][1].cancel)

    async def _dispatch(self) -> None:
        while not self._stopping.done():
            await self._wake.wait()
            self._wake.clear()
            limit, room = self._job.room(self.name, (lane for lane, _ in self.running.values()))
            free = limit - len(self.running)
            # Outcomes that can't be stored (disk full) hold new work back, or they would pile up in memory.
            if self._stopping.done() or free <= 0 or len(self._tasks) - len(self.running) > limit:
                continue
            try:
                claims = await self._queue.claim(self.name, free, room)
            except StoreError as exc:
                log.error("queue %s: no work can be claimed: %s", self.name, exc)
                await asyncio.wait([self._stopping], timeout=RETRY_STORE_S)
                self._wake.set()
                continue
            for claim in claims:
                task = asyncio.create_task(self._work(claim), name=f"call {claim.call_id}")
                self.running[claim.token] = claim.lane, task
                self._tasks.add(task)
            if len(claims) >= free:
                self._wake.set()

    async def _work(self, claim: Claim) -> None:
        """One attempt from claim to commit."""
        outcome: Outcome | None = None  # what a shutdown leaves: queued again, the attempt not charged
        try:
            outcome = await self._job.execute(claim)
        except asyncio.CancelledError:
            pass  # by `stop`, or by `cancel`: then the queue refuses what follows
        except Exception:
            log.exception("attempt of call %s failed in this program itself", claim.call_id)
            outcome = Outcome(500, False, 0.0, error="internal error", answered=False)
        _, task = self.running.pop(claim.token)
        self._wake.set()
        try:
            await self._settle(claim, outcome)
        finally:
            self._tasks.discard(task)
            self._wake.set()

    async def _settle(self, claim: Claim, outcome: Outcome | None) -> None:
        """Store what became of an attempt, however long the disk is full: the function has run."""
        verdict = Verdict("queued", 0.0) if outcome is None else self._job.verdict(claim, outcome)
        while True:
            try:
                if outcome is not None and verdict.delay_s is None:
                    stored = await self._queue.complete(claim, outcome, verdict.status)
                else:
                    stored = await self._queue.retry(claim, outcome, verdict.delay_s or 0.0)
                break
            except StoreError as exc:
                log.error("the outcome of call %s can't be stored yet: %s", claim.call_id, exc)
                if self._stopping.done():
                    log.error("stopping: call %s will run again", claim.call_id)
                    return
                await asyncio.wait([self._stopping], timeout=RETRY_STORE_S)
        if stored and outcome is not None:
            self._job.ended(claim, outcome, verdict)

    async def stop(self, hurried: asyncio.Task[Any]) -> None:
        """Claim no more, wait for what runs until `hurried` ends, cancel the rest and queue it again uncharged."""
        self._stopping.set_result(None)
        self._wake.set()
        await asyncio.wait({self.dispatcher})  # its tasks have begun then: cancelled before, one could not queue again
        ended = asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.wait({ended, hurried}, return_when=asyncio.FIRST_COMPLETED)
        for _, task in self.running.values():
            task.cancel()
        await ended


# --- Gateway --------------------------------------------------------------------------------------------------------


class Connection(web.RequestHandler):
    """aiohttp's connection, with this gateway's form of errors: one line of text, nothing of what came in."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        for message, _ in self._messages:
            if error := getattr(message, "exc", None):
                error.__traceback__ = None  # which has `data`, and is part of a cycle: the memory would stay in use

    def handle_error(self, request: Any, status: int = 500, exc: Any = None, message: Any = None) -> web.Response:
        line = "internal error: see the log of faasd-async" if status >= 500 else "this is not a valid HTTP request"
        if status >= 500:
            log.error("request failed in this program itself", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun")
        return reply(line, status)  # what was not HTTP has no keep-alive either


class Server(web.Server):
    """aiohttp's low-level server: no router, because a router would normalise paths."""

    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)


class Answer(web.StreamResponse):
    """A function's answer passed on, without the headers that aiohttp would add to it."""

    async def _prepare_headers(self) -> None:
        added = {name for name in ("Content-Type", "Server") if name not in self.headers}
        await super()._prepare_headers()
        for name in added:
            self.headers.pop(name, None)


def reply(what: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A line of text, or a JSON document; it too ends in a newline, for people with curl."""
    kind = "text/plain"
    if not isinstance(what, str):
        what, kind = json.dumps(what, ensure_ascii=False), "application/json"
    return web.Response(status=status, text=f"{what}\n", content_type=kind, headers=headers)


def parsed(given: Mapping[str, str], parsers: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """The parameters or headers that have a parser, parsed. Raises Refused(400) naming one, its value and the form."""
    found = {}
    for name, parse in parsers.items():
        if name in given:
            try:
                found[name] = parse(given[name])
            except ValueError as exc:
                raise Refused(400, f"{name}: {json.dumps((show_url(given[name]) or '')[:80])}: {exc}") from None
    return found


class Operator:
    """The operator's routes: calls, queues, health, metrics."""

    def __init__(self, settings: Settings, queue: Queue, functions: Functions, metrics: Metrics) -> None:
        self._settings, self._queue, self._functions, self._metrics = settings, queue, functions, metrics
        # By call id, while somebody waits for the call to become final:
        self._ends = weakref.WeakValueDictionary[str, asyncio.Event]()
        self.inflight: Callable[[], Mapping[str, int]] = dict  # attempts running, by queue
        self.draining = False
        self._routes: list[tuple[str, str, Callable[..., Awaitable[Reply]]]] = [
            ("GET", r"/system/calls", self._list),
            ("GET", r"/system/calls/(.+)/log", self._log),
            ("POST", r"/system/calls/(.+)/retry", self._retry),
            ("GET", r"/system/calls/(.+)", self._show),
            ("GET", r"/system/queues", self._queues),
            ("POST", r"/system/queues/([^/]+)/(pause|resume|purge)", self._queue_action),
            ("GET", r"/metrics", self._exposition),
            ("GET", r"/v1/apps/([^/]+)/calls", self._fn_calls),
            ("GET", r"/v1/apps/([^/]+)/calls/([^/]+)(/log|)", self._fn_call),
        ]

    async def handle(self, request: web.BaseRequest, target: str) -> Reply:
        """Find the route. Raises Refused: 404, 405."""
        path, _, query = target.partition("?")
        if path in ("/healthz", "/readyz"):
            reason = self._queue.stalled()
            if path == "/readyz":
                reason = "shutting down" if self.draining else reason or await self._queue.failing()
            return reply(reason or "ok", 503 if reason else 200)
        method = "GET" if request.method == "HEAD" else request.method
        for wanted, pattern, handler in self._routes:
            if match := re.fullmatch(pattern, path):
                if wanted != method:
                    raise Refused(405, f"this route takes {wanted}", {"Allow": wanted})
                return await handler(dict(parse_qsl(query, keep_blank_values=True)), *map(unquote, match.groups()))
        raise Refused(404, "no such route: calls go to /function/NAME or /async-function/NAME")

    def final(self, call_id: str) -> None:
        """A call has become final: tell who waits for it."""
        if end := self._ends.pop(call_id, None):
            end.set()

    def drain(self) -> None:
        """Let go of everybody who waits: the daemon stops."""
        self.draining = True
        for call_id in list(self._ends):
            self.final(call_id)

    # -- calls
    async def _show(self, query: dict[str, str], call_id: str) -> Reply:
        wait = parsed(query, {"wait": duration}).get("wait")
        end = self._ends.setdefault(call_id, asyncio.Event())
        found = await self._queue.lookup(call_id)
        if wait and not self.draining and found["status"] not in FINAL:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(end.wait(), wait)
            found = await self._queue.lookup(call_id)
        return reply(found)

    async def _list(self, query: dict[str, str]) -> Reply:
        filters = {
            "status": one_of(*STATUSES),
            **dict.fromkeys(("function", "queue", "call_id"), text),
            "limit": expect("a whole number from 1 to 1000", lambda v: need(_whole(v), 1 <= _whole(v) <= 1000)),
            "cursor": expect("the next_cursor of an earlier answer", _whole),
        }
        if unknown := query.keys() - filters.keys():
            raise Refused(400, f"{min(unknown)}: unknown filter; there are {', '.join(filters)}")
        asked = parsed(query, filters)
        if "function" in asked:
            asked["function"] = asked["function"].removesuffix("." + self._settings().gateway.namespace)
        calls, cursor = await self._queue.records(RecordQuery(**asked))
        return reply({"calls": calls, "next_cursor": None if cursor is None else str(cursor)})

    async def _output(self, call_id: str) -> bytes:
        body, stderr = await self._queue.output(call_id)
        return body + (b"\n" if body and stderr and not body.endswith(b"\n") else b"") + stderr

    async def _log(self, query: dict[str, str], call_id: str) -> Reply:
        return web.Response(body=await self._output(call_id), content_type="text/plain", charset="utf-8")

    async def _retry(self, query: dict[str, str], call_id: str) -> Reply:
        await self._queue.redrive(call_id)
        headers = {"X-Call-Id": call_id, "Location": f"/system/calls/{quote(call_id, safe='')}"}
        return web.Response(status=202, headers=headers)

    # -- calls, as Fn Project showed them in 2017
    def _fn(self, found: dict[str, Any]) -> dict[str, Any]:
        shown = {"id": found["call_id"], "app_name": found["app"], "path": "/" + found["function"]}
        return shown | {name: found[name] for name in ("status", "created_at", "started_at", "completed_at")}

    async def _fn_calls(self, query: dict[str, str], app: str) -> Reply:
        function = split_target(query.get("path", "").lstrip("/"))[0] or None
        calls, _ = await self._queue.records(RecordQuery(app=app, function=function))
        return reply({"message": "Successfully listed calls", "calls": [self._fn(found) for found in calls]})

    async def _fn_call(self, query: dict[str, str], app: str, call_id: str, log: str) -> Reply:
        found = await self._queue.lookup(call_id)
        if found.get("app") != app:
            raise Refused(404, "Call not found")
        if not log:
            return reply({"message": "Successfully loaded call", "call": self._fn(found)})
        written = (await self._output(call_id)).decode("utf-8", "replace")
        return reply({"message": "Successfully loaded log", "log": {"call_id": call_id, "log": written}})

    # -- queues
    async def _queues(self, query: dict[str, str]) -> Reply:
        config, stats, inflight, now = self._settings(), await self._queue.stats(), self.inflight(), time.time()
        rows: list[dict[str, Any]] = []
        for name in (*sorted({*config.queues, *stats} - {CALLBACKS}), CALLBACKS):
            found, limits = stats.get(name, QueueStats({}, now, False)), config.queue(name)
            row = {"name": name, "depth": sum(found.waiting.values()), "inflight": inflight.get(name, 0)}
            row |= {"oldest_seconds": round(max(0.0, now - found.oldest_at), 3), "max_inflight": limits.max_inflight}
            row |= {"paused": found.paused, "functions": found.waiting, "max_pending": limits.max_pending}
            rows.append(row | {"timeout_seconds": limits.timeout, "fair": limits.fair, "adaptive": limits.adaptive})
        rows[-1] = {**dict(list(rows[-1].items())[:4]), "max_inflight": config.callback.max_inflight}
        return reply({"queues": rows})

    async def _queue_action(self, query: dict[str, str], queue: str, action: str) -> Reply:
        if queue == CALLBACKS or (queue not in self._settings().queues and queue not in await self._queue.stats()):
            raise Refused(404, f"no such queue; there are {', '.join(sorted(self._settings().queues))}")
        if action == "purge":
            return reply({"queue": queue, "cancelled": await self._queue.purge(queue)})
        await self._queue.pause(queue, action == "pause")
        log.info("queue %s: %sd", queue, action)
        return reply({"queue": queue, "paused": action == "pause"})

    # -- metrics
    async def _exposition(self, query: dict[str, str]) -> Reply:
        stats, now = await self._queue.stats(), time.time()
        registry = prometheus_client.CollectorRegistry()  # of what has a value only when somebody looks
        gauge = functools.partial(prometheus_client.Gauge, registry=registry)
        replicas = gauge("gateway_service_count", "Replicas of a function.", ["function_name"])
        pending = gauge("queue_worker_pending_messages", "Calls waiting in the queue.", ["queue_name", "function_name"])
        oldest = gauge("faasd_async_oldest_seconds", "Wait of the oldest due call.", ["queue"])
        for function in self._functions.all():
            replicas.labels(function.key).set(1 if function.replicas is None else function.replicas)
            pending.labels(function.queue, function.key).set(0)
        for name, found in stats.items():
            oldest.labels(name).set(max(0.0, now - found.oldest_at))
            for lane, number in found.waiting.items() if name != CALLBACKS else ():
                pending.labels(name, lane).set(number)
        body = prometheus_client.generate_latest(self._metrics.registry) + prometheus_client.generate_latest(registry)
        return web.Response(body=body, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})


def controls(settings: Settings) -> dict[str, Callable[[str], Any]]:
    """The headers that steer a call, with their parsers; these raise ValueError."""

    def callback(value: str) -> str:
        host, config = callback_host(value), settings().callback
        if host not in config.gateway_hosts and not callback_allowed(host, None, config):
            raise ValueError("callbacks to this host are not allowed by [callback] allow and deny")
        return value

    return {
        **CALL_ID,
        **dict.fromkeys(("X-Callback-Url", "X-Failure-Callback-Url"), callback),
        "Idempotency-Key": visible,
        "X-Delay": lambda value: time.time() + duration(value),
        "X-Not-Before": parse_when,
        "X-Deadline": expect(
            'a duration such as "1h" or ' + TIME_FORM,
            lambda value: time.time() + duration(value) if value[-1:] in "smh" else parse_when(value),
        ),
        "X-Max-Attempts": number,
        "X-Queue": lambda value: one_of(*settings().queues)(value),
    }


class Gateway:
    """Calls come in: `/function/…` straight through, `/async-function/…` into the queue. The rest is the operator's."""

    def __init__(self, settings: Settings, queue: Queue, functions: Functions, metrics: Metrics, own: Operator) -> None:
        self._settings, self._queue, self._operator = settings, queue, own
        self._functions, self._metrics, self._controls = functions, metrics, controls(settings)
        self.requests: set[Any] = set()  # the tasks of those that are being answered
        self.asked = weakref.WeakSet[Any]()  # the connections that a request has come on

    async def handle(self, request: web.BaseRequest) -> Reply:
        """Every request comes here."""
        target = request.raw_path
        if not target.startswith("/"):  # absolute form, as sent to a proxy
            target = "/" + target.partition("://")[2].partition("/")[2]
        self.asked.add(request.protocol)
        self.requests.add(task := asyncio.current_task())
        try:
            return await self._route(request, target)
        except StoreError as exc:
            log.error("request refused: %s", exc)
            refused = Refused(503, f"the queue can't store this now, try again later: {exc}", LATER)
        except Refused as exc:
            refused = exc
        finally:
            self.requests.discard(task)
        fn = target.startswith(("/r/", "/v1/"))
        return reply({"error": {"message": refused.text}} if fn else refused.text, refused.status, refused.headers)

    async def _route(self, request: web.BaseRequest, target: str) -> Reply:
        coding = request.headers.get("Transfer-Encoding", "chunked").lower()
        if request.method == "CONNECT" or coding != "chunked":  # RFC 9112 6.1
            raise Refused(501, "CONNECT, and transfer codings beside chunked, are not for functions", HANG_UP)
        if "Transfer-Encoding" in request.headers and request.version < (1, 1):  # RFC 9112 6.1: faulty framing
            raise Refused(400, "HTTP/1.0 has no Transfer-Encoding", HANG_UP)
        config, (route, _, rest) = self._settings(), target[1:].partition("/")
        if "Via" in request.headers and via(target) in request.headers["Via"]:
            raise Refused(508, "the provider has no replica of this function", {"X-Openfaas-Internal": "gateway"})
        calls = route in ("function", "async-function", "r")
        guarded = config.auth.invoke if calls else target.partition("?")[0] not in ("/healthz", "/readyz")
        if config.auth.login and guarded:
            kind, _, given = request.headers.get("Authorization", "").partition(" ")
            found = f"{kind.title()} {given.strip()}".encode(errors="replace")
            if not hmac.compare_digest(found, config.auth.login.encode()):
                raise Refused(401, "credentials are needed", {"WWW-Authenticate": 'Basic realm="Restricted"'})
        if not calls:
            ours = route != "system" or re.match(r"(calls|queues)\b", rest)  # the rest there is OpenFaaS's REST API
            return await (self._operator.handle if ours else self._rest)(request, target)
        if route == "async-function" and request.method == "DELETE":
            await self._queue.cancel(unquote(rest.partition("?")[0]))
            return web.Response(status=202)
        if route == "async-function" and request.method != "POST":
            line = "there is nothing to GET from a queued call (POST, DELETE): see /system/calls/{call-id}"
            raise Refused(405, line, {"Allow": "POST, DELETE"})
        app, _, rest = rest.partition("/") if route == "r" else (None, "", rest)  # Fn Project, 2017: /r/{app}/{route}
        name, rest = split_target(rest)
        function = await self._functions.find(name, stale=route == "async-function")
        if function is None:
            raise Refused(404, "no such function: it is not in the configuration, nor at a provider")
        if route == "async-function" or (app is not None and function.type == "async"):
            return await self._async(request, function, rest, app and unquote(app))
        return await self._sync(request, function, rest)

    def _headers(self, request: web.BaseRequest, call_id: str, start_time: int) -> list[tuple[bytes, bytes]]:
        """What goes to the function: the caller's end-to-end headers and ours."""
        given, for_us = request.headers, self._settings().auth.invoke
        headers = forward_headers(request.raw_headers, COMPUTED | {b"authorization"} if for_us else COMPUTED)
        hops = ", ".join(filter(None, [*given.getall("X-Forwarded-For", ()), request.remote]))
        headers += [(b"X-Call-Id", call_id.encode()), (b"X-Start-Time", b"%d" % start_time)]
        if hops:
            headers.append((b"X-Forwarded-For", hops.encode("utf-8", "surrogateescape")))
        if "X-Forwarded-Host" not in given and (host := given.get("Host")):
            headers.append((b"X-Forwarded-Host", host.encode("utf-8", "surrogateescape")))
        return headers

    async def _chunks(self, request: web.BaseRequest, most: int | None = None) -> AsyncIterator[bytes]:
        """The body as it comes in, each piece within read_timeout; or all of it, up to `most`. Raises Refused."""
        loop, limit = asyncio.get_running_loop(), self._settings().gateway.read_timeout
        if request.headers.get("Expect", "").lower() == "100-continue":  # RFC 9110 10.1.1: the client waits to be asked
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # the response itself has not begun
        until, length = loop.time() + limit, 0
        try:
            while most is None or length <= most:
                async with asyncio.timeout_at(loop.time() + limit if most is None else until):
                    chunk = await request.content.readany()
                if not chunk:
                    return
                length += len(chunk)
                yield chunk
        except TimeoutError:
            raise Refused(408, "no body within gateway.read_timeout", {"Connection": "close"}) from None
        except (aiohttp.ClientError, web.RequestPayloadError, aiohttp.http_exceptions.HttpProcessingError):
            raise Refused(400, "the request's body is not valid HTTP", {"Connection": "close"}) from None

    async def _body(self, request: web.BaseRequest, limit: int) -> bytes:
        """The whole body, refused as soon as it is known to be too long."""
        if (request.content_length or 0) <= limit:
            if request.content.is_eof():  # it came with the headers
                body = request.content.read_nowait()
            else:
                body = b"".join([chunk async for chunk in self._chunks(request, limit)])
            if len(body) <= limit:
                return body
        raise Refused(413, f"the body is longer than gateway.max_payload ({limit} bytes)")

    # -- /function
    async def _sync(self, request: web.BaseRequest, function: Function, rest: str) -> Reply:
        start_time, slots = time.time_ns(), self._functions.slots
        call_id = parsed(request.headers, CALL_ID).get("X-Call-Id") or new_id()
        ours = {"X-Call-Id": call_id, "X-Start-Time": str(start_time)}
        await self._functions.awake(function)
        if slots.full(function.key):
            raise Refused(429, f"function {function.name} is at its max_inflight", {"Retry-After": "1", **ours})
        with slots.hold(function.key), self._metrics.counted(function.key) as status:
            try:
                length = request.content_length if request.body_exists else 0
                small = length is not None and length <= SMALL_BODY_BYTES
                body = await self._body(request, SMALL_BODY_BYTES) if small else self._chunks(request)
                ask = Ask(request.method, rest, self._headers(request, call_id, start_time), body)
                response = await self._answer(request, function, ask, ours)
            except Refused as exc:
                status.append(exc.status)
                exc.headers.update(ours)
                raise
            status.append(response.status)
        log_with(logging.DEBUG, "sync call ended", call_id=call_id, function=function.name, http_status=response.status)
        return response

    async def _answer(self, request: web.BaseRequest, function: Function, ask: Ask, ours: dict[str, str]) -> Reply:
        """Call and answer, streaming both ways. A client that goes away cancels this, and so ends the call."""
        config, started, loop = self._settings().gateway, time.perf_counter(), asyncio.get_running_loop()
        limit = config.upstream_timeout if function.namespace else None  # the provider itself may stream logs for ever
        response, transport = None, request.transport
        assert transport
        try:
            if function.command:
                outcome = await run_command(function, ask, config.upstream_timeout, MAX_RESPONSE_BYTES)
                headers = {**as_multidict(outcome.headers), **ours, "X-Duration-Seconds": f"{outcome.duration_s:.6f}"}
                return web.Response(status=outcome.status, headers=headers, body=outcome.body)
            async with asyncio.timeout(limit), self._functions.request(function, ask) as answer:
                given = as_multidict(forward_headers(answer.raw_headers, frozenset()))
                given.update(ours)  # in place of those that the function sent
                given.setdefault("X-Duration-Seconds", f"{time.perf_counter() - started:.6f}")
                status = answer.status if answer.status >= 200 else 502  # no other protocol through us
                response = Answer(status=status, reason=re.sub("[^ -~]", "?", answer.reason or ""), headers=given)
                await response.prepare(request)
                while chunk := await answer.content.readany():
                    timer = loop.call_later(config.write_timeout, transport.abort)  # for a client that takes nothing
                    await response.write(chunk)
                    timer.cancel()
                await response.write_eof()
                return response
        except NO_ANSWER as exc:
            if isinstance(exc.__cause__, Refused):  # the client's body could not be read
                raise exc.__cause__ from None
            outcome = failure(exc, f"function {function.name}", 0.0, function)
            if not transport.is_closing():
                log_with(logging.WARNING, "sync call failed", error=outcome.error, call_id=ours.get("X-Call-Id"))
            if response is None:
                raise Refused(outcome.status, outcome.error or "no answer") from None
            transport.abort()  # so that the client sees that the answer is not whole
            return response

    # -- /system: OpenFaaS's REST API
    def _described(self, function: Function) -> dict[str, Any]:
        shown = {name: getattr(function, name) for name in ("name", "namespace", "labels", "annotations")}
        counted = {"invocationCount": self._metrics.invocations[function.key]}
        return {**shown, "image": "", "replicas": 1, "availableReplicas": 1, **counted}

    async def _rest(self, request: web.BaseRequest, target: str) -> Reply:
        """The functions of the file can be read; everything else is the provider's, if there is one."""
        config, functions, (path, _, query) = self._settings(), self._functions, target.partition("?")
        _, _, route, name, *_ = f"{path}//".split("/")
        provided, reads = config.provider.url is not None, request.method in ("GET", "HEAD")
        namespace = dict(parse_qsl(query)).get("namespace") or config.gateway.namespace
        own = config.functions if namespace == config.gateway.namespace else {}
        if route == "alert":
            raise Refused(501, "this gateway does not scale on alerts: it scales functions up when they are called")
        if not provided and not reads:
            raise Refused(405, "functions are defined in the TOML file: change that and reload", {"Allow": "GET"})
        if reads and route == "function" and name in own:
            return reply(self._described(own[name]))
        if provided and reads and route not in ("info", "functions"):
            ask = Ask(request.method, target, forward_headers(request.raw_headers, COMPUTED), b"")
            return await self._answer(request, functions.provider(), ask, {})
        version = {"sha": "", "release": VERSION}
        found: dict[str, Any] = {"functions": [], "namespaces": [config.gateway.namespace], "secrets": []}
        found["info"] = {"provider": "faasd-async", "orchestration": "processes", "version": version}
        if provided:
            body, method = await self._body(request, config.gateway.max_payload), "GET" if reads else request.method
            answer = await functions.ask(method, target, body, config.gateway.upstream_timeout)
            functions.changes += not reads
            if not reads or answer.status != 200:
                deployed = answer.status == 200 and route == "functions" and method != "DELETE"
                status = 202 if deployed else answer.status  # as gateways say it
                return web.Response(status=status, body=answer.body, headers=as_multidict(answer.headers))
            found[route] = json.loads(answer.body)
        elif route == "logs":
            return web.Response(content_type="application/x-ndjson")
        elif route not in found:
            raise Refused(404, "no such function: it is not in the configuration")
        if route == "info":
            return reply({"provider": found[route], "version": version, "arch": os.uname().machine})
        if route == "functions":
            for item in found[route]:
                item["invocationCount"] = self._metrics.invocations[f"{item['name']}.{item['namespace']}"]
            others = (item for item in found[route] if item["name"] not in own)
            return reply([*map(self._described, own.values()), *others])
        return reply(found[route])

    # -- /async-function
    async def _async(self, request: web.BaseRequest, function: Function, rest: str, app: str | None) -> web.Response:
        """Queue a call. Fn's route, which has an app, takes any method and answers in JSON."""
        start_time = time.time_ns()
        config, now, own = self._settings(), start_time / 1e9, new_id()
        asked = parsed(request.headers, self._controls).get
        call_id = asked("X-Call-Id", own)
        queue = asked("X-Queue") or function.queue
        body = await self._body(request, config.gateway.max_payload)
        call = Invocation(
            own, call_id, function.name, function.namespace, queue, start_time,
            max(now, asked("X-Delay", now), asked("X-Not-Before", now)), asked("X-Deadline"),
            asked("X-Max-Attempts") or function.retry.attempts, asked("X-Callback-Url"),
            asked("X-Failure-Callback-Url"), asked("Idempotency-Key"), app, rest,
            pack_headers(self._headers(request, call_id, start_time)), body,
        )  # fmt: skip
        call_id = await self._queue.enqueue(call)
        self._metrics.submitted(queue).inc()
        headers = {"X-Call-Id": call_id, "X-Start-Time": str(start_time)}
        headers["Location"] = f"/system/calls/{call_id if call_id is own else quote(call_id, safe='')}"
        if app is not None or "application/json" in request.headers.get("Accept", ""):
            return reply({"call_id": call_id}, 202, headers)
        return web.Response(status=202, headers=headers)


# --- Daemon: puts the parts together, owns their lifecycle ----------------------------------------------------------


class Daemon:
    """The composition root. `run()` returns the exit code."""

    def __init__(self, config: Config, path: str | None) -> None:
        self.config, self._path = config, path
        self._consumers: dict[str, Consumer] = {}
        self._exit_code = 0
        self._stop = asyncio.Event()  # first signal, or a task that failed
        self._hurry = asyncio.Event()  # second signal, or drain_timeout
        settings: Settings = lambda: self.config  # noqa: E731
        self.metrics = Metrics()
        self.queue: Queue = SqliteQueue(store_path(config), settings, self.metrics)
        self.functions = Functions(settings)
        self.operator = Operator(settings, self.queue, self.functions, self.metrics)
        self.gateway = Gateway(settings, self.queue, self.functions, self.metrics, self.operator)
        self.invoker = Invoker(settings, self.functions, self.metrics)
        self.sender = CallbackSender(settings, self.metrics)
        self.functions.slots.freed = lambda: [consumer.wake() for consumer in self._consumers.values()]
        self.operator.inflight = lambda: {name: len(consumer.running) for name, consumer in self._consumers.items()}

    async def run(self) -> int:
        """Start everything, serve until a signal, stop in order."""
        async with contextlib.AsyncExitStack() as stack:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._terminate)
            loop.add_signal_handler(signal.SIGHUP, self._reload)
            await self.queue.open(self._wake, self._cancel, self._final)
            stack.push_async_callback(self.queue.close)
            await self.functions.open(stack)
            server = Server(
                self.gateway.handle, handler_cancellation=True, auto_decompress=False, access_log=None, logger=log,
                keepalive_timeout=self.config.gateway.read_timeout, max_line_size=MAX_HEADER_BYTES,
                max_field_size=MAX_HEADER_BYTES,
            )  # fmt: skip
            runner = web.ServerRunner(server, shutdown_timeout=0.1)  # the drain comes before
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await self._listen(runner)
            await self.sender.open(stack)
            for name in (*self.config.queues, *await self.queue.stats(), CALLBACKS):
                self._consumer(name)
            side = [asyncio.create_task(job(), name=job.__name__[1:]) for job in (self._housekeeping, self._watchdog)]
            for task in side:
                task.add_done_callback(self._ended)
            sd_notify("READY=1\nSTATUS=accepting calls")
            await self._stop.wait()
            await self._drain(runner, server)
            for task in side:
                task.cancel()
            await asyncio.gather(*side, return_exceptions=True)
        log.info("stopped")
        return self._exit_code

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task has ended that the daemon can't do without: stop, unless that is why."""
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.critical("%s failed, stopping", task.get_name(), exc_info=failure)
            self._exit_code = 1
            self._stop.set()

    async def _listen(self, runner: web.ServerRunner) -> None:
        """Listen on the sockets that systemd passed (sd_listen_fds(3)), else on gateway.listen. Raises ConfigError."""
        fds = range(3, 3 + int(os.getenv("LISTEN_FDS", "0"))) if os.getenv("LISTEN_PID") == str(os.getpid()) else ()
        for fd in fds:
            os.set_inheritable(fd, False)  # by commands
        sites: list[web.BaseSite] = [web.SockSite(runner, socket.socket(fileno=fd), backlog=1024) for fd in fds]
        for address in () if fds else self.config.gateway.listen:
            host, _, port = address.rpartition(":")
            if address.startswith("unix:"):
                sites.append(web.UnixSite(runner, address[5:]))  # which replaces a socket that was left there
            else:
                sites.append(web.TCPSite(runner, host.strip("[]") or None, int(port), backlog=1024))
        for site in sites:
            try:
                await site.start()
            except OSError as exc:
                raise ConfigError([f"gateway.listen: {site.name}: {exc.strerror or exc}"]) from exc
        own = []
        for name in runner.addresses:
            host = f"[{name[0]}]" if ":" in name[0] else name[0]
            own.append(f"http://{host}:{name[1]}" if isinstance(name, tuple) else f"unix:{name}")
            log.info("listening on %s", own[-1])
        self.sender.own_address = min(own)  # http before unix; to connect to 0.0.0.0 or [::] reaches ourselves

    # -- consumers and what the queue tells
    def _consumer(self, name: str) -> Consumer:
        """One for each queue that has a name somewhere, and one for callbacks."""
        if name not in self._consumers:
            if name not in (*self.config.queues, CALLBACKS):
                log.warning("queue %s has calls but is not in the configuration: it runs with the defaults", name)
            self._consumers[name] = Consumer(name, self.queue, self.sender if name == CALLBACKS else self.invoker)
            self._consumers[name].dispatcher.add_done_callback(self._ended)
        return self._consumers[name]

    def _wake(self, name: str) -> None:
        if self._consumers:  # else it begins with a look into its queue
            self._consumer(name).wake()

    def _cancel(self, token: int) -> None:
        for consumer in self._consumers.values():
            consumer.cancel(token)

    def _final(self, call: Ended) -> None:
        self.operator.final(call.call_id)
        self.metrics.calls(call.status).inc()
        log_with(logging.INFO, "call ended", **call._asdict())

    async def _housekeeping(self) -> None:
        """Prune what is past its time."""
        while True:
            with contextlib.suppress(StoreError):  # the queue keeps the reason for /readyz
                while await self.queue.prune():
                    pass
            await asyncio.sleep(HOUSEKEEPING_S)

    async def _watchdog(self) -> None:
        """Tell systemd that we are alive, but only after the event loop and the queue's writer both answered, and
        not when only a restart can help."""
        while usec := int(os.environ.get("WATCHDOG_USEC", 0)):
            with contextlib.suppress(StoreError):  # it answered
                stats = await self.queue.stats()
                waiting = sum(sum(item.waiting.values()) for item in stats.values())
                running = sum(len(consumer.running) for consumer in self._consumers.values())
                sd_notify(f"STATUS={waiting} calls and callbacks waiting, {running} running")
            if self.queue.stalled() is None:
                sd_notify("WATCHDOG=1")
            await asyncio.sleep(usec / 2e6)

    def _terminate(self) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()

    def _reload(self) -> None:
        """Take over functions, queues, retry, callback, calls and log; the rest needs a restart."""
        try:
            new = load_config(self._path)
        except ConfigError as exc:
            for line in (*exc.problems, "configuration not reloaded: the old settings stay"):
                log.error("%s", line)
            return
        kept = {name: getattr(self.config, name) for name in ("gateway", "auth", "provider", "store")}
        self.config = replace(new, **kept)
        setup_logging(new.log)
        for name in [name for name, old in kept.items() if getattr(new, name) != old]:
            log.warning("[%s] has changed: that needs a restart", name)
        for name in {*new.queues, *self._consumers}:
            self._wake(name)
        log.info("configuration reloaded")

    async def _drain(self, runner: web.ServerRunner, server: Server) -> None:
        """Stop listening and claiming, let what runs end within drain_timeout, queue the rest again."""
        sd_notify("STOPPING=1\nSTATUS=waiting for running functions")
        log.info("stopping: waiting up to %.0f s for running functions", self.config.gateway.drain_timeout)
        self.operator.drain()
        asyncio.get_running_loop().call_later(self.config.gateway.drain_timeout, self._hurry.set)
        hurried = asyncio.create_task(self._hurry.wait())  # asyncio.Runner cancels it
        stops = [consumer.stop(hurried) for consumer in self._consumers.values()]  # first, or one more call may begin
        await asyncio.gather(*stops, *(site.stop() for site in runner.sites))
        # Who has connected but not asked yet can't know that we stop, and gets a second.
        until, requests, asked = time.monotonic() + 1.0, self.gateway.requests, self.gateway.asked
        while not hurried.done() and (requests or (time.monotonic() < until and not asked >= {*server.connections})):
            await asyncio.wait({*requests, hurried}, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)


# --- Command line ---------------------------------------------------------------------------------------------------
# `serve` and `check` work here; the rest is a thin HTTP client of a running daemon, which stays the only authority


class Command:
    """The commands, with the arguments of one; the daemon it is for is found as the configuration or the flags say."""

    # Tables of 80 columns at most; --json has everything whole.
    CALL, QUEUE = "{:36.36}  {:9}  {:14.14}  {:>3}  {:>4}  {:>4}\n", "{:34.34}  {:>7}  {:>7}  {:>5}  {:>6}  {}\n"

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.config = args, load_config(args.config)
        flags = {"user_file": args.user_file, "password_file": args.password_file}
        auth = parse_config({"auth": flags}).auth if any(flags.values()) else self.config.auth
        address = self.config.gateway.listen[0]  # to connect to 0.0.0.0 or [::] reaches this machine
        self._url = args.url or (address if address.startswith("unix:") else f"http://{address}")
        userinfo, _, server = self._url.partition("://")[2].rstrip("/").rpartition("@")
        user, _, password = unquote(userinfo).partition(":")
        self._server, login = server or "localhost", aiohttp.encode_basic_auth(user, password) if user else auth.login
        self._login = {"Authorization": login} if login else {}

    def write(self, body: bytes | str) -> None:
        """To standard output, as it is."""
        sys.stdout.buffer.write(body.encode() if isinstance(body, str) else body)
        sys.stdout.buffer.flush()

    def brief(self, seconds: float | None) -> str:
        """A duration in at most four characters: 0.3s, 12s, 5m, 3h, 20d."""
        for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
            if seconds is not None and seconds >= length:
                return f"{seconds // length:.0f}{unit}"
        return "-" if seconds is None else f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"

    def ask(self, request: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
        """The body that answers "METHOD PATH". Raises Refused for what the daemon refuses; its absence has status 0."""
        kind = http.client.HTTPSConnection if self._url.startswith("https:") else http.client.HTTPConnection
        method, _, path = request.partition(" ")
        try:
            with contextlib.closing(kind(self._server)) as connection:
                if self._url.startswith("unix:"):
                    connection.sock = socket.socket(socket.AF_UNIX)
                    connection.sock.connect(self._url[5:])
                connection.request(method, path, body, {"User-Agent": USER_AGENT, **self._login, **(headers or {})})
                answer = connection.getresponse()
                found = answer.read()
        except (OSError, ValueError, http.client.HTTPException) as exc:
            reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
            raise Refused(0, f"the daemon at {show_url(self._url)} can't be reached: {reason}") from None
        if answer.status >= 300:
            raise Refused(answer.status, found.decode(errors="replace").strip() or f"{answer.status} {answer.reason}")
        return found

    def record(self, call_id: str, wait: bool) -> dict[str, Any]:
        """A call's record; with `wait`, once that is final."""
        request = f"GET /system/calls/{quote(call_id, safe='')}" + ("?wait=60s" if wait else "")
        while (found := json.loads(self.ask(request)))["status"] not in FINAL and wait:
            pass
        return dict(found)

    def records(self, limit: int) -> list[dict[str, Any]]:
        """Up to `limit` records that match the filters of the command line, newest first."""
        args, found = vars(self.args), list[dict[str, Any]]()
        query = {name: args[name] for name in ("status", "function", "queue") if args[name]}
        while len(found) < limit and query.get("cursor", "") is not None:
            query["limit"] = str(min(1000, limit - len(found)))
            page = json.loads(self.ask("GET /system/calls?" + urlencode(query)))
            found, query["cursor"] = found + page["calls"], page["next_cursor"]
        return found

    def list_calls(self) -> None:
        """Newest first; with --watch then those that are new or have changed, as they do."""
        args, limit, seen = self.args, self.args.limit or 20, list[dict[str, Any]]()
        found = self.records(limit)
        if args.json and not args.watch:
            return self.write(json.dumps({"calls": found}) + "\n")
        self.write("" if args.json else self.CALL.format("CALL ID", "STATUS", "FUNCTION", "RUN", "AGE", "TOOK"))
        while True:
            for call in [call for call in found if call not in seen][:: -1 if args.watch else 1]:
                cells = [call[name] for name in ("call_id", "status", "function", "attempts")]
                age_s = time.time() - parse_when(call["created_at"])
                cells += map(self.brief, (age_s, call["duration_seconds"]))
                self.write(json.dumps(call) + "\n" if args.json else self.CALL.format(*cells))
            if not args.watch:
                return None
            time.sleep(1.0)
            seen, found = found, self.records(limit)

    def show_call(self) -> None:
        """The record, in JSON."""
        self.write(json.dumps(self.record(self.args.id, self.args.wait), indent=2) + "\n")

    def send(self) -> None:
        """One request, whose answer is printed as it is."""
        self.write(self.ask(self.args.request.format(quote(self.args.id, safe=""))))

    def change(self) -> None:
        """Cancel or retry, one by one. Raises Refused at the end if some could not be, each told on standard error."""
        ids, status, missed = self.args.ids, self.args.status, 0
        if bool(ids) == bool(status):
            raise Refused(400, "which calls? Give call ids (- reads them from standard input), or --status")
        ids = [call["call_id"] for call in self.records(10**9)] if status else ids
        for call_id in dict.fromkeys(sys.stdin.read().split() if ids == ["-"] else ids):
            try:
                self.ask(self.args.request.format(quote(call_id, safe="")))
                self.write(call_id + "\n")
            except Refused as exc:
                if exc.status not in (404, 409, 410):
                    raise
                print(f"{call_id}: {exc.text}", file=sys.stderr)
                missed += 1
        if missed:
            raise Refused(409, f"not done for {missed} calls")

    def list_queues(self) -> None:
        """The last one is the callback sender's."""
        body, as_is = self.ask("GET /system/queues"), self.args.json
        self.write(body if as_is else self.QUEUE.format("QUEUE", "WAITING", "RUNNING", "LIMIT", "OLDEST", "STATE"))
        for queue in () if as_is else json.loads(body)["queues"]:
            cells = [queue[name] for name in ("name", "depth", "inflight", "max_inflight")]
            cells += [self.brief(queue["oldest_seconds"]), "paused" if queue.get("paused") else "-"]
            self.write(self.QUEUE.format(*cells))

    def invoke(self) -> None:
        """Print the answer; with --async the call's id; with --wait the output, once the call has ended."""
        args, piped = self.args, "" if sys.stdin.isatty() else "-"
        source = piped if args.data is None else args.data
        try:
            path = Path("/dev/stdin" if source in ("-", "@-") else source[1:])
            body = path.read_bytes() if source == "-" or source.startswith("@") else source.encode()
        except OSError as exc:
            raise Refused(400, f"--data {source}: {exc.strerror}") from None
        headers = {name.strip(): value.strip() for name, _, value in (item.partition(":") for item in args.header)}
        if not args.queued and not args.wait:
            return self.write(self.ask(f"POST /function/{args.id}", body, headers))
        answer = self.ask(f"POST /async-function/{args.id}", body, {**headers, "Accept": "application/json"})
        call_id = json.loads(answer)["call_id"]
        if not args.wait:
            return self.write(answer if args.json else call_id + "\n")
        found = self.record(call_id, wait=True)
        self.write(self.ask(f"GET /system/calls/{quote(call_id, safe='')}/log"))
        if found["status"] != "success":
            raise Refused(500, f"call {call_id} ended in {found['status']}: {found['error']}")
        return None

    def serve(self) -> int:
        """Run the daemon until a signal."""
        config = self.config
        if listen := self.args.listen and parse_config({"gateway": {"listen": self.args.listen}}).gateway.listen:
            config = replace(config, gateway=replace(config.gateway, listen=listen))
        setup_logging(config.log)
        os.environ.setdefault("UV_THREADPOOL_SIZE", "64")  # or a few names that no one answers for stop all connecting
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None) as runner:
            return runner.run(Daemon(config, self.args.config).run())

    def check(self) -> None:
        """Check a configuration file."""
        functions, queues = len(self.config.functions), len(self.config.queues)
        print(f"{self.args.config or 'defaults'}: ok, {functions} functions, {queues} queues")


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "--config": {"metavar": "FILE", "help": "TOML file; without it all defaults"},
    "--listen": {"metavar": "ADDRESS", "help": "instead of gateway.listen"},
    "--url": {"help": "where the daemon is: http://HOST:PORT or unix:/path, instead of gateway.listen"},
    "--user-file": {"metavar": "FILE", "help": "instead of auth.user_file"},
    "--password-file": {"metavar": "FILE", "help": "instead of auth.password_file"},
    "--json": {"action": "store_true", "help": "JSON instead of a table or a line"},
    "--status": {"metavar": "STATUS", "choices": STATUSES, "help": "one of " + ", ".join(STATUSES)},
    "--function": {"metavar": "NAME", "help": "only calls of this function"},
    "--queue": {"metavar": "NAME", "help": "only calls of this queue"},
    "--limit": {"metavar": "N", "type": int, "help": "at most so many (20)"},
    "--watch": {"action": "store_true", "help": "go on with calls that are new or have changed, until Ctrl-C"},
    "--wait": {"action": "store_true", "help": "until the call has ended"},
    "--async": {"action": "store_true", "dest": "queued", "help": "queue the call and print its id"},
    "--data": {"metavar": "TEXT", "help": "the body; @FILE: a file's; - (or no --data in a pipe): standard input"},
    "-H": {"metavar": "'NAME: VALUE'", "action": "append", "dest": "header", "help": "a header, repeatable"},
    "id": {"metavar": "ID", "help": "a call's id, or the name of the queue or function"},
    "ids": {"metavar": "ID", "nargs": "*", "help": "call ids; - reads them from standard input"},
}
WHICH, WHERE = "--status --function --queue", "--config --url --user-file --password-file"
LIST, IDS = f"{WHICH} --limit --watch --json {WHERE}", f"ids {WHICH} {WHERE}"
COMMANDS: Sequence[tuple[str, Callable[[Command], int | None], str, str, str]] = (
    ("", Command.serve, "", "Run functions in the background on one machine.", "--config --listen"),
    ("serve", Command.serve, "", "run the daemon (what happens without a command)", "--config --listen"),
    ("check", Command.check, "", "check a configuration file", "--config"),
    ("calls", Command.list_calls, "", "list calls, or what ACTION says", LIST),
    ("calls list", Command.list_calls, "", "list calls, newest first", LIST),
    ("calls show", Command.show_call, "", "print a call's record", f"id --wait --json {WHERE}"),
    ("calls log", Command.send, "GET /system/calls/{}/log", "print what a call's function wrote", f"id {WHERE}"),
    ("calls cancel", Command.change, "DELETE /async-function/{}", "cancel calls by id, or by filter", IDS),
    ("calls retry", Command.change, "POST /system/calls/{}/retry", "run finished calls again by id, or by filter", IDS),
    ("queues", Command.list_queues, "", "list queues, or what ACTION says", f"--json {WHERE}"),
    ("queues list", Command.list_queues, "", "list queues", f"--json {WHERE}"),
    ("queues pause", Command.send, "POST /system/queues/{}/pause", "hold a queue's calls", f"id {WHERE}"),
    ("queues resume", Command.send, "POST /system/queues/{}/resume", "let them run again", f"id {WHERE}"),
    ("queues purge", Command.send, "POST /system/queues/{}/purge", "cancel what waits in a queue", f"id {WHERE}"),
    ("invoke", Command.invoke, "", "call a function", f"id --data -H --async --wait --json {WHERE}"),
)
EXIT = "Exit codes: 0 done; 1 failed or refused; 2 usage; 69 no daemon; 75 try again; 77 credentials; 78 configuration."


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; its --help is the manual. Every fatal error ends here, as one line and an exit code."""
    top = argparse.ArgumentParser(prog="faasd-async", description=COMMANDS[0][3], epilog=EXIT)
    top.add_argument("--version", action="version", version=f"faasd-async {VERSION}")
    groups: dict[str, Any] = {}
    for words, run, request, summary, options in COMMANDS:
        group, _, action = words.rpartition(" ")
        sub = groups[group].add_parser(action, help=summary, description=summary, epilog=EXIT) if words else top
        for option in options.split():
            sub.add_argument(option, default=argparse.SUPPRESS, **OPTIONS[option])
        sub.set_defaults(run=run, request=request)
        if words in ("", "calls", "queues"):
            groups[words] = sub.add_subparsers(metavar="ACTION" if words else "COMMAND")
    top.set_defaults(queued=False, header=(), **{name.strip("-").replace("-", "_"): None for name in OPTIONS})
    args = top.parse_args(argv)
    # At once: an exception could come up where Python ignores it. The daemon has a handler of its own.
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    try:
        return args.run(Command(args)) or 0
    except (ConfigError, StoreError, Refused) as exc:
        print(exc if isinstance(exc, ConfigError) else f"faasd-async: {exc}", file=sys.stderr)
        # sysexits.h: a configuration error is not worth a restart (RestartPreventExitStatus=78), a locked file is.
        codes: dict[object, int] = {ConfigError: 78, StoreLocked: 75, 0: 69, 401: 77, 429: 75, 503: 75}
        return codes.get(getattr(exc, "status", type(exc)), 1)
    except BrokenPipeError:  # who reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


if __name__ == "__main__":
    sys.exit(main())
