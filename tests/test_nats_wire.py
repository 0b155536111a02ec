"""Messages that go past the NATS client, on the connection that it looks after."""

import asyncio
import contextlib
from typing import Any, get_type_hints

import pytest
from conftest import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from jetstream import NatsServer
from nats.aio.client import Client
from nats.errors import ProtocolError

import faasd_async
from faasd_async import CallFilter, NatsCall, NatsLink, NatsMessage, NatsReader, Parts, Stored, cancel_all

MESSAGES = [
    NatsMessage(b"plain", b"", b"", b"body"),
    NatsMessage(b"answered", b"to.me", b"", b""),
    NatsMessage(b"headed", b"", b"NATS/1.0\r\nA-B: c: d\r\n\r\n", b"MSG like.one 7 0\r\n\r\n"),
    NatsMessage(b"both", b"to.me", b"NATS/1.0 404 No Messages\r\n\r\n", b""),
]
WIRE = (
    b"MSG plain 7 4\r\nbody\r\n+OK\r\nMSG answered 7 to.me 0\r\n\r\n"
    b"HMSG headed 7 23 43\r\nNATS/1.0\r\nA-B: c: d\r\n\r\nMSG like.one 7 0\r\n\r\n\r\n"
    b"HMSG both 7 to.me 28 28\r\nNATS/1.0 404 No Messages\r\n\r\n\r\n"
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, len(WIRE)])
async def test_messages_are_read_in_whatever_pieces_they_come(size: int) -> None:
    """Between them the server may say something to the client."""
    reader = NatsReader(Client())
    heard: list[NatsMessage] = []
    reader.tell(7, lambda message: not heard.append(message))  # type: ignore[func-returns-value]
    for start in range(0, len(WIRE), size):
        await reader.parse(WIRE[start : start + size])
    assert heard == MESSAGES


async def test_half_a_message_does_not_outlive_its_connection() -> None:
    """The next one begins with a message of its own."""
    reader = NatsReader(Client())
    heard: list[NatsMessage] = []
    reader.tell(7, lambda message: not heard.append(message))  # type: ignore[func-returns-value]
    await reader.parse(WIRE[:40])
    reader.reset()
    await reader.parse(WIRE)
    assert heard[-len(MESSAGES) :] == MESSAGES


async def test_what_is_no_message_breaks_the_connection() -> None:
    """The client makes another one then."""
    with pytest.raises(ProtocolError):
        await NatsReader(Client()).parse(b"MSG plain 7 many\r\n")


async def test_headers_and_what_the_server_says_are_told_apart() -> None:
    """As the names that headers have, with "Status" and "Description"."""
    assert MESSAGES[0].headers == {}
    assert MESSAGES[2].headers["A-B"] == "c: d"
    assert MESSAGES[2].status == ""
    assert MESSAGES[3].status == "404"
    assert MESSAGES[3].headers["Description"] == "No Messages"


async def test_what_loses_a_cancellation_is_cancelled_again() -> None:
    """As wait_for of Python 3.11 does when what it waits for comes at that moment: a stop would last for ever."""
    cancelled = asyncio.Event()

    async def goes_on() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        cancelled.set()
        await asyncio.Event().wait()

    tasks = [asyncio.create_task(work()) for work in (goes_on, goes_on)]
    await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE):
        await cancel_all(tasks)
    assert cancelled.is_set()
    assert tasks[0].cancelled()


async def test_that_nobody_answers_is_not_taken_for_no_messages(server: NatsServer) -> None:
    """As while a stream has no leader. What a list shows would be missing without a word."""
    config = faasd_async.NatsConfig(servers=(server.url,), stream="nothing", publish_timeout=PATIENCE)
    link = NatsLink(config)

    async def never() -> None:
        """There is no other connection."""

    await link.open(never)
    try:
        with pytest.raises(faasd_async.NatsRefused, match="nobody answers"):
            await faasd_async.direct_messages(link, multi_last=["a"])
        with pytest.raises(faasd_async.StoreError, match="nobody answers"):
            await faasd_async.next_message(link, "a")
    finally:
        await link.close()


