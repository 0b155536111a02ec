"""Attempts that overlap, and attempts that wait: each has its own end, and none waits for ever.

An attempt that was cancelled may take its time to die, while its call, run again, is at the next
one already. And one that was claimed may have to wait for a slot, while their number changes.
"""

import asyncio
import collections
import json
import re
import signal
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path

import pytest
from aiohttp import web
from conftest import PATIENCE, PYTHON, Daemon, Faults, Gate, Request, Server, StartDaemon, ask
from provider import Provider, credential_files, running_provider
from queues import OK, REQUESTS, STORES, Bench, Store, open_bench

from faasd_async import SUCCEEDED, Claim, Consumer, Decision, Outcome, Rate


async def cancel(gateway: Daemon, call_id: str) -> None:
    """Have a call cancelled that is not final, or its callback."""
    reply = await ask(gateway.url, f"/async-function/{call_id}", method="DELETE")
    assert reply.status == 202, reply


async def run_again(gateway: Daemon, call_id: str) -> None:
    """Have a finished call run once more."""
    reply = await ask(gateway.url, f"/system/calls/{call_id}/retry", method="POST")
    assert reply.status == 202, reply


# ---- an attempt that is slow to die --------------------------------------------------------------

# A program that asks a server what to do. Told to cling, it has itself traced (ptrace(2)) by a
# child in a session of its own. When it is killed then, its end is told to the tracer. Its parent,
# the daemon, learns of it only when the tracer has gone, which it does once the server answers it.
PROGRAM = """
import ctypes, http.client, os, signal, sys

PTRACE_SEIZE, PR_SET_PTRACER, ANY_PROCESS = 0x4206, 0x59616D61, ctypes.c_ulong(-1)

def ask(*path):
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
    connection.request("GET", "/" + "/".join(map(str, path)))
    return connection.getresponse().read().decode()

me = os.getpid()
if ask("begin", me) == "cling":
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PTRACER, ANY_PROCESS)
    if os.fork() == 0:
        try:
            os.setsid()
            os.closerange(0, 3)
            traced = libc.ptrace(PTRACE_SEIZE, me, None, None) == 0
            ask("cling", me, "traced" if traced else os.strerror(ctypes.get_errno()))
        finally:
            os._exit(0)
    signal.pause()
print(ask("run", me), end="")
"""


UNTIL_DEAD = f"faasd_async.KILL_S = {PATIENCE}"  # What dies late is waited for, on a busy machine too.


