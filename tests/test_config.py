"""The configuration: every mistake is one line that names its key, every default is the documented one."""

import pwd
import re
import time
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faasd_async import (
    Config,
    ConfigError,
    Function,
    QueueConfig,
    RetryPolicy,
    Schedule,
    duration,
    load_config,
    local_moment,
    parse_config,
    size,
    store_path,
)

ROOT = Path(__file__).resolve().parent.parent
DETERMINISTIC = settings(derandomize=True, deadline=None)
NAMED = {"queues": QueueConfig, "functions": Function, "schedules": Schedule}  # tables of tables
TABLES = {name: type(table) for name, table in vars(Config()).items() if name not in NAMED}

TLS_DEFAULTS = {"tls_ca_file": None, "tls_cert_file": None, "tls_key_file": None}

# The defaults that the manual promises, as the program holds them: seconds, bytes, tuples.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gateway": {
        "listen": ("127.0.0.1:8080",),
        "read_timeout": 60.0,
        "write_timeout": 60.0,
        "upstream_timeout": 65.0,
        "max_payload": 1024 * 1024,
        "namespace": "openfaas-fn",
        "drain_timeout": 20.0,
        "trusted_origins": (),
        "hosts": (),
        "socket_mode": 0o660,
    },
    "auth": {
        "user_file": None,
        "password_file": None,
        "view_user_file": None,
        "view_password_file": None,
        "invoke": False,
    },
    "provider": {
        "url": None,
        "user_file": None,
        "password_file": None,
        "cache": 1.0,
        "scale_from_zero": True,
        "scale_timeout": 60.0,
        **TLS_DEFAULTS,
    },
    "store": {"backend": "sqlite", "path": None},
    "nats": {
        "servers": ("nats://127.0.0.1:4222",),
        "stream": "faas-request",
        "replicas": 1,
        "user_file": None,
        "password_file": None,
        "token_file": None,
        "creds_file": None,
        "tls_ca_file": None,
        "tls_cert_file": None,
        "tls_key_file": None,
        "prefix": "faas",
        "publish_timeout": 5.0,
        "require_sync": False,
    },
    "retry": {
        "attempts": 10,
        "codes": {408, 429, 500, 502, 503, 504},
        "min_wait": 10.0,
        "max_wait": 120.0,
        "backoff": "exponential",
        "max_interruptions": 5,
    },
    "callback": {
        "timeout": 30.0,
        "attempts": 10,
        "min_wait": 5.0,
        "max_wait": 3600.0,
        "max_inflight": 16,
        "allow": (),
        "deny": (),
        "gateway_hosts": ("gateway", "gateway.openfaas", "gateway.openfaas.svc.cluster.local"),
        "max_hops": 32,
        "signing_secret_file": None,
        "headers_file": None,
        **TLS_DEFAULTS,
    },
    "calls": {"keep": 86_400.0, "keep_failed": 604_800.0, "keep_output": 64 * 1024},
    "log": {"level": "info", "format": "text", "write_debug": False},
}
QUEUE_DEFAULTS = {
    "max_inflight": 1,
    "max_inflight_global": None,
    "timeout": 300.0,
    "max_pending": 100_000,
    "rate": None,
    "ack_wait": 60.0,
    "fair": True,
    "adaptive": False,
}
FUNCTION_DEFAULTS: dict[str, Any] = {
    "url": None,
    "command": None,
    "exec_timeout": None,
    "queue": "faas-request",
    "type": "sync",
    "max_inflight": None,
    "rate": None,
    "annotations": {},
    "labels": {},
    "env": {},
    "cwd": None,
    "content_type": None,
    "keepalive": True,
    **TLS_DEFAULTS,
    "retry": RetryPolicy(),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that messages begin with a short name."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(toml: str) -> Config:
    """The configuration in a real file."""
    Path("config.toml").write_text(toml, "utf-8")
    return load_config("config.toml")


def problems(toml: str) -> list[str]:
    """What is wrong with a file, line by line as the user sees it."""
    with pytest.raises(ConfigError) as caught:
        load(toml)
    return str(caught.value).split("\n")


def keys_of(table: Any) -> list[str]:
    """The keys that a table takes in the file."""
    return [item.name for item in fields(table) if item.metadata or is_dataclass(item.default)]


def function(toml: str = "") -> Function:
    """The function `it` of a file that goes on inside its table."""
    return load(f'[functions.it]\nurl = "http://127.0.0.1:9001"\n{toml}').functions["it"]


# ---- problems --------------------------------------------------------------------------------------------------

IT = '[functions.it]\nurl = "http://127.0.0.1:9001"\n'

LOGIN = "[auth]\nuser_file = 'user'\npassword_file = 'user'\n"
PROBLEMS = {
    # unknown names
    "queues.slow-queue.max_inflght": "[queues.slow-queue]\nmax_inflght = 2",
    "gateway.litsen": '[gateway]\nlitsen = "127.0.0.1:80"',
    "retry.zzz": "[retry]\nzzz = 1",
    "gatewy": "[gatewy]\nlisten = 1",
    "listen": 'listen = "127.0.0.1:8080"',
    "functions.it.comand": IT + 'comand = ["cat"]',
    "functions.it.name": IT + 'name = "other"',
    "functions.it.retry.atempts": IT + "[functions.it.retry]\natempts = 3",
    # wrong types
    "gateway": "gateway = 5",
    "queues": "queues = 5",
    "functions": "functions = []",
    "queues.q": "[queues]\nq = 5",
    "functions.f": "[functions]\nf = 'http://127.0.0.1:9001'",
    "functions.it.retry": IT + "retry = 3",
    "auth.invoke": 'auth.invoke = "yes"',
    "queues.q.fair": "[queues.q]\nfair = 1",
    "queues.q.max_inflight": "[queues.q]\nmax_inflight = true",
    "queues.q.max_pending": "[queues.q]\nmax_pending = 1.5",
    "gateway.namespace": "[gateway]\nnamespace = 5",
    "functions.it.annotations": IT + "annotations = ['a']",
    "functions.it.labels": IT + "labels = { a = 1 }",
    "functions.it.command": "[functions.it]\ncommand = 'cat'",
    "functions.c.command": "[functions.c]\ncommand = []",
    "functions.d.command": "[functions.d]\ncommand = ['sleep', 1]",
    "functions.e.env": "[functions.e]\ncommand = ['cat']\nenv = 'A=B'",
    # impossible values
    "retry.attempts": "[retry]\nattempts = 0",
    "callback.max_inflight": "[callback]\nmax_inflight = -1",
    "functions.it.max_inflight": IT + "max_inflight = 0",
    "functions.it.rate": IT + "rate = '10 a minute'",
    "queues.q.rate": "[queues.q]\nrate = 10",
    "retry.backoff": "[retry]\nbackoff = 'linear'",
    "log.level": "[log]\nlevel = 'loud'",
    "log.format": "[log]\nformat = 'xml'",
    "store.backend": "[store]\nbackend = 'redis'",
    "functions.it.type": IT + "type = 'batch'",
    "store.path": "[store]\npath = ''",
    # durations
    "gateway.read_timeout": "[gateway]\nread_timeout = 60",
    "gateway.write_timeout": "[gateway]\nwrite_timeout = '60'",
    "gateway.upstream_timeout": "[gateway]\nupstream_timeout = '5 minutes'",
    "gateway.drain_timeout": "[gateway]\ndrain_timeout = '-1s'",
    "queues.q.timeout": "[queues.q]\ntimeout = '0s'",
    "callback.timeout": "[callback]\ntimeout = ''",
    "calls.keep": "[calls]\nkeep = '1 day'",
    "retry.min_wait": "[retry]\nmin_wait = '1s5'",
    "functions.c.exec_timeout": "[functions.c]\ncommand = ['cat']\nexec_timeout = '10'",
    # sizes
    "gateway.max_payload": "[gateway]\nmax_payload = '1 megabyte'",
    "calls.keep_output": "[calls]\nkeep_output = -1",
    # HTTP codes
    "retry.codes": "[retry]\ncodes = [200]",
    "functions.it.retry.codes": IT + "[functions.it.retry]\ncodes = 500",
    # addresses
    "gateway.listen": "[gateway]\nlisten = 'localhost'",
    # host patterns
    "callback.allow": "[callback]\nallow = ['10.0.0.0/33']",
    "callback.deny": "[callback]\ndeny = 'example.org'",
    "callback.gateway_hosts": "[callback]\ngateway_hosts = [1]",
    # tables that contradict themselves
    "retry (min_wait, max_wait)": "[retry]\nmin_wait = '5m'",
    "callback (min_wait, max_wait)": "[callback]\nmax_wait = '1s'",
    "functions.it.retry (min_wait, max_wait)": IT + "[functions.it.retry]\nmax_wait = '1s'",
    "functions.it (url, command)": IT + "command = ['cat']",
    "functions.none (url, command)": "[functions.none]\ntype = 'async'",
    "functions.it (exec_timeout)": IT + "exec_timeout = '10s'",
    "functions.it (env)": IT + "env = { A = 'B' }",
    # names
    "functions.figlet.v2": "[functions.'figlet.v2']\nurl = 'http://127.0.0.1:9001'",
    "functions.-x": "[functions.-x]\nurl = 'http://127.0.0.1:9001'",
    "queues.@callbacks": "[queues.'@callbacks']\nmax_inflight = 1",
    "functions.it.queue": IT + "queue = 'slow queue'",
    # credentials
    "auth (user_file, password_file)": "[auth]\nuser_file = 'user'",
    "auth.user_file": "[auth]\nuser_file = 'missing'\npassword_file = 'user'",
    "auth.password_file": "[auth]\nuser_file = 'user'\npassword_file = 'empty'",
    "callback.signing_secret_file": "[callback]\nsigning_secret_file = 'newline'",
    "callback.signing_secret_file (whsec_)": "[callback]\nsigning_secret_file = 'half'",
    "callback.signing_secret_file (whsec_, base64)": "[callback]\nsigning_secret_file = 'other letters'",
    "callback.signing_secret_file (base64, whsec_)": "[callback]\nsigning_secret_file = 'no key'",
    "auth (view_user_file, view_password_file)": LOGIN + "view_user_file = 'user'",
    "auth (view_user_file and user_file)": LOGIN + "view_user_file = 'user'\nview_password_file = 'user'",
    "auth (view_user_file, user_file)": "[auth]\nview_user_file = 'user'\nview_password_file = 'user'",
    "gateway.socket_mode": "[gateway]\nsocket_mode = '0999'",
    "auth (invoke, user_file, password_file)": "[auth]\ninvoke = true",
}

# Patterns for hosts that fit none, however they are meant.
NO_PATTERNS = (
    "10.0.0.0/33", "evil.example:80", "http://evil.example", "evil.example/path", "*", "*evil.example", "10.*",
    "*.0.0.1", "127.1", "0x7f.1", "10.0.0.256", "[::1]:80", "fe80::1%eth0", "a..b", "a b", ".", "user@evil.example",
)  # fmt: skip

# Others, and what hosts are compared with.
PATTERNS = {
    "Evil.EXAMPLE.": "evil.example",
    "*.Example.org": "*.example.org",
    "bücher.example": "xn--bcher-kva.example",
    "*.bücher.example": "*.xn--bcher-kva.example",
    "[::1]": "::1",
    "2001:DB8:0::1": "2001:db8::1",
    "10.1.2.3/8": "10.0.0.0/8",
    "::ffff:10.1.2.3": "10.1.2.3",
    "::ffff:10.0.0.0/104": "10.0.0.0/8",
    "db_1": "db_1",
}

# Lines of callback.headers_file, and what is said of it.
HEADERS_FILES = {
    "[ha.local": "not valid TOML (at ",
    "[h]\na = " + "[" * 5000 + "]" * 5000: "not valid TOML",
    "Authorization = 's3cret'": "above all tables: expected",
    "[ha.local]\nAuthorization = 1": "ha.local: expected",
    "['ha.local:8123']\nno-good: = 's3cret'": "not valid TOML (at line 2, column 8)",
    "['ha.local:8123']\n'no good' = 's3cret'": "ha.local:8123: expected",
    '[ha.local]\nA = "s3cret\\n"': "ha.local: expected",
    "[ha.local]\nHost = 's3cret'": "ha.local: expected",
}


FILES = {
    "user": b"admin\n",
    "empty": b"",
    "newline": b"\n",
    "half": b"whsec_abc",
    "other letters": b"whsec_-_-_Zm9v",  # base64 as in URLs: the key would be "foo"
    "no key": b"whsec_",
}


@pytest.mark.parametrize("key", PROBLEMS)
def test_a_mistake_is_one_line_that_names_its_key(key: str) -> None:
    """One mistake, one line: the file, the key, what is wrong. (Words in brackets name the keys that clash.)"""
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    where, _, named = key.partition(" (")
    (line,) = problems(PROBLEMS[key])
    assert re.match(rf"config\.toml: {re.escape(where)}: \S", line)
    assert all(name in line for name in named.rstrip(")").split(", "))


def test_the_host_of_a_url_may_have_any_letters() -> None:
    """It is asked for in IDNA, and so named in Host; nothing else of the URL is changed."""
    url = load("[functions.it]\nurl = 'http://bücher:ü@bücher.example:81/ü'").functions["it"].url
    assert url is not None
    assert (url.raw_host, url.port, url.raw_path) == ("xn--bcher-kva.example", 81, "/ü")
    assert url.host_port_subcomponent == "xn--bcher-kva.example:81"


@pytest.mark.parametrize("pattern", NO_PATTERNS)
def test_a_pattern_that_fits_no_host_is_a_mistake(pattern: str) -> None:
    """In a list of what is denied it would deny nothing, and nobody would know."""
    (line,) = problems(f"[callback]\ndeny = ['{pattern}']")
    assert line.startswith("config.toml: callback.deny: expected a list of host names"), line


def test_a_pattern_may_be_written_in_many_ways() -> None:
    """Hosts are compared in one."""
    patterns = ", ".join(f'"{pattern}"' for pattern in PATTERNS)
    assert load(f"[callback]\ndeny = [{patterns}]").callback.deny == tuple(PATTERNS.values())


@pytest.mark.parametrize("content", HEADERS_FILES)
def test_a_mistake_in_the_headers_of_callbacks_is_told_without_them(content: str) -> None:
    """They are secrets."""
    Path("headers.toml").write_text(content)
    (line,) = problems("[callback]\nheaders_file = 'headers.toml'")
    assert line.startswith(f"config.toml: callback.headers_file: headers.toml: {HEADERS_FILES[content]}"), line
    assert "s3cret" not in line


def test_headers_of_callbacks_go_to_a_host_or_to_one_of_its_ports() -> None:
    """A name in TOML may have its dots without quotes."""
    Path("headers.toml").write_text("[HA.local]\nA = '1'\nB = '2'\n['ha.local:8123']\nB = '3'\n")
    callback = load("[callback]\nheaders_file = 'headers.toml'").callback
    assert callback.headers("ha.local", 80) == {"A": "1", "B": "2"}
    assert callback.headers("ha.local", 8123) == {"A": "1", "B": "3"}
    assert callback.headers("local", 8123) == callback.headers("x.ha.local", 80) == {}


def test_headers_of_callbacks_may_be_for_a_name_of_very_many_parts() -> None:
    """It is of no use, and does no harm."""
    name = "a" + ".a" * 5000
    Path("headers.toml").write_text(f"[{name}]\nA = '1'\n")
    assert load("[callback]\nheaders_file = 'headers.toml'").callback.headers(name, 80) == {"A": "1"}


def test_an_unknown_key_is_answered_with_the_closest_one() -> None:
    """A typing error is the most likely reason for an unknown key."""
    expected = "config.toml: queues.slow-queue.max_inflght: unknown key (did you mean max_inflight?)"
    assert problems("[queues.slow-queue]\nmax_inflght = 2") == [expected]


def test_an_unknown_table_is_answered_with_the_closest_one() -> None:
    """A whole table that is misspelt is one problem, not one for each of its keys."""
    expected = "config.toml: functons: unknown table (did you mean functions?)"
    assert problems("[functons.it]\nurl = 1\ncomand = 2") == [expected]


def test_a_key_in_a_wrong_place_is_told_where_it_belongs() -> None:
    """Above all tables, or in the one that happens to stand before it."""
    for toml, problem in {
        'listen = "127.0.0.1:80"': "listen: unknown key (a key of [gateway])",
        'level = "debug"': "level: unknown key (a key of [log])",
        "attempts = 3\n[store]": "attempts: unknown key (a key of [retry] and [callback])",
        '[store]\nlisten = "127.0.0.1:80"': "store.listen: unknown key (a key of [gateway])",
        "[gateway]\nmax_inflight = 3": (
            "gateway.max_inflight: unknown key (a key of [callback] and [queues.NAME] and [functions.NAME])"
        ),
        '[log]\ncron = "@daily"': "log.cron: unknown key (a key of [schedules.NAME])",
    }.items():
        assert problems(toml) == [f"config.toml: {problem}"]


def test_a_key_as_a_variable_is_written_is_answered_with_the_closest_one() -> None:
    """OpenFaaS's own settings are variables of its containers, which some write in capitals."""
    expected = "config.toml: gateway.READ_TIMEOUT: unknown key (did you mean read_timeout?)"
    assert problems("[gateway]\nREAD_TIMEOUT = '5s'") == [expected]


def test_a_key_unlike_all_others_gets_no_guess() -> None:
    """A guess that is far off would mislead: the line says which keys there are, in each table, and which tables."""
    words = "(there are function, cron, timezone, method, path, headers, body, body_file, queue, overlap, "
    (line,) = problems("[schedules.one]\nexpression = '* * * * *'\n")
    assert line.startswith(f"config.toml: schedules.one.expression: unknown key {words}")
    for table in ("auth", "log", "nats", "queues.q", "functions.it.retry"):
        assert "unknown key (there are " in "".join(problems(f"[{table}]\nxyzzy = 1"))
    assert problems("[xyzzy]") == [
        "config.toml: xyzzy: unknown table (there are gateway, auth, provider, store, nats, retry, callback, calls, "
        "log, queues, functions, schedules)"
    ]


def test_all_problems_are_reported_at_once() -> None:
    """Nobody should have to start the program once for each mistake."""
    toml = """
        [gateway]
        listn = "127.0.0.1:80"
        read_timeout = 5
        [retry]
        codes = [99]
        [queues.q]
        fair = "no"
        [functions.it]
        url = "ftp://127.0.0.1"
        [functions.it.retry]
        min_wait = "x"
        [auth]
        user_file = "missing"
        password_file = "missing"
    """
    expected = {
        "gateway.listn", "gateway.read_timeout", "retry.codes", "queues.q.fair", "functions.it.url",
        "functions.it.retry.min_wait", "auth.user_file", "auth.password_file",
    }  # fmt: skip
    found = problems(toml)
    assert {line.split(": ")[1] for line in found} == expected
    assert len(found) == len(expected)


def test_a_wrong_value_is_told_what_would_be_right() -> None:
    """The line shows the form that is expected."""
    (line,) = problems("[calls]\nkeep = 86400")
    assert '"10s"' in line


def test_a_wrong_word_is_told_which_ones_there_are() -> None:
    """The line lists the choices."""
    (line,) = problems("[retry]\nbackoff = 'linear'")
    assert '"exponential", "full", "equal"' in line


def test_broken_toml_is_one_line_with_the_place() -> None:
    """The parser's line and column get through to the user."""
    (line,) = problems("[gateway]\nlisten = \n")
    assert line.startswith("config.toml: ")
    assert "line 2" in line


def test_a_key_that_is_set_twice_is_refused() -> None:
    """TOML forbids it, so nobody has to guess which one counts."""
    (line,) = problems("[calls]\nkeep = '1h'\nkeep = '2h'")
    assert line.startswith("config.toml: ")


def test_a_file_that_is_not_text_is_refused() -> None:
    """Bytes that are not UTF-8 are not TOML."""
    Path("config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"^config\.toml: not valid TOML"):
        load_config("config.toml")


@pytest.mark.parametrize("value", ["[" * 5000 + "]" * 5000, "{a = " * 5000 + "1" + "}" * 5000])
def test_a_file_that_is_nested_too_deeply_is_refused(value: str) -> None:
    """Python's parser gives it up: that is one line, and no traceback."""
    with pytest.raises(ConfigError, match=r"^config\.toml: not valid TOML: it is nested too deeply$"):
        load(f"[gateway]\nhosts = {value}")


def test_a_missing_file_is_one_line() -> None:
    """The line says which file and why."""
    with pytest.raises(ConfigError) as caught:
        load_config("nowhere.toml")
    assert caught.value.problems == ("nowhere.toml: No such file or directory",)


@pytest.mark.parametrize("path", ["", "a\u0000b"])
def test_a_secret_path_that_no_file_can_have_is_one_line(path: str) -> None:
    """Not even a zero byte in a path is a crash."""
    tables = {"auth": {"user_file": path, "password_file": path}}
    with pytest.raises(ConfigError) as caught:
        parse_config(tables)
    assert [line.partition(":")[0] for line in caught.value.problems] == ["auth.user_file", "auth.password_file"]


def test_a_name_with_a_line_break_is_still_one_line() -> None:
    """A quoted TOML key may have any character; the report stays line by line."""
    assert len(problems('"a\\nb" = 1')) == 1


@pytest.mark.parametrize(
    "url", ["127.0.0.1:9001", "http://", "ftp://host", "http://host:0", "http://host:99999", "http://h/?q=1", "//h", 5]
)
def test_a_url_that_can_not_be_called_is_refused(url: str | int) -> None:
    """A function's URL is absolute, http or https, and takes the caller's query."""
    with pytest.raises(ConfigError, match=r"^functions\.it\.url: expected a URL .*, without a query$"):
        parse_config({"functions": {"it": {"url": url}}})


@pytest.mark.parametrize(
    "listen",
    ["localhost", "127.0.0.1:", "127.0.0.1:65536", "https://127.0.0.1:80", "unix:faasd.sock", "", [], [80], True],
)
def test_an_address_that_can_not_be_listened_on_is_refused(listen: Any) -> None:
    """HOST:PORT, unix:/path, or a list of at least one of them."""
    with pytest.raises(ConfigError, match=r"^gateway\.listen: expected"):
        parse_config({"gateway": {"listen": listen}})


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('gateway.namespace = "two.parts"', "gateway.namespace"),
        ('gateway.listen = ["127.0.0.1:8080", "http://127.0.0.1:8080"]', "gateway.listen"),
        ('functions.it.command = ["echo", "\\u0000"]', "functions.it.command"),
        ('functions.it.env = { "A=B" = "1" }', "functions.it.env"),
        ('functions.it.env = { "" = "1" }', "functions.it.env"),
        ('functions.it.env = { A = "\\u0000" }', "functions.it.env"),
        ('functions.it.content_type = "text/plain\\nX-Other: 1"', "functions.it.content_type"),
    ],
)
def test_a_value_that_can_never_work_is_refused(line: str, key: str) -> None:
    """Before a call finds out: names with an = and texts with a NUL start no program, to give examples."""
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}: expected"):
        parse_config(tomllib.loads(line))


