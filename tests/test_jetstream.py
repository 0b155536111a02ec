"""The server and the network that the tests of the shared queue are made on do what they say."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import nats
import pytest
from conftest import PATIENCE
from jetstream import Cluster, NatsServer, Network, Nth, StartServer, eventually
from nats.aio.client import Client
from nats.errors import Error
from nats.errors import TimeoutError as NoAnswer
from nats.js import JetStreamContext
from nats.js.api import RetentionPolicy, StreamConfig
from nats.js.errors import APIError

WORK = StreamConfig(name="work", subjects=["work.>"], retention=RetentionPolicy.WORK_QUEUE)


async def stored(server: NatsServer) -> int:
    """How many messages the stream has."""
    async with server.jetstream() as jetstream:
        return (await jetstream.stream_info("work")).state.messages


@pytest.fixture
async def client(network: Network, server: NatsServer) -> AsyncIterator[Client]:
    """A client behind the network, of a server that has the stream."""
    async with server.jetstream() as jetstream:
        await jetstream.add_stream(WORK)
    one = await nats.connect(network.url, max_reconnect_attempts=-1, reconnect_time_wait=0.02)
    yield one
    await one.close()


async def placed(jetstream: JetStreamContext) -> bool:
    """Whether a stream was made on three servers: not before they know each other."""
    config = StreamConfig(name="work", subjects=["work.>"], num_replicas=3)
    with contextlib.suppress(APIError):
        return bool(await jetstream.add_stream(config))
    return False


async def publish(client: Client, number: int = 1) -> None:
    """Publish messages, each with its acknowledgement."""
    for _ in range(number):
        await client.jetstream().publish("work.a", b"x", timeout=PATIENCE)


# ---- servers -------------------------------------------------------------------------------------


async def test_a_killed_server_has_what_it_acknowledged_and_the_same_address(server: NatsServer) -> None:
    """A client that was connected goes on by itself."""
    async with server.client(max_reconnect_attempts=-1, reconnect_time_wait=0.02) as client:
        await client.jetstream().add_stream(WORK)
        await publish(client, 3)
        await server.restart()
        await publish(client)
    assert await stored(server) == 4


async def test_a_frozen_server_answers_once_it_is_thawed(server: NatsServer) -> None:
    """Nothing is refused meanwhile."""
    async with server.client() as client:
        server.freeze()
        with pytest.raises(NoAnswer):
            await client.jetstream(timeout=0.1).account_info()
        server.thaw()
        assert await client.jetstream(timeout=PATIENCE).account_info()


async def test_a_server_is_what_its_settings_say(nats_server: StartServer) -> None:
    """They are nats-server's own words."""
    server = await nats_server({"authorization": {"user": "host", "password": "secret"}, "max_payload": 1234})
    async with server.client(user="host", password="secret") as client:
        assert client.max_payload == 1234


@pytest.mark.long
async def test_a_cluster_goes_on_without_its_leader(cluster: Cluster) -> None:
    """Two of three servers are enough, and the third learns what it has missed."""
    async with cluster.servers[0].jetstream() as jetstream:
        await eventually(lambda: placed(jetstream))
        await jetstream.publish("work.a", b"x")
    leader = await cluster.leader("work")
    await leader.kill()
    other = next(server for server in cluster.servers if server.process)
    async with other.client() as client:
        deadline = time.monotonic() + PATIENCE
        while True:  # until the two have chosen a leader
            with contextlib.suppress(Error):
                await client.jetstream().publish("work.a", b"x", timeout=1)
                break
            assert time.monotonic() < deadline
    assert await stored(other) == 2
    assert await cluster.leader("work") is not leader


# ---- the network between -------------------------------------------------------------------------


async def test_a_cut_network_refuses_and_heals(network: Network, client: Client, server: NatsServer) -> None:
    """The client notices at once, and finds its way back."""
    lost, back = asyncio.Event(), asyncio.Event()

    async def note_loss() -> None:
        lost.set()

    async def note_return() -> None:
        back.set()

    client._disconnected_cb, client._reconnected_cb = note_loss, note_return
    async with asyncio.timeout(PATIENCE):
        await network.cut()
        await lost.wait()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", network.port)
        await network.heal()
        await back.wait()
    await publish(client)
    assert await stored(server) == 1


async def test_a_silent_network_breaks_nothing(network: Network, client: Client, server: NatsServer) -> None:
    """What was sent meanwhile arrives later."""
    network.silence()
    with pytest.raises(NoAnswer):
        await client.jetstream().publish("work.a", b"x", timeout=0.1)
    assert await stored(server) == 0
    await network.heal()
    await client.flush()
    assert await stored(server) == 1


@pytest.mark.parametrize("number", [0, 2])
async def test_one_acknowledgement_can_be_swallowed(
    number: int, network: Network, client: Client, server: NatsServer
) -> None:
    """The message is stored, its publisher is not told, and the next one is."""
    network.swallow(Nth(number))
    await publish(client, number)
    with pytest.raises(NoAnswer):
        await client.jetstream().publish("work.a", b"x", timeout=0.2)
    await network.until(lambda: network.swallowed, "the acknowledgement")
    await publish(client)
    assert len(network.swallowed) == 1
    assert await stored(server) == number + 2


@pytest.mark.parametrize("number", [0, 2])
async def test_everything_can_be_stopped_before_a_chosen_message(
    number: int, network: Network, client: Client, server: NatsServer
) -> None:
    """What came before it is stored, and it is not, though its sender has sent it."""
    network.hold(Nth(number, lambda message: message.subject.startswith("work.")))
    sender = asyncio.create_task(publish(client, 5))
    await network.until(lambda: network.held, "a message is held")
    await network.cut()
    sender.cancel()
    assert await stored(server) == number


async def test_looks_and_pulls_are_not_counted_as_changes(network: Network, client: Client) -> None:
    """A step is what is published, and an acknowledgement; not a renewed lease."""
    jetstream = client.jetstream()
    await publish(client)
    consumer = await jetstream.pull_subscribe("work.a", "it")
    (message,) = await consumer.fetch(1, PATIENCE)
    await jetstream.stream_info("work")
    await message.in_progress()
    await message.ack()
    await client.flush()
    await network.until(lambda: len(network.changes) >= 3, "three changes")
    first, second, third = network.changes
    assert first.subject == "work.a"
    assert first.data == b"x"
    assert second.subject.startswith("$JS.API.CONSUMER.")
    assert third.subject.startswith("$JS.ACK.")
