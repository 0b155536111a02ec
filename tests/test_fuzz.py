"""Anything at all, sent to the real gateway: it answers in HTTP or hangs up, blames who is to blame, and stays well."""

import asyncio
import contextlib
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import PATIENCE, Daemon, Server, StartDaemon, ask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import faasd_async

LONG = bool(os.environ.get("FAASD_ASYNC_LONG_TESTS"))  # the same with the sizes of the real world
FUZZ = settings(
    max_examples=5_000 if LONG else 100,
    derandomize=not LONG,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
async def gateway(daemon: StartDaemon, function: Server, sink: Server) -> AsyncIterator[Daemon]:
    """A daemon with a sync and an async function; still well when the test ends."""
    gateway = await daemon(
        f'[functions.echo]\nurl = "{function.url}"\n[functions.later]\nurl = "{function.url}"\ntype = "async"\n'
        '[gateway]\nread_timeout = "2s"\n[callback]\ndeny = ["denied.example", "10.0.0.0/8"]\nattempts = 1\n'
        "[queues.slow]\nmax_inflight = 1\n[retry]\nattempts = 1"
    )
    yield gateway
    assert [(await ask(gateway.url, path)).status for path in ("/healthz", "/readyz")] == [200, 200]
    assert (await ask(gateway.url, "/function/echo")).status == 200
    assert "failed in this program itself" not in gateway.log


def exchange(gateway: Daemon, data: bytes, wait: float = PATIENCE) -> bytes:
    """What the gateway says to this, until it hangs up or has said nothing for `wait` seconds."""
    address, received = urlsplit(gateway.url), b""
    with socket.create_connection((address.hostname, address.port), PATIENCE) as sock, contextlib.suppress(OSError):
        sock.sendall(data)
        sock.settimeout(wait)
        while piece := sock.recv(2**16):
            received += piece
    return received


# What may be answered: no 500 (that would be ours), and of the others only those that are documented.
STATUSES = {200, 202, 302, 400, 401, 403, 404, 405, 408, 409, 410, 413, 421, 422, 429, 501, 502, 503, 504, 505, 508}
HEAD = re.compile(rb"HTTP/1\.[01] (\d{3}) [ -~]*\r\n((?:[!-9;-~]+: [\t -~\x80-\xff]*\r\n)*)\r\n")


def check(received: bytes, head_only: bool = False) -> list[tuple[int, bytes]]:
    """The answers in what was received, each of which has to be whole and in order; or the head of the first."""
    found = list[tuple[int, bytes]]()
    while received:
        match = HEAD.match(received)
        assert match, received[:300]
        status, rest = int(match[1]), received[match.end() :]
        if status == 100:
            received = rest
            continue
        assert status in STATUSES, received[:300]
        length = re.search(rb"(?mi)^content-length: (\d+)\r$", match[2])
        assert length or re.search(rb"(?mi)^transfer-encoding: chunked\r$", match[2]) or status == 204, received[:300]
        size = int(length[1]) if length else 0
        if head_only or not length:
            return [*found, (status, rest)]
        assert len(rest) >= size
        assert b"Traceback" not in rest[:size]
        found.append((status, rest[:size]))
        received = rest[size:]
    return found


async def fuzz(test: Callable[[], None]) -> None:
    """Run a hypothesis test beside this loop, which serves the functions."""
    await asyncio.to_thread(test)


# ---- bytes -----------------------------------------------------------------------------------------------------

WORDS = st.sampled_from([
    b"GET", b"POST", b"DELETE", b"HEAD", b"PUT", b"OPTIONS", b"TRACE", b" ", b"  ", b"\t", b"\r\n", b"\n", b"\r", b"\0",
    b"/function/echo", b"/async-function/echo", b"/r/app/later", b"/system/calls", b"/metrics", b"*", b"http://x/y",
    b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"HTTP/9.9", b"Host: x\r\n", b"Connection: close\r\n", b"\r\n\r\n", b": ",
    b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"0", b"5", b"-1", b"ffff",
    b"5\r\nhello\r\n", b"0\r\n\r\n", b"X-Call-Id: ", b"X-Delay: 1h\r\n", b"Upgrade: x\r\n", b"X" * 9000, b"\xff",
])  # fmt: skip
BYTES = st.lists(WORDS | st.binary(max_size=8), max_size=14).map(b"".join)


async def test_any_bytes_are_answered_in_http_or_not_at_all(gateway: Daemon) -> None:
    """Random bytes and random pieces of requests."""

    @FUZZ
    @given(BYTES)
    def test(data: bytes) -> None:
        check(exchange(gateway, data, 0.02), head_only=b"HEAD" in data)

    await fuzz(test)


METHODS = st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
ROUTES = st.sampled_from(
    ["/", "/function/", "/async-function/", "/system/", "/system/calls/", "/system/queues/", "/r/", "/v1/apps/", "/ui/"]
)
SEGMENTS = st.sampled_from([
    "echo", "later", "echo.openfaas-fn", "calls", "log", "retry", "slow", "pause", "resume", "purge", "functions",
    "info", "@callbacks", "..", ".", "%2e%2e", "%00", "%", "%zz", "%ff", "?", "??", "?a=b", "?status=", "#", ";", "",
    "a" * 300,
]) | st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=6)  # fmt: skip
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            ["Accept", "Authorization", "Connection", "Via", "X-Forwarded-For", "X-Forwarded-Host", "Expect"]
        )
        | st.text("abcXYZ-_!#$%&'*+.^`|~019", min_size=1, max_size=8).filter(lambda name: name != "TE"),
        st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20)
        | st.sampled_from(["application/json", "Basic !!!", "close", "100-continue", "keep-alive, host"]),
    ),
    max_size=4,
)


