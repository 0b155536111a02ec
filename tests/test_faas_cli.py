"""What faas-cli 0.16 sends, as a real client: with a faasd provider behind the gateway, and without one.

Requests as its `proxy` package and OpenFaaS's Go SDK make them, and the statuses and fields that these look at.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import PATIENCE, Daemon, Server, StartDaemon, answer
from provider import Deployed, Provider, basic, credential_files, running_provider

USER, PASSWORD = "admin", "basic-auth-password"
DONE = (200, 201, 202)  # what faas-cli takes for success, where it is not choosy


@dataclass(frozen=True)
class Answered:
    """An answer as faas-cli reads it."""

    status: int
    body: bytes

    @property
    def document(self) -> Any:
        """The JSON in the body of a 200."""
        assert self.status == 200, self
        return json.loads(self.body)


class FaasCli:
    """The requests of faas-cli."""

    def __init__(self, session: aiohttp.ClientSession, url: str, password: str = PASSWORD) -> None:
        self._session, self._url = session, url
        self._auth = basic(USER, password)

    async def send(self, method: str, path: str, body: Any = None, **query: str) -> Answered:
        """A request of the REST API: always with credentials, and JSON in the body."""
        headers = {"Authorization": self._auth}
        if body is not None:
            headers["Content-Type"] = "application/json"
        data = None if body is None else json.dumps(body).encode()
        async with self._session.request(
            method, self._url + path, params=query, data=data, headers=headers
        ) as response:
            return Answered(response.status, await response.read())

    async def deploy(self, name: str, image: str, **more: Any) -> list[int]:
        """`deploy` tries an update first, and makes the function when there is none. The statuses."""
        spec = {"service": name, "image": image, "namespace": "openfaas-fn", "labels": {}, "annotations": {}, **more}
        statuses = [(await self.send("PUT", "/system/functions", spec)).status]
        if statuses == [404]:
            statuses.append((await self.send("POST", "/system/functions", spec)).status)
        return statuses

    async def invoke(self, name: str, body: bytes, *, route: str = "function", **query: str) -> Answered:
        """`invoke` sends no credentials: they are none of the function's business."""
        headers = {"Content-Type": "text/plain"}
        url = f"{self._url}/{route}/{name}"
        async with self._session.post(url, params=query, data=body, headers=headers) as response:
            return Answered(response.status, await response.read())

    def logs(self, name: str, **query: str) -> Any:
        """`logs` reads a stream of JSON objects."""
        headers = {"Authorization": self._auth}
        query = {"name": name, "namespace": "openfaas-fn", **query}
        return self._session.get(f"{self._url}/system/logs", params=query, headers=headers)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Go's HTTP client: this User-Agent, and gzip is welcome."""
    async with aiohttp.ClientSession(
        headers={"User-Agent": "faas-cli/0.16.38", "Accept-Encoding": "gzip"},
        skip_auto_headers=("Accept", "Content-Type"),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(PATIENCE),
    ) as one:
        yield one


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    """A provider with one function, `env`, and the credentials of the host."""
    async with running_provider() as one:
        one.user, one.password = USER, PASSWORD
        one.deploy("env", labels={"com.example": "1"})
        yield one


@pytest.fixture
def env(provider: Provider) -> Deployed:
    """The function that the provider has."""
    return provider.functions["openfaas-fn", "env"]


@pytest.fixture
async def gateway(daemon: StartDaemon, provider: Provider, tmp_path: Path) -> Daemon:
    """A daemon as on a faasd host: one pair of credentials for itself and the provider."""
    files = credential_files(tmp_path, "auth", USER, PASSWORD)
    gateway = await daemon(f'[auth]\n{files}[provider]\nurl = "{provider.url}"\ncache = "1h"')
    provider.host_url = gateway.url
    return gateway


@pytest.fixture
def cli(session: aiohttp.ClientSession, gateway: Daemon) -> FaasCli:
    """faas-cli, logged in."""
    return FaasCli(session, gateway.url)


# ---- with a provider -------------------------------------------------------------------------------------------


