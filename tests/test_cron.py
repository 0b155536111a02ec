"""When schedules are due, and what is done about it: expressions, time zones and rules, without a daemon."""

import itertools
import os
import random
import re
import tomllib
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

import pytest

from faasd_async import (
    MACROS,
    REBOOT,
    ConfigError,
    Schedule,
    ScheduledRun,
    ScheduleState,
    clock_doubt,
    counted_from,
    cron_expression,
    cron_words,
    followed,
    instants,
    jitter_s,
    last_instants,
    next_instants,
    parse_config,
    run_id,
    schedule_words,
    settle,
    unfinished,
)

LONG = bool(os.environ.get("FAASD_ASYNC_LONG_TESTS"))
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
HOUR = 3600.0
DAY = 24 * HOUR


def unix(text: str) -> float:
    """Unix time of an RFC 3339 time, UTC where it has no zone."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def following(expression: str, after: str, number: int, zone: tzinfo = UTC) -> list[str]:
    """The next instants, in UTC."""
    found = itertools.islice(instants(expression, zone, unix(after)), number)
    return [datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M") for at in found]


def schedule(**keys: Any) -> Schedule:
    """A schedule that is due each minute, with other keys as the file has them."""
    raw = {"function": "it", "cron": "* * * * *", **keys}
    config = parse_config({"functions": {"it": {"command": ["true"]}}, "schedules": {"one": raw}})
    return config.schedules["one"]


# ---- expressions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("* * * * *", ["2026-01-30T12:01", "2026-01-30T12:02"]),
        ("*/20 * * * *", ["2026-01-30T12:20", "2026-01-30T12:40"]),
        ("30 7 * * 1-5", ["2026-02-02T07:30", "2026-02-03T07:30"]),
        ("0 0 31 * *", ["2026-01-31T00:00", "2026-03-31T00:00"]),
        ("0 0 29 2 *", ["2028-02-29T00:00", "2032-02-29T00:00"]),
        ("0 12 1 jan,Jul *", ["2026-07-01T12:00", "2027-01-01T12:00"]),
        ("0 0 1 * SUN", ["2026-02-01T00:00", "2026-02-08T00:00"]),
        ("0 0 * * 7", ["2026-02-01T00:00", "2026-02-08T00:00"]),
        ("0 0 L * *", ["2026-01-31T00:00", "2026-02-28T00:00"]),
        ("@hourly", ["2026-01-30T13:00", "2026-01-30T14:00"]),
        ("@daily", ["2026-01-31T00:00", "2026-02-01T00:00"]),
        ("@weekly", ["2026-02-01T00:00", "2026-02-08T00:00"]),
        ("@monthly", ["2026-02-01T00:00", "2026-03-01T00:00"]),
        ("@yearly", ["2027-01-01T00:00", "2028-01-01T00:00"]),
    ],
)
def test_an_expression_is_due_when_crontab_says_so(expression: str, expected: list[str]) -> None:
    """crontab(5): names, steps, ranges, lists, Sunday twice, either day where both are given."""
    assert following(expression, "2026-01-30T12:00", 2) == expected


@pytest.mark.parametrize("value", ["", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "x * * * *", "@never", 5])
def test_what_is_no_expression_is_refused(value: object) -> None:
    """Also six fields: there are no seconds."""
    with pytest.raises(ValueError, match=r"five fields|bad|expected"):
        cron_expression(value)


@pytest.mark.parametrize("value", ["0 0 30 2 *", "0 0 31 4,6 *", "0 0 31 2 *", "0 0 * 2 MON#5"])
def test_an_expression_that_never_matches_is_refused(value: str) -> None:
    """It would be a schedule that nobody hears of again. A fifth Monday in February is there in leap years."""
    if value == "0 0 * 2 MON#5":
        assert following(value, "2026-01-01", 1) == ["2044-02-29T00:00"]
        return
    with pytest.raises(ValueError, match="never matches"):
        cron_expression(value)


def test_every_macro_and_expression_is_explained() -> None:
    """In words, for people."""
    assert cron_words("30 7 * * 1-5") == "At 07:30 on Monday through Friday"
    assert cron_words(REBOOT) == "once after each start of this machine"
    assert all(len(cron_words(name)) > 8 for name in MACROS)
    both = schedule(cron=["@daily", REBOOT], timezone="Europe/Berlin")
    assert schedule_words(both) == "At 00:00 every day; once after each start of this machine (Europe/Berlin)"


# ---- time zones ----------------------------------------------------------------------------------


def test_a_job_at_night_runs_once_on_each_day_of_a_year() -> None:
    """Berlin skips 02:30 on a day in March and has it twice on one in October."""
    found = following("30 2 * * *", "2026-03-28T12:00", 2, BERLIN)
    assert found == ["2026-03-29T01:00", "2026-03-30T00:30"]  # at the end of the gap, 03:00
    found = following("30 2 * * *", "2026-10-24T12:00", 2, BERLIN)
    assert found == ["2026-10-25T00:30", "2026-10-26T01:30"]  # the first time
    assert following("30 2 * * *", "2026-10-25T00:30", 1, BERLIN) == ["2026-10-26T01:30"]
    assert following("30 2 * * *", "2026-10-25T01:10", 1, BERLIN) == ["2026-10-26T01:30"]


def test_a_job_of_each_half_hour_follows_the_clock() -> None:
    """It runs in both of the hours that look alike, and does nothing in the hour that is not there."""
    found = following("*/30 2 * * *", "2026-10-24T12:00", 5, BERLIN)
    assert found == [f"2026-10-25T{at}" for at in ("00:00", "00:30", "01:00", "01:30")] + ["2026-10-26T01:00"]
    assert following("*/30 2 * * *", "2026-10-25T00:40", 2, BERLIN) == ["2026-10-25T01:00", "2026-10-25T01:30"]
    assert following("*/30 2 * * *", "2026-03-28T12:00", 1, BERLIN) == ["2026-03-30T00:00"]


# Whole hours and halves, at midnight and at noon, with and without: all that clocks have done lately.
ZONES = [
    "Europe/Berlin", "Europe/London", "Europe/Dublin", "Europe/Lisbon", "Europe/Moscow", "Europe/Istanbul",
    "Europe/Chisinau", "Atlantic/Azores", "Africa/Casablanca", "Africa/El_Aaiun", "Africa/Cairo", "Africa/Juba",
    "Africa/Sao_Tome", "Africa/Khartoum", "Asia/Beirut", "Asia/Gaza", "Asia/Jerusalem", "Asia/Amman", "Asia/Damascus",
    "Asia/Tehran", "Asia/Kolkata", "Asia/Kathmandu", "Asia/Tokyo", "Asia/Pyongyang", "Asia/Almaty", "Asia/Shanghai",
    "Australia/Lord_Howe", "Australia/Adelaide", "Australia/Sydney", "Pacific/Auckland", "Pacific/Chatham",
    "Pacific/Norfolk", "Pacific/Apia", "Pacific/Fiji", "Pacific/Tongatapu", "Antarctica/Troll", "Antarctica/Casey",
    "America/New_York", "America/St_Johns", "America/Havana", "America/Santiago", "America/Asuncion",
    "America/Sao_Paulo", "America/Caracas", "America/Nuuk", "America/Scoresbysund", "America/Mexico_City",
    "America/Ciudad_Juarez", "America/Whitehorse", "America/Port-au-Prince",
]  # fmt: skip
# Minutes, hours and the expression of them.
TIMES = [
    ({30}, {2}, "30 2 * * *"),
    ({0, 15, 45}, {0, 23}, "0,15,45 0,23 * * *"),
    ({5}, {0, 1, 2, 3}, "5 0-3 * * *"),
    ({0, 20, 40}, {1, 2}, "*/20 1,2 * * *"),
    ({0, 30}, {0}, "*/30 0 * * *"),
    ({10}, set(range(24)), "10 * * * *"),
]


def transitions(zone: tzinfo, years: range) -> Iterator[datetime]:
    """The minutes at which the clocks of a zone are set."""
    step = timedelta(hours=12)
    at = datetime(years[0], 1, 1, tzinfo=UTC)
    while at.year <= years[-1]:
        low, high = at, at + step
        before = low.astimezone(zone).utcoffset()
        at = high
        if high.astimezone(zone).utcoffset() == before:
            continue
        while high - low > timedelta(minutes=1):
            middle = low + timedelta(minutes=(high - low) // timedelta(minutes=2))
            if middle.astimezone(zone).utcoffset() == before:
                low = middle
            else:
                high = middle
        yield high


def clock_shows(start: datetime, minutes: int, zone: tzinfo) -> list[datetime]:
    """What a clock shows in each of so many minutes."""
    moments = (start + timedelta(minutes=minute) for minute in range(minutes))
    return [at.astimezone(zone).replace(tzinfo=None, fold=0) for at in moments]


def ticks(shown: list[datetime], times: tuple[set[int], set[int], str]) -> list[int]:
    """The minutes in which a job is due, by looking at the clock in each, as cron does.

    A job with a star looks at what the clock shows. One for certain times runs when the clock shows one of them, or has
    jumped over it, and has not shown that or a later time before.
    """
    wanted_minutes, wanted_hours, expression = times
    wild = any(word.startswith("*") for word in expression.split()[:2])
    latest = shown[0] - timedelta(minutes=1)
    found = []
    for minute, now in enumerate(shown):
        passed = [now] if wild else []
        while not wild and latest < now:
            latest += timedelta(minutes=1)
            passed.append(latest)
        if any(one.minute in wanted_minutes and one.hour in wanted_hours for one in passed):
            found.append(minute)
    return found


@pytest.mark.parametrize("name", sorted(zoneinfo.available_timezones()) if LONG else ZONES)
def test_ten_years_of_changing_clocks_are_as_looking_at_the_clock_each_minute(name: str) -> None:
    """Around each time that a zone's clocks are set, and on days when nothing happens."""
    zone = zoneinfo.ZoneInfo(name)
    hours = 54 if LONG else 9
    quiet = [datetime(2016, 1, 1, 12, 7, tzinfo=UTC) + timedelta(hours=random.Random(name).randrange(80_000))]
    for change in [*transitions(zone, range(2016, 2026)), *quiet]:
        begin = change - timedelta(hours=hours / 2)
        shown = clock_shows(begin, hours * 60, zone)
        for times in TIMES:
            expected = [begin.timestamp() + 60 * minute for minute in ticks(shown, times)]
            found = list(itertools.islice(instants(times[2], zone, begin.timestamp() - 1), len(expected) + 1))
            assert found[:-1] == expected, (times[2], change)
            assert found[-1] >= begin.timestamp() + hours * HOUR, (times[2], change)
            for at in expected[::3]:  # from wherever one looks
                assert next(instants(times[2], zone, at - 1)) == at