async def test_any_request_is_answered(gateway: Daemon) -> None:
    """Well-formed requests with any method, path and headers: always one answer, and one that is documented."""

    @FUZZ
    @given(METHODS, ROUTES, st.lists(SEGMENTS, max_size=4).map("/".join), HEADERS, st.binary(max_size=20))
    def test(method: str, route: str, rest: str, headers: list[tuple[str, str]], body: bytes) -> None:
        lines = [f"{method} {route}{rest} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers]
        data = "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body
        found = check(exchange(gateway, data))
        assert len(found) == 1, (data, found)
        status, text = found[0]
        if status >= 400 and not route.startswith(("/r/", "/v1/")):
            assert text.count(b"\n") == 1, text
        elif route.startswith("/v1/"):
            assert isinstance(json.loads(text), dict)

    await fuzz(test)


# ---- control headers -------------------------------------------------------------------------------------------

NUMBERS = st.integers(-10, 10**25).map(str) | st.floats(allow_nan=True).map(str)
TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30)
DURATIONS = st.lists(
    st.tuples(NUMBERS, st.sampled_from(["h", "m", "s", "ms", "us", "µs", "ns", "d", ""])), max_size=3
).map(lambda parts: "".join(number + unit for number, unit in parts))
TIMES = (
    st.datetimes()
    .map(lambda time: time.isoformat())
    .flatmap(
        lambda time: st.sampled_from([time, time + "Z", time + "+23:59", time + "-23:59", time.replace("T", " ") + "Z"])
    )
)
HOSTS = st.sampled_from(
    ["denied.example", "10.1.2.3", "[::1]", "[fe80::1%25eth0]", "169.254.1.1", "gateway", "127.0.0.1"]
)
URLS = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["http://", "https://", "HTTP://", "ftp://", "//", "http:/", ""]),
    st.sampled_from(["", "user@", "user:pass@", ":@", "a@b@", "%zz@"]),
    HOSTS
    | TEXT
    | st.sampled_from(["a" * 64 + ".example", ".", "..", "xn--", "xn--zzzzzz", "[", "[]", "0", "1.2.3.4.5"]),
    st.sampled_from(["", ":1", ":0", ":", ":65536", ":-1", ":x", ":80:80"]),
    st.sampled_from(["", "/", "/a?b#c", "?", "/%zz", "/ /", "/../.."]),
)
CONTROLS = {
    "X-Call-Id": TEXT,
    "Idempotency-Key": TEXT,
    "X-Concurrency-Key": TEXT,
    "X-Delay": DURATIONS,
    "X-Not-Before": TIMES | NUMBERS,
    "X-Deadline": DURATIONS | TIMES | NUMBERS,
    "X-Max-Attempts": NUMBERS,
    "X-Queue": st.sampled_from(["slow", "faas-request", "@callbacks", ""]),
    "X-Callback-Url": URLS,
    "X-Failure-Callback-Url": URLS,
}
CONTROL = st.sampled_from(sorted(CONTROLS)).flatmap(
    lambda name: st.tuples(st.just(name), CONTROLS[name] | TEXT | NUMBERS)
)


