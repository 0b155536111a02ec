"""The command line as a client: what a person or a script at a shell sees of a running daemon."""

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest
from conftest import PIPE, Daemon, Finished, Gate, Server, StartDaemon, answer, faasd, start_program

UPPER = '[functions.upper]\ncommand = ["tr", "a-z", "A-Z"]\n'


class Cli:
    """`faasd_async.py` with what a shell would give it."""

    def __init__(self, gateway: Daemon) -> None:
        self.gateway = gateway

    async def __call__(self, *words: str, stdin: bytes = b"", code: int = 0) -> Finished:
        """Run a command against the daemon; it has to end with this code."""
        result = await faasd(*words, "--url", self.gateway.url, stdin=stdin)
        assert result.code == code, result
        assert "Traceback" not in result.err
        return result

    async def out(self, *words: str, stdin: bytes = b"") -> str:
        """What a command that does well prints, without the last newline; it says nothing else."""
        result = await self(*words, stdin=stdin)
        assert result.err == ""
        return result.out.removesuffix("\n")


@pytest.fixture
async def cli(daemon: StartDaemon, function: Server) -> Cli:
    """The command line, for a daemon with the function `it` and the command `upper`."""
    return Cli(await daemon(f'{UPPER}[functions.it]\nurl = "{function.url}"\n[retry]\nattempts = 1\n[queues.slow]'))


# ---- invoke ----------------------------------------------------------------------------------------------------


async def test_invoke_prints_the_answer_byte_for_byte(cli: Cli, function: Server) -> None:
    """From a pipe, from an argument, from a file, with headers."""
    assert (await cli("invoke", "upper", stdin=b"piped")).out == "PIPED"
    assert (await cli("invoke", "upper", "--data", "-", stdin=b"dash\n")).out == "DASH\n"
    assert (await cli("invoke", "upper", "--data", "@-", stdin=b"at\n")).out == "AT\n"
    assert (await cli("invoke", "upper", "--data", "told", stdin=b"piped")).out == "TOLD"
    assert (await cli("invoke", "upper", "--data", f"@{cli.gateway.config}")).out.upper().startswith('["GATEWAY')
    await cli("invoke", "it/path?q=%2F", "-H", "X-One: 1", "-H", "Content-Type:text/x", "--data", "body")
    (seen,) = function.requests
    assert (seen.method, seen.target, seen.body) == ("POST", "/path?q=%2F", b"body")
    assert (seen.headers["X-One"], seen.headers["Content-Type"]) == ("1", "text/x")


async def test_invoke_async_prints_the_id_that_the_other_commands_take(cli: Cli) -> None:
    """`invoke --async` in a script, then `calls show --wait` and `calls log` with what it printed."""
    call_id = await cli.out("invoke", "upper", "--async", "--data", "hello")
    record = json.loads(await cli.out("calls", "show", call_id, "--wait"))
    assert (record["call_id"], record["status"]) == (call_id, "success")
    assert await cli.out("calls", "log", call_id) == "HELLO"
    assert list(json.loads(await cli.out("invoke", "upper", "--async", "--json", "--data", ""))) == ["call_id"]


async def test_invoke_wait_gives_the_output_and_a_code_for_scripts(cli: Cli, function: Server) -> None:
    """0 and the output when the call did well; 1, with the reason on standard error, when it did not."""
    assert await cli.out("invoke", "upper", "--wait", "--data", "hello") == "HELLO"
    assert await cli.out("invoke", "upper", "--async", "--wait", "--data", "hello") == "HELLO"
    function.behaviour = answer(500, b"what it wrote")
    result = await cli("invoke", "it", "--wait", "--data", "", code=1)
    assert result.out == "what it wrote"
    assert "ended in error" in result.err
    assert "answered 500" in result.err


async def test_invoke_fails_when_the_function_does(cli: Cli, function: Server) -> None:
    """One line on standard error, nothing on standard output, exit code 1."""
    function.behaviour = answer(418, b"short and stout")
    for words, said in (("it", "short and stout"), ("nosuch", "no such function")):
        result = await cli("invoke", words, "--data", "", code=1)
        assert (result.out, said in result.err, result.err.count("\n")) == ("", True, 1)
    result = await cli("invoke", "upper", "--data", "@/nonexistent", code=1)
    assert "/nonexistent" in result.err


# ---- calls -----------------------------------------------------------------------------------------------------


