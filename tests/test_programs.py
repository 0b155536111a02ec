"""Programs as functions: what they get, what counts as their end, and what comes of those that misbehave.

The basics are in test_commands.py. What is here has to be the same on uvloop and on asyncio's own
loop, which a platform without uvloop uses.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from conftest import (
    PATIENCE,
    PYTHON,
    Daemon,
    Finished,
    Request,
    Server,
    StartDaemon,
    ask,
    assert_refused,
    connection,
    faasd,
    merge,
    open_files,
    raw,
    run,
    to_toml,
)

from faasd_async import CommandRunner, FunctionRequest, Limit, parse_config

KIB, MIB = 2**10, 2**20
# What comes before the daemon's start.
LOOPS = {"uvloop": "", "asyncio": 'assert hasattr(faasd_async, "uvloop"); faasd_async.uvloop = None'}


@pytest.fixture(params=LOOPS)
def start(request: pytest.FixtureRequest, daemon: StartDaemon) -> StartDaemon:
    """Start a daemon on one loop and the other."""

    async def start_daemon(
        settings: str,
        *,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        before: str = "",
        start: bool = True,
    ) -> Daemon:
        before = f"{LOOPS[request.param]}\n{before}".strip()
        return await daemon(settings, env=env, prefix=prefix, before=before, start=start)

    return start_daemon


def functions(programs: Mapping[str, Sequence[str]], more: Mapping[str, Any] | None = None, **keys: Any) -> str:
    """Settings with these programs, each with these keys, and with more tables."""
    tables = {name: {"command": list(words), **keys} for name, words in programs.items()}
    return to_toml(merge({"functions": tables}, more or {}))


def program(*words: str, more: Mapping[str, Any] | None = None, **keys: Any) -> str:
    """Settings with one function, `it`, that runs these words."""
    return functions({"it": words}, more, **keys)


ONCE = {"retry": {"attempts": 1}}
SOON = "faasd_async.RETRY_STORE_S = 0.3"  # when what could not be done is tried again
ONE_AT_A_TIME = {**ONCE, "queues": {"faas-request": {"max_inflight": 1}}}


class Kin:
    """Processes that a program starts, with a FIFO to hear from them and one to keep them waiting.

    Who has `NEWS` open is heard, and so is the end of the last of them. Who reads from `LEASH` waits
    until the test lets go, which it does in the end whatever happens.
    """

    def __init__(self, folder: Path) -> None:
        self.env = {"NEWS": str(folder / "news"), "LEASH": str(folder / "leash")}
        self._news = asyncio.StreamReader()
        self._held: dict[str, int] = {}  # our own end of each FIFO, as long as it is held

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Make the FIFOs and listen."""
        for name in self.env.values():
            os.mkfifo(name)
        file = os.fdopen(os.open(self.env["NEWS"], os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
        self._held = {name: os.open(path, os.O_RDWR) for name, path in self.env.items()}
        protocol = asyncio.StreamReaderProtocol(self._news)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, file)
        try:
            yield
        finally:
            transport.close()
            for name in self.env:
                self._release(name)

    def _release(self, name: str) -> None:
        if name in self._held:
            os.close(self._held.pop(name))

    async def says(self, *words: str) -> None:
        """Wait for these lines, whatever their order."""
        async with asyncio.timeout(PATIENCE):
            lines = [await self._news.readline() for _ in words]
        assert sorted(lines) == sorted(f"{word}\n".encode() for word in words)

    def let_go(self) -> None:
        """Let those that wait go on."""
        self._release("LEASH")

    async def dead(self) -> None:
        """Wait until nobody is left of those that were heard."""
        self._release("NEWS")
        try:
            assert await asyncio.wait_for(self._news.read(), PATIENCE) == b""
        except TimeoutError:
            raise AssertionError("some of them still live") from None


@pytest.fixture
async def kin(tmp_path: Path) -> AsyncIterator[Kin]:
    """What a program's processes are watched with."""
    one = Kin(tmp_path)
    async with one.watched():
        yield one


JOIN = 'exec 3>"$NEWS" 4<"$LEASH"; '  # of a shell that is one of the kin
STAY = f"{JOIN} echo up >&3; read -r _ <&4; exit 0"


def is_alive(pid: str) -> bool:
    """Whether a process is there, and no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def children(pid: int) -> list[int]:
    """The processes that a process has started or inherited, zombies among them."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended since it was listed
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
    return found


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for what nothing tells of: look again and again."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        await asyncio.sleep(0.02)


async def without_children(pid: int) -> None:
    """Wait until a process has none."""
    await until(lambda: not children(pid), f"the end of all children of {pid}")


class User:
    """Starts daemons as somebody who is not root, but may read and write every file.

    Nobody else has this user's id, so a limit on its processes is a limit on the daemon's.
    """

    def __init__(self, folder: Path, daemon: StartDaemon, loop: str) -> None:
        self.id = 100_000 + os.getpid()
        self.become_root = folder / "become-root"  # setpriv(1), for everybody
        self._daemon = daemon
        self._loop = loop
        os.chown(folder, self.id, self.id)
        shutil.copy("/usr/bin/setpriv", self.become_root)
        self.become_root.chmod(0o4755)

    async def start(self, settings: str, before: str = "") -> Daemon:
        """A daemon as this user."""
        caps = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
        ids = (f"--reuid={self.id}", f"--regid={self.id}", "--clear-groups")
        gateway = await self._daemon(settings, before=f"{self._loop}\n{before}", start=False)
        gateway.server_prefix = ("setpriv", *ids, *caps)
        await gateway.start()
        return gateway


@pytest.fixture(params=LOOPS)
def user(request: pytest.FixtureRequest, daemon: StartDaemon, tmp_path: Path) -> User:
    """A user that is not root, on one loop and the other."""
    if os.geteuid() != 0:
        pytest.skip("to become another user needs root")
    return User(tmp_path, daemon, LOOPS[request.param])


# ---- standard streams ------------------------------------------------------------------------------------------

NODE = shutil.which("node")
OPENERS = {
    "cat": ("cat", "/dev/stdin"),
    "python": (*PYTHON, "print(open('/dev/stdin').read(), end='', file=open('/dev/stdout', 'w'))"),
    "stderr": ("sh", "-ec", "echo note > /dev/stderr; cat"),
    "stdout": ("bash", "-ec", "cat > /dev/stdout"),
    "dd": ("dd", "if=/dev/stdin", "of=/dev/stdout", "status=none"),
    "tee": ("tee", "/dev/stderr"),
    "wc": ("sh", "-ec", '[ "$(wc -c < /dev/stdin)" = 5 ]; printf hello'),
    "proc": ("sh", "-c", "cat < /proc/self/fd/0 > /proc/self/fd/1"),
    "sort": ("sort", "/dev/stdin"),
} | ({"node": (NODE, "-p", "fs.readFileSync('/dev/stdin', 'utf8')")} if NODE else {})


async def test_a_program_can_open_its_streams_by_name(start: StartDaemon) -> None:
    """/dev/stdin, /dev/stdout and /dev/stderr are what they are in a shell's pipeline."""
    gateway = await start(functions(OPENERS))
    asked = (ask(gateway.url, f"/function/{name}", method="POST", body=b"hello") for name in OPENERS)
    replies = zip(OPENERS, await asyncio.gather(*asked), strict=True)
    assert {name: (reply.status, reply.body.strip()) for name, reply in replies} == dict.fromkeys(
        OPENERS, (200, b"hello")
    )


SHOW_FILES = """
import fcntl, json, os
def look(number):
    return os.readlink(f"/proc/self/fd/{number}"), fcntl.fcntl(number, fcntl.F_GETFL)
found = {}
for number in map(int, os.listdir("/proc/self/fd")):
    try:
        found[number] = look(number)
    except OSError:
        pass  # with which the folder was read
print(json.dumps(found))
"""


async def descriptors(gateway: Daemon) -> dict[int, tuple[str, int]]:
    """The open files of the program `it`: what each is, and its flags."""
    reply = await ask(gateway.url, "/function/it", method="POST", body=b"x")
    assert reply.status == 200, reply
    return {int(number): tuple(file) for number, file in json.loads(reply.body).items()}


def assert_three_pipes(files: Mapping[int, tuple[str, int]]) -> None:
    """They are three, no two the same, and nobody has to expect EAGAIN of them."""
    assert sorted(files) == [0, 1, 2], files
    assert all(name.startswith("pipe:") for name, _ in files.values()), files
    assert len({name for name, _ in files.values()}) == 3, files
    assert not any(flags & os.O_NONBLOCK for _, flags in files.values()), files


async def test_a_program_has_three_pipes_and_no_other_file(start: StartDaemon, kin: Kin) -> None:
    """Nothing of the store, of connections, of programs that run at the same time, or of who started the daemon."""
    programs = {"it": (*PYTHON, SHOW_FILES), "other": ("sh", "-c", STAY)}
    gateway = await start(functions(programs, env=kin.env), start=False)
    theirs, ours = os.pipe()  # of the daemon's parent, which did not think of its children
    gateway.pass_fds = [theirs]
    await gateway.start()
    os.close(theirs)
    os.close(ours)
    async with connection(gateway.url):
        call_id = await gateway.submit("other")
        await kin.says("up")
        assert_three_pipes(await descriptors(gateway))
        many = await asyncio.gather(*(descriptors(gateway) for _ in range(8)))
    for files in many:
        assert_three_pipes(files)
    kin.let_go()
    await gateway.final(call_id)


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "0<&- 1>&-"])
async def test_a_daemon_without_standard_streams_has_programs_with_them(start: StartDaemon, closed: str) -> None:
    """Whatever file got the number that was free, a program's own pipes have it."""
    gateway = await start(program(*PYTHON, SHOW_FILES), prefix=("sh", "-c", f'exec "$@" {closed}', "sh"))
    assert_three_pipes(await descriptors(gateway))


