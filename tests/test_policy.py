"""The rules: what follows from an outcome, when, where a callback may go, and who is next. All of them are pure."""

import base64
import bisect
import contextlib
import email.utils
import functools
import hashlib
import hmac
import itertools
import operator
import random
import re
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import pytest
from conftest import Clock
from hypothesis import example, given, settings
from hypothesis import strategies as st

import faasd_async
from faasd_async import (
    CallbackConfig,
    Decision,
    Excerpt,
    Lanes,
    Origin,
    Outcome,
    RetryPolicy,
    backoff_s,
    callback_allowed,
    callback_host,
    callback_lane,
    callback_target,
    callback_url,
    called_host,
    decide,
    destination_of,
    first_start,
    forward_headers,
    host_of,
    new_id,
    next_start,
    pack_headers,
    parse_config,
    parse_when,
    rate,
    retry_after_s,
    rfc3339,
    sent_target,
    shorten,
    show_url,
    split_target,
    starts_now,
    store_line,
    trace_context,
    unpack_headers,
    webhook_signature,
)

DETERMINISTIC = settings(derandomize=True, deadline=None)
NOW = 1_700_000_000.0
POLICY = RetryPolicy()
DAY = 86_400.0


def outcome(status: int, retry_after: str | None = None, **more: Any) -> Outcome:
    """A function's answer, or (with answered) the lack of one."""
    headers = () if retry_after is None else ((b"Retry-After", retry_after.encode()),)
    return Outcome(status, status < 400, 0.1, headers, **more)


def verdict(result: Outcome, attempt: int = 1, max_attempts: int = 10, policy: RetryPolicy = POLICY) -> Decision:
    """What follows from an outcome, with no chance in it."""
    return decide(result, attempt, max_attempts, policy, NOW, random.Random(0))


REFUSED = outcome(502, answered=False, error="function it can't be reached: Connection refused")
TIMED_OUT = outcome(504, answered=False)

# ---- decide ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 204, 301, 304])
def test_an_answer_below_400_is_a_success(status: int) -> None:
    """A redirect is the function's answer, too."""
    assert verdict(outcome(status)) == Decision("success")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_failure_that_may_go_away_is_tried_again(status: int) -> None:
    """These codes are retried by default, after the first wait."""
    assert verdict(outcome(status)) == Decision("queued", 10.0)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 413, 422, 499, 501, 505])
def test_any_other_failure_is_final(status: int) -> None:
    """The same request would fail in the same way."""
    assert verdict(outcome(status)) == Decision("error")


@pytest.mark.parametrize(("attempt", "status"), [(1, "queued"), (2, "queued"), (3, "error"), (4, "error")])
def test_attempts_are_used_up_with_the_last_one(attempt: int, status: str) -> None:
    """max_attempts counts every run, the first one included."""
    assert verdict(outcome(500), attempt, 3).status == status


def test_a_call_that_may_run_once_is_not_tried_again() -> None:
    """One attempt means one attempt."""
    assert verdict(outcome(503), 1, 1) == Decision("error")


def test_a_timeout_is_tried_again_like_504() -> None:
    """504 stands for the answer that did not come."""
    assert verdict(TIMED_OUT) == Decision("queued", 10.0)


def test_the_last_timeout_ends_in_timeout() -> None:
    """The state tells a function that is too slow from one that fails."""
    assert verdict(TIMED_OUT, 10) == Decision("timeout")


def test_a_function_that_itself_answers_504_ends_in_error() -> None:
    """It did answer in time."""
    assert verdict(outcome(504), 10) == Decision("error")


def test_a_timeout_is_final_where_504_is_not_retried() -> None:
    """`codes` rules timeouts as well."""
    assert verdict(TIMED_OUT, policy=RetryPolicy(codes=frozenset({500}))) == Decision("timeout")


def test_a_refused_connection_is_tried_again_like_502() -> None:
    """The function may be about to start."""
    assert verdict(REFUSED) == Decision("queued", 10.0)


def test_a_refused_connection_is_final_where_502_is_not_retried() -> None:
    """`codes` rules connection failures as well."""
    assert verdict(REFUSED, policy=RetryPolicy(codes=frozenset({500}))) == Decision("error")


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_replaces_the_computed_wait(status: int) -> None:
    """The function knows better when it will be ready."""
    assert verdict(outcome(status, "77")) == Decision("queued", 77.0)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_may_be_a_date(status: int) -> None:
    """The other form of RFC 9110 10.2.3."""
    date = email.utils.formatdate(NOW + 90, usegmt=True)
    assert verdict(outcome(status, date)) == Decision("queued", 90.0)


@pytest.mark.parametrize("status", [408, 500, 502, 504])
def test_retry_after_counts_on_429_and_503_only(status: int) -> None:
    """Elsewhere the header has no meaning."""
    assert verdict(outcome(status, "77")) == Decision("queued", 10.0)


@pytest.mark.parametrize("asked", ["0", "3", email.utils.formatdate(NOW - 60, usegmt=True)])
def test_retry_after_is_never_below_min_wait(asked: str) -> None:
    """A function that asks to be called at once is not hammered."""
    assert verdict(outcome(429, asked)) == Decision("queued", 10.0)


def test_retry_after_may_ask_for_more_than_max_wait() -> None:
    """max_wait limits the computed wait only."""
    assert verdict(outcome(503, "600")) == Decision("queued", 600.0)