async def test_calls_are_listed_in_80_columns(cli: Cli, function: Server) -> None:
    """The newest first, whatever the names are; `calls` alone does the same."""
    long = await cli.gateway.submit("it", X_Call_Id="x" * 200)
    await cli.gateway.final(long)
    call_id = await cli.gateway.submit("upper", b"hello")
    await cli.gateway.final(call_id)
    header, newest, oldest = (await cli.out("calls", "list")).splitlines()
    assert header.split() == ["CALL", "ID", "STATUS", "FUNCTION", "RUN", "AGE", "TOOK"]
    assert newest.split()[:4] == [call_id, "success", "upper", "1"]
    assert oldest.split()[1:4] == ["success", "it", "1"]
    assert max(map(len, (header, newest, oldest))) <= 80
    assert (await cli.out("calls")).splitlines()[1].split()[:4] == newest.split()[:4]


async def test_calls_are_filtered_and_limited(cli: Cli, function: Server) -> None:
    """By the filters that the daemon has; more than one page when more are asked for."""
    function.behaviour = answer(500)
    ids = [await cli.gateway.submit("it") for _ in range(3)]
    good = await cli.gateway.submit("upper")
    for call_id in (*ids, good):
        await cli.gateway.final(call_id)

    async def found(*words: str) -> list[str]:
        return [call["call_id"] for call in json.loads(await cli.out("calls", "list", "--json", *words))["calls"]]

    assert await found() == [good, *ids[::-1]]
    assert await found("--status", "error") == ids[::-1]
    assert await found("--function", "upper") == [good]
    assert await found("--queue", "slow") == []
    assert await found("--limit", "2") == [good, ids[2]]
    assert await found("--limit", "2000") == [good, *ids[::-1]]


async def test_watch_tells_of_calls_as_they_change(cli: Cli, function: Server) -> None:
    """A line for each state that was seen, until somebody has enough; in JSON with --json."""
    function.behaviour = gate = Gate()
    call_id = await cli.gateway.submit("it")
    await function.wait_for(1)
    words = ("calls", "list", "--watch", "--json", "--url", cli.gateway.url)
    watch = await start_program(*words, stdout=PIPE)
    assert watch.stdout is not None

    async def told(status: str) -> None:
        assert watch.stdout is not None
        while json.loads(line := await watch.stdout.readline())["status"] != status:
            pass
        assert json.loads(line)["call_id"] == call_id

    async with asyncio.timeout(30):
        await told("running")
        gate.open()
        await told("success")
        watch.send_signal(signal.SIGINT)
        assert await watch.wait() == 130


async def test_calls_are_cancelled_and_run_again_by_id(cli: Cli, function: Server) -> None:
    """Those named, or read from standard input; printed when done."""
    function.behaviour = gate = Gate()
    ids = [await cli.gateway.submit("it", X_Call_Id=name) for name in ("a/b", "c")]
    await function.wait_for(2)
    assert await cli.out("calls", "cancel", *ids) == "a/b\nc"
    assert [(await cli.gateway.final(call_id))["status"] for call_id in ids] == ["cancelled"] * 2
    gate.open()
    assert await cli.out("calls", "retry", "-", stdin=b"a/b c\n") == "a/b\nc"
    assert [(await cli.gateway.final(call_id))["status"] for call_id in ids] == ["success"] * 2


async def test_what_can_not_be_cancelled_is_told_and_the_others_are(cli: Cli, function: Server) -> None:
    """One unknown and one finished call don't keep the third from its end; the exit code is 1."""
    done = await cli.gateway.submit("upper")
    await cli.gateway.final(done)
    function.behaviour = Gate()
    runs = await cli.gateway.submit("it")
    result = await cli("calls", "cancel", "nosuch", done, runs, code=1)
    assert result.out == f"{runs}\n"
    assert [line.partition(":")[0] for line in result.err.splitlines()] == ["nosuch", done, "faasd-async"]
    assert (await cli.gateway.final(runs))["status"] == "cancelled"


async def test_calls_are_run_again_by_filter(cli: Cli, function: Server) -> None:
    """All that failed, of one function, and no other."""
    function.behaviour = answer(500)
    failed = [await cli.gateway.submit("it") for _ in range(3)]
    good = await cli.gateway.submit("upper")
    for call_id in (*failed, good):
        await cli.gateway.final(call_id)
    function.behaviour = answer(200)
    printed = await cli.out("calls", "retry", "--status", "error", "--function", "it")
    assert printed == "3 of 3 matching calls queued again"
    assert [(await cli.gateway.final(call_id))["status"] for call_id in failed] == ["success"] * 3
    for action in ("retry", "cancel"):
        for words in ((), (good, "--status", "error")):
            assert "--status" in (await cli("calls", action, *words, code=1)).err


# ---- queues ----------------------------------------------------------------------------------------------------