async def test_a_program_that_reads_nothing_ends_a_body_that_does_not_end(start: StartDaemon) -> None:
    """The answer does not wait for the rest of the request."""
    gateway = await start(program("head", "-c", "5"))
    async with connection(gateway.url) as (reader, writer):
        writer.write(b"POST /function/it HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        writer.write(b"%x\r\n%b\r\n" % (MIB, bytes(MIB)))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        assert await asyncio.wait_for(reader.readexactly(5), PATIENCE) == b"hello"
    assert head.startswith(b"HTTP/1.1 200")


async def test_a_body_that_breaks_off_has_no_end_for_its_program(start: StartDaemon, kin: Kin) -> None:
    """A half is not taken for a whole: it is killed before its input ends."""
    gateway = await start(program("sh", "-c", f"{JOIN} echo up >&3; cat >/dev/null; echo whole >&3", env=kin.env))
    async with connection(gateway.url) as (_, writer):
        writer.write(b"POST /function/it HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n%b\r\n" % (MIB, bytes(MIB)))
        await kin.says("up")
    await kin.dead()


async def test_a_program_may_close_its_streams_and_go_on(start: StartDaemon, kin: Kin) -> None:
    """Its end is its exit, not the end of its output."""
    script = f"{JOIN} echo out; exec <&- >&- 2>&-; echo up >&3; read -r _ <&4; exit 7"
    gateway = await start(program("sh", "-c", script, more=ONCE, env=kin.env))
    call_id = await gateway.submit("it", bytes(MIB))
    await kin.says("up")
    assert (await gateway.record(call_id))["status"] == "running"
    kin.let_go()
    record = await gateway.final(call_id)
    assert (record["status"], record["http_status"], record["response_bytes"]) == ("error", 500, 4)
    assert "exit status 7" in record["error"]


@pytest.mark.unmeasured
async def test_an_answer_may_have_16_mib(start: StartDaemon, sink: Server) -> None:
    """As it is, in an answer and in a callback."""
    gateway = await start(program(*PYTHON, f"import sys; sys.stdout.buffer.write(bytes(range(256)) * {64 * KIB})"))
    body = bytes(range(256)) * (64 * KIB)
    reply = await ask(gateway.url, "/function/it")
    assert (reply.status, reply.body == body) == (200, True)
    received = list[tuple[str, bool]]()

    async def receive(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        received.append((seen.headers["X-Function-Status"], await request.content.read() == body))
        return web.Response()

    sink.behaviour, sink.reads_body = receive, False  # it would refuse more than 1 MiB
    record = await gateway.final(await gateway.submit("it", X_Callback_Url=sink.url))
    assert (record["callback"]["status"], received) == ("delivered", [("200", True)])


async def test_an_answer_without_end_ends_its_program(start: StartDaemon, kin: Kin) -> None:
    """502 as soon as it is more than can be held, and the program is killed."""
    gateway = await start(program("sh", "-c", f"{JOIN} yes; read -r _ <&4", env=kin.env))
    assert_refused(await ask(gateway.url, "/function/it"), 502, "function it")
    await kin.dead()


# ---- the process -----------------------------------------------------------------------------------------------

SHOW_PROCESS = """
import json, os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "pid": os.getpid(), "group": os.getpgrp(), "session": os.getsid(0), "cwd": os.getcwd(),
    "blocked": int(status["SigBlk"], 16), "ignored": int(status["SigIgn"], 16), "env": dict(os.environ),
}))
"""
SHOW = (*PYTHON, SHOW_PROCESS)


async def shown(gateway: Daemon, *headers: str) -> dict[str, Any]:
    """What the program `it` says of itself."""
    reply = await ask(gateway.url, "/function/it", *headers)
    assert reply.status == 200, reply
    found: dict[str, Any] = json.loads(reply.body)
    return found


async def test_a_program_leads_a_group_and_a_session_of_its_own(start: StartDaemon) -> None:
    """So that it can be killed with all it starts, and has no terminal."""
    gateway = await start(program(*SHOW))
    found = await shown(gateway)
    assert found["pid"] == found["group"] == found["session"] != gateway.pid


def signals_in(mask: int) -> set[int]:
    """The signals of a mask, without those that the C library keeps for itself."""
    return {number for number in signal.valid_signals() if mask >> (number - 1) & 1}


async def test_a_program_gets_signals_as_from_a_shell(start: StartDaemon) -> None:
    """None is blocked, and SIGPIPE, which Python ignores, ends it: `yes | head` has an end."""
    programs = {"it": SHOW, "shell": ("sh", "-c", "yes | head -n 1; grep SigIgn /proc/self/status")}
    gateway = await start(functions(programs))
    found = await shown(gateway)
    assert signals_in(found["blocked"]) == set()
    by_python = {signal.SIGPIPE, signal.SIGXFSZ}
    ours = {number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN}
    inherited = ours - by_python  # as nohup, or a shell's `&`, has it
    assert signals_in(found["ignored"]) <= by_python | inherited
    yes, _, ignored = (await ask(gateway.url, "/function/shell")).body.decode().split()
    assert yes == "y"
    assert signals_in(int(ignored, 16)) <= inherited


async def test_a_program_runs_where_cwd_says(start: StartDaemon, tmp_path: Path) -> None:
    """Its own path may be relative to that."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    script = folder / "run"
    script.write_text("#!/bin/sh\nexec pwd\n")
    script.chmod(0o755)
    programs = {"absolute": ("pwd",), "relative": ("./run",)}
    gateway = await start(functions(programs, cwd=str(folder)))
    for name in programs:
        reply = await ask(gateway.url, f"/function/{name}")
        assert (reply.status, reply.body.decode()) == (200, f"{folder}\n"), name


@pytest.mark.parametrize("kept", [None, "/kept"])
async def test_pwd_says_where_a_program_runs(start: StartDaemon, tmp_path: Path, kept: str | None) -> None:
    """By the name that `cwd` has, like a shell's after `cd`; what `env` says counts."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    env = {"PWD": kept} if kept else {}
    gateway = await start(program("printenv", "PWD", cwd="link", env=env))
    reply = await ask(gateway.url, "/function/it")
    assert reply.body.decode().strip() == (kept or str(gateway.folder / "link"))


async def test_a_program_may_have_empty_arguments(start: StartDaemon) -> None:
    """And such that a shell would not leave as they are."""
    gateway = await start(program("printf", "[%s]", "", "a b", "*", "$HOME", "é"))
    assert (await ask(gateway.url, "/function/it")).body.decode() == "[][a b][*][$HOME][é]"


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
async def test_a_program_is_given_utf_8_whatever_the_locale(start: StartDaemon, tmp_path: Path, locale: str) -> None:
    """The file is written in it: words, variables and folders, and what is above 127 in a path passes as it came."""
    folder = tmp_path / "caf\u00e9"
    folder.mkdir()
    script = folder / "\u65e5\u672c"
    script.write_text('#!/bin/sh\nprintf \'%s|\' "$@" "$PWD" "$NAME" "$Http_Path" "$Http_Query" "$Http_X_Own"')
    script.chmod(0o755)
    programs = {"it": (f"./{script.name}", "\u00fc"), "missing": ("./\u00f6",)}
    variables = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    gateway = await start(functions(programs, ONCE, cwd=str(folder), env={"NAME": "\u00e4"}), env=variables)
    assert "functions.it" not in gateway.log
    target = b"/function/it/\xe9\xc3\xa9?\xff"
    reply = await raw(
        gateway.url, b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nX-Own: \xe9\r\nConnection: close\r\n\r\n"
    )
    expected = ("\u00fc", str(folder), "\u00e4")
    assert reply.body.split(b"|")[:-1] == [*map(str.encode, expected), b"/\xe9\xc3\xa9", b"\xff", b"\xe9"]
    assert_refused(await ask(gateway.url, "/function/missing"), 502, "./\u00f6: No such file")
    record = await gateway.final(await gateway.submit("missing"))
    assert "./\u00f6: No such file" in record["error"]


async def test_without_cwd_a_program_runs_where_the_daemon_does(start: StartDaemon) -> None:
    """As the classic watchdog's."""
    gateway = await start(program(*SHOW))
    assert (await shown(gateway))["cwd"] == str(gateway.folder)


async def test_a_cwd_that_is_not_there_is_named_and_tried_again(start: StartDaemon, tmp_path: Path) -> None:
    """It is not the program that is missing, and a disk may be mounted later."""
    folder = tmp_path / "later"
    gateway = await start(program("pwd", cwd=str(folder), more={"retry": {"attempts": 2}}))
    assert_refused(await ask(gateway.url, "/function/it"), 502, str(folder), limit=300)
    record = await gateway.final(await gateway.submit("it"))
    assert (record["status"], record["attempts"]) == ("error", 2)
    assert str(folder) in record["error"]
    folder.mkdir()
    assert (await ask(gateway.url, "/function/it")).body.decode() == f"{folder}\n"


async def test_env_comes_on_top_of_our_own_environment(start: StartDaemon) -> None:
    """It adds and replaces; without it HOME and PATH are ours."""
    gateway = await start(program(*SHOW, env={"HOME": "/elsewhere", "MORE": "1"}), env={"HOME": "/here", "OURS": "2"})
    env = (await shown(gateway))["env"]
    assert (env["HOME"], env["MORE"], env["OURS"], env["PATH"]) == ("/elsewhere", "1", "2", os.environ["PATH"])


async def test_a_daemon_without_path_finds_programs(start: StartDaemon) -> None:
    """Where a shell without PATH does; and so does a shell that is one."""
    gateway = await start(program("sh", "-c", "cat"), before='import os; del os.environ["PATH"]')
    reply = await ask(gateway.url, "/function/it", method="POST", body=b"hello")
    assert (reply.status, reply.body) == (200, b"hello"), reply


async def test_path_in_env_is_where_the_program_is_looked_for(start: StartDaemon, tmp_path: Path) -> None:
    """The `env` of a function, which people use for a virtual environment."""
    tool = tmp_path / "tool-of-its-own"
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)
    gateway = await start(program(tool.name, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}))
    assert (await ask(gateway.url, "/function/it")).body == b"found\n"