@pytest.mark.parametrize("asked", ["999999999", email.utils.formatdate(NOW + 400 * DAY, usegmt=True)])
def test_retry_after_may_not_ask_for_eternity(asked: str) -> None:
    """A call that waits longer than a day is as good as lost."""
    assert verdict(outcome(503, asked)) == Decision("queued", DAY)


def test_a_retry_after_that_says_nothing_leaves_the_computed_wait() -> None:
    """Neither seconds nor a date."""
    assert verdict(outcome(429, "soon"), attempt=2) == Decision("queued", 20.0)


def test_retry_after_does_not_give_another_attempt() -> None:
    """Attempts are used up all the same."""
    assert verdict(outcome(429, "5"), 10) == Decision("error")


@given(st.integers(100, 599), st.integers(1, 30), st.integers(1, 30), st.booleans())
@DETERMINISTIC
def test_every_outcome_is_final_or_waits(status: int, attempt: int, max_attempts: int, answered: bool) -> None:
    """There is no third way, and nothing is tried more often than allowed."""
    found = verdict(outcome(status, answered=answered), attempt, max_attempts)
    if found.delay_s is None:
        assert found.status in ("success", "error", "timeout")
    else:
        assert (found.status, attempt < max_attempts) == ("queued", True)
        assert POLICY.min_wait <= found.delay_s <= POLICY.max_wait


# ---- Retry-After -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "soon", "-5", "1.5", "5s", "Mon, 99 Foo 2023 00:00:00 GMT", "١٢"])
def test_a_malformed_retry_after_says_nothing(value: str | None) -> None:
    """What is in neither form is ignored."""
    assert retry_after_s(value, NOW) is None


@pytest.mark.parametrize("form", ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %e %H:%M:%S %Y"])
@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_all_three_forms_of_an_http_date_are_read(form: str, zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 9110 5.6.7 asks for the obsolete ones as well; all of them are in GMT wherever this program runs."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert retry_after_s(datetime.fromtimestamp(NOW + 90, UTC).strftime(form), NOW) == 90.0
    finally:
        monkeypatch.undo()
        time.tzset()


@given(st.text(max_size=40))
@DETERMINISTIC
def test_no_retry_after_is_an_error(value: str) -> None:
    """A function can't break its caller with a header."""
    found = retry_after_s(value, NOW)
    assert found is None or 0 <= found <= DAY


# ---- back-off --------------------------------------------------------------------------------------------------


def test_the_wait_doubles_up_to_max_wait() -> None:
    """Exponential back-off as OpenFaaS Pro documents it."""
    waits = [backoff_s(POLICY, attempt, random.Random(0)) for attempt in range(1, 8)]
    assert waits == [10.0, 20.0, 40.0, 80.0, 120.0, 120.0, 120.0]


ATTEMPTS = st.integers(1, 10**6)
WAITS = st.floats(0, 3600)


@given(ATTEMPTS, WAITS, WAITS, st.randoms(use_true_random=False))
@DETERMINISTIC
def test_full_jitter_waits_anything_up_to_the_wait(
    attempt: int, min_wait: float, more: float, rng: random.Random
) -> None:
    """Calls that failed together do not come back together."""
    policy = RetryPolicy(min_wait=min_wait, max_wait=min_wait + more, backoff="full")
    wait = backoff_s(RetryPolicy(min_wait=min_wait, max_wait=min_wait + more), attempt, rng)
    assert 0 <= backoff_s(policy, attempt, rng) <= wait <= policy.max_wait


@given(ATTEMPTS, WAITS, WAITS, st.randoms(use_true_random=False))
@DETERMINISTIC
def test_equal_jitter_waits_at_least_half(attempt: int, min_wait: float, more: float, rng: random.Random) -> None:
    """Between a half and the whole of the wait."""
    policy = RetryPolicy(min_wait=min_wait, max_wait=min_wait + more, backoff="equal")
    wait = backoff_s(RetryPolicy(min_wait=min_wait, max_wait=min_wait + more), attempt, rng)
    assert wait / 2 <= backoff_s(policy, attempt, rng) <= wait


@pytest.mark.parametrize("backoff", ["full", "equal"])
def test_jitter_is_spread(backoff: str) -> None:
    """A hundred calls get a hundred different waits."""
    rng = random.Random(0)
    assert len({backoff_s(RetryPolicy(backoff=backoff), 3, rng) for _ in range(100)}) == 100


@given(ATTEMPTS)
@DETERMINISTIC
def test_without_jitter_the_wait_never_shrinks(attempt: int) -> None:
    """However many attempts there have been, the next wait is at least as long."""
    rng = random.Random(0)
    assert backoff_s(POLICY, attempt, rng) <= backoff_s(POLICY, attempt + 1, rng) <= POLICY.max_wait


# ---- callbacks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 501, 502, 503, 504, 599])
def test_a_callback_is_tried_again(status: int) -> None:
    """408, 429 and every 5xx."""
    policy = CallbackConfig().policy
    assert verdict(outcome(status), policy=policy) == Decision("queued", 5.0)


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 401, 403, 404, 410, 413, 422])
def test_any_other_answer_to_a_callback_is_final(status: int) -> None:
    """A redirect would drop the body, and what is refused stays refused."""
    policy = CallbackConfig().policy
    assert verdict(Outcome(status, False, 0.1), policy=policy).delay_s is None


def test_a_callback_has_its_own_attempts_and_waits() -> None:
    """[callback] rules, not [retry]."""
    policy = parse_config({"callback": {"attempts": 3, "min_wait": "2s", "max_wait": "3s"}}).callback.policy
    assert [backoff_s(policy, attempt, random.Random(0)) for attempt in (1, 2)] == [2.0, 3.0]
    assert policy.attempts == 3


