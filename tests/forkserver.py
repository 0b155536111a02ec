"""Start the program as a new process without starting Python for it.

Most of what a start of faasd_async takes is the interpreter and its imports. A fork server does
both once: a process that has imported the program, waits for requests and forks for each. The
fork becomes what a new process would be (own id, working directory, environment, standard
streams, resource limits, no other open file) and calls `faasd_async.main`. Signals end it, threads
and exit handlers are waited for, and who asked for it gets its exit code, as with any other process.

Two things are the server's and not the child's: the seed of `hash()`, and what is read from the
environment while Python starts and modules are imported. `READ_AT_IMPORT` names the latter; who
sets one of these differently needs an interpreter of its own, and so does who looks at the
command line in /proc. Only for LD_PRELOAD there is a server for each library.
"""

import asyncio
import atexit
import collections
import contextlib
import gc
import json
import marshal
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, NoReturn

# Variables for the interpreter, the C library, OpenSSL (aiohttp loads the certificates when it is
# imported) and modules.
READ_AT_IMPORT = re.compile(
    r"(PYTHON|LD_|LC_|MALLOC_|GLIBC_|OPENSSL|SSL|AIOHTTP_|UVLOOP_|PROMETHEUS_|COVERAGE_)\w*|LANG"
    r"|LANGUAGE|\w+_NO_EXTENSIONS|prometheus_multiproc_dir"
)
LIMITS = sorted(value for name, value in vars(resource).items() if name.startswith("RLIMIT_"))
LARGEST_REQUEST = 2**20
GONE = "the fork server has ended; what it wrote says why, perhaps faasd_async can't be imported"


# ---- the tests' side -----------------------------------------------------------------------------


class Forked:
    """A child of the fork server, with what `asyncio.subprocess.Process` has."""

    def __init__(self) -> None:
        self.pid = 0
        self.returncode: int | None = None  # as asyncio has it: negative for a signal
        self.stdin: asyncio.StreamWriter | None = None
        self.stdout: asyncio.StreamReader | None = None
        self.stderr: asyncio.StreamReader | None = None
        self._end: asyncio.Task[int] | None = None

    async def connect(self, number: int, given: int | None, limit: int, after: contextlib.ExitStack) -> int:
        """What its standard stream of this number is to be; `after` it is forked, we close that."""
        if given is None:
            return number  # ours
        if given == DEVNULL:
            stream = os.open(os.devnull, os.O_RDWR)
        elif given != PIPE:
            return given
        elif number == 0:
            self.stdin, stream = await write_to_pipe()
        elif number == 1:
            self.stdout, stream = await read_from_pipe(limit)
        else:
            self.stderr, stream = await read_from_pipe(limit)
        after.callback(os.close, stream)
        return stream

    async def begin(self, server: socket.socket, request: bytes, streams: Sequence[int]) -> None:
        """Have the server fork it."""
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        status.setblocking(False)
        try:
            with theirs:
                socket.send_fds(server, [request], [theirs.fileno(), *streams])
            self.pid = await receive_number(status)
        except ConnectionError:
            status.close()
            raise RuntimeError(GONE) from None
        except BaseException:
            status.close()
            raise
        self._end = asyncio.create_task(self._note_the_end(status))

    async def _note_the_end(self, status: socket.socket) -> int:
        with status:
            self.returncode = await receive_number(status)
        return self.returncode

    async def wait(self) -> int:
        """The exit code, once there is one."""
        assert self._end is not None
        return await asyncio.shield(self._end)

    async def communicate(self, data: bytes = b"") -> tuple[bytes, bytes]:
        """Feed it, and read what it writes until it has ended."""

        async def feed() -> None:
            if self.stdin is not None:
                with contextlib.suppress(ConnectionError):  # it need not read to the end
                    self.stdin.write(data)
                    await self.stdin.drain()
                self.stdin.close()

        async def read(stream: asyncio.StreamReader | None) -> bytes:
            return b"" if stream is None else await stream.read()

        _, out, err = await asyncio.gather(feed(), read(self.stdout), read(self.stderr))
        await self.wait()
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """A running fork server. When this is closed or we end, so do it and all it started.

    What it starts has this library preloaded, if there is one, and whatever else `prefix`, a
    command that execs the server, leaves to it.
    """

    def __init__(self, library: str = "", prefix: Sequence[str] = ()) -> None:
        self._environment = {**os.environ, **({"LD_PRELOAD": library} if library else {})}
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=DEVNULL,
                env=self._environment,
            )

    def close(self) -> None:
        """End the server and wait for it."""
        self._requests.close()
        self._process.wait()

    def can_start(self, env: Mapping[str, str]) -> bool:
        """Whether a process with this environment is the same when it is forked."""

        def read_at_import(variables: Mapping[str, str]) -> dict[str, str]:
            return {name: variables[name] for name in variables if READ_AT_IMPORT.fullmatch(name)}

        return read_at_import(self._environment) == read_at_import(env)

    async def start(
        self,
        *arguments: str,
        env: Mapping[str, str],
        cwd: Path,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        limit: int = 2**16,
        before: str = "",
    ) -> Forked:
        """`before`, which is Python with `faasd_async`, then `faasd_async.main(arguments)`.

        The rest is as for `asyncio.create_subprocess_exec`.
        """
        request = {
            "arguments": arguments,
            "env": dict(env),
            "cwd": str(cwd),
            "limits": [resource.getrlimit(number) for number in LIMITS],
            "before": before,
        }
        forked = Forked()
        with contextlib.ExitStack() as after:
            streams = [
                await forked.connect(number, given, limit, after)
                for number, given in enumerate((stdin, stdout, stderr))
            ]
            await forked.begin(self._requests, json.dumps(request).encode(), streams)
        return forked