class Clinging:
    """A function whose runs cling to their lives, or run until the test lets them end.

    A run that clings is killed like any other, and stays a zombie for whose end the daemon waits.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.clings = False  # what the next run does
        self.dying = 0  # process id of the last run that clung
        self.let_go = Gate()  # opened: that one is gone
        self.finish = Gate()  # opened: those that run print "ok" and end
        server.behaviour = self._behave

    async def _behave(self, request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        _, what, *_ = seen.target.split("/")
        if what == "begin":
            return web.Response(text="cling" if self.clings else "run")
        return await (self.let_go if what == "cling" else self.finish)(request, seen)

    async def until(self, what: str, number: int) -> str:
        """Wait until so many runs have come to this; the path by which the last of them says so."""
        found: list[str] = []

        def arrived() -> bool:
            targets = [request.target for request in self.server.requests]
            found[:] = [target for target in targets if target.startswith(f"/{what}/")]
            return len(found) >= number

        await self.server.until(arrived, f"{number} times /{what}")
        return found[number - 1]

    async def overtaken(self, gateway: Daemon, turn: int = 1, **headers: str) -> str:
        """A call whose first run was cancelled and is not dead yet while its second one runs."""
        self.clings, self.let_go, self.finish = True, Gate(), Gate()
        call_id = await gateway.submit("it", b"", **headers)
        _, _, process, outcome = (await self.until("cling", turn)).split("/")
        assert outcome == "traced", f"ptrace(2) is not possible here: {outcome}"
        self.clings, self.dying = False, int(process)
        await cancel(gateway, call_id)
        await run_again(gateway, call_id)
        await self.until("run", turn)
        return call_id

    async def dies(self) -> None:
        """Let go of the run that clings, and return when the daemon has been told of its end.

        Polls, because nobody else is told.
        """
        assert self.exists(), "it is dead already"
        self.let_go.open()
        async with asyncio.timeout(PATIENCE):
            while True:
                if not self.exists():
                    return
                await asyncio.sleep(0.01)

    def exists(self) -> bool:
        """Whether the run that clings is there, be it as a zombie."""
        return Path(f"/proc/{self.dying}/stat").exists()


@pytest.fixture
async def clinging(function: Server) -> AsyncIterator[Clinging]:
    """A function that clings; at the end nothing of it is left."""
    one = Clinging(function)
    yield one
    one.let_go.open()
    one.finish.open()


def settings(clinging: Clinging, more: str = "") -> str:
    """That function, as `it`, whose calls are tried once."""
    command = [*PYTHON, PROGRAM, str(clinging.server.port)]
    return f"[functions.it]\ncommand = {json.dumps(command)}\n[retry]\nattempts = 1\n{more}"


async def test_a_cancelled_attempt_that_dies_late_takes_no_outcome_along(
    daemon: StartDaemon, clinging: Clinging
) -> None:
    """The call was run again at once: that attempt ends later, and its outcome is stored."""
    gateway = await daemon(settings(clinging), before=UNTIL_DEAD)
    call_id = await clinging.overtaken(gateway)
    await clinging.dies()
    assert (await gateway.record(call_id))["status"] == "running"
    clinging.finish.open()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"], record["response_bytes"]) == ("success", 1, 2)
    assert (await ask(gateway.url, f"/system/calls/{call_id}/log")).body == b"ok"


async def test_the_attempt_after_one_that_died_late_can_be_cancelled_too(
    daemon: StartDaemon, clinging: Clinging
) -> None:
    """Cancelled itself, it is stopped."""
    gateway = await daemon(settings(clinging), before=UNTIL_DEAD)
    call_id = await clinging.overtaken(gateway)
    await clinging.dies()
    gone = clinging.server.cancelled
    await cancel(gateway, call_id)
    await clinging.server.until(lambda: clinging.server.cancelled > gone, "the end of the second run")
    assert (await gateway.final(call_id))["status"] == "cancelled"


async def test_a_call_can_be_cancelled_while_an_earlier_attempt_of_it_dies(
    daemon: StartDaemon, clinging: Clinging
) -> None:
    """Both are stopped; the call can be run once more, and ends well."""
    gateway = await daemon(settings(clinging), before=UNTIL_DEAD)
    call_id = await clinging.overtaken(gateway)
    gone = clinging.server.cancelled
    await cancel(gateway, call_id)
    await clinging.server.until(lambda: clinging.server.cancelled > gone, "the end of the second run")
    await run_again(gateway, call_id)
    await clinging.until("run", 2)
    await clinging.dies()
    clinging.finish.open()
    assert (await gateway.final(call_id))["status"] == "success"


@pytest.mark.unmeasured
async def test_attempts_that_die_late_keep_no_slot(daemon: StartDaemon, clinging: Clinging) -> None:
    """Each dies after its call has ended; a queue of two slots goes on after five of them."""
    gateway = await daemon(settings(clinging, "[queues.faas-request]\nmax_inflight = 2"), before=UNTIL_DEAD)
    for turn in range(1, 6):
        call_id = await clinging.overtaken(gateway, turn)
        clinging.finish.open()
        assert (await gateway.final(call_id))["status"] == "success"
        await clinging.dies()
    calls = [await gateway.submit("it") for _ in range(3)]
    assert [(await gateway.final(call_id))["status"] for call_id in calls] == ["success"] * 3


async def test_an_attempt_that_dies_late_holds_its_slot_until_then(daemon: StartDaemon, clinging: Clinging) -> None:
    """With it and the next one a queue of two slots is full; what waits begins when it is dead."""
    gateway = await daemon(settings(clinging, "[queues.faas-request]\nmax_inflight = 2"), before=UNTIL_DEAD)
    call_id = await clinging.overtaken(gateway)
    waiting = await gateway.submit("it")
    listed = json.loads((await ask(gateway.url, "/system/queues")).body)["queues"]
    assert [(queue["depth"], queue["inflight"]) for queue in listed if queue["name"] == "faas-request"] == [(1, 2)]
    await clinging.dies()
    await clinging.until("run", 2)
    clinging.finish.open()
    assert [(await gateway.final(one))["status"] for one in (call_id, waiting)] == ["success"] * 2


async def test_the_callback_of_a_call_whose_first_attempt_dies_late_is_delivered(
    daemon: StartDaemon, clinging: Clinging, sink: Server
) -> None:
    """Once, although that attempt ends while the callback of the second one is being sent."""
    sink.behaviour = taken = Gate()
    gateway = await daemon(settings(clinging), before=UNTIL_DEAD)
    call_id = await clinging.overtaken(gateway, X_Callback_Url=sink.url)
    clinging.finish.open()
    await sink.wait_for(1)
    await clinging.dies()
    taken.open()
    record = await gateway.final(call_id)
    assert (record["status"], record["callback"]["status"]) == ("success", "delivered")
    assert [request.body for request in sink.requests] == [b"ok"]


async def broken_off(sink: Server, number: int) -> None:
    """Wait until so many deliveries were broken off."""
    await sink.until(lambda: sink.cancelled == number, f"{number} broken deliveries")


async def test_a_callback_that_is_cancelled_while_it_is_sent_is_sent_again_with_its_call(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """The call is run again at once: the cancelled delivery ends, the next one is not touched."""
    sink.behaviour = taken = Gate()
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"')
    call_id = await gateway.submit("it", X_Callback_Url=sink.url)
    for turn in range(1, 4):
        await sink.wait_for(turn)
        await cancel(gateway, call_id)
        await run_again(gateway, call_id)
        await broken_off(sink, turn)
    await sink.wait_for(4)
    taken.open()
    record = await gateway.final(call_id)
    assert (record["callback"]["status"], record["callback"]["attempts"]) == ("delivered", 1)
    assert (len(function.requests), sink.cancelled) == (4, 3)


# ---- an attempt that is cancelled before it begins -----------------------------------------------


class Doors:
    """A behaviour: each path has a gate of its own, closed at first."""

    def __init__(self) -> None:
        self._gates: collections.defaultdict[str, Gate] = collections.defaultdict(Gate)

    def open(self, *paths: str) -> None:
        """Let all pass that come to one of these paths."""
        for path in paths:
            self._gates[path].open()

    async def __call__(self, request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        """Answer `ok` in the end."""
        return await self._gates[seen.target](request, seen)


async def reached(gateway: Daemon) -> None:
    """Return when the daemon has read what it was sent before."""
    for _ in range(5):
        assert (await ask(gateway.url, "/healthz")).status == 200


async def test_a_call_that_is_cancelled_in_the_commit_of_its_claim_is_stopped(
    daemon: StartDaemon, function: Server, faults: Faults
) -> None:
    """The disk hangs for a moment, and both are stored together: the function does not run on."""
    function.behaviour = doors = Doors()
    gateway = await daemon(
        f'[functions.it]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 1',
        env=faults.env,
    )
    await gateway.submit("it/first")
    second = await gateway.submit("it/second")
    await function.wait_for(1)
    with faults("s", 0):
        hanging = asyncio.create_task(gateway.submit("it", X_Delay="1h"))
        await reached(gateway)
        doors.open("/first")
        await function.until(lambda: function.running == 0, "the end of the first call")
        await reached(gateway)
        cancelled = asyncio.create_task(cancel(gateway, second))
        await reached(gateway)
    await asyncio.gather(hanging, cancelled)
    assert (await gateway.final(second))["status"] == "cancelled"
    doors.open("/third")
    third = await gateway.submit("it/third")
    assert (await gateway.final(third))["status"] == "success"
    assert function.running == 0


# ---- an attempt that has only just begun ---------------------------------------------------------

# Its request is sent where it is claimed, on a connection that an earlier call has left, and it has
# a task only if it lasts.
REUSE = "faasd_async.PROOF_S = 0.0"  # A connection is used again at once.


@pytest.mark.parametrize("lasts", [0.0, 0.2], ids=["at once", "later"])
async def test_a_call_is_cancelled_whenever_that_is(daemon: StartDaemon, function: Server, lasts: float) -> None:
    """The function's request is cut, and the slot is free."""
    function.behaviour = doors = Doors()
    one_slot = "[queues.faas-request]\nmax_inflight = 1"
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"\n{one_slot}', before=REUSE)
    doors.open("/first", "/third")
    await gateway.final(await gateway.submit("it/first"))
    second = await gateway.submit("it/second")
    await function.wait_for(2)
    await asyncio.sleep(lasts)
    await cancel(gateway, second)
    await function.until(lambda: function.running == 0, "the end of the request")
    assert (await gateway.final(second))["status"] == "cancelled"
    assert (await gateway.final(await gateway.submit("it/third")))["status"] == "success"
    metrics = (await ask(gateway.url, "/metrics")).body.decode()
    running = re.findall(r"^queue_worker_function_invocation_inflight\{.+\} (.+)$", metrics, re.MULTILINE)
    assert running == ["0.0"]