async def test_login_succeeds_with_the_right_password_alone(
    session: aiohttp.ClientSession, gateway: Daemon, cli: FaasCli
) -> None:
    """It asks for the functions; 200 is success, 401 a wrong password."""
    assert (await cli.send("GET", "/system/functions")).status == 200
    assert (await FaasCli(session, gateway.url, "wrong").send("GET", "/system/functions")).status == 401


async def test_list_shows_functions_with_their_invocations(cli: FaasCli) -> None:
    """Name, image, invocations, replicas."""
    for _ in range(2):
        assert (await cli.invoke("env", b"x")).status == 200
    for query in ({}, {"namespace": "openfaas-fn"}):
        (found,) = (await cli.send("GET", "/system/functions", **query)).document
        assert (found["name"], found["image"]) == ("env", "ghcr.io/openfaas/env:latest")
        assert (found["invocationCount"], found["replicas"], found["namespace"]) == (2, 1, "openfaas-fn")


async def test_describe_shows_a_function(cli: FaasCli) -> None:
    """It is "Ready" when a replica is available."""
    found = (await cli.send("GET", "/system/function/env", namespace="openfaas-fn", usage="1")).document
    assert (found["name"], found["availableReplicas"], found["labels"]) == ("env", 1, {"com.example": "1"})
    assert (await cli.send("GET", "/system/function/nosuch", namespace="openfaas-fn", usage="1")).status == 404


async def test_describe_shows_a_function_that_sleeps(cli: FaasCli, env: Deployed) -> None:
    """And does not wake it up: the missing fields are zeros to Go."""
    env.replicas = 0
    found = (await cli.send("GET", "/system/function/env", namespace="openfaas-fn", usage="1")).document
    assert (found.get("replicas", 0), found.get("availableReplicas", 0)) == (0, 0)
    assert env.replicas == 0


async def test_deploy_makes_a_new_function(cli: FaasCli, provider: Provider) -> None:
    """The update finds none, the creation is accepted; then it can be called."""
    provider.images["example/figlet:1"] = answer(body=b"figlet")
    assert (await cli.invoke("figlet", b"")).status == 404
    assert await cli.deploy("figlet", "example/figlet:1", envProcess="figlet", secrets=[]) == [404, 202]
    assert await cli.invoke("figlet.openfaas-fn", b"x") == Answered(200, b"figlet")


async def test_deploy_updates_a_function(cli: FaasCli, provider: Provider) -> None:
    """202, and the next call gets the new one."""
    provider.images["example/env:2"] = answer(body=b"the second")
    assert await cli.invoke("env", b"") == Answered(200, b"ok")
    assert await cli.deploy("env", "example/env:2") == [202]
    assert await cli.invoke("env", b"") == Answered(200, b"the second")


async def test_deploy_shows_why_it_failed(cli: FaasCli) -> None:
    """The provider's reason, with its status."""
    spec = {"service": "new", "image": "example/new:1", "secrets": ["nosuch"]}
    reply = await cli.send("POST", "/system/functions", spec)
    assert reply == Answered(400, b"unable to find secret: nosuch\n")


async def test_invoke_calls_a_function(cli: FaasCli, env: Deployed) -> None:
    """By its name, or its name and namespace, with a query."""
    for name in ("env", "env.openfaas-fn"):
        assert await cli.invoke(name, b"hello", q="1") == Answered(200, b"ok")
    assert [(request.target, request.body) for request in env.requests] == [("/?q=1", b"hello")] * 2
    assert {request.headers["User-Agent"] for request in env.requests} == {"faas-cli/0.16.38"}


async def test_invoke_async_is_accepted(cli: FaasCli, provider: Provider, env: Deployed) -> None:
    """202, and the function runs."""
    for name in ("env", "env.openfaas-fn"):
        assert await cli.invoke(name, b"hello", route="async-function") == Answered(202, b"")
    await provider.until(lambda: len(env.requests) == 2, "two calls")
    assert {(request.method, request.body) for request in env.requests} == {("POST", b"hello")}
    assert (await cli.invoke("nosuch.openfaas-fn", b"hello", route="async-function")).status == 404


