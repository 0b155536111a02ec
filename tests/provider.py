"""A faasd provider to test with: a real HTTP server that answers as faasd 0.19.0 does, traps included.

It runs no containers: a function is a behaviour, as in `conftest.Server`. The rest is as it was observed on the real
one: which routes want credentials and which do not, what unknown functions, functions scaled to zero and dead ones
look like, which paths are redirected, and when a connection is cut without an answer.
"""

import asyncio
import base64
import contextlib
import json
import posixpath
import random
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import aiohttp
import yarl
from aiohttp import web
from conftest import PATIENCE, Behaviour, Request, Server, ok
from multidict import CIMultiDict

NAMESPACE = "openfaas-fn"
CREATED_AT = "2026-11-20T22:34:16.300669269Z"
CALLABLE = {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"}

# The provider's routes, their methods, and whether they want credentials. A wrong method is told before them.
ROUTES: list[tuple[str, str, set[str], bool]] = [
    ("healthz", r"/healthz", {"GET"}, False),
    ("metrics", r"/metrics", {"GET"}, False),
    ("info", r"/system/info", {"GET"}, True),
    ("functions", r"/system/functions", {"GET", "POST", "PUT", "DELETE"}, True),
    ("look_up", r"/system/function/([-a-zA-Z_0-9]+)", {"GET"}, True),
    ("scale", r"/system/scale-function/([-a-zA-Z_0-9]+)", {"POST"}, True),
    ("secrets", r"/system/secrets", {"GET", "POST", "PUT", "DELETE"}, True),
    ("logs", r"/system/logs", {"GET"}, True),
    ("namespaces", r"/system/namespaces", {"GET"}, False),
    ("namespace", r"/system/namespace/([-a-zA-Z_0-9]*)", {"GET", "POST", "PUT", "DELETE"}, False),
]


def error(status: int, text: str, internal: bool = False) -> web.Response:
    """An error as Go's http.Error writes it; `internal`: one of the provider's own about a call."""
    response = web.Response(status=status, text=text + "\n", headers={"X-Content-Type-Options": "nosniff"})
    if internal:
        response.headers["X-Openfaas-Internal"] = "proxy"
    return response


def basic(user: str, password: str) -> str:
    """The value of an Authorization header."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def as_json(document: object, content_type: str = "application/json") -> web.Response:
    """A JSON document, with no newline at its end."""
    return web.Response(body=json.dumps(document).encode(), headers={"Content-Type": content_type})


@dataclass(eq=False)
class Deployed:
    """A function that the provider has."""

    name: str
    namespace: str = NAMESPACE
    image: str = "ghcr.io/openfaas/env:latest"
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    replicas: int = 1
    behaviour: Behaviour = ok
    listening: bool = True  # False: it is there, but refuses the provider's connection
    pauses_on_call: bool = False  # True: the next call finds it scaled to zero, whatever was looked up before
    ready: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: scaled up, but not available yet
    requests: list[Request] = field(default_factory=list)  # what reached it; `target` is its own, without its name
    running: int = 0
    most_running: int = 0
    logs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ready.set()

    @property
    def available(self) -> int:
        """How many replicas can be called."""
        return self.replicas if self.ready.is_set() else 0

    def status(self, listed: bool = False) -> dict[str, Any]:
        """What the provider tells about it. A replica field that is zero is not there at all."""
        found: dict[str, Any] = {"name": self.name, "image": self.image, "namespace": self.namespace}
        found |= {"labels": self.labels, "annotations": self.annotations}
        if self.replicas:
            found["replicas"] = self.replicas
        if self.available and not listed:
            found["availableReplicas"] = self.available
        return {**found, "createdAt": CREATED_AT}


class Provider:
    """The provider: `server` has the requests as they came, `function()` and `deploy()` the functions."""

    def __init__(self, user: str = "provider-user", password: str = "provider-password") -> None:
        self.user, self.password = user, password
        self.server = Server()
        self.server.behaviour = self._connected
        self.functions: dict[tuple[str, str], Deployed] = {}  # by namespace and name
        self.images: dict[str, Behaviour] = {}  # what functions do that are deployed by HTTP with this image
        self.secret_values: dict[tuple[str, str], str] = {}  # by namespace and name
        self.namespace_labels: dict[str, dict[str, str]] = {NAMESPACE: {"openfaas": "1"}}
        self.host_url = ""  # "port 8080 of the own host", which is called instead of a function with no replicas
        self.misdirected: list[Request] = []  # calls of functions with no replicas
        self.service_timeout: float | None = None  # a call that takes longer is cut off without an answer
        self.scale_error = ""  # why scaling does not work
        self.may_look_up, self.may_scale = asyncio.Event(), asyncio.Event()  # cleared: such answers are held back
        self.may_look_up.set()
        self.may_scale.set()
        self.cuts_reused = False  # True: a connection turns out to be closed when a second request is sent on it
        self.cut = 0  # how many requests met that
        self._idle: set[asyncio.Transport] = set()
        self._used: set[asyncio.Transport] = set()
        self._news = asyncio.Condition()  # notified when a request comes or ends, a function runs, or a log grows
        self._session: aiohttp.ClientSession | None = None

    # -- what tests do with it

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.server.url

    @property
    def credentials(self) -> str:
        """The header line that opens it."""
        return f"Authorization: {basic(self.user, self.password)}"

    async def start(self) -> None:
        """Listen, on the same port as before when it was stopped."""
        self._session = aiohttp.ClientSession(
            auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(PATIENCE)
        )
        await self.server.start()

    async def stop(self) -> None:
        """Close all connections; from now on new ones are refused. Functions and secrets stay."""
        await self.server.stop()
        if self._session is not None:
            await self._session.close()
            self._session = None
        self._idle.clear()
        self._used.clear()

    async def close(self) -> None:
        """End of the test."""
        await self.stop()
        await self.server.close()

    def deploy(self, name: str, behaviour: Behaviour = ok, **more: Any) -> Deployed:
        """Add or replace a function, with these attributes."""
        function = Deployed(name, behaviour=behaviour, **more)
        self.namespace_labels.setdefault(function.namespace, {"openfaas": "1"})
        self.functions[function.namespace, name] = function
        return function

    def remove(self, function: Deployed) -> None:
        """Take a function away."""
        del self.functions[function.namespace, function.name]

    async def write_log(self, function: Deployed, text: str) -> None:
        """The function prints a line."""
        function.logs.append(text)
        await self._tell()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def until(self, condition: Callable[[], bool], what: str = "condition") -> None:
        """Wait until `condition`, which is about what came here, holds."""
        async with self._news:
            try:
                await asyncio.wait_for(self._news.wait_for(condition), PATIENCE)
            except TimeoutError:
                raise AssertionError(f"{what}: not met with {len(self.server.requests)} requests") from None

    async def close_idle(self) -> int:
        """Close the connections that wait for a next request; how many there were."""
        idle = [transport for transport in self._idle if not transport.is_closing()]
        for transport in idle:
            transport.close()
        self._idle.clear()
        return len(idle)

    @property
    def asked(self) -> list[Request]:
        """The requests so far, without the daemon's own looks at the annotations of all functions."""
        looks = re.compile(r"/system/namespaces|/system/functions\?namespace=.*")
        own = [one for one in self.server.requests if looks.fullmatch(one.target) and "Content-Type" in one.headers]
        return [one for one in self.server.requests if one not in own]

    def seen(self, path: str, method: str = "GET") -> list[Request]:
        """Those of them with this method and a path that begins like this."""
        return [one for one in self.asked if one.method == method and one.target.startswith(path)]

    def look_ups(self, name: str = "") -> list[Request]:
        """The look-ups so far, of one function or of all."""
        exact = re.compile(re.escape(f"/system/function/{name}") + (r"(\?|$)" if name else ""))
        return [one for one in self.seen("/system/function/") if exact.match(one.target)]

    def scalings(self) -> list[Any]:
        """The bodies of the requests to scale so far."""
        return [json.loads(one.body) for one in self.seen("/system/scale-function/", "POST")]

    # -- connections and routes

    async def _connected(self, request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        """Do what depends on the connection, then answer."""
        transport = request.transport
        if transport is None:
            raise ConnectionResetError
        if self.cuts_reused and transport in self._used:
            self.cut += 1
            return await self._hang_up(request)
        self._idle.discard(transport)
        self._used.add(transport)
        await self._tell()
        try:
            return await self._routed(request, seen)
        finally:
            self._idle.add(transport)
            await self._tell()

    async def _hang_up(self, request: web.BaseRequest) -> web.StreamResponse:
        """Close the connection; nothing is answered."""
        assert request.transport is not None
        request.transport.close()
        await asyncio.Event().wait()  # until the lost connection cancels us
        raise AssertionError("unreachable")

    async def _routed(self, request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        raw_path, _, query = seen.target.partition("?")
        path = unquote(raw_path)
        clean = posixpath.normpath("/" + path.lstrip("/")) + ("/" if path.endswith("/") and path.strip("/") else "")
        if clean != path:
            return web.Response(status=301, headers={"Location": quote(clean) + (f"?{query}" if query else "")})
        if match := re.fullmatch(r"/function/([-a-zA-Z_0-9.]+)(?:/(.*))?", raw_path, re.DOTALL):
            if seen.method not in CALLABLE:
                return web.Response(status=405)
            return await self._call(request, seen, match[1], match[2] or "", query)
        for name, pattern, methods, guarded in ROUTES:
            if match := re.fullmatch(pattern, path):
                if seen.method not in methods:
                    return web.Response(status=405)
                if guarded and not self._authorized(seen):
                    headers = {"Www-Authenticate": 'Basic realm="Restricted"'}
                    return web.Response(status=401, text="invalid credentials", headers=headers)
                arguments = {name: values[-1] for name, values in parse_qs(query).items()}
                response: web.StreamResponse = await getattr(self, f"_{name}")(
                    request, seen, arguments, *match.groups()
                )
                return response
        return error(404, "404 page not found")

    def _authorized(self, seen: Request) -> bool:
        return seen.headers.get("Authorization") == basic(self.user, self.password)

    # -- calls

    async def _call(
        self, request: web.BaseRequest, seen: Request, full_name: str, rest: str, query: str
    ) -> web.StreamResponse:
        name, _, namespace = full_name.partition(".")
        function = self.functions.get((namespace or NAMESPACE, name))
        if function is None:
            return error(503, f"No endpoints available for: {full_name}.", internal=True)
        if function.pauses_on_call:
            function.pauses_on_call, function.replicas = False, 0
        target = f"/{rest}" + (f"?{query}" if query else "")
        try:
            async with asyncio.timeout(self.service_timeout):
                if not function.replicas:
                    self.misdirected.append(seen)
                    return await self._call_own_host(seen, full_name, target)
                if not function.listening or not function.available:
                    return error(500, f"Can't reach service for: {full_name}.", internal=True)
                return await self._run(request, function, replace(seen, target=target))
        except TimeoutError:
            return await self._hang_up(request)

    async def _run(self, request: web.BaseRequest, function: Deployed, seen: Request) -> web.StreamResponse:
        function.requests.append(seen)
        function.running += 1
        function.most_running = max(function.most_running, function.running)
        await self._tell()
        try:
            return await function.behaviour(request, seen)
        finally:
            function.running -= 1
            await self._tell()

    async def _call_own_host(self, seen: Request, full_name: str, target: str) -> web.StreamResponse:
        """What faasd does for want of an address: `http://:8080` is the host itself. Its answer is handed out."""
        assert self._session is not None
        framing = {"host", "content-length", "transfer-encoding", "connection"}
        headers = CIMultiDict((name, value) for name, value in seen.headers.items() if name.lower() not in framing)
        url = yarl.URL(self.host_url + target, encoded=True)
        try:
            async with self._session.request(
                seen.method, url, headers=headers, data=seen.body or None, allow_redirects=False
            ) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, ValueError):  # ValueError: there is no such URL
            return error(500, f"Can't reach service for: {full_name}.", internal=True)
        given = CIMultiDict((name, value) for name, value in answer.headers.items() if name.lower() not in framing)
        return web.Response(status=answer.status, body=body, headers=given)

    # -- /healthz, /metrics, /system: each takes the request, what was seen of it, its query, and groups of its path

    async def _healthz(self, request: web.BaseRequest, seen: Request, query: dict[str, str]) -> web.Response:
        return web.Response()

    async def _metrics(self, request: web.BaseRequest, seen: Request, query: dict[str, str]) -> web.Response:
        return web.Response(text="# HELP go_info Information about the Go environment.\n")

    async def _info(self, request: web.BaseRequest, seen: Request, query: dict[str, str]) -> web.Response:
        version = {"sha": "8b8a7a1e", "release": "0.19.0"}
        return as_json({"provider": "faasd", "version": version, "orchestration": "containerd"})

    async def _functions(self, request: web.BaseRequest, seen: Request, query: dict[str, str]) -> web.Response:
        if seen.method == "GET":
            if (namespace := query.get("namespace") or NAMESPACE) not in self.namespace_labels:
                return error(400, "namespace not valid")
            found = [one.status(listed=True) for one in self.functions.values() if one.namespace == namespace]
            return as_json(random.sample(found, len(found)))
        if isinstance(body := self._document(seen), web.Response):
            return body
        if (namespace := body.get("namespace") or NAMESPACE) not in self.namespace_labels:
            return error(400, "namespace not valid")
        name = body.get("functionName" if seen.method == "DELETE" else "service", "")
        exists = (namespace, name) in self.functions
        if not exists and seen.method != "POST":
            return error(404, f"service {name} not found")
        if seen.method == "DELETE":
            del self.functions[namespace, name]
            return web.Response()
        if re.search(r"\s|^$", body.get("image", "")):
            return error(400, "invalid reference format")
        for secret in body.get("secrets") or ():
            if (namespace, secret) not in self.secret_values:
                return error(400, f"unable to find secret: {secret}")
        if exists and seen.method == "POST":
            return error(400, f'unable to create container: {name}, error: container "{name}": already exists')
        given = {key: body.get(key) or {} for key in ("labels", "annotations")}
        self.deploy(name, self.images.get(body["image"], ok), namespace=namespace, image=body["image"], **given)
        return web.Response()

    def _document(self, seen: Request) -> dict[str, Any] | web.Response:
        """The JSON object in a body, or the error that is answered for want of one."""
        try:
            found: dict[str, Any] = json.loads(seen.body)
        except ValueError:
            return error(400, "unexpected end of JSON input")
        return found

    async def _look_up(self, request: web.BaseRequest, seen: Request, query: dict[str, str], name: str) -> web.Response:
        if (namespace := query.get("namespace") or NAMESPACE) not in self.namespace_labels:
            response = error(400, "namespace not valid")
        elif function := self.functions.get((namespace, name)):
            response = as_json(function.status())
        else:
            response = web.Response(status=404)
        await self.may_look_up.wait()
        return response

    async def _scale(self, request: web.BaseRequest, seen: Request, query: dict[str, str], name: str) -> web.Response:
        if isinstance(body := self._document(seen), web.Response):
            return body
        name = body.get("serviceName", "")
        if (namespace := body.get("namespace") or NAMESPACE) not in self.namespace_labels:
            return error(400, "namespace not valid")
        if (function := self.functions.get((namespace, name))) is None:
            return error(404, f"service {name} not found")
        await self.may_scale.wait()
        if self.scale_error:
            return error(400, self.scale_error)
        function.replicas = 1 if body.get("replicas") or not function.replicas else 0  # a second 0 wakes it up
        return web.Response()

    async def _secrets(self, request: web.BaseRequest, seen: Request, query: dict[str, str]) -> web.Response:
        if seen.method == "GET":
            if (namespace := query.get("namespace") or NAMESPACE) not in self.namespace_labels:
                return error(400, "namespace not valid")
            found = [{"name": name, "namespace": where} for where, name in self.secret_values if where == namespace]
            return as_json(found, "text/plain; charset=utf-8")  # which is what Go makes of a type that nobody set
        if isinstance(body := self._document(seen), web.Response):
            return body
        key = body.get("namespace") or query.get("namespace") or NAMESPACE, body.get("name", "")
        if not key[1]:
            return error(400, "non-empty name is required")
        if seen.method != "DELETE":
            self.secret_values[key] = body.get("value", "")
        elif self.secret_values.pop(key, None) is None:
            return error(500, f"remove /var/lib/faasd-provider/secrets/{key[0]}/{key[1]}: no such file or directory")
        return web.Response()

    async def _logs(self, request: web.BaseRequest, seen: Request, query: dict[str, str]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        name, namespace = query.get("name", ""), query.get("namespace") or NAMESPACE
        function, sent = self.functions.get((namespace, name)), 0
        if function is not None and "tail" in query:
            sent = max(0, len(function.logs) - int(query["tail"]))
        while function is not None:
            for text in function.logs[sent:]:
                sent += 1
                line = {"name": name, "namespace": namespace, "instance": name, "timestamp": CREATED_AT, "text": text}
                await response.write(json.dumps(line).encode() + b"\n")
            if query.get("follow") not in ("1", "true"):
                break
            async with self._news:
                while len(function.logs) == sent:
                    await self._news.wait()
        await response.write_eof()
        return response

    async def _namespaces(self, request: web.BaseRequest, seen: Request, query: dict[str, str]) -> web.Response:
        return as_json(list(self.namespace_labels))

    async def _namespace(
        self, request: web.BaseRequest, seen: Request, query: dict[str, str], name: str
    ) -> web.Response:
        known = self.namespace_labels
        if seen.method == "GET":
            return as_json({"name": name, "labels": known[name]}) if name in known else self._no_namespace(name)
        if isinstance(body := self._document(seen), web.Response):
            return body
        if body.get("labels", {}).get("openfaas") != "1":
            return error(400, "request does not have openfaas=1 label")
        if seen.method == "POST":
            if body.get("name") in known:
                return error(409, f"namespace {body['name']} already exists")
            known[body["name"]] = body["labels"]
            return web.Response(status=201)
        if body.get("name") != name:
            return error(400, "namespace in request body does not match namespace in URL")
        if name not in known:
            return self._no_namespace(name)
        if seen.method == "PUT":
            known[name] = body["labels"]
        else:
            del known[name]
        return web.Response(status=202)

    def _no_namespace(self, name: str) -> web.Response:
        return error(404, f"namespace {name} not found")


@contextlib.asynccontextmanager
async def running_provider() -> AsyncIterator[Provider]:
    """A provider, for fixtures."""
    provider = Provider()
    await provider.start()
    try:
        yield provider
    finally:
        await provider.close()


def credential_files(folder: Path, name: str, user: str, password: str) -> str:
    """Write credentials to files as faasd does, newline at the end; the two lines of TOML that name them."""
    for kind, value in (("user", user), ("password", password)):
        (folder / f"{name}-{kind}").write_text(value + "\n")
    return f'user_file = "{folder}/{name}-user"\npassword_file = "{folder}/{name}-password"\n'
