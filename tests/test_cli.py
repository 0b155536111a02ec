"""The command line as a client: what a person or a script at a shell sees of a running daemon."""

import asyncio
import contextlib
import errno
import json
import os
import re
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import pytest
from conftest import (
    DEVNULL,
    PATIENCE,
    PIPE,
    Daemon,
    Faults,
    Finished,
    Gate,
    Server,
    StartDaemon,
    answer,
    faasd,
    namespaces,
    run,
    start_program,
    to_toml,
)
from jetstream import Certificate, make_certificate

from faasd_async import COMMANDS, GROUPS, OPTIONS

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
    few = "[retry]\nattempts = 1\n[callback]\nattempts = 2\n"
    return Cli(await daemon(f'{UPPER}[functions.it]\nurl = "{function.url}"\n{few}[queues.slow]'))


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


async def test_what_is_no_utf_8_is_sent_as_it_was_typed(cli: Cli, function: Server) -> None:
    """A file's name in Latin-1, or a key: also from standard input. Nobody sees a traceback."""
    word = os.fsdecode(b"caf\xe9")
    await cli("invoke", f"it/{word}?q={word}", "-H", f"X-One: {word}", "--data", word)
    (seen,) = function.requests
    assert (seen.target, seen.body) == ("/caf%E9?q=caf%E9", b"caf\xe9")
    assert dict(seen.raw_headers)[b"X-One"] == b"caf\xe9"
    for words in (
        ("calls", "show", word),
        ("calls", "log", word),
        ("calls", "cancel", word),
        ("queues", "pause", word),
        ("schedules", "run", word),
        ("invoke", word, "--data", ""),
    ):
        result = await cli(*words, code=1)
        assert (result.out, result.err != "") == ("", True)
    assert (await cli("calls", "list", "--function", word)).out.startswith("no calls")
    result = await cli("calls", "retry", "-", stdin=b"caf\xe9\n", code=1)
    assert "no call with this id" in result.err


async def test_invoke_async_prints_the_id_that_the_other_commands_take(cli: Cli) -> None:
    """`invoke --async` in a script, then `calls show --wait` and `calls log` with what it printed."""
    call_id = await cli.out("invoke", "upper", "--async", "--data", "hello")
    record = json.loads(await cli.out("calls", "show", call_id, "--wait", "--json"))
    assert (record["call_id"], record["status"]) == (call_id, "success")
    assert await cli.out("calls", "log", call_id) == "HELLO"
    assert list(json.loads(await cli.out("invoke", "upper", "--async", "--json", "--data", ""))) == ["call_id"]


async def test_invoke_wait_gives_the_output_and_a_code_for_scripts(cli: Cli, function: Server) -> None:
    """0 and the output when the call did well; 1, with the reason on standard error, when it did not."""
    assert await cli.out("invoke", "upper", "--wait", "--data", "hello") == "HELLO"
    assert await cli.out("invoke", "upper", "--async", "--wait", "--data", "hello") == "HELLO"
    document = json.loads(await cli.out("invoke", "upper", "--wait", "--json", "--data", "hello"))
    assert (document["status"], document["output"]) == ("success", "HELLO")
    assert json.loads(await cli.out("invoke", "upper", "--json", "--data", "hello")) == {"output": "HELLO"}
    function.behaviour = answer(500, b"what it wrote")
    result = await cli("invoke", "it", "--wait", "--data", "", code=1)
    assert result.out == "what it wrote"
    assert "ended in error" in result.err
    assert "answered 500" in result.err


async def test_show_waits_for_the_end_and_has_a_code_for_scripts(cli: Cli, function: Server) -> None:
    """With --wait 1 for a call that did not do well, with its record all the same; without, 0 for any record."""
    function.behaviour = answer(500, b"what it wrote")
    failed = await cli.out("invoke", "it", "--async", "--data", "")
    for options in ((), ("--json",)):
        result = await cli("calls", "show", failed, "--wait", *options, code=1)
        assert failed in result.out
        assert result.err == f"faasd-async: call {failed} ended in error: function it answered 500\n"
        assert failed in await cli.out("calls", "show", failed, *options)
    cancelled = await cli.out("invoke", "it", "--async", "--data", "", "-H", "X-Delay: 1h")
    await cli("calls", "cancel", cancelled)
    result = await cli("calls", "show", cancelled, "--wait", code=1)
    assert result.err == f"faasd-async: call {cancelled} ended in cancelled\n"


