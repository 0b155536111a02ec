"""Servers, hosts and the network between them break at the worst moments: what was accepted ends once, in all cases."""

import asyncio
import collections
import contextlib
import functools
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import nats
import pytest
from aiohttp import web
from conftest import (
    DEVNULL,
    PATIENCE,
    PIPE,
    Daemon,
    Gate,
    Request,
    Server,
    WallClock,
    ask,
    assert_refused,
    free_address,
    ok,
)
from jetstream import (
    RESERVES,
    STREAM,
    Cluster,
    NatsServer,
    Network,
    Nth,
    StartHost,
    StartServer,
    ended,
    eventually,
    make_certificate,
    on_nats,
    one_function,
    post,
    submit_all,
)
from operating import get
from test_crash import CANCELLED, ENDS, TOLD, Witness, is_done

pytestmark = pytest.mark.no_cover  # the program runs in the daemons

KILLS = int(os.environ.get("FAASD_ASYNC_KILLS", 6))  # 200 for the long form
LONG_PATIENCE_S = 4 * PATIENCE  # on a server that is full, where much waits for what else
MANY = "[queues.faas-request]\nmax_inflight = 16\n[retry]\nattempts = 1000\n"
KEPT = '[gateway]\nlisten = "{}"\n'  # the address of a host that comes back


async def ready(gateway: Daemon) -> bool:
    """Whether it says that it can accept calls."""
    return (await ask(gateway.url, "/readyz")).status == 200


async def works_again(*gateways: Daemon) -> None:
    """Every gateway gets ready by itself, accepts, and what it accepts runs to its end."""
    for gateway in gateways:
        await eventually(functools.partial(ready, gateway))
        assert (await gateway.final(await gateway.submit("it")))["status"] == "success"


async def filled(gateway: Daemon, size: int, *headers: str) -> list[str]:
    """Calls with bodies of so many bytes, as many as servers have room for: their ids."""
    accepted: list[str] = []
    while (reply := await post(gateway, "/async-function/it", *headers, body=os.urandom(size))).status == 202:
        accepted.append(reply.headers["X-Call-Id"])
    assert_refused(reply, 503)
    return accepted


class Load:
    """Clients that submit calls all the time, at these gateways in turn; each accepted call is noted."""

    def __init__(self, *gateways: Daemon, path: str = "it") -> None:
        self.accepted: list[str] = []
        self.refused: list[int] = []  # the status of each answer that was no 202
        self._gateways = gateways
        self._path = path
        self._clients: list[asyncio.Task[None]] = []
        self._over = False
        self._news = asyncio.Condition()

    async def __aenter__(self) -> "Load":
        self._clients = [asyncio.create_task(self._client(number)) for number in range(6)]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._over = True  # asyncio.wait_for of Python 3.11 may swallow that a client is cancelled
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _client(self, number: int) -> None:
        gateway = self._gateways[number % len(self._gateways)]
        while not self._over:
            with contextlib.suppress(ConnectionError):
                reply = await post(gateway, f"/async-function/{self._path}", body=b"x")
                async with self._news:
                    if reply.status == 202:
                        self.accepted.append(reply.headers["X-Call-Id"])
                    else:
                        self.refused.append(reply.status)
                    self._news.notify_all()
            await asyncio.sleep(0.005)  # or it would be all that the machine does

    async def more(self, number: int = 30) -> None:
        """Wait until that many more calls are accepted."""
        target = len(self.accepted) + number
        async with self._news:
            await asyncio.wait_for(self._news.wait_for(lambda: len(self.accepted) >= target), PATIENCE)


async def all_ended_well(gateway: Daemon, load: Load, function: Server, twice: int = 0) -> None:
    """What was accepted has run, at most so many of these calls more than once; what was refused said when to come."""
    assert await ended(gateway, load.accepted) == {"success": len(load.accepted)}
    runs = collections.Counter(function.call_ids)
    assert set(load.accepted) <= set(runs)
    assert sum(number > 1 for number in runs.values()) <= twice
    assert set(load.refused) <= {503}


# ---- servers -------------------------------------------------------------------------------------