@pytest.mark.parametrize(
    ("status", "url", "failure_url", "target"),
    [
        ("success", "http://a/", None, "http://a/"),
        ("success", "http://a/", "http://b/", "http://a/"),
        ("success", None, "http://b/", None),
        ("error", "http://a/", None, "http://a/"),
        ("error", "http://a/", "http://b/", "http://b/"),
        ("timeout", "http://a/", "http://b/", "http://b/"),
        ("timeout", None, "http://b/", "http://b/"),
        ("error", None, None, None),
    ],
)
def test_failures_go_to_the_failure_url(
    status: str, url: str | None, failure_url: str | None, target: str | None
) -> None:
    """X-Failure-Callback-Url instead of X-Callback-Url, where there is one."""
    assert callback_target(status, url, failure_url) == target


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://example.org", "example.org"),
        ("https://example.org:8443/path?query#fragment", "example.org"),
        ("HTTP://EXAMPLE.org/", "example.org"),
        ("http://user:password@example.org/", "example.org"),
        ("http://[::1]:8080/", "::1"),
        ("http://[fe80::1%25eth0]/", "fe80::1%eth0"),
        ("http://example.org.:/", "example.org"),
        ("http://10.1.2.3", "10.1.2.3"),
        ("http://xn--exmple-cua.org/", "xn--exmple-cua.org"),
        ("http://gateway:8080/async-function/next", "gateway"),
    ],
)
def test_the_host_of_a_callback_url(url: str, host: str) -> None:
    """What the lists of allowed and denied hosts are compared with."""
    assert callback_host(url) == host


@pytest.mark.parametrize(
    "url",
    [
        "", "example.org", "/path", "//example.org/", "ftp://example.org/", "file:///etc/passwd", "http://", "http:///p",
        "http:example.org", "http://exa mple.org/", "http://example.org/a b", "http://example.org/\r\nX: y",
        "http://exämple.org/", "http://example.org:0/", "http://example.org:70000/", "http://example.org:http/",
        "http://[::1/", "http://" + "a" * 5000, "javascript:alert(1)", "http://user:pass@/",
        "http://[2:]/", "http://[:]/", "http://[v1.x]/", "http://[::1]x/", "http://a]b/", "http://[a]@b/",
        "http://[](@x/", "http://x:+1/", "http://x:1_0/", "http://x:%31/", "http://a%2eb/",
        "http://[::1%25a/b]/", "http://[1.2.3.4]/", "http://a:b:80/", "http://[x:y]/",
    ],
)  # fmt: skip
def test_a_callback_url_that_is_not_absolute_http_is_refused(url: str) -> None:
    """It would fail later, when nobody is there to be told."""
    with pytest.raises(ValueError, match="expected an absolute http:// or https:// URL"):
        callback_host(url)


ODD_URLS = st.text(st.sampled_from("http://:@[]%/?#.a1x-_25\\ \x7f~!$&'()*+,;="), max_size=24).map("http://".__add__)


@given(ODD_URLS)
def test_a_callback_url_that_is_taken_can_be_called(url: str) -> None:
    """What is no URL of a host is refused with one kind of error; all else can be made a request of."""
    with contextlib.suppress(ValueError):
        host = callback_host(url)
        called, _ = callback_url(url)
        assert host == host_of(called)
        destination_of(called, Origin(called_host(called), called.port or 80, None, None))
        assert callback_lane(url).lower().startswith(("[", host[:1]))


@given(st.text() | ODD_URLS)
def test_every_text_has_a_lane(text: str) -> None:
    """What is no URL any more ends like all else."""
    callback_lane(text)


def callbacks(**lists: list[str]) -> CallbackConfig:
    """A [callback] table with lists of hosts."""
    return parse_config({"callback": lists}).callback


OPEN = callbacks()
ONE_HOST = callbacks(allow=["hooks.example.org"])
WILDCARD = callbacks(allow=["*.example.org"])
NETWORK = callbacks(allow=["10.0.0.0/8", "fd00::/8"])
NO_PRIVATE = callbacks(deny=["10.0.0.0/8", "127.0.0.0/8", "::1", "localhost", "*.internal"])
METADATA = callbacks(allow=["169.254.169.254", "fe80::1"])
BOTH = callbacks(allow=["*.example.org", "10.0.0.0/8"], deny=["evil.example.org", "10.6.6.6"])