async def test_logs_shows_what_there_is(cli: FaasCli, provider: Provider, env: Deployed) -> None:
    """Up to its end, the newest lines only when so asked."""
    for number in range(3):
        await provider.write_log(env, f"line {number}")
    async with cli.logs("env", follow="false", tail="2") as response:
        assert response.status == 200
        lines = [json.loads(line) for line in (await response.read()).splitlines()]
    assert [(line["name"], line["text"]) for line in lines] == [("env", "line 1"), ("env", "line 2")]
    (request,) = provider.seen("/system/logs")
    assert request.target == "/system/logs?name=env&namespace=openfaas-fn&follow=false&tail=2"


async def test_logs_follows(cli: FaasCli, provider: Provider, env: Deployed) -> None:
    """A line is shown when it is written."""
    async with cli.logs("env", follow="true", since="2026-11-20T22:34:16Z") as response:
        for number in range(3):
            await provider.write_log(env, f"line {number}")
            line = await asyncio.wait_for(response.content.readline(), PATIENCE)
            assert json.loads(line)["text"] == f"line {number}"


async def test_remove_takes_a_function_away(cli: FaasCli, provider: Provider) -> None:
    """Its name is in the body, the namespace there and in the query; the second time there is none."""
    body = {"functionName": "env", "namespace": "openfaas-fn"}
    assert (await cli.invoke("env", b"")).status == 200
    assert (await cli.send("DELETE", "/system/functions", body, namespace="openfaas-fn")).status in DONE
    assert provider.functions == {}
    assert (await cli.invoke("env", b"")).status == 404
    assert (await cli.send("DELETE", "/system/functions", body, namespace="openfaas-fn")).status == 404


async def test_scale_changes_the_replicas(cli: FaasCli, env: Deployed) -> None:
    """Down to none; 404 for a function that is not there."""
    body = {"serviceName": "env", "namespace": "openfaas-fn", "replicas": 0}
    assert (await cli.send("POST", "/system/scale-function/env", body)).status in DONE
    assert env.replicas == 0
    body["serviceName"] = "nosuch"
    assert (await cli.send("POST", "/system/scale-function/nosuch", body)).status == 404


async def test_secrets_are_created_listed_updated_and_removed(cli: FaasCli, provider: Provider) -> None:
    """`secret create`, `list`, `update`, `remove`."""
    secret = {"name": "token", "namespace": "openfaas-fn"}
    assert (await cli.send("GET", "/system/secrets", namespace="openfaas-fn")).document == []
    assert (await cli.send("POST", "/system/secrets", {**secret, "value": "one"})).status in DONE
    assert (await cli.send("GET", "/system/secrets", namespace="openfaas-fn")).document == [secret]
    assert (await cli.send("PUT", "/system/secrets", {**secret, "value": "two"})).status in (200, 202)
    assert provider.secret_values == {("openfaas-fn", "token"): "two"}
    assert (await cli.send("DELETE", "/system/secrets", secret)).status in (200, 202)
    assert (await cli.send("GET", "/system/secrets", namespace="openfaas-fn")).document == []


async def test_namespaces_lists_namespaces(cli: FaasCli, provider: Provider) -> None:
    """An array of names."""
    provider.deploy("env", namespace="dev")
    assert (await cli.send("GET", "/system/namespaces")).document == ["openfaas-fn", "dev"]


async def test_version_shows_gateway_and_provider(cli: FaasCli) -> None:
    """The fields that it prints."""
    info = (await cli.send("GET", "/system/info")).document
    assert (info["provider"]["provider"], info["provider"]["orchestration"]) == ("faasd", "containerd")
    assert info["provider"]["version"]["release"] == "0.19.0"
    assert all(isinstance(info["version"][key], str) for key in ("release", "sha"))


async def test_without_credentials_nothing_is_told(session: aiohttp.ClientSession, gateway: Daemon) -> None:
    """401 is what faas-cli answers with "run faas-cli login"."""
    cli = FaasCli(session, gateway.url, "wrong")
    for path in ("functions", "function/env", "info", "namespaces", "secrets", "logs"):
        assert (await cli.send("GET", f"/system/{path}", name="env")).status == 401, path


