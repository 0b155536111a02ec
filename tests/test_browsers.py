"""Browsers: a page from elsewhere can't drive the daemon, and what is no browser notices nothing.

An attack comes as a browser sends it, with the one header that gives it away: what two checks
refuse at once would show that one of them works, never which. So a test fails when its own check
is gone.
"""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import (
    PATIENCE,
    Daemon,
    Gate,
    Reply,
    Server,
    StartDaemon,
    answer,
    ask,
    faasd,
    namespaces,
    raw,
    run,
)

from faasd_async import ConfigError, parse_config

CROSS_SITE = "Sec-Fetch-Site: cross-site"
EVIL = "Origin: https://evil.example"
CREDENTIALS = "Authorization: Basic YWRtaW46cGFzc3dvcmQ="  # admin:password
APP = "https://app.example.org"
FROM_APP = f"Origin: {APP}"
OTHER_APP = "https://other.example.org:8443"
TRUSTED = f'[gateway]\ntrusted_origins = ["{OTHER_APP}", "{APP}"]\n'

# What changes something, on every kind of route; {call} is a call that waits for its time.
UNSAFE = [
    ("POST", "/function/echo"),
    ("POST", "/function/program"),
    ("POST", "/async-function/echo"),
    ("POST", "/async-function/program"),
    ("DELETE", "/async-function/{call}"),
    ("POST", "/r/app/echo"),
    ("POST", "/r/app/queued"),
    ("POST", "/v1/apps/app/calls"),
    ("POST", "/system/calls/{call}/retry"),
    ("POST", "/system/calls/retry?status=delayed"),
    ("POST", "/system/calls/cancel?status=delayed"),
    ("POST", "/system/queues/faas-request/pause"),
    ("POST", "/system/queues/faas-request/resume"),
    ("POST", "/system/queues/faas-request/purge"),
    ("POST", "/system/functions"),
    ("PUT", "/system/functions"),
    ("DELETE", "/system/functions"),
    ("POST", "/system/scale-function/echo"),
    ("POST", "/system/secrets"),
    ("POST", "/metrics"),
    ("POST", "/ui/"),
    ("POST", "/healthz"),
]

# Where the operator looks: open without credentials, so that a Host header has to do.
OPERATOR = [
    "/system/calls",
    "/system/calls?limit=1",
    "/system/queues",
    "/system/functions",
    "/system/info",
    "/metrics",
    "/metrics?name=x",
    "/v1/apps/app/calls",
    "/ui/",
]


def address(gateway: Daemon) -> str:
    """The Host header of who asks this daemon by its address."""
    return urlsplit(gateway.url).netloc


async def send(gateway: Daemon, request: str, *headers: str, host: str = "", body: bytes = b"") -> Reply:
    """The answer to "METHOD TARGET" with these header lines, for the daemon's address or a name."""
    method, target = request.split(" ")
    host = host or address(gateway)
    return await ask(gateway.url, target, *headers, method=method, body=body, host=host)


async def curl(*words: str | Path) -> str:
    """What curl prints of the body, a space, and the status."""
    result = await run("curl", "-sS", "-w", " %{http_code}", *words)
    assert result.code == 0, result
    return result.out


def reason(reply: Reply, target: str) -> str:
    """The line that says what was wrong: plain text, on Fn's routes in its JSON."""
    text = reply.body.decode()
    kind = reply.headers["Content-Type"].partition(";")[0]
    if not target.startswith(("/r/", "/v1/")):
        assert (kind, len(text.splitlines())) == ("text/plain", 1), reply
        return text
    assert kind == "application/json", reply
    document = json.loads(text)
    message = str(document["error"]["message"])
    assert document == {"error": {"message": message}}
    return message


def cors(reply: Reply) -> dict[str, str]:
    """The headers by which an answer tells a browser what a page may see."""
    names = [name for name in reply.headers if name.lower().startswith("access-control-")]
    return {name: reply.headers[name] for name in names}


def listed(reply: Reply, name: str) -> set[str]:
    """The members of a header that is a list, in lower case."""
    members = ",".join(reply.headers.getall(name, ())).split(",")
    return {member.strip().lower() for member in members}


def assert_readable(reply: Reply, origin: str = APP) -> None:
    """A page of this origin, and of no other, may read the answer with all that we add to it."""
    assert reply.headers.getall("Access-Control-Allow-Origin") == [origin], reply
    exposed = {"x-call-id", "x-start-time", "x-duration-seconds", "location", "retry-after"}
    assert exposed <= listed(reply, "Access-Control-Expose-Headers"), reply
    assert "origin" in listed(reply, "Vary"), reply
    assert "Access-Control-Allow-Credentials" not in reply.headers, reply


def functions(function: Server) -> str:
    """The functions of all tests here: a server, the same queued by Fn's route, a program."""
    return (
        f'[functions.echo]\nurl = "{function.url}"\n'
        f'[functions.queued]\nurl = "{function.url}"\ntype = "async"\n'
        '[functions.program]\ncommand = ["echo", "done"]\n'
    )