@pytest.mark.unmeasured
async def test_many_programs_run_at_once(start: StartDaemon, kin: Kin) -> None:
    """32 queued and 32 sync calls: all run before the first of them ends."""
    gateway = await start(
        program("sh", "-c", STAY, env=kin.env, more={"queues": {"faas-request": {"max_inflight": 32}}})
    )
    calls = [await gateway.submit("it") for _ in range(32)]
    async with asyncio.TaskGroup() as group:
        replies = [group.create_task(ask(gateway.url, "/function/it")) for _ in range(32)]
        await kin.says(*["up"] * 64)
        kin.let_go()
    assert {reply.result().status for reply in replies} == {200}
    assert {(await gateway.final(call_id))["status"] for call_id in calls} == {"success"}
    await without_children(gateway.pid)


# ---- the end ---------------------------------------------------------------------------------------------------

# Leaves a process behind that has the streams open which are not in CLOSED, and waits on the leash.
LEAVES = """
import os
news, leash = os.open(os.environ["NEWS"], os.O_WRONLY), os.open(os.environ["LEASH"], os.O_RDONLY)
ready, tell = os.pipe()
if os.fork() == 0:
    if os.environ["SESSION"] == "its own":
        os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in os.environ["CLOSED"]:
        os.dup2(nothing, int(stream))
    os.write(tell, b"x")
    os.read(leash, 1)
    os._exit(0)
os.read(ready, 1)
os.write(1, b"done")
os._exit(int(os.environ["CODE"]))
"""
HELD = {"all": "", "stdout": "02", "stderr": "01", "stdin": "12", "none": "012"}


def leaving(kin: Kin, session: str, code: int = 0, attempts: int = 3) -> str:
    """Settings with a function for each entry of HELD."""
    env = {**kin.env, "SESSION": session, "CODE": str(code)}
    tables = {name: {"command": [*PYTHON, LEAVES], "env": {**env, "CLOSED": closed}} for name, closed in HELD.items()}
    return to_toml(
        {"functions": tables, "retry": {"attempts": attempts}, "queues": {"faas-request": {"max_inflight": 9}}}
    )


def pipes(pid: int) -> set[str]:
    """The pipes that a process has an end of."""
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since it was listed
            found.add(str(file.readlink()))
    return {name for name in found if name.startswith("pipe:")}


@pytest.mark.unmeasured
@pytest.mark.parametrize("session", ["its own", "the program's"])
async def test_what_a_program_leaves_behind_does_not_keep_it(start: StartDaemon, kin: Kin, session: str) -> None:
    """Whatever it holds, the call ends well, with its output, and is not run again."""
    gateway = await start(leaving(kin, session))
    before = pipes(gateway.pid)
    body = bytes(MIB)  # more than fits into a pipe that nobody reads
    calls = {name: await gateway.submit(name, body) for name in HELD}
    replies = await asyncio.gather(*(ask(gateway.url, f"/function/{name}", method="POST", body=body) for name in HELD))
    assert [(reply.status, reply.body) for reply in replies] == [(200, b"done")] * len(HELD)
    for name, call_id in calls.items():
        record = await gateway.final(call_id)
        assert (record["status"], record["attempts"], record["response_bytes"]) == ("success", 1, 4), name
    await until(lambda: pipes(gateway.pid) <= before, "closed pipes")
    if session == "its own":  # which is how a program starts a daemon, and nobody's to kill
        kin.let_go()
    await kin.dead()


