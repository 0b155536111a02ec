"""Functions that are commands: forked per request, as the classic watchdog does it."""

import asyncio
import contextlib
import json
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from conftest import PATIENCE, PYTHON, Server, StartDaemon, ask, connection, run

pytestmark = pytest.mark.unmeasured  # test_programs.py has all of it

MIB = 2**20


def command(*words: str, more: str = "") -> str:
    """Settings with one function, `it`, that runs these words."""
    return f"[functions.it]\ncommand = {json.dumps(words)}\n{more}\n"


def python(code: str, more: str = "") -> str:
    """Settings with one function, `it`, that is a little Python program."""
    return command(*PYTHON, code, more=more)


# ---- in and out ------------------------------------------------------------------------------------------------


async def test_the_body_is_stdin_and_stdout_is_the_answer(daemon: StartDaemon) -> None:
    """The oldest interface there is."""
    gateway = await daemon(command("tr", "a-z", "A-Z"))
    reply = await ask(gateway.url, "/function/it", method="POST", body=b"hello")
    assert (reply.status, reply.body) == (200, b"HELLO")


async def test_it_works_with_curl(daemon: StartDaemon) -> None:
    """As a person would try it."""
    gateway = await daemon(command("tr", "a-z", "A-Z"))
    result = await run("curl", "-sS", "-d", "hello", f"{gateway.url}/function/it")
    assert (result.code, result.out) == (0, "HELLO"), result.err


async def test_every_byte_goes_in_and_out_unchanged(daemon: StartDaemon) -> None:
    """A command's input and output are bytes, not text."""
    gateway = await daemon(command("cat"))
    reply = await ask(gateway.url, "/function/it", method="POST", body=bytes(range(256)))
    assert reply.body == bytes(range(256))


async def test_big_input_and_output_do_not_block_each_other(daemon: StartDaemon) -> None:
    """A command that writes while it reads fills both pipes; neither may wait for the other."""
    gateway = await daemon(command("cat"))
    body = os.urandom(8 * MIB)
    reply = await ask(gateway.url, "/function/it", method="POST", body=body)
    assert (reply.status, reply.body == body) == (200, True)


async def test_a_command_need_not_read_its_input(daemon: StartDaemon) -> None:
    """A pipe that nobody reads is no error."""
    gateway = await daemon(command("echo", "done"))
    for size in (0, 100, 4 * MIB):
        reply = await ask(gateway.url, "/function/it", method="POST", body=bytes(size))
        assert (reply.status, reply.body) == (200, b"done\n"), size


async def test_without_a_body_stdin_is_empty(daemon: StartDaemon) -> None:
    """A command that reads to the end does not wait for ever."""
    gateway = await daemon(command("wc", "-c"))
    reply = await ask(gateway.url, "/function/it")
    assert (reply.status, reply.body.strip()) == (200, b"0")


async def test_a_lot_on_stderr_does_not_block_the_command(daemon: StartDaemon) -> None:
    """Stderr is read too, and is no part of the answer."""
    gateway = await daemon(python(f"import sys; sys.stderr.write('e' * {4 * MIB}); print('out')"))
    reply = await ask(gateway.url, "/function/it")
    assert (reply.status, reply.body) == (200, b"out\n")


async def test_an_async_call_runs_the_command(daemon: StartDaemon, sink: Server) -> None:
    """The same command behind the queue; its output goes to the callback."""
    gateway = await daemon(command("tr", "a-z", "A-Z"))
    call_id = await gateway.submit("it", b"hello", X_Callback_Url=sink.url)
    (request,) = await sink.wait_for(1)
    assert (request.body, request.call_id, request.headers["X-Function-Status"]) == (b"HELLO", call_id, "200")
    record = await gateway.final(call_id)
    assert (record["status"], record["http_status"], record["response_bytes"]) == ("success", 200, 5)


async def test_the_duration_of_a_command_is_told(daemon: StartDaemon) -> None:
    """X-Duration-Seconds, as from a watchdog."""
    gateway = await daemon(command("true"))
    reply = await ask(gateway.url, "/function/it")
    assert 0 < float(reply.headers["X-Duration-Seconds"]) < PATIENCE


# ---- environment -----------------------------------------------------------------------------------------------

SHOW_ENVIRONMENT = "import json, os; print(json.dumps(dict(os.environ)))"