def credential_files(folder: Path) -> str:
    """The [auth] of a daemon that asks for CREDENTIALS."""
    (folder / "user").write_text("admin\n")
    (folder / "password").write_text("password\n")
    return f'[auth]\nuser_file = "{folder}/user"\npassword_file = "{folder}/password"\n'


async def guarded(daemon: StartDaemon, function: Server, folder: Path) -> Daemon:
    """A daemon whose operator has to sign in."""
    return await daemon(credential_files(folder) + functions(function))


async def with_socket_file(daemon: StartDaemon, function: Server, path: Path) -> Daemon:
    """A daemon that listens on a socket file, too."""
    listen = f'[gateway]\nlisten = ["127.0.0.1:0", "unix:{path}"]\n'
    gateway = await daemon(listen + functions(function))
    await gateway.wait_for_log(str(path))
    return gateway


@pytest.fixture
async def gateway(daemon: StartDaemon, function: Server) -> Daemon:
    """A daemon as it is installed: nothing is said about browsers."""
    return await daemon(functions(function))


@pytest.fixture
async def trusting(daemon: StartDaemon, function: Server) -> Daemon:
    """A daemon that two apps in browsers are made for."""
    return await daemon(TRUSTED + functions(function))


@pytest.fixture
async def waiting(gateway: Daemon) -> str:
    """A call that waits for its time: the one that an attack could lose or run."""
    return await gateway.submit("echo", X_Delay="1h")


async def assert_untouched(gateway: Daemon, function: Server, waiting: str) -> None:
    """No function was called, nothing was queued, nothing was cancelled, no queue was paused."""
    calls = json.loads((await send(gateway, "GET /system/calls")).body)["calls"]
    assert [(call["call_id"], call["status"]) for call in calls] == [(waiting, "delayed")]
    queues = json.loads((await send(gateway, "GET /system/queues")).body)["queues"]
    assert [queue["name"] for queue in queues if queue.get("paused")] == []
    assert function.requests == []


# ---- a page from elsewhere sends -----------------------------------------------------------------


@pytest.mark.parametrize("site", ["cross-site", "same-site", "something-new"])
async def test_a_page_from_elsewhere_can_not_run_a_command(gateway: Daemon, site: str) -> None:
    """The browser says that the page is not ours, be it only a sister site: nothing is queued."""
    request = "POST /async-function/program"
    simple = "Content-Type: text/plain"  # what a page may send without asking first
    reply = await send(gateway, request, f"Sec-Fetch-Site: {site}", simple, body=b"x")
    assert reply.status == 403, reply
    assert reason(reply, "/async-function/program")
    assert json.loads((await send(gateway, "GET /system/calls")).body)["calls"] == []


async def test_an_older_browser_gives_a_page_away_by_its_origin(
    gateway: Daemon, function: Server, waiting: str
) -> None:
    """Without Sec-Fetch-Site it is the page's host that must be ours."""
    for request in ("POST /function/echo", "POST /async-function/echo", "POST /r/app/queued"):
        reply = await send(gateway, request, EVIL)
        assert reply.status == 403, (request, reply)
        assert reason(reply, request.split(" ")[1])
    await assert_untouched(gateway, function, waiting)


async def test_a_page_without_an_origin_is_from_elsewhere(gateway: Daemon, function: Server, waiting: str) -> None:
    """A sandboxed frame, a file or a redirect says `null`."""
    for route in ("function", "async-function"):
        assert (await send(gateway, f"POST /{route}/echo", "Origin: null")).status == 403, route
    await assert_untouched(gateway, function, waiting)


async def test_another_port_of_this_host_is_elsewhere(gateway: Daemon, function: Server, waiting: str) -> None:
    """Who may run a web server on this machine may not therefore drive the daemon."""
    host, _, port = address(gateway).partition(":")
    for origin in (f"http://{host}", f"http://{host}:{int(port) ^ 1}", f"http://{host}:{port}0"):
        reply = await send(gateway, "POST /function/echo", f"Origin: {origin}")
        assert reply.status == 403, (origin, reply)
    reply = await send(gateway, "POST /function/echo", f"Origin: http://{host}:{port}", host=host)
    assert reply.status == 403, reply
    await assert_untouched(gateway, function, waiting)


async def test_an_origin_that_only_looks_like_the_host_is_elsewhere(
    gateway: Daemon, function: Server, waiting: str
) -> None:
    """The host of the parsed origin counts, the whole of it; what can't be parsed has none."""
    host = "gw.example"
    lookalikes = f"""
        http://{host}.evil.example http://evil-{host} http://evil.example/{host}
        http://evil.example?{host} http://evil.example#{host} http://{host}@evil.example
        {host} //evil.example/http://{host} http:// http://[ http://[{host} x \x80
    """
    for origin in lookalikes.split():
        reply = await send(gateway, "POST /function/echo", f"Origin: {origin}", host=host)
        assert reply.status == 403, (origin, reply)
    await assert_untouched(gateway, function, waiting)