def test_there_are_fifty_zones() -> None:
    """All different ones."""
    assert len(set(ZONES)) == len(ZONES) == 50


# ---- what to fire --------------------------------------------------------------------------------

NOON = unix("2026-01-30T12:00")


@pytest.mark.parametrize(
    ("keys", "late_s", "fire", "missed"),
    [
        ({}, 0, [0], 0),
        ({}, 59, [0], 0),
        ({"catch_up": "none"}, 59, [0], 0),
        ({"max_late": "0s"}, 59, [0], 0),
        ({"cron": "0 * * * *"}, 3599, [0], 0),
        ({"cron": "0 * * * *", "catch_up": "none"}, 60, [], 1),
        ({"cron": "0 * * * *", "max_late": "10m"}, 599, [0], 0),
        ({"cron": "0 * * * *", "max_late": "10m"}, 600, [], 1),
        ({}, 600, [10], 10),
        ({"catch_up": "none"}, 600, [10], 10),
        ({"catch_up": "none"}, 659, [10], 10),
        ({"catch_up": "all"}, 180, [0, 1, 2, 3], 0),
        ({"catch_up": "all", "max_late": "2m"}, 180, [2, 3], 2),
        ({"catch_up": "all", "max_late": "7d"}, 2 * DAY, list(range(2781, 2881)), 0),
        ({}, 400 * DAY, [576_000], 99),
    ],
)
def test_what_is_fired_late(keys: dict[str, Any], late_s: float, fire: list[int], missed: int) -> None:
    """Instants are numbered by the minute from noon, which is the first that was not settled."""
    due = settle(schedule(**keys), NOON - 1, NOON + late_s)
    assert [(at - NOON) / 60 for at in due.fire] == fire
    assert len(due.missed) == missed