@pytest.mark.parametrize(
    "value",
    ["10", "5 m", "\u0661s", "1.5d", "1h7d", "-5s", "s", "", "1h-5m", "1e3s", "100000000h", 10, 1.5, True, None],
)
def test_a_bad_duration_is_refused(value: Any) -> None:
    """A number without a unit could mean anything; nothing lasts less than no time or more than ten years."""
    with pytest.raises(ValueError, match="expected a duration"):
        duration(value)


@pytest.mark.parametrize("value", ["1KK", "\u0661KiB", "KiB", "-1", "1.5MiB", "", "1 TB", -1, 1.5, True, None])
def test_a_bad_size_is_refused(value: Any) -> None:
    """A size is a whole number of bytes, or of a unit that is known."""
    with pytest.raises(ValueError, match="expected a size"):
        size(value)


@pytest.mark.parametrize(
    ("line", "limit"),
    [
        ('calls.keep = "10000d"', "3650d"),
        ('retry.max_wait = "10000d"', "3650d"),
        ("retry.attempts = 10000000000", "1000000000"),
        ("nats.replicas = 7", "5"),
        (f'nats.stream = "{"a" * 64}"', "63"),
        (f'gateway.namespace = "{"a" * 64}"', "63"),
        (f'queues.{"a" * 64}.timeout = "1s"', "63"),
        (f'gateway.listen = "unix:/{"a" * 107}"', "107"),
        ('queues.q.rate = "0/1m"', "one or more"),
        (f'schedules.one.headers = {{ X-Callback-Url = "http://x/{"a" * 4096}" }}', "4096"),
        ('schedules.one.body_file = "large"', "1048576"),
    ],
)
def test_what_is_beyond_a_limit_is_told_the_limit(line: str, limit: str) -> None:
    """So that nobody has to find it by trying."""
    Path("large").write_bytes(bytes(2**20 + 1))
    more = 'schedules.one.function = "it"\nschedules.one.cron = "@daily"\nfunctions.it.command = ["true"]'
    assert limit in problems(f"{line}\n{more}" if "schedules" in line else line)[0].partition(": ")[2]