async def test_an_origin_that_is_no_text_is_elsewhere(gateway: Daemon, function: Server, waiting: str) -> None:
    """Refused like any other, on Fn's routes too."""
    for target in ("/function/echo", "/r/app/echo"):
        head = f"POST {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n"
        reply = await raw(gateway.url, head.encode() + b"Origin: http://\xff\r\n\r\n")
        assert reply.status == 403, (target, reply)
        assert reason(reply, target)
    await assert_untouched(gateway, function, waiting)


async def test_a_page_can_not_change_anything_on_any_route(gateway: Daemon, function: Server, waiting: str) -> None:
    """Each of them refuses, the operator's and Fn's too, in its own form of errors."""
    for method, target in UNSAFE:
        target = target.format(call=waiting)
        for header in (CROSS_SITE, EVIL):
            reply = await send(gateway, f"{method} {target}", header, body=b"x")
            assert reply.status == 403, (method, target, header, reply)
            assert reason(reply, target)
    await assert_untouched(gateway, function, waiting)


async def test_a_page_can_not_use_any_method_that_changes_something(
    gateway: Daemon, function: Server, waiting: str
) -> None:
    """Only GET, HEAD and OPTIONS promise to change nothing."""
    for method in ("POST", "PUT", "PATCH", "DELETE", "PROPFIND", "PURGE", "TRACE"):
        for header in (CROSS_SITE, EVIL):
            reply = await send(gateway, f"{method} /function/echo", header)
            assert reply.status == 403, (method, header, reply)
    await assert_untouched(gateway, function, waiting)


async def test_a_page_can_not_use_the_credentials_that_the_browser_keeps(
    daemon: StartDaemon, function: Server, tmp_path: Path
) -> None:
    """A browser adds them to whatever any page sends: with them nothing more is allowed."""
    gateway = await guarded(daemon, function, tmp_path)
    call_id = await gateway.submit("echo", X_Delay="1h")
    for header in (CROSS_SITE, EVIL):
        reply = await send(gateway, "POST /system/queues/faas-request/purge", header, CREDENTIALS)
        assert reply.status == 403, (header, reply)
    reply = await send(gateway, f"GET /system/calls/{call_id}", CREDENTIALS)
    assert json.loads(reply.body)["status"] == "delayed"


async def test_a_page_can_not_get_in_through_an_old_proxy(gateway: Daemon, function: Server, waiting: str) -> None:
    """Where HTTP/1.0 names no host, no page has the same one, not even a page without an origin."""
    for header in (EVIL, "Origin: null"):
        head = f"POST /function/echo HTTP/1.0\r\n{header}\r\nContent-Length: 0\r\n\r\n"
        assert (await raw(gateway.url, head.encode())).status == 403, header
    await assert_untouched(gateway, function, waiting)


async def test_a_page_can_not_get_in_through_a_socket_file(
    daemon: StartDaemon, function: Server, tmp_path: Path
) -> None:
    """A proxy that serves browsers may talk to one."""
    path = tmp_path / "gateway.sock"
    await with_socket_file(daemon, function, path)
    for header in (CROSS_SITE, EVIL):
        url = "http://gw.example/function/echo"
        result = await curl("--unix-socket", path, "-d", "x", "-H", header, url)
        assert result.endswith(" 403"), (header, result)
    assert function.requests == []


# ---- a page of our own, and what is no page ------------------------------------------------------


@pytest.mark.parametrize("site", ["same-origin", "none"])
async def test_our_own_page_may_send(gateway: Daemon, function: Server, site: str) -> None:
    """So may who types an address; behind a proxy that puts a name of its own into Host, too."""
    for origin in ([], ["Origin: https://proxy.example"]):
        headers = f"Sec-Fetch-Site: {site}", *origin
        assert (await send(gateway, "POST /function/echo", *headers)).status == 200, origin
        pause = "POST /system/queues/faas-request/pause"
        assert (await send(gateway, pause, *headers)).status == 200, origin
    assert len(function.requests) == 2


async def test_our_own_page_may_send_from_an_older_browser(gateway: Daemon) -> None:
    """Its origin has the host that was asked, in any case; a proxy may have taken off the TLS."""
    for origin, host in (
        ("http://pi.example:8080", "pi.example:8080"),
        ("http://pi.example:8080", "PI.Example:8080"),
        ("https://pi.example", "pi.example"),
        ("http://[::1]:8080", "[::1]:8080"),
    ):
        reply = await send(gateway, "POST /function/echo", f"Origin: {origin}", host=host)
        assert reply.status == 200, (origin, host, reply)