def test_nothing_is_fired_twice_or_early() -> None:
    """What is settled stays so, also where the clock was set back."""
    assert settle(schedule(), NOON, NOON + 30) == ([], [])
    assert settle(schedule(), NOON, NOON - HOUR) == ([], [])
    assert settle(schedule(), NOON - 60, NOON - 0.001) == ([], [])


def test_a_gap_of_years_is_not_walked_through() -> None:
    """The last hundred instants are enough, whatever their distance."""
    assert len(last_instants(schedule(), 0.0, NOON)) == 100
    yearly = last_instants(schedule(cron="@yearly"), unix("2000-06-01"), NOON)
    assert len(yearly) == 26
    assert last_instants(schedule(cron="@yearly"), unix("2026-01-01"), NOON) == type(yearly)()


def test_a_clock_that_was_wrong_does_not_silence_a_schedule() -> None:
    """What was settled hours from now was settled by such a one; a few minutes may have been right."""
    assert counted_from(NOON - DAY, NOON) == NOON - DAY
    assert counted_from(NOON + HOUR, NOON) == NOON + HOUR
    assert counted_from(NOON + DAY, NOON) == NOON - 60
    assert settle(schedule(), counted_from(NOON + DAY, NOON), NOON).fire == [NOON]


def test_several_expressions_are_one_row_of_instants() -> None:
    """One that two of them name is there once."""
    both = schedule(cron=["0 12 * * *", "*/30 12 * * *", REBOOT])
    found = itertools.islice(next_instants(both, NOON - 1), 3)
    assert [(at - NOON) / 60 for at in found] == [0, 30, 1440]
    assert list(next_instants(schedule(cron=REBOOT), NOON)) == []