# ---- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_value", "seconds"),
    [
        ("0", 0.0),
        ("10s", 10.0),
        ("5m5s", 305.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        (".5s", 0.5),
        ("250ms", 0.25),
        ("10us", 1e-5),
        ("10µs", 1e-5),
        ("100ns", 1e-7),
    ],
)
def test_a_duration_reads_as_in_go(given_value: str, seconds: float) -> None:
    """The forms that OpenFaaS's own settings take."""
    assert duration(given_value) == pytest.approx(seconds)


@given(st.integers(0, 2000), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
@DETERMINISTIC
def test_a_written_duration_reads_back(hours: int, minutes: int, seconds: int, milliseconds: int) -> None:
    """Whatever is put together from units has the sum of its parts."""
    written = f"{hours}h{minutes}m{seconds}s{milliseconds}ms"
    assert duration(written) == pytest.approx(hours * 3600 + minutes * 60 + seconds + milliseconds / 1000)


@pytest.mark.parametrize(
    ("given_value", "number"),
    [(5, 5), ("5", 5), ("5B", 5), ("64KiB", 65_536), ("1MB", 1_000_000), ("1 MiB", 1_048_576), ("2GiB", 2 << 30)],
)
def test_a_size_reads_with_its_unit(given_value: Any, number: int) -> None:
    """KiB and KB are different things."""
    assert size(given_value) == number


@pytest.mark.parametrize("listen", [":8080", "127.0.0.1:8080", "[::1]:8080", "localhost:0", "unix:/run/faasd.sock"])
def test_an_address_is_taken_as_it_stands(listen: str) -> None:
    """All interfaces, IPv4, IPv6, a name with a port that the system chooses, a socket file."""
    assert parse_config({"gateway": {"listen": listen}}).gateway.listen == (listen,)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (8080, ":8080"),
        ("8080", ":8080"),
        ("*:8080", ":8080"),
        ("http://127.0.0.1:8080", "127.0.0.1:8080"),
        ("http://127.0.0.1:8080/", "127.0.0.1:8080"),
        ("HTTP://localhost:8080", "localhost:8080"),
        ("/run/faasd.sock", "unix:/run/faasd.sock"),
        ("unix:///run/faasd.sock", "unix:/run/faasd.sock"),
    ],
)
def test_an_address_may_be_written_as_elsewhere(written: Any, meant: str) -> None:
    """As a systemd unit, a browser or Docker has it."""
    assert parse_config({"gateway": {"listen": written}}).gateway.listen == (meant,)