@pytest.mark.parametrize("command", ["show", "log", "result", "request", "cancel", "retry", "resend"])
async def test_an_empty_id_is_a_mistake_and_no_call(cli: Cli, command: str) -> None:
    """A script's variable that is not set: one line, and nothing is done for the only call that there is."""
    waiting = await cli.out("invoke", "upper", "--async", "--data", "", "-H", "X-Delay: 1h")
    result = await cli("calls", command, "", code=2)
    assert (result.out, result.err) == ("", "faasd-async: the call id is empty\n")
    assert (await cli.gateway.record(waiting))["status"] == "delayed"


async def test_what_a_program_writes_comes_out_where_it_wrote_it(cli: Cli) -> None:
    """Its answer on standard output, its stderr on ours, and both in the document; a part is no success."""
    script = "cat; echo trouble >&2; printf more >&2"
    configured = cli.gateway.settings | {"functions": {"program": {"command": ["sh", "-c", script]}}}
    cli.gateway.configure(to_toml(configured | {"calls": {"keep_output": 1000}}))
    cli.gateway.signal(signal.SIGHUP)
    await cli.gateway.wait_for_log("configuration reloaded")
    result = await cli("invoke", "program", "--wait", "-d", "hello")
    assert (result.out, result.err) == ("hello", "trouble\nmore\n")
    document = json.loads(await cli.out("invoke", "program", "--wait", "--json", "-d", "hello"))
    assert (document["output"], document["stderr"]) == ("hello", "trouble\nmore")
    result = await cli("invoke", "program", "--wait", "-d", "x" * 5000, code=1)
    assert result.out.startswith("xxx")
    assert "the answer had 5000 bytes" in result.err