@pytest.mark.parametrize(
    ("config", "host", "address", "allowed"),
    [
        # nothing configured: everywhere but to link-local addresses
        (OPEN, "example.org", None, True),
        (OPEN, "example.org", "93.184.216.34", True),
        (OPEN, "127.0.0.1", None, True),
        (OPEN, "10.1.2.3", "10.1.2.3", True),
        (OPEN, "169.254.169.254", None, False),
        (OPEN, "169.254.0.1", "169.254.0.1", False),
        (OPEN, "example.org", "169.254.169.254", False),
        (OPEN, "fe80::1", None, False),
        (OPEN, "fe80::1%eth0", None, False),
        (OPEN, "example.org", "fe80::1%eth0", False),
        (OPEN, "::ffff:169.254.169.254", None, False),
        (OPEN, "example.org", "::ffff:169.254.169.254", False),
        # and to what translators and tunnels would take there
        (OPEN, "64:ff9b::a9fe:a9fe", None, False),
        (OPEN, "64:ff9b:1::169.254.169.254", None, False),
        (OPEN, "::169.254.169.254", None, False),
        (OPEN, "::ffff:0:169.254.169.254", None, False),
        (OPEN, "2002:a9fe:a9fe::1", None, False),
        (OPEN, "2001:0:4136:e378:8000:63bf:5601:5601", None, False),
        (OPEN, "example.org", "64:ff9b::a9fe:a9fe", False),
        (OPEN, "64:ff9b::5db8:d822", None, True),
        (OPEN, "2002:5db8:d822::1", None, True),
        # and where clouds have their metadata in IPv6
        (OPEN, "fd00:ec2::254", None, False),
        (OPEN, "example.org", "fd20:ce::254", False),
        (OPEN, "fd00::1", None, True),
        # link-local addresses that are allowed
        (METADATA, "169.254.169.254", None, True),
        (METADATA, "::ffff:169.254.169.254", None, True),
        (METADATA, "fe80::1%eth0", None, True),
        (METADATA, "64:ff9b::a9fe:a9fe", None, True),
        (METADATA, "169.254.1.1", None, False),
        # a list of allowed names
        (ONE_HOST, "hooks.example.org", None, True),
        (ONE_HOST, "HOOKS.Example.ORG", None, True),
        (ONE_HOST, "hooks.example.org.", None, True),
        (ONE_HOST, "hooks.example.org", "93.184.216.34", True),
        (ONE_HOST, "other.example.org", None, False),
        (ONE_HOST, "hooks.example.org.evil.net", None, False),
        (ONE_HOST, "10.1.2.3", None, False),
        (WILDCARD, "hooks.example.org", None, True),
        (WILDCARD, "a.b.example.org", None, True),
        (WILDCARD, "example.org", None, False),
        (WILDCARD, "evilexample.org", None, False),
        # a list of allowed networks: a name is undecided until it is resolved
        (NETWORK, "10.1.2.3", None, True),
        (NETWORK, "11.1.2.3", None, False),
        (NETWORK, "fd00::1", None, True),
        (NETWORK, "fe80::1", None, False),
        (NETWORK, "::ffff:10.1.2.3", None, True),
        (NETWORK, "64:ff9b::10.1.2.3", None, False),
        (NETWORK, "example.org", None, True),
        (NETWORK, "example.org", "10.1.2.3", True),
        (NETWORK, "example.org", "93.184.216.34", False),
        (NETWORK, "example.org", "169.254.169.254", False),
        # a list of what is denied
        (NO_PRIVATE, "example.org", None, True),
        (NO_PRIVATE, "example.org", "93.184.216.34", True),
        (NO_PRIVATE, "example.org", "10.1.2.3", False),
        (NO_PRIVATE, "10.1.2.3", None, False),
        (NO_PRIVATE, "::ffff:10.1.2.3", None, False),
        (NO_PRIVATE, "64:ff9b::10.1.2.3", None, False),
        (NO_PRIVATE, "2002:a01:203::", None, False),
        (NO_PRIVATE, "example.org", "2002:a01:203::", False),
        (NO_PRIVATE, "0.0.0.0", None, False),
        (NO_PRIVATE, "0", None, False),
        (NO_PRIVATE, "::", None, False),
        (NO_PRIVATE, "example.org", "0.0.0.0", False),
        (NO_PRIVATE, "::1", None, False),
        (NO_PRIVATE, "localhost", None, False),
        (NO_PRIVATE, "LOCALHOST.", None, False),
        (NO_PRIVATE, "db.internal", None, False),
        # both: denied wins
        (BOTH, "hooks.example.org", None, True),
        (BOTH, "evil.example.org", None, False),
        (BOTH, "10.1.2.3", None, True),
        (BOTH, "10.6.6.6", None, False),
        (BOTH, "hooks.example.org", "10.6.6.6", False),
        (BOTH, "elsewhere.net", "93.184.216.34", False),
    ],
)
def test_where_a_callback_may_go(config: CallbackConfig, host: str, address: str | None, allowed: bool) -> None:
    """Checked with the name when the call is accepted, and with the address when it is connected to."""
    assert callback_allowed(host, address, config) is allowed


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (None, None),
        ("http://example.org/a?b=c", "http://example.org/a?b=c"),
        ("http://user:password@example.org/a", "http://example.org/a"),
        ("https://token@example.org:8443", "https://example.org:8443"),
        ("http://a@b@example.org/", "http://example.org/"),
        ("http://example.org/@user", "http://example.org/@user"),
        ("http://example.org?q=a@b", "http://example.org?q=a@b"),
    ],
)
def test_credentials_in_a_url_are_not_shown(url: str | None, shown: str | None) -> None:
    """They are used and never shown."""
    assert show_url(url) == shown


def test_credentials_of_each_server_are_not_shown() -> None:
    """A cluster's servers are shown in one line."""
    servers = ["nats://user:secret@one:4222", "tls://token@two:4222", "nats://three:4222"]
    config = parse_config({"store": {"backend": "nats"}, "nats": {"servers": servers}})
    assert store_line(config).startswith("store nats://one:4222 tls://two:4222 nats://three:4222:")


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("http://gateway.example/function/near?q=http://x", "/function/near?q=http://x"),
        ("http://user@gateway.example:8080/", "/"),
        ("http://gateway.example", "/"),
        ("http://gateway.example?q=1", "/?q=1"),
        ("*", "/"),
    ],
)
def test_a_target_in_absolute_form_is_a_path_with_its_query(target: str, path: str) -> None:
    """As it is sent to a proxy (RFC 9112 3.2.2), where the path may be empty."""
    assert sent_target(target) == path