async def test_what_changes_nothing_may_come_from_anywhere(gateway: Daemon, function: Server) -> None:
    """GET, HEAD and OPTIONS go to the function: it is a link, an image, or a question."""
    for method in ("GET", "HEAD", "OPTIONS"):
        headers = CROSS_SITE, EVIL
        assert (await send(gateway, f"{method} /function/echo", *headers)).status == 200, method
    assert [request.method for request in function.requests] == ["GET", "HEAD", "OPTIONS"]


async def test_curl_notices_nothing(gateway: Daemon, function: Server) -> None:
    """By address and by name, on every kind of route."""
    for host in ("127.0.0.1", "localhost"):
        url = f"http://{host}:{urlsplit(gateway.url).port}"
        assert await curl("-d", "x", f"{url}/function/echo") == "ok 200"
        assert await curl("-d", "x", "-H", "X-Delay: 1h", f"{url}/async-function/echo") == " 202"
        assert (await curl("-d", "x", f"{url}/r/app/queued")).endswith(" 202")
        pause = f"{url}/system/queues/faas-request/pause"
        assert (await curl("-X", "POST", pause)).endswith(" 200")
        assert (await curl(f"{url}/metrics")).endswith(" 200")
        assert (await curl(f"{url}/v1/apps/app/calls")).endswith(" 200")
        delayed = await gateway.submit("echo", X_Delay="1h")
        assert (await curl("-X", "DELETE", f"{url}/async-function/{delayed}")).endswith(" 202")


async def test_clients_in_go_notice_nothing(gateway: Daemon, function: Server) -> None:
    """faas-cli and its like, from this machine or from a container that calls it `gateway`."""
    headers = "User-Agent: Go-http-client/1.1", "Accept-Encoding: gzip"
    for host in (address(gateway), "localhost:8080", "gateway:8080", "gateway.openfaas:8080"):
        for request, status in (
            ("POST /function/echo", 200),
            ("POST /async-function/echo", 202),
            ("GET /system/functions", 200),
            ("GET /system/info", 200),
            ("PUT /system/functions", 405),  # there is no provider
            ("POST /system/queues/faas-request/resume", 200),
            ("GET /metrics", 200),
        ):
            reply = await send(gateway, request, *headers, host=host, body=b"{}")
            assert reply.status == status, (host, request, reply)


async def test_the_command_line_notices_nothing(daemon: StartDaemon, function: Server, tmp_path: Path) -> None:
    """By address, by name and through a socket file."""
    path = tmp_path / "gateway.sock"
    gateway = await with_socket_file(daemon, function, path)
    localhost = f"http://localhost:{urlsplit(gateway.url).port}"
    for url in (gateway.url, localhost, f"unix:{path}"):
        for words in (
            ("invoke", "program", "--wait", "--data", "x"),
            ("queues", "pause", "faas-request"),
            ("queues", "resume", "faas-request"),
            ("calls", "list"),
        ):
            result = await faasd(*words, "--url", url)
            assert (result.code, result.err) == (0, ""), (url, words)


@pytest.mark.parametrize("host", ["gateway", "gateway.openfaas:8080"])
async def test_a_callback_to_another_function_notices_nothing(gateway: Daemon, function: Server, host: str) -> None:
    """Sync and async: the other function is called with the outcome."""
    await assert_chained(gateway, function, host)


async def test_a_function_that_repeats_what_a_browser_sent_is_no_browser(gateway: Daemon, function: Server) -> None:
    """Its outcome reaches another function without the headers that give a page away."""
    browser = {"Origin": "https://evil.example", "Sec_Fetch_Site": "cross-site"}
    function.behaviour = answer(200, b"", **browser)
    await assert_chained(gateway, function, "gateway")


async def assert_chained(gateway: Daemon, function: Server, host: str) -> None:
    """The outcome of a call is delivered to a function of ours, under this name of the daemon."""
    for requests, route in ((2, "function"), (4, "async-function")):
        url = f"http://{host}/{route}/echo/{route}"
        call_id = await gateway.submit("queued", X_Call_Id=route, X_Callback_Url=url)
        callback = (await callback_of(gateway, call_id, url))["callback"]
        assert (callback["status"], callback["attempts"]) == ("delivered", 1), callback
        assert (await function.wait_for(requests))[-1].target == f"/{route}"


async def callback_of(gateway: Daemon, call_id: str, url: str) -> dict[str, Any]:
    """The record of the call, of those that share its id, with this callback; once that is over."""
    async with asyncio.timeout(PATIENCE):
        while True:
            reply = await send(gateway, f"GET /system/calls?call_id={call_id}")
            calls: list[dict[str, Any]] = json.loads(reply.body)["calls"]
            (call,) = (call for call in calls if call["callback"]["url"] == url)
            if call["callback"]["status"] in ("delivered", "failed"):
                return call
            await asyncio.sleep(0.01)


# ---- a page under a name that points here --------------------------------------------------------