async def environment(
    daemon: StartDaemon, target: str, *headers: str, body: bytes = b"", more: str = ""
) -> dict[str, str]:
    """The environment of a command that is called like this."""
    gateway = await daemon(python(SHOW_ENVIRONMENT, more))
    reply = await ask(gateway.url, f"/function/it{target}", *headers, method="PUT", body=body)
    assert reply.status == 200, reply
    found: dict[str, str] = json.loads(reply.body)
    return found


async def test_method_path_and_query_are_in_the_environment(daemon: StartDaemon) -> None:
    """Http_Method, Http_Path and Http_Query, the latter two as they were sent."""
    found = await environment(daemon, "/a%2Fb//c;d?x=%zz&y=1+2")
    assert found["Http_Method"] == "PUT"
    assert found["Http_Path"] == "/a%2Fb//c;d"
    assert found["Http_Query"] == "x=%zz&y=1+2"


async def test_headers_are_in_the_environment(daemon: StartDaemon) -> None:
    """Http_ and the header's name as Go writes it, with `_` for `-`."""
    found = await environment(
        daemon, "/", "content-type: text/x-test", "X-My-Header: some value", "x-lower-case: yes", body=b"123"
    )
    assert found["Http_Content_Type"] == "text/x-test"
    assert found["Http_X_My_Header"] == "some value"
    assert found["Http_X_Lower_Case"] == "yes"
    assert found["Http_ContentLength"] == "3"
    assert found["Http_Content_Length"] == "3"


async def test_the_call_id_is_in_the_environment(daemon: StartDaemon) -> None:
    """What every function is told, a command is told too."""
    found = await environment(daemon, "/", "X-Call-Id: trace-1")
    assert found["Http_X_Call_Id"] == "trace-1"
    assert int(found["Http_X_Start_Time"]) > 0
    assert found["Http_X_Forwarded_Host"] == "gateway.example"


async def test_an_async_command_is_told_which_retry_it_is(daemon: StartDaemon, sink: Server) -> None:
    """Http_X_Retry counts the attempts before this one."""
    gateway = await daemon(python(SHOW_ENVIRONMENT))
    await gateway.submit("it", X_Callback_Url=sink.url)
    (request,) = await sink.wait_for(1)
    found = json.loads(request.body)
    assert (found["Http_X_Retry"], found["Http_Method"]) == ("0", "POST")


async def test_env_of_the_function_is_in_the_environment(daemon: StartDaemon) -> None:
    """`env` in the file, beside the daemon's own environment (PATH above all)."""
    found = await environment(daemon, "/", more='env = { GREETING = "hi there", EMPTY = "" }')
    assert (found["GREETING"], found["EMPTY"]) == ("hi there", "")
    assert found["PATH"]


async def test_a_header_cannot_set_another_variable(daemon: StartDaemon) -> None:
    """A caller chooses names behind Http_ and nothing else."""
    found = await environment(daemon, "/", "LD-PRELOAD: evil.so", "PATH: evil", "HTTP_X: evil")
    evil = [name for name, value in found.items() if "evil" in value]
    assert evil
    assert all(name.startswith("Http_") for name in evil), evil


async def test_a_header_cannot_replace_what_the_gateway_says(daemon: StartDaemon) -> None:
    """`Path:`, `Method:` and `Query:` are header names, too."""
    found = await environment(daemon, "/right?right", "Path: /evil", "Method: EVIL", "Query: evil", "ContentLength: 9")
    assert (found["Http_Method"], found["Http_Path"], found["Http_Query"]) == ("PUT", "/right", "right")
    assert found["Http_ContentLength"] == "0"


async def test_a_header_cannot_set_a_proxy(daemon: StartDaemon) -> None:
    """`Proxy:` would become Http_Proxy, which many programs obey in any case of letters (httpoxy)."""
    found = await environment(daemon, "/", "Proxy: evil.example")
    assert "HTTP_PROXY" not in {name.upper() for name, value in found.items() if "evil" in value}


# ---- failing ---------------------------------------------------------------------------------------------------