async def test_a_server_that_is_killed_under_load_loses_nothing_and_repeats_nothing(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """Killed and started three times: all accepted calls run, those that run meanwhile end, none runs twice."""
    pair = [await hosts(one_function(function, MANY)) for _ in range(2)]
    async with Load(*pair) as load:
        for _ in range(3):
            await load.more()
            await server.restart()
        await load.more()
    await all_ended_well(pair[0], load, function)


async def test_work_flows_again_when_the_server_is_back(hosts: StartHost, server: NatsServer, function: Server) -> None:
    """Nobody waits for the end of a lease, or of a pull, that is longer than the test's patience."""
    settings = one_function(function, '[queues.faas-request]\nack_wait = "1h"')
    pair = [await hosts(settings) for _ in range(2)]
    await works_again(*pair)
    for _ in range(3):
        await server.restart()
        await works_again(*pair)


async def test_what_a_killed_server_brings_back_of_a_finished_call_is_deleted(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """An earlier record under the last one, a message that waited for its time: they would be shown, or run, later."""
    gateway = await hosts(one_function(function))
    waiting = await gateway.submit("it", X_Delay="1h")
    async with server.client(max_reconnect_attempts=-1, reconnect_time_wait=0.02) as client:
        jetstream = client.jetstream(timeout=PATIENCE)

        async def stored() -> dict[str, int]:
            return (await jetstream.stream_info(STREAM, subjects_filter="faas.*.faas-request.>")).state.subjects or {}

        (later,) = await stored()
        delayed = await jetstream.get_last_msg(STREAM, later)
        await cancel(gateway, waiting)
        record = await gateway.record(waiting)
        subjects = (await jetstream.stream_info(STREAM, subjects_filter="faas.call.>")).state.subjects
        (place,) = subjects or {}
        newest = await jetstream.get_last_msg(STREAM, place)
        # As if the server had forgotten that it has deleted these. The last one does not say that it replaces another.
        await jetstream.publish(later, delayed.data or b"", headers={"Nats-Rollup": "sub"})
        await jetstream.publish(place, newest.data or b"")
        assert list(await stored()) == [later]
        await server.restart()

        async def they_are_gone() -> bool:
            state = (await jetstream.stream_info(STREAM, subjects_filter=">")).state
            return state.subjects == dict.fromkeys((place, *RESERVES), 1)

        await eventually(they_are_gone)
    assert await gateway.record(waiting) == record


async def test_a_call_that_runs_while_the_server_is_away_is_not_run_again(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """Its outcome waits for the server, longer than its lease."""
    function.behaviour = gate = Gate()
    pair = [await hosts(one_function(function)) for _ in range(2)]
    calls = await submit_all(4, *pair)
    await function.wait_for(4)
    await server.kill()
    gate.open()
    await function.until(lambda: function.running == 0, "the end of the calls")
    await asyncio.sleep(1.5)  # longer than a lease; that time passes is what this is about
    await server.start()
    await eventually(functools.partial(ready, pair[0]))
    assert await ended(pair[0], calls) == {"success": 4}
    assert len(function.requests) == 4


async def test_what_is_refused_while_the_server_is_away_never_runs(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """503 with a time to come again, and not ready with the reason; no such call is found later."""
    gateway = await hosts(one_function(function))
    await works_again(gateway)
    await server.kill()
    replies = await asyncio.gather(*(post(gateway, "/async-function/it", body=b"never") for _ in range(20)))
    for reply in replies:
        assert_refused(reply, 503)
        assert int(reply.headers["Retry-After"]) > 0
    reply = await ask(gateway.url, "/readyz")
    assert_refused(reply, 503, "nats")
    assert (await ask(gateway.url, "/function/it")).status == 200
    await server.start()
    await works_again(gateway)
    assert b"never" not in [request.body for request in function.requests]
    assert len((await get(gateway, "/system/calls"))["calls"]) == 2


async def test_a_server_that_hangs_holds_up_only_what_has_to_be_stored(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """503 within `publish_timeout`; sync calls and the gateway go on, figures are the last ones; then all does."""
    gateway = await hosts(one_function(function, "[queues.held]"))
    await works_again(gateway)
    await post(gateway, "/system/queues/held/pause")
    held = await submit_all(3, gateway, X_Queue="held")

    async def figures() -> tuple[float, float, Any]:
        """How old they are, how many calls wait in the queue, and the document of the same."""
        scraped = (await ask(gateway.url, "/metrics")).body.decode()
        age = re.search(r"^faasd_async_figures_age_seconds (.*)", scraped, re.MULTILINE)
        waiting = re.search(r'^queue_worker_pending_messages.*queue_name="held"} (.*)', scraped, re.MULTILINE)
        assert age is not None
        assert waiting is not None
        return float(age[1]), float(waiting[1]), await get(gateway, "/system/stats")

    async def are_true() -> bool:
        age_s, waiting, stats = await figures()
        return (age_s, waiting, stats["store"]["age_seconds"], stats["trouble"]) == (0, 3, 0, None)

    await eventually(are_true)
    server.freeze()
    waiting = asyncio.create_task(post(gateway, "/async-function/it"))
    assert (await ask(gateway.url, "/function/it")).status == 200
    assert (await ask(gateway.url, "/healthz")).status == 200
    reply = await waiting
    assert_refused(reply, 503, "NATS has not answered within 2 s")
    assert int(reply.headers["Retry-After"]) > 0
    assert_refused(await ask(gateway.url, "/readyz"), 503, "NATS has not answered for")
    age_s, number, stats = await figures()
    assert (age_s > 0, number) == (True, 3)
    assert "NATS has not answered for" in stats["trouble"]
    assert stats["store"]["age_seconds"] > 0
    assert [queue["depth"] for queue in stats["queues"] if queue["name"] == "held"] == [3]
    server.thaw()
    await eventually(are_true)
    await works_again(gateway)
    await post(gateway, "/system/queues/held/resume")
    assert await ended(gateway, held) == {"success": 3}


async def test_a_daemon_that_starts_before_its_server_gets_ready_later(
    nats_server: StartServer, hosts: StartHost, function: Server
) -> None:
    """As after a power cut of the whole house; meanwhile it says that it is not ready, and why, and is at rest."""
    server = await nats_server(start=False)
    schedule = '[schedules.yearly]\nfunction = "it"\ncron = "@yearly"'
    gateway = await hosts(one_function(function, schedule), server.url)
    await gateway.wait_for_log("WARNING schedules wait: NATS is away")
    reply = await ask(gateway.url, "/readyz")
    assert_refused(reply, 503, "nats is away: connection refused")
    assert_refused(await post(gateway, "/async-function/it"), 503, "nats is away: connection refused", limit=2000)
    assert "can't be reached: connection refused" in gateway.log
    await server.start()
    await works_again(gateway)
    assert gateway.log.count("schedules wait") <= 3  # a line for each reason


@pytest.mark.long
async def test_a_daemon_that_starts_while_its_server_hangs_says_so(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """Whom it has asked, and for how long; in words."""
    server.freeze()
    gateway = await hosts(one_function(function))
    place = server.url.removeprefix("nats://")
    assert_refused(await ask(gateway.url, "/readyz"), 503, "answered within 2 s")
    await gateway.wait_for_log(f"ERROR NATS at nats://{place} can't be reached: no server has answered within 2 s")
    server.thaw()
    await works_again(gateway)


async def test_a_daemon_can_stop_while_its_server_is_away(
    hosts: StartHost, server: NatsServer, function: Server, sink: Server
) -> None:
    """It does not wait for what cannot come; what it ran runs elsewhere."""
    function.behaviour = gate = Gate()
    one = await hosts(one_function(function, '[gateway]\ndrain_timeout = "100ms"'))
    call_id = await one.submit("it")
    await function.wait_for(1)
    await server.kill()
    assert await one.terminate() == 0
    gate.open()
    await server.start()
    other = await hosts(one_function(sink))
    assert (await other.final(call_id))["status"] == "success"


@pytest.mark.unmeasured
@pytest.mark.parametrize("what", ["stream", "consumers", "messages"])
async def test_what_an_administrator_deletes_is_made_again(
    hosts: StartHost, server: NatsServer, function: Server, what: str
) -> None:
    """Calls that were stored may be lost with it; those that come later are not, and no restart is needed."""
    pair = [await hosts(one_function(function)) for _ in range(2)]
    await works_again(*pair)
    async with server.jetstream() as jetstream:
        if what == "stream":
            await jetstream.delete_stream(STREAM)
        elif what == "messages":
            await jetstream.purge_stream(STREAM)
        else:
            for consumer in await jetstream.consumers_info(STREAM):
                await jetstream.delete_consumer(STREAM, consumer.name)
    for gateway in pair:

        async def accepted(gateway: Daemon = gateway) -> str | None:
            reply = await post(gateway, "/async-function/it")
            assert reply.status in (202, 503), reply
            return reply.headers["X-Call-Id"] if reply.status == 202 else None

        call_id = await eventually(accepted)
        assert (await gateway.final(call_id))["status"] == "success"


async def test_calls_whose_consumers_are_deleted_while_no_daemon_runs_are_found(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """At the next start, those that are due as well as those that have their time still to come."""
    one = await hosts(one_function(function, "[queues.other]\n[queues.third]"))
    for queue in ("faas-request", "other"):
        await post(one, f"/system/queues/{queue}/pause")
    ids = [
        await one.submit("it"),
        await one.submit("it", X_Queue="other"),
        await one.submit("it", X_Queue="third", X_Delay="1s"),
    ]
    await one.terminate()
    async with server.jetstream() as jetstream:
        for consumer in await jetstream.consumers_info(STREAM):
            await jetstream.delete_consumer(STREAM, consumer.name)
    await one.start()
    for queue in ("faas-request", "other"):
        await post(one, f"/system/queues/{queue}/resume")
    for call_id in ids:
        assert (await one.final(call_id))["status"] == "success"


@pytest.mark.unmeasured
@pytest.mark.parametrize("what", ["stream", "messages"])
async def test_a_pause_outlives_the_stream_that_it_is_stored_in(
    hosts: StartHost, server: NatsServer, function: Server, what: str
) -> None:
    """An administrator has deleted or purged it, twice: hosts that come later hold the queue too, and say so."""
    one = await hosts(one_function(function))
    await works_again(one)
    await post(one, "/system/queues/faas-request/pause")
    async with server.jetstream() as jetstream:

        async def stored() -> bool:
            try:
                await jetstream.get_last_msg(STREAM, "faas.queue.faas-request")
            except nats.js.errors.NotFoundError:
                return False
            return True

        for _ in range(2):
            await (jetstream.delete_stream(STREAM) if what == "stream" else jetstream.purge_stream(STREAM))
            await eventually(stored)
    other = await hosts(one_function(function))
    await other.wait_for_log("WARNING queue faas-request is paused, and its calls wait: faasd-async queues resume")
    call_id = await other.submit("it")
    assert (await one.record(call_id))["waits_for"] == "queue faas-request, which is paused"
    await post(other, "/system/queues/faas-request/resume")
    assert (await one.final(call_id))["status"] == "success"


async def test_a_stream_that_is_made_again_otherwise_gets_no_calls(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """One that would drop them is told of once, calls get 503, until it is as it has to be; no restart is needed."""
    gateway = await hosts(one_function(function))
    await works_again(gateway)
    async with server.jetstream() as jetstream:
        theirs = (await jetstream.stream_info(STREAM)).config
        theirs.max_msgs = 100
        gateway.signal(signal.SIGSTOP)  # or it would make one first, now and then
        await jetstream.delete_stream(STREAM)
        await jetstream.add_stream(theirs)
        gateway.signal(signal.SIGCONT)
        problem = f"stream {STREAM} on the server has max_msgs = 100"
        await gateway.wait_for_log(f"ERROR nats.stream: {problem}")
        assert_refused(await post(gateway, "/async-function/it"), 503, problem, limit=500)
        assert_refused(await ask(gateway.url, "/readyz"), 503, problem, limit=500)
        assert (await jetstream.stream_info(STREAM)).config.max_msgs == 100
        await jetstream.delete_stream(STREAM)
        await works_again(gateway)
    assert gateway.log.count(f"ERROR nats.stream: {problem}") == 1


async def test_a_stream_that_is_edited_gets_no_calls_until_it_is_right_again(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """It would drop them: hosts notice by themselves, and say which setting it is."""
    pair = [await hosts(one_function(function)) for _ in range(2)]
    await works_again(*pair)
    async with server.jetstream() as jetstream:
        right = (await jetstream.stream_info(STREAM)).config
        await jetstream.update_stream(right.evolve(max_msgs=100))
        problem = f"stream {STREAM} on the server has max_msgs = 100"
        for gateway in pair:
            await gateway.wait_for_log(f"ERROR nats.stream: {problem}")
            assert_refused(await post(gateway, "/async-function/it"), 503, problem, limit=500)
            assert_refused(await ask(gateway.url, "/readyz"), 503, problem, limit=500)
        await jetstream.update_stream(right)
        await works_again(*pair)


@pytest.mark.long
async def test_a_consumer_that_is_paused_is_told_of_and_goes_on(
    hosts: StartHost, server: NatsServer, function: Server
) -> None:
    """By an administrator; when he resumes it, nobody waits for the end of a pull."""
    pair = [await hosts(one_function(function)) for _ in range(2)]
    await works_again(*pair)
    name = "work+faas-request+it=2Eopenfaas-fn"
    async with server.client() as client:

        async def pause(until: str) -> None:
            request = json.dumps({"pause_until": until}).encode()
            await client.request(f"$JS.API.CONSUMER.PAUSE.{STREAM}.{name}", request)

        await pause("2999-01-01T00:00:00Z")
        call_id = await pair[0].submit("it")
        for gateway in pair:
            await gateway.wait_for_log(f"WARNING NATS: consumer {name} is paused on the server")
        record = await pair[0].record(call_id)
        assert record["status"] == "queued"
        assert record["waits_for"].startswith(f"consumer {name}, which is paused on the NATS server")
        await pause("0001-01-01T00:00:00Z")
        assert (await pair[1].final(call_id))["status"] == "success"
        await works_again(*pair)


@pytest.mark.long
async def test_a_consumer_that_is_edited_is_told_of(hosts: StartHost, server: NatsServer, function: Server) -> None:
    """It would not hand out again what a host has had that died."""
    gateway = await hosts(one_function(function))
    await works_again(gateway)
    async with server.jetstream() as jetstream:
        info = await jetstream.consumer_info(STREAM, "work+faas-request+it=2Eopenfaas-fn")
        await jetstream.add_consumer(STREAM, info.config.evolve(max_deliver=7))
        await gateway.wait_for_log("has max_deliver = 7, the queue needs -1: have it made anew, nothing is lost")
        await jetstream.delete_consumer(STREAM, info.name)
        await works_again(gateway)


async def test_a_password_that_is_changed_is_read_again(
    nats_server: StartServer, hosts: StartHost, function: Server, tmp_path: Path
) -> None:
    """At the server first: that is said, and survived; in our file then, which is all that it takes."""
    server = await nats_server({"authorization": {"user": "host", "password": "before"}})
    for name, text in (("user", "host"), ("password", "before")):
        (tmp_path / name).write_text(text)
    keys = f'[nats]\nuser_file = "{tmp_path}/user"\npassword_file = "{tmp_path}/password"'
    gateway = await hosts(one_function(function, keys), server.url)
    await works_again(gateway)
    await server.kill()
    server.configure({"authorization": {"user": "host", "password": "rotated"}})
    await server.start()
    await server.wait_for_log("authentication error")

    async def explained() -> bool:
        reply = await ask(gateway.url, "/readyz")
        return reply.status == 503 and b"uthori" in reply.body

    await eventually(explained)
    assert_refused(await post(gateway, "/async-function/it"), 503)
    (tmp_path / "password").write_text("rotated\n")
    await works_again(gateway)
    assert "before" not in gateway.log
    assert "rotated" not in gateway.log


@pytest.mark.long
async def test_certificates_that_are_changed_are_read_again(
    nats_server: StartServer, hosts: StartHost, function: Server, tmp_path: Path
) -> None:
    """Those of a new authority: at the server first, then in our files, which is all that it takes."""

    async def issue(name: str) -> dict[str, Any]:
        """What a server needs; ours are in the files of the configuration then."""
        folder = made(tmp_path / name)
        authority = await make_certificate(folder, "ca")
        theirs, ours = [await make_certificate(folder, name, authority) for name in ("server", "host")]
        files = {"cert_file": str(theirs.certificate), "key_file": str(theirs.key)}
        for target, source in {"ca": authority.certificate, "cert": ours.certificate, "key": ours.key}.items():
            (tmp_path / f"next-{target}.pem").write_bytes(source.read_bytes())
        return {"tls": {**files, "ca_file": str(authority.certificate), "verify": True}}

    def take() -> None:
        for target in ("ca", "cert", "key"):
            (tmp_path / f"next-{target}.pem").replace(tmp_path / f"{target}.pem")

    server = await nats_server(await issue("before"))
    take()
    keys = "\n".join(f'tls_{name}_file = "{tmp_path}/{name}.pem"' for name in ("ca", "cert", "key"))
    gateway = await hosts(one_function(function, f"[nats]\n{keys}"), server.url.replace("nats://", "tls://"))
    await works_again(gateway)
    await server.kill()
    server.configure(await issue("after"))
    await server.start()
    await gateway.wait_for_log("ERROR NATS: no TLS with")
    take()
    await works_again(gateway)


LITTLE_ROOM: dict[str, dict[str, Any]] = {
    "server": {"jetstream": {"max_file_store": 2_000_000}},
    "account": {
        "accounts": {"A": {"jetstream": {"max_file": 2_000_000}, "users": [{"user": "a", "password": "a"}]}},
        "no_auth_user": "a",
    },
}


@pytest.fixture
async def small_disk(tmp_path: Path) -> AsyncIterator[tuple[Sequence[str], Path]]:
    """Commands that enter a place where `tmp_path/disk` is a file system of 8 MiB, and that folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    script = f"mount -t tmpfs -o size=8M tmpfs '{folder}' && echo mounted && exec cat"
    holder = await asyncio.create_subprocess_exec(
        "unshare", "--mount", "sh", "-c", script, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    if await holder.stdout.readline():
        yield ["nsenter", "-t", str(holder.pid), "-m"], folder
    else:
        pytest.skip("mounting a file system needs root")
    holder.stdin.close()
    await holder.wait()


@pytest.mark.long
async def test_a_full_disk_of_the_server_refuses_calls_and_loses_none(
    nats_server: StartServer, hosts: StartHost, function: Server, small_disk: tuple[Sequence[str], Path]
) -> None:
    """503 and not ready, with the reason; when there is room and the server is started again, all goes on by itself."""
    enter, folder = small_disk
    function.behaviour = gate = Gate()
    server = await nats_server({"jetstream": {"store_dir": str(folder), "max_file_store": 10**9}}, prefix=enter)
    gateway = await hosts(one_function(function), server.url)
    accepted = await filled(gateway, 300_000)
    assert (await ask(gateway.url, "/readyz")).status == 503
    remount = ("mount", "-o", "remount,size=64M", str(folder))
    process = await asyncio.create_subprocess_exec(*enter, *remount)
    assert await process.wait() == 0
    gate.open()
    await server.restart()
    await works_again(gateway)
    assert await ended(gateway, accepted) == {"success": len(accepted)}


@pytest.mark.parametrize("whose", ["server", pytest.param("account", marks=pytest.mark.long)])
async def test_what_is_accepted_ends_though_the_server_has_no_room_for_more(
    nats_server: StartServer, hosts: StartHost, function: Server, whose: str
) -> None:
    """No gateway accepts more, and says why; what there is runs, leaves room, and all goes on by itself."""
    function.behaviour = gate = Gate()
    server = await nats_server(LITTLE_ROOM[whose])
    settings = one_function(function, "[queues.faas-request]\nmax_inflight = 4\n[gateway]\nmax_payload = '200KB'")
    pair = [await hosts(settings, server.url) for _ in range(2)]
    accepted = await filled(pair[0], 150_000)
    for gateway in pair:
        assert_refused(await post(gateway, "/async-function/it"), 503, "no room for more calls")
        assert_refused(await ask(gateway.url, "/readyz"), 503, "no room for more calls")
    if whose == "account":  # Another process takes over what this one has, without room for more.
        await pair[0].kill()
        await pair[0].start()
    gate.open()
    assert await ended(pair[1], accepted) == {"success": len(accepted)}
    await works_again(*pair)
    if whose == "server":
        assert sorted(set(function.call_ids)) == sorted(function.call_ids)


@dataclass(frozen=True)
class Backlog:
    """Calls that fill a server, and what becomes of them."""

    body: int
    answer: int  # bytes
    called_back: bool = False
    status: int = 200
    away: int = 0  # callbacks that get no 2xx


@pytest.mark.parametrize(
    "backlog",
    [
        pytest.param(Backlog(10, 8_000), marks=pytest.mark.long, id="small"),
        pytest.param(Backlog(1_000, 12_000, called_back=True), id="answered"),
        pytest.param(Backlog(1_000, 12_000, called_back=True, away=150), marks=pytest.mark.long, id="receiver away"),
        pytest.param(Backlog(300, 8_000, called_back=True, status=500), marks=pytest.mark.long, id="failing"),
    ],
)
async def test_calls_that_leave_more_than_they_took_end_on_a_full_server(
    nats_server: StartServer, hosts: StartHost, function: Server, sink: Server, backlog: Backlog
) -> None:
    """Answers are called back as a whole and then cut short, however many calls wait; what an administrator deletes is
    room for new calls, without a restart."""
    gate = Gate()

    async def behave(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        await gate(request, seen)
        return web.Response(body=os.urandom(backlog.answer), status=backlog.status)

    async def receive(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return web.Response(status=500 if len(sink.requests) <= backlog.away else 200)

    function.behaviour, sink.behaviour = behave, receive
    server = await nats_server(LITTLE_ROOM["server"])
    settings = one_function(
        function,
        "[queues.faas-request]\nmax_inflight = 32\n"
        '[retry]\nattempts = 3\nmin_wait = "100ms"\nmax_wait = "100ms"\n'
        '[callback]\nattempts = 1000\nmin_wait = "100ms"\nmax_wait = "1s"\n',
    )
    pair = [await hosts(settings, server.url) for _ in range(2)]
    target = (f"X-Callback-Url: {sink.url}",) if backlog.called_back else ()
    accepted = await filled(pair[0], backlog.body, *target)
    gate.open()
    end = "success" if backlog.status == 200 else "error"

    async def all_over() -> bool:
        async with server.jetstream() as jetstream:
            left = [await jetstream.stream_info(STREAM, subjects_filter=f"faas.{root}.>") for root in ("work", "later")]
        return not any(info.state.subjects for info in left)

    await eventually(all_over, LONG_PATIENCE_S)
    assert await ended(pair[0], accepted) == {end: len(accepted)}
    if backlog.called_back:
        assert {*sink.call_ids} == {*accepted}
        assert {len(request.body) for request in sink.requests} == {backlog.answer}
    if backlog.status == 200:
        assert sorted(function.call_ids) == sorted(accepted)
    async with server.jetstream() as jetstream:  # The records of so many calls may be all that there is room for.
        await jetstream.purge_stream(STREAM, subject="faas.call.>")
    function.behaviour = ok
    await works_again(*pair)


@pytest.mark.parametrize("host", ["stopped", pytest.param("frozen", marks=pytest.mark.long)])
async def test_what_is_due_while_the_server_has_no_room_is_not_forgotten(
    nats_server: StartServer, hosts: StartHost, function: Server, host: str
) -> None:
    """The server does forget it: somebody else's stream has used its room up for a while, when no host was there, or
    none that worked."""
    server = await nats_server(LITTLE_ROOM["server"])
    gateway = await hosts(one_function(function), server.url)
    await works_again(gateway)
    async with server.jetstream() as jetstream:
        delayed = await submit_all(3, gateway, X_Delay="1s")
        if host == "stopped":
            assert await gateway.terminate() == 0
        else:
            gateway.signal(signal.SIGSTOP)  # or it would make room in time
        await jetstream.add_stream(name="theirs", subjects=["theirs"])
        with contextlib.suppress(nats.js.errors.APIError):
            while True:
                await jetstream.publish("theirs", bytes(100_000))
        await asyncio.sleep(2)  # until they were due; that time passes is what this is about
        if host == "frozen":
            gateway.signal(signal.SIGCONT)
            assert_refused(await post(gateway, "/async-function/it"), 503, "insufficient resources")
        await jetstream.delete_stream("theirs")
        if host == "stopped":
            await gateway.start()
    assert await ended(gateway, delayed) == {"success": 3}
    await works_again(gateway)


@pytest.mark.long
async def test_a_cluster_loses_nothing_with_its_leader(cluster: Cluster, hosts: StartHost, function: Server) -> None:
    """The leader of the stream is killed under load, and comes back."""
    settings = one_function(function, f"{MANY}[nats]\nreplicas = 3")
    pair = [await hosts(settings, *cluster.urls) for _ in range(2)]
    async with Load(*pair) as load:
        await load.more()
        leader = await cluster.leader()
        await leader.kill()
        await load.more()
        await leader.start()
        await load.more()
    await all_ended_well(pair[0], load, function)


# ---- hosts ---------------------------------------------------------------------------------------


@pytest.mark.unmeasured
async def test_a_host_that_is_killed_under_load_loses_nothing(hosts: StartHost, function: Server) -> None:
    """What it ran, and only that, may run twice."""
    pair = [await hosts(one_function(function, MANY + at)) for at in (KEPT.format(free_address()), "")]
    async with Load(*pair) as load:
        for _ in range(3):
            await load.more()
            await pair[0].kill()
            await pair[0].start()
        await load.more()
    await all_ended_well(pair[1], load, function, twice=3 * 16)


@pytest.mark.unmeasured
async def test_a_host_that_stops_under_load_loses_and_repeats_nothing(hosts: StartHost, function: Server) -> None:
    """An orderly stop waits for what runs; what it has not begun runs elsewhere."""
    pair = [await hosts(one_function(function, MANY + at)) for at in (KEPT.format(free_address()), "")]
    async with Load(*pair) as load:
        for _ in range(3):
            await load.more()
            assert await pair[0].terminate() == 0
            await pair[0].start()
        await load.more()
    await all_ended_well(pair[1], load, function)


async def test_a_frozen_host_takes_nothing_with_it(hosts: StartHost, function: Server, sink: Server) -> None:
    """What was on its way to it runs elsewhere; after that it works as before."""
    one = await hosts(one_function(function, MANY))
    await works_again(one)
    one.signal(signal.SIGSTOP)
    other = await hosts(one_function(sink, MANY))
    calls = await submit_all(40, other)
    assert await ended(other, calls) == {"success": 40}
    one.signal(signal.SIGCONT)
    await works_again(one, other)
    assert len(set(sink.call_ids) & set(calls)) == 40


@pytest.mark.parametrize("offset_s", [300, -300], ids=["ahead", "behind"])
async def test_a_host_whose_clock_is_wrong_keeps_the_times_that_callers_asked_for(
    hosts: StartHost, function: Server, clock: WallClock, offset_s: int
) -> None:
    """Five minutes off, from the start or from now on: a short delay is not long, and a deadline has not passed."""
    clock.set(offset_s)
    wrong = await hosts(one_function(function), env=clock.env)
    where = {300: "0:05:00 ahead of", -300: "0:05:00 behind"}
    await wrong.wait_for_log(f"this host's clock is {where[offset_s]} the servers'")
    right = await hosts(one_function(function))
    pair = (wrong, right)
    delayed = await submit_all(10, *pair, X_Delay="300ms")
    limited = await submit_all(10, *pair, X_Deadline="1m")
    clock.set(-offset_s)
    await wrong.wait_for_log(f"this host's clock is {where[-offset_s]} the servers'")
    delayed += await submit_all(10, wrong, X_Delay="300ms")
    limited += await submit_all(10, wrong, X_Deadline="1m")
    assert await ended(right, delayed + limited) == {"success": 40}
    later = await submit_all(4, *pair, X_Delay="4m")
    assert {(await right.record(call_id))["status"] for call_id in later} == {"delayed"}
    assert set(function.call_ids) == {*delayed, *limited}
    assert wrong.log.count("this host's clock is") == 2  # It is not repeated with each answer.
    assert "this host's clock is" not in right.log


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut", pytest.param("silence", marks=pytest.mark.long)])
async def test_a_host_without_its_network_says_so_and_recovers(
    hosts: StartHost, network: Network, function: Server, sink: Server, how: str
) -> None:
    """503 and not ready while it lasts; what it ran ends once, here or elsewhere; then it works as before."""
    function.behaviour = gate = Gate()
    alone = await hosts(one_function(function), network.url)
    call_id = await alone.submit("it")
    await function.wait_for(1)
    if how == "cut":
        await network.cut()
    else:
        network.silence()
    assert_refused(await post(alone, "/async-function/it"), 503)

    async def unready() -> bool:
        return not await ready(alone)

    await eventually(unready)
    other = await hosts(one_function(sink))
    record = await other.final(call_id)
    assert (record["status"], record["interrupted"]) == ("success", 1)
    gate.open()
    await network.heal()
    await works_again(alone, other)
    assert await alone.record(call_id) == record
    assert (function.call_ids.count(call_id), sink.call_ids.count(call_id)) == (1, 1)


# ---- every step ----------------------------------------------------------------------------------


async def leave_it(gateway: Daemon, call_id: str) -> None:
    """Ask for nothing more."""


async def cancel(gateway: Daemon, call_id: str) -> None:
    """Cancel a call, perhaps not for the first time."""
    reply = await ask(gateway.url, f"/async-function/{call_id}", method="DELETE")
    if reply.status not in (202, 409):
        raise ConnectionError(reply)


async def run_again(gateway: Daemon, call_id: str) -> None:
    """Have a call run again once it has failed, perhaps not for the first time."""
    ended = await gateway.until(call_id, lambda record: record["completed_at"] is not None)
    if ended["status"] == "error":
        reply = await post(gateway, f"/system/calls/{call_id}/retry")
        if reply.status not in (202, 409):
            raise ConnectionError(reply)


@dataclass(frozen=True)
class Scenario:
    """What a client does with a gateway; it tries again at another one when it does not succeed."""

    path: str
    headers: Mapping[str, str]
    then: Callable[[Daemon, str], Awaitable[None]] = leave_it
    end: str = "success"


SCENARIOS = {
    "callback": Scenario("it", {"X_Callback_Url": "http://gateway/function/sink", "X_Call_Id": "own"}),
    "retry": Scenario("it/flaky", {}),
    "delay": Scenario("it", {"X_Delay": "50ms"}),
    "key": Scenario("it", {"Idempotency_Key": "order-1"}),
    "redrive": Scenario("it/broken", {}, run_again),
    "cancel": Scenario("it", {"X_Delay": "1h"}, cancel, "cancelled"),
}


# With eight servers at a time, and whatever else a machine does, one may take seconds to answer.
LONG_PATIENCE = "10s"


class Stage:
    """A host that is disturbed, another one that comes when it was, and functions that know the scenarios."""

    def __init__(self, folder: Path, patience: str) -> None:
        self.server = NatsServer(folder / "nats")
        self.patience = patience  # of the disturbed host, until an answer of its server counts as lost
        self.network = Network(self.server)
        self.function, self.sink = Server(), Server()
        self.function.behaviour = self._behave
        self.disturbed, self.well = self.hosts = [Daemon(made(folder / name), "") for name in ("disturbed", "well")]
        self.warm = ""  # the call that prepared it

    async def _behave(self, request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        first = self.function.call_ids.count(seen.call_id) == 1
        status = {"/flaky": 500, "/broken": 400}.get(seen.target, 200) if first else 200
        return web.Response(status=status)

    async def __aenter__(self) -> "Stage":
        await asyncio.gather(self.server.start(), self.function.start(), self.sink.start())
        await self.network.start()
        settings = one_function(self.function, one_function(self.sink, '[nats]\npublish_timeout = "{}"', "sink"))
        self.disturbed.configure(on_nats(settings.replace("{}", self.patience), self.network.url))
        self.well.configure(on_nats(settings.replace("{}", LONG_PATIENCE), self.server.url))
        return self

    async def start(self) -> None:
        """Start the first host, and have it make what is made once: stream, consumers."""
        await self.disturbed.start()
        await eventually(self._warmed)

    async def _warmed(self) -> bool:
        """Whether a first call is over. A busy machine may take longer for a step than the host waits."""
        headers = {"X_Callback_Url": "http://gateway/function/sink", "Idempotency_Key": "warm"}
        with contextlib.suppress(AssertionError):
            self.warm = self.warm or await self.disturbed.submit("it", b"", **headers)
            return bool((await self.disturbed.record(self.warm))["callback"]["status"] == "delivered")
        return False

    async def __aexit__(self, *exc: object) -> None:
        for host in self.hosts:
            await host.close()
        await self.network.close()
        await asyncio.gather(self.server.close(), self.function.close(), self.sink.close())

    async def calls(self) -> list[dict[str, Any]]:
        """The records of all calls but the one that prepared it, as the second host sees them."""
        records: list[dict[str, Any]] = (await get(self.well, "/system/calls?limit=100"))["calls"]
        return [record for record in records if record["call_id"] != self.warm]

    async def nothing_is_left(self) -> bool:
        """Whether the server holds no work any more."""
        async with self.server.jetstream() as jetstream:
            state = (await jetstream.stream_info(STREAM, subjects_filter=">")).state
        return not any(".work." in subject or ".later." in subject for subject in state.subjects or {})


def made(folder: Path) -> Path:
    """The folder, made."""
    folder.mkdir(parents=True)
    return folder


class Client:
    """Who plays a scenario, and does not give up before it is accepted."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.call_id = ""  # of the last 202
        self.refused = 0  # submissions that got no 202, of which each may be stored all the same

    async def play(self, gateway: Daemon) -> None:
        """Ask this gateway for all of it."""
        body = b"body"
        if not self.call_id:
            self.refused += 1
            self.call_id = await gateway.submit(self.scenario.path, body, **self.scenario.headers)
            self.refused -= 1
        await self.scenario.then(gateway, self.call_id)

    async def try_to_play(self, gateway: Daemon) -> None:
        """Ask a gateway whose host may die, or may not be able to store what is asked."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError, AssertionError):
            await self.play(gateway)
            await gateway.until(self.call_id, lambda record: is_over(record, self.scenario))


def is_over(record: dict[str, Any], scenario: Scenario) -> bool:
    """Whether a call is where the scenario ends."""
    return bool(record["status"] == scenario.end and record["callback"]["status"] != "pending")


async def disturb(name: str, folder: Path, number: int, how: str) -> bool:
    """Play a scenario and disturb the step of this number; whether there was one.

    `killed`: the host dies before the step arrives; `unacknowledged`: the answer to it is lost.
    """
    async with Stage(folder, LONG_PATIENCE if how == "killed" else "700ms") as stage:
        network, client = stage.network, Client(SCENARIOS[name])
        await stage.start()
        (network.hold if how == "killed" else network.swallow)(Nth(number))
        playing = asyncio.create_task(client.try_to_play(stage.disturbed))
        happening = asyncio.create_task(network.until(lambda: network.held or network.swallowed, "the step"))
        await asyncio.wait((playing, happening), return_when=asyncio.FIRST_COMPLETED)
        reached = bool(network.held or network.swallowed)
        if network.held:
            await stage.disturbed.kill()
            await network.cut()  # what was held is not passed on
            await network.heal()
            await stage.disturbed.start()
        happening.cancel()
        await asyncio.gather(playing, happening, return_exceptions=True)
        await network.heal()
        await stage.well.start()
        await client.play(stage.well)
        await assert_it_ended_once(stage, client)
        return reached


async def assert_it_ended_once(stage: Stage, client: Client) -> None:
    """Each call that there is ends in one state, which both hosts know, and nothing is left on the server."""
    for record in await stage.calls():  # a submission that got no 202 may be stored all the same
        await client.scenario.then(stage.well, record["id"])

    async def all_over() -> list[dict[str, Any]] | None:
        records = await stage.calls()
        return records if all(is_over(record, client.scenario) for record in records) else None

    await eventually(all_over)
    if client.scenario.then is not cancel:  # of a cancelled call the message may stay until it is due
        await eventually(stage.nothing_is_left)  # it may be all that there is of a call that got no 202
    records = await eventually(all_over)
    once = "Idempotency_Key" in client.scenario.headers
    assert 1 <= len(records) <= 1 + (0 if once else client.refused), records
    attempts = collections.Counter[str]()
    for record in records:
        attempts[record["call_id"]] += record["attempts"]
        assert await stage.disturbed.record(record["id"]) == record
        if record["callback"]["status"] != "none":
            assert record["call_id"] in stage.sink.call_ids
    runs = collections.Counter(stage.function.call_ids) - collections.Counter([stage.warm])
    assert set(runs) <= set(attempts), "the function was told of a call that nobody knows"
    assert runs <= attempts or client.scenario.then is run_again


LONG_SCENARIOS = [("retry", "killed"), ("redrive", "killed")]
LONG_SCENARIOS += [(name, "unacknowledged") for name in SCENARIOS if name != "key"]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("callback", "killed"),
        *(pytest.param(name, "killed", marks=pytest.mark.unmeasured) for name in ("delay", "key", "cancel")),
        ("key", "unacknowledged"),
        *(pytest.param(*scenario, marks=pytest.mark.long) for scenario in LONG_SCENARIOS),
    ],
)
async def test_no_step_is_the_wrong_moment(name: str, how: str, tmp_path: Path) -> None:
    """Whichever message of a call's life the host dies before, or whose acknowledgement is lost, it ends the same way.

    The messages are counted, not known: all are tried, some at a time, until there are no more.
    """
    reached = 0
    while True:
        numbers = range(reached, reached + 8)
        steps = (disturb(name, tmp_path / str(number), number, how) for number in numbers)
        results = await asyncio.gather(*steps, return_exceptions=True)
        for number, result in zip(numbers, results, strict=True):
            if isinstance(result, BaseException):
                raise AssertionError(f"step {number}") from result
        reached += sum(map(bool, results))
        if not all(results):
            break
    assert reached >= 2


@pytest.mark.parametrize("behind", [0, 1])
async def test_a_nak_that_the_server_forgets_costs_no_lease(
    behind: int, hosts: StartHost, server: NatsServer, network: Network, function: Server
) -> None:
    """A call that was sent to a host which died with it runs at once all the same, also if others wait behind it."""
    alone = await hosts(one_function(function, '[queues.faas-request]\nack_wait = "1h"'), network.url)
    await post(alone, "/system/queues/faas-request/pause")
    calls = [await alone.submit("it") for _ in range(1 + behind)]
    async with server.jetstream() as jetstream:  # a host that dies with the first of them
        dead = await jetstream.pull_subscribe_bind("work+faas-request+it=2Eopenfaas-fn", STREAM)
        await dead.fetch(1)
    network.weaken(1)
    await alone.kill()
    await alone.start()
    await network.until(lambda: any(message.data == b"-NAK" for message in network.changes), "a NAK")
    await post(alone, "/system/queues/faas-request/resume")
    assert await ended(alone, calls) == {"success": 1 + behind}


# ---- all at random -------------------------------------------------------------------------------


async def clients_of(witness: Witness) -> None:
    """Clients that end when their host is gone, or can't store what they ask for."""
    try:
        await witness.client()
    except AssertionError as error:
        if "503" not in str(error):
            raise


class Siege:
    """One server, two hosts, and clients of both, while they are killed in turns."""

    def __init__(self, server: NatsServer, pair: Sequence[Daemon], sink: Server) -> None:
        self.server, self.pair = server, pair
        self.witnesses = [Witness(host, sink) for host in pair]
        self.first, self.second = self.witnesses
        self.second.stories, self.second.wrong = self.first.stories, self.first.wrong
        self.chance = self.first.chance
        self.killed = 0  # hosts

    async def kill(self, victim: NatsServer | Daemon) -> None:
        """Kill and start one of them at any moment under load, and wait until both hosts are ready."""
        stories = self.first.stories
        self.first.some_accepted.clear()
        clients = [asyncio.create_task(clients_of(witness)) for witness in self.witnesses for _ in range(3)]
        # The moment of the kill is the thing here: any moment in the first fifth of a second under load.
        await asyncio.sleep(self.chance.uniform(0, 0.2))
        await self.first.some_accepted.wait()
        self.killed += victim is not self.server
        await victim.kill()
        await victim.start()
        for client in clients:
            client.cancel()
        for result in await asyncio.gather(*clients, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError), result
        self.first.life = self.second.life = self.first.life + 1
        for host in self.pair:
            await eventually(functools.partial(ready, host))
        for call_id, found in (await self.first.records()).items():
            if found["completed_at"] is None and stories[call_id].path in ("", *CANCELLED):
                await self.first.cancel(call_id, stories[call_id])

    async def everything_ends(self) -> dict[str, dict[str, Any]]:
        """The records, once no call has anything left to do, and neither has the server."""
        left: list[object] = []

        async def all_done() -> bool:
            left[:] = [record for record in (await self.second.records()).values() if not is_done(record)]
            left.extend(subject for subject in await self._subjects() if ".work." in subject)
            return not left

        try:
            await eventually(all_done)
        except TimeoutError:
            raise AssertionError(left) from None
        return await self.second.records()

    async def _subjects(self) -> list[str]:
        async with self.server.jetstream() as jetstream:
            return list((await jetstream.stream_info(STREAM, subjects_filter=">")).state.subjects or {})

    async def end(self) -> str:
        """Compare what the records say with what was seen of each call that was accepted; what there was to see."""
        records = await self.everything_ends()
        accepted = {key: story for key, story in self.first.stories.items() if story.accepted}
        lost, again = 0, 0
        for call_id, story in accepted.items():
            if (record := records.get(call_id)) is not None:
                assert (record["status"], record["callback"]["status"]) in ENDS[story.path], (record, story)
                assert story.runs <= record["attempts"] or story.redriven, (record, story)
            elif not (story.cancelled is not None if story.path in CANCELLED else story.answer):
                lost += 1  # else its record was pruned, after the end
            assert bool(story.callbacks) == (story.path in TOLD), story
            again += story.runs > 1 and story.path in ("/plain", "/delayed")
        assert self.first.wrong == []
        assert {story.path for story in accepted.values()} == set(ENDS)
        most = self.killed * MOST_RUNNING
        told = f"{len(accepted)} calls accepted, {again} run twice (at most {most}), {lost} lost"
        assert lost == 0, told
        assert again <= most, told
        return told


MOST_RUNNING = 16 + 4  # calls of one host at once


@pytest.mark.unmeasured
@pytest.mark.parametrize("who", [pytest.param("server", marks=pytest.mark.long), "anybody"])
async def test_random_kills_break_no_promise(
    hosts: StartHost, server: NatsServer, function: Server, sink: Server, who: str
) -> None:
    """Whoever is killed and whenever: each accepted call ends in one state and stays there, is told of only once it has
    ended, and does not run again once its outcome is stored; with retries, delays, cancels, redrives and pruning.
    Only what a killed host was running may run twice."""
    settings = (
        f'[functions.it]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 16\n[queues.slow]\n'
        'max_inflight = 4\nack_wait = "1s"\n[retry]\nattempts = 1000\nmax_interruptions = 1000\nmax_wait = "50ms"\n'
        '[callback]\nattempts = 1000\n[calls]\nkeep = "4s"\nkeep_failed = "4s"'
    )
    pair = [await hosts(settings) for _ in range(2)]
    siege = Siege(server, pair, sink)
    function.behaviour, sink.behaviour = siege.first.function, siege.first.callback
    victims: list[NatsServer | Daemon] = [server] if who == "server" else [server, *pair]
    for _ in range(KILLS):
        await siege.kill(siege.chance.choice(victims))
    told = await siege.end()
    print(f"{KILLS} kills of {who}: {told}")