async def test_any_control_is_taken_or_named(gateway: Daemon) -> None:
    """202 and a record that can be read, or a refusal that says which header is wrong."""
    accepted: list[str] = []

    @FUZZ
    @given(st.lists(CONTROL, min_size=1, max_size=3, unique_by=lambda control: control[0]), st.binary(max_size=3))
    def test(controls: list[tuple[str, str]], body: bytes) -> None:
        lines = [
            "POST /async-function/echo HTTP/1.1",
            "Host: localhost",
            "Accept: application/json",
            "Connection: close",
        ]
        lines += [f"{name}: {value}" for name, value in controls] + [f"Content-Length: {len(body)}", "", ""]
        ((status, text),) = check(exchange(gateway, "\r\n".join(lines).encode("latin-1") + body))
        assert status in (202, 400, 404, 422, 429), (controls, text)
        if status == 202:
            call_id = json.loads(text)["call_id"]
            place = "/system/calls/" + "".join(f"%{byte:02x}" for byte in call_id.encode())
            request = f"GET {place} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            ((status, text),) = check(exchange(gateway, request))
            assert (status, json.loads(text)["call_id"]) == (200, call_id)
            accepted.append(call_id)
        else:
            assert text.count(b"\n") == 1
            assert any(name.encode() in text for name, _ in controls), (controls, text)

    await fuzz(test)
    assert len(accepted) > FUZZ.max_examples // 20
    assert (await ask(gateway.url, "/system/calls?limit=1000")).status == 200


# ---- the operator's routes -------------------------------------------------------------------------------------

FILTERS = st.lists(
    st.tuples(
        st.sampled_from(["status", "function", "queue", "call_id", "limit", "cursor", "wait", "path", "nosuch", ""]),
        st.sampled_from(
            ["success", "echo", "echo.openfaas-fn", "slow", "1", "0", "1000", "9" * 18, "9" * 19, "-1", "1s"]
        )
        | st.sampled_from(["%00", "%ff", "%27%3B", "+", "", "%", "1e3", "\u0663".encode("unicode_escape").decode()])
        | st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#"), max_size=8),
    ).map("=".join),
    max_size=4,
).map("&".join)


async def test_any_question_about_calls_is_answered(gateway: Daemon) -> None:
    """200 with JSON, or 400 or 404 with the reason, in Fn's form where Fn's routes are asked."""
    ids = [await gateway.submit("echo", X_Call_Id=call_id) for call_id in ("a/b", "%41", "x")]
    paths = ["/system/calls", "/system/calls/a%2Fb", "/system/calls/%2541", "/system/calls/x/log", "/system/calls//"]
    paths += [
        "/v1/apps/a/calls",
        "/v1/apps/%2F/calls",
        "/v1/apps/a/calls/x",
        "/v1/apps/a/calls/x/log",
        "/v1/apps//calls",
    ]
    paths += [
        "/system/queues",
        "/metrics",
        "/system/functions",
        "/system/function/echo",
        "/system/info",
        "/system/logs",
    ]

    @FUZZ
    @given(st.sampled_from(paths), FILTERS)
    def test(path: str, query: str) -> None:
        data = f"GET {path}?{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        ((status, text),) = check(exchange(gateway, data))
        assert status in (200, 400, 404), text
        if path.startswith("/v1/") or (status == 200 and not path.endswith(("/log", "/logs", "/metrics"))):
            assert isinstance(json.loads(text), dict | list)

    await fuzz(test)
    assert [(await gateway.final(call_id.replace("/", "%2F").replace("%41", "%2541")))["status"] for call_id in ids]


# ---- the configuration -----------------------------------------------------------------------------------------


TOML = st.sampled_from([
    "[gateway]", "[functions.a]", "[[functions]]", "[queues.'']", "[", "]", "=", '"', '"""', "'''", "\n", ".", ",", "{",
    "}", "#", "listen", "url", "command", "retry", "codes", "a", "1", "-1", "1e400", "nan", "inf", "true", "2020-01-01",
]) | st.text(max_size=3)  # fmt: skip


@FUZZ
@given(text=st.lists(TOML, max_size=20).map("".join))
def test_any_text_is_a_configuration_or_is_refused(text: str, tmp_path_factory: Any) -> None:
    """Whatever somebody types into the file."""
    path = Path(tmp_path_factory.getbasetemp()) / "fuzz.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        faasd_async.load_config(str(path))
    except faasd_async.ConfigError as exc:
        assert all(line.startswith(f"{path}: ") and "\n" not in line for line in exc.problems)