async def at_a_terminal(*words: str) -> str:
    """What `faasd-async` shows at a terminal, on standard output and error."""
    ours, theirs = os.openpty()
    process = await start_program(*words, stdin=DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed.
        while piece := await asyncio.to_thread(os.read, ours, 4096):
            shown += piece
    os.close(ours)
    await asyncio.wait_for(process.wait(), PATIENCE)
    return shown.decode().replace("\r\n", "\n")


ODD = b"\x1b]0;title\x07 \x1b[31mred\x1b[0m \xc2\x9b2J \xff tab\there, a bell\x07\r\n\xe2\x82\xac over\rwritten\n"
SHOWN = "^[]0;title^G ^[[31mred^[[0m <U+009B>2J \ufffd tab\there, a bell^G\n\u20ac over^Mwritten\n"


async def test_a_terminal_is_shown_what_it_would_obey(cli: Cli, function: Server) -> None:
    """What a function answers can't set a terminal's title or colours, nor wipe it; a pipe gets the bytes."""
    function.behaviour = answer(body=ODD)
    call_id = await cli.out("invoke", "it", "--async")
    await cli.gateway.final(call_id)
    for words in (
        ("calls", "log", call_id),
        ("calls", "result", call_id),
        ("invoke", "it"),
        ("invoke", "it", "--wait"),
    ):
        assert await at_a_terminal(*words, "--url", cli.gateway.url) == SHOWN, words
        process = await start_program(*words, "--url", cli.gateway.url, stdin=DEVNULL, stdout=PIPE)
        assert (await process.communicate())[0] == ODD, words
    shown = await at_a_terminal("calls", "show", call_id, "--url", cli.gateway.url)
    assert "\x1b" not in shown
    assert "^[[31mred" in shown
    function.behaviour = answer(400, ODD)
    shown = await at_a_terminal("invoke", "it", "--url", cli.gateway.url)
    assert shown.startswith("faasd-async: ^[]0;title^G"), shown


async def test_invoke_fails_when_the_function_does(cli: Cli, function: Server) -> None:
    """One line on standard error, nothing on standard output, exit code 1."""
    function.behaviour = answer(418, b"short and stout")
    for words, said in (("it", "short and stout"), ("nosuch", "no function nosuch (there are it, upper)")):
        result = await cli("invoke", words, "--data", "", code=1)
        assert (result.out, said in result.err, result.err.count("\n")) == ("", True, 1)
    result = await cli("invoke", "upper", "--data", "@/nonexistent", code=1)
    assert "/nonexistent" in result.err


async def test_a_function_that_is_almost_named_is_found(cli: Cli, function: Server) -> None:
    """The name that was meant is in the line, whichever way it is called; what a function says of itself stays."""
    for words in (("uper",), ("uper/path?q=1",), ("uper", "--async"), ("uper.openfaas-fn", "--wait")):
        result = await cli("invoke", *words, "--data", "", code=1)
        assert result.err == "faasd-async: no function uper (did you mean upper?)\n"
    assert "no function my func (" in (await cli("invoke", "my func", "--data", "", code=1)).err
    assert (
        await cli.out("calls", "list", "--function", "uper") == "no calls, and no function uper (did you mean upper?)"
    )
    assert await cli.out("calls", "list", "--function", "upper") == "no calls"
    function.behaviour = answer(404, b"no such page")
    assert (await cli("invoke", "it", "--data", "", code=1)).err == "faasd-async: no such page\n"


async def test_headers_are_sent_as_they_are_written(cli: Cli, function: Server) -> None:
    """Repeated ones too; what is none is a line, and nothing is sent."""
    words = ("-H", "X-One: 1", "-H", "X-One:2", "-H", "X-Name:  Jürgen ", "-H", "User-Agent: me", "-H", "X-None:")
    await cli("invoke", "it", "--data", "", *words)
    (seen,) = function.requests
    assert seen.headers.getall("X-One") == ["1", "2"]
    assert seen.headers["X-Name"].encode("latin-1").decode() == "Jürgen"
    assert (seen.headers["User-Agent"], seen.headers["X-None"]) == ("me", "")
    for wrong in ("nothing", ": x", "a b: x", "X: a\nY: b"):
        result = await cli("invoke", "it", "--data", "", "-H", wrong, code=2)
        assert "NAME: VALUE" in result.err
        assert result.err.count("\n") == 1
    assert len(function.requests) == 1


# ---- calls -----------------------------------------------------------------------------------------------------


async def test_calls_are_listed_in_80_columns(cli: Cli, function: Server) -> None:
    """The newest first, whatever the names are, with what went wrong; `calls` and `call` alone do the same."""
    function.behaviour = answer(500, b"out of order")
    long = await cli.gateway.submit("it", X_Call_Id="x" * 200, X_Callback_Url=f"{function.url}/unable")
    await cli.gateway.final(long)
    call_id = await cli.gateway.submit("upper", b"hello")
    await cli.gateway.final(call_id)
    header, newest, oldest = (await cli.out("calls", "list")).splitlines()
    assert header.split() == ["ID", "STATUS", "FUNCTION", "RUN", "AGE", "TOOK", "ERROR,", "CALLBACK"]
    assert newest.split()[:4] == [call_id[:18], "success", "upper", "1"]
    assert oldest.split()[1:4] == ["error", "it", "1"]
    assert "answered 500" in oldest
    assert max(map(len, (header, newest, oldest))) <= 80
    for words in (("calls",), ("call",), ("call", "list")):
        assert (await cli.out(*words)).splitlines()[1].split()[:4] == newest.split()[:4]
    wide = await faasd("calls", "--url", cli.gateway.url, env={"COLUMNS": "200"})
    assert "answered 500; callback failed: the callback URL answered 500" in wide.out.splitlines()[2]


async def test_the_long_list_has_times_and_whole_names(cli: Cli, function: Server) -> None:
    """By this machine's clock, and not cut."""
    long = await cli.gateway.submit("it", X_Call_Id="x" * 200)
    record = await cli.gateway.final(long)
    _, row = (await cli.out("calls", "--long")).splitlines()
    created = datetime.fromisoformat(record["created_at"]).astimezone()
    assert f"{created:%Y-%m-%d %H:%M:%S}" in row
    assert row.startswith(f"{record['id']}  success    it                faas-request    1/1")
    assert row.endswith(f"call id {'x' * 200}")


async def test_the_end_of_the_list_says_that_there_is_more(cli: Cli) -> None:
    """And how to see it; in JSON, where it goes on."""
    for _ in range(3):
        await cli.gateway.final(await cli.gateway.submit("upper"))
    assert (await cli.out("calls", "--limit", "2")).splitlines()[3:] == ["more … (--limit 4 shows twice as many)"]
    assert json.loads(await cli.out("calls", "--limit", "2", "--json"))["next_cursor"]
    assert len((await cli.out("calls", "--limit", "3")).splitlines()) == 4


async def test_calls_are_filtered_and_limited(cli: Cli, function: Server) -> None:
    """By the filters that the daemon has; more than one page when more are asked for."""
    function.behaviour = answer(500)
    ids = [await cli.gateway.submit("it")]
    middle = f"{time.time():.6f}"
    ids += [await cli.gateway.submit("it") for _ in range(2)]
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
    assert await found("--status", "error,success") == [good, *ids[::-1]]
    assert await found("--status", "error", "--status", "success", "--callback", "none") == [good, *ids[::-1]]
    assert await found("--callback", "failed") == []
    assert await found("--since", middle) == [good, *ids[:0:-1]]
    assert await found("--until", middle) == ids[:1]
    assert await found("--since", "today" if datetime.now().hour else "1h") == [good, *ids[::-1]]
    assert await found("--since", "24h", "--until", "1h") == []


async def test_a_call_is_shown_for_people(cli: Cli, function: Server) -> None:
    """What it was, what became of it and when, and the end of what it said; nothing that is not there."""
    function.behaviour = answer(500, b"".join(b"line %d\n" % n for n in range(30)))
    call_id = await cli.gateway.submit("it", b"12345", X_Call_Id="mine", X_Callback_Url=f"{function.url}/unable")
    record = await cli.gateway.final(call_id)
    head, _, tail = (await cli.out("calls", "show", "mine")).partition("\n\n")
    shown = {line[:10].strip(): line[12:] for line in head.splitlines()}
    assert {name: shown[name] for name in ("id", "call id", "function", "status", "request")} == {
        "id": record["id"],
        "call id": "mine",
        "function": "it.openfaas-fn",
        "status": "error",
        "request": "5 B",
    }
    assert "answered 500" in shown["error"]
    assert shown["runs"] == "1 of 1 at most"
    assert shown["answer"].startswith("500, ")
    assert shown["callback"].startswith(f"{function.url}/unable  failed after ")
    assert tail.splitlines()[0] == f"… 10 lines more: faasd-async calls log {record['id']}"
    assert tail.splitlines()[1:] == [f"line {n}" for n in range(10, 30)]
    quiet = await cli.gateway.submit("upper")
    await cli.gateway.final(quiet)
    assert {line[:10].strip() for line in (await cli.out("calls", "show", quiet)).splitlines()} == {
        *("id", "function", "queue", "status", "runs", "created", "started", "ended", "request", "answer")
    }


async def test_a_log_is_followed_to_its_end(cli: Cli, tmp_path: Path) -> None:
    """What the function writes is printed while it runs."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    script = f"echo first; read line < {gate}; echo $line"
    configured = cli.gateway.settings | {"functions": {"slow": {"command": ["sh", "-c", script]}}}
    cli.gateway.configure(to_toml(configured))
    cli.gateway.signal(signal.SIGHUP)
    await cli.gateway.wait_for_log("configuration reloaded")
    call_id = await cli.gateway.submit("slow")
    follow = await start_program("calls", "log", "-f", call_id, "--url", cli.gateway.url, stdout=PIPE)
    assert follow.stdout is not None
    async with asyncio.timeout(30):
        assert await follow.stdout.readline() == b"first\n"
        await asyncio.to_thread(gate.write_text, "second\n")
        assert await follow.stdout.read() == b"second\n"
        assert await follow.wait() == 0


async def test_one_half_of_a_log_is_printed_alone(cli: Cli) -> None:
    """As the daemon has it; while a call runs, both come as they are written, and can't be told apart."""
    configured = cli.gateway.settings | {"functions": {"both": {"command": ["sh", "-c", "echo out; echo err >&2"]}}}
    cli.gateway.configure(to_toml(configured))
    cli.gateway.signal(signal.SIGHUP)
    await cli.gateway.wait_for_log("configuration reloaded")
    call_id = await cli.gateway.submit("both")
    await cli.gateway.final(call_id)
    for stream, written in (("stdout", "out"), ("stderr", "err")):
        assert await cli.out("calls", "log", call_id, "--stream", stream) == written
        refused = await cli("calls", "log", call_id, "--stream", stream, "--follow", code=1)
        assert "stdout and stderr together" in refused.err
    assert "invalid choice" in (await cli("calls", "log", call_id, "--stream", "stdin", code=2)).err


async def test_what_a_call_asked_and_got_is_printed_byte_for_byte(cli: Cli, function: Server) -> None:
    """So that it can be piped on; its headers are a document without secrets."""
    function.behaviour = answer(200, bytes(range(256)), Content_Type="image/x")
    call_id = await cli.gateway.submit("it/path?q=1", b"\r\nasked\n", Authorization="Bearer s3cret", X_One="1")
    await cli.gateway.final(call_id)
    arguments = ("--url", cli.gateway.url)
    process = await start_program("calls", "result", call_id, *arguments, stdout=PIPE)
    assert (await process.communicate())[0] == bytes(range(256))
    assert (await cli("calls", "request", call_id)).out == "\r\nasked\n"
    document = json.loads(await cli.out("calls", "request", call_id, "--json"))
    assert (document["method"], document["target"]) == ("POST", "/path?q=1")
    headers = {name.lower(): value for name, value in document["headers"]}
    assert (headers["x-one"], headers["authorization"]) == ("1", "***")
    function.behaviour = answer(500)
    failed = await cli.gateway.submit("it")
    await cli.gateway.final(failed)
    assert "there is no answer" in (await cli("calls", "result", failed, code=1)).err


async def test_a_call_is_found_by_how_its_id_begins(cli: Cli) -> None:
    """If no other begins like that; the list shows enough of it."""
    first, second = [await cli.gateway.submit("upper", body) for body in (b"one", b"two")]
    for call_id in (first, second):
        await cli.gateway.final(call_id)
    short = (await cli.out("calls")).splitlines()[1].split()[0]
    assert second.startswith(short)
    assert await cli.out("calls", "log", short) == "TWO"
    assert (await cli.out("calls", "show", first[:20])).split()[1] == first
    assert await cli.out("calls", "retry", first[:30]) == first
    assert "2 calls begin like that" in (await cli("calls", "log", first[:6], code=1)).err
    assert "none whose id begins like that" in (await cli("calls", "log", "0123456789ab", code=1)).err
    own = await cli.gateway.submit("upper", b"own", X_Call_Id=first[:12])
    await cli.gateway.final(own)
    assert await cli.out("calls", "log", own) == "OWN"


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
            assert "--status" in (await cli("calls", action, *words, code=2)).err


# ---- queues ----------------------------------------------------------------------------------------------------


async def test_queues_are_listed_paused_resumed_and_purged(cli: Cli, function: Server) -> None:
    """As the daemon has them, in 80 columns, with their rates and those of their functions."""
    rates = '[queues.slow]\nrate = "90/1m"\n[functions.seldom]\nurl = "http://x"\nrate = "1/2h"'
    cli.gateway.configure(f'{UPPER}[functions.it]\nurl = "{function.url}"\n{rates}')
    cli.gateway.signal(signal.SIGHUP)
    await cli.gateway.wait_for_log("configuration reloaded")
    assert await cli.out("queues", "pause", "faas-request") == "faas-request: paused"
    call_id = await cli.gateway.submit("it")
    table = await cli.out("queues")
    assert max(map(len, table.splitlines())) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    assert list(rows) == ["QUEUE", "faas-request", "seldom.openfaas-fn", "slow", "@callbacks"]
    assert (rows["faas-request"][0], rows["faas-request"][-1]) == ("1", "paused")
    assert (rows["slow"][3], rows["seldom.openfaas-fn"]) == ("90/1m", ["0", "1/2h"])
    listed = json.loads(await cli.out("queues", "list", "--json"))["queues"]
    assert {queue["name"]: queue.get("paused") for queue in listed}["faas-request"] is True
    shown = [(queue["rate"], queue["function_rates"]) for queue in listed[:2]]
    assert shown == [(None, {"seldom.openfaas-fn": "1/2h"}), ("90/1m", {})]
    assert await cli.out("queues", "purge", "faas-request") == "faas-request: 1 call cancelled"
    assert json.loads(await cli.out("queues", "purge", "faas-request", "--json"))["cancelled"] == 0
    assert await cli.out("queues", "resume", "faas-request") == "faas-request: resumed"
    assert (await cli.gateway.final(call_id))["status"] == "cancelled"
    assert "faas-request" in (await cli("queues", "pause", "nosuch", code=1)).err


# ---- the whole daemon ------------------------------------------------------------------------------------------


async def test_the_status_is_one_screen_and_an_exit_code(cli: Cli, function: Server) -> None:
    """0 when all is well; 1 when something needs somebody, with the command to type next."""
    good = await cli.gateway.submit("upper", b"hello")
    await cli.gateway.final(good)
    screen = await cli.out("status")
    lines = screen.splitlines()
    assert (len(lines) <= 24, max(map(len, lines)) <= 80 + len(str(cli.gateway.store))) == (True, True)
    shown = {line[:10].strip(): line[12:] for line in lines}
    assert "1 success, 0 error" in screen
    assert shown["guarantee"] == "a call is on disk before its 202"
    assert shown["store"].startswith(str(cli.gateway.store))
    assert lines[-1] == "All is well."
    function.behaviour = answer(500)
    failed = await cli.gateway.submit("it", X_Callback_Url=f"{function.url}/unable")
    await cli.gateway.final(failed)
    assert (await cli.out("status")).splitlines()[-3:] == [
        "- 1 call failed: faasd-async calls --status error,timeout",
        "- 1 callback could not be delivered: faasd-async calls --callback failed",
        "All is well.",
    ]
    await cli("queues", "pause", "slow")
    paused = (await cli("status", code=1)).out
    assert "! queue slow is paused: faasd-async queues resume slow\n" in paused
    assert "All is well" not in paused
    document = json.loads((await cli("status", "--json", code=1)).out)
    assert document["complaints"] == ["queue slow is paused: faasd-async queues resume slow"]
    assert document["counts"]["error"] == 1


async def test_the_status_tells_of_a_full_disk(daemon: StartDaemon, function: Server, faults: Faults) -> None:
    """And of a queue that is nearly full."""
    function.behaviour = Gate()
    settings = f'[functions.it]\nurl = "{function.url}"\n[queues.faas-request]\nmax_inflight = 1\nmax_pending = 1'
    cli = Cli(await daemon(settings + '\n[gateway]\ndrain_timeout = "0s"', env=faults.env))
    for _ in range(2):
        await cli("invoke", "it", "--async", "--data", "")
        await function.wait_for(1)
    assert "! queue faas-request is nearly full: 1 of 1 wait\n" in (await cli("status", code=1)).out
    with faults("w", errno.ENOSPC):
        await cli("calls", "retry", "nosuch", code=1)
        assert "disk" in (await cli("queues", "pause", "faas-request", code=75)).err
        assert "! no calls are accepted: " in (await cli("status", code=1)).out


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
    half = await queues("--user-file", user)
    assert (half.code, half.err) == (78, "auth: user_file needs password_file\n")


@pytest.mark.parametrize("form", ["{}", "http://{}", "http://{}/ui/#calls", "{}/", ":{port}", "{port}", "*:{port}"])
async def test_the_daemon_is_found_in_every_form_that_people_write(cli: Cli, form: str) -> None:
    """As a flag, and as a variable."""
    server = cli.gateway.url.removeprefix("http://")
    address = form.format(server, port=server.rpartition(":")[2])
    assert (await faasd("queues", "--url", address)).code == 0
    assert (await faasd("queues", env={"FAASD_ASYNC_URL": address})).code == 0


@contextlib.asynccontextmanager
async def tls_in_front(url: str, certificate: Certificate) -> AsyncIterator[str]:
    """A proxy that speaks TLS for a daemon; its URL."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            while data := await reader.read(2**16):
                writer.write(data)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        await asyncio.gather(copy(reader, behind[1]), copy(behind[0], writer))

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield f"https://localhost:{server.sockets[0].getsockname()[1]}"


async def test_a_daemon_is_found_behind_a_proxy_that_speaks_tls(cli: Cli, tmp_path: Path) -> None:
    """As with Caddy or nginx in front; the certificate is checked, and what is wrong is said."""
    authority = await make_certificate(tmp_path, "authority")
    certificate = await make_certificate(tmp_path, "proxy", authority)
    trust = {"SSL_CERT_FILE": str(authority.certificate)}
    async with tls_in_front(cli.gateway.url, certificate) as url:
        done = await faasd("invoke", "upper", "--url", url, stdin=b"hi", env=trust)
        assert (done.code, done.out) == (0, "HI"), done.err
        assert (await faasd("calls", "--url", f"{url}/ui/#calls", env=trust)).code == 0
        done = await faasd("queues", "--url", url)
        assert (done.code, done.err.count("\n")) == (69, 1)
        assert "its certificate is not accepted: unable to get local issuer certificate" in done.err
    done = await faasd("queues", "--url", cli.gateway.url.replace("http:", "https:"))
    assert (done.code, done.err.endswith("can't be reached: it does not speak TLS\n")) == (69, True), done.err
    done = await faasd("queues", "--url", url)
    assert (done.code, done.err.endswith("can't be reached: Connection refused\n")) == (69, True), done.err


async def test_a_redirect_is_told_and_not_followed(function: Server) -> None:
    """A proxy may want https: the body of a POST would be lost on the way."""
    place = "https://functions.example/system/queues"
    function.behaviour = answer(308, b"<html>", Location=place)
    done = await faasd("queues", "--url", function.url)
    told = f"faasd-async: {function.url} answered 308 Permanent Redirect, which leads to {place}\n"
    assert (done.code, done.err) == (1, told)


async def test_the_configuration_is_found_by_itself(cli: Cli, tmp_path: Path) -> None:
    """The variable's before the user's, and that before the system's; a broken one says which it is."""
    user, system, named = tmp_path / "user/faasd-async", tmp_path / "etc/faasd-async", tmp_path / "named.toml"
    for folder in (user, system):
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(f'[gateway]\nlisten = "{cli.gateway.url}"\n[queues.{folder.parent.name}]')

    async def check(*, user: str) -> str:
        """What `check` says where this folder is /etc."""
        script = f'mount --bind {tmp_path}/etc /etc && exec "$@"'
        environment = ("env", f"XDG_CONFIG_HOME={tmp_path / user}")
        words = (*environment, sys.executable, "-m", "faasd_async", "check")
        return (await run(*namespaces("mount"), "sh", "-c", script, "sh", *words)).out

    environment = {"XDG_CONFIG_HOME": str(tmp_path / "user")}
    assert (await faasd("queues", env=environment)).code == 0
    assert await check(user="user") == f"{user}/config.toml: ok, 0 functions, 2 queues\n"
    assert await check(user="nobody") == "/etc/faasd-async/config.toml: ok, 0 functions, 2 queues\n"
    named.write_text("[gateway]\nlistn = 1")
    for words in (("queues",), ("check",), ("serve",)):
        result = await faasd(*words, env={**environment, "FAASD_ASYNC_CONFIG": str(named)})
        assert result.code == 78
        assert result.err == f"{named}: gateway.listn: unknown key (did you mean listen?)\n"


async def test_a_client_needs_no_secret_of_the_daemons(cli: Cli, tmp_path: Path) -> None:
    """Beside `LoadCredential` only the service has some: which variable is missing is told, and flags do without."""
    secret, config = tmp_path / "secret", tmp_path / "client.toml"
    secret.write_text("secret")
    keys = [f'{key} = "${{CREDENTIALS_DIRECTORY}}/{key}"' for key in ("user_file", "password_file")]
    auth = "\n".join(["[auth]", *keys])
    gateway = f'[gateway]\nlisten = "{cli.gateway.url}"\n'
    config.write_text(f'{gateway}[callback]\nsigning_secret_file = "${{CREDENTIALS_DIRECTORY}}/x"')
    assert (await faasd("queues", "--config", config)).code == 0
    config.write_text(gateway + auth)
    refused = await faasd("queues", "--config", config)
    assert (refused.code, "CREDENTIALS_DIRECTORY is not set" in refused.err) == (78, True)
    flags = ("--user-file", secret, "--password-file", secret)
    assert (await faasd("queues", "--config", config, *flags)).code == 0


async def test_a_daemon_that_does_not_answer_is_given_up(cli: Cli, function: Server) -> None:
    """After --timeout, which counts for all that a command does."""
    function.behaviour = Gate()
    result = await cli("invoke", "it", "-d", "", "--timeout", "200ms", code=69)
    assert "no answer within --timeout" in result.err
    result = await cli("invoke", "it", "--wait", "-d", "", "--timeout", "1s", code=75)
    assert result.err == "faasd-async: the call has not ended within --timeout\n"
    (running,) = [
        line for line in (await cli.out("calls", "--watch", "--timeout", "2s")).splitlines() if "running" in line
    ]
    assert running.split()[2] == "it"
    assert "duration" in (await cli("calls", "--timeout", "5", code=2)).err


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "unix:/nonexistent", "http://127.0.0.1:port", "a b", "nonsense:"]
)
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
    for words, said in (
        (("calls", "list", "--status", "nosuch"), "'nosuch': expected one of"),
        (("calls", "list", "--since", "once"), "'once': expected an age such as"),
        (("calls", "show"), "ID"),
        (("cals",), "there is no command cals (did you mean calls"),
        (("calls", "sow", "1"), "there is no command sow (did you mean show?)"),
        (("--url", ":8080", "status"), "there is no command :8080: options stand behind their command"),
    ):
        result = await cli(*words, code=2)
        assert said in result.err
        assert result.err.count("\n") == 1