async def test_a_program_of_a_killed_daemon_does_not_run_beside_its_next_attempt(
    start: StartDaemon, kin: Kin, tmp_path: Path
) -> None:
    """Nor does what it has started, whichever of its streams it has closed, and whoever waited for it."""
    script = f"{JOIN} trap '' TERM HUP; exec >/dev/null; sleep 1000 & echo $$ $! >>pids; echo up >&3; wait"
    at_once = {"gateway": {"drain_timeout": "0s"}}
    gateway = await start(program("sh", "-c", script, more=at_once, env=kin.env, cwd=str(tmp_path)))
    call_id = await gateway.submit("it")
    sync = asyncio.create_task(ask(gateway.url, "/function/it", method="POST"))
    await kin.says("up", "up")
    await gateway.kill()
    await asyncio.gather(sync, return_exceptions=True)
    left = (tmp_path / "pids").read_text().split()
    assert len(left) == 4 and all(map(is_alive, left))
    await gateway.start()
    await kin.says("up")
    assert not any(map(is_alive, left))
    assert gateway.log.count("killing a program of a daemon that has died") == 2
    assert f"call_id={call_id}" in gateway.log


async def test_what_a_program_has_made_independent_outlives_a_killed_daemon(start: StartDaemon, kin: Kin) -> None:
    """A session and streams of its own: that is how a program starts a daemon."""
    script = f"exec </dev/null >/dev/null 2>&1; {JOIN} echo up >&3; read -r _ <&4; echo end >&3"
    gateway = await start(program("sh", "-c", 'setsid sh -c "$0" & exit 0', script, env=kin.env))
    await gateway.final(await gateway.submit("it"))
    await kin.says("up")
    await gateway.kill()
    await gateway.start()
    kin.let_go()
    await kin.says("end")


NO_PROC = """
iterdir = faasd_async.Path.iterdir
def without_proc(path):
    if str(path) == "/proc":
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return iterdir(path)
faasd_async.Path.iterdir = without_proc
"""


async def test_a_daemon_without_proc_has_programs(start: StartDaemon) -> None:
    """In a chroot, say: nobody can tell there what runs."""
    gateway = await start(program("cat"), before=NO_PROC)
    assert (await ask(gateway.url, "/function/it", method="POST", body=b"x")).body == b"x"


async def test_a_program_that_fails_and_leaves_something_behind_has_failed(start: StartDaemon, kin: Kin) -> None:
    """Its exit status counts, and what it wrote is the answer."""
    gateway = await start(leaving(kin, "its own", code=3))
    for name in HELD:
        reply = await ask(gateway.url, f"/function/{name}")
        assert (reply.status, reply.body) == (500, b"done"), name


LAST_WORDS = """
import os, time
program = f"/proc/{os.getpid()}"
if os.fork() == 0:
    while os.path.exists(program):  # its parent has noted its end when it is gone
        time.sleep(0.005)
    os.write(1, b"last")
    os.write(2, b"words")
    os._exit(0)
os.write(1, b"first ")
"""


async def test_what_a_child_writes_right_after_the_programs_exit_is_part_of_the_answer(start: StartDaemon) -> None:
    """A shell that ends before its `>(…)` does would lose output otherwise."""
    gateway = await start(program(*PYTHON, LAST_WORDS))
    assert (await ask(gateway.url, "/function/it")).body == b"first last"
    call_id = await gateway.submit("it")
    assert (await gateway.final(call_id))["response_bytes"] == 10
    log = (await ask(gateway.url, f"/system/calls/{call_id}/log")).body
    assert (b"first last" in log, b"words" in log) == (True, True), log


async def test_the_time_limit_is_for_the_program_not_for_what_it_leaves_behind(start: StartDaemon) -> None:
    """It has ended in time, if its start is not that slow each time."""
    script = "sleep 60 & exit 0"
    gateway = await start(program("sh", "-c", script, exec_timeout="400ms", more={"retry": {"attempts": 20}}))
    assert (await gateway.final(await gateway.submit("it")))["status"] == "success"


async def test_what_a_program_complained_of_before_its_time_was_over_is_kept(start: StartDaemon) -> None:
    """It tells where the program hangs: in the record, the log and the reason. A callback has no body all the same."""
    script = "echo half an answer; echo connecting >&2; echo 'waiting for the lock' >&2; sleep 60"
    gateway = await start(program("sh", "-c", script, exec_timeout="1s", more={"retry": {"attempts": 1}}))
    record = await gateway.final(await gateway.submit("it"))
    reason = "function it did not end within functions.it.exec_timeout (1s): waiting for the lock"
    assert (record["status"], record["error"], record["response_bytes"]) == ("timeout", reason, 0)
    log = (await ask(gateway.url, f"/system/calls/{record['call_id']}/log")).body
    assert log == b"connecting\nwaiting for the lock\n"
    reply = await ask(gateway.url, "/function/it")
    assert (reply.status, reply.body.decode()) == (504, f"{reason}\n")


async def test_a_child_that_becomes_somebody_else_does_not_keep_a_program(user: User, kin: Kin) -> None:
    """It can't be killed with the group; its program has ended all the same."""
    script = f'{JOIN} "$ROOT" --reuid=0 sh -c "echo up >&3; read -r _ <&4" & read -r _; echo done'
    gateway = await user.start(program("sh", "-c", script, env={**kin.env, "ROOT": str(user.become_root)}))
    async with connection(gateway.url) as (reader, writer):
        writer.write(b"POST /function/it HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        await kin.says("up")
        writer.write(bytes(99_999) + b"\n")
        assert await asyncio.wait_for(reader.readuntil(b"done"), PATIENCE)
    kin.let_go()
    await kin.dead()


def stubborn(user: User, kin: Kin, exec_timeout: str | None = None, **more: Any) -> str:
    """Settings with `it`, which becomes root and waits, and `other`, in a queue that runs one at a time."""
    words = (str(user.become_root), "--reuid=0", "sh", "-c", STAY)
    limit = {"exec_timeout": exec_timeout} if exec_timeout else {}
    tables = {"it": {"command": words, "env": kin.env, **limit}, "other": {"command": ["true"]}}
    return to_toml({"functions": tables, **ONE_AT_A_TIME, **more})


async def test_a_program_that_can_not_be_killed_ends_at_its_timeout(user: User, kin: Kin) -> None:
    """504 for a sync call; the log says why the process is still there."""
    gateway = await user.start(stubborn(user, kin, exec_timeout="2s"))
    assert_refused(await ask(gateway.url, "/function/it"), 504, "function it")
    await kin.says("up")
    assert "function=it" in await gateway.wait_for_log("kill")
    kin.let_go()
    await without_children(gateway.pid)


@pytest.mark.unmeasured
async def test_a_queued_program_that_can_not_be_killed_frees_its_slot(user: User, kin: Kin) -> None:
    """The call is a timeout whose record says why, and the next one in a queue of one slot runs."""
    gateway = await user.start(stubborn(user, kin, exec_timeout="2s"))
    record = await gateway.final(await gateway.submit("it"))
    await kin.says("up")
    assert (record["status"], record["http_status"], record["attempts"]) == ("timeout", 504, 1)
    assert "kill" in record["error"], record
    assert "function=it" in await gateway.wait_for_log("kill")
    assert (await gateway.final(await gateway.submit("other")))["status"] == "success"
    kin.let_go()
    await without_children(gateway.pid)


async def test_a_cancelled_program_that_can_not_be_killed_frees_its_slot(user: User, kin: Kin) -> None:
    """Cancelling does not wait for it either."""
    gateway = await user.start(stubborn(user, kin))
    call_id = await gateway.submit("it")
    await kin.says("up")
    async with gateway.http.delete(f"{gateway.url}/async-function/{call_id}") as response:
        assert response.status == 202
    assert (await gateway.final(await gateway.submit("other")))["status"] == "success"
    assert (await gateway.final(call_id))["status"] == "cancelled"
    await gateway.wait_for_log("kill")
    kin.let_go()
    await without_children(gateway.pid)


@pytest.mark.unmeasured
async def test_a_client_that_leaves_a_program_that_can_not_be_killed_frees_its_slot(user: User, kin: Kin) -> None:
    """A function that runs once at a time runs for the next caller."""
    script = f'read -r word; [ "$word" = go ] || exec "$ROOT" --reuid=0 sh -c \'{STAY}\''
    env = {**kin.env, "ROOT": str(user.become_root)}
    gateway = await user.start(program("sh", "-c", script, more=ONCE, env=env, max_inflight=1))
    async with connection(gateway.url) as (_, writer):
        writer.write(b"POST /function/it HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nstay\n")
        await kin.says("up")
    assert (await gateway.final(await gateway.submit("it", b"go\n")))["status"] == "success"
    kin.let_go()
    await without_children(gateway.pid)


async def test_a_program_that_can_not_be_killed_does_not_keep_the_daemon(user: User, kin: Kin) -> None:
    """It stops, well, and its call is queued again for the next start."""
    gateway = await user.start(stubborn(user, kin, gateway={"drain_timeout": "100ms"}))
    call_id = await gateway.submit("it")
    await kin.says("up")
    assert await gateway.terminate() == 0
    kin.let_go()
    await kin.dead()
    gateway.configure(program("true"))
    await gateway.start()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)


