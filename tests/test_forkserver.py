"""What the fork server starts is a process like any other, and it leaves nothing behind."""

import asyncio
import os
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import (
    PATIENCE,
    PIPE,
    SCRIPT,
    Server,
    StartDaemon,
    WallClock,
    faasd,
    fork_server,
    run,
    start_program,
)
from forkserver import READ_AT_IMPORT, Forked, ForkServer

TESTS = Path(__file__).parent
ALL_THREADS = "\t3"  # the event loop, the log, the writer
SAME = ("Umask", "Uid", "Gid", "Groups", "CapEff", "Threads", "SigBlk", "SigIgn", "SigCgt")


def seen_from_outside(pid: int) -> dict[str, object]:
    """What the kernel tells about a process, but for what is new in each."""
    proc = Path("/proc", str(pid))
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    files = {file.name: file.readlink() for file in (proc / "fd").iterdir()}
    return {
        **{name: status[name] for name in SAME},
        "limits": (proc / "limits").read_text(),
        "folder": (proc / "cwd").readlink(),
        "session and group": (os.getsid(pid), os.getpgid(pid)),
        "files": {number: re.sub(r"\d+", "N", str(file)) for number, file in files.items()},
    }


async def seen_with_all_threads(pid: int) -> dict[str, object]:
    """The same, as soon as what the daemon begins with is done, for which it has more threads."""
    deadline = time.monotonic() + PATIENCE
    begun = {"Threads": ALL_THREADS, "SigBlk": "\t" + "0" * 16}
    while True:
        seen = seen_from_outside(pid)
        if seen.items() >= begun.items():
            return seen
        assert time.monotonic() < deadline, seen
        await asyncio.sleep(0.01)


@pytest.fixture
def fewer_files() -> Iterator[None]:
    """A limit that was not there when the fork server was started."""
    fork_server()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_forked_daemon_is_what_an_executed_one_is(daemon: StartDaemon, fewer_files: None) -> None:
    """Signals, limits, rights, threads and open files are the same."""
    gateway = await daemon("")
    forked = await seen_with_all_threads(gateway.pid)
    assert await gateway.terminate() == 0
    gateway.fork = False
    await gateway.start()
    assert forked == await seen_with_all_threads(gateway.pid)


async def test_a_forked_command_is_what_an_executed_one_is(daemon: StartDaemon) -> None:
    """Its environment, arguments, standard streams and working directory are what it was given."""
    gateway = await daemon('[functions.it]\ncommand = ["cat"]')
    (gateway.folder / "here").write_bytes(b"from a file")
    words = ("invoke", "it", "--url", gateway.url)
    assert (await faasd(*words, stdin=b"piped")).out == "piped"
    assert (await faasd(*words, "--data", "@here", cwd=gateway.folder)).out == "from a file"
    assert (await faasd("check", env={"COLUMNS": "40"})).code == 0
    wide, narrow = [await faasd("--help", env={"COLUMNS": columns}) for columns in ("200", "40")]
    assert max(map(len, wide.out.splitlines())) > 80 > max(map(len, narrow.out.splitlines()))


async def test_two_forks_share_no_randomness(daemon: StartDaemon, function: Server) -> None:
    """The ids that two processes make first differ in more than the time."""
    gateway = await daemon(f'[functions.it]\nurl = "{function.url}"')
    first = await gateway.submit("it")
    await gateway.kill()
    await gateway.start()
    second = await gateway.submit("it")
    assert first[-12:] != second[-12:]


async def test_a_signal_at_once_ends_a_fork() -> None:
    """It is killed by what kills a process whose program has not begun, and that is its code."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = await start_program("calls", "list", "--watch", stdout=PIPE, stderr=PIPE)
        process.send_signal(number)
        await asyncio.wait_for(process.communicate(), PATIENCE)
        assert process.returncode == -number


NAMES_READ = """
import os

class Environment(type(os.environ)):
    def __getitem__(self, name):
        print(name)
        return super().__getitem__(name)

    def __iter__(self):  # the standard library's CGI support copies all of it, for nobody
        return iter(())

os.environ.__class__ = Environment
import faasd_async
faasd_async.import_libraries()
"""


async def test_what_is_read_from_the_environment_at_import_is_known() -> None:
    """A variable that a module reads while it is imported is the server's in all forks."""
    result = await run(sys.executable, "-c", NAMES_READ)
    names = set(result.out.split())
    assert "AIOHTTP_NO_EXTENSIONS" in names, result
    assert [name for name in sorted(names) if not READ_AT_IMPORT.fullmatch(name)] == []


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "PYTHONHASHSEED", "LD_PRELOAD", "LANG"])
def test_who_sets_what_is_read_at_import_gets_an_interpreter(name: str) -> None:
    """While everything else can be set in a fork."""
    server = fork_server()
    assert server.can_start({**os.environ, "NOTIFY_SOCKET": "/run/notify"})
    assert not server.can_start({**os.environ, name: "another value"})


def libraries(pid: int) -> set[str]:
    """What a process has mapped, by path."""
    return {line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}


async def test_a_library_that_is_preloaded_is_there_in_a_fork(daemon: StartDaemon, clock: WallClock) -> None:
    """In that of the library's own server; others have none of it."""
    for env, preloaded in ((clock.env, True), ({}, False)):
        gateway = await daemon("", env=env)
        assert isinstance(gateway.process, Forked)
        assert (clock.env["LD_PRELOAD"] in libraries(gateway.pid)) == preloaded
        await gateway.terminate()


STARTS_A_DAEMON = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from conftest import start_program

async def main():
    process = await start_program("serve", "--listen", "127.0.0.1:0")
    print(process.pid, flush=True)
    await process.wait()

asyncio.run(main())
"""


async def test_a_server_that_ends_takes_its_forks_with_it(tmp_path: Path) -> None:
    """If pytest is killed, no daemon is left over."""
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    pytest_like = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", STARTS_A_DAEMON, str(TESTS)), env=env, stdout=PIPE, stderr=PIPE
    )
    assert pytest_like.stdout and pytest_like.stderr
    await asyncio.wait_for(pytest_like.stderr.readuntil(b"listening on"), PATIENCE)
    daemon = os.pidfd_open(int(await pytest_like.stdout.readline()))
    pytest_like.kill()
    ended, _, _ = select.select([daemon], [], [], PATIENCE)
    if not ended:
        signal.pidfd_send_signal(daemon, signal.SIGKILL)
    os.close(daemon)
    await pytest_like.wait()
    assert ended, "it still ran"


@pytest.mark.parametrize("has_ended", [False, True])
async def test_a_program_that_can_not_be_imported_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], has_ended: bool
) -> None:
    """By the error of the test that wants to start it, instead of a test that hangs."""
    (tmp_path / SCRIPT.name).write_text("raise RuntimeError('it is being written')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # it is not this file that is measured
    server = ForkServer()
    if has_ended:  # before it is asked for anything
        server._process.wait()
    try:
        with pytest.raises(RuntimeError, match="can't be imported"):
            await server.start("check", env=os.environ, cwd=tmp_path)
    finally:
        server.close()
    assert "it is being written" in capfd.readouterr().err
