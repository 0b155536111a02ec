#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14,<3.15",
#     "cronsim>=2.6",
#     "nats-py>=2.16,<2.17",
#     "prometheus-client>=0.20",
#     "tzdata>=2025.1",
#     "uvloop>=0.21; platform_machine in 'x86_64 aarch64 arm64'",
# ]
# ///
"""faasd-async: run functions in the background on one small machine.

One process hosts an OpenFaaS-compatible gateway, a durable queue, its consumers and a callback
sender:

    client ──HTTP──► front ──► intake ──Invocation──► queue ──Claim──► consumer ──► function
                       │                                ▲                │
                       └─ /function/…                   └────Outcome─────┴──► X-Callback-Url
                          straight through

The guarantee
    A 202 leaves only after the invocation is committed and synced to disk. An accepted call ends in
    exactly one final state; a crash in the middle of an attempt leads to another attempt, which the
    record shows (`interrupted`). A call's outcome and its pending callback are committed together,
    before the callback is sent.

Vocabulary
    function    an HTTP server or a program, NAME.NAMESPACE
    call        one request to a function; it has an id, and a call id that calls may share
    invocation  a call as it was accepted into a queue
    queue       calls that share a concurrency and a time limit
    lane        the calls of one function in a queue, or the callbacks to one host; lanes take turns
    claim       work handed to a consumer, with a receipt that names this claim and no other
    key         X-Concurrency-Key: of a function's calls with the same one, one runs at a time
    rate        how many calls of a function or a queue may start in a time, spread over it
    attempt     one run of a function for a call, from 1; its result is an outcome
    callback    the POST of a call's outcome to a URL; its attempts are deliveries
    schedule    has a function called by the clock, at its instants; an instant is settled once it
                was fired, skipped or missed
    provider    faasd, which has functions that the file does not name

States of a call
    delayed     queued, and not due yet: by the caller's wish, or before another attempt
    queued      due
    running     claimed
    success · error · timeout · cancelled: final. What may be left is its callback, which is
                none · pending · delivered · failed

A call's life, by the names below
    Front.answer guards the request and finds the route, FunctionRoutes.queue reads it,
    Intake.invocation makes an Invocation of it, WorkQueue.enqueue stores it: 202.
    A request like one before it takes a shorter way to the same end: Front.store.
    Consumer claims it (WorkQueue.claim), Invoking has FunctionCaller run the function, Settler asks
    `decide` what follows: WorkQueue.complete or WorkQueue.retry.
    A completed call with a callback URL is claimed again, from the queue CALLBACKS, by a Consumer
    whose job is CallbackJob: Delivering sends it.
    All the time CallRoutes shows its record, and CallRecords can cancel it or queue it again.

Who owns which task or thread
    Daemon             its chores: housekeeping, watchdog, Scheduler, ProvidedSchedules; at a stop
                       the last answers, and who gives up bodies that do not come. A chore that
                       fails stops the daemon, as a dispatcher does
    Scheduler          one for each schedule that is due; `run` awaits them
    Consumer           its dispatcher, and one for each attempt that is not plain or takes longer
                       than PLAIN_S; `stop` awaits all of them
    Settler            one for each outcome that could not be stored yet; `wait` awaits them
    FunctionDirectory  one for each look-up or scale-up under way; who asked awaits it
    HttpRequest        one that sends its body, if that is streamed; awaited at the end of the block
                       of HttpResponse, or where no answer has come
    Conversation       one from its first request on; Server.drain waits until it has answered,
                       `close` awaits it
    Acceptor           one for each client until its connection is there; `settle` awaits them
    CheckedResolver    a thread for each name that is being looked up; a stop waits for none
    Program            one that feeds it; `talk` awaits it
    CommandRunner      a thread for each start of a program, and for the end of one whose call has
                       gone; a stop waits for none
    BackupRoutes,      a thread for each piece of a copy, and for each scrape; the request awaits
    QueueRoutes        it, and a stop does not
    Reloader           a thread for each reading of the file; a stop waits for none
    end_abandoned      at the start a thread, which it waits for as long as that is worth it
    first_connected    one for each address that is tried; it awaits them
    Writer             one thread, which alone touches SQLite once it is open; `close` joins it.
                       While it makes a copy, one that has the copy's pieces written to disk
    NatsKeeper         lanes, leases, deadlines, news of changes, room; its `stop` awaits all five
    nats-py            its own, one for each subscription among them; NatsLink.close ends them

Units: `*_s` seconds as float, `*_at` Unix time in seconds, `*_deadline` and `until` monotonic,
`*_bytes` sizes, `start_time` Unix time in nanoseconds. A section uses no name of a later one.
"""

from __future__ import annotations

import sys

if sys.version_info >= (3, 11):  # noqa: UP036
    import tomllib
else:  # A line instead of a traceback: nothing above or below is a syntax error to Python 3.9.
    version = ".".join(map(str, sys.version_info[:3]))
    text = f"Python 3.11 or later is needed, and {sys.executable} is Python {version}"
    sys.exit(f"faasd-async: {text}")

if __name__ == "__main__" or sys.argv[0].endswith("faasd-async"):
    # A reload may be asked for while all that follows is imported, which takes seconds on a small
    # host, and would be the end of the program. It has to wait.
    import signal

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

import argparse
import asyncio
import base64
import bisect
import codecs
import contextlib
import ctypes
import difflib
import email.utils
import enum
import errno
import functools
import gc
import gzip
import hashlib
import heapq
import hmac
import http.client
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import string
import struct
import subprocess
import threading
import time
import weakref
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Container,
    Coroutine,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    NamedTuple,
    NoReturn,
    Protocol,
    TextIO,
    TypeAlias,
    TypedDict,
    TypeVar,
    TypeVarTuple,
    Unpack,
    cast,
    get_type_hints,
    overload,
    runtime_checkable,
)
from urllib.parse import parse_qs, quote, unquote, unquote_to_bytes, urlencode, urlsplit

try:
    import yarl
    from cronsim import CronSim, CronSimError
    from multidict import CIMultiDict, CIMultiDictProxy
except ImportError as exc:
    sys.exit(
        f"faasd-async: {exc}: install what it needs with `pip install .` beside pyproject.toml, "
        "or start the file with `uv run`, which reads what that is from its first lines"
    )

try:
    import uvloop
except ImportError:
    # There is no wheel for this platform (armv7l): asyncio's own loop does the job.
    uvloop = None  # type: ignore[assignment]

if TYPE_CHECKING:
    # To import these takes as long as all else together, and most commands do without them: see
    # `import_libraries`. nats-py is imported where the queue is on NATS.
    import nats.aio.client
    import nats.aio.msg
    import prometheus_client
    from aiohttp.http_exceptions import BadHttpMethod, HttpProcessingError, LineTooLong
    from aiohttp.http_parser import (
        HttpRequestParser,
        HttpResponseParser,
        RawRequestMessage,
        RawResponseMessage,
    )
    from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )

# --- Constants ------------------------------------------------------------------------------------

VERSION = "0.1.0"
RELEASED = "2026-11-27"
USER_AGENT = f"faasd-async/{VERSION}"
SERVER = "faasd-async"  # No versions: who asks need not know what to look for.
OWN_VERSION = {"sha": "", "release": VERSION}  # as faas-cli shows it
DEFAULT_QUEUE = "faas-request"
# The callback sender's own queue; no queue in the file can have this name.
CALLBACKS = "@callbacks"

OLDEST_AIOHTTP = (3, 14)

KIB = 1024
MIB = 1024 * KIB

# Limits of one request or answer. nginx allows four header lines of 8 KiB.
MAX_HEADER_BYTES = 32 * KIB
MAX_RESPONSE_BYTES = 16 * MIB  # what an answer may weigh that has to be held (callback, command)
MAX_STDERR_BYTES = 64 * KIB  # of one command
LAST_LINE = 200  # characters of its last line, which become the record's `error`
PIPE_BYTES = 64 * KIB  # read from a command at once: what a pipe holds (pipe(7))
MAX_REPLICAS = 5  # of a stream: what JetStream allows
MAX_VARIABLE_BYTES = 128 * KIB  # of one environment variable: MAX_ARG_STRLEN of execve(2)
SMALL_BODY_BYTES = 64 * KIB  # a sync body up to this size is read first, a larger one is streamed
DEBUG_BODY_BYTES = 4 * KIB  # of a body in the log, with write_debug

# Patience.
RATE_CATCH_UP_S = 1.0  # by how much starts that are late may be closer than their rate
RATE_CLOCKS_S = 5.0  # by how much the clocks of daemons with a common rate may differ
MAX_RETRY_AFTER_S = 86_400.0  # A function may ask for patience, not for eternity.
RETRY_STORE_S = 5  # after a failed commit, for clients (Retry-After) and ourselves
RETRY_SOON_S = 0.05  # the same once the queue seems to work again
PROVIDER_S = 10.0  # what a look-up at the provider may take
COMMAND_GRACE_S = 0.5  # what a command has left behind gets to end by itself
KILL_S = 1.0  # after which a command that was killed and is still there can't be killed
SCALE_POLL_S = 0.1  # between looks whether the provider has started a function
POOL_AGE_S = 60.0  # after which a connection is not kept: its name may lead elsewhere by now
POOL_IDLE_S = 4.0  # below the 5 s after which uvicorn and Node close an idle connection
STALLED_S = 10.0  # A commit that takes longer means that the disk hangs.
SILENCE_S = 15  # between the kernel's looks whether a silent connection's other end is there; Go's
HALF_CLOSED_S = 1.0  # between looks whether a client that sends no more has gone for good
PROBED = tuple(2**n for n in range(7))  # the looks since a last write that write to find out
LINGER_S = 1.0  # in which a client that has connected before a stop may still ask
HOUSEKEEPING_S = 60.0
CLOCK_CHECK_S = 30.0  # the longest sleep towards a wall-clock time: notices a clock that was set
CLOCK_JUMP_S = 60.0  # A clock that is set forward by more has been wrong, not late.

MAX_LOG_LINES = 10_000  # that wait to be written; what comes on top is lost
LOG_S = 1.0  # in which the last lines may still be written when the process ends

# How much is done at once.
MAX_SEEN = 10_000  # names whose look-up is remembered, those of no function among them
GROUP_COMMIT_MAX = 512  # operations that share one fsync
MAX_CLAIMS = 64  # taken at once, of all queues together
QUIET_ROUNDS = 3  # of the event loop without an attempt that ends: then claims are taken
MOST_ROUNDS = 8  # of the event loop, after which they are taken in any case
MAX_PAGE = 1000  # records in one answer
BATCH = 500  # calls that one step of a bulk operation takes before others get their turn
BULK_PERIOD_S = 0.045  # from one such step to the next: 11,000 calls a second, a tenth of the time
# Changes of calls that are told one by one: nobody follows more, and calls need the time.
CHANGES_PER_SECOND = 500
MAX_FAILURES = 20  # failed attempts and deliveries that a call's record keeps
SCAN_WINDOW = 20_000  # rows that one step of a list request reads

EARLIEST = 1e8  # 1973: what is less is no time that anybody means
# 0001-01-01T00:00:00Z and 9999-12-31T23:59:59Z: what Python and RFC 3339 can write.
BEGIN_OF_TIME = -62_135_596_800.0
END_OF_TIME = 253_402_300_799.0

# RFC 9110 7.6.1, with the ones that RFC 9110 11.7 and 6.6.2 bind to one connection.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization".split()
    + b"te trailer transfer-encoding upgrade".split()
)
# What we set ourselves in a request to a function.
COMPUTED = frozenset(b"expect host x-call-id x-start-time x-forwarded-for x-retry".split())
CONTENT_LENGTH = frozenset((b"content-length",))
# Control headers steer a call. An answer that is passed on to a callback URL, which may be another
# function of ours, leaves them behind, and headers that steer a request.
CONTROL_HEADERS = (
    "X-Callback-Url",
    "X-Failure-Callback-Url",
    "Idempotency-Key",
    "X-Delay",
    "X-Not-Before",
    "X-Deadline",
    "X-Max-Attempts",
    "X-Queue",
    "X-Concurrency-Key",
)
HOPS = "X-Callback-Hops"  # how many callbacks led to this call
OF_FUNCTIONS = ("/function/", "/async-function/", "/r/")  # what follows is the function's
MAX_FORWARDED = 32  # hosts that a request may have come through, as `callback.max_hops` for calls
STEERING = frozenset(
    b"host expect authorization cookie content-length via origin sec-fetch-site".split()
    + b"range if-match if-none-match if-modified-since if-unmodified-since if-range".split()
    + b"x-http-method-override x-http-method x-method-override".split()
    + [HOPS.lower().encode()]
    + [name.lower().encode() for name in CONTROL_HEADERS]
)

# Headers of a callback that tell of its call, whatever the function has answered under these names.
CALLBACK_HEADERS = (
    "User-Agent",
    "X-Call-Id",
    "X-Function-Name",
    "X-Function-Status",
    "X-Duration-Seconds",
    "X-Start-Time",
    "X-Retry",
    "X-Retry-Max",
)
NOT_CALLED_BACK = STEERING | {name.lower().encode() for name in CALLBACK_HEADERS}

FINAL = ("success", "error", "timeout", "cancelled")
FAILED = ("error", "timeout")  # final ones of these
STATUSES = ("delayed", "queued", "running", *FINAL)
CALLBACK_STATUSES = ("none", "pending", "delivered", "failed")

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # RFC 9110 9.2.1

LATER = {"Retry-After": str(RETRY_STORE_S)}
HANG_UP = {"Connection": "close"}

log = logging.getLogger("faasd_async")

T = TypeVar("T")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")
Header = tuple[bytes, bytes]
Headers = tuple[Header, ...]
Tell = Callable[[T], None]

# --- Errors ---------------------------------------------------------------------------------------
# A function's 500 or timeout is an Outcome, not an exception.


class ConfigError(Exception):
    """The configuration can't be used. `problems` has one line for each thing that is wrong.

    Exit code 78.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problem.replace("\n", "\\n") for problem in problems)
        super().__init__("\n".join(self.problems))


class StoreError(Exception):
    """The queue could not store or read: disk full, file damaged, thread gone. Nothing was done."""


class StoreLocked(StoreError):
    """Another process holds the file. Exit code 75."""


class ListenError(Exception):
    """An address can't be listened on for now: it may be there later. Exit code 75."""


class UsageError(Exception):
    """What was typed on the command line can't be meant. Exit code 2."""


class HttpError(Exception):
    """Ends a request without success: HTTP status, one line of text, extra headers."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = dict(headers or {})


class NotNow(HttpError):
    """It can't be done for now, through no fault of the function: queued calls go on waiting."""

    def __init__(self, text: str) -> None:
        super().__init__(503, text, LATER)


class ProviderAway(NotNow):
    """The provider can't be asked or reached."""


class Shortage(NotNow):
    """This machine has no descriptors, ports, processes or memory left."""

    ERRORS = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class FailureKind(enum.Enum):
    """Why a request of ours got no answer."""

    UNREACHABLE = enum.auto()  # no connection could be made
    TIMEOUT = enum.auto()  # the time was over
    BROKEN = enum.auto()  # the connection ended before the answer did
    INVALID = enum.auto()  # the answer was not HTTP
    TOO_LONG = enum.auto()  # the answer was longer than can be held
    FORBIDDEN = enum.auto()  # the address is not one that may be called
    MISSING = enum.auto()  # there is no such program
    LOCAL = enum.auto()  # the request could not be made here


class RequestFailed(Exception):
    """A request of ours got no answer. `text` completes a sentence that begins with the peer.

    `status` is what stands for the answer: 504 for a timeout, 403 where we may not ask, else 502.
    """

    STATUSES: Mapping[FailureKind, int] = {FailureKind.TIMEOUT: 504, FailureKind.FORBIDDEN: 403}

    def __init__(self, kind: FailureKind, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text
        self.status = self.STATUSES.get(kind, 502)
        # Another attempt would end the same way.
        self.final = kind in (FailureKind.MISSING, FailureKind.TOO_LONG)


# --- Values ---------------------------------------------------------------------------------------
# Durations, sizes, times, names, addresses. One parser each, which the file, the control headers
# and the query parameters share: "10m" means the same everywhere. A parser raises ValueError and
# nothing else, and its text says which form was expected.

DURATION_PART = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)"
DURATION = re.compile(rf"(?:([0-9]+)d)?((?:{DURATION_PART})*)")
UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
DAY_S = 86_400.0
TEN_YEARS_S = 3650 * DAY_S

SIZE = re.compile(r"([0-9]{1,15}) ?([KMG]i?B|B|)")
UNIT_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9} | {
    "KiB": KIB,
    "MiB": MIB,
    "GiB": KIB * MIB,
}

NAME = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?")
NAME_RULE = "a name has letters, digits, dashes and underscores, and no dot"
MAX_UNIX_ADDRESS = len("unix:") + 108  # of a socket's path, its NUL included (unix(7))
UNIX_ADDRESS = re.compile(r"unix:/.+")
TCP_ADDRESS = re.compile(r"[^/]*:([0-9]{1,5})")
HEADER_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # a token of RFC 9110 5.6.2
HEADER_LINE = re.compile(rf"({HEADER_NAME}):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
ORIGIN = re.compile(r"https?://[a-z0-9.-]+(?::\d{1,5})?|https?://\[[0-9a-f:.]+\](?::\d{1,5})?")
TIME_FORM = "an RFC 3339 time with its zone, such as 2030-01-31T08:00:00Z, or Unix seconds"


def expects(form: str) -> Callable[[Callable[[Any], T]], Callable[[Any], T]]:
    """Decorate a parser: its error for a value that it can't take is "expected FORM"."""

    def decorate(read: Callable[[Any], T]) -> Callable[[Any], T]:
        @functools.wraps(read)
        def parse(value: Any) -> T:
            try:
                return read(value)
            except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
                raise ValueError(f"expected {form}") from None

        return parse

    return decorate


def require(fits: object) -> None:
    """Raise ValueError, inside a parser, unless `fits`."""
    if not fits:
        raise ValueError


def one_of(*choices: str) -> Callable[[Any], str]:
    """Make a parser that takes one of a few words."""

    @expects("one of " + ", ".join(map(json.dumps, choices)))
    def word(value: Any) -> str:
        require(value in choices)
        return str(value)

    return word


def list_of(read: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    """Make a parser of a list, item by item. It raises what `read` raises, and TypeError."""

    def items(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(map(read, value))

    return items


def words_of(*choices: str) -> Callable[[str], tuple[str, ...]]:
    """Make a parser of one or more of a few words, separated by commas."""
    word = one_of(*choices)

    def words(value: str) -> tuple[str, ...]:
        return tuple(word(item.strip()) for item in value.split(","))

    return words


@expects('a file mode such as "0660"')
def file_mode(value: Any) -> int:
    """Who may read and write, as chmod(1) takes it."""
    require(re.fullmatch("0?[0-7]{3}", value))
    return int(value, 8)


@expects("1 or 0")
def switch(value: str) -> bool:
    """A parameter that is on or off; its name alone is on."""
    return {"": True, "1": True, "true": True, "0": False, "false": False}[value]


@expects("a string")
def text(value: Any) -> str:
    """A string that is not empty."""
    require(isinstance(value, str) and value)
    return str(value)


@expects("true or false")
def boolean(value: Any) -> bool:
    """TOML's boolean."""
    require(isinstance(value, bool))
    return bool(value)


@expects("a whole number from 1 to 1000000000")
def count(value: Any) -> int:
    """A TOML integer from 1 to 10⁹."""
    require(type(value) is int and 1 <= value <= 10**9)
    return int(value)


@expects("a whole number from 1 to 1000000000")
def number(value: Any) -> int:
    """A whole number from 1 to 10⁹, written as text."""
    require(re.fullmatch("[0-9]{1,18}", value))
    return count(int(value))


@expects('a duration such as "10s", "5m30s", "1h" or "7d"')
def duration(value: Any) -> float:
    """Seconds from a Go duration (https://pkg.go.dev/time#ParseDuration), or days before one.

    Never negative, ten years at most.
    """
    if value == "0":
        return 0.0
    match = DURATION.fullmatch(value)
    if match is None or not value:
        raise ValueError
    days, rest = match[1], match[2]
    total = float(days or 0) * DAY_S
    for amount, unit in re.findall(DURATION_PART, rest):
        total += float(amount) * UNIT_S[unit]
    require(total <= TEN_YEARS_S)
    return total


@expects('a duration above zero, such as "10s"')
def positive(value: Any) -> float:
    """Seconds of a duration that is more than none."""
    seconds = duration(value)
    require(seconds > 0)
    return seconds


class Rate(NamedTuple):
    """How many calls may start in which time. They are spread over it."""

    text: str  # as it is written
    starts: int
    period_s: float

    @property
    def interval_s(self) -> float:
        """From one start to the next."""
        return self.period_s / self.starts


@expects('a rate such as "10/1m" (calls that may start, in what time)')
def rate(value: Any) -> Rate:
    """A rate, such as "10/1m"."""
    starts, _, period = value.partition("/")
    return Rate(value, number(starts), positive(period))


@expects('a size such as "64KiB", "1MB" or a number of bytes')
def size(value: Any) -> int:
    """Bytes from a size, such as "64KiB"."""
    match = SIZE.fullmatch(str(value) if type(value) is int else value)
    if match is None:
        raise ValueError
    return int(match[1]) * UNIT_BYTES[match[2]]


@expects(TIME_FORM)
def parse_when(value: Any) -> float:
    """Unix time from RFC 3339 (with an offset or Z) or from Unix seconds."""
    if re.fullmatch(r"[0-9]{1,11}(\.[0-9]*)?", value):
        return min(float(value), END_OF_TIME)
    moment = datetime.fromisoformat(value.upper())
    require(moment.tzinfo is not None)
    return min(max(BEGIN_OF_TIME, moment.timestamp()), END_OF_TIME)


@expects('a duration such as "1h" or ' + TIME_FORM)
def parse_deadline(value: Any) -> float:
    """Unix time of a moment, or of now plus a duration.

    A number that would be a time in the early seventies is meant as seconds from now.
    """
    if value[-1:] in ("s", "m", "h", "d"):
        return time.time() + duration(value)
    at = parse_when(value)
    bare = value.replace(".", "", 1).isdigit()
    return time.time() + at if bare and at < EARLIEST else at


@expects('an age such as "24h" or "7d", or ' + TIME_FORM)
def parse_since(value: Any) -> float:
    """Unix time of a moment, or of now minus a duration."""
    if value[-1:] in ("s", "m", "h", "d"):
        return time.time() - duration(value)
    return parse_when(value)


@expects(
    'an age such as "24h" or "7d", a time such as "03:00", "2030-01-31 08:00" or "yesterday", or '
    + TIME_FORM
)
def local_moment(value: Any) -> float:
    """Unix time of what `parse_since` takes, or of a time on this machine's clock."""
    midnight = datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
    day = timedelta(days=1)
    if value in ("today", "yesterday"):
        return (midnight if value == "today" else midnight - day).timestamp()
    if re.fullmatch(r"\d\d?:\d\d(:\d\d)?", value):  # the last time that clocks showed this
        parts = [int(part) for part in f"{value}:0".split(":")]
        moment = midnight.replace(hour=parts[0], minute=parts[1], second=parts[2])
        return (moment if moment <= datetime.now() else moment - day).timestamp()
    with contextlib.suppress(ValueError):
        return parse_since(value)
    return datetime.fromisoformat(value).timestamp()


@expects(f"a whole number from 1 to {MAX_PAGE}")
def page_size(value: Any) -> int:
    """How many records one answer may have."""
    size = number(value)
    require(size <= MAX_PAGE)
    return size


@expects("the next_cursor of an earlier answer")
def page_cursor(value: Any) -> str:
    """Where a page of records begins."""
    require(re.fullmatch("[0-9]{1,39}", value))
    return str(value)


@expects("1 to 256 visible ASCII characters")
def visible(value: Any) -> str:
    """What may be a call id, an idempotency key or a concurrency key."""
    require(re.fullmatch("[!-~]{1,256}", value))
    return str(value)


@expects("a name of letters, digits, dashes and underscores, with no dot")
def plain_name(value: Any) -> str:
    """A name as functions and queues have them in the file."""
    require(NAME.fullmatch(value))
    return str(value)


@expects('a program and its arguments, such as ["tr", "a-z", "A-Z"]')
def program(value: Any) -> tuple[str, ...]:
    """What is executed: no shell is involved."""
    require(isinstance(value, list | tuple) and all(isinstance(word, str) for word in value))
    require(value and value[0] and "\0" not in "".join(value))
    return tuple(value)


@expects("a list of codes from 400 to 599")
def http_codes(value: Any) -> frozenset[int]:
    """HTTP status codes that mean a failure."""
    require(all(type(code) is int and 400 <= code < 600 for code in value))
    return frozenset(value)


ADDRESS_FORM = '"HOST:PORT" and "unix:/path"'


@expects(ADDRESS_FORM)
def canonical_address(value: Any) -> str:
    """HOST:PORT or unix:/path; also as people, browsers and systemd write these."""
    address = re.sub(r"^unix:(//)?(?=/)|^(?=/(?!/))", "unix:", text(value))
    if not address.startswith("unix:"):
        address = re.sub(r"(?i)^(http:)?//|/$", "", address)
        address = re.sub(r"^(\*:)?(?=\d+$)", ":", address)  # a port, of every address
    tcp = TCP_ADDRESS.fullmatch(address)
    unix = UNIX_ADDRESS.fullmatch(address)
    require(tcp or (unix and len(os.fsencode(address)) < MAX_UNIX_ADDRESS))
    require(tcp is None or int(tcp[1]) < 65_536)
    return address


@expects(f"one or more of {ADDRESS_FORM}, each once")
def addresses(value: Any) -> tuple[str, ...]:
    """Where to listen."""
    if type(value) is int:  # a port
        value = str(value)
    listed = (value,) if isinstance(value, str) else value
    require(listed)
    canonical = list_of(canonical_address)(listed)
    require(len(set(canonical)) == len(canonical))
    return canonical


@expects("'NAME: VALUE'")
def header_line(value: Any) -> tuple[str, str]:
    """A header as a person writes it, with no line break in it."""
    match = HEADER_LINE.fullmatch(value)
    if match is None:
        raise ValueError
    return match[1], match[2].strip()


@expects("a list of host names")
def host_names(value: Any) -> tuple[str, ...]:
    """Names without a port, as they stand in a Host header."""
    names = list_of(text)(value)
    require(all(re.fullmatch(r"[\w.-]+", name) for name in names))
    return tuple(name.lower().rstrip(".") for name in names)


@expects('a list of origins such as "https://app.example.org" or "http://192.168.1.5:3000"')
def origins(value: Any) -> tuple[str, ...]:
    """Origins as browsers write them (RFC 6454 6.2): scheme, host, port; no path, no slash."""
    listed = tuple(map(str.lower, list_of(text)(value)))
    require(all(map(ORIGIN.fullmatch, listed)))
    require(all((urlsplit(origin).port or 0) < 65_536 for origin in listed))
    return listed


@expects('a list of servers such as "nats://127.0.0.1:4222" or "tls://nats.example.org:4222"')
def nats_servers(value: Any) -> tuple[str, ...]:
    """Where a NATS cluster is reached."""
    listed = list_of(text)(value)
    require(listed)
    for server in listed:
        url = urlsplit(server)
        require(url.scheme in ("nats", "tls") and url.hostname and url.port != 0)
    return listed


@expects("a table")
def table(value: Any) -> Mapping[str, Any]:
    """A table of TOML."""
    require(isinstance(value, dict))
    return dict(value)


@expects("a table of strings")
def string_table(value: Any) -> Mapping[str, str]:
    """A table of strings, such as labels and annotations."""
    require(all(isinstance(item, str) for item in value.values()))
    return dict(value)


def rfc3339(at: float | None) -> str | None:
    """A Unix time as RFC 3339 in UTC, with microseconds and Z."""
    if at is None:
        return None
    moment = datetime.fromtimestamp(at, UTC).replace(tzinfo=None)
    return moment.isoformat(timespec="microseconds") + "Z"


def count_of(number: int, noun: str) -> str:
    """A number with its noun: 1 queue, 2 queues."""
    return f"{number} {noun}" + "s" * (number != 1)


def brief(seconds: float | None) -> str:
    """A duration in at most four characters: 0.3s, 12s, 5m, 3h, 20d."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"


def brief_size(number: int) -> str:
    """A size: 5 B, 1.2 KiB, 3.4 GiB."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def function_key(name: str, namespace: str) -> str:
    """NAME.NAMESPACE, which no other function has; its lane in a queue and its label in metrics."""
    return f"{name}.{namespace}"


def new_id() -> str:
    """A UUIDv7 (RFC 9562 5.7): ordered by time, so that an index of them grows at its end.

    Twelve of its bits are the fraction of the millisecond (6.2, method 3). It names a call and is
    no secret: the random module's generator will do, which costs no system call and starts anew in
    a forked process.
    """
    stamp_ms, rest_ns = divmod(time.time_ns(), 1_000_000)
    return uuid7(stamp_ms, (rest_ns << 12) // 1_000_000, random.getrandbits(62))


def uuid7(stamp_ms: int, high: int, low: int) -> str:
    """A UUIDv7 made of a Unix time in milliseconds and of 12 and 62 more bits."""
    number = stamp_ms << 80 | 7 << 76 | high << 64 | 0b10 << 62 | low
    digits = number.to_bytes(16, "big").hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


# --- URLs and hosts -------------------------------------------------------------------------------
# How URLs and hosts are written, what a host is compared with, and whether it is this machine.

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# In a URL: an IPv6 address in brackets, with its zone; or a name, in IDNA and with nothing in
# percent: a proxy might decode it, and that is another host.
HOST_AND_PORT = re.compile(
    r"(?:\[([0-9A-Fa-f:.]+)(?:%[A-Za-z0-9_.~-]+)?\]|[^][:%\x7f-\U0010ffff]+)(?::[0-9]*)?"
)
ABSOLUTE_URL = re.compile(r"(\w+://)([^/?#]*@)?([^/?#]*)(.*)", re.DOTALL)

# Translators send what goes to such an address to the IPv4 address in its last 32 bits (RFC 4291
# 2.5.5.1, RFC 2765 2.1, RFC 6052 2.1, RFC 8215).
IPV4_IN_IPV6 = tuple(
    map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48"))
)

# Where the clouds of Amazon and Google answer to IPv6 what 169.254.169.254 answers to IPv4.
CLOUD_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "fd20:ce::254")))


class UrlParts(NamedTuple):
    """An absolute URL as it is written; joined, its parts are that again."""

    scheme: str  # with "://"
    login: str  # with "@"; mostly empty
    place: str  # host and port
    rest: str  # path and query


def split_url(url: str) -> UrlParts | None:
    """The parts of an absolute URL, which need not be valid ones. None: it is not absolute."""
    found = ABSOLUTE_URL.fullmatch(url)
    return None if found is None else UrlParts._make(found.groups(""))


@expects('a URL such as "http://127.0.0.1:9001"')
def server_url(value: Any) -> yarl.URL:
    """The URL of an HTTP server, to which path and query are added. It may carry credentials."""
    if parts := split_url(value):
        host, colon, port = parts.place.partition(":")
        place = host.encode("idna").decode() + colon + port
        value = "".join(parts._replace(place=place))
    url = http_url(value)
    require("?" not in value)
    return url


def http_url(value: str) -> yarl.URL:
    """An http or https URL, byte for byte. Raises ValueError, TypeError, LookupError."""
    url = yarl.URL(value, encoded=True)
    place = HOST_AND_PORT.fullmatch(url.raw_authority.rpartition("@")[2])
    require(place and url.scheme in ("http", "https") and url.explicit_port != 0)
    if place and place[1]:
        ipaddress.IPv6Address(place[1])
    return url


def show_url(value: str | None) -> str | None:
    """A URL without the credentials it may carry."""
    parts = split_url(value or "")
    return value if parts is None else "".join(parts._replace(login=""))


def log_url(value: str | None) -> str | None:
    """A URL for the log, which others read than the record: in a query may be a key, too."""
    shown = show_url(value)
    return shown and re.sub("[?#].*", "?***", shown, count=1, flags=re.DOTALL)


def show_urls(urls: Iterable[str]) -> str:
    """URLs without the credentials they may carry."""
    return " ".join(show_url(url) or "" for url in urls)


def called_host(url: yarl.URL) -> str:
    """The host of a URL as it is looked up: in a URL the % before an address's zone is %25."""
    host = url.raw_host or ""
    return host.replace("%25", "%") if ":" in host else host


def host_of(url: yarl.URL) -> str:
    """The host of a URL as hosts are compared: in lower case, in IDNA, with no dot at its end."""
    return called_host(url).lower().rstrip(".")


@expects("an absolute http:// or https:// URL, in ASCII and with no spaces")
def callback_host(value: Any) -> str:
    """The host of a callback URL; see `host_of`."""
    require(re.fullmatch("[!-~]{1,4096}", value))
    host = host_of(http_url(value))
    return host.encode("idna").decode()


def host_name(host: str) -> str:
    """The name or address in a Host header, without port, brackets and the dot at its end."""
    match = re.fullmatch(r"\[(.*)\](?::\d*)?|([^:]*)(?::\d*)?", host)
    if match is None:
        return host.lower()
    return (match[1] or match[2] or "").rstrip(".").lower()


def is_address(host: str) -> bool:
    """Whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def address_in(host: str) -> Address | None:
    """The address that a host is, if it is none to look up: resolvers take 127.1 and 0x7f.1 too."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, ValueError):
            return None
    return getattr(address, "ipv4_mapped", None) or address


def addresses_reached(address: Address) -> Iterator[Address]:
    """An address, and those that what is sent there may end at.

    A translator or a tunnel passes on what an IPv6 address says of an IPv4 address (RFC 3056, 4380,
    6052), and who connects to the unspecified address is connected to the own machine.
    """
    yield address
    if address.is_unspecified:
        yield ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    elif isinstance(address, ipaddress.IPv6Address) and not address.is_loopback:
        if any(address in network for network in IPV4_IN_IPV6):
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.sixtofour:
            yield address.sixtofour
        yield from address.teredo or ()


def is_network_pattern(pattern: str) -> bool:
    """Whether a pattern is about addresses, not names."""
    return re.search(r"/|:|^[0-9.]+$", pattern) is not None


@expects('a list of host names without a port, "*.example.org", addresses and networks')
def host_patterns(value: Any) -> tuple[str, ...]:
    """Patterns for host names and addresses, as these are compared. What fits none is refused."""
    return tuple(map(host_pattern, list_of(text)(value)))


def host_pattern(value: str) -> str:
    """One of them. Raises ValueError."""
    pattern = value.lower().rstrip(".")
    if not is_network_pattern(pattern):
        name = pattern.removeprefix("*.").encode("idna").decode()
        require(re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", name) and address_in(name) is None)
        return f"*.{name}" if pattern.startswith("*.") else name
    require("%" not in pattern)
    network = ipaddress.ip_network(pattern.strip("[]"), strict=False)
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped:
        prefix = max(0, network.prefixlen - 96)
        network = ipaddress.ip_network((network.network_address.ipv4_mapped, prefix), strict=False)
    return str(network.network_address if network.num_addresses == 1 else network)


def is_listed(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether a host name or an address matches a pattern."""
    for pattern in patterns:
        if pattern in names:
            return True
        if pattern.startswith("*.") and any(name.endswith(pattern[1:]) for name in names):
            return True
        with contextlib.suppress(ValueError):
            network = ipaddress.ip_network(pattern, strict=False)
            if any(ipaddress.ip_address(name) in network for name in names if is_address(name)):
                return True
    return False


def machine_names() -> tuple[str, ...]:
    """The names that this machine has for itself and in its local network (RFC 6762: .local)."""
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return name, short, f"{short}.local"


def is_this_machine(host: str) -> bool:
    """Whether a host is a name of this machine."""
    name = host.lower().rstrip(".")
    return name == "localhost" or name in machine_names()


def is_own_host(host: str, own_names: Sequence[str]) -> bool:
    """Whether a Host header means this machine.

    A page can have its own name resolve to our address (DNS rebinding), and would then be of the
    same origin as we are. It can't do so for an address, nor for names that are not its own.
    """
    name = host_name(host)
    return name == "localhost" or name in own_names or is_address(name)


def source_address(family: int, address: tuple[Any, ...]) -> str | None:
    """The address that what is sent to another would come from. None: there is no way there."""
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)  # It sends nothing.
        return str(sock.getsockname()[0])
    return None


def is_own_address(address: Address | None) -> bool:
    """Whether an address is one of this machine: what is sent there would come from there."""
    if address is None or address.is_loopback or address.is_unspecified:
        return address is not None
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    return source_address(family, (str(address), 9)) == str(address)


# --- Secrets --------------------------------------------------------------------------------------
# Passwords, keys, certificates and headers, which stand in files of their own, tables of texts, and
# documents that hold them.


@expects("JSON")
def parse_json(value: bytes) -> object:
    """What JSON says. What is nested deeper than it can be read counts as none."""
    try:
        return json.loads(value)
    except RecursionError:
        raise ValueError from None


def toml_tables(value: str) -> dict[str, Any]:
    """What TOML says. Raises TOMLDecodeError, also for what is too deep or too long to be read."""
    try:
        return tomllib.loads(value)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise tomllib.TOMLDecodeError("it is nested too deeply") from None
    except ValueError:
        raise tomllib.TOMLDecodeError("a number has too many digits") from None


STREAM_BYTES = MIB  # the most that is read of what is no file: a pipe, a device
STREAM_S = 5.0  # in which something has to come out of it


def read_stream(file: io.FileIO) -> bytes:
    """What comes out of a pipe, such as a shell's <(COMMAND), or a device. Raises OSError.

    Nobody may write to the one, and the other may have no end.
    """
    poll = select.poll()
    poll.register(file, select.POLLIN)
    content = b""
    while len(content) <= STREAM_BYTES:
        if not poll.poll(STREAM_S * 1000):
            reason = f"is no file, and nothing has come out of it for {STREAM_S:.0f} s"
            raise OSError(errno.ETIMEDOUT, reason)
        piece = file.read(PIPE_BYTES)
        if not piece:
            return content
        content += piece
    reason = f"is no file, and more than {brief_size(STREAM_BYTES)} come out of it"
    raise OSError(errno.EFBIG, reason)


def read_file(path: str) -> bytes:
    """The bytes of a file, or of what stands in for one; see `read_stream`. Raises OSError."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # A pipe would be waited for.

    with open(path, "rb", buffering=0, opener=opener) as file:
        is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        return file.readall() if is_file else read_stream(file)


def whole_file(path: Any) -> bytes:
    """The bytes of a file. Variables such as $HOME in its name count. Raises ValueError."""
    name = text(path)
    place = os.path.expandvars(name)
    try:
        return read_file(place)
    except OSError as exc:
        raise ValueError(f"{name}: {unset_variable(place) or exc.strerror}") from None


def unset_variable(place: str) -> str | None:
    """What is wrong with a name in which variables were expanded, if one is left."""
    unset = re.search(r"\$(\w+|\{\w+\})", place)
    return f"the variable {unset[1].strip('{}')} is not set" if unset else None


def queue_file(value: Any) -> str:
    """The name of the queue's file, with variables and a ~ as in a shell. Raises ValueError."""
    name = text(value)
    place = os.path.expandvars(name)
    reason = unset_variable(place)
    if "\0" in name or not Path(place).name:
        reason = "this is no name of a file"
    elif reason is None and not has_home(place):
        reason = "nobody here has such a home directory"
    if reason:
        raise ValueError(f"{name}: {reason}")
    return name


def has_home(place: str) -> bool:
    """Whether the home directory is known that a name begins with, if it does."""
    try:
        Path(place).expanduser()
    except RuntimeError:
        return False
    return True


def secret(path: Any) -> bytes:
    """The content of a secret's file, without the newline at its end. Raises ValueError."""
    content = whole_file(path).rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8)  # Notepad writes that.
    if not content:
        raise ValueError(f"{path} is empty")
    return content


@dataclass(frozen=True)
class SecretFile:
    """A secret and the file that holds it. Another may be written there while we run."""

    path: str
    content: bytes = field(repr=False, compare=False)  # at the start

    def now(self) -> str:
        """What the file holds now, or what it held at the start, if it can't be read."""
        try:
            return secret(self.path).decode()
        except ValueError:
            return self.content.decode(errors="replace")


def secret_file(path: Any) -> SecretFile:
    """The file of a secret. Raises ValueError."""
    return SecretFile(path, secret(path))


@expects("a table of header names and values")
def header_table(value: Any) -> Mapping[str, str]:
    """Headers as they can stand on the wire."""
    headers = string_table(value)
    for name, content in headers.items():
        require(re.fullmatch(HEADER_NAME, name))
        require(re.fullmatch(r"[\t -~\x80-\uffff]*", content))
    return headers


@expects("a table of strings, of names without =")
def environment(value: Any) -> Mapping[str, str]:
    """Variables as a program can have them (environ(7))."""
    variables = string_table(value)
    require("" not in variables and "=" not in "".join(variables))
    require("\0" not in "".join([*variables, *variables.values()]))
    return variables


@expects('a media type such as "text/plain; charset=utf-8"')
def media_type(value: Any) -> str:
    """What a Content-Type says, in one line."""
    require(re.fullmatch("[ -~]+", value))
    return str(value)


NOT_GIVEN = HOP_BY_HOP | {b"host", b"content-length"}  # what belongs to a connection or a body
Pairs = tuple[tuple[str, str], ...]


def headers_by_host(path: Any) -> tuple[tuple[str, Pairs], ...]:
    """The headers in the file that callback.headers_file names, for each HOST or HOST:PORT.

    It is TOML with a table for each of them. Raises ValueError, whose text repeats no value.
    """
    try:
        tables = toml_tables(secret(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        place = re.search(r"\(at .*\)", str(exc))
        raise ValueError(f"{path}: not valid TOML {place[0] if place else ''}".rstrip()) from None
    hosts = []
    for host, headers in flat_tables(tables):
        try:
            require(host)
            # As they are sent: each byte of UTF-8 is a character of Latin-1.
            sent = {
                name: value.encode().decode("latin-1")
                for name, value in header_table(headers).items()
            }
            hosts.append((host.lower(), tuple(sent.items())))
            require(not NOT_GIVEN & {name.lower().encode() for name in headers})
        except ValueError:
            form = '["HOST"] with lines such as Authorization = "Bearer …"'
            raise ValueError(f"{path}: {host or 'above all tables'}: expected {form}") from None
    return tuple(hosts)


def flat_tables(tables: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tables that hold values, each with its dotted name: [a.b] means what ["a.b"] does."""
    waiting = [("", tables)]
    while waiting:
        name, outer = waiting.pop()
        inner = {key: value for key, value in outer.items() if isinstance(value, dict)}
        if values := {key: value for key, value in outer.items() if key not in inner}:
            yield name, values
        deeper = [(f"{name}.{key}".lstrip("."), value) for key, value in inner.items()]
        waiting += reversed(deeper)


def signing_secret(path: Any) -> bytes:
    """The secret in the file that callback.signing_secret_file names. Raises ValueError."""
    content = secret(path)
    try:
        signing_key(content)
    except ValueError:
        raise ValueError(f"{path}: after whsec_ expected base64") from None
    return content


def signing_key(secret: bytes) -> bytes:
    """The key in a secret, as https://www.standardwebhooks.com writes it. Raises ValueError."""
    if not secret.startswith(b"whsec_"):
        return secret
    key = base64.b64decode(secret.removeprefix(b"whsec_"), validate=True)
    require(key)
    return key


def lasting_file(path: Any) -> bytes:
    """The bytes of a file that will be read again, so it can't be a pipe. Raises ValueError."""
    if Path(os.path.expandvars(text(path))).is_fifo():
        raise ValueError(f"{path} is a pipe: it has to be a file, which is read more than once")
    return whole_file(path)


def pem_file(path: Any) -> str:
    """The name of a readable file with certificates or a key. Raises ValueError."""
    if b"-----BEGIN " not in lasting_file(path):
        raise ValueError(f"{path} holds nothing in PEM format")
    return os.path.expandvars(str(path))


class TlsFiles(Protocol):
    """A table of the configuration that says whom to trust in TLS, and who we are."""

    @property
    def tls_ca_file(self) -> str | None: ...

    @property
    def tls_cert_file(self) -> str | None: ...

    @property
    def tls_key_file(self) -> str | None: ...

    @property
    def tls(self) -> ssl.SSLContext | None:
        """See `tls_context`."""


def tls_context(table: TlsFiles) -> ssl.SSLContext | None:
    """TLS by a table's files. None: the system's CAs, and no client certificate.

    Raises OSError.
    """
    if table.tls_ca_file is None and table.tls_cert_file is None:
        return None
    context = ssl.create_default_context(cafile=table.tls_ca_file)
    if table.tls_cert_file is not None:
        # A password would be asked for at the terminal.
        context.load_cert_chain(table.tls_cert_file, table.tls_key_file, password="")
    return context


def for_http(context: ssl.SSLContext) -> ssl.SSLContext:
    """A context as a client of HTTP has it.

    Some servers break off with who names no protocol (ALPN, RFC 7301); some ask for a client's
    certificate when they have read the path, for which it has to agree (RFC 8446 4.6.2).
    """
    context.set_alpn_protocols(["http/1.1"])
    context.post_handshake_auth = True
    return context


def http_tls_context(table: TlsFiles) -> ssl.SSLContext | None:
    """TLS for HTTP by a table's files; see `tls_context`. Raises OSError."""
    context = tls_context(table)
    return None if context is None else for_http(context)


def tls_conflicts(table: TlsFiles) -> Iterator[str]:
    """A line for each thing that is wrong with a table's files.

    They are read for it, and most tables keep the result: later the files may be other ones, or
    there may be no descriptor left to read them.
    """
    cert_file, key_file = table.tls_cert_file, table.tls_key_file
    if key_file and not cert_file:
        yield "tls_key_file needs tls_cert_file"
        return
    if cert_file and not key_file and b"PRIVATE KEY-----" not in Path(cert_file).read_bytes():
        yield f"{cert_file} holds no private key: tls_key_file says where that is"
        return
    if cert_file and b"ENCRYPTED" in Path(key_file or cert_file).read_bytes():
        yield f"the key in {key_file or cert_file} has a passphrase: it has to be one without"
        return
    try:
        _ = table.tls
    except OSError as exc:
        reason = getattr(exc, "reason", None) or exc.strerror or str(exc)
        files = filter(None, (table.tls_ca_file, cert_file, key_file))
        yield f"{', '.join(files)}: {reason.replace('_', ' ').lower()}"


def basic_auth(user: bytes | None, password: bytes | None) -> str | None:
    """The Authorization header of RFC 7617; None without a user."""
    if not user:
        return None
    return "Basic " + base64.b64encode(user + b":" + (password or b"")).decode()


# --- Cron expressions -----------------------------------------------------------------------------
# When an expression is due. cronsim reads it and steps through local time. Which instants a local
# time is, follows from Debian's cron(8): with a * in minute or hour a job runs whenever the clock
# shows a time that matches, so not in an hour that is left out and twice in one that comes twice. A
# job for certain times runs once: at the end of the gap, and the first time.

REBOOT = "@reboot"
MACROS: Mapping[str, str] = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
CRON_FORM = 'five fields such as "30 7 * * 1-5", or one of ' + ", ".join((*MACROS, REBOOT))


def cron_expression(value: Any) -> str:
    """An expression of five fields, or a macro. Raises ValueError, also where it never matches."""
    if not isinstance(value, str):
        raise ValueError(f"expected {CRON_FORM}")
    if value == REBOOT or value in MACROS:
        return value
    if len(value.split()) != 5:
        raise ValueError(f"expected {CRON_FORM}")
    if reason := cron_problem(value):
        raise ValueError(f"{json.dumps(value)}: {reason}")
    return value


@functools.lru_cache(10_000)  # A reload reads the same ones again.
def cron_problem(expression: str) -> str | None:
    """Why an expression of five fields can't be used; None: it can."""
    try:
        next(CronSim(expression, datetime(2000, 1, 1)))
    except CronSimError as exc:
        return f"{str(exc).lower()}, or never matches"
    except StopIteration:
        return "never matches"
    return None


def cron_expressions(value: Any) -> tuple[str, ...]:
    """One expression, or several. Raises ValueError."""
    listed = value if isinstance(value, list | tuple) else [value]
    if not listed:
        raise ValueError(f"expected {CRON_FORM}")
    return tuple(map(cron_expression, listed))


def cron_list(value: str) -> tuple[str, ...]:
    """Expressions in one line, with a semicolon between them. Raises ValueError."""
    return tuple(cron_expression(part.strip()) for part in value.split(";"))


def find_zone(name: str) -> tzinfo:
    """A zone of the system's data, else of the package tzdata. Raises ValueError, OSError."""
    if name == "UTC":
        return UTC
    import zoneinfo  # It costs 2 ms, and only schedules need it.

    return zoneinfo.ZoneInfo(name)


@expects('a time zone such as "Europe/Berlin" or "UTC"')
def time_zone(value: Any) -> str:
    """The name of a time zone that this machine knows."""
    with contextlib.suppress(OSError):  # such as the name of a folder
        find_zone(text(value))
        return str(value)
    raise ValueError


def local_time(at: float, zone: tzinfo) -> datetime:
    """The time, without a zone, that clocks in a zone show at this instant."""
    return datetime.fromtimestamp(at, zone).replace(tzinfo=None, fold=0)


def shown_at(local: datetime, zone: tzinfo) -> list[float]:
    """The instants when clocks show this: one, none in a gap, two in an hour that comes twice."""
    guesses = {local.replace(tzinfo=zone, fold=fold).timestamp() for fold in (0, 1)}
    return sorted(at for at in guesses if local_time(at, zone) == local)


def due_at(local: datetime, zone: tzinfo, wild: bool) -> list[float]:
    """The instants at which a job for a local time runs; `wild`: it has a * in minute or hour."""
    shown = shown_at(local, zone)
    if wild:
        return shown
    while not shown:  # It is in a gap.
        local += timedelta(minutes=1)
        shown = shown_at(local, zone)
    return shown[:1]


def instants(expression: str, zone: tzinfo, after: float) -> Iterator[float]:
    """The instants later than `after`, in their order, at which an expression is due."""
    expression = MACROS.get(expression, expression)
    wild = any(word.startswith("*") for word in expression.split()[:2])
    start = local_time(after, zone)
    # Where clocks are about to be set back, times that they have shown come once more.
    back = local_time(after + DAY_S, zone) - start - timedelta(days=1)
    waiting: list[float] = []
    last = after
    for local in CronSim(expression, start + min(back, timedelta())):
        at_once = due_at(local, zone, wild)
        for at in at_once:
            heapq.heappush(waiting, at)
        while waiting and at_once and waiting[0] <= at_once[0]:
            at = heapq.heappop(waiting)
            if at > last:
                yield at
                last = at
    yield from sorted(at for at in waiting if at > last)


@functools.lru_cache(1024)
def cron_words(expression: str) -> str:
    """An expression in English."""
    if expression == REBOOT:
        return "once after each start of this machine"
    return CronSim(MACROS.get(expression, expression), datetime(2000, 1, 1)).explain()


# --- Configuration --------------------------------------------------------------------------------
# A table of the file is a dataclass; a key is a field whose metadata says how its TOML value is
# read. `conflicts` tells what is wrong with a table whose keys are right by themselves.


@overload
def key(parse: Callable[[Any], T]) -> T | None: ...


@overload
def key(parse: Callable[[Any], T], default: object) -> T: ...


def key(parse: Callable[[Any], Any], default: object = None) -> Any:
    """A configuration key: how its TOML value is read, and its default as TOML would write it."""

    def make_default() -> Any:
        return None if default is None else parse(default)

    return field(default_factory=make_default, metadata={"parse": parse})


@runtime_checkable
class HasConflicts(Protocol):
    """A table whose keys have to agree."""

    def conflicts(self) -> Iterator[str]:
        """A line for each thing that is wrong with the keys together."""


def login_conflicts(user: bytes | None, password: bytes | None, prefix: str = "") -> Iterator[str]:
    """A line for each thing that is wrong with a user and a password."""
    if bool(user) != bool(password):
        yield f"{prefix}user_file needs {prefix}password_file"
    if user and b":" in user:
        yield "a user's name has no colon (RFC 7617)"


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """[gateway]: where to listen, what a request may take, which browsers may come in."""

    listen: tuple[str, ...] = key(addresses, "127.0.0.1:8080")
    read_timeout: float = key(positive, "60s")
    write_timeout: float = key(positive, "60s")
    upstream_timeout: float = key(positive, "65s")
    max_payload: int = key(size, "1MiB")
    namespace: str = key(plain_name, "openfaas-fn")
    drain_timeout: float = key(duration, "20s")
    trusted_origins: tuple[str, ...] = key(origins, [])
    hosts: tuple[str, ...] = key(host_names, [])
    socket_mode: int = key(file_mode, "0660")  # of unix sockets

    def own_name(self, function: str) -> str:
        """A function's name; without its namespace, if that is the one of the file's functions."""
        return function.removesuffix(f".{self.namespace}")


@dataclass(frozen=True, kw_only=True)
class AuthConfig:
    """[auth]: user and password, read from their files. Without them everybody may do everything.

    Who comes with the `view_` ones may look and not act.
    """

    user_file: bytes | None = key(secret)
    password_file: bytes | None = key(secret)
    view_user_file: bytes | None = key(secret)
    view_password_file: bytes | None = key(secret)
    invoke: bool = key(boolean, False)

    @property
    def login(self) -> str | None:
        """The Authorization header that may act."""
        return basic_auth(self.user_file, self.password_file)

    @property
    def view_login(self) -> str | None:
        """The Authorization header of who may only look."""
        return basic_auth(self.view_user_file, self.view_password_file)

    def conflicts(self) -> Iterator[str]:
        """See HasConflicts."""
        yield from login_conflicts(self.user_file, self.password_file)
        yield from login_conflicts(self.view_user_file, self.view_password_file, "view_")
        if self.invoke and not self.user_file:
            yield "invoke needs user_file and password_file"
        if self.view_user_file and not self.user_file:
            yield "view_user_file needs user_file and password_file: else everybody may act"
        if self.view_login and self.view_login == self.login:
            yield "view_user_file and user_file are the same login"


@dataclass(frozen=True, kw_only=True)
class ProviderConfig:
    """[provider]: faasd, where functions that are not in the file are looked up and called."""

    url: yarl.URL | None = key(server_url)
    user_file: bytes | None = key(secret)
    password_file: bytes | None = key(secret)
    cache: float = key(duration, "1s")
    scale_from_zero: bool = key(boolean, True)
    scale_timeout: float = key(positive, "60s")
    tls_ca_file: str | None = key(pem_file)
    tls_cert_file: str | None = key(pem_file)
    tls_key_file: str | None = key(pem_file)

    @functools.cached_property
    def tls(self) -> ssl.SSLContext | None:
        """See `http_tls_context`."""
        return http_tls_context(self)

    @property
    def login(self) -> str | None:
        """The Authorization header that the provider gets."""
        return basic_auth(self.user_file, self.password_file)

    def conflicts(self) -> Iterator[str]:
        """See HasConflicts."""
        yield from login_conflicts(self.user_file, self.password_file)
        yield from tls_conflicts(self)


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """[store]: where the queue lives."""

    backend: str = key(one_of("sqlite", "nats"), "sqlite")
    path: str | None = key(queue_file)


@dataclass(frozen=True, kw_only=True)
class NatsConfig:
    """[nats]: the JetStream servers that keep the queue where `store.backend` is "nats"."""

    servers: tuple[str, ...] = key(nats_servers, ["nats://127.0.0.1:4222"])
    stream: str = key(plain_name, DEFAULT_QUEUE)
    replicas: int = key(count, 1)
    prefix: str = key(plain_name, "faas")
    user_file: SecretFile | None = key(secret_file)
    password_file: SecretFile | None = key(secret_file)
    token_file: SecretFile | None = key(secret_file)
    creds_file: str | None = key(text)
    tls_ca_file: str | None = key(pem_file)
    tls_cert_file: str | None = key(pem_file)
    tls_key_file: str | None = key(pem_file)
    publish_timeout: float = key(positive, "5s")
    require_sync: bool = key(boolean, False)

    @property
    def tls(self) -> ssl.SSLContext | None:
        """See `tls_context`. Its files are read anew for each connection."""
        return tls_context(self)

    def conflicts(self) -> Iterator[str]:
        """See HasConflicts."""
        user = self.user_file.content if self.user_file else None
        password = self.password_file.content if self.password_file else None
        yield from login_conflicts(user, password)
        yield from tls_conflicts(self)
        if self.replicas > MAX_REPLICAS:
            yield f"replicas can be at most {MAX_REPLICAS} in JetStream"


@dataclass(frozen=True, kw_only=True)
class QueueConfig:
    """[queues.NAME]: concurrency, the time limit of a call, how much may wait, and who is next."""

    max_inflight: int = key(count, 1)
    max_inflight_global: int | None = key(count)  # of all daemons on one NATS together
    timeout: float = key(positive, "5m")
    max_pending: int = key(count, 100_000)
    rate: Rate | None = key(rate)  # of starts; of all daemons on one NATS together
    fair: bool = key(boolean, True)
    adaptive: bool = key(boolean, False)
    # Leases: of no effect on the embedded queue, whose process owns its claims.
    ack_wait: float = key(positive, "60s")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """[retry] and [functions.NAME.retry]. The defaults are those that OpenFaaS Pro documents."""

    attempts: int = key(count, 10)
    codes: frozenset[int] = key(http_codes, [408, 429, 500, 502, 503, 504])
    min_wait: float = key(duration, "10s")
    max_wait: float = key(duration, "120s")
    backoff: str = key(one_of("exponential", "full", "equal"), "exponential")
    max_interruptions: int = key(count, 5)

    def conflicts(self) -> Iterator[str]:
        """See HasConflicts."""
        if self.min_wait > self.max_wait:
            yield "min_wait is longer than max_wait"


@dataclass(frozen=True, kw_only=True)
class CallbackConfig:
    """[callback]: how outcomes are delivered, and where to."""

    timeout: float = key(positive, "30s")
    attempts: int = key(count, 10)
    min_wait: float = key(duration, "5s")
    max_wait: float = key(duration, "1h")
    max_inflight: int = key(count, 16)
    allow: tuple[str, ...] = key(host_patterns, [])
    deny: tuple[str, ...] = key(host_patterns, [])
    gateway_hosts: tuple[str, ...] = key(
        host_patterns, ["gateway", "gateway.openfaas", "gateway.openfaas.svc.cluster.local"]
    )
    max_hops: int = key(count, 32)
    signing_secret_file: bytes | None = key(signing_secret)
    headers_file: tuple[tuple[str, Pairs], ...] | None = key(headers_by_host)
    tls_ca_file: str | None = key(pem_file)
    tls_cert_file: str | None = key(pem_file)
    tls_key_file: str | None = key(pem_file)

    @functools.cached_property
    def tls(self) -> ssl.SSLContext | None:
        """See `http_tls_context`."""
        return http_tls_context(self)

    def headers(self, host: str, port: int | None) -> Mapping[str, str]:
        """The headers that a receiver gets beside those of the function's answer."""
        found: dict[str, str] = {}
        for name, headers in self.headers_file or ():
            if name in (host, f"{host}:{port}"):
                found.update(headers)
        return found

    @functools.cached_property
    def policy(self) -> RetryPolicy:
        """When a delivery is tried again: any other answer than these codes and 2xx is final."""
        return RetryPolicy(
            attempts=self.attempts,
            codes=frozenset((408, 429, *range(500, 600))),
            min_wait=self.min_wait,
            max_wait=self.max_wait,
        )

    def conflicts(self) -> Iterator[str]:
        """See HasConflicts."""
        yield from self.policy.conflicts()
        yield from tls_conflicts(self)


@dataclass(frozen=True, kw_only=True)
class CallsConfig:
    """[calls]: how long a final record is kept, and how much of its output."""

    keep: float = key(positive, "24h")
    keep_failed: float = key(positive, "7d")  # after an error, a timeout or a failed callback
    keep_output: int = key(size, "64KiB")

    def kept_s(self, status: str, callback_status: str) -> float:
        """How long the record of a call that has ended in these states is kept."""
        failed = status in FAILED or callback_status == "failed"
        return max(self.keep, self.keep_failed) if failed else self.keep


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """[log]: what goes to standard error."""

    level: str = key(one_of("debug", "info", "warning", "error"), "info")
    format: str = key(one_of("text", "json"), "text")
    write_debug: bool = key(boolean, False)


@dataclass(frozen=True, kw_only=True)
class Function:
    """[functions.NAME], or a function as the provider describes it.

    An HTTP server (`url`) or a program that is started for each request (`command`). `replicas` is
    what the provider has of it; None: the file has it.
    """

    name: str
    namespace: str
    replicas: int | None = None
    url: yarl.URL | None = key(server_url)
    command: tuple[str, ...] | None = key(program)
    exec_timeout: float | None = key(positive)
    queue: str = key(text, DEFAULT_QUEUE)
    type: str = key(one_of("sync", "async"), "sync")
    max_inflight: int | None = key(count)
    rate: Rate | None = key(rate)
    annotations: Mapping[str, str] = key(string_table, {})
    labels: Mapping[str, str] = key(string_table, {})
    env: Mapping[str, str] = key(environment, {})
    cwd: str | None = key(text)
    content_type: str | None = key(media_type)
    keepalive: bool = key(boolean, True)
    tls_ca_file: str | None = key(pem_file)
    tls_cert_file: str | None = key(pem_file)
    tls_key_file: str | None = key(pem_file)
    retry: RetryPolicy = RetryPolicy()

    @functools.cached_property
    def tls(self) -> ssl.SSLContext | None:
        """See `http_tls_context`."""
        return http_tls_context(self)

    @functools.cached_property
    def key(self) -> str:
        """NAME.NAMESPACE, by which metrics, lanes and the provider name it."""
        return function_key(self.name, self.namespace)

    @property
    def provided(self) -> bool:
        """Whether it is the provider's."""
        return self.replicas is not None

    def conflicts(self) -> Iterator[str]:
        """See HasConflicts."""
        if (self.url is None) == (self.command is None):
            yield "set either url or command"
        if self.url and (self.exec_timeout or self.env or self.cwd or self.content_type):
            yield "exec_timeout, env, cwd and content_type are for a command"
        if self.command and (self.tls_ca_file or self.tls_cert_file or not self.keepalive):
            yield "keepalive and the tls_ files are for a url"
        yield from tls_conflicts(self)


@expects("what comes after the function's name: a path that begins with /, or a query with ?")
def call_target(value: Any) -> str:
    """Path and query of a call."""
    require(re.fullmatch(r"([/?][!-~]*)?", value))
    return str(value)


# Headers that a schedule's calls can't have: they would be the same each time, or have a key of
# their own.
NOT_SCHEDULED = {
    "X-Call-Id": "each call has an id of its own",
    "Idempotency-Key": "each call would be taken for the first one",
    "X-Not-Before": "that is what cron is for",
    "X-Queue": "set queue",
}
SCHEDULED: Mapping[str, Callable[[str], object]] = {
    "X-Callback-Url": callback_host,
    "X-Failure-Callback-Url": callback_host,
    "X-Delay": duration,
    "X-Deadline": duration,
    "X-Max-Attempts": number,
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """[schedules.NAME], or what the annotations of a function ask for."""

    name: str
    function: str | None = key(text)
    cron: tuple[str, ...] | None = key(cron_expressions)
    timezone: str = key(time_zone, "UTC")
    method: str = key(one_of("POST", "GET", "PUT", "PATCH", "DELETE"), "POST")
    path: str = key(call_target, "")
    headers: Mapping[str, str] = key(header_table, {})
    body: str | None = key(text)
    body_file: bytes | None = key(whole_file)
    queue: str | None = key(plain_name)
    overlap: str = key(one_of("skip", "queue", "replace"), "skip")
    catch_up: str = key(one_of("last", "none", "all"), "last")
    max_late: float = key(duration, "1h")
    jitter: float = key(duration, "0s")
    enabled: bool = key(boolean, True)

    @property
    def definition(self) -> str:
        """All that decides about instants: when it changes, they are counted from then on."""
        return json.dumps([self.cron, self.timezone, self.enabled])

    @functools.cached_property
    def zone(self) -> tzinfo:
        """The time zone."""
        return find_zone(self.timezone)

    def conflicts(self) -> Iterator[str]:
        """See HasConflicts."""
        for needed in ("function", "cron"):
            if getattr(self, needed) is None:
                yield f"set {needed}"
        if self.body is not None and self.body_file is not None:
            yield "set either body or body_file"
        headers = {name.title(): value for name, value in self.headers.items()}
        for name in headers.keys() & NOT_SCHEDULED.keys():
            yield f"headers: {name} is not for a schedule: {NOT_SCHEDULED[name]}"
        for name in headers.keys() & SCHEDULED.keys():
            try:
                SCHEDULED[name](headers[name])
            except ValueError as exc:
                yield f"headers: {name}: {exc}"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole file, checked. Immutable: a reload makes a new one."""

    gateway: GatewayConfig = GatewayConfig()
    auth: AuthConfig = AuthConfig()
    provider: ProviderConfig = ProviderConfig()
    store: StoreConfig = StoreConfig()
    nats: NatsConfig = NatsConfig()
    retry: RetryPolicy = RetryPolicy()
    callback: CallbackConfig = CallbackConfig()
    calls: CallsConfig = CallsConfig()
    log: LogConfig = LogConfig()
    queues: Mapping[str, QueueConfig] = key(table, {})
    functions: Mapping[str, Function] = key(table, {})
    schedules: Mapping[str, Schedule] = key(table, {})

    def queue(self, name: str) -> QueueConfig:
        """The settings of a queue; one that is only named somewhere has the defaults."""
        return self.queues.get(name) or QueueConfig()

    def max_interruptions(self, function: str) -> int:
        """After how many interruptions a call of this function is not run again."""
        known = self.functions.get(function)
        return (known.retry if known else self.retry).max_interruptions

    @functools.cached_property
    def functions_by_name(self) -> Mapping[str, Function]:
        """The functions by NAME and by NAME.NAMESPACE."""
        return {name: f for f in self.functions.values() for name in (f.name, f.key)}

    @functools.cached_property
    def function_limits(self) -> Mapping[str, int]:
        """max_inflight of the functions that have one, by key."""
        functions = self.functions.values()
        return {f.key: f.max_inflight for f in functions if f.max_inflight is not None}

    @functools.cached_property
    def function_rates(self) -> Mapping[str, Rate]:
        """rate of the functions that have one, by key."""
        functions = self.functions.values()
        return {f.key: f.rate for f in functions if f.rate is not None}


Settings = Callable[[], Config]  # as they stand now: a reload changes them


# --- Configuration file ---------------------------------------------------------------------------
# From TOML to these tables, with a line for each thing that is wrong.


def read_table(base: T, raw: Any, where: str, problems: list[str]) -> T:
    """`base` with a table of the file laid over it, and with the tables in that over its own.

    `where` is the table's name; what is wrong goes to `problems`, a line for each thing.
    """
    if not isinstance(raw, dict):
        problems.append(f"{where}: expected a table")
        return base
    known = {
        item.name: item.metadata.get("parse")
        for item in fields(cast(Any, base))
        if item.metadata or is_dataclass(item.default)
    }
    values: dict[str, Any] = {}
    before = len(problems)
    for name, value in raw.items():
        place = f"{where}.{name}" if where else name
        if name not in known:
            kind = "key" if where or not isinstance(value, dict) else "table"
            problems.append(f"{place}: unknown {kind}{closest(name, known)}")
        elif (parse := known[name]) is None:
            values[name] = read_table(getattr(base, name), value, place, problems)
        else:
            try:
                values[name] = parse(value)
            except ValueError as exc:
                problems.append(f"{place}: {exc}")
    made = replace(cast(Any, base), **values)
    if len(problems) == before and isinstance(made, HasConflicts):
        problems += [f"{where}: {conflict}" for conflict in made.conflicts()]
    return cast(T, made)


def closest(name: str, known: Iterable[str]) -> str:
    """A hint at the closest known name, or at the tables that a key belongs to, to end a line that
    says that a name is unknown.
    """
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f" (did you mean {close[0]}?)"
    tables = " and ".join(f"[{table}]" for table in tables_of(name))
    return f" (a key of {tables})" if tables else ""


def tables_of(name: str) -> Iterator[str]:
    """The tables that have a key of this name."""
    tables: dict[str, Any] = {item.name: item.default for item in fields(Config)}
    tables |= {"queues.NAME": QueueConfig, "functions.NAME": Function, "schedules.NAME": Schedule}
    for table_name, made in tables.items():
        if is_dataclass(made) and name in [item.name for item in fields(made) if item.metadata]:
            yield table_name


def retry_codes(value: str) -> frozenset[int]:
    """The codes in an annotation: numbers with commas between them."""
    return http_codes([number(code.strip()) for code in value.split(",")])


RETRY_ANNOTATIONS: Mapping[str, Callable[[str], Any]] = {
    "attempts": number,
    "codes": retry_codes,
    "min_wait": duration,
    "max_wait": duration,
}
warn_once = functools.cache(log.warning)  # for what is looked at again and again


def annotation(
    function: str, annotations: Mapping[str, str], name: str, parse: Callable[[str], T], default: T
) -> T:
    """The value of an annotation com.openfaas.NAME. A wrong one is ignored, and logged once."""
    value = annotations.get(f"com.openfaas.{name}")
    if value is None:
        return default
    try:
        return parse(value)
    except ValueError as exc:
        place = f"functions.{function}: annotation com.openfaas.{name}"
        warn_once(f"{place} = {value!r} ignored: {exc}")
        return default


def annotated(
    name: str, namespace: str, annotations: Mapping[str, str], retry: RetryPolicy
) -> Function:
    """A function as only its annotations describe it; its policy is `retry` and theirs over it."""

    def read(key: str, parse: Callable[[str], T], default: T) -> T:
        return annotation(name, annotations, key, parse, default)

    policy = {
        key: read(f"retry.{key}", parse, getattr(retry, key))
        for key, parse in RETRY_ANNOTATIONS.items()
    }
    return Function(
        name=name,
        namespace=namespace,
        queue=read("queue", plain_name, DEFAULT_QUEUE),
        max_inflight=read("max_inflight", number, None),
        rate=read("rate", rate, None),
        annotations=annotations,
        retry=replace(retry, **policy),
    )


def read_function(name: str, raw: Any, config: Config, problems: list[str]) -> Function:
    """A function from its table: its keys lie over its annotations, and those over [retry]."""
    annotations: Mapping[str, str] = {}
    with contextlib.suppress(ValueError, AttributeError):  # What is wrong is told below.
        annotations = string_table(raw.get("annotations", {}))
    base = annotated(name, config.gateway.namespace, annotations, config.retry)
    return read_table(base, raw, f"functions.{name}", problems)


def read_schedules(
    raw: Mapping[str, Any], config: Config, functions: Mapping[str, Function], problems: list[str]
) -> dict[str, Schedule]:
    """The schedules of the file. Without a provider, their functions have to be in it, too."""
    schedules = {}
    for name, keys in raw.items():
        place = f"schedules.{name}"
        schedule = read_table(Schedule(name=name), keys, place, problems)
        schedules[name] = schedule
        function = config.gateway.own_name(schedule.function or "")
        if function and function not in functions and config.provider.url is None:
            hint = closest(function, functions)
            problems.append(f"{place}.function: no such function: {function}{hint}")
        if len(schedule.body_file or b"") > config.gateway.max_payload:
            problems.append(f"{place}.body_file: is larger than gateway.max_payload")
    return schedules


def annotated_schedule(key: str, annotations: Mapping[str, str]) -> Schedule | None:
    """The schedule that cron-connector's annotations make for the function NAME.NAMESPACE.

    It is named like that, with a dot, so that it can't hide a schedule of the file.
    """
    topics = [topic.strip() for topic in annotations.get("topic", "").split(",")]
    if "cron-function" not in topics:
        return None
    try:
        return Schedule(
            name=key,
            function=key,
            cron=cron_list(annotations.get("schedule", "")),
            timezone=time_zone(annotations.get("timezone", "UTC")),
        )
    except ValueError as exc:
        warn_once(f"function {key}: its annotations make no schedule: {exc}")
        return None


def annotated_schedules(functions: Iterable[Function]) -> dict[str, Schedule]:
    """The schedules that functions have in their annotations."""
    found = (annotated_schedule(function.key, function.annotations) for function in functions)
    return {schedule.name: schedule for schedule in found if schedule}


def read_queues(
    raw: Mapping[str, Any], names: Iterable[str], problems: list[str]
) -> dict[str, QueueConfig]:
    """The queues of the file, and with defaults those that are only named somewhere."""
    queues = {name: QueueConfig() for name in names}
    queues[DEFAULT_QUEUE] = QueueConfig(max_inflight=4)
    for name, keys in raw.items():
        base = queues.get(name, QueueConfig())
        queues[name] = read_table(base, keys, f"queues.{name}", problems)
    return queues


def read_named(raw: Mapping[str, Any], kind: str, problems: list[str]) -> Mapping[str, Any]:
    """The tables [KIND.NAME] by name, as they stand in the file."""
    tables = raw.get(kind, {})
    if not isinstance(tables, dict):
        problems.append(f"{kind}: expected a table")
        return {}
    wrong = [name for name in tables if not NAME.fullmatch(name)]
    problems += [f"{kind}.{name}: {NAME_RULE}" for name in wrong]
    return tables


def parse_config(raw: Mapping[str, Any]) -> Config:
    """The configuration in a parsed TOML file.

    Raises ConfigError with every problem, each naming its key.
    """
    problems: list[str] = []
    named = {kind: read_named(raw, kind, problems) for kind in ("queues", "functions", "schedules")}
    others = {name: value for name, value in raw.items() if name not in named}
    config = read_table(Config(), others, "", problems)
    functions = {
        name: read_function(name, keys, config, problems)
        for name, keys in named["functions"].items()
    }
    wrong = [function for function in functions.values() if not NAME.fullmatch(function.queue)]
    problems += [f"functions.{function.name}.queue: {NAME_RULE}" for function in wrong]
    schedules = annotated_schedules(functions.values())
    schedules |= read_schedules(named["schedules"], config, functions, problems)
    used = [function.queue for function in functions.values()]
    used += [schedule.queue for schedule in schedules.values() if schedule.queue]
    queues = read_queues(named["queues"], used, problems)
    if problems:
        raise ConfigError(problems)
    return replace(config, queues=queues, functions=functions, schedules=schedules)


CONFIG_FILE = "faasd-async/config.toml"  # in the user's folder of configuration, and in /etc


def default_config() -> str | None:
    """The configuration file if none is named: a variable's, the user's, or the system's."""
    if named := os.environ.get("FAASD_ASYNC_CONFIG"):
        return named
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    for folder in (home, "/etc"):
        with contextlib.suppress(OSError, RuntimeError):  # not ours to look at; no home
            path = Path(folder).expanduser() / CONFIG_FILE
            if path.exists():
                return str(path)
    return None


def load_config(path: str | None, tables: Container[str] | None = None) -> Config:
    """Read and check a TOML file (None: all defaults), or some tables of it.

    Raises ConfigError; each line starts with the file's name.
    """
    if path is None:
        return parse_config({})
    try:
        raw = toml_tables(Path(path).read_text("utf-8-sig"))
        return parse_config(
            {name: keys for name, keys in raw.items() if tables is None or name in tables}
        )
    except OSError as exc:
        problems: Sequence[str] = [str(exc.strerror)]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        problems = [f"not valid TOML: {exc}"]
    except ConfigError as exc:
        problems = exc.problems
    raise ConfigError([f"{path}: {problem}" for problem in problems])


def read_again(path: str | None) -> Config:
    """The configuration for a reload. Raises ConfigError."""
    require_reloadable(path)
    return load_config(path)


def require_reloadable(path: str | None) -> None:
    """Raise ConfigError for a file that a reload should not take over.

    From a pipe, such as a shell's <(COMMAND), nothing comes a second time; and a full disk leaves
    empty files behind. Without its functions, all calls that wait would end.
    """
    if path is None:
        return
    try:
        found = Path(path).stat()
    except OSError:  # `load_config` says why.
        return
    if stat.S_ISDIR(found.st_mode):  # So it does here.
        return
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError([f"{path}: is no file, and could be read at the start only"])
    if not found.st_size:
        raise ConfigError([f"{path}: is empty"])


def config_counts(config: Config) -> str:
    """How many functions, queues and schedules there are, for the log."""
    counts = [count_of(len(config.functions), "function"), count_of(len(config.queues), "queue")]
    if config.schedules:
        counts.append(count_of(len(config.schedules), "schedule"))
    return ", ".join(counts)


def config_warnings(config: Config) -> Iterator[str]:
    """Lines on what is right by itself, but looks wrong on this machine now."""
    for name, function in config.functions.items():
        if function.command and not find_program(function):
            yield f"functions.{name}.command: there is no program {function.command[0]}"
        others = set(config.queues) - {function.queue}
        close = difflib.get_close_matches(function.queue, others, 1, 0.8)
        if close and config.queues[function.queue] == QueueConfig():
            yield f"functions.{name}.queue: {function.queue}: did you mean {close[0]}?"


def find_program(function: Function) -> str | None:
    """The path of a command's program, found as it would be at a start; None: there is none."""
    word = (function.command or ("",))[0]
    if "/" in word:
        return shutil.which(str(Path(function.cwd or ".") / word))
    return shutil.which(word, path=function.env.get("PATH"))


def script_warnings(config: Config) -> Iterator[str]:
    """Lines on programs that can't be run. Reads them, so it waits for their disks."""
    for name, function in config.functions.items():
        program = find_program(function) if function.command else None
        interpreter = missing_interpreter(program) if program else None
        if interpreter:
            reason = f"its first line names {interpreter}, which is not there"
            yield f"functions.{name}.command: {program} can't be run: {reason}"


def missing_interpreter(program: str) -> str | None:
    """The interpreter in a script's first line, where there is none. A carriage return counts."""
    if not Path(program).is_file():
        return None
    try:
        with Path(program).open("rb") as file:
            line = file.readline(256)
    except OSError:  # A program may be there to be run and not to be read.
        return None
    interpreter = os.fsdecode(line[2:].strip(b" \t\n").split(b" ")[0])
    if not line.startswith(b"#!") or not interpreter or Path(interpreter).exists():
        return None
    return interpreter.replace("\r", "\\r")


def store_path(config: Config) -> Path:
    """Where the queue's file is: the key, else systemd's state directory, else the user's.

    Raises ConfigError: there is no home directory.
    """
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    state = os.environ.get("STATE_DIRECTORY", "").split(":")[0] or f"{home}/faasd-async"
    place = os.path.expandvars(config.store.path or f"{state}/faasd-async.db")
    if not has_home(place):
        raise ConfigError(["this user has no home directory for the queue's file: set store.path"])
    return Path(place).expanduser()


# --- Domain data ----------------------------------------------------------------------------------
# What crosses sections. Named tuples, because they are made thousands of times a second. Units:
# `*_s` seconds, `*_at` Unix time in seconds, `*_bytes` sizes, `start_time` Unix nanoseconds.


class Invocation(NamedTuple):
    """An async call as it was accepted. `id` is unique; calls may share the caller's `call_id`."""

    id: str
    call_id: str
    function: str
    namespace: str
    queue: str
    start_time: int
    due_at: float
    max_attempts: int
    callback_url: str | None
    target: str  # what followed the function's name: path and query, as sent
    headers: bytes
    body: bytes
    method: str = "POST"
    deadline_at: float | None = None  # This and all below most calls don't have.
    failure_url: str | None = None
    idempotency_key: str | None = None
    app: str | None = None  # Fn's app, a label
    hops: int = 0  # callbacks that led from one call to the next, up to this one
    traceparent: str | None = None
    tracestate: str | None = None
    schedule: str | None = None  # whose call it is, and of which instant
    scheduled_for: float | None = None
    concurrency_key: str | None = None  # of a function's calls with the same, one runs at a time

    @property
    def lane(self) -> str:
        """The calls of one function share a lane."""
        return function_key(self.function, self.namespace)


class Claim(NamedTuple):
    """Work handed to a consumer, which owns it until it completes, retries or dies.

    It is a call of `queue` or, in the queue CALLBACKS, the outcome of one. Calls of a lane are
    FIFO, lanes take turns: a function's calls share a lane, and so do the callbacks to one host.
    """

    receipt: Hashable  # the queue's own handle of this claim; another claim has another one
    id: str
    call_id: str
    function: str
    queue: str
    lane: str
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
    redrives: int = 0  # how often it was queued again after its end
    hops: int = 0
    traceparent: str | None = None
    tracestate: str | None = None
    method: str = "POST"
    concurrency_key: str | None = None


class FunctionRequest(NamedTuple):
    """What a function is asked. `target` is the path and query that followed its name, as sent."""

    method: str
    target: str
    headers: bytes  # packed, see `pack_headers`
    body: bytes | AsyncIterator[bytes]


class Outcome(NamedTuple):
    """What one attempt gave: an answer, or the status that stands for its absence, and why."""

    status: int
    ok: bool
    duration_s: float
    headers: Headers = ()
    body: bytes = b""
    size: int = 0  # of the whole body, also where only its beginning is kept
    stderr: bytes = b""
    error: str | None = None
    answered: bool = True
    final: bool = False  # another attempt would end the same way

    def header(self, name: bytes) -> str | None:
        """The first value of a response header, by its lower-case name."""
        for key, value in self.headers:
            if key.lower() == name:
                return value.decode("latin-1")
        return None


class Decision(NamedTuple):
    """What follows from an outcome: a final status, or another attempt after `delay_s`."""

    status: str
    delay_s: float | None = None


SUCCEEDED = Decision("success")


class Ended(NamedTuple):
    """A call that has reached its final state."""

    id: str
    call_id: str
    function: str
    status: str
    attempts: int
    duration_s: float | None = None
    http_status: int | None = None
    error: str | None = None
    elsewhere: bool = False  # in another daemon on the same queue, which tells of it, too
    queue: str = ""
    lane: str = ""  # NAME.NAMESPACE of the function


class CallbackRecord(NamedTuple):
    """What became of a call's callback; `url` as it was given, with its credentials."""

    url: str | None
    status: str
    attempts: int
    http_status: int | None
    error: str | None


class Failure(NamedTuple):
    """An attempt or a delivery that led to another one."""

    of: str  # "attempt" or "callback"
    number: int  # of the attempt or the delivery, from 1
    failed_at: float
    duration_s: float
    http_status: int | None
    error: str | None


class CallRecord(NamedTuple):
    """What is known of a call. A queued call that is not due has the status "delayed"."""

    id: str
    call_id: str
    function: str
    namespace: str
    queue: str
    status: str
    attempts: int
    max_attempts: int
    http_status: int | None
    error: str | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    due_at: float | None
    duration_s: float | None
    interrupted: int
    request_bytes: int
    response_bytes: int | None
    app: str | None
    traceparent: str | None
    schedule: str | None
    scheduled_for: float | None
    concurrency_key: str | None
    callback: CallbackRecord
    history: Sequence[Mapping[str, Any]] = ()  # one for each time it was queued again, oldest first
    failures: Sequence[Failure] = ()  # since then, oldest first: the last MAX_FAILURES

    @property
    def lane(self) -> str:
        """The calls of one function share a lane."""
        return function_key(self.function, self.namespace)


class CallFilter(NamedTuple):
    """Which records are meant: those that match all that is given. `*_at` compares `created_at`."""

    statuses: tuple[str, ...] = ()
    callbacks: tuple[str, ...] = ()
    function: str | None = None
    queue: str | None = None
    call_id: str | None = None
    app: str | None = None
    schedule: str | None = None
    since: float | None = None
    until: float | None = None


# A CallFilter as query parameters.
FILTERS = ("status", "callback", "function", "queue", "call_id", "schedule", "since", "until")


class Page(NamedTuple):
    """Records, newest first, and where the next page begins; None: there is none."""

    records: Sequence[CallRecord]
    next_cursor: str | None


class Output(NamedTuple):
    """What a call's last attempt wrote."""

    body: bytes
    stderr: bytes


class StoredRequest(NamedTuple):
    """What a call asks its function, as it is stored."""

    method: str
    target: str
    headers: Headers
    body: bytes


class StoredAnswer(NamedTuple):
    """A function's last answer: all of its body, and the headers that describe that."""

    http_status: int | None
    headers: Headers
    body: bytes


class Changes(NamedTuple):
    """Calls that have changed, in that order, each as it was right after its change.

    The records lack `history` and `failures`.
    """

    records: Sequence[CallRecord]
    missed: int = 0  # further changes, which were too many to be told one by one


class BulkResult(NamedTuple):
    """How many runs matched, and for how many of them it could be done."""

    matched: int
    done: int


class ScheduledRun(NamedTuple):
    """An instant of a schedule, and what became of it."""

    scheduled_for: float
    id: str | None  # of its call; None: there was none
    # The call's as it was known last; "skipped": another one was under way; "missed": too late.
    status: str
    completed_at: float | None = None
    duration_s: float | None = None
    error: str | None = None


class ScheduleState(NamedTuple):
    """What the store knows of a schedule."""

    name: str
    revision: int = 0  # by which it may be written over; 0: it is not stored yet
    definition: str = ""  # expressions and time zone that `last_at` was counted by
    last_at: float = 0.0  # the last instant that is settled: later ones have not been looked at
    begun_at: float = 0.0  # since when it has this definition
    paused: bool = False
    boots: Sequence[str] = ()  # the last starts of machines for which @reboot has fired
    missed: int = 0
    last_success_at: float | None = None
    runs: Sequence[ScheduledRun] = ()  # the last ones, newest first


def pack_schedule(state: ScheduleState) -> str:
    """A schedule's state as JSON, without its revision."""
    return json.dumps(state._asdict() | {"revision": 0})


def unpack_schedule(document: Mapping[str, Any], revision: int) -> ScheduleState:
    """A schedule's state from its parsed JSON, without what another version has put there."""
    runs = tuple(ScheduledRun(*run[: len(ScheduledRun._fields)]) for run in document["runs"])
    known = {name: document[name] for name in ScheduleState._fields if name in document}
    boots = tuple(document["boots"])
    return ScheduleState(**{**known, "boots": boots, "runs": runs, "revision": revision})


class QueueStats(NamedTuple):
    """One queue as it stands: calls waiting (delayed ones too) by lane, and the oldest due time."""

    waiting: Mapping[str, int]
    oldest_at: float  # infinity: nothing waits
    paused: bool
    held_back: Mapping[str, str] = {}  # lanes that wait although it is not paused, and why

    @property
    def depth(self) -> int:
        """Calls waiting."""
        return sum(self.waiting.values())


class StoreFigures(NamedTuple):
    """What the queue takes of where it is stored."""

    place: str  # a file's path, or servers
    used_bytes: int
    free_bytes: int | None  # that are left there; None: that is not told
    age_seconds: float = 0.0  # of these figures and of the queue's: above 0 while it can't be asked


class Overview(NamedTuple):
    """A queue in figures, which cost the same however many records there are.

    `counts` has the number of records by lane and status; under the lane CALLBACKS, by the status
    of the callback. Unless `complete`, it lacks the final ones: only who hears of each end can
    count those.
    """

    queues: Mapping[str, QueueStats]
    counts: Mapping[tuple[str, str], int]
    store: StoreFigures
    complete: bool = True


def failure_of(of: str, number: int, outcome: Outcome, now: float) -> Failure:
    """What a record keeps of an outcome that leads to another attempt or delivery."""
    http_status = None if of == "callback" and not outcome.answered else outcome.status
    times = (round(now, 6), round(outcome.duration_s, 6))
    return Failure(of, number, *times, http_status, outcome.error)


def failure_document(failure: Failure) -> dict[str, Any]:
    """A failure as the API shows it."""
    shown = failure._asdict()
    shown["failed_at"] = rfc3339(failure.failed_at)
    shown["duration_seconds"] = shown.pop("duration_s")
    return shown


def record_document(record: CallRecord) -> dict[str, Any]:
    """A record as the API shows it."""
    shown = record._asdict()
    if failures := shown.pop("failures"):
        shown["failures"] = list(map(failure_document, failures))
    for name in ("created_at", "started_at", "completed_at", "due_at", "scheduled_for"):
        shown[name] = rfc3339(shown[name])
    history = shown.pop("history")
    if history:
        times = ("started_at", "completed_at")
        shown["history"] = [{**was, **{at: rfc3339(was[at]) for at in times}} for was in history]
    shown["duration_seconds"] = shown.pop("duration_s")
    for name in ("app", "traceparent", "concurrency_key"):
        if shown[name] is None:
            del shown[name]
    if record.schedule is None:
        del shown["schedule"], shown["scheduled_for"]
    callback = shown.pop("callback")
    shown["callback"] = callback._replace(url=show_url(callback.url))._asdict()
    return shown


def fn_document(record: CallRecord) -> dict[str, Any]:
    """A call as Fn showed it."""
    return {
        "id": record.call_id,
        "app_name": record.app,
        "path": "/" + record.function,
        "status": record.status,
        "created_at": rfc3339(record.created_at),
        "started_at": rfc3339(record.started_at),
        "completed_at": rfc3339(record.completed_at),
    }


def queue_document(
    name: str,
    stats: QueueStats,
    config: QueueConfig,
    rates: Mapping[str, Rate],
    inflight: int,
    now: float,
) -> dict[str, Any]:
    """A queue as the API shows it; `rates` are those of its functions, by key."""
    return {
        "name": name,
        "depth": stats.depth,
        "inflight": inflight,
        "oldest_seconds": round(max(0.0, now - stats.oldest_at), 3),
        "max_inflight": config.max_inflight,
        "paused": stats.paused,
        "rate": config.rate.text if config.rate else None,
        "functions": stats.waiting,
        "function_rates": {name: rate.text for name, rate in rates.items()},
        "max_pending": config.max_pending,
        "timeout_seconds": config.timeout,
        "fair": config.fair,
        "adaptive": config.adaptive,
    }


def function_document(function: Function, invocations: int) -> dict[str, Any]:
    """A function as OpenFaaS's API shows it."""
    return {
        "name": function.name,
        "namespace": function.namespace,
        "labels": function.labels,
        "annotations": function.annotations,
        "image": "",
        "replicas": 1,
        "availableReplicas": 1,
        "invocationCount": invocations,
    }


PACKED_HEADER = re.compile(rb"([^:]*): (.*)\n")


def pack_headers(headers: Iterable[Header]) -> bytes:
    """Header lines as one blob, as they are stored and sent; no value goes on in another line."""
    return b"".join([name + b": " + value.replace(b"\n", b" ") + b"\n" for name, value in headers])


def unpack_headers(blob: bytes | None) -> Headers:
    """Headers from the blob that `pack_headers` has made."""
    return tuple(PACKED_HEADER.findall(blob or b""))


# --- Rules ----------------------------------------------------------------------------------------
# Pure functions: what follows from what, without I/O.


def backoff_s(policy: RetryPolicy, attempt: int, rng: random.Random) -> float:
    """Seconds to wait after the failed `attempt` (from 1): min_wait doubled each time, to max_wait.

    "full" and "equal" jitter: "Exponential Backoff And Jitter" on AWS's architecture blog, 2015.
    """
    wait = min(policy.max_wait, policy.min_wait * 2.0 ** min(attempt - 1, 60))
    if policy.backoff == "full":
        return rng.uniform(0, wait)
    if policy.backoff == "equal":
        return rng.uniform(wait / 2, wait)
    return wait


def retry_after_s(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for, in either form of RFC 9110 10.2.3.

    None where it says nothing.
    """
    value = value or ""
    if re.fullmatch(r"\s*[0-9]+\s*", value):
        return min(float(value), MAX_RETRY_AFTER_S)
    with contextlib.suppress(ValueError, OverflowError):
        # RFC 9110 5.6.7: always in GMT.
        moment = email.utils.parsedate_to_datetime(value).replace(tzinfo=UTC)
        return min(max(0.0, moment.timestamp() - now), MAX_RETRY_AFTER_S)
    return None


def decide(
    outcome: Outcome,
    attempt: int,
    max_attempts: int,
    policy: RetryPolicy,
    now: float,
    rng: random.Random,
) -> Decision:
    """What follows from the outcome of attempt number `attempt`.

    A failure whose status is one of `policy.codes`, or which one of OpenFaaS's own parts answered,
    is tried again until the attempts are used up; a refused connection counts as 502, a timeout as
    504. Retry-After on 429 and 503 replaces the wait, never below min_wait.
    """
    if outcome.ok:
        return SUCCEEDED
    internal = outcome.header(b"x-openfaas-internal") is not None
    passing = not outcome.final and (internal or outcome.status in policy.codes)
    if not passing or attempt >= max_attempts:
        late = outcome.status == 504 and not outcome.answered
        return Decision("timeout" if late else "error")
    retry_after = None
    if outcome.status in (429, 503):
        retry_after = retry_after_s(outcome.header(b"retry-after"), now)
    if retry_after is None:
        return Decision("queued", backoff_s(policy, attempt, rng))
    return Decision("queued", max(retry_after, policy.min_wait))


def callback_target(status: str, callback_url: str | None, failure_url: str | None) -> str | None:
    """Where an outcome is told: failures go to X-Failure-Callback-Url when there is one."""
    if failure_url and status in FAILED:
        return failure_url
    return callback_url


@functools.lru_cache(1_000)
def callback_lane(target: str) -> str:
    """The lane of a callback: its host and port, so that a dead one doesn't hold up others.

    Never raises: a call whose URL is none has to end, too.
    """
    parts = split_url(target)
    return "" if parts is None else parts.place


class Learned(NamedTuple):
    """How many calls a function takes at once, and when it last took less (monotonic)."""

    limit: float = 1.0
    lowered_at: float = 0.0


def learn(learned: Learned, status: int, started: float, now: float) -> Learned:
    """Additive increase, multiplicative decrease (Chiu and Jain, 1989).

    Until the first 429 the limit grows by one with each answer, then by one with about four rounds
    of answers. A 429 halves it, once for all calls that had `started` (monotonic) before that.
    """
    if status != 429:
        step = 0.25 / learned.limit if learned.lowered_at else 1.0
        return learned._replace(limit=learned.limit + step)
    if started > learned.lowered_at:
        return Learned(max(1.0, learned.limit / 2), now)
    return learned


@functools.lru_cache(1024)
def callback_allowed(host: str, address: str | None, config: CallbackConfig) -> bool:
    """Whether a callback may go to this host, at this address once that is known; a host in its
    place says that it never will be, because a proxy looks the name up.

    With `allow`, nothing else is allowed; a name passes while its address is unknown and `allow`
    has networks, which can't be compared yet. Link-local addresses and others of cloud metadata
    need an entry of `allow` for the address itself.
    """
    name = host.lower().rstrip(".")
    literal = address_in(address or host)
    reached = [] if literal is None else list(addresses_reached(literal))
    addresses = list(map(str, reached))
    if is_listed([name, *addresses], config.deny):
        return False
    if any(one.is_link_local or one in CLOUD_METADATA for one in reached):
        return is_listed(addresses, config.allow)
    if not config.allow or is_listed([name, *addresses[:1]], config.allow):
        return True
    return literal is None and address is None and any(map(is_network_pattern, config.allow))


def calls_function(url: yarl.URL) -> bool:
    """Whether a URL of this daemon is one of a function. Callbacks lead to no other of its routes:
    whoever may call functions may perhaps reach nothing else of it.
    """
    return url.raw_path.startswith(OF_FUNCTIONS)


def from_elsewhere(site: str | None, origin: str | None, host: str, trusted: Sequence[str]) -> bool:
    """Whether a browser sent an unsafe request from a page of another site.

    The rule of Go 1.25's http.CrossOriginProtection, with the values of Sec-Fetch-Site, Origin and
    Host. A request with neither of the first two comes from no browser.
    """
    if origin is not None and origin.lower() in trusted:
        return False
    if site:
        return site not in ("same-origin", "none")
    if not origin:
        return False
    try:
        netloc = urlsplit(origin).netloc
        return not netloc or netloc.lower() != host.lower()
    except ValueError:
        return True


def starts_now(rate: Rate, next_at: float, now: float) -> int:
    """How many calls may start now, if the next one was to start at `next_at` (Unix time)."""
    late_s = now - first_start(rate, next_at, now)
    return int(late_s / rate.interval_s + 1e-6) + 1 if late_s > -1e-6 else 0


def next_start(rate: Rate, next_at: float, number: int, now: float) -> float:
    """When the next call may start, once `number` of them have started now."""
    return first_start(rate, next_at, now) + number * rate.interval_s


def first_start(rate: Rate, next_at: float, now: float) -> float:
    """When the first of the next calls may start, or might have started already.

    This is virtual scheduling, of the generic cell rate algorithm (ITU-T I.371, annex A). Whoever
    starts late may catch up with a tenth of the period, and with one second at most: what was not
    used before is no credit. A `next_at` that is further ahead than this rate can lead to comes
    from a clock that was set back since, or from a lower rate, and does not count.
    """
    if next_at > now + rate.interval_s + RATE_CLOCKS_S:
        return now
    return max(next_at, now - min(RATE_CATCH_UP_S, rate.period_s / 10))


TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


def trace_context(headers: Iterable[Header]) -> tuple[str | None, str | None]:
    """traceparent and tracestate of a request, as W3C's Trace Context has them (3.2, 3.3).

    None, None: there is no traceparent, more than one, or one that is not valid, and then a
    tracestate means nothing. Of a version after 00 more may follow, behind another dash.
    """
    parents = [value for name, value in headers if name.lower() == b"traceparent"]
    parent = parents[0].decode("latin-1") if len(parents) == 1 else ""
    known = TRACEPARENT.match(parent)
    if known is None:
        return None, None
    rest = parent[known.end() :]
    if not re.fullmatch("(-[!-~]{0,200})?", rest) or (rest and parent.startswith("00")):
        return None, None
    states = [value for name, value in headers if name.lower() == b"tracestate"]
    return parent, ",".join(state.decode("latin-1") for state in states) or None


def require_login(authorization: str, login: str, view_login: str | None) -> bool:
    """Whether these credentials may act, or only look. In constant time. HttpError(401)."""
    kind, _, credentials = authorization.partition(" ")
    presented = f"{kind.title()} {credentials.strip()}".encode(errors="replace")
    may_act = hmac.compare_digest(presented, login.encode())
    may_look = hmac.compare_digest(presented, (view_login or login).encode())
    if not may_act and not may_look:
        challenge = {"WWW-Authenticate": 'Basic realm="Restricted"'}
        raise HttpError(401, "credentials are needed", challenge)
    return may_act


def via(target: str) -> str:
    """A Via header (RFC 9110 7.6.3) for what goes to the provider.

    For a function without replicas faasd calls port 8080 of its own host, with this path: that is
    how a gateway there recognizes its own request.
    """
    path = target.lstrip("/").encode("utf-8", "surrogateescape")
    return f"1.1 faasd-async-{zlib.crc32(path):08x}"


def in_percent(target: str) -> str:
    """A target whose bytes above 127 are written as they should have been."""
    return quote(target.encode("utf-8", "surrogateescape"), safe=string.punctuation)


def headers_for_target(target: str, headers: CIMultiDictProxy[str]) -> CIMultiDictProxy[str]:
    """A request's headers. The host of a target in absolute form stands in place of what Host says
    (RFC 9112 3.2.2).
    """
    parts = split_url(target)
    if parts is None or not parts.place:
        return headers
    replaced = CIMultiDict(headers)
    replaced["Host"] = parts.place
    return CIMultiDictProxy(replaced)


def split_target(target: str) -> tuple[str, str]:
    """The first segment of what follows the route, and the rest (path and query), as sent."""
    first = target.partition("?")[0].partition("/")[0]
    return first, target[len(first) :]


def forward_headers(headers: Iterable[Header], drop: frozenset[bytes]) -> list[Header]:
    """The end-to-end headers: neither hop-by-hop, nor named by Connection, nor one of `drop`."""
    kept: list[Header] = []
    named: set[bytes] = set()
    for item in headers:
        name = item[0].lower()
        if name == b"connection":
            named |= {part.strip().lower() for part in item[1].split(b",")}
        elif name not in drop and name not in HOP_BY_HOP:
            kept.append(item)
    if not named:
        return kept
    return [item for item in kept if item[0].lower() not in named]


MARKER_BYTES = 64  # room for the line that stands for what is missing


def leave_middle_out(start: bytes, end: bytes, size: int, keep: int) -> bytes:
    """Of `size` bytes, which begin with `start` and end with `end`, as much of both as fits.

    A line stands for what is missing; no character is cut. What has too little room for that line
    is only the beginning.
    """
    if size <= keep:
        return start
    room = keep - MARKER_BYTES
    if room < MARKER_BYTES:
        return start[:keep]
    first = re.sub(rb"[\xc0-\xff][\x80-\xbf]{0,2}\Z", b"", start[: room // 2])
    last = re.sub(rb"^[\x80-\xbf]{1,3}", b"", end[-(room - len(first)) :])
    missing = size - len(first) - len(last)
    return first + f"\n… {missing} bytes are not kept …\n".encode() + last


def shorten(data: bytes, keep: int) -> bytes:
    """The beginning and the end of something that is longer than `keep`."""
    if len(data) <= keep:
        return data
    return leave_middle_out(data, data, len(data), keep)


class Kept:
    """Collects what comes piece by piece: its size, and `keep` bytes of its beginning and end."""

    def __init__(self, keep: int) -> None:
        self.size = 0  # of all that has come
        self._keep = keep
        self._start = bytearray()
        self._end = bytearray()  # what came after that, at least the last `keep` bytes of it

    def add(self, piece: bytes) -> None:
        """The next piece."""
        self.size += len(piece)
        free = self._keep - len(self._start)
        self._start += piece[:free] if free > 0 else b""
        self._end += piece[max(0, free) :]
        if len(self._end) > 2 * self._keep:
            del self._end[: -self._keep]

    def whole(self) -> bytes:
        """All that has come, or its beginning and end where that is more than `keep` bytes."""
        end = bytes(self._start[len(self._end) :] + self._end)
        return leave_middle_out(bytes(self._start), end, self.size, self._keep)


def unpacked(body: bytes) -> bytes:
    """A body for people: of one in gzip (also a cut one) or deflate, the first MiB unpacked."""
    with contextlib.suppress(zlib.error):
        if body.startswith(b"\x1f\x8b"):  # RFC 1952 2.3.1
            return zlib.decompressobj(wbits=31).decompress(body, MIB)
        if body[:1] == b"x" and int.from_bytes(body[:2]) % 31 == 0:  # RFC 1950 2.2
            inflating = zlib.decompressobj()
            inflated = inflating.decompress(body, MIB)
            if inflating.eof or inflating.unconsumed_tail:  # else it may be text, such as "x^2"
                return inflated
    return body


def readable(output: Output) -> bytes:
    """A body and what is on stderr, one after the other, for people.

    A command that fails answers with its stderr, if it has nothing else to say: that is shown once.
    """
    body = unpacked(output.body)
    if output.body == output.stderr:
        return body
    gap = b"\n" if body and output.stderr and not body.endswith(b"\n") else b""
    return body + gap + output.stderr


DESCRIBING = frozenset((b"content-type", b"content-encoding", b"content-language"))
SECRET_HEADER = re.compile(
    r"authorization|cookie|token|secret|passw|api-?key|signature", re.IGNORECASE
)


@functools.lru_cache(32)
def describing_headers(headers: Headers) -> bytes:
    """The headers that say what a body is, packed: they are kept with it."""
    return pack_headers([item for item in headers if item[0].lower() in DESCRIBING])


def shown_headers(headers: Iterable[Header]) -> list[tuple[str, str]]:
    """Headers for people, with *** for what sounds secret, and URLs without their credentials."""
    shown = []
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("utf-8", "replace")
        shown.append((name, "***" if SECRET_HEADER.search(name) else show_url(value) or ""))
    return shown


def webhook_signature(
    secret: bytes, message_id: str, timestamp: int, body: bytes
) -> dict[str, str]:
    """The headers of https://www.standardwebhooks.com: HMAC-SHA256 over id, time and body."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    digest = hmac.digest(signing_key(secret), signed, "sha256")
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }


# --- Schedule rules -------------------------------------------------------------------------------
# Pure functions: what is to be fired, given what was fired last and what time it is.

PUNCTUAL_S = 60.0  # What runs in its own minute is not late, as cron has it.
MOST_CAUGHT_UP = 100  # instants of one gap that are looked at: the last ones
CLOCK_ERROR_S = 3 * 3600.0  # A clock that is set back by more was wrong: cron(8) of Debian.
UNSURE_S = 120.0  # after a start of the machine, until a clock that nobody vouches for is taken
PRUNED = "pruned"  # of a run whose record is gone
SHOWN_RUNS = 20
SHOWN_NEXT = 5
KEPT_BOOTS = 20


class Due(NamedTuple):
    """Instants up to now that were not settled: those to be fired, and those that are too late."""

    fire: Sequence[float]
    missed: Sequence[float]


def next_instants(schedule: Schedule, after: float) -> Iterator[float]:
    """The instants of a schedule later than `after`, in their order. @reboot has none."""
    last = after
    expressions = [line for line in schedule.cron or () if line != REBOOT]
    for at in heapq.merge(*(instants(line, schedule.zone, after) for line in expressions)):
        if at > last:
            yield at
            last = at


def last_instants(schedule: Schedule, after: float, until: float) -> Sequence[float]:
    """The last MOST_CAUGHT_UP instants between two times.

    They are looked for in longer and longer spans before `until`: years may lie between the two.
    """
    length_s = 3600.0
    while True:
        start = max(after, until - length_s)
        coming = next_instants(schedule, start)
        found = deque(itertools.takewhile(lambda at: at <= until, coming), MOST_CAUGHT_UP)
        if start <= after or len(found) == MOST_CAUGHT_UP:
            return found
        length_s *= 4


def settle(schedule: Schedule, last_at: float, now: float) -> Due:
    """What is to be done with the instants after `last_at` up to now.

    `catch_up` says which are run late, if any: the last one, or all, but none by more than
    `max_late`. In its own minute an instant is not late.
    """
    past = last_instants(schedule, last_at, now)
    limit_s = max(PUNCTUAL_S, 0.0 if schedule.catch_up == "none" else schedule.max_late)
    fresh = [at for at in past if now - at < limit_s]
    if schedule.catch_up != "all":
        fresh = fresh[-1:]
    return Due(fresh, [at for at in past if at not in fresh])


def counted_from(last_at: float, now: float) -> float:
    """The time after which instants are looked at: the last settled one.

    If that is hours ahead, a clock was wrong that settled it, here or on another host: then the
    last minute.
    """
    return now - PUNCTUAL_S if last_at > now + CLOCK_ERROR_S else last_at


def jitter_s(schedule: Schedule, host: str) -> float:
    """By how much this host fires late, so that not all do at once: the same each time."""
    digest = hashlib.blake2b(f"{host}/{schedule.name}".encode(), digest_size=4).digest()
    return schedule.jitter * int.from_bytes(digest, "big") / 2**32


def run_id(schedule: str, at: float) -> str:
    """The id of the call of an instant: a UUIDv7 of that time, the same whoever makes it."""
    digest = hashlib.blake2b(f"{schedule} {at:.3f}".encode(), digest_size=10).digest()
    bits = int.from_bytes(digest, "big")
    return uuid7(round(at * 1000), bits >> 68, bits & (2**62 - 1))


def unfinished(state: ScheduleState) -> Sequence[ScheduledRun]:
    """The runs whose calls had not ended when they were looked at last."""
    return [run for run in state.runs if run.id and run.status not in (*FINAL, PRUNED)]


def followed(state: ScheduleState, runs: Sequence[ScheduledRun]) -> ScheduleState:
    """The state with these runs in it: new ones, or what has become of those that it had."""
    ids = {run.id for run in runs if run.id}
    others = [run for run in state.runs if run.id not in ids]
    all_runs = sorted([*runs, *others], key=lambda run: run.scheduled_for, reverse=True)
    ends = [run.completed_at for run in runs if run.status == "success" and run.completed_at]
    last_success_at = max([state.last_success_at or 0.0, *ends]) or None
    return state._replace(runs=all_runs[:SHOWN_RUNS], last_success_at=last_success_at)


def gone(
    states: Iterable[ScheduleState], names: Container[str], provided: bool
) -> Iterator[ScheduleState]:
    """The states of schedules that have gone. If they come back, they begin anew: nobody has
    missed them meanwhile.

    `provided`: those with a dot may be the provider's, who has not told yet.
    """
    for state in states:
        if state.definition and state.name not in names and not (provided and "." in state.name):
            yield state._replace(definition="")


def run_of(record: CallRecord) -> ScheduledRun:
    """What a schedule keeps of a call."""
    return ScheduledRun(
        record.scheduled_for or record.created_at,
        record.id,
        record.status,
        record.completed_at,
        record.duration_s,
        record.error,
    )


def clock_doubt(synchronised: bool | None, uptime_s: float) -> str | None:
    """Why the wall clock is not to be trusted yet. A machine without a battery starts in 1970.

    None: somebody vouches for it, or nobody has for UNSURE_S.
    """
    if synchronised or uptime_s >= UNSURE_S:
        return None
    return "the clock is not synchronised, and this machine has just started"


def schedule_words(schedule: Schedule) -> str:
    """When a schedule fires, in English."""
    words = "; ".join(map(cron_words, schedule.cron or ()))
    return f"{words} ({schedule.timezone})"


def instant_words(schedule: Schedule, at: float) -> str:
    """An instant, by the clocks of its zone."""
    return datetime.fromtimestamp(at, schedule.zone).strftime("%a %Y-%m-%d %H:%M %Z")


def schedule_document(
    schedule: Schedule, state: ScheduleState, following: Sequence[float]
) -> dict[str, Any]:
    """A schedule as the API shows it."""
    runs = [run._asdict() for run in state.runs]
    for run in runs:
        run["scheduled_for"] = rfc3339(run["scheduled_for"])
        run["completed_at"] = rfc3339(run["completed_at"])
        run["duration_seconds"] = run.pop("duration_s")
    return {
        "name": schedule.name,
        "function": schedule.function,
        "cron": schedule.cron,
        "timezone": schedule.timezone,
        "words": schedule_words(schedule),
        "enabled": schedule.enabled,
        "paused": state.paused,
        "overlap": schedule.overlap,
        "catch_up": schedule.catch_up,
        "max_late_seconds": schedule.max_late,
        "jitter_seconds": schedule.jitter,
        "queue": schedule.queue,
        "next": list(map(rfc3339, following)),
        "runs": runs,
        "missed": state.missed,
        "last_success_at": rfc3339(state.last_success_at),
    }


# --- Logging, sd_notify ---------------------------------------------------------------------------

PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  # of syslog(3)


class LogFormatter(logging.Formatter):
    """Text or JSON lines.

    A line for the journal begins with its priority, such as "<6>". As text it has no time then:
    the journal has its own.
    """

    def __init__(self, style: str) -> None:
        super().__init__()
        self._json = style == "json"
        stderr = os.fstat(2)
        self._journal = os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback where there is one."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        priority = f"<{PRIORITIES[record.levelname]}>" if self._journal else ""
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        if self._json:
            head = {"time": rfc3339(record.created), "level": record.levelname.lower()}
            document = {**head, "message": message, **fields}
            return priority + json.dumps(document, ensure_ascii=False, default=str)
        shown = [f"{name}={self._quoted(value)}" for name, value in fields.items()]
        line = " ".join([record.levelname, message, *shown])
        return f"{priority}{line}" if priority else f"{rfc3339(record.created)} {line}"

    def _quoted(self, value: object) -> str:
        shown = f"{value:.6f}" if isinstance(value, float) else str(value)
        plain = shown.isprintable() and re.fullmatch(r"[^\s\"=]+", shown)
        return shown if plain else json.dumps(shown)


class LogWriter(logging.Handler):
    """Writes lines to standard error in a thread of its own.

    Whoever reads them may hang (a journal on a slow card, a container's log driver). That holds
    nothing else up. Lines beyond MAX_LOG_LINES are lost; how many is told once some are read again.
    """

    def __init__(self) -> None:
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()
        super().__init__()  # Last: at exit Python closes every handler for which this was called.

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a line over, if there is room."""
        if self._lines.qsize() >= MAX_LOG_LINES:
            self._lost += 1
        else:
            self._lines.put(self.format(record) + "\n")

    def close(self) -> None:
        """Let the last lines go out, for LOG_S at most."""
        self._lines.put(None)
        self._thread.join(LOG_S)
        super().close()

    def _run(self) -> None:
        ended = False
        while not ended:
            lines = [self._lines.get()]
            while self._lines.qsize():
                lines.append(self._lines.get())
            ended = None in lines
            lost = self._lost
            if lost:
                self._lost -= lost
                lines.append(f"WARNING {lost} log lines are lost: nobody has read them in time\n")
            self._write("".join(filter(None, lines)).encode(errors="backslashreplace"))

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # Nobody reads it any more.
            while data:
                data = data[os.write(2, data) :]


def setup_logging(config: LogConfig) -> None:
    """Send the log to standard error in the configured form. Called again on reload."""
    if not log.handlers:
        log.addHandler(LogWriter())
    for handler in log.handlers:
        handler.setFormatter(LogFormatter(config.format))
    log.propagate = False
    log.setLevel(config.level.upper())
    # Nobody reads these (https://docs.python.org/3/howto/logging.html#optimization).
    logging.logThreads = False
    logging.logProcesses = False
    logging.logMultiprocessing = False


def log_with(level: int, message: str, **fields: object) -> None:
    """A log line with fields; those that are None are left out."""
    if log.isEnabledFor(level):
        present = {name: value for name, value in fields.items() if value is not None}
        log.log(level, message, extra={"fields": present})


class RecurringWarning:
    """A warning about what may last: logged at once, and again after a while or for another reason.

    `line` has a %s for the reason.
    """

    def __init__(self, line: str, again_s: float) -> None:
        self._line = line
        self._again_s = again_s
        self._reason: str | None = None  # the last one that was logged
        self._logged_at = 0.0  # monotonic

    def log(self, reason: str) -> None:
        """Log it, unless it was logged lately for this reason."""
        now = time.monotonic()
        if reason != self._reason or now - self._logged_at >= self._again_s:
            self._reason = reason
            self._logged_at = now
            log.warning(self._line, reason)


def log_bodies(config: LogConfig, call_id: str, **bodies: bytes) -> None:
    """With `write_debug`: bodies in the log, escaped and cut."""
    if config.write_debug:
        shown = {name: repr(body[:DEBUG_BODY_BYTES])[2:-1] for name, body in bodies.items()}
        log_with(logging.INFO, "bodies", call_id=call_id, **shown)


def sd_notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); does nothing where no one listens, and never waits."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    if path.startswith("@"):  # a name in the abstract namespace (unix(7))
        path = "\0" + path[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.sendto(state.encode(), path)
    except OSError as exc:  # also for want of a descriptor
        log.warning("systemd could not be notified: %s", exc)


@contextlib.contextmanager
def sd_reload() -> Iterator[None]:
    """Tell systemd that a reload begins, and that it has ended, as Type=notify-reload wants it."""
    sd_notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    yield
    sd_notify("READY=1")


def watchdog_limit() -> float | None:
    """How many seconds systemd's watchdog waits for a word of this process, if it does."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    if not usec.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(usec) / 1e6


# --- Metrics --------------------------------------------------------------------------------------
# Under OpenFaaS's names.


class LoopCounter:
    """A counter with one label, for the event loop alone: only `collect` is for any thread, and
    goes through a copy, which is made in one step.

    It costs a tenth of one of the library's, which threads may share. Those of `known` labels are
    there from the start: to Prometheus, a counter that appears as 1 has not increased. Other labels
    are names of functions and queues that exist: nobody else can add to them without end.
    """

    def __init__(
        self,
        registry: prometheus_client.CollectorRegistry,
        name: str,
        meaning: str,
        label: str,
        known: Iterable[str] = (),
    ) -> None:
        self._name = name
        self._meaning = meaning
        self._label = label
        self._counts: Counter[str] = Counter(dict.fromkeys(known, 0))
        registry.register(self)

    def count(self, value: str) -> None:
        """Count one more of this label."""
        self._counts[value] += 1

    def collect(self) -> Iterable[Metric]:
        """What a scrape sees."""
        family = CounterMetricFamily(self._name, self._meaning, labels=[self._label])
        for value, count in dict(self._counts).items():
            family.add_metric([value], count)
        return [family]


class LastHour:
    """What happened in each of the last 60 minutes, by kind and name (of a function or queue)."""

    MINUTES = 60

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()  # of the minute that is not over yet
        self._minutes: deque[Counter[tuple[str, str]]] = deque([self._counts], self.MINUTES)
        self._ends = self._next_minute()

    def _next_minute(self) -> float:
        return (time.monotonic() // 60 + 1) * 60

    def _turn(self) -> None:
        """Begin with another minute where one is over."""
        over = int((time.monotonic() - self._ends) // 60) + 1
        for _ in range(min(self.MINUTES, over)):
            self._counts = Counter()
            self._minutes.append(self._counts)
        self._ends = self._next_minute()

    def count(self, kind: str, name: str) -> None:
        """Count one more of this kind and name."""
        if self._ends <= time.monotonic():
            self._turn()
        self._counts[kind, name] += 1

    def series(self, kind: str, name: str) -> list[int]:
        """How often, minute by minute, oldest first; the last one is not over yet."""
        self._turn()
        known = [minute[kind, name] for minute in self._minutes]
        return [0] * (self.MINUTES - len(known)) + known


def percentile(sorted_values: Sequence[float], part: float) -> float | None:
    """The value that this part of all does not exceed. None: there are no values."""
    if not sorted_values:
        return None
    return sorted_values[min(len(sorted_values) - 1, int(len(sorted_values) * part))]


class Activity:
    """What this process has seen happen: figures for people, which Prometheus has otherwise."""

    COMMITS = 1000  # the last ones, of which percentiles are made

    def __init__(self) -> None:
        self.begun_at = time.time()
        self.hour = LastHour()
        # Calls by lane and final status, and the callbacks that were sent from here.
        self.ends: Counter[tuple[str, str]] = Counter()
        self._commits: deque[float] = deque(maxlen=self.COMMITS)

    def observe_commit(self, seconds: float) -> None:
        """Note what a commit took. From any thread."""
        self._commits.append(seconds)

    def commit_document(self) -> dict[str, float | None]:
        """What the last commits took."""
        taken = sorted(self._commits.copy())
        return {"p50": percentile(taken, 0.5), "p99": percentile(taken, 0.99)}

    def count_end(self, ended: Ended) -> None:
        """Count the end of a call, here or elsewhere."""
        self.ends[ended.lane, ended.status] += 1
        self.hour.count("ended", ended.queue)
        if ended.status in FAILED:
            self.hour.count("failed", ended.queue)


class EndedCalls:
    """Calls of a function that ended with one status."""

    BUCKETS_S = (0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 3600.0)
    LABELS = (*map(str, BUCKETS_S), "+Inf")

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * len(self.LABELS)  # by how long they took, for each of LABELS
        self.seconds = 0.0

    def count(self, seconds: float) -> None:
        """One more call has ended."""
        self.counts[bisect.bisect_left(self.BUCKETS_S, seconds)] += 1
        self.seconds += seconds


class FunctionCalls:
    """How many calls of functions began and ended, sync and queued, under OpenFaaS's names.

    Names are those of functions that exist.
    """

    def __init__(self, registry: prometheus_client.CollectorRegistry) -> None:
        self.started: Counter[str] = Counter()
        self._ended: defaultdict[tuple[str, int], EndedCalls] = defaultdict(EndedCalls)
        registry.register(self)

    def end(self, function: str, status: int, seconds: float) -> None:
        """A call of a function has ended."""
        self._ended[function, status].count(seconds)

    def collect(self) -> Iterable[Metric]:
        """What a scrape sees."""
        name = ["function_name"]
        # A gauge, because the library would append _total to a counter's name, which OpenFaaS's
        # does not have.
        text = "Function calls started."
        started = GaugeMetricFamily("gateway_function_invocation_started", text, labels=name)
        for function, count in dict(self.started).items():
            started.add_metric([function], count)

        code = [*name, "code"]
        text = "Function calls that ended."
        ended = CounterMetricFamily("gateway_function_invocation", text, labels=code)
        taken = HistogramMetricFamily("gateway_functions_seconds", "What calls took.", labels=code)
        for (function, status), calls in dict(self._ended).items():
            counts = list(itertools.accumulate(calls.counts))
            labels = [function, str(status)]
            ended.add_metric(labels, counts[-1])
            buckets = list(zip(EndedCalls.LABELS, counts, strict=True))
            taken.add_metric(labels, buckets, calls.seconds)
        return [started, ended, taken]


class RunningAttempts:
    """How many attempts run, by queue and lane; see LoopCounter."""

    def __init__(self, registry: prometheus_client.CollectorRegistry) -> None:
        self._running: Counter[tuple[str, str]] = Counter()
        registry.register(self)

    def begin(self, queue: str, lane: str) -> None:
        """One more attempt runs."""
        self._running[queue, lane] += 1

    def end(self, queue: str, lane: str) -> None:
        """An attempt has ended."""
        self._running[queue, lane] -= 1

    def collect(self) -> Iterable[Metric]:
        """What a scrape sees: also the lanes of which none runs any more."""
        name = "queue_worker_function_invocation_inflight"
        labels = ["queue_name", "function_name"]
        family = GaugeMetricFamily(name, "Attempts running.", labels=labels)
        for lane, number in dict(self._running).items():
            family.add_metric(lane, number)
        return [family]


class ScheduleMetrics:
    """What schedules are watched by. Their names come from the file, and from functions."""

    def __init__(self, registry: prometheus_client.CollectorRegistry) -> None:
        labels = ["schedule"]
        self.last_success = prometheus_client.Gauge(
            "faasd_async_schedule_last_success_seconds",
            "When a call of a schedule ended well last (Unix time).",
            labels,
            registry=registry,
        )
        self.missed = prometheus_client.Counter(
            "faasd_async_schedule_missed",
            "Instants of a schedule that were not run.",
            labels,
            registry=registry,
        )


class Metrics:
    """Counters and gauges under OpenFaaS's names, so that its dashboards work."""

    COMMIT_BUCKETS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        counter = functools.partial(prometheus_client.Counter, registry=self.registry)
        counted = functools.partial(LoopCounter, self.registry)
        self.functions = FunctionCalls(self.registry)
        self.running = RunningAttempts(self.registry)
        self.submitted = counted("queue_worker_messages_submitted", "Calls accepted.", "queue_name")
        self.processed = counted(
            "queue_worker_messages_processed", "Attempts that ended.", "queue_name"
        )
        self.retries = counter("faasd_async_retries", "Attempts that led to another.")
        self.calls = counted("faasd_async_calls", "Calls that ended.", "status", FINAL)
        self.callbacks = counted(
            "faasd_async_callbacks",
            "Callbacks that reached a final state.",
            "status",
            ("delivered", "failed"),
        )
        self.commits = prometheus_client.Histogram(
            "faasd_async_commit_seconds",
            "What durable commits took.",
            buckets=self.COMMIT_BUCKETS_S,
            registry=self.registry,
        )
        self.set_aside = counter("faasd_async_messages_set_aside", "Messages that are no calls.")
        self.activity = Activity()

    def observe_commit(self, seconds: float) -> None:
        """Note what a commit took. From any thread."""
        self.commits.observe(seconds)
        self.activity.observe_commit(seconds)

    def count_end(self, function: str, status: int, seconds: float) -> None:
        """Count a function call that has ended."""
        self.functions.end(function, status, seconds)
        self.activity.hour.count("calls", function)
        if status >= 400:
            self.activity.hour.count("failures", function)

    def counted(self, function: str) -> CountedCall:
        """Count a function call: one that runs in a `with` block of this."""
        return CountedCall(self, function)


GONE = 499  # the status of a call whose caller went away, as nginx has it


class CountedCall:
    """A function call, from the beginning of a `with` block to its end.

    The block is given a function to tell the status with. If it does not, the caller went away.
    """

    __slots__ = ("_function", "_metrics", "_started", "_status")

    def __init__(self, metrics: Metrics, function: str) -> None:
        self._metrics = metrics
        self._function = function
        self._started = time.perf_counter()
        self._status = GONE

    def __enter__(self) -> Tell[int]:
        self._metrics.functions.started[self._function] += 1
        return self._tell_status

    def _tell_status(self, status: int) -> None:
        self._status = status

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._started
        self._metrics.count_end(self._function, self._status, seconds)


def scraped(
    stats: Mapping[str, QueueStats],
    store: StoreFigures,
    queues: Iterable[str],
    functions: Iterable[Function],
) -> prometheus_client.CollectorRegistry:
    """The gauges that are worked out only for a scrape. `queues` are among them even if empty."""
    registry = prometheus_client.CollectorRegistry()
    gauge = functools.partial(prometheus_client.Gauge, registry=registry)
    replicas = gauge("gateway_service_count", "Replicas of a function.", ["function_name"])
    pending = gauge(
        "queue_worker_pending_messages",
        "Calls waiting in the queue.",
        ["queue_name", "function_name"],
    )
    oldest = gauge("faasd_async_oldest_seconds", "Wait of the oldest due call.", ["queue"])
    paused = gauge("faasd_async_queue_paused", "Whether the queue is paused.", ["queue"])
    used = gauge("faasd_async_store_used_bytes", "What the queue's file takes.")
    used.set(store.used_bytes)
    if store.free_bytes is not None:
        free = gauge("faasd_async_store_free_bytes", "What is left where that is.")
        free.set(store.free_bytes)
    gauge("faasd_async_figures_age_seconds", "0 unless the queue does not answer.").set(
        store.age_seconds
    )
    for name in queues:
        paused.labels(name).set(0)
    for function in functions:
        number = 1 if function.replicas is None else function.replicas
        replicas.labels(function.key).set(number)
        pending.labels(function.queue, function.key).set(0)
    now = time.time()
    for name, queue in stats.items():
        oldest.labels(name).set(max(0.0, now - queue.oldest_at))
        if name == CALLBACKS:  # whose lanes are hosts, and which can't be paused
            continue
        paused.labels(name).set(queue.paused)
        for lane, waiting in queue.waiting.items():
            pending.labels(name, lane).set(waiting)
    return registry


def scrape(
    lasting: prometheus_client.CollectorRegistry,
    stats: Mapping[str, QueueStats],
    store: StoreFigures,
    queues: Iterable[str],
    functions: Iterable[Function],
) -> bytes:
    """All metrics. For any thread: of a thousand functions they take a tenth of a second."""
    now = scraped(stats, store, queues, functions)
    return prometheus_client.generate_latest(lasting) + prometheus_client.generate_latest(now)


# --- Threads --------------------------------------------------------------------------------------


def begin_thread(name: str, work: Callable[[Unpack[Ts]], object], *arguments: Unpack[Ts]) -> bool:
    """Start a thread that nobody waits for, not even at a stop.

    False, and nothing is done: there may be no more threads for now (RLIMIT_NPROC, TasksMax).
    """
    thread = threading.Thread(target=work, args=arguments, name=name, daemon=True)
    with contextlib.suppress(RuntimeError):
        thread.start()
    return thread.ident is not None


def in_thread(
    name: str, work: Callable[[Unpack[Ts]], T], *arguments: Unpack[Ts]
) -> asyncio.Future[T]:
    """The result, or error, of work that may hang, done by a thread of its own. Raises Shortage.

    Nobody has to wait for it. The event loop's own threads are no choice: they are few, and libuv
    aborts the process when it can't start them.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def tell(give: Callable[[], None]) -> None:
        if not result.done():
            give()

    def run() -> None:
        try:
            give = functools.partial(result.set_result, work(*arguments))
        except Exception as exc:
            give = functools.partial(result.set_exception, exc)
        with contextlib.suppress(RuntimeError):  # The loop has ended.
            loop.call_soon_threadsafe(tell, give)

    if not begin_thread(name, run):
        raise Shortage("this machine may have no more threads")
    return result


# --- Timers ---------------------------------------------------------------------------------------

LATE_S = 0.1  # A timer that is so late was held up, and so was what it limits.
MAX_GRACE_S = 1.0


def uptime_s() -> float:
    """For how long this machine has been on, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Expiring(Protocol):
    """What a sweep tells that its time is over."""

    def expire(self, late_s: float) -> None:
        """The time has been over for `late_s`."""


def call_in_time(
    loop: asyncio.AbstractEventLoop, late_s: float, callback: Callable[[], None]
) -> asyncio.TimerHandle | None:
    """Call back for a time that is over, now or later.

    A timer that fires late was held up with everything else, as on a machine that slept. What it
    limits may have arrived meanwhile, and gets as much time again (MAX_GRACE_S at most) to be read.
    """
    if late_s > LATE_S:
        return loop.call_later(min(late_s, MAX_GRACE_S), callback)
    callback()
    return None


class Timer:
    """Calls back when a time is over; see `call_in_time`."""

    __slots__ = ("_callback", "_grace", "_loop", "_sweep")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, callback: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._callback = callback
        self._grace: asyncio.TimerHandle | None = None
        self._sweep = sweep(loop, seconds)
        self._sweep.add(self)

    def cancel(self) -> None:
        """Do not call back any more."""
        self._sweep.remove(self)
        if self._grace is not None:
            self._grace.cancel()

    def expire(self, late_s: float) -> None:
        """See Expiring."""
        self._grace = call_in_time(self._loop, late_s, self._callback)


class Sweep:
    """Timers of one duration, so that what was set first is over first.

    Most of them are cancelled, thousands a second: for all of them the event loop has one timer.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._until: dict[Expiring, float] = {}  # the first to be over first
        self._set = False  # whether the loop's timer is set

    def add(self, timer: Expiring, spent_s: float = 0.0) -> None:
        """Set a timer. If some of its time is over, it may be as late as that."""
        until = self._loop.time() + self._seconds - spent_s
        self._until[timer] = until
        if not self._set:
            self._set = True
            self._loop.call_at(until, self._look)

    def remove(self, timer: Expiring) -> None:
        """Forget a timer: it is cancelled, or has expired."""
        self._until.pop(timer, None)

    def _look(self) -> None:
        """Have those that are over expire, and look again when the next one may be."""
        self._set = False
        now = self._loop.time()
        over = list(itertools.takewhile(lambda item: item[1] <= now, self._until.items()))
        for timer, until in over:
            if self._until.pop(timer, None) is not None:  # else another one has cancelled it
                timer.expire(now - until)
        if self._until and not self._set:
            self._set = True
            self._loop.call_at(next(iter(self._until.values())), self._look)


@functools.lru_cache(maxsize=64)
def sweep(loop: asyncio.AbstractEventLoop, seconds: float) -> Sweep:
    """The sweep of this duration. One that the cache has forgotten still does its work."""
    return Sweep(loop, seconds)


# --- Queue seam -----------------------------------------------------------------------------------
# What a method has done is durable when it returns. It raises StoreError if nothing was done, and
# HttpError, with the status that it implies, for the caller's mistakes.


def tell_paused(queues: Iterable[str]) -> None:
    """Remind people of queues that were paused before this start, as they forget it."""
    for name in sorted(queues):
        how = f"faasd-async queues resume {name}"
        log.warning("queue %s is paused, and its calls wait: %s", name, how)


class WorkQueue(Protocol):
    """Work, from enqueue to its end.

    A call is queued, claimed (running) and completed, or retried and so queued again. A completed
    call whose outcome has to be told becomes work of the queue CALLBACKS, in the same commit. No
    claim is ever lost: it is completed, retried, or its process ends and the next `open` queues it
    again, `interrupted` counted and the attempt charged.
    """

    IN_STEP: bool  # whether calls are best claimed all together, once all that ran are stored
    SHARED: bool  # whether other hosts may run its calls, too

    async def open(self, wake: Tell[str], stop: Tell[Hashable], final: Tell[Ended]) -> None:
        """Recover what a dead process left. What follows is told on the event loop.

        `wake(queue)`: the queue may have due work that the last claim did not return.
        `stop(receipt)`: the work of this claim was cancelled.
        `final(ended)`: a call has reached its end.
        """

    async def close(self) -> None:
        """Finish what was begun; afterwards another process can open the queue."""

    def enqueue(self, call: Invocation) -> Awaitable[str]:
        """Store a call; the call id to answer with.

        It is the call's own, or that of the call which took the same idempotency key first.
        Idempotent on `call.id`. HttpError: 429 the queue is full, 422 the key came before with
        another body.
        """

    def claim(
        self, name: str, limit: int, room: Mapping[str, int], rates: Mapping[str, Rate]
    ) -> Awaitable[Sequence[Claim]]:
        """Claim up to `limit` due items of a queue. Each is charged with an attempt.

        At most `room[lane]` of a lane, or `room[""]` if it has no entry. No more of a lane than its
        rate allows, nor of the queue (`rates[""]`); the times of starts survive a restart, and all
        daemons that share the queue share them. Of a function's calls with one concurrency key none
        is claimed while another one is. When fewer than `limit` are returned, `wake` tells when to
        ask again, unless `room` is the reason.
        """

    def start(self, lane: str, rate: Rate) -> Awaitable[float]:
        """Count the start of a call that was never queued, if its rate allows one.

        0.0: it is counted. Otherwise it is not, and this is after how many seconds the rate allows
        one.
        """

    def complete(self, claim: Claim, outcome: Outcome, status: str) -> Awaitable[bool]:
        """Make the call (or its callback: "delivered", "failed") final.

        False, and nothing done: the claim is not valid any more, its work was cancelled.
        """

    def retry(self, claim: Claim, outcome: Outcome | None, delay_s: float) -> Awaitable[bool]:
        """Queue the work again, due in `delay_s`. False as for `complete`.

        With `outcome` the attempt stays charged and the record shows why; without, it never
        happened.
        """

    def stalled(self) -> str | None:
        """Why the queue does not answer, or needs a restart; None: it works. Never waits."""

    def notice(self) -> str | None:
        """What an operator has to know of a queue that works; None: nothing."""

    async def failing(self) -> str | None:
        """Why nothing can be stored; None: it can. After a failure it makes another attempt."""


class CallRecords(Protocol):
    """What is known of calls, and what an operator does with them.

    A `call_id` may be a record's own `id`, which means exactly that record. Otherwise it means the
    newest record with this call id. HttpError(404): there is none.
    """

    def lookup(self, call_id: str) -> Awaitable[CallRecord]:
        """The record of a call."""

    async def list_records(
        self, filters: CallFilter, limit: int = 100, cursor: str | None = None
    ) -> Page:
        """Records that match, newest first; `cursor` is that of the page before."""

    def output(self, call_id: str) -> Awaitable[Output]:
        """What the last attempt wrote, up to calls.keep_output."""

    def answer(self, call_id: str) -> Awaitable[StoredAnswer]:
        """What the function answered last. HttpError: see `require_whole`."""

    def request(self, call_id: str) -> Awaitable[StoredRequest]:
        """What a call asks its function. HttpError(410): that is not stored any more."""

    def cancel(self, call_id: str) -> Awaitable[int]:
        """Cancel what is not final: one record, or all that share the call id; how many.

        Pending callbacks are given up. HttpError(409): all has finished already.
        """

    def redrive(self, call_id: str) -> Awaitable[None]:
        """Queue a final call again with its stored request, as if new; its history is kept.

        HttpError: 409 it has not finished, 410 the request is not stored any more.
        """

    def resend(self, call_id: str) -> Awaitable[None]:
        """Deliver the outcome of a final call once more, without running its function.

        HttpError: 409 it has not finished or has no callback, 410 its answer is not stored whole.
        """

    async def cancel_matching(self, filters: CallFilter) -> BulkResult:
        """Cancel exactly the runs that match, in batches, so that nobody waits for it."""

    async def redrive_matching(self, filters: CallFilter) -> BulkResult:
        """Queue exactly the runs that match again, in batches."""

    async def purge(self, name: str) -> int:
        """Cancel all waiting calls of a queue; how many."""

    def pause(self, name: str, paused: bool) -> Awaitable[None]:
        """Hand out no more work of a queue; or, not `paused`, go on. Survives a restart."""

    def stats(self) -> Awaitable[Mapping[str, QueueStats]]:
        """All queues that have waiting calls or are paused."""

    def overview(self) -> Awaitable[Overview]:
        """The whole queue in figures."""

    def watch(self, tell: Tell[Changes] | None) -> None:
        """Have each change of a call told on the event loop from now on; None: no more.

        Up to CHANGES_PER_SECOND; what is beyond that is only counted. A call that changes more than
        once in a moment may be told of once. Changes by other daemons are told, too.
        """

    def prune(self) -> Awaitable[int]:
        """Delete one small batch of records past their time, and give room back; how many.

        0: there is nothing more to be done for now.
        """


class ScheduleStates(Protocol):
    """How far schedules are. Several daemons may keep the same ones."""

    async def state(self, name: str) -> ScheduleState:
        """The state of a schedule as it is now; with revision 0 if nothing is stored of it."""

    async def states(self) -> Mapping[str, ScheduleState]:
        """The states of all schedules that were ever stored, by name."""

    async def save(self, state: ScheduleState, calls: Sequence[Invocation]) -> int:
        """Store a state over the one with its revision, and the calls that led to it.

        Its new revision; 0, and nothing done: somebody else has written the state meanwhile. SQLite
        does it in one commit. NATS stores the calls first, so they have to have the same ids if
        this is done again, after a crash or by another daemon. HttpError: 429 a queue is full.
        """


DISCARD_BYTES = 4 * MIB
DISCARD_PERIOD_S = 0.005


class Storage(Protocol):
    """Where a queue is stored."""

    async def figures(self) -> StoreFigures:
        """How much it takes, and what is left."""

    async def copy(self) -> IO[bytes]:
        """All of it as it is at one moment, in a file without a name, to be left to `discard_copy`.

        Work goes on meanwhile. HttpError: 501 it is no file, 503 there is no room, or the daemon
        stops.
        """


def discard_copy(copy: IO[bytes]) -> None:
    """Delete a file without a name in steps, to give its room back. Blocks.

    Whoever syncs has to wait meanwhile: for a gigabyte at once, a quarter of a second (ext4).
    """
    with copy:
        size = copy.seek(0, os.SEEK_END)
        while size > 0:
            size -= DISCARD_BYTES
            copy.truncate(max(0, size))
            time.sleep(DISCARD_PERIOD_S)


def discard_copy_later(copy: IO[bytes]) -> None:
    """Have a thread do that, if there may be one."""
    if not begin_thread("discard", discard_copy, copy):
        copy.close()


class Queue(WorkQueue, CallRecords, Protocol):
    """All sides of the seam in one object. The properties are there once it is open."""

    @property
    def schedules(self) -> ScheduleStates:
        """The states of schedules."""

    @property
    def storage(self) -> Storage:
        """Where the queue is stored."""


def call_lines(call_id: str, start_time: int) -> bytes:
    """The packed headers that tell a function which call it is. They follow the client's."""
    return f"X-Call-Id: {call_id}\nX-Start-Time: {start_time}\n".encode()


def queue_full(queue: str) -> HttpError:
    """The error for a queue that has max_pending calls."""
    return HttpError(429, f"queue {queue} is full, try again later", LATER)


UNKNOWN_CALL = "no call with this id, or its record was pruned: see calls.keep, calls.keep_failed"
NO_REQUEST = "the request of this call is not stored any more"
NO_CALLBACK = "this call has no callback"
NOT_WHOLE = "the answer of this call is not stored as a whole any more"
HAS_FINISHED = "the call has finished already"
NOT_FINISHED = "the call, or its callback, has not finished yet"
OTHER_BODY = "Idempotency-Key: this key came before with another body"


def require_whole(
    status: str, error: str | None, kept_bytes: int, response_bytes: int | None
) -> None:
    """Require that the answer of a call is there as a whole.

    HttpError: 409 the call has not finished, 410 there is no answer, or only a part of it.
    """
    if status not in FINAL:
        raise HttpError(409, "the call has not finished yet: its record tells how it stands")
    if not response_bytes and status != "success":
        raise HttpError(410, f"there is no answer: the call ended in {status}: {error or ''}")
    if kept_bytes != response_bytes:
        reason = f"the answer had {response_bytes} bytes, of which calls.keep_output keeps a part"
        raise HttpError(410, f"{reason}: see the log of the call")


def cancelled_number(result: BulkResult) -> int:
    """How many of the calls with one call id were cancelled. HttpError: 404, 409."""
    if not result.matched:
        raise HttpError(404, UNKNOWN_CALL)
    if not result.done:
        raise HttpError(409, HAS_FINISHED)
    return result.done


class Budget:
    """Allows `rate` of something a second, and as many at once after a second without."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._left = rate
        self._at = time.monotonic()

    def take(self, number: int) -> int:
        """Take up to this number; how many are allowed."""
        now = time.monotonic()
        self._left = min(self._rate, self._left + (now - self._at) * self._rate)
        self._at = now
        taken = min(number, int(self._left))
        self._left -= taken
        return taken


class Refusals:
    """Requests that are refused because nothing can be stored: one line when that begins and ends.

    The single ones are told at `debug`: while a queue is away, there may be thousands a second.
    """

    def __init__(self) -> None:
        self._number = 0  # since the last call was stored

    def count(self, reason: StoreError) -> None:
        """Count a request that is refused."""
        level = logging.DEBUG if self._number else logging.ERROR
        log.log(level, "requests are refused: %s", reason)
        self._number += 1

    def over(self) -> None:
        """Count no more: a call was stored."""
        if self._number:
            log.info("calls are stored again: %d requests were refused", self._number)
            self._number = 0


class CallWaiters:
    """Wakes those who wait for a call to end."""

    def __init__(self) -> None:
        self.closed = False
        self._ends: weakref.WeakValueDictionary[str, asyncio.Event]
        self._ends = weakref.WeakValueDictionary()  # by id or call id, while somebody waits

    def event(self, call_id: str) -> asyncio.Event:
        """An event that is set when it is time to look at the call or calls with this id: one ends,
        or begins to write, or nobody is to wait any more.
        """
        return self._ends.setdefault(call_id, asyncio.Event())

    def tell(self, ended: Ended) -> None:
        """Wake those who wait for a call that has ended."""
        if self._ends:  # Mostly nobody waits.
            self.wake(ended.id)
            self.wake(ended.call_id)

    def wake(self, own_id: str) -> None:
        """Wake those who wait for a call, to look at it."""
        if self._ends and (event := self._ends.pop(own_id, None)):
            event.set()

    def close(self) -> None:
        """Let go of everybody who waits: the daemon stops."""
        self.closed = True
        for event in list(self._ends.values()):
            event.set()


MANY_STALE = 1000  # times of lanes that need not count any more


class Lanes:
    """Which lane of one queue is served next, in O(log lanes) whatever the backlog.

    A lane waits in `later` until the first of its calls is due, and then gets its turn in `ready`
    (fair) or is served from there (not fair). Calls are on disk; a lane's time here is a lower
    bound: whoever finds nothing due puts the lane back with the true one.
    """

    def __init__(self) -> None:
        self.waiting: Counter[str] = Counter()  # calls by lane
        self.total = 0  # of all lanes
        self.later: list[tuple[float, str]] = []
        self.ready: OrderedDict[str, None] = OrderedDict()
        self._due: dict[str, float] = {}  # a lane's time in `later`; other entries there are stale

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
            if len(self.later) > 2 * len(self._due) + MANY_STALE:
                self._drop_stale()

    def _drop_stale(self) -> None:
        """Forget the times that do not count any more: those far ahead would stay for months."""
        self.later = [(due_at, lane) for lane, due_at in self._due.items()]
        heapq.heapify(self.later)

    def remove(self, lane: str, number: int) -> int:
        """Count calls out; how many are left."""
        self.total -= number
        left = self.waiting[lane] - number
        self.waiting[lane] = left
        if left <= 0:
            del self.waiting[lane]
            self._due.pop(lane, None)
            self.ready.pop(lane, None)
        return left

    def next(self, now: float, fair: bool) -> str | None:
        """Take the next lane with a due call out of the line; None: there is none."""
        while self.ready and not fair:  # The queue was fair before a reload: line up anew.
            self.put(self.ready.popitem()[0], 0.0)
        while self.next_at() <= now:
            due_at, lane = heapq.heappop(self.later)
            if self._due.get(lane) != due_at:
                continue
            del self._due[lane]
            if not fair:
                return lane
            self.ready[lane] = None
        return self.ready.popitem(last=False)[0] if self.ready else None

    def turns(self, wanted: int, now: float, fair: bool) -> dict[str, int]:
        """Take lanes whose turn it is out of the line, and share `wanted` calls out among them.

        Without `fair` it is one lane's turn.
        """
        lane = self.next(now, fair)
        share = max(1, wanted // (len(self.ready) + 1))
        turns: dict[str, int] = {}
        while lane is not None:
            turns[lane] = share
            enough = not fair or len(turns) * share >= wanted
            lane = None if enough else self.next(now, fair)
        return turns

    def next_at(self) -> float:
        """When the first of the lanes in `later` becomes due, or earlier."""
        return self.later[0][0] if self.later else float("inf")


# --- SQLite index ---------------------------------------------------------------------------------
# What is kept in memory of the file; and the place where it is.


class WorkIndex:
    """What is derived from the file in memory: lanes, pauses, and when something is to be done."""

    def __init__(self) -> None:
        self.lanes: defaultdict[str, Lanes] = defaultdict(Lanes)  # by queue
        self.paused: set[str] = set()
        self.deadline_at = float("inf")  # the earliest deadline of a waiting call
        self.next_starts: dict[str, float] = {}  # of queues and lanes that have a rate
        # Lanes that wait for their next start, by queue, and the rate for which they do.
        self.slowed: defaultdict[str, dict[str, Rate]] = defaultdict(dict)
        self._wake_at: dict[str, float] = {}  # when to tell of a queue's due work

    def add(self, queue: str, lane: str, due_at: float, number: int = 1) -> None:
        """Count calls that wait, and have their queue told when they are due."""
        self.lanes[queue].add(lane, due_at, number)
        self.wake(queue, min(due_at, self._wake_at.get(queue, due_at)))

    def seems_empty(self, queue: str) -> bool:
        """Whether no call waits there. To another thread than the writer's this is a guess."""
        lanes = self.lanes.get(queue)
        return lanes is None or lanes.total == 0

    def wake(self, queue: str, at: float) -> None:
        """Have a queue told at this time, if no claim takes its work before. Infinity: never."""
        self._wake_at[queue] = at

    def due(self, now: float) -> list[str]:
        """Take out the queues that are to be told now."""
        names = [name for name, at in self._wake_at.items() if at <= now]
        for name in names:
            del self._wake_at[name]
        return names

    def next_wake_at(self) -> float:
        """When the next queue is to be told."""
        return min(self._wake_at.values(), default=float("inf"))

    def expect_deadline(self, at: float) -> None:
        """Set the earliest deadline of all calls that wait."""
        self.deadline_at = at

    def pause(self, queue: str, paused: bool) -> None:
        """Pause a queue, or have its consumer look again."""
        if paused:
            self.paused.add(queue)
        else:
            self.paused.discard(queue)
        self.wake(queue, 0.0)


class Tally:
    """How many records are in each state, by lane; of callbacks, under CALLBACKS.

    Steps count each change here, and each transaction writes the counts that have changed to the
    file: to count a million rows at a start would keep everybody waiting.
    """

    def __init__(self, numbers: Mapping[tuple[str, str], int]) -> None:
        self.numbers = Counter(numbers)
        self._changed: set[tuple[str, str]] = set()

    def move(self, lane: str, was: str | None, status: str | None, number: int = 1) -> None:
        """Count records out of one state and into another. Those in None and "none" don't count."""
        for state, change in ((was, -number), (status, number)):
            if state not in (None, "none"):
                place = (lane, str(state))
                self.numbers[place] += change
                self._changed.add(place)

    def take_changed(self) -> list[tuple[str, str, int]]:
        """The counts that differ from those in the file."""
        changed = [(*place, self.numbers[place]) for place in self._changed]
        self._changed.clear()
        return changed


class News:
    """What a transaction leads to; told on the event loop once it is committed."""

    def __init__(self) -> None:
        self.woken: list[str] = []
        self.stopped: list[Receipt] = []
        self.ended: list[Ended] = []
        self.changed: list[int] = []  # rows, in the order of their changes


class Receipt(NamedTuple):
    """A claim: the row, and how often it had been handed out by then."""

    seq: int
    claims: int


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power cut, if its file system and mode allow it."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def make_private(path: Path) -> None:
    """Make a file, and missing folders above it, that nobody else can read, whatever the umask.

    What SQLite puts beside it gets the same mode. A folder that exists stays as it is. New folders
    are synced, which SQLite does for its files only: a power cut could take all of it. Raises
    OSError, and StoreError for what is no file: root would take /dev/null from everybody else.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise StoreError(f"{path} is a device, a pipe or a socket, and no file")
    missing = [folder for folder in path.parents if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        sync_folder(folder.parent)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path.with_name(path.name + suffix).chmod(0o600)


class Place:
    """Where a file and its WAL are. If one is deleted while they are used, what is written to it
    later is lost.
    """

    def __init__(self, path: Path) -> None:
        beside = path.resolve()
        self._inodes = {
            file: file.stat().st_ino for file in (path, beside.with_name(f"{beside.name}-wal"))
        }

    def require(self) -> None:
        """Raise sqlite3.OperationalError if one of them is not there. It may be put back."""
        for path, inode in self._inodes.items():
            try:
                there = path.stat().st_ino == inode
            except FileNotFoundError:
                there = False
            except OSError:  # The disk has a fault, of which the transaction will tell.
                return
            if not there:
                reason = "was removed or replaced while it was used: put it back, or restart"
                raise sqlite3.OperationalError(f"{path} {reason}")


# --- SQLite file ----------------------------------------------------------------------------------

SCHEMA_VERSION = 4
COUNTS = """
CREATE TABLE counts (             -- of records, by lane and status; '@callbacks': by the callback's
    lane TEXT NOT NULL, status TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (lane, status)
) WITHOUT ROWID;
"""
TURNS = """
CREATE INDEX calls_turn ON calls (function, namespace, concurrency_key, turn, due_at)
    WHERE turn IS NOT NULL;
"""
# Two indexes, because failures are kept longer: what is past its time is found without a scan.
FAILURE = "(status IN ('error', 'timeout') OR callback_status = 'failed')"
ENDED_WELL = f"completed_at IS NOT NULL AND NOT {FAILURE}"
ENDED_BADLY = f"completed_at IS NOT NULL AND {FAILURE}"
MIGRATIONS = {  # from this version to the next
    1: "ALTER TABLE calls ADD COLUMN app TEXT;",
    2: "ALTER TABLE calls ADD COLUMN history TEXT;"
    "ALTER TABLE calls ADD COLUMN hops INTEGER NOT NULL DEFAULT 0;",
    3: "ALTER TABLE calls ADD COLUMN traceparent TEXT;"
    "ALTER TABLE calls ADD COLUMN tracestate TEXT;"
    "ALTER TABLE calls ADD COLUMN schedule TEXT;"
    "ALTER TABLE calls ADD COLUMN scheduled_for REAL;"
    "ALTER TABLE requests ADD COLUMN method TEXT NOT NULL DEFAULT 'POST';"
    "ALTER TABLE calls ADD COLUMN concurrency_key TEXT;"
    "ALTER TABLE calls ADD COLUMN turn INTEGER;"
    "ALTER TABLE calls ADD COLUMN failures TEXT;"
    "CREATE TABLE schedules (name TEXT PRIMARY KEY, revision INTEGER NOT NULL, state TEXT);"
    "CREATE TABLE rates (name TEXT PRIMARY KEY, next_at REAL NOT NULL);"
    + COUNTS
    + TURNS
    + f"""
    DROP INDEX calls_completed;
    CREATE INDEX calls_well ON calls (completed_at) WHERE {ENDED_WELL};
    CREATE INDEX calls_failed ON calls (completed_at) WHERE {ENDED_BADLY};
    INSERT INTO counts (lane, status, number)
        SELECT function || '.' || namespace, status, count(*) FROM calls GROUP BY 1, 2
        UNION ALL
        SELECT '@callbacks', callback_status, count(*) FROM calls
        WHERE callback_status <> 'none' GROUP BY 2;
    """,
}
SCHEMA = f"""
CREATE TABLE calls (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,      -- a UUIDv7, so this index only grows at its end
    call_id TEXT,                 -- the caller's own X-Call-Id; NULL: the id is the call id
    function TEXT NOT NULL, namespace TEXT NOT NULL, queue TEXT NOT NULL,
    status TEXT NOT NULL,         -- queued, running or final; "delayed" is a queued call not due
    work TEXT, lane TEXT,         -- what is to be done: in which queue (or '@callbacks') and lane
    due_at REAL,                  -- when; NULL while claimed
    claims INTEGER NOT NULL DEFAULT 0,  -- how often handed out: an older claim can't end it
    attempts INTEGER NOT NULL DEFAULT 0, max_attempts INTEGER NOT NULL,
    interrupted INTEGER NOT NULL DEFAULT 0,
    start_time INTEGER NOT NULL,  -- nanoseconds: X-Start-Time
    deadline_at REAL,             -- NULL once an attempt was charged
    started_at REAL, completed_at REAL, duration REAL, http_status INTEGER, error TEXT,
    request_bytes INTEGER NOT NULL, response_bytes INTEGER,
    callback_url TEXT, failure_url TEXT,
    callback_status TEXT NOT NULL DEFAULT 'none', callback_attempts INTEGER NOT NULL DEFAULT 0,
    callback_http_status INTEGER, callback_error TEXT,
    idempotency_key TEXT, digest BLOB, app TEXT,
    history TEXT,                 -- JSON: what was before the call was queued again; NULL: nothing
    hops INTEGER NOT NULL DEFAULT 0, -- callbacks that led from one call to the next, up to this one
    traceparent TEXT, tracestate TEXT,
    schedule TEXT, scheduled_for REAL, -- whose call it is, and of which instant
    concurrency_key TEXT,
    turn INTEGER,                 -- of its key: 1 has it, 0 waits for it; NULL: no key, or final
    failures TEXT                 -- JSON: what led to another attempt or delivery; NULL: nothing
);
CREATE INDEX calls_work ON calls (work, lane, due_at) WHERE work IS NOT NULL;
CREATE INDEX calls_call_id ON calls (call_id) WHERE call_id IS NOT NULL;
CREATE INDEX calls_well ON calls (completed_at) WHERE {ENDED_WELL};
CREATE INDEX calls_failed ON calls (completed_at) WHERE {ENDED_BADLY};
CREATE INDEX calls_deadline ON calls (deadline_at) WHERE deadline_at IS NOT NULL;
CREATE UNIQUE INDEX calls_key ON calls (function, namespace, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
{TURNS}
CREATE TABLE requests (
    seq INTEGER PRIMARY KEY, target TEXT NOT NULL, headers BLOB NOT NULL, body BLOB NOT NULL,
    method TEXT NOT NULL DEFAULT 'POST'
);
CREATE TABLE outputs (
    seq INTEGER PRIMARY KEY, headers BLOB, body BLOB NOT NULL, stderr BLOB NOT NULL
);
CREATE TABLE queues (
    name TEXT PRIMARY KEY,
    paused INTEGER NOT NULL       -- 1: it is; 2: and so is the one that its calls were moved to
);
CREATE TABLE schedules (name TEXT PRIMARY KEY, revision INTEGER NOT NULL, state TEXT);
CREATE TABLE rates (name TEXT PRIMARY KEY, next_at REAL NOT NULL); -- of a queue or lane: next start
{COUNTS}
"""

# One process a file: the lock is held as long as it lives, which also keeps the index of the WAL
# out of shared memory. Compile-time defaults differ, so what matters is set, and read back.
PRAGMAS = (
    "locking_mode = EXCLUSIVE",
    "auto_vacuum = INCREMENTAL",
    "journal_mode = WAL",
    "synchronous = FULL",
    "wal_autocheckpoint = 500",  # 2 MiB, where `checkpoint` finds no pause for it
    "journal_size_limit = 67108864",
    "temp_store = MEMORY",  # there may be no place for temporary files
)
CHECKPOINT_ROWS = 800  # 1 MiB of the log, from 32 callers at a time: a millisecond's work
LAST_SYNC_S = 3.0  # for which a process that was killed may hold the file, until its sync is over
# Python 3.11 looks for an adapter of each None that is bound: in a table, and then, with an
# exception on the way, in two more places. What it finds in the table takes it a third of the time.
sqlite3.register_adapter(type(None), lambda none: none)
STATEMENTS_KEPT = 256  # one on rows is there once for each number of rows
REQUIRED_PRAGMAS = {"journal_mode": "wal", "synchronous": 2}

SELECT_HEAD = """
    SELECT coalesce(min(due_at), 9e999) FROM calls
    WHERE work = ? AND lane = ? AND due_at IS NOT NULL
"""
SELECT_DEADLINE = """
    SELECT coalesce(min(deadline_at), 9e999) FROM calls
    WHERE deadline_at IS NOT NULL AND due_at IS NOT NULL
"""
# Work may wait for a time that is ahead only because the clock was set back: calls that nobody has
# delayed, also those that were queued again, attempts and callbacks that follow something. It is
# due now.
FOLLOW_CLOCK = """
    UPDATE calls SET due_at = :now
    WHERE work IS NOT NULL AND due_at > :now
        AND (due_at <= start_time / 1e9 OR started_at > :now OR completed_at > :now
            OR (history IS NOT NULL AND started_at IS NULL)
            OR (work = '@callbacks' AND callback_attempts = 0)
            OR json_extract(failures, '$[#-1][2]') > :now)
"""
# Calls that wait for their concurrency key stand aside, in a lane of which nothing is claimed.
ASIDE = " (key)"  # behind the name of their function's
TAKE_TURNS = f"""
    UPDATE calls SET turn = place.turn,
        lane = function || '.' || namespace || iif(place.turn, '', '{ASIDE}')
    FROM (
        SELECT seq AS row, 1 = row_number() OVER (
            PARTITION BY function, namespace, concurrency_key
            ORDER BY due_at IS NOT NULL, due_at, seq
        ) AS turn
        FROM calls WHERE turn IS NOT NULL
    ) AS place
    WHERE seq = place.row AND calls.turn <> place.turn
"""
SELECT_LANES = """
    SELECT work, lane, min(due_at), count(due_at) AS number FROM calls
    WHERE work IS NOT NULL GROUP BY work, lane HAVING number > 0
"""
SELECT_COUNTS = "SELECT lane, status, number FROM counts WHERE number > 0"
# The clock was set forward by :ahead. It had been wrong since :since, as that of a Raspberry Pi is
# after a start, which has no battery. What was stamped meanwhile moves along: it has ended as
# lately as before, and waits as long.
CATCH_UP_ENDS = tuple(
    f"""
    UPDATE calls SET completed_at = max(completed_at, min(completed_at, :until) + :ahead)
    WHERE completed_at BETWEEN :since AND :latest AND {ended}
    """
    for ended in (ENDED_WELL, ENDED_BADLY)
)
CATCH_UP_DEADLINES = """
    UPDATE calls SET deadline_at = deadline_at + :ahead
    WHERE deadline_at IS NOT NULL AND start_time / 1e9 BETWEEN :since AND :until
        AND deadline_at - :until < :ahead
"""
SELECT_PARTS = """
    SELECT part.name || coalesce('.' || column.name, '')
    FROM sqlite_master AS part LEFT JOIN pragma_table_info(part.name) AS column
    WHERE part.name NOT LIKE 'sqlite_%'
"""
DAMAGED = "the file is damaged: a restart sets it aside and begins with an empty queue"


def schema_parts(db: sqlite3.Connection) -> set[str]:
    """The parts of a file's schema: columns as TABLE.COLUMN, and indexes."""
    return {row[0] for row in db.execute(SELECT_PARTS)}


def missing_parts(db: sqlite3.Connection) -> list[str]:
    """The parts of our schema that a file lacks."""
    with contextlib.closing(sqlite3.connect(":memory:")) as model:
        model.executescript(SCHEMA)
        return sorted(schema_parts(model) - schema_parts(db))


def misnamed_schema(path: Path, version: int, reason: str) -> StoreError:
    """The error for a file that is not of the version that it says (of an unfinished program)."""
    text = f"not of schema {version}, as it says: {reason}. Move it away, to begin with none"
    return StoreError(f"{path}: {text}")


def bring_up_to_date(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables, or migrate those of an older version, of which a copy is kept.

    Raises StoreError: the file is of a newer version, or not what it says.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if not 0 <= version <= SCHEMA_VERSION:
        reason = f"written by a newer version (schema {version}): update this program"
        raise StoreError(f"{path}: {reason}")
    if version == 0 and (others := schema_parts(db)):
        reason = f"a database of something else (with {min(others)}): store.path has to be our own"
        raise StoreError(f"{path}: {reason}")
    if version < SCHEMA_VERSION:
        migrate(db, path, version)
    if missing := missing_parts(db):
        raise misnamed_schema(path, SCHEMA_VERSION, f"it has no {', '.join(missing[:3])}")


def migrate(db: sqlite3.Connection, path: Path, version: int) -> None:
    """Bring the schema from a version to ours, in one commit. Raises sqlite3.Error, StoreError."""
    steps = [SCHEMA]
    if version:
        steps = [MIGRATIONS[old] for old in range(version, SCHEMA_VERSION)]
        copy = path.with_name(f"{path.name}.schema-{version}")
        copy.unlink(missing_ok=True)
        make_private(copy)  # SQLite takes a file that is there, when it is empty.
        db.execute("VACUUM INTO ?", (str(copy),))
        log.warning(
            "%s: schema %d becomes %d; the old file is %s", path, version, SCHEMA_VERSION, copy
        )
    script = [*steps, f"PRAGMA user_version = {SCHEMA_VERSION};"]
    try:
        db.executescript("\n".join(["BEGIN IMMEDIATE;", *script, "COMMIT;"]))
    except sqlite3.OperationalError as exc:
        if exc.sqlite_errorcode != sqlite3.SQLITE_ERROR:  # The disk is at fault.
            raise
        raise misnamed_schema(path, version, str(exc)) from exc


class SqliteFile:
    """The connection, and what is derived from the file in memory.

    Once open it is used by the writer's thread only. Steps change the file and the index inside a
    transaction; when that fails, both are `stale`, and the next one begins with a `rebuild`.
    """

    def __init__(
        self, path: Path, settings: Settings, recover: Callable[[SqliteFile], None]
    ) -> None:
        self.path = path
        self.settings = settings
        self._recover = recover  # queues again, first of all, what a dead process had claimed
        self.db: sqlite3.Connection  # once open
        self.index = WorkIndex()
        self.tally = Tally({})
        self.damaged = False  # only a restart helps
        self.stale = False  # the index may differ from the file: the next transaction rebuilds it
        self._suspect = False  # the file may be damaged
        self._place: Place  # once open
        self.news = News()  # what this transaction leads to
        self.last_seq = 0  # the number of the newest row
        self._carried = 0  # rows changed until the last checkpoint
        self._mark = path.with_name(f"{path.name}-damaged")  # there if it is, for the next start
        self.copy = path.with_name(f"{path.name}.copy")  # exists while a copy is made

    def open(self) -> None:
        """Open or create the file, recover what a dead process left.

        Raises StoreError, StoreLocked.
        """
        try:
            self._connect_or_set_aside()
        except (OSError, sqlite3.Error) as exc:
            if "locked" in str(exc):
                reason = f"{self.path} is in use by another process: one daemon per file"
                raise StoreLocked(reason) from exc
            hint = ""
            if not os.access(self.path.parent, os.W_OK):
                hint = " (no right to write there, or read-only)"
            raise StoreError(f"{self.path}: {getattr(exc, 'strerror', exc)}{hint}") from exc

    def close(self) -> None:
        """Close the file. What was not committed is gone."""
        self.db.close()

    def _connect_or_set_aside(self) -> None:
        try:
            self._connect()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as exc:  # It is no database, or a damaged one.
            self._set_aside(exc)
            self._connect()

    def _connect(self) -> None:
        make_private(self.path)
        self.db = sqlite3.connect(
            self.path,
            timeout=LAST_SYNC_S,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=STATEMENTS_KEPT,
        )
        try:
            self._require_durability()
            self.copy.unlink(missing_ok=True)  # A dead process was making it.
            bring_up_to_date(self.db, self.path)
            self._read_counts()
            self._recover(self)
            self.rebuild()
            self._place = Place(self.path)
        except BaseException:
            self.db.close()
            raise

    def _require_durability(self) -> None:
        for pragma in PRAGMAS:
            self.db.execute(f"PRAGMA {pragma}")
        for name, wanted in REQUIRED_PRAGMAS.items():
            value = self.db.execute(f"PRAGMA {name}").fetchone()[0]
            if value != wanted:
                reason = f"{name} is {value}, not {wanted}: no durable commits here"
                raise StoreError(f"{self.path}: {reason}")

    def _set_aside(self, exc: sqlite3.Error) -> None:
        """Keep a damaged file under another name, for somebody to look at."""
        aside = f"{self.path.name}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}"
        for suffix in ("", "-wal", "-shm", "-damaged"):
            with contextlib.suppress(FileNotFoundError):
                there = self.path.with_name(self.path.name + suffix)
                there.rename(self.path.with_name(aside + suffix))
        log.error(
            "%s is damaged (%s): kept as %s, starting with an empty queue", self.path, exc, aside
        )

    def prepare(self) -> None:
        """Check, in a new transaction, that what it stores will stay. Raises sqlite3.Error."""
        self._place.require()
        if self.stale:
            self.rebuild()

    def rebuild(self) -> None:
        """Derive what is in memory from the file. Raises sqlite3.DatabaseError: it is damaged."""
        if self._suspect:
            self._check()
        self.damaged = self._mark.exists()
        if self.damaged:
            raise sqlite3.DatabaseError(DAMAGED)
        self.db.execute(FOLLOW_CLOCK, {"now": time.time()})
        self._read_counts()
        self.index = WorkIndex()
        for name, paused in self.db.execute("SELECT name, paused FROM queues").fetchall():
            self.index.pause(name, bool(paused))
        self.index.next_starts.update(self.db.execute("SELECT name, next_at FROM rates").fetchall())
        self.db.execute(TAKE_TURNS)
        for work, lane, due_at, waiting in self.db.execute(SELECT_LANES).fetchall():
            name = lane.removesuffix(ASIDE)
            self.index.add(work, name, due_at if name == lane else float("inf"), waiting)
        self.last_seq = self.db.execute("SELECT coalesce(max(seq), 0) FROM calls").fetchone()[0]
        self.find_deadline()
        self.stale = False
        self._suspect = False

    def _read_counts(self) -> None:
        rows = self.db.execute(SELECT_COUNTS).fetchall()
        self.tally = Tally({(lane, status): number for lane, status, number in rows})

    def _check(self) -> None:
        """Leave a mark if the file is damaged: the next start may not notice by itself."""
        result = str(self.db.execute("PRAGMA integrity_check(1)").fetchone()[0])
        # "unable to get" is said of a disk that can't be read for now.
        if result != "ok" and "unable to get" not in result:
            self._mark.touch()

    def catch_up(self, since: float, latest: float, ahead: float) -> None:
        """Move stamps along with a clock that was set forward by `ahead`, after it had shown the
        times from `since` to `latest`.
        """
        until = time.time() - ahead
        stamps = {"since": since, "until": until, "latest": latest, "ahead": ahead}
        for statement in CATCH_UP_ENDS:
            self.db.execute(statement, stamps)
        self.db.execute(CATCH_UP_DEADLINES, stamps)
        self.find_deadline()
        log.warning("the clock was set forward by %.0f s: records and deadlines follow", ahead)

    def distrust_index(self) -> None:
        """Have what is in memory derived anew before the next step."""
        self.stale = True

    def distrust(self, exc: Exception) -> None:
        """Forget what a transaction that was rolled back has led to."""
        self.news = News()
        self.stale = True
        code = getattr(exc, "sqlite_errorcode", 0)
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            self._suspect = True

    def checkpoint(self) -> None:
        """Copy what is new in the log to the file, if it is much. To be called in a pause.

        Otherwise SQLite does it in a COMMIT, and callers wait for that. If it fails, it is tried
        again.
        """
        changed = self.db.total_changes
        if changed - self._carried >= CHECKPOINT_ROWS:
            self._carried = changed
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def take_news(self) -> News:
        """What the committed transaction leads to. The next one begins with nothing."""
        news = self.news
        self.news = News()
        return news

    def new_seqs(self, number: int) -> range:
        """The numbers of new rows. None is used twice, also when the newest was pruned."""
        first = self.last_seq + 1
        self.last_seq += number
        return range(first, first + number)

    def head(self, work: str, lane: str) -> float:
        """When the first waiting call of a lane is due."""
        return float(self.db.execute(SELECT_HEAD, (work, lane)).fetchone()[0])

    def find_deadline(self) -> None:
        """Look the earliest deadline up."""
        self.index.expect_deadline(self.db.execute(SELECT_DEADLINE).fetchone()[0])


# --- SQLite limits --------------------------------------------------------------------------------
# -- keys

# Of a function's calls with one concurrency key, at most one has its turn: it is claimed, or will
# be first. Whatever changes that call, or adds one to the others, ends with `pass_turn`.

SELECT_TURN = """
    SELECT seq, due_at FROM calls
    WHERE function = ? AND namespace = ? AND concurrency_key = ? AND turn = 1
"""
SELECT_NEXT_TURN = """
    SELECT seq, due_at, work FROM calls
    WHERE function = ? AND namespace = ? AND concurrency_key = ? AND turn = 0
    ORDER BY due_at, seq LIMIT 1
"""
SET_TURN = "UPDATE calls SET turn = ?, lane = ? WHERE seq = ?"
# A call that was cancelled while it ran keeps its turn until it has stopped.
END_TURN = """
    UPDATE calls SET turn = NULL WHERE seq = ? AND claims = ? AND turn = 1 AND work IS NULL
"""
END_ALL_TURNS = "UPDATE calls SET turn = NULL WHERE turn = 1 AND work IS NULL"


class KeyPlace(NamedTuple):
    """A function's concurrency key."""

    function: str
    namespace: str
    key: str

    @property
    def lane(self) -> str:
        """The lane of the function's calls."""
        return function_key(self.function, self.namespace)


def pass_turn(file: SqliteFile, place: KeyPlace) -> None:
    """Have the call that is due first be the next with its key, unless one is claimed.

    A look-up or two in an index, however many wait.
    """
    first = file.db.execute(SELECT_NEXT_TURN, place).fetchone()
    if first is None:
        return
    seq, due_at, work = first
    holder = file.db.execute(SELECT_TURN, place).fetchone()
    if holder is not None:
        if holder[1] is None or (holder[1], holder[0]) < (due_at, seq):
            return
        file.db.execute(SET_TURN, (0, place.lane + ASIDE, holder[0]))
    file.db.execute(SET_TURN, (1, place.lane, seq))
    file.index.add(work, place.lane, due_at, 0)  # It is counted already.


def pass_turn_of(file: SqliteFile, claim: Claim) -> None:
    """Pass the turn on from a call whose attempt has ended, if it has a key."""
    if claim.concurrency_key is not None:
        file.db.execute(END_TURN, cast(Receipt, claim.receipt))
        namespace = claim.lane.removeprefix(f"{claim.function}.")
        pass_turn(file, KeyPlace(claim.function, namespace, claim.concurrency_key))


def pass_turns(file: SqliteFile, places: Iterable[tuple[str, str, str | None]]) -> None:
    """Pass turns on where calls have ended or were queued: function, namespace and key of each."""
    for function, namespace, key in dict.fromkeys(places):
        if key is not None:
            pass_turn(file, KeyPlace(function, namespace, key))


# -- rates

SAVE_START = "INSERT OR REPLACE INTO rates (name, next_at) VALUES (?, ?)"


def starts_left(file: SqliteFile, name: str, rate: Rate, now: float) -> int:
    """How many calls of a queue or lane may start."""
    return starts_now(rate, file.index.next_starts.get(name, 0.0), now)


def next_start_at(file: SqliteFile, name: str, rate: Rate, now: float) -> float:
    """When the next call of a queue or lane may start."""
    return first_start(rate, file.index.next_starts.get(name, 0.0), now)


def count_starts(file: SqliteFile, name: str, rate: Rate, number: int, now: float) -> None:
    """Count calls of a queue or lane as started now."""
    at = next_start(rate, file.index.next_starts.get(name, 0.0), number, now)
    file.index.next_starts[name] = at
    file.db.execute(SAVE_START, (name, at))


def room_at_rates(
    file: SqliteFile,
    queue: str,
    limit: int,
    room: Mapping[str, int],
    rates: Mapping[str, Rate],
    now: float,
) -> tuple[int, dict[str, int]]:
    """`limit` and `room` of a claim, lowered to what may start by the rates.

    Lanes whose rate was changed by a reload are looked at again.
    """
    left = dict(room)
    lanes = file.index.lanes[queue]
    slowed = file.index.slowed[queue]
    for lane in [lane for lane, rate in slowed.items() if rate != rates.get(lane)]:
        del slowed[lane]
        if lane in lanes.waiting:
            lanes.put(lane, now)
    for lane in rates.keys() & lanes.waiting.keys():
        most = starts_left(file, lane, rates[lane], now)
        left[lane] = min(most, room.get(lane, room.get("", limit)))
    if rate := rates.get(""):
        limit = min(limit, starts_left(file, queue, rate, now))
    return limit, left


def count_claims(
    file: SqliteFile, queue: str, claims: Sequence[Claim], rates: Mapping[str, Rate], now: float
) -> None:
    """Count claimed calls as started, for their lanes and their queue."""
    for lane, number in Counter([claim.lane for claim in claims]).items():
        if rate := rates.get(lane):
            count_starts(file, lane, rate, number, now)
    if claims and (rate := rates.get("")):
        count_starts(file, queue, rate, len(claims), now)


def step_start(file: SqliteFile, lane: str, rate: Rate) -> float:
    """See WorkQueue.start. It is on disk with the next queued call of the function that starts."""
    now = time.time()
    if starts_left(file, lane, rate, now):
        at = next_start(rate, file.index.next_starts.get(lane, 0.0), 1, now)
        file.index.next_starts[lane] = at
        return 0.0
    return next_start_at(file, lane, rate, now) - now


# --- SQLite statements ----------------------------------------------------------------------------

MOST_ROWS = 32  # of one statement; a power of two, as all their numbers are
MOST_BYTES = 2**20  # of their bodies: SQLite makes a copy of all values before it begins


def pieces(items: Sequence[T], most: int = MOST_ROWS) -> Iterator[Sequence[T]]:
    """Split a sequence into pieces of `most`, and the rest into powers of two.

    SQLite keeps a statement for each number of rows, which takes about 1.5 KiB a row.
    """
    first = 0
    while left := len(items) - first:
        number = min(most, 1 << (left.bit_length() - 1))
        yield items[first : first + number]
        first += number


class RowsStatement:
    """A statement on many rows, whose values stand where it says `{rows}`.

    SQLite works on all of them without Python's lock; a statement for each would take the lock back
    after each, and so alternate with the event loop. Each number of rows has a text of its own,
    which SQLite keeps prepared: see STATEMENTS_KEPT.
    """

    def __init__(self, text: str, values: int, *same: str, body: int | None = None) -> None:
        row = f"({', '.join([*'?' * values, *same])})"  # `same` stands behind those of each
        numbers = [1 << power for power in range(MOST_ROWS.bit_length())]
        self._texts = {number: text.format(rows=", ".join([row] * number)) for number in numbers}
        self._body = body  # which of the values may be long

    def run(self, db: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> int:
        """Execute it for these rows; how many rows were changed."""
        most = MOST_ROWS
        if self._body is not None and sum([len(row[self._body]) for row in rows]) > MOST_BYTES:
            most = 1
        changed = 0
        for some in pieces(rows, most):
            values = list(itertools.chain.from_iterable(some))
            changed += db.execute(self._texts[len(some)], values).rowcount
        return changed


def change_rows(
    db: sqlite3.Connection, statement: RowsStatement, rows: Sequence[Sequence[object]]
) -> list[bool]:
    """Whether each of these rows was changed. If not all were, they are tried one by one."""
    if len(rows) == 1:
        return [statement.run(db, rows) == 1]
    db.execute("SAVEPOINT rows")
    changed = [True] * len(rows)
    if statement.run(db, rows) < len(rows):
        db.execute("ROLLBACK TO rows")
        changed = [statement.run(db, [row]) == 1 for row in rows]
    db.execute("RELEASE rows")
    return changed


# What a dead process had claimed is interrupted. A call may be what the process died of, so it goes
# behind those that were due.
INTERRUPT = """
    UPDATE calls SET due_at = ?, deadline_at = NULL,
        status = iif(status = 'running', 'queued', status), interrupted = interrupted + (work <> ?)
    WHERE work IS NOT NULL AND due_at IS NULL
"""
# Calls that were interrupted together more than once come back one after the other, further apart
# each time. So it gets less likely that one of them takes the others along.
SPREAD_INTERRUPTED = """
    UPDATE calls SET
        due_at = due_at + min(60, place.number * ((1 << min(interrupted - 1, 6)) - 1))
    FROM (
        SELECT seq AS row, row_number() OVER (PARTITION BY work ORDER BY seq) - 1 AS number
        FROM calls WHERE work IS NOT NULL AND work <> ? AND due_at = ? AND interrupted > 0
    ) AS place
    WHERE seq = place.row
"""
FAIL_CALLBACKS = """
    UPDATE calls SET callback_status = 'failed', work = NULL, lane = NULL,
        callback_error = 'interrupted: the daemon died while it was sent'
    WHERE work = '@callbacks' AND due_at IS NULL AND callback_attempts >= ?
    RETURNING seq
"""
SELECT_CLAIMED = """
    SELECT lane, count(*) FROM calls
    WHERE work IS NOT NULL AND work <> '@callbacks' AND due_at IS NULL GROUP BY lane
"""
# Columns of WorkRow.
WORK_COLUMNS = """
    seq, claims, id, coalesce(call_id, id), function, namespace, concurrency_key, attempts,
    interrupted, callback_url, failure_url, work, lane, due_at
"""
SELECT_INTERRUPTED = f"""
    SELECT {WORK_COLUMNS} FROM calls
    WHERE work IS NOT NULL AND interrupted > 0 AND status = 'queued'
"""
SELECT_KEY = """
    SELECT coalesce(call_id, id), digest FROM calls
    WHERE function = ? AND namespace = ? AND idempotency_key = ?
"""
PLAIN_COLUMNS = """
    seq, id, function, namespace, queue, start_time, due_at, max_attempts, callback_url,
    work, lane, request_bytes
"""
# Invocation has the columns from `function` to `callback_url` in this order, too.
FUNCTION = Invocation._fields.index("function")
TARGET = Invocation._fields.index("target")
# Most calls have none of these. To insert a NULL costs more than to leave its column out.
RARE_COLUMNS = """
    deadline_at, failure_url, idempotency_key, app, hops, traceparent, tracestate, schedule,
    scheduled_for, concurrency_key, call_id, digest, turn
"""
FIRST_RARE = Invocation._fields.index("deadline_at")  # it and the fields behind it are the first
NOTHING_RARE = (None, None, None, None, 0, None, None, None, None, None)
INSERT_PLAIN_CALLS = RowsStatement(
    f"INSERT INTO calls ({PLAIN_COLUMNS}, status) VALUES {{rows}}",
    PLAIN_COLUMNS.count(",") + 1,
    "'queued'",
)
INSERT_CALLS = RowsStatement(
    f"INSERT INTO calls ({PLAIN_COLUMNS}, {RARE_COLUMNS}, status) VALUES {{rows}}",
    f"{PLAIN_COLUMNS},{RARE_COLUMNS}".count(",") + 1,
    "'queued'",
)
INSERT_REQUESTS = RowsStatement(
    "INSERT INTO requests (seq, target, headers, body, method) VALUES {rows}", 5, body=3
)
SELECT_ID = "SELECT seq FROM calls WHERE id = ?"
SELECT_NEWEST = "SELECT seq FROM calls WHERE call_id = ? ORDER BY seq DESC LIMIT 1"

# Due rows: the first ones of a lane, or the first one of each of several lanes.
OF_LANE = "WHERE work = ? AND lane = ? AND due_at <= ? ORDER BY due_at, seq LIMIT ?"
OF_LANES = """
    WHERE seq IN (
        SELECT (
            SELECT seq FROM calls WHERE work = ? AND lane = turn.value AND due_at <= ?
            ORDER BY due_at, seq LIMIT 1
        )
        FROM json_each(?) AS turn
    )
"""
SELECT_CALLS = """
    SELECT seq, claims + 1, id, coalesce(call_id, id), function, work, lane,
        attempts + 1, attempts + 1, max_attempts, start_time, callback_url, failure_url,
        http_status, duration, target, headers, body,
        coalesce(json_array_length(history), 0), hops, traceparent, tracestate, method,
        concurrency_key
    FROM calls LEFT JOIN requests USING (seq)
"""
CLAIM_CALLS = """
    UPDATE calls SET due_at = NULL, claims = claims + 1, attempts = attempts + 1,
        status = 'running', started_at = ?
    WHERE seq IN (SELECT value FROM json_each(?))
"""
SELECT_CALLBACKS = """
    SELECT seq, claims + 1, id, coalesce(call_id, id), function, work, lane,
        callback_attempts + 1, attempts, max_attempts, start_time, callback_url, failure_url,
        http_status, duration, status, coalesce(headers, x''), coalesce(body, x''),
        coalesce(json_array_length(history), 0), hops, traceparent, tracestate
    FROM calls LEFT JOIN outputs USING (seq)
"""
ROW_LANE = 6  # the column that is the lane
URLS_AT = Claim._fields.index("callback_url") - 1  # in a row behind its first two columns
TARGET_AT = Claim._fields.index("target") - 1
CLAIM_CALLBACKS = """
    UPDATE calls SET due_at = NULL, claims = claims + 1, callback_attempts = callback_attempts + 1
    WHERE seq IN (SELECT value FROM json_each(?))
"""

END_CALLS = RowsStatement(  # the last value is the callback's lane; NULL: nobody is told
    """
    UPDATE calls SET status = v.column4, http_status = v.column5, error = v.column6,
        completed_at = v.column7, duration = v.column8, response_bytes = v.column9,
        callback_status = iif(v.column10 IS NULL, 'none', 'pending'),
        work = iif(v.column10 IS NULL, NULL, '@callbacks'), lane = v.column10,
        due_at = iif(v.column10 IS NULL, NULL, v.column7), deadline_at = NULL, turn = NULL
    FROM (VALUES {rows}) AS v
    WHERE seq = v.column1 AND claims = v.column2 AND status = v.column3
    """,
    10,
)
END_CALLBACKS = RowsStatement(
    """
    UPDATE calls SET callback_status = v.column3, callback_http_status = v.column4,
        callback_error = v.column5, work = NULL, lane = NULL, due_at = NULL
    FROM (VALUES {rows}) AS v
    WHERE seq = v.column1 AND claims = v.column2 AND work = '@callbacks' AND due_at IS NULL
    """,
    5,
)
NOTE_FAILURE = f"""
    failures = json_insert(
        iif(json_array_length(failures) >= {MAX_FAILURES},
            json_remove(failures, '$[0]'), coalesce(failures, '[]')),
        '$[#]', json(?))
"""
RETRY_CALL = f"""
    UPDATE calls SET status = 'queued', due_at = ?, deadline_at = NULL, http_status = ?, error = ?,
        {NOTE_FAILURE}
    WHERE seq = ? AND claims = ? AND status = 'running'
"""
RETURN_CALL = """
    UPDATE calls SET status = 'queued', due_at = ?, attempts = attempts - 1
    WHERE seq = ? AND claims = ? AND status = 'running'
"""
RETRY_CALLBACK = f"""
    UPDATE calls SET due_at = ?, callback_http_status = ?, callback_error = ?, {NOTE_FAILURE}
    WHERE seq = ? AND claims = ? AND work = '@callbacks' AND due_at IS NULL
"""
RETURN_CALLBACK = """
    UPDATE calls SET due_at = ?, callback_attempts = callback_attempts - 1
    WHERE seq = ? AND claims = ? AND work = '@callbacks' AND due_at IS NULL
"""
DROP_REQUESTS = "DELETE FROM requests WHERE seq IN (SELECT value FROM json_each(?))"
DROP_OUTPUTS = "DELETE FROM outputs WHERE seq IN (SELECT value FROM json_each(?))"
INSERT_OUTPUTS = RowsStatement(
    "INSERT OR REPLACE INTO outputs (seq, headers, body, stderr) VALUES {rows}", 4, body=2
)
SELECT_LONG_OUTPUTS = """
    SELECT seq, body FROM outputs
    WHERE seq IN (SELECT value FROM json_each(?)) AND length(body) > ?
"""
CUT_OUTPUT = "UPDATE outputs SET headers = NULL, body = ? WHERE seq = ?"
EXPIRE_CALLS = f"""
    UPDATE calls SET deadline_at = NULL
    WHERE seq IN (
        SELECT seq FROM calls
        WHERE deadline_at <= ? AND deadline_at IS NOT NULL AND due_at IS NOT NULL
        ORDER BY deadline_at LIMIT ?
    )
    RETURNING {WORK_COLUMNS}
"""

WRITE_COUNTS = RowsStatement(
    "INSERT OR REPLACE INTO counts (lane, status, number) VALUES {rows}", 3
)

# -- rows, as statements take and give them


def call_lane(call: Invocation) -> str:
    """What the column `lane` has: a call's lane, or where it stands aside until its key's turn."""
    return call.lane if call.concurrency_key is None else call.lane + ASIDE


def is_plain(call: Invocation) -> bool:
    """Whether a call has nothing in RARE_COLUMNS."""
    return call[FIRST_RARE:] == NOTHING_RARE and call.call_id == call.id


def plain_values(seq: int, call: Invocation) -> tuple[object, ...]:
    """The values of PLAIN_COLUMNS."""
    return (seq, call.id, *call[FUNCTION:TARGET], call.queue, call_lane(call), len(call.body))


def rare_values(call: Invocation, digest: bytes | None) -> tuple[object, ...]:
    """The values of RARE_COLUMNS."""
    call_id = None if call.call_id == call.id else call.call_id
    return *call[FIRST_RARE:], call_id, digest, None if call.concurrency_key is None else 0


def request_row(seq: int, call: Invocation) -> Sequence[object]:
    """The values for INSERT_REQUESTS. Text has to be UTF-8, so another target goes in as bytes."""
    target: str | bytes = call.target
    if not call.target.isascii():
        target = call.target.encode("utf-8", "surrogateescape")
    return seq, target, bindable(call.headers), bindable(call.body), call.method


def bindable(data: bytes) -> bytes | bytearray:
    """Bytes as they are bound best: Python 3.11 looks for an adapter of `bytes` each time, which
    takes longer than a copy of what is small.
    """
    return data if len(data) > SMALL_BODY_BYTES else bytearray(data)


def decoded_target(target: str | bytes) -> str:
    """A target as it came, from text or bytes in the file; see `request_row`."""
    return target.decode("utf-8", "surrogateescape") if isinstance(target, bytes) else target


def call_claim(seq: int, claims: int, *row: Any) -> Claim:
    """A claim from a row of SELECT_CALLS."""
    claim = Claim._make((Receipt(seq, claims), *row))
    if isinstance(claim.target, bytes):
        return claim._replace(target=decoded_target(claim.target))
    return claim


def callback_claim(seq: int, claims: int, *row: Any) -> Claim:
    """A claim from a row of SELECT_CALLBACKS, which has the call's status in the target's place."""
    target = callback_target(row[TARGET_AT], row[URLS_AT], row[URLS_AT + 1])
    values = (*row[:TARGET_AT], target or "", *row[TARGET_AT + 1 :])
    return Claim(Receipt(seq, claims), *values)


class End(NamedTuple):
    """A call that is to be final, and whom to tell of it."""

    receipt: Receipt
    ended: Ended
    size: int | None = None  # of the answer
    target: str | None = None  # the callback's URL


class WorkRow(NamedTuple):
    """A call that has not finished, or whose callback has not: what WORK_COLUMNS gives of it."""

    seq: int
    claims: int
    id: str
    call_id: str
    function: str
    namespace: str
    concurrency_key: str | None
    attempts: int
    interrupted: int
    callback_url: str | None
    failure_url: str | None
    work: str
    place: str  # its lane, or where those stand aside
    due_at: float | None  # None: it is claimed

    @property
    def lane(self) -> str:
        """The lane that it counts for."""
        return self.place.removesuffix(ASIDE)

    @property
    def status(self) -> str:
        """The status of the call, if that is the work, and not its callback."""
        return "running" if self.due_at is None else "queued"

    def ended(self, status: str, error: str | None = None) -> Ended:
        """The call's end, if it ends in this state without another attempt."""
        return Ended(
            self.id,
            self.call_id,
            self.function,
            status,
            self.attempts,
            error=error,
            queue=self.work,
            lane=self.lane,
        )

    def end(self, status: str, error: str) -> End:
        """The call's end, with the callback that follows from it."""
        target = callback_target(status, self.callback_url, self.failure_url)
        return End(Receipt(self.seq, self.claims), self.ended(status, error), target=target)


def end_row(end: End, was: str, lane: str | None, now: float) -> Sequence[object]:
    """The values for END_CALLS; `lane` is that of the callback."""
    ended = end.ended
    duration = None if ended.duration_s is None else round(ended.duration_s, 6)
    result = (ended.status, ended.http_status, ended.error, now, duration, end.size)
    return *end.receipt, was, *result, lane


# --- SQLite work ----------------------------------------------------------------------------------
# Each step is a part of a transaction, and raises HttpErrors before it changes anything.


def enqueue_calls(file: SqliteFile, calls: Sequence[Invocation]) -> list[str | HttpError]:
    """Store calls without an idempotency key; the call ids to answer with, or a 429."""
    answers: list[str | HttpError] = []
    new: list[Invocation] = []
    room: dict[str, int] = {}
    for call in calls:
        left = room.get(call.queue)
        if left is None:
            left = queue_room(file, call.queue)
        if left > 0:
            room[call.queue] = left - 1
            new.append(call)
        known = left > 0 or file.db.execute(SELECT_ID, (call.id,)).fetchone()
        answers.append(call.call_id if known else queue_full(call.queue))
    for some in pieces(new):
        insert_calls(file, some)
    return answers


def step_enqueue_once(file: SqliteFile, call: Invocation) -> str:
    """Store the first call with its idempotency key; that one's call id. HttpError: 422, 429."""
    digest = hashlib.blake2b(call.body, digest_size=16).digest()
    place = (call.function, call.namespace, call.idempotency_key)
    taken = file.db.execute(SELECT_KEY, place).fetchone()
    if taken and taken[1] != digest:
        raise HttpError(422, OTHER_BODY)
    if taken:
        return str(taken[0])
    if queue_room(file, call.queue) <= 0:
        raise queue_full(call.queue)
    insert_calls(file, [call], digest)
    return call.call_id


def queue_room(file: SqliteFile, queue: str) -> int:
    """How many more calls a queue can take."""
    return file.settings().queue(queue).max_pending - file.index.lanes[queue].total


def insert_calls(
    file: SqliteFile, calls: Sequence[Invocation], digest: bytes | None = None
) -> None:
    """Write the rows of up to MOST_ROWS calls, and have their queues told.

    Those that are stored already are left as they are.
    """
    seqs = file.new_seqs(len(calls))
    rows = list(map(plain_values, seqs, calls))
    try:
        if all(map(is_plain, calls)):
            INSERT_PLAIN_CALLS.run(file.db, rows)
        else:
            rare = [rare_values(call, digest) for call in calls]
            INSERT_CALLS.run(file.db, list(map(operator.add, rows, rare)))
    except sqlite3.IntegrityError as exc:
        if exc.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_UNIQUE:
            raise
        if len(calls) > 1:  # SQLite has undone all of them: the others are new.
            for call in calls:
                insert_calls(file, [call], digest)
        return
    INSERT_REQUESTS.run(file.db, list(map(request_row, seqs, calls)))
    file.news.changed.extend(seqs)
    count_in(file, calls)


def count_in(file: SqliteFile, calls: Sequence[Invocation]) -> None:
    """Count new calls in by lane, and have their queues told."""
    due: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    keyed = [call for call in calls if call.concurrency_key is not None]
    for call in calls:
        due_at = call.due_at if call.concurrency_key is None else float("inf")
        due[call.queue, call.function, call.namespace].append(due_at)
    for (queue, function, namespace), times in due.items():
        lane = function_key(function, namespace)
        file.index.add(queue, lane, min(times), len(times))
        file.tally.move(lane, None, "queued", len(times))
    pass_turns(file, [(call.function, call.namespace, call.concurrency_key) for call in keyed])
    deadlines = [call.deadline_at for call in calls if call.deadline_at is not None]
    if deadlines and min(deadlines) < file.index.deadline_at:
        file.find_deadline()


def step_claim(
    file: SqliteFile, queue: str, limit: int, room: Mapping[str, int], rates: Mapping[str, Rate]
) -> Sequence[Claim]:
    """Claim due work of a queue, and set when the queue is told that there is more."""
    now = time.time()
    index = file.index
    if index.deadline_at <= now:
        step_expire(file)
        if index.deadline_at <= now:  # There are more of them: others first.
            index.wake(queue, now)
            return []
    if queue in index.paused:
        return []
    most, left = room_at_rates(file, queue, limit, room, rates, now)
    claims, held = claim_in_turn(file, queue, most, left, now)
    count_claims(file, queue, claims, rates, now)
    lanes = index.lanes[queue]
    next_at = lanes.next_at()
    wakes = [next_at if next_at > now else float("inf")]
    if lanes.total and len(claims) == most < limit:
        wakes.append(next_start_at(file, queue, rates[""], now))
    for lane in held:
        at = file.head(queue, lane)
        if rate := rates.get(lane):
            at = max(at, next_start_at(file, lane, rate, now))
            index.slowed[queue][lane] = rate
        if at > now:
            wakes.append(at)
        lanes.put(lane, at)
    index.wake(queue, min(wakes))
    return claims


def claim_in_turn(
    file: SqliteFile, queue: str, limit: int, room: Mapping[str, int], now: float
) -> tuple[list[Claim], list[str]]:
    """Claims, lane by lane; and the lanes that have more due work than they have room."""
    lanes = file.index.lanes[queue]
    fair = queue == CALLBACKS or file.settings().queue(queue).fair
    claims: list[Claim] = []
    held: list[str] = []
    left = dict(room)
    while len(claims) < limit and (turns := lanes.turns(limit - len(claims), now, fair)):
        until = now if fair else min(now, lanes.next_at())  # then it is another lane's turn
        most = {
            lane: min(share, left.setdefault(lane, room.get("", limit + 1)))
            for lane, share in turns.items()
        }
        rows = due_rows(file, queue, most, until)
        taken = Counter([row[ROW_LANE] for row in rows])
        claims += charge(file, queue, rows, taken, now)
        for lane, share in turns.items():
            left[lane] -= taken[lane]
            if lanes.remove(lane, taken[lane]) <= 0:
                continue
            if left[lane] <= 0:
                held.append(lane)
            elif fair and taken[lane] == share:  # More of it may be due.
                lanes.put(lane, now)
            else:
                lanes.put(lane, file.head(queue, lane))
    return claims, held


def due_rows(
    file: SqliteFile, queue: str, turns: Mapping[str, int], until: float
) -> list[Sequence[Any]]:
    """The first calls or callbacks that are due by `until`, at most so many of each lane."""
    select = SELECT_CALLBACKS if queue == CALLBACKS else SELECT_CALLS
    lanes = [lane for lane, most in turns.items() if most > 0]
    if len(lanes) > 1 and max(turns.values()) == 1:
        return file.db.execute(select + OF_LANES, (queue, until, json.dumps(lanes))).fetchall()
    rows: list[Sequence[Any]] = []
    for lane in lanes:
        rows += file.db.execute(select + OF_LANE, (queue, lane, until, turns[lane])).fetchall()
    return rows


def charge(
    file: SqliteFile,
    queue: str,
    rows: Sequence[Sequence[Any]],
    lanes: Mapping[str, int],
    now: float,
) -> list[Claim]:
    """Claim rows; `lanes` has how many of them are of each lane."""
    seqs = [row[0] for row in rows]
    if not seqs:
        return []
    file.news.changed.extend(seqs)
    if queue == CALLBACKS:
        file.db.execute(CLAIM_CALLBACKS, (json.dumps(seqs),))
        return [callback_claim(*row) for row in rows]
    file.db.execute(CLAIM_CALLS, (round(now, 6), json.dumps(seqs)))
    for lane, number in lanes.items():
        file.tally.move(lane, "queued", "running", number)
    return [call_claim(*row) for row in rows]


def write_counts(file: SqliteFile) -> None:
    """Write the counts that have changed to the file; a part of each transaction."""
    WRITE_COUNTS.run(file.db, file.tally.take_changed())


# -- steps that end work


def end_calls(file: SqliteFile, was: str, ends: Sequence[End]) -> list[bool]:
    """Make calls final that have the status `was`, and have their outcomes told.

    False, and nothing done, for those that have another status by now.
    """
    now = stamp()
    hosts = [callback_lane(end.target) if end.target else None for end in ends]
    rows = [end_row(end, was, host, now) for end, host in zip(ends, hosts, strict=True)]
    changed = change_rows(file.db, END_CALLS, rows)
    valid = list(itertools.compress(ends, changed))
    finals = Counter([(end.ended.lane, end.ended.status) for end in valid])
    for (lane, status), number in finals.items():
        file.tally.move(lane, was, status, number)
    told = Counter([host for host in itertools.compress(hosts, changed) if host])
    for host, number in told.items():
        file.index.add(CALLBACKS, host, now, number)
        file.tally.move(CALLBACKS, None, "pending", number)
    file.news.ended.extend([end.ended for end in valid])
    file.news.changed.extend([end.receipt.seq for end in valid])
    return changed


def recover(file: SqliteFile) -> None:
    """Queue again what a dead process had claimed; end what it seems to have died of."""
    file.db.execute("BEGIN IMMEDIATE")
    config = file.settings()
    # A single power cut is no reason to give up a callback that gets only one delivery.
    most = max(config.callback.attempts, config.retry.max_interruptions)
    failed = [seq for (seq,) in file.db.execute(FAIL_CALLBACKS, (most,)).fetchall()]
    file.tally.move(CALLBACKS, "pending", "failed", len(failed))
    cut_outputs(file, failed)
    for lane, number in file.db.execute(SELECT_CLAIMED).fetchall():
        file.tally.move(lane, "running", "queued", number)
    file.db.execute(END_ALL_TURNS)
    now = time.time()
    interrupted = file.db.execute(INTERRUPT, (now, CALLBACKS)).rowcount
    if interrupted:
        log.warning("%d interrupted attempts of the previous process are queued again", interrupted)
    for row in file.db.execute(SELECT_INTERRUPTED).fetchall():
        end_poisoned(file, WorkRow(*row))
    file.db.execute(SPREAD_INTERRUPTED, (CALLBACKS, now))
    write_counts(file)
    file.db.execute("COMMIT")


def end_poisoned(file: SqliteFile, row: WorkRow) -> None:
    """End a call whose process has died too often while it ran."""
    if row.interrupted < file.settings().max_interruptions(row.function):
        return
    error = f"interrupted {row.interrupted} times: the daemon died each time while it ran"
    drop_rows(file, DROP_OUTPUTS, [row.seq])  # of an earlier attempt
    end_calls(file, "queued", [row.end("error", error)])


class Completion(NamedTuple):
    """A claim whose work is done."""

    receipt: Receipt
    claim: Claim
    outcome: Outcome
    status: str

    def end(self) -> End:
        """The call's end."""
        receipt, claim, outcome, status = self
        ended = Ended(
            claim.id,
            claim.call_id,
            claim.function,
            status,
            claim.attempt,
            outcome.duration_s,
            outcome.status,
            outcome.error,
            queue=claim.queue,
            lane=claim.lane,
        )
        target = callback_target(status, claim.callback_url, claim.failure_url)
        return End(receipt, ended, outcome.size, target)


def complete_calls(file: SqliteFile, completions: Sequence[Completion]) -> list[bool]:
    """Make calls final. False: the claim is not valid any more."""
    keep = file.settings().calls.keep_output
    ends = [completion.end() for completion in completions]
    valid = end_calls(file, "running", ends)
    outputs: dict[int, KeptOutput | None] = {}
    done_with: list[int] = []  # requests that are too long to be kept
    for completion, end, done in zip(completions, ends, valid, strict=True):
        receipt, claim, outcome, status = completion
        pass_turn_of(file, claim)
        if not done:
            continue
        outputs[receipt.seq] = kept_output(outcome, keep, whole=end.target is not None)
        if status == "success" and len(claim.body) > keep:
            done_with.append(receipt.seq)
    save_outputs(file, outputs)
    drop_rows(file, DROP_REQUESTS, done_with)
    return valid


def deliver_callbacks(file: SqliteFile, completions: Sequence[Completion]) -> list[bool]:
    """Make callbacks final. False: the claim is not valid any more."""
    rows = []
    for completion in completions:
        outcome = completion.outcome
        http_status = outcome.status if outcome.answered else None
        rows.append((*completion.receipt, completion.status, http_status, outcome.error))
    valid = change_rows(file.db, END_CALLBACKS, rows)
    ended = list(itertools.compress(completions, valid))
    for status, number in Counter([completion.status for completion in ended]).items():
        file.tally.move(CALLBACKS, "pending", status, number)
    file.news.changed.extend([completion.receipt.seq for completion in ended])
    keep = file.settings().calls.keep_output
    if long := [item.receipt.seq for item in ended if len(item.claim.body) > keep]:
        cut_outputs(file, long)
    return valid


def stamp() -> float:
    """Now, in whole microseconds: as records show it, and as their history keeps it."""
    return round(time.time(), 6)


def requeue(file: SqliteFile, claim: Claim, statement: str, delay_s: float, *told: object) -> bool:
    """Make the work of a claim due again in `delay_s`. False: the claim is not valid any more."""
    due_at = time.time() + delay_s
    receipt = cast(Receipt, claim.receipt)
    queued = file.db.execute(statement, (due_at, *told, *receipt)).rowcount > 0
    if queued:
        file.index.add(claim.queue, claim.lane, due_at)
        file.news.changed.append(receipt.seq)
        if claim.queue != CALLBACKS:
            file.tally.move(claim.lane, "running", "queued")
    pass_turn_of(file, claim)
    return queued


def step_retry(file: SqliteFile, claim: Claim, outcome: Outcome, delay_s: float) -> bool:
    """Queue a call again, the attempt charged."""
    told = (outcome.status, outcome.error, failure_text("attempt", claim, outcome))
    if not requeue(file, claim, RETRY_CALL, delay_s, *told):
        return False
    seq = cast(Receipt, claim.receipt).seq
    save_outputs(file, {seq: kept_output(outcome, file.settings().calls.keep_output)})
    return True


def step_retry_callback(file: SqliteFile, claim: Claim, outcome: Outcome, delay_s: float) -> bool:
    """Queue a callback again, the delivery charged."""
    http_status = outcome.status if outcome.answered else None
    told = (http_status, outcome.error, failure_text("callback", claim, outcome))
    return requeue(file, claim, RETRY_CALLBACK, delay_s, *told)


def failure_text(of: str, claim: Claim, outcome: Outcome) -> str:
    """An entry of the column `failures`."""
    return json.dumps(failure_of(of, claim.attempt, outcome, time.time()))


def step_return(file: SqliteFile, claim: Claim, delay_s: float) -> bool:
    """Queue a call or callback again as if it had never been claimed."""
    statement = RETURN_CALLBACK if claim.queue == CALLBACKS else RETURN_CALL
    returned = requeue(file, claim, statement, delay_s)
    file.find_deadline()
    return returned


@functools.lru_cache(32)
def packed_answer(headers: Headers) -> bytes:
    """An answer's headers, packed. Functions often answer with the same."""
    return pack_headers(headers)


KeptOutput = tuple[bytes | None, bytes, bytes]  # headers, body and stderr


def kept_output(outcome: Outcome, keep: int, *, whole: bool = False) -> KeptOutput | None:
    """What to keep of an attempt, for people: of a lot its beginning and end.

    `whole`: the whole answer, for a callback. None: there is nothing to keep.
    """
    stderr = shorten(outcome.stderr, keep)
    if whole:
        return packed_answer(outcome.headers), outcome.body, stderr
    if not outcome.body and not outcome.stderr:
        return None
    headers = describing_headers(outcome.headers) if outcome.size <= keep else None
    return headers, shorten(outcome.body, keep), stderr


def output_row(seq: int, headers: bytes | None, body: bytes, stderr: bytes) -> Sequence[object]:
    """The values for INSERT_OUTPUTS."""
    return seq, headers and bindable(headers), bindable(body), bindable(stderr)


def save_outputs(file: SqliteFile, outputs: Mapping[int, KeptOutput | None]) -> None:
    """Keep, by row, what attempts gave, in place of what earlier ones did."""
    rows = [output_row(seq, *output) for seq, output in outputs.items() if output is not None]
    INSERT_OUTPUTS.run(file.db, rows)
    drop_rows(file, DROP_OUTPUTS, [seq for seq, output in outputs.items() if output is None])


def drop_rows(file: SqliteFile, statement: str, seqs: Sequence[int]) -> None:
    """Delete rows that belong to these calls."""
    if seqs:
        file.db.execute(statement, (json.dumps(seqs),))


def cut_outputs(file: SqliteFile, seqs: Sequence[int]) -> None:
    """Cut answers down to calls.keep_output, once no callback needs the whole of them."""
    keep = file.settings().calls.keep_output
    long = file.db.execute(SELECT_LONG_OUTPUTS, (json.dumps(seqs), keep)).fetchall()
    for seq, body in long:
        file.db.execute(CUT_OUTPUT, (shorten(body, keep), seq))


def step_expire(file: SqliteFile) -> None:
    """End calls that have not started by their deadline. A charged attempt takes it away."""
    expired = file.db.execute(EXPIRE_CALLS, (time.time(), BATCH)).fetchall()
    rows = list(itertools.starmap(WorkRow, expired))
    for row in rows:
        file.index.lanes[row.work].remove(row.lane, 1)
    end_calls(
        file, "queued", [row.end("timeout", "not started before its X-Deadline") for row in rows]
    )
    pass_turns(file, [(row.function, row.namespace, row.concurrency_key) for row in rows])
    file.find_deadline()


# --- SQLite records -------------------------------------------------------------------------------
# Steps of operators and people.

# In whole microseconds, as records show it: `since` with a shown time has to find its call.
CREATED_AT = "(start_time / 1000 / 1e6)"
RECORD_COLUMNS = f"""
    id, coalesce(call_id, id), function, namespace, queue,
    iif(status = 'queued' AND due_at > :now, 'delayed', status), attempts, max_attempts,
    http_status, error, {CREATED_AT}, started_at, completed_at,
    iif(status = 'queued', due_at, NULL), duration, interrupted, request_bytes, response_bytes, app,
    traceparent, schedule, scheduled_for, concurrency_key,
    callback_status, callback_attempts, callback_http_status, callback_error, history, failures,
    callback_url, failure_url, seq
"""
STATUS = CallRecord._fields.index("status")  # of these columns
# What a CallFilter asks for. Lists are JSON; an empty one, like NULL, matches everything.
MATCHES = f"""
    (:statuses = '[]' OR iif(status = 'queued' AND due_at > :now, 'delayed', status)
        IN (SELECT value FROM json_each(:statuses)))
    AND (:callbacks = '[]' OR callback_status IN (SELECT value FROM json_each(:callbacks)))
    AND (:function IS NULL OR function = :function)
    AND (:queue IS NULL OR queue = :queue)
    AND (:app IS NULL OR app = :app)
    AND (:schedule IS NULL OR schedule = :schedule)
    AND (:since IS NULL OR {CREATED_AT} >= :since)
    AND (:until IS NULL OR {CREATED_AT} < :until)
"""
SELECT_RECORD = f"SELECT {RECORD_COLUMNS} FROM calls WHERE seq = :seq"
SELECT_CHANGED = f"""
    SELECT {RECORD_COLUMNS} FROM calls WHERE seq IN (SELECT value FROM json_each(:seqs))
"""
# Rows that match, newest first: within a window, or by their call id, of which there is an index.
SELECT_IN_WINDOW = f"""
    SELECT %(columns)s FROM calls
    WHERE seq < :before AND seq >= :floor AND {MATCHES} ORDER BY seq DESC LIMIT :limit
"""
SELECT_BY_CALL_ID = f"""
    SELECT %(columns)s FROM calls WHERE id = :call_id AND seq < :before AND {MATCHES}
    UNION ALL SELECT * FROM (
        SELECT %(columns)s FROM calls
        WHERE call_id = :call_id AND seq < :before AND {MATCHES} ORDER BY seq DESC LIMIT :limit
    )
    ORDER BY seq DESC LIMIT :limit
"""
SELECT_OUTPUT = "SELECT body, stderr FROM outputs WHERE seq = ?"
SELECT_RESULT = """
    SELECT status, error, http_status, response_bytes, coalesce(headers, x''), coalesce(body, x'')
    FROM calls LEFT JOIN outputs USING (seq) WHERE seq = ?
"""
SELECT_REQUEST = "SELECT method, target, headers, body FROM requests WHERE seq = ?"

SELECT_WAITING = """
    SELECT seq FROM calls WHERE work = ? AND due_at IS NOT NULL AND seq <= ? LIMIT ?
"""
SELECT_WORK = f"""
    SELECT {WORK_COLUMNS} FROM calls
    WHERE seq IN (SELECT value FROM json_each(?)) AND work IS NOT NULL
"""
CANCEL_CALLS = """
    UPDATE calls SET status = 'cancelled', completed_at = ?, work = NULL, lane = NULL,
        due_at = NULL, deadline_at = NULL, turn = iif(due_at IS NULL, turn, NULL)
    WHERE seq IN (SELECT value FROM json_each(?))
"""
CANCEL_CALLBACKS = """
    UPDATE calls SET callback_status = 'failed', callback_error = 'cancelled', work = NULL,
        lane = NULL, due_at = NULL
    WHERE seq IN (SELECT value FROM json_each(?))
"""
# Times in the history are whole microseconds: SQLite would write 15 digits of a float.
REDRIVE_CALLS = f"""
    UPDATE calls SET status = 'queued', work = queue, turn = iif(concurrency_key IS NULL, NULL, 0),
        lane = function || '.' || namespace || iif(concurrency_key IS NULL, '', '{ASIDE}'),
        due_at = :now, attempts = 0, interrupted = 0, http_status = NULL, error = NULL,
        started_at = NULL, completed_at = NULL, duration = NULL, response_bytes = NULL,
        callback_status = 'none', callback_attempts = 0, callback_http_status = NULL,
        callback_error = NULL, failures = NULL,
        history = json_insert(coalesce(history, '[]'), '$[#]', json_object(
            'status', status, 'attempts', attempts, 'http_status', http_status, 'error', error,
            'started_at', CAST(round(started_at * 1e6) AS INTEGER),
            'completed_at', CAST(round(completed_at * 1e6) AS INTEGER),
            'duration_seconds', duration, 'interrupted', interrupted,
            'callback', json_object(
                'status', callback_status, 'attempts', callback_attempts,
                'http_status', callback_http_status, 'error', callback_error)))
    WHERE seq IN (SELECT value FROM json_each(:seqs)) AND work IS NULL AND turn IS NULL
        AND EXISTS (SELECT 1 FROM requests WHERE requests.seq = calls.seq)
    RETURNING seq, work, function, namespace, concurrency_key
"""
SELECT_ANSWER = """
    SELECT status, work, callback_url, failure_url, callback_status, response_bytes,
        length(body), headers IS NOT NULL
    FROM calls LEFT JOIN outputs USING (seq) WHERE seq = ?
"""
# What was cancelled while it ran keeps its turn until it has stopped.
SELECT_ENDING = "SELECT 1 FROM calls WHERE seq = ? AND (work IS NOT NULL OR turn IS NOT NULL)"
SELECT_REDRIVEN = """
    SELECT function || '.' || namespace, status, callback_status, count(*) FROM calls
    WHERE seq IN (SELECT value FROM json_each(?)) AND work IS NULL AND turn IS NULL
        AND EXISTS (SELECT 1 FROM requests WHERE requests.seq = calls.seq)
    GROUP BY 1, 2, 3
"""
RESEND_CALLBACK = """
    UPDATE calls SET callback_status = 'pending', callback_attempts = 0, callback_error = NULL,
        callback_http_status = NULL, work = '@callbacks', lane = ?, due_at = ?
    WHERE seq = ?
"""
PAUSE_QUEUE = "INSERT OR REPLACE INTO queues (name, paused) VALUES (?, ?)"
PRUNE_CALLS = tuple(
    f"""
    DELETE FROM calls
    WHERE seq IN (
        SELECT seq FROM calls WHERE completed_at < ? AND work IS NULL AND {ended}
        ORDER BY completed_at LIMIT ?
    )
    RETURNING seq, function || '.' || namespace, status, callback_status
    """
    for ended in (ENDED_WELL, ENDED_BADLY)
)
# Of many lanes in one statement: a look-up or two in an index for each.
SELECT_OLDEST = """
    SELECT coalesce(min((
        SELECT min(due_at) FROM calls
        WHERE work = ? AND lane = place.value AND due_at IS NOT NULL
    )), 9e999)
    FROM json_each(?) AS place
"""
COUNT_DELAYED = """
    SELECT place.value, (
        SELECT count(*) FROM calls WHERE work = ? AND lane = place.value AND due_at > ?
    ) AS number
    FROM json_each(?) AS place WHERE number > 0
"""


def find_seq(file: SqliteFile, call_id: str) -> int:
    """The row with this id, else the newest with this call id. HttpError: 404."""
    row = file.db.execute(SELECT_ID, (call_id,)).fetchone()
    row = row or file.db.execute(SELECT_NEWEST, (call_id,)).fetchone()
    if row is None:
        raise HttpError(404, UNKNOWN_CALL)
    return int(row[0])


def read_record(row: Sequence[Any]) -> CallRecord:
    """A record from RECORD_COLUMNS."""
    *call, status, attempts, http_status, error, history, failures, url, failure_url, _ = row
    target = callback_target(call[STATUS], url, failure_url)
    callback = CallbackRecord(target, status, attempts, http_status, error)
    earlier = tuple(map(read_past, json.loads(history))) if history else ()
    failed = tuple(map(Failure._make, json.loads(failures))) if failures else ()
    return CallRecord._make([*call, callback, earlier, failed])


def read_past(past: dict[str, Any]) -> dict[str, Any]:
    """An entry of a call's history, with its times in seconds."""
    for name in ("started_at", "completed_at"):
        past[name] = past[name] and past[name] / 1e6
    return past


def step_lookup(file: SqliteFile, call_id: str) -> CallRecord:
    """One record. HttpError: 404."""
    where = {"seq": find_seq(file, call_id), "now": time.time()}
    return read_record(file.db.execute(SELECT_RECORD, where).fetchone())


def read_changed(file: SqliteFile, seqs: Sequence[int]) -> list[CallRecord]:
    """The records of these rows for `Changes`, in this order, without rows that are gone."""
    where = {"seqs": json.dumps(seqs), "now": time.time()}
    rows = {row[-1]: row for row in file.db.execute(SELECT_CHANGED, where).fetchall()}
    return [read_record(rows[seq])._replace(history=(), failures=()) for seq in seqs if seq in rows]


def select_window(
    file: SqliteFile, columns: str, filters: CallFilter, before: int | None, limit: int
) -> tuple[list[Sequence[Any]], int]:
    """One window of matching rows older than `before`, and where the next window begins.

    In windows, so that a rare match in a large file doesn't keep the writer. 0: that was the last.
    The last of the columns is `seq`.
    """
    end = file.last_seq + 1
    start = end if before is None else min(before, end)
    by_call_id = filters.call_id is not None
    floor = 0 if by_call_id else max(0, start - SCAN_WINDOW)
    where = filters._asdict() | {
        "statuses": json.dumps(filters.statuses),
        "callbacks": json.dumps(filters.callbacks),
        "before": start,
        "floor": floor,
        "limit": limit,
        "now": time.time(),
    }
    statement = SELECT_BY_CALL_ID if by_call_id else SELECT_IN_WINDOW
    rows = file.db.execute(statement % {"columns": columns}, where).fetchall()
    after = rows[-1][-1] if len(rows) == limit else floor
    return rows, after if after > 1 else 0


def step_list(
    file: SqliteFile, filters: CallFilter, before: int | None, limit: int
) -> tuple[list[CallRecord], int]:
    """One window of records; 0: that was the last."""
    rows, after = select_window(file, RECORD_COLUMNS, filters, before, limit)
    return [read_record(row) for row in rows], after


def step_output(file: SqliteFile, call_id: str) -> Output:
    """Body and stderr of the last attempt. HttpError: 404."""
    seq = find_seq(file, call_id)
    row = file.db.execute(SELECT_OUTPUT, (seq,)).fetchone()
    return Output(*row) if row else Output(b"", b"")


def step_answer(file: SqliteFile, call_id: str) -> StoredAnswer:
    """What the function answered. HttpError: 404, 409, 410."""
    seq = find_seq(file, call_id)
    status, error, http_status, size, headers, body = file.db.execute(
        SELECT_RESULT, (seq,)
    ).fetchone()
    require_whole(status, error, len(body), size)
    return StoredAnswer(http_status, unpack_headers(headers), body)


def step_request(file: SqliteFile, call_id: str) -> StoredRequest:
    """What the function was asked. HttpError: 404, 410."""
    row = file.db.execute(SELECT_REQUEST, (find_seq(file, call_id),)).fetchone()
    if row is None:
        raise HttpError(410, NO_REQUEST)
    method, target, headers, body = row
    return StoredRequest(method, decoded_target(target), unpack_headers(headers), body)


def cancel_rows(file: SqliteFile, seqs: Sequence[int]) -> int:
    """Cancel the work of these rows, calls or callbacks; how many had any.

    Whoever does it now is told after the commit.
    """
    rows = [WorkRow(*row) for row in file.db.execute(SELECT_WORK, (json.dumps(seqs),)).fetchall()]
    calls = [row for row in rows if row.work != CALLBACKS]
    cancel_calls(file, calls)
    cancel_callbacks(file, [row.seq for row in rows if row.work == CALLBACKS])
    waiting = [row for row in rows if row.due_at is not None]
    for (work, lane), number in Counter([(row.work, row.lane) for row in waiting]).items():
        file.index.lanes[work].remove(lane, number)
    stopped = [Receipt(row.seq, row.claims) for row in rows if row.due_at is None]
    file.news.stopped.extend(stopped)
    file.news.changed.extend([row.seq for row in rows])
    pass_turns(file, [(row.function, row.namespace, row.concurrency_key) for row in rows])
    return len(rows)


def cancel_calls(file: SqliteFile, rows: Sequence[WorkRow]) -> None:
    """Make these calls final, and have that told."""
    file.db.execute(CANCEL_CALLS, (stamp(), json.dumps([row.seq for row in rows])))
    for (lane, was), number in Counter([(row.lane, row.status) for row in rows]).items():
        file.tally.move(lane, was, "cancelled", number)
    file.news.ended.extend([row.ended("cancelled") for row in rows])


def cancel_callbacks(file: SqliteFile, seqs: Sequence[int]) -> None:
    """Give up the callbacks of these calls."""
    if seqs:
        file.db.execute(CANCEL_CALLBACKS, (json.dumps(seqs),))
        file.tally.move(CALLBACKS, "pending", "failed", len(seqs))
        cut_outputs(file, seqs)


def redrive_rows(file: SqliteFile, seqs: Sequence[int]) -> int:
    """Queue again, as if new, those of these rows that are final and have their request."""
    now = time.time()
    where = {"seqs": json.dumps(seqs), "now": now}
    finished = file.db.execute(SELECT_REDRIVEN, (where["seqs"],)).fetchall()
    for lane, status, callback_status, number in finished:
        file.tally.move(lane, status, "queued", number)
        file.tally.move(CALLBACKS, callback_status, None, number)
    rows = file.db.execute(REDRIVE_CALLS, where).fetchall()
    redriven = [seq for seq, *_ in rows]
    drop_rows(file, DROP_OUTPUTS, redriven)
    file.news.changed.extend(redriven)
    waiting = Counter((queue, function, namespace) for _, queue, function, namespace, _ in rows)
    for (queue, function, namespace), number in waiting.items():
        file.index.add(queue, function_key(function, namespace), now, number)
    pass_turns(file, ((function, namespace, key) for _, _, function, namespace, key in rows))
    return len(rows)


def step_cancel(file: SqliteFile, own_id: str) -> bool:
    """Cancel the call with this id. False: there is none. HttpError: 409 it has finished."""
    row = file.db.execute(SELECT_ID, (own_id,)).fetchone()
    if row is None:
        return False
    if not cancel_rows(file, [row[0]]):
        raise HttpError(409, HAS_FINISHED)
    return True


def step_redrive(file: SqliteFile, call_id: str) -> None:
    """Queue a final call again. HttpError: 404, 409, 410."""
    seq = find_seq(file, call_id)
    if file.db.execute(SELECT_ENDING, (seq,)).fetchone():
        raise HttpError(409, NOT_FINISHED)
    if not redrive_rows(file, [seq]):
        raise HttpError(410, NO_REQUEST)


def step_resend(file: SqliteFile, call_id: str) -> None:
    """Have the outcome of a call delivered once more. HttpError: 404, 409, 410."""
    seq = find_seq(file, call_id)
    status, work, callback_url, failure_url, callback_status, size, kept, headed = file.db.execute(
        SELECT_ANSWER, (seq,)
    ).fetchone()
    target = callback_target(status, callback_url, failure_url)
    if work is not None:
        raise HttpError(409, NOT_FINISHED)
    if not target or callback_status == "none":
        raise HttpError(409, NO_CALLBACK)
    if size and (kept != size or not headed):
        raise HttpError(410, NOT_WHOLE)
    now = time.time()
    lane = callback_lane(target)
    file.db.execute(RESEND_CALLBACK, (lane, now, seq))
    file.tally.move(CALLBACKS, callback_status, "pending")
    file.news.changed.append(seq)
    file.index.add(CALLBACKS, lane, now)


def step_bulk(
    file: SqliteFile,
    filters: CallFilter,
    before: int | None,
    change: Callable[[SqliteFile, Sequence[int]], int],
) -> tuple[int, int, int]:
    """Change one batch of matching rows: how many matched, were changed, and where to go on."""
    rows, after = select_window(file, "seq", filters, before, BATCH)
    seqs = [seq for (seq,) in rows]
    return len(rows), change(file, seqs) if seqs else 0, after


def step_last_seq(file: SqliteFile) -> int:
    """The newest row."""
    return file.last_seq


def step_purge(file: SqliteFile, queue: str, last_seq: int) -> int:
    """Cancel one batch of a queue's waiting calls that are not newer than `last_seq`."""
    rows = file.db.execute(SELECT_WAITING, (queue, last_seq, BATCH)).fetchall()
    return cancel_rows(file, [seq for (seq,) in rows])


def step_pause(file: SqliteFile, queue: str, paused: bool) -> None:
    """Hold a queue, or let it go on."""
    file.db.execute(PAUSE_QUEUE, (queue, paused))
    file.index.pause(queue, paused)


def step_stats(file: SqliteFile) -> Mapping[str, QueueStats]:
    """The figures of all queues that have waiting calls or are paused."""
    stats = {}
    for work in {*file.index.lanes, *file.index.paused}:
        places = (work, places_of(file, work))
        (oldest_at,) = file.db.execute(SELECT_OLDEST, places).fetchone()
        waiting = dict(file.index.lanes[work].waiting)
        stats[work] = QueueStats(waiting, oldest_at, work in file.index.paused)
    return stats


def places_of(file: SqliteFile, work: str) -> str:
    """What the column `lane` may have for the lanes of a queue with waiting work, as JSON."""
    lanes = file.index.lanes[work].waiting
    return json.dumps([*lanes, *(lane + ASIDE for lane in lanes)])


def store_figures(path: Path) -> StoreFigures:
    """What a file takes with its log, and what is left where it is. Waits for the disk."""
    used_bytes = 0
    free_bytes = None
    for suffix in ("", "-wal"):
        with contextlib.suppress(OSError):
            used_bytes += path.with_name(path.name + suffix).stat().st_size
    with contextlib.suppress(OSError):
        free_bytes = shutil.disk_usage(path.parent).free
    return StoreFigures(str(path), used_bytes, free_bytes)


def step_overview(file: SqliteFile) -> Overview:
    """The whole queue in figures."""
    now = time.time()
    counts = file.tally.numbers.copy()
    for work in file.index.lanes.keys() - {CALLBACKS}:
        places = (work, now, places_of(file, work))
        for place, delayed in file.db.execute(COUNT_DELAYED, places).fetchall():
            counts[place.removesuffix(ASIDE), "delayed"] += delayed
            counts[place.removesuffix(ASIDE), "queued"] -= delayed
    return Overview(step_stats(file), +counts, store_figures(file.path))


def step_probe(file: SqliteFile) -> None:
    """Store something, and delete it again."""
    file.db.execute("CREATE TABLE room (id)")
    file.db.execute("INSERT INTO room VALUES (1)")  # That counts as a change, a table does not.
    file.db.execute("DROP TABLE room")


def step_prune(file: SqliteFile) -> int:
    """Delete one batch of final records past their time and give free pages back."""
    now = time.time()
    calls = file.settings().calls
    gone: list[tuple[int, str, str, str]] = []
    for statement, kept_s in zip(
        PRUNE_CALLS, (calls.keep, calls.kept_s("error", "none")), strict=True
    ):
        where = (now - kept_s, BATCH - len(gone))
        gone += file.db.execute(statement, where).fetchall()
    for _, lane, status, callback_status in gone:
        file.tally.move(lane, status, None)
        file.tally.move(CALLBACKS, callback_status, None)
    seqs = [row[0] for row in gone]
    drop_rows(file, DROP_REQUESTS, seqs)
    drop_rows(file, DROP_OUTPUTS, seqs)
    return len(gone) or give_room_back(file)


def give_room_back(file: SqliteFile) -> int:
    """Give up to two pages for each row of a batch back to the file system. 1: that was as many."""
    most = 2 * BATCH
    free = file.db.execute("PRAGMA freelist_count").fetchone()[0]
    for _ in range(min(free, most)):
        # Python's module steps this statement once, which frees one page, whatever its argument.
        file.db.execute("PRAGMA incremental_vacuum(1)")
    left = file.db.execute("PRAGMA freelist_count").fetchone()[0]
    return int(free - left >= most)


# --- SQLite schedules -----------------------------------------------------------------------------

SELECT_SCHEDULE = "SELECT state, revision FROM schedules WHERE name = ?"
SELECT_SCHEDULES = "SELECT state, revision FROM schedules"
INSERT_SCHEDULE = """
    INSERT INTO schedules (state, name, revision) VALUES (?, ?, 1) ON CONFLICT DO NOTHING
"""
UPDATE_SCHEDULE = """
    UPDATE schedules SET state = ?, revision = revision + 1 WHERE name = ? AND revision = ?
"""


def step_schedule(file: SqliteFile, name: str) -> ScheduleState:
    """See ScheduleStates.state."""
    row = file.db.execute(SELECT_SCHEDULE, (name,)).fetchone()
    return unpack_schedule(json.loads(row[0]), row[1]) if row else ScheduleState(name)


def step_schedules(file: SqliteFile) -> Mapping[str, ScheduleState]:
    """See ScheduleStates.states."""
    rows = file.db.execute(SELECT_SCHEDULES).fetchall()
    states = [unpack_schedule(json.loads(state), revision) for state, revision in rows]
    return {state.name: state for state in states}


def step_save_schedule(file: SqliteFile, state: ScheduleState, calls: Sequence[Invocation]) -> int:
    """Store a state, and the calls that led to it. 0: somebody else has written it meanwhile.

    HttpError: 429. All of the calls are stored, or none.
    """
    if step_schedule(file, state.name).revision != state.revision:
        return 0
    counts = Counter(call.queue for call in calls)
    for queue, number in counts.items():
        if number > queue_room(file, queue):
            raise queue_full(queue)
    for some in pieces(calls):
        insert_calls(file, some)
    packed = pack_schedule(state)
    if state.revision:
        file.db.execute(UPDATE_SCHEDULE, (packed, state.name, state.revision))
    else:
        file.db.execute(INSERT_SCHEDULE, (packed, state.name))
    return state.revision + 1


# --- SQLite copies --------------------------------------------------------------------------------
# The file is copied by the connection that works with it, between its transactions, because its
# lock lets no other one in. What that connection changes meanwhile, SQLite changes in the copy,
# too: in the end it is the file as it is then (sqlite.org/backup.html).

COPY_PAGES = 64  # of 4 KiB, between two transactions: a millisecond's work
COPY_CACHE_KIB = 256  # of the copy: a piece is written when the next one is there
COPY_RESERVE_BYTES = 64 * MIB  # what has to be left beside a copy, for calls that come meanwhile


def step_figures(file: SqliteFile) -> StoreFigures:
    """See Storage.figures."""
    return store_figures(file.path)


class CopyStopped(Exception):
    """Ends the making of a copy, and says why."""


def require_room(file: SqliteFile) -> None:
    """Raise CopyStopped if there is no room for a copy."""
    (pages,) = file.db.execute("PRAGMA page_count").fetchone()
    (page_bytes,) = file.db.execute("PRAGMA page_size").fetchone()
    folder = file.path.parent
    free = shutil.disk_usage(folder).free
    if free < pages * page_bytes + COPY_RESERVE_BYTES:
        takes = f"it takes {brief_size(pages * page_bytes)} in {folder} for a while"
        reserve = f"{brief_size(COPY_RESERVE_BYTES)} of {brief_size(free)} have to be left"
        raise CopyStopped(f"{takes}, and {reserve}")


def make_copy(file: SqliteFile, between: Tell[int]) -> IO[bytes]:
    """Copy a file that is open. The copy is returned open, too, and has no name any more.

    After each piece, `between` is called with the copy's descriptor. It may change the file; what
    it raises ends the copying. Raises CopyStopped, OSError, sqlite3.Error.
    """
    require_room(file)
    make_private(file.copy)
    made = file.copy.open("r+b")
    try:
        with contextlib.closing(sqlite3.connect(file.copy)) as target:
            # It may be fast and unsafe: unless it is finished, it is thrown away.
            target.execute("PRAGMA journal_mode = OFF")
            target.execute("PRAGMA synchronous = OFF")
            target.execute(f"PRAGMA cache_size = -{COPY_CACHE_KIB}")
            fd = made.fileno()
            file.db.backup(target, pages=COPY_PAGES, progress=lambda *_: between(fd), sleep=0)
    except BaseException:
        discard_copy_later(made)
        raise
    finally:
        file.copy.unlink()
    return made


def answered_copy(
    file: SqliteFile,
    work: Callable[[], None],
    trouble: Callable[[], str | None],
    wake: Callable[[], None],
) -> IO[bytes] | Exception:
    """A copy, or why there is none.

    Each piece is synced to disk before the next is made, so that no commit has to wait for many.
    Meanwhile `work` is called again and again: it waits for something to do, and does it. `wake`
    ends its waiting. When `trouble` says why, the copying stops.
    """
    with ThreadPoolExecutor(1, "copy") as disk:

        def between(fd: int) -> None:
            synced = disk.submit(os.fdatasync, fd)
            synced.add_done_callback(lambda _: wake())
            work()
            while not synced.done():
                work()
            synced.result()
            if reason := trouble():
                raise CopyStopped(reason)

        try:
            return make_copy(file, between)
        except (CopyStopped, OSError, RuntimeError, sqlite3.Error) as exc:  # or no more threads
            return exc


def deliver_copy(asked: asyncio.Future[IO[bytes]], answer: IO[bytes] | Exception) -> None:
    """Hand a copy to who has asked for it, or say why there is none."""
    if isinstance(answer, Exception):
        if not asked.done():
            reason = HttpError(503, f"there is no copy of the queue's file: {answer}", LATER)
            asked.set_exception(reason)
    elif asked.done():
        discard_copy_later(answer)
    else:
        asked.set_result(answer)


# --- SQLite move ----------------------------------------------------------------------------------
# Waiting calls that go to another store: read here, and forgotten once they are stored there.

SELECT_MOVING = """
    SELECT seq, id, coalesce(call_id, id) AS call_id, function, namespace, queue, start_time,
        due_at, max(1, max_attempts - attempts) AS max_attempts, callback_url,
        target, headers, body, method, deadline_at, failure_url, idempotency_key, app,
        hops, traceparent, tracestate, schedule, scheduled_for, concurrency_key
    FROM calls JOIN requests USING (seq)
    WHERE status = 'queued' AND seq > ? ORDER BY seq LIMIT ?
"""
SELECT_MOVING_CALLBACKS = """
    SELECT seq, digest, requests.headers AS request_headers, requests.body AS request,
        outputs.headers AS answer_headers, outputs.body AS answer, stderr,
        id, coalesce(call_id, id) AS call_id, function, namespace, queue, start_time, due_at,
        max_attempts, coalesce(target, '') AS target, request_bytes, callback_url, failure_url,
        idempotency_key, app, status, attempts, interrupted, http_status, error, started_at,
        completed_at, duration AS duration_s, response_bytes, callback_status, callback_attempts,
        callback_http_status, callback_error, hops, traceparent, tracestate,
        coalesce(method, 'POST') AS method, schedule, scheduled_for, concurrency_key, history,
        failures
    FROM calls LEFT JOIN requests USING (seq) LEFT JOIN outputs USING (seq)
    WHERE callback_status = 'pending' AND seq > ? ORDER BY seq LIMIT ?
"""
BYTES_OF_ENDED = 5  # the columns of EndedCall.parts
SELECT_PAUSES = "SELECT name FROM queues WHERE paused = 1 ORDER BY name"
PAUSE_HAS_MOVED = "UPDATE queues SET paused = 2 WHERE name = ?"
DROP_CALLS = "DELETE FROM calls WHERE seq IN (SELECT value FROM json_each(?))"
DAMAGED_FILE = (
    "a damaged file (%s), and nothing was moved or changed: "
    "move a copy of it from before, or what sqlite3's .recover makes of it"
)


def queue_file_trouble(path: Path) -> str | None:
    """What is wrong with a file that is to be moved; None: nothing. It is not changed."""
    if path.with_name(f"{path.name}-damaged").exists():
        return DAMAGED_FILE % "a daemon has found it so"
    log_bytes = 0
    with contextlib.suppress(OSError):
        log_bytes = path.with_name(f"{path.name}-wal").stat().st_size
    # A file without a log is opened as one that nobody changes, or SQLite would make a log.
    mode = "mode=ro" if log_bytes else "immutable=1"
    place = f"file:{quote(str(path))}?{mode}"
    try:
        with contextlib.closing(sqlite3.connect(place, timeout=0, uri=True)) as db:
            result = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
            version = db.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.OperationalError:  # Whoever opens it next tells what is wrong.
        return None
    except sqlite3.DatabaseError as exc:
        return DAMAGED_FILE % exc
    if result != "ok":
        return DAMAGED_FILE % result.replace("\n", " ")
    return None if version else "no queue's file"


class EndedCall(NamedTuple):
    """A call that has ended, whose callback is still to be sent."""

    columns: Mapping[str, Any]  # by their names; what is JSON in the file is read
    parts: Sequence[bytes]  # headers and body of the request, and of the answer; stderr
    digest: bytes | None  # of the body, where the call has an idempotency key


class Moving(NamedTuple):
    """A call that goes to another store, and where it is counted here."""

    seq: int
    call_id: str
    lane: str
    status: str
    call: Invocation | EndedCall


def waiting_calls(file: SqliteFile, after: int, limit: int) -> Sequence[Moving]:
    """The waiting calls in rows after this one, oldest first.

    Their `max_attempts` are the attempts that they have left.
    """
    moving = []
    for seq, *values in file.db.execute(SELECT_MOVING, (after, limit)).fetchall():
        call = Invocation(*values)
        call = call._replace(target=decoded_target(call.target))
        moving.append(Moving(seq, call.call_id, call.lane, "queued", call))
    return moving


def calls_to_tell(file: SqliteFile, after: int, limit: int) -> Sequence[Moving]:
    """The ended calls in rows after this one whose callback is pending."""
    moving = []
    cursor = file.db.execute(SELECT_MOVING_CALLBACKS, (after, limit))
    names = [column[0] for column in cursor.description]
    first = names.index("request_headers")
    for row in cursor.fetchall():
        values = dict(zip(names, row, strict=True))
        seq, digest = values.pop("seq"), values.pop("digest")
        parts = [values.pop(name) or b"" for name in names[first : first + BYTES_OF_ENDED]]
        values["target"] = decoded_target(values["target"])
        values["history"] = [read_past(past) for past in json.loads(values["history"] or "[]")]
        values["failures"] = json.loads(values["failures"] or "[]")
        lane = function_key(values["function"], values["namespace"])
        call = EndedCall(values, parts, digest)
        moving.append(Moving(seq, values["call_id"], lane, values["status"], call))
    return moving


def forget_moved(file: SqliteFile, moved: Sequence[Moving]) -> None:
    """Delete what is stored elsewhere by now, in one commit. Raises sqlite3.Error."""
    file.db.execute("BEGIN IMMEDIATE")
    seqs = [moving.seq for moving in moved]
    for statement in (DROP_CALLS, DROP_REQUESTS, DROP_OUTPUTS):
        drop_rows(file, statement, seqs)
    for moving in moved:
        file.tally.move(moving.lane, moving.status, None)
        if isinstance(moving.call, EndedCall):
            file.tally.move(CALLBACKS, "pending", None)
    write_counts(file)
    file.db.execute("COMMIT")


def unmoved_pauses(file: SqliteFile) -> Sequence[str]:
    """The paused queues whose pause has not been moved yet."""
    return [name for (name,) in file.db.execute(SELECT_PAUSES).fetchall()]


def mark_pause_moved(file: SqliteFile, queue: str) -> None:
    """Note that a queue's pause was moved: from now on that one counts. Raises sqlite3.Error."""
    file.db.execute(PAUSE_HAS_MOVED, (queue,))


# --- SQLite writer --------------------------------------------------------------------------------
# The thread with its group commit.


class Entry(NamedTuple):
    """A step, and who waits for it."""

    step: Callable[..., Any]
    arguments: Sequence[Any]
    futures: Sequence[asyncio.Future[Any]]
    shared: bool = False  # There is one argument for each who waits, and one result.

    def split(self) -> Iterator[Entry]:
        """An entry for each who waits."""
        if not self.shared:
            yield self
            return
        for argument, future in zip(self.arguments, self.futures, strict=True):
            yield Entry(self.step, [argument], [future], shared=True)


# Who waits, and a result or an error for each.
Answers = tuple[Sequence[asyncio.Future[Any]], Sequence[object]]


def do_steps(file: SqliteFile, batch: Sequence[Entry]) -> list[Answers]:
    """Do the steps in their order."""
    answers: list[Answers] = []
    for step, arguments, futures, shared in batch:
        results = step(file, arguments) if shared else [do_step(file, step, arguments)]
        answers.append((futures, results))
    return answers


def do_step(file: SqliteFile, step: Callable[..., Any], arguments: Sequence[Any]) -> object:
    """What a step returns, or the HttpError that it raises before it changes anything."""
    try:
        return step(file, *arguments)
    except HttpError as exc:
        return exc


def do_late_steps(
    file: SqliteFile, batch: list[Entry], inbox: SimpleQueue[list[Entry]]
) -> list[Answers]:
    """Do the steps that were submitted meanwhile, and add them to the batch.

    Callers who were answered together come again together, and some of them a little late. Without
    this the late ones would get an fsync of their own, and from then on come as a second group.
    """
    answers: list[Answers] = []
    while inbox.qsize() and not full_batch(batch):
        late = inbox.get()
        batch += late
        answers += do_steps(file, late)
    return answers


def full_batch(batch: Sequence[Entry]) -> bool:
    """Whether so many wait for it that the others should wait for the next one."""
    return sum(len(entry.futures) for entry in batch) >= GROUP_COMMIT_MAX


class Listener(NamedTuple):
    """Whom the queue tells, on the event loop; see WorkQueue.open."""

    wake: Tell[str]
    stop: Tell[Hashable]
    final: Tell[Ended]

    def tell(self, news: News) -> None:
        """Tell all that a transaction led to."""
        for name in news.woken:
            self.wake(name)
        for receipt in news.stopped:
            self.stop(receipt)
        for ended in news.ended:
            self.final(ended)


def tell_all(listener: Listener, news: News, answers: Sequence[Answers]) -> None:
    """Tell what a transaction has led to, and answer those who wait for its steps."""
    listener.tell(news)
    for futures, results in answers:
        for future, result in zip(futures, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


class WallClock:
    """Notices that the wall clock was set forward, by the time since boot, which nobody sets."""

    def __init__(self) -> None:
        self.since = time.time()  # the earliest and the latest that it has shown, as of now
        self.latest = self.since
        self._offset = self._now()

    def _now(self) -> float:
        return time.time() - uptime_s()

    def ahead(self) -> float:
        """By how many seconds it was set forward; 0: it was not, or by next to nothing."""
        ahead = self._now() - self._offset
        return ahead if ahead > CLOCK_JUMP_S else 0.0

    def accept(self, ahead: float) -> None:
        """Take the clock for right as it is now: forward by `ahead`, set back, or drifted."""
        now = time.time()
        self.since = min(self.since + ahead, now)
        self.latest = max(self.latest, now)
        self._offset = self._now()


class Outbox:
    """Steps on their way to the writer, which gets those of a round of the loop together."""

    def __init__(self, inbox: SimpleQueue[list[Entry]]) -> None:
        self._inbox = inbox
        self._loop = asyncio.get_running_loop()
        self._entries: list[Entry] = []
        # What the shared steps among them get, and who waits for them, as long as more may come.
        self._shared: dict[Callable[..., Any], tuple[list[Any], list[asyncio.Future[Any]]]] = {}
        self.closed = False

    def submit(
        self, step: Callable[[SqliteFile, Unpack[Ts]], T], *arguments: Unpack[Ts]
    ) -> asyncio.Future[T]:
        """Run a step in the next transaction; the future is set once that is on disk."""
        if self.closed:
            return self._refused()
        future: asyncio.Future[T] = self._loop.create_future()
        self._shared.clear()  # Steps are done in their order.
        self._put(Entry(step, arguments, [future]))
        return future

    def share(
        self, step: Callable[[SqliteFile, Sequence[T]], Sequence[R | HttpError]], item: T
    ) -> asyncio.Future[R]:
        """As `submit`, for a step that does many items at once, and answers for each."""
        if self.closed:
            return self._refused()
        future: asyncio.Future[R] = self._loop.create_future()
        group = self._shared.get(step)
        if group is None:
            group = self._shared[step] = ([], [])
            self._put(Entry(step, *group, shared=True))
        items, futures = group
        items.append(item)
        futures.append(future)
        return future

    def _refused(self) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        future.set_exception(StoreError("the queue is closed"))
        return future

    def _put(self, entry: Entry) -> None:
        if not self._entries:
            # One round of the loop later: so outcomes share their transaction with the claims for
            # the slots that they free.
            self._loop.call_soon(self._loop.call_soon, self._hand_over)
        self._entries.append(entry)

    def _hand_over(self) -> None:
        self._shared.clear()
        self._inbox.put(self._entries)
        self._entries = []

    def close(self) -> None:
        """Hand over what there is, and take nothing after that."""
        self._hand_over()
        self.refuse()
        self._inbox.put([])  # The writer may wait for something.

    def refuse(self) -> None:
        """Take nothing any more."""
        self.closed = True


class Writer:
    """The thread that owns the connection.

    What is submitted while one transaction is synced shares the next one, and its fsync (group
    commit). Between transactions it waits for steps, or until a call becomes due or its deadline
    passes.
    """

    def __init__(self, file: SqliteFile, observe_commit: Tell[float], listener: Listener) -> None:
        self._file = file
        self._observe_commit = observe_commit
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._inbox: SimpleQueue[list[Entry]] = SimpleQueue()
        self.steps = Outbox(self._inbox)
        self._copies: SimpleQueue[asyncio.Future[IO[bytes]]] = SimpleQueue()  # that are asked for
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._ended = asyncio.Event()
        self._busy_since = float("inf")  # monotonic; since when it has not waited for work
        self._clock = WallClock()
        self._seen_at = 0.0  # the wall clock after the last wait
        self._expire_after = 0.0  # when calls that missed their deadline are ended at the earliest
        self._failure: str | None = None  # why one failed; None: one has written since then
        self._rollbacks = 0  # transactions that failed
        self._watcher: Tell[Changes] | None = None
        self._budget = Budget(CHANGES_PER_SECOND)
        self._nobody: asyncio.Future[None] = self._loop.create_future()
        self._nobody.cancel()  # It stands for those who wait for the writer's own steps.
        self._thread.start()

    async def close(self) -> None:
        """Finish what was submitted, and end the thread."""
        self.steps.close()
        await self._ended.wait()  # not in another thread, of which there may be no more
        self._thread.join()

    def watch(self, tell: Tell[Changes] | None) -> None:
        """See CallRecords."""
        self._watcher = tell

    def copy(self) -> asyncio.Future[IO[bytes]]:
        """Have a copy made, between transactions. To cancel the future ends that."""
        asked: asyncio.Future[IO[bytes]] = self._loop.create_future()
        self._copies.put(asked)
        self._inbox.put([])  # The writer may wait for something.
        return asked

    @property
    def failure(self) -> str | None:
        """Why a transaction failed, until one has written something; None: none did."""
        return self._failure

    @property
    def watched(self) -> bool:
        """Whether somebody is told of changes."""
        return self._watcher is not None

    @property
    def idle(self) -> bool:
        """Whether it waits for work."""
        return self._busy_since == float("inf")

    def busy_s(self) -> float:
        """For how long it has not waited for work."""
        return time.monotonic() - self._busy_since

    def _run(self) -> None:
        try:
            while not self.steps.closed or self._inbox.qsize():
                self._round()
                while self._copies.qsize():
                    self._copy(self._copies.get())
        finally:
            self.steps.refuse()
            self._file.close()
            with contextlib.suppress(RuntimeError):  # The loop may be closed.
                self._loop.call_soon_threadsafe(self._ended.set)

    def _round(self) -> None:
        """Wait for work, and do it."""
        self._busy_since = float("inf")
        batch = self._next_batch()
        self._busy_since = time.monotonic()
        self._commit(batch, whole=True)
        if not self._inbox.qsize():
            self._file.checkpoint()

    def _copy(self, asked: asyncio.Future[IO[bytes]]) -> None:
        rollbacks = self._rollbacks

        def trouble() -> str | None:
            if self._rollbacks > rollbacks:  # SQLite would begin anew.
                return f"the queue can't store: {self._failure}"
            return "the daemon stops" if self.steps.closed or asked.done() else None

        answer = answered_copy(self._file, self._round, trouble, lambda: self._inbox.put([]))
        self._loop.call_soon_threadsafe(deliver_copy, asked, answer)

    def _next_batch(self) -> list[Entry]:
        """Wait for steps, or until something is due."""
        index = self._file.index
        expire_at = max(index.deadline_at, self._expire_after)
        wait_s = min(expire_at, index.next_wake_at()) - time.time()
        batch: list[Entry] = []
        with contextlib.suppress(Empty):
            # Short enough to notice a clock that was set.
            batch = self._inbox.get(timeout=min(max(0.0, wait_s), CLOCK_CHECK_S))
            while self._inbox.qsize() and not full_batch(batch):
                batch += self._inbox.get()
        now = time.time()
        if now < self._seen_at - 1.0:  # The clock was set back.
            self._file.distrust_index()
        self._seen_at = now
        if expire_at <= now:
            batch.append(Entry(step_expire, (), [self._nobody]))
        return batch

    def _commit(self, batch: list[Entry], whole: bool = False) -> None:
        """One transaction. When it fails, its parts are tried alone: none takes others down."""
        db = self._file.db
        started = time.perf_counter()
        changes = db.total_changes
        try:
            db.execute("BEGIN IMMEDIATE")
            self._file.prepare()
            if ahead := self._clock.ahead():
                self._file.catch_up(self._clock.since, self._clock.latest, ahead)
            answers = do_steps(self._file, batch)
            if whole:  # not a part of one that failed
                answers += do_late_steps(self._file, batch, self._inbox)
            write_counts(self._file)
            db.execute("COMMIT")
        except Exception as exc:
            self._failed(batch, exc)
            return
        self._clock.accept(ahead)
        if db.total_changes != changes:  # To read succeeds on a full disk, too.
            self._failure = None
            self._observe_commit(time.perf_counter() - started)
        self._tell(answers)

    def _failed(self, batch: list[Entry], exc: Exception) -> None:
        """Nothing of a transaction happened, as it failed: try its parts, or tell who waits."""
        with contextlib.suppress(sqlite3.Error):  # Then the next BEGIN fails, and leads here again.
            self._file.db.rollback()
        self._rollbacks += 1
        self._file.distrust(exc)
        parts: dict[Hashable, list[Entry]] = {}
        # What the disk refuses for one step, it refuses for all of the same kind.
        disk = isinstance(exc, sqlite3.OperationalError)
        for entry in batch if disk else itertools.chain(*(entry.split() for entry in batch)):
            parts.setdefault(entry.step if disk else entry.futures[0], []).append(entry)
        if len(parts) > 1:
            for part in parts.values():
                self._commit(part)
            return
        if any(entry.step is step_expire for entry in batch):
            self._expire_after = time.time() + RETRY_STORE_S
        reason = str(exc) if isinstance(exc, sqlite3.Error) else f"{type(exc).__name__}: {exc}"
        self._failure = reason
        self._tell([(futures, [StoreError(reason)] * len(futures)) for _, _, futures, _ in batch])

    def _tell(self, answers: list[Answers]) -> None:
        """Tell those first who may claim, then those who wait for a step."""
        news = self._file.take_news()
        news.woken += self._file.index.due(time.time())
        self._loop.call_soon_threadsafe(tell_all, self._listener, news, answers)
        if self._watcher is not None and news.changed:
            self._tell_changes(self._watcher, list(dict.fromkeys(news.changed)))

    def _tell_changes(self, watcher: Tell[Changes], seqs: list[int]) -> None:
        """Tell whoever watches what has changed, after all others."""
        records: list[CallRecord] = []
        with contextlib.suppress(sqlite3.Error):
            records = read_changed(self._file, seqs[: self._budget.take(len(seqs))])
        self._loop.call_soon_threadsafe(watcher, Changes(records, len(seqs) - len(records)))


# --- SQLite queue ---------------------------------------------------------------------------------
# The seam in front of the thread.


@dataclass(frozen=True)
class SqliteSchedules:
    """See ScheduleStates."""

    writer: Writer

    async def state(self, name: str) -> ScheduleState:
        return await self.writer.steps.submit(step_schedule, name)

    async def states(self) -> Mapping[str, ScheduleState]:
        return await self.writer.steps.submit(step_schedules)

    async def save(self, state: ScheduleState, calls: Sequence[Invocation]) -> int:
        return await self.writer.steps.submit(step_save_schedule, state, calls)


@dataclass(frozen=True)
class SqliteStorage:
    """See Storage."""

    writer: Writer

    async def figures(self) -> StoreFigures:
        return await self.writer.steps.submit(step_figures)

    async def copy(self) -> IO[bytes]:
        return await self.writer.copy()


class SqliteQueue:
    """The embedded queue: WorkQueue and CallRecords on one file."""

    IN_STEP = True  # Otherwise running attempts and the writer's thread compete for Python's lock.
    SHARED = False

    def __init__(self, path: Path, settings: Settings, observe_commit: Tell[float]) -> None:
        self._file = SqliteFile(path, settings, recover)
        self._observe_commit = observe_commit
        self._writer: Writer  # these once open
        self._steps: Outbox
        self._wake: Tell[str]

    async def open(self, wake: Tell[str], stop: Tell[Hashable], final: Tell[Ended]) -> None:
        """See WorkQueue. Raises StoreError, StoreLocked."""
        self._file.open()  # Nothing else runs yet.
        tell_paused(self._file.index.paused)
        self._wake = wake
        self._writer = Writer(self._file, self._observe_commit, Listener(wake, stop, final))
        self._steps = self._writer.steps

    async def close(self) -> None:
        await self._writer.close()

    def enqueue(self, call: Invocation) -> Awaitable[str]:
        if call.idempotency_key is not None:
            return self._steps.submit(step_enqueue_once, call)
        stored = self._steps.share(enqueue_calls, call)
        # Who watches is told of each state that a commit shows.
        unseen = self._writer.idle and not self._writer.watched
        if unseen and self._file.index.seems_empty(call.queue):
            self._wake_early(call.queue)
        return stored

    def _wake_early(self, queue: str) -> None:
        """Have the consumer claim in the transaction that stores what it is to claim."""
        if self._writer.failure is None:
            self._wake(queue)

    def claim(
        self, name: str, limit: int, room: Mapping[str, int], rates: Mapping[str, Rate]
    ) -> Awaitable[Sequence[Claim]]:
        return self._steps.submit(step_claim, name, limit, room, rates)

    def start(self, lane: str, rate: Rate) -> Awaitable[float]:
        return self._steps.submit(step_start, lane, rate)

    def complete(self, claim: Claim, outcome: Outcome, status: str) -> Awaitable[bool]:
        completion = Completion(cast(Receipt, claim.receipt), claim, outcome, status)
        if claim.queue == CALLBACKS:
            return self._steps.share(deliver_callbacks, completion)
        completed = self._steps.share(complete_calls, completion)
        if claim.callback_url or claim.failure_url:
            self._wake_early(CALLBACKS)
        return completed

    def retry(self, claim: Claim, outcome: Outcome | None, delay_s: float) -> Awaitable[bool]:
        if outcome is None:
            return self._steps.submit(step_return, claim, delay_s)
        step = step_retry_callback if claim.queue == CALLBACKS else step_retry
        return self._steps.submit(step, claim, outcome, delay_s)

    def stalled(self) -> str | None:
        if self._file.damaged:
            return DAMAGED
        busy_s = self._writer.busy_s()
        return f"the disk has not answered for {busy_s:.0f} s" if busy_s >= STALLED_S else None

    def notice(self) -> str | None:
        return None

    async def failing(self) -> str | None:
        if self._writer.failure is not None:
            with contextlib.suppress(StoreError):
                await self._steps.submit(step_probe)
        failure = self._writer.failure
        return f"the queue can't store: {failure}" if failure else None

    def lookup(self, call_id: str) -> Awaitable[CallRecord]:
        return self._steps.submit(step_lookup, call_id)

    async def list_records(
        self, filters: CallFilter, limit: int = 100, cursor: str | None = None
    ) -> Page:
        """See CallRecords. The cursor is a row's number: the next page is older than that."""
        records: list[CallRecord] = []
        before = None if cursor is None else int(cursor)
        while True:
            wanted = limit - len(records)
            more, after = await self._steps.submit(step_list, filters, before, wanted)
            records += more
            if not after or len(records) >= limit:
                return Page(records, str(after) if after else None)
            before = after

    def output(self, call_id: str) -> Awaitable[Output]:
        return self._steps.submit(step_output, call_id)

    def answer(self, call_id: str) -> Awaitable[StoredAnswer]:
        return self._steps.submit(step_answer, call_id)

    def request(self, call_id: str) -> Awaitable[StoredRequest]:
        return self._steps.submit(step_request, call_id)

    async def cancel(self, call_id: str) -> int:
        if await self._steps.submit(step_cancel, call_id):
            return 1
        return cancelled_number(await self.cancel_matching(CallFilter(call_id=call_id)))

    def redrive(self, call_id: str) -> Awaitable[None]:
        return self._steps.submit(step_redrive, call_id)

    def resend(self, call_id: str) -> Awaitable[None]:
        return self._steps.submit(step_resend, call_id)

    async def cancel_matching(self, filters: CallFilter) -> BulkResult:
        return await self._bulk(filters, cancel_rows)

    async def redrive_matching(self, filters: CallFilter) -> BulkResult:
        return await self._bulk(filters, redrive_rows)

    async def _bulk(
        self, filters: CallFilter, change: Callable[[SqliteFile, Sequence[int]], int]
    ) -> BulkResult:
        matched = 0
        done = 0
        before: int | None = None
        while True:
            next_at = time.monotonic() + BULK_PERIOD_S
            step = self._steps.submit(step_bulk, filters, before, change)
            found, changed, before = await step
            matched += found
            done += changed
            if not before:
                return BulkResult(matched, done)
            if found:  # A window in which nothing matched has kept nobody.
                await asyncio.sleep(next_at - time.monotonic())

    async def purge(self, name: str) -> int:
        total = 0
        last_seq = await self._steps.submit(step_last_seq)
        while True:
            next_at = time.monotonic() + BULK_PERIOD_S
            number = await self._steps.submit(step_purge, name, last_seq)
            total += number
            if number < BATCH:
                return total
            await asyncio.sleep(next_at - time.monotonic())

    def pause(self, name: str, paused: bool) -> Awaitable[None]:
        return self._steps.submit(step_pause, name, paused)

    def stats(self) -> Awaitable[Mapping[str, QueueStats]]:
        return self._steps.submit(step_stats)

    def overview(self) -> Awaitable[Overview]:
        return self._steps.submit(step_overview)

    def watch(self, tell: Tell[Changes] | None) -> None:
        self._writer.watch(tell)

    def prune(self) -> Awaitable[int]:
        return self._steps.submit(step_prune)

    @property
    def schedules(self) -> SqliteSchedules:
        """See Queue."""
        return SqliteSchedules(self._writer)

    @property
    def storage(self) -> SqliteStorage:
        """See Queue."""
        return SqliteStorage(self._writer)


# --- NATS messages --------------------------------------------------------------------------------
# Several daemons share one JetStream stream. A call's work message stays un-acked until all that
# follows from its attempt is stored; a crash between two steps leads to its redelivery. A record is
# written by compare-and-set on its sequence, so whoever loses a race has done nothing.

# -- messages

NATS_REQUIRED = (2, 12)  # the first version with schedules and message TTLs
NATS_CONNECT_S = 2  # until another server is tried
PARKED_S = 30.0  # how long a pull waits at the server before it is asked again
NATS_LATE_S = 0.01  # until a stored message is known to its consumer
MAX_CALL_BYTES = 128 * KIB  # of a message beside its parts: URLs, and the history of redrives
KEPT_WHEN_FULL_BYTES = 256  # of an output, while servers have no room
PROBE_BYTES = 64 * KIB  # stored to see whether there is room
# Beside two leases: how long a record stays after its time, unseen. A server that is killed may
# bring back what it had deleted within the last two minutes (seen with 2.15).
FENCE_S = 150.0
# Servers count nanoseconds in 64 bits: to the year 2262, and in TTLs 292 years. What is later for
# them has passed long ago.
FAR_S = 9e9
SETTLED_S = 3.0  # of our connection: by then all daemons that live have connected again, too
CLOCKS_DIFFER_S = 2.0  # A server's clock that differs by less is taken for ours.
RESEND_S = 2.0  # in which a record is written, once that has been prepared
CLAIM_AGAIN_S = 0.5  # after which a claim that could not be stored is tried again
POLL_S = 1.0  # between looks at all lanes
IDLE_LOOKS = 2  # looks that are left out while nothing happens: each costs 2 ms of CPU
OWN_CONSUMER = re.compile(r"(work|later)\+[^+]+\+[^+]+")  # the name of one: root, queue and lane
WATCHED_S = 5 * POLL_S  # how long other daemons are told of changes after they have asked for it
TELL_ENDED_S = 0.005  # for which calls that have ended are collected before others are told
MANY_ENDED = 100  # calls that have ended, in one message
TELL_S = 0.05  # for which changes are collected before they are told
KNOWN_CHANGES = 4 * CHANGES_PER_SECOND  # calls of which it is known what was told last
DEADLINES = "@deadlines"  # the queue of deadlines that pass
MANY_NATS_REQUESTS = 64  # under way at once for an operator
# Consumers that a stream may have: for each function in a queue one for its work and one for what
# is not due yet, and one for each host that is called back. A server's own default is 1,000.
MANY_CONSUMERS = 100_000
MANY_GIVEN_BACK = 1000  # messages of a lane that are watched until somebody has them
NAMED_SUBJECTS = 1000  # in one request for records or its answer: a server takes 1,024
# Codes of JetStream's errors.
WRONG_SEQUENCE = (10071, 10164)  # somebody else has written the subject
NO_REPLICAS = 10074  # the server is alone
OTHER_CONSUMER = 10148  # one of this name is there, with other settings
NOT_THERE = (10014, 10037, 10059)  # a consumer, a message, the stream
FULL = (10002, 10023, 10047)  # the account, or the server, has no room
TOO_MANY = 413  # a status: more messages match than one request may ask for
NO_MORE = ("204", "404")  # statuses: these were all, or none matches


@functools.lru_cache(MAX_SEEN)
def nats_token(name: str) -> str:
    """A name as one token of a subject: what is no letter, digit, `_`, `-` or `@` is =XX."""
    return quote(name, safe="@").replace(".", "%2E").replace("~", "%7E").replace("%", "=") or "="


def nats_name(token: str) -> str:
    """The name that a token of `nats_token` stands for."""
    return unquote(token.removesuffix("=").replace("=", "%"))


class NatsCall(NamedTuple):
    """A call as work messages and records have it, apart from its bytes.

    The fields before `status` say with what it was accepted, the others what becomes of it.
    """

    id: str
    call_id: str
    function: str
    namespace: str
    queue: str
    start_time: int
    due_at: float
    max_attempts: int
    target: str
    request_bytes: int
    deadline_at: float | None = None
    callback_url: str | None = None
    failure_url: str | None = None
    idempotency_key: str | None = None
    app: str | None = None
    hops: int = 0
    traceparent: str | None = None
    tracestate: str | None = None
    method: str = "POST"
    schedule: str | None = None
    scheduled_for: float | None = None
    concurrency_key: str | None = None
    history: Sequence[Mapping[str, Any]] = ()  # what was before it was queued again
    status: str = "queued"
    owner: str | None = None  # the process that has claimed the call or its callback
    attempts: int = 0
    started_at: float | None = None
    completed_at: float | None = None
    http_status: int | None = None
    duration_s: float | None = None
    response_bytes: int | None = None
    interrupted: int = 0
    error: str | None = None
    callback_status: str = "none"
    callback_attempts: int = 0
    callback_http_status: int | None = None
    callback_error: str | None = None
    failures: Sequence[Sequence[Any]] = ()  # since it was queued, as fields of Failure

    @property
    def lane(self) -> str:
        """The calls of one function share a lane."""
        return function_key(self.function, self.namespace)

    @property
    def callback_target(self) -> str | None:
        """The URL that its outcome goes to."""
        return callback_target(self.status, self.callback_url, self.failure_url)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to be done, not even a callback."""
        return self.status in FINAL and self.callback_status != "pending"


# What JSON may have for each type of a field. Anybody may publish anything: the rest is no call.
JSON_TYPES: Mapping[Any, Any] = {
    str: str,
    int: int,
    float: (float, int),
    str | None: (str, type(None)),
    int | None: (int, type(None)),
    float | None: (float, int, type(None)),
    Sequence[Mapping[str, Any]]: (list, tuple),
    Sequence[Sequence[Any]]: (list, tuple),
}
FIELD_TYPES = {name: JSON_TYPES[hint] for name, hint in get_type_hints(NatsCall).items()}
SECONDS = frozenset(("deadline_at", "scheduled_for", "started_at", "completed_at", "duration_s"))
TEXTS = frozenset(name for name, types in FIELD_TYPES.items() if types in (str, (str, type(None))))
TEXTS -= {"target", "error", "callback_error"}  # which may have bytes that are no UTF-8
# What may be raised while bytes are read that somebody else has published.
FOREIGN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def foreign_reason(exc: Exception) -> str:
    """Why bytes are none of ours, for a person, without repeating what stands in them."""
    if isinstance(exc, KeyError):
        return f"it has no {exc.args[0]}"
    if isinstance(exc, json.JSONDecodeError | UnicodeDecodeError | RecursionError):
        return "it is not JSON"
    if type(exc) is ValueError and exc.args:
        return str(exc)
    return "something in it is of another kind than in ours"


# Defaults, which a message leaves out; None for fields without one, whose value is never None.
CALL_DEFAULTS = tuple(NatsCall._field_defaults.get(name) for name in NatsCall._fields)
OPTIONAL = NatsCall._fields.index("deadline_at")  # Every call has the fields before it.
FATE = NatsCall._fields.index("status")  # This and those behind it say what becomes of a call:
NUMBERS = NatsCall._fields.index("attempts")  # from here on numbers that each attempt has,
TROUBLE = NatsCall._fields.index("interrupted")  # and from here on what few calls have.
FATE_FIELDS = frozenset(NatsCall._fields[FATE:])
# A template for these numbers in JSON; it writes None as Python does.
NUMBERS_JSON = "".join([f',"{name}":%r' for name in NatsCall._fields[NUMBERS:TROUBLE]])


class Parts(NamedTuple):
    """The bytes of a call: its request while it may be needed, and what the last attempt gave."""

    headers: bytes = b""
    body: bytes = b""
    answer_headers: bytes = b""
    output: bytes = b""
    stderr: bytes = b""

    @property
    def has_request(self) -> bool:
        """Whether the request is there: its headers have the call id at least."""
        return bool(self.headers)


class Stored(NamedTuple):
    """A call as it was read.

    `seq` is the sequence of its record, which a write has to name; 0: there is no record yet.
    `accepted` is the call's JSON, if that has only the fields before `status`: it is written again
    as it is. Otherwise it is empty.
    """

    seq: int
    call: NatsCall
    parts: Parts
    accepted: str = ""


class NatsReceipt(NamedTuple):
    """A claim: the sequence of the record in which it stands."""

    id: str
    seq: int


class Delivery(NamedTuple):
    """A work message as a consumer of the server has sent it to us."""

    subject: str
    reply: str  # where it is acked
    data: bytes
    seq: int
    again: bool  # another daemon, or we, had it before
    pending: int  # how many of the lane are behind it

    @property
    def id(self) -> str:
        """The id of its call."""
        return self.subject.rpartition(".")[2]


class Held(NamedTuple):
    """A claim of this daemon."""

    delivery: Delivery
    stored: Stored
    queue: str
    lane: str


def pack_fields(call: NatsCall, first: int = 0, end: int | None = None) -> dict[str, Any]:
    """A call's fields from `first` to `end` for JSON, without those that have their default."""
    values = zip(call[first:end], CALL_DEFAULTS[first:end], strict=True)
    fields = zip(NatsCall._fields[first:end], values, strict=True)
    return {name: value for name, (value, default) in fields if value != default}


def unpack_fields(document: Mapping[str, Any]) -> NatsCall:
    """A call from its fields. Those of a newer version are passed over. ValueError, TypeError."""
    known = document
    if not document.keys() <= FIELD_TYPES.keys():
        known = {name: value for name, value in document.items() if name in FIELD_TYPES}
    if not all(map(isinstance, known.values(), map(FIELD_TYPES.__getitem__, known))):
        wrong = [name for name, value in known.items() if not isinstance(value, FIELD_TYPES[name])]
        raise ValueError(f"its {wrong[0]} is of another kind than in ours")
    call = NatsCall(**known)
    if not (0 <= call.start_time / 1e9 <= END_OF_TIME and 0 <= call.due_at <= END_OF_TIME):
        raise ValueError("its start_time or due_at is none")
    f"{call.call_id}{call.function}{call.namespace}{call.queue}".encode()  # It may be no text.
    if len(known) > OPTIONAL:  # Most work messages have nothing else.
        require_shown(known)
    return call


def require_shown(fields: Mapping[str, Any]) -> None:
    """Raise FOREIGN for what JSON can say and nobody can show: a time that is none, text that is
    none, a past of another form. A list with such a record would fail as a whole.
    """
    times = [fields[name] or 0.0 for name in SECONDS.intersection(fields)]
    if not all(0 <= seconds <= END_OF_TIME for seconds in times):
        raise ValueError("one of its times is none")
    "".join([fields[name] or "" for name in TEXTS.intersection(fields)]).encode()
    for past in fields.get("history", ()):
        list(map(rfc3339, (past["started_at"], past["completed_at"])))
    for failure in fields.get("failures", ()):
        rfc3339(Failure._make(failure).failed_at)


encode_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
encode_text = json.encoder.encode_basestring_ascii
decode_json = json.JSONDecoder().raw_decode
MESSAGE_KEYS = ["record", "parts", "call"]  # of a message's head, in this order


def more_json(call: NatsCall, first: int, end: int | None = None) -> str:
    """A call's fields as text that goes on in a JSON object, with a comma first; or nothing."""
    if call[first:end] == CALL_DEFAULTS[first:end]:
        return ""
    return f",{encode_json(pack_fields(call, first, end))[1:-1]}"


def fate_json(call: NatsCall) -> str:
    """The fields from `status` on, as text that goes on in a JSON object; or nothing."""
    if call[FATE:] == CALL_DEFAULTS[FATE:]:
        return ""
    numbers = (NUMBERS_JSON % call[NUMBERS:TROUBLE]).replace("None", "null")
    owner = f',"owner":{encode_text(call.owner)}' if call.owner is not None else ""
    return f',"status":{encode_text(call.status)}{owner}{numbers}{more_json(call, TROUBLE)}'


def accepted_json(call: NatsCall) -> str:
    """A call's fields before `status` as JSON, which is most of what is stored of it."""
    return (
        f'{{"id":{encode_text(call.id)},"call_id":{encode_text(call.call_id)}'
        f',"function":{encode_text(call.function)},"namespace":{encode_text(call.namespace)}'
        f',"queue":{encode_text(call.queue)},"start_time":{call.start_time}'
        f',"max_attempts":{call.max_attempts},"target":{encode_text(call.target)}'
        f',"request_bytes":{call.request_bytes},"due_at":{call.due_at!r}'
        f"{more_json(call, OPTIONAL, FATE)}}}"
    )


def pack_call(call: NatsCall, parts: Parts, seq: int = 0, accepted: str = "") -> bytes:
    """A message: the length of its head, the head as JSON, then raw bytes.

    `seq`: see Stored; for a work message, that of the record it follows from. `accepted`: see
    there.
    """
    accepted = accepted or accepted_json(call)
    lengths = ",".join(map(str, map(len, parts)))
    current = f"{accepted[:-1]}{fate_json(call)}}}"
    head = f'{{"record":{seq},"parts":[{lengths}],"call":{current}}}'.encode()
    return b"".join((len(head).to_bytes(4, "big"), head, *parts))


def unpack_call(data: bytes, seq: int | None = None) -> Stored:
    """A call from a message; `seq`: that of the message, if it is a record.

    Raises ValueError: it is no call.
    """
    try:
        start = 4 + int.from_bytes(data[:4], "big")
        text = data[4:start].decode()
        head, end = decode_json(text)
        if end != len(text):
            raise ValueError("more than a head")
        parts = []
        for length in head["parts"]:
            parts.append(data[start : start + length])
            start += length
        document = head["call"]
        call = unpack_fields(document)
        if not is_own_id(call.id):
            raise ValueError("its id is none of ours")
        accepted = ""
        if [*head] == MESSAGE_KEYS and FATE_FIELDS.isdisjoint(document):
            accepted = text.partition('"call":')[2][:-1]
        return Stored(head["record"] if seq is None else seq, call, Parts(*parts), accepted)
    except FOREIGN as exc:
        raise ValueError(foreign_reason(exc)) from None


# What notes have in JSON under these names; under others it is text.
NOTE_TYPES: Mapping[str, Any] = {
    "paused": bool,
    "next_at": (float, int),
    "runs": list,
    "boots": list,
}


def unpack_note(data: bytes, names: Iterable[str]) -> dict[str, Any]:
    """A small JSON document that has to have these keys. Raises ValueError."""
    try:
        document = dict(json.loads(data))
        if not all(isinstance(document[name], NOTE_TYPES.get(name, str)) for name in names):
            raise TypeError
        return document
    except FOREIGN as exc:
        raise ValueError(foreign_reason(exc)) from None


def nats_record(call: NatsCall, now: float) -> CallRecord:
    """The record of a call for those who ask."""
    waits = call.status == "queued"
    delayed = waits and call.due_at > now
    return CallRecord(
        id=call.id,
        call_id=call.call_id,
        function=call.function,
        namespace=call.namespace,
        queue=call.queue,
        status="delayed" if delayed else call.status,
        attempts=call.attempts,
        max_attempts=call.max_attempts,
        http_status=call.http_status,
        error=call.error,
        created_at=call.start_time // 1000 / 1e6,  # as it is shown
        started_at=call.started_at,
        completed_at=call.completed_at,
        due_at=call.due_at if waits else None,
        duration_s=call.duration_s,
        interrupted=call.interrupted,
        request_bytes=call.request_bytes,
        response_bytes=call.response_bytes,
        app=call.app,
        traceparent=call.traceparent,
        schedule=call.schedule,
        scheduled_for=call.scheduled_for,
        concurrency_key=call.concurrency_key,
        callback=CallbackRecord(
            url=call.callback_target,
            status=call.callback_status,
            attempts=call.callback_attempts,
            http_status=call.callback_http_status,
            error=call.callback_error,
        ),
        history=tuple(call.history),
        failures=tuple(map(Failure._make, call.failures)),
    )


def nats_claim(held: Held) -> Claim:
    """A claim for its consumer; by position, because thousands are made in a second."""
    seq, call, parts, _ = held.stored
    attempt, target = call.attempts, call.target
    headers, body = parts.headers, parts.body
    if held.queue == CALLBACKS:
        attempt, target = call.callback_attempts, call.callback_target or ""
        headers, body = parts.answer_headers, parts.output
    who = (NatsReceipt(call.id, seq), call.id, call.call_id, call.function, held.queue, held.lane)
    runs = (attempt, call.attempts, call.max_attempts, call.start_time)
    outcome = (call.callback_url, call.failure_url, call.http_status, call.duration_s)
    trace = (call.hops, call.traceparent, call.tracestate, call.method, call.concurrency_key)
    return Claim._make((*who, *runs, *outcome, target, headers, body, len(call.history), *trace))


def started_call(call: NatsCall, owner: str, now: float) -> NatsCall:
    """A queued call, now running. Here and below `_replace` would take three times as long."""
    started = ("running", owner, call.attempts + 1, now)
    return NatsCall._make(call[:FATE] + started + call[FATE + len(started) :])


def ended_call(call: NatsCall, outcome: Outcome, status: str, now: float) -> NatsCall:
    """A call that ran, now ended with this outcome."""
    if call.deadline_at is not None:
        call = call._replace(deadline_at=None)
    ended = (status, None, call.attempts, call.started_at, now)
    duration_s = round(outcome.duration_s, 6)
    answer = (outcome.status, duration_s, outcome.size, call.interrupted, outcome.error)
    rest = call[FATE + len(ended) + len(answer) :]
    return NatsCall._make(call[:FATE] + ended + answer + rest)


OWN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def is_own_id(call_id: str) -> bool:
    """Whether this has the form of a call's own id; what has not is not looked up as one."""
    return OWN_ID.fullmatch(call_id) is not None


def id_number(own_id: str) -> int:
    """An id as a number: newer ids have larger ones."""
    return int(own_id.replace("-", ""), 16)


def with_request(parts: Parts, request: Parts) -> Parts:
    """Put the request of one in the place of the request of the other."""
    return Parts(request.headers, request.body, parts.answer_headers, parts.output, parts.stderr)


# --- NATS subjects --------------------------------------------------------------------------------
# -- where everything is

# Messages by their subjects, after nats.prefix, and when they go. TIME are five tokens, QUEUE and
# LANE one each, see `nats_token`.
#
#     work.QUEUE.LANE.TIME.ID   what is to be done for a call, or its callback   acked
#     later.QUEUE.LANE.TIME.ID  the same while it is not due or has not its key  due, handed out
#     call.TIME.QUEUE.LANE.ID   the record of a call that was claimed or ended   after calls.keep
#     key.LANE.HASH             which call has an idempotency key                with its record
#     cid.HASH.ID               a call that has a call id of its caller          with its record
#     slot.QUEUE.NUMBER         a slot of max_inflight_global                    not renewed
#     slot.@key, @line, @rate   who has a key, who waits for it, a next start    passed on, past
#     queue.NAME, sched.NAME    a pause, the state of a schedule                 never
#     news, owner.OWNER         what daemons tell and ask each other             not stored

# A subject has the time in an id as five tokens of so many hex digits. Calls with the same first
# token are of the same 50 days, with the same two of 4.7 hours, then of 65 s, of 4.1 s, of 16 ms.
TIME_DIGITS = (4, 2, 2, 1, 2)


def time_tokens(digits: str) -> Sequence[str]:
    """The first hex digits of a time in milliseconds, as the tokens of a subject.

    The last one is shorter than it has to be where the digits end within it.
    """
    ends = itertools.accumulate(TIME_DIGITS)
    tokens = [digits[end - width : end] for end, width in zip(ends, TIME_DIGITS, strict=True)]
    return [token for token in tokens if token]


class NatsSubjects:
    """The subjects of everything, which begin with `nats.prefix`.

    Those of a call have the time of its id, so that servers can be asked for the newest ones. Calls
    older than `since` have none: they were stored by an earlier version.
    """

    def __init__(self, config: NatsConfig) -> None:
        self._prefix = config.prefix
        self.taken_over = config.stream  # where OpenFaaS's own gateway publishes; not stored
        self.news = f"{config.prefix}.news"  # not stored: what daemons tell each other
        self.since = ""  # the first id that has its time in its subjects

    def begin(self, since: str) -> None:
        """Set `since`, as the stream says it."""
        self.since = since

    @property
    def stored(self) -> Sequence[str]:
        """What the stream has to keep. "timed" has nothing: it makes older versions refuse it."""
        roots = ("work", "later", "call", "key", "cid", "slot", "queue", "sched", "timed")
        return [self.every(root) for root in roots]

    def lane(self, root: str, queue: str, lane: str = "") -> str:
        """All work messages of a lane or queue."""
        tokens = [nats_token(name) for name in (queue, lane) if name]
        return ".".join([self._prefix, root, *tokens, ">"])

    def place(self, root: str, queue: str, lane: str, name: str) -> str:
        """A work message (root "work"), or one that becomes it when it is due ("later").

        `name` begins with the id of its call.
        """
        return f"{self._prefix}.{root}.{nats_token(queue)}.{nats_token(lane)}.{self._timed(name)}"

    def later(self, queue: str, own_id: str) -> str:
        """Where a call of a queue waits until it is due or has its key, whatever its lane."""
        return f"{self._prefix}.later.{nats_token(queue)}.*.{self._timed(own_id)}"

    def deadline(self, root: str, own_id: str) -> str:
        """The message that tells of a call's deadline, before it passes ("later") and then."""
        return self.place(root, DEADLINES, "all", f"{own_id}-deadline")

    def record(self, call: NatsCall) -> str:
        """The subject of a call's record, with its time first: a look-up needs no search."""
        return self.record_at(nats_token(call.queue), nats_token(call.lane), call.id)

    def record_at(self, queue: str, lane: str, own_id: str) -> str:
        """The subject of the record of a call whose other messages have these tokens."""
        if own_id < self.since:
            return f"{self._prefix}.call.{own_id[:8]}.{own_id[9]}.{queue}.{lane}.{own_id}"
        times = self._timed(own_id).removesuffix(own_id)
        return f"{self._prefix}.call.{times}{queue}.{lane}.{own_id}"

    def _timed(self, name: str) -> str:
        """A name that begins with an id, behind the tokens of its time."""
        if name < self.since:
            return name
        return f"{name[:4]}.{name[4:6]}.{name[6:8]}.{name[9]}.{name[10:12]}.{name}"

    def find(self, own_id: str) -> Sequence[str]:
        """Where a call may be of which only the id is known. The first one that exists counts."""
        return (
            self.record_at("*", "*", own_id),
            f"{self._prefix}.later.*.*.{self._timed(own_id)}",
            f"{self._prefix}.work.*.*.{self._timed(own_id)}",
        )

    def timed(self, root: str, times: str, queue: str, lane: str) -> str:
        """All messages of calls with these tokens of time, queue and lane; `*` stands for any."""
        if root == "call":
            return f"{self._prefix}.call.{times}.{queue}.{lane}.*"
        return f"{self._prefix}.{root}.{queue}.{lane}.{times}.*"

    def untimed(self, root: str) -> str:
        """All messages of calls that are older than `since`."""
        return f"{self._prefix}.{root}" + (".*.*.*.*.*" if root == "call" else ".*.*.*")

    def split(self, subject: str) -> tuple[str, str, str, str]:
        """Root, queue, lane and id, as tokens, of the subject of a call's message.

        A subject of somebody else's may have fewer: then queue and lane are "@", which none has.
        """
        root, *tokens = subject[len(self._prefix) + 1 :].split(".")
        if len(tokens) < 3:
            return root, "@", "@", tokens[-1]
        queue, lane = tokens[-3:-1] if root == "call" else tokens[:2]
        return root, queue, lane.removesuffix(nats_token(ASIDE)), tokens[-1]

    def every(self, root: str) -> str:
        """All subjects with this root."""
        return f"{self._prefix}.{root}.>"

    def call_id(self, call_id: str, own_id: str) -> str:
        """The note that a call has this foreign call id."""
        digest = hashlib.blake2b(call_id.encode(), digest_size=16).hexdigest()
        return f"{self._prefix}.cid.{digest}.{own_id}"

    def key(self, call: NatsCall) -> str:
        """The note of an idempotency key."""
        digest = hashlib.blake2b((call.idempotency_key or "").encode(), digest_size=16).hexdigest()
        return f"{self._prefix}.key.{nats_token(call.lane)}.{digest}"

    def notes(self, call: NatsCall) -> Sequence[str]:
        """The notes on a call beside its record."""
        notes = [self.call_id(call.call_id, call.id)] if call.call_id != call.id else []
        return notes if call.idempotency_key is None else [*notes, self.key(call)]

    @property
    def pauses(self) -> str:
        """The notes on all queues that were ever paused."""
        return f"{self._prefix}.queue.*"

    def pause(self, queue: str) -> str:
        """The note on whether a queue is paused."""
        return f"{self._prefix}.queue.{nats_token(queue)}"

    @property
    def schedules(self) -> str:
        """The states of all schedules."""
        return f"{self._prefix}.sched.*"

    def schedule(self, name: str) -> str:
        """The state of a schedule."""
        return f"{self._prefix}.sched.{nats_token(name)}"

    def slot(self, queue: str, number: object) -> str:
        """One of the slots that all daemons share."""
        return f"{self._prefix}.slot.{nats_token(queue)}.{number}"

    def key_holder(self, key: str) -> str:
        """The note on which call has a concurrency key."""
        return self.slot("@key", key)

    def key_line(self, key: str, own_id: str) -> str:
        """The place of a call among those that wait for a concurrency key."""
        return self.slot("@line", f"{key}.{own_id}")

    def owner(self, owner: str) -> str:
        """The subject at which a daemon answers whether it holds a claim."""
        return f"{self._prefix}.owner.{owner}"


# --- NATS wire ------------------------------------------------------------------------------------
# nats-py's client looks after the connection: it connects and subscribes again and answers pings.
# Messages, thousands a second, go past it both ways, as its own way costs three times as much. Of
# its inner parts this needs three: the reader `_ps`, to which it hands what it has read, the number
# `_id` of a subscription, and `_transport`, to which it writes.

PUB_ACK = re.compile(rb'\{"stream":"[^"]*", ?"seq":([0-9]+)\}')  # that says no more than this


class NatsMessage(NamedTuple):
    """A message as it has come."""

    subject: bytes
    reply: bytes  # where it may be answered; or empty
    head: bytes  # its headers as they were sent; or empty
    data: bytes

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers by name; "Status" and "Description" are what the server says by itself."""
        if not self.head:
            return {}
        first, *lines = self.head.decode("utf-8", "replace").split("\r\n")
        headers = {}
        if status := first.removeprefix("NATS/1.0").strip():
            headers["Status"], _, headers["Description"] = status.partition(" ")
        for line in lines:
            name, _, value = line.partition(":")
            headers[name] = value.strip()
        return headers

    @property
    def status(self) -> str:
        """What the server says by itself, as a number; or ""."""
        return self.head[9:12].decode() if self.head.startswith(b"NATS/1.0 ") else ""


class NatsReader:
    """Reads what a server sends. Messages of our own subscriptions are told at once; all else is
    left to the client.
    """

    def __init__(self, client: nats.aio.client.Client) -> None:
        self._client = client
        self._rest = client._ps  # reads all that is no message
        self._heard: dict[bytes, Callable[[NatsMessage], bool]] = {}  # by subscription
        self._chunks: list[bytes] = []  # of what has not come as a whole
        self._missing = 0  # bytes of that, as far as is known
        self.messages = 0  # that have come
        client._ps = cast(Any, self)

    def tell(self, subscription: int, heard: Callable[[NatsMessage], bool]) -> None:
        """Have messages of a subscription told. If `heard` says False, one goes to the client."""
        self._heard[b"%d" % subscription] = heard

    def reset(self) -> None:
        """Forget what has come in part: the connection is another one."""
        self._chunks = []
        self._missing = 0
        self._rest.reset()

    async def parse(self, data: bytes = b"") -> None:
        """Read what has come. Raises what the client takes for a broken connection."""
        self._chunks.append(data)
        self._missing -= len(data)
        if self._missing > 0:
            return
        data = b"".join(self._chunks)
        try:
            end = await self._read(data)
        except (ValueError, IndexError):
            import nats.errors

            raise nats.errors.ProtocolError from None
        self._chunks = [data[end:]] if end < len(data) else []

    async def _read(self, data: bytes) -> int:
        """Read all whole messages; where they end. Raises ValueError, IndexError."""
        start = 0
        while True:
            line_end = data.find(b"\r\n", start)
            if line_end < 0:
                self._missing = 1
                return start
            fields = data[start:line_end].split()
            body = line_end + 2
            if fields[0] == b"MSG":
                head_end = body
            elif fields[0] == b"HMSG":
                head_end = body + int(fields[-2])
                del fields[-2]
            else:
                await self._rest.parse(data[start:body])
                start = body
                continue
            end = body + int(fields[-1])
            if end + 2 > len(data):
                self._missing = end + 2 - len(data)
                return start
            reply = fields[3] if len(fields) > 4 else b""
            message = NatsMessage(fields[1], reply, data[body:head_end], data[head_end:end])
            self.messages += 1
            if not self._is_told(fields[2], message):
                subject, reply, head, payload = message
                await self._client._process_msg(int(fields[2]), subject, reply, payload, head)
            start = end + 2

    def _is_told(self, subscription: bytes, message: NatsMessage) -> bool:
        heard = self._heard.get(subscription)
        try:
            return heard is not None and heard(message)
        except Exception:  # Those that come after it are to be read all the same.
            log.exception("NATS: a message failed in this program itself")
            return True


class NatsWriter:
    """Sends all that is published in one turn of the event loop at once."""

    def __init__(self, client: nats.aio.client.Client) -> None:
        self._client = client
        self._lines: list[bytes] = []

    def publish(self, subject: str, reply: str, head: bytes, payload: bytes) -> None:
        """Publish a message; `head` are its headers as they are sent, or empty."""
        if not self._lines:
            asyncio.get_running_loop().call_soon(self.flush)
        size = len(head) + len(payload)
        if head:
            line = f"HPUB {subject} {reply} {len(head)} {size}\r\n".encode()
        else:
            line = f"PUB {subject} {reply} {size}\r\n".encode()
        self._lines += (line, head, payload, b"\r\n")

    def clear(self) -> None:
        """Drop what was published: there is no connection, and later is too late."""
        self._lines = []

    def flush(self) -> None:
        """Send now what was published."""
        lines = self._lines
        self._lines = []
        if self._client.is_connected:
            # uvloop raises RuntimeError for a connection that has just ended. The reader notices
            # that, too.
            with contextlib.suppress(OSError, RuntimeError):
                cast(Any, self._client._transport).write(b"".join(lines))


def nats_head(headers: Mapping[str, object]) -> bytes:
    """Headers of a message that replaces what its subject had; in a name `_` stands for `-`.

    If its subject has to be empty, it does not say that it replaces: to do that, a server goes
    through all consumers (0.5 to 0.9 ms for 1,000).
    """
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    if headers.get("Nats_Expected_Last_Subject_Sequence") != 0:
        lines.append("Nats-Rollup: sub\r\n")
    return f"NATS/1.0\r\n{''.join(lines)}\r\n".encode()


# -- answers


class NatsRefused(StoreError):
    """The server has answered with an error of this code. Nothing was done."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"NATS: {text}")
        self.code = code


class NatsChanged(NatsRefused):
    """A subject has another last sequence than was expected: somebody else was first."""


SILENT_S = 2.0  # that servers may take to say anything while they owe an answer


class Awaited(NamedTuple):
    """One answer that somebody waits for (`many` is None), or all up to the one that ends them."""

    future: asyncio.Future[NatsMessage]
    many: list[NatsMessage] | None
    until: float  # by the event loop's clock
    wait_s: float  # how long it waits in all


class NatsAnswers:
    """Answers to requests: all come to one inbox, each to a number of its own.

    Thousands a second come in time, so all of them share one timer of the event loop.
    """

    def __init__(self) -> None:
        self.inbox = f"_INBOX.{new_id()}."  # the number follows
        self._awaited: dict[int, Awaited] = {}  # by number
        self._count = 0
        self._owed_since: float | None = None  # the first request since an answer has come
        self._timer: asyncio.TimerHandle | None = None
        self._look_at = float("inf")  # when it goes off

    @property
    def silence(self) -> str | None:
        """For how long servers have said nothing at all though they owe an answer: they hang, or
        the way to them does. None: they don't.
        """
        now = asyncio.get_running_loop().time()
        owed_s = 0.0 if self._owed_since is None else now - self._owed_since
        return None if owed_s < SILENT_S else f"NATS has not answered for {owed_s:.0f} s"

    def expect(
        self, many: list[NatsMessage] | None, timeout_s: float
    ) -> tuple[int, asyncio.Future[NatsMessage]]:
        """Expect an answer to a request that has this number. Awaiting it raises StoreError."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        now = loop.time()
        until = now + timeout_s
        if self._owed_since is None:
            self._owed_since = now
        self._count += 1
        self._awaited[self._count] = Awaited(future, many, until, timeout_s)
        if until < self._look_at:
            self._look_then(until)
        return self._count, future

    def forget(self, number: int) -> None:
        """Expect no answer: the request was not sent."""
        del self._awaited[number]
        if not self._awaited:
            self._owed_since = None

    def heard(self, message: NatsMessage) -> bool:
        """Take an answer that has come."""
        self._owed_since = None
        number = int(message.subject[len(self.inbox) :])
        awaited = self._awaited.get(number)
        if awaited is None:
            return True
        if awaited.many is not None and not message.status:
            awaited.many.append(message)
            return True
        del self._awaited[number]
        if not awaited.future.done():
            awaited.future.set_result(message)
        return True

    def _look_then(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._look_at = when
        self._timer = asyncio.get_running_loop().call_at(when, self._look)

    def _look(self) -> None:
        """Fail what has waited too long. If this is late, answers get some time, as in Timer."""
        now = asyncio.get_running_loop().time()
        late_s = now - self._look_at
        self._look_at = float("inf")
        if late_s > LATE_S:
            self._look_then(now + min(late_s, MAX_GRACE_S))
            return
        over = [number for number, awaited in self._awaited.items() if awaited.until <= now]
        for number in over:
            self._fail(number, f"NATS has not answered within {self._awaited[number].wait_s:g} s")
        if self._awaited:
            self._look_then(min(awaited.until for awaited in self._awaited.values()))

    def _fail(self, number: int, reason: str) -> None:
        future = self._awaited.pop(number).future
        if not future.done():
            future.set_exception(StoreError(reason))

    def break_off(self) -> None:
        """Fail all: the connection is gone."""
        self._owed_since = None
        for number in list(self._awaited):
            self._fail(number, "the connection to NATS was lost")


def plain_nats_error(exc: Exception) -> str:
    """What the client or the server says of a failed connection, in plain words."""
    text = str(exc).removeprefix("nats: ").strip("'")
    if isinstance(exc, TimeoutError) and text in ("", "timeout"):
        return f"it has not answered within {NATS_CONNECT_S} s"
    return re.sub(r"^\[SSL: \w+\] |\.? \(_ssl\.c:\d+\)$", "", text) or type(exc).__name__


def login_keys(config: NatsConfig) -> str:
    """The keys of the configuration that our login comes from."""
    if config.creds_file:
        return "nats.creds_file"
    if config.token_file:
        return "nats.token_file"
    if config.user_file:
        return "nats.user_file and nats.password_file"
    if any("@" in server for server in config.servers):
        return "the credentials in nats.servers"
    return "nats.user_file and nats.password_file, nats.token_file or nats.creds_file: none is set"


class NatsClock:
    """The servers' clock, which decides about delays and deadlines.

    Between answers it is kept by the time since boot: our own clock may be set at any moment.
    """

    def __init__(self) -> None:
        self._booted_at: float | None = None  # when this machine was, by the servers' clock
        self._told_s = 0.0  # the offset that was told last

    def hear(self, answer: Mapping[str, Any]) -> None:
        """Set it by an answer that says the time."""
        if shown := answer.get("ts"):
            self._booted_at = datetime.fromisoformat(shown).timestamp() - uptime_s()
            self._tell(self.offset_s)

    def _tell(self, offset_s: float) -> None:
        """Log that the clocks differ, and again when they do by other than a little more or less.

        Nobody here knows which is wrong.
        """
        if abs(offset_s - self._told_s) < 2 * CLOCKS_DIFFER_S:
            return
        self._told_s = offset_s
        if offset_s:
            where = "behind" if offset_s > 0 else "ahead of"
            by = timedelta(seconds=round(abs(offset_s)))
            text = "if it is wrong, so are times that it reads, as in X-Not-Before (timedatectl)"
            log.warning("NATS: this host's clock is %s %s the servers': %s", by, where, text)

    @property
    def offset_s(self) -> float:
        """By how much it is ahead of ours; 0: they agree well enough."""
        if self._booted_at is None:
            return 0.0
        offset_s = self._booted_at + uptime_s() - time.time()
        return offset_s if abs(offset_s) > CLOCKS_DIFFER_S else 0.0

    def now(self) -> float:
        """What it shows (Unix time)."""
        return time.time() + self.offset_s


# -- tasks that use the client


async def cancel_all(tasks: Iterable[asyncio.Task[None]]) -> None:
    """End tasks that use nats-py's client: cancel them until they have ended.

    A cancellation may get lost, in the client while its login is refused, and in wait_for of Python
    3.11, on which it is built.
    """
    going_on = {task for task in tasks if not task.done()}
    while going_on:
        for task in going_on:
            task.cancel()
        _, going_on = await asyncio.wait(going_on, timeout=POLL_S)


async def finish_within(wait_s: float, work: Coroutine[Any, Any, None]) -> None:
    """Wait for work with nats-py's client. Raises TimeoutError, and what the work raises."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task}, timeout=wait_s)
    finally:
        ended_in_time = task.done()
        await cancel_all([task])
    if not ended_in_time:
        raise TimeoutError(f"no server has answered within {wait_s:g} s")
    await task


# --- NATS connection ------------------------------------------------------------------------------
# -- connection


# It tries servers until one answers, and keeps nothing to be sent later.
NATS_OPTIONS: Mapping[str, Any] = {
    "connect_timeout": NATS_CONNECT_S,
    "reconnect_time_wait": 0.2,
    "max_reconnect_attempts": -1,
    "ping_interval": 10,
    "no_echo": True,
    "pending_size": -1,
}


TLS_KEYS = {  # by what is said of TLS that fails
    "certificate required": "nats.tls_cert_file and nats.tls_key_file",
    "bad certificate": "nats.tls_cert_file and nats.tls_key_file",
    "unknown ca": "nats.tls_cert_file and nats.tls_key_file",
    "mismatch": "nats.servers: the server's certificate is for other names",
    "certificate verify failed": "nats.tls_ca_file",
}


class NatsTrouble:
    """Why there is no connection, as the client or the servers said last."""

    def __init__(self, config: NatsConfig) -> None:
        self._config = config
        self.text: str | None = None
        self._refused: list[str] = []  # logins and TLS, as was told since there was a connection

    def note(self, exc: Exception, server: str) -> None:
        """A connection has failed. A refused login or TLS is logged once, with where to look."""
        if self.text and isinstance(exc, TimeoutError):  # A time that is over says less.
            return
        text = plain_nats_error(exc)
        place = server.rpartition("@")[2]
        refusal = None
        if re.search("authori[sz]ation|authentication", text, re.IGNORECASE):
            refusal = f"{place} refuses our login ({text}): look at {login_keys(self._config)}"
        for words, keys in TLS_KEYS.items():
            if words in text:
                refusal = refusal or f"no TLS with {place} ({text}): look at {keys}"
        if refusal:
            text = refusal
            if text not in self._refused:
                log.error("NATS: %s", text)
                self._refused.append(text)
        log.debug("NATS: %s", text)
        self.text = text

    def over(self) -> None:
        """Forget the trouble: there is a connection."""
        self.text = None
        self._refused.clear()

    @property
    def reason(self) -> str | None:
        """The last refusal of a login, as others may have been tried since; else what came last."""
        return self._refused[-1] if self._refused else self.text

    def why(self) -> str:
        """Why no connection could be made."""
        servers = show_urls(self._config.servers)
        if self._refused:
            return f"NATS: {self.reason}"
        return f"NATS at {servers} can't be reached: {self.text}"


class NatsRoom:
    """Whether messages can be stored: a line when one can't, and when one can be again.

    It is `full` once servers have no room for more, until NatsReserve has found some. It is `spent`
    once the reserve for the end of calls is used up, too: what is left is for callbacks.
    """

    def __init__(self, away: Callable[[], str | None]) -> None:
        self.failure: str | None = None  # why the last message could not be stored
        self.unfit: str | None = None  # why what is stored might not be kept: nothing is
        self.full = asyncio.Event()
        self.spent = False
        self.refusals = 0  # messages for which there was no room
        self.most_bytes = math.inf  # of the stream, with which there was no room
        self._away = away

    def note(self, exc: StoreError) -> None:
        """A message could not be stored."""
        if isinstance(exc, NatsChanged):  # Somebody else was first: that is no trouble.
            return
        if isinstance(exc, NatsRefused) and exc.code in FULL:
            self.refusals += 1
            self.fill(str(exc))
            return
        if self.failure is None and not self._away():
            log.error("NATS stores no messages: %s", exc)
        self.failure = str(exc)

    def judge(self, unfit: str | None) -> None:
        """Store nothing for this reason; None: store again."""
        self.unfit = unfit

    def fill(self, failure: str) -> None:
        """Note that there is no room, as this daemon or another one has found."""
        if not self.full.is_set():
            log.error(
                "NATS has no room for more calls, only for the end of those there are: %s", failure
            )
        self.failure = failure
        self.full.set()

    def spend(self, spent: bool) -> None:
        """Note whether what is left is for callbacks only."""
        if spent and not self.spent:
            log.warning("NATS has hardly any room: answers that are there are called back first")
        self.spent = spent

    def measure(self, used: int) -> None:
        """Note that there was no room with so many bytes in the stream: the least is its limit."""
        self.most_bytes = min(self.most_bytes, used)

    def empty(self) -> None:
        """Note that there is room again."""
        self.full.clear()
        self.spent = False
        self.most_bytes = math.inf
        self._stored()

    def require(self) -> None:
        """Raise StoreError if there is room only for the end of calls, not for new ones."""
        if self.full.is_set():
            raise StoreError(f"{self.failure}: no room for more calls; those that are there go on")

    def require_bytes(self, number: int, used: int) -> None:
        """Raise StoreError if so many bytes more would leave too few for callbacks."""
        if used + number + PROBE_BYTES > self.most_bytes:
            raise StoreError(f"{self.failure}: other answers have to be called back first")

    async def stored(self, answer: Awaitable[NatsMessage]) -> int:
        """The sequence of a message that is being stored. Raises NatsRefused, StoreError."""
        try:
            seq = stored_seq(await answer)
        except StoreError as exc:
            self.note(exc)
            raise
        if self.failure is not None and not self.full.is_set():
            self._stored()
        return seq

    def _stored(self) -> None:
        log.info("NATS stores messages again")
        self.failure = None


class NatsLink:
    """The connection. A request ends with an answer, or with StoreError within publish_timeout.

    Nothing is kept to be sent later. A request whose answer got lost may have been done.
    """

    def __init__(self, config: NatsConfig) -> None:
        self._config = config
        self._client: nats.aio.client.Client | None = None  # until it is closed
        self._reader: NatsReader  # these, of the client
        self._writer: NatsWriter
        self._answers = NatsAnswers()
        self.clock = NatsClock()
        self.room = NatsRoom(lambda: self.away)
        self._trouble = NatsTrouble(config)
        self._since = float("inf")  # monotonic; since when there is a connection

    async def open(self, reconnected: Callable[[], Awaitable[None]]) -> None:
        """Connect. Raises StoreError."""
        import nats.aio.client

        client = nats.aio.client.Client()
        self._reader = NatsReader(client)
        self._writer = NatsWriter(client)

        async def report(exc: Exception) -> None:
            server = client._current_server
            self._trouble.note(exc, server.uri.netloc if server else "")
            read_certificates_again(client, self._config)

        async def lost() -> None:
            if self._client is client:  # else we have closed it, or never had it
                log.warning("NATS is away: %s", self._trouble.text or "the connection was lost")
            self._writer.clear()
            self._answers.break_off()

        async def again() -> None:
            log.info("NATS is back: connected to %s", self.server)
            self._since = time.monotonic()
            self._trouble.over()
            await reconnected()

        connecting = client.connect(
            servers=list(self._config.servers),
            name=f"{USER_AGENT} {socket.gethostname()}",
            error_cb=report,
            disconnected_cb=lost,
            reconnected_cb=again,
            **NATS_OPTIONS,
            **nats_login(self._config),
        )
        try:
            await finish_within(self._config.publish_timeout, connecting)
            self._client = client
            await self.subscribe(f"{self._answers.inbox}*", first=self._answers.heard)
            self._since = time.monotonic()
            self._trouble.over()
        except (OSError, TimeoutError, nats.errors.Error) as exc:
            self._trouble.note(exc, "")
            raise StoreError(self._trouble.why()) from None

    async def close(self) -> None:
        """Send what was begun, and end the connection."""
        client, self._client = self._client, None
        self._answers.break_off()
        if client is not None:
            self._writer.flush()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await client.close()

    @property
    def ended(self) -> bool:
        """Whether there will be no connection unless it is opened again."""
        return self._client is None or self._client.is_closed

    @property
    def away(self) -> str | None:
        """Why there is no connection now."""
        if self._client is not None and self._client.is_connected:
            return None
        return f"NATS is away: {self._trouble.reason or 'it can not be reached'}"

    @property
    def silent(self) -> str | None:
        """Why it makes no sense to ask now: no connection, or one on which servers say nothing."""
        return self.away or self._answers.silence

    @property
    def messages(self) -> int:
        """How many messages have come on this connection."""
        return self._reader.messages

    @property
    def age_s(self) -> float:
        """For how long there has been a connection."""
        return time.monotonic() - self._since

    @property
    def _open_client(self) -> nats.aio.client.Client:
        """The client. Raises StoreError before there is one."""
        if self._client is None:
            raise StoreError("NATS is away")
        return self._client

    @property
    def server(self) -> str:
        """The address of the one that we are connected to."""
        url = self._open_client.connected_url
        return url.netloc.rpartition("@")[2] if url else "nobody"

    @property
    def info(self) -> Mapping[str, Any]:
        """What the server has said of itself."""
        return cast(Mapping[str, Any], self._open_client._server_info)

    @property
    def max_payload(self) -> int:
        """Bytes that the server takes in one message, without those for our headers."""
        return int(self._open_client.max_payload) - KIB

    async def subscribe(
        self,
        subject: str,
        heard: Callable[[nats.aio.msg.Msg], Awaitable[None]] | None = None,
        group: str = "",
        first: Callable[[NatsMessage], bool] | None = None,
    ) -> None:
        """Have messages told, one after the other. In a `group`, each goes to one daemon only.

        `first` is told of each as it comes, and must not wait for anything; if it says False,
        `heard` is told, too. Once this returns, the server knows of it.
        """
        client = self._open_client
        made = await client.subscribe(subject, group, cb=heard, pending_bytes_limit=-1)
        if first is not None:
            self._reader.tell(made._id, first)
        await client.flush()

    def send(self, subject: str, payload: bytes = b"", reply: str = "", head: bytes = b"") -> None:
        """Publish, with no answer; `head` as of `nats_head`. Raises StoreError."""
        client = self._open_client
        if not client.is_connected:
            raise StoreError(self.away or "NATS is away")
        if len(payload) > client.max_payload:
            raise StoreError("the NATS server takes no message of this size")
        self._writer.publish(subject, reply, head, payload)

    def request(
        self,
        subject: str,
        payload: bytes = b"",
        head: bytes = b"",
        timeout_s: float | None = None,
        many: list[NatsMessage] | None = None,
    ) -> asyncio.Future[NatsMessage]:
        """Publish now. The answer, or the last of `many`, is awaited. Both may raise StoreError."""
        number, answer = self._answers.expect(many, timeout_s or self._config.publish_timeout)
        try:
            self.send(subject, payload, f"{self._answers.inbox}{number}", head)
        except StoreError:
            self._answers.forget(number)
            raise
        return answer

    async def gather(self, subject: str, payload: bytes) -> list[NatsMessage]:
        """Publish, and wait for all answers. NatsRefused: TOO_MANY, or nobody answers."""
        many: list[NatsMessage] = []
        end = await self.request(subject, payload, many=many)
        if end.status not in NO_MORE:
            reason = end.headers.get("Description") or "nobody answers for the stream"
            raise NatsRefused(int(end.status), f"messages can't be read: {reason}")
        return many

    async def api(self, verb: str, body: object = None) -> dict[str, Any]:
        """A request of JetStream's API, and its answer. Raises NatsRefused, StoreError."""
        payload = b"" if body is None else json.dumps(body).encode()
        answer = nats_answer(await self.request(f"$JS.API.{verb}", payload))
        self.clock.hear(answer)
        return answer

    def publish(
        self, subject: str, payload: bytes, **headers: object
    ) -> Coroutine[object, None, int]:
        """Send a message to be stored, and return what awaits its sequence.

        The sequence is 0 if one with this Nats-Msg-Id was stored before. The message replaces what
        its subject had, unless that has to be nothing. No limit of the stream does that: what it
        deletes may come back when a server is killed, after its successor is gone (seen with 2.15).
        Raises NatsRefused, StoreError.
        """
        try:
            head = nats_head(headers)
            if self.room.unfit:
                raise StoreError(self.room.unfit)
            return self.room.stored(self.request(subject, payload, head))
        except StoreError as exc:
            self.room.note(exc)
            raise


async def store_over(
    link: NatsLink, subject: str, payload: bytes, seq: int, **headers: object
) -> int:
    """Store a message over the one with this sequence; over none: 0.

    Its own sequence; 0, and nothing done: somebody else was first. Raises NatsRefused, StoreError.
    """
    expected = {"Nats_Expected_Last_Subject_Sequence": seq}
    try:
        return await link.publish(subject, payload, **expected, **headers)
    except NatsChanged:
        return 0


def stored_seq(message: NatsMessage) -> int:
    """The sequence in the server's answer to what was stored; 0: it was stored before.

    Raises NatsRefused, StoreError.
    """
    if ack := PUB_ACK.fullmatch(message.data):
        return int(ack[1])
    answer = nats_answer(message)
    return 0 if answer.get("duplicate") else int(answer["seq"])


def nats_answer(message: NatsMessage) -> dict[str, Any]:
    """The answer of JetStream's API. Raises NatsRefused, StoreError."""
    if message.status == "503":
        raise NatsRefused(0, "nobody answers: is JetStream on, and has the stream a leader?")
    answer = dict(json.loads(message.data))
    if error := answer.get("error"):
        code = error.get("err_code", 0)
        kind = NatsChanged if code in WRONG_SEQUENCE else NatsRefused
        raise kind(code, error.get("description", "an error"))
    return answer


def nats_credentials(name: str) -> str:
    """The path of a file with a user's JWT and seed, as nsc makes it. Raises ConfigError.

    In a file that lacks one of them, the client would search for ever.
    """
    path = os.path.expandvars(name)
    trouble = None
    try:
        content = lasting_file(name)
        if b"BEGIN NATS USER JWT" not in content or b"BEGIN USER NKEY SEED" not in content:
            trouble = f"{path} has not both a NATS USER JWT and a USER NKEY SEED"
    except ValueError as exc:
        trouble = str(exc)
    if importlib.util.find_spec("nkeys") is None:
        trouble = "it takes the package nkeys: pip install 'faasd-async[nats-creds]'"
    if trouble:
        raise ConfigError([f"nats.creds_file: {trouble}"])
    return path


def nats_login(config: NatsConfig) -> dict[str, Any]:
    """The client's options for login and TLS. Secrets are read anew for each connection.

    Raises StoreError, ConfigError.
    """
    login: dict[str, Any] = {}
    if config.user_file and config.password_file:
        login = {"user": config.user_file.now, "password": config.password_file.now}
    if config.token_file:
        login["token"] = config.token_file.now
    if config.creds_file:
        login["user_credentials"] = nats_credentials(config.creds_file)
    try:
        tls = config.tls
    except OSError as exc:  # They were right when the configuration was read.
        raise StoreError(f"[nats] tls files: {exc.strerror or exc}") from None
    if tls is None and any(server.startswith("tls:") for server in config.servers):
        tls = ssl.create_default_context()
    return login if tls is None else {**login, "tls": tls}


def read_certificates_again(client: nats.aio.client.Client, config: NatsConfig) -> None:
    """Have the next connection use the certificates that the files hold now, if these are valid."""
    with contextlib.suppress(StoreError, ConfigError):
        if tls := nats_login(config).get("tls"):
            client.options["tls"] = tls


# --- NATS stream ----------------------------------------------------------------------------------

TIMED_SINCE = "faasd-async-timed-since"  # in the stream's metadata; empty: from its beginning
UPGRADE_S = 60  # that a host may take to bring a stream up to date


def stream_config(config: NatsConfig) -> dict[str, Any]:
    """The settings of the stream."""
    return {
        "name": config.stream,
        "subjects": list(NatsSubjects(config).stored),
        "retention": "workqueue",
        "storage": "file",
        "discard": "old",
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "max_msg_size": -1,
        "max_msgs_per_subject": -1,
        "num_replicas": config.replicas,
        "allow_msg_ttl": True,
        "allow_msg_schedules": True,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "no_ack": False,
        "deny_delete": False,
        "max_consumers": MANY_CONSUMERS,
        "metadata": {TIMED_SINCE: ""},
    }


# What must not be set. It would acknowledge messages before they are stored, move them to other
# subjects, or limit what consumers may do.
STREAM_UNSET = ("persist_mode", "subject_transform", "consumer_limits")


# The options of `nats stream edit`. Servers let no other setting be changed.
STREAM_FLAGS = {
    "subjects": "--subjects",
    "discard": "--discard",
    "max_msgs": "--max-msgs",
    "max_bytes": "--max-bytes",
    "max_age": "--max-age",
    "max_msg_size": "--max-msg-size",
    "max_msgs_per_subject": "--max-msgs-per-subject",
    "num_replicas": "--replicas",
    "allow_msg_ttl": "--allow-msg-ttl",
    "allow_msg_schedules": "--allow-schedules",
    "allow_rollup_hdrs": "--allow-rollup",
    "allow_direct": "--allow-direct",
    "no_ack": "--ack",
    "subject_transform": "--interactive",
    "consumer_limits": "--interactive",
}


def differing(has: Mapping[str, Any], wants: Mapping[str, Any]) -> list[str]:
    """Names of settings that are not as wanted. What a server leaves out is not set."""
    return [name for name, value in wants.items() if (has.get(name) or None) != (value or None)]


def required(value: object) -> str:
    """What a setting has to be, in words."""
    return "none" if value is None else json.dumps(value)


def stream_difference(config: NatsConfig, name: str, has: object, wants: object) -> str:
    """What the server has, what is wanted, and how to make them agree."""
    finding = f"stream {config.stream} on the server has {name} = {json.dumps(has)}"
    wanted = required(wants)
    if name not in STREAM_FLAGS:
        how = "name another stream, as no server changes that"
        return f"nats.stream: {finding}, the queue needs {wanted}: {how}"
    value = ",".join(wants) if isinstance(wants, list) else str(wants or -1)
    edit = f"nats stream edit {config.stream} {STREAM_FLAGS[name]}"
    edit += "" if wants is None or isinstance(wants, bool) else f"={value}"
    if name == "num_replicas":
        how = f"set nats.replicas = {has}, or change the stream: {edit}"
        return f"nats.replicas: {finding}, the configuration says {wanted}: {how}"
    return f"nats.stream: {finding}, the queue needs {wanted}: name another, or change it: {edit}"


async def make_stream(link: NatsLink, config: NatsConfig) -> dict[str, Any]:
    """Make the stream; its configuration. Raises StoreError, ConfigError."""
    try:
        answer = await link.api(f"STREAM.CREATE.{config.stream}", stream_config(config))
    except NatsRefused as exc:
        if exc.code == NO_REPLICAS:
            raise ConfigError([f"nats.replicas: {exc}"]) from None
        raise
    log.info("NATS: stream %s was made", config.stream)
    return dict(answer["config"])


async def upgrade_stream(link: NatsLink, config: NatsConfig) -> dict[str, Any]:
    """Add to a stream what an older version of this program did not give it; its configuration.

    Of several hosts one does it. Raises StoreError, in the others so that they try again.
    """
    lock = NatsSubjects(config).slot("@upgrade", 0)
    if not await store_over(link, lock, b"", 0, Nats_TTL=f"{UPGRADE_S}s"):
        raise StoreError(f"another host brings stream {config.stream} up to date")
    there = (await link.api(f"STREAM.INFO.{config.stream}"))["config"]
    since = uuid7(time.time_ns() // 1_000_000, 0, 0)
    there["metadata"] = {TIMED_SINCE: since, **there.get("metadata", {})}
    there["subjects"] = list(NatsSubjects(config).stored)
    there = (await link.api(f"STREAM.UPDATE.{config.stream}", there))["config"]
    log.info("NATS: stream %s has been brought up to date", config.stream)
    return dict(there)


async def ensure_stream(link: NatsLink, config: NatsConfig) -> str:
    """Make the stream, or check the one that is there. What NatsSubjects.begin is to be told.

    Its settings are not changed; what it lacks, as older versions made it, is added.
    Raises StoreError, ConfigError.
    """
    # A server of a cluster may leave JetStream to others.
    if not (link.info.get("jetstream") or link.info.get("cluster")):
        raise ConfigError(["nats.servers: the server has no JetStream"])
    version = link.info["version"]
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < NATS_REQUIRED:
        raise ConfigError([f"nats: the server is {version}: the queue needs 2.12 or later"])
    wanted = stream_config(config)
    try:
        there = (await link.api(f"STREAM.INFO.{config.stream}"))["config"]
    except NatsRefused as exc:
        if exc.code not in NOT_THERE:
            raise
        there = await make_stream(link, config)
    wanted.pop("metadata")
    wanted |= dict.fromkeys(STREAM_UNSET)
    is_older = set(there.get("subjects", ())) < set(wanted["subjects"])
    there["subjects"] = sorted(wanted["subjects"] if is_older else there.get("subjects", ()))
    wanted["subjects"] = sorted(wanted["subjects"])
    has, most = there.get("max_consumers"), wanted.pop("max_consumers")
    if has != most:  # A server does not let it be changed.
        text = (
            "was made with max_consumers = %s, not %d: few functions and callback hosts fit into it"
        )
        log.warning(f"NATS: stream %s {text}", config.stream, has, most)
    if differences := [
        stream_difference(config, name, there.get(name), wanted[name])
        for name in differing(there, wanted)
    ]:
        link.room.judge(differences[0])
        raise ConfigError(differences)
    link.room.judge(None)
    if is_older or TIMED_SINCE not in there.get("metadata", {}):
        there = await upgrade_stream(link, config)
    return str(there["metadata"][TIMED_SINCE])


async def sync_promise(link: NatsLink, config: NatsConfig) -> tuple[bool, str]:
    """Whether accepted calls survive a power cut, as far as can be known, and why.

    Servers tell only the system account.
    """
    interval = None
    with contextlib.suppress(StoreError, ValueError, KeyError):
        body = json.dumps({"config": True}).encode()
        message = await link.request("$SYS.REQ.SERVER.PING.JSZ", body, timeout_s=1.0)
        server = json.loads(message.data)["data"]["config"]
        interval = 0.0 if server.get("sync_always") else server["sync_interval"] / 1e9
    if interval == 0.0:
        return True, "sync_interval is always: a call is on disk when it is accepted"
    if config.replicas > 1:
        return True, f"{config.replicas} servers have a call when it is accepted"
    if interval is None:
        known = "whether the server syncs always is not told to this account"
    else:
        known = f"the server syncs every {interval:.0f} s"
    return False, f"{known}: a power cut may lose calls that were accepted on its one replica"


async def check_promise(link: NatsLink, config: NatsConfig) -> str | None:
    """What servers do not promise, for people; None: they promise everything.

    Raises ConfigError if nats.require_sync asks for what they do not promise.
    """
    safe, why = await sync_promise(link, config)
    if not safe and config.require_sync:
        raise ConfigError([f"nats.require_sync: {why}"])
    log.log(logging.INFO if safe else logging.WARNING, "NATS: %s", why)
    return None if safe else why


# --- NATS lanes -----------------------------------------------------------------------------------


def lease_s(config: Config, queue: str) -> float:
    """The lease: how long a claim of a queue is valid unless it is renewed.

    That of callbacks and deadlines is the shortest of all queues.
    """
    if queue in (CALLBACKS, DEADLINES):
        return min(
            [each.ack_wait for each in config.queues.values()], default=config.queue("").ack_wait
        )
    return config.queue(queue).ack_wait


class NatsPull:
    """A request to a consumer for the messages that it has now."""

    def __init__(self, number: str, left: int) -> None:
        self.number = number  # by which its end is recognized
        self.left = left  # messages that may still arrive
        self.over = asyncio.Event()  # none will


class NatsInbox:
    """What the consumer of a lane was asked for, and what it has sent us."""

    def __init__(self) -> None:
        self.buffer: deque[Delivery] = deque()  # sent to us, and not claimed yet
        self._parked: str | None = None  # the number of a pull that waits for one message
        self._pull: NatsPull | None = None  # one that a claim waits for
        self._arrived = asyncio.Event()  # a message has
        self._awaited = False  # whether a claim waits for that
        # Sequences in the stream.
        self._newest = 0  # the last that was sent to us
        self._expected = 0  # the last that we have stored ourselves

    @property
    def parked(self) -> bool:
        """Whether the server sends us the next message by itself."""
        return self._parked is not None

    @property
    def pulling(self) -> bool:
        """Whether a claim waits for messages."""
        return self._awaited or self._pull is not None

    @property
    def late(self) -> bool:
        """Whether a message that we have stored was not sent to us, perhaps to somebody else."""
        return self._expected > self._newest

    def park(self, number: str) -> None:
        """Note that the next message will be sent to us."""
        self._parked = number

    def unpark(self) -> None:
        """Note that it will not, unless the server is asked again."""
        self._parked = None

    def pull(self, number: str, count: int) -> NatsPull:
        """Note that up to this many messages will arrive at once."""
        self._pull = NatsPull(number, count)
        return self._pull

    def arrive(self, delivery: Delivery) -> None:
        """Take a message that the server has sent."""
        self.buffer.append(delivery)
        self._newest = max(self._newest, delivery.seq)
        self._arrived.set()
        if self.parked:  # That was asked for before a pull was, and is served first.
            self.unpark()
        elif self._pull is not None:
            self._pull.left -= 1
            if not self._pull.left:
                self._end_pull()

    def end(self, number: str) -> bool:
        """Note that the server sends no more for a pull. Whether it is one that a claim waits for:
        then the server had no more.
        """
        if number == self._parked:
            self.unpark()
        elif self._pull is not None and number == self._pull.number:
            self._end_pull()
            return True
        return False

    def _end_pull(self) -> None:
        if self._pull is not None:
            self._pull.over.set()
            self._pull = None

    def lose(self) -> None:
        """Forget what was sent to us: the connection is another one."""
        self.unpark()
        self.buffer.clear()
        self._end_pull()

    def expect(self, seq: int) -> bool:
        """We have stored a message: whether it still has to be sent to somebody."""
        self._expected = max(self._expected, seq)
        return seq > self._newest

    async def arrival(self) -> None:
        """Wait a moment for a message that is late."""
        self._arrived.clear()
        self._awaited = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NATS_LATE_S):
                await self._arrived.wait()
        self._awaited = False
        if not self._arrived.is_set():
            self._expected = 0

    def take(self, number: int) -> list[Delivery]:
        """Up to so many messages, which are claimed now or given back."""
        return [self.buffer.popleft() for _ in range(min(number, len(self.buffer)))]

    def drop(self, own_id: str) -> None:
        """Drop a message that is not to be claimed any more."""
        for delivery in self.buffer:
            if delivery.id == own_id:
                self.buffer.remove(delivery)
                return


class NatsGivenBack:
    """Messages of a lane that we have given back, by sequence, until they are seen again."""

    def __init__(self) -> None:
        self.waiting: set[int] = set()  # those that nobody has, as far as is known
        self._since: dict[int, float] = {}  # when (monotonic), of all of them; the oldest first

    def add(self, seq: int) -> None:
        """Note one. Of very many, the first are with somebody by now."""
        self.discard(seq)
        self.waiting.add(seq)
        self._since[seq] = time.monotonic()
        if len(self._since) > MANY_GIVEN_BACK:
            self.discard(next(iter(self._since)))

    def discard(self, seq: int) -> None:
        """Note that one was seen again, if it was given back."""
        self.waiting.discard(seq)
        self._since.pop(seq, None)

    def clear(self) -> None:
        """Note that somebody has them all."""
        self.waiting.clear()
        self._since.clear()

    def pop_overdue(self) -> list[int]:
        """Those that somebody should have been sent by now. Each is told once."""
        before = time.monotonic() - POLL_S
        overdue = [seq for seq, when in self._since.items() if when < before]
        for seq in overdue:
            self.discard(seq)
        return overdue


class NatsLane:
    """One lane: what its consumer on the server has, and what that has sent us already."""

    def __init__(self, queue: str, name: str, consumer: str) -> None:
        self.queue = queue
        self.name = name
        self.consumer = consumer
        self.inbox = NatsInbox()
        self.given_back = NatsGivenBack()
        # Numbers of messages, as the server said last.
        self.pending = 0  # not sent to anybody yet
        self.later = 0  # not due yet
        self.aside = 0  # waiting for keys that others have
        self.unacked = 0  # sent to somebody; that includes those in the inbox
        self._sent = 0  # the last sequence that was sent to anybody
        self._is_asked = False  # whether somebody's pull waits at the server
        self._hangs = False  # whether one waited, and got nothing of what there was

    @property
    def waiting(self) -> int:
        """Calls that nobody has claimed."""
        here = len(self.inbox.buffer) + len(self.given_back.waiting)
        return self.pending + self.later + self.aside + here

    @property
    def running(self) -> int:
        """Calls that somebody has claimed, as the server said last."""
        return max(0, self.unacked - len(self.inbox.buffer) - len(self.given_back.waiting))

    @property
    def promising(self) -> bool:
        """Whether there is something to claim."""
        return bool(self.inbox.buffer or self.pending or self.given_back.waiting)

    @property
    def first_seq(self) -> int:
        """The first sequence that may be a message which nobody has."""
        return min(self.given_back.waiting, default=self._sent + 1)

    def arrive(self, delivery: Delivery) -> bool:
        """Take a message that the server has sent. Whether a claim waits for it."""
        pulling = self.inbox.pulling
        self.inbox.arrive(delivery)
        self.given_back.discard(delivery.seq)
        self.pending = delivery.pending
        return pulling

    def end_pull(self, number: str) -> None:
        """Note that the server sends no more for a pull."""
        if self.inbox.end(number):
            self.pending = 0
            self.given_back.waiting.clear()

    def expect(self, seq: int) -> bool:
        """We have stored a message: whether it still has to be sent to somebody."""
        expected = self.inbox.expect(seq)
        self.pending += expected
        return expected

    def forgotten(self) -> list[int]:
        """The sequences of messages that were given back and that the server sends to nobody,
        though somebody asks for more. Each is told once.

        A server may forget a NAK that it has acknowledged (seen with 2.15.1, after a kill and with
        no fault at all, one in some hundred).
        """
        return self.given_back.pop_overdue() if self._is_asked and not self.pending else []

    def count(self, info: Mapping[str, Any]) -> None:
        """Take over what the server has said of the lane's consumer."""
        self.pending = info["num_pending"]
        self.unacked = info["num_ack_pending"]
        sent = info["delivered"]["stream_seq"]
        self._is_asked = info["num_waiting"] > 0
        hangs = self._is_asked and self.pending > 0 and sent == self._sent
        if hangs and self._hangs:  # A consumer that was paused serves nobody but who asks anew.
            self.inbox.unpark()
        self._hangs = hangs
        self._sent = sent
        # What has come since the server said this is not among them.
        here = sum(delivery.seq <= sent for delivery in self.inbox.buffer)
        if self.unacked <= here:
            self.given_back.clear()

    def count_later(self, number: int) -> None:
        """Take over how many messages are not due yet."""
        self.later = number

    def count_aside(self, number: int) -> None:
        """Take over how many messages wait for keys."""
        self.aside = number


class NatsTurns:
    """The lanes of one queue, and whose turn it is."""

    def __init__(self) -> None:
        self.lanes: dict[str, NatsLane] = {}
        self.ready: OrderedDict[str, NatsLane] = OrderedDict()  # may have something to claim
        self.wanted = True  # more work than there is could be claimed
        self.reserved = 0  # calls that are being stored
        self._uncounted = 0  # calls that may still be stored before the lanes are counted again
        self._room: Mapping[str, int] = {}

    @property
    def waiting(self) -> int:
        """Calls of all lanes, and those that are being stored."""
        return self.reserved + sum(lane.waiting for lane in self.lanes.values())

    def full(self, most: int) -> bool:
        """Whether as many calls wait as may. If not, the caller stores one more.

        There may be a thousand lanes, so they are not counted each time, but when half of the calls
        have come for which there was room at the last count, and after `recount`.
        """
        if self._uncounted <= 0:
            self._uncounted = (most - self.waiting + 1) // 2
        self._uncounted -= 1
        return self._uncounted < 0

    def recount(self) -> None:
        """Have lanes counted again: other daemons store calls, too."""
        self._uncounted = 0

    def room(self, lane: str) -> int:
        """How much room a lane had at the last claim."""
        return self._room.get(lane, self._room.get("", 1))

    def want(self, wanted: bool, room: Mapping[str, int]) -> None:
        """Note whether the last claim would have taken more, and the room that lanes had."""
        self.wanted = wanted
        self._room = room

    def shares(
        self, limit: int, left: Mapping[str, int], held: list[NatsLane]
    ) -> list[tuple[NatsLane, int]]:
        """The lanes whose turn it is, and how many messages each may give.

        `left` is the room that lanes have; lanes without any are put into `held`.
        """
        shares: list[tuple[NatsLane, int]] = []
        while limit > 0 and self.ready:
            name, lane = self.ready.popitem(last=False)
            share = max(1, limit // (len(self.ready) + 1))
            free = left.get(name, left.get("", limit))
            if not lane.promising:
                continue
            if free <= 0:
                held.append(lane)
                continue
            shares.append((lane, min(share, free)))
            limit -= min(share, free)
        return shares

    def reserve(self, number: int) -> None:
        """Count a call that is being stored, or is not any more (-1)."""
        self.reserved += number


def reply_tokens(reply: str) -> list[str]:
    """The parts of the address at which a delivery is acked.

    Consumer, number of this delivery, sequence in the stream and of the consumer, time, and how
    many messages are behind it.
    """
    tokens = reply.split(".")  # with or without domain and account
    return tokens[3:9] if len(tokens) < 11 else tokens[5:11]


def read_delivery(message: NatsMessage) -> tuple[str, Delivery]:
    """The consumer that has sent a work message, and the message."""
    reply = message.reply.decode()
    consumer, count, seq, _, _, pending = reply_tokens(reply)
    subject = message.subject.decode()
    delivery = Delivery(subject, reply, message.data, int(seq), int(count) > 1, int(pending))
    return consumer, delivery


async def gather_all(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Wait until all of it is done, then raise the first error. A single one needs no task."""
    if len(works) == 1:
        await works[0]
        return
    for failure in await asyncio.gather(*works, return_exceptions=True):
        if failure is not None:
            raise failure


class NatsPulls:
    """Asks consumers for messages."""

    def __init__(self, link: NatsLink, stream: str) -> None:
        self.inbox = f"_INBOX.{new_id()}"  # consumer and number follow
        self._link = link
        self._stream = stream
        self._count = 0

    def number(self) -> str:
        """A number for a pull, by which its end is recognized."""
        self._count += 1
        return str(self._count)

    async def ask(self, lane: NatsLane, number: str, body: object) -> None:
        """Ask the consumer of a lane for messages."""
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{lane.consumer}"
        reply = f"{self.inbox}.{lane.consumer}.{number}"
        self._link.send(subject, json.dumps(body).encode(), reply)


ACK = b"+ACK"  # the work is done: its message is deleted
NAK = b"-NAK"  # the message is to be delivered again, before all that wait


class NatsReplies:
    """Tells a consumer about messages that it has sent: the work is done, goes on, or is to be
    delivered again. NatsRecovery repairs what is lost with a connection.
    """

    def __init__(self, link: NatsLink) -> None:
        self._link = link

    def ack(self, delivery: Delivery) -> None:
        """Say that the work is done: its message is deleted."""
        with contextlib.suppress(StoreError):
            self._link.send(delivery.reply, ACK)

    def extend(self, delivery: Delivery) -> None:
        """Say that the work goes on: nobody else is to have it."""
        with contextlib.suppress(StoreError):
            self._link.send(delivery.reply, b"+WPI")

    async def give_back(self, delivery: Delivery) -> None:
        """Have a message delivered again, to us or another daemon, before all that wait."""
        with contextlib.suppress(StoreError):
            await self._link.request(delivery.reply, NAK)

    def put_off(self, delivery: Delivery, delay_s: float) -> None:
        """Have a message delivered again after a while."""
        with contextlib.suppress(StoreError):
            self._link.send(delivery.reply, b'%b {"delay": %d}' % (NAK, round(delay_s * 1e9)))


# --- NATS turns -----------------------------------------------------------------------------------
# -- whose turn it is


class NatsLanes:
    """Who is served next, and what is sent to us.

    While a queue wants work, the server sends the next message of each of its lanes by itself. What
    comes when none is wanted is given back at once: other daemons may have room.
    """

    def __init__(
        self, link: NatsLink, settings: Settings, replies: NatsReplies, wake: Tell[str]
    ) -> None:
        self.queues: defaultdict[str, NatsTurns] = defaultdict(NatsTurns)
        self.paused: set[str] = set()
        self.by_consumer: dict[str, NatsLane] = {}
        self._link = link
        self._settings = settings
        self._wake = wake
        self.stream = settings().nats.stream
        self._replies = replies
        self._pulls = NatsPulls(link, self.stream)
        self._started = False

    async def start(self) -> None:
        """Listen to what consumers send, and have the first messages sent."""
        await self._link.subscribe(f"{self._pulls.inbox}.*.*", self._follow, first=self._arrived)
        self._started = True
        for lane in self.by_consumer.values():
            await self._park(self.queues[lane.queue], lane)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs, as far as is known here."""
        return not any(lane.waiting or lane.running for lane in self.by_consumer.values())

    async def know(self, queue: str, name: str, consumer: str) -> NatsLane:
        """The lane of a consumer, which may be new to us."""
        if consumer not in self.by_consumer:
            turns = self.queues[queue]
            lane = NatsLane(queue, name, consumer)
            self.by_consumer[consumer] = lane
            turns.lanes[name] = lane
            await self._park(turns, lane)
        return self.by_consumer[consumer]

    async def count(self, lane: NatsLane, info: Mapping[str, Any]) -> None:
        """Take over what the server has said of a lane's consumer."""
        turns = self.queues[lane.queue]
        lane.count(info)
        turns.recount()
        if lane.promising and lane.name not in turns.ready:
            turns.ready[lane.name] = lane
            self._wake(lane.queue)
        await self._park(turns, lane)

    def wake(self, queue: str) -> None:
        """Wake the consumer of a queue."""
        self._wake(queue)

    def pause(self, queue: str, paused: bool) -> None:
        """Hold a queue, or let it go on."""
        if paused:
            self.paused.add(queue)
        else:
            self.paused.discard(queue)
        self._wake(queue)

    def expect(self, queue: str, name: str, seq: int) -> None:
        """We have stored a message: wake its queue, if it was not sent to somebody already."""
        turns = self.queues[queue]
        lane = turns.lanes[name]
        if lane.expect(seq):
            turns.ready[name] = lane
            if turns.wanted:  # else the next claim looks by itself, once something has ended
                self._wake(queue)

    def expect_later(self, queue: str, name: str) -> None:
        """We have stored a message that is not due yet."""
        if lane := self.queues[queue].lanes.get(name):
            lane.count_later(lane.later + 1)

    async def take(
        self, queue: str, limit: int, left: dict[str, int]
    ) -> list[tuple[NatsLane, Delivery]]:
        """Up to `limit` messages, lane by lane, of each at most what is `left`: that is lowered."""
        turns = self.queues[queue]
        taken: list[tuple[NatsLane, Delivery]] = []
        held: list[NatsLane] = []
        while shares := turns.shares(limit - len(taken), left, held):
            await gather_all([self._fetch(lane, number) for lane, number in shares])
            for lane, number in shares:
                deliveries = lane.inbox.take(number)
                taken += [(lane, delivery) for delivery in deliveries]
                left[lane.name] = left.get(lane.name, left.get("", limit)) - len(deliveries)
                if lane.promising:
                    turns.ready[lane.name] = lane
        for lane in held:
            turns.ready[lane.name] = lane
        return taken

    async def _fetch(self, lane: NatsLane, number: int) -> None:
        """Fill a lane's buffer up to this many messages, if there are so many."""
        for _ in range(3):
            missing = number - len(lane.inbox.buffer)
            if missing > 0:
                pull = lane.inbox.pull(self._pulls.number(), missing)
                end = functools.partial(lane.end_pull, pull.number)
                wait_s = self._settings().nats.publish_timeout
                limit = Timer(asyncio.get_running_loop(), wait_s, end)
                try:
                    await self._pulls.ask(lane, pull.number, {"batch": missing, "no_wait": True})
                    await pull.over.wait()
                finally:
                    limit.cancel()
                    end()
            if len(lane.inbox.buffer) >= number or not lane.inbox.late:
                break
            # A consumer knows of a message a little later than whoever has stored it.
            await lane.inbox.arrival()

    async def settle(self, queue: str, wanted: bool, left: Mapping[str, int]) -> None:
        """After a claim: have the next messages sent to us, or let others have them."""
        turns = self.queues[queue]
        turns.want(wanted, left)
        for lane in list(turns.lanes.values()):
            if self._wants(turns, lane):
                await self._park(turns, lane)
            elif lane.inbox.buffer:
                await self.release(lane)

    def _wants(self, turns: NatsTurns, lane: NatsLane) -> bool:
        open_ = self._started and lane.queue not in self.paused
        return open_ and turns.wanted and turns.room(lane.name) > 0

    async def _park(self, turns: NatsTurns, lane: NatsLane) -> None:
        """Have the next message of a lane sent to us, if there is room for it."""
        if not lane.inbox.parked and not lane.inbox.buffer and self._wants(turns, lane):
            number = self._pulls.number()
            lane.inbox.park(number)
            await self._pulls.ask(lane, number, {"batch": 1, "expires": round(PARKED_S * 1e9)})

    async def release(self, lane: NatsLane) -> None:
        """Give back what was sent to us and is not claimed."""
        while lane.inbox.buffer:
            delivery = lane.inbox.buffer.popleft()
            await self.give_back(lane, delivery)

    async def give_back(self, lane: NatsLane, delivery: Delivery) -> None:
        """Have a message delivered again, to us or another daemon, before all that wait."""
        lane.given_back.add(delivery.seq)
        self.queues[lane.queue].ready[lane.name] = lane
        await self._replies.give_back(delivery)

    def _arrived(self, message: NatsMessage) -> bool:
        """A message of a consumer, or the end of a pull, has come. False: `_follow` has to act."""
        if not message.reply:
            consumer, number = message.subject.decode().split(".")[-2:]
            if lane := self.by_consumer.get(consumer):
                lane.end_pull(number)
            return message.status != "408"
        consumer, delivery = read_delivery(message)
        arrived = self.by_consumer.get(consumer)
        if arrived is None:
            return True
        lane = arrived
        pulled = lane.arrive(delivery)
        turns = self.queues[lane.queue]
        turns.ready[lane.name] = lane
        if self._wants(turns, lane):
            self._wake(lane.queue)
            return True
        return pulled

    async def _follow(self, message: nats.aio.msg.Msg) -> None:
        """Park another pull in place of one that has timed out; give back what nobody wants now."""
        tokens = message.subject.split(".")
        consumer = reply_tokens(message.reply)[0] if message.reply else tokens[-2]
        if lane := self.by_consumer.get(consumer):
            turns = self.queues[lane.queue]
            if not message.reply:
                with contextlib.suppress(StoreError):  # Then `poll` does it.
                    await self._park(turns, lane)
            elif self._wants(turns, lane):  # now, though not when it came
                self._wake(lane.queue)
            elif not lane.inbox.pulling:
                await self.release(lane)

    def reconnected(self) -> None:
        """Forget what was sent on the old connection: it may be sent again, to others."""
        for lane in self.by_consumer.values():
            lane.inbox.lose()
            self.queues[lane.queue].ready[lane.name] = lane
            self._wake(lane.queue)

    async def close(self) -> None:
        """Give all back that is not claimed."""
        for turns in self.queues.values():
            turns.want(False, {})
        for lane in list(self.by_consumer.values()):
            await self.release(lane)


# -- consumers


def consumer_name(root: str, queue: str, lane: str) -> str:
    """The name of a lane's consumer."""
    return f"{root}+{nats_token(queue)}+{nats_token(lane)}"


def resume_consumer(stream: str, name: str) -> str:
    """The command by which a paused consumer goes on."""
    return f"nats consumer resume {stream} {name}"


def consumer_config(name: str, subject: str, ack_wait_s: float) -> dict[str, Any]:
    """The settings of a consumer."""
    return {
        "durable_name": name,
        "filter_subject": subject,
        "deliver_policy": "all",
        "replay_policy": "instant",
        "ack_policy": "explicit",
        "ack_wait": round(ack_wait_s * 1e9),
        "max_deliver": -1,
        "max_ack_pending": -1,
    }


# What must not be set: it would keep calls back, send them unasked, or send them without content.
CONSUMER_UNSET = ("backoff", "deliver_subject", "headers_only", "max_batch", "max_expires")


def consumer_differences(
    stream: str, has: Mapping[str, Any], wants: Mapping[str, Any]
) -> list[str]:
    """A line for each setting by which a consumer would not hand out all calls, and what to do.

    Its lease is not one of them: that is changed.
    """
    wants = {**wants, **dict.fromkeys(CONSUMER_UNSET), "ack_wait": has.get("ack_wait")}
    name = wants["durable_name"]
    start = f"nats.stream: consumer {name} of stream {stream} on the server has"
    how = f"have it made anew, nothing is lost: nats consumer rm {stream} {name}"
    return [
        f"{start} {key} = {json.dumps(has.get(key))}, the queue needs {required(wants[key])}: {how}"
        for key in differing(has, wants)
    ]


CONSUMERS_AT_ONCE = 50  # that are counted before others get their turn


class NatsConsumers:
    """The consumers on the server: one that hands a lane's messages out, one that only counts what
    is not due yet.
    """

    def __init__(
        self, link: NatsLink, subjects: NatsSubjects, settings: Settings, lanes: NatsLanes
    ) -> None:
        self._link = link
        self._subjects = subjects
        self._settings = settings
        self._lanes = lanes
        self._stream = settings().nats.stream
        self._known: dict[str, float] = {}  # consumers that are there, and their leases
        self._looks: dict[str, Mapping[str, Any]] = {}  # their settings when these were right last
        self._paused: set[str] = set()  # by an administrator
        self._making = asyncio.Lock()  # one consumer at a time
        self._lined_up = 0  # callers that wait for this lock

    async def ensure(self, root: str, queue: str, name: str) -> None:
        """Make the consumer of a lane unless it is there. Raises StoreError."""
        try:
            await self._ensure(root, queue, name)
        except ConfigError as exc:
            raise StoreError(exc.problems[0]) from None

    async def _ensure(self, root: str, queue: str, name: str) -> None:
        consumer = consumer_name(root, queue, name)
        if consumer in self._known and not self._lined_up:
            return
        self._lined_up += 1  # Who comes later does not overtake.
        try:
            async with self._making:
                if consumer not in self._known:
                    await self._make(root, queue, name, consumer)
        finally:
            self._lined_up -= 1

    async def _make(self, root: str, queue: str, name: str, consumer: str) -> None:
        lease = lease_s(self._settings(), queue)
        config = consumer_config(consumer, self._subjects.lane(root, queue, name), lease)
        try:
            await self._write(config, "create")
        except NatsRefused as exc:
            if exc.code in (0, *NOT_THERE):
                raise
            if exc.code != OTHER_CONSUMER:
                place = f"consumer {consumer} of stream {self._stream} can't be made"
                how = f"see who is in its place: nats consumer ls {self._stream}"
                raise NatsRefused(exc.code, f"{place} ({exc}); {how}") from None
            there = await self._link.api(f"CONSUMER.INFO.{self._stream}.{consumer}")
            await self._agree(there["config"], config)
        self._known[consumer] = lease
        if root == "work":
            await self._lanes.know(queue, name, consumer)

    async def _write(self, config: Mapping[str, Any], action: str) -> None:
        """Make a consumer or change it: a server does either, unless it is told which."""
        body = {"stream_name": self._stream, "config": config, "action": action}
        name = config["durable_name"]
        await self._link.api(f"CONSUMER.DURABLE.CREATE.{self._stream}.{name}", body)

    def _check(self, has: Mapping[str, Any], wants: Mapping[str, Any]) -> None:
        """Raise ConfigError for a consumer that keeps calls back."""
        if differences := consumer_differences(self._stream, has, wants):
            raise ConfigError(differences)
        self._looks[wants["durable_name"]] = has

    async def _agree(self, has: Mapping[str, Any], wants: Mapping[str, Any]) -> None:
        """Give a consumer that is there our lease. Raises ConfigError if it keeps calls back.

        Of hosts with different leases, the one that was started or reloaded last decides.
        """
        self._check(has, wants)
        if has["ack_wait"] != wants["ack_wait"]:
            name, leases = wants["durable_name"], (has["ack_wait"] / 1e9, wants["ack_wait"] / 1e9)
            await self._write(wants, "update")
            log.info("NATS: consumer %s had ack_wait %gs: it is %gs now", name, *leases)

    async def poll(self) -> Mapping[str, Mapping[str, Any]]:
        """Ask about all consumers: count what waits, and learn of new lanes. The answers, by name.

        Those that somebody has deleted are made again; those that are not ours are left alone.
        Raises StoreError; ConfigError for those of ours that somebody has changed.
        """
        consumers: dict[str, dict[str, Any]] = {}
        silent: set[str] = set()  # those that are there, and have no leader just now
        offset, total = 0, 1
        while offset < total:
            answer = await self._link.api(f"CONSUMER.LIST.{self._stream}", {"offset": offset})
            consumers |= {info["name"]: info for info in answer["consumers"] or ()}
            silent.update(answer.get("missing") or ())
            offset, total = offset + max(1, answer["limit"]), answer["total"]
        consumers = {name: info for name, info in consumers.items() if OWN_CONSUMER.fullmatch(name)}
        self._tell_paused({name for name, info in consumers.items() if info.get("paused")})
        missing = self._known.keys() - consumers.keys() - silent
        gone = {name for name in missing if await self._is_gone(name)}
        problems: dict[str, None] = {}
        in_order = sorted(consumers.keys() | gone, reverse=True)  # work before later
        for number, name in enumerate(in_order):
            if number % CONSUMERS_AT_ONCE == 0:
                await asyncio.sleep(0)
            root, *names = name.split("+")
            queue, lane = map(nats_name, names)
            if name in gone:
                await self._make_again(root, queue, lane, name)
                continue
            try:
                await self._count(root, queue, lane, consumers[name])
            except ConfigError as exc:  # The others are looked at all the same.
                problems |= dict.fromkeys(exc.problems)
        if problems:
            raise ConfigError(list(problems))
        return consumers

    def _tell_paused(self, paused: set[str]) -> None:
        """Log once which consumers an administrator has paused."""
        for name in sorted(paused - self._paused):
            how = resume_consumer(self._stream, name)
            log.warning("NATS: consumer %s is paused on the server, its calls wait: %s", name, how)
        for name in sorted(self._paused - paused):
            log.info("NATS: consumer %s is not paused any more", name)
        self._paused = paused

    def held_back(self, lanes: Iterable[NatsLane]) -> dict[str, str]:
        """See QueueStats."""
        why = "consumer %s, which is paused on the NATS server: %s"
        return {
            lane.name: why % (lane.consumer, resume_consumer(self._stream, lane.consumer))
            for lane in lanes
            if lane.consumer in self._paused
        }

    async def _is_gone(self, consumer: str) -> bool:
        """Whether an unlisted one is really gone: pages of the list shift while others are made."""
        try:
            await self._link.api(f"CONSUMER.INFO.{self._stream}.{consumer}")
        except NatsRefused as exc:
            if exc.code in NOT_THERE:
                return True
            raise
        return False

    async def _make_again(self, root: str, queue: str, name: str, consumer: str) -> None:
        log.warning("NATS: consumer %s is gone, and made again", consumer)
        if lane := self._lanes.by_consumer.get(consumer):
            lane.inbox.lose()
        await self._make(root, queue, name, consumer)

    async def _count(self, root: str, queue: str, name: str, info: Mapping[str, Any]) -> None:
        lease = lease_s(self._settings(), queue)
        consumer, has = info["name"], info["config"]
        wants = consumer_config(consumer, self._subjects.lane(root, queue, name), lease)
        if self._known.get(consumer) != lease:
            await self._agree(has, wants)
            self._known[consumer] = lease
        elif self._looks.get(consumer) != has:  # Somebody has edited it.
            self._check(has, wants)
        if root == "work":
            lane = await self._lanes.know(queue, name, info["name"])
            await self._lanes.count(lane, info)
            return
        lane_name = name.removesuffix(ASIDE)
        await self._ensure("work", queue, lane_name)
        lane = self._lanes.queues[queue].lanes[lane_name]
        count = lane.count_later if lane_name == name else lane.count_aside
        count(info["num_pending"])


# --- NATS names -----------------------------------------------------------------------------------
# -- which messages there are, by their subjects

# What may be many is asked for by blocks of time, newest first. A block is all times in
# milliseconds that begin with the same hex digits; one more digit makes it a sixteenth as long. So
# no answer takes long, and the newest calls cost the same however many calls there are.

FIRST_DIGITS = 6  # The walk begins with blocks of this many digits (4.7 hours),
LAST_DIGITS = 3  # and goes on with larger ones, down to this many (2.2 years).
MOST_DIGITS = sum(TIME_DIGITS)
COARSE_DIGITS = 8  # Blocks of 65 s and more are weighed by a sample first:
SAMPLE = "00"  # calls whose time has this as its last token. (Those of full hours may have it.)
SAMPLE_OF = 256  # One call in so many is in the sample.
AHEAD_S = 86_400.0  # by which the clock of whoever made an id may differ from ours
SMALL_STORE = 10_000  # messages that may be weighed all at once
NAMES_IN_AN_ANSWER = 100_000  # A server names no more subjects at once.
NAMES_AT_ONCE = 500  # names that are read before others get their turn
NAMED = re.compile(rb'"([^"]+)":(\d+)')


def named_subjects(answer: bytes) -> Iterator[tuple[str, int]]:
    """The subjects in an answer of STREAM.INFO, and how many messages each has.

    They are read one by one: to parse the JSON of 100,000 at once takes 30 to 100 ms.
    """
    begin = answer.find(b'"subjects":{', answer.find(b'"state":{'))
    if begin >= 0:
        begin += len(b'"subjects":')
        for match in NAMED.finditer(answer, begin, answer.index(b"}", begin)):
            yield match[1].decode(), int(match[2])


async def subject_counts(
    link: NatsLink, stream: str, pattern: str
) -> AsyncIterator[tuple[str, int]]:
    """The subjects that match a pattern, and how many messages each has."""
    offset = 0
    while True:
        body = json.dumps({"subjects_filter": pattern, "offset": offset}).encode()
        message = await link.request(f"$JS.API.STREAM.INFO.{stream}", body)
        before = offset
        for named in named_subjects(message.data):
            offset += 1
            if offset % NAMES_AT_ONCE == 0:
                await asyncio.sleep(0)
            yield named
        if offset == before:
            nats_answer(message)  # It may be an error.
        if offset < before + NAMES_IN_AN_ANSWER:
            return


class Scope(NamedTuple):
    """Which messages of calls are meant: their roots, and their tokens of queue and lane."""

    roots: Sequence[str]
    queue: str = "*"
    lanes: Sequence[str] = ("*",)


class Span(NamedTuple):
    """The first and the last time that are meant, as twelve hex digits of milliseconds."""

    first: str
    last: str


def block_times(block: str, last: str = "*") -> list[str]:
    """Patterns of the time tokens of a block's subjects; `last` stands for the last token, unless
    the block decides about that.

    A block that ends within a token takes a pattern for each way to complete that.
    """
    tokens = list(time_tokens(block))
    missing = sum(TIME_DIGITS[: len(tokens)]) - len(block)
    rest = ["*"] * (len(TIME_DIGITS) - len(tokens))
    if rest:
        rest[-1] = last
    if not missing:
        return [".".join([*tokens, *rest])]
    *whole, part = tokens
    parts = [f"{part}{number:0{missing}x}" for number in range(16**missing)]
    return [".".join([*whole, one, *rest]) for one in parts]


def announced(messages: Sequence[NatsMessage]) -> int:
    """How many messages match a request, as the first one of its answer says."""
    return 1 + int(messages[0].headers["Nats-Num-Pending"]) if messages else 0


class NatsBlocks:
    """Finds messages of calls by the time in their ids."""

    def __init__(self, link: NatsLink, subjects: NatsSubjects, stream: str) -> None:
        self._link = link
        self._subjects = subjects
        self.stream = stream

    def _patterns(self, scope: Scope, times: Sequence[str]) -> list[str]:
        return [
            self._subjects.timed(root, time, scope.queue, lane)
            for root in scope.roots
            for lane in scope.lanes
            for time in times
        ]

    async def gather(self, **body: object) -> list[NatsMessage]:
        """Messages as they are stored. NatsRefused: more match than a server gives at once."""
        place = f"$JS.API.DIRECT.GET.{self.stream}"
        return await self._link.gather(place, json.dumps(body).encode())

    async def _count(self, scope: Scope, times: Sequence[str]) -> float:
        """How many messages match; infinity: more than a server gives at once."""
        try:
            found = await self.gather(multi_last=self._patterns(scope, times), batch=1)
        except NatsRefused as exc:
            if exc.code != TOO_MANY:
                raise
            return math.inf
        return announced(found)

    async def _weigh(self, scope: Scope, block: str, most: int) -> float:
        """How many messages a block has; infinity: more than `most`.

        To count, a server goes through all of them. A sample spares it that where they are many.
        """
        if len(block) <= COARSE_DIGITS:
            sample = await self._count(scope, block_times(block, SAMPLE))
            if sample * SAMPLE_OF > most:
                return math.inf
        number = await self._count(scope, block_times(block))
        return number if number <= most else math.inf

    async def _parts(self, scope: Scope, block: str, span: Span, most: int) -> AsyncIterator[str]:
        """A block, or its parts with no more messages than `most`, newest first; no empty ones."""
        weight = await self._weigh(scope, block, most)
        if weight == 0:
            return
        if weight <= most or len(block) == MOST_DIGITS:
            yield block
            return
        for digit in reversed("0123456789abcdef"):
            part = block + digit
            if span.first[: len(part)] <= part <= span.last[: len(part)]:
                async for smaller in self._parts(scope, part, span, most):
                    yield smaller

    async def lighter(self, one: Scope, other: Scope) -> Scope:
        """The one with fewer messages, as far as a sample tells."""
        weights = [await self._count(scope, block_times("", SAMPLE)) for scope in (one, other)]
        return one if weights[0] <= weights[1] else other

    async def newest(self, scope: Scope, span: Span, most: int) -> AsyncIterator[str]:
        """Blocks that have messages, newest first, and no more than `most` unless all have one
        time.

        Of a small store it is a single block, of all times.
        """
        if not scope.lanes:
            return
        state = (await self._link.api(f"STREAM.INFO.{self.stream}"))["state"]
        is_small = state.get("num_subjects", 0) <= SMALL_STORE
        may_be_few = is_small or scope.lanes != ("*",) or "call" not in scope.roots
        weight = await self._weigh(scope, "", most) if may_be_few else math.inf
        if weight <= most:
            if weight:
                yield ""
            return
        digits = FIRST_DIGITS
        number = int(span.last[:digits], 16)
        while number >= int(span.first[:digits], 16):
            async for block in self._parts(scope, f"{number:0{digits}x}", span, most):
                yield block
            while number % 16 == 0 and digits > LAST_DIGITS:
                number //= 16
                digits -= 1
            number -= 1

    async def read(self, scope: Scope, block: str) -> list[NatsMessage]:
        """The messages of a block. If some move while they are read, it is read once more."""
        patterns = self._patterns(scope, block_times(block))
        try:
            found = await self.gather(multi_last=patterns)
            if len(found) < announced(found):
                found = await self.gather(multi_last=patterns)
            return found
        except NatsRefused as exc:
            if exc.code != TOO_MANY:
                raise
        subjects = [subject async for subject, _ in self._names(scope, block)]
        found = []
        for begin in range(0, len(subjects), NAMED_SUBJECTS):
            found += await self.gather(multi_last=subjects[begin : begin + NAMED_SUBJECTS])
        return found

    async def _names(self, scope: Scope, block: str) -> AsyncIterator[tuple[str, int]]:
        for pattern in self._patterns(scope, block_times(block)):
            async for named in subject_counts(self._link, self.stream, pattern):
                yield named

    async def names(self, root: str) -> AsyncIterator[tuple[str, int]]:
        """The subjects of all messages with a root, and how many each has."""
        scope = Scope((root,))
        async for block in self.newest(scope, self.span(), NAMED_SUBJECTS):
            async for named in self._names(scope, block):
                yield named
        if self._subjects.since:
            async for named in subject_counts(
                self._link, self.stream, self._subjects.untimed(root)
            ):
                yield named

    async def older(self, root: str) -> AsyncIterator[str]:
        """The subjects of messages with a root of calls that an earlier version has stored."""
        async for subject, _ in subject_counts(
            self._link, self.stream, self._subjects.untimed(root)
        ):
            yield subject

    def span(self, first_at: float = 0.0, last_at: float = math.inf) -> Span:
        """The times that ids of calls may have which were accepted between these two."""
        since = self._subjects.since.replace("-", "")[:12] or "0" * 12
        last_at = min(last_at, time.time()) + AHEAD_S
        first = f"{max(0, round(1e3 * (first_at - AHEAD_S))):012x}"
        return Span(max(since, first), f"{round(1e3 * last_at):012x}")

    async def lanes(self, function: str) -> Sequence[str]:
        """The tokens of the lanes that a function has, in any namespace."""
        names: list[str] = []
        while True:
            answer = await self._link.api(f"CONSUMER.NAMES.{self.stream}", {"offset": len(names)})
            names.extend(answer["consumers"] or ())
            if not answer["consumers"] or len(names) >= answer["total"]:
                break
        lanes = {name.split("+")[2] for name in names if OWN_CONSUMER.fullmatch(name)}
        return sorted(one for one in lanes if nats_name(one).rpartition(".")[0] == function)


# --- NATS documents -------------------------------------------------------------------------------
# Single messages: the last one of a subject, and those that are none of ours.


class Note(NamedTuple):
    """A small document, and the sequence that a write over it has to name."""

    seq: int
    document: dict[str, Any]


async def last_message(
    link: NatsLink, stream: str, subject: str, direct: bool
) -> tuple[str, int, bytes] | None:
    """The last message of a subject: its own subject, sequence and bytes.

    Not `direct`: the leader answers, which knows of all that was stored.
    """
    body = json.dumps({"last_by_subj": subject}).encode()
    if direct:
        message = await link.request(f"$JS.API.DIRECT.GET.{stream}", body)
        headers = message.headers
        if status := headers.get("Status"):
            if status == "404":
                return None
            raise StoreError(f"NATS: {headers.get('Description', status)}")
        return headers["Nats-Subject"], int(headers["Nats-Sequence"]), message.data
    try:
        answer = await link.api(f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject})
    except NatsRefused as exc:
        if exc.code in NOT_THERE:
            return None
        raise
    found = answer["message"]
    return found["subject"], found["seq"], base64.b64decode(found.get("data", ""))


async def delete_message(link: NatsLink, stream: str, seq: int) -> None:
    """Delete exactly this message, if it is there.

    A purge of its subject would not do: the server then forgets which other messages of the same
    consumer were given back, until their leases run out.
    """
    with contextlib.suppress(NatsRefused):
        await link.api(f"STREAM.MSG.DELETE.{stream}", {"seq": seq, "no_erase": True})


def tell_set_aside(metrics: Metrics, subject: str, why: object, kind: str = "none of ours") -> None:
    """Log and count a message that nobody can do anything with."""
    log.error("NATS: a message on %s is %s: set aside: %s", subject, kind, why)
    metrics.set_aside.inc()


class NatsStrays:
    """Sets aside messages that are none of ours: they are logged, counted and deleted."""

    def __init__(
        self, link: NatsLink, subjects: NatsSubjects, stream: str, metrics: Metrics
    ) -> None:
        self._link = link
        self._stream = stream
        self._metrics = metrics
        self._records = subjects.every("call")[:-1]

    async def call(self, subject: str, seq: int, data: bytes) -> Stored | None:
        """The call in a message; None: there is none, and the message is set aside."""
        try:
            return unpack_call(data, seq if subject.startswith(self._records) else None)
        except ValueError as exc:
            await self.set_aside(subject, seq, exc)
            return None

    async def note(self, subject: str, seq: int, data: bytes, names: Iterable[str]) -> Note | None:
        """The note in a message, with these keys; None: there is none, and it is set aside."""
        try:
            return Note(seq, unpack_note(data, names))
        except ValueError as exc:
            await self.set_aside(subject, seq, exc)
            return None

    async def set_aside(self, subject: str, seq: int, why: object) -> None:
        """Log, count and delete a message that nobody can do anything with."""
        tell_set_aside(self._metrics, subject, why)
        await delete_message(self._link, self._stream, seq)


# --- NATS records ---------------------------------------------------------------------------------


def tell_daemons(link: NatsLink, subjects: NatsSubjects, **news: object) -> None:
    """Tell other daemons something that is not stored, if the servers can be reached."""
    with contextlib.suppress(StoreError):
        link.send(subjects.news, encode_json(news).encode())


class Change(NamedTuple):
    """A record that was written, and its sequence; 0: the call was accepted."""

    seq: int
    call: NatsCall


class NatsChanges:
    """Tells whoever watches, here or at another daemon, of each record that is written.

    A daemon at which somebody watches says so every few seconds; otherwise it is told nothing.
    Daemons write in turns and are heard one after the other, so what is told of a call after
    something newer of it is left out: nobody is shown a state that is over.
    """

    def __init__(self, link: NatsLink, subjects: NatsSubjects) -> None:
        self._link = link
        self._subjects = subjects
        self._watcher: Tell[Changes] | None = None
        self._watched_until = 0.0  # monotonic: until then, by another daemon
        self._budget = Budget(CHANGES_PER_SECOND)
        self._changes: list[Change] = []  # since the last were told
        self._missed = 0
        self._latest: OrderedDict[str, int] = OrderedDict()  # sequences told, by call
        self._ended: list[Ended] = []  # that others are to be told of
        self._some = asyncio.Event()  # there are some, or a watcher

    def watch(self, tell: Tell[Changes] | None) -> None:
        """See CallRecords."""
        self._watcher = tell
        self._some.set()

    def note(self, call: NatsCall, seq: int = 0) -> None:
        """Have a change of a call told, if somebody watches; `seq`: see Change."""
        if self._watcher is None and time.monotonic() > self._watched_until:
            return
        if self._budget.take(1):
            self._changes.append(Change(seq, call._replace(history=(), failures=())))
        else:
            self._missed += 1
        self._some.set()

    def ended(self, ended: Ended) -> None:
        """Have other daemons told in a moment that a call has ended."""
        if not self._ended:
            asyncio.get_running_loop().call_later(TELL_ENDED_S, self.tell_ended)
        self._ended.append(ended)

    def tell_ended(self) -> None:
        """Tell other daemons of calls that have ended, many in a message."""
        ended = self._ended
        self._ended = []
        for first in range(0, len(ended), MANY_ENDED):
            tell_daemons(self._link, self._subjects, ends=ended[first : first + MANY_ENDED])

    def lost(self) -> None:
        """Tell that changes may have been missed while there was no connection."""
        if self._watcher is not None:
            self._watcher(Changes((), 1))

    def watched_elsewhere(self) -> None:
        """Tell another daemon of changes for a while, as it wants."""
        self._watched_until = time.monotonic() + WATCHED_S

    def heard(
        self, told: Sequence[Mapping[str, Any]], seqs: Sequence[int] | None, missed: int
    ) -> None:
        """Tell whoever watches here of changes that another daemon has told.

        `seqs`: see Change. None: that daemon is of an older version.
        """
        if self._watcher is not None:
            calls = [unpack_fields(fields) for fields in told]
            known = seqs or [self._latest.get(call.id, 0) for call in calls]
            self._tell(self._watcher, list(map(Change, known, calls)), missed)

    def _tell(self, watcher: Tell[Changes], changes: Iterable[Change], missed: int) -> None:
        """Tell of changes in the order in which they were written."""
        now = self._link.clock.now()
        records = []
        for seq, call in sorted(changes, key=operator.attrgetter("seq")):
            if seq >= self._latest.get(call.id, 0):
                self._latest[call.id] = seq
                self._latest.move_to_end(call.id)
                records.append(nats_record(call, now))
        while len(self._latest) > KNOWN_CHANGES:
            self._latest.popitem(last=False)
        watcher(Changes(records, missed))

    def announce(self) -> None:
        """Have other daemons tell us, if somebody watches here."""
        if self._watcher is not None:
            tell_daemons(self._link, self._subjects, watching=True)

    async def keep_telling(self) -> None:
        """Tell what has changed, a few times a second."""
        while True:
            await self._some.wait()
            self._some.clear()
            self.announce()
            await asyncio.sleep(TELL_S)
            changes, missed = self._changes, self._missed
            self._changes, self._missed = [], 0
            if not changes and not missed:
                continue
            if self._watcher is not None:
                self._tell(self._watcher, changes, missed)
            if time.monotonic() < self._watched_until:
                told = [pack_fields(change.call) for change in changes]
                seqs = [change.seq for change in changes]
                tell_daemons(self._link, self._subjects, changes=told, seqs=seqs, missed=missed)


def fit_call(call: NatsCall, parts: Parts, most: int) -> tuple[NatsCall, Parts]:
    """A final call cut down to a message of this many bytes: first its request goes, then stderr
    and a part of the answer, which can't be called back then.
    """
    if sum(map(len, parts)) < most - MAX_CALL_BYTES:
        return call, parts
    if len(pack_call(call, parts)) > most:
        parts = with_request(parts, Parts())
    over = len(pack_call(call, parts)) - most
    if over > 0:
        parts = parts._replace(answer_headers=b"", stderr=b"")
        parts = parts._replace(output=shorten(parts.output, max(0, len(parts.output) - over)))
        if call.callback_status == "pending":
            error = "the answer is larger than a message of the NATS server may be"
            call = call._replace(callback_status="failed", callback_error=error)
    return call, parts


class NatsCalls:
    """Reads and writes calls. A record is written only over the one that was read."""

    def __init__(
        self,
        link: NatsLink,
        subjects: NatsSubjects,
        settings: Settings,
        changes: NatsChanges,
        metrics: Metrics,
    ) -> None:
        self.changes = changes
        self._link = link
        self._subjects = subjects
        self._settings = settings
        self.stream = settings().nats.stream
        self._direct = settings().nats.replicas == 1  # a follower may be behind
        self.strays = NatsStrays(link, subjects, self.stream, metrics)

    def now(self) -> float:
        """The time by the servers' clock, which decides about deadlines and delays."""
        return self._link.clock.now()

    @property
    def room(self) -> NatsRoom:
        """See NatsRoom."""
        return self._link.room

    async def used_bytes(self) -> int:
        """How many bytes the stream takes."""
        return int((await self._link.api(f"STREAM.INFO.{self.stream}"))["state"]["bytes"])

    async def require_room(self, number: int) -> None:
        """Raise StoreError if so many bytes more would leave too few for callbacks."""
        self.room.require_bytes(number, await self.used_bytes())

    @property
    def tight(self) -> bool:
        """Whether there is room only for the end of calls."""
        return self._link.room.full.is_set()

    @property
    def keep_output(self) -> int:
        """Up to how many bytes outputs are kept, and requests of calls that ended well.

        Where room is tight, a call that ends has to leave less than it took.
        """
        keep = self._settings().calls.keep_output
        return min(keep, KEPT_WHEN_FULL_BYTES) if self.tight else keep

    async def read(self, subject: str) -> Stored | None:
        """The last call on a subject, which may have wildcards. What is no call is set aside."""
        while found := await last_message(self._link, self.stream, subject, self._direct):
            if stored := await self.strays.call(*found):
                return stored
        return None

    async def record_of(self, call: NatsCall) -> Stored | None:
        """The record of a call, if there is one already."""
        return await self.read(self._subjects.record(call))

    async def noted(self, subject: str, *names: str) -> Note | None:
        """A small document with these keys, if it is there."""
        while found := await last_message(self._link, self.stream, subject, self._direct):
            if note := await self.strays.note(*found, names):
                return note
        return None

    async def note(self, subject: str, *names: str) -> dict[str, Any] | None:
        """A small document with these keys, without its sequence."""
        noted = await self.noted(subject, *names)
        return noted.document if noted else None

    def kept_s(self, call: NatsCall) -> float:
        """How long the record of a finished call is kept."""
        return self._settings().calls.kept_s(call.status, call.callback_status)

    def is_past(self, call: NatsCall) -> bool:
        """Whether a record has been kept for its time, and is not shown any more.

        It stays a little longer: without it, a work message that was not acked would run again.
        """
        before = self.now() - self.kept_s(call)
        return call.finished and (call.completed_at or before) < before

    async def current(self, own_id: str) -> Stored | None:
        """A call by its own id, unless it is past its time."""
        found = await self.anywhere(own_id)
        return None if found is not None and self.is_past(found.call) else found

    async def anywhere(self, own_id: str) -> Stored | None:
        """A call by its own id, from its record or else from the message that waits."""
        if not is_own_id(own_id):
            return None
        places = self._subjects.find(own_id)
        for found in await asyncio.gather(*map(self.read, places)):
            if found is not None:
                return found
        return await self.read(places[0])  # It may have been on its way from one to the other.

    async def request_of(self, call: NatsCall) -> Parts:
        """The request of a call that has not finished: its work message has it."""
        places = [
            self._subjects.later(call.queue, call.id),
            self._subjects.place("work", call.queue, call.lane, call.id),
        ]
        for place in places:
            if found := await self.read(place):
                return found.parts
        return Parts()

    def write(
        self,
        call: NatsCall,
        parts: Parts,
        seq: int,
        keep_s: float | None = None,
        accepted: str = "",
    ) -> Coroutine[object, None, int]:
        """Send a record that replaces the one with this sequence; what is awaited is its own.

        The server deletes it some time after `keep_s`. `accepted`: see Stored. Raises NatsChanged:
        another record has come first.
        """
        headers: dict[str, object] = {"Nats_Expected_Last_Subject_Sequence": seq}
        if keep_s is not None:
            fence_s = 2 * self._settings().queue(call.queue).ack_wait + FENCE_S
            headers["Nats_TTL"] = f"{round(min(keep_s, FAR_S) + fence_s)}s"
        payload = pack_call(call, parts, accepted=accepted)
        return self._written(
            call, self._link.publish(self._subjects.record(call), payload, **headers)
        )

    async def _written(self, call: NatsCall, stored: Awaitable[int]) -> int:
        seq = await stored
        self.changes.note(call, seq)
        return seq

    def fit(self, call: NatsCall, parts: Parts, had: int | None = None) -> tuple[NatsCall, Parts]:
        """A final call, cut down to what one message can hold; where room is tight, to the bytes
        that it `had` before.

        An answer that is to be called back stays whole. A failed call keeps its request as long as
        there is room.
        """
        most = self._link.max_payload
        if had is not None and self.tight and call.finished:
            if self.room.spent:
                return call._replace(failures=()), Parts()
            if call.status == "success":
                most = min(most, had)
        return fit_call(call, parts, most)

    async def keep_notes(self, call: NatsCall) -> None:
        """Have the notes of a call, on its key and foreign id, last as long as its record."""
        limit = {"Nats_TTL": f"{max(1, round(self.kept_s(call)))}s"} if call.status in FINAL else {}
        for subject in self._subjects.notes(call):
            note = await self.noted(subject, "id")
            if note and note.document["id"] == call.id:  # Another call may have the key by now.
                body = json.dumps(note.document).encode()
                await store_over(self._link, subject, body, note.seq, **limit)

    async def forget(self, call: NatsCall) -> None:
        """Delete a call's record and notes."""
        subjects = [self._subjects.record(call), *self._subjects.notes(call)]
        await asyncio.gather(*map(self.purge, subjects))

    async def purge(self, subject: str) -> None:
        """Delete the message of a subject."""
        if found := await last_message(self._link, self.stream, subject, self._direct):
            await delete_message(self._link, self.stream, found[1])

    async def subjects(self, pattern: str) -> list[str]:
        """The subjects that match a pattern."""
        return [subject async for subject, _ in subject_counts(self._link, self.stream, pattern)]

    async def own_ids(self, call_id: str) -> list[str]:
        """The ids of the calls with this id or call id, newest first."""
        pattern = self._subjects.call_id(call_id, "*")
        found = {subject.rpartition(".")[2] for subject in await self.subjects(pattern)}
        if is_own_id(call_id):
            found.add(call_id)
        return sorted(found, reverse=True)

    async def find(self, call_id: str) -> Stored:
        """The call with this id, else the newest with this call id. HttpError: 404."""
        if found := await self.current(call_id):
            return found
        for own_id in await self.own_ids(call_id):
            if found := await self.current(own_id):
                return found
        raise HttpError(404, UNKNOWN_CALL)

    async def sharing(self, call_id: str) -> AsyncIterator[list[Stored]]:
        """The calls with this id or call id, newest first, in batches."""
        rest = await self.own_ids(call_id)
        while rest:
            found = await asyncio.gather(*map(self.current, rest[:MANY_NATS_REQUESTS]))
            yield [stored for stored in found if stored is not None]
            rest = rest[MANY_NATS_REQUESTS:]


async def nats_request(calls: NatsCalls, call_id: str) -> StoredRequest:
    """See CallRecords."""
    stored = await calls.find(call_id)
    parts = stored.parts
    if not parts.has_request and not stored.call.finished:
        parts = await calls.request_of(stored.call)
    if not parts.has_request:
        raise HttpError(410, NO_REQUEST)
    call = stored.call
    return StoredRequest(call.method, call.target, unpack_headers(parts.headers), parts.body)


async def nats_output(calls: NatsCalls, call_id: str, keep: int) -> Output:
    """See CallRecords.output."""
    stored = await calls.find(call_id)
    whole = stored.call.callback_status == "pending"
    body = stored.parts.output
    return Output(body if whole else shorten(body, keep), stored.parts.stderr)


async def nats_result(calls: NatsCalls, call_id: str) -> StoredAnswer:
    """See CallRecords."""
    call, parts = (await calls.find(call_id))[1:3]
    require_whole(call.status, call.error, len(parts.output), call.response_bytes)
    return StoredAnswer(call.http_status, unpack_headers(parts.answer_headers), parts.output)


class WorkMessage(NamedTuple):
    """A work message as the stream has it."""

    subject: str
    seq: int
    data: bytes


class NatsWaiting:
    """Reads work messages that wait."""

    def __init__(self, link: NatsLink, subjects: NatsSubjects, stream: str) -> None:
        self._link = link
        self._subjects = subjects
        self._stream = stream

    async def between(self, pattern: str, first: int, last: int) -> list[WorkMessage]:
        """The messages of a subject with wildcards from one sequence to another."""
        found: list[WorkMessage] = []
        while first <= last:
            body = json.dumps({"next_by_subj": pattern, "seq": first, "batch": BATCH}).encode()
            for message in await self._link.gather(f"$JS.API.DIRECT.GET.{self._stream}", body):
                headers = message.headers
                seq = int(headers["Nats-Sequence"])
                if seq > last:
                    return found
                found.append(WorkMessage(headers["Nats-Subject"], seq, message.data))
                first = seq + 1
            if len(found) % BATCH or not found:
                break
        return found

    async def head(self, lane: NatsLane) -> float:
        """When the first waiting call of a lane was due."""
        found = [delivery.data for delivery in list(lane.inbox.buffer)[:1]]
        places = [("work", lane.name, lane.first_seq), ("later", lane.name, 1)]
        if lane.aside:
            places.append(("later", lane.name + ASIDE, 1))
        for root, name, seq in places:
            place = self._subjects.lane(root, lane.queue, name)
            body = json.dumps({"next_by_subj": place, "seq": seq}).encode()
            message = await self._link.request(f"$JS.API.DIRECT.GET.{self._stream}", body)
            if "Status" not in message.headers:
                found.append(message.data)
        due = []
        for data in found:
            with contextlib.suppress(ValueError):  # Whoever claims it tells what is wrong.
                due.append(unpack_call(data).call.due_at)
        return min(due, default=float("inf"))


# --- NATS lists -----------------------------------------------------------------------------------
# -- calls that match

UNFINISHED = ("work", "later")
RECORDS = ("call",)
MANY_LANES = 16  # of one function that one request asks for
CALLS_AT_ONCE = 50  # that are unpacked before others get their turn


def roots_of(filters: CallFilter) -> Sequence[str]:
    """Where to look for calls in these states.

    A call that has not ended has a work message, one that was ever claimed has a record; one that
    runs has both.
    """
    statuses = set(filters.statuses)
    if statuses and not statuses & set(FINAL):
        return UNFINISHED
    callbacks = set(filters.callbacks)
    if (statuses and statuses <= set(FINAL)) or (callbacks and "none" not in callbacks):
        return RECORDS
    return (*UNFINISHED, *RECORDS)


def matches(record: CallRecord, filters: CallFilter) -> bool:
    """Whether a record has all that a filter asks for, apart from its call id."""
    return (
        (not filters.statuses or record.status in filters.statuses)
        and (not filters.callbacks or record.callback.status in filters.callbacks)
        and filters.function in (None, record.function)
        and filters.queue in (None, record.queue)
        and filters.app in (None, record.app)
        and filters.schedule in (None, record.schedule)
        and (filters.since is None or record.created_at >= filters.since)
        and (filters.until is None or record.created_at < filters.until)
    )


def texts_of(filters: CallFilter) -> list[list[bytes]]:
    """Lists of texts: the message of a call that matches has at least one of each list.

    So most of a million calls need not be unpacked to find the few that have failed. Messages of
    other calls may have them, too. (What has its default is not in a message.)
    """
    named = [[value] for value in (filters.app, filters.schedule) if value is not None]
    if roots_of(filters) == RECORDS:
        if filters.statuses and {*filters.statuses} <= {*FINAL}:
            named.append(list(filters.statuses))
        if filters.callbacks and "none" not in filters.callbacks:
            named.append(list(filters.callbacks))
    return [[encode_text(value).encode() for value in values] for values in named]


def has_texts(data: bytes, texts: Sequence[Sequence[bytes]]) -> bool:
    """Whether a message has one of each of these lists."""
    return all(any(text in data for text in some) for some in texts)


class NatsLists:
    """Finds calls that match a filter."""

    def __init__(
        self, link: NatsLink, subjects: NatsSubjects, settings: Settings, calls: NatsCalls
    ) -> None:
        self.blocks = NatsBlocks(link, subjects, settings().nats.stream)
        self._subjects = subjects
        self._settings = settings
        self._calls = calls

    async def _older(
        self, filters: CallFilter, roots: Sequence[str] = (*UNFINISHED, *RECORDS)
    ) -> Iterator[tuple[str, str]]:
        """Id and subject of calls of earlier versions that may match, newest first.

        They are sorted a few at a time: all at once would hold up others.
        """
        parts: list[list[tuple[str, str]]] = []
        for root in roots if self._subjects.since else ():
            part: list[tuple[str, str]] = []
            async for subject in self.blocks.older(root):
                _, queue, lane, own_id = self._subjects.split(subject)
                name = nats_name(lane).rpartition(".")[0]
                fits = filters.queue in (None, nats_name(queue)) and queue[0] != "@"
                if fits and filters.function in (None, name):
                    part.append((own_id, subject))
                if len(part) == NAMES_AT_ONCE:
                    parts.append(sorted(part, reverse=True))
                    part = []
            parts.append(sorted(part, reverse=True))
        places = heapq.merge(*parts, reverse=True)  # of one call its record is the last
        return (list(same)[-1] for _, same in itertools.groupby(places, lambda place: place[0]))

    async def _scope(self, filters: CallFilter) -> Scope:
        """Where to look for calls that match."""
        scope = Scope(roots=roots_of(filters))
        if filters.queue is not None:
            scope = scope._replace(queue=nats_token(filters.queue))
        if filters.function is not None:
            lanes = await self.blocks.lanes(filters.function)
            scope = scope._replace(lanes=lanes if len(lanes) <= MANY_LANES else ("*",))
        if filters.statuses == ("running",) and scope.lanes:
            return await self.blocks.lighter(scope, scope._replace(roots=RECORDS))
        return scope

    def _span(self, filters: CallFilter, before: int | None) -> Span:
        """The times that ids of matching calls may have: a schedule's have those of instants."""
        late_s = max((one.max_late for one in self._settings().schedules.values()), default=0.0)
        span = self.blocks.span((filters.since or 0.0) - late_s, filters.until or math.inf)
        if before is None:
            return span
        last = f"{min(before >> 80, 2**48 - 1):012x}"
        return span._replace(last=min(span.last, last))

    async def matching(
        self, filters: CallFilter, before: int | None, limit: int
    ) -> AsyncIterator[list[Stored]]:
        """Calls that match and are older than `before`, newest first, in batches.

        Among them are those that are past their time (see `is_past`).
        """
        if filters.call_id is not None:
            async for batch in self._calls.sharing(filters.call_id):
                yield self._fitting(batch, filters, before)
            return
        scope = await self._scope(filters)
        most = min(2 * limit, NAMED_SUBJECTS)
        texts = texts_of(filters)
        async for block in self.blocks.newest(scope, self._span(filters, before), most):
            yield self._fitting(await self._read_block(scope, block, texts), filters, before)
        older = await self._older(filters)
        while places := dict(itertools.islice(older, limit)):
            yield self._fitting(await self._read_all(places), filters, before)

    def _fitting(
        self, calls: Sequence[Stored], filters: CallFilter, before: int | None
    ) -> list[Stored]:
        """Those of these calls that match and are older than `before`."""
        now = self._calls.now()
        return [
            stored
            for stored in calls
            if (before is None or id_number(stored.call.id) < before)
            and matches(nats_record(stored.call, now), filters)
        ]

    async def waiting(self, queue: str) -> AsyncIterator[list[Stored]]:
        """Calls of a queue that have not ended, in batches."""
        scope = Scope(UNFINISHED, nats_token(queue))
        async for block in self.blocks.newest(scope, self.blocks.span(), MANY_NATS_REQUESTS):
            yield await self._read_block(scope, block)
        older = await self._older(CallFilter(queue=queue), UNFINISHED)
        while places := dict(itertools.islice(older, MANY_NATS_REQUESTS)):
            yield await self._read_all(places)

    async def shown(
        self, filters: CallFilter, before: int | None = None, limit: int = MANY_NATS_REQUESTS
    ) -> AsyncIterator[list[Stored]]:
        """As `matching`, without calls that are past their time."""
        async for batch in self.matching(filters, before, limit):
            yield [stored for stored in batch if not self._calls.is_past(stored.call)]

    async def _read_all(self, places: Mapping[str, str]) -> list[Stored]:
        """The calls at these places, or wherever they have gone since."""
        found = await self._unpack(await self.blocks.gather(multi_last=list(places.values())))
        for own_id in places.keys() - found.keys():
            if stored_now := await self._calls.current(own_id):
                found[own_id] = stored_now
        return [found[own_id] for own_id in places if own_id in found]

    async def _read_block(
        self, scope: Scope, block: str, texts: Sequence[Sequence[bytes]] = ()
    ) -> list[Stored]:
        """The calls of a block, newest first, from their records if they have some.

        Those that lack `texts` (see `texts_of`) may be left out.
        """
        found = await self._unpack(await self.blocks.read(scope, block), texts)
        if found and scope.roots == UNFINISHED:
            places = [self._subjects.record(stored.call) for stored in found.values()]
            for begin in range(0, len(places), NAMED_SUBJECTS):
                named = places[begin : begin + NAMED_SUBJECTS]
                found |= await self._unpack(await self.blocks.gather(multi_last=named))
        return [found[own_id] for own_id in sorted(found, reverse=True)]

    async def _unpack(
        self, messages: Sequence[NatsMessage], texts: Sequence[Sequence[bytes]] = ()
    ) -> dict[str, Stored]:
        """The calls in these messages, by id: from their records, or else from what waits."""
        found: dict[str, Stored] = {}
        for number, message in enumerate(messages):
            if number % CALLS_AT_ONCE == 0:
                await asyncio.sleep(0)
            if not has_texts(message.data, texts):
                continue
            headers = message.headers
            root, queue, _, own_id = self._subjects.split(headers["Nats-Subject"])
            if queue[0] == "@" or (root != "call" and own_id in found):
                continue
            seq = int(headers["Nats-Sequence"]) if root == "call" else None
            with contextlib.suppress(ValueError):  # It is no call of ours.
                found[own_id] = unpack_call(message.data, seq)
        return found

    async def page(self, filters: CallFilter, limit: int, cursor: str | None) -> Page:
        """See CallRecords. The cursor is an id as a number: the next page is older than that."""
        found: list[Stored] = []
        before = None if cursor is None else int(cursor)
        step = min(NAMED_SUBJECTS, max(BATCH // 5, limit + 1))
        async for batch in self.shown(filters, before, step):
            found += batch
            if len(found) > limit:
                break
        now = self._calls.now()
        records = [nats_record(stored.call, now) for stored in found[:limit]]
        if len(found) <= limit:
            return Page(records, None)
        return Page(records, str(id_number(records[-1].id)))


# --- NATS work ------------------------------------------------------------------------------------
# -- work


class NatsNews:
    """Tells our own daemon what has happened, and all others on the same stream."""

    def __init__(
        self, link: NatsLink, subjects: NatsSubjects, listener: Listener, changes: NatsChanges
    ) -> None:
        self.changes = changes
        self._link = link
        self._subjects = subjects
        self._listener = listener

    def wake(self, queue: str) -> None:
        """Tell that there may be something to claim in a queue."""
        self._listener.wake(queue)

    def stopped(self, receipt: NatsReceipt) -> None:
        """Tell that one of our own claims was cancelled."""
        self._listener.stop(receipt)

    def ended(self, ended: Ended) -> None:
        """Tell that a call has reached its end."""
        self._listener.final(ended)
        self.changes.ended(ended)

    def ended_elsewhere(self, ended: Sequence[Any]) -> None:
        """Tell our own daemon that a call has ended in another one."""
        self._listener.final(Ended(*ended)._replace(elsewhere=True))

    def tell(self, **news: object) -> None:
        """Tell other daemons something, if they can be reached."""
        tell_daemons(self._link, self._subjects, **news)


def nats_schedule(at: float, target: str) -> dict[str, str]:
    """The headers of a message that the server publishes to `target` at this time."""
    when = rfc3339(min(at, FAR_S))
    return {"Nats_Schedule": f"@at {when}", "Nats_Schedule_Target": target}


def cut_answer(parts: Parts, keep: int) -> Parts:
    """What is kept of an answer after its callback: all of a short one, to be sent again."""
    if len(parts.output) <= keep:
        return parts
    return parts._replace(answer_headers=b"", output=shorten(parts.output, keep))


def timeless(call: NatsCall) -> NatsCall:
    """A call without what differs when the same step is done again.

    By this a daemon recognizes the record that it has written, though the answer got lost.
    """
    return call._replace(due_at=0.0, completed_at=None, owner=None, failures=())


def retried_call(call: NatsCall, outcome: Outcome | None, now: float) -> NatsCall:
    """A call that is queued again; without an outcome, as if it had not been claimed."""
    if outcome is None:
        return call._replace(status="queued", attempts=call.attempts - 1)
    failures = (*call.failures, failure_of("attempt", call.attempts, outcome, now))
    return call._replace(
        status="queued",
        deadline_at=None,
        http_status=outcome.status,
        error=outcome.error,
        failures=failures[-MAX_FAILURES:],
    )


def retried_callback(call: NatsCall, outcome: Outcome | None, now: float) -> NatsCall:
    """A callback that is queued again; without an outcome, as if it had not been claimed."""
    if outcome is None:
        return call._replace(callback_attempts=call.callback_attempts - 1)
    failures = (*call.failures, failure_of("callback", call.callback_attempts, outcome, now))
    return call._replace(
        callback_http_status=outcome.status if outcome.answered else None,
        callback_error=outcome.error,
        failures=failures[-MAX_FAILURES:],
    )


class NatsMessages:
    """Stores work messages, and answers those that were delivered."""

    def __init__(
        self,
        link: NatsLink,
        subjects: NatsSubjects,
        consumers: NatsConsumers,
        lanes: NatsLanes,
        replies: NatsReplies,
        metrics: Metrics,
    ) -> None:
        self._link = link
        self._subjects = subjects
        self._consumers = consumers
        self._lanes = lanes
        self._replies = replies
        self._metrics = metrics

    async def store(
        self, root: str, stored: Stored, queue: str, lane: str, dedup: str | None = None
    ) -> bool:
        """Publish a work message ("work"), or one that becomes it when it is due ("later").

        `dedup` is its Nats-Msg-Id; None: the call is new, and its own id is that. False: it was
        stored before.
        """
        call = stored.call
        await self._consumers.ensure("work", queue, lane)
        subject = self._subjects.place(root, queue, lane, call.id)
        payload = pack_call(call, stored.parts, stored.seq)
        headers: dict[str, object] = {"Nats_Msg_Id": dedup or call.id}
        if root == "later":
            await self._consumers.ensure("later", queue, lane)
            headers |= nats_schedule(
                call.due_at, self._subjects.place("work", queue, lane, call.id)
            )
        elif dedup is None:
            headers["Nats_Expected_Last_Subject_Sequence"] = 0
        try:
            seq = await self._link.publish(subject, payload, **headers)
        except NatsChanged:  # The server has forgotten its Nats-Msg-Id since.
            return False
        if root == "later":
            self._lanes.expect_later(queue, lane)
        else:
            self._lanes.expect(queue, lane, seq)
        return seq > 0

    async def put_aside(self, stored: Stored) -> None:
        """Store a call that waits for its key: it is counted and found, and not handed out."""
        call = stored.call
        lane = call.lane + ASIDE
        await self._consumers.ensure("later", call.queue, lane)
        place = self._subjects.place("later", call.queue, lane, call.id)
        await self._link.publish(place, pack_call(call, stored.parts, stored.seq))

    async def later(self, stored: Stored, queue: str, lane: str) -> None:
        """Have a call or callback delivered again when it is due."""
        await self.store("later", stored, queue, lane, f"{stored.call.id}-{stored.seq}")

    def ack(self, delivery: Delivery) -> None:
        """Say that the work is done: its message is deleted."""
        self._replies.ack(delivery)

    async def callback(self, stored: Stored) -> None:
        """Store the work message of a callback, after the record that says it is pending."""
        lane = callback_lane(stored.call.callback_target or "")
        bare = stored._replace(parts=Parts())
        await self.store("work", bare, CALLBACKS, lane, f"{stored.call.id}-{stored.seq}")

    async def deadline(self, call: NatsCall) -> None:
        """Have a message come at the time by which a call has to have started."""
        if call.deadline_at is not None:
            place = self._subjects.deadline("later", call.id)
            target = self._subjects.deadline("work", call.id)
            schedule = nats_schedule(call.deadline_at, target)
            await self._link.publish(place, b"{}", **schedule)

    async def forget_deadline(self, call: NatsCall) -> None:
        """Have no message come at a deadline that was kept, which may be years ahead."""
        if call.deadline_at is not None:
            place, stream = self._subjects.deadline("later", call.id), self._lanes.stream
            with contextlib.suppress(StoreError):  # Then one comes, and leads to nothing.
                if found := await last_message(self._link, stream, place, direct=False):
                    await delete_message(self._link, stream, found[1])

    async def answer_unacked(
        self, queue: str, name: str, seq: int, count: int, verb: bytes
    ) -> None:
        """Ack a message that a dead daemon has, or have it delivered again before all that wait.

        `count` is how many messages its consumer has sent.
        """
        turns = self._lanes.queues[queue]
        lane = turns.lanes[name]
        if verb == NAK:
            lane.given_back.add(seq)
            turns.ready[name] = lane
        place = f"{self._lanes.stream}.{lane.consumer}"
        await self._link.request(f"$JS.ACK.{place}.1.{seq}.{count}.0.0", verb)

    async def store_again(self, queue: str, name: str, message: WorkMessage) -> None:
        """Store a message once more, behind those that wait, unless it has changed."""
        with contextlib.suppress(NatsRefused):
            subject, seq, data = message
            if again := await store_over(self._link, subject, data, seq):
                self._lanes.expect(queue, name, again)

    def forget(self, queue: str, name: str, own_id: str) -> None:
        """Drop a message that was sent to us and is not to be claimed any more."""
        if lane := self._lanes.queues[queue].lanes.get(name):
            lane.inbox.drop(own_id)

    def put_off(self, delivery: Delivery, delay_s: float) -> None:
        """Have a message delivered again after a while."""
        self._replies.put_off(delivery, delay_s)

    async def set_aside(self, delivery: Delivery, why: object) -> None:
        """Log, count and delete a message that nobody can do anything with."""
        tell_set_aside(self._metrics, delivery.subject, why)
        self._link.send(delivery.reply, b"+TERM")

    async def answer(self, lane: NatsLane, delivery: Delivery, verb: bytes | None) -> None:
        """Ack a message, or have it delivered again: at once, or without a verb after a moment."""
        if verb == NAK:
            await self._lanes.give_back(lane, delivery)
        elif verb == ACK:
            self.ack(delivery)
        else:
            self.put_off(delivery, CLAIM_AGAIN_S)

    async def give_back(self, queue: str, name: str, delivery: Delivery) -> None:
        """Have a message delivered again, to us or another daemon."""
        await self._lanes.give_back(self._lanes.queues[queue].lanes[name], delivery)


# --- NATS limits ----------------------------------------------------------------------------------
# -- keys

# Of a function's calls with one concurrency key, at most one has it: a message names that call. Its
# work message stays un-acked until the key is passed on, so what a crash leaves undone is done at
# the redelivery. A call that finds the key taken is put aside, and gets a place in the line: a
# message, whose sequence is the place.

PLACE_IN_LINE = ("id", "queue", "lane")  # of the call: what the message of a place has
KEY_GRACE_S = 10.0  # in which a call that has ended passes its key on


def key_token(call: NatsCall) -> str:
    """A function's concurrency key as one token of a subject."""
    place = f"{call.lane} {call.concurrency_key}"
    return hashlib.blake2b(place.encode(), digest_size=16).hexdigest()


class NatsKeys:
    """Decides which call has a concurrency key, and which is next."""

    def __init__(
        self,
        link: NatsLink,
        subjects: NatsSubjects,
        stream: str,
        calls: NatsCalls,
        messages: NatsMessages,
    ) -> None:
        self._link = link
        self._subjects = subjects
        self._stream = stream
        self._calls = calls
        self._messages = messages

    async def take(self, call: NatsCall) -> bool:
        """Have a call that is claimed take its key. False: another one has it."""
        if call.concurrency_key is None:
            return True
        key = key_token(call)
        seq = 0
        while not await self._name(key, call.id, "", seq):
            note = await self._holder(key)
            seq = note.seq if note else 0
            if note is None:
                continue
            if note.document["id"] == call.id:
                return True
            if not await self._is_left(note.document["id"]):
                return False
        return True

    async def _holder(self, key: str) -> Note | None:
        """The note on which call has a key; None: none has."""
        return await self._calls.noted(self._subjects.key_holder(key), "id", "after")

    async def _name(self, key: str, own_id: str, after: str, seq: int) -> int:
        """Write which call has a key, and after which one. 0: it has changed since `seq`."""
        body = json.dumps({"id": own_id, "after": after}).encode()
        return await store_over(self._link, self._subjects.key_holder(key), body, seq)

    async def _is_left(self, own_id: str) -> bool:
        """Whether a call has ended, or is gone, and has not passed its key on."""
        stored = await self._calls.anywhere(own_id)
        return stored is None or self._is_over(stored.call)

    def _is_over(self, call: NatsCall) -> bool:
        """Whether a call has ended so long ago that it can't have its key any more."""
        ended_at = call.completed_at
        return ended_at is not None and ended_at < self._calls.now() - KEY_GRACE_S

    async def line_up(self, stored: Stored) -> None:
        """Have a call wait for its key. After that its work message is to be acked."""
        call = stored.call
        key = key_token(call)
        await self._messages.put_aside(stored)
        body = json.dumps({"id": call.id, "queue": call.queue, "lane": call.lane}).encode()
        # Unless it has its place already.
        await store_over(self._link, self._subjects.key_line(key, call.id), body, 0)
        if await self._holder(key) is None:  # It has become free meanwhile.
            await self._pass_on(key, "", None)

    async def release(self, call: NatsCall) -> None:
        """Pass the key of a call on, if it has one; done again after a crash, it does the rest."""
        if call.concurrency_key is None:
            return
        key = key_token(call)
        note = await self._holder(key)
        if note is None:
            return
        if note.document["id"] == call.id:
            await self._pass_on(key, call.id, note)
        elif note.document["after"] == call.id:
            line = self._subjects.key_line(key, note.document["id"])
            if place := await self._calls.noted(line, *PLACE_IN_LINE):
                await self._hand_out(key, place)

    async def is_kept(self, call: NatsCall) -> bool:
        """Whether a call that has ended has its key: it was cancelled, and has not stopped yet."""
        if call.concurrency_key is None:
            return False
        note = await self._holder(key_token(call))
        return note is not None and note.document["id"] == call.id and not self._is_over(call)

    async def stopped(self, claim: Claim) -> None:
        """Pass on the key of a call that was cancelled while it ran: it has stopped now."""
        if claim.concurrency_key is not None:
            stored = await self._calls.anywhere(claim.id)
            if stored is not None and stored.call.status in FINAL:
                await self.release(stored.call)

    async def look_after(self) -> None:
        """At a start, pass on keys that were left behind."""
        held = set()
        for subject in await self._calls.subjects(self._subjects.key_holder("*")):
            key = subject.rpartition(".")[2]
            held.add(key)
            note = await self._holder(key)
            if note is not None and await self._is_left(note.document["id"]):
                await self._pass_on(key, note.document["id"], note)
        for subject in await self._calls.subjects(self._subjects.key_line("*", "*")):
            key = subject.split(".")[-2]
            if key not in held:
                await self._pass_on(key, "", None)

    async def _pass_on(self, key: str, holder: str, note: Note | None) -> None:
        """Give a key to the first call in the line, or free it.

        `holder` has it so far, as `note` says; "" and None: nobody has.
        """
        while True:
            place = await self._first(key)
            if place is None and note is None:
                return
            if place is None:
                await delete_message(self._link, self._stream, note.seq if note else 0)
                note = None  # Whoever lined up meanwhile saw it taken: look once more.
            elif note is not None and place.document["id"] == note.document["id"]:
                await self._calls.purge(self._subjects.key_line(key, place.document["id"]))
            else:
                heir = place.document["id"]
                seq = await self._name(key, heir, holder, note.seq if note else 0)
                if not seq or await self._hand_out(key, place):
                    return
                note = Note(seq, {"id": heir})  # That one waits no more: try the next.

    async def _first(self, key: str) -> Note | None:
        """The first place in the line."""
        pattern = self._subjects.key_line(key, "*")
        body = json.dumps({"next_by_subj": pattern, "seq": 1}).encode()
        while True:
            message = await self._link.request(f"$JS.API.DIRECT.GET.{self._stream}", body)
            headers = message.headers
            if "Status" in headers:
                return None
            place_in_line = (headers["Nats-Subject"], int(headers["Nats-Sequence"]), message.data)
            if note := await self._calls.strays.note(*place_in_line, PLACE_IN_LINE):
                return note

    async def _hand_out(self, key: str, place: Note) -> bool:
        """Have a call that waited for a key claimed. False: it does not wait any more."""
        document = place.document
        aside = self._subjects.later(document["queue"], document["id"])
        stored = await self._calls.read(aside)
        if stored is not None:
            dedup = f"{document['id']}-{place.seq}"
            await self._messages.store("work", stored, document["queue"], document["lane"], dedup)
            await self._calls.purge(aside)
        await self._calls.purge(self._subjects.key_line(key, document["id"]))
        return stored is not None


# -- rates


class NatsRates:
    """When the next call may start, for each queue and lane with a rate: a message that all daemons
    share. The server deletes it once that time has passed.
    """

    def __init__(
        self, link: NatsLink, subjects: NatsSubjects, calls: NatsCalls, wake: Tell[str]
    ) -> None:
        self._link = link
        self._subjects = subjects
        self._calls = calls
        self._wake = wake
        self._known: dict[str, tuple[int, float]] = {}  # sequence and next start, as read last
        self._timers: dict[str, asyncio.TimerHandle] = {}  # by queue

    async def start(self, name: str, rate: Rate, wanted: int) -> int:
        """Count as many calls as started as may start now, up to `wanted`; how many."""
        while True:
            seq, next_at = self._known.get(name, (0, 0.0))
            now = self._calls.now()
            number = min(wanted, starts_now(rate, next_at, now))
            if number <= 0 or await self._write(name, seq, next_start(rate, next_at, number, now)):
                return max(0, number)

    async def start_one(self, name: str, rate: Rate) -> float:
        """See WorkQueue.start."""
        started = await self.start(name, rate, 1)
        return 0.0 if started else max(0.001, self.wait_s(name, rate))

    async def take_back(self, name: str, rate: Rate, number: int) -> None:
        """Count calls out that have not started after all."""
        while number > 0:
            seq, next_at = self._known.get(name, (0, 0.0))
            if await self._write(name, seq, next_at - number * rate.interval_s):
                return

    async def _write(self, name: str, seq: int, next_at: float) -> bool:
        """Write when the next call may start. False: another daemon has; that was read."""
        place = self._subjects.slot("@rate", nats_token(name))
        ttl = f"{2 + max(0, round(next_at - self._calls.now()))}s"
        body = json.dumps({"next_at": next_at}).encode()
        if new := await store_over(self._link, place, body, seq, Nats_TTL=ttl):
            self._known[name] = (new, next_at)
            return True
        note = await self._calls.noted(place, "next_at")
        self._known[name] = (note.seq, note.document["next_at"]) if note else (0, 0.0)
        return False

    def wait_s(self, name: str, rate: Rate) -> float:
        """In how many seconds the next call may start, as far as is known; 0 or less: now."""
        now = self._calls.now()
        return first_start(rate, self._known.get(name, (0, 0.0))[1], now) - now

    def wake_in(self, queue: str, delay_s: float) -> None:
        """Wake a queue after this time."""
        if timer := self._timers.pop(queue, None):
            timer.cancel()
        loop = asyncio.get_running_loop()
        self._timers[queue] = loop.call_later(delay_s, self._wake, queue)


# --- NATS outcomes --------------------------------------------------------------------------------
# What is stored for a call, in this order. After a crash in between, the work message is delivered
# again, and whoever gets it does the rest by the record.
#
#     enqueue  notes (key, call id), work message, message of its deadline
#     claim    record (running)
#     end      record (final; its callback pending), callback's work message, notes, key, ack
#     retry    record (queued), message for later, key, ack
#     cancel   record (cancelled), notes, key, work message deleted
#     redrive  work message, record (queued)


def nats_ended(call: NatsCall) -> Ended:
    """What is told of a call that has reached its end."""
    return Ended(
        id=call.id,
        call_id=call.call_id,
        function=call.function,
        status=call.status,
        attempts=call.attempts,
        duration_s=call.duration_s,
        http_status=call.http_status,
        error=call.error,
        queue=call.queue,
        lane=call.lane,
    )


class NatsEnds:
    """Stores what becomes of a claim.

    Each step may be repeated: a crash before the ack leads to another delivery, which finds in the
    record how far it was.
    """

    def __init__(
        self,
        settings: Settings,
        calls: NatsCalls,
        messages: NatsMessages,
        news: NatsNews,
        keys: NatsKeys,
    ) -> None:
        self.keys = keys
        self._settings = settings
        self._calls = calls
        self._messages = messages
        self._news = news
        self._one_by_one = asyncio.Lock()  # for writes while only callbacks have room

    async def _write(
        self, held: Held, call: NatsCall, parts: Parts, keep_s: float | None = None
    ) -> int | None:
        """Write what became of a claim; the record's sequence. None: it was not ours any more."""
        if self._calls.room.spent and held.queue != CALLBACKS and not call.finished:
            async with self._one_by_one:
                await self._require_room(held, parts)
                return await self._write_now(held, call, parts, keep_s)
        return await self._write_now(held, call, parts, keep_s)

    async def _require_room(self, held: Held, parts: Parts) -> None:
        """Raise StoreError if what becomes of a call would take room that callbacks need.

        What is stored already, and only its answer got lost, has its room.
        """
        record = await self._calls.record_of(held.stored.call)
        if record is not None and record.seq == held.stored.seq:
            await self._calls.require_room(len(held.delivery.data) + sum(map(len, parts)))

    async def _write_now(
        self, held: Held, call: NatsCall, parts: Parts, keep_s: float | None
    ) -> int | None:
        was = held.stored
        accepted = was.accepted if call[:FATE] == was.call[:FATE] else ""
        try:
            return await self._calls.write(call, parts, was.seq, keep_s, accepted)
        except NatsChanged:
            record = await self._calls.record_of(call)
            if record is None:
                return None
            if record.seq == was.seq:  # What had replaced it was no record, and is set aside.
                return await self._calls.write(call, parts, record.seq, keep_s)
            return record.seq if timeless(record.call) == timeless(call) else None

    async def complete(self, held: Held, outcome: Outcome, status: str) -> bool:
        """Make a call final."""
        keep = self._calls.keep_output
        now = self._calls.now()
        call = ended_call(held.stored.call, outcome, status, now)
        headers = describing_headers(outcome.headers) if outcome.size <= keep else b""
        answer = Parts(
            answer_headers=headers,
            output=shorten(outcome.body, keep),
            stderr=shorten(outcome.stderr, keep),
        )
        parts = with_request(answer, held.stored.parts)
        if call.callback_target:  # which needs the whole answer
            call = call._replace(callback_status="pending", due_at=now)
            headers = pack_headers(outcome.headers)
            parts = parts._replace(answer_headers=headers, output=outcome.body)
        if status == "success" and len(parts.body) > keep:
            parts = with_request(parts, Parts())
        call, parts = self._calls.fit(call, parts, len(held.delivery.data))
        seq = await self._write(held, call, parts, self._keep_s(call))
        if seq is None:
            return False
        await self.finish(Stored(seq, call, parts), held.delivery)
        self._news.ended(nats_ended(call))
        return True

    def _keep_s(self, call: NatsCall) -> float | None:
        """How long a record is kept; None while its callback is pending."""
        return self._calls.kept_s(call) if call.finished else None

    async def finish(self, stored: Stored, delivery: Delivery | None) -> None:
        """Do what follows from a final record; after a crash once more."""
        call = stored.call
        claimed = call.owner is not None or call.callback_attempts
        if call.callback_status == "pending" and not claimed:
            await self._messages.callback(stored)
        if call.call_id != call.id or call.idempotency_key is not None:
            await self._calls.keep_notes(call)
        if call.concurrency_key is not None:
            await self.keys.release(call)
        if delivery is not None:
            self._messages.ack(delivery)

    async def deliver(self, held: Held, outcome: Outcome, status: str) -> bool:
        """Make a callback final."""
        call = held.stored.call._replace(
            callback_status=status,
            callback_http_status=outcome.status if outcome.answered else None,
            callback_error=outcome.error,
            owner=None,
        )
        parts = cut_answer(held.stored.parts, self._calls.keep_output)
        call, parts = self._calls.fit(call, parts, len(held.delivery.data))
        if await self._write(held, call, parts, self._keep_s(call)) is None:
            return False
        self._messages.ack(held.delivery)
        return True

    async def retry(self, held: Held, outcome: Outcome | None, delay_s: float) -> bool:
        """Queue a call or a callback again."""
        call, parts = held.stored.call, held.stored.parts
        call = call._replace(due_at=self._calls.now() + delay_s, owner=None)
        if held.queue == CALLBACKS:
            call = retried_callback(call, outcome, self._calls.now())
        else:
            call = retried_call(call, outcome, self._calls.now())
            keep = self._calls.keep_output
            if outcome is not None:
                answer = Parts(
                    output=shorten(outcome.body, keep), stderr=shorten(outcome.stderr, keep)
                )
                if not self._calls.fit(call, with_request(answer, parts))[1].has_request:
                    answer = Parts()
                parts = with_request(answer, parts)
        is_call = held.queue != CALLBACKS
        kept = with_request(parts, Parts()) if is_call else parts
        seq = await self._write(held, call, kept)
        if seq is None:
            return False
        if delay_s <= 0 and outcome is None:
            await self._messages.give_back(held.queue, held.lane, held.delivery)
            await self._messages.deadline(call)
            self._news.wake(held.queue)
            return True
        if outcome is None:
            await self._messages.deadline(call)
        again = Stored(seq, call, parts if is_call else Parts())
        if delay_s <= 0:
            await self._messages.store("work", again, held.queue, held.lane, f"{call.id}-{seq}")
        else:
            await self._messages.later(again, held.queue, held.lane)
        if is_call:
            await self.keys.release(call)
        self._messages.ack(held.delivery)
        return True

    async def callback_interrupted(self, record: Stored) -> bytes:
        """After a daemon has died while it sent a callback; how to answer its message.

        Raises NatsRefused.
        """
        call = record.call._replace(owner=None)
        if call.callback_attempts < self._settings().callback.attempts:
            await self._calls.write(call, record.parts, record.seq)
            return NAK
        call = call._replace(
            callback_status="failed",
            callback_error="interrupted: the daemon died while it was sent",
        )
        parts = cut_answer(record.parts, self._calls.keep_output)
        await self._calls.write(call, parts, record.seq, self._keep_s(call))
        return ACK

    async def expire(self, stored: Stored) -> bool:
        """End a call that has not started before its deadline."""
        return await self.give_up(stored, "timeout", "not started before its X-Deadline")

    async def give_up(self, stored: Stored, status: str, error: str) -> bool:
        """End a call that does not run. False: it has changed."""
        call = stored.call._replace(
            status=status,
            http_status=None,
            error=error,
            completed_at=self._calls.now(),
            due_at=self._calls.now(),
            deadline_at=None,
            owner=None,
        )
        if call.callback_target:
            call = call._replace(callback_status="pending")
        try:
            seq = await self._calls.write(call, stored.parts, stored.seq, self._keep_s(call))
        except NatsChanged:
            return False
        await self.finish(Stored(seq, call, stored.parts), None)
        self._news.ended(nats_ended(call))
        return True


# --- NATS owners ----------------------------------------------------------------------------------
# Which daemon has claimed what.


def process_id() -> str:
    """A unique name of this process: hash of boot and namespace, PID, start time, random bits."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # no Linux
        boot = space = new_id()
    machine = hashlib.blake2b(f"{boot} {space}".encode(), digest_size=8).hexdigest()
    return f"{machine}-{os.getpid()}-{process_start(os.getpid())}-{new_id()[-12:]}"


def process_start(pid: int) -> str:
    """When a process has started (proc(5): field 22 of stat); "": there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def has_died(owner: str, us: str) -> bool:
    """Whether the process of this name was on our machine, and is not there any more."""
    machine, pid, start, _ = f"{owner}---".split("-", 3)
    if machine != us.partition("-")[0]:
        return False
    former = int(pid) == os.getpid()  # A queue of this process that is not open any more.
    return former or process_start(int(pid)) != start


class NatsHoldings:
    """What this daemon has claimed."""

    def __init__(self) -> None:
        self.owner = process_id()
        self.held: dict[str, Held] = {}  # by id
        self.beginning: set[str] = set()  # ids of calls whose claim is being stored
        self.busy: set[str] = set()  # ids of claims whose end is being stored

    def __contains__(self, own_id: object) -> bool:
        return own_id in self.held or own_id in self.busy or own_id in self.beginning

    def hold(self, held: Held) -> None:
        """Hold a claim that was made."""
        self.held[held.stored.call.id] = held

    def release(self, receipt: Hashable) -> Held | None:
        """Take a claim out, if it is still valid."""
        if isinstance(receipt, NatsReceipt):
            held = self.held.get(receipt.id)
            if held is not None and held.stored.seq == receipt.seq:
                return self.held.pop(receipt.id)
        return None

    async def settle(self, claim: Claim, end: Callable[[Held], Awaitable[bool]]) -> bool:
        """End a claim. False: it is not valid any more."""
        held = self.release(claim.receipt)
        if held is None:
            return False
        self.busy.add(claim.id)
        try:
            return await end(held)
        except BaseException:  # It may be tried again.
            self.held.setdefault(claim.id, held)
            raise
        finally:
            self.busy.discard(claim.id)


class NatsOwners:
    """Who has claimed what, and is still there."""

    def __init__(
        self,
        link: NatsLink,
        subjects: NatsSubjects,
        settings: Settings,
        holdings: NatsHoldings,
        messages: NatsMessages,
    ) -> None:
        self._link = link
        self._subjects = subjects
        self._settings = settings
        self._holdings = holdings
        self._messages = messages

    async def has_lost(self, call: NatsCall, delivery: Delivery) -> bool:
        """Whether the daemon that has claimed a call does not have it any more.

        If it may have, the message is put off, to ask again later.
        """
        owner = call.owner or ""
        if owner == self._holdings.owner:
            return not await self._is_ours(call.id, delivery)
        if has_died(owner, self._holdings.owner) or await self._denies(owner, call.id, delivery):
            return True
        wait_s = self._settings().queue(call.queue).ack_wait
        wait_s = wait_s if self._link.age_s > SETTLED_S else min(wait_s, SETTLED_S)
        self._messages.put_off(delivery, wait_s)
        return False

    async def _is_ours(self, own_id: str, delivery: Delivery) -> bool:
        """Whether we have a call. Then this is the message to be acked in the end: that which we
        had was stored again, or the server has forgotten that it was sent to us.
        """
        if own_id in self._holdings.held:
            held = self._holdings.held[own_id]
            self._holdings.hold(held._replace(delivery=delivery))
            return True
        if own_id in self._holdings.busy:
            self._messages.put_off(delivery, CLAIM_AGAIN_S)
            return True
        return False

    async def _denies(self, owner: str, own_id: str, delivery: Delivery) -> bool:
        """Whether another daemon says that it does not have a call.

        One that does not answer may be frozen, or cut off for a moment. It has lost the call if the
        lease is over, which the message then shows by coming again, and if all daemons have had the
        time to connect since the servers were away.
        """
        with contextlib.suppress(StoreError):
            place = self._subjects.owner(owner)
            answer = await self._link.request(place, own_id.encode(), timeout_s=1.0)
            if answer.data:
                return bool(answer.data != b"1")
        return delivery.again and self._link.age_s > SETTLED_S


# --- NATS claims ----------------------------------------------------------------------------------
# -- slots


class NatsSlots:
    """The slots of queues with `max_inflight_global`, which daemons share: a running call has one.

    A slot is a message; the server deletes it when its owner has not renewed it for a lease.
    """

    def __init__(
        self,
        link: NatsLink,
        subjects: NatsSubjects,
        settings: Settings,
        calls: NatsCalls,
        news: NatsNews,
        owner: str,
    ) -> None:
        self._link = link
        self._subjects = subjects
        self._settings = settings
        self._calls = calls
        self._news = news
        self._owner = owner
        self._seqs: dict[tuple[str, int], int] = {}  # sequences of our slots, by queue and number
        self._changing = asyncio.Lock()  # so that none is renewed while it is given back
        self._used: dict[str, tuple[str, int]] = {}  # queue and number, by the id of the call

    def limit(self, queue: str) -> int | None:
        """How many slots a queue has; None: it has no such limit."""
        return self._settings().queue(queue).max_inflight_global

    async def take(self, queue: str, wanted: int) -> list[int]:
        """Up to this many slots of a queue."""
        most = self.limit(queue) or 0
        pattern = self._subjects.slot(queue, "*")
        subjects = await self._calls.subjects(pattern)
        names = [subject.rpartition(".")[2] for subject in subjects]
        taken = {int(name) for name in names if name.isdecimal()}
        found: list[int] = []
        for number in range(most):
            if len(found) == wanted:
                break
            seq = 0
            if number in taken:
                if (queue, number) in self._seqs:
                    continue
                seq = await self._left_behind(queue, number)
            if seq >= 0 and await self._put(queue, number, seq):
                found.append(number)
        return found

    async def _left_behind(self, queue: str, number: int) -> int:
        """The sequence of a slot whose owner has died; 0: it is free by now; -1: it is in use."""
        note = await self._calls.noted(self._subjects.slot(queue, number), "owner")
        if note is None:
            return 0
        return note.seq if has_died(note.document["owner"], self._owner) else -1

    async def _put(self, queue: str, number: int, seq: int) -> bool:
        place = self._subjects.slot(queue, number)
        body = json.dumps({"owner": self._owner}).encode()
        ttl = f"{max(1, round(self._settings().queue(queue).ack_wait))}s"
        new = await store_over(self._link, place, body, seq, Nats_TTL=ttl)
        if new:
            self._seqs[queue, number] = new
        return new > 0

    def use(self, queue: str, number: int, own_id: str) -> None:
        """Note in which slot a call runs."""
        self._used[own_id] = (queue, number)

    async def free(self, own_id: str) -> None:
        """Free the slot of a call that has ended, if it has one."""
        if slot := self._used.pop(own_id, None):
            await self.give_back(*slot)

    async def give_back(self, queue: str, number: int) -> None:
        """Give a slot back, and have other daemons told."""
        stream = self._settings().nats.stream
        with contextlib.suppress(StoreError):  # Then its lease runs out.
            async with self._changing:
                await delete_message(self._link, stream, self._seqs.pop((queue, number), 0))
            self._news.tell(wake=queue)

    async def renew(self) -> None:
        """Extend the leases of our slots."""
        for queue, number in list(self._seqs):
            async with self._changing:
                seq = self._seqs.get((queue, number))
                if seq is not None and not await self._put(queue, number, seq):
                    del self._seqs[queue, number]


# -- what this daemon has claimed


class NewClaim(NamedTuple):
    """A claim that is being stored, of a call that nobody has had before, by its message."""

    lane: NatsLane
    delivery: Delivery
    stored: Stored  # the call as it runs, the rest as its message has it
    written: Awaitable[int]  # the sequence of its record


class NatsStarts:
    """Writes that calls run, and holds the claims."""

    def __init__(self, calls: NatsCalls, holdings: NatsHoldings) -> None:
        self._calls = calls
        self._holdings = holdings

    def running(self, call: NatsCall) -> NatsCall:
        """A queued call as it runs here."""
        return started_call(call, self._holdings.owner, self._calls.now())

    def attempt(self, lane: NatsLane, delivery: Delivery) -> NewClaim | None:
        """Begin to claim a call by its message alone. None: NatsClaims.begin has to do it.

        Raises StoreError.
        """
        if lane.queue == CALLBACKS or delivery.id in self._holdings.beginning:
            return None
        try:
            stored = unpack_call(delivery.data)
        except ValueError:
            return None
        call = stored.call
        if call.concurrency_key is not None or call.deadline_at is not None:
            return None
        call = self.running(call)
        kept = with_request(stored.parts, Parts())
        written = self._calls.write(call, kept, stored.seq, accepted=stored.accepted)
        self._holdings.beginning.add(delivery.id)
        return NewClaim(lane, delivery, stored._replace(call=call), written)

    async def conclude(self, attempt: NewClaim) -> Claim:
        """Hold a call once its record is written. Raises NatsChanged, StoreError."""
        lane, delivery, (_, call, parts, accepted), written = attempt
        try:
            return self.hold(lane, delivery, Stored(await written, call, parts, accepted))
        finally:
            self._holdings.beginning.discard(delivery.id)

    def hold(self, lane: NatsLane, delivery: Delivery, stored: Stored) -> Claim:
        """Hold a call or callback that is ours by its record."""
        held = Held(delivery, stored, lane.queue, lane.name)
        self._holdings.hold(held)
        return nats_claim(held)


class NatsClaims:
    """Makes claims, and ends them."""

    def __init__(
        self,
        settings: Settings,
        calls: NatsCalls,
        messages: NatsMessages,
        ends: NatsEnds,
        holdings: NatsHoldings,
        owners: NatsOwners,
    ) -> None:
        self.keys = ends.keys
        self.holdings = holdings
        self.starts = NatsStarts(calls, holdings)
        self._settings = settings
        self._calls = calls
        self._messages = messages
        self._ends = ends
        self._owners = owners

    def most(self, queue: str, wanted: int) -> int:
        """How many claims may be made, up to `wanted`.

        While servers have room for callbacks only, one call of a queue runs at a time: it leaves
        less than it took.
        """
        if queue == CALLBACKS or not self._calls.room.spent:
            return wanted
        running = any(held.queue == queue for held in self.holdings.held.values())
        return min(wanted, int(not running))

    async def begin(self, lane: NatsLane, delivery: Delivery, fresh: bool) -> Claim | None:
        """Claim a call, or a callback. None: somebody else has it, or nothing is left to be done.

        `fresh`: its message is trusted first, and its record read only if that was wrong.
        """
        own_id = delivery.id
        if own_id in self.holdings.beginning:  # What its record says of us is not settled yet.
            self._messages.put_off(delivery, CLAIM_AGAIN_S)
            return None
        self.holdings.beginning.add(own_id)
        try:
            return await self._begin(lane, delivery, fresh and lane.queue != CALLBACKS)
        finally:
            self.holdings.beginning.discard(own_id)

    async def _begin(self, lane: NatsLane, delivery: Delivery, fresh: bool) -> Claim | None:
        try:
            stored = unpack_call(delivery.data)
        except ValueError as exc:
            await self._messages.set_aside(delivery, exc)
            return None
        request = stored.parts
        is_call = lane.queue != CALLBACKS
        fresh = fresh and not self._is_late(stored.call)  # It may have started in time.
        while True:
            record = None if fresh else await self._calls.record_of(stored.call)
            if record is not None:
                stored = record
                claimed = await self._follow(lane, record, delivery, request)
            else:
                stored = stored if fresh else stored._replace(seq=0)
                claimed = await self._started(stored, delivery, None)
            fresh = False
            if claimed is None:
                return None
            kept = with_request(stored.parts, Parts()) if is_call else stored.parts
            parts = with_request(stored.parts, request) if is_call else stored.parts
            if is_call and not await self.keys.take(claimed):
                await self.keys.line_up(stored._replace(parts=parts))
                self._messages.ack(delivery)
                return None
            try:
                seq = await self._calls.write(claimed, kept, stored.seq)
            except NatsChanged:
                continue
            claim = self.starts.hold(lane, delivery, Stored(seq, claimed, parts))
            await self._messages.forget_deadline(claimed)
            return claim

    async def _follow(
        self, lane: NatsLane, record: Stored, delivery: Delivery, request: Parts
    ) -> NatsCall | None:
        """The call as it is to run, by its record. None: it is not to; its message is answered."""
        call = record.call
        if lane.queue == CALLBACKS:
            return await self._follow_callback(lane, record, delivery)
        if call.status in FINAL:
            await self._ends.finish(record, delivery)
            return None
        if call.status == "queued":
            if call.due_at > self._calls.now():
                again = Stored(record.seq, call, with_request(record.parts, request))
                await self._messages.later(again, call.queue, call.lane)
                await self.keys.release(call)
                self._messages.ack(delivery)
                return None
            return await self._started(record, delivery, request)
        if await self._owners.has_lost(call, delivery):
            if call.owner == self.holdings.owner:  # We claimed it, and the answer got lost: run it.
                return call
            await self._messages.answer(lane, delivery, await self.interrupted(record, request))
        return None

    async def _follow_callback(
        self, lane: NatsLane, record: Stored, delivery: Delivery
    ) -> NatsCall | None:
        call = record.call
        if call.callback_status != "pending":
            self._messages.ack(delivery)
            return None
        if call.owner == self.holdings.owner and await self._owners.has_lost(call, delivery):
            return call  # We claimed it, and the answer got lost: it was never sent.
        if call.owner is not None:
            if await self._owners.has_lost(call, delivery):
                await self._messages.answer(lane, delivery, await self.callback_interrupted(record))
            return None
        return call._replace(
            callback_attempts=call.callback_attempts + 1, owner=self.holdings.owner
        )

    async def _started(
        self, stored: Stored, delivery: Delivery, request: Parts | None
    ) -> NatsCall | None:
        """A queued call as it is to run. None: it has missed its deadline, and is ended."""
        if self._is_late(stored.call):
            parts = stored.parts if request is None else with_request(stored.parts, request)
            if await self._ends.expire(stored._replace(parts=parts)):
                self._messages.ack(delivery)
            else:  # Somebody else has written its record, and may need this message.
                self._messages.put_off(delivery, CLAIM_AGAIN_S)
            return None
        return self.starts.running(stored.call)

    def _is_late(self, call: NatsCall) -> bool:
        """Whether the deadline has passed by which a call has to have started."""
        return call.deadline_at is not None and call.deadline_at <= self._calls.now()

    async def callback_interrupted(self, record: Stored) -> bytes | None:
        """Queue a callback again that a dead daemon had claimed; how to answer its message.

        None: somebody else was first.
        """
        try:
            return await self._ends.callback_interrupted(record)
        except NatsChanged:
            return None

    async def interrupted(self, record: Stored, request: Parts) -> bytes | None:
        """Queue a call again that a dead daemon had claimed; how to answer its message.

        It may be what the daemon died of: it goes behind those that wait, or ends. None: somebody
        else was first.
        """
        call = record.call._replace(
            status="queued",
            interrupted=record.call.interrupted + 1,
            deadline_at=None,
            due_at=self._calls.now(),
            owner=None,
        )
        parts = with_request(record.parts, request)
        try:
            if call.interrupted >= self._settings().max_interruptions(call.function):
                error = f"interrupted {call.interrupted} times: the daemon died each time"
                again = Stored(record.seq, call, parts)
                ended = await self._ends.give_up(again, "error", f"{error} while it ran")
                return ACK if ended else None
            seq = await self._calls.write(call, record.parts, record.seq)
        except NatsChanged:
            return None
        again = Stored(seq, call, parts)
        await self._messages.store("work", again, call.queue, call.lane, f"{call.id}-{seq}")
        await self.keys.release(call)
        return ACK

    async def complete(self, claim: Claim, outcome: Outcome, status: str) -> bool:
        """See WorkQueue."""
        end = self._ends.deliver if claim.queue == CALLBACKS else self._ends.complete
        return await self._settle(claim, lambda held: end(held, outcome, status))

    async def retry(self, claim: Claim, outcome: Outcome | None, delay_s: float) -> bool:
        """See WorkQueue."""
        return await self._settle(claim, lambda held: self._ends.retry(held, outcome, delay_s))

    async def _settle(self, claim: Claim, end: Callable[[Held], Awaitable[bool]]) -> bool:
        done = await self.holdings.settle(claim, end)
        if not done:
            await self.keys.stopped(claim)
        return done


# --- NATS taker -----------------------------------------------------------------------------------


class Taking(NamedTuple):
    """A claim that is being made."""

    queue: str
    turns: NatsTurns  # its lanes
    left: dict[str, int]  # the room that lanes still have
    rates: Mapping[str, Rate]
    made: list[Claim]  # so far

    def left_of(self, lane: str, otherwise: int) -> int:
        """The room that a lane has; `otherwise`, if nothing is said of it."""
        return self.left.get(lane, self.left.get("", otherwise))


class NatsTaker:
    """Claims the work of queues, in turns."""

    def __init__(
        self,
        link: NatsLink,
        lanes: NatsLanes,
        claims: NatsClaims,
        slots: NatsSlots,
        replies: NatsReplies,
        rates: NatsRates,
    ) -> None:
        self._link = link
        self._lanes = lanes
        self._claims = claims
        self._slots = slots
        self._replies = replies
        self._rates = rates
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by queue

    async def claim(
        self, queue: str, limit: int, room: Mapping[str, int], rates: Mapping[str, Rate]
    ) -> list[Claim]:
        """See WorkQueue. Nothing is due while the servers are away; a reconnect wakes the queue."""
        taking = Taking(queue, self._lanes.queues[queue], dict(room), rates, [])
        async with self._locks[queue]:
            limit = self._claims.most(queue, limit)
            try:
                if queue in self._lanes.paused:
                    await self._lanes.settle(queue, True, taking.left)
                elif limit == 0:
                    await self._lanes.settle(queue, False, taking.left)
                elif self._slots.limit(queue) is not None:
                    await self._claim_with_slots(taking, limit)
                elif not self._link.away:
                    await self._claim_at_rates(taking, limit)
            except StoreError as exc:
                log.debug("queue %s: no more work can be claimed for now: %s", queue, exc)
        return taking.made

    async def _claim_with_slots(self, taking: Taking, limit: int) -> None:
        """Claim no more than there are slots for."""
        queue = taking.queue
        if not taking.turns.ready:
            await self._lanes.settle(queue, True, taking.left)
            return
        numbers = await self._slots.take(queue, limit)
        try:
            if numbers:
                await self._claim_at_rates(taking, len(numbers))
            else:
                await self._lanes.settle(queue, False, taking.left)
        finally:
            for claim in taking.made:
                self._slots.use(queue, numbers.pop(), claim.id)
            for number in numbers:
                await self._slots.give_back(queue, number)

    async def _claim_at_rates(self, taking: Taking, limit: int) -> None:
        """Claim no more than may start now; have the queue woken when more may."""
        queue = taking.queue
        left = taking.left
        made = taking.made
        rates = {name: taking.rates[name] for name in taking.rates.keys() & taking.turns.lanes}
        if rate := taking.rates.get(""):
            rates[queue] = rate
        booked: dict[str, int] = {}
        free = {name: taking.left_of(name, 1) for name in rates}
        try:
            for name, rate in rates.items():
                booked[name] = await self._book(taking, name, rate, limit)
            most = booked.get(queue, limit)
            left.update((name, number) for name, number in booked.items() if name != queue)
            await self._claim(taking, most)
        finally:
            started = Counter([claim.lane for claim in made])
            started[queue] = len(made)
            for name, number in booked.items():
                await self._rates.take_back(name, rates[name], number - started[name])
        waits = {name: self._rates.wait_s(name, rate) for name, rate in rates.items()}
        # One more message of a lane may be sent to us, so that we know that there is one.
        for name in rates.keys() - {queue}:
            left[name] = min(int(waits[name] <= 0), free[name] - started[name])
        wanted = len(made) < limit and waits.get(queue, 0.0) <= 0
        await self._lanes.settle(queue, wanted, left)
        if later := [wait_s for wait_s in waits.values() if wait_s > 0]:
            self._rates.wake_in(queue, min(later))

    async def _book(self, taking: Taking, name: str, rate: Rate, limit: int) -> int:
        """Count calls of a lane, or of the queue, as started before they are claimed; how many."""
        turns = taking.turns
        if name == taking.queue:
            return await self._rates.start(name, rate, limit if turns.ready else 0)
        if name not in turns.ready:
            return 0
        most = min(limit, taking.left_of(name, limit))
        return await self._rates.start(name, rate, min(most, max(1, turns.lanes[name].waiting)))

    async def _claim(self, taking: Taking, limit: int) -> None:
        """Claim up to so many calls, lane by lane."""
        queue = taking.queue
        left = taking.left
        made = taking.made
        tried = 0
        while len(made) < limit:
            if tried - len(made) > MANY_NATS_REQUESTS:  # Most wait for keys: others first.
                self._lanes.wake(queue)
                break
            taken = await self._lanes.take(queue, limit - len(made), left)
            tried += len(taken)
            if not taken:
                break
            results = await self._begin_all(taken)
            for (lane, delivery), result in zip(taken, results, strict=True):
                if isinstance(result, Claim):
                    made.append(result)
                    continue
                if lane.name in left:
                    left[lane.name] += 1
                if result is not None:
                    self._put_off(delivery, queue, result)

    def _put_off(self, delivery: Delivery, queue: str, failure: BaseException) -> None:
        """Have a message delivered again whose claim has failed: the others are ours by now."""
        if isinstance(failure, StoreError):
            log.debug("queue %s: a call could not be claimed: %s", queue, failure)
            self._replies.put_off(delivery, CLAIM_AGAIN_S)
        elif isinstance(failure, Exception):
            log.error("queue %s: %s can't be claimed", queue, delivery.id, exc_info=failure)
            self._replies.put_off(delivery, PARKED_S)
        else:
            raise failure

    async def _begin_all(
        self, taken: Sequence[tuple[NatsLane, Delivery]]
    ) -> list[Claim | BaseException | None]:
        """For each of these messages its claim, or why there is none.

        Most are calls that nobody has had before. Their claims are written without a task for each.
        """
        attempts = [self._attempt(*item) for item in taken]
        results = [await self._conclude(attempt) for attempt in attempts]
        rest = [
            number
            for number, result in enumerate(results)
            if result is None or isinstance(result, NatsChanged)
        ]
        if rest:
            again = [self._claims.begin(*taken[number], results[number] is None) for number in rest]
            begun = await asyncio.gather(*again, return_exceptions=True)
            for number, result in zip(rest, begun, strict=True):
                results[number] = result
        return results

    def _attempt(self, lane: NatsLane, delivery: Delivery) -> NewClaim | StoreError | None:
        try:
            return self._claims.starts.attempt(lane, delivery)
        except StoreError as exc:
            return exc

    async def _conclude(
        self, attempt: NewClaim | StoreError | None
    ) -> Claim | BaseException | None:
        if not isinstance(attempt, NewClaim):
            return attempt
        try:
            return await self._claims.starts.conclude(attempt)
        except StoreError as exc:
            return exc


# --- NATS operators -------------------------------------------------------------------------------
# -- steps of operators and people


async def change_all(
    batches: AsyncIterator[list[Stored]], change: Callable[[Stored], Awaitable[bool]]
) -> BulkResult:
    """Change calls batch by batch, so that nobody waits for all of them."""
    matched = 0
    done = 0
    async for batch in batches:
        matched += len(batch)
        changed = await asyncio.gather(*map(change, batch))
        done += changed.count(True)
    return BulkResult(matched, done)


def nats_past(call: NatsCall) -> dict[str, Any]:
    """What a call's history keeps of it, when it is queued again."""
    return {
        "status": call.status,
        "attempts": call.attempts,
        "http_status": call.http_status,
        "error": call.error,
        "started_at": call.started_at,
        "completed_at": call.completed_at,
        "duration_seconds": call.duration_s,
        "interrupted": call.interrupted,
        "callback": {
            "status": call.callback_status,
            "attempts": call.callback_attempts,
            "http_status": call.callback_http_status,
            "error": call.callback_error,
        },
    }


class NatsOperator:
    """Cancels calls, and queues them again."""

    def __init__(
        self,
        subjects: NatsSubjects,
        settings: Settings,
        calls: NatsCalls,
        claims: NatsClaims,
        messages: NatsMessages,
        news: NatsNews,
    ) -> None:
        self._subjects = subjects
        self._settings = settings
        self._calls = calls
        self._claims = claims
        self._messages = messages
        self._news = news

    async def cancel(self, stored: Stored, *, waiting_only: bool = False) -> bool:
        """Cancel a call, or its callback.

        False: it has finished; or it is claimed, and `waiting_only` says that such are left alone.
        """
        current: Stored | None = stored
        while current is not None:
            call = current.call
            claimed = call.owner is not None
            if call.finished or (waiting_only and claimed):
                return False
            with contextlib.suppress(NatsChanged):
                if call.status in FINAL:
                    await self._cancel_callback(current)
                else:
                    await self._cancel_call(current)
                return True
            current = await self._calls.current(call.id)
        return False

    async def purge(self, batches: AsyncIterator[list[Stored]]) -> int:
        """Cancel those that nobody has claimed; how many."""
        cancel = functools.partial(self.cancel, waiting_only=True)
        return (await change_all(batches, cancel)).done

    async def _cancel_call(self, stored: Stored) -> None:
        parts = stored.parts
        if self._calls.tight:  # Whoever cancels may do it to get room.
            parts = with_request(parts, Parts())
        elif not parts.has_request:
            parts = with_request(parts, await self._calls.request_of(stored.call))
        call = stored.call._replace(
            status="cancelled", completed_at=self._calls.now(), deadline_at=None, owner=None
        )
        call, parts = self._calls.fit(call, parts)
        # If we die before its message is taken away, that comes when it is due: the record has to
        # last until then.
        keep_s = max(self._calls.kept_s(call), call.due_at - self._calls.now())
        await self._calls.write(call, parts, stored.seq, keep_s)
        await self._calls.keep_notes(call)
        if stored.call.owner is None:
            await self._claims.keys.release(call)
        await self.take_away(call.queue, call.lane, stored)
        self._news.ended(nats_ended(call))

    async def _cancel_callback(self, stored: Stored) -> None:
        config = self._settings().calls
        call = stored.call._replace(
            callback_status="failed", callback_error="cancelled", owner=None
        )
        parts = cut_answer(stored.parts, config.keep_output)
        await self._calls.write(call, parts, stored.seq, self._calls.kept_s(call))
        await self.take_away(CALLBACKS, callback_lane(call.callback_target or ""), stored)

    async def take_away(self, queue: str, lane: str, stored: Stored) -> None:
        """Delete the work messages of a call, and stop who runs it."""
        own_id = stored.call.id
        self._messages.forget(queue, lane, own_id)
        if stored.call.owner is not None:
            await self.stop(NatsReceipt(own_id, stored.seq))
            self._news.tell(stop=(own_id, stored.seq))
        work = self._subjects.place("work", queue, lane, own_id)
        places = [work, self._subjects.later(queue, own_id)]
        await asyncio.gather(*map(self._calls.purge, places))
        self._messages.forget(queue, lane, own_id)  # It may have been on its way to us.

    async def stop(self, receipt: NatsReceipt) -> None:
        """Stop what we do for a claim that was cancelled, if it is ours."""
        held = self._claims.holdings.release(receipt)
        if held is not None:
            self._messages.ack(held.delivery)
            self._news.stopped(receipt)

    async def redrive(self, stored: Stored) -> bool:
        """Queue a final call again, as if new. False: somebody else has done that.

        Its message is stored before its record is written: after a crash in between, a record that
        says "queued" would have no message by which it runs. If several ask at once, their messages
        are the same, so one is stored.
        """
        old = stored.call
        call = NatsCall._make(old[:FATE] + CALL_DEFAULTS[FATE:])._replace(
            due_at=self._calls.now(),
            deadline_at=None,
            history=(*old.history, nats_past(old)),
        )
        fresh = Stored(stored.seq, call, with_request(Parts(), stored.parts))
        dedup = f"{call.id}-{stored.seq}"
        first = await self._messages.store("work", fresh, call.queue, call.lane, dedup)
        with contextlib.suppress(NatsRefused):  # Then it runs already.
            await self._calls.write(call, Parts(), stored.seq)
            await self._calls.keep_notes(call)
        return first

    async def redrive_one(self, call_id: str) -> None:
        """See CallRecords."""
        stored = await self._calls.find(call_id)
        if not stored.call.finished or await self._claims.keys.is_kept(stored.call):
            raise HttpError(409, NOT_FINISHED)
        if not stored.parts.has_request:
            raise HttpError(410, NO_REQUEST)
        if not await self.redrive(stored):
            raise HttpError(409, "the call has been queued again already")

    async def resend(self, call_id: str) -> None:
        """See CallRecords."""
        stored = await self._calls.find(call_id)
        call, parts = stored.call, stored.parts
        if not call.finished:
            raise HttpError(409, NOT_FINISHED)
        if call.callback_target is None or call.callback_status == "none":
            raise HttpError(409, NO_CALLBACK)
        whole = parts.answer_headers and len(parts.output) == call.response_bytes
        if call.response_bytes and not whole:
            raise HttpError(410, NOT_WHOLE)
        fresh = call._replace(
            callback_status="pending",
            callback_attempts=0,
            callback_http_status=None,
            callback_error=None,
            due_at=self._calls.now() + RESEND_S,
        )
        # The message is stored first, so that a "pending" record has one also after a crash. It
        # would lead to nothing before the record is written, so it comes a little later; once the
        # record is written, a second one comes at once.
        lane = callback_lane(call.callback_target)
        await self._messages.later(Stored(stored.seq, fresh, Parts()), CALLBACKS, lane)
        try:
            seq = await self._calls.write(fresh, parts, stored.seq)
        except NatsChanged:
            raise HttpError(409, "the call has changed meanwhile") from None
        await self._messages.callback(Stored(seq, fresh, parts))

    async def cancel_all(self, call_id: str) -> int:
        """See CallRecords."""
        record = await self._calls.current(call_id)
        if record is not None:
            if not await self.cancel(record):
                raise HttpError(409, HAS_FINISHED)
            return 1
        return cancelled_number(await change_all(self._calls.sharing(call_id), self.cancel))

    async def redrive_finished(self, stored: Stored) -> bool:
        """As `redrive`. False: it has not finished, or its request is not stored any more."""
        possible = stored.call.finished and stored.parts.has_request
        if not possible or await self._claims.keys.is_kept(stored.call):
            return False
        return await self.redrive(stored)


class NatsPruning:
    """Deletes records that a change of [calls] has made too old. Servers delete the others."""

    def __init__(self, settings: Settings, calls: NatsCalls, lists: NatsLists) -> None:
        self._settings = settings
        self._calls = calls
        self._lists = lists
        self._kept = settings().calls  # what records were written with

    async def prune(self) -> int:
        """Delete one batch of records that are not to be kept any more; how many."""
        kept, now = self._kept, self._settings().calls
        number = 0
        if now.keep < kept.keep or now.keep_failed < kept.keep_failed:
            until = self._calls.now() - min(now.keep, now.keep_failed) + AHEAD_S
            finals = CallFilter(statuses=FINAL, until=until)
            async for batch in self._lists.matching(finals, None, MANY_NATS_REQUESTS):
                gone = [stored.call for stored in batch if self._calls.is_past(stored.call)]
                del gone[BATCH - number :]  # A batch of one moment may have thousands.
                await asyncio.gather(*map(self._calls.forget, gone))
                number += len(gone)
                if number >= BATCH:
                    break
        if not number:
            self._kept = now
        return number


async def end_late_call(
    calls: NatsCalls,
    ends: NatsEnds,
    messages: NatsMessages,
    operator: NatsOperator,
    delivery: Delivery,
) -> None:
    """End the call whose deadline this message tells of, unless it has started."""
    stored = await calls.current(delivery.id.removesuffix("-deadline"))
    if stored and stored.call.status == "queued" and stored.call.deadline_at is not None:
        call, request = stored.call, stored.parts
        if not request.has_request:
            request = await calls.request_of(call)
        # If it has just started, whoever runs it needs its message.
        if await ends.expire(stored._replace(parts=with_request(stored.parts, request))):
            await operator.take_away(call.queue, call.lane, stored)
    messages.ack(delivery)


# --- NATS intake ----------------------------------------------------------------------------------
# -- the way in


def nats_call(call: Invocation, offset_s: float) -> NatsCall:
    """A new call, its times moved to the servers' clock, which is `offset_s` ahead of ours."""
    if offset_s:
        call = call._replace(due_at=min(call.due_at + offset_s, END_OF_TIME))
        if call.deadline_at is not None:
            call = call._replace(deadline_at=min(call.deadline_at + offset_s, END_OF_TIME))
    return NatsCall(
        id=call.id,
        call_id=call.call_id,
        function=call.function,
        namespace=call.namespace,
        queue=call.queue,
        start_time=call.start_time,
        due_at=call.due_at,
        max_attempts=call.max_attempts,
        target=call.target,
        request_bytes=len(call.body),
        deadline_at=call.deadline_at,
        callback_url=call.callback_url,
        failure_url=call.failure_url,
        idempotency_key=call.idempotency_key,
        app=call.app,
        hops=call.hops,
        traceparent=call.traceparent,
        tracestate=call.tracestate,
        method=call.method,
        schedule=call.schedule,
        scheduled_for=call.scheduled_for,
        concurrency_key=call.concurrency_key,
    )


def body_digest(parts: Parts) -> str:
    """A digest by which bodies are told apart."""
    return hashlib.blake2b(parts.body, digest_size=16).hexdigest()


KEY_NOTE = ("id", "call_id", "digest")  # what is noted of an idempotency key


def key_note(call: NatsCall, digest: str) -> bytes:
    """The note of a call's idempotency key."""
    return json.dumps(dict(zip(KEY_NOTE, (call.id, call.call_id, digest), strict=True))).encode()


def too_large(most: int) -> HttpError:
    """The error for a call that is larger than a message may be."""
    return HttpError(413, f"the NATS server takes no messages over {most} bytes")


class NatsIntake:
    """Stores new calls."""

    def __init__(
        self,
        link: NatsLink,
        subjects: NatsSubjects,
        settings: Settings,
        calls: NatsCalls,
        messages: NatsMessages,
        lanes: NatsLanes,
    ) -> None:
        self._link = link
        self._subjects = subjects
        self._settings = settings
        self._calls = calls
        self._messages = messages
        self._lanes = lanes

    async def enqueue(self, call: Invocation) -> str:
        """See WorkQueue."""
        self._link.room.require()
        request = Parts(call.headers, call.body)
        stored = Stored(0, nats_call(call, self._link.clock.offset_s), request)
        most = self._link.max_payload
        size = len(call.body) + len(call.headers) + len(call.target)
        if size > most // 2 and len(pack_call(stored.call, request)) > most:
            raise too_large(most)
        if call.idempotency_key is not None:
            key = await self._calls.note(self._subjects.key(stored.call), *KEY_NOTE)
            if key is not None:
                return await self._known(key, stored)
        turns = self._lanes.queues[call.queue]
        if turns.full(self._settings().queue(call.queue).max_pending):
            if await self._calls.current(call.id):
                return call.call_id
            raise queue_full(call.queue)
        turns.reserve(1)
        try:
            call_id = await self._store(stored)
        finally:
            turns.reserve(-1)
        return call_id

    async def _store(self, stored: Stored) -> str:
        """Store a call with its notes: its key first, the call itself last."""
        call = stored.call
        if call.idempotency_key is not None:
            place = self._subjects.key(call)
            body = key_note(call, body_digest(stored.parts))
            try:
                await self._link.publish(place, body, Nats_Expected_Last_Subject_Sequence=0)
            except NatsChanged:
                key = await self._calls.note(place, *KEY_NOTE)
                if key is None:
                    raise
                return await self._known(key, stored)
        await self._store_call(stored)
        return call.call_id

    async def _store_call(self, stored: Stored) -> None:
        call = stored.call
        if call.call_id != call.id:
            place = self._subjects.call_id(call.call_id, call.id)
            await self._link.publish(place, json.dumps({"id": call.id}).encode())
        root = "later" if call.due_at > self._calls.now() else "work"
        await self._messages.store(root, stored, call.queue, call.lane)
        self._calls.changes.note(call)
        if call.deadline_at is not None:
            await self._messages.deadline(call)

    async def adopt(self, call: NatsCall, parts: Parts, digest: str) -> None:
        """Take over a call from another store that has ended, and whose callback is pending.

        Its record is written first: without it the callback's message leads to nothing. Done again
        after a crash, this does the rest. HttpError: 413.
        """
        self._link.room.require()
        most = self._link.max_payload
        if len(pack_call(call, parts)) > most:
            parts = with_request(parts, Parts())
        if len(pack_call(call, parts)) > most:
            raise too_large(most)
        try:
            seq = await self._calls.write(call, parts, 0)
        except NatsChanged:
            record = await self._calls.record_of(call)
            if record is None:
                raise
            was_sent = record.call.callback_attempts != call.callback_attempts
            if was_sent or record.call.callback_status != "pending":
                return  # It has been here before.
            seq = record.seq
        await self._note_ended(call, digest)
        if call.due_at > self._calls.now():
            lane = callback_lane(call.callback_target or "")
            await self._messages.later(Stored(seq, call, Parts()), CALLBACKS, lane)
        else:
            await self._messages.callback(Stored(seq, call, parts))

    async def _note_ended(self, call: NatsCall, digest: str) -> None:
        """Store the notes of a final call. If another call has its key by now, that stays so."""
        ttl = f"{max(1, round(self._calls.kept_s(call)))}s"
        if call.call_id != call.id:
            place = self._subjects.call_id(call.call_id, call.id)
            await self._link.publish(place, json.dumps({"id": call.id}).encode(), Nats_TTL=ttl)
        if call.idempotency_key is not None:
            place, note = self._subjects.key(call), key_note(call, digest)
            await store_over(self._link, place, note, 0, Nats_TTL=ttl)

    async def _known(self, key: Mapping[str, Any], stored: Stored) -> str:
        """The call id of the call that took this key first. HttpError: 422 its body was another.

        The daemon that noted the key may have died before it stored the call. Then this call is
        stored in its place, under its ids.
        """
        if key["digest"] != body_digest(stored.parts):
            raise HttpError(422, OTHER_BODY)
        if await self._calls.anywhere(key["id"]) is None:
            first = stored.call._replace(id=key["id"], call_id=key["call_id"])
            headers = [
                (name, key["call_id"].encode() if name == b"X-Call-Id" else value)
                for name, value in unpack_headers(stored.parts.headers)
            ]
            parts = stored.parts._replace(headers=pack_headers(headers))
            await self._store_call(Stored(0, first, parts))
        return str(key["call_id"])


class NatsSchedules:
    """How far schedules are: a document for each, written by compare-and-set.

    Calls are stored before it. If a daemon dies in between, the instant is not settled; whoever
    settles it stores calls with the same ids once more, which changes nothing.
    """

    def __init__(
        self, link: NatsLink, subjects: NatsSubjects, calls: NatsCalls, intake: NatsIntake
    ) -> None:
        self._link = link
        self._subjects = subjects
        self._calls = calls
        self._intake = intake

    async def state(self, name: str) -> ScheduleState:
        """See ScheduleStates."""
        place = self._subjects.schedule(name)
        while noted := await self._calls.noted(place, "runs", "boots"):
            try:
                return unpack_schedule(noted.document, noted.seq)
            except FOREIGN as exc:
                await self._calls.strays.set_aside(place, noted.seq, foreign_reason(exc))
        return ScheduleState(name)

    async def states(self) -> Mapping[str, ScheduleState]:
        """See ScheduleStates."""
        subjects = await self._calls.subjects(self._subjects.schedules)
        names = [nats_name(subject.rpartition(".")[2]) for subject in subjects]
        return {name: await self.state(name) for name in names}

    async def save(self, state: ScheduleState, calls: Sequence[Invocation]) -> int:
        """See ScheduleStates."""
        await asyncio.gather(*map(self._intake.enqueue, calls))
        place = self._subjects.schedule(state.name)
        return await store_over(self._link, place, pack_schedule(state).encode(), state.revision)


# --- NATS takeover --------------------------------------------------------------------------------
# What OpenFaaS's own gateway publishes becomes calls of ours.

# What is not escaped in a path. Go has decoded it, so a ? or # in it was escaped when it came.
IN_A_PATH = string.punctuation.translate({ord("?"): None, ord("#"): None})


def openfaas_target(message: Mapping[str, Any]) -> str:
    """The target of a QueueRequest: Go has decoded the path, and left the query as it came.

    Raises FOREIGN.
    """
    path = quote(message.get("Path") or "", safe=IN_A_PATH)
    query = quote(message.get("QueryString") or "", safe=string.punctuation)
    return f"{path}?{query}" if query else path


def openfaas_headers(message: Mapping[str, Any]) -> list[Header]:
    """The headers of a QueueRequest. Raises FOREIGN, also for one with a line break."""
    lines = [
        header_line(f"{name}: {value}")
        for name, values in (message.get("Header") or {}).items()
        for value in values
    ]
    return [(name.encode(), value.encode()) for name, value in lines]


@contextlib.contextmanager
def or_raise(reason: str) -> Iterator[None]:
    """Raise ValueError with this reason if a block can't read a part of somebody else's message."""
    try:
        yield
    except FOREIGN:
        raise ValueError(reason) from None


def openfaas_call(data: bytes, config: Config) -> Invocation:
    """The call in a message of OpenFaaS's gateway: its QueueRequest in Go's JSON.

    Raises ValueError, which says why it is none.
    """
    with or_raise("it is not JSON as OpenFaaS's gateway writes it"):
        message = dict(json.loads(data))
    with or_raise("its Function is no name of one"):
        name, _, namespace = message["Function"].partition(".")
        require(NAME.fullmatch(name))
    with or_raise("its Header has what is no header"):
        headers = openfaas_headers(message)
    by_name = {key.lower(): value.decode("latin-1") for key, value in headers}
    own_id = new_id()
    with or_raise("its X-Call-Id or X-Start-Time is none"):
        call_id = visible(by_name.get(b"x-call-id", own_id))
        start_time = int(by_name.get(b"x-start-time", time.time_ns()))
        require(0 <= start_time / 1e9 <= END_OF_TIME)
    with or_raise("its CallbackUrl is no http URL"):
        callback_url = go_url(message.get("CallbackUrl"))
    with or_raise("its Path or QueryString is none"):
        target = openfaas_target(message)
    with or_raise("its Body is not base64"):
        body = base64.b64decode(message.get("Body") or "", validate=True)
    function = config.functions.get(name)
    traceparent, tracestate = trace_context(headers)
    return Invocation(
        id=own_id,
        call_id=call_id,
        function=name,
        namespace=namespace or config.gateway.namespace,
        queue=function.queue if function else DEFAULT_QUEUE,
        start_time=start_time,
        due_at=time.time(),
        deadline_at=None,
        max_attempts=(function.retry if function else config.retry).attempts,
        callback_url=callback_url,
        failure_url=None,
        idempotency_key=None,
        app=None,
        target=target,
        headers=pack_headers(forward_headers(headers, COMPUTED)) + call_lines(call_id, start_time),
        body=body,
        traceparent=traceparent,
        tracestate=tracestate,
    )


def go_url(parts: Mapping[str, str] | None) -> str | None:
    """A URL from the JSON of Go's url.URL. Raises ValueError."""
    if not parts:
        return None
    query = parts.get("RawQuery")
    path = parts.get("RawPath") or quote(parts.get("Path") or "")
    url = f"{parts['Scheme']}://{parts['Host']}{path}" + (f"?{query}" if query else "")
    callback_host(url)
    return url


class NatsTakeover:
    """Takes over what OpenFaaS's own gateway publishes for its queue-worker.

    Once the call is stored, the gateway gets the answer that a stream would give it.
    """

    def __init__(
        self,
        link: NatsLink,
        subjects: NatsSubjects,
        settings: Settings,
        intake: NatsIntake,
        metrics: Metrics,
    ) -> None:
        self._link = link
        self._subjects = subjects
        self._settings = settings
        self._intake = intake
        self._metrics = metrics
        self._taken = 0

    async def listen(self) -> None:
        """Subscribe. Each message goes to one daemon."""
        await self._link.subscribe(self._subjects.taken_over, self._heard, "faasd-async")

    async def _heard(self, message: nats.aio.msg.Msg) -> None:
        place = self._subjects.taken_over
        try:
            await self._intake.enqueue(openfaas_call(message.data, self._settings()))
        except FOREIGN as exc:
            tell_set_aside(self._metrics, place, foreign_reason(exc), "no call")
        except (StoreError, HttpError) as exc:
            log.error("NATS: a message on %s can't be taken over: %s", place, exc)
            return
        if message.reply:
            self._taken += 1
            answer = {"stream": self._settings().nats.stream, "seq": self._taken}
            with contextlib.suppress(StoreError):
                self._link.send(message.reply, json.dumps(answer).encode())


# --- NATS recovery --------------------------------------------------------------------------------
# What a daemon or a server that was killed has left behind.


class NatsRecovery:
    """Finds work that was sent to a daemon which does not have it any more, or never got it: at a
    start, and whenever there is a connection again.
    """

    def __init__(
        self,
        subjects: NatsSubjects,
        calls: NatsCalls,
        waiting: NatsWaiting,
        messages: NatsMessages,
        claims: NatsClaims,
    ) -> None:
        self._subjects = subjects
        self._calls = calls
        self._waiting = waiting
        self._messages = messages
        self._claims = claims

    async def recover(
        self, consumers: Mapping[str, Mapping[str, Any]], restarted: bool = False
    ) -> None:
        """Have such work delivered again, without waiting for leases to run out.

        `restarted`: the server is another process than the one that we knew.
        """
        await self._claims.keys.look_after()
        for name, info in consumers.items():
            root, queue, lane = name.split("+")
            if root == "work" and info["delivered"]["stream_seq"]:
                await self._recover_lane(nats_name(queue), nats_name(lane), info, restarted)

    async def store_forgotten(self, lanes: Iterable[NatsLane]) -> None:
        """Store messages again that were given back and that the server has forgotten."""
        for lane in lanes:
            place = self._subjects.lane("work", lane.queue, lane.name)
            for seq in lane.forgotten():
                for message in await self._waiting.between(place, seq, seq):
                    if await self._verb(lane.queue, message, False) == NAK:
                        await self._messages.store_again(lane.queue, lane.name, message)

    async def _recover_lane(
        self, queue: str, name: str, info: Mapping[str, Any], restarted: bool
    ) -> None:
        """Look through the messages of a lane that were delivered and are still there.

        A server that was killed may have forgotten that some were not acked, and would not deliver
        them again; or it may wait for acks of messages that are gone (seen with 2.15). If there is
        a sign of either, all are stored again.
        """
        place = self._subjects.lane("work", queue, name)
        delivered, floor = info["delivered"], info["ack_floor"]["stream_seq"]
        messages = await self._waiting.between(place, 1, delivered["stream_seq"])
        unacked = sum(message.seq > floor for message in messages)
        differs = restarted or unacked != info["num_ack_pending"]
        for message in messages:
            forgotten = differs or message.seq <= floor
            verb = await self._verb(queue, message, forgotten)
            if verb == NAK and forgotten:
                await self._messages.store_again(queue, name, message)
            elif verb is not None:
                count = delivered["consumer_seq"]
                await self._messages.answer_unacked(queue, name, message.seq, count, verb)

    async def _verb(self, queue: str, message: WorkMessage, forgotten: bool) -> bytes | None:
        """How to answer a message that was delivered before; None: its owner lives, and has it.

        `forgotten`: the server may not know that it was delivered. Then what we have claimed is
        delivered once more, to have a lease again.
        """
        if queue == DEADLINES:
            return NAK
        try:
            stored = unpack_call(message.data)
        except ValueError:
            return NAK  # Whoever gets it tells what is wrong.
        record = await self._calls.record_of(stored.call)
        if record is None or record.call.owner is None:
            return NAK
        holdings = self._claims.holdings
        if record.call.owner == holdings.owner:
            return NAK if forgotten or record.call.id not in holdings else None
        if not has_died(record.call.owner, holdings.owner):
            return None  # Its lease decides.
        if queue == CALLBACKS:
            return await self._claims.callback_interrupted(record)
        return await self._claims.interrupted(record, stored.parts)


# A server that was killed may bring back messages that it had deleted (seen with 2.15, once in some
# hundred kills). Work messages among them are delivered, and their records say that nothing is left
# to be done. The others are deleted again:


async def sweep_records(link: NatsLink, blocks: NatsBlocks, calls: NatsCalls) -> None:
    """Delete older records of calls that have a newer one.

    They would be taken for the call's record once the newer one has gone. There are none unless the
    stream has more messages than subjects.
    """
    state = (await link.api(f"STREAM.INFO.{blocks.stream}"))["state"]
    if state["messages"] <= state.get("num_subjects", 0):
        return
    async for subject, number in blocks.names("call"):
        if number > 1:
            await calls.read(subject)  # A stray on top of a record is set aside.
            await link.api(f"STREAM.PURGE.{blocks.stream}", {"filter": subject, "keep": 1})


async def sweep_later(link: NatsLink, subjects: NatsSubjects, blocks: NatsBlocks) -> None:
    """Delete messages that wait for their time though their calls have ended since.

    No server publishes them any more, but once the record has gone, they would be shown as calls
    that wait.
    """
    places: dict[str, str] = {}  # of a batch: subjects, by the subject of the call's record
    gone: list[tuple[str, int]] = []  # subject, and the sequence of the record, which came later

    async def look() -> None:
        for message in await blocks.gather(multi_last=list(places)):
            headers = message.headers
            with contextlib.suppress(ValueError):  # Whoever reads it by itself sets it aside.
                if unpack_call(message.data).call.status in FINAL:
                    gone.append((places[headers["Nats-Subject"]], int(headers["Nats-Sequence"])))
        places.clear()

    async for subject, _ in blocks.names("later"):
        _, queue, lane, own_id = subjects.split(subject)
        if queue[0] != "@" and is_own_id(own_id):
            places[subjects.record_at(queue, lane, own_id)] = subject
        if len(places) == NAMED_SUBJECTS:
            await look()
    if places:
        await look()
    for subject, seq in gone:
        await link.api(f"STREAM.PURGE.{blocks.stream}", {"filter": subject, "seq": seq})


# --- NATS room ------------------------------------------------------------------------------------

CALLS_RESERVE, CALLBACKS_RESERVE = 0, 1
RESERVES = {  # bytes by number, in the order in which they are stored again
    # A server still takes the message that uses its room up, which may be as large as this.
    CALLBACKS_RESERVE: 8 * MIB,
    CALLS_RESERVE: 512 * KIB,  # for claims, and for what calls leave beyond what they took
}
ROOM_PERIODS_S = (0.5, 8.0)  # between looks for more room: at first, and at most
HEARD_S = 0.5  # after which all daemons have heard that there is room for callbacks only
RESERVE_PERIOD_S = 60.0  # between looks whether the reserve is there
SWEEP_PERIOD_S = 600.0  # between looks for messages that have missed their time
FULL_SWEEP_PERIOD_S = 30.0  # the same while there is little room, which makes them miss it
SWEPT = 10_000  # messages that one look takes; the first, and one after a want of room, take all
SWEPT_AT_ONCE = 16  # messages in one request: each may have a megabyte
MISSED_S = 5.0  # after which a server that has not published what was due never will


async def publish_missed(link: NatsLink, blocks: NatsBlocks, most: float) -> None:
    """Store messages again that have missed their time, so that they are due at once.

    A server that has no room when a message is due never publishes it (seen with 2.15).
    """
    places: list[str] = []
    number = 0
    async for subject, _ in blocks.names("later"):
        number += 1
        places.append(subject)
        if number >= most:
            break
        if len(places) == SWEPT_AT_ONCE:
            await publish_missed_of(link, blocks, places)
            places = []
    if places:
        await publish_missed_of(link, blocks, places)


async def publish_missed_of(link: NatsLink, blocks: NatsBlocks, places: Sequence[str]) -> None:
    """Store those of these subjects' messages again that have missed their time."""
    before = rfc3339(link.clock.now() - MISSED_S) or ""
    for message in await blocks.gather(multi_last=places):
        headers = message.headers
        due_at = headers.get("Nats-Schedule", "").removeprefix("@at ")
        if not due_at or due_at > before:
            continue
        subject, seq = headers["Nats-Subject"], int(headers["Nats-Sequence"])
        again = {
            "Nats_Schedule": headers["Nats-Schedule"],
            "Nats_Schedule_Target": headers["Nats-Schedule-Target"],
        }
        # Unless it was due after all, or another daemon is faster.
        if await store_over(link, subject, message.data, seq, **again):
            log.warning("NATS: %s has missed its time, %s", subject, due_at)


async def probe_room(link: NatsLink, subjects: NatsSubjects) -> None:
    """Store something small for a moment. Raises NatsRefused, StoreError: there is no room."""
    await link.publish(subjects.slot("@probe", 0), bytes(PROBE_BYTES), Nats_TTL="1s")


class NatsReserve:
    """Room in which accepted calls can end when servers have none left.

    What becomes of a call has to be stored before its message can be deleted, so on a full server
    no call could even begin. Therefore two large, empty messages are kept there. When the server is
    full, the first is deleted; from then on no daemon accepts calls, until it can be stored again.
    Answers that are to be called back stay whole, so they may use up that room, too. Then the
    second is deleted, and its room is for callbacks only: each of them leaves less than it took.
    """

    def __init__(
        self, link: NatsLink, subjects: NatsSubjects, calls: NatsCalls, blocks: NatsBlocks
    ) -> None:
        self._link = link
        self._subjects = subjects
        self._calls = calls
        self._blocks = blocks
        self._sweep_at = time.monotonic() + MISSED_S  # There may have been no room before we began.
        self._most = math.inf  # messages that the next look takes
        self._period_s = ROOM_PERIODS_S[0]

    def _place(self, number: int) -> str:
        return self._subjects.slot("@reserve", number)

    async def ensure(self) -> None:
        """Store what is missing of the reserve, as far as there is room. Raises StoreError."""
        there = await self._calls.subjects(self._subjects.slot("@reserve", "*"))
        try:
            for number in RESERVES:
                if self._place(number) not in there:
                    await self._store(number)
        except NatsRefused as exc:
            if exc.code not in FULL:
                raise

    async def _store(self, number: int) -> None:
        size = min(RESERVES[number], self._link.max_payload)
        await store_over(self._link, self._place(number), bytes(size), 0)  # or another daemon has

    async def _purge(self, number: int) -> None:
        body = {"filter": self._place(number)}
        await self._link.api(f"STREAM.PURGE.{self._calls.stream}", body)

    async def keep(self) -> None:
        """Give the reserve up when there is no room, and store it again as soon as there is."""
        room = self._link.room
        while True:
            wait_s = min(RESERVE_PERIOD_S, self._sweep_at - time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await room.full.wait()
            try:
                if room.full.is_set():
                    await self._give_up(room)
                elif time.monotonic() >= self._sweep_at:
                    await self._sweep()
                else:
                    await self.ensure()
            except StoreError as exc:
                log.debug("NATS: the reserve can't be looked after: %s", exc)
                await asyncio.sleep(POLL_S)

    def _tell(self, room: NatsRoom) -> None:
        """Tell other daemons how much room there is."""
        news = {"full": room.failure, "spent": room.spent, "most": room.most_bytes}
        tell_daemons(self._link, self._subjects, **news)

    async def _sweep(self) -> None:
        """Look for messages that have missed their time."""
        await publish_missed(self._link, self._blocks, self._most)
        period_s = FULL_SWEEP_PERIOD_S if self._link.room.full.is_set() else SWEEP_PERIOD_S
        self._sweep_at, self._most = time.monotonic() + period_s, SWEPT

    async def _give_up(self, room: NatsRoom) -> None:
        """Delete as much of the reserve as is needed, and after a while try to store it again."""
        if room.most_bytes == math.inf:
            room.measure(await self._calls.used_bytes())
        self._tell(room)
        await self._purge(CALLS_RESERVE)
        if room.spent:
            await asyncio.sleep(HEARD_S)
            await self._purge(CALLBACKS_RESERVE)
        refusals = room.refusals
        await asyncio.sleep(self._period_s)
        self._period_s = min(2 * self._period_s, ROOM_PERIODS_S[1])
        if room.refusals > refusals and not room.spent:
            room.spend(True)
            self._period_s = ROOM_PERIODS_S[0]
            return
        self._sweep_at = min(self._sweep_at, time.monotonic() + FULL_SWEEP_PERIOD_S)
        if time.monotonic() >= self._sweep_at:
            await self._sweep()
            return  # What is due now needs the room that there is.
        try:
            for number in RESERVES:
                await self._store(number)
                # A server takes the message that uses its room up, and refuses the next: try one.
                await probe_room(self._link, self._subjects)
                room.spend(False)
        except NatsRefused as exc:
            if exc.code not in FULL:
                raise
            room.measure(await self._calls.used_bytes())
        else:
            self._period_s = ROOM_PERIODS_S[0]
            self._sweep_at, self._most = time.monotonic() + MISSED_S, math.inf
            room.empty()


# --- NATS upkeep ----------------------------------------------------------------------------------
# -- what goes on by itself


async def renew_leases(
    replies: NatsReplies, lanes: NatsLanes, holdings: NatsHoldings, slots: NatsSlots
) -> None:
    """Tell the servers that all work which was sent to us is under way."""
    for held in list(holdings.held.values()):
        replies.extend(held.delivery)
    for lane in list(lanes.by_consumer.values()):
        for delivery in list(lane.inbox.buffer):  # sent to us, and not claimed yet
            replies.extend(delivery)
    with contextlib.suppress(StoreError):
        await slots.renew()


async def learn_pauses(calls: NatsCalls, subjects: NatsSubjects, lanes: NatsLanes) -> None:
    """Hold the queues that are paused by what is stored."""
    known = set(lanes.paused)
    for subject in await calls.subjects(subjects.pauses):
        if note := await calls.note(subject, "queue", "paused"):
            lanes.pause(note["queue"], note["paused"])
    tell_paused(lanes.paused - known)


def pause_note(name: str, paused: bool) -> bytes:
    """The note on whether a queue is paused."""
    return json.dumps({"queue": name, "paused": paused}).encode()


class NatsPeers:
    """Follows what other daemons tell, and answers what they ask."""

    def __init__(
        self,
        link: NatsLink,
        subjects: NatsSubjects,
        lanes: NatsLanes,
        holdings: NatsHoldings,
        operator: NatsOperator,
        news: NatsNews,
    ) -> None:
        self._link = link
        self._subjects = subjects
        self._lanes = lanes
        self._holdings = holdings
        self._operator = operator
        self._news = news

    async def listen(self) -> None:
        """Subscribe to what other daemons tell and ask."""
        await self._link.subscribe(self._subjects.news, self._heard)
        await self._link.subscribe(self._subjects.owner(self._holdings.owner), self._asked)

    async def pause(self, name: str, paused: bool) -> None:
        """Have all daemons hold a queue, or go on with it; also those that come later."""
        await self._link.publish(self._subjects.pause(name), pause_note(name, paused))
        self._lanes.pause(name, paused)
        self._news.tell(pause=(name, paused))

    async def restore_pauses(self) -> None:
        """Store pauses again, if somebody has deleted or purged the stream. Raises StoreError."""
        for name in list(self._lanes.paused):  # They may change meanwhile.
            # Unless it is there, or the queue was resumed since.
            place, note = self._subjects.pause(name), pause_note(name, True)
            await store_over(self._link, place, note, 0)

    async def _heard(self, message: nats.aio.msg.Msg) -> None:
        """Follow news of another daemon; what is none is logged."""
        try:
            await self._follow(unpack_note(message.data, ()))
        except FOREIGN as exc:
            reason = foreign_reason(exc)
            log.error("NATS: what came on %s is no news: %s", message.subject, reason)

    async def _follow(self, news: Mapping[str, Any]) -> None:
        """Do what follows from news. Raises FOREIGN: they are none."""
        for ended in news.get("ends", ()):
            self._news.ended_elsewhere(ended)
        if stop := news.get("stop"):
            await self._operator.stop(NatsReceipt(*stop))
        if pause := news.get("pause"):
            self._lanes.pause(*pause)
        if queue := news.get("wake"):
            self._lanes.wake(queue)
        if news.get("watching"):
            self._news.changes.watched_elsewhere()
        if full := news.get("full"):
            self._link.room.fill(full)
            self._link.room.measure(news.get("most", math.inf))
            self._link.room.spend(bool(news.get("spent")) or self._link.room.spent)
        if "changes" in news:
            self._news.changes.heard(news["changes"], news.get("seqs"), news["missed"])

    async def _asked(self, message: nats.aio.msg.Msg) -> None:
        """Answer another daemon whether we hold a claim."""
        held = message.data.decode(errors="replace") in self._holdings
        with contextlib.suppress(StoreError):
            self._link.send(message.reply, b"1" if held else b"0")


class NatsStream:
    """Looks after the stream as a whole."""

    def __init__(
        self,
        link: NatsLink,
        settings: Settings,
        subjects: NatsSubjects,
        calls: NatsCalls,
        lists: NatsLists,
    ) -> None:
        self._link = link
        self._settings = settings
        self._subjects = subjects
        self._calls = calls
        self._blocks = lists.blocks
        self.reserve = NatsReserve(link, subjects, calls, lists.blocks)
        self._config: Mapping[str, Any] = {}  # as it was when it was looked at last

    async def is_edited(self) -> bool:
        """Whether somebody has edited it since the last look, or made another. StoreError."""
        name = self._settings().nats.stream
        before = self._config
        self._config = (await self._link.api(f"STREAM.INFO.{name}"))["config"]
        return self._config != before

    async def begin(self) -> None:
        """Make or check the stream, and learn since when its subjects have the time."""
        self._subjects.begin(await ensure_stream(self._link, self._settings().nats))

    async def sweep(self) -> None:
        """Delete messages that a server which was killed has brought back."""
        await sweep_records(self._link, self._blocks, self._calls)
        await sweep_later(self._link, self._subjects, self._blocks)


class NatsChores(NamedTuple):
    """What the keeper sees to, and others do."""

    begin: Callable[[], Awaitable[None]]
    stream: NatsStream
    peers: NatsPeers
    renew: Callable[[], Awaitable[None]]
    recovery: NatsRecovery
    expire: Callable[[Delivery], Awaitable[None]]


class NatsKeeper:
    """Does what goes on by itself: leases, deadlines, lanes that come and go, dead daemons."""

    def __init__(
        self,
        link: NatsLink,
        settings: Settings,
        consumers: NatsConsumers,
        lanes: NatsLanes,
        chores: NatsChores,
        changes: NatsChanges,
    ) -> None:
        self._link = link
        self._settings = settings
        self._consumers = consumers
        self._lanes = lanes
        self._chores = chores
        self._changes = changes
        self._look = asyncio.Event()  # set: look at all lanes now, after a reconnect
        self._swept = ""  # the id of the server after whose start the stream was swept last
        self._deadlines = asyncio.Event()  # set: some have passed
        self._tasks: Sequence[asyncio.Task[None]] = ()

    def start(self) -> None:
        """Start all chores."""
        chores = {
            "lanes": self._keep_looking,
            "leases": self._keep_leases,
            "deadlines": self._keep_deadlines,
            "changes": self._changes.keep_telling,
            "room": self._chores.stream.reserve.keep,
        }
        self._tasks = [
            asyncio.create_task(self._go_on(name, chore), name=name)
            for name, chore in chores.items()
        ]

    async def stop(self) -> None:
        """End all chores."""
        await cancel_all(self._tasks)
        self._changes.tell_ended()

    async def _go_on(self, name: str, chore: Callable[[], Awaitable[None]]) -> None:
        """Begin a chore again whenever it fails: without leases calls would run twice."""
        while True:
            try:
                await chore()
            except Exception:
                log.exception("NATS: %s failed in this program itself: trying again", name)
            await asyncio.sleep(POLL_S)

    def deadlines_passed(self) -> None:
        """Have deadlines that have passed looked at."""
        self._deadlines.set()

    async def recover(self) -> None:
        """Take over what dead daemons have left; where there is no room for that, a little later.

        Raises StoreError, ConfigError.
        """
        try:
            await self._chores.recovery.recover(await self._consumers.poll())
        except NatsRefused as exc:
            if exc.code not in FULL:
                raise
            self._look.set()
        await self._chores.stream.reserve.ensure()

    async def reconnected(self) -> None:
        """The connection is another one: look at everything anew."""
        self._lanes.reconnected()
        self._changes.lost()
        self._look.set()

    async def _keep_looking(self) -> None:
        """Count what waits, and notice lanes and consumers that have come or gone."""
        logged: Sequence[str] = ()
        heard = -1  # the number of messages at the last look, if all was well then
        left_out = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._look.wait()
            fresh = self._look.is_set()
            self._look.clear()
            left_out += 1
            if not fresh and left_out <= IDLE_LOOKS and self._is_quiet(heard):
                continue
            left_out, heard = 0, -1
            try:
                await self._look_at_all(fresh)
                logged, heard = (), self._link.messages
            except ConfigError as exc:
                if exc.problems != logged:
                    log.error("%s", exc)
                logged = exc.problems
            except StoreError as exc:
                log.debug("%s", exc)
                if fresh:
                    self._look.set()
                    await asyncio.sleep(POLL_S / 4)

    def _is_quiet(self, heard: int) -> bool:
        """Whether nothing waits or runs, and no message has come after the one with this number."""
        return self._lanes.idle and not self._link.silent and self._link.messages == heard

    async def _look_at_all(self, fresh: bool) -> None:
        """Do what is due. `fresh`: after a reconnect, as the server may take us for gone."""
        if self._link.ended:
            self._lanes.reconnected()
            await self._chores.begin()
            return
        self._changes.announce()
        if fresh:
            await self._chores.renew()
        for queue, turns in list(self._lanes.queues.items()):
            if turns.ready:  # Slots may be free now, or nobody was woken for what has come.
                self._lanes.wake(queue)
        try:
            consumers = await self._consumers.poll()
            if await self._chores.stream.is_edited() or self._link.room.unfit:
                await self._chores.stream.begin()
            await self._chores.peers.restore_pauses()
            server = self._link.info["server_id"]  # A server has another one after each start.
            if fresh:
                await self._chores.recovery.recover(consumers, server != self._swept)
            await self._chores.recovery.store_forgotten(list(self._lanes.by_consumer.values()))
            if server != self._swept:
                await self._chores.stream.sweep()
                self._swept = server
        except NatsRefused as exc:
            if exc.code in NOT_THERE:
                log.error("%s", exc)
                await self._chores.stream.begin()
                await self._chores.peers.restore_pauses()
            raise

    async def _keep_leases(self) -> None:
        """Renew the leases of all that we have claimed."""
        while True:
            await asyncio.sleep(lease_s(self._settings(), CALLBACKS) / 3)
            await self._chores.renew()

    async def _keep_deadlines(self) -> None:
        """End calls that have not started by their deadlines."""
        while True:
            await self._deadlines.wait()
            self._deadlines.clear()
            try:
                for _, delivery in await self._lanes.take(DEADLINES, BATCH, {}):
                    await self._chores.expire(delivery)
                await self._lanes.settle(DEADLINES, True, {})
            except StoreError as exc:
                log.warning("a deadline could not be kept yet: %s", exc)
                await asyncio.sleep(POLL_S)
                self._deadlines.set()


# --- NATS figures ---------------------------------------------------------------------------------
# -- what servers say of the queue, or have said last


async def nats_trouble(link: NatsLink, calls: NatsCalls, subjects: NatsSubjects) -> str | None:
    """See WorkQueue.failing. After a failure, something small is stored to find out."""
    reason = link.silent
    try:
        if not reason:
            link.room.require()
        async with asyncio.timeout(SILENT_S):
            if not reason and link.room.failure is not None:
                await probe_room(link, subjects)
            if not reason:
                await calls.subjects(subjects.pauses)
    except TimeoutError:
        reason = link.silent or "NATS takes its time to answer"
    except StoreError as exc:
        reason = str(exc)
    return f"the queue can't store: {reason}" if reason else None


def nats_counts(lanes: NatsLanes) -> Counter[tuple[str, str]]:
    """How many calls wait and run, by lane and state, as the servers said last."""
    counts: Counter[tuple[str, str]] = Counter()
    for lane in lanes.by_consumer.values():
        if lane.queue == CALLBACKS:
            counts[CALLBACKS, "pending"] += lane.waiting + lane.running
        elif lane.queue != DEADLINES:
            counts[lane.name, "delayed"] += lane.later
            counts[lane.name, "queued"] += lane.waiting - lane.later
            counts[lane.name, "running"] += lane.running
    return +counts


class NatsFigures:
    """What waits, and what the stream takes; see Storage.

    While servers are away or hang, it gives what they said last, at once: nobody has to wait.
    """

    def __init__(
        self,
        link: NatsLink,
        settings: Settings,
        consumers: NatsConsumers,
        lanes: NatsLanes,
        messages: NatsWaiting,
    ) -> None:
        self._link = link
        self._settings = settings
        self._consumers = consumers
        self._lanes = lanes
        self._messages = messages
        self._stats: Mapping[str, QueueStats] = {}
        self._used_bytes = 0
        self._asked_at = time.monotonic()  # when the stream was last, or we began

    async def _ask(self, question: Callable[[], Awaitable[None]]) -> bool:
        """Ask servers something. False: they have not answered within SILENT_S."""
        if self._link.silent:
            return False
        try:
            async with asyncio.timeout(SILENT_S):
                await question()
        except (StoreError, TimeoutError):
            return False
        return True

    async def stats(self) -> Mapping[str, QueueStats]:
        """See CallRecords."""
        await self._ask(self._count)
        return self._stats

    async def _count(self) -> None:
        lanes = self._lanes
        with contextlib.suppress(ConfigError):  # The others are counted all the same.
            await self._consumers.poll()
        stats: dict[str, QueueStats] = {}
        for name in {*lanes.queues, *lanes.paused} - {DEADLINES}:
            busy = [lane for lane in lanes.queues[name].lanes.values() if lane.waiting]
            waiting = {lane.name: lane.waiting for lane in busy}
            heads = await asyncio.gather(*map(self._messages.head, busy))
            paused = name in lanes.paused
            if waiting or paused:
                oldest_at = min(heads, default=float("inf"))
                held_back = self._consumers.held_back(busy)
                stats[name] = QueueStats(waiting, oldest_at, paused, held_back)
        self._stats = stats

    async def figures(self) -> StoreFigures:
        """What the stream takes. Servers don't tell what is left."""
        answered = await self._ask(self._measure)
        age_s = 0.0 if answered else time.monotonic() - self._asked_at
        servers = show_urls(self._settings().nats.servers)
        return StoreFigures(servers, self._used_bytes, None, round(age_s, 3))

    async def _measure(self) -> None:
        stream = self._settings().nats.stream
        self._used_bytes = (await self._link.api(f"STREAM.INFO.{stream}"))["state"]["bytes"]
        self._asked_at = time.monotonic()

    async def copy(self) -> IO[bytes]:
        command = f"nats stream backup {self._settings().nats.stream} FOLDER"
        raise HttpError(501, f"the queue is a stream on NATS: back it up there, with {command}")


class NatsParts(NamedTuple):
    """What an open queue is made of."""

    lanes: NatsLanes
    consumers: NatsConsumers
    claims: NatsClaims
    slots: NatsSlots
    rates: NatsRates
    taker: NatsTaker
    operator: NatsOperator
    intake: NatsIntake
    news: NatsNews
    peers: NatsPeers
    takeover: NatsTakeover
    schedules: NatsSchedules
    figures: NatsFigures


# --- NATS queue -----------------------------------------------------------------------------------
# -- the seam in front of them


class NatsQueue:
    """The queue on JetStream: WorkQueue and CallRecords, for as many daemons as share it."""

    IN_STEP = False  # One half of the calls runs while servers store the outcomes of the other.
    SHARED = True

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._link = NatsLink(settings().nats)
        self._subjects = NatsSubjects(settings().nats)
        changes = NatsChanges(self._link, self._subjects)
        self._calls = NatsCalls(self._link, self._subjects, settings, changes, metrics)
        self._lists = NatsLists(self._link, self._subjects, settings, self._calls)
        self._stream = NatsStream(self._link, settings, self._subjects, self._calls, self._lists)
        self._pruning = NatsPruning(settings, self._calls, self._lists)
        self._waiting = NatsWaiting(self._link, self._subjects, settings().nats.stream)
        self._parts: NatsParts  # these, once open
        self._keeper: NatsKeeper
        self._notice: str | None = None  # what servers do not promise
        self._closed = True

    async def open(self, wake: Tell[str], stop: Tell[Hashable], final: Tell[Ended]) -> None:
        """See WorkQueue. Raises StoreError, ConfigError."""
        self._compose(Listener(wake, stop, final))
        try:
            await self._begin()
        except StoreError as exc:
            log.error("%s: trying again", exc)
        self._closed = False
        self._keeper.start()

    async def _begin(self) -> None:
        """Connect, and take over what is there. Raises StoreError, ConfigError."""
        await self._link.open(self._keeper.reconnected)
        try:
            await self._stream.begin()
            self._notice = await check_promise(self._link, self._settings().nats)
            await self._parts.peers.listen()
            await self._parts.takeover.listen()
            await learn_pauses(self._calls, self._subjects, self._parts.lanes)
            await self._keeper.recover()
            await self._parts.consumers.ensure("work", DEADLINES, "all")
            await self._parts.lanes.start()
        except BaseException:
            await self._link.close()
            raise

    def _compose(self, listener: Listener) -> None:
        """Make the parts of an open queue."""
        link, subjects = self._link, self._subjects
        settings, calls = self._settings, self._calls
        news = NatsNews(link, subjects, listener, calls.changes)
        replies = NatsReplies(link)
        lanes = NatsLanes(link, settings, replies, self._wake)
        consumers = NatsConsumers(link, subjects, settings, lanes)
        messages = NatsMessages(link, subjects, consumers, lanes, replies, self._metrics)
        keys = NatsKeys(link, subjects, settings().nats.stream, calls, messages)
        ends = NatsEnds(settings, calls, messages, news, keys)
        holdings = NatsHoldings()
        owners = NatsOwners(link, subjects, settings, holdings, messages)
        claims = NatsClaims(settings, calls, messages, ends, holdings, owners)
        slots = NatsSlots(link, subjects, settings, calls, news, holdings.owner)
        rates = NatsRates(link, subjects, calls, news.wake)
        operator = NatsOperator(subjects, settings, calls, claims, messages, news)
        intake = NatsIntake(link, subjects, settings, calls, messages, lanes)
        expire = functools.partial(end_late_call, calls, ends, messages, operator)
        renew = functools.partial(renew_leases, replies, lanes, holdings, slots)
        recovery = NatsRecovery(subjects, calls, self._waiting, messages, claims)
        self._parts = NatsParts(
            lanes=lanes,
            consumers=consumers,
            claims=claims,
            slots=slots,
            rates=rates,
            taker=NatsTaker(link, lanes, claims, slots, replies, rates),
            operator=operator,
            intake=intake,
            news=news,
            peers=NatsPeers(link, subjects, lanes, holdings, operator, news),
            takeover=NatsTakeover(link, subjects, settings, intake, self._metrics),
            schedules=NatsSchedules(link, subjects, calls, intake),
            figures=NatsFigures(link, settings, consumers, lanes, self._waiting),
        )
        chores = NatsChores(self._begin, self._stream, self._parts.peers, renew, recovery, expire)
        self._keeper = NatsKeeper(link, settings, consumers, lanes, chores, calls.changes)

    async def close(self) -> None:
        """See WorkQueue. Claims that are left are taken over by others, or at the next start."""
        if not self._closed:
            self._closed = True
            await self._keeper.stop()
            await self._parts.lanes.close()
            await self._link.close()

    def _wake(self, queue: str) -> None:
        if queue == DEADLINES:
            self._keeper.deadlines_passed()
        else:
            self._parts.news.wake(queue)

    async def enqueue(self, call: Invocation) -> str:
        if self._closed:
            raise StoreError("the queue is closed")
        started = time.perf_counter()
        call_id = await self._parts.intake.enqueue(call)
        self._metrics.observe_commit(time.perf_counter() - started)
        return call_id

    async def adopt(self, call: NatsCall, parts: Parts, digest: str) -> None:
        """See NatsIntake."""
        await self._parts.intake.adopt(call, parts, digest)

    async def claim(
        self, name: str, limit: int, room: Mapping[str, int], rates: Mapping[str, Rate]
    ) -> Sequence[Claim]:
        if self._closed:
            raise StoreError("the queue is closed")
        return await self._parts.taker.claim(name, limit, room, rates)

    async def start(self, lane: str, rate: Rate) -> float:
        return await self._parts.rates.start_one(lane, rate)

    async def complete(self, claim: Claim, outcome: Outcome, status: str) -> bool:
        done = await self._parts.claims.complete(claim, outcome, status)
        await self._parts.slots.free(claim.id)
        return done

    async def retry(self, claim: Claim, outcome: Outcome | None, delay_s: float) -> bool:
        done = await self._parts.claims.retry(claim, outcome, delay_s)
        await self._parts.slots.free(claim.id)
        return done

    def stalled(self) -> str | None:  # A restart does not bring the servers back.
        return None

    def notice(self) -> str | None:
        return self._notice

    async def failing(self) -> str | None:
        return await nats_trouble(self._link, self._calls, self._subjects)

    async def lookup(self, call_id: str) -> CallRecord:
        return nats_record((await self._calls.find(call_id)).call, self._calls.now())

    async def list_records(
        self, filters: CallFilter, limit: int = 100, cursor: str | None = None
    ) -> Page:
        return await self._lists.page(filters, limit, cursor)

    async def output(self, call_id: str) -> Output:
        return await nats_output(self._calls, call_id, self._settings().calls.keep_output)

    async def answer(self, call_id: str) -> StoredAnswer:
        return await nats_result(self._calls, call_id)

    async def request(self, call_id: str) -> StoredRequest:
        return await nats_request(self._calls, call_id)

    async def cancel(self, call_id: str) -> int:
        return await self._parts.operator.cancel_all(call_id)

    async def redrive(self, call_id: str) -> None:
        await self._parts.operator.redrive_one(call_id)

    async def resend(self, call_id: str) -> None:
        await self._parts.operator.resend(call_id)

    async def cancel_matching(self, filters: CallFilter) -> BulkResult:
        return await change_all(self._lists.shown(filters), self._parts.operator.cancel)

    async def redrive_matching(self, filters: CallFilter) -> BulkResult:
        return await change_all(self._lists.shown(filters), self._parts.operator.redrive_finished)

    async def purge(self, name: str) -> int:
        return await self._parts.operator.purge(self._lists.waiting(name))

    async def pause(self, name: str, paused: bool) -> None:
        await self._parts.peers.pause(name, paused)

    async def stats(self) -> Mapping[str, QueueStats]:
        return await self._parts.figures.stats()

    def watch(self, tell: Tell[Changes] | None) -> None:
        self._calls.changes.watch(tell)

    async def overview(self) -> Overview:
        stats, figures = await asyncio.gather(self.stats(), self.storage.figures())
        return Overview(stats, nats_counts(self._parts.lanes), figures, complete=False)

    async def prune(self) -> int:
        return await self._pruning.prune()

    @property
    def schedules(self) -> NatsSchedules:
        return self._parts.schedules

    @property
    def storage(self) -> NatsFigures:
        return self._parts.figures


# --- HTTP failures --------------------------------------------------------------------------------
# Why a peer has not answered, in words; and time limits.

NO_DESCRIPTORS = "this machine has no descriptors, ports or memory left for a connection"
NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL")


def unreachable(exc: OSError, host: str, through: str = "") -> Exception:
    """Why no connection could be made: RequestFailed, or Shortage where it is our own.

    `through` says with whom it failed, if not with the host itself.
    """
    if exc.errno in Shortage.ERRORS or out_of_descriptors():
        return Shortage(NO_DESCRIPTORS)
    if isinstance(exc, ssl.SSLError):
        reason = tls_reason(exc)
    elif isinstance(exc, socket.gaierror):
        reason = f"{host}: {exc.strerror}"
        if re.fullmatch(r"[0-9.]+", host):
            reason = f"{host} is no address"
    elif isinstance(exc, ConnectionError) and exc.errno is None:
        reason = "it broke off the TLS handshake"
    elif exc.errno is not None and exc.errno > 0:
        reason = os.strerror(exc.errno)
    else:
        reason = str(exc)
    return RequestFailed(FailureKind.UNREACHABLE, f"can't be reached{through}: {reason}")


def out_of_descriptors() -> bool:
    """Whether this process has no descriptors left: of that, resolvers make many other errors."""
    try:
        socket.socket().close()
    except OSError as exc:
        return exc.errno in Shortage.ERRORS
    return False


def system_context() -> ssl.SSLContext:
    """TLS with the system's CAs. Raises Shortage.

    Without a descriptor for their file, OpenSSL says nothing, and trusts nobody from then on.
    """
    if out_of_descriptors():
        raise Shortage(NO_DESCRIPTORS)
    return for_http(ssl.create_default_context())


def tls_reason(exc: ssl.SSLError) -> str:
    """What is wrong with a peer's TLS, in words."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {exc.verify_message.rstrip('.')}"
    if exc.reason in NO_TLS or "record layer failure" in str(exc):
        return "it does not speak TLS"
    return (exc.reason or exc.strerror or "TLS failed").replace("_", " ").lower()


def broken(exc: Exception | None) -> RequestFailed:
    """Why a connection ended before the answer did; None: the peer closed it."""
    text = "broke off the connection"
    if isinstance(exc, ConnectionResetError):
        text = "reset the connection"
    elif isinstance(exc, ssl.SSLError):
        text += f": {tls_reason(exc)}"
    elif isinstance(exc, OSError) and exc.errno:
        text += f": {os.strerror(exc.errno)}"
    return RequestFailed(FailureKind.BROKEN, text)


def no_answer(exc: HttpProcessingError, data: bytes) -> RequestFailed:
    """Why what has come is no valid answer."""
    text = "did not answer in valid HTTP"
    if isinstance(exc, LineTooLong):
        text = f"answered with a header longer than {MAX_HEADER_BYTES} bytes"
    elif "Too many headers" in str(exc):
        text = "answered with too many headers"
    elif data.startswith(b"\x15\x03"):  # the alert of a TLS server
        text = "speaks TLS: its URL begins with https://"
    return invalid(text)


def invalid(text: str) -> RequestFailed:
    """What came is no answer."""
    return RequestFailed(FailureKind.INVALID, text)


class Limit(NamedTuple):
    """How long something may take."""

    seconds: float | None  # None: as long as it likes
    key: str = ""  # of the configuration, where it comes from there


class TimeLimit:
    """Cancels what a `with` block waits for, and raises RequestFailed, if it takes longer.

    For what comes late see `call_in_time`.
    """

    __slots__ = ("_cancelling", "_expired", "_grace", "_limit", "_started", "_sweep", "_task")

    def __init__(self, limit: Limit, started: float | None = None) -> None:
        self._limit = limit
        self._started = started  # monotonic; None: with the block
        self._task: asyncio.Task[Any] | None = None  # that runs the block, until it ends
        self._cancelling = 0  # how often that is being cancelled by others
        self._sweep: Sweep | None = None
        self._grace: asyncio.TimerHandle | None = None
        self._expired = False

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        if self._limit.seconds is not None:
            self._sweep = sweep(loop, self._limit.seconds)
            spent_s = 0.0 if self._started is None else time.monotonic() - self._started
            self._sweep.add(self, spent_s)

    def expire(self, late_s: float) -> None:
        """See Expiring."""
        self._grace = call_in_time(asyncio.get_running_loop(), late_s, self._expire)

    def _expire(self) -> None:
        """Cancel in the next round of the event loop: what has come in this one is read first."""
        asyncio.get_running_loop().call_soon(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._expired = True
            self._task.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """As in asyncio.Timeout, a task that others have cancelled as well stays cancelled."""
        task, self._task = self._task, None
        if self._sweep is not None:
            self._sweep.remove(self)
        if self._grace is not None:
            self._grace.cancel()
        if task is None or not self._expired:
            return
        if task.uncancel() <= self._cancelling and isinstance(exc, asyncio.CancelledError):
            limit = "in time"
            if self._limit.key:
                limit = f"within {self._limit.key} ({self._limit.seconds:g}s)"
            more = "".join(getattr(exc, "__notes__", ()))  # such as what had yet to come
            raise RequestFailed(FailureKind.TIMEOUT, f"did not answer {limit}{more}") from None


# --- HTTP parsing ---------------------------------------------------------------------------------
# How answers of functions, the provider and receivers are read. Only these sections, up to the
# client, and the way in know aiohttp: its parser, which is C, and its streams. What its
# ClientSession does besides costs three times as much as all that is done here.

READ_BYTES = 64 * KIB  # of an answer that wait here until somebody reads them
MAX_HEAD_BYTES = 4 * MAX_HEADER_BYTES  # of an answer, interim ones included
BODILESS_CODES = (204, 304)  # of answers that have no body, whatever their heads say
HEADS = re.compile(rb".+?(?:\r?\n\r?\n|\Z)", re.DOTALL)  # parts of data that may end heads
HEAD_ENDS = re.compile(rb"\n\r?\n")
# The first line of an answer that is no interim one; such may stand before it.
STATUS_LINE = re.compile(rb"(?:\A|\n\r?\n)HTTP/1\.[0-9] ([2-9][0-9]{2})(?: [^\r\n]*)?\r?\n")

# Of an answer, with its body.
Head: TypeAlias = "tuple[RawResponseMessage, StreamReader | bytes]"


class Flow:
    """The pace of a connection: no side sends more while the other one takes nothing.

    Streams of aiohttp take it for their connection.
    """

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None  # while it is open
        self._room: asyncio.Future[None] | None = None  # while the peer takes nothing
        self._reading_paused = False  # StreamReader looks at this

    def opened(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self.transport = cast(asyncio.Transport, transport)

    def ended(self) -> None:
        """The connection has ended: nobody waits for it any more."""
        self.transport = None
        self.resume_writing()

    @property
    def connected(self) -> bool:
        """StreamReader asks this before it waits."""
        return self.transport is not None

    @property
    def closed(self) -> bool:
        """Whether it has ended, or is about to."""
        return self.transport is None or self.transport.is_closing()

    @property
    def usable(self) -> asyncio.Transport | None:
        """The connection; None: it has ended, or is about to."""
        transport = self.transport
        return None if transport is None or transport.is_closing() else transport

    def required(self) -> asyncio.Transport:
        """The connection. Raises ConnectionResetError when it has ended."""
        if self.transport is None:
            raise ConnectionResetError("the peer has gone away")
        return self.transport

    def abort(self) -> None:
        """Close it at once."""
        if self.transport is not None:
            self.transport.abort()

    @property
    def full(self) -> bool:
        """Whether whoever sends has to wait."""
        return self._room is not None

    async def drain(self) -> None:
        """Wait until the peer takes more, or the connection ends."""
        if self._room is not None:
            await self._room

    def pause_writing(self) -> None:
        """The peer takes too little: whoever sends has to wait."""
        self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """The peer takes more again."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None

    @property
    def reading_paused(self) -> bool:
        """Whether nothing is read for now."""
        return self._reading_paused

    def pause_reading(self) -> None:
        """Read no more for now: enough waits to be taken."""
        if not self._reading_paused and not self.closed:
            assert self.transport is not None
            self._reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read on: what was there has been taken."""
        if self._reading_paused and not self.closed:
            assert self.transport is not None
            self._reading_paused = False
            self.transport.resume_reading()


def new_parser(flow: Flow, headless: bool) -> HttpResponseParser:
    """A parser of answers, `headless` for those that have no body (HEAD)."""
    return HttpResponseParser(
        cast(Any, flow),  # It only hands it on to its streams.
        asyncio.get_running_loop(),
        READ_BYTES,
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
        response_with_body=not headless,
        read_until_eof=True,
        auto_decompress=False,
    )


def whole_heads(parser: HttpResponseParser, data: bytes) -> Iterator[Head]:
    """The answers at the beginning of data that goes wrong later, with what there is of their
    bodies.

    From data in one piece with an error, the parser gives none of them.
    """
    with contextlib.suppress(HttpProcessingError):
        for part in HEADS.findall(data):
            yield from parser.feed_data(part)[0]


def with_one_length(data: bytes) -> bytes | None:
    """An answer that tells the length of its body in several ways, as if in one. None: the rest of
    its head has to come first.

    Some servers behind others do, and the parser refuses it. The same length may be told again
    (RFC 9110 8.6), and beside chunks none counts (RFC 9112 6.3).
    """
    first = STATUS_LINE.search(data)
    if first is None:
        return data
    start = first.end()
    last = HEAD_ENDS.search(data, start - 1)
    end = last.start() + 1 if last else len(data)
    lines = data[start:end].split(b"\n")
    length_lines = [line for line in lines if line.lower().startswith(b"content-length:")]
    codings = [line for line in lines if line.lower().startswith(b"transfer-encoding:")]
    lengths = b",".join(line.partition(b":")[2] for line in length_lines).split(b",")
    if len(lengths) == 1 and not (length_lines and codings):
        return data
    if last is None:
        return None
    kept = [line for line in lines if line not in length_lines]
    if not codings and len({length.strip() for length in lengths}) == 1:
        kept.insert(0, b"Content-Length: " + lengths[0].strip() + b"\r")
    elif not codings or not codings[-1].rstrip().lower().endswith(b"chunked"):
        return data
    return data[:start] + b"\n".join(kept) + data[end:]


class WholeAnswers:
    """Takes answers that come in one piece, as most do, for half of what a stream for each costs.

    The parser reads their heads, and is told that no bodies follow. A function often answers with
    the same head: that of the last answer is not read again.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._parser = new_parser(flow, headless=True)
        self._start: bytes | None = None  # the head of the last answer with a body of known length
        self._message: RawResponseMessage  # that head, parsed
        self._length = 0  # of the body after it

    def take(self, data: bytes) -> tuple[RawResponseMessage, bytes] | None:
        """The answer in this data; None: it is not whole, or special, and takes the parser."""
        start, blank, body = data.partition(b"\r\n\r\n")
        if not blank or len(body) > SMALL_BODY_BYTES:
            return None
        if start != self._start and not self._read(start):
            return None
        return (self._message, body) if len(body) == self._length else None

    def _read(self, start: bytes) -> bool:
        """Whether this is the head of an answer with a body of a known length."""
        if start.count(b"\n") != start.count(b"\r\n"):
            return False  # Who ends lines with LF alone may have ended its head before.
        try:
            ((message, _),) = self._parser.feed_data(start + b"\r\n\r\n")[0]
        except (HttpProcessingError, ValueError):  # The other parser tells what is wrong.
            self._parser = new_parser(self._flow, headless=True)
            return False
        length = message.headers.get("Content-Length")
        plain = 200 <= message.code != 408 and not message.chunked and not message.upgrade
        if not plain or length is None or message.code in BODILESS_CODES:
            return False
        self._start = start
        self._message = message
        self._length = int(length)
        return True


class AnswerReader:
    """Reads the answer to each request on a connection, as far as one goes that is not valid."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._headless = False  # whether the parser expects answers without a body
        self._parser = new_parser(flow, self._headless)
        self._whole = WholeAnswers(flow)
        self._pending = False  # whether the answer's head has yet to come
        self._head = b""  # what has come of it
        self._on_status: Tell[int] | None = None  # told the status of an answer whose head is odd

    def expect(self, method: str, on_status: Tell[int] | None) -> None:
        """Read the answer to another request; for `on_status` see HttpClient.begin."""
        headless = method == "HEAD"
        if headless != self._headless:
            self._headless = headless
            self._parser = new_parser(self._flow, headless)
        self._pending = True
        self._head = b""
        self._on_status = on_status

    def read(self, data: bytes) -> Iterable[Head]:
        """The answers that begin in this data, interim ones left out; the rest goes to their body.

        Raises RequestFailed behind those that are valid.
        """
        if self._pending and not self._head and not self._headless:
            whole = self._whole.take(data)
            if whole is not None:
                self._pending = False
                return (whole,)
        return self._parse(data)

    def end(self) -> None:
        """Note that the connection has ended: so does the body of an answer without a length."""
        with contextlib.suppress(HttpProcessingError):
            self._parser.feed_eof()

    def _parse(self, data: bytes) -> Iterator[Head]:
        try:
            heads = self._parser.feed_data(data)[0]
        except HttpProcessingError as exc:
            yield from self._parse_again(exc, data)
            return
        yield from self._answers(heads)
        if self._pending:
            self._tell_status(data)
            self._head += data
            if len(self._head) > MAX_HEAD_BYTES:
                raise invalid(f"answered with headers longer than {MAX_HEAD_BYTES} bytes")

    def _parse_again(self, exc: HttpProcessingError, data: bytes) -> Iterator[Head]:
        """Make what can be made of an answer that is not valid."""
        if not self._pending:
            raise no_answer(exc, data)
        self._tell_status(data)
        said = self._head + data
        once = with_one_length(said)
        if once is None and len(said) <= MAX_HEAD_BYTES:
            self._head = said
            return  # The parser refuses what follows, too.
        self._parser = new_parser(self._flow, self._headless)
        if once is not None and once != said:
            self._head = b""
            yield from self.read(once)
            return
        yield from self._answers(whole_heads(self._parser, said))
        raise no_answer(exc, data)

    def _answers(self, heads: Iterable[Head]) -> Iterator[Head]:
        """These heads without interim ones (RFC 9110 15.2)."""
        for head in heads:
            code = head[0].code
            if code >= 200 or code < 100 or code == 101:
                self._pending = False
                yield head

    def _tell_status(self, data: bytes) -> None:
        """Tell the status of an answer whose head may never be whole."""
        if self._on_status is not None and (line := STATUS_LINE.search(self._head + data)):
            self._on_status(int(line[1]))
            self._on_status = None  # Told once: the rest of the head may come byte by byte.


# --- HTTP connections -----------------------------------------------------------------------------

ESTABLISHED = 1  # a TCP connection that both sides may write to
TCP_COUNTERS = struct.Struct("=Q28xI")  # tcpi_bytes_acked and tcpi_data_segs_out


class TcpInfo(NamedTuple):
    """What the kernel knows of a connection; -1: it does not tell."""

    state: int
    acked: int = -1  # bytes that the peer's kernel has taken
    sent: int = -1  # segments with data that have left


def raw_tcp_info(sock: socket.socket) -> bytes:
    """The first 160 bytes of Linux's struct tcp_info; nothing where there is none."""
    if sys.platform != "linux":
        return b""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
    except OSError:  # a Unix socket has none
        return b""


def parse_tcp_info(raw: bytes) -> TcpInfo:
    """The fields in what `raw_tcp_info` gives: they are looked at only after a failure."""
    if len(raw) != 160:
        return TcpInfo(ESTABLISHED)
    return TcpInfo(raw[0], *TCP_COUNTERS.unpack_from(raw, 120))


def tcp_info(sock: socket.socket) -> TcpInfo:
    """What the kernel knows of a connection now."""
    return parse_tcp_info(raw_tcp_info(sock))


def watch_silence(sock: socket.socket) -> None:
    """Have the kernel look now and then whether the other end of a silent connection is there.

    A host that has lost its power says nothing; and routers forget connections on which nothing is
    said for minutes, over which the answer of a function that takes longer would not arrive.
    """
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":  # It would look for the first time after two hours.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S)


def was_unseen(raw_before: bytes, sock: socket.socket, farewell: bool) -> bool:
    """Whether the peer can't have seen anything of the request on a connection used again.

    So it is if none of it has left; or if the peer has closed the connection in good order, and its
    kernel had acknowledged nothing of it by then. (A reset may cross with an acknowledgement.)
    """
    before = parse_tcp_info(raw_before)
    if before.acked <= 0:
        return False
    now = tcp_info(sock)
    taken = now.acked > before.acked or not farewell
    return now.sent == before.sent or not taken


def left_unread(sock: socket.socket, exc: Exception | None) -> Iterator[bytes]:
    """What had come in on a connection before it broke, if it did, and its transport closes it.

    A peer that answers and closes without having read the request resets the connection; who is
    writing then is told of that first.
    """
    with contextlib.suppress(OSError):
        while exc is not None and (data := sock.recv(READ_BYTES)):
            yield data


class PeerConnection(asyncio.Protocol):
    """A connection to a peer, and the exchange on it. If something comes that nobody has asked for
    (a 408 to an idle client), it is not used again: the next caller would take that for its answer.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._flow = Flow()
        self._reader = AnswerReader(self._flow)
        self._answer: asyncio.Future[Head] | None = None  # for as long as its head is missing
        self._body: StreamReader = EMPTY_PAYLOAD  # of the last answer
        self._keep = True  # whether another request may follow
        self._before = b""  # raw_tcp_info at the time when it was used again
        self._farewell = False  # whether the peer has closed it in good order
        self.answers = 0  # that have come
        self.opened_at = time.monotonic()
        self.idle_since = 0.0
        self.ended_at: float | None = None  # monotonic
        self.silent = True  # whether nothing of an answer has come
        self.unseen = False  # whether the peer can't have seen anything of the request

    # What the caller does.

    def begin(
        self, method: str, message: bytes, on_status: Tell[int] | None
    ) -> asyncio.Future[Head]:
        """Send the beginning of a request; the future has the answer's head and body, or
        RequestFailed.
        """
        self._reader.expect(method, on_status)
        self.silent = True
        self.unseen = False
        answer: asyncio.Future[Head] = self._loop.create_future()
        transport = self._flow.usable
        if transport is None:
            answer.set_exception(broken(None))
        else:
            self._answer = answer
            transport.write(message)
        return answer

    def write(self, data: bytes) -> None:
        """Send a piece of a request, unless the connection has ended."""
        if transport := self._flow.usable:
            transport.write(data)

    async def drain(self) -> None:
        """Wait until the peer takes more, or the connection ends."""
        await self._flow.drain()

    @property
    def closed(self) -> bool:
        """Whether the connection has ended, or is about to."""
        return self._flow.closed

    @property
    def finished(self) -> bool:
        """Whether the whole answer has come and another request may follow."""
        ended = self._answer is None and self._body.is_eof()
        return ended and self._keep and not self._flow.closed

    def rest(self) -> None:
        """Note that an answer has come, and that the connection is idle now."""
        self.answers += 1
        self.idle_since = time.monotonic()

    def renew(self) -> bool:
        """Use an idle connection again. False: as far as this end can know, it is not open."""
        if self._flow.closed or not self._keep:
            return False
        self._before = raw_tcp_info(self._sock)
        return not self._before or self._before[0] == ESTABLISHED

    def fail(self, exc: Exception) -> None:
        """End the exchange with an error."""
        self._keep = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc)
        self._answer = None
        if not self._body.is_eof() and self._body.exception() is None:
            self._body.set_exception(exc)
        self.abort()

    def abort(self) -> None:
        """Close the connection at once."""
        self._flow.abort()

    # What the event loop and the parser's streams tell.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self._flow.opened(transport)

    def data_received(self, data: bytes) -> None:
        """Take a piece of an answer."""
        if self._answer is None and self._body.is_eof():
            self._keep = False
            self.abort()  # Nobody asked for this.
            return
        self.silent = False
        try:
            for message, body in self._reader.read(data):
                self._answered(message, body)
        except RequestFailed as exc:
            self.fail(exc)

    def _answered(self, message: RawResponseMessage, body: StreamReader | bytes) -> None:
        self._keep = self._keep and not message.should_close and self._answer is not None
        if self._answer is None:
            return  # a second answer to one request
        if message.code == 408 and message.should_close:
            self._farewell = True
            self.unseen = was_unseen(self._before, self._sock, self._farewell)
        if self.unseen:  # The 408 was meant for the idle connection, before our request came.
            self.fail(broken(None))
            return
        if message.code < 200:
            self.fail(invalid(f"answered {message.code:03}, which is no answer"))
            return
        answer, self._answer = self._answer, None
        self._body = EMPTY_PAYLOAD if isinstance(body, bytes) else body
        if not answer.done():
            answer.set_result((message, body))

    def eof_received(self) -> None:
        """The transport closes itself."""
        self._farewell = True
        self._keep = False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended. What had come in before it broke counts."""
        for data in left_unread(self._sock, exc):
            self.data_received(data)
        self.end(exc)

    def end(self, exc: Exception | None) -> None:
        """End the exchange with the connection. Nothing is read here that was not decrypted."""
        if self.silent:
            self.unseen = self.unseen or was_unseen(self._before, self._sock, self._farewell)
        unfinished = not self._body.is_eof() and self._body.exception() is None
        if exc is None and unfinished:  # With a length, it is an error all the same.
            self._reader.end()
        self._flow.ended()
        self.ended_at = time.monotonic()
        self.fail(broken(exc))

    def pause_writing(self) -> None:
        """The peer takes too little: whoever sends has to wait."""
        self._flow.pause_writing()

    def resume_writing(self) -> None:
        """The peer takes more again."""
        self._flow.resume_writing()


# --- HTTP over TLS --------------------------------------------------------------------------------


class Tls(asyncio.Transport, asyncio.Protocol):
    """TLS between a transport, whose protocol it is, and a connection, whose transport it is.

    The TLS of event loops drops what had come in when a connection breaks: the answer (413) of a
    peer that closes without having read the whole request, which resets the connection.
    """

    def __init__(
        self, connection: PeerConnection, sock: socket.socket, context: ssl.SSLContext, host: str
    ) -> None:
        self._connection = connection
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        name = host.partition("%")[0].rstrip(".")  # as it stands in certificates (RFC 6066 3)
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        self._flow = Flow()  # of what is encrypted
        self._open = False  # whether the handshake is done
        self._failure: Exception | None = None  # what was wrong with what came in
        self.secured: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # What the connection does.

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Encrypt something, and send it."""
        left = memoryview(data)
        try:
            while left:
                left = left[self._tls.write(left) :]
        except ssl.SSLError as exc:
            self._fail(exc)
        self._send()

    def is_closing(self) -> bool:
        """Whether the connection has ended, or is about to."""
        return self._flow.closed

    def abort(self) -> None:
        """Close the connection at once."""
        self._flow.abort()

    def pause_reading(self) -> None:
        """Read no more for now: enough waits to be taken."""
        self._flow.pause_reading()

    def resume_reading(self) -> None:
        """Read on: what was there has been taken."""
        self._flow.resume_reading()

    # What the event loop tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open: begin the handshake."""
        self._flow.opened(transport)
        self._shake_hands()

    def data_received(self, data: bytes) -> None:
        """Take encrypted data."""
        self._incoming.write(data)
        if not self.secured.done():
            self._shake_hands()
        if self._open:
            self._receive()

    def eof_received(self) -> None:
        """The transport closes itself."""
        self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""
        for data in left_unread(self._sock, exc):
            self.data_received(data)
        self._flow.ended()
        if self._open:
            self._connection.end(self._failure or exc)
        elif not self.secured.done():
            self.secured.set_exception(exc or ConnectionResetError())

    def pause_writing(self) -> None:
        """The peer takes too little: whoever sends has to wait."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """The peer takes more again."""
        self._connection.resume_writing()

    # What it does by itself.

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send()
        except (ssl.SSLError, ValueError) as exc:
            self.secured.set_exception(exc)
            self._fail(exc)
        else:
            self._send()
            self._open = True
            self._connection.connection_made(self)
            self.secured.set_result(None)

    def _receive(self) -> None:
        """Decrypt what has come in."""
        try:
            while data := self._tls.read(READ_BYTES):
                self._connection.data_received(data)
        except ssl.SSLWantReadError:
            self._send()  # what TLS itself has to answer
        except ssl.SSLError as exc:
            self._fail(exc)
        else:  # The peer says that nothing follows.
            self._connection.eof_received()
            self._close()

    def _fail(self, exc: Exception) -> None:
        """End the connection because of what came in; the peer is told."""
        self._failure = exc
        self._send()
        self._close()

    def _send(self) -> None:
        """Send what has been encrypted."""
        data = self._outgoing.read()
        if data and not self._flow.closed:
            self._flow.required().write(data)

    def _close(self) -> None:
        if self._flow.transport is not None:
            self._flow.transport.close()


async def secured(sock: socket.socket, context: ssl.SSLContext, host: str) -> PeerConnection:
    """A TLS connection to a peer that has shown that it is this host. Raises OSError."""
    connection = PeerConnection(sock)
    tls = Tls(connection, sock, context, host)
    await asyncio.get_running_loop().create_connection(lambda: tls, sock=sock)
    try:
        await tls.secured
    except BaseException:
        tls.abort()
        raise
    return connection


# --- HTTP pool ------------------------------------------------------------------------------------
# Connections that wait for another request.

PROOF_S = 0.5  # After this idle time a connection is tried: does its peer answer on it again?
PROOF_GROWTH = 3.0  # by which that time grows each time that the peer did not
MAX_PROOF_S = 0.9 * POOL_IDLE_S
MAX_WARY_S = 3600.0  # the longest time for which no connection is tried after that
MAX_UNPROVEN = 2  # idle connections that are kept to be tried
MAX_ORIGINS = 1_000  # of which something is remembered
HASTY_S = 1.0  # Servers that keep connections keep them for longer (most for 5 s to 2 min).


class Origin(NamedTuple):
    """Where a connection leads to."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    proxy: yarl.URL | None


def idle_s(connection: PeerConnection) -> float:
    """How long a connection has been idle, or was when it ended."""
    return (connection.ended_at or time.monotonic()) - connection.idle_since


class KeepAlive:
    """Whether a peer keeps its connections open, and for how many answers.

    Small servers answer in HTTP/1.1 and close all the same, without saying so: at once, a while
    later, or after a number of answers. What was sent meanwhile is lost. So a peer first has to
    show that it answers again on a connection that has been idle for a while; one at a time is
    tried. A peer that closes nevertheless is trusted only for fewer answers than it had given by
    then, and has to prove itself again, on a connection that has been idle for longer.
    """

    def __init__(self) -> None:
        self.trusted = 1  # a connection with fewer answers than these is used again at once
        self._wary_s = PROOF_S
        self._wary_until = 0.0  # monotonic; nothing is tried until then
        self._trial: PeerConnection | None = None  # that is being tried with a request

    def allows(self, connection: PeerConnection) -> bool:
        """Whether an idle connection may be used."""
        if self._trial is not None and self._trial.closed:
            if self._trial.silent:  # It was given up: the peer had not read its last request.
                self.doubt(self._trial)
            self._trial = None
        if connection.answers < self.trusted:
            return True
        lasts = idle_s(connection) >= min(self._wary_s, MAX_PROOF_S)
        return lasts and self._trial is None and time.monotonic() >= self._wary_until

    def use(self, connection: PeerConnection) -> None:
        """Note that a connection is used again: it may be a trial."""
        if connection.answers >= self.trusted:
            self._trial = connection

    def answered(self, connection: PeerConnection) -> None:
        """Note that an answer has come on a connection."""
        if connection is self._trial:
            self._trial = None
            self.trusted = sys.maxsize

    def lost(self, connection: PeerConnection) -> None:
        """Note that a connection has ended while it was idle, perhaps too soon."""
        if connection.answers < self.trusted and idle_s(connection) < HASTY_S:
            self.doubt(connection)

    def doubt(self, connection: PeerConnection) -> None:
        """Note that the peer has closed a connection that it should have kept."""
        self.trusted = min(self.trusted, connection.answers)
        self._trial = None
        now = time.monotonic()
        if now < self._wary_until:
            return  # Many end at once when a peer is restarted.
        if now > self._wary_until + MAX_WARY_S:
            self._wary_s = PROOF_S
        self._wary_s = min(PROOF_GROWTH * self._wary_s, MAX_WARY_S)
        self._wary_until = now + self._wary_s


class Peer:
    """Idle connections to one peer, and what is known of how long it keeps them."""

    def __init__(self, filled: Callable[[], None]) -> None:
        self._filled = filled  # told when there is a connection that may have to be closed
        # At the end the one that was used last; at the beginning those that are to be tried.
        self.idle: deque[PeerConnection] = deque()
        self._keep_alive = KeepAlive()
        self._forgotten = False

    def take(self) -> PeerConnection | None:
        """An idle connection that may be used; None: there is none."""
        while self.idle and self._keep_alive.allows(self.idle[-1]):
            connection = self.idle.pop()
            if connection.renew():
                self._keep_alive.use(connection)
                return connection
            self._keep_alive.lost(connection)
            connection.abort()
        return None

    def put(self, connection: PeerConnection) -> None:
        """Keep a connection whose exchange has ended, or close it."""
        self._keep_alive.answered(connection)
        connection.rest()
        trusted = connection.answers < self._keep_alive.trusted
        room = trusted or len(self.idle) < MAX_UNPROVEN
        aged = connection.idle_since - connection.opened_at > POOL_AGE_S
        if not (connection.finished and room) or aged or self._forgotten:
            connection.abort()
            return
        if trusted:
            self.idle.append(connection)
        else:
            self.idle.appendleft(connection)
        self._filled()

    def doubt(self, connection: PeerConnection) -> None:
        """Note that a connection that was used again has failed."""
        self._keep_alive.doubt(connection)

    def sweep(self, oldest: float) -> None:
        """Close what has been idle since before this time (monotonic)."""
        for connection in [one for one in self.idle if one.closed or one.idle_since < oldest]:
            if connection.closed:
                self._keep_alive.lost(connection)
            self.idle.remove(connection)
            connection.abort()

    def hang_up(self) -> None:
        """Close the connections that are idle."""
        for connection in self.idle:
            connection.abort()
        self.idle.clear()

    def forget(self) -> None:
        """Close all connections, those in use when their exchanges have ended."""
        self._forgotten = True
        self.hang_up()


class Pool:
    """Peers by origin; of many, those that were met last."""

    def __init__(self, keepalive_s: float) -> None:
        self._keepalive_s = keepalive_s
        self._peers: OrderedDict[Origin, Peer] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def peer(self, origin: Origin) -> Peer:
        """Who is there."""
        peer = self._peers.get(origin)
        if peer is None:
            peer = self._peers[origin] = Peer(self._filled)
            if len(self._peers) > MAX_ORIGINS:
                self._peers.popitem(last=False)[1].forget()
        return peer

    def _filled(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._keepalive_s / 4, self._sweep)

    def _sweep(self) -> None:
        """Close what has been idle for too long."""
        self._timer = None
        for peer in self._peers.values():
            peer.sweep(time.monotonic() - self._keepalive_s)
        if any(peer.idle for peer in self._peers.values()):
            self._filled()

    def close(self) -> None:
        """Close all idle connections."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for peer in self._peers.values():
            peer.hang_up()


# --- HTTP messages --------------------------------------------------------------------------------
# What is sent to a peer, and what comes back.

IDEMPOTENT = ("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE")  # RFC 9110 9.2.2
BODILESS = ("GET", "HEAD", "OPTIONS", "TRACE")  # methods that don't say that they have no body
# Packed headers in whose place a request has its own.
FRAMING_NAMES = b"content-length|transfer-encoding|host|connection"
FRAMING = re.compile(rb"\n(?:%b): [^\n]*" % FRAMING_NAMES, re.IGNORECASE)
FRAMING_AND_LOGIN = re.compile(rb"\n(?:%b|authorization): [^\n]*" % FRAMING_NAMES, re.IGNORECASE)
TOLD_LENGTH = re.compile(rb"\ncontent-length: ([^\n]*)", re.IGNORECASE)
CLEAN = bytes.maketrans(bytes([*range(9), *range(10, 32), 127]), b" " * 32)
CLEAN_LINES = CLEAN[:10] + b"\n" + CLEAN[11:]  # the same for packed headers
DISCARD_S = 0.5  # what the rest of an answer that nobody reads gets to come in

# -- requests


class Destination(NamedTuple):
    """What all requests to one URL share."""

    origin: Origin
    start: str  # of the target in the first line: for a proxy, what stands before the path
    path: str  # with its query
    folder: str  # the path that targets below the URL follow
    rest: bytes  # of the first line, and the headers from the URL, without the last line's end
    dropped: re.Pattern[bytes]  # a caller's headers in whose place these are sent

    def target(self, below: str | None) -> str:
        """The target of a request: what is `below` the URL, byte for byte; None: the URL itself."""
        if below is None:
            return self.start + self.path
        path = self.folder + below
        return self.start + path if path.startswith("/") else f"{self.start}/{path}"


def destination_of(url: yarl.URL, origin: Origin) -> Destination:
    """Work out what all requests to a URL share."""
    # An address's zone means nothing to the peer (RFC 6874 4).
    host = re.sub(r"%[^]]*", "", url.host_port_subcomponent or "")
    headers: list[Header] = [(b"Host", host.encode("utf-8", "surrogateescape"))]
    dropped = FRAMING
    start = ""
    if origin.proxy is not None and origin.tls is None:
        start = f"{url.scheme}://{host}"
        headers += proxy_login(origin.proxy)
    if login := url_login(url):
        headers.append((b"Authorization", login))
        dropped = FRAMING_AND_LOGIN
    rest = b" HTTP/1.1" + b"".join(b"\r\n%b: %b" % header for header in headers)
    return Destination(origin, start, url.raw_path_qs, url.raw_path.rstrip("/"), rest, dropped)


def request_message(
    method: str,
    destination: Destination,
    target: str | None,
    headers: bytes,
    body: bytes | AsyncIterator[bytes],
    keepalive: bool,
) -> bytes:
    """The head of a request, and its body unless that is streamed.

    Bytes of the packed headers pass as they are, but for those that would end a line. The body's
    length is its true one; for a body that is streamed, the one in `headers`, if it is there.
    """
    start = f"{method} {destination.target(target)}"
    fields = destination.dropped.sub(b"", b"\n" + headers).translate(CLEAN_LINES)
    lines = [
        start.encode("utf-8", "surrogateescape"),
        destination.rest,
        fields.replace(b"\n", b"\r\n"),
    ]
    if not isinstance(body, bytes):
        length = TOLD_LENGTH.search(b"\n" + headers)
        framing = b"Transfer-Encoding: chunked\r\n"
        lines.append(framing if length is None else b"Content-Length: %b\r\n" % length[1])
    elif body or method not in BODILESS:
        lines.append(b"Content-Length: %d\r\n" % len(body))
    lines.append(b"\r\n" if keepalive else b"Connection: close\r\n\r\n")
    if isinstance(body, bytes):
        lines.append(body)
    return b"".join(lines)


def proxy_login(proxy: yarl.URL) -> Sequence[Header]:
    """The header with the credentials in a proxy's URL."""
    login = url_login(proxy)
    return [(b"Proxy-Authorization", login)] if login else []


def url_login(url: yarl.URL) -> bytes | None:
    """The Authorization header for the credentials in a URL, which may be a password alone."""
    if not url.raw_user and not url.raw_password:
        return None
    login = unquote_to_bytes(url.raw_user or "") + b":" + unquote_to_bytes(url.raw_password or "")
    return b"Basic " + base64.b64encode(login)


class HttpRequest:
    """A request to a peer, and the connection on which it was sent, once it was."""

    __slots__ = (
        "_on_status",
        "_sending",
        "answer",
        "body",
        "connection",
        "method",
        "origin",
        "peer",
        "start",
    )

    def __init__(
        self,
        method: str,
        start: bytes,
        body: bytes | AsyncIterator[bytes],
        on_status: Tell[int] | None,
        origin: Origin,
        peer: Peer | None,
    ) -> None:
        self.method = method
        self.start = start  # its head, and its body unless that is streamed
        self.body = body
        self.origin = origin
        self.peer = peer  # whose connections are used again; None: one for this request alone
        self.connection: PeerConnection | None = None
        self.answer: asyncio.Future[Head] | None = None  # that is to come; None: it was not sent
        self._on_status = on_status  # see HttpClient.begin
        self._sending: asyncio.Task[None] | None = None  # the body, where it is streamed

    def begin(self) -> None:
        """Send it at once, if it can be sent again and a connection that is open is at hand."""
        if self.peer is None or not isinstance(self.body, bytes):
            return
        connection = self.peer.take()
        if connection is not None:
            self.send(connection)

    def send(self, connection: PeerConnection) -> None:
        """Send it on this connection."""
        self.connection = connection
        self.answer = connection.begin(self.method, self.start, self._on_status)
        if not isinstance(self.body, bytes):
            chunked = b"\r\nTransfer-Encoding: chunked\r\n" in self.start
            body = send_body(connection, self.body, chunked)
            self._sending = asyncio.create_task(body, name="body of a request")

    async def response(self) -> HttpResponse:
        """Wait for the head of the answer. Raises RequestFailed, HttpError."""
        assert self.connection is not None
        assert self.answer is not None
        try:
            return self._response(await self.answer)
        except BaseException as exc:
            name_proxy(exc, self.origin.proxy)
            self.connection.abort()
            if self.answer.done() and not self.answer.cancelled():
                # Taken note of, or asyncio would log it where we were cancelled.
                self.answer.exception()
            if self._sending is not None:
                await ended(self._sending)
            raise

    def lost(self) -> bool:
        """Note that the connection has failed; whether the request may be sent on another one."""
        assert self.connection is not None
        if self.peer is not None:
            self.peer.doubt(self.connection)
        return self.connection.unseen or (self.connection.silent and self.method in IDEMPOTENT)

    def plain_response(self) -> HttpResponse | None:
        """The answer, if it has come as a whole, in one piece; None: see HttpClient.finish."""
        answer = self.answer
        if answer is None or answer.cancelled() or answer.exception() is not None:
            return None
        head = answer.result()
        plain = isinstance(head[1], bytes) and head[0].code != 407
        return self._response(head) if plain else None

    def _response(self, head: Head) -> HttpResponse:
        """The answer whose head has come. Raises RequestFailed."""
        assert self.connection is not None
        if self.origin.proxy and head[0].code == 407:  # No peer says that (RFC 9110 15.5.8).
            reason = "can't be reached: the proxy answered 407"
            raise RequestFailed(FailureKind.UNREACHABLE, reason)
        self.start = self.body = b""  # They may be long, and are not sent again.
        return HttpResponse(head, self.connection, self._sending, self.peer)


# -- answers


class HttpResponse:
    """The head of an answer, and its body as it comes in. Closed at the end of its block."""

    def __init__(
        self,
        head: Head,
        connection: PeerConnection,
        sending: asyncio.Task[None] | None,
        peer: Peer | None,
    ) -> None:
        message, body = head
        self._connection = connection
        self._sending = sending  # the request's body, where it is streamed
        self._peer = peer  # who keeps the connection for the next request; None: nobody
        self.at_hand: bytes | None = None  # a body that came with the head, as a whole
        self._body: StreamReader = EMPTY_PAYLOAD
        if isinstance(body, bytes):
            self.at_hand = body
        elif message.code not in BODILESS_CODES:
            self._body = body
        self.status = message.code
        self.reason: str = message.reason or ""
        self.headers: Headers = message.raw_headers

    async def __aenter__(self) -> HttpResponse:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._sending is not None:
            if not self._sending.done():
                self._connection.abort()
            await ended(self._sending)
        self.release()

    def release(self) -> None:
        """Leave the connection to the next request, if the answer has come to its end."""
        if self._peer is None:
            self._connection.abort()
        else:
            self._peer.put(self._connection)

    @property
    def whole(self) -> bool:
        """Whether all of a small body has come: the next chunk is all that is left."""
        if self.at_hand is not None:
            return True
        return self._body.is_eof() and self._body.total_bytes <= SMALL_BODY_BYTES

    async def read_chunk(self) -> bytes:
        """What has come in since the last call; nothing: that was the end. Raises RequestFailed."""
        if self.at_hand is None:
            return await self._body.readany()
        rest, self.at_hand = self.at_hand, b""
        return rest

    async def read(
        self, keep: int, whole: bool, tell: Tell[bytes] | None = None
    ) -> tuple[bytes, int]:
        """Read to the end; see `gather`. Raises RequestFailed."""
        if self._body.is_eof():
            body = self._body.read_nowait() if self.at_hand is None else self.at_hand
            if tell is not None:
                tell(body)
            if len(body) > keep and whole:
                raise too_long(keep)
            return shorten(body, keep), len(body)
        if whole and told_length(self.headers) > keep:
            raise too_long(keep)  # However slowly it may come, it does not get shorter.
        return await gather(self.read_chunk, keep, whole, tell)

    async def discard(self) -> None:
        """Let a short rest come in, so that the connection can be used again."""
        if not self._body.is_eof():
            with contextlib.suppress(RequestFailed), TimeLimit(Limit(DISCARD_S)):
                await self.read(READ_BYTES, whole=True)


async def gather(
    read: Callable[[], Awaitable[bytes]], keep: int, whole: bool, tell: Tell[bytes] | None = None
) -> tuple[bytes, int]:
    """All that `read` gives, shortened to `keep` bytes, and its full size.

    With `whole`, more than `keep` bytes raise RequestFailed. `tell` is told of each piece as it
    comes.
    """
    kept = Kept(keep)
    while piece := await read():
        kept.add(piece)
        if tell is not None:
            tell(piece)
        if whole and kept.size > keep:
            raise too_long(keep)
    return kept.whole(), kept.size


def told_length(headers: Headers) -> int:
    """The Content-Length of an answer; 0 where it is not told."""
    return max(
        (int(value) for name, value in headers if name.lower() == b"content-length"), default=0
    )


def too_long(keep: int) -> RequestFailed:
    """The error for an answer that is too long to be held."""
    return RequestFailed(FailureKind.TOO_LONG, f"answered more than {keep} bytes")


async def ended(task: asyncio.Task[None]) -> None:
    """Cancel a task, and wait for its end."""
    task.cancel()
    await asyncio.wait({task})


async def send_body(connection: PeerConnection, body: AsyncIterator[bytes], chunked: bool) -> None:
    """Send a body as it comes, at the pace of the peer. What it raises ends the exchange."""
    try:
        async for data in body:
            if data:
                connection.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
                await connection.drain()
            if connection.closed:
                return
        if chunked:
            connection.write(b"0\r\n\r\n")
    except HttpError as exc:
        connection.fail(exc)


def through_proxy(proxy: yarl.URL) -> str:
    """The end of a reason that has to do with a proxy."""
    return f" through the proxy {proxy.raw_host}:{proxy.port}"


def name_proxy(exc: BaseException, proxy: yarl.URL | None) -> None:
    """Have the reason of a wait that is cut short name the proxy if there is one: TimeLimit."""
    if proxy is not None and isinstance(exc, asyncio.CancelledError):
        exc.add_note(through_proxy(proxy))


def as_multidict(headers: Iterable[Header]) -> CIMultiDict[str]:
    """Header fields for an answer.

    Bytes that are not UTF-8 pass as they are (surrogateescape). A name that is repeated in another
    case gets the case of the first, or the repeat would be lost.
    """
    fields: CIMultiDict[str] = CIMultiDict()
    names: dict[bytes, str] = {}
    for name, value in headers:
        shown = names.setdefault(name.lower(), name.decode("latin-1"))
        fields.add(shown, value.translate(CLEAN).decode("utf-8", "surrogateescape"))
    return fields


# --- HTTP client ----------------------------------------------------------------------------------
# The one way out.

STAGGER_S = 0.25  # after which the next address of a name is tried too (RFC 8305 8)
DNS_CACHE_S = 10.0
PROXY_VARIABLES = {
    "http": ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"),
    "https": ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"),
}

AddressInfo = tuple[int, int, int, str, Any]  # as getaddrinfo gives it

# -- connecting


class CheckedResolver:
    """Looks names up in threads, and hands out only addresses that may be called.

    The address that is checked is the one that is connected to (DNS rebinding).
    """

    def __init__(self, allowed: Callable[[str, str], bool], keep_s: float = 0.0) -> None:
        self._allowed = allowed  # host, address
        self._keep_s = keep_s  # for how long an answer counts
        self._known: dict[tuple[str, int], tuple[float, Sequence[AddressInfo]]] = {}
        self._asked: dict[tuple[str, int], asyncio.Future[Sequence[AddressInfo]]] = {}

    async def resolve(self, host: str, port: int) -> Sequence[AddressInfo]:
        """The addresses of a host. Raises RequestFailed, Shortage, OSError."""
        infos = literal_address(host, port) or await self._look_up(host, port)
        allowed = [info for info in infos if self._allowed(host, info[4][0])]
        if not allowed:
            reason = f"to {host} at {infos[0][4][0]} are not allowed"
            raise RequestFailed(FailureKind.FORBIDDEN, reason)
        return allowed

    def check(self, host: str) -> None:
        """Raise RequestFailed for a host that may not be called while its address is unknown."""
        if not self._allowed(host, host):
            reason = f"to {host} through a proxy are not allowed"
            raise RequestFailed(FailureKind.FORBIDDEN, reason)

    async def _look_up(self, host: str, port: int) -> Sequence[AddressInfo]:
        until, infos = self._known.get((host, port), (0.0, ()))
        if until > time.monotonic():
            return infos
        looking_up = self._asked.get((host, port))
        if looking_up is None:
            looking_up = self._asked[host, port] = in_thread("name", addresses_of, host, port)
            looking_up.add_done_callback(functools.partial(self._remember, host, port))
        return await asyncio.shield(looking_up)

    def _remember(
        self, host: str, port: int, looked_up: asyncio.Future[Sequence[AddressInfo]]
    ) -> None:
        del self._asked[host, port]
        if self._keep_s and not looked_up.cancelled() and looked_up.exception() is None:
            if len(self._known) >= MAX_ORIGINS:
                self._known.clear()
            self._known[host, port] = (time.monotonic() + self._keep_s, looked_up.result())


def addresses_of(host: str, port: int) -> Sequence[AddressInfo]:
    """The addresses that the system finds for a name, which may take long. Raises OSError."""
    # AI_ADDRCONFIG leaves out addresses of a family that this machine has no address in. It does
    # not count those of lo: at boot, before DHCP, "localhost" would have none.
    flags = 0 if is_this_machine(host) else socket.AI_ADDRCONFIG
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, "not a name") from None


@functools.lru_cache(256)
def literal_address(host: str, port: int) -> Sequence[AddressInfo]:
    """The address that a host is; empty: it is a name."""
    with contextlib.suppress(ValueError):
        version = ipaddress.ip_address(host).version
        if version == 4:
            return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))]
        if "%" not in host:
            name = (host, port, 0, 0)
            return [(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", name)]
    return []


async def connected(info: AddressInfo) -> socket.socket:
    """A connection to an address. Raises OSError.

    uvloop would look the address up first, in one of libuv's threads. These may all be waiting for
    name servers that don't answer, and to start them takes a mebibyte.
    """
    family, kind, proto, _, address = info
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        watch_silence(sock)
        code = sock.connect_ex(address)
        if code == errno.EINPROGRESS:
            await writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == errno.EADDRNOTAVAIL and source_address(family, address) is not None:
            code = errno.EAGAIN  # There is a way there: what was not available is a port of ours.
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def missing(what: str) -> Iterator[None]:
    """Have the reason of a wait that is cut short in a `with` block say what had yet to come."""
    try:
        yield
    except asyncio.CancelledError as exc:
        exc.add_note(f": {what}")  # See TimeLimit.
        raise


async def first_connected(infos: Sequence[AddressInfo]) -> socket.socket:
    """A connection to the first of some addresses that takes it. Raises OSError.

    Each has STAGGER_S to itself before the next one is tried too (RFC 8305 5).
    """
    if len(infos) == 1:
        return await connected(infos[0])
    left = deque(by_turns(infos))
    trying: set[asyncio.Task[socket.socket]] = set()
    failure = OSError(errno.EADDRNOTAVAIL, "no address")
    try:
        while left or trying:
            if left:
                trying.add(asyncio.create_task(connected(left.popleft()), name="connect"))
            patience_s = STAGGER_S if left else None
            first = asyncio.FIRST_COMPLETED
            done, _ = await asyncio.wait(trying, timeout=patience_s, return_when=first)
            for task in done:
                trying.discard(task)
                try:
                    return task.result()
                except OSError as exc:
                    failure = exc
        raise failure
    finally:
        for task in trying:
            task.cancel()
        for late in await asyncio.gather(*trying, return_exceptions=True):
            if isinstance(late, socket.socket):
                late.close()


def by_turns(infos: Sequence[AddressInfo]) -> Iterator[AddressInfo]:
    """Addresses in their order, but those of the two families in turns (RFC 8305 4)."""
    family = infos[0][0]
    same = [info for info in infos if info[0] == family]
    other = [info for info in infos if info[0] != family]
    for pair in itertools.zip_longest(same, other):
        yield from filter(None, pair)


async def writable(sock: socket.socket) -> None:
    """Wait until a socket takes data, or has failed."""
    loop = asyncio.get_running_loop()
    room: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not room.done():
            room.set_result(None)

    loop.add_writer(sock, tell)
    try:
        await room
    finally:
        loop.remove_writer(sock)


def proxies_of(environment: Mapping[str, str]) -> Mapping[str, yarl.URL]:
    """The proxies by scheme. What is not the URL of an HTTP proxy is ignored."""
    found: dict[str, yarl.URL] = {}
    for scheme, names in PROXY_VARIABLES.items():
        for value in filter(None, map(environment.get, names)):
            with contextlib.suppress(ValueError):
                found.setdefault(scheme, proxy_url(value))
    return found


def proxy_url(value: str) -> yarl.URL:
    """A proxy as a variable names it: HOST:PORT is enough. Raises ValueError."""
    url = http_url(value if "://" in value else f"http://{value}")
    require(url.scheme == "http")  # Others would want TLS or SOCKS.
    return url


def odd_proxies(environment: Mapping[str, str]) -> Iterator[str]:
    """The variables that name a proxy which can't be used."""
    for name in sorted({name for names in PROXY_VARIABLES.values() for name in names}):
        if value := environment.get(name):
            try:
                proxy_url(value)
            except ValueError:
                yield name


def no_proxy_host(entry: str) -> tuple[str, str]:
    """Host or network, and port, of an entry of NO_PROXY; without a port all ports are meant.

    As curl and Python read it, .example.org is example.org and all below it.
    """
    port = ""
    if not is_address(entry) and (found := re.fullmatch(r"(.+):([0-9]+)", entry)):
        entry, port = found[1], found[2]
    return entry.strip("[].").removeprefix("*."), port


def bypasses_proxy(host: str, port: int, environment: Mapping[str, str]) -> bool:
    """Whether a host is reached without a proxy: NO_PROXY has it, or it is this machine."""
    name = host.lower().rstrip(".")
    address = address_in(name)
    if is_this_machine(name) or name.endswith(".localhost") or is_own_address(address):
        return True
    listed = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    entries = [no_proxy_host(entry) for entry in re.split(r"[\s,]+", listed.lower()) if entry]
    hosts = [host for host, its_port in entries if its_port in ("", str(port))]
    names = [name] if address is None else [str(address)]
    return "*" in hosts or is_listed(names, [*hosts, *(f"*.{host}" for host in hosts)])


async def open_tunnel(sock: socket.socket, origin: Origin) -> None:
    """Have the proxy open a tunnel to the origin (RFC 9110 9.3.6). RequestFailed, OSError."""
    assert origin.proxy
    loop = asyncio.get_running_loop()
    host = origin.host.partition("%")[0]
    host = f"[{host}]" if ":" in host else host
    where = f"{host}:{origin.port}"
    login = b"".join(b"%b: %b\r\n" % header for header in proxy_login(origin.proxy))
    # Some proxies let nobody through who does not say who he is, or close after a 200.
    own = f"User-Agent: {USER_AGENT}\r\nProxy-Connection: keep-alive\r\n".encode()
    head = f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n".encode() + own + login + b"\r\n"
    await loop.sock_sendall(sock, head)
    answer = b""
    reason = "did not answer"
    while len(answer) <= MAX_HEADER_BYTES and (data := await loop.sock_recv(sock, 4 * KIB)):
        answer += data
        line = STATUS_LINE.search(answer)
        if line is not None and line[1][:1] != b"2":
            reason = f"answered {line[1].decode()}"  # Its reason may follow, and is not read.
            break
        if line is not None and HEAD_ENDS.search(answer, line.end() - 1):
            return  # In TLS the other end says nothing first.
        if not answer.startswith(b"HTTP/1."[: len(answer)]):
            reason = "did not answer in valid HTTP"
            break
    raise RequestFailed(FailureKind.UNREACHABLE, f"can't be reached: the proxy {reason}")


class RequestOptions(TypedDict, total=False):
    """Options of HttpClient.begin."""

    target: str | None
    tls: ssl.SSLContext | None
    keepalive: bool
    on_status: Tell[int] | None


class HttpClient:
    """Passes requests on as they are, on connections that it keeps.

    No cookies, no decompression, no redirects, no headers of its own. A request that went out on
    a connection which its peer had closed meanwhile is sent once more, on a new one, if the peer
    can't have seen it, or may see it twice by its method.
    """

    def __init__(
        self,
        *,
        keepalive_s: float = POOL_IDLE_S,
        unix_path: str | None = None,
        tls: ssl.SSLContext | None = None,
        resolver: CheckedResolver | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._unix_path = unix_path
        self._resolver = resolver or CheckedResolver(lambda host, address: True, DNS_CACHE_S)
        # A proxy's address is not checked: whoever starts the daemon has chosen it.
        self._proxy_resolver = CheckedResolver(lambda host, address: True, DNS_CACHE_S)
        self._environment = environment or {}  # which may name proxies
        self._proxies = proxies_of(self._environment)
        self._pool = Pool(keepalive_s)
        self._tls = tls  # None: with the system's CAs, made when it is needed
        self._destination = functools.lru_cache(MAX_ORIGINS)(self._find_destination)

    def hang_up(self) -> None:
        """Close the connections that are idle: to where others lead is looked up and checked."""
        self._pool.close()

    async def close(self) -> None:
        """The same at the end."""
        self.hang_up()
        await asyncio.sleep(0)  # until their transports have noticed

    async def request(
        self,
        method: str,
        url: yarl.URL,
        headers: bytes,
        body: bytes | AsyncIterator[bytes],
        **options: Unpack[RequestOptions],
    ) -> HttpResponse:
        """Send a request, and return when the head of the answer has come. No time limit.

        `headers` are packed. Raises RequestFailed; and what `body` raises, if that is an HttpError.
        """
        return await self.finish(self.begin(method, url, headers, body, **options))

    def begin(
        self,
        method: str,
        url: yarl.URL,
        headers: bytes,
        body: bytes | AsyncIterator[bytes],
        *,
        target: str | None = None,
        tls: ssl.SSLContext | None = None,
        keepalive: bool = True,
        on_status: Tell[int] | None = None,
    ) -> HttpRequest:
        """A request that is to be finished; it is sent already if a connection is at hand.

        `target` is a path and query below the URL. `tls` says whom to trust, other than the
        system's CAs, and who we are. Without `keepalive` the connection is used for this request
        alone. `on_status` is told the status in the first line of an answer whose head is not
        whole, or is wrong after that.
        """
        # A private context has few URLs, and may be replaced; and which addresses are those of this
        # machine may change: then destinations are not remembered.
        remembered = tls is None and not self._proxies
        find = self._destination if remembered else self._find_destination
        destination = find(url, tls)
        message = request_message(method, destination, target, headers, body, keepalive)
        origin = destination.origin
        peer = self._pool.peer(origin) if keepalive else None
        request = HttpRequest(method, message, body, on_status, origin, peer)
        request.begin()
        return request

    async def finish(self, request: HttpRequest) -> HttpResponse:
        """The answer to a request that was begun. Returns and raises what `request` does."""
        if request.connection is not None:
            try:
                return await request.response()
            except RequestFailed:
                if not request.lost():
                    raise
        request.send(await self._connect(request.origin))
        return await request.response()

    def _find_destination(self, url: yarl.URL, tls: ssl.SSLContext | None) -> Destination:
        host = called_host(url)
        secure = url.scheme == "https"
        if secure and tls is None:
            if self._tls is None:
                self._tls = system_context()
            tls = self._tls
        port = url.port or 80
        proxy = self._proxies.get(url.scheme) if self._proxies else None
        if proxy is not None and bypasses_proxy(host, port, self._environment):
            proxy = None
        return destination_of(url, Origin(host, port, tls if secure else None, proxy))

    async def _connect(self, origin: Origin) -> PeerConnection:
        """A new connection. Raises RequestFailed."""
        loop = asyncio.get_running_loop()
        sock: socket.socket | None = None
        try:
            sock = await self._open(origin)
            make = functools.partial(PeerConnection, sock)
            if sock.family == socket.AF_UNIX:
                return (await loop.create_unix_connection(make, sock=sock))[1]
            if origin.tls is None:
                return (await loop.create_connection(make, sock=sock))[1]
            with missing("the TLS handshake did not end"):
                return await secured(sock, origin.tls, origin.host)
        except BaseException as exc:
            name_proxy(exc, origin.proxy)
            if sock is not None:
                sock.close()
            if not isinstance(exc, OSError):
                raise
            if sock is None and origin.proxy is not None:
                host = origin.proxy.raw_host or ""
                raise unreachable(exc, host, through_proxy(origin.proxy)) from exc
            raise unreachable(exc, origin.host) from exc

    async def _reach(self, resolver: CheckedResolver, host: str, port: int) -> socket.socket:
        """A socket that is connected to a host. Raises RequestFailed, Shortage, OSError."""
        with missing("no name server answered"):
            infos = await resolver.resolve(host, port)
        with missing("no connection was made"):
            return await first_connected(infos)

    async def _open(self, origin: Origin) -> socket.socket:
        """A socket that leads there. Raises RequestFailed, Shortage, OSError."""
        loop = asyncio.get_running_loop()
        if self._unix_path is not None:
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, self._unix_path)
            except BaseException:
                sock.close()
                raise
            return sock
        if origin.proxy is None:
            return await self._reach(self._resolver, origin.host, origin.port)
        self._resolver.check(origin.host)
        host, port = called_host(origin.proxy), origin.proxy.port or 80
        sock = await self._reach(self._proxy_resolver, host, port)
        try:
            if origin.tls is not None:
                await open_tunnel(sock, origin)
        except BaseException:
            sock.close()
            raise
        return sock


# --- Abandoned programs ---------------------------------------------------------------------------
# A daemon that is killed leaves its programs running, while their calls are queued again.

DAEMON_VARIABLE = "FAASD_ASYNC_DAEMON"  # of a program: the name of the daemon that started it


def daemon_name(config: Config) -> str:
    """A unique name of this process, which begins with the queue that it works on."""
    if config.store.backend == "nats":
        queue = f"{config.nats.stream} at {show_urls(config.nats.servers)}"
    else:
        queue = str(store_path(config).resolve())
    return f"{queue} {process_id()}"


async def end_abandoned(config: Config) -> None:
    """Kill programs of a daemon that has died and had our queue: their calls will run again.

    One that can't be killed or looked at, because a disk hangs, is waited for no longer than
    KILL_S.
    """
    with contextlib.suppress(TimeoutError, Shortage, OSError):  # also where there is no /proc
        killing = in_thread("abandoned", kill_abandoned, daemon_name(config))
        await asyncio.wait_for(killing, KILL_S)


def kill_abandoned(us: str) -> None:
    """Kill programs that are abandoned, and wait until they are gone. Blocks."""
    groups = {}
    ends = []
    for pidfd, group, call_id in abandoned_processes(us):
        ends.append(pidfd)
        groups[group] = call_id
    for group, call_id in groups.items():
        fields = {"pid": group, "call_id": call_id}
        log_with(logging.WARNING, "killing a program of a daemon that has died", **fields)
        kill_group(group)
    for pidfd in ends:
        select.select([pidfd], [], [])
        os.close(pidfd)


def kill_group(pid: int) -> None:
    """Kill a command and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def abandoned_processes(us: str) -> Iterator[tuple[int, int, str]]:
    """A pidfd, the group and the call id of each process that is abandoned.

    What has no pipe has made itself independent, and goes on.
    """
    for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()):
        with contextlib.suppress(OSError, ValueError):  # It has ended, or is somebody else's.
            variables = variables_of(pid)
            group = os.getpgid(pid)
            daemon = variables.get(DAEMON_VARIABLE, "")
            if is_dead_namesake(daemon, us) and group != os.getpgrp() and has_pipe(pid):
                yield os.pidfd_open(pid), group, variables.get("Http_X_Call_Id", "")


def is_dead_namesake(daemon: str, us: str) -> bool:
    """Whether a daemon had our queue on this machine, and has died."""
    queue, _, process = daemon.rpartition(" ")
    our_queue, _, our_process = us.rpartition(" ")
    return queue == our_queue and has_died(process, our_process)


def variables_of(pid: int) -> Mapping[str, str]:
    """The environment that a process was started with. Raises OSError."""
    entries = os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def has_pipe(pid: int) -> bool:
    """Whether one of the standard streams of a process is a pipe without a name. Raises OSError."""
    streams = [Path(f"/proc/{pid}/fd/{number}") for number in range(3)]
    return any(str(link.readlink()).startswith("pipe:") for link in streams if link.is_fifo())


# --- Commands -------------------------------------------------------------------------------------
# -- what a program is given, and what its answer is

# systemd's own variables, and libuv's.
PRIVATE_VARIABLES = re.compile(
    r"NOTIFY_SOCKET|WATCHDOG_\w+|LISTEN_\w+|\w+_DIRECTORY|JOURNAL_STREAM|INVOCATION_ID|UV_\w+"
)


def canonical_name(name: bytes) -> str:
    """A header's name as Go's textproto writes it, such as X-Call-Id."""
    return "-".join(map(str.capitalize, name.decode("latin-1").split("-")))


def command_environment(function: Function, request: FunctionRequest) -> dict[str, str]:
    """The variables of a command: ours without systemd's, the classic watchdog's, then `env`."""
    path, _, query = request.target.partition("?")
    headers: dict[str, str] = {}
    for raw_name, raw_value in unpack_headers(request.headers):
        name = canonical_name(raw_name)
        value = os.fsdecode(raw_value)
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    headers.pop("Proxy", None)  # Many programs would obey it (httpoxy, CVE-2016-5385).
    variables = {f"Http_{name.replace('-', '_')}": value for name, value in headers.items()}
    length = headers.get("Content-Length", "-1")
    if isinstance(request.body, bytes):
        length = str(len(request.body))
    elif length == "-1":
        variables["Http_Transfer_Encoding"] = "chunked"
    variables["Http_ContentLength"] = length
    variables["Http_Content_Length"] = length
    variables["Http_Method"] = request.method
    variables["Http_Path"] = path or "/"
    variables["Http_Query"] = query
    if "X-Forwarded-Host" in headers:
        variables["Http_Host"] = headers["X-Forwarded-Host"]
    inherited = {
        name: value for name, value in os.environ.items() if not PRIVATE_VARIABLES.fullmatch(name)
    }
    if function.cwd:
        inherited["PWD"] = str(Path(function.cwd).absolute())
    return {**inherited, **variables, **function.env}


def require_executable(function: Function, request: FunctionRequest) -> None:
    """HttpError(431) if the headers are too large for a program's environment (execve(2))."""
    variables = command_environment(function, request)
    sizes = [len(os.fsencode(f"{name}={value}")) + 1 for name, value in variables.items()]
    sizes += [len(os.fsencode(word)) + 1 for word in function.command or ()]
    pointers = 8 * (len(sizes) + 3)
    if max(sizes) > MAX_VARIABLE_BYTES or sum(sizes) + pointers > os.sysconf("SC_ARG_MAX") // 2:
        raise HttpError(431, "the headers are too large for the environment of a program")


def command_content_type(function: Function, request: FunctionRequest, body: bytes) -> bytes:
    """The Content-Type of a command's answer: the key's, the request's, or what it looks like."""
    if function.content_type:
        return function.content_type.encode()
    for name, value in unpack_headers(request.headers):
        if name.lower() == b"content-type" and value:
            return value
    return looks_like(body)


def looks_like(body: bytes) -> bytes:
    """The Content-Type of a body by its looks: that of text in UTF-8, or of anything."""
    try:
        body.decode()
    except UnicodeDecodeError:
        return b"application/octet-stream"
    return b"text/plain; charset=utf-8"


# -- running it


class PipeReader:
    """Reads a pipe, and tells what comes as it comes."""

    def __init__(self, pipe: IO[bytes], keep: int, tell: Tell[bytes] | None) -> None:
        self.keep = keep
        self.kept = Kept(keep)
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self.overflowed: asyncio.Future[None] = self._loop.create_future()  # more than `keep` came
        self._pipe = pipe
        os.set_blocking(pipe.fileno(), False)
        self._loop.add_reader(pipe.fileno(), self._read)

    def _read(self) -> None:
        try:
            chunk = os.read(self._pipe.fileno(), PIPE_BYTES)
        except BlockingIOError:
            return
        if not chunk:
            self.close()
            return
        self.kept.add(chunk)
        if self._tell is not None:
            self._tell(chunk)
        if self.kept.size > self.keep and not self.overflowed.done():
            self.overflowed.set_result(None)

    def close(self) -> None:
        """Read no more."""
        if not self.ended.done():
            self._loop.remove_reader(self._pipe.fileno())
            self._pipe.close()
            self.ended.set_result(None)


class Program:
    """A process that runs for one request, in a session of its own, with pipes of its own."""

    def __init__(
        self, process: subprocess.Popen[bytes], keep: int, tell: Tell[bytes] | None
    ) -> None:
        assert process.stdin and process.stdout and process.stderr
        self.pid = process.pid
        self._pidfd = os.pidfd_open(process.pid)  # first, because it can fail
        self.stdout = PipeReader(process.stdout, keep, tell)
        self.stderr = PipeReader(process.stderr, MAX_STDERR_BYTES, tell)
        self._process = process
        self._stdin = process.stdin
        os.set_blocking(self._stdin.fileno(), False)
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()  # its exit code
        self._ending = False
        self._loop.add_reader(self._pidfd, self._reap)

    def _reap(self) -> None:
        code = self._process.poll()
        if code is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self.exited.set_result(code)

    async def talk(self, body: bytes | AsyncIterator[bytes]) -> None:
        """Feed the program and take what it writes, until it has ended.

        Raises RequestFailed if it writes more than can be held, and what `body` raises.
        """
        feeding = asyncio.create_task(self._feed(body), name=f"stdin of {self.pid}")
        waiting: set[asyncio.Future[Any]] = {self.exited, self.stdout.overflowed, feeding}
        try:
            while not self.exited.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if feeding in done:
                    feeding.result()
                self._require_room()
        finally:
            feeding.cancel()
            await asyncio.wait({feeding})

    async def take_rest(self) -> None:
        """Give processes that it has left behind COMMAND_GRACE_S to write, then kill them.

        RequestFailed as above.
        """
        outputs = {self.stdout.ended, self.stderr.ended}
        await asyncio.wait(outputs, timeout=COMMAND_GRACE_S)
        kill_group(self.pid)  # They held the pipes, which come to their end now.
        await asyncio.wait(outputs, timeout=COMMAND_GRACE_S / 5)
        self._require_room()

    def _require_room(self) -> None:
        if self.stdout.overflowed.done():
            raise too_long(self.stdout.keep)

    async def _feed(self, body: bytes | AsyncIterator[bytes]) -> None:
        """Write a body to the program, which may stop reading whenever it likes."""
        with contextlib.suppress(BrokenPipeError):
            if isinstance(body, bytes):
                await self._write(body)
            else:
                async for chunk in body:
                    await self._write(chunk)
        self._stdin.close()

    async def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._stdin.fileno(), left) :]
            except BlockingIOError:
                await self._writable()

    async def _writable(self) -> None:
        """Wait until the program has read something."""
        fd = self._stdin.fileno()
        room = asyncio.Event()
        self._loop.add_writer(fd, room.set)
        try:
            await room.wait()
        finally:
            self._loop.remove_writer(fd)

    async def end(self) -> bool:
        """Kill what is left of the program, and close its pipes.

        False: it can't be killed. It is waited for no longer, and reaped when it ends.
        """
        if not self._ending:
            self._ending = True
            kill_group(self.pid)
            self._stdin.close()
            self.stdout.close()
            self.stderr.close()
            await asyncio.wait({self.exited}, timeout=KILL_S)
        return self.exited.done()


class CommandRunner:
    """Runs commands like the classic watchdog: a process for each request."""

    def __init__(self, us: str) -> None:
        self._us = us  # what programs have in DAEMON_VARIABLE
        self._pids: set[int] = set()  # of programs that run
        self._starting = 0

    async def run(
        self,
        function: Function,
        request: FunctionRequest,
        limit: Limit,
        keep: int,
        tell: Tell[bytes] | None = None,
    ) -> Outcome:
        """Run a command for one request. Its process group never outlives the call.

        `tell` is told what it writes to stdout and stderr as it comes.

        Raises RequestFailed if it can't be started, writes more than `keep` bytes or takes too
        long; Shortage; and what the request's body raises.
        """
        started = time.perf_counter()
        program: Program | None = None
        try:
            with TimeLimit(command_limit(function, limit)):
                process = await self._start(function, request)
                program = self._follow(function, process, keep, tell)
                await program.talk(request.body)
            await program.take_rest()
        except RequestFailed as exc:
            if program is None or await program.end():
                raise
            reason = f"{exc.text}, and its process {program.pid} can't be killed"
            raise RequestFailed(exc.kind, reason) from None
        finally:
            if program is not None:
                await self._bury(program, function.name)
            self.reap_orphans()
        return command_outcome(function, request, program, time.perf_counter() - started)

    async def _start(self, function: Function, request: FunctionRequest) -> subprocess.Popen[bytes]:
        """A new process. Raises RequestFailed, Shortage."""
        environment = {**command_environment(function, request), DAEMON_VARIABLE: self._us}
        self._starting += 1
        try:
            # Each start gets a thread: execve(2) hangs when the disk does, and nobody else should
            # wait for that.
            starting = in_thread("start", spawn, function, environment)
            try:
                process = await asyncio.shield(starting)
            except asyncio.CancelledError:
                # Nobody waits for it any more.
                starting.add_done_callback(functools.partial(discard_started, function.name))
                raise
            self._pids.add(process.pid)
        except (OSError, ValueError, Shortage, subprocess.SubprocessError) as exc:
            raise start_failure(function, exc) from exc
        finally:
            self._starting -= 1
        return process

    def _follow(
        self,
        function: Function,
        process: subprocess.Popen[bytes],
        keep: int,
        tell: Tell[bytes] | None,
    ) -> Program:
        """The Program of a new process. Raises RequestFailed, Shortage."""
        try:
            return Program(process, keep, tell)
        except OSError as exc:
            self._pids.discard(process.pid)
            discard(function.name, process)
            raise start_failure(function, exc) from exc

    async def _bury(self, program: Program, function: str) -> None:
        if not await program.end():
            tell_left_alone(function, program.pid)
        self._pids.discard(program.pid)

    def watch_orphans(self) -> None:
        """As process 1, be told of orphans.

        uvloop keeps SIGCHLD for itself, but does not use it.
        """
        if os.getpid() == 1:
            signal.signal(signal.SIGCHLD, lambda *_: self.reap_orphans())

    def reap_orphans(self) -> None:
        """As process 1 of a container, reap what programs have left behind."""
        if os.getpid() != 1 or self._starting:
            return
        with contextlib.suppress(OSError):  # a kernel without this file, or a hidden /proc
            children = Path("/proc/1/task/1/children").read_text().split()
            for pid in {*map(int, children)} - self._pids:
                os.waitpid(pid, os.WNOHANG)


def command_limit(function: Function, limit: Limit) -> Limit:
    """The shorter of a caller's limit and the function's own."""
    own_s = function.exec_timeout
    if own_s is None or (limit.seconds is not None and limit.seconds <= own_s):
        return limit
    return Limit(own_s, f"functions.{function.name}.exec_timeout")


def spawn(function: Function, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command, with pipes and nothing else of ours. Blocks until it runs."""
    return subprocess.Popen(
        function.command or (),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        cwd=function.cwd,
        env=environment,
    )


def command_outcome(
    function: Function, request: FunctionRequest, program: Program, duration_s: float
) -> Outcome:
    """The outcome of a program that has ended."""
    code = program.exited.result()
    body = program.stdout.kept.whole()
    stderr = program.stderr.kept.whole()
    error = None
    if code != 0:
        body = body or stderr
        how = f"exit status {code}" if code > 0 else f"killed by signal {-code}"
        last = last_line(stderr)
        error = f"function {function.name}: {how}" + (f": {last}" if last else "")
    content_type = looks_like(body) if error else command_content_type(function, request, body)
    headers = ((b"Content-Type", content_type),)
    status = 500 if error else 200
    return Outcome(status, not error, duration_s, headers, body, len(body), stderr, error)


def last_line(written: bytes) -> str:
    """The last line that is not blank, for people: cut, and without control characters."""
    lines = [line for line in written.splitlines() if line.strip()]
    last = lines[-1].decode(errors="replace") if lines else ""
    return "".join(char if char.isprintable() else " " for char in last).strip()[:LAST_LINE]


def start_failure(function: Function, exc: Exception) -> Exception:
    """Why a program could not be started: RequestFailed, or Shortage if it is our own."""
    number = getattr(exc, "errno", None)
    reason = getattr(exc, "strerror", None) or str(exc)
    if number in Shortage.ERRORS or isinstance(exc, Shortage):
        return Shortage(f"function {function.name} can't be started for now: {reason}")
    path = str(getattr(exc, "filename", None) or (function.command or ("",))[0])
    hint = ""
    if path.startswith(("/home/", "/root/", "/run/user/")):
        hint = " (a systemd service with ProtectHome does not see it)"
    missing = number == errno.ENOENT and path != function.cwd
    if missing and (program := find_program(function)):
        missing = False
        interpreter = missing_interpreter(program) or "what loads it"
        hint = f" (its interpreter is missing: {interpreter})"
    kind = FailureKind.MISSING if missing else FailureKind.LOCAL
    return RequestFailed(kind, f"can't be started: {path}: {reason}{hint}")


def tell_left_alone(function: str, pid: int) -> None:
    """Log that a program goes on without us."""
    fields = {"function": function, "pid": pid}
    log_with(logging.WARNING, "a program can't be killed, and is left alone", **fields)


def discard(function: str, process: subprocess.Popen[bytes]) -> None:
    """Kill a command that was started for a call which has gone meanwhile."""
    kill_group(process.pid)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()
    # Reaped by a thread, as nobody waits for it; without one it is a zombie until the next start.
    begin_thread("reap", reap, function, process)


def discard_started(function: str, starting: asyncio.Future[subprocess.Popen[bytes]]) -> None:
    """Kill a command, if its start succeeded, for which nobody has waited."""
    if not starting.cancelled() and starting.exception() is None:
        discard(function, starting.result())


def reap(function: str, process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a command that was killed. Blocks."""
    try:
        process.wait(KILL_S)
    except subprocess.TimeoutExpired:
        tell_left_alone(function, process.pid)
        process.wait()


# --- Function limits ------------------------------------------------------------------------------


class FunctionLimits:
    """How many calls functions may take: their calls in flight, sync and queued, their max_inflight
    and rates, and what their 429s have taught.
    """

    def __init__(self, settings: Settings, on_room: Callable[[], None]) -> None:
        self._settings = settings
        self._on_room = on_room  # told when a function that was full may have room again
        self._provided: dict[str, int] = {}  # max_inflight of the provider's functions
        self._provided_rates: dict[str, Rate] = {}  # and their rates
        self._configured: Mapping[str, int] = {}  # max_inflight of the file's functions
        self._all: Mapping[str, int] = {}  # of all functions
        self._running: Counter[str] = Counter()  # calls in flight, of functions that have some
        self._resting: dict[str, float] = {}  # functions that get no calls until then (monotonic)
        self._learned: dict[str, Learned] = {}
        self._room = asyncio.Event()  # set, and replaced, whenever there may be room

    def room(self, adaptive: bool) -> dict[str, int]:
        """How many more calls each function with a limit can take; "": any other one."""
        room = dict(self._limits())
        if adaptive:
            for name, learned in self._learned.items():
                room[name] = min(room.get(name, 1 << 30), int(learned.limit))
        for name, running in self._running.items():
            if name in room:
                room[name] = max(0, room[name] - running)
        now = time.monotonic()
        room |= {name: 0 for name, until in self._resting.items() if until > now}
        return {**room, "": 1} if adaptive else room

    def _limits(self) -> Mapping[str, int]:
        """All limits. They are put together when some have changed: each claim asks for them."""
        configured = self._settings().function_limits
        if self._configured is not configured:
            self._configured = configured
            self._all = {**self._provided, **configured}
        return self._all

    def rates(self) -> Mapping[str, Rate]:
        """The rates of functions that have one."""
        rates = self._settings().function_rates
        return {**self._provided_rates, **rates} if self._provided_rates else rates

    def learn(self, name: str, status: int, started: float) -> None:
        """Learn from an answer how many calls a function takes at once; see `learn`."""
        before = self._learned.get(name, Learned())
        self._learned[name] = learn(before, status, started, time.monotonic())
        self._on_room()

    def rest(self, name: str, rest_s: float) -> None:
        """Give a function no calls for a while."""
        self._resting[name] = time.monotonic() + rest_s
        asyncio.get_running_loop().call_later(rest_s + 0.01, self._on_room)

    def end_rests(self) -> None:
        """End all rests: a reload may have mended what they were for."""
        self._resting.clear()
        self.changed()

    def provide(self, name: str, function: Function | None) -> None:
        """Take over the limits of a provider's function; None: it has gone."""
        limit = function.max_inflight if function else None
        rate = function.rate if function else None
        if (self._provided.get(name), self._provided_rates.get(name)) == (limit, rate):
            return
        self._provided.pop(name, None)
        self._provided_rates.pop(name, None)
        if limit is not None:
            self._provided[name] = limit
        if rate is not None:
            self._provided_rates[name] = rate
        self._configured = {}  # Put all together again.
        self.changed()

    def changed(self) -> None:
        """There may be room where there was none: a call has ended, or a limit has changed."""
        self._room.set()
        self._room = asyncio.Event()
        self._on_room()

    def limit(self, name: str) -> int | None:
        """A function's max_inflight."""
        return self._settings().function_limits.get(name) or self._provided.get(name)

    def running(self, name: str) -> int:
        """How many calls of a function are in flight."""
        return self._running[name]

    def full(self, name: str) -> bool:
        """Whether a function takes no more calls for now."""
        limit = self.limit(name)
        return limit is not None and self._running[name] >= limit

    async def wait(self, name: str) -> None:
        """Wait until a function has room: a sync call may have taken what a claim was promised."""
        while self.full(name):
            await self._room.wait()

    def hold(self, name: str) -> HeldSlot:
        """A `with` block that takes a slot of a function."""
        return HeldSlot(self, name)

    def begin(self, name: str) -> None:
        """A call of a function begins."""
        self._running[name] += 1

    def end(self, name: str) -> None:
        """A call of a function has ended."""
        self._running[name] -= 1
        if not self._running[name]:
            del self._running[name]
        if self.limit(name) is not None:  # else nobody waits for it
            self.changed()


class HeldSlot:
    """A slot of a function, taken from the beginning of a `with` block to its end."""

    __slots__ = ("_limits", "_name")

    def __init__(self, limits: FunctionLimits, name: str) -> None:
        self._limits = limits
        self._name = name

    def __enter__(self) -> None:
        self._limits.begin(self._name)

    def __exit__(self, *_: object) -> None:
        self._limits.end(self._name)


# --- Functions ------------------------------------------------------------------------------------
# -- provider, directory and scaling


def provider_failure(exc: RequestFailed) -> Exception:
    """ProviderAway if no connection to the provider could be made, else the failure itself."""
    if exc.kind is FailureKind.UNREACHABLE:
        return ProviderAway(f"the provider {exc.text}")
    return exc


@expects("a list")
def a_list(value: Any) -> list[Any]:
    """A list of anything."""
    require(isinstance(value, list))
    return list(value)


@expects("a list of functions")
def function_list(value: Any) -> Sequence[dict[str, Any]]:
    """A provider's functions: tables with a name and a namespace. Go's empty list may be null."""
    listed = a_list([] if value is None else value)
    require(all(text(item["name"]) and text(item["namespace"]) for item in listed))
    return listed


class Fetched(NamedTuple):
    """An answer that was read to its end."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Provider:
    """faasd's REST API."""

    settings: Settings
    http: HttpClient

    @property
    def url(self) -> yarl.URL | None:
        """Where the provider is; None: there is none."""
        return self.settings().provider.url

    async def request(
        self, method: str, target: str, headers: Sequence[Header], body: bytes = b""
    ) -> HttpResponse:
        """Send a request with our login; the answer is not read yet. Raises RequestFailed."""
        config = self.settings()
        if self.url is None:
            raise ProviderAway("no provider is configured")
        sent = [item for item in headers if item[0].lower() != b"authorization"]
        sent.append((b"Via", via(target).encode()))
        if login := config.provider.login or config.auth.login:
            sent.append((b"Authorization", login.encode("latin-1")))
        try:
            packed = pack_headers(sent)
            return await self.http.request(method, self.url, packed, body, target=target)
        except RequestFailed as exc:
            raise provider_failure(exc) from None

    async def ask(
        self, method: str, target: str, body: bytes = b"", limit_s: float | None = None
    ) -> Fetched:
        """Send a request, and read its answer. Raises ProviderAway if there is none."""
        headers = [(b"Content-Type", b"application/json")]
        try:
            with TimeLimit(Limit(limit_s or PROVIDER_S)):
                async with await self.request(method, target, headers, body) as response:
                    answer, _ = await response.read(MAX_RESPONSE_BYTES, whole=True)
        except RequestFailed as exc:
            raise ProviderAway(f"the provider {exc.text}") from None
        return Fetched(response.status, response.headers, answer)

    async def look_up(self, name: str, namespace: str) -> Function | None:
        """A function as the provider describes it now. Raises ProviderAway."""
        key = function_key(name, namespace)
        answer = await self.ask("GET", f"/system/function/{name}?namespace={namespace}")
        if answer.status in (400, 404):
            return None
        if answer.status != 200:
            raise ProviderAway(f"the provider answered {answer.status} to a look-up of {key}")
        try:
            document = table(parse_json(answer.body))
            labels = string_table(document.get("labels") or {})
            annotations = string_table(document.get("annotations") or {})
            replicas = document.get("availableReplicas") or 0
            require(type(replicas) is int)
        except ValueError:
            reason = f"what the provider answered to a look-up of {key} describes no function"
            raise ProviderAway(reason) from None
        return replace(
            annotated(name, namespace, annotations, self.settings().retry),
            # The credentials are for the provider, not for functions.
            url=yarl.URL(str(self.url)).with_user(None).joinpath("function", key),
            labels=labels,
            replicas=replicas,
        )

    async def annotations(self) -> Mapping[str, Mapping[str, str]]:
        """The annotations of all functions, by NAME.NAMESPACE. Raises ProviderAway."""
        found: dict[str, Mapping[str, str]] = {}
        for namespace in await self._documents("/system/namespaces"):
            query = urlencode({"namespace": namespace})
            for document in await self._documents(f"/system/functions?{query}"):
                with contextlib.suppress(ValueError, TypeError, KeyError):  # It is none.
                    name = text(document["name"])
                    annotations = string_table(document.get("annotations") or {})
                    found[function_key(name, namespace)] = annotations
        return found

    async def _documents(self, target: str) -> list[Any]:
        answer = await self.ask("GET", target)
        try:
            require(answer.status == 200)
            return a_list(parse_json(answer.body))
        except ValueError:
            raise ProviderAway(f"the provider answered {answer.status} to {target}") from None

    async def scale_up(self, function: Function) -> None:
        """Ask for one replica. Raises ProviderAway; HttpError(503) with the provider's reason."""
        name = function.name
        document = {"serviceName": name, "namespace": function.namespace, "replicas": 1}
        body = json.dumps(document).encode()
        answer = await self.ask("POST", f"/system/scale-function/{name}", body)
        if answer.status >= 300:
            text = " ".join(answer.body[:200].decode(errors="replace").split())
            reason = f"the provider does not start function {name}: it answered {answer.status}"
            raise HttpError(503, f"{reason} {text}".rstrip(), LATER)


class Seen(NamedTuple):
    """What the provider said last of a name."""

    change: int  # how many changes we knew of when it was asked
    fresh_until: float  # monotonic
    function: Function | None


class FunctionDirectory:
    """Finds functions, in the configuration and then at the provider, and has them woken."""

    def __init__(self, settings: Settings, provider: Provider, limits: FunctionLimits) -> None:
        self._settings = settings
        self._provider = provider
        self._limits = limits
        self._changes = 0
        self.changed = asyncio.Event()  # set: something has changed at the provider
        # By key, the least recently used first. What is not fresh is kept for longer, so that
        # calls can be queued while the provider is away.
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        self._asking: dict[str, asyncio.Task[Any]] = {}  # look-ups and scale-ups, to be joined

    def known(self, name: str) -> Function | None:
        """The function NAME[.NAMESPACE] as the file has it, or as the provider had it last."""
        function = self._settings().functions_by_name.get(name)
        if function is not None or not self._seen:
            return function
        seen = self._seen.get(self._key(name))
        return seen.function if seen else None

    def _key(self, name: str) -> str:
        return name if "." in name else function_key(name, self._settings().gateway.namespace)

    def at_hand(self, name: str) -> Function | None:
        """What `find` would give, if that needs no look-up."""
        function = self._settings().functions_by_name.get(name)
        if function is not None or not self._seen:
            return function
        seen = self._fresh(self._key(name))
        return seen.function if seen else None

    def _fresh(self, key: str) -> Seen | None:
        """What the provider said of a name, if that still counts."""
        seen = self._seen.get(key)
        if seen is None:
            return None
        self._seen.move_to_end(key)
        fresh = seen.change == self._changes and time.monotonic() < seen.fresh_until
        return seen if fresh else None

    async def find(self, name: str, stale: bool = False) -> Function | None:
        """The function NAME[.NAMESPACE] as it is now; None: there is none. Raises ProviderAway.

        With `stale`, as it was known last, if the provider is away.
        """
        function = self.known(name)
        if self._provider.url is None or (function and not function.provided):
            return function
        key = self._key(name)
        if seen := self._fresh(key):
            return seen.function
        if not all(map(NAME.fullmatch, key.split(".", 1))):
            return None
        try:
            return await self._join(f"{key} {self._changes}", self._look_up(key))
        except ProviderAway:
            if stale and function:
                return function
            raise

    def all(self) -> Iterator[Function]:
        """The functions of the file, and those of the provider that were looked up."""
        yield from self._settings().functions.values()
        for seen in self._seen.values():
            if seen.function:
                yield seen.function

    def rates(self) -> Mapping[str, Mapping[str, Rate]]:
        """The rates of functions that have one, by queue and key."""
        rates: defaultdict[str, dict[str, Rate]] = defaultdict(dict)
        for function in self.all():
            if function.rate is not None:
                rates[function.queue][function.key] = function.rate
        return rates

    def expire(self) -> None:
        """Something has changed at the provider: trust no earlier look-up."""
        self._changes += 1
        self.changed.set()

    async def awake(self, function: Function) -> None:
        """Have a function without replicas started, and wait until it has one.

        Raises ProviderAway, and HttpError(503).
        """
        if function.replicas == 0:
            await self._join(f"wake {function.key}", self._wake(function))

    async def _join(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        """Do something once for all who want it at the same time."""
        if name in self._asking:
            work.close()
        else:
            task = asyncio.create_task(work, name=name)
            self._asking[name] = task
            task.add_done_callback(self._asked)
        result: T = await asyncio.shield(self._asking[name])
        return result

    def _asked(self, task: asyncio.Task[Any]) -> None:
        del self._asking[task.get_name()]
        if not task.cancelled():
            task.exception()  # Whoever asked may have gone away meanwhile.

    async def _look_up(self, key: str) -> Function | None:
        changes = self._changes
        name, _, namespace = key.partition(".")
        function = await self._provider.look_up(name, namespace)
        fresh_until = time.monotonic() + self._settings().provider.cache
        self._seen[key] = Seen(changes, fresh_until, function)
        self._seen.move_to_end(key)
        self._limits.provide(key, function)
        if len(self._seen) > MAX_SEEN:
            forgotten, _ = self._seen.popitem(last=False)
            self._limits.provide(forgotten, None)
        return function

    async def _is_asleep(self, key: str) -> bool:
        function = await self._look_up(key)
        return function is not None and not function.replicas

    async def _wake(self, function: Function) -> None:
        config = self._settings().provider
        if not config.scale_from_zero:
            reason = f"function {function.name} has no replicas"
            raise HttpError(503, f"{reason}, and provider.scale_from_zero is off")
        try:
            async with asyncio.timeout(config.scale_timeout):
                await self._provider.scale_up(function)
                while await self._is_asleep(function.key):  # noqa: ASYNC110 (it has no event)
                    await asyncio.sleep(SCALE_POLL_S)
        except TimeoutError:
            reason = f"function {function.name} has no replicas after provider.scale_timeout"
            raise HttpError(503, reason, LATER) from None


# -- call


@functools.lru_cache(32)
def kept_headers(headers: Headers) -> Headers:
    """The headers of an answer that its outcome keeps. Functions often answer with the same."""
    return tuple(forward_headers(headers, CONTENT_LENGTH))


def has_header(headers: Headers, lower_name: bytes) -> bool:
    """Whether there is a header with this name."""
    return any(name.lower() == lower_name for name, _ in headers)


def unanswered(exc: RequestFailed, who: str, duration_s: float) -> Outcome:
    """The outcome of an attempt that got no answer."""
    error = f"{who} {exc.text}"
    return Outcome(exc.status, False, duration_s, error=error, answered=False, final=exc.final)


# How many bytes of an answer are kept, by whether it is a success, and whether it has to be whole;
# see `gather`.
KeepAnswer = Callable[[bool], tuple[int, bool]]


@dataclass(frozen=True)
class FunctionCaller:
    """Calls functions, whichever kind they are."""

    http: HttpClient
    provided: HttpClient  # for the provider's functions
    commands: CommandRunner
    directory: FunctionDirectory

    def begin(self, function: Function, request: FunctionRequest) -> HttpRequest:
        """Ask a function behind HTTP; see HttpClient.begin."""
        assert function.url
        method, target, headers, body = request
        if function.provided:
            headers += b"Via: %b\n" % via(target).encode()
            return self.provided.begin(method, function.url, headers, body, target=target)
        return self.http.begin(
            method,
            function.url,
            headers,
            body,
            target=target,
            tls=function.tls,
            keepalive=function.keepalive,
        )

    def finish(self, function: Function, asked: HttpRequest) -> Awaitable[HttpResponse]:
        """The answer of a function behind HTTP. Raises RequestFailed, ProviderAway, and what the
        request's body does.
        """
        return self._finish_provided(asked) if function.provided else self.http.finish(asked)

    async def _finish_provided(self, asked: HttpRequest) -> HttpResponse:
        try:
            return await self.provided.finish(asked)
        except RequestFailed as exc:
            raise provider_failure(exc) from None

    async def request(self, function: Function, request: FunctionRequest) -> HttpResponse:
        """Ask a function behind HTTP, and return when the head of its answer has come."""
        return await self.finish(function, self.begin(function, request))

    async def call(
        self,
        function: Function,
        request: FunctionRequest,
        asked: HttpRequest | None,
        limit: Limit,
        keep: KeepAnswer,
        tell: Tell[bytes],
        started: float,
    ) -> Outcome:
        """Call a function and read its answer, which is told as it comes.

        `asked` is what was begun already for a function behind HTTP, and `started` (monotonic)
        when the attempt began. Never raises for what the function does; raises NotNow.
        """
        try:
            if function.command:
                most = max(keep(False)[0], MAX_RESPONSE_BYTES)
                return await self.commands.run(function, request, limit, most, tell)
            with TimeLimit(limit, started):
                asked = asked or self.begin(function, request)
                async with await self.finish(function, asked) as response:
                    ok = succeeded(function, response.status)
                    body, size = await response.read(*keep(ok), tell)
        except RequestFailed as exc:
            who = f"function {function.name}"
            return unanswered(exc, who, time.monotonic() - started)
        return self._outcome(function, response, ok, body, size, started)

    def plain_outcome(
        self,
        function: Function,
        asked: HttpRequest,
        keep: KeepAnswer,
        tell: Tell[bytes],
        started: float,
    ) -> Outcome | None:
        """What `call` returns, if there is nothing to wait for, and nothing wrong."""
        response = asked.plain_response()
        if response is None or response.at_hand is None:
            return None
        body = response.at_hand
        ok = succeeded(function, response.status)
        most, whole = keep(ok)
        if whole and len(body) > most:
            return None
        tell(body)
        kept = shorten(body, most)
        outcome = self._outcome(function, response, ok, kept, len(body), started)
        response.release()
        return outcome

    def _outcome(
        self,
        function: Function,
        response: HttpResponse,
        ok: bool,
        body: bytes,
        size: int,
        started: float,
    ) -> Outcome:
        """The outcome of an attempt that was answered."""
        if function.provided and has_header(response.headers, b"x-openfaas-internal"):
            self.directory.expire()  # The function may have no replicas any more.
        error = None if ok else f"function {function.name} answered {response.status}"
        headers = kept_headers(response.headers)
        duration_s = time.monotonic() - started
        return Outcome(response.status, ok, duration_s, headers, body, size, error=error)


def succeeded(function: Function, status: int) -> bool:
    """Whether a function has answered that its run was a success."""
    # faasd answers 301 to a path that is not clean: the function did not run.
    return 200 <= status < 400 and not (status == 301 and function.provided)


# --- Live output ----------------------------------------------------------------------------------
# What is written while a call runs.

MAX_UNSENT_BYTES = 256 * KIB  # that wait for a slow reader: more is left out
RECENT_BYTES = 64 * KIB  # of what a call has written so far, for who comes later
LEFT_OUT = "\n… what was not read in time is left out …\n".encode()


class Unsent:
    """What one reader is still to be sent: at most MAX_UNSENT_BYTES."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._some = asyncio.Event()

    def put(self, piece: bytes) -> bool:
        """Have a piece sent. False: there was no room, and all that waited is gone with it."""
        self._pieces.append(piece)
        self._bytes += len(piece)
        self._some.set()
        if self._bytes <= MAX_UNSENT_BYTES:
            return True
        self._clear()
        return False

    def wake(self) -> None:
        """Have `take` return."""
        self._some.set()

    async def take(self, limit_s: float | None = None) -> bytes:
        """What is to be sent, as soon as there is something; nothing when the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._some.wait()
        self._some.clear()
        data = b"".join(self._pieces)
        self._clear()
        return data

    def _clear(self) -> None:
        self._pieces.clear()
        self._bytes = 0


class LiveOutput:
    """What one attempt writes: for those who read along, and its end for those who come later."""

    __slots__ = ("_readers", "_recent", "attempt", "ended")

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.ended = False
        self._recent = bytearray()
        self._readers: list[Unsent] = []

    def write(self, piece: bytes) -> None:
        """Take a piece that the attempt has written. Slow readers do not hold it up."""
        self._recent += piece
        if len(self._recent) > 2 * RECENT_BYTES:
            del self._recent[:-RECENT_BYTES]
        for reader in self._readers:
            if not reader.put(piece):
                reader.put(LEFT_OUT)
                reader.put(piece[-RECENT_BYTES:])

    def end(self) -> None:
        """The attempt has ended, and writes no more."""
        self.ended = True
        for reader in self._readers:
            reader.wake()

    async def follow(self) -> AsyncGenerator[bytes, None]:
        """What the attempt has written lately, and all that it writes, to its end."""
        reader = Unsent()
        reader.put(bytes(self._recent))
        self._readers.append(reader)
        try:
            while not self.ended:
                yield await reader.take()
            reader.wake()
            yield await reader.take()
        finally:
            self._readers.remove(reader)


class LiveOutputs:
    """The output of all calls that run here now."""

    def __init__(self, waiters: CallWaiters) -> None:
        self._waiters = waiters
        self._running: dict[str, LiveOutput] = {}  # by id

    def find(self, own_id: str) -> LiveOutput | None:
        """The output of a call, if it runs here."""
        return self._running.get(own_id)

    def begin(self, own_id: str, output: LiveOutput) -> None:
        """An attempt begins. An earlier one, which was cancelled, may still be dying."""
        self._running[own_id] = output
        self._waiters.wake(own_id)

    def end(self, own_id: str, output: LiveOutput) -> None:
        """An attempt has ended."""
        if self._running.get(own_id) is output:  # else a later attempt writes already
            del self._running[own_id]
        output.end()


# --- Jobs -----------------------------------------------------------------------------------------
# What is done with a claim; here, with that of a call.


class Attempt(Protocol):
    """What is done once with a claim, and without a task as long as it goes plainly."""

    def begin(self) -> asyncio.Future[Head] | None:
        """Send its request, if that can be done at once; the answer. None: it takes a task.

        What this raises, `execute` will raise again.
        """

    def outcome(self) -> Outcome | None:
        """What came of it, once the answer is there. None: it takes a task to find out."""

    async def execute(self) -> Outcome | None:
        """Begin, or go on, in a task. None: it could not be made, and will be later."""


class Job(Protocol):
    """What the consumer of a queue does with its work."""

    def room(self, name: str, lanes: Iterable[str]) -> tuple[int, Mapping[str, int]]:
        """How many may run at once in a queue, and how many more of each lane that has a limit.

        `lanes` are those of the work that runs; see WorkQueue.claim.
        """

    def rates(self, name: str) -> Mapping[str, Rate]:
        """How many calls of a queue may start; see WorkQueue.claim."""

    def timeout(self, name: str) -> float:
        """How many seconds an attempt of a queue's work may take."""

    def attempt(self, claim: Claim) -> Attempt:
        """An attempt, which has yet to begin."""

    def decide(self, claim: Claim, outcome: Outcome) -> Decision:
        """What follows from the outcome of an attempt."""

    def ended(self, claim: Claim, outcome: Outcome, decision: Decision) -> None:
        """Count and log an outcome that was stored."""


@functools.lru_cache(256)
def queue_limit(name: str, timeout: float) -> Limit:
    """How long an attempt of a queue's calls may take."""
    return Limit(timeout, f"queues.{name}.timeout")


@functools.lru_cache(8)
def callback_limit(timeout: float) -> Limit:
    """How long a delivery may take."""
    return Limit(timeout, "callback.timeout")


def answer_kept(config: Config, claim: Claim, ok: bool) -> tuple[int, bool]:
    """How many bytes of an answer to keep, and whether it has to be whole, for a callback."""
    if claim.callback_url or (claim.failure_url and not ok):
        return max(MAX_RESPONSE_BYTES, config.gateway.max_payload), True
    return config.calls.keep_output, False


UNKNOWN_S = 30.0  # for which a host leaves calls of a function that it does not know to others


@dataclass(frozen=True)
class InvocationJob:
    """Runs functions for calls that were queued."""

    settings: Settings
    directory: FunctionDirectory
    limits: FunctionLimits
    caller: FunctionCaller
    outputs: LiveOutputs
    metrics: Metrics
    shared: bool  # WorkQueue.SHARED
    rng: random.Random = field(default_factory=random.Random)

    def room(self, name: str, lanes: Iterable[str]) -> tuple[int, Mapping[str, int]]:
        """See Job: the queue's max_inflight, and that of its functions."""
        config = self.settings().queue(name)
        return config.max_inflight, self.limits.room(config.adaptive)

    def rates(self, name: str) -> Mapping[str, Rate]:
        """See Job."""
        rate = self.settings().queue(name).rate
        rates = self.limits.rates()
        return {**rates, "": rate} if rate else rates

    def timeout(self, name: str) -> float:
        """See Job: the queue's own."""
        return self.settings().queue(name).timeout

    def attempt(self, claim: Claim) -> Invoking:
        """See Job."""
        return Invoking(self, claim)

    def decide(self, claim: Claim, outcome: Outcome) -> Decision:
        """See Job: the function's retry policy as it is now."""
        if outcome.ok:
            return SUCCEEDED
        function = self.directory.known(claim.lane)
        policy = function.retry if function else self.settings().retry
        now = time.time()
        return decide(outcome, claim.attempt, claim.max_attempts, policy, now, self.rng)

    def ended(self, claim: Claim, outcome: Outcome, decision: Decision) -> None:
        """See Job. The queue itself tells of the end of calls."""
        self.metrics.processed.count(claim.queue)
        if decision.delay_s is None:
            return
        self.metrics.retries.inc()
        log_with(
            logging.INFO,
            "call will be tried again",
            call_id=claim.call_id,
            function=claim.function,
            attempts=claim.attempt,
            http_status=outcome.status,
            error=outcome.error,
            delay=decision.delay_s,
        )


class Invoking:
    """One run of a function for a call; see Attempt."""

    __slots__ = ("_asked", "_claim", "_function", "_job", "_output", "_request", "_started")

    def __init__(self, job: InvocationJob, claim: Claim) -> None:
        self._job = job
        self._claim = claim
        headers = claim.headers + b"X-Retry: %d\n" % (claim.attempt - 1)
        self._request = FunctionRequest(claim.method, claim.target, headers, claim.body)
        self._function: Function | None = None  # once it may run
        self._asked: HttpRequest | None = None
        self._output = LiveOutput(claim.attempt)
        self._started = 0.0  # monotonic

    def begin(self) -> asyncio.Future[Head] | None:
        """See Attempt."""
        job = self._job
        lane = self._claim.lane
        function = job.directory.at_hand(lane)
        if function is None or function.command or function.replicas == 0 or job.limits.full(lane):
            return None
        self._asked = job.caller.begin(function, self._request)
        self._count_in(function)
        return self._asked.answer

    def outcome(self) -> Outcome | None:
        """See Attempt."""
        assert self._function is not None
        assert self._asked is not None
        caller = self._job.caller
        outcome = caller.plain_outcome(
            self._function, self._asked, self._keep, self._output.write, self._started
        )
        if outcome is not None:
            self._count_out(outcome)
        return outcome

    async def execute(self) -> Outcome | None:
        """See Attempt. None: the provider is away, or this machine is short of something."""
        job = self._job
        claim = self._claim
        try:
            function = self._function or await self._until_ready()
            if function is None:
                return self._unknown()
            return await self._run(function)
        except NotNow as exc:
            log_with(
                logging.WARNING,
                "call waits",
                call_id=claim.call_id,
                function=claim.function,
                error=exc.text,
            )
            job.limits.rest(claim.lane, RETRY_STORE_S)
            return None
        except HttpError as exc:  # It can't be woken.
            return Outcome(exc.status, False, 0.0, error=exc.text, answered=False)

    async def _until_ready(self) -> Function | None:
        """The function, once it may run. None: it does not exist."""
        job = self._job
        lane = self._claim.lane
        function = job.directory.at_hand(lane) or await job.directory.find(lane)
        if function is None:
            return None
        if function.replicas == 0:
            await job.directory.awake(function)
        if job.limits.full(lane):
            await job.limits.wait(lane)
        self._count_in(function)
        return function

    def _unknown(self) -> Outcome:
        """The outcome of a call whose function does not exist: final, unless other hosts may have
        it.

        Then it counts as one that can't be reached from here, and this host takes none of its calls
        for a while.
        """
        claim = self._claim
        if not self._job.shared:
            error = f"function {claim.function} does not exist any more"
            return Outcome(404, False, 0.0, error=error, answered=False)
        self._job.limits.rest(claim.lane, UNKNOWN_S)
        error = f"function {claim.function} does not exist at host {socket.gethostname()}"
        return Outcome(502, False, 0.0, error=error, answered=False)

    async def _run(self, function: Function) -> Outcome:
        job = self._job
        claim = self._claim
        limit = queue_limit(claim.queue, job.timeout(claim.queue))
        outcome = None
        try:
            outcome = await job.caller.call(
                function,
                self._request,
                self._asked,
                limit,
                self._keep,
                self._output.write,
                self._started,
            )
            return outcome
        finally:
            self._count_out(outcome)

    def _keep(self, ok: bool) -> tuple[int, bool]:
        return answer_kept(self._job.settings(), self._claim, ok)

    def _count_in(self, function: Function) -> None:
        """The run begins, and is counted until it ends."""
        claim = self._claim
        self._function = function
        self._started = time.monotonic()
        self._job.outputs.begin(claim.id, self._output)
        self._job.limits.begin(claim.lane)
        self._job.metrics.running.begin(claim.queue, claim.lane)
        self._job.metrics.functions.started[claim.lane] += 1

    def _count_out(self, outcome: Outcome | None) -> None:
        """The run has ended, or is given up."""
        job = self._job
        claim = self._claim
        job.outputs.end(claim.id, self._output)
        job.metrics.running.end(claim.queue, claim.lane)
        job.limits.end(claim.lane)
        status = GONE if outcome is None else outcome.status
        job.metrics.count_end(claim.lane, status, time.monotonic() - self._started)
        if outcome is None:
            return
        config = job.settings()
        if config.queue(claim.queue).adaptive:
            job.limits.learn(claim.lane, status, self._started)
        log_bodies(
            config.log,
            claim.call_id,
            request=claim.body,
            response=outcome.body,
            stderr=outcome.stderr,
        )


# --- Deliveries -----------------------------------------------------------------------------------
# What is done with the claim of a callback.

DELIVERED = Decision("delivered")
# Packed, in the order of CALLBACK_HEADERS.
CALLBACK_LINES = (
    f"User-Agent: {USER_AGENT}\nX-Call-Id: %b\nX-Function-Name: %b\nX-Function-Status: %d\n"
    "X-Duration-Seconds: %.6f\nX-Start-Time: %d\nX-Retry: %d\nX-Retry-Max: %d\n"
).encode()


@functools.lru_cache(32)
def passed_on(headers: bytes, drop: frozenset[bytes]) -> bytes:
    """The end-to-end ones of packed headers, but `drop`. Functions often answer with the same."""
    return pack_headers(forward_headers(unpack_headers(headers), drop))


@functools.lru_cache(1_000)
def callback_url(target: str) -> tuple[yarl.URL, str]:
    """A callback's URL, as it was sent, and its host; see `host_of`.

    RequestFailed for what another program took for a URL.
    """
    try:
        url = http_url(target)
        return url, host_of(url)
    except (ValueError, LookupError):
        reason = "can't be reached: it is no valid URL"
        raise RequestFailed(FailureKind.UNREACHABLE, reason) from None


@dataclass(frozen=True)
class CallbackJob:
    """Delivers outcomes to callback URLs."""

    settings: Settings
    http: HttpClient
    own: HttpClient  # for hosts that mean this daemon
    own_url: yarl.URL
    metrics: Metrics
    rng: random.Random = field(default_factory=random.Random)
    # Hosts whose last delivery failed: they get few slots.
    failing: set[str] = field(default_factory=set)

    def room(self, name: str, lanes: Iterable[str]) -> tuple[int, Mapping[str, int]]:
        """See Job: one host gets at most three quarters of the slots, one that fails an eighth.

        So others always have some.
        """
        most = self.settings().callback.max_inflight
        share = max(1, most - max(1, most // 4))
        sending = Counter(lanes)
        caps = dict.fromkeys(sending, share)
        caps |= dict.fromkeys(self.failing, max(1, most // 8))
        room = {host: max(0, cap - sending[host]) for host, cap in caps.items()}
        return most, {**room, "": share}

    def rates(self, name: str) -> Mapping[str, Rate]:
        """See Job: there are none."""
        return {}

    def timeout(self, name: str) -> float:
        """See Job."""
        return self.settings().callback.timeout

    def attempt(self, claim: Claim) -> Delivering:
        """See Job."""
        log_bodies(self.settings().log, claim.call_id, callback=claim.body)
        return Delivering(self, claim)

    def ask(self, claim: Claim, on_status: Tell[int]) -> tuple[HttpClient, HttpRequest]:
        """Begin the POST; to this daemon itself, if the host is one of its names. RequestFailed."""
        config = self.settings()
        url, host = callback_url(claim.target)
        headers = self._headers(claim, url)
        if host in config.callback.gateway_hosts:
            if not calls_function(url):
                raise RequestFailed(FailureKind.FORBIDDEN, "to this daemon are for functions only")
            own = self.own_url
            url = url.with_scheme("http").with_host(own.host or "").with_port(own.port)
            if claim.hops >= config.callback.max_hops:
                reason = "of this chain end here: callback.max_hops"
                raise RequestFailed(FailureKind.FORBIDDEN, reason)
            headers += b"%b: %d\n" % (HOPS.encode(), claim.hops + 1)
            if config.auth.login and config.auth.invoke:
                url = url.with_user(None)
                headers += b"Authorization: %b\n" % config.auth.login.encode("latin-1")
            return self.own, self.own.begin("POST", url, headers, claim.body)
        if not callback_allowed(host, None, config.callback):
            raise RequestFailed(FailureKind.FORBIDDEN, f"to {host} are not allowed")
        tls = config.callback.tls
        request = self.http.begin("POST", url, headers, claim.body, tls=tls, on_status=on_status)
        return self.http, request

    def _headers(self, claim: Claim, url: yarl.URL) -> bytes:
        """The end-to-end headers of the function's answer, and ours, which replace some of them."""
        ours = CALLBACK_LINES % (
            claim.call_id.encode("latin-1"),
            claim.function.encode("latin-1"),
            claim.http_status or 504,  # of a call that did not start before its deadline
            claim.duration_s or 0,
            claim.start_time,
            max(0, claim.runs - 1),
            claim.max_attempts,
        )
        drop = NOT_CALLED_BACK
        if more := self._more_headers(claim, url):
            drop |= {name.lower().encode() for name in more}
            ours += pack_headers(
                (name.encode(), value.encode("latin-1")) for name, value in more.items()
            )
        if claim.traceparent:
            drop |= {b"tracestate"}
        return passed_on(claim.headers, drop) + ours

    def _more_headers(self, claim: Claim, url: yarl.URL) -> Mapping[str, str]:
        """Headers that only some callbacks have: the receiver's own, a signature, the trace."""
        config = self.settings().callback
        more: dict[str, str] = {}
        if config.headers_file:
            given = config.headers(host_of(url), url.port).items()
            more |= {name: value for name, value in given if name.title() not in CALLBACK_HEADERS}
        if secret := config.signing_secret_file:
            # After a redrive it is another outcome, and another message.
            message_id = f"{claim.id}.{claim.redrives}" if claim.redrives else claim.id
            more |= webhook_signature(secret, message_id, int(time.time()), claim.body)
        if claim.traceparent:  # The trace is the call's, whatever the function has made of it.
            more["traceparent"] = claim.traceparent
        if claim.tracestate:
            more["tracestate"] = claim.tracestate
        return more

    def decide(self, claim: Claim, outcome: Outcome) -> Decision:
        if outcome.ok:
            return DELIVERED
        policy = self.settings().callback.policy
        decision = decide(outcome, claim.attempt, policy.attempts, policy, time.time(), self.rng)
        return decision if decision.delay_s is not None else Decision("failed")

    def ended(self, claim: Claim, outcome: Outcome, decision: Decision) -> None:
        level = logging.INFO
        message = "callback will be tried again"
        if decision.delay_s is None:
            level = logging.DEBUG if outcome.ok else logging.WARNING
            message = f"callback {decision.status}"
            self.failing.discard(claim.lane)
            self.metrics.callbacks.count(decision.status)
            self.metrics.activity.ends[CALLBACKS, decision.status] += 1
        if not log.isEnabledFor(level):
            return
        log_with(
            level,
            message,
            call_id=claim.call_id,
            function=claim.function,
            callback=log_url(claim.target),
            attempts=claim.attempt,
            http_status=outcome.status,
            error=outcome.error,
            delay=decision.delay_s,
        )


class Delivering:
    """One delivery of an outcome, which succeeds with a 2xx; see Attempt."""

    __slots__ = ("_asked", "_claim", "_first_lines", "_job", "_started")

    def __init__(self, job: CallbackJob, claim: Claim) -> None:
        self._job = job
        self._claim = claim
        self._started = time.monotonic()
        self._first_lines: list[int] = []  # statuses of answers that are not whole
        self._asked: tuple[HttpClient, HttpRequest] | None = None

    def begin(self) -> asyncio.Future[Head] | None:
        """See Attempt. Raises RequestFailed."""
        self._asked = self._ask()
        return self._asked[1].answer

    def _ask(self) -> tuple[HttpClient, HttpRequest]:
        return self._job.ask(self._claim, self._first_lines.append)

    def outcome(self) -> Outcome | None:
        """See Attempt."""
        assert self._asked is not None
        response = self._asked[1].plain_response()
        if response is None:
            return None
        response.release()
        return self._answered(response.status, response.headers)

    async def execute(self) -> Outcome | None:
        """See Attempt."""
        try:
            return self._answered(*await self._deliver())
        except Shortage:  # The fault is this machine's: nobody is charged.
            await asyncio.sleep(RETRY_STORE_S)
            return None
        except RequestFailed as exc:
            self._job.failing.add(self._claim.lane)
            forbidden = exc.kind is FailureKind.FORBIDDEN
            who = "callbacks" if forbidden else "the callback URL"
            return unanswered(exc, who, time.monotonic() - self._started)

    async def _deliver(self) -> tuple[int, Headers]:
        """Status and headers of the receiver's answer. Raises RequestFailed, Shortage.

        The status line decides, whatever becomes of the rest.
        """
        limit = callback_limit(self._job.timeout(CALLBACKS))
        try:
            with TimeLimit(limit, self._started):
                client, request = self._asked or self._ask()
                response = await client.finish(request)
        except RequestFailed:
            if self._first_lines:
                return self._first_lines[-1], ()
            raise
        async with response:
            if not response.whole:
                await response.discard()
        return response.status, response.headers

    def _answered(self, status: int, headers: Headers) -> Outcome:
        self._job.failing.discard(self._claim.lane)
        ok = 200 <= status < 300
        error = None if ok else f"the callback URL answered {status}"
        return Outcome(status, ok, time.monotonic() - self._started, headers, error=error)


# --- Consumer -------------------------------------------------------------------------------------


RETURNED = Decision("queued", 0.0)  # as if the attempt had never been
PLAIN_S = 0.05  # An attempt that is not over by then goes on in a task, which can wait for more.


class Settler:
    """Stores the outcomes of one queue's attempts, however long that takes: functions have run."""

    def __init__(self, queue: WorkQueue, job: Job, settled: Callable[[], None]) -> None:
        self._queue = queue
        self._job = job
        self._settled = settled  # told whenever there is one less to be stored
        self._storing: set[asyncio.Future[Any]] = set()
        self._stuck: set[str] = set()  # ids of calls whose outcome could not be stored yet
        self._told = asyncio.Event()  # set whenever the queue tells something
        self._times_told = 0
        self._stopping = False

    @property
    def storing(self) -> int:
        """How many outcomes are not stored yet."""
        return len(self._storing)

    def tell(self) -> None:
        """The queue has told something: it works, perhaps again."""
        self._told.set()
        self._times_told += 1

    def halt(self) -> None:
        """Give up what can't be stored at the next attempt."""
        self._stopping = True
        self.tell()

    async def wait(self) -> None:
        """Wait until all outcomes are stored, or given up."""
        while self._storing:
            await asyncio.wait(self._storing)

    def settle(self, claim: Claim, outcome: Outcome | None) -> None:
        """Complete or retry a call after an attempt. Without an outcome it is charged nothing."""
        decision = RETURNED if outcome is None else self._job.decide(claim, outcome)
        self._follow(self._store(claim, outcome, decision), claim, outcome, decision)

    def _store(self, claim: Claim, outcome: Outcome | None, decision: Decision) -> Awaitable[bool]:
        if outcome is not None and decision.delay_s is None:
            return self._queue.complete(claim, outcome, decision.status)
        return self._queue.retry(claim, outcome, decision.delay_s or 0.0)

    def _follow(
        self, storing: Awaitable[bool], claim: Claim, outcome: Outcome | None, decision: Decision
    ) -> None:
        # SqliteQueue gives futures, thousands a second.
        known = storing if isinstance(storing, asyncio.Future) else None
        future = known or asyncio.ensure_future(storing)
        self._storing.add(future)
        future.add_done_callback(
            functools.partial(self._stored, claim, outcome, decision, self._times_told)
        )

    def _stored(
        self,
        claim: Claim,
        outcome: Outcome | None,
        decision: Decision,
        times_told: int,
        stored: asyncio.Future[bool],
    ) -> None:
        """An outcome is stored, or could not be: then it is tried again."""
        self._storing.discard(stored)
        exc = stored.exception()
        if isinstance(exc, StoreError):
            again = self._store_again(exc, claim, outcome, decision, times_told)
            self._follow(again, claim, outcome, decision)
            return
        self._stuck.discard(claim.id)
        if exc is not None:
            text = "the outcome of call %s could not be stored by this program itself"
            log.error(text, claim.call_id, exc_info=exc)
        elif outcome is not None and stored.result():
            self._job.ended(claim, outcome, decision)
        self._settled()

    async def _store_again(
        self,
        exc: StoreError,
        claim: Claim,
        outcome: Outcome | None,
        decision: Decision,
        times_told: int,
    ) -> bool:
        """Try until the queue works again. False: it was given up."""
        while True:
            level = logging.DEBUG if self._stuck else logging.ERROR  # One line is enough.
            log.log(level, "the outcome of call %s can't be stored yet: %s", claim.call_id, exc)
            self._stuck.add(claim.id)
            if self._stopping:
                log.error("stopping: call %s will run again", claim.call_id)
                return False
            await self._until_told_since(times_told)
            times_told = self._times_told
            try:
                return await self._store(claim, outcome, decision)
            except StoreError as again:
                exc = again

    async def _until_told_since(self, times: int) -> None:
        """Wait until the queue has told something once more than `times`.

        It does once it works again.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETRY_STORE_S):
                if self._times_told == times:
                    self._told.clear()
                    await self._told.wait()
                await asyncio.sleep(RETRY_SOON_S)


class Running:
    """An attempt under way: without a task as long as there is only its answer to wait for."""

    __slots__ = ("_work", "attempt", "claim", "task")

    def __init__(
        self,
        claim: Claim,
        attempt: Attempt,
        work: Callable[[Claim, Attempt], Coroutine[Any, Any, None]],
    ) -> None:
        self.claim = claim
        self.attempt = attempt
        self._work = work
        self.task: asyncio.Task[None] | None = None

    def go_on(self) -> asyncio.Task[None]:
        """Go on in a task."""
        if self.task is None:
            # uvloop's create_task would have it make up a name first.
            work = self._work(self.claim, self.attempt)
            loop = asyncio.get_running_loop()
            self.task = asyncio.Task(work, loop=loop, name=f"call {self.claim.call_id}")
        return self.task


class Consumer:
    """Claims the work of one queue, and runs it. It has a free slot before it claims."""

    def __init__(
        self, name: str, queue: WorkQueue, job: Job, busy: Callable[[], int] = lambda: 1
    ) -> None:
        self.name = name
        self._queue = queue
        self._job = job
        self._busy = busy  # tells how many consumers have work
        self._wake = asyncio.Event()
        self._settler = Settler(queue, job, self._wake.set)
        self._running: dict[Hashable, Running] = {}  # by receipt
        # Receipts that were cancelled since a claim began; None: none is under way.
        self._revoked: set[Hashable] | None = None
        self._loop = asyncio.get_running_loop()
        self._stopping: asyncio.Future[None] = self._loop.create_future()
        self.dispatcher = asyncio.create_task(self._dispatch(), name=f"dispatcher of {name}")
        self.wake()

    @property
    def inflight(self) -> int:
        """How many attempts run."""
        return len(self._running)

    def wake(self) -> None:
        """There may be something to claim: so the queue works, perhaps again."""
        self._wake.set()
        self._settler.tell()

    def cancel(self, receipt: Hashable) -> None:
        """End the attempt of a claim whose work was cancelled, if this queue has it.

        The queue stores nothing of it: the claim is not valid any more.
        """
        if receipt in self._running:
            # Not at once: a task that is cancelled before its first step would not run at all, nor
            # free its slot.
            self._loop.call_soon(self._running[receipt].go_on().cancel)
        elif self._revoked is not None:
            self._revoked.add(receipt)

    def halt(self) -> None:
        """Claim no more."""
        self._stopping.set_result(None)
        self._settler.halt()
        self._wake.set()

    async def stop(self, hurried: asyncio.Task[Any]) -> None:
        """After `halt`, wait for attempts until `hurried` ends; queue the rest again uncharged."""
        # Once it has ended, all tasks have begun: one cancelled before that would not queue its
        # work.
        await asyncio.wait({self.dispatcher})
        tasks = [running.go_on() for running in self._running.values()]
        ended = asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait({ended, hurried}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await ended
        await self._settler.wait()

    async def _dispatch(self) -> None:
        while not self._stopping.done():
            await self._wake.wait()
            await self._until_quiet()
            self._wake.clear()
            lanes = [running.claim.lane for running in self._running.values()]
            limit, room = self._job.room(self.name, lanes)
            wanted = self._wanted(limit)
            if self._stopping.done() or wanted <= 0:
                continue
            try:
                await self._claim(wanted, room)
            except StoreError as exc:
                log.error("queue %s: no work can be claimed: %s", self.name, exc)
                await asyncio.wait([self._stopping], timeout=RETRY_STORE_S)
                self._wake.set()

    async def _until_quiet(self) -> None:
        """Wait until no attempt has ended for some rounds of the event loop, or for MOST_ROUNDS.

        Attempts of fast functions that were claimed together end one after the other. By waiting,
        all that they make room for is claimed at once, in the transaction that stores their
        outcomes.
        """
        quiet = 0  # rounds in which none has ended
        for _ in range(MOST_ROUNDS):
            running = len(self._running)
            if not running or quiet == (QUIET_ROUNDS if self._queue.IN_STEP else 1):
                return
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._running) == running else 0

    def _wanted(self, limit: int) -> int:
        """How many calls to claim now, where so many may run."""
        if self._settler.storing > limit:
            return 0  # Outcomes that can't be stored (disk full) would pile up.
        # A share at a time: a thousand at once would keep new calls waiting.
        share = max(1, MAX_CLAIMS // max(1, self._busy()))
        at_once = limit if self._queue.IN_STEP else math.ceil(limit / 2)
        return min(limit - len(self._running), share, at_once)

    async def _claim(self, wanted: int, room: Mapping[str, int]) -> None:
        """Claim calls, and start them. Raises StoreError."""
        rates = self._job.rates(self.name)
        revoked: set[Hashable] = set()
        self._revoked = revoked
        try:
            claims = await self._queue.claim(self.name, wanted, room, rates)
        finally:
            self._revoked = None
        started = [self._start(claim) for claim in claims if claim.receipt not in revoked]
        if started:
            # A task has the time limit.
            plain_s = min(PLAIN_S, self._job.timeout(self.name))
            self._loop.call_later(plain_s, self._go_on, started)
        if len(claims) >= wanted:
            self._wake.set()

    def _start(self, claim: Claim) -> Hashable:
        """Begin an attempt; its claim's receipt."""
        attempt = self._job.attempt(claim)
        running = self._running[claim.receipt] = Running(claim, attempt, self._work)
        answer = None
        try:
            answer = attempt.begin()
        except Exception as exc:
            log.debug("call %s goes on in a task: %s", claim.call_id, exc)
        if answer is None:
            running.go_on()
        else:
            answer.add_done_callback(functools.partial(self._answered, running))
        return claim.receipt

    def _answered(self, running: Running, _: asyncio.Future[Head]) -> None:
        """An answer has come, or the connection has ended. A task waits for that by itself."""
        if running.task is not None:
            return
        outcome = running.attempt.outcome()
        if outcome is None:
            running.go_on()
        else:
            self._ended(running.claim, outcome)

    def _go_on(self, receipts: Sequence[Hashable]) -> None:
        """Have those of these attempts that are not over go on in tasks."""
        for receipt in receipts:
            if running := self._running.get(receipt):
                running.go_on()

    async def _work(self, claim: Claim, attempt: Attempt) -> None:
        """One attempt to its end."""
        outcome: Outcome | None = None  # None, as a stop leaves it: queued again, uncharged
        try:
            outcome = await attempt.execute()
        except asyncio.CancelledError:
            pass  # by `stop`; or by `cancel`, and then the queue refuses what follows
        except Exception:
            log.exception("attempt of call %s failed in this program itself", claim.call_id)
            outcome = Outcome(500, False, 0.0, error="internal error", answered=False)
        self._ended(claim, outcome)

    def _ended(self, claim: Claim, outcome: Outcome | None) -> None:
        """Free the slot, and have the outcome stored."""
        del self._running[claim.receipt]
        self._wake.set()
        self._settler.settle(claim, outcome)


class Consumers:
    """All consumers: one for each queue that has a name somewhere, and one for callbacks."""

    def __init__(
        self, settings: Settings, queue: WorkQueue, died: Tell[asyncio.Task[None]]
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._died = died  # told when a dispatcher has ended
        self._jobs: Mapping[str, Job] = {}  # by queue; "": of those without an entry
        self._consumers: dict[str, Consumer] = {}  # by queue
        self._claiming = False  # from the start to `halt`

    def start(self, jobs: Mapping[str, Job], names: Iterable[str]) -> None:
        """Begin with these queues. Others follow when there is work in them."""
        self._jobs = jobs
        self._claiming = True
        for name in names:
            self._consumer(name)

    def _consumer(self, name: str) -> Consumer:
        if name not in self._consumers:
            if name not in (*self._settings().queues, CALLBACKS):
                reason = "has calls but is not in the configuration: it runs with the defaults"
                log.warning("queue %s %s", name, reason)
            job = self._jobs.get(name, self._jobs[""])
            consumer = Consumer(name, self._queue, job, self._busy)
            consumer.dispatcher.add_done_callback(self._died)
            self._consumers[name] = consumer
        return self._consumers[name]

    def _busy(self) -> int:
        return sum(consumer.inflight > 0 for consumer in self._consumers.values())

    def wake(self, name: str) -> None:
        """Wake the consumer of a queue: there may be something to claim."""
        if self._claiming:  # else it is to start, and will look into its queue
            self._consumer(name).wake()
        elif name in self._consumers:
            self._consumers[name].wake()

    def wake_all(self) -> None:
        """Wake all consumers."""
        for consumer in self._consumers.values():
            consumer.wake()

    def cancel(self, receipt: Hashable) -> None:
        """End the attempt of a claim whose work was cancelled."""
        for consumer in self._consumers.values():
            consumer.cancel(receipt)

    def inflight(self) -> Mapping[str, int]:
        """How many attempts run, by queue."""
        return {name: consumer.inflight for name, consumer in self._consumers.items()}

    def halt(self) -> None:
        """Claim no more, nor begin with other queues."""
        self._claiming = False
        for consumer in self._consumers.values():
            consumer.halt()

    async def stop(self, hurried: asyncio.Task[Any]) -> None:
        """Stop them all; see Consumer.stop."""
        stops = [consumer.stop(hurried) for consumer in self._consumers.values()]
        await asyncio.gather(*stops)


# --- Intake ---------------------------------------------------------------------------------------
# The one way in for calls that are queued, with or without an HTTP request.


@dataclass(frozen=True, kw_only=True)
class Controls:
    """What a caller asks for with a call, in headers of the same names; None: nothing."""

    id: str | None = None  # its own id, if it has to be the same each time
    call_id: str | None = None
    callback_url: str | None = None
    failure_url: str | None = None
    idempotency_key: str | None = None
    delay_s: float = 0.0  # counted from when the whole request has come
    due_at: float = 0.0
    deadline_at: float | None = None
    max_attempts: int | None = None
    queue: str | None = None
    concurrency_key: str | None = None
    app: str | None = None
    hops: int = 0
    method: str = "POST"
    schedule: str | None = None
    scheduled_for: float | None = None


class CallHeaders(NamedTuple):
    """The headers of a call for its function, packed too, and the trace in them."""

    headers: Sequence[Header]
    packed: bytes
    traceparent: str | None
    tracestate: str | None


def call_headers(headers: Sequence[Header]) -> CallHeaders:
    """Headers as a call needs them."""
    return CallHeaders(headers, pack_headers(headers), *trace_context(headers))


# Names that `Intake.controls` looks for: a request without any has NO_CONTROLS.
ASKING = frozenset(name.lower() for name in (*CONTROL_HEADERS, "X-Call-Id", HOPS))
NO_CONTROLS = Controls()


def parse_one(headers: Mapping[str, str], name: str, parse: Callable[[str], T]) -> T | None:
    """A parameter or header, parsed; None if it is absent.

    Raises HttpError(400), which names it, its value and the expected form; also for a header that
    is repeated with another value.
    """
    value = headers.get(name)
    if value is None:
        return None
    if isinstance(headers, CIMultiDict | CIMultiDictProxy) and len(set(headers.getall(name))) > 1:
        raise HttpError(400, f"{name}: it is there more than once, and not with the same value")
    try:
        return parse(value)
    except ValueError as exc:
        # Also what is no URL may have credentials, before an @.
        shown = json.dumps(re.sub("^.+@", "", show_url(value) or "", flags=re.DOTALL)[:80])
        raise HttpError(400, f"{name}: {shown}: {exc}") from None


def require_chance(deadline_at: float, due_at: float) -> None:
    """HttpError(400) for a call that could not start before its deadline."""
    if deadline_at <= time.time():
        raise HttpError(400, f"X-Deadline: {rfc3339(deadline_at)} has passed already")
    if deadline_at <= due_at:
        reason = f"{rfc3339(deadline_at)} is before the call is due, at {rfc3339(due_at)}"
        raise HttpError(400, f"X-Deadline: {reason}")


@dataclass(frozen=True)
class Intake:
    """Accepts calls."""

    settings: Settings
    queue: Queue
    metrics: Metrics
    refusals: Refusals

    def controls(self, headers: Mapping[str, str], app: str | None = None) -> Controls:
        """What the headers of a request ask for. Raises HttpError(400)."""
        delay_s = parse_one(headers, "X-Delay", duration) or 0.0
        due_at = parse_one(headers, "X-Not-Before", parse_when) or 0.0
        deadline_at = parse_one(headers, "X-Deadline", parse_deadline)
        if deadline_at is not None:
            require_chance(deadline_at, max(due_at, time.time() + delay_s))
        return Controls(
            call_id=parse_one(headers, "X-Call-Id", visible),
            callback_url=parse_one(headers, "X-Callback-Url", self._callback_url),
            failure_url=parse_one(headers, "X-Failure-Callback-Url", self._callback_url),
            idempotency_key=parse_one(headers, "Idempotency-Key", visible),
            delay_s=delay_s,
            due_at=due_at,
            deadline_at=deadline_at,
            max_attempts=parse_one(headers, "X-Max-Attempts", number),
            queue=parse_one(headers, "X-Queue", self._queue_name),
            concurrency_key=parse_one(headers, "X-Concurrency-Key", visible),
            app=app,
            hops=parse_one(headers, HOPS, number) or 0,
        )

    def _queue_name(self, value: str) -> str:
        return one_of(*self.settings().queues)(value)

    def _callback_url(self, value: str) -> str:
        host = callback_host(value)
        config = self.settings().callback
        if host in config.gateway_hosts:
            if not calls_function(http_url(value)):
                raise ValueError("callbacks to this daemon are for functions: /async-function/NAME")
        elif not callback_allowed(host, None, config):
            raise ValueError("callbacks to this host are not allowed by [callback] allow and deny")
        return value

    async def accept_scheduled(self, state: ScheduleState, calls: Sequence[Invocation]) -> int:
        """Queue calls together with what follows for their schedule; see ScheduleStates.save."""
        revision = await self.queue.schedules.save(state, calls)
        for call in calls if revision else ():
            self.stored(call)
        return revision

    def stored(self, call: Invocation) -> None:
        """Count a call that the queue has stored."""
        self.refusals.over()
        self.metrics.submitted.count(call.queue)
        self.metrics.activity.hour.count("accepted", call.queue)

    def invocation(
        self,
        function: Function,
        target: str,
        headers: CallHeaders,
        body: bytes,
        controls: Controls,
    ) -> Invocation:
        """A call as it is to be stored."""
        start_time = time.time_ns()
        own_id = controls.id or new_id()
        call_id = controls.call_id or own_id
        return Invocation(  # by position, which takes a third of the time
            own_id,
            call_id,
            function.name,
            function.namespace,
            controls.queue or function.queue,
            start_time,
            max(start_time / 1e9 + controls.delay_s, controls.due_at),
            controls.max_attempts or function.retry.attempts,
            controls.callback_url,
            target,
            headers.packed + call_lines(call_id, start_time),
            body,
            controls.method,
            controls.deadline_at,
            controls.failure_url,
            controls.idempotency_key,
            controls.app,
            controls.hops,
            headers.traceparent,
            headers.tracestate,
            controls.schedule,
            controls.scheduled_for,
            controls.concurrency_key,
        )


# --- HTTP answers ---------------------------------------------------------------------------------

REASONS = {status.value: status.phrase for status in http.HTTPStatus}
SERVER_LINE = f"Server: {SERVER}\r\n"
WITHOUT_BODY = (204, 304)  # answers that have none (RFC 9110 15.3.5, 15.4.5)
PLAIN_ID = re.compile(r"[A-Za-z0-9_.~-]*")  # RFC 3986 2.3


class Response(NamedTuple):
    """An answer. Its body is whole, unless the route sends it by itself."""

    status: int
    headers: CIMultiDict[str]
    body: bytes = b""
    reason: str | None = None
    lines: bytes = b""  # more headers as they are sent; they are not checked

    @property
    def bare(self) -> bool:
        """Whether it has no headers but those in `lines`, and may have a body."""
        return not self.headers and self.reason is None and self.status not in WITHOUT_BODY


def respond(status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Response:
    """An answer with these headers."""
    return Response(status, CIMultiDict(headers or ()), body)


def reply(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of one line of text, or of JSON. Both end in a newline, for people with curl."""
    if isinstance(content, str):
        text, content_type = content, "text/plain; charset=utf-8"
    else:
        text, content_type = json.dumps(content, ensure_ascii=False), "application/json"
        content_type += "; charset=utf-8"
    # A lone surrogate, which JSON may have and UTF-8 has not, is an escape as it came.
    answer = respond(status, headers, f"{text}\n".encode("utf-8", "backslashreplace"))
    answer.headers["Content-Type"] = content_type
    return answer


def call_path(call_id: str) -> str:
    """Where a call's record is."""
    shown = call_id if PLAIN_ID.fullmatch(call_id) else quote(os.fsencode(call_id), safe="")
    return "/system/calls/" + shown


def no_route(allowed: Sequence[str]) -> HttpError:
    """The error for a request that no route fits; `allowed`: methods that fit its path."""
    if allowed:
        methods = ", ".join(allowed)
        return HttpError(405, f"this route takes {methods}", {"Allow": methods})
    reason = "no such route: calls go to /function/NAME or /async-function/NAME"
    return HttpError(404, reason)


def printable(value: str) -> str:
    """A header's value for an answer: bytes that are no text become ?."""
    return value.encode("utf-8", "replace").decode()


@functools.lru_cache(maxsize=1)
def date_line(now: int) -> str:
    """The Date header at a time (Unix seconds): RFC 9110 5.6.7."""
    return f"Date: {email.utils.formatdate(now, usegmt=True)}\r\n"


@functools.lru_cache(maxsize=64)
def status_line(minor: int, status: int) -> str:
    """The first line of an answer in HTTP/1.`minor`."""
    return f"HTTP/1.{minor} {status} {REASONS.get(status, '')}\r\n"


@functools.lru_cache(maxsize=64)
def bare_head(status: int, length: int, now: int) -> bytes:
    """The first lines of a bare answer of ours in HTTP/1.1: many in a second are the same."""
    framing = f"Content-Length: {length}\r\n{SERVER_LINE}"
    return f"{status_line(1, status)}{framing}{date_line(now)}".encode()


def response_head(answer: Response, minor: int, framing: str) -> bytes:
    """The head of an answer in HTTP/1.`minor`.

    Bytes that are not UTF-8 pass as they are (surrogateescape). Raises ValueError for a header with
    a line break.
    """
    first = status_line(minor, answer.status)
    if answer.reason is not None:
        first = f"HTTP/1.{minor} {answer.status} {answer.reason}\r\n"
    headers = answer.headers
    fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if fields.count("\n") > len(headers) or fields.count("\r") > len(headers):
        raise ValueError("a line break in a header")
    date = "" if "Date" in headers else date_line(int(time.time()))
    head = f"{first}{fields}{framing}{date}"
    return head.encode("utf-8", "surrogateescape") + answer.lines + b"\r\n"


# --- HTTP requests --------------------------------------------------------------------------------
# The way in, with aiohttp's parser, which is C, and its streams, as on the way out. What its server
# does besides takes twice as long as all that is done here for a request.

MAX_PIPELINED = 16  # requests that wait behind the one that is being answered
MAX_LINE_BYTES = 4 * MAX_HEADER_BYTES  # a target of the greatest length, written in ASCII
MAX_SPLITS = 2_000  # of one piece of data, to find targets that are not ASCII
MAX_STRANGERS = 8  # unknown heads in a row, after which no head of the connection is looked up
TARGET_TOO_LONG = f"the request's target is longer than {MAX_HEADER_BYTES} bytes"
# aiohttp's parser refuses a target with bytes above 127. It gets such a target escaped, behind this
# prefix, which nobody can guess: no target that was sent is taken for an escaped one.
ESCAPED = f"/%{os.urandom(8).hex()}%"
HEAD_END = b"\r\n\r\n"
SPOKEN = ((1, 1), (1, 0))  # versions of HTTP

# -- heads


def sent_target(path: str) -> str:
    """The path and query of a request as they were sent.

    Bytes that are not UTF-8 are characters of surrogateescape. For routes of our own, bytes above
    127 are percent-encoded, as they should have been.
    """
    if path.startswith(ESCAPED):
        raw = path.removeprefix(ESCAPED).encode("ascii")
        raw = re.sub(rb"%(25|[89A-F].)", lambda escape: bytes.fromhex(escape[1].decode()), raw)
        path = raw.decode("utf-8", "surrogateescape")
    if not path.startswith("/"):  # absolute form, as sent to a proxy
        parts = split_url(path)
        path = "/" + (parts.rest if parts else "").removeprefix("/")
    if path.isascii() or path.startswith(OF_FUNCTIONS):
        return path
    return in_percent(path)


class RequestHead:
    """What a request says before its body."""

    __slots__ = ("content_length", "headers", "keep_alive", "method", "notes",
                 "prompt", "raw_headers", "target", "usual", "version")  # fmt: skip

    def __init__(self, message: RawRequestMessage) -> None:
        self.method: str = message.method
        self.target = sent_target(message.path)
        self.version: tuple[int, int] = message.version
        self.headers: CIMultiDictProxy[str] = message.headers
        if not message.path.startswith("/"):
            self.headers = headers_for_target(message.path, message.headers)
        self.raw_headers: Sequence[Header] = message.raw_headers
        self.keep_alive = not message.should_close
        # As most are: the head of an answer to it needs nothing special.
        self.usual = self.keep_alive and self.version == (1, 1) and self.method != "HEAD"
        length = message.headers.get("Content-Length")
        self.content_length = None if length is None else int(length)
        self.prompt = False  # whether Application.store may take such a request
        # Results that follow from the head alone, kept because a head may come again; see
        # KnownHeads.
        self.notes: dict[str, Any] = {}


class KnownHeads:
    """Heads that came lately, by their bytes. To look one up takes a tenth of parsing it.

    Whoever calls a function again and again sends the same lines each time.
    """

    MOST = 128
    LONGEST_BYTES = 2 * KIB

    def __init__(self) -> None:
        self._heads: OrderedDict[bytes, RequestHead] = OrderedDict()  # the oldest first

    def find(self, data: bytes) -> RequestHead | None:
        """The head that these bytes are; None: it is not known."""
        head = self._heads.get(data)
        if head is not None:
            self._heads.move_to_end(data)
        return head

    def add(self, data: bytes, head: RequestHead) -> None:
        """Remember a head."""
        if len(data) <= self.LONGEST_BYTES:
            self._heads[data] = head
            if len(self._heads) > self.MOST:
                self._heads.popitem(last=False)


class WholeBody:
    """A body that came in one piece, to be read like a StreamReader that has all of its body."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def is_eof(self) -> bool:
        """Whether all has come."""
        return True

    def at_eof(self) -> bool:
        """Whether all is read."""
        return not self._data

    def read_nowait(self) -> bytes:
        """All that is not read."""
        data = self._data
        self._data = b""
        return data

    async def readany(self) -> bytes:
        """All that is not read."""
        return self.read_nowait()


Content: TypeAlias = "StreamReader | WholeBody"

# -- targets


# A request's first line whose target has bytes above 127, and what may become one.
HIGH_LINE = re.compile(rb"([A-Z-]+ )([^\x00- ]*[\x80-\xff][^\x00- ]*)( HTTP/1\.[01]\r?\n)")
BEGINNING = re.compile(rb"[A-Z-]{1,20}( [^\x00- ]*( [HTP/1.0]{0,8}\r?)?)?")


def ascii_line(line: bytes) -> bytes:
    """A request's first line in characters that the parser takes; see `sent_target`."""
    found = HIGH_LINE.fullmatch(line)
    if found is None:
        return line
    target = re.sub(rb"[%\x80-\xff]", lambda byte: b"%%%02X" % byte[0][0], found[2])
    return found[1] + ESCAPED.encode() + target + found[3]


def may_have_high_line(data: bytes) -> bool:
    """Whether data may have a first line with bytes above 127, or end with the beginning of one."""
    return not data.isascii() or BEGINNING.fullmatch(data, data.rfind(b"\n") + 1) is not None


class AsciiTargets:
    """Has the parser take requests whose targets have bytes above 127: it gets these escaped.

    To find them, what comes in is cut where requests may end.
    """

    def __init__(self) -> None:
        self._line = b""  # the beginning of a request's first line
        self._last = b""  # what was parsed last: the end of a head may come in two pieces

    def pieces(self, data: bytes, body_left: Callable[[], int | None]) -> Iterator[bytes]:
        """What came in, in pieces, each to be parsed before the next one is asked for.

        `body_left` tells how many bytes of a request's body are still to come, if that is known.
        """
        if self._line or b"\n" not in data or may_have_high_line(data):
            pieces = self._cut(self._line + data, body_left)
        else:
            pieces = iter((data,))
        for piece in pieces:
            self._last = (self._last + piece[-3:])[-3:]
            yield piece

    def _cut(self, data: bytes, body_left: Callable[[], int | None]) -> Iterator[bytes]:
        self._line = b""
        for _ in range(MAX_SPLITS):
            left = body_left()
            if left:
                yield data[:left]
                data = data[left:]
                continue
            if left == 0 and data:
                line, newline, rest = data.partition(b"\n")
                if not newline and BEGINNING.fullmatch(line):
                    data = self._keep(line)
                    break
                data = ascii_line(line + newline) + rest
            # Neither a head nor a body in chunks ends before this.
            found = (self._last + data).find(HEAD_END)
            end = found + len(HEAD_END) - len(self._last)
            if found < 0 or not may_have_high_line(data[end:]):
                break
            yield data[:end]
            data = data[end:]
        yield data

    def _keep(self, line: bytes) -> bytes:
        """Keep the beginning of a first line until all of it has come; what to parse now."""
        if len(line) > MAX_HEADER_BYTES:
            return b"GET /" + b"x" * MAX_LINE_BYTES  # The parser says: too long.
        self._line = line
        return b""


# -- requests

Arrival: TypeAlias = "tuple[RequestHead | HttpProcessingError, Content]"


class RequestReader:
    """Finds the requests in what a client sends. What is not HTTP is the last of them.

    They wait in `arrived`. While many of them do, the parser keeps what follows.
    """

    def __init__(self, flow: Flow, known: KnownHeads) -> None:
        self._known = known
        self._parser = HttpRequestParser(
            cast(Any, flow),  # It only hands it on to its streams.
            asyncio.get_running_loop(),
            READ_BYTES,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            auto_decompress=False,
            max_msg_queue_size=MAX_PIPELINED,
        )
        self._targets = AsciiTargets()
        self.arrived: deque[Arrival] = deque()
        self.stalled = False  # whether the parser, or `_kept`, has something to be parsed
        self._unanswered = 0  # requests
        self._ended = False  # by something that is not HTTP
        self._strangers = 0  # heads in a row that were not known
        self._at_start = True  # whether nothing of the next request has come
        self._newest: RequestHead | None = None  # of the last request that has come
        self._body: StreamReader = EMPTY_PAYLOAD  # its body
        self._seen: tuple[StreamReader, int] | None = None  # a body, and how much of it had come
        self._kept: bytes | None = None  # data behind a request that asks for another protocol

    def feed(self, data: bytes) -> None:
        """Take what came in."""
        if self._ended:
            return
        if self._kept is not None:
            self._kept += data
        elif self._strangers >= MAX_STRANGERS:
            self._parse(data)
        elif not self._at_start:
            left = self._body_left()
            self._parse(data)
            # Of longer data the parser may keep a part back.
            ends_body = left == len(data) <= READ_BYTES
            self._at_start = ends_body and self.whole and not self.stalled
        elif not self._take_known(data):
            arrived = len(self.arrived)
            self._parse(data)
            self._at_start = len(self.arrived) == arrived + 1 and self._learn(data)

    def _take_known(self, data: bytes) -> bool:
        """Take data that is exactly one request whose head is known. False: it is not."""
        end = data.find(HEAD_END) + len(HEAD_END)
        head = self._known.find(data[:end])
        if head is None or len(data) != end + (head.content_length or 0):
            return False
        self._strangers = 0
        self._newest = head
        self._body = EMPTY_PAYLOAD
        self._unanswered += 1
        self.stalled = self._unanswered >= MAX_PIPELINED
        self.arrived.append((head, WholeBody(data[end:]) if len(data) > end else EMPTY_PAYLOAD))
        return True

    def _learn(self, data: bytes) -> bool:
        """Remember the head of data that was exactly one request. False: it was not.

        Lines are counted because the parser takes other line ends, too, and may have seen the head
        end sooner.
        """
        head = self._newest
        if head is None or not self.whole or self.stalled or len(data) > READ_BYTES:
            return False
        end = data.find(HEAD_END) + len(HEAD_END)
        lines = len(head.raw_headers) + 2
        if len(data) != end + (head.content_length or 0) or data.count(b"\n", 0, end) != lines:
            return False
        self._strangers += 1
        if head.keep_alive:
            self._known.add(data[:end], head)
        return True

    @property
    def whole(self) -> bool:
        """Whether all of the newest request has come."""
        return self._newest is not None and self._body.is_eof()

    @property
    def full(self) -> bool:
        """Whether there is more than should be read for now."""
        return self._unanswered >= MAX_PIPELINED or len(self._kept or b"") >= READ_BYTES

    def answered(self) -> None:
        """Note that a request is answered: there is room for another one."""
        self._unanswered -= 1
        self._parser.message_consumed()

    def go_on(self) -> None:
        """Parse what was kept: all that had arrived is answered."""
        kept = self._kept
        self._kept = None
        self.stalled = False
        if kept is not None:
            self._parser.set_upgraded(False)  # We know no other protocol.
        self.feed(kept or b"")

    def fail(self, exc: Exception) -> None:
        """Have no more of a body come."""
        if not self._body.is_eof() and self._body.exception() is None:
            self._body.set_exception(exc)

    def fail_stuck(self, exc: Exception) -> None:
        """As `fail`, if nothing of the body has come since this was called last."""
        seen = (self._body, self._body.total_bytes)
        if seen == self._seen:
            self.fail(exc)
        self._seen = seen

    def _body_left(self) -> int | None:
        """How many bytes of a request's body are still to come. None: only the parser can tell."""
        if self._newest is None or self._body.is_eof():
            return 0
        length = self._newest.content_length
        return length - self._body.total_bytes if length else None

    def _parse(self, data: bytes) -> None:
        for piece in self._targets.pieces(data, self._body_left):
            if not self._ended:
                self._parse_piece(piece)

    def _parse_piece(self, data: bytes) -> None:
        try:
            messages, leaves, rest = self._parser.feed_data(data)
        except HttpProcessingError as exc:
            # The traceback refers to `data`, and is part of a cycle: that memory would stay in use.
            exc.__traceback__ = None
            self._ended = True
            self.fail(exc)
            self.arrived.append((exc, EMPTY_PAYLOAD))
            return
        for message, body in messages:
            self._newest = RequestHead(message)
            self._body = body
            self._unanswered += 1
            self.arrived.append((self._newest, body))
        if leaves:
            self._kept = rest
        self.stalled = self.full or leaves


# --- HTTP exchanges -------------------------------------------------------------------------------

INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"  # Who has not asked for it ignores it: RFC 9110 15.2.


class Exchange:
    """A request that has come in, and the way its answer goes out."""

    __slots__ = ("_chunked", "_endless", "_flow", "_quiet", "_write_timeout_s", "address", "begun",
                 "content", "head", "headers", "keep_alive", "method", "version")  # fmt: skip

    def __init__(
        self,
        flow: Flow,
        address: str | None,
        head: RequestHead,
        content: Content,
        write_timeout_s: float,
    ) -> None:
        self._flow = flow
        self.address = address  # of the client; None: it came through a Unix socket
        self._write_timeout_s = write_timeout_s
        self._chunked = False  # whether the body of the answer is, and more of it may come
        self._endless = False  # whether it ends with the connection
        self._quiet = 0  # how often `probe` was asked since something was sent
        self.head = head
        self.method = head.method
        self.version = head.version
        self.headers = head.headers
        self.content = content  # the body, as it comes in
        self.keep_alive = head.keep_alive  # whether another request may follow
        self.begun = False  # whether an answer is on its way

    @property
    def transport(self) -> asyncio.Transport:
        """The connection. Raises ConnectionResetError when the client has gone."""
        return self._flow.required()

    @property
    def has_content(self) -> bool:
        """Whether there is a body."""
        return self.content is not EMPTY_PAYLOAD

    def ask_for_content(self) -> None:
        """Tell a client to send its body, if it waits for that (RFC 9110 10.1.1)."""
        if self.headers.get("Expect", "").lower() == "100-continue" and self.version >= (1, 1):
            self.transport.write(INTERIM)

    def send(self, answer: Response, ours: bool = False) -> None:
        """Send an answer whose body is whole, `ours` or passed on. Raises ConnectionResetError."""
        body = answer.body
        if ours and self.head.usual and answer.bare and self.keep_alive:
            head = bare_head(answer.status, len(body), int(time.time()))
            self._send(b"%b%b\r\n%b" % (head, answer.lines, body))
            return
        framing = ""
        if answer.status in WITHOUT_BODY or self.method == "HEAD":
            if body and self.method == "HEAD":
                framing = f"Content-Length: {len(body)}\r\n"
            body = b""
        elif "Content-Length" not in answer.headers:
            framing = f"Content-Length: {len(body)}\r\n"
        if ours and "Server" not in answer.headers:
            framing += SERVER_LINE
        self._send(self._head(answer, framing) + body)

    async def begin(self, answer: Response) -> None:
        """Send the head of an answer; its body follows in pieces. Raises ConnectionResetError."""
        framing = ""
        bodiless = answer.status in WITHOUT_BODY or self.method == "HEAD"
        if not bodiless and "Content-Length" not in answer.headers:
            self._chunked = self.version >= (1, 1)
            framing = "Transfer-Encoding: chunked\r\n" if self._chunked else ""
            self._endless = not self._chunked
            self.keep_alive = self.keep_alive and self._chunked
        self._send(self._head(answer, framing))
        await self.drain()

    async def write(self, data: bytes) -> None:
        """Send a piece of the body, and wait for room. Raises ConnectionResetError."""
        if data and self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._send(data)
        await self.drain()

    async def end(self) -> None:
        """End the body of an answer. Raises ConnectionResetError."""
        if self._chunked:
            self._chunked = False
            self._send(b"0\r\n\r\n")
        await self.drain()

    def break_off(self) -> None:
        """Cut the client off, so that it sees that its answer is not whole: one that ends with the
        connection is reset, in HTTP/1.0. Raises ConnectionResetError when the client has gone.
        """
        transport = self.transport
        if self._endless and not transport.is_closing():
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()

    def probe(self) -> None:
        """Send something that means nothing: only a write shows whether the client is still there.
        (The first one has its kernel reset the connection, the second one fails.)

        Before an answer it is an interim answer. In a body in chunks it is a zero in front of the
        next chunk's length (RFC 9112 7.1), at the times in PROBED only: clients read up to 16
        digits. In any other body nothing can be sent: a client that gets nothing for long is taken
        for gone.
        """
        self._quiet += 1
        if not self.begun:
            if self.version >= (1, 1):
                self.transport.write(INTERIM)
        elif self._chunked:
            if self._quiet in PROBED:
                self.transport.write(b"0")
        elif self._quiet > max(PROBED):
            self.transport.close()

    async def drain(self) -> None:
        """Wait until the client takes more. One that takes nothing for too long is cut off.

        Raises ConnectionResetError.
        """
        if self._flow.full:
            loop = asyncio.get_running_loop()
            timer = Timer(loop, self._write_timeout_s, self.transport.abort)
            try:
                await self._flow.drain()
            finally:
                timer.cancel()
        self._flow.required()

    def _head(self, answer: Response, framing: str) -> bytes:
        connection = answer.headers.get("Connection")
        if connection is not None and connection.lower() == "close":
            self.keep_alive = False
        elif not self.keep_alive and self.version >= (1, 1):
            framing += "Connection: close\r\n"
        elif self.keep_alive and self.version < (1, 1):
            framing += "Connection: keep-alive\r\n"
        return response_head(answer, int(self.version != (1, 0)), framing)

    def _send(self, data: bytes) -> None:
        self.begun = True
        self._quiet = 0
        self.transport.write(data)


# --- HTTP conversations ---------------------------------------------------------------------------
# A client's connection, and how what it asks is answered there: by a task, or without one.

DISCARD_BODY_S = 10.0  # in which the rest of a body that nobody wants may come in
MAKE_WAY_S = 1.0  # idle for so long, clients make way for those who wait
INTERNAL_ERROR = "internal error: see the log of faasd-async"


def refused_head(exc: HttpProcessingError) -> tuple[int, str]:
    """Status and text of the answer to a request that could not be parsed."""
    if isinstance(exc, LineTooLong):
        if exc.args[1] == MAX_LINE_BYTES:
            return 414, TARGET_TOO_LONG
        return 431, f"a header is longer than {MAX_HEADER_BYTES} bytes"
    if "Too many headers" in str(exc):
        return 431, "there are too many headers"
    if isinstance(exc, BadHttpMethod) and re.search(r"b'[!#-~]+ [!-~]+ HTTP/1\.[01]'", str(exc)):
        return 501, "no method of HTTP has this name"
    return 400, "this is not a valid HTTP request"


def refusal(exc: HttpProcessingError) -> bytes:
    """The answer to a request that could not be parsed."""
    status, line = refused_head(exc)
    answer = reply(line, status, {"Server": SERVER, "Connection": "close"})
    framing = f"Content-Length: {len(answer.body)}\r\n"
    return response_head(answer, 1, framing) + answer.body


def address_of(transport: asyncio.BaseTransport) -> str | None:
    """The address of a client; None: it has come through a Unix socket."""
    peer = transport.get_extra_info("peername")
    return peer[0] if isinstance(peer, tuple) else None


async def discard_rest(content: Content) -> None:
    """Let the rest of a body come in: a client that still sends would not see its answer."""
    with contextlib.suppress(TimeoutError, HttpProcessingError, HttpError):
        async with asyncio.timeout(DISCARD_BODY_S):
            while not content.at_eof():
                await content.readany()


class Storing(NamedTuple):
    """A request that waits for nothing but its call to be stored."""

    http: Exchange
    call: Invocation
    call_id: asyncio.Future[str]
    respond: Callable[[Exchange, Invocation, str], Response]


class Application(Protocol):
    """What answers the requests of a Server."""

    async def answer(self, http: Exchange) -> Response:
        """The answer to any request. Cancelled when the client goes away."""

    def store(self, http: Exchange) -> Storing | None:
        """Store what a request asks for that is `prompt`: its head came before, its body is there.

        None: it takes `answer`; nothing was done.
        """

    def stored(self, storing: Storing) -> Response:
        """The answer once that has succeeded, or failed."""


def apologize(exchange: Exchange, exc: Exception) -> None:
    """Tell of an error in this program. Raises ConnectionError."""
    log.error("request failed in this program itself", exc_info=exc)
    if exchange.begun:
        exchange.break_off()
        raise ConnectionAbortedError("the answer is not whole") from None
    exchange.send(reply(INTERNAL_ERROR, 500), ours=True)


class Clients:
    """What their connections have in common."""

    def __init__(
        self,
        application: Application,
        read_timeout_s: float,
        write_timeout_s: float,
        tell: Callable[[], None],
    ) -> None:
        self.application = application
        self.read_timeout_s = read_timeout_s  # what a request has to come in
        self.write_timeout_s = write_timeout_s  # for which a client may take nothing
        self.tell = tell  # An answer has ended, or a connection has.
        self.leaving = False  # We stop: each answer is the last on its connection.
        self.known = KnownHeads()
        self.connections: set[ClientConnection] = set()

    def leave(self) -> None:
        """Have each answer, from now on, be the last on its connection."""
        self.leaving = True
        for peer in self.connections:
            peer.conversation.leave()


class Conversation:
    """What a client asks over its connection is answered, one after the other.

    A task does that, from the first request on. Most requests, though, have a call stored, and that
    is all: to wake the task for one, and have it wait again, would take as long as all that is done
    for it here. They are answered without it.
    """

    def __init__(self, clients: Clients, flow: Flow, reader: RequestReader) -> None:
        self._clients = clients
        self._loop = asyncio.get_running_loop()
        self._flow = flow
        self._reader = reader
        self._address: str | None = None  # the client's, but through a Unix socket
        self._task: asyncio.Task[None] | None = None
        self._waiting: asyncio.Future[None] | None = None  # while the task waits for something
        self._storing: Storing | None = None  # what goes on meanwhile
        self._exchange: Exchange | None = None  # that is being answered
        self._no_more = False  # The client sends nothing behind what has come.
        self._linger: asyncio.TimerHandle | None = None
        self.idle_since = self._loop.time()
        self.asked = False  # whether a request has come
        self.over = False  # No more is read.

    @property
    def busy(self) -> bool:
        """Whether something is being answered."""
        return self._task is not None and (self._waiting is None or self._storing is not None)

    def begin(self, address: str | None) -> None:
        """The connection is open."""
        self._address = address

    def go_on(self) -> None:
        """Something has come: answer it, unless it has to wait for its turn."""
        if self._task is None:
            self.asked = True
            self._task = self._loop.create_task(self._answer_all(), name="answers of a client")
        elif self._waiting is not None and self._storing is None and not self._store():
            self._wake()

    def expect_no_more(self) -> None:
        """What is being answered is the last."""
        self._no_more = True

    def leave(self) -> None:
        """Have the client told with the answer under way that it is the last."""
        if self._exchange is not None and not self._exchange.begun:
            self._exchange.keep_alive = False

    def probe(self) -> None:
        """Find out whether the client is still there. Who takes nothing is waited for elsewhere."""
        if self._exchange is not None and not self._flow.full:
            self._exchange.probe()

    def close(self) -> None:
        """Read no more, and close the connection when all is sent that was written."""
        self.over = True
        if self._flow.transport is not None:
            self._flow.transport.close()

    def end(self) -> None:
        """The connection has ended, and with it all that is done for it."""
        self.over = True
        if self._linger is not None:
            self._linger.cancel()
        if self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        """Close the connection, whatever is under way."""
        task = self._task
        self.close()
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    # With the task.

    async def _answer_all(self) -> None:
        """Answer what comes, and close the connection when nothing may follow."""
        try:
            with contextlib.suppress(ConnectionError):  # The client has gone away.
                while await self._answer_arrived() and not self.over:
                    await self._wait()
        finally:
            self._task = None
            self._exchange = None
            self._clients.tell()
            if not self.over:
                self.close()

    async def _answer_arrived(self) -> bool:
        """Answer the requests that have arrived. False: no more may follow on this connection."""
        while self._reader.arrived and not self.over:
            head, content = self._reader.arrived.popleft()
            if isinstance(head, HttpProcessingError):
                self._refuse(head)
                return False
            self._exchange = exchange = self._new_exchange(head, content)
            await self._answer(exchange)
            if not content.is_eof():
                await discard_rest(content)
            if not exchange.keep_alive or not content.is_eof():
                return False
            self._make_room()
        return not self._no_more

    async def _answer(self, exchange: Exchange) -> None:
        """Answer one request. Raises ConnectionError when its client has gone."""
        try:
            answer = await self._clients.application.answer(exchange)
            if not exchange.begun:
                exchange.send(answer, ours=True)
        except ConnectionError:
            raise
        except Exception as exc:
            apologize(exchange, exc)
        if self._flow.full:
            await exchange.drain()

    async def _wait(self) -> None:
        """Wait for a request that needs the task."""
        self._waiting = self._loop.create_future()
        self._rest()
        await self._waiting

    def _wake(self) -> None:
        """There is something to do for the task."""
        if self._waiting is not None:
            self._waiting.set_result(None)
            self._waiting = None

    def _refuse(self, exc: HttpProcessingError) -> None:
        """Say what was wrong, and close it once the client has: one that sends reads nothing."""
        transport = self._flow.required()
        transport.write(refusal(exc))
        transport.write_eof()
        self.over = True
        self._flow.resume_reading()
        self._linger = self._loop.call_later(LINGER_S, self.close)

    # Without it.

    def _store(self) -> bool:
        """Whether the request that has come needs no task."""
        head, content = self._reader.arrived[0]
        if isinstance(head, HttpProcessingError) or not head.prompt or self._flow.full:
            return False
        storing = self._clients.application.store(self._new_exchange(head, content))
        if storing is None:
            return False
        self._reader.arrived.popleft()
        self._exchange = storing.http
        self._storing = storing
        storing.call_id.add_done_callback(self._stored)
        return True

    def _stored(self, _: asyncio.Future[str]) -> None:
        """Answer it, and go on."""
        storing = self._storing
        assert storing is not None
        self._storing = None
        try:
            storing.http.send(self._clients.application.stored(storing), ours=True)
        except ConnectionError:  # The client has gone away, and the task with it.
            return
        except Exception as exc:
            apologize(storing.http, exc)
        if not storing.http.keep_alive:
            self.close()
        self._make_room()
        if self.over or self._no_more:
            self._wake()
        elif not self._reader.arrived:
            self._rest()
        elif not self._store():
            self._wake()

    # With or without.

    def _new_exchange(self, head: RequestHead, content: Content) -> Exchange:
        write_timeout_s = self._clients.write_timeout_s
        exchange = Exchange(self._flow, self._address, head, content, write_timeout_s)
        if self._clients.leaving:
            exchange.keep_alive = False
        return exchange

    def _make_room(self) -> None:
        """A request is answered: look for more."""
        self._reader.answered()
        if self._reader.stalled and not self._reader.arrived:
            self._reader.go_on()
            self._flow.resume_reading()

    def _rest(self) -> None:
        """Nothing is being answered."""
        self._exchange = None
        self.idle_since = self._loop.time()
        self._clients.tell()


class ClientConnection(asyncio.Protocol):
    """A client's connection: what the event loop and the parser's streams tell of it."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._loop = asyncio.get_running_loop()
        self._flow = Flow()
        self._reader = RequestReader(self._flow, clients.known)
        self.conversation = Conversation(clients, self._flow, self._reader)
        self._timer: asyncio.TimerHandle | None = None
        self._patient = False  # whether it may be idle for a moment longer
        self._half_closed: asyncio.TimerHandle | None = None  # The client sends no more.

    def make_way(self) -> bool:
        """Whether it was idle, and is closed now."""
        idle_s = self._loop.time() - self.conversation.idle_since
        if self.conversation.busy or idle_s < MAKE_WAY_S:
            return False
        self.conversation.close()
        return True

    def give_up_body(self) -> None:
        """Refuse a request of whose body nothing has come since this was called last."""
        if not self._flow.reading_paused:
            text = "the daemon stops, and the rest of the request's body does not come"
            self._reader.fail_stuck(HttpError(503, text, {**HANG_UP, "Retry-After": "1"}))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self._flow.opened(transport)
        self.conversation.begin(address_of(transport))
        self._clients.connections.add(self)
        self._look_idle()

    def data_received(self, data: bytes) -> None:
        """Take a piece of what a client asks."""
        if self.conversation.over:
            return
        self._reader.feed(data)
        if self._reader.stalled and self._reader.full:
            self._flow.pause_reading()
        if self._reader.arrived:
            self.conversation.go_on()

    def eof_received(self) -> bool:
        """The client sends no more. Who has sent a whole request gets its answer."""
        if not self.conversation.busy or not self._reader.whole:
            return False
        self.conversation.expect_no_more()
        self._look_later()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended, and with it all that is done for its client."""
        self._flow.ended()
        for timer in (self._timer, self._half_closed):
            if timer is not None:
                timer.cancel()
        self._reader.fail(ConnectionResetError("the client has gone away"))
        self.conversation.end()
        self._clients.connections.discard(self)
        self._clients.tell()

    def pause_writing(self) -> None:
        """The client takes too little: whoever sends has to wait."""
        self._flow.pause_writing()

    def resume_writing(self) -> None:
        """The client takes more again."""
        self._flow.resume_writing()

    def _look_idle(self) -> None:
        """After gateway.read_timeout without a request: close it, unless it was us who slept."""
        now = self._loop.time()
        since = now if self.conversation.busy else self.conversation.idle_since
        due = since + self._clients.read_timeout_s
        if now >= due:
            late_s = now - due
            self._patient = late_s > LATE_S and not self._patient
            if not self._patient:
                self.conversation.close()
                return
            due = now + min(late_s, MAX_GRACE_S)  # A request may be there, unread.
        self._timer = self._loop.call_at(due, self._look_idle)

    def _look_later(self) -> None:
        self._half_closed = self._loop.call_later(HALF_CLOSED_S, self._look)

    def _look(self) -> None:
        """See whether a client that sends no more is there; the end of its connection cancels what
        is done for it.
        """
        self.conversation.probe()
        self._look_later()


# --- HTTP server ----------------------------------------------------------------------------------

BACKLOG = 1024  # connections that wait to be accepted
ACCEPT_AT_ONCE = 64  # of them, before other things have their turn
CLIENTS_WAIT = "clients wait to be accepted: %s (LimitNOFILE=, ulimit -n)"
BODY_STUCK_S = 3.0  # in which, at a stop, something of a request's body has to come
CLIENTS_WAIT_AGAIN_S = 60.0  # between two lines that say so


def descriptors_left(sock: socket.socket) -> bool:
    """Whether half of our descriptors are free: what a client asks may take another one.

    The kernel gives the lowest free number. Raises OSError if there is none.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(sock.fileno())
    os.close(lowest)
    return most == resource.RLIM_INFINITY or lowest < most // 2


class Acceptor:
    """Accepts clients while there are descriptors for them and for what they ask.

    Otherwise they wait in the sockets' backlogs, and idle connections are closed to make way.
    (libuv cuts off clients that it has no descriptor for.)
    """

    def __init__(
        self, make: Callable[[], ClientConnection], connections: set[ClientConnection]
    ) -> None:
        self._make = make
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self._arriving: set[asyncio.Task[None]] = set()  # accepted, no connection yet
        self._again: asyncio.TimerHandle | None = None  # while clients have to wait
        self._full = RecurringWarning(CLIENTS_WAIT, CLIENTS_WAIT_AGAIN_S)

    def listen(self, sock: socket.socket) -> None:
        """Accept connections on a socket."""
        sock.setblocking(False)
        sock.listen(BACKLOG)
        self._sockets.append(sock)
        self._loop.add_reader(sock, self._accept, sock)

    def _accept(self, sock: socket.socket, most: int = ACCEPT_AT_ONCE) -> None:
        """Accept clients that wait at a socket."""
        try:
            for _ in range(most):
                alone = not self._connections and not self._arriving
                if not descriptors_left(sock) and not alone:
                    self._pause(errno.EMFILE)
                    return
                client, _ = sock.accept()
                task = self._loop.create_task(self._connect(client), name="a client that comes")
                self._arriving.add(task)
                task.add_done_callback(self._arriving.discard)
        except (BlockingIOError, ConnectionAbortedError):  # Nobody waits, or who did has gone.
            return
        except OSError as exc:  # accept(2) has many errors that pass, those of the network too
            self._pause(exc.errno)

    async def _connect(self, client: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, client)
        except BaseException as exc:
            client.close()
            if not isinstance(exc, OSError):  # It has gone, or there is no memory for it.
                raise

    def _pause(self, number: int | None) -> None:
        if self._again is not None:
            return
        for sock in self._sockets:
            self._loop.remove_reader(sock)
        self._again = self._loop.call_later(MAKE_WAY_S, self._make_room)
        self._full.log(os.strerror(number or 0))

    def _make_room(self) -> None:
        """Close connections that are idle: their clients can open them again."""
        idle = (peer for peer in list(self._connections) if peer.make_way())
        for _ in itertools.islice(idle, ACCEPT_AT_ONCE):
            pass
        self.go_on()

    def go_on(self) -> None:
        """Accept again: there may be room."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
            for sock in self._sockets:
                self._loop.add_reader(sock, self._accept, sock)

    def stop(self) -> None:
        """Accept no more, after those who wait: they can't know that we stop."""
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            self._accept(sock, BACKLOG)
            sock.close()
        self._sockets.clear()
        self.go_on()

    async def settle(self) -> None:
        """Wait until all who were accepted are among the connections."""
        await asyncio.gather(*self._arriving)


class Server:
    """Listens, and has each request answered."""

    def __init__(
        self,
        application: Application,
        read_timeout_s: float,
        write_timeout_s: float,
    ) -> None:
        self._clients = clients = Clients(application, read_timeout_s, write_timeout_s, self._tell)
        self._connections = clients.connections
        self._acceptor = Acceptor(lambda: ClientConnection(clients), clients.connections)
        # An answer has ended, a connection has asked or gone; None: nobody waits for that.
        self._news: asyncio.Event | None = None

    def listen(self, sock: socket.socket) -> None:
        """Accept connections on a socket."""
        watch_silence(sock)  # Accepted ones inherit it.
        self._acceptor.listen(sock)

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set()
        self._acceptor.go_on()

    def stop_listening(self) -> None:
        """Accept no more connections, and tell who asks on one that its answer is the last."""
        self._acceptor.stop()
        self._clients.leave()

    async def give_up_bodies(self) -> None:
        """Refuse requests whose bodies do not come, until this is cancelled."""
        while True:
            for peer in list(self._connections):
                peer.give_up_body()
            await asyncio.sleep(BODY_STUCK_S)

    async def drain(self) -> None:
        """Wait until all requests are answered.

        Who has connected but not asked yet can't know that we stop, and gets LINGER_S.
        """
        await self._acceptor.settle()
        until = time.monotonic() + LINGER_S
        self._news = news = asyncio.Event()
        while True:
            left_s = until - time.monotonic()
            lingering = left_s > 0 and any(
                not peer.conversation.asked for peer in self._connections
            )
            if not lingering and not any(peer.conversation.busy for peer in self._connections):
                return
            news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s if lingering else None):
                    await news.wait()

    async def close(self) -> None:
        """End what is still under way."""
        self.stop_listening()
        await self._acceptor.settle()
        await asyncio.gather(*(peer.conversation.stop() for peer in self._connections))


# --- HTTP front -----------------------------------------------------------------------------------
# -- requests and answers

# Headers of an answer that scripts of other sites may read (Fetch standard 3.2.3).
EXPOSED = "X-Call-Id, X-Start-Time, X-Duration-Seconds, Location, Retry-After"
PREFLIGHT_MAX_AGE_S = 600


class Request(NamedTuple):
    """A request, with what the route's pattern found in its path."""

    http: Exchange
    target: str  # path and query as they were sent
    parts: Sequence[str]  # groups of the pattern, decoded
    trusted_origin: str | None  # of the page that sent it, where the answer tells browsers so
    may_act: bool = True  # False: with the credentials of auth.view_user_file

    @property
    def headers(self) -> Mapping[str, str]:
        """The first value of each header, by its name in any case."""
        return self.http.headers

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters; of one that is repeated the last."""
        return {name: values[-1] for name, values in self.queries.items()}

    @property
    def queries(self) -> dict[str, list[str]]:
        """The query's parameters, repeats included."""
        return parse_qs(self.target.partition("?")[2], keep_blank_values=True)


# In a browser, what somebody else has written opens as a page that can do nothing, loads nothing
# and can't be embedded.
HARMLESS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def stored_reply(
    headers: Headers, body: bytes, more: Mapping[str, object] | None = None
) -> Response:
    """A body that a caller or a function has sent, under the Content-Type that it was sent with."""
    ours = {**HARMLESS, "Content-Type": "application/octet-stream"}
    for name, value in headers:
        if name.lower() in DESCRIBING and re.fullmatch(rb"[ -~]+", value):
            ours[name.decode().title()] = value.decode()
    ours |= {name: str(value) for name, value in (more or {}).items()}
    return respond(200, ours, body)


def found_headers(call_id: str) -> dict[str, str]:
    """Headers that tell a client where its call is."""
    return {"X-Call-Id": call_id, "Location": call_path(call_id)}


def accepted_lines(call_id: str, start_time: int) -> bytes:
    """Header lines that tell where the call is that was just queued, and when (nanoseconds)."""
    lines = (
        f"X-Call-Id: {call_id}\r\nLocation: {call_path(call_id)}\r\nX-Start-Time: {start_time}\r\n"
    )
    return lines.encode()


def allow_origin(headers: CIMultiDict[str], origin: str | None) -> None:
    """Let scripts of this origin read the answer, unless the function has said who may."""
    if origin is not None and "Access-Control-Allow-Origin" not in headers:
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Expose-Headers"] = EXPOSED
        headers.add("Vary", "Origin")


@contextlib.contextmanager
def body_errors() -> Iterator[None]:
    """Turns the errors of a body that is wrong or late into HttpError(400, 408)."""
    try:
        yield
    except RequestFailed:
        raise HttpError(408, "no body within gateway.read_timeout", HANG_UP) from None
    except HttpProcessingError:
        raise HttpError(400, "the request's body is not valid HTTP", HANG_UP) from None


async def body_chunks(http: Exchange, timeout_s: float) -> AsyncIterator[bytes]:
    """The body as it comes in, each piece within the time. Raises HttpError(400, 408)."""
    http.ask_for_content()
    while True:
        with body_errors(), TimeLimit(Limit(timeout_s)):
            chunk = await http.content.readany()
        if not chunk:
            return
        yield chunk


async def gather_body(http: Exchange, timeout_s: float, most: int) -> bytes:
    """The whole body, or its beginning, if that is longer than `most`. HttpError(400, 408)."""
    http.ask_for_content()
    chunks = []
    length = 0
    with body_errors(), TimeLimit(Limit(timeout_s)):
        while length <= most and (chunk := await http.content.readany()):
            chunks.append(chunk)
            length += len(chunk)
    return b"".join(chunks)


async def read_body(http: Exchange, timeout_s: float, limit: int) -> bytes:
    """The whole body, refused as soon as it is known to be too long. HttpError(413)."""
    if (http.head.content_length or 0) <= limit:
        if http.content.is_eof():  # It came with the headers.
            body = http.content.read_nowait()
        else:
            body = await gather_body(http, timeout_s, limit)
        if len(body) <= limit:
            return body
    raise HttpError(413, f"the body is longer than gateway.max_payload ({limit} bytes)")


def log_failed_sync(call_id: str | None, error: str) -> None:
    """Log a sync call that has failed."""
    log_with(logging.WARNING, "sync call failed", error=error, call_id=call_id)


# Headers of an answer that this daemon reads or replaces when it passes the answer on.
LOOKED_AT_NAMES = (
    "Access-Control-Allow-Origin Access-Control-Expose-Headers Content-Length Date Vary "
    "X-Call-Id X-Duration-Seconds X-Start-Time"
)
LOOKED_AT = {name.lower().encode(): name for name in LOOKED_AT_NAMES.split()}


def passed_answer(answer: HttpResponse, ours: Mapping[str, str], duration_s: float) -> Response:
    """The head of an answer that is passed on, with our headers in place of the same of its own."""
    # RFC 9110 8.6: a 204 has no length, whatever the function says.
    drop = CONTENT_LENGTH if answer.status == 204 else frozenset[bytes]()
    headers: CIMultiDict[str] = CIMultiDict()
    lines = []
    for name, value in forward_headers(answer.headers, drop):
        clean = value.translate(CLEAN)
        known = LOOKED_AT.get(name.lower())
        if known is None:
            lines.append(b"%b: %b\r\n" % (name, clean))
        else:
            headers.add(known, clean.decode("utf-8", "surrogateescape"))
    headers.update(ours)
    headers.setdefault("X-Duration-Seconds", f"{duration_s:.6f}")
    reason = answer.reason
    if not reason.isascii() or not reason.isprintable():
        reason = re.sub("[^ -~]", "?", reason)
    return Response(answer.status, headers, reason=reason, lines=b"".join(lines))


async def stream_answer(
    request: Request,
    answering: Awaitable[HttpResponse],
    ours: Mapping[str, str],
    limit: Limit,
    who: str,
) -> Response:
    """Pass on the answer of `who` as it comes, with our headers in place of the same of its own.

    HttpError if there is no answer. If it breaks off, so does the client's connection.
    """
    started = time.perf_counter()
    http = request.http
    transport = http.transport
    passed_on: Response  # once the answer has come
    try:
        with TimeLimit(limit):
            async with await answering as answer:
                duration_s = time.perf_counter() - started
                passed_on = passed_answer(answer, ours, duration_s)
                allow_origin(passed_on.headers, request.trusted_origin)
                await copy_body(answer, http, passed_on)
    except RequestFailed as exc:
        error = f"{who} {exc.text}"
        if not transport.is_closing():
            log_failed_sync(ours.get("X-Call-Id"), error)
        if not http.begun:
            raise HttpError(exc.status, error) from None
        http.break_off()
    return passed_on


async def copy_body(answer: HttpResponse, http: Exchange, head: Response) -> None:
    """Send the body of an answer on as it comes in."""
    if answer.whole:
        http.send(head._replace(body=await answer.read_chunk()))
        return
    await http.begin(head)
    while chunk := await answer.read_chunk():
        await http.write(chunk)
    await http.end()


# -- routes and guards


class Access(enum.Enum):
    """Who may use a route."""

    OPEN = enum.auto()  # everybody
    INVOKE = enum.auto()  # everybody, unless auth.invoke asks for credentials
    VIEW = enum.auto()  # whoever has credentials of [auth]; without them this machine's user
    OPERATE = enum.auto()  # the same, but not with those of auth.view_user_file


Handler = Callable[[Request], Awaitable[Response]]
Store = Callable[[Exchange, Config], Storing | None]  # see Application


class Route(NamedTuple):
    """A row of the route table."""

    method: str  # "*": any
    pattern: re.Pattern[str]  # of the whole path, as it was sent
    access: Access
    handler: Handler
    cors: bool  # whether pages of gateway.trusted_origins may read the answer
    store: Store | None  # what mostly does without the handler


class Admitted(NamedTuple):
    """How a request is answered: it follows from its head and the settings alone."""

    config: Config
    handler: Handler
    parts: Sequence[str]
    trusted_origin: str | None
    may_act: bool
    store: Store | None = None


class Front:
    """Every request comes here: it is guarded, and handed to the first route that fits."""

    def __init__(self, settings: Settings, routes: Sequence[Route], refusals: Refusals) -> None:
        self._settings = settings
        self._routes = routes
        self._refusals = refusals
        self._own_names = machine_names()

    async def answer(self, http: Exchange) -> Response:
        """Find the route, and turn what is raised into an answer."""
        target = http.head.target
        try:
            _, handler, parts, origin, may_act, _ = self._admitted(http)
            response = await handler(Request(http, target, parts, origin, may_act))
        except (StoreError, HttpError, OSError) as exc:
            response = self._refused(http, exc)
        if not http.begun:
            allow_origin(response.headers, self._trusted_origin(http))
        return response

    def store(self, http: Exchange) -> Storing | None:
        """See Application."""
        known = self._known(http.head)
        if known is None or known.store is None:
            return None
        try:
            return known.store(http, known.config)
        except HttpError:  # `answer` raises it, too.
            return None

    def stored(self, storing: Storing) -> Response:
        """See Application."""
        http, call, call_id, respond = storing
        try:
            return respond(http, call, call_id.result())
        except (StoreError, HttpError) as exc:
            return self._refused(http, exc)

    def _refused(self, http: Exchange, exc: StoreError | HttpError | OSError) -> Response:
        """The answer that says why there is no other. Raises OSErrors that tell nothing of that,
        and ConnectionAbortedError if a part of another is sent already.
        """
        target = http.head.target
        if http.begun and not isinstance(exc, OSError):
            http.break_off()
            raise ConnectionAbortedError("the answer is not whole") from exc
        if isinstance(exc, StoreError):
            self._refusals.count(exc)
            text = f"the queue can't store this now, try again later: {exc}"
            return error_reply(target, HttpError(503, text, LATER))
        if isinstance(exc, HttpError):
            return error_reply(target, exc)
        if exc.errno not in Shortage.ERRORS or http.begun:
            raise exc
        return error_reply(target, Shortage(f"this machine is short: {exc.strerror}"))

    def _known(self, head: RequestHead) -> Admitted | None:
        """What was found out about the same head before, if that still holds."""
        known: Admitted | None = head.notes.get("admitted")
        return known if known is not None and known.config is self._settings() else None

    def _admitted(self, http: Exchange) -> Admitted:
        """Guard a request, and find who answers it. Raises HttpError."""
        head = http.head
        if known := self._known(head):
            return known
        config = self._settings()
        require_valid(http)
        origin = self._trusted_origin(http)
        if origin is not None and is_preflight(http):
            return Admitted(config, answer_preflight, (), origin, True)
        route, match, allowed = self._find(head)
        may_act = self._guard(http, route.access if route else Access.VIEW)
        if route is None or match is None:
            raise no_route(allowed)
        parts = decoded(match.groups(""))
        store = route.store if origin is None else None
        admitted = Admitted(config, route.handler, parts, origin, may_act, store)
        if route.access is Access.INVOKE:  # For others the connection counts, too.
            head.notes["admitted"] = admitted
            head.prompt = store is not None
        return admitted

    def _find(self, head: RequestHead) -> tuple[Route | None, re.Match[str] | None, Sequence[str]]:
        """The first route that fits; else the methods of those whose path does."""
        path = head.target.partition("?")[0]
        wanted = "GET" if head.method == "HEAD" else head.method
        allowed: list[str] = []
        for route in self._routes:
            match = route.pattern.fullmatch(path)
            if match and route.method in ("*", wanted):
                return route, match, allowed
            if match and route.method not in allowed:
                allowed.append(route.method)
        return None, None, allowed

    def _trusted_origin(self, http: Exchange) -> str | None:
        """The origin of the page that asks, if its scripts may read the answer."""
        origin = http.headers.get("Origin")
        if origin is None or origin.lower() not in self._settings().gateway.trusted_origins:
            return None
        route, _, _ = self._find(http.head)
        return origin if route is not None and route.cors else None

    def _guard(self, http: Exchange, access: Access) -> bool:
        """Whether who asks may act, not only look. Raises HttpError: 401, 403, 421."""
        config = self._settings()
        if http.method not in SAFE_METHODS or access is Access.OPERATE:
            self._require_same_site(http)
        auth = config.auth
        operator = access in (Access.VIEW, Access.OPERATE)
        if not auth.login:
            if operator:
                self._require_own_host(http)
            return True
        if not operator and not (access is Access.INVOKE and auth.invoke):
            return True
        authorization = http.headers.get("Authorization", "")
        may_act = require_login(authorization, auth.login, auth.view_login)
        if not may_act and access is not Access.VIEW:
            raise HttpError(403, "this login may look and not act: auth.view_user_file")
        return may_act

    def _require_same_site(self, http: Exchange) -> None:
        headers = http.headers
        site = headers.get("Sec-Fetch-Site")
        origin = headers.get("Origin")
        if site is None and origin is None:  # It comes from no browser.
            return
        trusted = self._settings().gateway.trusted_origins
        if from_elsewhere(site, origin, headers.get("Host", ""), trusted):
            page = printable((origin or "another site")[:80])
            reason = f"a web page of {page} may not do this"
            raise HttpError(403, f"{reason}: gateway.trusted_origins lists those that may")

    def _require_own_host(self, http: Exchange) -> None:
        config = self._settings()
        host = http.headers.get("Host", "")
        # Browsers neither use Unix sockets nor leave out Host.
        if not host or http.address is None:
            return
        names = (*self._own_names, *config.callback.gateway_hosts, *config.gateway.hosts)
        if not is_own_host(host, names):
            reason = f"{printable(host[:80])} is no name of this machine: gateway.hosts lists more"
            raise HttpError(421, f"{reason}, and with [auth] any will do")


def decoded(groups: Sequence[str]) -> Sequence[str]:
    """Parts of a path, percent-decoded."""
    if not groups:  # as in the routes of functions
        return ()
    raw = (group.encode("utf-8", "surrogateescape") for group in groups)
    return tuple(map(unquote, raw))


def require_valid(http: Exchange) -> None:
    """Refuse what can't be meant for a function. Raises HttpError: 400, 414, 501, 505, 508."""
    target = http.head.target
    if http.version not in SPOKEN:
        raise HttpError(505, "HTTP/1.1 and HTTP/1.0 are spoken here", HANG_UP)
    if len(target) > MAX_HEADER_BYTES:
        raise HttpError(414, TARGET_TOO_LONG, HANG_UP)
    headers = http.headers
    coding = headers.get("Transfer-Encoding")
    if http.method == "CONNECT" or (coding or "chunked").lower() != "chunked":  # RFC 9112 6.1
        reason = "CONNECT, and transfer codings beside chunked, are not for functions"
        raise HttpError(501, reason, HANG_UP)
    if coding is not None and http.version < (1, 1):  # faulty framing (ibid.)
        raise HttpError(400, "HTTP/1.0 has no Transfer-Encoding", HANG_UP)
    if "Via" in headers and via(target) in headers["Via"]:
        source = {"X-Openfaas-Internal": "gateway"}
        raise HttpError(508, "the provider has no replica of this function", source)


def is_preflight(http: Exchange) -> bool:
    """Whether a browser asks what a page may send (Fetch standard 3.2.2)."""
    return http.method == "OPTIONS" and "Access-Control-Request-Method" in http.headers


async def answer_preflight(request: Request) -> Response:
    """Allow a page of a trusted origin whatever it wants to send."""
    asked = request.headers
    headers = {
        "Access-Control-Allow-Origin": request.trusted_origin or "",
        "Access-Control-Allow-Methods": asked["Access-Control-Request-Method"],
        "Access-Control-Allow-Headers": asked.get("Access-Control-Request-Headers", ""),
        "Access-Control-Max-Age": str(PREFLIGHT_MAX_AGE_S),
        "Vary": "Origin",
    }
    return respond(204, headers)


def error_reply(target: str, exc: HttpError) -> Response:
    """One line of text; on Fn's routes a JSON document."""
    if target.startswith(("/r/", "/v1/")):
        return reply({"error": {"message": exc.text}}, exc.status, exc.headers)
    return reply(exc.text, exc.status, exc.headers)


# --- Function routes ------------------------------------------------------------------------------


class Forwarded(NamedTuple):
    """Headers for a function, and what they follow from beside the request's head."""

    config: Config
    address: str | None
    headers: Sequence[Header]


def forwarded_headers(
    head: RequestHead, drop: frozenset[bytes], address: str | None
) -> Sequence[Header]:
    """The end-to-end headers of a request but `drop`, and those that say where it comes from.

    HttpError(508): it has come through many hosts. A function whose `url` leads back here would
    call itself for ever.
    """
    headers = forward_headers(head.raw_headers, drop)
    hops = [*head.headers.getall("X-Forwarded-For", ())]
    if address is not None:
        hops.append(address)
    if hops:
        value = ", ".join(hops).encode("utf-8", "surrogateescape")
        if value.count(b",") >= MAX_FORWARDED:
            reason = f"X-Forwarded-For names more than {MAX_FORWARDED} hosts"
            raise HttpError(508, f"{reason}: does the URL of a function lead back to this daemon?")
        headers.append((b"X-Forwarded-For", value))
    host = head.headers.get("Host")
    if host and "X-Forwarded-Host" not in head.headers:
        headers.append((b"X-Forwarded-Host", host.encode("utf-8", "surrogateescape")))
    return headers


@dataclass(frozen=True)
class FunctionRoutes:
    """/function/… straight through, /async-function/… into the queue."""

    settings: Settings
    directory: FunctionDirectory
    limits: FunctionLimits
    caller: FunctionCaller
    intake: Intake
    metrics: Metrics

    async def call(self, request: Request) -> Response:
        """/function/NAME: the function's own answer."""
        name, target = split_target(request.target.removeprefix("/function/"))
        return await self.answer(request, await self.find(name), target)

    async def queue(self, request: Request) -> Response:
        """POST /async-function/NAME: 202 once the call is stored."""
        name, target = self._queued(request.http.head)
        return await self.accept(request, await self.find(name, stale=True), target)

    def store(self, http: Exchange, config: Config) -> Storing | None:
        """The same, see Application. Raises HttpError before it has done anything."""
        head = http.head
        name, target = self._queued(head)
        function = self.directory.at_hand(name)
        if function is None or function.command:
            return None
        if (head.content_length or 0) > config.gateway.max_payload:
            return None
        controls = self._controls(head, None)
        headers = self._call_headers(http)
        body = http.content.read_nowait()
        call = self.intake.invocation(function, target, headers, body, controls)
        call_id = asyncio.ensure_future(self.intake.queue.enqueue(call))
        return Storing(http, call, call_id, self._accepted)

    def _queued(self, head: RequestHead) -> tuple[str, str]:
        """The name of the function that is to be called, and what follows it."""
        known: tuple[str, str] | None = head.notes.get("queued")
        if known is None:
            known = split_target(head.target.removeprefix("/async-function/"))
            head.notes["queued"] = known
        return known

    async def refuse(self, request: Request) -> Response:
        """Any other method on /async-function/…."""
        reason = "there is nothing to GET from a queued call (POST, DELETE)"
        allow = {"Allow": "POST, DELETE"}
        raise HttpError(405, f"{reason}: see /system/calls/{{call-id}}", allow)

    async def find(self, name: str, stale: bool = False) -> Function:
        """A function by its name. HttpError(404): nothing is done for one that does not exist."""
        function = self.directory.at_hand(name) or await self.directory.find(name, stale)
        if function is None:
            reason = "no such function: it is not in the configuration, nor at a provider"
            raise HttpError(404, reason)
        return function

    async def accept(
        self, request: Request, function: Function, target: str, app: str | None = None
    ) -> Response:
        """Queue a call, whatever the request's method. With an app the answer is Fn's."""
        config = self.settings().gateway
        controls = self._controls(request.http.head, app)
        body = await read_body(request.http, config.read_timeout, config.max_payload)
        headers = self._call_headers(request.http)
        if function.command:
            require_executable(function, FunctionRequest("POST", target, headers.packed, body))
        call = self.intake.invocation(function, target, headers, body, controls)
        return self._accepted(request.http, call, await self.intake.queue.enqueue(call))

    def _accepted(self, http: Exchange, call: Invocation, call_id: str) -> Response:
        """The answer to a call that is stored."""
        self.intake.stored(call)
        lines = accepted_lines(call_id, call.start_time)
        if call.app is not None or "application/json" in http.headers.get("Accept", ""):
            return reply({"call_id": call_id}, 202)._replace(lines=lines)
        return Response(202, CIMultiDict(), lines=lines)

    async def answer(self, request: Request, function: Function, target: str) -> Response:
        """Call a function and pass its answer on."""
        start_time = time.time_ns()
        call_id = parse_one(request.headers, "X-Call-Id", visible) or new_id()
        ours = {"X-Call-Id": call_id, "X-Start-Time": str(start_time)}
        if function.replicas == 0:
            await self.directory.awake(function)
        if self.limits.full(function.key):
            reason = f"function {function.name} is at its max_inflight"
            raise HttpError(429, reason, {"Retry-After": "1", **ours})
        with self.limits.hold(function.key):  # first: others come while the queue is asked
            await self._start(function, ours)
            headers = self._call_headers(request.http).packed + call_lines(call_id, start_time)
            response = await self._run(request, function, target, headers, ours)
        if log.isEnabledFor(logging.DEBUG):
            fields = {"call_id": call_id, "function": function.name, "http_status": response.status}
            log_with(logging.DEBUG, "sync call ended", **fields)
        if function.url and response.status >= 500:
            log_failed_sync(call_id, f"function {function.name} answered {response.status}")
        return response

    async def _start(self, function: Function, ours: Mapping[str, str]) -> None:
        """HttpError(429) for a sync call that a rate does not let start yet. StoreError."""
        if function.rate is not None:
            wait_s = await self.intake.queue.start(function.key, function.rate)
            if wait_s > 0:
                reason = f"function {function.name} is at its rate, {function.rate.text}"
                later = {"Retry-After": str(math.ceil(wait_s)), **ours}
                raise HttpError(429, reason, later)

    async def _run(
        self,
        request: Request,
        function: Function,
        target: str,
        headers: bytes,
        ours: Mapping[str, str],
    ) -> Response:
        with self.metrics.counted(function.key) as tell_status:
            try:
                body = await self._sync_body(request.http)
                function_request = FunctionRequest(request.http.method, target, headers, body)
                if function.command:
                    require_executable(function, function_request)
                response = await self._pass_on(request, function, function_request, ours)
            except HttpError as exc:
                tell_status(exc.status)
                exc.headers.update(ours)
                raise
            tell_status(response.status)
        return response

    async def _pass_on(
        self,
        request: Request,
        function: Function,
        function_request: FunctionRequest,
        ours: Mapping[str, str],
    ) -> Response:
        """The function's answer, passed on. A client that goes away cancels this, and the call."""
        config = self.settings().gateway
        who = f"function {function.name}"
        limit = Limit(config.upstream_timeout, "gateway.upstream_timeout")
        if not function.command:
            answering = self.caller.request(function, function_request)
            return await stream_answer(request, answering, ours, limit, who)
        try:
            outcome = await self.caller.commands.run(
                function, function_request, limit, MAX_RESPONSE_BYTES
            )
        except RequestFailed as exc:
            error = f"{who} {exc.text}"
            log_failed_sync(ours["X-Call-Id"], error)
            raise HttpError(exc.status, error) from None
        if outcome.error:
            log_failed_sync(ours["X-Call-Id"], outcome.error)
        headers = as_multidict(outcome.headers)
        headers.update(ours)
        headers["X-Duration-Seconds"] = f"{outcome.duration_s:.6f}"
        return Response(outcome.status, headers, outcome.body)

    async def _sync_body(self, http: Exchange) -> bytes | AsyncIterator[bytes]:
        """A small body as a whole, a larger one as it comes."""
        timeout_s = self.settings().gateway.read_timeout
        length = http.head.content_length if http.has_content else 0
        if length is not None and length <= SMALL_BODY_BYTES:
            return await read_body(http, timeout_s, SMALL_BODY_BYTES)
        return body_chunks(http, timeout_s)

    def _controls(self, head: RequestHead, app: str | None) -> Controls:
        """What a request asks for. Raises HttpError(400)."""
        asks: bool | None = head.notes.get("asks")
        if asks is None:
            asks = not ASKING.isdisjoint(map(str.lower, head.headers))
            head.notes["asks"] = asks
        if asks or app is not None:
            return self.intake.controls(head.headers, app)
        return NO_CONTROLS  # as most do

    def _call_headers(self, http: Exchange) -> CallHeaders:
        """The headers for the function, without those that name its call."""
        headers = self._forwarded(http)
        known: CallHeaders | None = http.head.notes.get("call")
        if known is None or known.headers is not headers:
            known = call_headers(headers)
            http.head.notes["call"] = known
        return known

    def _forwarded(self, http: Exchange) -> Sequence[Header]:
        """The caller's end-to-end headers, and where they come from."""
        config = self.settings()
        address = http.address
        known: Forwarded | None = http.head.notes.get("forwarded")
        if known is None or known.config is not config or known.address != address:
            drop = COMPUTED
            if config.auth.invoke:  # then the credentials are for us
                drop = COMPUTED | {b"authorization"}
            known = Forwarded(config, address, forwarded_headers(http.head, drop, address))
            http.head.notes["forwarded"] = known
        return known.headers


# --- Operator routes ------------------------------------------------------------------------------

READY_S = 1.0  # what a look at the queues may take


@dataclass(frozen=True)
class HealthRoutes:
    """Health, for systemd, load balancers and people."""

    queue: Queue
    waiters: CallWaiters

    async def healthz(self, request: Request) -> Response:
        """200 while the queue's writer answers."""
        reason = self.queue.stalled()
        return reply(reason or "ok", 503 if reason else 200)

    async def readyz(self, request: Request) -> Response:
        """200 when work can be accepted. Queues that are paused are named."""
        reason = "shutting down" if self.waiters.closed else self.queue.stalled()
        reason = reason or await self.queue.failing()
        if reason:
            return reply(reason, 503)
        paused: list[str] = []
        with contextlib.suppress(StoreError, TimeoutError):  # It hangs, which is told in time.
            async with asyncio.timeout(READY_S):
                stats = await self.queue.stats()
                paused = sorted(name for name, queue in stats.items() if queue.paused)
        lines = [self.queue.notice() or "ok"]
        if paused:
            lines.append(f"paused: {', '.join(paused)}")
        return reply("; ".join(lines))


@dataclass(frozen=True)
class WaitReasons:
    """Why a call waits, as far as this daemon can tell without a search.

    Earlier calls of the same queue, and slots that hosts share, are both told as "its turn".
    """

    settings: Settings
    records: CallRecords
    limits: FunctionLimits
    inflight: Callable[[], Mapping[str, int]]  # attempts running, by queue

    async def reason(self, record: CallRecord) -> str | None:
        """What a call waits for; None: it doesn't."""
        if record.status == "delayed":
            return "its next attempt" if record.attempts else "its time"
        if record.status != "queued":
            return None
        stats = (await self.records.stats()).get(record.queue)
        if stats is not None and stats.paused:
            return f"queue {record.queue}, which is paused"
        held_back = stats.held_back.get(record.lane) if stats is not None else None
        return held_back or self._room(record) or self._turn(record)

    def _room(self, record: CallRecord) -> str | None:
        """What has no room for a call; None: there is room."""
        config = self.settings().queue(record.queue)
        running = self.inflight().get(record.queue, 0)
        if running >= config.max_inflight:
            return f"room in queue {record.queue}, which runs {running} of {config.max_inflight}"
        if self.limits.room(config.adaptive).get(record.lane, 1):
            return None
        if not self.limits.full(record.lane):
            return f"function {record.function}, which takes no calls for a moment"
        running, limit = self.limits.running(record.lane), self.limits.limit(record.lane)
        return f"function {record.function}, which runs {running} of {limit}"

    def _turn(self, record: CallRecord) -> str:
        if record.concurrency_key is not None:
            return f"its turn among calls with the key {record.concurrency_key}"
        rate = self.limits.rates().get(record.lane) or self.settings().queue(record.queue).rate
        return f"its turn, at a rate of {rate.text}" if rate else "its turn"


@dataclass(frozen=True)
class CallRoutes:
    """Calls: what became of them, and what is to become of them."""

    settings: Settings
    records: CallRecords
    waiters: CallWaiters
    reasons: WaitReasons

    async def show_call(self, request: Request) -> Response:
        """The record; with `wait`, as soon as it is final, or when the time is over."""
        wait_s = parse_one(request.query, "wait", duration)
        record = await self._final_record(request.parts[0], wait_s or 0.0)
        shown = record_document(record)
        if reason := await self.reasons.reason(record):
            shown["waits_for"] = reason
        return reply(shown)

    async def _final_record(self, call_id: str, wait_s: float) -> CallRecord:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while True:
            ended = self.waiters.event(call_id)
            record = await self.records.lookup(call_id)
            late = loop.time() >= until
            if record.status in FINAL or late or self.waiters.closed:
                return record
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await ended.wait()

    async def list_calls(self, request: Request) -> Response:
        """Records that match, newest first; with `count`, only how many."""
        filters = self._filters(request, "limit", "cursor", "count")
        if parse_one(request.query, "count", switch):
            return reply({"count": await self._count(filters)})
        limit = parse_one(request.query, "limit", page_size) or 100
        cursor = parse_one(request.query, "cursor", page_cursor)
        page = await self.records.list_records(filters, limit, cursor)
        calls = [record_document(record) for record in page.records]
        return reply({"calls": calls, "next_cursor": page.next_cursor})

    async def _count(self, filters: CallFilter) -> int:
        """How many records match, page by page, so that nobody waits for all of them."""
        page = await self.records.list_records(filters, MAX_PAGE)
        number = len(page.records)
        while page.next_cursor is not None:
            page = await self.records.list_records(filters, MAX_PAGE, page.next_cursor)
            number += len(page.records)
        return number

    def _filters(self, request: Request, *others: str) -> CallFilter:
        """The filters of a request. Raises HttpError(400)."""
        queries = request.queries
        unknown = queries.keys() - {*FILTERS, *others}
        if unknown:
            known = ", ".join((*FILTERS, *others))
            raise HttpError(400, f"{min(unknown)}: unknown filter; there are {known}")
        for name, values in queries.items():
            if len(values) > 1 and name not in ("status", "callback"):
                raise HttpError(400, f"{name}: takes one value, not {len(values)}")
        joined = {name: ",".join(values) for name, values in queries.items()}
        function = parse_one(joined, "function", text)
        if function:
            function = self.settings().gateway.own_name(function)
        return CallFilter(
            statuses=parse_one(joined, "status", words_of(*STATUSES)) or (),
            callbacks=parse_one(joined, "callback", words_of(*CALLBACK_STATUSES)) or (),
            function=function,
            queue=parse_one(joined, "queue", text),
            call_id=parse_one(joined, "call_id", text),
            schedule=parse_one(joined, "schedule", text),
            since=parse_one(joined, "since", parse_since),
            until=parse_one(joined, "until", parse_since),
        )

    async def retry_matching(self, request: Request) -> Response:
        """Queue exactly the runs that match again."""
        return await self._change_matching(request, "queued again", self.records.redrive_matching)

    async def cancel_matching(self, request: Request) -> Response:
        """Cancel exactly the runs that match."""
        return await self._change_matching(request, "cancelled", self.records.cancel_matching)

    async def _change_matching(
        self, request: Request, done: str, change: Callable[[CallFilter], Awaitable[BulkResult]]
    ) -> Response:
        filters = self._filters(request)
        if filters == CallFilter():
            raise HttpError(400, f"which calls? Give at least one of {', '.join(FILTERS)}")
        result = await change(filters)
        query = request.target.partition("?")[2]
        log_with(logging.INFO, f"calls {done}", filters=query, **result._asdict())
        return reply(result._asdict())

    async def show_result(self, request: Request) -> Response:
        """The body of the function's answer, with its own Content-Type."""
        stored = await self.records.answer(request.parts[0])
        status = {} if stored.http_status is None else {"X-Function-Status": stored.http_status}
        return stored_reply(stored.headers, stored.body, status)

    async def show_request(self, request: Request) -> Response:
        """The body that the function was asked with, or all else of the request as JSON."""
        stored = await self.records.request(request.parts[0])
        if "application/json" not in request.headers.get("Accept", ""):
            return stored_reply(stored.headers, stored.body)
        document = {
            "method": stored.method,
            "target": in_percent(stored.target),
            "headers": shown_headers(stored.headers),
            "body_bytes": len(stored.body),
        }
        return reply(document, headers=HARMLESS)

    async def retry_call(self, request: Request) -> Response:
        """Queue a final call again."""
        call_id = request.parts[0]
        await self.records.redrive(call_id)
        return respond(202, found_headers(call_id))

    async def resend_callback(self, request: Request) -> Response:
        """Deliver the outcome once more."""
        await self.records.resend(request.parts[0])
        return respond(202)

    async def cancel_call(self, request: Request) -> Response:
        """DELETE /async-function/ID: it will not run (again)."""
        call_id = request.parts[0]
        number = await self.records.cancel(call_id)
        log_with(logging.INFO, "call cancelled", call_id=call_id, number=number)
        return respond(202)


def hour_document(hour: LastHour, queue: str) -> dict[str, list[int]]:
    """What a queue did in each of the last 60 minutes, oldest first."""
    return {kind: hour.series(kind, queue) for kind in ("accepted", "ended", "failed")}


COPY_HEADERS = {
    **HARMLESS,
    "Content-Type": "application/vnd.sqlite3",
    "Content-Disposition": 'attachment; filename="faasd-async.db"',
}
COPY_READ_BYTES = 256 * KIB


@dataclass(frozen=True)
class BackupRoutes:
    """All that the daemon knows, as one file."""

    queue: Queue
    making: asyncio.Lock = field(default_factory=asyncio.Lock)  # A copy takes room.

    async def send_copy(self, request: Request) -> Response:
        """The queue's file as it is at one moment, while the daemon works."""
        head = respond(200, COPY_HEADERS)
        if request.http.method == "HEAD":
            return head
        if self.making.locked():
            raise HttpError(409, "another backup is being made: try again when it is done")
        started = time.monotonic()
        async with self.making:
            copy = await self.queue.storage.copy()
            try:
                size = await self._send(request.http, head, copy)
            finally:
                discard_copy_later(copy)
        took = round(time.monotonic() - started, 3)
        log_with(logging.INFO, "backup sent", bytes=size, duration=took)
        return head

    async def _send(self, http: Exchange, head: Response, copy: IO[bytes]) -> int:
        """Send a copy in pieces; how many bytes it has."""
        size = left = copy.seek(0, os.SEEK_END)
        copy.seek(0)
        head.headers["Content-Length"] = str(size)
        while left:  # Nothing is waited for after the last piece: the client may ask again then.
            try:
                piece = await in_thread("backup", copy.read, min(left, COPY_READ_BYTES))
            except Shortage:
                if http.begun:
                    raise ConnectionAbortedError("the copy is not whole") from None
                raise
            if not http.begun:
                await http.begin(head)
            await http.write(piece)
            left -= len(piece)
        return size


@dataclass(frozen=True)
class QueueRoutes:
    """Queues and metrics."""

    settings: Settings
    queue: Queue
    directory: FunctionDirectory
    metrics: Metrics
    inflight: Callable[[], Mapping[str, int]]  # attempts running, by queue

    async def list_queues(self, request: Request) -> Response:
        """All queues there are, the callback sender's last."""
        return reply({"queues": self.documents(await self.queue.stats())})

    def documents(self, stats: Mapping[str, QueueStats]) -> list[dict[str, Any]]:
        """All queues, each with what it did in the last hour."""
        config = self.settings()
        inflight = self.inflight()
        rates = self.directory.rates()
        now = time.time()
        rows = []
        for name in (*sorted({*config.queues, *stats} - {CALLBACKS}), CALLBACKS):
            queue = stats.get(name, QueueStats({}, now, False))
            running = inflight.get(name, 0)
            limits = rates.get(name, {})
            row = queue_document(name, queue, config.queue(name), limits, running, now)
            rows.append(row | {"hour": hour_document(self.metrics.activity.hour, name)})
        sender = ("name", "depth", "inflight", "oldest_seconds")  # it is no queue of the file
        rows[-1] = {name: rows[-1][name] for name in sender}
        rows[-1]["max_inflight"] = config.callback.max_inflight
        return rows

    async def change(self, request: Request) -> Response:
        """Pause, resume or purge a queue."""
        name, action = request.parts
        queues = self.settings().queues
        known = name in queues or name in await self.queue.stats()
        if not known or name == CALLBACKS:
            raise HttpError(404, f"no such queue; there are {', '.join(sorted(queues))}")
        if action == "purge":
            number = await self.queue.purge(name)
            log_with(logging.INFO, "queue purged", queue=name, cancelled=number)
            return reply({"queue": name, "cancelled": number})
        await self.queue.pause(name, action == "pause")
        log.info("queue %s: %sd", name, action)
        return reply({"queue": name, "paused": action == "pause"})

    async def expose(self, request: Request) -> Response:
        """All metrics, in the format of Prometheus."""
        queues = self.settings().queues
        stats, store = await asyncio.gather(self.queue.stats(), self.queue.storage.figures())
        functions = list(self.directory.all())
        figures = (self.metrics.registry, stats, store, queues, functions)
        try:
            body = await in_thread("metrics", scrape, *figures)
        except Shortage:
            body = scrape(*figures)
        content_type = {"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        return respond(200, content_type, body)


# --- Live view ------------------------------------------------------------------------------------
# What an operator's page shows of the whole daemon, and how it stays true.

# -- figures

DURABLE = "a call is on disk before its 202"


def resident_bytes() -> int | None:
    """Memory that this process has (proc(5): the second field of statm)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no Linux
        return None
    return pages * os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True)
class StatsRoutes:
    """The whole daemon in figures."""

    queues: QueueRoutes
    queue: Queue
    limits: FunctionLimits
    warnings: Callable[[], Sequence[str]]  # of the configuration as it stands now

    async def show_stats(self, request: Request) -> Response:
        """All figures that a page shows, at the same cost however much is stored."""
        trouble, overview = await self._look()
        activity = self.queues.metrics.activity
        config = self.queues.settings()
        notice = self.queue.notice()
        counts = Counter(overview.counts)
        if not overview.complete:
            counts.update(activity.ends)
        statuses = ("pending", "delivered", "failed")
        document = {
            "version": VERSION,
            "may_act": request.may_act,
            "trouble": trouble,
            "started_at": rfc3339(activity.begun_at),
            "uptime_seconds": round(time.time() - activity.begun_at, 3),
            "memory_bytes": resident_bytes(),
            "warnings": self.warnings(),
            "durable": notice is None,
            "guarantee": notice or DURABLE,
            "store": {"backend": config.store.backend, **overview.store._asdict()},
            "commit_seconds": activity.commit_document(),
            "counts": {status: states_of(counts, status) for status in STATUSES},
            "counted_since": None if overview.complete else rfc3339(activity.begun_at),
            "callbacks": {status: counts[CALLBACKS, status] for status in statuses},
            "queues": self.queues.documents(overview.queues),
            "functions": self._functions(counts),
        }
        return reply(document)

    async def _look(self) -> tuple[str | None, Overview]:
        """What is wrong with the queue, and its figures: none of a queue that hangs."""
        nothing = Overview({}, {}, StoreFigures("", 0, None), complete=False)
        if stalled := self.queue.stalled():
            return stalled, nothing
        try:
            return await self.queue.failing(), await self.queue.overview()
        except StoreError as exc:
            return str(exc), nothing

    def _functions(self, counts: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
        """The functions that are known, and those that only have calls."""
        rows: dict[str, dict[str, Any]] = {}
        for function in self.queues.directory.all():
            rows[function.key] = self._function_document(function)
        for (lane, status), number in counts.items():
            if lane == CALLBACKS:
                continue
            if lane not in rows:
                name, _, namespace = lane.partition(".")
                rows[lane] = {"name": name, "namespace": namespace, "kind": None, "counts": {}}
            rows[lane]["counts"][status] = number
        return list(rows.values())

    def _function_document(self, function: Function) -> dict[str, Any]:
        key = function.key
        metrics = self.queues.metrics
        hour = metrics.activity.hour
        kind = "command" if function.command else "url"
        return {
            "name": function.name,
            "namespace": function.namespace,
            "kind": "provider" if function.provided else kind,
            "type": function.type,
            "queue": function.queue,
            "max_inflight": self.limits.limit(key),
            "rate": function.rate.text if function.rate else None,
            "inflight": self.limits.running(key),
            "replicas": function.replicas,
            "invocations": metrics.functions.started[key],
            "counts": {},
            "hour": {kind: hour.series(kind, key) for kind in ("calls", "failures")},
        }


def states_of(counts: Mapping[tuple[str, str], int], status: str) -> int:
    """How many calls of all functions are in a state."""
    return sum(number for (_, state), number in counts.items() if state == status)


# -- output

LOOK_S = 2.0  # between looks whether a call has begun at another host, which is not told
ELSEWHERE = (
    "faasd-async: the call does not run here, or not yet; what it writes at another host is shown"
    " when it has ended\n"
)


@dataclass(frozen=True)
class LogRoutes:
    """What functions write."""

    settings: Settings
    records: CallRecords
    waiters: CallWaiters
    outputs: LiveOutputs
    shared: bool  # WorkQueue.SHARED

    async def show_log(self, request: Request) -> Response:
        """What the function wrote: its answer's body, and a command's stderr."""
        call_id = request.parts[0]
        headers = {**HARMLESS, "Content-Type": "text/plain; charset=utf-8"}
        stream = parse_one(request.query, "stream", one_of("stdout", "stderr"))
        if stream or not parse_one(request.query, "follow", switch):
            output = await self.records.output(call_id)
            alone = {"stdout": output.body, "stderr": output.stderr}
            return respond(200, headers, alone.get(stream or "", readable(output)))
        record = await self.records.lookup(call_id)
        head = respond(200, headers | {"X-Accel-Buffering": "no"})
        if request.http.method == "HEAD":
            return head
        await request.http.begin(head)
        async with contextlib.aclosing(self._follow(record)) as pieces:
            async for piece in pieces:
                await request.http.write(piece)
        await request.http.end()
        return head

    async def _follow(self, record: CallRecord) -> AsyncGenerator[bytes, None]:
        """What a call writes, attempt by attempt, until it has ended.

        What its last attempt wrote at another host follows when it has ended.
        """
        shared = self.shared
        followed = 0  # the last attempt whose output was read here
        while True:
            changed = self.waiters.event(record.id)
            if output := self.outputs.find(record.id):
                followed = output.attempt
                async with contextlib.aclosing(output.follow()) as pieces:
                    async for piece in pieces:
                        yield piece
            record = await self.records.lookup(record.id)
            if record.status in FINAL or self.waiters.closed:
                break
            if shared and record.status == "running" and followed != record.attempts:
                shared = False
                yield ELSEWHERE.encode()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if shared else None):
                    await changed.wait()
        if record.attempts != followed and record.status in FINAL:
            yield readable(await self.records.output(record.id))


# -- events

EVENTS_KEPT = 1000  # so that streams that were cut can go on after the last event they had
MAX_STREAMS = 8  # a browser allows six to one host
STREAM_PERIOD_S = 0.2  # between writes to one stream: what has happened meanwhile goes together
BURST_PERIOD_S = 0.5  # the same when that is more than BURST_BYTES, which nobody reads as it comes
BURST_BYTES = 16 * KIB
PING_S = 15.0  # Proxies cut connections on which nothing happens, nginx after 60 s.
GAP_S = 0.25  # between two events that tell of missed changes
LINGER_WATCH_S = 60.0  # for which events are kept when the last stream has ended: it may come back
EVENT_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would collect them
}


class Event(NamedTuple):
    """What streams are sent: those that want `record`; None: all of them."""

    number: int
    record: CallRecord | None
    payload: bytes


def event_text(event_id: str, kind: str, document: object) -> bytes:
    """An event as it is sent (HTML standard 9.2.5)."""
    data = json.dumps(document, ensure_ascii=False)
    return f"id: {event_id}\nevent: {kind}\ndata: {data}\n\n".encode()


class EventStream(NamedTuple):
    """A reader of events, and which ones it wants."""

    wants: Callable[[CallRecord], bool]
    unsent: Unsent

    def put(self, event: Event) -> bool:
        """Send an event, if it is wanted. False: there was no room, and what waited is gone."""
        wanted = event.record is None or self.wants(event.record)
        return not wanted or self.unsent.put(event.payload)


class EventHub:
    """Tells each change of a call to all streams.

    An event's id is EPOCH-NUMBER. A stream that was cut goes on after the last event that it had,
    if that is still known. The queue is watched only while somebody reads, and a while longer.
    """

    def __init__(self, records: CallRecords) -> None:
        self.closed = False
        self._records = records
        self._streams: set[EventStream] = set()
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._epoch = new_id()[-12:]
        self._number = 0
        self._watching = False
        self._gap: asyncio.TimerHandle | None = None  # until changes that were missed are told
        self._end: asyncio.TimerHandle | None = None  # until watching ends, when nobody reads

    def join(self, wants: Callable[[CallRecord], bool], last_id: str | None) -> EventStream:
        """A stream of what is wanted, from now on or after an event. HttpError(503)."""
        if len(self._streams) >= MAX_STREAMS:
            reason = f"{MAX_STREAMS} streams of events are open already: close one, or poll"
            raise HttpError(503, f"{reason} /system/stats", LATER)
        if self._end is not None:
            self._end.cancel()
            self._end = None
        if not self._watching:
            self._records.watch(self._tell)
            self._watching = True
        stream = EventStream(wants, Unsent())
        missed = self._since(last_id)
        opening = event_text(self._last_id, "open", {"resumed": missed is not None})
        stream.put(Event(self._number, None, b"retry: 2000\n" + opening))
        for event in missed or ():
            if not stream.put(event):
                self._skip(stream)
                break
        self._streams.add(stream)
        return stream

    def leave(self, stream: EventStream) -> None:
        """A reader has gone."""
        self._streams.discard(stream)
        if not self._streams and not self.closed:
            self._end = asyncio.get_running_loop().call_later(LINGER_WATCH_S, self._stop_watching)

    def close(self) -> None:
        """End all streams: the daemon stops."""
        self.closed = True
        for timer in (self._gap, self._end):
            if timer is not None:
                timer.cancel()
        for stream in self._streams:
            stream.unsent.wake()

    def ping(self) -> bytes:
        """An event that says that the stream works, and that all up to its id was sent."""
        return event_text(self._last_id, "ping", {})

    @property
    def _last_id(self) -> str:
        return f"{self._epoch}-{self._number}"

    def _since(self, last_id: str | None) -> Sequence[Event] | None:
        """What has happened since an event. None: that is not known any more."""
        epoch, _, number = (last_id or "").partition("-")
        if epoch != self._epoch or not re.fullmatch("[0-9]{1,18}", number):
            return None
        oldest = self._events[0].number if self._events else self._number + 1
        if not oldest - 1 <= int(number) <= self._number:
            return None
        return [event for event in self._events if event.number > int(number)]

    def _tell(self, changes: Changes) -> None:
        if not self._watching or self.closed:
            return
        for record in changes.records:
            self._number += 1
            payload = event_text(self._last_id, "call", record_document(record))
            self._send(Event(self._number, record, payload))
        if changes.missed and self._gap is None:
            self._gap = asyncio.get_running_loop().call_later(GAP_S, self._tell_gap)

    def _send(self, event: Event) -> None:
        self._events.append(event)
        for stream in self._streams:
            if not stream.put(event):
                self._skip(stream)

    def _tell_gap(self) -> None:
        """Tell that there were more changes than are told: who shows them has to look again."""
        self._gap = None
        self._number += 1
        reason = "more has changed than is told: look again"
        payload = event_text(self._last_id, "gap", {"reason": reason})
        self._send(Event(self._number, None, payload))

    def _skip(self, stream: EventStream) -> None:
        """Tell a reader that it was too slow, and has to look again."""
        reason = "this stream was read too slowly: look again"
        payload = event_text(self._last_id, "gap", {"reason": reason})
        stream.put(Event(self._number, None, payload))

    def _stop_watching(self) -> None:
        self._records.watch(None)
        self._watching = False
        self._events.clear()
        self._epoch = new_id()[-12:]


@dataclass(frozen=True)
class EventRoutes:
    """Changes of calls as they happen."""

    settings: Settings
    hub: EventHub

    async def show_events(self, request: Request) -> Response:
        """A stream of events, until the client goes away or the daemon stops."""
        wants = self._filter(request.query)
        head = respond(200, EVENT_HEADERS)
        if request.http.method == "HEAD":
            return head
        stream = self.hub.join(wants, request.headers.get("Last-Event-ID"))
        try:
            await request.http.begin(head)
            while not self.hub.closed:
                data = await stream.unsent.take(PING_S) or self.hub.ping()
                await request.http.write(data)
                burst = len(data) > BURST_BYTES
                await asyncio.sleep(BURST_PERIOD_S if burst else STREAM_PERIOD_S)
            await request.http.end()
        finally:
            self.hub.leave(stream)
        return head

    def _filter(self, query: Mapping[str, str]) -> Callable[[CallRecord], bool]:
        """Which calls a stream is about. Raises HttpError(400)."""
        if unknown := query.keys() - {"call_id", "function"}:
            raise HttpError(400, f"{min(unknown)}: unknown filter; there are call_id, function")
        call_id = parse_one(query, "call_id", text)
        function = parse_one(query, "function", text)
        if function:
            function = self.settings().gateway.own_name(function)

        def wants(record: CallRecord) -> bool:
            is_call = call_id in (None, record.id, record.call_id)
            return is_call and function in (None, record.function)

        return wants


# --- OpenFaaS routes ------------------------------------------------------------------------------
# -- OpenFaaS's REST API


# The resources, and how they may be used where the TOML file is all there is.
READABLE = ("functions", "function", "info", "namespaces", "namespace", "secrets", "logs")
WITHOUT_PROVIDER = dict.fromkeys(READABLE, "GET") | {"scale-function": ""}


@dataclass(frozen=True)
class RestRoutes:
    """OpenFaaS's REST API. The functions of the file can be read; all else is the provider's."""

    settings: Settings
    provider: Provider
    directory: FunctionDirectory
    metrics: Metrics

    async def handle(self, request: Request) -> Response:
        """/system/…, but for calls and queues."""
        config = self.settings()
        segments = f"{request.target.partition('?')[0]}//".split("/")
        resource, name = segments[2], segments[3]
        namespace = request.query.get("namespace") or config.gateway.namespace
        configured = config.functions if namespace == config.gateway.namespace else {}
        if resource == "alert":
            reason = "this gateway does not scale on alerts"
            raise HttpError(501, f"{reason}: it scales functions up when they are called")
        reads = request.http.method in ("GET", "HEAD")
        if self.provider.url is None:
            require_readable(resource, reads)
        if not reads:
            return await self._write(request, resource)
        if resource == "function" and name in configured:
            return reply(self._document(configured[name]))
        return await self._read(request, resource, name, configured)

    async def _read(
        self, request: Request, resource: str, name: str, configured: Mapping[str, Function]
    ) -> Response:
        documents = self._own_documents()
        if self.provider.url is not None:
            if resource not in ("info", "functions"):
                return await self._pass_on(request)
            answer = await self._ask(request, "GET", b"")
            if answer.status != 200:
                return passed(answer, answer.status)
            documents[resource] = parse_provided(answer, request.target, resource)
        elif resource == "logs":
            return respond(200, {"Content-Type": "application/x-ndjson"})
        elif resource == "namespace" and name in documents["namespaces"]:
            return reply({"name": name, "labels": {}, "annotations": {}})
        elif resource in ("function", "namespace"):
            raise HttpError(404, f"no such {resource}: it is not in the configuration")
        if resource == "info":
            arch = os.uname().machine
            return reply({"provider": documents["info"], "version": OWN_VERSION, "arch": arch})
        if resource == "functions":
            listed = [self._document(function) for function in configured.values()]
            listed += self._counted(documents["functions"], configured)
            return reply(listed)
        return reply(documents[resource])

    async def _write(self, request: Request, resource: str) -> Response:
        config = self.settings().gateway
        method = request.http.method
        body = await read_body(request.http, config.read_timeout, config.max_payload)
        answer = await self._ask(request, method, body)
        self.directory.expire()
        deployed = answer.status == 200 and resource == "functions" and method != "DELETE"
        return passed(answer, 202 if deployed else answer.status)  # as gateways say it

    async def _ask(self, request: Request, method: str, body: bytes) -> Fetched:
        limit_s = self.settings().gateway.upstream_timeout
        return await self.provider.ask(method, request.target, body, limit_s)

    async def _pass_on(self, request: Request) -> Response:
        """What is streamed: logs, for as long as somebody follows them."""
        headers = forward_headers(request.http.head.raw_headers, COMPUTED)
        answering = self.provider.request(request.http.method, request.target, headers)
        return await stream_answer(request, answering, {}, Limit(None), "the provider")

    def _own_documents(self) -> dict[str, Any]:
        """What is answered if there is no provider, by resource."""
        info = {"provider": "faasd-async", "orchestration": "processes", "version": OWN_VERSION}
        namespaces = [self.settings().gateway.namespace]
        return {"functions": [], "namespaces": namespaces, "secrets": [], "info": info}

    def _document(self, function: Function) -> dict[str, Any]:
        return function_document(function, self.metrics.functions.started[function.key])

    def _counted(
        self, documents: Iterable[dict[str, Any]], configured: Mapping[str, Function]
    ) -> Iterator[dict[str, Any]]:
        """The provider's functions that are not hidden by ours, with our counts."""
        for document in documents:
            if document["name"] not in configured:
                key = f"{document['name']}.{document['namespace']}"
                yield document | {"invocationCount": self.metrics.functions.started[key]}


def require_readable(resource: str, reads: bool) -> None:
    """Refuse what the TOML file can't do for a provider. Raises HttpError: 404, 405."""
    allowed = WITHOUT_PROVIDER.get(resource)
    if allowed is None:
        raise HttpError(404, "no such route below /system")
    if not (reads and allowed):
        reason = "functions are defined in the TOML file: change that and reload"
        raise HttpError(405, reason, {"Allow": allowed})


def parse_provided(answer: Fetched, target: str, resource: str) -> object:
    """What the provider says of itself or its functions. ProviderAway: it says something else."""
    try:
        document = parse_json(answer.body)
        return function_list(document) if resource == "functions" else document
    except ValueError as exc:
        raise ProviderAway(f"the provider's answer to {target}: {exc}") from None


def passed(answer: Fetched, status: int) -> Response:
    """The provider's answer, which has been read: how it was framed does not count any more."""
    headers = as_multidict(forward_headers(answer.headers, CONTENT_LENGTH))
    return Response(status, headers, answer.body)


# -- Fn Project's API of 2017


@dataclass(frozen=True)
class FnRoutes:
    """Functions by app and route, and their calls. An app is nothing but a label of a call."""

    functions: FunctionRoutes
    records: CallRecords

    async def call(self, request: Request) -> Response:
        """/r/APP/ROUTE: the function is the route's first segment."""
        _, _, rest = request.target.removeprefix("/r/").partition("/")
        name, target = split_target(rest)
        function = await self.functions.find(name)
        if function.type != "async":
            return await self.functions.answer(request, function, target)
        return await self.functions.accept(request, function, target, app=request.parts[0])

    async def list_calls(self, request: Request) -> Response:
        """The newest calls of an app; with `path`, of one function."""
        query = request.query
        path = query.get("path", "").lstrip("/")
        filters = CallFilter(app=request.parts[0], function=split_target(path)[0] or None)
        limit = parse_one(query, "per_page", page_size) or parse_one(query, "limit", page_size)
        cursor = parse_one(query, "cursor", page_cursor) if query.get("cursor") else None
        page = await self.records.list_records(filters, limit or 100, cursor)
        listed = {
            "message": "Successfully listed calls",
            "next_cursor": page.next_cursor or "",
            "calls": [fn_document(record) for record in page.records],
        }
        return reply(listed)

    async def show_call(self, request: Request) -> Response:
        """One call."""
        record = await self._find(*request.parts)
        return reply({"message": "Successfully loaded call", "call": fn_document(record)})

    async def show_log(self, request: Request) -> Response:
        """What a call wrote."""
        record = await self._find(*request.parts)
        output = await self.records.output(record.id)
        document = {"call_id": record.call_id, "log": readable(output).decode("utf-8", "replace")}
        return reply({"message": "Successfully loaded log", "log": document})

    async def _find(self, app: str, call_id: str) -> CallRecord:
        record = await self.records.lookup(call_id)
        if record.app != app:
            raise HttpError(404, "Call not found")
        return record


# --- Page style -----------------------------------------------------------------------------------
# The look of the operator's page.

PAGE_STYLE = """\
:root {
  --back: #f6f7f8; --panel: #fff; --line: #dfe3e8; --edge: #7b8592; --hover: #f0f3f7;
  --text: #1b1f24; --quiet: #565f6b; --accent: #1f5fc4; --on-accent: #fff;
  --good: #17703a; --bad: #b3261e; --slow: #8a5300; --later: #6b3fa8; --wait: #3d5a6c;
  --target: 34px;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #121519; --panel: #1a1e23; --line: #2d333b; --edge: #76818e; --hover: #22272e;
    --text: #e5e8ec; --quiet: #a3adb8; --accent: #8db8ff; --on-accent: #0d1420;
    --good: #6cd48f; --bad: #ff9b92; --slow: #f0b95a; --later: #c9adff; --wait: #a9c4d4;
  }
}
@media (pointer: coarse), (max-width: 46rem) { :root { --target: 44px; } }

* { box-sizing: border-box; }
[hidden] { display: none; }
html { color-scheme: light dark; background: var(--back); color: var(--text); }
body {
  margin: 0 auto; max-width: 80rem; padding: 0 1rem 3rem;
  font: .9375rem/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
h1 { font-size: 1rem; margin: 0; }
h2 { font-size: 1.25rem; margin: 1rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, dl, ul { margin: .5rem 0; }
a { color: var(--accent); }
pre, code, textarea { font: .8125rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre { margin: 0; max-height: 24rem; overflow: auto; white-space: pre-wrap; }
svg { width: 1em; height: 1em; flex: none; fill: none; stroke: currentColor; stroke-width: 1.75; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }

button, .button, input[type=search], textarea {
  min-height: var(--target); min-width: var(--target); padding: 0 .75rem;
  border: 1px solid var(--edge); border-radius: 6px;
  background: var(--panel); color: inherit; font: inherit;
}
textarea { width: 100%; min-height: 9rem; padding: .625rem; }
button, .button, :is(nav, td, th) a, .run { display: inline-flex; align-items: center; }
:is(nav, td, th) a, .run { min-height: var(--target); }
button, .button { justify-content: center; cursor: pointer; text-decoration: none; }
button:hover { text-decoration: underline; }
.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
.danger { border-color: var(--bad); color: var(--bad); }
.row, header { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; }
.row { margin: .75rem 0; }
.grow, #words { flex: 1; min-width: 0; }

header { border-bottom: 1px solid var(--line); padding-top: .375rem; }
nav { display: flex; overflow-x: auto; scrollbar-width: none; }
nav a {
  flex: none; gap: .375rem; padding: 0 .75rem; border-bottom: 2px solid transparent;
  color: var(--quiet); text-decoration: none;
}
nav a:hover, nav a[aria-current] { color: var(--text); }
nav a[aria-current] { border-color: var(--accent); font-weight: 600; }
nav a:focus-visible { outline-offset: -3px; }
#live { margin-left: auto; }
#live::before { content: "○ "; }
#live.on::before { content: "● "; color: var(--good); }
#notice { padding: .625rem .875rem; border-left: 4px solid var(--bad); background: var(--panel); }
#notice.done { border-color: var(--good); }

.sheet, table { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; }
.sheet { padding: .75rem .875rem; }
ul.sheet { padding-left: 2rem; }
table { width: 100%; border-spacing: 0; }
th, td { padding: 0 .625rem; height: var(--target); text-align: left; overflow-wrap: break-word; }
thead, .number, .actions, td .state, .why { white-space: nowrap; }
thead th, dt, small, .empty { font-size: .8125rem; color: var(--quiet); }
tbody td, tbody th { border-top: 1px solid var(--line); }
tbody tr:hover, tbody tr:focus-within { background: var(--hover); }
:is(td, th) a { color: inherit; font-weight: 600; }
:is(td, th) a:not(:hover) { text-decoration: none; }
.number, .actions { text-align: right; }
.actions button { margin: 3px 0 3px .5rem; }
.pick label { display: grid; place-items: center; min-height: var(--target); }
.pick { width: 44px; padding: 0; }
.why { width: 35%; max-width: 1px; overflow: hidden; text-overflow: ellipsis; }
.hour {
  width: 96px; height: 22px; margin-right: .5rem; vertical-align: middle;
  color: var(--accent); stroke-width: 1;
}

.state { display: inline-flex; align-items: center; gap: .375rem; vertical-align: bottom; }
.success { color: var(--good); }
.error { color: var(--bad); }
.timeout, .paused { color: var(--slow); }
.running { color: var(--accent); }
.delayed { color: var(--later); }
.queued { color: var(--wait); }
.cancelled { color: var(--quiet); }

.run { min-width: 24px; }
.run .state { width: 1em; overflow: hidden; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem; }
.facts > :first-child { grid-column: span 2; }
dd { margin: 0; }
.bar { display: block; width: 100%; height: .5rem; margin: .25rem 0 .5rem; }
.bar rect { fill: currentColor; stroke: none; }
.line { list-style: none; margin: 0; padding: 0; }
.line li { display: grid; grid-template-columns: 7rem 1fr auto; gap: 0 .75rem; padding: .375rem 0; }
.line p { grid-column: 2 / -1; margin: 0; color: var(--quiet); }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.sides > * { min-width: 0; }

dialog {
  width: min(36rem, calc(100vw - 2rem)); border: 1px solid var(--edge);
  border-radius: 10px; background: var(--panel); color: inherit;
}
dialog::backdrop { background: rgb(0 0 0 / .5); }
dialog h2 { margin-top: 0; }
dialog dl { display: grid; grid-template-columns: 3rem 1fr; gap: .375rem; }
kbd { padding: 0 .4rem; border: 1px solid var(--edge); }

@media (max-width: 46rem) {
  nav#views { order: 1; flex-basis: 100%; }
  .sides { grid-template-columns: 1fr; }
  .line p { grid-column: 1 / -1; }
  .run { min-width: 44px; }
  thead th:not(.pick) { display: none; }
  thead label { grid: auto / 44px auto 1fr; }
  thead label::after { content: "All"; }
  tbody, tbody td, tbody th { display: block; border: 0; height: auto; overflow-wrap: anywhere; }
  tbody tr { display: flex; flex-wrap: wrap; align-items: center; padding: .25rem 0; }
  tbody tr { border-top: 1px solid var(--line); }
  td:empty { display: none; }
  .named::before { content: attr(data-name) ": "; color: var(--quiet); }
  .why, .actions { flex-basis: 100%; max-width: none; white-space: normal; }
}
"""

# --- Page script ----------------------------------------------------------------------------------
# One ES module, in parts that are joined: what all views use, then a part for each view.

# h makes an element, such as h("p.quiet", { id: "x" }, "text"), without what is false or missing.
# Text goes in as text, whatever it says: nothing is ever parsed as markup.
PAGE_TOOLS = """\
const $ = (selector) => document.querySelector(selector);
const LIKE = {
  delivered: "success",
  failed: "error",
  pending: "delayed",
  missed: "timeout",
  skipped: "paused",
  pruned: "cancelled",
  none: "queued",
};
const DRAWN = ["svg", "use", "path", "rect"];

function h(name, ...content) {
  const [tag, ...classes] = name.split(".");
  const space = `http://www.w3.org/${DRAWN.includes(tag) ? "2000/svg" : "1999/xhtml"}`;
  const node = document.createElementNS(space, tag);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const part of content.flat(3)) {
    if (part?.constructor === Object) setAttributes(node, part);
    else if (part || part === 0) node.append(part);
  }
  return node;
}

function setAttributes(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value || value === 0) node.setAttribute(name, value === true ? "" : value);
  }
}

const drawing = (name, viewBox, ...parts) =>
  h(name, { viewBox, preserveAspectRatio: "none", "aria-hidden": "true" }, parts);
const icon = (name) => drawing("svg", "0 0 16 16", h("use", { href: `#i-${name}` }));
const state = (name, label = name) => {
  const kind = LIKE[name] ?? name; // whose colour and icon it has
  return h(`span.state.${kind}`, icon(kind), label);
};
const button = (label, action, id, kind = "plain") =>
  h(`button.${kind}`, { "data-do": action, "data-id": id }, label);
"""

# patch makes `old` look like `fresh` and keeps what is the same: focus, scrolling, selected text.
# Children with an id keep their element wherever they move to, others their place.
PAGE_PATCH = """\
function patch(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if ("checked" in old) old.checked = fresh.checked;
  patchChildren(old, fresh);
}

function patchChildren(old, fresh) {
  const named = byId(old);
  const stay = byId(fresh);
  for (const [id, node] of named) if (!stay.has(id)) node.remove();
  let at = old.firstChild;
  for (const next of [...fresh.childNodes]) {
    const same = next.id ? named.get(next.id) : twin(at, next);
    if (same && same === at) at = at.nextSibling;
    else old.insertBefore(same ?? next, at);
    if (same) patch(same, next);
  }
  while (at) {
    const rest = at.nextSibling;
    at.remove();
    at = rest;
  }
}

const byId = ({ children }) =>
  new Map([...children].filter((node) => node.id).map((node) => [node.id, node]));
const twin = (node, next) => (node && !node.id && node.nodeName === next.nodeName ? node : null);
"""

# Numbers, sizes and times as people read them.
PAGE_UNITS = """\
const SIZES = ["B", "KiB", "MiB", "GiB", "TiB"];
const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

const count = (value) => value.toLocaleString("en");
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
const short = (value) => value.toFixed(value < 10 && !Number.isInteger(value) ? 1 : 0);
const total = (values) => values.reduce((sum, value) => sum + value, 0);

function span(seconds) {
  if (seconds == null) return "";
  if (seconds < 1) return `${short(seconds * 1000)} ms`;
  if (seconds < 60) return `${short(seconds)} s`;
  const [[large, name], [small, rest]] = UNITS.slice(UNITS.findIndex(([unit]) => seconds >= unit));
  const left = Math.floor((seconds % large) / small);
  return `${Math.floor(seconds / large)} ${name}${left ? ` ${left} ${rest}` : ""}`;
}

function size(bytes) {
  if (bytes == null) return "";
  const power = Math.min(SIZES.length - 1, Math.floor(Math.log2(bytes || 1) / 10));
  return `${short(bytes / 1024 ** power)} ${SIZES[power]}`;
}

let skew = 0; // milliseconds by which the daemon's clock is ahead of this one
const now = () => new Date(Date.now() + skew).toISOString();
const between = (from, to) => Math.max(0, (Date.parse(to) - Date.parse(from)) / 1000);
const distance = (at) => span(Math.floor(Math.abs(Date.parse(now()) - Date.parse(at)) / 1000));
const age = (at) => at && h("time", { datetime: at, title: at }, rounded(at));
const rounded = (at) => distance(at).split(" ", 2).join(" ");
"""

# Requests to the daemon, and questions to people. BASE has no login that stands in the page's
# address: a request's address may not have one, and the browser goes on using it all the same.
PAGE_API = """\
const BASE = location.origin + location.pathname.slice(0, -3);

async function api(path, options) {
  const response = await fetch(BASE + path, { cache: "no-store", ...options });
  if (response.ok) return response;
  throw new Error((await response.text()).trim() || `status ${response.status}`);
}

const get = async (path, headers) => (await api(path, { headers })).json();
const post = (path) => api(path, { method: "POST" });
const callPath = (id) => `system/calls/${encodeURIComponent(id)}`;

const reason = ({ name, message }) =>
  name === "TypeError" ? "The daemon doesn't answer; trying again." : message;

function tell(text, done = false) {
  const notice = $("#notice");
  notice.hidden = !text;
  notice.textContent = text;
  notice.classList.toggle("done", done);
}

// Do something that may fail, tell of it, and show what has come of it.
async function attempt(step) {
  try {
    tell(await step(), true);
  } catch (error) {
    tell(reason(error));
  }
  await refresh();
}

// Whether to go on; without `yes` there is nothing to decide.
function ask(title, content, yes, kind = "main") {
  const dialog = $("#dialog");
  const no = button(yes ? "Leave it" : "Close", "answer", "no");
  const answers = h("div.row", h("span.grow"), no, yes && button(yes, "answer", "yes", kind));
  dialog.replaceChildren(h("h2", { id: "question" }, title), ...content, answers);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
  });
}
"""

# The list of calls. filterOf gives the parameters of an address that choose calls, without those
# that turn pages; parseFilter reads "status:error function:cat 01a1…": a word alone is an id.
PAGE_CALLS = r"""
const OPEN = ["delayed", "queued", "running"];
const FINAL = ["success", "error", "timeout", "cancelled"];
const FILTERS = "status function queue schedule callback since until call_id".split(" ");
const COLUMNS = "State,Function,Queue,Attempts,Age,Took,Callback,Error".split(",");
const picked = new Map(); // calls that are ticked, by id

const link = (query) => `#calls?${new URLSearchParams(query)}`;
const callLink = (id) => `#call?${new URLSearchParams({ id })}`;

const filterOf = (query) => [...query].filter(([name]) => FILTERS.includes(name));

function parseFilter(text) {
  const words = text.match(/\S+/g) ?? [];
  return words.map((word) => {
    const [name, value] = word.split(/:(.*)/);
    return value && FILTERS.includes(name) ? [name, value] : ["call_id", word];
  });
}

const filterText = (filter) =>
  filter.map(([name, value]) => (name === "call_id" ? value : `${name}:${value}`)).join(" ");

async function loadCalls({ query }) {
  const page = await get(`system/calls?limit=50&${query}`);
  const ids = page.calls.map(({ id }) => id);
  for (const id of picked.keys()) if (!ids.includes(id)) picked.delete(id);
  return page;
}

function drawCalls({ calls, next_cursor: older }, { query }) {
  const filter = filterOf(query);
  const place = "status:error function: queue: schedule: callback: since:24h until: or an id";
  const field = { type: "search", id: "words", "aria-label": "Filter", placeholder: place };
  const turn = (label, to) => h("a.button", { href: link(to) }, label);
  return [
    drawTabs(query),
    h(
      "form.row",
      { id: "filter", role: "search" },
      h("input", field, { value: filterText(filter), autocapitalize: "off", spellcheck: "false" }),
      h("button", "Filter"),
    ),
    drawBulk(calls, filter),
    calls.length ? drawCallTable(calls) : drawNoCalls(filter),
    h(
      "div.row",
      query.has("cursor") && turn("Newest", filter),
      older && turn("Older", [...filter, ["cursor", older]]),
    ),
  ];
}

function drawTabs(query) {
  const others = filterOf(query).filter(([name]) => name !== "status");
  const counts = others.length ? {} : stats.counts; // there are none for a filter
  const tab = (name, label, chosen) => {
    const current = query.get("status") === name && "page";
    const to = { href: link([...chosen, ...others]), "aria-current": current };
    return h("a", to, label, counts[name] !== undefined && h("small", count(counts[name])));
  };
  const states = [...OPEN, ...FINAL].map((name) => tab(name, state(name), [["status", name]]));
  return h("nav", { "aria-label": "States" }, tab(null, "All", []), states);
}

function drawBulk(calls, filter) {
  const some = picked.size > 0;
  const which = some ? "these" : "all that match";
  const text = plural(some ? picked.size : calls.length, "call");
  return h(
    "div.row",
    h("span", text, some ? " selected" : " on this page"),
    stats.may_act &&
      (some || (filter.length > 0 && calls.length > 0)) && [
        button(`Retry ${which}…`, "change", "retry"),
        button(`Cancel ${which}…`, "change", "cancel"),
      ],
  );
}

const drawNoCalls = (filter) =>
  filter.length
    ? drawEmpty("No call matches.")
    : drawEmpty("No calls yet. Queue one: ", h("code", firstCommand()));

const firstCommand = () =>
  `curl -d hello ${BASE}async-function/${stats.functions[0]?.name ?? "NAME"}`;

function drawCallTable(calls) {
  const all = calls.every(({ id }) => picked.has(id));
  return drawTable("calls", [tick("*", "Select all", all), ...COLUMNS], calls.map(drawCallRow));
}

const tick = (id, label, checked) =>
  h(
    "label",
    h("input", {
      type: "checkbox",
      "data-do": "pick",
      "data-id": id,
      "aria-label": label,
      checked,
    }),
  );

function drawCallRow(call) {
  const { id, callback, error } = call;
  return h(
    "tr",
    { id },
    h("td.pick", tick(id, `Select ${call.function}, ${call.status}`, picked.has(id))),
    h("td", state(call.status)),
    h("td", h("a", { href: callLink(id) }, call.function)),
    cell(call.queue),
    figure(`${call.attempts}/${call.max_attempts}`),
    figure(age(call.created_at)),
    figure(span(call.duration_seconds)),
    cell(callback.status !== "none" && state(callback.status)),
    h("td.why", error && h("span", { title: error }, error.replace(/^function \S+ /, ""))),
  );
}
"""

# Retry and cancel: the call on screen, those that are ticked, or all that match. changeAsked asks,
# if there is something to say, does it, and tells for how many it was done. narrowed gives the
# filter for those calls among the matching ones for which it can be done.
PAGE_CHANGES = """\
const CHANGES = {
  retry: {
    label: "Retry",
    kind: "main",
    done: "queued again",
    narrow: { status: FINAL, callback: ["none", "delivered", "failed"] },
    text: "What they did so far stays in their history.",
    one: (id) => post(`${callPath(id)}/retry`),
  },
  cancel: {
    label: "Cancel",
    kind: "danger",
    done: "cancelled",
    narrow: { status: OPEN },
    text: "Those that wait will not run; those that run are stopped.",
    one: (id) => api(`async-function/${encodeURIComponent(id)}`, { method: "DELETE" }),
  },
};

function change(name) {
  if (shown.data.call) return changeThese(name, [shown.data.call]);
  return picked.size ? changeThese(name, [...picked.values()]) : changeMatching(name);
}

async function changeAsked(name, number, more, act) {
  const { label, kind, done, text } = CHANGES[name];
  const what = plural(number, "call");
  const content = [h("p", text), h("p", more)];
  if (!number) return tell(`That can't be ${done} as it stands.`);
  if (more != null && !(await ask(`${label} ${what}?`, content, `${label} ${what}`, kind))) return;
  await attempt(async () => `${await act()} ${done}.`);
}

async function changeThese(name, calls) {
  const able = calls.filter((call) => isAble(name, call));
  const left = calls.length - able.length;
  const more = left ? `It can't be done for ${left}.` : "";
  const harmless = name === "retry" && calls.length === 1;
  await changeAsked(name, able.length, harmless ? null : more, async () => {
    const results = await Promise.allSettled(able.map(({ id }) => CHANGES[name].one(id)));
    picked.clear();
    const failure = results.find(({ status }) => status === "rejected");
    if (failure) throw failure.reason;
    return plural(able.length, "call");
  });
}

const isFinal = (call) => FINAL.includes(call.status);
const isAble = (name, call) =>
  call.callback.status === "pending" ? name === "cancel" : isFinal(call) === (name === "retry");

function narrowed(name) {
  const filter = new URLSearchParams(filterOf(route().query));
  const callbacks = name === "cancel" && filter.get("callback") === "pending";
  if (!filter.has("until")) filter.set("until", now());
  for (const [key, able] of Object.entries(callbacks ? {} : CHANGES[name].narrow)) {
    const asked = filter.get(key)?.split(",") ?? able;
    filter.set(key, able.filter((value) => asked.includes(value)).join(","));
  }
  return filter;
}

async function changeMatching(name) {
  const filter = narrowed(name);
  const possible = [...filter.values()].every(Boolean);
  const number = possible ? (await get(`system/calls?${filter}&count=1`)).count : 0;
  await changeAsked(name, number, filterText([...filter]), async () => {
    const { done, matched } = await (await post(`system/calls/${name}?${filter}`)).json();
    return `${plural(done, "call")} of ${count(matched)}`;
  });
}
"""

# --- Page views -----------------------------------------------------------------------------------
# Each view has a function that loads what it shows, and one that draws it, which gives elements.

# One call: how long it waited, how it ran, what became of its callback.
PAGE_CALL = r"""
const MOST_TEXT = 100_000; // characters that are shown of a body
let details = {}; // of the call on screen: its request, result and output
let reading = new AbortController(); // of its output

async function loadCall({ query }) {
  const id = query.get("id");
  const call = await get(callPath(id));
  const version = [id, call.status, call.attempts, call.completed_at].join();
  if (details.version !== version) {
    const path = callPath(id);
    const [body, request, result] = await Promise.all([
      loadBody(`${path}/request`),
      get(`${path}/request`, { Accept: "application/json" }).catch(() => ({})),
      isFinal(call) ? loadBody(`${path}/result`) : { missing: "None yet." },
    ]);
    details = { version, body, request, result, output: "" };
    readOutput(call, details);
  }
  return { call, ...details };
}

// Read what the function writes, as it writes it, until something else is on screen.
async function readOutput(call, into) {
  reading.abort();
  reading = new AbortController();
  const path = `${callPath(call.id)}/log${isFinal(call) ? "" : "?follow=1"}`;
  try {
    const { body } = await api(path, { signal: reading.signal });
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      into.output = (into.output + part.value).slice(-MOST_TEXT);
      if (shown.data.version === into.version) Object.assign(shown.data, into);
      paintSoon();
    }
  } catch (error) {
    if (error.name !== "AbortError") into.output += `\n${reason(error)}`;
  }
}

function drawCall({ call, body, result, output }) {
  const part = (title, draw, data) => h("section", h("h3", title), draw(title, data));
  return [
    h("h2.row", call.function, state(call.status)),
    drawCallActions(call, body),
    h(
      "dl.sheet.facts",
      fact("Id", h("code", call.id)),
      call.call_id !== call.id && fact("Call id", h("code", call.call_id)),
      fact("Queue", h("a", { href: link({ queue: call.queue }) }, call.queue)),
      call.schedule &&
        fact("Schedule", h("a", { href: link({ schedule: call.schedule }) }, call.schedule)),
      fact("Accepted", age(call.created_at), " ago"),
      fact("Answer", call.http_status ? `status ${call.http_status}` : "none"),
      fact("Request", size(call.request_bytes)),
      fact("Result", size(call.response_bytes) || "none"),
    ),
    h("div.sheet", drawBar(call), h("ol.line", happenings(call).map(drawHappening))),
    h("div.sides", part("Request", drawBody, body), part("Result", drawBody, result)),
    output && output !== result.text && part("Output", drawText, output),
  ];
}

const fact = (name, ...value) => h("div", h("dt", name), h("dd", value));

function drawCallActions(call, body) {
  const final = isAble("retry", call);
  const told = final && call.callback.status !== "none";
  return h(
    "div.row",
    stats.may_act && [
      final && button("Run again", "change", "retry", "main"),
      body.text != null && button("Run with another body…", "edit"),
      told && button("Send callback again", "post", `${callPath(call.id)}/callback`),
      isAble("cancel", call) && button("Cancel…", "change", "cancel", "danger"),
    ],
    body.text != null && button("Copy as curl", "curl"),
  );
}

// In order: name, state, when, for how long, and why.
function happenings(call) {
  const { history = [], failures = [], callback, status, started_at: began, attempts } = call;
  const failed = (kind) => failures.filter(({ of }) => of === kind).map(failure);
  const waits = call.waits_for;
  const target = [callback.url, callback.error].filter(Boolean).join(": ");
  return [
    ...history.map((run) => ["run before", run.status, run.started_at, null, run.error]),
    ["waited", "queued", call.created_at, between(call.created_at, begin(call))],
    ...failed("attempt"),
    waits && waiting(call),
    began && !waits && [`attempt ${attempts}`, status, began, call.duration_seconds, call.error],
    ...failed("callback"),
    callback.url && [`callback ${callback.attempts || ""}`, callback.status, null, null, target],
  ].filter(Boolean);
}

function waiting({ status, due_at: due, waits_for: what }) {
  const left = status === "delayed" && [", in ", age(due)];
  return ["waits", status, due, null, [`for ${what}`, left]];
}

function failure({ of, number, failed_at: at, duration_seconds: took, error }) {
  return [`${of} ${number}`, "error", at, took, error];
}

// When its first attempt began, if it did.
function begin(call) {
  const [first] = call.failures ?? [];
  if (first?.of !== "attempt") return call.started_at ?? call.completed_at ?? now();
  return new Date(Date.parse(first.failed_at) - first.duration_seconds * 1000).toISOString();
}

function drawHappening([name, kind, at, took, why]) {
  const local = at && new Date(at).toLocaleString();
  return h("li", state(kind, name), h("span", local), h("span", span(took)), why && h("p", why));
}

// Waiting and running, in proportion.
function drawBar(call) {
  const share =
    between(call.created_at, begin(call)) / between(call.created_at, call.completed_at ?? now());
  const part = (kind, x, width) => h(`rect.${kind}`, { x, width, height: 1 });
  const ran = part(call.status, share, 1 - share);
  return drawing("svg.bar", "0 0 1 1", part("queued", 0, 1), ran);
}
"""

# A body is shown as its text, where it is text; JSON with a line for each value, and each number
# with all its digits.
PAGE_BODIES = r"""
async function loadBody(path) {
  try {
    const response = await api(path);
    const bytes = new Uint8Array(await response.arrayBuffer());
    const body = { bytes: bytes.length, type: response.headers.get("Content-Type"), text: null };
    return bytes.includes(0) ? body : { ...body, text: decoded(bytes) };
  } catch (error) {
    return { missing: reason(error) };
  }
}

function decoded(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    return null;
  }
}

function drawBody(name, { missing, bytes, text, type }) {
  if (missing) return drawEmpty(missing);
  if (!bytes) return drawEmpty("Empty.");
  return text === null ? drawEmpty(`${size(bytes)} of ${type}`) : drawText(name, indented(text));
}

function drawText(name, text) {
  const rest = text.length - MOST_TEXT;
  const more = rest > 0 && `\n… and ${plural(rest, "character")} more`;
  const scrolls = { tabindex: 0, role: "region", "aria-label": `${name} as text` };
  return h("pre.sheet", scrolls, text.slice(0, MOST_TEXT), more);
}

function indented(text) {
  const exact = (key, value, { source }) =>
    typeof value === "number" ? JSON.rawJSON(source) : value;
  try {
    return JSON.stringify(JSON.parse(text, exact), null, 2);
  } catch {
    return text;
  }
}
"""

# Queues and functions.
PAGE_QUEUES = """\
const QUEUES = "Queue,State,Waiting,Running,Oldest,Last hour,Failed,Actions".split(",");
const FUNCTIONS = "Function,Kind,Queue,Running,Replicas,Calls,Last hour,Failed".split(",");

const drawQueues = () => [
  h("h2", "Queues"),
  drawTable("queues", QUEUES, stats.queues.map(drawQueueRow)),
  h("h2", "Functions"),
  stats.functions.length
    ? drawTable("functions", FUNCTIONS, stats.functions.map(drawFunctionRow))
    : drawEmpty("No functions yet: name one under [functions]."),
];

function drawTable(id, titles, rows) {
  for (const row of rows) {
    for (const one of row.querySelectorAll(".named")) one.dataset.name = titles[one.cellIndex];
  }
  const kind = (i) => ({ class: rows[0]?.children[i].className });
  const head = titles.map((title, i) => h("th", kind(i), title));
  return h("table", { id }, h("thead", h("tr", head)), h("tbody", rows));
}

const drawEmpty = (...text) => h("p.sheet.empty", text);
const cell = (...value) => h("td.named", value);
const figure = (value) => h("td.named.number", value);
const drawName = (name, query) =>
  h("th", { scope: "row" }, query ? h("a", { href: link(query) }, name) : name);

function drawQueueRow({ name, paused, depth, hour, ...queue }) {
  const own = !name.startsWith("@");
  return h(
    "tr",
    { id: `queue-${name}` },
    drawName(own ? name : "callbacks", own && { queue: name }),
    h("td", paused ? state("paused") : "open"),
    figure(count(depth)),
    figure(drawLoad(queue)),
    figure(depth > 0 && span(queue.oldest_seconds)),
    figure(hour && drawHour(hour.accepted)),
    figure(hour && count(total(hour.failed))),
    drawActions(
      own && depth > 0 && button("Purge…", "purge", name, "danger"),
      own && pauseButton(queuePath(name), paused),
    ),
  );
}

const drawLoad = ({ inflight, max_inflight: most, rate }) =>
  h("span", inflight, most && ` of ${most}`, rate && `, rate ${rate}`);
const queuePath = (name) => `system/queues/${encodeURIComponent(name)}`;
const drawActions = (...buttons) => h("td.actions", stats.may_act && buttons);
const pauseButton = (path, paused) =>
  paused ? button("Resume", "post", `${path}/resume`) : button("Pause", "post", `${path}/pause`);

function drawFunctionRow({ name, namespace, kind, queue, hour, counts, ...figures }) {
  return h(
    "tr",
    { id: `function-${name}.${namespace}` },
    drawName(name, { function: name }),
    cell(kind ?? "gone"),
    cell(queue),
    figure(kind && drawLoad(figures)),
    figure(kind === "provider" && figures.replicas),
    figure(count(total(Object.values(counts)))),
    figure(hour && drawHour(hour.calls)),
    figure(hour && count(total(hour.failures))),
  );
}

function drawHour(minutes) {
  const most = Math.max(1, ...minutes);
  const points = minutes.map((value, i) => `${i} ${short(20 - (18 * value) / most)}`);
  const line = h("path", { d: `M${points.join("L")}` });
  return [drawing("svg.hour", "0 0 59 22", line), count(total(minutes))];
}

async function purge(name) {
  const { depth } = stats.queues.find((queue) => queue.name === name);
  const what = plural(depth, "waiting call");
  const text = h("p", "None of them will run. Calls that run already go on.");
  if (!(await ask(`Cancel ${what} of ${name}?`, [text], `Cancel ${what}`, "danger"))) return;
  await attempt(async () => {
    const { cancelled } = await (await post(`${queuePath(name)}/purge`)).json();
    return `${plural(cancelled, "call")} of ${name} cancelled.`;
  });
}
"""

# Schedules, and the host.
PAGE_HOST = """\
const SCHEDULES = "Schedule,Function,When,Next in,Last runs,Missed,Actions".split(",");

const drawSchedules = ({ schedules }) => [
  h("h2", "Schedules"),
  schedules.length
    ? drawTable("schedules", SCHEDULES, schedules.map(drawScheduleRow))
    : drawEmpty("No schedules yet: the TOML file has them as ", h("code", "[schedules.NAME]")),
];

function drawScheduleRow({ name, paused, enabled, ...schedule }) {
  const path = `system/schedules/${encodeURIComponent(name)}`;
  const next = enabled ? schedule.next.slice(0, 3).map((at, i) => [i > 0 && ", ", age(at)]) : "off";
  return h(
    "tr",
    { id: `schedule-${name}` },
    drawName(name, { schedule: name }),
    cell(schedule.function),
    cell(h("span", { title: schedule.words }, `${schedule.cron} (${schedule.timezone})`)),
    cell(paused ? state("paused") : next),
    cell(schedule.runs.map(drawRun)),
    figure(count(schedule.missed)),
    drawActions(button("Run now", "post", `${path}/run`), pauseButton(path, paused)),
  );
}

const drawRun = ({ id, status, scheduled_for: at }) =>
  h(id ? "a.run" : "span.run", { href: id && callLink(id), title: at }, state(status));

const problems = () => [stats.trouble, ...stats.warnings].filter(Boolean);

function drawHost() {
  const { store, callbacks, commit_seconds: commit } = stats;
  const failed = h("a", { href: link({ callback: "failed" }) }, count(callbacks.failed));
  return [
    h("h2", "Host"),
    h(
      "dl.sheet.facts",
      fact(`Store (${store.backend})`, h("code", store.place)),
      fact("Version", stats.version),
      fact("Up for", span(stats.uptime_seconds)),
      fact("Memory", size(stats.memory_bytes)),
      fact("Store", size(store.used_bytes)),
      fact("Left on its disk", size(store.free_bytes) || "not known"),
      fact("Commit, half · 99 %", `${span(commit.p50) || "none"} · ${span(commit.p99) || "none"}`),
      fact("Callbacks failed", failed),
    ),
    h("h2", "What a 202 means"),
    h("p.sheet.empty", state(stats.durable ? "success" : "timeout", stats.guarantee)),
    h("h2", "Warnings"),
    problems().length
      ? h(
          "ul.sheet",
          problems().map((text) => h("li", text)),
        )
      : drawEmpty("None."),
  ];
}
"""

# --- Page actions ---------------------------------------------------------------------------------
# The address says what is on screen: #calls?status=error, #call?id=ID, #queues, …

PAGE_LIVE = """\
const VIEWS = {
  calls: { load: loadCalls, draw: drawCalls },
  call: { load: loadCall, draw: drawCall },
  queues: { draw: drawQueues },
  schedules: { load: () => get("system/schedules"), draw: drawSchedules },
  host: { draw: drawHost },
};
const PACE = 500; // milliseconds between looks, and between updates of the screen: two a second
const SILENCE = 40_000; // that a stream is dead after: it says something every 15 seconds

let stats = {}; // the daemon in figures
let shown = { look: 0, data: {} }; // what is on screen, and which look gave it
let looks = 0; // begun
let looked = 0; // when the last one began
let pace = PACE;
let due = null; // the timer of the next look
let painting; // the timer of the next update of the screen
let painted = 0; // when the last one was
let failing = false; // the last look failed
let stream = null;
let heard = 0; // when it said something, or began
let live = false; // it has said something
let many = false; // more has changed than it tells

function route() {
  const [view, query] = location.hash.slice(1).split("?");
  return { view: Object.hasOwn(VIEWS, view) ? view : "calls", query: new URLSearchParams(query) };
}

function paint() {
  painting = clearTimeout(painting);
  painted = Date.now();
  showLive();
  if (shown.address !== location.hash) return;
  const here = route();
  document.title = `${here.view} · faasd-async`;
  patchChildren($("#view"), h("main", VIEWS[here.view].draw(shown.data, here)));
  $("#problems").textContent = problems().length ? `⚠ ${problems().length}` : "";
  for (const tab of document.querySelectorAll("#views a")) {
    tab.ariaCurrent = tab.hash.startsWith(`#${here.view}`) ? "page" : null;
  }
}

function paintSoon() {
  painting ??= setTimeout(paint, painted + PACE - Date.now());
}

// Look again, and show what there is now. A daemon that takes its time is asked less often.
async function refresh() {
  due = null;
  if (document.hidden) return;
  const look = ++looks;
  const address = location.hash;
  const here = route();
  looked = Date.now();
  try {
    const [data, figures] = await Promise.all([VIEWS[here.view].load?.(here), get("system/stats")]);
    if (address !== location.hash || look < shown.look) return;
    stats = figures;
    skew = Date.parse(stats.started_at) + stats.uptime_seconds * 1000 - Date.now();
    shown = { look, data: data ?? {}, address };
    if (failing) tell("");
    failing = false;
    paintSoon();
  } catch (error) {
    failing = true;
    tell(reason(error));
  }
  pace = Math.max(many ? 2 * PACE : PACE, 2 * (Date.now() - looked));
  many = false;
}

function changed() {
  due ??= setTimeout(refresh, looked + pace - Date.now());
}
"""

# The stream of changes. Where it is cut the browser asks for what came after the last id; where
# there is none, or a proxy keeps it to itself, the page looks every five seconds.
PAGE_STREAM = """\
function connect() {
  stream?.close();
  stream = null;
  live = false;
  heard = Date.now();
  if (!document.hidden) {
    stream = new EventSource(`${BASE}system/events`);
    for (const kind of ["open", "call", "gap", "ping"]) stream.addEventListener(kind, hear);
    stream.onerror = () => {
      if (stream.readyState === EventSource.CLOSED) setTimeout(connect, 30_000);
      showLive();
    };
  }
  showLive();
}

function hear({ type, data }) {
  if (!data) return; // The connection stands, which says nothing of what comes through.
  heard = Date.now();
  live = true;
  many ||= type === "gap";
  if (type === "ping") showLive();
  else changed();
}

const isSilent = () => Date.now() - heard > SILENCE;
const isLive = () => live && stream?.readyState === EventSource.OPEN && !isSilent();

function showLive() {
  $("#live").classList.toggle("on", isLive());
  const access = stats.may_act === false ? "read-only, " : "";
  $("#live").textContent = access + (isLive() ? "live" : "every 5 s");
}
"""

# What buttons and keys do.
PAGE_ACTIONS = """\
const ACTIONS = {
  pick,
  change,
  purge,
  edit,
  curl,
  help,
  post: (path) => attempt(() => post(path).then(() => "Done.")),
  answer: (value) => $("#dialog").close(value),
};

function pick(id) {
  const { calls } = shown.data;
  const these = id === "*" ? calls : calls.filter((call) => call.id === id);
  const all = these.every((call) => picked.has(call.id));
  for (const call of these) {
    if (all) picked.delete(call.id);
    else picked.set(call.id, call);
  }
  paint();
}
"""

# The call's request as a new call: by hand, or with another body.
PAGE_NEW_CALL = r"""
function newCall() {
  const { call, request } = shown.data;
  const [, type] = (request.headers ?? []).find(([name]) => /^content-type$/i.test(name)) ?? [];
  const path = `async-function/${call.function}.${call.namespace}${request.target ?? ""}`;
  return { path, headers: { "Content-Type": type ?? "text/plain", "X-Queue": call.queue } };
}

function field(label, value) {
  const area = h("textarea", { id: "field", "aria-label": label, spellcheck: "false" });
  area.value = value;
  return area;
}

async function edit() {
  const { path, headers } = newCall();
  const sent = new URL(path, BASE);
  if (sent.origin + sent.pathname + sent.search !== BASE + path) {
    return tell("A browser would change its path. Copy it as curl.");
  }
  const text = h("p", "A new call is queued with this body. It has no callback.");
  const body = field("Body", shown.data.body.text);
  if (!(await ask("Run with another body", [text, body], "Queue it"))) return;
  await attempt(async () => {
    const answer = await api(path, { method: "POST", headers, body: body.value });
    location.hash = callLink(answer.headers.get("X-Call-Id"));
    return "Queued.";
  });
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

async function curl() {
  const { path, headers } = newCall();
  const words = Object.entries(headers).map(([name, value]) => `-H ${quoted(`${name}: ${value}`)}`);
  const url = quoted(BASE + path);
  const body = quoted(shown.data.body.text);
  const command = ["curl -g --path-as-is", url, ...words, "--data-raw", body].join(" ");
  try {
    await navigator.clipboard.writeText(command);
    tell("Copied.", true);
  } catch {
    ask("Copy this", [field("Command", command)]); // No clipboard without https.
    $("#field").select();
  }
}
"""

# Keys, and what else happens in the window.
PAGE_KEYS = """\
const KEYS = {
  "/": ["to the filter", () => $("#words")?.focus()],
  j: ["next call", () => step(1)],
  k: ["previous call", () => step(-1)],
  x: ["select it, or not", () => row() && pick(row().id)],
  r: ["retry the call, or what is selected", () => changeHere("retry")],
  c: ["cancel the call, or what is selected", () => changeHere("cancel")],
  "?": ["these keys", help],
};

const row = () => document.activeElement.closest("#calls tbody tr");

function step(by) {
  const links = [...document.querySelectorAll("#calls tbody a")];
  const at = links.findIndex((one) => row()?.contains(one));
  links[Math.min(links.length - 1, Math.max(0, at + by))]?.focus();
}

function changeHere(name) {
  if (!stats.may_act) return;
  const here = row() && shown.data.calls.filter(({ id }) => id === row().id);
  if (shown.data.call || picked.size) change(name);
  else if (here) changeThese(name, here);
}

function help() {
  const keys = Object.entries(KEYS).map(([key, [text]]) => [h("dt", h("kbd", key)), h("dd", text)]);
  ask("Keys", [h("dl", keys)]);
}

document.onkeydown = (event) => {
  const { target, key } = event;
  const typing = target.closest("input:not([type=checkbox]), textarea, dialog");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, key)) return;
  event.preventDefault();
  KEYS[key][1]();
};

document.onclick = ({ target }) => {
  const control = target.closest("[data-do]");
  if (control) ACTIONS[control.dataset.do](control.dataset.id);
};

document.onsubmit = (event) => {
  event.preventDefault();
  location.hash = link(parseFilter($("#words").value));
};

window.onhashchange = () => {
  picked.clear();
  tell("");
  painting = clearTimeout(painting);
  painted = 0;
  refresh();
};

window.onunhandledrejection = (event) => tell(reason(event.reason));

document.onvisibilitychange = () => {
  connect();
  changed();
};

setInterval(() => {
  if (isSilent()) connect();
  if (!isLive() || route().view !== "calls") changed();
}, 5000);

setInterval(() => {
  for (const time of document.querySelectorAll("time")) time.textContent = rounded(time.dateTime);
}, 1000);

connect();
refresh();
"""

# --- Operator's page ------------------------------------------------------------------------------
# The page is one document: nothing else is loaded, neither from here nor from elsewhere.

PAGE_PARTS = (
    PAGE_TOOLS, PAGE_PATCH, PAGE_UNITS, PAGE_API, PAGE_CALLS, PAGE_CHANGES, PAGE_CALL, PAGE_BODIES,
    PAGE_QUEUES, PAGE_HOST, PAGE_LIVE, PAGE_STREAM, PAGE_ACTIONS, PAGE_NEW_CALL, PAGE_KEYS,
)  # fmt: skip
PAGE_SCRIPT = "\n".join(PAGE_PARTS)
PAGE = f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>faasd-async</title>
<link rel="icon" href="data:,">
<style>{PAGE_STYLE}</style>
</head>
<body>
<svg hidden>
<path id="i-delayed" d="M8 2a6 6 0 1 0 .01 0zM8 5v3l2 2"/>
<path id="i-queued" d="M3 4h10M3 8h10M3 12h10"/>
<path id="i-running" d="M5 3v10l8-5z"/>
<path id="i-success" d="m3 8.5 3.5 3.5L13 4.5"/>
<path id="i-error" d="m4 4 8 8m0-8-8 8"/>
<path id="i-timeout" d="M4 2h8M4 14h8M5 2c0 6 6 6 6 12M11 2c0 6-6 6-6 12"/>
<path id="i-cancelled" d="M8 2a6 6 0 1 0 .01 0zM4 12l8-8"/>
<path id="i-paused" d="M5 3v10m6-10v10"/>
</svg>
<header>
<h1>faasd-async</h1>
<nav id="views" aria-label="Views">
<a href="#calls">Calls</a>
<a href="#queues">Queues</a>
<a href="#schedules">Schedules</a>
<a href="#host">Host <small id="problems"></small></a>
</nav>
<span id="live" role="status"></span>
<button data-do="help" aria-label="Keys">?</button>
</header>
<noscript>
<p>This page needs JavaScript. Without it: <code>faasd-async calls list</code></p>
</noscript>
<p id="notice" role="status" hidden></p>
<main id="view" tabindex="-1"></main>
<dialog id="dialog" aria-labelledby="question"></dialog>
<script type="module">{PAGE_SCRIPT}</script>
</body>
</html>
"""


def content_hash(text: str) -> str:
    """The hash by which a Content-Security-Policy allows an inline script or style (CSP 3)."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


# Only the page's own script and style, and requests to this daemon only. Nothing that a function, a
# caller or a receiver has said can become markup: that takes a trusted type, and there is none.
PAGE_POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src {content_hash(PAGE_SCRIPT)}",
        f"style-src {content_hash(PAGE_STYLE)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)


class PageRoutes:
    """The operator's page."""

    def __init__(self) -> None:
        self._body = PAGE.encode()
        self._headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": PAGE_POLICY,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",  # for browsers that don't know frame-ancestors
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "private, no-cache",  # kept, and asked for again by its tag
            "ETag": f'"{hashlib.sha256(self._body).hexdigest()[:32]}"',
            "Vary": "Accept-Encoding",
        }

    @functools.cached_property
    def _packed(self) -> bytes:
        """The page as most browsers take it. It costs 1.5 ms, which no start needs."""
        return gzip.compress(self._body, mtime=0)

    async def home(self, request: Request) -> Response:
        """GET /: people who type the address want the page."""
        return respond(302, {"Location": "/ui/"})

    async def show(self, request: Request) -> Response:
        """The page, or that the browser has it already."""
        if self._headers["ETag"] in request.headers.get("If-None-Match", ""):
            return respond(304, self._headers)
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            packed = {**self._headers, "Content-Encoding": "gzip"}
            return respond(200, packed, self._packed)
        return respond(200, self._headers, self._body)


# --- Schedule steps -------------------------------------------------------------------------------
# Fires what is due. All that has to outlive a crash is in the store: a state is read before each
# step, and written with what follows from it, if nobody else has written it meanwhile.

UNSURE_CHECK_S = 1.0  # between looks at a clock that can't be trusted yet
SETTLED_AT_ONCE = 16  # schedules; then others get their turn
PROVIDED_S = 60.0  # between looks at the annotations of the provider's functions
PROVIDED_LEAST_S = 1.0  # the least between two, however often something changes through us
TIME_ERROR = 5  # adjtimex(2)
TIMESYNC = Path("/run/systemd/timesync/synchronized")  # systemd-timesyncd.service(8)
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # random(4)


def clock_synchronised() -> bool | None:
    """Whether somebody vouches for the wall clock: systemd-timesyncd, or the kernel. None: unknown.

    systemd's sandbox (ProtectClock) forbids to ask the kernel.
    """
    if TIMESYNC.exists():
        return True
    with contextlib.suppress(OSError, AttributeError):
        # A struct timex of zeros changes nothing. Its size differs between systems, and no field of
        # it is read.
        state = int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024)))
        return state < TIME_ERROR if state >= 0 else None
    return None


def boot_id() -> str:
    """A name of this run of the machine, from one start to the next; "": there is none."""
    with contextlib.suppress(OSError):
        return BOOT_ID.read_text().strip()
    # systemd's sandbox (ProcSubset) hides that file. What is in /run is gone after the next start.
    folder = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    with contextlib.suppress(OSError):
        path = Path(folder, "boot-id")
        if folder and not path.exists():
            path.write_text(new_id())
        return path.read_text() if folder else ""
    return ""


SCHEDULES_WAIT_AGAIN_S = 600.0  # between two lines that say the same of why schedules wait


class ScheduleNews:
    """Tells the scheduler of reloads, of the provider's functions, and of calls that have ended."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()  # set: something below has changed
        self.version = 1  # of all schedules together: some may have come, changed or gone since
        self.provided: Mapping[str, Schedule] = {}  # by annotations of the provider's functions
        self.ended: set[str] = set()  # schedules of which calls have ended, until that is noted
        self._calls: dict[str, str] = {}  # schedules by the ids of their calls
        self._ids: dict[str, set[str]] = {}  # ids of calls by schedule

    def replan(self) -> None:
        """Have all schedules planned anew."""
        self.version += 1
        self.changed.set()

    def provide(self, schedules: Mapping[str, Schedule]) -> None:
        """Take over the schedules that the provider's functions ask for."""
        if schedules != self.provided:
            self.provided = schedules
            self.replan()

    def expect(self, state: ScheduleState) -> None:
        """Listen for the ends of a schedule's calls, of ended ones too: they may be run again."""
        ids = {run.id for run in state.runs if run.id}
        for gone in self._ids.get(state.name, set()) - ids:
            del self._calls[gone]
        self._ids[state.name] = ids
        self._calls.update(dict.fromkeys(ids, state.name))

    def tell(self, ended: Ended) -> None:
        """Take note that a call has ended, if it is a schedule's."""
        if name := self._calls.get(ended.id):
            self.ended.add(name)
            self.changed.set()


class ScheduleSteps:
    """What follows for a schedule now: its next state, and the calls that go with it."""

    def __init__(self, records: CallRecords, intake: Intake, directory: FunctionDirectory) -> None:
        self._records = records
        self._intake = intake
        self._directory = directory
        self._host = socket.gethostname()
        self._boot = boot_id()

    def begin(self, schedule: Schedule, state: ScheduleState) -> ScheduleState:
        """The state of a schedule that is new, or has changed: instants are counted from now on."""
        return self._from_now(state._replace(definition=schedule.definition))

    def rest(self, state: ScheduleState) -> ScheduleState:
        """The state of a schedule that is paused."""
        return state._replace(paused=True)

    def resume(self, state: ScheduleState) -> ScheduleState:
        """The state of a schedule that is resumed: instants are counted from now on."""
        return self._from_now(state._replace(paused=False)) if state.paused else state

    def _from_now(self, state: ScheduleState) -> ScheduleState:
        now = time.time()
        return state._replace(begun_at=now, last_at=now, boots=self._boots(state))

    def _boots(self, state: ScheduleState) -> Sequence[str]:
        return (self._boot, *state.boots)[:KEPT_BOOTS]

    def next_at(self, schedule: Schedule, state: ScheduleState) -> float:
        """When a schedule is to be looked at next. Infinity: never."""
        if not schedule.enabled:
            return float("inf")
        after = time.time()  # Look at a paused one, too: another daemon may resume it.
        if not state.paused:
            if self._has_booted(schedule, state):
                return 0.0
            after = counted_from(state.last_at, after)
        return next(next_instants(schedule, after), float("inf")) + self._jitter_s(schedule)

    def _jitter_s(self, schedule: Schedule) -> float:
        return jitter_s(schedule, self._host)

    def _has_booted(self, schedule: Schedule, state: ScheduleState) -> bool:
        """Whether @reboot is due: once for each start of this machine since the schedule began."""
        if REBOOT not in (schedule.cron or ()) or self._boot in state.boots:
            return False
        if not self._boot:
            warn_once("schedules: nothing tells one start of this machine from another: no @reboot")
            return False
        return time.time() - uptime_s() > state.begun_at

    async def refreshed(self, state: ScheduleState, ended_too: bool = False) -> ScheduleState:
        """A state with what has become of its calls by now. Raises StoreError.

        `ended_too`: also of those that had ended, and may have been queued again by hand.
        """
        runs = [run for run in state.runs if run.id] if ended_too else unfinished(state)
        if not runs:
            return state
        return followed(state, await asyncio.gather(*map(self._look_up, runs)))

    async def _look_up(self, run: ScheduledRun) -> ScheduledRun:
        try:
            return run_of(await self._records.lookup(run.id or ""))
        except HttpError:  # There is no record any more.
            return run if run.status in FINAL else run._replace(status=PRUNED)

    async def find(self, schedule: Schedule) -> Function | HttpError:
        """A schedule's function, or why it can't be called. Waits for the provider."""
        try:
            function = await self._directory.find(schedule.function or "", stale=True)
        except HttpError as exc:
            return exc
        return function or HttpError(404, f"function {schedule.function} does not exist")

    async def settle(
        self, schedule: Schedule, found: Function | HttpError, stored: ScheduleState
    ) -> tuple[ScheduleState, Sequence[Invocation]]:
        """The next state and the calls that go with it; the same state if nothing is due.

        Raises StoreError, and NotNow if it has to wait.
        """
        now = time.time()
        last_at = counted_from(stored.last_at, now)
        due = settle(schedule, last_at, now - self._jitter_s(schedule))
        fire = {at: run_id(schedule.name, at) for at in due.fire}
        boots = stored.boots
        if self._has_booted(schedule, stored):
            boots = self._boots(stored)
            fire[now] = run_id(f"{schedule.name} {self._boot}", now - now % 3600)
        if stored.paused or not (fire or due.missed):
            return stored, ()
        state = await self.refreshed(stored, ended_too=True)
        runs, calls = await self._fire(schedule, found, state, fire)
        missed = len(due.missed) + sum(run.status == "missed" for run in runs)
        if due.missed:
            reason = f"{len(due.missed)} too late"
            runs.append(ScheduledRun(due.missed[-1], None, "missed", error=reason))
        state = followed(state, runs)._replace(
            last_at=max([last_at, *due.fire, *due.missed]),
            missed=stored.missed + missed,
            boots=boots,
        )
        return state, calls

    async def _fire(
        self,
        schedule: Schedule,
        found: Function | HttpError,
        state: ScheduleState,
        fire: Mapping[float, str],
    ) -> tuple[list[ScheduledRun], Sequence[Invocation]]:
        """Runs and calls of instants, for which `fire` has ids of their calls; see `overlap`."""
        running = unfinished(state)
        if running and schedule.overlap == "skip":
            reason = f"call {running[0].id} had not ended"
            return [ScheduledRun(at, None, "skipped", error=reason) for at in fire], ()
        try:
            calls = [self.call(schedule, found, at, own_id) for at, own_id in fire.items()]
        except NotNow:
            raise
        except HttpError as exc:  # There is no such function, or a header is not allowed.
            return [ScheduledRun(at, None, "missed", error=exc.text) for at in fire], ()
        if calls and schedule.overlap == "replace":
            await asyncio.gather(*map(self._cancel, running))
        return [ScheduledRun(at, own_id, "queued") for at, own_id in fire.items()], calls

    async def _cancel(self, run: ScheduledRun) -> None:
        with contextlib.suppress(HttpError):  # It has ended meanwhile.
            await self._records.cancel(run.id or "")

    def call(
        self, schedule: Schedule, found: Function | HttpError, at: float, own_id: str
    ) -> Invocation:
        """The call of an instant. Raises HttpError: 400, 404, 503."""
        if isinstance(found, HttpError):
            raise found
        headers = [(name.encode(), value.encode()) for name, value in schedule.headers.items()]
        headers.append((b"X-Schedule", schedule.name.encode()))
        headers.append((b"X-Scheduled-For", (rfc3339(at) or "").encode()))
        controls = replace(
            self._intake.controls(CIMultiDict(schedule.headers)),
            id=own_id,
            queue=schedule.queue,
            method=schedule.method,
            schedule=schedule.name,
            scheduled_for=at,
        )
        body = schedule.body_file or (schedule.body or "").encode()
        packed = call_headers(headers)
        return self._intake.invocation(found, schedule.path, packed, body, controls)


class ProvidedSchedules:
    """Keeps up with the annotations of the provider's functions, by asking now and then."""

    def __init__(
        self,
        settings: Settings,
        provider: Provider,
        directory: FunctionDirectory,
        news: ScheduleNews,
    ) -> None:
        self._settings = settings
        self._provider = provider
        self._directory = directory
        self._news = news

    async def run(self) -> None:
        """Go on until this is cancelled; end at once where there is no provider."""
        changed = self._directory.changed
        while self._provider.url is not None:
            changed.clear()
            try:
                self._news.provide(self._schedules(await self._provider.annotations()))
            except ProviderAway as exc:  # What was known goes on.
                log.debug("schedules of functions are not looked up: %s", exc)
            await asyncio.sleep(PROVIDED_LEAST_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROVIDED_S):
                    await changed.wait()

    def _schedules(self, found: Mapping[str, Mapping[str, str]]) -> Mapping[str, Schedule]:
        hidden = {function.key for function in self._settings().functions.values()}
        schedules = {}
        for key, annotated in found.items():
            schedule = annotated_schedule(key, annotated)
            if schedule and key not in hidden:
                schedules[key] = schedule
        return schedules


# --- Schedules ------------------------------------------------------------------------------------


async def in_batches(do: Callable[[T], Awaitable[object]], items: Iterable[T]) -> None:
    """Do it for SETTLED_AT_ONCE items at a time, which share commits; others run in between."""
    rest = list(items)
    while rest:
        await asyncio.gather(*map(do, rest[:SETTLED_AT_ONCE]))
        rest = rest[SETTLED_AT_ONCE:]
        await asyncio.sleep(0)


def clock_is_right() -> bool:
    """Whether the wall clock may be trusted; see `clock_doubt`."""
    synchronised = clock_synchronised()
    doubt = clock_doubt(synchronised, uptime_s())
    if doubt is None and synchronised is False:
        log.warning("schedules: the clock is not synchronised; its time is taken all the same")
    return doubt is None


class WatchedClock:
    """The wall clock: whether it may be trusted by now, and whether it was set back."""

    def __init__(self) -> None:
        self.trusted = False
        self._seen = 0.0  # what it showed last

    def has_changed(self) -> bool:
        """Whether it was set back since the last look, or may be trusted since then."""
        now = time.time()
        set_back = now < self._seen - 1.0
        self._seen = now
        if self.trusted or not clock_is_right():
            return set_back
        self.trusted = True
        return True


def log_runs(old: ScheduleState, new: ScheduleState) -> None:
    """Log the runs that a state has got."""
    known = {(run.scheduled_for, run.id) for run in old.runs}
    for run in new.runs:
        if (run.scheduled_for, run.id) not in known:
            log_with(
                logging.INFO if run.id else logging.WARNING,
                f"schedule {run.status}",
                schedule=new.name,
                scheduled_for=rfc3339(run.scheduled_for),
                call_id=run.id,
                error=run.error,
            )


class Plan(NamedTuple):
    """A schedule, its state as it was read last, and when it is to be looked at."""

    schedule: Schedule
    state: ScheduleState
    at: float  # infinity: not at all
    waits_for: str = ""  # why an instant that is due could not be settled


class Scheduler:
    """Settles the instants of all schedules, each at its time."""

    def __init__(
        self,
        settings: Settings,
        queue: Queue,
        intake: Intake,
        steps: ScheduleSteps,
        metrics: ScheduleMetrics,
        news: ScheduleNews,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._intake = intake
        self._steps = steps
        self._metrics = metrics
        self._news = news
        self._plans: dict[str, Plan] = {}
        self._settling: set[str] = set()  # schedules that are being settled now
        self._turns = asyncio.Semaphore(SETTLED_AT_ONCE)
        self._clock = WatchedClock()
        self._planned = 0  # the version of all schedules that is planned
        self._held_up = RecurringWarning("schedules wait: %s", SCHEDULES_WAIT_AGAIN_S)

    async def run(self) -> None:
        """Go on until this is cancelled. What is due is settled in tasks of this one."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._news.changed.clear()
                try:
                    wait_s = await self._look(group)
                except StoreError as exc:
                    self._held_up.log(str(exc))
                    wait_s = RETRY_STORE_S
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._news.changed.wait()

    async def _look(self, group: asyncio.TaskGroup) -> float | None:
        """Do what there is to do; how many seconds to wait then. None: until something changes."""
        schedules = self.schedules()
        self._plans = {name: plan for name, plan in self._plans.items() if name in schedules}
        await self._replan(schedules)
        if not schedules:
            return None
        await self._note_ends(schedules)
        if not self._clock.trusted:
            return UNSURE_CHECK_S
        now = time.time()
        idle = [plan for name, plan in self._plans.items() if name not in self._settling]
        for plan in idle:
            if plan.at <= now:
                self._settling.add(plan.schedule.name)
                group.create_task(self._settle(plan), name=f"schedule {plan.schedule.name}")
        wait_s = min((plan.at for plan in idle if plan.at > now), default=float("inf")) - now
        # Short enough to notice a clock that was set, and a machine that has slept.
        return min(max(0.0, wait_s), CLOCK_CHECK_S)

    def schedules(self) -> Mapping[str, Schedule]:
        """All schedules, by name."""
        return {**self._news.provided, **self._settings().schedules}

    async def _replan(self, schedules: Mapping[str, Schedule]) -> None:
        """Plan all schedules, if anything may have changed."""
        if schedules and self._clock.has_changed():
            self._news.replan()
        version = self._news.version
        if version == self._planned:
            return
        states = await self._queue.schedules.states()
        plans = [
            Plan(schedule, states.get(name, ScheduleState(name)), 0.0)
            for name, schedule in schedules.items()
        ]
        if not self._queue.SHARED:  # Other hosts may have them.
            provided = self._settings().provider.url is not None
            forget = functools.partial(self._intake.accept_scheduled, calls=())
            await in_batches(forget, gone(states.values(), schedules, provided))
        await in_batches(self._begin, plans)
        self._planned = version

    async def _begin(self, plan: Plan) -> None:
        schedule, state = plan.schedule, plan.state
        other = state.definition != schedule.definition
        if self._clock.trusted and other:
            state = await self._change(schedule, functools.partial(self._steps.begin, schedule))
        self._metrics.missed.labels(schedule.name)
        self._plan(schedule, state)

    def _plan(self, schedule: Schedule, state: ScheduleState) -> None:
        at = self._steps.next_at(schedule, state)
        self._plans[schedule.name] = Plan(schedule, state, at)
        self._news.expect(state)
        if state.last_success_at is not None:
            self._metrics.last_success.labels(schedule.name).set(state.last_success_at)

    async def _change(
        self,
        schedule: Schedule,
        change: Callable[[ScheduleState], ScheduleState],
        calls: Sequence[Invocation] = (),
    ) -> ScheduleState:
        """Store the state that `change` makes of the stored one, and plan with it."""
        revision = 0
        while not revision:
            state = change(await self._queue.schedules.state(schedule.name))
            revision = await self._intake.accept_scheduled(state, calls)
        state = state._replace(revision=revision)
        self._plan(schedule, state)
        return state

    async def _note_ends(self, schedules: Mapping[str, Schedule]) -> None:
        for name in self._news.ended & schedules.keys():
            self._news.ended.discard(name)  # First: another call may end meanwhile.
            try:
                await self._note(schedules[name])
            except StoreError:
                self._news.ended.add(name)
                raise

    async def _note(self, schedule: Schedule) -> None:
        """Store how calls have ended: it is kept for longer than their records."""
        while True:
            stored = await self._queue.schedules.state(schedule.name)
            state = await self._steps.refreshed(stored, ended_too=True)
            if state == stored or await self._intake.accept_scheduled(state, ()):
                break
        self._plan(schedule, state)

    async def _settle(self, plan: Plan) -> None:
        """Do what is due for a schedule, and plan its next look: soon again, if that failed."""
        schedule = plan.schedule
        found = await self._steps.find(schedule)
        try:
            async with self._turns:
                state = await self._advance(schedule, found)
        except (StoreError, HttpError) as exc:  # Its queue is full, or the provider away.
            if str(exc) != plan.waits_for:
                log_with(logging.WARNING, "schedule waits", schedule=schedule.name, error=exc)
            later = time.time() + RETRY_STORE_S
            self._plans[schedule.name] = plan._replace(at=later, waits_for=str(exc))
        else:
            self._plan(schedule, state)
        self._settling.discard(schedule.name)
        if self.schedules().get(schedule.name) is not schedule:  # It is another one meanwhile.
            self._news.replan()
        self._news.changed.set()

    async def _advance(self, schedule: Schedule, found: Function | HttpError) -> ScheduleState:
        """Store what follows for a schedule now. Raises StoreError, HttpError."""
        while True:
            stored = await self._queue.schedules.state(schedule.name)
            state, calls = await self._steps.settle(schedule, found, stored)
            if state is stored:  # Another daemon was first, or has paused it.
                return stored
            if revision := await self._intake.accept_scheduled(state, calls):
                log_runs(stored, state)
                self._metrics.missed.labels(schedule.name).inc(state.missed - stored.missed)
                return state._replace(revision=revision)

    # What people ask for.

    async def documents(self) -> Sequence[dict[str, Any]]:
        """All schedules, as the API shows them. Raises StoreError."""
        states = await self._queue.schedules.states()
        documents = []
        for name, schedule in sorted(self.schedules().items()):
            state = await self._steps.refreshed(states.get(name, ScheduleState(name)))
            after = max(time.time(), state.last_at)
            begun = state.definition == schedule.definition
            active = begun and schedule.enabled and not state.paused
            coming = itertools.islice(next_instants(schedule, after), SHOWN_NEXT * active)
            documents.append(schedule_document(schedule, state, list(coming)))
            await asyncio.sleep(0)
        return documents

    async def fire_now(self, name: str) -> str:
        """Run a schedule now, whatever its instants and `overlap`; the id of its call.

        Raises StoreError, HttpError.
        """
        schedule = self._find(name)
        call = self._steps.call(schedule, await self._steps.find(schedule), time.time(), new_id())
        run = ScheduledRun(call.scheduled_for or 0.0, call.id, "queued")
        await self._change(schedule, lambda state: followed(state, [run]), [call])
        return call.id

    async def pause(self, name: str, paused: bool) -> None:
        """Have a schedule rest, or go on from now. Survives a restart."""
        change = self._steps.rest if paused else self._steps.resume
        await self._change(self._find(name), change)
        self._news.changed.set()

    def _find(self, name: str) -> Schedule:
        schedules = self.schedules()
        if name not in schedules:
            known = ", ".join(sorted(schedules)) or "none"
            raise HttpError(404, f"no such schedule; there are {known}")
        return schedules[name]


@dataclass(frozen=True)
class ScheduleRoutes:
    """Schedules: how far they are, and what people ask of them."""

    scheduler: Scheduler

    async def list_schedules(self, request: Request) -> Response:
        """All of them, with the next instants and the last runs."""
        return reply({"schedules": await self.scheduler.documents()})

    async def change(self, request: Request) -> Response:
        """Run one now, pause it, or have it go on."""
        name, action = request.parts
        if action == "run":
            call_id = await self.scheduler.fire_now(name)
            log_with(logging.INFO, "schedule run by hand", schedule=name, call_id=call_id)
            answer = {"schedule": name, "call_id": call_id}
            return reply(answer, 202, found_headers(call_id))
        await self.scheduler.pause(name, action == "pause")
        log.info("schedule %s: %sd", name, action)
        return reply({"schedule": name, "paused": action == "pause"})


# --- Routes and sockets ---------------------------------------------------------------------------
# Which requests are answered by whom, and on which addresses.

OWN_RESOURCES = "calls|queues|stats|events|schedules|backup"  # of /system
REST = f"(?!/(?:{OWN_RESOURCES})\\b)…"  # others, which are OpenFaaS's
CORS_PATHS = ("/function/", "/async-function/")  # for pages of gateway.trusted_origins

OPEN = Access.OPEN
INVOKE = Access.INVOKE
VIEW = Access.VIEW
OPERATE = Access.OPERATE


@dataclass(frozen=True, kw_only=True)
class Handlers:
    """What requests are answered by: an object for each family of routes."""

    functions: FunctionRoutes
    fn: FnRoutes
    calls: CallRoutes
    logs: LogRoutes
    queues: QueueRoutes
    backup: BackupRoutes
    stats: StatsRoutes
    events: EventRoutes
    schedules: ScheduleRoutes
    health: HealthRoutes
    rest: RestRoutes
    page: PageRoutes


def route(
    method: str, path: str, access: Access, handler: Handler, store: Store | None = None
) -> Route:
    """A route. In its path {name} is one segment, {call} may have slashes, … is anything."""
    pattern = path.replace("…", ".*").replace("{name}", "([^/]+)").replace("{call}", "(.+)")
    cors = path.startswith(CORS_PATHS)
    return Route(method, re.compile(pattern), access, handler, cors, store)


def route_table(to: Handlers) -> Sequence[Route]:
    """All routes there are. The first that fits is taken."""
    return (
        route("POST", "/async-function/…", INVOKE, to.functions.queue, to.functions.store),
        route("DELETE", "/async-function/{call}", INVOKE, to.calls.cancel_call),
        route("*", "/async-function/…", INVOKE, to.functions.refuse),
        route("*", "/function/…", INVOKE, to.functions.call),
        route("*", "/r/{name}/…", INVOKE, to.fn.call),
        route("GET", "/healthz", OPEN, to.health.healthz),
        route("GET", "/readyz", OPEN, to.health.readyz),
        route("GET", "/system/calls", VIEW, to.calls.list_calls),
        route("POST", "/system/calls/retry", OPERATE, to.calls.retry_matching),
        route("POST", "/system/calls/cancel", OPERATE, to.calls.cancel_matching),
        route("GET", "/system/calls/{call}/log", VIEW, to.logs.show_log),
        route("GET", "/system/calls/{call}/result", VIEW, to.calls.show_result),
        route("GET", "/system/calls/{call}/request", VIEW, to.calls.show_request),
        route("POST", "/system/calls/{call}/retry", OPERATE, to.calls.retry_call),
        route("POST", "/system/calls/{call}/callback", OPERATE, to.calls.resend_callback),
        route("GET", "/system/calls/{call}", VIEW, to.calls.show_call),
        route("GET", "/system/queues", VIEW, to.queues.list_queues),
        route("POST", "/system/queues/{name}/(pause|resume|purge)", OPERATE, to.queues.change),
        route("GET", "/system/schedules", VIEW, to.schedules.list_schedules),
        route("POST", "/system/schedules/{name}/(run|pause|resume)", OPERATE, to.schedules.change),
        route("GET", "/system/backup", OPERATE, to.backup.send_copy),
        route("GET", "/system/stats", VIEW, to.stats.show_stats),
        route("GET", "/system/events", VIEW, to.events.show_events),
        route("GET", "/metrics", VIEW, to.queues.expose),
        route("GET", "/", OPEN, to.page.home),
        route("GET", "/ui", OPEN, to.page.home),
        route("GET", "/ui/", VIEW, to.page.show),
        route("GET", "/v1/apps/{name}/calls", VIEW, to.fn.list_calls),
        route("GET", "/v1/apps/{name}/calls/{name}", VIEW, to.fn.show_call),
        route("GET", "/v1/apps/{name}/calls/{name}/log", VIEW, to.fn.show_log),
        route("GET", f"/system{REST}", VIEW, to.rest.handle),
        route("*", f"/system{REST}", OPERATE, to.rest.handle),
    )


def passed_sockets() -> list[socket.socket]:
    """The sockets that systemd has passed on (sd_listen_fds(3))."""
    if os.getenv("LISTEN_PID") != str(os.getpid()):
        return []
    sockets = []
    for fd in range(3, 3 + int(os.getenv("LISTEN_FDS", "0"))):
        os.set_inheritable(fd, False)  # by commands
        sockets.append(socket.socket(fileno=fd))
    return sockets


def unlink_left_over(path: Path) -> None:
    """Remove the socket file of a process that was killed. OSError: somebody listens there."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # Many wait already to be accepted there.
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def bound_sockets(address: str, mode: int) -> Iterator[socket.socket]:
    """The sockets of one address of gateway.listen; files get this mode. Raises OSError."""
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        unlink_left_over(path)
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(path))
        path.chmod(mode)  # Nobody can connect yet.
        yield sock
        return
    host, _, port = address.rpartition(":")
    infos = socket.getaddrinfo(
        host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    for family, kind, protocol, _, name in dict.fromkeys(infos):
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError:  # a machine without IPv6
            continue
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(name)
        yield sock


def new_sockets(config: GatewayConfig) -> list[socket.socket]:
    """The sockets of gateway.listen. Raises ListenError; ConfigError if no restart would help."""
    sockets: list[socket.socket] = []
    for address in config.listen:
        try:
            sockets += bound_sockets(address, config.socket_mode)
        except OSError as exc:
            line = f"gateway.listen: {address}: {exc.strerror or exc}"
            if isinstance(exc, PermissionError):  # such as a port below 1024: it will not be right
                raise ConfigError([line]) from exc
            raise ListenError(line) from exc
    return sockets


def start_listening(server: Server, sock: socket.socket) -> None:
    """Accept connections on a socket. Raises ListenError: somebody else has come first after the
    bind.

    That may be ourselves, if one of the addresses includes another (as 0.0.0.0 does).
    """
    try:
        server.listen(sock)
    except OSError as exc:
        line = f"gateway.listen: {socket_url(sock)}: {exc.strerror or exc}"
        raise ListenError(line) from exc


def socket_files(sockets: Sequence[socket.socket]) -> Mapping[Path, int]:
    """The files of Unix sockets, with their inodes: another process may put its own there."""
    names = [sock.getsockname() for sock in sockets if sock.family == socket.AF_UNIX]
    return {path: path.stat().st_ino for path in map(Path, names)}


def unlink_files(files: Mapping[Path, int]) -> None:
    """Remove these files, unless others are in their place."""
    for path, inode in files.items():
        with contextlib.suppress(OSError):
            if path.stat().st_ino == inode:
                path.unlink()


def socket_url(sock: socket.socket) -> str:
    """Where a listening socket is reached: http://HOST:PORT or unix:/path."""
    name = sock.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http://{host}:{name[1]}"


# --- Daemon ---------------------------------------------------------------------------------------
# Puts the parts together, and owns their lifecycle.

Chore = Callable[[], Coroutine[Any, Any, None]]  # what goes on until the daemon stops
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
NEED_RESTART = ("gateway", "auth", "provider", "store", "nats")  # tables that no reload changes


def make_queue(config: Config, settings: Settings, metrics: Metrics) -> Queue:
    """The queue that store.backend names."""
    if config.store.backend == "nats":
        return NatsQueue(settings, metrics)
    return SqliteQueue(store_path(config), settings, metrics.observe_commit)


class ConfigWarnings:
    """What looks wrong in the configuration. A disk that hangs meanwhile holds nobody up."""

    def __init__(self) -> None:
        self._lines: Sequence[str] = ()

    def lines(self) -> Sequence[str]:
        """The warnings that were found last."""
        return self._lines

    def look(self, config: Config) -> None:
        """Look for warnings in a thread, which a disk that hangs may keep."""
        if not begin_thread("look", self._look, config):
            log.warning("the configuration was not looked over: there may be no more threads")

    def _look(self, config: Config) -> None:
        self._lines = (*config_warnings(config), *script_warnings(config))
        for line in self._lines:
            log.warning("%s", line)


class Reloader:
    """Reads the file again, each time that this is asked for. A disk that hangs meanwhile holds
    nobody up.
    """

    def __init__(self, path: str | None, take_over: Tell[Config]) -> None:
        self._path = path
        self._take_over = take_over
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Have it read once more: SIGHUP."""
        self._asked.set()

    async def run(self) -> None:
        """Do as asked, until the daemon stops."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            with sd_reload():
                await self._reload()

    async def _read(self) -> Config:
        with contextlib.suppress(Shortage):
            return await in_thread("reload", read_again, self._path)
        return read_again(self._path)  # There may be no more threads: then everybody waits.

    async def _reload(self) -> None:
        try:
            new = await self._read()
        except ConfigError as exc:
            for line in (*exc.problems, "configuration not reloaded: the old settings stay"):
                log.error("%s", line)
        except Exception:
            log.exception("configuration not reloaded: the old settings stay")
        else:
            self._take_over(new)


def own_client(address: str) -> tuple[HttpClient, yarl.URL]:
    """A client of this daemon itself, which listens there, and the URL for it.

    To connect to 0.0.0.0 or [::] reaches ourselves.
    """
    if address.startswith("unix:"):
        return HttpClient(unix_path=address.removeprefix("unix:")), yarl.URL("http://localhost")
    return HttpClient(), yarl.URL(address)


# One line tells of a cancellation, however many calls it was for.
END_LEVELS = {"success": logging.INFO, "cancelled": logging.DEBUG}


def log_ended(ended: Ended) -> None:
    """Log a call that has reached its end."""
    level = END_LEVELS.get(ended.status, logging.WARNING)
    if not log.isEnabledFor(level):
        return
    fields = ended._asdict()
    fields["duration"] = fields.pop("duration_s")
    for name in ("elsewhere", "queue", "lane"):
        del fields[name]
    if fields["id"] == fields["call_id"]:
        del fields["id"]
    log_with(level, "call ended", **fields)


def reloaded(old: Config, new: Config) -> Config:
    """The new settings, but the old ones of tables that need a restart: that is logged."""
    kept = {name: getattr(old, name) for name in NEED_RESTART}
    for name, value in kept.items():
        if getattr(new, name) != value:
            log.warning("[%s] has changed: that needs a restart", name)
    for name in sorted(old.queues.keys() - new.queues.keys()):
        log.warning("queue %s is gone: what still waits in it runs with the defaults", name)
    return replace(new, **kept)


def handle_signals(terminate: Callable[[], None], reload: Callable[[], None]) -> None:
    """Have signals handled in the event loop. SIGHUP waits until the start has ended."""
    loop = asyncio.get_running_loop()
    acts = {**dict.fromkeys(STOP_SIGNALS, terminate), signal.SIGHUP: reload}

    def handle(number: int, frame: object) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(acts[signal.Signals(number)])

    for number in acts:  # The loop's own handlers end with it: a signal would kill then.
        signal.signal(number, handle)


def end_start() -> None:
    """Tell systemd that the start has ended, and take reloads: one may have been asked for."""
    sd_notify("READY=1\nSTATUS=accepting calls")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def hold_signals() -> None:
    """Have no signal kill the process, which ends by itself now: Python takes its handlers away."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, signal.SIGHUP))


def give_back_memory() -> None:
    """Give free memory back to the system, which glibc would keep.

    To compile this file leaves 20 MiB, and so does a burst of large calls.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # musl has none
        trim(0)


async def keep_house(records: CallRecords) -> None:
    """Prune what is past its time and give memory back, until the daemon stops."""
    while True:
        with contextlib.suppress(StoreError):  # The queue keeps the reason for /readyz.
            while await records.prune():
                pass
        begin_thread("memory", give_back_memory)  # Where there is much, it takes milliseconds.
        await asyncio.sleep(HOUSEKEEPING_S)


class Daemon:
    """The composition root. Made inside a running event loop; `run()` returns the exit code."""

    def __init__(self, config: Config, path: str | None) -> None:
        self.config = config
        self._path = path
        self._warnings = ConfigWarnings()
        self._warnings.look(config)
        self._exit_code = 0
        self._reloader = Reloader(path, self._take_over)
        self._stop = asyncio.Event()  # first signal, or a task that failed
        self._hurry = asyncio.Event()  # second signal, or drain_timeout
        self._metrics = Metrics()
        self._waiters = CallWaiters()
        self._schedule_news = ScheduleNews()
        self._queue = make_queue(config, self.settings, self._metrics)
        self._consumers = Consumers(self.settings, self._queue, self._ended)
        self._hub = EventHub(self._queue)
        self._limits = FunctionLimits(self.settings, self._consumers.wake_all)
        resolver = CheckedResolver(self._callback_allowed)
        self._callback_http = HttpClient(resolver=resolver, environment=os.environ)

    def settings(self) -> Config:
        """The configuration as it stands now."""
        return self.config

    async def run(self) -> int:
        """Start everything, serve until a signal, stop in order."""
        handle_signals(self._terminate, self._reloader.ask)
        introduced = introduction(self.config, self._path)
        async with contextlib.AsyncExitStack() as stack:
            await self._queue.open(self._consumers.wake, self._consumers.cancel, self._final)
            stack.push_async_callback(self._queue.close)
            await end_abandoned(self.config)
            sockets = passed_sockets()
            if not sockets:
                sockets = new_sockets(self.config.gateway)
                stack.callback(unlink_files, socket_files(sockets))
            for level, line in introduced:  # Only now: if the start fails, one line says why.
                log.log(level, "%s", line)
            front, jobs, chores = self._compose(stack, [socket_url(sock) for sock in sockets])
            timeouts = (self.config.gateway.read_timeout, self.config.gateway.write_timeout)
            server = Server(front, *timeouts)
            stack.push_async_callback(server.close)
            names = {*self.config.queues, *await self._queue.stats(), CALLBACKS}
            for sock in sockets:  # No await from here on: a program would have SIGHUP blocked.
                start_listening(server, sock)
                log.info("listening on %s", socket_url(sock))
            self._consumers.start(jobs, names)
            side = self._start_side_jobs(chores)
            end_start()
            await self._stop.wait()
            await self._drain(server)
            for task in side:
                task.cancel()
            await asyncio.gather(*side, return_exceptions=True)
        log.info("stopped")
        return self._exit_code

    def _compose(
        self, stack: contextlib.AsyncExitStack, urls: Sequence[str]
    ) -> tuple[Front, Mapping[str, Job], Sequence[Chore]]:
        """Make the parts, on the addresses where this daemon is reached itself."""
        settings = self.settings
        http = HttpClient(environment=os.environ)
        provided_http = HttpClient(tls=self.config.provider.tls)
        own_http, own_url = own_client(min(urls))  # http before unix
        for client in (http, provided_http, self._callback_http, own_http):
            stack.push_async_callback(client.close)

        provider = Provider(settings, provided_http)
        directory = FunctionDirectory(settings, provider, self._limits)
        commands = CommandRunner(daemon_name(self.config))
        commands.watch_orphans()
        caller = FunctionCaller(http, provided_http, commands, directory)
        refusals = Refusals()
        intake = Intake(settings, self._queue, self._metrics, refusals)
        metrics = self._metrics
        steps = ScheduleSteps(self._queue, intake, directory)
        news = self._schedule_news
        watched = ScheduleMetrics(metrics.registry)
        scheduler = Scheduler(settings, self._queue, intake, steps, watched, news)
        chores = (scheduler.run, ProvidedSchedules(settings, provider, directory, news).run)
        sender = CallbackJob(settings, self._callback_http, own_http, own_url, metrics)
        outputs = LiveOutputs(self._waiters)
        shared = self._queue.SHARED
        invoker = InvocationJob(settings, directory, self._limits, caller, outputs, metrics, shared)
        functions = FunctionRoutes(settings, directory, self._limits, caller, intake, metrics)
        inflight = self._consumers.inflight
        queues = QueueRoutes(settings, self._queue, directory, metrics, inflight)
        reasons = WaitReasons(settings, self._queue, self._limits, inflight)
        handlers = Handlers(
            functions=functions,
            fn=FnRoutes(functions, self._queue),
            calls=CallRoutes(settings, self._queue, self._waiters, reasons),
            logs=LogRoutes(settings, self._queue, self._waiters, outputs, shared),
            queues=queues,
            backup=BackupRoutes(self._queue),
            stats=StatsRoutes(queues, self._queue, self._limits, self._warnings.lines),
            events=EventRoutes(settings, self._hub),
            schedules=ScheduleRoutes(scheduler),
            health=HealthRoutes(self._queue, self._waiters),
            rest=RestRoutes(settings, provider, directory, metrics),
            page=PageRoutes(),
        )
        front = Front(settings, route_table(handlers), refusals)
        return front, {CALLBACKS: sender, "": invoker}, chores

    def _callback_allowed(self, host: str, address: str) -> bool:
        return callback_allowed(host, address, self.config.callback)

    # What the queue tells, and signals.

    def _final(self, ended: Ended) -> None:
        self._waiters.tell(ended)
        self._schedule_news.tell(ended)
        self._metrics.activity.count_end(ended)
        if ended.elsewhere:
            return
        self._metrics.calls.count(ended.status)
        log_ended(ended)

    # Side jobs: one that fails stops the daemon, as a dispatcher does.

    def _start_side_jobs(self, chores: Sequence[Chore]) -> Sequence[asyncio.Task[None]]:
        chores = (self._watchdog, self._reloader.run, *chores)
        side = [asyncio.create_task(chore(), name=chore.__qualname__) for chore in chores]
        side.append(asyncio.create_task(keep_house(self._queue), name="housekeeping"))
        for task in side:
            task.add_done_callback(self._ended)
        return side

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Stop if a task has failed that the daemon can't do without."""
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            log.critical("%s failed, stopping", task.get_name(), exc_info=failure)
            self._exit_code = 1
            self._stop.set()

    async def _watchdog(self) -> None:
        """Tell systemd that we are alive, each time that event loop and writer have both answered.

        But not if only a restart can help.
        """
        while limit_s := watchdog_limit():
            with contextlib.suppress(StoreError):  # It answered.
                stats = await self._queue.stats()
                waiting = sum(queue.depth for queue in stats.values())
                running = sum(self._consumers.inflight().values())
                sd_notify(f"STATUS={waiting} calls and callbacks waiting, {running} running")
            if self._queue.stalled() is None:
                sd_notify("WATCHDOG=1")
            await asyncio.sleep(limit_s / 2)

    def _terminate(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _take_over(self, new: Config) -> None:
        """Take over all of a configuration but what needs a restart."""
        if self._stop.is_set():
            log.warning("stopping: configuration not reloaded")
            return
        setup_logging(new.log)
        self.config = reloaded(self.config, new)
        self._warnings.look(self.config)
        for name in new.queues:
            self._consumers.wake(name)
        self._limits.end_rests()
        self._schedule_news.replan()
        self._callback_http.hang_up()
        log.info("configuration reloaded")

    async def _drain(self, server: Server) -> None:
        """Stop listening and claiming, let what runs end in time, queue the rest again."""
        drain_s = self.config.gateway.drain_timeout
        sd_notify("STOPPING=1\nSTATUS=waiting for running functions")
        log.info("stopping: waiting up to %.0f s for running functions", drain_s)
        self._waiters.close()
        self._hub.close()
        asyncio.get_running_loop().call_later(drain_s, self._hurry.set)
        hurried = asyncio.create_task(self._hurry.wait(), name="hurry")
        self._consumers.halt()  # first, or one more call may begin
        server.stop_listening()
        stuck = asyncio.create_task(server.give_up_bodies(), name="bodies that do not come")
        await self._consumers.stop(hurried)
        answered = asyncio.create_task(server.drain(), name="last answers")
        await asyncio.wait({answered, hurried}, return_when=asyncio.FIRST_COMPLETED)
        for task in (answered, hurried, stuck):
            task.cancel()
        await asyncio.gather(answered, hurried, stuck, return_exceptions=True)


def introduction(config: Config, path: str | None) -> Sequence[tuple[int, str]]:
    """The first lines of the log, with their levels: what runs, on what, and what it promises.

    To be called before the store is opened: it says whether there was one.
    """
    source = f"configuration {path}" if path else "no configuration file"
    lines = [
        f"faasd-async {VERSION} on Python {platform.python_version()}",
        f"{source}: {config_counts(config)}",
        store_line(config),
    ]
    leveled = [(logging.INFO, line) for line in lines]
    if not config.functions and not config.provider.url:
        leveled.append((logging.WARNING, f"there is no function: {next_step(path)}"))
    ignored = "is ignored: it is no URL of a proxy for HTTP"
    leveled += [(logging.WARNING, f"{name} {ignored}") for name in odd_proxies(os.environ)]
    return leveled


def store_line(config: Config) -> str:
    """Where calls are kept, and what that promises."""
    if config.store.backend != "sqlite":
        servers = show_urls(config.nats.servers)
        return f"store {servers}: the stream {config.nats.stream}"
    store = store_path(config)
    state = "a new one"
    if store.exists():
        state = brief_size(store_figures(store).used_bytes)
    return f"store {store}: {state}; {DURABLE}"


def next_step(path: str | None) -> str:
    """What to do if there is no function yet."""
    if path:
        return f"add a table [functions.NAME] to {path}, or [provider]"
    places = f"~/.config/{CONFIG_FILE} or /etc/{CONFIG_FILE}"
    return f"name a file with --config, or write {places}, with a table [functions.NAME]"


async def run_daemon(config: Config, path: str | None) -> int:
    """Serve until a signal; the exit code. Raises ConfigError, StoreError."""
    code = await Daemon(config, path).run()
    hold_signals()
    return code


# --- Client ---------------------------------------------------------------------------------------
# `serve` and `check` work here; the rest is a thin HTTP client of a running daemon, which stays the
# only authority.

Arguments = argparse.Namespace
HeaderPairs = Sequence[tuple[str, str]]

CONNECT_S = 10.0  # in which a daemon takes a connection; its answer may take longer
ID_PREFIX = re.compile(r"[0-9a-f]{6}[0-9a-f-]{0,29}")  # how the id of a call may begin
PREFIX_SLACK_S = 2.0  # between the time in an id and that of its record


def canonical_url(address: str) -> str:
    """Where a client finds the daemon, in whatever form people write it. Raises HttpError."""
    parts = split_url(address)
    if parts and parts.scheme in ("http://", "https://"):
        return "".join(parts._replace(rest=""))  # of a page's address, as a browser shows it
    if re.fullmatch(r"[\w.-]+", address) and not address.isdigit():  # a host
        address += ":8080"
    try:
        address = canonical_address(address)
    except ValueError:
        forms = "HOST:PORT, http://HOST or unix:/path"
        raise HttpError(0, f"{show_url(address)}: expected {forms}") from None
    if address.startswith("unix:"):
        return address
    if address.startswith(":"):  # every address of this machine
        address = f"127.0.0.1{address}"
    return f"http://{address}"


def find_daemon(args: Arguments) -> tuple[str, str | None]:
    """The daemon's URL from flags, variables or the file, and the Authorization header for it."""
    address = args.url or os.environ.get("FAASD_ASYNC_URL")
    # A named daemon gets no credentials of another one. Only what a client needs is read from the
    # file: it may not be allowed to read the daemon's other secrets.
    path = args.config or (None if address else default_config())
    flags = {"user_file": args.user_file, "password_file": args.password_file}
    if any(flags.values()):
        config = load_config(path, ("gateway",))
        auth = parse_config({"auth": flags}).auth
    else:
        config = load_config(path, ("gateway", "auth"))
        auth = config.auth
    url = canonical_url(address or config.gateway.listen[0])
    parts = split_url(url)
    if parts is None:  # a Unix socket
        return url, auth.login
    user, _, password = unquote(parts.login.removesuffix("@")).partition(":")
    login = basic_auth(user.encode(), password.encode()) or auth.login
    return "".join(parts._replace(login="")), login


def quoted(word: str, safe: str = "") -> str:
    """A word of the command line as a part of a path: any bytes, as they were typed."""
    return quote(os.fsencode(word), safe)


def query_of(fields: Mapping[str, str]) -> str:
    """Words of the command line as a query."""
    return urlencode({name: os.fsencode(word) for name, word in fields.items()})


class Client:
    """Asks the daemon.

    Each question may raise HttpError: for what the daemon refuses; and with status 0 if there is no
    daemon, or none that answers within --timeout.
    """

    def __init__(self, args: Arguments) -> None:
        self._url, login = find_daemon(args)
        late_at = time.monotonic() + args.timeout if args.timeout else None
        self._deadline: float | None = late_at
        self._headers = {"User-Agent": USER_AGENT}
        if login:
            self._headers["Authorization"] = login

    def ask(self, request: str, body: bytes = b"", headers: HeaderPairs = ()) -> bytes:
        """The body that answers "METHOD PATH"."""
        return b"".join(self.stream(request, body, headers))

    def document(self, request: str, *members: str, headers: HeaderPairs = ()) -> dict[str, Any]:
        """The JSON document that answers "METHOD PATH", and has these members."""
        return self.parsed(self.ask(request, headers=headers), *members)

    def parsed(self, answer: bytes, *members: str) -> dict[str, Any]:
        """An answer as the JSON document that it has to be."""
        try:
            document = dict(table(parse_json(answer)))
            require(document.keys() >= set(members))
        except ValueError:  # such as the page of another program
            raise HttpError(0, f"what answers at {self._url} is no faasd-async") from None
        return document

    def stream(self, request: str, body: bytes = b"", headers: HeaderPairs = ()) -> Iterator[bytes]:
        """The body that answers "METHOD PATH", in pieces as they come."""
        refusal = b""
        try:
            with contextlib.closing(self._connect()) as connection:
                response = self._send(connection, request, body, headers)
                while piece := self._read(connection, response):
                    if response.status < 300:
                        yield piece
                    else:
                        refusal += piece
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise HttpError(0, self._failure(exc)) from None
        if response.status >= 300:
            reason = refusal.decode(errors="replace").strip()
            raise HttpError(response.status, reason or f"{response.status} {response.reason}")

    def _connect(self) -> http.client.HTTPConnection:
        server = self._url.partition("://")[2]
        timeout_s = min(CONNECT_S, self._left_s() or CONNECT_S)
        if self._url.startswith("https:"):
            return http.client.HTTPSConnection(server, timeout=timeout_s)
        connection = http.client.HTTPConnection(server or "localhost", timeout=timeout_s)
        if self._url.startswith("unix:"):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(timeout_s)
            connection.sock.connect(self._url.removeprefix("unix:"))
        else:
            connection.connect()
        return connection

    def _send(
        self,
        connection: http.client.HTTPConnection,
        request: str,
        body: bytes,
        headers: HeaderPairs,
    ) -> http.client.HTTPResponse:
        method, _, path = request.partition(" ")
        connection.sock.settimeout(self._left_s())
        named = {name.lower() for name, _ in headers}
        connection.putrequest(method, path, "host" in named, skip_accept_encoding=True)
        ours = [pair for pair in self._headers.items() if pair[0].lower() not in named]
        if method != "GET":
            ours.append(("Content-Length", str(len(body))))
        for name, value in (*ours, *headers):
            connection.putheader(name, os.fsencode(value))
        connection.endheaders(body or None)
        return connection.getresponse()

    def _read(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> bytes:
        if connection.sock is not None:  # else the response has it, and the connection ends with it
            connection.sock.settimeout(self._left_s())
        piece = response.read1(PIPE_BYTES)
        if not piece and response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return piece

    def _left_s(self) -> float | None:
        """What is left of --timeout; None: there is none. Raises TimeoutError."""
        if self._deadline is None:
            return None
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s

    @property
    def late(self) -> bool:
        """Whether --timeout is over."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _failure(self, exc: Exception) -> str:
        reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
        if isinstance(exc, TimeoutError):
            reason = "no answer within --timeout" if self.late else "it takes no connection"
        elif isinstance(exc, http.client.IncompleteRead):
            reason = "its answer broke off"
        return f"the daemon at {self._url} can't be reached: {reason}"

    # What several commands ask for.

    def record(self, call_id: str, wait: bool = False) -> dict[str, Any]:
        """A call's record; with `wait`, once it is final."""
        request = f"GET {call_path(call_id)}"
        if wait:
            request += "?wait=60s"
        while True:
            try:
                record = self.document(request, "id", "status")
            except HttpError:
                if wait and self.late:
                    raise HttpError(503, "the call has not ended within --timeout") from None
                raise
            if record["status"] in FINAL or not wait:
                return record

    def records(
        self, filters: Mapping[str, str], limit: int
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Up to `limit` records that match, newest first, and a cursor if there are more."""
        records: list[dict[str, Any]] = []
        cursor: str | None = ""
        while len(records) < limit and cursor is not None:
            query = {**filters, "limit": str(min(MAX_PAGE, limit - len(records)))}
            if cursor:
                query["cursor"] = cursor
            page = self.document(f"GET /system/calls?{query_of(query)}", "calls", "next_cursor")
            records += page["calls"]
            cursor = page["next_cursor"]
        return records, cursor

    def full_id(self, prefix: str) -> str:
        """The id that begins like this. What can't be the beginning of one is taken as it is.

        An id begins with its time, so only calls of that time have to be looked at. Raises
        UsageError for an empty one, which a variable that is not set leaves behind.
        """
        if not prefix:
            raise UsageError("the call id is empty")
        if not ID_PREFIX.fullmatch(prefix):
            return prefix
        try:
            self.record(prefix)  # somebody's own call id
        except HttpError as exc:
            if exc.status != 404:
                raise
        else:
            return prefix
        digits = prefix.replace("-", "")[:12]
        since = int(digits.ljust(12, "0"), 16) / 1000 - PREFIX_SLACK_S
        until = int(digits.ljust(12, "f"), 16) / 1000 + PREFIX_SLACK_S
        found, _ = self.records({"since": f"{since:.3f}", "until": f"{until:.3f}"}, 10_000)
        ids = [call["id"] for call in found if call["id"].startswith(prefix)]
        if not ids:
            raise HttpError(404, f"no call {prefix}, and none whose id begins like that")
        if len(ids) > 1:
            some = ", ".join(ids[:3]) + (", …" if len(ids) > 3 else "")
            raise HttpError(409, f"{prefix}: {len(ids)} calls begin like that: {some}")
        return str(ids[0])

    def function_names(self) -> list[str]:
        """The names of functions; none if the daemon does not tell."""
        with contextlib.suppress(HttpError, ValueError):
            answer = self.ask("GET /system/functions")
            return [item["name"] for item in function_list(parse_json(answer))]
        return []


CONTROLS = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f]")  # but for tabs and line ends


def caret(control: str) -> str:
    """A control character as `cat -v` and `less` show it: ^[ is escape."""
    code = ord(control)
    return f"<U+{code:04X}>" if code > 127 else f"^{chr(code ^ 64)}"


def harmless(content: bytes | str) -> str:
    """What a terminal can show, without what it would obey: functions write what they like."""
    shown = content if isinstance(content, str) else content.decode(errors="replace")
    return CONTROLS.sub(lambda found: caret(found[0]), shown.replace("\r\n", "\n"))


def write(content: bytes | str, stream: TextIO | None = None) -> None:
    """Write to standard output, or a stream, as it is; to a terminal what is harmless."""
    stream = stream or sys.stdout
    if stream.isatty():
        content = harmless(content)
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    stream.buffer.write(content)
    stream.buffer.flush()


def complain(line: object) -> None:
    """Write a line to standard error."""
    write(f"{line}\n", sys.stderr)


def write_pieces(pieces: Iterable[bytes]) -> None:
    """Write to standard output what comes in pieces, which may end within a character."""
    shown: Iterable[bytes | str] = pieces
    if sys.stdout.isatty():
        shown = codecs.iterdecode(pieces, "utf-8", "replace")
    for piece in shown:
        write(piece)


def write_json(document: object) -> None:
    """Write a JSON document, indented."""
    write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_row(row: str, *cells: object) -> None:
    """Write a line of a table, cut to the terminal's width; to 80 columns if there is none."""
    width = shutil.get_terminal_size().columns
    line = row.format(*cells).rstrip()
    write((line if len(line) <= width else line[: width - 1] + "…") + "\n")


def clock(at: str | None) -> str:
    """A record's time by this machine's clock."""
    if at is None:
        return "-"
    return datetime.fromtimestamp(parse_when(at)).strftime("%Y-%m-%d %H:%M:%S")


def ago(at: str | None) -> float:
    """How many seconds ago a record's time was; negative: it is still to come."""
    return time.time() - parse_when(at) if at else 0.0


def close_names(name: str, names: Iterable[str]) -> str:
    """A hint at close names, or at all, to end a line that says that a name is unknown."""
    known = sorted(set(names))
    if close := difflib.get_close_matches(name, known, 3):
        return f" (did you mean {' or '.join(close)}?)"
    shown = known if len(known) <= 10 else [*known[:10], "…"]
    return f" (there are {', '.join(shown)})" if known else ""


# --- Client commands ------------------------------------------------------------------------------
# Calls: to make them, to find out what became of them, and to have that change.

# For 80 columns or more; --long and --json show everything whole.
CALL_ROW = "{:18.18}  {:9.9}  {:12.12}  {:>3}  {:>4}  {:>4}  {}"
LONG_ROW = "{:36}  {:9}  {:16}  {:12}  {:>5}  {:19}  {:19}  {:>5}  {}\n"
SHOWN_LINES = 20  # of a call's output, with its record

CANCEL_ONE = "DELETE /async-function/{}"
RETRY_ONE = "POST /system/calls/{}/retry"
# The route that does it by filter, and how to say that it is done.
CHANGES = {CANCEL_ONE: ("cancel", "cancelled"), RETRY_ONE: ("retry", "queued again")}
FILTER_OPTIONS = tuple(name for name in FILTERS if name != "call_id")


def filters_of(args: Arguments) -> dict[str, str]:
    """The filters on the command line, as query parameters."""
    filters: dict[str, str] = {}
    for name in FILTER_OPTIONS:
        value = getattr(args, name)
        if isinstance(value, float):
            filters[name] = f"{value:.6f}"
        elif isinstance(value, list):  # one for each time that the option is there
            filters[name] = ",".join(word for words in value for word in words)
        elif value:
            filters[name] = value
    return filters


def remark(call: Mapping[str, Any]) -> str:
    """What there is to say of a call beside its state: its error, its callback, its next run."""
    callback = call["callback"]
    parts = [(call["error"] or "").removeprefix(f"function {call['function']} ")]
    if call["status"] == "delayed":
        parts.append(f"due in {brief(max(0.0, -ago(call['due_at'])))}")
    if callback["status"] not in ("none", "delivered"):
        parts.append(": ".join(filter(None, (f"callback {callback['status']}", callback["error"]))))
    return "; ".join(filter(None, parts))


def write_calls(calls: Iterable[Mapping[str, Any]], long: bool) -> None:
    """Lines of the table of calls."""
    for call in calls:
        who = (call["id"], call["status"], call["function"])
        took = brief(call["duration_seconds"])
        if not long:
            age = brief(ago(call["created_at"]))
            write_row(CALL_ROW, *who, call["attempts"], age, took, remark(call))
            continue
        runs = f"{call['attempts']}/{call['max_attempts']}"
        times = (clock(call["created_at"]), clock(call["completed_at"]), took)
        shared = f"call id {call['call_id']}" if call["call_id"] != call["id"] else ""
        remarks = "; ".join(filter(None, (remark(call), shared)))
        write(LONG_ROW.format(*who, call["queue"], runs, *times, remarks))


def write_header(long: bool) -> None:
    """The first line of the table of calls."""
    if long:
        names = ("ID", "STATUS", "FUNCTION", "QUEUE", "RUN", "CREATED", "ENDED", "TOOK", "REMARK")
        write(LONG_ROW.format(*names))
    else:
        write_row(CALL_ROW, "ID", "STATUS", "FUNCTION", "RUN", "AGE", "TOOK", "ERROR, CALLBACK")


def list_calls(args: Arguments) -> None:
    """Print calls, newest first; with --watch also those that are new or change later."""
    client = Client(args)
    filters = filters_of(args)
    limit = args.limit or 20
    if args.watch:
        try:
            watch_calls(client, filters, limit, args)
        except HttpError:
            if not client.late:
                raise
        return
    calls, more = client.records(filters, limit)
    if args.json:
        write_json({"calls": calls, "next_cursor": more})
        return
    if not calls:
        write_none(client, args)
        return
    write_header(args.long)
    write_calls(calls, args.long)
    if more:
        write(f"more … (--limit {2 * limit} shows twice as many)\n")


def write_none(client: Client, args: Arguments) -> None:
    """Say that no call matches, and if there is no such function."""
    names = client.function_names() if args.function else []
    bare = (args.function or "").partition(".")[0]
    if names and bare not in names:
        write(f"no calls, and no function {bare}{close_names(bare, names)}\n")
    else:
        write("no calls\n")


def watch_calls(client: Client, filters: Mapping[str, str], limit: int, args: Arguments) -> None:
    """Write matching calls, and each again when it has changed, until Ctrl-C or --timeout."""
    if not args.json:
        write_header(args.long)
    shown: list[dict[str, Any]] = []
    while True:
        for _ in client.stream("GET /system/events"):  # Something has changed, perhaps one of ours.
            calls, _ = client.records(filters, limit)
            news = [call for call in reversed(calls) if call not in shown]
            if args.json:
                for call in news:
                    write(json.dumps(call) + "\n")
            else:
                write_calls(news, args.long)
            shown = calls


def show_call(args: Arguments) -> None:
    """Print the record and what the function wrote; with --json the record alone.

    With --wait as soon as the call has ended. Raises HttpError, at the end, if it did not do well.
    """
    client = Client(args)
    call_id = client.full_id(args.id)
    record = client.record(call_id, args.wait)
    if args.json:
        write_json(record)
    else:
        write_record(client, record)
    if args.wait:
        require_success(record)


def require_success(record: Mapping[str, Any]) -> None:
    """Raise HttpError for a call that has ended in any other way."""
    if record["status"] != "success":
        end = f"call {record['call_id']} ended in {record['status']}"
        raise HttpError(500, ": ".join(filter(None, (end, record["error"]))))


def write_record(client: Client, record: Mapping[str, Any]) -> None:
    """Write a record for people, and the last lines of what the function wrote."""
    for name, value in describe(record):
        write(f"{name:10}  {value}\n")
    output = client.ask(f"GET {call_path(record['id'])}/log")
    lines = output.decode(errors="replace").splitlines()
    if len(lines) > SHOWN_LINES:
        hidden = len(lines) - SHOWN_LINES
        write(f"\n… {hidden} lines more: faasd-async calls log {record['id']}\n")
    elif lines:
        write("\n")
    write("".join(f"{line}\n" for line in lines[-SHOWN_LINES:]))


def describe(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A record as named lines, without what is absent or as usual."""
    yield "id", record["id"]
    if record["call_id"] != record["id"]:
        yield "call id", record["call_id"]
    yield "function", function_key(record["function"], record["namespace"])
    yield "queue", record["queue"]
    if "schedule" in record:
        yield "schedule", f"{record['schedule']}, of {clock(record['scheduled_for'])}"
    yield "status", record["status"]
    if record["error"]:
        yield "error", record["error"]
    runs = f"{record['attempts']} of {record['max_attempts']} at most"
    if record["interrupted"]:
        runs += f", {record['interrupted']} interrupted"
    yield "runs", runs
    yield "created", f"{clock(record['created_at'])}  ({brief(ago(record['created_at']))} ago)"
    yield from describe_times(record)
    yield "request", brief_size(record["request_bytes"])
    if record["response_bytes"] is not None:
        status = f"{record['http_status']}, " if record["http_status"] else ""
        yield "answer", status + brief_size(record["response_bytes"])
    yield from describe_callback(record["callback"])
    for was in record.get("history", ()):
        yield "before", f"{was['status']}, ended {clock(was['completed_at'])}"


def describe_times(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines of what a record waits for, of when it ran, and for how long."""
    if "waits_for" in record:
        yield "waits for", record["waits_for"]
    if record["status"] == "delayed":
        yield "due", f"{clock(record['due_at'])}  (in {brief(max(0.0, -ago(record['due_at'])))})"
    if record["started_at"]:
        yield "started", clock(record["started_at"])
    if record["completed_at"]:
        took = record["duration_seconds"]
        yield "ended", clock(record["completed_at"]) + (f"  (took {brief(took)})" if took else "")


def describe_callback(callback: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines of a record's callback, if it has one."""
    if callback["status"] == "none":
        return
    result = callback["status"]
    if callback["attempts"]:
        result += f" after {callback['attempts']} deliveries"
    if callback["http_status"]:
        result += f", answered {callback['http_status']}"
    yield "callback", f"{callback['url']}  {result}"
    if callback["error"]:
        yield "", callback["error"]


def print_result(args: Arguments) -> None:
    """Print a function's answer, and nothing else."""
    client = Client(args)
    write(client.ask(f"GET {call_path(client.full_id(args.id))}/result"))


def print_log(args: Arguments) -> None:
    """Print what a call's function wrote; with --follow also what it still writes, to its end."""
    client = Client(args)
    request = f"GET {call_path(client.full_id(args.id))}/log"
    write_pieces(client.stream(request + ("?follow=1" if args.follow else "")))


def print_request(args: Arguments) -> None:
    """Print the body that a call has for its function; with --json method, path and headers."""
    client = Client(args)
    request = f"GET {call_path(client.full_id(args.id))}/request"
    if args.json:
        write_json(client.document(request, headers=[("Accept", "application/json")]))
    else:
        write(client.ask(request))


def change_calls(args: Arguments) -> None:
    """Cancel or retry calls: those that match the filters, or those with the ids."""
    filters = filters_of(args)
    if bool(args.ids) == bool(filters):
        options = "--status, --function, --since and others"
        reason = f"which calls? Give call ids (- reads them from standard input), or {options}"
        raise UsageError(reason)
    if args.ids:
        change_by_id(args)
        return
    action, done = CHANGES[args.request]
    request = f"POST /system/calls/{action}?{query_of(filters)}"
    result = Client(args).document(request, "matched", "done")
    write(f"{result['done']} of {result['matched']} matching calls {done}\n")


def change_by_id(args: Arguments) -> None:
    """Change calls one by one, and print the ids of those for which it was done.

    Raises HttpError at the end if some could not be, each told on standard error.
    """
    if not args.ids:
        raise UsageError("which calls? Give call ids (- reads them from standard input)")
    client = Client(args)
    ids = os.fsdecode(sys.stdin.buffer.read()).split() if args.ids == ["-"] else args.ids
    missed = 0
    for prefix in dict.fromkeys(ids):
        try:
            call_id = client.full_id(prefix)
            client.ask(args.request.format(quoted(call_id)))
            write(call_id + "\n")
        except HttpError as exc:
            if exc.status not in (404, 409, 410):
                raise
            complain(f"{prefix}: {exc.text}")
            missed += 1
    if missed:
        raise HttpError(409, f"not done for {count_of(missed, 'call')}")


def read_data(data: str | None) -> bytes:
    """The body that --data names; without it, what is piped in."""
    source = data
    if source is None:
        source = "" if sys.stdin.isatty() else "-"
    try:
        if source in ("-", "@-"):
            return sys.stdin.buffer.read()
        if source.startswith("@"):
            return Path(source[1:]).read_bytes()
    except OSError as exc:
        raise HttpError(400, f"--data {source}: {exc.strerror}") from None
    return os.fsencode(source)


def call_function(client: Client, route: str, args: Arguments, headers: HeaderPairs) -> bytes:
    """POST to a function by one of the two routes. The error for an unknown name has close ones."""
    path = quoted(args.name, safe="/?&=%+:@!$'()*,;~[]")
    try:
        return client.ask(f"POST {route}{path}", read_data(args.data), headers)
    except HttpError as exc:
        name = re.split(r"[./?]", args.name)[0]
        names = client.function_names() if exc.status == 404 else []
        if not names or name in names:  # The function itself says so.
            raise
        raise HttpError(404, f"no function {name}{close_names(name, names)}") from None


def write_outcome(client: Client, record: Mapping[str, Any], as_json: bool) -> None:
    """Write what a call that has ended wrote: stdout to ours, stderr to ours.

    Raises HttpError, at the end, for an answer that was not kept as a whole.
    """
    path = f"GET {call_path(record['id'])}"
    output = client.ask(f"{path}/log?stream=stdout")
    stderr = client.ask(f"{path}/log?stream=stderr")
    if as_json:
        texts = {"output": output, "stderr": stderr}
        write_json(
            {**record, **{name: text.decode("utf-8", "replace") for name, text in texts.items()}}
        )
        return
    failed = record["status"] != "success"
    write(b"" if failed and output == stderr else output)  # See `readable`.
    write(stderr, sys.stderr)
    if stderr and not stderr.endswith(b"\n"):
        write("\n", sys.stderr)
    if record["status"] == "success" and record["response_bytes"] != len(output):
        client.ask(f"{path}/result")


def invoke(args: Arguments) -> None:
    """Print the answer; with --async the call's id; with --wait the output, once it has ended."""
    client = Client(args)
    if not args.queued and not args.wait:
        answer = call_function(client, "/function/", args, args.header)
        if args.json:
            write_json({"output": answer.decode(errors="replace")})
        else:
            write(answer)
        return
    headers = (*args.header, ("Accept", "application/json"))
    answer = call_function(client, "/async-function/", args, headers)
    call_id = client.parsed(answer, "call_id")["call_id"]
    if not args.wait:
        write(answer if args.json else call_id + "\n")
        return
    record = client.record(call_id, wait=True)
    write_outcome(client, record, args.json)
    require_success(record)


# --- Operator commands ----------------------------------------------------------------------------
# Queues, and the daemon as a whole.

QUEUE_ROW = "{:28.28}  {:>7}  {:>7}  {:>5}  {:>8}  {:>6}  {}"


def list_queues(args: Arguments) -> None:
    """Print the queues; the last one is the callback sender's."""
    document = Client(args).document("GET /system/queues", "queues")
    if args.json:
        write_json(document)
    else:
        write_queues(document["queues"])


def write_queues(queues: Iterable[Mapping[str, Any]]) -> None:
    """Write the table of queues, and of their functions that have a rate."""
    write_row(QUEUE_ROW, "QUEUE", "WAITING", "RUNNING", "LIMIT", "RATE", "OLDEST", "STATE")
    for queue in queues:
        cells = [queue[name] for name in ("name", "depth", "inflight", "max_inflight")]
        cells.append(queue.get("rate") or "-")
        state = "paused" if queue.get("paused") else "-"
        write_row(QUEUE_ROW, *cells, brief(queue["oldest_seconds"]), state)
        for function, rate in queue.get("function_rates", {}).items():
            waiting = queue["functions"].get(function, 0)
            write_row(QUEUE_ROW, f"  {function}", waiting, "", "", rate, "", "")


def change_queue(args: Arguments) -> None:
    """Pause, resume or purge a queue."""
    document = Client(args).document(args.request.format(quoted(args.name)), "queue")
    if args.json:
        write_json(document)
    elif "cancelled" in document:
        write(f"{document['queue']}: {count_of(document['cancelled'], 'call')} cancelled\n")
    else:
        write(f"{document['queue']}: {'paused' if document['paused'] else 'resumed'}\n")


def save_backup(args: Arguments) -> None:
    """Save a copy of the queue's file as it is at one moment: whole, or not at all."""
    client = Client(args)
    pieces = client.stream("GET /system/backup")
    if args.copy == "-":
        if sys.stdout.isatty():
            raise HttpError(400, "a copy is no text: name a file, or pipe it on")
        write_pieces(pieces)
        return
    target = Path(args.copy).resolve()  # What a link names is replaced, not the link.
    if target.exists() and not target.is_file():
        raise HttpError(400, f"{args.copy} is no file: name one, or - for standard output")
    if target.exists() and not args.force:
        raise HttpError(400, f"{args.copy} is there already: --force replaces it")
    if target.exists():
        place = client.document("GET /system/stats", "store")["store"]["place"]
        if any(target.samefile(own) for own in (place, f"{place}-wal") if Path(own).exists()):
            raise HttpError(400, f"{args.copy} is the queue's own file, and in use")
    write_whole(target, pieces)
    write(f"{args.copy}: {brief_size(target.stat().st_size)}\n")


def write_whole(target: Path, pieces: Iterable[bytes]) -> None:
    """Write a file for its owner only. It appears once all of it is on disk. Raises HttpError.

    A signal that ends this program leaves no part of it.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}")

    def stop(number: int, frame: object) -> None:
        part.unlink(missing_ok=True)
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        with open(part, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
        sync_folder(target.parent)
    except OSError as exc:
        raise HttpError(400, f"{target}: {exc.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


# From when on something is worth a complaint.
STUCK_S = 60.0  # since a call is due, while nothing runs in its queue
NEARLY_FULL = 0.9
LITTLE_BYTES = 200 * MIB  # left on the disk


def show_status(args: Arguments) -> int:
    """Print the daemon's state in one screen; exit code 1 if it needs somebody."""
    client = Client(args)
    stats = client.document("GET /system/stats", "version", "queues", "store")
    schedules = client.document("GET /system/schedules", "schedules")["schedules"]
    complaints = [*complaints_of(stats)]
    if args.json:
        write_json({**stats, "complaints": complaints})
        return 1 if complaints else 0
    for name, value in describe_daemon(stats):
        write(f"{name:10}  {value}\n")
    write("\n")
    write_queues(stats["queues"])
    write("\n")
    for line in complaints:
        write(f"! {line}\n")
    for line in (*hints_of(stats), *hints_of_schedules(schedules)):
        write(f"- {line}\n")
    if not complaints:
        write("All is well.\n")
    return 1 if complaints else 0


def describe_daemon(stats: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The daemon's figures as named lines."""
    store, commits = stats["store"], stats["commit_seconds"]
    counts = stats["counts"]
    memory = f", {brief_size(stats['memory_bytes'])} of memory" if stats["memory_bytes"] else ""
    yield "daemon", f"faasd-async {stats['version']}, up {brief(stats['uptime_seconds'])}{memory}"
    yield "guarantee", stats["guarantee"]
    left = f", {brief_size(store['free_bytes'])} free" if store["free_bytes"] is not None else ""
    age = f" (figures of {brief(store['age_seconds'])} ago)" if store["age_seconds"] else ""
    yield "store", f"{store['place']}  {brief_size(store['used_bytes'])}{left}{age}"
    if commits["p99"] is not None:
        yield "commits", f"{commits['p50'] * 1000:.1f} ms, of 99 % {commits['p99'] * 1000:.1f} ms"
    waiting = [f"{counts[status]} {status}" for status in STATUSES if status not in FINAL]
    yield "calls", ", ".join(waiting)
    since = f"since {clock(stats['counted_since'])}" if stats["counted_since"] else "kept"
    yield "", ", ".join(f"{counts[status]} {status}" for status in FINAL) + f" ({since})"
    hours = [queue["hour"] for queue in stats["queues"] if "hour" in queue]
    sums = {kind: sum(sum(hour[kind]) for hour in hours) for kind in ("accepted", "failed")}
    yield "last hour", f"{sums['accepted']} accepted, {sums['failed']} failed"
    callbacks = [f"{number} {status}" for status, number in stats["callbacks"].items()]
    yield "callbacks", ", ".join(callbacks)


def complaints_of(stats: Mapping[str, Any]) -> Iterator[str]:
    """What a person should look at, with the command that shows more or mends it."""
    if stats["trouble"]:
        yield f"no calls are accepted: {stats['trouble']}"
    for queue in stats["queues"]:
        yield from complaints_of_queue(queue)
    free_bytes = stats["store"]["free_bytes"]
    if free_bytes is not None and free_bytes < LITTLE_BYTES:
        yield f"the disk has {brief_size(free_bytes)} left: df -h {stats['store']['place']}"


def hints_of(stats: Mapping[str, Any]) -> Iterator[str]:
    """Lines on what may be of interest, though the daemon is well."""
    yield from stats["warnings"]
    failed = stats["counts"]["error"] + stats["counts"]["timeout"]
    if failed:
        yield f"{count_of(failed, 'call')} failed: faasd-async calls --status error,timeout"
    if undelivered := stats["callbacks"]["failed"]:
        callbacks = count_of(undelivered, "callback")
        yield f"{callbacks} could not be delivered: faasd-async calls --callback failed"


def hints_of_schedules(schedules: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Schedules that are paused, and those that missed instants or failed."""
    for schedule in schedules:
        name = schedule["name"]
        if schedule["paused"]:
            yield f"schedule {name} is paused: faasd-async schedules resume {name}"
        if missed := schedule["missed"]:
            yield f"schedule {name} missed {count_of(missed, 'instant')}: faasd-async schedules"
        last = schedule["runs"][0]["status"] if schedule["runs"] else None
        if last in ("error", "timeout"):
            yield f"schedule {name}: its last run failed: faasd-async calls --schedule {name}"


def complaints_of_queue(queue: Mapping[str, Any]) -> Iterator[str]:
    """Lines on what is wrong with a queue."""
    name, depth = queue["name"], queue["depth"]
    if queue.get("paused"):
        yield f"queue {name} is paused: faasd-async queues resume {name}"
    elif depth and not queue["inflight"] and queue["oldest_seconds"] > STUCK_S:
        age = brief(queue["oldest_seconds"])
        yield f"queue {name} is stuck, its oldest call is due since {age}: faasd-async calls"
    if depth > NEARLY_FULL * queue.get("max_pending", math.inf):
        yield f"queue {name} is nearly full: {depth} of {queue['max_pending']} wait"


# --- Schedule commands ----------------------------------------------------------------------------

SCHEDULE_ROW = "{:16.16}  {:12.12}  {:16.16}  {:>6}  {}"  # a time without its seconds


def list_schedules(args: Arguments) -> None:
    """Print the schedules with their next instant, by this machine's clock, and their last run."""
    document = Client(args).document("GET /system/schedules", "schedules")
    if args.json:
        write_json(document)
        return
    write_row(SCHEDULE_ROW, "SCHEDULE", "FUNCTION", "NEXT", "MISSED", "LAST RUN; WHEN")
    for schedule in document["schedules"]:
        following = clock(schedule["next"][0]) if schedule["next"] else "-"
        if schedule["paused"]:
            following = "paused"
        last = [f"{run['status']} {brief(ago(run['scheduled_for']))}" for run in schedule["runs"]]
        words = "; ".join([*last[:1], schedule["words"]])
        cells = (schedule["name"], schedule["function"], following, schedule["missed"])
        write_row(SCHEDULE_ROW, *cells, words)


def show_next(args: Arguments) -> None:
    """Print the next instants of a schedule, or of an expression, for which no daemon is needed."""
    schedule = named_schedule(args)
    following = list(itertools.islice(next_instants(schedule, time.time()), args.count or 10))
    if args.json:
        write_json({"words": schedule_words(schedule), "next": list(map(rfc3339, following))})
        return
    write(schedule_words(schedule) + "\n")
    for at in following:
        write(f"{instant_words(schedule, at)}  in {brief(at - time.time())}\n")


def named_schedule(args: Arguments) -> Schedule:
    """An expression as a schedule, or the schedule of this name, as the daemon has it."""
    if re.search("[ @]", args.schedule):
        zone = args.timezone or "UTC"
        try:
            return Schedule(name="", cron=cron_list(args.schedule), timezone=zone)
        except ValueError as exc:
            raise HttpError(400, str(exc)) from None
    schedules = Client(args).document("GET /system/schedules", "schedules")["schedules"]
    for schedule in schedules:
        if schedule["name"] == args.schedule:
            zone = args.timezone or schedule["timezone"]
            return Schedule(name="", cron=tuple(schedule["cron"]), timezone=zone)
    names = [schedule["name"] for schedule in schedules]
    raise HttpError(404, f"no schedule {args.schedule}{close_names(args.schedule, names)}")


def change_schedule(args: Arguments) -> None:
    """Run a schedule now, and print the id of the call; or pause or resume it."""
    request = args.request.format(quoted(args.schedule))
    document = Client(args).document(request, "schedule")
    if args.json:
        write_json(document)
    elif "call_id" in document:
        write(document["call_id"] + "\n")
    else:
        state = "paused" if document["paused"] else "resumed"
        write(f"{document['schedule']}: {state}\n")


# --- Service commands -----------------------------------------------------------------------------

NO_THREAD = "can't start new thread"  # as Python says it
FEWEST_DESCRIPTORS = 24  # free ones: a dozen are used to begin with, and by a command


def open_standard_files() -> None:
    """Open descriptors 0, 1 and 2 if they are closed: else a socket or the store would get them."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def import_libraries() -> None:
    """Import what serves, calls and counts: a daemon does, and who has its queue.

    Raises ConfigError if something is not there, or an aiohttp that is too old.
    """
    global BadHttpMethod, HttpProcessingError, LineTooLong
    global HttpRequestParser, HttpResponseParser, RawRequestMessage, RawResponseMessage
    global EMPTY_PAYLOAD, StreamReader
    global CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric, prometheus_client
    try:
        import aiohttp
        import prometheus_client
        from aiohttp.http_exceptions import BadHttpMethod, HttpProcessingError, LineTooLong
        from aiohttp.http_parser import (
            HttpRequestParser,
            HttpResponseParser,
            RawRequestMessage,
            RawResponseMessage,
        )
        from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
        from prometheus_client.metrics_core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
            Metric,
        )
    except ImportError as exc:
        raise ConfigError([f"{exc}: `pip install .` beside pyproject.toml installs it"]) from None
    version = re.match(r"(\d+)\.(\d+)", aiohttp.__version__)
    if version is None or (int(version[1]), int(version[2])) < OLDEST_AIOHTTP:
        oldest = ".".join(map(str, OLDEST_AIOHTTP))
        there = f"{aiohttp.__version__} in {Path(aiohttp.__file__).parent}"
        raise ConfigError([f"aiohttp {oldest} or later is needed, and there is {there}"])


def require_descriptors() -> None:
    """Raise Shortage if there are too few descriptors to serve a call.

    An event loop that finds none while it begins leaves a traceback, or hangs.
    """
    held: list[int] = []
    try:
        while len(held) < FEWEST_DESCRIPTORS:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as exc:
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        text = f"this process may have {most} descriptors, of which {len(held)} are left"
        more = f"{FEWEST_DESCRIPTORS} are the least to start with (LimitNOFILE=, ulimit -n)"
        raise Shortage(f"{exc.strerror}: {text}; {more}") from None
    finally:
        for descriptor in held:
            os.close(descriptor)


def collect_less() -> None:
    """Look more rarely for cycles of garbage, of which a call leaves none.

    What was imported stays for good and is not looked through again. With Python's own threshold,
    700 objects, a claim of some calls sets off a collection: 8 % of what a drained call costs.
    """
    gc.freeze()
    gc.set_threshold(10_000)


def await_the_start() -> None:
    """Have a reload wait until the start has ended; see `end_start`.

    A stop doesn't have to: there is nothing to stop yet.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: os._exit(0))


def serve(args: Arguments) -> int:
    """Run the daemon until a signal."""
    await_the_start()
    import_libraries()
    require_descriptors()
    collect_less()
    path = args.config or default_config()
    new_loop = uvloop.new_event_loop if uvloop else None
    code: int | None = None
    setup_logging(LogConfig())  # for what there is to say of the file while it is read
    try:
        config = load_config(path)
        if args.listen:
            listen = parse_config({"gateway": {"listen": args.listen}}).gateway.listen
            config = replace(config, gateway=replace(config.gateway, listen=listen))
        setup_logging(config.log)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            code = runner.run(run_daemon(config, path))
    except RuntimeError:
        if code is None:
            raise
        # The daemon has ended: only uvloop's loop could not be closed, without descriptors.
    finally:
        for handler in [*log.handlers]:
            handler.close()
            log.removeHandler(handler)
    assert code is not None
    return code


EXPLAINED = 3  # instants


def check(args: Arguments) -> None:
    """Check a configuration file, and say what its schedules mean."""
    path = args.file or args.config or default_config()
    config = load_config("/dev/stdin" if path == "-" else path)
    for line in itertools.chain(config_warnings(config), script_warnings(config)):
        complain(f"{path or 'defaults'}: {line}")
    print(f"{path or 'defaults'}: ok, {config_counts(config)}")
    for name, schedule in config.schedules.items():
        following = itertools.islice(next_instants(schedule, time.time()), EXPLAINED)
        texts = [schedule_words(schedule), *(instant_words(schedule, at) for at in following)]
        print(f"schedules.{name}: {'; '.join(texts)}")


# --- Move command ---------------------------------------------------------------------------------
# From a file to the queue of the configuration. It may be killed at any moment and run again: a
# call leaves the file after it was stored, and to store it twice changes nothing
# (WorkQueue.enqueue).

MOVED_AT_ONCE = 64  # calls
CALLBACKS_AT_ONCE = 4  # fewer, as their answers may be large


def nothing(about: object) -> None:
    """Does nothing: here nobody runs calls, or waits for their ends."""


class Move:
    """Moves what waits, and counts what it has moved and what it had to leave."""

    def __init__(self, file: SqliteFile, queue: NatsQueue) -> None:
        self._file = file
        self._queue = queue
        self.moved: Counter[str] = Counter()  # by what it is
        self._paused: list[str] = []  # queues
        self.left: dict[tuple[str, str], list[str]] = {}  # call ids, by what and why

    async def run(self) -> None:
        """Move all. Raises StoreError: some is not moved yet.

        Pauses come first, so that nothing of a paused queue runs. Each is moved only once: a queue
        that was resumed there since stays so.
        """
        for name in unmoved_pauses(self._file):
            await self._queue.pause(name, True)
            mark_pause_moved(self._file, name)
            self._paused.append(name)
        for state in step_schedules(self._file).values():
            if await self._queue.schedules.save(state._replace(revision=0), ()):
                self.moved["schedule"] += 1
        await self._move("call", waiting_calls, MOVED_AT_ONCE)
        await self._move("callback", calls_to_tell, CALLBACKS_AT_ONCE)

    async def _move(
        self, kind: str, read: Callable[[SqliteFile, int, int], Sequence[Moving]], limit: int
    ) -> None:
        """Store what is read, and forget what is stored."""
        after = 0
        while moving := read(self._file, after, limit):
            after = moving[-1].seq
            attempts = map(self._store, moving)
            results = await asyncio.gather(*attempts, return_exceptions=True)
            moved = []
            for item, result in zip(moving, results, strict=True):
                if isinstance(result, HttpError):
                    self.left.setdefault((kind, str(result)), []).append(item.call_id)
                elif result is None:
                    moved.append(item)
            forget_moved(self._file, moved)
            self.moved[kind] += len(moved)
            for result in results:
                if isinstance(result, BaseException) and not isinstance(result, HttpError):
                    raise result

    async def _store(self, moving: Moving) -> None:
        """Store a call, if a move that was killed has not. HttpError: it can't be stored."""
        call = moving.call
        if isinstance(call, EndedCall):
            ended = NatsCall(**call.columns)
            await self._queue.adopt(ended, Parts(*call.parts), (call.digest or b"").hex())
            return
        call_id = await self._queue.enqueue(call)
        if call_id != call.call_id:
            raise HttpError(409, f"call {call_id} has the same Idempotency-Key")

    def report(self) -> Iterator[str]:
        """Lines on what was moved, and what is left."""
        words = [count_of(self.moved[name], name) for name in ("call", "callback", "schedule")]
        yield f"moved {words[0]}, {words[1]} and {words[2]}"
        for name in self._paused:
            how = f"faasd-async queues resume {name}"
            yield f"paused queue {name} on all hosts, as it is here; to have it go on: {how}"
        for (kind, reason), call_ids in self.left.items():
            yield f"left {count_of(len(call_ids), kind)}, {call_ids[0]} first: {reason}"


async def move_calls(file: SqliteFile, config: Config) -> Move:
    """Move what waits in a file to the queue of the configuration. Raises StoreError."""
    queue = NatsQueue(lambda: config, Metrics())
    move = Move(file, queue)
    log.disabled = True  # It would repeat what we raise, and say that it tries again.
    await queue.open(nothing, nothing, nothing)
    try:
        if reason := await queue.failing():
            raise StoreError(reason)
        await move.run()
    except StoreError as exc:
        progress = (
            f"{count_of(move.moved['call'], 'call')} moved so far, run it again for the others"
        )
        raise StoreError(f"{exc}; {progress}") from exc
    finally:
        await queue.close()
    return move


def require_queue_file(path: Path) -> None:
    """Raise StoreError for what is no queue's file, or damaged. Nothing is changed.

    To open it as a queue would make a new one, or set it aside.
    """
    try:
        head = b""
        if not path.is_fifo():
            with path.open("rb") as file:
                head = file.read(16)
    except OSError as exc:
        raise StoreError(f"{path}: {exc.strerror}") from exc
    trouble: str | None = "no queue's file"
    if head == b"SQLite format 3\0":
        trouble = queue_file_trouble(path)
    if trouble:
        raise StoreError(f"{path}: this is {trouble}")


def move(args: Arguments) -> int:
    """Move what waits in a file to NATS; 1: some of it is left."""
    config = load_config(args.config or default_config())
    path = Path(args.store).expanduser() if args.store else store_path(config)
    if config.store.backend == "sqlite":
        reason = 'store.backend is "sqlite": name a file with --config that has "nats"'
        raise ConfigError([reason])
    require_queue_file(path)
    import_libraries()
    file = SqliteFile(path, lambda: config, recover)
    file.open()
    try:
        moved = asyncio.run(move_calls(file, config))
        for line in moved.report():
            print(f"{path}: {line}")
    except sqlite3.Error as exc:
        raise StoreError(f"{path}: {exc}; run it again") from exc
    finally:
        file.close()
    return 1 if moved.left else 0


# --- Manual page ----------------------------------------------------------------------------------
# What the manual page and --help say beside the commands.

EXIT_CODES = {
    0: "done",
    1: "failed or refused",
    2: "usage",
    69: "no daemon",
    75: "try again",
    77: "credentials",
    78: "configuration",
}
CONFIG_PLACES = (
    f"The file, where none is named: $FAASD_ASYNC_CONFIG, ~/.config/{CONFIG_FILE}, "
    f"/etc/{CONFIG_FILE}. The daemon: $FAASD_ASYNC_URL, else what the file says."
)
SUMMARY = "run functions in the background on one small machine"
DESCRIPTION = (
    "Runs functions in the background: POST /async-function/NAME answers with a call id once the "
    "call is on disk, the function runs later, and its result goes to a callback URL or waits "
    "under that id. Without a command the daemon is started; all commands but serve, check, man "
    "and completion are its client."
)
EXAMPLES = {
    "faasd-async check /etc/faasd-async/config.toml": "What is wrong with a file, in a line each.",
    "echo hello | faasd-async invoke upper": "Call a function, and print its answer.",
    "faasd-async calls --since 24h --status error,timeout": "What went wrong since yesterday.",
    "faasd-async calls retry --status error --function upper": "Run it again.",
    "faasd-async status": "Is it up, is anything stuck, paused, failing or full?",
}


CLIENT_OPTIONS = ("--timeout", "--config", "--url", "--user-file", "--password-file")


class Command(NamedTuple):
    """A row of the table of commands."""

    words: str
    run: Callable[[Arguments], int | None]
    summary: str
    options: str  # options and arguments, without CLIENT_OPTIONS
    request: str = ""  # what `run` asks the daemon, if it serves several commands

    @property
    def asks(self) -> bool:
        """Whether it asks a daemon, and so has CLIENT_OPTIONS, too."""
        return self.words not in ("", "serve", "check", "move", "man", "completion")


def epilog() -> str:
    """What every --help ends with."""
    codes = "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
    return f"{CONFIG_PLACES} Exit codes: {codes}."


def roff(line: str) -> str:
    """Text for groff and mandoc: dashes that can be copied, and no line that is a request."""
    escaped = line.replace("\\", "\\e").replace("-", "\\-")
    return escaped.replace("'", "\\(aq").replace("…", "\\&...")


def roff_option(name: str, keys: Mapping[str, Any], brackets: bool) -> str:
    """An option or argument with its value, in bold and italics."""
    if not name.startswith("-"):
        value = f"\\fI{roff(keys['metavar'])}\\fR"
        several = " ..." if keys.get("nargs") == "*" else ""
        return f"[{value}{several}]" if brackets and "nargs" in keys else value
    *short, long = name.split("/")
    shown = ", ".join(f"\\fB{roff(flag)}\\fR" for flag in [*short, long])
    if keys.get("action") != "store_true":
        value = keys.get("metavar") or long.strip("-").upper()
        shown += f" \\fI{roff(value.strip(chr(39)))}\\fR"
    return f"[{shown.replace(', ', '|')}]" if brackets else shown


def manual_page(commands: Sequence[Command], options: Mapping[str, Mapping[str, Any]]) -> str:
    """The manual page faasd-async(1), for man and mandoc."""
    title = f'.TH FAASD-ASYNC 1 {RELEASED} "faasd-async {VERSION}" "User Commands"'
    lines = [title, ".SH NAME", f"faasd\\-async \\- {roff(SUMMARY)}"]
    lines += [".SH SYNOPSIS", ".B faasd\\-async", "[\\fICOMMAND\\fR] [\\fIOPTION\\fR ...]"]
    lines += [".SH DESCRIPTION", roff(DESCRIPTION), ".PP", roff(CONFIG_PLACES), ".SH COMMANDS"]
    shown = {command.words: command for command in commands}
    for words in [*shown]:
        if not words or f"{words} list" in shown:  # the same as `list`
            del shown[words]
    for words, command in shown.items():
        usage = [roff_option(name, options[name], True) for name in command.options.split()]
        lines += [".TP", f"\\fB{words}\\fR {' '.join(usage)}".rstrip()]
        lines.append(f"{roff(command.summary)}.")
    clients = [f"\\fB{roff(name)}\\fR" for name in CLIENT_OPTIONS]
    lines += [".PP", f"All that ask the daemon also take {', '.join(clients)}.", ".SH OPTIONS"]
    for name, keys in options.items():
        lines += [".TP", roff_option(name, keys, False), roff(keys["help"])]
    lines += [".TP", "\\fB\\-V\\fR, \\fB\\-\\-version\\fR", "the version", ".SH EXIT STATUS"]
    for code, meaning in EXIT_CODES.items():
        lines += [".TP", f".B {code}", meaning]
    lines.append(".SH EXAMPLES")
    for example, meaning in EXAMPLES.items():
        lines += [".TP", f".B {roff(example)}", roff(meaning)]
    lines += [".SH FILES", ".TP", ".I /etc/faasd\\-async/config.toml", "the configuration"]
    lines += [".TP", ".I /var/lib/faasd\\-async/faasd\\-async.db", "the queue, under systemd"]
    return "\n".join(lines) + "\n"


# --- Command line ---------------------------------------------------------------------------------
# One table of commands, from which the parser, its help, the manual page and completion come.

SHELLS = ("bash", "zsh", "fish")
UNKNOWN_COMMAND = r"argument (?:COMMAND|ACTION): invalid choice: '(.*?)' \(choose from (.*)\)"


def typed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Make a parser of values for argparse, so that its error says what was expected."""

    def read(value: str) -> T:
        try:
            return parse(value)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"{value!r}: {exc}") from None

    return read


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "--config": {"metavar": "FILE", "help": "TOML file, instead of the one that is found"},
    "--listen": {"metavar": "ADDRESS", "help": "instead of gateway.listen"},
    "--url": {
        "help": "the daemon: HOST:PORT, http://HOST:PORT, unix:/path; default: gateway.listen"
    },
    "--user-file": {"metavar": "FILE", "help": "instead of auth.user_file"},
    "--password-file": {"metavar": "FILE", "help": "instead of auth.password_file"},
    "--timeout": {
        "metavar": "DURATION",
        "type": typed(positive),
        "help": "give up after so long, such as 30s or 5m (never)",
    },
    "--json": {"action": "store_true", "help": "JSON instead of a table or lines"},
    "--long": {"action": "store_true", "help": "whole ids, times, queues; lines are not cut"},
    "--status": {
        "metavar": "STATUS",
        "action": "append",
        "type": typed(words_of(*STATUSES)),
        "help": f"{', '.join(STATUSES)}; several: with commas, or again",
    },
    "--callback": {
        "metavar": "STATUS",
        "action": "append",
        "type": typed(words_of(*CALLBACK_STATUSES)),
        "help": f"only calls whose callback is {', '.join(CALLBACK_STATUSES)}",
    },
    "--function": {"metavar": "NAME", "help": "only calls of this function"},
    "--queue": {"metavar": "NAME", "help": "only calls of this queue"},
    "--schedule": {"metavar": "NAME", "help": "only calls of this schedule"},
    "--since": {
        "metavar": "WHEN",
        "type": typed(local_moment),
        "help": 'only calls from then on: 24h, 7d, 03:00, yesterday, "2030-01-31 08:00"',
    },
    "--until": {"metavar": "WHEN", "type": typed(local_moment), "help": "only calls before then"},
    "-n/--limit": {"metavar": "N", "type": typed(number), "help": "at most so many (20)"},
    "--watch": {"action": "store_true", "help": "go on with what is new or changes, until Ctrl-C"},
    "--wait": {"action": "store_true", "help": "until the call has ended"},
    "-f/--follow": {
        "action": "store_true",
        "help": "go on with what it writes, to its end",
    },
    "--async": {"action": "store_true", "dest": "queued", "help": "queue it and print its id"},
    "-d/--data": {
        "metavar": "TEXT",
        "help": "the body; @FILE: a file's; - or a pipe: standard input",
    },
    "-H/--header": {
        "metavar": "'NAME: VALUE'",
        "action": "append",
        "type": typed(header_line),
        "help": "a header; may be there several times",
    },
    "id": {"metavar": "ID", "help": "a call's id, or how it begins"},
    "ids": {
        "metavar": "ID",
        "nargs": "*",
        "help": "call ids, or how they begin; - reads them from standard input",
    },
    "--count": {"metavar": "N", "type": typed(number), "help": "so many (10)"},
    "--timezone": {
        "metavar": "ZONE",
        "type": typed(time_zone),
        "help": "by the clocks of Europe/Berlin, for instance (UTC, or the schedule's)",
    },
    "schedule": {
        "metavar": "SCHEDULE",
        "help": "its name; for next also an expression such as '30 7 * * 1-5', or several with ;",
    },
    "name": {"metavar": "NAME", "help": "which one; of a function also its path: NAME/PATH?QUERY"},
    "file": {"metavar": "FILE", "nargs": "?", "help": "the file, as with --config"},
    "copy": {"metavar": "FILE", "help": "where the copy goes; - is standard output"},
    "--force": {"action": "store_true", "help": "replace a file that is there"},
    "store": {"metavar": "FILE", "nargs": "?", "help": "the queue's file, instead of store.path"},
    "shell": {"metavar": "SHELL", "choices": SHELLS, "help": ", ".join(SHELLS)},
}
WHICH = " ".join(f"--{name}" for name in FILTER_OPTIONS)
LISTED = f"{WHICH} -n/--limit --long --watch --json"
CHOSEN = f"ids {WHICH}"


def print_manual(args: Arguments) -> None:
    """Print the manual page, in the language of man(7)."""
    write(manual_page(COMMANDS, OPTIONS))


def print_completion(args: Arguments) -> None:
    """Print what makes a shell complete commands, options and file names."""
    try:
        import shtab
    except ImportError:
        reason = "completion comes from the package shtab: pip install shtab"
        raise HttpError(400, reason) from None
    write(shtab.complete(make_parser(complete_files=shtab.FILE), args.shell))


COMMANDS: Sequence[Command] = (
    Command("", serve, SUMMARY, "--config --listen"),
    Command("serve", serve, "run the daemon (as without a command)", "--config --listen"),
    Command("check", check, "check a configuration file", "file --config"),
    Command("move", move, "move what waits in a stopped daemon's file to NATS", "store --config"),
    Command("status", show_status, "tell how the daemon is", "--json"),
    Command("calls", list_calls, "list calls, or what ACTION says", LISTED),
    Command("calls list", list_calls, "list calls, newest first", LISTED),
    Command("calls show", show_call, "print a call's record and what its function said",
            "id --wait --json"),
    Command("calls log", print_log, "print what a call's function wrote", "id -f/--follow"),
    Command("calls result", print_result, "print a function's answer, and nothing else", "id"),
    Command("calls request", print_request, "print what a call asks; with --json its headers",
            "id --json"),
    Command("calls cancel", change_calls, "cancel calls by id, or by filter", CHOSEN, CANCEL_ONE),
    Command("calls retry", change_calls, "run finished calls again by id, or by filter",
            CHOSEN, RETRY_ONE),
    Command("calls resend", change_by_id, "send callbacks again, without running the functions",
            "ids", "POST /system/calls/{}/callback"),
    Command("queues", list_queues, "list queues, or what ACTION says", "--json"),
    Command("queues list", list_queues, "list queues", "--json"),
    Command("queues pause", change_queue, "hold a queue's calls",
            "name --json", "POST /system/queues/{}/pause"),
    Command("queues resume", change_queue, "let them run again",
            "name --json", "POST /system/queues/{}/resume"),
    Command("queues purge", change_queue, "cancel what waits in a queue",
            "name --json", "POST /system/queues/{}/purge"),
    Command("schedules", list_schedules, "list schedules, or what ACTION says", "--json"),
    Command("schedules list", list_schedules, "list schedules", "--json"),
    Command("schedules next", show_next,
            "say what a schedule or an expression means, and when it is",
            "schedule --count --timezone --json"),
    Command("schedules run", change_schedule, "run one now, and print the id of its call",
            "schedule --json", "POST /system/schedules/{}/run"),
    Command("schedules pause", change_schedule, "have one rest",
            "schedule --json", "POST /system/schedules/{}/pause"),
    Command("schedules resume", change_schedule, "have one go on, with its next instant",
            "schedule --json", "POST /system/schedules/{}/resume"),
    Command("invoke", invoke, "call a function",
            "name -d/--data -H/--header --async --wait --json"),
    Command("backup", save_backup, "copy the queue's file while it is used", "copy --force"),
    Command("man", print_manual, "print the manual page, for man", ""),
    Command("completion", print_completion, "print what a shell needs to complete", "shell"),
)  # fmt: skip
GROUPS = ("calls", "queues", "schedules")  # of commands; the singular does as well


class Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, and where the manual is."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        if match := re.search(UNKNOWN_COMMAND, message):
            known = re.findall(r"[\w-]+", match[2])
            message = f"there is no command {match[1]}{close_names(match[1], known)}"
            if re.search(r"[:/.\d]", match[1]):  # the value of an option such as --url
                message = f"there is no command {match[1]}: options stand behind their command"
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def commands_for(words: Sequence[str]) -> Sequence[Command]:
    """The commands that a line may mean: to make the parsers of all takes a third of a start."""
    first = words[0] if words else ""
    names = ("", first, f"{first}s" if f"{first}s" in GROUPS else first)
    meant = [command for command in COMMANDS if command.words.split(" ")[0] in names]
    return meant if len(meant) > 1 else COMMANDS  # else it is an option, nothing, or a typing error


def make_parser(
    commands: Sequence[Command] = COMMANDS, complete_files: object = None
) -> argparse.ArgumentParser:
    """The parser of the command line.

    `complete_files` is how shtab has a shell complete names of files.
    """
    top = Parser(prog="faasd-async", description=DESCRIPTION, epilog=epilog())
    version = f"faasd-async {VERSION}"
    top.add_argument("-V", "--version", action="version", version=version)
    groups: dict[str, Any] = {}
    for command in commands:
        group, _, word = command.words.rpartition(" ")
        parser: argparse.ArgumentParser = top
        if command.words:
            parser = groups[group].add_parser(
                word,
                aliases=[word.removesuffix("s")] if word in GROUPS else [],
                help=command.summary,
                description=command.summary,
                epilog=epilog(),
            )
        for option in (*command.options.split(), *(CLIENT_OPTIONS if command.asks else ())):
            flags = option.split("/")
            action = parser.add_argument(*flags, default=argparse.SUPPRESS, **OPTIONS[option])
            if OPTIONS[option].get("metavar") == "FILE":
                vars(action)["complete"] = complete_files
        parser.set_defaults(run=command.run, request=command.request)
        if command.words in ("", *GROUPS):
            metavar = "ACTION" if command.words else "COMMAND"
            groups[command.words] = parser.add_subparsers(metavar=metavar)
    names = [option.split("/")[-1] for option in OPTIONS]
    absent = {name.strip("-").replace("-", "_"): None for name in names}
    top.set_defaults(**{**absent, "header": ()}, queued=False)
    return top


def exit_code(exc: Exception) -> int:
    """The exit code of a fatal error (sysexits.h).

    A configuration error is not worth a restart (RestartPreventExitStatus=78); a locked file is.
    """
    if isinstance(exc, ConfigError):
        return 78
    if isinstance(exc, StoreLocked | ListenError):
        return 75
    if isinstance(exc, UsageError):
        return 2
    if isinstance(exc, HttpError):
        return {0: 69, 401: 77, 429: 75, 503: 75}.get(exc.status, 1)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Every fatal error ends here, as one line and an exit code."""
    open_standard_files()
    words = sys.argv[1:] if argv is None else argv
    args = make_parser(commands_for(words)).parse_args(words)
    if args.run is not serve:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    # Exit at once: an exception could come up where Python ignores it. (The daemon has a handler of
    # its own.)
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    try:
        return args.run(args) or 0
    except ConfigError as exc:
        complain(exc)
        return exit_code(exc)
    except (StoreError, ListenError, UsageError, HttpError) as exc:
        complain(f"faasd-async: {exc}")
        return exit_code(exc)
    except (RuntimeError, MemoryError) as exc:
        if isinstance(exc, RuntimeError) and str(exc) != NO_THREAD:
            raise
        limits = "LimitNPROC=, TasksMax=, LimitAS=; ulimit -u, ulimit -v"
        complain(f"faasd-async: {exc or 'no memory is left'} ({limits})")
        return 75
    except BrokenPipeError:  # Whoever reads our output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as exc:  # such as a full disk behind our output
        complain(f"faasd-async: {exc.strerror or exc}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


if __name__ == "__main__":
    sys.exit(main())