# ---- as process 1 ----------------------------------------------------------------------------------------------


@pytest.mark.measured
async def test_as_process_1_it_buries_the_orphans_of_programs(start: StartDaemon, kin: Kin) -> None:
    """A container has nobody else to do it; and each program's own exit status stays what it is."""
    if os.geteuid() != 0:
        pytest.skip("a namespace of processes needs root")
    prefix = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    gateway = await start(leaving(kin, "its own", code=7, attempts=1), prefix=prefix)
    (first,) = children(gateway.pid)
    for name in HELD:
        assert (await ask(gateway.url, f"/function/{name}")).status == 500
        assert "exit status 7" in (await gateway.final(await gateway.submit(name)))["error"]
    assert len(children(first)) == 2 * len(HELD)  # adopted, and alive
    kin.let_go()
    await kin.dead()
    await without_children(first)
    os.kill(first, signal.SIGTERM)  # unshare(1) itself would ignore it
    assert await gateway.ended() == 0


# ---- starting --------------------------------------------------------------------------------------------------


async def outcome(gateway: Daemon, name: str) -> tuple[int, str, int]:
    """What comes of a queued call: HTTP status, error, and after how many attempts."""
    record = await gateway.final(await gateway.submit(name))
    assert record["status"] == "error", record
    return record["http_status"], record["error"], record["attempts"]


TWICE = {"retry": {"attempts": 2}}


@pytest.mark.parametrize("word", ["/nonexistent/program", "no-such-program-anywhere", "./not-in-the-folder"])
async def test_a_missing_program_is_named_and_final_at_once(start: StartDaemon, word: str) -> None:
    """It does not appear by waiting; sync and async say the same."""
    gateway = await start(program(word, "argument", more=TWICE))
    assert_refused(await ask(gateway.url, "/function/it"), 502, "function it", word, "no such file")
    status, error, attempts = await outcome(gateway, "it")
    assert (status, attempts) == (502, 1), error
    assert (word in error, "no such file" in error.lower()) == (True, True), error


@pytest.mark.parametrize("folder", ["/home/nobody-here", "/root/nothing-here", "/run/user/12345"])
async def test_a_missing_program_in_a_home_tells_of_the_sandbox(daemon: StartDaemon, folder: str) -> None:
    """It may well be there, and hidden from a service: systemd's ProtectHome."""
    gateway = await daemon(functions({"it": (f"{folder}/run",), "other": ("/nonexistent/run",)}))
    assert b"ProtectHome" in (await ask(gateway.url, "/function/it")).body
    assert b"ProtectHome" not in (await ask(gateway.url, "/function/other")).body


async def test_an_interpreter_that_is_missing_is_named(start: StartDaemon, tmp_path: Path) -> None:
    """It is not the script that is missing, wherever that is looked for. A carriage return is seen."""
    for name, line in {"windows": "#!/bin/sh\r\n", "gone": "#!/opt/nothing/python3 -u\n"}.items():
        (tmp_path / name).write_text(line)
        (tmp_path / name).chmod(0o755)
    words = {"whole": str(tmp_path / "windows"), "there": "./windows", "by-path": "gone"}
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    gateway = await start(functions({name: [word] for name, word in words.items()}, cwd=str(tmp_path), env=env))
    for name, interpreter in {"whole": r"/bin/sh\r", "there": r"/bin/sh\r", "by-path": "/opt/nothing/python3"}.items():
        said = f"its interpreter is missing: {interpreter}"
        assert_refused(await ask(gateway.url, f"/function/{name}"), 502, words[name], said, limit=300)


async def test_a_program_that_can_not_be_started_is_named_and_tried_again(start: StartDaemon, tmp_path: Path) -> None:
    """Who installs it may be about to make it executable, or to write its first line."""
    texts = {"closed": ("#!/bin/sh\n", 0o644), "plain": ("echo no interpreter\n", 0o755), "empty": ("", 0o755)}
    for name, (text, mode) in texts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    programs = {name: (str(tmp_path / name),) for name in texts} | {"folder": (str(tmp_path),)}
    gateway = await start(functions(programs, TWICE))
    for name, (path,) in programs.items():
        why = "exec format error (its first line" if name in ("plain", "empty") else "permission denied"
        assert_refused(await ask(gateway.url, f"/function/{name}"), 502, name, path, why, limit=300)
        status, error, attempts = await outcome(gateway, name)
        assert (status, attempts) == (502, 2), error
        assert (path in error, why in error.lower()) == (True, True), error


async def test_a_program_that_is_mended_meanwhile_runs(start: StartDaemon, tmp_path: Path) -> None:
    """The attempt after `chmod +x` succeeds, without a restart or a reload."""
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho mended\n")
    gateway = await start(program(str(script), more={"retry": {"attempts": 100}}))
    call_id = await gateway.submit("it")
    await gateway.until(call_id, lambda record: record["attempts"] > 0)
    script.chmod(0o755)
    record = await gateway.final(call_id)
    assert (record["status"], record["response_bytes"]) == ("success", 7)


LIMITS = {"nproc": "Max processes", "nofile": "Max open files"}  # prlimit's names, and the kernel's


def soft_limit(gateway: Daemon, name: str) -> str:
    """What the daemon may have of something."""
    lines = Path(f"/proc/{gateway.pid}/limits").read_text().splitlines()
    return next(line for line in lines if line.startswith(LIMITS[name])).removeprefix(LIMITS[name]).split()[0]