async def test_a_command_that_fails_is_a_500(daemon: StartDaemon) -> None:
    """An exit code other than 0, or death by a signal."""
    gateway = await daemon(command("sh", "-c", "exit 3") + '[functions.dies]\ncommand = ["sh", "-c", "kill -9 $$"]')
    assert (await ask(gateway.url, "/function/it")).status == 500
    assert (await ask(gateway.url, "/function/dies")).status == 500


async def test_a_command_that_fails_without_a_word_is_told_of(daemon: StartDaemon) -> None:
    """A caller would see nothing at all; what a command has said itself is left as it is."""
    said = '[functions.said]\ncommand = ["sh", "-c", "echo no; exit 3"]\n[functions.killed]\n'
    killed = 'command = ["sh", "-c", "kill -9 $$"]\ncontent_type = "application/json"\n'
    gateway = await daemon(command("false", more=said + killed))
    for name, body in (
        ("it", b"function it: exit status 1\n"),
        ("said", b"no\n"),
        ("killed", b"function killed: killed by signal 9\n"),
    ):
        reply = await ask(gateway.url, f"/function/{name}", "X-Call-Id: mine")
        assert (reply.status, reply.body) == (500, body), name
        assert reply.headers["Content-Type"].startswith("text/plain"), name
        assert reply.headers["X-Call-Id"] == "mine", name
        assert float(reply.headers["X-Duration-Seconds"]) > 0, name


async def test_an_async_command_that_fails_is_tried_again(daemon: StartDaemon) -> None:
    """Its 500 is as good as a server's."""
    gateway = await daemon(command("false") + "[retry]\nattempts = 3\n")
    record = await gateway.final(await gateway.submit("it"))
    assert (record["status"], record["attempts"], record["http_status"]) == ("error", 3, 500)


async def test_a_command_that_cannot_be_started_is_a_502(daemon: StartDaemon) -> None:
    """The answer says in one line which function could not be started, and why."""
    cannot = {
        "absent": "/nonexistent/program",
        "nowhere": "no-such-program-anywhere",
        "data": "/proc/version",
        "dir": "/",
    }
    gateway = await daemon("".join(f'[functions.{name}]\ncommand = ["{word}"]\n' for name, word in cannot.items()))
    for name in cannot:
        reply = await ask(gateway.url, f"/function/{name}", method="POST", body=b"s3cret")
        text = reply.body.decode()
        assert (reply.status, len(text.splitlines())) == (502, 1), name
        assert name in text
        assert "no such file" in text.lower() or "permission denied" in text.lower()
        assert "s3cret" not in text


# ---- the process group -----------------------------------------------------------------------------------------

# A shell with a grandchild in the background, all of which hold the FIFO open.
FAMILY = 'exec 3>"$FIFO"; (sleep 100; sleep 100) & echo started >&3; wait'


class Family:
    """A command with children, seen through a FIFO that each of them inherits open.

    The FIFO is at its end when the last of them is dead: a sign that comes by itself, needs no search for
    processes, and cannot be missed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader = asyncio.StreamReader()
        self._held_open: int | None = None  # by us until the family runs: no writer yet would be an end, too

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Create the FIFO and listen to it."""
        os.mkfifo(self.path)
        file = os.fdopen(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
        self._held_open = os.open(self.path, os.O_WRONLY)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(self.reader), file)
        try:
            yield
        finally:
            transport.close()
            self._let_go()

    def _let_go(self) -> None:
        if self._held_open is not None:
            os.close(self._held_open)
            self._held_open = None

    def settings(self, more: str = "", script: str = FAMILY) -> str:
        """Settings with the function `it` that runs the family."""
        return command("sh", "-c", script, more=f'env = {{ FIFO = "{self.path}" }}\n{more}')

    async def started(self) -> None:
        """Wait until the whole family runs."""
        assert await asyncio.wait_for(self.reader.readline(), PATIENCE) == b"started\n"
        self._let_go()

    async def dead(self) -> None:
        """Wait until none of the family is left."""
        self._let_go()
        try:
            await asyncio.wait_for(self.reader.read(), PATIENCE)
        except TimeoutError:
            raise AssertionError("some of the family still live") from None


@pytest.fixture
async def family(tmp_path: Path) -> AsyncIterator[Family]:
    """A family that is watched."""
    one = Family(tmp_path / "fifo")
    async with one.watched():
        yield one