def test_a_host_is_always_late_by_the_same() -> None:
    """By no more than jitter says, and each host by something else."""
    spread = schedule(jitter="10m")
    found = [jitter_s(spread, f"host-{number}") for number in range(100)]
    assert found == [jitter_s(spread, f"host-{number}") for number in range(100)]
    assert min(found) < 60
    assert 540 < max(found) < 600
    assert jitter_s(schedule(), "host-1") == 0


def test_whoever_fires_an_instant_gives_its_call_the_same_id() -> None:
    """A UUIDv7 of that time, so that it is found among those of that time."""
    own_id = run_id("one", NOON)
    assert own_id == run_id("one", NOON)
    assert len({own_id, run_id("two", NOON), run_id("one", NOON + 60)}) == 3
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", own_id)
    assert int(own_id.replace("-", "")[:12], 16) == NOON * 1000


@pytest.mark.parametrize(
    ("synchronised", "uptime_s", "trusted"),
    [(True, 1, True), (False, 1, False), (False, 119, False), (False, 120, True)],
)
def test_a_clock_is_trusted(synchronised: bool, uptime_s: float, trusted: bool) -> None:
    """When somebody vouches for it, or nobody has for two minutes."""
    assert (clock_doubt(synchronised, uptime_s) is None) == trusted


