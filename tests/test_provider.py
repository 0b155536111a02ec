"""With a faasd provider: functions are looked up, scaled up and called there, and its REST API is passed through."""

import asyncio
import json
import re
import signal
import time
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import pytest
from conftest import (
    PATIENCE,
    SECRET,
    Daemon,
    Gate,
    Reply,
    Server,
    StartDaemon,
    answer,
    ask,
    assert_refused,
    connection,
    faasd,
    never,
    parse,
    rude_server,
)
from provider import Deployed, Provider, basic, credential_files, running_provider

ONE_HOUR = 'cache = "1h"'  # a look-up that is made once stays known for the rest of the test
SOON = "faasd_async.RETRY_STORE_S = 0.3"  # when what could not be done is tried again
NO_TIME = 'cache = "1ms"'  # and is known no more when the next request comes


class StartGateway(Protocol):
    """What the `start` fixture gives."""

    async def __call__(self, more: str = "", *, keys: str = ONE_HOUR, before: str = SOON) -> Daemon: ...


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
    """Start a daemon in front of the provider: `await start('''more TOML''', keys="of [provider]")`."""
    files = credential_files(tmp_path, "provider", provider.user, provider.password)

    async def start_gateway(more: str = "", *, keys: str = ONE_HOUR, before: str = SOON) -> Daemon:
        gateway = await daemon(f'[provider]\nurl = "{provider.url}"\n{files}{keys}\n{more}', before=before)
        provider.host_url = gateway.url  # the gateway is what listens on port 8080 of a faasd host
        return gateway

    return start_gateway


def content(reply: Reply) -> bytes:
    """The body of an answer without the lengths of its chunks."""
    if reply.headers.get("Transfer-Encoding") != "chunked":
        return reply.body
    whole, rest = b"", reply.body
    while (length := int(rest.partition(b"\r\n")[0], 16)) > 0:
        rest = rest.partition(b"\r\n")[2]
        whole, rest = whole + rest[:length], rest[length + 2 :]
    return whole


async def document(url: str, target: str, *headers: str) -> Any:
    """The JSON document at a path."""
    reply = await ask(url, target, *headers)
    assert reply.status == 200, reply
    return json.loads(content(reply))


async def calls(gateway: Daemon) -> list[Any]:
    """The records of all calls that were accepted."""
    found: list[Any] = (await document(gateway.url, "/system/calls"))["calls"]
    return found


def assert_unavailable(reply: Reply) -> None:
    """503 with the reason."""
    assert_refused(reply, 503)
    assert reply.body.strip(), "an error without a reason"


async def past_the_queue(gateway: Daemon, name: str = "local") -> None:
    """Return when calls that were queued later have run: what was queued before has had its turn."""
    for call_id in [await gateway.submit(name) for _ in range(3)]:
        assert (await gateway.final(call_id))["status"] == "success"


LOCAL = '[functions.local]\ncommand = ["cat"]\n'  # a function that has nothing to do with the provider
ONE_ATTEMPT = "[retry]\nattempts = 1\n"
ONE_AT_A_TIME = "[queues.faas-request]\nmax_inflight = 1\n"


# ---- the provider itself ---------------------------------------------------------------------------------------


async def test_the_peer_wants_credentials_where_faasd_does(provider: Provider) -> None:
    """And nowhere else."""
    guarded = ("info", "functions", "function/env", "secrets", "logs")
    for path in guarded:
        reply = await ask(provider.url, f"/system/{path}")
        assert (reply.status, reply.body) == (401, b"invalid credentials"), path
        assert reply.headers["WWW-Authenticate"] == 'Basic realm="Restricted"'
        assert (await ask(provider.url, f"/system/{path}", provider.credentials)).status == 200, path
    assert (await ask(provider.url, "/system/scale-function/env", method="POST")).status == 401
    for path in ("/healthz", "/metrics", "/system/namespaces", "/system/namespace/openfaas-fn", "/function/env"):
        assert (await ask(provider.url, path)).status == 200, path


async def test_the_peer_describes_functions_as_faasd_does(provider: Provider, env: Deployed) -> None:
    """With zero replicas there is no replica field at all."""
    found = await document(provider.url, "/system/function/env?namespace=openfaas-fn", provider.credentials)
    assert (found["name"], found["replicas"], found["availableReplicas"]) == ("env", 1, 1)
    (listed,) = await document(provider.url, "/system/functions", provider.credentials)
    assert listed["replicas"] == 1
    assert "availableReplicas" not in listed
    env.replicas = 0
    found = await document(provider.url, "/system/function/env", provider.credentials)
    assert not {"replicas", "availableReplicas"} & set(found)
    for target, status, body in (
        ("env.openfaas-fn", 404, b"404 page not found\n"),
        ("nosuch", 404, b""),
        ("env?namespace=bad", 400, b"namespace not valid\n"),
    ):
        reply = await ask(provider.url, f"/system/function/{target}", provider.credentials)
        assert (reply.status, reply.body) == (status, body), target


async def test_the_peer_scales_as_faasd_does(provider: Provider, env: Deployed) -> None:
    """The body has the name; a second zero wakes a function up, and five are one."""
    for replicas, after in ((0, 0), (0, 1), (5, 1)):
        body = json.dumps({"serviceName": "env", "replicas": replicas}).encode()
        reply = await ask(provider.url, "/system/scale-function/x", provider.credentials, method="POST", body=body)
        assert (reply.status, reply.body, env.replicas) == (200, b"", after)
    body = b'{"serviceName": "nosuch", "replicas": 1}'
    reply = await ask(provider.url, "/system/scale-function/env", provider.credentials, method="POST", body=body)
    assert (reply.status, reply.body) == (404, b"service nosuch not found\n")
    assert reply.headers["X-Content-Type-Options"] == "nosniff"


async def test_the_peer_answers_for_functions_as_faasd_does(provider: Provider, env: Deployed, sink: Server) -> None:
    """Unknown, not listening, with no replicas, and by a path that has to be cleaned."""
    reply = await ask(provider.url, "/function/nosuch")
    assert (reply.status, reply.body) == (503, b"No endpoints available for: nosuch.\n")
    assert reply.headers["X-Openfaas-Internal"] == "proxy"
    env.listening = False
    reply = await ask(provider.url, "/function/env.openfaas-fn")
    assert (reply.status, reply.body) == (500, b"Can't reach service for: env.openfaas-fn.\n")
    assert reply.headers["X-Openfaas-Internal"] == "proxy"
    for path in ("a//b", "a/../b", "a/./b", "a/%2e%2e/b"):
        reply = await ask(provider.url, f"/function/env/{path}?q=1")
        assert (reply.status, reply.headers["Location"][:14]) == (301, "/function/env/"), path
    env.replicas, provider.host_url = 0, sink.url
    sink.behaviour = answer(418, b"the host's own")
    reply = await ask(provider.url, "/function/env/sub%2Fpath?q=1", "X-Own: v", method="PUT", body=b"body")
    assert (reply.status, reply.body) == (418, b"the host's own")
    (request,) = sink.requests
    assert (request.method, request.target, request.body) == ("PUT", "/sub%2Fpath?q=1", b"body")
    assert request.headers["X-Own"] == "v"


