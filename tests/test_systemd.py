"""The units in systemd/: they are valid and tight, a restart refuses nobody, and what hangs is found out."""

import asyncio
import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from conftest import PATIENCE, SCRIPT, Daemon, Faults, Gate, Server, ServiceManager, StartDaemon, ask, free_address, run

UNITS = SCRIPT.parent / "systemd"


# ---- the units -------------------------------------------------------------------------------------------------


def installed(folder: Path, dropin: str | None = None) -> list[Path]:
    """The units as they are installed, with a program that is there, and with one of the examples that go on top."""
    units = [Path(shutil.copy(UNITS / name, folder)) for name in ("faasd-async.service", "faasd-async.socket")]
    text = units[0].read_text()
    units[0].write_text(text.replace("/opt/faasd-async/bin/faasd-async", f'"{sys.executable}"'))
    if dropin:
        (folder / "faasd-async.service.d").mkdir()
        example = UNITS / "faasd-async.service.d" / f"{dropin}.conf.example"
        shutil.copy(example, folder / "faasd-async.service.d" / f"{dropin}.conf")
    return units


@pytest.mark.parametrize(("dropin", "most"), [(None, 1.3), ("strict", 1.0), ("loose", 3.0), ("home", 2.5)])
async def test_the_units_are_valid_and_as_tight_as_they_say(tmp_path: Path, dropin: str | None, most: float) -> None:
    """systemd itself finds nothing wrong with them, and little that a function could do to the machine."""
    units = installed(tmp_path, dropin)
    verified = await run("systemd-analyze", "verify", "--man=no", *units)
    assert (verified.code, verified.out + verified.err) == (0, "")
    found = await run("systemd-analyze", "security", "--offline=true", "--no-pager", units[0])
    (exposure,) = re.findall(r"Overall exposure level .*: ([0-9.]+)", found.out)
    assert float(exposure) <= most, found.out


async def test_the_unit_of_a_nats_server_is_valid_and_tight(tmp_path: Path) -> None:
    """As our own one; its configuration is a credential, which has passwords."""
    unit = tmp_path / "nats-server.service"
    program = Path(sys.executable).with_name("nats-server")
    unit.write_text((UNITS / unit.name).read_text().replace("/usr/local/bin/nats-server", str(program)))
    verified = await run("systemd-analyze", "verify", "--man=no", unit)
    assert (verified.code, verified.out + verified.err) == (0, "")
    found = await run("systemd-analyze", "security", "--offline=true", "--no-pager", unit)
    (exposure,) = re.findall(r"Overall exposure level .*: ([0-9.]+)", found.out)
    assert float(exposure) <= 1.3, found.out


async def allowed_system_calls() -> set[str]:
    """What SystemCallFilter of the unit comes to."""

    async def expand(name: str) -> set[str]:
        found = set[str]()
        for line in (await run("systemd-analyze", "syscall-filter", "--no-pager", name)).out.splitlines()[1:]:
            word = line.strip()
            found |= await expand(word) if word.startswith("@") else {word} - {""} if word[:1] != "#" else set()
        return found

    allowed = set[str]()
    for line in re.findall("^SystemCallFilter=(.*)", (UNITS / "faasd-async.service").read_text(), re.MULTILINE):
        named = set[str]().union(*[await expand(name) for name in line.lstrip("~").split()])
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed


async def test_the_unit_allows_what_the_daemon_and_its_programs_do(
    daemon: StartDaemon, function: Server, sink: Server, tmp_path: Path
) -> None:
    """Every system call that succeeds in a run with calls of each kind passes the unit's filter."""
    trace = tmp_path / "trace"
    program = '[functions.program]\ncommand = ["sh", "-c", "(sleep 9 &); cat; ls /"]'
    gateway = await daemon(
        f'[functions.it]\nurl = "{function.url}"\n{program}',
        prefix=("strace", "-D", "-f", "-qq", "-o", str(trace)),
    )
    for name in ("it", "program"):
        assert (await ask(gateway.url, f"/function/{name}", method="POST", body=b"x")).status == 200
        callback = sink.url.replace("127.0.0.1", "localhost")
        record = await gateway.final(await gateway.submit(name, b"x", X_Callback_Url=callback))
        assert (record["status"], record["callback"]["status"]) == ("success", "delivered")
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("configuration reloaded")
    assert await gateway.terminate() == 0
    seen = trace.read_text(errors="replace")
    assert not re.findall(r"mprotect\(.*PROT_EXEC|mmap\(.*PROT_WRITE\|PROT_EXEC", seen), "MemoryDenyWriteExecute"
    # Some name look-ups ask the kernel for its addresses, and do without where they may not.
    assert set(re.findall(r"socket\((AF_\w+)", seen)) - {"AF_NETLINK"} == {"AF_INET", "AF_UNIX"}
    done = {name for name, result in re.findall(r"^\d+ +(\w+)\(.* = (\S+)", seen, re.MULTILINE)}
    assert {"fdatasync", "execve", "accept4", "connect"} <= done
    assert done - await allowed_system_calls() <= {"fchown"}, "not allowed"  # SQLite's, and only as root