async def test_queues_are_listed_paused_resumed_and_purged(cli: Cli, function: Server) -> None:
    """As the daemon has them, in 80 columns."""
    await cli("queues", "pause", "faas-request")
    call_id = await cli.gateway.submit("it")
    table = await cli.out("queues")
    assert max(map(len, table.splitlines())) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    assert list(rows) == ["QUEUE", "faas-request", "slow", "@callbacks"]
    assert (rows["faas-request"][0], rows["faas-request"][-1]) == ("1", "paused")
    listed = json.loads(await cli.out("queues", "list", "--json"))["queues"]
    assert {queue["name"]: queue.get("paused") for queue in listed}["faas-request"] is True
    assert json.loads(await cli.out("queues", "purge", "faas-request"))["cancelled"] == 1
    await cli("queues", "resume", "faas-request")
    assert (await cli.gateway.final(call_id))["status"] == "cancelled"
    assert "faas-request" in (await cli("queues", "pause", "nosuch", code=1)).err


# ---- finding the daemon, and exit codes ------------------------------------------------------------------------


async def test_the_configuration_says_where_the_daemon_is(daemon: StartDaemon, tmp_path: Path) -> None:
    """Its first address, a socket file too, with the credentials of [auth]; flags win."""
    user, password = tmp_path / "user", tmp_path / "password"
    user.write_text("admin\n")
    password.write_text("secret:with%\n")
    socket = tmp_path / "socket"
    gateway = await daemon(
        f'{UPPER}[gateway]\nlisten = ["127.0.0.1:0", "unix:{socket}"]\n'
        f'[auth]\nuser_file = "{user}"\npassword_file = "{password}"'
    )

    async def queues(*words: str | Path) -> Finished:
        result = await faasd("queues", *words)
        assert "secret" not in result.err
        return result

    other = tmp_path / "client.toml"
    other.write_text(gateway.config.read_text().replace('"127.0.0.1:0", ', ""))
    assert "faas-request" in (await queues("--config", other)).out
    assert (await queues("--url", gateway.url)).code == 77
    assert (await queues("--url", f"unix:{socket}", "--user-file", user, "--password-file", password)).code == 0
    assert (await queues("--url", gateway.url.replace("//", "//admin:secret%3Awith%25@"))).code == 0
    assert (await queues("--url", gateway.url.replace("//", "//admin:secret-not-this@"))).code == 77
    assert (await queues("--user-file", user)).code == 78


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "unix:/nonexistent", "http://127.0.0.1:port", "nonsense"])
async def test_no_daemon_is_told_in_one_line(url: str) -> None:
    """With an exit code of its own, 69, whatever is wrong with the address."""
    result = await faasd("calls", "list", "--url", url)
    assert (result.code, result.out, result.err.count("\n")) == (69, "", 1)


async def test_a_full_queue_is_worth_another_try(daemon: StartDaemon, function: Server) -> None:
    """Exit code 75, as sysexits.h has it."""
    function.behaviour = Gate()
    gateway = await daemon(
        f'[functions.it]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 1\nmax_pending = 1\n'
        '[gateway]\ndrain_timeout = "0s"'
    )
    cli = Cli(gateway)
    await cli("invoke", "it", "--async")
    await function.wait_for(1)
    await cli("invoke", "it", "--async")
    assert "full" in (await cli("invoke", "it", "--async", code=75)).err


async def test_usage_errors_have_the_usual_code(cli: Cli) -> None:
    """2, and a line that names what was wrong."""
    assert "nosuch" in (await cli("calls", "list", "--status", "nosuch", code=2)).err
    assert "ID" in (await cli("calls", "show", code=2)).err


async def test_a_reader_that_has_seen_enough_is_no_error_message(cli: Cli) -> None:
    """As in `faasd-async calls list | head -1`."""
    await cli.gateway.submit("upper")
    reader, writer = os.pipe()
    os.close(reader)
    words = ("calls", "list", "--url", cli.gateway.url)
    process = await start_program(*words, stdout=writer, stderr=PIPE)
    os.close(writer)
    _, err = await process.communicate()
    assert (process.returncode, err) == (1, b"")


@pytest.mark.parametrize("words", [(), ("calls",), ("calls", "retry"), ("queues", "pause"), ("invoke",)])
async def test_help_is_the_manual(words: tuple[str, ...]) -> None:
    """Every command explains itself, with the exit codes, in 80 columns."""
    result = await faasd(*words, "--help", env={"COLUMNS": "80"})
    assert (result.code, result.err) == (0, "")
    assert "Exit codes" in result.out
    assert max(map(len, result.out.splitlines())) <= 80