REBOUND = "evil.example:8080"  # resolves to this machine, after the page was loaded from another

FOREIGN = f"""
    evil.example evil.example:8080 evil.example. 127.0.0.1.evil.example 127.0.0.1.evil.example:8080
    localhost.evil.example evillocalhost evil.localhost.example local gateway.evil.example
    evil-gateway openfaas 127.0.0.1%.evil.example
    {socket.gethostname()}.evil.example evil-{socket.gethostname()}
"""


async def test_a_rebound_name_can_not_read_what_the_operator_sees(
    gateway: Daemon, function: Server, waiting: str
) -> None:
    """421 on each of the operator's routes, and the setting for those who have such a name."""
    for target in [*OPERATOR, f"/system/calls/{waiting}", f"/system/calls/{waiting}/log"]:
        reply = await send(gateway, f"GET {target}", host=REBOUND)
        assert reply.status == 421, (target, reply)
        assert "gateway.hosts" in reason(reply, target)
        assert waiting not in reply.body.decode()


async def test_a_rebound_name_can_not_do_what_the_operator_does(
    gateway: Daemon, function: Server, waiting: str
) -> None:
    """The page is of the same origin as what it asks, so that the check of origins lets it pass."""
    for method, target in UNSAFE:
        target = target.format(call=waiting)
        if target.startswith(("/system/", "/metrics", "/v1/", "/ui/")):
            for header in (f"Origin: http://{REBOUND}", "Sec-Fetch-Site: same-origin"):
                reply = await send(gateway, f"{method} {target}", header, host=REBOUND)
                assert reply.status == 421, (method, target, header, reply)
                assert "gateway.hosts" in reason(reply, target)
    await assert_untouched(gateway, function, waiting)


async def test_a_name_that_only_looks_like_one_of_ours_is_none(gateway: Daemon) -> None:
    """The whole name counts."""
    for host in FOREIGN.split():
        reply = await send(gateway, "GET /system/queues", host=host)
        assert reply.status == 421, (host, reply)


async def test_a_name_that_is_no_text_is_none_of_ours(gateway: Daemon) -> None:
    """Refused like any other, on Fn's routes too."""
    for target in ("/system/queues", "/v1/apps/app/calls"):
        head = f"GET {target} HTTP/1.1\r\nConnection: close\r\n"
        reply = await raw(gateway.url, head.encode() + b"Host: evil\xff\r\n\r\n")
        assert reply.status == 421, (target, reply)
        assert "gateway.hosts" in reason(reply, target)


async def test_names_that_no_stranger_can_have_are_answered(gateway: Daemon) -> None:
    """Addresses, this machine's names, those by which functions call us; with a last dot, too."""
    own = socket.gethostname()
    short = own.partition(".")[0]
    hosts = f"""
        127.0.0.1 127.0.0.1:8080 192.0.2.7:8080 0.0.0.0:8080
        [::1] [::1]:8080 [2001:db8::7]:8080 [fe80::1]
        localhost localhost:8080 LocalHost:8080 localhost. localhost.:8080
        {own} {own}:8080 {own.upper()} {own}. {short} {short}.local {short}.local.:8080
        gateway Gateway:8080 gateway.openfaas gateway.openfaas.svc.cluster.local.:8080
    """
    for host in hosts.split():
        reply = await send(gateway, "GET /system/queues", host=host)
        assert reply.status == 200, (host, reply)


async def test_a_machine_that_knows_its_domain_has_a_short_name_too(daemon: StartDaemon, function: Server) -> None:
    """As it was called at the prompt, as DNS calls it, and as its neighbours find it."""
    prefix = [*namespaces("uts"), "sh", "-c", 'hostname Pi.example.lan && exec "$@"', "sh"]
    gateway = await daemon(functions(function), prefix=prefix)
    for host in ("pi.example.lan:8080", "pi", "PI:8080", "pi.local", "Pi.Local.:8080"):
        assert (await send(gateway, "GET /system/queues", host=host)).status == 200, host
    for host in ("pi.example", "pi.example.org", "example.lan", "lan", "local"):
        assert (await send(gateway, "GET /system/queues", host=host)).status == 421, host


async def test_other_names_can_be_configured(daemon: StartDaemon, function: Server) -> None:
    """`gateway.hosts` adds some; `callback.gateway_hosts` says by which functions call us."""
    gateway = await daemon(
        '[gateway]\nhosts = ["gw.example.org", "Box.Example"]\n'
        '[callback]\ngateway_hosts = ["inside.example"]\n' + functions(function)
    )
    hosts = "gw.example.org GW.Example.org:443 gw.example.org. box.example:1 inside.example"
    for host in hosts.split():
        for target in ("/system/queues", "/metrics", "/v1/apps/app/calls"):
            assert (await send(gateway, f"GET {target}", host=host)).status == 200, (host, target)
    for host in ["gateway", "example.org", "evil-gw.example.org", "gw.example.org.evil.example"]:
        assert (await send(gateway, "GET /system/queues", host=host)).status == 421, host