def test_several_addresses_are_a_list() -> None:
    """The gateway may listen on TCP and on a socket file at once."""
    config = load("[gateway]\nlisten = ['127.0.0.1:1', 'unix:/run/x']")
    assert config.gateway.listen == ("127.0.0.1:1", "unix:/run/x")


# ---- defaults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_documented_defaults(name: str) -> None:
    """An empty file means what the manual says."""
    table = getattr(load(""), name)
    assert {key: getattr(table, key) for key in keys_of(TABLES[name])} == DEFAULTS[name]


def test_a_queue_has_the_documented_defaults() -> None:
    """A queue that is named and no more runs one call at a time."""
    queue = load("[queues.q]").queues["q"]
    assert {key: getattr(queue, key) for key in keys_of(QueueConfig)} == {
        key: QUEUE_DEFAULTS[key] for key in keys_of(QueueConfig)
    }


def test_a_function_has_the_documented_defaults() -> None:
    """A function is a URL or a command, and the rest is optional."""
    bare = function()
    assert {key: getattr(bare, key) for key in keys_of(Function)} == {**FUNCTION_DEFAULTS, "url": bare.url}


def test_without_a_file_all_defaults_hold() -> None:
    """Starting without a configuration is the same as with an empty one."""
    assert load_config(None) == load("")