async def test_a_time_limit_below_the_time_without_a_task_holds(daemon: StartDaemon, function: Server) -> None:
    """The attempt gets its task, which has the limit, by then."""
    function.behaviour = doors = Doors()
    short = '[queues.short]\ntimeout = "20ms"\n[queues.faas-request]\n[retry]\nattempts = 1'
    before = f"{REUSE}; faasd_async.PLAIN_S = 3600.0"
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"\n{short}', before=before)
    doors.open("/first")
    await gateway.final(await gateway.submit("it/first"))
    record = await gateway.final(await gateway.submit("it/second", X_Queue="short"))
    assert (record["status"], record["http_status"]) == ("timeout", 504)
    assert record["error"] == "function it did not answer within queues.short.timeout (0.02s)"


@pytest.mark.parametrize("lasts", [0.0, 0.2], ids=["at once", "later"])
async def test_a_call_is_queued_again_uncharged_whenever_the_daemon_stops(
    daemon: StartDaemon, function: Server, lasts: float
) -> None:
    """It runs again after the next start."""
    function.behaviour = doors = Doors()
    settings = f'[gateway]\ndrain_timeout = "0s"\n[functions.it]\nurl = "{function.url}"'
    gateway = await daemon(settings, before=REUSE)
    doors.open("/first")
    await gateway.final(await gateway.submit("it/first"))
    second = await gateway.submit("it/second")
    await function.wait_for(2)
    await asyncio.sleep(lasts)
    assert await gateway.terminate() == 0
    await function.until(lambda: function.running == 0, "the end of the request")
    doors.open("/second")
    await gateway.start()
    record = await gateway.final(second)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)
    assert [request.target for request in function.requests] == ["/first", "/second", "/second"]