async def test_a_command_that_takes_too_long_is_killed_with_its_children(daemon: StartDaemon, family: Family) -> None:
    """504 after `exec_timeout`, and no process of the group is left."""
    gateway = await daemon(family.settings('exec_timeout = "1s"'))
    reply = await ask(gateway.url, "/function/it")
    await family.started()
    assert reply.status == 504
    await family.dead()


async def test_an_async_command_that_takes_too_long_is_a_timeout(daemon: StartDaemon, family: Family) -> None:
    """The same behind the queue: killed whole, and recorded as what it was."""
    gateway = await daemon(family.settings('exec_timeout = "1s"') + "[retry]\nattempts = 1\n")
    record = await gateway.final(await gateway.submit("it"))
    await family.started()
    assert (record["status"], record["http_status"]) == ("timeout", 504)
    assert record["error"] == "function it did not end within functions.it.exec_timeout (1s)"
    await family.dead()


async def test_the_timeout_of_the_queue_kills_the_command_too(daemon: StartDaemon, family: Family) -> None:
    """Whichever limit is reached first."""
    limits = '[retry]\nattempts = 1\n[queues.faas-request]\ntimeout = "1s"\n'
    gateway = await daemon(family.settings() + limits)
    record = await gateway.final(await gateway.submit("it"))
    await family.started()
    assert record["status"] == "timeout"
    await family.dead()


async def test_a_client_that_goes_away_kills_the_command(daemon: StartDaemon, family: Family) -> None:
    """Nobody waits for its output any more."""
    gateway = await daemon(family.settings())
    async with connection(gateway.url) as (_, writer):
        writer.write(b"GET /function/it HTTP/1.1\r\nHost: x\r\n\r\n")
        await family.started()
    await family.dead()


async def test_a_client_that_goes_away_while_the_command_starts_leaves_nothing_behind(
    daemon: StartDaemon, family: Family
) -> None:
    """There is no moment at which a process is started and not yet the daemon's to kill."""
    gateway = await daemon(family.settings())
    chance = random.Random(5)

    async def short_visit() -> None:
        async with connection(gateway.url) as (_, writer):
            writer.write(b"GET /function/it HTTP/1.1\r\nHost: x\r\n\r\n")
            # The moment is the thing here: before, while and after the command is started.
            await asyncio.sleep(chance.uniform(0, 0.05))

    for _ in range(10):
        await asyncio.gather(*(short_visit() for _ in range(5)))
    assert await gateway.terminate() == 0
    await family.dead()


async def test_shutdown_kills_the_command(daemon: StartDaemon, family: Family) -> None:
    """What still runs after `drain_timeout` is not left behind on the host."""
    gateway = await daemon(family.settings() + '[gateway]\ndrain_timeout = "100ms"\n')
    await gateway.submit("it")
    await family.started()
    assert await gateway.terminate() == 0
    await family.dead()


async def test_the_kill_does_not_ask(daemon: StartDaemon, family: Family) -> None:
    """A command that ignores SIGTERM dies all the same."""
    gateway = await daemon(family.settings('exec_timeout = "1s"', f"trap '' TERM INT HUP; {FAMILY}"))
    reply = await ask(gateway.url, "/function/it")
    await family.started()
    assert reply.status == 504
    await family.dead()


async def test_many_commands_run_at_once(daemon: StartDaemon) -> None:
    """Sync calls of a command do not wait for each other."""
    gateway = await daemon(command("cat"))
    bodies = [str(number).encode() for number in range(20)]
    replies = await asyncio.gather(*(ask(gateway.url, "/function/it", method="POST", body=body) for body in bodies))
    assert [reply.body for reply in replies] == bodies


def held(pid: int) -> int:
    """How many children, zombies among them, and open files a process has."""
    parents = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended since it was listed
            parents.append(int(stat.read_text().rpartition(")")[2].split()[1]))
    return parents.count(pid) + len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def test_commands_leave_no_zombies_and_no_open_files(daemon: StartDaemon) -> None:
    """A daemon that runs for months cannot afford either."""
    gateway = await daemon(command("cat"))
    await ask(gateway.url, "/function/it", method="POST", body=b"x")
    before = held(gateway.pid)
    for _ in range(30):
        await ask(gateway.url, "/function/it", method="POST", body=b"x")
    # The last calls may still be tidied up after; the first cannot.
    assert held(gateway.pid) < before + 10
