"""Starting, stopping, reloading, and what is said meanwhile: to systemd, to the log, to the operator."""

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import (
    PATIENCE,
    PIPE,
    SCRIPT,
    Daemon,
    Finished,
    Gate,
    Server,
    ServiceManager,
    StartDaemon,
    answer,
    ask,
    connection,
    faasd,
    finish,
    free_address,
    run,
    start_program,
)

# Its first or last moment is the subject, so nothing of it is left out.
own_interpreter = pytest.mark.own_interpreter


def settings(function: Server, more: str = "") -> str:
    """One function, `it`."""
    return f'[functions.it]\nurl = "{function.url}"\n{more}\n'


# ---- signals at odd moments ------------------------------------------------------------------------------------


async def begin_reading(gateway: Daemon, secret: Path) -> int:
    """Start it with a secret that is a pipe; as soon as that is opened, what is to be written to."""
    os.mkfifo(secret)
    await gateway.spawn()
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return os.open(secret, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # Nobody reads it yet.
                await asyncio.sleep(0.01)


def with_secret(secret: Path, user: Path) -> str:
    """A configuration that names it."""
    user.write_text("admin")
    return f'[auth]\nuser_file = "{user}"\npassword_file = "{secret}"'


@own_interpreter
async def test_a_reload_during_the_start_is_done_after_it(
    daemon: StartDaemon, systemd: ServiceManager, tmp_path: Path
) -> None:
    """It neither ends the daemon nor is lost, nor are we ready the sooner for it."""
    secret = tmp_path / "secret"
    env = {"NOTIFY_SOCKET": str(systemd.path)}
    gateway = await daemon(with_secret(secret, tmp_path / "user"), env=env, start=False)
    writing = await begin_reading(gateway, secret)
    gateway.signal(signal.SIGHUP)
    secret.unlink()
    secret.write_bytes(b"password")
    os.write(writing, b"password")
    os.close(writing)
    await gateway.wait_for_log("configuration reloaded")
    assert "listening on " in gateway.log
    await systemd.wait_for("READY=1", times=2)
    states = [line.partition("=")[0] for line in systemd.told]
    assert states.index("READY") < states.index("RELOADING")


# Python runs this before all else: a signal comes while the program is imported.
SITE = """
import os, signal, sys

class Early:
    def find_spec(self, name, path=None, target=None):
        if name == "yarl":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGHUP)

sys.meta_path.insert(0, Early())
"""


@pytest.mark.parametrize("how", ["module", "command"])
async def test_a_reload_while_all_is_imported_is_done_too(tmp_path: Path, how: str) -> None:
    """That takes seconds on a small host. It still ends a client, whose terminal has gone."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "config.toml").write_text(f'[gateway]\nlisten = "{free_address()}"\n[store]\npath = "calls.db"')
    command = tmp_path / "faasd-async"
    command.write_text("import sys\nfrom faasd_async import main\nsys.exit(main())")
    program: list[str | Path] = [sys.executable, *(("-m", "faasd_async") if how == "module" else (command,))]
    paths = os.pathsep.join(filter(None, (str(tmp_path), str(Path(SCRIPT).parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths}
    words = ["--config", "config.toml"]
    daemon = await asyncio.create_subprocess_exec(*program, "serve", *words, cwd=tmp_path, env=environment, stderr=PIPE)
    assert daemon.stderr is not None
    async with asyncio.timeout(PATIENCE):
        log = await daemon.stderr.readuntil(b"configuration reloaded\n")
        if b"listening" not in log:
            await daemon.stderr.readuntil(b"listening")
        client = await asyncio.create_subprocess_exec(*program, "status", *words, cwd=tmp_path, env=environment)
        assert await client.wait() == -signal.SIGHUP
        daemon.terminate()
        await daemon.stderr.read()
        assert await daemon.wait() == 0


@own_interpreter
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_during_the_start_is_a_stop(daemon: StartDaemon, tmp_path: Path, number: signal.Signals) -> None:
    """There is nothing to wait for."""
    secret = tmp_path / "secret"
    gateway = await daemon(with_secret(secret, tmp_path / "user"), start=False)
    writing = await begin_reading(gateway, secret)
    gateway.signal(number)
    assert await gateway.ended() == 0
    os.close(writing)
    assert gateway.lines == []


def has_open(pid: int, path: Path) -> bool:
    """Whether a process has opened a file. It may open and close others meanwhile."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if descriptor.readlink() == path.resolve():
                return True
    return False


@own_interpreter
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_of_a_daemon_that_waits_for_the_store_is_a_stop(
    daemon: StartDaemon, number: signal.Signals
) -> None:
    """Another process has the file: nothing has begun, and nothing has failed."""
    await daemon("")
    other = await daemon("", start=False)
    await other.spawn()
    async with asyncio.timeout(PATIENCE):
        while not has_open(other.pid, other.store):  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
    other.signal(number)
    assert await other.ended() == 0
    assert other.lines == []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
async def test_a_signal_that_means_nothing_is_ignored(
    daemon: StartDaemon, function: Server, number: signal.Signals
) -> None:
    """Other daemons have uses for it: the log says that this one has none."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function))
    call_id = await gateway.submit("it")
    await function.wait_for(1)
    gateway.signal(number)
    await gateway.wait_for_log(f"{number.name} is ignored: SIGHUP has the file read again")
    gate.open()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"]) == ("success", 1)


@own_interpreter
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
async def test_signals_during_a_stop_do_not_spoil_it(daemon: StartDaemon, number: signal.Signals) -> None:
    """However many come, up to the last moment."""
    gateway = await daemon("")
    ended = asyncio.create_task(gateway.ended())
    pid = gateway.pid
    os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError):
        while not ended.done():
            os.kill(pid, number)
            await asyncio.sleep(0)
    assert await ended == 0
    assert "INFO stopped" in gateway.log


async def test_a_secret_that_is_slow_to_come_at_a_reload_holds_nobody_up(
    daemon: StartDaemon, function: Server, tmp_path: Path
) -> None:
    """Calls run, and the reload ends once it is there."""
    gateway = await daemon(settings(function))
    os.mkfifo(secret := tmp_path / "secret")
    gateway.configure(settings(function, f'[callback]\nsigning_secret_file = "{secret}"'))
    gateway.signal(signal.SIGHUP)
    with await asyncio.to_thread(secret.open, "w") as writer:  # once the daemon reads it
        assert (await gateway.final(await gateway.submit("it")))["status"] == "success"
        writer.write("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    await gateway.wait_for_log("configuration reloaded")


async def test_a_daemon_that_stops_takes_over_nothing_new(daemon: StartDaemon, function: Server) -> None:
    """A reload then could begin to claim from new queues."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function))
    await gateway.submit("it")
    await function.wait_for(1)
    gateway.signal(signal.SIGTERM)
    await gateway.wait_for_log("stopping: waiting")
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("stopping: configuration not reloaded")
    gate.open()
    assert await gateway.ended() == 0


async def test_a_configuration_that_came_through_a_pipe_stays(daemon: StartDaemon, function: Server) -> None:
    """Nothing comes out of it a second time, and to have no functions is not what is meant."""
    gateway = await daemon(settings(function), start=False)
    content = gateway.config.read_text()
    gateway.config.unlink()
    os.mkfifo(gateway.config)
    writing = asyncio.create_task(asyncio.to_thread(gateway.config.write_text, content))
    await gateway.start()
    await writing
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("is no file, and could be read at the start only")
    await gateway.wait_for_log("configuration not reloaded: the old settings stay")
    assert (await ask(gateway.url, "/function/it")).status == 200


# ---- stopping --------------------------------------------------------------------------------------------------


@own_interpreter
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_daemon_stops_at_once(daemon: StartDaemon, number: signal.Signals) -> None:
    """Exit code 0 for either signal."""
    gateway = await daemon("")
    gateway.signal(number)
    assert await gateway.ended() == 0


async def test_a_stop_waits_for_what_runs(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """The running call ends well and is known to have; no queued call is started meanwhile."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function, "[queues.faas-request]\nmax_inflight = 1"))
    running = await gateway.submit("it")
    queued = await gateway.submit("it")
    await function.wait_for(1)
    gateway.signal(signal.SIGTERM)
    await gateway.wait_for_log("stopping")
    gate.open()
    assert await gateway.ended() == 0
    assert function.call_ids == [running]
    await gateway.start()
    record = await gateway.final(running)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)
    assert (await gateway.final(queued))["status"] == "success"


async def test_a_stop_waits_for_running_sync_calls(daemon: StartDaemon, function: Server) -> None:
    """The client gets its answer; new clients are refused meanwhile."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function))
    client = asyncio.create_task(ask(gateway.url, "/function/it"))
    await function.wait_for(1)
    gateway.signal(signal.SIGTERM)
    await gateway.wait_for_log("stopping")
    with pytest.raises(ConnectionError):
        async with asyncio.timeout(PATIENCE):
            while True:  # the log line comes just before the listener is closed
                await ask(gateway.url, "/healthz")
    gate.open()
    assert (await client).body == b"ok"
    assert await gateway.ended() == 0


@own_interpreter
async def test_a_stop_tells_clients_that_an_answer_is_the_last(daemon: StartDaemon, function: Server) -> None:
    """Else the next request on the connection could meet its end, and nobody knew what became of it."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function))
    asked = {
        "a page": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "a call": b"POST /async-function/it HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
    }
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connection(gateway.url)) for _ in (*asked, "running")]
        for (reader, writer), request in zip(clients, asked.values(), strict=False):
            for _ in range(3):  # a head that is known is answered in a way of its own
                writer.write(request)
                assert b"close" not in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        clients[-1][1].write(b"GET /function/it HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await function.wait_for(4)
        gateway.signal(signal.SIGTERM)
        await gateway.wait_for_log("stopping: waiting")
        for (reader, writer), request in zip(clients, asked.values(), strict=False):
            writer.write(request)
            answered = await asyncio.wait_for(reader.read(), PATIENCE)
            assert b"Connection: close" in answered, answered
        gate.open()
        answered = await asyncio.wait_for(clients[-1][0].read(), PATIENCE)
        assert answered.startswith(b"HTTP/1.1 200 OK"), answered
        assert b"Connection: close" in answered, answered
        assert answered.endswith(b"ok")
    assert await gateway.ended() == 0


PARTS = {
    "small": b"Content-Length: 10\r\n\r\npart",
    "large": b"Content-Length: 10000000\r\n\r\npart",
    "chunks": b"Transfer-Encoding: chunked\r\n\r\n4\r\npart\r\n",
    "asks": b"Content-Length: 10\r\nExpect: 100-continue\r\n\r\n",
}


@pytest.mark.parametrize("target", ["/function/it", "/async-function/cat", "/function/cat", "/async-function/nosuch"])
async def test_a_stop_does_not_wait_for_bodies_that_do_not_come(
    daemon: StartDaemon, function: Server, target: str
) -> None:
    """Their clients are told, soon and in words; what ran meanwhile ends well."""
    function.behaviour = gate = Gate()
    more = '[gateway]\ndrain_timeout = "1h"\nmax_payload = "1GiB"\n[functions.cat]\ncommand = ["cat"]'
    gateway = await daemon(settings(function, more))
    running = await gateway.submit("it")
    await function.wait_for(1)
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for part in PARTS.values():
            reader, writer = await stack.enter_async_context(connection(gateway.url))
            writer.write(f"POST {target} HTTP/1.1\r\nHost: localhost\r\n".encode() + part)
            clients.append(reader)
        if target != "/async-function/nosuch":
            await asyncio.wait_for(clients[-1].readuntil(b"100 Continue\r\n\r\n"), PATIENCE)
        gateway.signal(signal.SIGTERM)
        answers = await asyncio.wait_for(asyncio.gather(*(reader.read() for reader in clients)), PATIENCE)
    refused = b"404 Not Found" if "nosuch" in target else b"503 Service Unavailable"
    for name, text in zip(PARTS, answers, strict=True):
        assert refused in text, (name, text)
        assert b"Connection: close" in text or "nosuch" in target, (name, text)
    gate.open()
    assert await gateway.ended() == 0
    assert function.call_ids[0] == running
    await gateway.start()
    record = await gateway.final(running)
    assert (record["status"], record["attempts"]) == ("success", 1)


async def test_a_stop_waits_for_a_body_that_comes_slowly(daemon: StartDaemon, function: Server) -> None:
    """It takes longer as a whole than its pieces may."""
    gateway = await daemon(settings(function, '[gateway]\ndrain_timeout = "1h"'))
    async with connection(gateway.url) as (reader, writer):
        writer.write(b"POST /async-function/it HTTP/1.1\r\nHost: localhost\r\nContent-Length: 41\r\n\r\nx")
        await asyncio.sleep(0.1)
        gateway.signal(signal.SIGTERM)
        for _ in range(40):
            writer.write(b"x")
            await asyncio.sleep(0.1)
        assert b"202 Accepted" in await asyncio.wait_for(reader.read(), PATIENCE)
    assert await gateway.ended() == 0
    await gateway.start()
    assert [request.body for request in await function.wait_for(1)] == [b"x" * 41]


async def test_what_runs_for_too_long_is_queued_again(daemon: StartDaemon, function: Server) -> None:
    """After `drain_timeout` the call is cancelled without charging the attempt, and runs after the restart."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function, '[gateway]\ndrain_timeout = "100ms"'))
    call_id = await gateway.submit("it", b"body")
    await function.wait_for(1)
    assert await gateway.terminate() == 0
    await function.until(lambda: function.cancelled == 1, "disconnect")
    gate.open()
    await gateway.start()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)
    assert [(request.call_id, request.body) for request in function.requests] == [(call_id, b"body")] * 2


async def test_who_is_not_waited_for_any_longer_is_told(daemon: StartDaemon, function: Server) -> None:
    """At the end of `drain_timeout`, unless a part of the answer is sent: that does not look whole."""
    function.behaviour = Gate()
    more = """
[gateway]
drain_timeout = "100ms"
[functions.sleep]
command = ["sleep", "3600"]
"""
    gateway = await daemon(settings(function, more))
    targets = ("/function/it", "/function/sleep", "/r/app/it")
    clients = [asyncio.create_task(ask(gateway.url, target)) for target in targets]
    await function.wait_for(2)
    async with asyncio.timeout(PATIENCE):
        while (
            b'gateway_function_invocation_started{function_name="sleep.openfaas-fn"} 1'
            not in (await ask(gateway.url, "/metrics")).body
        ):
            pass
    assert await gateway.terminate() == 0
    for target, reply in zip(targets, await asyncio.gather(*clients), strict=True):
        assert reply.status == 503, (target, reply)
        assert reply.headers["Connection"] == "close"
        assert b"the daemon stops, and could wait no longer" in reply.body
        assert reply.body.startswith(b'{"error"') == target.startswith("/r/")


async def test_a_drain_timeout_of_nothing_stops_at_once(daemon: StartDaemon, function: Server) -> None:
    """`0s` is no time, not endless time; neither kind of call holds up the end."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function, '[gateway]\ndrain_timeout = "0s"'))
    client = asyncio.create_task(ask(gateway.url, "/function/it"))
    call_id = await gateway.submit("it")
    await function.wait_for(2)
    assert await gateway.terminate() == 0
    await asyncio.gather(client, return_exceptions=True)
    gate.open()
    await gateway.start()
    assert (await gateway.final(call_id))["status"] == "success"


async def test_a_second_signal_hurries(daemon: StartDaemon, function: Server) -> None:
    """Whoever asks twice does not want to wait for the drain; nothing is lost by it."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function, '[gateway]\ndrain_timeout = "1h"'))
    call_id = await gateway.submit("it")
    await function.wait_for(1)
    gateway.signal(signal.SIGTERM)
    await gateway.wait_for_log("stopping")
    assert await gateway.terminate() == 0
    gate.open()
    await gateway.start()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"]) == ("success", 1)


@pytest.mark.unmeasured
async def test_a_stop_under_load_loses_nothing(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """Whatever was accepted before the end is run, by this process or the next."""
    gateway = await daemon(settings(function))
    accepted: list[str] = []

    async def load() -> None:
        while True:
            accepted.append(await gateway.submit("it", X_Callback_Url=sink.url))

    clients = [asyncio.create_task(load()) for _ in range(4)]
    await function.wait_for(50)
    assert await gateway.terminate() == 0
    ends = await asyncio.gather(*clients, return_exceptions=True)
    assert not [end for end in ends if isinstance(end, AssertionError)], "an answer other than 202"
    await gateway.start()
    await sink.until(lambda: set(sink.call_ids) >= set(accepted), "every callback arrives")
    for call_id in accepted:
        record = await gateway.final(call_id)
        assert (record["status"], record["interrupted"]) == ("success", 0)
    assert sorted(function.call_ids) == sorted(set(function.call_ids)), "a call ran twice"


async def test_a_dispatcher_that_dies_stops_the_daemon(tmp_path: Path) -> None:
    """In order and with exit code 1, rather than leave its queue to nobody."""
    config = tmp_path / "config.toml"
    config.write_text(f'[gateway]\nlisten = "127.0.0.1:0"\n[store]\npath = "{tmp_path}/calls.db"')
    without = "faasd_async.InvocationJob.room = None"
    process = await start_program("--config", config, before=without, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    result = await finish(process, b"")
    assert result.code == 1
    assert "dispatcher of faas-request failed" in result.err
    assert result.err.endswith("stopped\n")


# ---- reloading -------------------------------------------------------------------------------------------------


async def test_sighup_reloads_the_functions(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """A changed URL and a new function are used from now on, without a restart."""
    gateway = await daemon(settings(function))
    await ask(gateway.url, "/function/it")
    gateway.configure(settings(sink, f'[functions.new]\nurl = "{sink.url}"'))
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("configuration reloaded")
    await ask(gateway.url, "/function/it/a")
    await ask(gateway.url, "/function/new/b")
    assert ([r.target for r in function.requests], [r.target for r in sink.requests]) == (["/"], ["/a", "/b"])


async def test_sighup_reloads_queues_and_retries(daemon: StartDaemon, function: Server) -> None:
    """A limit that is raised counts for what waits already."""
    function.behaviour = gate = Gate()
    gateway = await daemon(settings(function, "[queues.faas-request]\nmax_inflight = 1"))
    calls = [await gateway.submit("it") for _ in range(5)]
    await function.wait_for(1)
    gateway.configure(settings(function, "[queues.faas-request]\nmax_inflight = 5\n[retry]\nattempts = 2"))
    gateway.signal(signal.SIGHUP)
    await function.wait_for(5)
    gate.open()
    for call_id in calls:
        assert (await gateway.final(call_id))["status"] == "success"
    function.behaviour = answer(500)
    assert (await gateway.final(await gateway.submit("it")))["attempts"] == 2


async def test_a_call_whose_function_was_removed_is_not_lost(
    daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """It ends in an error that says so, and its callback is sent."""
    function.behaviour = gate = Gate()
    more = f'[functions.gone]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 1'
    gateway = await daemon(settings(function, more))
    await gateway.submit("it")
    await function.wait_for(1)
    call_id = await gateway.submit("gone", X_Callback_Url=sink.url)
    gateway.configure(settings(function, "[retry]\nattempts = 2\n[queues.faas-request]\nmax_inflight = 1"))
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("configuration reloaded")
    gate.open()
    record = await gateway.final(call_id)
    assert (record["status"], record["callback"]["status"]) == ("error", "delivered")
    assert "gone" in record["error"]


@pytest.mark.parametrize(
    ("broken", "key"),
    [
        ('[functions.it]\nurl = "http://127.0.0.1:1"\nqueu = "x"', "functions.it.queu"),
        ("[retry]\nattempts = 0", "retry.attempts"),
        ('[log]\nlevel = "loud"', "log.level"),
    ],
)
async def test_a_broken_file_is_refused_and_the_old_settings_stay(
    daemon: StartDaemon, function: Server, broken: str, key: str
) -> None:
    """The log says which key is wrong; calls go on as before."""
    gateway = await daemon(settings(function))
    gateway.configure(broken)
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log(key)
    assert (await ask(gateway.url, "/function/it")).status == 200
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"


async def test_a_file_that_can_not_be_read_or_is_empty_is_refused(daemon: StartDaemon, function: Server) -> None:
    """A full disk leaves an empty one behind: all calls that wait would end, for want of their functions."""
    gateway = await daemon(settings(function))
    held = gateway.config.read_bytes()
    gateway.config.unlink()

    def loop() -> None:
        gateway.config.symlink_to(gateway.config)

    def endless() -> None:
        gateway.config.write_text("number = " + "9" * 5000)

    cases: Sequence[tuple[Callable[[], object], str, Callable[[], object]]] = (
        (lambda: None, "No such file", lambda: None),
        (gateway.config.mkdir, "Is a directory", gateway.config.rmdir),
        (loop, "Too many levels of symbolic links", gateway.config.unlink),
        (gateway.config.touch, "is empty", gateway.config.unlink),
        (endless, "not valid TOML: a number has too many digits", gateway.config.unlink),
    )
    for make, words, remove in cases:
        make()
        first_line = len(gateway.lines)
        gateway.signal(signal.SIGHUP)
        await gateway.wait_for_log(f"{gateway.config}: {words}", first_line)
        await gateway.wait_for_log("configuration not reloaded: the old settings stay", first_line)
        assert (await ask(gateway.url, "/function/it")).status == 200
        remove()
    gateway.config.write_bytes(held)
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("configuration reloaded")


async def test_a_file_that_is_no_toml_is_refused_too(daemon: StartDaemon, function: Server) -> None:
    """A reload in the middle of an edit does no harm."""
    gateway = await daemon(settings(function))
    gateway.config.write_text("[functions.it\n")
    first_line = len(gateway.lines)
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("config.toml", first_line)
    assert (await ask(gateway.url, "/function/it")).status == 200


# ---- systemd ---------------------------------------------------------------------------------------------------


@own_interpreter
async def test_systemd_is_told_when_it_is_ready_and_when_it_stops(daemon: StartDaemon, systemd: ServiceManager) -> None:
    """READY=1 once it listens, STATUS= with something to read, STOPPING=1 on the way out."""
    gateway = await daemon("", env={"NOTIFY_SOCKET": str(systemd.path)})
    await systemd.wait_for("READY=1")
    assert (await ask(gateway.url, "/readyz")).status == 200
    assert len(await systemd.wait_for("STATUS=")) > len("STATUS=")
    assert "STOPPING=1" not in systemd.told
    assert await gateway.terminate() == 0
    await systemd.wait_for("STOPPING=1")


@own_interpreter
async def test_ready_is_not_said_too_early(daemon: StartDaemon, systemd: ServiceManager) -> None:
    """When READY=1 arrives, a client can connect."""
    gateway = await daemon("", env={"NOTIFY_SOCKET": str(systemd.path)}, start=False)
    address = free_address()
    gateway.configure(f'[gateway]\nlisten = "{address}"')
    await gateway.spawn()
    await systemd.wait_for("READY=1")
    assert (await ask(f"http://{address}", "/healthz")).status == 200


async def test_the_watchdog_is_fed(daemon: StartDaemon, systemd: ServiceManager) -> None:
    """More than once per WATCHDOG_USEC, for as long as it is well."""
    gateway = await daemon("", env={"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "500000"})
    await systemd.wait_for("WATCHDOG=1", times=3)
    assert await gateway.terminate() == 0


@pytest.mark.parametrize("watched", [{"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "-1"}])
async def test_the_watchdog_of_somebody_else_is_not_fed(
    daemon: StartDaemon, systemd: ServiceManager, watched: dict[str, str]
) -> None:
    """Variables that a parent has left behind, or that mean nothing (sd_watchdog_enabled(3))."""
    env = {"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "1000", **watched}
    gateway = await daemon("", env=env)
    await systemd.wait_for("READY=1")
    assert (await ask(gateway.url, "/readyz")).status == 200
    assert await gateway.terminate() == 0
    await systemd.wait_for("STOPPING=1")
    assert "WATCHDOG=1" not in systemd.told


@pytest.mark.parametrize("toml", ["", "[nonsense]"])
async def test_systemd_is_told_of_a_reload_and_its_end(daemon: StartDaemon, systemd: ServiceManager, toml: str) -> None:
    """With the time that Type=notify-reload waits for, and also when the old settings stay."""
    gateway = await daemon("", env={"NOTIFY_SOCKET": str(systemd.path)})
    await systemd.wait_for("READY=1")
    gateway.configure(toml)
    before = time.monotonic_ns()
    gateway.signal(signal.SIGHUP)
    await systemd.wait_for("READY=1", times=2)
    told = systemd.told[systemd.told.index("RELOADING=1") :]
    assert [told[0], told[2]] == ["RELOADING=1", "READY=1"]
    name, _, usec = told[1].partition("=")
    assert (name, before // 1000 <= int(usec) <= time.monotonic_ns() // 1000) == ("MONOTONIC_USEC", True)


async def test_the_watchdog_starves_when_the_daemon_hangs(daemon: StartDaemon, systemd: ServiceManager) -> None:
    """A process that is stopped (as one in an endless loop would be) sends nothing, and goes on later."""
    gateway = await daemon("", env={"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "500000"})
    await systemd.wait_for("WATCHDOG=1")
    gateway.signal(signal.SIGSTOP)
    on_its_way = systemd.told.count("WATCHDOG=1") + 1
    with pytest.raises(TimeoutError):
        # The time in which nothing comes is the thing here: twice WATCHDOG_USEC.
        async with asyncio.timeout(1):
            await systemd.wait_for("WATCHDOG=1", times=on_its_way + 1)
    gateway.signal(signal.SIGCONT)
    await systemd.wait_for("WATCHDOG=1", times=on_its_way + 1)


WITHOUT_DESCRIPTORS = """
import os, resource
start = faasd_async.Daemon._start_side_jobs
def short(self, chores):
    os.close(unused := os.dup(2))
    resource.setrlimit(resource.RLIMIT_NOFILE, (unused, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return start(self, chores)
faasd_async.Daemon._start_side_jobs = short
faasd_async.HOUSEKEEPING_S = 0.1
"""


async def test_side_jobs_outlive_a_want_of_descriptors(daemon: StartDaemon, systemd: ServiceManager) -> None:
    """From their first step on: what they can't do is told, and done when there are some again."""
    minutely = '[functions.it]\ncommand = ["true"]\n[schedules.it]\nfunction = "it"\ncron = "* * * * *"\n'
    watched = {"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "200000"}
    gateway = await daemon(minutely, env=watched, before=WITHOUT_DESCRIPTORS)
    for _ in range(3):
        said = "systemd could not be notified: [Errno 24] Too many open files"
        await gateway.wait_for_log(said, first_line=len(gateway.lines))
    hard = resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (1024, hard))
    await systemd.wait_for("WATCHDOG=1")
    assert (await ask(gateway.url, "/healthz")).status == 200


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("--nofile=7", "descriptors"),
        ("--nofile=12", "LimitNOFILE="),
        ("--nofile=20", "24 are the least"),
        (f"--stack={1 << 46}", "can't start new thread (LimitNPROC=, TasksMax="),  # No thread finds room for that.
    ],
)
async def test_a_start_that_is_short_of_something_ends_with_one_line(limit: str, words: str, tmp_path: Path) -> None:
    """What there is too little of, and which settings give more; status 75: it may be better later."""
    serve = (sys.executable, "-m", "faasd_async", "serve", "--config", tmp_path / "config.toml")
    (tmp_path / "config.toml").write_text('[gateway]\nlisten = "127.0.0.1:0"\n[functions.f]\ncommand = ["true"]')
    finished = await run("prlimit", f"{limit}:{limit.partition('=')[2]}", *serve)
    assert finished.code == 75, finished
    assert (words in finished.err, finished.err.count("\n")) == (True, 1), finished.err


async def test_an_abstract_notify_socket_works_too(daemon: StartDaemon) -> None:
    """A name that starts with @ is in the abstract namespace."""
    name = f"faasd-async-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.setblocking(False)
        await daemon("", env={"NOTIFY_SOCKET": f"@{name}"})
        data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(manager, 2**16), PATIENCE)
    assert b"READY=1" in data.splitlines()


# ---- the log ---------------------------------------------------------------------------------------------------

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d|\d\d:\d\d:\d\d")


async def test_the_end_of_a_call_is_one_line(daemon: StartDaemon, function: Server) -> None:
    """Call id, function, status, attempts and duration, in one line per call."""
    function.behaviour = answer(500)
    gateway = await daemon(settings(function, "[retry]\nattempts = 2"))
    await gateway.final(await gateway.submit("it", X_Call_Id="trace-17"))
    function.behaviour = answer()
    await gateway.final(await gateway.submit("it", X_Call_Id="trace-18"))
    assert await gateway.terminate() == 0
    failed = [line for line in gateway.lines if "trace-17" in line]
    worked = [line for line in gateway.lines if "trace-18" in line]
    assert (len(failed), len(worked)) == (2, 1), "one line for an attempt that is not the last, one for the end"
    for line, words in ((failed[-1], ("it", "error", "2")), (worked[-1], ("it", "success", "1"))):
        assert all(re.search(rf"\b{word}\b", line) for word in words), line
        assert re.search(r"\d\.\d+ ?s|duration[^ ]*[=:] ?\d", line), line


async def test_a_start_says_what_runs_on_what(daemon: StartDaemon) -> None:
    """Version, file, what is configured, where the queue is, and whether that is a new one."""
    gateway = await daemon('[functions.it]\nurl = "http://127.0.0.1:1"\nqueue = "mine"')
    await gateway.terminate()
    first = len(gateway.lines)
    await gateway.start()
    for lines, store in ((gateway.lines[:first], ": a new one;"), (gateway.lines[first:], " KiB; a call is on disk")):
        told = [line.partition("INFO ")[2] for line in lines]
        assert told[0].startswith("faasd-async 0.")
        assert told[1] == f"configuration {gateway.config}: 1 function, 2 queues"
        assert told[2].startswith(f"store {gateway.store}: ")
        assert store in told[2]
        assert told[3].startswith("listening on ")


async def test_a_start_with_nothing_to_do_says_what_to_do(daemon: StartDaemon, tmp_path: Path) -> None:
    """In the file that there is, or in one that is to be written."""
    gateway = await daemon("")
    assert f"there is no function: add a table [functions.NAME] to {gateway.config}, or [provider]" in gateway.log
    nowhere = {"XDG_CONFIG_HOME": str(tmp_path), "STATE_DIRECTORY": str(tmp_path / "bare")}
    bare = await start_program("serve", "--listen", "127.0.0.1:0", env={**os.environ, **nowhere}, stderr=PIPE)
    assert bare.stderr is not None
    async with asyncio.timeout(PATIENCE):
        while b"there is no function" not in (line := await bare.stderr.readline()):
            assert line, "it has ended"
    assert b"name a file with --config, or write ~/.config/faasd-async/config.toml or /etc/" in line
    bare.send_signal(signal.SIGTERM)
    await bare.communicate()


async def test_a_log_line_has_a_time(daemon: StartDaemon) -> None:
    """On a terminal or in a file, nobody else adds one."""
    gateway = await daemon("")
    assert all(TIMESTAMP.search(line) for line in gateway.lines), gateway.log


# Runs a command the way systemd does: with the device and inode of the stream that goes to the journal.
UNDER_JOURNAL = ("sh", "-c", 'export JOURNAL_STREAM=$(stat -L -c %d:%i /dev/stderr); exec "$@"', "sh")


async def test_what_the_file_says_in_vain_is_a_line_like_others(daemon: StartDaemon) -> None:
    """With its time and level, though the file is read before it is known how the log is to look."""
    annotations = 'annotations = { "com.openfaas.retry.codes" = "many" }'
    gateway = await daemon(f'[functions.it]\ncommand = ["cat"]\n{annotations}')
    (line,) = [line for line in gateway.lines if "com.openfaas.retry.codes" in line]
    assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z WARNING functions\.it: annotation ", line)


async def test_the_journal_has_its_own_time(daemon: StartDaemon, function: Server) -> None:
    """Under systemd a second timestamp in each line would be noise."""
    gateway = await daemon(settings(function), prefix=UNDER_JOURNAL)
    await gateway.final(await gateway.submit("it"))
    assert not [line for line in gateway.lines if TIMESTAMP.search(line)]


async def test_the_log_can_be_json(daemon: StartDaemon, function: Server) -> None:
    """One object per line, with the facts of a call as members of their own."""
    function.behaviour = answer(400)
    gateway = await daemon(settings(function, '[log]\nformat = "json"'))
    call_id = await gateway.submit("it", X_Call_Id='quote"back\\slash')
    await gateway.final(call_id)
    assert await gateway.terminate() == 0
    entries = [json.loads(line) for line in gateway.lines]
    assert all(isinstance(entry, dict) for entry in entries)
    (end,) = (entry for entry in entries if entry.get("call_id") == call_id)
    assert (end["function"], end["status"], end["attempts"]) == ("it", "error", 1)
    assert any(isinstance(value, float) for name, value in end.items() if "duration" in name), end


async def test_the_level_can_be_raised(daemon: StartDaemon, function: Server, systemd: ServiceManager) -> None:
    """With `warning`, a daemon that is well says nothing at all."""
    gateway = await daemon("", env={"NOTIFY_SOCKET": str(systemd.path)}, start=False)
    address = free_address()
    gateway.configure(settings(function, f'[gateway]\nlisten = "{address}"\n[log]\nlevel = "warning"'))
    gateway.url = f"http://{address}"
    await gateway.spawn()
    await systemd.wait_for("READY=1")
    await gateway.final(await gateway.submit("it"))
    assert await gateway.terminate() == 0
    assert gateway.lines == []


BODY, ANSWER = b"body-of-the-request", b"body-of-the-answer"
SECRETS = ("token-of-the-caller", "cookie-of-the-caller", "cookie-of-the-function", "proxy-token", "key-of-the-sink")


async def logged(daemon: StartDaemon, function: Server, sink: Server, log: str) -> str:
    """What is logged of a sync and an async call that carry secrets."""
    function.behaviour = answer(200, ANSWER, Set_Cookie="c=cookie-of-the-function")
    gateway = await daemon(settings(function, f"[log]\n{log}"))
    secret = {
        "Authorization": "Bearer token-of-the-caller",
        "Cookie": "c=cookie-of-the-caller",
        "Proxy_Authorization": "Basic proxy-token",
    }
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in secret.items()]
    assert (await ask(gateway.url, "/function/it", *lines, method="POST", body=BODY)).status == 200
    url = sink.url.replace("://", "://user:key-of-the-sink@") + "/done?key=key-of-the-sink#key-of-the-sink"
    await gateway.final(await gateway.submit("it", BODY, X_Callback_Url=url, **secret))
    sink.behaviour = answer(410)
    await gateway.final(await gateway.submit("it", BODY, X_Callback_Url=url, **secret))
    assert sink.requests[-1].target == "/done?key=key-of-the-sink"
    function.behaviour = answer(400, ANSWER)
    await gateway.final(await gateway.submit("it", BODY, **secret))
    assert await gateway.terminate() == 0
    return gateway.log


@pytest.mark.parametrize("level", ["info", "debug"])
async def test_bodies_and_secrets_stay_out_of_the_log(
    daemon: StartDaemon, function: Server, sink: Server, level: str
) -> None:
    """Whatever the level."""
    log = await logged(daemon, function, sink, f'level = "{level}"')
    assert log
    assert not [text for text in (BODY.decode(), ANSWER.decode(), *SECRETS) if text in log]


async def test_write_debug_shows_bodies_but_no_secrets(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """Authorization and cookies never appear."""
    log = await logged(daemon, function, sink, "write_debug = true")
    assert BODY.decode() in log
    assert ANSWER.decode() in log
    assert not [text for text in SECRETS if text in log]


async def test_a_body_in_the_log_is_cut_and_escaped(daemon: StartDaemon, function: Server) -> None:
    """At 4 KiB, and without line breaks or terminal codes of the caller's choice."""
    function.behaviour = answer(200, b"")
    gateway = await daemon(settings(function, "[log]\nwrite_debug = true"))
    body = b"begin\nfake line\r\x1b[31mred\x00\xff" + b"x" * 10_000 + b"the-end"
    await gateway.final(await gateway.submit("it", body))
    assert await gateway.terminate() == 0
    (line,) = (line for line in gateway.lines if "begin" in line)
    assert "fake line" in line
    assert line.isprintable()
    assert "the-end" not in gateway.log
    assert 4000 < len(line) < 6000


async def test_a_caller_cannot_write_lines_into_the_log(daemon: StartDaemon, function: Server) -> None:
    """A path with encoded line breaks or terminal codes stays encoded."""
    gateway = await daemon(settings(function, '[log]\nlevel = "debug"'))
    await ask(gateway.url, "/function/it/%0aFAKE%1b[31m?q=%0d%0aFAKE")
    await ask(gateway.url, "/function/no%0aFAKE%1b[31m")
    await ask(gateway.url, "/async-function/it/%0aFAKE", method="POST")
    assert await gateway.terminate() == 0
    assert not [line for line in gateway.lines if line.startswith("FAKE") or "\x1b" in line]


# ---- the command line ------------------------------------------------------------------------------------------

GOOD = """
[gateway]
listen = "127.0.0.1:0"
[queues.slow-queue]
max_inflight = 2
timeout = "1h5m"
[functions.it]
command = ["cat"]
queue = "slow-queue"
"""

# One problem each, and the words that its line must have.
PROBLEMS = [
    ("[queues.slow-queue]\nmax_inflght = 1", ["queues.slow-queue.max_inflght", "did you mean max_inflight?"]),
    ('[gatway]\nlisten = "127.0.0.1:1"', ["gatway", "did you mean gateway?"]),
    ("[queues.slow-queue]\nmax_inflight = 0", ["queues.slow-queue.max_inflight"]),
    ('[queues.slow-queue]\nmax_inflight = "2"', ["queues.slow-queue.max_inflight"]),
    ("[queues.slow-queue]\nmax_inflight = true", ["queues.slow-queue.max_inflight"]),
    ('[queues.slow-queue]\ntimeout = "5 minutes"', ["queues.slow-queue.timeout"]),
    ("[queues.slow-queue]\ntimeout = 5", ["queues.slow-queue.timeout"]),
    ('[gateway]\nmax_payload = "1XB"', ["gateway.max_payload"]),
    ('[gateway]\nlisten = "nonsense"', ["gateway.listen"]),
    ('[gateway]\nlisten = "127.0.0.1:99999"', ["gateway.listen"]),
    ('[functions.it]\nurl = "ftp://127.0.0.1/"', ["functions.it.url"]),
    ("[functions.it]\ncommand = []", ["functions.it.command"]),
    ('[functions.it]\ncommand = "cat"', ["functions.it.command"]),
    ('[functions.it]\nqueue = "x"', ["functions.it", "url", "command"]),
    ('[functions.it]\nurl = "http://127.0.0.1:1"\ncommand = ["cat"]', ["functions.it", "url", "command"]),
    ('[functions."a.b"]\ncommand = ["cat"]', ["a.b"]),
    ('[functions.it]\ncommand = ["cat"]\ntype = "asinc"', ["functions.it.type", "async"]),
    ('[retry]\nmin_wait = "10s"\nmax_wait = "1s"', ["retry", "max_wait"]),
    ('[retry]\nbackoff = "linear"', ["retry.backoff"]),
    ('[log]\nformat = "xml"', ["log.format"]),
    ('[auth]\nuser_file = "/nonexistent/user"\npassword_file = "/proc/version"', ["auth.user_file"]),
    ('[auth]\nuser_file = "/proc/version"', ["auth", "password_file"]),
    ("[gateway\n", ["line 1"]),
]


async def check(folder: Path, text: str) -> Finished:
    """`faasd_async.py check` on a file with this text."""
    config = folder / "config.toml"
    config.write_text(text)
    return await faasd("check", "--config", config)


async def test_check_is_content_with_a_good_file(tmp_path: Path) -> None:
    """Exit 0, and nothing on stderr."""
    result = await check(tmp_path, GOOD)
    assert (result.code, result.err) == (0, ""), result


async def test_check_takes_the_file_as_it_is_named(tmp_path: Path) -> None:
    """`check FILE` is what people type."""
    file = tmp_path / "mine.toml"
    file.write_text("[queues.mine]\n")
    assert (await faasd("check", file)).out == f"{file}: ok, 0 functions, 2 queues\n"


async def test_check_reads_a_pipe() -> None:
    """As other commands do, where - stands for a file."""
    for content, code, said in (
        (b"[queues.slow]\n", 0, "ok, 0 functions, 2 queues"),
        (b"[queue.slow]\n", 78, "unknown table"),
    ):
        result = await faasd("check", "-", stdin=content)
        assert (result.code, said in result.out + result.err) == (code, True)


@pytest.mark.unmeasured
async def test_check_names_the_problem(tmp_path: Path) -> None:
    """Exit 78 (EX_CONFIG) and one line with the file, the key, and what is wrong with it."""
    folders = [tmp_path / str(number) for number in range(len(PROBLEMS))]
    for folder in folders:
        folder.mkdir()
    checks = (check(folder, text) for folder, (text, _) in zip(folders, PROBLEMS, strict=True))
    for result, (text, words) in zip(await asyncio.gather(*checks), PROBLEMS, strict=True):
        assert (result.code, len(result.err.splitlines())) == (78, 1), (text, result)
        assert "config.toml: " in result.err
        assert all(word in result.err for word in words), (text, result.err)


async def test_check_names_all_problems_at_once(tmp_path: Path) -> None:
    """One line for each, so that a file is mended in one go."""
    problems = '[gateway]\nlisten = true\nread_timout = "1s"\n[queues.a]\nmax_inflight = -1\n[functions.b]\nurl = 5\n'
    result = await check(tmp_path, problems)
    lines = result.err.splitlines()
    assert (result.code, len(lines)) == (78, 4), result
    for key in ("gateway.listen", "gateway.read_timout", "queues.a.max_inflight", "functions.b.url"):
        assert len([line for line in lines if key in line]) == 1, result.err


# What a file may be that a configuration names, and what is said of it.
NO_FILES = {
    "fifo": "nothing has come out of it for 5 s",
    "/dev/zero": "more than 1.0 MiB come out of it",
    "loop": "Too many levels of symbolic links",
    "/proc/self": "Is a directory",
}


async def test_check_does_not_wait_for_what_is_no_file(tmp_path: Path) -> None:
    """One line says what is in the way: a pipe into which nobody writes, a device that has no end."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    keys = ("auth.password_file", "callback.headers_file", "functions.it.tls_ca_file", "schedules.it.body_file")
    cases = [(place, words, key) for place, words in NO_FILES.items() for key in keys]
    folders = [tmp_path / str(number) for number in range(len(cases))]
    checks = []
    for folder, (place, _, key) in zip(folders, cases, strict=True):
        folder.mkdir()
        checks.append(check(folder, f'{key} = "{tmp_path / place}"'))  # An absolute place is taken as it is.
    for result, (place, words, key) in zip(await asyncio.gather(*checks), cases, strict=True):
        lines = [line for line in result.err.splitlines() if f"{key}: " in line]
        assert (result.code, len(lines)) == (78, 1), (place, key, result)
        assert words in lines[0] or "is a pipe: it has to be a file" in lines[0], lines


async def test_a_secret_may_come_through_a_pipe(tmp_path: Path) -> None:
    """As from a shell's <(COMMAND), which may take its time."""
    (tmp_path / "config.toml").write_text('[auth]\nuser_file = "user"\npassword_file = "/dev/stdin"')
    (tmp_path / "user").write_text("admin")
    process = await start_program(
        "check", "--config", "config.toml", cwd=tmp_path, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    assert process.stdin is not None
    process.stdin.write(b"sec")
    await process.stdin.drain()
    await asyncio.sleep(0.5)
    out, err = await asyncio.wait_for(process.communicate(b"ret"), PATIENCE)
    assert (process.returncode, err) == (0, b""), out


async def test_check_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    """One line with its name."""
    result = await faasd("check", "--config", tmp_path / "nosuch.toml")
    assert result.code not in (0, None)
    assert len(result.err.splitlines()) == 1, result
    assert "nosuch.toml" in result.err


async def test_serve_refuses_a_bad_file_in_the_same_words(daemon: StartDaemon) -> None:
    """Exit 78, and no store is created."""
    gateway = await daemon(PROBLEMS[0][0], start=False)
    await gateway.spawn()
    code = await gateway.ended()
    checked = await faasd("check", "--config", gateway.config)
    assert (code, gateway.lines) == (78, checked.err.splitlines())
    assert not gateway.store.exists()


async def test_an_address_in_use_is_one_clear_line(daemon: StartDaemon, tmp_path: Path) -> None:
    """Not a traceback: which address, and why."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        gateway = await daemon(f'[gateway]\nlisten = "{address}"', start=False)
        await gateway.spawn()
        assert await gateway.ended() != 0
    assert len([line for line in gateway.lines if address in line]) == 1, gateway.log


async def test_an_address_that_includes_another_is_one_clear_line(daemon: StartDaemon, tmp_path: Path) -> None:
    """Both can be bound, but one can be listened on: the exit code is that of an address in use."""
    port = free_address().rpartition(":")[2]
    gateway = await daemon(f'[gateway]\nlisten = ["0.0.0.0:{port}", "127.0.0.1:{port}"]', start=False)
    await gateway.spawn()
    assert await gateway.ended() == 75
    assert f"faasd-async: gateway.listen: http://127.0.0.1:{port}: Address already in use" in gateway.lines


async def test_a_file_that_is_no_socket_is_not_replaced(daemon: StartDaemon, tmp_path: Path) -> None:
    """It stays, and the daemon says what is in the way."""
    path = tmp_path / "notes"
    path.write_text("precious")
    gateway = await daemon(f'[gateway]\nlisten = "unix:{path}"', start=False)
    await gateway.spawn()
    assert (await gateway.ended(), path.read_text()) == (75, "precious")
    assert len([line for line in gateway.lines if str(path) in line]) == 1, gateway.log


async def test_help_is_the_manual() -> None:
    """`--help` on stdout, exit 0."""
    result = await run(sys.executable, SCRIPT, "--help")
    assert result.code == 0
    assert "serve" in result.out
    assert "check" in result.out


async def test_a_reload_tells_what_it_did_not_take_over_and_what_is_gone(daemon: StartDaemon) -> None:
    """Another backend needs a restart; calls of a queue that is gone run all the same."""
    gateway = await daemon("[queues.slow-queue]\nmax_inflight = 1")
    gateway.configure('[store]\nbackend = "nats"')
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("configuration reloaded")
    await gateway.wait_for_log("[store] has changed: that needs a restart")
    await gateway.wait_for_log("queue slow-queue is gone: what still waits in it runs with the defaults")


async def test_a_start_waits_for_the_death_of_the_daemon_that_was_killed(daemon: StartDaemon) -> None:
    """It may have to end a sync first, and holds the file until then: `pkill -9`, and at once another one."""
    gateway = await daemon("")
    gateway.signal(signal.SIGSTOP)  # As a process that waits for its disk: it does nothing, and holds what it has.
    other = await daemon("", start=False)
    await other.spawn()
    await asyncio.sleep(0.5)  # Sooner it would not have begun to wait; later it would only be killed later.
    await gateway.kill()
    await other.wait_for_log("listening on ")