# ---- socket activation -----------------------------------------------------------------------------------------


@pytest.fixture(params=["tcp", "unix"])
def held(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    """A socket that listens, and goes on listening whatever becomes of the daemon: faasd-async.socket."""
    unix = request.param == "unix"
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as listener:
        listener.bind(str(tmp_path / "held.sock") if unix else ("127.0.0.1", 0))
        listener.listen(1024)
        yield listener


async def activated(daemon: StartDaemon, listener: socket.socket, settings: str) -> Daemon:
    """A daemon that gets the socket as systemd passes it: as file 3, with its own process id in LISTEN_PID."""
    passed = f'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@" 3<&{listener.fileno()} {listener.fileno()}<&-'
    gateway = await daemon(settings, prefix=("bash", "-c", passed, "bash"), start=False)
    gateway.pass_fds = [listener.fileno()]
    await gateway.start()
    return gateway


def exchange(listener: socket.socket, target: str, away_s: float = 0.0) -> str:
    """One request on a connection of its own, from so far away; the answer, or what went wrong."""
    with socket.socket(listener.family) as client:
        client.settimeout(PATIENCE)
        try:
            client.connect(listener.getsockname())
            time.sleep(away_s)
            head = f"POST {target} HTTP/1.1", "Host: h", "Connection: close", "Content-Length: 0", "", ""
            client.sendall("\r\n".join(head).encode())
            return b"".join(iter(lambda: client.recv(2**16), b"")).decode()
        except OSError as exc:
            return repr(exc)


async def test_a_restart_refuses_no_connection(daemon: StartDaemon, function: Server, held: socket.socket) -> None:
    """With the socket held by systemd, clients wait for a moment and are answered, sync and async ones."""
    gateway = await activated(daemon, held, f'[functions.it]\nurl = "{function.url}"')
    answers: Counter[tuple[str, str]] = Counter()
    restarted = asyncio.Event()

    async def client(target: str, away_s: float) -> None:
        while not restarted.is_set():
            answers[target, (await asyncio.to_thread(exchange, held, target, away_s))[:13]] += 1

    targets, distances_s = ("/function/it", "/async-function/it"), (0.0, 0.01, 0.03, 0.1)
    clients = [asyncio.create_task(client(*one)) for one in itertools.product(targets, distances_s)]
    for _ in range(2):
        await function.wait_for(len(function.requests) + 30)
        assert await gateway.terminate() == 0
        await gateway.start()
    await function.wait_for(len(function.requests) + 30)
    restarted.set()
    await asyncio.gather(*clients)
    assert set(answers) == {("/function/it", "HTTP/1.1 200 "), ("/async-function/it", "HTTP/1.1 202 ")}, answers


async def test_a_crowd_that_comes_during_a_restart_is_served(
    daemon: StartDaemon, function: Server, held: socket.socket
) -> None:
    """As many as the socket unit lets wait: the daemon leaves its Backlog= as large as it was."""
    gateway = await activated(daemon, held, f'[functions.it]\nurl = "{function.url}"')
    assert await gateway.terminate() == 0
    with contextlib.ExitStack() as crowd:
        clients = [crowd.enter_context(socket.socket(held.family)) for _ in range(300)]
        for client in clients:
            client.settimeout(5)  # a connection that has to wait for another try of the kernel's is one too many
            client.connect(held.getsockname())
            client.sendall(b"GET /function/it HTTP/1.1\r\nHost: h\r\n\r\n")
        await gateway.start()
        for client in clients:
            assert b" 200 " in await asyncio.to_thread(client.recv, 2**16)


async def test_a_program_does_not_inherit_the_sockets(daemon: StartDaemon, held: socket.socket) -> None:
    """Neither the files themselves nor the variables that tell of them."""
    gateway = await activated(daemon, held, '[functions.it]\ncommand = ["sh", "-c", "ls -l /proc/$$/fd; env"]')
    out = await asyncio.to_thread(exchange, held, "/function/it")
    assert " 200 " in out
    assert f"socket:[{os.fstat(held.fileno()).st_ino}]" not in out
    assert "LISTEN_" not in out
    assert await gateway.terminate() == 0


@pytest.mark.measured
async def test_a_socket_for_both_kinds_of_addresses_shows_neither(daemon: StartDaemon, function: Server) -> None:
    """`ListenStream=8080` is one: functions are told an IPv4 address in its own form all the same."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        await activated(daemon, listener, f'[functions.it]\nurl = "{function.url}"')
        port = listener.getsockname()[1]
        for url, address in ((f"http://127.0.0.1:{port}", "127.0.0.1"), (f"http://[::1]:{port}", "::1")):
            for route, status in (("function", 200), ("async-function", 202)):
                number = len(function.requests)
                assert (await ask(url, f"/{route}/it", method="POST")).status == status
                called = (await function.wait_for(number + 1))[number]
                assert called.headers["X-Forwarded-For"] == address


async def test_the_real_socket_activation_works(daemon: StartDaemon, function: Server) -> None:
    """systemd's own tool listens; the first client starts the daemon and is answered by it."""
    address = free_address()
    activate = ("systemd-socket-activate", "-E", "PYTHONPATH", "-l", address)
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"', prefix=activate, start=False)
    await gateway.spawn()
    await gateway.wait_for_log(f"Listening on {address}")
    assert (await ask(f"http://{address}", "/function/it")).status == 200
    await gateway.wait_for_log(f"listening on http://{address}")


# ---- the watchdog ----------------------------------------------------------------------------------------------

# Runs the daemon in this process (what follows is the command that would do it), and has its event loop stand still for
# good on SIGALRM.
HANGS_ON_SIGALRM = f"""
import signal, sys, time
sys.path.insert(0, {str(SCRIPT.parent)!r})
import faasd_async
signal.signal(signal.SIGALRM, lambda *_: time.sleep(3600))
sys.exit(faasd_async.main(sys.argv[4:]))
"""


async def test_a_hung_event_loop_starves_the_watchdog(
    daemon: StartDaemon, function: Server, systemd: ServiceManager
) -> None:
    """While the process and its other threads live on; what was accepted runs after the restart."""
    function.behaviour = gate = Gate()
    env = systemd.watchdog()
    hangs = (sys.executable, "-c", HANGS_ON_SIGALRM)
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"', env=env, prefix=hangs)
    call_id = await gateway.submit("it")
    await systemd.wait_for("WATCHDOG=1", times=3)
    gateway.signal(signal.SIGALRM)
    await systemd.bite(gateway)
    gate.open()
    await gateway.start()
    assert (await gateway.final(call_id))["status"] == "success"


async def test_a_hung_writer_starves_the_watchdog(
    daemon: StartDaemon, function: Server, systemd: ServiceManager, faults: Faults
) -> None:
    """A disk that does not answer, while the event loop does; what was accepted runs after the restart."""
    function.behaviour = gate = Gate()
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"', env=systemd.watchdog() | faults.env)
    call_id = await gateway.submit("it")
    await systemd.wait_for("WATCHDOG=1", times=3)
    with faults("s", 0):
        unanswered = asyncio.create_task(gateway.submit("it"))
        await systemd.bite(gateway)
        with pytest.raises(aiohttp.ClientError):
            await unanswered
    gate.open()
    await gateway.start()
    assert (await gateway.final(call_id))["status"] == "success"


async def test_a_service_manager_that_does_not_listen_holds_nothing_up(
    daemon: StartDaemon, systemd: ServiceManager
) -> None:
    """Its queue is full: that is told in the log, and the daemon goes on."""
    gateway = await daemon("", env=systemd.watchdog())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other, pytest.raises(OSError):
        while True:
            other.sendto(b"WATCHDOG=1", str(systemd.path))
    await gateway.wait_for_log("systemd could not be notified")
    assert (await ask(gateway.url, "/healthz")).status == 200