# ---- an attempt that waits for a slot ------------------------------------------------------------


@pytest.mark.parametrize("limit", ["max_inflight = 2", ""], ids=["raised", "removed"])
async def test_a_claim_that_waits_for_a_slot_goes_on_when_there_are_more(
    daemon: StartDaemon, function: Server, faults: Faults, limit: str
) -> None:
    """A sync call took its slot while the claim was stored; a reload gives the function another."""

    def settings(limit: str) -> str:
        return f'[functions.it]\nurl = "{function.url}"\n{limit}'

    function.behaviour = doors = Doors()
    gateway = await daemon(settings("max_inflight = 1"), env=faults.env)
    first = asyncio.create_task(ask(gateway.url, "/function/it/first"))
    await function.wait_for(1)
    queued = await gateway.submit("it/queued")
    with faults("s", 0):
        doors.open("/first")
        # With the end of the first call, the queued one is claimed; the disk keeps that unstored.
        assert (await first).status == 200
        second = asyncio.create_task(ask(gateway.url, "/function/it/second"))
        await function.wait_for(2)
    # On a slow machine it may not be claimed yet, and then a reload has to have it claimed.
    assert [request.target for request in function.requests] == ["/first", "/second"]
    gateway.configure(settings(limit))
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("configuration reloaded")
    await function.wait_for(3)
    assert function.running == 2
    doors.open("/second", "/queued")
    assert (await second).status == 200
    assert (await gateway.final(queued))["status"] == "success"