# ---- times -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "at"),
    [
        ("0", 0.0),
        ("1700000000", NOW),
        ("1700000000.25", NOW + 0.25),
        ("2023-11-14T22:13:20Z", NOW),
        ("2023-11-14T22:13:20.5Z", NOW + 0.5),
        ("2023-11-14T23:13:20+01:00", NOW),
        ("2023-11-14 17:13:20-05:00", NOW),
    ],
)
def test_a_time_is_rfc_3339_or_unix_seconds(value: str, at: float) -> None:
    """The two forms of X-Not-Before and X-Deadline."""
    assert parse_when(value) == at


@pytest.mark.parametrize(
    "value", ["99999999999", "9999-12-31T23:59:59Z", "9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+14:00"]
)
def test_a_time_that_is_taken_can_be_written(value: str) -> None:
    """However far away it is, the record of the call shows it."""
    assert (rfc3339(parse_when(value)) or "").endswith("Z")


@pytest.mark.parametrize(
    "value", ["", "now", "-5", "1e9", "nan", "inf", "2023-11-14T22:13:20", "2023-11-14", "tomorrow", "999999999999"]
)
def test_a_time_that_could_mean_several_things_is_refused(value: str) -> None:
    """A time without a zone, above all."""
    with pytest.raises(ValueError, match="RFC 3339"):
        parse_when(value)


@pytest.mark.parametrize(
    ("at", "written"),
    [
        (None, None),
        (0.0, "1970-01-01T00:00:00.000000Z"),
        (NOW, "2023-11-14T22:13:20.000000Z"),
        (NOW + 0.5, "2023-11-14T22:13:20.500000Z"),
    ],
)
def test_a_time_is_written_in_utc_with_z(at: float | None, written: str | None) -> None:
    """Microseconds are always there, so that the texts sort as the times do."""
    assert rfc3339(at) == written


@given(st.integers(0, 4_000_000_000_000_000))
@DETERMINISTIC
def test_a_written_time_reads_back(microseconds: int) -> None:
    """What a record shows may be sent as X-Not-Before."""
    assert parse_when(rfc3339(microseconds / 1e6) or "") == pytest.approx(microseconds / 1e6, abs=1e-6)


# ---- targets and headers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "name", "rest"),
    [
        ("figlet", "figlet", ""),
        ("figlet/", "figlet", "/"),
        ("figlet/a/b?c=d", "figlet", "/a/b?c=d"),
        ("figlet?a=b/c", "figlet", "?a=b/c"),
        ("figlet?", "figlet", "?"),
        ("figlet//a/../b", "figlet", "//a/../b"),
        ("figlet.dev/%2e%2E/%20", "figlet.dev", "/%2e%2E/%20"),
        ("fi%67let%2Edev/%67?%67", "figlet.dev", "/%67?%67"),
        ("a%2Fb%3Fc/d", "a/b?c", "/d"),
        ("%", "%", ""),
        ("", "", ""),
    ],
)
def test_a_target_is_split_after_the_functions_name(target: str, name: str, rest: str) -> None:
    """The name is meant, however it is written (RFC 3986 6.2.2.2); the rest reaches the function byte for byte."""
    assert split_target(target) == (name, rest)


@given(st.text(alphabet="ab/?%. ", max_size=20))
@DETERMINISTIC
def test_no_byte_of_a_target_is_lost(target: str) -> None:
    """Nothing of what the function is sent is normalised or encoded anew."""
    name, rest = split_target(target)
    assert target.endswith(rest)
    assert unquote(target[: len(target) - len(rest)]) == name


NOTHING = frozenset[bytes]()


def test_repeated_headers_are_forwarded_in_order() -> None:
    """Neither joined nor sorted, in the case in which they came."""
    headers = [(b"X-B", b"1"), (b"x-a", b"2"), (b"X-B", b"3")]
    assert forward_headers(headers, NOTHING) == headers


@pytest.mark.parametrize(
    "name",
    [
        b"Connection", b"keep-alive", b"Proxy-Connection", b"Proxy-Authenticate", b"Proxy-Authorization", b"TE",
        b"Trailer", b"Transfer-Encoding", b"UPGRADE", b"Transfer-Encoding ", b"Connection  ",
    ],
)  # fmt: skip
def test_hop_by_hop_headers_are_not_forwarded(name: bytes) -> None:
    """They are about one connection (RFC 9110 7.6.1)."""
    assert forward_headers([(name, b"x"), (b"Accept", b"*/*")], NOTHING) == [(b"Accept", b"*/*")]


def test_headers_that_connection_names_are_not_forwarded() -> None:
    """Whatever their case, wherever they stand, in however many Connection headers."""
    headers = [
        (b"X-One", b"1"), (b"Connection", b"close, x-one"), (b"connection", b"X-TWO ,"), (b"x-two", b"2"),
        (b"X-3", b"3"),
    ]  # fmt: skip
    assert forward_headers(headers, NOTHING) == [(b"X-3", b"3")]


def test_headers_that_are_computed_anew_are_not_forwarded() -> None:
    """Those that the caller of the rule names, in lower case."""
    assert forward_headers([(b"X-Call-Id", b"1"), (b"Accept", b"a")], frozenset((b"x-call-id",))) == [(b"Accept", b"a")]