def test_the_default_queue_runs_four_calls_at_once() -> None:
    """It exists without being named."""
    assert load("").queues == {"faas-request": QueueConfig(max_inflight=4)}


def test_the_default_queue_keeps_what_its_table_does_not_set() -> None:
    """A table that only sets the timeout does not change the concurrency."""
    assert load("[queues.faas-request]\ntimeout = '1m'").queues["faas-request"] == QueueConfig(
        max_inflight=4, timeout=60.0
    )


def test_naming_the_default_queue_in_a_function_changes_nothing() -> None:
    """Its concurrency stays the one it has anyway."""
    config = load('[functions.it]\nurl = "http://127.0.0.1:9001"\nqueue = "faas-request"')
    assert config.queues["faas-request"].max_inflight == 4


# ---- functions -------------------------------------------------------------------------------------------------


def test_a_queue_that_only_a_function_names_runs_one_call_at_a_time() -> None:
    """No table is needed for a queue to exist."""
    config = load('[functions.it]\nurl = "http://127.0.0.1:9001"\nqueue = "slow-queue"')
    assert config.queues["slow-queue"] == QueueConfig(max_inflight=1)


def test_a_function_is_in_the_default_queue_unless_it_says_so() -> None:
    """As in OpenFaaS."""
    assert function().queue == "faas-request"