async def test_calls_and_probes_are_answered_under_any_name(gateway: Daemon) -> None:
    """Functions are there to be published; what they are asked is their own affair."""
    for request, status in (
        ("GET /function/echo", 200),
        ("POST /function/echo", 200),
        ("POST /async-function/echo", 202),
        ("POST /r/app/echo", 200),
        ("POST /r/app/queued", 202),
        ("GET /healthz", 200),
        ("GET /readyz", 200),
    ):
        assert (await send(gateway, request, host="shop.example")).status == status, request


async def test_a_client_that_names_no_host_is_no_browser(gateway: Daemon) -> None:
    """As HTTP/1.0 has it."""
    assert (await raw(gateway.url, b"GET /system/queues HTTP/1.0\r\n\r\n")).status == 200


async def test_credentials_stand_in_for_a_name(daemon: StartDaemon, function: Server, tmp_path: Path) -> None:
    """No browser keeps them for a stranger's name, so that with [auth] a proxy may use any."""
    gateway = await guarded(daemon, function, tmp_path)
    for target in ("/system/queues", "/metrics", "/v1/apps/app/calls"):
        reply = await send(gateway, f"GET {target}", CREDENTIALS, host=REBOUND)
        assert reply.status == 200, (target, reply)
        assert (await send(gateway, f"GET {target}", host=REBOUND)).status == 401, target


async def test_a_socket_file_has_no_name(daemon: StartDaemon, function: Server, tmp_path: Path) -> None:
    """No browser can connect to one."""
    path = tmp_path / "gateway.sock"
    await with_socket_file(daemon, function, path)
    for target in ("/system/queues", "/metrics", "/v1/apps/app/calls"):
        result = await curl("--unix-socket", path, f"http://evil.example{target}")
        assert result.endswith(" 200"), (target, result)


# ---- pages that are trusted ----------------------------------------------------------------------


@pytest.mark.parametrize("origin", [APP, OTHER_APP])
async def test_a_trusted_page_may_send_and_read(trusting: Daemon, origin: str) -> None:
    """From a browser of today or an older one, to a server or a program, sync or async."""
    for browser in ((), (CROSS_SITE,), ("Sec-Fetch-Site: same-site",)):
        for request, status in (
            ("GET /function/echo", 200),
            ("POST /function/echo", 200),
            ("PUT /function/echo/path?query", 200),
            ("POST /function/program", 200),
            ("POST /async-function/echo", 202),
        ):
            reply = await send(trusting, request, f"Origin: {origin}", *browser)
            assert reply.status == status, (request, browser, reply)
            assert_readable(reply, origin)


async def test_a_trusted_page_may_cancel_what_it_queued(trusting: Daemon) -> None:
    """DELETE on the async route is answered to it like a POST."""
    call_id = await trusting.submit("echo", X_Delay="1h")
    for status in (202, 409):
        reply = await send(trusting, f"DELETE /async-function/{call_id}", FROM_APP, CROSS_SITE)
        assert reply.status == status, reply
        assert_readable(reply)


async def test_a_trusted_page_may_read_what_went_wrong(daemon: StartDaemon, function: Server, refused: str) -> None:
    """An error that a page can't read looks to it like a network that is down."""
    gateway = await daemon(
        f'[gateway]\nmax_payload = "4B"\ntrusted_origins = ["{APP}"]\n{functions(function)}'
        f'[functions.down]\nurl = "{refused}"\n'
        f'[functions.busy]\nurl = "{function.url}"\nmax_inflight = 1\n'
    )
    function.behaviour = gate = Gate(passing=0)
    busy = asyncio.create_task(send(gateway, "GET /function/busy"))
    await function.wait_for(1)
    for request, header, body, status in (
        ("POST /function/nosuch", CROSS_SITE, b"", 404),
        ("POST /async-function/nosuch", CROSS_SITE, b"", 404),
        ("DELETE /async-function/nosuch", CROSS_SITE, b"", 404),
        ("GET /async-function/echo", CROSS_SITE, b"", 405),
        ("POST /function/busy", CROSS_SITE, b"", 429),
        ("POST /function/down", CROSS_SITE, b"", 502),
        ("POST /async-function/echo", CROSS_SITE, b"12345", 413),
        ("POST /async-function/echo", "X-Delay: soon", b"", 400),
    ):
        reply = await send(gateway, request, FROM_APP, header, body=body)
        assert reply.status == status, (request, reply)
        assert_readable(reply)
    gate.open()
    assert (await busy).status == 200


async def test_a_function_that_fails_may_be_read_too(trusting: Daemon, function: Server) -> None:
    """Its answer, whatever the status, is what the page asked for."""
    function.behaviour = answer(500, b"out of paper")
    reply = await send(trusting, "POST /function/echo", FROM_APP, CROSS_SITE)
    assert (reply.status, reply.body) == (500, b"out of paper")
    assert_readable(reply)