FIELD_NAMES = st.text("abcXYZ019-_.!#$%&'*+^`|~", min_size=1).map(str.encode)
FIELD_VALUES = st.binary(max_size=30).filter(lambda value: b"\n" not in value)


@given(st.lists(st.tuples(FIELD_NAMES, FIELD_VALUES)))
@DETERMINISTIC
def test_stored_headers_read_back(headers: list[tuple[bytes, bytes]]) -> None:
    """Every byte of names and values, repeats and order included."""
    assert unpack_headers(pack_headers(headers)) == tuple(headers)


def test_no_stored_headers_are_no_headers() -> None:
    """A call that never had an answer."""
    assert unpack_headers(None) == unpack_headers(b"") == ()


@pytest.mark.parametrize("name", [b"Content-Type", b"content-type", b"CONTENT-TYPE"])
def test_a_header_is_found_whatever_its_case(name: bytes) -> None:
    """The first one of that name."""
    found = Outcome(200, True, 0.1, ((b"X", b"1"), (name, b"text/plain"), (name, b"other"))).header(b"content-type")
    assert found == "text/plain"


# ---- ids and signatures ----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """The clock that the daemon's code looks at."""
    found = Clock(NOW)
    monkeypatch.setattr(faasd_async, "time", found)
    yield found
    monkeypatch.undo()


def test_an_id_is_a_uuid_of_version_7() -> None:
    """In its usual form, in lower case."""
    for _ in range(100):
        found = new_id()
        parsed = uuid.UUID(found)
        assert (str(parsed), parsed.version, parsed.variant) == (found, 7, uuid.RFC_4122)


def test_an_id_begins_with_the_milliseconds_of_its_making(clock: Clock) -> None:
    """The first 48 bits (RFC 9562 5.7)."""
    assert uuid.UUID(new_id()).int >> 80 == NOW * 1000


def test_ids_sort_by_their_time(clock: Clock) -> None:
    """One millisecond later is greater, as text too."""
    found = []
    for number in range(50):
        clock.now = NOW + 0.0005 + number / 1000  # the middle of a millisecond, whatever a float makes of it
        found.append(new_id())
    assert found == sorted(found)


def test_ids_of_one_millisecond_differ(clock: Clock) -> None:
    """74 bits of chance are left, and each of them is used."""
    numbers = [uuid.UUID(new_id()).int for _ in range(1000)]
    assert len(set(numbers)) == 1000
    changing = functools.reduce(operator.or_, numbers) ^ functools.reduce(operator.and_, numbers)
    assert changing.bit_count() == 62


BODY = b'{"ok": true}\x00\xff'


def expected_signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """The signature as the Standard Webhooks specification describes it."""
    signed = message_id.encode() + b"." + str(timestamp).encode() + b"." + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode("ascii")


def test_a_callback_is_signed_as_standard_webhooks_says() -> None:
    """HMAC-SHA256 over id, time and body, in base64, after the version."""
    assert webhook_signature(b"s3cret", "call-1", 1_700_000_000, BODY) == {
        "webhook-id": "call-1",
        "webhook-timestamp": "1700000000",
        "webhook-signature": expected_signature(b"s3cret", "call-1", 1_700_000_000, BODY),
    }


def test_a_signing_secret_may_be_in_the_whsec_form() -> None:
    """After the prefix comes the key in base64."""
    key = bytes(range(24))
    found = webhook_signature(b"whsec_" + base64.b64encode(key), "call-1", 5, BODY)
    assert found["webhook-signature"] == expected_signature(key, "call-1", 5, BODY)