def test_an_annotation_names_the_queue_as_in_openfaas() -> None:
    """`com.openfaas.queue` is read where there is no `queue` key."""
    assert function('annotations = { "com.openfaas.queue" = "slow-queue" }').queue == "slow-queue"


def test_the_queue_key_wins_over_the_annotation() -> None:
    """What this program's own file says in its own words counts more."""
    found = function('queue = "mine"\nannotations = { "com.openfaas.queue" = "theirs" }')
    assert found.queue == "mine"


def test_a_function_belongs_to_the_configured_namespace() -> None:
    """Its key in metrics and lanes has both names."""
    toml = '[gateway]\nnamespace = "mine"\n[functions.it]\nurl = "http://127.0.0.1:9001"'
    assert load(toml).functions["it"].key == "it.mine"


def test_a_function_retries_as_the_retry_table_says() -> None:
    """Without a table of its own a function has the common policy."""
    config = load(f"[retry]\nattempts = 3\n{IT}")
    assert config.functions["it"].retry == RetryPolicy(attempts=3)


def test_a_partial_retry_table_is_laid_over_the_common_one() -> None:
    """What a function does not set stays as [retry] has it."""
    config = load(f"[retry]\nattempts = 3\nbackoff = 'full'\n{IT}[functions.it.retry]\nmin_wait = '1s'")
    assert config.functions["it"].retry == RetryPolicy(attempts=3, backoff="full", min_wait=1.0)


def test_retry_annotations_are_laid_over_the_common_policy() -> None:
    """The annotations that OpenFaaS Pro documents."""
    found = function("""
        [functions.it.annotations]
        "com.openfaas.retry.attempts" = "3"
        "com.openfaas.retry.codes" = "500, 503"
        "com.openfaas.retry.min_wait" = "1s"
        "com.openfaas.retry.max_wait" = "5m"
    """)
    assert found.retry == RetryPolicy(attempts=3, codes=frozenset({500, 503}), min_wait=1.0, max_wait=300.0)


def test_a_retry_table_wins_over_annotations() -> None:
    """What this program's own file says in its own words counts more."""
    found = function('annotations = { "com.openfaas.retry.attempts" = "3" }\n[functions.it.retry]\nattempts = 5')
    assert found.retry.attempts == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attempts", "many"),
        ("attempts", "0"),
        ("attempts", "-3"),
        ("attempts", "1_0"),
        ("attempts", ""),
        ("codes", "500;503"),
        ("codes", "200"),
        ("codes", ""),
        ("min_wait", "10"),
        ("max_wait", "soon"),
    ],
)
def test_an_invalid_retry_annotation_keeps_the_default(name: str, value: str) -> None:
    """A function deployed with a typing error still runs."""
    assert function(f'annotations = {{ "com.openfaas.retry.{name}" = "{value}" }}').retry == RetryPolicy()


def test_an_invalid_retry_annotation_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    """The warning names function, annotation and reason in one line."""
    for _ in range(2):  # as when a provider is asked for the same function again
        function('annotations = { "com.openfaas.retry.attempts" = "often", "com.openfaas.retry.min_wait" = "1s" }')
    (message,) = caplog.messages
    assert "functions.it" in message
    assert "com.openfaas.retry.attempts" in message


def test_one_invalid_annotation_does_not_take_the_valid_ones_along() -> None:
    """Each annotation counts for itself."""
    found = function('annotations = { "com.openfaas.retry.attempts" = "many", "com.openfaas.retry.min_wait" = "1s" }')
    assert found.retry == RetryPolicy(min_wait=1.0)


# ---- secrets ---------------------------------------------------------------------------------------------------


def secrets(user: bytes, password: bytes) -> Config:
    """A configuration with credentials in files."""
    Path("user").write_bytes(user)
    Path("password").write_bytes(password)
    return load("[auth]\nuser_file = 'user'\npassword_file = 'password'")


def test_credentials_come_from_files() -> None:
    """The way in which systemd and faasd hand secrets over."""
    assert secrets(b"admin", b"pass").auth.login == aiohttp.encode_basic_auth("admin", "pass")


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_the_newline_at_the_end_of_a_secret_is_no_part_of_it(newline: bytes) -> None:
    """Most editors and `echo` put one there."""
    assert secrets(b"admin" + newline, b"pass" + newline).auth.login == aiohttp.encode_basic_auth("admin", "pass")


def test_spaces_and_colons_are_part_of_a_password() -> None:
    """Only the newline is taken away."""
    assert secrets(b"admin", b" a:b \n").auth.login == aiohttp.encode_basic_auth("admin", " a:b ")


def test_without_files_nobody_is_asked() -> None:
    """No [auth], no credentials."""
    assert load("").auth.login is None


def test_a_secret_path_may_have_variables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`${CREDENTIALS_DIRECTORY}` is where systemd's LoadCredential puts them."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    (folder / "secret").write_bytes(b"s3cret\n")
    config = load("[callback]\nsigning_secret_file = '${CREDENTIALS_DIRECTORY}/secret'")
    assert config.callback.signing_secret_file == b"s3cret"