async def test_a_message_over_which_we_fail_does_not_hold_up_the_others(server: NatsServer) -> None:
    """What comes after it is told, and the connection stays."""
    link = NatsLink(faasd_async.NatsConfig(servers=(server.url,), publish_timeout=PATIENCE))
    heard: list[bytes] = []

    async def never() -> None:
        """There is no other connection."""

    def fail_once(message: NatsMessage) -> bool:
        heard.append(message.data)
        return bool(1 / (len(heard) - 1) + 1)

    await link.open(never)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(link.close)
        await link.subscribe("some.*", first=fail_once)
        await link.api("INFO")  # The server knows of that before it answers.
        async with server.client() as other:
            await other.publish("some.a", b"1")
            await other.publish("some.b", b"2", headers={"A": "b"})
            await other.flush()
        assert (await link.api("INFO"))["type"].endswith("account_info_response")
    assert heard == [b"1", b"2"]


NUMBERS = st.floats(0, 2e9)
VALUES: dict[object, st.SearchStrategy[Any]] = {
    str: st.text(),
    int: st.integers(0),
    float: NUMBERS,
    str | None: st.none() | st.text(),
    int | None: st.none() | st.integers(0),
    float | None: st.none() | NUMBERS,
}
FIELDS = {name: VALUES[hint] for name, hint in get_type_hints(NatsCall).items() if hint in VALUES}
TIMES = st.none() | NUMBERS
PAST = st.fixed_dictionaries({"started_at": TIMES, "completed_at": TIMES, "error": st.none() | st.text()})
FAILURE = st.tuples(st.text(), st.integers(), NUMBERS, NUMBERS, st.none(), st.text()).map(list)
OWN: dict[str, st.SearchStrategy[Any]] = {
    "id": st.uuids().map(str),
    "status": st.sampled_from(["running", "success"]),
    "start_time": st.integers(0, 10**20),
    "history": st.lists(PAST, max_size=2),
    "failures": st.lists(FAILURE, max_size=2),
}
CALLS = st.fixed_dictionaries({**FIELDS, **OWN}).map(lambda values: NatsCall(**values))
FATE = NatsCall._fields[faasd_async.FATE :]


@settings(max_examples=50, deadline=None)
@given(CALLS, st.lists(st.binary(), min_size=5, max_size=5))
def test_a_call_is_read_as_it_was_written(call: NatsCall, data: list[bytes]) -> None:
    """Also where the JSON of its message is taken over into its record."""
    parts = Parts(*data)
    stored = faasd_async.unpack_call(faasd_async.pack_call(call, parts, 7))
    assert stored[:3] == (7, call, parts)
    assert not stored.accepted
    fresh = call._replace(**{name: NatsCall._field_defaults[name] for name in FATE})
    accepted = faasd_async.unpack_call(faasd_async.pack_call(fresh, parts)).accepted
    assert faasd_async.unpack_call(faasd_async.pack_call(call, parts, 7, accepted))[:3] == stored[:3]


@settings(max_examples=50, deadline=None)
@given(CALLS)
def test_a_message_has_the_texts_by_which_its_call_is_found(call: NatsCall) -> None:
    """Whatever characters are in them: calls whose messages do not have them are not looked at."""
    message = faasd_async.pack_call(call, Parts())
    filters = CallFilter(
        statuses=(call.status, "timeout"),
        callbacks=(call.callback_status, "failed"),
        app=call.app,
        schedule=call.schedule,
    )
    for some in (filters, filters._replace(statuses=()), filters._replace(callbacks=())):
        assert faasd_async.has_texts(message, faasd_async.texts_of(some))


def test_a_message_of_another_call_has_other_texts() -> None:
    """So it needs not be unpacked."""
    call = NatsCall(faasd_async.new_id(), "c", "f", "n", "q", 1, 2.0, 10, "", 4, app="a", status="success")
    message = faasd_async.pack_call(call, Parts())
    for filters in (
        CallFilter(statuses=("error", "timeout")),
        CallFilter(callbacks=("failed",)),
        CallFilter(statuses=("success",), app="b"),
        CallFilter(app="a", schedule="nightly"),
    ):
        assert not faasd_async.has_texts(message, faasd_async.texts_of(filters))


def test_what_a_newer_version_says_of_a_call_gets_into_its_record() -> None:
    """And what somebody has written in another order is read, and written anew."""
    call = NatsCall(faasd_async.new_id(), "c", "f", "n", "q", 1, 2.0, 10, "", 4)
    packed = faasd_async.pack_call(call, Parts(), 7)[4:]
    newer = packed.replace(b'"call":{', b'"call": {"new":[1],')
    other = b'{"call":' + packed.split(b'"call":')[1][:-1] + b',"parts":[],"record":7}'
    for head, accepted in ((newer, newer.split(b'"call":')[1][:-1].decode()), (other, "")):
        message = len(head).to_bytes(4, "big") + head
        assert faasd_async.unpack_call(message) == Stored(7, call, Parts(), accepted)