# ---- without a provider ----------------------------------------------------------------------------------------


@pytest.fixture
async def alone(session: aiohttp.ClientSession, daemon: StartDaemon, function: Server, tmp_path: Path) -> FaasCli:
    """faas-cli, logged in to a daemon that has a function, `echo`, and no provider."""
    files = credential_files(tmp_path, "auth", USER, PASSWORD)
    gateway = await daemon(f'[auth]\n{files}[functions.echo]\nurl = "{function.url}"\nlabels = {{ "a" = "b" }}')
    return FaasCli(session, gateway.url)


async def test_list_and_login_without_a_provider(alone: FaasCli) -> None:
    """The functions of the file, with their counts."""
    assert (await alone.invoke("echo.openfaas-fn", b"hello")).status == 200
    for query in ({}, {"namespace": "openfaas-fn"}):
        (found,) = (await alone.send("GET", "/system/functions", **query)).document
        assert (found["name"], found["invocationCount"], found["replicas"]) == ("echo", 1, 1)
        assert isinstance(found["image"], str)


async def test_describe_without_a_provider(alone: FaasCli) -> None:
    """A function of the file is always ready."""
    found = (await alone.send("GET", "/system/function/echo", namespace="openfaas-fn", usage="1")).document
    assert (found["name"], found["availableReplicas"], found["labels"]) == ("echo", 1, {"a": "b"})
    assert (await alone.send("GET", "/system/function/nosuch", namespace="openfaas-fn", usage="1")).status == 404


async def test_invoke_without_a_provider(alone: FaasCli, function: Server) -> None:
    """Directly and in the background."""
    assert await alone.invoke("echo.openfaas-fn", b"hello") == Answered(200, b"ok")
    assert await alone.invoke("echo.openfaas-fn", b"hello", route="async-function") == Answered(202, b"")
    assert [request.body for request in await function.wait_for(2)] == [b"hello", b"hello"]


async def test_logs_without_a_provider(alone: FaasCli) -> None:
    """There are none, and following them ends."""
    for follow in ("true", "false"):
        async with alone.logs("echo", follow=follow) as response:
            assert (response.status, response.content_type) == (200, "application/x-ndjson")
            assert await response.read() == b""


async def test_secrets_and_namespaces_without_a_provider(alone: FaasCli) -> None:
    """No secrets, one namespace."""
    assert (await alone.send("GET", "/system/secrets", namespace="openfaas-fn")).document == []
    assert (await alone.send("GET", "/system/namespaces")).document == ["openfaas-fn"]


async def test_a_namespace_without_a_provider(alone: FaasCli) -> None:
    """That of the file is described, and another one is not there; neither is what OpenFaaS does not have."""
    described = await alone.send("GET", "/system/namespace/openfaas-fn")
    assert described.document == {"name": "openfaas-fn", "labels": {}, "annotations": {}}
    for path, said in (
        ("/system/namespace/elsewhere", b"no such namespace: it is not in the configuration\n"),
        ("/system/function/nosuch", b"no such function: it is not in the configuration\n"),
        ("/system/nosuch", b"no such route below /system\n"),
    ):
        refused = await alone.send("GET", path)
        assert (refused.status, refused.body) == (404, said)


async def test_a_provider_that_is_none_is_told(
    session: aiohttp.ClientSession, daemon: StartDaemon, function: Server
) -> None:
    """Such as another program at its address, which has a page for everything."""
    function.behaviour = answer(body=b"<html>")
    gateway = await daemon(f'[provider]\nurl = "{function.url}"')
    cli = FaasCli(session, gateway.url)
    for path in ("/system/functions", "/system/info"):
        refused = await cli.send("GET", path)
        assert (refused.status, refused.body) == (503, f"the provider's answer to {path}: expected JSON\n".encode())