def test_a_secret_that_can_not_be_read_says_why() -> None:
    """The line has the path and the system's reason, never a content."""
    Path("user").write_text("admin")
    expected = ["config.toml: auth.password_file: nowhere: No such file or directory"]
    assert problems("[auth]\nuser_file = 'user'\npassword_file = 'nowhere'") == expected


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the path that nobody has written."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    for name in ("$CREDENTIALS_DIRECTORY", "${CREDENTIALS_DIRECTORY}"):
        (problem,) = problems(f"[callback]\nsigning_secret_file = '{name}/secret'")
        assert problem.endswith(f"{name}/secret: the variable CREDENTIALS_DIRECTORY is not set")


@given(st.datetimes(datetime(2000, 1, 1), datetime(2030, 1, 1)))
@DETERMINISTIC
def test_a_moment_reads_as_this_machine_writes_it(moment: datetime) -> None:
    """With and without the time of day; with a zone it is the same everywhere."""
    moment = moment.replace(microsecond=0)
    assert local_moment(moment.isoformat(" ")) == moment.timestamp()
    assert local_moment(f"{moment:%Y-%m-%d}") == datetime(moment.year, moment.month, moment.day).timestamp()
    assert local_moment(moment.astimezone(UTC).isoformat()) == moment.timestamp()


def test_a_time_of_day_is_the_last_one_that_was() -> None:
    """ "--since 23:00", typed in the morning, means the evening before."""
    for hour in range(24):
        moment = datetime.fromtimestamp(local_moment(f"{hour}:30"))
        assert (moment.hour, moment.minute) == (hour, 30)
        assert timedelta(0) <= datetime.now() - moment <= timedelta(days=1, hours=1)
    today, yesterday = (datetime.fromtimestamp(local_moment(word)) for word in ("today", "yesterday"))
    assert (today.hour, yesterday.hour, (today.date() - yesterday.date()).days) == (0, 0, 1)
    assert time.time() - local_moment("24h") == pytest.approx(86_400, abs=60)


@pytest.mark.parametrize("value", ["25:00", "10:61", "tomorrow", "", "2030-13-01", "last week", "-5"])
def test_what_is_no_moment_is_told_what_would_be(value: str) -> None:
    """The line has examples."""
    with pytest.raises(ValueError, match="expected an age such as"):
        local_moment(value)


def test_an_empty_secret_is_refused() -> None:
    """An empty password would let everybody in."""
    Path("user").write_text("admin")
    Path("password").write_text("\n")
    expected = ["config.toml: auth.password_file: password is empty"]
    assert problems("[auth]\nuser_file = 'user'\npassword_file = 'password'") == expected


# ---- the queue's file ------------------------------------------------------------------------------------------


@pytest.fixture
def environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A home directory, and nothing else that says where state belongs."""
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(folder))
    return monkeypatch


def test_the_queue_is_in_the_home_directory_by_default(folder: Path, environment: pytest.MonkeyPatch) -> None:
    """Where the XDG base directory specification puts state."""
    assert store_path(load("")) == folder / ".local/state/faasd-async/faasd-async.db"


def test_the_users_state_directory_comes_before_the_home_directory(environment: pytest.MonkeyPatch) -> None:
    """`$XDG_STATE_HOME` is the user's choice."""
    environment.setenv("XDG_STATE_HOME", "/xdg")
    assert store_path(load("")) == Path("/xdg/faasd-async/faasd-async.db")


def test_systemds_state_directory_comes_before_the_users(environment: pytest.MonkeyPatch) -> None:
    """`$STATE_DIRECTORY` is set for a service; of several the first counts."""
    environment.setenv("XDG_STATE_HOME", "/xdg")
    environment.setenv("STATE_DIRECTORY", "/var/lib/faasd-async:/var/lib/other")
    assert store_path(load("")) == Path("/var/lib/faasd-async/faasd-async.db")


def test_the_key_comes_before_the_environment(environment: pytest.MonkeyPatch) -> None:
    """What is written in the file is meant."""
    environment.setenv("STATE_DIRECTORY", "/var/lib/faasd-async")
    assert store_path(load("[store]\npath = '/srv/calls.db'")) == Path("/srv/calls.db")


def test_the_key_may_have_variables_and_a_home_directory(folder: Path, environment: pytest.MonkeyPatch) -> None:
    """As in a shell."""
    environment.setenv("NAME", "calls")
    assert store_path(load("[store]\npath = '~/${NAME}.db'")) == folder / "calls.db"


def test_a_store_that_is_nowhere_is_refused(environment: pytest.MonkeyPatch) -> None:
    """No folder is made whose name is that of a variable, and `check` says so too."""
    environment.delenv("NAME", raising=False)
    for path, reason in {
        "${NAME}/calls.db": "the variable NAME is not set",
        "$NAME/calls.db": "the variable NAME is not set",
        "~nobody-has-this-name/calls.db": "nobody here has such a home directory",
        "/": "this is no name of a file",
        "/srv\\u0000/calls.db": "this is no name of a file",
    }.items():
        (problem,) = problems(f'[store]\npath = "{path}"')
        assert problem.startswith("config.toml: store.path: ") and problem.endswith(f": {reason}")


def test_who_has_no_home_has_to_say_where_the_queue_is(environment: pytest.MonkeyPatch) -> None:
    """A container's user of any number, for example."""
    environment.delenv("HOME", raising=False)
    environment.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(ConfigError, match=r"set store\.path"):
        store_path(load(""))


