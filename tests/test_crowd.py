"""More clients than there are descriptors: they wait to be accepted, and none is cut off."""

import asyncio
import contextlib
import socket
from urllib.parse import urlsplit

from conftest import PATIENCE, StartDaemon, ask, connection, open_files, with_descriptors

ENOUGH_IN_THE_END = """
import atexit
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
atexit.register(resource.setrlimit, resource.RLIMIT_NOFILE, (hard, hard))
"""  # for what measures coverage
SOON = "faasd_async.MAKE_WAY_S = 0.05"
COMMANDS = """
    [functions.cat]
    command = ["cat"]
    [functions.slow]
    command = ["sh", "-c", "read line; echo $line"]
"""


async def test_idle_clients_make_way_and_busy_ones_do_not(daemon: StartDaemon) -> None:
    """Twenty that ask nothing, when there is room for ten, hold nobody up, and see their connections closed."""
    gateway = await daemon(COMMANDS, before=SOON)
    await ask(gateway.url, "/healthz")
    address = ("127.0.0.1", urlsplit(gateway.url).port)
    async with connection(gateway.url) as (reader, writer):
        writer.write(b"POST /function/slow HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
        with with_descriptors(gateway, 2 * (len(open_files(gateway.pid)) + 10)), contextlib.ExitStack() as stack:
            idle = [stack.enter_context(socket.create_connection(address, PATIENCE)) for _ in range(20)]
            replies = await asyncio.gather(
                *(ask(gateway.url, "/async-function/cat", method="POST", body=b"x") for _ in range(5))
            )
            assert [reply.status for reply in replies] == [202] * 5
            assert [await asyncio.to_thread(client.recv, 1) for client in idle[:10]] == [b""] * 10
            assert "clients wait to be accepted: Too many open files" in gateway.log
        writer.write(b"done\n")
        async with asyncio.timeout(PATIENCE):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_who_connects_while_no_descriptor_is_left_is_answered_later(daemon: StartDaemon) -> None:
    """Not one that is told to go away."""
    gateway = await daemon(COMMANDS, before=SOON)
    with with_descriptors(gateway, 3):
        waiting = [asyncio.create_task(ask(gateway.url, "/healthz")) for _ in range(5)]
        await gateway.wait_for_log("clients wait to be accepted")
        assert not any(task.done() for task in waiting)
    async with asyncio.timeout(PATIENCE):
        assert [(await task).status for task in waiting] == [200] * 5
    assert await gateway.terminate() == 0


async def test_without_a_descriptor_what_needs_one_is_refused_and_a_stop_ends_well(daemon: StartDaemon) -> None:
    """The words for an expression are in a file that is read when they are first asked for."""
    schedule = '[schedules.s]\nfunction = "cat"\ncron = "0 0 1 1 *"'
    gateway = await daemon(COMMANDS + schedule, before=ENOUGH_IN_THE_END)
    async with connection(gateway.url) as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        with with_descriptors(gateway, 3):
            writer.write(b"GET /system/schedules HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            rest = await asyncio.wait_for(reader.read(), PATIENCE)
            assert b"HTTP/1.1 503 " in rest, rest
            assert rest.endswith(b"this machine is short: Too many open files\n"), rest
            assert await gateway.terminate() == 0
