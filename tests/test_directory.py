"""What the daemon remembers of the provider's functions, and what it says when one stays down."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

import pytest
from aiohttp import web
from conftest import Behaviour, Daemon, Request, StartDaemon, ask, assert_refused
from provider import Deployed, Provider, credential_files, running_provider

REMEMBERED = 50  # names, in these tests; the daemon itself remembers 10,000

# What comes before the start of a daemon with a shorter memory.
FORGETFUL = f"""
assert faasd_async.MAX_SEEN == 10_000
faasd_async.MAX_SEEN = {REMEMBERED}
"""

ONE_HOUR = 'cache = "1h"'  # a look-up that is made once stays good for the rest of the test
NO_TIME = 'cache = "1ms"'  # and is made anew for the next request


class StartGateway(Protocol):
    """What the `start` fixture gives."""

    async def __call__(self, keys: str, more: str = "", *, forgetful: bool = False) -> Daemon: ...


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    """A provider with one function, `env`."""
    async with running_provider() as one:
        one.deploy("env")
        yield one


@pytest.fixture
def env(provider: Provider) -> Deployed:
    """The function that the provider has."""
    return provider.functions["openfaas-fn", "env"]


@pytest.fixture
def start(daemon: StartDaemon, provider: Provider, tmp_path: Path) -> StartGateway:
    """Start a daemon in front of the provider: `await start("keys of [provider]", "more TOML")`."""
    files = credential_files(tmp_path, "provider", provider.user, provider.password)

    async def start_gateway(keys: str, more: str = "", *, forgetful: bool = False) -> Daemon:
        before = FORGETFUL if forgetful else ""
        return await daemon(f'[provider]\nurl = "{provider.url}"\n{files}{keys}\n{more}', before=before)

    return start_gateway


# ---- unknown names -------------------------------------------------------------------------------


async def ask_for_unknown_names(gateway: Daemon, number: int, kind: str) -> None:
    """So many callers get the name of a function wrong, each in another way."""
    for one in range(number):
        reply = await ask(gateway.url, f"/function/{kind}-{one}")
        assert reply.status == 404, reply


@pytest.mark.unmeasured
@pytest.mark.parametrize("cache", [ONE_HOUR, NO_TIME], ids=["look-ups cached", "look-ups made anew"])
async def test_unknown_names_do_not_push_out_a_function_that_is_called(
    start: StartGateway, provider: Provider, env: Deployed, cache: str
) -> None:
    """With the provider away, its calls are queued, as those of all functions that are known."""
    gateway = await start(cache, forgetful=True)
    await gateway.submit("env", X_Delay="1h")
    for kind in ("first", "second", "third"):
        await ask_for_unknown_names(gateway, REMEMBERED - 2, kind)
        await gateway.submit("env", X_Delay="1h")
    await ask_for_unknown_names(gateway, REMEMBERED - 2, "last")
    await provider.stop()
    accepted = await gateway.submit("env")
    await provider.start()
    assert (await gateway.final(accepted))["status"] == "success"


async def test_a_function_that_is_called_is_looked_up_once_whatever_others_ask_for(
    start: StartGateway, provider: Provider
) -> None:
    """Within the cache time, unknown names cost a busy function nothing."""
    gateway = await start(ONE_HOUR, forgetful=True)
    for number in range(3 * REMEMBERED):
        await gateway.submit("env", X_Delay="1h")
        await ask_for_unknown_names(gateway, 1, f"unknown-{number}")
    assert len(provider.look_ups("env")) == 1


async def test_a_name_that_is_asked_for_all_the_time_is_remembered_as_unknown(
    start: StartGateway, provider: Provider
) -> None:
    """Within the cache time, the provider is asked for it once."""
    gateway = await start(ONE_HOUR, forgetful=True)
    for number in range(3 * REMEMBERED):
        for name in ("misspelt", f"other-{number}"):
            assert (await ask(gateway.url, f"/function/{name}")).status == 404
    assert len(provider.look_ups("misspelt")) == 1


async def test_names_that_nobody_asks_for_any_more_are_forgotten(start: StartGateway, provider: Provider) -> None:
    """Memory does not grow with them: after so many others the first one is looked up again."""
    gateway = await start(ONE_HOUR, forgetful=True)
    for _ in range(2):
        await ask_for_unknown_names(gateway, REMEMBERED + 1, "name")
    assert len(provider.look_ups("name-0")) == 2


# ---- a scaling that is refused -------------------------------------------------------------------


def scaling_answered(provider: Provider, status: int, body: bytes) -> Behaviour:
    """The provider's behaviour, but for requests to scale: these get this answer."""
    others = provider.server.behaviour

    async def behaviour(request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        if seen.target.startswith("/system/scale-function/"):
            return web.Response(status=status, body=body)
        return await others(request, seen)

    return behaviour


# Who waits for scale_timeout does not see the end of the test.
PATIENT = f'{ONE_HOUR}\nscale_timeout = "1h"'
REASONS = [
    (400, b"unable to resume task env: cannot resume a stopped task\n"),
    (401, b"invalid credentials"),
    (404, b"service env not found\n"),
    (500, b"containerd is not running\n"),
]


@pytest.mark.parametrize(("status", "body"), REASONS)
async def test_a_scaling_that_is_refused_is_told_at_once(
    start: StartGateway, provider: Provider, env: Deployed, status: int, body: bytes
) -> None:
    """503 with the provider's reason; the function is not looked at until scale_timeout is over."""
    env.replicas = 0
    provider.server.behaviour = scaling_answered(provider, status, body)
    gateway = await start(PATIENT)
    reply = await ask(gateway.url, "/function/env")
    assert_refused(reply, 503, "env", str(status), body.decode().strip())
    assert (len(provider.look_ups("env")), len(provider.scalings())) == (1, 1)
    assert (provider.seen("/function/"), env.requests) == ([], [])


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff one \x0b two \xc2\x85 three", b"<html>\r\n<h1>no</h1>\r\n" + b"x" * 100_000],
    ids=["nothing", "no text", "a page"],
)
async def test_whatever_the_provider_refuses_with_is_one_short_line(
    start: StartGateway, provider: Provider, env: Deployed, body: bytes
) -> None:
    """Be it nothing, no text, or a page."""
    env.replicas = 0
    provider.server.behaviour = scaling_answered(provider, 500, body)
    gateway = await start(PATIENT)
    reply = await ask(gateway.url, "/function/env")
    assert_refused(reply, 503, "env", "500")
    assert len(reply.body) < 1000