def test_the_signature_of_the_specification_comes_out() -> None:
    """The example in the documentation of Standard Webhooks' reference libraries."""
    body = b'{"test": 2432232314}'
    found = webhook_signature(
        b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, body
    )
    assert found["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


# ---- lanes -----------------------------------------------------------------------------------------------------


def served(lanes: Lanes, now: float, fair: bool, number: int) -> list[str]:
    """Take one call at a time, as a consumer with one slot does; lanes go on being due."""
    found = []
    for _ in range(number):
        lane = lanes.next(now, fair)
        assert lane is not None
        found.append(lane)
        if lanes.remove(lane, 1):
            lanes.put(lane, now)
    return found


def test_fair_lanes_take_turns() -> None:
    """A burst in one lane does not hold the others up."""
    lanes = Lanes()
    lanes.add("burst", 1.0, 100)
    lanes.add("a", 2.0, 2)
    lanes.add("b", 3.0, 2)
    assert served(lanes, 5.0, True, 7) == ["burst", "a", "b", "burst", "a", "b", "burst"]


def test_a_lane_that_comes_later_gets_the_next_turn_but_one() -> None:
    """It waits for each of the others once at most."""
    lanes = Lanes()
    lanes.add("a", 1.0, 10)
    lanes.add("b", 1.0, 10)
    assert served(lanes, 5.0, True, 4) == ["a", "b", "a", "b"]
    lanes.add("late", 5.0, 2)
    assert "late" in served(lanes, 5.0, True, 3)


def test_lanes_that_are_not_fair_go_by_due_time() -> None:
    """First in, first out across all functions."""
    lanes = Lanes()
    dues = {"a": deque([1.0, 4.0, 5.0]), "b": deque([2.0, 3.0, 6.0])}
    for lane, times in dues.items():
        lanes.add(lane, times[0], len(times))
    found = []
    while (first := lanes.next(10.0, False)) is not None:
        found.append(dues[first].popleft())
        if lanes.remove(first, 1):
            lanes.put(first, dues[first][0])
    assert found == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize("fair", [True, False])
def test_a_lane_is_not_served_before_its_first_call_is_due(fair: bool) -> None:
    """It tells when that will be."""
    lanes = Lanes()
    lanes.add("a", 10.0)
    assert lanes.next(9.9, fair) is None
    assert lanes.next_at() == 10.0
    assert lanes.next(10.0, fair) == "a"


def test_an_earlier_call_brings_its_lane_forward() -> None:
    """A delayed call does not hold up one that is due before it."""
    lanes = Lanes()
    lanes.add("a", 10.0)
    lanes.add("a", 5.0)
    assert lanes.next(5.0, True) == "a"


def test_a_later_call_does_not_put_its_lane_back() -> None:
    """The first due call of a lane decides."""
    lanes = Lanes()
    lanes.add("a", 5.0)
    lanes.add("a", 10.0)
    assert lanes.next(5.0, True) == "a"


def test_a_call_that_is_far_ahead_costs_no_memory_with_each_that_is_not() -> None:
    """A lane that is put back for it stands in line once, not once for each call that was served meanwhile."""
    lanes = Lanes()
    lanes.add("other", 2e9)
    lanes.add("a", 1e9)
    for _ in range(10_000):
        lanes.add("a", 5.0)
        assert served(lanes, 5.0, True, 1) == ["a"]
        assert lanes.next(5.0, True) == "a"  # as it was put back; nothing more is due
        lanes.put("a", 1e9)
    assert len(lanes.later) < 2000
    assert (lanes.next_at(), lanes.next(1e9, True), lanes.next(1e9, True)) == (1e9, "a", None)
    assert lanes.next(2e9, True) == "other"


def test_an_empty_line_has_no_next_time() -> None:
    """Nothing to wait for."""
    assert Lanes().next_at() == float("inf")


def test_a_lane_without_calls_is_not_served() -> None:
    """Its last call was cancelled while it stood in line."""
    lanes = Lanes()
    lanes.add("a", 1.0)
    lanes.add("b", 2.0)
    lanes.remove("a", 1)
    assert [lanes.next(5.0, True), lanes.next(5.0, True)] == ["b", None]


def test_a_lane_that_was_emptied_begins_anew() -> None:
    """What is left of its old place in line does not count."""
    lanes = Lanes()
    lanes.add("a", 1.0)
    lanes.remove("a", 1)
    lanes.add("a", 10.0)
    assert [lanes.next(5.0, True), lanes.next(10.0, True), lanes.next(10.0, True)] == [None, "a", None]


def test_a_line_that_becomes_fair_serves_every_lane() -> None:
    """A reload may change it while lanes stand in line."""
    lanes = Lanes()
    lanes.add("a", NOW, 10)
    lanes.add("b", NOW, 10)
    served(lanes, NOW + 1, False, 1)
    assert set(served(lanes, NOW + 2, True, 4)) == {"a", "b"}


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "cancel", "serve", "later"]), st.sampled_from("abc"), st.integers(0, 20)),
    max_size=60,
)


@given(STEPS, st.booleans())
@DETERMINISTIC
def test_lanes_agree_with_plain_lists(steps: list[tuple[str, str, int]], fair: bool) -> None:
    """Counts are exact, nothing that is due is missed or served early, and each of the others goes first once."""
    lanes, now = Lanes(), 0.0
    dues: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    passed = Counter[str]()  # how often a lane was due and another one got the turn
    for step, lane, number in steps:
        if step == "add":
            due_at = now + max(0, number - 10)
            dues[lane] = sorted([*dues[lane], due_at])
            lanes.add(lane, due_at)
        elif step == "cancel" and dues[lane]:
            dues[lane].pop(number % len(dues[lane]))
            lanes.remove(lane, 1)
        elif step == "later":
            now += number
        elif step == "serve":
            serve(lanes, dues, passed, now, fair)
        passed = Counter({name: passed[name] for name, times in dues.items() if times and times[0] <= now})
        assert lanes.waiting == {name: len(times) for name, times in dues.items() if times}
        assert lanes.total == sum(map(len, dues.values()))


def serve(lanes: Lanes, dues: dict[str, list[float]], passed: Counter[str], now: float, fair: bool) -> None:
    """One call, the way the queue asks for it: a lane whose time was a lower bound is put back with the true one."""
    heads = {name: times[0] for name, times in dues.items() if times}
    due = {name for name, head in heads.items() if head <= now}
    while (lane := lanes.next(now, fair)) is not None and lane not in due:
        lanes.put(lane, heads[lane])
    if lane is None:
        assert not due
        assert now < lanes.next_at() <= min(heads.values(), default=float("inf"))
        return
    dues[lane].pop(0)
    if lanes.remove(lane, 1):
        lanes.put(lane, max(now, dues[lane][0]) if fair else dues[lane][0])
    passed.update(due - {lane})
    passed[lane] = 0
    assert not fair or all(passed[name] <= 2 for name in due)


# ---- traces -----------------------------------------------------------------------------------------

TRACE = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("parent", [f"00-{TRACE}", f"cc-{TRACE}", f"cc-{TRACE}-more.of.it"])
def test_a_traceparent_of_this_version_or_a_later_one_is_one(parent: str) -> None:
    """W3C Trace Context 3.2.4 tells how a later one is read."""
    assert trace_context([(b"Traceparent", parent.encode())]) == (parent, None)