def test_the_last_runs_are_kept_with_what_became_of_them() -> None:
    """Twenty of them, newest first, whoever ended when."""
    state = ScheduleState("one")
    for number in range(30):
        state = followed(state, [ScheduledRun(NOON + number * 60, f"id-{number}", "queued")])
    assert [run.id for run in state.runs] == [f"id-{number}" for number in range(29, 9, -1)]
    ended = ScheduledRun(NOON + 20 * 60, "id-20", "success", NOON + 1300, 1.0)
    state = followed(state, [ended, ScheduledRun(NOON + 21 * 60, "id-21", "error", NOON + 1400, 1.0, "no")])
    assert len(unfinished(state)) == 18
    assert state.runs[9] == ended
    assert state.last_success_at == NOON + 1300
    assert followed(state, []).last_success_at == NOON + 1300


# ---- the file ------------------------------------------------------------------------------------

WRONG = {
    "cron = '0 0 30 2 *'": 'schedules.one.cron: "0 0 30 2 *": bad day-of-month, or never matches',
    "cron = '* * *'": "schedules.one.cron: expected five fields",
    "cron = []": "schedules.one.cron: expected five fields",
    "timezone = 'Europe/Bielefeld'": "schedules.one.timezone: expected a time zone",
    "timezone = 'Europe'": "schedules.one.timezone: expected a time zone",
    "timezone = '../etc/passwd'": "schedules.one.timezone: expected a time zone",
    "function = 'its'": "schedules.one.function: no such function: its (did you mean it?)",
    "overlap = 'wait'": "schedules.one.overlap: expected one of",
    "catch_up = 'some'": "schedules.one.catch_up: expected one of",
    "max_late = 'soon'": "schedules.one.max_late: expected a duration",
    "method = 'BREW'": "schedules.one.method: expected one of",
    "path = 'no slash'": "schedules.one.path: expected",
    "body_file = '/nowhere'": "schedules.one.body_file: /nowhere: No such file",
    "body = 'a'\nbody_file = '/dev/null'": "schedules.one: set either body or body_file",
    "headers = { 'no good' = 'x' }": "schedules.one.headers: expected a table of header names",
    'headers = { X-A = "a\\nb" }': "schedules.one.headers: expected a table of header names",
    "headers = { X-Callback-Url = 'ftp://x' }": "schedules.one: headers: X-Callback-Url: expected an absolute",
    "headers = { idempotency-key = 'x' }": "schedules.one: headers: Idempotency-Key is not for a schedule",
    "queue = 'no.dots'": "schedules.one.queue: expected a name of letters",
    "corn = '* * * * *'": "schedules.one.corn: unknown key (did you mean cron?)",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_schedule_that_can_not_be_is_told_with_its_line(line: str) -> None:
    """One line for each, which names the key."""
    raw = {"function": "it", "cron": "* * * * *", **tomllib.loads(line)}
    with pytest.raises(ConfigError) as caught:
        parse_config({"functions": {"it": {"command": ["true"]}}, "schedules": {"one": raw}})
    (problem,) = caught.value.problems
    assert problem.startswith(WRONG[line]), problem


def test_a_schedule_needs_a_function_and_an_expression() -> None:
    """Both are told."""
    with pytest.raises(ConfigError) as caught:
        parse_config({"schedules": {"one": {}}})
    assert caught.value.problems == ("schedules.one: set function", "schedules.one: set cron")


def test_a_schedule_may_name_a_function_of_the_provider() -> None:
    """Nobody asks the provider for that."""
    one = {"function": "elsewhere", "cron": "@daily"}
    config = parse_config({"provider": {"url": "http://127.0.0.1:9"}, "schedules": {"one": one}})
    assert config.schedules["one"].function == "elsewhere"


def test_a_queue_that_only_a_schedule_names_is_there() -> None:
    """As one that only a function names."""
    raw = {"function": "it", "cron": "@daily", "queue": "nightly"}
    config = parse_config({"functions": {"it": {"command": ["true"]}}, "schedules": {"one": raw}})
    assert "nightly" in config.queues