async def test_a_password_in_an_address_that_is_none_is_not_printed() -> None:
    """The address is, so that its user sees what was wrong."""
    result = await faasd("status", "--url", "ftp://us:s3cret@there")
    assert (result.code, "ftp://there: expected" in result.err, "s3cret" in result.err) == (69, True, False)


@pytest.mark.parametrize("page", [b"<html>", b"[]", b"{}", b'"calls"', b"null"])
async def test_another_program_at_the_daemons_address_is_told_apart(function: Server, page: bytes) -> None:
    """It answers all that is asked, as the page of an application does that lives in one script."""
    function.behaviour = answer(body=page)
    call = "01a21fcb-09c6-7aab-a453-ea606c41c390"
    for line in ("status", "calls", f"calls show {call}", f"calls request {call} --json", "queues", "queues pause x",
                 "schedules", "schedules next x", "schedules run x", "calls retry --status error",
                 "invoke x --async -d x", "invoke x --wait -d x"):  # fmt: skip
        if "request" in line and page == b"{}":  # which may be one
            continue
        result = await faasd(*line.split(), "--url", function.url)
        said = f"faasd-async: what answers at {function.url} is no faasd-async\n"
        assert (result.code, result.out, result.err) == (69, "", said), line


async def test_the_version_is_told() -> None:
    """In both ways to ask for it."""
    assert (await faasd("-V")).out == (await faasd("--version")).out
    assert (await faasd("-V")).out.startswith("faasd-async ")


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