async def test_a_queued_call_whose_scaling_is_refused_is_tried_again(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """Each attempt asks once, and the record has the reason; when it is done, the call runs."""
    env.replicas, provider.scale_error = 0, "error resuming task env"
    gateway = await start(PATIENT, "[retry]\nattempts = 2")
    record = await gateway.final(await gateway.submit("env"))
    assert (record["status"], record["http_status"], record["attempts"]) == ("error", 503, 2)
    assert "error resuming task env" in record["error"]
    assert (len(provider.scalings()), env.requests, provider.misdirected) == (2, [], [])
    provider.scale_error = ""
    again = await gateway.final(await gateway.submit("env"))
    assert (again["status"], again["attempts"]) == ("success", 1)


async def test_everybody_who_waits_for_a_scaling_is_told_of_the_refusal(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """They share one request to the provider, and the next caller makes another one."""
    env.replicas, provider.scale_error = 0, "error resuming task env"
    provider.may_scale.clear()
    gateway = await start(PATIENT)
    waiting = [asyncio.create_task(ask(gateway.url, "/function/env")) for _ in range(3)]
    await provider.until(lambda: len(provider.scalings()) == 1, "the request to scale")
    for _ in range(3):  # the daemon has read what came before this
        assert (await ask(gateway.url, "/healthz")).status == 200
    provider.may_scale.set()
    for reply in await asyncio.gather(*waiting):
        assert_refused(reply, 503, "error resuming task env")
    assert len(provider.scalings()) == 1
    provider.scale_error = ""
    assert (await ask(gateway.url, "/function/env")).status == 200
    assert len(provider.scalings()) == 2


async def test_a_scaling_that_is_accepted_for_later_is_no_refusal(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """A provider may answer 202 and start the function when it has time: it is waited for."""
    env.ready.clear()
    provider.server.behaviour = scaling_answered(provider, 202, b"")
    gateway = await start(PATIENT)
    waiting = asyncio.create_task(ask(gateway.url, "/function/env"))
    await provider.until(lambda: len(provider.look_ups("env")) >= 3, "looks whether it is up")
    env.ready.set()
    assert (await waiting).status == 200
    assert (len(provider.scalings()), len(env.requests)) == (1, 1)


# ---- the end of the daemon -----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["look-up", "scaling"])
async def test_a_stop_while_the_provider_is_asked_is_a_clean_one(
    start: StartGateway, provider: Provider, env: Deployed, what: str
) -> None:
    """Exit code 0 and no traceback, though a caller waits; the queued call runs after a restart."""
    gateway = await start(PATIENT, '[gateway]\ndrain_timeout = "100ms"')
    env.replicas = 0
    env.ready.clear()
    queued = await gateway.submit("env")
    await provider.until(lambda: len(provider.look_ups("env")) >= 3, "looks whether it is up")
    if what == "look-up":
        provider.may_look_up.clear()
        number = len(provider.look_ups("env"))
        await provider.until(lambda: len(provider.look_ups("env")) > number, "a look-up")
    caller = asyncio.create_task(ask(gateway.url, "/function/env"))
    for _ in range(3):  # the daemon has read what came before this
        assert (await ask(gateway.url, "/healthz")).status == 200
    assert await gateway.terminate() == 0
    await asyncio.gather(caller, return_exceptions=True)
    provider.may_look_up.set()
    env.ready.set()
    await gateway.start()
    record = await gateway.final(queued)
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)