async def test_the_peer_hangs_up_as_faasd_does(provider: Provider, env: Deployed) -> None:
    """Past the service timeout, on idle connections, and on a second request when it is told so."""
    async with connection(provider.url) as (reader, writer):
        for _ in range(2):
            writer.write(b"GET /function/env HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await asyncio.wait_for(reader.readuntil(b"ok"), PATIENCE)).startswith(b"HTTP/1.1 200")
        await provider.close_idle()
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
    provider.service_timeout, env.behaviour = 0.05, never
    with pytest.raises(ConnectionError):
        await ask(provider.url, "/function/env")
    provider.cuts_reused, env.behaviour = True, answer(body=b"ok")
    async with connection(provider.url) as (reader, writer):
        writer.write(b"GET /function/env HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"ok"), PATIENCE)
        writer.write(b"GET /function/env HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
    assert (provider.cut, len(env.requests)) == (1, 4)


async def test_the_peer_refuses_methods_as_faasd_does(provider: Provider) -> None:
    """405 with nothing in it; what it does not have is a 404."""
    for path in ("/system/functions", "/system/function/env", "/system/info", "/system/namespaces", "/healthz"):
        reply = await ask(provider.url, path, method="PATCH")
        assert (reply.status, reply.body) == (405, b""), path
    for path in ("/async-function/env", "/system/alert", "/ui/"):
        assert (await ask(provider.url, path)).status == 404, path


# ---- calls -----------------------------------------------------------------------------------------------------


async def test_a_function_of_the_provider_is_called_through_it(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """Status, headers and body are the function's own, whatever the method."""
    env.behaviour = answer(418, b"short and stout", X_Own="v", Content_Type="text/x-tea")
    gateway = await start()
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        reply = await ask(gateway.url, "/function/env/a%2Fb?x=%20", "X-Mine: 1", method=method, body=b"body")
        assert (reply.status, reply.body, reply.headers["X-Own"]) == (418, b"short and stout", "v"), method
        assert reply.headers["Content-Type"] == "text/x-tea"
        request = env.requests[-1]
        assert (request.method, request.target, request.body) == (method, "/a%2Fb?x=%20", b"body")
        assert (request.headers["X-Mine"], request.call_id) == ("1", reply.headers["X-Call-Id"])


async def test_a_function_of_the_provider_runs_in_the_background(start: StartGateway, env: Deployed) -> None:
    """202, a POST with the body that was sent, and a record like any other."""
    gateway = await start()
    call_id = await gateway.submit("env/path?q=1", b"body", X_Mine="1")
    record = await gateway.final(call_id)
    assert (record["function"], record["namespace"], record["status"]) == ("env", "openfaas-fn", "success")
    assert (record["queue"], record["attempts"], record["http_status"]) == ("faas-request", 1, 200)
    (request,) = env.requests
    assert (request.method, request.target, request.body) == ("POST", "/path?q=1", b"body")
    assert (request.headers["X-Mine"], request.call_id, request.headers["X-Retry"]) == ("1", call_id, "0")


async def test_path_and_query_reach_the_provider_byte_for_byte(start: StartGateway, env: Deployed) -> None:
    """Nothing is decoded, encoded again or dropped on the way, sync or from the queue."""
    gateway = await start()
    for target in ("/", "/a;b=c", "/%C3%A9%c3%a9", "/lone%", "/x%2Fy%3Fz", "/?q=a+b%20c&&e=;&=", "/?brackets[]=1&["):
        env.requests.clear()
        assert (await ask(gateway.url, f"/function/env{target}")).status == 200
        reply = await ask(gateway.url, f"/async-function/env{target}", method="POST")
        assert (await gateway.final(reply.headers["X-Call-Id"]))["status"] == "success"
        assert [request.target for request in env.requests] == [target] * 2


async def test_a_big_body_is_streamed_to_the_provider(start: StartGateway, env: Deployed) -> None:
    """A sync body has no limit."""
    gateway = await start()
    body = bytes(range(256)) * 2048
    assert (await ask(gateway.url, "/function/env", method="POST", body=body)).status == 200
    assert env.requests[0].body == body


async def test_the_provider_is_called_without_its_credentials(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """They are for its REST API; a function must never see them. The caller's own go to the function, as ever."""
    gateway = await start()
    await ask(gateway.url, "/function/env")
    await gateway.final(await gateway.submit("env"))
    await ask(gateway.url, "/function/env", "Authorization: Bearer mine")
    assert [request.headers.get("Authorization") for request in env.requests] == [None, None, "Bearer mine"]


async def test_a_redirect_of_the_provider_is_not_followed(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """faasd cleans paths by a redirect; one that leads out of the function leads the gateway nowhere."""
    gateway = await start()
    for path in ("a//b", "../../system/functions", "..%2f..%2fsystem/secrets"):
        reply = await ask(gateway.url, f"/function/env/{path}")
        assert reply.status == 301, path
    assert provider.seen("/system/functions") == provider.seen("/system/secrets") == env.requests == []


async def test_a_call_that_was_only_redirected_is_no_success(start: StartGateway, env: Deployed) -> None:
    """A queued call whose path the provider wants cleaned has run, or its record says that it has not."""
    gateway = await start(ONE_ATTEMPT)
    record = await gateway.final(await gateway.submit("env/a//b"))
    assert (record["status"] == "success") == bool(env.requests), record


async def test_a_function_in_the_file_wins(
    start: StartGateway, provider: Provider, function: Server, env: Deployed
) -> None:
    """The provider is not even asked about a name that the TOML file has."""
    gateway = await start(f'[functions.env]\nurl = "{function.url}"')
    for name in ("env", "env.openfaas-fn"):
        assert (await ask(gateway.url, f"/function/{name}")).status == 200
        assert (await gateway.final(await gateway.submit(name)))["status"] == "success"
    assert (len(function.requests), env.requests, provider.look_ups()) == (4, [], [])


async def test_a_name_with_a_namespace_is_called_there(start: StartGateway, provider: Provider, env: Deployed) -> None:
    """The look-up asks in that namespace and the call names it; the function of the same name elsewhere rests."""
    other = provider.deploy("env", namespace="dev")
    gateway = await start()
    assert (await ask(gateway.url, "/function/env.dev/path")).status == 200
    record = await gateway.final(await gateway.submit("env.dev/path"))
    assert (record["function"], record["namespace"], record["status"]) == ("env", "dev", "success")
    assert {request.target for request in provider.look_ups()} == {"/system/function/env?namespace=dev"}
    assert [one.target for one in provider.server.requests if "/path" in one.target] == ["/function/env.dev/path"] * 2
    assert (len(other.requests), env.requests) == (2, [])


async def test_the_default_namespace_may_be_named(start: StartGateway, provider: Provider, env: Deployed) -> None:
    """NAME and NAME.openfaas-fn are one function, with one look-up."""
    gateway = await start()
    for name in ("env", "env.openfaas-fn"):
        assert (await ask(gateway.url, f"/function/{name}")).status == 200
    assert len(env.requests) == 2
    assert len(provider.look_ups("env")) == 1


async def test_fns_route_reaches_the_provider(start: StartGateway, env: Deployed) -> None:
    """/r/APP/NAME calls it, and an unknown name is told in Fn's form."""
    gateway = await start()
    assert (await ask(gateway.url, "/r/app/env", method="POST", body=b"body")).status == 200
    assert env.requests[0].body == b"body"
    reply = await ask(gateway.url, "/r/app/nosuch", method="POST", body=SECRET)
    assert (reply.status, list(json.loads(reply.body))) == (404, ["error"])


async def test_a_callback_can_be_a_function_of_the_provider(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """`http://gateway:8080/function/NAME` is this daemon, and so the provider."""
    other = provider.deploy("other")
    env.behaviour = answer(body=b"the outcome")
    gateway = await start()
    call_id = await gateway.submit("env", X_Callback_Url="http://gateway:8080/function/other")
    assert (await gateway.final(call_id))["callback"]["status"] == "delivered"
    assert [request.body for request in other.requests] == [b"the outcome"]


# ---- look-ups --------------------------------------------------------------------------------------------------


async def test_a_look_up_has_the_providers_credentials(start: StartGateway, provider: Provider) -> None:
    """From the files that `[provider]` names, without the newline at their ends."""
    gateway = await start()
    assert (await ask(gateway.url, "/function/env")).status == 200
    (request,) = provider.look_ups("env")
    assert f"Authorization: {request.headers['Authorization']}" == provider.credentials


async def test_without_credentials_of_its_own_the_provider_gets_the_gateways(
    daemon: StartDaemon, provider: Provider, tmp_path: Path
) -> None:
    """`[auth]` serves for both, as on a faasd host."""
    files = credential_files(tmp_path, "auth", provider.user, provider.password)
    gateway = await daemon(f'[auth]\n{files}[provider]\nurl = "{provider.url}"')
    assert (await ask(gateway.url, "/function/env")).status == 200


async def test_a_provider_that_takes_other_credentials_is_no_missing_function(
    daemon: StartDaemon, provider: Provider, tmp_path: Path
) -> None:
    """Nobody can know whether the function exists: an error of ours, not 404, nor the provider's 401."""
    files = credential_files(tmp_path, "provider", provider.user, "wr0ng")
    gateway = await daemon(f'[log]\nlevel = "debug"\n[provider]\nurl = "{provider.url}"\n{files}')
    for route in ("function", "async-function"):
        reply = await ask(gateway.url, f"/{route}/env", method="POST", body=SECRET)
        assert reply.status in (502, 503), reply
        assert_refused(reply, reply.status)
    assert await calls(gateway) == []
    assert "wr0ng" not in gateway.log


async def test_a_look_up_is_cached(start: StartGateway, provider: Provider) -> None:
    """Calls within `provider.cache` share one, sync and async ones."""
    gateway = await start()
    for _ in range(3):
        assert (await ask(gateway.url, "/function/env")).status == 200
        await gateway.final(await gateway.submit("env"))
    assert len(provider.look_ups("env")) == 1


async def test_a_look_up_is_made_anew_when_the_cache_time_is_over(start: StartGateway, provider: Provider) -> None:
    """What changed at the provider is known after `provider.cache`."""
    gateway = await start(keys=NO_TIME)
    while len(provider.look_ups("env")) < 3:
        assert (await ask(gateway.url, "/function/env")).status == 200


async def test_concurrent_calls_share_one_look_up(start: StartGateway, provider: Provider, env: Deployed) -> None:
    """However many come while it is under way."""
    gateway = await start()
    provider.may_look_up.clear()
    waiting = [asyncio.create_task(ask(gateway.url, "/function/env")) for _ in range(30)]
    waiting += [asyncio.create_task(ask(gateway.url, "/async-function/env", method="POST")) for _ in range(10)]
    await provider.until(lambda: len(provider.look_ups()) > 0, "a look-up")
    assert (await ask(gateway.url, "/healthz")).status == 200
    provider.may_look_up.set()
    assert sorted(reply.status for reply in await asyncio.gather(*waiting)) == [200] * 30 + [202] * 10
    await provider.until(lambda: len(env.requests) == 40 and env.running == 0, "all calls")
    assert len(provider.look_ups()) == 1


async def test_a_caller_that_goes_away_takes_nobodys_look_up_along(start: StartGateway, provider: Provider) -> None:
    """The first of those who share it may leave; the others are served."""
    gateway = await start()
    provider.may_look_up.clear()
    async with connection(gateway.url) as (_, writer):
        writer.write(b"GET /function/env HTTP/1.1\r\nHost: x\r\n\r\n")
        await provider.until(lambda: len(provider.look_ups()) == 1, "the look-up")
        second = asyncio.create_task(ask(gateway.url, "/function/env"))
        assert (await ask(gateway.url, "/healthz")).status == 200
    assert (await ask(gateway.url, "/healthz")).status == 200
    provider.may_look_up.set()
    assert (await second).status == 200


async def test_a_slow_look_up_holds_up_nobody_else(start: StartGateway, provider: Provider, function: Server) -> None:
    """Functions in the file, and those that are known, are called meanwhile."""
    gateway = await start(f'[functions.mine]\nurl = "{function.url}"')
    assert (await ask(gateway.url, "/function/env")).status == 200
    provider.deploy("other")
    provider.may_look_up.clear()
    waiting = asyncio.create_task(ask(gateway.url, "/function/other"))
    await provider.until(lambda: len(provider.look_ups("other")) == 1, "the look-up")
    for name in ("mine", "env"):
        assert (await ask(gateway.url, f"/function/{name}")).status == 200
        assert (await gateway.final(await gateway.submit(name)))["status"] == "success"
    provider.may_look_up.set()
    assert (await waiting).status == 200


async def test_a_look_up_that_is_never_answered_is_an_error(start: StartGateway, provider: Provider) -> None:
    """A provider that hangs does not make its callers hang for ever."""
    gateway = await start('[gateway]\nupstream_timeout = "200ms"', before="faasd_async.PROVIDER_S = 0.5")
    provider.may_look_up.clear()
    reply = await ask(gateway.url, "/function/env")
    assert reply.status in (502, 503, 504), reply
    assert_refused(reply, reply.status)


async def test_an_unknown_function_is_not_found(start: StartGateway, provider: Provider) -> None:
    """404 on both routes, in an unknown namespace, too; nothing is queued."""
    gateway = await start()
    for name in ("nosuch", "nosuch.openfaas-fn", "env.elsewhere", "nosuch.dev", "Env"):
        for route in ("function", "async-function"):
            assert_refused(await ask(gateway.url, f"/{route}/{name}/path", method="POST", body=SECRET), 404)
    assert await calls(gateway) == []


async def test_an_unknown_name_is_cached_too(start: StartGateway, provider: Provider) -> None:
    """A second call within the cache time makes no new look-up."""
    gateway = await start()
    for route in ("function", "async-function", "function"):
        assert (await ask(gateway.url, f"/{route}/nosuch", method="POST")).status == 404
    assert len(provider.look_ups("nosuch")) == 1


async def test_a_function_that_appears_at_the_provider_is_found_after_the_cache_time(
    start: StartGateway, provider: Provider
) -> None:
    """An unknown name does not stay unknown."""
    gateway = await start(keys=NO_TIME)
    assert (await ask(gateway.url, "/function/late")).status == 404
    provider.deploy("late")
    while (reply := await ask(gateway.url, "/function/late")).status == 404:
        pass
    assert reply.status == 200


async def test_a_name_can_not_lead_a_look_up_astray(start: StartGateway, provider: Provider) -> None:
    """What is no name of a function is a 404, and never becomes another path or query at the provider."""
    gateway = await start()
    names = ("..%2f..%2fsystem%2finfo", "env%3Fnamespace=dev", "env%23", "%2e%2e", "..", "a%20b", "env%0d%0aX:1", "%00")
    for name in names:
        for route in ("function", "async-function"):
            reply = await ask(gateway.url, f"/{route}/{name}", method="POST", body=SECRET)
            assert reply.status in (400, 404), name
    for request in provider.asked:
        assert re.fullmatch(r"/system/function/[^/?#]+(\?namespace=[^&?#]*)?", request.target), request.target


async def test_a_function_that_is_gone_when_its_call_runs_is_an_error(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """It was known when the call was accepted, and the record says what happened."""
    gateway = await start(ONE_ATTEMPT, keys=NO_TIME)
    assert (await ask(gateway.url, "/system/queues/faas-request/pause", method="POST")).status == 200
    call_id = await gateway.submit("env")
    provider.remove(env)
    assert (await ask(gateway.url, "/system/queues/faas-request/resume", method="POST")).status == 200
    record = await gateway.final(call_id)
    assert (record["status"], env.requests) == ("error", [])
    assert record["error"]


# ---- annotations -----------------------------------------------------------------------------------------------


async def test_an_annotation_names_the_queue(start: StartGateway, provider: Provider, env: Deployed) -> None:
    """With the limits that the TOML file gives to that queue."""
    env.annotations["com.openfaas.queue"] = "slow-queue"
    gateway = await start("[queues.slow-queue]\nmax_inflight = 3")
    env.behaviour = gate = Gate()
    submitted = [await gateway.submit("env") for _ in range(5)]
    await provider.until(lambda: env.running == 3, "three running calls")
    gate.open()
    for call_id in submitted:
        record = await gateway.final(call_id)
        assert (record["queue"], record["status"]) == ("slow-queue", "success")
    assert env.most_running == 3


async def test_an_annotated_queue_that_is_not_in_the_file_has_the_defaults(start: StartGateway, env: Deployed) -> None:
    """One call at a time, as for every queue that is only named; it can be operated like the others."""
    env.annotations["com.openfaas.queue"] = "night"
    gateway = await start()
    submitted = [await gateway.submit("env") for _ in range(4)]
    for call_id in submitted:
        record = await gateway.final(call_id)
        assert (record["queue"], record["status"]) == ("night", "success")
    assert env.most_running == 1


async def test_calls_in_an_annotated_queue_survive_a_restart(start: StartGateway, env: Deployed) -> None:
    """Nothing in the file tells the next process of this queue, but its calls are there."""
    env.annotations["com.openfaas.queue"] = "night"
    env.behaviour = never
    gateway = await start()
    submitted = [await gateway.submit("env") for _ in range(2)]
    await gateway.until(submitted[0], lambda record: record["status"] == "running")
    await gateway.kill()
    env.behaviour = answer()
    await gateway.start()
    for call_id in submitted:
        assert (await gateway.final(call_id))["status"] == "success"


async def test_annotations_set_the_number_of_attempts(start: StartGateway, env: Deployed) -> None:
    """`com.openfaas.retry.attempts` takes the place of `[retry]`."""
    env.annotations["com.openfaas.retry.attempts"] = "2"
    env.behaviour = answer(500)
    gateway = await start()
    record = await gateway.final(await gateway.submit("env"))
    assert (record["status"], record["attempts"], record["max_attempts"]) == ("error", 2, 2)
    assert len(env.requests) == 2


async def test_annotations_set_the_codes(start: StartGateway, env: Deployed) -> None:
    """What is not among `com.openfaas.retry.codes` is final, and what is, is not."""
    env.annotations |= {"com.openfaas.retry.codes": "418,425", "com.openfaas.retry.attempts": "3"}
    gateway = await start()
    for status, attempts in ((418, 3), (500, 1)):
        env.behaviour = answer(status)
        record = await gateway.final(await gateway.submit("env"))
        assert (record["status"], record["attempts"], record["http_status"]) == ("error", attempts, status)


async def test_annotations_set_the_waits(start: StartGateway, env: Deployed) -> None:
    """`min_wait` is the first one, and `max_wait` the longest."""
    env.annotations |= {"com.openfaas.retry.min_wait": "2h", "com.openfaas.retry.max_wait": "2h"}
    env.behaviour = answer(500)
    gateway = await start()
    record = await gateway.until(await gateway.submit("env"), lambda record: record["status"] == "delayed")
    wait = datetime.fromisoformat(record["due_at"]).timestamp() - time.time()
    assert 7200 - PATIENCE < wait <= 7200


async def test_an_invalid_annotation_is_the_default_and_one_warning(start: StartGateway, env: Deployed) -> None:
    """Each look-up finds it again, but the log is told once."""
    env.annotations["com.openfaas.retry.attempts"] = "many"
    gateway = await start(keys=NO_TIME)
    for _ in range(3):
        assert (await gateway.final(await gateway.submit("env")))["max_attempts"] == 10
    await gateway.wait_for_log("com.openfaas.retry.attempts")
    assert gateway.log.count("com.openfaas.retry.attempts") == 1


async def test_an_annotation_limits_the_calls_at_once(start: StartGateway, provider: Provider, env: Deployed) -> None:
    """`com.openfaas.max_inflight` counts queued and sync calls together; a sync call over it gets 429."""
    env.annotations["com.openfaas.max_inflight"] = "2"
    env.behaviour = gate = Gate()
    gateway = await start()
    queued = [await gateway.submit("env") for _ in range(3)]
    await provider.until(lambda: env.running == 2, "two running calls")
    reply = await ask(gateway.url, "/function/env", method="POST", body=SECRET)
    assert_refused(reply, 429)
    assert int(reply.headers["Retry-After"]) >= 1
    gate.open()
    for call_id in queued:
        assert (await gateway.final(call_id))["status"] == "success"
    assert env.most_running == 2


async def test_an_annotation_limits_the_rate_of_calls(start: StartGateway, provider: Provider, env: Deployed) -> None:
    """`com.openfaas.rate` is of queued and sync calls together; `queues` shows it."""
    env.annotations["com.openfaas.rate"] = "1/1h"
    gateway = await start()
    first = await gateway.submit("env")
    assert (await gateway.final(first))["status"] == "success"
    second = await gateway.submit("env")
    reply = await ask(gateway.url, "/function/env", method="POST", body=SECRET)
    assert_refused(reply, 429, "1/1h")
    assert int(reply.headers["Retry-After"]) > 3000
    assert (await gateway.record(second))["status"] == "queued"
    queues = json.loads((await ask(gateway.url, "/system/queues")).body)["queues"]
    assert queues[0]["function_rates"] == {"env.openfaas-fn": "1/1h"}


async def test_a_queue_that_gets_its_first_call_while_the_daemon_stops_is_left_for_the_next(
    start: StartGateway, env: Deployed, function: Server
) -> None:
    """Nobody would wait for what begins then."""
    env.annotations["com.openfaas.queue"] = "late"
    function.behaviour = gate = Gate()
    gateway = await start(f'[functions.slow]\nurl = "{function.url}"\n')
    running = asyncio.create_task(ask(gateway.url, "/function/slow"))
    await function.wait_for(1)
    async with connection(gateway.url) as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"ok\n")
        gateway.signal(signal.SIGTERM)
        await gateway.wait_for_log("stopping")
        writer.write(b"POST /async-function/env HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 202 ")
    gate.open()
    assert (await running).status == 200
    assert await gateway.ended() == 0
    assert not env.requests
    await gateway.start()
    record = await gateway.final(parse(head).headers["X-Call-Id"])
    assert (record["status"], record["attempts"], record["interrupted"]) == ("success", 1, 0)


# ---- the provider is away --------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
async def test_a_sync_call_while_the_provider_is_away_is_unavailable(
    start: StartGateway, provider: Provider, known: bool
) -> None:
    """503 with the reason, whether or not the function was looked up before; the daemon itself is well."""
    gateway = await start()
    if known:
        assert (await ask(gateway.url, "/function/env")).status == 200
    await provider.stop()
    assert_unavailable(await ask(gateway.url, "/function/env", method="POST", body=SECRET))
    assert (await ask(gateway.url, "/healthz")).status == 200


async def test_the_status_says_that_the_provider_is_away(start: StartGateway, provider: Provider) -> None:
    """Until it can be asked again: what waits for it would look as if all were well."""
    gateway = await start(keys=NO_TIME)
    assert (await ask(gateway.url, "/function/env")).status == 200
    status = ("status", "--config", gateway.config, "--url", gateway.url)
    assert (await faasd(*status)).code == 0
    await provider.stop()
    assert (await ask(gateway.url, "/function/env")).status == 503
    told = await faasd(*status)
    assert told.code == 1
    assert "\n! calls of the provider's functions wait: the provider can't be reached: " in told.out, told.out
    await provider.start()
    while (await ask(gateway.url, "/function/env")).status == 503:
        pass
    assert (await faasd(*status)).code == 0


async def test_calls_of_known_functions_are_accepted_while_the_provider_is_away(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """Although what is known of them is out of date: 202, and they run when it is back."""
    gateway = await start(keys=NO_TIME)
    assert (await ask(gateway.url, "/function/env")).status == 200
    await provider.stop()
    accepted = [await gateway.submit("env", b"%d" % number) for number in range(3)]
    await provider.start()
    for call_id in accepted:
        assert (await gateway.final(call_id))["status"] == "success"
    assert sorted(request.body for request in env.requests[1:]) == [b"0", b"1", b"2"]


async def test_calls_of_others_are_not_accepted_while_the_provider_is_away(
    start: StartGateway, provider: Provider
) -> None:
    """503 with Retry-After: nobody knows whether they exist, so nothing is queued."""
    gateway = await start()
    await provider.stop()
    reply = await ask(gateway.url, "/async-function/env", method="POST", body=SECRET)
    assert_unavailable(reply)
    assert int(reply.headers["Retry-After"]) >= 1
    assert await calls(gateway) == []


async def test_a_name_that_could_not_be_looked_up_is_not_taken_for_unknown(
    start: StartGateway, provider: Provider
) -> None:
    """A failed look-up is not kept, for however long an answer would be."""
    gateway = await start()
    await provider.stop()
    assert_unavailable(await ask(gateway.url, "/function/env"))
    await provider.start()
    while (reply := await ask(gateway.url, "/function/env")).status == 503:
        pass
    assert reply.status == 200


async def test_queued_calls_are_not_burnt_while_the_provider_is_away(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """No attempt is charged for what the function had no part in, and the call runs once it is back."""
    gateway = await start(LOCAL + ONE_ATTEMPT + ONE_AT_A_TIME, keys=NO_TIME)
    assert (await ask(gateway.url, "/function/env")).status == 200
    await provider.stop()
    call_id = await gateway.submit("env", b"queued")
    await past_the_queue(gateway)
    reason = "function env: the provider can't be reached: "
    record = await gateway.until(call_id, lambda record: (record.get("waits_for") or "").startswith(reason))
    assert record["status"] in ("queued", "delayed", "running"), record
    await provider.start()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"]) == ("success", 1)
    assert [request.body for request in env.requests] == [b"", b"queued"]


async def test_a_deadline_holds_while_the_provider_is_away(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """An attempt that never was does not count as a start."""
    gateway = await start(LOCAL + ONE_ATTEMPT + ONE_AT_A_TIME, keys=NO_TIME)
    assert (await ask(gateway.url, "/function/env")).status == 200
    await provider.stop()
    call_id = await gateway.submit("env", X_Deadline="1s")
    await past_the_queue(gateway)
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"]) == ("timeout", 0)
    assert len(env.requests) == 1


async def test_queued_calls_are_not_burnt_when_the_provider_comes_up_last(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """A daemon that was started anew knows no function yet, which does not mean that there are none."""
    gateway = await start(LOCAL + ONE_ATTEMPT + ONE_AT_A_TIME)
    assert (await ask(gateway.url, "/system/queues/faas-request/pause", method="POST")).status == 200
    call_id = await gateway.submit("env")
    assert await gateway.terminate() == 0
    await provider.stop()
    await gateway.start()
    assert (await ask(gateway.url, "/system/queues/faas-request/resume", method="POST")).status == 200
    await past_the_queue(gateway)
    assert (await gateway.record(call_id))["status"] in ("queued", "delayed", "running")
    await provider.start()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"], len(env.requests)) == ("success", 1, 1)


async def test_an_away_provider_holds_up_no_function_of_the_file(start: StartGateway, provider: Provider) -> None:
    """Not even in the same queue, of which one call runs at a time."""
    gateway = await start(LOCAL + ONE_AT_A_TIME, keys=NO_TIME)
    assert (await ask(gateway.url, "/function/env")).status == 200
    await provider.stop()
    held = [await gateway.submit("env") for _ in range(5)]
    await past_the_queue(gateway)
    assert (await ask(gateway.url, "/function/local", method="POST", body=b"hi")).body == b"hi"
    await provider.start()
    for call_id in held:
        assert (await gateway.final(call_id))["status"] == "success"


# ---- from zero -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
async def test_a_function_with_no_replicas_is_scaled_up_and_called(
    start: StartGateway, provider: Provider, env: Deployed, background: bool
) -> None:
    """The request names function, namespace and one replica; the call then succeeds at its first attempt."""
    env.replicas = 0
    gateway = await start(ONE_ATTEMPT)
    if background:
        record = await gateway.final(await gateway.submit("env", b"body"))
        assert (record["status"], record["attempts"]) == ("success", 1)
    else:
        assert (await ask(gateway.url, "/function/env", method="POST", body=b"body")).status == 200
    (scaling,) = provider.scalings()
    assert (scaling["serviceName"], scaling["replicas"]) == ("env", 1)
    assert scaling.get("namespace") in (None, "", "openfaas-fn")
    assert ([request.body for request in env.requests], provider.misdirected) == ([b"body"], [])


async def test_a_function_is_scaled_up_in_its_namespace(start: StartGateway, provider: Provider, env: Deployed) -> None:
    """The provider takes it from the body."""
    other = provider.deploy("env", namespace="dev", replicas=0)
    gateway = await start()
    assert (await ask(gateway.url, "/function/env.dev")).status == 200
    assert [scaling["namespace"] for scaling in provider.scalings()] == ["dev"]
    assert (len(other.requests), env.requests, provider.misdirected) == (1, [], [])


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
async def test_a_function_that_comes_up_is_waited_for(
    start: StartGateway, provider: Provider, env: Deployed, background: bool
) -> None:
    """It is looked at again and again, and not called before it is available, nor scaled a second time."""
    env.replicas = 0
    env.ready.clear()
    gateway = await start(ONE_ATTEMPT)
    route, status = ("async-function", 202) if background else ("function", 200)
    waiting = asyncio.create_task(ask(gateway.url, f"/{route}/env", method="POST"))
    await provider.until(lambda: len(provider.scalings()) == 1, "the scaling")
    looked = len(provider.look_ups())
    await provider.until(lambda: len(provider.look_ups()) >= looked + 3, "more look-ups")
    assert provider.seen("/function/", "POST") == []
    env.ready.set()
    reply = await waiting
    assert reply.status == status
    if background:
        assert (await gateway.final(reply.headers["X-Call-Id"]))["status"] == "success"
    assert (len(env.requests), len(provider.scalings()), provider.misdirected) == (1, 1, [])


async def test_many_calls_scale_a_function_up_once(start: StartGateway, provider: Provider, env: Deployed) -> None:
    """All of them wait for the same replica."""
    env.replicas = 0
    gateway = await start()
    provider.may_scale.clear()
    waiting = [asyncio.create_task(ask(gateway.url, "/function/env")) for _ in range(20)]
    queued = [await gateway.submit("env") for _ in range(5)]
    await provider.until(lambda: len(provider.scalings()) > 0, "the scaling")
    assert (await ask(gateway.url, "/healthz")).status == 200
    provider.may_scale.set()
    assert {reply.status for reply in await asyncio.gather(*waiting)} == {200}
    for call_id in queued:
        assert (await gateway.final(call_id))["status"] == "success"
    assert (len(env.requests), len(provider.scalings()), provider.misdirected) == (25, 1, [])


async def test_a_function_that_was_scaled_up_is_simply_called(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """The look-up that found no replica is not believed any longer."""
    env.replicas = 0
    gateway = await start()
    for _ in range(3):
        assert (await ask(gateway.url, "/function/env")).status == 200
    assert (len(env.requests), len(provider.scalings())) == (3, 1)


async def test_a_caller_that_goes_away_takes_nobodys_scaling_along(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """The first of those who wait may leave; the others are served."""
    env.replicas = 0
    gateway = await start()
    provider.may_scale.clear()
    async with connection(gateway.url) as (_, writer):
        writer.write(b"GET /function/env HTTP/1.1\r\nHost: x\r\n\r\n")
        await provider.until(lambda: len(provider.scalings()) == 1, "the scaling")
        second = asyncio.create_task(ask(gateway.url, "/function/env"))
        assert (await ask(gateway.url, "/healthz")).status == 200
    assert (await ask(gateway.url, "/healthz")).status == 200
    provider.may_scale.set()
    assert (await second).status == 200
    assert provider.misdirected == []


async def test_a_call_is_accepted_before_its_function_is_up(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """The 202 does not wait for a replica."""
    env.replicas = 0
    provider.may_scale.clear()
    gateway = await start()
    call_id = await gateway.submit("env")
    provider.may_scale.set()
    assert (await gateway.final(call_id))["status"] == "success"


async def test_a_function_that_does_not_come_up_is_unavailable(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """503 with the reason after `scale_timeout`; it is never called."""
    env.replicas = 0
    env.ready.clear()
    gateway = await start(keys='scale_timeout = "200ms"')
    assert_unavailable(await ask(gateway.url, "/function/env", method="POST", body=SECRET))
    assert (provider.seen("/function/", "POST"), provider.misdirected) == ([], [])


async def test_a_queued_call_of_a_function_that_does_not_come_up_is_tried_again(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """Each attempt fails with 503, as the record says, until they are used up."""
    env.replicas = 0
    env.ready.clear()
    gateway = await start("[retry]\nattempts = 2", keys='scale_timeout = "200ms"')
    record = await gateway.final(await gateway.submit("env"))
    assert (record["status"], record["attempts"], record["http_status"]) == ("error", 2, 503)
    assert record["error"]
    assert (provider.seen("/function/", "POST"), provider.misdirected) == ([], [])


async def test_a_queued_call_runs_when_its_function_comes_up_late(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """After an attempt for which it was too slow."""
    env.replicas = 0
    env.ready.clear()
    gateway = await start(keys='scale_timeout = "200ms"')
    call_id = await gateway.submit("env")
    await gateway.until(call_id, lambda record: record["http_status"] == 503 or record["attempts"] > 1)
    env.ready.set()
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"] > 1, len(env.requests)) == ("success", True, 1)


async def test_a_scaling_that_the_provider_refuses_is_an_error(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """503 with the reason, sync and in the record."""
    env.replicas, provider.scale_error = 0, "error resuming task env"
    gateway = await start(ONE_ATTEMPT, keys='scale_timeout = "5s"')
    assert_unavailable(await ask(gateway.url, "/function/env", method="POST", body=SECRET))
    record = await gateway.final(await gateway.submit("env"))
    assert (record["status"], record["http_status"]) == ("error", 503)
    assert (provider.seen("/function/", "POST"), provider.misdirected) == ([], [])


async def test_scaling_up_can_be_switched_off(start: StartGateway, provider: Provider, env: Deployed) -> None:
    """With `scale_from_zero = false` somebody else has to do it: 503, and nothing is asked of the provider."""
    env.replicas = 0
    gateway = await start("[retry]\nattempts = 2", keys="scale_from_zero = false")
    assert_unavailable(await ask(gateway.url, "/function/env", method="POST", body=SECRET))
    record = await gateway.final(await gateway.submit("env"))
    assert (record["status"], record["attempts"], record["http_status"]) == ("error", 2, 503)
    assert (provider.scalings(), provider.seen("/function/", "POST")) == ([], [])


# ---- called back by the provider -------------------------------------------------------------------------------

# What the provider asks its own host for instead, when a function has no replicas: any route of ours.
SUB_PATHS = [
    *("", "/", "/healthz", "/readyz", "/metrics", "/ui/", "/nosuch", "/function/env", "/function/local"),
    *("/async-function/env", "/async-function/local", "/system/functions", "/system/calls", "/r/app/local"),
]


async def test_a_call_that_comes_back_to_the_gateway_is_an_error(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """A function that was scaled to zero after the look-up answers neither with a page of ours nor with a loop."""
    gateway = await start(LOCAL)
    for path in SUB_PATHS:
        for method in ("GET", "POST"):
            env.replicas, env.pauses_on_call = 1, True
            provider.misdirected.clear()
            reply = await ask(gateway.url, f"/function/env{path}", method=method)
            assert 502 <= reply.status <= 508, (path, reply)
            assert 0 < len(provider.misdirected) < 5, path
    assert (await calls(gateway), env.requests) == ([], [])


async def test_a_queued_call_that_came_back_to_the_gateway_runs_later(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """The function is scaled up for the next attempt."""
    gateway = await start(keys='cache = "100ms"')
    env.pauses_on_call = True
    record = await gateway.final(await gateway.submit("env/healthz", b"body"))
    assert (record["status"], record["http_status"]) == ("success", 200)
    assert ([request.body for request in env.requests], len(provider.misdirected)) == ([b"body"], 1)
    assert len(provider.scalings()) == 1


# ---- errors of the provider ------------------------------------------------------------------------------------


async def test_an_error_of_the_provider_is_tried_again_whatever_the_codes_say(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """A function that does not listen yet is none that answered 500."""
    env.listening = False
    gateway = await start("[retry]\ncodes = [429]")
    call_id = await gateway.submit("env")
    await provider.until(lambda: len(provider.seen("/function/", "POST")) >= 2, "a second attempt")
    env.listening = True
    record = await gateway.final(call_id)
    assert (record["status"], record["attempts"] >= 2, len(env.requests)) == ("success", True, 1)


async def test_errors_of_the_provider_use_attempts_up(start: StartGateway, provider: Provider, env: Deployed) -> None:
    """A function that never listens does not keep its calls for ever."""
    env.listening = False
    gateway = await start("[retry]\ncodes = [429]\nattempts = 3")
    record = await gateway.final(await gateway.submit("env"))
    assert (record["status"], record["attempts"], record["http_status"]) == ("error", 3, 500)


async def test_an_error_of_the_function_is_tried_again_by_its_codes_alone(start: StartGateway, env: Deployed) -> None:
    """Without the provider's header a 500 is the function's own."""
    env.behaviour = answer(500)
    gateway = await start("[retry]\ncodes = [429]")
    record = await gateway.final(await gateway.submit("env"))
    assert (record["status"], record["attempts"]) == ("error", 1)


async def test_an_error_of_the_provider_is_passed_on_to_a_sync_caller(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """As it is: status, header and text, of a function that is down and of one that has gone."""
    gateway = await start()
    env.listening = False
    reply = await ask(gateway.url, "/function/env", method="POST", body=SECRET)
    assert (reply.status, reply.headers["X-Openfaas-Internal"]) == (500, "proxy")
    assert re.fullmatch(rb"Can't reach service for: env(\.openfaas-fn)?\.\n", reply.body)
    provider.remove(env)
    reply = await ask(gateway.url, "/function/env", method="POST", body=SECRET)
    assert (reply.status, reply.headers["X-Openfaas-Internal"]) == (503, "proxy")
    assert re.fullmatch(rb"No endpoints available for: env(\.openfaas-fn)?\.\n", reply.body)


# ---- connections that the provider closes ----------------------------------------------------------------------


async def use_connections(gateway: Daemon, provider: Provider, env: Deployed, number: int = 3) -> None:
    """Call the function so often at once, so that as many connections are left for later calls."""
    env.behaviour = gate = Gate()
    waiting = [asyncio.create_task(ask(gateway.url, "/function/env")) for _ in range(number)]
    await provider.until(lambda: env.running == number, "all calls")
    gate.open()
    assert {reply.status for reply in await asyncio.gather(*waiting)} == {200}
    env.requests.clear()


async def test_a_connection_that_was_closed_while_idle_is_no_error(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """The call runs, once. What may be done twice: also where it shows in the moment of sending."""
    gateway = await start()
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        provider.cuts_reused = False
        await use_connections(gateway, provider, env)
        provider.cuts_reused = method not in ("POST", "PATCH")
        for number in range(5):
            if not provider.cuts_reused:
                await provider.close_idle()
            reply = await ask(gateway.url, "/function/env", method=method, body=b"%d" % number)
            assert (reply.status, reply.body) == (200, b"ok"), method
        assert [request.body for request in env.requests] == [b"0", b"1", b"2", b"3", b"4"], method


async def test_a_connection_that_was_closed_while_idle_costs_no_attempt(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """A queued call does not notice."""
    gateway = await start(ONE_ATTEMPT)
    await use_connections(gateway, provider, env)
    for _ in range(5):
        await provider.close_idle()
        assert (await gateway.final(await gateway.submit("env")))["status"] == "success"
    assert len(env.requests) == 5


async def test_closed_connections_are_not_used(start: StartGateway, provider: Provider, env: Deployed) -> None:
    """Those of which the daemon knows: it opens new ones."""
    gateway = await start(keys=NO_TIME)
    for _ in range(3):
        await use_connections(gateway, provider, env)
        await provider.close_idle()
        assert (await ask(gateway.url, "/function/env", method="POST", body=b"body")).status == 200
        assert len(env.requests) == 1


async def test_a_look_up_on_a_closed_connection_is_made_again(start: StartGateway, provider: Provider) -> None:
    """The same for the REST API: nobody is told that the provider is away."""
    gateway = await start(keys=NO_TIME)
    provider.cuts_reused = True
    while len(provider.look_ups("env")) < 5:
        assert (await ask(gateway.url, "/function/env")).status == 200
    for _ in range(3):
        assert (await ask(gateway.url, "/system/functions")).status == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_call_past_the_service_timeout_is_a_bad_gateway(
    start: StartGateway, provider: Provider, env: Deployed, method: str
) -> None:
    """The provider closes the connection and answers nothing: 502 with the reason, and no second call."""
    env.behaviour, provider.service_timeout = never, 0.2
    gateway = await start()
    reply = await ask(gateway.url, "/function/env", method=method, body=SECRET)
    assert_refused(reply, 502, "env")
    assert len(env.requests) == 1


async def test_a_call_past_the_service_timeout_is_not_made_twice(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """On a kept-alive connection this looks much like one that was closed while idle, but the function has run."""
    gateway = await start()
    await use_connections(gateway, provider, env, 1)
    env.behaviour, provider.service_timeout = never, 2.0
    assert_refused(await ask(gateway.url, "/function/env", method="POST", body=SECRET), 502, "env")
    assert len(env.requests) == 1


async def test_a_queued_call_past_the_service_timeout_is_a_failed_attempt(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """The function had its time, so the attempt counts."""
    env.behaviour, provider.service_timeout = never, 0.2
    gateway = await start("[retry]\nattempts = 2")
    record = await gateway.final(await gateway.submit("env"))
    assert (record["status"], record["attempts"], record["http_status"]) == ("error", 2, 502)
    assert len(env.requests) == 2


# ---- the provider's REST API -----------------------------------------------------------------------------------

# Requests whose answers are the provider's own, to the byte. None changes anything.
PASSED = [
    ("GET", "/system/function/env?namespace=openfaas-fn&usage=1", ""),
    ("GET", "/system/function/nosuch", ""),
    ("GET", "/system/function/env?namespace=bad", ""),
    ("GET", "/system/functions?namespace=bad", ""),
    ("GET", "/system/secrets?namespace=openfaas-fn", ""),
    ("GET", "/system/secrets?namespace=bad", ""),
    ("GET", "/system/logs?name=nosuch&tail=3", ""),
    ("GET", "/system/namespaces", ""),
    ("GET", "/system/namespace/openfaas-fn", ""),
    ("GET", "/system/namespace/nosuch", ""),
    ("PUT", "/system/functions", '{"service": "nosuch", "image": "x"}'),
    ("POST", "/system/functions", '{"service": "env", "image": "x"}'),
    ("POST", "/system/functions", '{"service": "new", "image": "x", "secrets": ["nosuch"]}'),
    ("POST", "/system/functions", '{"service": "new", "image": "bad image"}'),
    ("POST", "/system/functions", "not json"),
    ("DELETE", "/system/functions", '{"functionName": "nosuch"}'),
    ("DELETE", "/system/functions?namespace=dev", '{"functionName": "env", "namespace": "bad"}'),
    ("POST", "/system/scale-function/env", '{"serviceName": "nosuch", "replicas": 1}'),
    ("POST", "/system/secrets", '{"name": ""}'),
    ("DELETE", "/system/secrets", '{"name": "nosuch"}'),
    ("POST", "/system/namespace/", '{"name": "openfaas-fn", "labels": {"openfaas": "1"}}'),
    ("PUT", "/system/namespace/other", '{"name": "openfaas-fn", "labels": {"openfaas": "1"}}'),
]


async def test_the_rest_api_is_passed_through(start: StartGateway, provider: Provider) -> None:
    """Method, query and body go there as they came; status, type and body of the answer come back as they are."""
    gateway, own = await start(), "Content-Type: application/json"
    for method, target, body in PASSED:
        where = f"{method} {target} {body}"
        direct = await ask(provider.url, target, own, provider.credentials, method=method, body=body.encode())
        provider.server.requests.clear()
        reply = await ask(gateway.url, target, own, method=method, body=body.encode())
        (request,) = [one for one in provider.server.requests if (one.method, one.target) == (method, target)]
        assert request.body == body.encode(), where
        assert request.headers["Authorization"] == basic(provider.user, provider.password), where
        if body:
            assert request.headers["Content-Type"] == "application/json", where
        assert reply.status == direct.status, where
        assert reply.headers.get("Content-Type") == direct.headers.get("Content-Type"), where
        if (method, direct.status) == ("GET", 200) and "/system/function/" in target:
            told = json.loads(content(reply))
            assert told | json.loads(direct.body) == told, where  # there may be more in it
        else:
            assert content(reply) == content(direct), where


async def test_a_wrong_method_is_refused(start: StartGateway) -> None:
    """405, as the provider itself says."""
    gateway = await start()
    for path in ("functions", "function/env", "info", "secrets", "namespaces", "scale-function/env"):
        assert (await ask(gateway.url, f"/system/{path}", method="PATCH")).status == 405, path


async def test_secrets_are_kept_by_the_provider(start: StartGateway, provider: Provider) -> None:
    """Made, listed, changed and removed through the gateway; their values are never in its log."""
    gateway = await start('[log]\nlevel = "debug"')
    for method in ("POST", "PUT"):
        body = json.dumps({"name": "token", "namespace": "openfaas-fn", "value": f"value-{method}"}).encode()
        assert (await ask(gateway.url, "/system/secrets", method=method, body=body)).status in (200, 202)
        assert provider.secret_values == {("openfaas-fn", "token"): f"value-{method}"}
    assert await document(gateway.url, "/system/secrets") == [{"name": "token", "namespace": "openfaas-fn"}]
    body = b'{"name": "token", "namespace": "openfaas-fn"}'
    assert (await ask(gateway.url, "/system/secrets", method="DELETE", body=body)).status in (200, 202)
    assert provider.secret_values == {}
    assert "value-P" not in gateway.log


async def test_namespaces_are_made_at_the_provider(start: StartGateway, provider: Provider) -> None:
    """Its answers, 201 and 202, are passed on."""
    gateway = await start()
    body = b'{"name": "dev", "labels": {"openfaas": "1"}}'
    assert (await ask(gateway.url, "/system/namespace/", method="POST", body=body)).status == 201
    assert await document(gateway.url, "/system/namespaces") == ["openfaas-fn", "dev"]
    assert (await ask(gateway.url, "/system/namespace/dev", method="DELETE", body=body)).status == 202
    assert await document(gateway.url, "/system/namespaces") == ["openfaas-fn"]


async def test_logs_are_passed_on(start: StartGateway, provider: Provider, env: Deployed) -> None:
    """As the provider has them, one JSON object in a line."""
    gateway = await start()
    for number in range(3):
        await provider.write_log(env, f"line {number}")
    async with gateway.http.get(f"{gateway.url}/system/logs?name=env&tail=2") as response:
        assert (response.status, response.content_type) == (200, "application/x-ndjson")
        lines = [json.loads(line) for line in (await response.read()).splitlines()]
    assert [line["text"] for line in lines] == ["line 1", "line 2"]


async def test_followed_logs_stream_line_by_line(
    start: StartGateway, provider: Provider, env: Deployed, http: aiohttp.ClientSession
) -> None:
    """A line is there as soon as the function wrote it; a client that goes away ends it all."""
    gateway = await start()
    async with http.get(f"{gateway.url}/system/logs?name=env&follow=true") as response:
        assert (response.status, response.content_type) == (200, "application/x-ndjson")
        for number in range(3):
            await provider.write_log(env, f"line {number}")
            line = await asyncio.wait_for(response.content.readline(), PATIENCE)
            assert json.loads(line)["text"] == f"line {number}"
        assert provider.server.running == 1
    await provider.server.until(lambda: provider.server.running == 0, "the end of the stream")


async def test_the_info_has_the_gateways_shape(start: StartGateway) -> None:
    """Which faas-cli expects: the provider's own is a part of it."""
    gateway = await start()
    info = await document(gateway.url, "/system/info")
    assert info["provider"]["provider"] == "faasd"
    assert info["provider"]["orchestration"] == "containerd"
    assert info["provider"]["version"] == {"sha": "8b8a7a1e", "release": "0.19.0"}
    assert isinstance(info["version"]["release"], str)
    assert isinstance(info["version"]["sha"], str)
    assert isinstance(info["arch"], str)
    assert info["arch"]


async def functions(gateway: Daemon, query: str = "") -> dict[str, Any]:
    """The functions that the gateway lists, by name."""
    listed = await document(gateway.url, f"/system/functions{query}")
    found = {one["name"]: one for one in listed}
    assert len(found) == len(listed), "a name is listed twice"
    return found


async def test_the_list_has_the_functions_of_provider_and_file(start: StartGateway, provider: Provider) -> None:
    """Those of the file look like the others, and are in the default namespace only."""
    provider.deploy("env", namespace="dev")
    provider.deploy("other", labels={"a": "b"}, annotations={"c": "d"})
    gateway = await start(LOCAL + 'labels = { "team" = "x" }')
    found = await functions(gateway)
    assert set(found) == {"env", "other", "local"}
    assert (found["other"]["labels"], found["other"]["annotations"]) == ({"a": "b"}, {"c": "d"})
    assert (found["other"]["replicas"], found["local"]["replicas"]) == (1, 1)
    assert (found["local"]["namespace"], found["local"]["labels"]) == ("openfaas-fn", {"team": "x"})
    assert set(await functions(gateway, "?namespace=openfaas-fn")) == {"env", "other", "local"}
    dev = await functions(gateway, "?namespace=dev")
    assert {name: one["namespace"] for name, one in dev.items()} == {"env": "dev"}


async def test_a_name_that_file_and_provider_have_is_listed_once(start: StartGateway, function: Server) -> None:
    """As the one that is called: the file's, which can be looked up as well."""
    gateway = await start(f'[functions.env]\nurl = "{function.url}"\nlabels = {{ "mine" = "1" }}')
    assert (await functions(gateway))["env"]["labels"] == {"mine": "1"}
    assert (await document(gateway.url, "/system/function/env"))["labels"] == {"mine": "1"}


async def test_the_list_counts_invocations(start: StartGateway, provider: Provider) -> None:
    """From the gateway's own counters, whatever way a call came, each namespace for itself."""
    provider.deploy("env", namespace="dev")
    provider.deploy("idle")
    gateway = await start(LOCAL)
    for target in ("env", "env", "local", "env.dev"):
        assert (await ask(gateway.url, f"/function/{target}")).status == 200
    await gateway.final(await gateway.submit("env"))
    counts = {name: one.get("invocationCount", 0) for name, one in (await functions(gateway)).items()}
    assert counts == {"env": 3, "local": 1, "idle": 0}
    assert (await functions(gateway, "?namespace=dev"))["env"]["invocationCount"] == 1


async def test_alerts_are_not_implemented(start: StartGateway, provider: Provider) -> None:
    """501 with the reason: there is nothing to scale by them."""
    gateway = await start()
    reply = await ask(gateway.url, "/system/alert", method="POST", body=SECRET)
    assert_refused(reply, 501)
    assert reply.body.strip()
    assert provider.asked == []


async def test_the_rest_api_is_unavailable_while_the_provider_is_away(start: StartGateway, provider: Provider) -> None:
    """503 in one line, for each route that needs it."""
    gateway = await start()
    await provider.stop()
    for method, path in (
        *(("GET", "functions"), ("POST", "functions"), ("DELETE", "functions"), ("GET", "function/env")),
        *(("GET", "secrets"), ("GET", "logs?name=env"), ("GET", "namespaces"), ("POST", "scale-function/env")),
        ("GET", "info"),
    ):
        assert_unavailable(await ask(gateway.url, f"/system/{path}", method=method, body=SECRET))


# ---- changes through the gateway -------------------------------------------------------------------------------


async def change(gateway: Daemon, method: str, path: str, **body: Any) -> int:
    """A request of the REST API with a JSON body; the status."""
    return (await ask(gateway.url, f"/system/{path}", method=method, body=json.dumps(body).encode())).status


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_answer_is_passed_on_however_it_was_framed(daemon: StartDaemon, method: str) -> None:
    """Its chunks, and what its headers say of its connection, were for us."""
    head = b"HTTP/1.1 400 Bad Request\r\nX-Kept: yes\r\nTransfer-Encoding: chunked\r\n"
    hop = b"Connection: keep-alive, X-Hop\r\nKeep-Alive: timeout=5\r\nX-Hop: 1\r\n\r\n"
    async with rude_server(head + hop + b"5\r\nwrong\r\n0\r\n\r\n") as url:
        gateway = await daemon(f'[provider]\nurl = "{url}"\n')
        reply = await ask(gateway.url, "/system/functions", method=method)
    assert (reply.status, reply.body) == (400, b"wrong" if method == "GET" else b"")
    assert reply.headers["X-Kept"] == "yes"
    assert reply.headers.getall("Content-Length") == ["5"]
    assert reply.headers.getall("Connection") == ["close"]
    assert not reply.headers.keys() & {"Transfer-Encoding", "Keep-Alive", "X-Hop"}


async def test_a_deployed_function_is_accepted_and_known_at_once(start: StartGateway, provider: Provider) -> None:
    """202, as OpenFaaS's gateway answers, and the name is not unknown any more."""
    gateway = await start()
    assert (await ask(gateway.url, "/function/new")).status == 404
    assert await change(gateway, "POST", "functions", service="new", image="example/new:1") == 202
    assert (await ask(gateway.url, "/function/new")).status == 200
    assert (await gateway.final(await gateway.submit("new")))["status"] == "success"


async def test_an_updated_function_is_looked_up_again(start: StartGateway, provider: Provider) -> None:
    """202, and its new annotations count for the next call."""
    gateway = await start()
    assert (await gateway.final(await gateway.submit("env")))["queue"] == "faas-request"
    annotations = {"com.openfaas.queue": "other"}
    assert await change(gateway, "PUT", "functions", service="env", image="x", annotations=annotations) == 202
    assert (await gateway.final(await gateway.submit("env")))["queue"] == "other"


async def test_a_removed_function_is_not_called_any_more(start: StartGateway, provider: Provider) -> None:
    """404 at once, on both routes."""
    gateway = await start()
    assert (await ask(gateway.url, "/function/env")).status == 200
    assert await change(gateway, "DELETE", "functions", functionName="env", namespace="openfaas-fn") in (200, 202)
    for route in ("function", "async-function"):
        assert_refused(await ask(gateway.url, f"/{route}/env", method="POST", body=SECRET), 404)


async def test_a_function_that_was_scaled_to_zero_is_scaled_up_for_its_next_call(
    start: StartGateway, provider: Provider, env: Deployed
) -> None:
    """The name in the body counts, as at the provider, whatever the path says."""
    gateway = await start()
    assert (await ask(gateway.url, "/function/env")).status == 200
    body = {"serviceName": "env", "namespace": "openfaas-fn", "replicas": 0}
    assert await change(gateway, "POST", "scale-function/env", **body) in (200, 202)
    assert env.replicas == 0
    assert (await ask(gateway.url, "/function/env")).status == 200
    assert [scaling["replicas"] for scaling in provider.scalings()] == [0, 1]
    assert provider.misdirected == []


async def test_a_change_in_a_namespace_is_seen_there(start: StartGateway, provider: Provider, env: Deployed) -> None:
    """The namespace is in the body; the function of the same name elsewhere stays known."""
    provider.namespace_labels["dev"] = {"openfaas": "1"}
    gateway = await start()
    assert (await ask(gateway.url, "/function/env.dev")).status == 404
    assert await change(gateway, "POST", "functions", service="env", image="x", namespace="dev") == 202
    assert (await ask(gateway.url, "/function/env.dev")).status == 200
    assert await change(gateway, "DELETE", "functions", functionName="env", namespace="dev") in (200, 202)
    assert (await ask(gateway.url, "/function/env.dev")).status == 404
    assert (await ask(gateway.url, "/function/env")).status == 200


async def test_a_look_up_that_a_change_overtook_is_not_kept(start: StartGateway, provider: Provider) -> None:
    """What was answered before the function changed must not count for calls after it."""
    gateway = await start()
    provider.may_look_up.clear()
    waiting = asyncio.create_task(ask(gateway.url, "/async-function/env", method="POST"))
    await provider.until(lambda: len(provider.look_ups()) == 1, "the look-up")
    annotations = {"com.openfaas.queue": "other"}
    assert await change(gateway, "PUT", "functions", service="env", image="x", annotations=annotations) == 202
    provider.may_look_up.set()
    assert (await waiting).status == 202
    assert (await gateway.final(await gateway.submit("env")))["queue"] == "other"


async def test_what_the_provider_refused_is_passed_on(start: StartGateway, provider: Provider) -> None:
    """Only a success becomes a 202."""
    gateway = await start()
    reply = await ask(gateway.url, "/system/functions", method="POST", body=b'{"service": "env", "image": "x"}')
    assert (reply.status, b"already exists" in content(reply)) == (400, True)


# ---- credentials -----------------------------------------------------------------------------------------------

SYSTEM = [
    *("/system/functions", "/system/function/env", "/system/info", "/system/namespaces", "/system/namespace/"),
    *("/system/namespace/openfaas-fn", "/system/secrets", "/system/logs?name=env", "/system/scale-function/env"),
    *("/system/alert", "/system/calls", "/system/queues"),
]


async def guarded(start: StartGateway, folder: Path, more: str = "") -> tuple[Daemon, str]:
    """A daemon that asks for credentials other than the provider's, and the header that opens it."""
    gateway = await start(f"[auth]\n{credential_files(folder, 'auth', 'admin', 'gateway-password')}{more}")
    return gateway, f"Authorization: {basic('admin', 'gateway-password')}"


async def test_the_whole_rest_api_wants_credentials(start: StartGateway, provider: Provider, tmp_path: Path) -> None:
    """The routes too that the provider leaves open; it is asked nothing before they are right."""
    gateway, _ = await guarded(start, tmp_path)
    for path in SYSTEM:
        for method in ("GET", "POST", "PUT", "DELETE"):
            for headers in ((), (provider.credentials,)):
                reply = await ask(gateway.url, path, *headers, method=method, body=SECRET)
                assert reply.status == 401, (method, path)
                assert reply.headers["WWW-Authenticate"] == 'Basic realm="Restricted"'
    assert provider.asked == []


async def test_the_provider_gets_its_own_credentials(start: StartGateway, provider: Provider, tmp_path: Path) -> None:
    """And never those that a client sent to the gateway."""
    gateway, header = await guarded(start, tmp_path)
    for path in ("functions", "function/env", "info", "namespaces", "namespace/openfaas-fn", "secrets", "logs?name=x"):
        assert (await ask(gateway.url, f"/system/{path}", header)).status == 200, path
    assert len(provider.asked) >= 7
    for request in provider.asked:
        given = request.headers.getall("Authorization", [])
        assert given in ([], [basic(provider.user, provider.password)]), request


async def test_calling_functions_of_the_provider_needs_no_credentials(
    start: StartGateway, provider: Provider, tmp_path: Path
) -> None:
    """As for functions in the file."""
    gateway, _ = await guarded(start, tmp_path)
    assert (await ask(gateway.url, "/function/env")).status == 200
    assert (await ask(gateway.url, "/async-function/env", method="POST")).status == 202


async def test_calling_functions_of_the_provider_can_be_guarded_too(
    start: StartGateway, provider: Provider, env: Deployed, tmp_path: Path
) -> None:
    """With `auth.invoke`; nobody can find out which functions there are, and no function sees the credentials."""
    gateway, header = await guarded(start, tmp_path, "invoke = true")
    for route in ("function", "async-function"):
        for name in ("env", "nosuch"):
            assert (await ask(gateway.url, f"/{route}/{name}", method="POST")).status == 401
    assert provider.asked == []
    assert (await ask(gateway.url, "/function/env", header)).status == 200
    assert "Authorization" not in env.requests[0].headers


async def test_no_log_has_the_providers_credentials(start: StartGateway, provider: Provider) -> None:
    """However much is logged, and whatever goes wrong."""
    gateway = await start('[log]\nlevel = "debug"\nwrite_debug = true')
    assert (await ask(gateway.url, "/function/env")).status == 200
    assert (await ask(gateway.url, "/system/functions")).status == 200
    await provider.stop()
    assert_unavailable(await ask(gateway.url, "/system/functions"))
    assert provider.password not in gateway.log
    assert provider.credentials.rpartition(" ")[2] not in gateway.log


# ---- metrics ---------------------------------------------------------------------------------------------------


async def test_functions_of_the_provider_are_in_the_metrics(start: StartGateway, provider: Provider) -> None:
    """As name.namespace."""
    provider.deploy("env", namespace="dev")
    gateway = await start()
    assert (await ask(gateway.url, "/function/env")).status == 200
    await gateway.final(await gateway.submit("env.dev"))
    text = (await ask(gateway.url, "/metrics")).body.decode()
    for name in ("env.openfaas-fn", "env.dev"):
        sample = rf'gateway_function_invocation_total{{[^}}]*function_name="{re.escape(name)}"[^}}]*}} 1\.0'
        assert re.search(sample, text), name


async def test_replicas_of_the_provider_are_in_the_metrics(start: StartGateway, provider: Provider) -> None:
    """As the last look-up had them."""
    gateway = await start()
    await ask(gateway.url, "/function/env")
    text = (await ask(gateway.url, "/metrics")).body.decode()
    assert 'gateway_service_count{function_name="env.openfaas-fn"} 1.0' in text


async def test_names_that_the_provider_does_not_know_are_not_in_the_metrics(
    start: StartGateway, provider: Provider
) -> None:
    """Nor those that nobody could look up, or a stranger could fill the memory of daemon and Prometheus."""
    gateway = await start()
    for route in ("function", "async-function"):
        for name in ("stranger", "env.stranger", "stranger.openfaas-fn"):
            assert (await ask(gateway.url, f"/{route}/{name}", method="POST")).status == 404
    await provider.stop()
    assert_unavailable(await ask(gateway.url, "/function/stranger2"))
    assert b"stranger" not in (await ask(gateway.url, "/metrics")).body


# ---- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('url = "not a url"', "provider.url"),
        ('url = "ftp://127.0.0.1"', "provider.url"),
        ('url = "http://127.0.0.1:1"\ncache = "soon"', "provider.cache"),
        ('url = "http://127.0.0.1:1"\nscale_timeout = 5', "provider.scale_timeout"),
        ('url = "http://127.0.0.1:1"\nscale_from_zero = "yes"', "provider.scale_from_zero"),
        ('url = "http://127.0.0.1:1"\nscale_timout = "5s"', "did you mean scale_timeout?"),
        ('url = "http://127.0.0.1:1"\nuser_file = "nosuch"\npassword_file = "nosuch"', "provider."),
    ],
)
async def test_a_mistake_in_the_settings_is_told(tmp_path: Path, line: str, words: str) -> None:
    """Exit status 78, and a line that names the key."""
    config = tmp_path / "config.toml"
    config.write_text(f"[provider]\n{line}\n")
    result = await faasd("check", "--config", config)
    assert (result.code, words in result.err) == (78, True), result


async def test_a_slash_at_the_end_of_the_url_does_no_harm(
    daemon: StartDaemon, provider: Provider, env: Deployed, tmp_path: Path
) -> None:
    """People copy URLs with one, and faasd redirects a double one."""
    files = credential_files(tmp_path, "provider", provider.user, provider.password)
    gateway = await daemon(f'[provider]\nurl = "{provider.url}/"\n{files}')
    assert (await ask(gateway.url, "/function/env/path")).status == 200
    assert env.requests[0].target == "/path"


# ---- without a provider ----------------------------------------------------------------------------------------


@pytest.fixture
async def alone(daemon: StartDaemon, function: Server) -> Daemon:
    """A daemon with two functions and no provider."""
    return await daemon(
        f'[functions.echo]\nurl = "{function.url}/hidden"\n'
        'labels = { "team" = "x" }\nannotations = { "com.openfaas.queue" = "slow" }\n'
        '[functions.upper]\ncommand = ["tr", "a-z", "A-Z"]\n'
    )


async def test_without_a_provider_the_functions_of_the_file_are_listed(alone: Daemon) -> None:
    """In OpenFaaS's form, with counts, and without telling how they are run."""
    assert (await ask(alone.url, "/function/echo")).status == 200
    found = await functions(alone)
    assert set(found) == {"echo", "upper"} == set(await functions(alone, "?namespace=openfaas-fn"))
    echo = found["echo"]
    assert (echo["namespace"], echo["replicas"], echo["availableReplicas"]) == ("openfaas-fn", 1, 1)
    assert (echo["labels"], echo["annotations"]) == ({"team": "x"}, {"com.openfaas.queue": "slow"})
    assert isinstance(echo["image"], str)
    assert (echo["invocationCount"], found["upper"].get("invocationCount", 0)) == (1, 0)
    text = json.dumps(found)
    assert "hidden" not in text
    assert "a-z" not in text


async def test_without_a_provider_a_function_of_the_file_is_described(alone: Daemon) -> None:
    """By its name; what is not there is a 404."""
    for query in ("", "?namespace=openfaas-fn&usage=1"):
        found = await document(alone.url, f"/system/function/echo{query}")
        assert (found["name"], found["namespace"], found["availableReplicas"]) == ("echo", "openfaas-fn", 1)
        assert found["labels"] == {"team": "x"}
    for target in ("nosuch", "echo?namespace=dev"):
        assert (await ask(alone.url, f"/system/function/{target}")).status == 404, target


async def test_without_a_provider_the_info_is_the_daemons_own(alone: Daemon) -> None:
    """In the shape that faas-cli expects, with all names given."""
    info = await document(alone.url, "/system/info")
    for value in (info["provider"]["provider"], info["provider"]["orchestration"], info["version"]["release"]):
        assert isinstance(value, str)
        assert value
    assert set(info["provider"]["version"]) >= {"release", "sha"} <= set(info["version"])
    assert info["arch"]


async def test_without_a_provider_there_is_one_namespace(daemon: StartDaemon) -> None:
    """That of the file's functions."""
    gateway = await daemon("")
    assert await document(gateway.url, "/system/namespaces") == ["openfaas-fn"]
    await gateway.terminate()
    gateway.configure('[gateway]\nnamespace = "lab"\n[functions.echo]\ncommand = ["cat"]')
    await gateway.start()
    assert await document(gateway.url, "/system/namespaces") == ["lab"]
    assert (await functions(gateway))["echo"]["namespace"] == "lab"


async def test_without_a_provider_there_are_no_secrets_and_no_logs(alone: Daemon) -> None:
    """Empty answers in the right form, rather than errors."""
    assert await document(alone.url, "/system/secrets") == []
    for query in ("name=echo", "name=echo&follow=true&tail=5", "name=nosuch"):
        reply = await ask(alone.url, f"/system/logs?{query}")
        assert (reply.status, reply.headers["Content-Type"]) == (200, "application/x-ndjson"), query
        assert content(reply) == b""


async def test_without_a_provider_nothing_can_be_changed(alone: Daemon) -> None:
    """405 with a line that says where functions are defined."""
    for method, path in (
        *(("POST", "functions"), ("PUT", "functions"), ("DELETE", "functions"), ("POST", "scale-function/echo")),
        *(("POST", "secrets"), ("PUT", "secrets"), ("DELETE", "secrets"), ("POST", "namespace/dev")),
        *(("PUT", "namespace/dev"), ("DELETE", "namespace/dev")),
    ):
        assert_refused(await ask(alone.url, f"/system/{path}", method=method, body=SECRET), 405, "TOML")
    assert (await ask(alone.url, "/function/echo")).status == 200


async def test_without_a_provider_a_refusal_tells_what_is_allowed(alone: Daemon) -> None:
    """What can't be read either allows nothing (RFC 9110 10.2.1), and what does not exist is no 405."""
    for method, path, status, allowed in (
        ("POST", "functions", 405, "GET, HEAD"),
        ("POST", "scale-function/echo", 405, ""),
        ("GET", "scale-function/echo", 405, ""),
        ("GET", "scale-function/nosuch", 405, ""),
        ("POST", "nosuch", 404, None),
        ("GET", "nosuch", 404, None),
    ):
        reply = await ask(alone.url, f"/system/{path}", method=method)
        assert (reply.status, reply.headers.get("Allow")) == (status, allowed), (method, path)


async def test_without_a_provider_the_rest_api_wants_credentials_too(
    daemon: StartDaemon, tmp_path: Path, provider: Provider
) -> None:
    """Each of its routes."""
    gateway = await daemon(f"[auth]\n{credential_files(tmp_path, 'auth', 'admin', 'gateway-password')}")
    for path in SYSTEM:
        reply = await ask(gateway.url, path)
        assert (reply.status, reply.headers.get("WWW-Authenticate")) == (401, 'Basic realm="Restricted"'), path


@pytest.mark.parametrize("body", [b"<html>sign in</html>", b"[]", b'{"labels": 1}'])
async def test_a_look_up_that_finds_something_else_than_a_provider_says_so(
    daemon: StartDaemon, function: Server, body: bytes
) -> None:
    """A web page at the provider's address is no function, and no reason to burn a call."""
    function.behaviour = answer(200, body)
    gateway = await daemon(f'[provider]\nurl = "{function.url}"')
    for path, method in (("/function/env", "GET"), ("/async-function/env", "POST")):
        reply = await ask(gateway.url, path, method=method)
        assert (reply.status, b"look-up of env" in reply.body) == (503, True), reply