@pytest.mark.parametrize("said", [b"[" * 100_000, b'{"a":' * 100_000, b'"x"', b"[1]", b'{"a": 1}', b'[{"name": "x"}]'])
async def test_a_list_that_is_none_of_functions_is_told(
    session: aiohttp.ClientSession, daemon: StartDaemon, function: Server, said: bytes
) -> None:
    """JSON, but not what a provider says, or nested so deeply that nobody can read it: no failure of ours."""
    function.behaviour = answer(body=said)
    gateway = await daemon(f'[provider]\nurl = "{function.url}"')
    cli = FaasCli(session, gateway.url)
    refused = await cli.send("GET", "/system/functions")
    assert (refused.status, refused.body.split(b":")[0]) == (503, b"the provider's answer to /system/functions")
    assert "in this program itself" not in gateway.log


@pytest.mark.parametrize("route", ["function", "async-function"])
async def test_a_description_that_is_nested_too_deeply_is_none(
    session: aiohttp.ClientSession, daemon: StartDaemon, function: Server, route: str
) -> None:
    """The caller hears that it is the provider's doing, on either route."""
    function.behaviour = answer(body=b'{"a":' * 100_000)
    gateway = await daemon(f'[provider]\nurl = "{function.url}"')
    refused = await FaasCli(session, gateway.url).send("POST", f"/{route}/some")
    assert (refused.status, b"describes no function" in refused.body) == (503, True)


@pytest.mark.parametrize(("said", "told"), [("null", "has no replicas"), ('"1"', "describes no function")])
async def test_replicas_that_are_no_number_are_none(
    session: aiohttp.ClientSession, daemon: StartDaemon, function: Server, said: str, told: str
) -> None:
    """Such a function isn't called; in JSON, null is what is not there."""
    function.behaviour = answer(body=b'{"name": "some", "replicas": 1, "availableReplicas": %b}' % said.encode())
    gateway = await daemon(f'[provider]\nurl = "{function.url}"\nscale_timeout = "1s"')
    refused = await FaasCli(session, gateway.url).send("POST", "/function/some")
    assert (refused.status, told in refused.body.decode()) == (503, True), refused.body
    assert not any(request.target.startswith("/function/") for request in function.requests)


async def test_a_list_of_functions_that_go_writes_as_null_is_empty(
    session: aiohttp.ClientSession, daemon: StartDaemon, function: Server
) -> None:
    """A provider in Go says so of a list that it has never begun."""
    function.behaviour = answer(body=b"null")
    gateway = await daemon(f'[provider]\nurl = "{function.url}"')
    assert (await FaasCli(session, gateway.url).send("GET", "/system/functions")).document == []


async def test_a_lone_surrogate_of_the_provider_passes_as_an_escape(
    session: aiohttp.ClientSession, daemon: StartDaemon, function: Server
) -> None:
    """JSON may have one; UTF-8 has no bytes for it."""
    function.behaviour = answer(body=b'[{"name": "half\\ud83d", "namespace": "openfaas-fn"}]')
    gateway = await daemon(f'[provider]\nurl = "{function.url}"')
    listed = await FaasCli(session, gateway.url).send("GET", "/system/functions")
    assert [function["name"] for function in listed.document] == ["half\ud83d"]


async def test_version_without_a_provider(alone: FaasCli) -> None:
    """The fields that it prints are there and are not empty."""
    info = (await alone.send("GET", "/system/info")).document
    assert all(info["provider"][key] for key in ("provider", "orchestration"))
    assert all(isinstance(info["provider"]["version"][key], str) for key in ("release", "sha"))
    assert info["version"]["release"]


async def test_deploy_and_remove_without_a_provider(alone: FaasCli) -> None:
    """Refused with the reason, which faas-cli prints."""
    for method, body in (
        ("PUT", {"service": "new", "image": "example/new:1"}),
        ("POST", {"service": "new", "image": "example/new:1"}),
        ("DELETE", {"functionName": "echo", "namespace": "openfaas-fn"}),
    ):
        reply = await alone.send(method, "/system/functions", body)
        assert (reply.status, b"TOML" in reply.body, reply.body.count(b"\n") <= 1) == (405, True, True), method