# ---- the manual page and completion ----------------------------------------------------------------------------


async def test_the_manual_page_is_one_to_its_readers(tmp_path: Path) -> None:
    """groff and mandoc have nothing to say against it, and it has every command and option."""
    page = tmp_path / "faasd-async.1"
    page.write_text((await faasd("man")).out)
    checked = await run("groff", "-man", "-ww", "-z", page)
    assert (checked.code, checked.err) == (0, "")
    linted = await run("mandoc", "-Tlint", "-W", "warning", page)
    assert (linted.code, linted.out) == (0, "")
    shown = await run("mandoc", "-Tutf8", "-O", "width=500", page)
    text = re.sub(".\b", "", shown.out)  # bold is written by going back
    for command in COMMANDS:
        if command.words and command.words not in GROUPS:
            assert re.search(f"(?m)^ +{command.words}( |$)", text), command.words
    for option in OPTIONS:
        assert option.replace("/", ", ") in text or not option.startswith("-"), option


async def complete(shell: str, line: str, folder: Path) -> list[str]:
    """What a shell offers at the end of this line."""
    script = folder / "completion"
    script.write_text((await faasd("completion", shell)).out)
    words = line.split(" ")
    if shell == "bash":
        program = f"""
            source {script}
            COMP_WORDS=({line} '') COMP_CWORD={len(words)}
            _shtab_faasd_async faasd-async '' {words[-1]}
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        finished = await run("bash", "-c", program)
    else:
        finished = await run("fish", "--no-config", "-c", f"source {script}; complete -C '{line} '")
    assert finished.err == ""
    return [offer.split("\t")[0] for offer in finished.out.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "fish"])
async def test_a_shell_completes_commands_and_options(shell: str, tmp_path: Path) -> None:
    """The commands, and what they do."""
    assert {"calls", "queues", "invoke", "serve"} <= {*await complete(shell, "faasd-async", tmp_path)}
    assert {"list", "show", "retry"} <= {*await complete(shell, "faasd-async calls", tmp_path)}


async def test_zsh_takes_its_completion(tmp_path: Path) -> None:
    """As a function that it can load."""
    (tmp_path / "_faasd-async").write_text((await faasd("completion", "zsh")).out)
    program = f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -D -u; echo $_comps[faasd-async]"
    loaded = await run("zsh", "-f", "-c", program)
    assert (loaded.out, loaded.err) == ("_faasd-async\n", "")
    checked = await run("zsh", "-n", tmp_path / "_faasd-async")
    assert (checked.code, checked.err) == (0, "")


async def test_completion_says_what_it_lacks() -> None:
    """The package is an extra."""
    lacking = "import sys; sys.modules['shtab'] = None"
    process = await start_program("completion", "bash", before=lacking, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
    out, err = await process.communicate()
    assert (process.returncode, out) == (1, b"")
    assert err.decode().endswith("pip install shtab\n")
    assert "invalid choice: 'sh'" in (await faasd("completion", "sh")).err