async def test_a_trusted_page_is_told_beforehand_what_it_may_send(trusting: Daemon, function: Server) -> None:
    """The gateway answers a preflight itself: the function never sees it."""
    for target, method in (
        ("/function/echo", "POST"),
        ("/function/echo/path?query", "PUT"),
        ("/function/echo", "PATCH"),
        ("/function/program", "DELETE"),
        ("/async-function/echo", "POST"),
        ("/async-function/8f1c", "DELETE"),
    ):
        reply = await send(
            *(trusting, f"OPTIONS {target}", FROM_APP, CROSS_SITE),
            *(f"Access-Control-Request-Method: {method}",),
            *("Access-Control-Request-Headers: content-type,x-callback-url",),
        )
        assert (reply.status, reply.body) == (204, b""), reply
        assert reply.headers.getall("Access-Control-Allow-Origin") == [APP]
        assert method.lower() in listed(reply, "Access-Control-Allow-Methods"), reply
        assert {"content-type", "x-callback-url"} == listed(reply, "Access-Control-Allow-Headers")
        assert int(reply.headers["Access-Control-Max-Age"]) > 0
        assert "origin" in listed(reply, "Vary")
        assert "Access-Control-Allow-Credentials" not in reply.headers
    assert function.requests == []


async def test_a_preflight_needs_no_credentials(daemon: StartDaemon, function: Server, tmp_path: Path) -> None:
    """A browser sends none with it, and shows a page the 401 only if that may be read."""
    files = credential_files(tmp_path) + "invoke = true\n"
    gateway = await daemon(files + TRUSTED + functions(function))
    asked = "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization"
    for route in ("function", "async-function"):
        reply = await send(gateway, f"OPTIONS /{route}/echo", FROM_APP, *asked)
        assert reply.status == 204, reply
        assert listed(reply, "Access-Control-Allow-Headers") == {"authorization"}
        reply = await send(gateway, f"POST /{route}/echo", FROM_APP)
        assert reply.status == 401, reply
        assert_readable(reply)
        reply = await send(gateway, f"POST /{route}/echo", FROM_APP, CREDENTIALS)
        assert reply.status in (200, 202), reply
        assert_readable(reply)


async def test_a_question_that_is_no_preflight_goes_to_the_function(trusting: Daemon, function: Server) -> None:
    """It may have an answer of its own to OPTIONS."""
    asked = "Access-Control-Request-Method: POST"
    questions = [(), (FROM_APP,), (asked,), (EVIL, asked)]
    for headers in questions:
        reply = await send(trusting, "OPTIONS /function/echo", *headers)
        assert (reply.status, reply.body) == (200, b"ok"), (headers, reply)
    assert [request.method for request in function.requests] == ["OPTIONS"] * len(questions)
    assert (await send(trusting, "OPTIONS /async-function/echo")).status == 405
    assert (await send(trusting, "POST /function/echo", FROM_APP, asked)).body == b"ok"


async def test_what_a_function_says_about_origins_is_kept(trusting: Daemon, function: Server) -> None:
    """Its word for every page stands, once; a browser refuses an answer that has two."""
    function.behaviour = answer(200, b"", Access_Control_Allow_Origin="*", Vary="Accept-Encoding")
    for origin in (APP, "https://evil.example"):
        reply = await send(trusting, "GET /function/echo", f"Origin: {origin}", CROSS_SITE)
        assert reply.headers.getall("Access-Control-Allow-Origin") == ["*"], (origin, reply)
        assert "accept-encoding" in listed(reply, "Vary")


async def test_what_a_function_says_about_caches_is_kept(trusting: Daemon, function: Server) -> None:
    """The answer differs by origin in addition to what it differs by anyway."""
    function.behaviour = answer(200, b"", Vary="Accept-Encoding")
    reply = await send(trusting, "GET /function/echo", FROM_APP, CROSS_SITE)
    assert {"accept-encoding", "origin"} <= listed(reply, "Vary")


# Not one of them is the origin that is trusted, however much it looks like it.
STRANGERS = [
    "https://evil.example",
    "null",
    "http://app.example.org",
    "https://app.example.org:8443",
    "https://app.example.org.evil.example",
    "https://evil-app.example.org",
    "https://sub.app.example.org",
    "https://example.org",
    "https://other.example.org",
    "https://app.example.org/",
]


@pytest.mark.parametrize("browser", ["old", "new"])
async def test_a_page_that_only_looks_trusted_can_not_send(trusting: Daemon, function: Server, browser: str) -> None:
    """Scheme, host and port have to be those of the setting."""
    site = [CROSS_SITE] if browser == "new" else []
    targets = "/function/echo", "/async-function/echo", "/system/queues/faas-request/pause"
    for origin in STRANGERS:
        for target in targets:
            reply = await send(trusting, f"POST {target}", f"Origin: {origin}", *site)
            assert reply.status == 403, (origin, target, reply)
            assert cors(reply) == {}
    assert function.requests == []