def test_states_of_a_trace_are_one_list() -> None:
    """W3C Trace Context 3.3.1.1: several headers are one, in their order."""
    headers = [(b"tracestate", b"a=1,b=2"), (b"traceparent", f"00-{TRACE}".encode()), (b"TraceState", b"c=3")]
    assert trace_context(headers) == (f"00-{TRACE}", "a=1,b=2,c=3")


@pytest.mark.parametrize(
    "parents",
    [
        [],
        [""],
        ["00"],
        [f"ff-{TRACE}"],
        [f"00-{TRACE}-more"],
        [f"cc-{TRACE}more"],
        [f"00-{TRACE.upper()}"],
        [f"00-{'0' * 32}-b7ad6b7169203331-01"],
        [f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01"],
        [f"00-{TRACE}", f"00-{TRACE}"],
    ],
)
def test_without_one_valid_traceparent_there_is_no_trace(parents: list[str]) -> None:
    """W3C Trace Context 4.3: nor does its state mean anything."""
    headers = [(b"traceparent", parent.encode()) for parent in parents]
    assert trace_context([*headers, (b"tracestate", b"a=1")]) == (None, None)


# ---- what is kept of something long ------------------------------------------------------------------------------


@DETERMINISTIC
@example(["a" * 29 + "é\n" + "a" * 200], 128)  # The beginning that is kept ends with a line.
@given(st.lists(st.text(st.sampled_from("aé€😀\n"), max_size=60), max_size=12), st.integers(0, 400))
def test_what_comes_in_pieces_is_shortened_as_a_whole(pieces: list[str], keep: int) -> None:
    """However it is cut; to no more bytes than are kept, in whole characters."""
    text = "".join(pieces).encode()
    excerpt = Excerpt(keep)
    for piece in pieces:
        excerpt.add(piece.encode())
    assert excerpt.size == len(text)
    short = excerpt.content()
    assert short == shorten(text, keep)
    assert len(short) <= keep or short == text
    if len(text) <= keep:
        assert short == text
    elif keep >= 128:
        start, number, end = re.split("\n… ([0-9]+) bytes are not kept …\n", short.decode())
        assert text.startswith(start.encode())
        assert text.endswith(end.encode())
        assert int(number) == len(text) - len(start.encode()) - len(end.encode())


# ---- rates -----------------------------------------------------------------------------------------


def starts_of(text: str, lateness: list[float], seconds: float, wanted: int = 1000) -> list[float]:
    """When calls start, each as soon as it may and a little later, as long as there are some."""
    limit, now, next_at, started = rate(text), NOW, 0.0, list[float]()
    for late in itertools.cycle(lateness):
        if now >= NOW + seconds:
            return started
        number = min(wanted, starts_now(limit, next_at, now))
        next_at = next_start(limit, next_at, number, now)
        started += [now] * number
        now = max(now, first_start(limit, next_at, now)) + late
    raise AssertionError


@pytest.mark.no_cover  # It runs thousands of times what others run once. Measured, it takes twice as long.
@pytest.mark.parametrize("text", ["10/1m", "1/7s", "20/1s", "500/1m"])
@DETERMINISTIC
@given(lateness=st.lists(st.floats(0.0001, 0.05), min_size=1, max_size=20))
def test_a_rate_is_held_over_many_periods(text: str, lateness: list[float]) -> None:
    """To two percent, though each claim is up to 50 ms late; and never by more than a tenth more in one period."""
    limit = rate(text)
    seconds = min(600.0, max(3 * limit.period_s, 500 * limit.interval_s))
    started = starts_of(text, lateness, seconds)
    assert len(started) == pytest.approx(seconds / limit.interval_s, rel=0.02, abs=1.5)
    most = 1.1 * limit.starts + 1
    for number, at in enumerate(started):
        assert bisect.bisect_left(started, at + limit.period_s - 1e-3) - number <= most


def test_what_was_not_used_is_no_credit() -> None:
    """After an idle day, calls are spread as ever."""
    limit = rate("10/1m")
    assert [starts_now(limit, at, NOW) for at in (0.0, NOW - DAY, NOW, NOW + 0.1, NOW + 6)] == [1, 1, 1, 0, 0]
    assert next_start(limit, 0.0, 1, NOW) == pytest.approx(NOW + 5)


@pytest.mark.parametrize("ahead", [20.0, 3600.0, 30 * DAY])
def test_a_next_start_that_is_too_far_ahead_is_none(ahead: float) -> None:
    """The clock was set back, or the rate was a lower one."""
    assert starts_now(rate("10/1m"), NOW + ahead, NOW) == 1


@pytest.mark.parametrize("text", ["", "10", "10/", "/1m", "0/1m", "-1/1m", "1.5/1m", "10/1", "10/0s", "10/m", "a/1m"])
def test_a_rate_that_is_none_is_refused(text: str) -> None:
    """The text says which form is expected."""
    with pytest.raises(ValueError, match="10/1m"):
        rate(text)


@pytest.mark.parametrize("fraction", ["", ".1", ".123456789"])
def test_the_clock_of_a_nats_server_is_read_with_any_number_of_digits(fraction: str) -> None:
    """Go leaves the zeros at the end out."""
    clock = faasd_async.NatsClock()
    ahead = datetime.fromtimestamp(time.time() + 300, UTC)
    clock.hear({"ts": f"{ahead:%Y-%m-%dT%H:%M:%S}{fraction}Z"})
    assert clock.offset_s == pytest.approx(300, abs=60)
