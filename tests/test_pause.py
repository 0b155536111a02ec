"""A daemon that was held up (a laptop that slept, a host without time for it): what came in meanwhile was in time."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web
from conftest import PATIENCE, Daemon, Gate, Request, Server, StartDaemon, connection, parse, raw

PAUSE_S = 2.0
SETTINGS = """
[gateway]
read_timeout = "1s"
upstream_timeout = "1s"
[callback]
timeout = "1s"
attempts = 1
[retry]
attempts = 1
[queues.faas-request]
timeout = "1s"
"""
HEAD = b"POST /function/quick HTTP/1.1\r\nHost: gateway.example\r\nContent-Length: 4\r\n\r\n"


@contextlib.asynccontextmanager
async def stopped(gateway: Daemon) -> AsyncIterator[None]:
    """The daemon's process stands still during the block, and for longer than any of its limits."""
    gateway.signal(signal.SIGSTOP)
    yield
    await asyncio.sleep(PAUSE_S)
    gateway.signal(signal.SIGCONT)


async def test_what_came_in_during_a_pause_was_in_time(
    daemon: StartDaemon, function: Server, sink: Server, tmp_path: Path
) -> None:
    """Answers of functions and receivers, the end of a command, the rest of a body, a request on an idle connection."""
    gate = Gate()

    async def answer(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        return await gate(request, seen) if "slow" in seen.target else web.Response(body=b"ok")

    function.behaviour = answer
    sink.behaviour = receiving = Gate()
    begun, go = tmp_path / "begun", tmp_path / "go"
    for fifo in (begun, go):
        os.mkfifo(fifo)
    gateway = await daemon(f"""{SETTINGS}
        [functions.quick]
        url = "{function.url}"
        [functions.slow]
        url = "{function.url}/slow"
        [functions.program]
        command = ["sh", "-c", "echo begun > '{begun}'; read line < '{go}'; echo done"]
    """)
    async with connection(gateway.url) as (idle, to_idle), connection(gateway.url) as (half, to_half):
        to_idle.write(HEAD + b"body")
        await idle.readuntil(b"\r\n\r\nok")
        called_back = await gateway.submit("quick", X_Callback_Url=sink.url)
        queued = await gateway.submit("slow")
        program = await gateway.submit("program")
        slow = HEAD.replace(b"quick", b"slow").replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        sync = asyncio.create_task(raw(gateway.url, slow + b"body"))
        await function.wait_for(4)
        await sink.wait_for(1)
        assert await asyncio.to_thread(begun.read_text)
        to_half.write(HEAD + b"bo")
        await to_half.drain()
        async with stopped(gateway):
            to_half.write(b"dy")
            to_idle.write(HEAD + b"body")
            gate.open()
            receiving.open()
            await asyncio.to_thread(go.write_text, "\n")
        for reader in (idle, half):
            answered = await asyncio.wait_for(reader.readuntil(b"\r\n\r\nok"), PATIENCE)
            assert parse(answered).status == 200
        assert (await sync).status == 200
    for call_id in (called_back, queued, program):
        assert (await gateway.final(call_id))["status"] == "success"
    assert (await gateway.final(called_back))["callback"]["status"] == "delivered"