async def test_trust_needs_an_origin(trusting: Daemon, function: Server) -> None:
    """A browser that hides where the page is from is not believed."""
    assert (await send(trusting, "POST /function/echo", CROSS_SITE)).status == 403
    assert function.requests == []


async def test_a_page_that_is_not_trusted_can_not_read(trusting: Daemon) -> None:
    """It may send a GET, as with a link or an image; the browser keeps the answer from it."""
    asked = "Access-Control-Request-Method: PUT", "Access-Control-Request-Headers: content-type"
    for origin in STRANGERS:
        for target in ("/function/echo", "/function/program", "/function/nosuch"):
            reply = await send(trusting, f"GET {target}", f"Origin: {origin}", CROSS_SITE)
            assert cors(reply) == {}, (origin, target)
            reply = await send(trusting, f"OPTIONS {target}", f"Origin: {origin}", *asked)
            assert cors(reply) == {}, (origin, target)


async def test_without_the_setting_nobody_is_trusted(gateway: Daemon) -> None:
    """Nor does a client without an origin see anything of this."""
    asked = "Access-Control-Request-Method: PUT", "Access-Control-Request-Headers: content-type"
    for headers in ((), (FROM_APP,), (FROM_APP, *asked)):
        for method in ("GET", "OPTIONS"):
            reply = await send(gateway, f"{method} /function/echo", *headers)
            assert (reply.status, cors(reply)) == (200, {}), (method, headers)


async def test_a_trusted_page_can_not_read_what_the_operator_sees(trusting: Daemon) -> None:
    """It is trusted with functions: their answers, not the records of everybody's calls."""
    asked = "Access-Control-Request-Method: PUT", "Access-Control-Request-Headers: content-type"
    for target in [*OPERATOR, "/system/calls/nosuch"]:
        reply = await send(trusting, f"GET {target}", FROM_APP, CROSS_SITE)
        assert (reply.status in (200, 404), cors(reply)) == (True, {}), (target, reply)
        reply = await send(trusting, f"OPTIONS {target}", FROM_APP, CROSS_SITE, *asked)
        assert cors(reply) == {}, (target, reply)
    pause = "POST /system/queues/faas-request/pause"
    reply = await send(trusting, pause, FROM_APP, CROSS_SITE)
    assert (reply.status, cors(reply)) == (200, {}), reply


# ---- the setting ---------------------------------------------------------------------------------


async def test_everybody_can_not_be_trusted(tmp_path: Path) -> None:
    """Exit 78 and one line with the key, for `*` and for what is more than an origin."""
    for origin in ("*", "https://app.example.org/path"):
        config = tmp_path / "config.toml"
        config.write_text(f'[gateway]\ntrusted_origins = ["{origin}"]')
        result = await faasd("check", "--config", config)
        assert (result.code, len(result.err.splitlines())) == (78, 1), (origin, result)
        assert "gateway.trusted_origins: expected" in result.err


@pytest.mark.parametrize(
    "origin",
    [
        "",
        80,
        "*",
        "null",
        "app.example.org",
        "app.example.org:443",
        "//app.example.org",
        "https://",
        "https:app.example.org",
        "https:///path",
        "https://[::1",
        "https://*",
        "https://*.example.org",
        "https://app.example.org/",
        "https://app.example.org?q",
        "https://app.example.org#f",
        "https://user@app.example.org",
        "https://app.example.org:port",
        "https://app.example.org:99999",
        " https://app.example.org",
        "https://app.example.org, https://other.example.org",
    ],
)
def test_what_is_no_origin_can_not_be_trusted(origin: Any) -> None:
    """scheme://host[:port]: a setting that never matches would be noticed too late."""
    with pytest.raises(ConfigError, match=r"^gateway\.trusted_origins: expected"):
        parse_config({"gateway": {"trusted_origins": [origin]}})


@pytest.mark.parametrize(
    "origin",
    [APP, OTHER_APP, "http://127.0.0.1:3000", "http://[::1]:3000", "http://localhost:5173"],
)
def test_an_origin_can_be_trusted(origin: str) -> None:
    """With a name or an address, with a port or without."""
    assert parse_config({"gateway": {"trusted_origins": [origin]}})


@pytest.mark.parametrize("name", ["", 80, "*", "*.example.org", "gw.example.org:8080", "http://gw.example.org", "a, b"])
def test_what_is_no_name_can_not_be_one_of_ours(name: Any) -> None:
    """As it is in a Host header, without a port: what never matches would be noticed too late."""
    with pytest.raises(ConfigError, match=r"^gateway\.hosts: expected"):
        parse_config({"gateway": {"hosts": [name]}})