@pytest.mark.parametrize("limit", ["max_inflight = 2", ""], ids=["raised", "removed"])
async def test_a_call_that_is_held_back_in_the_queue_is_claimed_when_a_reload_gives_it_a_slot(
    daemon: StartDaemon, function: Server, limit: str
) -> None:
    """Nothing else has to happen in its queue."""

    def settings(limit: str) -> str:
        return f'[functions.it]\nurl = "{function.url}"\n{limit}'

    function.behaviour = doors = Doors()
    gateway = await daemon(settings("max_inflight = 1"))
    sync = asyncio.create_task(ask(gateway.url, "/function/it/sync"))
    await function.wait_for(1)
    queued = await gateway.submit("it/queued")
    gateway.configure(settings(limit))
    gateway.signal(signal.SIGHUP)
    await function.wait_for(2)
    assert not sync.done()
    doors.open("/sync", "/queued")
    assert (await sync).status == 200
    assert (await gateway.final(queued))["status"] == "success"


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    """A provider without functions."""
    async with running_provider() as one:
        yield one


LIMIT = "com.openfaas.max_inflight"


@pytest.mark.parametrize("annotations", [{LIMIT: "2"}, {}], ids=["raised", "removed"])
async def test_a_call_that_is_held_back_is_claimed_when_the_provider_gives_it_a_slot(
    daemon: StartDaemon, provider: Provider, tmp_path: Path, annotations: dict[str, str]
) -> None:
    """As soon as a look-up has told of it: no other call of the function has to begin or end."""
    function = provider.deploy("env", doors := Doors(), annotations={LIMIT: "1"})
    files = credential_files(tmp_path, "provider", provider.user, provider.password)
    gateway = await daemon(f'[provider]\nurl = "{provider.url}"\n{files}cache = "1ms"')
    sync = asyncio.create_task(ask(gateway.url, "/function/env/sync"))
    await provider.until(lambda: len(function.requests) == 1, "the sync call")
    queued = await gateway.submit("env/queued")
    function.annotations = annotations
    refused = await ask(gateway.url, "/async-function/env", "X-Delay: nonsense", method="POST")
    assert refused.status == 400  # but the function was looked up for it
    await provider.until(lambda: len(function.requests) == 2, "the queued call")
    assert not sync.done()
    doors.open("/sync", "/queued")
    assert (await sync).status == 200
    assert (await gateway.final(queued))["status"] == "success"


# ---- an attempt that has just ended --------------------------------------------------------------


class OneAttempt:
    """A job, and its only attempt, which ends when the test says how."""

    def __init__(self) -> None:
        self.begun: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def end(self, outcome: Outcome) -> None:
        """End it."""
        self._outcome.set_result(outcome)

    def room(self, name: str, lanes: Iterable[str]) -> tuple[int, Mapping[str, int]]:
        return 1, {}

    def rates(self, name: str) -> Mapping[str, Rate]:
        return {}

    def timeout(self, name: str) -> float:
        return PATIENCE

    def attempt(self, claim: Claim) -> "OneAttempt":
        self.begun.set_result(claim)
        return self

    def begin(self) -> None:
        """It takes a task."""

    async def execute(self) -> Outcome | None:
        return await self._outcome

    def outcome(self) -> Outcome | None:
        return self._outcome.result()

    def decide(self, claim: Claim, outcome: Outcome) -> Decision:
        return SUCCEEDED

    def ended(self, claim: Claim, outcome: Outcome, decision: Decision) -> None: ...


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.__name__)
async def test_an_end_is_stored_though_a_cancellation_comes_with_it(store: type[Store], tmp_path: Path) -> None:
    """What a queue has to do for an attempt is not cut short, or it would hold on to its slot and its lease."""
    async with open_bench(Bench, store, tmp_path) as bench:
        await bench.enqueue("a")
        job = OneAttempt()
        consumer = Consumer(REQUESTS, bench.queue, job, busy=lambda: 1)
        claim = await asyncio.wait_for(job.begun, PATIENCE)
        job.end(OK)
        consumer.cancel(claim.receipt)
        await bench.until(lambda: bench.ended)
        assert await bench.status("a") == "success"
        consumer.halt()
        await consumer.stop(asyncio.create_task(asyncio.sleep(0)))