async def write_to_pipe() -> tuple[asyncio.StreamWriter, int]:
    """A pipe to write to, and its other end."""
    theirs, ours = os.pipe()
    loop, protocol = (
        asyncio.get_running_loop(),
        asyncio.StreamReaderProtocol(asyncio.StreamReader()),
    )
    transport, _ = await loop.connect_write_pipe(lambda: protocol, os.fdopen(ours, "wb", 0))
    return asyncio.StreamWriter(transport, protocol, None, loop), theirs


async def read_from_pipe(limit: int) -> tuple[asyncio.StreamReader, int]:
    """A pipe to read from, and its other end."""
    ours, theirs = os.pipe()
    reader = asyncio.StreamReader(limit)
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(ours, "rb", 0))
    return reader, theirs


async def receive_number(status: socket.socket) -> int:
    """What the server tells next about a child: first its process id, then its exit code."""
    message = await asyncio.get_running_loop().sock_recv(status, 64)
    if not message:
        raise RuntimeError(GONE)
    return int(message)


# ---- the server ----------------------------------------------------------------------------------


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Returns in each child with its request, and in the server at its end.

    What is held open here is plain numbers: an object could close one in a child, where it means
    another file.
    """
    children: dict[int, tuple[int, int]] = {}  # by descriptor: process id, and who waits for it
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready in children:
                poll.unregister(ready)
                reap(ready, *children.pop(ready))
                continue
            message, files, _, _ = socket.recv_fds(requests, LARGEST_REQUEST, 4)
            if not message:
                for pid, _ in children.values():
                    os.kill(pid, signal.SIGKILL)
                return None
            status, *streams = files
            assert numbers_in("/proc/self/task") == [os.getpid()], "a fork has no other thread"
            if (pid := os.fork()) == 0:
                requests.detach()
                return {**json.loads(message), "streams": streams}
            for stream in streams:
                os.close(stream)
            tell(status, pid)
            child = os.pidfd_open(pid)
            children[child] = pid, status
            poll.register(child, select.POLLIN)


def reap(child: int, pid: int, status: int) -> None:
    """Tell how a child has ended."""
    _, how = os.waitpid(pid, 0)
    tell(status, os.waitstatus_to_exitcode(how))
    os.close(status)
    os.close(child)


def tell(status: int, number: int) -> None:
    """Send a number to who waits for it, if anybody still does."""
    with contextlib.suppress(BrokenPipeError):
        os.write(status, str(number).encode())


def numbers_in(folder: str) -> list[int]:
    """The ids of our threads, or of our open files."""
    return [int(entry.name) for entry in Path(folder).iterdir()]


def become(request: dict[str, Any], signals: Iterable[int]) -> list[str]:
    """Make this process, a fork, what the request says; the arguments for `main`."""
    for number, stream in enumerate(request["streams"]):
        os.dup2(stream, number)
    os.closerange(3, max(numbers_in("/proc/self/fd")) + 1)
    open_streams()
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    sys.argv[1:] = request["arguments"]
    for limit, values in zip(LIMITS, request["limits"], strict=True):
        resource.setrlimit(limit, tuple(values))
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    return list(request["arguments"])


def open_streams() -> None:
    """Open the standard streams as Python does, which then looks what each of them is."""
    for number, name, mode, buffering in (
        (0, "stdin", "r", -1),
        (1, "stdout", "w", -1),
        (2, "stderr", "w", 1),
    ):
        old = getattr(sys, name)
        new = open(  # noqa: SIM115
            number, mode, buffering, old.encoding, old.errors, newline="\n", closefd=False
        )
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


class Covered:
    """What coverage sees in the children of a server, which stores it at its end.

    Each child leaves it in a file. To write one of coverage's own takes several times as long, and to combine those of
    thousands of children takes seconds at the end, when all else is done.
    """

    def __init__(self) -> None:
        module = sys.modules.get("coverage")
        self._coverage: Any = module and module.Coverage.current()  # None: nothing is measured
        self._folder = Path(tempfile.mkdtemp(prefix="covered-"))
        self._arcs: dict[str, list[tuple[int, int]]] = {}  # from line to line, by file

    def begin(self) -> None:
        """Store what the server itself has run, or each child would leave it again."""
        if self._coverage:
            self._coverage.save()

    def leave(self) -> None:
        """Have the server store what this child has run, in place of coverage, which would do so itself at exit."""
        if self._coverage:
            self._coverage._auto_save = False
            self._coverage.stop()
            self._coverage._collector.covdata = self
            self._coverage._collector.flush_data()
            half = self._folder / f"{os.getpid()}-{time.monotonic_ns()}.half"
            half.write_bytes(marshal.dumps(self._arcs))
            half.rename(half.with_suffix(".arcs"))

    def add_arcs(self, arcs: dict[str, list[tuple[int, int]]]) -> None:
        """Coverage's collector calls it with what it has."""
        self._arcs = arcs

    def add_file_tracers(self, tracers: dict[str, str]) -> None:
        """Coverage's collector calls it as well: there are none."""

    def end(self) -> None:
        """Store what the children have left; those that were killed have left nothing."""
        if self._coverage:
            arcs = collections.defaultdict[str, set[tuple[int, int]]](set)
            for left in self._folder.glob("*.arcs"):
                for file, some in marshal.loads(left.read_bytes()).items():
                    arcs[file].update(some)
            self._coverage.get_data().add_arcs(arcs)
        shutil.rmtree(self._folder)


def end(code: int) -> NoReturn:
    """End a child as its interpreter does, up to the point where that takes all modules apart.

    To write to every object, and so to copy all that is shared with the server, is half of what a child would cost.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()  # what is left in cycles is told if it should have been closed
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """The server, and each of its children."""
    import aiohttp  # noqa: F401 - a command imports it if it needs it, and then has it at once
    import prometheus_client  # noqa: F401

    import faasd_async

    covered = Covered()
    covered.begin()
    gc.collect()
    gc.freeze()  # or each collection in a child would write to what it shares with us
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # pytest handles Ctrl-C
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        atexit.register(covered.leave)
        arguments = become(request, signals)
        exec(request["before"], {"faasd_async": faasd_async})
        try:
            code = faasd_async.main(arguments)
        except SystemExit as exc:  # of argparse
            code = int(exc.code or 0)
        end(code)
    covered.end()


if __name__ == "__main__":
    main()