def as_owner(pid: int) -> Sequence[str]:
    """What runs a command as the user of a process: others need a capability to change its limits."""
    owner = Path(f"/proc/{pid}").stat()
    ids = (f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups")
    return () if owner.st_uid == os.geteuid() else ("setpriv", *ids)


async def set_limit(gateway: Daemon, name: str, most: object) -> None:
    """Change that."""
    result = await run(*as_owner(gateway.pid), "prlimit", f"--pid={gateway.pid}", f"--{name}={most}:")
    assert result.code == 0, result.err


@contextlib.asynccontextmanager
async def limited(gateway: Daemon, name: str, most: int) -> AsyncIterator[None]:
    """While this lasts, the daemon may have no more of something."""
    before = soft_limit(gateway, name)
    await set_limit(gateway, name, most)
    try:
        yield
    finally:
        await set_limit(gateway, name, before)


async def assert_waits_uncharged(gateway: Daemon, name: str, most: Callable[[], int]) -> None:
    """Calls that come while something is short run when there is enough again, and only then."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as http:
        for client in (http, gateway.http):  # Both have a connection open then.
            async with client.post(f"{gateway.url}/function/it", data=b"x") as response:
                assert (response.status, await response.read()) == (200, b"x")
        async with limited(gateway, name, most()):
            calls = [await gateway.submit("it", b"later") for _ in range(3)]
            async with http.post(f"{gateway.url}/function/it", data=b"now") as response:
                text = await response.text()
                assert (response.status, len(text.splitlines())) == (503, 1), text
                assert int(response.headers["Retry-After"]) > 0
            for call_id in calls:
                await gateway.wait_for_log(call_id)
                record = await gateway.record(call_id)
                assert record["status"] in ("queued", "delayed", "running"), record
                assert record["attempts"] <= (record["status"] == "running"), record
        for call_id in calls:
            record = await gateway.final(call_id)
            assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)
            assert record["response_bytes"] == 5


async def test_a_daemon_that_may_not_fork_lets_its_calls_wait(user: User) -> None:
    """EAGAIN, by `ulimit -u` or TasksMax, is our own shortage: 503 for who waits for the answer."""
    gateway = await user.start(program("cat", more=ONCE), before=SOON)
    await assert_waits_uncharged(gateway, "nproc", lambda: 1)


async def test_a_daemon_that_may_start_no_thread_looks_up_names_later(user: User, function: Server) -> None:
    """libuv would abort the process."""

    async def echo(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return web.Response(body=seen.body)

    function.behaviour = echo
    named = {"url": f"http://localhost:{function.port}", "keepalive": False}
    forgetful = f"{SOON}\nfaasd_async.DNS_CACHE_S = 0.0"
    gateway = await user.start(to_toml({"functions": {"it": named}} | ONCE), before=forgetful)
    await assert_waits_uncharged(gateway, "nproc", lambda: 1)


WITHOUT_MORE_THREADS = """
import resource
start = faasd_async.Daemon._start_side_jobs
def short(self, chores):
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    return start(self, chores)
faasd_async.Daemon._start_side_jobs = short
faasd_async.HOUSEKEEPING_S = 0.1
"""


async def test_a_daemon_that_may_start_no_thread_does_without(user: User) -> None:
    """From its first step on: it keeps house, is reloaded, refuses a backup and stops well."""
    keep = {"calls": {"keep": "1s", "keep_failed": "1s"}}
    gateway = await user.start(program("cat", more=keep), before=WITHOUT_MORE_THREADS)
    call_id = await gateway.submit("it", X_Delay="1h")
    assert (await ask(gateway.url, f"/async-function/{call_id}", method="DELETE")).status == 202
    gateway.signal(signal.SIGHUP)
    await gateway.wait_for_log("configuration reloaded")
    refused = await ask(gateway.url, "/system/backup")
    reason = b"there is no copy of the queue's file: can't start new thread\n"
    assert (refused.status, refused.body) == (503, reason)
    await gateway.forgotten(call_id)


async def test_a_daemon_without_descriptors_lets_its_calls_wait(start: StartDaemon) -> None:
    """EMFILE, too."""
    gateway = await start(program("cat", more=ONCE), before=SOON)
    await assert_waits_uncharged(gateway, "nofile", lambda: with_free_descriptors(gateway, 2))


def with_free_descriptors(gateway: Daemon, count: int) -> int:
    """The limit that leaves a daemon so many."""
    used = open_files(gateway.pid)
    return next(most for most in range(1, 10_000) if len(set(range(most)) - used) == count)


async def test_with_few_descriptors_a_call_runs_or_waits(start: StartDaemon) -> None:
    """Wherever they run out: nothing in between, and no program or file is left of it."""
    gateway = await start(program("cat"))

    async def post() -> int:
        async with http.post(f"{gateway.url}/function/it", data=b"x") as response:
            return response.status

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as http:
        assert await asyncio.gather(*(post() for _ in range(4))) == [200] * 4  # that are connected now
        before = len(open_files(gateway.pid))
        seen = set[int]()
        for free in range(28):
            async with limited(gateway, "nofile", with_free_descriptors(gateway, free)):
                seen |= {*await asyncio.gather(*(post() for _ in range(4)))}
        assert seen == {200, 503}
        await without_children(gateway.pid)
        await until(lambda: len(open_files(gateway.pid)) <= before, "closed files")


class Hung:
    """A program whose file does not open, as on a server that is away: for 45 s, or until it is released.

    Somebody who has a lease on a file is asked to give it up first (fcntl(2)), and we do not answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("#!/bin/sh\nexec sleep 60\n")
        path.chmod(0o755)
        self._before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # which asks
        self._file: int | None = os.open(path, os.O_WRONLY)
        fcntl.fcntl(self._file, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def release(self) -> None:
        """It opens, from now on."""
        if self._file is not None:
            os.close(self._file)
            signal.signal(signal.SIGIO, self._before)
            self._file = None


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[Hung]:
    """A program that hangs while it is started."""
    one = Hung(tmp_path / "hung")
    yield one
    one.release()


async def under_way(gateway: Daemon) -> None:
    """Wait until a program is being started."""
    await until(lambda: children(gateway.pid), "a start under way")


async def test_a_program_whose_start_hangs_is_a_timeout(start: StartDaemon, hung: Hung) -> None:
    """Its time begins before it runs, its slot is free when that is over, and it is killed when it does run."""
    gateway = await start(program(str(hung.path), exec_timeout="1s", more=ONE_AT_A_TIME))
    calls = [await gateway.submit("it") for _ in range(2)]
    assert (await ask(gateway.url, "/function/it")).status == 504
    for call_id in calls:
        record = await gateway.final(call_id)
        assert (record["status"], record["attempts"]) == ("timeout", 1), record
    hung.release()
    await without_children(gateway.pid)


async def test_a_client_that_leaves_a_start_that_hangs_leaves_nothing_behind(start: StartDaemon, hung: Hung) -> None:
    """It is killed when it does run, and buried."""
    gateway = await start(program(str(hung.path)))
    async with connection(gateway.url) as (_, writer):
        writer.write(b"GET /function/it HTTP/1.1\r\nHost: x\r\n\r\n")
        await under_way(gateway)
    hung.release()
    await without_children(gateway.pid)


async def test_a_call_that_is_cancelled_as_its_program_starts_leaves_nothing_behind(
    kin: Kin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in one turn of the loop: the program is there, and nobody has got it yet."""
    function = parse_config({"functions": {"it": {"command": ["sh", "-c", STAY], "env": kin.env}}}).functions["it"]
    loop = asyncio.get_running_loop()
    call_soon_threadsafe = loop.call_soon_threadsafe

    def then_cancel(callback: Callable[..., object], *arguments: Any, context: Any = None) -> asyncio.Handle:
        def both() -> None:
            callback(*arguments)
            call.cancel()

        return call_soon_threadsafe(both)

    monkeypatch.setattr(loop, "call_soon_threadsafe", then_cancel)
    request = FunctionRequest("POST", "/", b"", b"")
    before = {*children(os.getpid())}
    call = asyncio.create_task(CommandRunner("us").run(function, request, Limit(PATIENCE), KIB))
    await asyncio.wait({call})
    assert call.cancelled()
    await until(lambda: before.issuperset(children(os.getpid())), "the end of the program")


async def test_programs_whose_start_hangs_do_not_keep_others(start: StartDaemon, hung: Hung) -> None:
    """However many of them wait."""
    gateway = await start(functions({"it": (str(hung.path),), "other": ("cat",)}))
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(ask(gateway.url, "/function/it")) for _ in range(16)]
        await under_way(gateway)
        reply = await ask(gateway.url, "/function/other", method="POST", body=b"x")
        assert (reply.status, reply.body) == (200, b"x")
        for task in waiting:
            task.cancel()


async def test_a_start_that_hangs_does_not_keep_the_daemon(start: StartDaemon, hung: Hung) -> None:
    """It stops in time, and the call is queued again for the next start."""
    more = {**ONCE, "gateway": {"drain_timeout": "100ms"}}
    gateway = await start(program(str(hung.path), more=more))
    call_id = await gateway.submit("it")
    await under_way(gateway)
    assert await gateway.terminate() == 0
    gateway.configure(program("true"))
    await gateway.start()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)


async def test_where_children_are_ignored_an_exit_status_is_what_it_is(start: StartDaemon) -> None:
    """SIGCHLD may be ignored from the start, by a supervisor; the kernel tells nobody of exits then."""
    gateway = await start(program("sh", "-c", "exit 7"), prefix=("sh", "-c", "trap '' CHLD; exec \"$@\"", "sh"))
    assert (await ask(gateway.url, "/function/it")).status == 500


# ---- too large for exec ----------------------------------------------------------------------------------------

LONG_LINE = 30_000  # bytes, which the HTTP front takes in a header
LITTLE_STACK = f"import resource; resource.setrlimit(resource.RLIMIT_STACK, ({MIB}, {MIB}))"  # of the programs
LONGEST_STRING = 32 * 4096  # MAX_ARG_STRLEN (execve(2)), of which name, `=` and a zero are a part


async def accepted(gateway: Daemon, names: Sequence[str], size: int, path: str = "/function/it") -> bool:
    """Whether a call is taken whose headers, of these names in turn, have so many bytes; else it is a 431."""
    lines = list[str]()
    while size > 0:
        value = "v" * min(size, LONG_LINE)
        size -= len(value)
        lines.append(f"{names[len(lines) % len(names)]}: {value}")
    reply = await ask(gateway.url, path, *lines, method="POST")
    if reply.status == 431:
        assert_refused(reply, 431, f"{LONGEST_STRING} bytes")
    else:
        assert reply.status in (200, 202), reply
    return reply.status != 431


async def largest(fits: Callable[[int], Awaitable[bool]], low: int, high: int) -> int:
    """The largest size that fits: `low` does, `high` does not."""
    assert await fits(low)
    assert not await fits(high)
    while high - low > 1:
        middle = (low + high) // 2
        if await fits(middle):
            low = middle
        else:
            high = middle
    return low


@pytest.mark.parametrize("path", ["/function/it", "/async-function/it"])
async def test_a_header_that_no_program_can_be_given_is_refused(start: StartDaemon, path: str) -> None:
    """Repeated until the whole is too long for one variable; up to the last byte it is 431 or runs."""
    gateway = await start(program("true", more=ONCE))
    most = await largest(lambda size: accepted(gateway, ["X-Long"], size, path), 4 * LONG_LINE, 5 * LONG_LINE)
    separators = 4 * len(", ")
    assert LONGEST_STRING - len("Http_X_Long=") - separators - 64 < most <= LONGEST_STRING
    await assert_no_call_failed(gateway)


@pytest.mark.unmeasured
@pytest.mark.parametrize("path", ["/function/it", "/async-function/it"])
async def test_headers_that_no_program_can_be_given_are_refused(start: StartDaemon, path: str) -> None:
    """Many that are too much together: with a stack of 1 MiB, a quarter of that is for all strings."""
    gateway = await start(program("true", more=ONCE), before=LITTLE_STACK)
    names = [f"X-Number-{number}" for number in range(16)]
    await largest(lambda size: accepted(gateway, names, size, path), 3 * LONG_LINE, 9 * LONG_LINE)
    await assert_no_call_failed(gateway)


async def test_an_environment_of_the_file_counts_too(start: StartDaemon) -> None:
    """What `env` and the command's own words take is not there for headers."""
    settings = program("true", "w" * LONG_LINE, env={"LONG": "v" * LONG_LINE}, more=ONCE)
    gateway = await start(settings, before=LITTLE_STACK)
    names = [f"X-Number-{number}" for number in range(16)]
    await largest(lambda size: accepted(gateway, names, size), 1, 7 * LONG_LINE)


async def assert_no_call_failed(gateway: Daemon) -> None:
    """What was accepted has run, or does so now."""
    async with gateway.http.get(f"{gateway.url}/system/calls?limit=1000") as response:
        calls = (await response.json())["calls"]
    for call in calls:
        record = await gateway.final(call["call_id"])
        assert (record["status"], record["attempts"]) == ("success", 1), record


async def test_a_function_behind_http_may_have_more_headers_than_a_program(
    start: StartDaemon, function: Server
) -> None:
    """The limit is that of programs."""
    gateway = await start(f'[functions.it]\nurl = "{function.url}"')
    lines = [f"X-Long: {'v' * 7000}"] * 20
    assert (await ask(gateway.url, "/function/it", *lines)).status == 200
    assert (await ask(gateway.url, "/async-function/it", *lines, method="POST")).status == 202
    for request in await function.wait_for(2):
        assert sum(map(len, request.headers.getall("X-Long"))) == 140_000


# ---- the answer's kind -----------------------------------------------------------------------------------------

JSON, TEXT, BYTES = "application/json", "text/plain; charset=utf-8", "application/octet-stream"


async def kinds(gateway: Daemon, sink: Server, name: str, body: bytes, *headers: str) -> set[str]:
    """The Content-Type of a function's answers, to a caller and to a callback URL."""
    reply = await ask(gateway.url, f"/function/{name}", *headers, method="POST", body=body)
    assert (reply.status, reply.body) == (200, body)
    back, number = f"X-Callback-Url: {sink.url}", len(sink.requests)
    reply_async = await ask(gateway.url, f"/async-function/{name}", *headers, back, method="POST", body=body)
    assert reply_async.status == 202
    request = (await sink.wait_for(number + 1))[-1]
    assert request.body == body
    return {reply.headers["Content-Type"], request.headers["Content-Type"]}


async def test_an_answer_is_of_the_kind_that_content_type_says(daemon: StartDaemon, sink: Server) -> None:
    """Whatever the request's is."""
    gateway = await daemon(program("cat", content_type="image/svg+xml"))
    assert await kinds(gateway, sink, "it", b"<svg/>") == {"image/svg+xml"}
    assert await kinds(gateway, sink, "it", b"<svg/>", f"Content-Type: {JSON}") == {"image/svg+xml"}


async def test_an_answer_is_of_the_requests_kind(daemon: StartDaemon, sink: Server) -> None:
    """As the classic watchdog has it, byte for byte."""
    gateway = await daemon(program("cat"))
    for kind in (JSON, 'multipart/form-data; boundary="a b"', "application/x-www-form-urlencoded"):
        assert await kinds(gateway, sink, "it", b"{}", f"content-type: {kind}") == {kind}


async def test_an_answer_without_a_kind_is_text_or_bytes(daemon: StartDaemon, sink: Server) -> None:
    """What it is can be seen from it."""
    gateway = await daemon(program("cat"))
    for headers in ((), ("Content-Type:",)):
        assert await kinds(gateway, sink, "it", "größe".encode(), *headers) == {TEXT}
    assert await kinds(gateway, sink, "it", b"\xff\x00") == {BYTES}


# ---- variables -------------------------------------------------------------------------------------------------


async def test_variables_are_named_as_go_writes_header_names(daemon: StartDaemon) -> None:
    """net/textproto's canonical form: what follows a dash is large, all other letters are small."""
    gateway = await daemon(program(*SHOW))
    names = {
        "x-sha256sum": "X_Sha256sum",
        "X-3D-MODEL": "X_3d_Model",
        "x-GitHub-event": "X_Github_Event",
        "ETAG": "Etag",
        "www-authenticate": "Www_Authenticate",
        "x--two": "X__Two",
        "x_under_score": "X_under_score",
        "X-It's": "X_It's",
        "dnt": "Dnt",
    }
    env = (await shown(gateway, *(f"{name}: {number}" for number, name in enumerate(names))))["env"]
    assert {name: env.get(f"Http_{name}") for name in names.values()} == {
        name: str(number) for number, name in enumerate(names.values())
    }


async def test_http_host_is_what_the_caller_asked(daemon: StartDaemon, sink: Server) -> None:
    """Sync and queued alike."""
    gateway = await daemon(program(*SHOW))
    reply = await ask(gateway.url, "/function/it", host="gateway.example")
    assert json.loads(reply.body)["env"]["Http_Host"] == "gateway.example"
    await ask(gateway.url, "/async-function/it", f"X-Callback-Url: {sink.url}", method="POST", host="gateway.example")
    (request,) = await sink.wait_for(1)
    assert json.loads(request.body)["env"]["Http_Host"] == "gateway.example"


CHUNKED = "Transfer-Encoding: chunked"


async def test_a_streamed_body_is_chunked_and_of_no_known_length(start: StartDaemon) -> None:
    """Go's words for it, which the classic watchdog passes on."""
    gateway = await start(program("sh", "-c", "head -c 5; exec printenv Http_Transfer_Encoding Http_Content_Length"))
    async with connection(gateway.url) as (reader, writer):
        writer.write(f"POST /function/it HTTP/1.1\r\nHost: x\r\n{CHUNKED}\r\n\r\n5\r\nhello\r\n".encode())
        writer.write(b"%x\r\n%b\r\n" % (MIB, bytes(MIB)))  # and no end
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        assert await asyncio.wait_for(reader.readuntil(b"-1\n"), PATIENCE) == b"hellochunked\n-1\n"


async def test_a_body_of_known_length_is_not_chunked(daemon: StartDaemon) -> None:
    """However long it is."""
    gateway = await daemon(program("sh", "-c", "wc -c; env | grep -iE '^http_(transfer_encoding|content_?length)='"))
    for size in (0, 100, 2 * MIB):
        reply = await ask(gateway.url, "/function/it", method="POST", body=bytes(size))
        lines = reply.body.decode().split()
        assert lines[0] == str(size)
        assert sorted(lines[1:]) == [f"Http_ContentLength={size}", f"Http_Content_Length={size}"], lines


# ---- check -----------------------------------------------------------------------------------------------------


async def check(folder: Path, settings: str) -> Finished:
    """`faasd-async check` on these settings, which have nothing wrong that would stop a start."""
    path = folder / "config.toml"
    path.write_text(settings)
    result = await faasd("check", "--config", path)
    assert (result.code, "ok" in result.out, len(result.out.splitlines())) == (0, True, 1), result
    return result


@pytest.mark.parametrize("word", ["/nonexistent/program", "no-such-program-anywhere", "./not-in-the-folder"])
async def test_check_warns_of_a_program_that_is_not_there(tmp_path: Path, word: str) -> None:
    """The function and the program on one line."""
    result = await check(tmp_path, functions({"wrong": (word,), "right": ("cat",)}))
    (line,) = result.err.splitlines()
    assert (word in line, "functions.wrong" in line, "right" in line) == (True, True, False), line


async def test_check_says_what_to_do_about_a_program_that_can_not_be_run(tmp_path: Path) -> None:
    """One that nobody may run, a line that is a shell's to read, a folder that is not there."""
    script = tmp_path / "my script"
    script.write_text("#!/bin/sh\n")
    shell = ': what a shell has to read stands in ["sh", "-c", "…"]'
    programs = {"closed": (str(script),), "piped": ("ls -l | wc",), "home": ("~/report.sh",), "gone": ("report.sh",)}
    result = await check(tmp_path, functions(programs))
    assert [line.partition(": functions.")[2] for line in result.err.splitlines()] == [
        f"closed.command: {script} is not executable: chmod +x '{script}'",
        f"piped.command: there is no program ls -l | wc{shell}",
        f"home.command: there is no program ~/report.sh{shell}",
        "gone.command: there is no program report.sh",
    ]
    result = await check(tmp_path, functions({"it": ("cat",)}, cwd="/nonexistent/folder"))
    assert result.err.endswith(": functions.it.cwd: there is no folder /nonexistent/folder\n")


async def test_check_warns_of_a_script_whose_interpreter_is_not_there(tmp_path: Path) -> None:
    """Such as one that was written on Windows: the carriage return belongs to the interpreter's name."""
    lines = {
        "fine": "#!/bin/sh -e\n",
        "gone": "#! /opt/nothing/python3 -u\n",
        "windows": "#!/bin/sh\r\n",
        "text": "echo\n",
    }
    for name, line in lines.items():
        (tmp_path / name).write_text(line)
        (tmp_path / name).chmod(0o755)
    result = await check(tmp_path, functions({name: (str(tmp_path / name),) for name in lines}))
    gone, windows, text = result.err.splitlines()
    assert text.endswith(f"{tmp_path}/text can't be run: its first line has to name what runs it, such as #!/bin/sh")
    assert ("functions.gone" in gone, "/opt/nothing/python3," in gone) == (True, True), gone
    assert ("functions.windows" in windows, r"/bin/sh\r," in windows) == (True, True), windows


async def test_check_looks_for_a_program_where_it_would_be_started(tmp_path: Path) -> None:
    """By `cwd`, by PATH and by the PATH of `env`."""
    folder = tmp_path / "folder"
    folder.mkdir()
    script = folder / "tool-of-its-own"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    tables = {
        "cwd": {"command": [f"./{script.name}"], "cwd": str(folder)},
        "env": {"command": [script.name], "env": {"PATH": f"/bin:{folder}"}},
        "path": {"command": ["cat"]},
        "absolute": {"command": [str(script)]},
    }
    assert (await check(tmp_path, to_toml({"functions": tables}))).err == ""


async def test_check_warns_of_a_queue_that_only_a_typo_made(tmp_path: Path) -> None:
    """A name close to that of a queue in the file, as a key or as OpenFaaS's annotation."""
    result = await check(
        tmp_path,
        to_toml(
            {
                "queues": {"slow-queue": {"max_inflight": 2}},
                "functions": {
                    "wrong": {"command": ["cat"], "queue": "slow-qeue"},
                    "annotated": {"command": ["cat"], "annotations": {"com.openfaas.queue": "slowqueue"}},
                    "default": {"command": ["cat"], "queue": "faas-requests"},
                    "right": {"command": ["cat"], "queue": "slow-queue"},
                    "other": {"command": ["cat"], "queue": "something-else"},
                },
            }
        ),
    )
    lines = result.err.splitlines()
    assert len(lines) == 3, lines
    for name, wrong, right in (
        ("wrong", "slow-qeue", "slow-queue"),
        ("annotated", "slowqueue", "slow-queue"),
        ("default", "faas-requests", "faas-request"),
    ):
        (line,) = [line for line in lines if name in line]
        assert (wrong in line, right in line) == (True, True), line