# ---- certificates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["provider", "callback", "functions.it"])
def test_a_certificate_that_cannot_be_used_is_told_before_it_is_needed(folder: Path, table: str) -> None:
    """A file that is not there, one that holds none, a key without a certificate."""
    url = 'url = "https://127.0.0.1"\n' if table != "callback" else ""
    (folder / "text.pem").write_text("no certificate")
    (folder / "locked.pem").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n-----END ENCRYPTED PRIVATE KEY-----\n")
    (folder / "empty.pem").write_text("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n")
    for keys, said in {
        'tls_ca_file = "none.pem"': f"{table}.tls_ca_file: none.pem: No such file or directory",
        'tls_cert_file = "text.pem"': f"{table}.tls_cert_file: text.pem holds nothing in PEM format",
        'tls_key_file = "empty.pem"': f"{table}: tls_key_file needs tls_cert_file",
        'tls_cert_file = "empty.pem"': f"{table}: empty.pem holds no private key: tls_key_file says where that is",
        'tls_cert_file = "locked.pem"': f"{table}: the key in locked.pem has a passphrase: it has to be one without",
    }.items():
        assert problems(f"[{table}]\n{url}{keys}") == [f"config.toml: {said}"]
    (line,) = problems(f'[{table}]\n{url}tls_ca_file = "empty.pem"')
    assert line.startswith(f"config.toml: {table}: empty.pem: ")
    (line,) = problems(f'[{table}]\n{url}tls_cert_file = "empty.pem"\ntls_key_file = "empty.pem"')
    assert line.startswith(f"config.toml: {table}: empty.pem, empty.pem: ")


def test_a_stream_has_no_more_replicas_than_there_can_be(folder: Path) -> None:
    """JetStream would refuse it at the start."""
    assert problems("[nats]\nreplicas = 6") == ["config.toml: nats: replicas can be at most 5 in JetStream"]


def test_keys_of_a_url_are_not_for_a_command(folder: Path) -> None:
    """They would have no effect."""
    (line,) = problems('[functions.it]\ncommand = ["cat"]\nkeepalive = false')
    assert line == "config.toml: functions.it: keepalive and the tls_ files are for a url"


# ---- the example -----------------------------------------------------------------------------------------------


def uncommented(example: str) -> str:
    """The example with its keys and tables switched on: `#key = …` and `#[table]` (prose has a space after the #)."""
    return re.sub(r"(?m)^#(?=[\w\"\[\]}])", "", example)


def example() -> str:
    """The example that is shipped."""
    return (ROOT / "config.example.toml").read_text("utf-8")


def shown() -> Iterator[tuple[str, str, Any]]:
    """Every key that the example shows: table (`queues.*`, `functions.*` … without their names), key, value."""
    for name, table in tomllib.loads(uncommented(example())).items():
        for inner, value in table.items():
            if name not in NAMED:
                yield name, inner, value
                continue
            for key, item in value.items():
                if key == "retry":
                    yield from (("functions.*.retry", policy_key, wait) for policy_key, wait in item.items())
                yield f"{name}.*", key, item


def test_the_example_runs_as_it_is() -> None:
    """Copying it is a way to begin."""
    load_config(str(ROOT / "config.example.toml"))


def test_the_example_is_valid_with_every_key_switched_on() -> None:
    """Taking a comment sign away never breaks the syntax."""
    tomllib.loads(uncommented(example()))


@pytest.mark.parametrize(
    ("name", "table"),
    [*TABLES.items(), *((f"{name}.*", table) for name, table in NAMED.items())],
)
def test_the_example_names_every_key_of_a_table_and_no_other(name: str, table: Any) -> None:
    """It is the manual of the file."""
    assert {key for where, key, _ in shown() if where == name} == {*keys_of(table)}


def test_the_example_shows_a_retry_table_of_a_function() -> None:
    """It takes any of the keys of [retry]."""
    found = {key for where, key, _ in shown() if where == "functions.*.retry"}
    assert found
    assert found <= {*keys_of(RetryPolicy)}


@pytest.mark.parametrize("name", TABLES)
def test_the_example_shows_the_default_of_every_key(name: str) -> None:
    """A key with a default is shown with that one; only those without get an example."""
    table = TABLES[name]()
    values = {key: value for where, key, value in shown() if where == name and getattr(table, key) is not None}
    read = getattr(parse_config({name: values}), name)
    assert {key: getattr(read, key) for key in values} == {key: getattr(table, key) for key in values}


def test_the_example_shows_the_defaults_of_the_default_queue() -> None:
    """Of all queues, that is the one which is there without being configured."""
    tables = tomllib.loads(uncommented(example()))["queues"]
    assert parse_config({"queues": {"faas-request": tables["faas-request"]}}).queues == load("").queues


# ---- anything at all -------------------------------------------------------------------------------------------

KEYS = [key for table in (*DEFAULTS.values(), QUEUE_DEFAULTS, FUNCTION_DEFAULTS) for key in table]
NAMES = st.sampled_from(sorted({*TABLES, *NAMED, *KEYS, "it", "com.openfaas.retry.codes"}))
SCALARS = (
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["10s", "1h", "64KiB", "http://127.0.0.1:9001", "127.0.0.1:80", "*.example.org", "10.0.0.0/8"])
    | st.datetimes()
    | st.dates()
    | st.times()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


def parse_anything(tables: dict[str, Any]) -> None:
    """Read the tables; a refusal has to be made of lines."""
    try:
        parse_config(tables)
    except ConfigError as exc:
        assert exc.problems
        assert all(line.strip() and "\n" not in line for line in exc.problems)


@given(st.dictionaries(NAMES | st.text(max_size=5), VALUES, max_size=4))
@settings(DETERMINISTIC, max_examples=100)
def test_any_file_is_either_read_or_refused(tables: dict[str, Any]) -> None:
    """Whatever TOML can express, the worst that happens is a list of problems."""
    parse_anything(tables)


@given(st.data())
@settings(DETERMINISTIC, max_examples=100)
def test_any_value_of_any_known_key_is_either_read_or_refused(data: st.DataObject) -> None:
    """The same, with tables and keys that exist."""
    name = data.draw(st.sampled_from([*TABLES, *NAMED]))
    table = {**NAMED, **TABLES}[name]
    keys = data.draw(st.dictionaries(st.sampled_from([*keys_of(table), "retry"]), VALUES, max_size=4))
    parse_anything({name: {"it": keys} if name in NAMED else keys})
