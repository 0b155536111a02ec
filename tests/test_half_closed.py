"""Clients that close their sending side once they have sent all: `printf … | nc`, simple scripts."""

import asyncio

import pytest
from aiohttp import web
from conftest import PATIENCE, Daemon, Gate, Request, Server, StartDaemon, connection

SETTINGS = '[functions.echo]\nurl = "{url}"\n[gateway]\nread_timeout = "20s"'


def post(route: str, target: str) -> bytes:
    """A request that leaves the connection open."""
    return f"POST /{route}/echo/{target} HTTP/1.1\r\nHost: gateway.example\r\nContent-Length: 2\r\n\r\nhi".encode()


@pytest.fixture
async def gateway(daemon: StartDaemon, function: Server) -> Daemon:
    """A daemon with a function that takes a moment: by its answer the client has closed."""

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        await asyncio.sleep(0.05)
        return web.Response(body=b"ok")

    function.behaviour = behaviour
    return await daemon(SETTINGS.format(url=function.url))


async def exchange(gateway: Daemon, data: bytes) -> bytes:
    """All that comes for these bytes, after which nothing more is sent."""
    async with connection(gateway.url) as (reader, writer):
        writer.write(data)
        writer.write_eof()
        return await asyncio.wait_for(reader.read(), PATIENCE)


async def test_every_request_that_was_sent_whole_is_answered(gateway: Daemon, function: Server) -> None:
    """One, or several that were sent together; then the connection is closed."""
    requests = [post("function", "1"), post("async-function", "2"), post("function", "3"), post("function", "4")]
    for number in (1, 2, 4):
        function.requests.clear()
        answers = await exchange(gateway, b"".join(requests[:number]))
        assert answers.count(b"HTTP/1.1 200 OK") + answers.count(b"HTTP/1.1 202 Accepted") == number, answers
        seen = await function.wait_for(number)
        assert sorted(request.target for request in seen) == [f"/{n}" for n in range(1, number + 1)]


async def test_a_request_that_is_not_whole_is_not_answered(gateway: Daemon, function: Server) -> None:
    """The rest will never come: nothing is queued nor called."""
    for route in ("function", "async-function"):
        assert b"HTTP/1.1 20" not in await exchange(gateway, post(route, "cut")[:-1]), route
    assert b"202" not in await exchange(gateway, b"POST /async-function/echo HTTP/1.1\r\nHost: x\r\n")
    assert function.requests == []


async def test_a_client_that_waits_for_long_is_not_taken_for_one_that_has_gone(
    daemon: StartDaemon, function: Server
) -> None:
    """It may get interim answers before its own; a client that has gone takes its call along."""
    function.behaviour = gate = Gate()
    gateway = await daemon(SETTINGS.format(url=function.url))
    async with connection(gateway.url) as (reader, writer):
        writer.write(post("function", "waits"))
        writer.write_eof()
        await function.wait_for(1)
        async with connection(gateway.url) as (_, other):
            other.write(post("function", "goes"))
            await function.wait_for(2)
        await function.until(lambda: function.running == 1, "the end of the call of the client that has gone")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        gate.open()
        answers = await asyncio.wait_for(reader.read(), PATIENCE)
    assert answers.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"").startswith(b"HTTP/1.1 200 OK")


async def test_an_answer_with_a_pause_comes_whole(daemon: StartDaemon, function: Server) -> None:
    """Whether the client is still there is tried in between, by what means nothing."""
    go_on = asyncio.Event()

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"be")
        await go_on.wait()
        await response.write(b"gun")
        return response

    function.behaviour = behaviour
    gateway = await daemon(SETTINGS.format(url=function.url))
    async with connection(gateway.url) as (reader, writer):
        writer.write(post("function", "streams"))
        writer.write_eof()
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n2\r\nbe\r\n"), PATIENCE)
        assert await asyncio.wait_for(reader.readexactly(1), PATIENCE) == b"0"  # of the next length
        go_on.set()
        rest = await asyncio.wait_for(reader.read(), PATIENCE)
    assert rest.lstrip(b"0") == b"3\r\ngun\r\n0\r\n\r\n"
